"""In what sums, norms and softmaxes are held."""

from typing import Any

import jax.numpy as jnp


def wide(*values: Any) -> Any:
  """The dtype of sums over `values`: float32, or float64 where one is that.

  Float64 is for tests beside a peer, under jax's x64 mode with a ModelConfig
  whose dtype is "float64"; no job runs in it, so no config may name it.
  """
  return jnp.result_type(jnp.float32, *values)
