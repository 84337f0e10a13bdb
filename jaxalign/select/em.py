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
TILE = 4096  # rows of one product on the host


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
  second: np.ndarray  # [K, P, P], sum of r y y^T; [K, P] where diagonal


def factors_of(g: Gaussians, ridge: float = 0.0) -> Factors:
  """Raises NumericError for a covariance that is not positive definite."""
  width = g.means.shape[1]
  if g.covariances.ndim == 2:
    if not (g.covariances > 0).all():
      raise NumericError(
        "a component has no variance in some direction; lower "
        f"{KNOB}.pca or raise the ridge"
      )
    scale = g.covariances**-0.5
    log_det, trace = np.log(g.covariances).sum(1), (scale**2).sum(1)
  else:
    try:
      lower = np.linalg.cholesky(g.covariances)
    except np.linalg.LinAlgError as error:
      raise NumericError(
        "the covariance of a component is not positive "
        f"definite; lower {KNOB}.pca or raise the ridge"
      ) from error
    invert = functools.partial(scipy.linalg.solve_triangular, lower=True)
    scale = np.stack([invert(one, np.eye(width)).T for one in lower])
    log_det = 2 * np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(1)
    trace = (scale**2).sum((1, 2))
  rest = width * np.log(2 * np.pi) + log_det + ridge * trace
  return Factors(g.log_weights - 0.5 * rest, scale)


def log_joint(factors: Factors, means: np.ndarray, z: np.ndarray) -> np.ndarray:
  """[n, P] whitened rows -> [n, K] float64 log(weight * density), nats."""
  white = lambda y, f: y * f if f.ndim == 1 else y @ f
  squared = [
    (white(z - mean, f) ** 2).sum(1) for mean, f in zip(means, factors.scale)
  ]
  return factors.constants - 0.5 * np.stack(squared, axis=1)


@functools.cache
def _libraries() -> threadpoolctl.ThreadpoolController:
  return threadpoolctl.ThreadpoolController()


def few_threads(width: int) -> contextlib.AbstractContextManager:
  """One thread for the host's algebra of up to 1,024 directions.

  It takes milliseconds; OpenBLAS's threads that wait for a core which others
  hold were seen to take a hundred times as long. No number of cores can then
  change a bit either.
  """
  if width > 1024:
    return contextlib.nullcontext()
  return _libraries().limit(limits=1, user_api="blas")


def _chunk_moments(params, z, weight):
  """A chunk's moments, and its log-likelihood by `exact.ROUND` rows."""
  constants, means, scale = params
  dot = functools.partial(jnp.matmul, precision=HIGHEST)
  diagonal = scale.ndim == 2

  def distance(component):
    mean, factor = component
    y = z - mean[None]
    white = y * factor[None] if diagonal else dot(y, factor)
    return (white**2).sum(1)

  joint = constants[:, None] - 0.5 * jax.lax.map(distance, (means, scale))
  log_likelihood = jax.nn.logsumexp(joint, axis=0)
  r = jnp.exp(joint - log_likelihood[None]) * weight[None]

  def moments(component):
    r, mean = component
    y = z - mean[None]
    second = dot(r, y * y) if diagonal else exact.gram(r[:, None] * y, y)
    return dot(r, y), second

  first, second = jax.lax.map(moments, (r, means))
  bound = (log_likelihood * weight).reshape(-1, exact.ROUND).sum(1)
  return dict(count=r.sum(1), first=first, second=second), bound


def sweep_of(
  mesh: jax.sharding.Mesh, z: np.ndarray, ridge: float
) -> Callable[[Gaussians], tuple[Moments, float]]:
  """Places whitened rows [n, P] once -> sweep(g): their moments under g, and
  the mean bound per row, nats. The means of g are as `rounded` leaves them."""
  rows = exact.place(mesh, z)
  size = rows.x.shape[1]

  def sweep(g: Gaussians) -> tuple[Moments, float]:
    with few_threads(z.shape[1]):
      factors = factors_of(g, ridge)
    # What no chunk's sum about these means can exceed (Cauchy-Schwarz).
    second = 2.1 * (rows.square + size * float((g.means**2).max()))
    bounds = dict(count=1.1 * size, first=(size * second) ** 0.5, second=second)
    params = factors.constants, g.means, factors.scale
    sums, bound = exact.sums(mesh, _chunk_moments, rows, params, bounds)
    return Moments(**sums), bound / rows.n

  return sweep


def rounded(g: Gaussians) -> Gaussians:
  """With its means as float32 holds them: moments are about those."""
  return g._replace(means=np.float64(np.float32(g.means)))


def m_step(
  moments: Moments, means: np.ndarray, ridge: float, tied: bool
) -> Gaussians:
  """New parameters from moments about the present means [K, P]."""
  n, shift = moments.count, moments.first / moments.count[:, None]
  if moments.second.ndim == 2:
    covariances = moments.second / n[:, None] - shift**2
    covariances = np.maximum(covariances, 0) + ridge
  else:
    outer = shift[:, :, None] * shift[:, None, :]
    covariances = moments.second / n[:, None, None] - outer
    if tied:
      pooled = np.tensordot(n / n.sum(), covariances, 1)
      covariances = np.broadcast_to(pooled, outer.shape)
    covariances = (covariances + covariances.swapaxes(1, 2)) / 2
    covariances = covariances + ridge * np.eye(shift.shape[1])
  return Gaussians(np.log(n / n.sum()), means + shift, covariances)


def partition(
  z: np.ndarray, labels: np.ndarray, components: int, ridge: float, kind: str
) -> Gaussians | None:
  """The maximum of the likelihood where each row's component is known, plus
  the ridge; None where a component has no rows.

  Args:
    z: [n, P] whitened rows.
    labels: [n] from 0 to K - 1.
    components: K.
    ridge: added to every variance.
    kind: one of COVARIANCES.
  """
  width, diagonal = z.shape[1], kind == "diag"
  count = np.bincount(labels, minlength=components).astype(np.float64)
  if not count.all():
    return None
  first = np.zeros((components, width))
  second = np.zeros((components,) + (width,) * (1 if diagonal else 2))
  for start in range(0, len(z), TILE):
    part = np.float64(z[start : start + TILE])
    here = labels[start : start + TILE]
    for k in range(components):
      own = part[here == k]
      first[k] += own.sum(0)
      second[k] += (own**2).sum(0) if diagonal else own.T @ own
  moments = Moments(count, first, second)
  return m_step(moments, np.zeros(first.shape), ridge, kind == "tied")


def reseeded(g: Gaussians, k: int, mean: np.ndarray, ridge: float) -> Gaussians:
  """Component k begins again at a row, as wide as all the rows."""
  means, covariances = g.means.copy(), g.covariances.copy()
  wide = np.full(len(mean), 1 + ridge)
  means[k] = mean
  covariances[k] = wide if covariances.ndim == 2 else np.diag(wide)
  weights = np.exp(g.log_weights)
  weights[k] = 1 / len(weights)
  return Gaussians(np.log(weights / weights.sum()), means, covariances)


def flops(n: int, width: int, components: int, kind: str) -> int:
  """Floating-point operations of one iteration's products."""
  if kind == "diag":
    return 8 * components * n * width
  triangle = sum((e - s) * (width - s) for s, e in exact.panels(width))
  return 2 * components * n * (width**2 + triangle)
