"""The pages of a job and of one arm: what their templates show, and charts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.core.intervals import Z
from jaxalign.report import charts, page
from jaxalign.report.charts import Row, Series
from jaxalign.report.page import interval_row
from jaxalign.report.values import (
  budget,
  engineering,
  entries,
  finite,
  Node,
  number,
  percent,
  plain,
  prefix,
  raw,
  records,
)

# Title, unit, whether it is a fraction, and the value of no preference.
CURVES = {
  "train/loss": ("Training loss", "loss", False, None),
  "rewards/margins": (
    "Reward margin, chosen minus rejected",
    "nats",
    False,
    0.0,
  ),
  "rewards/accuracies": ("Pairs ranked as labelled", "% of pairs", True, 0.5),
  "logps/chosen": (
    "Log-probability of the chosen response",
    "nats",
    False,
    None,
  ),
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
  names = {key: _line_name(group) for key, group in groups.items()}
  common = list(names.values())
  colours = {key: i for i, key in enumerate(groups)}
  for key, name in names.items():
    if common.count(name) > 1:  # budgets of one sampler need telling apart
      names[key] = f"{name} {budget(groups[key][0].budget)}"
  return [(names[key], colours[key]) for key in keys]


def _line_name(group: list[Node]) -> str:
  first, names = group[0], {plain(arm.name) for arm in group}
  if len(names) == 1:
    return names.pop()
  if not first.is_all:
    return plain(first.sampler)
  return f"all, as long as {budget(first.like)}" if first.like else "all"


def _over_seeds(
  group: list[list[tuple[float, float]]], style: Style, lost: int
) -> list[Series]:
  """The mean of an arm's seeds in a band of their range, where x agrees."""
  # A point that is not finite goes along, to be counted and said.
  gaps = [(None, None)] * lost
  full = [points for points in group if points]
  if len(full) < 2 or len({tuple(x for x, _ in ps) for ps in full}) > 1:
    name, colour = style
    group = [group[0] + gaps, *group[1:]]
    return [Series(name, points, colour) for points in group]
  x = [x for x, _ in full[0]]
  y = np.array([[y for _, y in points] for points in full])
  mean, low, high = y.mean(0), y.min(0), y.max(0)
  points = list(zip(x, mean.tolist())) + gaps
  band = list(zip(x, low.tolist(), high.tolist()))
  return [Series(style[0], points, style[1], band)]


def curve_charts(
  arms: Sequence[Node], looks: Sequence[Style]
) -> list[tuple[Any, str]]:
  """Every curve of the arms, a chart and its caption each."""
  read = [
    {name: charts.pairs(points) for name, points in entries(arm.curves)}
    for arm in arms
  ]
  names = {name for one in read for name in one}
  ends = [max((p[-1][0] for p, _ in r.values() if p), default=0) for r in read]
  lengths = [end for end in ends if end > 0]
  # Arms of very different length share an axis of progress, not of steps.
  relative = bool(lengths) and max(lengths) > 3 * min(lengths)
  x_label = "updates done, % of the arm's own" if relative else "update"
  out = []
  for name in [n for n in CURVES if n in names] + sorted(names - set(CURVES)):
    title, unit, fraction, even = CURVES.get(
      name, (plain(name), "", False, None)
    )
    groups, merged = {}, 1
    for found, style, end in zip(read, looks, ends):
      points, lost = found.get(name, ([], 0))
      points, k = charts.thin(points)
      merged = max(merged, k)
      if relative and end > 0:
        points = [(100 * x / end, y) for x, y in points]
      group = groups.setdefault(style, [[], 0])
      group[0].append(points)
      group[1] += lost
    series = []
    for style, (group, lost) in groups.items():
      series += _over_seeds(group, style, lost)
    caption = f"{title}."
    if len(set(looks)) < len(looks):
      caption += " Lines: mean over seeds; bands: all seeds."
    if even is not None:
      caption += f" Dashed: no {'preference' if fraction else 'margin at all'}."
    if merged > 1:
      caption += f" A point is the mean of up to {merged} logged values."
    chart = charts.lines(
      series, title, x_label, unit, scale=100 if fraction else 1, reference=even
    )
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
    title = plain(one.title) if one.title else ""
    label = one.label if title else f"{one.a} − {one.b}"
    colour = colours.get(plain(one.label if title else one.a), 6)
    rows = kinds.setdefault((plain(one.metric), title), [])
    m = page.metric(one.metric)
    rows.append(interval_row(label, one.difference, m, colour, sign=True))
  return [(*key, rows) for key, rows in kinds.items()]


