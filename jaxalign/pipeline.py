"""One job's stages in order; the only file that knows the order.

data -> sft -> embed -> mixture -> baseline -> (judge), shared by all arms,
then for each arm select -> card -> ref_logps -> align -> evaluate -> (judge)
-> export. Rooms meet here, through files: `select` and `train` never import
each other.
"""

from typing import Any

import jax

from jaxalign.core import artifacts, progress
from jaxalign.core.artifacts import pick
from jaxalign.data import build_data, prepare, recipe
from jaxalign.data.summary import summary_lines
from jaxalign.embed.over_pool import KEEPS, run_passes
from jaxalign.embed.scores import run_alone, run_ask, run_rewards
from jaxalign.eval import while_training
from jaxalign.eval.judge_kinds import check_enough, check_ready
from jaxalign.eval.judge_stage import run_judge, run_judge_start
from jaxalign.eval.policies import (
  policy_of,
  run_baseline,
  run_evaluate,
  run_export,
)
from jaxalign.model import decoder
from jaxalign.model.job import Arm, Job
from jaxalign.report.selection_stage import run_card
from jaxalign.select import columns
from jaxalign.select.choose import check_hours, run_select
from jaxalign.select.fit_mixture import run_mixture
from jaxalign.select.samplers import combine
from jaxalign.select.topk import budget_rows
from jaxalign.train.align import run_align
from jaxalign.train.host_memory import check_memory
from jaxalign.train.losses import loss_of
from jaxalign.train.proxies import run_held_out, run_proxy
from jaxalign.train.ref_logps import run_ref_logps
from jaxalign.train.sft import run_sft


def make_job(c: Any, mesh: Any, workdir: Any, redo: bool = False) -> Job:
  """A job of a config, what the config leaves open settled."""
  recipe.settle(c)
  return Job(c, mesh, workdir, loss_of(c), redo)


def run_data(job: Job) -> None:
  """Reads, checks, splits and tokenizes the source."""
  c = job.c
  fields = pick(
    c,
    "data",
    "model.checkpoint",
    "model.tokenizer",
    "model.vocab_size",
    "model.context",
  )
  fields["data.source"] = prepare.sources_of(c)
  fields["data.choice"] = prepare.choice_of(c)
  fields |= dict(
    kind=job.kind, source_digest=artifacts.told(lambda: prepare.fingerprint(c))
  )
  job.run(
    job.shared / "data",
    "data",
    fields=fields,
    inputs={},
    make=lambda folder: build_data.make_data(
      c, folder, most=job.most, wanted=job.kind, writes=jax.process_index() == 0
    ),
  )
  if jax.process_index() == 0:
    for line in summary_lines(
      artifacts.read_json(job.shared / "data" / "data_summary.json")
    ):
      progress.say(f"  {line}")
  progress.say(
    f"  mesh {dict(job.mesh.shape)} on {job.mesh.size} x "
    f"{job.mesh.devices.flat[0].device_kind}; model of "
    f"{decoder.parameter_count(job.model):,} parameters"
  )


def _samplers(arms: list[Arm]) -> list:
  return [combine.named(arm.sampler) for arm in arms]


def _check_pool(job: Job, arms: list[Arm]) -> None:
  """Refuses what the pool cannot give, fields or rows, and choices of days."""
  for arm in arms:
    budget_rows(
      arm.budget, len(job.column("pool", "id")), job.c.train.batch_size
    )
    columns.check_records(job, arm.sampler)
  check_hours(job, arms)


def run_scores(job: Job, arms: list[Arm], also: tuple[str, ...] = ()) -> None:
  """The stages that the samplers of the arms read, and `also`; no other."""
  samplers = _samplers(arms)
  asked = {
    *also,
    *(
      stage
      for sampler in samplers
      for stage in columns.stages(job.c, job.kind, sampler)
    ),
  }
  mixture = any("log_likelihood" in sampler.needs for sampler in samplers)
  asked = {*columns.before(job.c, [*asked, *["mixture"] * mixture])}
  asked -= {"mixture"}
  if asked - columns.without_reference(job.c):
    run_sft(job)
  if passes := asked & {*KEEPS}:
    run_passes(job, [*passes])
  for name, run in (
    ("alone", run_alone),
    ("ask", run_ask),
    ("rewards", run_rewards),
    ("proxy", run_proxy),
    ("held_out", run_held_out),
  ):
    if name in asked:
      run(job)
  if mixture:
    run_mixture(job)


def run_shared(job: Job, arms: list[Arm]) -> None:
  """The stages that all arms read."""
  check_ready(job, arms)
  run_data(job)
  _check_pool(job, arms)
  check_memory(job, arms)
  check_enough(job, arms)
  run_sft(job)
  run_scores(job, arms, also=("embed",))
  run_baseline(job)
  run_judge_start(job)


def run_arm(job: Job, arm: Arm) -> None:
  """The stages of one arm."""
  for stage in (run_select, run_card, run_ref_logps):
    stage(job, arm)
  run_align(job, arm, while_training)
  policy = policy_of(job, arm)
  run_evaluate(job, arm, policy)
  run_judge(job, arm)
  run_export(job, arm, policy)


def run_selection(job: Job, arm: Arm) -> None:
  """Chooses rows, and computes no more than that takes."""
  run_data(job)
  _check_pool(job, [arm])
  run_scores(job, [arm])
  run_select(job, arm)
  run_card(job, arm)


def run_training(job: Job, arm: Arm) -> None:
  """Aligns on the rows of an arm; measures where rows are held out."""
  check_ready(job, [arm])
  run_data(job)
  _check_pool(job, [arm])
  check_memory(job, [arm])
  measured = len(job.column("held_out", "id")) > 0
  if measured:
    check_enough(job, [arm])
  run_sft(job)
  run_scores(job, [arm])  # of an arm that keeps all rows: nothing
  if measured:
    run_baseline(job)
    run_judge_start(job)
  for stage in (run_select, run_ref_logps):
    stage(job, arm)
  run_align(job, arm, while_training)
  policy = policy_of(job, arm)
  if measured:
    run_evaluate(job, arm, policy)
    run_judge(job, arm)
  run_export(job, arm, policy)
