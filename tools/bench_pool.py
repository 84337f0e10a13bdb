r"""How the time of every sampler grows with the rows of the pool.

  python tools/bench_pool.py laws --limit=60 --count=2

`laws` times every sampler on rows that are held, with a tenth of them to keep:
the best of --count, so that from two on nothing that is compiled counts.
"""

import argparse
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WIDTH = 384


def laws(args) -> None:
  """Seconds of every sampler at four sizes, and the exponent."""
  import importlib

  import numpy as np

  from jaxalign.select.samplers import SAMPLERS

  sys.path.insert(0, str(ROOT / "tests"))
  pools = importlib.import_module("pools")
  print(
    f"width {WIDTH}, two responses a row, a tenth kept, seconds of CPU, "
    f"the best of {args.count}; load {os.getloadavg()[0]:.1f}\n\n"
    "| sampler | rows N | at N | 2N | 4N | 8N | the last doubling: N to "
    "the |\n"
    "|---|---|---|---|---|---|---|"
  )
  for name, sampler in SAMPLERS.items():
    if args.only and name not in args.only:
      continue
    seconds, spent = [], 0.0
    # What reads a few numbers a row is over in no time: more rows.
    wide = {"embedding", "answer_embedding", "residual", "grams"} & {
      *sampler.needs
    }
    least, width = (args.least, WIDTH) if wide else (50 * args.least, 1)
    sizes = [least * 2**k for k in range(4)]
    for n in sizes:
      pool = pools.make(2, n, width=width)
      times = []
      for _ in range(args.count):
        start = time.process_time()  # others' load is left out
        try:
          sampler(0, pool, n // 10)
        except Exception as error:  # a refusal is a figure too
          seconds.append(str(error).split(";")[0][:60])
          break
        times.append(time.process_time() - start)
        spent += times[-1]
      else:
        seconds.append(min(times))
      if spent > args.limit:
        break
    known = [(n, s) for n, s in zip(sizes, seconds) if not isinstance(s, str)]
    slope = "-"
    if len(known) > 1:
      slope = f"{np.log2(known[-1][1] / known[-2][1]):.2f}"
    cells = [s if isinstance(s, str) else f"{s:.3g} s" for s in seconds]
    cells += ["not run"] * (len(sizes) - len(cells))
    print(
      f"| {name} | {least:,} | " + " | ".join(cells) + f" | {slope} |",
      flush=True,
    )


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=["laws"])
  parser.add_argument("--least", type=int, default=1000)
  parser.add_argument("--count", type=int, default=1)
  parser.add_argument("--limit", type=float, default=60.0)
  parser.add_argument("--only", nargs="*", default=[])
  laws(parser.parse_args(argv))


if __name__ == "__main__":
  main()
