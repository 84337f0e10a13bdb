"""One EM iteration of K Gaussians: sums on the mesh, parameters on the host.

Rows are whitened, so the pooled covariance is the identity and the ridge adds
`ridge` to every variance. That is the exact M-step for rows blurred by
Gaussian noise of that covariance, whose E-step takes ridge * tr(S_k^-1) / 2
off component k's log-density; with that term the bound never falls.
"""

from collections.abc import Callable
import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import threadpoolctl

from jaxalign.core.errors import NumericError
from jaxalign.select import exact
from jaxalign.select.exact import HIGHEST

COVARIANCES = ("full", "tied", "diag")
KNOB = "config.select.mixture"
CHUNK = 4096  # rows of one product on the host
# Where components share a product, a second moment is the difference of two
# float32 sums. Its error, 1e-7 of all rows' moment, may be so many times
# larger relative to the component's own narrowest direction.
SHARE_LIMIT = 1000.0
# Up to this width one product gives both distances, at the price of the
# host's eigenvectors in each iteration; wider, two products cost less.
JOINT_WIDTH = 1024


class Gaussians(NamedTuple):
  """The parameters, float64."""

  log_weights: np.ndarray  # [K]
  means: np.ndarray  # [K, P]
  covariances: np.ndarray  # [K, P, P]; [K, P] where diagonal


class Factors(NamedTuple):
  """What a density needs: log(weight * density) = constant - |y F|^2 / 2."""

  constants: np.ndarray  # [K]
  scale: np.ndarray  # [K, P, P], F with F F^T the precision; [K, P] its axes


class Moments(NamedTuple):
  """Sums over rows about each component's present mean, float64."""

  count: np.ndarray  # [K], sum of r
  first: np.ndarray  # [K, P], sum of r y, y = z - mean
  # [K, P, P], sum of r y y^T; [K, P] where diagonal, [P, P] where tied
  second: np.ndarray


class Shared(NamedTuple):
  """A density by a product that serves all components, where u = z basis:
  log(weight * density) = constant - sum((u - centre)^2 precision) / 2."""

  constants: np.ndarray  # [K]
  basis: np.ndarray  # [P, P]; [K, P, P] where each has its own
  centres: np.ndarray  # [K, P]
  precisions: np.ndarray  # [K, P]


def _refuse_flat(flat: bool) -> None:
  if flat:
    raise NumericError(
      "the covariance of a component is not positive definite; lower "
      f"{KNOB}.pca or raise the ridge"
    )


def _cholesky(covariances: np.ndarray) -> np.ndarray:
  try:
    return np.linalg.cholesky(covariances)
  except np.linalg.LinAlgError:
    _refuse_flat(True)


def _constants(g, log_det, trace, ridge) -> np.ndarray:
  """What of log(weight * density) does not depend on the row."""
  rest = g.means.shape[1] * np.log(2 * np.pi) + log_det + ridge * trace
  return g.log_weights - 0.5 * rest


def factors_of(g: Gaussians, ridge: float = 0.0) -> Factors:
  """Raises NumericError for a covariance that is not positive definite."""
  if g.covariances.ndim == 2:
    _refuse_flat(not (g.covariances > 0).all())
    scale = g.covariances**-0.5
    log_det, trace = np.log(g.covariances).sum(1), (1 / g.covariances).sum(1)
  else:
    lower = _cholesky(g.covariances)
    one = np.eye(g.means.shape[1])
    inverse = [scipy.linalg.solve_triangular(a, one, lower=True) for a in lower]
    scale = np.stack(inverse).swapaxes(1, 2)
    log_det = 2 * np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(1)
    trace = (scale**2).sum((1, 2))
  return Factors(_constants(g, log_det, trace, ridge), scale)


def _spread(factor: np.ndarray) -> float:
  """The largest eigenvalue of F F^T, by a few steps; never above it."""
  v = factor[(factor**2).sum(1).argmax()] @ factor.T
  for _ in range(8):
    v = factor @ (factor.T @ (v / np.linalg.norm(v)))
  return float(np.linalg.norm(v))


def _two_in_one(g: Gaussians, ridge: float) -> Shared:
  """The basis W that makes both covariances diagonal: W^T S_0 W = I and
  W^T S_1 W = diag(values)."""
  lower = _cholesky(g.covariances[0])
  solve = functools.partial(scipy.linalg.solve_triangular, lower, lower=True)
  inside = solve(solve(g.covariances[1]).T)
  values, turn = np.linalg.eigh((inside + inside.T) / 2)
  _refuse_flat(not values[0] > 0)
  basis = solve(turn, trans="T")
  precisions = np.stack([np.ones_like(values), 1 / values])
  own = np.array([0.0, np.log(values).sum()])
  log_det = 2 * np.log(np.diagonal(lower)).sum() + own
  trace = precisions @ (basis**2).sum(0)
  constants = _constants(g, log_det, trace, ridge)
  return Shared(constants, basis, g.means @ basis, precisions)


