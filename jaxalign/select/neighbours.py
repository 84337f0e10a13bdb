"""The nearest of some rows to each of others: exact, in chunks, no N x N.

A float32 product bounds, with its error, which rows can be the nearest;
float64 decides among those. What is held is one chunk of products, and one
chunk of rows at a time where they are read from a file.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.select.pool import Pool
from jaxalign.select.topk import few_ids

TARGETS = 4096  # compared with QUERIES rows at once
QUERIES = 1024  # 16 MiB of products
_PAIRS = 8192  # pairs of rows whose exact distance is taken at once
_ROUNDING = 2.0**-24  # of one float32 operation

Reader = Callable[[np.ndarray], np.ndarray]  # [n] row numbers -> [n, W]


class Nearest(NamedTuple):
  """The nearest rows; where there is no other row, -1 and infinity."""

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
  for start in range(0, len(some), TARGETS):
    total += _flat(x, some[start : start + TARGETS]).sum(axis=0)
  centre = total / len(some)

  def read(rows):
    y = _flat(x, rows) - centre
    norm = np.sqrt(np.einsum("nw,nw->n", y, y))
    bad = ~(np.isfinite(norm) & (norm > 1e-12))
    if bad.any():
      raise NumericError(
        f"{int(bad.sum())} rows have no direction: their embedding is not "
        f"finite or is the mean of all (ids {few_ids(pool.ids[rows[bad]])}); "
        "look at the embedding of those records"
      )
    return np.float32(y / norm[:, None])

  return read


def _flat(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """[n, E] float64, the mean over a row's responses."""
  y = np.asarray(x[rows], np.float64)
  return y.mean(axis=1) if y.ndim == 3 else y


def _thinned(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Places without third copies of equal rows.

  A row whose twin is itself needs the second; more are never the nearest, as
  of equals the first is, and copies would else be compared one by one.
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
    read: [n] row numbers -> [n, W] float32; called once for each chunk.
    queries, targets: [Q] and [T] row numbers.
  """
  queries = np.asarray(queries, np.int64)
  targets = np.asarray(targets, np.int64)
  best = Nearest(
    np.full(len(queries), -1, np.int64), np.full(len(queries), np.inf)
  )
  if not len(queries) or not len(targets):
    return best
  starts = range(0, len(queries), TARGETS)
  x = np.concatenate([read(queries[s : s + TARGETS]) for s in starts])
  square = np.einsum("nw,nw->n", x, x, dtype=np.float64)
  for start in range(0, len(targets), TARGETS):
    rows = targets[start : start + TARGETS]
    y = read(rows)
    places = _thinned(y, rows)
    rows, y = rows[places], y[places]
    own = np.einsum("nw,nw->n", y, y, dtype=np.float64)
    # One product gives |y|^2 - 2 x y: x has a column of ones.
    folded = np.concatenate([-2 * y, np.float32(own)[:, None]], axis=1).T
    slack = (y.shape[1] + 16) * _ROUNDING * (square + own.max())
    for at in range(0, len(queries), QUERIES):
      some = slice(at, at + QUERIES)
      ones = np.ones((len(x[some]), 1), np.float32)
      near = np.concatenate([x[some], ones], axis=1) @ folded
      near[queries[some, None] == rows[None]] = np.inf  # a row and itself
      low, room = near.min(axis=1).astype(np.float64), slack[some]
      limit = np.minimum(low + room, best.squared[some] - square[some]) + room
      open_ = np.flatnonzero((low <= limit) & np.isfinite(low))
      i, j = np.nonzero(near[open_] <= limit[open_, None])
      mine = Nearest(best.row[some], best.squared[some])
      _decide(x[some], y, rows, (open_[i], j), mine)
  return best


def _decide(x, y, rows, places, best):
  """Exact distances of the pairs x[i], y[j] left open; keeps the best."""
  for start in range(0, len(places[0]), _PAIRS):
    i, j = (p[start : start + _PAIRS] for p in places)
    apart = np.float64(x[i]) - y[j]
    exact, row = np.einsum("nw,nw->n", apart, apart), rows[j]
    order = np.lexsort((row, exact, i))
    order = order[np.append(True, np.diff(i[order]) != 0)]  # each query's best
    i, exact, row = i[order], exact[order], row[order]
    equal = (exact == best.squared[i]) & (row < best.row[i])
    new = (exact < best.squared[i]) | equal
    best.squared[i[new]], best.row[i[new]] = exact[new], row[new]


def affordable(queries: int, targets: int, width: int, limit: float) -> int:
  """How many of the queries stay within `limit` flops of `nearest`."""
  return int(min(queries, limit // (2.0 * max(1, targets) * width)))


def sample(hashes: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
  """At most `count` of the rows, those of the lowest hash, in row order."""
  if len(rows) <= count:
    return np.sort(rows)
  order = np.argsort(hashes[rows], kind="stable")
  return np.sort(rows[order[:count]])
