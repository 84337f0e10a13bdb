"""What a training run costs: floating-point operations and tokens."""

import numpy as np

from jaxalign.data import tokens as tokens_lib
from jaxalign.model import decoder
from jaxalign.model.flops import decoder_flops, useful_flops
from jaxalign.train.feed import Batching, TrainRows


def row_passes(
  m: decoder.ModelConfig, ahead: bool = False, online: bool = False
) -> tuple[int, int]:
  """Forward passes that a trained row costs: of products with weights, and of
  attention's.

  One forward, one for the gradients of the activations and one for those of
  the weights: frozen weights have none, but both operands of attention move.
  The adapters' own products, about r / D of a pass, are not counted. `ahead`
  adds a pass, see `statistics.needs_batch_logps`; `online` adds the
  reference's.
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
  """Flops that one update cannot do without.

  `useful_flops` of its rows for the passes that `training_cost` counts; no
  recomputation.
  """

  def count(token_rows, index, passes):
    start = np.asarray(token_rows.start, np.int64)
    answers = tokens_lib.row_lengths(token_rows) - start
    return useful_flops(m, start[index[:, 0]], answers[index], passes)

  own = rows.row_of[batching.rows_at(step, len(rows.ids))]
  total = count(rows.tokens, own, row_passes(m, ahead, online))
  if rows.mismatched is not None:
    other = batching.mismatched_at(step)[:, None]
    total += count(rows.mismatched.tokens, other, (1 + online,) * 2)
  return total


def training_cost(
  m: decoder.ModelConfig,
  rows: TrainRows,
  batching: Batching,
  updates: int,
  ahead: bool = False,
  online: bool = False,
) -> tuple[int, int]:
  """(flops, tokens) of a training run: `row_passes` of every row.

  A mismatched row costs one forward, and one more if `online`. Padding and
  recomputation are not counted.
  """
  seen = [batching.rows_at(s, len(rows.ids)) for s in range(updates)]
  lengths = tokens_lib.row_lengths(rows.tokens)[rows.row_of]
  ran = [(lengths[np.concatenate(seen)], row_passes(m, ahead, online))]
  if rows.mismatched is not None:
    other = tokens_lib.row_lengths(rows.mismatched.tokens)
    ran.append((other[: updates * batching.batch], (1 + online,) * 2))
  total = 0
  for sizes, times in ran:
    for size, count in zip(*np.unique(sizes, return_counts=True)):
      total += int(count) * decoder_flops(m, int(size), passes=times)
  return total, sum(int(sizes.sum()) for sizes, _ in ran)
