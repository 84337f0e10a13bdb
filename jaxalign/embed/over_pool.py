"""Passes of a model over the whole pool, kept in a store of shards.

What the reference says of a row comes of one pass: the stages of KEEPS that a
job asks for and has not finished run together, each into a store of its own,
and a stage that is asked for later runs alone. A pass stops after the layers
that its outputs need.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import numpy as np

from jaxalign.core import artifacts, disk, hub, processes, progress
from jaxalign.core.artifacts import Cost
from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.embed import embedder, passes
from jaxalign.embed import store as stores
from jaxalign.embed.store import ArraySpec
from jaxalign.model import encoder
from jaxalign.model.job import Job

CALLS = 32  # of the model at least, between two moments of writing
# What each stage keeps of a pass, in the order in which a pass is paid for.
# `logps` is for embeddings of first layers, which need no output matrix;
# `embed` keeps what it says where all layers run anyway.
KEEPS = {
  "embed": ("embedding", "logp", "count"),
  "logps": ("logp", "count"),
  "answer": ("answer_embedding",),
  "residual": ("residual", "least"),
}


def by_reference(c: Any, stage: str) -> bool:
  """Whether it is the reference that a stage of KEEPS runs."""
  return embedder.by_reference(c) or stage in ("logps", "residual")


def kept(c: Any, stage: str) -> tuple[str, ...]:
  """The outputs that a stage of KEEPS keeps of a pass."""
  if stage == "embed" and embedder.alone(c):
    return ("embedding",)
  return KEEPS[stage]


def shares(
  c: Any, names: Sequence[str], of: Callable[[tuple[str, ...]], Any]
) -> dict[str, Any]:
  """What each of the reference's stages adds to the pass they share.

  Args:
    c: the config.
    names: stages; those that the reference does not run are left out.
    of: outputs -> flops of a pass for them.

  Returns:
    Stage -> flops, in the order of KEEPS; their sum is the pass.
  """
  found, outputs, spent = {}, (), 0
  for name in (n for n in KEEPS if n in names and by_reference(c, n)):
    outputs += kept(c, name)
    total = of(outputs)
    found[name], spent = total - spent, total
  return found


def over_shards(
  job: Job,
  folder: Any,
  stage: str,
  fields: dict[str, Any],
  columns: dict[str, ArraySpec],
  rows_a_call: int,
  make: Callable[[list[np.ndarray], Callable], dict],
) -> list:
  """Makes the shards of a store that are not there yet.

  Args:
    job: the run.
    folder: of the stage; the store is its folder `store`.
    stage: its name, on the progress bar.
    fields: what makes the numbers.
    columns: of the store, a row for each record.
    rows_a_call: rows of the model that all devices take at once.
    make: `make(parts, tick)`, with the token rows for each process, the
      responses of a record side by side -> column -> this process's numbers
      [rows, ...]. All processes call it equally often.

  Returns:
    The stage's files.
  """
  return _fill(job, stage, [(folder, fields, columns)], rows_a_call, make)


def _fill(
  job: Job,
  label: str,
  wanted: list[tuple[Any, dict, dict]],
  rows_a_call: int,
  make: Callable,
) -> list:
  """`over_shards` of several stores, (folder, fields, columns) each.

  A shard that any of them lacks is made once, and written where it is missing.
  """
  ids, responses = stores.encoded(job.column("pool", "id")), job.responses
  found = [
    stores.create(
      folder / "store", ids, columns, fields=fields, shard=job.c.embed.shard
    )
    for folder, fields, columns in wanted
  ]
  lacking = [stores.pending(store, ids) for store in found]
  missing, store = sorted({*sum(lacking, [])}), found[0]
  # Between two writings all devices run many calls, so that few are not full.
  group = jax.process_count() * max(
    1,
    -(-CALLS * rows_a_call // (store.shard * responses * jax.process_count())),
  )
  total = responses * store.rows
  done = total - responses * sum(store.sizes(missing))
  with progress.bar(label, total, done=done) as tick:
    for at in range(0, len(missing), group):
      dealt = stores.owned(missing[at : at + group])
      made = make([_token_rows(store, mine, responses) for mine in dealt], tick)
      start, mine = 0, dealt[jax.process_index()]
      for shard, size in zip(mine, store.sizes(mine)):
        part = slice(start, start + size)
        for one, lacks, (_, _, columns) in zip(found, lacking, wanted):
          if shard in lacks:
            arrays = {
              name: made[name].reshape(-1, *column.shape)[part]
              for name, column in columns.items()
            }
            stores.write_shard(one, shard, ids, arrays)
        start += size
  return ["store"]


def _token_rows(
  store: stores.Store, shards: list[int], responses: int
) -> np.ndarray:
  """The numbers of the token rows of some shards."""
  records = [np.arange(*store.bounds(s)) for s in shards]
  records = np.concatenate([np.arange(0), *records])
  return (records[:, None] * responses + np.arange(responses)).reshape(-1)


def foreign_of(job: Job, name: str) -> embedder.Embedder | None:
  """What runs in a stage of KEEPS where the reference does not."""
  if by_reference(job.c, name):
    return None
  chosen = embedder.choose(job.c, job.model)
  return embedder.of_answers(chosen) if name == "answer" else chosen


def arrays_of(job: Job, name: str) -> dict[str, ArraySpec]:
  """The columns of a stage's store."""
  foreign, r = foreign_of(job, name), job.responses
  width = foreign.model.width if foreign else job.model.width
  wide = ArraySpec((r, width), job.c.embed.store_dtype)
  return {
    output: wide if passes.OUTPUTS[output][0] else ArraySpec((r,))
    for output in kept(job.c, name)
  }


