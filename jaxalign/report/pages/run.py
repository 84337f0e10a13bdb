"""The page of one arm, and the blocks it shares with the page of a study."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxalign.report import charts, page
from jaxalign.report.page import Html, tag


class Metric(NamedTuple):
  """How a metric is named, and whether it is a share (shown in percent)."""

  name: str
  share: bool = True
  unit: str = ""
  chance: float | None = None  # what no preference at all would give


METRICS = {
  "win_vs_target": Metric("Wins against the target text", chance=0.5),
  "win_vs_sft": Metric("Wins against the reference", chance=0.5),
  "win_vs_target_macro": Metric(
    "Wins against the target, mean over groups", chance=0.5
  ),
  "win_vs_target_equal_length": Metric(
    "Wins against the target at equal length", chance=0.5
  ),
  "win_vs_target_true": Metric(
    "Wins against the target by the true reward", chance=0.5
  ),
  "win_vs_chosen": Metric("Wins against the chosen answer", chance=0.5),
  "win_vs_chosen_macro": Metric(
    "Wins against the chosen answer, mean over groups", chance=0.5
  ),
  "win_vs_chosen_equal_length": Metric(
    "Wins against the chosen answer at equal length", chance=0.5
  ),
  "win_vs_sft_macro": Metric(
    "Wins against the reference, mean over groups", chance=0.5
  ),
  "win_vs_sft_equal_length": Metric(
    "Wins against the reference at equal length", chance=0.5
  ),
  "win_rate": Metric("Win rate", chance=0.5),
  "accuracy": Metric("Preference accuracy, held out", chance=0.5),
  "likelihood_accuracy": Metric(
    "Chosen likelier per token, no reference", chance=0.5
  ),
  "malformed": Metric("Malformed answers"),
  "ended": Metric("Answers that ended"),
  "empty": Metric("Empty answers"),
  "kl": Metric("KL from the reference", share=False, unit="nats"),
  "length": Metric("Answer length", share=False, unit="tokens"),
}

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

EXAMPLES = 3  # rows shown of each end of a ranking


# Whatever a stage left out or wrote askew, the page still renders.


def fields(value: Any) -> dict:
  """`value` if it is a dict, else an empty one."""
  return value if isinstance(value, dict) else {}


def items(value: Any) -> list:
  """`value` if it is a list or tuple, else an empty one."""
  return list(value) if isinstance(value, (list, tuple)) else []


def records(value: Any) -> list[dict]:
  """The dicts of a list."""
  return [v for v in items(value) if isinstance(v, dict)]


def words(value: Any) -> list:
  """A list of sentences; one sentence alone is a list of one."""
  return [value] if isinstance(value, str) else items(value)


def metric(name: Any) -> Metric:
  """What is known of a metric; an unknown one keeps its own name."""
  return METRICS.get(str(name), Metric(page.plain(name), share=False))


def headed(name: str) -> str:
  """A metric's name with its unit, for the head of a column or an axis."""
  m = metric(name)
  unit = "%" if m.share else m.unit
  return f"{m.name}, {unit}" if unit else m.name


def shown(m: Metric, value: Any, sign: bool = False, unit: bool = True) -> str:
  """One value of a metric in words."""
  if m.share:
    return page.percent(value, sign, "%" if unit else "")
  return page.number(value, sign=sign)


def bounds(m: Metric, found: dict, sign: bool = False) -> str:
  """The 95 % interval in brackets, or nothing where there is none."""
  low, high = found.get("low"), found.get("high")
  if low is None or high is None:
    return ""
  return (
    f"[{shown(m, low, sign, unit=False)}, {shown(m, high, sign, unit=False)}]"
  )


def measured(m: Metric, found: dict, sign: bool = False) -> str:
  """Value and interval in one line."""
  value = shown(m, found.get("value"), sign, unit=False)
  return f"{value} {bounds(m, found, sign)}".strip()


