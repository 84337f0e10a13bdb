"""Reward models: a decoder or an encoder with one number on top.

The number is what transformers' `...ForSequenceClassification` with one label
gives. A decoder's is `score . x` of the last token's state x after the final
norm; an encoder's is `w . tanh(W x + b) + c` of the first token's state.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.model import decoder, encoder, families, hf, weights
from jaxalign.model.parameters import check_mesh, Param, Params, Stored

_HIGHEST = jax.lax.Precision.HIGHEST


class RewardConfig(NamedTuple):
  """The sizes of a reward model."""

  model: decoder.ModelConfig | encoder.EncoderConfig
  kind: str  # config.json's model_type

  @property
  def encodes(self) -> bool:
    """Whether it is an encoder."""
    return isinstance(self.model, encoder.EncoderConfig)


def read_config(
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
    return RewardConfig(encoder.read_config(folder, dtype=dtype), kind)
  m = families.config_of(raw, dtype, "none", f"{folder}/config.json")
  return RewardConfig(m._replace(tied=True), kind)  # it has no other head


def table(r: RewardConfig) -> dict[str, Param]:
  """Name -> shape, logical axes and initial scale of every parameter."""
  m = r.model
  if not r.encodes:
    return decoder.table(m) | {
      "score": Param((1, m.width), (None, "width"), 0.02)
    }
  d = m.width
  return encoder.table(m) | {
    "pool": Param((d, d), (None, None), 0.02),
    "pool_bias": Param((d,), (None,), 0, 0.0),
    "score": Param((1, d), (None, None), 0.02),
    "score_bias": Param((1,), (None,), 0, 0.0),
  }


def stored(r: RewardConfig) -> dict[str, Stored]:
  """Where each parameter lies in a Hugging Face checkpoint."""
  d = r.model.width
  plain = Stored.plain
  if not r.encodes:
    return families.stored(r.model) | {"score": plain("score.weight", 1, d)}
  first, last = "classifier.dense", "classifier.out_proj"
  if r.kind == "bert":
    first, last = "pooler.dense", "classifier"
  return encoder.stored(r.model) | {
    "pool": plain(f"{first}.weight", d, d),
    "pool_bias": plain(f"{first}.bias", d),
    "score": plain(f"{last}.weight", 1, d),
    "score_bias": plain(f"{last}.bias", 1),
  }


def canonical(r: RewardConfig, name: str) -> str | None:
  """A file's tensor name as `stored` spells it; None: not read."""
  if not r.encodes:
    return families.canonical(r.model, name)
  for prefix in ("bert.", "roberta."):
    name = name.removeprefix(prefix)
  return None if name.startswith("embeddings.position_ids") else name


def load(
  folder: Any,
  r: RewardConfig,
  mesh: jax.sharding.Mesh,
  dtype: Any = jnp.float32,
) -> Params:
  """The parameters on the mesh; raises as `weights.load` does."""
  rule = functools.partial(canonical, r)
  return weights.load(
    folder, table(r), stored(r), mesh, canonical=rule, dtype=dtype
  )


def check_reward(r: RewardConfig, mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError where a size does not fit the mesh."""
  check_mesh(table(r), mesh)


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
    params: as in `table`.
    tokens: [B, L] ids, padded on the right.
    length: [B] tokens of each row, 1 or more.
    answer: [B, L] bool, true on the second text of a pair, which a BERT
      tells from the first by its token type.
    r: the model's sizes.
    place: `sharding.PER_ROW` inside `sharding.per_row`.

  Returns:
    [B] float32.
  """
  axes = table(r)
  weight = lambda n: place.weight(params[n], axes[n].axes).astype(jnp.float32)
  if r.encodes:
    mask = jnp.arange(tokens.shape[1])[None, :] < length[:, None]
    types = answer.astype(jnp.int32) if r.kind == "bert" else None
    x = encoder.forward(params, tokens, mask, r.model, place, types)[:, 0]
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
