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
  margin = (np.asarray(policy, np.float64) - np.asarray(ref, np.float64))
  margin = margin[:, 0] - margin[:, 1]
  tied = margin == 0
  out = intervals.share((margin[~tied] > 0).astype(float))
  return out | {"ties": float(tied.mean()) if len(tied) else 0.0}


def sampled_kl(policy: np.ndarray, ref: np.ndarray) -> dict[str, Any]:
  """KL(policy || reference) a response, from the policy's own samples.

  Args:
    policy: [n] summed log-probabilities of the samples, nats.
    ref: [n] the reference's of the same samples.
  """
  return intervals.mean(np.asarray(policy, np.float64) - np.asarray(ref))
