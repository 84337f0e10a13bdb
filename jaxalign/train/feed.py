"""Batches on the mesh: a pure function of the step over tokenized rows."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.data import batches
from jaxalign.data import tokens as tokens_lib
from jaxalign.model import decoder
from jaxalign.model.flops import decoder_flops, useful_flops
from jaxalign.train import packing
from jaxalign.train.batch import Batch, Logps, MismatchedBatch

SHAPES = 4  # packed shapes that a run compiles, where its data lets it
LOOKED = 256  # steps at most that they are chosen from


class MismatchedRows(NamedTuple):
  """KTO's prompt-and-other-answer rows, all steps end to end."""

  tokens: tokens_lib.TokenRows  # updates * B rows
  ref_sum: np.ndarray  # [updates * B] float32 nats


class TrainRows(NamedTuple):
  """M training rows of R responses each."""

  ids: list[str]  # [M]
  tokens: tokens_lib.TokenRows  # n >= M * R tokenized rows
  row_of: np.ndarray  # [M, R] int: which tokenized row a response is
  ref_sum: np.ndarray  # [M, R] float32 nats of the reference
  ref_count: np.ndarray  # [M, R] float32
  label: np.ndarray | None = None  # [M] bool, unpaired feedback
  # For the losses that read them, by name: see `row_columns.COLUMNS`.
  columns: dict[str, np.ndarray] = {}
  mismatched: MismatchedRows | None = None


class Batching(NamedTuple):
  """How rows become batches."""

  batch: int  # rows of an update, over all devices
  seed: int  # of their order
  accumulation: int = 1  # micro-batches that an update is cut into
  context: int = 0  # the longest row that the model takes, in tokens
  layout: str = "padded"  # a key of LAYOUTS

  def rows_at(self, step: int, n: int) -> np.ndarray:
    """[batch] row numbers of a step, of n."""
    return batches.rows_at(step, n, self.batch, self.seed)

  def mismatched_at(self, step: int) -> np.ndarray:
    """[batch] numbers of a step's mismatched rows."""
    return np.arange(step * self.batch, (step + 1) * self.batch)


def check_divides(batch: int, accumulation: int, knob: str) -> None:
  """Raises ConfigError where a batch does not divide into micro-batches."""
  if batch < 1 or accumulation < 1 or batch % accumulation:
    raise ConfigError(
      f"{knob}.batch_size={batch} does not divide into "
      f"{knob}.accumulation={accumulation} micro-batches"
    )


