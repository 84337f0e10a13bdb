"""Scores of rows equal their equations, written here in float64."""

from fractions import Fraction
import math

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pools as make_pools
from pools import with_columns
import pytest
import scipy.stats

from jaxalign.core.errors import ConfigError, DataError, NumericError
from jaxalign.select import topk
from jaxalign.select.pool import Pool
from jaxalign.select.samplers import draws, SAMPLERS, scores, values

N = 200
POOL = make_pools.make(2, N)

# The number that each sampler ranks by, of the columns of one row (0 is the
# chosen side), and the direction that it keeps by default.
EQUATIONS = {
  "length": (lambda c: c["length"][0], "top"),
  "perplexity": (lambda c: -c["logp"][0] / c["logp_count"][0], "middle"),
  "ifd": (
    lambda c: (
      math.exp(-c["logp"][0] / c["logp_count"][0])
      / math.exp(-c["logp_alone"][0] / c["logp_count"][0])
    ),
    "middle",
  ),
  "ask_llm": (lambda c: c["p_yes"][0], "top"),
  "selective_dpo": (
    lambda c: np.mean([x for x in c["held_out_loss"] if not math.isnan(x)]),
    "low",
  ),
  "external_margin": (lambda c: c["reward"][0] - c["reward"][1], "top"),
  "implicit_margin": (
    lambda c: (
      0.3
      * (
        (c["proxy_logp"][0] - c["proxy_ref_logp"][0])
        - (c["proxy_logp"][1] - c["proxy_ref_logp"][1])
      )
    ),
    "top",
  ),
}


def oracle(name):
  equation, _ = EQUATIONS[name]
  rows = [{k: v[i] for k, v in POOL.columns.items()} for i in range(N)]
  return np.array([equation(row) for row in rows])


@pytest.mark.parametrize("name", EQUATIONS)
def test_equals_its_equation_in_each_direction(name):
  value, default = oracle(name), EQUATIONS[name][1]
  more = dict(beta=0.3) if name == "implicit_margin" else {}
  run = lambda **kwargs: SAMPLERS[name](0, POOL, 40, **more, **kwargs)
  for direction, score in (("top", value), ("low", -value)):
    got = run(direction=direction)
    assert_allclose(got.score, score, rtol=1e-9)
    if name != "length":  # which has ties
      assert list(got.rows) == list(np.argsort(-score)[:40])
  middle = run(direction="middle")
  rank = scipy.stats.rankdata(value)
  assert abs(rank[middle.rows] - 100.5).max() <= 22
  assert abs(np.delete(rank, middle.rows) - 100.5).min() >= 18
  assert list(run().rows) == list(run(direction=default).rows)
  with pytest.raises(ConfigError, match="kwargs.direction"):
    run(direction="bottom")


def test_bees_is_the_posterior_of_two_clipped_margins():
  p = []
  for m in (oracle("external_margin"), oracle("implicit_margin") / 3):
    top = np.quantile(m, 0.99)
    fraction = (np.minimum(np.maximum(m, -2), top) + 2) / (top + 2)
    p.append(np.clip(fraction, 1e-6, 1 - 1e-6))
  posterior = p[0] * p[1] / (p[0] * p[1] + (1 - p[0]) * (1 - p[1]))
  got = SAMPLERS["bees"](0, POOL, 40)
  assert_allclose(1 / (1 + np.exp(-got.score)), posterior, rtol=1e-9)
  assert set(got.rows) == set(np.argsort(-posterior)[:40])
  top = SAMPLERS["bees"](0, POOL, 40, direction="top")
  assert list(top.rows) == list(got.rows)
  # Two margins that are both middling beat one that is high and one low.
  one = scores.agreement([np.array([1.0, 2.5]), np.array([1.0, -1.9])], -2, 3)
  assert one[0] > one[1]
  with pytest.raises(ConfigError, match="kwargs.low and high"):
    SAMPLERS["bees"](0, POOL, 40, low=2.0, high=1.0)


