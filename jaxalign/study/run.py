"""Arms side by side: the chosen sampler, random, everything; then pages.

Pages are stages too, one a page: made once, and again where what they show is
another. That needs no --redo, since a page is all that is lost. Neither the
command nor the machine is part of what they are made from: a page says which
command made it, and when.
"""

from collections.abc import Sequence
import json
from typing import Any

import jax

import jaxalign
from jaxalign import pipeline
from jaxalign.core.artifacts import Cost
from jaxalign.core.disk import read_json, write_bytes, write_json
from jaxalign.core.stage import Kind, Made, Stage
from jaxalign.eval import judge_kinds
from jaxalign.model.job import Arm, Job
from jaxalign.report import study_page
from jaxalign.study.arms import arms_of
from jaxalign.study.curves import curve_arms
from jaxalign.study.summarise import describe_arm, summarise

REPORT = "report"  # the stage that writes a page


def run_study(
  job: Job, command: str, notes: Sequence[str] = ()
) -> dict[str, Any]:
  """Runs or skips every stage of every arm, then writes the summary.

  Args:
    job: the run.
    command: what a person types for it.
    notes: sentences that stand before the verdicts.

  Returns:
    The summary, as in `summary.json`.
  """
  arms = arms_of(job.c)
  job.stages[REPORT] = ARM_PAGE
  pipeline.run(job, arms, (*pipeline.STUDY, REPORT))
  job.run(_study_page(job, arms, command, notes), folder=job.workdir)
  if jax.process_index() != 0:
    return {}
  return read_json(job.workdir / "summary.json")


def _make_page(job: Job, arm: Arm, folder: Any) -> Made:
  """The page of one arm, next to its artifacts."""
  html = study_page.arm_html(describe_arm(job, arm))
  write_bytes(folder / "report.html", html.encode())
  return ["report.html"], Cost(), {}


def _page_needs(job: Job, arm: Arm) -> list[str]:
  return pipeline.reached(job, ("evaluate", "judge"))


def _page_fields(job: Job, arm: Arm | None) -> dict[str, Any]:
  return dict(version=jaxalign.__version__) | judge_kinds.page_fields(job.c)


ARM_PAGE = Stage(
  REPORT, _make_page, _page_needs, _page_fields, kind=pipeline.PAGE
)
STUDY_PAGE = Kind(
  alone=True, remakes=True, volatile="summary.json report.html config.json"
)


def _study_page(
  job: Job, arms: list[Arm], command: str, notes: Sequence[str]
) -> Stage:
  """The stage of the page over all arms, and of the summary it shows."""

  def make(job: Job, arm: None, folder: Any) -> Made:
    summary = summarise(job, arms, command)
    summary["verdicts"] = [*notes, *summary["verdicts"]]
    html = study_page.study_html(summary)
    write_bytes(folder / "report.html", html.encode())
    config = json.loads(job.c.to_json_best_effort())
    files = dict(summary=summary, config=config)
    if curve_arms(job, arms):
      files["fit"] = summary["fit"]
    for name, value in files.items():
      write_json(folder / f"{name}.json", value)
    return ["report.html", *(f"{name}.json" for name in files)], Cost(), {}

  def fields(job: Job, arm: None) -> dict[str, Any]:
    own = dict(arms=[a.name for a in arms])
    own |= dict(notes=[*notes]) if notes else {}
    return _page_fields(job, arm) | own

  needs = [(REPORT, arm) for arm in arms]
  needs += ["judged_reference"] * (("", "judged_reference") in job.records)
  return Stage(REPORT, make, lambda *_: needs, fields, kind=STUDY_PAGE)
