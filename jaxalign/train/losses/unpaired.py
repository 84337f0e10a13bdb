"""Losses on single answers with a thumb up or down.

Every one takes Logps [B, 1] of policy and reference and stats["label"] [B]
bool (true: desirable); r = policy - ref over SUMS. Metrics of one class are
averaged over its own rows only, so a batch of one class is finite.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.train.losses import needs
from jaxalign.train.losses.common import ratios
from jaxalign.train.losses.common import thumb_metrics


def _sign(label):
  return jnp.where(label, 1.0, -1.0)


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
  r = ratios(policy, ref)[:, 0]
  weight = jnp.where(label, desirable, undesirable)
  loss = weight * jax.nn.sigmoid(-beta * _sign(label) * (r - z0))
  return loss, thumb_metrics(policy, beta * r, label) | {
      "kl": jnp.ones_like(loss) * z0}


@needs("thumbs", "label")
def apo_zero_unpaired(policy, ref, stats, *, beta=0.1, desirable=1.0,
                      undesirable=1.0):
  """APO-zero on thumbs, D'Oosterlinck et al. 2024, eq. 7: KTO with z0 = 0.

  Desirable rows w_D (1 - sigmoid(beta r)), undesirable rows
  w_U sigmoid(beta r), sums; no mismatched answers, so no second pass. TRL's
  "apo_zero_unpaired" of its KTO trainer. At the start w / 2.
  """
  label = stats["label"]
  r = ratios(policy, ref)[:, 0]
  weight = jnp.where(label, desirable, undesirable)
  loss = weight * jax.nn.sigmoid(-beta * _sign(label) * r)
  return loss, thumb_metrics(policy, beta * r, label)


@needs("thumbs", "label", "delta")
def bco(policy, ref, stats, *, beta=0.1):
  """Binary classifier optimisation, Jung et al. 2024.

  Desirable rows -log sigmoid(beta r - delta), undesirable rows
  -log sigmoid(-(beta r - delta)), sums; stats["delta"] is the running mean of
  all rewards beta r, of this batch too (`update_delta`), without gradient. TRL
  updates it once a micro-batch. At the start (delta 0) ln 2.
  """
  label = stats["label"]
  delta = jax.lax.stop_gradient(stats["delta"])
  reward = beta * ratios(policy, ref)[:, 0]
  loss = -jax.nn.log_sigmoid(_sign(label) * (reward - delta))
  return loss, thumb_metrics(policy, reward, label) | {
      "delta": jnp.ones_like(loss) * delta}


@needs("thumbs", "label", "delta", "weights")
def bco_udm(policy, ref, stats, *, beta=0.1):
  """BCO with underlying distribution matching, Jung et al. 2024.

  `bco` with undesirable rows weighed by stats["weights"] [B], the density
  ratio of their prompts (`matching.density_ratios`); desirable rows weigh 1,
  whatever their weight says. At the start ln 2 times the weight.
  """
  loss, metrics = bco(policy, ref, stats, beta=beta)
  weight = jax.lax.stop_gradient(stats["weights"])
  return jnp.where(stats["label"], 1.0, weight) * loss, metrics


class Delta(NamedTuple):
  """BCO's running mean of rewards: a state, saved with the optimizer's."""

  mean: jax.Array  # scalar, of every reward so far
  count: jax.Array  # scalar, rewards so far


def init_delta() -> Delta:
  """No rewards yet: delta 0."""
  return Delta(jnp.zeros(()), jnp.zeros(()))


def update_delta(delta: Delta, rewards: jax.Array) -> Delta:
  """The running mean with the rewards of one more global batch.

  Exact and weighted by counts, as TRL's RunningMoments: any cut of the same
  rewards ends at the same mean. Call it before the loss, in training only.
  In float32 counts are exact up to 2^24 rewards; beyond, the mean stands
  nearly still anyway.

  Args:
    delta: of the batches before.
    rewards: beta r of every row of the batch, of both classes (of pairs: both
      answers), any shape, at least one.
  """
  rewards = jax.lax.stop_gradient(rewards)
  count = delta.count + rewards.size
  step = jnp.sum(rewards - delta.mean) / count
  return Delta(delta.mean + step, count)
