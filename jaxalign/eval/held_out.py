"""Measures on pairs that no training row shares a prompt with."""

from typing import Any

import numpy as np

from jaxalign.eval import intervals


def accuracy(policy: np.ndarray, ref: np.ndarray) -> dict[str, Any]:
  """How often the implicit reward prefers the chosen answer; ties apart.

  Args:
    policy: [n, 2] summed log-probabilities, chosen then rejected.
    ref: [n, 2] of the reference.

  Returns:
    {"value", "low", "high", "n"} over the untied pairs, and "ties", the share
    of pairs with equal rewards (all of them before the first update).
  """
  margin = np.asarray(policy, np.float64) - np.asarray(ref, np.float64)
  margin = margin[:, 0] - margin[:, 1]
  tied = margin == 0
  out = intervals.share((margin[~tied] > 0).astype(float))
  return out | {"ties": float(tied.mean()) if len(tied) else 0.0}


def likelihood_accuracy(
  policy: np.ndarray, count: np.ndarray
) -> dict[str, Any]:
  """How often the chosen answer is likelier per token, no reference at all.

  The bar for `accuracy`: a model that has seen no preference reaches 62 % of
  real dialogues this way, so alignment has shown nothing until it is above.

  Args:
    policy: [n, 2] summed log-probabilities, chosen then rejected.
    count: [n, 2] response tokens.
  """
  mean = np.asarray(policy, np.float64) / np.asarray(count, np.float64)
  tied = mean[:, 0] == mean[:, 1]
  return intervals.share((mean[:, 0] > mean[:, 1])[~tied].astype(float))


def sampled_kl(policy: np.ndarray, ref: np.ndarray) -> dict[str, Any]:
  """KL(policy || reference) a response, from the policy's own samples.

  Args:
    policy: [n] summed log-probabilities of the samples, nats.
    ref: [n] the reference's of the same samples.
  """
  return intervals.mean(np.asarray(policy, np.float64) - np.asarray(ref))
