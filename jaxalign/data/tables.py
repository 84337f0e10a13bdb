"""Rows on disk: tables of records, and of what was refused."""

from collections.abc import Iterable, Iterator
import contextlib
import json

from etils import epath
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxalign.core import disk
from jaxalign.core.errors import CorruptError
from jaxalign.data.row_table import messages_to_json, RowTable
from jaxalign.data.schemas.messages import is_plain
from jaxalign.data.schemas.schema import ASSISTANT

_SIDES = ("chosen", "rejected", "completion")
_GROUP = 4096  # rows of a row group


def write_rows(path: epath.PathLike, rows: Iterable[dict]) -> None:
  """Writes rows as parquet, whole or not at all (a temp name, then renamed).

  Raises:
    WriteError: the disk is full or the folder cannot be written.
  """
  table = RowTable.of(rows).table
  if not table.num_columns:
    names = ("id", "prompt", "group")
    table = pa.table({name: pa.array([], pa.string()) for name in names})
  narrow = {pa.large_string(): pa.string()}
  schema = pa.schema(
    [(field.name, narrow.get(field.type, field.type)) for field in table.schema]
  )

  def write(file):
    options = dict(compression="zstd", write_page_checksum=True)
    with pq.ParquetWriter(file, schema, **options) as writer:
      for start in range(0, table.num_rows, _GROUP):
        writer.write_table(table.slice(start, _GROUP).cast(schema))

  disk.write_through(path, write)


def as_read(rows: list[dict]) -> list[dict]:
  """Rows as other tools read them: those of chats as lists of messages.

  Where every row has turns, `prompt`, `chosen`, `rejected` and `completion`
  are lists of messages (TRL's conversational form), or the JSON of them where
  one holds a call of a tool, whose arguments no table could keep. Else they
  are the texts, and their turns a column.
  """
  if not rows or not all(row.get("turns") for row in rows):
    return rows
  out, plain = [], True
  for row in rows:
    names = [n for n in _SIDES if n in row]
    space = " " if row["prompt"].endswith(ASSISTANT) else ""
    texts = [row[n].removeprefix(space) for n in names]
    answers = row.get("answers") or [
      dict(role="assistant", content=text) for text in texts
    ]
    made = dict(prompt=row["turns"]) | {n: [m] for n, m in zip(names, answers)}
    plain = plain and all(is_plain(m) for x in made.values() for m in x)
    kept = {k: v for k, v in row.items() if k not in ("turns", "answers")}
    out.append(kept | made)
  if plain:
    return out
  return [messages_to_json(row, ("prompt", *_SIDES)) for row in out]


@contextlib.contextmanager
def _opened(path: epath.PathLike, what: str) -> Iterator[pq.ParquetFile]:
  """A table; CorruptError where it is missing, truncated or no table."""
  try:
    with epath.Path(path).open("rb") as file:
      yield pq.ParquetFile(file, page_checksum_verification=True)
  except (pa.ArrowException, OSError, ValueError, KeyError) as error:
    raise CorruptError(
      f"{what} {path} cannot be read: {str(error)[:200]}; delete it and run "
      "the stage that wrote it again"
    ) from error


def read_table(path: epath.PathLike) -> list[dict]:
  """The rows that `write_rows` wrote.

  Raises:
    CorruptError: missing, truncated, or no parquet file; of all that follow.
  """
  return list(read_row_table(path))


def read_row_table(path: epath.PathLike) -> RowTable:
  """As `read_table`, but no row is a dict before it is read."""
  with _opened(path, "table") as table:
    return RowTable(table.read())


def read_column(path: epath.PathLike, name: str) -> list:
  """One column of what `write_rows` wrote; the others are not read."""
  with _opened(path, f"column {name} of") as table:
    return table.read([name]).column(name).to_pylist()


def read_some(path: epath.PathLike, index: np.ndarray) -> RowTable:
  """The rows of these numbers, in that order; one row group is held at once."""
  index = np.asarray(index, np.int64)
  order = np.argsort(index, kind="stable")
  with _opened(path, "table") as table:
    chunks, start = [table.schema_arrow.empty_table()], 0
    for group in range(table.num_row_groups):
      stop = start + table.metadata.row_group(group).num_rows
      low, high = np.searchsorted(index[order], (start, stop))
      if low < high:
        rows = RowTable(table.read_row_group(group))
        chunks.append(rows.take(index[order[low:high]] - start).table)
      start = stop
  return RowTable(pa.concat_tables(chunks)).take(np.argsort(order))


def column_names(path: epath.PathLike) -> list[str]:
  """The names of the columns that `write_rows` wrote."""
  with _opened(path, "table") as table:
    return table.schema_arrow.names


def write_refused(path: epath.PathLike, refused: Iterable[dict]) -> None:
  """Writes the refused rows' file, line, id, reason, detail as .jsonl."""
  text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in refused)
  disk.write_bytes(path, text.encode())
