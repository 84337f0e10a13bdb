"""Every sampler keeps its contract; ISA equals the loop it replaces."""

import functools
import inspect
import itertools
import math

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pools as make_pools
from pools import with_columns
import pytest

from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.select import topk
from jaxalign.select.pool import checked, make_pool, Pool, Selection, SHAPES
from jaxalign.select.samplers import isa, SAMPLERS, values

N = 500
ISA = SAMPLERS["isa"]


def likelihoods(responses=2, n=N, seed=0):
  """A pool of log-likelihoods, skewed left; unpaired rows have labels."""
  rng = np.random.default_rng(seed)
  shape = (n, responses)
  columns = {"log_likelihood": -90 - rng.gamma(2.0, 8.0, size=shape)}
  if responses == 1:
    columns["label"] = rng.random(n) < 0.3
  return make_pool([f"id{i:05d}" for i in rng.permutation(n)], columns)


def naive(values, order):
  """Algorithm 1 of the paper: leave each row out, sum all others again."""
  values = np.array(values)
  p = np.exp((values - values.min()) / np.ptp(values))

  def entropy(q):
    if order == "renormalised":
      q = q / math.fsum(q)
    return -math.fsum(q * np.log(q))  # fsum rounds once

  whole = entropy(p)
  change = np.array([whole - entropy(np.delete(p, i)) for i in range(len(p))])
  return np.abs(change) if order == "magnitude" else change


@pytest.fixture(scope="module")
def loop():
  """A pool of single responses, and the loop's changes by order."""
  pool = likelihoods(1, 2000)
  value = pool.log_likelihood[:, 0]
  return pool, {order: naive(value, order) for order in isa.ORDERS}


@pytest.mark.parametrize("order", isa.ORDERS)
def test_isa_equals_the_loop(order, loop):
  pool, changes = loop
  got = ISA(0, pool, 50, order=order)
  # The loop subtracts two sums of 2,000 terms; the formula does not.
  assert_allclose(got.score, changes[order], rtol=0, atol=1e-12)
  best = {name: np.argsort(-change)[:50] for name, change in changes.items()}
  assert list(got.rows) == list(best[order])
  # A flipped sign, or one reading for another, fails here.
  for other in isa.ORDERS:
    assert other == order or set(got.rows) != set(best[other])
  assert set(got.rows) != set(np.argsort(changes[order])[:50])
  rank = pool.log_likelihood[:, 0].argsort().argsort()[got.rows] / 1999
  assert {
    "literal": rank.max() < 0.03,  # rare
    "magnitude": rank.min() > 0.97,  # dense
    "renormalised": 0.1 < rank.mean() < 0.9,
  }[order]


@pytest.mark.parametrize("order", isa.ORDERS)
def test_a_shift_and_scale_of_the_likelihood_change_no_row(order):
  pool = likelihoods()
  moved = with_columns(pool, log_likelihood=2.0 * pool.log_likelihood + 64.0)
  one, two = (ISA(0, p, 70, order=order).rows for p in (pool, moved))
  assert set(one) == set(two)


def test_renormalised_keeps_its_digits_where_subtraction_loses_them():
  value = np.random.default_rng(3).normal(size=200_000)
  change = isa.entropy_change(value, "renormalised")
  u = (value - value.min()) / np.ptp(value)
  p = np.exp(u)
  m = (p * u).sum() / p.sum()
  # The leading term of a series in p/Z, which is about 1e-5 here.
  assert_allclose(change, p / p.sum() * (1 + m - u), rtol=3e-5)
  assert np.unique(change).size > 199_990


