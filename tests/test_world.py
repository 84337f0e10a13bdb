"""SkillWorld: the reward by hand, the knobs' shares, one piece a word."""

import functools

import numpy as np
import pytest

from configs import common
from jaxalign.core.errors import ConfigError
from jaxalign.data import tokenizer
from jaxalign.data import world as worlds


def knobs(**changes):
  return (
    common.base().data.world.to_dict()
    | dict(sft_rows=400, pool_rows=4000, held_out_rows=300)
    | changes
  )


@functools.lru_cache
def default():
  world = worlds.build_world(knobs(), 0)
  return world, worlds.generate_rows(world, 1)


# The reward, on a world small enough to write down.


def tiny(operation):
  """Two topics; their cluster's operation is the one asked for."""
  number = worlds.OPERATIONS.index(operation)
  words = dict(
    synonyms=[["cat", "puss", "tom"], ["dog", "cur", "pup"]],
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
    dict(cat=0, puss=0, tom=0, dog=1, cur=1, pup=1),
    np.array([number, number]),
    np.array([1, 1, 1, 3]),
  )


PROMPT = "ask cat puss please a4 a1 a3 then"


@pytest.mark.parametrize(
  "operation,right",
  [
    ("copy", "a4 a1 a3"),
    ("reverse", "a3 a1 a4"),
    ("sort", "a1 a3 a4"),
    ("shift", "a2 a4 a1"),
  ],
)
def test_the_right_answer_earns_everything(operation, right):
  world = tiny(operation)
  assert worlds.answer(world, 0, ["a4", "a1", "a3"]) == right.split()
  # Opener 1, closer 0.75, arguments 2.
  assert worlds.reward(world, PROMPT, f" hi {right} bye") == 3.75
  wrong = "a0 a0 a0"
  assert worlds.reward(world, PROMPT, f" hi {wrong} bye") == 1.75


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
    got = [
      worlds.reward(tiny("copy"), prompt, f" {o} a0 a1 a2 bye")
      for o in ("hi", "yo")
    ]
    assert got == [0.25 + 0.75 + 2, 0.5 + 0.75 + 2]


@pytest.mark.parametrize(
  "response",
  [
    "",
    " ",
    "bye",
    " hi bye",
    " hi a4 a1 bye",  # an argument too few
    " a4 a1 a3 bye",
    " um a4 a1 a3 bye",  # no opener
    " hi a4 a1 a3",
    " hi a4 a1 a3 um",
    " hi a4 a1 a3 hi",  # no closer
    " hi a4 um a3 bye",
    " hi a4 a1 cat bye",  # an argument that is none
    " hi a4 a1 a3 a0 bye",  # one too many
    " hi a4 a1 a3 um um um um bye",  # four fillers
    " hi a4 a1 a3 bye bye",
    " hi a4 a1 a3 bye um",
    " hia4 a1 a3 bye",
    " HI a4 a1 a3 bye",
  ],
)
def test_malformed_answers(response):
  assert worlds.reward(tiny("copy"), PROMPT, response) == -5.0


@pytest.mark.parametrize(
  "prompt", ["", "ask", "cat", "ask bird puss please a4 a1 a3 then"]
)
def test_a_prompt_that_asks_nothing(prompt):
  assert worlds.reward(tiny("copy"), prompt, " hi a4 a1 a3 bye") == -5.0


# What is drawn.


def fewer_world(**changes):
  return worlds.build_world(
    knobs(sft_rows=1, pool_rows=100, held_out_rows=1) | changes, 0
  )


def test_the_same_seed_is_the_same_world():
  world, rows = default()
  again = worlds.build_world(knobs(), 0)
  for a, b in zip(world, again):
    assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
  other = worlds.build_world(knobs(), 1)
  assert (other.opener_value != world.opener_value).any()
  assert other.words == world.words  # the words are everyone's
  # Fewer rows are the first of them; one split does not move another.
  fewer = worlds.generate_rows(worlds.build_world(knobs(pool_rows=500), 0), 1)
  assert fewer["pool"] == rows["pool"][:500]
  assert (fewer["sft"], fewer["held_out"]) == (rows["sft"], rows["held_out"])
  assert worlds.generate_rows(fewer_world(), 2)["pool"] != rows["pool"][:100]


def test_the_truth_is_drawn_as_written():
  """Q's variance is 1 + 0.49 + 0.49, G's 0.49; a topic is Zipf."""
  q, g, p = [], [], default()[0].topic_p
  for seed in range(300):
    world = worlds.build_world(knobs(), seed)
    q.append(world.opener_value)
    g.append(world.closer_value)
  q, g = np.array(q), np.array(g)
  assert q[:, 0, 0].var() == pytest.approx(1.98, rel=0.2)
  assert g.var() == pytest.approx(0.49, rel=0.1)
  # Of two topics that share nothing but the global part: covariance 1.
  world = default()[0]
  a, b = 0, int(np.flatnonzero(world.cluster_of != world.cluster_of[0])[0])
  far = np.mean(
    [
      np.mean(q[i, a] * q[i, b])
      for i in range(300)
      if _cluster(i)[a] != _cluster(i)[b]
    ]
  )
  assert far == pytest.approx(1.0, rel=0.15)
  np.testing.assert_allclose(p * np.arange(1, 65), p[0])
  assert p.sum() == pytest.approx(1.0)
  assert sorted(np.bincount(world.cluster_of)) == [8] * 8


@functools.cache
def _cluster(seed):
  return worlds.build_world(knobs(), seed).cluster_of


