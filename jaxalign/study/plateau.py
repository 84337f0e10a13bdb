"""How win rate grows with data: a plateau, or growth with no end in sight.

R(x) = r - (r - a) exp(-b x), Khera et al. 2024, equation 1, is fitted next to a
power law, a logarithm and a straight line, and is believed only if the points
themselves bound it.

Given b, every curve here is linear in its other two numbers, so b alone is
searched: no start to choose, no local optimum, which scipy's curve_fit has.
Intervals are by profile: the values at which the best fit of all else is not
significantly worse. Six points, three of them spent on the fit, leave a
bootstrap nothing to draw from; and a profile that never rises is how an
unidentified number shows itself, where a bootstrap or a curvature would print
an interval all the same.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from jaxalign.core.errors import ConfigError, DataError

RECIPE = (
  "b is set by the learning rate and the number of epochs as much as "
  "by the data (0.021 to 0.195 on one and the same built-in world), "
  "so it compares data sets only under one recipe."
)
LEAST = 4  # different x that a curve of three numbers is fitted to
_PERCENT = (0.0, 100.0)  # least and most of r and a
_GRID = 81  # values of the shape searched before it is refined


class _Curve(NamedTuple):
  """A curve that is linear in two numbers, given its shape."""

  formula: str
  numbers: int  # fitted
  weights: Callable  # (x, shape) -> of the two linear numbers
  shapes: Callable  # largest x -> the grid of shapes


_one_shape = lambda _: np.ones(1)
CURVES: dict[str, _Curve] = {
  "plateau": _Curve(
    "r - (r - a) exp(-b x)",
    3,
    lambda x, b: (np.exp(-b * x), 1 - np.exp(-b * x)),
    lambda most: np.geomspace(1e-4, 1e3, _GRID) / most,  # a line to a step
  ),
  "power law": _Curve(
    "a + c x^k",
    3,
    lambda x, k: (np.ones_like(x), x**k),
    lambda _: np.geomspace(0.01, 3, _GRID),
  ),
  "logarithm": _Curve(
    "a + c log(1 + x)",
    2,
    lambda x, _: (np.ones_like(x), np.log1p(x)),
    _one_shape,
  ),
  "line": _Curve("a + c x", 2, lambda x, _: (np.ones_like(x), x), _one_shape),
}


Fixed = tuple[int, float]  # 0 for a or 1 for r, and its value


def _solve(
  name: str, shape: float, x: np.ndarray, y: np.ndarray, fixed: Fixed | None
) -> tuple[float, np.ndarray]:
  """Sum of squares and the two linear numbers, given the shape.

  For a profile one of these is `fixed`.
  """
  basis = np.stack(CURVES[name].weights(x, shape), axis=1)
  low, high = _PERCENT
  miss = lambda numbers: float(((y - basis @ numbers) ** 2).sum())

  def held(which: int, value: float) -> np.ndarray:
    column = basis[:, 1 - which]
    norm = column @ column
    # A column of zeros: these points do not depend on that number.
    other = column @ (y - value * basis[:, which]) / norm if norm > 0 else 0
    other = min(max(other, low), high)
    return np.array([value, other] if which == 0 else [other, value])

  if fixed is not None:
    found = held(*fixed)
    return miss(found), found
  found = np.linalg.lstsq(basis, y, rcond=None)[0]
  if name == "plateau" and not (low <= found.min() and found.max() <= high):
    # A sum of squares is convex: its least in the box is on an edge.
    found = min((held(i, v) for i in (0, 1) for v in _PERCENT), key=miss)
  return miss(found), found


def _least(cost: Callable, low: float, high: float, xatol: float) -> Any:
  """scipy's bounded search of one number."""
  return optimize.minimize_scalar(
    cost, bounds=(low, high), method="bounded", options=dict(xatol=xatol)
  )


def _best(
  name: str, x: np.ndarray, y: np.ndarray, fixed: Fixed | None = None
) -> tuple[float, float, np.ndarray]:
  """(sum of squares, shape, linear numbers) of the best fit."""
  grid = CURVES[name].shapes(x.max())
  cost = lambda log_shape: _solve(name, np.exp(log_shape), x, y, fixed)[0]
  costs = [cost(s) for s in np.log(grid)]
  i = int(np.argmin(costs))
  shape = float(grid[i])
  if 0 < i < len(grid) - 1:
    found = _least(cost, *np.log(grid[[i - 1, i + 1]]), xatol=1e-10)
    shape = float(np.exp(found.x)) if found.fun <= costs[i] else shape
  missed, numbers = _solve(name, shape, x, y, fixed)
  return missed, shape, numbers


