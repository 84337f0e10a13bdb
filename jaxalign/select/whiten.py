"""Rows in centred, reduced, whitened coordinates; the Gram is on the mesh."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.select import exact
from jaxalign.select.em import CHUNK, KNOB
from jaxalign.select.topk import few_ids

LABELS = "labels"  # components: one Gaussian per label


class MixtureOptions(NamedTuple):
  """How a mixture is fitted: `config.select.mixture`."""

  components: int | str = 2  # K; or "labels", one Gaussian per label
  covariance: str = "full"  # or "tied" (one for all components), "diag"
  pca: int | str = "auto"  # directions kept; see `whiten`
  ridge: float = 1e-4  # fraction of the pooled covariance added to each
  starts: int = 10  # from k-means++ and a few Lloyd steps, each its own seed
  tol: float = 1e-4  # EM stops when it gains less, nats per row
  max_iterations: int = 100  # of one start


class Space(NamedTuple):
  """The whitened coordinates z = (x - mean) @ projection of all rows."""

  mean: np.ndarray  # [E] float64
  projection: np.ndarray  # [E, P] float64
  variances: np.ndarray  # [P] float64, of the rows before whitening
  explained: float  # fraction of the variance that the P directions hold
  z: np.ndarray  # [n, P] float32, unit variance


def centred(x: np.ndarray, mean: np.ndarray) -> Iterator:
  """(rows, x[rows] - mean) by CHUNK rows, the last filled with zeros: the
  bits of a row's product depend on nothing but the row."""
  chunk = np.zeros((CHUNK, x.shape[1]))
  for start in range(0, len(x), CHUNK):
    some = x[start : start + CHUNK]
    chunk[: len(some)] = some - mean
    chunk[len(some) :] = 0
    yield slice(start, start + len(some)), chunk


def _check_rows(x: np.ndarray, components: int) -> None:
  """Refuses rows that no mixture can be fitted to."""
  if x.ndim != 2:
    raise ConfigError(f"the mixture wants rows [n, E], found shape {x.shape}")
  if x.shape[0] < components or components < 1:
    raise ConfigError(
      f"{components} components need as many rows, found "
      f"{x.shape[0]}; set {KNOB}.components"
    )
  chunks = [x[s : s + CHUNK] for s in range(0, len(x), CHUNK)]
  finite = np.concatenate([np.isfinite(some).all(axis=1) for some in chunks])
  if not finite.all():
    bad = np.flatnonzero(~finite)
    raise NumericError(
      f"{bad.size} of {x.shape[0]} embeddings are not finite "
      f"(rows {few_ids(bad)}); look at the embedding of those records"
    )
  if all((some == x[:1]).all() for some in chunks):
    raise NumericError(
      f"all {x.shape[0]} embeddings are the same vector; look at config.embed"
    )


def _directions(pca: int | str, n: int, width: int) -> int:
  """How many directions `pca` keeps of [n, width] rows."""
  if pca == "auto":
    return max(1, min(64, n // 40, width))
  whole = isinstance(pca, (int, np.integer)) and not isinstance(pca, bool)
  if not whole or not 0 <= pca <= width:
    raise ConfigError(
      f"pca is {pca!r}, wanted 'auto' or 0 to {width}, the "
      f"width of the embedding; set {KNOB}.pca"
    )
  return int(pca) or width


def whiten(
  mesh: jax.sharding.Mesh, x: np.ndarray, options: MixtureOptions
) -> Space:
  """Centres, keeps the leading directions and whitens them.

  Args:
    mesh: where the covariance is computed.
    x: [n, E] float32, finite, in id order; it may be mapped from a file.
    options: `pca`, the directions kept: "auto" is min(64, n // 40), 0 keeps
      all (with "diag" the axes of x themselves, which a rotation would
      change). Directions with less than 1e-10 of the largest variance are
      dropped.

  Raises:
    NumericError: rows that are not finite (named), or all equal.
    ConfigError: fewer rows than components, or a bad `pca`.
  """
  _check_rows(x, options.components if options.components != LABELS else 2)
  n, width = x.shape
  keep = _directions(options.pca, n, width)
  mean = x.mean(axis=0, dtype=np.float64)
  if options.pca == 0 and options.covariance == "diag":
    directions, total = np.eye(width), None
  else:
    products = exact.gram_of(mesh, x, mean)
    values, vectors = np.linalg.eigh((products + products.T) / 2)
    directions = vectors[:, np.argsort(-values, kind="stable")[:keep]]
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[largest, np.arange(keep)])
    total = np.trace(products) / n
  # The variances are measured in float64, not read off the float32 Gram: its
  # rounding would be the variance of a direction in which nothing varies.
  z = np.empty((n, keep), np.float32)
  square = np.zeros(keep)
  for rows, chunk in centred(x, mean):
    along = (chunk @ directions)[: rows.stop - rows.start]
    square += (along**2).sum(axis=0)
    z[rows] = along
  variances = square / n
  kept = variances > 1e-10 * variances.max()
  scale = 1 / np.sqrt(variances[kept])
  z = z if kept.all() else z[:, kept]
  z *= np.float32(scale)
  variances = variances[kept]
  explained = 1.0 if total is None else min(1.0, variances.sum() / total)
  return Space(
    mean, directions[:, kept] * scale, variances, float(explained), z
  )
