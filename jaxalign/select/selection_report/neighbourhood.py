"""Where the kept rows lie among the others: neighbours, copies, the map."""

from collections import Counter
import re
from typing import Any

import numpy as np

from jaxalign.core import intervals
from jaxalign.core.errors import NumericError
from jaxalign.select import neighbours
from jaxalign.select.pool import Pool
from jaxalign.select.samplers import kmeans
from jaxalign.select.selection_report import spectra

ALIKE = 0.95  # a cosine from which two rows are near-duplicates
SAMPLED = 2000  # rows whose neighbours stand for the pool's or a subset's
WORK = 2e12  # flops that neighbours may take; then rows are sampled
SPREAD = 4096  # rows that the map's directions are of
CLUSTERS = 12  # that stand for topics where rows have none
_COMMON = 3  # words that name a cluster
_WORD = re.compile(r"[^\W\d_]{3,}")


def look(
  pool: Pool, kept: np.ndarray, shown: np.ndarray, draw: np.ndarray
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Neighbours, near-duplicates and the map.

  Distances are of unit vectors, the mean of a row's responses less the mean
  of the pool (`neighbours.unit_rows`).

  Args:
    pool: with `embedding` [N, R, E].
    kept: [M] row numbers.
    shown: [S] row numbers of the rows of the page, sorted.
    draw: [N] hashes of the ids: what is sampled is sampled by these.

  Returns:
    What stands in the report, and for each shown row `near` (row number, -1:
    not compared), `cosine`, `x` and `y`. Where rows have no direction, a
    report of `why`, and nothing.
  """
  try:
    return _look(pool, kept, shown, draw)
  except NumericError as error:
    return {"why": str(error)}, {}


def _look(pool, kept, shown, draw):
  read = neighbours.unit_rows(pool)
  n, m, width = len(pool.ids), len(kept), pool.embedding.shape[-1]
  mask = np.isin(np.arange(n), kept)
  near, cosine = np.full(n, -1, np.int64), np.full(n, -np.inf)

  def nearest_kept(rows, limit):
    """Cosines of some rows with their nearest kept row."""
    count = neighbours.affordable(len(rows), m, width, limit)
    some = neighbours.sample(draw, rows, count)
    near[some], cosine[some] = _nearest(read, some, kept)
    return cosine[some]

  left = nearest_kept(shown[~mask[shown]], WORK)
  inside = nearest_kept(shown[mask[shown]], WORK / 4)
  order, few = np.argsort(draw, kind="stable"), WORK / 8
  # A random subset, and of the rows outside it some, as of the kept ones.
  outside = neighbours.affordable(min(SAMPLED, n - m), m, width, few)
  chance = dict(random=None)
  if outside >= 100 and m:
    _, found = _nearest(read, order[m:][:outside], order[:m])
    chance = dict(random=_quantiles(found), random_compared=outside)
  copies = dict(threshold=ALIKE, kept=_copied(inside))
  for name, rows in (("random", order[:m]), ("pool", order)):
    count = min(len(rows), SAMPLED)
    count = neighbours.affordable(count, len(rows), width, few)
    if count < min(100, len(rows)):
      count = 0
    # The last of the draw: within the random subset, a sample of it.
    _, found = _nearest(read, rows[len(rows) - count :], rows)
    copies[name] = _copied(found)
  good = left[np.isfinite(left)]
  covered = dict(
    compared=len(left),
    of=n - m,
    quantiles=_quantiles(good) if good.size else None,
    near_copy=_copied(good),
    **chance,
  )
  plane, x, y = _map(read, shown, draw)
  seen = dict(neighbours=covered, near_duplicates=copies, map=plane)
  return seen, dict(near=near[shown], cosine=cosine[shown], x=x, y=y)


def _nearest(read, rows, targets):
  """The nearest target of each row, and their cosine (-inf: there is none)."""
  found = neighbours.nearest(read, np.sort(rows), np.sort(targets))
  return found.row, 1 - found.squared / 2


def _quantiles(values):
  return np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()


def _copied(cosine):
  """The fraction of rows with a near-duplicate, and its interval."""
  return intervals.wilson(int((cosine >= ALIKE).sum()), len(cosine))


def _map(read, shown, draw):
  """The plane of the first two principal directions, and the shown rows."""
  some = neighbours.sample(draw, np.arange(len(draw)), SPREAD)
  plane = spectra.principal_plane(read(some))
  step = neighbours.TARGETS
  chunks = (shown[at : at + step] for at in range(0, len(shown), step))
  place = [plane.transform(np.float64(read(rows))) for rows in chunks]
  place = np.concatenate(place)
  x, y = (np.pad(place, ((0, 0), (0, 1)))[:, :2]).T
  explained = [*plane.explained_variance_ratio_.tolist(), 0.0][:2]
  return dict(explained=explained, directions_from=len(some)), x, y


def clusters(pool: Pool, draw: np.ndarray, texts: Any = None) -> np.ndarray:
  """[N] names of k-means clusters, in place of topics nobody gave.

  Args:
    pool: with `embedding`.
    draw: [N] hashes; the centres are fitted to 20,000 rows at most.
    texts: [N] str; a cluster is then named by the words that are commoner
      in it than in the rest.

  Raises:
    NumericError: rows have no direction.
  """
  read, n = neighbours.unit_rows(pool), len(pool.ids)
  some = neighbours.sample(draw, np.arange(n), 20_000)
  count = min(CLUSTERS, max(1, len(some) // 50))
  _, centres = kmeans.k_means(read(some), pool.ids[some], count, 0)
  label = np.empty(n, np.int64)
  square = (centres**2).sum(axis=1)
  for start in range(0, n, neighbours.TARGETS):
    rows = np.arange(start, min(n, start + neighbours.TARGETS))
    label[rows] = (square - 2 * np.float64(read(rows)) @ centres.T).argmin(1)
  # The largest first: the numbering of the fit means nothing.
  size = np.bincount(label, minlength=count)
  place = 1 + np.argsort(np.argsort(-size, kind="stable"))
  names = [f"cluster {p}" for p in place]
  if texts is not None:
    words = _words([texts[i] for i in some], label[some], count)
    names = [f"{name}: {w}" if w else name for name, w in zip(names, words)]
  return np.array(names)[label]


def _words(texts, label, count):
  """The words that mark each cluster: in many of its texts, few others."""
  seen, sizes = [Counter() for _ in range(count)], np.bincount(label)
  for text, k in zip(texts, label):
    seen[k].update(set(_WORD.findall(str(text)[:2000].lower())))
  total, out = sum(seen, Counter()), []
  for k, words in enumerate(seen):

    def weight(word):
      inside = words[word] / sizes[k]
      others = len(texts) - sizes[k]
      outside = (total[word] - words[word] + 1) / (others + 1)
      return inside * np.log(inside / outside)

    common = [word for word in words if words[word] > 1]
    best = sorted(common, key=lambda w: (-weight(w), w))
    out.append(", ".join(best[:_COMMON]))
  return out
