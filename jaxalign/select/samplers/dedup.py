"""Near-copies: SemDeDup, and DEITA's good rows unlike those kept before."""

import hashlib
import math

import numpy as np

from jaxalign.core import progress
from jaxalign.select.costs import ID_BYTES, Sizes, Work
from jaxalign.select.pool import needs, Pool, Selection
from jaxalign.select.samplers import kmeans
from jaxalign.select.samplers import vectors as vectors_lib
from jaxalign.select.samplers.values import (
  column,
  is_count,
  one_side,
  ranked,
  require,
)
from jaxalign.select.topk import id_hash, top

_TILE = 512  # rows compared at once
_DIGITS = 6  # of a cosine; two copies are equally alike to a third


def first_copies(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
  """[N] int64, of rows with the same bits the one whose id hashes lowest."""
  order = np.argsort(id_hash(ids), kind="stable")
  mark = lambda row: hashlib.blake2b(row.tobytes(), digest_size=16).digest()
  marks = np.fromiter((mark(x[i]) for i in order), "S16", len(x))
  _, first, of = np.unique(marks, return_index=True, return_inverse=True)
  out = np.empty(len(x), np.int64)
  out[order] = order[first[of]]
  return out


def most_alike(
  x: np.ndarray, ids: np.ndarray, count: int, seed: int
) -> np.ndarray:
  """Each row's largest cosine with an earlier one of its k-means cluster.

  Earlier is less like the centre (of equals, the one with the lower hash), so
  that what stands for a group of near-copies is its least typical member. 2 N
  K W flops for the clusters and N^2 W / K inside; 512 x 512 numbers.

  Exact copies are found first, whatever their number. In a cluster that still
  has more rows than `kmeans.most_rows`, about 2 N / K, a row is compared
  with only so many before it: near-copies that are further apart in that
  order are not seen, and a line says so.

  Args:
    x: [N, W] float32 of length 1.
    ids: [N].
    count: K clusters.
    seed: of the k-means.

  Returns:
    [N] float64 from -1 (the first of a cluster) to 1, to six digits.

  Raises:
    ConfigError: more than `rows.HOURS`; the message has the number.
  """
  labels, centres = kmeans.k_means(x, ids, count, seed)
  length = np.sqrt((centres**2).sum(1))
  centres = centres / np.where(length, length, 1)[:, None]
  centres, typical = np.float32(centres), np.empty(len(x))
  for at in range(0, len(x), 1 << 16):
    part, own = x[at : at + (1 << 16)], centres[labels[at : at + (1 << 16)]]
    typical[at : at + (1 << 16)] = np.einsum(
      "nw,nw->n", part, own, dtype=np.float64
    )
  typical = np.round(typical, _DIGITS)
  own = np.flatnonzero(first_copies(x, ids) == np.arange(len(x)))
  order = own[np.lexsort((id_hash(ids[own]), typical[own], labels[own]))]
  sizes = np.bincount(labels[own], minlength=count)
  most = kmeans.most_rows(len(x), count)
  vectors_lib.refuse_long(
    np.sum(np.float64(sizes) * np.minimum(sizes, 2 * most)) * x.shape[1],
    "comparing the rows of a cluster",
    "set clusters to 'auto'",
    host=True,
  )
  if (sizes > most).any():
    progress.say(
      f"  {sizes[sizes > most].sum():,} rows lie in clusters of "
      f"more than {most:,}: each is compared with the {most:,} "
      "before it only"
    )
  out = np.ones(len(x))
  out[own] = -1
  ends = np.append(np.cumsum(sizes), 0)
  for k in range(count):
    rows = order[ends[k - 1] : ends[k]]
    for start in range(0, len(rows), _TILE):
      mine = rows[start : start + _TILE]
      part, best = x[mine], np.full(len(mine), -1.0)
      for before in range(max(0, start - most), start, _TILE):
        cosine = part @ x[rows[before : min(start, before + _TILE)]].T
        np.maximum(best, cosine.max(axis=1), out=best)
      if len(mine) > 1:
        inside = part @ part.T
        inside[np.triu_indices(len(mine))] = -1
        np.maximum(best, inside.max(axis=1), out=best)
      out[mine] = best
  return np.clip(np.round(out, _DIGITS), -1, 1)


def cluster_count(clusters: int | str, n: int) -> int:
  """K: a number, or "auto", one for every 1,024 rows."""
  if clusters == "auto":
    return math.ceil(n / 1024)
  holds = is_count(clusters) and clusters <= n
  require(holds, "clusters", clusters, f"'auto' or 1 to {n}")
  return int(clusters)


def semdedup_work(
  p: Sizes, *, clusters: int | str = "auto", pair: str = "mean", **_
) -> Work:
  k, width = cluster_count(clusters, int(p.n)), vectors_lib.width_of(p, pair)
  first = kmeans.k_means_work(p, k, width)
  held = first.held + 4 * _TILE**2
  return first._replace(host=p.n**2 * width / k, held=held)


@needs("embedding", cost=semdedup_work)
def semdedup(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  pair: str = "mean",
  metric: str = "cosine",
  clusters: int | str = "auto",
) -> Selection:
  """The rows that are least a copy of another, Abbas et al. 2023.

  SemDeDup drops a row whose cosine with an earlier one of its cluster is
  above 1 - epsilon; here the budget sets that threshold. A step before
  another sampler rather than one by itself: see `chains.dedup`, where the
  threshold is set.

  Args:
    metric: "cosine" or "centred".
    clusters: K, or "auto", one for every 1,024 rows.

  Returns:
    Selection; the [N] score is minus the cosine of `most_alike`.
  """
  x = vectors_lib.directions(pool, pair, metric)
  alike = most_alike(x, pool.ids, cluster_count(clusters, len(x)), seed)
  return ranked(-alike, pool, budget)


def diverse(
  score: np.ndarray,
  x: np.ndarray,
  ids: np.ndarray,
  budget: int,
  threshold: float,
) -> Selection:
  """Rows by score, each unlike all kept before, Liu et al. 2024 (DEITA).

  Going down the scores, a row is kept where its largest cosine with the rows
  kept so far is below the threshold, until there are M. Where the pool ends
  first, the best of the rows passed over make up the number. 2 N M W
  flops at most, M x 512 numbers.

  Args:
    score: [N] float64, finite.
    x: [N, W] float32 of length 1.
    ids: [N].
    budget: M.
    threshold: of the cosine.

  Returns:
    Selection; the score of a row that was passed over is lowered by the range
    of the scores, so that it ranks after all others.
  """
  wanted = "a cosine above -1 and at most 1"
  require(-1 < threshold <= 1, "threshold", threshold, wanted)
  vectors_lib.refuse_long(
    2.0 * len(x) * budget * x.shape[1],
    "keeping rows unlike those kept",
    "lower config.select.budget, or, of deita, set config.select.kwargs.blocks",
    host=True,
  )
  order = top(score, ids, len(score))
  kept, passed = [], np.zeros(len(score), bool)
  vectors = np.empty((budget, x.shape[1]), np.float32)
  for start in range(0, len(order), _TILE):
    if len(kept) == budget:
      break
    mine = order[start : start + _TILE]
    part = x[mine]
    inside = np.round(part @ part.T, _DIGITS)
    near = np.full(len(mine), -1.0)
    for before in range(0, len(kept), _TILE):
      cosine = part @ vectors[before : min(before + _TILE, len(kept))].T
      np.maximum(near, np.round(cosine, _DIGITS).max(axis=1), out=near)
    for at, row in enumerate(mine):
      if len(kept) == budget:
        break
      if near[at] < threshold:
        vectors[len(kept)] = part[at]
        kept.append(int(row))
        np.maximum(near, inside[at], out=near)
      else:
        passed[row] = True
  lowered = np.where(passed, score - (np.ptp(score) + 1), score)
  return Selection(top(lowered, ids, budget), lowered)


def _diverse_work(p: Sizes, width: int, **_) -> Work:
  rows = 4 * p.n * width
  held = max(2 * rows, rows * (1 + p.budget / p.n) + ID_BYTES * p.n)
  return Work(2 * p.n * p.budget * width, held=held)


diverse_work = kmeans.cost_in_blocks(_diverse_work)


@needs("reward", "embedding", cost=diverse_work)
def deita(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  side: str = "chosen",
  pair: str = "mean",
  metric: str = "cosine",
  threshold: float = 0.9,
  blocks: int = 0,
) -> Selection:
  """The best rows by reward that are unlike one another; see `diverse`.

  DEITA's own score is complexity x quality, of models made for instruction
  tuning; `chains.diverse` does the same over any other score.

  Args:
    side: of a pair's reward; see `values.one_side`.
    metric: "cosine" or "centred".
    threshold: rows at least this alike (cosine) to a kept one are passed over.
  """
  score = one_side(column(pool, "reward"), side)
  x = vectors_lib.directions(pool, pair, metric)

  def greedy(x, ids, m, rows):
    return diverse(score[rows], x, ids, m, threshold)

  check = kmeans.refuse_long_picks("deita", x.shape[1], host=True)
  return kmeans.run_greedy(
    greedy, x, pool, budget, blocks=blocks, seed=seed, check=check
  )
