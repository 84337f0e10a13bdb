r"""DPO of Qwen3-8B on a tenth of the pool, embedded by its own first layers.

  python -m jaxalign.main --config=configs/qwen3_8b_dpo.py --workdir=...
"""

from configs import common


def get_config(variant=""):
  """The production job on a mesh of accelerators; see the module."""
  c = common.base()
  c.data.source = "hf:HuggingFaceH4/ultrafeedback_binarized"
  c.model.checkpoint = "hf:Qwen/Qwen3-8B"
  c.model.context, c.model.dtype, c.model.remat = 2048, "bfloat16", "full"
  c.model.head_chunk = 512
  c.embed.checkpoint, c.embed.layers = c.model.checkpoint, 4
  c.embed.pooling, c.embed.tile = "mean", 8
  c.loss.name = "dpo"
  c.loss.kwargs = dict(beta=0.1)
  c.loss.sft_weight = 0.0
  t = c.train
  t.epochs, t.max_updates, t.batch_size, t.accumulation = 1.0, 0, 128, 1
  t.lr, t.warmup_ratio, t.schedule = 5e-7, 0.1, "cosine"
  t.clip, t.weight_decay, t.b2 = 1.0, 0.0, 0.999
  c.eval.new_tokens, c.eval.tile = 512, 8
  if variant:
    raise ValueError(f"unknown variant {variant!r}; there is none")
  return c
