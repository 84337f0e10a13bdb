"""How kept rows differ from the pool, against what chance alone would do.

Each figure comes with the range that 95 % of uniformly random subsets of the
same size would show, and is called slight to large by its effect size: with
many rows a difference can be certain and still not matter.
"""

import math
from typing import Any

import numpy as np
from scipy import stats

from jaxalign.core import intervals

DRAWS = 1000  # of random subsets, where no formula is at hand
LISTED = 12  # values of a column that get a line of their own
SIZES = {0.2: "slight", 0.5: "small", 0.8: "medium"}  # below; Cohen 1988


def number(values: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
  """The mean of the kept rows against that of random subsets of their number.

  A subset of M of N rows drawn without replacement has a mean of variance
  S^2 / M (1 - M/N) (Cochran 1977, theorem 2.2); the range and p are normal.

  Args:
    values: [N] finite.
    kept: [M] row numbers.

  Returns:
    `pool` and `kept` means; `shift`; `low` and `high`, the 95 % range of the
    shift of random subsets; two-sided `p`; `effect`, the shift over the
    standard deviation of the pool (Cohen's d); and `verdict`.
  """
  values = np.asarray(values, np.float64)
  n, m = len(values), len(kept)
  pool = float(values.mean())
  out = dict(pool=pool, kept=pool if m else None, shift=0.0 if m else None)
  if not 0 < m < n:
    unknown = dict.fromkeys(("low", "high", "p", "effect"))
    return out | unknown | dict(verdict="nothing to compare")
  mean = float(values[kept].mean())
  spread = float(values.std(ddof=1))
  error = spread * math.sqrt((1 - m / n) / m)
  shift, half = mean - pool, intervals.Z * error
  # What rounding alone leaves of a shift is none.
  none = abs(shift) <= 1e-12 * max(1.0, abs(pool))
  p = 1.0 if none or not error else math.erfc(abs(shift) / error / 2**0.5)
  effect = 0.0 if none or not spread else shift / spread
  chance = dict(low=-half, high=half, p=p)
  verdict = dict(effect=effect, verdict=_verdict(p, effect))
  return out | dict(kept=mean, shift=shift) | chance | verdict


def _verdict(p: float, effect: float) -> str:
  """A shift in words."""
  if p >= 0.05:
    return "within chance"
  words = (word for limit, word in SIZES.items() if abs(effect) < limit)
  return next(words, "large")


def fractions(
  values: np.ndarray, kept: np.ndarray, seed: int = 0
) -> dict[str, Any]:
  """Fractions of a column's values among the kept rows and in the pool.

  The count of a value in a random subset is hypergeometric, so its range and
  its p are exact; the p of the values are corrected together (Holm). How much
  moved in all, half the sum of the absolute differences, is above 0 for any
  subset: it comes with the same of DRAWS random subsets.

  Args:
    values: [N] of any type that sorts.
    kept: [M] row numbers.
    seed: of the draws.

  Returns:
    `rows`, the commonest LISTED values in the pool and the rest as None, each
    with `pool`, `kept`, `low`, `high`, `p`, `effect` (Cohen's h) and `verdict`;
    how many `values` there are and are `covered`; `moved`, `moved_chance`
    (mean of the draws), `moved_high` (their 95th percentile) and `moved_p`.
  """
  names, inverse = np.unique(np.asarray(values), return_inverse=True)
  n, m = len(inverse), len(kept)
  total = np.bincount(inverse, minlength=len(names))
  got = np.bincount(inverse[kept], minlength=len(names))
  first, rest = np.split(np.argsort(-total, kind="stable"), [LISTED])
  listed = [(names[i].item(), int(total[i]), int(got[i])) for i in first]
  if rest.size:
    listed.append((None, int(total[rest].sum()), int(got[rest].sum())))
  rows = [
    dict(value=name, pool=t / n, kept=g / m if m else None, count=g)
    for name, t, g in listed
  ]
  covered = int((got > 0).sum())
  out = dict(values=len(names), covered=covered, rows=rows)
  if not 0 < m < n:
    unknown = dict.fromkeys(("moved_chance", "moved_high", "moved_p"))
    return out | dict(moved=0.0 if m else None) | unknown
  several, angle = [], lambda x: 2 * math.asin(math.sqrt(x))
  for row, (_, t, g) in zip(rows, listed):
    chance = stats.hypergeom(n, t, m)
    several.append(min(1.0, 2 * min(chance.cdf(g), chance.sf(g - 1))))
    low, high = (float(chance.ppf(q)) / m for q in (0.025, 0.975))
    row.update(low=low, high=high, effect=angle(g / m) - angle(t / n))
  for row, p in zip(rows, intervals.holm(several)):
    row.update(p=float(p), verdict=_verdict(p, row["effect"]))
  moved = float(np.abs(got / m - total / n).sum() / 2)
  rng = np.random.Generator(np.random.Philox(key=seed % 2**64))
  drawn = rng.multivariate_hypergeometric(total, m, DRAWS, method="marginals")
  chance = np.abs(drawn / m - total / n).sum(axis=1) / 2
  return out | dict(
    moved=moved,
    moved_chance=float(chance.mean()),
    moved_high=float(np.quantile(chance, 0.95)),
    moved_p=float((1 + (chance >= moved - 1e-12).sum()) / (1 + DRAWS)),
  )


def all_shifts(
  columns: dict[str, np.ndarray], kept: np.ndarray
) -> list[dict[str, Any]]:
  """The shifts of all columns that a report compares.

  Args:
    columns: of N rows; `length` [N, R] tokens, `label` [N] bool, `source` and
      `topic` [N] where they are known.
    kept: [M] row numbers.
  """
  numbers = {}
  if "length" in columns:
    length = np.float64(columns["length"]).reshape(len(columns["length"]), -1)
    numbers["response length"] = length.mean(axis=1)
    if length.shape[1] == 2:
      numbers["chosen minus rejected length"] = length[:, 0] - length[:, 1]
  return [
    dict(name=name, unit="tokens", kind="number") | number(values, kept)
    for name, values in numbers.items()
  ] + [
    dict(name=name, kind="fraction") | fractions(columns[name], kept)
    for name in ("label", "source", "topic")
    if name in columns
  ]
