"""A Gaussian mixture over the pool, fitted by EM on the mesh.

What decides a selection must be the same bits on any mesh: sums over rows are
exact over fixed chunks (`exact`), and parameters, factors and the final
log-likelihood are float64 on the host. (The same bits on every mesh, that is;
another kind of accelerator or host processor rounds in its own way.)

scikit-learn's GaussianMixture is not used: it runs on one host, in an order
that follows its threads, and knows no closed form for given labels.
"""

from collections.abc import Callable
import io
import json
from typing import Any, NamedTuple
import zipfile

from etils import epath
import jax
import numpy as np

from jaxalign.core import disk
from jaxalign.core.errors import ConfigError, CorruptError, NumericError
from jaxalign.select import em
from jaxalign.select.em import Gaussians, KNOB
from jaxalign.select.whiten import (
  centred,
  LABELS,
  MixtureOptions,
  Space,
  whiten,
)

START_ROWS = 16384  # k-means reads at most so many rows
LLOYD_STEPS = 5


class Mixture(NamedTuple):
  """K Gaussians in whitened coordinates, float64 host arrays, and the fit."""

  mean: np.ndarray  # [E]
  projection: np.ndarray  # [E, P]; z = (x - mean) @ projection
  variances: np.ndarray  # [P], per direction before whitening
  log_weights: np.ndarray  # [K]
  means: np.ndarray  # [K, P]
  covariances: np.ndarray  # [K, P, P]; [K, P] where diagonal
  trace: np.ndarray  # [iterations], mean bound per row, of the best start
  bounds: np.ndarray  # [starts], where each ended; NaN where it failed
  explained: float
  warnings: list[str]


def _k_means(
  x: np.ndarray, components: int, rng: np.random.Generator
) -> np.ndarray:
  """k-means++ and a few Lloyd steps on [n, P]; returns [n] labels."""

  def distances(centres):
    product = x @ centres.T
    square = (x**2).sum(1)[:, None] - 2 * product + (centres**2).sum(1)[None]
    return np.maximum(square, 0)

  centres = x[rng.integers(len(x))][None]
  near = np.full(len(x), np.inf)
  while len(centres) < components:
    near = np.minimum(near, distances(centres[-1:])[:, 0])
    total = near.sum()
    chance = near / total if total > 0 else None  # fewer distinct rows than K
    centres = np.append(centres, x[rng.choice(len(x), p=chance)][None], axis=0)
  labels = distances(centres).argmin(1)
  for _ in range(LLOYD_STEPS):
    for k in range(components):
      if (labels == k).any():
        centres[k] = x[labels == k].mean(0)
    labels = distances(centres).argmin(1)
  return labels


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


class _StartFailed(Exception):
  """A component kept too few rows twice; another start may do better."""


def _least_rows(options: MixtureOptions, width: int) -> int:
  """Rows below which a component's covariance is mostly ridge."""
  return width + 1 if options.covariance == "full" else 2


def _first(space, labels, options, rng) -> Gaussians:
  """Parameters of a partition: the given one, or k-means of some rows."""
  rows = space.z
  if labels is None:
    if len(rows) > START_ROWS:
      rows = rows[np.sort(rng.choice(len(rows), START_ROWS, replace=False))]
    # Distances before whitening: the large directions hold the clusters.
    scaled = rows * np.sqrt(space.variances)
    labels = _k_means(scaled, options.components, rng)
  g = em.partition(
    rows, labels, options.components, options.ridge, options.covariance
  )
  if g is None:
    raise _StartFailed("a component had no rows to start from")
  return g


