"""config.json of models that the configs name, so that a dry run needs no net.

Facts copied from the models' own files; used only where these cannot be had.
"""

from typing import Any

_LLAMA_3 = dict(
  model_type="llama",
  hidden_size=4096,
  intermediate_size=14336,
  num_hidden_layers=32,
  num_attention_heads=32,
  num_key_value_heads=8,
  vocab_size=128256,
  max_position_embeddings=8192,
  rms_norm_eps=1e-5,
  rope_theta=500000.0,
  hidden_act="silu",
  tie_word_embeddings=False,
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

CONFIGS: dict[str, dict[str, Any]] = {
  "hf:mistralai/Mistral-7B-v0.1": dict(
    model_type="mistral",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
    hidden_act="silu",
    tie_word_embeddings=False,
  ),
  "hf:meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3,
  "hf:Qwen/Qwen3-8B": dict(
    model_type="qwen3",
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    hidden_act="silu",
    tie_word_embeddings=False,
  ),
  "hf:google/gemma-3-4b-it": _GEMMA_3_4B,
  "hf:sentence-transformers/all-MiniLM-L6-v2": dict(
    model_type="bert",
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=12,
    vocab_size=30522,
    max_position_embeddings=512,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    hidden_act="gelu",
  ),
}