def _crossing(
  cost: Callable, start: float, end: float, most: float
) -> float | None:
  """Where a profile first exceeds `most` from start to end; None: nowhere."""
  last = start
  for point in map(float, np.linspace(start, end, 25)[1:]):
    if cost(point) > most:
      over = lambda v: cost(v) - most
      return float(optimize.brentq(over, last, point, xtol=1e-9))
    last = point
  return None


def _held_out_error(name: str, x: np.ndarray, y: np.ndarray) -> float:
  """Root mean square error at each x when the fit has not seen it.

  All but the smallest: the point without data is always measured, and a curve
  with no point near it may say anything there.
  """
  errors = []
  for left_out in np.unique(x)[1:]:
    out = x == left_out
    _, shape, found = _best(name, x[~out], y[~out])
    predicted = np.stack(CURVES[name].weights(x[out], shape), axis=1) @ found
    errors.append(y[out] - predicted)
  return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


def _significant(least: float, y: np.ndarray) -> float:
  """The sum of squares above which a value is outside its 95 % interval."""
  freedom = len(y) - 3
  # An exact fit still rounds: below that there is nothing to compare.
  scale = max(least / freedom, 1e-12 * float((y * y).sum()))
  return least + scale * stats.f.ppf(0.95, 1, freedom)


