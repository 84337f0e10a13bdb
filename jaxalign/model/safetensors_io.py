"""Checkpoints of safetensors files: what they hold, chunks of it, and writing.

Files come from strangers. A header is believed only where it agrees with the
file's size, and no name in an index leads out of the folder. Nothing is
unpickled.

The `safetensors` package checks the headers of local files. It reads whole
local files by their own shapes and writes what is held in memory; here chunks
of fused tensors are read, from object stores too, and tensors are written one
by one.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import math
import mmap
import operator
import os
from typing import Any, NamedTuple

from etils import epath
import ml_dtypes
import numpy as np
import safetensors

from jaxalign.core.errors import ConfigError, DataError, WriteError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_UNREADABLE = (ValueError, TypeError, AttributeError, KeyError, RecursionError)
_MOST_HEADER = 100_000_000  # bytes, as in the format's own reader
_CONVERT = (
  "a pickle, which can run code: convert it with transformers' "
  "save_pretrained, which writes safetensors, where you trust it"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LOCAL, _REMOTE = 1 << 20, 1 << 23  # bytes looked at in one go
_GAP = 1 << 20  # bytes that are rather skipped than read

Box = tuple[tuple[int, int], ...]  # [begin, end) on each axis


class Tensor(NamedTuple):
  """Where a tensor lies: bytes [begin, end) of a file."""

  file: epath.Path
  dtype: str  # as the format spells it
  shape: tuple[int, ...]
  begin: int
  end: int


def printable(name: Any) -> str:
  """A stranger's name as it may stand in a line of error."""
  name = str(name)
  name = name if name.isprintable() else ascii(name)
  return name if len(name) <= 200 else f"{name[:200]}..."


def listed(problems: Sequence[str]) -> str:
  """The first 20 problems and how many more there are."""
  more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
  return "; ".join(problems[:20]) + more


def _parse(text: bytes) -> dict[str, Any]:
  """A JSON object, each of whose names stands in it once."""

  def once(pairs):
    out = dict(pairs)
    if len(out) < len(pairs):
      names = [n for n, _ in pairs]
      twice = next(n for n in names if names.count(n) > 1)
      raise ValueError(f"{printable(twice)} is named twice")
    return out

  return json.loads(text.decode(), object_pairs_hook=once)


def read_header(path: epath.Path) -> dict[str, Tensor]:
  """Name -> place of the tensors of one file; reads its header alone.

  Raises:
    DataError: cut short, or a header that is not true of the file.
  """
  size, tensors = path.stat().length, {}
  try:
    if not _remote(path):
      safetensors.safe_open(os.fspath(path), "numpy")
    with path.open("rb") as f:
      wants = int.from_bytes(f.read(8), "little")
      if not 0 < wants <= min(size - 8, _MOST_HEADER):
        raise ValueError(f"header of {wants:,} bytes in a file of {size:,}")
      rows = _parse(f.read(wants))
    rows.pop("__metadata__", None)
    for name, info in rows.items():
      begin, end = (8 + wants + int(x) for x in info["data_offsets"])
      if end > size:
        raise ValueError(f"{name} ends at byte {end:,} of {size:,}")
      shape = tuple(int(n) for n in info["shape"])
      tensors[name] = Tensor(path, str(info["dtype"]), shape, begin, end)
  except (safetensors.SafetensorError, *_UNREADABLE) as error:
    why = str(error).removeprefix("Error while deserializing header: ")
    raise DataError(
      f"{path} is damaged or cut short: {printable(why)}"
    ) from error
  return tensors


def weights_files(folder: epath.Path) -> list[str]:
  """Names of the files of weights in a folder, the index first if it has one.

  Raises:
    ConfigError: no safetensors in Hugging Face's layout; pickles, perhaps.
    DataError: an index that is damaged, or names what is not in the folder.
  """
  if _is_file(folder / FILE):
    return [_inside(folder, FILE).name]
  if _is_file(folder / INDEX):
    return [INDEX, *sorted(set(_read_index(folder).values()))]
  names = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
  pickles = [n for n in names if n.endswith(_PICKLES)]
  hint = f"; {printable(pickles[0])} is {_CONVERT}" if pickles else ""
  raise ConfigError(f"{folder} has no {FILE} and no {INDEX}{hint}")


