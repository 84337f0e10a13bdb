"""Log-probabilities of given tokens, without ever holding [B, L, V]."""

import jax
import jax.numpy as jnp

from jaxalign.model import decoder


def token_logps(x: jax.Array, weight: jax.Array, tokens: jax.Array,
                chunk: int = 64, softcap: float = 0.0) -> jax.Array:
  """log p(tokens[:, t+1] | tokens[:, :t+1]) for every t, in float32.

  The head runs over `chunk` positions at a time and is recomputed in the
  backward pass, so the largest buffer is [B, chunk, V]. Products accumulate
  and leave in float32 (pitfall: bfloat16 logits cost 0.3 nat per 300 tokens).

  Args:
    x: [B, L, D] hidden states after the final norm.
    weight: [V, D] output matrix, as from `decoder.head`.
    tokens: [B, L] ids.
    chunk: positions a step.
    softcap: `ModelConfig.final_softcap`.

  Returns:
    [B, L] float32 nats; the entry at t is of token t, entry 0 is 0.
  """
  batch, length, width = x.shape
  chunk = min(chunk, length)
  steps = -(-length // chunk)
  pad = steps * chunk - length
  # Position t predicts token t + 1; the last position predicts nothing.
  target = jnp.pad(tokens[:, 1:], ((0, 0), (0, pad + 1)))
  x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)))
  x = x.reshape(batch, steps, chunk, width).swapaxes(0, 1)
  target = target.reshape(batch, steps, chunk).swapaxes(0, 1)
  vocab = jnp.arange(weight.shape[0])[None, None, :]

  @jax.checkpoint
  def one(x, target):
    scores = decoder.logits(x, weight, softcap)
    # A comparison and a sum, not a gather: it works on a sharded vocabulary.
    hit = jnp.sum(jnp.where(vocab == target[..., None], scores, 0.0), axis=-1)
    return hit - jax.nn.logsumexp(scores, axis=-1)

  _, logps = jax.lax.scan(lambda _, xt: (None, one(*xt)), None, (x, target))
  logps = logps.swapaxes(0, 1).reshape(batch, steps * chunk)[:, :length - 1]
  return jnp.pad(logps, ((0, 0), (1, 0)))


def sums(logps: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Masked sum [B] float32 and count [B] float32 of [B, L] log-probs."""
  mask = mask.astype(jnp.float32)
  return jnp.sum(logps * mask, axis=-1), jnp.sum(mask, axis=-1)
