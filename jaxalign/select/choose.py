"""The select stage of an arm: scores and the kept rows."""

from collections.abc import Callable
import inspect
import json
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from jaxalign.core import artifacts, devices, progress
from jaxalign.core.artifacts import Cost
from jaxalign.core.errors import ConfigError
from jaxalign.core.lookup import source_digests
from jaxalign.core.peak_memory import peak_memory
from jaxalign.data import tables
from jaxalign.data.row_table import RowTable
from jaxalign.embed import embedder
from jaxalign.embed import store as stores
from jaxalign.model import memory
from jaxalign.model.job import Arm, arm_folder, Job
from jaxalign.select import columns as columns_lib
from jaxalign.select import costs, selection_report
from jaxalign.select import fit_mixture as mixture_stage
from jaxalign.select.pool import checked, Pool
from jaxalign.select.samplers import combine
from jaxalign.select.samplers import vectors as vectors_lib
from jaxalign.select.selection_report import reasons
from jaxalign.select.topk import budget_rows


def _kwargs(c, arm, sampler) -> dict:
  """Keywords of the config, which are those of the chosen sampler alone."""
  return sampler_kwargs(c, sampler) if arm.sampler == c.select.sampler else {}


def estimate(
  job: Job, arm: Arm, rows: int, width: int, residual: int
) -> costs.Estimate | None:
  """What an arm's choice takes, all fits of a mixture counted.

  Args:
    job: the run.
    arm: the arm.
    rows: of the pool.
    width, residual: of an embedding and of a residual.

  Returns:
    None of a sampler whose cost is not known.

  Raises:
    ConfigError: a keyword that cannot be counted with, a word for a number.
  """
  c, sampler = job.c, combine.named(arm.sampler)
  try:
    found = costs.estimate(
      sampler,
      costs.Sizes(
        rows,
        width,
        budget_rows(arm.budget, rows, c.train.batch_size),
        2 if job.kind == "pairs" else 1,
        residual,
      ),
      **_kwargs(c, arm, sampler),
    )
  except (TypeError, ArithmeticError) as error:
    raise ConfigError(
      f"sampler {arm.sampler!r} cannot work with its keywords "
      f"({error}); set config.select.kwargs"
    ) from error
  if found is None or "log_likelihood" not in sampler.needs:
    return found
  fits = 1 + mixture_stage.refits(c)
  return found._replace(flops=fits * found.flops, on_host=fits * found.on_host)


def hours(job: Job, found: costs.Estimate) -> float:
  """Assumed time of a choice itself, on this mesh and its host."""
  return devices.seconds_for(found.flops, found.on_host, job.mesh) / 3600


def check_hours(job: Job, arms: list[Arm]) -> None:
  """Refuses a choice that takes days before anything is embedded for it.

  A sampler refuses too, once it has its rows: what is a keyword of its own is
  said there. Here the sizes of the pool alone are known.

  Raises:
    ConfigError: an arm would take more than `rows.HOURS`, with the number.
  """
  rows, m = len(job.column("pool", "id")), job.model
  width = embedder.choose(job.c, m).model.width
  for arm in arms:
    found = estimate(job, arm, rows, width, m.width)
    if found and (takes := hours(job, found)) > vectors_lib.HOURS:
      raise ConfigError(
        f"sampler {arm.sampler!r} would take about {takes:,.0f} hours to "
        f"choose from {rows:,} rows, {found.flops:.3g} flops, "
        f"above the {vectors_lib.HOURS:g} that a selection may take; "
        "set config.select.kwargs.blocks where it takes them, "
        "config.select.budget, or a sampler that runs in one pass, as "
        "config.select.sampler='density'"
      )


