"""config.json of models that the configs name, so that a dry run needs no net.

Facts copied from the models' own files; used only where these cannot be had.
"""

from typing import Any


def _config(kind, width, ff, layers, heads, vocab, context, **more):
  return dict(
    model_type=kind,
    hidden_size=width,
    intermediate_size=ff,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    vocab_size=vocab,
    max_position_embeddings=context,
    **more,
  )


_LLAMA = dict(
  num_key_value_heads=8, hidden_act="silu", tie_word_embeddings=False
)
_MISTRAL_7B = _config(
  *("mistral", 4096, 14336, 32, 32, 32000, 32768),
  **_LLAMA,
  rms_norm_eps=1e-5,
  rope_theta=10000.0,
  sliding_window=4096,
)
_LLAMA_3_8B = _config(
  *("llama", 4096, 14336, 32, 32, 128256, 8192),
  **_LLAMA,
  rms_norm_eps=1e-5,
  rope_theta=500000.0,
)
_QWEN_3_8B = _config(
  *("qwen3", 4096, 12288, 36, 32, 151936, 40960),
  **_LLAMA,
  rms_norm_eps=1e-6,
  rope_theta=1000000.0,
  head_dim=128,
)
_GEMMA_3_4B = dict(
  model_type="gemma3",
  text_config=dict(
    model_type="gemma3_text",
    hidden_size=2560,
    intermediate_size=10240,
    num_hidden_layers=34,
    sliding_window=1024,
    rope_scaling=dict(factor=8.0, rope_type="linear"),
  ),
)
_MINILM = _config(
  *("bert", 384, 1536, 6, 12, 30522, 512),
  type_vocab_size=2,
  layer_norm_eps=1e-12,
  hidden_act="gelu",
)
PUBLISHED: dict[str, dict[str, Any]] = {
  "hf:mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
  "hf:meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
  "hf:Qwen/Qwen3-8B": _QWEN_3_8B,
  "hf:google/gemma-3-4b-it": _GEMMA_3_4B,
  "hf:sentence-transformers/all-MiniLM-L6-v2": _MINILM,
}
