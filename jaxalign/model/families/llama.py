"""Llama, Mistral, Qwen2 and Qwen3: one naming of tensors, switches apart."""

from typing import Any

from jaxalign.model import decoder
from jaxalign.model.families.fields import (
  Family,
  FULL,
  layer_types_of,
  one_rope,
  Raw,
  sizes_of,
  SLIDING,
  stored_under,
  windows_of,
  write_one_rope,
  write_sizes,
)
from jaxalign.model.table import Stored


def llama_stored(m: decoder.ModelConfig) -> dict[str, Stored]:
  """Ours -> Hugging Face's, for every switch that ModelConfig knows."""
  d, g, q, c, f, v = (
    m.width,
    m.kv_heads,
    m.heads // m.kv_heads,
    m.head_size,
    m.ff,
    m.vocab,
  )
  h = g * q * c
  after, before = (
    ("post_attention_layernorm", "pre_feedforward_layernorm")
    if m.post_norms
    else (None, "post_attention_layernorm")
  )
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
  top = {
    "embed": ("model.embed_tokens.weight", (v, d), (v, d), (0, 1)),
    "norm": ("model.norm.weight", (d,), (d,), (0,)),
    "head": ("lm_head.weight", (v, d), (v, d), (0, 1)),
  }
  return stored_under("model", m, top, flat)


def _read_llama(raw: Raw) -> dict[str, Any]:
  bias = bool(raw["attention_bias"])
  return dict(
    sizes_of(raw),
    **one_rope(raw),
    qkv_bias=bias,
    out_bias=bias,
    ff_bias=bool(raw["mlp_bias"]),
  )


def _write_llama(m: decoder.ModelConfig) -> dict[str, Any]:
  return dict(
    write_sizes(m),
    **write_one_rope(m),
    attention_bias=m.qkv_bias,
    mlp_bias=m.ff_bias,
  )


def _read_mistral(raw: Raw) -> dict[str, Any]:
  return dict(
    sizes_of(raw), **one_rope(raw), windows=(int(raw["sliding_window"] or 0),)
  )


def _write_mistral(m: decoder.ModelConfig) -> dict[str, Any]:
  return dict(
    write_sizes(m), **write_one_rope(m), sliding_window=m.windows[0] or None
  )


def _read_qwen(raw: Raw) -> dict[str, Any]:
  fields = dict(sizes_of(raw), **one_rope(raw))
  window = raw["sliding_window"] if raw["use_sliding_window"] else None
  types = raw.get("layer_types") or [
    SLIDING if window and i >= int(raw["max_window_layers"]) else FULL
    for i in range(fields["layers"])
  ]
  return fields | windows_of(types, window)


def _read_qwen2(raw: Raw) -> dict[str, Any]:
  return _read_qwen(raw) | dict(qkv_bias=True)


def _read_qwen3(raw: Raw) -> dict[str, Any]:
  bias = bool(raw["attention_bias"])
  return _read_qwen(raw) | dict(qk_norm=True, qkv_bias=bias, out_bias=bias)


def _write_qwen(m: decoder.ModelConfig) -> dict[str, Any]:
  return dict(
    write_sizes(m),
    **write_one_rope(m),
    use_sliding_window=any(m.windows),
    layer_types=layer_types_of(m),
    sliding_window=max(m.windows) or None,
    max_window_layers=m.layers,
  )


def _write_qwen3(m: decoder.ModelConfig) -> dict[str, Any]:
  return _write_qwen(m) | dict(attention_bias=m.out_bias)


BASE = dict(
  hidden_act="silu",
  rms_norm_eps=1e-6,
  tie_word_embeddings=False,
  attention_bias=False,
  mlp_bias=False,
)
_QWEN = dict(
  BASE,
  max_position_embeddings=32768,
  use_sliding_window=False,
  sliding_window=4096,
  max_window_layers=28,
)

FAMILIES = {
  "llama": Family(
    "LlamaForCausalLM",
    dict(BASE, max_position_embeddings=2048),
    _read_llama,
    _write_llama,
    llama_stored,
  ),
  "mistral": Family(
    "MistralForCausalLM",
    dict(
      BASE,
      max_position_embeddings=131072,
      sliding_window=4096,
      num_key_value_heads=8,
    ),
    _read_mistral,
    _write_mistral,
    llama_stored,
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM", _QWEN, _read_qwen2, _write_qwen, llama_stored
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    dict(_QWEN, head_dim=128),
    _read_qwen3,
    _write_qwen3,
    llama_stored,
  ),
}