@pytest.mark.parametrize("side", values.SIDES)
def test_sides(side):
  of_two = {
    "chosen": lambda a, b: a,
    "rejected": lambda a, b: b,
    "mean": lambda a, b: (a + b) / 2,
    "sum": lambda a, b: a + b,
    "min": min,
    "max": max,
    "difference": lambda a, b: a - b,
  }[side]
  wanted = np.array([of_two(a, b) for a, b in np.float64(POOL.p_yes)])
  got = SAMPLERS["ask_llm"](0, POOL, 40, side=side)
  assert_allclose(got.score, wanted, rtol=1e-9, atol=1e-12)
  assert list(got.rows) == list(np.argsort(-wanted)[:40])


def test_what_cannot_be_is_refused():
  p_yes, seen = POOL.p_yes.copy(), POOL.held_out_loss.copy()
  p_yes[3, 1] = 1.5
  seen[5] = np.nan  # all six models were trained on it
  none = POOL.logp_count * 0
  for name, error, match, columns in (
    ("ask_llm", DataError, "1.5.*from 0 to 1", dict(p_yes=p_yes)),
    ("perplexity", DataError, "no tokens", dict(logp_count=none)),
    ("selective_dpo", NumericError, POOL.ids[5], dict(held_out_loss=seen)),
  ):
    with pytest.raises(error, match=str(match)):
      SAMPLERS[name](0, with_columns(POOL, **columns), 4)
  ones = with_columns(POOL, logp_count=none + 1)
  one = SAMPLERS["perplexity"](0, ones, 4, direction="top")
  assert_allclose(one.score, -POOL.logp[:, 0])  # of one token each
  with pytest.raises(ConfigError, match="below the second"):
    scores.clip_bounds(np.zeros(4), 1.0, 1.0)
  assert scores.clip_bounds(np.zeros(100), -2.0, "tail") == (-2.0, 0.0)
  with pytest.raises(NumericError, match="99th percentile of a margin is -2"):
    scores.clip_bounds(np.full(100, -2.0), -2.0, "tail")
  with pytest.raises(ConfigError, match="beta"):
    SAMPLERS["implicit_margin"](0, POOL, 4, beta=0.0)


def test_quantiles():
  x = np.random.default_rng(0).integers(0, 30, size=99).astype(float)
  wanted = (scipy.stats.rankdata(x) - 0.5) / 99
  assert_allclose(values.quantiles(x), wanted, rtol=1e-12)


@pytest.mark.parametrize("n", [7, 10, 100, 200])
def test_the_hash_decides_between_two_rows_equally_far_from_the_median(n):
  value = np.random.default_rng(n).normal(size=n)
  place = scipy.stats.rankdata(value).astype(int) - 1
  got = values.directed(value, "middle")
  order = np.argsort(place)
  assert_array_equal(got[order], got[order][::-1])  # to the bit
  far = np.abs(2 * place - (n - 1))
  assert_allclose(got, -far / (2 * n), rtol=1e-12)
  pool = Pool(POOL.ids[:n], {})
  for m in range(1, n):
    wanted = np.lexsort((topk.id_hash(pool.ids), far))[:m]
    assert values.ranked(got, pool, m).rows.tolist() == wanted.tolist()


def test_stratified_equal_shares_fill_what_small_strata_leave():
  pool = make_pools.make(1, 400)
  source = np.array(["a"] * 300 + ["b"] * 90 + ["c"] * 10)
  pool = with_columns(pool, source=source)
  got = SAMPLERS["stratified"](0, pool, 130, by=("source",), shares="equal")
  assert [int((source[got.rows] == s).sum()) for s in "abc"] == [60, 60, 10]
  # One column needs no brackets, as of `quota`.
  one = [
    SAMPLERS["stratified"](0, pool, 130, by=by).rows.tolist()
    for by in ("source", ("source",), ["source"])
  ]
  assert one[0] == one[1] == one[2] != got.rows.tolist()
  for knob, bad in (("shares", "fair"), ("bins", 0)):
    with pytest.raises(ConfigError, match=f"kwargs.{knob}"):
      SAMPLERS["stratified"](0, pool, 9, **{knob: bad})
  with pytest.raises(ConfigError, match="by is .*colour"):
    SAMPLERS["stratified"](0, pool, 9, by=("colour",))


