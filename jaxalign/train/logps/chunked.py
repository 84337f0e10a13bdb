"""Policy log-probabilities with a head that runs in chunks of positions."""

import functools

import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign.model import decoder, logprob
from jaxalign.train import logps


@functools.lru_cache(maxsize=8)
def chunked(m: decoder.ModelConfig, chunk: int):
  """Returns `logps_fn(params, tokens, mask) -> Logps`.

  The R responses of a row go through one forward pass. `tokens` and `mask`
  are [B, R, L], padded on the right; `mask` is 1 on response tokens.
  """
  def logps_fn(params, tokens, mask):
    b, r, length = tokens.shape
    flat = tokens.reshape(b * r, length)
    x = decoder.forward(params, flat, m, sharding.SPREAD)
    weight = decoder.head(params, m, sharding.SPREAD)
    each = logprob.token_logps(x, weight, flat, chunk, m.final_softcap)
    total, count = logprob.sums(each, mask.reshape(b * r, length))
    # Said outright: of one row alone, jax takes the R for the batch.
    rows = jax.typeof(tokens).sharding.spec[0]
    shaped = lambda x, *more: jnp.reshape(
        x, (b, r, *more), out_sharding=jax.P(rows, *[None] * (1 + len(more))))
    # Compiled away where the loss does not read it.
    public = logps.public_sums(shaped(each, length), mask)
    return logps.Logps(shaped(total), shaped(count), public)

  return jax.named_call(logps_fn, name="logps")
