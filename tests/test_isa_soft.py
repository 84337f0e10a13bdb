"""ISA's order "soft": draws weighted by the size of the entropy change."""

import hashlib
import itertools

import numpy as np
import pytest

from jaxalign.core.errors import ConfigError
from jaxalign.select.pool import make_pool
from jaxalign.select.samplers import SAMPLERS


def change(value, i):
  """|H(X) - H(X - i)| by leaving row i out, Khera et al. 2024, Alg. 1."""
  u = (value - value.min()) / (value.max() - value.min())
  p = np.exp(u)
  entropy = lambda rows: -sum(p[j] * np.log(p[j]) for j in rows)
  rows = range(len(value))
  return abs(entropy(rows) - entropy([j for j in rows if j != i]))


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


def small_pool(n=6, seed=0):
  value = np.random.default_rng(seed).normal(size=(n, 1)) * 3
  return make_pool([f"row{i}" for i in range(n)], {"log_likelihood": value})


def test_scores_equal_the_loop_and_a_hash():
  pool = small_pool(30)
  value = pool.log_likelihood[:, 0]
  got = SAMPLERS["isa"](7, pool, 5, order="soft")
  weight = np.array([change(value, i) for i in range(30)])
  some = weight > 1e-9  # one row has weight 0 and comes last
  assert some.sum() == 29
  wanted = [
    np.log(weight[i]) + draw(7, pool.ids[i]) for i in range(30) if some[i]
  ]
  np.testing.assert_allclose(got.score[some], wanted, rtol=1e-9)
  assert got.score[~some].max() < got.score[some].min() - 100
  np.testing.assert_array_equal(got.rows, np.argsort(-got.score)[:5])


def test_sets_are_drawn_without_replacement_in_proportion():
  pool = small_pool()
  value = pool.log_likelihood[:, 0]
  w = np.array([change(value, i) for i in range(6)])
  wanted = {}
  for a, b in itertools.permutations(range(6), 2):
    both = frozenset((a, b))
    chance = w[a] / w.sum() * w[b] / (w.sum() - w[a])
    wanted[both] = wanted.get(both, 0) + chance
  seen = dict.fromkeys(wanted, 0)
  for seed in range(3000):
    seen[frozenset(SAMPLERS["isa"](seed, pool, 2, order="soft").rows)] += 1
  for both, chance in wanted.items():  # five standard deviations
    assert (
      abs(seen[both] / 3000 - chance)
      < 5 * np.sqrt(chance * (1 - chance) / 3000) + 1e-3
    )


def test_a_budget_is_a_prefix_and_input_order_does_not_matter():
  pool = small_pool(40)
  long = SAMPLERS["isa"](0, pool, 20, order="soft").rows
  assert list(SAMPLERS["isa"](0, pool, 9, order="soft").rows) == list(long[:9])
  turned = make_pool(
    pool.ids[::-1], {"log_likelihood": pool.log_likelihood[::-1]}
  )
  np.testing.assert_array_equal(
    SAMPLERS["isa"](0, turned, 20, order="soft").rows, long
  )
  assert set(SAMPLERS["isa"](1, pool, 20, order="soft").rows) != set(long)


def test_what_cannot_be_weights_is_refused():
  pool = make_pool(
    ["a", "b", "c"],
    {"log_likelihood": np.array([[0.0, 1.0], [2.0, 1.5], [3.0, 0.5]])},
  )
  with pytest.raises(ConfigError, match="pair_score 'difference'"):
    SAMPLERS["isa"](0, pool, 2, order="soft", pair_score="difference")
  with pytest.raises(ConfigError, match="soft is 0.5"):
    SAMPLERS["isa"](0, pool, 2, order="soft", soft=0.5)
