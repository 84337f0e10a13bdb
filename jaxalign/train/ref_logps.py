"""The ref_logps stage: what the reference says of the rows an arm kept."""

from typing import Any

import jax
import numpy as np

from jaxalign.core import disk
from jaxalign.core.artifacts import Cost
from jaxalign.core.lookup import source_digests
from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.data import batches
from jaxalign.data.tokens import row_lengths, take_rows, TokenRows
from jaxalign.embed import passes
from jaxalign.embed import store as stores
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Arm, Job
from jaxalign.select import columns
from jaxalign.select.choose import selected_rows
from jaxalign.select.samplers import chains
from jaxalign.select.topk import budget_rows
from jaxalign.train.feed import (
  Batching,
  make_mismatched,
  MismatchedRows,
  TrainRows,
)
from jaxalign.train.reference import (
  logps_as_trained,
  Reference,
  reference_logps,
)
from jaxalign.train.row_columns import COLUMNS, columns_of, EXTRAS
from jaxalign.train.statistics import needs_mismatched


def updates_for(job: Job, arm: Arm, n: int) -> int:
  """How long an arm of n rows trains."""
  return updates_of(job.c, arm, n, len(job.column("pool", "id")))


def like(arm: Arm) -> dict[str, Any]:
  """What a record says of an arm trained as long as another budget."""
  return dict(like=arm.like) if arm.like else {}


def batching_of(job: Job, arm: Arm) -> Batching:
  """How the kept rows of an arm become batches."""
  t = job.c.train
  cut = t.batch_size, arm.seed, t.accumulation
  return Batching(*cut, job.model.context, t.layout)


def rows_of(job: Job, arm: Arm) -> TrainRows:
  """The rows that an arm kept, without the reference's sums."""
  index = selected_rows(job, arm)
  ids, tokens = job.column("pool", "id"), job.tokens("pool")
  row_of = index[:, None] * job.responses + np.arange(job.responses)
  counts = np.float32((row_lengths(tokens) - tokens.start)[row_of])
  label = None
  if job.kind == "unpaired":
    label = np.array(job.column("pool", "label"))[index]
  ids = [ids[i] for i in index]
  return TrainRows(ids, tokens, row_of, np.zeros_like(counts), counts, label)


def reference_of(job: Job) -> Reference:
  """The reference of a job, as it is run ahead of training."""
  c = job.c
  how = c.embed.tile, c.model.head_chunk, c.train.logps
  return Reference(job.mesh, job.reference, job.model, *how)


def _pass_over_pool(job: Job, arm: Arm) -> str:
  """The stage that has the reference's sums of the pool already; "": none."""
  stage = columns.logps_stage(job.c, job.kind, chains.find_sampler(arm.sampler))
  return stage if ("", stage) in job.records else ""


def _batched(job: Job) -> bool:
  """Whether sums depend on the batch, see `logps_as_trained`."""
  online = job.c.train.reference == "online"
  return job.loss.reference and not (columns.exact(job.c) or online)


def _mismatched(job: Job, arm: Arm, rows: TrainRows) -> TokenRows | None:
  """KTO's mismatched rows of all updates; None: the loss reads none."""
  if not needs_mismatched(job.loss):
    return None
  updates = updates_for(job, arm, len(rows.ids))
  return make_mismatched(rows, batching_of(job, arm), updates)


def _computed(
  job: Job, arm: Arm, rows: TrainRows
) -> tuple[dict[str, np.ndarray], Cost]:
  """The arrays of `make_ref_logps` by name, and what they cost."""
  c, loss = job.c, job.loss
  online = c.train.reference == "online"  # train computes what costs a pass
  other, names = _mismatched(job, arm, rows), columns_of(loss)
  other_sums, source = None, _pass_over_pool(job, arm)
  arrays = dict(ref_sum=rows.ref_sum, ref_count=rows.ref_count)
  passed = []  # token rows
  if source:
    store = stores.open_store(job.shared / source / "store")
    index = selected_rows(job, arm)
    for name, of in dict(ref_sum="logp", ref_count="count").items():
      arrays[name] = np.array(stores.read(store, of)[index])
  elif loss.reference and not online:
    passed.append(take_rows(rows.tokens, rows.row_of.reshape(-1)))
    if _batched(job):
      found, other_sums = logps_as_trained(
        reference_of(job), rows, batching_of(job, arm), other
      )
      arrays |= dict(ref_sum=found.sum, common_prefix=found.common_prefix)
    else:
      arrays["ref_sum"], arrays["ref_count"] = reference_logps(
        reference_of(job), rows.tokens, rows.row_of, c.train.layout, rows.ids
      )
  rows, cost = rows._replace(ref_sum=arrays["ref_sum"]), Cost()
  for name in names:
    if name in EXTRAS and online:
      arrays[name] = np.zeros_like(rows.ref_sum)
    elif name not in arrays:
      arrays[name], more = COLUMNS[name](reference_of(job), rows, arm.seed)
      cost += more
  if other is not None:
    if online:
      other_sums = np.zeros(len(other.start), np.float32)
    else:
      passed.append(other)
    if other_sums is None:
      index = np.arange(len(other.start))[:, None]
      layout = c.train.layout
      sums, _ = reference_logps(reference_of(job), other, index, layout)
      other_sums = sums[:, 0]
    arrays["mismatched_sum"] = other_sums
  for x in passed:
    cost += Cost(passes.pass_flops(job.model, x), len(x.ids))
  kept = "ref_sum", "ref_count", "mismatched_sum", *names
  return {n: x for n, x in arrays.items() if n in kept}, cost


