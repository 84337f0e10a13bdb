"""What embeds the pool: the reference itself, or a model that costs less.

With the reference whole, one pass yields the embedding and the reference's
log-probabilities. Its first layers, another decoder or an encoder yield the
embedding alone; the reference then runs over the selected rows only, or, where
a sampler reads its log-probabilities, over all in the pass that embeds them.
"""

from collections.abc import Callable
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import hub, progress, sharding
from jaxalign.core.errors import ConfigError
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.data.tokens import join_rows, load_rows, save_rows, TokenRows
from jaxalign.embed import passes, texts
from jaxalign.embed.passes import PassOptions
from jaxalign.model import decoder, encoder, families, hf, weights
from jaxalign.model.flops import decoder_flops, encoder_flops

SIDES = ("chosen", "rejected", "completion")  # the answers of a record
# The files of token rows that a stage makes for itself.
TOKENS = [f"tokens.{field}.npy" for field in TokenRows._fields]


class Embedder(NamedTuple):
  """Which model embeds, sized but not loaded."""

  model: decoder.ModelConfig | encoder.EncoderConfig
  folder: str  # "": the reference, or its first layers
  pooling: str
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
  """The embedder of a config; reads its config.json.

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
    return Embedder(m, given, m.pooling, pooling == "response")
  if pooling not in passes.POOLINGS:
    raise ConfigError(
      f"embed.pooling={pooling!r} is not of a decoder, wanted "
      f"{' or '.join(passes.POOLINGS)}; set config.embed.pooling"
    )
  if by_reference(c):
    m = first_layers(reference, layers) if layers else reference
    return Embedder(m, "", pooling)
  m = hf.read_config(given, c.model.dtype, "none")
  context = min(m.context, c.model.context)
  m = m._replace(context=context, attention=reference.attention)
  return Embedder(first_layers(m, layers or m.layers), given, pooling)


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


def first_weights(
  m: decoder.ModelConfig, params: decoder.Params
) -> decoder.Params:
  """Of a longer model's parameters those of `first_layers`."""
  rows = decoder.table(m)  # sharded alike; only the leading axis is cut
  return {
    n: params[n][: rows[n].shape[0]] if n.startswith("layers/") else params[n]
    for n in rows
  }


def load_decoder(e: Embedder, mesh: jax.sharding.Mesh) -> decoder.Params:
  """Another decoder's parameters; of a longer one the layers that run."""
  m, layer = e.model, re.compile(r"\.layers\.(\d+)\.")
  whole = families.decoder_layout(m)

  def rename(name):
    name = whole.rename(name)
    match = name and layer.search(name)
    return None if match and int(match[1]) >= m.layers else name

  layout, dtype = whole._replace(rename=rename), jnp.dtype(m.dtype)
  return weights.load_weights(e.folder, layout, mesh, dtype)


def encode(e: Embedder, rows: list[dict]) -> TokenRows:
  """Prompt and answer as one text, in the embedder's own tokens.

  As in the paper: BOS, the text, no template; a long row loses its beginning.
  Where answers are pooled the two are tokenised apart, so that an answer's
  first token is known.
  """
  tok = load_tokenizer(hub.resolve(e.folder))
  ids, start, bos = [], [], [tok.bos] if tok.bos >= 0 else []
  room, apart = e.model.context - len(bos), e.pooling == "response"
  whole, answers = texts_of(rows), texts_of(rows, answers=True)
  with progress.bar("tokenize", len(whole)) as tick:
    for at in range(0, len(whole), 1024):
      heads, tails = whole[at : at + 1024], answers[at : at + 1024]
      if apart:
        heads = [x[: len(x) - len(end)] for x, end in zip(heads, tails)]
        tails = tok.encode_responses(tails)
      else:
        tails = [[]] * len(heads)
      for head, tail in zip(tok.encode_many(heads), tails):
        ids.append(np.array(bos + (head + tail)[-room:], np.int32))
        start.append(len(ids[-1]) - min(len(tail), room) if apart else 0)
      tick(len(heads))
  return join_rows(ids, start)


def texts_of(rows: list[dict], answers: bool = False) -> list[str]:
  """The texts to embed: two of a pair, chosen first; or the answers alone."""
  prompt = lambda row: "" if answers else row["prompt"]
  return [prompt(row) + row[side] for row, side in answers_of(rows)]


def answers_of(rows: list[dict]) -> list[tuple[dict, str]]:
  """(record, which of its answers) of every answer, in order."""
  return [(row, side) for row in rows for side in SIDES if side in row]


def token_rows_of(folder: Any, make: Callable[[], TokenRows]) -> TokenRows:
  """Token rows that process 0 makes of texts, which it alone reads."""
  if jax.process_index() == 0:
    save_rows(folder, "tokens", make())
  sharding.barrier("tokens of a stage")
  return load_rows(folder, "tokens")


def prepare(
  job: Any, e: Embedder, folder: Any
) -> tuple[Callable[[PassOptions], np.ndarray], int, int]:
  """What embeds the pool where the reference does not.

  Args:
    job: the run.
    e: what embeds, in a folder of its own.
    folder: of the embed stage; gets the tokens of a foreign decoder.

  Returns:
    A function that gives this process's rows [n, E] float32; and the flops and
    tokens of all rows.
  """
  if isinstance(e.model, encoder.EncoderConfig):
    params, m, tok = texts.read_encoder(e.folder, job.mesh, pooling=e.pooling)
    given = texts_of(job.rows("pool"), e.answers)
    sizes = [len(x.ids) for x in tok.encode_batch_fast(given)]

    def encoded(options):
      index, tile = np.concatenate(options.by_process), 16 * options.tile
      some = [given[i] for i in index]
      x = texts.embed_texts(job.mesh, params, m, tok, some, tile=tile)
      options.tick(len(index))
      ends = np.cumsum([len(rows) for rows in options.by_process])
      return np.split(x, ends[:-1])[jax.process_index()]

    return encoded, sum(encoder_flops(m, s) for s in sizes), sum(sizes)
  rows = token_rows_of(folder, lambda: encode(e, job.rows("pool")))
  params = load_decoder(e, job.mesh)

  def pooled(options):
    options = options._replace(pooling=e.pooling)
    found = passes.pass_rows(
      job.mesh, params, e.model, rows, ["embedding"], options
    )
    return found["embedding"]

  flops = passes.pass_flops(e.model, rows, ["embedding"])
  return pooled, flops, len(rows.ids)


def flops(e: Embedder, tokens: int) -> int:
  """Floating-point operations of one row through a model that only embeds."""
  length = min(tokens, e.model.context)
  if isinstance(e.model, encoder.EncoderConfig):
    return encoder_flops(e.model, length)
  return decoder_flops(e.model, length, 0)