def _read_index(folder: epath.Path) -> dict[str, str]:
  """Tensor name -> file name, each a plain file of the folder."""
  path = _inside(folder, INDEX)
  try:
    found = _parse(path.read_bytes())["weight_map"]
    where = {str(n): operator.add("", file) for n, file in found.items()}
  except _UNREADABLE as error:
    raise DataError(
      f"{path} is damaged: it is no index of tensors "
      f"({type(error).__name__}: {printable(error)})"
    ) from error
  names = sorted(set(where.values()))
  for name in names:
    if name.endswith(_PICKLES):
      raise DataError(f"{path} names {printable(name)}, {_CONVERT}")
  missing = [printable(n) for n in names if not _is_file(_inside(folder, n))]
  if missing:
    raise DataError(f"{path} names files that are missing: {listed(missing)}")
  return where


def _inside(folder: epath.Path, name: str) -> epath.Path:
  """The file of that name in the folder, which no link leads out of.

  The Hub's cache keeps a snapshot's files as links into its own `blobs`.
  """
  path = folder / name
  whole = name.endswith((".safetensors", ".json")) and name[0] != "."
  if not whole or set(name) & set("/\\\0:"):
    raise DataError(
      f"{folder / INDEX} names {printable(name)!r}, wanted the plain "
      "name of a .safetensors file in its folder"
    )
  if _remote(folder):
    return path  # an object store has no links
  root, real = os.path.realpath(folder), os.path.realpath(path)
  above, roots = os.path.dirname(root), [root]
  if os.path.basename(above) == "snapshots":
    roots.append(os.path.join(os.path.dirname(above), "blobs"))
  if not any(real.startswith(os.path.join(r, "")) for r in roots):
    raise DataError(
      f"{path} is a link out of its folder, to {printable(real)}; "
      "put the file itself there"
    )
  return path


