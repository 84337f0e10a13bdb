"""The costs of samplers against the equations and counted products."""

import math
import tracemalloc

import jax
import numpy as np
from numpy.testing import assert_allclose
import pools as make_pools
from pools import with_columns
import pytest
from test_ledger import multiplied

from jaxalign.select import chunks, costs
from jaxalign.select.pool import needs
from jaxalign.select.samplers import chains, density, geometric, SAMPLERS
from jaxalign.select.samplers.crossfit import heads

SIZES = [
  costs.Sizes(5000, 64, 500, 2, 48),
  costs.Sizes(30_000, 384, 900, 1, 48),
]


def cost_of(name, sizes, **kwargs):
  return costs.estimate(chains.find_sampler(name), sizes, **kwargs)


@needs("length")
def without_cost(seed, pool, budget):
  return SAMPLERS["random"](seed, pool, budget)


@pytest.mark.parametrize("p", SIZES)
def test_every_sampler_and_step_has_a_cost(p):
  for step in ("gate(column=reward)", "dedup", "quota(by=label)", "diverse"):
    assert cost_of(f"{step} | random", p).held > 0
  for name, sampler in SAMPLERS.items():
    got = cost_of(name, p)
    assert got.flops > 0 and got.held > 0 and got.device >= 0
    assert (got.read > 0) == bool(sampler.needs)
  for name in (
    "{}",
    "dedup | {}",
    "isa * {}",
    "gate(column=reward) | {} * isa",
  ):
    assert cost_of(name.format(f"{__name__}:without_cost"), p) is None


def by_the_equations(p):
  """The methods' flops, multiply-adds x 2; N, d, k as in the papers."""
  n, d, k = p.n, p.e, p.budget
  groups = math.ceil(n / 1024)
  some = min(n, max(20_000, 32 * groups))
  candidates = 1 if n <= 20_000 else math.log(1 / 0.05)
  return {
    # Features of the rows twice, 1,024 of them: their sums, then scores.
    "density": 2 * (2 * n * 1024 * d),
    "k_center": 2 * n * k * d,  # a distance of all rows to every pick
    "herding": 2 * n * k * d,  # a product of all rows with every w
    "real": 2 * n * d,  # one cosine a pair
    # All similarities once; above 20,000 rows candidates of every pick,
    # N/k ln(1/epsilon) of them.
    "facility_location": 2 * n * n * d * candidates,
    # A Cholesky factor of k rows (n k^2 / 2 products, twice) and kernels.
    "dpp": n * k**2 + 2 * n * k * d,
    # Ten steps of k-means on a sample, all rows once, cosines inside the
    # clusters below the diagonal.
    "semdedup": 2 * (10 * some + n) * groups * d + 2 * n * n * d / groups / 2,
    "deita": 2 * n * k * d,  # cosines with what is kept
  }


@pytest.mark.parametrize("p", SIZES)
def test_flops_follow_the_equations(p):
  for name, wanted in by_the_equations(p).items():
    assert_allclose(cost_of(name, p).flops, wanted, rtol=1e-12, err_msg=name)
  # A score is ranked, whatever its width.
  for name in ("random", "isa", "ifd", "bees", "ask_llm", "selective_dpo"):
    assert cost_of(name, p).flops <= 100 * p.n


def test_flops_are_the_products_of_the_programs():
  """Of those that run on the devices, from their jaxprs."""
  n, e = 96, 12
  f32 = lambda *shape: np.zeros(shape, np.float32)
  count = lambda fn, *x: multiplied(jax.make_jaxpr(fn)(*x).jaxpr)
  w, x, real, p = f32(1024, e), f32(n, e), f32(n), costs.Sizes(n, e, 10)
  sums = count(density._feature_sums, w, x, real)
  scores = count(density._feature_scores, w, f32(2, 8, 128), x, real)
  # The second pass also adds up 1,024 features a row, which is no product.
  assert sums + scores == cost_of("density", p).flops
  one = count(geometric._nearest, f32(10, e), f32(10), x, real)
  assert one == cost_of("k_center", p).flops


