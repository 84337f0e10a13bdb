"""Rows come with file and line; bad ones are handed on, bad files named."""

import contextlib
import gzip
import hashlib
import json
import random
import sys

from etils import epath
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import put

from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import json_rows, sources
from jaxalign.data.json_rows import BadRow
from jaxalign.data.schemas.messages import messages_of
from jaxalign.data.sources import read_rows

ROWS = [
  dict(prompt=f"p{i}", chosen=f"good {i} \u00e9\U0001f600", rejected=f"r{i}")
  for i in range(5)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
JSON = json.dumps(ROWS).encode()


def rows_of(source, **kwargs):
  return [row for _, row in read_rows(source, **kwargs)]


def csv_bytes(rows):
  quote = lambda text: '"' + text.replace('"', '""') + '"'
  lines = [list(rows[0])] + [list(row.values()) for row in rows]
  return "\r\n".join(",".join(map(quote, line)) for line in lines).encode()


CSV = csv_bytes(ROWS)


def parquet(path, rows):
  pq.write_table(pa.Table.from_pylist(rows), path)
  return str(path)


def bad_text():
  """A column of "a", a byte that is no text, and "c"."""
  ends = bytes.fromhex("00000000 01000000 02000000 03000000")
  buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"a\xffc")]
  return pa.Array.from_buffers(pa.string(), 3, buffers)


def test_every_format_reads_the_same_rows(tmp_path):
  nested = json.dumps({"version": 1, "data": ROWS}).encode()
  texts = {"a.jsonl": LINES, "a.json": JSON, "b.json": nested, "a.csv": CSV}
  made = [put(tmp_path / name, data) for name, data in texts.items()]
  for name, data in texts.items():
    made.append(put(tmp_path / f"{name}.gz", gzip.compress(data)))
  made.append(parquet(tmp_path / "a.parquet", ROWS))
  for source in made:
    assert rows_of(source) == ROWS, source
    assert {where.file for where, _ in read_rows(source)} == {source}
    assert rows_of(source, limit=2) == ROWS[:2]
    assert sources.source_files(source) == [source]


def test_lines_are_one_based_and_count_blank_lines(tmp_path):
  source = put(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
  found = [(where.line, row["a"]) for where, row in read_rows(source)]
  assert found == [(1, 1), (4, 2)]
  source = put(tmp_path / "a.csv", b'\xef\xbb\xbfa,b\n"x\ny",1\n\nz,2\n')
  found = [(where.line, row) for where, row in read_rows(source)]
  assert found == [(2, dict(a="x\ny", b="1")), (5, dict(a="z", b="2"))]


def test_a_line_too_long_is_not_held(tmp_path, monkeypatch):
  monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 1000)
  data = b'{"a": "' + b"x" * 12_345 + b'"}\n{"a": 2}\n'
  source = put(tmp_path / "a.jsonl.gz", gzip.compress(data))
  found = list(read_rows(source))
  assert found[0][1].reason == "row too long"
  assert found[1] == ((source, 2), {"a": 2})


def test_a_json_file_too_large_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(json_rows, "MAX_JSON_BYTES", 1000)
  rows = b'[{"a": 1}, ' + b" " * 9999 + b'{"a": 2}]'
  source = put(tmp_path / "a.json.gz", gzip.compress(b'{"x": ' + rows + b"}"))
  with pytest.raises(DataError, match="jsonl"):
    rows_of(source)
  # A list is read row by row: only its rows have to be held.
  source = put(tmp_path / "b.json.gz", gzip.compress(rows))
  assert rows_of(source) == [dict(a=1), dict(a=2)]
  monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 1 << 20)
  monkeypatch.setattr(json_rows, "BLOCK", 1 << 10)
  source = put(tmp_path / "c.json", b'[{"a": "' + b"x" * (5 << 20) + b'"}]')
  with pytest.raises(DataError, match="jsonl"):
    rows_of(source)


@pytest.mark.parametrize(
  "extension", ["jsonl", "json", "csv", "jsonl.gz", "csv.gz", "parquet"]
)
def test_flipped_and_cut_bytes_only_raise_data_errors(tmp_path, extension):
  table = parquet(tmp_path / "whole.parquet", ROWS)
  whole = dict(jsonl=LINES, json=JSON, csv=CSV)
  whole["parquet"] = epath.Path(table).read_bytes()
  whole = whole[extension.removesuffix(".gz")]
  if extension.endswith(".gz"):
    whole = gzip.compress(whole)
  rng = random.Random(extension)
  for _ in range(150):
    data = bytearray(whole)
    for _ in range(rng.choice((1, 2, 9))):
      at = rng.randrange(len(data))
      data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
    if rng.random() < 0.2:
      del data[rng.randrange(len(data)) :]
    with contextlib.suppress(DataError):
      for where, row in read_rows(put(tmp_path / f"a.{extension}", data)):
        assert where.line >= 1 and isinstance(row, (dict, BadRow))


