"""Rows of a file, a glob, a Hugging Face or a TFDS dataset, one at a time.

Every row comes with the file and line it stands at, so that a bad record can
be named. A row that cannot be read is handed on as a `BadRow` and reading goes
on; a file that cannot be read (missing, empty, truncated) is a `DataError`.
The first rows of a large file cost no more than those of a small one.
"""

import codecs
from collections.abc import Iterator
import csv
import decimal
import gzip
import hashlib
import io
import json
import math
import re
from typing import Any, BinaryIO, NamedTuple
import zlib

from etils import epath

from jaxalign.errors import ConfigError, DataError

EXTENSIONS = (
  ".jsonl",
  ".json",
  ".csv",
  ".parquet",
  ".jsonl.gz",
  ".json.gz",
  ".csv.gz",
)
MAX_ROW_BYTES = 1 << 26  # one line; a longer one is a bomb, not a record
MAX_JSON_BYTES = 1 << 31  # a .json file that is an object, held whole
MAX_DEPTH = 100  # brackets within brackets; what walks a row may recurse
_KNOB = "set config.data.source"
_SPLIT = r"[\w-]+(?:\[[^\]]*\])?"  # train, or train[:10%]
_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20  # bytes looked at at once
_ENOUGH = 1 << 23  # bytes of rows that tell how long a row is
_HF_ROWS = 100  # of a dataset, looked at at once


class Where(NamedTuple):
  """Where a row stands: its file (or dataset) and 1-based line or row."""

  file: str
  line: int


class BadRow(NamedTuple):
  """A row that could not be read: a stable reason, and what was found."""

  reason: str
  detail: str


Rows = Iterator[tuple[Where, "dict | BadRow"]]


def read_rows(source: str, limit: int = 0) -> Rows:
  """The rows of `source`, in file-name order, streamed.

  Args:
    source: a path or glob ending in one of `EXTENSIONS` (local or gs://),
      "hf:<name or folder>[@revision][:split]" or
      "tfds:<name or folder>[:split]".
    limit: stop after so many rows, good or bad; 0 reads all.

  Yields:
    (Where, row) with row a dict, or a BadRow.

  Raises:
    ConfigError: the source is of no known kind (at once).
    DataError: a missing or empty file, a glob that matches nothing (at once);
      a truncated or damaged file, a source without rows (while reading).
  """
  if limit < 0:
    raise ConfigError(
      f"limit is {limit}, wanted 0 (all rows) or more; set config.data.limit"
    )
  files = source_files(source)
  return _limited(source, files, limit)


def source_files(source: str) -> list[str]:
  """The files behind `source`, sorted by name; none for hf: and tfds:."""
  if not isinstance(source, str) or not source:
    raise ConfigError(
      f"data source {source!r}: wanted a path, a glob, "
      f"hf:<name> or tfds:<name>; {_KNOB}"
    )
  kind = _kind(source)
  if kind in ("hf", "tfds"):
    return []
  if not source.endswith(EXTENSIONS):
    raise ConfigError(
      f"data source {source!r} ends in none of {', '.join(EXTENSIONS)}; {_KNOB}"
    )
  if any(mark in source for mark in "*?["):
    if not epath.Path(source).exists():  # a real name may hold a bracket
      return _glob(source)
  path = epath.Path(source)
  if not path.exists():
    raise DataError(f"data file {source} is missing; {_KNOB}")
  if path.is_dir():
    raise DataError(
      f"data source {source} is a folder, wanted a file or a "
      f"glob such as {source}/*.jsonl; {_KNOB}"
    )
  return [source]


def source_digest(source: str) -> str:
  """sha256 of the files' bytes in name order; of every row for hf:, tfds:.

  The fingerprint that `datasets` keeps depends on the cache files' times, so
  the rows themselves are hashed: equal data has an equal digest anywhere.
  """
  digest = hashlib.sha256()
  files = source_files(source)
  for name in files:
    with _open(name) as file:
      while block := file.read(1 << 20):
        digest.update(block)
  if not files:
    digest.update(source.encode())
    for _, row in read_rows(source):
      digest.update(json.dumps(row, sort_keys=True, default=str).encode())
      digest.update(b"\n")
  return digest.hexdigest()