def stage_bars(stages: Sequence[Node]) -> tuple[list, list, str]:
  """(name, class) of the stages; a bar an arm; the SI prefix of the axis."""
  names = list(dict.fromkeys(plain(s.stage) for s in stages))
  totals: dict[str, list[float]] = {}
  for one in stages:
    arm = plain(one.arm or "shared by all")
    values = totals.setdefault(arm, [0.0] * len(names))
    values[names.index(plain(one.stage))] += finite(one.flops) or 0.0
  divisor, letter = prefix(max(map(sum, totals.values())))
  rows = [
    (arm, [v / divisor for v in values], engineering(sum(values)))
    for arm, values in totals.items()
  ]
  kinds = [f"bar c{i % charts.COLOURS}" for i in range(len(names))]
  return list(zip(names, kinds)), rows, letter


def plateau_series(found: Node) -> tuple[list[Series], bool]:
  """What was measured with the fitted curves; whether points are repeated."""
  x, y, se = ([finite(v) for v in found[k]] for k in ("x", "y", "se"))
  points = [p for p in zip(x, y) if None not in p]
  at = sorted({p for p, _ in points})
  seen = [[v for p, v in points if p == q] for q in at]
  repeated = len(at) < len(points)
  if repeated:
    band = [(p, min(v), max(v)) for p, v in zip(at, seen)]
  else:
    whole = [p for p in zip(x, y, se) if None not in p]
    band = sorted((p, v - Z * e, v + Z * e) for p, v, e in whole)
  means = [(p, sum(v) / len(v)) for p, v in zip(at, seen)]
  series = [Series("measured", means, 0, band)]
  r, a, b = (finite(found[k].value) for k in "rab")
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
  spots = [(finite(a.cost), finite(a.win.value), plain(a.label)) for a in arms]
  spots = sorted(s for s in spots if None not in s[:2])
  best, corners = -np.inf, []
  for cost, value, _ in spots:
    if value > best:
      corners.append((100 * cost, value))
      best = value
  singles = [
    Series(name, [(100 * cost, value)], i)
    for i, (cost, value, name) in enumerate(spots)
  ]
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
  found = []
  for row in rows:
    against = f" against {row.against}" if row.against else ""
    for key, how in (
      ("with_sft", "counting the SFT stage"),
      ("without_sft", "leaving the SFT stage out"),
    ):
      x = finite(row[key]) or 0.0
      if x < 0:
        found.append(
          f"{row.arm}{against}, {how}: {percent(x)} saved, so it used "
          f"{percent(-x)} more FLOPs."
        )
  return found


def arm_html(arm: dict[str, Any]) -> str:
  """The page of one arm, an entry of `summary["arms"]`."""
  node = Node(arm)
  name = plain(node.name or "An arm without a name")
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
  looks = [(plain(a.name), c) for a, (_, c) in zip(groups, styles(groups))]
  looks += [(plain(baseline.name), charts.MUTED)] if baseline else []
  names = page.known(every)
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


page.expose(forest_rows, stage_bars, plateau_series, frontier, best_first)


def grid_html(summary: dict[str, Any]) -> str:
  """The page of a grid, as `grid.summarise` describes it."""
  return page.render("grid.html", summary=Node(summary))
