r"""DPO on the tenth of the pool that ISA ranks first, with the built-in world.

A random tenth and the whole pool are trained with the same recipe (three
epochs, at most 250 updates) and compared.

  python -m jaxalign.main --config=configs/dpo_sub.py --workdir=runs/dpo_sub
  python -m jaxalign.main --config=configs/dpo_sub.py:smoke --workdir=runs/smoke
  python -m jaxalign.main --config=configs/dpo_sub.py:hh --workdir=runs/hh
"""

from configs import common


def get_config(variant=""):
  """`variant`: "", "smoke" or "hh", see configs/common.py."""
  c = common.base(variant)
  c.select.sampler = "isa"
  c.select.budget = 0.1
  return c