def test_bad_csv_rows(tmp_path):
  data = b'a,b\n1,2\n1,2,3\n\xff,2\n4,5\n"x"y,1\n6,7\n'
  found = read_rows(put(tmp_path / "a.csv", data))
  assert [
    (w.line, row.reason if isinstance(row, BadRow) else row["a"])
    for w, row in found
  ] == [
    (2, "1"),
    (3, "wrong number of columns"),
    (4, "bad UTF-8"),
    (5, "4"),
    (6, "malformed CSV"),
    (7, "6"),
  ]


def test_a_parquet_row_of_bad_text_is_named(tmp_path):
  pq.write_table(pa.table(dict(a=bad_text())), tmp_path / "a.parquet")
  found = list(read_rows(str(tmp_path / "a.parquet")))
  assert [w.line for w, _ in found] == [1, 2, 3]
  assert found[1][1].reason == "bad UTF-8"
  assert [found[0][1], found[2][1]] == [dict(a="a"), dict(a="c")]


@pytest.mark.parametrize("name", ["no.jsonl", "no*.jsonl", "no/[ab]*.parquet"])
def test_a_missing_file_is_an_error_at_once(tmp_path, name):
  with pytest.raises(DataError, match="config.data.source"):
    read_rows(str(tmp_path / name))  # before the first row


def test_a_folder_is_no_file(tmp_path):
  (tmp_path / "folder.jsonl").mkdir()
  with pytest.raises(DataError, match="folder"):
    read_rows(str(tmp_path / "folder.jsonl"))


LARGE = ROWS * 9
WRONG = [  # name, bytes, what the error is about
  ("a.jsonl", b"", "empty"),
  ("b.jsonl", b"\n\n", "no rows"),
  ("c.json", b"[]", "no rows"),
  ("d.csv", b"a,b\n", "no rows"),
  ("e.jsonl.gz", gzip.compress(b"", mtime=0), "no rows"),
  ("f.jsonl.gz", b"", "empty"),
  ("g.parquet", b"", "empty"),
  ("a.json", b"{", "not JSON"),
  ("b.json", b'{"a": 1}\n{"a": 2}', "jsonl"),
  ("c.json", b'{"a": [], "b": []}', "2 lists"),
  ("d.json", b"3", "int"),
  ("e.json", b'["\xff"]', "UTF-8"),
  ("f.parquet", b"PAR1junk", "parquet"),
  ("g.jsonl.gz", LINES, "damaged"),
  ("h.csv.gz", gzip.compress(csv_bytes(LARGE), mtime=0)[:-9], "truncated"),
  ("h.json.gz", gzip.compress(json.dumps(LARGE).encode())[:-9], "truncated"),
  ("a.csv", b"a,a\n1,2\n", "names a column twice"),
  ("b.csv", b'"a"b,c\n1,2\n', "begin with the names"),
  ("c.csv", b"a,\xff\n1,2\n", "UTF-8 in the names"),
  ("d.csv", b"\xff,\xff\n1,2\n", "twice"),
]


@pytest.mark.parametrize("name, data, why", WRONG, ids=range(len(WRONG)))
def test_files_without_rows_or_broken_as_a_whole(tmp_path, name, data, why):
  with pytest.raises(DataError, match=why) as error:
    rows_of(put(tmp_path / name, data))
  str(error.value).encode()


def test_parquet_files_without_rows_or_cut(tmp_path):
  empty = pa.table(dict(a=pa.array([], pa.string())))
  pq.write_table(empty, tmp_path / "a.parquet")
  with pytest.raises(DataError, match="no rows"):
    rows_of(str(tmp_path / "a.parquet"))
  parquet(tmp_path / "b.parquet", ROWS)
  cut = (tmp_path / "b.parquet").read_bytes()[:-20]
  with pytest.raises(DataError, match="parquet"):
    rows_of(put(tmp_path / "c.parquet", cut))


UNKNOWN = "a.txt a a.parquet.gz foo:bar http://x/a.jsonl hf: tfds:".split()


@pytest.mark.parametrize("source", [*UNKNOWN, "", 3])
def test_an_unknown_source_names_the_knob(source):
  with pytest.raises(ConfigError, match="config.data.source"):
    read_rows(source)


