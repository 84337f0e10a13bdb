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
  """Topic a: won, tied; topic b: lost. Mean 1/2, of topics (3/4 + 0) / 2."""
  args = ("target", winrate.wins([2.0, 1.0, 0.0], [1.0] * 3), "abc", "abc")
  out, _ = winrate.win_metrics(*args, ["a", "a", "b"])
  assert out["win_vs_target"]["value"] == 0.5 and out["win_vs_target"]["n"] == 3
  assert out["win_vs_target"]["ties"] == pytest.approx(1 / 3)
  assert out["win_vs_target_macro"]["value"] == 0.375
  assert "win_vs_target_macro" not in winrate.win_metrics(*args, None)[0]


def test_a_policy_against_itself_wins_half():
  score = np.random.default_rng(0).normal(size=50)
  out = winrate.win_rate(winrate.wins(score, score))
  assert out["value"] == 0.5 and out["ties"] == 1.0
  assert out["low"] < 0.5 < out["high"]


def test_the_two_sides_add_up():
  a, b = np.random.default_rng(1).integers(0, 4, (2, 200))
  ours, theirs = (
    winrate.win_rate(winrate.wins(x, y)) for x, y in ((a, b), (b, a))
  )
  assert ours["value"] + theirs["value"] == pytest.approx(1.0)
  assert ours["ties"] == theirs["ties"] == np.mean(a == b)


def test_generation_health_by_hand():
  said = [
    np.array([5, 6, EOS]),
    np.array([EOS]),
    np.array([5, 5, 5]),
    np.array([], np.int32),
  ]
  out = held_out.generation_health(said, EOS, None)
  assert out["ended"]["value"] == 0.5
  assert out["empty"]["value"] == 0.5
  assert out["malformed"]["value"] == 0.75  # empty, or without an end
  assert out["length"]["value"] == 7 / 4
  out = held_out.generation_health(said, EOS, np.array([1, 0, 0, 0], bool))
  assert out["malformed"]["value"] == 0.25  # the grammar knows better


# The metrics of one policy, put together.

KNOBS = dict(
  topics=4,
  clusters=2,
  arguments=2,
  argument_words=5,
  openers=3,
  closers=2,
  fillers=2,
  forms=2,
  corrupt=0.5,
  temperature=0.5,
  redundancy=0.0,
  flips=0.0,
  junk=0.0,
  sft_rows=1,
  pool_rows=1,
  held_out_rows=12,
)


class Ids:
  stops = (EOS,)


def outcome(logp, reward, own):
  return held_out.PolicyOutputs(
    np.asarray(logp),
    [np.array([7, EOS])] * len(reward),
    [""] * len(reward),
    np.asarray(own),
    np.asarray(reward),
    0,
    0,
  )


def test_measure_by_hand():
  world = worlds.build_world(KNOBS, 3)
  rows = worlds.generate_rows(world, 3)["held_out"]
  every = tokens_lib.TokenRows(
    np.zeros(8 * len(rows), np.int32),
    np.arange(0, 8 * len(rows) + 1, 4),
    np.full(2 * len(rows), 2, np.int32),
    np.zeros(2 * len(rows), np.int32),
  )
  asked = held_out.choose_prompts(rows, every, 4, 8)
  assert len({rows[i]["prompt"] for i in asked}) == len(asked) == 4
  n = len(rows)
  what = held_out.EvalSet(rows, every, asked, Ids(), world)
  target = [
    worlds.reward(world, rows[i]["prompt"], rows[i]["target"]) for i in asked
  ]
  logp, ref = np.zeros((n, 2)), np.zeros((n, 2))
  logp[:3, 0], logp[3, 1] = 1.0, 1.0  # prefers 3 chosen, 1 rejected; rest tie
  policy = outcome(
    logp,
    [target[0] + 1, target[1], target[2] - 1, worlds.MALFORMED],
    [-3.0, -3.0, -3.0, -3.0],
  )
  base = outcome(ref, [target[0], target[1], target[2], -6.0], [0.0] * 4)
  out = held_out.policy_metrics(what, policy, base, np.array([-4.0] * 4))
  assert out["win_vs_target"]["value"] == 1.5 / 4
  assert out["win_vs_sft"]["value"] == 2.5 / 4
  assert out["accuracy"]["value"] == 0.75 and out["accuracy"]["n"] == 4
  assert out["accuracy"]["ties"] == (n - 4) / n
  assert out["kl"]["value"] == 1.0
  assert out["malformed"]["value"] == 0.25 and out["ended"]["value"] == 1.0
  topics = [worlds.topic(world, rows[i]["prompt"]) for i in asked]
  won = np.array([1.0, 0.5, 0.0, 0.0])
  macro = np.mean([won[np.array(topics) == t].mean() for t in set(topics)])
  assert out["win_vs_target_macro"]["value"] == pytest.approx(macro)
  told = out["details"]
  assert [
    told["outcomes"][k]["value"] for k in ("wins", "ties", "losses", "decided")
  ] == [0.25, 0.25, 0.5, 1 / 3]
  assert sum(x["n"] for x in told["by_topic"].values()) == 4
  assert (
    told["by_topic"][str(topics[0])]["value"]
    == won[np.array(topics) == topics[0]].mean()
  )
  # The answers here are empty: shorter than every target, by all of it.
  fair = told["equal_length"]
  assert fair["raw"]["value"] == 1.5 / 4
  assert fair["longer"] == -np.mean([len(rows[i]["target"]) for i in asked])
  assert out["win_vs_target_equal_length"]["value"] == fair["value"]


