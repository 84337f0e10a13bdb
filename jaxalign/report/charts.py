"""Charts as inline SVG: lines, intervals, stacked bars, two histograms.

Horizontal places are percentages of the drawing area and words stand in its
padding, so a chart fills any width while its text keeps its size. Every chart
is one <svg role="img"> with an aria-label, a <title> and a <desc>.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

from jaxalign.report import page
from jaxalign.report.page import finite, Html, tag

COLOURS = 7  # --c0 .. --c6 in the style sheet; dashes tell them apart too
MUTED = -1  # the colour of a baseline


class Row(NamedTuple):
  """One row of an interval plot: where it lies and what is said of it."""

  label: str
  value: Any
  low: Any = None
  high: Any = None
  text: str = ""  # the numbers in words, on the right
  colour: int = 0


class Series(NamedTuple):
  """One line: points (x, y), and bounds (x, low, high) if it has a band."""

  name: str
  points: Sequence[Any]
  colour: int = 0
  band: Sequence[Any] | None = None


def drawable(value: Any, scale: float = 1.0) -> float | None:
  """The scaled value, or None where it has no place on an axis."""
  found = finite(value)
  if found is None or abs(found * scale) > 1e200:  # spans stay finite
    return None
  return found * scale


def _class(colour: int) -> str:
  return "cm" if colour < 0 else f"c{colour % COLOURS}"


def _curve(colour: int) -> str:
  return f"curve d{colour % 4 if colour > 0 else 0} {_class(colour)}"


def shorten(text: Any, limit: int) -> str:
  """At most `limit` characters, the last an ellipsis where some were cut."""
  words = " ".join(page.plain(text).split())
  return words if len(words) <= limit else words[: limit - 1] + "…"


def ticks(low: float, high: float, count: int = 5) -> tuple[list[float], int]:
  """Round values in [low, high], about `count`, and the decimals they need."""
  span = high - low
  if not (math.isfinite(span) and span > 0):
    return [], 0
  raw = span / max(count, 1)
  power = 10.0 ** math.floor(math.log10(raw))
  # The round step nearest in ratio: 1, 2 and 5 meet at their means.
  step = power * (
    1
    if raw < 1.4142 * power
    else 2
    if raw < 3.1623 * power
    else 5
    if raw < 7.0711 * power
    else 10
  )
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  decimals = max(0, -math.floor(math.log10(step) + 1e-9))
  return [i * step for i in range(first, last + 1)], decimals


def _range(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
  """Bounds a little wider than the values; never of no width."""
  low, high = min(values), max(values)
  # Beyond this the float is too coarse, or its span overflows: spread by hand.
  if not high - low > 1e-9 * max(abs(low), abs(high)):
    wide = abs(low) * 0.1 or 1.0
    return low - wide, high + wide
  space = (high - low) * pad
  return low - space, high + space


def _tick(value: float, decimals: int) -> str:
  """A tick's label; the ends of the float range fall back to an exponent."""
  if abs(value) >= 1e7 or decimals > 6:
    return page.number(value)
  text = f"{value:,.{decimals}f}"
  zero = not text.strip("-0.,")
  return text.lstrip("-") if zero else text.replace("-", "−")


def _at(share: float) -> str:
  return f"{100 * share:.2f}%"


def _line(x1, y1, x2, y2, kind: str) -> Html:
  return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _text(
  x, y, words: Any, kind: str | None = None, anchor: str | None = None
) -> Html:
  return tag("text", words, x=x, y=y, class_=kind, text_anchor=anchor)


def _svg(
  kind: str, height: float, pads: int, title: str, desc: str, *children: Any
) -> Html:
  """The frame; `pads` is the padding above and below that `kind` has."""
  return tag(
    "svg",
    tag("title", title),
    tag("desc", desc),
    *children,
    class_=f"chart {kind}",
    style=f"height:{height + pads:.0f}px",
    role="img",
    aria_label=f"{title}. {desc}".strip(),
  )


