"""Log-probabilities of given tokens, by heads that hold more or fewer logits.

Every head computes log softmax(x . weight)[target], in float32: products
accumulate and leave in float32 (pitfall: bfloat16 logits cost 0.3 nat per 300
tokens). `whole` is the definition; `by_positions` and `by_vocabulary` never
hold [B, L, V], and compute their scores again in the backward pass.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.model import decoder
from jaxalign.model.parameters import wide

LOW = -1e30  # a score of no token: its exponential is 0, its slope too


def whole(
  x: jax.Array,
  weight: jax.Array,
  target: jax.Array,
  chunk: int = 0,
  softcap: float = 0.0,
) -> jax.Array:
  """log p(target) in float32, from all logits at once; the oracle.

  Args:
    x: [B, L, D] hidden states after the final norm.
    weight: [V, D] output matrix, as from `decoder.head`.
    target: [B, L] ids, each the one that x at its place predicts.
    chunk: unused.
    softcap: `ModelConfig.final_softcap`.

  Returns:
    [B, L] float32 nats.
  """
  del chunk
  scores = decoder.logits(x, weight, softcap)
  return _hit(scores, target) - jax.nn.logsumexp(scores, axis=-1)


def _hit(scores, target):
  # A comparison and a sum, not a gather: it works on a sharded vocabulary.
  vocab = jnp.arange(scores.shape[-1])[None, None, :]
  return jnp.sum(jnp.where(vocab == target[..., None], scores, 0.0), axis=-1)


def by_positions(
  x: jax.Array,
  weight: jax.Array,
  target: jax.Array,
  chunk: int,
  softcap: float = 0.0,
) -> jax.Array:
  """`whole`, over `chunk` positions at a time: [B, chunk, V] at most."""
  _, length, width = x.shape
  steps = -(-length // min(chunk, length))
  chunk = -(-length // steps)  # as many to each, so that little is padding
  pad = steps * chunk - length
  x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)))
  x = _rows(x, steps, chunk, width).swapaxes(0, 1)
  target = _rows(jnp.pad(target, ((0, 0), (0, pad))), steps, chunk)
  target = target.swapaxes(0, 1)
  one = jax.checkpoint(lambda x, t: whole(x, weight, t, softcap=softcap))
  _, logps = jax.lax.scan(lambda _, xt: (None, one(*xt)), None, (x, target))
  return _rows(logps.swapaxes(0, 1), steps * chunk)[:, :length]


def _rows(x, *shape):
  """Reshapes what is behind the rows, which stay where they are."""
  rows = jax.typeof(x).sharding.spec[0]
  # Explicit, since of one row alone jax forgets over what it was cut.
  where = jax.P(rows, *(None,) * len(shape)) if rows else None
  return jnp.reshape(x, (x.shape[0], *shape), out_sharding=where)


def by_vocabulary(
  x: jax.Array,
  weight: jax.Array,
  target: jax.Array,
  chunk: int,
  softcap: float = 0.0,
) -> jax.Array:
  """`whole`, over chunks of the vocabulary, with a running logsumexp.

  A chunk is as large as makes the scores of all positions as many as those of
  `chunk` positions and the whole vocabulary; a vocabulary over several
  devices is cut on each.
  """
  length, (vocab, width) = x.shape[1], weight.shape
  spec = jax.typeof(weight).sharding.spec
  axis = spec.partitions[0]
  parts = jax.typeof(weight).sharding.mesh.shape[axis] if axis else 1
  own = vocab // parts
  steps = min(own, -(-length // min(chunk, length)))
  size = -(-own // steps)

  def cut(y, *shape):
    where = jax.P(axis, *(None,) * len(shape), reduced=spec.reduced)
    where = where if axis else None
    return jnp.reshape(y, (parts, *shape), out_sharding=where)

  padding = (0, 0), (0, steps * size - own), (0, 0)
  cuts = jnp.pad(cut(weight, own, width), padding)
  cuts = cut(cuts, steps, size, width).swapaxes(0, 1)
  # The cast back stands inside the loop, which so sums slopes in float32.
  large, dtype = x.astype(wide(x)), x.dtype

  @jax.checkpoint
  def one(carry, weights, step):
    total, hit = carry
    # [B, L, parts, size]
    scores = decoder.logits(large.astype(dtype), weights, softcap)
    at = step * size + jnp.arange(size)  # in a device's own rows
    real = at < own  # what fills the last chunk is no token
    inside = real[None, :]
    ids = at[None, :] + (own * jnp.arange(parts)[:, None])
    ids = jnp.where(inside, ids, -1)
    scores = jnp.where(real[None, None, None, :], scores, LOW)
    here = ids[None, None] == target[..., None, None]
    hit = hit + jnp.sum(jnp.where(here, scores, 0.0), axis=(2, 3))
    total = jnp.logaddexp(total, jax.nn.logsumexp(scores, axis=(2, 3)))
    return total, hit

  zeros = jnp.zeros_like(target, wide(x))  # laid as the targets are
  (total, hit), _ = jax.lax.scan(
    lambda carry, each: (one(carry, *each), None),
    (zeros + LOW, zeros),
    (cuts, jnp.arange(steps)),
  )
  return hit - total


def next_tokens(tokens: jax.Array) -> jax.Array:
  """[B, L] ids -> what every position predicts; the last predicts nothing."""
  return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))


def token_logps(
  x: jax.Array,
  weight: jax.Array,
  tokens: jax.Array,
  chunk: int = 64,
  softcap: float = 0.0,
  head: Callable[..., jax.Array] = by_positions,
) -> jax.Array:
  """[B, L] float32 nats of every token after those before it; entry 0 is 0.

  `x`, `weight`, `chunk` and `softcap` are as of `head`: `whole`,
  `by_positions` or `by_vocabulary`.
  """
  each = head(x, weight, next_tokens(tokens), chunk, softcap)
  return jnp.pad(each[:, :-1], ((0, 0), (1, 0)))


def masked_sums(
  logps: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Masked sum [B] float32 and count [B] float32 of [B, L] log-probs."""
  mask = mask.astype(wide(logps))
  return jnp.sum(logps * mask, axis=-1), jnp.sum(mask, axis=-1)
