"""Low rank, one Gaussian per label, shared products and the tile scorer."""

import jax
import numpy as np
import pytest
import scipy.stats
from sklearn.mixture import GaussianMixture
from test_mixture import clusters, make_mesh, original

from jaxalign import sharding
from jaxalign.errors import ConfigError, NumericError
from jaxalign.select import exact, mixture

KINDS = mixture.COVARIANCES


@pytest.fixture(scope="module")
def wide():
  return make_mesh(4, 2)


def moments(fitted):
  """Weights, means and covariances in the coordinates of x, float64."""
  covs = fitted.covariances
  if covs.ndim == 2:
    covs = np.stack([np.diag(d) for d in covs])
  covs = covs + fitted.loadings @ fitted.loadings.swapaxes(1, 2)
  means, covs = original(fitted._replace(covariances=covs))
  return np.exp(fitted.log_weights), means, covs


def scipy_joint(fitted, x):
  """[n, K] log(weight * density) by SciPy."""
  return np.stack(
    [
      np.log(w)
      + scipy.stats.multivariate_normal(m, c).logpdf(x.astype(np.float64))
      for w, m, c in zip(*moments(fitted))
    ],
    axis=1,
  )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("components", [2, 3])
def test_densities_and_responsibilities_equal_scipy(wide, kind, components):
  x, _ = clusters(n=1500, components=components)
  fitted = mixture.fit(
    wide,
    x,
    components=components,
    covariance=kind,
    pca=0,
    rank=2,
    starts=1,
    max_iterations=4,
    tol=-1.0,
  )
  joint = scipy_joint(fitted, x)
  np.testing.assert_allclose(mixture.log_joint(fitted, x), joint, atol=1e-8)
  value = np.logaddexp.reduce(joint, axis=1)
  np.testing.assert_allclose(
    mixture.log_likelihood(fitted, x), value, atol=1e-8
  )
  np.testing.assert_array_equal(mixture.assign(fitted, x), joint.argmax(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  "components", [2, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 3))]
)
def test_the_tile_scorer_equals_scipy_on_any_mesh(kind, components):
  x, _ = clusters(n=1504, components=components)
  found = []
  for sizes in ((1, 1), (8, 1), (4, 2)):
    mesh = make_mesh(*sizes)
    if not found:
      fitted = mixture.fit(
        mesh,
        x,
        components=components,
        covariance=kind,
        pca=0,
        rank=2,
        starts=1,
        max_iterations=4,
      )
    tile = sharding.put(mesh, x, "pool", None)
    found.append(np.asarray(mixture.make_scorer(mesh, fitted)(tile)))
    np.testing.assert_array_equal(found[0], found[-1])
  wanted = np.logaddexp.reduce(scipy_joint(fitted, x), axis=1)
  np.testing.assert_allclose(found[0], wanted, atol=2e-4)
  tenth = 150
  assert set(np.argsort(found[0])[:tenth]) == set(np.argsort(wanted)[:tenth])
  score = mixture.make_scorer(mesh, fitted)
  half = score(tile.astype("bfloat16"))
  rounded = np.asarray(tile.astype("bfloat16").astype("float32"))
  np.testing.assert_allclose(
    half, np.logaddexp.reduce(scipy_joint(fitted, rounded), axis=1), atol=2e-4
  )
  with pytest.raises(ConfigError, match=r"\(3, 8\)"):
    score(np.zeros((3, 8), np.float32))


