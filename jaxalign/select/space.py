"""Rows in centred, reduced, whitened coordinates; the Gram is on the mesh."""

from typing import NamedTuple

import jax
import numpy as np

from jaxalign.errors import ConfigError, NumericError
from jaxalign.select import chunks, em, exact

TILE = 4096  # rows of one host product
WAVE = 1 << 18  # rows that lie on the devices at once


class Space(NamedTuple):
  """The whitened coordinates z = (x - mean) @ projection of all rows."""

  mean: np.ndarray  # [E] float64
  projection: np.ndarray  # [E, P] float64
  variances: np.ndarray  # [P] float64, of the rows before whitening
  explained: float  # share of the variance that the P directions hold
  z: np.ndarray  # [n, P] float32, unit variance


def project(
  mean: np.ndarray, projection: np.ndarray, x: np.ndarray
) -> np.ndarray:
  """(x - mean) @ projection [n, P] in float64, in tiles of TILE rows.

  The last tile is padded: a row's bits depend on nothing but the row.
  """
  out = np.empty((x.shape[0], projection.shape[1]))
  tile = np.zeros((TILE, x.shape[1]))
  for start in range(0, x.shape[0], TILE):
    part = x[start : start + TILE]
    tile[: len(part)] = part - mean
    tile[len(part) :] = 0
    out[start : start + TILE] = (tile @ projection)[: len(part)]
  return out


def _check_rows(x: np.ndarray, components: int) -> None:
  """Refuses rows that no mixture can be fitted to."""
  if x.ndim != 2:
    raise ConfigError(f"the mixture wants rows [n, E], found shape {x.shape}")
  if x.shape[0] < components or components < 1:
    raise ConfigError(
      f"{components} components need as many rows, found "
      f"{x.shape[0]}; set config.select.mixture.components"
    )
  bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
  if bad.size:
    named = ", ".join(str(i) for i in bad[:5])
    more = ", ..." if bad.size > 5 else ""
    raise NumericError(
      f"{bad.size} of {x.shape[0]} embeddings are not finite "
      f"(rows {named}{more}); look at the embedding of those "
      "records"
    )
  if (x == x[:1]).all():
    raise NumericError(
      f"all {x.shape[0]} embeddings are the same vector; look at config.embed"
    )


def gram(
  mesh: jax.sharding.Mesh, x: np.ndarray, mean: np.ndarray | None = None
) -> np.ndarray:
  """Sum of outer products [E, E]: float32 chunks, exactly added.

  Rows pass in waves, so the devices never hold more than a wave of them.

  Args:
    mesh: the mesh.
    x: [n, E] float32.
    mean: [E] float64 that rows are less by; None: nothing.
  """
  total = np.zeros((x.shape[1],) * 2)
  for start in range(0, len(x), WAVE):
    part = x[start : start + WAVE]
    if mean is not None:
      part = chunks.less(part, mean)
    total += em.total_of(mesh, exact.place(mesh, part))
  return total


def prepare(
  mesh: jax.sharding.Mesh,
  x: np.ndarray,
  *,
  pca: int | str = "auto",
  covariance: str = "full",
  components: int = 2,
) -> Space:
  """Centres, keeps the leading directions and whitens them.

  Args:
    mesh: where the covariance is computed.
    x: [n, E] float32, finite, in id order.
    pca: directions kept: "auto" is min(64, n // 40), 0 keeps all (for
      "diag" and "low_rank" the axes of x themselves, which a rotation would
      change).
      Directions with less than 1e-10 of the largest variance are dropped.
    covariance: of the mixture; see `pca`.
    components: of the mixture; only checked against n.

  Raises:
    NumericError: rows that are not finite (named), or all equal.
    ConfigError: fewer rows than components, or a bad `pca`.
  """
  x = np.asarray(x)
  _check_rows(x, components)
  n, width = x.shape
  if pca == "auto":
    keep = max(1, min(64, n // 40, width))
  elif (
    isinstance(pca, (int, np.integer))
    and not isinstance(pca, bool)
    and (0 <= pca <= width)
  ):
    keep = int(pca) or width
  else:
    raise ConfigError(
      f"pca is {pca!r}, wanted 'auto' or 0 to {width}, the "
      "width of the embedding; set config.select.mixture.pca"
    )
  mean = x.mean(axis=0, dtype=np.float64)
  if pca == 0 and covariance in ("diag", "low_rank"):
    directions, total = np.eye(width), None
  else:
    products = gram(mesh, x, mean)
    values, vectors = np.linalg.eigh((products + products.T) / 2)
    directions = vectors[:, np.argsort(-values, kind="stable")[:keep]]
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(
      directions[largest, np.arange(directions.shape[1])]
    )
    total = np.trace(products) / n
  # The variances are measured in float64, not read off the float32 Gram: its
  # rounding would be the variance of a direction in which nothing varies.
  z = np.empty((n, directions.shape[1]), np.float32)
  square = np.zeros(directions.shape[1])
  for start in range(0, n, TILE):
    part = project(mean, directions, x[start : start + TILE])
    square += (part**2).sum(axis=0)
    z[start : start + TILE] = part
  variances = square / n
  kept = variances > 1e-10 * variances.max()
  scale = 1 / np.sqrt(variances[kept])
  if not kept.all():
    z = z[:, kept]
  z *= np.float32(scale)
  return Space(
    mean,
    directions[:, kept] * scale,
    variances[kept],
    1.0 if total is None else float(min(1.0, variances[kept].sum() / total)),
    z,
  )