def test_topics_come_as_often_as_zipf_says():
  world, rows = default()
  seen = np.bincount(
    [worlds.topic(world, r["prompt"]) for r in rows["pool"]], minlength=64
  )
  wanted = world.topic_p * 4000
  assert ((seen - wanted) ** 2 / wanted).sum() < 103.4  # 63 degrees, p = 0.001


def disagree(world, rows):
  """Share of pairs whose chosen answer is truly worse."""
  gap = [
    worlds.reward(world, r["prompt"], r["chosen"])
    - worlds.reward(world, r["prompt"], r["rejected"])
    for r in rows
  ]
  return np.mean(np.array(gap) < 0)


def test_about_14_percent_of_labels_disagree_with_the_truth():
  rates = []
  for seed in range(6):
    world = worlds.build_world(
      knobs(sft_rows=1, held_out_rows=1, pool_rows=1200), seed
    )
    rates.append(disagree(world, worlds.generate_rows(world, seed)["pool"]))
  assert 0.12 < np.mean(rates) < 0.16, rates


def test_labels_are_bradley_terry():
  """P(chosen better) by gap is the logistic of gap / temperature."""
  world = worlds.build_world(knobs(pool_rows=5000, temperature=1.0), 0)
  gap = np.array(
    [
      worlds.reward(world, r["prompt"], r["chosen"])
      - worlds.reward(world, r["prompt"], r["rejected"])
      for r in worlds.generate_rows(world, 1)["pool"]
    ]
  )
  for low, high in ((0.2, 0.6), (0.8, 1.2), (1.6, 2.4)):
    inside = (np.abs(gap) > low) & (np.abs(gap) < high)
    wanted = (1 / (1 + np.exp(-np.abs(gap[inside])))).mean()
    error = 4 * np.sqrt(0.25 / inside.sum())
    assert abs((gap[inside] > 0).mean() - wanted) < error, (low, high)


def test_flips_turn_labels_around():
  world = worlds.build_world(knobs(flips=0.3), 0)
  straight, rows = default()[1], worlds.generate_rows(world, 1)
  rate = disagree(world, straight["pool"])
  wanted = 0.3 * (1 - rate) + 0.7 * rate
  assert abs(disagree(world, rows["pool"]) - wanted) < 0.04
  assert rows["held_out"] == straight["held_out"]  # measured on clean labels


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_redundancy_repeats_twenty_prompts(share):
  rows = worlds.generate_rows(
    worlds.build_world(knobs(redundancy=share), 0), 1
  )["pool"]
  prompts = [r["prompt"] for r in rows]
  names, counts = np.unique(prompts, return_counts=True)
  top = np.sort(counts)[-20:]
  error = 4 * np.sqrt(4000 * max(share * (1 - share), 0.002))
  assert abs(top.sum() - 4000 * share) < error + 60
  assert (len(names) <= 20) == (share == 1.0)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_junk_is_random_words(share):
  world = worlds.build_world(knobs(junk=share), 0)
  rows = worlds.generate_rows(world, 1)["pool"]
  bad = np.mean(
    [
      all(
        worlds.reward(world, r["prompt"], r[side]) == -5.0
        for side in ("chosen", "rejected")
      )
      for r in rows
    ]
  )
  assert (
    abs(bad - share) < 4 * np.sqrt(max(share * (1 - share), 1e-9) / 4000) + 1e-9
  )


def test_the_rows_of_the_splits():
  world, rows = default()
  assert {n: len(r) for n, r in rows.items()} == dict(
    sft=400, pool=4000, held_out=300
  )
  for r in rows["pool"] + rows["held_out"]:
    assert r["chosen"] != r["rejected"]
    for side in ("chosen", "rejected"):
      # A bad answer may be worth less than a malformed one, never the same.
      assert worlds.reward(world, r["prompt"], r[side]) != -5.0
  assert set(rows["sft"][0]) == {"prompt", "response"}
  assert set(rows["held_out"][0]) == {"prompt", "chosen", "rejected", "target"}
  # The target is the better of two: it beats a single candidate's mean.
  target = [
    worlds.reward(world, r["prompt"], r["target"]) for r in rows["held_out"]
  ]
  single = [
    worlds.reward(world, r["prompt"], r["response"]) for r in rows["sft"]
  ]
  assert np.mean(target) > np.mean(single) + 0.3


def test_arguments_are_corrupted_as_often_as_asked():
  """A quarter is drawn anew; one redraw in 16 is right again."""
  world, rows = default()
  right = []
  for r in rows["sft"]:
    wanted = worlds.answer(
      world, worlds.topic(world, r["prompt"]), r["prompt"].split()[4:8]
    )
    right += [a == b for a, b in zip(wanted, r["response"].split()[1:5])]
  assert np.mean(right) == pytest.approx(1 - 0.25 * 15 / 16, abs=0.04)


def test_more_words_than_there_are():
  with pytest.raises(ConfigError, match="980 exist; set config.data.world"):
    worlds.build_world(knobs(topics=400), 0)
  assert len(set(worlds._words(980))) == 980


def test_one_piece_a_word():
  world, rows = default()
  texts = [r["prompt"] + r["response"] for r in rows["sft"]]
  texts += [r["prompt"] + r["chosen"] for r in rows["pool"]]
  tok = tokenizer.Tokenizer(tokenizer.train_tokenizer(texts, 1024))
  for text in texts[:300]:
    ids = tok.encode(text)
    assert len(ids) == len(text.split())
    assert tok.decode(ids) == text
  words = [
    w
    for role in world.words.values()
    for w in (sum(role, []) if isinstance(role[0], list) else role)
  ]
  seen = {w for t in texts for w in t.split()}
  assert seen <= {"ask", "then", *words}
  for word in seen - {"ask"}:  # "ask" only ever opens a text
    assert len(tok.encode_response(f" {word}")) == 1, word
