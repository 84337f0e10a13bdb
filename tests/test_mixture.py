"""The mixture against EM in NumPy and scikit-learn, and its bits on a mesh."""

import hashlib
import os
import pathlib
import socket
import subprocess
import sys
import types

import emitters
import jax
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest
import scipy.stats
from sklearn.mixture import GaussianMixture

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError, CorruptError, NumericError
from jaxalign.select import em, exact, fit_mixture, mixture, whiten
from jaxalign.select.mixture import MixtureOptions
from jaxalign.select.pool import make_pool
from jaxalign.select.samplers import SAMPLERS
from jaxalign.select.topk import id_hash

KINDS = em.COVARIANCES
GIVEN = ("seed", "labels", "space")  # of `fit`; the rest are options


def make_mesh(fsdp, tensor):
  devices = jax.devices()[: fsdp * tensor]
  return sharding.make_mesh(dict(fsdp=fsdp, tensor=tensor), devices)


@pytest.fixture(scope="module")
def wide():
  return make_mesh(4, 2)


def fit(mesh, x, **knobs):
  given = {k: knobs.pop(k) for k in GIVEN if k in knobs}
  return mixture.fit_mixture(mesh, x, MixtureOptions(**knobs), **given)


def clusters(n=3000, width=8, components=2, seed=0):
  """Overlapping Gaussians of different shapes, far from the origin."""
  rng = np.random.default_rng(seed)
  chance = np.arange(1, components + 1)
  label = rng.choice(components, n, p=chance / chance.sum())
  x = np.empty((n, width))
  for k in range(components):
    shape = rng.normal(size=(width, width)) * np.geomspace(3, 0.3, width)
    x[label == k] = (
      rng.normal(size=((label == k).sum(), width)) @ shape
      + rng.normal(size=width) * 2
    )
  return (x + 5).astype(np.float32), label


