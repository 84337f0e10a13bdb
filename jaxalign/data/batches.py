"""Which rows a step sees: pure functions of the step, so a run can resume."""

import functools

import numpy as np

from jaxalign.data import tokens as tokens_lib


@functools.lru_cache(maxsize=8)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.Generator(
      np.random.Philox(key=[seed, epoch])).permutation(n)


def rows_at(step: int, n: int, batch: int, seed: int) -> np.ndarray:
  """The row numbers [batch] of one step.

  Epochs are permutations laid end to end and cut into batches, so every row
  is seen equally often and none is dropped at the end of an epoch.
  """
  position = np.arange(step * batch, (step + 1) * batch)
  return np.concatenate([
      _order(n, seed, int(epoch))[position[position // n == epoch] % n]
      for epoch in np.unique(position // n)])


def updates(n: int, batch: int, epochs: float, most: int = 0) -> int:
  """Updates of a run: `epochs` passes over n rows, at most `most` (0: any)."""
  wanted = max(1, int(np.ceil(epochs * n / batch)))
  return min(wanted, most) if most else wanted


def rotation(rows: np.ndarray) -> np.ndarray:
  """For every row of a batch, the row whose answer it is mismatched with.

  A rotation over the GLOBAL batch: by the least shift that gives no row its
  own answer (a batch that spans two epochs may hold a row twice).

  Args:
    rows: [B] row numbers of the step.

  Returns:
    [B] row numbers, a rotation of `rows`.
  """
  for shift in range(1, len(rows)):
    other = np.roll(rows, -shift)
    if np.all(other != rows):
      return other
  return np.roll(rows, -1)


def mismatched(rows: "tokens_lib.TokenRows", prompts: np.ndarray,
               answers: np.ndarray, context: int) -> "tokens_lib.TokenRows":
  """Rows made of one row's prompt tokens and another's answer tokens.

  Args:
    rows: tokenized rows.
    prompts: [n] rows to take the prompt of (with its BOS).
    answers: [n] rows to take the answer of (with its EOS).
    context: longest row; an answer that does not fit loses its end.
  """
  ids, starts, cuts, offsets = [], [], [], [0]
  for i, j in zip(prompts, answers):
    a, b = rows.offsets[i], rows.offsets[j]
    prompt = rows.ids[a:a + rows.start[i]]
    answer = rows.ids[b + rows.start[j]:rows.offsets[j + 1]]
    room = max(1, context - len(prompt))
    ids += [prompt[-(context - 1):], answer[:room]]
    starts.append(min(len(prompt), context - 1))
    cuts.append(max(0, len(answer) - room))
    offsets.append(offsets[-1] + starts[-1] + min(len(answer), room))
  return tokens_lib.TokenRows(
      np.concatenate(ids).astype(np.int32), np.asarray(offsets, np.int64),
      np.asarray(starts, np.int32), np.asarray(cuts, np.int32))
