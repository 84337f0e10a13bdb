"""Passes of a model over the whole pool, kept in a store of shards.

What the reference gives of a row comes of one pass: the stages of KEEPS that a
job reads and has not finished run together, each into a store of its own, and
one that is read later runs alone. A pass stops after the layers that its
outputs need.
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
from jaxalign.embed.passes import PassOptions
from jaxalign.embed.store import ArraySpec
from jaxalign.model import encoder
from jaxalign.model.job import Job

CALLS = 32  # of the model at least, between two moments of writing
# What each stage keeps of a pass, in the order in which a pass is paid for.
# `logps` is for embeddings of first layers, which need no output matrix;
# `embed` keeps its columns where all layers run anyway.
KEEPS = {
  "embed": ("embedding", "logp", "count"),
  "logps": ("logp", "count"),
  "answer": ("answer_embedding",),
  "residual": ("residual", "least"),
}
Make = Callable[[PassOptions], dict[str, np.ndarray]]


def over_shards(
  job: Job, columns: dict[str, dict[str, ArraySpec]], make: Make
) -> list[str]:
  """Makes the shards that the stores of some stages lack, each shard once.

  A killed stage resumes at the next shard.

  Args:
    job: the run.
    columns: stage -> its store's columns; the first stage names the bar.
    make: options with a process's rows, the responses of a record side by side
      -> column -> this process's numbers [rows, ...]. All processes call it
      equally often.

  Returns:
    The files of the first stage.
  """
  c, ids, responses = job.c, job.column("pool", "id"), job.responses
  keys, label = stores.encoded(ids), next(iter(columns))
  found, lacking = {}, {}
  for stage, specs in columns.items():
    folder = job.shared / stage / "store"
    how = dict(fields=job.made_of(stage), shard=c.embed.shard)
    made = stores.create(folder, keys, specs, **how)
    found[stage], lacking[stage] = made, stores.pending(made, keys)
  missing, store = sorted(set().union(*lacking.values())), found[label]
  # Between two writings all devices run many calls, so that few are not full.
  count, call = jax.process_count(), c.embed.tile * job.mesh.size
  shard_rows = store.shard * responses * count
  group = count * max(1, -(-CALLS * call // shard_rows))
  total = responses * store.rows
  done = total - responses * sum(store.sizes(missing))
  options = PassOptions(c.embed.tile, c.model.head_chunk, label=label, ids=ids)
  with progress.bar(label, total, done=done) as tick:
    for at in range(0, len(missing), group):
      some = missing[at : at + group]
      dealt = [some[process::count] for process in range(count)]
      rows = [_token_rows(store, shards, responses) for shards in dealt]
      made = make(options._replace(by_process=rows, tick=tick))
      first = 0
      for shard in dealt[jax.process_index()]:
        last = first + store.sizes([shard])[0]
        for stage, specs in columns.items():
          if shard in lacking[stage]:
            arrays = {
              name: made[name].reshape(-1, *spec.shape)[first:last]
              for name, spec in specs.items()
            }
            stores.write_shard(found[stage], shard, keys, arrays)
        first = last
  return ["store"]


def _token_rows(
  store: stores.Store, shards: list[int], responses: int
) -> np.ndarray:
  """The numbers of the token rows of some shards."""
  records = [np.arange(*store.bounds(s)) for s in shards]
  records = np.concatenate([np.arange(0), *records])
  return (records[:, None] * responses + np.arange(responses)).reshape(-1)


def checkpoint_digest(folder: Any) -> str:
  """The key of a checkpoint: its settings, tokenizer and weights."""
  kinds = (".json", ".model", ".safetensors", ".jinja")

  def make():
    path = hub.resolve(folder)
    names = sorted(p.name for p in path.iterdir() if p.name.endswith(kinds))
    return artifacts.key_of("checkpoint", disk.digest_tree(path, names), {})

  return processes.from_first(make)


def by_reference(c: Any, name: str) -> bool:
  """Whether it is the reference that a stage of KEEPS runs."""
  return embedder.by_reference(c) or name in ("logps", "residual")


def outputs_of(c: Any, name: str) -> tuple[str, ...]:
  """The outputs that a stage of KEEPS keeps of a pass."""
  if name == "embed" and embedder.alone(c):
    return ("embedding",)
  return KEEPS[name]


def added_flops(
  c: Any, names: Sequence[str], flops_of: Callable[[tuple[str, ...]], int]
) -> dict[str, int]:
  """What each of the reference's stages adds to the pass that they share.

  Args:
    c: the config.
    names: stages; those that the reference does not run are left out.
    flops_of: outputs -> flops of a pass for them.

  Returns:
    Stage -> flops, in the order of KEEPS; their sum is the pass.
  """
  added, outputs = {}, ()
  for name in (n for n in KEEPS if n in names and by_reference(c, n)):
    outputs += outputs_of(c, name)
    added[name] = flops_of(outputs) - sum(added.values())
  return added


def _foreign(c: Any, model: Any, name: str) -> embedder.Embedder | None:
  """What runs in a stage of KEEPS where the reference does not."""
  if by_reference(c, name):
    return None
  chosen = embedder.choose(c, model)
  return embedder.of_answers(chosen) if name == "answer" else chosen


def _columns(job: Job, name: str) -> dict[str, ArraySpec]:
  """The columns of a stage's store."""
  foreign, r = _foreign(job.c, job.model, name), job.responses
  width = foreign.model.width if foreign else job.model.width
  wide = ArraySpec((r, width), job.c.embed.store_dtype)
  return {
    output: wide if passes.OUTPUTS[output][0] else ArraySpec((r,))
    for output in outputs_of(job.c, name)
  }


