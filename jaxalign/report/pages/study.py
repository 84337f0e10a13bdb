"""The page over a job that compares several arms, and its plain-text form."""

from collections.abc import Callable, Sequence
import textwrap
from typing import Any

from jaxalign import progress
from jaxalign.report import charts, page
from jaxalign.report.page import Html, tag
from jaxalign.report.pages import evidence, judges, plateau, run, samples
from jaxalign.report.pages.run import fields, records

OPEN = 40  # lines of the ledger that stand open
COLUMNS, LINES = 80, 25  # of the terminal's summary


def _styles(arms: Sequence[dict]) -> list[tuple[str, int]]:
  """(name, colour) per arm: seeds of one sampler and budget look alike."""
  groups: dict[Any, list[str]] = {}
  keys = []
  for arm in arms:
    # repr, since a key from a broken file need not be hashable.
    key = repr([arm.get(k) for k in ("sampler", "budget", "is_all", "like")])
    if arm.get("sampler") is None:
      key = repr(arm.get("name"))
    keys.append(key)
    groups.setdefault(key, []).append(page.plain(arm.get("name")))
  colours = {key: i for i, key in enumerate(groups)}
  named = {}
  for key, names in groups.items():
    arm = arms[keys.index(key)]
    if len(set(names)) == 1:
      named[key] = names[0]
    elif arm.get("is_all") and arm.get("like"):
      named[key] = f"all, as long as {run.budget(arm.get('like'))}"
    elif arm.get("is_all"):
      named[key] = "all"
    else:
      named[key] = page.plain(arm.get("sampler"))
  # Two budgets of one sampler need telling apart.
  for key, label in list(named.items()):
    if list(named.values()).count(label) > 1:
      arm = arms[keys.index(key)]
      named[key] = f"{label} {run.budget(arm.get('budget'))}"
  return [(named[key], colours[key]) for key in keys]


def _baseline(summary: dict) -> dict:
  found = fields(summary.get("baseline"))
  return {"name": "SFT model", **found} if found else {}


# Sections, in the order of the page.


def _top(summary: dict, arms: list[dict]) -> Html:
  """Verdicts, warnings and key figures, before any section."""
  data = fields(summary.get("data"))
  counts = fields(data.get("rows"))
  ledger = fields(summary.get("ledger"))
  verdicts = run.words(summary.get("verdicts"))
  warned = run.words(summary.get("warnings"))
  few = [a for a in arms if not a.get("is_all")]
  used = sorted(
    {x for x in (page.finite(a.get("rows")) for a in few) if x is not None}
  )
  pool = page.finite(counts.get("pool"))
  tiles = [
    (
      page.number(counts.get("pool")),
      "rows in the pool",
      f"{page.number(counts.get('held_out'))} held out",
    )
  ]
  if used:
    span = [int(used[0]), int(used[-1])] if len(used) > 1 else [int(used[0])]
    share = " to ".join(page.percent(u / pool) for u in span) if pool else ""
    tiles.append(
      (
        " to ".join(page.number(u) for u in span),
        "rows in a selection",
        f"{share} of the pool" if share else None,
      )
    )
  seeds = len({repr(a.get("seed")) for a in arms})
  names = len(set(_styles(arms)))
  tiles.append(
    (
      page.number(names),
      "arms" if names != 1 else "arm",
      f"{seeds} {'seeds' if seeds != 1 else 'seed'}, "
      f"{len(arms)} {'runs' if len(arms) != 1 else 'run'}",
    )
  )
  spent = [
    x
    for x in (
      page.finite(s.get("flops")) for s in records(ledger.get("stages"))
    )
    if x is not None
  ]
  if spent:
    share = page.finite(ledger.get("selection_share"))
    least = "≥ " if len(spent) < len(records(ledger.get("stages"))) else ""
    tiles.append(
      (
        least + page.engineering(sum(spent)),
        "spent in all",
        None if share is None else f"{page.percent(share)} of it on selecting",
      )
    )
  parts = []
  if verdicts:
    parts.append(page.callout("verdict", "What was found", verdicts))
  else:
    parts.append(page.paragraph("This job reached no verdict.", kind="absent"))
  parts.append(run.overspent_callout(_savings(summary, arms)))
  if warned:
    parts.append(page.callout("warning", "Read with care", warned))
  parts.append(page.figures(tiles))
  return page.join(parts)