def empty(title: str, why: str = "no data") -> Html:
  """What stands in the place of a chart that has nothing to draw."""
  return _svg(
    "plot", 40, 72, title, why, _text("50%", 20, why, "dim", "middle")
  )


def _across(low: float, high: float, height: float, label: str) -> Html:
  """The horizontal axis: rules, tick labels, and what is measured."""
  marks, decimals = ticks(low, high, 5)
  parts = []
  for mark in marks:
    x = _at((mark - low) / (high - low))
    parts += [
      _line(x, 0, x, height, "rule"),
      _text(x, height + 16, _tick(mark, decimals), "dim", "middle"),
    ]
  parts += [
    _line("0%", height, "100%", height, "base"),
    _text("50%", height + 35, label, "dim", "middle"),
  ]
  return page.join(parts)


def _side(share: float) -> str:
  """The anchor that keeps words near an edge inside the drawing."""
  return "start" if share < 0.15 else "end" if share > 0.85 else "middle"


def _words(label: str, text: str, y: float) -> Html:
  """A row's name and its numbers, which the style sheet puts in place."""
  return page.join(
    [
      tag("rect", x=0, y=y - 24, width="100%", height=17, class_="veil"),
      _text("0%", y, shorten(label, 24), "who halo"),
      _text("100%", y, text, "what halo"),
    ]
  )


def intervals(
  rows: Sequence[Row],
  title: str,
  label: str,
  *,
  scale: float = 1.0,
  reference: float | None = None,
  reference_label: str = "",
  desc: str = "",
) -> Html:
  """A forest plot: a point and its interval per row.

  Args:
    rows: one per line, top first; one without a finite value keeps its words.
    title: what is shown.
    label: the quantity and its unit, under the axis.
    scale: what values are multiplied by for the axis (100 for percent).
    reference: a value to draw a dashed line at, before scaling.
    reference_label: what that line is.
    desc: the long description; by default the rows in words.
  """
  placed = [
    (r, *(drawable(v, scale) for v in (r.value, r.low, r.high))) for r in rows
  ]
  seen = [v for _, *values in placed for v in values if v is not None]
  if not seen:
    return empty(title)
  mark = drawable(reference, scale)
  low, high = _range(seen + ([] if mark is None else [mark]))
  pitch = 36
  height = pitch * len(rows)

  def at(value):
    return (value - low) / (high - low)

  parts = [_across(low, high, height, label)]
  if mark is not None:
    x = _at(at(mark))
    parts += [
      _line(x, -4, x, height, "ref"),
      _text(x, -9, reference_label, "dim", _side(at(mark))),
    ]
  for i, (row, value, lower, upper) in enumerate(placed):
    # A little under the middle: on a phone the words stand above the mark.
    y = pitch * (i + 0.5) + 5
    inside = [tag("title", f"{page.plain(row.label)}: {row.text}")]
    if lower is not None and upper is not None:
      inside.append(_line(_at(at(lower)), y, _at(at(upper)), y, "mark"))
    if value is not None:
      inside.append(tag("circle", cx=_at(at(value)), cy=y, r=5, class_="dot"))
    inside.append(_words(row.label, row.text, y))
    parts.append(tag("g", *inside, class_=_class(row.colour)))
  desc = desc or "; ".join(f"{page.plain(r.label)} {r.text}" for r in rows)
  return _svg("rows", height, 72, title, desc, *parts)


def thin(
  points: Sequence[tuple[float, float]], limit: int = 75
) -> tuple[list[tuple[float, float]], int]:
  """Means of k neighbours, so that about `limit` points stay, and k."""
  k = max(1, math.ceil(len(points) / limit))
  groups = [points[i : i + k] for i in range(0, len(points), k)]
  return [
    (math.fsum(x for x, _ in g) / len(g), math.fsum(y for _, y in g) / len(g))
    for g in groups
  ], k


