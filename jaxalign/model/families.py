"""Families of decoders: config.json and tensor names to and from our own.

A new family is one `Family`: what its config fields mean and what its tensors
are called. Refused by name: mixtures of experts, and any architecture or
switch that is not listed here, since a wrong guess would still run.
"""

import json
import math
from typing import Any, Callable, Mapping, NamedTuple

from etils import epath

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


_ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
         "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
         "gelu_fast": "gelu_tanh"}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_PREFIXES = (("language_model.model.", "model."),  # Gemma 3 with its eyes
             ("model.language_model.", "model."),
             ("language_model.lm_head.", "lm_head."))
_IGNORED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.",
            "model.multi_modal_projector.")
_BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


# Rotary positions.


def read_rope(raw: Raw, theta: float, context: int) -> Rope:
  """One `rope_parameters` (in older files `rope_scaling`) of a config."""
  kind = raw.get("rope_type", raw.get("type", "default"))
  if kind not in rope_lib.KINDS:
    raise ConfigError(f"rope_type={kind!r} is unknown; known: "
                      f"{', '.join(rope_lib.KINDS)}")
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
  rope = Rope(theta, kind, factor, low, high, original, magnitude,
              bool(raw.get("truncate", True)))
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


def _rope_fields(rope: Rope) -> dict[str, Any]:
  plain = rope == Rope(rope.theta)
  return dict(rope_theta=rope.theta, ropes=() if plain else (rope,))


def _one_rope(raw: Raw) -> dict[str, Any]:
  given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  return _rope_fields(read_rope(given, raw.get("rope_theta", 10000.0),
                                int(raw["max_position_embeddings"])))


# Windows by kind of layer.


def _windows(types: list[str], window: int | None) -> dict[str, Any]:
  """`kinds` and `windows` of a list of layer types; kind 0 is the window's."""
  unknown = sorted(set(types) - {_SLIDING, _FULL})
  if unknown:
    raise ConfigError(f"layer_types holds {unknown}; known: {_SLIDING}, "
                      f"{_FULL}")
  if _SLIDING in types and not window:
    raise ConfigError(f"layer_types holds {_SLIDING}, but sliding_window is "
                      f"{window!r}")
  if len(set(types)) < 2:
    return dict(windows=(int(window) if types[0] == _SLIDING else 0,))
  return dict(windows=(int(window), 0),
              kinds=tuple(int(t == _FULL) for t in types))


def _layer_types(m: decoder.ModelConfig) -> list[str]:
  kinds = m.kinds or (0,) * m.layers
  return [_SLIDING if m.windows[k] else _FULL for k in kinds]


# Llama and its nearest kin: one naming, switches apart.


