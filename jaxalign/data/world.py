r"""SkillWorld: text preference data whose true reward is known.

A prompt names a topic and gives four arguments; a good answer opens in the
way that suits the topic, carries out the operation of the topic's cluster on
the arguments, adds no filler and closes well:

  reward = Q[topic, opener] + G[closer] + 2 * (fraction of correct arguments)
           - 0.25 * fillers;  -5 where the answer is malformed.

Q is the sum of a global, a cluster and a topic normal draw (1.0, 0.7, 0.7),
G is 0.7 times a normal. Pairs are two candidates labelled by Bradley-Terry at
a temperature, so about 14 % of labels disagree with the truth. A job needs no
judge here: the win rate is measured by this reward.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core.errors import ConfigError

MALFORMED = -5.0
_LEAST = dict(
  topics=1,
  arguments=1,
  argument_words=2,
  sft_rows=0,
  pool_rows=1,
  held_out_rows=1,
)
# What no config sets; an experiment of its own may, see `build_world`.
_FIXED = dict(
  clusters=8,
  openers=8,
  closers=6,
  fillers=4,
  forms=12,
  corrupt=0.25,  # chance that a candidate gets an argument wrong
  temperature=0.5,  # of the Bradley-Terry labels
)
OPERATIONS = ("copy", "reverse", "sort", "shift")


class World(NamedTuple):
  """The words, the truth and the frequencies of one world."""

  knobs: dict[str, Any]
  words: dict[str, list]  # role -> words; "synonyms" [topics][3]
  topic_p: np.ndarray  # [topics] Zipf frequencies
  opener_value: np.ndarray  # [topics, openers]
  closer_value: np.ndarray  # [closers]
  topic_of: dict[str, int]  # synonym -> topic
  cluster_of: np.ndarray  # [topics]
  shift_of: np.ndarray  # [clusters] how far a "shift" cluster shifts


def _words(count: int) -> list[str]:
  """`count` distinct pronounceable words of three letters, in a fixed order."""
  consonants, vowels = "bdfgklmnprstvz", "aeiou"
  pool = [a + v + b for a in consonants for v in vowels for b in consonants]
  order = np.random.Generator(np.random.Philox(key=97)).permutation(len(pool))
  if count > len(pool):
    raise ConfigError(
      "the world's topics (three words each), forms, arguments, openers, "
      f"fillers and closers need {count} words, {len(pool)} exist; set "
      "config.data.world"
    )
  return [pool[i] for i in order[:count]]


def build_world(knobs: dict[str, Any], seed: int) -> World:
  """Draws the truth of the world; the same knobs and seed, the same world.

  Args:
    knobs: `config.data.world`: topics, arguments, argument_words, redundancy,
      flips, junk, and the row counts sft_rows, pool_rows, held_out_rows; it may
      hold other values of `_FIXED` too.
    seed: any integer.
  """
  k = _FIXED | dict(knobs)
  for name, least in _LEAST.items():
    if k[name] < least:
      raise ConfigError(
        f"data.world.{name}={k[name]}, wanted {least} or more; "
        "set config.data.world"
      )
  rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
  sizes = dict(
    synonyms=3 * k["topics"],
    forms=k["forms"],
    arguments=k["argument_words"],
    openers=k["openers"],
    fillers=k["fillers"],
    closers=k["closers"],
  )
  flat = iter(_words(sum(sizes.values())))
  words = {n: list(itertools.islice(flat, size)) for n, size in sizes.items()}
  names = words["synonyms"]
  words["synonyms"] = [names[i : i + 3] for i in range(0, len(names), 3)]
  p = 1.0 / np.arange(1, k["topics"] + 1)
  cluster_of = rng.permutation(np.arange(k["topics"]) % k["clusters"])
  value = (
    1.0 * rng.normal(size=(1, k["openers"]))
    + 0.7 * rng.normal(size=(k["clusters"], k["openers"]))[cluster_of]
    + 0.7 * rng.normal(size=(k["topics"], k["openers"]))
  )
  return World(
    k,
    words,
    p / p.sum(),
    value,
    0.7 * rng.normal(size=k["closers"]),
    {name: i // 3 for i, name in enumerate(names)},
    cluster_of,
    rng.integers(1, k["argument_words"], size=k["clusters"]),
  )


def correct_arguments(
  world: World, topic: int, arguments: list[str]
) -> list[str]:
  """The correct arguments of an answer: the cluster's operation applied."""
  names = world.words["arguments"]
  index = [names.index(a) for a in arguments]
  cluster = int(world.cluster_of[topic])
  shift = int(world.shift_of[cluster])
  results = dict(
    copy=index,
    reverse=index[::-1],
    sort=sorted(index),
    shift=[(i + shift) % len(names) for i in index],
  )
  operation = OPERATIONS[cluster % len(OPERATIONS)]
  return [names[i] for i in results[operation]]


def topic(world: World, prompt: str) -> int:
  """The topic a prompt is about, -1 where it names none."""
  words = prompt.split()
  return world.topic_of.get(words[1], -1) if len(words) > 1 else -1


