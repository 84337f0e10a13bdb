"""Every arm's wins on the same prompts, read from its artifacts alone."""

from typing import Any, NamedTuple

import numpy as np

from jaxalign.core import disk
from jaxalign.core.errors import DataError
from jaxalign.data import world
from jaxalign.eval import held_out, judge_kinds
from jaxalign.eval.judge_stage import read_verdicts
from jaxalign.eval.policies import read_samples
from jaxalign.eval.winrate import BASELINES, wins
from jaxalign.model.job import Arm, arm_folder, Job


class Outcomes(NamedTuple):
  """The outcomes of every arm on the same prompts."""

  metric: str  # a metric of eval.json
  unit: str  # the same in words
  prompts: list[str]  # P
  # Of an arm or the baseline: [P], win 1, tie 0.5, loss 0, NaN without verdict.
  wins: dict[str, np.ndarray]


def baseline_name(job: Job) -> str:
  """The policy before alignment, in words."""
  return "given checkpoint" if job.c.model.checkpoint else "SFT model"


def read_outcomes(job: Job, arms: list[Arm]) -> Outcomes:
  """Win or loss of every arm by prompt, and of the policy before alignment.

  Without a judge, or with one that could not be read, there is no win rate:
  then it is the pairs of held-out accuracy, which the baseline has none of.

  Raises:
    DataError: arms that were judged on different prompts.
  """
  kind = judge_kinds.kind_of(job.c)
  if kind in judge_kinds.JUDGES:
    judged = _judged(job, arms)
    if all_read(*judged.wins.values()).any():
      return judged
  if kind == "world":
    return _in_world(job, arms)
  right = {a.name: _accuracy(job, arm_folder(job, a)) for a in arms}
  prompts = [str(i) for i in range(len(next(iter(right.values()))))]
  return Outcomes("accuracy", "held-out preference accuracy", prompts, right)


def all_read(*outcomes: np.ndarray) -> np.ndarray:
  """[P] whether every one of [..., P] outcomes has a verdict."""
  rows = np.concatenate([np.atleast_2d(x) for x in outcomes])
  return ~np.isnan(rows).any(axis=0)


def _in_world(job: Job, arms: list[Arm]) -> Outcomes:
  """By the true reward, against the target or the reference."""
  samples = {a.name: read_samples(arm_folder(job, a)) for a in arms}
  base = read_samples(job.shared / "baseline")
  samples[baseline_name(job)] = base
  rewards = {
    name: np.array([s["reward"] for s in rows])
    for name, rows in samples.items()
  }
  against, theirs = "reference", rewards[baseline_name(job)]
  if job.c.judge.baseline == "target":
    against, true = "SFT target", held_out.eval_set(job).world
    theirs = np.array(
      [world.reward(true, s["prompt"], s["target"]) for s in base]
    )
  return Outcomes(
    BASELINES[job.c.judge.baseline][0],
    f"win rate against the {against}",
    [s["id"] for s in base],
    {name: wins(x, theirs) for name, x in rewards.items()},
  )


def _judged(job: Job, arms: list[Arm]) -> Outcomes:
  """By the configured judge."""
  base = baseline_name(job)
  rows = {a.name: read_verdicts(arm_folder(job, a)) for a in arms}
  rows[base] = read_verdicts(job.shared / "judged_reference")
  prompts = [row["id"] for row in rows[base]]
  for name, own in rows.items():
    if [row["id"] for row in own] != prompts:
      raise DataError(
        f"{name} was judged on other prompts than the {base}; --redo, or "
        "use another --workdir"
      )
  metric, against = BASELINES[job.c.judge.baseline]
  unit = f"win rate against {against}, by {judge_kinds.name_of(job.c)}"
  outcomes = {  # None becomes NaN
    name: np.array([row["outcome"] for row in own], np.float64)
    for name, own in rows.items()
  }
  return Outcomes(metric, unit, prompts, outcomes)


def _accuracy(job: Job, folder: Any) -> np.ndarray:
  """[n] 1, 0.5 or 0: whether the implicit reward prefers the chosen side."""
  policy, ref = held_out.as_pairs(
    held_out.eval_set(job),
    disk.read_array(folder / "held_out_logp.npy"),
    disk.read_array(job.shared / "baseline" / "held_out_logp.npy"),
  )
  margin = np.asarray(policy, np.float64) - ref
  return wins(margin[:, 0], margin[:, 1])