def test_prompts_are_asked_once_and_in_order(capsys):
  rows = [dict(prompt=p) for p in "abacbd"]
  start = np.repeat([3, 4, 3, 9, 4, 4], 2).astype(np.int32)
  every = tokens_lib.TokenRows(
    np.zeros(0, np.int32), np.zeros(13, np.int64), start, np.zeros(12, np.int32)
  )
  choose = lambda most, room: held_out.choose_prompts(
    rows, every, most, room
  ).tolist()
  assert choose(10, 16) == [0, 1, 3, 5] and choose(2, 16) == [0, 1]
  capsys.readouterr()
  assert choose(10, 8) == [0, 1, 5]  # never cut: left out, and it is said
  assert "1 held-out prompts of over 8 tokens" in capsys.readouterr().out


def test_unpaired_are_paired_by_rank():
  what = held_out.EvalSet(
    [dict(label=x) for x in (True, False, False, True, True)],
    None,
    np.zeros(0),
    None,
    None,
  )
  policy = np.array([[10.0], [20.0], [30.0], [40.0], [50.0]])
  a, b = held_out.as_pairs(what, policy, policy + 1)
  np.testing.assert_array_equal(a, [[10, 20], [40, 30]])
  np.testing.assert_array_equal(b, [[11, 21], [41, 31]])


def test_answers_are_scored_after_the_prompts_that_were_asked():
  prompts = [np.array([1, 5, 6]), np.array([1, 7])]
  said = [np.array([8, EOS]), np.array([9, 9, EOS])]
  rows = held_out.answer_rows(prompts, said)
  assert rows.ids.tolist() == [1, 5, 6, 8, EOS, 1, 7, 9, 9, EOS]
  assert rows.offsets.tolist() == [0, 5, 10]
  assert rows.start.tolist() == [3, 2]
  tokens, mask = tokens_lib.pad_rows(rows, np.arange(2), 6)
  assert [t[m].tolist() for t, m in zip(tokens, mask)] == [
    [8, EOS],
    [9, 9, EOS],
  ]
  what = held_out.EvalSet(
    [{}, {}, {}],
    tokens_lib.TokenRows(
      np.arange(18, dtype=np.int32),
      np.arange(0, 19, 3),
      np.array([1, 2, 1, 2, 1, 2], np.int32),
      np.zeros(6, np.int32),
    ),
    np.array([0, 2]),
    None,
    None,
  )
  # Two rows a record: the prompt is that of the first.
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


def test_a_judge_that_always_names_one_place():
  first = winrate.both_orders(np.ones(20), np.zeros(20))
  assert first["bias"]["value"] == 0.5 and first["rate"]["value"] == 0.5
  assert first["consistent"]["value"] == 0.0
  last = winrate.both_orders(np.zeros(20), np.ones(20))
  assert last["bias"]["value"] == -0.5
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
  won, ours, theirs = planted(np.random.default_rng(seed), 400, quality, slope)
  d = ours - theirs
  peer = linear_model.LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
  peer.fit((d / d.std())[:, None], won)
  found = winrate.at_equal_length(won, ours, theirs)
  assert found["slope"]["value"] == pytest.approx(peer.coef_[0, 0], abs=1e-5)
  assert found["value"] == pytest.approx(
    peer.predict_proba([[0.0]])[0, 1], abs=1e-6
  )
  assert found["raw"]["value"] == won.mean()
  assert found["longer"] == pytest.approx(d.mean())


