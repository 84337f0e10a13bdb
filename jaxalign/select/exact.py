"""Sums over rows whose bits depend neither on the mesh nor on the order.

The rows lie in chunks in id order, and each chunk's sums are one float32
program, whichever device runs it. A chunk's sum is then cut into two whole
numbers, so that adding chunks, on one device and over all of them, rounds
nothing. What leaves the devices is one sum and not one of every chunk.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import sharding
from jaxalign.select.chunks import less

ROUND = 64  # rows of a chunk are a multiple of it
ROWS = 2048  # of a chunk: what stays in a CPU's cache from first use to last
CHUNKS = (64, 1024)  # at least for a pod's chips; at most for the whole numbers
UNCUT = 192  # columns from which products over WIDE rows are never cut
WIDE = 256
LIMB = 20  # bits of a whole number that one chunk fills, of 31
WAVE = 1 << 16  # rows of a Gram that lie on the devices at once
HIGHEST = jax.lax.Precision.HIGHEST  # a TPU would multiply in bfloat16


class RowChunks(NamedTuple):
  """Rows on the mesh, in chunks; n of them are real."""

  x: jax.Array  # [chunks, rows, P] float32
  weight: jax.Array  # [chunks, rows] float32, 1 of a real row, else 0
  n: int
  square: float  # the largest sum of squares of one column in one chunk


def layout(n: int, devices: int) -> tuple[int, int]:
  """(chunks, rows of each); the rows depend on n alone.

  A device has at least two chunks, some of them empty: XLA unrolls a loop of
  one step and may then fuse it otherwise.
  """
  few, many = CHUNKS
  rows = ROUND * math.ceil(max(min(n / few, ROWS), n / many) / ROUND)
  count = -(-n // rows)
  return max(2, -(-count // devices)) * devices, rows


def place(mesh: jax.sharding.Mesh, x: np.ndarray) -> RowChunks:
  """[n, P] host rows in id order -> `RowChunks`."""
  n, width = x.shape
  count, rows = layout(n, mesh.size)
  square = max(
    float((np.float64(x[s : s + rows]) ** 2).sum(0).max())
    for s in range(0, n, rows)
  )

  def make(places):  # the rows of this process only
    out = np.zeros((len(places), rows, width), np.float32)
    for chunk, place in zip(out, places):
      own = x[place * rows : (place + 1) * rows]
      chunk[: len(own)] = own
    row = places[:, None] * rows + np.arange(rows)
    return out, np.float32(row < n)

  placed, weight = sharding.put_rows(mesh, (count,), make, "pool")
  return RowChunks(placed, weight, n, square)


def scale_of(bound: float) -> np.float32:
  """A power of two; times it, a sum of at most `bound` is below 1 in size."""
  return np.float32(2.0 ** -np.ceil(np.log2(max(bound, 2.0**-60)) + 0.01))


def _cut(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
  """float32, below 1 in size after scaling -> two whole numbers.

  The powers of two and the difference are exact; the error is below 2^-41 of
  the bound.
  """
  high = x * scale * 2.0**LIMB
  whole = jnp.round(high)
  low = jnp.round((high - whole) * 2.0**LIMB)
  return whole.astype(jnp.int32), low.astype(jnp.int32)


def _joined(pair: tuple[jax.Array, jax.Array], scale: Any) -> np.ndarray:
  """The float64 sum that two whole numbers stand for."""
  high, low = (sharding.fetch(a).astype(np.float64) for a in pair)
  return (high + low / 2.0**LIMB) / (2.0**LIMB * np.float64(scale))


@functools.lru_cache(maxsize=32)
def program(mesh: jax.sharding.Mesh, fn: Callable) -> Callable:
  """Jits the sums of fn over all chunks.

  Args:
    mesh, fn: `fn(params, chunk [rows, P], weight [rows])` -> (tree of float32
      sums, [rows / ROUND] values that are kept apart).

  Returns:
    run(params, scales, chunks, weight) -> (the tree with a pair of whole
    numbers for each sum; [chunks, rows / ROUND]). `scales` has a number of
    `scale_of` by name.
  """

  def local(params, scales, x, weight):
    def cut_sums(chunk):
      sums, value = fn(params, *chunk)
      for name, scale in scales.items():
        cut = functools.partial(_cut, scale=scale)
        sums[name] = jax.tree.map(cut, sums[name])
      return sums, value

    def step(total, chunk):
      cut, value = cut_sums(chunk)
      return jax.tree.map(jnp.add, total, cut), value

    like = jax.eval_shape(cut_sums, (x[0], weight[0]))[0]
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    total, value = jax.lax.scan(step, zero, (x, weight))
    return jax.lax.psum(total, sharding.AXES), value

  rows = sharding.spec("pool")
  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(jax.P(), jax.P(), rows, rows),
    out_specs=(jax.P(), rows),
    check_vma=False,
  )
  return jax.jit(run)


def exact_sums(
  mesh: jax.sharding.Mesh,
  fn: Callable,
  rows: RowChunks,
  params: tuple,
  bounds: dict[str, float],
) -> tuple[dict[str, np.ndarray], float]:
  """Runs `program` -> (float64 sums by name, the sum of the values apart).

  Args:
    mesh, fn: as of `program`; the sums are a dict, a Gram the tuple of `gram`.
    rows: as of `place`.
    params: arrays, rounded to float32 and put on every device.
    bounds: by name, what no chunk's sum can exceed in size.
  """
  put = lambda a: sharding.put(mesh, np.float32(a), *[None] * np.ndim(a))
  scales = {name: scale_of(bound) for name, bound in bounds.items()}
  cut, values = program(mesh, fn)(
    jax.tree.map(put, params), jax.tree.map(put, scales), rows.x, rows.weight
  )
  out = {}
  for name, scale in scales.items():
    if isinstance(cut[name][0], tuple):
      out[name] = _mirrored([_joined(pair, scale) for pair in cut[name]])
    else:
      out[name] = _joined(cut[name], scale)
  return out, math.fsum(sharding.fetch(values).ravel().tolist())


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
  if min(a.shape[1], b.shape[1]) >= UNCUT:
    total = dot(a[:WIDE], b[:WIDE])
    for s in range(WIDE, a.shape[0], WIDE):
      total += dot(a[s : s + WIDE], b[s : s + WIDE])
    return total
  cut = lambda x: x.reshape(-1, ROUND, x.shape[1])
  a, b = cut(a), cut(b)
  add = lambda total, rows: (total + dot(*rows), None)
  return jax.lax.scan(add, dot(a[0], b[0]), (a[1:], b[1:]), unroll=4)[0]


def column_chunks(width: int) -> list[tuple[int, int]]:
  """Column ranges whose rows of a Gram's triangle are computed at once."""
  count = 1 if width < 2 * UNCUT else max(2, width // WIDE)
  ends = np.linspace(0, width, count + 1).astype(int).tolist()
  return list(zip(ends[:-1], ends[1:]))


def gram(a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
  """The upper triangle of a symmetric a^T b, in chunks of whole rows."""
  return tuple(
    product(a[:, s:e], b[:, s:]) for s, e in column_chunks(a.shape[1])
  )


def _mirrored(chunks: list[np.ndarray]) -> np.ndarray:
  """What `gram` returned, on the host -> symmetric [..., P, P]."""
  width = chunks[0].shape[-1]
  upper = np.zeros(chunks[0].shape[:-2] + (width, width))
  for (s, e), chunk in zip(column_chunks(width), chunks):
    upper[..., s:e, s:] = chunk
  return np.triu(upper) + np.triu(upper, 1).swapaxes(-1, -2)


def _gram_chunk(params, x, weight):
  del params
  return dict(gram=gram(x, x)), weight.reshape(-1, ROUND).sum(1)


def gram_of_chunks(mesh: jax.sharding.Mesh, rows: RowChunks) -> np.ndarray:
  """Sum of outer products [P, P] of rows on the mesh."""
  bounds = dict(gram=rows.square)
  return exact_sums(mesh, _gram_chunk, rows, (), bounds)[0]["gram"]


def gram_of(
  mesh: jax.sharding.Mesh, x: np.ndarray, mean: np.ndarray | None = None
) -> np.ndarray:
  """Sum of outer products [E, E] of rows [n, E], less a mean [E]: float32
  chunks, exactly added. The devices never hold more than a wave of rows."""
  total = np.zeros((x.shape[1],) * 2)
  for start in range(0, len(x), WAVE):
    rows = x[start : start + WAVE]
    if mean is not None:
      rows = less(rows, mean)
    total += gram_of_chunks(mesh, place(mesh, rows))
  return total
