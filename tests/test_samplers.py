"""Every sampler keeps its contract; ISA equals the loop it replaces."""

import functools
import hashlib
import inspect
import itertools
import math

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pools as tests_pools
from pools import with_columns
import pytest

from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.select import pool as pools
from jaxalign.select import topk
from jaxalign.select.samplers import isa, SAMPLERS, values

N = 500
ISA = SAMPLERS["isa"]


def make_pool(responses=2, n=N, seed=0):
  rng = np.random.default_rng(seed)
  value = -90 - rng.gamma(2.0, 8.0, size=(n, responses))  # skewed left
  columns = {
    "embedding": rng.normal(size=(n, responses, 8)).astype(np.float32),
    "log_likelihood": value,
    "length": rng.integers(1, 99, size=(n, responses)).astype(np.int32),
    "topic": rng.integers(0, 9, size=n),
  }
  if responses == 1:
    columns["label"] = rng.random(n) < 0.3
  return pools.make_pool([f"id{i:05d}" for i in rng.permutation(n)], columns)


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


LOOP = 2000  # rows of the loop over all rows


@pytest.fixture(scope="module")
def oracle():
  values = make_pool(1, LOOP).log_likelihood[:, 0]
  return {order: naive(values, order) for order in isa.ORDERS}


@pytest.mark.parametrize("order", isa.ORDERS)
def test_isa_equals_the_loop(order, oracle):
  pool = make_pool(1, LOOP)
  got = ISA(0, pool, 50, order=order)
  # The loop subtracts two sums of 2,000 terms; the formula does not.
  assert_allclose(got.score, oracle[order], rtol=0, atol=1e-12)
  assert list(got.rows) == list(np.argsort(-oracle[order])[:50])
  # A flipped sign, or one reading for another, fails here.
  for other in isa.ORDERS:
    if other != order:
      assert set(got.rows) != set(np.argsort(-oracle[other])[:50])
  assert set(got.rows) != set(np.argsort(oracle[order])[:50])


def test_isa_orders_pick_rare_dense_and_middle(oracle):
  del oracle
  pool = make_pool(1)
  rank = pool.log_likelihood[:, 0].argsort().argsort() / (N - 1)
  pick = {
    order: rank[ISA(0, pool, 50, order=order).rows] for order in isa.ORDERS
  }
  assert pick["literal"].max() < 0.11
  assert pick["magnitude"].min() > 0.89
  assert 0.1 < pick["renormalised"].mean() < 0.9


def test_a_soft_isa_draws_by_the_weights():
  """Of many seeds, a row's share is its weight's; one seed, by hand."""
  pool = make_pool(1, n=6)
  change = naive(pool.log_likelihood[:, 0].tolist(), "magnitude")
  logits = change / (0.7 * change.std())
  u = topk.uniform(3, pool.ids, "isa")
  got = ISA(3, pool, 2, order="magnitude", soft=0.7)
  assert_allclose(got.score, logits - np.log(-np.log(u)), rtol=1e-9)
  first = [
    ISA(s, pool, 1, order="magnitude", soft=0.7).rows[0] for s in range(3000)
  ]
  share = np.exp(logits) / np.exp(logits).sum()
  assert abs(np.bincount(first, minlength=6) / 3000 - share).max() < 0.03
  with pytest.raises(ConfigError, match="soft is -1"):
    ISA(0, pool, 2, soft=-1)


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
  pool = make_pool(2)
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


def test_unpaired_difference_and_pairs_quota_are_refused():
  with pytest.raises(ConfigError, match="1 responses"):
    ISA(0, make_pool(1), 5, pair_score="difference")
  with pytest.raises(ConfigError, match="label_quota"):
    ISA(0, make_pool(2), 5, label_quota=0.5)
  for knob in ("order", "pair_score"):
    with pytest.raises(ConfigError, match=f"select.{knob}"):
      ISA(0, make_pool(2), 5, **{knob: "nonsense"})


