"""Log-probabilities of weights that do not change, once, ahead of training.

In the layout that training has: a prompt is computed once for all its answers
and hardly anything is padding. Padded rows go through `passes.score_rows`.
Where products are narrower than float32 a row's sum depends on what is
computed with it: `logps_as_trained` runs the very batches of the training.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.core import progress, sharding
from jaxalign.data import tokens
from jaxalign.embed import passes
from jaxalign.embed.passes import PassOptions
from jaxalign.model import decoder
from jaxalign.train import online, packing
from jaxalign.train.batch import Batch, Logps
from jaxalign.train.feed import Batching, Feed, MismatchedRows, TrainRows
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.packed_shapes import common_shape, needed_shape, round_up


class Reference(NamedTuple):
  """Weights that do not change, and how they are run."""

  mesh: Any  # the current one
  params: decoder.Params  # on the mesh
  model: decoder.ModelConfig
  tile: int  # responses a device runs at once
  chunk: int  # positions of the head at once
  producer: str = "chunked"  # a key of PRODUCERS, for the packed layouts
  label: str = "ref_logps"  # what the progress bar says

  def score(self, rows: tokens.TokenRows, ids: Any = None):
    """`passes.score_rows`, which names the `ids` of what is not finite."""
    how = PassOptions(self.tile, self.chunk, label=self.label, ids=ids)
    return passes.score_rows(self.mesh, self.params, self.model, rows, how)


@functools.lru_cache(maxsize=8)
def _sums(producer, m, chunk):
  """Jitted `(params, Packed, counts) -> [b, R]` sums."""
  fn = PRODUCERS[producer](m, chunk)
  return jax.jit(lambda *batch: fn(*batch).sum)


def reference_logps(
  reference: Reference,
  rows: tokens.TokenRows,
  index: np.ndarray,
  layout: str,
  ids: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
  """(sums [M, R] nats, counts [M, R]) of every response, float32.

  Rows are dealt by length to bins of `tile` responses, a bin to each device a
  call, so bins do not depend on the mesh.

  Args:
    reference: the weights.
    rows: tokenized rows.
    index: [M, R] int, which of them each response is.
    layout: a key of `feed.LAYOUTS`.
    ids: [M] record ids, to name in an error.

  Raises:
    NumericError: a sum that is not finite; names the rows.
    DataError: responses of one row that have different prompts, and a layout
      that shares them.
  """
  shape = index.shape
  if layout == "padded":
    found = reference.score(tokens.take_rows(rows, index.reshape(-1)), ids)
    return found.logp.reshape(shape), found.count.reshape(shape)
  counts = np.float32(tokens.row_lengths(rows) - rows.start)[index]
  if layout == "packed_apart":
    index = index.reshape(-1, 1)
    ids = None if ids is None else np.repeat(ids, shape[1])
  out = _packed_sums(reference, rows, index, ids)
  out = _finite(reference, out, rows, index, ids)
  return out.reshape(shape), counts


def _packed_sums(reference, rows, index, ids):
  """[n, R] sums of packed rows, finite or not."""
  mesh, params, m, tile, chunk, producer, label = reference
  n, each = index.shape
  own = min(max(1, tile // each), n)
  start, lengths = np.int64(rows.start), tokens.row_lengths(rows)
  answers = (lengths - start)[index]
  sizes = start[index[:, 0]] + answers.sum(1)
  # What is short of a whole bin is the shortest row, again.
  of = np.append(np.arange(n), np.full(-n % own, np.argmin(sizes)))
  bins = packing.deal(sizes[of], len(of) // own)  # of places in `of`
  length = round_up(tokens.longest_row(lengths[index], m.context))
  need = lambda b: needed_shape(start[index[b, 0]], answers[b], length)
  room = common_shape(need(of[one]) for one in bins)
  devices = sharding.parts(mesh, "batch")
  calls = np.resize(bins, (-(-len(bins) // devices), devices, own))
  out = np.zeros((len(of), each), np.float32)

  def dense(one):
    named = None if ids is None else [ids[i] for i in one]
    least = np.zeros_like(index[one])  # no prefix is read
    return packing.pack(room, rows, index[one], least, named)

  def put(call):
    flat = of[call.reshape(-1)]
    make = lambda places: packing.stack(map(dense, of[call[places]]))
    count = lambda places: answers.astype(np.int32)[flat[places], :, None]
    return (
      sharding.put_rows(mesh, (devices,), make, "batch"),
      sharding.put_rows(mesh, flat.shape, count, "batch"),
    )

  def collect(call, result, tick):
    out[call.reshape(-1)] = sharding.fetch(result)
    tick(call.size)

  fn, waiting = _sums(producer, m, chunk), []
  with progress.bar(label, calls.size) as tick:
    for call in calls:
      waiting.append((call, fn(params, *put(call))))
      if len(waiting) > 2:  # keep the device busy, the memory bounded
        collect(*waiting.pop(0), tick)
    for call, result in waiting:
      collect(call, result, tick)
  return out[:n]


def _finite(reference, out, rows, index, ids=None):
  """Sums [n, R], all finite; else NumericError names the rows.

  What is not finite spreads to the rows packed with it. Padded rows keep it
  to themselves: this names them, and raises.
  """
  bad = np.flatnonzero(~np.isfinite(out).all(axis=1))
  if len(bad):
    ids = None if ids is None else [ids[i] for i in bad]
    taken = tokens.take_rows(rows, index[bad].reshape(-1))
    out[bad] = reference.score(taken, ids).logp.reshape(len(bad), -1)
  return out


def logps_as_trained(
  reference: Reference,
  rows: TrainRows,
  batching: Batching,
  other: tokens.TokenRows | None = None,
) -> tuple[Logps, np.ndarray | None]:
  """The sums of every row in the first batch of its training that has it.

  In bfloat16 the same row in another batch has another sum, of 100 nats by
  up to one: other shapes, other roundings. A policy of the same weights has
  the very sums of its own batch, bit for bit.

  Args:
    reference: the weights; `tile` is of the rows that are not finite.
    rows: what is trained on; the reference's sums of it are not read.
    batching: as of the training.
    other: its mismatched rows, updates * B.

  Returns:
    Logps [M, R] with the sums of common prefixes, and those of mismatched
    rows, [updates * B] or None.

  Raises:
    NumericError: a sum that is not finite; names the rows.
  """
  n, r = rows.row_of.shape
  mesh, params, m, _, chunk, producer, label = reference
  # A row's number stands where its sum will: it says where the row went.
  number = np.arange(n, dtype=np.int32)
  rows = rows._replace(
    ref_sum=np.repeat(number[:, None], r, axis=1),
    columns=dict(common_prefix=np.zeros((n, r), np.float32)),
  )
  fill = online.make_fill(
    PRODUCERS[producer](m, chunk), decoder.compiler_options(m)
  )
  total, prefix = np.full((2, n, r), np.nan, np.float32)
  steps, others, other_sums = -(-n // batching.batch), 0, None
  if other is not None:
    other_sums = np.zeros(len(other.start), np.float32)
    others = len(other_sums) // batching.batch
  with progress.bar(label, steps + others, "batches") as tick:
    feed = Feed(mesh, rows, batching)
    for step in range(steps):
      batch = feed.batch_at(step)
      where = sharding.fetch(batch.ref.sum).reshape(-1, r)[:, 0]
      fresh = np.isnan(total[where, 0])
      ref = fill(params, batch).ref
      for kept, x in ((total, ref.sum), (prefix, ref.common_prefix)):
        kept[where[fresh]] = sharding.fetch(x).reshape(-1, r)[fresh]
      tick(1)
    if others:
      number = np.arange(len(other_sums), dtype=np.int32)
      rows = rows._replace(mismatched=MismatchedRows(other, number))
      feed = Feed(mesh, rows, batching)
    for step in range(others):
      kl = feed.batch_at(step).mismatched
      ref = fill(params, Batch(kl.tokens, kl.mask, Logps(kl.ref_sum))).ref
      where = sharding.fetch(kl.ref_sum).reshape(-1)
      other_sums[where] = sharding.fetch(ref.sum).reshape(-1)
      tick(1)
  total = _finite(reference, total, rows.tokens, rows.row_of, rows.ids)
  if other is not None:
    index = np.arange(len(other_sums))[:, None]
    other_sums = _finite(reference, other_sums[:, None], other, index)[:, 0]
  return Logps(total, rows.ref_count, prefix), other_sums
