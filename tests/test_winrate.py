"""Wins, ties and topics by hand; the health of what was generated."""

import json

import numpy as np
import pytest
from sklearn import linear_model

from jaxalign.core.errors import DataError
from jaxalign.data import tokens as tokens_lib
from jaxalign.data import world as worlds
from jaxalign.eval import held_out, winrate

EOS = 2
Z = 1.959963984540054


def test_wins_by_hand():
  np.testing.assert_array_equal(
    winrate.wins([3, 1, 2, -5, -5], [1, 3, 2, -5, 0]), [1, 0, 0.5, 0.5, 0]
  )


def test_win_metrics_by_hand():
  """Topic a: a win, a tie; topic b: a loss. Mean 1/2, of topics 3/8."""
  args = ("target", winrate.wins([2.0, 1.0, 0.0], [1.0] * 3), "abc", "abc")
  out, _ = winrate.win_metrics(*args, ["a", "a", "b"])
  assert out["win_vs_target"]["value"] == 0.5 and out["win_vs_target"]["n"] == 3
  assert out["win_vs_target"]["ties"] == pytest.approx(1 / 3)
  assert out["win_vs_target_macro"]["value"] == 0.375
  assert "win_vs_target_macro" not in winrate.win_metrics(*args, None)[0]


def test_the_two_sides_add_up_and_a_policy_ties_with_itself():
  a, b = np.random.default_rng(1).integers(0, 4, (2, 200))
  rate = lambda x, y: winrate.win_rate(winrate.wins(x, y))
  ours, theirs = rate(a, b), rate(b, a)
  assert ours["value"] + theirs["value"] == pytest.approx(1.0)
  assert ours["ties"] == theirs["ties"] == np.mean(a == b)
  same = rate(a, a)
  assert same["value"] == 0.5 and same["ties"] == 1.0
  assert same["low"] < 0.5 < same["high"]


def test_generation_health_by_hand():
  answers = [np.array(x, np.int32) for x in ([5, 6, EOS], [EOS], [5, 5, 5], [])]
  out = held_out.generation_health(answers, EOS, None)
  assert out["ended"]["value"] == out["empty"]["value"] == 0.5
  assert out["malformed"]["value"] == 0.75  # empty, or without an end
  assert out["length"]["value"] == 7 / 4
  grammar = np.array([1, 0, 0, 0], bool)  # knows better
  out = held_out.generation_health(answers, EOS, grammar)
  assert out["malformed"]["value"] == 0.25


# The metrics of one policy, put together.

SIZES = dict(topics=4, clusters=2, arguments=2, argument_words=5, openers=3)
SIZES |= dict(closers=2, fillers=2, forms=2, sft_rows=1, pool_rows=1)
KNOBS = SIZES | dict(held_out_rows=12, corrupt=0.5, temperature=0.5)
KNOBS |= dict(redundancy=0.0, flips=0.0, junk=0.0)


class Ids:
  stops = (EOS,)


def outputs(logp, reward, own):
  n, reward, own = len(reward), np.asarray(reward), np.full(len(reward), own)
  answers, texts = [np.array([7, EOS])] * n, [""] * n
  return held_out.PolicyOutputs(logp, answers, texts, own, reward, 0, 0)


def rows_of(start, ids=(), width=4):
  """Token rows of `width` tokens each, of one part."""
  n = len(start)
  ids = np.asarray(ids if len(ids) else np.zeros(width * n), np.int32)
  start = np.asarray(start, np.int32)
  offsets = np.arange(0, width * n + 1, width)
  return tokens_lib.TokenRows(ids, offsets, start, np.zeros(n, np.int32))


