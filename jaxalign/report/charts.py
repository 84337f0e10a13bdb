"""Where the marks of a chart lie; `templates/charts.html` draws them as SVG.

Horizontal places are percentages of the drawing area, so a chart fills any
width while its text keeps its size. Values are in the unit of their axis;
those that are not finite have no place.
"""

from collections.abc import Iterable, Sequence
import math
from typing import Any, NamedTuple

from jaxalign.report.nodes import finite, Node, number, visible

COLOURS = 7  # --c0 .. --c6 in the style sheet; dashes tell them apart too
MUTED = -1  # the colour of a baseline


class Row(NamedTuple):
  """One row of an interval plot: where it lies and its numbers in words."""

  label: Any
  value: Any
  low: Any = None
  high: Any = None
  text: str = ""
  colour: int = 0


class Series(NamedTuple):
  """One line: points (x, y), and bounds (x, low, high) if it has a band."""

  name: Any
  points: Sequence[Any]
  colour: int = 0
  band: Sequence[Any] = ()


def colour_class(colour: int) -> str:
  """The class of an area or a mark."""
  return "cm" if colour < 0 else f"c{colour % COLOURS}"


def curve_class(colour: int) -> str:
  """The class of a line: colour and dashes."""
  return f"curve d{max(colour, 0) % 4} {colour_class(colour)}"


def drawable(value: Any) -> float | None:
  """The value, or None where it has no place on an axis."""
  found = finite(value)  # spans stay finite
  return None if found is None or abs(found) > 1e200 else found


def ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
  """Round values in [low, high], about `count`, and their labels."""
  span = high - low
  if not (math.isfinite(span) and span > 0):
    return []
  power = 10.0 ** math.floor(math.log10(span / count))
  # The round step nearest in ratio: 1, 2 and 5 meet at their means.
  means = ((1, 2**0.5), (2, 10**0.5), (5, 50**0.5), (10, math.inf))
  step = power * next(s for s, most in means if span / count < most * power)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  decimals = max(0, -math.floor(math.log10(step) + 1e-9))
  marks = [i * step for i in range(first, last + 1)]
  return [(mark, _tick(mark, decimals)) for mark in marks]


def _tick(value: float, decimals: int) -> str:
  """A tick's label; the ends of the float range fall back to an exponent."""
  if abs(value) >= 1e7 or decimals > 6:
    return number(value)
  text = f"{value:,.{decimals}f}"
  zero = not text.strip("-0.,")
  return text.lstrip("-") if zero else text.replace("-", "−")


class Axis(NamedTuple):
  """A scale from `low` to a higher `high`."""

  low: float
  high: float

  @classmethod
  def around(cls, values: Iterable[float | None]) -> "Axis":
    """A little wider than the values; never of no width."""
    found = [v for v in values if v is not None]
    low, high = min(found), max(found)
    space = 0.06 * (high - low)
    # Below this floats are too coarse, or the span overflows.
    if not high - low > 1e-9 * max(abs(low), abs(high)):
      space = abs(low) * 0.1 or 1.0
    return cls(low - space, high + space)

  def at(self, value: float) -> float:
    return (value - self.low) / (self.high - self.low)

  def x(self, value: float) -> str:
    """From the left."""
    return f"{100 * self.at(value):.2f}%"

  def y(self, value: float, height: float) -> float:
    """From the top of a drawing of this height."""
    return round(height * (1 - self.at(value)), 1)


class Intervals(NamedTuple):
  """What a forest plot draws; `places` are the value, low and high of rows."""

  axis: Axis
  places: list[list[float | None]]


def intervals_of(rows: Sequence[Row], reference: Any) -> Intervals | None:
  places = [[drawable(v) for v in row[1:4]] for row in rows]
  seen = sum(places, [])
  if seen.count(None) == len(seen):
    return None
  return Intervals(Axis.around([*seen, reference]), places)


def stacks_of(rows: Sequence[Any]) -> tuple[Axis, list] | None:
  """The axis of stacked bars, and (start, length, place, fraction) of each."""
  stacks, longest = [], 0.0
  for _, values, _ in rows:
    values = [max(0.0, drawable(v) or 0.0) for v in values]
    total, start = math.fsum(values), 0.0
    longest = max(longest, total)
    stacks.append([])
    for place, value in enumerate(values):
      if value > 0:
        stacks[-1].append((start, value, place, value / total))
      start += value
  return (Axis(0.0, longest), stacks) if 0 < longest < math.inf else None


