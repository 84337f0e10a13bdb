r"""How win rate grows with data: random subsets of the pool, from 1 % to all.

Each subset is a run of its own, not a checkpoint of a longer one; those of one
seed are nested, since a smaller random subset begins a larger one. The curve is
fitted next to curves without a plateau (jaxalign/study/plateau.py) and written
to fit.json.

  python -m jaxalign.main --config=configs/plateau.py --workdir=runs/plateau
  python -m jaxalign.main --config=configs/plateau.py:smoke,kto

"along" is the cheap one: checkpoints along one epoch over all rows, labelled as
such, and a tenth as a run of its own.
"""

from configs import common


def get_config(variant=""):
  """`variant`: "", "along", and those of configs/common.py, by commas."""
  variants = variant.split(",")
  c = common.base(",".join(v for v in variants if v != "along"))
  c.select.sampler = "random"
  c.budgets = (0.01, 0.02, 0.035, 0.05, 0.1, 0.25, 0.5, 1.0)
  c.compare = ()
  c.seeds = 3
  c.train.max_updates = 0  # a bound would make all large parts alike
  if "tiny" in variants:
    c.train.max_updates = 4
    c.budgets, c.seeds = (0.05, 0.1, 0.25, 1.0), 2
  if "along" in variants:
    c.budgets, c.train.epochs = (0.1, 1.0), 1.0
    c.train.eval_every, c.train.eval_sets = 10, ("generations",)
    c.train.eval_prompts = 256
    if "tiny" in variants:
      c.train.eval_every, c.train.max_updates = 2, 0
  return c