def pairs(points: Any) -> tuple[list[tuple[float, float]], int]:
  """The finite (x, y) of a curve by x, and how many were not finite."""
  found, lost = [], 0
  for point in points or ():
    try:
      x, y = (drawable(v) for v in point)
    except (TypeError, ValueError):
      x = y = None
    if x is None or y is None:
      lost += 1
    else:
      found.append((x, y))
  return sorted(found), lost


def _lost(count: int) -> str:
  return f"{count:,} non-finite value{'s' if count != 1 else ''}"


def _spread(places: list[float], gap: float, top: float) -> list[float]:
  """The places, in order, moved apart to `gap` and kept above `top`."""
  order = sorted(range(len(places)), key=lambda i: places[i])
  moved = list(places)
  for before, i in zip(order, order[1:]):
    moved[i] = max(moved[i], moved[before] + gap)
  limit = top
  for i in reversed(order):
    moved[i] = min(moved[i], limit)
    limit = moved[i] - gap
  return moved


def lines(
  series: Sequence[Series],
  title: str,
  x_label: str,
  y_label: str,
  *,
  scale: float = 1.0,
  reference: float | None = None,
  desc: str = "",
) -> Html:
  """Lines over a shared x, with bands where given and names at their ends.

  Series of one name and colour (seeds of an arm) are named once. Points that
  are not finite are left out, and the chart says how many.

  Args:
    series: the lines; `band` holds (x, low, high).
    title: what is shown.
    x_label: what x is, with its unit.
    y_label: what y is, with its unit.
    scale: what y is multiplied by (100 for percent).
    reference: a y to draw a dashed line at, before scaling.
    desc: the long description; by default where each line starts and ends.
  """
  cleaned, lost = [], 0
  for s in series:
    points, missing = pairs(s.points)
    lost += missing
    points, _ = thin(points)
    band = [
      b
      for b in ([drawable(v) for v in b] for b in s.band or ())
      if len(b) == 3 and None not in b
    ]
    if points:
      cleaned.append(
        (
          s,
          [(x, y * scale) for x, y in points],
          [(x, a * scale, b * scale) for x, a, b in band],
        )
      )
  if not cleaned:
    return empty(title, f"no data: {_lost(lost)}" if lost else "no data")
  xs = [x for _, ps, _ in cleaned for x, _ in ps]
  ys = [y for _, ps, _ in cleaned for _, y in ps]
  ys += [v for _, _, bs in cleaned for _, *ab in bs for v in ab]
  mark = drawable(reference, scale)
  y0, y1 = _range(ys + ([] if mark is None else [mark]))
  x0, x1 = (min(xs), max(xs)) if max(xs) > min(xs) else _range(xs)
  height = 190

  def across(x):
    return (x - x0) / (x1 - x0)

  def down(y):
    return height * (y1 - y) / (y1 - y0)

  marks, decimals = ticks(y0, y1, 5)
  parts = []
  for m in marks:
    parts += [
      _line("0%", down(m), "100%", down(m), "rule"),
      _text(-8, down(m) + 4, _tick(m, decimals), "dim", "end"),
    ]
  marks, decimals = ticks(x0, x1, 4)
  for m in marks:
    parts += [
      _line(_at(across(m)), height, _at(across(m)), height + 4, "base"),
      _text(_at(across(m)), height + 18, _tick(m, decimals), "dim", "middle"),
    ]
  parts += [
    _line("0%", height, "100%", height, "base"),
    _text("50%", height + 36, x_label, "dim", "middle"),
    _text(-40, -14, y_label, "dim", "start"),
  ]
  if mark is not None:
    parts.append(_line("0%", down(mark), "100%", down(mark), "ref"))

  drawn, ends = [], {}
  for s, _, band in cleaned:
    if len(band) > 1:
      outline = [(x, high) for x, _, high in band]
      outline += [(x, low) for x, low, _ in reversed(band)]
      drawn.append(
        tag(
          "polygon",
          points=_path(outline, across, down),
          class_=f"band {_class(s.colour)}",
        )
      )
  for s, points, _ in cleaned:
    if len(points) > 1:
      drawn.append(
        tag(
          "polyline",
          points=_path(points, across, down),
          class_=_curve(s.colour),
          vector_effect="non-scaling-stroke",
        )
      )
    else:
      parts.append(
        tag(
          "circle",
          cx=_at(across(points[0][0])),
          cy=f"{down(points[0][1]):.1f}",
          r=4,
          class_=f"dot {_class(s.colour)}",
        )
      )
    ends.setdefault((s.name, s.colour), []).append(down(points[-1][1]))
  # Stretched to the width; the strokes are told not to stretch with it.
  parts.append(
    tag(
      "svg",
      *drawn,
      x=0,
      y=0,
      width="100%",
      height=height,
      viewBox=f"0 0 1000 {height}",
      preserveAspectRatio="none",
      class_="stretch",
    )
  )
  named = len(ends) > 1 and len(ends) <= 12
  if named:
    heights = _spread([sum(v) / len(v) for v in ends.values()], 14, height)
    for (name, colour), y in zip(ends, heights):
      parts.append(
        tag(
          "g",
          tag("title", name),
          tag(
            "svg",
            _line(4, 0, 20, 0, _curve(colour)),
            x="100%",
            y=f"{y:.1f}",
            overflow="visible",
          ),
          tag(
            "svg",
            _text(25, 4, shorten(name, 14)),
            x="100%",
            y=f"{y:.1f}",
            overflow="visible",
          ),
          class_="direct",
        )
      )
  if lost:
    parts.append(
      _text("100%", 12, f"{_lost(lost)} left out", "dim halo", "end")
    )
  desc = desc or "; ".join(
    f"{page.plain(s.name)} from {page.number(ps[0][1])} to "
    f"{page.number(ps[-1][1])}"
    for s, ps, _ in cleaned
  )
  if lost:
    desc += f"; {_lost(lost)} left out"
  return _svg(
    "plot named" if named else "plot", height, 72, title, desc, *parts
  )


