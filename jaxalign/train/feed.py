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
from jaxalign.train import layout as packing

SHAPES = 4  # packed shapes that a run compiles, where its data lets it
LOOKED = 256  # steps at most that they are chosen from


class Rows(NamedTuple):
  """M training rows of R responses each."""

  ids: list[str]  # [M]
  tokens: tokens_lib.TokenRows  # n >= M * R tokenized rows
  row_of: np.ndarray  # [M, R] int: which tokenized row a response is
  ref_sum: np.ndarray  # [M, R] float32 nats of the reference
  ref_count: np.ndarray  # [M, R] float32
  label: np.ndarray | None = None  # [M] bool, unpaired rows
  # For the losses that read them, see `jaxalign.train.references`:
  ref_common_prefix: np.ndarray | None = None  # [M, R] float32 nats
  weights: np.ndarray | None = None  # [M] float32


class Mismatched(NamedTuple):
  """KTO's prompt-and-other-answer rows, all steps end to end."""

  tokens: tokens_lib.TokenRows  # updates * B rows
  ref_sum: np.ndarray  # [updates * B] float32 nats


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
  rows: Rows, *, updates: int, batch: int, seed: int, context: int
) -> tokens_lib.TokenRows:
  """The mismatched rows of every step, known in advance: [updates * B]."""
  prompts, answers = [], []
  for step in range(updates):
    own = batches.rows_at(step, len(rows.ids), batch, seed)
    prompts.append(rows.row_of[own, 0])
    answers.append(rows.row_of[batches.rotation(own, len(rows.ids)), 0])
  return batches.mismatched(
    rows.tokens, np.concatenate(prompts), np.concatenate(answers), context
  )


class Layout(NamedTuple):
  """How the tokens of a batch lie; rows are given as index [B, R]."""

  order: Callable[[np.ndarray], np.ndarray]  # index -> [B], as they stand
  put: Callable[..., tuple[Any, Any]]  # (ordered index, names) -> tokens, mask


