"""Which rows a step sees: pure functions of the step, so a run can resume."""

import functools
from typing import Any

import numpy as np

from jaxalign.data.tokens import TokenRows


@functools.lru_cache(maxsize=8)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def rows_at(step: int, n: int, batch: int, seed: int) -> np.ndarray:
  """The row numbers [batch] of one step.

  Epochs are permutations laid end to end and cut into batches, so every row
  is seen equally often and none is dropped at the end of an epoch.
  """
  position = np.arange(step * batch, (step + 1) * batch)
  return np.concatenate(
    [
      _order(n, seed, int(epoch))[position[position // n == epoch] % n]
      for epoch in np.unique(position // n)
    ]
  )


def updates(
  n: int, batch: int, epochs: float, most: int = 0, least: int = 1
) -> int:
  """Updates of a run: `epochs` passes over n rows, within bounds.

  Args:
    n: rows.
    batch: rows of an update.
    epochs: passes over the rows.
    most: bound from above; 0: none.
    least: bound from below: few rows are passed over more often.
  """
  wanted = max(1, least, int(np.ceil(epochs * n / batch)))
  return min(wanted, most) if most else wanted


def rotation(rows: np.ndarray, n: int) -> np.ndarray:
  """For every row of a batch, the row whose answer it is mismatched with.

  A rotation over the GLOBAL batch: by the least shift that gives no row its
  own answer. A batch that spans two epochs may hold a row twice, and of very
  few rows there may be no such shift: by the one that gives the fewest their
  own, and those take the answer of the next row of all n. On the host, where
  the order of the rows is known, so that the reference model's
  log-probabilities of these rows can be stored beforehand.

  Args:
    rows: [B] row numbers of the step, below n; two or more of each.
    n: rows there are.

  Returns:
    [B] row numbers, none where it stands in `rows`.
  """
  shifts = range(1, len(rows))
  shift = min(shifts, key=lambda k: (np.roll(rows, -k) == rows).sum())
  other = np.roll(rows, -shift)
  return np.where(other == rows, (rows + 1) % n, other)


class Spliced:
  """The tokens of spliced rows, end to end; each is read when it is indexed.

  A class because it stands where an array of token ids does: nothing is
  copied, and a process reads no rows but those it puts on its devices.
  """

  def __init__(self, ids, offsets, kept, prompt, answer):
    """Row i is kept[i] tokens of `ids` from prompt[i], then from answer[i]."""
    self.ids, self.offsets, self.kept = ids, offsets, kept
    self.first, self.dtype = (prompt, answer), ids.dtype

  def __len__(self) -> int:
    return int(self.offsets[-1])

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    return np.asarray(self[:], dtype)

  def __getitem__(self, where: Any) -> np.ndarray:
    """Tokens at places, an int array [k] or a slice."""
    place = np.arange(len(self))[where] if isinstance(where, slice) else where
    row = np.searchsorted(self.offsets, place, side="right") - 1
    column = place - self.offsets[row]
    kept, (prompt, answer) = self.kept[row], self.first
    return self.ids[
      np.where(column < kept, prompt[row] + column, answer[row] + column - kept)
    ]


def mismatched(
  rows: TokenRows, prompts: np.ndarray, answers: np.ndarray, context: int
) -> TokenRows:
  """Rows made of one row's prompt tokens and another's answer tokens.

  Their places follow from the lengths; no token is read here.

  Args:
    rows: tokenized rows.
    prompts: [n] rows to take the prompt of (with its BOS).
    answers: [n] rows to take the answer of (with its EOS).
    context: longest row; an answer that does not fit loses its end.
  """
  offsets, start = np.asarray(rows.offsets), np.asarray(rows.start, np.int64)
  size = np.diff(offsets)[answers] - start[answers]  # of the answer
  room = np.maximum(1, context - start[prompts])
  kept = np.minimum(start[prompts], context - 1)  # of the prompt, its end
  ends = np.cumsum(kept + np.minimum(size, room))
  places = np.concatenate([[0], ends]).astype(np.int64)
  first = offsets[prompts] + start[prompts] - kept
  second = offsets[answers] + start[answers]
  return TokenRows(
    Spliced(rows.ids, places, kept, first, second),
    places,
    kept.astype(np.int32),
    np.maximum(0, size - room).astype(np.int32),
  )
