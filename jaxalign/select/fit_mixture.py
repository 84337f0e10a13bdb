"""The mixture stage: the fit, and its diagnostics for the selection report.

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


def _closed(c: Any) -> bool:
  """Whether the fit has a closed form: the same under every seed."""
  k = mixture.components_of(c.select.mixture.components)
  return k == mixture.LABELS


def _starts(c: Any) -> int:
  return 1 if _closed(c) else c.select.mixture.starts


def refits(c: Any) -> int:
  """Fits that the record compares with the chosen one."""
  return 0 if _closed(c) else c.select.stability_seeds


def mixture_fields(job: Job, arm: None) -> dict[str, Any]:
  return pick(job.c, "select.mixture", "select.stability_seeds")


def make_mixture(job: Job, arm: None, folder: Any) -> Made:
  """Fits the mixture, scores all rows, and checks the fit."""
  c, k = job.c, job.c.select.mixture
  components = mixture.components_of(k.components)
  pca = int(k.pca) if str(k.pca).isdigit() else k.pca  # a flag gives text
  how = dict(covariance=k.covariance, pca=pca, starts=_starts(c))
  options = mixture.MixtureOptions(components, **how)
  embedding = store.read(job.shared / "embed" / "store", "embedding")
  n, r, width = embedding.shape
  flat = embedding.reshape(-1, width)  # the sides of a pair are rows
  records = _records(job, max(1, k.reservoir // r))
  x = flat if len(records) == n else _rows(embedding, records)
  labels = np.tile([1, 0], len(records))
  if r == 1:
    labels = np.array(job.column("pool", "label"))[records]
  given = labels if _closed(c) else None
  space, seeds = mixture.whiten(job.mesh, x, options), range(1 + refits(c))
  total = options.starts * (len(seeds) + 1)
  with progress.bar("mixture", total, "starts") as tick:
    how = dict(labels=given, progress=tick)
    fitted = [
      mixture.fit_mixture(job.mesh, x, options, seed=s, space=space, **how)
      for s in seeds
    ]
    halves = mixture_checks.held_out(job.mesh, x, options, responses=r, **how)
  matches = mixture_checks.component_labels(fitted[0], x, labels)
  files = ["mixture.npz", "log_likelihood.npy", "diagnostics.json"]
  if jax.process_index() == 0:
    mixture.save_mixture(fitted[0], folder / files[0])
    scores = [mixture.log_likelihood(f, flat).reshape(n, r) for f in fitted]
    disk.write_array(folder / files[1], np.stack(scores))
    disk.write_json(folder / files[2], dict(held_out=halves, labels=matches))
  # With the fit to half of the rows; a start is taken to need as many sweeps
  # as the one that was kept.
  sweeps = sum(len(f.trace) for f in fitted) + len(fitted[0].trace) // 2
  count, directions = fitted[0].means.shape
  sweep = em.em_flops(len(x), directions, count, options.covariance)
  flops = 2 * len(x) * width**2 + options.starts * sweeps * sweep
  return files, Cost(flops), dict(warnings=fitted[0].warnings)


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


def likelihoods(job: Job) -> np.ndarray:
  """[F, N, R] nats of all rows under each fit, the chosen one first."""
  return disk.read_array(job.shared / "mixture" / "log_likelihood.npy")


def mixture_price(z: JobSizes, arm: None) -> Price:
  """A covariance of all rows, and twenty sweeps of every start of a fit."""
  c, answers = z.job.c, z.rows["pool"] * z.responses
  wide, pca = embedder.choose(c, z.model).model.width, c.select.mixture.pca
  k = 2 if _closed(c) else mixture.components_of(c.select.mixture.components)
  width = min(int(pca) or wide, wide) if pca != "auto" else 0
  width = width or max(1, min(64, answers // 40, wide))
  fits = _starts(c) * (2 + refits(c))
  sweep = 4 * answers * k * width**2
  return Price(fits, "fits", 2 * answers * wide**2 + fits * 20 * sweep)
