"""Charts as inline SVG: lines, intervals, stacked bars, two histograms.

Horizontal places are percentages of the drawing area and words stand in its
padding, so a chart fills any width while its text keeps its size. Every chart
is one <svg role="img"> with an aria-label, a <title> and a <desc>.
"""

from collections.abc import Iterable, Sequence
import math
from typing import Any, NamedTuple

from markupsafe import Markup

from jaxalign.report.values import finite, Node, number, percent, plain, shorten

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


# Markup; `_draw` escapes every value.
LINE = '<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"></line>'
TEXT = '<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>'
RECT = '<rect x="{}" y="{}" width="{}" height="{}" class="{}">{}</rect>'
DOT = '<circle cx="{}" cy="{}" r="{}" class="{}"></circle>'
BAND = '<polygon points="{}" class="band {}"></polygon>'
GROUP = '<g class="{}"><title>{}</title>{}</g>'
CURVE = """<polyline points="{}" class="{}" vector-effect="non-scaling-stroke">
</polyline>"""
# Stretched to the width, but for the strokes.
STRETCHED = """<svg x="0" y="0" width="100%" height="{0}" class="stretch"
viewBox="0 0 1000 {0}" preserveAspectRatio="none">{1}</svg>"""
AT_THE_END = '<svg x="100%" y="{:.1f}" overflow="visible">{}{}</svg>'
CHART = """<svg class="chart {}" style="height:{}px" role="img"
aria-label="{}"><title>{}</title><desc>{}</desc>{}</svg>"""
KEY = """<li><svg width="{}" height="12" aria-hidden="true">{}</svg>
<span>{}</span></li>"""


def _draw(template: str, *values: Any) -> Markup:
  fits = lambda v: isinstance(v, (Markup, int, float))
  return Markup(template).format(*(v if fits(v) else plain(v) for v in values))


def _text(x, y, words, kind="dim", anchor="middle") -> Markup:
  return _draw(TEXT, x, y, kind, anchor, words)


def _chart(kind: str, height: int, title: str, desc: str, parts) -> Markup:
  inside, name = Markup().join(parts), f"{title}. {desc}"
  return _draw(CHART, kind, height + 72, name, title, desc, inside)


def _empty(title: str, why: str = "no data") -> Markup:
  return _chart("plot", 40, title, why, [_text("50%", 20, why)])


def _colour(colour: int) -> str:
  return "cm" if colour < 0 else f"c{colour % COLOURS}"


def _curve(colour: int) -> str:
  return f"curve d{max(colour, 0) % 4} {_colour(colour)}"


def drawable(value: Any, scale: float = 1.0) -> float | None:
  """The scaled value, or None where it has no place on an axis."""
  found = finite(value)
  if found is None or abs(found * scale) > 1e200:  # spans stay finite
    return None
  return found * scale


def _lengths(values: Any) -> list[float]:
  return [max(0.0, drawable(v) or 0.0) for v in Node(values)]


def ticks(low: float, high: float, count: int = 5) -> tuple[list[float], int]:
  """Round values in [low, high], about `count`, and the decimals they need."""
  span = high - low
  if not (math.isfinite(span) and span > 0):
    return [], 0
  raw = span / count
  power = 10.0 ** math.floor(math.log10(raw))
  # The round step nearest in ratio: 1, 2 and 5 meet at their means.
  means = ((1, 2**0.5), (2, 10**0.5), (5, 50**0.5))
  step = power * next((s for s, most in means if raw < most * power), 10)
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  decimals = max(0, -math.floor(math.log10(step) + 1e-9))
  return [i * step for i in range(first, last + 1)], decimals


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
    # Beyond this floats are too coarse, or the span overflows.
    if not high - low > 1e-9 * max(abs(low), abs(high)):
      wide = abs(low) * 0.1 or 1.0
      return cls(low - wide, high + wide)
    return cls(low - 0.06 * (high - low), high + 0.06 * (high - low))

  def at(self, value: float) -> float:
    return (value - self.low) / (self.high - self.low)

  def x(self, value: float) -> str:
    return f"{100 * self.at(value):.2f}%"

  def y(self, value: float, height: float) -> float:
    return round(height * (self.high - value) / (self.high - self.low), 1)

  def across(self, height: int, label: str, rules: bool = False) -> Markup:
    """Ticks, or rules over the whole height, and what is measured."""
    marks, decimals = ticks(*self, 5 if rules else 4)
    end, kind = (0, "rule") if rules else (height + 4, "base")
    parts = [_draw(LINE, "0%", height, "100%", height, "base")]
    parts.append(_text("50%", height + 36, label))
    for mark in marks:
      x = self.x(mark)
      parts.append(_draw(LINE, x, height, x, end, kind))
      parts.append(_text(x, height + 17, _tick(mark, decimals)))
    return Markup().join(parts)

  def down(self, height: int, label: str) -> Markup:
    """Rules over the whole width with their labels, and what is measured."""
    marks, decimals = ticks(*self)
    parts = [_text(-40, -14, label, anchor="start")]
    for mark in marks:
      y = self.y(mark, height)
      parts.append(_draw(LINE, "0%", y, "100%", y, "rule"))
      parts.append(_text(-8, y + 4, _tick(mark, decimals), anchor="end"))
    return Markup().join(parts)


