"""The align stage: a policy trained on its rows, and evaluated meanwhile."""

from collections.abc import Callable
from typing import Any

from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.eval.while_training import (
  evaluation_cost,
  measures_of,
  planned_rows,
  reads,
  record_fields,
)
from jaxalign.model import decoder
from jaxalign.model.job import Arm, Job
from jaxalign.train import align, online
from jaxalign.train.align import train_price, Watched
from jaxalign.train.logps import PRODUCERS


def make_aligned(job: Job, arm: Arm, folder: Any) -> Made:
  """Trains a policy of the kept rows."""
  measures = measures_of(job, arm)
  cost = lambda lines: evaluation_cost(measures, lines)
  watched = Watched(measures, with_online(job), cost)
  return align.make_policy(job, arm, folder, watched)


def align_fields(job: Job, arm: Arm) -> dict[str, Any]:
  """The fields of `align`, those that decide which weights are best too."""
  t = job.c.train
  fields = align.align_fields(job, arm) | pick(job.c, *reads(t))
  return record_fields(t, fields)


def align_price(z: JobSizes, arm: Arm) -> Price:
  """Training, and the evaluations while it runs."""
  held, pool = z.rows["held_out"], z.rows["pool"]

  def evaluated(kept, updates):
    rows = dict(held_out=held, kept=kept, rest=pool - kept)
    return planned_rows(
      z.job.c, updates, rows, dict(held_out=2, pool=z.responses)
    )

  return train_price(z, arm, evaluated)


def with_online(job: Job) -> Callable[[Any, Callable], tuple[Any, Callable]]:
  """Returns `(state, train_step) -> (state, train_step)` with an online
  reference and a running mean of the weights, as in config.train."""
  t = job.c.train

  def producer(m):
    logps_fn = PRODUCERS[t.logps](m, job.c.model.head_chunk)
    return logps_fn, decoder.compiler_options(m)

  def extended(state, step):
    if t.ref_sync:
      state = online.begin_refresh(state)
      logps_fn, options = producer(job.policy)
      how = dict(every=t.ref_sync, mix=t.ref_mix, options=options)
      step = online.with_refresh(step, logps_fn, **how)
    elif t.reference == "online":
      logps_fn, options = producer(job.model)
      step = online.with_reference(step, logps_fn, job.reference, options)
    if t.ema:
      state, step = online.begin_ema(state), online.with_ema(step, t.ema)
    return state, step

  return extended
