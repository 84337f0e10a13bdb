"""The mixture stage: the fit, and what the record says of it.

From config.select.mixture.reservoir rows on, the mixture is fitted to so many
of them and the scores of all are a store, made in one pass over tiles.
"""

import os
import tempfile
from typing import Any

import jax
import numpy as np

from jaxalign import artifacts, progress
from jaxalign.artifacts import Cost, pick
from jaxalign.job import Job
from jaxalign.select import card as reports
from jaxalign.select import em, reservoir
from jaxalign.select import mixture as mixtures
from jaxalign.select import store as stores


def refits(c: Any) -> int:
  """Fits beside the chosen one, which the record compares; a closed form is the
  same under every seed."""
  closed = mixtures.components_of(c.select.mixture.components)
  return 0 if closed == mixtures.LABELS else c.select.stability_seeds


def run_mixture(job: Job) -> None:
  """Fits the mixture, and what the record needs to know of it."""
  c = job.c
  knobs = c.select.mixture.to_dict()
  limit = knobs.pop("reservoir")
  fields = pick(c, "select.mixture", "select.stability_seeds")
  inputs = dict(embed=job.key("embed"))
  if str(knobs["pca"]).isdigit():  # a flag gives text, as the default is text
    knobs["pca"] = int(knobs["pca"])
  knobs["components"] = mixtures.components_of(knobs["components"])
  closed = knobs["components"] == mixtures.LABELS
  if closed:
    knobs["starts"] = 1

  def make(folder):
    store = stores.open_store(job.shared / "embed" / "store")
    with tempfile.TemporaryDirectory() as scratch:
      return fitted_to(folder, store, *_rows(store, limit, scratch))

  def fitted_to(folder, store, rows, x):
    r, (n, width) = store.columns["embedding"].shape[0], x.shape
    if r == 2:
      labels = np.tile([1, 0], n // 2)
    else:
      labels = np.array(job.column("pool", "label"))
      labels = labels if rows is None else labels[rows]
    if closed:
      knobs["labels"] = labels
    space = mixtures.prepare(
      job.mesh, x, pca=knobs["pca"], covariance=knobs["covariance"]
    )
    extra = list(range(1, 1 + refits(c)))
    with progress.bar(
      "mixture", knobs["starts"] * (2 + len(extra)), "starts"
    ) as tick:
      fitted = [
        mixtures.fit(job.mesh, x, seed=s, space=space, progress=tick, **knobs)
        for s in [0, *extra]
      ]
      halves = reports.held_out(
        job.mesh, x, seed=0, responses=r, progress=tick, **knobs
      )
    if rows is not None:
      reservoir.score(
        job.mesh, fitted, store, folder / "scores", fields=fields | inputs
      )
    diagnostics = dict(held_out=halves)
    diagnostics["labels"] = reports.component_labels(fitted[0], x, labels)
    if jax.process_index() == 0:
      mixtures.save(fitted[0], folder / "mixture.npz")
      if rows is None:
        artifacts.write_array(
          folder / "log_likelihood.npy",
          np.stack(
            [mixtures.log_likelihood(f, x).reshape(-1, r) for f in fitted]
          ),
        )
      artifacts.write_json(folder / "diagnostics.json", diagnostics)
    kept = fitted[0].means.shape[1]
    # All fits that ran, the one on half the rows too; a start is taken to need
    # as many sweeps as the one that was kept.
    sweeps = knobs["starts"] * (
      sum(len(f.trace) for f in fitted) + len(fitted[0].trace) // 2
    )
    flops = (
      2 * n * width** 2  # the covariance
      + sweeps * em.flops(n, kept, len(fitted[0].means), knobs["covariance"])
    )
    scores = "log_likelihood.npy" if rows is None else "scores"
    return (
      ["mixture.npz", scores, "diagnostics.json"],
      Cost(flops),
      dict(warnings=fitted[0].warnings),
    )

  record = job.run(
    job.shared / "mixture",
    "mixture",
    make=make,
    fields=fields,
    inputs=inputs,
    resumes=("scores",),
    mends=True,
  )
  for warning in record.result["warnings"]:
    progress.say(f"  warning: {warning}")


def _rows(
  store: stores.Store, limit: int, scratch: Any
) -> tuple[np.ndarray | None, np.ndarray]:
  """The records to fit (None: all), and their rows [n, E] side by side."""
  responses, width = store.columns["embedding"].shape
  if store.rows * responses <= limit:
    stored = stores.read(store, "embedding")
    return None, np.ascontiguousarray(stored.reshape(-1, width))
  records = max(1, limit // responses)
  progress.say(
    f"  fitted to {records * responses:,} of "
    f"{store.rows * responses:,} rows, all are scored"
  )
  rows = reservoir.choose(store, records)
  return rows, reservoir.gather(store, rows, os.path.join(scratch, "x.npy"))


def likelihoods(job: Job) -> np.ndarray:
  """[F, N, R] nats of all rows under each fit, the chosen one first."""
  folder = job.shared / "mixture"
  if (folder / "log_likelihood.npy").exists():
    return artifacts.read_array(folder / "log_likelihood.npy")
  return stores.read(folder / "scores", "log_likelihood").swapaxes(0, 1)
