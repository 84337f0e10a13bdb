"""Rows on the devices in fixed chunks: sums whose bits no mesh changes.

The rows lie in 64 chunks in id order; each chunk's sums are one float32
program, whichever device runs it, and the chunks are added in order, in
float64, on the host.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.core import sharding
from jaxalign.embed.store import scratch

CHUNKS = 64  # of rows; fixed, so that no sum depends on the device count
MULTIPLE = 32  # of the rows of a chunk
HOST_ROWS = 4096  # of a chunk on the host
LARGE = 1 << 28  # bytes of an array, above which it lies in a file


class Placed(NamedTuple):
  """Rows in chunks over this process's devices; n of them are real."""

  mesh: jax.sharding.Mesh
  columns: tuple[jax.Array, ...]  # each [chunks, rows, ...] float32
  n: int


def own_mesh() -> jax.sharding.Mesh:
  """The current mesh; where others share it, one of this process's devices.

  A sampler runs in the one process that reads the pool's texts.
  """
  mesh = jax.sharding.get_mesh()
  if not mesh.empty and not mesh.is_multi_process:
    return mesh
  return sharding.make_mesh(dict(fsdp=-1, tensor=1), jax.local_devices())


def place(*columns: np.ndarray) -> Placed:
  """Puts [N, ...] arrays on the devices, cut alike; zeros after row N.

  Every device has at least two chunks, some of them empty: XLA unrolls a loop
  of one step and may then fuse it otherwise.
  """
  mesh, n = own_mesh(), len(columns[0])
  count = max(2, -(-CHUNKS // mesh.size)) * mesh.size
  rows = -(-n // (CHUNKS * MULTIPLE)) * MULTIPLE
  placed = []
  for column in columns:
    shape = column.shape[1:]
    chunks = np.zeros((count * rows, *shape), np.float32)
    chunks[:n] = column
    chunks = chunks.reshape(count, rows, *shape)
    placed.append(sharding.put(mesh, chunks, "pool", *[None] * column.ndim))
  return Placed(mesh, tuple(placed), n)


@functools.lru_cache(maxsize=32)
def _program(mesh: jax.sharding.Mesh, fn: Callable) -> Callable:
  """Jits fn(*params, *columns of a chunk) over the chunks, one by one.

  `lax.map`, not `vmap`: a batched product may add in an order that depends on
  how many chunks a device holds.
  """
  pool = sharding.spec("pool")

  def local(params, columns):
    return jax.lax.map(lambda chunk: fn(*params, *chunk), columns)

  specs = dict(in_specs=(jax.P(), pool), out_specs=pool)
  return jax.jit(jax.shard_map(local, mesh=mesh, **specs))


def by_chunk(fn: Callable, placed: Placed, *params: Any) -> np.ndarray:
  """fn(*params, *columns of a chunk) of every chunk -> [chunks, ...] on host.

  Args:
    fn: a function of a module (it is compiled once for each of them).
    placed: the rows.
    *params: float32 arrays that every chunk sees whole.
  """
  params = tuple(np.asarray(p, np.float32) for p in params)
  with jax.set_mesh(placed.mesh):
    return sharding.fetch(_program(placed.mesh, fn)(params, placed.columns))


def by_row(fn: Callable, placed: Placed, *params: Any) -> np.ndarray:
  """As `by_chunk`, for a function of rows to rows: [N, ...]."""
  out = by_chunk(fn, placed, *params)
  return out.reshape(-1, *out.shape[2:])[: placed.n]


def padded(x: np.ndarray) -> np.ndarray:
  """Repeats the last row up to a power of two, so that few shapes compile."""
  size = max(8, 1 << (len(x) - 1).bit_length())
  return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])


def ordered_sum(chunks: np.ndarray) -> np.ndarray:
  """Sums [chunks, ...] over the first axis in float64, in order."""
  total = np.zeros(chunks.shape[1:], np.float64)
  for chunk in chunks[:CHUNKS]:  # the rest are empty
    total += chunk
  return total


def large_empty(shape: tuple[int, ...]) -> np.ndarray:
  """Float32 to be filled; above LARGE bytes it lies in a file."""
  large = 4 * math.prod(shape) > LARGE
  return scratch(shape) if large else np.empty(shape, np.float32)


def on_host(
  fn: Callable, *columns: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
  """fn of some rows of [N, ...] arrays at a time -> [N, W] float32.

  What is made in float64 on the way is never held for all rows. `out` may be
  one of the columns; without it, it is as the first of them.
  """
  out = np.empty(columns[0].shape, np.float32) if out is None else out
  for start in range(0, len(out), HOST_ROWS):
    rows = slice(start, start + HOST_ROWS)
    out[rows] = fn(*(c[rows] for c in columns))
  return out


def less(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
  """[N, W] less [W] float64, rounded to float32."""
  return on_host(lambda rows: rows - mean[None], x)
