"""How far a mixture can be trusted: other seeds, unseen rows, the labels."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from jaxalign.select import mixture as mixtures


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
  """Rows in both over rows in either; 1 where both are empty."""
  either = np.union1d(a, b).size
  return np.intersect1d(a, b).size / either if either else 1.0


def auc(high: np.ndarray, low: np.ndarray) -> float:
  """Chance that a draw of `high` is above a draw of `low`; ties count half."""
  both = np.concatenate([high, low])
  _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
  ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1, averaged
  n = len(high)
  return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(low)))


def normalised_mutual_information(a: np.ndarray, b: np.ndarray) -> float:
  """Mutual information of two labelings over the mean of their entropies."""
  _, a = np.unique(a, return_inverse=True)
  _, b = np.unique(b, return_inverse=True)
  table = np.zeros((a.max() + 1, b.max() + 1))
  np.add.at(table, (a, b), 1)
  joint = table / table.sum()
  pa, pb = joint.sum(1), joint.sum(0)
  outer = np.outer(pa, pb)
  seen = joint > 0
  information = (joint[seen] * np.log(joint[seen] / outer[seen])).sum()
  entropies = -(pa * np.log(pa)).sum() - (pb * np.log(pb)).sum()
  return float(max(0.0, 2 * information / entropies)) if entropies > 0 else 1.0


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
  order = rng.permutation(records)
  inside = np.zeros(records, bool)
  inside[order[: records // 2]] = True
  inside = np.repeat(inside, responses)
  labels = labels if labels is None else labels[inside]
  fitted = mixtures.fit(
    mesh, x[inside], options, seed=seed, labels=labels, progress=progress
  )
  seen = mixtures.log_likelihood(fitted, x[inside])
  unseen = mixtures.log_likelihood(fitted, x[~inside])
  return {
    "auc": auc(seen, unseen),
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
    component or label left over is wrong), `majority`, the share of the
    commonest label, which needs no mixture; and `nmi`.
  """
  component = mixtures.assign(mixture, x)
  _, label = np.unique(labels, return_inverse=True)
  table = np.zeros((len(mixture.log_weights), label.max() + 1), np.int64)
  np.add.at(table, (component, label), 1)
  matched = table[linear_sum_assignment(-table)].sum()
  return {
    "accuracy": float(matched / len(label)),
    "majority": float(table.sum(0).max() / len(label)),
    "nmi": normalised_mutual_information(component, label),
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
