"""SkillWorld: the reward by hand, its knobs as fractions, one piece a word."""

import functools

import numpy as np
import pytest

from configs import common
from jaxalign.core.errors import ConfigError
from jaxalign.data import world as worlds
from jaxalign.data.tokenizer import Tokenizer, train_tokenizer

SIDES = ("chosen", "rejected")


def built(seed=0, **changes):
  sizes = dict(sft_rows=400, pool_rows=4000, held_out_rows=300)
  knobs = common.base().data.world.to_dict() | sizes | changes
  return worlds.build_world(knobs, seed)


def made(seed=0, **changes):
  """A world, and the rows that it draws with the seed 1."""
  world = built(seed, **changes)
  return world, worlds.generate_rows(world, 1)


default = functools.cache(made)


# The reward, on a world small enough to write down.


def tiny(operation):
  """Two topics, whose cluster has the operation."""
  number = worlds.OPERATIONS.index(operation)
  synonyms = [["cat", "puss", "tom"], ["dog", "cur", "pup"]]
  words = dict(
    synonyms=synonyms,
    forms=["please"],
    arguments=["a0", "a1", "a2", "a3", "a4"],
    openers=["hi", "yo"],
    fillers=["um"],
    closers=["bye", "end"],
  )
  return worlds.World(
    dict(arguments=3, argument_words=5),
    words,
    np.array([0.6, 0.4]),
    np.array([[1.0, -1.0], [0.25, 0.5]]),
    np.array([0.75, -0.5]),
    {word: i for i, names in enumerate(synonyms) for word in names},
    np.array([number, number]),
    np.array([1, 1, 1, 3]),
  )


PROMPT = "ask cat puss please a4 a1 a3 then"


@pytest.mark.parametrize(
  "operation,right",
  [("copy", "a4 a1 a3"), ("reverse", "a3 a1 a4"), ("sort", "a1 a3 a4")]
  + [("shift", "a2 a4 a1")],
)
def test_the_right_answer_earns_everything(operation, right):
  world = tiny(operation)
  assert worlds.correct_arguments(world, 0, ["a4", "a1", "a3"]) == right.split()
  # Opener 1, closer 0.75, arguments 2.
  assert worlds.reward(world, PROMPT, f" hi {right} bye") == 3.75
  assert worlds.reward(world, PROMPT, " hi a0 a0 a0 bye") == 1.75


@pytest.mark.parametrize(
  "response,wanted",
  [
    (" hi a4 a1 a3 bye", 1 + 0.75 + 2),
    (" yo a4 a1 a3 bye", -1 + 0.75 + 2),
    (" hi a4 a1 a3 end", 1 - 0.5 + 2),
    (" hi a4 a1 a0 bye", 1 + 0.75 + 4 / 3),
    (" hi a1 a4 a3 bye", 1 + 0.75 + 2 / 3),
    (" hi a4 a1 a3 um bye", 1 + 0.75 + 2 - 0.25),
    (" hi a4 a1 a3 um um um bye", 1 + 0.75 + 2 - 0.75),
  ],
)
def test_the_reward_by_hand(response, wanted):
  assert worlds.reward(tiny("copy"), PROMPT, response) == pytest.approx(wanted)


def test_the_opener_s_worth_is_the_topic_s():
  """Topic dog likes yo better; any synonym in second place names it."""
  for word in ("dog", "cur", "pup"):
    prompt = f"ask {word} dog please a0 a1 a2 then"
    for opener, wanted in (("hi", 0.25 + 0.75 + 2), ("yo", 0.5 + 0.75 + 2)):
      response = f" {opener} a0 a1 a2 bye"
      assert worlds.reward(tiny("copy"), prompt, response) == wanted


RIGHT = " hi a4 a1 a3 bye"


