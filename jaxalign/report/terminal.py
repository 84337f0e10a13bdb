"""A job, a grid and a table of raters as plain text for a terminal."""

from collections.abc import Sequence
import textwrap
from typing import Any

from jaxalign.report import page, raters_page, study_page
from jaxalign.report.nodes import (
  engineering,
  entries,
  finite,
  MISSING,
  NO_BREAK,
  Node,
  number,
  percent,
  raw,
  records,
  sentences,
  shorten,
)
from jaxalign.report.page import measured, PERCENT, PLAIN

COLUMNS, LINES, ARMS = 80, 25, 14  # of the text on a job
# The metrics it shows, and their heads.
HEADS = {
  "win_vs_target": "wins/target, %",
  "win_vs_chosen": "wins/chosen, %",
  "win_vs_sft": "wins/ref, %",
  "accuracy": "accuracy, %",
  "kl": "KL, nats",
}


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
  """Words under each other, all but the first column on the right."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  return [
    "  ".join(
      word.rjust(width) if i else word.ljust(width)
      for i, (word, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in rows
  ]


def _metric(arm: Node, name: str) -> str:
  """A metric in few characters; only the first has its interval."""
  found, m = page.metrics_of(arm).get(name), page.metric(name)
  if not found:
    return MISSING
  ends = finite(found.low), finite(found.high)
  whole = name == "win_vs_target" and None not in ends
  return measured(found, m) if whole else page.value_text(found.value, m)


def study_text(summary: dict[str, Any]) -> str:
  """A job in at most 25 lines of 80 columns, without control characters.

  Args:
    summary: as `study_page.study_html` takes it.
  """
  node = Node(summary)
  runs, groups = records(node.arms), records(node.groups)
  base = study_page.baseline_of(node)
  every = [*(groups or runs), *([base] if base else [])]
  # Of several seeds: what it is for, in place of how far it went.
  cost = any("flops" in raw(group) for group in groups)
  known = {*page.metric_names(every)} - ({"kl"} if cost else set())
  names = [n for n in HEADS if n in known]
  title = shorten(node.title or "jaxalign report", COLUMNS)
  text = [title, "=" * len(title)]
  rows = [["arm", "rows", *(HEADS[n] for n in names), *["FLOP"] * cost]]
  for arm in every[:ARMS]:
    row = [shorten(arm.name, 20), shorten(number(arm.rows), 9)]
    row += [shorten(_metric(arm, n), 20) for n in names]
    rows.append(row + [engineering(arm.flops, "")] * cost)
  if every:
    text += [line[:COLUMNS].rstrip() for line in _columns(rows)]
  else:
    text.append("no arm was measured")
  if len(every) > ARMS:
    text.append(f"... and more arms ({len(every) - ARMS}) in the report")
  over = study_page.overspent(study_page.savings(node, runs))
  remarks = sentences(node.verdicts)
  remarks += [f"Costs more than it saves: {words}" for words in over]
  remarks += [f"Warning: {words}" for words in sentences(node.warnings)]
  for i, words in enumerate(remarks):
    lines = textwrap.wrap(
      f"- {' '.join(words.split())}",
      COLUMNS,
      subsequent_indent="  ",
      max_lines=4,
      placeholder=" ...",
    )
    if len(text) + len(lines) > LINES - 1:
      text.append(f"... and more remarks ({len(remarks) - i}) in the report")
      break
    text += lines
  return "\n".join(text[:LINES]).replace(NO_BREAK, " ")


def grid_text(summary: dict[str, Any]) -> str:
  """A grid: the arms of every world, best first, and over all worlds."""
  node, out = Node(summary), []
  for world in node.worlds:
    verdicts = {str(v.label): v for v in world.verdicts}
    seeds = ", ".join(map(str, world.seeds)) or "none"
    out.append(f"\n{world.world}, seeds {seeds}")
    for arm in study_page.best_first(records(world.arms), "win"):
      name = str(arm.label)
      line = f"  {name[:30]:30} {percent(arm.win.value):>7}"
      if found := verdicts.get(name):
        line += f"  {measured(found.difference, sign=True)}  {found.verdict}"
      if raw(arm.wrong) is not None:
        line += f"  wrong {percent(arm.wrong)}, junk {percent(arm.junk)}"
      out.append(line)
  for one in node.pooled:
    out.append(
      f"over all worlds: {str(one.label)[:30]:30} "
      f"{measured(one.difference, sign=True)}, above in {one.above} of "
      f"{one.cells} cells, least {page.value_text(one.least, sign=True)}"
    )
  out += [f"no summary: {name}" for name in node.missing]
  return "\n".join(out).replace(NO_BREAK, " ")


def _exact(found: Node) -> str:
  """A measure to four places, its interval to three."""
  value, low, high = (finite(found[k]) for k in ("value", "low", "high"))
  if value is None:
    return MISSING
  ends = "" if None in (low, high) else f" [{low:.3f}, {high:.3f}]"
  return f"{value:.4f}{ends}".replace("-", "−")


def _value(found: Node, m: page.Metric = PERCENT) -> str:
  return measured(found, m) if found else MISSING


def _agreed(found: Node) -> list[str]:
  beyond = [_exact(found[k]) for k in ("kappa", "pi", "alpha")]
  n = number(found.agreement.n)
  return [_value(found.agreement), *beyond, n]


def agreement_text(found: dict[str, Any]) -> str:
  """All numbers of a table of raters, from `cli.agreement.measure`."""
  node = Node(found)
  head = ["same, %", "kappa", "Scott's pi", "alpha", "pairs"]
  out = ["", raters_page.alpha_sentence(node)]
  if pairs := entries(node.among.between):
    rows = [[shorten(name, 44), *_agreed(one)] for name, one in pairs]
    out += ["", *_columns([["raters", *head], *rows])]
  for name, one in entries(node.judged.judges):
    rules = [rule for _, rule in entries(one.against)]
    if one.unparsable:
      rows = [[str(rule.rule), *_agreed(rule)] for rule in rules]
    else:
      rows = [["all verdicts could be read", *_agreed(rules[0])]]
    name = f"{shorten(name, 44)} against the majority"
    out += ["", *_columns([[name, *head], *rows])]
    errors = one.lengths.errors
    if errors.n:
      count = number(errors.n)
      out.append(
        f"its errors towards the longer answer: {_value(errors)} % of {count}"
      )
  if not node.labels:
    rows = [
      "rater|verdicts|ties|not read|both orders alike, %|their kappa|"
      "first wins, %|longer wins, %|log-odds a sd of length".split("|")
    ]
    for one in records(node.raters):
      orders, lengths = one.orders, one.lengths
      counts = [number(one[k]) for k in ("verdicts", "ties", "unparsable")]
      places = [_value(orders.consistent), _exact(orders.kappa)]
      longer = [_value(lengths.longer), _value(lengths.slope, PLAIN)]
      first = [_value(orders.first)]
      rows.append([shorten(one.name, 44), *counts, *places, *first, *longer])
    out += ["", *_columns(rows)]
  left_out = raters_page.left_out(node)
  return "\n".join([*out, *left_out, "[...]: 95 % intervals"])


def reading_text(files: list[dict[str, Any]]) -> str:
  """How the files of a table of raters were read."""
  out = []
  for one in records(files):
    name, layout = shorten(one.name, 200), one.layout
    rows, verdicts = number(one.rows), number(one.verdicts)
    out.append(f"{name}: {rows} rows, read as: {layout}; {verdicts} verdicts")
    out += [f"  {shorten(line, 400)}" for line in sentences(one.lines)]
    for example in records(one.examples):
      item = shorten(example.prompt or example.item, 60)
      out.append(f"  {shorten(example.where, 200)}: item {item!r}")
      for answer, text in zip(example.answers, example.texts):
        out.append(f"    {shorten(answer, 40)}: {shorten(text, 60)!r}")
      cells = [f"{shorten(r, 40)}: {shorten(v, 40)}" for r, v in example.cells]
      out.append(f"    {'; '.join(cells)}")
  return "\n".join(out)
