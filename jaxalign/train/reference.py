"""Log-probabilities of weights that do not change, once, ahead of training.

In the layout that training has: a prompt is computed once for all its answers
and hardly anything is padding. Padded rows go through `embed.score_rows`.
Where products are narrower than float32 a row's sum depends on what is
computed beside it: `as_trained` runs the very batches of the training.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.core import progress, sharding
from jaxalign.data import tokens as tokens_lib
from jaxalign.embed import passes as embed
from jaxalign.model import decoder
from jaxalign.train import feed, online
from jaxalign.train import layout as packing
from jaxalign.train.logps import PRODUCERS


@functools.lru_cache(maxsize=8)
def _call(producer: str, m: decoder.ModelConfig, chunk: int):
  """Jitted `(params, Packed, counts) -> [b, R]` sums."""
  fn = PRODUCERS[producer](m, chunk)
  return jax.jit(lambda *batch: fn(*batch).sum)


def logps(
  mesh: Any,
  params: decoder.Params,
  m: decoder.ModelConfig,
  rows: tokens_lib.TokenRows,
  index: np.ndarray,
  *,
  layout: str,
  tile: int,
  chunk: int,
  producer: str = "chunked",
  label: str = "ref_logps",
  ids: Any = None,
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
      mesh,
      params,
      m,
      tokens_lib.take(rows, index.reshape(-1)),
      tile=tile,
      chunk=chunk,
      label=label,
      ids=ids,
    )
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
  room = packing.largest(
    [
      packing.need(
        np.int64(rows.start)[index[of[one], 0]],
        np.int64(answers[of[one]]),
        length,
      )
      for one in bins
    ]
  )
  devices = sharding.parts(mesh, "batch")
  calls = np.resize(bins, (-(-len(bins) // devices), devices, own))
  fn, waiting = _call(producer, m, chunk), []
  out = np.zeros((len(of), each), np.float32)

  def put(call):
    def dense(places):
      return jax.tree.map(
        lambda *x: np.stack(x),
        *(
          packing.pack(
            room,
            rows,
            index[one],
            np.zeros_like(index[one]),
            None if ids is None else [ids[i] for i in one],
          )
          for one in of[call[places]]
        ),
      )

    flat = of[call.reshape(-1)]
    return (
      sharding.put_rows(mesh, (devices,), dense, "batch"),
      sharding.put_rows(
        mesh, flat.shape, lambda places: answers[flat[places], :, None], "batch"
      ),
    )

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
  out = _checked(
    out[: len(index)],
    mesh,
    params,
    m,
    rows,
    index,
    tile=tile,
    chunk=chunk,
    label=label,
    ids=ids,
  )
  return out.reshape(n, r), counts


def _checked(
  out: np.ndarray,
  mesh: Any,
  params: decoder.Params,
  m: decoder.ModelConfig,
  rows: tokens_lib.TokenRows,
  index: np.ndarray,
  *,
  ids: Any,
  **how: Any,
) -> np.ndarray:
  """Sums [n, R], all finite; else NumericError names the rows.

  What is not finite spreads to the rows packed beside it. Padded rows keep it
  to themselves: this names them, and raises.
  """
  bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
  if len(bad):
    out[bad] = embed.score_rows(
      mesh,
      params,
      m,
      tokens_lib.take(rows, index[bad].reshape(-1)),
      ids=None if ids is None else [ids[i] for i in bad],
      **how,
    ).logp.reshape(len(bad), -1)
  return out


class Sums(NamedTuple):
  """What a frozen reference says of the rows of a training."""

  ref_sum: np.ndarray  # [M, R] float32 nats
  ref_common_prefix: np.ndarray  # [M, R] float32 nats
  mismatched: np.ndarray | None  # [updates * B] float32 nats


def as_trained(
  mesh: Any,
  params: decoder.Params,
  m: decoder.ModelConfig,
  rows: feed.Rows,
  *,
  batch: int,
  accumulation: int,
  seed: int,
  layout: str,
  producer: str,
  tile: int,
  chunk: int,
  mismatched: tokens_lib.TokenRows | None = None,
  label: str = "ref_logps",
) -> Sums:
  """The sums of every row in the first batch of its training that has it.

  In bfloat16 the same row in another batch has another sum, of 100 nats by
  up to one: other shapes, other roundings. A policy of the same weights has
  the very sums of its own batch, bit for bit.

  Args:
    mesh: the current mesh.
    params: on the mesh.
    m: the model's sizes.
    rows: what is trained on; the reference's sums of it are not read.
    batch, accumulation, seed, layout: as of `feed.make_feed`.
    producer: a key of PRODUCERS.
    tile: rows a device runs at once where one of them is not finite.
    chunk: positions of the head at once.
    mismatched: the mismatched rows of all steps, or None.
    label: what the progress bar says.

  Raises:
    NumericError: a sum that is not finite; names the rows.
  """
  n, r = rows.row_of.shape
  number = np.arange(n, dtype=np.int32)
  # A row's number stands where its sum will: it says where the row went.
  rows = rows._replace(
    ref_sum=np.repeat(number[:, None], r, axis=1),
    ref_common_prefix=np.zeros((n, r), np.float32),
  )
  feed_of = functools.partial(
    feed.make_feed,
    mesh,
    rows,
    batch=batch,
    accumulation=accumulation,
    seed=seed,
    context=m.context,
    rate=lambda step: 0.0,
    layout=layout,
  )
  fill = online.make_fill(
    PRODUCERS[producer](m, chunk), decoder.compiler_options(m)
  )
  out = np.full((2, n, r), np.nan, np.float32)
  steps, others, beside = -(-n // batch), 0, None
  if mismatched is not None:
    beside = np.zeros(len(mismatched.start), np.float32)
    others = len(beside) // batch
  with progress.bar(label, steps + others, "batches") as tick:
    batch_at = feed_of()[0]
    for step in range(steps):
      one = batch_at(step)
      where = sharding.fetch(one["ref_sum"]).reshape(-1, r)[:, 0]
      fresh = np.isnan(out[0, where, 0])
      found = fill(
        params,
        {k: one[k] for k in ("tokens", "mask", "ref_sum", "ref_common_prefix")},
      )
      for kept, name in zip(out, ("ref_sum", "ref_common_prefix")):
        kept[where[fresh]] = sharding.fetch(found[name]).reshape(-1, r)[fresh]
      tick(1)
    if others:
      batch_at = feed_of(
        mismatched=feed.Mismatched(
          mismatched, np.arange(len(beside), dtype=np.int32)
        )
      )[0]
    for step in range(others):
      one = batch_at(step)
      found = fill(
        params,
        dict(
          tokens=one["kl_tokens"],
          mask=one["kl_mask"],
          ref_sum=one["kl_ref_sum"],
        ),
      )
      where = sharding.fetch(one["kl_ref_sum"]).reshape(-1)
      beside[where] = sharding.fetch(found["ref_sum"]).reshape(-1)
      tick(1)
  how = dict(tile=tile, chunk=chunk, label=label)
  total = _checked(
    out[0], mesh, params, m, rows.tokens, rows.row_of, ids=rows.ids, **how
  )
  if mismatched is not None:
    beside = _checked(
      beside[:, None],
      mesh,
      params,
      m,
      mismatched,
      np.arange(len(beside))[:, None],
      ids=None,
      **how,
    )[:, 0]
  return Sums(total, out[1], beside)
