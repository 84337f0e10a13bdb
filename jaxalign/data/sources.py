"""Rows of a file, a glob, a Hugging Face or a TFDS dataset, one at a time.

Every row comes with the file and line it stands at, so that a bad record can
be named. A row that cannot be read is handed on as a `BadRow` and reading goes
on; a file that cannot be read (missing, empty, truncated) is a `DataError`.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from typing import Any, BinaryIO, Iterator, NamedTuple

from etils import epath

from jaxalign.errors import ConfigError, DataError

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz",
              ".csv.gz")
MAX_ROW_BYTES = 1 << 26  # one line; a longer one is a bomb, not a record
MAX_JSON_BYTES = 1 << 31  # a .json file, which is held whole
_KNOB = "set config.data.source"
_SPLIT = r"[\w-]+(?:\[[^\]]*\])?"  # train, or train[:10%]
_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


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
    raise ConfigError(f"limit is {limit}, wanted 0 (all rows) or more; set "
                      "config.data.limit")
  files = source_files(source)
  return _limited(source, files, limit)


def source_files(source: str) -> list[str]:
  """The files behind `source`, sorted by name; none for hf: and tfds:."""
  if not isinstance(source, str) or not source:
    raise ConfigError(f"data source {source!r}: wanted a path, a glob, "
                      f"hf:<name> or tfds:<name>; {_KNOB}")
  kind = _kind(source)
  if kind in ("hf", "tfds"):
    return []
  if not source.endswith(EXTENSIONS):
    raise ConfigError(f"data source {source!r} ends in none of "
                      f"{', '.join(EXTENSIONS)}; {_KNOB}")
  if any(mark in source for mark in "*?["):
    if not epath.Path(source).exists():  # a real name may hold a bracket
      return _glob(source)
  path = epath.Path(source)
  if not path.exists():
    raise DataError(f"data file {source} is missing; {_KNOB}")
  if path.is_dir():
    raise DataError(f"data source {source} is a folder, wanted a file or a "
                    f"glob such as {source}/*.jsonl; {_KNOB}")
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
  """"hf", "tfds", or "file"; an unknown prefix is a ConfigError."""
  prefix, colon, rest = source.partition(":")
  if not colon or "/" in prefix or not re.fullmatch("[A-Za-z0-9_+-]+", prefix):
    return "file"
  if prefix in ("hf", "tfds"):
    if not rest.strip(":"):
      raise ConfigError(f"data source {source!r} names no dataset, wanted "
                        f"{prefix}:<name>[:split]; {_KNOB}")
    return prefix
  if prefix in ("gs", "s3", "file") and rest.startswith("//"):
    return "file"
  raise ConfigError(f"data source {source!r} has the unknown prefix "
                    f"{prefix + ':'!r}; known: hf:, tfds:, gs://, or a path; "
                    f"{_KNOB}")


def _glob(source: str) -> list[str]:
  parts = epath.Path(source).parts
  first = next(i for i, part in enumerate(parts)
               if any(mark in part for mark in "*?["))
  base = epath.Path(*parts[:first]) if first else epath.Path(".")
  found = []
  if base.exists():
    found = sorted(str(path) for path in base.glob("/".join(parts[first:]))
                   if not path.is_dir())
  if not found:
    raise DataError(f"data source {source!r} matches no file; {_KNOB}")
  return found


def _limited(source: str, files: list[str], limit: int) -> Rows:
  count = 0
  for pair in _all_rows(source, files):
    yield pair
    count += 1
    if count == limit:
      return
  if not count:
    raise DataError(f"data source {source} holds no rows; {_KNOB}")


def _all_rows(source: str, files: list[str]) -> Rows:
  if not files:
    kind, _, rest = source.partition(":")
    yield from (_hf if kind == "hf" else _tfds)(source, rest)
  for name in files:
    plain = name.removesuffix(".gz")
    reader = next(reader for extension, reader in _READERS.items()
                  if plain.endswith(extension))
    good = 0
    try:
      with _open(name) as raw:
        if not raw.read(1):
          raise DataError(f"data file {name} is empty (0 bytes); {_KNOB}")
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw) if plain != name else raw
        for pair in reader(name, file):
          yield pair
          good += not isinstance(pair[1], BadRow)
    except _BROKEN_GZIP as error:
      how = ("is truncated (the compressed stream stops early)"
             if isinstance(error, EOFError) else f"is damaged ({error})")
      raise DataError(f"data file {name} {how}: {good} good rows were read "
                      "before that; fetch it again") from error
    except OSError as error:
      raise DataError(f"data file {name} cannot be read after {good} good "
                      f"rows: {error}") from error


def _open(name: str) -> BinaryIO:
  try:
    return epath.Path(name).open("rb")
  except OSError as error:
    raise DataError(f"data file {name} cannot be opened: {error}") from error


def _checked(text: str) -> "dict | BadRow":
  """One JSON object, or why it is none."""
  try:
    row = json.loads(text)
  except (ValueError, RecursionError) as error:
    return BadRow("malformed JSON", str(error)[:200])
  return _object(row, "\\u" in text)


def _object(row: Any, escaped: bool = False) -> "dict | BadRow":
  """`row` if it is a dict; of `escaped` text also if it is Unicode at all."""
  if not isinstance(row, dict):
    return BadRow("not an object", f"found a {type(row).__name__}")
  if escaped:
    try:
      json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      return BadRow("lone surrogate", f"{error.object[error.start]!a} is no "
                    "Unicode text")
    except (ValueError, RecursionError) as error:
      return BadRow("malformed JSON", str(error)[:200])
  return row


def _jsonl(name: str, file: BinaryIO) -> Rows:
  number = 0
  with io.BufferedReader(file) as lines:  # GzipFile.readline alone is slow
    while line := lines.readline(MAX_ROW_BYTES):
      number += 1
      where = Where(name, number)
      if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
        while line and not line.endswith(b"\n"):
          line = lines.readline(MAX_ROW_BYTES)
        yield where, BadRow("row too long", f"over {MAX_ROW_BYTES:,} bytes")
        continue
      if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
      if not line.strip():
        continue
      try:
        text = line.decode("utf-8")
      except UnicodeDecodeError as error:
        yield where, BadRow("bad UTF-8", str(error))
        continue
      yield where, _checked(text)


def _json(name: str, file: BinaryIO) -> Rows:
  data = file.read(MAX_JSON_BYTES + 1)
  if len(data) > MAX_JSON_BYTES:
    raise DataError(f"data file {name} holds over {MAX_JSON_BYTES:,} bytes of "
                    "JSON in one piece; write one object per line, as .jsonl")
  try:
    text = data.decode("utf-8-sig")
    value = json.loads(text)
  except UnicodeDecodeError as error:
    raise DataError(f"data file {name} is not UTF-8: {error}") from error
  except (ValueError, RecursionError) as error:
    hint = ("; one JSON object per line belongs in a .jsonl file"
            if "Extra data" in str(error) else "")
    raise DataError(f"data file {name} is not JSON: {str(error)[:200]}{hint}"
                    ) from error
  if isinstance(value, dict):
    lists = [key for key, item in value.items() if isinstance(item, list)]
    if len(lists) != 1:
      raise DataError(f"data file {name} is an object with {len(lists)} lists "
                      f"({', '.join(lists[:5])}), wanted a list of rows or an "
                      "object with exactly one")
    value = value[lists[0]]
  if not isinstance(value, list):
    raise DataError(f"data file {name} is a {type(value).__name__}, wanted a "
                    "list of rows")
  escaped = "\\u" in text
  for number, row in enumerate(value, 1):
    yield Where(name, number), _object(row, escaped)


def _csv(name: str, file: BinaryIO) -> Rows:
  csv.field_size_limit(MAX_ROW_BYTES)
  # Undecodable bytes become lone surrogates, which no encoding then accepts.
  with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape",
                        newline="") as text:
    reader = csv.reader(text, strict=True)
    header, line = None, 1
    while True:
      try:
        cells = next(reader)
      except StopIteration:
        return
      except csv.Error as error:
        yield Where(name, line), BadRow("malformed CSV", str(error))
        line = reader.line_num + 1
        continue
      where, line = Where(name, line), reader.line_num + 1
      if not cells:
        continue
      if header is None:
        header = cells
        if len(set(header)) != len(header):
          raise DataError(f"data file {name} names a column twice: "
                          f"{', '.join(header)[:200]}")
      elif len(cells) != len(header):
        yield where, BadRow("wrong number of columns", f"{len(cells)}, wanted "
                            f"{len(header)}")
      else:
        try:
          "".join(cells).encode()
        except UnicodeEncodeError as error:
          yield where, BadRow("bad UTF-8",
                              f"byte {error.object[error.start]!a}")
        else:
          yield where, dict(zip(header, cells))


def _parquet(name: str, file: BinaryIO) -> Rows:
  import pyarrow as pa
  import pyarrow.parquet as pq
  number = 0
  try:
    with pq.ParquetFile(file, page_checksum_verification=True) as table:
      for batch in table.iter_batches(batch_size=256):
        for row in _arrow_rows(batch):
          number += 1
          yield Where(name, number), row
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise DataError(f"data file {name} is truncated or no parquet file, after "
                    f"{number} good rows: {str(error)[:200]}") from error


def _arrow_rows(batch: Any) -> "Iterator[dict | BadRow]":
  try:
    yield from batch.to_pylist()
    return
  except UnicodeDecodeError:
    pass  # one row at a time, to name the one that is broken
  for i in range(batch.num_rows):
    try:
      yield batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
      yield BadRow("bad UTF-8", str(error))


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv,
            ".parquet": _parquet}


def _name_and_split(rest: str) -> tuple[str, str]:
  """"name:split" apart; gs:// and a TFDS version belong to the name."""
  found = re.fullmatch(rf"(.+?):({_SPLIT}(?:\+{_SPLIT})*)?", rest)
  return (found[1], found[2] or "train") if found else (rest, "train")


