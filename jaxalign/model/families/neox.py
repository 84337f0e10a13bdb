"""GPT-NeoX (Pythia): fused query-key-value, LayerNorm, both halves at once."""

from jaxalign.model import decoder
from jaxalign.model.decoder import ModelConfig
from jaxalign.model.families import fields
from jaxalign.model.families.fields import Family, Fields, Raw
from jaxalign.model.parameters import Stored

_TENSORS = {
  "embed": "gpt_neox.embed_in.weight",
  "norm": "gpt_neox.final_layer_norm.weight",
  "norm_bias": "gpt_neox.final_layer_norm.bias",
  "head": "lm_head.weight",
}
_LAYER = {
  "attention_norm": "input_layernorm.weight",
  "attention_norm_bias": "input_layernorm.bias",
  "wo": "attention.dense.weight",
  "bo": "attention.dense.bias",
  "ff_norm": "post_attention_layernorm.weight",
  "ff_norm_bias": "post_attention_layernorm.bias",
  "w_up": "mlp.dense_h_to_4h.weight",
  "b_up": "mlp.dense_h_to_4h.bias",
  "w_down": "mlp.dense_4h_to_h.weight",
  "b_down": "mlp.dense_4h_to_h.bias",
}


def _read_neox(raw: Raw) -> Fields:
  given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  found = fields.read_sizes(dict(raw, head_dim=None, num_key_value_heads=None))
  rope = fields.read_rope(given, raw["rotary_emb_base"], found["context"])
  own = dict(
    norm="layer",
    gated=False,
    qkv_bias=bool(raw["attention_bias"]),
    out_bias=bool(raw["attention_bias"]),
    ff_bias=True,
    parallel=bool(raw["use_parallel_residual"]),
    rotary=float(given.get("partial_rotary_factor", raw["rotary_pct"])),
  )
  return found | fields.rope_fields(rope) | own


def _write_neox(m: ModelConfig) -> Fields:
  rope, out = decoder.ropes(m)[0], fields.write_sizes(m)
  for name in ("head_dim", "num_key_value_heads", "rms_norm_eps"):
    del out[name]
  written = fields.write_rope(rope)
  return out | dict(
    layer_norm_eps=m.norm_eps,
    attention_bias=m.qkv_bias,
    use_parallel_residual=m.parallel,
    rotary_pct=m.rotary,
    rotary_emb_base=rope.theta,
    rope_parameters=dict(written, partial_rotary_factor=m.rotary),
  )


def _neox_stored(m: ModelConfig) -> dict[str, Stored]:
  d, h, c = m.width, m.heads, m.head_size
  layer = {n: f"gpt_neox.layers.{{}}.{name}" for n, name in _LAYER.items()}
  out = fields.stored_by_name(m, _TENSORS | layer)
  fused = "gpt_neox.layers.{}.attention.query_key_value"
  for i, name in enumerate("qkv"):
    front = (h, 1) if name == "q" else (h,)  # G = H, so Q = 1
    n, view, own = len(front), (*front, 3, c), tuple(range(len(front) + 1))
    weight = (3 * h * c, d), (*view, d), (n + 1, *own), (n, i)
    out[f"layers/w{name}"] = Stored(f"{fused}.weight", *weight)
    if m.qkv_bias:
      bias = (3 * h * c,), view, own, (n, i)
      out[f"layers/b{name}"] = Stored(f"{fused}.bias", *bias)
  return {name: out[name] for name in decoder.table(m)}


_NEOX = dict(
  hidden_act="gelu",
  layer_norm_eps=1e-5,
  attention_bias=True,
  tie_word_embeddings=False,
  use_parallel_residual=True,
  max_position_embeddings=2048,
  rotary_pct=0.25,
  rotary_emb_base=10000.0,
)
FAMILIES = {
  "gpt_neox": Family(
    "GPTNeoXForCausalLM", _NEOX, _read_neox, _write_neox, _neox_stored
  )
}
