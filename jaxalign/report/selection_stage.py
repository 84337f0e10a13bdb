"""The stage that reports on a selection, and its page."""

from typing import Any

import numpy as np

from jaxalign.core import disk
from jaxalign.core.artifacts import Cost
from jaxalign.core.stage import Made
from jaxalign.data import tables
from jaxalign.data.row_table import TextColumn
from jaxalign.data.summary import summary_lines
from jaxalign.embed.embedder import SIDES
from jaxalign.model.job import Arm, Job
from jaxalign.report import select_page
from jaxalign.select import columns, fit_mixture, mixture, selection_report
from jaxalign.select.choose import selected_rows
from jaxalign.select.pool import Pool, Selection
from jaxalign.select.samplers import chains
from jaxalign.select.selection_report import reasons

# Read where they are at hand: what the report describes, and what the samplers
# that cost nothing read.
COLUMNS = (
  "length",
  "label",
  "topic",
  "embedding",
  "answer_embedding",
  "logp",
  "logp_count",
)
TEXTS = ("prompt", *SIDES)
FILES = ["selection.json", "selection.html", "reasons.parquet"]


def _reads(job: Job, arm: Arm) -> list[str]:
  """The shared stages it reads: not one that another arm alone needs, whose
  coming and going must not change this arm's page."""
  read = columns.stages(job.c, job.kind, chains.find_sampler(arm.sampler))
  return [*read, *["embed"] * (("", "embed") in job.records)]


def report_needs(job: Job, arm: Arm) -> list[str]:
  """The selection, and of what it may describe what has been made."""
  read = {*_reads(job, arm)} & {"embed", "mixture"}
  return ["select", *sorted(s for s in read if ("", s) in job.records)]


def make_selection_report(job: Job, arm: Arm, folder: Any) -> Made:
  """Describes a finished selection; nothing that is trained depends on it."""
  known, read = columns.known(job.c), {"", *_reads(job, arm)}
  table = {
    name: known[name].make(job)
    for name in COLUMNS
    if known[name].stage in read and not known[name].lacks(job.c, job.kind)
  }
  fitted = None
  if "mixture" in read:
    table["log_likelihood"] = fit_mixture.likelihoods(job)[0]
    fitted = mixture.load_mixture(job.shared / "mixture" / "mixture.npz")
  pool = Pool(np.array(job.column("pool", "id")), table)
  kept = selected_rows(job, arm)
  score = np.array(tables.read_column(folder / "scores.parquet", "score"))
  rows = tables.read_row_table(job.shared / "data" / "pool.parquet")
  names = [name for name in TEXTS if name in rows.table.column_names]
  find = selection_report.alternatives
  report, shown = selection_report.describe(
    pool,
    Selection(kept, score),
    arm.sampler,
    mixture=fitted,
    diagnostics=disk.read_json(folder / "diagnostics.json"),
    texts={name: TextColumn(rows, name) for name in names},
    others=find(pool, len(kept), arm.sampler, arm.seed),
  )
  if fitted is not None:
    report["mixture"]["covariance"] = job.c.select.mixture.covariance
  summary = disk.read_json(job.shared / "data" / "data_summary.json")
  report |= dict(reading=summary_lines(summary), reasons=FILES[2])
  lines = [
    dict(
      id=str(name),
      rank=int(rank),
      score=float(score),
      selected=bool(kept),
      nearest_kept=str(near) or None,
      cosine=float(cosine) if near else None,
      reason=reason,
    )
    for name, rank, score, kept, near, cosine, reason in zip(
      *(shown[n] for n in ("id", "rank", "score", "kept", "near", "cosine")),
      reasons.sentences(report, shown),
    )
  ]
  tables.write_rows(folder / FILES[2], lines)
  disk.write_json(folder / FILES[0], report)
  html = select_page.selection_html(report, shown).encode()
  disk.write_bytes(folder / FILES[1], html)
  return FILES, Cost(), dict(say=f"a page of {len(html) / 1e6:.1f} MB")