def test_policy_metrics_by_hand():
  world = worlds.build_world(KNOBS, 3)
  rows = worlds.generate_rows(world, 3)["held_out"]
  n, tokens = len(rows), rows_of([2] * 2 * len(rows))
  index = held_out.choose_prompts(rows, tokens, 4, 8)
  prompts = [rows[i]["prompt"] for i in index]
  targets = [rows[i]["target"] for i in index]
  assert len(set(prompts)) == len(prompts) == 4
  what = held_out.EvalSet(rows, tokens, index, Ids(), world)
  best = [worlds.reward(world, p, t) for p, t in zip(prompts, targets)]
  logp = np.zeros((n, 2))
  logp[:3, 0], logp[3, 1] = 1.0, 1.0  # prefers 3 chosen, 1 rejected; rest tie
  mine = [best[0] + 1, best[1], best[2] - 1, worlds.MALFORMED]
  policy = outputs(logp, mine, -3.0)
  base = outputs(np.zeros((n, 2)), [*best[:3], -6.0], 0.0)
  out = held_out.policy_metrics(what, policy, base, np.array([-4.0] * 4))
  assert out["win_vs_target"]["value"] == 1.5 / 4
  assert out["win_vs_sft"]["value"] == 2.5 / 4
  assert out["accuracy"]["value"] == 0.75 and out["accuracy"]["n"] == 4
  assert out["accuracy"]["ties"] == (n - 4) / n
  assert out["kl"]["value"] == 1.0
  assert out["malformed"]["value"] == 0.25 and out["ended"]["value"] == 1.0
  topics = np.array([worlds.topic(world, p) for p in prompts])
  wins = np.array([1.0, 0.5, 0.0, 0.0])
  by_topic = {t: wins[topics == t].mean() for t in set(topics.tolist())}
  macro = np.mean(list(by_topic.values()))
  assert out["win_vs_target_macro"]["value"] == pytest.approx(macro)
  details = out["details"]
  rates = {k: x["value"] for k, x in details["outcomes"].items()}
  assert rates == dict(wins=0.25, ties=0.25, losses=0.5, decided=1 / 3)
  assert sum(x["n"] for x in details["by_topic"].values()) == 4
  first = topics[0].item()
  assert details["by_topic"][str(first)]["value"] == by_topic[first]
  # The answers here are empty: shorter than every target, by all of it.
  fair = details["equal_length"]
  assert fair["raw"]["value"] == 1.5 / 4
  assert fair["longer"] == -np.mean([len(t) for t in targets])
  assert out["win_vs_target_equal_length"]["value"] == fair["value"]


def test_prompts_are_used_once_and_in_order(capsys):
  rows = [dict(prompt=p) for p in "abacbd"]
  tokens = rows_of(np.repeat([3, 4, 3, 9, 4, 4], 2))
  choose = lambda *how: held_out.choose_prompts(rows, tokens, *how).tolist()
  assert choose(10, 16) == [0, 1, 3, 5] and choose(2, 16) == [0, 1]
  capsys.readouterr()
  assert choose(10, 8) == [0, 1, 5]  # never cut: left out, and counted
  assert "1 held-out prompts of over 8 tokens" in capsys.readouterr().out


def test_unpaired_are_paired_by_rank():
  rows = [dict(label=x) for x in (True, False, False, True, True)]
  what = held_out.EvalSet(rows, None, np.zeros(0), None, None)
  policy = np.array([[10.0], [20.0], [30.0], [40.0], [50.0]])
  a, b = held_out.as_pairs(what, policy, policy + 1)
  np.testing.assert_array_equal(a, [[10, 20], [40, 30]])
  np.testing.assert_array_equal(b, [[11, 21], [41, 31]])


