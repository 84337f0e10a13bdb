"""The pages of a job and of one arm: what their templates show, and charts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.report import charts, page
from jaxalign.report.charts import Row, Series
from jaxalign.report.nodes import (
  budget,
  engineering,
  entries,
  finite,
  Node,
  number,
  percent,
  prefix,
  raw,
  records,
  visible,
)
from jaxalign.report.page import interval_row


class Curve(NamedTuple):
  """How a training curve is named; one in percent is logged as a fraction."""

  title: str
  unit: str = ""
  even: float | None = None  # the value of no preference
  even_words: str = ""


CURVES = {
  "train/loss": Curve("Training loss", "loss"),
  "rewards/margins": Curve(
    "Reward margin, chosen minus rejected", "nats", 0.0, "no margin at all"
  ),
  "rewards/accuracies": Curve(
    "Pairs ranked as labelled", "% of pairs", 50.0, "no preference"
  ),
  "logps/chosen": Curve("Log-probability of the chosen response", "nats"),
}
# b per percent of the data, fitted to table 2 of Khera et al. 2024.
PAPER = {"HH": 0.290, "UF": 0.069}  # UF: UltraFeedback

Style = tuple[str, int]  # name and colour of a line


def styles(arms: Sequence[Node]) -> list[Style]:
  """A style per arm: seeds of one sampler and budget look alike."""
  groups: dict[str, list[Node]] = {}
  keys = []
  for arm in arms:
    same = [arm.sampler, arm.budget, arm.is_all, arm.like]
    keys.append(repr(list(map(raw, same if arm.sampler else [arm.name]))))
    groups.setdefault(keys[-1], []).append(arm)
  names = [_line_name(group) for group in groups.values()]
  found = {}
  for i, (name, (key, group)) in enumerate(zip(names, groups.items())):
    several = names.count(name) > 1  # budgets of one sampler
    found[key] = f"{name} {budget(group[0].budget)}" if several else name, i
  return [found[key] for key in keys]


def _line_name(group: list[Node]) -> str:
  first, names = group[0], {visible(arm.name) for arm in group}
  if len(names) == 1:
    return names.pop()
  if not first.is_all:
    return visible(first.sampler)
  return f"all, as long as {budget(first.like)}" if first.like else "all"


def _over_seeds(
  group: list[tuple[list, int]], name: str, colour: int
) -> list[Series]:
  """The mean of an arm's seeds in a band of their range, where x agrees."""
  # A point that is not finite goes along, to be counted on the chart.
  gaps = [(None, None)] * sum(lost for _, lost in group)
  full = [points for points, _ in group if points]
  if len(full) < 2 or len({tuple(x for x, _ in one) for one in full}) > 1:
    lines = [points for points, _ in group]
    lines[0] = lines[0] + gaps
    return [Series(name, points, colour) for points in lines]
  x = [x for x, _ in full[0]]
  y = np.array([[y for _, y in points] for points in full])
  band = list(zip(x, y.min(0).tolist(), y.max(0).tolist()))
  return [Series(name, [*zip(x, y.mean(0).tolist()), *gaps], colour, band)]


def curve_charts(
  arms: Sequence[Node], looks: Sequence[Style]
) -> list[tuple[tuple, str]]:
  """Every curve of the arms: the arguments of its chart, and its caption."""
  read = [
    {name: charts.pairs(points) for name, points in entries(arm.curves)}
    for arm in arms
  ]
  ends = [max([0] + [p[-1][0] for p, _ in r.values() if p]) for r in read]
  lengths = [end for end in ends if end > 0]
  # Arms of very different length share an axis of progress, not of steps.
  relative = bool(lengths) and max(lengths) > 3 * min(lengths)
  x_label = "updates done, % of the arm's own" if relative else "update"
  names, out = {name for one in read for name in one}, []
  for name in [n for n in CURVES if n in names] + sorted(names - set(CURVES)):
    known, groups, merged = CURVES.get(name) or Curve(visible(name)), {}, 1
    up = 100 if known.unit.startswith("%") else 1
    for found, style, end in zip(read, looks, ends):
      points, lost = found.get(name, ([], 0))
      points, k = charts.thin(points)
      merged = max(merged, k)
      across = 100 / end if relative and end > 0 else 1
      points = [(across * x, up * y) for x, y in points]
      groups.setdefault(style, []).append((points, lost))
    series = [s for look, g in groups.items() for s in _over_seeds(g, *look)]
    caption = f"{known.title}."
    if len(set(looks)) < len(looks):
      caption += " Lines: mean over seeds; bands: all seeds."
    if known.even is not None:
      caption += f" Dashed: {known.even_words}."
    if merged > 1:
      caption += f" A point is the mean of up to {merged} logged values."
    chart = series, known.title, x_label, known.unit, known.even
    out.append((chart, caption))
  return out


