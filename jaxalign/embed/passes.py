"""The forward pass over rows: embeddings and log-probabilities together.

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
from jaxalign.data.tokens import (
  longest_row,
  pad_rows,
  padded_length,
  row_lengths,
  TokenRows,
)
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


class PassOptions(NamedTuple):
  """How a pass runs over rows.

  `pooling` is of the embedding, from the hidden states after the final norm:
  the "mean" over all tokens of the row, over those of the "response" as the
  mask has them (its EOS too, the prompt not; a row without a response is pooled
  whole), or the "last" token's (a small model's last state is poor: its output
  was never trained). Both embeddings are of the model cut after `layers`; 0:
  after all. A model already cut takes 0, and runs no more than it has.

  With `by_process` a process gets the numbers of its own rows alone, in that
  order, and reads no other's tokens; without, every process gets all rows.
  """

  tile: int = 32  # rows a device runs at once; part of the numbers' definition
  chunk: int = 64  # positions of the head at once
  pooling: str = "mean"
  layers: int = 0
  label: str = "embed"  # of the progress bar and of errors
  ids: Any = None  # [N] record ids, n/N rows of each, to name in an error
  by_process: Sequence[np.ndarray] | None = None  # row numbers
  tick: Callable | None = None  # of a bar that is drawn; None: draws one


class RowScores(NamedTuple):
  """What one pass over n rows yields."""

  embedding: np.ndarray  # [n, D] float32
  logp: np.ndarray  # [n] float32 nats, summed over response tokens
  count: np.ndarray  # [n] float32 response tokens


def headed(outputs: Sequence[str]) -> bool:
  """Whether these outputs need the output matrix, and so all layers."""
  return any(OUTPUTS[name][1] for name in outputs)


@functools.lru_cache(maxsize=16)
def _row_fn(mesh, m, outputs, pooling, layers, chunk):
  """Jitted `(params, {tokens, mask, length}, {}) -> {output: by row}`."""
  place = sharding.PER_ROW

  def one_tile(params, rows, shared):
    del shared
    x, early = decoder.forward_at(params, rows["tokens"], m, layers, place)
    # Other outputs must not change how a number is computed.
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
      least = jnp.min(jnp.where(rows["mask"], each, 0.0), axis=1)
      out |= dict(logp=sums, count=count, least=least)
    return {name: out[name] for name in outputs}

  return by_row(mesh, decoder.table(m), one_tile)


def _pooled(x, rows, pooling):
  """[b, L, D] states of `rows` -> [b, D] float32, a key of POOLINGS."""
  position = jnp.arange(x.shape[1])[None, :]
  length, answer = rows["length"][:, None], rows["mask"]
  where = position == length - 1 if pooling == "last" else position < length
  if pooling == "response":  # of an empty one, the row that it answers
    where = jnp.where(jnp.any(answer, axis=1, keepdims=True), answer, where)
  weight, x = where.astype(jnp.float32), x.astype(jnp.float32)
  # A weighted sum, not a gather: padding of any length leaves the same bits.
  highest = jax.lax.Precision.HIGHEST
  total = jnp.einsum("bl,bld->bd", weight, x, precision=highest)
  return total / jnp.sum(weight, axis=1, keepdims=True)


def pass_rows(
  mesh: Any,
  params: decoder.Params,
  m: decoder.ModelConfig,
  rows: TokenRows,
  outputs: Sequence[str],
  options: PassOptions = PassOptions(),
) -> dict[str, np.ndarray]:
  """The `outputs` of every row, in one pass.

  Args:
    mesh: the mesh; each of its devices takes a tile of rows a call.
    params: on the mesh.
    m: the model's sizes.
    rows: n tokenized rows.
    outputs: keys of OUTPUTS.
    options: see `PassOptions`.

  Returns:
    Of `outputs`: embedding [n, D] float32; answer_embedding [n, D], the same
    with the pooling "response"; logp [n] float32 nats, summed over the
    response's tokens, and their count [n]; residual [n, D], the slope of logp
    in the final hidden states, summed: of each response token its row of the
    output matrix less the mean row under the model's prediction; least [n]
    nats, the log-probability of the least likely token.

  Raises:
    NumericError: a number that is not finite; names the rows.
  """
  outputs, o = tuple(n for n in OUTPUTS if n in outputs), options
  shapes = {n: (m.width,) if OUTPUTS[n][0] else () for n in outputs}
  fn = _row_fn(mesh, m, outputs, o.pooling, o.layers, o.chunk)
  return map_rows(mesh, fn, params, rows, shapes, m.context, o)


def score_rows(
  mesh: Any,
  params: decoder.Params,
  m: decoder.ModelConfig,
  rows: TokenRows,
  options: PassOptions = PassOptions(),
) -> RowScores:
  """`pass_rows` for the embedding and the response's log-probability."""
  found = pass_rows(mesh, params, m, rows, RowScores._fields, options)
  return RowScores(**found)


