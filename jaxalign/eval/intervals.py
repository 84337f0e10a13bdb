"""Estimates with 95 % intervals, as the report prints them."""

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

_Z = 1.959963984540054  # two-sided 95 % of the normal


def share(values: np.ndarray) -> dict[str, Any]:
  """A mean of numbers in [0, 1] with a Wilson interval.

  Ties count one half; with them the interval is slightly wide (a variable
  with the same mean and fewer than two values varies less).

  Args:
    values: [n] in [0, 1].

  Returns:
    {"value", "low", "high", "n"}, all None but n where n is 0.
  """
  values = np.asarray(values, np.float64)
  n = len(values)
  if n == 0:
    return dict(value=None, low=None, high=None, n=0)
  p = float(values.mean())
  center = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
  half = (_Z / (1 + _Z**2 / n)) * np.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
  return dict(
    value=p,
    low=float(max(0.0, center - half)) if p else 0.0,
    high=float(min(1.0, center + half)) if p < 1 else 1.0,
    n=n,
  )


def mean(values: np.ndarray) -> dict[str, Any]:
  """A mean with its normal interval (standard error from the sample).

  Args:
    values: [n] numbers; one alone has no interval (None).
  """
  values = np.asarray(values, np.float64)
  n = len(values)
  if n == 0:
    return dict(value=None, low=None, high=None, n=0)
  m = float(values.mean())
  if n == 1:
    return dict(value=m, low=None, high=None, n=1)
  half = _Z * float(values.std(ddof=1)) / np.sqrt(n)
  return dict(value=m, low=float(m - half), high=float(m + half), n=n)


def macro(values: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
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
    return dict(value=None, low=None, high=None, n=0)
  _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
  means = np.bincount(group, values) / sizes
  squares = float(((values - means[group]) ** 2).sum())
  variance = (squares + 0.25) / (len(values) - len(sizes) + 1)
  half = _Z * float(np.sqrt(variance * (1 / sizes).sum())) / len(sizes)
  m = float(means.mean())
  return dict(
    value=m, low=max(0.0, m - half), high=min(1.0, m + half), n=len(values)
  )


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
  """Mean of a - b over the same prompts, with a paired interval.

  The interval of Bonett and Price 2012: normal, after one difference of +1 and
  one of -1 are added. So a few prompts that all agree do not pass for
  certainty.

  Args:
    a: [n] in [0, 1].
    b: [n] in [0, 1].
  """
  d = np.asarray(a, np.float64) - np.asarray(b, np.float64)
  n = len(d)
  if n == 0:
    return dict(value=None, low=None, high=None, n=0)
  center = d.sum() / (n + 2)
  variance = ((d * d).sum() + 2) / (n + 2) - center**2
  half = _Z * np.sqrt(variance / (n + 2))
  return dict(
    value=float(d.mean()),
    low=float(max(-1.0, center - half)),
    high=float(min(1.0, center + half)),
    n=n,
  )


def in_words(name_a: str, name_b: str, diff: dict[str, Any], unit: str) -> str:
  """A difference of shares as a sentence that cannot mislead.

  Args:
    name_a: what is compared.
    name_b: what it is compared with.
    diff: as from `difference`, of shares; positive where a is better.
    unit: what is measured ("win rate against the SFT target").
  """
  if diff["value"] is None:
    return f"{name_a} against {name_b}: not measured."
  value, low, high = (100 * diff[k] for k in ("value", "low", "high"))
  interval = f"95 % interval {low:+.1f} to {high:+.1f} points, n = {diff['n']}"
  if low > 0:
    return (
      f"{name_a} is better than {name_b} by {value:.1f} points of "
      f"{unit} ({interval}; one training seed)."
    )
  if high < 0:
    return (
      f"{name_a} is worse than {name_b} by {-value:.1f} points of "
      f"{unit} ({interval}; one training seed)."
    )
  return (
    f"No difference shown between {name_a} and {name_b} at "
    f"n = {diff['n']} in {unit} ({value:+.1f} points; {interval}; one "
    "training seed)."
  )


def student(values: np.ndarray) -> dict[str, Any]:
  """A mean over a few independent runs (seeds) with Student's t interval.

  Three seeds are too few to bootstrap: a percentile bootstrap over them
  covers 76 %, not 95.

  Args:
    values: [S] one number a seed; one alone has no interval (None).
  """
  values = np.asarray(values, np.float64)
  n = len(values)
  if n < 2:
    return mean(values)
  m, t = float(values.mean()), float(stats.t.ppf(0.975, n - 1))
  half = t * float(values.std(ddof=1)) / np.sqrt(n)
  return dict(value=m, low=m - half, high=m + half, n=n)


class Spread(NamedTuple):
  """A mean over seeds and prompts, and how sure it is."""

  value: float
  error: float  # standard error, as if seeds and prompts were drawn anew
  freedom: float  # of the t distribution
  seeds: float  # variance between seeds, of one seed's mean over all prompts
  prompts: float  # variance between prompts, of a prompt's mean over all seeds
  noise: float  # variance of one cell about its seed and its prompt


def spread(values: np.ndarray) -> Spread:
  """Two-way spread of S seeds that met the same P prompts.

  Seeds and prompts are both drawn from more, so both count: with the mean
  squares of a two-way table, var(mean) = (MS_s + MS_p - MS_sp) / (S P), its
  freedom Satterthwaite's. A bootstrap of prompts within seeds estimates the
  prompts' part, (MS_p - MS_sp) / (S P) plus noise; for a mean it has this
  closed form and needs no draws.

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


def nested(values: np.ndarray) -> Spread:
  """Spread of S seeds that each met prompts, and a model, of their own.

  Prompts lie inside seeds, so their chance is part of what sets the seeds'
  means apart, and no other estimate is needed: Student's t over the means.

  Args:
    values: [S] means of the seeds, S at least 2.
  """
  v = np.asarray(values, np.float64)
  variance = float(v.var(ddof=1))
  return Spread(
    float(v.mean()),
    float(np.sqrt(variance / len(v))),
    len(v) - 1.0,
    variance,
    0.0,
    0.0,
  )


def crossed(values: np.ndarray) -> dict[str, Any]:
  """A mean over seeds and prompts, with a t interval for new ones of both.

  Args:
    values: [S, P] of S seeds on the same P prompts.

  Returns:
    {"value", "low", "high", "n" (seeds), "prompts"}; no interval (None)
    below two seeds or two prompts.
  """
  values = np.asarray(values, np.float64)
  s, p = values.shape
  if s < 2 or p < 2:
    value = float(values.mean()) if values.size else None
    return dict(value=value, low=None, high=None, n=s, prompts=p)
  found = spread(values)
  half = float(stats.t.ppf(0.975, found.freedom)) * found.error
  return dict(
    value=found.value,
    low=found.value - half,
    high=found.value + half,
    n=s,
    prompts=p,
  )
