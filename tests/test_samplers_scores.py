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
from jaxalign.select import pool as pools
from jaxalign.select import topk
from jaxalign.select.samplers import draws, SAMPLERS, scores, values

N = 200
POOL = make_pools.make(2, N)


def check(name, score, m=40, **kwargs):
  """The sampler's scores, and its rows, are those of this [N] oracle."""
  got = SAMPLERS[name](0, POOL, m, **kwargs)
  assert_allclose(got.score, score, rtol=1e-9, atol=1e-12)
  assert list(got.rows) == list(np.argsort(-np.asarray(score))[:m])
  # The oracle's opposite would have kept others.
  assert set(got.rows) != set(np.argsort(np.asarray(score))[:m])


def sides(column):
  return np.float64(POOL.columns[column]).T


def oracles():
  """The number that each sampler ranks by, one row at a time."""
  c, r = np.array([0, 1])
  out = {
    name: np.empty(N)
    for name in (
      "length",
      "perplexity",
      "ifd",
      "ask_llm",
      "selective_dpo",
      "external_margin",
      "implicit_margin",
    )
  }
  col = POOL.columns
  for i in range(N):
    out["length"][i] = col["length"][i, c]
    out["perplexity"][i] = math.log(
      math.exp(-col["logp"][i, c] / col["logp_count"][i, c])
    )
    count = col["logp_count"][i, c]
    out["ifd"][i] = math.exp(-col["logp"][i, c] / count) / math.exp(
      -col["logp_alone"][i, c] / count
    )
    out["ask_llm"][i] = col["p_yes"][i, c]
    out["selective_dpo"][i] = np.mean(
      [x for x in col["held_out_loss"][i] if not math.isnan(x)]
    )
    out["external_margin"][i] = col["reward"][i, c] - col["reward"][i, r]
    out["implicit_margin"][i] = 0.3 * (
      (col["proxy_logp"][i, c] - col["proxy_ref_logp"][i, c])
      - (col["proxy_logp"][i, r] - col["proxy_ref_logp"][i, r])
    )
  return out


@pytest.mark.parametrize("name", oracles())
def test_equals_its_equation_in_each_direction(name):
  value = oracles()[name]
  more = dict(beta=0.3) if name == "implicit_margin" else {}
  for direction, score in (("top", value), ("low", -value)):
    got = SAMPLERS[name](0, POOL, 40, direction=direction, **more)
    assert_allclose(got.score, score, rtol=1e-9)
    if name != "length":  # which has ties
      assert list(got.rows) == list(np.argsort(-score)[:40])
  middle = SAMPLERS[name](0, POOL, 40, direction="middle", **more)
  rank = scipy.stats.rankdata(value)
  assert abs(rank[middle.rows] - 100.5).max() <= 22
  assert abs(np.delete(rank, middle.rows) - 100.5).min() >= 18
  with pytest.raises(ConfigError, match="kwargs.direction"):
    SAMPLERS[name](0, POOL, 40, direction="bottom", **more)


@pytest.mark.parametrize(
  "name,direction",
  [
    ("length", "top"),
    ("perplexity", "middle"),
    ("ifd", "middle"),
    ("ask_llm", "top"),
    ("selective_dpo", "low"),
    ("external_margin", "top"),
    ("implicit_margin", "top"),
    ("bees", "top"),
  ],
)
def test_default_directions(name, direction):
  a = SAMPLERS[name](0, POOL, 40)
  assert list(a.rows) == list(
    SAMPLERS[name](0, POOL, 40, direction=direction).rows
  )


