"""The nearest of some rows to each of others: exact, in blocks, no N x N.

One float32 product of a block says, with a bound on its error, which rows can
be the nearest; float64 decides among those. What is held is one block of
products, and one block of rows at a time where they are read from a file.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.select.pool import Pool

BLOCK = 4096  # rows that are compared with a tile at once
TILE = 1024  # rows of a tile: 16 MiB of products
_PAIRS = 8192  # pairs of rows whose exact distance is taken at once
_ROUNDING = 2.0**-24  # of one float32 operation

Reader = Callable[[np.ndarray], np.ndarray]  # [n] row numbers -> [n, W]


class Nearest(NamedTuple):
  """What `nearest` found; where there is no other row, -1 and infinity."""

  row: np.ndarray  # [Q] int64, of the pool
  squared: np.ndarray  # [Q] float64, squared Euclidean distance


def unit_rows(pool: Pool, centre_rows: int = 200_000) -> Reader:
  """A reader of unit vectors, one a row, without a copy of the embedding.

  The mean over the row's responses, less the mean of the pool, scaled to
  length 1: `1 - cosine` of two rows is half their squared distance. The
  hidden states of a language model share one large direction, so uncentred
  cosines are all near 1.

  Args:
    pool: `pool.embedding` [N, R, E] or [N, E], perhaps mapped from a file.
    centre_rows: the mean is taken over at most so many rows, evenly spread.

  Raises:
    NumericError: from the reader, where a row is not finite or lies on the
      mean, so that it has no direction.
  """
  x = pool.embedding
  if x.ndim not in (2, 3):
    raise ConfigError(
      f"the embedding has shape {x.shape}, wanted [N, R, E]; "
      "look at config.embed"
    )
  some = np.arange(0, len(x), max(1, -(-len(x) // centre_rows)))
  total = np.zeros(x.shape[-1])
  for start in range(0, len(some), BLOCK):
    total += _flat(x, some[start : start + BLOCK]).sum(axis=0)
  centre = total / len(some)

  def read(rows):
    part = _flat(x, rows) - centre
    norm = np.sqrt(np.einsum("nw,nw->n", part, part))
    bad = ~(np.isfinite(norm) & (norm > 1e-12))
    if bad.any():
      raise NumericError(
        f"{int(bad.sum())} rows have no direction: their embedding is not "
        f"finite or is the mean of all (ids "
        f"{', '.join(str(i) for i in pool.ids[rows[bad][:5]])}); look at "
        "the embedding of those records"
      )
    return np.float32(part / norm[:, None])

  return read


def _flat(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """[n, E] float64, the mean over a row's responses."""
  part = np.asarray(x[rows], np.float64)
  return part.mean(axis=1) if part.ndim == 3 else part


def _thinned(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """The places of a block's rows without third copies of equal ones.

  A row whose twin is itself needs the second; more never win, as of equals
  the first does, and a block of copies would else be compared one by one.
  """
  seen, keep = {}, []
  for place in np.argsort(rows, kind="stable"):
    key = x[place].tobytes()
    seen[key] = seen.get(key, 0) + 1
    if seen[key] <= 2:
      keep.append(place)
  return np.sort(np.array(keep, np.int64))


def nearest(read: Reader, queries: np.ndarray, targets: np.ndarray) -> Nearest:
  """The nearest target of each query, never the row itself.

  2 Q T W flops in float32. Of targets at exactly the same distance the
  one with the lowest row number (the first id) is given.

  Args:
    read: [n] row numbers -> [n, W] float32; called once for each query and
      block of targets.
    queries: [Q] row numbers.
    targets: [T] row numbers.
  """
  queries = np.asarray(queries, np.int64)
  targets = np.asarray(targets, np.int64)
  best = np.full(len(queries), np.inf)
  row = np.full(len(queries), -1, np.int64)
  if not len(queries) or not len(targets):
    return Nearest(row, best)
  asked = np.concatenate(
    [read(queries[s : s + BLOCK]) for s in range(0, len(queries), BLOCK)]
  )
  square = np.einsum("nw,nw->n", asked, asked, dtype=np.float64)
  for start in range(0, len(targets), BLOCK):
    block = targets[start : start + BLOCK]
    y = read(block)
    places = _thinned(y, block)
    block, y = block[places], y[places]
    own = np.einsum("nw,nw->n", y, y, dtype=np.float64)
    # One product gives |y|^2 - 2 x y: a column of ones stands beside x.
    folded = np.concatenate([-2 * y, np.float32(own)[:, None]], axis=1).T
    slack = (y.shape[1] + 16) * _ROUNDING * (square + own.max())
    for at in range(0, len(queries), TILE):
      part = slice(at, at + TILE)
      x = asked[part]
      near = (
        np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1) @ folded
      )
      _own_out(near, queries[part], block)
      low, room = near.min(axis=1).astype(np.float64), slack[part]
      limit = np.minimum(low + room, best[part] - square[part]) + room
      open_ = np.flatnonzero((low <= limit) & np.isfinite(low))
      i, j = np.nonzero(near[open_] <= limit[open_, None])
      _decide(x, y, block, open_[i], j, best[part], row[part])
  return Nearest(row, best)


def _own_out(near: np.ndarray, queries: np.ndarray, block: np.ndarray) -> None:
  """Puts infinity where a query is compared with itself."""
  order = np.argsort(block, kind="stable")
  place = np.searchsorted(block, queries, sorter=order)
  place = order[np.minimum(place, len(block) - 1)]
  same = np.flatnonzero(block[place] == queries)
  near[same, place[same]] = np.inf


def _decide(
  x: np.ndarray,
  y: np.ndarray,
  block: np.ndarray,
  i: np.ndarray,
  j: np.ndarray,
  best: np.ndarray,
  row: np.ndarray,
) -> None:
  """Exact distances of the pairs x[i], y[j] left open; keeps the best."""
  for start in range(0, len(i), _PAIRS):
    a, b = i[start : start + _PAIRS], j[start : start + _PAIRS]
    apart = np.float64(x[a]) - y[b]
    exact, found = np.einsum("nw,nw->n", apart, apart), block[b]
    order = np.lexsort((found, exact, a))
    a, exact, found = a[order], exact[order], found[order]
    new = np.append(True, a[1:] != a[:-1])  # the nearest of each query
    a, exact, found = a[new], exact[new], found[new]
    wins = (exact < best[a]) | ((exact == best[a]) & (found < row[a]))
    best[a[wins]], row[a[wins]] = exact[wins], found[wins]


def work(queries: int, targets: int, width: int) -> float:
  """Multiplications and additions that `nearest` takes."""
  return 2.0 * queries * targets * width


def affordable(queries: int, targets: int, width: int, limit: float) -> int:
  """How many of the queries stay within `limit` flops."""
  each = work(1, max(1, targets), width)
  return int(min(queries, limit // each))


def sample(hashes: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
  """At most `count` of the rows, those of the lowest hash, in row order."""
  if len(rows) <= count:
    return np.sort(rows)
  order = np.argsort(hashes[rows], kind="stable")
  return np.sort(rows[order[:count]])
