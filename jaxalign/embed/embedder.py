"""What embeds the pool: the reference itself, or a model that costs less.

With the reference whole, one pass yields the embedding and the reference's
log-probabilities. Its first layers, another decoder or an encoder yield the
embedding alone; the reference then runs over the kept rows only, or, where a
sampler reads its log-probabilities, over all in the pass that embeds them.
"""

from collections.abc import Callable
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import hub, progress, sharding
from jaxalign.core.errors import ConfigError
from jaxalign.data import tokens as tokens_lib
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.embed import passes
from jaxalign.model import decoder, encoder, families, hf, weights
from jaxalign.model.flops import decoder_flops, encoder_flops


class Embedder(NamedTuple):
  """Which model embeds, sized but not loaded."""

  model: decoder.ModelConfig | encoder.EncoderConfig
  folder: str  # "": the reference, or its first layers
  pooling: str
  alone: bool  # it yields no log-probabilities of the reference
  answers: bool = False  # of an encoder: it reads the answers alone


def by_reference(c: Any) -> bool:
  """Whether the reference's weights embed, all of its layers or the first."""
  return c.embed.checkpoint in ("", c.model.checkpoint)


def alone(c: Any) -> bool:
  """Whether an embedding comes without the reference's log-probabilities."""
  return not by_reference(c) or bool(c.embed.layers)


def first_layers(m: decoder.ModelConfig, layers: int) -> decoder.ModelConfig:
  """The same decoder cut after `layers`; without a head of its own."""
  if not 0 < layers <= m.layers:
    raise ConfigError(
      f"embed.layers={layers}, the model has {m.layers}; set "
      "config.embed.layers"
    )
  return m._replace(layers=layers, kinds=m.kinds[:layers], tied=True, lora=None)


def choose(c: Any, reference: decoder.ModelConfig) -> Embedder:
  """The embedder that a config asks for; reads its config.json.

  Raises:
    ConfigError: an unknown model, too many layers, or a pooling that this
      kind of model has not.
  """
  given, layers, pooling = c.embed.checkpoint, c.embed.layers, c.embed.pooling
  kind = hf.model_type(given) if given else ""
  if kind in encoder.FAMILIES:
    if layers:
      raise ConfigError(
        f"embed.layers={layers} is of decoders, but "
        f"{given} is a {kind}; set config.embed.layers=0"
      )
    m = _encoder(given, "" if pooling in ("auto", "response") else pooling)
    return Embedder(m, given, m.pooling, True, pooling == "response")
  if pooling not in passes.POOLINGS:
    raise ConfigError(
      f"embed.pooling={pooling!r} is not of a decoder, wanted "
      f"{' or '.join(passes.POOLINGS)}; set "
      "config.embed.pooling"
    )
  if by_reference(c):
    m = first_layers(reference, layers) if layers else reference
    return Embedder(m, "", pooling, alone(c))
  m = hf.read_config(given, c.model.dtype, "none")
  m = m._replace(
    context=min(m.context, c.model.context), attention=reference.attention
  )
  return Embedder(first_layers(m, layers or m.layers), given, pooling, True)


def of_answers(e: Embedder) -> Embedder:
  """What embeds the answers alone, with the weights that embed the rows.

  A decoder's states are pooled over the answer's tokens, which saw the
  prompt; an encoder, made for whole texts, is given the answer's text only.
  """
  if isinstance(e.model, encoder.EncoderConfig):
    return e._replace(answers=True)
  return e._replace(pooling="response")


def _encoder(given: str, pooling: str) -> encoder.EncoderConfig:
  try:
    return encoder.read_encoder_config(given, pooling=pooling)
  except ConfigError:
    if (raw := families.PUBLISHED.get(given)) is None:
      raise
    return encoder.EncoderConfig(  # to plan with
      layers=raw["num_hidden_layers"],
      width=raw["hidden_size"],
      heads=raw["num_attention_heads"],
      ff=raw["intermediate_size"],
      vocab=raw["vocab_size"],
      positions=raw["max_position_embeddings"],
      context=raw["max_position_embeddings"],
      pooling=pooling or "mean",
    )


def digest_names(e: Embedder) -> list[str]:
  """The files that an embedding depends on, of a model of its own."""
  return sorted(
    p.name
    for p in hub.resolve(e.folder).iterdir()
    if p.name.endswith((".json", ".model", ".safetensors"))
  )


def files(e: Embedder) -> list[str]:
  """What `run` leaves beside the embedding."""
  own = e.folder and isinstance(e.model, decoder.ModelConfig)
  return (
    [f"tokens.{field}.npy" for field in tokens_lib.TokenRows._fields]
    if own
    else []
  )