def _kind(source: str) -> str:
  """ "hf", "tfds", or "file"; an unknown prefix is a ConfigError."""
  prefix, colon, rest = source.partition(":")
  if not colon or "/" in prefix or not re.fullmatch("[A-Za-z0-9_+-]+", prefix):
    return "file"
  if prefix in ("hf", "tfds"):
    if not rest.strip(":"):
      raise ConfigError(
        f"data source {source!r} names no dataset, wanted "
        f"{prefix}:<name>[:split]; {_KNOB}"
      )
    return prefix
  if prefix in ("gs", "s3", "file") and rest.startswith("//"):
    return "file"
  raise ConfigError(
    f"data source {source!r} has the unknown prefix "
    f"{prefix + ':'!r}; known: hf:, tfds:, gs://, or a path; "
    f"{_KNOB}"
  )


def _glob(source: str) -> list[str]:
  parts = epath.Path(source).parts
  first = next(
    i for i, part in enumerate(parts) if any(mark in part for mark in "*?[")
  )
  base = epath.Path(*parts[:first]) if first else epath.Path(".")
  found = []
  if base.exists():
    found = sorted(
      str(path)
      for path in base.glob("/".join(parts[first:]))
      if not path.is_dir()
    )
  if not found:
    raise DataError(f"data source {source!r} matches no file; {_KNOB}")
  return found


def _limited(source: str, files: list[str], limit: int) -> Rows:
  number = 0
  for pair in _all_rows(source, files):
    yield pair
    number += 1
    if number == limit:
      return
  if not number:
    raise DataError(f"data source {source} holds no rows; {_KNOB}")


def _all_rows(source: str, files: list[str]) -> Rows:
  if not files:
    kind, _, rest = source.partition(":")
    yield from (_hf if kind == "hf" else _tfds)(source, rest)
  for name in files:
    with _open(name) as raw:
      yield from _file_rows(name, raw)


def _file_rows(name: str, raw: BinaryIO) -> Rows:
  """The rows of one file, opened."""
  plain = name.removesuffix(".gz")
  reader = next(
    reader
    for extension, reader in _READERS.items()
    if plain.endswith(extension)
  )
  good = 0
  try:
    if not raw.read(1):
      raise DataError(f"data file {name} is empty (0 bytes); {_KNOB}")
    raw.seek(0)
    file = gzip.GzipFile(fileobj=raw) if plain != name else raw
    if reader is not _parquet:
      start = file.read(2)
      file.seek(0)
      if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(
          f"data file {name} is UTF-16, wanted UTF-8; save it again as UTF-8"
        )
    for pair in reader(name, file):
      yield pair
      good += not isinstance(pair[1], BadRow)
  except _BROKEN_GZIP as error:
    how = (
      "is truncated (the compressed stream stops early)"
      if isinstance(error, EOFError)
      else f"is damaged ({error})"
    )
    raise DataError(
      f"data file {name} {how}: {good} good rows were read "
      "before that; fetch it again"
    ) from error
  except OSError as error:
    raise DataError(
      f"data file {name} cannot be read after {good} good rows: {error}"
    ) from error


