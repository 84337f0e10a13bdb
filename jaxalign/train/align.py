"""The align stage: trains the policy of an arm."""

from collections.abc import Callable
import functools
import json
from typing import Any, NamedTuple

import jax

from jaxalign.core import disk, progress
from jaxalign.core.checkpoints import Checkpoints, restore_params
from jaxalign.core.errors import DataError
from jaxalign.core.lookup import source_digests
from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.model import decoder
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Arm, Job, lora_of
from jaxalign.train import subspace
from jaxalign.train.feed import TrainRows
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.loop import TrainOptions
from jaxalign.train.losses.unpaired import with_class_weights
from jaxalign.train.ref_logps import (
  kept_sizes,
  like,
  mismatched_rows,
  stored_rows,
  updates_for,
)
from jaxalign.train.sft import TRAINED
from jaxalign.train.statistics import needs_batch_logps
from jaxalign.train.step import make_gradients
from jaxalign.train.trainer import begin_from, from_knobs, Recipe, train
from jaxalign.train.training_cost import row_passes

GRADIENT_BATCHES = 4  # that LoRA-SB estimates the first gradient from
BASES = "bases"  # LoRA-SB's fixed matrices
BEST = "best"  # the weights of the best evaluation


class Watched(NamedTuple):
  """What is evaluated while a policy is trained, see eval/while_training.py."""

  measures: dict[str, Any]  # name -> something with `of(params)`
  extend: Callable  # (state, train_step) -> (state, train_step)
  spent: Callable  # lines of metrics.jsonl -> Cost


def _begin(
  job: Job, arm: Arm, folder: Any, loss: Callable, batch_at: Callable
) -> tuple[decoder.Params, decoder.Params]:
  """(trained, frozen) parameters that compute what the reference does."""
  c, m, base, fixed = job.c, job.policy, dict(job.reference), {}
  if m.lora is None and c.train.reference != "online":
    job.release_reference()  # its numbers are stored
  if m.lora and m.lora.variant == "lora_sb":
    producer, chunk = PRODUCERS[c.train.logps], c.model.head_chunk
    with Checkpoints(folder / BASES) as saved:
      if saved.latest() is None:
        found = subspace.bases(
          jax.random.key(arm.seed),
          m,
          job.mesh,
          base,
          lambda sizes: make_gradients(producer(sizes, chunk), loss),
          [batch_at(step) for step in range(GRADIENT_BATCHES)],
        )
        saved.save(0, dict(params=found))
    fixed = bases(job, folder)
  return begin_from(base, m, arm.seed, fixed)


def bases(job: Job, folder: Any) -> decoder.Params:
  """LoRA-SB's fixed matrices, as `align` saved them."""
  shapes = decoder.abstract(job.policy, job.mesh)
  fixed = {n: x for n, x in shapes.items() if n.endswith((":a", ":b"))}
  return restore_params(folder / BASES, fixed)


def aligned(job: Job, folder: Any, abstract: Any) -> decoder.Params:
  """What `align` trained and is judged by: the best, the mean, or the last."""
  if job.c.train.best:
    return restore_params(folder / BEST, abstract)
  name = "ema" if job.c.train.ema else "params"
  return restore_params(folder / TRAINED[0], abstract, name)


def _loss_on(job: Job, rows: TrainRows) -> Callable:
  """The loss, its classes weighed by the kept rows."""
  if rows.label is None:
    return job.loss
  if len(set(rows.label.tolist())) == 1:
    progress.say(
      "  warning: all kept rows have the same label; the loss will only push "
      "one way"
    )
  loss, weights = with_class_weights(job.loss, rows.label)
  if weights:
    progress.say(f"  {weights}")
  return loss


def leaves(job: Job, arm: Arm) -> tuple[str, ...]:
  """What `align` leaves, and resumes."""
  lora, best = lora_of(job.c), job.c.train.best
  fixed = (BASES,) if lora and lora.variant == "lora_sb" else ()
  return TRAINED + fixed + ((BEST,) if best else ())


def make_policy(job: Job, arm: Arm, folder: Any, watched: Watched) -> Made:
  """Trains the policy on the kept rows, from the reference."""
  c, t = job.c, job.c.train
  rows = stored_rows(job, arm, folder)
  if disk.read_json(folder / "ref_ids.json") != rows.ids:
    raise DataError(
      f"{folder}/ref_ids.json names other rows than "
      "subset.parquet; run with --redo"
    )
  loss, updates = _loss_on(job, rows), updates_for(job, arm, len(rows.ids))
  how = dict(seed=arm.seed, head_chunk=c.model.head_chunk)
  options = dict(
    folder=folder,
    label=f"align {arm.name}",
    evaluations={n: x.of for n, x in watched.measures.items()},
    trackers=tuple(t.trackers),
    trace=tuple(c.profile.steps),
  )
  cost, weights = train(
    job.mesh,
    job.policy,
    functools.partial(_begin, job, arm, folder, loss),
    rows,
    loss,
    from_knobs(
      Recipe, t, updates=updates, online=t.reference == "online", **how
    ),
    from_knobs(TrainOptions, t, updates=updates, **options),
    watched.extend,
  )
  lines = (folder / TRAINED[1]).read_text().splitlines()
  evaluating = watched.spent(map(json.loads, lines))
  result = dict(updates=len(lines), rows=len(rows.ids), weights=weights)
  result["say"] = f"{len(lines)} updates"
  if watched.measures:
    result["evaluating"] = evaluating.flops
  return list(leaves(job, arm)), cost + evaluating, result


def align_fields(job: Job, arm: Arm) -> dict[str, Any]:
  """What of the config the policy depends on, but for its evaluations."""
  c = job.c
  knobs = ("loss", "train", "model.head_chunk", "model.dtype")
  lora = ("lora",) if lora_of(c) else ()
  return pick(c, *knobs, *lora) | like(arm) | source_digests(c.loss.name)


def train_price(z: JobSizes, arm: Arm, evaluated: Callable) -> Price:
  """Of `align`; `evaluated(kept, updates)` gives the rows of each split that
  evaluations pass through the model."""
  c, loss = z.job.c, z.job.loss
  kept, updates, each = kept_sizes(z, arm)
  online = c.train.reference == "online"
  policy = z.model._replace(lora=lora_of(c))
  count = row_passes(policy, needs_batch_logps(loss), online)
  trained = decoder_flops(z.model, int(z.tokens["pool"]), passes=count)
  flops = updates * c.train.batch_size * z.responses * trained
  flops += (1 + online) * mismatched_rows(z, arm) * each
  for split, n in evaluated(kept, updates).items():
    flops += n * decoder_flops(z.model, int(z.tokens[split]))
  return Price(updates, "updates", flops)
