"""Rows of a file, a glob, a Hugging Face or a TFDS dataset, one at a time.

Every row comes with the file and line it stands at, so that a bad record can
be named. A row that cannot be read is handed on as a `BadRow` and reading goes
on; a file that cannot be read (missing, empty, truncated) is a `DataError`.
The first rows of a large file cost no more than those of a small one.
"""

import codecs
import gzip
import hashlib
import itertools
import json
import re
from typing import Any, BinaryIO
import zlib

from etils import epath

from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import formats
from jaxalign.data.json_rows import BadRow, RowIterator, Where

EXTENSIONS = (*formats.READERS, ".jsonl.gz", ".json.gz", ".csv.gz")
_KNOB = "set config.data.source"
_SPLIT = r"[\w-]+(?:\[[^\]]*\])?"  # train, or train[:10%]
_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ENOUGH = 1 << 23  # bytes of rows that tell how long a row is
_HF_ROWS = 100  # of a dataset, read together
_DATASETS = ("hf:", "tfds:")


def read_rows(source: str, limit: int = 0) -> RowIterator:
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
  return _read(source, source_files(source), limit)


def source_files(source: str) -> list[str]:
  """The files behind `source`, sorted by name; none for hf: and tfds:."""
  if wrong := _unknown_kind(source):
    raise ConfigError(f"data source {source!r} {wrong}; {_KNOB}")
  if source.startswith(_DATASETS):
    return []
  path = epath.Path(source)
  if re.search(r"[*?\[]", source) and not path.exists():
    return _glob(source)  # a real name may hold a bracket
  if not path.exists():
    raise DataError(f"data file {source} is missing; {_KNOB}")
  if path.is_dir():
    raise DataError(
      f"data source {source} is a folder, wanted a file or a glob such as "
      f"{source}/*.jsonl; {_KNOB}"
    )
  return [source]


def _unknown_kind(source: str) -> str:
  """Why a source is of no known kind; "" where it is."""
  if not isinstance(source, str) or not source:
    return "is not a path, a glob, hf:<name> or tfds:<name>"
  prefix, colon, rest = source.partition(":")
  if source.startswith(_DATASETS):
    return "" if rest.strip(":") else f"names no dataset, {prefix}:<name>"
  named = colon and re.fullmatch("[A-Za-z0-9_+-]+", prefix)
  if named and not source.startswith(("gs://", "s3://", "file://")):
    known = "hf:, tfds:, gs://, or a path"
    return f"has the unknown prefix {prefix + ':'!r}; known: {known}"
  ends = ", ".join(EXTENSIONS)
  return "" if source.endswith(EXTENSIONS) else f"ends in none of {ends}"


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
      text = json.dumps(row, sort_keys=True, default=str)
      digest.update(f"{text}\n".encode())
  return digest.hexdigest()


