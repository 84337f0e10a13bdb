"""The cheap plateau: win rate along one epoch over all rows.

A checkpoint after a tenth of an epoch has seen a tenth of the rows, but it is
no run on a tenth of them: its rate has not come down, it saw each row once, and
its neighbours are its own past. So this curve is told apart from one through
runs of their own (evidence.curve), and costs one of them.
"""

import json
from typing import Any

import numpy as np

from jaxalign.model.job import Arm, arm_folder, Job
from jaxalign.study import plateau

METRIC = "win_vs_target"
_NAME = f"eval/generations/{METRIC}"
LABEL = (
  "Along one epoch (checkpoints, not runs of their own: the rate has "
  "not come down and their errors go together, so intervals are too "
  "narrow)"
)


def points(job: Job, arms: list[Arm]) -> list[tuple[float, float]]:
  """(percent of the rows seen, percent of wins), of runs over the whole pool.

  Of their first epoch, where config.train.eval_every and the set "generations"
  measured it.
  """
  n, out = len(job.column("pool", "id")), []
  for arm in arms:
    if not arm.is_all or arm.like:
      continue
    text = (arm_folder(job, arm) / "metrics.jsonl").read_text()
    for line in map(json.loads, text.splitlines()):
      seen = 100 * (line["step"] + 1) * job.c.train.batch_size / n
      if _NAME in line and seen <= 100:
        out.append((seen, 100 * line[_NAME]))
  return out


def curve(
  job: Job, arms: list[Arm], start: np.ndarray | None
) -> dict[str, Any] | None:
  """`plateau.fit` through the points, its words labelled; None for too few.

  Args:
    job: the run.
    arms: its arms.
    start: outcomes by prompt of what they started from, the point at 0.
  """
  found = points(job, arms)
  if len({x for x, _ in found}) < plateau.LEAST:
    return None
  if start is not None:
    found.insert(0, (0.0, 100 * float(np.nanmean(start))))
  x, y = zip(*found)
  fit = plateau.fit(x, y)
  first, *rest = fit["words"]
  return fit | dict(
    metric=METRIC, cheap=True, words=[f"{LABEL}: {first}", *rest]
  )