def count(source: str, rows_read: int = 10_000) -> tuple[int, bool]:
  """How many rows a source holds, and whether that is exact.

  Parquet files, hf: and tfds: say it. Of other files the first rows are read,
  and the bytes that they took (compressed, of .gz) stand for the rest.

  Args:
    source: as of `read_rows`.
    rows_read: rows to read of all files together; a few megabytes at least.

  Returns:
    (rows, bad ones too; exact).

  Raises:
    ConfigError, DataError: as `read_rows`, as far as it is read.
  """
  files = source_files(source)
  if not files:
    kind, _, rest = source.partition(":")
    return len((_hf_table if kind == "hf" else _tfds_table)(source, rest)), True
  rows = read = used = 0  # used: bytes of the rows read
  left = 0  # bytes of files and parts of files that were not read
  for name in files:
    size = epath.Path(name).stat().length
    if name.endswith(".parquet"):
      with _open(name) as raw:
        rows += _parquet_rows(name, raw)
    elif read >= rows_read and used >= _ENOUGH:
      left += size
    else:
      with _open(name) as raw:
        here, at = 0, size
        mine = _file_rows(name, raw)
        for here, _ in enumerate(mine, 1):
          if (
            here % 100 == 0
            and read + here >= rows_read
            and _ENOUGH <= used + raw.tell()
            and raw.tell() < size
          ):
            at = raw.tell()
            break
        mine.close()
      rows, read = rows + here, read + here
      used, left = used + at, left + size - at
  return rows + round(left * read / max(used, 1)), not left


def _open(name: str) -> BinaryIO:
  try:
    return epath.Path(name).open("rb")
  except OSError as error:
    raise DataError(f"data file {name} cannot be opened: {error}") from error


class _OutOfRange(ValueError):
  """A number that no float can hold."""


def _float(digits: str) -> float:
  value = float(digits)
  if math.isinf(value):  # 1e400
    raise _OutOfRange(f"{digits[:40]} is more than a number can be")
  return value


def _int(digits: str) -> int:
  value = int(digits)
  if len(digits) > 300:
    _float(digits)
  return value


class _Twice(ValueError):
  """A name that stands twice in an object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  row = dict(pairs)
  if len(row) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise _Twice(f"{twice[:80]!a} stands twice in an object")
  return row


_DECODER = json.JSONDecoder(
  object_pairs_hook=_once, parse_int=_int, parse_float=_float
)


def _checked(text: str) -> "dict | BadRow":
  """One JSON object, or why it is none."""
  try:
    row = _DECODER.decode(text)
  except (ValueError, RecursionError) as error:
    return _bad(error)
  return _object(row, text)


def _bad(error: Exception) -> BadRow:
  """What a decoder's error means."""
  reason = (
    "number out of range"
    if isinstance(error, _OutOfRange)
    else "duplicate key"
    if isinstance(error, _Twice)
    else "malformed JSON"
  )
  return BadRow(
    reason,
    "brackets within brackets without end"
    if isinstance(error, RecursionError)
    else str(error)[:200],
  )


def _object(row: Any, text: str) -> "dict | BadRow":
  """`row`, read from `text`, if it is a dict of Unicode text, not too deep."""
  if text.count("[") + text.count("{") > MAX_DEPTH and _too_deep(row):
    return BadRow(
      "malformed JSON", f"brackets within brackets, over {MAX_DEPTH} deep"
    )
  if not isinstance(row, dict):
    return BadRow("not an object", f"found a {type(row).__name__}")
  if "\\u" in text:
    try:
      json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      return BadRow(
        "lone surrogate", f"{error.object[error.start]!a} is no Unicode text"
      )
  return row


def _too_deep(value: Any) -> bool:
  """Whether lists and dicts lie more than MAX_DEPTH deep in each other."""
  level = [value]
  for _ in range(MAX_DEPTH):
    level = [
      item
      for outer in level
      if isinstance(outer, (dict, list))
      for item in (outer.values() if isinstance(outer, dict) else outer)
    ]
  return any(isinstance(item, (dict, list)) for item in level)


