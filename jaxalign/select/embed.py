"""The one forward pass over rows: embedding and log-probability together.

Row-parallel and in fixed tiles, so a row's numbers are the same bits on any
mesh and under any order of the input (the pool is sorted by record id).
"""

import contextlib
import functools
from typing import Any, Iterator, NamedTuple, Sequence

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
Parts = Sequence[np.ndarray] | None  # row numbers, for each process


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
               ids: Any = None, parts: Parts = None,
               tick: Any = None) -> RowScores:
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
    parts: row numbers for each process; a process then gets the numbers of
      its own rows alone, in that order, and reads no other's tokens. None:
      every process gets all rows.
    tick: of a progress bar that is already drawn; None: one is drawn.

  Raises:
    NumericError: an embedding or log-probability that is not finite; names
      the rows.
  """
  n = _count(rows, parts)
  out = RowScores(np.zeros((n, m.width), np.float32), np.zeros(n, np.float32),
                  np.zeros(n, np.float32))
  _over_tiles(mesh, _row_fn(mesh, m, pooling, chunk), params, m, rows, tile,
              out._asdict(), label, ids, parts, tick)
  return out


def pool_rows(mesh: Any, params: decoder.Params, m: decoder.ModelConfig,
              rows: tokens_lib.TokenRows, *, pooling: str, tile: int,
              label: str = "embed", ids: Any = None, parts: Parts = None,
              tick: Any = None) -> np.ndarray:
  """The embedding alone, [n, D] float32; arguments as of `score_rows`."""
  out = dict(embedding=np.zeros((_count(rows, parts), m.width), np.float32))
  _over_tiles(mesh, _pool_fn(mesh, m, pooling), params, m, rows, tile, out,
              label, ids, parts, tick)
  return out["embedding"]


def residual_rows(mesh: Any, params: decoder.Params, m: decoder.ModelConfig,
                  rows: tokens_lib.TokenRows, *, tile: int, chunk: int = 64,
                  ids: Any = None, parts: Parts = None, tick: Any = None
                  ) -> dict[str, np.ndarray]:
  """What each response says beyond what the model expected, in one pass.

  Arguments as of `score_rows`.

  Returns:
    residual [n, D] float32, the slope of the summed log-probability in the
    final hidden states, summed: of each response token its row of the output
    matrix less the mean row under the model's prediction; least [n] float32
    nats, the log-probability of the least likely token.
  """
  n = _count(rows, parts)
  out = dict(residual=np.zeros((n, m.width), np.float32),
             least=np.zeros(n, np.float32))
  _over_tiles(mesh, _residual_fn(mesh, m, chunk), params, m, rows, tile, out,
              "residual", ids, parts, tick)
  return out


def _count(rows: tokens_lib.TokenRows, parts: Parts) -> int:
  """Rows whose numbers this process gets."""
  return (len(rows.start) if parts is None else
          len(parts[jax.process_index()]))


class _Ways(NamedTuple):
  """How calls of `step` rows meet the processes."""

  shares: list[np.ndarray]  # row numbers, one entry or one for each process
  own: int  # rows of a share in one call
  mine: int  # which share this process makes and keeps

  def calls(self, size_of: list[np.ndarray], size: int
            ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """([k] places in this share, [own] row numbers) of every call of a size.

    `size_of` holds the padded length of every row of every share. All
    processes yield equally often: a call is theirs together.
    """
    at_size = [np.flatnonzero(one == size) for one in size_of]
    place, share = at_size[self.mine], self.shares[self.mine]
    spare = next(one[at[0]] for one, at in zip(self.shares, at_size)
                 if len(at))
    for at in range(0, max(map(len, at_size)), self.own):
      part = place[at:at + self.own]
      # A short last call repeats its first row: shapes stay the same.
      first = share[part[0]] if len(part) else spare
      full = np.full(self.own, first, np.int64)
      full[:len(part)] = share[part]
      yield part, full


def _buckets(lengths: np.ndarray, longest: int) -> np.ndarray:
  """[n] lengths -> [n] padded lengths."""
  known, which = np.unique(lengths, return_inverse=True)
  return np.array([tokens_lib.bucket(int(x), longest) for x in known],
                  np.int64)[which]


def _over_tiles(mesh, fn, params, m, rows, tile, out, label, ids, parts,
                tick) -> None:
  """Runs `fn` over the rows in length buckets; fills the arrays of `out`."""
  lengths = tokens_lib.lengths(rows)
  longest = tokens_lib.longest(lengths, m.context)
  step = tile * mesh.size
  ways = _Ways([np.arange(len(lengths))], step, 0)
  if parts is not None:
    ways = _Ways([np.asarray(part, np.int64) for part in parts],
                 step // len(parts), jax.process_index())
  index = ways.shares[ways.mine]
  size_of = [_buckets(lengths[share], longest) for share in ways.shares]
  with contextlib.ExitStack() as stack:
    if tick is None:
      tick = stack.enter_context(progress.bar(label, len(index)))
    for size in np.unique(np.concatenate(size_of)):
      waiting = []
      for part, full in ways.calls(size_of, size):
        def make(places, full=full, size=int(size)):
          # Only this process's rows are read. Of its own share, the k-th row
          # is for the k-th place that lies on its devices.
          mine = full if parts is not None else full[places]
          tokens, mask = tokens_lib.pad(rows, mine, size)
          return dict(tokens=tokens, mask=mask,
                      length=lengths[mine].astype(np.int32))

        batch = sharding.put_rows(mesh, (step,), make, "pool")
        waiting.append((part, fn(params, batch, {})))
        if len(waiting) > 2:  # keep the device busy, the memory bounded
          _collect(out, *waiting.pop(0), tick, parts is not None)
      for part, result in waiting:
        _collect(out, part, result, tick, parts is not None)
  bad = np.flatnonzero(~np.all([
      # Not by reshape: a process may have no rows of its own.
      np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
      for x in out.values()], axis=0))
  everywhere = len(bad)
  if parts is not None:
    everywhere = sharding.total(len(bad))
  if everywhere:
    bad = index[bad]
    responses = len(lengths) // len(ids) if ids is not None else 1
    named = "" if ids is None or not len(bad) else " (ids " + ", ".join(
        str(ids[i // responses]) for i in bad[:8]) + ")"
    raise NumericError(f"{label}: {everywhere} of {len(lengths)} rows have an "
                       "embedding or log-probability that is not finite, rows "
                       f"{bad[:8].tolist()}{named}; look at these records and "
                       "at the model's weights")


def _collect(out: dict[str, np.ndarray], part: np.ndarray, result, tick,
             own: bool = False) -> None:
  fetch = sharding.own_rows if own else sharding.fetch
  for name, into in out.items():
    into[part] = fetch(result[name])[:len(part)]
  tick(len(part))


def number_rows(mesh: Any, fn: Any, params: Any, m: Any,
                rows: tokens_lib.TokenRows, *, tile: int, label: str,
                ids: Any = None, parts: Parts = None, tick: Any = None
                ) -> np.ndarray:
  """One float32 number a row, [n], of a pass of any model.

  Args:
    mesh, rows, tile, label, ids, parts, tick: as of `score_rows`.
    fn: jitted `(params, {tokens [b, L], mask [b, L], length [b]}, {}) ->
      {"number": [b]}`, as `sharding.per_row` makes them.
    params: what it takes.
    m: has the `context`, the longest row.
  """
  out = dict(number=np.zeros(_count(rows, parts), np.float32))
  _over_tiles(mesh, fn, params, m, rows, tile, out, label, ids, parts, tick)
  return out["number"]


def operations(m: decoder.ModelConfig, rows: tokens_lib.TokenRows,
               logit_rows: int | None = None) -> int:
  """Floating-point operations of one pass, padding not counted.

  `logit_rows` as in `decoder.operations`: 0 where the head does not run.
  """
  sizes, counts = np.unique(tokens_lib.lengths(rows), return_counts=True)
  return int(sum(decoder.operations(m, int(s), logit_rows) * int(c)
                 for s, c in zip(sizes, counts)))