@pytest.mark.parametrize(
  "quota,wanted", [(0.5, 40), (0.0, 0), (1.0, 80), ("as_pool", None)]
)
def test_label_quota(quota, wanted):
  pool = make_pool(1)
  wanted = round(pool.label.mean() * 80) if wanted is None else wanted
  got = ISA(0, pool, 80, label_quota=quota)
  assert pool.label[got.rows].sum() == wanted and len(set(got.rows)) == 80
  assert (np.diff(got.score[got.rows]) <= 0).all()
  best = [i for i in np.argsort(-got.score) if pool.label[i]][:wanted]
  assert set(best) == set(got.rows[pool.label[got.rows]])


@pytest.mark.parametrize("quota", [1.5, -0.1, "pool", True])
def test_label_quota_refused(quota):
  with pytest.raises(ConfigError, match="label_quota"):
    ISA(0, make_pool(1), 5, label_quota=quota)
  with pytest.raises(ConfigError, match="asks for 450 desirable"):
    ISA(0, make_pool(1), 450, label_quota=1.0)


def test_constant_or_broken_likelihood_is_refused():
  pool = make_pool(1)
  for value, found in (
    (np.zeros((N, 1)), "equal"),
    (
      np.where(np.arange(N) == 3, np.nan, 1.0)[:, None] * np.arange(N)[:, None],
      "not finite",
    ),
  ):
    broken = pools.Pool(pool.ids, pool.columns | {"log_likelihood": value})
    with pytest.raises(NumericError, match=found):
      ISA(0, broken, 5)


def test_a_shift_and_scale_of_the_likelihood_change_no_row():
  pool = make_pool(2)
  moved = pools.Pool(
    pool.ids,
    pool.columns | {"log_likelihood": 2.0 * pool.log_likelihood + 64.0},
  )
  for order in isa.ORDERS:
    a = ISA(0, pool, 70, order=order)
    b = ISA(0, moved, 70, order=order)
    assert set(a.rows) == set(b.rows)


def test_random_is_fair_nested_and_the_same_in_a_part_of_the_pool():
  pool = make_pool(2, n=4000)
  a = SAMPLERS["random"](1, pool, 1000)
  b = SAMPLERS["random"](2, pool, 1000)
  assert 200 < np.intersect1d(a.rows, b.rows).size < 300  # 250 by chance
  assert list(SAMPLERS["random"](1, pool, 100).rows) == list(a.rows[:100])
  part = pools.Pool(pool.ids[::2], {})
  inside = set(part.ids)
  wanted = [i for i in pool.ids[a.rows] if i in inside]
  c = SAMPLERS["random"](1, part, len(wanted))
  assert list(part.ids[c.rows]) == wanted


def draw(seed, name):
  """The Gumbel number of a record: blake2b of its id, keyed by the seed."""
  key = hashlib.blake2b(f"isa:{seed}".encode(), digest_size=32).digest()
  bits = (
    int.from_bytes(
      hashlib.blake2b(name.encode(), key=key, digest_size=8).digest(), "big"
    )
    >> 11
  )
  return -np.log(-np.log((bits + 0.5) / 2.0**53))


def few_rows(n=6, seed=0):
  value = np.random.default_rng(seed).normal(size=(n, 1)) * 3
  return pools.make_pool(
    [f"row{i}" for i in range(n)], {"log_likelihood": value}
  )


def test_scores_equal_the_loop_and_a_hash():
  pool = few_rows(30)
  value = pool.log_likelihood[:, 0]
  got = ISA(7, pool, 5, order="soft")
  weight = naive(value, "magnitude")
  some = weight > 1e-9  # one row has weight 0 and comes last
  assert some.sum() == 29
  wanted = [
    np.log(weight[i]) + draw(7, pool.ids[i]) for i in range(30) if some[i]
  ]
  assert_allclose(got.score[some], wanted, rtol=1e-9)
  assert got.score[~some].max() < got.score[some].min() - 100
  assert_array_equal(got.rows, np.argsort(-got.score)[:5])


