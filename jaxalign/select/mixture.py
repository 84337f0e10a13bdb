"""A Gaussian mixture over the pool, fitted by EM on the mesh.

What decides a selection must be the same bits on any mesh. The rows lie in
64 chunks in id order; each chunk's sums are one float32 program, whichever
device runs it, and the chunks are added in order, in float64, on the host.
Parameters, Cholesky factors and the final log-likelihood are float64 on the
host. (The same bits on every mesh, that is; another kind of accelerator or
host processor rounds in its own way.)
"""

import functools
import io
import json
import zipfile
from typing import Any, Callable, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jaxalign import artifacts
from jaxalign import sharding
from jaxalign.errors import ConfigError, CorruptError, NumericError
from jaxalign.select.chunks import BLOCK, chunk_rows, ordered_sum
from jaxalign.select.chunks import over_chunks, over_rows, padded_chunks, tiles
from jaxalign.select.space import Space, prepare, project

COVARIANCES = ("full", "tied", "diag")
START_ROWS = 16384  # k-means reads at most so many rows
LLOYD_STEPS = 5
HIGHEST = jax.lax.Precision.HIGHEST  # a TPU would multiply in bfloat16


class Mixture(NamedTuple):
  """K Gaussians in whitened coordinates, float64 host arrays, and the fit."""

  mean: np.ndarray  # [E]
  projection: np.ndarray  # [E, P]; z = (x - mean) @ projection
  variances: np.ndarray  # [P], per direction before whitening
  log_weights: np.ndarray  # [K]
  means: np.ndarray  # [K, P]
  covariances: np.ndarray  # [K, P, P]; [K, P] where diagonal
  trace: np.ndarray  # [iterations], mean bound per row, the start kept
  bounds: np.ndarray  # [starts], where each ended; NaN where it failed
  explained: float
  warnings: list[str]


class _State(NamedTuple):
  """One EM iterate, float64 on the host."""

  log_weights: np.ndarray  # [K]
  means: np.ndarray  # [K, P]
  covariances: np.ndarray  # [K, P, P] or [K, P]


class _Sums(NamedTuple):
  """Sums over rows, about each component's present mean."""

  count: np.ndarray  # [K], sum of r
  first: np.ndarray  # [K, P], sum of r y, y = z - mean
  second: np.ndarray  # [K, P, P] or [K, P], sum of r y y^T


def _posterior(joint, weight):
  """[K, T] log joint -> [K, T] responsibilities, [T/BLOCK] log-likelihood."""
  log_likelihood = jax.nn.logsumexp(joint, axis=0)
  r = jnp.exp(joint - log_likelihood[None]) * weight[None]
  return r, (log_likelihood * weight).reshape(-1, BLOCK).sum(1)


def _packed(*sums):
  """One vector per chunk, so that an iteration fetches one array."""
  return jnp.concatenate([a.reshape(-1) for a in sums])


def _full_chunk(constants, means, factors, z, weight):
  """z [T, P]; factors [K, P, P] with factor factor^T the precision."""
  y = z[None] - means[:, None]
  white = jnp.einsum("ktp,kpq->ktq", y, factors, precision=HIGHEST)
  r, bound = _posterior(constants[:, None] - 0.5 * (white**2).sum(-1), weight)
  weighted = r[..., None] * y
  second = over_rows(functools.partial(jnp.einsum, "ktp,ktq->kpq",
                                       precision=HIGHEST), weighted, y)
  return _packed(r.sum(1), weighted.sum(1), second, bound)


def _diag_chunk(constants, means, factors, z, weight):
  """As `_full_chunk`, with factors [K, P], one over the standard deviation."""
  y = z[None] - means[:, None]
  white = y * factors[:, None]
  r, bound = _posterior(constants[:, None] - 0.5 * (white**2).sum(-1), weight)
  weighted = r[..., None] * y
  return _packed(r.sum(1), weighted.sum(1), (weighted * y).sum(1), bound)