def _words(label: Any, text: str, y: float) -> Markup:
  """A row's name and its numbers, which the style sheet puts in place."""
  veil = _draw(RECT, 0, y - 24, "100%", 17, "veil", "")
  name = _text("0%", y, shorten(label, 24), "who halo", "")
  return veil + name + _text("100%", y, text, "what halo", "")


def intervals(
  rows: Sequence[Row],
  title: str,
  label: str,
  *,
  scale: float = 1.0,
  reference: float | None = None,
  reference_label: str = "",
) -> Markup:
  """A forest plot: a point and its interval per row.

  Args:
    rows: top first; one without a finite value keeps its words.
    title: what is shown.
    label: the quantity and its unit, under the axis.
    scale: what values are multiplied by for the axis (100 for percent).
    reference: a value to draw a dashed line at, before scaling.
    reference_label: what that line is.
  """
  placed = [[drawable(v, scale) for v in row[1:4]] for row in rows]
  mark = drawable(reference, scale)
  if all(v is None for place in placed for v in place):
    return _empty(title)
  axis = Axis.around([mark, *sum(placed, [])])
  height = 36 * len(rows)
  parts = [axis.across(height, label, rules=True)]
  if mark is not None:
    x, at = axis.x(mark), axis.at(mark)  # words near an edge stay inside
    anchor = "start" if at < 0.15 else "end" if at > 0.85 else "middle"
    parts.append(_draw(LINE, x, -4, x, height, "ref"))
    parts.append(_text(x, -9, reference_label, anchor=anchor))
  for i, (row, (value, low, high)) in enumerate(zip(rows, placed)):
    # A little under the middle: on a phone the words stand above the mark.
    inside, y = _words(row.label, row.text, 36 * i + 23), 36 * i + 23
    if value is not None:
      inside = _draw(DOT, axis.x(value), y, 5, "dot") + inside
    if None not in (low, high):
      ends = axis.x(low), y, axis.x(high), y
      inside = _draw(LINE, *ends, "mark") + inside
    name = f"{plain(row.label)}: {row.text}"
    parts.append(_draw(GROUP, _colour(row.colour), name, inside))
  desc = "; ".join(f"{plain(row.label)} {row.text}" for row in rows)
  return _chart("rows", height, title, desc, parts)


def bars(
  rows: Sequence[tuple[Any, Sequence[Any], str]],
  names: Sequence[str],
  title: str,
  label: str,
) -> Markup:
  """Stacked horizontal bars on one scale.

  Args:
    rows: (name of the bar, one value per part, the words beside it).
    names: of the parts, in the order of their colours.
    title: what is shown.
    label: the quantity and its unit, under the axis.
  """
  sizes = [_lengths(values) for _, values, _ in rows]
  top = max(map(math.fsum, sizes), default=0.0)
  if not (top > 0 and math.isfinite(top)):
    return _empty(title)
  axis, height = Axis(0.0, top), 42 * len(rows)
  parts = [axis.across(height, label, rules=True)]
  for i, ((name, _, text), values) in enumerate(zip(rows, sizes)):
    y, start = 42 * i + 18, 0.0
    for j, value in enumerate(values):
      if value > 0:
        words = f"{names[j]}: {percent(value / sum(values))} of its FLOPs"
        inside = _draw("<title>{}, {}</title>", name, words)
        box = axis.x(start), y, axis.x(value), 18
        parts.append(_draw(RECT, *box, f"bar {_colour(j)}", inside))
      start += value
    parts.append(_words(name, text, y + 8))
  desc = "; ".join(f"{plain(name)} {text}" for name, _, text in rows)
  return _chart("rows", height, title, desc, parts)


def histogram(
  edges: Any, selected: Any, rest: Any, title: str, label: str
) -> Markup:
  """The scores of the selected rows over those of the rest.

  Each of the two is scaled to its own total, since one is much smaller; a bin
  of unequal width is drawn at its fraction, not its density.

  Args:
    edges: n + 1 rising bin edges.
    selected: n counts.
    rest: n counts.
    title: what is shown.
    label: the quantity on x, with its unit.
  """
  edges = [drawable(e) for e in Node(edges)]
  counts = {"rest": _lengths(rest), "picked": _lengths(selected)}
  bins = list(zip(edges, edges[1:]))
  good = bins and None not in edges and all(a < b for a, b in bins)
  whole = all(len(c) == len(bins) for c in counts.values())
  if not (good and whole and any(map(any, counts.values()))):
    return _empty(title)
  total = {kind: math.fsum(c) for kind, c in counts.items()}
  tall = {k: [100 * v / (total[k] or 1) for v in c] for k, c in counts.items()}
  x, y = Axis(edges[0], edges[-1]), Axis(0, 1.08 * max(map(max, tall.values())))
  height = 160
  parts = [y.down(height, "fraction of rows, %")]
  for kind, values in tall.items():
    for (a, b), v in zip(bins, values):
      wide, top = f"{100 * (x.at(b) - x.at(a)):.2f}%", y.y(v, height)
      box = x.x(a), top, wide, round(height - top, 1)
      parts += [_draw(RECT, *box, kind, "")] if v > 0 else []
  parts.append(x.across(height, label))
  desc = (
    f"{total['picked']:,.0f} selected rows and {total['rest']:,.0f} others "
    f"between {number(edges[0])} and {number(edges[-1])}"
  )
  return _chart("plot", height, title, desc, parts)


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


