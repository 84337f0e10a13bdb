"""Intervals cover what they claim, and no sentence claims more than they do."""

import functools
import json
import re

import numpy as np
import pytest

from jaxalign.core import intervals
from jaxalign.eval import equivalence, held_out

Z = 1.959963984540054


def covered(make, truth, n=4000, seed=0):
  """Fraction of `n` simulated intervals that hold the truth."""
  rng = np.random.default_rng(seed)
  drawn = [make(rng) for _ in range(n)]
  return np.mean([x["low"] <= truth <= x["high"] for x in drawn])


def paired(rng, n):
  """The prompt moves both, as in an evaluation."""
  easy = rng.random(n)
  a, b = rng.random((2, n)) < np.stack([easy * 0.9, easy * 0.6])
  return intervals.paired_difference(a, b)


def coin(p, n):
  return lambda rng: intervals.proportion(rng.random(n) < p), p


@pytest.mark.parametrize(
  "make,truth",
  [coin(0.5, 40), coin(0.14, 100), coin(0.9, 64), coin(0.5, 512)]
  + [(lambda rng, n=n: paired(rng, n), 0.15) for n in (40, 60, 400)],
)
def test_an_interval_covers_95_percent(make, truth):
  rate = covered(make, truth)
  assert 0.93 < rate < 0.97, rate


@pytest.mark.parametrize("least,most", [(0.0, 1.0), (0.3, 0.7), (0.8, 1.0)])
def test_a_macro_s_interval_covers_95_percent(least, most):
  """Zipf topics, as in the world: the rare ones were asked once or twice."""
  rng = np.random.default_rng(2)
  zipf = 1 / np.arange(1, 65)
  groups = rng.choice(64, 400, p=zipf / zipf.sum())
  p = rng.uniform(least, most, 64)
  make = lambda rng: intervals.macro_mean(rng.random(400) < p[groups], groups)
  rate = covered(make, p[np.unique(groups)].mean(), n=2000)
  assert 0.90 < rate < 0.98, rate


def test_ties_count_one_half_and_never_narrow_the_interval():
  outcomes = lambda rng: rng.choice([0.0, 0.5, 1.0], 80, p=[0.3, 0.4, 0.3])
  rate = covered(lambda rng: intervals.proportion(outcomes(rng)), 0.5)
  assert rate > 0.95  # wide, never narrow
  assert intervals.proportion(np.full(10, 0.5))["value"] == 0.5


def ends(got):
  return [got["low"], got["high"]]


def test_wilson_by_hand():
  """8 of 10: (0.8 + z^2/20 +- z sqrt(0.016 + z^2/400)) / (1 + z^2/10)."""
  got = intervals.proportion(np.repeat([1, 0], [8, 2]))
  center, half = 0.8 + Z**2 / 20, Z * np.sqrt(0.016 + Z**2 / 400)
  assert got["n"] == 10 and got["value"] == 0.8
  wanted = np.array([center - half, center + half]) / (1 + Z**2 / 10)
  np.testing.assert_allclose(ends(got), wanted, rtol=1e-12)
  # None of 10 and all of 10 still have a width, and stay in [0, 1].
  (low, high), (least, most) = (
    ends(intervals.proportion(np.full(10, x))) for x in (0, 1)
  )
  assert low == 0 and 0.2 < high < 0.4 and 0.6 < least < 0.8 and most == 1


# Means 1/2 and 1; squares 1/2 + 0 and the 1/4 put on, over 3 + 1.
VALUES, GROUPS = [0.0, 1.0, 1.0, 1.0, 1.0], list("aabbb")


@pytest.mark.parametrize(
  "got,value,half,n",
  [
    (intervals.normal_mean([1.0, 2.0, 6.0]), 3.0, Z * np.sqrt(7 / 3), 3),
    (
      intervals.macro_mean(VALUES, GROUPS),
      *(0.75, Z * np.sqrt(0.75 / 4 * (1 / 2 + 1 / 3)) / 2, 5),
    ),
    # A group of one counts like any other.
    (
      intervals.macro_mean([*VALUES, 0.0], [*GROUPS, "c"]),
      *(0.5, Z * np.sqrt(0.75 / 4 * (1 / 2 + 1 / 3 + 1)) / 3, 6),
    ),
    # Nothing but groups of one: the largest variance, 1/4.
    (intervals.macro_mean([0.0, 1.0], [1, 2]), 0.5, 1.0, 2),
    # 1, 2, 6: sd sqrt(7); t of 2 degrees is (2q - 1) / sqrt(2q(1-q)).
    (
      intervals.t_mean([1.0, 2.0, 6.0]),
      *(3.0, 0.95 / np.sqrt(2 * 0.975 * 0.025) * np.sqrt(7 / 3), 3),
    ),
  ],
)
def test_means_by_hand(got, value, half, n):
  assert got["value"] == pytest.approx(value) and got["n"] == n
  wanted = [value - half, value + half]
  if value < 1:
    wanted = np.clip(wanted, 0, 1)
  np.testing.assert_allclose(ends(got), wanted, rtol=1e-12, atol=1e-15)


