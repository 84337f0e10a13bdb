"""The section on the judge: its verdicts, controls, and whom it agrees with."""

from typing import Any

from jaxalign.report import page
from jaxalign.report.page import Html, tag
from jaxalign.report.pages import run
from jaxalign.report.pages.run import fields, Metric, records

_SHARE = Metric("share")
_PLAIN = Metric("kappa", share=False)
MEASURES = ("Cohen's kappa", "Scott's pi", "Krippendorff's alpha")


def beyond_chance(found: Any) -> list[Html | str]:
  """The cells of MEASURES, from what `eval.interrater.compared` returns."""
  return [
    run.cell(_PLAIN, fields(found).get(name))
    for name in ("kappa", "pi", "alpha")
  ]


def _against(judges: dict) -> Html:
  """Each judge beside the humans, a line for each rule."""
  rows = []
  for judge, found in judges.items():
    for rule, one in fields(fields(found).get("against")).items():
      one = fields(one)
      rows.append(
        (
          page.plain(judge),
          page.plain(one.get("rule", rule)),
          run.cell(_SHARE, one.get("agreement")),
          *beyond_chance(one),
          page.number(fields(one.get("agreement")).get("n")),
        )
      )
  if not rows:
    return page.absent("Agreement with humans was")
  return page.table(
    ("Judge", "Unparsable verdicts", "Same verdict, %", *MEASURES, "Pairs"),
    rows,
    "Judges and the majority of the humans (the verdict with most "
    "votes, a tie where two lead), under each rule for verdicts that could "
    "not be read; 95 % intervals below.",
    text=(1,),
  )


def _orders(judges: dict) -> Html:
  """Each judge beside itself with the answers exchanged."""
  rows = []
  for judge, found in judges.items():
    found = fields(found)
    one = fields(found.get("orders"))
    rows.append(
      (
        page.plain(judge),
        run.cell(_SHARE, one.get("consistent")),
        run.cell(_PLAIN, one.get("kappa")),
        run.cell(_SHARE, one.get("first")),
        page.number(found.get("unparsable")),
        page.number(fields(one.get("consistent")).get("n")),
      )
    )
  return page.table(
    (
      "Judge",
      "Same verdict in both orders, %",
      "Kappa between the orders",
      "First answer named, %",
      "Verdicts not read",
      "Pairs in both orders",
    ),
    rows,
    "What the order of the two answers does. Without a bias of place "
    "the first answer is named in half of the verdicts that name one.",
  )


def _humans(found: dict) -> Html:
  """The humans beside each other: the bar for any judge."""
  rows = [
    (
      page.plain(pair),
      run.cell(_SHARE, fields(one).get("agreement")),
      *beyond_chance(one),
    )
    for pair, one in fields(found.get("between")).items()
  ]
  if not rows:
    return page.absent("Agreement between humans was")
  return page.table(
    ("Raters", "Same verdict, %", *MEASURES),
    rows,
    "The human raters, two by two. Alpha over all of them: "
    f"{run.measured(_PLAIN, fields(found.get('alpha')))} on "
    f"{page.number(found.get('pairs'))} pairs.",
  )


def _controls(found: dict) -> Html:
  """The controls of each judge, and a warning where one failed."""
  told = [
    page.plain(w)
    for one in found.values()
    for w in run.words(fields(one).get("words"))
  ]
  if not told:
    return page.absent("The controls of the judges were")
  passed = all(
    fields(fields(one).get(k)).get("passed") is True
    for one in found.values()
    for k in ("null", "injected")
  )
  return page.callout(
    "note" if passed else "warning",
    "Controls: an empty phrase, and an instruction to the judge",
    told,
  )


def section(found: Any, controls: Any = None) -> Html:
  """The blocks on all judges of a job.

  Args:
    found: as `eval.interrater.judged` returns it, perhaps from a file.
    controls: {judge: as `eval.judging.controls` returns it}, or None.
  """
  found, controls = fields(found), fields(controls)
  judges = fields(found.get("judges"))
  parts = [_controls(controls)]
  if not judges:
    return page.join([*parts, page.absent("Agreement of judges was")])
  return page.join(
    [
      *parts,
      tag("h3", "Against humans"),
      _against(judges),
      tag("h3", "Against themselves"),
      _orders(judges),
      tag("h3", "Humans against each other"),
      _humans(fields(found.get("humans"))),
    ]
  )


def asked(found: Any) -> bool:
  """Whether a job had a judge of its own, whose section is due."""
  return fields(found).get("kind") in ("reward_model", "endpoint")


def of_job(found: Any) -> Html:
  """The section of a job's report.

  Args:
    found: as `stages.judge.described` returns it, perhaps from a file.
  """
  found = fields(found)
  name = page.plain(found.get("name") or "A judge without a name")
  what = {
    "endpoint": "A model behind an endpoint",
    "reward_model": "A reward model, which scores every answer by itself",
  }.get(str(found.get("kind")), "A judge")
  parts = [
    page.paragraph(
      f"{what}, {name}, compared answers with "
      f"{page.plain(found.get('against') or 'a baseline')}. A verdict that "
      "could not be read is counted, and never guessed."
    ),
    _verdicts(found),
  ]
  cost = fields(found.get("cost"))
  if cost:
    parts.append(
      page.paragraph(
        f"Asked {page.number(cost.get('requests'))} times, failures included: "
        f"{page.number(cost.get('tokens'))} tokens."
      )
    )
  doubts = run.words(found.get("doubts"))
  if doubts:
    parts.append(page.callout("warning", "Doubts", doubts))
  controls = fields(found.get("controls"))
  if not fields(found.get("agreement")):
    return page.join(
      [*parts, _controls(controls), page.absent("Agreement with labels was")]
    )
  return page.join([*parts, section(found["agreement"], controls)])


def _verdicts(found: dict) -> Html:
  """One line an arm: outcomes apart, at equal length, and by place."""
  rows = []
  for one in records(found.get("arms")):
    apart = fields(one.get("outcomes"))
    share = lambda name: page.percent(
      fields(apart.get(name)).get("value"), unit=""
    )
    fair = fields(one.get("equal_length"))
    rows.append(
      (
        page.plain(one.get("name")),
        run.cell(_SHARE, one.get("rate")),
        share("won"),
        share("tied"),
        share("lost"),
        run.cell(_SHARE, fair),
        page.number(one.get("read")),
        page.number(one.get("prompts")),
        run.cell(_SHARE, one.get("unparsable")),
        run.cell(Metric("", share=False), one.get("bias")),
        run.cell(_SHARE, one.get("consistent")),
      )
    )
  if not rows:
    return page.absent("The verdicts were")
  return page.table(
    (
      "Arm",
      "Win rate, %",
      "Won, %",
      "Tied, %",
      "Lost, %",
      "Win rate at equal length, %",
      "Prompts with a verdict",
      "Prompts judged",
      "Verdicts not read, %",
      "What the first place adds to an outcome",
      "Same verdict in both orders, %",
    ),
    rows,
    "The verdicts, arm by arm. Every pair is shown in both orders where "
    "order can matter; an outcome is the mean of the two.",
  )