def forest_rows(
  arms: Sequence[Node], looks: Sequence[Style], name: str
) -> tuple[list[Row], list[str]]:
  """Every arm's value of a metric, and what the intervals are over."""
  rows, counts = [], set()
  for arm, (label, colour) in zip(arms, looks):
    found = page.metrics_of(arm).get(name)
    if not found:
      continue
    rows.append(interval_row(label, found, page.metric(name), colour))
    n = number(found.n)
    if raw(found.prompts) is not None:
      n = f"{n} seeds × {number(found.prompts)} prompts"
    elif raw(found.seeds) is not None:
      n = f"{n} seeds"
    if None not in (raw(found.n), raw(found.value)):
      counts.add(n)
  return rows, sorted(counts)


def difference_rows(
  found: Sequence[Node], looks: Sequence[Style]
) -> list[tuple[str, str, list[Row]]]:
  """Pairs of arms by metric and heading: (metric, heading, rows)."""
  colours, kinds = dict(looks), {}
  for one in found:
    title = visible(one.title) if one.title else ""
    label = one.label if title else f"{one.a} − {one.b}"
    colour = colours.get(visible(one.label if title else one.a), 6)
    rows = kinds.setdefault((visible(one.metric), title), [])
    m = page.metric(one.metric)
    rows.append(interval_row(label, one.difference, m, colour, sign=True))
  return [(*key, rows) for key, rows in kinds.items()]


def stage_bars(stages: Sequence[Node]) -> tuple[list, list, str]:
  """(name, class) of the stages; a bar an arm; the SI prefix of the axis."""
  names = list(dict.fromkeys(visible(s.stage) for s in stages))
  totals: dict[str, list[float]] = {}
  for one in stages:
    arm = visible(one.arm or "shared by all")
    values = totals.setdefault(arm, [0.0] * len(names))
    values[names.index(visible(one.stage))] += finite(one.flops) or 0.0
  divisor, letter = prefix(max(map(sum, totals.values())))
  rows = [
    (arm, [v / divisor for v in values], engineering(sum(values)))
    for arm, values in totals.items()
  ]
  kinds = [f"bar c{i % charts.COLOURS}" for i in range(len(names))]
  return list(zip(names, kinds)), rows, letter


def plateau_series(found: Node) -> tuple[list[Series], bool]:
  """What was measured with the fitted curves; whether points are repeated."""
  points, _ = charts.pairs(list(zip(found.x, found.y)))
  at = sorted({x for x, _ in points})
  seen = [[y for x, y in points if x == place] for place in at]
  repeated = len(at) < len(points)
  band = [(x, min(y), max(y)) for x, y in zip(at, seen)] if repeated else []
  means = [(x, sum(y) / len(y)) for x, y in zip(at, seen)]
  series = [Series("measured", means, 0, band)]
  r, a, b = (charts.drawable(found[k].value) for k in "rab")
  if points and None not in (r, a, b):
    drawn = np.linspace(0.0, at[-1], 60)
    rates = {"plateau": b} | {f"paper, {k}": rate for k, rate in PAPER.items()}
    for colour, (name, rate) in enumerate(rates.items(), 1):
      with np.errstate(over="ignore", invalid="ignore"):
        shape = r - (r - a) * np.exp(-rate * drawn)
      line = list(zip(drawn.tolist(), shape.tolist()))
      series.append(Series(name, line, colour))
  return series, repeated


