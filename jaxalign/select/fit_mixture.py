"""The mixture stage: the fit, and what the record needs to know of it.

From config.select.mixture.reservoir rows on, the mixture is fitted to so many
of them. The parameters vary as one over the square root of the rows they were
fitted to, so more would change nothing that a selection can see. The records
taken are those with the least hashes of their ids: the same ones in any order
of the input. Every row is scored.
"""

from typing import Any

import jax
import numpy as np

from jaxalign.core import disk, progress
from jaxalign.core.artifacts import Cost
from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.embed import embedder, store
from jaxalign.model.job import Job
from jaxalign.select import em, mixture, mixture_checks
from jaxalign.select.topk import id_hash


def options_of(c: Any) -> mixture.MixtureOptions:
  """`config.select.mixture`, of which a flag may have given text."""
  k = c.select.mixture
  components = mixture.components_of(k.components)
  closed = components == mixture.LABELS
  return mixture.MixtureOptions(
    components=components,
    covariance=k.covariance,
    pca=int(k.pca) if str(k.pca).isdigit() else k.pca,
    starts=1 if closed else k.starts,
  )


def refits(c: Any) -> int:
  """Fits beside the chosen one, which the record compares; a closed form is the
  same under every seed."""
  closed = mixture.components_of(c.select.mixture.components)
  return 0 if closed == mixture.LABELS else c.select.stability_seeds


def make_mixture(job: Job, arm: None, folder: Any) -> Made:
  """Fits the mixture, and what the selection report needs to know of it."""
  c = job.c
  options = options_of(c)
  embedding = store.read(job.shared / "embed" / "store", "embedding")
  n, r, width = embedding.shape
  flat = embedding.reshape(-1, width)  # the sides of a pair are rows
  records = _records(job, max(1, c.select.mixture.reservoir // r))
  x = flat if len(records) == n else _rows(embedding, records)
  labels = np.tile([1, 0], len(records))
  if r == 1:
    labels = np.array(job.column("pool", "label"))[records]
  given = labels if options.components == mixture.LABELS else None
  space = mixture.whiten(job.mesh, x, options)
  seeds = range(1 + refits(c))
  with progress.bar(
    "mixture", options.starts * (len(seeds) + 1), "starts"
  ) as tick:
    knobs = dict(labels=given, progress=tick)
    fitted = [
      mixture.fit_mixture(job.mesh, x, options, seed=s, space=space, **knobs)
      for s in seeds
    ]
    halves = mixture_checks.held_out(job.mesh, x, options, responses=r, **knobs)
  matches = mixture_checks.component_labels(fitted[0], x, labels)
  if jax.process_index() == 0:
    mixture.save_mixture(fitted[0], folder / "mixture.npz")
    scores = [mixture.log_likelihood(f, flat).reshape(n, r) for f in fitted]
    disk.write_array(folder / "log_likelihood.npy", np.stack(scores))
    disk.write_json(
      folder / "diagnostics.json", dict(held_out=halves, labels=matches)
    )
  return (
    ["mixture.npz", "log_likelihood.npy", "diagnostics.json"],
    Cost(_flops(len(x), width, fitted, options)),
    dict(warnings=fitted[0].warnings),
  )


def mixture_fields(job: Job, arm: None) -> dict[str, Any]:
  return pick(job.c, "select.mixture", "select.stability_seeds")


def _records(job: Job, most: int) -> np.ndarray:
  """The records to fit, ascending."""
  ids = job.column("pool", "id")
  if len(ids) <= most:
    return np.arange(len(ids))
  progress.say(f"  fitted to {most:,} of {len(ids):,} records, all are scored")
  hashes = id_hash(ids, "reservoir")
  return np.sort(np.argsort(hashes, kind="stable")[:most])


def _rows(embedding: np.ndarray, records: np.ndarray) -> np.ndarray:
  """The rows of these records [n, E] float32, mapped from a scratch file."""
  _, r, width = embedding.shape
  out = store.scratch((len(records), r, width))
  for at in range(0, len(records), 4096):
    out[at : at + 4096] = embedding[records[at : at + 4096]]
  return out.reshape(-1, width)


def _flops(
  n: int,
  width: int,
  fitted: list[mixture.Mixture],
  options: mixture.MixtureOptions,
) -> int:
  """Of all fits that ran, the one on half the rows too; a start is taken to
  need as many sweeps as the one that was kept."""
  sweeps = options.starts * (
    sum(len(f.trace) for f in fitted) + len(fitted[0].trace) // 2
  )
  components, directions = fitted[0].means.shape
  return 2 * n * width**2 + sweeps * em.em_flops(
    n, directions, components, options.covariance
  )


def likelihoods(job: Job) -> np.ndarray:
  """[F, N, R] nats of all rows under each fit, the chosen one first."""
  return disk.read_array(job.shared / "mixture" / "log_likelihood.npy")


def mixture_price(z: JobSizes, arm: None) -> Price:
  """A covariance of all rows, and twenty sweeps of every start of a fit."""
  c, answers = z.job.c, z.rows["pool"] * z.responses
  wide, pca = embedder.choose(c, z.model).model.width, c.select.mixture.pca
  k = mixture.components_of(c.select.mixture.components)
  closed = k == mixture.LABELS
  width = min(int(pca) or wide, wide) if pca != "auto" else 0
  width = width or max(1, min(64, answers // 40, wide))
  fits = (1 if closed else c.select.mixture.starts) * (2 + refits(c))
  sweep = 4 * answers * (2 if closed else k) * width**2
  return Price(fits, "fits", 2 * answers * wide**2 + fits * 20 * sweep)
