"""Rows on disk: tables of records, and of what was refused.

Messages (`turns`, `answers`, `tools`) are JSON there: a table would give each
the keys of all others.
"""

from collections.abc import Iterable
import io
import json

from etils import epath

from jaxalign import artifacts
from jaxalign.data.schemas.messages import is_plain
from jaxalign.data.schemas.pairs import ASSISTANT
from jaxalign.errors import CorruptError

MESSAGES = ("turns", "answers", "tools")


def write_rows(path: epath.PathLike, rows: list[dict]) -> None:
  """Writes rows as parquet, whole or not at all (a temp name, then renamed).

  Raises:
    WriteError: the disk is full or the folder cannot be written.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq

  rows = [
    row
    | {
      n: row[n] and json.dumps(row[n], ensure_ascii=False)
      for n in MESSAGES
      if n in row
    }
    for row in rows
  ]
  table = (
    pa.Table.from_pylist(rows)
    if rows
    else pa.table(
      {name: pa.array([], pa.string()) for name in ("id", "prompt", "group")}
    )
  )
  buffer = io.BytesIO()
  pq.write_table(
    table,
    buffer,
    compression="zstd",
    row_group_size=4096,
    write_page_checksum=True,
  )
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
    names = [n for n in ("chosen", "rejected", "completion") if n in row]
    marked = row["prompt"].endswith(ASSISTANT)
    answers = row.get("answers") or [
      dict(
        role="assistant", content=row[n].removeprefix(" ") if marked else row[n]
      )
      for n in names
    ]
    made = dict(prompt=row["turns"]) | {
      n: [message] for n, message in zip(names, answers)
    }
    plain = plain and all(is_plain(m) for x in made.values() for m in x)
    out.append(
      {k: v for k, v in row.items() if k not in ("turns", "answers")} | made
    )
  if plain:
    return out
  return [
    {
      k: json.dumps(v, ensure_ascii=False)
      if k in ("prompt", "chosen", "rejected", "completion")
      else v
      for k, v in row.items()
    }
    for row in out
  ]


def read_table(path: epath.PathLike) -> list[dict]:
  """The rows that `write_rows` wrote.

  Raises:
    CorruptError: missing, truncated, or no parquet file.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    with epath.Path(path).open("rb") as file:
      rows = (
        pq.ParquetFile(file, page_checksum_verification=True).read().to_pylist()
      )
    return [
      row | {n: json.loads(row[n]) for n in MESSAGES if row.get(n) is not None}
      for row in rows
    ]
  except (pa.ArrowException, OSError, ValueError) as error:
    raise CorruptError(
      f"table {path} cannot be read: {str(error)[:200]}; "
      "delete it and run the data stage again"
    ) from error


def read_column(path: epath.PathLike, name: str) -> list:
  """One column of what `write_rows` wrote; the others are not read.

  Raises:
    CorruptError: missing, truncated, or no parquet file.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    with epath.Path(path).open("rb") as file:
      return (
        pq.ParquetFile(file, page_checksum_verification=True)
        .read([name])
        .column(name)
        .to_pylist()
      )
  except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
    raise CorruptError(
      f"column {name} of {path} cannot be read: "
      f"{str(error)[:200]}; delete it and run the stage that "
      "wrote it again"
    ) from error


def column_names(path: epath.PathLike) -> list[str]:
  """The names of the columns that `write_rows` wrote."""
  import pyarrow.parquet as pq

  with epath.Path(path).open("rb") as file:
    return pq.ParquetFile(file).schema_arrow.names


def write_refused(path: epath.PathLike, refused: Iterable[dict]) -> None:
  """Writes the refused rows' file, line, id, reason, detail as .jsonl."""
  text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in refused)
  artifacts.write_bytes(path, text.encode())
