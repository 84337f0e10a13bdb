"""The mixture against EM in NumPy and scikit-learn, and its bits on a mesh."""

import hashlib
import os
import pathlib
import socket
import subprocess
import sys

import emitters
import jax
import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from jaxalign import sharding
from jaxalign.errors import ConfigError, CorruptError, NumericError
from jaxalign.select import mixture
from jaxalign.select.pool import make_pool
from jaxalign.select.samplers import SAMPLERS
from jaxalign.select.topk import top

KINDS = ("full", "tied", "diag")


def make_mesh(fsdp, tensor):
  return sharding.make_mesh(
    dict(fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor]
  )


@pytest.fixture(scope="module")
def wide():
  return make_mesh(4, 2)


def clusters(n=3000, width=8, components=2, seed=0):
  """Overlapping Gaussians of different shapes, far from the origin."""
  rng = np.random.default_rng(seed)
  part = rng.choice(
    components,
    n,
    p=np.arange(1, components + 1) / np.arange(1, components + 1).sum(),
  )
  x = np.empty((n, width))
  for k in range(components):
    shape = rng.normal(size=(width, width)) * np.geomspace(3, 0.3, width)
    x[part == k] = (
      rng.normal(size=((part == k).sum(), width)) @ shape
      + rng.normal(size=width) * 2
    )
  return (x + 5).astype(np.float32), part


def numpy_em(x, labels, components, kind, ridge, iterations):
  """EM in float64, from the equations, in the coordinates of x itself.

  Returns the [n] log-likelihood and the bound of each iteration. The bound is
  that of rows blurred by N(0, ridge S), S pooled: tr(ridge S S_k^-1) / 2 less.
  """
  x = x.astype(np.float64)
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
  got = mixture.fit(
    mesh,
    x,
    components=components,
    covariance=kind,
    pca=0,
    ridge=1e-3,
    labels=labels,
    tol=-1.0,
    max_iterations=25,
  )
  np.testing.assert_allclose(got.trace, bounds, rtol=0, atol=1e-5)
  found = mixture.log_likelihood(got, x)
  # Float32 sums, 25 iterations, values of about 30: 2e-6 of the value.
  np.testing.assert_allclose(found, wanted, rtol=0, atol=6e-5)
  tenth = len(x) // 10
  assert set(np.argsort(found)[:tenth]) == set(np.argsort(wanted)[:tenth])
  assert set(np.argsort(found)[-tenth:]) == set(np.argsort(wanted)[-tenth:])


def original(fitted):
  """Means and covariances [K, ...] in the coordinates of x."""
  back = np.linalg.inv(fitted.projection)
  covs = fitted.covariances
  if covs.ndim == 2:
    covs = np.stack([np.diag(c) for c in covs])
  return (fitted.mean + fitted.means @ back, back.T @ covs @ back)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_equals_scikit_learn(wide, kind):
  x, _ = clusters()
  fitted = mixture.fit(wide, x, covariance=kind, pca=0, starts=2)
  means, covs = original(fitted)
  peer = GaussianMixture(2, covariance_type="full")
  peer.weights_, peer.means_ = np.exp(fitted.log_weights), means
  peer.covariances_ = covs
  peer.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(covs))
  np.testing.assert_allclose(
    mixture.log_likelihood(fitted, x),
    peer.score_samples(x.astype(np.float64)),
    rtol=0,
    atol=1e-8,
  )


@pytest.mark.parametrize("kind", KINDS)
def test_fits_as_well_as_scikit_learn(wide, kind):
  x, _ = clusters(seed=1)
  peer = GaussianMixture(
    2, covariance_type=kind, tol=1e-5, n_init=3, max_iter=500, random_state=0
  ).fit(x)
  fitted = mixture.fit(
    wide,
    x,
    covariance=kind,
    pca=0,
    starts=5,
    ridge=1e-6,
    tol=1e-5,
    max_iterations=500,
  )
  ours = mixture.log_likelihood(fitted, x).mean()
  assert ours > peer.score(x.astype(np.float64)) - 1e-3
  assert not fitted.warnings


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_never_falls(wide, kind):
  x, _ = clusters(components=4, seed=2)
  fitted = mixture.fit(
    wide, x, components=4, covariance=kind, starts=3, ridge=1e-2, pca=0
  )
  assert len(fitted.trace) > 3
  assert (np.diff(fitted.trace) > -1e-6 * np.abs(fitted.trace[1:])).all()
  assert fitted.trace[-1] == np.nanmax(fitted.bounds)


