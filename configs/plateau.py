r"""How win rate grows with data: random parts of the pool, from 1 % to all.

Each part is a run of its own, not a checkpoint of a longer one; those of one
seed are nested, since a smaller random part is the start of a larger one. The
curve is fitted beside curves without a plateau (jaxalign/eval/plateau.py) and
written to fit.json.

  python -m jaxalign.main --config=configs/plateau.py --workdir=runs/plateau
  python -m jaxalign.main --config=configs/plateau.py:smoke,kto
"""

from configs import common


def get_config(variant=""):
  """`variant`: "", "smoke", "tiny", "hh", "kto": see configs/common.py."""
  c = common.base(variant)
  c.select.sampler = "random"
  c.budgets = (0.01, 0.02, 0.035, 0.05, 0.1, 0.25, 0.5, 1.0)
  c.compare = ()
  c.seeds = 3
  c.train.max_updates = 0  # a bound would make all large parts alike
  if "tiny" in variant.split(","):
    c.train.max_updates = 4
    c.budgets, c.seeds = (0.05, 0.1, 0.25, 1.0), 2
  return c
