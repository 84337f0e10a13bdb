"""The rows of .jsonl and .json files, one at a time.

By hand, because `json`, `ijson` and `datasets` stop at the first bad row: here
it becomes a `BadRow` with its line, and reading goes on.
"""

import codecs
from collections.abc import Iterator
import io
import itertools
import json
import math
import re
from typing import Any, BinaryIO, NamedTuple

from jaxalign.core.errors import DataError

MAX_ROW_BYTES = 1 << 26  # of one row; a longer one is a bomb, not a record
MAX_JSON_BYTES = 1 << 31  # of a .json file that is an object, held whole
MAX_DEPTH = 100  # nested brackets; what walks a row may recurse
BLOCK = 1 << 20  # bytes read at a time
_BOM = b"\xef\xbb\xbf"


class Where(NamedTuple):
  """Where a row stands: its file (or dataset) and 1-based line or row."""

  file: str
  line: int

  def __str__(self) -> str:
    return f"{self.file}:{self.line}"


class BadRow(NamedTuple):
  """A row that could not be read: a stable reason, and what was found."""

  reason: str
  detail: str


RowIterator = Iterator[tuple[Where, dict | BadRow]]


def lone_surrogate(text: str) -> str:
  """The first character of a text that UTF-8 cannot encode, or ""."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    return error.object[error.start]
  return ""


class _Unusable(ValueError):
  """JSON that no row can be made of, though a decoder takes it."""

  def __init__(self, reason: str, detail: str):
    super().__init__(detail)
    self.row = BadRow(reason, detail)


def _float(digits: str) -> float:
  value = float(digits)
  if math.isinf(value):  # 1e400
    detail = f"{digits[:40]} is more than a number can be"
    raise _Unusable("number out of range", detail)
  return value


def _int(digits: str) -> int:
  value = int(digits)
  if len(digits) > 300:
    _float(digits)
  return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  row = dict(pairs)
  if len(row) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    detail = f"{twice[:80]!a} stands twice in an object"
    raise _Unusable("duplicate key", detail)
  return row


_DECODER = json.JSONDecoder(
  object_pairs_hook=_unique, parse_int=_int, parse_float=_float
)


def _bad_json(error: Exception) -> BadRow:
  """What a decoder's error means."""
  if isinstance(error, _Unusable):
    return error.row
  if isinstance(error, RecursionError):
    return BadRow("malformed JSON", "brackets within brackets without end")
  return BadRow("malformed JSON", str(error)[:200])


def _parse(text: str) -> dict | BadRow:
  """One JSON object, or why it is none."""
  try:
    return _checked(_DECODER.decode(text), text)
  except (ValueError, RecursionError) as error:
    return _bad_json(error)


def _checked(row: Any, text: str) -> dict | BadRow:
  """`row`, read from `text`, if it is a dict of Unicode text, not too deep."""
  if text.count("[") + text.count("{") > MAX_DEPTH and _too_deep(row):
    detail = f"brackets within brackets, over {MAX_DEPTH} deep"
    return BadRow("malformed JSON", detail)
  if not isinstance(row, dict):
    return BadRow("not an object", f"found a {type(row).__name__}")
  if "\\u" in text:
    if wrong := lone_surrogate(json.dumps(row, ensure_ascii=False)):
      return BadRow("lone surrogate", f"{wrong!a} is no Unicode text")
  return row


def _too_deep(value: Any) -> bool:
  """Whether lists and dicts lie more than MAX_DEPTH deep in each other."""
  level = [value]
  for _ in range(MAX_DEPTH):
    dicts = [x.values() for x in level if isinstance(x, dict)]
    lists = [x for x in level if isinstance(x, list)]
    level = [*itertools.chain(*dicts, *lists)]
  return any(isinstance(item, (dict, list)) for item in level)


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
  r"""Lines that end in \n, or in \r where there is no \n; None: too long."""
  with io.BufferedReader(file) as lines:  # GzipFile.readline alone is slow
    first = lines.peek()
    if b"\r" in first and b"\n" not in first:  # an old Macintosh
      yield from _cut_at_returns(lines)
      return
    while line := lines.readline(MAX_ROW_BYTES):
      whole = len(line) < MAX_ROW_BYTES or line.endswith((b"\n", b"\r"))
      yield line if whole else None
      while not whole and line and not line.endswith(b"\n"):
        line = lines.readline(MAX_ROW_BYTES)


def _cut_at_returns(file: BinaryIO) -> Iterator[bytes | None]:
  rest = b""
  while block := file.read(BLOCK):
    *whole, rest = (rest + block).split(b"\r")
    yield from (x + b"\r" if len(x) < MAX_ROW_BYTES else None for x in whole)
    rest = rest[:MAX_ROW_BYTES]
  if rest:
    yield rest if len(rest) < MAX_ROW_BYTES else None


def _rows_of_line(line: bytes | None) -> list[dict | BadRow]:
  """The row of a line; several where it holds lines of another end."""
  if line is None:
    return [BadRow("row too long", f"over {MAX_ROW_BYTES:,} bytes")]
  try:
    text = line.decode("utf-8")
  except UnicodeDecodeError as error:
    return [BadRow("bad UTF-8", str(error))]
  row = _parse(text)
  if isinstance(row, BadRow) and "\r" in text.strip():
    rows = [_parse(line) for line in text.split("\r") if line.strip()]
    if not all(isinstance(x, BadRow) for x in rows):
      return rows
  return [row]


