r"""Checks a job's selection card by hand, and times a card of a large pool.

  python tools/card_check.py rows --workdir=runs/hh --arm=isa-0.1-seed0
  python tools/card_check.py time --rows=100000

`rows` reads the files of a finished job (embedding, log-likelihoods, kept
ids) and works out with NumPy in float64 what the card says of ten rows and of
the whole: it uses none of the card's code. `time` makes a pool, its card and
its page.
"""

import argparse
import json
import os
import pathlib
import resource
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent


def rows(args) -> None:
  """Ten rows, four kept and six left out, and the figures of the card."""
  import pyarrow.parquet as pq

  job = pathlib.Path(args.workdir)
  arm = job / "runs" / args.arm
  said = pq.read_table(arm / "reasons.parquet").to_pylist()
  pool = pq.read_table(job / "shared/data/pool.parquet").to_pylist()
  ids = [p["id"] for p in pool]
  assert ids == [r["id"] for r in said]
  shards = sorted((job / "shared/embed/store/embedding").glob("*.npy"))
  e = np.concatenate([np.load(s).astype(np.float64) for s in shards])
  kept = np.array(
    [
      ids.index(i)
      for i in pq.read_table(arm / "subset.parquet", columns=["id"])
      .column("id")
      .to_pylist()
    ]
  )
  mask = np.isin(np.arange(len(ids)), kept)
  x = e.mean(axis=1)
  x -= x.mean(axis=0)
  x /= np.sqrt((x**2).sum(axis=1))[:, None]
  cosine = x @ x.T
  np.fill_diagonal(cosine, -2)
  # ISA's literal order, both sides added: -u exp(u), u scaled to [0, 1].
  stored = np.load(job / "shared/mixture/log_likelihood.npy")[0]
  u = (stored - stored.min()) / (stored.max() - stored.min())
  score = (-u * np.exp(u)).reshape(len(ids), -1).sum(axis=1)
  rank = np.empty(len(ids), int)
  rank[np.argsort(-score, kind="stable")] = np.arange(1, len(ids) + 1)
  rng = np.random.default_rng(args.seed)
  picked = [
    *rng.choice(kept, 4, replace=False),
    *rng.choice(np.flatnonzero(~mask), 6, replace=False),
  ]
  right = 0
  for i in picked:
    near = np.where(mask, cosine[i], -2)
    row, best = said[i], int(near.argmax())
    fine = (
      abs(row["score"] - score[i]) < 1e-9
      and row["rank"] == rank[i]
      and row["selected"] == bool(mask[i])
      and row["nearest_kept"] == ids[best]
      and abs(row["cosine"] - near[best]) < 1e-6
    )
    right += fine
    first = lambda k: pool[k]["prompt"].strip().split("\n")[0][:90]
    print(
      f"{'right' if fine else 'WRONG'} {row['id']}: {row['reason']}\n"
      f"    it: {first(i)}\n    near: {first(best)}"
    )
  card = json.loads((arm / "selection.json").read_text())
  seen, spread = card["geometry"], card["spectra"]["label"]["groups"]
  inside = np.where(mask[None], cosine, -2).max(axis=1)
  pairs = [
    ("lowest kept score", card["cut"], score[kept].min()),
    (
      "median cosine to the nearest kept row",
      seen["neighbours"]["quantiles"][2],
      np.median(inside[~mask]),
    ),
    (
      "kept rows with a near-duplicate",
      seen["near_duplicates"]["kept"]["value"],
      (inside[mask] >= 0.95).mean(),
    ),
    (
      "pool rows with a near-duplicate",
      seen["near_duplicates"]["pool"]["value"],
      (cosine.max(axis=1) >= 0.95).mean(),
    ),
  ]
  for side, group in enumerate(spread):
    if group["rows"] == len(ids) and card["spectra"]["label"]["used"] == len(
      ids
    ):
      s = (
        np.linalg.svd(e[:, side] - e[:, side].mean(axis=0), compute_uv=False)
        ** 2
      )
      p = s[s > 0] / s.sum()
      pairs.append(
        (
          f"effective rank, {group['name']}",
          group["effective_rank"],
          np.exp(-(p * np.log(p)).sum()),
        )
      )
  for name, ours, theirs in pairs:
    print(f"{name}: card {ours:.6f}, by hand {theirs:.6f}")
  print(f"{right} of {len(picked)} rows right")


def timing(args) -> None:
  """Seconds, memory and bytes of the card of a made-up pool of pairs."""
  sys.path.insert(0, str(ROOT))
  from jaxalign.report import select_page
  from jaxalign.select import neighbours, selection_report
  from jaxalign.select.pool import Pool
  from jaxalign.select.samplers import SAMPLERS

  n, width = args.rows, args.width
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n, 2, width)).astype(np.float32)
  x += (
    2
    * rng.normal(size=(60, 1, width)).astype(np.float32)[rng.integers(0, 60, n)]
  )
  pool = Pool(
    np.array([f"{i:08d}" for i in range(n)]),
    {"embedding": x, "length": rng.integers(5, 300, (n, 2))},
  )
  texts = {
    k: [f"{k} {i} " + "words " * 60 for i in range(n)]
    for k in ("prompt", "chosen", "rejected")
  }
  picked = SAMPLERS["length"](0, pool, n // 10)
  a = rng.normal(size=(4096, 4096)).astype(np.float32)
  start = time.monotonic()
  a @ a
  print(
    f"load {os.getloadavg()[0]:.1f}; float32 product of 4,096 "
    f"{2 * 4096**3 / (time.monotonic() - start) / 1e9:.0f} GFLOP/s"
  )
  read = neighbours.unit_rows(pool)
  kept = np.sort(picked.rows)
  rest = np.setdiff1d(np.arange(n), kept)
  start = time.monotonic()
  neighbours.nearest(read, rest, kept)
  took = time.monotonic() - start
  work = neighbours.work(len(rest), len(kept), width)
  print(
    f"nearest kept rows alone {took:.1f} s, {work / took / 1e9:.0f} GFLOP/s"
  )
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  before, start, cpu = peak(), time.monotonic(), time.process_time()
  out, table = selection_report.describe(
    pool, picked, sampler="length", texts=texts
  )
  print(
    f"card {time.monotonic() - start:.1f} s, of CPU "
    f"{time.process_time() - cpu:.1f}; peak memory {before:.2f} -> "
    f"{peak():.2f} GiB, the embedding {x.nbytes / 2**30:.2f}"
  )
  start = time.monotonic()
  html = select_page.selection_html(out, table).encode()
  print(
    f"page {time.monotonic() - start:.1f} s, {len(html) / 1e6:.1f} MB; "
    f"load {os.getloadavg()[0]:.1f}"
  )
  if args.output:
    pathlib.Path(args.output).write_bytes(html)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  kinds = parser.add_subparsers(required=True)
  one = kinds.add_parser("rows")
  one.add_argument("--workdir", required=True)
  one.add_argument("--arm", default="isa-0.1-seed0")
  one.add_argument("--seed", type=int, default=5)
  one.set_defaults(run=rows)
  one = kinds.add_parser("time")
  one.add_argument("--rows", type=int, default=100_000)
  one.add_argument("--width", type=int, default=384)
  one.add_argument("--output", default="")
  one.set_defaults(run=timing)
  args = parser.parse_args()
  args.run(args)


if __name__ == "__main__":
  main()
