r"""Samplers side by side: at two budgets, five seeds each, ranked.

A rank has a range: the samplers that the test, corrected for all of its
pairs (Holm), could not tell from it share ranks.

  python -m jaxalign.main --config=configs/compare.py --workdir=runs/compare
  python -m jaxalign.main --config=configs/compare.py --workdir=runs/two \
      --config.compare="('random','density')" --config.budgets="(0.05,0.2)"
"""

from configs import common


def get_config(variant=""):
  """`variant`: "", "smoke", "tiny" or "hh", see configs/common.py."""
  c = common.base(variant)
  c.select.sampler = "isa"
  c.compare = ("random", "length_matched", "density", "k_center", "herding",
               "all")
  c.budgets = (0.035, 0.1)
  c.seeds, c.train.min_updates = 5, 50
  if "tiny" in variant.split(","):
    c.compare, c.budgets = ("random", "k_center"), (0.05, 0.1)
    c.seeds, c.train.min_updates = 2, 1
  return c