def _shared(g: Gaussians, ridge: float, kind: str) -> tuple[Shared, np.ndarray]:
  """`Shared`, and how much a component suffers where moments are differences:
  the largest precision of any direction, times rows per row of its own."""
  ones = np.ones(g.means.shape)
  if kind == "tied":
    f = factors_of(g._replace(covariances=g.covariances[:1]), ridge)
    basis = f.scale[0]
    shared = Shared(f.constants, basis, g.means @ basis, ones)
    return shared, np.array([_spread(basis)])
  if g.means.shape[1] <= JOINT_WIDTH:
    shared = _two_in_one(g, ridge)
    factors = [shared.basis * np.sqrt(p) for p in shared.precisions]
  else:
    constants, factors = factors_of(g, ridge)
    centres = np.stack([m @ f for m, f in zip(g.means, factors)])
    shared = Shared(constants, factors, centres, ones)
  return shared, np.array([*map(_spread, factors)]) / np.exp(g.log_weights)


def log_joint(factors: Factors, means: np.ndarray, z: np.ndarray) -> np.ndarray:
  """[n, P] whitened rows -> [n, K] float64 log(weight * density), nats."""
  white = lambda y, f: y * f if f.ndim == 1 else y @ f
  squared = [
    (white(z - mean, f) ** 2).sum(1) for mean, f in zip(means, factors.scale)
  ]
  return factors.constants - 0.5 * np.stack(squared, axis=1)


_libraries = functools.cache(threadpoolctl.ThreadpoolController)


def few_threads(width: int) -> contextlib.AbstractContextManager:
  """One thread for the host's algebra of up to 1,024 directions.

  It takes milliseconds; OpenBLAS's threads that wait for a core which others
  hold were seen to take a hundred times as long. No number of cores can then
  change a bit either.
  """
  if width > 1024:
    return contextlib.nullcontext()
  return _libraries().limit(limits=1, user_api="blas")


_dot = functools.partial(jnp.matmul, precision=HIGHEST)


def _posterior(joint, weight):
  """[K, rows] log joint -> responsibilities; log-likelihoods by ROUND rows."""
  log_likelihood = jax.nn.logsumexp(joint, axis=0)
  r = jnp.exp(joint - log_likelihood[None]) * weight[None]
  return r, (log_likelihood * weight).reshape(-1, exact.ROUND).sum(1)


def _own_moments(params, z, weight):
  """A chunk's moments, each component's about its own mean."""
  constants, means, scale = params
  diagonal = scale.ndim == 2

  def distance(component):
    mean, factor = component
    y = z - mean[None]
    white = y * factor[None] if diagonal else _dot(y, factor)
    return (white**2).sum(1)

  joint = constants[:, None] - 0.5 * jax.lax.map(distance, (means, scale))
  r, bound = _posterior(joint, weight)

  def moments(component):
    r, mean = component
    y = z - mean[None]
    second = _dot(r, y * y) if diagonal else exact.gram(r[:, None] * y, y)
    return _dot(r, y), second

  first, second = jax.lax.map(moments, (r, means))
  return dict(count=r.sum(1), first=first, second=second), bound


def _shared_moments(params, z, weight, gram=False):
  """A chunk's moments about 0, of `Shared`; no second moment but, where
  wanted, component 0's."""
  constants, basis, centres, precisions = params
  common = basis.ndim == 2
  u = [_dot(z, one) for one in (basis[None] if common else basis)]
  squared = [
    _dot((u[0 if common else k] - m[None]) ** 2, p)
    for k, (m, p) in enumerate(zip(centres, precisions))
  ]
  joint = constants[:, None] - 0.5 * jnp.stack(squared)
  r, bound = _posterior(joint, weight)
  sums = dict(count=r.sum(1), first=jnp.stack([_dot(one, z) for one in r]))
  if gram:
    sums["second"] = exact.gram(r[0][:, None] * z, z)
  return sums, bound


_pair_moments = functools.partial(_shared_moments, gram=True)


def _bounds(rows: exact.RowChunks, means: np.ndarray) -> dict[str, float]:
  """What no chunk's sum about these means can exceed (Cauchy-Schwarz)."""
  size = rows.x.shape[1]
  second = 2.1 * (rows.square + size * float((means**2).max()))
  return dict(count=1.1 * size, first=(size * second) ** 0.5, second=second)


def _moved(second, first, count, mean):
  """Sum of r z z^T -> sum of r y y^T, y = z - mean."""
  outer = np.outer(first, mean)
  return second - outer - outer.T + count * np.outer(mean, mean)


def _shared_sweep(mesh, rows, g, ridge, kind, total):
  """One product, and one Gram for two components; the rest of the total is
  the other's. None where a component is too narrow for a difference."""
  shared, narrow = _shared(g, ridge, kind)
  if narrow.max() > SHARE_LIMIT:
    return None
  # Summed by itself is the component that bears a difference less well.
  turn = slice(None, None, -1 if narrow[-1] > narrow[0] else 1)
  common = shared.basis.ndim == 2
  basis = shared.basis if common else shared.basis[turn]
  params = Shared(*(a[turn] for a in shared))._replace(basis=basis)
  bounds = _bounds(rows, np.zeros(1))
  if kind == "tied":
    bounds.pop("second")
  moments = _shared_moments if kind == "tied" else _pair_moments
  sums, bound = exact.exact_sums(mesh, moments, rows, params, bounds)
  count, first = sums["count"][turn], sums["first"][turn]
  each = zip(first, count, g.means)
  if kind == "tied":
    second = total
    for one in each:
      second = _moved(second, *one)
  else:
    own = np.stack([sums["second"], total - sums["second"]])[turn]
    second = np.stack([_moved(s, *one) for s, one in zip(own, each)])
  return Moments(count, first - count[:, None] * g.means, second), bound


