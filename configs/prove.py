r"""A fair test of a sampler: against random, length-matched random, and all.

The arms on a part of the pool have one recipe, the same number of rows and
updates (50 at least), the same prompts and five seeds. Everything is trained
twice: for its own epochs, and for as many updates as a part. The verdicts are
in words: better, worse, equal within two points, or cannot tell.

  python -m jaxalign.main --config=configs/prove.py --workdir=runs/prove
  python -m jaxalign.main --config=configs/prove.py:smoke \
      --config.select.sampler=k_center --workdir=runs/prove_k_center
"""

from configs import common


def get_config(variant=""):
  """`variant`: "", "smoke", "tiny" or "hh", see configs/common.py."""
  c = common.base(variant)
  c.select.sampler = "isa"
  c.select.budget = 0.1
  c.compare = ("random", "length_matched", "all", "all_short")
  c.seeds, c.train.min_updates = 5, 50
  if "tiny" in variant.split(","):
    c.seeds, c.train.min_updates = 2, 1
  return c
