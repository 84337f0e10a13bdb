r"""Samplers side by side: at two budgets, five seeds each, ranked.

A rank has a range: the samplers that the test, corrected for all of its
pairs (Holm), could not tell from it share ranks.

  python -m jaxalign.main --config=configs/compare.py --workdir=runs/compare
  python -m jaxalign.main --config=configs/compare.py --workdir=runs/two \
      --config.compare="('random','density')" --config.budgets="(0.05,0.2)"

"nine" are nine arms at a tenth of the pool; crossfit reads every label, and
external_margin, here, the world's true reward: a mark, no method. "grid" are
18 samplers at three budgets. With a world of common.py:

  python -m jaxalign.main --config=configs/compare.py:smoke,flips,nine
"""

from configs import common

ISA = ("isa", "isa(order=magnitude)", "isa(order=renormalised)")
NINE = ("random", "density", "k_center", *ISA, "real", "external_margin")
GRID = (
  *NINE,
  "stratified",
  "length_matched",
  "length",
  "perplexity",
  "herding",
  "facility_location",
  "dpp",
  "semdedup",
  "crossfit_lite",
)


def get_config(variant=""):
  """`variant`: "", "nine" or "grid", and those of configs/common.py."""
  variants = variant.split(",")
  c = common.base(",".join(v for v in variants if v not in ("nine", "grid")))
  c.select.sampler = "isa"
  c.compare = (
    "random",
    "length_matched",
    "density",
    "k_center",
    "herding",
    "all",
  )
  c.budgets = (0.035, 0.1)
  c.seeds, c.train.min_updates = 5, 50
  if "nine" in variants or "grid" in variants:
    c.select.sampler = "crossfit"
    c.compare = (*NINE, "crossfit_lite", "all")
    c.budgets = (0.1,)
  if "grid" in variants:
    c.compare, c.budgets = (*GRID, "all"), (0.035, 0.1, 0.25)
  if "tiny" in variants:
    c.compare, c.budgets = ("random", "k_center"), (0.05, 0.1)
    c.seeds, c.train.min_updates = 2, 1
  return c