def sweep_of(
  mesh: jax.sharding.Mesh,
  z: np.ndarray,
  ridge: float,
  kind: str,
  share: bool = True,
) -> Callable[[Gaussians], tuple[Moments, float]]:
  """Places whitened rows [n, P] once -> sweep(g): their moments under g, and
  the mean bound per row, nats. The means of g are as `rounded` leaves them.

  Args:
    mesh, z: where the sums are computed, and of which rows.
    ridge: added to every variance.
    kind: one of COVARIANCES.
    share: lets two full, or all tied, components share products where that is
      accurate enough (SHARE_LIMIT).
  """
  rows = exact.place(mesh, z)
  total = functools.cache(lambda: exact.gram_of_chunks(mesh, rows))

  def own_sweep(g):
    constants, scale = factors_of(g, ridge)
    params, bounds = (constants, g.means, scale), _bounds(rows, g.means)
    sums, bound = exact.exact_sums(mesh, _own_moments, rows, params, bounds)
    if kind == "tied":
      sums["second"] = sums["second"].sum(0)
    return Moments(**sums), bound

  def sweep(g: Gaussians) -> tuple[Moments, float]:
    together = None
    with few_threads(z.shape[1]):
      if share and (kind == "tied" or (kind == "full" and len(g.means) == 2)):
        together = _shared_sweep(mesh, rows, g, ridge, kind, total())
      moments, bound = together or own_sweep(g)
    return moments, bound / rows.n

  return sweep


def rounded(g: Gaussians) -> Gaussians:
  """With its means as float32 holds them: moments are about those."""
  return g._replace(means=np.float64(np.float32(g.means)))


def m_step(
  moments: Moments, means: np.ndarray, ridge: float, kind: str
) -> Gaussians:
  """New parameters from moments about the present means [K, P]."""
  n, shift = moments.count, moments.first / moments.count[:, None]
  if kind == "diag":
    covariances = moments.second / n[:, None] - shift**2
    covariances = np.maximum(covariances, 0) + ridge
  else:
    outer = shift[:, :, None] * shift[:, None, :]
    if kind == "tied":
      pooled = (moments.second - np.tensordot(n, outer, 1)) / n.sum()
      covariances = np.broadcast_to(pooled, outer.shape)
    else:
      covariances = moments.second / n[:, None, None] - outer
    covariances = (covariances + covariances.swapaxes(1, 2)) / 2
    covariances = covariances + ridge * np.eye(shift.shape[1])
  return Gaussians(np.log(n / n.sum()), means + shift, covariances)


def partition(
  z: np.ndarray, labels: np.ndarray, components: int, ridge: float, kind: str
) -> Gaussians | None:
  """The maximum of the likelihood of whitened rows [n, P] whose component is
  known, labels [n] from 0 to K - 1; None where a component has no rows."""
  width, diagonal = z.shape[1], kind == "diag"
  count = np.bincount(labels, minlength=components).astype(np.float64)
  if not count.all():
    return None
  first = np.zeros((components, width))
  second = np.zeros((components,) + (width,) * (1 if diagonal else 2))
  for start in range(0, len(z), CHUNK):
    rows = slice(start, start + CHUNK)
    for k in range(components):
      own = np.float64(z[rows][labels[rows] == k])
      first[k] += own.sum(0)
      second[k] += (own**2).sum(0) if diagonal else own.T @ own
  second = second.sum(0) if kind == "tied" else second
  moments = Moments(count, first, second)
  return m_step(moments, np.zeros(first.shape), ridge, kind)


def reseeded(g: Gaussians, k: int, mean: np.ndarray, ridge: float) -> Gaussians:
  """Component k begins again at a row, as wide as all the rows."""
  means, covariances = g.means.copy(), g.covariances.copy()
  wide = np.full(len(mean), 1 + ridge)
  means[k] = mean
  covariances[k] = wide if covariances.ndim == 2 else np.diag(wide)
  weights = np.exp(g.log_weights)
  weights[k] = 1 / len(weights)
  return Gaussians(np.log(weights / weights.sum()), means, covariances)


def em_flops(n: int, width: int, components: int, kind: str) -> int:
  """Floating-point operations of one iteration's products."""
  if kind == "diag":
    return 8 * components * n * width
  square = 2 * n * width**2
  triangle = (
    2 * n * sum((e - s) * (width - s) for s, e in exact.column_chunks(width))
  )
  if kind == "tied":
    return square
  if components == 2:
    return (1 + (width > JOINT_WIDTH)) * square + triangle
  return components * (square + triangle)
