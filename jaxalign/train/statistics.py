"""What a loss reads of the whole batch of an update, before its gradient.

A micro-batch cannot know these numbers, and no device can: they are the same
on every mesh and at every accumulation. None carries a gradient. A new one is
one entry of STATISTICS.
"""

from collections.abc import Callable
import functools
import inspect
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from jaxalign.core import sharding
from jaxalign.train.batch import Batch
from jaxalign.train.losses.common import margin


class Whole(NamedTuple):
  """What a statistic is computed from: all rows of an update, N = A b."""

  batch: Batch
  loss: Callable
  mismatched: jax.Array | None  # [A, b, 1] nats of the policy
  policy: jax.Array | None  # [N, R] nats, whole on every device
  ref: jax.Array | None  # [N, R] nats, likewise


class Statistic(NamedTuple):
  """How a statistic is computed.

  Args:
    compute: `(whole) -> value`, or with `init` `(whole, state) -> (value,
      state)`. The value is a scalar, or [N, ...] where it is `by_row`.
    by_row: whether every row has its own.
    reads: "" (the batch), "batch_logps" (the policy's sums of every row, a
      forward pass of their own) or "mismatched" (those of KTO's rows).
    init: `() -> state` before the first update, saved with the optimizer's.
  """

  compute: Callable
  by_row: bool = False
  reads: str = ""
  init: Callable | None = None


def z0(whole: Whole) -> jax.Array:
  """KTO's: max(0, mean of policy - ref over all mismatched rows)."""
  gap = whole.mismatched - whole.batch.mismatched.ref_sum
  return jnp.maximum(0.0, jnp.mean(gap))


def mean_count(whole: Whole) -> jax.Array:
  """The mean number of tokens of a first response."""
  first = whole.batch.mask[:, :, 0]
  return jnp.sum(first, dtype=jnp.float32) / (first.shape[0] * first.shape[1])


def ranks(x: jax.Array) -> jax.Array:
  """[N] -> [N] places in ascending order; ties by row."""
  return jnp.argsort(jnp.argsort(x))


def matched_margins(whole: Whole) -> jax.Array:
  """[N] nats: the reference's margin with the rank of each row's policy
  margin; a row's own where policy equals reference. See `pair.aot`."""
  return jnp.sort(margin(whole.ref))[ranks(margin(whole.policy))]


def matched_ratios(whole: Whole) -> jax.Array:
  """[N, 2]: the rejected r of the rank of each row's chosen r, and the chosen
  r of the rank of its rejected r."""
  r = whole.policy - whole.ref
  chosen, rejected = r[:, 0], r[:, 1]
  matched = jnp.sort(rejected)[ranks(chosen)], jnp.sort(chosen)[ranks(rejected)]
  return jnp.stack(matched, axis=1)


@struct.dataclass
class RunningMean:
  """The mean of every number so far, and how many there were."""

  mean: jax.Array
  count: jax.Array


def init_mean() -> RunningMean:
  return RunningMean(jnp.zeros(()), jnp.zeros(()))


def update_mean(state: RunningMean, x: jax.Array) -> RunningMean:
  """The running mean with more numbers, any shape, at least one.

  Exact and weighted by counts, as TRL's RunningMoments: any cut of the same
  numbers ends at the same mean. In float32 counts are exact up to 2^24;
  beyond, the mean stands nearly still anyway.
  """
  x = jax.lax.stop_gradient(x)
  count = state.count + x.size
  return RunningMean(state.mean + jnp.sum(x - state.mean) / count, count)


def delta(whole: Whole, state: RunningMean) -> tuple[jax.Array, RunningMean]:
  """BCO's: the running mean of all rewards beta r, of this batch too, and of
  pairs of both answers. TRL updates it once a micro-batch."""
  rewards = beta_of(whole.loss) * (whole.policy - whole.ref)
  state = update_mean(state, rewards)
  return state.mean, state


STATISTICS = {
  "z0": Statistic(z0, reads="mismatched"),
  "mean_count": Statistic(mean_count),
  "matched_margins": Statistic(matched_margins, True, "batch_logps"),
  "matched_ratios": Statistic(matched_ratios, True, "batch_logps"),
  "delta": Statistic(delta, reads="batch_logps", init=init_mean),
}


def _wanted(loss_fn: Callable | None) -> dict[str, Statistic]:
  stats = getattr(loss_fn, "stats", ())
  return {n: x for n, x in STATISTICS.items() if n in stats}


def needs_batch_logps(loss_fn: Callable) -> bool:
  """Whether a step runs the policy over its whole batch before the loss."""
  return any(x.reads == "batch_logps" for x in _wanted(loss_fn).values())


def needs_mismatched(loss_fn: Callable) -> bool:
  """Whether a loss wants rows of one prompt and another's answer."""
  return any(x.reads == "mismatched" for x in _wanted(loss_fn).values())


def init_statistics(loss_fn: Callable | None) -> dict[str, Any]:
  """The states that the statistics of a loss begin with, by name."""
  found = _wanted(loss_fn).items()
  return {n: x.init() for n, x in found if x.init is not None}


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
  """Returns `statistics(params, batch, states) -> (scalars, rows, states)`.

  `scalars` and `rows` are dicts by name: of numbers, and of arrays
  [A, b, ...], laid as the batch is; `states` are those of `init_statistics`
  with this batch in them. Arguments as of `step.make_gradients`.
  """
  wanted = _wanted(loss_fn)

  def sums(params, tokens, mask):
    each = lambda _, micro: (None, logps_fn(params, *micro).sum)
    return jax.lax.scan(each, None, (tokens, mask))[1]

  def laid(x, shape):
    axes = sharding.spec(None, "batch", *[None] * (x.ndim - 1))
    return jax.reshard(x.reshape(*shape, *x.shape[1:]), axes)

  def statistics(params, batch, states):
    scalars, rows, states = {}, {}, dict(states)
    other = policy = ref = None
    if needs_mismatched(loss_fn):
      other = batch.mismatched
      other = sums(params, other.tokens, other.mask)
    if needs_batch_logps(loss_fn):
      # Whole on every device: ranks are over all rows.
      found = sums(params, batch.tokens, batch.mask), batch.ref.sum
      whole = (jax.reshard(x, jax.P()) for x in found)
      policy, ref = (x.reshape(-1, x.shape[-1]) for x in whole)
    whole = Whole(batch, loss_fn, other, policy, ref)
    for name, one in wanted.items():
      value = one.compute(whole, *([states[name]] if one.init else []))
      if one.init:
        value, states[name] = value
      if one.by_row:
        rows[name] = laid(value, batch.ref.sum.shape[:2])
      else:
        scalars[name] = value
    return jax.lax.stop_gradient((scalars, rows, states))

  return statistics
