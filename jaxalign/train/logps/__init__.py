"""Producers of log-probabilities; all keep one contract, `Logps`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Logps(NamedTuple):
  """Log-probabilities of R responses a row, as float32 sums and counts."""

  sum: jax.Array  # [B, R] nats, over response tokens with their EOS
  count: jax.Array  # [B, R] response tokens, at least 1
  common_prefix: jax.Array | None = (
    None  # [B, R] nats, see `common_prefix_sums` (LD-DPO)
  )


def common_prefix_sums(each: jax.Array, mask: jax.Array) -> jax.Array:
  """Sums over the first min(counts) response tokens of every response.

  Args:
    each: [B, R, L] nats a token.
    mask: [B, R, L], 1 on response tokens.

  Returns:
    [B, R] nats: `Logps.common_prefix`. The shortest's is its whole sum.
  """
  mask = mask.astype(each.dtype)
  place = jnp.cumsum(mask, axis=-1)  # 1 on the first response token
  shared = jnp.min(place[..., -1], axis=-1)
  keep = mask * (place <= shared[:, None, None])
  return jnp.sum(each * keep, axis=-1)


from jaxalign.train.logps import of_rows  # noqa: E402

# Each reads padded and packed rows alike, see `of_rows.make`.
PRODUCERS = {
  "chunked": of_rows.chunked,
  "vocab": of_rows.vocab,
  "plain": of_rows.plain,
}
