"""One strange row is read or named; it never ends the reading of the others."""

import datetime
import decimal
import gzip
import json
import math

from hypothesis import example, given, settings
from hypothesis import strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import load, put
from test_sources import bad_text, rows_of

from jaxalign.core.errors import DataError, JaxalignError
from jaxalign.data import formats, json_rows, sources
from jaxalign.data.json_rows import BadRow
from jaxalign.data.sources import read_rows

GOOD = dict(prompt="q ", chosen="good a", rejected="bad b")
LINE = json.dumps(GOOD).encode()
DEEP = b"[" * 100_000 + b"]" * 100_000

# A line -> the reason it is refused with, or the value of "a" that it has.
LINES = {
  b'{"a": 1e400}': "number out of range",
  b'{"a": [{"b": -1e999}]}': "number out of range",
  b'{"a": ' + b"9" * 400 + b"}": "number out of range",
  b'{"a": ' + b"9" * 5000 + b"}": "malformed JSON",
  b'{"a": ' + b"9" * 30 + b"}": int("9" * 30),
  b'{"a": 1e308}': 1e308,
  b'{"a": Infinity}': math.inf,
  b'{"a": ' + DEEP + b"}": "malformed JSON",
  b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}": "malformed JSON",
  b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}": ...,
  b'{"a": [' + b"[], " * 999 + b"[]]}": [[]] * 1000,
  '{"a": "x\u2028y\u2029z\u0085"}'.encode(): "x\u2028y\u2029z\u0085",
  b'{"a": "x\\u2028y"}': "x\u2028y",
  '{"a": 1}\u2028'.encode() + LINE: "malformed JSON",
  b'{"a": "\\ud800"}': "lone surrogate",
  b'{"a": "\\ud83d\\ude00"}': "\U0001f600",
  b'{"\\udfff": 1, "a": 2}': "lone surrogate",
  b'{"a": 1, "b": 2, "a": 3}': "duplicate key",
  b'{"a": {"b": 1, "b": 1}}': "duplicate key",
  b'{"a": "x\\u0000y"}': "x\0y",
  '{"a": "\u202e \u05d0 \U0001f469\u200d\U0001f4bb"}'.encode(): (
    "\u202e \u05d0 \U0001f469\u200d\U0001f4bb"
  ),
  b'{"a": "x\0y"}': "malformed JSON",
  b"\0\0\0": "malformed JSON",
  b'\xef\xbb\xbf{"a": 1}': 1,
  '{"a": "x\ufeffy"}'.encode(): "x\ufeffy",
  b'\xef\xbb\xbf\xef\xbb\xbf{"a": 1}': "malformed JSON",
  b"null": "not an object",
  b'"text"': "not an object",
  b"NaN": "not an object",
  b'{"a": "\xed\xa0\x80"}': "bad UTF-8",
  b'{"a": "\xff"}': "bad UTF-8",
  b'{"a": 1}}': "malformed JSON",
  b'{"a": 1': "malformed JSON",
  b'{"a": 1} trailing': "malformed JSON",
  b"[1, 2]": "not an object",
  b'{"a": [{"b\\udc00": 1}]}': "lone surrogate",
  b'{"a": "x\\qy"}': "malformed JSON",
  b"{'a': 1}": "malformed JSON",
  b'{"a": "' + b"x" * (1 << 20) + b'"}': "x" * (1 << 20),
}


def check(row, want):
  if isinstance(row, BadRow):
    assert row.reason == want and row.detail and len(row.detail) < 300
  elif want is not ...:
    assert row["a"] == want


@pytest.mark.parametrize("line, want", LINES.items(), ids=range(len(LINES)))
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_strange_line(tmp_path, line, want, end):
  data = LINE + end + line + end + LINE
  for source in (
    put(tmp_path / "a.jsonl", data),
    put(tmp_path / "a.jsonl.gz", gzip.compress(data)),
  ):
    rows = list(read_rows(source))
    assert [where.line for where, _ in rows] == [1, 2, 3]
    assert rows[0][1] == rows[2][1] == GOOD
    check(rows[1][1], want)


