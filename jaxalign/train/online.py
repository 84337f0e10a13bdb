"""What a step can carry: an online reference, refreshed or not, and an EMA.

A stored reference costs nothing and is the default; one that moves, as in
TR-DPO, cannot be stored.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.train.batch import Batch
from jaxalign.train.step import TrainState

Options = tuple[tuple[str, Any], ...]  # of the compiler


def begin_refresh(state: TrainState) -> TrainState:
  """A fresh state whose reference is a copy of its own parameters."""
  return state.replace(ref=jax.tree.map(jnp.copy, state.params))


def begin_ema(state: TrainState) -> TrainState:
  """A fresh state whose running mean is a copy of its own parameters."""
  return state.replace(ema=jax.tree.map(jnp.copy, state.params))


@functools.lru_cache(maxsize=8)
def make_fill(logps_fn: Callable, options: Options = ()) -> Callable:
  """Returns `fill(params, batch) -> batch` with the reference's numbers.

  Every micro-batch is a forward pass of its own, without a gradient, through
  the very producer that the policy runs: where the weights are equal, so are
  the numbers, bit for bit.

  Args:
    logps_fn: of the reference, see `step.make_gradients`.
    options: the compiler's, as of `step.make_train_step`.
  """

  def over(params, tokens, mask):
    each = lambda _, micro: (None, logps_fn(params, *micro))
    return jax.lax.scan(each, None, (tokens, mask))[1]

  @jax.jit(compiler_options=dict(options))
  def sums(params, rows, others):
    other = None if others is None else over(params, *others).sum
    return over(params, *rows), other

  def fill(params, batch: Batch) -> Batch:
    kl = batch.mismatched
    others = None if kl is None else (kl.tokens, kl.mask)
    ref, other = sums(params, (batch.tokens, batch.mask), others)
    if batch.ref.common_prefix is None:
      ref = ref.replace(common_prefix=None)
    if kl is not None:
      kl = kl.replace(ref_sum=other)
    return batch.replace(ref=ref, mismatched=kl)

  return fill


def with_reference(
  train_step: Callable,
  logps_fn: Callable,
  reference: Any,
  options: Options = (),
) -> Callable:
  """`train_step` with a frozen `reference` that is computed at every update."""
  fill = make_fill(logps_fn, options)
  return lambda state, batch: train_step(state, fill(reference, batch))


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _refresh(ref, params, step, every, mix):
  blend = lambda r, p: mix * p + (1 - mix) * r
  move = lambda ref, params: jax.tree.map(blend, ref, params)
  return jax.lax.cond(step % every == 0, move, lambda r, p: r, ref, params)


def with_refresh(
  train_step: Callable,
  logps_fn: Callable,
  *,
  every: int,
  mix: float,
  options: Options = (),
) -> Callable:
  """`train_step` against `state.ref`, which moves to the policy as in TR-DPO.

  Gorbatovski et al. 2024, eq. 4 and 5: after every `every`-th update
  ref = mix params + (1 - mix) ref; a mix of 1 is the hard update. Between them
  `ref` is unchanged, bit for bit.

  Args:
    train_step: `(state, batch) -> (state, metrics)`.
    logps_fn: of policy and reference alike.
    every: updates between refreshes, at least 1 (the paper's tau; TRL's 512).
    mix: fraction of the policy, in (0, 1] (the paper's alpha; TRL's 0.6).
    options: the compiler's.
  """
  fill = make_fill(logps_fn, options)

  def step(state, batch):
    filled = fill(state.ref, batch)
    after, totals = train_step(state.replace(ref=()), filled)
    ref = _refresh(state.ref, after.params, after.step, every, mix)
    return after.replace(ref=ref), totals

  return step


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _mix(ema, params, decay):
  return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def with_ema(train_step: Callable, decay: float) -> Callable:
  """`train_step` that also moves `state.ema`, by
  ema = decay ema + (1 - decay) params after every update, in float32.

  The mean begins at the first weights and needs no bias correction; a decay of
  0.99 remembers about 100 updates. The A and B of adapters are averaged apart,
  which is not the mean of their product.

  Args:
    train_step: `(state, batch) -> (state, metrics)`.
    decay: in (0, 1).
  """

  def step(state, batch):
    after, totals = train_step(state.replace(ema=()), batch)
    return after.replace(ema=_mix(state.ema, after.params, decay)), totals

  return step
