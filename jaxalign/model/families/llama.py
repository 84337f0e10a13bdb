"""Llama, Mistral, Qwen2 and Qwen3: one naming of tensors, switches apart."""

from jaxalign.model.decoder import ModelConfig
from jaxalign.model.families import fields
from jaxalign.model.families.fields import Family, Fields, FULL, Raw, SLIDING
from jaxalign.model.parameters import Stored

TENSORS = {
  "embed": "model.embed_tokens.weight",
  "norm": "model.norm.weight",
  "head": "lm_head.weight",
}
LAYER = {
  "attention_norm": "input_layernorm.weight",
  "wq": "self_attn.q_proj.weight",
  "wk": "self_attn.k_proj.weight",
  "wv": "self_attn.v_proj.weight",
  "wo": "self_attn.o_proj.weight",
  "bq": "self_attn.q_proj.bias",
  "bk": "self_attn.k_proj.bias",
  "bv": "self_attn.v_proj.bias",
  "bo": "self_attn.o_proj.bias",
  "q_norm": "self_attn.q_norm.weight",
  "k_norm": "self_attn.k_norm.weight",
  "ff_norm": "post_attention_layernorm.weight",
  "w_gate": "mlp.gate_proj.weight",
  "w_up": "mlp.up_proj.weight",
  "w_down": "mlp.down_proj.weight",
  "b_gate": "mlp.gate_proj.bias",
  "b_up": "mlp.up_proj.bias",
  "b_down": "mlp.down_proj.bias",
}
POST_NORMS = {
  "attention_post_norm": "post_attention_layernorm.weight",
  "ff_norm": "pre_feedforward_layernorm.weight",
  "ff_post_norm": "post_feedforward_layernorm.weight",
}


def llama_stored(m: ModelConfig) -> dict[str, Stored]:
  """Where the parameters lie, for every switch that ModelConfig knows."""
  layer = LAYER | (POST_NORMS if m.post_norms else {})
  layer = {ours: f"model.layers.{{}}.{name}" for ours, name in layer.items()}
  return fields.stored_by_name(m, TENSORS | layer)


def read_common(raw: Raw) -> Fields:
  """Sizes and one rope."""
  return fields.read_sizes(raw) | fields.one_rope(raw)


def write_common(m: ModelConfig) -> Fields:
  """The inverse of `read_common`."""
  return fields.write_sizes(m) | fields.write_one_rope(m)


def _read_llama(raw: Raw) -> Fields:
  bias = dict.fromkeys(("qkv_bias", "out_bias"), bool(raw["attention_bias"]))
  return read_common(raw) | bias | dict(ff_bias=bool(raw["mlp_bias"]))


def _write_llama(m: ModelConfig) -> Fields:
  return write_common(m) | dict(attention_bias=m.qkv_bias, mlp_bias=m.ff_bias)


def _read_mistral(raw: Raw) -> Fields:
  return read_common(raw) | dict(windows=(int(raw["sliding_window"] or 0),))


def _write_mistral(m: ModelConfig) -> Fields:
  return write_common(m) | dict(sliding_window=m.windows[0] or None)


def _read_qwen2(raw: Raw) -> Fields:
  found = read_common(raw) | dict(qkv_bias=True)
  window = raw["sliding_window"] if raw["use_sliding_window"] else None
  types = raw.get("layer_types") or [
    SLIDING if window and i >= int(raw["max_window_layers"]) else FULL
    for i in range(found["layers"])
  ]
  return found | fields.read_windows(types, window)


def _read_qwen3(raw: Raw) -> Fields:
  bias = bool(raw["attention_bias"])
  return _read_qwen2(raw) | dict(qk_norm=True, qkv_bias=bias, out_bias=bias)


def _write_qwen2(m: ModelConfig) -> Fields:
  own = dict(use_sliding_window=any(m.windows), max_window_layers=m.layers)
  return write_common(m) | fields.write_windows(m) | own


def _write_qwen3(m: ModelConfig) -> Fields:
  return _write_qwen2(m) | dict(attention_bias=m.out_bias)


BASE = dict(
  hidden_act="silu",
  rms_norm_eps=1e-6,
  tie_word_embeddings=False,
  attention_bias=False,
  mlp_bias=False,
)
_LLAMA = dict(BASE, max_position_embeddings=2048)
_MISTRAL = dict(
  BASE,
  max_position_embeddings=131072,
  sliding_window=4096,
  num_key_value_heads=8,
)
_QWEN2 = dict(
  BASE,
  max_position_embeddings=32768,
  use_sliding_window=False,
  sliding_window=4096,
  max_window_layers=28,
)
_QWEN3 = dict(_QWEN2, head_dim=128)

FAMILIES = {
  "llama": Family(
    "LlamaForCausalLM", _LLAMA, _read_llama, _write_llama, llama_stored
  ),
  "mistral": Family(
    "MistralForCausalLM", _MISTRAL, _read_mistral, _write_mistral, llama_stored
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM", _QWEN2, _read_qwen2, _write_qwen2, llama_stored
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM", _QWEN3, _read_qwen3, _write_qwen3, llama_stored
  ),
}