class Histogram(NamedTuple):
  """Two histograms, each scaled to 100 % of its own total."""

  x: Axis
  y: Axis
  totals: list[float]
  bars: list[tuple[int, float, float, float]]  # which, from, to, height


def histogram_of(edges: Any, *counts: Any) -> Histogram | None:
  """None where edges do not rise, or counts are not one less than those."""
  edges = [drawable(e) for e in Node(edges)]
  found = [[max(0.0, drawable(v) or 0.0) for v in Node(c)] for c in counts]
  bins, totals = list(zip(edges, edges[1:])), list(map(math.fsum, found))
  good = bins and None not in edges and all(a < b for a, b in bins)
  if not (good and {*map(len, found)} == {len(bins)} and any(totals)):
    return None
  bars = [
    (which, a, b, 100 * v / totals[which])
    for which, values in enumerate(found)
    for (a, b), v in zip(bins, values)
    if v > 0
  ]
  y = Axis(0.0, 1.08 * max(tall for *_, tall in bars))
  return Histogram(Axis(edges[0], edges[-1]), y, totals, bars)


def pairs(points: Any) -> tuple[list[tuple[float, float]], int]:
  """The finite (x, y) of a curve by x, and how many were not finite."""
  every = [tuple(map(drawable, Node(p))) for p in Node(points)]
  found = [p for p in every if len(p) == 2 and None not in p]
  return sorted(found), len(every) - len(found)


def thin(points: Sequence[Any], limit: int = 75) -> tuple[list[Any], int]:
  """Means of k neighbours, so that about `limit` points stay, and k."""
  k = max(1, math.ceil(len(points) / limit))
  groups = [points[i : i + k] for i in range(0, len(points), k)]
  mean = lambda values: math.fsum(values) / len(values)
  return [tuple(map(mean, zip(*group))) for group in groups], k


class Lines(NamedTuple):
  """What a chart of lines draws, and in words what it leaves out."""

  series: list[Series]  # thinned; the band as its outline
  x: Axis | None
  y: Axis | None
  left_out: str

  @property
  def words(self) -> list[str]:
    ends = ((s.name, s.points[0][1], s.points[-1][1]) for s in self.series)
    return [f"{name} from {number(a)} to {number(b)}" for name, a, b in ends]

  def path(self, points: Sequence[Any], height: float) -> str:
    """In a drawing 1,000 wide."""
    at = lambda a, b: f"{1000 * self.x.at(a):.1f},{self.y.y(b, height)}"
    return " ".join(at(*p) for p in points)

  def names(
    self, height: float, gap: float = 14
  ) -> list[tuple[str, int, float]]:
    """(name, colour, place) at the ends, moved apart; of 2 to 12 lines."""
    places: dict[Any, list[float]] = {}
    for one in self.series:
      end = self.y.y(one.points[-1][1], height)
      places.setdefault((one.name, one.colour), []).append(end)
    if not 1 < len(places) <= 12:
      return []
    at = {key: sum(found) / len(found) for key, found in places.items()}
    order, limit = sorted(at, key=at.get), height
    for before, key in zip(order, order[1:]):
      at[key] = max(at[key], at[before] + gap)
    for key in reversed(order):
      at[key] = min(at[key], limit)
      limit = at[key] - gap
    return [(*key, round(place, 1)) for key, place in at.items()]


def lines_of(series: Sequence[Series], reference: Any) -> Lines:
  """Points that are not finite are left out, and counted."""
  drawn, xs, ys, lost = [], [], [reference], 0
  for one in series:
    points, missing = pairs(list(one.points))
    points, lost = thin(points)[0], lost + missing
    band = [tuple(map(drawable, b)) for b in one.band]
    band = [b for b in band if None not in b]
    outline = [(x, high) for x, _, high in band]
    outline += [(x, low) for x, low, _ in reversed(band)]
    if points:
      area = outline if len(band) > 1 else []
      drawn.append(Series(visible(one.name), points, one.colour, area))
      xs += [x for x, _ in points]
      ys += [y for _, y in points + outline]
  many = "s" if lost != 1 else ""
  left_out = f"{lost:,} non-finite value{many}" if lost else ""
  if not drawn:
    return Lines([], None, None, left_out)
  x = Axis(min(xs), max(xs)) if max(xs) > min(xs) else Axis.around(xs)
  return Lines(drawn, x, Axis.around(ys), left_out)
