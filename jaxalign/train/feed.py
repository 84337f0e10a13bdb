"""Batches on the mesh: a pure function of the step over tokenized rows."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.data import batches
from jaxalign.data import tokens as tokens_lib
from jaxalign.train import packing
from jaxalign.train.batch import Batch, Logps, MismatchedBatch
from jaxalign.train.packed_shapes import (
  choose_shapes,
  common_shape,
  larger_shape,
  needed_shape,
  round_up,
  shape_holds,
)

SHAPES = 4  # packed shapes that a run compiles, where its data lets it
LOOKED = 256  # steps at most that they are chosen from


class MismatchedRows(NamedTuple):
  """KTO's rows of one prompt and another's answer, all steps end to end."""

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


def check_batch(batch: int, accumulation: int, mesh: Any, knob: str) -> None:
  """Checks that a batch divides into micro-batches, and these over a mesh.

  Args:
    batch: rows of an update.
    accumulation: micro-batches of an update.
    mesh: the mesh; None: not known yet.
    knob: the section of the config, for the message.

  Raises:
    ConfigError: it does not.
  """
  if batch < 1 or accumulation < 1 or batch % accumulation:
    raise ConfigError(
      f"{knob}.batch_size={batch} does not divide into "
      f"{knob}.accumulation={accumulation} micro-batches"
    )
  devices = sharding.parts(mesh, "batch") if mesh else 1
  if (batch // accumulation) % devices:
    raise ConfigError(
      f"a micro-batch of {batch // accumulation} rows ({knob}.batch_size="
      f"{batch}, {knob}.accumulation={accumulation}) does not divide over "
      f"fsdp={devices}; change one of them or config.mesh"
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

  def put(index, names):
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
  lengths = tokens_lib.row_lengths(rows)
  start = np.asarray(rows.start, np.int64)
  answers = lengths - start
  bins = batching.accumulation * sharding.parts(mesh, "batch")
  longest = round_up(tokens_lib.longest_row(lengths, batching.context))
  # The rows of every device and micro-batch.
  split = lambda x: np.split(x if share else x.reshape(-1, 1), bins)

  def order(index):
    prompts = start[index[:, :1] if share else index]
    sizes = answers[index].sum(1) + prompts.sum(1)
    return packing.deal(sizes, bins).reshape(-1)

  def needed(index):
    of = lambda x: needed_shape(start[x[:, 0]], answers[x], longest)
    return common_shape(map(of, split(index)))

  chosen = choose_shapes([needed(i[order(i)]) for i in known], SHAPES)

  def put(index, names):
    need, m = needed(index), len(index) // bins
    fitting = (s for s in chosen if shape_holds(s, need))
    shape = next(fitting, None) or larger_shape(need)
    counts = answers[index].astype(np.int32)
    least = np.broadcast_to(counts.min(1, keepdims=True), counts.shape)
    own, least = split(index), split(least)

    def dense(k):
      named = names and names[k * m : (k + 1) * m]
      return packing.pack(shape, rows, own[k], least[k], named)

    count = lambda places: counts[places, :, None]
    stack = lambda places: packing.stack(map(dense, places))
    return (
      _put(mesh, batching.accumulation, bins, stack),
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
    tokens, mask = self._other.put(where, None)
    sums = self.rows.mismatched.ref_sum
    sums = self._put(lambda places: sums[where[places]])
    return MismatchedBatch(tokens, mask, sums)

  def _put(self, make):
    b = self.batching
    return _put(self.mesh, b.accumulation, b.batch, make)
