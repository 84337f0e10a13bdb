"""How far a mixture can be trusted: on unseen rows, and of the labels."""

from typing import Any

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import normalized_mutual_info_score, roc_auc_score

from jaxalign.select.mixture import (
  assign,
  fit_mixture,
  log_likelihood,
  Mixture,
  MixtureOptions,
)


def held_out(
  mesh: jax.sharding.Mesh,
  x: np.ndarray,
  options: MixtureOptions,
  *,
  responses: int = 1,
  labels: np.ndarray | None = None,
  **kwargs: Any,
) -> dict[str, float]:
  """Fits on a random half of the records and compares the two halves.

  An AUC of 0.5 means that a fitted row looks like any other; towards 1 the
  mixture has memorised its rows and its likelihood tells little about them.

  Args:
    mesh, options, labels, **kwargs: of `fit_mixture`.
    x: [n, E] rows, the `responses` of one record next to each other.
    responses: R; all rows of a record go to the same half.
  """
  records = len(x) // responses
  rng = np.random.Generator(np.random.Philox(key=0))
  inside = np.zeros(records, bool)
  inside[rng.permutation(records)[: records // 2]] = True
  inside = np.repeat(inside, responses)
  labels = labels if labels is None else labels[inside]
  fitted = fit_mixture(mesh, x[inside], options, labels=labels, **kwargs)
  seen = log_likelihood(fitted, x[inside])
  unseen = log_likelihood(fitted, x[~inside])
  half = np.repeat([1, 0], [len(seen), len(unseen)])
  return {
    "auc": float(roc_auc_score(half, np.concatenate([seen, unseen]))),
    "mean_fitted": float(seen.mean()),
    "mean_held_out": float(unseen.mean()),
  }


def component_labels(
  mixture: Mixture, x: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
  """How components match labels, such as chosen and rejected.

  Args:
    mixture, x: the fit and [n, E] rows.
    labels: [n] any labels.

  Returns:
    `accuracy` of the best one-to-one match of components with labels (a
    component or label left over is wrong), `majority`, the fraction of the
    commonest label, which needs no mixture; and `nmi`, the normalised mutual
    information.
  """
  component = assign(mixture, x)
  _, label = np.unique(labels, return_inverse=True)
  table = np.zeros((len(mixture.log_weights), label.max() + 1), np.int64)
  np.add.at(table, (component, label), 1)
  matched = table[linear_sum_assignment(-table)].sum()
  return {
    "accuracy": float(matched / len(label)),
    "majority": float(table.sum(0).max() / len(label)),
    "nmi": float(normalized_mutual_info_score(component, label)),
  }


def mixture_summary(mixture: Mixture) -> dict[str, Any]:
  """The fit in numbers: bounds of all starts, the trace of the one kept."""
  return {
    "components": len(mixture.log_weights),
    "directions": len(mixture.variances),
    "variance_explained": float(mixture.explained),
    "weights": np.exp(mixture.log_weights).tolist(),
    "trace": mixture.trace.tolist(),
    "bounds": [float(b) if np.isfinite(b) else None for b in mixture.bounds],
    "warnings": list(mixture.warnings),
  }
