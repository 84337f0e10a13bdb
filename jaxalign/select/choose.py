"""The select stage of an arm: scores and the selected rows."""

from collections.abc import Callable
import inspect
import json
from typing import Any

import numpy as np
import pyarrow as pa

from jaxalign.core import devices, disk, progress
from jaxalign.core.artifacts import Cost
from jaxalign.core.errors import ConfigError
from jaxalign.core.lookup import source_digests
from jaxalign.core.peak_memory import peak_memory
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.data import tables
from jaxalign.data.row_table import RowTable
from jaxalign.embed import embedder, store
from jaxalign.model import memory
from jaxalign.model.job import Arm, arm_folder, Job
from jaxalign.select import columns, costs, fit_mixture
from jaxalign.select.columns import uses_mixture
from jaxalign.select.pool import checked, Pool
from jaxalign.select.samplers import chains, vectors
from jaxalign.select.selection_report import jaccard, reasons
from jaxalign.select.topk import budget_rows

READING = 1e9  # bytes a second from a disk
SECONDS_A_ROW = 3e-5  # ids hashed, rows written
FILES = (
  "scores.parquet",
  "subset.parquet",
  "selected.npy",
  "diagnostics.json",
  "config.json",
)


def sampler_kwargs(c: Any, sampler: Callable) -> dict[str, Any]:
  """The keywords of config.select that this sampler takes, checked.

  Those that are the sampler's defaults are left out: an arm is the same whether
  or not the config's keywords are meant for it.
  """
  bound = getattr(sampler, "keywords", ())  # in brackets
  known = {
    p.name: p.default
    for p in inspect.signature(sampler).parameters.values()
    if p.kind == p.KEYWORD_ONLY and p.name not in bound
  }
  given = c.select.kwargs.to_dict()
  if unknown := [name for name in given if name not in known]:
    raise ConfigError(
      f"sampler {c.select.sampler!r} takes no {unknown[0]!r}; it "
      f"takes {', '.join(sorted(known)) or 'no keywords'}; "
      "set config.select.kwargs"
    )
  kwargs = dict(order=c.select.order, pair_score=c.select.pair_score) | given
  return {
    n: v
    for n, v in kwargs.items()
    if n in known and not (type(v) is type(known[n]) and v == known[n])
  }


def _kwargs(c: Any, arm: Arm, sampler: Callable) -> dict[str, Any]:
  """Keywords of the config, which are those of the chosen sampler alone."""
  return sampler_kwargs(c, sampler) if arm.sampler == c.select.sampler else {}


def estimate(
  job: Job, arm: Arm, rows: int, width: int, residual: int
) -> costs.Estimate | None:
  """The cost of an arm's selection, all fits of a mixture counted.

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
  c, sampler = job.c, chains.find_sampler(arm.sampler)
  budget = budget_rows(arm.budget, rows, c.train.batch_size)
  responses = 2 if job.kind == "pairs" else 1
  sizes = costs.Sizes(rows, width, budget, responses, residual)
  try:
    found = costs.estimate(sampler, sizes, **_kwargs(c, arm, sampler))
  except (TypeError, ArithmeticError) as error:
    raise ConfigError(
      f"sampler {arm.sampler!r} cannot work with its keywords "
      f"({error}); set config.select.kwargs"
    ) from error
  if found is None or not uses_mixture(sampler):
    return found
  fits = 1 + fit_mixture.refits(c)
  return found._replace(flops=fits * found.flops, on_host=fits * found.on_host)


def hours(job: Job, found: costs.Estimate) -> float:
  """Assumed time of a selection itself, on this mesh and its host."""
  return devices.seconds_for(found.flops, found.on_host, job.mesh) / 3600


def check_hours(job: Job, arms: list[Arm]) -> None:
  """Refuses a selection that takes days before anything is embedded for it.

  A sampler refuses too, once it has its rows, and for its own keywords; here
  the sizes of the pool alone are known.

  Raises:
    ConfigError: an arm would take more than `vectors.HOURS`, with the number.
  """
  rows, m = len(job.column("pool", "id")), job.model
  width = embedder.choose(job.c, m).model.width
  for arm in arms:
    found = estimate(job, arm, rows, width, m.width)
    if found and (takes := hours(job, found)) > vectors.HOURS:
      raise ConfigError(
        f"sampler {arm.sampler!r} would take about {takes:,.0f} hours to "
        f"choose from {rows:,} rows, {found.flops:.3g} flops, "
        f"above the {vectors.HOURS:g} that a selection may take; "
        "set config.select.kwargs.blocks where it takes them, "
        "config.select.budget, or a sampler that runs in one pass, as "
        "config.select.sampler='density'"
      )


def select_price(z: JobSizes, arm: Arm) -> Price | None:
  """The sampler's own estimate; None of one that has none."""
  job, pool = z.job, z.rows["pool"]
  width = embedder.choose(job.c, z.model).model.width
  found = estimate(job, arm, pool, width, z.model.width)
  if found is None:
    return None
  seconds = devices.seconds_for(found.flops, found.on_host, job.mesh)
  seconds += found.read / READING + pool * SECONDS_A_ROW
  return Price(pool, "rows", found.flops, seconds, found.held, found.device)


def chosen_arm(job: Job, arm: Arm) -> Arm:
  """The arm of config.select.sampler at this budget and seed; it runs first."""
  return arm._replace(sampler=job.c.select.sampler)


def select_needs(job: Job, arm: Arm) -> list:
  """The stages that an arm's sampler reads, and another arm's selection."""
  sampler = chains.find_sampler(arm.sampler)
  other = [("select", chosen_arm(job, arm))] * ("subset" in sampler.needs)
  return ["data", *columns.stages(job.c, job.kind, sampler), *other]


