"""How win rate grows with data, along budgets or along one epoch.

A checkpoint after a tenth of an epoch has seen a tenth of the rows, but it is
no run on a tenth of them: its learning rate has not decayed, it saw each row
once, and its neighbours are its own past. So the cheap curve through
checkpoints is kept apart from the one through runs of their own, and costs one
of them.
"""

import json
from typing import Any

import numpy as np

from jaxalign.data.batches import updates
from jaxalign.model.job import Arm, arm_folder, Job
from jaxalign.select.topk import budget_rows
from jaxalign.study.outcomes import Outcomes
from jaxalign.study.plateau import fit_plateau, LEAST

METRIC = "win_vs_target"
LABEL = (
  "Along one epoch (checkpoints, not runs of their own: the rate has "
  "not decayed and their errors go together, so intervals are too narrow)"
)


def curve_arms(job: Job, arms: list[Arm]) -> list[tuple[int, Arm]]:
  """(rows, arm) of the chosen sampler and everything, where a curve is due."""
  n = len(job.column("pool", "id"))
  found = [
    (budget_rows(a.budget, n), a)
    for a in arms
    if not a.like and (a.is_all or a.sampler == job.c.select.sampler)
  ]
  return found if len({m for m, _ in found}) >= LEAST else []


def budget_curve(
  job: Job, outcomes: Outcomes, arms: list[Arm], baseline: str
) -> dict[str, Any] | None:
  """`fit_plateau` of win rate over the percentage of the data.

  The baseline is the point without data. All points share their prompts, so
  the intervals are about more seeds, not about other prompts.
  """
  points = curve_arms(job, arms)
  if not points:
    return None
  n, t = len(job.column("pool", "id")), job.c.train
  names = [a.name for _, a in points]
  x = [100 * m / n for m, _ in points]
  if baseline in outcomes.wins:
    x, names = [0.0, *x], [baseline, *names]
  y = [100 * float(np.nanmean(outcomes.wins[name])) for name in names]
  fit = fit_plateau(x, y)
  fit["words"] += _bounded(job, [m for m, _ in points])
  return fit | dict(
    sampler=job.c.select.sampler,
    metric=outcomes.metric,
    rows=[m for m, _ in points],
    arms=[a.name for _, a in points],
    epochs=t.epochs,
    max_updates=t.max_updates,
    min_updates=t.min_updates,
  )


def _bounded(job: Job, rows: list[int]) -> list[str]:
  """Whether a bound on updates makes large subsets alike, in words."""
  t, n = job.c.train, len(job.column("pool", "id"))
  free = lambda m: updates(m, t.batch_size, t.epochs, 0, t.min_updates)
  held = [m for m in rows if t.max_updates and t.max_updates < free(m)]
  if not held:
    return []
  return [
    f"Subsets of {100 * min(held) / n:.3g} % and more were trained for "
    f"train.max_updates={t.max_updates} updates, fewer than their epochs "
    "take: a plateau there is of updates as much as of data; set "
    "config.train.max_updates=0."
  ]


def checkpoint_points(job: Job, arms: list[Arm]) -> list[tuple[float, float]]:
  """(percent of the rows seen, percent of wins), of runs over the whole pool.

  Of their first epoch, where config.train.eval_every and the set "generations"
  measured it.
  """
  n, name, out = len(job.column("pool", "id")), f"eval/generations/{METRIC}", []
  for arm in arms:
    if not arm.is_all or arm.like:
      continue
    text = (arm_folder(job, arm) / "metrics.jsonl").read_text()
    for line in map(json.loads, text.splitlines()):
      seen = 100 * (line["step"] + 1) * job.c.train.batch_size / n
      if name in line and seen <= 100:
        out.append((seen, 100 * line[name]))
  return out


def checkpoint_curve(
  job: Job, arms: list[Arm], baseline: np.ndarray | None
) -> dict[str, Any] | None:
  """`fit_plateau` through checkpoints, its words labelled; None for too few.

  Args:
    job: the run.
    arms: its arms.
    baseline: outcomes by prompt of the policy before alignment, the point at 0.
  """
  points = checkpoint_points(job, arms)
  if len({x for x, _ in points}) < LEAST:
    return None
  if baseline is not None:
    points.insert(0, (0.0, 100 * float(np.nanmean(baseline))))
  fit = fit_plateau(*zip(*points))
  first, *rest = fit["words"]
  words = [f"{LABEL}: {first}", *rest]
  return fit | dict(metric=METRIC, cheap=True, words=words)
