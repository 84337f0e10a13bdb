"""Generation with a key-value cache, row-parallel on the mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import progress
from jaxalign import sharding
from jaxalign.errors import ConfigError
from jaxalign.model import attention
from jaxalign.model import decoder


@functools.lru_cache(maxsize=8)
def _generate_fn(mesh, m: decoder.ModelConfig, new: int, eos: int, known: int,
                 greedy: bool):
  place = sharding.PER_ROW

  def one_tile(params, rows, shared):
    tokens, pad = rows["tokens"], rows["pad"]  # [b, P] left-padded, [b]
    b, prompt = tokens.shape
    total = prompt + new
    head = decoder.head(params, m, place).astype(m.dtype)
    layers = decoder.layers_of(params)
    slot = jnp.arange(total)

    def run(x, at, length, cache):
      """`length` positions from slot `at`, through all layers."""
      here = at + jnp.arange(length)
      # A slot of padding, or one not yet written, lies after every query.
      empty = (slot[None, :] < pad[:, None]) | (slot >= at + length)[None, :]
      rows_seen = decoder.rows_of(m, attention.Seen(
          jnp.maximum(here[None, :] - pad[:, None], 0),
          jnp.where(empty, attention.FAR, slot[None, :] - pad[:, None])))

      def body(x, layer_cache):
        layer, kind, keys, values = layer_cache
        return decoder.block(x, layer, kind, rows_seen, m, place,
                             (keys, values), at)

      x, cache = jax.lax.scan(body, x, (layers, decoder.kinds_of(m), *cache))
      return decoder.normed(x, params, "norm", m), cache

    def choose(x, t):
      scores = decoder.logits(x[:, -1:], head, m.final_softcap)[:, 0]
      # Ids past the tokenizer's pieces only round the table up.
      scores = jnp.where(jnp.arange(m.vocab)[None, :] < known, scores, -1e30)
      if greedy:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
      # The noise depends on the row's own number, not on where it runs.
      noise = jax.vmap(lambda i: jax.random.gumbel(
          jax.random.fold_in(jax.random.fold_in(shared["key"], i), t),
          (m.vocab,)))(rows["index"])
      return jnp.argmax(scores / shared["temperature"] + noise,
                        axis=-1).astype(jnp.int32)

    empty = jnp.zeros((m.layers, b, total, m.kv_heads, m.head_size), m.dtype)
    x, cache = run(decoder.embed_tokens(params, tokens, m, place), 0, prompt,
                   (empty, empty))
    first = choose(x, 0)

    def step(carry, t):
      token, ended, cache = carry
      ended = ended | (token == eos)
      x, cache = run(decoder.embed_tokens(params, token[:, None], m, place),
                     prompt + t, 1, cache)
      following = jnp.where(ended, eos, choose(x, t + 1))
      return (following, ended, cache), token

    (last, _, _), said = jax.lax.scan(
        step, (first, jnp.zeros(b, bool), cache), jnp.arange(new - 1))
    return jnp.concatenate([said.T, last[:, None]], axis=1)

  axes = {n: p.axes for n, p in decoder.table(m).items()}
  return jax.jit(sharding.per_row(mesh, one_tile, axes))


def fitting(prompt: np.ndarray, m: decoder.ModelConfig, new: int
            ) -> np.ndarray:
  """The prompt that `new` tokens are generated after: BOS and its end."""
  room = m.context - new
  if len(prompt) <= room:
    return prompt
  return np.concatenate([prompt[:1], prompt[len(prompt) - room + 1:]])


def generate(mesh: Any, params: decoder.Params, m: decoder.ModelConfig,
             prompts: list[np.ndarray], *, new: int, eos: int, known: int,
             temperature: float = 1.0, seed: int = 0, tile: int = 32,
             label: str = "generate") -> list[np.ndarray]:
  """Continues every prompt until EOS or `new` tokens.

  Args:
    mesh: the mesh; each of its devices takes `tile` rows a call.
    params: on the mesh.
    m: the model's sizes; a prompt longer than `m.context - new` loses its
      beginning.
    prompts: n arrays of token ids, each with its BOS.
    new: most tokens to add.
    eos: the id that ends an answer.
    known: ids below this may be drawn (the tokenizer's pieces).
    temperature: 0 is greedy; else softmax(logits / temperature) is sampled.
    seed: of the noise, which depends only on it, the row's number and the
      position: the same tokens on any mesh.
    tile: rows a device runs at once.
    label: what the progress bar says.

  Returns:
    n arrays of new ids; the last one is `eos` unless the answer was cut.
  """
  from jaxalign.data import tokens as tokens_lib
  if not 0 < new < m.context:
    raise ConfigError(f"{new} new tokens in a context of {m.context}, wanted "
                      "at least 1 and room for a prompt; set "
                      "config.eval.new_tokens")
  prompts = [fitting(p, m, new) for p in prompts]
  lengths = np.array([len(p) for p in prompts])
  # Only the compiled shape is bucketed; padding is hidden by the mask.
  longest = tokens_lib.longest(lengths, m.context - new)
  sizes = np.array([tokens_lib.bucket(int(x), longest) for x in lengths])
  fn = _generate_fn(mesh, m, new, eos, known, temperature == 0)
  shared = dict(key=jax.random.key(seed),
                temperature=jnp.float32(max(temperature, 1e-6)))
  step, out = tile * mesh.size, [None] * len(prompts)
  with progress.bar(label, len(prompts)) as tick:
    for size in np.unique(sizes):
      index = np.flatnonzero(sizes == size)
      for at in range(0, len(index), step):
        part = index[at:at + step]
        full = np.concatenate([part, np.repeat(part[:1], step - len(part))])
        tokens = np.full((step, size), eos, np.int32)
        for row, i in enumerate(full):
          tokens[row, size - lengths[i]:] = prompts[i]
        rows = dict(tokens=tokens, index=full.astype(np.int32),
                    pad=(size - lengths[full]).astype(np.int32))
        rows = {k: sharding.put(mesh, v, "pool") for k, v in rows.items()}
        said = sharding.fetch(fn(params, rows, shared))
        for i, ids in zip(part, said):
          end = np.flatnonzero(ids == eos)
          out[i] = ids[:end[0] + 1] if len(end) else ids
        tick(len(part))
  return out


def operations(m: decoder.ModelConfig, prompts: list[np.ndarray],
               said: list[np.ndarray]) -> int:
  """Floating-point operations of a generation, counting each token once."""
  return sum(decoder.operations(m, len(p) + len(s), logit_rows=len(s))
             for p, s in zip(prompts, said))
