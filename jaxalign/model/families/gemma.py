"""Gemma 2 and 3: norms after too, scaled embeddings, near and far layers."""

import math

from jaxalign.model import decoder
from jaxalign.model.decoder import ModelConfig
from jaxalign.model.families import fields
from jaxalign.model.families.fields import Family, Fields, FULL, Raw, SLIDING
from jaxalign.model.families.llama import BASE, llama_stored


def _read_gemma(raw: Raw, every: int) -> Fields:
  """All but the ropes; one layer in `every` sees all, if no types are given."""
  found, bias = fields.read_sizes(raw), bool(raw["attention_bias"])
  types = raw.get("layer_types") or [
    SLIDING if (i + 1) % every else FULL for i in range(found["layers"])
  ]
  own = dict(
    norm="rms_offset",
    post_norms=True,
    qkv_bias=bias,
    out_bias=bias,
    query_scale=float(raw["query_pre_attn_scalar"]) ** -0.5,
    softcap=float(raw["attn_logit_softcapping"] or 0),
    final_softcap=float(raw["final_logit_softcapping"] or 0),
    embed_scale=math.sqrt(found["width"]),
  )
  return found | own | fields.read_windows(types, raw["sliding_window"])


def _read_gemma2(raw: Raw) -> Fields:
  return _read_gemma(raw, 2) | fields.one_rope(raw)


def _read_gemma3(raw: Raw) -> Fields:
  found = _read_gemma(raw, int(raw["sliding_window_pattern"]))
  found["qk_norm"] = True
  ropes, context = raw.get("rope_parameters") or {}, found["context"]
  if ropes and not {SLIDING, FULL} & set(ropes):
    ropes = {FULL: ropes}
  far = ropes.get(FULL) or raw.get("rope_scaling") or {}
  far = fields.read_rope(far, raw.get("rope_theta", 1e6), context)
  near = raw.get("rope_local_base_freq", 1e4)
  near = fields.read_rope(ropes.get(SLIDING) or {}, near, context)
  if len(found["windows"]) > 1:
    return found | dict(ropes=(near, far), rope_theta=far.theta)
  return found | fields.rope_fields(near if found["windows"][0] else far)


def _write_gemma2(m: ModelConfig) -> Fields:
  out, scalar = fields.write_sizes(m), m.query_scale**-2
  whole = abs(scalar - round(scalar)) < 1e-6 * scalar
  own = dict(
    hidden_activation=out["hidden_act"],
    attention_bias=m.qkv_bias,
    query_pre_attn_scalar=round(scalar) if whole else scalar,
    attn_logit_softcapping=m.softcap or None,
    final_logit_softcapping=m.final_softcap or None,
  )
  return out | own | fields.write_windows(m) | fields.write_one_rope(m)


def _write_gemma3(m: ModelConfig) -> Fields:
  near, far = decoder.ropes(m)[0], decoder.ropes(m)[-1]
  ropes = {SLIDING: fields.write_rope(near), FULL: fields.write_rope(far)}
  return _write_gemma2(m._replace(ropes=())) | dict(
    rope_theta=far.theta, rope_local_base_freq=near.theta, rope_parameters=ropes
  )


_GEMMA2 = dict(
  BASE,
  hidden_act="gelu_pytorch_tanh",
  tie_word_embeddings=True,
  head_dim=256,
  num_attention_heads=8,
  num_key_value_heads=4,
  query_pre_attn_scalar=256,
  sliding_window=4096,
  sliding_window_pattern=6,
  max_position_embeddings=8192,
  vocab_size=256000,
  attn_logit_softcapping=50.0,
  final_logit_softcapping=30.0,
)
_GEMMA3 = dict(
  _GEMMA2,
  max_position_embeddings=131072,
  vocab_size=262208,
  attn_logit_softcapping=None,
  final_logit_softcapping=None,
)
_CAUSAL = dict(use_bidirectional_attention=False)

FAMILIES = {
  "gemma2": Family(
    *("Gemma2ForCausalLM", _GEMMA2, _read_gemma2, _write_gemma2),
    *(llama_stored, _CAUSAL),
  ),
  "gemma3_text": Family(
    *("Gemma3ForCausalLM", _GEMMA3, _read_gemma3, _write_gemma3),
    *(llama_stored, _CAUSAL),
  ),
}