def check_batch(batch: int, accumulation: int, mesh: Any, knob: str) -> None:
  """Raises ConfigError where a batch does not divide over mesh and steps."""
  check_divides(batch, accumulation, knob)
  parts = sharding.parts(mesh, "batch")
  if (batch // accumulation) % parts:
    raise ConfigError(
      f"a micro-batch of {batch // accumulation} rows ({knob}.batch_size="
      f"{batch}, {knob}.accumulation={accumulation}) does not divide over "
      f"fsdp={parts}; change one of them or config.mesh"
    )


def make_mismatched(
  rows: TrainRows, batching: Batching, updates: int
) -> tokens_lib.TokenRows:
  """The mismatched rows of every step, known in advance: [updates * B]."""
  n = len(rows.ids)
  own = [batching.rows_at(step, n) for step in range(updates)]
  other = [batches.rotation(x, n) for x in own]
  prompts, answers = (rows.row_of[np.concatenate(x), 0] for x in (own, other))
  return batches.mismatched(rows.tokens, prompts, answers, batching.context)


class BatchLayout(NamedTuple):
  """How the tokens of a batch lie; rows are given as index [B, R]."""

  order: Callable[[np.ndarray], np.ndarray]  # index -> [B], as they stand
  put: Callable[..., tuple[Any, Any]]  # (ordered index, names) -> tokens, mask


def padded(
  mesh: Any,
  rows: tokens_lib.TokenRows,
  batching: Batching,
  known: list[np.ndarray],
) -> BatchLayout:
  """Padded on the right, to the bucket of the batch's longest row."""
  del known
  lengths = tokens_lib.row_lengths(rows)
  longest = tokens_lib.longest_row(lengths, batching.context)

  def put(index, names=None):
    del names
    # Every process pads to the same bucket, from the lengths of all rows.
    size = tokens_lib.padded_length(int(lengths[index].max()), longest)

    def make(places):
      tokens, mask = tokens_lib.pad_rows(rows, index[places].reshape(-1), size)
      cut = lambda x: x.reshape(len(places), -1, size)
      return cut(tokens), cut(mask)

    return _put(mesh, batching.accumulation, len(index), make)

  return BatchLayout(lambda index: np.arange(len(index)), put)


def packed(
  mesh: Any,
  rows: tokens_lib.TokenRows,
  batching: Batching,
  known: list[np.ndarray],
  share: bool = True,
) -> BatchLayout:
  """Packed, see `train.packing`: a `Packed` for tokens, counts for a mask.

  Rows are dealt to micro-batches and devices by length, so they stand in
  another order. Shapes are chosen from the `known` steps; a later one that no
  shape holds has a larger one of its own. Unless they `share` it, every
  response has a prompt of its own.
  """
  lengths, start = (
    tokens_lib.row_lengths(rows),
    np.asarray(rows.start, np.int64),
  )
  answers = lengths - start
  devices = sharding.parts(mesh, "batch")
  bins = batching.accumulation * devices
  longest = packing.up(tokens_lib.longest_row(lengths, batching.context))

  def order(index):
    sizes = lengths[index].sum(1)
    if share:
      sizes = start[index[:, 0]] + answers[index].sum(1)
    return packing.deal(sizes, bins).reshape(-1)

  def split(index):  # of every device and micro-batch
    return np.split(index if share else index.reshape(-1, 1), bins)

  def needed(index):
    need = lambda part: packing.need(start[part[:, 0]], answers[part], longest)
    return packing.largest([need(part) for part in split(index)])

  shapes = packing.choose([needed(i[order(i)]) for i in known], SHAPES)

  def shape_of(index):
    need = needed(index)
    found = [s for s in shapes if packing.holds(s, need)]
    return found[0] if found else packing.larger(need)

  def put(index, names=None):
    shape, m = shape_of(index), len(index) // bins
    counts = answers[index].astype(np.int32)
    least = np.broadcast_to(counts.min(1, keepdims=True), counts.shape)
    own, kept = split(index), split(least)

    def dense(k):
      named = names and names[k * m : (k + 1) * m]
      return packing.pack(shape, rows, own[k], kept[k], named)

    make = lambda places: jax.tree.map(
      lambda *x: np.stack(x), *(dense(k) for k in places)
    )
    count = lambda places: counts[places, :, None]
    return (
      _put(mesh, batching.accumulation, bins, make),
      _put(mesh, batching.accumulation, len(index), count),
    )

  return BatchLayout(order, put)


def _put(mesh, accumulation, n, make):
  """n rows on the mesh, [A, n / A, ...]; `make(places)` gives some of them."""
  shape = accumulation, n // accumulation
  return sharding.put_rows(mesh, shape, make, None, "batch")


LAYOUTS = {
  "packed": packed,
  "padded": padded,
  "packed_apart": functools.partial(packed, share=False),
}


class Feed:
  """The batches of a training, each a pure function of its step.

  Few shapes are compiled, whatever the layout. A process reads the tokens of
  its own devices' rows alone. A class because its layouts look at many steps
  once, to choose shapes from.
  """

  def __init__(
    self,
    mesh: Any,
    rows: TrainRows,
    batching: Batching,
    rate: Callable[[int], float] = lambda step: 0.0,
  ):
    """`rate` gives the learning rate of a step."""
    self.mesh, self.rows, self.batching, self.rate = mesh, rows, batching, rate
    self.lengths = tokens_lib.row_lengths(rows.tokens)
    make = functools.partial(LAYOUTS[batching.layout], mesh)
    steps = range(min(LOOKED, -(-2 * len(rows.ids) // batching.batch)))
    known = [self.index_at(s) for s in steps]
    self._layout, self._other = make(rows.tokens, batching, known), None
    if rows.mismatched is not None:
      # One row's prompt and another's answer may be longer than any row.
      tokens, sums = rows.mismatched
      steps = range(min(LOOKED, len(sums) // batching.batch))
      known = [batching.mismatched_at(s)[:, None] for s in steps]
      self._other = make(tokens, batching, known)

  def rows_at(self, step: int) -> np.ndarray:
    """[B] row numbers of a step."""
    return self.batching.rows_at(step, len(self.rows.ids))

  def index_at(self, step: int) -> np.ndarray:
    """[B, R] tokenized rows of a step."""
    return self.rows.row_of[self.rows_at(step)]

  def ids_at(self, step: int) -> list[str]:
    """Record ids of a step."""
    return [self.rows.ids[i] for i in self.rows_at(step)]

  def tokens_at(self, step: int) -> int:
    """Tokens of a step, a pair's prompt counted with each of its answers."""
    return int(self.lengths[self.index_at(step)].sum())

  def distinct_at(self, step: int) -> int:
    """Tokens of a step, each row's prompt counted once, as packed rows do."""
    index, start = self.index_at(step), np.int64(self.rows.tokens.start)
    answers = (self.lengths - start)[index].sum()
    return int(start[index[:, 0]].sum() + answers)

  def batch_at(self, step: int) -> Batch:
    """The batch of a step, on the mesh."""
    rows, own = self.rows, self.rows_at(step)
    own = own[self._layout.order(rows.row_of[own])]
    known = dict(sum=rows.ref_sum, count=rows.ref_count, label=rows.label)
    known = {n: x for n, x in known.items() if x is not None} | rows.columns
    found = self._put(lambda at: {n: x[own[at]] for n, x in known.items()})
    names = [rows.ids[i] for i in own]
    tokens, mask = self._layout.put(rows.row_of[own], names)
    prefix = found.pop("common_prefix", None)
    ref = Logps(found.pop("sum"), found.pop("count"), prefix)
    label, lr = found.pop("label", None), np.float32(self.rate(step))
    other = self._mismatched(step)
    return Batch(tokens, mask, ref, label, found, other, lr)

  def _mismatched(self, step):
    if self._other is None:
      return None
    where = self.batching.mismatched_at(step)[:, None]
    where = where[self._other.order(where)]
    tokens, mask = self._other.put(where)
    sums = self.rows.mismatched.ref_sum
    sums = self._put(lambda places: sums[where[places]])
    return MismatchedBatch(tokens, mask, sums)

  def _put(self, make):
    b = self.batching
    return _put(self.mesh, b.accumulation, b.batch, make)


def passes(
  m: decoder.ModelConfig, ahead: bool = False, online: bool = False
) -> tuple[int, int]:
  """What a trained row costs, in forward passes: of products with weights, and
  of attention's.

  Its own, one for the gradients of the activations and one for those of the
  weights; frozen weights have none, but both operands of attention move. The
  adapters' own products, about r / D of a pass, are not counted. `ahead`: a
  pass more, see `statistics.needs_batch_logps`; `online`: one more, the
  reference's, see `train.online`.
  """
  more = ahead + online
  return (2 if m.lora else 3) + more, 3 + more


def useful_cost(
  m: decoder.ModelConfig,
  rows: TrainRows,
  batching: Batching,
  step: int,
  ahead: bool = False,
  online: bool = False,
) -> int:
  """Operations that an update cannot do without.

  `useful_flops` of its rows, `passes` times, and of the passes beside them
  as in `training_cost`; recomputation is not counted.
  """

  def count(token_rows, index, passes=(1, 1)):
    start = np.asarray(token_rows.start, np.int64)
    answers = tokens_lib.row_lengths(token_rows) - start
    return useful_flops(m, start[index[:, 0]], answers[index], passes)

  own = rows.row_of[batching.rows_at(step, len(rows.ids))]
  total = count(rows.tokens, own, passes(m, ahead, online))
  if rows.mismatched is not None:
    other = batching.mismatched_at(step)[:, None]
    total += (1 + online) * count(rows.mismatched.tokens, other)
  return total


def training_cost(
  m: decoder.ModelConfig,
  rows: TrainRows,
  batching: Batching,
  updates: int,
  ahead: bool = False,
  online: bool = False,
) -> tuple[int, int]:
  """(flops, tokens) of a training run: `passes` a row.

  A mismatched row costs one forward, `ahead` one more of every row, `online`
  one more of every row and mismatched row; padding and recomputation are not
  counted. Of the mismatched rows, those of all steps end to end, the first
  `updates * batch` ran.
  """
  seen = [batching.rows_at(s, len(rows.ids)) for s in range(updates)]
  lengths = tokens_lib.row_lengths(rows.tokens)
  ran = [(lengths[rows.row_of[np.concatenate(seen)]], passes(m, ahead, online))]
  if rows.mismatched is not None:
    other = tokens_lib.row_lengths(rows.mismatched.tokens)
    ran.append((other[: updates * batching.batch], (1 + online,) * 2))
  total = tokens = 0
  for sizes, times in ran:
    tokens += int(sizes.sum())
    for size, count in zip(*np.unique(sizes, return_counts=True)):
      total += int(count) * decoder_flops(m, int(size), passes=times)
  return total, tokens
