"""How far a mixture can be trusted: on unseen rows, and of the labels."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import normalized_mutual_info_score, roc_auc_score

from jaxalign.select import mixture as mixtures


def held_out(
  mesh: jax.sharding.Mesh,
  x: np.ndarray,
  options: mixtures.MixtureOptions,
  *,
  seed: int = 0,
  responses: int = 1,
  labels: np.ndarray | None = None,
  progress: Callable[..., None] | None = None,
) -> dict[str, float]:
  """Fits on a random half of the records and compares the two halves.

  An AUC of 0.5 says that a fitted row looks like any other; towards 1 the
  mixture has memorised its rows and its likelihood says little about them.

  Args:
    mesh: as for `mixture.fit`.
    x: [n, E] rows, the `responses` of one record next to each other.
    options: of `mixture.fit`, as `labels` and `progress` are.
    seed: of the halves and of the fit.
    responses: R; all rows of a record go to the same half.
  """
  records = len(x) // responses
  rng = np.random.Generator(np.random.Philox(key=seed % 2**64))
  inside = np.zeros(records, bool)
  inside[rng.permutation(records)[: records // 2]] = True
  inside = np.repeat(inside, responses)
  labels = labels if labels is None else labels[inside]
  fitted = mixtures.fit(
    mesh, x[inside], options, seed=seed, labels=labels, progress=progress
  )
  seen = mixtures.log_likelihood(fitted, x[inside])
  unseen = mixtures.log_likelihood(fitted, x[~inside])
  half = np.repeat([1, 0], [len(seen), len(unseen)])
  return {
    "auc": float(roc_auc_score(half, np.concatenate([seen, unseen]))),
    "mean_fitted": float(seen.mean()),
    "mean_held_out": float(unseen.mean()),
  }


def component_labels(
  mixture: mixtures.Mixture, x: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
  """What the components say about labels, such as chosen and rejected.

  Args:
    mixture: of `mixture.fit`.
    x: [n, E] rows.
    labels: [n] any labels.

  Returns:
    `accuracy` of the best one-to-one match of components with labels (a
    component or label left over is wrong), `majority`, the fraction of the
    commonest label, which needs no mixture; and `nmi`, the normalised mutual
    information.
  """
  component = mixtures.assign(mixture, x)
  _, label = np.unique(labels, return_inverse=True)
  table = np.zeros((len(mixture.log_weights), label.max() + 1), np.int64)
  np.add.at(table, (component, label), 1)
  matched = table[linear_sum_assignment(-table)].sum()
  return {
    "accuracy": float(matched / len(label)),
    "majority": float(table.sum(0).max() / len(label)),
    "nmi": float(normalized_mutual_info_score(component, label)),
  }


def mixture_summary(mixture: mixtures.Mixture) -> dict[str, Any]:
  """The fit in numbers: bounds of all starts, the trace of the one kept."""
  return {
    "components": len(mixture.log_weights),
    "directions": len(mixture.variances),
    "variance_explained": float(mixture.explained),
    "weights": [float(w) for w in np.exp(mixture.log_weights)],
    "trace": [float(b) for b in mixture.trace],
    "bounds": [float(b) if np.isfinite(b) else None for b in mixture.bounds],
    "warnings": list(mixture.warnings),
  }
