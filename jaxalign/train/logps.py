"""Policy log-probabilities of padded or packed rows, by any head."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from jaxalign.core import sharding
from jaxalign.model import attention, decoder, logprob, packed
from jaxalign.train.batch import Logps
from jaxalign.train.packing import Packed


def common_prefix_sums(each: jax.Array, mask: jax.Array) -> jax.Array:
  """Sums over the first min(counts) response tokens of every response.

  Args:
    each: [B, R, L] nats a token.
    mask: [B, R, L], 1 on response tokens.

  Returns:
    [B, R] nats. The shortest response's is its whole sum.
  """
  mask = mask.astype(each.dtype)
  place = jnp.cumsum(mask, axis=-1)  # 1 on the first response token
  shared = jnp.min(place[..., -1], axis=-1)
  keep = mask * (place <= shared[:, None, None])
  return jnp.sum(each * keep, axis=-1)


def _padded(params, tokens, mask, m, chunk, head):
  b, r, length = tokens.shape
  flat = tokens.reshape(b * r, length)
  x = decoder.forward(params, flat, m, sharding.SPREAD)
  weight = decoder.head(params, m, sharding.SPREAD)
  each = logprob.token_logps(x, weight, flat, chunk, m.final_softcap, head)
  total, count = logprob.masked_sums(each, mask.reshape(b * r, length))
  # Said outright: of one row alone, jax takes the R for the batch.
  rows = jax.typeof(tokens).sharding.spec[0]
  shaped = lambda x, *more: jnp.reshape(
    x, (b, r, *more), out_sharding=jax.P(rows, *[None] * (1 + len(more)))
  )
  # Compiled away where the loss does not read it.
  common_prefix = common_prefix_sums(shaped(each, length), mask)
  return Logps(shaped(total), shaped(count), common_prefix)


def _packed(params, rows, counts, m, chunk, head):
  b, r, _ = counts.shape
  s, targets = rows.target.shape
  seen = attention.Seen(rows.position, rows.position)
  spread = sharding.SPREAD
  x = decoder.forward(params, rows.tokens, m, spread, seen, rows.copies)
  # Only what predicts a response token meets the head.
  x = packed.take(x, rows.source, rows.first, rows.second, spread)
  weight = decoder.head(params, m, spread)
  # As many logits at once as of `chunk` positions of every response.
  chunk = min(chunk * b * r // s, targets)
  each = head(x, weight, rows.target, chunk, m.final_softcap)
  own = rows.owner[..., None] == jnp.arange(b * r // s)[None, None, :]

  def summed(each):  # padding has no owner
    total = jnp.sum(jnp.where(own, each[..., None], 0.0), axis=1)
    batch = jax.typeof(counts).sharding.spec[0]
    return jnp.reshape(total, (b, r), out_sharding=jax.P(batch, None))

  count = counts[..., 0].astype(jnp.float32)
  common_prefix = summed(jnp.where(rows.in_prefix, each, 0.0))
  return Logps(summed(each), count, common_prefix)


@functools.lru_cache(maxsize=8)
def _producer(head, m, chunk):
  def logps_fn(params, tokens, mask):
    fn = _packed if isinstance(tokens, Packed) else _padded
    return fn(params, tokens, mask, m, chunk, head)

  return jax.named_call(logps_fn, name="logps")


def plain(m: decoder.ModelConfig, chunk: int = 0) -> Callable:
  """All logits at once: the definition, for small models."""
  return _producer(logprob.whole, m, chunk)


def chunked(m: decoder.ModelConfig, chunk: int) -> Callable:
  """A head that runs in chunks of positions.

  Every producer returns `logps_fn(params, tokens, mask) -> Logps`, float32
  [b, R]. The R responses of a row go through one forward pass. `tokens` and
  `mask` are those of one micro-batch of a `Batch`.

  Args:
    m: the model's sizes.
    chunk: positions (of each response) whose logits may be held at once.
  """
  return _producer(logprob.by_positions, m, chunk)


def vocab(m: decoder.ModelConfig, chunk: int) -> Callable:
  """A head that runs in chunks of the vocabulary."""
  return _producer(logprob.by_vocabulary, m, chunk)


PRODUCERS = {"chunked": chunked, "vocab": vocab, "plain": plain}
