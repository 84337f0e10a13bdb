"""One job's stages in order; the only file that knows the order.

data -> sft -> embed -> mixture -> (baseline), shared by all arms, then for
each arm select -> ref_logps -> align -> evaluate -> export. Rooms meet here,
through files: `select` and `train` never import each other.
"""

from jaxalign.job import Arm, Job
from jaxalign.lookup import lookup
from jaxalign.select.samplers import SAMPLERS
from jaxalign.select.topk import budget_rows
from jaxalign.stages import columns
from jaxalign.stages.align import run_align
from jaxalign.stages.data import run_data
from jaxalign.stages.embed import run_embed, run_residual
from jaxalign.stages.evaluate import run_baseline, run_evaluate
from jaxalign.stages.mixture import run_mixture
from jaxalign.stages.ref_logps import run_ref_logps
from jaxalign.stages.select import run_select
from jaxalign.stages.sft import run_sft


def run_shared(job: Job, arms: list[Arm]) -> None:
  """The stages that all arms read."""
  run_data(job)
  for arm in arms:
    budget_rows(arm.budget, len(job.column("pool", "id")),
                job.c.train.batch_size)
  run_sft(job)
  run_embed(job)
  samplers = [lookup(SAMPLERS, arm.sampler, "sampler", "select.sampler")
              for arm in arms]
  asked = {stage for sampler in samplers
           for stage in columns.stages(job.c, job.kind, sampler)}
  if "residual" in asked:
    run_residual(job)
  if any("log_likelihood" in sampler.needs for sampler in samplers):
    run_mixture(job)
  run_baseline(job)


def run_arm(job: Job, arm: Arm) -> None:
  """The stages of one arm."""
  for stage in (run_select, run_ref_logps, run_align, run_evaluate):
    stage(job, arm)
