"""Columns of the pool on disk: arrays that readers map, in shards with digests.

A shard is a fixed range of rows in id order with one writer. A small file
written after its rows holds their digests and that of the shard's ids, so a
shard is whole or it is not there: a run that was killed resumes at the first
shard that is missing or damaged. On a disk a column is one .npy file, of which
a reader maps what it reads; in a bucket, where no file can be written in
ranges, it is one file a shard.

  store.json                what made it, how many rows, which columns
  shards/00012.json         digests of shard 12, written last
  <column>.npy              all rows; in a bucket <column>/00012.npy

Not tensorstore or zarr: what they hand out is read into memory, and samplers
take NumPy arrays; nor do they say which rows are damaged.
"""

from collections.abc import Iterable
import hashlib
import io
import json
import math
import os
import tempfile
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import disk, progress, sharding
from jaxalign.core.errors import ConfigError, CorruptError, WriteError

DTYPES = ("float32", "bfloat16")
_BFLOAT16 = np.dtype(jnp.bfloat16)  # a .npy file holds its bits as uint16


class ArraySpec(NamedTuple):
  """One row of a column."""

  shape: tuple[int, ...]  # without the axis of rows
  dtype: str = "float32"  # or "bfloat16"


class Store(NamedTuple):
  """A store on disk; reading it opens files and keeps none."""

  folder: epath.Path
  rows: int  # N
  shard: int  # rows of a shard; the last has what is left
  columns: dict[str, ArraySpec]
  fields: dict[str, Any]  # what made it: model, data, options
  ids: str  # digest of all record ids, in order
  key: str  # of all this; every shard's file repeats it

  @property
  def shards(self) -> int:
    """The number of shards."""
    return -(-self.rows // self.shard)

  def bounds(self, shard: int) -> tuple[int, int]:
    """First row of a shard, and the one after its last."""
    start = shard * self.shard
    return start, min(self.rows, start + self.shard)

  def sizes(self, shards: Iterable[int]) -> list[int]:
    """The rows of some shards."""
    return [stop - start for start, stop in map(self.bounds, shards)]


def encoded(ids: Any) -> np.ndarray:
  """[N] record ids -> [N] UTF-8 bytes of one width."""
  if getattr(ids, "dtype", None) is not None and ids.dtype.kind == "S":
    return ids
  out = [str(i).encode() for i in ids]
  return np.array(out, f"S{max(map(len, out), default=1) or 1}")


def _digest(x: Any) -> str:
  """Of an array's bytes, or of a JSON value."""
  if isinstance(x, np.ndarray):
    return hashlib.sha256(np.ascontiguousarray(x).data).hexdigest()
  return hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()


def _store(folder: Any, description: dict[str, Any]) -> Store:
  columns = {
    name: ArraySpec(tuple(shape), dtype)
    for name, (shape, dtype) in description["columns"].items()
  }
  given = {k: description[k] for k in ("rows", "shard", "fields", "ids")}
  key = _digest(description)[:16]
  return Store(epath.Path(folder), columns=columns, key=key, **given)


def _read_description(folder: epath.Path) -> dict[str, Any] | None:
  """What store.json says; None where it is absent or damaged."""
  path = folder / "store.json"
  if not path.exists():
    return None
  try:
    found = disk.read_json(path)
    key = found.pop("key")
    return found if _store(folder, found).key == key else None
  except (ValueError, KeyError, TypeError, AttributeError):
    return None


def create(
  folder: Any,
  ids: np.ndarray,
  columns: dict[str, ArraySpec],
  *,
  fields: dict[str, Any],
  shard: int,
) -> Store:
  """Makes a store, or finds the one to resume.

  Args:
    folder: of the store alone; all processes call.
    ids: [N] record ids, sorted; see `encoded`.
    columns: by name, of DTYPES.
    fields: JSON values that name what makes the numbers: model, data, options.
    shard: rows of a shard, 1 or more.

  Raises:
    ConfigError: the folder holds a store of another description; the message
      names the field.
  """
  folder, ids = epath.Path(folder), encoded(ids)
  description = dict(rows=len(ids), shard=shard, fields=fields, columns=columns)
  description = json.loads(json.dumps(description | dict(ids=_digest(ids))))
  found, wanted = _read_description(folder), _store(folder, description)
  was, now = (d | d["fields"] for d in (found or description, description))
  for name in sorted((was.keys() | now.keys()) - {"fields"}):
    a, b = was.get(name), now.get(name)
    if a != b:
      what = f"was made by something else: {name} was {a!r}, now {b!r}"
      if name == "ids":
        digests = f"its ids have the digest {a[:12]}, these {b[:12]}"
        what = f"holds numbers of other records: {digests}"
      raise ConfigError(f"{folder} {what}; use another folder or make it again")
  sharding.barrier("store is looked at")
  if jax.process_index() == 0:
    if found is None:
      disk.write_json(folder / "store.json", description | dict(key=wanted.key))
    for name in columns:
      _make_room(wanted, name)
  sharding.barrier("store is there")
  return wanted


def open_store(folder: Any) -> Store:
  """A finished store, to be read.

  Raises:
    CorruptError: there is no store, or it lacks shards.
  """
  folder = epath.Path(folder)
  found = _read_description(folder)
  if found is None:
    raise CorruptError(
      f"{folder} holds no store, or store.json is damaged; run "
      "the stage that makes it again"
    )
  store = _store(folder, found)
  missing = [s for s in range(store.shards) if not _side(store, s).exists()]
  if missing:
    raise CorruptError(
      f"{folder} lacks {len(missing)} of {store.shards} "
      f"shards, {missing[0]:05d} the first; run the stage "
      "that makes it again"
    )
  return store


def _in_bucket(store: Store) -> bool:
  return "://" in str(store.folder)


def _layout(store: Store, name: str) -> tuple[bytes, np.dtype, tuple]:
  """The header of a column's .npy file, its dtype and its shape."""
  spec = store.columns[name]
  dtype = np.dtype("uint16" if spec.dtype == "bfloat16" else spec.dtype)
  shape = (store.rows, *spec.shape)
  header = io.BytesIO()
  about = dict(descr=dtype.str, fortran_order=False, shape=shape)
  np.lib.format.write_array_header_1_0(header, about)
  return header.getvalue(), dtype, shape


def _make_room(store: Store, name: str) -> None:
  """A file for all rows, in which those already written stay."""
  if _in_bucket(store):
    return
  header, dtype, shape = _layout(store, name)
  path = os.fspath(store.folder / f"{name}.npy")
  with open(path, "r+b" if os.path.exists(path) else "w+b") as file:
    file.write(header)
    file.truncate(len(header) + dtype.itemsize * math.prod(shape))


def _write_rows(store: Store, name: str, shard: int, x: np.ndarray) -> None:
  """The rows of one shard, as the file holds them."""
  if _in_bucket(store):
    disk.write_array(store.folder / name / f"{shard:05d}.npy", x)
    return
  header, dtype, shape = _layout(store, name)
  row = dtype.itemsize * math.prod(shape[1:])
  path = os.fspath(store.folder / f"{name}.npy")
  try:
    with open(path, "r+b") as file:
      file.seek(len(header) + row * store.bounds(shard)[0])
      file.write(np.ascontiguousarray(x).data)
  except OSError as error:
    raise WriteError(
      f"cannot write {path}: {error.strerror or error}; free "
      "space or permissions, or another --workdir"
    ) from error


def _read_rows(store: Store, name: str, shard: int) -> np.ndarray:
  """The rows of one shard, as the file holds them; ValueError if misshapen."""
  start, stop = store.bounds(shard)
  _, dtype, shape = _layout(store, name)
  if _in_bucket(store):
    x = disk.read_array(store.folder / name / f"{shard:05d}.npy")
    shape = (stop - start, *shape[1:])
  else:
    x = disk.read_array(store.folder / f"{name}.npy")
  if x.shape != shape or x.dtype != dtype:
    raise ValueError(f"{name} is {x.dtype}{list(x.shape)}")
  return x if _in_bucket(store) else x[start:stop]


def _side(store: Store, shard: int) -> epath.Path:
  return store.folder / "shards" / f"{shard:05d}.json"


def write_shard(
  store: Store, shard: int, ids: np.ndarray, arrays: dict[str, np.ndarray]
) -> None:
  """Writes a shard; one process does, and nobody else this shard.

  Args:
    store: as of `create`.
    shard: its number.
    ids: [N] the ids that the store was made with.
    arrays: column -> [rows of the shard, ...], float32 or the column's dtype.
  """
  start, stop = store.bounds(shard)
  digests = {}
  for name, spec in store.columns.items():
    x = np.asarray(arrays[name])
    if x.shape != (stop - start, *spec.shape):
      raise ValueError(
        f"column {name} has shape {x.shape}, wanted "
        f"{(stop - start, *spec.shape)}"
      )
    if spec.dtype == "bfloat16":
      x = x.astype(_BFLOAT16, copy=False).view(np.uint16)
    else:
      x = x.astype(spec.dtype, copy=False)
    _write_rows(store, name, shard, x)
    digests[name] = _digest(x)
  side = dict(
    shard=shard,
    rows=[start, stop],
    key=store.key,
    ids=_digest(encoded(ids)[start:stop]),
    columns=digests,
  )
  disk.write_json(_side(store, shard), side | dict(digest=_digest(side)))


def _damage(store: Store, shard: int, ids: np.ndarray) -> str | None:
  """Why a shard has to be made: "" where it is absent, None where it is whole.

  Every byte of the shard is read.
  """
  path = _side(store, shard)
  if not path.exists():
    return ""
  try:
    side = disk.read_json(path)
    if side.pop("digest") != _digest(side):
      raise ValueError("digest")
    if side["key"] != store.key:
      return "is of another store"
    if side["ids"] != _digest(ids[slice(*store.bounds(shard))]):
      return "is of other records"
    digests = dict(side["columns"])
  except (ValueError, KeyError, TypeError, AttributeError):
    return "its record has other bytes than were written"
  for name in store.columns:
    try:
      whole = _digest(_read_rows(store, name, shard)) == digests.get(name)
    except (ValueError, OSError, EOFError):
      whole = False
    if not whole:
      return f"{name} has other bytes than were written"
  return None


def pending(store: Store, ids: np.ndarray) -> list[int]:
  """The shards to make, ascending; what is there is read and checked.

  Each process checks some of the shards; all get the same answer. A shard that
  is there and not whole is reported, with its name.
  """
  ids, wanted = encoded(ids), np.zeros(store.shards, np.int32)
  for shard in range(jax.process_index(), store.shards, jax.process_count()):
    why = _damage(store, shard, ids)
    wanted[shard] = why is not None
    if why:
      progress.say(f"  shard {shard:05d}: {why}; doing it again")
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    wanted = np.asarray(multihost_utils.process_allgather(wanted)).sum(0)
  return np.flatnonzero(wanted).tolist()


def scratch(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
  """An array in a file of no name, gone with it: no anonymous memory."""
  if not math.prod(shape):
    return np.zeros(shape, dtype)
  with tempfile.TemporaryFile() as file:
    return np.memmap(file, dtype, "w+", shape=shape)


def read(folder: Any, column: str) -> np.ndarray:
  """A whole column [N, ...] float32, mapped: what is held is what is touched.

  One of bfloat16, or in a bucket, is copied to a scratch file first.
  """
  store = folder if isinstance(folder, Store) else open_store(folder)
  if column not in store.columns:
    raise ConfigError(
      f"{store.folder} has no column {column!r}, it has "
      f"{', '.join(sorted(store.columns))}"
    )
  spec = store.columns[column]
  if spec.dtype == "float32" and not _in_bucket(store) and store.rows:
    return disk.read_array(store.folder / f"{column}.npy")
  shape = store.rows, *spec.shape
  out = scratch(shape)
  for shard in range(store.shards):
    x = _read_rows(store, column, shard)
    x = x.view(_BFLOAT16) if spec.dtype == "bfloat16" else x
    out[slice(*store.bounds(shard))] = x
  return out
