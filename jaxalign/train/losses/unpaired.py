"""Losses on single answers, liked (desirable) or disliked.

Every one takes Logps [B, 1] of policy and reference and stats["label"] [B]
bool (true: desirable); r = policy - ref over SUMS. Metrics of one class are
averaged over its own rows only, so a batch of one class is finite.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.lookup import bound_keywords, keywords
from jaxalign.train.losses.common import marks, needs, ratios, unpaired_metrics


def _sign(label):
  return jnp.where(label, 1.0, -1.0)


BAND = 1.0, 4 / 3  # of desirable * n_up / (undesirable * n_down)
CLASS_WEIGHTS = {"desirable", "undesirable"}


def class_weights(up: int, down: int) -> tuple[float, float]:
  """(desirable, undesirable) weights for so many rows of each class.

  Ethayarajh et al. 2024, eq. 8, ask for desirable * n_up / (undesirable *
  n_down) within [1, 4/3]. Of the weights that do the smallest that are not
  below 1: (1, 1) where the counts do already, else one class is raised to the
  nearer end. (1, 1) too where a class is empty.
  """
  low, high = BAND
  if not up or not down:
    return 1.0, 1.0
  return max(1.0, low * down / up), max(1.0, up / (high * down))


def with_class_weights(
  loss: Callable, label: np.ndarray
) -> tuple[Callable, str]:
  """A loss with the weights of its classes set by the rows it will see.

  Args:
    loss: from `losses.bind`; weights that are given there stay.
    label: [M] bool of the kept rows, true: desirable.

  Returns:
    The loss, and a line for a person: the weights, or that given ones leave
    the band of `class_weights`; "" for neither.
  """
  if not CLASS_WEIGHTS <= keywords(loss).keys():
    return loss, ""
  up = int(np.sum(label))
  down = len(label) - up
  counts = f"{up:,} liked answers and {down:,} disliked"
  have = bound_keywords(loss)
  if have.keys() & CLASS_WEIGHTS:
    up *= have.get("desirable", 1.0)
    down *= have.get("undesirable", 1.0)
    ratio = up / down if up and down else 1.0
    if BAND[0] - 1e-6 <= ratio <= BAND[1] + 1e-6:
      return loss, ""
    return loss, (
      f"warning: {counts} weigh {ratio:.2f} to 1 with the given weights, "
      "wanted 1 to 1.33; set config.loss.kwargs, or leave desirable and "
      "undesirable out"
    )
  desirable, undesirable = class_weights(up, down)
  if desirable == undesirable == 1:
    return loss, ""
  bound = functools.partial(loss, desirable=desirable, undesirable=undesirable)
  bound.__dict__.update(marks(loss))
  return bound, (
    f"{counts}: a row of the first weighs {desirable:.3f}, of the second "
    f"{undesirable:.3f}"
  )


@needs("unpaired", "label", "z0")
def kto(policy, ref, stats, *, beta=0.1, desirable=1.0, undesirable=1.0):
  """Kahneman-Tversky optimisation, Ethayarajh et al. 2024, eq. 8.

  With r = policy - ref over SUMS of log-probabilities and z0 the clamped mean
  of the same difference over mismatched answers of the global batch:
  desirable rows  w_D (1 - sigmoid(beta (r - z0))), undesirable rows
  w_U (1 - sigmoid(beta (z0 - r))). Initially r = z0 = 0: loss w / 2.

  Args:
    policy: Logps [B, 1].
    ref: Logps [B, 1] of the frozen reference.
    stats: "label" [B] bool (true: desirable); "z0" scalar >= 0, without
      gradient, from every micro-batch of the step (HALOs and TRL take it
      from one device's micro-batch).
    beta: > 0.
    desirable: weight of liked answers; a job that is given neither takes
      `class_weights` of the rows it kept.
    undesirable: weight of disliked answers.

  Returns:
    [B] loss, and [B] metrics (rewards of one class are 0 on the other's rows
    and are averaged over their own class only).
  """
  label = stats["label"]
  z0 = jax.lax.stop_gradient(stats["z0"])
  r = ratios(policy, ref)[:, 0]
  weight = jnp.where(label, desirable, undesirable)
  loss = weight * jax.nn.sigmoid(-beta * _sign(label) * (r - z0))
  metrics = unpaired_metrics(policy, beta * r, label)
  return loss, metrics | {"kl": jnp.ones_like(loss) * z0}


@needs("unpaired", "label")
def apo_zero_unpaired(
  policy, ref, stats, *, beta=0.1, desirable=1.0, undesirable=1.0
):
  """Unpaired APO-zero, D'Oosterlinck et al. 2024, eq. 7: KTO with z0 = 0.

  Desirable rows w_D (1 - sigmoid(beta r)), undesirable rows
  w_U sigmoid(beta r), sums; no mismatched answers, so no second pass. TRL's
  "apo_zero_unpaired" of its KTO trainer. Initially w / 2.
  """
  label = stats["label"]
  r = ratios(policy, ref)[:, 0]
  weight = jnp.where(label, desirable, undesirable)
  loss = weight * jax.nn.sigmoid(-beta * _sign(label) * r)
  return loss, unpaired_metrics(policy, beta * r, label)


@needs("unpaired", "label", "delta")
def bco(policy, ref, stats, *, beta=0.1):
  """Binary classifier optimisation, Jung et al. 2024.

  Desirable rows -log sigmoid(beta r - delta), undesirable rows
  -log sigmoid(-(beta r - delta)), sums; stats["delta"] is the running mean of
  all rewards beta r, of this batch too (`statistics.delta`), without gradient.
  TRL updates it once a micro-batch. Initially (delta 0) ln 2.
  """
  label = stats["label"]
  delta = jax.lax.stop_gradient(stats["delta"])
  reward = beta * ratios(policy, ref)[:, 0]
  loss = -jax.nn.log_sigmoid(_sign(label) * (reward - delta))
  metrics = unpaired_metrics(policy, reward, label)
  return loss, metrics | {"delta": jnp.ones_like(loss) * delta}


@needs("unpaired", "label", "delta", "weights")
def bco_udm(policy, ref, stats, *, beta=0.1):
  """BCO with underlying distribution matching, Jung et al. 2024.

  `bco` with undesirable rows weighed by stats["weights"] [B], the density
  ratio of their prompts (`row_columns.density_ratios`); desirable rows weigh 1,
  whatever their weight says. Initially ln 2 times the weight.
  """
  loss, metrics = bco(policy, ref, stats, beta=beta)
  weight = jax.lax.stop_gradient(stats["weights"])
  return jnp.where(stats["label"], 1.0, weight) * loss, metrics