@pytest.mark.parametrize(
  "prompt, response",
  [
    (x, RIGHT)
    for x in ("", "ask", "cat", PROMPT.replace("cat puss", "bird puss"))
  ]
  + [(PROMPT, x) for x in ("", " ", "bye", " hi bye", " hi a4 a1 a3")]
  # An argument too few, or too many; no opener; no closer.
  + [(PROMPT, " hi a4 a1 bye"), (PROMPT, " hi a4 a1 a3 a0 bye")]
  + [(PROMPT, " a4 a1 a3 bye"), (PROMPT, " um a4 a1 a3 bye")]
  + [(PROMPT, " hi a4 a1 a3 um"), (PROMPT, " hi a4 a1 a3 hi")]
  # An argument that is none, four fillers, words of another case or place.
  + [(PROMPT, " hi a4 um a3 bye"), (PROMPT, " hi a4 a1 cat bye")]
  + [(PROMPT, " hi a4 a1 a3 um um um um bye"), (PROMPT, " hi a4 a1 a3 bye bye")]
  + [(PROMPT, " hi a4 a1 a3 bye um"), (PROMPT, " hia4 a1 a3 bye")]
  + [(PROMPT, " HI a4 a1 a3 bye")],
)
def test_malformed_answers_and_prompts(prompt, response):
  assert worlds.reward(tiny("copy"), prompt, response) == -5.0


# What is drawn.


def test_the_same_seed_is_the_same_world():
  world, rows = default()
  for a, b in zip(world, built()):
    assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
  other = built(seed=1)
  assert (other.opener_value != world.opener_value).any()
  assert other.words == world.words  # the words are everyone's
  # Fewer rows are the first of them; one split does not move another.
  _, fewer = made(pool_rows=500)
  assert fewer["pool"] == rows["pool"][:500]
  assert (fewer["sft"], fewer["held_out"]) == (rows["sft"], rows["held_out"])
  small = built(sft_rows=1, pool_rows=100, held_out_rows=1)
  assert worlds.generate_rows(small, 2)["pool"] != rows["pool"][:100]


def test_the_truth_is_drawn_as_written():
  """Q's variance is 1 + 0.49 + 0.49, G's 0.49; a topic is Zipf."""
  worlds_ = [built(seed=seed) for seed in range(300)]
  q = np.array([world.opener_value for world in worlds_])
  g = np.array([world.closer_value for world in worlds_])
  assert q[:, 0, 0].var() == pytest.approx(1.98, rel=0.2)
  assert g.var() == pytest.approx(0.49, rel=0.1)
  # Of two topics that share nothing but the global part: covariance 1.
  world = worlds_[0]
  a, b = 0, int(np.flatnonzero(world.cluster_of != world.cluster_of[0])[0])
  apart = [w.cluster_of[a] != w.cluster_of[b] for w in worlds_]
  far = (q[apart, a] * q[apart, b]).mean()
  assert far == pytest.approx(1.0, rel=0.15)
  p = world.topic_p
  np.testing.assert_allclose(p * np.arange(1, 65), p[0])
  assert p.sum() == pytest.approx(1.0)
  assert sorted(np.bincount(world.cluster_of)) == [8] * 8


def test_topics_come_as_often_as_zipf_says():
  world, rows = default()
  topics = [worlds.topic(world, r["prompt"]) for r in rows["pool"]]
  wanted = world.topic_p * 4000
  off = np.bincount(topics, minlength=64) - wanted
  assert (off**2 / wanted).sum() < 103.4  # 63 degrees, p = 0.001


def gaps(world, rows):
  """[n] true reward of the chosen answer less that of the rejected one."""
  value = lambda row, side: worlds.reward(world, row["prompt"], row[side])
  return np.array([value(r, "chosen") - value(r, "rejected") for r in rows])


def test_about_14_percent_of_labels_disagree_with_the_truth():
  rates = []
  for seed in range(6):
    world = built(seed, sft_rows=1, held_out_rows=1, pool_rows=1200)
    pool = worlds.generate_rows(world, seed)["pool"]
    rates.append((gaps(world, pool) < 0).mean())
  assert 0.12 < np.mean(rates) < 0.16, rates