def _lines(name: str, file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
  """(Number, line) by \n, or by \r where there is no \n; None: too long."""
  # GzipFile.readline alone is slow.
  with io.BufferedReader(file) as lines:
    start = lines.peek()
    alone = b"\r" in start and b"\n" not in start  # an old Macintosh
    for number, line in enumerate(
      _cut_at_returns(lines)
      if alone
      else iter(lambda: lines.readline(MAX_ROW_BYTES), b""),
      1,
    ):
      if len(line) >= MAX_ROW_BYTES and not line.endswith((b"\n", b"\r")):
        while line and not line.endswith(b"\n") and not alone:
          line = lines.readline(MAX_ROW_BYTES)
        line = None
      yield number, line


def _cut_at_returns(file: BinaryIO) -> Iterator[bytes]:
  """Lines that end in \r, cut at MAX_ROW_BYTES."""
  rest = b""
  while block := file.read(_BLOCK):
    *whole, rest = (rest + block).split(b"\r")
    for line in whole:
      yield line[: MAX_ROW_BYTES - 1] + b"\r"
    if len(rest) > MAX_ROW_BYTES:
      rest = rest[:MAX_ROW_BYTES]
  if rest:
    yield rest


def _jsonl(name: str, file: BinaryIO) -> Rows:
  for number, line in _lines(name, file):
    where = Where(name, number)
    if line is None:
      yield where, BadRow("row too long", f"over {MAX_ROW_BYTES:,} bytes")
      continue
    line = line.removeprefix(_BOM)  # of a file put behind another, too
    if not line.strip():
      continue
    try:
      text = line.decode("utf-8")
    except UnicodeDecodeError as error:
      yield where, BadRow("bad UTF-8", str(error))
      continue
    row = _checked(text)
    if isinstance(row, BadRow) and "\r" in text.strip():
      parts = [_checked(part) for part in text.split("\r") if part.strip()]
      if not all(isinstance(part, BadRow) for part in parts):
        for part in parts:  # lines of two kinds of ends
          yield where, part
        continue
    yield where, row


class _Text:
  """JSON text that is read as it is needed: `text[at:]` comes next."""

  def __init__(self, name: str, file: BinaryIO):
    self.name, self._file = name, file
    self.text, self.at, self.ended = "", 0, False
    self.total, self.most = 0, 0  # bytes read, and allowed; 0: any number
    self.bad = ""  # why some of the text is no UTF-8
    # Undecodable bytes become lone surrogates, which no encoding then accepts.
    self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    self._first = True

  def more(self) -> bool:
    """Reads on, as much as is left to be used; False at the end."""
    if self.ended:
      return False
    keep = len(self.text) - self.at
    if keep > MAX_ROW_BYTES or self.total > self.most > 0:
      raise DataError(
        f"data file {self.name} holds over {max(keep, self.most):,} bytes of "
        "JSON in one piece; write one object per line, as .jsonl"
      )
    data = self._file.read(max(_BLOCK, keep))
    self.total += len(data)
    self.ended = not data
    fresh = self._decoder.decode(data, self.ended)
    if self._first and fresh:
      fresh, self._first = fresh.removeprefix("\ufeff"), False
    if not self.bad:
      try:
        fresh.encode()
      except UnicodeEncodeError as error:
        self.bad = f"byte 0x{ord(error.object[error.start]) & 255:02x}"
    self.text, self.at = self.text[self.at :] + fresh, 0
    return True

  def next(self) -> str:
    """The next character that is no space, "" at the end."""
    while True:
      self.at = _SPACE.match(self.text, self.at).end()
      if self.at < len(self.text):
        return self.text[self.at]
      if not self.more():
        return ""

  def value(self) -> Any:
    """Passes over a value, with the space behind it; a BadRow for a bad one."""
    self.next()
    while True:
      error = None
      try:
        value, end = _DECODER.raw_decode(self.text, self.at)
      except (ValueError, RecursionError) as found:
        error, end = found, _end(self.text, self.at)
      if end is not None:
        after = _SPACE.match(self.text, end).end()
        # What ends with the text read so far may go on: 12 of 123.
        if self.text[after : after + 1] in _AFTER and (
          after < len(self.text) or self.ended
        ):
          break
      if not self.more():
        raise self.broken(error or "it stops early")
    text = self.text[self.at : end]
    self.at = after
    if error is not None:
      return _bad(error)
    if self.bad:
      try:
        text.encode()
      except UnicodeEncodeError:
        return BadRow("bad UTF-8", self.bad)
    return value if isinstance(value, list) else _object(value, text)

  def broken(self, error: Any) -> DataError:
    """What is wrong with the text from here on."""
    if self.bad:
      return DataError(f"data file {self.name} is not UTF-8: {self.bad}")
    hint = (
      "; one JSON object per line belongs in a .jsonl file"
      if "Extra data" in str(error)
      else ""
    )
    return DataError(
      f"data file {self.name} is not JSON: {str(error)[:200]}{hint}"
    )


_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER = (",", "]", "}", "")
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*+"|["\[\]{}]', re.DOTALL)


