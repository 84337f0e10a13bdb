"""A Gaussian mixture over the pool, fitted by EM on the mesh.

What decides a selection must be the same bits on any mesh: sums over rows are
exact over fixed chunks (`exact`), and parameters, factors and the final
log-likelihood are float64 on the host. (The same bits on every mesh, that is;
another kind of accelerator or host processor rounds in its own way.)
"""

from collections.abc import Callable
import io
import json
from typing import Any, NamedTuple
import zipfile

from etils import epath
import jax
import numpy as np

from jaxalign import artifacts
from jaxalign.errors import ConfigError, CorruptError, NumericError
from jaxalign.select import em, gaussians
from jaxalign.select import starts as begin
from jaxalign.select.gaussians import COVARIANCES, KNOB, State
from jaxalign.select.scorer import make_scorer
from jaxalign.select.space import prepare, project, Space

__all__ = [
  "Mixture",
  "Space",
  "assign",
  "fit",
  "load",
  "log_joint",
  "log_likelihood",
  "make_scorer",
  "prepare",
  "project",
  "save",
]
LABELS = "labels"  # components: one Gaussian per label


class Mixture(NamedTuple):
  """K Gaussians in whitened coordinates, float64 host arrays, and the fit."""

  mean: np.ndarray  # [E]
  projection: np.ndarray  # [E, P]; z = (x - mean) @ projection
  variances: np.ndarray  # [P], per direction before whitening
  log_weights: np.ndarray  # [K]
  means: np.ndarray  # [K, P]
  covariances: np.ndarray  # [K, P, P]; [K, P] where diagonal or of low rank
  trace: np.ndarray  # [iterations], mean bound per row, the start kept
  bounds: np.ndarray  # [starts], where each ended; NaN where it failed
  explained: float
  warnings: list[str]
  loadings: np.ndarray  # [K, P, q], W of diag(covariances) + W W^T; else q 0


# The fit.


def components_of(value: Any) -> int | str:
  """A knob's text or number -> K, or "labels".

  Raises:
    ConfigError: neither.
  """
  if value == LABELS:
    return LABELS
  try:
    count = int(str(value))
  except ValueError:
    count = 0
  if count < 1 or isinstance(value, bool):
    raise ConfigError(
      f"select.mixture.components={value}, wanted 1 or more, "
      f"or '{LABELS}'; set {KNOB}.components"
    )
  return count


class _Failed(Exception):
  """A start that lost a component twice; another start may do better."""


def least_rows(covariance: str, width: int, rank: int) -> int:
  """Rows below which a component's covariance is mostly ridge."""
  return {"full": width + 1, "low_rank": rank + 2}.get(covariance, 2)


def _run(
  sweep: Callable,
  state: State,
  space: Space,
  ridge: float,
  covariance: str,
  tol: float,
  max_iterations: int,
  rng: np.random.Generator,
) -> tuple[State, list[float], bool]:
  """EM from one start -> (last state, its trace, whether it converged)."""
  n, width = space.z.shape
  # Fewer rows would leave a bound that is high for the ridge's sake only.
  least = least_rows(covariance, width, state.loadings.shape[-1])
  trace, reseeded = [], False
  while True:
    state = em.seen(state)
    sums, bound = sweep(state)
    if not np.isfinite(bound):
      raise NumericError(
        f"the likelihood is {bound} at iteration "
        f"{len(trace)}; raise {KNOB}.ridge"
      )
    small = int(sums.count.argmin())
    if sums.count[small] < least and max_iterations > 1:
      found = (
        f"a component kept {sums.count[small]:.1f} of {n} rows, below "
        f"the {least} that {covariance} covariances in {width} "
        "directions need"
      )
      if reseeded:
        raise _Failed(found)
      state = begin.reseed(state, small, space.z, ridge, rng)
      reseeded, trace = True, []
      continue
    if trace and bound < trace[-1] - 1e-6 * (abs(trace[-1]) + width):
      raise NumericError(
        f"the likelihood fell from {trace[-1]} to {bound} at "
        f"iteration {len(trace)}; raise {KNOB}.ridge"
      )
    trace.append(bound)
    converged = len(trace) > 1 and trace[-1] - trace[-2] < tol
    if converged or len(trace) >= max_iterations:
      return state, trace, converged
    state = em.m_step(sums, state, ridge, covariance)


