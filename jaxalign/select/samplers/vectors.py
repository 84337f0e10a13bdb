"""The vector of each row that a geometric sampler compares, on the devices."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.core import devices, sharding
from jaxalign.core.errors import ConfigError
from jaxalign.select.chunks import (
  by_parts,
  chunk_rows,
  large_empty,
  over_chunks,
  padded_chunks,
  tiles,
)
from jaxalign.select.costs import Sizes
from jaxalign.select.pool import Pool
from jaxalign.select.samplers.values import not_finite, refuse_rows, require

METRICS = ("cosine", "centred", "euclidean")
ROUNDING = 2.0**-24  # of one float32 operation
HOURS = 24.0  # at the assumed rate, above which a method does not start
_ONE_VECTOR = {  # [n, R, E] -> [n, W]
  "mean": lambda x: (x[:, 0] + x[:, 1]) / 2,
  "chosen": lambda x: x[:, 0],
  "rejected": lambda x: x[:, 1],
  "difference": lambda x: x[:, 0] - x[:, 1],
  "concat": lambda x: x.reshape(len(x), -1),
}
PAIRS = tuple(_ONE_VECTOR)
_LOOK = "look at the embedding of those records"


def refuse_above(found: float, limit: float, what: str, advice: str) -> None:
  """Stops a method that cannot scale before it starts, with the number."""
  if found > limit:
    raise ConfigError(
      f"{what}, {found:.3g}, is above the {limit:.3g} that this form is made "
      f"for; {advice}"
    )


def refuse_long(flops: float, what: str, advice: str, *, host: bool) -> None:
  """Stops a method that would take more than a day before it starts.

  Args:
    flops: of all that is to run.
    what: the method, for the message.
    advice: what scales in its place.
    host: it runs in NumPy; else on this process's devices. Either at the
      rate that the dry run assumes.
  """
  seconds = devices.seconds_for(flops, flops * host, own_mesh())
  hours = seconds / 3600
  if hours > HOURS:
    raise ConfigError(
      f"{what} would take about {hours:,.0f} hours, {flops:.3g} "
      f"flops at an assumed {flops / seconds / 1e9:,.0f} GFLOP/s, "
      f"above the {HOURS:g} hours that a selection may take; {advice}"
    )


def width_of(p: Sizes, pair: str = "mean") -> int:
  """W of `vectors`."""
  return p.e * (2 if pair == "concat" and p.r == 2 else 1)


def vectors(
  pool: Pool, pair: str = "mean", metric: str = "cosine"
) -> np.ndarray:
  """One vector a row [N, W] float32, from the embeddings of its responses.

  Args:
    pool: `pool.embedding` [N, R, E], finite.
    pair: of a pair's two sides: their "mean" (both count alike, as in the sum
      that is the default of `isa`), "chosen", "rejected", "difference"
      (chosen minus rejected: what a pair teaches, which shares few picks with
      the others), or "concat" (W = 2E). A single response stands for itself.
    metric: "cosine" scales every vector to length 1, so that a product is a
      cosine and a distance ranks as one; "centred" takes off the mean of the
      pool first (the hidden states of a language model share one large
      direction); "euclidean" leaves them as they are.

  Raises:
    NumericError: a row that is not finite, or of length 0 where lengths are
      scaled; the message names the ids.
  """
  require(pair in PAIRS, "pair", pair, PAIRS)
  require(metric in METRICS, "metric", metric, METRICS)
  x = pool.embedding
  x = x if x.ndim == 3 else x[:, None]
  if x.ndim != 3:
    raise ConfigError(
      f"the embedding has shape {x.shape}, wanted [N, R, E]; look at "
      "config.embed"
    )
  refuse_rows(not_finite(x), pool.ids, "an embedding that is not finite", _LOOK)
  n, r, width = x.shape
  if r == 1 and pair == "difference":
    raise ConfigError(
      "pair 'difference' reads pairs, the pool has single responses; set "
      "config.select.kwargs.pair"
    )
  wide = pair == "concat" and r == 2
  out = large_empty((n, width * (2 if wide else 1)))
  one = _ONE_VECTOR[pair if r == 2 else "chosen"]
  by_parts(lambda part: one(np.float32(part)), x, out=out)
  if metric == "centred":
    mean = out.mean(axis=0, dtype=np.float64)
    by_parts(lambda part: part - mean[None], out, out=out)
  if metric != "euclidean":
    norm = lengths(out)
    advice = f"set config.select.kwargs.metric to 'euclidean', or {_LOOK}"
    refuse_rows(norm <= 1e-30, pool.ids, "a vector of length 0", advice)
    by_parts(lambda part, size: part / size[:, None], out, norm, out=out)
  return out


def directions(pool: Pool, pair: str, metric: str) -> np.ndarray:
  """`vectors` of length 1, for what is made of cosines."""
  require(metric != "euclidean", "metric", metric, METRICS[:2])
  return vectors(pool, pair, metric)


def lengths(x: np.ndarray) -> np.ndarray:
  """[N, W] -> [N] float64 Euclidean lengths."""
  return np.sqrt(np.einsum("nw,nw->n", x, x, dtype=np.float64))


class Placed(NamedTuple):
  """Rows in the fixed chunks of `chunks.py`, over this process's devices."""

  mesh: jax.sharding.Mesh
  tiles: tuple[jax.Array, ...]  # each [chunks, rows, ...] float32
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
  """Puts [N, ...] arrays on the devices, cut alike; zeros after row N."""
  mesh, n = own_mesh(), len(columns[0])
  layout = padded_chunks(mesh), chunk_rows(n)
  put = []
  for column in columns:
    laid = tiles(column, *layout)
    put.append(sharding.put(mesh, laid, "pool", *[None] * (laid.ndim - 1)))
  return Placed(mesh, tuple(put), n)


@functools.lru_cache(maxsize=32)
def _program(mesh: jax.sharding.Mesh, fn: Callable, params: int) -> Callable:
  return over_chunks(mesh, fn, params)


def by_chunk(fn: Callable, placed: Placed, *params: Any) -> np.ndarray:
  """fn(*params, *tiles of a chunk) for every chunk -> [chunks, ...] host array.

  The bits do not depend on how many devices there are; see `chunks.py`.

  Args:
    fn: a function of a module (it is compiled once for each of them).
    placed: the rows.
    *params: float32 arrays that every chunk sees whole.
  """
  params = tuple(np.asarray(p, np.float32) for p in params)
  with jax.set_mesh(placed.mesh):
    run = _program(placed.mesh, fn, len(params))
    return sharding.fetch(run(params, placed.tiles))


def by_row(fn: Callable, placed: Placed, *params: Any) -> np.ndarray:
  """As `by_chunk`, for a function of rows to rows: [N, ...]."""
  out = by_chunk(fn, placed, *params)
  return out.reshape(-1, *out.shape[2:])[: placed.n]
