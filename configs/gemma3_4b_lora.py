r"""DPO of Gemma 3 4B by LoRA: the base in bfloat16 is its own reference.

  python -m jaxalign.main --config=configs/gemma3_4b_lora.py --workdir=...
"""

from configs import common


def get_config(variant=""):
  """The production job on a mesh of accelerators; see the module."""
  c = common.base()
  c.data.source = "hf:HuggingFaceH4/ultrafeedback_binarized"
  c.model.checkpoint = "hf:google/gemma-3-4b-it"
  c.model.context, c.model.dtype, c.model.remat = 2048, "bfloat16", "full"
  c.model.head_chunk, c.model.param_dtype = 256, "bfloat16"
  c.lora.rank, c.lora.alpha = 16, 32.0
  c.embed.checkpoint, c.embed.layers = c.model.checkpoint, 4
  c.embed.pooling, c.embed.tile = "mean", 8
  c.loss.name = "dpo"
  c.loss.kwargs = dict(beta=0.1)
  c.loss.sft_weight = 0.0
  t = c.train
  t.epochs, t.max_updates, t.batch_size, t.accumulation = 1.0, 0, 64, 1
  t.warmup_ratio, t.schedule = 0.1, "linear"  # the rate is config.lora.lr
  t.clip, t.weight_decay, t.b2 = 1.0, 0.0, 0.999
  c.eval.new_tokens, c.eval.tile = 512, 8
  if variant:
    raise ValueError(f"unknown variant {variant!r}; there is none")
  return c
