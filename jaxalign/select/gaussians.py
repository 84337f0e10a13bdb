"""K Gaussians in whitened coordinates: their densities, float64 on the host."""

import contextlib
import functools
from typing import NamedTuple

import numpy as np
import scipy.linalg
import threadpoolctl

from jaxalign.errors import NumericError

COVARIANCES = ("full", "tied", "diag", "low_rank")
KNOB = "config.select.mixture"


class State(NamedTuple):
  """The parameters; a covariance of rank q is diag(D) + W W^T."""

  log_weights: np.ndarray  # [K]
  means: np.ndarray  # [K, P]
  covariances: np.ndarray  # [K, P, P]; [K, P] where diagonal, D of low rank
  loadings: np.ndarray  # [K, P, q], W; q is 0 where there are none


class Factors(NamedTuple):
  """What a density needs of the covariances."""

  # [K, P, P], F with F F^T the precision; [K, P] standard deviations' inverse
  scale: np.ndarray
  # [K, P, q]: y low = f, the factors' mean given y. The distance of a row is
  # |F (y - f W^T)|^2 + |f|^2, a sum without differences.
  low: np.ndarray
  log_det: np.ndarray  # [K], of the covariances
  trace: np.ndarray  # [K], of the precisions


class Joint(NamedTuple):
  """One basis W that makes two covariances diagonal at once.

  W^T S_0 W = I and W^T S_1 W = diag(values), so one product z W serves both
  distances: (u - m_k)^2 / values_k summed, u = z W.
  """

  basis: np.ndarray  # [P, P]
  precisions: np.ndarray  # [2, P], 1 and 1 / values
  log_det: np.ndarray  # [2]
  trace: np.ndarray  # [2], of the precisions
  spread: np.ndarray  # [2], the largest eigenvalue of the precisions, nearly


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


def is_low_rank(state: State) -> bool:
  return state.loadings.shape[-1] > 0


def _cholesky(covariances: np.ndarray) -> np.ndarray:
  try:
    return np.linalg.cholesky(covariances)
  except np.linalg.LinAlgError as error:
    raise NumericError(
      "the covariance of a component is not positive "
      f"definite; raise {KNOB}.ridge or lower {KNOB}.pca"
    ) from error


def factors_of(state: State) -> Factors:
  """Raises NumericError for a covariance that is not positive definite."""
  covariances, w = state.covariances, state.loadings
  if covariances.ndim == 2:
    if not (covariances > 0).all():
      raise NumericError(
        "a component has no variance in some direction; set "
        f"{KNOB}.ridge above 0"
      )
    scale = covariances**-0.5
    log_det = np.log(covariances).sum(1)
    trace = (1 / covariances).sum(1)
    low = np.zeros(w.shape)
    if w.shape[-1]:
      # Woodbury, with M = I + W^T D^-1 W: low = D^-1 W M^-1.
      scaled = w / covariances[..., None]
      inner = np.eye(w.shape[-1]) + w.swapaxes(1, 2) @ scaled
      for k, lower in enumerate(_cholesky(inner)):
        low[k] = scipy.linalg.cho_solve((lower, True), scaled[k].T).T
        log_det[k] += 2 * np.log(np.diagonal(lower)).sum()
      trace = trace - (low * scaled).sum((1, 2))
    return Factors(scale, low, log_det, trace)
  lower = _cholesky(covariances)
  log_det = 2 * np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(1)
  unit = np.eye(lower.shape[1])
  inverse = [
    scipy.linalg.solve_triangular(one, unit, lower=True) for one in lower
  ]
  scale = np.stack(inverse).swapaxes(1, 2)
  return Factors(scale, np.zeros(w.shape), log_det, (scale**2).sum((1, 2)))


def joint_of(covariances: np.ndarray) -> Joint:
  """[2, P, P] -> `Joint`; NumericError where one is not positive definite."""
  lower = _cholesky(covariances[0])
  inside = scipy.linalg.solve_triangular(lower, covariances[1], lower=True)
  inside = scipy.linalg.solve_triangular(lower, inside.T, lower=True)
  values, turn = np.linalg.eigh((inside + inside.T) / 2)
  if not values[0] > 0:
    raise NumericError(
      "the covariance of a component is not positive "
      f"definite; raise {KNOB}.ridge or lower {KNOB}.pca"
    )
  basis = scipy.linalg.solve_triangular(lower, turn, lower=True, trans="T")
  precisions = np.stack([np.ones_like(values), 1 / values])
  log_det = 2 * np.log(np.diagonal(lower)).sum() + np.array(
    [0.0, np.log(values).sum()]
  )
  trace = precisions @ (basis**2).sum(0)
  return Joint(
    basis,
    precisions,
    log_det,
    trace,
    np.array([spread_of(basis * np.sqrt(p)) for p in precisions]),
  )


def spread_of(factor: np.ndarray) -> float:
  """The largest eigenvalue of F F^T, by a few steps; never above it."""
  v = factor[(factor**2).sum(1).argmax()] @ factor.T
  for _ in range(8):
    v = factor @ (factor.T @ (v / np.linalg.norm(v)))
  return float(np.linalg.norm(v))


def constants_of(
  log_weights: np.ndarray,
  log_det: np.ndarray,
  trace: np.ndarray,
  width: int,
  ridge: float,
) -> np.ndarray:
  """[K]: all of log(weight * density) that does not depend on the row."""
  return log_weights - 0.5 * (
    width * np.log(2 * np.pi) + log_det + ridge * trace
  )


def log_joint(state: State, z: np.ndarray, project) -> np.ndarray:
  """[n, P] whitened rows -> [n, K] float64 log(weight * density), nats.

  Args:
    state: the parameters.
    z: [n, P].
    project: `project(mean, matrix, z)`, (z - mean) @ matrix in fixed tiles.
  """
  f = factors_of(state)
  constants = constants_of(
    state.log_weights, f.log_det, f.trace, z.shape[1], 0.0
  )
  out = np.empty((len(z), len(constants)))
  for k, mean in enumerate(state.means):
    if f.scale.ndim == 2:
      factor = project(mean, f.low[k], z)
      rest = z - mean - factor @ state.loadings[k].T
      squared = ((rest * f.scale[k]) ** 2).sum(1) + (factor**2).sum(1)
    else:
      squared = (project(mean, f.scale[k], z) ** 2).sum(1)
    out[:, k] = constants[k] - 0.5 * squared
  return out