@functools.lru_cache(maxsize=32)
def _program(mesh: jax.sharding.Mesh, kind: str):
  """The jitted program of a kind on a mesh; compiled once per shape."""
  return over_chunks(mesh, _diag_chunk if kind == "diag" else _full_chunk, 3)


# One EM iteration, on the host.


def _m_step(sums: _Sums, means: np.ndarray, ridge: np.ndarray,
            covariance: str) -> _State:
  """New parameters; `ridge` [P] is added to every covariance's diagonal."""
  n = sums.count
  shift = sums.first / n[:, None]
  if covariance == "diag":
    covariances = sums.second / n[:, None] - shift**2
    covariances = np.maximum(covariances, 0) + ridge
  else:
    outer = shift[:, :, None] * shift[:, None, :]
    scatter = sums.second - n[:, None, None] * outer
    if covariance == "tied":
      scatter = np.broadcast_to(scatter.sum(0), scatter.shape)
      covariances = scatter / n.sum()
    else:
      covariances = scatter / n[:, None, None]
    covariances = (covariances + covariances.swapaxes(1, 2)) / 2
    covariances = covariances + np.diag(ridge)
  return _State(np.log(n / n.sum()), means + shift, covariances)


def _factors(covariances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Covariances -> (F with F F^T the precision, [K] log-determinants)."""
  if covariances.ndim == 2:
    if not (covariances > 0).all():
      raise NumericError("a component has no variance in some direction; set "
                         "config.select.mixture.ridge above 0")
    return covariances**-0.5, np.log(covariances).sum(1)
  try:
    lower = np.linalg.cholesky(covariances)
  except np.linalg.LinAlgError as error:
    raise NumericError("the covariance of a component is not positive "
                       "definite; raise config.select.mixture.ridge or lower "
                       "config.select.mixture.pca") from error
  log_det = 2 * np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(1)
  unit = np.eye(lower.shape[1])
  inverse = [scipy.linalg.solve_triangular(one, unit, lower=True)
             for one in lower]
  return np.stack(inverse).swapaxes(1, 2), log_det


def _constants(state: _State, factors: np.ndarray, log_det: np.ndarray,
               ridge: np.ndarray) -> np.ndarray:
  """[K]: all of log(weight * density) that does not depend on the row."""
  blur = (factors**2).reshape(len(factors), len(ridge), -1).sum(-1) @ ridge
  return state.log_weights - 0.5 * (
      len(ridge) * np.log(2 * np.pi) + log_det + blur)


def _e_step(program: Callable, mesh: jax.sharding.Mesh, tiles: tuple, n: int,
            state: _State, ridge: np.ndarray) -> tuple[_Sums, float]:
  """Sums over all rows, and the mean bound per row."""
  factors, log_det = _factors(state.covariances)
  constants = _constants(state, factors, log_det, ridge)
  params = tuple(sharding.put(mesh, np.asarray(a, np.float32),
                              *([None] * a.ndim))
                 for a in (constants, state.means, factors))
  sums = ordered_sum(sharding.fetch(program(params, tiles)))
  shapes = constants.shape, state.means.shape, state.covariances.shape
  ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
  *moments, bound = np.split(sums, ends)
  return (_Sums(*(a.reshape(shape) for a, shape in zip(moments, shapes))),
          float(bound.sum() / n))


def _seen(state: _State) -> _State:
  """The state with its means as float32 holds them: sums are about those."""
  return state._replace(means=np.float64(np.float32(state.means)))


# Starts.


def _hard_start(z: np.ndarray, labels: np.ndarray, components: int,
                ridge: np.ndarray, covariance: str) -> _State | None:
  """Parameters of a given partition; None where a part is empty."""
  zero = np.zeros((components, z.shape[1]))
  count, first, second = [], [], []
  for k in range(components):
    part = z[labels == k]
    if not len(part):
      return None
    count.append(len(part))
    first.append(part.sum(0))
    second.append((part**2).sum(0) if covariance == "diag" else part.T @ part)
  sums = _Sums(np.array(count, np.float64), np.array(first), np.array(second))
  return _m_step(sums, zero, ridge, covariance)


def _distances(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
  """[n, P], [K, P] -> [n, K] squared distances."""
  return np.maximum((x**2).sum(1)[:, None] - 2 * (x @ centre.T)
                    + (centre**2).sum(1)[None], 0)


def _k_means(x: np.ndarray, components: int,
             rng: np.random.Generator) -> np.ndarray:
  """k-means++ and a few Lloyd steps on [n, P]; returns [n] labels."""
  centres = x[rng.integers(len(x))][None]
  while len(centres) < components:
    far = _distances(x, centres).min(1)
    total = far.sum()
    share = far / total if total > 0 else None  # fewer distinct rows than K
    centres = np.append(centres, x[rng.choice(len(x), p=share)][None], axis=0)
  labels = _distances(x, centres).argmin(1)
  for _ in range(LLOYD_STEPS):
    for k in range(components):
      if (labels == k).any():
        centres[k] = x[labels == k].mean(0)
    labels = _distances(x, centres).argmin(1)
  return labels


def _reseed(state: _State, k: int, z: np.ndarray, ridge: np.ndarray,
            rng: np.random.Generator) -> _State:
  """Component k begins again at a random row, as wide as all the rows."""
  means = state.means.copy()
  means[k] = z[rng.integers(len(z))]
  covariances = state.covariances.copy()
  wide = 1 + ridge
  covariances[k] = wide if covariances.ndim == 2 else np.diag(wide)
  weights = np.exp(state.log_weights)
  weights[k] = 1 / len(weights)
  return _State(np.log(weights / weights.sum()), means, covariances)


# The fit.


class _Failed(Exception):
  """A start that lost a component twice; another start may do better."""


def _run(e_step: Callable, state: _State, space: Space, ridge: np.ndarray,
         covariance: str, tol: float, max_iterations: int,
         rng: np.random.Generator) -> tuple[_State, list[float], bool]:
  """EM from one start -> (last state, its trace, whether it converged)."""
  n, width = space.z.shape
  # Fewer rows than this leave a covariance that is mostly ridge, and a bound
  # that is high for that reason only.
  least = width + 1 if covariance == "full" else 2
  trace, reseeded = [], False
  while True:
    state = _seen(state)
    sums, bound = e_step(state)
    if not np.isfinite(bound):
      raise NumericError(f"the likelihood is {bound} at iteration "
                         f"{len(trace)}; raise config.select.mixture.ridge")
    small = int(sums.count.argmin())
    if sums.count[small] < least:
      found = (f"a component kept {sums.count[small]:.1f} of {n} rows, below "
               f"the {least} that {covariance} covariances in {width} "
               "directions need")
      if reseeded:
        raise _Failed(found)
      state, reseeded = _reseed(state, small, space.z, ridge, rng), True
      trace = []
      continue
    if trace and bound < trace[-1] - 1e-6 * (abs(trace[-1]) + width):
      raise NumericError(f"the likelihood fell from {trace[-1]} to {bound} at "
                         f"iteration {len(trace)}; raise "
                         "config.select.mixture.ridge")
    trace.append(bound)
    converged = len(trace) > 1 and trace[-1] - trace[-2] < tol
    if converged or len(trace) >= max_iterations:
      return state, trace, converged
    state = _m_step(sums, state.means, ridge, covariance)


def fit(mesh: jax.sharding.Mesh, x: np.ndarray, *, components: int = 2,
        covariance: str = "full", pca: int | str = "auto",
        ridge: float = 1e-4, starts: int = 10, tol: float = 1e-4,
        max_iterations: int = 100, seed: int = 0,
        labels: np.ndarray | None = None, space: Space | None = None,
        progress: Callable[..., None] | None = None) -> Mixture:
  """Fits a Gaussian mixture by EM; the best of several starts is kept.

  The ridge, times the mean variance of the kept directions (trace / P, before
  whitening), is added to every covariance; after whitening that is
  `ridge * mean(variances) / variances` on the diagonal. It is the exact
  M-step for rows blurred by Gaussian noise of that covariance Lambda, whose
  E-step takes tr(Lambda S_k^-1) / 2 off component k's log-density. With that
  term the bound never falls, which is asserted, to float32's 1e-6.

  Args:
    mesh: where the sums over rows are computed.
    x: [n, E] float32, finite; in id order (both sides of a pair are rows).
    components: K.
    covariance: "full", "tied" (one for all components) or "diag".
    pca: directions kept; see `prepare`.
    ridge: share of the mean variance added to every covariance, >= 0.
    starts: from k-means++ and a few Lloyd steps, each with its own seed.
    tol: stops when an iteration gains less than this, nats per row.
    max_iterations: EM steps of one start.
    seed: any int.
    labels: [n] ints below K: one start, from this partition of the rows; with
      max_iterations=1 that is one Gaussian per label, in closed form.
    space: what `prepare` returned for these rows, to fit them again.
    progress: called as tick(1, note) after each start.

  Returns:
    Mixture; `warnings` says what a person should know of the fit.

  Raises:
    NumericError: rows that are not finite, no variance, a likelihood that is
      not finite or falls.
    ConfigError: a bad knob, too few rows, or no start kept all components.
  """
  if covariance not in COVARIANCES:
    raise ConfigError(f"covariance {covariance!r} is unknown, wanted one of "
                      f"{', '.join(COVARIANCES)}; set "
                      "config.select.mixture.covariance")
  if starts < 1 or max_iterations < 1 or not ridge >= 0:
    raise ConfigError(f"starts={starts}, max_iterations={max_iterations}, "
                      f"ridge={ridge}; wanted 1 or more, 1 or more, 0 or more;"
                      " set config.select.mixture")
  space = space or prepare(mesh, x, pca=pca, covariance=covariance,
                           components=components)
  n, width = space.z.shape
  if labels is not None:
    labels = np.asarray(labels)
    if labels.shape != (n,) or not np.isin(labels, range(components)).all():
      raise ConfigError(f"labels have shape {labels.shape}, wanted [{n}] ints "
                        f"from 0 to {components - 1}")
  diagonal = ridge * space.variances.mean() / space.variances
  layout = (padded_chunks(mesh), chunk_rows(n))
  laid = (sharding.put(mesh, tiles(space.z, *layout), "pool", None, None),
          sharding.put(mesh, tiles(np.ones(n), *layout), "pool", None))
  program = _program(mesh, "diag" if covariance == "diag" else "full")
  e_step = lambda state: _e_step(program, mesh, laid, n, state, diagonal)

  best, bounds, reasons = None, [], []
  for number in range(1 if labels is not None else starts):
    rng = np.random.Generator(np.random.Philox(
        key=np.array([seed % 2**64, number], np.uint64)))
    state = None
    if labels is not None:
      state = _hard_start(space.z, labels, components, diagonal, covariance)
    else:
      some = np.arange(n)
      if n > START_ROWS:
        some = np.sort(rng.choice(n, START_ROWS, replace=False))
      # Distances before whitening: the large directions hold the clusters.
      parts = _k_means(space.z[some] * np.sqrt(space.variances), components,
                       rng)
      state = _hard_start(space.z[some], parts, components, diagonal,
                          covariance)
    try:
      if state is None:
        raise _Failed("a component had no rows to start from")
      result = _run(e_step, state, space, diagonal, covariance, tol,
                    max_iterations, rng)
      bounds.append(result[1][-1])
      if best is None or bounds[-1] > best[1][-1]:
        best = result
    except _Failed as error:
      bounds.append(np.nan)
      reasons.append(str(error))
    if progress:
      progress(1, f"bound {bounds[-1]:.4f}")
  if best is None:
    raise ConfigError(f"all {len(bounds)} starts failed: {reasons[-1]}; lower "
                      "config.select.mixture.components or pca, or set "
                      "covariance to 'tied' or 'diag'")
  state, trace, converged = best
  warnings = []
  if n < 40 * width:
    warnings.append(f"{n} rows for {width} directions, below 40 per direction:"
                    " the mixture may memorise rows; lower "
                    "config.select.mixture.pca")
  if not converged and max_iterations > 1:
    warnings.append(f"EM stopped after {len(trace)} iterations, still gaining "
                    f"more than {tol} per row; raise "
                    "config.select.mixture.max_iterations")
  if reasons:
    warnings.append(f"{len(reasons)} of {len(bounds)} starts failed: "
                    f"{reasons[-1]}")
  volume = -0.5 * np.log(space.variances).sum()
  return Mixture(space.mean, space.projection, space.variances,
                 state.log_weights, state.means, state.covariances,
                 np.array(trace) + volume, np.array(bounds) + volume,
                 space.explained, warnings)


# Reading a mixture.


def log_joint(mixture: Mixture, x: np.ndarray) -> np.ndarray:
  """[n, E] rows -> [n, K] float64 log(weight * density), nats.

  The density is that of the P kept directions before whitening. Fixed tiles,
  on the host: this decides the selection.
  """
  x = np.asarray(x)
  if x.ndim != 2 or x.shape[1] != mixture.mean.size:
    raise ConfigError(f"the mixture wants rows [n, {mixture.mean.size}], found "
                      f"shape {x.shape}")
  state = _State(mixture.log_weights, mixture.means, mixture.covariances)
  factors, log_det = _factors(mixture.covariances)
  constants = _constants(state, factors, log_det,
                         np.zeros(mixture.variances.size))
  constants = constants - 0.5 * np.log(mixture.variances).sum()
  z = project(mixture.mean, mixture.projection, x)
  out = np.empty((len(x), len(constants)))
  for k, (mean, factor) in enumerate(zip(mixture.means, factors)):
    if factor.ndim == 1:
      white = (z - mean) * factor
    else:
      white = project(mean, factor, z)
    out[:, k] = constants[k] - 0.5 * (white**2).sum(1)
  return out


def log_likelihood(mixture: Mixture, x: np.ndarray) -> np.ndarray:
  """[n, E] rows -> [n] float64 log-density, nats; see `log_joint`."""
  joint = log_joint(mixture, x)
  high = joint.max(axis=1)
  return high + np.log(np.exp(joint - high[:, None]).sum(axis=1))


def assign(mixture: Mixture, x: np.ndarray) -> np.ndarray:
  """[n, E] rows -> [n] int64, the most probable component."""
  return log_joint(mixture, x).argmax(axis=1)


def save(mixture: Mixture, path: Any) -> None:
  """Writes one .npz, no pickle, in place of what was there in one step."""
  arrays = mixture._asdict() | {"warnings": json.dumps(mixture.warnings)}
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  artifacts.write_bytes(path, buffer.getvalue())


def load(path: Any) -> Mixture:
  """Reads what `save` wrote.

  Raises:
    CorruptError: the file is damaged or something else.
  """
  try:
    with np.load(io.BytesIO(epath.Path(path).read_bytes()),
                 allow_pickle=False) as arrays:
      fields = {name: arrays[name] for name in Mixture._fields}
      return Mixture(**fields | {
          "explained": float(fields["explained"]),
          "warnings": json.loads(str(fields["warnings"]))})
  except (ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
    raise CorruptError(f"{path} is not a mixture ({error}); delete it and run "
                       "the stage again") from error
