"""k-means over the rows, and greedy methods run inside its clusters."""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import ConfigError
from jaxalign.select.pool import Selection
from jaxalign.select.samplers import basic
from jaxalign.select.samplers import rows as rows_lib
from jaxalign.select.topk import id_hash, uniform

_WIDE = 128  # centres compared with the rows at once
_STEPS = 10  # of Lloyd
SMALL = 2048  # rows of a cluster that is never too large
BLOCKS = (
  "set config.select.kwargs.blocks, or more of them, to run it inside clusters"
)


def _closest(centres, squares, x):
  """[rows] int32, the nearest centre; of equals the first."""
  width = x.shape[1]

  def compare(best, block):
    value, index = best
    one, square, start = block
    distance = square[None] - 2 * jnp.einsum(
      "rw,cw->rc", x, one, precision=jax.lax.Precision.HIGHEST
    )
    at = jnp.argmin(distance, axis=1)
    low = jnp.min(distance, axis=1)
    better = low < value
    return (
      jnp.where(better, low, value),
      jnp.where(better, at.astype(jnp.int32) + start, index),
    ), None

  blocks = centres.reshape(-1, _WIDE, width)
  first = (jnp.full_like(x[:, 0], jnp.inf), jnp.zeros_like(x[:, 0], jnp.int32))
  starts = jnp.arange(len(blocks), dtype=jnp.int32) * _WIDE
  return jax.lax.scan(
    compare, first, (blocks, squares.reshape(-1, _WIDE), starts)
  )[0][1]


def assign(placed: rows_lib.Placed, centres: np.ndarray) -> np.ndarray:
  """[N] int64, the nearest of the [K, W] centres; 2NKW flops."""
  more = -len(centres) % _WIDE
  squares = np.pad(
    (np.float64(centres) ** 2).sum(1), (0, more), constant_values=np.inf
  )
  padded = np.pad(centres, ((0, more), (0, 0)))
  return rows_lib.by_row(_closest, placed, padded, squares).astype(np.int64)


def _means(
  x: np.ndarray, labels: np.ndarray, centres: np.ndarray
) -> np.ndarray:
  """Means of the parts, summed in row order; an empty part stays put."""
  order = np.argsort(labels, kind="stable")
  names, starts = np.unique(labels[order], return_index=True)
  sums = np.add.reduceat(x[order], starts, axis=0, dtype=np.float64)
  counts = np.diff(np.append(starts, len(x)))
  out = np.float64(centres)
  out[names] = sums / counts[:, None]
  return out


def k_means(
  x: np.ndarray, ids: np.ndarray, clusters: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Lloyd's k-means -> labels [N] int64 and centres [K, W] float64.

  It starts from rows drawn by a hash of their ids, takes at most ten steps on
  a sample of max(20,000, 32 K) rows, and then assigns every row: 2NKW
  flops and no more than N x 128 numbers at once.
  """
  n = len(x)
  if isinstance(clusters, bool) or not 1 <= clusters <= n:
    raise ConfigError(
      f"{clusters} clusters of {n} rows, wanted 1 to {n}; set "
      "config.select.kwargs"
    )
  draw = np.argsort(uniform(seed, ids, "k_means"), kind="stable")
  centres = np.float64(x[draw[:clusters]])
  some = np.sort(draw[: max(20_000, 32 * clusters)])
  part = x[some]
  placed = rows_lib.place(part)
  labels = None
  for _ in range(_STEPS):
    last, labels = labels, assign(placed, centres)
    if last is not None and (last == labels).all():
      break
    centres = _means(part, labels, centres)
  return assign(rows_lib.place(x), centres), centres


def most_rows(n: int, clusters: int) -> int:
  """Rows of the largest cluster: twice the mean, or what is always small."""
  return max(math.ceil(2 * n / clusters), SMALL)


def cut(labels: np.ndarray, ids: np.ndarray, most: int) -> np.ndarray:
  """[N] labels from 0, no more than `most` rows of each.

  A larger cluster is dealt out by a hash of the ids into pieces as equal as
  can be; the first keeps its label. Each is a fair sample of the cluster, so
  near-copies may lie in several.
  """
  labels = labels.copy()
  sizes = np.bincount(labels)
  free = len(sizes)
  for k in np.flatnonzero(sizes > most):
    rows = np.flatnonzero(labels == k)
    rows = rows[np.argsort(id_hash(ids[rows]), kind="stable")]
    pieces = math.ceil(len(rows) / most)
    piece = np.arange(len(rows)) % pieces
    labels[rows] = np.where(piece, free + piece - 1, k)
    free += pieces - 1
  return labels


def by_pick(what: str, width: int, host: bool) -> Callable:
  """The check of a method that compares all rows with every pick.

  Args:
    what, host: see `rows.refuse_long`.
    width: W of the rows.
  """
  return lambda n, m: rows_lib.refuse_long(
    2.0 * np.sum(np.float64(n) * m) * width, what, BLOCKS, host=host
  )


def in_blocks(
  greedy: Callable,
  x: np.ndarray,
  ids: np.ndarray,
  budget: int,
  blocks: int,
  seed: int,
  check: Callable,
) -> Selection:
  """Runs a greedy method inside each of `blocks` clusters.

  Every cluster gets its share of the budget (largest remainders); nothing is
  compared across clusters, so N^2 becomes N^2 / blocks. A cluster above twice
  the mean size is `cut` first: N^2 is at most 2 N^2 / blocks.

  Args:
    greedy: (x [n, W], ids [n], m, rows [n] into the pool) -> [m] places in
      the order of the picks.
    x: [N, W].
    ids: [N].
    budget: M.
    blocks: clusters.
    seed: of the k-means.
    check: (n [B], m [B]) of all blocks; raises before the first one runs.

  Returns:
    Selection; first the first of every cluster, and so on.
  """
  labels, _ = k_means(x, ids, blocks, seed)
  labels = cut(labels, ids, most_rows(len(x), blocks))
  room = np.bincount(labels, minlength=blocks)
  share = basic.apportion(np.float64(room), room, budget)
  check(room, share)
  chosen, when = [np.empty(0, np.int64)], [np.empty(0)]
  for k in np.flatnonzero(share):
    rows = np.flatnonzero(labels == k)
    places = greedy(x[rows], ids[rows], int(share[k]), rows)
    chosen.append(rows[places])
    when.append((np.arange(share[k]) + 0.5) / share[k])
  rows, when = np.concatenate(chosen), np.concatenate(when)
  rows = rows[np.lexsort((id_hash(ids[rows]), when))]
  return in_order(rows, len(x))


def in_order(rows: np.ndarray, n: int) -> Selection:
  """Picks without a score of their own: 1 down to 1/M, 0 for the others."""
  rows, score = np.asarray(rows, np.int64), np.zeros(n)
  score[rows] = 1 - np.arange(len(rows)) / max(1, len(rows))
  return Selection(rows, score)
