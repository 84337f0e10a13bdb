"""The section on how win rate grows with data: points, curve and verdict."""

from typing import Any

import numpy as np

from jaxalign.core import intervals
from jaxalign.report import charts, page
from jaxalign.report.page import Html, tag
from jaxalign.report.pages import run
from jaxalign.report.pages.run import fields, items

_SAMPLES = 60  # points of the drawn curve
# b per percent of the data, fitted to table 2 of Khera et al. 2024.
PAPER = {"HH": 0.290, "UF": 0.069}  # UF: UltraFeedback
_NAMES = {
  "r": "r, where it levels off, %",
  "a": "a, without data, %",
  "b": "b, rate per percent of the data",
}


def _bound(value: Any, scale: float) -> str:
  x = page.finite(value)
  return "no bound" if x is None else page.number(scale * x)


def _numbers(found: dict, scale: float) -> Html:
  """r, a and b with their intervals, as a table."""
  rows = []
  for key, name in _NAMES.items():
    one, by = fields(found.get(key)), 1.0 if key == "b" else scale
    value = page.finite(one.get("value"))
    rows.append(
      (
        name,
        page.MISSING if value is None else page.number(by * value),
        _bound(one.get("low"), by),
        _bound(one.get("high"), by),
      )
    )
  return page.table(
    ("Number", "Value", "From", "To"),
    rows,
    "The plateau R(x) = r - (r - a) exp(-b x), with 95 % profile intervals. "
    '"No bound": the points do not limit the number on that side.',
  )


def _curves(found: dict, scale: float) -> Html:
  """The plateau beside the curves without one."""
  rows = []
  for name, one in fields(found.get("curves")).items():
    one = fields(one)
    held = page.finite(one.get("held_out"))
    rows.append(
      (
        page.plain(name),
        tag("code", page.plain(one.get("formula"))),
        page.number(one.get("numbers")),
        page.number(one.get("r2")),
        page.MISSING if held is None else page.number(scale * held),
      )
    )
  if not rows:
    return page.absent("Other curves were")
  return page.table(
    ("Curve", "Formula", "Numbers fitted", "R²", "Held-out error, points"),
    rows,
    "Every share of the data but the smallest, predicted from the others.",
    text=(1,),
  )


def _chart(found: dict, scale: float, name: str) -> Html:
  """What was measured, and the fitted plateau."""
  x = [page.finite(v) for v in items(found.get("x"))]
  y = [page.finite(v) for v in items(found.get("y"))]
  se = [page.finite(v) for v in items(found.get("se"))]
  points = [p for p in zip(x, y) if None not in p]
  at = sorted({p for p, _ in points})
  seen = [[v for p, v in points if p == q] for q in at]
  repeated = len(at) < len(points)
  if repeated:
    band = [(p, min(v), max(v)) for p, v in zip(at, seen)]
  else:
    band = sorted(
      (p, v - intervals.Z * e, v + intervals.Z * e)
      for p, v, e in zip(x, y, se)
      if None not in (p, v, e)
    )
  series = [
    charts.Series(
      "measured", [(p, sum(v) / len(v)) for p, v in zip(at, seen)], 0, band
    )
  ]
  r, a, b = (page.finite(fields(found.get(k)).get("value")) for k in "rab")
  if points and None not in (r, a, b):
    drawn = np.linspace(0.0, at[-1], _SAMPLES)
    with np.errstate(over="ignore", invalid="ignore"):
      fitted = r - (r - a) * np.exp(-b * drawn)
    series.append(
      charts.Series("plateau", list(zip(drawn.tolist(), fitted.tolist())), 1)
    )
    for colour, (data, rate) in enumerate(PAPER.items(), 2):
      shape = r - (r - a) * np.exp(-rate * drawn)
      series.append(
        charts.Series(
          f"paper, {data}", list(zip(drawn.tolist(), shape.tolist())), colour
        )
      )
  return page.figure(
    charts.lines(
      series,
      f"{name} by share of the data",
      "% of the data",
      f"{name}, %",
      scale=scale,
    ),
    f"{name}: measured, and the fitted plateau."
    + (
      " Paper: the same r and a with its b on HH and on UltraFeedback (Khera "
      "et al. 2024), of another model, judge and recipe."
      if len(series) > 2
      else ""
    )
    + (
      " Checkpoints of one epoch, not runs of their own."
      if found.get("cheap") is True
      else ""
    )
    + (
      " Line: mean over seeds; band: all seeds."
      if repeated
      else " Band: 95 % of each point."
      if band
      else ""
    ),
  )


def section(found: Any, name: str = "Win rate") -> Html:
  """The blocks of one fit.

  Args:
    found: as `eval.plateau.fit` returns it, perhaps from a file.
    name: what was measured.
  """
  found = fields(found)
  if not found:
    return page.absent("How the win rate grows with data was")
  most = page.finite((items(found.get("bounds")) or [None])[-1])
  scale = 100.0 if most is not None and most <= 1 else 1.0
  told = [page.plain(w) for w in run.words(found.get("words"))]
  if found.get("identified") is True:
    title = "A plateau is identified"
  else:
    title = "Plateau not identified"
  return page.join(
    [
      page.callout("verdict", title, told),
      _chart(found, scale, name),
      _numbers(found, scale),
      _curves(found, scale),
    ]
  )