def _hf(source: str, rest: str) -> Rows:
  import datasets
  name, split = _name_and_split(rest)
  revision = None
  if not epath.Path(name).exists():
    name, _, revision = name.partition("@")
  try:
    table = datasets.load_dataset(name, split=split, revision=revision or None)
  except Exception as error:  # dozens of kinds; all mean: no such data
    raise DataError(f"data source {source}: {type(error).__name__}: "
                    f"{str(error)[:300]}; {_KNOB}") from error
  for number, row in enumerate(table, 1):
    yield Where(source, number), _object(row)


def _tfds(source: str, rest: str) -> Rows:
  import tensorflow_datasets as tfds
  name, split = _name_and_split(rest)
  try:
    if epath.Path(name).is_dir():
      table = tfds.builder_from_directory(name).as_data_source(split)
    else:
      table = tfds.data_source(name, split=split)
  except Exception as error:  # as above
    raise DataError(f"data source {source}: {type(error).__name__}: "
                    f"{str(error)[:300]}; {_KNOB}") from error
  for number, row in enumerate(table, 1):
    try:
      row = _plain(row)
    except UnicodeDecodeError as error:
      row = BadRow("bad UTF-8", str(error))
    yield Where(source, number), row


def _plain(value: Any) -> Any:
  """TFDS values as JSON has them: bytes to text, NumPy scalars and arrays."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, dict):
    # A sequence of dicts comes as a dict of lists; chat needs the former.
    plain = {key: _plain(item) for key, item in value.items()}
    lengths = {len(item) for item in plain.values() if isinstance(item, list)}
    if (plain and len(lengths) == 1 and {"role", "content"} <= plain.keys()
        and all(isinstance(item, list) for item in plain.values())):
      return [dict(zip(plain, items)) for items in zip(*plain.values())]
    return plain
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if hasattr(value, "tolist"):
    return _plain(value.tolist()) if getattr(value, "ndim", 0) else (
        _plain(value.item()))
  return value
