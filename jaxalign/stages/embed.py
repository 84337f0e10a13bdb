"""Passes of a model over the whole pool, kept in a store of shards."""

from typing import Any, Callable

import jax
import numpy as np

from jaxalign import artifacts
from jaxalign import embedder
from jaxalign import hub
from jaxalign import progress
from jaxalign.artifacts import Cost, pick
from jaxalign.job import Job
from jaxalign.select import embed
from jaxalign.select import store as stores
from jaxalign.select.store import Column

CALLS = 32  # of the model at least, between two moments of writing


def over_shards(job: Job, folder: Any, stage: str, fields: dict[str, Any],
                columns: dict[str, Column], rows_a_call: int,
                make: Callable[[list[np.ndarray], Callable], dict]) -> list:
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
  ids, responses = stores.encoded(job.column("pool", "id")), _responses(job)
  store = stores.create(folder / "store", ids, columns, fields=fields,
                        shard=job.c.embed.shard)
  missing = stores.pending(store, ids)
  # Between two writings all devices run many calls, so that few are not full.
  group = jax.process_count() * max(1, -(
      -CALLS * rows_a_call
      // (store.shard * responses * jax.process_count())))
  total = responses * store.rows
  done = total - responses * sum(
      int(np.diff(store.bounds(s))[0]) for s in missing)
  with progress.bar(stage, total, done=done) as tick:
    for at in range(0, len(missing), group):
      dealt = stores.owned(missing[at:at + group])
      parts = [np.concatenate([np.arange(0)] + [
          np.arange(*store.bounds(s)) for s in mine]) for mine in dealt]
      found = make([(part[:, None] * responses + np.arange(responses))
                    .reshape(-1) for part in parts], tick)
      start = 0
      for shard in dealt[jax.process_index()]:
        stop = start + int(np.diff(store.bounds(shard))[0])
        stores.write_shard(store, shard, ids, {
            name: found[name].reshape(-1, *column.shape)[start:stop]
            for name, column in columns.items()})
        start = stop
  return ["store"]


def run_embed(job: Job) -> None:
  """Embeds every pool row; by the reference, its log-probs come with it."""
  c, m = job.c, job.model
  chosen = embedder.choose(c, m)
  inputs = dict(data=job.key("data"))
  if not chosen.folder:
    inputs["sft"] = job.key("sft")
  else:
    inputs["model"] = artifacts.told(
        lambda: artifacts.key_of("embedder", artifacts.digest_tree(
            hub.resolve(chosen.folder), embedder.digest_names(chosen)), {}))

  fields = pick(c, "embed", "model")

  def make_alone(folder):
    run, operations, tokens = embedder.prepare(job, chosen, folder)
    files = over_shards(
        job, folder, "embed", fields | inputs, dict(embedding=Column(
            (_responses(job), chosen.model.width), c.embed.store_dtype)),
        c.embed.tile * job.mesh.size,
        lambda parts, tick: dict(embedding=run(parts, tick)))
    return (files + embedder.files(chosen), Cost(operations, tokens),
            dict(say=f"{len(job.tokens('pool').start):,} rows"))

  def make(folder):
    rows, r = job.tokens("pool"), _responses(job)
    files = over_shards(
        job, folder, "embed", fields | inputs, dict(
            embedding=Column((r, m.width), c.embed.store_dtype),
            logp=Column((r,)), count=Column((r,))),
        c.embed.tile * job.mesh.size,
        lambda parts, tick: embed.score_rows(
            job.mesh, job.reference, m, rows, pooling=c.embed.pooling,
            tile=c.embed.tile, chunk=c.model.head_chunk, parts=parts,
            ids=job.column("pool", "id"), tick=tick)._asdict())
    return (files, Cost(embed.operations(m, rows), len(rows.ids)),
            dict(say=f"{len(rows.start):,} rows"))

  job.run(job.shared / "embed", "embed", inputs=inputs,
          make=make_alone if chosen.alone else make, fields=fields,
          resumes=("store",), mends=True)


def _responses(job: Job) -> int:
  """R, of a record of the pool."""
  return len(job.tokens("pool").start) // len(job.column("pool", "id"))


def run_residual(job: Job) -> None:
  """What the pool's responses say beyond what the reference expected."""
  c, m = job.c, job.model
  fields = pick(c, "embed.tile", "embed.shard", "embed.store_dtype", "model")
  inputs = dict(data=job.key("data"), sft=job.key("sft"))

  def make(folder):
    rows, r = job.tokens("pool"), _responses(job)
    files = over_shards(
        job, folder, "residual", fields | inputs, dict(
            residual=Column((r, m.width), c.embed.store_dtype),
            least=Column((r,))),
        c.embed.tile * job.mesh.size,
        lambda parts, tick: embed.residual_rows(
            job.mesh, job.reference, m, rows, tile=c.embed.tile,
            chunk=c.model.head_chunk, parts=parts, tick=tick,
            ids=job.column("pool", "id")))
    return (files, Cost(embed.operations(m, rows)  # the head again, its slope
                        + 4 * m.vocab * m.width * len(rows.ids),
                        len(rows.ids)), {})

  job.run(job.shared / "residual", "residual", make=make, fields=fields,
          inputs=inputs, resumes=("store",), mends=True)