def test_what_is_placed_is_on_the_devices():
  p = costs.Sizes(700, 8, 50)
  assert cost_of("facility_location", p).device == 0
  assert cost_of("facility_location(exact=False)", p).device == 700 * 10 * 4
  placed = chunks.place(np.zeros((700, 8), np.float32))
  assert cost_of("semdedup", p).device == 700 * 8 * 4
  assert 700 * 8 * 4 <= sum(t.nbytes for t in placed.columns)
  # Exact up to 20,000 rows of a block, and on the host; drawn above.
  of = lambda n, **kwargs: cost_of(
    "facility_location", costs.Sizes(n, 8, 50), **kwargs
  )
  exact, drawn = of(20_000), of(20_001)
  assert exact.device == 0 and exact.on_host == exact.flops
  assert drawn.device == 20_001 * 40 and drawn.on_host == 0
  # The 512 MiB of columns are kept by the exact form alone.
  assert exact.held > 2**29 and drawn.held < 2**23
  assert of(40_000, blocks=4).on_host > 0


FACTOR = 2.5  # between what is held and its estimate
MEASURED = [(name, 4000, 64) for name in SAMPLERS if "crossfit" not in name]
MEASURED += [
  ("density(features=0)", 2000, 64),
  ("k_center(pair=concat)", 3000, 64),
  ("herding(features=64)", 3000, 64),
  ("semdedup(clusters=8)", 4000, 64),
  ("facility_location(exact=False)", 2000, 64),
  ("facility_location", 2000, 256),
  pytest.param("crossfit_lite", 1200, 64, marks=pytest.mark.slow),
  pytest.param("crossfit", 1500, 64, marks=pytest.mark.slow),
  ("dedup(threshold=0.9) | gate(column=reward, low=0.1) | isa", 4000, 64),
]