def map_rows(
  mesh: Any,
  fn: Callable,
  params: Any,
  rows: TokenRows,
  shapes: dict[str, tuple[int, ...]],
  context: int,
  options: PassOptions,
) -> dict[str, np.ndarray]:
  """Runs a model of any kind over rows, in length buckets.

  Args:
    mesh, rows, options: as of `pass_rows`.
    fn: jitted `(params, {tokens [b, L], mask [b, L], length [b]}, {}) ->
      {name: [b, ...]}`, as `sharding.per_row` makes them.
    params: of `fn`.
    shapes: name -> what `fn` gives a row.
    context: the longest row.

  Returns:
    name -> [n, ...] float32.

  Raises:
    NumericError: a number that is not finite; names the rows.
  """
  o, lengths = options, row_lengths(rows)
  longest, step = longest_row(lengths, context), o.tile * mesh.size
  own = o.by_process is not None
  every = o.by_process if own else [np.arange(len(lengths))]
  mine = jax.process_index() if own else 0
  index = np.asarray(every[mine], np.int64)
  out = {n: np.zeros((len(index), *s), np.float32) for n, s in shapes.items()}
  buckets = [_buckets(lengths[one], longest) for one in every]
  with contextlib.ExitStack() as stack:
    bar = functools.partial(progress.bar, o.label, len(index))
    tick = o.tick or stack.enter_context(bar())
    for size in np.unique(np.concatenate(buckets)):
      places = [np.flatnonzero(one == size) for one in buckets]
      waiting = []
      for some, full in _calls(every, places, mine, step // len(every)):

        def make(at, full=full, size=int(size)):
          # Only this process's rows are read. Of its own, the k-th row is for
          # the k-th place that lies on its devices.
          taken = full if own else full[at]
          tokens, mask = pad_rows(rows, taken, size)
          length = lengths[taken].astype(np.int32)
          return dict(tokens=tokens, mask=mask, length=length)

        batch = sharding.put_rows(mesh, (step,), make, "pool")
        waiting.append((some, fn(params, batch, {})))
        if len(waiting) > 2:  # keep the device busy, the memory bounded
          _collect(out, *waiting.pop(0), tick, own)
      for some, result in waiting:
        _collect(out, some, result, tick, own)
  _check_finite(out, index, len(lengths), options)
  return out


def _buckets(lengths: np.ndarray, longest: int) -> np.ndarray:
  """[n] lengths -> [n] padded lengths."""
  known, which = np.unique(lengths, return_inverse=True)
  padded = [padded_length(int(x), longest) for x in known]
  return np.array(padded, np.int64)[which]


def _calls(
  every: Sequence[np.ndarray], places: list[np.ndarray], mine: int, step: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """([k] places among this process's rows, [step] row numbers) of the calls.

  `every` holds the row numbers of every process, `places` which of them are of
  the size at hand. All processes yield equally often: a call is theirs
  together.
  """
  own = np.asarray(every[mine], np.int64)
  spare = next(one[at[0]] for one, at in zip(every, places) if len(at))
  for at in range(0, max(map(len, places)), step):
    some = places[mine][at : at + step]
    # A short last call repeats its first row: shapes stay the same.
    full = np.full(step, own[some[0]] if len(some) else spare, np.int64)
    full[: len(some)] = own[some]
    yield some, full


def _collect(out, some, result, tick, own) -> None:
  fetch = sharding.own_rows if own else sharding.fetch
  for name, into in out.items():
    into[some] = fetch(result[name])[: len(some)]
  tick(len(some))


def _check_finite(out, index, n, options) -> None:
  """Raises NumericError with the rows whose numbers are not finite."""
  bad = np.zeros(len(index), bool)
  for x in out.values():  # not by reshape: a process may have no rows
    bad |= ~np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
  bad = index[bad]
  everywhere = len(bad)
  if options.by_process is not None:
    everywhere = sharding.total(everywhere)
  if not everywhere:
    return
  named = ""
  if options.ids is not None and len(bad):
    names = [options.ids[i // (n // len(options.ids))] for i in bad[:8]]
    named = f" (ids {', '.join(map(str, names))})"
  raise NumericError(
    f"{options.label}: {everywhere} of {n} rows have an embedding or "
    f"log-probability that is not finite, rows {bad[:8].tolist()}{named}; look "
    "at these records and at the model's weights"
  )


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


def pass_flops(
  m: decoder.ModelConfig,
  rows: TokenRows,
  outputs: Sequence[str] = ("logp",),
  layers: int = 0,
) -> int:
  """`row_flops` of all rows, padding not counted."""
  each = functools.partial(row_flops, m, outputs=outputs, layers=layers)
  return sum_flops(rows, each)


def sum_flops(rows: TokenRows, flops_of: Callable[[int], int]) -> int:
  """The sum over rows of `flops_of` their lengths."""
  sizes, counts = np.unique(row_lengths(rows), return_counts=True)
  return sum(int(flops_of(int(s))) * int(k) for s, k in zip(sizes, counts))