def make_ref_logps(job: Job, arm: Arm, folder: Any) -> Made:
  """The reference's (sum, count) of the kept rows, by id.

  Where a pass over the pool ran the same weights over the same rows its numbers
  are looked up; KTO's mismatched rows always need a pass of their own, and so
  do the columns that a loss reads. A loss that reads no reference is given
  zeros where numbers would cost a pass. Where products are narrower than
  float32 nothing is looked up: see `logps_as_trained`.
  """
  rows = rows_of(job, arm)
  arrays, cost = _computed(job, arm, rows)
  if jax.process_index() == 0:
    for name, x in arrays.items():
      disk.write_array(folder / f"{name}.npy", x)
    disk.write_json(folder / "ref_ids.json", rows.ids)
  files = [*(f"{n}.npy" for n in arrays), "ref_ids.json"]
  return files, cost, {}


def _passes_read(job: Job, arm: Arm) -> list[str]:
  """The passes over the pool, of those that ran, that the sums depend on."""
  names = {"embed", _pass_over_pool(job, arm)}
  return sorted(n for n in names if ("", n) in job.records)


def ref_logps_needs(job: Job, arm: Arm) -> list[str]:
  # The embedding may be another model's: the reference is an input too.
  return ["select", "sft", *_passes_read(job, arm)]


def ref_logps_fields(job: Job, arm: Arm) -> dict[str, Any]:
  """What of the config the reference's sums depend on."""
  c = job.c
  fields = dict(loss=c.loss.name, layout=c.train.layout)
  if source_digests(c.loss.name):  # one from outside may be edited to read more
    fields["reads"] = [*job.loss.stats, *job.loss.extras, job.loss.reference]
  if c.train.reference == "online":
    fields["reference"] = "online"
  if needs_mismatched(job.loss):
    knobs = "batch_size", "epochs", "max_updates", "min_updates"
    fields |= pick(c, *(f"train.{n}" for n in knobs)) | like(arm)
  if _batched(job):
    fields |= pick(c, "train.batch_size", "train.accumulation", "train.logps")
  if "embed" not in _passes_read(job, arm):  # whose record names these
    fields |= pick(c, "model")
  return fields


def updates_of(c: Any, arm: Arm, rows: int, pool: int) -> int:
  """Updates of an arm that kept `rows` of a pool of so many rows."""
  if arm.like:
    rows = budget_rows(arm.like, pool, c.train.batch_size)
  names = "batch_size", "epochs", "max_updates", "min_updates"
  return batches.updates(rows, *(c.train[name] for name in names))


def stored_rows(job: Job, arm: Arm, folder: Any) -> TrainRows:
  """The rows that an arm kept, with all that `make_ref_logps` wrote of them."""
  read = lambda name: disk.read_array(folder / f"{name}.npy")
  rows = rows_of(job, arm)._replace(
    ref_sum=read("ref_sum"),
    ref_count=read("ref_count"),
    columns={name: read(name) for name in columns_of(job.loss)},
  )
  if (other := _mismatched(job, arm, rows)) is None:
    return rows
  mismatched = MismatchedRows(other, read("mismatched_sum"))
  return rows._replace(mismatched=mismatched)


def kept_sizes(z: JobSizes, arm: Arm) -> tuple[int, int, float]:
  """Rows that an arm keeps, its updates, and flops of a pass of an answer."""
  c, pool = z.job.c, z.rows["pool"]
  kept = budget_rows(arm.budget, pool, c.train.batch_size)
  each = decoder_flops(z.model, int(z.tokens["pool"]))
  return kept, updates_of(c, arm, kept, pool), each


def mismatched_rows(z: JobSizes, arm: Arm) -> int:
  """Answers under other prompts that a loss reads, one a row and update."""
  _, updates, _ = kept_sizes(z, arm)
  rows = updates * z.job.c.train.batch_size * z.responses
  return rows if needs_mismatched(z.job.loss) else 0


def ref_logps_price(z: JobSizes, arm: Arm) -> Price | None:
  """A pass of the kept rows that no other gave, and of mismatched ones."""
  c, loss = z.job.c, z.job.loss
  if c.train.reference == "online":  # its pass is align's
    return None
  kept, updates, each = kept_sizes(z, arm)
  source = columns.logps_stage(c, z.job.kind, chains.find_sampler(arm.sampler))
  own = kept * z.responses if loss.reference and source not in z.planned else 0
  other = mismatched_rows(z, arm)
  count = updates * c.train.batch_size * bool(other) + own
  return Price(count, "rows", (other + own) * each) if count else None
