"""A running mean of the weights, kept beside those that are trained."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp


def begin(state: Any) -> Any:
  """A fresh state whose mean is its own parameters."""
  return state._replace(ema=jax.tree.map(jnp.copy, state.params))


@functools.lru_cache(maxsize=8)
def _make_mix(decay: float) -> Callable:
  return jax.jit(
    lambda ema, params: jax.tree.map(
      lambda e, p: decay * e + (1 - decay) * p, ema, params
    ),
    donate_argnums=0,
  )


def keep(train_step: Callable, decay: float) -> Callable:
  """`train_step` that also moves `state.ema`, by
  ema = decay ema + (1 - decay) params after every update, in float32.

  The mean starts at the first weights, so nothing is corrected for a start at
  zero; a short run wants a small decay: 0.99 remembers about 100 updates. Of
  adapters A and B are averaged apart, which is not the mean of their product.

  Args:
    train_step: `(state, batch) -> (state, metrics)`.
    decay: in (0, 1).
  """
  mix = _make_mix(decay)

  def step(state, batch):
    after, totals = train_step(state._replace(ema=()), batch)
    return after._replace(ema=mix(state.ema, after.params)), totals

  return step
