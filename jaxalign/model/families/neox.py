"""GPT-NeoX (Pythia): fused query-key-value, LayerNorm, both halves at once."""

from typing import Any

from jaxalign.model import decoder
from jaxalign.model.families.fields import (
  Family,
  Raw,
  read_rope,
  rope_fields,
  sizes_of,
  stored_under,
  write_rope,
  write_sizes,
)
from jaxalign.model.table import Stored


def _read_neox(raw: Raw) -> dict[str, Any]:
  given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  fields = sizes_of(dict(raw, head_dim=None, num_key_value_heads=None))
  rope = read_rope(given, raw["rotary_emb_base"], fields["context"])
  return (
    fields
    | rope_fields(rope)
    | dict(
      norm="layer",
      gated=False,
      qkv_bias=bool(raw["attention_bias"]),
      out_bias=bool(raw["attention_bias"]),
      ff_bias=True,
      parallel=bool(raw["use_parallel_residual"]),
      rotary=float(given.get("partial_rotary_factor", raw["rotary_pct"])),
    )
  )


def _write_neox(m: decoder.ModelConfig) -> dict[str, Any]:
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


def neox_stored(m: decoder.ModelConfig) -> dict[str, Stored]:
  d, h, c, f, v = m.width, m.heads, m.head_size, m.ff, m.vocab
  fused, bias = (
    "attention.query_key_value.weight",
    ("attention.query_key_value.bias"),
  )
  flat = {}
  for i, name in enumerate(("q", "k", "v")):
    one = (1,) if name == "q" else ()  # G = H, so Q = 1
    n = len(one)
    flat[f"w{name}"] = (
      fused,
      (3 * h * c, d),
      (h, *one, 3, c, d),
      (2 + n, *range(2 + n)),
      (1 + n, i),
    )
    flat[f"b{name}"] = (
      bias,
      (3 * h * c,),
      (h, *one, 3, c),
      tuple(range(2 + n)),
      (1 + n, i),
    )
  for ours, theirs in (
    ("attention_norm", "input_layernorm"),
    ("ff_norm", "post_attention_layernorm"),
  ):
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
  top = {
    "embed": ("gpt_neox.embed_in.weight", (v, d), (v, d), (0, 1)),
    "norm": ("gpt_neox.final_layer_norm.weight", (d,), (d,), (0,)),
    "norm_bias": ("gpt_neox.final_layer_norm.bias", (d,), (d,), (0,)),
    "head": ("lm_head.weight", (v, d), (v, d), (0, 1)),
  }
  return stored_under("gpt_neox", m, top, flat)


FAMILIES = {
  "gpt_neox": Family(
    "GPTNeoXForCausalLM",
    dict(
      hidden_act="gelu",
      layer_norm_eps=1e-5,
      attention_bias=True,
      tie_word_embeddings=False,
      use_parallel_residual=True,
      max_position_embeddings=2048,
      rotary_pct=0.25,
      rotary_emb_base=10000.0,
    ),
    _read_neox,
    _write_neox,
    neox_stored,
  )
}
