"""How the variance of embeddings falls off, per label and per cluster.

Groups whose spectra differ are learnt unequally even where they have as many
rows (Kaushik et al. 2024, "Balanced data, imbalanced spectra"). Groups are
compared at equal numbers of rows, and their gap with that of groups made by
shuffling: few rows in many dimensions have gaps of their own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn.decomposition import PCA

from jaxalign.select import neighbours
from jaxalign.select.pool import Pool

ROWS = 2048  # of all groups together; more are sampled
LEAST = 32  # rows that a group needs
GROUPS = 8  # the largest are described
SHUFFLES = 39  # so that a gap above all of them has p = 0.025
CURVE = 64  # directions of the curve that is kept
SAMPLED = 4096  # rows that stand for the pool


def eigenvalues(x: np.ndarray) -> np.ndarray:
  """Of the covariance of rows [n, E], highest first, min(n, E) of them."""
  x = np.float64(x) - np.mean(x, axis=0, dtype=np.float64)
  gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
  return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0) / max(1, len(x))


def effective_rank(values: np.ndarray) -> float:
  """exp of the entropy of the scaled eigenvalues, Roy and Vetterli 2007."""
  return float(np.exp(stats.entropy(values))) if values.sum() > 0 else 0.0


def participation(gram: np.ndarray) -> float:
  """(sum of eigenvalues)^2 / sum of their squares, from a Gram matrix.

  Also a rank in effect, but it needs no eigenvalues: of a centred Gram
  matrix, trace^2 over the squared Frobenius norm.

  Args:
    gram: [n, n] products of rows, not centred.
  """
  mean = gram.mean(axis=0)
  centred = gram - mean[:, None] - mean[None] + mean.mean()
  square = float(np.einsum("ij,ij->", centred, centred))
  return float(np.trace(centred) ** 2 / square) if square > 0 else 0.0


def decay(values: np.ndarray) -> float | None:
  """Slope of log eigenvalue over log rank, by least squares.

  Over the first half of those above 1e-9 of the largest; -1 is a fall as 1/i.
  """
  good = int((values > 1e-9 * values[0]).sum()) if values.size else 0
  count = min(100, good // 2)
  if count < 3:
    return None
  at = np.log(np.arange(1, count + 1))
  at = at - at.mean()
  return float((at * np.log(values[:count])).sum() / (at**2).sum())


def _figures(x: np.ndarray) -> dict[str, Any]:
  """The figures of the rows of one group."""
  values = eigenvalues(x)
  total = values.sum()
  held = np.cumsum(values) / total if total > 0 else values
  centred = np.float64(x) - np.mean(x, axis=0, dtype=np.float64)
  return dict(
    variance=float(total),
    effective_rank=effective_rank(values),
    participation=participation(centred @ centred.T),
    decay=decay(values),
    first=float(held[0]),
    first_ten=float(held[:10][-1]),
    curve=[round(float(s), 4) for s in held[:CURVE]],
  )


def compare(
  x: np.ndarray,
  groups: np.ndarray,
  draw: np.ndarray,
  names: Sequence[Any] | None = None,
  paired: bool = False,
) -> dict[str, Any]:
  """The spectra of groups of rows at equal numbers, and the gap of them.

  Args:
    x: [n, E] rows.
    groups: [n] group of each row; of pairs, rows 2i and 2i + 1 are one
      record's and in groups 0 and 1 in this order.
    draw: [n] hashes; the rows of a group with the lowest are taken, so the
      order of the rows decides nothing. Of pairs, those of the first side.
    names: of the groups' sorted values.
    paired: shuffle within the two sides of a record.

  Returns:
    `groups`, each a dict with `name`, `rows` it has, and its figures over the
    `used` rows; `gap`, the largest ratio of two groups' participation ratios;
    `gap_chance`, the median of shuffled groups, `gap_high`, their largest but
    one, and `p`. Where fewer than two groups have LEAST rows, `why`.
  """
  kinds, inverse, counts = np.unique(
    groups, return_inverse=True, return_counts=True
  )
  names = kinds.tolist() if names is None else list(names)
  order = np.argsort(-counts, kind="stable")
  good = sorted([k for k in order if counts[k] >= LEAST][:GROUPS])
  if len(good) < 2:
    return dict(why=f"fewer than two groups have {LEAST} rows")
  used = min(int(counts[good].min()), ROWS // len(good))
  first = lambda rows: rows[np.argsort(draw[rows], kind="stable")[:used]]
  picked = [first(np.flatnonzero(inverse == k)) for k in good]
  if paired:
    records = first(np.arange(0, len(x), 2))
    picked = [records, records + 1]
  described = [
    dict(name=names[k], rows=int(counts[k]), **_figures(x[rows]))
    for k, rows in zip(good, picked)
  ]
  # What is shuffled has no means of its own: only spectra are compared. One
  # Gram matrix serves all shuffles.
  centred = [x[r] - x[r].mean(axis=0, dtype=np.float64) for r in picked]
  both = np.float32(np.concatenate(centred))
  gram = np.float64(both @ both.T)
  rng = np.random.Generator(np.random.Philox(key=0))

  def gap(places):
    found = [participation(gram[np.ix_(p, p)]) for p in places]
    return max(found) / max(min(found), 1e-300)

  there = np.arange(len(both)).reshape(len(good), used)
  seen, chance = gap(there), []
  for _ in range(SHUFFLES):
    if paired:
      mixed = np.where(rng.random(used) < 0.5, there[::-1], there)
    else:
      mixed = rng.permutation(len(both)).reshape(there.shape)
    chance.append(gap(mixed))
  chance = np.sort(chance)
  return dict(
    groups=described,
    used=used,
    gap=float(seen),
    gap_chance=float(np.median(chance)),
    gap_high=float(chance[-2]),
    p=float((1 + (chance >= seen).sum()) / (1 + SHUFFLES)),
  )


def kept_rank(kept: np.ndarray, pool: np.ndarray) -> dict[str, Any]:
  """The participation ratio of kept rows, and that of random subsets.

  Args:
    kept: [m, E] kept rows, or a uniform sample of them.
    pool: [n, E] a uniform sample of the pool, n above m.
  """
  m, n = len(kept), len(pool)
  if not LEAST <= m < n:
    return dict(why=f"fewer than {LEAST} rows were kept, or nearly all")
  rng = np.random.Generator(np.random.Philox(key=1))
  rank = lambda x: participation(np.float64(x) @ np.float64(x).T)
  draws = [pool[rng.choice(n, m, replace=False)] for _ in range(SHUFFLES)]
  chance = np.sort([rank(x) for x in draws])
  return dict(
    used=m,
    kept=rank(kept),
    chance=float(np.median(chance)),
    low=float(chance[0]),
    high=float(chance[-1]),
  )


def principal_plane(x: np.ndarray) -> PCA:
  """The first two principal directions of rows [n, E], the same every run.

  Each has its largest coordinate positive.
  """
  solver = "full" if len(x) < x.shape[1] else "covariance_eigh"
  return PCA(min(2, *x.shape), svd_solver=solver).fit(np.float64(x))


def spectra_of(
  pool: Pool, kept: np.ndarray, draw: np.ndarray, components_of: Any = None
) -> dict[str, Any]:
  """Spectra by label, by component of the mixture and by topic.

  Args:
    pool: with `embedding` [N, R, E]; `label` and `topic` where it has them.
    kept: [M] row numbers.
    draw: [N] hashes, of what is sampled.
    components_of: [n, E] rows -> [n] components, where one was fitted.
  """
  n, sample = len(pool.ids), neighbours.sample
  some = sample(draw, np.arange(n), SAMPLED)
  x = np.asarray(pool.embedding[some], np.float32)
  x = x.reshape(len(some), -1, x.shape[-1])
  sides, hashes = x.shape[1], draw[some]
  flat, mean = x.reshape(-1, x.shape[-1]), x.mean(axis=1)
  if not np.isfinite(flat).all():
    return dict(why="embeddings are not finite")
  side = np.tile(np.arange(sides), len(some))
  each = np.repeat(hashes, sides) + side.astype(np.uint64)
  out = dict(rows=len(some))
  if sides == 2:
    both = ["chosen", "rejected"]
    out["label"] = compare(flat, side, each, both, paired=True)
  elif "label" in pool.columns:
    label = np.asarray(pool.label, bool)[some]
    names = np.array(["undesirable", "desirable"])[np.unique(label).astype(int)]
    out["label"] = compare(flat, label, each, names.tolist())
  if components_of is not None:
    group = components_of(flat)
    names = [f"component {k + 1}" for k in np.unique(group)]
    out["component"] = compare(flat, group, each, names)
  if "topic" in pool.columns:
    out["topic"] = compare(mean, np.asarray(pool.topic)[some], hashes)
  y = np.asarray(pool.embedding[sample(draw, kept, 512)], np.float32)
  y = y.reshape(len(y), -1, y.shape[-1]).mean(axis=1)
  return out | dict(kept=kept_rank(y, mean))
