"""config.json of models that the configs name, so that a dry run needs no net.

Facts copied from the models' own files; used only where these cannot be had.
"""

from typing import Any

from jaxalign.model.families.fields import SIZES


def _config(kind: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
  """`sizes` are those of SIZES, in their order."""
  return dict(model_type=kind, **dict(zip(SIZES.values(), sizes)), **more)


_GROUPED = dict(
  num_key_value_heads=8, hidden_act="silu", tie_word_embeddings=False
)
_LINEAR_8 = dict(factor=8.0, rope_type="linear")
PUBLISHED: dict[str, dict[str, Any]] = {
  "hf:mistralai/Mistral-7B-v0.1": _config(
    "mistral",
    (32, 4096, 32, 14336, 32000, 32768),
    **_GROUPED,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
  ),
  "hf:meta-llama/Meta-Llama-3-8B-Instruct": _config(
    "llama",
    (32, 4096, 32, 14336, 128256, 8192),
    **_GROUPED,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
  ),
  "hf:Qwen/Qwen3-8B": _config(
    "qwen3",
    (36, 4096, 32, 12288, 151936, 40960),
    **_GROUPED,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    head_dim=128,
  ),
  "hf:google/gemma-3-4b-it": dict(
    model_type="gemma3",
    text_config=dict(
      model_type="gemma3_text",
      hidden_size=2560,
      intermediate_size=10240,
      num_hidden_layers=34,
      sliding_window=1024,
      rope_scaling=_LINEAR_8,
    ),
  ),
  "hf:sentence-transformers/all-MiniLM-L6-v2": _config(
    "bert",
    (6, 384, 12, 1536, 30522, 512),
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    hidden_act="gelu",
  ),
}
