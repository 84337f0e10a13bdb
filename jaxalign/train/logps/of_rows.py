"""Policy log-probabilities of padded or packed rows, by any head."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from jaxalign.core import sharding
from jaxalign.model import attention, decoder, logprob, packed
from jaxalign.train import layout, logps


def _padded(params, tokens, mask, m, chunk, head):
  b, r, length = tokens.shape
  flat = tokens.reshape(b * r, length)
  x = decoder.forward(params, flat, m, sharding.SPREAD)
  weight = decoder.head(params, m, sharding.SPREAD)
  each = logprob.token_logps(x, weight, flat, chunk, m.final_softcap, head)
  total, count = logprob.sums(each, mask.reshape(b * r, length))
  # Said outright: of one row alone, jax takes the R for the batch.
  rows = jax.typeof(tokens).sharding.spec[0]
  shaped = lambda x, *more: jnp.reshape(
    x, (b, r, *more), out_sharding=jax.P(rows, *[None] * (1 + len(more)))
  )
  # Compiled away where the loss does not read it.
  common_prefix = logps.common_prefix_sums(shaped(each, length), mask)
  return logps.Logps(shaped(total), shaped(count), common_prefix)


def _packed(params, rows, counts, m, chunk, head):
  b, r, _ = counts.shape
  s, targets = rows.target.shape
  x = decoder.forward(
    params,
    rows.tokens,
    m,
    sharding.SPREAD,
    attention.Seen(rows.position, rows.position),
    rows.copies,
  )
  # Only what predicts a response token meets the head.
  x = packed.take(x, rows.source, rows.first, rows.second, sharding.SPREAD)
  weight = decoder.head(params, m, sharding.SPREAD)
  # As many logits at once as of `chunk` positions of every response.
  each = head(
    x, weight, rows.target, min(chunk * b * r // s, targets), m.final_softcap
  )
  own = rows.owner[..., None] == jnp.arange(b * r // s)[None, None, :]

  def summed(each):  # padding has no owner
    total = jnp.sum(jnp.where(own, each[..., None], 0.0), axis=1)
    batch = jax.typeof(counts).sharding.spec[0]
    return jnp.reshape(total, (b, r), out_sharding=jax.P(batch, None))

  return logps.Logps(
    summed(each),
    counts[..., 0].astype(jnp.float32),
    summed(jnp.where(rows.common_prefix, each, 0.0)),
  )


def make(
  head: Callable[..., jax.Array], m: decoder.ModelConfig, chunk: int
) -> Callable[..., "logps.Logps"]:
  """Returns `logps_fn(params, tokens, mask) -> Logps`, float32 [b, R].

  The R responses of a row go through one forward pass. `tokens` and `mask`
  are [b, R, L], padded on the right, `mask` 1 on response tokens; or `tokens`
  is a `layout.Packed` of the same rows and `mask` their counts [b, R, 1].

  Args:
    head: of `model.logprob`.
    m: the model's sizes.
    chunk: positions (of each response) whose logits may be held at once.
  """

  def logps_fn(params, tokens, mask):
    fn = _packed if isinstance(tokens, layout.Packed) else _padded
    return fn(params, tokens, mask, m, chunk, head)

  return jax.named_call(logps_fn, name="logps")


@functools.lru_cache(maxsize=8)
def plain(m: decoder.ModelConfig, chunk: int = 0) -> Callable:
  """`make` with all logits at once: the definition, for small models."""
  return make(logprob.whole, m, chunk)


@functools.lru_cache(maxsize=8)
def chunked(m: decoder.ModelConfig, chunk: int) -> Callable:
  """`make` with a head that runs in chunks of positions."""
  return make(logprob.by_positions, m, chunk)


@functools.lru_cache(maxsize=8)
def vocab(m: decoder.ModelConfig, chunk: int) -> Callable:
  """`make` with a head that runs in pieces of the vocabulary."""
  return make(logprob.by_vocabulary, m, chunk)