def test_a_truncated_gzip_counts_the_rows_that_were_good(tmp_path):
  names = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(5000)]
  lines = [json.dumps(dict(a=name)) + "\n" for name in names]
  whole = gzip.compress("".join(lines).encode())
  source = put(tmp_path / "a.jsonl.gz", whole[: len(whole) // 2])
  seen = []
  with pytest.raises(DataError, match="truncated") as error:
    for _, row in read_rows(source):
      seen.append(row)
  assert 1000 < len(seen) < 4000
  assert seen == [json.loads(line) for line in lines[: len(seen)]]
  assert f"{len(seen)} good rows" in str(error.value)
  assert source in str(error.value)
  flipped = bytearray(whole)
  flipped[-6] ^= 1  # in the checksum
  with pytest.raises(DataError, match="damaged"):
    rows_of(put(tmp_path / "b.jsonl.gz", flipped))


def test_a_glob_reads_in_name_order_and_has_one_digest(tmp_path):
  one = b'{"a": 1}\n'
  b, a = put(tmp_path / "b.jsonl", LINES), put(tmp_path / "a.jsonl", one)
  glob = str(tmp_path / "*.jsonl")
  assert sources.source_files(glob) == [a, b]
  assert rows_of(glob) == [{"a": 1}] + ROWS
  for source, data in ((glob, one + LINES), (b, LINES)):
    assert sources.source_digest(source) == hashlib.sha256(data).hexdigest()
  (tmp_path / "x").mkdir()
  deep = put(tmp_path / "x" / "c[1].jsonl", LINES)
  assert sources.source_files(str(tmp_path / "*" / "c*.jsonl")) == [deep]
  assert sources.source_files(deep) == [deep]  # a bracket in a real name


def test_reading_streams(tmp_path):
  """The first row is there though the file's end is broken."""
  data = gzip.compress(LINES * 20_000)
  source = put(tmp_path / "a.jsonl.gz", data[:-4])
  with contextlib.closing(read_rows(source)) as rows:
    assert next(rows)[1] == ROWS[0]
  assert rows_of(source, limit=7) == ROWS + ROWS[:2]


def test_a_hugging_face_folder(hub_folder):
  put(hub_folder / "train.jsonl", LINES)
  put(hub_folder / "test.jsonl", LINES[: LINES.index(b"\n")])
  source = f"hf:{hub_folder}"
  assert rows_of(source) == ROWS
  assert rows_of(f"{source}:test") == ROWS[:1]
  assert list(read_rows(source))[1][0] == (source, 2)
  assert sources.source_files(source) == []
  digest = sources.source_digest(source)
  assert digest == sources.source_digest(source)
  assert digest != sources.source_digest(f"{source}:test")
  put(hub_folder / "train.jsonl", LINES.replace(b"good 3", b"good 4"))
  assert digest != sources.source_digest(source)
  with pytest.raises(DataError, match="nowhere"):
    rows_of("hf:nowhere/at-all")
  with pytest.raises(DataError, match="valid"):
    rows_of(f"{source}:valid")


def toy_dataset(tfds, folder, rows):
  """Writes a TFDS data set of array records; its folder."""
  text = tfds.features.Text()
  turns = tfds.features.Sequence(dict(role=text, content=text))
  scalars = dict(label=np.bool_, score=np.int32)
  scalars = {n: tfds.features.Scalar(kind) for n, kind in scalars.items()}
  features = tfds.features.FeaturesDict(
    dict(prompt=text, messages=turns) | scalars
  )

  class Toy(tfds.core.GeneratorBasedBuilder):
    """Some rows."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = folder

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield from enumerate(rows)

  builder = Toy(data_dir=folder, file_format="array_record")
  builder.download_and_prepare()
  return builder.data_dir


def test_a_tfds_dataset_of_array_records(tmp_path):
  before = "tensorflow" in sys.modules
  tfds = pytest.importorskip("tensorflow_datasets")
  tfds.disable_progress_bar()
  answer = dict(role="assistant", content="a")
  want = [
    dict(prompt=f"p \u00e9 {i}", label=i % 2 == 0, score=i)
    | dict(messages=[dict(role="user", content=f"q{i}"), answer])
    for i in range(4)
  ]
  source = f"tfds:{toy_dataset(tfds, tmp_path, want)}"
  for name in (source, f"{source}:train"):
    rows = sorted(rows_of(name), key=lambda row: row["score"])
    for row in rows:  # TFDS has a dict of lists
      row["messages"] = messages_of(row["messages"], "messages")
    assert rows == want
  assert len(rows_of(f"{source}:train[:2]")) == 2
  assert sources.source_digest(source) == sources.source_digest(source)
  assert ("tensorflow" in sys.modules) == before
  with pytest.raises(DataError, match="no_such_set"):
    rows_of("tfds:no_such_set_at_all")


def test_google_storage_goes_through_epath(tmp_path):
  put(tmp_path / "a.jsonl", LINES)

  def local(original, path, *args, **kwargs):
    path = str(path).replace("gs://bucket", str(tmp_path))
    return original(path, *args, **kwargs)

  with epath.testing.mock_epath(
    open=local, exists=local, isdir=local, glob=local
  ):
    assert rows_of("gs://bucket/a.jsonl") == ROWS


@pytest.mark.parametrize(
  "rest, want",
  [
    ("a/b", "a/b train"),
    ("a/b:", "a/b train"),
    ("a/b:test", "a/b test"),
    ("a:train[5:10%]", "a train[5:10%]"),
    ("a:b+c[:3]", "a b+c[:3]"),
    ("gs://x/y", "gs://x/y train"),
    ("gs://x/y:test", "gs://x/y test"),
    ("a:1.0.0", "a:1.0.0 train"),
    ("a:1.0.0:test", "a:1.0.0 test"),
  ],
)
def test_names_and_splits(rest, want):
  assert sources._name_and_split(rest) == tuple(want.split())
