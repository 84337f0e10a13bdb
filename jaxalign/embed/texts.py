"""Texts to embeddings by an encoder, on the mesh, in length buckets.

Row-parallel and in fixed tiles, as in `embed`: an embedding is the same bits
on any mesh, under any order of the texts and beside any other texts.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxalign.core import progress, sharding
from jaxalign.core.errors import ConfigError, DataError, NumericError
from jaxalign.core.hub import resolve_settings
from jaxalign.model import encoder, weights
from jaxalign.model.flops import encoder_flops
from jaxalign.model.parameters import by_row, Params

_CHUNK = 1024  # texts tokenised between two ticks of the bar
_SPARE = 128  # rows a table may have beyond its tokenizer (rounded up sizes)


def read_encoder(
  folder: Any, mesh: jax.sharding.Mesh, pooling: str = ""
) -> tuple[Params, encoder.EncoderConfig, tokenizers.Tokenizer]:
  """Parameters on the mesh, sizes and tokenizer of an encoder's folder.

  Args:
    folder: local, or `hf:<repo>[@revision]`.
    mesh: every device of it gets the whole encoder.
    pooling: as of `encoder.read_encoder_config`.
  """
  m = encoder.read_encoder_config(folder, pooling=pooling)
  tok = read_tokenizer(folder, m)
  return weights.load_weights(folder, encoder.encoder_layout(m), mesh), m, tok


def read_tokenizer(
  folder: Any, m: encoder.EncoderConfig
) -> tokenizers.Tokenizer:
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
    tok = tokenizers.Tokenizer.from_str(path.read_text())
  except Exception as error:  # tokenizers raises no narrower class
    raise DataError(f"{path} cannot be read: {error}") from error
  size = 1 + max(tok.get_vocab(with_added_tokens=True).values(), default=-1)
  if not size <= m.vocab < size + _SPARE:
    raise ConfigError(
      f"{path} has {size} tokens, the encoder beside it "
      f"{m.vocab}: they are not of one model"
    )
  tok.no_padding()
  tok.enable_truncation(m.context)
  if m.lower:
    first = tokenizers.normalizers.Lowercase()
    tok.normalizer = (
      first
      if tok.normalizer is None
      else tokenizers.normalizers.Sequence([first, tok.normalizer])
    )
  return tok


def sizes(context: int) -> np.ndarray:
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
  tok: tokenizers.Tokenizer,
  texts: Sequence[str],
  *,
  tile: int = 1024,
  label: str = "embed",
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
    label: what the progress bar says.

  Returns:
    [N, E] float32, in the order of the texts.

  Raises:
    ConfigError: a tile below one token.
    DataError: no texts, or one that has no token.
    NumericError: an embedding that is not finite; names the rows.
  """
  if not len(texts):
    raise DataError(f"{label}: no texts to embed")
  if tile < 1:
    raise ConfigError(f"{label}: a tile of {tile} tokens, wanted 1 or more")
  fn = _row_fn(mesh, m)
  n = len(texts)
  out = np.zeros((n, m.width), np.float32)
  with progress.bar(label, n) as tick:
    ids = []
    for at in range(0, n, _CHUNK):
      part = [m.prompt + text for text in texts[at : at + _CHUNK]]
      ids += [e.ids for e in tok.encode_batch_fast(part)]
    lengths = np.array([len(i) for i in ids], np.int32)
    if not lengths.all():
      raise DataError(
        f"{label}: text {int(np.argmin(lengths))} has no token; "
        "the tokenizer adds none of its own"
      )
    ladder = sizes(m.context)
    buckets = ladder[np.searchsorted(ladder, lengths)]
    waiting = []
    for size in np.unique(buckets)[::-1]:  # the longest first: memory shows
      index = np.flatnonzero(buckets == size)
      step = max(1, tile // int(size)) * mesh.size
      for at in range(0, len(index), step):
        part = index[at : at + step]
        # A short last call repeats its first row: shapes stay the same.
        full = np.concatenate([part, np.repeat(part[:1], step - len(part))])
        tokens = np.zeros((step, size), np.int32)
        for row, i in zip(tokens, full):
          row[: lengths[i]] = ids[i]
        batch = dict(
          tokens=sharding.put(mesh, tokens, "pool"),
          length=sharding.put(mesh, lengths[full], "pool"),
        )
        waiting.append((part, fn(params, batch, {})))
        if len(waiting) > 2:  # keep the device busy, the memory bounded
          _collect(out, *waiting.pop(0), tick)
    for part, result in waiting:
      _collect(out, part, result, tick)
  bad = np.flatnonzero(~np.isfinite(out).all(1))
  if len(bad):
    raise NumericError(
      f"{label}: {len(bad)} of {n} embeddings are not "
      f"finite, rows {bad[:8].tolist()}; look at these texts "
      "and at the encoder's weights"
    )
  return out


def _collect(out: np.ndarray, part: np.ndarray, result, tick) -> None:
  out[part] = sharding.fetch(result)[: len(part)]
  tick(len(part))


def flops(m: encoder.EncoderConfig, lengths: np.ndarray) -> int:
  """Floating-point operations of rows of these lengths, no padding."""
  each, counts = np.unique(lengths, return_counts=True)
  return int(
    sum(encoder_flops(m, int(s)) * int(c) for s, c in zip(each, counts))
  )
