"""What a loss reads of the whole batch of an update, before its gradient.

A micro-batch cannot know these numbers, and no device can: they are the same
on every mesh and at every accumulation. None carries a gradient.
"""

from collections.abc import Callable
import functools
import inspect

import jax
import jax.numpy as jnp

from jaxalign.core import sharding
from jaxalign.train.losses import GLOBAL
from jaxalign.train.losses.unpaired import update_delta

# Statistics and fields of Logps that a job computes; no loss may ask for more.
STATS = ("label", "weights", "z0", "delta", "mean_count", *GLOBAL)
EXTRAS = ("common_prefix",)
# Those that take the policy's sums of every row, a forward pass of their own.
AHEAD = ("delta", *GLOBAL)


def needs_batch_logps(loss_fn: Callable) -> bool:
  """Whether a step runs the policy over its whole batch before the loss."""
  return any(name in AHEAD for name in getattr(loss_fn, "stats", ()))


def beta_of(loss_fn: Callable) -> float:
  """The beta of the rewards whose running mean is "delta".

  The one that was bound; else the default of the loss, or of the first term of
  a sum, that reads delta; 1 where that has none.
  """
  fn = getattr(loss_fn, "func", loss_fn)
  given = getattr(loss_fn, "keywords", {})
  if "beta" in given:
    return given["beta"]
  terms = [t for t in getattr(fn, "terms", (fn,)) if "delta" in t.stats]
  known = inspect.signature(terms[0]).parameters
  return known["beta"].default if "beta" in known else 1.0


@functools.lru_cache(maxsize=8)
def make_statistics(logps_fn: Callable, loss_fn: Callable) -> Callable:
  """Returns `statistics(params, batch, delta) -> (scalars, rows, delta)`.

  Args:
    logps_fn: of the policy, see `step.make_gradients`.
    loss_fn: `loss_fn.stats` lists what is computed.

  A batch is that of `step.make_gradients`, and `delta` a `Delta`, or () for a
  loss that reads none. `scalars` and `rows` are two dicts by name: of numbers,
  and of arrays [A, b, ...], laid as the batch is; `delta` comes back with the
  rewards of this batch.
  """
  wanted = getattr(loss_fn, "stats", ())

  def sums(params, tokens, mask):
    """[A, b, R] sums of all micro-batches."""
    return jax.lax.scan(
      lambda _, micro: (None, logps_fn(params, *micro).sum),
      None,
      (tokens, mask),
    )[1]

  def statistics(params, batch, delta):
    scalars = {}
    rows = {n: batch[n] for n in ("label", "weights") if n in batch}
    if "z0" in wanted:
      # max(0, mean of policy - ref over all mismatched rows of the step)
      policy = sums(params, batch["kl_tokens"], batch["kl_mask"])
      scalars["z0"] = jnp.maximum(0.0, jnp.mean(policy - batch["kl_ref_sum"]))
    if "mean_count" in wanted:
      first = batch["mask"][:, :, 0]
      scalars["mean_count"] = jnp.sum(first, dtype=jnp.float32) / (
        first.shape[0] * first.shape[1]
      )
    if needs_batch_logps(loss_fn):
      # Whole on every device: ranks are over all rows.
      policy, ref = (
        jax.reshard(x, jax.P())
        for x in (
          sums(params, batch["tokens"], batch["mask"]),
          batch["ref_sum"],
        )
      )
      shape = policy.shape
      policy, ref = (x.reshape(-1, shape[-1]) for x in (policy, ref))
      for name in GLOBAL:
        if name in wanted:
          x = GLOBAL[name](policy, ref)
          rows[name] = jax.reshard(
            x.reshape(*shape[:2], *x.shape[1:]),
            sharding.spec(None, "batch", *[None] * (x.ndim - 1)),
          )
      if "delta" in wanted:
        delta = update_delta(delta, beta_of(loss_fn) * (policy - ref))
        scalars["delta"] = delta.mean
    return jax.lax.stop_gradient((scalars, rows, delta))

  return statistics
