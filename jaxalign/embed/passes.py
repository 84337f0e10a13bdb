"""The one forward pass over rows: embedding and log-probability together.

Row-parallel and in fixed tiles, so a row's numbers are the same bits on any
mesh and under any order of the input (the pool is sorted by record id).
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import progress, sharding
from jaxalign.core.errors import NumericError
from jaxalign.data import tokens as tokens_lib
from jaxalign.model import decoder, logprob
from jaxalign.model.flops import decoder_flops
from jaxalign.model.parameters import by_row

POOLINGS = ("mean", "last", "response")
# What a pass can yield: name -> whether it has a width, whether it needs the
# output matrix, and so all layers.
OUTPUTS = {
  "embedding": (True, False),
  "answer_embedding": (True, False),
  "logp": (False, True),
  "count": (False, True),
  "residual": (True, True),
  "least": (False, True),
}
Parts = Sequence[np.ndarray] | None  # row numbers, for each process


class RowScores(NamedTuple):
  """What one pass over n rows yields."""

  embedding: np.ndarray  # [n, D] float32
  logp: np.ndarray  # [n] float32 nats, summed over response tokens
  count: np.ndarray  # [n] float32 response tokens


def headed(outputs: Sequence[str]) -> bool:
  """Whether these outputs need the output matrix, and so all layers."""
  return any(OUTPUTS[name][1] for name in outputs)


@functools.lru_cache(maxsize=16)
def _row_fn(
  mesh,
  m: decoder.ModelConfig,
  outputs: tuple[str, ...],
  pooling: str,
  layers: int,
  chunk: int,
):
  """Jitted `(params, {tokens, mask, length}, {}) -> {output: by row}`."""
  place = sharding.PER_ROW

  def one_tile(params, rows, shared):
    del shared
    x, early = decoder.forward_at(params, rows["tokens"], m, layers, place)
    # What is asked for beside a number must not change how it is computed.
    x, early = jax.lax.optimization_barrier((x, early))
    out = {}
    for name, how in (("embedding", pooling), ("answer_embedding", "response")):
      if name in outputs:
        out[name] = _pooled(early, rows, how)
    if headed(outputs):
      head = decoder.head(params, m, place).astype(m.dtype)

      def total(x):
        each = logprob.token_logps(
          x, head, rows["tokens"], chunk, m.final_softcap
        )
        sums, count = logprob.masked_sums(each, rows["mask"])
        return jnp.sum(sums), (each, sums, count)

      if "residual" in outputs:
        slope, (each, sums, count) = jax.grad(total, has_aux=True)(x)
        out["residual"] = jnp.sum(slope.astype(jnp.float32), axis=1)
      else:
        each, sums, count = total(x)[1]
      out |= dict(
        logp=sums,
        count=count,
        least=jnp.min(jnp.where(rows["mask"], each, 0.0), axis=1),
      )
    return {name: out[name] for name in outputs}

  return by_row(mesh, decoder.table(m), one_tile)


def _pooled(
  x: jax.Array, rows: dict[str, jax.Array], pooling: str
) -> jax.Array:
  """[b, L, D] states of `rows` -> [b, D] float32, a key of POOLINGS."""
  position = jnp.arange(x.shape[1])[None, :]
  length = rows["length"][:, None]
  if pooling == "last":
    where = position == length - 1
  else:
    where = position < length
  if pooling == "response":  # of an empty one, the row that it answers
    said = rows["mask"]
    where = jnp.where(jnp.any(said, axis=1, keepdims=True), said, where)
  weight = where.astype(jnp.float32)
  # A weighted sum, not a gather: padding of any length leaves the same bits.
  total = jnp.einsum(
    "bl,bld->bd",
    weight,
    x.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return total / jnp.sum(weight, axis=1, keepdims=True)


def pass_rows(
  mesh: Any,
  params: decoder.Params,
  m: decoder.ModelConfig,
  rows: tokens_lib.TokenRows,
  outputs: Sequence[str],
  *,
  pooling: str = "mean",
  layers: int = 0,
  tile: int = 32,
  chunk: int = 64,
  label: str = "embed",
  ids: Any = None,
  parts: Parts = None,
  tick: Any = None,
) -> dict[str, np.ndarray]:
  """All that is asked for of every row, in one pass.

  Args:
    mesh: the mesh; each of its devices takes `tile` rows a call.
    params: on the mesh.
    m: the model's sizes.
    rows: n tokenized rows.
    outputs: keys of OUTPUTS.
    pooling: of the embedding, from the hidden states after the final norm:
      the "mean" over all tokens of the row, over those of the "response" as
      the mask has them (its EOS too, the prompt not; a row without a response
      is pooled whole), or the "last" token's (a small model's last state is
      poor: its output was never trained).
    layers: both embeddings are of the model cut after so many; 0: after all.
      A model already cut takes 0, and runs no more than it has.
    tile: rows a device runs at once; part of the numbers' definition.
    chunk: positions of the head at once.
    label: what the progress bar says.
    ids: [N] record ids, n/N rows of each side by side, to name in an error.
    parts: row numbers for each process; a process then gets the numbers of
      its own rows alone, in that order, and reads no other's tokens. None:
      every process gets all rows.
    tick: of a progress bar that is already drawn; None: one is drawn.

  Returns:
    Of those asked for: embedding [n, D] float32; answer_embedding [n, D], the
    same with the pooling "response"; logp [n] float32 nats, summed over the
    response's tokens, and their count [n]; residual [n, D], the slope of logp
    in the final hidden states, summed: of each response token its row of the
    output matrix less the mean row under the model's prediction; least [n]
    nats, the log-probability of the least likely token.

  Raises:
    NumericError: a number that is not finite; names the rows.
  """
  n, outputs = _count(rows, parts), tuple(n for n in OUTPUTS if n in outputs)
  out = {
    name: np.zeros((n, m.width) if OUTPUTS[name][0] else n, np.float32)
    for name in outputs
  }
  fn = _row_fn(mesh, m, outputs, pooling, layers, chunk)
  _over_tiles(mesh, fn, params, m, rows, tile, out, label, ids, parts, tick)
  return out


def score_rows(
  mesh: Any,
  params: decoder.Params,
  m: decoder.ModelConfig,
  rows: tokens_lib.TokenRows,
  **knobs: Any,
) -> RowScores:
  """Embeds every row and sums its response's log-probability, in one pass.

  Arguments as of `pass_rows`.
  """
  return RowScores(
    **pass_rows(mesh, params, m, rows, RowScores._fields, **knobs)
  )


def pool_rows(
  mesh: Any,
  params: decoder.Params,
  m: decoder.ModelConfig,
  rows: tokens_lib.TokenRows,
  **knobs: Any,
) -> np.ndarray:
  """The embedding alone, [n, D] float32; arguments as of `pass_rows`."""
  return pass_rows(mesh, params, m, rows, ("embedding",), **knobs)["embedding"]


def row_flops(
  m: decoder.ModelConfig, length: int, outputs: Sequence[str], layers: int = 0
) -> int:
  """Floating-point operations of `pass_rows` on a row of `length` tokens.

  Only the first `layers` run where nothing needs the output matrix; a
  residual takes the head once more, and its slope.
  """
  if not headed(outputs):
    return decoder_flops(m._replace(layers=layers or m.layers), length, 0)
  slope = 4 * m.vocab * m.width * length if "residual" in outputs else 0
  return decoder_flops(m, length) + slope


def _count(rows: tokens_lib.TokenRows, parts: Parts) -> int:
  """Rows whose numbers this process gets."""
  return len(rows.start) if parts is None else len(parts[jax.process_index()])


class _Ways(NamedTuple):
  """How calls of `step` rows meet the processes."""

  shares: list[np.ndarray]  # row numbers, one entry or one for each process
  own: int  # rows of a share in one call
  mine: int  # which share this process makes and keeps

  def calls(
    self, size_of: list[np.ndarray], size: int
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """([k] places in this share, [own] row numbers) of every call of a size.

    `size_of` holds the padded length of every row of every share. All
    processes yield equally often: a call is theirs together.
    """
    at_size = [np.flatnonzero(one == size) for one in size_of]
    place, share = at_size[self.mine], self.shares[self.mine]
    spare = next(one[at[0]] for one, at in zip(self.shares, at_size) if len(at))
    for at in range(0, max(map(len, at_size)), self.own):
      part = place[at : at + self.own]
      # A short last call repeats its first row: shapes stay the same.
      first = share[part[0]] if len(part) else spare
      full = np.full(self.own, first, np.int64)
      full[: len(part)] = share[part]
      yield part, full


def _buckets(lengths: np.ndarray, longest: int) -> np.ndarray:
  """[n] lengths -> [n] padded lengths."""
  known, which = np.unique(lengths, return_inverse=True)
  return np.array(
    [tokens_lib.padded_length(int(x), longest) for x in known], np.int64
  )[which]


def _over_tiles(
  mesh, fn, params, m, rows, tile, out, label, ids, parts, tick
) -> None:
  """Runs `fn` over the rows in length buckets; fills the arrays of `out`."""
  lengths = tokens_lib.row_lengths(rows)
  longest = tokens_lib.longest_row(lengths, m.context)
  step = tile * mesh.size
  ways = _Ways([np.arange(len(lengths))], step, 0)
  if parts is not None:
    ways = _Ways(
      [np.asarray(part, np.int64) for part in parts],
      step // len(parts),
      jax.process_index(),
    )
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
          tokens, mask = tokens_lib.pad_rows(rows, mine, size)
          return dict(
            tokens=tokens, mask=mask, length=lengths[mine].astype(np.int32)
          )

        batch = sharding.put_rows(mesh, (step,), make, "pool")
        waiting.append((part, fn(params, batch, {})))
        if len(waiting) > 2:  # keep the device busy, the memory bounded
          _collect(out, *waiting.pop(0), tick, parts is not None)
      for part, result in waiting:
        _collect(out, part, result, tick, parts is not None)
  bad = np.flatnonzero(
    ~np.all(
      [
        # Not by reshape: a process may have no rows of its own.
        np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
        for x in out.values()
      ],
      axis=0,
    )
  )
  everywhere = len(bad)
  if parts is not None:
    everywhere = sharding.total(len(bad))
  if everywhere:
    bad = index[bad]
    responses = len(lengths) // len(ids) if ids is not None else 1
    named = (
      ""
      if ids is None or not len(bad)
      else " (ids " + ", ".join(str(ids[i // responses]) for i in bad[:8]) + ")"
    )
    raise NumericError(
      f"{label}: {everywhere} of {len(lengths)} rows have an "
      "embedding or log-probability that is not finite, rows "
      f"{bad[:8].tolist()}{named}; look at these records and "
      "at the model's weights"
    )


def _collect(
  out: dict[str, np.ndarray], part: np.ndarray, result, tick, own: bool = False
) -> None:
  fetch = sharding.own_rows if own else sharding.fetch
  for name, into in out.items():
    into[part] = fetch(result[name])[: len(part)]
  tick(len(part))


def number_rows(
  mesh: Any,
  fn: Any,
  params: Any,
  m: Any,
  rows: tokens_lib.TokenRows,
  *,
  tile: int,
  label: str,
  ids: Any = None,
  parts: Parts = None,
  tick: Any = None,
) -> np.ndarray:
  """One float32 number a row, [n], of a pass of any model.

  Args:
    mesh, rows, tile, label, ids, parts, tick: as of `pass_rows`.
    fn: jitted `(params, {tokens [b, L], mask [b, L], length [b]}, {}) ->
      {"number": [b]}`, as `sharding.per_row` makes them.
    params: what it takes.
    m: has the `context`, the longest row.
  """
  out = dict(number=np.zeros(_count(rows, parts), np.float32))
  _over_tiles(mesh, fn, params, m, rows, tile, out, label, ids, parts, tick)
  return out["number"]


def flops(
  m: decoder.ModelConfig,
  rows: tokens_lib.TokenRows,
  logit_rows: int | None = None,
) -> int:
  """Floating-point operations of one pass, padding not counted.

  `logit_rows` as in `decoder_flops`: 0 where the head does not run.
  """
  return _over_rows(rows, lambda s: decoder_flops(m, s, logit_rows))


def pass_flops(
  m: decoder.ModelConfig,
  rows: tokens_lib.TokenRows,
  outputs: Sequence[str],
  layers: int = 0,
) -> int:
  """`row_flops` of all rows."""
  return _over_rows(rows, lambda s: row_flops(m, s, outputs, layers))


def _over_rows(rows: tokens_lib.TokenRows, of_length: Callable) -> int:
  sizes, counts = np.unique(tokens_lib.row_lengths(rows), return_counts=True)
  return int(sum(of_length(int(s)) * int(c) for s, c in zip(sizes, counts)))
