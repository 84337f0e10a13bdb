"""Metrics as (sum, count), divided once, at the log.

A mean of means is wrong as soon as two shards, hosts or micro-batches hold
different numbers of rows of a class; sums and counts add up anywhere.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.model.parameters import wide
from jaxalign.train.batch import Logps
from jaxalign.train.packing import Packed


def sums_and_counts(metrics: dict[str, Any]) -> dict[str, jax.Array]:
  """Per-row metrics -> [2] arrays (sum, count).

  A metric is [B], or a pair ([B] weighted values, [B] weights) where only some
  rows count.
  """
  out = {}
  for name, value in metrics.items():
    if not isinstance(value, tuple):
      value = value, jnp.ones_like(value)
    kind = wide(value[0])
    out[name] = jnp.stack([jnp.sum(x.astype(kind)) for x in value])
  return out


def common_metrics(
  policy: Logps, ref: Logps, label: jax.Array | None, reference: bool
) -> dict[str, Any]:
  """Metrics [B] that every loss has: lengths, and the drift from a reference.

  "drift/chosen" and "drift/rejected" are policy - ref, summed nats of an
  answer: on these very answers a one-sample estimate of how much likelier the
  policy finds them, where rewards hide it behind beta and margins behind a
  difference. "lengths/..." are response tokens.

  Args:
    policy: [B, 2], chosen then rejected, or [B, 1].
    ref: of the reference.
    label: [B] bool of single answers; None: of pairs, or of chosen answers.
    reference: whether `ref` is one; without there is no drift.
  """
  found = dict(lengths=policy.count)
  if reference:
    found["drift"] = policy.sum - ref.sum
  out = {}
  for name, value in found.items():
    if label is not None:
      up = label.astype(jnp.float32)
      out[f"{name}/chosen"] = value[:, 0] * up, up
      out[f"{name}/rejected"] = value[:, 0] * (1 - up), 1 - up
      continue
    for side, column in zip(("chosen", "rejected"), range(value.shape[1])):
      out[f"{name}/{side}"] = value[:, column]
  return out


def packing_metrics(rows: Packed) -> dict[str, jax.Array]:
  """(sum, count) metrics: the fraction of slots that is padding, and of the
  responses' tokens the fraction that is shared, so computed once."""
  copies = rows.copies.first, rows.copies.second
  own, again = (jnp.sum(x >= 0, dtype=jnp.float32) for x in copies)
  size = jnp.float32(rows.tokens.size)
  return {
    "perf/padding": jnp.stack([size - own, size]),
    "perf/shared": jnp.stack([again, own + again]),
  }


def divide(totals: dict[str, Any]) -> dict[str, float]:
  """(sum, count) -> mean; a metric that no row counted for is left out."""
  out = {}
  for name, pair in totals.items():
    total, count = (float(v) for v in np.asarray(pair))
    if count > 0 or not np.isfinite(count):
      out[name] = total / count
  return out