def _end(text: str, at: int) -> int | None:
  """Where the brackets that open at a place are closed; None: not in `text`."""
  depth = 0
  if text[at : at + 1] not in ("[", "{"):
    return None
  for mark in _MARKS.finditer(text, at):
    if mark[0] == '"':  # a text that does not end
      return None
    depth += (mark[0] in ("[", "{")) - (mark[0] in ("]", "}"))
    if not depth:
      return mark.end()
  return None


def _json(name: str, file: BinaryIO) -> Rows:
  text = _Text(name, file)
  first = text.next()
  good, rows = 0, None
  if first == "[":
    rows = _items(text)
  elif first == "{":
    rows = iter(_list_inside(text))
  else:
    value = text.value() if first else None
    if (
      not first
      or isinstance(value, BadRow)
      and value.reason != ("not an object")
    ):
      raise text.broken("it is empty" if not first else value.detail)
    raise DataError(
      f"data file {name} is a {value.detail.split()[-1]}, wanted a list of rows"
    )
  for number, row in enumerate(rows, 1):
    good += not isinstance(row, BadRow)
    yield Where(name, number), row
  if text.next():
    raise text.broken(f"Extra data after the {first}")
  if not good and text.bad:
    raise text.broken("")


def _items(text: _Text) -> "Iterator[Any]":
  """The values of the list that begins here."""
  text.at += 1
  mark = text.next()
  if mark == "]":
    text.at += 1
    return
  while True:
    yield text.value()
    mark = text.next()
    text.at += 1
    if mark == "]":
      return
    if mark != ",":
      raise text.broken(
        f"found {mark!r}, wanted , or ]" if mark else "it stops early"
      )


def _list_inside(text: _Text) -> list:
  """The only list among the values of the object that begins here."""
  text.most = MAX_JSON_BYTES
  lists, mark = {}, ","
  text.at += 1
  if text.next() == "}":
    text.at, mark = text.at + 1, "}"
  while mark != "}":
    text.next()
    key = None
    while key is None:
      try:
        key, text.at = _DECODER.raw_decode(text.text, text.at)
      except (ValueError, RecursionError) as error:
        if not text.more():
          raise text.broken(error) from error
    if not isinstance(key, str) or text.next() != ":":
      raise text.broken("found no name and colon in its object")
    text.at += 1
    if text.next() == "[":
      lists[key] = list(_items(text))
    else:
      text.value()
    mark = text.next()
    text.at += 1
    if mark not in (",", "}"):
      raise text.broken(
        f"found {mark!r}, wanted , or }}" if mark else "it stops early"
      )
  if text.next():
    raise text.broken("Extra data after its object")
  if len(lists) != 1:
    raise DataError(
      f"data file {text.name} is an object with {len(lists)} "
      f"lists ({', '.join(list(lists)[:5])}), wanted a list of "
      "rows or an object with exactly one"
    )
  return next(iter(lists.values()))