def select_fields(job: Job, arm: Arm) -> dict[str, Any]:
  """What the selection depends on, apart from the columns that are read."""
  kwargs = _kwargs(job.c, arm, chains.find_sampler(arm.sampler))
  fields = dict(sampler=arm.sampler, budget=arm.budget, seed=arm.seed)
  fields |= dict(batch_size=job.c.train.batch_size, **kwargs)
  return fields | source_digests(arm.sampler)


def make_selection(job: Job, arm: Arm, folder: Any) -> Made:
  """Scores the pool and selects the budget."""
  c, sampler = job.c, chains.find_sampler(arm.sampler)
  ids = np.array(job.column("pool", "id"))
  table, n = columns.gather(job, sampler), len(ids)
  if "subset" in sampler.needs:
    others = selected_rows(job, chosen_arm(job, arm))
    table["subset"] = np.isin(np.arange(n), others)
  budget, fits = budget_rows(arm.budget, n, c.train.batch_size), [{}]
  if uses_mixture(sampler):
    fits = [dict(log_likelihood=x) for x in fit_mixture.likelihoods(job)]
  kwargs = _kwargs(c, arm, sampler)
  with peak_memory() as peak:
    made = [
      sampler(arm.seed, Pool(ids, table | x), budget, **kwargs) for x in fits
    ]
    made = [checked(x, n, budget, arm.sampler) for x in made]
  selection, diagnostics = made[0], {}
  if uses_mixture(sampler):
    path = job.shared / "mixture" / "diagnostics.json"
    diagnostics = disk.read_json(path) | dict(stability=_stability(made))
  notes = [*selection.notes, *columns.notes(c, sampler)]
  rows = tables.read_some(job.shared / "data" / "pool.parquet", selection.rows)
  if copies := _copies(rows):
    notes.append(
      f"warning: {copies:,} of the {len(selection.rows):,} chosen rows are "
      "copies of others; leave them out by "
      f"select.sampler='dedup(threshold=0.95) | {arm.sampler}'"
    )
    progress.say(f"  {notes[-1]}")
  if notes:
    diagnostics["notes"] = notes
  likelihood = fits[0].get("log_likelihood")
  _write_scores(folder, ids, selection, likelihood)
  _write_subset(folder, rows, selection, _logps(job, sampler))
  disk.write_array(folder / "selected.npy", selection.rows)
  disk.write_json(folder / "diagnostics.json", diagnostics)
  config = json.loads(c.to_json_best_effort()) | dict(arm=arm._asdict())
  disk.write_json(folder / "config.json", config)
  say = f"{budget:,} of {n:,} rows, {memory.size(peak['held'])} more held"
  return list(FILES), _cost(job, arm, n, table), dict(say=say, **peak)


def _cost(job: Job, arm: Arm, n: int, table: dict[str, np.ndarray]) -> Cost:
  """What the selection took, by its sampler's own account."""
  widths = {name: x.shape[-1] for name, x in table.items() if x.ndim}
  width = max(widths.get(k, 0) for k in ("embedding", "answer_embedding"))
  took = estimate(job, arm, n, width, widths.get("residual", 0))
  return Cost(int(took.flops) if took else 0)


def _stability(selections: list) -> dict[str, Any]:
  """How far selections under other seeds of the mixture overlap."""
  first, *others = (x.rows for x in selections)
  overlaps = [jaccard(first, other) for other in others]
  mean = float(np.mean(overlaps)) if overlaps else None
  return dict(jaccard=overlaps, mean=mean)


def _logps(job: Job, sampler: Callable) -> np.ndarray | None:
  """The reference's log-probs [N, 2] of all pairs, where a pass gave them."""
  c, kind = job.c, job.kind
  source = columns.logps_stage(c, kind, sampler)
  read = columns.before(c, columns.stages(c, kind, sampler))
  if kind != "pairs" or source not in read:
    return None
  return store.read(job.shared / source / "store", "logp")


def _copies(rows: RowTable) -> int:
  """Rows whose texts, but for case and spaces, an earlier one has."""
  names = ("prompt", *embedder.SIDES)
  plain = lambda text: " ".join(text.casefold().split())
  seen = {tuple(plain(row[n]) for n in names if n in row) for row in rows}
  return len(rows) - len(seen)


def _write_scores(folder, ids, selection, likelihood) -> None:
  """scores.parquet of all rows."""
  n = len(ids)
  table = dict(
    id=ids.tolist(),
    row=np.arange(n),
    score=np.asarray(selection.score, np.float64),
    rank=reasons.ranks(Pool(ids, {}), selection) - 1,
    selected=np.isin(np.arange(n), selection.rows),
  )
  if likelihood is not None:
    for side, x in enumerate(np.float64(likelihood).T):
      table[f"log_likelihood_{side}"] = x
  tables.write_rows(folder / "scores.parquet", RowTable(pa.table(table)))


def _write_subset(folder, rows, selection, logps) -> None:
  """subset.parquet of the selected rows, best first.

  `logps` are the reference's log-probabilities [N, 2], where they are known:
  columns that TRL reads in place of a reference pass.
  """

  def scored():
    for rank, (i, row) in enumerate(zip(selection.rows, rows)):
      del row["group"]
      row |= dict(score=float(selection.score[i]), rank=rank)
      if logps is not None:
        names = "ref_chosen_logps", "ref_rejected_logps"
        row |= {name: float(x) for name, x in zip(names, logps[i])}
      yield row

  path = folder / "subset.parquet"
  tables.write_rows(path, tables.as_read(RowTable.of(scored())))


def selected_rows(job: Job, arm: Arm) -> np.ndarray:
  """Row numbers of the pool that an arm selected, best first."""
  return disk.read_array(arm_folder(job, arm) / "selected.npy")
