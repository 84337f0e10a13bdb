r"""KTO on the tenth of the answers that ISA ranks first, in the built-in world.

Pairs are split into single answers, liked and disliked; rows are ranked alone,
without a label quota, as in the paper.

  python -m jaxalign.main --config=configs/kto_sub.py --workdir=runs/kto_sub
"""

from configs import common


def get_config(variant=""):
  """`variant`: "", "smoke" or "hh", see configs/common.py."""
  c = common.base(",".join(filter(None, (variant, "kto"))))
  c.select.sampler = "isa"
  c.select.budget = 0.1
  return c