def _count(found: dict) -> str:
  """What an interval is over: prompts, seeds, or both."""
  n, prompts = page.number(found.get("n")), found.get("prompts")
  if prompts is not None:
    return f"{n} seeds × {page.number(prompts)} prompts"
  return f"{n} seeds" if found.get("seeds") is not None else n


def _forest(rows: Sequence[tuple[str, int, dict]], name: str) -> Html:
  """Every arm's value of one metric, against chance where there is one."""
  m = run.metric(name)
  scale = 100.0 if m.share else 1.0
  placed = [
    charts.Row(
      label,
      f.get("value"),
      f.get("low"),
      f.get("high"),
      run.measured(m, f),
      colour,
    )
    for label, colour, f in rows
  ]
  many = {
    _count(f)
    for _, _, f in rows  # an arm may have no such number
    if f.get("n") is not None and f.get("value") is not None
  }
  caption = f"{m.name}: value and 95 % interval per arm"
  if many:
    caption += f", n = {' / '.join(sorted(many))}"
  if m.chance is not None:
    caption += ". Dashed: no preference"
  return page.figure(
    charts.intervals(
      placed,
      m.name,
      run.headed(name),
      scale=scale,
      reference=m.chance,
      reference_label="even" if m.chance is not None else "",
    ),
    caption + ".",
  )


def _differences(found: list[dict], colours: dict) -> list[Html]:
  """Pairs of arms: an interval plot per metric and heading, and one table."""
  blocks, rows = [], []
  kinds: dict[tuple[str, str], list[dict]] = {}
  for c in found:
    title = page.plain(c.get("title")) if c.get("title") else ""
    kinds.setdefault((str(c.get("metric")), title), []).append(c)
  for (name, title), members in kinds.items():
    m = run.metric(name)
    unit = "percentage points" if m.share else m.unit
    drawn = []
    for c in members:
      gap = fields(c.get("difference"))
      label = f"{page.plain(c.get('a'))} − {page.plain(c.get('b'))}"
      text = run.measured(m, gap, sign=True)
      drawn.append(
        charts.Row(
          page.plain(c.get("label")) if title else label,
          gap.get("value"),
          gap.get("low"),
          gap.get("high"),
          text,
          colours.get(page.plain(c.get("label" if title else "a")), 6),
        )
      )
      rows.append(
        (
          label,
          m.name,
          page.join(
            [
              run.shown(m, gap.get("value"), sign=True, unit=False),
              " ",
              tag("small", run.bounds(m, gap, sign=True) or page.MISSING),
            ]
          ),
          page.number(gap.get("n")),
        )
      )
    blocks.append(
      page.figure(
        charts.intervals(
          drawn,
          f"{title or 'Difference'}, {m.name}",
          f"difference, {unit}" if unit else "difference",
          scale=100.0 if m.share else 1.0,
          reference=0.0,
          reference_label="no difference",
        ),
        f"{title + '. ' if title else ''}{m.name}: difference between arms "
        "with its 95 % interval"
        f"{', in percentage points' if m.share else ''}. An interval that "
        "crosses the dashed line leaves the sign open.",
      )
    )
  # The sentences stand below: a column of them is a thread on a phone.
  told = [tag("li", page.plain(c["words"])) for c in found if c.get("words")]
  return [
    *blocks,
    page.table(
      ("Difference", "Metric", "Value, points or units", "n"),
      rows,
      "Differences between arms.",
      text=(1,),
    ),
    tag("ul", *told) if told else page.absent("A verdict in words was"),
  ]