@pytest.mark.parametrize("order", isa.ORDERS)
@pytest.mark.parametrize("pair_score", values.SIDES)
def test_pair_scores_by_hand(order, pair_score):
  pool = likelihoods(2)
  flat = naive(pool.log_likelihood.reshape(-1).tolist(), order)
  chosen, rejected = flat[0::2], flat[1::2]
  wanted = {
    "sum": chosen + rejected,
    "chosen": chosen,
    "mean": (chosen + rejected) / 2,
    "rejected": rejected,
    "min": np.where(chosen < rejected, chosen, rejected),
    "max": np.where(chosen < rejected, rejected, chosen),
    "difference": chosen - rejected,
  }[pair_score]
  got = ISA(0, pool, 60, order=order, pair_score=pair_score)
  assert_allclose(got.score, wanted, rtol=0, atol=1e-12)
  assert list(got.rows) == list(np.argsort(-wanted)[:60])


@pytest.mark.parametrize(
  "responses,kwargs,match",
  [
    (1, dict(pair_score="difference"), "1 responses"),
    (2, dict(label_quota=0.5), "label_quota"),
    (2, dict(order="nonsense"), "select.order"),
    (2, dict(pair_score="nonsense"), "select.pair_score"),
    *((1, dict(label_quota=q), "label_quota") for q in (1.5, -0.1, "pool")),
    (1, dict(label_quota=True), "label_quota"),
    (1, dict(soft=-1), "soft is -1"),
    (2, dict(order="soft", soft=0.5), "soft is 0.5"),
    (2, dict(order="soft", pair_score="difference"), "pair_score 'difference'"),
  ],
)
def test_what_isa_refuses(responses, kwargs, match):
  with pytest.raises(ConfigError, match=match):
    ISA(0, likelihoods(responses), 5, **kwargs)


def test_constant_or_broken_likelihood_is_refused():
  broken = np.arange(2.0 * N).reshape(N, 2)
  broken[3] = np.nan
  for value, match in ((np.zeros((N, 2)), "equal"), (broken, "not finite")):
    with pytest.raises(NumericError, match=match):
      ISA(0, with_columns(likelihoods(), log_likelihood=value), 5)


@pytest.mark.parametrize("quota", [0.5, 0.0, 1.0, "as_pool"])
def test_label_quota(quota):
  pool = likelihoods(1)
  fraction = pool.label.mean() if quota == "as_pool" else quota
  wanted = round(fraction * 80)
  got = ISA(0, pool, 80, label_quota=quota)
  assert pool.label[got.rows].sum() == wanted and len(set(got.rows)) == 80
  assert (np.diff(got.score[got.rows]) <= 0).all()
  best = [i for i in np.argsort(-got.score) if pool.label[i]][:wanted]
  assert set(best) == set(got.rows[pool.label[got.rows]])


@pytest.mark.parametrize("quota,desirable", [(0.5, 3), (0.45, 2), (0.7, 4)])
def test_a_quota_is_rounded_to_the_nearest_row(quota, desirable):
  """2.5 desirable rows of five are three; 2.25 are two, 3.5 are four. A label
  may be used up to its last row, and not beyond."""
  label = np.array([True] * 4 + [False] * 6)
  pool = Pool(np.array([f"r{i}" for i in range(10)]), dict(label=label))
  rows = isa.top_with_quota(np.arange(10.0), pool, 5, quota)
  assert label[rows].sum() == desirable
  with pytest.raises(ConfigError, match="5 desirable rows, the pool has 4"):
    isa.top_with_quota(np.arange(10.0), pool, 5, 1.0)


def few_rows(n):
  value = np.random.default_rng(0).normal(size=(n, 1)) * 3
  return make_pool([f"row{i}" for i in range(n)], {"log_likelihood": value})