def frontier(arms: Sequence[Node]) -> list[Series]:
  """Win rate against cost, and the line of arms that no cheaper one beats."""
  spots = [
    (finite(a.cost), finite(a.win.value), visible(a.label)) for a in arms
  ]
  spots = sorted(s for s in spots if None not in s[:2])
  corners, singles = [], []
  for i, (cost, value, name) in enumerate(spots):
    point = (100 * cost, 100 * value)
    singles.append(Series(name, [point], i))
    if all(point[1] > y for _, y in corners):
      corners.append(point)
  return [Series("frontier", corners, charts.MUTED), *singles]


def best_first(found: Sequence[Node], key: str) -> list[Node]:
  """Those with the largest value first, those without one last."""
  value = lambda one: finite(one[key].value)
  order = lambda one: -np.inf if value(one) is None else value(one)
  return sorted(found, key=order, reverse=True)


def savings(summary: Node, arms: Sequence[Node]) -> list[Node]:
  """The ledger's savings, else those that the arms carry."""
  own = [
    Node(dict(entries(a.saved)) | {"arm": a.name})
    for a in arms
    if a.saved and not a.is_all
  ]
  return records(summary.ledger.saved) or own


def overspent(rows: Sequence[Node]) -> list[str]:
  """A sentence for every saving that is negative."""
  ways = dict(
    with_sft="counting the SFT stage", without_sft="leaving the SFT stage out"
  )
  against = lambda row: f" against {row.against}" if row.against else ""
  return [
    f"{row.arm}{against(row)}, {how}: {percent(x)} saved, so it used "
    f"{percent(-x)} more FLOPs."
    for row in rows
    for key, how in ways.items()
    if (x := finite(row[key]) or 0.0) < 0
  ]


def arm_html(arm: dict[str, Any]) -> str:
  """The page of one arm, an entry of `summary["arms"]`."""
  node = Node(arm)
  name = visible(node.name or "An arm without a name")
  return page.render(
    "arm.html",
    arm=node,
    name=name,
    overspent=overspent([Node(dict(entries(node.saved)) | {"arm": name})]),
    charts=curve_charts([node], [(name, 0)]),
  )


def baseline_of(summary: Node) -> Node:
  """The SFT model and its metrics; nothing where it was not measured."""
  found = dict(entries(summary.baseline))
  return Node({"name": "SFT model"} | found if found else None)


def study_html(summary: dict[str, Any]) -> str:
  """The page over a job of several arms.

  Args:
    summary: what the job wrote to summary.json; any key may be absent or of
      another kind, and its section then says that it was not measured.
  """
  node = Node(summary)
  arms = records(node.arms)
  # Of several seeds an arm is one line, of its mean.
  groups = records(node.groups) or arms
  baseline = baseline_of(node)
  every = [*groups, *([baseline] if baseline else [])]
  looks = [(visible(a.name), c) for a, (_, c) in zip(groups, styles(groups))]
  looks += [(visible(baseline.name), charts.MUTED)] if baseline else []
  names = page.metric_names(every)
  main = ("win_vs_target", "win_vs_chosen", "win_vs_sft", "accuracy")
  return page.render(
    "study.html",
    summary=node,
    arms=arms,
    baseline=baseline,
    every=every,
    styles=styles(arms),
    looks=looks,
    metric_names=names,
    main_metrics=[n for n in main if n in names] or names[:1],
    differences=difference_rows(
      records(node.comparisons), [*styles(groups), *looks]
    ),
    savings=savings(node, arms),
    overspent=overspent(savings(node, arms)),
    curves=curve_charts(arms, styles(arms)),
  )


page.expose(globals())


def grid_html(summary: dict[str, Any]) -> str:
  """The page of a grid, as `grid.summarise` describes it."""
  return page.render("grid.html", summary=Node(summary))