@pytest.mark.parametrize("line, want", LINES.items(), ids=range(len(LINES)))
def test_a_strange_row_of_a_list(tmp_path, line, want):
  """Its neighbours are read, be it in a list or in an object's."""
  if line.startswith((b"\xef\xbb\xbf", b"\0")) or line.endswith(
    (b"}}", b"\xa8" + LINE, b"1", b"trailing")
  ):
    return  # no value of its own: see below
  items = b"[" + LINE + b",\n" + line + b" , " + LINE + b"]"
  nested = b'{"version": 1, "rows": ' + items + b', "x": {"y": []}}'
  for data in (items, nested):
    rows = rows_of(put(tmp_path / "a.json", data))
    assert len(rows) == 3 and rows[0] == rows[2] == GOOD
    check(rows[1], want)


def test_a_list_that_breaks_off_gives_what_was_whole(tmp_path):
  source = put(tmp_path / "a.json", b"[" + LINE + b", " + LINE + b', {"a": [1')
  with pytest.raises(DataError, match="is not JSON"):
    rows_of(source)
  assert rows_of(source, limit=2) == [GOOD, GOOD]
  for data in (
    b"[" + LINE + b" " + LINE + b"]",
    b"[" + LINE + b"] x",
    b"[" + LINE + b",]",
    b"[}",
    b"[\0]",
    b'{"a": [1, 2}',
  ):
    with pytest.raises(DataError, match="is not JSON"):
      rows_of(put(tmp_path / "b.json", data))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_a_list_is_the_same_however_it_is_read(tmp_path, monkeypatch, block):
  values, odd = [1.5e3, -12, True, None, ']},{["\\'], "\u00e9\u4e2d\U0001f600"
  rows = [dict(a=i, b=[i, *values], c=odd * (i % 3)) for i in range(20)]
  monkeypatch.setattr(json_rows, "BLOCK", block)
  for text in (
    json.dumps(rows),
    json.dumps(rows, ensure_ascii=False, indent=2),
    json.dumps(dict(n=123, rows=rows, z="]")),
  ):
    assert rows_of(put(tmp_path / "a.json", text.encode())) == rows
  assert len(rows_of(put(tmp_path / "b.json", b"[12, 123]"))) == 2
  for data in (b"[]", b" [ ] "):
    with pytest.raises(DataError, match="no rows"):
      rows_of(put(tmp_path / "c.json", data))


def test_lines_of_every_kind_of_end_in_one_file(tmp_path):
  data = LINE + b"\n" + LINE + b"\r" + LINE + b"\r\n" + LINE
  assert rows_of(put(tmp_path / "a.jsonl", data)) == [GOOD] * 4
  # A return inside a row is a space to JSON.
  data = LINE.replace(b", ", b",\r") + b"\n" + LINE
  assert rows_of(put(tmp_path / "b.jsonl", data)) == [GOOD] * 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(tmp_path, name, codec):
  mark = "" if codec == "utf-16" else "\ufeff"
  data = (mark + LINE.decode()).encode(codec)
  data = gzip.compress(data) if name.endswith("gz") else data
  with pytest.raises(DataError, match="UTF-16, wanted UTF-8"):
    rows_of(put(tmp_path / name, data))


def test_a_cell_that_is_never_closed_says_what_it_took(tmp_path):
  source = put(tmp_path / "a.csv", b'a,b\n1,2\n3,"x\n' + b"4,5\n" * 50)
  rows = list(read_rows(source))
  assert [where.line for where, _ in rows] == [2, 3]
  assert rows[1][1].reason == "malformed CSV"
  assert "50 more lines" in rows[1][1].detail


_TOKENS = rb'{ } [ ] " \ , : "a" 1e999 NaN -Infinity \ud800 \u null'.split()
_TOKENS += [bytes([x]) for x in b"\r\n\0 \xff"]
_TOKENS += [b"\xef\xbb\xbf", b"\xe2\x80\xa8"]
_TOKENS += [b'{"a": 1}', LINE, b"[" * 2000, b"]" * 2000, b"9" * 5000]
_TOKENS += [b'{"a":' * 120, b"}" * 120]
_token = st.binary(max_size=12) | st.sampled_from(_TOKENS)
text = st.lists(_token, max_size=12).map(b"".join)
REASONS = {
  "malformed JSON",
  "not an object",
  "bad UTF-8",
  "lone surrogate",
  "number out of range",
  "duplicate key",
  "malformed CSV",
  "wrong number of columns",
}