def _sizes(raw: Raw) -> dict[str, Any]:
  heads = int(raw["num_attention_heads"])
  width = int(raw["hidden_size"])
  act = raw.get("hidden_activation") or raw.get("hidden_act")
  if act not in _ACTS:
    raise ConfigError(f"hidden_act={act!r} is unknown; known: "
                      f"{', '.join(_ACTS)}")
  return dict(
      layers=int(raw["num_hidden_layers"]), width=width, heads=heads,
      kv_heads=int(raw.get("num_key_value_heads") or heads),
      head_size=int(raw.get("head_dim") or width // heads),
      ff=int(raw["intermediate_size"]), vocab=int(raw["vocab_size"]),
      context=int(raw["max_position_embeddings"]), act=_ACTS[act],
      norm_eps=float(raw.get("rms_norm_eps") or raw.get("layer_norm_eps")),
      tied=bool(raw["tie_word_embeddings"]))


def _write_sizes(m: decoder.ModelConfig) -> dict[str, Any]:
  act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(m.act, m.act)
  return dict(
      hidden_size=m.width, intermediate_size=m.ff, num_hidden_layers=m.layers,
      num_attention_heads=m.heads, num_key_value_heads=m.kv_heads,
      head_dim=m.head_size, vocab_size=m.vocab,
      max_position_embeddings=m.positions or m.context,
      rms_norm_eps=m.norm_eps, tie_word_embeddings=m.tied, hidden_act=act)


def _write_rope(m: decoder.ModelConfig) -> dict[str, Any]:
  rope = decoder.ropes(m)[0]
  out: dict[str, Any] = dict(rope_theta=rope.theta,
                             rope_parameters=write_rope(rope))
  if rope.kind != "default":  # where transformers before 5 looks
    out["rope_scaling"] = out["rope_parameters"]
  return out


def _llama_stored(m: decoder.ModelConfig) -> dict[str, Stored]:
  """Ours -> Hugging Face's, for every switch that ModelConfig knows."""
  d, g, q, c, f, v = (m.width, m.kv_heads, m.heads // m.kv_heads, m.head_size,
                      m.ff, m.vocab)
  h = g * q * c
  after, before = (("post_attention_layernorm", "pre_feedforward_layernorm")
                   if m.post_norms else (None, "post_attention_layernorm"))
  flat = {  # ours -> (theirs, stored shape, view, order)
      "attention_norm": ("input_layernorm.weight", (d,), (d,), (0,)),
      "wq": ("self_attn.q_proj.weight", (h, d), (g, q, c, d), (3, 0, 1, 2)),
      "wk": ("self_attn.k_proj.weight", (g * c, d), (g, c, d), (2, 0, 1)),
      "wv": ("self_attn.v_proj.weight", (g * c, d), (g, c, d), (2, 0, 1)),
      "wo": ("self_attn.o_proj.weight", (d, h), (d, g, q, c), (1, 2, 3, 0)),
      "bq": ("self_attn.q_proj.bias", (h,), (g, q, c), (0, 1, 2)),
      "bk": ("self_attn.k_proj.bias", (g * c,), (g, c), (0, 1)),
      "bv": ("self_attn.v_proj.bias", (g * c,), (g, c), (0, 1)),
      "bo": ("self_attn.o_proj.bias", (d,), (d,), (0,)),
      "q_norm": ("self_attn.q_norm.weight", (c,), (c,), (0,)),
      "k_norm": ("self_attn.k_norm.weight", (c,), (c,), (0,)),
      "attention_post_norm": (f"{after}.weight", (d,), (d,), (0,)),
      "ff_norm": (f"{before}.weight", (d,), (d,), (0,)),
      "ff_post_norm": ("post_feedforward_layernorm.weight", (d,), (d,), (0,)),
      "w_gate": ("mlp.gate_proj.weight", (f, d), (f, d), (1, 0)),
      "w_up": ("mlp.up_proj.weight", (f, d), (f, d), (1, 0)),
      "w_down": ("mlp.down_proj.weight", (d, f), (d, f), (1, 0)),
      "b_gate": ("mlp.gate_proj.bias", (f,), (f,), (0,)),
      "b_up": ("mlp.up_proj.bias", (f,), (f,), (0,)),
      "b_down": ("mlp.down_proj.bias", (d,), (d,), (0,)),
  }
  top = {"embed": ("model.embed_tokens.weight", (v, d), (v, d), (0, 1)),
         "norm": ("model.norm.weight", (d,), (d,), (0,)),
         "head": ("lm_head.weight", (v, d), (v, d), (0, 1))}
  known = {n: Stored(*row) for n, row in top.items()}
  known |= {f"layers/{n}": Stored(f"model.layers.{{}}.{row[0]}", *row[1:])
            for n, row in flat.items()}
  return {name: known[name] for name in decoder.table(m)}


def _read_llama(raw: Raw) -> dict[str, Any]:
  bias = bool(raw["attention_bias"])
  return dict(_sizes(raw), **_one_rope(raw), qkv_bias=bias, out_bias=bias,
              ff_bias=bool(raw["mlp_bias"]))


def _write_llama(m: decoder.ModelConfig) -> dict[str, Any]:
  return dict(_write_sizes(m), **_write_rope(m), attention_bias=m.qkv_bias,
              mlp_bias=m.ff_bias)


def _read_mistral(raw: Raw) -> dict[str, Any]:
  return dict(_sizes(raw), **_one_rope(raw),
              windows=(int(raw["sliding_window"] or 0),))


def _write_mistral(m: decoder.ModelConfig) -> dict[str, Any]:
  return dict(_write_sizes(m), **_write_rope(m),
              sliding_window=m.windows[0] or None)


def _read_qwen(raw: Raw) -> dict[str, Any]:
  fields = dict(_sizes(raw), **_one_rope(raw))
  window = raw["sliding_window"] if raw["use_sliding_window"] else None
  types = raw.get("layer_types") or [
      _SLIDING if window and i >= int(raw["max_window_layers"]) else _FULL
      for i in range(fields["layers"])]
  return fields | _windows(types, window)


def _read_qwen2(raw: Raw) -> dict[str, Any]:
  return _read_qwen(raw) | dict(qkv_bias=True)


def _read_qwen3(raw: Raw) -> dict[str, Any]:
  bias = bool(raw["attention_bias"])
  return _read_qwen(raw) | dict(qk_norm=True, qkv_bias=bias, out_bias=bias)


def _write_qwen(m: decoder.ModelConfig) -> dict[str, Any]:
  return dict(_write_sizes(m), **_write_rope(m),
              use_sliding_window=any(m.windows), layer_types=_layer_types(m),
              sliding_window=max(m.windows) or None, max_window_layers=m.layers)


def _write_qwen3(m: decoder.ModelConfig) -> dict[str, Any]:
  return _write_qwen(m) | dict(attention_bias=m.out_bias)


def _read_gemma(raw: Raw) -> dict[str, Any]:
  bias = bool(raw["attention_bias"])
  fields = _sizes(raw)
  return fields | dict(
      norm="rms_offset", post_norms=True, qkv_bias=bias, out_bias=bias,
      query_scale=float(raw["query_pre_attn_scalar"]) ** -0.5,
      softcap=float(raw["attn_logit_softcapping"] or 0),
      final_softcap=float(raw["final_logit_softcapping"] or 0),
      embed_scale=math.sqrt(fields["width"]))


def _read_gemma2(raw: Raw) -> dict[str, Any]:
  fields = _read_gemma(raw) | _one_rope(raw)
  types = raw.get("layer_types") or [
      _FULL if i % 2 else _SLIDING for i in range(fields["layers"])]
  return fields | _windows(types, raw["sliding_window"])


def _read_gemma3(raw: Raw) -> dict[str, Any]:
  fields = _read_gemma(raw) | dict(qk_norm=True)
  every = int(raw["sliding_window_pattern"])
  types = raw.get("layer_types") or [
      _SLIDING if (i + 1) % every else _FULL for i in range(fields["layers"])]
  fields |= _windows(types, raw["sliding_window"])
  given, context = raw.get("rope_parameters") or {}, fields["context"]
  if given and not {_SLIDING, _FULL} & set(given):
    given = {_FULL: given}
  far = read_rope(given.get(_FULL) or raw.get("rope_scaling") or {},
                  raw.get("rope_theta", 1e6), context)
  near = read_rope(given.get(_SLIDING) or {},
                   raw.get("rope_local_base_freq", 1e4), context)
  if len(set(types)) < 2:
    return fields | _rope_fields(near if types[0] == _SLIDING else far)
  return fields | dict(ropes=(near, far), rope_theta=far.theta)


def _write_gemma(m: decoder.ModelConfig) -> dict[str, Any]:
  out = _write_sizes(m)
  return out | dict(
      hidden_activation=out["hidden_act"], attention_bias=m.qkv_bias,
      query_pre_attn_scalar=_whole(m.query_scale ** -2),
      attn_logit_softcapping=m.softcap or None,
      final_logit_softcapping=m.final_softcap or None,
      sliding_window=max(m.windows) or None, layer_types=_layer_types(m))


def _whole(x: float) -> int | float:
  return round(x) if abs(x - round(x)) < 1e-6 * x else x


def _write_gemma2(m: decoder.ModelConfig) -> dict[str, Any]:
  return _write_gemma(m) | _write_rope(m)


def _write_gemma3(m: decoder.ModelConfig) -> dict[str, Any]:
  near, far = decoder.ropes(m)[0], decoder.ropes(m)[-1]
  return _write_gemma(m) | dict(
      rope_theta=far.theta, rope_local_base_freq=near.theta,
      rope_parameters={_SLIDING: write_rope(near), _FULL: write_rope(far)})


# GPT-NeoX (Pythia): fused query-key-value, LayerNorm, both halves at once.


def _read_neox(raw: Raw) -> dict[str, Any]:
  given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  fields = _sizes(dict(raw, head_dim=None, num_key_value_heads=None))
  rope = read_rope(given, raw["rotary_emb_base"], fields["context"])
  return fields | _rope_fields(rope) | dict(
      norm="layer", gated=False, qkv_bias=bool(raw["attention_bias"]),
      out_bias=bool(raw["attention_bias"]), ff_bias=True,
      parallel=bool(raw["use_parallel_residual"]),
      rotary=float(given.get("partial_rotary_factor", raw["rotary_pct"])))


def _write_neox(m: decoder.ModelConfig) -> dict[str, Any]:
  rope = decoder.ropes(m)[0]
  out = _write_sizes(m)
  for name in ("head_dim", "num_key_value_heads", "rms_norm_eps"):
    del out[name]
  return out | dict(
      layer_norm_eps=m.norm_eps, attention_bias=m.qkv_bias,
      use_parallel_residual=m.parallel, rotary_pct=m.rotary,
      rotary_emb_base=rope.theta, rope_parameters=dict(
          write_rope(rope), partial_rotary_factor=m.rotary))


def _neox_stored(m: decoder.ModelConfig) -> dict[str, Stored]:
  d, h, c, f, v = m.width, m.heads, m.head_size, m.ff, m.vocab
  fused, bias = "attention.query_key_value.weight", (
      "attention.query_key_value.bias")
  flat = {}
  for i, name in enumerate(("q", "k", "v")):
    one = (1,) if name == "q" else ()  # G = H, so Q = 1
    n = len(one)
    flat[f"w{name}"] = (fused, (3 * h * c, d), (h, *one, 3, c, d),
                        (2 + n, *range(2 + n)), (1 + n, i))
    flat[f"b{name}"] = (bias, (3 * h * c,), (h, *one, 3, c),
                        tuple(range(2 + n)), (1 + n, i))
  for ours, theirs in (("attention_norm", "input_layernorm"),
                       ("ff_norm", "post_attention_layernorm")):
    flat[ours] = (f"{theirs}.weight", (d,), (d,), (0,))
    flat[f"{ours}_bias"] = (f"{theirs}.bias", (d,), (d,), (0,))
  flat |= {
      "wo": ("attention.dense.weight", (d, h * c), (d, h, 1, c), (1, 2, 3, 0)),
      "bo": ("attention.dense.bias", (d,), (d,), (0,)),
      "w_up": ("mlp.dense_h_to_4h.weight", (f, d), (f, d), (1, 0)),
      "b_up": ("mlp.dense_h_to_4h.bias", (f,), (f,), (0,)),
      "w_down": ("mlp.dense_4h_to_h.weight", (d, f), (d, f), (1, 0)),
      "b_down": ("mlp.dense_4h_to_h.bias", (d,), (d,), (0,)),
  }
  top = {"embed": ("gpt_neox.embed_in.weight", (v, d), (v, d), (0, 1)),
         "norm": ("gpt_neox.final_layer_norm.weight", (d,), (d,), (0,)),
         "norm_bias": ("gpt_neox.final_layer_norm.bias", (d,), (d,), (0,)),
         "head": ("lm_head.weight", (v, d), (v, d), (0, 1))}
  known = {n: Stored(*row) for n, row in top.items()}
  known |= {f"layers/{n}": Stored(f"gpt_neox.layers.{{}}.{row[0]}", *row[1:])
            for n, row in flat.items()}
  return {name: known[name] for name in decoder.table(m)}


_BASE = dict(hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False,
             attention_bias=False, mlp_bias=False)
_QWEN = dict(_BASE, max_position_embeddings=32768, use_sliding_window=False,
             sliding_window=4096, max_window_layers=28)
_GEMMA = dict(
    _BASE, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
    head_dim=256, num_attention_heads=8, num_key_value_heads=4,
    query_pre_attn_scalar=256, sliding_window=4096, sliding_window_pattern=6)
_NO_BOTH = dict(use_bidirectional_attention=False)

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", dict(_BASE, max_position_embeddings=2048),
        _read_llama, _write_llama, _llama_stored),
    "mistral": Family(
        "MistralForCausalLM",
        dict(_BASE, max_position_embeddings=131072, sliding_window=4096,
             num_key_value_heads=8),
        _read_mistral, _write_mistral, _llama_stored),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, _read_qwen2, _write_qwen,
                    _llama_stored),
    "qwen3": Family("Qwen3ForCausalLM", dict(_QWEN, head_dim=128),
                    _read_qwen3, _write_qwen3, _llama_stored),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        dict(_GEMMA, max_position_embeddings=8192, vocab_size=256000,
             attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        _read_gemma2, _write_gemma2, _llama_stored, _NO_BOTH),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        dict(_GEMMA, max_position_embeddings=131072, vocab_size=262208,
             attn_logit_softcapping=None, final_logit_softcapping=None),
        _read_gemma3, _write_gemma3, _llama_stored, _NO_BOTH),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        dict(hidden_act="gelu", layer_norm_eps=1e-5, attention_bias=True,
             tie_word_embeddings=False, use_parallel_residual=True,
             max_position_embeddings=2048, rotary_pct=0.25,
             rotary_emb_base=10000.0),
        _read_neox, _write_neox, _neox_stored),
}
TEXT_TOWERS = {"gemma3": "gemma3_text"}  # multimodal: the text is read


