"""Generation with a key-value cache, row-parallel on the mesh."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import progress, sharding
from jaxalign.core.errors import ConfigError
from jaxalign.data.tokens import longest_row, padded_length
from jaxalign.model import decoder
from jaxalign.model.attention import FAR, Seen
from jaxalign.model.decoder import ModelConfig
from jaxalign.model.parameters import by_row, layers_of, Params

_PLACE = sharding.PER_ROW


class Sampling(NamedTuple):
  """How a token is drawn: temperature first, then top-k, then top-p."""

  temperature: float = 1.0  # 0: the most likely token
  top_k: int = 0  # only the k most likely; 0: all
  top_p: float = 1.0  # only the likeliest that together reach p


class GenerateOptions(NamedTuple):
  """What is generated, and in what chunks."""

  new: int  # most tokens of an answer
  eos: int | Sequence[int]  # the id that ends an answer, or several
  known: int  # ids below this may be drawn (the tokenizer's)
  sampling: Sampling = Sampling()
  seed: int = 0  # of the noise: the same tokens on any mesh
  tile: int = 32  # rows a device runs at once
  answers: int = 1  # of each prompt
  label: str = "generate"  # of the progress bar


def check_sampling(s: Sampling, vocab: int) -> None:
  """Raises ConfigError for values with no sense."""
  if not s.temperature >= 0 or s.temperature == float("inf"):
    raise ConfigError(f"temperature={s.temperature}, wanted 0 or more")
  if not 0 <= s.top_k <= vocab:
    raise ConfigError(f"top_k={s.top_k}, wanted 0 (all) to {vocab}")
  if not 0 < s.top_p <= 1:
    raise ConfigError(f"top_p={s.top_p}, wanted above 0, at most 1 (all)")


def keep_likely(scores: jax.Array, s: Sampling) -> jax.Array:
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
    out = jnp.zeros(scores.shape, bool)
    rows = jnp.arange(len(scores))[:, None]
    out = out.at[rows, order].set(before >= s.top_p)
    scores = jnp.where(out, -1e30, scores)
  return scores


def _run(params, tokens, m: ModelConfig, pad, at, cache):
  """Token ids [b, l] from slot `at` on, through all layers.

  `pad` [b] counts the slots of padding on the left, `cache` holds keys and
  values, each [T, b, S, G, C]. Returns [b, l, D] after the final norm, and the
  cache.
  """
  x = decoder.embed_tokens(params, tokens, m, _PLACE)
  slot, length = jnp.arange(cache[0].shape[2]), x.shape[1]
  here = at + jnp.arange(length)
  # A slot of padding, or one not yet written, lies after every query.
  empty = (slot[None, :] < pad[:, None]) | (slot >= at + length)[None, :]
  queries = jnp.maximum(here[None, :] - pad[:, None], 0)
  keys = jnp.where(empty, FAR, slot[None, :] - pad[:, None])
  rows = decoder.positions_of(m, Seen(queries, keys))

  def body(x, stack):
    layer, kind, *cache = stack
    return decoder.block(x, layer, kind, rows, m, _PLACE, tuple(cache), at)

  stack = layers_of(params), decoder.kinds_of(m), *cache
  x, cache = jax.lax.scan(body, x, stack)
  return decoder.normed(x, params, "norm", m), cache


@functools.lru_cache(maxsize=8)
def _prefill_fn(mesh, m: ModelConfig):
  """Jitted `(params, {tokens [b, P], pad [b]}, {}) -> {x, keys, values}`."""

  def prefill(params, rows, shared):
    del shared
    tokens, pad = rows["tokens"], rows["pad"]  # padded on the left
    shape = (m.layers, *tokens.shape, m.kv_heads, m.head_size)
    empty = jnp.zeros(shape, m.dtype)
    x, cache = _run(params, tokens, m, pad, 0, (empty, empty))
    keys, values = (jnp.moveaxis(each, 0, 1) for each in cache)
    return dict(x=x[:, -1:], keys=keys, values=values)

  return by_row(mesh, decoder.table(m), prefill)


@functools.lru_cache(maxsize=8)
def _answer_fn(mesh, m: ModelConfig, new, stops, known, sampling: Sampling):
  """Jitted `(params, rows, {key}) -> [b, new]` ids.

  `rows` are b prompts of a device as `_prefill_fn` left them, with their
  "pad", and b answers: "owner", the prompt of each, and "index", its number.
  """

  def choose(rows, key, head, x, t):
    scores = decoder.logits(x[:, -1:], head, m.final_softcap)[:, 0]
    # Ids past the tokenizer's only round the table up.
    scores = jnp.where(jnp.arange(m.vocab)[None, :] < known, scores, -1e30)
    if sampling.temperature == 0:
      return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    scores = keep_likely(scores / sampling.temperature, sampling)

    def noise(i):  # depends on the row's own number, not on where it runs
      own = jax.random.fold_in(jax.random.fold_in(key, i), t)
      return jax.random.gumbel(own, (m.vocab,))

    noise = jax.vmap(noise)(rows["index"])
    return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)

  def ends(token):
    return jnp.any(token[:, None] == jnp.array(stops)[None, :], axis=1)

  def answer(params, rows, shared):
    owner = rows["owner"]
    prompt = rows["keys"].shape[2]
    head = decoder.head(params, m, _PLACE).astype(m.dtype)
    draw = functools.partial(choose, rows, shared["key"], head)
    # Many answers have one prompt: each a copy of what was computed once.
    pad = rows["pad"][owner]
    room = ((0, 0), (0, 0), (0, new), (0, 0), (0, 0))
    copy = lambda x: jnp.pad(jnp.moveaxis(x[owner], 1, 0), room)
    cache = copy(rows["keys"]), copy(rows["values"])
    ids = jnp.full((len(owner), new), stops[0], jnp.int32)
    ids = ids.at[:, 0].set(draw(rows["x"][owner], 0))

    def going(state):
      t, _, ended, _ = state
      # All devices must agree: the next step gathers weights from each.
      alive = jax.lax.psum(jnp.sum(~ended), sharding.AXES)
      return (t < new) & (alive > 0)

    def step(state):
      t, ids, ended, cache = state
      token = jax.lax.dynamic_slice_in_dim(ids, t - 1, 1, axis=1)
      x, cache = _run(params, token, m, pad, prompt + t - 1, cache)
      token = jnp.where(ended, stops[0], draw(x, t))
      ids = jax.lax.dynamic_update_slice_in_dim(ids, token[:, None], t, 1)
      return t + 1, ids, ended | ends(token), cache

    start = jnp.int32(1), ids, ends(ids[:, 0]), cache
    return jax.lax.while_loop(going, step, start)[1]

  return by_row(mesh, decoder.table(m), answer)


def fitting(prompt: np.ndarray, m: ModelConfig, new: int) -> np.ndarray:
  """The prompt that `new` tokens are generated after: BOS and its end."""
  room = m.context - new
  if len(prompt) <= room:
    return prompt
  return np.concatenate([prompt[:1], prompt[len(prompt) - room + 1 :]])


def generate(
  mesh: Any,
  params: Params,
  m: ModelConfig,
  prompts: list[np.ndarray],
  options: GenerateOptions,
) -> list[np.ndarray]:
  """Continues every prompt until EOS or `options.new` tokens.

  A prompt that is there several times, or has several answers, is computed
  once (once a device, where there are more devices than prompts).

  Args:
    mesh: the mesh; each of its devices takes `options.tile` rows a call.
    params: on the mesh.
    m: the model's sizes; a prompt longer than `m.context - new` loses its
      beginning.
    prompts: n arrays of token ids, each with its BOS.
    options: k answers to each. Answer j of prompt i is row i k + j: the same
      as of a list in which every prompt stands k times, since the noise
      depends only on the seed, the row's number and the position.

  Returns:
    n k arrays of new ids; the last one is of `eos` unless the answer was cut.

  Raises:
    ConfigError: no room for a prompt, or sampling with no sense.
  """
  o, put = options, lambda x: sharding.put(mesh, x, "pool")
  if not 0 < o.new < m.context:
    raise ConfigError(
      f"{o.new} new tokens in a context of {m.context}, wanted at least 1 and "
      "room for a prompt; set config.eval.new_tokens"
    )
  check_sampling(o.sampling, m.vocab)
  prompts = [fitting(p, m, o.new) for p in prompts]
  lengths = np.array([len(p) for p in prompts])
  # Only the compiled shape is bucketed; padding is hidden by the mask.
  longest = longest_row(lengths, m.context - o.new)
  sizes = np.array([padded_length(int(x), longest) for x in lengths])
  stops = tuple(int(i) for i in np.atleast_1d(o.eos))
  prefill = _prefill_fn(mesh, m)
  answer = _answer_fn(mesh, m, o.new, stops, o.known, o.sampling)
  shared = dict(key=jax.random.key(o.seed))
  step, out = o.tile * mesh.size, [None] * (len(prompts) * o.answers)
  with progress.bar(o.label, len(out)) as tick:
    for size in np.unique(sizes):
      same = _row_groups(prompts, np.flatnonzero(sizes == size), o, mesh.size)
      for at in range(0, len(same), step):
        groups = same[at : at + step]
        own = [groups[d :: mesh.size] for d in range(mesh.size)]  # of a device
        first = [[g[0] // o.answers for g in of or groups[:1]] for of in own]
        padded = _padded([[prompts[i] for i in of] for of in first], size, o)
        done = {name: put(x) for name, x in padded.items()}
        done = dict(prefill(params, done, {}), pad=done["pad"])
        for rows, index, owner in _calls(own, o.tile):
          more = dict(index=put(index), owner=put(owner))
          ids = sharding.fetch(answer(params, done | more, shared))
          for row, x in zip(rows, ids):
            if row >= 0:
              end = np.flatnonzero(np.isin(x, stops))
              out[row] = x[: end[0] + 1] if len(end) else x
          tick(int((rows >= 0).sum()))
  return out


def _row_groups(prompts, index, o, devices) -> list[list[int]]:
  """Row numbers that share a prompt, one list each time it is computed: once;
  where there are fewer prompts than devices, on several, which divide the rows.
  """
  same: dict[bytes, list[int]] = {}
  for i in index:
    rows = range(i * o.answers, (i + 1) * o.answers)
    same.setdefault(prompts[i].tobytes(), []).extend(rows)
  times = max(1, devices // len(same))
  groups = [rows[k::times] for rows in same.values() for k in range(times)]
  return [rows for rows in groups if rows]


def _padded(by_device, size, o) -> dict[str, np.ndarray]:
  """Tokens [devices * tile, size], padded on the left, and their padding."""
  eos = int(np.atleast_1d(o.eos)[0])
  tokens = np.full((len(by_device) * o.tile, size), eos, np.int32)
  pad = np.zeros(len(tokens), np.int32)
  for row in range(len(tokens)):
    of = by_device[row // o.tile]
    prompt = of[min(row % o.tile, len(of) - 1)]  # the last fills what is left
    pad[row] = size - len(prompt)
    tokens[row, pad[row] :] = prompt
  return dict(tokens=tokens, pad=pad)


def _calls(own, tile):
  """Yields (row numbers, -1 of a spare; "index"; "owner") of each call."""
  todo = [[(row, k) for k, rows in enumerate(of) for row in rows] for of in own]
  for first in range(0, max(map(len, todo)), tile):
    index, owner = np.zeros((2, tile * len(own)), np.int32)
    wanted = np.full(tile * len(own), -1)
    for d, of in enumerate(todo):
      now, at = of[first : first + tile], d * tile
      spare = (now or of or todo[0])[0]  # shapes stay the same
      filled = now + [spare] * (tile - len(now))
      rows, places = np.transpose(filled)
      index[at : at + tile] = rows
      owner[at : at + tile] = places if of else 0
      wanted[at : at + len(now)] = rows[: len(now)]
    yield wanted, index, owner