def test_stratified_reads_only_what_the_pool_has():
  pool = make_pools.make(2, 100)
  bare = Pool(pool.ids, {"length": pool.length})
  got = SAMPLERS["stratified"](0, bare, 40, bins=4)
  mean = pool.length.mean(axis=1)
  quarter = np.digitize(mean, np.quantile(mean, [0.25, 0.5, 0.75]))
  assert (abs(np.bincount(quarter[got.rows]) - 10) <= 2).all()


def apportioned(shares, room, budget):
  """Largest remainders in fractions; full groups leave theirs to the others."""
  given, open_ = [0] * len(room), [i for i, n in enumerate(room) if n]
  while True:
    left = budget - sum(n for i, n in enumerate(given) if i not in open_)
    if not any(shares[i] for i in open_):
      shares = [1] * len(room)
    total = sum(Fraction(shares[i]) for i in open_)
    exact = {i: Fraction(shares[i]) * left / total for i in open_}
    full = [i for i in open_ if exact[i] >= room[i]]
    if not full:
      break
    for i in full:
      given[i] = int(room[i])
    open_ = [i for i in open_ if i not in full]
    if not open_:
      return given
  for i in open_:
    given[i] = math.floor(exact[i])
  by_remainder = sorted(
    (i for i in open_ if shares[i]), key=lambda i: given[i] - exact[i]
  )
  for i in by_remainder[: budget - sum(given)]:
    given[i] += 1
  return given


@pytest.mark.parametrize("seed", range(40))
def test_apportion_is_the_method_of_largest_remainders(seed):
  rng = np.random.default_rng(seed)
  room = rng.integers(0, 9, size=6)
  shares = rng.integers(0, 5, size=6)  # remainders that tie, shares of none
  if seed % 2:
    shares = rng.random(6) * (rng.random(6) > 0.3)
  budget = int(rng.integers(0, room.sum() + 1))
  got = draws.apportion(np.float64(shares), room, budget)
  assert got.tolist() == apportioned(shares.tolist(), room.tolist(), budget)


@pytest.mark.parametrize("shares", ["pool", "equal"])
@pytest.mark.parametrize("responses", [1, 2])
def test_stratified_by_hand(responses, shares):
  """Its rule, row by row: strata, their numbers, and the draw within each."""
  pool, bins, budget = make_pools.make(responses, 150, seed=3), 3, 47
  rank = scipy.stats.rankdata(pool.length.mean(axis=1))
  tall = [min(int((r - 0.5) / 150 * bins), bins - 1) for r in rank]
  label = pool.label if responses == 1 else np.zeros(150)
  strata = {}
  for i, key in enumerate(zip(pool.source, label, tall)):
    strata.setdefault(key, []).append(i)
  hashes = topk.id_hash(pool.ids, "stratified:5")
  members = sorted(strata.values(), key=lambda rows: min(hashes[rows]))
  room = [len(rows) for rows in members]
  wanted = room if shares == "pool" else [1] * len(room)
  count = apportioned(wanted, room, budget)
  u = topk.uniform(5, pool.ids, "random")
  kept = [
    i
    for rows, n in zip(members, count)
    for i in sorted(rows, key=lambda i: -u[i])[:n]
  ]
  got = SAMPLERS["stratified"](5, pool, budget, bins=bins, shares=shares)
  assert got.rows.tolist() == sorted(kept, key=lambda i: -u[i])
  score = np.where(np.isin(np.arange(150), kept), u, u - 1)
  assert_array_equal(got.score, score)
