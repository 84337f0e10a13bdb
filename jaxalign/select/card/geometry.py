"""Where the kept rows lie among the others: neighbours, copies, the map."""

import re
from typing import Any

import numpy as np

from jaxalign.core import intervals
from jaxalign.errors import NumericError
from jaxalign.select import neighbours
from jaxalign.select.card import spectra
from jaxalign.select.pool import Pool
from jaxalign.select.samplers import kmeans

ALIKE = 0.95  # a cosine from which two rows are near-duplicates
ASKED = 2000  # rows whose neighbours stand for the pool's or a random subset's
WORK = 2e12  # flops that neighbours may take; then rows are sampled
SPREAD = 4096  # rows that spectra and the map are of
CLUSTERS = 12  # that stand for topics where rows have none
_COMMON = 3  # words that name a cluster
_WORD = re.compile(r"[^\W\d_]{3,}")


def cosine(squared: np.ndarray) -> np.ndarray:
  """Of unit rows at a squared distance; -inf where there was no other row."""
  return 1 - np.asarray(squared) / 2


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
    What stands on the card, and for each shown row `near` (row number, -1:
    not asked), `cosine`, `x` and `y`. Where rows have no direction, a card
    of `why`, and nothing.
  """
  try:
    return _look(pool, kept, shown, draw)
  except NumericError as error:
    return {"why": str(error)}, {}


def _look(pool, kept, shown, draw):
  read = neighbours.unit_rows(pool)
  n, m, width = len(pool.ids), len(kept), pool.embedding.shape[-1]
  mask = np.zeros(n, bool)
  mask[kept] = True
  targets = np.sort(kept)
  near = np.full(n, -1, np.int64)
  alike = np.full(n, -np.inf)
  asked = {}
  for name, rows, limit in (
    ("left", shown[~mask[shown]], WORK),
    ("kept", shown[mask[shown]], WORK / 4),
  ):
    count = neighbours.affordable(len(rows), m, width, limit)
    some = neighbours.sample(draw, rows, count)
    found = neighbours.nearest(read, some, targets)
    near[some], alike[some] = found.row, cosine(found.squared)
    asked[name] = some
  card = dict(
    neighbours=_covered(
      read, n, draw, asked["left"], alike[asked["left"]], mask, width
    ),
    near_duplicates=_copies(read, n, draw, alike[asked["kept"]], m, width),
  )
  plane, x, y = _map(read, shown, draw, n)
  return card | dict(map=plane), dict(
    near=near[shown], cosine=alike[shown], x=x, y=y
  )


def _covered(read, n, draw, left, alike, mask, width):
  """How near the rows left out are to a kept one; and to a random subset."""
  m = int(mask.sum())
  quantiles = lambda values: [
    float(v) for v in np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
  ]
  good = np.isfinite(alike)
  out = dict(
    asked=len(left),
    of=n - m,
    quantiles=None,
    random=None,
    near_copy=intervals.wilson(
      int((alike[good] >= ALIKE).sum()), int(good.sum())
    ),
  )
  if good.any():
    out["quantiles"] = quantiles(alike[good])
  order = np.argsort(draw, kind="stable")
  rest = order[m:][
    : neighbours.affordable(min(ASKED, n - m), m, width, WORK / 8)
  ]
  if len(rest) >= 100 and m:
    found = neighbours.nearest(read, np.sort(rest), np.sort(order[:m]))
    out["random"] = quantiles(cosine(found.squared))
    out["random_asked"] = len(rest)
  return out


def _copies(read, n, draw, alike, m, width):
  """Shares of rows with a near-duplicate: kept, by chance, in the pool."""
  out = dict(
    threshold=ALIKE,
    kept=intervals.wilson(int((alike >= ALIKE).sum()), len(alike)),
  )
  order = np.argsort(draw, kind="stable")
  for name, rows in (("random", order[:m]), ("pool", order)):
    count = neighbours.affordable(
      min(len(rows), ASKED), len(rows), width, WORK / 8
    )
    if count < min(100, len(rows)):
      out[name] = intervals.wilson(0, 0)
      continue
    # The last of the draw: within the random subset, a sample of it.
    found = neighbours.nearest(
      read, np.sort(rows[len(rows) - count :]), np.sort(rows)
    )
    out[name] = intervals.wilson(
      int((cosine(found.squared) >= ALIKE).sum()), count
    )
  return out


def _map(read, shown, draw, n):
  """The plane of the first two principal directions, and the shown rows."""
  some = neighbours.sample(draw, np.arange(n), SPREAD)
  x = read(some)
  plane = spectra.map_plane(x, draw[some])
  place = np.concatenate(
    [
      (read(shown[s : s + neighbours.BLOCK]) - plane["mean"])
      @ plane["directions"]
      for s in range(0, len(shown), neighbours.BLOCK)
    ]
  )
  card = dict(explained=plane["explained"], directions_from=plane["used"])
  return card, place[:, 0], place[:, 1]


def clusters(pool: Pool, draw: np.ndarray, texts: Any = None) -> np.ndarray:
  """[N] names of k-means clusters, in place of topics nobody gave.

  Args:
    pool: with `embedding`.
    draw: [N] hashes; the centres are fitted to 20,000 rows at most.
    texts: [N] str; a cluster is then named by the words that are commonest
      in it beside the rest.

  Raises:
    NumericError: rows have no direction.
  """
  read, n = neighbours.unit_rows(pool), len(pool.ids)
  some = neighbours.sample(draw, np.arange(n), 20_000)
  count = min(CLUSTERS, max(1, len(some) // 50))
  _, centres = kmeans.k_means(read(some), pool.ids[some], count, 0)
  label = np.empty(n, np.int64)
  square = (centres**2).sum(axis=1)
  for start in range(0, n, neighbours.BLOCK):
    rows = np.arange(start, min(n, start + neighbours.BLOCK))
    label[rows] = (square - 2 * np.float64(read(rows)) @ centres.T).argmin(1)
  # The largest first: the numbering of the fit means nothing.
  size = np.bincount(label, minlength=count)
  place = np.empty(count, np.int64)
  place[np.argsort(-size, kind="stable")] = np.arange(1, count + 1)
  words = (
    _words([texts[i] for i in some], label[some], count)
    if (texts is not None)
    else [""] * count
  )
  names = np.array(
    [
      f"cluster {place[k]}" + (f": {words[k]}" if words[k] else "")
      for k in range(count)
    ]
  )
  return names[label]


def _words(texts, label, count):
  """The words that mark each cluster: in many of its texts, few others."""
  seen, sizes = [{} for _ in range(count)], np.bincount(label, minlength=count)
  for text, k in zip(texts, label):
    for word in set(_WORD.findall(str(text)[:2000].lower())):
      seen[k][word] = seen[k].get(word, 0) + 1
  total = {}
  for one in seen:
    for word, c in one.items():
      total[word] = total.get(word, 0) + c
  out = []
  for k, one in enumerate(seen):

    def weight(word):
      inside = one[word] / sizes[k]
      outside = (total[word] - one[word] + 1) / (len(texts) - sizes[k] + 1)
      return inside * np.log(inside / outside)

    best = sorted((w for w in one if one[w] > 1), key=lambda w: (-weight(w), w))
    out.append(", ".join(best[:_COMMON]))
  return out


def spectra_of(
  pool: Pool, kept: np.ndarray, draw: np.ndarray, mixture_assign: Any = None
) -> dict[str, Any]:
  """Spectra by label, by component of the mixture and by topic.

  Args:
    pool: with `embedding` [N, R, E]; `label` and `topic` where it has them.
    kept: [M] row numbers.
    draw: [N] hashes, of what is sampled.
    mixture_assign: [n, E] rows -> [n] components, where one was fitted.
  """
  n = len(pool.ids)
  some = neighbours.sample(draw, np.arange(n), SPREAD)
  x = np.asarray(pool.embedding[some], np.float32)
  x = x.reshape(len(some), -1, x.shape[-1])
  flat, mean = x.reshape(-1, x.shape[-1]), x.mean(axis=1)
  hashes, sides = draw[some], x.shape[1]
  each = np.repeat(hashes, sides) + np.arange(len(flat)).astype(
    np.uint64
  ) % np.uint64(sides)
  out = dict(rows=len(some))
  if not np.isfinite(flat).all():
    return dict(why="embeddings are not finite")
  if sides == 2:
    out["label"] = spectra.compare(
      flat,
      np.tile([0, 1], len(some)),
      each,
      ["chosen", "rejected"],
      paired=True,
    )
  elif "label" in pool.columns:
    label = np.asarray(pool.label, bool)[some]
    names = {False: "undesirable", True: "desirable"}
    out["label"] = spectra.compare(
      flat, label, each, [names[k] for k in np.unique(label)]
    )
  if mixture_assign is not None:
    group = mixture_assign(flat)
    out["component"] = spectra.compare(
      flat, group, each, [f"component {k + 1}" for k in np.unique(group)]
    )
  if "topic" in pool.columns:
    out["topic"] = spectra.compare(mean, np.asarray(pool.topic)[some], hashes)
  rows = neighbours.sample(draw, kept, 512)
  y = np.asarray(pool.embedding[rows], np.float32)
  out["kept"] = spectra.kept_rank(
    y.reshape(len(rows), -1, y.shape[-1]).mean(axis=1), mean
  )
  return out
