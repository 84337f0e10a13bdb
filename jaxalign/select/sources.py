"""A pool that is read in tiles: ids and columns of any range of rows."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxalign.errors import ConfigError
from jaxalign.select import store as stores
from jaxalign.select.pool import Pool, SHAPES

TILE = 65536  # rows of a tile of scalars

Reader = Callable[[int, int], np.ndarray]  # (start, stop) -> [n, ...]


class Source(NamedTuple):
  """N rows in id order, of which a range is read at a time."""

  n: int
  ids: Reader  # bytes or text
  columns: dict[str, Reader]

  def ids_at(self, rows: np.ndarray) -> np.ndarray:
    """The ids of some rows, ascending."""
    starts = np.arange(0, self.n, TILE)
    cuts = np.searchsorted(rows, np.append(starts, self.n))
    parts = [
      self.ids(start, min(self.n, start + TILE))[rows[a:b] - start]
      for start, a, b in zip(starts.tolist(), cuts, cuts[1:])
      if b > a
    ]
    return np.concatenate(parts) if parts else self.ids(0, 1)[:0]

  def at(self, name: str, rows: np.ndarray) -> np.ndarray:
    """A column at a few rows."""
    read = self.column(name)
    return np.concatenate([read(row, row + 1) for row in rows.tolist()])

  def column(self, name: str) -> Reader:
    """The reader of a column; a ConfigError says what there is."""
    if name not in self.columns:
      wanted = f" ({SHAPES[name]})" if name in SHAPES else ""
      raise ConfigError(
        f"the rows have no column {name!r}{wanted}, they have "
        f"{', '.join(sorted(self.columns)) or 'none'}; set "
        "config.select.sampler"
      )
    return self.columns[name]

  def pools(
    self, names: tuple[str, ...], tile: int = TILE
  ) -> Iterator[tuple[int, Pool]]:
    """(first row, Pool of the rows of a tile) with these columns."""
    readers = {name: self.column(name) for name in names}
    for start in range(0, self.n, tile):
      stop = min(self.n, start + tile)
      yield (
        start,
        Pool(
          self.ids(start, stop),
          {name: read(start, stop) for name, read in readers.items()},
        ),
      )


def of_stores(
  store: stores.Store, *more: stores.Store, **columns: Any
) -> Source:
  """The columns of stores of the same records, and arrays [N, ...] by name.

  A mixture's store gives `log_likelihood` [N, R] of its first fit.

  Raises:
    ConfigError: a store is of other records.
  """
  readers: dict[str, Reader] = {}
  for one in (store, *more):
    if (one.rows, one.ids) != (store.rows, store.ids):
      raise ConfigError(
        f"{one.folder} holds numbers of other records than "
        f"{store.folder}: ids has another digest"
      )
    for name in one.columns:
      if name != stores.ID:
        readers[name] = lambda a, b, one=one, name=name: stores.read_rows(
          one, name, a, b
        )
  if "log_likelihood" in readers:
    fits = readers["log_likelihood"]
    readers["log_likelihood"] = lambda a, b: fits(a, b)[:, 0]
  if "count" in readers:
    readers["logp_count"] = readers["count"]
  for name, array in columns.items():
    if len(array) != store.rows:
      raise ConfigError(
        f"column {name!r} has {len(array)} rows, wanted "
        f"{store.rows}, one a record"
      )
    readers[name] = lambda a, b, array=array: array[a:b]
  return Source(
    store.rows, lambda a, b: stores.read_rows(store, stores.ID, a, b), readers
  )


def of_pool(pool: Pool) -> Source:
  """A pool that is held, as if it came in tiles."""
  return Source(
    len(pool.ids),
    lambda a, b: pool.ids[a:b],
    {name: lambda a, b, x=x: x[a:b] for name, x in pool.columns.items()},
  )
