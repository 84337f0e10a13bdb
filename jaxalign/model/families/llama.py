"""Llama, Mistral, Qwen2 and Qwen3: one naming of tensors, switches apart."""

from jaxalign.model.decoder import ModelConfig
from jaxalign.model.families.fields import (
  Family,
  Fields,
  FULL,
  one_rope,
  Raw,
  read_sizes,
  read_windows,
  SLIDING,
  stored_under,
  write_one_rope,
  write_sizes,
  write_windows,
)
from jaxalign.model.parameters import Stored


def llama_stored(m: ModelConfig) -> dict[str, Stored]:
  """Ours -> Hugging Face's, for every switch that ModelConfig knows."""
  d, g, q = m.width, m.kv_heads, m.heads // m.kv_heads
  c, f, v = m.head_size, m.ff, m.vocab
  h, plain = g * q * c, Stored.plain
  swapped = lambda name, *s: Stored(name, s, s, (1, 0))
  after, before = "post_attention_layernorm", "pre_feedforward_layernorm"
  if not m.post_norms:  # then the first of the names stands before
    before = after
  at = "self_attn"
  key, query = (g * c, d), (h, d)
  layer = {
    "attention_norm": plain("input_layernorm.weight", d),
    "wq": Stored(f"{at}.q_proj.weight", query, (g, q, c, d), (3, 0, 1, 2)),
    "wk": Stored(f"{at}.k_proj.weight", key, (g, c, d), (2, 0, 1)),
    "wv": Stored(f"{at}.v_proj.weight", key, (g, c, d), (2, 0, 1)),
    "wo": Stored(f"{at}.o_proj.weight", (d, h), (d, g, q, c), (1, 2, 3, 0)),
    "bq": Stored(f"{at}.q_proj.bias", (h,), (g, q, c), (0, 1, 2)),
    "bk": Stored(f"{at}.k_proj.bias", (g * c,), (g, c), (0, 1)),
    "bv": Stored(f"{at}.v_proj.bias", (g * c,), (g, c), (0, 1)),
    "bo": plain(f"{at}.o_proj.bias", d),
    "q_norm": plain(f"{at}.q_norm.weight", c),
    "k_norm": plain(f"{at}.k_norm.weight", c),
    "attention_post_norm": plain(f"{after}.weight", d),
    "ff_norm": plain(f"{before}.weight", d),
    "ff_post_norm": plain("post_feedforward_layernorm.weight", d),
    "w_gate": swapped("mlp.gate_proj.weight", f, d),
    "w_up": swapped("mlp.up_proj.weight", f, d),
    "w_down": swapped("mlp.down_proj.weight", d, f),
    "b_gate": plain("mlp.gate_proj.bias", f),
    "b_up": plain("mlp.up_proj.bias", f),
    "b_down": plain("mlp.down_proj.bias", d),
  }
  top = {
    "embed": plain("model.embed_tokens.weight", v, d),
    "norm": plain("model.norm.weight", d),
    "head": plain("lm_head.weight", v, d),
  }
  return stored_under("model", m, top, layer)


def _read_llama(raw: Raw) -> Fields:
  bias = dict.fromkeys(("qkv_bias", "out_bias"), bool(raw["attention_bias"]))
  bias["ff_bias"] = bool(raw["mlp_bias"])
  return read_sizes(raw) | one_rope(raw) | bias


def _write_llama(m: ModelConfig) -> Fields:
  bias = dict(attention_bias=m.qkv_bias, mlp_bias=m.ff_bias)
  return write_sizes(m) | write_one_rope(m) | bias


def _read_mistral(raw: Raw) -> Fields:
  windows = (int(raw["sliding_window"] or 0),)
  return read_sizes(raw) | one_rope(raw) | dict(windows=windows)


def _write_mistral(m: ModelConfig) -> Fields:
  window = dict(sliding_window=m.windows[0] or None)
  return write_sizes(m) | write_one_rope(m) | window


def _read_qwen(raw: Raw) -> Fields:
  fields = read_sizes(raw) | one_rope(raw)
  window = raw["sliding_window"] if raw["use_sliding_window"] else None
  types = raw.get("layer_types") or [
    SLIDING if window and i >= int(raw["max_window_layers"]) else FULL
    for i in range(fields["layers"])
  ]
  return fields | read_windows(types, window)


def _read_qwen2(raw: Raw) -> Fields:
  return _read_qwen(raw) | dict(qkv_bias=True)


def _read_qwen3(raw: Raw) -> Fields:
  bias = bool(raw["attention_bias"])
  return _read_qwen(raw) | dict(qk_norm=True, qkv_bias=bias, out_bias=bias)


def _write_qwen(m: ModelConfig) -> Fields:
  own = dict(use_sliding_window=any(m.windows), max_window_layers=m.layers)
  return write_sizes(m) | write_one_rope(m) | write_windows(m) | own


def _write_qwen3(m: ModelConfig) -> Fields:
  return _write_qwen(m) | dict(attention_bias=m.out_bias)


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
_QWEN = dict(
  BASE,
  max_position_embeddings=32768,
  use_sliding_window=False,
  sliding_window=4096,
  max_window_layers=28,
)
_QWEN3 = dict(_QWEN, head_dim=128)

FAMILIES = {
  "llama": Family(
    "LlamaForCausalLM", _LLAMA, _read_llama, _write_llama, llama_stored
  ),
  "mistral": Family(
    "MistralForCausalLM", _MISTRAL, _read_mistral, _write_mistral, llama_stored
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM", _QWEN, _read_qwen2, _write_qwen, llama_stored
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM", _QWEN3, _read_qwen3, _write_qwen3, llama_stored
  ),
}
