"""Log-probabilities of weights that do not change, once, ahead of training.

In the layout that training has: a prompt is computed once for all its answers
and hardly anything is padding. Padded rows go through `embed.score_rows`.
"""

import functools
from typing import Any

import jax
import numpy as np

from jaxalign import progress
from jaxalign import sharding
from jaxalign.data import tokens as tokens_lib
from jaxalign.model import decoder
from jaxalign.select import embed
from jaxalign.train import layout as packing
from jaxalign.train.logps import PRODUCERS


@functools.lru_cache(maxsize=8)
def _call(producer: str, m: decoder.ModelConfig, chunk: int):
  """Jitted `(params, Packed, counts) -> [b, R]` sums."""
  fn = PRODUCERS[producer](m, chunk)
  return jax.jit(lambda *batch: fn(*batch).sum)


def logps(mesh: Any, params: decoder.Params, m: decoder.ModelConfig,
          rows: tokens_lib.TokenRows, index: np.ndarray, *, layout: str,
          tile: int, chunk: int, producer: str = "chunked",
          label: str = "ref_logps", ids: Any = None
          ) -> tuple[np.ndarray, np.ndarray]:
  """What fixed weights say of every response.

  Rows are dealt by length to bins of `tile` responses, a bin to each device a
  call, so bins do not depend on the mesh.

  Args:
    mesh: the current mesh.
    params: on the mesh.
    m: the model's sizes.
    rows: tokenized rows.
    index: [M, R] int, which of them each response is.
    layout: "packed", "packed_apart" or "padded", as of `train.feed`.
    tile: responses a device runs at once.
    chunk: positions of the head at once.
    producer: a key of PRODUCERS, for the packed layouts.
    label: what the progress bar says.
    ids: [M] record ids, to name in an error.

  Returns:
    (sums [M, R] nats, counts [M, R] of response tokens), float32.

  Raises:
    NumericError: a sum that is not finite; names the rows.
    DataError: responses of one row that have different prompts, and a layout
      that shares them.
  """
  n, r = index.shape
  lengths = tokens_lib.lengths(rows)
  counts = np.float32(lengths - rows.start)[index]
  if layout == "padded":
    found = embed.score_rows(
        mesh, params, m, tokens_lib.take(rows, index.reshape(-1)), tile=tile,
        chunk=chunk, label=label, ids=ids)
    return found.logp.reshape(n, r), found.count.reshape(n, r)
  if layout == "packed_apart":
    index = index.reshape(-1, 1)
    ids = None if ids is None else np.repeat(ids, r)
  shape, each = index.shape, index.shape[1]
  own = min(max(1, tile // each), len(index))
  answers = counts.astype(np.int32).reshape(shape)
  sizes = np.int64(rows.start)[index[:, 0]] + answers.sum(1)
  # What is short of a whole bin is the shortest row, again.
  spare = np.full(-len(index) % own, np.argmin(sizes))
  of = np.append(np.arange(len(index)), spare)
  bins = packing.deal(sizes[of], len(of) // own)  # of places in `of`
  length = packing.up(tokens_lib.longest(lengths[index], m.context))
  room = packing.largest([
      packing.need(np.int64(rows.start)[index[of[one], 0]],
                   np.int64(answers[of[one]]), length) for one in bins])
  devices = sharding.parts(mesh, "batch")
  calls = np.resize(bins, (-(-len(bins) // devices), devices, own))
  fn, waiting = _call(producer, m, chunk), []
  out = np.zeros((len(of), each), np.float32)

  def put(call):
    def dense(places):
      return jax.tree.map(lambda *x: np.stack(x), *(
          packing.pack(room, rows, index[one], np.zeros_like(index[one]),
                       None if ids is None else [ids[i] for i in one])
          for one in of[call[places]]))

    flat = of[call.reshape(-1)]
    return (sharding.put_rows(mesh, (devices,), dense, "batch"),
            sharding.put_rows(mesh, flat.shape,
                              lambda places: answers[flat[places], :, None],
                              "batch"))

  def collect(call, result, tick):
    out[call.reshape(-1)] = sharding.fetch(result)
    tick(call.size)

  with progress.bar(label, calls.size) as tick:
    for call in calls:
      waiting.append((call, fn(params, *put(call))))
      if len(waiting) > 2:  # keep the device busy, the memory bounded
        collect(*waiting.pop(0), tick)
    for call, result in waiting:
      collect(call, result, tick)
  out = out[:len(index)]
  bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
  if len(bad):
    # What is not finite spreads to the rows packed beside it. Padded rows keep
    # it to themselves: this names them, and raises.
    out[bad] = embed.score_rows(
        mesh, params, m, tokens_lib.take(rows, index[bad].reshape(-1)),
        tile=tile, chunk=chunk, label=label,
        ids=None if ids is None else [ids[i] for i in bad]
    ).logp.reshape(len(bad), each)
  return out.reshape(n, r), counts