def pass_needs(name: str) -> Callable[[Job, None], list[str]]:
  """The `needs` of a stage of KEEPS."""
  return lambda job, arm: (
    ["data", "sft"] if by_reference(job.c, name) else ["data"]
  )


def pass_fields(name: str) -> Callable[[Job, None], dict[str, Any]]:
  """The `fields` of a stage of KEEPS."""

  def fields(job: Job, arm: None) -> dict[str, Any]:
    c, foreign = job.c, foreign_of(job, name)
    store = ("embed.tile", "embed.shard", "embed.store_dtype")
    knobs = ("embed",) if name == "embed" else store
    if name == "answer":
      knobs += ("embed.checkpoint", "embed.layers")
      if foreign and isinstance(foreign.model, encoder.EncoderConfig):
        knobs += ("embed.pooling",)
    found = pick(c, *knobs, "model")
    return found | (dict(embedder=_digest(foreign)) if foreign else {})

  return fields


def _digest(foreign: embedder.Embedder) -> str:
  def make():
    names = embedder.digest_names(foreign)
    digests = disk.digest_tree(hub.resolve(foreign.folder), names)
    return artifacts.key_of("embedder", digests, {})

  return processes.from_first(make)


def make_pass(name: str) -> Callable[[Job, None, Any], Made]:
  """The `make` of a stage of KEEPS: those of the reference share one pass.

  The first that is not finished makes the others' files too. Its record has the
  seconds of the pass; the flops stand by what each stage adds.
  """

  def make(job: Job, arm: None, folder: Any) -> Made:
    if foreign := foreign_of(job, name):
      return _by_foreign(job, name, folder, foreign)
    return _by_reference(job, name, folder)

  return make


def _by_reference(job: Job, name: str, folder: Any) -> Made:
  """Makes a stage's store, and those of later ones that are not finished."""
  c, m, rows = job.c, job.model, job.tokens("pool")
  # Stages that an unfinished pass has paid for, as `begin` below left them.
  record = artifacts.read_record(folder, name)
  before = record.result.get("one_pass_with", [])
  taken, later = [name], [*KEEPS][[*KEEPS].index(name) + 1 :]
  for other in later:
    if other not in job.planned or not by_reference(c, other):
      continue
    if job.begin(other, dict(one_pass_with=[*before, *taken])):
      taken.append(other)
  outputs = sum((kept(c, x) for x in taken), ())
  layers, tile = c.embed.layers, c.embed.tile

  @functools.cache  # what is not needed is not loaded
  def loaded():
    if not layers or passes.headed(outputs):
      return m, job.reference, layers
    short = embedder.first_layers(m, layers)
    return short, embedder.first_weights(short, job.reference), 0

  def make(parts, tick):
    model, params, at = loaded()
    return passes.pass_rows(
      job.mesh,
      params,
      model,
      rows,
      outputs,
      pooling=c.embed.pooling,
      layers=at,
      tile=tile,
      chunk=c.model.head_chunk,
      parts=parts,
      label=name,
      ids=job.column("pool", "id"),
      tick=tick,
    )

  stores_of = [
    (job.shared / x, job.made_of(x), arrays_of(job, x)) for x in taken
  ]
  files = _fill(job, name, stores_of, tile * job.mesh.size, make)
  flops_of = lambda outputs: passes.pass_flops(m, rows, outputs, layers)
  flops = shares(c, [*before, name], flops_of)[name]
  result = dict(say=f"{len(rows.start):,} rows")
  if before:
    say = f"in one pass with {', '.join(before)}"
    result = dict(one_pass_with=before, say=say)
  return files, Cost(flops, 0 if before else len(rows.ids)), result


def _by_foreign(
  job: Job, name: str, folder: Any, foreign: embedder.Embedder
) -> Made:
  """Makes a stage's store by a model that only embeds."""
  run, flops, tokens = embedder.prepare(job, foreign, folder)
  ((output, column),) = arrays_of(job, name).items()
  files = over_shards(
    job,
    folder,
    name,
    job.made_of(name),
    {output: column},
    job.c.embed.tile * job.mesh.size,
    lambda parts, tick: {output: run(parts, tick)},
  )
  result = dict(say=f"{len(job.tokens('pool').start):,} rows")
  return files + embedder.files(foreign), Cost(flops, tokens), result


def pass_price(name: str) -> Callable[[JobSizes, None], Price]:
  """The price of a stage of KEEPS: what it adds to the pass it shares."""

  def price(z: JobSizes, arm: None) -> Price:
    c, t = z.job.c, int(z.tokens["pool"])
    answers = z.rows["pool"] * z.responses
    if by_reference(c, name):
      of = lambda outputs: passes.row_flops(z.model, t, outputs, c.embed.layers)
      each = shares(c, z.planned, of)[name]
    else:
      chosen = embedder.choose(c, z.model)
      texts = embedder.of_answers(chosen) if name == "answer" else chosen
      each = embedder.flops(chosen, t // 2 + 1 if texts.answers else t)
    return Price(answers, "rows", answers * each)

  return price
