"""A training batch as flat arrays: from their names to a `Batch`, and back."""

from typing import Any

import numpy as np

from jaxalign.data.tokens import TokenRows
from jaxalign.train.batch import Batch, Logps, MismatchedBatch
from jaxalign.train.feed import TrainRows
from jaxalign.train.statistics import STATISTICS, Whole


def batch_of(
  tokens: Any,
  mask: Any,
  ref_sum: Any,
  ref_count: Any = None,
  ref_common_prefix: Any = None,
  label: Any = None,
  lr: Any = 0.0,
  kl_tokens: Any = None,
  kl_mask: Any = None,
  kl_ref_sum: Any = None,
  **columns: Any,
) -> Batch:
  """The batch of these arrays; others are columns of its rows."""
  other = None
  if kl_tokens is not None:
    other = MismatchedBatch(kl_tokens, kl_mask, kl_ref_sum)
  ref = Logps(ref_sum, ref_count, ref_common_prefix)
  return Batch(tokens, mask, ref, label, columns, other, lr)


def arrays_of(batch: Batch) -> dict[str, Any]:
  """The arrays of a batch by those names."""
  out = dict(
    tokens=batch.tokens,
    mask=batch.mask,
    ref_sum=batch.ref.sum,
    ref_count=batch.ref.count,
    ref_common_prefix=batch.ref.common_prefix,
    label=batch.label,
    lr=batch.lr,
    **batch.columns,
  )
  if batch.mismatched is not None:
    kl = batch.mismatched
    out |= dict(kl_tokens=kl.tokens, kl_mask=kl.mask, kl_ref_sum=kl.ref_sum)
  return {n: x for n, x in out.items() if x is not None}


def matched(name: str, policy: Any, ref: Any) -> Any:
  """A statistic of STATISTICS that reads the sums [N, R] of a whole batch."""
  whole = Whole(None, None, None, policy, ref)
  return STATISTICS[name].compute(whole)


def train_rows(
  tokens: TokenRows, r: int, sums: Any = 0.0, counts: Any = 1.0, **more: Any
) -> TrainRows:
  """All of the tokenized rows, R side by side, called r0, r1 and so on."""
  index = np.arange(len(tokens.start)).reshape(-1, r)
  if isinstance(sums, float):
    sums = np.full(index.shape, sums, np.float32)
  if isinstance(counts, float):
    counts = np.full(index.shape, counts, np.float32)
  ids = [f"r{i}" for i in range(len(index))]
  return TrainRows(
    ids, tokens, index, sums.reshape(index.shape), counts.reshape(index.shape)
  )._replace(**more)


def rows_of(groups: Any) -> TokenRows:
  """[(prompt, answer, answer..)] of ids -> token rows, R of a group."""
  pairs = [(p, a) for p, *answers in groups for a in answers]
  ids = [np.concatenate([p, a]).astype(np.int32) for p, a in pairs]
  ends = np.cumsum([0, *map(len, ids)])
  starts = np.array([len(p) for p, _ in pairs], np.int32)
  return TokenRows(np.concatenate(ids), ends, starts, np.zeros_like(starts))
