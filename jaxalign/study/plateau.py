"""How win rate grows with data: a plateau, or growth with no end in sight.

R(x) = r - (r - a) exp(-b x), Khera et al. 2024, equation 1, is fitted beside a
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


class _Points(NamedTuple):
  """What a curve is fitted to."""

  x: np.ndarray  # [n] percent of the data
  y: np.ndarray  # [n] win rate
  w: np.ndarray  # [n] weights
  bounds: tuple[float, float]  # of a and r, for the plateau alone


def _solve(
  name: str, shape: float, points: _Points, fixed: tuple | None = None
) -> tuple[float, np.ndarray]:
  """Weighted sum of squares and the two linear numbers, given the shape.

  For a profile one is `fixed`: (0 for a or 1 for r, its value).
  """
  x, y, w, (low, high) = points
  basis = np.stack(CURVES[name].weights(x, shape), axis=1)
  basis = basis * np.sqrt(w)[:, None]
  aim = y * np.sqrt(w)

  def miss(numbers: np.ndarray) -> float:
    return float(((aim - basis @ numbers) ** 2).sum())

  def held(which: int, value: float) -> np.ndarray:
    column = basis[:, 1 - which]
    norm = column @ column
    # A column of zeros: that number has no say at these points.
    other = column @ (aim - value * basis[:, which]) / norm if norm > 0 else 0
    other = min(max(other, low), high)
    return np.array([value, other] if which == 0 else [other, value])

  if fixed is not None:
    found = held(*fixed)
    return miss(found), found
  found = np.linalg.lstsq(basis, aim, rcond=None)[0]
  if name == "plateau" and not (low <= found.min() and found.max() <= high):
    # A sum of squares is convex: its least in the box is on an edge.
    found = min((held(i, v) for i in (0, 1) for v in (low, high)), key=miss)
  return miss(found), found


def _best(
  name: str, points: _Points, fixed: tuple | None = None
) -> tuple[float, float, np.ndarray]:
  """(sum of squares, shape, linear numbers) of the best fit."""
  grid = CURVES[name].shapes(points.x.max())

  def cost(log_shape: float) -> float:
    return _solve(name, float(np.exp(log_shape)), points, fixed)[0]

  costs = [cost(s) for s in np.log(grid)]
  i = int(np.argmin(costs))
  shape = float(grid[i])
  if 0 < i < len(grid) - 1:
    found = _least(cost, *np.log(grid[[i - 1, i + 1]]), xatol=1e-10)
    shape = float(np.exp(found.x)) if found.fun <= costs[i] else shape
  missed, numbers = _solve(name, shape, points, fixed)
  return missed, shape, numbers


def _least(cost: Callable, low: float, high: float, xatol: float) -> Any:
  """scipy's bounded search of one number."""
  return optimize.minimize_scalar(
    cost, bounds=(low, high), method="bounded", options=dict(xatol=xatol)
  )


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


def _held_out_error(name: str, points: _Points) -> float:
  """Root mean square error at each x when the fit has not seen it.

  All but the smallest: the point without data is always measured, and a curve
  with no point near it may say anything there.
  """
  x, y, w, _ = points
  missed, weight = 0.0, 0.0
  for left_out in np.unique(x)[1:]:
    out = x == left_out
    rest = points._replace(x=x[~out], y=y[~out], w=w[~out])
    _, shape, found = _best(name, rest)
    predicted = np.stack(CURVES[name].weights(x[out], shape), axis=1) @ found
    missed += float((w[out] * (y[out] - predicted) ** 2).sum())
    weight += float(w[out].sum())
  return float(np.sqrt(missed / weight))


def _significant(least: float, points: _Points, known: bool) -> float:
  """The sum of squares above which a value is outside its 95 % interval."""
  freedom = len(points.y) - 3
  scale = least / freedom
  if known:
    return least + max(1.0, scale) * stats.chi2.ppf(0.95, 1)
  # The unknown variance is paid for by F in place of chi-squared. An exact
  # fit still rounds: below that there is nothing to compare.
  floor = 1e-12 * float((points.w * points.y**2).sum())
  return least + max(scale, floor) * stats.f.ppf(0.95, 1, freedom)