def analysers_step(x, weights, means, noise, loadings, ridge):
  """One EM iteration of a mixture of factor analysers, float64, from the
  expectations of [f; 1] given a row blurred by N(0, ridge * diag var(x))."""
  n, width = x.shape
  blur = ridge * np.diag(x.var(0))
  joint = np.empty((n, len(weights)))
  for k, w in enumerate(loadings):
    cov = w @ w.T + np.diag(noise[k])
    joint[:, k] = (
      np.log(weights[k])
      + scipy.stats.multivariate_normal(means[k], cov).logpdf(x)
      - np.trace(blur @ np.linalg.inv(cov)) / 2
    )
  bound = np.logaddexp.reduce(joint, axis=1)
  r = np.exp(joint - bound[:, None])
  out = [], [], [], []
  for k, w in enumerate(loadings):
    q, total = w.shape[1], r[:, k].sum()
    b = w.T @ np.linalg.inv(w @ w.T + np.diag(noise[k]))
    left, right = np.zeros((width, q + 1)), np.zeros((q + 1, q + 1))
    second = np.zeros((width, width))
    for i in range(n):  # the slow, plain way
      f = np.append(b @ (x[i] - means[k]), 1.0)
      left += r[i, k] * np.outer(x[i], f)
      right += r[i, k] * np.outer(f, f)
      second += r[i, k] * (np.outer(x[i], x[i]) + blur)
    left[:, :q] += total * blur @ b.T
    right[:q, :q] += total * (np.eye(q) - b @ w + b @ blur @ b.T)
    both = left @ np.linalg.inv(right)
    out[0].append(total / n)
    out[1].append(both[:, q])
    out[2].append(np.diag(second - both @ left.T) / total)
    out[3].append(both[:, :q])
  return bound.mean(), out


def test_low_rank_equals_factor_analysis_in_numpy(mesh):
  x, part = clusters(n=600, width=6)
  x64 = x.astype(np.float64)
  knobs = dict(
    covariance="low_rank", rank=2, pca=0, labels=part, ridge=1e-2, tol=-1.0
  )
  start = mixture.fit(mesh, x, max_iterations=1, **knobs)
  after = mixture.fit(mesh, x, max_iterations=2, **knobs)
  scale = np.diag(np.linalg.inv(start.projection))  # axes of x
  weights, means, _ = moments(start)
  bound, (weights, means, noise, loadings) = analysers_step(
    x64,
    weights,
    means,
    start.covariances * scale**2,
    start.loadings * scale[:, None],
    1e-2,
  )
  np.testing.assert_allclose(start.trace[0], bound, atol=2e-6)
  got = moments(after)
  np.testing.assert_allclose(got[0], weights, atol=1e-6)
  np.testing.assert_allclose(got[1], means, atol=2e-5)
  np.testing.assert_allclose(after.covariances * scale**2, noise, rtol=1e-4)
  np.testing.assert_allclose(
    after.loadings * scale[:, None], loadings, atol=1e-4
  )


def test_low_rank_finds_factors_that_diagonals_miss(wide):
  rng = np.random.default_rng(0)
  w = rng.normal(size=(2, 12, 2)) * 2
  part = np.arange(4000) % 2
  f = rng.normal(size=(4000, 2))
  x = np.float32(
    np.einsum("npq,nq->np", w[part], f)
    + rng.normal(size=(4000, 12))
    + 3.0 * part[:, None]
  )
  fits = {
    rank: mixture.fit(
      wide,
      x,
      covariance="low_rank",
      rank=rank,
      pca=0,
      labels=part,
      max_iterations=300,
      tol=1e-6,
    )
    for rank in (1, 2)
  }
  truth = sum(
    np.where(
      part == k,
      scipy.stats.multivariate_normal(
        np.full(12, 3.0 * k), w[k] @ w[k].T + np.eye(12)
      ).logpdf(x),
      0,
    ).mean()
    for k in range(2)
  ) - np.log(2)
  value = {k: mixture.log_likelihood(v, x).mean() for k, v in fits.items()}
  assert value[2] > truth - 0.02 and value[2] > value[1] + 0.5


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
  fitted = mixture.fit(
    wide,
    x,
    components=int(rng.integers(2, 4)),
    covariance=kind,
    rank=3,
    pca=[0, 5][seed % 2],
    starts=2,
    tol=-1.0,
    max_iterations=30,
    ridge=10.0 ** -rng.integers(1, 6),
    seed=seed,
  )
  assert len(fitted.trace) == 30
  assert (np.diff(fitted.trace) > -1e-6 * (np.abs(fitted.trace[1:]) + 7)).all()