def test_sets_are_drawn_without_replacement_in_proportion():
  pool = few_rows()
  value = pool.log_likelihood[:, 0]
  w = naive(value, "magnitude")
  wanted = {}
  for a, b in itertools.permutations(range(6), 2):
    both = frozenset((a, b))
    chance = w[a] / w.sum() * w[b] / (w.sum() - w[a])
    wanted[both] = wanted.get(both, 0) + chance
  seen = dict.fromkeys(wanted, 0)
  for seed in range(3000):
    seen[frozenset(ISA(seed, pool, 2, order="soft").rows)] += 1
  for both, chance in wanted.items():  # five standard deviations
    assert (
      abs(seen[both] / 3000 - chance)
      < 5 * np.sqrt(chance * (1 - chance) / 3000) + 1e-3
    )


def test_a_budget_is_a_prefix_and_input_order_does_not_matter():
  pool = few_rows(40)
  long = ISA(0, pool, 20, order="soft").rows
  assert list(ISA(0, pool, 9, order="soft").rows) == list(long[:9])
  turned = pools.make_pool(
    pool.ids[::-1], {"log_likelihood": pool.log_likelihood[::-1]}
  )
  assert_array_equal(ISA(0, turned, 20, order="soft").rows, long)
  assert set(ISA(1, pool, 20, order="soft").rows) != set(long)


def test_what_cannot_be_weights_is_refused():
  pool = pools.make_pool(
    ["a", "b", "c"],
    {"log_likelihood": np.array([[0.0, 1.0], [2.0, 1.5], [3.0, 0.5]])},
  )
  with pytest.raises(ConfigError, match="pair_score 'difference'"):
    ISA(0, pool, 2, order="soft", pair_score="difference")
  with pytest.raises(ConfigError, match="soft is 0.5"):
    ISA(0, pool, 2, order="soft", soft=0.5)


# Of every entry of the table.


def refuses(sampler, responses):
  """Whether this sampler must refuse a pool of single responses."""
  return sampler.pairs and responses == 1


@functools.cache
def small_pool(responses):
  return tests_pools.make(responses, n=120)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("responses", [1, 2])
def test_contract(name, responses):
  """What it needs, shapes, finite scores, order of the input, budgets."""
  sampler, pool = SAMPLERS[name], small_pool(responses)
  n = len(pool.ids)
  assert isinstance(sampler.needs, tuple)
  assert set(sampler.needs + sampler.optional) <= set(pools.SHAPES)
  parameters = list(inspect.signature(sampler).parameters.values())
  assert [p.name for p in parameters[:3]] == ["seed", "pool", "budget"]
  assert all(
    p.kind == p.KEYWORD_ONLY and p.default is not p.empty
    for p in parameters[3:]
  )
  reads = {
    k: v
    for k, v in pool.columns.items()
    if k in sampler.needs + sampler.optional
  }
  if refuses(sampler, responses):
    with pytest.raises(ConfigError, match="pair"):
      sampler(5, pools.Pool(pool.ids, reads), 40)
    return
  got = sampler(5, pools.Pool(pool.ids, reads), 40)
  assert got.rows.dtype == np.int64 and got.rows.shape == (40,)
  assert got.score.dtype == np.float64 and got.score.shape == (n,)
  assert np.isfinite(got.score).all()
  assert len(set(got.rows.tolist())) == 40
  assert (np.diff(got.score[got.rows]) <= 0).all()
  assert np.delete(got.score, got.rows).max() <= got.score[got.rows].min()
  # Rows that arrive in another order, sorted by id again, give the same ids.
  order = np.random.default_rng(9).permutation(n)
  again = sampler(
    5,
    pools.make_pool(pool.ids[order], {k: v[order] for k, v in reads.items()}),
    40,
  )
  assert list(got.rows) == list(again.rows)
  assert_array_equal(got.score, again.score)
  assert sorted(sampler(5, pool, n).rows) == list(range(n))
  assert sampler(5, pool, 1).rows.shape == (1,)