def _comparison(summary: dict, arms: list[dict]) -> Html:
  styles = _styles(arms)
  base = _baseline(summary)
  every = [*arms, *([base] if base else [])]
  looks = [(page.plain(a.get("name")), c) for a, (_, c) in zip(arms, styles)]
  looks += [(page.plain(base["name"]), charts.MUTED)] if base else []
  names = run.known(every)
  parts = []
  if names:
    main = [
      n
      for n in ("win_vs_target", "win_vs_chosen", "win_vs_sft", "accuracy")
      if n in names
    ] or names[:1]
    drawn = []
    for name in main:
      rows = [
        (label, colour, fields(run.metrics_of(a).get(name)))
        for a, (label, colour) in zip(every, looks)
      ]
      drawn.append(_forest([r for r in rows if r[2]], name))
    parts += [drawn[0], page.grid(*drawn[1:])]
    parts.append(
      page.table(
        ("Arm", "Rows", "Updates", *(run.headed(n) for n in names)),
        [
          (
            page.plain(a.get("name")),
            page.number(a.get("rows")),
            page.number(a.get("updates")),
            *(run.cell(run.metric(n), run.metrics_of(a).get(n)) for n in names),
          )
          for a in every
        ],
        "All metrics, with 95 % intervals below.",
      )
    )
  else:
    parts.append(page.absent("How well the arms do was"))
  found = records(summary.get("comparisons"))
  parts.append(tag("h3", "Differences"))
  colours = {name: c for name, c in [*styles, *looks]}
  parts += (
    _differences(found, colours)
    if found
    else [page.absent("Differences between arms were")]
  )
  return page.join([*parts, evidence.ranking(summary.get("ranking"))])


def _data(found: dict) -> Html:
  if not found:
    return page.absent("What the data holds was")
  counts = fields(found.get("rows"))
  cut = fields(found.get("truncation"))
  refused = fields(found.get("refused"))
  facts = [
    ("Source", found.get("source")),
    ("Schema", found.get("schema")),
    ("Kind", found.get("kind")),
    ("Records seen", page.number(found.get("seen"))),
    ("Rows for SFT", page.number(counts.get("sft"))),
    ("Rows in the pool", page.number(counts.get("pool"))),
    ("Rows held out", page.number(counts.get("held_out"))),
    ("Duplicates left out", page.number(found.get("duplicates"))),
  ]
  facts.append(
    (
      "Over the context",
      (
        f"{page.number(cut.get('too_long'))} rows left out, "
        f"{page.number(cut.get('rows_cut'))} cut; "
        f"{page.number(cut.get('context'))} tokens, "
        f"{page.number(cut.get('fits'))} keep 99 % whole"
      )
      if cut
      else "not measured",
    )
  )
  parts = [page.facts(facts)]
  if refused:
    total = sum(x for x in map(page.finite, refused.values()) if x is not None)
    parts.append(
      page.table(
        ("Reason", "Records"),
        [(page.plain(k), page.number(v)) for k, v in refused.items()],
        f"Refused records, {page.number(int(total))} in all.",
      )
    )
  elif found.get("refused") is not None:
    parts.append(page.paragraph("No record was refused."))
  rows = []
  for unit in ("chars", "tokens"):
    for part, value in fields(found.get(unit)).items():
      rows.append(
        (
          f"{page.plain(part).capitalize()}, "
          f"{'characters' if unit == 'chars' else 'tokens'}",
          *run.quantiles(value),
        )
      )
  parts.append(
    page.table(
      ("Text", "5th percentile", "Median", "95th percentile"),
      rows,
      "How long the texts are.",
    )
    if rows
    else page.absent("The lengths of the texts were")
  )
  if lines := page.lines_of(found.get("reading")):
    parts.append(page.text_box("How the rows were read", lines, limit=8000))
  examples = records(found.get("examples"))
  if examples:
    parts.append(tag("h3", "Rows as read"))
    for e in examples[: run.EXAMPLES]:
      parts.append(
        tag(
          "div",
          page.text_box("Prompt", e.get("prompt"), limit=600),
          page.grid(
            page.text_box("Chosen", e.get("chosen"), "yes", limit=600),
            page.text_box("Rejected", e.get("rejected"), "no", limit=600),
          ),
          class_="example",
        )
      )
  return page.join(parts)