def _check_knobs(
  covariance: str, starts: int, max_iterations: int, ridge: float, rank: int
) -> None:
  if covariance not in COVARIANCES:
    raise ConfigError(
      f"covariance {covariance!r} is unknown, wanted one of "
      f"{', '.join(COVARIANCES)}; set {KNOB}.covariance"
    )
  if starts < 1 or max_iterations < 1 or not 0 <= ridge < np.inf:
    raise ConfigError(
      f"starts={starts}, max_iterations={max_iterations}, "
      f"ridge={ridge}; wanted 1 or more, 1 or more, 0 or more;"
      f" set {KNOB}"
    )
  if covariance == "low_rank" and rank < 1:
    raise ConfigError(f"rank is {rank}, wanted 1 or more; set {KNOB}.rank")


def _checked_labels(
  labels: np.ndarray, n: int, components: int | str, covariance: str
) -> tuple[np.ndarray, int]:
  """[n] int64 labels and the number of components they are read as."""
  labels = np.asarray(labels)
  wanted = LABELS if components == LABELS else f"0 to {components} - 1"
  if (
    labels.shape != (n,)
    or labels.dtype.kind not in "biu"
    or (labels < 0).any()
    or (components != LABELS and (labels >= components).any())
  ):
    raise ConfigError(
      f"labels have shape {labels.shape} and type "
      f"{labels.dtype}, wanted [{n}] ints from 0 ({wanted}); "
      f"set {KNOB}.components"
    )
  labels = labels.astype(np.int64)
  if components != LABELS:
    return labels, components
  if covariance == "low_rank":
    raise ConfigError(
      "components='labels' is a closed form, which low_rank "
      f"covariances have not; set {KNOB}.covariance to full, "
      "tied or diag"
    )
  count = np.bincount(labels)
  if len(count) < 2 or count.min() < 2:
    named = ", ".join(f"{c} of label {i}" for i, c in enumerate(count))
    raise ConfigError(
      f"the rows have {named}; one Gaussian per label wants "
      "two labels or more and two rows of each; set "
      f"{KNOB}.components to a number"
    )
  return labels, len(count)


