"""Density ratios of prompts: BCO's underlying distribution matching.

Liked and disliked answers of unpaired data often come from other prompts;
a classifier on the prompts' embeddings tells how much, and undesirable rows are
weighed as if they had the desirable rows' prompts. Host NumPy, float64: the
same numbers on every mesh.
"""

import numpy as np
import scipy.optimize

from jaxalign.core.errors import DataError


def density_ratios(
  embedding: np.ndarray,
  label: np.ndarray,
  *,
  seed: int = 0,
  sample: int = 1024,
  low: float = 0.5,
  high: float = 10.0,
) -> np.ndarray:
  """Weights for `bco_udm`, Jung et al. 2024.

  p(desirable | prompt) from a balanced logistic regression on at most `sample`
  prompts of each class; u = clip(p / (1 - p + 1e-8), low, high), 1 on
  desirable rows. TRL draws its sample with replacement and fits alike.

  Args:
    embedding: [N, E] of the prompts, finite.
    label: [N] bool, true: desirable.
    seed: of the sample; unused where a class fits whole.
    sample: rows of a class at most.
    low: least weight.
    high: greatest weight.

  Returns:
    [N] float32.

  Raises:
    DataError: one class only, or an embedding that is not finite.
  """
  embedding = np.asarray(embedding, np.float64)
  label = np.asarray(label, bool)
  if label.all() or not label.any():
    raise DataError(
      f"all {len(label)} rows have the same label, wanted both; "
      "set config.loss.name to 'bco', which matches no prompts"
    )
  if not np.isfinite(embedding).all():
    raise DataError(
      "prompt embeddings hold NaN or infinity, wanted finite "
      "numbers; set config.loss.name to 'bco'"
    )
  rng, rows = np.random.default_rng(seed), []
  for side in (True, False):
    at = np.flatnonzero(label == side)
    rows.append(
      at
      if len(at) <= sample
      else np.sort(rng.choice(at, sample, replace=False))
    )
  rows = np.concatenate(rows)
  weight, bias = fit_logistic(embedding[rows], label[rows])
  p = _sigmoid(embedding @ weight + bias)
  ratio = np.clip(p / (1 - p + 1e-8), low, high)
  return np.where(label, 1.0, ratio).astype(np.float32)


def fit_logistic(x: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, float]:
  """A balanced logistic regression: weights [E] and bias.

  Minimises sum_i c_i log(1 + exp(-s_i (w x_i + b))) + |w|^2 / 2 with
  c_i = n / (2 n_class): scikit-learn's LogisticRegression(
  class_weight="balanced") at its defaults.
  """
  sign = np.where(label, 1.0, -1.0)
  cost = len(label) / (2 * np.where(label, label.sum(), (~label).sum()))

  def objective(theta):
    w, b = theta[:-1], theta[-1]
    z = sign * (x @ w + b)
    slope = -cost * sign * _sigmoid(-z)
    value = np.sum(cost * np.logaddexp(0.0, -z)) + 0.5 * w @ w
    return value, np.append(x.T @ slope + w, slope.sum())

  found = scipy.optimize.minimize(
    objective,
    np.zeros(x.shape[1] + 1),
    jac=True,
    method="L-BFGS-B",
    options=dict(maxiter=1000, ftol=1e-14, gtol=1e-8),
  )
  return found.x[:-1], float(found.x[-1])


def _sigmoid(x):
  return np.exp(-np.logaddexp(0.0, -x))