@pytest.mark.parametrize("soft", [0.7, 0.0])
def test_a_soft_isa_draws_by_the_weights(soft):
  """By the change, or exp(change / soft); one seed by hand, and many."""
  pool = few_rows(6)
  change = naive(pool.log_likelihood[:, 0], "magnitude")
  if soft:
    knobs = dict(order="magnitude", soft=soft)
    logits = change / (soft * change.std())
  else:
    knobs, logits = dict(order="soft"), np.log(np.maximum(change, 1e-300))
  got = ISA(3, pool, 2, **knobs)
  gumbel = -np.log(-np.log(topk.uniform(3, pool.ids, "isa")))
  positive = change > (-1 if soft else 1e-9)
  assert_allclose(got.score[positive], (logits + gumbel)[positive], rtol=1e-9)
  if not soft:  # one row has weight 0 and comes last
    assert positive.sum() == 5
    assert got.score[~positive].max() < got.score[positive].min() - 100
  # Sets of two are drawn without replacement, in proportion.
  w = np.exp(logits)
  wanted, seen = {}, {}
  for a, b in itertools.permutations(range(6), 2):
    both = frozenset((a, b))
    chance = w[a] / w.sum() * w[b] / (w.sum() - w[a])
    wanted[both] = wanted.get(both, 0) + chance
  for seed in range(3000):
    both = frozenset(ISA(seed, pool, 2, **knobs).rows)
    seen[both] = seen.get(both, 0) + 1 / 3000
  for both, chance in wanted.items():  # five standard deviations
    spread = 5 * np.sqrt(chance * (1 - chance) / 3000) + 1e-3
    assert abs(seen.get(both, 0) - chance) < spread


def test_a_soft_budget_is_a_prefix_of_a_larger_one():
  long, short = (ISA(0, few_rows(40), m, order="soft").rows for m in (20, 9))
  assert list(short) == list(long[:9])
  assert set(ISA(1, few_rows(40), 20, order="soft").rows) != set(long)


def test_random_is_fair_nested_and_the_same_in_half_of_the_pool():
  pool, random = likelihoods(n=4000), SAMPLERS["random"]
  a, b = random(1, pool, 1000), random(2, pool, 1000)
  assert 200 < np.intersect1d(a.rows, b.rows).size < 300  # 250 by chance
  assert list(random(1, pool, 100).rows) == list(a.rows[:100])
  half = Pool(pool.ids[::2], {})
  wanted = [i for i in pool.ids[a.rows] if i in set(half.ids)]
  c = random(1, half, len(wanted))
  assert list(half.ids[c.rows]) == wanted


def test_length_matched_takes_as_many_of_each_length():
  """By hand: 3 short rows and 2 long ones, whichever the draw likes."""
  length = np.array([[1, 3]] * 10 + [[9, 11]] * 10 + [[30, 50]] * 10)
  subset = np.isin(np.arange(30), [1, 4, 6, 25, 28])
  ids = np.array([f"{i:02d}" for i in range(30)])
  pool = Pool(ids, dict(length=length, subset=subset))
  draws = [SAMPLERS["length_matched"](s, pool, 5) for s in range(40)]
  for got in draws:
    assert (got.rows < 10).sum() == 3 and (got.rows >= 20).sum() == 2
  # Every row of those lengths has its turn, not only the other arm's.
  assert len(np.unique([got.rows for got in draws])) == 20
  plain = SAMPLERS["random"](7, pool, 30).rows
  short, long = plain[plain < 10][:3], plain[plain >= 20][:2]
  assert set(draws[7].rows) == {*short, *long}


# Of every entry of the table.


@functools.cache
def small_pool(responses):
  return make_pools.make(responses, n=120)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("responses", [1, 2])
