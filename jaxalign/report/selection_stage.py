"""The stage that reports on a selection, and its page."""

from typing import Any

import numpy as np

from jaxalign.core import disk
from jaxalign.core.artifacts import Cost
from jaxalign.core.stage import Made
from jaxalign.data import tables
from jaxalign.data.row_table import TextColumn
from jaxalign.data.summary import summary_lines
from jaxalign.model.job import Arm, Job
from jaxalign.report import select_page
from jaxalign.select import columns as columns_lib
from jaxalign.select import fit_mixture, selection_report
from jaxalign.select import mixture as mixtures
from jaxalign.select.choose import selected_rows
from jaxalign.select.pool import Pool, Selection
from jaxalign.select.samplers import chains
from jaxalign.select.selection_report import reasons as reasons_lib

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
TEXTS = ("prompt", "chosen", "rejected", "completion")


def report_needs(job: Job, arm: Arm) -> list[str]:
  """The selection, and of what it may describe what has been made."""
  mixture = "log_likelihood" in chains.find_sampler(arm.sampler).needs
  embedded = ("", "embed") in job.records
  return ["select", *["embed"] * embedded, *["mixture"] * mixture]


def make_selection_report(job: Job, arm: Arm, folder: Any) -> Made:
  """Describes a finished selection; nothing that is trained depends on it."""
  # Not where another arm fitted one, or asked for a column: what comes and goes
  # with other arms must not change this arm's page.
  sampler, known = chains.find_sampler(arm.sampler), columns_lib.known(job.c)
  fitted, made = "log_likelihood" in sampler.needs, ("", "embed") in job.records
  read = {"", *["embed"] * made, *columns_lib.stages(job.c, job.kind, sampler)}
  files = ["selection.json", "selection.html", "reasons.parquet"]
  rows = tables.read_row_table(job.shared / "data" / "pool.parquet")
  columns = {
    name: known[name].make(job)
    for name in COLUMNS
    if known[name].stage in read and not known[name].lacks(job.c, job.kind)
  }
  diagnostics = disk.read_json(folder / "diagnostics.json")
  mixture = None
  if fitted:
    columns["log_likelihood"] = fit_mixture.likelihoods(job)[0]
    mixture = mixtures.load_mixture(job.shared / "mixture" / "mixture.npz")
  pool = Pool(np.array(job.column("pool", "id")), columns)
  kept = selected_rows(job, arm)
  score = np.array(tables.read_column(folder / "scores.parquet", "score"))
  names = [name for name in TEXTS if name in rows.table.column_names]
  texts = {name: TextColumn(rows, name) for name in names}
  card, table = selection_report.describe(
    pool,
    Selection(kept, score),
    arm.sampler,
    mixture=mixture,
    diagnostics=diagnostics,
    texts=texts,
    others=selection_report.alternatives(
      pool, len(kept), arm.sampler, arm.seed
    ),
  )
  if mixture is not None:
    card["mixture"]["covariance"] = job.c.select.mixture.covariance
  card["reading"] = summary_lines(
    disk.read_json(job.shared / "data" / "data_summary.json")
  )
  reasons = reasons_lib.sentences(card, table)
  card["reasons"] = "reasons.parquet"
  tables.write_rows(
    folder / "reasons.parquet",
    [
      dict(
        id=str(table["id"][i]),
        rank=int(table["rank"][i]),
        score=float(table["score"][i]),
        selected=bool(table["kept"][i]),
        nearest_kept=str(table["near"][i]) or None,
        cosine=(float(table["cosine"][i]) if table["near"][i] else None),
        reason=reasons[i],
      )
      for i in range(len(reasons))
    ],
  )
  disk.write_json(folder / "selection.json", card)
  html = select_page.selection_html(card, table).encode()
  disk.write_bytes(folder / "selection.html", html)
  return files, Cost(), dict(say=f"a page of {len(html) / 1e6:.1f} MB")
