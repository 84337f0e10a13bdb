"""GPT-NeoX (Pythia): fused query-key-value, LayerNorm, both halves at once."""

from jaxalign.model import decoder
from jaxalign.model.decoder import ModelConfig
from jaxalign.model.families.fields import (
  Family,
  Fields,
  Raw,
  read_rope,
  read_sizes,
  rope_fields,
  stored_under,
  write_rope,
  write_sizes,
)
from jaxalign.model.parameters import Stored


def _read_neox(raw: Raw) -> Fields:
  given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  fields = read_sizes(dict(raw, head_dim=None, num_key_value_heads=None))
  rope = read_rope(given, raw["rotary_emb_base"], fields["context"])
  own = dict(
    norm="layer",
    gated=False,
    qkv_bias=bool(raw["attention_bias"]),
    out_bias=bool(raw["attention_bias"]),
    ff_bias=True,
    parallel=bool(raw["use_parallel_residual"]),
    rotary=float(given.get("partial_rotary_factor", raw["rotary_pct"])),
  )
  return fields | rope_fields(rope) | own


def _write_neox(m: ModelConfig) -> Fields:
  rope = decoder.ropes(m)[0]
  out = write_sizes(m)
  for name in ("head_dim", "num_key_value_heads", "rms_norm_eps"):
    del out[name]
  return out | dict(
    layer_norm_eps=m.norm_eps,
    attention_bias=m.qkv_bias,
    use_parallel_residual=m.parallel,
    rotary_pct=m.rotary,
    rotary_emb_base=rope.theta,
    rope_parameters=dict(write_rope(rope), partial_rotary_factor=m.rotary),
  )


def _neox_stored(m: ModelConfig) -> dict[str, Stored]:
  d, h, c, f, v = m.width, m.heads, m.head_size, m.ff, m.vocab
  plain, swapped = Stored.plain, lambda name, *s: Stored(name, s, s, (1, 0))
  fused = "attention.query_key_value"
  output = (d, h * c), (d, h, 1, c), (1, 2, 3, 0)
  layer = {
    "wo": Stored("attention.dense.weight", *output),
    "bo": plain("attention.dense.bias", d),
    "w_up": swapped("mlp.dense_h_to_4h.weight", f, d),
    "b_up": plain("mlp.dense_h_to_4h.bias", f),
    "w_down": swapped("mlp.dense_4h_to_h.weight", d, f),
    "b_down": plain("mlp.dense_4h_to_h.bias", d),
  }
  for i, name in enumerate("qkv"):
    front = (h, 1) if name == "q" else (h,)  # G = H, so Q = 1
    n, view, own = len(front), (*front, 3, c), tuple(range(len(front) + 1))
    bias = (3 * h * c,), view, own, (n, i)
    layer[f"b{name}"] = Stored(f"{fused}.bias", *bias)
    weight = (3 * h * c, d), (*view, d), (n + 1, *own), (n, i)
    layer[f"w{name}"] = Stored(f"{fused}.weight", *weight)
  norms = dict(
    attention_norm="input_layernorm", ff_norm="post_attention_layernorm"
  )
  for ours, theirs in norms.items():
    layer[ours] = plain(f"{theirs}.weight", d)
    layer[f"{ours}_bias"] = plain(f"{theirs}.bias", d)
  top = {
    "embed": plain("gpt_neox.embed_in.weight", v, d),
    "norm": plain("gpt_neox.final_layer_norm.weight", d),
    "norm_bias": plain("gpt_neox.final_layer_norm.bias", d),
    "head": plain("lm_head.weight", v, d),
  }
  return stored_under("gpt_neox", m, top, layer)


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