def _selections(arms: list[dict]) -> Html:
  """One card per sampler and budget: the first seed that has one."""
  parts, seen = [], set()
  for arm, (label, colour) in zip(arms, _styles(arms)):
    if not fields(arm.get("selection")) or colour in seen:
      continue
    seen.add(colour)
    rows = page.number(arm.get("rows"))
    parts += [
      tag("h3", label, ": ", rows, " rows"),
      run.selection(arm.get("selection")),
    ]
  return (
    page.join(parts)
    if parts
    else page.absent("What the samplers chose, and how stably, was")
  )


def _savings(summary: dict, arms: list[dict]) -> list[dict]:
  """The ledger's savings, else those that the arms carry."""
  found = records(fields(summary.get("ledger")).get("saved"))
  return found or [
    {"arm": a.get("name"), **fields(a.get("saved"))}
    for a in arms
    if not a.get("is_all") and fields(a.get("saved"))
  ]


def _seconds(value: Any) -> str:
  x = page.finite(value)
  return page.number(value) if x is None or x < 0 else progress.duration(x)


def _ledger(summary: dict, arms: list[dict]) -> Html:
  ledger = fields(summary.get("ledger"))
  stages = records(ledger.get("stages"))
  saved = _savings(summary, arms)
  parts = [run.overspent_callout(saved)]
  if stages:
    parts += _costs(stages)
  else:
    parts.append(page.absent("What each stage cost was"))
  share = ledger.get("selection_share")
  if share is not None:
    parts.append(
      page.paragraph(f"Selecting took {page.percent(share)} of all flops.")
    )
  if saved:
    parts.append(
      page.table(
        (
          "Arm",
          "Against",
          "Saved, counting the SFT stage",
          "Saved, leaving it out",
        ),
        [
          (
            page.plain(s.get("arm")),
            page.plain(s.get("against")),
            run.saving(s.get("with_sft")),
            run.saving(s.get("without_sft")),
          )
          for s in saved
        ],
        "Operations saved; below zero the arm cost more than it saved.",
        text=(1,),
      )
    )
  else:
    parts.append(page.absent("What selecting saves was"))
  return page.join([*parts, evidence.efficiency(summary.get("efficiency"))])


def _costs(stages: list[dict]) -> list[Html]:
  """The stacked bars and the table of the ledger."""
  names = list(dict.fromkeys(page.plain(s.get("stage")) for s in stages))
  totals: dict[str, list[float]] = {}
  for s in stages:
    arm = page.plain(s.get("arm") or "shared by all")
    values = totals.setdefault(arm, [0.0] * len(names))
    values[names.index(page.plain(s.get("stage")))] += (
      page.finite(s.get("flops")) or 0.0
    )
  divisor, letter = page.prefix(max(map(sum, totals.values())))
  chart = charts.bars(
    [
      (arm, [v / divisor for v in values], page.engineering(sum(values)))
      for arm, values in totals.items()
    ],
    names,
    "Operations per arm and stage",
    f"flops, {letter}FLOP",
  )
  unknown = sum(page.finite(s.get("flops")) is None for s in stages)
  gap = (
    f" Operations of {unknown} stage{'s' if unknown != 1 else ''} were "
    "not measured and are missing here."
    if unknown
    else ""
  )
  figure = page.figure(
    page.join(
      [charts.legend([(n, i) for i, n in enumerate(names)], "block"), chart]
    ),
    "Operations by arm and stage. What several arms share is paid once and "
    "has a bar of its own." + gap,
  )
  table = page.table(
    (
      "Stage",
      "Arm",
      "Operations",
      "Predicted",
      "Tokens",
      "Time",
      "Predicted time",
      "Bytes written",
    ),
    [
      (
        page.plain(s.get("stage")),
        page.plain(s.get("arm") or "shared"),
        page.engineering(s.get("flops")),
        _predicted(page.engineering, s.get("predicted_flops")),
        page.number(s.get("tokens")),
        _seconds(s.get("seconds")),
        _predicted(_seconds, s.get("predicted_seconds")),
        page.engineering(s.get("bytes"), "B"),
      )
      for s in stages
    ],
    "The ledger, stage by stage. Predicted as --dry_run "
    "does: by the shapes, at an assumed rate, compiling not counted.",
    text=(1,),
  )
  if len(stages) > OPEN:
    table = tag("details", tag("summary", "The ledger, stage by stage"), table)
  return [figure, table, *_held(stages)]