def cell(m: Metric, found: Any) -> Html | str:
  """Value over interval, for a table; metrics may add a share of ties."""
  found = fields(found)
  if not found:
    return page.MISSING
  small = [bounds(m, found)]
  if page.finite(found.get("ties")):
    small.append(f"ties {page.percent(found['ties'])}")
  return page.join(
    [
      shown(m, found.get("value"), unit=False),
      *(tag("small", s) for s in small if s),
    ]
  )


def metrics_of(arm: Any) -> dict:
  """An arm's metrics; a baseline may keep them beside its name."""
  arm = fields(arm)
  inner = {k: v for k, v in arm.items() if k in METRICS and isinstance(v, dict)}
  return {**inner, **fields(arm.get("metrics"))}


def known(arms: Sequence[dict]) -> list[str]:
  """The metrics that any arm has, in the order of METRICS, then the rest."""
  names = {str(n) for arm in arms for n in metrics_of(arm)}
  return [n for n in METRICS if n in names] + sorted(names - set(METRICS))


def budget(value: Any) -> str:
  """A fraction as a percentage, a number of records as a count."""
  x = page.finite(value)
  if x is not None and not isinstance(value, int) and x <= 1:
    return page.percent(x)
  return page.number(value)


def quantiles(value: Any) -> list[str]:
  """The 5th, 50th and 95th percentile in words."""
  found = items(value)[:3]
  return [page.number(v) for v in found] + [page.MISSING] * (3 - len(found))


# Curves.


def _over_seeds(
  group: list[list[tuple[float, float]]], name: str, colour: int, lost: int
) -> list[charts.Series]:
  """The mean of an arm's seeds in a band of their range, where x agrees."""
  # A point that is not finite goes along, to be counted and said.
  gaps = [(None, None)] * lost
  grids = {tuple(x for x, _ in points) for points in group if points}
  full = [points for points in group if points]
  if len(full) < 2 or len(grids) > 1:
    return [
      charts.Series(name, points + (gaps if i == 0 else []), colour)
      for i, points in enumerate(group)
    ]
  mean, band = [], []
  for at in zip(*full):
    ys = [y for _, y in at]
    mean.append((at[0][0], sum(ys) / len(ys)))
    band.append((at[0][0], min(ys), max(ys)))
  return [charts.Series(name, mean + gaps, colour, band)]


def curves(arms: Sequence[dict], styles: Sequence[tuple[str, int]]) -> Html:
  """Every curve of the arms, one chart each; `styles` is (name, colour).

  Arms of one style are seeds of one another and share a line.
  """
  names = {str(n) for a in arms for n in fields(a.get("curves"))}
  order = [n for n in CURVES if n in names] + sorted(names - set(CURVES))
  if not order:
    return page.absent("The training curves were")
  read = [
    {
      str(n): charts.pairs(items(points))
      for n, points in fields(arm.get("curves")).items()
    }
    for arm in arms
  ]
  ends = [
    max((p[-1][0] for p, _ in r.values() if p), default=0.0) for r in read
  ]
  drawn = [e for e in ends if e > 0]
  # Arms of very different length share an axis of progress, not of steps.
  relative = bool(drawn) and max(drawn) > 3 * min(drawn)
  x_label = "updates done, % of the arm's own" if relative else "update"
  seeds = len(set(styles)) < len(styles)
  blocks = []
  for name in order:
    title, unit, share, reference = CURVES.get(name, (name, "", False, None))
    groups, merged = {}, 1
    for found, style, end in zip(read, styles, ends):
      points, lost = found.get(name, ([], 0))
      points, k = charts.thin(points)
      merged = max(merged, k)
      if relative and end > 0:
        points = [(100 * x / end, y) for x, y in points]
      group = groups.setdefault(style, [[], 0])
      group[0].append(points)
      group[1] += lost
    series = [
      s
      for style, (group, lost) in groups.items()
      for s in _over_seeds(group, *style, lost)
    ]
    caption = f"{page.plain(title)}."
    if seeds:
      caption += " Lines: mean over seeds; bands: all seeds."
    if reference is not None:
      caption += (
        " Dashed: no preference." if share else " Dashed: no margin at all."
      )
    if merged > 1:
      caption += f" A point is the mean of up to {merged} logged values."
    blocks.append(
      page.figure(
        charts.lines(
          series,
          page.plain(title),
          x_label,
          unit,
          scale=100 if share else 1,
          reference=reference,
        ),
        caption,
      )
    )
  unique = list(dict.fromkeys(styles))
  return page.join(
    [charts.legend(unique) if len(unique) > 1 else "", page.grid(*blocks)]
  )


