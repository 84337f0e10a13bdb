"""The mixture of a pool that does not fit: part of it fits, all is scored.

The parameters of a mixture vary as one over the square root of the rows they
were fitted to, so from some number on more rows change nothing that a
selection can see. The reservoir is the records with the least hashes of their
ids: the same ones in any order and in any shards. Then one pass over tiles
scores every row on the mesh.
"""

from collections.abc import Iterator, Sequence
import os
from typing import Any

import jax
import numpy as np

from jaxalign import progress, sharding
from jaxalign.errors import NumericError
from jaxalign.select import mixture as mixtures
from jaxalign.select import store as stores
from jaxalign.select.store import Column, Store
from jaxalign.select.topk import id_hash

TILE = 2048  # rows that a device scores at once
CALLS = 16  # of the mesh at least, between two moments of writing
PURPOSE = "reservoir"


def choose(store: Store, records: int) -> np.ndarray:
  """[records] int64, ascending: those with the least hashes of their ids.

  Args:
    store: of the records.
    records: at most so many.
  """
  if records >= store.rows:
    return np.arange(store.rows)
  hashes = np.empty(store.rows, np.uint64)
  with progress.bar("reservoir", store.rows) as tick:
    for start, ids in stores.tiles(store, stores.ID, 65536):
      hashes[start : start + len(ids)] = id_hash(ids, PURPOSE)
      tick(len(ids))
  return np.sort(np.argsort(hashes, kind="stable")[:records])


def gather(store: Store, rows: np.ndarray, path: Any) -> np.ndarray:
  """The embeddings of records as rows [n * R, E] float32, in a mapped file.

  Args:
    store: has `embedding` [N, R, E].
    rows: [n] ascending.
    path: of a file to write, on a local disk; whoever asked removes it.
  """
  responses, width = store.columns["embedding"].shape
  out = np.lib.format.open_memmap(
    os.fspath(path), "w+", np.float32, (len(rows) * responses, width)
  )
  step = max(1, (64 << 20) // (4 * responses * width))
  for at in range(0, len(rows), step):
    x = stores.take(store, "embedding", rows[at : at + step])
    out[at * responses : (at + len(x)) * responses] = x.reshape(-1, width)
  out.flush()
  del out
  return np.load(os.fspath(path), mmap_mode="r")


def _tiles(
  store: Store, shards: Sequence[int], rows: int
) -> Iterator[tuple[int, np.ndarray]]:
  """(how many, [rows, E]) of the rows of shards one after the other.

  The last tile is filled up with zeros; the dtype is the store's own.
  """
  tile, filled = None, 0
  for shard in shards:
    x = stores.read_rows(store, "embedding", *store.bounds(shard))
    x = x.reshape(-1, x.shape[-1])
    at = 0
    while at < len(x):
      if tile is None:
        tile, filled = np.zeros((rows, x.shape[1]), x.dtype), 0
      part = x[at : at + rows - filled]
      tile[filled : filled + len(part)] = part
      filled, at = filled + len(part), at + len(part)
      if filled == rows:
        yield rows, tile
        tile = None
  if tile is not None:
    yield filled, tile


def score(
  mesh: jax.sharding.Mesh,
  fits: Sequence[mixtures.Mixture],
  store: Store,
  folder: Any,
  *,
  fields: dict[str, Any],
  tile: int = TILE,
) -> Store:
  """The log-likelihood of every row under each mixture, in one pass.

  Every process reads the rows of its own shards and writes their scores; a
  run that was killed goes on at the next shard.

  Args:
    mesh: the mesh.
    fits: F mixtures of the rows of `embedding`.
    store: has `embedding` [N, R, E], float32 or bfloat16.
    folder: of the store to write: `log_likelihood` [N, F, R] float32 nats.
    fields: JSON values that name the mixtures.
    tile: rows that a device takes at once; no part of the numbers.

  Raises:
    NumericError: rows whose score is not finite; names them.
  """
  responses = store.columns["embedding"].shape[0]
  ids = stores.StoredIds(store)
  out = stores.create(
    folder,
    ids,
    dict(log_likelihood=Column((len(fits), responses))),
    fields=fields,
    shard=store.shard,
  )
  missing = stores.pending(out, ids)
  scorers = [mixtures.make_scorer(mesh, fit) for fit in fits]
  count, me = jax.process_count(), jax.process_index()
  own = tile * mesh.size // count
  group = count * max(1, -(-CALLS * own // (store.shard * responses)))
  rows_of = lambda shard: int(np.diff(store.bounds(shard))[0]) * responses
  with progress.bar(
    "score",
    store.rows,
    done=store.rows - sum(map(rows_of, missing)) // responses,
  ) as tick:
    for at in range(0, len(missing), group):
      dealt = stores.owned(missing[at : at + group])
      calls = max(-(-sum(map(rows_of, mine)) // own) for mine in dealt)
      found, waiting = [], []
      own_tiles = _tiles(store, dealt[me], own)
      for _ in range(calls):  # all processes call equally often
        real, x = next(own_tiles, (0, None))
        if x is None:
          x = np.zeros(
            (own, store.columns["embedding"].shape[1]),
            np.float32
            if store.columns["embedding"].dtype == "float32"
            else jax.numpy.bfloat16,
          )
        placed = sharding.put_rows(
          mesh, (own * count,), lambda _, x=x: x, "pool"
        )
        waiting.append((real, [fn(placed) for fn in scorers]))
        if len(waiting) > 2:  # keep the device busy, the memory bounded
          found.append(_fetched(*waiting.pop(0)))
      found += [_fetched(*one) for one in waiting]
      _write(out, ids, dealt[me], np.concatenate(found))
      tick(sum(rows_of(s) for mine in dealt for s in mine) // responses)
  sharding.barrier("scores are written")
  return out


def _fetched(real: int, results: list[jax.Array]) -> np.ndarray:
  """[rows, F] of this process's rows."""
  return np.stack([sharding.own_rows(x)[:real] for x in results], axis=1)


def _write(
  out: Store, ids: Any, shards: Sequence[int], values: np.ndarray
) -> None:
  """The scores [rows, F] of shards, written; one that is not finite ends it."""
  fits, responses = out.columns["log_likelihood"].shape
  values = values.reshape(-1, responses, fits).swapaxes(1, 2)
  bad = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2)))
  everywhere = sharding.total(len(bad))
  if everywhere:
    rows = np.concatenate(
      [np.arange(0)] + [np.arange(*out.bounds(s)) for s in shards]
    )[bad[:5]]
    named = (
      ", ".join(ids[r : r + 1][0].decode(errors="replace") for r in rows)
      if len(rows)
      else "of another process"
    )
    raise NumericError(
      f"{everywhere} of {out.rows} records have a "
      f"log-likelihood that is not finite (ids {named}); look "
      "at the embedding of those records"
    )
  start = 0
  for shard in shards:
    stop = start + int(np.diff(out.bounds(shard))[0])
    stores.write_shard(out, shard, ids, dict(log_likelihood=values[start:stop]))
    start = stop