def test_difference_by_hand():
  """Differences 1, 1, 0 with +1 and -1: mean 2/5, variance 4/5 - 4/25."""
  got = intervals.paired_difference([1, 1, 1], [0, 0, 1])
  half = Z * np.sqrt((4 / 5 - 4 / 25) / 5)
  assert got["value"] == pytest.approx(2 / 3) and got["n"] == 3
  np.testing.assert_allclose(ends(got), [2 / 5 - half, 1.0], rtol=1e-12)
  other = intervals.paired_difference([0, 0, 1], [1, 1, 1])
  np.testing.assert_allclose(ends(other), [-1.0, half - 2 / 5])
  assert other["value"] == -got["value"]
  got = intervals.paired_difference([1, 1, 0.5, 1], [0, 1, 0, 0])
  assert got["value"] == 0.625
  assert intervals.paired_difference([0, 0], [1, 0.5])["value"] == -0.75


@pytest.mark.parametrize("make", [intervals.normal_mean, intervals.t_mean])
def test_one_number_has_no_interval(make):
  assert make([4.0]) == dict(value=4.0, low=None, high=None, n=1)


@pytest.mark.parametrize(
  "make",
  [
    intervals.proportion,
    intervals.normal_mean,
    intervals.t_mean,
    lambda x: intervals.paired_difference(x, x),
    lambda x: intervals.macro_mean(x, x),
  ],
)
def test_nothing_measured_is_none_and_is_json(make):
  got = make(np.zeros(0))
  assert got == dict(value=None, low=None, high=None, n=0)
  json.dumps(got, allow_nan=False)


# Sentences.


def claims(text):
  return bool(re.search(r"\b(better|worse)\b", text))


sentence = functools.partial(
  equivalence.one_seed_sentence, "isa", "all", unit="win rate"
)


def test_a_sentence_says_what_the_interval_says():
  rng = np.random.default_rng(0)
  seen = set()
  for _ in range(300):
    shift, n = rng.normal(0, 0.15), int(rng.integers(2, 200))
    a = np.clip(np.round(rng.random(n) + shift), 0, 1)
    diff = intervals.paired_difference(a, rng.random(n) < 0.5)
    text, holds = sentence(diff), diff["low"] <= 0 <= diff["high"]
    assert claims(text) != holds, text
    assert ("No difference shown" in text) == holds
    if claims(text):
      assert ("better" in text) == (diff["value"] > 0)
      assert f"by {abs(100 * diff['value']):.1f} points" in text
    for words in (f"n = {n}", "one training seed", "95 % interval"):
      assert words in text
    assert "isa" in text and "all" in text
    seen.add("No" if holds else "better" if diff["value"] > 0 else "worse")
  assert seen == {"No", "better", "worse"}


@pytest.mark.parametrize(
  "low,high,words",
  [
    (0.0, 0.1, "No difference"),
    (-0.1, 0.0, "No difference"),
    (0.001, 0.1, "isa is better than all by 5.0 points of win rate"),
    (-0.2, -0.001, "isa is worse than all by 10.0 points of win rate"),
  ],
)
def test_the_ends_of_an_interval_belong_to_it(low, high, words):
  diff = dict(value=0.05 if high > 0 else -0.1, low=low, high=high, n=9)
  assert sentence(diff).startswith(words)


def test_too_little_to_claim_anything():
  """One prompt, or prompts that all agree, have no measured spread."""
  assert "not measured" in sentence(intervals.paired_difference([], []))
  for n in (1, 2, 3):
    diff = intervals.paired_difference(np.ones(n), np.zeros(n))
    assert not claims(sentence(diff)), n
    json.dumps(diff, allow_nan=False)


def test_many_that_all_agree_may_be_claimed():
  diff = intervals.paired_difference(np.ones(200), np.zeros(200))
  assert diff["low"] < diff["value"] or diff["high"] > diff["value"]
  assert claims(sentence(diff))


# Held-out measures.


@pytest.mark.parametrize(
  "policy,ref,value,n,ties",
  [
    (
      [[-1.0, -4.0], [-2.0, -2.0], [-5.0, -3.0], [-1.0, -1.0]],
      [[-2.0, -2.0], [-2.0, -2.0], [-4.0, -4.0], [-1.0, -1.0]],
      *(0.5, 2, 0.5),
    ),
    ([[-2.0, -2.0]] * 4, [[-2.0, -2.0]] * 4, None, 0, 1.0),
    # The reference likes the chosen answer still better: the reward does not.
    ([[-1.0, -4.0]] * 3, [[-2.0, -9.0]] * 3, 0.0, 3, 0.0),
  ],
)
def test_accuracy_leaves_ties_out_and_counts_them(policy, ref, value, n, ties):
  out = held_out.accuracy(policy, ref)
  assert (out["value"], out["n"], out["ties"]) == (value, n, ties)


