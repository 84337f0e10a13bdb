"""Passes of a model over the whole pool."""

import jax

from jaxalign import artifacts
from jaxalign import embedder
from jaxalign import hub
from jaxalign.artifacts import Cost, pick
from jaxalign.job import Job
from jaxalign.select import embed


def run_embed(job: Job) -> None:
  """Embeds every pool row; by the reference, its log-probs come with it."""
  c, m = job.c, job.model
  chosen = embedder.choose(c, m)
  inputs = dict(data=job.key("data"), sft=job.key("sft"))
  if chosen.folder:
    inputs = dict(data=job.key("data"), model=artifacts.told(
        lambda: artifacts.key_of("embedder", artifacts.digest_tree(
            hub.resolve(chosen.folder), embedder.digest_names(chosen)), {})))

  def make_alone(folder):
    x, operations, tokens = embedder.run(job, chosen, folder)
    if jax.process_index() == 0:
      artifacts.write_array(folder / "embedding.npy", x.reshape(
          len(job.column("pool", "id")), -1, x.shape[1]))
    return (["embedding.npy", *embedder.files(chosen)],
            Cost(operations, tokens), dict(say=f"{len(x):,} rows"))

  def make(folder):
    rows = job.tokens("pool")
    ids = job.column("pool", "id")
    n = len(ids)
    scores = embed.score_rows(
        job.mesh, job.reference, m, rows, pooling=c.embed.pooling,
        tile=c.embed.tile, chunk=c.model.head_chunk, ids=ids)
    if jax.process_index() == 0:
      artifacts.write_array(folder / "embedding.npy",
                            scores.embedding.reshape(n, -1, m.width))
      artifacts.write_array(folder / "logp.npy", scores.logp.reshape(n, -1))
      artifacts.write_array(folder / "count.npy", scores.count.reshape(n, -1))
    return (["embedding.npy", "logp.npy", "count.npy"],
            Cost(embed.operations(m, rows), len(rows.ids)),
            dict(say=f"{len(rows.start):,} rows"))

  job.run(job.shared / "embed", "embed", inputs=inputs,
          make=make_alone if chosen.alone else make,
          fields=pick(c, "embed", "model"))


def run_residual(job: Job) -> None:
  """What the pool's responses say beyond what the reference expected."""
  c, m = job.c, job.model

  def make(folder):
    rows, ids = job.tokens("pool"), job.column("pool", "id")
    found = embed.residual_rows(job.mesh, job.reference, m, rows,
                                tile=c.embed.tile, chunk=c.model.head_chunk,
                                ids=ids)
    for name, x in found.items():
      if jax.process_index() == 0:
        artifacts.write_array(folder / f"{name}.npy",
                              x.reshape(len(ids), -1, *x.shape[1:]))
    return ([f"{name}.npy" for name in found],
            Cost(embed.operations(m, rows)  # the head again, and its slope
                 + 4 * m.vocab * m.width * len(rows.ids), len(rows.ids)), {})

  job.run(job.shared / "residual", "residual", make=make,
          fields=pick(c, "embed.tile", "model"),
          inputs=dict(data=job.key("data"), sft=job.key("sft")))
