"""The mixture stage: the fit, and what the card says of it."""

import jax
import numpy as np

from jaxalign import artifacts
from jaxalign import progress
from jaxalign.artifacts import Cost, pick
from jaxalign.job import Job
from jaxalign.select import card as cards
from jaxalign.select import mixture as mixtures
from jaxalign.select import store as stores


def run_mixture(job: Job) -> None:
  """Fits the mixture, and what the card needs to know of it."""
  c = job.c
  knobs = c.select.mixture.to_dict()
  seed = knobs.pop("seed")
  if str(knobs["pca"]).isdigit():  # a flag gives text, as the default is text
    knobs["pca"] = int(knobs["pca"])

  def make(folder):
    stored = stores.read(job.shared / "embed" / "store", "embedding")
    n, r = stored.shape[:2]
    x = np.ascontiguousarray(stored.reshape(n * r, -1))
    space = mixtures.prepare(job.mesh, x, pca=knobs["pca"],
                             covariance=knobs["covariance"],
                             components=knobs["components"])
    extra = list(range(seed + 1, seed + 1 + c.select.stability_seeds))
    with progress.bar("mixture", knobs["starts"] * (2 + len(extra)),
                      "starts") as tick:
      fitted = [mixtures.fit(job.mesh, x, seed=s, space=space, progress=tick,
                             **knobs) for s in [seed, *extra]]
      halves = cards.held_out(job.mesh, x, seed=seed, responses=r,
                              progress=tick, **knobs)
    values = np.stack([mixtures.log_likelihood(f, x).reshape(n, r)
                       for f in fitted])
    diagnostics = dict(held_out=halves)
    if r == 2:
      diagnostics["labels"] = cards.component_labels(
          fitted[0], x, np.tile([1, 0], n))
    else:
      label = np.array(job.column("pool", "label"))
      diagnostics["labels"] = cards.component_labels(fitted[0], x, label)
    if jax.process_index() == 0:
      mixtures.save(fitted[0], folder / "mixture.npz")
      artifacts.write_array(folder / "log_likelihood.npy", values)
      artifacts.write_json(folder / "diagnostics.json", diagnostics)
    width = fitted[0].means.shape[1]
    # All fits that ran, the one on half the rows too; a start is taken to need
    # as many sweeps as the one that was kept.
    sweeps = knobs["starts"] * (sum(len(f.trace) for f in fitted)
                                + len(fitted[0].trace) // 2)
    operations = (2 * n * r * stored.shape[2] ** 2  # the covariance
                  + sweeps * 4 * n * r * knobs["components"] * width ** 2)
    return (["mixture.npz", "log_likelihood.npy", "diagnostics.json"],
            Cost(operations), dict(warnings=fitted[0].warnings))

  card = job.run(job.shared / "mixture", "mixture", make=make,
                 fields=pick(c, "select.mixture", "select.stability_seeds"),
                 inputs=dict(embed=job.key("embed")))
  for warning in card.result["warnings"]:
    progress.say(f"  warning: {warning}")