def test_length_matched_takes_as_many_of_each_length():
  """By hand: 3 short rows and 2 long ones, whichever the draw likes."""
  length = np.array([[1, 3]] * 10 + [[9, 11]] * 10 + [[30, 50]] * 10)
  subset = np.isin(np.arange(30), [1, 4, 6, 25, 28])
  pool = pools.Pool(
    np.array([f"{i:02d}" for i in range(30)]),
    dict(length=length, subset=subset),
  )
  draws = [SAMPLERS["length_matched"](s, pool, 5) for s in range(40)]
  for got in draws:
    assert (got.rows < 10).sum() == 3 and (got.rows >= 20).sum() == 2
  # Every row of those lengths has its turn, not only the other arm's.
  assert len(np.unique([got.rows for got in draws])) == 20
  plain = SAMPLERS["random"](7, pool, 30).rows
  short, long = plain[plain < 10][:3], plain[plain >= 20][:2]
  assert set(draws[7].rows) == {*short, *long}


@pytest.mark.parametrize("name", [n for n in SAMPLERS if SAMPLERS[n].needs])
def test_broken_numbers_are_refused_by_id(name):
  """A NaN in a column that is read stops it; the row's id is in the error."""
  sampler, pool = SAMPLERS[name], small_pool(2)
  if name == "isa":
    pytest.skip("reads one likelihood over all rows; its own test above")
  for column in sampler.needs:
    value = np.float64(pool.columns[column])
    value[7] = np.nan
    with pytest.raises(NumericError, match=str(pool.ids[7])):
      sampler(0, with_columns(pool, **{column: value}), 40)


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_that_are_all_alike_are_drawn_by_the_hash_or_refused(name):
  sampler, pool = SAMPLERS[name], small_pool(2)
  same = {k: np.broadcast_to(v[:1], v.shape) for k, v in pool.columns.items()}
  try:
    got = sampler(0, pools.Pool(pool.ids, same), 30)
  except NumericError as error:
    assert "set config.select" in str(error) or "look at" in str(error)
    return
  assert len(set(got.rows.tolist())) == 30 and np.isfinite(got.score).all()
  assert got.rows.max() > 60 and not (np.diff(got.rows) > 0).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_class_only_and_pools_of_one_and_two_rows(name):
  sampler = SAMPLERS[name]
  responses = 2 if sampler.pairs else 1
  pool = tests_pools.make(responses, n=60)
  if responses == 1:
    pool = with_columns(pool, label=np.ones(60, bool))
  assert len(set(sampler(0, pool, 20).rows)) == 20
  for n in (1, 2):
    part = pools.Pool(pool.ids[:n], {k: v[:n] for k, v in pool.columns.items()})
    try:
      assert sorted(sampler(0, part, n).rows) == list(range(n))
    except NumericError as error:  # nothing can be said of one row
      assert "set config.select" in str(error) or "look at" in str(error)


@pytest.mark.parametrize("quota,liked", [(0.5, 3), (0.45, 2), (0.7, 4)])
def test_a_quota_is_rounded_to_the_nearest_row(quota, liked):
  """2.5 desirable rows of five are three; 2.25 are two, 3.5 are four. A label
  may be used up to its last row, and not beyond."""
  label = np.array([True] * 4 + [False] * 6)
  pool = pools.Pool(np.array([f"r{i}" for i in range(10)]), dict(label=label))
  rows = isa.top_with_quota(np.arange(10.0), pool, 5, quota)
  assert label[rows].sum() == liked
  with pytest.raises(ConfigError, match="5 desirable rows, the pool has 4"):
    isa.top_with_quota(np.arange(10.0), pool, 5, 1.0)


@pytest.mark.parametrize(
  "rows,score,said",
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
def test_what_a_sampler_of_one_s_own_returns_is_looked_at(rows, score, said):
  with pytest.raises(ConfigError, match=f"'mine' returned .*{said}.*wanted 3"):
    pools.checked(pools.Selection(np.array(rows), score), 5, 3, "mine")
  good = pools.Selection(np.array([4, 0, 2]), np.arange(5.0))
  assert pools.checked(good, 5, 3, "mine") is good
