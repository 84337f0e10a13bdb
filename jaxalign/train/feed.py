"""Batches on the mesh: a pure function of the step over tokenized rows."""

from typing import Any, Callable, NamedTuple

import numpy as np

from jaxalign import sharding
from jaxalign.data import batches
from jaxalign.data import tokens as tokens_lib
from jaxalign.errors import ConfigError
from jaxalign.model import decoder


class Rows(NamedTuple):
  """M training rows of R responses each."""

  ids: list[str]  # [M]
  tokens: tokens_lib.TokenRows  # n >= M * R tokenized rows
  row_of: np.ndarray  # [M, R] int: which tokenized row a response is
  ref_sum: np.ndarray  # [M, R] float32 nats of the reference
  ref_count: np.ndarray  # [M, R] float32
  label: np.ndarray | None = None  # [M] bool, thumbs
  # For the losses that read them, see `jaxalign.references`:
  ref_public: np.ndarray | None = None  # [M, R] float32 nats
  weights: np.ndarray | None = None  # [M] float32


class Mismatched(NamedTuple):
  """KTO's prompt-and-other-answer rows, all steps end to end."""

  tokens: tokens_lib.TokenRows  # updates * B rows
  ref_sum: np.ndarray  # [updates * B] float32 nats


def check_divides(batch: int, accumulation: int, knob: str) -> None:
  """Raises ConfigError where a batch does not divide into micro-batches."""
  if batch < 1 or accumulation < 1 or batch % accumulation:
    raise ConfigError(f"{knob}.batch_size={batch} does not divide into "
                      f"{knob}.accumulation={accumulation} micro-batches")


def check_batch(batch: int, accumulation: int, mesh: Any, knob: str) -> None:
  """Raises ConfigError where a batch does not divide over mesh and steps."""
  check_divides(batch, accumulation, knob)
  parts = sharding.parts(mesh, "batch")
  if (batch // accumulation) % parts:
    raise ConfigError(
        f"a micro-batch of {batch // accumulation} rows ({knob}.batch_size="
        f"{batch}, {knob}.accumulation={accumulation}) does not divide over "
        f"fsdp={parts}; change one of them or config.mesh")


def make_mismatched(rows: Rows, *, updates: int, batch: int, seed: int,
                    context: int) -> tokens_lib.TokenRows:
  """The mismatched rows of every step, known in advance: [updates * B]."""
  prompts, answers = [], []
  for step in range(updates):
    own = batches.rows_at(step, len(rows.ids), batch, seed)
    prompts.append(rows.row_of[own, 0])
    answers.append(rows.row_of[batches.rotation(own), 0])
  return batches.mismatched(rows.tokens, np.concatenate(prompts),
                            np.concatenate(answers), context)


def make_feed(mesh: Any, rows: Rows, *, batch: int, accumulation: int,
              seed: int, context: int, rate: Callable[[int], float],
              mismatched: Mismatched | None = None
              ) -> tuple[Callable, Callable, Callable]:
  """Returns `batch_at(step)`, `ids_at(step)` and `tokens_at(step)`.

  Rows are padded to the bucket of the batch's longest row, so few shapes are
  compiled. A process reads the tokens of its own devices' rows alone. See
  `train.step.make_train_step` for the arrays of a batch; `rate` gives the
  learning rate of a step.
  """
  lengths = tokens_lib.lengths(rows.tokens)
  longest = tokens_lib.longest(lengths, context)
  if mismatched is not None:
    # One row's prompt and another's answer may be longer than any row.
    kl_lengths = tokens_lib.lengths(mismatched.tokens)
    kl_longest = tokens_lib.longest(kl_lengths, context)

  def rows_of(step):
    return batches.rows_at(step, len(rows.ids), batch, seed)

  def pad(token_rows, index, size):
    tokens, mask = tokens_lib.pad(token_rows, index.reshape(-1), size)
    return tokens.reshape(*index.shape, size), mask.reshape(*index.shape, size)

  def batch_at(step):
    own = rows_of(step)
    # Every process pads to the same bucket, from the lengths of all rows.
    size = tokens_lib.bucket(int(lengths[rows.row_of[own]].max()), longest)
    if mismatched is not None:
      where = np.arange(step * batch, (step + 1) * batch)[:, None]
      kl_size = tokens_lib.bucket(int(kl_lengths[where].max()), kl_longest)

    def make(places):
      mine = own[places]
      out = dict(ref_sum=rows.ref_sum[mine], ref_count=rows.ref_count[mine])
      out["tokens"], out["mask"] = pad(rows.tokens, rows.row_of[mine], size)
      out |= {n: x[mine] for n, x in (
          ("label", rows.label), ("weights", rows.weights),
          ("ref_public", rows.ref_public)) if x is not None}
      if mismatched is not None:
        out["kl_tokens"], out["kl_mask"] = pad(
            mismatched.tokens, where[places], kl_size)
        out["kl_ref_sum"] = mismatched.ref_sum[where[places]]
      return out

    shape = (accumulation, batch // accumulation)
    return sharding.put_rows(mesh, shape, make, None, "batch") | dict(
        lr=np.float32(rate(step)))

  def ids_at(step):
    return [rows.ids[i] for i in rows_of(step)]

  def tokens_at(step):
    return int(lengths[rows.row_of[rows_of(step)]].sum())

  return batch_at, ids_at, tokens_at


def passes(m: decoder.ModelConfig) -> int:
  """What a trained row costs, in forward passes.

  Its own, one for the gradients of the activations and one for those of the
  weights; frozen weights have none, and the adapters' own products, about
  r / D of a pass, are not counted.
  """
  return 2 if m.lora else 3


def training_cost(m: decoder.ModelConfig, rows: Rows, *, updates: int,
                  batch: int, seed: int,
                  mismatched: tokens_lib.TokenRows | None = None,
                  ahead: bool = False) -> tuple[int, int]:
  """(operations, tokens) of a training run: `passes` a row.

  A mismatched row costs one forward, and `ahead` one more of every row (see
  `stats.looks_ahead`); padding and recomputation are not counted.
  """
  seen = np.concatenate([batches.rows_at(s, len(rows.ids), batch, seed)
                         for s in range(updates)])
  lengths = tokens_lib.lengths(rows.tokens)[rows.row_of[seen]].reshape(-1)
  total, tokens = 0, int(lengths.sum())
  for size, count in zip(*np.unique(lengths, return_counts=True)):
    total += (passes(m) + ahead) * decoder.operations(m, int(size)) * int(count)
  if mismatched is not None:
    extra = tokens_lib.lengths(mismatched)
    tokens += int(extra.sum())
    for size, count in zip(*np.unique(extra, return_counts=True)):
      total += decoder.operations(m, int(size)) * int(count)
  return total, tokens