def test_bees_is_the_posterior_of_two_clipped_margins():
  m_ex = oracles()["external_margin"]
  m_im = oracles()["implicit_margin"] / 0.3 * 0.1
  p = []
  for m in (m_ex, m_im):
    top = np.quantile(m, 0.99)
    p.append(
      np.clip(
        (np.minimum(np.maximum(m, -2), top) + 2) / (top + 2), 1e-6, 1 - 1e-6
      )
    )
  posterior = p[0] * p[1] / (p[0] * p[1] + (1 - p[0]) * (1 - p[1]))
  got = SAMPLERS["bees"](0, POOL, 40)
  assert_allclose(1 / (1 + np.exp(-got.score)), posterior, rtol=1e-9)
  inside = np.argsort(-posterior)[:40]
  assert set(got.rows) == set(inside)
  # Two margins that are both middling beat one that is high and one low.
  one = scores.agreement([np.array([1.0, 2.5]), np.array([1.0, -1.9])], -2, 3)
  assert one[0] > one[1]
  with pytest.raises(ConfigError, match="kwargs.low and high"):
    SAMPLERS["bees"](0, POOL, 40, low=2.0, high=1.0)


@pytest.mark.parametrize("side", values.SIDES)
def test_sides(side):
  chosen, rejected = sides("p_yes")
  wanted = np.array(
    [
      {
        "chosen": a,
        "rejected": b,
        "mean": (a + b) / 2,
        "sum": a + b,
        "min": min(a, b),
        "max": max(a, b),
        "difference": a - b,
      }[side]
      for a, b in zip(chosen, rejected)
    ]
  )
  check("ask_llm", wanted, side=side)


def test_what_cannot_be_is_refused():
  broken = POOL.p_yes.copy()
  broken[3, 1] = 1.5
  with pytest.raises(DataError, match="1.5.*from 0 to 1"):
    SAMPLERS["ask_llm"](0, with_columns(POOL, p_yes=broken), 4)
  with pytest.raises(DataError, match="no tokens"):
    SAMPLERS["perplexity"](
      0, with_columns(POOL, logp_count=POOL.columns["logp_count"] * 0), 4
    )
  one = SAMPLERS["perplexity"](
    0,
    with_columns(POOL, logp_count=POOL.logp_count * 0 + 1),
    4,
    direction="top",
  )
  assert_allclose(one.score, -POOL.logp[:, 0])  # of one token each
  with pytest.raises(ConfigError, match="below the second"):
    scores.clip_bounds(np.zeros(4), 1.0, 1.0)
  assert scores.clip_bounds(np.zeros(100), -2.0, "tail") == (-2.0, 0.0)
  with pytest.raises(NumericError, match="99th percentile of a margin is -2"):
    scores.clip_bounds(np.full(100, -2.0), -2.0, "tail")
  with pytest.raises(ConfigError, match="beta"):
    SAMPLERS["implicit_margin"](0, POOL, 4, beta=0.0)
  seen = POOL.held_out_loss.copy()
  seen[5] = np.nan  # all six models were trained on it
  with pytest.raises(NumericError, match=str(POOL.ids[5])):
    SAMPLERS["selective_dpo"](0, with_columns(POOL, held_out_loss=seen), 4)


def test_selective_dpo_is_a_curriculum():
  got = SAMPLERS["selective_dpo"](0, POOL, 100)
  loss = np.nanmean(POOL.held_out_loss, axis=1)
  assert (np.diff(loss[got.rows]) > 0).all()  # easy to hard


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
  pool = pools.Pool(POOL.ids[:n], {})
  for m in range(1, n):
    wanted = np.lexsort((topk.id_hash(pool.ids), far))[:m]
    assert values.ranked(got, pool, m).rows.tolist() == wanted.tolist()


# Stratified.


