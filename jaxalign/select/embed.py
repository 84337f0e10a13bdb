"""The one forward pass over rows: embedding and log-probability together.

Row-parallel and in fixed tiles, so a row's numbers are the same bits on any
mesh and under any order of the input (the pool is sorted by record id).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import progress
from jaxalign import sharding
from jaxalign.data import tokens as tokens_lib
from jaxalign.errors import NumericError
from jaxalign.model import decoder
from jaxalign.model import logprob

POOLINGS = ("mean", "last")


class RowScores(NamedTuple):
  """What one pass over n rows yields."""

  embedding: np.ndarray  # [n, D] float32
  logp: np.ndarray  # [n] float32 nats, summed over response tokens
  count: np.ndarray  # [n] float32 response tokens


@functools.lru_cache(maxsize=8)
def _row_fn(mesh, m: decoder.ModelConfig, pooling: str, chunk: int):
  """Jitted `(params, {tokens, mask, length}, {}) -> arrays by row`."""
  place = sharding.PER_ROW

  def one_tile(params, rows, shared):
    del shared
    x = decoder.forward(params, rows["tokens"], m, place)
    head = decoder.head(params, m, place).astype(m.dtype)
    each = logprob.token_logps(x, head, rows["tokens"], chunk,
                               m.final_softcap)
    total, count = logprob.sums(each, rows["mask"])
    return dict(embedding=_pooled(x, rows["length"], pooling), logp=total,
                count=count)

  return decoder.by_row(mesh, m, one_tile)


@functools.lru_cache(maxsize=8)
def _pool_fn(mesh, m: decoder.ModelConfig, pooling: str):
  """`_row_fn` without the head."""
  def one_tile(params, rows, shared):
    del shared
    x = decoder.forward(params, rows["tokens"], m, sharding.PER_ROW)
    return dict(embedding=_pooled(x, rows["length"], pooling))

  return decoder.by_row(mesh, m, one_tile)


@functools.lru_cache(maxsize=8)
def _residual_fn(mesh, m: decoder.ModelConfig, chunk: int):
  """`_row_fn` for `residual_rows`."""
  def one_tile(params, rows, shared):
    del shared
    x = decoder.forward(params, rows["tokens"], m, sharding.PER_ROW)
    head = decoder.head(params, m, sharding.PER_ROW).astype(m.dtype)

    def total(x):
      each = logprob.token_logps(x, head, rows["tokens"], chunk,
                                 m.final_softcap)
      return jnp.sum(logprob.sums(each, rows["mask"])[0]), each

    slope, each = jax.grad(total, has_aux=True)(x)
    return dict(residual=jnp.sum(slope.astype(jnp.float32), axis=1),
                least=jnp.min(jnp.where(rows["mask"], each, 0.0), axis=1))

  return decoder.by_row(mesh, m, one_tile)


def _pooled(x: jax.Array, length: jax.Array, pooling: str) -> jax.Array:
  """[b, L, D] states of rows of `length` [b] tokens -> [b, D] float32."""
  position = jnp.arange(x.shape[1])[None, :]
  length = length[:, None]
  if pooling == "mean":
    weight = (position < length).astype(jnp.float32)
  else:
    weight = (position == length - 1).astype(jnp.float32)
  # A weighted sum, not a gather: padding of any length leaves the same bits.
  total = jnp.einsum("bl,bld->bd", weight, x.astype(jnp.float32),
                     precision=jax.lax.Precision.HIGHEST)
  return total / jnp.sum(weight, axis=1, keepdims=True)


def score_rows(mesh: Any, params: decoder.Params, m: decoder.ModelConfig,
               rows: tokens_lib.TokenRows, *, pooling: str = "mean",
               tile: int = 32, chunk: int = 64, label: str = "embed",
               ids: Any = None) -> RowScores:
  """Embeds every row and sums its response's log-probability, in one pass.

  Args:
    mesh: the mesh; each of its devices takes `tile` rows a call.
    params: on the mesh.
    m: the model's sizes.
    rows: n tokenized rows.
    pooling: "mean" of the hidden states after the final norm over all tokens
      of the row, or the "last" token's (a small model's last state is poor:
      its output was never trained).
    tile: rows a device runs at once; part of the numbers' definition.
    chunk: positions of the head at once.
    label: what the progress bar says.
    ids: [N] record ids, n/N rows of each side by side, to name in an error.

  Raises:
    NumericError: an embedding or log-probability that is not finite; names
      the rows.
  """
  n = len(rows.start)
  out = RowScores(np.zeros((n, m.width), np.float32), np.zeros(n, np.float32),
                  np.zeros(n, np.float32))
  over_tiles(mesh, _row_fn(mesh, m, pooling, chunk), params, m, rows, tile,
              out._asdict(), label, ids)
  return out


def pool_rows(mesh: Any, params: decoder.Params, m: decoder.ModelConfig,
              rows: tokens_lib.TokenRows, *, pooling: str, tile: int,
              label: str = "embed", ids: Any = None) -> np.ndarray:
  """The embedding alone, [n, D] float32; arguments as of `score_rows`."""
  out = dict(embedding=np.zeros((len(rows.start), m.width), np.float32))
  over_tiles(mesh, _pool_fn(mesh, m, pooling), params, m, rows, tile, out,
              label, ids)
  return out["embedding"]


def residual_rows(mesh: Any, params: decoder.Params, m: decoder.ModelConfig,
                  rows: tokens_lib.TokenRows, *, tile: int, chunk: int = 64,
                  ids: Any = None) -> dict[str, np.ndarray]:
  """What each response says beyond what the model expected, in one pass.

  Arguments as of `score_rows`.

  Returns:
    residual [n, D] float32, the slope of the summed log-probability in the
    final hidden states, summed: of each response token its row of the output
    matrix less the mean row under the model's prediction; least [n] float32
    nats, the log-probability of the least likely token.
  """
  n = len(rows.start)
  out = dict(residual=np.zeros((n, m.width), np.float32),
             least=np.zeros(n, np.float32))
  over_tiles(mesh, _residual_fn(mesh, m, chunk), params, m, rows, tile, out,
              "residual", ids)
  return out


def over_tiles(mesh: Any, fn: Any, params: Any, m: Any,
               rows: tokens_lib.TokenRows, tile: int,
               out: dict[str, np.ndarray], label: str, ids: Any) -> None:
  """Runs `fn` over all rows in length buckets; fills the arrays of `out`.

  Args:
    mesh, rows, tile, label, ids: as of `score_rows`.
    fn: jitted `(params, {tokens [b, L], mask [b, L], length [b]}, {})` ->
      arrays by row, as `sharding.per_row` makes them.
    params: what it takes.
    m: has the `context`, the longest row.
    out: name -> array of n rows.
  """
  lengths = tokens_lib.lengths(rows)
  n, step = len(lengths), tile * mesh.size
  longest = tokens_lib.longest(lengths, m.context)
  buckets = np.array([tokens_lib.bucket(int(x), longest) for x in lengths])
  with progress.bar(label, n) as tick:
    for size in np.unique(buckets):
      index = np.flatnonzero(buckets == size)
      waiting = []
      for at in range(0, len(index), step):
        part = index[at:at + step]
        # A short last call repeats its first row: shapes stay the same.
        full = np.concatenate([part, np.repeat(part[:1], step - len(part))])

        def make(places, full=full, size=int(size)):
          index = full[places]  # only this process's rows are read
          tokens, mask = tokens_lib.pad(rows, index, size)
          return dict(tokens=tokens, mask=mask,
                      length=lengths[index].astype(np.int32))

        batch = sharding.put_rows(mesh, (step,), make, "pool")
        waiting.append((part, fn(params, batch, {})))
        if len(waiting) > 2:  # keep the device busy, the memory bounded
          _collect(out, *waiting.pop(0), tick)
      for part, result in waiting:
        _collect(out, part, result, tick)
  bad = np.flatnonzero(~np.all([
      np.isfinite(x).reshape(n, -1).all(1) for x in out.values()], axis=0))
  if len(bad):
    named = "" if ids is None else " (ids " + ", ".join(
        str(ids[i * len(ids) // n]) for i in bad[:8]) + ")"
    raise NumericError(f"{label}: {len(bad)} of {n} rows have an embedding or "
                       f"log-probability that is not finite, rows "
                       f"{bad[:8].tolist()}{named}; look at these records and "
                       "at the model's weights")


def _collect(out: dict[str, np.ndarray], part: np.ndarray, result, tick
             ) -> None:
  for name, into in out.items():
    into[part] = sharding.fetch(result[name])[:len(part)]
  tick(len(part))


def operations(m: decoder.ModelConfig, rows: tokens_lib.TokenRows,
               logit_rows: int | None = None) -> int:
  """Floating-point operations of one pass, padding not counted.

  `logit_rows` as in `decoder.operations`: 0 where the head does not run.
  """
  sizes, counts = np.unique(tokens_lib.lengths(rows), return_counts=True)
  return int(sum(decoder.operations(m, int(s), logit_rows) * int(c)
                 for s, c in zip(sizes, counts)))