def test_answers_are_scored_after_their_prompts():
  prompts = [np.array([1, 5, 6]), np.array([1, 7])]
  answers = [np.array([8, EOS]), np.array([9, 9, EOS])]
  rows = held_out.answer_rows(prompts, answers)
  assert rows.ids.tolist() == [1, 5, 6, 8, EOS, 1, 7, 9, 9, EOS]
  assert rows.offsets.tolist() == [0, 5, 10]
  assert rows.start.tolist() == [3, 2]
  tokens, mask = tokens_lib.pad_rows(rows, np.arange(2), 6)
  scored = [t[m].tolist() for t, m in zip(tokens, mask)]
  assert scored == [x.tolist() for x in answers]
  # Two rows a record: the prompt is that of the first.
  tokens = rows_of([1, 2, 1, 2, 1, 2], np.arange(18), 3)
  what = held_out.EvalSet([{}, {}, {}], tokens, np.array([0, 2]), None, None)
  assert [p.tolist() for p in held_out.prompts_of(what)] == [[0], [12]]


# A judge's outcomes.


def test_outcomes_by_hand():
  out = winrate.outcome_rates([1, 1, 0.5, 0])
  assert [out[k]["value"] for k in ("wins", "ties", "losses")] == [
    0.5,
    0.25,
    0.25,
  ]
  assert out["decided"]["value"] == pytest.approx(2 / 3)
  assert winrate.outcome_rates([0.5])["decided"]["n"] == 0


def test_groups_stand_largest_first():
  out = winrate.by_group([1, 0, 0.5, 1, 0.5], ["a", "b", "b", "b", "c"])
  assert list(out) == ["b", "a", "c"]
  assert out["b"]["value"] == 0.5 and out["b"]["n"] == 3
  assert out["b"]["ties"] == pytest.approx(1 / 3) and out["c"]["ties"] == 1.0


def test_both_orders_by_hand():
  nan = np.nan
  out = winrate.both_orders([1, 1, 0.5, nan, 1], [1, 0, 0.5, 1, 0.5])
  np.testing.assert_array_equal(out["outcomes"], [1, 0.5, 0.5, nan, 0.75])
  assert out["rate"]["value"] == 2.75 / 4 and out["rate"]["n"] == 4
  assert out["rate"]["ties"] == 0.5 and out["consistent"]["value"] == 0.5
  assert out["bias"]["value"] == (0 + 0.5 + 0 + 0.25) / 4
  assert out["unparsable"]["value"] == 0.1


@pytest.mark.parametrize("first,bias", [(1, 0.5), (0, -0.5)])
def test_a_judge_that_always_names_one_place(first, bias):
  out = winrate.both_orders([first] * 20, [1 - first] * 20)
  assert out["bias"]["value"] == bias and out["rate"]["value"] == 0.5
  assert out["consistent"]["value"] == 0.0


def test_a_judge_that_cannot_be_read():
  silent = winrate.both_orders(np.full(3, np.nan), np.full(3, np.nan))
  assert silent["unparsable"]["value"] == 1.0
  assert silent["rate"]["value"] is None and silent["rate"]["n"] == 0


# At equal length: against Newton's steps, and on planted worlds.


def planted(rng, n, quality, slope):
  """Answers longer by 30 words on average; log-odds of both causes."""
  ours, theirs = rng.gamma(4, 40, n) + 30, rng.gamma(4, 40, n)
  d = ours - theirs
  p = 1 / (1 + np.exp(-(quality + slope * d / d.std())))
  return (rng.random(n) < p).astype(float), ours, theirs


@pytest.mark.parametrize(
  "seed,quality,slope", [(0, 0.0, 1.0), (1, 0.7, -0.5), (2, -1.0, 2.0)]
)
def test_the_fit_is_scikit_learn_s(seed, quality, slope):
  w, ours, theirs = planted(np.random.default_rng(seed), 400, quality, slope)
  d = ours - theirs
  peer = linear_model.LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
  peer.fit((d / d.std())[:, None], w)
  out = winrate.at_equal_length(w, ours, theirs)
  assert out["slope"]["value"] == pytest.approx(peer.coef_[0, 0], abs=1e-5)
  even = peer.predict_proba([[0.0]])[0, 1]
  assert out["value"] == pytest.approx(even, abs=1e-6)
  assert out["raw"]["value"] == w.mean()
  assert out["longer"] == pytest.approx(d.mean())


