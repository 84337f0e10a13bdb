"""Passes of a model over the whole pool, kept in a store of shards.

What the reference says of a row comes of one pass: the stages of KEEPS that a
job asks for and has not finished run together, each into a store of its own,
and a stage that is asked for later runs alone. A pass stops after the layers
that its outputs need.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.core import artifacts, hub, progress
from jaxalign.core.artifacts import Cost, pick
from jaxalign.embed import embedder
from jaxalign.embed import passes as embed
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


class Stage(NamedTuple):
  """One stage of KEEPS, as a job has it."""

  name: str
  folder: Any
  columns: dict[str, ArraySpec]  # of its store
  fields: dict[str, Any]
  inputs: dict[str, str]
  foreign: embedder.Embedder | None  # what runs, where the reference does not

  @property
  def record(self) -> dict[str, Any]:
    """What `artifacts.run` and `begin` ask for."""
    return dict(
      folder=self.folder,
      stage=self.name,
      fields=self.fields,
      inputs=self.inputs,
      resumes=("store",),
      mends=True,
    )


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
  ids, responses = stores.encoded(job.column("pool", "id")), _responses(job)
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


def run_passes(job: Job, names: Sequence[str]) -> None:
  """Runs the stages `names` of KEEPS, those of the reference in one pass.

  The first that is not finished makes the others' files too. Its record has the
  seconds of the pass; the flops stand by what each stage adds.
  """
  asked = [_stage(job, name) for name in KEEPS if name in names]
  for at, stage in enumerate(asked):
    make = _foreign if stage.foreign else _by_reference
    later = [x for x in asked[at + 1 :] if not x.foreign]
    job.run(
      **stage.record,
      make=lambda folder, make=make, stage=stage, later=later: make(
        job, stage, later
      ),
    )


def _stage(job: Job, name: str) -> Stage:
  c, r = job.c, _responses(job)
  chosen = embedder.choose(c, job.model)
  foreign = None if by_reference(c, name) else chosen
  inputs = dict(data=job.key("data"))
  if foreign is None:
    inputs["sft"] = job.key("sft")
  else:
    inputs["model"] = artifacts.told(
      lambda: artifacts.key_of(
        "embedder",
        artifacts.digest_tree(
          hub.resolve(foreign.folder), embedder.digest_names(foreign)
        ),
        {},
      )
    )
  if name == "embed":
    fields = pick(c, "embed", "model")
  else:
    fields = pick(c, "embed.tile", "embed.shard", "embed.store_dtype", "model")
  if name == "answer":
    fields |= pick(c, "embed.checkpoint", "embed.layers")
    if foreign and isinstance(foreign.model, encoder.EncoderConfig):
      fields |= pick(c, "embed.pooling")
    foreign = foreign and embedder.of_answers(foreign)
  width = foreign.model.width if foreign else job.model.width
  return Stage(
    name,
    job.shared / name,
    {
      output: ArraySpec((r, width), c.embed.store_dtype)
      if embed.OUTPUTS[output][0]
      else ArraySpec((r,))
      for output in kept(c, name)
    },
    fields,
    inputs,
    foreign,
  )


def _by_reference(job: Job, stage: Stage, later: list[Stage]) -> tuple:
  """Makes a stage's store, and those of the `later` that are not finished."""
  c, m, rows = job.c, job.model, job.tokens("pool")
  # Stages that an unfinished pass has paid for, as `begin` below left them.
  before = artifacts.read_record(stage.folder, stage.name).result.get(
    "beside", []
  )
  taken = [stage]
  for other in later:
    if artifacts.begin(
      **other.record,
      redo=job.redo,
      result=dict(beside=[*before, *(x.name for x in taken)]),
    ):
      taken.append(other)
  outputs = sum((kept(c, x.name) for x in taken), ())
  layers, tile = c.embed.layers, c.embed.tile

  @functools.cache  # what is not needed is not loaded
  def loaded():
    if not layers or embed.headed(outputs):
      return m, job.reference, layers
    short = embedder.first_layers(m, layers)
    return short, embedder.first_weights(short, job.reference), 0

  def make(parts, tick):
    model, params, at = loaded()
    return embed.pass_rows(
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
      label=stage.name,
      ids=job.column("pool", "id"),
      tick=tick,
    )

  files = _fill(
    job,
    stage.name,
    [(x.folder, x.fields | x.inputs, x.columns) for x in taken],
    tile * job.mesh.size,
    make,
  )
  spent = shares(
    c,
    [*before, stage.name],
    lambda outputs: embed.pass_flops(m, rows, outputs, layers),
  )[stage.name]
  said = dict(say=f"{len(rows.start):,} rows")
  if before:
    said = dict(beside=before, say=f"in one pass with {', '.join(before)}")
  return files, Cost(spent, 0 if before else len(rows.ids)), said


def _foreign(job: Job, stage: Stage, later: list[Stage]) -> tuple:
  """Makes a stage's store by a model that only embeds."""
  del later
  run, flops, tokens = embedder.prepare(job, stage.foreign, stage.folder)
  ((name, column),) = stage.columns.items()
  files = over_shards(
    job,
    stage.folder,
    stage.name,
    stage.fields | stage.inputs,
    {name: column},
    job.c.embed.tile * job.mesh.size,
    lambda parts, tick: {name: run(parts, tick)},
  )
  return (
    files + embedder.files(stage.foreign),
    Cost(flops, tokens),
    dict(say=f"{len(job.tokens('pool').start):,} rows"),
  )


def _responses(job: Job) -> int:
  """R, of a record of the pool."""
  return len(job.tokens("pool").start) // len(job.column("pool", "id"))