def test_contract(name, responses):
  """What it needs, shapes, finite scores, order of the input, budgets."""
  sampler, pool = SAMPLERS[name], small_pool(responses)
  n = len(pool.ids)
  reads = sampler.needs + sampler.optional
  assert isinstance(sampler.needs, tuple) and set(reads) <= set(SHAPES)
  parameters = list(inspect.signature(sampler).parameters.values())
  assert [p.name for p in parameters[:3]] == ["seed", "pool", "budget"]
  for p in parameters[3:]:
    assert p.kind == p.KEYWORD_ONLY and p.default is not p.empty
  columns = {k: v for k, v in pool.columns.items() if k in reads}
  if sampler.pairs and responses == 1:
    with pytest.raises(ConfigError, match="pair"):
      sampler(5, Pool(pool.ids, columns), 40)
    return
  got = sampler(5, Pool(pool.ids, columns), 40)
  assert got.rows.dtype == np.int64 and got.rows.shape == (40,)
  assert got.score.dtype == np.float64 and got.score.shape == (n,)
  assert np.isfinite(got.score).all()
  assert len(set(got.rows.tolist())) == 40
  assert (np.diff(got.score[got.rows]) <= 0).all()
  assert np.delete(got.score, got.rows).max() <= got.score[got.rows].min()
  # Rows that arrive in another order, sorted by id again, give the same ids.
  order = np.random.default_rng(9).permutation(n)
  turned = make_pool(pool.ids[order], {k: v[order] for k, v in columns.items()})
  again = sampler(5, turned, 40)
  assert list(got.rows) == list(again.rows)
  assert_array_equal(got.score, again.score)
  assert sorted(sampler(5, pool, n).rows) == list(range(n))
  assert sampler(5, pool, 1).rows.shape == (1,)


@pytest.mark.parametrize(
  "name", [n for n in SAMPLERS if SAMPLERS[n].needs and n != "isa"]
)
def test_broken_numbers_are_refused_by_id(name):
  """A NaN in a column that is read stops it; the row's id is in the error."""
  sampler, pool = SAMPLERS[name], small_pool(2)
  for column in sampler.needs:
    value = np.float64(pool.columns[column])
    value[7] = np.nan
    with pytest.raises(NumericError, match=str(pool.ids[7])):
      sampler(0, with_columns(pool, **{column: value}), 40)


def result_or_advice(sampler, pool, budget):
  """The rows kept; None where the error gives advice."""
  try:
    got = sampler(0, pool, budget)
  except NumericError as error:
    assert "set config.select" in str(error) or "look at" in str(error)
    return None
  assert np.isfinite(got.score).all() and len(set(got.rows.tolist())) == budget
  return got.rows


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_that_are_all_alike_are_drawn_by_the_hash_or_refused(name):
  pool = small_pool(2)
  same = {k: np.broadcast_to(v[:1], v.shape) for k, v in pool.columns.items()}
  rows = result_or_advice(SAMPLERS[name], Pool(pool.ids, same), 30)
  assert rows is None or (rows.max() > 60 and not (np.diff(rows) > 0).all())


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_class_only_and_pools_of_one_and_two_rows(name):
  sampler = SAMPLERS[name]
  pool = make_pools.make(2 if sampler.pairs else 1, n=60)
  if not sampler.pairs:
    pool = with_columns(pool, label=np.ones(60, bool))
  assert len(set(sampler(0, pool, 20).rows)) == 20
  for n in (1, 2):
    few = Pool(pool.ids[:n], {k: v[:n] for k, v in pool.columns.items()})
    result_or_advice(sampler, few, n)


@pytest.mark.parametrize(
  "rows,score,wrong",
  [
    ([0, 1, 1], np.zeros(5), "1 rows twice"),
    ([0, 1], np.zeros(5), "shape"),
    ([0, 1, 5], np.zeros(5), "rows from 0 to 5"),
    ([-1, 1, 2], np.zeros(5), "rows from -1 to 2"),
    ([0.0, 1.0, 2.0], np.zeros(5), "float64"),
    ([0, 1, 2], np.zeros(4), "score of shape"),
    ([0, 1, 2], np.array([0, 1, np.nan, 2, 3]), "1 numbers not finite"),
  ],
)
def test_what_a_sampler_of_one_s_own_returns_is_looked_at(rows, score, wrong):
  with pytest.raises(ConfigError, match=f"'mine' returned .*{wrong}.*wanted 3"):
    checked(Selection(np.array(rows), score), 5, 3, "mine")
  good = Selection(np.array([4, 0, 2]), np.arange(5.0))
  assert checked(good, 5, 3, "mine") is good
