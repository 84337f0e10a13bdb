"""Win rate at equal length: what is left when longer answers earn nothing.

Judges like long answers, and some samplers pick them (the median of ISA's
literal order is twice the pool's). With d the difference in length, over its
standard deviation, the logistic model P(win) = s(c + g d) splits a win rate
into what length buys and the rest, s(c): the win rate were d zero (the idea of
AlpacaEval 2's length control, Dubois et al. 2024, without its other terms).
"""

from typing import Any

import numpy as np
from scipy import special

from jaxalign.errors import DataError
from jaxalign.eval import intervals

_Z = 1.959963984540054
_STEPS = 50
_FAR = 15.0  # log-odds beyond which a fit has run away: nothing bounds it


def controlled(
  won: np.ndarray, ours: np.ndarray, theirs: np.ndarray
) -> dict[str, Any]:
  """The win rate at equal length, beside the raw one.

  The interval is that of c, from the sandwich variance (a tie counts one half
  and varies less than a coin), carried to the win rate.

  Args:
    won: [n] 1 won, 0.5 tied, 0 lost.
    ours: [n] lengths of our answers.
    theirs: [n] lengths of the others', in the same unit.

  Returns:
    {"value", "low", "high", "n"}: at equal length; "raw": as `share`;
    "slope" {"value", "low", "high"}: log-odds for one standard deviation more;
    "longer": mean of ours - theirs; "why": None, or why there is no value.

  Raises:
    DataError: arrays that do not match, or that hold no outcomes or lengths.
  """
  won, ours, theirs = (np.asarray(v, np.float64) for v in (won, ours, theirs))
  if not won.shape == ours.shape == theirs.shape or won.ndim != 1:
    raise DataError(
      f"length control: {won.shape} outcomes, {ours.shape} and "
      f"{theirs.shape} lengths, wanted one of each a prompt"
    )
  if not ((won >= 0) & (won <= 1)).all():
    raise DataError(
      "length control: outcomes leave [0, 1]; wanted won 1, tied 0.5, lost 0"
    )
  if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
    raise DataError("length control: a length that is no number")
  n, d = len(won), ours - theirs
  none = dict(value=None, low=None, high=None)
  out: dict[str, Any] = dict(
    none,
    n=n,
    raw=intervals.share(won),
    slope=dict(none),
    longer=float(d.mean()) if n else None,
    why=None,
  )
  sd = float(d.std()) if n else 0.0
  if n < 3:
    return out | dict(why=f"{n} outcomes, wanted at least 3")
  if sd == 0:
    # Nothing varies with length; if there is a difference, it is in all.
    if d[0] == 0:
      return out | {k: out["raw"][k] for k in ("value", "low", "high")}
    return out | dict(
      why="every answer is longer by the same amount: length "
      "and quality cannot be told apart"
    )
  x = np.stack([np.ones(n), d / sd], axis=1)
  found = np.zeros(2)

  def loss(v: np.ndarray) -> float:
    return float((np.logaddexp(0, x @ v) - won * (x @ v)).sum())

  for _ in range(_STEPS):
    p = special.expit(x @ found)
    hessian = (x * (p * (1 - p))[:, None]).T @ x
    step = np.linalg.lstsq(hessian, x.T @ (won - p), rcond=None)[0]
    # Newton may overshoot where curvature is weak; half steps descend.
    while loss(found + step) > loss(found) + 1e-12 and abs(step).max() > 1e-12:
      step = step / 2
    found = found + step
    if abs(found).max() > _FAR or abs(step).max() < 1e-10:
      break
  if abs(found).max() > _FAR:
    return out | dict(
      why="length alone, or no loss at all, explains every "
      "outcome: the fit has no bound"
    )
  p = special.expit(x @ found)
  bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x)
  score = x * (won - p)[:, None]
  variance = bread @ (score.T @ score) @ bread * (n / (n - 2))
  half = _Z * np.sqrt(np.diag(variance))
  return out | dict(
    value=float(special.expit(found[0])),
    low=float(special.expit(found[0] - half[0])),
    high=float(special.expit(found[0] + half[0])),
    slope=dict(
      value=float(found[1]),
      low=float(found[1] - half[1]),
      high=float(found[1] + half[1]),
    ),
  )


def bias(
  won: np.ndarray, ours: np.ndarray, theirs: np.ndarray
) -> dict[str, Any]:
  """Whether a rater likes the longer of two answers.

  A rater may be right to: length is a bias only beside another rater, or
  where the two answers are known to be equally good.

  Args:
    won: [n] 1 where the first answer won, 0.5 tied, 0 lost.
    ours: [n] lengths of the first answers.
    theirs: [n] lengths of the second, in the same unit.

  Returns:
    {"longer": `share` of the verdicts that name a winner, the answers not
    equally long, in which the longer won; "slope": as of `controlled`, None
    with "why" where it cannot be told; "n": pairs}.
  """
  won, ours, theirs = (np.asarray(v, np.float64) for v in (won, ours, theirs))
  fit = controlled(won, ours, theirs)
  counts = (won != 0.5) & (ours != theirs)
  longer = (won[counts] == 1) == (ours[counts] > theirs[counts])
  return dict(
    longer=intervals.share(longer),
    slope=fit["slope"],
    why=fit["why"],
    n=len(won),
  )
