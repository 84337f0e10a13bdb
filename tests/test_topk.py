"""The best M rows: ties by a hash of the id, NaN refused, budgets checked."""

import hashlib

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest

from jaxalign.core.errors import ConfigError, DataError, NumericError
from jaxalign.select import topk
from jaxalign.select.pool import make_pool


def ids_of(n):
  return np.array([f"row-{i:06d}" for i in range(n)])


def hashed(ids):
  """blake2b of each id, keyed as an empty salt is, big-endian."""
  key = hashlib.blake2b(b"", digest_size=32).digest()
  digest = lambda i: hashlib.blake2b(i.encode(), digest_size=8, key=key)
  numbers = [int.from_bytes(digest(str(i)).digest(), "big") for i in ids]
  return np.array(numbers, np.uint64)


def scores_of(kind, n, rng):
  score = rng.normal(size=n)
  if kind == "rounded":
    score = np.round(score, 1)
  elif kind == "equal":
    score = np.where(np.arange(n) % 2, 0.0, -0.0)
  elif kind == "wild":
    score = score * 10.0 ** rng.integers(-300, 300, n)
    next_ = np.nextafter(1e308, 0)
    inf = np.inf
    score[:9] = [inf, -inf, inf, 5e-324, -5e-324, 0.0, -0.0, 1e308, next_]
  return score


@pytest.mark.parametrize("kind", ["plain", "rounded", "equal", "wild"])
def test_the_best_are_those_of_a_sort(kind):
  n = 601
  ids, rng = ids_of(n), np.random.default_rng(3)
  score, mixed = scores_of(kind, n, rng), rng.permutation(n)
  order = np.lexsort((np.arange(n), hashed(ids), -score))
  for m in (0, 1, 60, 300, n - 1, n):
    rows = topk.top(score, ids, m)
    assert rows.dtype == np.int64 and rows.tolist() == order[:m].tolist()
    again = mixed[topk.top(score[mixed], ids[mixed], m)]
    assert again.tolist() == rows.tolist()


def test_nan_is_refused_by_id_and_so_are_more_rows_than_there_are():
  with pytest.raises(NumericError, match="row-000002"):
    topk.top(np.array([0.0, np.inf, np.nan, 1.0]), ids_of(4), 2)
  for m in (-1, 5):
    with pytest.raises(ConfigError, match="select.budget"):
      topk.top(np.zeros(4), ids_of(4), m)


@pytest.mark.parametrize(
  "budget,n,wanted",
  [
    (0.1, 1000, 100),
    (0.035, 1000, 35),
    (0.15, 10, 2),
    (1.0, 10, 10),
    (1, 10, 1),
    (10, 10, 10),
    (np.int64(3), 10, 3),
    (np.float32(0.5), 10, 5),
  ],
)
def test_budget(budget, n, wanted):
  assert topk.budget_rows(budget, n) == wanted


@pytest.mark.parametrize(
  "budget", [0, 0.0, -1, -0.1, 11, 1.5, 11.0, float("nan"), True, "0.1", None]
)
def test_budget_refused(budget):
  with pytest.raises(ConfigError, match="config.select.budget"):
    topk.budget_rows(budget, 10)


def test_budget_below_one_batch():
  with pytest.raises(ConfigError, match="below one batch of 4"):
    topk.budget_rows(0.3, 10, batch=4)
  assert topk.budget_rows(0.4, 10, batch=4) == 4


def test_uniform_belongs_to_the_id():
  ids = ids_of(5000)
  u = topk.uniform(7, ids, "a")
  assert 0 < u.min() and u.max() < 1
  assert abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.005
  assert_array_equal(topk.uniform(7, ids[::-3], "a"), u[::-3])
  for other in (topk.uniform(8, ids, "a"), topk.uniform(7, ids, "b")):
    assert abs(np.corrcoef(u, other)[0, 1]) < 0.05
  # The stream is part of the format: a change would redraw every subset.
  got = topk.uniform(0, np.array(["a", "b"]), "random")
  assert_allclose(got, [0.7242655226048975, 0.376340514393295], atol=1e-15)


def test_gumbel_keys_draw_by_weight_without_replacement():
  """Two of four: the chances of Plackett and Luce, by hand."""
  ids, w = ids_of(4), np.array([0.1, 0.2, 0.3, 0.4])
  u = topk.uniform(5, ids, "x")
  assert_allclose(topk.gumbel(5, ids, "x"), -np.log(-np.log(u)))
  seen = np.zeros((4, 4))
  for seed in range(4000):
    rows = topk.top(np.log(w) + topk.gumbel(seed, ids, "x"), ids, 2)
    seen[tuple(rows)] += 1 / 4000
  wanted = w[:, None] * w[None] / (1 - w[:, None])
  np.fill_diagonal(wanted, 0)
  assert abs(seen - wanted).max() < 0.03


def test_pick_is_the_highest_and_the_hash_decides_within_the_tolerance():
  ids, rows = ids_of(50), np.arange(10, 40)
  value = np.random.default_rng(2).normal(size=30)
  assert topk.pick(value, rows, ids) == value.argmax()
  tied = [3, 8, 21]
  value[tied] = 5.0 + np.array([0.0, 2e-9, 1e-9])
  assert topk.pick(value, rows, ids) == 8
  least = tied[topk.id_hash(ids[rows[tied]]).argmin()]
  assert topk.pick(value, rows, ids, 1e-8) == least
  assert topk.pick(value[::-1], rows[::-1], ids, 1e-8) == 29 - least


def test_largest_is_the_end_of_a_sort():
  value = np.random.default_rng(4).normal(size=50)
  rows = np.arange(3, 47)
  for size in (1, 9, 44, 60):
    wanted = np.sort(rows[np.argsort(value[rows])[-size:]])
    assert_array_equal(topk.largest(value, rows, size), wanted)


def test_pool_sorts_and_names_what_is_missing():
  pool = make_pool(["b", "a"], {"length": np.array([[2], [1]])})
  assert list(pool.ids) == ["a", "b"] and pool.length[0, 0] == 1
  with pytest.raises(ConfigError, match="no column 'log_likelihood'.*length"):
    pool.log_likelihood
  with pytest.raises(DataError, match="'a' occurs more than once"):
    make_pool(["a", "a"], {})
  with pytest.raises(DataError, match="wanted 2 rows"):
    make_pool(["a", "b"], {"length": np.zeros(3)})


def test_an_id_in_bytes_is_the_same_id():
  ids = np.array(["a", "é", "row-7"])
  encoded = np.array([i.encode() for i in ids])
  assert topk.id_hash(encoded).tolist() == topk.id_hash(ids).tolist()
