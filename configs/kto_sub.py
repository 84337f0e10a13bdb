r"""KTO on the tenth of the thumbs that ISA ranks first, with the built-in world.

Pairs are split into thumbs up and down; rows are ranked alone, without a
label quota, as in the paper.

  python -m jaxalign.main --config=configs/kto_sub.py --workdir=runs/kto_sub
"""

from configs import common


def get_config(variant=""):
  """`variant`: "", "smoke" or "hh", see configs/common.py."""
  c = common.base(variant)
  c.select.sampler = "isa"
  c.select.budget = 0.1
  c.loss.name = "kto"
  c.loss.kwargs = common.ConfigDict(dict(
      beta=0.3, desirable=1.0, undesirable=1.0))
  c.loss.sft_weight = 0.0  # KTO's own answers carry no preferred side
  c.train.batch_size = 64  # rows, as many answers as 32 pairs
  return c