def read_jsonl_rows(name: str, file: BinaryIO) -> RowIterator:
  """The rows of a .jsonl file."""
  for number, line in enumerate(_lines(file), 1):
    if line is not None:
      line = line.removeprefix(_BOM)  # also of a file appended to another
    if line is None or line.strip():
      for row in _rows_of_line(line):
        yield Where(name, number), row


_SPACE = re.compile(r"[ \t\n\r]*")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"|["\[\]{}]', re.DOTALL)


def _closing(text: str, at: int) -> int | None:
  """Where the brackets that open at a place are closed; None: not in `text`."""
  depth = 0
  if text[at : at + 1] not in ("[", "{"):
    return None
  for mark in _BRACKETS.finditer(text, at):
    if mark[0] == '"':  # a text that does not end
      return None
    depth += (mark[0] in ("[", "{")) - (mark[0] in ("]", "}"))
    if not depth:
      return mark.end()
  return None


class _JsonText:
  """JSON text that is read as it is needed: `text[at:]` comes next."""

  def __init__(self, name: str, file: BinaryIO):
    self.name, self._file = name, file
    self.text, self.at, self.ended = "", 0, False
    self.total, self.most = 0, 0  # bytes read, and allowed; 0: any number
    self.bad = ""  # why some of the text is not UTF-8
    # Undecodable bytes become lone surrogates, which no encoding then accepts.
    self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")

  def more(self) -> bool:
    """Reads on, as much as is left to be used; False at the end."""
    if self.ended:
      return False
    keep = len(self.text) - self.at
    if keep > MAX_ROW_BYTES or self.total > self.most > 0:
      raise DataError(
        f"data file {self.name} holds over {max(keep, self.most):,} bytes of "
        "JSON in one value; write one object per line, as .jsonl"
      )
    data = self._file.read(max(BLOCK, keep))
    self.total += len(data)
    self.ended = not data
    fresh = self._decoder.decode(data, self.ended)
    if not self.bad and (wrong := lone_surrogate(fresh)):
      self.bad = f"byte 0x{ord(wrong) & 255:02x}"
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

  def _decode(self, is_key: bool = False) -> tuple[Any, str]:
    """Passes over a value: it, or the error that it has; and its text."""
    self.next()
    while True:
      try:
        value, end = _DECODER.raw_decode(self.text, self.at)
      except (ValueError, RecursionError) as error:
        value, end = error, _closing(self.text, self.at)
      if end is not None:
        after = _SPACE.match(self.text, end).end()
        follows = self.text[after : after + 1]
        # What ends with the text read so far may go on: 12 of 123.
        if is_key or follows in ",]}" and (follows or self.ended):
          break
      if not self.more():
        is_error = isinstance(value, Exception)
        raise self.broken(value if is_error else "it stops early")
    text, self.at = self.text[self.at : end], after
    return value, text

  def value(self) -> dict | BadRow:
    """The next value as a row."""
    value, text = self._decode()
    if isinstance(value, Exception):
      return _bad_json(value)
    if self.bad and lone_surrogate(text):
      return BadRow("bad UTF-8", self.bad)
    return _checked(value, text)

  def _members(self, close: str) -> Iterator[None]:
    """Stops before each member of the list or object that begins here."""
    self.at += 1
    mark = self.next()
    if mark == close:
      self.at += 1
    while mark != close:
      yield
      mark = self.next()
      self.at += 1
      if mark not in (",", close):
        wrong = f"found {mark!r}, wanted , or {close}"
        raise self.broken(wrong if mark else "it stops early")

  def items(self) -> Iterator[dict | BadRow]:
    """The rows of the list that begins here."""
    for _ in self._members("]"):
      yield self.value()

  def only_list(self) -> list[dict | BadRow]:
    """The rows of the one list in the object that begins here."""
    self.most, lists = MAX_JSON_BYTES, {}
    for _ in self._members("}"):
      key, _ = self._decode(is_key=True)
      if not isinstance(key, str) or self.next() != ":":
        raise self.broken("found no name and colon in its object")
      self.at += 1
      if self.next() == "[":
        lists[key] = list(self.items())
      else:
        self.value()
    if self.next():
      raise self.broken("Extra data after its object")
    if len(lists) != 1:
      raise DataError(
        f"data file {self.name} is an object with {len(lists)} lists "
        f"({', '.join(list(lists)[:5])}), wanted a list of rows or an object "
        "with exactly one"
      )
    return next(iter(lists.values()))

  def broken(self, error: Any) -> DataError:
    """What is wrong with the text from here on."""
    if self.bad:
      return DataError(f"data file {self.name} is not UTF-8: {self.bad}")
    hint = ""
    if "Extra data" in str(error):
      hint = "; one JSON object per line belongs in a .jsonl file"
    why = str(error)[:200]
    return DataError(f"data file {self.name} is not JSON: {why}{hint}")


def read_json_rows(name: str, file: BinaryIO) -> RowIterator:
  """The rows of a .json file: a list, or an object that holds one list."""
  text = _JsonText(name, file)
  first, good = text.next(), 0
  if first not in ("[", "{"):
    found = text.value() if first else BadRow("", "it is empty")
    if found.reason != "not an object":
      raise text.broken(found.detail)
    kind = found.detail.split()[-1]
    raise DataError(f"data file {name} is a {kind}, wanted a list of rows")
  rows = text.items() if first == "[" else text.only_list()
  for number, row in enumerate(rows, 1):
    good += not isinstance(row, BadRow)
    yield Where(name, number), row
  if text.next():
    raise text.broken(f"Extra data after the {first}")
  if not good and text.bad:
    raise text.broken("")