# The functions of a stage of KEEPS, its name first.


def pass_needs(name: str, job: Job, arm: None) -> list[str]:
  return ["data", "sft"] if by_reference(job.c, name) else ["data"]


def pass_fields(name: str, job: Job, arm: None) -> dict[str, Any]:
  c, foreign = job.c, _foreign(job.c, job.model, name)
  knobs = ("embed.tile", "embed.shard", "embed.store_dtype", "model")
  if name == "embed":
    knobs = ("embed", "model")
  elif name == "answer":
    knobs += ("embed.checkpoint", "embed.layers")
    if foreign and isinstance(foreign.model, encoder.EncoderConfig):
      knobs += ("embed.pooling",)
  digest = {}
  if foreign:
    digest = dict(embedder=checkpoint_digest(foreign.folder))
  return pick(c, *knobs) | digest


def make_pass(name: str, job: Job, arm: None, folder: Any) -> Made:
  """Makes a stage's store: those of the reference share one pass.

  The first that is not finished makes the others' files too. Its record has the
  seconds of the pass; the flops stand by what each stage adds.
  """
  if foreign := _foreign(job.c, job.model, name):
    return _by_foreign(job, name, folder, foreign)
  return _by_reference(job, name, folder)


def _by_reference(job: Job, name: str, folder: Any) -> Made:
  """Makes a stage's store, and those of later ones that are not finished."""
  c, m, rows = job.c, job.model, job.tokens("pool")
  # Stages that an unfinished pass has paid for, as `begin` below left them.
  record = artifacts.read_record(folder, name)
  before = record.result.get("one_pass_with", [])
  taken = [name]
  for other in [*KEEPS][[*KEEPS].index(name) + 1 :]:
    if other in job.planned and by_reference(c, other):
      if job.begin(other, dict(one_pass_with=[*before, *taken])):
        taken.append(other)
  outputs = sum((outputs_of(c, x) for x in taken), ())

  @functools.cache  # what is not needed is not loaded
  def loaded():
    if not c.embed.layers or passes.headed(outputs):
      return m, job.reference, c.embed.layers
    short = embedder.first_layers(m, c.embed.layers)
    return short, embedder.first_weights(short, job.reference), 0

  def make(options):
    model, params, layers = loaded()
    options = options._replace(pooling=c.embed.pooling, layers=layers)
    return passes.pass_rows(job.mesh, params, model, rows, outputs, options)

  files = over_shards(job, {x: _columns(job, x) for x in taken}, make)
  flops_of = lambda outputs: passes.pass_flops(m, rows, outputs, c.embed.layers)
  flops = added_flops(c, [*before, name], flops_of)[name]
  if before:
    say = f"in one pass with {', '.join(before)}"
    return files, Cost(flops), dict(one_pass_with=before, say=say)
  return files, Cost(flops, len(rows.ids)), _say(job)


def _by_foreign(
  job: Job, name: str, folder: Any, foreign: embedder.Embedder
) -> Made:
  """Makes a stage's store by a model that only embeds."""
  run, flops, tokens = embedder.prepare(job, foreign, folder)
  columns = _columns(job, name)
  (output,) = columns
  files = over_shards(job, {name: columns}, lambda how: {output: run(how)})
  if isinstance(foreign.model, encoder.EncoderConfig):
    return files, Cost(flops, tokens), _say(job)
  return files + embedder.TOKENS, Cost(flops, tokens), _say(job)


def _say(job: Job) -> dict[str, str]:
  return dict(say=f"{len(job.tokens('pool').start):,} rows")


def pass_price(name: str, z: JobSizes, arm: None) -> Price:
  """What the stage adds to the pass that it shares."""
  c, t = z.job.c, int(z.tokens["pool"])
  if foreign := _foreign(c, z.model, name):
    each = embedder.flops(foreign, t // 2 + 1 if foreign.answers else t)
  else:
    of = lambda outputs: passes.row_flops(z.model, t, outputs, c.embed.layers)
    each = added_flops(c, z.planned, of)[name]
  return rows_price(z, each)


def rows_price(z: JobSizes, flops: float) -> Price:
  """The price of a pass over all responses, of so many flops each."""
  answers = z.rows["pool"] * z.responses
  return Price(answers, "rows", answers * flops)