def test_full_and_tied_do_not_depend_on_scale_or_rotation(wide):
  x, _ = clusters(n=2000)
  turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
  moved = (x @ turn * 100.0).astype(np.float32)
  for kind in ("full", "tied"):
    a, b = (
      mixture.log_likelihood(
        mixture.fit(wide, rows, covariance=kind, pca=0, starts=4, tol=1e-6),
        rows,
      )
      for rows in (x, moved)
    )
    np.testing.assert_allclose(a - a.mean(), b - b.mean(), atol=2e-3)
    np.testing.assert_allclose(a.mean() - b.mean(), 8 * np.log(100), rtol=1e-4)


def test_pca_equals_numpy(wide):
  rng = np.random.default_rng(0)
  x = (
    rng.normal(size=(900, 30))
    * np.geomspace(5, 0.1, 30)
    @ np.linalg.qr(rng.normal(size=(30, 30)))[0]
    + 40
  ).astype(np.float32)
  space = mixture.prepare(wide, x)
  assert space.z.shape == (900, 900 // 40)
  values, vectors = np.linalg.eigh(np.cov(x.T.astype(np.float64), bias=True))
  values, vectors = values[::-1][:22], vectors[:, ::-1][:, :22]
  np.testing.assert_allclose(space.variances, values, rtol=1e-5)
  np.testing.assert_allclose(
    space.explained, values.sum() / x.astype(np.float64).var(0).sum(), rtol=1e-5
  )
  directions = space.projection * np.sqrt(space.variances)
  np.testing.assert_allclose(
    np.abs((directions * vectors).sum(0)), 1, atol=1e-5
  )
  largest = np.abs(directions).argmax(0)
  assert (directions[largest, np.arange(22)] > 0).all()
  np.testing.assert_allclose(
    np.cov(space.z.T, bias=True), np.eye(22), atol=1e-4
  )
  assert mixture.prepare(wide, x, pca=3).z.shape == (900, 3)


def test_directions_without_variance_are_dropped(wide):
  x, _ = clusters(n=1500)
  flat = np.concatenate([x, x[:, :3] - x[:, 3:6], np.ones_like(x)], axis=1)
  for kind in KINDS:
    fitted = mixture.fit(wide, flat, pca=0, covariance=kind, starts=2)
    wanted = 11 if kind == "diag" else 8
    assert fitted.projection.shape == (19, wanted)
    assert np.isfinite(mixture.log_likelihood(fitted, flat)).all()


def test_warnings_say_what_a_person_should_know(wide):
  x, _ = clusters(n=200)
  fitted = mixture.fit(wide, x, pca=8, starts=1, max_iterations=2, tol=-1.0)
  assert "below 40 per direction" in fitted.warnings[0]
  assert "max_iterations" in fitted.warnings[1]


def test_an_empty_component_is_reseeded_once(wide):
  x, _ = clusters(n=1200)
  labels = np.zeros(1200, int)
  labels[:4] = 1  # four rows cannot hold a covariance in 8 directions
  fitted = mixture.fit(wide, x, pca=0, labels=labels)
  assert np.exp(fitted.log_weights).min() > 0.05
  with pytest.raises(ConfigError, match="components"):
    mixture.fit(wide, x[:40], pca=0, components=9, starts=2)


def test_broken_rows_are_refused(wide):
  x, _ = clusters(n=300)
  for value in (np.nan, np.inf):
    broken = x.copy()
    broken[[7, 290], 2] = value
    with pytest.raises(NumericError, match=r"2 of 300 .* \(rows 7, 290\)"):
      mixture.fit(wide, broken)
  with pytest.raises(NumericError, match="the same vector"):
    mixture.fit(wide, np.full((300, 8), 0.1, np.float32))
  with pytest.raises(ConfigError, match="3 components need as many rows"):
    mixture.fit(wide, x[:2], components=3)
  for knobs in (
    dict(covariance="round"),
    dict(pca=9),
    dict(pca="most"),
    dict(starts=0),
    dict(ridge=-1.0),
    dict(labels=np.zeros(3)),
  ):
    with pytest.raises(ConfigError, match="config.select.mixture|labels"):
      mixture.fit(wide, x, **knobs)


def test_one_component_is_the_sample_mean_and_covariance(wide):
  x, _ = clusters(n=500)
  fitted = mixture.fit(wide, x, components=1, pca=0, ridge=0.0, starts=1)
  means, covs = original(fitted)
  np.testing.assert_allclose(means[0], x.astype(np.float64).mean(0), atol=1e-6)
  np.testing.assert_allclose(
    covs[0], np.cov(x.T.astype(np.float64), bias=True), atol=2e-5
  )


def test_one_gaussian_per_label_in_closed_form(wide):
  x, part = clusters(n=900)
  fitted = mixture.fit(wide, x, pca=0, labels=part, max_iterations=1)
  means, _ = original(fitted)
  assert len(fitted.trace) == 1 and not fitted.warnings
  for k in range(2):
    np.testing.assert_allclose(means[k], x[part == k].mean(0), atol=1e-5)
  np.testing.assert_allclose(
    np.exp(fitted.log_weights), np.bincount(part) / 900, rtol=1e-12
  )


def test_saved_and_loaded(wide, tmp_path):
  x, _ = clusters(n=300)
  fitted = mixture.fit(wide, x, starts=2)
  assert fitted.warnings == [] or isinstance(fitted.warnings[0], str)
  path = tmp_path / "mixture.npz"
  mixture.save(fitted, path)
  mixture.save(fitted, path)
  again = mixture.load(path)
  assert again.warnings == fitted.warnings
  assert [p.name for p in tmp_path.iterdir()] == ["mixture.npz"]
  np.testing.assert_array_equal(
    mixture.log_likelihood(again, x), mixture.log_likelihood(fitted, x)
  )
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(CorruptError, match="mixture.npz"):
    mixture.load(path)


# The same bits everywhere.


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
  ids = np.array(
    [hashlib.sha256(str(i).encode()).hexdigest()[:12] for i in range(n)]
  )
  return ids, x


def choose(mesh, ids, x):
  """Ids of a tenth by each order, and the likelihood they came from."""
  pool = make_pool(ids, {"embedding": x})
  rows = pool.embedding.reshape(-1, 64)
  fitted = mixture.fit(mesh, rows, starts=2, max_iterations=40)
  value = mixture.log_likelihood(fitted, rows)
  pool = pool._replace(columns={"log_likelihood": value.reshape(-1, 2)})
  chosen = {}
  for order in ("literal", "magnitude", "renormalised"):
    got = SAMPLERS["isa"](0, pool, 2000, order=order)
    chosen[order] = pool.ids[got.rows]
  return chosen, value


def digest(chosen):
  text = ";".join(",".join(chosen[order]) for order in sorted(chosen))
  return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def alone():
  ids, x = near_ties()
  return ids, x, choose(make_mesh(1, 1), ids, x)


@pytest.mark.parametrize(
  "sizes", [(8, 1), (4, 2), (3, 1)], ids=["8x1", "4x2", "3x1"]
)
def test_same_bits_on_any_mesh(alone, sizes):
  ids, x, (wanted, likelihood) = alone
  chosen, value = choose(make_mesh(*sizes), ids, x)
  np.testing.assert_array_equal(value, likelihood)
  assert digest(chosen) == digest(wanted)


def test_same_ids_in_any_input_order(alone):
  ids, x, (wanted, likelihood) = alone
  order = np.random.default_rng(1).permutation(len(ids))
  chosen, value = choose(make_mesh(4, 2), ids[order], x[order])
  np.testing.assert_array_equal(value, likelihood)
  assert digest(chosen) == digest(wanted)


def test_copies_tie_and_near_copies_do_not_swap(alone):
  ids, _, (_, likelihood) = alone
  rank = np.argsort(np.argsort(ids))  # where input row i stands in the pool
  value = likelihood.reshape(-1, 2)[rank]
  np.testing.assert_array_equal(value[10_000:13_000], value[2_000:5_000])
  near = np.abs(value[13_000:16_000] - value[5_000:8_000])
  assert near.max() < 1e-4 and (near > 0).mean() > 0.9
  # The tie decides who is chosen, and it goes by the id alone.
  score = value.sum(1)[np.argsort(ids)]
  first = top(score, np.sort(ids), 2000)
  assert list(first) == list(top(score.copy(), np.sort(ids), 4000)[:2000])


PROCESS = """
import os, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.path[:0] = sys.argv[3:5]
import test_mixture
from jaxalign import sharding
mesh = sharding.make_mesh(dict(fsdp=4, tensor=2))
assert jax.device_count() == 8 and jax.local_device_count() == 4
chosen, _ = test_mixture.choose(mesh, *test_mixture.near_ties())
print("digest", test_mixture.digest(chosen), flush=True)
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
  processes = [
    subprocess.Popen(
      [
        sys.executable,
        "-c",
        PROCESS,
        address,
        str(i),
        str(here),
        str(here.parent),
      ],
      env=env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    for i in range(2)
  ]
  try:
    outputs = [p.communicate(timeout=240)[0] for p in processes]
  finally:
    for p in processes:
      p.kill()
  for p, output in zip(processes, outputs):
    assert p.returncode == 0, output[-2000:]
    assert f"digest {digest(wanted)}" in output, output[-2000:]
