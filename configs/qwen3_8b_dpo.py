r"""DPO of Qwen3-8B on a tenth of the pool, embedded by its own first layers.

python -m jaxalign.main --config=configs/qwen3_8b_dpo.py --workdir=...
"""

from configs import common


def get_config(variant=""):
  """The production job on a mesh of accelerators; see the module."""
  common.only(variant)
  c = common.production()
  c.model.checkpoint = "hf:Qwen/Qwen3-8B"
  c.embed.checkpoint, c.embed.layers = c.model.checkpoint, 4
  c.loss.name = "dpo"
  c.train.batch_size, c.train.lr, c.train.schedule = 128, 5e-7, "cosine"
  return c
