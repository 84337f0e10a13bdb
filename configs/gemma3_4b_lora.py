r"""DPO of Gemma 3 4B by LoRA: the base in bfloat16 is its own reference.

python -m jaxalign.main --config=configs/gemma3_4b_lora.py --workdir=...
"""

from configs import common


def get_config(variant=""):
  """The production job on a mesh of accelerators; see the module."""
  common.only(variant)
  c = common.production()
  c.model.checkpoint = "hf:google/gemma-3-4b-it"
  c.model.head_chunk, c.model.param_dtype = 256, "bfloat16"
  c.lora.rank, c.lora.alpha = 16, 32.0
  c.embed.checkpoint, c.embed.layers = c.model.checkpoint, 4
  c.loss.name = "dpo"
  c.train.batch_size = 64
  return c