def newton(won, x):
  """Plain Newton and the sandwich of the estimating equations."""
  x = np.stack([np.ones(len(x)), x], 1)
  v = np.zeros(2)
  for _ in range(30):
    p = 1 / (1 + np.exp(-x @ v))
    v += np.linalg.solve((x.T * (p * (1 - p))) @ x, x.T @ (won - p))
  bread = np.linalg.inv((x.T * (p * (1 - p))) @ x)
  meat = (x.T * (won - p) ** 2) @ x
  return v, bread @ meat @ bread * len(won) / (len(won) - 2)


def test_ties_are_halves():
  rng = np.random.default_rng(3)
  won, ours, theirs = planted(rng, 300, 0.3, 0.8)
  won[rng.random(300) < 0.3] = 0.5
  d = ours - theirs
  v, variance = newton(won, d / d.std())
  found = winrate.at_equal_length(won, ours, theirs)
  half = Z * np.sqrt(variance[0, 0])
  np.testing.assert_allclose(
    [found[k] for k in ("value", "low", "high")],
    1 / (1 + np.exp(-(v[0] + half * np.array([0, -1, 1])))),
    rtol=1e-8,
  )
  half = Z * np.sqrt(variance[1, 1])
  np.testing.assert_allclose(found["slope"]["low"], v[1] - half, rtol=1e-7)


def test_length_that_buys_wins_is_taken_out():
  won, ours, theirs = planted(np.random.default_rng(4), 4000, 0.0, 1.5)
  found = winrate.at_equal_length(won, ours, theirs)
  assert found["raw"]["low"] > 0.54  # looks better
  assert found["low"] < 0.5 < found["high"]  # and is not
  other = winrate.at_equal_length(1 - won, theirs, ours)
  assert other["value"] == pytest.approx(1 - found["value"])
  assert other["slope"]["value"] == pytest.approx(found["slope"]["value"])


def test_the_interval_covers_95_percent():
  rng = np.random.default_rng(5)
  hits = []
  for _ in range(1000):
    won, ours, theirs = planted(rng, 200, 0.4, 0.8)
    found = winrate.at_equal_length(won, ours, theirs)
    hits.append(found["low"] <= 1 / (1 + np.exp(-0.4)) <= found["high"])
  assert 0.93 <= np.mean(hits) <= 0.97, np.mean(hits)


def test_equal_lengths_leave_the_raw_rate():
  won = np.repeat([1.0, 0.0], [7, 3])
  found = winrate.at_equal_length(won, np.full(10, 5), np.full(10, 5))
  assert found["value"] == 0.7 and found["low"] == found["raw"]["low"]


@pytest.mark.parametrize(
  "won,ours,why",
  [
    ([1, 0, 1, 0], [9, 1, 9, 1], "has no bound"),  # the longer one wins
    ([1, 1, 1, 1], [9, 1, 7, 3], "has no bound"),
    ([1, 0, 1, 0], [9, 9, 9, 9], "cannot be separated"),
    ([1, 0], [9, 1], "wanted at least 3"),
    ([], [], "0 outcomes"),
  ],
)
def test_what_cannot_be_told_is_not(won, ours, why):
  found = winrate.at_equal_length(won, ours, np.full(len(won), 5))
  assert found["value"] is None and why in found["why"]
  assert found["raw"]["n"] == len(won)
  json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
  "won,ours,words",
  [
    ([1, 0], [1, 2, 3], "one of each"),
    ([1, 2, 0], [1, 2, 3], "leave"),
    ([1, np.nan, 0], [1, 2, 3], "leave"),
    ([1, 1, 0], [1, np.inf, 3], "no number"),
  ],
)
def test_arrays_that_cannot_be_right(won, ours, words):
  with pytest.raises(DataError, match=words):
    winrate.at_equal_length(won, ours, ours)