def of(m: decoder.ModelConfig) -> Family:
  """The family of a model."""
  return FAMILIES[m.family]


def stored(m: decoder.ModelConfig) -> dict[str, Stored]:
  """Where each parameter of `decoder.table(m)` lies in a checkpoint."""
  return of(m).stored(m._replace(lora=None))  # adapters have a folder apart


def canonical(m: decoder.ModelConfig, name: str) -> str | None:
  """A file's tensor name as `stored` spells it; None: knowingly not read."""
  if name.startswith(_IGNORED) or name.endswith(_BUFFERS):
    return None
  for old, new in _PREFIXES:
    if name.startswith(old):
      name = new + name[len(old):]
      break
  if name == "embed_out.weight":  # NeoX's head, in files and in transformers 5
    name = "lm_head.weight"
  return None if m.tied and name == "lm_head.weight" else name


def hf_config(m: decoder.ModelConfig, bos: int, eos: Any,
              dtype: str = "float32") -> dict[str, Any]:
  """`config.json` of these sizes, as transformers reads it."""
  return dict(architectures=[of(m).architecture], model_type=m.family,
              **of(m).write(m), bos_token_id=bos if bos >= 0 else None,
              eos_token_id=eos, dtype=dtype)


def config_of(raw: Raw, dtype: str = "float32", remat: str = "none",
              where: str = "config.json") -> decoder.ModelConfig:
  """The ModelConfig of a parsed config.json.

  Raises:
    ConfigError: an architecture, or a value of a field, that is not known.
  """
  kind = raw.get("model_type")
  if kind in TEXT_TOWERS:
    raw, kind = dict(raw.get("text_config") or {}), TEXT_TOWERS[kind]
  if kind not in FAMILIES:
    experts = ("; mixtures of experts are out of scope" if isinstance(kind, str)
               and ("moe" in kind or "mixtral" in kind) else "")
    raise ConfigError(
        f"{where}: model_type={kind!r} is unknown{experts}; known: "
        f"{', '.join([*FAMILIES, *TEXT_TOWERS])}; set config.model.checkpoint")
  family = FAMILIES[kind]
  raw = family.defaults | raw
  for name, value in family.refused.items():
    if (raw.get(name) or value) != value:
      raise ConfigError(f"{where}: {name}={raw[name]!r} is not read, only "
                        f"{value!r}")
  try:
    return decoder.ModelConfig(dtype=dtype, remat=remat, family=kind,
                               **family.read(raw))
  except ConfigError as error:
    raise ConfigError(f"{where}: {error}; set config.model.checkpoint"
                      ) from error
  except (ValueError, TypeError, AttributeError, KeyError,
          ZeroDivisionError) as error:
    raise ConfigError(f"{where} is no config of a {kind} "
                      f"({type(error).__name__}: {error}); set "
                      "config.model.checkpoint") from error


def read_raw(folder: Any) -> dict[str, Any]:
  """The parsed config.json of a Hugging Face folder.

  Raises:
    ConfigError: there is none, or it is no JSON object.
  """
  path = epath.Path(folder) / "config.json"
  if not path.exists():
    raise ConfigError(f"{folder} has no config.json; set config.model."
                      "checkpoint to a Hugging Face folder")
  try:
    raw = json.loads(path.read_bytes())
    if not isinstance(raw, dict):
      raise ValueError(f"a {type(raw).__name__}, wanted an object")
  except ValueError as error:
    raise ConfigError(f"{path} is no JSON object ({error}); set "
                      "config.model.checkpoint") from error
  return raw


def read_config(folder: Any, dtype: str, remat: str) -> decoder.ModelConfig:
  """The ModelConfig of a Hugging Face folder; ConfigError as `config_of`."""
  return config_of(read_raw(folder), dtype, remat,
                   str(epath.Path(folder) / "config.json"))