def numpy_em(x, labels, components, kind, ridge, iterations):
  """EM in float64, from the equations, in the coordinates of x itself.

  Returns the [n] log-likelihood and the bound of each iteration. The bound is
  that of rows blurred by N(0, ridge S), S pooled: tr(ridge S S_k^-1) / 2 less.
  """
  x = np.float64(x)
  n, width = x.shape
  pooled = np.cov(x.T, bias=True)
  added = ridge * (np.diag(np.diag(pooled)) if kind == "diag" else pooled)
  r = np.eye(components)[labels]
  bounds = []
  for _ in range(iterations):
    weight = r.sum(0) / n
    means, covs = [], []
    for k in range(components):
      mean = (r[:, k : k + 1] * x).sum(0) / r[:, k].sum()
      centred = x - mean
      cov = (r[:, k : k + 1] * centred).T @ centred / r[:, k].sum()
      means.append(mean)
      covs.append(cov)
    if kind == "tied":
      covs = [sum(w * c for w, c in zip(weight, covs))] * components
    if kind == "diag":
      covs = [np.diag(np.diag(c)) for c in covs]
    covs = [c + added for c in covs]
    plain = np.empty((n, components))
    blur = np.empty(components)
    for k in range(components):
      inverse = np.linalg.inv(covs[k])
      centred = x - means[k]
      plain[:, k] = np.log(weight[k]) - 0.5 * (
        width * np.log(2 * np.pi)
        + np.linalg.slogdet(covs[k])[1]
        + np.einsum("np,pq,nq->n", centred, inverse, centred)
      )
      blur[k] = np.trace(added @ inverse) / 2
    joint = plain - blur
    bound = np.logaddexp.reduce(joint, axis=1)
    bounds.append(bound.mean())
    r = np.exp(joint - bound[:, None])
  return np.logaddexp.reduce(plain, axis=1), np.array(bounds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("components", [2, 3])
def test_equals_em_in_numpy(mesh, kind, components):
  x, _ = clusters(components=components)
  labels = np.arange(len(x)) % components
  labels[x[:, 0] > np.median(x[:, 0])] = 0
  wanted, bounds = numpy_em(x, labels, components, kind, 1e-3, 25)
  knobs = dict(components=components, covariance=kind, pca=0, labels=labels)
  fitted = fit(mesh, x, ridge=1e-3, tol=-1.0, max_iterations=25, **knobs)
  assert_allclose(fitted.trace, bounds, rtol=0, atol=1e-5)
  got = mixture.log_likelihood(fitted, x)
  # Float32 sums, 25 iterations, values of about 30: 2e-6 of the value.
  assert_allclose(got, wanted, rtol=0, atol=6e-5)
  for sign in (1, -1):  # the same rows at either end
    few = lambda v: set(np.argsort(sign * v)[: len(x) // 10])
    assert few(got) == few(wanted)


def original(fitted):
  """Weights, means and covariances in the coordinates of x, float64."""
  back = np.linalg.inv(fitted.projection)
  covs = fitted.covariances
  if covs.ndim == 2:
    covs = np.stack([np.diag(c) for c in covs])
  means = fitted.mean + fitted.means @ back
  return np.exp(fitted.log_weights), means, back.T @ covs @ back


def scipy_joint(fitted, x):
  """[n, K] log(weight * density) by SciPy."""
  normal = scipy.stats.multivariate_normal
  joint = [
    np.log(w) + normal(m, c).logpdf(np.float64(x))
    for w, m, c in zip(*original(fitted))
  ]
  return np.stack(joint, axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("components", [1, 2, 3])
def test_densities_equal_scipy(wide, kind, components):
  x, _ = clusters(n=1500, components=components)
  knobs = dict(components=components, covariance=kind, pca=0)
  fitted = fit(wide, x, starts=1, max_iterations=4, tol=-1.0, **knobs)
  joint = scipy_joint(fitted, x)
  assert_allclose(mixture.log_joint(fitted, x), joint, atol=1e-8)
  value = np.logaddexp.reduce(joint, axis=1)
  got = mixture.log_likelihood(fitted, x)
  assert_allclose(got, value, atol=1e-8)
  assert_array_equal(mixture.assign(fitted, x), joint.argmax(1))
  # A row's bits depend on nothing but the row.
  assert_array_equal(mixture.log_likelihood(fitted, x[700:]), got[700:])
  with pytest.raises(ConfigError, match=r"\(3, 9\)"):
    mixture.log_joint(fitted, np.zeros((3, 9), np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_fits_as_well_as_scikit_learn(wide, kind):
  x, _ = clusters(seed=1)
  peer = GaussianMixture(
    2, covariance_type=kind, tol=1e-5, n_init=3, max_iter=500, random_state=0
  ).fit(x)
  knobs = dict(covariance=kind, pca=0, starts=5, ridge=1e-6, tol=1e-5)
  fitted = fit(wide, x, max_iterations=500, **knobs)
  ours = mixture.log_likelihood(fitted, x).mean()
  assert ours > peer.score(np.float64(x)) - 1e-3
  assert not fitted.warnings
  assert fitted.trace[-1] == np.nanmax(fitted.bounds)


@pytest.mark.parametrize(
  "seed", [0, 1, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 3))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_never_falls_over_draws(wide, kind, seed):
  rng = np.random.default_rng(seed)
  x = np.float32(
    rng.standard_t(6, size=(900, 7))
    * np.geomspace(1, 1e-2, 7)
    @ rng.normal(size=(7, 7))
    + 10 * rng.normal(size=7)
  )
  knobs = dict(covariance=kind, pca=[0, 5][seed % 2], starts=2, seed=seed)
  knobs |= dict(components=int(rng.integers(2, 4)), max_iterations=30)
  fitted = fit(wide, x, tol=-1.0, ridge=10.0 ** -rng.integers(1, 6), **knobs)
  assert len(fitted.trace) == 30
  assert (np.diff(fitted.trace) > -1e-6 * (np.abs(fitted.trace[1:]) + 7)).all()


def test_full_and_tied_do_not_depend_on_any_linear_map(wide):
  x, label = clusters(n=2000)
  rng = np.random.default_rng(0)
  by = 100 * (rng.normal(size=(8, 8)) + 3 * np.eye(8))
  moved = np.float32(np.float64(x) @ by)
  for kind in ("full", "tied"):  # the ridge is a fraction of the pooled shape
    knobs = dict(covariance=kind, pca=0, labels=label, ridge=0.3, tol=-1.0)
    a, b = (
      mixture.log_likelihood(fit(wide, rows, max_iterations=8, **knobs), rows)
      for rows in (x, moved)
    )
    assert_allclose(a - b, np.linalg.slogdet(by)[1], atol=2e-3)


def test_pca_equals_numpy(wide):
  rng = np.random.default_rng(0)
  turn = np.linalg.qr(rng.normal(size=(30, 30)))[0]
  x = rng.normal(size=(900, 30)) * np.geomspace(5, 0.1, 30) @ turn + 40
  x = x.astype(np.float32)
  space = whiten.whiten(wide, x, MixtureOptions())
  assert space.z.shape == (900, 900 // 40)
  values, vectors = np.linalg.eigh(np.cov(np.float64(x).T, bias=True))
  values, vectors = values[::-1][:22], vectors[:, ::-1][:, :22]
  assert_allclose(space.variances, values, rtol=1e-5)
  explained = values.sum() / np.float64(x).var(0).sum()
  assert_allclose(space.explained, explained, rtol=1e-5)
  directions = space.projection * np.sqrt(space.variances)
  assert_allclose(np.abs((directions * vectors).sum(0)), 1, atol=1e-5)
  largest = np.abs(directions).argmax(0)
  assert (directions[largest, np.arange(22)] > 0).all()
  assert_allclose(np.cov(space.z.T, bias=True), np.eye(22), atol=1e-4)
  assert whiten.whiten(wide, x, MixtureOptions(pca=3)).z.shape == (900, 3)


def test_directions_without_variance_are_dropped(wide):
  x, _ = clusters(n=1500)
  flat = np.concatenate([x, x[:, :3] - x[:, 3:6], np.ones_like(x)], axis=1)
  for kind in KINDS:
    fitted = fit(wide, flat, pca=0, covariance=kind, starts=2)
    wanted = 11 if kind == "diag" else 8
    assert fitted.projection.shape == (19, wanted)
    assert np.isfinite(mixture.log_likelihood(fitted, flat)).all()


def test_warnings(wide):
  x, _ = clusters(n=200)
  fitted = fit(wide, x, pca=8, starts=1, max_iterations=2, tol=-1.0)
  assert "below 40 per direction" in fitted.warnings[0]
  assert "max_iterations" in fitted.warnings[1]


def test_an_empty_component_is_reseeded_once(wide):
  x, _ = clusters(n=1200)
  labels = np.zeros(1200, int)
  labels[:4] = 1  # four rows cannot hold a covariance in 8 directions
  fitted = fit(wide, x, pca=0, labels=labels)
  assert np.exp(fitted.log_weights).min() > 0.05
  with pytest.raises(ConfigError, match="components"):
    fit(wide, x[:40], pca=0, components=9, starts=2)


def test_broken_rows_are_refused(wide):
  x, _ = clusters(n=300)
  for value in (np.nan, np.inf):
    broken = x.copy()
    broken[[7, 290], 2] = value
    with pytest.raises(NumericError, match=r"2 of 300 .* \(rows 7, 290\)"):
      fit(wide, broken)
  with pytest.raises(NumericError, match="the same vector"):
    fit(wide, np.full((300, 8), 0.1, np.float32))
  with pytest.raises(ConfigError, match="3 components need as many rows"):
    fit(wide, x[:2], components=3)
  for pca in (9, "most"):
    with pytest.raises(ConfigError, match="wanted 'auto' or 0 to 8"):
      fit(wide, x, pca=pca)


def test_one_component_is_the_sample_mean_and_covariance(wide):
  x, _ = clusters(n=500)
  fitted = fit(wide, x, components=1, pca=0, ridge=0.0, starts=1)
  _, means, covs = original(fitted)
  assert_allclose(means[0], np.float64(x).mean(0), atol=1e-6)
  assert_allclose(covs[0], np.cov(np.float64(x).T, bias=True), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_gaussian_per_label(mesh, kind):
  x, label = clusters(n=900, components=3)
  knobs = dict(covariance=kind, pca=0, labels=label, ridge=0.0)
  fitted = fit(mesh, x, components="labels", **knobs)
  weights, means, covs = original(fitted)
  x64 = np.float64(x)
  own = [np.cov(x64[label == k].T, bias=True) for k in range(3)]
  fraction = np.bincount(label) / 900
  if kind == "tied":
    own = [sum(s * c for s, c in zip(fraction, own))] * 3
  if kind == "diag":
    own = [np.diag(np.diag(c)) for c in own]
  assert_allclose(weights, fraction, rtol=1e-12)
  for k in range(3):
    assert_allclose(means[k], x64[label == k].mean(0), atol=1e-5)
    assert_allclose(covs[k], own[k], atol=1e-5 * own[k].max())
  assert len(fitted.trace) == 1 and not fitted.warnings


def test_labels_that_cannot_be_fitted(wide):
  x, _ = clusters(n=300)
  closed = lambda labels, **knobs: fit(
    wide, x, components="labels", labels=labels, **knobs
  )
  for labels, match in (
    (None, "needs the label of every row"),
    (np.zeros(300, int), "300 of label 0; one Gaussian"),
    (np.arange(300) == 5, "1 of label 1"),
  ):
    with pytest.raises(ConfigError, match=match):
      closed(labels)
  with pytest.raises(ConfigError, match="components=none"):
    mixture.components_of("none")
  few = np.arange(300) < 5
  assert "label has 5 rows" in closed(few, pca=8).warnings[1]
  with pytest.raises(NumericError, match="ridge"):
    closed(few, pca=8, ridge=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_copies_and_flat_directions(wide, kind):
  rng = np.random.default_rng(0)
  narrow = np.float32(rng.normal(size=(40, 100)))  # fewer rows than columns
  copies = np.repeat(np.float32(rng.normal(size=(5, 6))), 60, axis=0)
  for x in (narrow, copies):
    try:
      fitted = fit(wide, x, covariance=kind, pca=0, starts=2)
    except ConfigError as error:
      assert "rows" in str(error)
      continue
    assert np.isfinite(mixture.log_likelihood(fitted, x)).all()
    assert fitted.warnings if x is narrow else True


def test_saved_and_loaded(wide, tmp_path):
  x, _ = clusters(n=300)
  fitted, path = fit(wide, x, starts=2), tmp_path / "mixture.npz"
  mixture.save_mixture(fitted, path)
  mixture.save_mixture(fitted, path)
  again = mixture.load_mixture(path)
  assert again.warnings == fitted.warnings
  assert [p.name for p in tmp_path.iterdir()] == ["mixture.npz"]
  one, two = (mixture.log_likelihood(m, x) for m in (again, fitted))
  assert_array_equal(one, two)
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(CorruptError, match="mixture.npz"):
    mixture.load_mixture(path)


def test_a_large_pool_is_fitted_to_the_least_hashes_of_its_ids():
  ids = [f"é{i}" for i in range(500)]
  job = types.SimpleNamespace(column=lambda split, name: ids)
  hashes = id_hash(np.array(ids), "reservoir")
  wanted = np.sort(np.argsort(hashes, kind="stable")[:100])
  assert_array_equal(fit_mixture._records(job, 100), wanted)
  assert_array_equal(fit_mixture._records(job, 500), range(500))
  x = np.random.default_rng(0).normal(size=(500, 2, 3)).astype(np.float32)
  got = fit_mixture._rows(x, wanted)
  assert_array_equal(got, x[wanted].reshape(-1, 3))


def swept(mesh, z, labels, kind, share):
  """Six steps of EM from a partition -> bounds, and the last densities."""
  sweep = em.sweep_of(mesh, z, 1e-4, kind, share)
  g, bounds = em.partition(z, labels, labels.max() + 1, 1e-4, kind), []
  for _ in range(6):
    g = em.rounded(g)
    moments, bound = sweep(g)
    g = em.m_step(moments, g.means, 1e-4, kind)
    bounds.append(bound)
  return bounds, em.log_joint(em.factors_of(g), g.means, np.float64(z))


@pytest.mark.parametrize("joint", [True, False])  # False: as of wide rows
@pytest.mark.parametrize("kind, components", [("full", 2), ("tied", 3)])
@pytest.mark.parametrize("weight, narrow", [(0.5, 1.0), (0.1, 0.3)])
def test_shared_products_equal_separate_ones(
  mesh, monkeypatch, kind, components, weight, narrow, joint
):
  if not joint:
    monkeypatch.setattr(em, "JOINT_WIDTH", 0)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4000, 10))
  label = (rng.random(4000) < weight).astype(int)
  x[label == 1] = x[label == 1] * narrow + 1.0
  x = np.float32(x @ rng.normal(size=(10, 10)))
  if components == 3:
    label += (np.arange(4000) % 4 == 0) * (label == 0) * 2
  z = whiten.whiten(mesh, x, MixtureOptions(pca=0)).z
  bounds, densities = swept(mesh, z, label, kind, True)
  wanted, apart = swept(mesh, z, label, kind, False)
  assert_allclose(bounds, wanted, atol=5e-6)
  assert_allclose(densities, apart, atol=3e-4)


def test_a_component_too_narrow_to_share_is_summed_alone(wide, monkeypatch):
  x, label = clusters(n=1000, width=4)
  x[label == 0] = x[label == 0] * 1e-3 + 50.0
  seen, true = [], exact.exact_sums

  def sums(mesh, fn, *rest):
    seen.append(fn)
    return true(mesh, fn, *rest)

  monkeypatch.setattr(exact, "exact_sums", sums)
  knobs = dict(labels=label, pca=0, max_iterations=3, tol=-1.0, ridge=1e-9)
  fitted = fit(wide, x, **knobs)
  assert em._own_moments in seen and em._pair_moments not in seen
  wanted = np.logaddexp.reduce(scipy_joint(fitted, x), axis=1)
  assert_allclose(mixture.log_likelihood(fitted, x), wanted, atol=1e-5)


@pytest.mark.parametrize("components, products", [(2, 1), (3, 3)])
def test_two_full_components_cost_one_product_and_one_gram(
  components, products
):
  n, width = 640, 96
  for kind, wanted in (
    ("full", 2 * products * n * 2 * width**2),
    ("tied", 2 * n * width**2),
    ("diag", 8 * components * n * width),
  ):
    assert em.em_flops(n, width, components, kind) == wanted


def test_sums_are_exact_and_in_any_order():
  rng = np.random.default_rng(0)
  chunks = np.float32(
    rng.normal(size=(64, 50)) * 10.0 ** rng.integers(-3, 3, size=(64, 50))
  )
  scale = exact.scale_of(np.abs(chunks).max())
  cut = jax.vmap(lambda p: exact._cut(p, scale))(chunks)
  total = exact._joined(tuple(a.sum(0) for a in cut), scale)
  wanted = np.float64(chunks).sum(0)
  assert_allclose(total, wanted, rtol=0, atol=64 * 2.0**-40 / scale)
  order = rng.permutation(64)
  again = exact._joined(tuple(a[order].sum(0) for a in cut), scale)
  assert_array_equal(total, again)


@pytest.mark.parametrize("width", [5, 64, 200, 384, 500])
def test_a_gram_is_the_same_on_any_mesh_and_equals_numpy(width, monkeypatch):
  monkeypatch.setattr(exact, "WAVE", 1900)
  rng = np.random.default_rng(0)
  z = np.float32(rng.normal(size=(3000, width)))
  got = [exact.gram_of(m, z) for m in map(make_mesh, (1, 3, 4), (1, 1, 2))]
  for one in got:
    assert_array_equal(one, got[0])
  wanted = np.float64(z).T @ z
  assert_allclose(got[0], wanted, atol=3e-7 * 3000)
  assert_array_equal(got[0], got[0].T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  "n, width, components",
  [
    (5000, 40, 2),
    pytest.param(5000, 40, 3, marks=pytest.mark.slow),
    pytest.param(20000, 384, 2, marks=pytest.mark.slow),
  ],
)
def test_same_bits_of_every_structure(kind, n, width, components):
  x, label = clusters(n=n, width=width, components=components)
  knobs = dict(covariance=kind, components=components, pca=0, labels=label)
  got = []
  for sizes in ((1, 1), (8, 1), (4, 2)):
    mesh = make_mesh(*sizes)
    fitted = fit(mesh, x, starts=1, max_iterations=3, tol=-1.0, **knobs)
    got.append([np.asarray(a).tobytes() for a in fitted[:8]])
  assert got[1] == got[0] and got[2] == got[0]


def near_ties():
  """20,000 pairs, E=64, with copies and copies that differ in one last bit."""
  rng = np.random.default_rng(0)
  n = 20_000
  centre = rng.normal(size=(40, 64))
  x = (
    rng.standard_t(5, size=(n, 2, 64)) * np.geomspace(2, 0.2, 64)
    + 0.7 * centre[rng.integers(0, 40, n)][:, None]
  ).astype(np.float32)
  x[10_000:13_000] = x[2_000:5_000]
  x[13_000:16_000] = x[5_000:8_000]
  x[13_000:16_000, :, 0] = np.nextafter(x[13_000:16_000, :, 0], np.inf)
  digests = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(n)]
  return np.array([digest[:12] for digest in digests]), x


def choose(mesh, ids, x):
  """A digest of the tenth's ids by each order, and the likelihood."""
  pool = make_pool(ids, {"embedding": x})
  rows = pool.embedding.reshape(-1, 64)
  fitted = fit(mesh, rows, starts=2, max_iterations=40)
  value = mixture.log_likelihood(fitted, rows)
  pool = pool._replace(columns={"log_likelihood": value.reshape(-1, 2)})
  chosen = [
    ",".join(pool.ids[SAMPLERS["isa"](0, pool, 2000, order=order).rows])
    for order in ("literal", "magnitude", "renormalised")
  ]
  return hashlib.sha256(";".join(chosen).encode()).hexdigest(), value


@pytest.fixture(scope="module")
def alone():
  ids, x = near_ties()
  return ids, x, choose(make_mesh(1, 1), ids, x)


@pytest.mark.parametrize(
  "sizes", [(8, 1), (4, 2), (3, 1)], ids=["8x1", "4x2", "3x1"]
)
def test_same_ids_on_any_mesh_in_any_input_order(alone, sizes):
  ids, x, (wanted, likelihood) = alone
  if sizes == (4, 2):
    order = np.random.default_rng(1).permutation(len(ids))
    ids, x = ids[order], x[order]
  digest, value = choose(make_mesh(*sizes), ids, x)
  assert_array_equal(value, likelihood)
  assert digest == wanted


def test_copies_tie_and_near_copies_do_not_swap(alone):
  ids, _, (_, likelihood) = alone
  rank = np.argsort(np.argsort(ids))  # where input row i stands in the pool
  value = likelihood.reshape(-1, 2)[rank]
  assert_array_equal(value[10_000:13_000], value[2_000:5_000])
  near = np.abs(value[13_000:16_000] - value[5_000:8_000])
  assert near.max() < 1e-4 and (near > 0).mean() > 0.9


PROCESS = """
import os, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.path[:0] = sys.argv[3:5]
import test_mixture
from jaxalign.core import sharding
mesh = sharding.make_mesh(dict(fsdp=4, tensor=2))
assert jax.device_count() == 8 and jax.local_device_count() == 4
print("digest", test_mixture.choose(mesh, *test_mixture.near_ties())[0])
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_same_ids_on_two_processes(alone):
  _, _, (wanted, _) = alone
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  here = pathlib.Path(__file__).resolve().parent
  env = os.environ | {"XLA_FLAGS": emitters.flags(4), "JAX_PLATFORMS": "cpu"}
  command = lambda i: [
    sys.executable, "-c", PROCESS, address, str(i), str(here), str(here.parent)
  ]  # fmt: skip
  knobs = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  both = [subprocess.Popen(command(i), env=env, **knobs) for i in range(2)]
  try:
    outputs = [p.communicate(timeout=240)[0] for p in both]
  finally:
    for p in both:
      p.kill()
  for p, output in zip(both, outputs):
    assert p.returncode == 0, output[-2000:]
    assert f"digest {wanted}" in output, output[-2000:]