def count_rows(source: str, rows_read: int = 10_000) -> tuple[int, bool]:
  """How many rows a source holds, and whether that is exact.

  Parquet files, hf: and tfds: know it. Of other files the first rows are read,
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
    return len(_dataset(source)), True
  rows = read = used = left = 0  # bytes: of the rows read, and of the others
  for name in files:
    size = epath.Path(name).stat().length
    if name.endswith(".parquet"):
      with _open(name) as raw:
        rows += formats.parquet_length(name, raw)
      continue
    if read >= rows_read and used >= _ENOUGH:
      left += size
      continue
    with _open(name) as raw:
      here, at, found = 0, size, _file_rows(name, raw)
      for here, _ in enumerate(found, 1):
        enough = read + here >= rows_read and used + raw.tell() >= _ENOUGH
        if here % 100 == 0 and enough and raw.tell() < size:
          at = raw.tell()
          break
      found.close()
    rows, read = rows + here, read + here
    used, left = used + at, left + size - at
  return rows + round(left * read / max(used, 1)), not left


def _glob(source: str) -> list[str]:
  parts = epath.Path(source).parts
  first = next(i for i, x in enumerate(parts) if re.search(r"[*?\[]", x))
  base = epath.Path(*parts[:first]) if first else epath.Path(".")
  paths = base.glob("/".join(parts[first:])) if base.exists() else ()
  files = sorted(str(path) for path in paths if not path.is_dir())
  if not files:
    raise DataError(f"data source {source!r} matches no file; {_KNOB}")
  return files


def _read(source: str, files: list[str], limit: int) -> RowIterator:
  empty = True
  for row in itertools.islice(_all_rows(source, files), limit or None):
    empty = False
    yield row
  if empty:
    raise DataError(f"data source {source} holds no rows; {_KNOB}")


def _all_rows(source: str, files: list[str]) -> RowIterator:
  if not files:
    yield from _dataset_rows(source)
  for name in files:
    with _open(name) as raw:
      yield from _file_rows(name, raw)


def _file_rows(name: str, raw: BinaryIO) -> RowIterator:
  """The rows of one opened file."""
  stem = name.removesuffix(".gz")
  reader = next(r for end, r in formats.READERS.items() if stem.endswith(end))
  good = 0
  try:
    if not raw.read(1):
      raise DataError(f"data file {name} is empty (0 bytes); {_KNOB}")
    raw.seek(0)
    file = gzip.GzipFile(fileobj=raw) if stem != name else raw
    if file.read(2) in _UTF_16:
      raise DataError(
        f"data file {name} is UTF-16, wanted UTF-8; save it again as UTF-8"
      )
    file.seek(0)
    for where, row in reader(name, file):
      yield where, row
      good += not isinstance(row, BadRow)
  except _BROKEN_GZIP as error:
    how = f"is damaged ({error})"
    if isinstance(error, EOFError):
      how = "is truncated (the compressed stream stops early)"
    raise DataError(
      f"data file {name} {how}: {good} good rows were read before that; "
      "fetch it again"
    ) from error
  except OSError as error:
    raise DataError(
      f"data file {name} cannot be read after {good} good rows: {error}"
    ) from error


def _open(name: str) -> BinaryIO:
  try:
    return epath.Path(name).open("rb")
  except OSError as error:
    raise DataError(f"data file {name} cannot be opened: {error}") from error


def _name_and_split(rest: str) -> tuple[str, str]:
  """Splits "name:split"; gs:// and a TFDS version belong to the name."""
  found = re.fullmatch(rf"(.+?):({_SPLIT}(?:\+{_SPLIT})*)?", rest)
  return (found[1], found[2] or "train") if found else (rest, "train")


def _dataset(source: str) -> Any:
  """The dataset of hf: or tfds:; it knows its length and can be indexed."""
  kind, _, rest = source.partition(":")
  name, split = _name_and_split(rest)
  try:
    if kind == "hf":
      import datasets

      revision = None
      if not epath.Path(name).exists():
        name, _, revision = name.partition("@")
      return datasets.load_dataset(name, split=split, revision=revision or None)
    import tensorflow_datasets as tfds

    if epath.Path(name).is_dir():
      return tfds.builder_from_directory(name).as_data_source(split)
    return tfds.data_source(name, split=split)
  except Exception as error:  # dozens of kinds; all mean: no such data
    raise DataError(
      f"data source {source}: {type(error).__name__}: {str(error)[:300]}; "
      f"{_KNOB}"
    ) from error


def _dataset_rows(source: str) -> RowIterator:
  table = _dataset(source)
  if source.startswith("tfds:"):
    for number in range(len(table)):
      try:
        row = formats.as_json(table[number])
      except Exception as error:
        row = formats.unreadable(error)
      yield Where(source, number + 1), row
    return
  for start in range(0, len(table), _HF_ROWS):
    rows = slice(start, min(start + _HF_ROWS, len(table)))
    try:
      columns = table[rows]
      found = [dict(zip(columns, row)) for row in zip(*columns.values())]
    except Exception:  # a value that Python cannot hold; the others are good
      found = formats.arrow_rows(table.with_format("arrow")[rows])
    for number, row in enumerate(found, start + 1):
      yield Where(source, number), row