def _path(points, across, down) -> str:
  return " ".join(f"{1000 * across(x):.1f},{down(y):.1f}" for x, y in points)


def bars(
  rows: Sequence[tuple[str, Sequence[Any], str]],
  names: Sequence[str],
  title: str,
  label: str,
  *,
  desc: str = "",
) -> Html:
  """Stacked horizontal bars on one scale.

  Args:
    rows: (name of the bar, one value per part, the words beside it).
    names: of the parts, in the order of their colours.
    title: what is shown.
    label: the quantity and its unit, under the axis.
    desc: the long description; by default the rows in words.
  """
  sizes = [
    [max(0.0, drawable(v) or 0.0) for v in values] for _, values, _ in rows
  ]
  top = max((math.fsum(v) for v in sizes), default=0.0)
  if not (top > 0 and math.isfinite(top)):
    return empty(title)
  pitch = 42
  height = pitch * len(rows)
  parts = [_across(0.0, top, height, label)]
  for i, ((name, _, text), values) in enumerate(zip(rows, sizes)):
    y = pitch * i + 18
    start = 0.0
    for j, value in enumerate(values):
      if value > 0:
        part = f"{page.plain(names[j])}: {page.percent(value / sum(values))}"
        parts.append(
          tag(
            "rect",
            tag("title", f"{page.plain(name)}, {part} of its flops"),
            x=_at(start / top),
            y=y,
            width=_at(value / top),
            height=18,
            class_=f"bar {_class(j)}",
          )
        )
      start += value
    parts.append(_words(name, text, y + 8))
  desc = desc or "; ".join(f"{page.plain(n)} {t}" for n, _, t in rows)
  return _svg("rows", height, 72, title, desc, *parts)


