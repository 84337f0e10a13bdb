"""Fields of config.json that families share, to and from our own."""

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

from jaxalign.core.errors import ConfigError
from jaxalign.model import decoder
from jaxalign.model.adapters import LINEAR
from jaxalign.model.attention import check_rope, Rope
from jaxalign.model.decoder import ModelConfig
from jaxalign.model.parameters import Stored

Raw = Mapping[str, Any]  # config.json
Fields = dict[str, Any]


class Family(NamedTuple):
  """One architecture, by the `model_type` of its config.json."""

  architecture: str  # what transformers calls the class
  defaults: Raw  # of fields that a file may leave out, as in transformers
  read: Callable[[Raw], Fields]  # -> fields of ModelConfig
  write: Callable[[ModelConfig], Fields]  # -> fields of config.json
  stored: Callable[[ModelConfig], dict[str, Stored]]
  refused: Raw = {}  # field -> the only value that is read


ACTS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "relu": "relu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
}
SIZES = dict(
  layers="num_hidden_layers",
  width="hidden_size",
  heads="num_attention_heads",
  ff="intermediate_size",
  vocab="vocab_size",
  context="max_position_embeddings",
)
SLIDING, FULL = "sliding_attention", "full_attention"


def read_rope(raw: Raw, theta: float, context: int) -> Rope:
  """One `rope_parameters` (in older files `rope_scaling`) of a config."""
  kind = raw.get("rope_type", raw.get("type", "default"))
  found = dict(truncate=bool(raw.get("truncate", True)))
  if kind in ("llama3", "yarn"):
    original = raw.get("original_max_position_embeddings")
    found["original"] = int(original or context)
  if kind in ("linear", "dynamic", "llama3", "yarn"):
    found["factor"] = float(raw.get("factor") or context / found["original"])
  if kind == "llama3":
    low, high = raw["low_freq_factor"], raw["high_freq_factor"]
    found |= dict(low=float(low), high=float(high))
  if kind == "yarn":
    low, high = raw.get("beta_slow") or 1, raw.get("beta_fast") or 32
    magnitude = float(raw.get("attention_factor") or 0.0)
    above, below = raw.get("mscale"), raw.get("mscale_all_dim")
    if not magnitude and above and below and found["factor"] > 1:
      log = 0.1 * math.log(found["factor"])
      magnitude = (above * log + 1) / (below * log + 1)
    found |= dict(low=float(low), high=float(high), magnitude=magnitude)
  rope = Rope(float(raw.get("rope_theta") or theta), kind, **found)
  check_rope(rope)
  return rope


def write_rope(r: Rope) -> Fields:
  """The inverse of `read_rope`."""
  out: Fields = dict(rope_theta=r.theta, rope_type=r.kind)
  if r.kind != "default":
    out["factor"] = r.factor
  if r.kind == "llama3":
    out |= dict(low_freq_factor=r.low, high_freq_factor=r.high)
  if r.kind == "yarn":
    out |= dict(beta_slow=r.low, beta_fast=r.high, truncate=r.truncate)
    out |= dict(attention_factor=r.magnitude) if r.magnitude else {}
  if r.original:
    out["original_max_position_embeddings"] = r.original
  return out


def rope_fields(rope: Rope) -> Fields:
  """ModelConfig's `rope_theta` and `ropes` of one rope for all layers."""
  plain = rope == Rope(rope.theta)
  return dict(rope_theta=rope.theta, ropes=() if plain else (rope,))


def one_rope(raw: Raw) -> Fields:
  """`rope_fields` of a config that has one rope, in either spelling."""
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  theta, context = raw.get("rope_theta", 1e4), raw["max_position_embeddings"]
  return rope_fields(read_rope(rope, theta, int(context)))


def write_one_rope(m: ModelConfig) -> Fields:
  """The inverse of `one_rope`, for new and older readers."""
  rope = decoder.ropes(m)[0]
  out: Fields = dict(rope_theta=rope.theta, rope_parameters=write_rope(rope))
  if rope.kind != "default":  # where transformers before 5 looks
    out["rope_scaling"] = out["rope_parameters"]
  return out


def read_windows(types: list[str], window: int | None) -> Fields:
  """`kinds` and `windows` of a list of layer types; kind 0 is the window's."""
  unknown = sorted(set(types) - {SLIDING, FULL})
  if unknown:
    raise ConfigError(f"layer_types holds {unknown}; known: {SLIDING}, {FULL}")
  if SLIDING in types and not window:
    raise ConfigError(
      f"layer_types holds {SLIDING}, but sliding_window is {window!r}"
    )
  if len(set(types)) < 2:
    return dict(windows=(int(window) if types[0] == SLIDING else 0,))
  kinds = tuple(int(t == FULL) for t in types)
  return dict(windows=(int(window), 0), kinds=kinds)


def write_windows(m: ModelConfig) -> Fields:
  """The inverse of `read_windows`: a type for every layer."""
  kinds = m.kinds or (0,) * m.layers
  types = [SLIDING if m.windows[k] else FULL for k in kinds]
  return dict(layer_types=types, sliding_window=max(m.windows) or None)


def read_sizes(raw: Raw) -> Fields:
  """The sizes and constants that every family spells alike."""
  act = raw.get("hidden_activation") or raw.get("hidden_act")
  if act not in ACTS:
    known = ", ".join(ACTS)
    raise ConfigError(f"hidden_act={act!r} is unknown; known: {known}")
  sizes = {ours: int(raw[theirs]) for ours, theirs in SIZES.items()}
  width, heads = sizes["width"], sizes["heads"]
  return sizes | dict(
    kv_heads=int(raw.get("num_key_value_heads") or heads),
    head_size=int(raw.get("head_dim") or width // heads),
    act=ACTS[act],
    norm_eps=float(raw.get("rms_norm_eps") or raw.get("layer_norm_eps")),
    tied=bool(raw["tie_word_embeddings"]),
  )


def write_sizes(m: ModelConfig) -> Fields:
  """The inverse of `read_sizes`."""
  out = {theirs: getattr(m, ours) for ours, theirs in SIZES.items()}
  return out | dict(
    num_key_value_heads=m.kv_heads,
    head_dim=m.head_size,
    max_position_embeddings=m.positions or m.context,
    rms_norm_eps=m.norm_eps,
    tie_word_embeddings=m.tied,
    hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(m.act, m.act),
  )


def stored_by_name(m: ModelConfig, names: Mapping[str, str]) -> dict:
  """Where the parameters of `decoder.table(m)` lie, by the tensors' names.

  A weight of a layer is a matrix [out, in], all else lies as it is, flat.

  Args:
    m: the model's sizes.
    names: ours, without "layers/" -> theirs, with "{}" for the layer.
  """
  out = {}
  for ours, p in decoder.table(m).items():
    short = ours.removeprefix("layers/")
    if short not in names:  # the family says itself where it lies
      continue
    theirs, shape = names[short], p.shape[short != ours :]
    if short in LINEAR:
      out[ours] = Stored.linear(theirs, shape, LINEAR[short][0])
    elif short == ours:
      out[ours] = Stored.plain(theirs, *shape)
    else:
      out[ours] = Stored.flat(theirs, *shape)
  return out
