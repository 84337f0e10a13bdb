"""Losses on pairs, against a frozen reference."""

import jax
import jax.numpy as jnp

from jaxalign.train.losses import needs


@needs("pairs")
def dpo(policy, ref, stats, *, beta=0.1, label_smoothing=0.0):
  """Direct preference optimisation, Rafailov et al. 2023, eq. 7.

  -(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D), with
  D = (policy_w - ref_w) - (policy_l - ref_l) over SUMS of log-probabilities.
  With eps > 0 this is cDPO; TRL's "sigmoid" ignores its label_smoothing.

  Args:
    policy: Logps [B, 2], chosen then rejected.
    ref: Logps [B, 2] of the frozen reference.
    stats: unused.
    beta: strength of the pull to the reference, > 0.
    label_smoothing: eps in [0, 0.5), the share of labels thought wrong.

  Returns:
    [B] loss in nats (ln 2 where policy equals reference), and [B] metrics.
  """
  del stats
  reward = beta * (policy.sum - ref.sum)
  margin = reward[:, 0] - reward[:, 1]
  loss = (-(1 - label_smoothing) * jax.nn.log_sigmoid(margin)
          - label_smoothing * jax.nn.log_sigmoid(-margin))
  return loss, {
      "rewards/chosen": reward[:, 0], "rewards/rejected": reward[:, 1],
      "rewards/margins": margin,
      "rewards/accuracies": (margin > 0).astype(jnp.float32),
      "rewards/ties": (margin == 0).astype(jnp.float32),
      "logps/chosen": policy.sum[:, 0], "logps/rejected": policy.sum[:, 1]}