def _points(
  x: Sequence[float],
  y: Sequence[float],
  se: Sequence[float] | None,
  bounds: tuple[float, float],
) -> _Points:
  """The points, checked; see `fit`."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  error = np.ones_like(y) if se is None else np.asarray(se, np.float64)
  if not x.shape == y.shape == error.shape or x.ndim != 1:
    raise DataError(
      f"plateau: {x.shape} data fractions, {y.shape} win rates and "
      f"{error.shape} errors, wanted one of each a point"
    )
  if not bounds[0] < bounds[1]:
    raise ConfigError(f"plateau: bounds {bounds}, wanted (least, most)")
  finite = all(np.isfinite(v).all() for v in (x, y, error))
  if not finite or (x < 0).any() or (error <= 0).any():
    raise DataError(
      "plateau: wanted finite win rates, data fractions of at "
      "least 0 and standard errors above 0; found "
      f"x {x.tolist()}, y {y.tolist()}, se {error.tolist()}"
    )
  if (y < bounds[0]).any() or (y > bounds[1]).any():
    raise DataError(
      f"plateau: win rates {y.tolist()} leave the bounds "
      f"{bounds}; set bounds to the unit they are in"
    )
  if (distinct := len(np.unique(x))) < LEAST:
    raise DataError(
      f"plateau: {distinct} different data fractions, wanted at "
      f"least {LEAST}: the curve alone has three numbers; add budgets"
    )
  return _Points(x, y, 1 / error**2, bounds)


def fit(
  x: Sequence[float],
  y: Sequence[float],
  se: Sequence[float] | None = None,
  *,
  bounds: tuple[float, float] = (0.0, 100.0),
) -> dict[str, Any]:
  """Fits the plateau, bounds its numbers, and weighs it against the others.

  Args:
    x: [n] percent of the data; one x may come several times (seeds).
    y: [n] win rate, percent.
    se: [n] standard errors of y, in its unit; None: all alike, unknown. Given,
      they are believed, and widened where the curve misses by more than them.
    bounds: least and most of r and a; (0, 1) where win rates are fractions.

  Returns:
    "r", "a", "b": {"value", "low", "high"}; a bound of None was not reached,
    the points do not bound the number on that side.
    "identified": every bound was reached, and R rises to r: a plateau is
      supported.
    "curves": {name: {"formula", "numbers", "r2", "held_out"}}, the error of
      predicting each x but the smallest from the others, in the unit of y.
    "best": the curve with the least held-out error.
    "x", "y", "se", "bounds": as given.
    "words": what may be said, a list of sentences.

  Raises:
    DataError: fewer than four different x, or numbers that are none.
    ConfigError: bounds the wrong way round.
  """
  points = _points(x, y, se, bounds)
  least, b, (a, r) = _best("plateau", points)
  most = _significant(least, points, se is not None)
  out: dict[str, Any] = {}
  for which, name, value in ((1, "r", r), (0, "a", a)):
    profile = lambda v, i=which: _best("plateau", points, (i, v))[0]
    ends = (_crossing(profile, float(value), end, most) for end in bounds)
    out[name] = dict(zip(("value", "low", "high"), (float(value), *ends)))
  profile = lambda log_b: _solve("plateau", float(np.exp(log_b)), points)[0]
  shapes = CURVES["plateau"].shapes(points.x.max())
  ends = [
    _crossing(profile, np.log(b), end, most) for end in np.log(shapes[[0, -1]])
  ]
  low, high = (None if end is None else float(np.exp(end)) for end in ends)
  out["b"] = dict(value=b, low=low, high=high)
  _, ys, w, _ = points
  total = float((w * (ys - np.average(ys, weights=w)) ** 2).sum())
  out["curves"] = {
    name: dict(
      formula=curve.formula,
      numbers=curve.numbers,
      r2=1 - _best(name, points)[0] / total if total > 0 else None,
      held_out=_held_out_error(name, points),
    )
    for name, curve in CURVES.items()
  }
  out["best"] = min(out["curves"], key=lambda n: out["curves"][n]["held_out"])
  bounded = None not in (out["b"]["low"], out["r"]["low"], out["r"]["high"])
  # Without a gain there is nothing for b to be the rate of.
  out["identified"] = bool(r > a and bounded and out["r"]["low"] > float(a))
  out |= dict(x=points.x.tolist(), y=ys.tolist(), bounds=list(bounds))
  out["se"] = None if se is None else np.asarray(se, np.float64).tolist()
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
    fit: of `fit`.
    margin: in the unit of its win rates, above 0.

  Returns:
    {"value", "low", "high", "margin"}, percent; 0 where the whole gain is
    within the margin; "low" 0 where no data at all is not excluded, "high"
    None where all the data is not.
  """
  if not margin > 0:
    raise ConfigError(f"margin {margin} of win rate, wanted above 0")
  points = _points(fit["x"], fit["y"], fit["se"], tuple(fit["bounds"]))
  x, y, w, (low, high) = points
  least, b, (a, r) = _best("plateau", points)
  most = _significant(least, points, fit["se"] is not None)
  value = float(np.log((r - a) / margin) / b) if r - a > margin else 0.0

  def missed(log_gain: Any, log_x: float) -> np.ndarray:
    gain = np.exp(np.atleast_1d(log_gain))[:, None]
    lost = gain * np.exp(-np.log(gain / margin) / np.exp(log_x) * x)
    top = np.average(y + lost, axis=1, weights=w)[:, None]
    top = np.minimum(np.maximum(top, low + gain), high)
    return (w * (y - top + lost) ** 2).sum(1)

  gains = np.linspace(np.log(margin) + 1e-6, np.log(high - low), 81)

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
    value, low, high = (
      end(fit[name][k], digits) for k in ("value", "low", "high")
    )
    return f"{name} = {value} ({low} to {high})"

  if fit["identified"]:
    most = data_for(fit, 0.9)
    beyond = most["high"] > max(fit["x"])
    out = [
      f"A plateau is identified: {with_ends('r', 2)}, "
      f"{with_ends('a', 2)}, {with_ends('b', 3)} per percent; 95 % "
      "profile intervals.",
      f"Nine tenths of the gain are had at {most['value']:.1f} % of the "
      f"data ({end(most['low'], 1)} to {most['high']:.1f}"
      + (", beyond the largest fraction measured)." if beyond else ")."),
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
    out.append(
      f"It predicts points left out best (error {error[best]:.2f}; "
      f"{second} {error[second]:.2f})."
    )
  else:
    out.append(
      f"A {best} predicts points left out better (error "
      f"{error[best]:.2f}, plateau {error['plateau']:.2f}): these points do "
      "not prefer a plateau."
    )
  return [*out, RECIPE]
