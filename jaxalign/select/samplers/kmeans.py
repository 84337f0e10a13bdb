"""k-means over the rows, and greedy methods run inside its clusters.

Not scikit-learn's: rows are drawn by a hash of their ids, so that their order
decides nothing, and the products run on the devices in fixed chunks.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.errors import ConfigError
from jaxalign.select.chunks import by_row, LARGE, place, Placed
from jaxalign.select.costs import ID_BYTES, one_after_another, Sizes, Work
from jaxalign.select.pool import Pool, Selection
from jaxalign.select.samplers.draws import apportion
from jaxalign.select.samplers.values import in_order
from jaxalign.select.samplers.vectors import refuse_long, width_of
from jaxalign.select.topk import id_hash, uniform

_WIDE = 128  # centres compared with the rows at once
_ASSIGNED = 1 << 17  # rows that lie on the devices at once
_STEPS = 10  # of Lloyd
SMALL = 2048  # rows of a cluster that is never too large
BLOCKS = (
  "set config.select.kwargs.blocks, or more of them, to run it inside clusters"
)


def _closest(centres, squares, x):
  """[rows] int32, the nearest centre; of equals the first."""

  def compare(best, some):
    value, index = best
    centres, squares, first = some
    highest = jax.lax.Precision.HIGHEST
    product = jnp.einsum("rw,cw->rc", x, centres, precision=highest)
    distance = squares[None] - 2 * product
    near = jnp.argmin(distance, axis=1).astype(jnp.int32) + first
    low = jnp.min(distance, axis=1)
    better = low < value
    return (jnp.where(better, low, value), jnp.where(better, near, index)), None

  centres = centres.reshape(-1, _WIDE, x.shape[1])
  firsts = jnp.arange(len(centres), dtype=jnp.int32) * _WIDE
  none = (jnp.full_like(x[:, 0], jnp.inf), jnp.zeros_like(x[:, 0], jnp.int32))
  chunks = (centres, squares.reshape(-1, _WIDE), firsts)
  return jax.lax.scan(compare, none, chunks)[0][1]


def assign(placed: Placed, centres: np.ndarray) -> np.ndarray:
  """[N] int64, the nearest of the [K, W] centres; 2NKW flops."""
  more = -len(centres) % _WIDE
  squares = (np.float64(centres) ** 2).sum(1)
  squares = np.pad(squares, (0, more), constant_values=np.inf)
  padded = np.pad(centres, ((0, more), (0, 0)))
  return by_row(_closest, placed, padded, squares).astype(np.int64)


def _means(x, labels, centres):
  """Means of the clusters, summed in row order; an empty one stays put."""
  order = np.argsort(labels, kind="stable")
  names, starts = np.unique(labels[order], return_index=True)
  sums = np.add.reduceat(x[order], starts, axis=0, dtype=np.float64)
  counts = np.diff(np.append(starts, len(x)))
  out = np.float64(centres)
  out[names] = sums / counts[:, None]
  return out


def _sampled(n: float, clusters: int) -> int:
  return min(n, max(20_000, 32 * clusters))


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
  sample = x[np.sort(draw[: _sampled(n, clusters)])]
  placed, labels = place(sample), None
  for _ in range(_STEPS):
    last, labels = labels, assign(placed, centres)
    if last is not None and (last == labels).all():
      break
    centres = _means(sample, labels, centres)
  chunks = [x[at : at + _ASSIGNED] for at in range(0, n, _ASSIGNED)]
  labels = [assign(place(chunk), centres) for chunk in chunks]
  return np.concatenate(labels), centres


def k_means_work(p: Sizes, k: int, width: int) -> Work:
  """Ten steps on a sample, all rows once; its copies, and the means."""
  some, rows = _sampled(p.n, k), 4 * p.n * width
  part, chunk = 4 * some * width, 4 * min(p.n, _ASSIGNED) * width
  held = rows if rows <= LARGE else 0  # else they lie in a file
  held += max(5 * part, chunk + 2 * part) + ID_BYTES * p.n
  devices = 2 * k * width * (_STEPS * some + p.n)
  return Work(devices=devices, held=held, device=max(part, chunk))


def most_rows(n: int, clusters: int) -> int:
  """Rows of the largest cluster: twice the mean, or what is always small."""
  return max(math.ceil(2 * n / clusters), SMALL)


def split_large(labels: np.ndarray, ids: np.ndarray, most: int) -> np.ndarray:
  """[N] labels from 0, no more than `most` rows of each.

  A larger cluster is dealt out by a hash of the ids into clusters as equal as
  can be; the first keeps its label. Each is a fair sample of the cluster, so
  near-copies may lie in several.
  """
  labels = labels.copy()
  sizes = np.bincount(labels)
  free = len(sizes)
  for k in np.flatnonzero(sizes > most):
    rows = np.flatnonzero(labels == k)
    rows = rows[np.argsort(id_hash(ids[rows]), kind="stable")]
    count = math.ceil(len(rows) / most)
    turn = np.arange(len(rows)) % count
    labels[rows] = np.where(turn, free + turn - 1, k)
    free += count - 1
  return labels


def refuse_long_picks(what: str, width: int, host: bool) -> Callable:
  """The check, for `run_greedy`, of a method that compares all rows [N, width]
  with every pick; see `vectors.refuse_long`."""
  return lambda n, m: refuse_long(
    2.0 * np.sum(np.float64(n) * m) * width, what, BLOCKS, host=host
  )


def run_greedy(
  greedy: Callable[..., Selection],
  x: np.ndarray,
  pool: Pool,
  budget: int,
  *,
  blocks: int,
  seed: int,
  check: Callable,
) -> Selection:
  """Runs a greedy method on all rows, or inside each of `blocks` clusters.

  Every cluster gets its share of the budget (largest remainders); nothing is
  compared across clusters, so N^2 becomes N^2 / blocks. A cluster above twice
  the mean size is split first: N^2 is at most 2 N^2 / blocks.

  Args:
    greedy: (x [n, W], ids [n], m, rows [n] into the pool) -> Selection of m
      places in the order of the picks.
    x, pool: [N, W] and its ids.
    blocks: clusters; 0 for all rows.
    seed: of the k-means.
    check: (n [B], m [B]) of all blocks; raises before the first one runs.

  Returns:
    Selection; of blocks first the first of every cluster, and so on, with a
    score of 1 down to 1/M, and 0 for the others.
  """
  n, ids = len(x), pool.ids
  if not blocks:
    check(n, budget)
    return greedy(x, ids, budget, np.arange(n)) if budget else in_order([], n)
  labels, _ = k_means(x, ids, blocks, seed)
  labels = split_large(labels, ids, most_rows(n, blocks))
  room = np.bincount(labels, minlength=blocks)
  share = apportion(np.float64(room), room, budget)
  check(room, share)
  chosen, when = [np.empty(0, np.int64)], [np.empty(0)]
  for k in np.flatnonzero(share):
    rows = np.flatnonzero(labels == k)
    chosen.append(rows[greedy(x[rows], ids[rows], int(share[k]), rows).rows])
    when.append((np.arange(share[k]) + 0.5) / share[k])
  rows, when = np.concatenate(chosen), np.concatenate(when)
  return in_order(rows[np.lexsort((id_hash(ids[rows]), when))], n)


def cost_in_blocks(work: Callable[..., Work]) -> Callable[..., Work]:
  """The cost of what `run_greedy` runs: (sizes, width, **keywords) -> Work."""

  def cost(
    p: Sizes, *, pair: str = "mean", blocks: int = 0, **kwargs: Any
  ) -> Work:
    width = width_of(p, pair)
    if not blocks:
      return work(p, width, **kwargs)
    most = min(p.n, most_rows(p.n, blocks))
    mean = p._replace(n=p.n / blocks, budget=p.budget / blocks)
    large = p._replace(n=most, budget=math.ceil(p.budget * most / p.n))
    mean, large = work(mean, width, **kwargs), work(large, width, **kwargs)
    held = 4 * p.n * width + ID_BYTES * p.n + large.held
    each = Work(blocks * mean.host, blocks * mean.devices, held, large.device)
    return one_after_another(k_means_work(p, blocks, width), each)

  return cost
