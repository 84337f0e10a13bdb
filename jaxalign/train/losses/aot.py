"""Alignment by optimal transport: pairs sorted over the global batch.

Sorting couples rows, so a micro-batch alone cannot know its value: sorted on
one device's rows, as TRL does, the loss depends on how the batch is cut. Here
a step takes the log-probabilities of its whole global batch first, without
gradient, and `matched_*` tells every row which value of the other side has its
rank. Ranks are constant almost everywhere, so the gradient of the sorted loss
is each row's own, and sums over rows add up over any cut.
"""

import jax
import jax.numpy as jnp

from jaxalign.train.losses import needs
from jaxalign.train.losses.common import margin, pair_metrics, ratios, smoothed


def ranks(x: jax.Array) -> jax.Array:
  """[N] -> [N] places in ascending order; ties by row."""
  return jnp.argsort(jnp.argsort(x))


def matched_margins(policy: jax.Array, ref: jax.Array) -> jax.Array:
  """The reference's margin with the rank of each row's policy margin.

  Args:
    policy: [N, 2] sums over the global batch, unsharded.
    ref: [N, 2], likewise.

  Returns:
    [N] nats, without gradient; a row's own where policy equals reference.
  """
  matched = jnp.sort(margin(ref))[ranks(margin(policy))]
  return jax.lax.stop_gradient(matched)


def matched_ratios(policy: jax.Array, ref: jax.Array) -> jax.Array:
  """[N, 2]: the rejected r of the rank of each row's chosen r, and the chosen
  r of the rank of its rejected r; arguments as of `matched_margins`."""
  r = policy - ref
  chosen, rejected = r[:, 0], r[:, 1]
  return jax.lax.stop_gradient(
    jnp.stack(
      [jnp.sort(rejected)[ranks(chosen)], jnp.sort(chosen)[ranks(rejected)]],
      axis=1,
    )
  )


@needs("pairs", "matched_margins")
def aot(policy, ref, stats, *, beta=0.1, label_smoothing=0.0):
  """Alignment by optimal transport, paired: Melnyk et al. 2024.

  With P = sort(policy_w - policy_l) and R = sort(ref_w - ref_l) over the
  GLOBAL batch, the mean over ranks k of cDPO's form at beta (P_k - R_k), sums.
  A row's value is the one at its policy margin's rank; stats
  ["matched_margins"] [B] is R there. TRL sorts a device's micro-batch. At the
  start ln 2.
  """
  matched = jax.lax.stop_gradient(stats["matched_margins"])
  z = beta * (margin(policy.sum) - matched)
  return (
    smoothed(z, label_smoothing),
    pair_metrics(policy, beta * ratios(policy, ref)),
  )


@needs("pairs", "matched_ratios")
def aot_unpaired(policy, ref, stats, *, beta=0.1, label_smoothing=0.0):
  """Alignment by optimal transport, unpaired: Melnyk et al. 2024.

  With W = sort(r_w) and L = sort(r_l) over the GLOBAL batch, the mean over
  ranks k of cDPO's form at beta (W_k - L_k), sums. A row is in two terms, of
  its chosen and of its rejected answer's rank: its value is half of each, its
  gradient all of each, so that means over the batch and their gradients are
  the sorted loss's. stats["matched_ratios"] [B, 2] as of `matched_ratios`.
  TRL sorts a device's micro-batch. At the start ln 2.
  """
  matched = jax.lax.stop_gradient(stats["matched_ratios"])
  r = ratios(policy, ref)
  both = smoothed(beta * (r[:, 0] - matched[:, 0]), label_smoothing) + smoothed(
    beta * (matched[:, 1] - r[:, 1]), label_smoothing
  )
  loss = both - jax.lax.stop_gradient(0.5 * both)
  return loss, pair_metrics(policy, beta * r)