def _csv(name: str, file: BinaryIO) -> Rows:
  csv.field_size_limit(MAX_ROW_BYTES)
  # Undecodable bytes become lone surrogates, which no encoding then accepts.
  with io.TextIOWrapper(
    file, "utf-8-sig", errors="surrogateescape", newline=""
  ) as text:
    reader = csv.reader(text, strict=True)
    header, line = None, 1
    while True:
      try:
        cells = next(reader)
      except StopIteration:
        return
      except csv.Error as error:
        if header is None:
          raise DataError(
            f"data file {name} does not begin with the names of "
            f"its columns: {error}"
          ) from error
        lines = reader.line_num - line
        yield (
          Where(name, line),
          BadRow(
            "malformed CSV",
            str(error)
            + (f"; it took {lines:,} more lines with it" if lines > 0 else ""),
          ),
        )
        line = reader.line_num + 1
        continue
      where, line = Where(name, line), reader.line_num + 1
      if not cells:
        continue
      if header is None:
        header = cells
        if len(set(header)) != len(header):
          raise DataError(
            f"data file {name} names a column twice: "
            f"{ascii(', '.join(header))[1:200]}"
          )
        try:
          "".join(header).encode()
        except UnicodeEncodeError as error:
          raise DataError(
            f"data file {name} is not UTF-8 in the names of its columns"
          ) from error
      elif len(cells) != len(header):
        yield (
          where,
          BadRow(
            "wrong number of columns", f"{len(cells)}, wanted {len(header)}"
          ),
        )
      else:
        try:
          "".join(cells).encode()
        except UnicodeEncodeError as error:
          yield (
            where,
            BadRow("bad UTF-8", f"byte {error.object[error.start]!a}"),
          )
        else:
          yield where, dict(zip(header, cells))


def _parquet_file(file: BinaryIO) -> Any:
  """Opened so that a row group is read page by page, not as a whole."""
  import pyarrow.parquet as pq

  return pq.ParquetFile(
    file, page_checksum_verification=True, pre_buffer=False, buffer_size=_BLOCK
  )


def _parquet(name: str, file: BinaryIO) -> Rows:
  import pyarrow as pa

  number = 0
  try:
    with _parquet_file(file) as table:
      names = table.schema_arrow.names
      if len(set(names)) < len(names):
        raise DataError(
          f"data file {name} names a column twice: {', '.join(names)[:200]}"
        )
      for batch in table.iter_batches(batch_size=256, use_threads=False):
        for row in _arrow_rows(batch):
          number += 1
          yield Where(name, number), row
  except (pa.ArrowException, OSError, ValueError) as error:
    raise DataError(
      f"data file {name} is truncated or no parquet file, after "
      f"{number} good rows: {str(error)[:200]}"
    ) from error


def _parquet_rows(name: str, file: BinaryIO) -> int:
  import pyarrow as pa

  try:
    with _parquet_file(file) as table:
      return table.metadata.num_rows
  except (pa.ArrowException, OSError, ValueError) as error:
    raise DataError(
      f"data file {name} is truncated or no parquet file: {str(error)[:200]}"
    ) from error


def _arrow_rows(batch: Any) -> "Iterator[dict | BadRow]":
  """The rows of a RecordBatch or Table; `_told` has the values."""
  import pyarrow as pa

  odd = [
    i
    for i, field in enumerate(batch.schema)
    if _holds(
      field.type,
      lambda t: (
        pa.types.is_decimal(t)
        or pa.types.is_binary(t)
        or pa.types.is_large_binary(t)
        or pa.types.is_binary_view(t)
        or pa.types.is_fixed_size_binary(t)
      ),
    )
  ]
  try:
    rows = batch.to_pylist()
  except Exception:
    # One row at a time, to name the one that is broken.
    for i in range(batch.num_rows):
      try:
        yield {
          name: _told(_scalar(column[i]))
          for name, column in zip(batch.schema.names, batch.columns)
        }
      except UnicodeDecodeError as error:
        yield BadRow("bad UTF-8", str(error))
      except Exception as error:
        yield BadRow(
          "unreadable value", f"{type(error).__name__}: {str(error)[:200]}"
        )
    return
  names = [batch.schema.names[i] for i in odd]
  for row in rows:
    yield row | {name: _told(row[name]) for name in names} if names else row


def _holds(kind: Any, wanted: Any) -> bool:
  """Whether an Arrow type, or one inside it, is `wanted`."""
  return wanted(kind) or any(
    _holds(kind.field(i).type, wanted) for i in range(kind.num_fields)
  )