def fit(
  mesh: jax.sharding.Mesh,
  x: np.ndarray,
  *,
  components: int | str = 2,
  covariance: str = "full",
  pca: int | str = "auto",
  ridge: float = 1e-4,
  rank: int = 8,
  starts: int = 10,
  tol: float = 1e-4,
  max_iterations: int = 100,
  seed: int = 0,
  labels: np.ndarray | None = None,
  space: Space | None = None,
  share: bool = True,
  progress: Callable[..., None] | None = None,
) -> Mixture:
  """Fits a Gaussian mixture by EM; the best of several starts is kept.

  `ridge` times the pooled covariance of the rows is added to each component's:
  shrinkage towards the pooled shape, and in whitened space simply `ridge` on
  the diagonal. So it means the same whatever the units and the spectrum of the
  embedding, where a share of the mean variance would flatten the narrow
  directions of a steep one. It is the exact M-step for rows blurred by noise
  of that covariance, whose bound never falls (`em`); that is asserted, to
  float32's 1e-6.

  Args:
    mesh: where the sums over rows are computed.
    x: [n, E] float32, finite; in id order (both sides of a pair are rows).
    components: K; or "labels", one Gaussian per label of `labels` in closed
      form, no EM: `starts`, `tol` and `max_iterations` are not read.
    covariance: "full", "tied" (one for all components), "diag", or "low_rank"
      (diagonal plus `rank` directions, a mixture of factor analysers).
    pca: directions kept; see `prepare`.
    ridge: share of the pooled covariance added to every covariance, >= 0.
    rank: q of "low_rank", at least 1; at most P - 1 is used.
    starts: from k-means++ and a few Lloyd steps, each with its own seed.
    tol: stops when an iteration gains less than this, nats per row.
    max_iterations: EM steps of one start.
    seed: any int.
    labels: [n] ints from 0. With a number of components: one start, from this
      partition of the rows.
    space: what `prepare` returned for these rows, to fit them again.
    share: as of `em.sweep_of`; False computes each component by itself.
    progress: called as tick(1, note) after each start.

  Returns:
    Mixture; `warnings` says what a person should know of the fit.

  Raises:
    NumericError: rows that are not finite, no variance, a likelihood that is
      not finite or falls.
    ConfigError: a bad knob, too few rows, one label only, or no start kept
      all components.
  """
  _check_knobs(covariance, starts, max_iterations, ridge, rank)
  closed = components == LABELS
  if closed and labels is None:
    raise ConfigError(
      "components='labels' needs the label of every row; "
      f"pass labels or set {KNOB}.components to a number"
    )
  if not closed and (isinstance(components, (bool, str)) or components < 1):
    raise ConfigError(
      f"components is {components!r}, wanted 1 or more or "
      f"'labels'; set {KNOB}.components"
    )
  if labels is not None:
    labels, components = _checked_labels(labels, len(x), components, covariance)
  space = space or prepare(
    mesh, x, pca=pca, covariance=covariance, components=components
  )
  n, width = space.z.shape
  rank = max(1, min(rank, width - 1)) if covariance == "low_rank" else 0
  sweep = em.sweep_of(mesh, space.z, ridge, covariance, share)
  if closed:
    max_iterations = 1

  best, bounds, reasons = None, [], []
  for number in range(1 if labels is not None else starts):
    rng = np.random.Generator(
      np.random.Philox(key=np.array([seed % 2**64, number], np.uint64))
    )
    rows, parts = space.z, labels
    if labels is None:
      if n > begin.ROWS:
        rows = rows[np.sort(rng.choice(n, begin.ROWS, replace=False))]
      # Distances before whitening: the large directions hold the clusters.
      parts = begin.k_means(rows * np.sqrt(space.variances), components, rng)
    state = begin.partition(rows, parts, components, ridge, covariance, rank)
    try:
      if state is None:
        raise _Failed("a component had no rows to start from")
      result = _run(
        sweep, state, space, ridge, covariance, tol, max_iterations, rng
      )
      bounds.append(result[1][-1])
      if best is None or bounds[-1] > best[1][-1]:
        best = result
    except _Failed as error:
      bounds.append(np.nan)
      reasons.append(str(error))
    if progress:
      progress(1, f"bound {bounds[-1]:.4f}")
  if best is None:
    raise ConfigError(
      f"all {len(bounds)} starts failed: {reasons[-1]}; lower "
      f"{KNOB}.components or pca, or set covariance to "
      "'tied', 'diag' or 'low_rank'"
    )
  state, trace, converged = best
  warnings = []
  if n < 40 * width:
    warnings.append(
      f"{n} rows for {width} directions, below 40 per direction:"
      f" the mixture may memorise rows; lower {KNOB}.pca"
    )
  count = n * np.exp(state.log_weights.min())
  least = least_rows(covariance, width, rank)
  if closed and count < least:
    warnings.append(
      f"a label has {count:.0f} rows, below the {least} that "
      f"{covariance} covariances in {width} directions need: "
      f"its covariance is mostly ridge; lower {KNOB}.pca"
    )
  if not converged and max_iterations > 1:
    warnings.append(
      f"EM stopped after {len(trace)} iterations, still gaining "
      f"more than {tol} per row; raise {KNOB}.max_iterations"
    )
  if reasons:
    warnings.append(
      f"{len(reasons)} of {len(bounds)} starts failed: {reasons[-1]}"
    )
  volume = -0.5 * np.log(space.variances).sum()
  return Mixture(
    space.mean,
    space.projection,
    space.variances,
    state.log_weights,
    state.means,
    state.covariances,
    np.array(trace) + volume,
    np.array(bounds) + volume,
    space.explained,
    warnings,
    state.loadings,
  )


# Reading a mixture.


def state_of(mixture: Mixture) -> State:
  """The parameters alone."""
  return State(
    mixture.log_weights, mixture.means, mixture.covariances, mixture.loadings
  )


def log_joint(mixture: Mixture, x: np.ndarray) -> np.ndarray:
  """[n, E] rows -> [n, K] float64 log(weight * density), nats.

  The density is that of the P kept directions before whitening. Fixed tiles,
  on the host: this decides the selection.
  """
  x = np.asarray(x)
  if x.ndim != 2 or x.shape[1] != mixture.mean.size:
    raise ConfigError(
      f"the mixture wants rows [n, {mixture.mean.size}], found shape {x.shape}"
    )
  z = project(mixture.mean, mixture.projection, x)
  return gaussians.log_joint(state_of(mixture), z, project) - (
    0.5 * np.log(mixture.variances).sum()
  )


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
    with np.load(
      io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False
    ) as arrays:
      fields = {
        name: arrays[name] for name in Mixture._fields if name != "loadings"
      }
      shape = fields["means"].shape + (0,)  # older files have no loadings
      fields["loadings"] = (
        arrays["loadings"] if "loadings" in arrays else np.zeros(shape)
      )
      return Mixture(
        **fields
        | {
          "explained": float(fields["explained"]),
          "warnings": json.loads(str(fields["warnings"])),
        }
      )
  except (ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
    raise CorruptError(
      f"{path} is not a mixture ({error}); delete it and run the stage again"
    ) from error