def test_stratified_keeps_the_shares_of_the_pool():
  pool = make_pools.make(1, 1000)
  got = SAMPLERS["stratified"](0, pool, 200, bins=3)
  length = pool.length[:, 0]
  edges = np.quantile(length, [1 / 3, 2 / 3])
  for source in ("web", "chat", "code"):
    for label in (True, False):
      for bin_ in range(3):
        inside = (
          (pool.source == source)
          & (pool.label == label)
          & (np.digitize(length, edges) == bin_)
        )
        # A fifth of the stratum; a length on an edge may fall either way.
        assert abs(inside[got.rows].sum() - inside.sum() / 5) <= 3
  exact = SAMPLERS["stratified"](0, pool, 200, by=("source", "label"))
  for source in ("web", "chat", "code"):
    for label in (True, False):
      inside = (pool.source == source) & (pool.label == label)
      assert abs(inside[exact.rows].sum() - inside.sum() / 5) < 1
  # One column needs no brackets, as of `quota`.
  one = [
    SAMPLERS["stratified"](0, pool, 200, by=by).rows.tolist()
    for by in ("source", ("source",), ["source"])
  ]
  assert one[0] == one[1] == one[2] != exact.rows.tolist()
  # Inside a stratum the rows are those that `random` prefers.
  u = SAMPLERS["random"](0, pool, 1).score
  web = (pool.source == "web") & pool.label
  kept = np.isin(np.arange(1000), exact.rows)
  assert u[web & kept].min() > u[web & ~kept].max()


def test_stratified_equal_shares_fill_what_small_strata_leave():
  pool = make_pools.make(1, 400)
  source = np.array(["a"] * 300 + ["b"] * 90 + ["c"] * 10)
  pool = with_columns(pool, source=source)
  got = SAMPLERS["stratified"](0, pool, 130, by=("source",), shares="equal")
  kept = [int((source[got.rows] == s).sum()) for s in "abc"]
  assert kept == [60, 60, 10]
  with pytest.raises(ConfigError, match="kwargs.shares"):
    SAMPLERS["stratified"](0, pool, 9, shares="fair")
  with pytest.raises(ConfigError, match="kwargs.bins"):
    SAMPLERS["stratified"](0, pool, 9, bins=0)
  with pytest.raises(ConfigError, match="by is .*colour"):
    SAMPLERS["stratified"](0, pool, 9, by=("colour",))


def test_stratified_reads_only_what_the_pool_has():
  pool = make_pools.make(2, 100)
  bare = pools.Pool(pool.ids, {"length": pool.length})
  got = SAMPLERS["stratified"](0, bare, 40, bins=4)
  mean = pool.length.mean(axis=1)
  part = np.digitize(mean, np.quantile(mean, [0.25, 0.5, 0.75]))
  assert (abs(np.bincount(part[got.rows]) - 10) <= 2).all()


def parts_by_hand(shares, room, budget):
  """Largest remainders in fractions; full parts leave theirs to the others."""
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
  budget = int(rng.integers(0, room.sum() + 1))
  got = draws.apportion(np.float64(shares), room, budget)
  assert got.tolist() == parts_by_hand(shares.tolist(), room.tolist(), budget)


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
  count = parts_by_hand(
    room if shares == "pool" else [1] * len(room), room, budget
  )
  u = topk.uniform(5, pool.ids, "random")
  kept = [
    i
    for rows, n in zip(members, count)
    for i in sorted(rows, key=lambda i: -u[i])[:n]
  ]
  got = SAMPLERS["stratified"](5, pool, budget, bins=bins, shares=shares)
  assert got.rows.tolist() == sorted(kept, key=lambda i: -u[i])
  assert_array_equal(
    got.score, np.where(np.isin(np.arange(150), kept), u, u - 1)
  )


@pytest.mark.parametrize("seed", range(20))
def test_apportion_is_exact(seed):
  rng = np.random.default_rng(seed)
  room = rng.integers(0, 50, size=8)
  shares = rng.random(8) * (rng.random(8) > 0.3)
  budget = int(rng.integers(0, room.sum() + 1))
  got = draws.apportion(shares, room, budget)
  assert got.sum() == budget and (got <= room).all() and (got >= 0).all()
  if (room >= budget).all() and shares.sum():
    assert (abs(got - shares / shares.sum() * budget) < 1).all()
