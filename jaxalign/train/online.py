"""The reference computed at every update, and refreshed as TR-DPO does.

Stored numbers cost nothing and are the default; a reference that moves cannot
be stored.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.train.batch import Batch
from jaxalign.train.step import TrainState


def begin_refresh(state: TrainState) -> TrainState:
  """A fresh state whose reference is a copy of its own parameters."""
  return state.replace(ref=jax.tree.map(jnp.copy, state.params))


@functools.lru_cache(maxsize=8)
def make_fill(
  logps_fn: Callable, options: tuple[tuple[str, Any], ...] = ()
) -> Callable:
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


@functools.lru_cache(maxsize=8)
def make_refresh(every: int, mix: float) -> Callable:
  """Returns `refresh(ref, params, step) -> ref`, which donates `ref`.

  TR-DPO, Gorbatovski et al. 2024, eq. 4 and 5: after every `every`-th update
  ref = mix params + (1 - mix) ref; a mix of 1 is its hard update. Between
  them `ref` comes back as it was, bit for bit.
  """

  def blend(ref, params):
    return jax.tree.map(lambda r, p: mix * p + (1 - mix) * r, ref, params)

  def refresh(ref, params, step):
    stay = lambda ref, params: ref
    return jax.lax.cond(step % every == 0, blend, stay, ref, params)

  return jax.jit(refresh, donate_argnums=0)


def with_reference(
  train_step: Callable,
  logps_fn: Callable,
  reference: Any,
  options: tuple[tuple[str, Any], ...] = (),
) -> Callable:
  """`train_step` on numbers of a frozen `reference`, found at every update."""
  fill = make_fill(logps_fn, options)
  return lambda state, batch: train_step(state, fill(reference, batch))


def with_refresh(
  train_step: Callable,
  logps_fn: Callable,
  *,
  every: int,
  mix: float,
  options: tuple[tuple[str, Any], ...] = (),
) -> Callable:
  """`train_step` against `state.ref`, which moves to the policy.

  Args:
    train_step: `(state, batch) -> (state, metrics)`.
    logps_fn: of policy and reference alike.
    every: updates between refreshes, at least 1 (the paper's tau; TRL's 512).
    mix: fraction of the policy, in (0, 1] (the paper's alpha; TRL's 0.6).
    options: the compiler's.
  """
  fill, refresh = make_fill(logps_fn, options), make_refresh(every, mix)

  def step(state, batch):
    filled = fill(state.ref, batch)
    after, totals = train_step(state.replace(ref=()), filled)
    ref = refresh(state.ref, after.params, after.step)
    return after.replace(ref=ref), totals

  return step