def test_full_and_tied_do_not_depend_on_any_linear_map(wide):
  x, part = clusters(n=2000)
  rng = np.random.default_rng(0)
  by = rng.normal(size=(8, 8)) + 3 * np.eye(8)
  moved = np.float32(x.astype(np.float64) @ by)
  for kind in ("full", "tied"):  # the ridge is a share of the pooled shape
    a, b = (
      mixture.log_likelihood(
        mixture.fit(
          wide,
          rows,
          covariance=kind,
          pca=0,
          labels=part,
          ridge=0.3,
          max_iterations=8,
          tol=-1.0,
        ),
        rows,
      )
      for rows in (x, moved)
    )
    np.testing.assert_allclose(a - b, np.linalg.slogdet(by)[1], atol=2e-3)


@pytest.mark.parametrize("kind", ["full", "tied", "diag"])
def test_one_gaussian_per_label(mesh, kind):
  x, part = clusters(n=900, components=3)
  fitted = mixture.fit(
    mesh, x, components="labels", covariance=kind, pca=0, labels=part, ridge=0.0
  )
  weights, means, covs = moments(fitted)
  x64 = x.astype(np.float64)
  own = [np.cov(x64[part == k].T, bias=True) for k in range(3)]
  share = np.bincount(part) / 900
  if kind == "tied":
    own = [sum(s * c for s, c in zip(share, own))] * 3
  if kind == "diag":
    own = [np.diag(np.diag(c)) for c in own]
  np.testing.assert_allclose(weights, share, rtol=1e-12)
  for k in range(3):
    np.testing.assert_allclose(means[k], x64[part == k].mean(0), atol=1e-5)
    np.testing.assert_allclose(covs[k], own[k], atol=1e-5 * own[k].max())
  assert len(fitted.trace) == 1 and not fitted.warnings


def test_labels_that_cannot_be_fitted(wide):
  x, part = clusters(n=300)
  fit = lambda labels, **knobs: mixture.fit(
    wide, x, components="labels", labels=labels, **knobs
  )
  with pytest.raises(ConfigError, match="needs the label of every row"):
    fit(None)
  with pytest.raises(ConfigError, match="300 of label 0; one Gaussian"):
    fit(np.zeros(300, int))
  with pytest.raises(ConfigError, match="1 of label 1"):
    fit(np.arange(300) == 5)
  with pytest.raises(ConfigError, match="closed form"):
    fit(part, covariance="low_rank")
  with pytest.raises(ConfigError, match="components=none"):
    mixture.components_of("none")
  few = np.arange(300) < 5
  assert "label has 5 rows" in fit(few, pca=8).warnings[1]
  with pytest.raises(NumericError, match="ridge"):
    fit(few, pca=8, ridge=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_copies_and_flat_directions(wide, kind):
  rng = np.random.default_rng(0)
  narrow = np.float32(rng.normal(size=(40, 100)))  # fewer rows than columns
  copies = np.repeat(np.float32(rng.normal(size=(5, 6))), 60, axis=0)
  for x in (narrow, copies):
    try:
      fitted = mixture.fit(wide, x, covariance=kind, pca=0, starts=2, rank=2)
    except ConfigError as error:
      assert "rows" in str(error)
      continue
    assert np.isfinite(mixture.log_likelihood(fitted, x)).all()
    assert fitted.warnings if x is narrow else True


@pytest.mark.parametrize("kind,components", [("full", 2), ("tied", 3)])
@pytest.mark.parametrize("weight,narrow", [(0.5, 1.0), (0.1, 0.3)])
def test_shared_products_equal_separate_ones(
  mesh, kind, components, weight, narrow
):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4000, 10))
  part = (rng.random(4000) < weight).astype(int)
  x[part == 1] = x[part == 1] * narrow + 1.0
  x = np.float32(x @ rng.normal(size=(10, 10)))
  knobs = dict(
    covariance=kind,
    components=components,
    labels=part,
    pca=0,
    tol=-1.0,
    max_iterations=6,
  )
  if components == 3:
    knobs["labels"] = part + (np.arange(4000) % 4 == 0) * (part == 0) * 2
  a, b = (mixture.fit(mesh, x, share=share, **knobs) for share in (True, False))
  np.testing.assert_allclose(a.trace, b.trace, atol=5e-6)
  np.testing.assert_allclose(
    mixture.log_likelihood(a, x), mixture.log_likelihood(b, x), atol=3e-4
  )