def reward(world: World, prompt: str, response: str) -> float:
  """The true reward of a response, `MALFORMED` where it cannot be parsed."""
  question, words = prompt.split(), response.split()
  n, w, which = world.knobs["arguments"], world.words, topic(world, prompt)
  if which < 0 or len(words) < n + 2:
    return MALFORMED
  opener, closer = words[0], words[-1]
  given, filler = words[1 : n + 1], words[n + 1 : -1]
  if opener not in w["openers"] or closer not in w["closers"]:
    return MALFORMED
  known = {*given} <= {*w["arguments"]} and {*filler} <= {*w["fillers"]}
  if not known or len(filler) > 3:
    return MALFORMED
  right = correct_arguments(world, which, question[4 : 4 + n])
  correct = sum(a == b for a, b in zip(given, right)) / n
  return float(
    world.opener_value[which, w["openers"].index(opener)]
    + world.closer_value[w["closers"].index(closer)]
    + 2 * correct
    - 0.25 * len(filler)
  )


def faults(world: World, rows: list[dict]) -> dict[str, float]:
  """Fractions of pairs whose label is "wrong", and of "junk" pairs.

  Wrong: the rejected answer has the higher true reward. Junk: neither answer
  can be parsed, so that no label is right.
  """
  sides = ("chosen", "rejected")
  rewards = [[reward(world, r["prompt"], r[s]) for s in sides] for r in rows]
  junk = sum(good == bad == MALFORMED for good, bad in rewards)
  wrong = sum(good < bad for good, bad in rewards)
  return dict(wrong=wrong / len(rows), junk=junk / len(rows))


def _prompt(world: World, rng: np.random.Generator) -> str:
  w, t = world.words, rng.choice(len(world.topic_p), p=world.topic_p)
  words = [
    *rng.choice(w["synonyms"][t], 2),
    rng.choice(w["forms"]),
    *rng.choice(w["arguments"], world.knobs["arguments"]),
  ]
  return " ".join(["ask", *map(str, words), "then"])


def _candidate(world: World, rng: np.random.Generator, prompt: str) -> str:
  w, n = world.words, world.knobs["arguments"]
  right = correct_arguments(
    world, topic(world, prompt), prompt.split()[4 : 4 + n]
  )
  wrong = rng.random(n) < world.knobs["corrupt"]
  given = [rng.choice(w["arguments"]) if x else a for a, x in zip(right, wrong)]
  filler = list(rng.choice(w["fillers"], rng.integers(0, 4)))
  opener, closer = rng.choice(w["openers"]), rng.choice(w["closers"])
  return "".join(f" {word}" for word in [opener, *given, *filler, closer])


def _junk(world: World, rng: np.random.Generator, prompt: str) -> str:
  del prompt
  roles = ("arguments", "openers", "fillers", "closers", "forms")
  flat = [word for role in roles for word in world.words[role]]
  words = rng.choice(flat, world.knobs["arguments"] + 3)
  return "".join(f" {word}" for word in words)


def _distinct(world, rng, prompt, make):
  first, second = make(world, rng, prompt), make(world, rng, prompt)
  while first == second:  # a pair of equal texts teaches nothing
    second = make(world, rng, prompt)
  return first, second


def generate_rows(world: World, seed: int) -> dict[str, list[dict[str, Any]]]:
  """Rows of the three splits: `sft`, `pool` and `held_out`.

  Returns:
    sft: {prompt, response}: single candidates. pool: {prompt, chosen,
    rejected}, with the fractions of repeated prompts, flipped labels and junk
    rows of the knobs. held_out: clean pairs, each with a `target`, the
    truth-preferred of two fresh candidates.
  """
  k, sides = world.knobs, ("prompt", "chosen", "rejected")
  stream = lambda i: np.random.Generator(np.random.Philox(key=[seed, 10 + i]))

  def labelled(rng, prompt, flips):
    a, b = _distinct(world, rng, prompt, _candidate)
    gap = reward(world, prompt, a) - reward(world, prompt, b)
    first = rng.random() < 1 / (1 + np.exp(-gap / k["temperature"]))
    flipped = rng.random() < flips
    return (a, b) if first != flipped else (b, a)

  rng, sft, pool, held_out = stream(0), [], [], []
  for _ in range(k["sft_rows"]):
    prompt = _prompt(world, rng)
    sft.append(dict(prompt=prompt, response=_candidate(world, rng, prompt)))
  rng = stream(1)
  head = [_prompt(world, rng) for _ in range(20)]
  for _ in range(k["pool_rows"]):
    repeat, junk = rng.random(2) < (k["redundancy"], k["junk"])
    prompt = str(rng.choice(head)) if repeat else _prompt(world, rng)
    if junk:
      pair = _distinct(world, rng, prompt, _junk)
    else:
      pair = labelled(rng, prompt, k["flips"])
    pool.append(dict(zip(sides, (prompt, *pair))))
  rng = stream(2)
  for _ in range(k["held_out_rows"]):
    prompt = _prompt(world, rng)
    row = dict(zip(sides, (prompt, *labelled(rng, prompt, 0.0))))
    two = [_candidate(world, rng, prompt) for _ in range(2)]
    target = max(two, key=lambda answer: reward(world, prompt, answer))
    held_out.append(row | dict(target=target))
  return dict(sft=sft, pool=pool, held_out=held_out)
