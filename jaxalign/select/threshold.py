"""The exact best M of rows that come in tiles: a threshold, then one pass.

A float64 has an integer image that grows as it does, so the M-th highest
score is found by counting: four passes, 65,536 bins each, whatever N is.
Between equal scores the hash of the record id decides, found the same way.
What is held is the bins and the M rows, never N numbers.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxalign.errors import ConfigError, NumericError
from jaxalign.select.topk import id_hash

BITS = 16  # of the image, settled by one pass
Tiles = Callable[[], Iterable[np.ndarray]]


class Best(NamedTuple):
  """The best M rows, best first."""

  rows: np.ndarray  # [M] int64
  score: np.ndarray  # [M] float64


def image(score: np.ndarray) -> np.ndarray:
  """[n] float64, no NaN -> [n] uint64 in the same order; -0 equals 0."""
  bits = (np.asarray(score, np.float64) + 0.0).view(np.uint64)
  sign = np.uint64(1) << np.uint64(63)
  return np.where(bits & sign, ~bits, bits | sign)


def cut(tiles: Tiles, m: int) -> tuple[int, int]:
  """The m-th highest of uint64 numbers, and how many are above it.

  Args:
    tiles: gives the numbers from the start, in tiles of any size; it is
      called four times.
    m: 1 to the number of them.
  """
  prefix, above = 0, 0
  for shift in range(64 - BITS, -1, -BITS):
    counts = np.zeros(1 << BITS, np.int64)
    for part in tiles():
      digit = part >> np.uint64(shift)
      if shift < 64 - BITS:
        digit = digit[digit >> np.uint64(BITS) == np.uint64(prefix)]
      digit = (digit & np.uint64((1 << BITS) - 1)).astype(np.int64)
      counts += np.bincount(digit, minlength=1 << BITS)
    down = np.cumsum(counts[::-1])
    at = int(np.searchsorted(down, m - above))  # the first with enough
    above += int(down[at - 1]) if at else 0
    prefix = prefix << BITS | (1 << BITS) - 1 - at
  return prefix, above


def best(
  scores: Tiles, ids: Callable[[np.ndarray], np.ndarray], m: int
) -> Best:
  """The m highest scores: the rows that `topk.top` takes of all at once.

  Args:
    scores: gives [n] float64 tiles in row order, from the start at each call;
      infinities are ranked.
    ids: row numbers, ascending -> their record ids.
    m: 0 to N.

  Raises:
    NumericError: a score is NaN; the message names the ids.
  """
  n, bad = 0, []
  for start, score in _placed(scores):
    n = start + len(score)
    if len(bad) < 6:
      bad += (start + np.flatnonzero(np.isnan(score))[:6]).tolist()
  if bad:
    named = ", ".join(names(ids(np.array(bad[:5]))))
    raise NumericError(
      f"some of {n} rows have a NaN score (ids {named}"
      f"{', ...' if len(bad) > 5 else ''}); wanted finite "
      "numbers, look at the embedding of those records"
    )
  if not 0 <= m <= n:
    raise ConfigError(
      f"cannot take the best {m} of {n} rows; set config.select.budget"
    )
  if m == 0:
    return Best(np.empty(0, np.int64), np.empty(0))
  limit, above = cut(lambda: map(image, scores()), m)
  rows, kept = np.empty(m, np.int64), np.empty(m)
  filled = 0

  def keep(where, score):
    nonlocal filled
    rows[filled : filled + len(where)] = where
    kept[filled : filled + len(where)] = score
    filled += len(where)

  tied = 0
  for start, score in _placed(scores):
    number = image(score)
    over = np.flatnonzero(number > limit)
    keep(start + over, score[over])
    tied += int((number == limit).sum())
  _keep_tied(scores, ids, limit, m - above, tied, keep)
  order = np.argsort(rows)
  rows, kept = rows[order], kept[order] + 0.0
  return Best(*_ordered(rows, kept, ids))


def _placed(tiles: Tiles) -> Iterator[tuple[int, np.ndarray]]:
  start = 0
  for tile in tiles():
    yield start, tile
    start += len(tile)


def _keep_tied(scores, ids, limit, wanted, tied, keep) -> None:
  """Of the rows whose score's image is `limit`, those of the least hashes."""

  def hashed():
    for start, score in _placed(scores):
      where = start + np.flatnonzero(image(score) == limit)
      if len(where):
        # Complemented: the highest are the least hashes.
        yield where, score[where - start], ~id_hash(ids(where))

  if tied == wanted:
    for start, score in _placed(scores):
      where = np.flatnonzero(image(score) == limit)
      keep(start + where, score[where])
    return
  least, above = cut(lambda: (h for _, _, h in hashed()), wanted)
  left = wanted - above  # of equal hashes the first rows, in id order
  for where, score, number in hashed():
    equal = np.flatnonzero(number == least)[:left]
    left -= len(equal)
    some = np.sort(np.append(np.flatnonzero(number > least), equal))
    keep(where[some], score[some])


def _ordered(
  rows: np.ndarray, score: np.ndarray, ids: Callable
) -> tuple[np.ndarray, np.ndarray]:
  """Best first; equal scores by the hash, equal hashes by the row."""
  order = np.argsort(-score, kind="stable")
  rows, score = rows[order], score[order]
  same = score[1:] == score[:-1]
  tied = np.append(same, False) | np.append(False, same)
  tie = np.zeros(len(rows), np.uint64)
  where = np.flatnonzero(tied)
  where = where[np.argsort(rows[where])]
  if len(where):
    tie[where] = id_hash(ids(rows[where]))
  order = np.lexsort((rows, tie, -score))
  return rows[order], score[order]


def names(ids: np.ndarray) -> list[str]:
  """Record ids, text or bytes, as a person reads them."""
  return [
    i.decode(errors="replace") if isinstance(i, bytes) else str(i)
    for i in ids.tolist()
  ]
