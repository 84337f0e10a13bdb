"""The section on the judges: whom they agree with, and their controls."""

from typing import Any

from jaxalign.report import page
from jaxalign.report.page import Html, tag
from jaxalign.report.pages import run
from jaxalign.report.pages.run import Metric, fields

_SHARE = Metric("share")
_PLAIN = Metric("kappa", share=False)


def _against(judges: dict) -> Html:
  """Each judge beside the humans, a line for each rule."""
  rows = []
  for judge, found in judges.items():
    for rule, one in fields(fields(found).get("against")).items():
      one = fields(one)
      rows.append((page.plain(judge), page.plain(one.get("rule", rule)),
                   run.cell(_SHARE, one.get("agreement")),
                   run.cell(_PLAIN, one.get("kappa")),
                   page.number(fields(one.get("alpha")).get("value")),
                   page.number(fields(one.get("agreement")).get("n"))))
  if not rows:
    return page.absent("Agreement with humans was")
  return page.table(
      ("Judge", "Unparsable verdicts", "Same verdict, %", "Cohen's kappa",
       "Krippendorff's alpha", "Pairs"), rows,
      "Judges and the majority of the humans, under each rule for verdicts "
      "that could not be read; 95 % intervals below.", text=(1,))


def _orders(judges: dict) -> Html:
  """Each judge beside itself with the answers exchanged."""
  rows = []
  for judge, found in judges.items():
    found = fields(found)
    one = fields(found.get("orders"))
    rows.append((page.plain(judge), run.cell(_SHARE, one.get("consistent")),
                 run.cell(_PLAIN, one.get("kappa")),
                 run.cell(_SHARE, one.get("first")),
                 page.number(found.get("unparsable")),
                 page.number(fields(one.get("consistent")).get("n"))))
  return page.table(
      ("Judge", "Same verdict in both orders, %", "Kappa between the orders",
       "First answer named, %", "Verdicts not read", "Pairs in both orders"),
      rows, "What the order of the two answers does. Without a bias of place "
      "the first answer is named in half of the verdicts that name one.")


def _humans(found: dict) -> Html:
  """The humans beside each other: the bar for any judge."""
  rows = [(page.plain(pair), run.cell(_SHARE, fields(one).get("agreement")),
           run.cell(_PLAIN, fields(one).get("kappa")),
           page.number(fields(fields(one).get("alpha")).get("value")))
          for pair, one in fields(found.get("between")).items()]
  if not rows:
    return page.absent("Agreement between humans was")
  alpha = fields(found.get("alpha"))
  return page.table(
      ("Raters", "Same verdict, %", "Cohen's kappa", "Krippendorff's alpha"),
      rows, "The human raters, two by two. Alpha over all of them: "
      f"{page.number(alpha.get('value'))} on "
      f"{page.number(found.get('pairs'))} pairs.")


def _controls(found: dict) -> Html:
  """The controls of each judge, and a warning where one failed."""
  told = [page.plain(w) for one in found.values()
          for w in run.words(fields(one).get("words"))]
  if not told:
    return page.absent("The controls of the judges were")
  passed = all(fields(fields(one).get(k)).get("passed") is True
               for one in found.values() for k in ("null", "injected"))
  return page.callout("note" if passed else "warning",
                      "Controls: an empty phrase, and an instruction to the "
                      "judge", told)


def section(found: Any, controls: Any = None) -> Html:
  """The blocks on all judges of a job.

  Args:
    found: as `eval.agreement.judged` returns it, perhaps from a file.
    controls: {judge: as `eval.judges.controls.controls` returns it}, or None.
  """
  found, controls = fields(found), fields(controls)
  judges = fields(found.get("judges"))
  parts = [_controls(controls)]
  if not judges:
    return page.join([*parts, page.absent("Agreement of judges was")])
  return page.join([
      *parts, tag("h3", "Against humans"), _against(judges),
      tag("h3", "Against themselves"), _orders(judges),
      tag("h3", "Humans against each other"),
      _humans(fields(found.get("humans")))])