def held(name, n, e):
  """What NumPy holds at most, beyond the columns, by its estimate."""
  rng = np.random.default_rng(0)
  wide = lambda: np.float32(rng.normal(size=(n, 2, e)))
  pool = with_columns(
    make_pools.make(2, n, width=8),
    embedding=wide(),
    answer_embedding=wide(),
    residual=wide(),
    grams=rng.poisson(0.05, size=(n, 2, 1024)).astype(np.uint8),
  )
  sampler = chains.find_sampler(name)
  columns = {k: v for k, v in pool.columns.items() if k in sampler.needs}
  pool = pool._replace(columns=columns)
  sampler(0, pool, n // 20)  # compiles
  tracemalloc.start()
  try:
    sampler(0, pool, n // 20)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  return peak / cost_of(name, costs.Sizes(n, e, n // 20, 2, e)).held


@pytest.mark.parametrize("name,n,e", MEASURED)
def test_what_is_held_is_about_the_estimate(name, n, e):
  assert 1 / FACTOR < held(name, n, e) < FACTOR


@pytest.mark.parametrize(
  "name", ["k_center", "herding", "dpp", "deita", "facility_location"]
)
def test_blocks_are_counted(name):
  p = costs.Sizes(16_000, 64, 1600, 2, 64)
  whole, cut = cost_of(name, p), cost_of(f"{name}(blocks=8)", p)
  assert cut == cost_of(name, p, blocks=8)
  # And k-means: 8 centres with 16,000 rows, ten times, and once more.
  clusters = 2 * 8 * 64 * 11 * 16_000
  greedy = dict(dpp=16_000 * 1600**2 / 64 + 2 * 16_000 * 1600 * 64 / 8)
  wanted = clusters + greedy.get(name, whole.flops / 8)
  assert cut.flops == pytest.approx(wanted)
  assert cut.device >= 16_000 * 64 * 4
  if name in ("dpp", "facility_location"):
    assert cut.held < whole.held
  # The largest cluster may have twice the mean, and is estimated to.
  assert 1 / (4 * FACTOR) < held(f"{name}(blocks=8)", 4000, 64) < FACTOR


def test_keywords_change_the_cost():
  p = SIZES[0]
  of = lambda name, **kwargs: cost_of(name, p, **kwargs).flops
  assert of("density(features=256)") * 4 == of("density")
  assert of("density", features=0) == 2 * 5000**2 * 64
  assert of("k_center", pair="concat") == 2 * of("k_center")
  assert of("herding(features=96)") == 3 * of("herding")
  drawn = of("facility_location(exact=False,epsilon=0.2)")
  assert drawn == pytest.approx(math.log(5) * of("facility_location"))
  assert of("semdedup(clusters=1)") > 4 * of("semdedup")
  assert of("dedup(clusters=1) | isa") > 4 * of("dedup | isa")


def newtons(monkeypatch):
  """What heads multiply while they are fitted: a list that fills."""
  found, fit, solve = [], heads.fit, np.linalg.solve

  def counted_fit(x, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(
        heads.np.linalg,
        "solve",
        lambda a, b: (found.append(2 * len(x) * len(a) ** 2), solve(a, b))[1],
      )
      return fit(x, *args, **kwargs)

  monkeypatch.setattr(heads, "fit", counted_fit)
  return found


@pytest.mark.parametrize(
  "name,n",
  [
    ("crossfit_lite", 900),
    pytest.param("crossfit", 600, marks=pytest.mark.slow),
  ],
)
def test_heads_multiply_about_the_estimate(name, n, monkeypatch):
  pool = make_pools.make(2, n, width=32)
  rng = np.random.default_rng(0)
  pool = with_columns(
    pool,
    grams=rng.poisson(0.3, size=(n, 2, 1024)).astype(np.uint8),
    group=pool.ids,
  )
  fits, turned = newtons(monkeypatch), []
  principal = heads.principal
  monkeypatch.setattr(
    heads,
    "principal",
    lambda x, columns=heads.COLUMNS: (
      turned.append((*x.shape, columns)),
      principal(x, columns),
    )[1],
  )
  SAMPLERS[name](0, pool, 30)
  got = cost_of(name, costs.Sizes(n, 32, 30, 2, 32))
  # Where rows are as many as columns, the upper triangle in its panels: of
  # 512 columns two, 3/4 of the square; of 32 one.
  square = {512: 0.75 * 512, 32: 32}
  rotations = sum(
    2 * a * w * (a if a < w else square[w]) + 2 * a * w * c
    for a, w, c in turned
    if w > c
  )
  works = [heads.principal_work(*x) for x in turned if x[1] > x[2]]
  assert sum(work.host + work.devices for work in works) == rotations > 0
  assert got.flops - rotations == pytest.approx(sum(fits), rel=1.0)
  assert got.flops - rotations > sum(fits) / 2


def test_wide_features_are_turned_on_the_devices():
  lite = cost_of("crossfit_lite", costs.Sizes(10_000, 64, 100, 2, 64))
  # Both sides' counts, for `typical`; half their products, twice four bytes.
  assert lite.device == 4 * 20_000 * 512 + 8 * 512**2
  wide = cost_of("crossfit", costs.Sizes(10_000, 4096, 100, 2, 4096))
  assert wide.device == 4 * 20_000 * 4096 + 8 * 4096**2 < wide.held
  assert 0 < wide.on_host < wide.flops


@pytest.mark.parametrize(
  "name", ["ifd", "k_center", "crossfit", "isa", "selective_dpo", "bees"]
)
def test_bytes_read_are_those_of_the_columns(name):
  pool = make_pools.make(2, 64, width=8)
  grams = np.zeros((64, 2, 1024), np.uint8)
  pool = with_columns(pool, grams=grams)
  float64 = {"logp", "logp_alone", "logp_count", "log_likelihood", "reward"}
  float64 |= {"least", "proxy_logp", "proxy_ref_logp", "length"}
  wanted = sum(
    np.asarray(pool.columns[n], np.float64 if n in float64 else None).nbytes
    for n in SAMPLERS[name].needs
  )
  assert cost_of(name, costs.Sizes(64, 8, 9, 2, 8)).read == wanted


def test_a_chain_costs_the_sum_of_its_links():
  p = SIZES[0]
  one = lambda name: cost_of(name, p)
  got = one("dedup(threshold=0.9) | gate(column=reward, low=0.1) | k_center")
  scores = one("random").flops
  assert got.flops == (one("semdedup").flops + scores + one("k_center").flops)
  # Rows that are left are copied, with all columns.
  assert got.held == got.read + max(one("semdedup").held, one("k_center").held)
  assert got.read == one("k_center").read + 16 * p.n  # the gate's reward
  both = one("ask_llm * external_margin")
  assert both.flops == 2 * scores and both.read == 32 * p.n
