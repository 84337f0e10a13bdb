"""The align stage: trains the policy of an arm."""

from collections.abc import Callable
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.core import artifacts, progress
from jaxalign.core.artifacts import Cost, pick
from jaxalign.core.checkpoints import Checkpoints, restore_params
from jaxalign.core.errors import DataError
from jaxalign.core.job import Arm, arm_folder, Job, lora_of
from jaxalign.core.lookup import source_digests
from jaxalign.eval import while_training as watched
from jaxalign.model import adapters, decoder
from jaxalign.train import feed, subspace
from jaxalign.train import step as steps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import unpaired
from jaxalign.train.ref_logps import like, rows_of, updates_for
from jaxalign.train.sft import train, TRAINED

BASES = "bases"  # LoRA-SB's fixed matrices
GRADIENT_BATCHES = 4  # that LoRA-SB estimates the first gradient from
BEST = "best"  # the weights of the best evaluation


def _policy_start(
  job: Job, arm: Arm, folder: Any, loss: Callable, batch_at: Callable
) -> tuple[decoder.Params, decoder.Params]:
  """(trained, frozen) parameters that compute what the reference does."""
  c, m = job.c, job.policy
  if m.lora is None:  # the step donates its state, so it has a copy
    reference, params = dict(job.reference), {}
    if c.train.reference != "online":  # its numbers are stored
      job.release_reference()
    while reference:  # one copied, one let go: never both whole
      name, x = reference.popitem()
      params[name] = jnp.array(x, jnp.float32).block_until_ready()
    return params, {}
  fresh = adapters.init(jax.random.key(arm.seed), decoder.table(m), job.mesh)
  if m.lora.variant == "lora_sb":
    with Checkpoints(folder / BASES) as saved:
      if saved.latest() is None:
        found = subspace.bases(
          jax.random.key(arm.seed),
          m,
          job.mesh,
          job.reference,
          lambda sizes: steps.make_gradients(
            PRODUCERS[c.train.logps](sizes, c.model.head_chunk), loss
          ),
          [batch_at(step) for step in range(GRADIENT_BATCHES)],
        )
        saved.save(0, dict(params=found))
    fresh |= bases(job, folder)
  adapters.assert_zero(fresh)
  trained, fixed = adapters.split(fresh, m.lora)
  return trained, job.reference | fixed


def bases(job: Job, folder: Any) -> decoder.Params:
  """LoRA-SB's fixed matrices, as `align` saved them."""
  return restore_params(
    folder / BASES,
    {
      n: x
      for n, x in decoder.abstract(job.policy, job.mesh).items()
      if n.endswith((":a", ":b"))
    },
  )


def aligned(job: Job, folder: Any, abstract: Any) -> decoder.Params:
  """What `align` trained and is judged by: the best, the mean, or the last."""
  if job.c.train.best:
    return restore_params(folder / BEST, abstract)
  return restore_params(
    folder / TRAINED[0], abstract, "ema" if job.c.train.ema else "params"
  )


def watching(t: Any) -> dict[str, Any]:
  """What `loop.fit` is told of config.train."""
  return dict(
    keep=t.keep,
    explode=t.explode,
    eval_every=t.eval_every,
    best=t.best,
    stop_after=t.stop_after,
    trackers=tuple(t.trackers),
  )


def run_align(job: Job, arm: Arm) -> None:
  """Trains the policy on the kept rows, from the reference."""
  c, m = job.c, job.model
  lora = lora_of(c)
  leaves = TRAINED + ((BASES,) if lora and lora.variant == "lora_sb" else ())
  leaves += (BEST,) if c.train.best else ()

  def make(folder):
    total = artifacts.read_array(folder / "ref_sum.npy")
    count = artifacts.read_array(folder / "ref_count.npy")
    rows = rows_of(job, arm, total, count)
    if "common_prefix" in job.loss.extras:
      rows = rows._replace(
        ref_common_prefix=artifacts.read_array(folder / "ref_common_prefix.npy")
      )
    if "weights" in job.loss.stats:
      rows = rows._replace(weights=artifacts.read_array(folder / "weights.npy"))
    if artifacts.read_json(folder / "ref_ids.json") != rows.ids:
      raise DataError(
        f"{folder}/ref_ids.json names other rows than "
        "subset.parquet; run with --redo"
      )
    loss = job.loss
    if rows.label is not None:
      if len(set(rows.label.tolist())) == 1:
        progress.say(
          "  warning: all kept rows have the same label; the "
          "loss will only push one way"
        )
      loss, said = unpaired.weighed(loss, rows.label)
      for line in said:
        progress.say(f"  {line}")
    updates, mismatched = updates_for(job, arm, len(rows.ids)), None
    if "z0" in job.loss.stats:
      mismatched = feed.Mismatched(
        feed.make_mismatched(
          rows,
          updates=updates,
          seed=arm.seed,
          batch=c.train.batch_size,
          context=m.context,
        ),
        artifacts.read_array(folder / "mismatched_sum.npy"),
      )
    measures = watched.measures(job, arm)
    cost = train(
      job,
      folder,
      f"align {arm.name}",
      job.policy,
      functools.partial(_policy_start, job, arm, folder, loss),
      rows,
      loss,
      c.train,
      lr=c.train.lr,
      updates=updates,
      seed=arm.seed,
      mismatched=mismatched,
      optimizer=c.train.optimizer,
      layout=c.train.layout,
      producer=c.train.logps,
      trace=tuple(c.profile.steps),
      extend=watched.extend(job),
      online=c.train.reference == "online",
      measures={n: x.of for n, x in measures.items()},
      **watching(c.train),
    )
    lines = (folder / TRAINED[1]).read_text().splitlines()
    beside = watched.spent(measures, map(json.loads, lines))
    return (
      list(leaves),
      Cost(cost.flops + beside.flops, cost.tokens + beside.tokens),
      dict(updates=len(lines), rows=len(rows.ids), say=f"{len(lines)} updates")
      | (dict(evaluating=beside.flops) if measures else {}),
    )

  fields = pick(
    c,
    "loss",
    "train",
    "model.head_chunk",
    "model.dtype",
    *watched.reads(c.train),
    *(["lora"] if lora else []),
  ) | like(arm)
  fields = watched.card_fields(c.train, fields) | source_digests(c.loss.name)
  job.run(
    arm_folder(job, arm),
    "align",
    arm.name,
    make=make,
    resumes=leaves,
    fields=fields,
    inputs=dict(ref_logps=job.key("ref_logps", arm.name), sft=job.key("sft")),
  )  # it starts from there