class Checkpoint:
  """The tensors of a folder, of which any part can be read.

  Attributes:
    tensors: name -> Tensor.
  """

  def __init__(self, folder: epath.Path):
    """Reads the header of each file once.

    Raises:
      ConfigError: no safetensors in the folder.
      DataError: a damaged file or index, a tensor that is there twice.
    """
    self.tensors: dict[str, Tensor] = {}
    self._maps: dict[epath.Path, mmap.mmap] = {}  # of local files
    self._open: tuple[Any, Any] = (None, None)  # the remote file read last
    files, wrong = weights_files(folder), []
    file_of = lambda name: self.tensors[name].file.name
    for file in [f for f in files if f != INDEX]:
      for name, t in read_header(folder / file).items():
        if name in self.tensors:
          first = file_of(name)
          wrong.append(f"{printable(name)} is in {first} and in {file}")
        self.tensors[name] = t
    index = _read_index(folder) if files[0] == INDEX else {}
    for name, file in index.items():
      if name not in self.tensors:
        wrong.append(f"{printable(name)} is not in {file}")
      elif file_of(name) != file:
        there = f"{file_of(name)}, not in {file}"
        wrong.append(f"{printable(name)} is in {there}")
    if wrong:
      raise DataError(
        f"{folder / INDEX} is not true of its files: {listed(wrong)}"
      )

  def chunks(self, name: str, view: tuple[int, ...], box: Box) -> Iterator[Box]:
    """Cuts a box of a tensor, seen as `view`, into boxes to `read`.

    What lies between them in the file, where it is much, is not read.
    """
    t = self.tensors[name]
    size = FLOATS[t.dtype].itemsize
    most = (_REMOTE if _remote(t.file) else _LOCAL) // size
    return _cut(_strides(view), box, most, _GAP // size, 0)

  def read(self, name: str, view: tuple[int, ...], box: Box) -> np.ndarray:
    """One box, in the file's own type, read-only: a map of a local file.

    Raises:
      DataError: the file is shorter than its header was.
    """
    t = self.tensors[name]
    dtype, strides = FLOATS[t.dtype], _strides(view)
    low = sum(b * n for (b, _), n in zip(box, strides))
    high = 1 + sum((e - 1) * n for (_, e), n in zip(box, strides))
    begin = t.begin + low * dtype.itemsize
    count = (high - low) * dtype.itemsize
    if _remote(t.file):
      if self._open[0] != t.file:
        self._open = (t.file, t.file.open("rb"))  # what it was before is freed
      self._open[1].seek(begin)
      data, begin = self._open[1].read(count), 0
    else:
      if t.file not in self._maps:
        with open(os.fspath(t.file), "rb") as f:
          self._maps[t.file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
      data = self._maps[t.file]
    if len(data) < begin + count:
      raise DataError(f"{t.file} was cut short while it was read")
    flat = np.frombuffer(data, dtype, high - low, begin)
    shape, steps = (
      [e - b for b, e in box],
      [n * dtype.itemsize for n in strides],
    )
    return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)


def _remote(path: epath.Path) -> bool:
  return "://" in str(path)


def _is_file(path: epath.Path) -> bool:
  """Whether it is a plain file; epath takes a pipe for one."""
  return path.is_file() if _remote(path) else os.path.isfile(path)


def _strides(view: tuple[int, ...]) -> list[int]:
  """Elements from one index of an axis to the next."""
  return [math.prod(view[i + 1 :]) for i in range(len(view))]


def _cut(
  strides: list[int], box: Box, most: int, gap: int, axis: int
) -> Iterator[Box]:
  """Boxes that make up a box and each reach over `most` elements or fewer.

  Gaps only shrink from one axis to the next, so where the indices of an axis
  lie close, those of the axes after it do too.
  """
  if any(e <= b for b, e in box):
    return
  while axis < len(box) and box[axis][1] - box[axis][0] == 1:
    axis += 1
  if axis == len(box):
    yield box
    return
  inner = 1 + sum(
    (e - 1 - b) * n for (b, e), n in zip(box[axis + 1 :], strides[axis + 1 :])
  )
  begin, end = box[axis]
  close = inner <= most and strides[axis] - inner < gap
  step = 1 + (most - inner) // strides[axis] if close else 1
  for at in range(begin, end, step):
    chunk = (*box[:axis], (at, min(at + step, end)), *box[axis + 1 :])
    if close:
      yield chunk
    else:
      yield from _cut(strides, chunk, most, gap, axis + 1)


def split(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
  """File name -> tensors in it, in order, at most `most` bytes where it can.

  Args:
    sizes: tensor name -> bytes.
    most: bytes of tensors in a file; a larger tensor has a file of its own.
  """
  groups: list[list[str]] = [[]]
  room = most
  for name, size in sizes.items():
    if size > room and groups[-1]:
      groups.append([])
      room = most
    groups[-1].append(name)
    room -= size
  n = len(groups)
  if n == 1:
    return {FILE: groups[0]}
  files = (f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1))
  return dict(zip(files, groups))


def header(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
  """What stands before the tensors, which follow in this order."""
  kind = {kind: name for name, kind in FLOATS.items()}[np.dtype(dtype)]
  at, rows = 0, {"__metadata__": {"format": "pt"}}
  for name, shape in shapes.items():
    end = at + math.prod(shape) * np.dtype(dtype).itemsize
    rows[name] = dict(dtype=kind, shape=list(shape), data_offsets=[at, end])
    at = end
  text = json.dumps(rows, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def atomic(paths: Sequence[epath.Path]) -> Iterator[list[epath.Path]]:
  """Temporary names, which become `paths` at the end, or are removed.

  Raises:
    WriteError: a full disk, a folder that is read-only, and the like.
  """
  temporary = [p.parent / f".{p.name}.tmp-{os.getpid()}" for p in paths]
  try:
    for folder in {p.parent for p in paths}:
      folder.mkdir(parents=True, exist_ok=True)
    yield temporary
    for source, path in zip(temporary, paths):
      source.replace(path)
  except BaseException as error:
    for source in temporary:
      with contextlib.suppress(OSError):
        source.unlink(missing_ok=True)
    if isinstance(error, OSError):
      raise WriteError(
        f"cannot write {paths[0].parent if paths else ''}: "
        f"{error.strerror or error}; free space or permissions, or another "
        "--workdir"
      ) from error
    raise