def test_a_component_too_narrow_to_share_is_summed_alone(wide, monkeypatch):
  from jaxalign.select import em

  x, part = clusters(n=1000, width=4)
  x[part == 0] = x[part == 0] * 1e-3 + 50.0
  seen = []
  true = em._summed
  monkeypatch.setattr(
    em,
    "_summed",
    lambda mesh, kind, *rest: (seen.append(kind), true(mesh, kind, *rest))[1],
  )
  fitted = mixture.fit(
    wide, x, labels=part, pca=0, max_iterations=3, tol=-1.0, ridge=1e-9
  )
  assert "full" in seen and "pair" not in seen
  peer = GaussianMixture(
    2, covariance_type="full", reg_covar=0, tol=0, max_iter=1
  )
  peer.weights_, peer.means_, peer.covariances_ = moments(fitted)
  peer.precisions_cholesky_ = np.linalg.cholesky(
    np.linalg.inv(peer.covariances_)
  )
  np.testing.assert_allclose(
    mixture.log_likelihood(fitted, x),
    peer.score_samples(x.astype(np.float64)),
    atol=1e-5,
  )


# The sums.


def test_sums_are_exact_and_in_any_order():
  rng = np.random.default_rng(0)
  parts = np.float32(
    rng.normal(size=(64, 50)) * 10.0 ** rng.integers(-3, 3, size=(64, 50))
  )
  scale = exact.scale_of(np.abs(parts).max())
  cut = jax.vmap(lambda p: exact._cut(p, scale))(parts)
  total = exact.joined(tuple(a.sum(0) for a in cut), scale)
  wanted = parts.astype(np.float64).sum(0)
  np.testing.assert_allclose(total, wanted, rtol=0, atol=64 * 2.0**-40 / scale)
  order = rng.permutation(64)
  np.testing.assert_array_equal(
    total, exact.joined(tuple(a[order].sum(0) for a in cut), scale)
  )


@pytest.mark.parametrize("width", [5, 64, 200, 384, 500])
def test_a_gram_is_the_same_on_any_mesh_and_equals_numpy(width):
  from jaxalign.select import em

  rng = np.random.default_rng(0)
  z = np.float32(rng.normal(size=(3000, width)))
  found = [
    em.total_of(m, exact.place(m, z))
    for m in (make_mesh(1, 1), make_mesh(3, 1), make_mesh(4, 2))
  ]
  for one in found:
    np.testing.assert_array_equal(one, found[0])
  wanted = z.astype(np.float64).T @ z
  np.testing.assert_allclose(found[0], wanted, atol=3e-7 * 3000)
  np.testing.assert_array_equal(found[0], found[0].T)


def bits(mesh, x, kind, components, part):
  fitted = mixture.fit(
    mesh,
    x,
    covariance=kind,
    components=components,
    pca=0,
    rank=3,
    starts=1,
    max_iterations=3,
    tol=-1.0,
    labels=part,
  )
  return [np.asarray(a).tobytes() for a in fitted[:8]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  "components", [2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_same_bits_of_every_structure(kind, components):
  x, part = clusters(n=5000, width=40, components=components)
  wanted = bits(make_mesh(1, 1), x, kind, components, part)
  for sizes in ((8, 1), (4, 2)):
    assert bits(make_mesh(*sizes), x, kind, components, part) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_at_full_width(kind):
  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(size=(20000, 384)) * np.geomspace(2, 0.1, 384))
  part = (rng.random(20000) < 0.4).astype(int)
  x[part == 1] *= 1.3
  wanted = bits(make_mesh(1, 1), x, kind, 2, part)
  for sizes in ((8, 1), (4, 2)):
    assert bits(make_mesh(*sizes), x, kind, 2, part) == wanted
