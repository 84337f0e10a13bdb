"""Counts of hashed tokens and pairs of tokens: features without a model."""

import itertools

import numpy as np

from jaxalign.data import tokens as tokens_lib
from jaxalign.embed.store import scratch

WIDTH = 1024  # columns; the first half counts tokens, the second pairs
_COUNTED = 4096  # rows of tokens counted at once
_SCORED = 1 << 16  # rows scored at once


def bucket(ids: np.ndarray, buckets: int) -> np.ndarray:
  """[n] integers -> [n] from 0 to buckets - 1, by splitmix64's last step.

  A fixed function of the number: no table, and the same on every machine.
  """
  z = np.asarray(ids).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return ((z ^ (z >> np.uint64(31))) % np.uint64(buckets)).astype(np.int64)


def counts(rows: tokens_lib.TokenRows, width: int = WIDTH) -> np.ndarray:
  """How often each hashed token and pair of neighbours is in each response.

  Args:
    rows: n rows; only the tokens from `start` on are read.
    width: even; each half has that many buckets.

  Returns:
    uint8 [n, width], mapped from a scratch file; a count above 255 is 255.
  """
  n, half = len(rows.start), width // 2
  out = scratch((n, width), np.uint8)
  size = tokens_lib.row_lengths(rows)
  for first in range(0, n, _COUNTED):
    last = min(first + _COUNTED, n)
    low, high = rows.offsets[first], rows.offsets[last]
    ids = np.asarray(rows.ids[low:high], np.int64)
    row = np.repeat(np.arange(last - first), size[first:last])
    place = np.arange(low, high) - rows.offsets[first:last][row]
    response = place >= rows.start[first:last][row]
    token = row[response] * width + bucket(ids[response], half)
    both = response[1:] & response[:-1] & (row[1:] == row[:-1])
    code = (1 << 62) + ids[:-1][both] * (1 << 31) + ids[1:][both]
    pair = row[1:][both] * width + half + bucket(code, half)
    cells = (last - first) * width
    count = np.bincount(np.concatenate([token, pair]), minlength=cells)
    out[first:last] = np.minimum(count, 255).reshape(-1, width)
  return out


def overlap(rows: tokens_lib.TokenRows) -> np.ndarray:
  """[n, 2] float32: how many of a response's tokens, and of its pairs of
  neighbours in either order, its prompt has too."""
  out = np.zeros((len(rows.start), 2), np.float32)
  for i, start in enumerate(rows.start):
    ids = np.asarray(rows.ids[rows.offsets[i] : rows.offsets[i + 1]]).tolist()
    prompt, response = ids[:start], ids[start:]
    tokens, pairs = set(prompt), set(itertools.pairwise(prompt))
    pairs |= {(b, a) for a, b in pairs}
    out[i] = (
      sum(t in tokens for t in response),
      sum(p in pairs for p in itertools.pairwise(response)),
    )
  return out


def surprise(grams: np.ndarray) -> np.ndarray:
  """[n, W] counts -> [n, 2] mean log frequency of a row's tokens, and of its
  pairs, in the pool: low where a row is made of what the others lack."""
  out = np.zeros((len(grams), 2))
  half = grams.shape[1] // 2
  for k in range(2):
    part = grams[:, k * half : (k + 1) * half]
    total = part.sum(axis=0, dtype=np.float64)
    frequency = np.log((total + 1) / (total.sum() + half))
    for at in range(0, len(part), _SCORED):
      x = part[at : at + _SCORED]
      count = np.maximum(x.sum(axis=1, dtype=np.float64), 1)
      out[at : at + _SCORED, k] = (x @ frequency) / count
  return out


def columns(
  rows: tokens_lib.TokenRows, responses: int
) -> dict[str, np.ndarray]:
  """The pool's `grams` [N, R, W] and `overlap` [N, R, 2]."""
  return dict(
    grams=counts(rows).reshape(-1, responses, WIDTH),
    overlap=overlap(rows).reshape(-1, responses, 2),
  )
