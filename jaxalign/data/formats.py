"""The rows of .csv and .parquet files, and the readers of all formats."""

from collections.abc import Callable, Iterator
import contextlib
import csv
import decimal
import io
import itertools
import re
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from jaxalign.core.errors import DataError
from jaxalign.data import json_rows
from jaxalign.data.json_rows import BadRow, lone_surrogate, RowIterator, Where


def read_csv_rows(name: str, file: BinaryIO) -> RowIterator:
  """The rows of a .csv file with the names of its columns in the first."""
  csv.field_size_limit(json_rows.MAX_ROW_BYTES)
  # Undecodable bytes become lone surrogates, which no encoding then accepts.
  with io.TextIOWrapper(
    file, "utf-8-sig", errors="surrogateescape", newline=""
  ) as text:
    reader, header = csv.reader(text, strict=True), None
    while True:
      where = Where(name, reader.line_num + 1)
      try:
        cells = next(reader)
      except StopIteration:
        return
      except csv.Error as error:
        if header is None:
          raise DataError(
            f"data file {name} does not begin with the names of its columns: "
            f"{error}"
          ) from error
        lines = reader.line_num - where.line
        more = f"; it took {lines:,} more lines with it" if lines > 0 else ""
        yield where, BadRow("malformed CSV", f"{error}{more}")
        continue
      if not cells:
        continue
      wrong = lone_surrogate("".join(cells))
      if header is None:
        header = cells
        if len(set(cells)) != len(cells):
          columns = ascii(", ".join(cells))[1:200]
          raise DataError(f"data file {name} names a column twice: {columns}")
        if wrong:
          raise DataError(
            f"data file {name} is not UTF-8 in the names of its columns"
          )
      elif len(cells) != len(header):
        counts = f"{len(cells)}, wanted {len(header)}"
        yield where, BadRow("wrong number of columns", counts)
      elif wrong:
        yield where, BadRow("bad UTF-8", f"byte {wrong!a}")
      else:
        yield where, dict(zip(header, cells))


@contextlib.contextmanager
def _parquet_file(name: str, file: BinaryIO) -> Iterator[pq.ParquetFile]:
  """Opened so that a row group is read page by page, not as a whole."""
  page_by_page = dict(pre_buffer=False, buffer_size=json_rows.BLOCK)
  try:
    yield pq.ParquetFile(file, page_checksum_verification=True, **page_by_page)
  except (pa.ArrowException, OSError, ValueError) as error:
    raise DataError(
      f"data file {name} is truncated or no parquet file: {str(error)[:200]}"
    ) from error


def read_parquet_rows(name: str, file: BinaryIO) -> RowIterator:
  """The rows of a .parquet file."""
  with _parquet_file(name, file) as table:
    names = table.schema_arrow.names
    if len(set(names)) < len(names):
      columns = ", ".join(names)[:200]
      raise DataError(f"data file {name} names a column twice: {columns}")
    batches = table.iter_batches(batch_size=256, use_threads=False)
    rows = itertools.chain.from_iterable(map(arrow_rows, batches))
    for number, row in enumerate(rows, 1):
      yield Where(name, number), row


def parquet_length(name: str, file: BinaryIO) -> int:
  """How many rows a .parquet file has, by its own account."""
  with _parquet_file(name, file) as table:
    return table.metadata.num_rows


def arrow_rows(table: Any) -> Iterator[dict | BadRow]:
  """The rows of a RecordBatch or Table, as JSON would have them."""
  kinds = {field.name: str(field.type) for field in table.schema}
  odd = [n for n, kind in kinds.items() if re.search("binary|decimal", kind)]
  try:
    rows = table.to_pylist()
  except Exception:  # one row at a time, to name the one that is broken
    names = table.schema.names
    for i in range(table.num_rows):
      try:
        values = [_as_python(column[i]) for column in table.columns]
        yield dict(zip(names, map(as_json, values)))
      except Exception as error:
        yield unreadable(error)
    return
  for row in rows:
    yield row | {name: as_json(row[name]) for name in odd} if odd else row


def unreadable(error: Exception) -> BadRow:
  """The row whose value raised an error when it was read."""
  if isinstance(error, UnicodeDecodeError):
    return BadRow("bad UTF-8", str(error))
  detail = f"{type(error).__name__}: {str(error)[:200]}"
  return BadRow("unreadable value", detail)


def _as_python(scalar: Any) -> Any:
  """A value of Arrow; a date that Python cannot hold as its whole number."""
  try:
    return scalar.as_py()
  except UnicodeDecodeError:
    raise
  except Exception:
    if isinstance(scalar, pa.StructScalar):
      return {name: _as_python(scalar[name]) for name in scalar}
    if isinstance(scalar, pa.MapScalar):
      return [tuple(map(_as_python, item)) for item in scalar.values]
    if isinstance(scalar, (pa.ListScalar, pa.LargeListScalar)):
      return [_as_python(item) for item in scalar.values]
    if pa.types.is_temporal(scalar.type):
      return scalar.value
    raise


def as_json(value: Any) -> Any:
  """A value of Arrow or TFDS as JSON has it: text of bytes, plain numbers.

  Bytes that are no text (a picture) stay what they are.
  """
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError:
      return value
  if isinstance(value, decimal.Decimal):
    return int(value) if value == value.to_integral_value() else float(value)
  if isinstance(value, dict):
    return {key: as_json(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [as_json(item) for item in value]
  return as_json(value.tolist()) if hasattr(value, "tolist") else value


READERS: dict[str, Callable[[str, BinaryIO], RowIterator]] = {
  ".jsonl": json_rows.read_jsonl_rows,
  ".json": json_rows.read_json_rows,
  ".csv": read_csv_rows,
  ".parquet": read_parquet_rows,
}
