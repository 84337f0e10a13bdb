"""Metrics as (sum, count), divided once, at the log.

A mean of means is wrong as soon as two shards, hosts or micro-batches hold
different numbers of rows of a class; sums and counts add up anywhere.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def sums_and_counts(metrics: dict[str, Any]) -> dict[str, jax.Array]:
  """Per-row metrics -> [2] arrays (sum, count).

  A metric is [B], or a pair ([B] weighted values, [B] weights) where only some
  rows count.
  """
  out = {}
  for name, value in metrics.items():
    value, weight = value if isinstance(value, tuple) else (
        value, jnp.ones_like(value))
    out[name] = jnp.stack([jnp.sum(value.astype(jnp.float32)),
                           jnp.sum(weight.astype(jnp.float32))])
  return out


def divide(totals: dict[str, Any]) -> dict[str, float]:
  """(sum, count) -> mean; a metric that no row counted for is left out."""
  out = {}
  for name, pair in totals.items():
    total, count = (float(v) for v in np.asarray(pair))
    if count > 0 or not np.isfinite(count):
      out[name] = total / count
  return out
