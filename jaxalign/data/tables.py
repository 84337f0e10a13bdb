"""Rows on disk: tables of records, and of what was refused.

Messages (`turns`, `answers`, `tools`) are JSON there: a table would give each
the keys of all others.
"""

from collections.abc import Iterable
import io
import json

from etils import epath
import pyarrow as pa
import pyarrow.parquet as pq

from jaxalign.core import artifacts
from jaxalign.core.errors import CorruptError
from jaxalign.data.schemas.messages import is_plain
from jaxalign.data.schemas.schema import ASSISTANT

MESSAGES = ("turns", "answers", "tools")
_SIDES = ("chosen", "rejected", "completion")


def _to_json(row: dict, names: Iterable[str]) -> dict:
  texts = {n: row[n] for n in names if n in row}
  dump = lambda value: value and json.dumps(value, ensure_ascii=False)
  return row | {name: dump(value) for name, value in texts.items()}


def write_rows(path: epath.PathLike, rows: list[dict]) -> None:
  """Writes rows as parquet, whole or not at all (a temp name, then renamed).

  Raises:
    WriteError: the disk is full or the folder cannot be written.
  """
  if rows:
    table = pa.Table.from_pylist([_to_json(row, MESSAGES) for row in rows])
  else:
    names = ("id", "prompt", "group")
    table = pa.table({name: pa.array([], pa.string()) for name in names})
  options = dict(compression="zstd", row_group_size=4096)
  buffer = io.BytesIO()
  pq.write_table(table, buffer, write_page_checksum=True, **options)
  artifacts.write_bytes(path, buffer.getvalue())


def as_read(rows: list[dict]) -> list[dict]:
  """Rows as other tools read them: those of chats as lists of messages.

  Where every row has turns, `prompt`, `chosen`, `rejected` and `completion`
  are lists of messages (TRL's conversational form), or the JSON of them where
  one holds a call of a tool, whose arguments no table could keep. Else they
  are the texts, with their turns beside them.
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
  return out if plain else [_to_json(r, ("prompt", *_SIDES)) for r in out]


def _read(path: epath.PathLike, columns: list[str] | None = None) -> pa.Table:
  with epath.Path(path).open("rb") as file:
    table = pq.ParquetFile(file, page_checksum_verification=True)
    return table.read(columns)


def read_table(path: epath.PathLike) -> list[dict]:
  """The rows that `write_rows` wrote.

  Raises:
    CorruptError: missing, truncated, or no parquet file.
  """
  try:
    rows = _read(path).to_pylist()
    for row in rows:
      texts = {n: row[n] for n in MESSAGES if row.get(n) is not None}
      row |= {name: json.loads(text) for name, text in texts.items()}
    return rows
  except (pa.ArrowException, OSError, ValueError) as error:
    raise CorruptError(
      f"table {path} cannot be read: {str(error)[:200]}; delete it and run the "
      "data stage again"
    ) from error


def read_column(path: epath.PathLike, name: str) -> list:
  """One column of what `write_rows` wrote; the others are not read.

  Raises:
    CorruptError: missing, truncated, or no parquet file.
  """
  try:
    return _read(path, [name]).column(name).to_pylist()
  except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
    raise CorruptError(
      f"column {name} of {path} cannot be read: {str(error)[:200]}; delete it "
      "and run the stage that wrote it again"
    ) from error


def column_names(path: epath.PathLike) -> list[str]:
  """The names of the columns that `write_rows` wrote."""
  with epath.Path(path).open("rb") as file:
    return pq.ParquetFile(file).schema_arrow.names


def write_refused(path: epath.PathLike, refused: Iterable[dict]) -> None:
  """Writes the refused rows' file, line, id, reason, detail as .jsonl."""
  text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in refused)
  artifacts.write_bytes(path, text.encode())