def padded(
  mesh: Any,
  rows: tokens_lib.TokenRows,
  accumulation: int,
  context: int,
  known: list[np.ndarray],
) -> Layout:
  """Padded on the right, to the bucket of the batch's longest row."""
  del known
  lengths = tokens_lib.lengths(rows)
  longest = tokens_lib.longest(lengths, context)

  def put(index, names=None):
    del names
    # Every process pads to the same bucket, from the lengths of all rows.
    size = tokens_lib.bucket(int(lengths[index].max()), longest)

    def make(places):
      tokens, mask = tokens_lib.pad(rows, index[places].reshape(-1), size)
      cut = lambda x: x.reshape(len(places), -1, size)
      return cut(tokens), cut(mask)

    return sharding.put_rows(
      mesh, (accumulation, len(index) // accumulation), make, None, "batch"
    )

  return Layout(lambda index: np.arange(len(index)), put)


def packed(
  mesh: Any,
  rows: tokens_lib.TokenRows,
  accumulation: int,
  context: int,
  known: list[np.ndarray],
  share: bool = True,
) -> Layout:
  """Packed, see `train.layout`: a `Packed` for tokens and counts for a mask.

  Rows are dealt to micro-batches and devices by length, so they stand in
  another order. Shapes are chosen from the `known` steps; a later one that no
  shape holds has a larger one of its own. Unless they `share` it, every
  response has a prompt of its own.
  """
  lengths, start = tokens_lib.lengths(rows), np.asarray(rows.start, np.int64)
  devices = sharding.parts(mesh, "batch")
  bins = accumulation * devices
  length = packing.up(tokens_lib.longest(lengths, context))

  def sizes(index):
    """[B] tokens of every row."""
    if not share:
      return lengths[index].sum(1)
    return start[index[:, 0]] + (lengths - start)[index].sum(1)

  def order(index):
    return packing.deal(sizes(index), bins).reshape(-1)

  def parts_of(index):  # of every device and micro-batch
    return np.split(index if share else index.reshape(-1, 1), bins)

  def needed(index):
    return packing.largest(
      [
        packing.need(start[part[:, 0]], (lengths - start)[part], length)
        for part in parts_of(index)
      ]
    )

  shapes = packing.choose([needed(i[order(i)]) for i in known], SHAPES)

  def shape_of(index):
    need = needed(index)
    found = [s for s in shapes if packing.holds(s, need)]
    return found[0] if found else packing.larger(need)

  def put(index, names=None):
    shape, m = shape_of(index), len(index) // bins
    counts = (lengths - start)[index].astype(np.int32)
    least = np.broadcast_to(counts.min(1, keepdims=True), counts.shape)

    def make(places):
      own, kept = parts_of(index), parts_of(least)
      return jax.tree.map(
        lambda *x: np.stack(x),
        *(
          packing.pack(
            shape, rows, own[k], kept[k], names and names[k * m : (k + 1) * m]
          )
          for k in places
        ),
      )

    put_rows = lambda rows, make: sharding.put_rows(
      mesh, (accumulation, rows), make, None, "batch"
    )
    return (
      put_rows(devices, make),
      put_rows(
        len(index) // accumulation, lambda places: counts[places, :, None]
      ),
    )

  return Layout(order, put)


LAYOUTS = {
  "packed": packed,
  "padded": padded,
  "packed_apart": functools.partial(packed, share=False),
}


def make_feed(
  mesh: Any,
  rows: Rows,
  *,
  batch: int,
  accumulation: int,
  seed: int,
  context: int,
  rate: Callable[[int], float],
  mismatched: Mismatched | None = None,
  layout: str = "padded",
) -> tuple[Callable, Callable, Callable]:
  """Returns `batch_at(step)`, `ids_at(step)` and `tokens_at(step)`.

  Few shapes are compiled, whatever the layout, a key of LAYOUTS. A process
  reads the tokens of its own devices' rows alone. See
  `train.step.make_gradients` for the arrays of a batch; `rate` gives the
  learning rate of a step.
  """
  lengths = tokens_lib.lengths(rows.tokens)
  lay = LAYOUTS[layout]

  def rows_of(step):
    return batches.rows_at(step, len(rows.ids), batch, seed)

  def mismatched_of(step):
    return np.arange(step * batch, (step + 1) * batch)[:, None]

  steps = range(min(LOOKED, -(-2 * len(rows.ids) // batch)))
  main = lay(
    mesh,
    rows.tokens,
    accumulation,
    context,
    [rows.row_of[rows_of(s)] for s in steps],
  )
  if mismatched is not None:
    # One row's prompt and another's answer may be longer than any row.
    steps = range(min(LOOKED, len(mismatched.ref_sum) // batch))
    other = lay(
      mesh,
      mismatched.tokens,
      accumulation,
      context,
      [mismatched_of(s) for s in steps],
    )

  def batch_at(step):
    own = rows_of(step)
    own = own[main.order(rows.row_of[own])]

    def put(make):
      return sharding.put_rows(
        mesh, (accumulation, batch // accumulation), make, None, "batch"
      )

    out = put(
      lambda places: {
        n: x[own[places]]
        for n, x in (
          ("ref_sum", rows.ref_sum),
          ("ref_count", rows.ref_count),
          ("label", rows.label),
          ("weights", rows.weights),
          ("ref_common_prefix", rows.ref_common_prefix),
        )
        if x is not None
      }
    )
    out["tokens"], out["mask"] = main.put(
      rows.row_of[own], [rows.ids[i] for i in own]
    )
    if mismatched is not None:
      where = mismatched_of(step)
      where = where[other.order(where)]
      out["kl_tokens"], out["kl_mask"] = other.put(where)
      out["kl_ref_sum"] = put(lambda places: mismatched.ref_sum[where[places]])
    return out | dict(lr=np.float32(rate(step)))

  def ids_at(step):
    return [rows.ids[i] for i in rows_of(step)]

  def tokens_at(step):
    return int(lengths[rows.row_of[rows_of(step)]].sum())

  return batch_at, ids_at, tokens_at


def make_distinct(rows: Rows, *, batch: int, seed: int) -> Callable[[int], int]:
  """Returns `distinct_at(step)`: `tokens_at`, each row's prompt counted once.

  What packed rows compute; `tokens_at` counts a pair's prompt with each of its
  answers, as padded rows do.
  """
  lengths = tokens_lib.lengths(rows.tokens)
  start = np.asarray(rows.tokens.start, np.int64)

  def distinct_at(step):
    index = rows.row_of[batches.rows_at(step, len(rows.ids), batch, seed)]
    return int(start[index[:, 0]].sum() + (lengths - start)[index].sum())

  return distinct_at


def passes(
  m: decoder.ModelConfig, ahead: bool = False, online: bool = False
) -> tuple[int, int]:
  """What a trained row costs, in forward passes: of products with weights, and
  of attention's.

  Its own, one for the gradients of the activations and one for those of the
  weights; frozen weights have none, but both operands of attention move. The
  adapters' own products, about r / D of a pass, are not counted. `ahead`: a
  pass more, see `stats.needs_batch_logps`; `online`: the reference's too, see
  `train.online`.
  """
  more = ahead + online
  return (2 if m.lora else 3) + more, 3 + more


def make_useful(
  m: decoder.ModelConfig,
  rows: Rows,
  *,
  batch: int,
  seed: int,
  mismatched: Mismatched | None = None,
  ahead: bool = False,
  online: bool = False,
) -> Callable[[int], int]:
  """Returns `useful_at(step)`: flops that an update cannot do without.

  `useful_flops` of its rows, `passes` times, and of the passes beside them
  as in `training_cost`; recomputation is not counted.
  """

  def count(token_rows, index, passes=(1, 1)):
    start = np.asarray(token_rows.start, np.int64)
    answers = tokens_lib.lengths(token_rows) - start
    return useful_flops(m, start[index[:, 0]], answers[index], passes)

  def useful_at(step):
    own = batches.rows_at(step, len(rows.ids), batch, seed)
    total = count(rows.tokens, rows.row_of[own], passes(m, ahead, online))
    if mismatched is not None:
      total += (1 + online) * count(
        mismatched.tokens, np.arange(step * batch, (step + 1) * batch)[:, None]
      )
    return total

  return useful_at


def training_cost(
  m: decoder.ModelConfig,
  rows: Rows,
  *,
  updates: int,
  batch: int,
  seed: int,
  mismatched: tokens_lib.TokenRows | None = None,
  ahead: bool = False,
  online: bool = False,
) -> tuple[int, int]:
  """(flops, tokens) of a training run: `passes` a row.

  A mismatched row costs one forward, `ahead` one more of every row (see
  `stats.needs_batch_logps`), `online` one more of every row and mismatched row;
  padding and recomputation are not counted. Of the `mismatched` rows, those
  of all steps end to end, the first `updates * batch` ran.
  """
  seen = np.concatenate(
    [batches.rows_at(s, len(rows.ids), batch, seed) for s in range(updates)]
  )
  lengths = tokens_lib.lengths(rows.tokens)[rows.row_of[seen]].reshape(-1)
  total, tokens = 0, int(lengths.sum())
  for size, count in zip(*np.unique(lengths, return_counts=True)):
    total += int(count) * decoder_flops(
      m, int(size), passes=passes(m, ahead, online)
    )
  if mismatched is not None:
    extra = tokens_lib.lengths(mismatched)[: updates * batch]
    tokens += int(extra.sum())
    for size, count in zip(*np.unique(extra, return_counts=True)):
      total += (1 + online) * decoder_flops(m, int(size)) * int(count)
  return total, tokens
