"""Gemma 2 and 3: norms after too, scaled embeddings, near and far layers."""

import math
from typing import Any

from jaxalign.model import decoder
from jaxalign.model.families.fields import (
  Family,
  FULL,
  layer_types_of,
  one_rope,
  Raw,
  read_rope,
  rope_fields,
  sizes_of,
  SLIDING,
  windows_of,
  write_one_rope,
  write_rope,
  write_sizes,
)
from jaxalign.model.families.llama import BASE, llama_stored


def _read_gemma(raw: Raw) -> dict[str, Any]:
  bias = bool(raw["attention_bias"])
  fields = sizes_of(raw)
  return fields | dict(
    norm="rms_offset",
    post_norms=True,
    qkv_bias=bias,
    out_bias=bias,
    query_scale=float(raw["query_pre_attn_scalar"]) ** -0.5,
    softcap=float(raw["attn_logit_softcapping"] or 0),
    final_softcap=float(raw["final_logit_softcapping"] or 0),
    embed_scale=math.sqrt(fields["width"]),
  )


def _read_gemma2(raw: Raw) -> dict[str, Any]:
  fields = _read_gemma(raw) | one_rope(raw)
  types = raw.get("layer_types") or [
    FULL if i % 2 else SLIDING for i in range(fields["layers"])
  ]
  return fields | windows_of(types, raw["sliding_window"])


def _read_gemma3(raw: Raw) -> dict[str, Any]:
  fields = _read_gemma(raw) | dict(qk_norm=True)
  every = int(raw["sliding_window_pattern"])
  types = raw.get("layer_types") or [
    SLIDING if (i + 1) % every else FULL for i in range(fields["layers"])
  ]
  fields |= windows_of(types, raw["sliding_window"])
  given, context = raw.get("rope_parameters") or {}, fields["context"]
  if given and not {SLIDING, FULL} & set(given):
    given = {FULL: given}
  far = read_rope(
    given.get(FULL) or raw.get("rope_scaling") or {},
    raw.get("rope_theta", 1e6),
    context,
  )
  near = read_rope(
    given.get(SLIDING) or {}, raw.get("rope_local_base_freq", 1e4), context
  )
  if len(set(types)) < 2:
    return fields | rope_fields(near if types[0] == SLIDING else far)
  return fields | dict(ropes=(near, far), rope_theta=far.theta)


def _write_gemma(m: decoder.ModelConfig) -> dict[str, Any]:
  out = write_sizes(m)
  return out | dict(
    hidden_activation=out["hidden_act"],
    attention_bias=m.qkv_bias,
    query_pre_attn_scalar=_whole(m.query_scale**-2),
    attn_logit_softcapping=m.softcap or None,
    final_logit_softcapping=m.final_softcap or None,
    sliding_window=max(m.windows) or None,
    layer_types=layer_types_of(m),
  )


def _whole(x: float) -> int | float:
  return round(x) if abs(x - round(x)) < 1e-6 * x else x


def _write_gemma2(m: decoder.ModelConfig) -> dict[str, Any]:
  return _write_gemma(m) | write_one_rope(m)


def _write_gemma3(m: decoder.ModelConfig) -> dict[str, Any]:
  near, far = decoder.ropes(m)[0], decoder.ropes(m)[-1]
  return _write_gemma(m) | dict(
    rope_theta=far.theta,
    rope_local_base_freq=near.theta,
    rope_parameters={SLIDING: write_rope(near), FULL: write_rope(far)},
  )


_GEMMA = dict(
  BASE,
  hidden_act="gelu_pytorch_tanh",
  tie_word_embeddings=True,
  head_dim=256,
  num_attention_heads=8,
  num_key_value_heads=4,
  query_pre_attn_scalar=256,
  sliding_window=4096,
  sliding_window_pattern=6,
)
_NO_BOTH = dict(use_bidirectional_attention=False)

FAMILIES = {
  "gemma2": Family(
    "Gemma2ForCausalLM",
    dict(
      _GEMMA,
      max_position_embeddings=8192,
      vocab_size=256000,
      attn_logit_softcapping=50.0,
      final_logit_softcapping=30.0,
    ),
    _read_gemma2,
    _write_gemma2,
    llama_stored,
    _NO_BOTH,
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    dict(
      _GEMMA,
      max_position_embeddings=131072,
      vocab_size=262208,
      attn_logit_softcapping=None,
      final_logit_softcapping=None,
    ),
    _read_gemma3,
    _write_gemma3,
    llama_stored,
    _NO_BOTH,
  ),
}
