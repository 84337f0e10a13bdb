"""Generation with a key-value cache, row-parallel on the mesh."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import progress, sharding
from jaxalign.errors import ConfigError
from jaxalign.model import attention, decoder


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
    out = (
      jnp.zeros(scores.shape, bool)
      .at[jnp.arange(len(scores))[:, None], order]
      .set(before >= s.top_p)
    )
    scores = jnp.where(out, -1e30, scores)
  return scores


def _run(params, x, m: decoder.ModelConfig, pad, at, cache):
  """`x` [b, l, D] from slot `at` on, through all layers.

  Args:
    params: the parameters.
    x: embedded tokens.
    m: the model's sizes.
    pad: [b] slots of padding, on the left.
    at: the first slot that is written.
    cache: (keys, values), each [T, b, S, G, C].

  Returns:
    [b, l, D] after the final norm, and the cache.
  """
  slot, length = jnp.arange(cache[0].shape[2]), x.shape[1]
  here = at + jnp.arange(length)
  # A slot of padding, or one not yet written, lies after every query.
  empty = (slot[None, :] < pad[:, None]) | (slot >= at + length)[None, :]
  seen = decoder.rows_of(
    m,
    attention.Seen(
      jnp.maximum(here[None, :] - pad[:, None], 0),
      jnp.where(empty, attention.FAR, slot[None, :] - pad[:, None]),
    ),
  )

  def body(x, layer_cache):
    layer, kind, keys, values = layer_cache
    return decoder.block(
      x, layer, kind, seen, m, sharding.PER_ROW, (keys, values), at
    )

  x, cache = jax.lax.scan(
    body, x, (decoder.layers_of(params), decoder.kinds_of(m), *cache)
  )
  return decoder.normed(x, params, "norm", m), cache


@functools.lru_cache(maxsize=8)
def _prefill_fn(mesh, m: decoder.ModelConfig):
  """Jitted `(params, {tokens [b, P], pad [b]}, {}) -> {x, keys, values}`."""

  def one_tile(params, rows, shared):
    del shared
    tokens = rows["tokens"]  # left-padded
    empty = jnp.zeros(
      (m.layers, *tokens.shape, m.kv_heads, m.head_size), m.dtype
    )
    x, cache = _run(
      params,
      decoder.embed_tokens(params, tokens, m, sharding.PER_ROW),
      m,
      rows["pad"],
      0,
      (empty, empty),
    )
    keys, values = (jnp.moveaxis(part, 0, 1) for part in cache)
    return dict(x=x[:, -1:], keys=keys, values=values)

  return decoder.by_row(mesh, m, one_tile)


@functools.lru_cache(maxsize=8)
def _answer_fn(
  mesh,
  m: decoder.ModelConfig,
  new: int,
  stops: tuple[int, ...],
  known: int,
  sampling: Sampling,
):
  """Jitted `(params, rows, {key}) -> [b, new]` ids.

  `rows` are b prompts of a device as `_prefill_fn` left them, with their
  "pad", and b answers: "owner", the prompt of each, and "index", its number.
  """
  place = sharding.PER_ROW

  def one_tile(params, rows, shared):
    owner = rows["owner"]
    b, prompt = len(owner), rows["keys"].shape[2]
    head = decoder.head(params, m, place).astype(m.dtype)
    # Many answers have one prompt: each a copy of what was computed once.
    pad = rows["pad"][owner]
    cache = tuple(
      jnp.pad(
        jnp.moveaxis(rows[name][owner], 1, 0),
        ((0, 0), (0, 0), (0, new), (0, 0), (0, 0)),
      )
      for name in ("keys", "values")
    )

    def choose(x, t):
      scores = decoder.logits(x[:, -1:], head, m.final_softcap)[:, 0]
      # Ids past the tokenizer's pieces only round the table up.
      scores = jnp.where(jnp.arange(m.vocab)[None, :] < known, scores, -1e30)
      if sampling.temperature == 0:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
      scores = kept(scores / sampling.temperature, sampling)
      # The noise depends on the row's own number, not on where it runs.
      noise = jax.vmap(
        lambda i: jax.random.gumbel(
          jax.random.fold_in(jax.random.fold_in(shared["key"], i), t),
          (m.vocab,),
        )
      )(rows["index"])
      return jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)

    said = (
      jnp.full((b, new), stops[0], jnp.int32)
      .at[:, 0]
      .set(choose(rows["x"][owner], 0))
    )

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
      x, cache = _run(
        params,
        decoder.embed_tokens(params, token, m, place),
        m,
        pad,
        prompt + t - 1,
        cache,
      )
      token = jnp.where(ended, stops[0], choose(x, t))
      said = jax.lax.dynamic_update_slice_in_dim(said, token[:, None], t, 1)
      return t + 1, said, ended | ends(token), cache

    return jax.lax.while_loop(
      going, step, (jnp.int32(1), said, ends(said[:, 0]), cache)
    )[1]

  return decoder.by_row(mesh, m, one_tile)


def fitting(prompt: np.ndarray, m: decoder.ModelConfig, new: int) -> np.ndarray:
  """The prompt that `new` tokens are generated after: BOS and its end."""
  room = m.context - new
  if len(prompt) <= room:
    return prompt
  return np.concatenate([prompt[:1], prompt[len(prompt) - room + 1 :]])


def generate(
  mesh: Any,
  params: decoder.Params,
  m: decoder.ModelConfig,
  prompts: list[np.ndarray],
  *,
  new: int,
  eos: int | Sequence[int],
  known: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  tile: int = 32,
  answers: int = 1,
  label: str = "generate",
) -> list[np.ndarray]:
  """Continues every prompt until EOS or `new` tokens.

  A prompt that is there several times, or is asked for several answers, is
  computed once (once a device, where there are more devices than prompts).

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
    answers: of each prompt, k. Answer j of prompt i is row i k + j: the same
      as of a list in which every prompt stands k times.
    label: what the progress bar says.

  Returns:
    n k arrays of new ids; the last one is of `eos` unless the answer was cut.

  Raises:
    ConfigError: no room for a prompt, or sampling with no sense.
  """
  from jaxalign.data import tokens as tokens_lib

  if not 0 < new < m.context:
    raise ConfigError(
      f"{new} new tokens in a context of {m.context}, wanted "
      "at least 1 and room for a prompt; set "
      "config.eval.new_tokens"
    )
  prompts = [fitting(p, m, new) for p in prompts]
  lengths = np.array([len(p) for p in prompts])
  # Only the compiled shape is bucketed; padding is hidden by the mask.
  longest = tokens_lib.longest(lengths, m.context - new)
  sizes = np.array([tokens_lib.bucket(int(x), longest) for x in lengths])
  stops = tuple(int(i) for i in np.atleast_1d(eos))
  sampling = Sampling(float(temperature), int(top_k), float(top_p))
  check(sampling, m.vocab)
  prefill = _prefill_fn(mesh, m)
  answer = _answer_fn(mesh, m, new, stops, known, sampling)
  shared = dict(key=jax.random.key(seed))
  put = lambda x: sharding.put(mesh, x, "pool")
  step, out = tile * mesh.size, [None] * (len(prompts) * answers)
  with progress.bar(label, len(out)) as tick:
    for size in np.unique(sizes):
      slots = _slots(prompts, np.flatnonzero(sizes == size), answers, mesh.size)
      for at in range(0, len(slots), step):
        part = slots[at : at + step]
        own = [part[d :: mesh.size] for d in range(mesh.size)]  # of a device
        tokens = np.full((step, size), stops[0], np.int32)
        pad = np.zeros(step, np.int32)
        for place in range(step):
          of = own[place // tile] or part[:1]  # none: any prompt will do
          prompt = prompts[of[min(place % tile, len(of) - 1)][0] // answers]
          tokens[place, size - len(prompt) :] = prompt
          pad[place] = size - len(prompt)
        rows = dict(tokens=put(tokens), pad=put(pad))
        rows = dict(prefill(params, rows, {}), pad=rows["pad"])
        todo = [
          [(row, k) for k, slot in enumerate(of) for row in slot] for of in own
        ]
        for first in range(0, max(map(len, todo)), tile):
          index, owner = np.zeros((2, step), np.int32)
          wanted = np.full(step, -1)
          for d, of in enumerate(todo):
            now = of[first : first + tile]
            spare = (now or of or todo[0])[0]  # shapes stay the same
            for k in range(tile):
              row, place = now[k] if k < len(now) else spare
              index[d * tile + k] = row
              owner[d * tile + k] = place if of else 0
              wanted[d * tile + k] = row if k < len(now) else -1
          said = sharding.fetch(
            answer(
              params, rows | dict(index=put(index), owner=put(owner)), shared
            )
          )
          for row, ids in zip(wanted, said):
            if row >= 0:
              end = np.flatnonzero(np.isin(ids, stops))
              out[row] = ids[: end[0] + 1] if len(end) else ids
          tick(int((wanted >= 0).sum()))
  return out


def _slots(
  prompts: list[np.ndarray], index: np.ndarray, answers: int, devices: int
) -> list[list[int]]:
  """Row numbers that share a prompt, one list each time it is computed.

  Once; where there are fewer prompts than devices, on several of these, which
  share the rows.
  """
  same: dict[bytes, list[int]] = {}
  for i in index:
    same.setdefault(prompts[i].tobytes(), []).extend(
      range(i * answers, (i + 1) * answers)
    )
  times = max(1, devices // len(same))
  found = [rows[k::times] for rows in same.values() for k in range(times)]
  return [rows for rows in found if rows]


def flops(
  m: decoder.ModelConfig, prompts: list[np.ndarray], said: list[np.ndarray]
) -> int:
  """Floating-point operations of a generation, counting each token once."""
  return sum(
    decoder.flops(m, len(p) + len(s), logit_rows=len(s))
    for p, s in zip(prompts, said)
  )
