"""Sums over chunks of rows that come out alike in whatever order they ran.

The rows lie in chunks in id order, and each chunk's sums are one float32
program, whichever device runs it. A chunk's sum is then cut into two whole
numbers, so that adding chunks, on one device and over all of them, rounds
nothing: no order of them, and so no mesh, can change a bit. What leaves the
devices is one sum and not one of every chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding

ROUND = 64  # rows of a chunk are a multiple of it
TILE = 2048  # rows that go through E-step and sums while they are in cache
PANEL = 192  # columns from which products over WIDE rows are never cut
WIDE = 256
LIMB = 20  # bits of a whole number that one chunk fills, of 31
HIGHEST = jax.lax.Precision.HIGHEST  # a TPU would multiply in bfloat16


class Rows(NamedTuple):
  """Rows on the mesh, in chunks; n of them are real."""

  tiles: jax.Array  # [chunks, rows, P] float32
  weight: jax.Array  # [chunks, rows] float32, 1 of a real row, else 0
  n: int
  square: float  # the largest sum of squares of one column in one chunk


def chunk_count(n: int) -> int:
  """Chunks of n rows: enough for a pod's chips where the rows are many."""
  return 64 if n <= 1 << 21 else 1024


def layout(n: int, devices: int) -> tuple[int, int]:
  """(chunks, rows of each); the rows depend on n alone.

  A device has at least two chunks, some of them empty: XLA unrolls a loop of
  one step and may then fuse it otherwise.
  """
  count = chunk_count(n)
  rows = -(-n // (count * ROUND)) * ROUND
  return max(2, -(-count // devices)) * devices, rows


def place(mesh: jax.sharding.Mesh, z: np.ndarray) -> Rows:
  """[n, P] host rows in id order -> `Rows`."""
  n, width = z.shape
  chunks, rows = layout(n, mesh.size)
  square = max(
    float((np.float64(z[s : s + rows]) ** 2).sum(0).max())
    for s in range(0, n, rows)
  )

  def made(places):  # the rows of this process only
    out = np.zeros((len(places), rows, width), np.float32)
    for i, chunk in enumerate(places):
      part = z[chunk * rows : (chunk + 1) * rows]
      out[i, : len(part)] = part
    at = places[:, None] * rows + np.arange(rows)
    return out, np.float32(at < n)

  tiles, weight = sharding.put_rows(mesh, (chunks,), made, "pool")
  return Rows(tiles, weight, n, square)


def scale_of(bound: float) -> np.float32:
  """A power of two; times it, a sum of at most `bound` is below 1 in size."""
  return np.float32(2.0 ** -np.ceil(np.log2(max(bound, 2.0**-60)) + 0.01))


def _cut(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
  """float32, below 1 in size after scaling -> two whole numbers.

  The powers of two and the difference are exact; what is lost is below 2^-41
  of the bound.
  """
  high = x * scale * 2.0**LIMB
  whole = jnp.round(high)
  low = jnp.round((high - whole) * 2.0**LIMB)
  return whole.astype(jnp.int32), low.astype(jnp.int32)


def joined(pair: tuple[jax.Array, jax.Array], scale: Any) -> np.ndarray:
  """The float64 sum that two whole numbers stand for."""
  high, low = (sharding.fetch(a).astype(np.float64) for a in pair)
  return (high + low / 2.0**LIMB) / (2.0**LIMB * np.float64(scale))


def program(mesh: jax.sharding.Mesh, fn: Callable) -> Callable:
  """Jits the sums of fn over all chunks.

  Args:
    mesh: the mesh.
    fn: `fn(params, tile [rows, P], weight [rows])` -> (tree of float32 sums,
      [rows / ROUND] log-likelihoods).

  Returns:
    run(params, scales, tiles, weight) -> (the tree with a pair of whole
    numbers for each sum, for `joined`; [chunks, rows / ROUND]). `scales` has
    one of `scale_of` for each sum.
  """

  def local(params, scales, tiles, weight):
    def step(total, chunk):
      sums, bound = fn(params, *chunk)
      parts = jax.tree.map(_cut, sums, scales)
      return jax.tree.map(jnp.add, total, parts), bound

    like = jax.eval_shape(lambda: fn(params, tiles[0], weight[0])[0])
    zero = jax.tree.map(lambda a: (jnp.zeros(a.shape, jnp.int32),) * 2, like)
    total, bound = jax.lax.scan(step, zero, (tiles, weight))
    return jax.lax.psum(total, sharding.AXES), bound

  @jax.jit
  def run(params, scales, tiles, weight):
    rows = sharding.spec("pool")
    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(jax.P(), jax.P(), rows, rows),
      out_specs=(jax.P(), rows),
      check_vma=False,
    )(params, scales, tiles, weight)

  return run


def over_tiles(fn: Callable, *arrays: jax.Array) -> tuple[Any, jax.Array]:
  """fn's sums over a chunk, TILE rows at a time; its rows' values joined.

  Args:
    fn: tiles -> (tree of sums, [rows / ROUND] values).
    *arrays: [rows, ...], rows a multiple of ROUND.
  """
  if sharding.platform() != "cpu":  # nothing to keep in a cache
    return fn(*arrays)
  rows = arrays[0].shape[0]
  whole = rows // TILE
  parts = []
  if rows % TILE:
    parts.append(fn(*(a[whole * TILE :] for a in arrays)))
  if whole:
    tiled = [
      a[: whole * TILE].reshape((whole, TILE) + a.shape[1:]) for a in arrays
    ]
    first, value = fn(*(a[0] for a in tiled))
    if whole > 1:
      first, values = jax.lax.scan(
        lambda total, tile: (
          lambda sums, v: (jax.tree.map(jnp.add, total, sums), v)
        )(*fn(*tile)),
        first,
        tuple(a[1:] for a in tiled),
      )
      value = jnp.concatenate([value, values.reshape(-1)])
    parts.insert(0, (first, value))
  sums = parts[0][0]
  for more, _ in parts[1:]:
    sums = jax.tree.map(jnp.add, sums, more)
  return sums, jnp.concatenate([value for _, value in parts])


def product(a: jax.Array, b: jax.Array) -> jax.Array:
  """a^T b [p, q] of [rows, p] and [rows, q], in an order no mesh changes.

  XLA's CPU product may cut a long sum among threads, whose number follows the
  number of devices: never one of 64 rows, and none of 256 rows where the
  result is large enough to be cut instead (measured on 1 to 16 devices). So
  there it is products over so many rows, added one after the other. An
  accelerator takes all rows at once.
  """
  dot = lambda x, y: jnp.einsum("tp,tq->pq", x, y, precision=HIGHEST)
  if sharding.platform() != "cpu":
    return dot(a, b)
  rows = a.shape[0]
  if min(a.shape[1], b.shape[1]) >= PANEL:
    total = dot(a[:WIDE], b[:WIDE])
    for s in range(WIDE, rows, WIDE):
      total += dot(a[s : s + WIDE], b[s : s + WIDE])
    return total
  cut = lambda x: x.reshape(rows // ROUND, ROUND, -1)
  a, b = cut(a), cut(b)
  return jax.lax.scan(
    lambda total, x: (total + dot(*x), None),
    dot(a[0], b[0]),
    (a[1:], b[1:]),
    unroll=4,
  )[0]


def panels(width: int) -> list[tuple[int, int]]:
  """Column ranges whose rows of a Gram's triangle are computed at once."""
  count = 1 if width < 2 * PANEL else max(2, width // WIDE)
  ends = np.linspace(0, width, count + 1).astype(int).tolist()
  return list(zip(ends[:-1], ends[1:]))


def gram(a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
  """The upper triangle of a symmetric a^T b, in panels of whole rows."""
  return tuple(product(a[:, s:e], b[:, s:]) for s, e in panels(a.shape[1]))


def mirrored(parts: tuple[np.ndarray, ...]) -> np.ndarray:
  """What `gram` returned, on the host -> symmetric [..., P, P]."""
  width = parts[0].shape[-1]
  out = np.zeros(parts[0].shape[:-2] + (width, width))
  for (s, e), part in zip(panels(width), parts):
    out[..., s:e, s:] = part
  upper = np.triu(np.ones((width, width), bool))
  out = np.where(upper, out, 0.0)
  return out + out.swapaxes(-1, -2) - out * np.eye(width)