def newton(w, x):
  """Plain Newton and the sandwich of the estimating equations."""
  x = np.stack([np.ones(len(x)), x], 1)
  v = np.zeros(2)
  for _ in range(30):
    p = 1 / (1 + np.exp(-x @ v))
    v += np.linalg.solve((x.T * (p * (1 - p))) @ x, x.T @ (w - p))
  bread = np.linalg.inv((x.T * (p * (1 - p))) @ x)
  meat = (x.T * (w - p) ** 2) @ x
  return v, bread @ meat @ bread * len(w) / (len(w) - 2)


def test_ties_are_halves():
  rng = np.random.default_rng(3)
  w, ours, theirs = planted(rng, 300, 0.3, 0.8)
  w[rng.random(300) < 0.3] = 0.5
  d = ours - theirs
  v, variance = newton(w, d / d.std())
  out = winrate.at_equal_length(w, ours, theirs)
  half = Z * np.sqrt(variance[0, 0])
  got = [out[k] for k in ("value", "low", "high")]
  wanted = 1 / (1 + np.exp(-(v[0] + half * np.array([0, -1, 1]))))
  np.testing.assert_allclose(got, wanted, rtol=1e-8)
  half = Z * np.sqrt(variance[1, 1])
  np.testing.assert_allclose(out["slope"]["low"], v[1] - half, rtol=1e-7)


def test_length_that_buys_wins_is_taken_out():
  w, ours, theirs = planted(np.random.default_rng(4), 4000, 0.0, 1.5)
  out = winrate.at_equal_length(w, ours, theirs)
  assert out["raw"]["low"] > 0.54  # looks better
  assert out["low"] < 0.5 < out["high"]  # and is not
  other = winrate.at_equal_length(1 - w, theirs, ours)
  assert other["value"] == pytest.approx(1 - out["value"])
  assert other["slope"]["value"] == pytest.approx(out["slope"]["value"])


def test_the_interval_covers_95_percent():
  rng, hits, truth = np.random.default_rng(5), [], 1 / (1 + np.exp(-0.4))
  for _ in range(1000):
    out = winrate.at_equal_length(*planted(rng, 200, 0.4, 0.8))
    hits.append(out["low"] <= truth <= out["high"])
  assert 0.93 <= np.mean(hits) <= 0.97, np.mean(hits)


def test_equal_lengths_leave_the_raw_rate():
  w = np.repeat([1.0, 0.0], [7, 3])
  out = winrate.at_equal_length(w, np.full(10, 5), np.full(10, 5))
  assert out["value"] == 0.7 and out["low"] == out["raw"]["low"]


@pytest.mark.parametrize(
  "outcomes,ours,why",
  [
    ([1, 0, 1, 0], [9, 1, 9, 1], "has no bound"),  # the longer one wins
    ([1, 1, 1, 1], [9, 1, 7, 3], "has no bound"),
    ([1, 0, 1, 0], [9, 9, 9, 9], "cannot be separated"),
    ([1, 0], [9, 1], "wanted at least 3"),
    ([], [], "0 outcomes"),
  ],
)
def test_what_cannot_be_known_has_no_value(outcomes, ours, why):
  n = len(outcomes)
  out = winrate.at_equal_length(outcomes, ours, np.full(n, 5))
  assert out["value"] is None and why in out["why"]
  assert out["raw"]["n"] == n
  json.dumps(out, allow_nan=False)


@pytest.mark.parametrize(
  "outcomes,ours,words",
  [
    ([1, 0], [1, 2, 3], "one of each"),
    ([1, 2, 0], [1, 2, 3], "leave"),
    ([1, np.nan, 0], [1, 2, 3], "leave"),
    ([1, 1, 0], [1, np.inf, 3], "no number"),
  ],
)
def test_arrays_that_cannot_be_right(outcomes, ours, words):
  with pytest.raises(DataError, match=words):
    winrate.at_equal_length(outcomes, ours, ours)