def run_select(job: Job, arm: Arm) -> None:
  """Scores the pool and keeps the budget."""
  c, folder = job.c, arm_folder(job, arm)
  sampler = combine.named(arm.sampler)
  kwargs = _kwargs(c, arm, sampler)
  uses_mixture = "log_likelihood" in sampler.needs
  chosen_arm = arm._replace(sampler=c.select.sampler)  # it ran before this one

  budget = budget_rows(
    arm.budget, len(job.column("pool", "id")), c.train.batch_size
  )
  files = [
    "scores.parquet",
    "subset.parquet",
    "diagnostics.json",
    "config.json",
  ]

  def make(folder):
    if jax.process_index() != 0:  # what follows reads the texts of the pool
      return files, Cost(), {}
    ids = np.array(job.column("pool", "id"))
    columns, n = columns_lib.gather(job, sampler), len(ids)
    if "subset" in sampler.needs:
      columns["subset"] = np.isin(np.arange(n), selected_rows(job, chosen_arm))
    fits = [None]
    if uses_mixture:
      fits = mixture_stage.likelihoods(job)
    chosen = []
    with peak_memory() as peak:
      for values in fits:
        extra = {} if values is None else dict(log_likelihood=values)
        chosen.append(
          checked(
            sampler(arm.seed, Pool(ids, columns | extra), budget, **kwargs),
            n,
            budget,
            arm.sampler,
          )
        )
    wide = lambda *names: max(
      [columns[name].shape[-1] for name in names if name in columns], default=0
    )
    took = estimate(
      job, arm, n, wide("embedding", "answer_embedding"), wide("residual")
    )
    selection, diagnostics = chosen[0], {}
    if uses_mixture:
      diagnostics = artifacts.read_json(
        job.shared / "mixture" / "diagnostics.json"
      )
      overlaps = [
        selection_report.jaccard(selection.rows, other.rows)
        for other in chosen[1:]
      ]
      diagnostics["stability"] = dict(
        jaccard=overlaps, mean=float(np.mean(overlaps)) if overlaps else None
      )
    notes = [*selection.notes, *columns_lib.notes(c, sampler)]
    pool = job.shared / "data" / "pool.parquet"
    kept = tables.read_some(pool, selection.rows)
    if copies := _copies(kept):
      notes.append(
        f"warning: {copies:,} of the {len(selection.rows):,} chosen rows are "
        "copies of others; leave them out by "
        f"select.sampler='dedup(threshold=0.95) | {arm.sampler}'"
      )
      progress.say(f"  {notes[-1]}")
    if notes:
      diagnostics["notes"] = notes
    read = columns_lib.before(
      c,
      [*columns_lib.stages(c, job.kind, sampler), *["mixture"] * uses_mixture],
    )
    source = columns_lib.sums(c, job.kind, sampler)
    sums = None
    if job.kind == "pairs" and source in read:
      sums = stores.read(job.shared / source / "store", "logp")
    _write_scores(folder, ids, selection, fits[0])
    _write_subset(folder, kept, selection, sums)
    artifacts.write_json(folder / "diagnostics.json", diagnostics)
    artifacts.write_json(
      folder / "config.json",
      json.loads(c.to_json_best_effort()) | dict(arm=arm._asdict()),
    )
    return (
      files,
      Cost(int(took.flops) if took else 0),
      dict(
        say=f"{budget:,} of {n:,} rows, {memory.size(peak['held'])} more held",
        **peak,
      ),
    )

  fields = dict(
    sampler=arm.sampler,
    budget=arm.budget,
    seed=arm.seed,
    batch_size=c.train.batch_size,
    **kwargs,
  ) | source_digests(arm.sampler)
  inputs = dict(data=job.key("data"))
  if uses_mixture:
    inputs["mixture"] = job.key("mixture")
  if "subset" in sampler.needs:
    inputs["subset"] = job.key("select", chosen_arm.name)
  for stage in columns_lib.stages(c, job.kind, sampler):
    inputs[stage] = job.key(stage)
  job.run(folder, "select", arm.name, fields=fields, inputs=inputs, make=make)


def _copies(rows: RowTable) -> int:
  """Rows whose texts, but for case and spaces, an earlier one has."""
  seen = {
    tuple(
      " ".join(row[n].casefold().split())
      for n in ("prompt", "chosen", "rejected", "completion")
      if n in row
    )
    for row in rows
  }
  return len(rows) - len(seen)


def _write_scores(folder, ids, selection, likelihood) -> None:
  """scores.parquet of all rows."""
  n, kept = len(ids), np.zeros(len(ids), bool)
  kept[selection.rows] = True
  columns = dict(
    id=ids.tolist(),
    row=np.arange(n),
    score=np.asarray(selection.score, np.float64),
    rank=reasons.ranks(Pool(ids, {}), selection) - 1,
    selected=kept,
  )
  if likelihood is not None:
    for side in range(likelihood.shape[1]):
      columns[f"log_likelihood_{side}"] = np.float64(likelihood[:, side])
  tables.write_rows(folder / "scores.parquet", RowTable(pa.table(columns)))


def _write_subset(folder, kept, selection, sums) -> None:
  """subset.parquet of the kept rows, best first.

  `sums` are the reference's log-probabilities [N, 2], where they are known:
  columns that TRL reads in place of a reference pass.
  """

  def scored():
    for rank, (i, row) in enumerate(zip(selection.rows, kept)):
      del row["group"]
      row |= dict(score=float(selection.score[i]), rank=rank)
      if sums is not None:
        names = "ref_chosen_logps", "ref_rejected_logps"
        row |= {name: float(x) for name, x in zip(names, sums[i])}
      yield row

  rows = tables.as_read(RowTable.of(scored()))
  tables.write_rows(folder / "subset.parquet", rows)


def selected_rows(job: Job, arm: Arm) -> np.ndarray:
  """Row numbers of the pool that an arm kept, best first."""
  kept = tables.read_column(arm_folder(job, arm) / "subset.parquet", "id")
  return np.searchsorted(np.array(job.column("pool", "id")), kept)


def sampler_kwargs(c: Any, sampler: Callable) -> dict[str, Any]:
  """The keywords of config.select that this sampler takes, checked.

  Those that say what the sampler does by itself are left out: an arm is the
  same whether or not the config's keywords are meant for it.
  """
  known = {
    p.name: p.default
    for p in inspect.signature(sampler).parameters.values()
    if p.kind == p.KEYWORD_ONLY
    and p.name not in getattr(sampler, "keywords", ())
  }  # in brackets
  named = dict(order=c.select.order, pair_score=c.select.pair_score)
  kwargs = {n: v for n, v in named.items() if n in known}
  for name, value in c.select.kwargs.to_dict().items():
    if name not in known:
      raise ConfigError(
        f"sampler {c.select.sampler!r} takes no {name!r}; it "
        f"takes {', '.join(sorted(known)) or 'no keywords'}; "
        "set config.select.kwargs"
      )
    kwargs[name] = value
  return {
    n: v
    for n, v in kwargs.items()
    if not (type(v) is type(known[n]) and v == known[n])
  }
