"""How win rate grows with data: a plateau, or growth with no end in sight.

R(x) = r - (r - a) exp(-b x), Khera et al. 2024, equation 1, is fitted beside a
power law, a logarithm and a straight line, and is believed only if the points
themselves bound it.

Given b, every curve here is linear in its other two numbers, so b alone is
searched: no start to choose, no local optimum. Intervals are by profile: the
values at which the best fit of all else is not significantly worse. Six
points, three of them spent on the fit, leave a bootstrap nothing to draw from;
and a profile that never rises is how an unidentified number shows itself,
where a bootstrap or a curvature would print an interval all the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

from jaxalign.errors import ConfigError, DataError

RECIPE = (
  "b is set by the learning rate and the number of epochs as much as "
  "by the data (0.021 to 0.195 on one and the same built-in world), "
  "so it compares data sets only under one recipe."
)
LEAST = 4  # different x that a curve of three numbers is fitted to
_GRID = 81  # values of the shape searched before it is refined
_SPAN = (1e-4, 1e3)  # b times the largest x: from a line to a step


def _plateau(x: np.ndarray, b: float) -> np.ndarray:
  """[n, 2] weights of a and r in R(x)."""
  decay = np.exp(-b * x)
  return np.stack([decay, 1 - decay], axis=1)


def _power(x: np.ndarray, k: float) -> np.ndarray:
  return np.stack([np.ones_like(x), x**k], axis=1)


def _logarithm(x: np.ndarray, _: float) -> np.ndarray:
  return np.stack([np.ones_like(x), np.log1p(x)], axis=1)


def _line(x: np.ndarray, _: float) -> np.ndarray:
  return np.stack([np.ones_like(x), x], axis=1)


# name -> (basis, formula, numbers fitted)
CURVES: dict[str, tuple[Callable[..., np.ndarray], str, int]] = {
  "plateau": (_plateau, "r - (r - a) exp(-b x)", 3),
  "power law": (_power, "a + c x^k", 3),
  "logarithm": (_logarithm, "a + c log(1 + x)", 2),
  "line": (_line, "a + c x", 2),
}


def _shapes(name: str, x: np.ndarray) -> np.ndarray:
  """The grid of the one number a curve is not linear in."""
  if name == "plateau":
    return np.geomspace(*_SPAN, _GRID) / x.max()
  return np.geomspace(0.01, 3, _GRID) if name == "power law" else np.ones(1)


def _solve(
  name: str,
  shape: float,
  x: np.ndarray,
  y: np.ndarray,
  w: np.ndarray,
  bounds: tuple[float, float],
  fixed: tuple[int, float] | None = None,
) -> tuple[float, np.ndarray]:
  """Weighted sum of squares and the two linear numbers, given the shape.

  Args:
    name: a key of CURVES.
    shape: b or k.
    x: [n] share of the data.
    y: [n] win rate.
    w: [n] weights.
    bounds: of a and r, for the plateau alone.
    fixed: (0 for a or 1 for r, its value), for a profile.
  """
  basis = CURVES[name][0](x, shape) * np.sqrt(w)[:, None]
  aim = y * np.sqrt(w)

  def miss(numbers: np.ndarray) -> float:
    return float(((aim - basis @ numbers) ** 2).sum())

  def held(which: int, value: float) -> np.ndarray:
    column = basis[:, 1 - which]
    norm = column @ column
    # A column of zeros: that number has no say at these points.
    other = column @ (aim - value * basis[:, which]) / norm if norm > 0 else 0
    other = min(max(other, bounds[0]), bounds[1])
    return np.array([value, other] if which == 0 else [other, value])

  if fixed is not None:
    found = held(*fixed)
  else:
    found = np.linalg.lstsq(basis, aim, rcond=None)[0]
    inside = bounds[0] <= found.min() and found.max() <= bounds[1]
    if name == "plateau" and not inside:
      # A sum of squares is convex: its least in the box is on an edge.
      found = min((held(i, v) for i in (0, 1) for v in bounds), key=miss)
  return miss(found), found


def _best(
  name: str,
  x: np.ndarray,
  y: np.ndarray,
  w: np.ndarray,
  bounds: tuple[float, float],
  fixed: tuple[int, float] | None = None,
) -> tuple[float, float, np.ndarray]:
  """(sum of squares, shape, linear numbers) of the best fit."""
  grid = _shapes(name, x)

  def cost(log_shape: float) -> float:
    return _solve(name, float(np.exp(log_shape)), x, y, w, bounds, fixed)[0]

  costs = [cost(s) for s in np.log(grid)]
  i = int(np.argmin(costs))
  shape = float(grid[i])
  if 0 < i < len(grid) - 1:
    found = optimize.minimize_scalar(
      cost,
      bounds=np.log(grid[[i - 1, i + 1]]),
      method="bounded",
      options=dict(xatol=1e-10),
    )
    shape = float(np.exp(found.x)) if found.fun <= costs[i] else shape
  missed, numbers = _solve(name, shape, x, y, w, bounds, fixed)
  return missed, shape, numbers


def predict(fit: dict[str, Any], x: Sequence[float]) -> np.ndarray:
  """R(x) of a fitted plateau, in the unit of its win rates."""
  return fit["r"]["value"] - (fit["r"]["value"] - fit["a"]["value"]) * np.exp(
    -fit["b"]["value"] * np.asarray(x, np.float64)
  )


def _crossing(
  cost: Callable[[float], float],
  start: float,
  end: float,
  most: float,
  steps: int = 24,
) -> float | None:
  """Where a profile first exceeds `most` from start to end; None: nowhere."""
  last = start
  for point in np.linspace(start, end, steps + 1)[1:]:
    if cost(float(point)) > most:
      return float(
        optimize.brentq(lambda v: cost(v) - most, last, point, xtol=1e-9)
      )
    last = float(point)
  return None


def _held_out(
  name: str,
  x: np.ndarray,
  y: np.ndarray,
  w: np.ndarray,
  bounds: tuple[float, float],
) -> float:
  """Root mean square error at each x when the fit has not seen it.

  All but the smallest: the start is always measured, and a curve with no
  point near it may say anything there.
  """
  missed, weight = 0.0, 0.0
  for left_out in np.unique(x)[1:]:
    out = x == left_out
    _, shape, found = _best(name, x[~out], y[~out], w[~out], bounds)
    error = y[out] - CURVES[name][0](x[out], shape) @ found
    missed += float((w[out] * error**2).sum())
    weight += float(w[out].sum())
  return float(np.sqrt(missed / weight))


def _significant(
  least: float, y: np.ndarray, w: np.ndarray, known: bool
) -> float:
  """The sum of squares above which a value is outside its 95 % interval."""
  freedom = len(y) - 3
  scale = least / freedom
  if not known:
    # The unknown variance is paid for by F in place of chi-squared. An exact
    # fit still rounds: below that there is nothing to compare.
    floor = 1e-12 * float((w * y * y).sum())
    return least + max(scale, floor) * stats.f.ppf(0.95, 1, freedom)
  return least + max(1.0, scale) * stats.chi2.ppf(0.95, 1)


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
    bounds: least and most of r and a; (0, 1) where win rates are shares.

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
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  spread = np.ones_like(y) if se is None else np.asarray(se, np.float64)
  if not x.shape == y.shape == spread.shape or x.ndim != 1:
    raise DataError(
      f"plateau: {x.shape} data shares, {y.shape} win rates and "
      f"{spread.shape} errors, wanted one of each a point"
    )
  if not bounds[0] < bounds[1]:
    raise ConfigError(f"plateau: bounds {bounds}, wanted (least, most)")
  if not all(np.isfinite(v).all() for v in (x, y, spread)) or (
    (x < 0).any() or (spread <= 0).any()
  ):
    raise DataError(
      "plateau: wanted finite win rates, data shares of at "
      "least 0 and standard errors above 0; found "
      f"x {x.tolist()}, y {y.tolist()}, se {spread.tolist()}"
    )
  if (y < bounds[0]).any() or (y > bounds[1]).any():
    raise DataError(
      f"plateau: win rates {y.tolist()} leave the bounds "
      f"{bounds}; set bounds to the unit they are in"
    )
  distinct = len(np.unique(x))
  if distinct < LEAST:
    raise DataError(
      f"plateau: {distinct} different data shares, wanted at "
      "least 4: the curve alone has three numbers; add budgets"
    )
  w = 1 / spread**2
  least, b, (a, r) = _best("plateau", x, y, w, bounds)
  most = _significant(least, y, w, se is not None)

  ends = np.log(_shapes("plateau", x)[[0, -1]])

  def along_b(log_b: float) -> float:
    return _solve("plateau", float(np.exp(log_b)), x, y, w, bounds)[0]

  out: dict[str, Any] = {}
  b_low, b_high = (_crossing(along_b, np.log(b), end, most) for end in ends)
  for which, name, value in ((1, "r", r), (0, "a", a)):

    def along(v: float, which: int = which) -> float:
      return _best("plateau", x, y, w, bounds, (which, v))[0]

    low, high = (_crossing(along, float(value), end, most) for end in bounds)
    out[name] = dict(value=float(value), low=low, high=high)
  out["b"] = dict(
    value=b,
    low=None if b_low is None else float(np.exp(b_low)),
    high=None if b_high is None else float(np.exp(b_high)),
  )

  total = float((w * (y - np.average(y, weights=w)) ** 2).sum())
  out["curves"] = {}
  for name, (_, formula, numbers) in CURVES.items():
    missed = _best(name, x, y, w, bounds)[0]
    out["curves"][name] = dict(
      formula=formula,
      numbers=numbers,
      r2=1 - missed / total if total > 0 else None,
      held_out=_held_out(name, x, y, w, bounds),
    )
  out["best"] = min(out["curves"], key=lambda n: out["curves"][n]["held_out"])
  out["identified"] = bool(
    r > a
    and out["b"]["low"] is not None
    and all(out["r"][k] is not None for k in ("low", "high"))
    # Without a gain there is nothing for b to be the rate of.
    and out["r"]["low"] > out["a"]["value"]
  )
  out["x"], out["y"], out["bounds"] = x.tolist(), y.tolist(), list(bounds)
  out["se"] = None if se is None else spread.tolist()
  out["words"] = words(out)
  return out


def data_for(found: dict[str, Any], share: float) -> dict[str, Any]:
  """The percent of data at which `share` of the gain r - a is had.

  Returns:
    {"value", "low", "high"}: -log(1 - share) / b; None where b has no bound.
  """
  if not 0 < share < 1:
    raise ConfigError(f"share of the gain {share}, wanted between 0 and 1")

  def at(b: float | None) -> float | None:
    return None if b is None else float(-np.log1p(-share) / b)

  b = found["b"]
  return dict(value=at(b["value"]), low=at(b["high"]), high=at(b["low"]))


def enough(found: dict[str, Any], margin: float) -> dict[str, Any]:
  """The least percent of data whose win rate is within `margin` of r.

  r - R(x) = margin at x = log((r - a) / margin) / b. The interval is by
  profile in x itself: given x and the gain r - a, b follows and the curve is
  linear in r, so the gain alone is searched.

  Args:
    found: of `fit`.
    margin: in the unit of its win rates, above 0.

  Returns:
    {"value", "low", "high", "margin"}, percent; 0 where the whole gain is
    within the margin; "low" 0 where no data at all is not excluded, "high"
    None where all the data is not.
  """
  if not margin > 0:
    raise ConfigError(f"margin {margin} of win rate, wanted above 0")
  x, y = np.asarray(found["x"]), np.asarray(found["y"])
  w = (
    np.ones_like(y) if found["se"] is None else 1 / np.asarray(found["se"]) ** 2
  )
  low, high = found["bounds"]
  at, b, (a, r) = _best("plateau", x, y, w, (low, high))
  most = _significant(at, y, w, found["se"] is not None)
  value = float(np.log((r - a) / margin) / b) if r - a > margin else 0.0

  def missed(log_gain: Any, log_x: float) -> np.ndarray:
    gain = np.exp(np.atleast_1d(log_gain))[:, None]
    lost = gain * np.exp(-np.log(gain / margin) / np.exp(log_x) * x)
    top = np.average(y + lost, axis=1, weights=w)[:, None]
    top = np.minimum(np.maximum(top, low + gain), high)
    return (w * (y - top + lost) ** 2).sum(1)

  gains = np.linspace(np.log(margin) + 1e-6, np.log(high - low), 81)

  def along(log_x: float) -> float:
    costs = missed(gains, log_x)
    i = int(np.argmin(costs))
    inner = optimize.minimize_scalar(
      lambda gain: missed(gain, log_x)[0],
      method="bounded",
      bounds=(gains[max(i - 1, 0)], gains[min(i + 1, len(gains) - 1)]),
      options=dict(xatol=1e-7),
    )
    return min(float(costs[i]), float(inner.fun))

  least = np.log(x[x > 0].min()) - 5
  # The side of no data has no x of its own: the profile begins at the fit.
  start = np.log(value) if value > 0 else least
  most = max(most, along(start))  # an exact fit still rounds
  below = (
    _crossing(along, max(start, least), least, most) if value > 0 else None
  )
  above = (
    _crossing(along, start, np.log(100.0), most)
    if (start < np.log(100.0))
    else None
  )
  return dict(
    value=value,
    margin=margin,
    low=0.0 if below is None else float(np.exp(below)),
    high=None if above is None else float(np.exp(above)),
  )


def words(found: dict[str, Any]) -> list[str]:
  """What a fit supports, in sentences that claim no more."""
  curves, best = found["curves"], found["best"]

  def held(name: str) -> str:
    return f"{curves[name]['held_out']:.2f}"

  if not found["identified"]:
    out = [
      "Plateau not identified: these points do not bound it (best fit "
      f"r = {found['r']['value']:.2f}, b = {found['b']['value']:.3f} per "
      "percent)."
    ]
  else:

    def with_ends(name: str, digits: int) -> str:
      n = found[name]
      high = "no bound" if n["high"] is None else f"{n['high']:.{digits}f}"
      low = "no bound" if n["low"] is None else f"{n['low']:.{digits}f}"
      return f"{name} = {n['value']:.{digits}f} ({low} to {high})"

    out = [
      f"A plateau is identified: {with_ends('r', 2)}, "
      f"{with_ends('a', 2)}, {with_ends('b', 3)} per percent; 95 % "
      "profile intervals."
    ]
    most = data_for(found, 0.9)
    out.append(
      f"Nine tenths of the gain are had at {most['value']:.1f} % of the "
      "data ("
      + ("no bound" if most["low"] is None else f"{most['low']:.1f}")
      + f" to {most['high']:.1f})."
    )
    if most["high"] > max(found["x"]):
      out[-1] = out[-1][:-1] + ", beyond the largest share measured)."
  if best == "plateau":
    second = min(
      (n for n in curves if n != best), key=lambda n: curves[n]["held_out"]
    )
    out.append(
      f"It predicts points left out best (error {held(best)}; "
      f"{second} {held(second)})."
    )
  else:
    out.append(
      f"A {best} predicts points left out better (error "
      f"{held(best)}, plateau {held('plateau')}): these points do "
      "not prefer a plateau."
    )
  return out + [RECIPE]
