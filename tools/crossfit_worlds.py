r"""What crossfit keeps of worlds whose true reward is known, without training.

  python tools/crossfit_worlds.py --sampler=crossfit_lite --seeds=101,102,103
  python tools/crossfit_worlds.py --sampler=crossfit --seeds=101 --updates=150

Written down before the first of these seeds was looked at (0 and 1 were used
to choose): a tenth of a pool of 8,000 pairs, in a world of its own each seed,
clean, with 25 % of labels flipped, and with 15 % of junk pairs. Of the kept
pairs, the share whose label disagrees with the true reward (junk pairs have
none), and the share of junk; a random tenth beside it. The goals: at most 2 %
wrong at 25 % flips, at most 1 % junk at 15 % junk. crossfit reads every
label: it saves training, not annotation, and a random tenth reads none.

The reference whose embeddings crossfit reads is trained for `--updates`
batches; crossfit_lite has no model. No policy is trained.
"""

import argparse
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import common  # noqa: E402
from jaxalign import pipeline
from jaxalign.core import progress, sharding
from jaxalign.data import prepare  # noqa: E402
from jaxalign.data import world as world_lib  # noqa: E402
from jaxalign.model import job as job_lib  # noqa: E402
from jaxalign.select.choose import selected_rows  # noqa: E402

CONDITIONS = {
  "clean": {},
  "25 % flips": dict(flips=0.25),
  "15 % junk": dict(junk=0.15),
}


def one(args: argparse.Namespace, seed: int, knobs: dict) -> dict:
  """Shares of the whole pool and of what each sampler keeps, by its name."""
  c = common.base()
  c.data.seed = seed
  c.data.world.update(pool_rows=args.rows, **knobs)
  c.sft.updates = c.sft.save_every = args.updates
  mesh = sharding.make_mesh(c.mesh, jax.devices())
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
    job = pipeline.make_job(c, mesh, folder)
    pipeline.run_data(job)
    pipeline.run_scores(job, [job_lib.Arm(args.sampler, 0.1, seed)])
    world, rows = prepare.world_of(c), job.rows("pool")
    shares = lambda part: world_lib.faults(world, part).values()
    found = {"pool": (*shares(rows), 0.0)}
    for name in ("random", args.sampler):
      arm = job_lib.Arm(name, 0.1, seed)
      start = time.monotonic()
      pipeline.run_select(job, arm)
      kept = [rows[i] for i in selected_rows(job, arm)]
      found[name] = (*shares(kept), time.monotonic() - start)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--sampler", default="crossfit_lite")
  parser.add_argument("--seeds", default="101,102,103")
  parser.add_argument("--rows", type=int, default=8000)
  parser.add_argument("--updates", type=int, default=150)
  parser.add_argument("--conditions", default=",".join(CONDITIONS))
  args = parser.parse_args()
  progress.set_process(1)  # the stages say nothing; the table is the output
  print(
    f"| world | seed | wrong: pool, random, {args.sampler} | junk: pool, "
    "random, it | seconds |"
  )
  print("|---|---|---|---|---|", flush=True)
  for name in args.conditions.split(","):
    mean = []
    for seed in map(int, args.seeds.split(",")):
      found = one(args, seed, CONDITIONS[name])
      mean.append(found[args.sampler][:2])
      wrong, junk = (
        ", ".join(f"{100 * found[k][i]:.1f} %" for k in found) for i in (0, 1)
      )
      print(
        f"| {name} | {seed} | {wrong} | {junk} | "
        f"{found[args.sampler][2]:.0f} |",
        flush=True,
      )
    wrong, junk = 100 * np.mean(mean, axis=0)
    print(f"| {name} | mean | {wrong:.1f} % | {junk:.1f} % | |", flush=True)


if __name__ == "__main__":
  main()
