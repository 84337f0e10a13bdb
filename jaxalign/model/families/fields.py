"""Fields of config.json that families share, to and from our own."""

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

from jaxalign.errors import ConfigError
from jaxalign.model import decoder
from jaxalign.model import rope as rope_lib
from jaxalign.model.rope import Rope
from jaxalign.model.table import Stored

Raw = Mapping[str, Any]  # config.json


class Family(NamedTuple):
  """One architecture, by the `model_type` of its config.json."""

  architecture: str  # what transformers calls the class
  defaults: Raw  # of fields that a file may leave out, as in transformers
  read: Callable[[Raw], dict[str, Any]]  # -> fields of ModelConfig
  write: Callable[[decoder.ModelConfig], dict[str, Any]]  # -> fields of a file
  stored: Callable[[decoder.ModelConfig], dict[str, Stored]]
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
SLIDING, FULL = "sliding_attention", "full_attention"


# Rotary positions.


def read_rope(raw: Raw, theta: float, context: int) -> Rope:
  """One `rope_parameters` (in older files `rope_scaling`) of a config."""
  kind = raw.get("rope_type", raw.get("type", "default"))
  if kind not in rope_lib.KINDS:
    raise ConfigError(
      f"rope_type={kind!r} is unknown; known: {', '.join(rope_lib.KINDS)}"
    )
  theta = float(raw.get("rope_theta") or theta)
  factor, low, high, original, magnitude = 1.0, 1.0, 4.0, 0, 0.0
  if kind in ("llama3", "yarn"):
    original = int(raw.get("original_max_position_embeddings") or context)
  if kind != "default":
    factor = float(raw.get("factor") or context / original)
  if kind == "llama3":
    low, high = float(raw["low_freq_factor"]), float(raw["high_freq_factor"])
  if kind == "yarn":
    low = float(raw.get("beta_slow") or 1)
    high = float(raw.get("beta_fast") or 32)
    magnitude = float(raw.get("attention_factor") or 0.0)
    above, below = raw.get("mscale"), raw.get("mscale_all_dim")
    if not magnitude and above and below and factor > 1:
      log = 0.1 * math.log(factor)
      magnitude = (above * log + 1) / (below * log + 1)
  rope = Rope(
    theta,
    kind,
    factor,
    low,
    high,
    original,
    magnitude,
    bool(raw.get("truncate", True)),
  )
  rope_lib.check(rope)
  return rope


def write_rope(r: Rope) -> dict[str, Any]:
  """The inverse of `read_rope`."""
  out: dict[str, Any] = dict(rope_theta=r.theta, rope_type=r.kind)
  if r.kind != "default":
    out["factor"] = r.factor
  if r.kind == "llama3":
    out |= dict(low_freq_factor=r.low, high_freq_factor=r.high)
  if r.kind == "yarn":
    out |= dict(beta_slow=r.low, beta_fast=r.high, truncate=r.truncate)
    if r.magnitude:
      out["attention_factor"] = r.magnitude
  if r.original:
    out["original_max_position_embeddings"] = r.original
  return out


def rope_fields(rope: Rope) -> dict[str, Any]:
  """ModelConfig's `rope_theta` and `ropes` of one rope for all layers."""
  plain = rope == Rope(rope.theta)
  return dict(rope_theta=rope.theta, ropes=() if plain else (rope,))


def one_rope(raw: Raw) -> dict[str, Any]:
  """`rope_fields` of a config that has one rope, in either spelling."""
  given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  return rope_fields(
    read_rope(
      given, raw.get("rope_theta", 10000.0), int(raw["max_position_embeddings"])
    )
  )


# Windows by kind of layer.


def windows_of(types: list[str], window: int | None) -> dict[str, Any]:
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
  return dict(
    windows=(int(window), 0), kinds=tuple(int(t == FULL) for t in types)
  )


def layer_types_of(m: decoder.ModelConfig) -> list[str]:
  """The inverse of `windows_of`: a type for every layer."""
  kinds = m.kinds or (0,) * m.layers
  return [SLIDING if m.windows[k] else FULL for k in kinds]


# Sizes.


def sizes_of(raw: Raw) -> dict[str, Any]:
  """The sizes and constants that every family spells alike."""
  heads = int(raw["num_attention_heads"])
  width = int(raw["hidden_size"])
  act = raw.get("hidden_activation") or raw.get("hidden_act")
  if act not in ACTS:
    raise ConfigError(
      f"hidden_act={act!r} is unknown; known: {', '.join(ACTS)}"
    )
  return dict(
    layers=int(raw["num_hidden_layers"]),
    width=width,
    heads=heads,
    kv_heads=int(raw.get("num_key_value_heads") or heads),
    head_size=int(raw.get("head_dim") or width // heads),
    ff=int(raw["intermediate_size"]),
    vocab=int(raw["vocab_size"]),
    context=int(raw["max_position_embeddings"]),
    act=ACTS[act],
    norm_eps=float(raw.get("rms_norm_eps") or raw.get("layer_norm_eps")),
    tied=bool(raw["tie_word_embeddings"]),
  )


def write_sizes(m: decoder.ModelConfig) -> dict[str, Any]:
  """The inverse of `sizes_of`."""
  act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(m.act, m.act)
  return dict(
    hidden_size=m.width,
    intermediate_size=m.ff,
    num_hidden_layers=m.layers,
    num_attention_heads=m.heads,
    num_key_value_heads=m.kv_heads,
    head_dim=m.head_size,
    vocab_size=m.vocab,
    max_position_embeddings=m.positions or m.context,
    rms_norm_eps=m.norm_eps,
    tie_word_embeddings=m.tied,
    hidden_act=act,
  )


def write_one_rope(m: decoder.ModelConfig) -> dict[str, Any]:
  """The inverse of `one_rope`, for new and older readers."""
  rope = decoder.ropes(m)[0]
  out: dict[str, Any] = dict(
    rope_theta=rope.theta, rope_parameters=write_rope(rope)
  )
  if rope.kind != "default":  # where transformers before 5 looks
    out["rope_scaling"] = out["rope_parameters"]
  return out


# Names of tensors.


def stored_under(
  prefix: str,
  m: decoder.ModelConfig,
  top: Mapping[str, tuple],
  flat: Mapping[str, tuple],
) -> dict[str, Stored]:
  """Where the parameters lie, of those that `decoder.table(m)` has.

  Args:
    prefix: of the tensors of a layer, `<prefix>.layers.<i>.`.
    m: the model's sizes.
    top: ours -> the fields of `Stored`.
    flat: the same of one layer, ours without "layers/", theirs without prefix.
  """
  known = {n: Stored(*row) for n, row in top.items()}
  known |= {
    f"layers/{n}": Stored(f"{prefix}.layers.{{}}.{row[0]}", *row[1:])
    for n, row in flat.items()
  }
  return {name: known[name] for name in decoder.table(m)}
