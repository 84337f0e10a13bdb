"""Estimates with 95 % intervals, and Holm's correction: one copy for all.

Own code where scipy has none: its Wilson interval takes whole counts, and a
tie counts one half here; it has no Holm.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Z = float(stats.norm.ppf(0.975))  # two-sided 95 % of the normal

Estimate = dict[str, Any]  # {"value", "low", "high", "n"}, None: not known


def symmetric(value: Any, half: Any = None, n: int = 0) -> Estimate:
  """`value` with the interval value - half to value + half."""
  if value is None or half is None:
    return dict(value=value, low=None, high=None, n=n)
  return dict(value=value, low=value - half, high=value + half, n=n)


def clipped(
  estimate: Estimate, low: float = 0.0, high: float = 1.0
) -> Estimate:
  """The estimate with the ends of its interval kept between low and high."""
  if estimate["low"] is None:
    return estimate
  ends = dict(low=max(low, estimate["low"]), high=min(high, estimate["high"]))
  return estimate | ends


def wilson(total: float, n: int) -> Estimate:
  """A proportion with its interval, Wilson 1927.

  Args:
    total: sum of n numbers in [0, 1]. Where they are not all 0 or 1 the
      interval is slightly wide: such a variable varies less.
    n: how many; 0 gives None.
  """
  if not n:
    return symmetric(None)
  p, scale = total / n, 1 + Z**2 / n
  center = (p + Z**2 / (2 * n)) / scale
  half = (Z / scale) * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n * n))
  return dict(
    value=p,
    low=float(max(0.0, center - half)) if p else 0.0,
    high=float(min(1.0, center + half)) if p < 1 else 1.0,
    n=n,
  )


def proportion(values: Sequence[float] | np.ndarray) -> Estimate:
  """A mean of [n] numbers in [0, 1], ties one half; see `wilson`."""
  values = np.asarray(values, np.float64)
  return wilson(float(values.sum()), len(values))


def _mean(values: np.ndarray, quantile: Callable[[int], float]) -> Estimate:
  """A mean of [n] numbers, with `quantile(n)` standard errors to each side."""
  values = np.asarray(values, np.float64)
  n = len(values)
  if n < 2:
    return symmetric(float(values[0]) if n else None, n=n)
  half = quantile(n) * float(values.std(ddof=1)) / np.sqrt(n)
  return symmetric(float(values.mean()), float(half), n)


def normal_mean(values: np.ndarray) -> Estimate:
  """A mean of [n] numbers with its normal interval; none for one alone."""
  return _mean(values, lambda n: Z)


def t_mean(values: np.ndarray) -> Estimate:
  """A mean over [S] independent runs (seeds) with Student's t interval.

  Three seeds are too few to bootstrap: a percentile bootstrap over them
  covers 76 %, not 95.
  """
  return _mean(values, lambda n: float(stats.t.ppf(0.975, n - 1)))


def macro_mean(values: np.ndarray, groups: np.ndarray) -> Estimate:
  """A mean of numbers in [0, 1] in which every group counts the same.

  The interval is normal. One variance is pooled within the groups, with one
  more observation of the largest there is: a group of one has none of its
  own, and a variance of zero would claim too much.

  Args:
    values: [n] in [0, 1].
    groups: [n] labels.
  """
  values = np.asarray(values, np.float64)
  if not len(values):
    return symmetric(None)
  _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
  means = np.bincount(group, values) / sizes
  squares = float(((values - means[group]) ** 2).sum())
  variance = (squares + 0.25) / (len(values) - len(sizes) + 1)
  half = Z * float(np.sqrt(variance * (1 / sizes).sum())) / len(sizes)
  return clipped(symmetric(float(means.mean()), half, len(values)))


def paired_difference(a: np.ndarray, b: np.ndarray) -> Estimate:
  """Mean of a - b over the same prompts, both [n] in [0, 1].

  The interval of Bonett and Price 2012: normal, after one difference of +1 and
  one of -1 are added, so that a few prompts that all agree do not pass for
  certainty.
  """
  d = np.asarray(a, np.float64) - np.asarray(b, np.float64)
  n = len(d)
  if not n:
    return symmetric(None)
  center = d.sum() / (n + 2)
  variance = ((d * d).sum() + 2) / (n + 2) - center**2
  half = float(Z * np.sqrt(variance / (n + 2)))
  interval = clipped(symmetric(float(center), half, n), -1.0, 1.0)
  return interval | dict(value=float(d.mean()))


class Spread(NamedTuple):
  """A mean over seeds and prompts, and how sure it is."""

  value: float
  error: float  # standard error, as if seeds and prompts were drawn anew
  freedom: float  # of the t distribution
  seeds: float  # variance between seeds, of one seed's mean over all prompts
  prompts: float  # variance between prompts, of a prompt's mean over all seeds
  noise: float  # variance of one cell about its seed and its prompt


def two_way_spread(values: np.ndarray) -> Spread:
  """Spread of S seeds that met the same P prompts.

  Seeds and prompts are both drawn from more, so both count: with the mean
  squares of a two-way table, var(mean) = (MS_s + MS_p - MS_sp) / (S P), its
  freedom Satterthwaite's. A bootstrap of prompts within seeds estimates
  (MS_p - MS_sp) / (S P) plus noise; for a mean it has this closed form.

  Args:
    values: [S, P], S at least 2 and P at least 2.
  """
  v = np.asarray(values, np.float64)
  s, p = v.shape
  m, rows, columns = v.mean(), v.mean(1), v.mean(0)
  by_seed = p * float(((rows - m) ** 2).sum()) / (s - 1)
  by_prompt = s * float(((columns - m) ** 2).sum()) / (p - 1)
  rest = v - rows[:, None] - columns[None] + m
  noise = float((rest**2).sum()) / ((s - 1) * (p - 1))
  # Neither part is below none: a mean square under the noise's is chance.
  a, b = max(by_seed, noise), max(by_prompt, noise)
  total = a + b - noise
  weights = ((by_seed, a, s - 1), (by_prompt, b, p - 1))
  squares = sum(x * x / f for x, y, f in weights if x >= noise)
  squares += noise**2 / ((s - 1) * (p - 1))
  freedom = total**2 / squares if squares > 0 else s - 1.0
  return Spread(
    float(m),
    float(np.sqrt(total / (s * p))),
    float(max(freedom, s - 1)),
    (a - noise) / p,
    (b - noise) / s,
    noise,
  )


def crossed_mean(values: np.ndarray) -> Estimate:
  """A mean of [S, P] over seeds and prompts, its interval for new ones of both.

  `n` counts the seeds, "prompts" the prompts; no interval below two of each.
  """
  values = np.asarray(values, np.float64)
  s, p = values.shape
  if s < 2 or p < 2:
    value = float(values.mean()) if values.size else None
    return symmetric(value, n=s) | dict(prompts=p)
  spread = two_way_spread(values)
  half = float(stats.t.ppf(0.975, spread.freedom)) * spread.error
  return symmetric(spread.value, half, s) | dict(prompts=p)


def holm(p: Sequence[float]) -> np.ndarray:
  """P values corrected for their number, Holm 1979; in the order given."""
  p = np.asarray(p, np.float64)
  order = np.argsort(p, kind="stable")
  steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
  out = np.empty_like(p)
  out[order] = np.minimum(steps, 1.0)
  return out
