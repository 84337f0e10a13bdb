"""Win rates: of scores or verdicts, by group, in both orders, at equal length.

An outcome is 1 for a win, 0.5 for a tie, 0 for a loss; NaN where a verdict
could not be read.

Judges like long answers, and some samplers pick them (the median of ISA's
literal order is twice the pool's). With d the difference in length, over its
standard deviation, the logistic model P(win) = s(c + g d) splits a win rate
into what length buys and the rest, s(c): the win rate were d zero (the idea of
AlpacaEval 2's length control, Dubois et al. 2024, without its other terms).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, special

from jaxalign.core import intervals
from jaxalign.core.errors import DataError

# What answers are compared with -> the metric, and the same in words.
BASELINES = {
  "target": ("win_vs_target", "the target"),
  "reference": ("win_vs_sft", "the reference"),
  "chosen": ("win_vs_chosen", "the chosen answer"),
}
_FAR = 15.0  # log-odds beyond which a fit has run away: nothing bounds it
_NONE = dict(value=None, low=None, high=None)


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """[n] outcomes from the scores of the two answers."""
  ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
  return np.where(ours > theirs, 1.0, np.where(ours == theirs, 0.5, 0.0))


def win_rate(outcomes: np.ndarray) -> dict[str, Any]:
  """The mean of [n] outcomes, its interval, and the fraction of "ties"."""
  w = np.asarray(outcomes, np.float64)
  ties = float((w == 0.5).mean()) if len(w) else None
  return intervals.proportion(w) | dict(ties=ties)


def outcome_rates(outcomes: np.ndarray) -> dict[str, Any]:
  """Win, tie and loss rates, and the win rate among what was decided.

  An outcome between, of two orders (0.75: a win and a tie), is a win.
  """
  w = np.asarray(outcomes, np.float64)
  return dict(
    wins=intervals.proportion(w > 0.5),
    ties=intervals.proportion(w == 0.5),
    losses=intervals.proportion(w < 0.5),
    decided=intervals.proportion(w[w != 0.5]),
  )


def by_group(outcomes: np.ndarray, groups: np.ndarray) -> dict[str, dict]:
  """`win_rate` of every topic or source in [n] `groups`, largest first."""
  w = np.asarray(outcomes, np.float64)
  names, group, sizes = np.unique(
    groups, return_inverse=True, return_counts=True
  )
  order = np.argsort(-sizes, kind="stable")
  return {str(names[i]): win_rate(w[group == i]) for i in order}


def win_metrics(
  baseline: str,
  outcomes: np.ndarray,
  ours: Sequence[str],
  theirs: Sequence[str],
  groups: np.ndarray | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Win rate, mean over groups, win rate at equal length; and their details.

  A pair without a verdict is left out of all of them. Lengths are in
  characters, which no tokenizer shifts.

  Args:
    baseline: a key of BASELINES.
    outcomes: [n], between where two orders differ, NaN where unreadable.
    ours: n answers.
    theirs: n answers of the baseline.
    groups: [n] topics or sources, or None.

  Returns:
    {metric: {"value", "low", "high", "n"}}, and "outcomes", "equal_length",
    "by_topic" and "against".
  """
  name, words = BASELINES[baseline]
  outcomes = np.asarray(outcomes, np.float64)
  read = ~np.isnan(outcomes)
  size = lambda texts: np.array([len(t) for t in texts], np.float64)[read]
  outcomes = outcomes[read]
  equal = at_equal_length(outcomes, size(ours), size(theirs))
  metrics = {name: win_rate(outcomes)}
  details = dict(
    outcomes=outcome_rates(outcomes), equal_length=equal, against=words
  )
  if groups is not None:
    groups = np.asarray(groups)[read]
    metrics[f"{name}_macro"] = intervals.macro_mean(outcomes, groups)
    details["by_topic"] = by_group(outcomes, groups)
  metrics[f"{name}_equal_length"] = {
    k: equal[k] for k in ("value", "low", "high", "n")
  }
  return metrics, details


def both_orders(
  shown_first: np.ndarray, shown_second: np.ndarray
) -> dict[str, Any]:
  """A judge's outcomes when each pair was shown in both orders.

  Args:
    shown_first: [n] our outcome where our answer was shown first.
    shown_second: [n] our outcome where it was shown second.

  Returns:
    "outcomes" [n]: one a pair, the mean of its two orders; NaN where either
    could not be read: one order alone would carry the bias of its place;
    "rate": `win_rate` over the pairs that have one;
    "bias": mean of (first - second) / 2, what the first place adds to an
    outcome: 0 without position bias, 0.5 where the first always wins;
    "consistent": fraction of pairs with the same outcome in both orders;
    "unparsable": fraction of verdicts.
  """
  a = np.asarray(shown_first, np.float64)
  b = np.asarray(shown_second, np.float64)
  outcomes = (a + b) / 2
  read = ~np.isnan(outcomes)
  return dict(
    outcomes=outcomes,
    rate=win_rate(outcomes[read]),
    bias=intervals.normal_mean((a[read] - b[read]) / 2),
    consistent=intervals.proportion(a[read] == b[read]),
    unparsable=intervals.proportion(np.isnan(np.concatenate([a, b]))),
  )