def test_likelihood_accuracy_is_per_token_and_without_reference():
  """-6 over 3 tokens beats -5 over 1; a tie is left out."""
  policy = [[-6.0, -5.0], [-5.0, -6.0], [-2.0, -4.0]]
  count = [[3.0, 1.0], [1.0, 3.0], [1.0, 2.0]]
  out = held_out.likelihood_accuracy(policy, count)
  assert (out["value"], out["n"]) == (0.5, 2)


def test_sampled_kl_is_policy_minus_reference():
  got = held_out.sampled_kl(np.array([-1.0, -2.0]), np.array([-4.0, -3.0]))
  assert got["value"] == 2.0 and got["n"] == 2


# Over seeds.


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_student_covers_95_percent_where_a_bootstrap_does_not(seeds):
  rate = covered(lambda rng: intervals.t_mean(rng.normal(0, 1, seeds)), 0.0)
  assert 0.94 < rate < 0.96, rate

  def percentile(rng):
    v = rng.normal(0, 1, seeds)
    drawn = rng.choice(v, (400, seeds)).mean(1)
    return dict(zip(("low", "high"), np.quantile(drawn, [0.025, 0.975])))

  if seeds == 3:
    assert 0.72 < covered(percentile, 0.0, n=1000) < 0.80


def two_way(rng, s, p, seed_sd, prompt_sd):
  """Win or loss: luck of the seed, hardness of the prompt, chance."""
  luck = rng.normal(0, seed_sd, (s, 1))
  chance = 0.5 + luck + rng.normal(0, prompt_sd, (1, p))
  return (rng.random((s, p)) < chance).astype(float)


SPREADS = [(0.024, 0.1), (0.034, 0.2), (0.05, 0.1)]  # the built-in world's


@pytest.mark.parametrize(
  "size,spread,least,most",
  [
    (size, spread, 0.93, 0.97)
    for size in ((5, 100), (10, 100), (5, 512), (10, 512))
    for spread in SPREADS
  ]
  + [((10, 200), (0.024, 0.25), 0.93, 0.97)]
  # No luck of seeds at all: the interval is wide, never narrow.
  + [((5, 100), (0.0, 0.0), 0.95, 1.0)],
)
def test_crossed_covers_what_it_claims(size, spread, least, most):
  make = lambda rng: intervals.crossed_mean(two_way(rng, *size, *spread))
  rate = covered(make, 0.5, n=1000)
  assert least <= rate <= most, rate


def test_seeds_alone_do_not_cover():
  alone = lambda rng: two_way(rng, 10, 200, 0.024, 0.25).mean(1)
  rate = covered(lambda rng: intervals.t_mean(alone(rng)), 0.5, n=1000)
  assert rate < 0.85, rate


def test_spread_by_hand():
  """Two seeds, three prompts, worked as a two-way table of variance."""
  v = np.array([[1.0, 0.0, 1.0], [0.5, 0.0, 0.0]])
  rows, columns, m = [2 / 3, 1 / 6], [0.75, 0, 0.5], 2.5 / 6
  ms_s = 3 * sum((r - m) ** 2 for r in rows) / 1
  ms_p = 2 * sum((c - m) ** 2 for c in columns) / 2
  rest = v - np.array(rows)[:, None] - np.array(columns) + m
  ms_e = (rest**2).sum() / 2
  total = ms_s + ms_p - ms_e
  assert ms_s > ms_e and ms_p > ms_e
  freedom = total**2 / (ms_s**2 + ms_p**2 / 2 + ms_e**2 / 2)
  wanted = intervals.Spread(
    m,
    np.sqrt(total / 6),
    freedom,
    seeds=(ms_s - ms_e) / 3,
    prompts=(ms_p - ms_e) / 2,
    noise=ms_e,
  )
  assert intervals.two_way_spread(v) == pytest.approx(wanted)


def test_the_variance_of_prompts_is_that_of_a_bootstrap():
  """Prompts drawn again, the seeds kept: (MS_p - noise + noise) / (S P)."""
  rng = np.random.default_rng(0)
  v = two_way(rng, 6, 300, 0.05, 0.2)
  drawn = [v[:, rng.integers(0, 300, 300)].mean() for _ in range(4000)]
  got = intervals.two_way_spread(v)
  assert np.var(drawn) == pytest.approx(
    (got.prompts + got.noise / 6) / 300, rel=0.1
  )


def test_crossed_of_one_seed_has_no_interval():
  got = intervals.crossed_mean(np.array([[1.0, 0.0]]))
  assert got == dict(value=0.5, low=None, high=None, n=1, prompts=2)
  json.dumps(intervals.crossed_mean(np.ones((3, 4))), allow_nan=False)
