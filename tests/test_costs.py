"""What samplers are said to cost, by the equations and by counted products."""

import math

import jax
import numpy as np
import pytest

import pools as make_pools
from jaxalign.select import costs
from jaxalign.select.samplers import SAMPLERS, clusters, combine, density
from jaxalign.select.samplers import geometric, submodular
from test_ledger import multiplied

SIZES = [costs.Pool(5000, 64, 500, 2, 48), costs.Pool(30_000, 384, 900, 1, 48)]


def test_every_sampler_and_step_says_what_it_costs():
  assert set(costs.COSTS) == set(SAMPLERS)
  assert set(costs.STEPS) == set(combine.COMBINATORS)
  for p in SIZES:
    for name, sampler in SAMPLERS.items():
      got = costs.of(name, p)
      assert got.operations > 0 and got.held > 0 and got.device >= 0
      assert (got.read > 0) == bool(sampler.needs)
  assert costs.of("my_module:mine", SIZES[0]) is None
  assert costs.of("dedup | my_module:mine", SIZES[0]) is None


def by_the_equations(p):
  """The methods' operations, multiply-adds x 2; N, d, k as in the papers."""
  n, d, k = p.n, p.e, p.budget
  parts = math.ceil(n / 1024)
  some = min(n, max(20_000, 32 * parts))
  return {
      # Features of the rows twice, 1,024 of them: their sums, then scores.
      "density": 2 * (2 * n * 1024 * d),
      "k_center": 2 * n * k * d,  # a distance of all rows to every pick
      "herding": 2 * n * k * d,  # a product of all rows with every w
      "real": 2 * n * d,  # one cosine a pair
      # All similarities once; from 20,000 rows candidates of every pick,
      # N/k ln(1/epsilon) of them.
      "facility_location": 2 * n * n * d * (
          1 if n <= 20_000 else math.log(1 / 0.05)),
      # A Cholesky factor of k rows (n k^2 / 2 products, twice) and kernels.
      "dpp": n * k**2 + 2 * n * k * d,
      # Ten steps of k-means on a sample, all rows once, cosines inside the
      # clusters below the diagonal.
      "semdedup": 2 * (10 * some + n) * parts * d + 2 * n * n * d / parts / 2,
      "deita": 2 * n * k * d,  # cosines with what is kept
  }


@pytest.mark.parametrize("p", SIZES)
def test_operations_follow_the_equations(p):
  for name, wanted in by_the_equations(p).items():
    np.testing.assert_allclose(costs.of(name, p).operations, wanted,
                               rtol=1e-12, err_msg=name)
  # A score is ranked, whatever its width.
  for name in ("random", "isa", "ifd", "bees", "ask_llm", "selective_dpo"):
    assert costs.of(name, p).operations <= 100 * p.n


def counted(fn, *arrays):
  return multiplied(jax.make_jaxpr(fn)(*arrays).jaxpr)


def test_operations_are_the_products_of_the_programs():
  """Of those that run on the devices, from their jaxprs."""
  n, e = 96, 12
  f32 = lambda *shape: np.zeros(shape, np.float32)
  w, x, real = f32(1024, e), f32(n, e), f32(n)
  sums = counted(density._feature_sums, w, x, real)
  means = f32(2, 8, 128)
  found = counted(density._feature_scores, w, means, x, real)
  p = costs.Pool(n, e, 10)
  # The second pass also adds up 1,024 features a row, which is no product.
  assert sums + found == costs.of("density", p).operations
  one = counted(geometric._nearest, f32(10, e), f32(10), x, real)
  assert one == costs.of("k_center", p).operations


def test_what_is_held_is_what_is_made():
  p = costs.Pool(700, 8, 50)
  x = np.random.default_rng(0).normal(size=(700, 8)).astype(np.float32)
  kept = submodular._Coverage(x).columns.nbytes
  assert costs.of("facility_location", p).held == x.nbytes + kept
  assert costs.of("facility_location", p).device == 0
  # A DPP keeps N x M float64 beside float64 rows.
  assert costs.of("dpp", p).held == (
      x.nbytes + np.float64(x).nbytes + np.empty((50, 700)).nbytes)
  placed = clusters.rows_lib.place(x)
  assert costs.of("semdedup", p).device == 700 * 8 * 4 <= sum(
      t.nbytes for t in placed.tiles)


@pytest.mark.parametrize("name", ["ifd", "k_center", "crossfit", "isa",
                                  "selective_dpo", "bees"])
def test_bytes_read_are_those_of_the_columns(name):
  pool = make_pools.make(2, 64, width=8)
  grams = np.zeros((64, 2, 1024), np.uint8)
  pool = make_pools.with_columns(pool, grams=grams)
  wanted = sum(np.asarray(pool.columns[n], np.float64 if n in (
      "logp", "logp_alone", "logp_count", "log_likelihood", "reward", "least",
      "proxy_logp", "proxy_ref_logp", "length") else None).nbytes
               for n in SAMPLERS[name].needs)
  assert costs.of(name, costs.Pool(64, 8, 9, 2, 8)).read == wanted


def test_a_chain_costs_the_sum_of_its_links():
  p = SIZES[0]
  one = lambda name: costs.of(name, p)
  got = one("dedup(threshold=0.9) | gate(column=reward, low=0.1) | k_center")
  scores = one("random").operations
  assert got.operations == (one("semdedup").operations + scores
                            + one("k_center").operations)
  assert got.held == max(one("semdedup").held, one("k_center").held)
  assert got.read == one("k_center").read + 16 * p.n  # the gate's reward
  both = one("ask_llm * external_margin")
  assert both.operations == 2 * scores and both.read == 32 * p.n
