"""Sums over rows whose bits do not depend on the mesh.

The rows lie in 64 chunks in id order; each chunk's sums are one float32
program, whichever device runs it, and the chunks are added in order, in
float64, on the host.
"""

from collections.abc import Callable
import math

import jax
import numpy as np

from jaxalign.core import sharding
from jaxalign.embed.store import scratch

CHUNKS = 64  # of rows; fixed, so that no sum depends on the device count
LARGE = 1 << 28  # bytes of an array, above which it lies in a file
BLOCK = 32  # rows of a chunk are a multiple of it


def chunk_rows(n: int) -> int:
  """Rows of one chunk, a multiple of BLOCK, so that CHUNKS of them hold n."""
  return -(-n // (CHUNKS * BLOCK)) * BLOCK


def tiles(x: np.ndarray, chunks: int, rows: int) -> np.ndarray:
  """[n, ...] -> [chunks, rows, ...] float32, zeros after the n-th row."""
  out = np.zeros((chunks * rows,) + x.shape[1:], np.float32)
  out[: len(x)] = x
  return out.reshape((chunks, rows) + x.shape[1:])


def padded_chunks(mesh: jax.sharding.Mesh) -> int:
  """CHUNKS, and empty ones, for at least two on every device.

  XLA unrolls a loop of one step and may then fuse it otherwise, so a device
  never has just one chunk.
  """
  devices = mesh.size
  return max(2, -(-CHUNKS // devices)) * devices


def over_chunks(mesh: jax.sharding.Mesh, chunk_fn: Callable, replicated: int):
  """Jits chunk_fn(*params, *tiles) over the chunks, one after the other.

  The first `replicated` arguments are the same on every device, the others
  have a leading axis of chunks. `lax.map`, not `vmap`: a batched product may
  add in an order that depends on how many chunks a device holds.
  """

  def local(*args):
    params, tiles = args[:replicated], args[replicated:]
    return jax.lax.map(lambda tile: chunk_fn(*params, *tile), tiles)

  @jax.jit
  def run(params, tiles):
    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(
        (jax.P(),) * replicated + (sharding.spec("pool"),) * len(tiles)
      ),
      out_specs=sharding.spec("pool"),
    )(*params, *tiles)

  return run


def ordered_sum(parts: np.ndarray) -> np.ndarray:
  """Sums [chunks, ...] over the first axis in float64, in order."""
  total = np.zeros(parts.shape[1:], np.float64)
  for part in parts[:CHUNKS]:  # the rest are empty
    total += part
  return total


def large_empty(shape: tuple[int, ...]) -> np.ndarray:
  """Float32 to be filled; above LARGE bytes it lies in a file."""
  large = 4 * math.prod(shape) > LARGE
  return scratch(shape) if large else np.empty(shape, np.float32)


def by_parts(
  fn: Callable, *columns: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
  """fn of some rows of [N, ...] arrays at a time -> [N, W] float32.

  What is made in float64 on the way is never held for all rows. `out` may be
  one of the columns; without it, it is as the first of them.
  """
  out = np.empty(columns[0].shape, np.float32) if out is None else out
  for start in range(0, len(out), 4096):
    out[start : start + 4096] = fn(*(c[start : start + 4096] for c in columns))
  return out


def less(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
  """[N, W] less [W] float64, rounded to float32."""
  return by_parts(lambda part: part - mean[None], x)