def _spread(places: dict[Any, float], gap: float, limit: float) -> None:
  """Moves the places apart to `gap`, in order, and keeps them below `limit`."""
  order = sorted(places, key=places.get)
  for before, key in zip(order, order[1:]):
    places[key] = max(places[key], places[before] + gap)
  for key in reversed(order):
    places[key] = min(places[key], limit)
    limit = places[key] - gap


def lines(
  series: Sequence[Series],
  title: str,
  x_label: str,
  y_label: str,
  *,
  scale: float = 1.0,
  reference: float | None = None,
) -> Markup:
  """Lines over a shared x, with bands where given and names at their ends.

  Series of one name and colour (seeds of an arm) are named once. Points that
  are not finite are left out, and the chart says how many.

  Args:
    series: the lines.
    title: what is shown.
    x_label: what x is, with its unit.
    y_label: what y is, with its unit.
    scale: what y is multiplied by (100 for percent).
    reference: a y to draw a dashed line at, before scaling.
  """
  drawn, xs, ys, lost = [], [], [drawable(reference, scale)], 0
  for one in series:
    points, missing = pairs(list(one.points))
    points = [(x, y * scale) for x, y in thin(points)[0]]
    band = [(x, *(drawable(v, scale) for v in ends)) for x, *ends in one.band]
    band = [b for b in band if None not in b]
    lost += missing
    if points:
      drawn.append((one, points, band))
      xs += [x for x, _ in points]
      ys += [y for p in (*points, *band) for y in p[1:]]
  left_out = f"{lost:,} non-finite value{'s' if lost != 1 else ''}"
  if not drawn:
    return _empty(title, f"no data: {left_out}" if lost else "no data")
  height, y = 190, Axis.around(ys)
  x = Axis(min(xs), max(xs)) if max(xs) > min(xs) else Axis.around(xs)
  place = lambda p: f"{1000 * x.at(p[0]):.1f},{y.y(p[1], height)}"
  path = lambda points: " ".join(map(place, points))
  parts = [y.down(height, y_label), x.across(height, x_label)]
  if ys[0] is not None:
    at = y.y(ys[0], height)
    parts.append(_draw(LINE, "0%", at, "100%", at, "ref"))
  bands, curves, ends = [], [], {}
  for one, points, band in drawn:
    if len(band) > 1:
      outline = [(a, high) for a, _, high in band]
      outline += [(a, low) for a, low, _ in reversed(band)]
      bands.append(_draw(BAND, path(outline), _colour(one.colour)))
    if len(points) > 1:
      curves.append(_draw(CURVE, path(points), _curve(one.colour)))
    else:
      spot = x.x(points[0][0]), y.y(points[0][1], height), 4
      parts.append(_draw(DOT, *spot, f"dot {_colour(one.colour)}"))
    end = ends.setdefault((plain(one.name), one.colour), [])
    end.append(y.y(points[-1][1], height))
  parts.append(_draw(STRETCHED, height, Markup().join(bands + curves)))
  if named := 1 < len(ends) <= 12:
    places = {key: sum(found) / len(found) for key, found in ends.items()}
    _spread(places, 14, height)
    for (name, colour), at in places.items():
      stroke = _draw(LINE, 4, 0, 20, 0, _curve(colour))
      words = _text(25, 4, shorten(name, 14), "", "")
      label = _draw(AT_THE_END, at, stroke, words)
      parts.append(_draw(GROUP, "direct", name, label))
  desc = "; ".join(
    f"{plain(one.name)} from {number(p[0][1])} to {number(p[-1][1])}"
    for one, p, _ in drawn
  )
  if lost:
    parts.append(_text("100%", 12, f"{left_out} left out", "dim halo", "end"))
    desc += f"; {left_out} left out"
  return _chart("plot named" if named else "plot", height, title, desc, parts)


def legend(names: Sequence[tuple[Any, int | str]]) -> Markup:
  """What each colour, or class of an area, means; (name, either) each."""
  items = []
  for name, colour in names:
    if isinstance(colour, str):
      mark, width = _draw(RECT, 0, 0, 14, 12, colour, ""), 14
    else:
      mark, width = _draw(LINE, 1, 6, 27, 6, _curve(colour)), 28
    items.append(_draw(KEY, width, mark, name))
  return _draw('<ul class="key">{}</ul>', Markup().join(items))
