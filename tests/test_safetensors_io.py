"""The format of checkpoints: what is believed, read, refused and written."""

import json
import os
import struct

from etils import epath
import hypothesis
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxalign.core.errors import ConfigError, DataError, WriteError
from jaxalign.model import safetensors_io as io

INDEX, FILE = "model.safetensors.index.json", "model.safetensors"


def raw(path, header, data=b""):
  """A file of this header (JSON, or a value) and these bytes."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(begin, end, shape=None, dtype="U8"):
  return dict(
    dtype=dtype,
    shape=[end - begin] if shape is None else shape,
    data_offsets=[begin, end],
  )


def opened(folder):
  return io.Checkpoint(epath.Path(folder))


def index(folder, where):
  (folder / INDEX).write_text(json.dumps(dict(weight_map=where)))


def chunk(folder, name, **tensors):
  safetensors.numpy.save_file(tensors, folder / name)


TWICE = (
  b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
  b' "a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}'
)


@pytest.mark.parametrize(
  "rows, data, words",
  [
    (dict(a=entry(0, 4), b=entry(2, 6)), 6, "offset for tensor `b`"),
    (dict(a=entry(0, 4), b=entry(0, 4)), 4, "offset for tensor"),
    (dict(a=entry(0, 6), b=entry(2, 4)), 6, "offset for tensor"),
    (dict(a=entry(0, 4), b=entry(6, 8)), 8, "offset for tensor `b`"),
    (dict(a=entry(1, 4)), 4, "offset for tensor `a`"),
    (dict(a=entry(0, 4)), 9, "not fully covered"),
    ({}, 1, "not fully covered"),
    (dict(a=entry(0, 4)), 3, "not fully covered"),
    (dict(a=entry(0, 4, [10**9, 10**9])), 4, "invalid shape"),
    (dict(a=entry(0, 10**18)), 4, "not fully covered"),
    (dict(a=entry(0, 4, [10**18] * 10**5)), 4, "overflow"),
    (dict(a=entry(0, 4, dtype="F99")), 4, "unknown variant `F99`"),
    ({"\x1b[2Ja": entry(1, 9)}, 9, r"\\x1b\[2Ja"),
    (TWICE, 2, "offset for tensor `a`"),
    (b"[" * 10**5, 0, "invalid JSON"),
    (b"9" * 10**5, 0, "invalid JSON"),
    *[(text, 0, "") for text in (b"\xff\xfe", b"{'a'", b"[1, 2]", b"3")],
    *[(text, 0, "") for text in (b'{"a": 3}', b'{"a": {"dtype": "F32"}}')],
    *[
      (dict(a=entry(0, 4) | wrong), 4, "")
      for wrong in (
        dict(shape=[-4], data_offsets=[4, 0]),
        dict(shape=[4, -1]),
        dict(shape="4"),
        dict(shape=[4.0]),
        dict(shape=3),
        dict(data_offsets=[-2, 2]),
        dict(data_offsets=[0]),
        dict(data_offsets=[0.0, 4.0]),
        dict(data_offsets=[None, 4]),
      )
    ],
  ],
)
def test_headers_that_are_not_true(tmp_path, rows, data, words):
  path = tmp_path / FILE
  raw(path, rows, bytes(data))
  with pytest.raises(DataError, match=f"damaged or cut short: .*{words}") as e:
    io.read_header(epath.Path(path))
  assert str(path) in str(e.value) and len(str(e.value)) < 700
  assert "\x1b" not in str(e.value)


def test_a_header_that_is_too_large_is_not_read(tmp_path):
  path = tmp_path / FILE
  path.write_bytes(struct.pack("<Q", 2 * 10**8))
  os.truncate(path, 3 * 10**8)  # sparse
  with pytest.raises(DataError, match="cut short: header too large"):
    io.read_header(epath.Path(path))


@pytest.mark.parametrize("size", [0, 7, 8, 30, 90])
@pytest.mark.parametrize("remote", [False, True])
def test_a_file_cut_short(tmp_path, monkeypatch, size, remote):
  """The package reads local files alone; for others our own check is there."""
  chunk(tmp_path, FILE, a=np.ones(9))
  os.truncate(tmp_path / FILE, size)
  monkeypatch.setattr(io, "_remote", lambda path: remote)
  words = ".* (byte|file)" if remote else ""
  with pytest.raises(DataError, match=f"damaged or cut short: {words}"):
    io.read_header(epath.Path(tmp_path / FILE))


def test_every_type_of_the_format_is_measured(tmp_path):
  """Buffers that nobody reads may be of any type."""
  kinds = "bool uint8 int8 int16 uint16 float16 int32 uint32 float32 int64"
  kinds = [*kinds.split(), "uint64", "float64", ml_dtypes.bfloat16]
  tensors = {np.dtype(k).name: np.ones((3, 5), k) for k in kinds}
  tensors["empty"] = np.ones((3, 0), np.float32)
  tensors["scalar"] = np.array(3, np.float32)
  chunk(tmp_path, FILE, **tensors)
  found = opened(tmp_path).tensors
  assert {n: t.shape for n, t in found.items()} == {
    n: x.shape for n, x in tensors.items()
  }
  data = (tmp_path / FILE).read_bytes()
  for name, t in found.items():
    assert data[t.begin : t.end] == tensors[name].tobytes(), name


ONE, TWO = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.fixture
def two(tmp_path):
  """Two files and an index."""
  folder, full = tmp_path / "two", lambda n, x: np.full(n, x, np.float32)
  folder.mkdir()
  chunk(folder, ONE, a=full(2, 1), b=full(3, 2))
  chunk(folder, TWO, c=full(4, 0))
  index(folder, dict(a=ONE, b=ONE, c=TWO))
  return folder


def again(folder, **changes):
  where = json.loads((folder / INDEX).read_text())["weight_map"]
  index(folder, where | changes)


def test_files_of_an_index(two):
  found = opened(two).tensors
  assert {n: t.file.name for n, t in found.items()} == dict(a=ONE, b=ONE, c=TWO)
  assert io.weights_files(epath.Path(two)) == [INDEX, ONE, TWO]
  chunk(two, FILE, d=np.zeros(1))  # transformers' first choice
  assert list(opened(two).tensors) == ["d"]


@pytest.mark.parametrize(
  "name",
  [
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/x.safetensors",
    "..",
    "",
    "..\\x.safetensors",
    "x\0.safetensors",
    ".x.safetensors",
    "passwd",
    "gs://bucket/x.safetensors",
    "C:x.safetensors",
  ],
)
def test_names_in_an_index_that_are_no_plain_names(two, name):
  chunk(two.parent, "x.safetensors", c=np.zeros(4, np.float32))
  again(two, c=name)
  with pytest.raises(DataError, match="wanted the plain name of a .safetens"):
    opened(two)


def refused(folder):
  with pytest.raises(DataError, match="is a link out of its folder, to .*"):
    opened(folder)


def test_links_out_of_the_folder(two):
  shard, outside = two / TWO, two.parent / "o"
  shard.rename(outside)
  for target in (outside, "../o"):
    shard.symlink_to(target)
    refused(two)
    shard.unlink()
  (two / FILE).symlink_to(outside)
  refused(two)
  (two / FILE).unlink()
  outside.rename(two / "inside")  # a link that stays
  shard.symlink_to("inside")
  assert sorted(opened(two).tensors) == ["a", "b", "c"]
  (two.parent / "link").symlink_to(two)  # the folder itself may be one
  assert sorted(opened(two.parent / "link").tensors) == ["a", "b", "c"]
  (two / INDEX).rename(two.parent / "index")
  (two / INDEX).symlink_to("../index")
  refused(two)


def test_links_into_the_blobs_of_the_hubs_cache(two):
  repo = two.parent / "models--a--b"
  (repo / "snapshots").mkdir(parents=True)
  (repo / "blobs").mkdir()
  snapshot = repo / "snapshots" / "0123"
  two.rename(snapshot)
  for path in list(snapshot.iterdir()):
    path.rename(repo / "blobs" / path.name[:13])
    path.symlink_to(f"../../blobs/{path.name[:13]}")
  assert sorted(opened(snapshot).tensors) == ["a", "b", "c"]
  (repo / "blobs").rename(two.parent / "elsewhere")
  (repo / "blobs").symlink_to("../elsewhere")
  refused(snapshot)


def test_all_missing_files_are_named(two):
  third = ONE.replace("1", "3", 1)
  again(two, d=third, c="other.safetensors")
  words = f"names files that are missing: {third}; other.safetensors$"
  with pytest.raises(DataError, match=words):
    opened(two)


def test_an_index_that_is_not_true_of_its_files(two):
  again(two, a=TWO, z=TWO)
  with pytest.raises(DataError) as caught:
    opened(two)
  for words in (f"a is in {ONE}, not in {TWO}", f"z is not in {TWO}"):
    assert words in str(caught.value)
  chunk(two, TWO, c=np.zeros(4, np.float32), b=np.zeros(3, np.float32))
  with pytest.raises(DataError, match=f"b is in {ONE} and in {TWO}"):
    opened(two)


TWICE_IN_INDEX = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
NO_INDEX = ["", "{", "[]", "3", "{}", "\xff", "[" * 10**5, TWICE_IN_INDEX]
NO_INDEX += ['{"weight_map": []}', '{"weight_map": {"a": 1}}']


@pytest.mark.parametrize("text", NO_INDEX)
def test_an_index_that_is_none(two, text):
  (two / INDEX).write_text(text, encoding="latin-1")
  with pytest.raises(DataError, match="index.json is damaged: it is no index"):
    opened(two)


def test_pickles_are_refused(tmp_path):
  pickle, convert = (
    "pytorch_model-00001-of-00002.bin",
    "which can run code: conv",
  )
  with pytest.raises(ConfigError, match=f"has no {FILE} and no {INDEX}$"):
    opened(tmp_path / "nowhere")
  (tmp_path / pickle).write_bytes(b"")
  with pytest.raises(ConfigError, match=f"{pickle} is a pickle, {convert}"):
    opened(tmp_path)
  index(tmp_path, dict(a=pickle))
  with pytest.raises(DataError, match=f"{pickle}, a pickle, {convert}"):
    opened(tmp_path)
  os.mkfifo(tmp_path / FILE)  # would wait for ever
  with pytest.raises(DataError, match="a pickle"):
    opened(tmp_path)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
  st.data(),
  st.lists(st.integers(1, 6), max_size=4),
  st.integers(1, 40),
  st.integers(1, 40),
)
def test_chunks_cover_a_box_once_and_stay_small(data, view, most, gap):
  view = tuple(view)
  ends = lambda n: st.sets(st.integers(0, n), min_size=2, max_size=2)
  box = tuple(tuple(sorted(data.draw(ends(n)))) for n in view)
  number = np.arange(int(np.prod(view))).reshape(view)
  slices = lambda b: tuple(slice(*x) for x in b)
  seen = np.zeros(view, int)
  for chunked in io._cut(io._strides(view), box, most, gap, 0):
    where = number[slices(chunked)].ravel()
    assert where[-1] - where[0] < most  # elements it reaches over
    assert np.diff(where, prepend=where[0]).max() <= gap  # what lies between
    seen[slices(chunked)] += 1
  wanted = np.zeros(view, int)
  wanted[slices(box)] = 1
  np.testing.assert_array_equal(seen, wanted)


def test_parts_of_a_file_of_odd_offsets(tmp_path):
  """A header of any length: numbers need not be aligned."""
  rng = np.random.default_rng(0)
  for kind in (np.float32, np.float16, ml_dtypes.bfloat16):
    x = rng.normal(size=(6, 4, 5)).astype(kind)
    name = {np.dtype(v): k for k, v in io.FLOATS.items()}[np.dtype(kind)]
    rows = dict(a=entry(0, 3), x=entry(3, 3 + x.nbytes, x.shape, name))
    for pad in range(4):
      text = json.dumps(rows).encode() + b" " * pad
      raw(tmp_path / FILE, text, b"abc" + x.tobytes())
      found = opened(tmp_path)
      got = found.read("x", (6, 2, 2, 5), ((2, 5), (1, 2), (0, 2), (1, 4)))
      np.testing.assert_array_equal(
        got, x.reshape(6, 2, 2, 5)[2:5, 1:2, :, 1:4]
      )
      assert got.dtype == kind and not got.flags.writeable


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
  chunk(tmp_path, FILE, x=np.ones(1000, np.float32))
  found = opened(tmp_path)
  os.truncate(tmp_path / FILE, 200)
  with pytest.raises(DataError, match="was cut short while it was read"):
    found.read("x", (1000,), ((0, 1000),))


@pytest.mark.parametrize(
  "most, wanted",
  [
    (100, [["a", "b", "c", "d"]]),
    (60, [["a", "b", "c", "d"]]),
    (59, [["a", "b", "c"], ["d"]]),
    (30, [["a", "b"], ["c", "d"]]),
    (1, [["a"], ["b"], ["c"], ["d"]]),
  ],
)
def test_tensors_are_spread_over_files(most, wanted):
  files = io.split(dict(a=10, b=20, c=20, d=10), most)
  assert list(files.values()) == wanted
  n = len(wanted)
  names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
  assert list(files) == (names if n > 1 else [FILE])


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_a_header_is_read_by_the_formats_own_reader(tmp_path, kind):
  x = {
    "a.b": np.arange(6).reshape(2, 3).astype(kind),
    "\u00fc": np.ones(5, kind),
  }
  (tmp_path / "x").write_bytes(
    io.header({n: w.shape for n, w in x.items()}, np.dtype(kind))
    + b"".join(w.tobytes() for w in x.values())
  )
  back = safetensors.numpy.load_file(tmp_path / "x")
  assert list(back) == list(x)
  for n in x:
    np.testing.assert_array_equal(back[n], x[n])
    assert back[n].dtype == kind
  with safetensors.safe_open(tmp_path / "x", "np") as f:
    assert f.metadata() == {"format": "pt"}


def test_all_files_appear_at_the_end_or_none(tmp_path):
  paths = [epath.Path(tmp_path / "new" / n) for n in "ab"]
  with pytest.raises(ZeroDivisionError):
    with io.atomic(paths) as temporary:
      temporary[0].write_bytes(b"1")
      raise ZeroDivisionError
  assert not list((tmp_path / "new").iterdir())
  with pytest.raises(WriteError, match="cannot write .*No space left"):
    with io.atomic(paths) as temporary:
      temporary[1].write_bytes(b"1")
      with open("/dev/full", "wb") as f:
        f.write(b"x")
  assert not list((tmp_path / "new").iterdir())
  with io.atomic(paths) as temporary:
    for path in temporary:
      path.write_bytes(path.name.encode())
      assert ".tmp-" in path.name
    assert not any(p.exists() for p in paths)
  assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a", "b"]
