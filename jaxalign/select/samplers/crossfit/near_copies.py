"""Which rows are near-copies of each other, by the words both answers use.

MinHash as in Broder 1997, over all rows at once in NumPy: datasketch loops over
the rows in Python, and its hashes are others.
"""

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components

BANDS, HASHES = 16, 4  # two rows half alike meet in 64 % of cases
COPIES = 2  # of a set of near-copies, before all others
_ROWS = 1 << 16  # whose words are held at once
ALL_ALIKE = 0.5  # fraction of rows with near-copies, above which none counts


def copies(grams: np.ndarray, alike: float = 0.5) -> np.ndarray:
  """[N] int64, alike for rows that are near-copies, or copies of copies.

  A row is the set of hashed tokens and pairs of them that its answers have,
  whichever is chosen; two rows are near-copies where they share at least
  `alike` of all that either has (Jaccard). Rows that agree in 4 min-wise
  hashes of a band, of 16, are compared with the first of them in id order:
  O(N W), and no pair of rows that do not meet.

  Args:
    grams: [N, R, W] counts, see `select.grams`.
    alike: from 0 to 1.
  """
  n, width = len(grams), grams.shape[2] + 1
  if not n:
    return np.zeros(0, np.int64)
  rng = np.random.Generator(np.random.Philox(key=41))
  orders = [rng.permutation(width) for _ in range(BANDS * HASHES)]
  size, keys = np.empty(n, np.int64), np.zeros((BANDS, n), np.int64)
  for at in range(0, n, _ROWS):
    has = _words(grams[at : at + _ROWS])
    own = slice(at, at + len(has))
    places = np.nonzero(has)[1]
    size[own] = has.sum(axis=1)
    starts = np.cumsum(size[own]) - size[own]
    for k, order in enumerate(orders):
      least = np.minimum.reduceat(order[places], starts)
      keys[k // HASHES, own] = keys[k // HASHES, own] * width + least
  left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
  for key in keys:
    leader = _first_of_equals(key)
    rows = np.flatnonzero(leader != np.arange(n))
    for at in range(0, len(rows), 8192):
      some = rows[at : at + 8192]
      first = leader[some]
      both = (_words(grams[some]) & _words(grams[first])).sum(axis=1)
      near = both >= alike * (size[some] + size[first] - both)
      left.append(some[near])
      right.append(first[near])
  return _linked(n, np.concatenate(left), np.concatenate(right))


def _words(grams: np.ndarray) -> np.ndarray:
  """[n, R, W] -> [n, W + 1] bool, which a row has; the last: it has none."""
  has = grams.any(axis=1)
  return np.concatenate([has, ~has.any(axis=1)[:, None]], axis=1)


def _first_of_equals(key: np.ndarray) -> np.ndarray:
  """[n] the first row with the same key."""
  _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
  return first[inverse]


def _linked(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """[n] int64, alike for rows that a chain of the links a - b joins."""
  graph = scipy.sparse.coo_matrix((np.ones(len(a), bool), (a, b)), (n, n))
  return np.int64(connected_components(graph, directed=False)[1])


def joined(*codes: np.ndarray) -> np.ndarray:
  """[N] names -> [N] str: alike where any of them is, or a chain of them."""
  n = len(codes[0])
  links = np.concatenate([_first_of_equals(code) for code in codes])
  found = _linked(n, np.tile(np.arange(n), len(codes)), links)
  # Named by the least of its first code's names: no row number in it.
  names, place = np.unique(np.asarray(codes[0], np.str_), return_inverse=True)
  least = np.full(found.max(initial=0) + 1, len(names))
  np.minimum.at(least, found, place)
  return names[least[found]]


def in_copies(code: np.ndarray) -> float:
  """Fraction of rows that have a near-copy."""
  return float((np.bincount(code)[code] > 1).mean()) if len(code) else 0.0


def to_limit(
  grams: np.ndarray, wanted: int | str | None, pairs: bool
) -> tuple[int, np.ndarray | None, list[str]]:
  """How many near-copies may come first, which rows are some, and a note.

  None where none is to count them: texts of a few words are all alike, and so
  are the answers to one prompt, from which heads learn.
  """
  if wanted is None or wanted == "auto" and not pairs:
    return 0, None, []
  code = copies(grams)
  if wanted != "auto":
    return int(wanted), code, []
  fraction = in_copies(code)
  if fraction <= ALL_ALIKE:
    return COPIES, code, []
  note = (
    f"{100 * fraction:.0f} % of the rows have near-copies, as texts of a few "
    "words do: copies come as other rows do"
  )
  return 0, None, [note]


def moved_last(
  score: np.ndarray, place: np.ndarray, most: int
) -> tuple[np.ndarray, str]:
  """Scores with what has `most` better copies below all others, and a note."""
  spare = place >= most
  note = (
    f"{int(spare.sum()):,} rows have {most} near-copies or more that score "
    "higher, and come last"
  )
  return np.where(spare, score - np.ptp(score) - 1, score), note


def copies_kept(
  grams: np.ndarray, kept: np.ndarray, drawn: np.ndarray
) -> list[str]:
  """A warning where the kept rows have near-copies among them.

  More than a fifth have, and more than twice as many as of drawn rows [M].
  """
  found, usual = (
    in_copies(copies(grams[np.sort(rows)])) for rows in (kept, drawn)
  )
  if found <= max(0.2, 2 * usual):
    return []
  return [
    f"warning: {100 * found:.1f} % of the kept rows have a near-copy "
    f"among them, of random rows {100 * usual:.1f} %: one pattern is "
    "labelled alike, and no head can tell whether rightly; set "
    "config.select.kwargs.copies to keep a few of each"
  ]
