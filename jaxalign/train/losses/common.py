"""What losses share: their marks, ratios, means a token, and metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.train.batch import Logps

# exp of more than this leaves float32 once it is multiplied by anything.
MAX_EXPONENT = 80.0


def needs(
  kind: str, *stats: str, extras: tuple[str, ...] = (), reference: bool = True
) -> Callable:
  """Declares the rows of a loss and what it reads besides sums and counts.

  Args:
    kind: "pairs" ([B, 2]), "unpaired" ([B, 1] and a label) or "rows" ([B, R]).
    *stats: keys of `stats`: "label" [B] bool; columns of the rows,
      `reference.COLUMNS`; and statistics of the whole batch of an update,
      `statistics.STATISTICS`, which carry no gradient.
    extras: fields of Logps besides sum and count, of policy and reference.
    reference: whether `ref` is read at all.
  """

  def mark(fn):
    fn.kind, fn.stats = kind, stats
    fn.extras, fn.reference = extras, reference
    return fn

  return mark


def marks(fn: Callable) -> dict[str, Any]:
  """What `needs` declared of a loss."""
  return dict(
    kind=fn.kind,
    stats=fn.stats,
    extras=getattr(fn, "extras", ()),
    reference=getattr(fn, "reference", True),
  )


def ratios(policy: Logps, ref: Logps) -> jax.Array:
  """r [B, R] = policy - ref over sums, nats; exactly 0 where they agree."""
  return policy.sum - ref.sum


def margin(x: jax.Array) -> jax.Array:
  """[B, 2] -> [B]: chosen minus rejected."""
  return x[:, 0] - x[:, 1]


def mean(sums: jax.Array, logps: Logps) -> jax.Array:
  """Sums [B, R] a response token; an empty response counts as one token."""
  return sums / jnp.maximum(logps.count, 1)


def smoothed(z: jax.Array, eps: float) -> jax.Array:
  """A logistic loss whose labels are wrong with chance eps."""
  return -(1 - eps) * jax.nn.log_sigmoid(z) - eps * jax.nn.log_sigmoid(-z)


def bounded_exp(x: jax.Array) -> jax.Array:
  """exp(min(x, 80)): finite in float32; past 80 constant, gradient 0."""
  return jnp.exp(jnp.minimum(x, MAX_EXPONENT))


def bounded_expm1(x: jax.Array) -> jax.Array:
  """exp(min(x, 80)) - 1, exact near 0."""
  return jnp.expm1(jnp.minimum(x, MAX_EXPONENT))


def pair_metrics(policy: Logps, reward: jax.Array) -> dict[str, Any]:
  """Metrics [B] of pairs: rewards [B, 2], wins with ties apart, log-probs.

  A tie is no win: where policy equals reference the accuracy is 0, not 1/2.
  """
  gap = margin(reward)
  return {
    "rewards/chosen": reward[:, 0],
    "rewards/rejected": reward[:, 1],
    "rewards/margins": gap,
    "rewards/accuracies": (gap > 0).astype(jnp.float32),
    "rewards/ties": (gap == 0).astype(jnp.float32),
    "logps/chosen": policy.sum[:, 0],
    "logps/rejected": policy.sum[:, 1],
  }


def unpaired_metrics(
  policy: Logps, reward: jax.Array, label: jax.Array
) -> dict[str, Any]:
  """Metrics of single answers, as (values, weights): those of one class are 0
  on the other's rows and are averaged over their own class only."""
  up = label.astype(jnp.float32)
  logps = policy.sum[:, 0]
  return {
    "rewards/chosen": (reward * up, up),
    "rewards/rejected": (reward * (1 - up), 1 - up),
    "logps/chosen": (logps * up, up),
    "logps/rejected": (logps * (1 - up), 1 - up),
  }