@settings(max_examples=400, deadline=None)
@given(text, st.sampled_from(["a.jsonl", "a.json", "b.json", "a.csv"]))
@example(DEEP, "a.json")
@example(b"[" + DEEP, "a.json")
@example(b'{"a": ' + DEEP, "b.json")
@example(b'{"a": {"a": {"a"', "b.json")
def test_any_bytes(tmp_path_factory, data, name):
  """Rows, BadRows or the documented errors, and rows that can be written."""
  if name == "b.json":
    data = b"[" + LINE + b"," + data
  source = put(tmp_path_factory.getbasetemp() / name, data)
  try:
    for where, row in read_rows(source):
      assert where.line >= 1
      if isinstance(row, BadRow):
        assert row.reason in REASONS
        row.detail.encode()
      else:
        json.dumps(row, ensure_ascii=False).encode()
  except DataError as error:
    str(error).encode()


TIMES = {
  "seconds": pa.array([0, 2**40, 5], pa.timestamp("ms")),
  "zone": pa.array([0, 2**62, 5], pa.timestamp("us", "UTC")),
  "day": pa.array([0, 2**30, 5], pa.date32()),
  "duration": pa.array([0, 2**62, 5], pa.duration("s")),
  "nested": pa.array(
    [[dict(t=0)], [dict(t=2**62), dict(t=1)], []],
    pa.list_(pa.struct([("t", pa.timestamp("us"))])),
  ),
}


def table(**columns):
  good = {name: [value] * 3 for name, value in GOOD.items()}
  return pa.table(good | columns)


@pytest.mark.parametrize("kind", TIMES)
def test_a_date_out_of_range_stays_a_number(tmp_path, kind):
  pq.write_table(table(at=TIMES[kind]), tmp_path / "a.parquet")
  rows = rows_of(str(tmp_path / "a.parquet"))
  assert len(rows) == 3
  for row in rows:
    assert {name: row[name] for name in GOOD} == GOOD
  want = {
    "seconds": datetime.datetime(2004, 11, 3, 19, 53, 47, 776000),
    "zone": 2**62,
    "day": 2**30,
    "duration": 2**62,
    "nested": [
      dict(t=2**62),
      dict(t=datetime.datetime(1970, 1, 1, microsecond=1)),
    ],
  }[kind]
  assert rows[1]["at"] == want
  if kind == "day":
    assert rows[0]["at"] == datetime.date(1970, 1, 1)


def test_bytes_and_decimals_of_parquet_are_text_and_numbers(tmp_path):
  pq.write_table(
    table(
      prompt=pa.array([b"q ", "\u00e9 ".encode(), b"x"]),
      picture=pa.array([b"\xff\xd8", None, b""]),
      score=pa.array([decimal.Decimal(x) for x in ("1.50", "2.00", "-3.25")]),
      turns=pa.array([[dict(role=b"user")]] * 3),
      nanos=pa.array([1, 2, 3], pa.timestamp("ns")),
    ),
    tmp_path / "a.parquet",
  )
  rows = rows_of(str(tmp_path / "a.parquet"))
  assert [row["prompt"] for row in rows] == ["q ", "\u00e9 ", "x"]
  assert [row["picture"] for row in rows] == [b"\xff\xd8", None, ""]
  assert [row["score"] for row in rows] == [1.5, 2, -3.25]
  assert type(rows[1]["score"]) is int
  assert rows[0]["turns"] == [dict(role="user")]


def test_columns_of_one_name(tmp_path):
  pq.write_table(
    pa.table([pa.array(["a"])] * 2, names=["x", "x"]), tmp_path / "a.parquet"
  )
  with pytest.raises(DataError, match="names a column twice: x, x"):
    rows_of(str(tmp_path / "a.parquet"))
  twice = pa.StructArray.from_arrays(
    [pa.array([1, 2, 3])] * 2, names=["y", "y"]
  )
  pq.write_table(table(x=twice), tmp_path / "b.parquet")
  rows = rows_of(str(tmp_path / "b.parquet"))
  assert [row.reason for row in rows] == ["unreadable value"] * 3


def test_a_large_row_group_is_read_page_by_page(tmp_path):
  """Its first rows do not cost the whole of it."""
  pq.write_table(
    pa.table(dict(a=[f"{i:01000}" for i in range(30_000)])),
    tmp_path / "a.parquet",
    compression="none",
    use_dictionary=False,
  )
  size = (tmp_path / "a.parquet").stat().st_size
  with open(tmp_path / "a.parquet", "rb") as file:
    rows = formats.read_parquet_rows("a.parquet", counted := Counted(file))
    for _ in range(300):
      next(rows)
    rows.close()
  assert size > 20 << 20 and counted.bytes < 6 << 20


