"""Rows of text held as Arrow columns: a row is a dict made when it is read.

Two million pairs of short texts take some 500 MB here, and several GB as dicts.
Messages (`turns`, `answers`, `tools`) are JSON: a column would give each the
keys of all others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import itertools
import json
from typing import Any

import numpy as np
import pyarrow as pa

MESSAGES = ("turns", "answers", "tools")
CHUNK = 4096  # rows made into dicts at once


def messages_to_json(row: dict, names: Iterable[str] = MESSAGES) -> dict:
  """The row with the named values as JSON, where it has them."""
  dump = lambda value: value and json.dumps(value, ensure_ascii=False)
  return row | {name: dump(row[name]) for name in names if name in row}


def _chunk(rows: Sequence[dict]) -> pa.Table:
  rows = [messages_to_json(row) for row in rows]
  columns = {}
  for name in dict.fromkeys(name for row in rows for name in row):
    column = pa.array([row.get(name) for row in rows])
    if pa.types.is_string(column.type):  # no end at 2 GB of text
      column = column.cast(pa.large_string())
    columns[name] = column
  return pa.table(columns)


class RowTable(Sequence):
  """A sequence of rows; all have the keys that any of them has."""

  def __init__(self, table: pa.Table):
    self.table = table

  @classmethod
  def of(cls, rows: Iterable[dict]) -> "RowTable":
    """Of dicts, each of which is dropped once it is read."""
    if isinstance(rows, cls):
      return rows
    rows, chunks = iter(rows), [pa.table({})]
    while chunk := list(itertools.islice(rows, CHUNK)):
      chunks.append(_chunk(chunk))
    return cls(pa.concat_tables(chunks, promote_options="permissive"))

  def __len__(self) -> int:
    return self.table.num_rows

  def __iter__(self) -> Iterator[dict[str, Any]]:
    for batch in self.table.to_batches(max_chunksize=CHUNK):
      for row in batch.to_pylist():
        texts = {n: row[n] for n in MESSAGES if row.get(n) is not None}
        yield row | {name: json.loads(text) for name, text in texts.items()}

  def __getitem__(self, where: int | slice) -> Any:
    if isinstance(where, slice):
      return self.take(np.arange(len(self))[where])
    at = range(len(self))[where]
    return next(iter(RowTable(self.table.slice(at, 1))))

  def __eq__(self, other: Any) -> bool:
    same = isinstance(other, Sequence) and len(self) == len(other)
    return same and all(a == b for a, b in zip(self, other))

  def take(self, index: np.ndarray) -> "RowTable":
    """The rows of these numbers, in that order."""
    return RowTable(self.table.take(pa.array(np.asarray(index, np.int64))))

  def where(self, mask: np.ndarray) -> "RowTable":
    """The rows where a mask [n] is true."""
    mask = np.asarray(mask, bool)
    return self if mask.all() else self.take(np.flatnonzero(mask))

  def map(self, change: Callable[[dict], dict]) -> "RowTable":
    """Every row changed."""
    return RowTable.of(map(change, self))

  def column(self, name: str) -> list:
    """The values of one column; None of all rows where there is none."""
    if name not in self.table.column_names:
      return [None] * len(self)
    return self.table.column(name).to_pylist()


class TextColumn(Sequence):
  """The texts of a column, each made when it is read."""

  def __init__(self, rows: RowTable, name: str):
    self.column = rows.table.column(name).combine_chunks()

  def __len__(self) -> int:
    return len(self.column)

  def __getitem__(self, where: int) -> str:
    return self.column[int(where)].as_py()
