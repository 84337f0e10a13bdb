"""What the reference says of the rows that an arm kept."""

from typing import Any

import jax
import numpy as np

from jaxalign.core import artifacts
from jaxalign.core.artifacts import Cost, pick
from jaxalign.core.job import Arm, arm_folder, Job, updates_of
from jaxalign.core.lookup import source_digests
from jaxalign.data import tokens as tokens_lib
from jaxalign.embed import passes as embed
from jaxalign.embed import store as stores
from jaxalign.select import columns
from jaxalign.select.choose import selected_rows
from jaxalign.select.samplers import combine
from jaxalign.train import feed, reference, references


def updates_for(job: Job, arm: Arm, n: int) -> int:
  """How long an arm of n rows trains."""
  return updates_of(job.c, arm, n, len(job.column("pool", "id")))


def like(arm: Arm) -> dict[str, Any]:
  """What a record says of an arm trained as long as another budget."""
  return dict(like=arm.like) if arm.like else {}


def rows_of(
  job: Job, arm: Arm, total: np.ndarray, count: np.ndarray
) -> feed.Rows:
  """The rows that an arm kept, with the reference's sums [M, R]."""
  index = selected_rows(job, arm)
  ids, tokens = job.column("pool", "id"), job.tokens("pool")
  responses = len(tokens.start) // len(ids)
  label = None
  if job.kind == "unpaired":
    label = np.array(job.column("pool", "label"))[index]
  return feed.Rows(
    [ids[i] for i in index],
    tokens,
    index[:, None] * responses + np.arange(responses)[None, :],
    np.asarray(total),
    np.asarray(count),
    label,
  )


def run_ref_logps(job: Job, arm: Arm) -> None:
  """The reference's (sum, count) of the kept rows, by id.

  Where a pass over the pool ran the same weights over the same rows its numbers
  are looked up; KTO's mismatched rows always need a pass of their own, and so
  does what `references` adds. A loss that reads no reference is given zeros
  where numbers would cost a pass. Where products are narrower than float32
  nothing is looked up: see `reference.as_trained`.
  """
  c, m = job.c, job.model
  online = c.train.reference == "online"  # train computes what costs a pass
  source = columns.sums(c, job.kind, combine.named(arm.sampler))
  if ("", source) not in job.records:  # training alone runs no such pass
    source = ""
  batched = not (columns.exact(c) or online) and job.loss.reference

  def once(rows, index, ids=None):
    return reference.logps(
      job.mesh,
      job.reference,
      m,
      rows,
      index,
      layout=c.train.layout,
      tile=c.embed.tile,
      chunk=c.model.head_chunk,
      producer=c.train.logps,
      ids=ids,
    )

  def kept(index):
    """(sum, count) [M, R] of the kept rows, and what they cost."""
    if source:
      store = stores.open_store(job.shared / source / "store")
      logp, count = (stores.read(store, name) for name in ("logp", "count"))
      return np.array(logp[index]), np.array(count[index]), Cost()
    tokens, ids = job.tokens("pool"), job.column("pool", "id")
    responses = len(tokens.start) // len(ids)
    which = index[:, None] * responses + np.arange(responses)
    if not job.loss.reference or online or batched:
      counts = np.float32((tokens_lib.lengths(tokens) - tokens.start)[which])
      return np.zeros_like(counts), counts, Cost()
    total, count = once(tokens, which, [ids[i] for i in index])
    rows = tokens_lib.take(tokens, which.reshape(-1))
    return total, count, Cost(embed.flops(m, rows), len(rows.ids))

  def make(folder):
    index = selected_rows(job, arm)
    total, count, cost = kept(index)
    arrays = dict(ref_sum=total, ref_count=count)
    rows = rows_of(job, arm, total, count)

    def spent(more):
      nonlocal cost
      cost = Cost(cost.flops + more.flops, cost.tokens + more.tokens)

    tokens = None
    if "z0" in job.loss.stats:
      tokens = feed.make_mismatched(
        rows,
        updates=updates_for(job, arm, len(index)),
        seed=arm.seed,
        batch=c.train.batch_size,
        context=m.context,
      )
      arrays["mismatched_sum"] = np.zeros(len(tokens.start), np.float32)
    if batched:
      found = reference.as_trained(
        job.mesh,
        job.reference,
        m,
        rows,
        batch=c.train.batch_size,
        accumulation=c.train.accumulation,
        seed=arm.seed,
        layout=c.train.layout,
        producer=c.train.logps,
        tile=c.embed.tile,
        chunk=c.model.head_chunk,
        mismatched=tokens,
      )
      arrays["ref_sum"] = found.ref_sum
      own = tokens_lib.take(rows.tokens, rows.row_of.reshape(-1))
      spent(Cost(embed.flops(m, own), len(own.ids)))
    if "common_prefix" in job.loss.extras and (online or batched):
      arrays["ref_common_prefix"] = (
        found.ref_common_prefix if batched else np.zeros_like(total)
      )
    elif "common_prefix" in job.loss.extras:
      arrays["ref_common_prefix"], more = references.common_prefix_sums(
        job, rows
      )
      spent(more)
    if "weights" in job.loss.stats:
      arrays["weights"], more = references.prompt_weights(job, rows, arm.seed)
      spent(more)
    if tokens is not None and not online:
      arrays["mismatched_sum"] = (
        found.mismatched
        if batched
        else once(tokens, np.arange(len(tokens.start))[:, None])[0][:, 0]
      )
      spent(Cost(embed.flops(m, tokens), len(tokens.ids)))
    if jax.process_index() == 0:
      for name, x in arrays.items():
        artifacts.write_array(folder / f"{name}.npy", x)
      artifacts.write_json(
        folder / "ref_ids.json", [job.column("pool", "id")[i] for i in index]
      )
    return [*(f"{n}.npy" for n in arrays), "ref_ids.json"], cost, {}

  fields = dict(loss=c.loss.name, layout=c.train.layout)
  if source_digests(c.loss.name):  # one from outside may be edited to read more
    fields["reads"] = [*job.loss.stats, *job.loss.extras, job.loss.reference]
  if online:
    fields["reference"] = "online"
  if "z0" in job.loss.stats:
    fields |= pick(
      c,
      "train.batch_size",
      "train.epochs",
      "train.max_updates",
      "train.min_updates",
    ) | like(arm)
  if batched:
    fields |= pick(c, "train.batch_size", "train.accumulation", "train.logps")
  read = {stage for stage in {"embed", source} if ("", stage) in job.records}
  if "embed" not in read:  # whose key names these
    fields |= pick(c, "model")
  job.run(
    arm_folder(job, arm),
    "ref_logps",
    arm.name,
    fields=fields,
    make=make,
    inputs=dict(
      select=job.key("select", arm.name),
      # The embedding may be another model's.
      sft=job.key("sft"),
    )
    | {stage: job.key(stage) for stage in read},
  )