def first_weights(
  m: decoder.ModelConfig, params: decoder.Params
) -> decoder.Params:
  """Of a longer model's parameters those of `first_layers`."""
  rows = decoder.table(m)  # sharded alike; only the leading axis is cut
  return {
    n: params[n][: rows[n].shape[0]] if n.startswith("layers/") else params[n]
    for n in rows
  }


def load(e: Embedder, mesh: jax.sharding.Mesh) -> decoder.Params:
  """Another decoder's parameters; of a longer one the layers that run."""
  m, layer = e.model, re.compile(r"\.layers\.(\d+)\.")
  whole = families.decoder_layout(m)

  def rename(name):
    name = whole.rename(name)
    found = name and layer.search(name)
    return None if found and int(found[1]) >= m.layers else name

  layout = whole._replace(rename=rename)
  return weights.load_weights(e.folder, layout, mesh, jnp.dtype(m.dtype))


def encode(e: Embedder, rows: list[dict]) -> tokens_lib.TokenRows:
  """Prompt and answer as one text, in the embedder's own tokens.

  As in the paper: BOS, the text, no template; a long row loses its beginning.
  Where answers are pooled the two are tokenised apart, so that an answer's
  first token is known.
  """
  tok = load_tokenizer(hub.resolve(e.folder))
  ids, bos = [], [tok.bos] if tok.bos >= 0 else []
  room = e.model.context - len(bos)
  start, apart = [], e.pooling == "response"
  texts, answers = texts_of(rows), texts_of(rows, answers=True)
  with progress.bar("tokenize", len(texts)) as tick:
    for at in range(0, len(texts), 1024):
      part, tails = texts[at : at + 1024], answers[at : at + 1024]
      if apart:
        heads = tok.encode_many(
          [text[: len(text) - len(answer)] for text, answer in zip(part, tails)]
        )
        tails = tok.encode_responses(tails)
      else:
        heads, tails = tok.encode_many(part), [[]] * len(part)
      for head, tail in zip(heads, tails):
        ids.append(np.array(bos + (head + tail)[-room:], np.int32))
        start.append(len(ids[-1]) - min(len(tail), room) if apart else 0)
      tick(len(part))
  return tokens_lib.TokenRows(
    np.concatenate(ids),
    np.cumsum([0] + [len(i) for i in ids]),
    np.array(start, np.int32),
    np.zeros(len(ids), np.int32),
  )


def texts_of(rows: list[dict], answers: bool = False) -> list[str]:
  """The texts to embed: two of a pair, chosen first; or the answers alone."""
  return [
    ("" if answers else row["prompt"]) + row[side]
    for row in rows
    for side in ("chosen", "rejected", "completion")
    if side in row
  ]


def prepare(job: Any, e: Embedder, folder: Any) -> tuple[Callable, int, int]:
  """What embeds the pool where the reference does not.

  Args:
    job: the run.
    e: what embeds, in a folder of its own.
    folder: of the embed stage; gets the tokens of a foreign decoder.

  Returns:
    `run(parts, tick) -> [n, E]` float32, this process's part of the rows; and
    the flops and tokens of all rows.
  """
  c, ids = job.c, job.column("pool", "id")
  if isinstance(e.model, encoder.EncoderConfig):
    from jaxalign.embed import texts  # needs the `tokenizers` package

    params, m, tok = texts.read_encoder(e.folder, job.mesh, pooling=e.pooling)
    asked = texts_of(job.rows("pool"), e.answers)
    sizes = [len(x.ids) for x in tok.encode_batch_fast(asked)]

    def encoded(parts, tick):
      index = np.concatenate(parts)
      x = texts.embed_texts(
        job.mesh,
        params,
        m,
        tok,
        [asked[i] for i in index],
        tile=16 * c.embed.tile,
      )
      ends = np.cumsum([len(part) for part in parts])
      tick(len(index))
      return np.split(x, ends[:-1])[jax.process_index()]

    return (encoded, sum(encoder_flops(m, s) for s in sizes), sum(sizes))
  if jax.process_index() == 0:
    tokens_lib.save_rows(folder, "tokens", encode(e, job.rows("pool")))
  sharding.barrier("embedder's tokens")
  rows = tokens_lib.load_rows(folder, "tokens")
  params = load(e, job.mesh)

  def pooled(parts, tick):
    return passes.pool_rows(
      job.mesh,
      params,
      e.model,
      rows,
      pooling=e.pooling,
      tile=c.embed.tile,
      ids=ids,
      parts=parts,
      tick=tick,
    )

  return pooled, passes.flops(e.model, rows, 0), len(rows.ids)


def flops(e: Embedder, tokens: int) -> int:
  """Floating-point operations of one row through a model that only embeds."""
  if isinstance(e.model, encoder.EncoderConfig):
    return encoder_flops(e.model, min(tokens, e.model.context))
  return decoder_flops(e.model, min(tokens, e.model.context), 0)