def _scalar(scalar: Any) -> Any:
  """A value of Arrow in Python's types; a date that they cannot hold as the
  whole number that it is stored as."""
  import pyarrow as pa

  try:
    return scalar.as_py()
  except UnicodeDecodeError:
    raise
  except Exception:
    if isinstance(scalar, pa.StructScalar):
      return {name: _scalar(scalar[name]) for name in scalar}
    if isinstance(scalar, pa.MapScalar):
      return [(_scalar(item[0]), _scalar(item[1])) for item in scalar.values]
    if isinstance(scalar, (pa.ListScalar, pa.LargeListScalar)):
      return [_scalar(item) for item in scalar.values]
    if pa.types.is_temporal(scalar.type):
      return scalar.value
    raise


def _told(value: Any) -> Any:
  """A value of Arrow as JSON would have it: text of bytes, plain numbers.

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
    return {key: _told(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_told(item) for item in value]
  return value


_READERS = {
  ".jsonl": _jsonl,
  ".json": _json,
  ".csv": _csv,
  ".parquet": _parquet,
}


def _name_and_split(rest: str) -> tuple[str, str]:
  """ "name:split" apart; gs:// and a TFDS version belong to the name."""
  found = re.fullmatch(rf"(.+?):({_SPLIT}(?:\+{_SPLIT})*)?", rest)
  return (found[1], found[2] or "train") if found else (rest, "train")


def _hf(source: str, rest: str) -> Rows:
  table = _hf_table(source, rest)
  for start in range(0, len(table), _HF_ROWS):
    stop = min(start + _HF_ROWS, len(table))
    try:
      columns = table[start:stop]
      rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    except Exception:
      # A value that Python cannot hold: the others of its row are good.
      rows = _arrow_rows(table.with_format("arrow")[start:stop])
    for number, row in enumerate(rows, start + 1):
      yield Where(source, number), row


def _hf_table(source: str, rest: str) -> Any:
  """The dataset of a name; it knows its length and can be sliced."""
  import datasets

  name, split = _name_and_split(rest)
  revision = None
  if not epath.Path(name).exists():
    name, _, revision = name.partition("@")
  try:
    return datasets.load_dataset(name, split=split, revision=revision or None)
  except Exception as error:  # dozens of kinds; all mean: no such data
    raise DataError(
      f"data source {source}: {type(error).__name__}: "
      f"{str(error)[:300]}; {_KNOB}"
    ) from error


def _tfds(source: str, rest: str) -> Rows:
  table = _tfds_table(source, rest)
  for number in range(len(table)):
    try:
      row = _plain(table[number])
    except UnicodeDecodeError as error:
      row = BadRow("bad UTF-8", str(error))
    except Exception as error:
      row = BadRow(
        "unreadable value", f"{type(error).__name__}: {str(error)[:200]}"
      )
    yield Where(source, number + 1), row


def _tfds_table(source: str, rest: str) -> Any:
  """The dataset of a name; it knows its length and can be indexed."""
  import tensorflow_datasets as tfds

  name, split = _name_and_split(rest)
  try:
    if epath.Path(name).is_dir():
      return tfds.builder_from_directory(name).as_data_source(split)
    return tfds.data_source(name, split=split)
  except Exception as error:  # as above
    raise DataError(
      f"data source {source}: {type(error).__name__}: "
      f"{str(error)[:300]}; {_KNOB}"
    ) from error


def _plain(value: Any) -> Any:
  """TFDS values as JSON has them: bytes to text, NumPy scalars and arrays."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, dict):
    # A sequence of dicts comes as a dict of lists; chat needs the former.
    plain = {key: _plain(item) for key, item in value.items()}
    lengths = {len(item) for item in plain.values() if isinstance(item, list)}
    if (
      plain
      and len(lengths) == 1
      and {"role", "content"} <= plain.keys()
      and all(isinstance(item, list) for item in plain.values())
    ):
      return [dict(zip(plain, items)) for items in zip(*plain.values())]
    return plain
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if hasattr(value, "tolist"):
    return (
      _plain(value.tolist())
      if getattr(value, "ndim", 0)
      else (_plain(value.item()))
    )
  return value