class Counted:
  """A file that counts what is read of it."""

  def __init__(self, file):
    self.file, self.bytes = file, 0

  def read(self, size=-1):
    data = self.file.read(size)
    self.bytes += len(data)
    return data

  def __getattr__(self, name):
    return getattr(self.file, name)


def test_a_hugging_face_dataset_of_strange_rows(hub_folder):
  columns = dict(at=TIMES["zone"], day=TIMES["day"], prompt=bad_text())
  pq.write_table(table(**columns), hub_folder / "train.parquet")
  rows = rows_of(f"hf:{hub_folder}")
  assert len(rows) == 3 and rows[1].reason == "bad UTF-8"
  assert rows[0]["chosen"] == rows[2]["chosen"] == "good a"
  day = datetime.date(1970, 1, 6)
  assert rows[2]["prompt"] == "c" and rows[2]["day"] == day
  assert sources.count_rows(f"hf:{hub_folder}") == (3, True)


def test_small_sources_are_counted(tmp_path):
  lines = [LINE] * 7 + [b"bad"]
  sizes = []
  for name, data in (
    ("a.jsonl", b"\n\n".join(lines)),
    ("b.jsonl.gz", gzip.compress(b"\n".join(lines))),
    ("c.json", b"[" + b", ".join(lines[:7]) + b", 3]"),
    ("d.csv", b"a,b\n" + b"1,2\n" * 7 + b"3\n"),
  ):
    source = put(tmp_path / name, data)
    sizes += [sources.count_rows(source), sources.count_rows(source, 3)]
  pq.write_table(pa.table(dict(a=list(range(8)))), tmp_path / "e.parquet")
  sizes.append(sources.count_rows(str(tmp_path / "e.parquet")))
  assert set(sizes) == {(8, True)}
  put(tmp_path / "f.jsonl", LINE)
  assert sources.count_rows(str(tmp_path / "*.jsonl")) == (9, True)


def as_json(rows):
  return json.dumps(rows)


def as_jsonl(rows):
  return "\n".join(map(json.dumps, rows))


def as_csv(rows):
  return "a,b\n" + "\n".join(f"{row['a']},{row['b']}" for row in rows)


@pytest.mark.parametrize(
  "kind, write, wrong",
  [
    ("jsonl", as_jsonl, 0.1),
    ("json", as_json, 0.1),
    ("csv", as_csv, 0.1),
    ("jsonl.gz", as_jsonl, 0.35),
  ],
)
def test_large_sources_are_estimated(tmp_path, monkeypatch, kind, write, wrong):
  monkeypatch.setattr(sources, "_ENOUGH", 1 << 16)
  monkeypatch.setattr(json_rows, "BLOCK", 1 << 12)
  texts = (f"{i * 7919 % 104729:06}" * (1 + i % 5) for i in range(30_000))
  data = write([dict(a=i, b=text) for i, text in enumerate(texts)]).encode()
  data = gzip.compress(data) if kind.endswith("gz") else data
  for name in ("a", "b"):
    put(tmp_path / f"{name}.{kind}", data)
  source = str(tmp_path / f"*.{kind}")
  found, exact = sources.count_rows(source, 1000)
  assert not exact and abs(found / 60_000 - 1) < wrong
  assert sources.count_rows(source, 10**9) == (60_000, True)


@pytest.mark.parametrize(
  "field, value",
  [
    ("score_chosen", "1e400"),
    ("score_chosen", "9" * 400),
    ("id", "1e400"),
    ("score_chosen", "NaN"),
    ("extra", DEEP.decode()),
    ("chosen", '"\\ud800"'),
    ("prompt", "9" * 5000),
    ("rejected", '"\\u2028"'),
    ("chosen", "[[[[]]]]"),
  ],
)
def test_a_load_goes_on(tmp_path, field, value):
  """The checks of a row's content do not fall over it either."""
  row = GOOD | dict(score_chosen=2.0, score_rejected=1.0, extra=0)
  rows = [row | dict(id=f"r{i}", prompt=f"q{i} ") for i in range(5)]
  lines = [json.dumps(row) for row in rows]
  old = json.dumps(rows[3][field])
  lines[3] = lines[3].replace(f'"{field}": {old}', f'"{field}": {value}')
  loaded = load(put(tmp_path / "a.jsonl", lines))
  assert len(loaded.rows) >= 4 and loaded.seen == 5
  with pytest.raises(JaxalignError):
    load(put(tmp_path / "b.jsonl", [lines[3] * 2]))
