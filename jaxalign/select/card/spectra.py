"""How the variance of embeddings falls off, per label and per cluster.

Groups whose spectra differ are learnt unequally even where they have as many
rows (Kaushik et al. 2024, "Balanced data, imbalanced spectra"). Groups are
compared at equal numbers of rows, and their gap beside that of groups made by
shuffling: few rows in many dimensions have gaps of their own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

ROWS = 2048  # of all groups together; more are sampled
LEAST = 32  # rows that a group needs
GROUPS = 8  # the largest are described
SHUFFLES = 39  # so that a gap above all of them has p = 0.025
CURVE = 64  # directions of the curve that is kept


def eigenvalues(x: np.ndarray) -> np.ndarray:
  """Of the covariance of rows [n, E], highest first, min(n, E) of them."""
  x = np.float64(x) - np.mean(x, axis=0, dtype=np.float64)
  gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
  return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0) / max(1, len(x))


def effective_rank(values: np.ndarray) -> float:
  """exp of the entropy of the eigenvalues' shares, Roy and Vetterli 2007."""
  share = values / values.sum() if values.sum() > 0 else values
  share = share[share > 0]
  return float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0


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


def _summary(x: np.ndarray) -> dict[str, Any]:
  values = eigenvalues(x)
  total = values.sum()
  share = np.cumsum(values) / total if total > 0 else values
  gram = np.float64(x)
  gram = gram - gram.mean(axis=0)
  return dict(
    variance=float(total),
    effective_rank=effective_rank(values),
    participation=participation(gram @ gram.T),
    decay=decay(values),
    first=float(share[0]) if share.size else None,
    first_ten=float(share[min(9, len(share) - 1)]),
    curve=[round(float(s), 4) for s in share[:CURVE]],
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
  names = [_plain(k) for k in kinds] if names is None else list(names)
  order = np.argsort(-counts, kind="stable")
  good = [k for k in order if counts[k] >= LEAST][:GROUPS]
  if len(good) < 2:
    return dict(why=f"fewer than two groups have {LEAST} rows")
  good.sort()
  used = int(min(counts[k] for k in good))
  used = min(used, ROWS // len(good))
  if paired:
    records = np.argsort(draw[::2], kind="stable")[:used]
    picked = [2 * records + k for k in range(2)]
  else:
    picked = []
    for k in good:
      rows = np.flatnonzero(inverse == k)
      picked.append(rows[np.argsort(draw[rows], kind="stable")[:used]])
  described = [
    dict(name=names[k], rows=int(counts[k]), **_summary(x[rows]))
    for k, rows in zip(good, picked)
  ]
  # What is shuffled has no means of its own: only spectra are compared. One
  # Gram matrix serves all shuffles.
  both = np.concatenate(
    [
      np.float32(x[rows] - x[rows].mean(axis=0, dtype=np.float64))
      for rows in picked
    ]
  )
  gram = np.float64(both @ both.T)
  rng = np.random.Generator(np.random.Philox(key=0))

  def gap(places):
    found = [participation(gram[np.ix_(p, p)]) for p in places]
    return max(found) / max(min(found), 1e-300)

  there = np.arange(len(both)).reshape(len(good), used)
  seen, chance = gap(there), []
  for _ in range(SHUFFLES):
    if paired:
      flip = rng.random(used) < 0.5
      mixed = np.where(flip, there[::-1], there)
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
  """The participation ratio of kept rows beside that of random subsets.

  Args:
    kept: [m, E] kept rows, or a uniform sample of them.
    pool: [n, E] a uniform sample of the pool, n above m.
  """
  if len(kept) < LEAST or len(kept) >= len(pool):
    return dict(why=f"fewer than {LEAST} rows were kept, or nearly all")
  rng = np.random.Generator(np.random.Philox(key=1))

  def rank(x):
    x = np.float64(x)
    return participation(x @ x.T)

  chance = np.sort(
    [
      rank(pool[rng.choice(len(pool), len(kept), replace=False)])
      for _ in range(SHUFFLES)
    ]
  )
  return dict(
    used=len(kept),
    kept=rank(kept),
    chance=float(np.median(chance)),
    low=float(chance[0]),
    high=float(chance[-1]),
  )


def map_plane(
  x: np.ndarray, draw: np.ndarray, rows: int = 4096
) -> dict[str, Any]:
  """The first two principal directions, the same on every machine's run.

  Args:
    x: [n, E] rows.
    draw: [n] hashes: the directions are of the `rows` with the lowest.
    rows: see `draw`.

  Returns:
    `mean` [E], `directions` [E, 2] each with its largest coordinate positive,
    `explained`, the shares of variance, and `used` rows.
  """
  some = np.sort(np.argsort(draw, kind="stable")[:rows])
  part = np.float64(x[some])
  mean = part.mean(axis=0)
  part = part - mean
  wide = len(part) < part.shape[1]
  values, vectors = np.linalg.eigh(part @ part.T if wide else part.T @ part)
  top = vectors[:, ::-1][:, :2]
  top = part.T @ top if wide else top
  norm = np.sqrt((top**2).sum(axis=0))
  top = top / np.where(norm > 0, norm, 1)
  if top.shape[1] < 2:
    top = np.concatenate([top, np.zeros_like(top)], axis=1)[:, :2]
  sign = np.sign(top[np.abs(top).argmax(axis=0), [0, 1]])
  top = top * np.where(sign == 0, 1, sign)
  total = max(float(np.maximum(values, 0).sum()), 1e-300)
  values = np.append(np.maximum(values[::-1], 0), [0.0, 0.0])[:2]
  return dict(
    mean=mean,
    directions=top,
    used=len(some),
    explained=[float(v) / total for v in values],
  )


def _plain(value: Any) -> Any:
  return value.item() if isinstance(value, np.generic) else value