def histogram(
  edges: Sequence[Any],
  selected: Sequence[Any],
  rest: Sequence[Any],
  title: str,
  label: str,
  *,
  desc: str = "",
) -> Html:
  """The scores of the selected rows over those of the rest.

  Each of the two is scaled to its own total, since one is much smaller; a bin
  of unequal width is drawn at its share, not its density.

  Args:
    edges: n + 1 rising bin edges.
    selected: n counts.
    rest: n counts.
    title: what is shown.
    label: the quantity on x, with its unit.
    desc: the long description.
  """
  edges = [drawable(e) for e in edges or ()]
  counts = [
    [max(0.0, drawable(v) or 0.0) for v in c or ()] for c in (rest, selected)
  ]
  totals = [math.fsum(c) for c in counts]
  good = (
    len(edges) > 1
    and None not in edges
    and all(a < b for a, b in zip(edges, edges[1:]))
    and all(len(c) == len(edges) - 1 for c in counts)
    and sum(totals) > 0
  )
  if not good:
    return empty(title)
  shares = [
    [100 * v / t if t else 0.0 for v in c] for c, t in zip(counts, totals)
  ]
  top = max(max(s) for s in shares) * 1.08
  height = 160
  x0, x1 = edges[0], edges[-1]
  parts = []
  marks, decimals = ticks(0.0, top, 4)
  for m in marks:
    y = height * (1 - m / top)
    parts += [
      _line("0%", y, "100%", y, "rule"),
      _text(-8, y + 4, _tick(m, decimals), "dim", "end"),
    ]
  for kind, values in zip(("rest", "picked"), shares):
    for a, b, v in zip(edges, edges[1:], values):
      if v > 0:
        parts.append(
          tag(
            "rect",
            x=_at((a - x0) / (x1 - x0)),
            y=f"{height * (1 - v / top):.1f}",
            width=_at((b - a) / (x1 - x0)),
            height=f"{height * v / top:.1f}",
            class_=kind,
          )
        )
  marks, decimals = ticks(x0, x1, 5)
  for m in marks:
    x = _at((m - x0) / (x1 - x0))
    parts += [
      _line(x, height, x, height + 4, "base"),
      _text(x, height + 18, _tick(m, decimals), "dim", "middle"),
    ]
  parts += [
    _line("0%", height, "100%", height, "base"),
    _text("50%", height + 36, label, "dim", "middle"),
    _text(-40, -14, "share of rows, %", "dim", "start"),
  ]
  desc = desc or (
    f"{totals[1]:,.0f} selected rows and {totals[0]:,.0f} others "
    f"between {page.number(x0)} and {page.number(x1)}"
  )
  return _svg("plot", height, 72, title, desc, *parts)


def legend(names: Sequence[tuple[str, int]], shape: str = "line") -> Html:
  """What each colour means; (name, colour) each, "line" or "block"."""
  items = []
  for name, colour in names:
    if shape == "line":
      mark = _line(1, 6, 27, 6, _curve(colour))
    else:
      mark = tag(
        "rect", x=0, y=0, width=14, height=12, class_=f"bar {_class(colour)}"
      )
    items.append(
      tag(
        "li",
        tag(
          "svg",
          mark,
          width=28 if shape == "line" else 14,
          height=12,
          aria_hidden="true",
        ),
        tag("span", name),
      )
    )
  return tag("ul", *items, class_="key")


def overlay_legend() -> Html:
  """What the two fills of `histogram` mean."""
  return tag(
    "ul",
    *(
      tag(
        "li",
        tag(
          "svg",
          tag("rect", x=1, y=1, width=12, height=10, class_=kind),
          width=14,
          height=12,
          aria_hidden="true",
        ),
        tag("span", name),
      )
      for name, kind in (("selected", "picked"), ("the rest", "rest"))
    ),
    class_="key",
  )
