"""Columns of rows by record id, in shards with one writer and a digest each.

A shard is a fixed range of rows in id order. Its columns are .npy files; the
small file written after them holds their digests and that of the shard's ids,
so a shard is whole or it is not there. A run that was killed goes on at the
first shard that is missing or harmed, and reading maps a shard into memory
where the disk is local: what is held is a tile, whatever N is.

  store.json                what made it, how many rows, which columns
  shards/00012.json         digests of shard 12, written last
  <column>/00012.npy        its rows; "id" is a column too
"""

from collections.abc import Iterable, Iterator
import hashlib
import json
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import artifacts, progress, sharding
from jaxalign.errors import ConfigError, CorruptError

SHARD = 8192  # rows, where nobody says another number
DTYPES = ("float32", "bfloat16")
ID = "id"
_BFLOAT16 = np.dtype(jnp.bfloat16)  # a .npy file holds its bits as uint16


class Column(NamedTuple):
  """What one row of a column looks like."""

  shape: tuple[int, ...]  # without the axis of rows
  dtype: str = "float32"  # a NumPy name, or "bfloat16"


class Store(NamedTuple):
  """A store on disk; reading it opens files and keeps none."""

  folder: epath.Path
  rows: int  # N
  shard: int  # rows of a shard; the last has what is left
  columns: dict[str, Column]
  fields: dict[str, Any]  # what made it: model, data, knobs
  ids: str  # digest of all record ids, in order
  key: str  # of all this; every shard's file repeats it

  @property
  def shards(self) -> int:
    """How many shards hold the rows."""
    return -(-self.rows // self.shard)

  def bounds(self, shard: int) -> tuple[int, int]:
    """First row of a shard, and the one after its last."""
    start = shard * self.shard
    return start, min(self.rows, start + self.shard)


def encoded(ids: Any) -> np.ndarray:
  """[N] record ids -> [N] UTF-8 bytes of one width; bytes stay as they are."""
  if getattr(ids, "dtype", None) is not None and ids.dtype.kind == "S":
    return ids
  out = [str(i).encode() for i in ids]
  return np.array(out, f"S{max(map(len, out), default=1) or 1}")


class StoredIds:
  """The ids of a store, [N] bytes, read when they are sliced.

  A class because it stands where an array of N would.
  """

  def __init__(self, store: Store):
    self.store, self.dtype = store, np.dtype(store.columns[ID].dtype)

  def __len__(self) -> int:
    return self.store.rows

  def __getitem__(self, where: slice) -> np.ndarray:
    start, stop, _ = where.indices(self.store.rows)
    return read_rows(self.store, ID, start, stop)


def _digest_ids(ids: Any, start: int, stop: int) -> str:
  """Of any range in steps, so that no copy of all of them is made."""
  total = hashlib.sha256()
  for at in range(start, stop, 65536):
    total.update(
      np.ascontiguousarray(ids[at : min(stop, at + 65536)]).tobytes()
    )
  return total.hexdigest()


def _described(
  rows: int,
  shard: int,
  columns: dict[str, Column],
  fields: dict[str, Any],
  ids: str,
) -> dict[str, Any]:
  """What store.json says, less the key."""
  return json.loads(
    json.dumps(
      dict(
        rows=rows,
        shard=shard,
        fields=fields,
        ids=ids,
        columns={n: [list(c.shape), c.dtype] for n, c in columns.items()},
      )
    )
  )


def _store(folder: Any, said: dict[str, Any]) -> Store:
  columns = {
    n: Column(tuple(shape), dtype)
    for n, (shape, dtype) in said["columns"].items()
  }
  key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
  return Store(
    epath.Path(folder),
    said["rows"],
    said["shard"],
    columns,
    said["fields"],
    said["ids"],
    key[:16],
  )


def _read_description(folder: epath.Path) -> dict[str, Any] | None:
  """What store.json says; None where it is absent or harmed."""
  path = folder / "store.json"
  if not path.exists():
    return None
  try:
    said = artifacts.read_json(path)
    key = said.pop("key")
    return said if _store(folder, said).key == key else None
  except (ValueError, KeyError, TypeError, AttributeError):
    return None


def _refuse(
  folder: epath.Path, found: dict[str, Any], wanted: dict[str, Any]
) -> None:
  """Names the first thing in which two descriptions differ."""
  flat = [
    {f"fields.{k}": v for k, v in one["fields"].items()}
    | {k: v for k, v in one.items() if k != "fields"}
    for one in (found, wanted)
  ]
  for name in sorted(flat[0].keys() | flat[1].keys()):
    was, now = flat[0].get(name), flat[1].get(name)
    if was == now:
      continue
    if name == "ids":
      raise ConfigError(
        f"{folder} holds numbers of other records: its ids "
        f"have the digest {was[:12]}, these {now[:12]}; use "
        "another folder or make it again"
      )
    raise ConfigError(
      f"{folder} was made by something else: "
      f"{name.removeprefix('fields.')} was {was!r}, now "
      f"{now!r}; use another folder or make it again"
    )


def create(
  folder: Any,
  ids: np.ndarray,
  columns: dict[str, Column],
  *,
  fields: dict[str, Any],
  shard: int = SHARD,
) -> Store:
  """Makes a store, or finds the one to go on with.

  Args:
    folder: of the store alone; all processes call.
    ids: [N] record ids, sorted; bytes as of `encoded` (a memory map may be).
    columns: name -> what a row looks like; "id" is added.
    fields: JSON values that name what makes the numbers: model, data, knobs.
    shard: rows of a shard.

  Raises:
    ConfigError: the folder holds a store of another description; the message
      names the field.
  """
  if shard < 1:
    raise ConfigError(
      f"a shard of {shard} rows, wanted 1 or more; set config.embed.shard"
    )
  for name, column in columns.items():
    if column.dtype not in DTYPES:
      raise ConfigError(
        f"column {name} of {column.dtype!r}, wanted one of "
        f"{', '.join(DTYPES)}; set config.embed.store_dtype"
      )
  folder, ids = epath.Path(folder), encoded(ids)
  said = _described(
    len(ids),
    shard,
    columns | {ID: Column((), ids.dtype.str)},
    fields,
    _digest_ids(ids, 0, len(ids)),
  )
  found, wanted = _read_description(folder), _store(folder, said)
  if found is not None:
    _refuse(folder, found, said)
  sharding.barrier("store is looked at")
  if found is None and jax.process_index() == 0:
    artifacts.write_json(folder / "store.json", said | dict(key=wanted.key))
  sharding.barrier("store is there")
  return wanted


def open_store(
  folder: Any,
  *,
  fields: dict[str, Any] | None = None,
  ids: np.ndarray | None = None,
) -> Store:
  """A finished store, to be read.

  Args:
    folder: where it is.
    fields: what it must have been made of; None: anything.
    ids: the records it must be of; None: any.

  Raises:
    CorruptError: there is no store, or it lacks shards.
    ConfigError: it was made by another model or of other records.
  """
  folder = epath.Path(folder)
  said = _read_description(folder)
  if said is None:
    raise CorruptError(
      f"{folder} holds no store, or store.json is harmed; run "
      "the stage that makes it again"
    )
  found = _store(folder, said)
  if fields is not None:
    _refuse(folder, said, said | dict(fields=json.loads(json.dumps(fields))))
  if ids is not None:
    ids = encoded(ids)
    _refuse(
      folder,
      said,
      said | dict(rows=len(ids), ids=_digest_ids(ids, 0, len(ids))),
    )
  missing = [s for s in range(found.shards) if not _side(found, s).exists()]
  if missing:
    raise CorruptError(
      f"{folder} lacks {len(missing)} of {found.shards} "
      f"shards, {missing[0]:05d} the first; run the stage "
      "that makes it again"
    )
  return found


# Shards.


def _side(store: Store, shard: int) -> epath.Path:
  return store.folder / "shards" / f"{shard:05d}.json"


def _file(column: str, shard: int) -> str:
  return f"{column}/{shard:05d}.npy"


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
  files = {}
  arrays = arrays | {ID: np.asarray(encoded(ids)[start:stop])}
  for name, column in store.columns.items():
    x = np.asarray(arrays[name])
    if x.shape != (stop - start, *column.shape):
      raise ValueError(
        f"column {name} has shape {x.shape}, wanted "
        f"{(stop - start, *column.shape)}"
      )
    if column.dtype == "bfloat16":
      x = x.astype(_BFLOAT16, copy=False).view(np.uint16)
    else:
      x = x.astype(column.dtype, copy=False)
    path = store.folder / _file(name, shard)
    artifacts.write_array(path, x)
    files[_file(name, shard)] = artifacts.digest(path)
  side = dict(
    shard=shard,
    rows=[start, stop],
    key=store.key,
    ids=_digest_ids(arrays[ID], 0, stop - start),
    files=files,
  )
  artifacts.write_json(_side(store, shard), side | dict(digest=_digest(side)))


def _digest(side: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(side, sort_keys=True).encode()).hexdigest()


def harm(store: Store, shard: int, ids: np.ndarray) -> str | None:
  """Why a shard has to be made: "" where it is absent, None where it is whole.

  Every byte of the shard is read.
  """
  path = _side(store, shard)
  if not path.exists():
    return ""
  try:
    side = artifacts.read_json(path)
    if side.pop("digest") != _digest(side):
      raise ValueError("digest")
    if side["key"] != store.key:
      return "is of another store"
    files, seen = side["files"], side["ids"]
  except (ValueError, KeyError, TypeError, AttributeError):
    return "has other bytes than were written"
  if seen != _digest_ids(encoded(ids), *store.bounds(shard)):
    return "is of other records"
  bad = artifacts.harmed(store.folder, files)
  return bad[0] if bad else None


def pending(store: Store, ids: np.ndarray) -> list[int]:
  """The shards to make, ascending; what is there is read and checked.

  Each process checks its part of the shards; all get the same answer. A shard
  that is there and not whole is said, with its name.
  """
  ids, mine = encoded(ids), jax.process_index()
  wanted = np.zeros(store.shards, np.int32)
  for shard in range(mine, store.shards, jax.process_count()):
    why = harm(store, shard, ids)
    wanted[shard] = why is not None
    if why:
      progress.say(f"  shard {shard:05d}: {why}; doing it again")
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    wanted = np.asarray(multihost_utils.process_allgather(wanted)).sum(0)
  return np.flatnonzero(wanted).tolist()


# Reading.


def _rows(
  store: Store, column: str, shard: int, start: int, stop: int
) -> np.ndarray:
  """Rows `start` to `stop` of a shard, counted from its first."""
  x = artifacts.read_array(store.folder / _file(column, shard))
  if store.columns[column].dtype == "bfloat16":
    x = x.view(_BFLOAT16)
  return x[start:stop]


def read_rows(store: Store, column: str, start: int, stop: int) -> np.ndarray:
  """Rows `start` to `stop` [n, ...] of a column, in its own dtype.

  Within one shard of a local disk it is a view of the file.
  """
  _known(store, column)
  parts, at = [], start
  while at < stop or not parts:
    shard = min(at // store.shard, store.shards - 1)
    first, last = store.bounds(shard)
    parts.append(
      _rows(store, column, shard, at - first, min(stop, last) - first)
    )
    at = last
  return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _known(store: Store, column: str) -> None:
  if column not in store.columns:
    raise ConfigError(
      f"{store.folder} has no column {column!r}, it has "
      f"{', '.join(sorted(store.columns))}"
    )


def tiles(
  store: Store, column: str, rows: int
) -> Iterator[tuple[int, np.ndarray]]:
  """(first row, [rows, ...]) of every tile in order; the last is shorter.

  Where the tiles begin depends on N and `rows` alone, not on the shards.
  """
  for start in range(0, store.rows, rows):
    yield start, read_rows(store, column, start, min(store.rows, start + rows))


def take(store: Store, column: str, index: np.ndarray) -> np.ndarray:
  """Rows `index` [n] of a column, in that order; floats become float32."""
  _known(store, column)
  index = np.asarray(index, np.int64)
  shape, dtype = store.columns[column]
  out = np.empty(
    (len(index), *shape), np.float32 if dtype == "bfloat16" else dtype
  )
  order = np.argsort(index, kind="stable")
  cuts = np.searchsorted(
    index[order], np.arange(store.shards + 1) * store.shard
  )
  for shard in np.flatnonzero(np.diff(cuts)).tolist():
    where = order[cuts[shard] : cuts[shard + 1]]
    first, last = store.bounds(shard)
    out[where] = _rows(store, column, shard, 0, last - first)[
      index[where] - first
    ]
  return out


def read(folder: Any, column: str) -> np.ndarray:
  """A whole column [N, ...], for who holds all rows; bfloat16 as float32.

  A column of one shard stays a map of its file.
  """
  store = folder if isinstance(folder, Store) else open_store(folder)
  _known(store, column)
  if store.shards == 1 and store.columns[column].dtype != "bfloat16":
    return read_rows(store, column, 0, store.rows)
  shape, dtype = store.columns[column]
  out = np.empty(
    (store.rows, *shape), np.float32 if dtype == "bfloat16" else dtype
  )
  for start, x in tiles(store, column, store.shard):
    out[start : start + len(x)] = x
  return out


def owned(shards: Iterable[int]) -> list[list[int]]:
  """Shards -> those of every process: one writer each, dealt in turn."""
  shards, count = list(shards), jax.process_count()
  return [shards[process::count] for process in range(count)]