def _held(stages: list[dict]) -> list[Html]:
  """What choosing held in memory, beside what was predicted."""
  known = [s for s in stages if s.get("held") is not None]
  if not known:
    return []
  size = lambda count: page.engineering(count, "B")
  table = page.table(
    ("Arm", "Memory held", "Predicted", "On devices", "Predicted"),
    [
      (
        page.plain(s.get("arm")),
        *(
          _predicted(size, s.get(name))
          for name in ("held", "predicted_held", "device", "predicted_device")
        ),
      )
      for s in known
    ],
    "What choosing added to memory at its largest moment, "
    "looked at every 10 ms; memory that was free already does not show, nor "
    "what a device does not say.",
  )
  return [tag("details", tag("summary", "Memory of choosing"), table)]


def _predicted(words: Callable[[Any], str], value: Any) -> str:
  return words(value) if value is not None else "–"


def _again(summary: dict) -> Html:
  """How to run it again: command, machine, files."""
  command = summary.get("command")
  parts = [
    tag(
      "pre",
      tag("code", command),
      class_="command",
      tabindex="0",
      aria_label="Command",
    )
    if command
    else page.paragraph("The command was not recorded.", kind="absent")
  ]
  machine = fields(summary.get("machine"))
  facts = [
    ("jaxalign", summary.get("version")),
    ("jax", machine.get("jax")),
    ("Platform", machine.get("platform")),
    ("Devices", machine.get("devices")),
    ("Mesh", _mesh(machine)),
  ]
  parts.append(page.facts([(k, v) for k, v in facts if v is not None]))
  files = fields(summary.get("files"))
  if files:
    parts += [
      tag("h3", "Files"),
      tag(
        "ul",
        *(tag("li", page.link(page.plain(k), v)) for k, v in files.items()),
      ),
    ]
  return page.join(parts)


def _mesh(machine: dict) -> Any:
  mesh = machine.get("mesh")
  if isinstance(mesh, dict):
    return " × ".join(
      f"{page.plain(k)} {page.plain(v)}" for k, v in mesh.items()
    )
  return mesh


def render(summary: dict) -> str:
  """The page over a job of several arms.

  Args:
    summary: what the job wrote to summary.json; any key may be None or
      absent, and its section then says that it was not measured.

  Returns:
    A whole HTML document that loads nothing and runs nothing.
  """
  summary = fields(summary)
  arms = records(summary.get("arms"))
  # Of several seeds an arm is one line, of its mean.
  groups = records(summary.get("groups")) or arms
  styles = _styles(arms)
  fit, along = fields(summary.get("fit")), fields(summary.get("along"))
  byline = [
    b
    for b in (
      summary.get("created"),
      f"jaxalign {page.plain(summary['version'])}"
      if summary.get("version") is not None
      else None,
      fields(summary.get("machine")).get("platform"),
    )
    if b is not None
  ]
  return str(
    page.document(
      summary.get("title") or "jaxalign report",
      [
        ("comparison", "Comparison", _comparison(summary, groups)),
        *(
          [
            (
              "plateau",
              "How it grows with data",
              plateau.section(fit, run.metric(fit.get("metric")).name),
            )
          ]
          if fit
          else []
        ),
        *(
          [
            (
              "along",
              "Along one epoch",
              plateau.section(along, run.metric(along.get("metric")).name),
            )
          ]
          if along
          else []
        ),
        ("data", "Data", _data(fields(summary.get("data")))),
        ("selection", "Selection", _selections(arms)),
        ("training", "Training", run.curves(arms, styles)),
        ("cost", "Cost", _ledger(summary, arms)),
        *(
          [("judge", "Judge", judges.of_job(summary["judge"]))]
          if judges.asked(summary.get("judge"))
          else []
        ),
        (
          "samples",
          "Samples",
          samples.section(
            summary.get("samples"),
            page.plain(_baseline(summary).get("name") or "SFT model"),
          ),
        ),
        ("again", "Run it again", _again(summary)),
      ],
      lede=summary.get("asked"),
      byline=byline,
      top=_top(summary, arms),
    )
  )


