"""The page of a grid: samplers against a baseline, a section for each world."""

from typing import Any

from jaxalign.report import charts, page
from jaxalign.report.page import Html, tag
from jaxalign.report.pages import run
from jaxalign.report.pages.run import fields, records

_SHARE = run.Metric("")  # shown in percent
READS = (
  "Samplers that read labels (crossfit, margins) save training, not "
  "annotation; external_margin reads a true or modelled reward."
)


def _by_label(world: dict) -> dict[str, dict]:
  return {v.get("label"): v for v in records(world.get("verdicts"))}


def _ranked(world: dict) -> list[dict]:
  """The arms, best mean first."""
  value = lambda a: page.finite(fields(a.get("win")).get("value"))
  return sorted(
    records(world.get("arms")),
    reverse=True,
    key=lambda a: -1e9 if value(a) is None else value(a),
  )


def _interval(found: Any, sign: bool = False) -> Html:
  found = fields(found)
  return page.join(
    [
      run.shown(_SHARE, found.get("value"), sign=sign, unit=False),
      " ",
      tag("small", run.bounds(_SHARE, found, sign=sign) or page.MISSING),
    ]
  )


def _table(world: dict, baseline: str) -> Html:
  told, rows = _by_label(world), []
  for arm in _ranked(world):
    found = told.get(arm.get("label"), {})
    rows.append(
      (
        page.plain(arm.get("label")),
        page.number(arm.get("rows")),
        _interval(arm.get("win")),
        _interval(found.get("difference"), sign=True) if found else "–",
        page.plain(found.get("verdict", "–")),
        *(
          page.percent(arm.get(n)) if arm.get(n) is not None else "–"
          for n in ("wrong", "junk", "malformed", "cost")
        ),
      )
    )
  return page.table(
    (
      "Arm",
      "Rows",
      "Win rate, %",
      f"Above {baseline}, points",
      "Verdict",
      "Wrong labels",
      "Junk",
      "Malformed answers",
      "Operations of all",
    ),
    rows,
    "Means over seeds with Student's 95 % intervals. Verdicts are "
    "corrected for their number (Holm). Operations: selecting, the "
    "reference's pass and training, as a share of aligning on everything.",
    text=(4,),
  )


def _forest(world: dict, baseline: str) -> Html:
  told, rows = _by_label(world), []
  for arm in _ranked(world):
    found = told.get(arm.get("label"))
    if found is None:
      continue
    d = fields(found.get("difference"))
    colour = {"better": 0, "worse": 1}.get(found.get("verdict"), charts.MUTED)
    rows.append(
      charts.Row(
        page.plain(arm.get("label")),
        d.get("value"),
        d.get("low"),
        d.get("high"),
        run.measured(_SHARE, d, sign=True),
        colour,
      )
    )
  return page.figure(
    charts.intervals(
      rows,
      f"Win rate less that of {baseline}",
      "points",
      scale=100.0,
      reference=0.0,
      reference_label=baseline,
    ),
    "Difference of win rate and its 95 % interval over seeds. Coloured: a "
    "verdict after the correction.",
  )


def _frontier(world: dict) -> Html:
  """Win rate against what it cost; no other arm is up and left of a corner."""
  arms = [
    (
      page.finite(a.get("cost")),
      page.finite(fields(a.get("win")).get("value")),
      page.plain(a.get("label")),
    )
    for a in records(world.get("arms"))
  ]
  arms = sorted(a for a in arms if None not in a[:2])
  best, corners = -1e9, []
  for cost, value, _ in arms:
    if value > best:
      corners.append((100 * cost, value))
      best = value
  series = [charts.Series("frontier", corners, charts.MUTED)]
  series += [
    charts.Series(name, [(100 * cost, value)], i)
    for i, (cost, value, name) in enumerate(arms)
  ]
  return page.figure(
    charts.lines(
      series,
      "Quality for its cost",
      "% of the flops of everything",
      "win rate, %",
      scale=100.0,
    ),
    "Each arm's mean win rate against its flops, selecting counted; "
    "the line joins the arms that no cheaper one beats.",
  )


def _pooled(summary: dict) -> Html | str:
  found = records(summary.get("pooled"))
  if not found:
    return ""
  rows = []
  for one in sorted(
    found,
    key=lambda o: -(page.finite(fields(o.get("difference")).get("value")) or 0),
  ):
    rows.append(
      (
        page.plain(one.get("label")),
        _interval(one.get("difference"), sign=True),
        f"{page.number(one.get('above'))} of {page.number(one.get('cells'))}",
        run.shown(_SHARE, one.get("least"), sign=True, unit=False),
      )
    )
  return page.table(
    (
      "Arm",
      f"Above {page.plain(summary.get('baseline'))}, points",
      "Cells above",
      "Least cell",
    ),
    rows,
    "Over all worlds: the mean of a seed's worlds, then over seeds.",
  )


def render(summary: dict) -> str:
  """The page.

  Args:
    summary: as `grid.summarise` returns it, perhaps from a file.
  """
  baseline = page.plain(summary.get("baseline"))
  sections = []
  missing = run.words(summary.get("missing"))
  top = page.join(
    [
      page.callout(
        "note",
        "What this compares",
        ["Every seed has a world, a reference and prompts of its own.", READS],
      ),
      *(
        [page.callout("warning", "Jobs without a summary", missing)]
        if missing
        else []
      ),
      _pooled(summary),
    ]
  )
  for i, world in enumerate(records(summary.get("worlds"))):
    name = page.plain(world.get("world"))
    seeds = run.words(world.get("seeds"))
    start = fields(world.get("start"))
    sections.append(
      (
        f"world{i}",
        name,
        page.join(
          [
            page.paragraph(
              f"Seeds {', '.join(map(page.plain, seeds)) or 'none'}; "
              f"before alignment {run.measured(_SHARE, start)}."
            ),
            _table(world, baseline),
            _forest(world, baseline),
            _frontier(world),
            tag(
              "ul",
              *(
                tag("li", page.plain(v.get("words")))
                for v in records(world.get("verdicts"))
              ),
            )
            if world.get("verdicts")
            else "",
          ]
        ),
      )
    )
  return str(
    page.document(
      "Samplers side by side",
      sections,
      top=top,
      lede="Win rate against the SFT target.",
      byline=[page.plain(summary.get("command"))],
    )
  )


def terminal(summary: dict) -> str:
  """The table in words."""
  out = []
  for world in summary["worlds"]:
    told = _by_label(world)
    out.append(
      f"\n{world['world']}, seeds "
      f"{', '.join(map(str, world['seeds'])) or 'none'}"
    )
    for arm in _ranked(world):
      win, found = arm["win"], told.get(arm["label"])
      line = f"  {arm['label'][:30]:30} {100 * win['value']:5.1f} %"
      if found:
        d = found["difference"]
        line += f"  {100 * d['value']:+5.1f}"
        if d["low"] is not None:
          line += f" [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        line += f"  {found['verdict']}"
      if "wrong" in arm:
        line += (
          f"  wrong {100 * arm['wrong']:.1f} %, junk {100 * arm['junk']:.1f} %"
        )
      out.append(line)
  for one in summary["pooled"]:
    d = one["difference"]
    ends = (
      ""
      if d["low"] is None
      else (f" [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]")
    )
    out.append(
      f"over all worlds: {one['label'][:30]:30} "
      f"{100 * d['value']:+5.1f}{ends}, above in {one['above']} of "
      f"{one['cells']} cells, least {100 * one['least']:+.1f}"
    )
  for name in summary["missing"]:
    out.append(f"no summary: {name}")
  return "\n".join(out)
