"""Texts to embeddings by an encoder, on the mesh, in length buckets.

Row-parallel and in fixed tiles, as in `passes`: an embedding is the same bits
on any mesh, in any order of the texts and among any other texts.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import normalizers, Tokenizer

from jaxalign.core import progress, sharding
from jaxalign.core.errors import ConfigError, DataError, NumericError
from jaxalign.core.hub import resolve_settings
from jaxalign.model import encoder, weights
from jaxalign.model.parameters import by_row, Params

_CHUNK = 1024  # texts tokenised between two ticks of the bar
_SPARE = 128  # rows a table may have beyond its tokenizer (rounded up sizes)


def read_encoder(
  folder: Any, mesh: jax.sharding.Mesh, pooling: str = ""
) -> tuple[Params, encoder.EncoderConfig, Tokenizer]:
  """Parameters on the mesh, sizes and tokenizer of an encoder's folder.

  Args:
    folder: local, or `hf:<repo>[@revision]`.
    mesh: every device of it gets the whole encoder.
    pooling: as of `encoder.read_encoder_config`.
  """
  m = encoder.read_encoder_config(folder, pooling=pooling)
  tok, layout = read_tokenizer(folder, m), encoder.encoder_layout(m)
  return weights.load_weights(folder, layout, mesh), m, tok


def read_tokenizer(folder: Any, m: encoder.EncoderConfig) -> Tokenizer:
  """`tokenizer.json` of an encoder's folder, cutting texts at its context.

  Raises:
    ConfigError: it is absent, or its vocabulary is not the encoder's.
    DataError: it cannot be read.
  """
  path = resolve_settings(folder) / "tokenizer.json"
  if not path.exists():
    raise ConfigError(
      f"{folder} has no tokenizer.json; save one with "
      "transformers' AutoTokenizer(...).save_pretrained"
    )
  try:
    tok = Tokenizer.from_str(path.read_text())
  except Exception as error:  # tokenizers raises no narrower class
    raise DataError(f"{path} cannot be read: {error}") from error
  size = 1 + max(tok.get_vocab(with_added_tokens=True).values(), default=-1)
  if not size <= m.vocab < size + _SPARE:
    raise ConfigError(
      f"{path} has {size} tokens, the encoder in its folder "
      f"{m.vocab}: they are not of one model"
    )
  tok.no_padding()
  tok.enable_truncation(m.context)
  if m.lower:
    steps = [normalizers.Lowercase(), tok.normalizer]
    tok.normalizer = normalizers.Sequence([s for s in steps if s is not None])
  return tok


def padded_sizes(context: int) -> np.ndarray:
  """The lengths that rows are padded to, ascending, the last the context.

  Steps of 16, and above 64 four to a doubling: few shapes to compile, and a
  twentieth of padding in real texts.
  """
  out, at = [], 16
  while at < context:
    out.append(at)
    at += max(16, 1 << (at.bit_length() - 3))
  return np.array(out + [context])


@functools.lru_cache(maxsize=8)
def _row_fn(mesh, m: encoder.EncoderConfig):
  """Jitted `(params, {tokens, length}, {}) -> [rows, E]`."""

  def one_tile(params, rows, shared):
    del shared
    tokens = rows["tokens"].astype(jnp.int32)
    mask = jnp.arange(tokens.shape[1])[None, :] < rows["length"][:, None]
    x = encoder.forward(params, tokens, mask, m)
    return encoder.pool(x, mask, m)

  return by_row(mesh, encoder.encoder_layout(m).rows, one_tile)


def embed_texts(
  mesh: Any,
  params: Params,
  m: encoder.EncoderConfig,
  tok: Tokenizer,
  texts: Sequence[str],
  *,
  tile: int = 1024,
) -> np.ndarray:
  """Embeds every text.

  Args:
    mesh: the mesh.
    params: on the mesh.
    m: the encoder's sizes, and its pooling.
    tok: as from `read_tokenizer`.
    texts: N texts; an empty one is legal.
    tile: tokens, with padding, that a device runs at once (one row at
      least); part of the numbers' definition. What is right for a CPU's
      caches; a larger device wants more.

  Returns:
    [N, E] float32, in the order of the texts.

  Raises:
    ConfigError: a tile below one token.
    DataError: no texts, or one that has no token.
    NumericError: an embedding that is not finite; names the rows.
  """
  n = len(texts)
  if not n:
    raise DataError("embed: no texts to embed")
  if tile < 1:
    raise ConfigError(f"embed: a tile of {tile} tokens, wanted 1 or more")
  fn, out = _row_fn(mesh, m), np.zeros((n, m.width), np.float32)
  with progress.bar("embed", n) as tick:
    ids = []
    for at in range(0, n, _CHUNK):
      some = [m.prompt + text for text in texts[at : at + _CHUNK]]
      ids += [e.ids for e in tok.encode_batch_fast(some)]
    lengths = np.array([len(i) for i in ids], np.int32)
    if not lengths.all():
      raise DataError(
        f"embed: text {int(np.argmin(lengths))} has no token; "
        "the tokenizer adds none of its own"
      )
    ladder = padded_sizes(m.context)
    buckets = ladder[np.searchsorted(ladder, lengths)]
    waiting = []

    def collect(some, result):
      out[some] = sharding.fetch(result)[: len(some)]
      tick(len(some))

    for size in np.unique(buckets)[::-1]:  # the longest first: memory shows
      index = np.flatnonzero(buckets == size)
      step = max(1, tile // int(size)) * mesh.size
      for at in range(0, len(index), step):
        some = index[at : at + step]
        # A short last call repeats its first row: shapes stay the same.
        full = np.concatenate([some, np.repeat(some[:1], step - len(some))])
        tokens = np.zeros((step, size), np.int32)
        for row, i in zip(tokens, full):
          row[: lengths[i]] = ids[i]
        batch = dict(tokens=tokens, length=lengths[full])
        batch = {k: sharding.put(mesh, x, "pool") for k, x in batch.items()}
        waiting.append((some, fn(params, batch, {})))
        if len(waiting) > 2:  # keep the device busy, the memory bounded
          collect(*waiting.pop(0))
    for some, result in waiting:
      collect(some, result)
  bad = np.flatnonzero(~np.isfinite(out).all(1))
  if len(bad):
    raise NumericError(
      f"embed: {len(bad)} of {n} embeddings are not finite, rows "
      f"{bad[:8].tolist()}; look at these texts and at the encoder's weights"
    )
  return out