# Selection.


def card_words(found: dict) -> dict:
  """A card as `select.card` writes it, under the names the page uses."""
  if not found or "diagnostics" not in found:
    return found
  seen = fields(found["diagnostics"])
  steady, halves, labels = (
    fields(seen.get(k)) for k in ("stability", "held_out", "component_labels")
  )
  labels = labels or fields(seen.get("labels"))
  fitted = fields(found.get("mixture"))
  length = {}
  for name, key in (("selected", "chosen"), ("rest", "rest")):
    at = items(fields(found.get("length")).get(key))
    if at:  # five quantiles: the outer two and the middle one
      length[name] = [at[0], at[len(at) // 2], at[-1]]
  topic = fields(found.get("topic"))
  card = {
    "length": length,
    "topics": topic
    and {"selected": topic.get("covered"), "pool": topic.get("topics")},
  }
  return {
    "stability": steady
    and {
      "mean": steady.get("jaccard_mean", steady.get("mean")),
      "jaccard": steady.get("jaccard"),
    },
    "mixture": fitted
    and {
      "pca": fitted.get("directions"),
      **fitted,
      "in_fit": halves.get("mean_fitted"),
      "held_out": halves.get("mean_held_out"),
      "auc": halves.get("auc"),
      "label_accuracy": labels.get("accuracy"),
      "nmi": labels.get("nmi"),
    },
    "how differs": card,
    **{
      k: v
      for k, v in found.items()
      if k not in ("mixture", "length", "topic", "diagnostics")
    },
  }


def _differs(found: dict) -> list[Html]:
  """How the selected rows differ from the rest: scores, length, topics."""
  blocks = []
  scores = fields(found.get("score_histogram"))
  if scores:
    chart = charts.histogram(
      items(scores.get("edges")),
      items(scores.get("selected")),
      items(scores.get("rest")),
      "Scores of the selected rows and the rest",
      "score the rows were ranked by",
    )
    blocks.append(
      page.figure(
        page.join([charts.overlay_legend(), chart]),
        "Scores of the selected rows over those of the rest, each as a share "
        "of its own rows.",
      )
    )
  length = fields(found.get("length"))
  if length:
    rows = []
    for key, label, colour in (
      ("selected", "selected", 0),
      ("rest", "the rest", charts.MUTED),
    ):
      at = (items(length.get(key)) + [None] * 3)[:3]
      rows.append(
        charts.Row(
          label,
          at[1],
          at[0],
          at[2],
          f"{page.number(at[1])} [{page.number(at[0])}, {page.number(at[2])}]",
          colour,
        )
      )
    blocks.append(
      page.figure(
        charts.intervals(rows, "Response length", "response length, tokens"),
        "Response length: median, and the range from the 5th to the 95th "
        "percentile.",
      )
    )
  return blocks


def stability(found: dict) -> Html:
  """How much other seeds would have chosen the same rows."""
  overlaps = items(found.get("jaccard"))
  if not found or (not overlaps and found.get("mean") is None):
    return page.absent("How stable the selection is was")
  text = (
    f"Repeated with other seeds, selections share rows with a mean "
    f"overlap (Jaccard) of {page.number(found.get('mean'))}"
  )
  if overlaps:
    text += (
      f", from {len(overlaps)} comparisons: "
      f"{', '.join(page.number(v) for v in overlaps[:12])}"
    )
  return page.paragraph(text + ".")


def mixture(found: dict) -> Html:
  """The mixture in a list of facts, with what it warns of."""
  if not found:
    return page.absent("The mixture was not fitted or")
  names = (
    ("components", "Components", ""),
    ("covariance", "Covariance", ""),
    ("pca", "Principal directions", ""),
    ("in_fit", "Log-likelihood, rows of the fit", "nats per row"),
    ("held_out", "Log-likelihood, held-out rows", "nats per row"),
    ("auc", "AUC of fitted over held-out rows (0.5: none memorised)", ""),
    ("label_accuracy", "Components matched with labels, accuracy", ""),
    ("nmi", "Components and labels, shared information (NMI)", ""),
  )
  rows = []
  for key, name, unit in names:
    value = found.get(key)
    text = page.number(value, digits=4 if unit else 3)
    rows.append(
      (name, f"{text} {unit}".strip() if value is not None else "not measured")
    )
  warned = words(found.get("warnings"))
  return page.join(
    [
      page.facts(rows),
      *(
        [
          page.callout(
            "warning", "The mixture may not describe this pool", warned
          )
        ]
        if warned
        else []
      ),
    ]
  )


def _examples(title: str, rows: list[dict]) -> Html:
  blocks = [tag("h3", title)]
  for row in rows[:EXAMPLES]:
    blocks.append(
      tag(
        "div",
        page.paragraph(
          tag("code", row.get("id")),
          " · score ",
          page.number(row.get("score"), digits=4),
        ),
        page.text_box("Prompt", row.get("prompt"), limit=600),
        page.text_box("Chosen", row.get("chosen"), "yes", limit=600),
        page.text_box("Rejected", row.get("rejected"), "no", limit=600),
        class_="example",
      )
    )
  return tag("div", *blocks)


def selection(found: Any) -> Html:
  """The card of a selection: what was taken, how stable, by which model."""
  found = card_words(fields(found))
  if not found:
    return page.absent("What was selected, and how it differs, was")
  card = fields(found.get("how differs") or found.get("how_differs") or found)
  blocks = _differs(card)
  topics = fields(card.get("topics"))
  parts = []
  if blocks:
    parts.append(page.grid(*blocks))
  else:
    parts.append(page.absent("How the selected rows differ was"))
  if topics:
    parts.append(
      page.paragraph(
        f"The selected rows cover {page.number(topics.get('selected'))} of the "
        f"pool's {page.number(topics.get('pool'))} topics."
      )
    )
  parts += [
    stability(fields(found.get("stability"))),
    mixture(fields(found.get("mixture"))),
  ]
  first = records(found.get("examples_top"))
  last = records(found.get("examples_bottom"))
  if first or last:
    parts.append(
      tag(
        "details",
        tag("summary", "Rows ranked first and last"),
        page.grid(
          *([_examples("Ranked first", first)] if first else []),
          *([_examples("Ranked last", last)] if last else []),
        ),
      )
    )
  return page.join(parts)


# Savings.


def saving(value: Any) -> Html | str:
  """A saved share; one below zero stands out."""
  x = page.finite(value)
  text = page.percent(value)
  return tag("span", text, class_="minus") if x is not None and x < 0 else text


def overspent(rows: Sequence[dict]) -> list[str]:
  """A sentence for every saving that is negative."""
  found = []
  for row in rows:
    against = row.get("against")
    against = f" against {page.plain(against)}" if against else ""
    for key, how in (
      ("with_sft", "counting the SFT stage"),
      ("without_sft", "leaving the SFT stage out"),
    ):
      x = page.finite(row.get(key))
      if x is not None and x < 0:
        found.append(
          f"{page.plain(row.get('arm'))}{against}, {how}: "
          f"{page.percent(x)} saved, so it used "
          f"{page.percent(-x)} more flops."
        )
  return found


def overspent_callout(rows: Sequence[dict]) -> Html | str:
  """The warning over `overspent`, or nothing."""
  found = overspent(rows)
  return (
    page.callout("warning", "Selecting cost more than it saved", found)
    if found
    else ""
  )


def details(found: Any) -> Html | str:
  """The win rate's outcomes apart, at equal length, and by topic."""
  found = fields(found)
  if not found:
    return ""
  share = Metric("", share=True)
  row = lambda name, f: (
    name,
    shown(share, f.get("value"), unit=False),
    bounds(share, f) or page.MISSING,
    page.percent(f.get("ties"), unit=""),
    page.number(f.get("n")),
  )
  against = page.plain(found.get("against") or "the target")
  parts = [
    page.table(
      ("Outcome", "%", "95 % interval", "n"),
      [
        (name, *(row("", fields(f))[i] for i in (1, 2, 4)))
        for name, f in fields(found.get("outcomes")).items()
      ],
      f"Against {against}: won, tied and lost apart, and the share won of what "
      "was decided.",
      text=(2,),
    )
  ]
  fair = fields(found.get("equal_length"))
  if fair.get("why"):
    parts.append(
      page.paragraph(
        f"No win rate at equal length: {page.plain(fair['why'])}.",
        kind="absent",
      )
    )
  topics = fields(found.get("by_topic"))
  if topics:
    parts.append(
      tag(
        "details",
        tag("summary", "Win rate by topic"),
        page.table(
          ("Topic", "Win rate, %", "95 % interval", "Ties, %", "n"),
          [row(name, fields(f)) for name, f in topics.items()],
          f"Win rate against {against} by topic or source, largest first.",
          text=(2,),
        ),
      )
    )
  return page.join(parts)


def render(arm: dict) -> str:
  """The page of one arm.

  Args:
    arm: an entry of `summary["arms"]`; any key may be absent.

  Returns:
    A whole HTML document.
  """
  arm = fields(arm)
  name = page.plain(arm.get("name") or "An arm without a name")
  metrics = metrics_of(arm)
  saved = fields(arm.get("saved"))
  card = fields(arm.get("selection"))
  body = [page.absent("How well the policy does was")]
  if metrics:
    body = [
      page.table(
        ("Metric", "Unit", "Value", "95 % interval", "n"),
        [
          (
            m.name,
            "%" if m.share else m.unit,
            shown(m, fields(f).get("value"), unit=False),
            bounds(m, fields(f)) or page.MISSING,
            page.number(fields(f).get("n")),
          )
          for m, f in ((metric(n), metrics[n]) for n in known([arm]))
        ],
        "What was measured on the held-out rows.",
        text=(1,),
      ),
      details(arm.get("details")),
    ]
  cost = [overspent_callout([{"arm": name, **saved}])]
  cost.append(
    page.facts(
      [
        (
          "Operations saved, counting the SFT stage",
          saving(saved.get("with_sft")),
        ),
        ("Operations saved, leaving it out", saving(saved.get("without_sft"))),
      ]
    )
    if saved
    else page.absent("What this arm saved was")
  )
  top = page.figures(
    [
      (
        page.number(arm.get("rows")),
        "rows trained on",
        "the whole pool" if arm.get("is_all") else None,
      ),
      (page.number(arm.get("updates")), "updates", None),
      (
        page.plain(arm.get("sampler")),
        "sampler",
        f"budget {budget(arm.get('budget'))}",
      ),
      (page.number(arm.get("seed")), "seed", None),
    ]
  )
  return str(
    page.document(
      f"jaxalign: {name}",
      [
        ("measured", "What was measured", page.join(body)),
        ("curves", "Training", curves([arm], [(name, 0)])),
        (
          "selection",
          "Selection",
          page.join(
            [
              page.paragraph(
                page.link(
                  "Every row with its reason, searchable, and a map:",
                  card["page"],
                )
              )
              if card.get("page")
              else "",
              selection(card),
            ]
          ),
        ),
        ("cost", "Cost", page.join(cost)),
      ],
      top=top,
    )
  )
