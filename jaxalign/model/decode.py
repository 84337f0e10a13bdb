"""Generation with a key-value cache, row-parallel on the mesh."""

import functools
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import progress
from jaxalign import sharding
from jaxalign.errors import ConfigError
from jaxalign.model import attention
from jaxalign.model import decoder


class Sampling(NamedTuple):
  """How a token is drawn: temperature first, then top-k, then top-p."""

  temperature: float = 1.0  # 0: the most likely token
  top_k: int = 0  # only the k most likely; 0: all
  top_p: float = 1.0  # only the likeliest that together reach p


def check(s: Sampling, vocab: int) -> None:
  """Raises ConfigError for values with no sense."""
  if not s.temperature >= 0 or s.temperature == float("inf"):
    raise ConfigError(f"temperature={s.temperature}, wanted 0 or more")
  if not 0 <= s.top_k <= vocab:
    raise ConfigError(f"top_k={s.top_k}, wanted 0 (all) to {vocab}")
  if not 0 < s.top_p <= 1:
    raise ConfigError(f"top_p={s.top_p}, wanted above 0, at most 1 (all)")


def kept(scores: jax.Array, s: Sampling) -> jax.Array:
  """Scores [b, V] with what top-k and top-p leave out at -1e30.

  As in transformers: ties with the k-th stay, and the token that reaches
  `top_p` stays, so at least one always does.
  """
  if s.top_k:
    least = jax.lax.top_k(scores, s.top_k)[0][:, -1:]
    scores = jnp.where(scores < least, -1e30, scores)
  if s.top_p < 1:
    order = jnp.argsort(-scores, axis=-1, stable=True)
    odds = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1)
    before = jnp.cumsum(odds, axis=-1) - odds  # of all that are likelier
    out = jnp.zeros(scores.shape, bool).at[
        jnp.arange(len(scores))[:, None], order].set(before >= s.top_p)
    scores = jnp.where(out, -1e30, scores)
  return scores


@functools.lru_cache(maxsize=8)
def _generate_fn(mesh, m: decoder.ModelConfig, new: int,
                 stops: tuple[int, ...], known: int, sampling: Sampling):
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
      if sampling.temperature == 0:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
      scores = kept(scores / sampling.temperature, sampling)
      # The noise depends on the row's own number, not on where it runs.
      noise = jax.vmap(lambda i: jax.random.gumbel(
          jax.random.fold_in(jax.random.fold_in(shared["key"], i), t),
          (m.vocab,)))(rows["index"])
      return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)

    empty = jnp.zeros((m.layers, b, total, m.kv_heads, m.head_size), m.dtype)
    x, cache = run(decoder.embed_tokens(params, tokens, m, place), 0, prompt,
                   (empty, empty))
    said = jnp.full((b, new), stops[0], jnp.int32).at[:, 0].set(choose(x, 0))

    def ends(token):
      return jnp.any(token[:, None] == jnp.array(stops)[None, :], axis=1)

    def going(state):
      t, _, ended, _ = state
      # All devices must agree: the next step gathers weights from each.
      alive = jax.lax.psum(jnp.sum(~ended), sharding.AXES)
      return (t < new) & (alive > 0)

    def step(state):
      t, said, ended, cache = state
      token = jax.lax.dynamic_slice_in_dim(said, t - 1, 1, axis=1)
      x, cache = run(decoder.embed_tokens(params, token, m, place),
                     prompt + t - 1, 1, cache)
      token = jnp.where(ended, stops[0], choose(x, t))
      said = jax.lax.dynamic_update_slice_in_dim(said, token[:, None], t, 1)
      return t + 1, said, ended | ends(token), cache

    return jax.lax.while_loop(
        going, step, (jnp.int32(1), said, ends(said[:, 0]), cache))[1]

  return decoder.by_row(mesh, m, one_tile)


def fitting(prompt: np.ndarray, m: decoder.ModelConfig, new: int
            ) -> np.ndarray:
  """The prompt that `new` tokens are generated after: BOS and its end."""
  room = m.context - new
  if len(prompt) <= room:
    return prompt
  return np.concatenate([prompt[:1], prompt[len(prompt) - room + 1:]])


def generate(mesh: Any, params: decoder.Params, m: decoder.ModelConfig,
             prompts: list[np.ndarray], *, new: int, eos: int | Sequence[int],
             known: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, tile: int = 32,
             label: str = "generate") -> list[np.ndarray]:
  """Continues every prompt until EOS or `new` tokens.

  Args:
    mesh: the mesh; each of its devices takes `tile` rows a call.
    params: on the mesh.
    m: the model's sizes; a prompt longer than `m.context - new` loses its
      beginning.
    prompts: n arrays of token ids, each with its BOS.
    new: most tokens to add.
    eos: the id that ends an answer, or several.
    known: ids below this may be drawn (the tokenizer's pieces).
    temperature: 0 is greedy; else softmax(logits / temperature) is sampled.
    top_k: only the k likeliest tokens; 0: all.
    top_p: only the likeliest tokens that together reach p; 1: all.
    seed: of the noise, which depends only on it, the row's number and the
      position: the same tokens on any mesh.
    tile: rows a device runs at once.
    label: what the progress bar says.

  Returns:
    n arrays of new ids; the last one is of `eos` unless the answer was cut.

  Raises:
    ConfigError: no room for a prompt, or sampling with no sense.
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
  stops = tuple(int(i) for i in np.atleast_1d(eos))
  sampling = Sampling(float(temperature), int(top_k), float(top_p))
  check(sampling, m.vocab)
  fn = _generate_fn(mesh, m, new, stops, known, sampling)
  shared = dict(key=jax.random.key(seed))
  step, out = tile * mesh.size, [None] * len(prompts)
  with progress.bar(label, len(prompts)) as tick:
    for size in np.unique(sizes):
      index = np.flatnonzero(sizes == size)
      for at in range(0, len(index), step):
        part = index[at:at + step]
        full = np.concatenate([part, np.repeat(part[:1], step - len(part))])
        tokens = np.full((step, size), stops[0], np.int32)
        for row, i in enumerate(full):
          tokens[row, size - lengths[i]:] = prompts[i]
        rows = dict(tokens=tokens, index=full.astype(np.int32),
                    pad=(size - lengths[full]).astype(np.int32))
        rows = {k: sharding.put(mesh, v, "pool") for k, v in rows.items()}
        said = sharding.fetch(fn(params, rows, shared))
        for i, ids in zip(part, said):
          end = np.flatnonzero(np.isin(ids, stops))
          out[i] = ids[:end[0] + 1] if len(end) else ids
        tick(len(part))
  return out


def operations(m: decoder.ModelConfig, prompts: list[np.ndarray],
               said: list[np.ndarray]) -> int:
  """Floating-point operations of a generation, counting each token once."""
  return sum(decoder.operations(m, len(p) + len(s), logit_rows=len(s))
             for p, s in zip(prompts, said))
