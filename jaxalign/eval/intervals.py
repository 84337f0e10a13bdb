"""Estimates with 95 % intervals, as the report prints them."""

from typing import Any

import numpy as np

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
  half = (_Z / (1 + _Z**2 / n)) * np.sqrt(p * (1 - p) / n
                                          + _Z**2 / (4 * n * n))
  return dict(value=p, low=float(max(0.0, center - half)),
              high=float(min(1.0, center + half)), n=n)


def mean(values: np.ndarray) -> dict[str, Any]:
  """A mean with its normal interval (standard error from the sample).

  Args:
    values: [n] numbers.
  """
  values = np.asarray(values, np.float64)
  n = len(values)
  if n == 0:
    return dict(value=None, low=None, high=None, n=0)
  half = _Z * float(values.std(ddof=1)) / np.sqrt(n) if n > 1 else 0.0
  m = float(values.mean())
  return dict(value=m, low=m - half, high=m + half, n=n)


def macro(values: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
  """A mean in which every group counts the same.

  The interval is normal, from the variance within groups of two or more.

  Args:
    values: [n] numbers.
    groups: [n] labels.
  """
  means, variances = [], []
  for g in np.unique(groups):
    v = np.asarray(values, np.float64)[groups == g]
    means.append(v.mean())
    if len(v) > 1:
      variances.append(v.var(ddof=1) / len(v))
  if not means:
    return dict(value=None, low=None, high=None, n=0)
  spread = np.mean(variances) if variances else 0.25
  half = _Z * float(np.sqrt(spread / len(means)))
  m = float(np.mean(means))
  return dict(value=m, low=m - half, high=m + half, n=len(values))


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
  """Mean of a - b over the same prompts, with its normal interval."""
  return mean(np.asarray(a, np.float64) - np.asarray(b, np.float64))


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
    return (f"{name_a} is better than {name_b} by {value:.1f} points of "
            f"{unit} ({interval}; one training seed).")
  if high < 0:
    return (f"{name_a} is worse than {name_b} by {-value:.1f} points of "
            f"{unit} ({interval}; one training seed).")
  return (f"No difference shown between {name_a} and {name_b} at "
          f"n = {diff['n']} in {unit} ({value:+.1f} points; {interval}; one "
          "training seed).")