def _run(sweep, g, z, options, rng) -> tuple[Gaussians, list[float]]:
  """EM from the parameters g on whitened rows [n, P] -> (g, its trace)."""
  width = z.shape[1]
  # Fewer rows would leave a bound that is high for the ridge's sake only.
  least = _least_rows(options, width)
  trace, seeded = [], False
  while True:
    g = em.rounded(g)
    moments, bound = sweep(g)
    if not np.isfinite(bound):
      raise NumericError(
        f"the likelihood is {bound} at iteration "
        f"{len(trace)}; lower {KNOB}.pca or raise the ridge"
      )
    small = int(moments.count.argmin())
    if moments.count[small] < least and options.max_iterations > 1:
      if seeded:
        raise _StartFailed(
          f"a component kept {moments.count[small]:.1f} of {len(z)} rows, "
          f"below the {least} that {options.covariance} covariances in "
          f"{width} directions need"
        )
      g = em.reseeded(g, small, z[rng.integers(len(z))], options.ridge)
      seeded, trace = True, []
      continue
    if trace and bound < trace[-1] - 1e-6 * (abs(trace[-1]) + width):
      raise NumericError(
        f"the likelihood fell from {trace[-1]} to {bound} at "
        f"iteration {len(trace)}; lower {KNOB}.pca or raise the ridge"
      )
    trace.append(bound)
    if _converged(trace, options) or len(trace) >= options.max_iterations:
      return g, trace
    g = em.m_step(moments, g.means, options.ridge, options.covariance)


def _converged(trace: list[float], options: MixtureOptions) -> bool:
  return len(trace) > 1 and trace[-1] - trace[-2] < options.tol


def _labels_of(options: MixtureOptions, labels: Any) -> np.ndarray:
  """[n] int64 labels that the components can be fitted to."""
  if labels is None:
    raise ConfigError(
      "components='labels' needs the label of every row; "
      f"pass labels or set {KNOB}.components to a number"
    )
  labels = np.asarray(labels).astype(np.int64)
  count = np.bincount(labels)
  if options.components == LABELS and (len(count) < 2 or count.min() < 2):
    each = ", ".join(f"{c} of label {i}" for i, c in enumerate(count))
    raise ConfigError(
      f"the rows have {each}; one Gaussian per label wants "
      "two labels or more and two rows of each; set "
      f"{KNOB}.components to a number"
    )
  return labels