def terminal(summary: dict) -> str:
  """The job in at most 25 lines of 80 columns, without control characters.

  Args:
    summary: as `render` takes it.
  """
  summary = fields(summary)
  runs = records(summary.get("arms"))
  arms = records(summary.get("groups")) or runs
  base = _baseline(summary)
  every = [*arms, *([base] if base else [])]
  names = [
    n
    for n in ("win_vs_target", "win_vs_chosen", "win_vs_sft", "accuracy", "kl")
    if n in run.known(every)
  ]
  heads = {
    "win_vs_target": "wins/target, %",
    "win_vs_sft": "wins/ref, %",
    "win_vs_chosen": "wins/chosen, %",
    "accuracy": "accuracy, %",
    "kl": "KL, nats",
  }

  def short(name, found):
    found = fields(found)
    value = run.shown(run.metric(name), found.get("value"), unit=False)
    low, high = (page.finite(found.get(k)) for k in ("low", "high"))
    if name != "win_vs_target" or low is None or high is None:
      return value if found else page.MISSING
    return f"{value} {run.bounds(run.metric(name), found)}"

  cost = [g for g in records(summary.get("groups")) if "flops" in g]
  if cost:  # of several seeds: what it is for, in place of how far it went
    names = [n for n in names if n != "kl"]
  title = charts.shorten(summary.get("title") or "jaxalign report", COLUMNS)
  text = [title, "=" * len(title)]
  grid = [
    ["arm", "rows", *(heads[n] for n in names), *(["FLOP"] if cost else [])]
  ]
  for arm in every:
    grid.append(
      [
        charts.shorten(arm.get("name"), 20),
        charts.shorten(page.number(arm.get("rows")), 9),
        *(
          charts.shorten(short(n, run.metrics_of(arm).get(n)), 20)
          for n in names
        ),
        *([page.engineering(arm.get("flops"), "")] if cost else []),
      ]
    )
  room = 14
  left = len(grid) - 1 - room
  grid = grid[: room + 1]
  wide = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
  if every:
    for row in grid:
      cells = [row[0].ljust(wide[0])]
      cells += [c.rjust(w) for c, w in zip(row[1:], wide[1:])]
      text.append("  ".join(cells)[:COLUMNS].rstrip())
    if left > 0:
      text.append(f"... and more arms ({left}) in the report")
  else:
    text.append("no arm was measured")
  said = [
    *(("", page.plain(v)) for v in run.words(summary.get("verdicts"))),
    *(
      ("Costs more than it saves: ", v)
      for v in run.overspent(_savings(summary, runs))
    ),
    *(("Warning: ", page.plain(w)) for w in run.words(summary.get("warnings"))),
  ]
  for i, (lead, words) in enumerate(said):
    lines = textwrap.wrap(
      f"- {lead}{' '.join(words.split())}",
      COLUMNS,
      subsequent_indent="  ",
      max_lines=4,
      placeholder=" ...",
    )
    if len(text) + len(lines) > LINES - 1:
      text.append(f"... and more remarks ({len(said) - i}) in the report")
      break
    text += lines
  return "\n".join(text[:LINES]).replace(page.NO_BREAK, " ")
