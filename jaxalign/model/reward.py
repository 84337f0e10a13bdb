"""Reward models: a decoder or an encoder with one number on top.

The number is what transformers' `...ForSequenceClassification` with one label
gives. A decoder's is `score . x` of the last token's state x after the final
norm; an encoder's is `w . tanh(W x + b) + c` of the first token's state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.model import decoder, encoder, families, hf
from jaxalign.model.parameters import Layout, Param, Params, Stored

_HIGHEST = jax.lax.Precision.HIGHEST


class RewardConfig(NamedTuple):
  """The sizes of a reward model."""

  model: decoder.ModelConfig | encoder.EncoderConfig
  kind: str  # config.json's model_type

  @property
  def encodes(self) -> bool:
    """Whether it is an encoder."""
    return isinstance(self.model, encoder.EncoderConfig)


def read_reward_config(
  folder: Any, dtype: str = "float32", knob: str = "config.rewards.checkpoint"
) -> RewardConfig:
  """The sizes of a sequence classifier of one label.

  Args:
    folder: a Hugging Face folder, or `hf:<repo>`.
    dtype: of the matrix products.
    knob: that named it, for messages.

  Raises:
    ConfigError: no classifier, or one of another number of labels.
  """
  raw = hf.raw_config(folder)
  named = [str(n) for n in raw.get("architectures") or ()]
  if not any(n.endswith("ForSequenceClassification") for n in named):
    raise ConfigError(
      f"{folder}/config.json: architectures {named or 'none'}, wanted a "
      f"reward model, <Family>ForSequenceClassification; set {knob}"
    )
  labels = len(raw.get("id2label") or {0: "", 1: ""})  # two, unless it says
  if labels != 1:
    raise ConfigError(
      f"{folder}/config.json: {labels} labels (id2label), "
      f"wanted one, the reward; set {knob}"
    )
  kind = hf.model_type(folder)
  if kind in encoder.FAMILIES:
    return RewardConfig(encoder.read_encoder_config(folder, dtype=dtype), kind)
  m = families.config_of(raw, dtype, "none", f"{folder}/config.json")
  return RewardConfig(m._replace(tied=True), kind)  # it has no other head


def reward_layout(r: RewardConfig) -> Layout:
  """The parameters, and where they lie in a Hugging Face checkpoint."""
  d, rows, stored = r.model.width, {}, {}

  def add(name, theirs, *shape, axes=(None, None), scale=0.02):
    rows[name] = Param(shape, axes, scale, 0.0)
    stored[name] = Stored.plain(theirs, *shape)

  if not r.encodes:
    body = families.decoder_layout(r.model)
    add("score", "score.weight", 1, d, axes=(None, "width"))
  else:
    first, last = "classifier.dense", "classifier.out_proj"
    if r.kind == "bert":
      first, last = "pooler.dense", "classifier"
    body = encoder.encoder_layout(r.model)._replace(
      rename=encoder.without_prefix
    )
    add("pool", f"{first}.weight", d, d)
    add("pool_bias", f"{first}.bias", d, axes=(None,), scale=0)
    add("score", f"{last}.weight", 1, d)
    add("score_bias", f"{last}.bias", 1, axes=(None,), scale=0)
  return Layout({**body.rows, **rows}, {**body.stored, **stored}, body.rename)


def rewards(
  params: Params,
  tokens: jax.Array,
  length: jax.Array,
  answer: jax.Array,
  r: RewardConfig,
  place: sharding.Place = sharding.PER_ROW,
) -> jax.Array:
  """One number a row.

  Args:
    params: as in `reward_layout`.
    tokens: [B, L] ids, padded on the right.
    length: [B] tokens of each row, 1 or more.
    answer: [B, L] bool, true on the second text of a pair, which a BERT
      distinguishes from the first by its token type.
    r: the model's sizes.
    place: `sharding.PER_ROW` inside `sharding.per_row`.

  Returns:
    [B] float32.
  """
  rows = reward_layout(r).rows
  weight = lambda n: place.weight(params[n], rows[n].axes).astype(jnp.float32)
  if r.encodes:
    mask = jnp.arange(tokens.shape[1])[None, :] < length[:, None]
    types = answer.astype(jnp.int32) if r.kind == "bert" else None
    x = encoder.forward(params, tokens, mask, r.model, types)[:, 0]
    x = jnp.tanh(
      jnp.einsum("bd,ed->be", x, weight("pool"), precision=_HIGHEST)
      + weight("pool_bias")[None]
    )
    bias = weight("score_bias")[None]
  else:
    x = decoder.forward(params, tokens, r.model, place)
    end = (length - 1).astype(jnp.int32)[:, None, None]
    x = jnp.take_along_axis(x, end, axis=1)[:, 0].astype(jnp.float32)
    bias = jnp.zeros((1, 1), jnp.float32)
  y = jnp.einsum("bd,cd->bc", x, weight("score"), precision=_HIGHEST)
  return (y + bias)[:, 0]