def fit_mixture(
  mesh: jax.sharding.Mesh,
  x: np.ndarray,
  options: MixtureOptions = MixtureOptions(),
  *,
  seed: int = 0,
  labels: np.ndarray | None = None,
  space: Space | None = None,
  progress: Callable[..., None] | None = None,
) -> Mixture:
  """Fits a Gaussian mixture by EM; the best of several starts is kept.

  The ridge shrinks each covariance towards the pooled shape of the rows, so
  it means the same whatever the units and the spectrum of the embedding. It
  is the exact M-step for rows blurred by noise of that covariance, whose
  bound never falls (`em`); that is asserted, to float32's 1e-6.

  Args:
    mesh: where the sums over rows are computed.
    x: [n, E] float32, finite; in id order (both sides of a pair are rows).
    options: checked by the command; with components="labels" there is no EM,
      but a closed form: `starts`, `tol` and `max_iterations` are not read.
    seed: any int.
    labels: [n] ints from 0. With a number of components: one start, from this
      partition of the rows.
    space: what `whiten` returned for these rows, to fit them again.
    progress: called as tick(1, note) after each start.

  Returns:
    Mixture; its `warnings` are for a person who reads the fit.

  Raises:
    NumericError: rows that are not finite, no variance, a likelihood that is
      not finite or falls.
    ConfigError: too few rows, one label only, or no start kept all components.
  """
  closed = options.components == LABELS
  if closed or labels is not None:
    labels = _labels_of(options, labels)
    options = options._replace(starts=1)
  if closed:
    count = int(labels.max()) + 1
    options = options._replace(components=count, max_iterations=1)
  space = space or whiten(mesh, x, options)
  sweep = em.sweep_of(mesh, space.z, options.ridge, options.covariance)
  best, bounds, reasons = None, [], []
  for number in range(options.starts):
    key = np.array([seed % 2**64, number], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    try:
      first = _first(space, labels, options, rng)
      run = _run(sweep, first, space.z, options, rng)
      bounds.append(run[1][-1])
      if best is None or bounds[-1] > best[1][-1]:
        best = run
    except _StartFailed as error:
      bounds.append(np.nan)
      reasons.append(str(error))
    if progress:
      progress(1, f"bound {bounds[-1]:.4f}")
  if best is None:
    raise ConfigError(
      f"all {len(bounds)} starts failed: {reasons[-1]}; lower "
      f"{KNOB}.components or pca, or set covariance to 'tied' or 'diag'"
    )
  g, trace = best
  warnings = _warnings(g, trace, space.z.shape, options)
  if reasons:
    warnings.append(
      f"{len(reasons)} of {len(bounds)} starts failed: {reasons[-1]}"
    )
  volume = -0.5 * np.log(space.variances).sum()
  curves = np.array(trace) + volume, np.array(bounds) + volume
  return Mixture(*space[:3], *g, *curves, space.explained, warnings)


def _warnings(g, trace, shape, options) -> list[str]:
  """What to look at in a fit to rows of this shape."""
  (n, width), out = shape, []
  if n < 40 * width:
    out.append(
      f"{n} rows for {width} directions, below 40 per direction:"
      f" the mixture may memorise rows; lower {KNOB}.pca"
    )
  fewest = n * np.exp(g.log_weights.min())
  least = _least_rows(options, width)
  if options.max_iterations == 1:
    if fewest < least:
      out.append(
        f"a label has {fewest:.0f} rows, below the {least} that "
        f"{options.covariance} covariances in {width} directions need: "
        f"its covariance is mostly ridge; lower {KNOB}.pca"
      )
  elif not _converged(trace, options):
    out.append(
      f"EM stopped after {len(trace)} iterations, still gaining "
      f"more than {options.tol} per row; raise max_iterations"
    )
  return out


def log_joint(mixture: Mixture, x: np.ndarray) -> np.ndarray:
  """[n, E] rows -> [n, K] float64 log(weight * density), nats.

  The density is that of the P kept directions before whitening. In chunks, so
  `x` may be mapped from a file; on the host: this decides the selection.
  """
  if x.ndim != 2 or x.shape[1] != mixture.mean.size:
    raise ConfigError(
      f"the mixture wants rows [n, {mixture.mean.size}], found shape {x.shape}"
    )
  g = Gaussians(mixture.log_weights, mixture.means, mixture.covariances)
  factors = em.factors_of(g)
  volume = 0.5 * np.log(mixture.variances).sum()
  out = np.empty((len(x), len(g.means)))
  for rows, chunk in centred(x, mixture.mean):
    z = chunk @ mixture.projection
    joint = em.log_joint(factors, g.means, z) - volume
    out[rows] = joint[: rows.stop - rows.start]
  return out


def log_likelihood(mixture: Mixture, x: np.ndarray) -> np.ndarray:
  """[n, E] rows -> [n] float64 log-density, nats; see `log_joint`."""
  joint = log_joint(mixture, x)
  high = joint.max(axis=1)
  return high + np.log(np.exp(joint - high[:, None]).sum(axis=1))


def assign(mixture: Mixture, x: np.ndarray) -> np.ndarray:
  """[n, E] rows -> [n] int64, the most probable component."""
  return log_joint(mixture, x).argmax(axis=1)


def save_mixture(mixture: Mixture, path: Any) -> None:
  """Writes one .npz, no pickle, in place of what was there in one step."""
  arrays = mixture._asdict() | {"warnings": json.dumps(mixture.warnings)}
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  disk.write_bytes(path, buffer.getvalue())


def load_mixture(path: Any) -> Mixture:
  """Reads what `save_mixture` wrote.

  Raises:
    CorruptError: the file is damaged or something else.
  """
  try:
    buffer = io.BytesIO(epath.Path(path).read_bytes())
    with np.load(buffer, allow_pickle=False) as arrays:
      fields = {name: arrays[name] for name in Mixture._fields}
    warnings = json.loads(str(fields["warnings"]))
    explained = float(fields["explained"])
    return Mixture(**fields | dict(warnings=warnings, explained=explained))
  except (ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
    raise CorruptError(
      f"{path} is not a mixture ({error}); delete it and run the stage again"
    ) from error
