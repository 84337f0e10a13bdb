"""Losses on single answers with a thumb up or down."""

import jax
import jax.numpy as jnp

from jaxalign.train.losses import needs


@needs("thumbs", "label", "z0")
def kto(policy, ref, stats, *, beta=0.1, desirable=1.0, undesirable=1.0):
  """Kahneman-Tversky optimisation, Ethayarajh et al. 2024, eq. 8.

  With r = policy - ref over SUMS of log-probabilities and z0 the clamped mean
  of the same difference over mismatched answers of the global batch:
  desirable rows  w_D (1 - sigmoid(beta (r - z0))), undesirable rows
  w_U (1 - sigmoid(beta (z0 - r))). At the start r = z0 = 0: loss w / 2.

  Args:
    policy: Logps [B, 1].
    ref: Logps [B, 1] of the frozen reference.
    stats: "label" [B] bool (true: desirable); "z0" scalar >= 0, without
      gradient, from every micro-batch of the step (HALOs and TRL take it
      from one device's micro-batch).
    beta: > 0.
    desirable: weight of thumbs up. The paper keeps desirable * n_up /
      (undesirable * n_down) within [1, 4/3].
    undesirable: weight of thumbs down.

  Returns:
    [B] loss, and [B] metrics (rewards of one class are 0 on the other's rows
    and are averaged over their own class only).
  """
  label = stats["label"]
  z0 = jax.lax.stop_gradient(stats["z0"])
  reward = policy.sum[:, 0] - ref.sum[:, 0]
  sign = jnp.where(label, 1.0, -1.0)
  weight = jnp.where(label, desirable, undesirable)
  loss = weight * (1 - jax.nn.sigmoid(beta * sign * (reward - z0)))
  up = label.astype(jnp.float32)
  return loss, {
      "rewards/chosen": (beta * reward * up, up),
      "rewards/rejected": (beta * reward * (1 - up), 1 - up),
      "kl": jnp.full_like(loss, 1.0) * z0,
      "logps/chosen": (policy.sum[:, 0] * up, up),
      "logps/rejected": (policy.sum[:, 0] * (1 - up), 1 - up)}