def _checked(
  x: Sequence[float], y: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  low, high = _PERCENT
  distinct = len(np.unique(x))
  for bad, words in (
    (
      x.shape != y.shape or x.ndim != 1,
      f"{x.shape} data fractions and {y.shape} win rates, wanted one of each a "
      "point",
    ),
    (
      not (np.isfinite(x).all() and np.isfinite(y).all()) or (x < 0).any(),
      "wanted finite win rates and data fractions of at least 0; found x "
      f"{x.tolist()}, y {y.tolist()}",
    ),
    (
      (y < low).any() or (y > high).any(),
      f"win rates {y.tolist()} leave the bounds {_PERCENT}; wanted percent",
    ),
    (
      distinct < LEAST,
      f"{distinct} different data fractions, wanted at least {LEAST}: the "
      "curve alone has three numbers; add budgets",
    ),
  ):
    if bad:
      raise DataError(f"plateau: {words}")
  return x, y


def fit_plateau(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
  """Fits the plateau, bounds its numbers, and weighs it against the others.

  Args:
    x: [n] percent of the data; one x may come several times (seeds).
    y: [n] win rate, percent.

  Returns:
    "r", "a", "b": {"value", "low", "high"}; a bound of None was not reached,
    the points do not bound the number on that side.
    "identified": every bound was reached, and R rises to r: a plateau is
      supported.
    "curves": {name: {"formula", "numbers", "r2", "held_out"}}, the error of
      predicting each x but the smallest from the others, in the unit of y.
    "best": the curve with the least held-out error.
    "x", "y": as given.
    "words": what the points support, a list of sentences.

  Raises:
    DataError: fewer than four different x, or numbers that are none.
  """
  x, y = _checked(x, y)
  least, b, (a, r) = _best("plateau", x, y)
  most = _significant(least, y)
  out: dict[str, Any] = {}
  for which, name, value in ((1, "r", r), (0, "a", a)):
    profile = lambda v, i=which: _best("plateau", x, y, (i, v))[0]
    low, high = (_crossing(profile, float(value), e, most) for e in _PERCENT)
    out[name] = dict(value=float(value), low=low, high=high)
  profile = lambda log_b: _solve("plateau", np.exp(log_b), x, y, None)[0]
  ends = np.log(CURVES["plateau"].shapes(x.max())[[0, -1]])
  low, high = (_crossing(profile, np.log(b), end, most) for end in ends)
  exp = lambda end: None if end is None else float(np.exp(end))
  out["b"] = dict(value=b, low=exp(low), high=exp(high))
  total = float(((y - y.mean()) ** 2).sum())
  out["curves"] = {
    name: dict(
      formula=curve.formula,
      numbers=curve.numbers,
      r2=1 - _best(name, x, y)[0] / total if total > 0 else None,
      held_out=_held_out_error(name, x, y),
    )
    for name, curve in CURVES.items()
  }
  out["best"] = min(out["curves"], key=lambda n: out["curves"][n]["held_out"])
  bounded = None not in (out["b"]["low"], out["r"]["low"], out["r"]["high"])
  # Without a gain there is nothing for b to be the rate of.
  out["identified"] = bool(r > a and bounded and out["r"]["low"] > a)
  out |= dict(x=x.tolist(), y=y.tolist())
  return out | dict(words=_sentences(out))


def data_for(fit: dict[str, Any], fraction: float) -> dict[str, Any]:
  """The percent of data at which this fraction of the gain r - a is had.

  Returns:
    {"value", "low", "high"}: -log(1 - fraction) / b; None where b is unbounded.
  """
  if not 0 < fraction < 1:
    raise ConfigError(
      f"fraction of the gain {fraction}, wanted between 0 and 1"
    )
  at = lambda b: None if b is None else float(-np.log1p(-fraction) / b)
  b = fit["b"]
  return dict(value=at(b["value"]), low=at(b["high"]), high=at(b["low"]))


def enough(fit: dict[str, Any], margin: float) -> dict[str, Any]:
  """The least percent of data whose win rate is within `margin` of r.

  r - R(x) = margin at x = log((r - a) / margin) / b. The interval is by
  profile in x itself: given x and the gain r - a, b follows and the curve is
  linear in r, so the gain alone is searched.

  Args:
    fit: of `fit_plateau`.
    margin: in the unit of its win rates, above 0.

  Returns:
    {"value", "low", "high", "margin"}, percent; 0 where the whole gain is
    within the margin; "low" 0 where no data at all is not excluded, "high"
    None where all the data is not.
  """
  if not margin > 0:
    raise ConfigError(f"margin {margin} of win rate, wanted above 0")
  x, y = np.asarray(fit["x"]), np.asarray(fit["y"])
  least, b, (a, r) = _best("plateau", x, y)
  most = _significant(least, y)
  value = float(np.log((r - a) / margin) / b) if r - a > margin else 0.0

  def missed(log_gain: Any, log_x: float) -> np.ndarray:
    gain = np.exp(np.atleast_1d(log_gain))[:, None]
    lost = gain * np.exp(-np.log(gain / margin) / np.exp(log_x) * x)
    top = (y + lost).mean(axis=1, keepdims=True)
    top = np.minimum(np.maximum(top, _PERCENT[0] + gain), _PERCENT[1])
    return ((y - top + lost) ** 2).sum(1)

  gains = np.linspace(np.log(margin) + 1e-6, np.log(np.ptp(_PERCENT)), _GRID)

  def profile(log_x: float) -> float:
    costs = missed(gains, log_x)
    i = int(np.argmin(costs))
    ends = gains[max(i - 1, 0)], gains[min(i + 1, len(gains) - 1)]
    inner = _least(lambda g: missed(g, log_x)[0], *ends, xatol=1e-7)
    return min(float(costs[i]), float(inner.fun))

  first, last = np.log(x[x > 0].min()) - 5, np.log(100.0)
  # The side of no data has no x of its own: the profile begins at the fit.
  start = np.log(value) if value > 0 else first
  most = max(most, profile(start))  # an exact fit still rounds
  below = above = None
  if value > 0:
    below = _crossing(profile, max(start, first), first, most)
  if start < last:
    above = _crossing(profile, start, last, most)
  return dict(
    value=value,
    margin=margin,
    low=0.0 if below is None else float(np.exp(below)),
    high=None if above is None else float(np.exp(above)),
  )


def _sentences(fit: dict[str, Any]) -> list[str]:
  """What a fit supports, in sentences that claim no more."""
  end = lambda x, digits: "no bound" if x is None else f"{x:.{digits}f}"

  def with_ends(name: str, digits: int) -> str:
    ends = (end(fit[name][k], digits) for k in ("value", "low", "high"))
    return "{} = {} ({} to {})".format(name, *ends)

  if fit["identified"]:
    most = data_for(fit, 0.9)
    beyond = ", beyond the largest fraction measured"
    out = [
      f"A plateau is identified: {with_ends('r', 2)}, "
      f"{with_ends('a', 2)}, {with_ends('b', 3)} per percent; 95 % "
      "profile intervals.",
      f"Nine tenths of the gain are had at {most['value']:.1f} % of the "
      f"data ({end(most['low'], 1)} to {most['high']:.1f}"
      f"{beyond * (most['high'] > max(fit['x']))}).",
    ]
  else:
    out = [
      "Plateau not identified: these points do not bound it (best fit "
      f"r = {fit['r']['value']:.2f}, b = {fit['b']['value']:.3f} per "
      "percent)."
    ]
  error = {name: curve["held_out"] for name, curve in fit["curves"].items()}
  best, second, *_ = sorted(error, key=error.get)
  if best == "plateau":
    words = f"It predicts points left out best (error {error[best]:.2f}; "
    words += f"{second} {error[second]:.2f})."
  else:
    words = f"A {best} predicts points left out better (error "
    words += f"{error[best]:.2f}, plateau {error['plateau']:.2f}): these "
    words += "points do not prefer a plateau."
  return [*out, words, RECIPE]
