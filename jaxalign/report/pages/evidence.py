"""Sections that only a job of several seeds has: ranks, quality for cost."""

from typing import Any

from jaxalign.report import page
from jaxalign.report.page import Html, tag
from jaxalign.report.pages import run
from jaxalign.report.pages.run import fields, records

_SHARE = run.Metric("")  # shown in percent


def ranking(found: Any) -> Html | str:
  """One table a budget: the samplers by their mean, and the ranks left open.

  Args:
    found: as `evidence.ranking` returns it, perhaps from a file.
  """
  blocks = []
  for one in records(found):
    rows = []
    for r in records(one.get("rows")):
      ends = [page.number(r.get(k)) for k in ("from", "to")]
      rows.append(
        (
          page.plain(r.get("name")),
          " to ".join(dict.fromkeys(ends)),
          run.measured(_SHARE, r),
        )
      )
    blocks.append(
      page.table(
        ("Arm", "Ranks left open", "Mean over seeds and prompts, %"),
        rows,
        f"Ranking at {run.budget(one.get('budget'))} of the pool. Arms that "
        "were not told apart, all pairs corrected together (Holm), share "
        "ranks.",
      )
    )
  return page.join([tag("h3", "Ranking"), *blocks]) if blocks else ""


def efficiency(found: Any) -> Html | str:
  """What each arm gained over the start, for the flops it took alone.

  Args:
    found: as `evidence.efficiency` returns it.
  """
  rows = []
  for one in records(found):
    gain = fields(one.get("gain"))
    rows.append(
      (
        page.plain(one.get("name")),
        page.join(
          [
            run.shown(_SHARE, gain.get("value"), sign=True, unit=False),
            " ",
            tag("small", run.bounds(_SHARE, gain, sign=True) or page.MISSING),
          ]
        ),
        page.engineering(one.get("flops")),
        page.number(one.get("per_tera"), sign=True),
      )
    )
  if not rows:
    return ""
  return page.table(
    ("Arm", "Points gained over the start", "Operations", "Points per TFLOP"),
    rows,
    "Quality for its cost: selecting, the reference's pass and training "
    "counted, as if the arm were run alone.",
  )
