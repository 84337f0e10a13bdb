"""Gemma 2 and 3: norms after too, scaled embeddings, near and far layers."""

import math

from jaxalign.model import decoder
from jaxalign.model.decoder import ModelConfig
from jaxalign.model.families.fields import (
  Family,
  Fields,
  FULL,
  one_rope,
  Raw,
  read_rope,
  read_sizes,
  read_windows,
  rope_fields,
  SLIDING,
  write_one_rope,
  write_rope,
  write_sizes,
  write_windows,
)
from jaxalign.model.families.llama import BASE, llama_stored


def _read_gemma(raw: Raw) -> Fields:
  bias = bool(raw["attention_bias"])
  fields = read_sizes(raw)
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


def _read_gemma2(raw: Raw) -> Fields:
  fields = _read_gemma(raw) | one_rope(raw)
  types = raw.get("layer_types") or [
    FULL if i % 2 else SLIDING for i in range(fields["layers"])
  ]
  return fields | read_windows(types, raw["sliding_window"])


def _read_gemma3(raw: Raw) -> Fields:
  fields = _read_gemma(raw) | dict(qk_norm=True)
  every = int(raw["sliding_window_pattern"])
  types = raw.get("layer_types") or [
    SLIDING if (i + 1) % every else FULL for i in range(fields["layers"])
  ]
  fields |= read_windows(types, raw["sliding_window"])
  ropes, context = raw.get("rope_parameters") or {}, fields["context"]
  if ropes and not {SLIDING, FULL} & set(ropes):
    ropes = {FULL: ropes}
  far = ropes.get(FULL) or raw.get("rope_scaling") or {}
  far = read_rope(far, raw.get("rope_theta", 1e6), context)
  near = raw.get("rope_local_base_freq", 1e4)
  near = read_rope(ropes.get(SLIDING) or {}, near, context)
  if len(set(types)) < 2:
    return fields | rope_fields(near if types[0] == SLIDING else far)
  return fields | dict(ropes=(near, far), rope_theta=far.theta)


def _write_gemma(m: ModelConfig) -> Fields:
  out, scalar = write_sizes(m), m.query_scale**-2
  whole = abs(scalar - round(scalar)) < 1e-6 * scalar
  own = dict(
    hidden_activation=out["hidden_act"],
    attention_bias=m.qkv_bias,
    query_pre_attn_scalar=round(scalar) if whole else scalar,
    attn_logit_softcapping=m.softcap or None,
    final_logit_softcapping=m.final_softcap or None,
  )
  return out | own | write_windows(m)


def _write_gemma2(m: ModelConfig) -> Fields:
  return _write_gemma(m) | write_one_rope(m)


def _write_gemma3(m: ModelConfig) -> Fields:
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
_GEMMA2 = dict(
  _GEMMA,
  max_position_embeddings=8192,
  vocab_size=256000,
  attn_logit_softcapping=50.0,
  final_logit_softcapping=30.0,
)
_GEMMA3 = dict(
  _GEMMA,
  max_position_embeddings=131072,
  vocab_size=262208,
  attn_logit_softcapping=None,
  final_logit_softcapping=None,
)
_CAUSAL = dict(use_bidirectional_attention=False)
_NAMES = llama_stored, _CAUSAL

FAMILIES = {
  "gemma2": Family(
    "Gemma2ForCausalLM", _GEMMA2, _read_gemma2, _write_gemma2, *_NAMES
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM", _GEMMA3, _read_gemma3, _write_gemma3, *_NAMES
  ),
}