def test_labels_are_bradley_terry():
  """P(chosen better) by gap is the logistic of gap / temperature."""
  world, rows = made(pool_rows=5000, temperature=1.0)
  gap = gaps(world, rows["pool"])
  for low, high in ((0.2, 0.6), (0.8, 1.2), (1.6, 2.4)):
    inside = (np.abs(gap) > low) & (np.abs(gap) < high)
    wanted = (1 / (1 + np.exp(-np.abs(gap[inside])))).mean()
    error = 4 * np.sqrt(0.25 / inside.sum())
    assert abs((gap[inside] > 0).mean() - wanted) < error, (low, high)


def test_flips_turn_labels_around():
  (world, rows), (_, straight) = made(flips=0.3), default()
  rate = (gaps(world, straight["pool"]) < 0).mean()
  wanted = 0.3 * (1 - rate) + 0.7 * rate
  assert abs((gaps(world, rows["pool"]) < 0).mean() - wanted) < 0.04
  assert rows["held_out"] == straight["held_out"]  # measured on clean labels


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_redundancy_repeats_twenty_prompts(fraction):
  prompts = [r["prompt"] for r in made(redundancy=fraction)[1]["pool"]]
  names, counts = np.unique(prompts, return_counts=True)
  error = 4 * np.sqrt(4000 * max(fraction * (1 - fraction), 0.002))
  assert abs(np.sort(counts)[-20:].sum() - 4000 * fraction) < error + 60
  assert (len(names) <= 20) == (fraction == 1.0)


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_junk_is_random_words(fraction):
  world, rows = made(junk=fraction)
  value = lambda row, side: worlds.reward(world, row["prompt"], row[side])
  bad = [all(value(r, side) == -5.0 for side in SIDES) for r in rows["pool"]]
  error = 4 * np.sqrt(max(fraction * (1 - fraction), 1e-9) / 4000)
  assert abs(np.mean(bad) - fraction) < error + 1e-9


def test_the_rows_of_the_splits():
  world, rows = default()
  value = lambda row, side: worlds.reward(world, row["prompt"], row[side])
  sizes = {name: len(split) for name, split in rows.items()}
  assert sizes == dict(sft=400, pool=4000, held_out=300)
  for row in rows["pool"] + rows["held_out"]:
    assert row["chosen"] != row["rejected"]
    for side in SIDES:
      # A bad answer may be worth less than a malformed one, never the same.
      assert value(row, side) != -5.0
  assert set(rows["sft"][0]) == {"prompt", "response"}
  assert set(rows["held_out"][0]) == {"prompt", *SIDES, "target"}
  # The target is the better of two: it beats a single candidate's mean.
  target = np.mean([value(row, "target") for row in rows["held_out"]])
  assert target > np.mean([value(row, "response") for row in rows["sft"]]) + 0.3


def test_arguments_are_corrupted_as_often_as_configured():
  """A quarter is drawn anew; one redraw in 16 is right again."""
  world, rows = default()
  right = []
  for row in rows["sft"]:
    topic, words = worlds.topic(world, row["prompt"]), row["prompt"].split()
    wanted = worlds.correct_arguments(world, topic, words[4:8])
    right += [a == b for a, b in zip(wanted, row["response"].split()[1:5])]
  assert np.mean(right) == pytest.approx(1 - 0.25 * 15 / 16, abs=0.04)


def test_more_words_than_there_are():
  with pytest.raises(ConfigError, match="980 exist; set config.data.world"):
    built(topics=400)
  assert len(set(worlds._words(980))) == 980


def test_one_piece_a_word():
  world, rows = default()
  texts = [r["prompt"] + r["response"] for r in rows["sft"]]
  texts += [r["prompt"] + r["chosen"] for r in rows["pool"]]
  tok = Tokenizer(train_tokenizer(texts, 1024))
  for text in texts[:300]:
    ids = tok.encode(text)
    assert len(ids) == len(text.split())
    assert tok.decode(ids) == text
  words = np.concatenate([np.ravel(names) for names in world.words.values()])
  seen = {w for t in texts for w in t.split()}
  assert seen <= {"ask", "then", *words}
  for word in seen - {"ask"}:  # "ask" only ever opens a text
    assert len(tok.encode_response(f" {word}")) == 1, word