def _checked(outcomes: Any, ours: Any, theirs: Any) -> tuple[np.ndarray, ...]:
  w, ours, theirs = (
    np.asarray(v, np.float64) for v in (outcomes, ours, theirs)
  )
  if not w.shape == ours.shape == theirs.shape or w.ndim != 1:
    raise DataError(
      f"length control: {w.shape} outcomes, {ours.shape} and "
      f"{theirs.shape} lengths, wanted one of each a prompt"
    )
  if not ((w >= 0) & (w <= 1)).all():
    raise DataError(
      "length control: outcomes leave [0, 1]; wanted win 1, tie 0.5, loss 0"
    )
  if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
    raise DataError("length control: a length that is no number")
  return w, ours, theirs


def at_equal_length(
  outcomes: np.ndarray, ours: np.ndarray, theirs: np.ndarray
) -> dict[str, Any]:
  """The win rate at equal length, and the raw one.

  The interval is that of c, from the sandwich variance (a tie counts one half
  and varies less than a coin), carried to the win rate.

  Args:
    outcomes: [n].
    ours: [n] lengths of our answers.
    theirs: [n] lengths of the others', in the same unit.

  Returns:
    {"value", "low", "high", "n"}: at equal length; "raw": as `proportion`;
    "slope" {"value", "low", "high"}: log-odds for one standard deviation more;
    "longer": mean of ours - theirs; "why": None, or why there is no value.

  Raises:
    DataError: arrays that do not match, or that hold no outcomes or lengths.
  """
  w, ours, theirs = _checked(outcomes, ours, theirs)
  n, d, raw = len(w), ours - theirs, intervals.proportion(w)
  longer = float(d.mean()) if n else None
  out = _NONE | dict(n=n, raw=raw, slope=_NONE, longer=longer, why=None)
  if n < 3:
    return out | dict(why=f"{n} outcomes, wanted at least 3")
  sd = float(d.std())
  if sd == 0 and d[0] == 0:
    return out | {k: raw[k] for k in _NONE}
  if sd == 0:
    return out | dict(
      why="every answer is longer by the same amount: length "
      "and quality cannot be separated"
    )
  fit, variance = _logistic(np.stack([np.ones(n), d / sd], axis=1), w)
  if variance is None:
    return out | dict(
      why="length alone, or no loss at all, explains every "
      "outcome: the fit has no bound"
    )
  half = intervals.Z * np.sqrt(np.diag(variance))
  center, slope = np.stack([fit, fit - half, fit + half], axis=1).tolist()
  rate = special.expit(center).tolist()
  return out | dict(zip(_NONE, rate), slope=dict(zip(_NONE, slope)))


def _logistic(
  x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
  """Logistic regression and its sandwich variance; None: it has no bound.

  Not scikit-learn's: that has no variance, and takes no halves for `y`.
  """
  p = lambda v: special.expit(x @ v)
  hessian = lambda v: (x * (p(v) * (1 - p(v)))[:, None]).T @ x
  v = optimize.minimize(
    lambda v: float((np.logaddexp(0, x @ v) - y * (x @ v)).sum()),
    np.zeros(x.shape[1]),
    jac=lambda v: x.T @ (p(v) - y),
    hess=hessian,
    method="trust-exact",
    options=dict(gtol=1e-10),
  ).x
  if abs(v).max() > _FAR:
    return v, None
  bread = np.linalg.inv(hessian(v))
  score = x * (y - p(v))[:, None]
  n = len(y)
  return v, bread @ (score.T @ score) @ bread * (n / (n - 2))


def length_preference(
  outcomes: np.ndarray, ours: np.ndarray, theirs: np.ndarray
) -> dict[str, Any]:
  """Whether a rater likes the longer of two answers.

  A rater may be right to: length is a bias only against another rater, or
  where the two answers are known to be equally good. The arguments are those
  of `at_equal_length`.

  Returns:
    {"longer": `proportion` of the verdicts that name a winner, the answers not
    equally long, in which the longer wins; "slope", "why" and "n": as of
    `at_equal_length`}.
  """
  w, ours, theirs = _checked(outcomes, ours, theirs)
  fit = at_equal_length(w, ours, theirs)
  counts = (w != 0.5) & (ours != theirs)
  longer = (w[counts] == 1) == (ours[counts] > theirs[counts])
  own = {k: fit[k] for k in ("slope", "why", "n")}
  return dict(longer=intervals.proportion(longer)) | own
