r"""Selection from large pools: time and memory a row, and growth of samplers.

  python tools/bench_pool.py memory --rows 200000 2000000
  python tools/bench_pool.py laws --limit=60 --count=2

`memory` writes made-up pairs of short texts, runs `python -m jaxalign.select`
on them in a process of its own and prints its seconds (those of its CPUs are
compared), and the peaks of its anonymous and file-backed memory
(/proc/<pid>/status, every 20 ms). An embedding is made up, not computed: what
is measured is the selection.
`laws` times every sampler on rows that are held, with a tenth of them to keep:
the best of --count, so that from two on nothing that is compiled counts.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WIDTH = 384
LIMIT = 4096  # MiB of anonymous memory that a selection may take
DEDUP = "dedup(threshold=0.95) | random"
SAMPLERS = ("random", "length", "crossfit_lite", DEDUP, "isa")
READS_EMBEDDING = (DEDUP, "isa")
EMBEDDED = (  # a reference that is hardly trained, and made-up embeddings
  "--config.sft.updates=2",
  "--config.model.layers=1",
  f"--config.model.width={WIDTH}",
)
CHILD = """
import sys
import numpy as np
from jaxalign.cli import select
from jaxalign.embed import passes as embed
def made(mesh, params, m, rows, outputs, options):
  number = options.by_process[0]
  rng = np.random.default_rng(int(number[0]))
  x = rng.standard_normal((len(number), m.width), np.float32)
  x *= np.float32(1 / np.sqrt(1 + np.arange(m.width)))
  x[number % 3 == 0] += 0.5
  options.tick(len(number))
  return dict.fromkeys(outputs, x[:, 0]) | dict(embedding=x)
embed.pass_rows = made
sys.exit(select.main(sys.argv))
"""


def write_pairs(path: pathlib.Path, n: int) -> None:
  """n pairs of short texts; the better answers have words of their own."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  letters = np.array([*"abcdefghijklmnopqrstuvwxyz"])
  rng = np.random.default_rng(0)
  words = np.array(["".join(w) for w in rng.choice(letters, (5000, 5))])
  writer = None
  for start in range(0, n, 50_000):
    count = min(50_000, n - start)
    text = lambda size, first: [
      " ".join(words[(first + 4000 * u**2).astype(int)])
      for u in rng.random((count, size))
    ]
    columns = dict(
      prompt=text(8, 0), chosen=text(10, 0), rejected=text(12, 400)
    )
    table = pa.table(columns)
    writer = writer or pq.ParquetWriter(path, table.schema)
    writer.write_table(table)
  writer.close()


def _memory(pid: int) -> dict[str, float]:
  """Anonymous and file-backed memory of a process, MiB."""
  try:
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
  except OSError:
    return {}
  found = re.findall(r"^(RssAnon|RssFile):\s+(\d+)", text, re.MULTILINE)
  return {name: int(size) / 1024 for name, size in found}


def _run(source: pathlib.Path, sampler: str, work: pathlib.Path) -> dict:
  """One selection: its seconds, and the peaks of its memory."""
  log_path = work.with_suffix(".log")
  command = [
    *(sys.executable, "-c", CHILD, f"--config={ROOT}/configs/select.py"),
    f"--config.select.sampler={sampler}",
    f"--config.data.source={source}",
    "--config.select.budget=0.05",
    f"--output={work}.subset.parquet",
    f"--workdir={work}",
    *(EMBEDDED if sampler in READS_EMBEDDING else ()),
  ]
  peak, start = {"RssAnon": 0.0, "RssFile": 0.0}, time.monotonic()
  env = os.environ | dict(JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
  with open(log_path, "w", encoding="utf-8") as log:
    child = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    ended = 0
    while not ended:
      for name, value in _memory(child.pid).items():
        peak[name] = max(peak[name], value)
      time.sleep(0.02)
      ended, code, used = os.wait4(child.pid, os.WNOHANG)
  if code:
    raise SystemExit(log_path.read_text()[-3000:])
  return peak | dict(
    seconds=time.monotonic() - start, cpu=used.ru_utime + used.ru_stime
  )


def memory(args) -> None:
  """A table of both sizes; ends with 1 where one is above the limits.

  The samplers of a size share a workdir, so the first alone reads the rows;
  what it takes is counted to each of the others.
  """
  print(
    f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores\n\n"
    "| sampler | rows | seconds | CPU seconds | CPU microseconds a row, rows "
    "read | anonymous MiB, peak | file-backed MiB, peak |\n"
    "|---|---|---|---|---|---|---|"
  )
  bad = []
  with tempfile.TemporaryDirectory(dir=args.folder or None) as scratch:
    folder, each = pathlib.Path(scratch), {}
    for n in args.rows:
      source, reading = folder / f"{n}.parquet", 0.0
      write_pairs(source, n)
      for sampler in ("random", *(args.only or SAMPLERS[1:])):
        found = _run(source, sampler, folder / f"{n}")
        each[sampler, n] = 1e6 * (found["cpu"] + reading) / n
        reading = reading or found["cpu"]
        print(
          f"| {sampler.replace('|', chr(92) + '|')} | {n:,} "
          f"| {found['seconds']:.0f} | {found['cpu']:.0f} "
          f"| {each[sampler, n]:.0f} | {found['RssAnon']:.0f} "
          f"| {found['RssFile']:.0f} |",
          flush=True,
        )
        if args.keep:
          print((folder / f"{n}.log").read_text())
        if found["RssAnon"] > LIMIT:
          bad.append(f"{sampler} at {n:,}: memory")
        if each[sampler, n] > 1.5 * each[sampler, args.rows[0]]:
          bad.append(f"{sampler} at {n:,}: time a row")
  print("\nabove the limits: " + ("; ".join(bad) or "nothing"))
  raise SystemExit(bool(bad))


def laws(args) -> None:
  """Seconds of every sampler at four sizes, and the exponent."""
  import importlib

  from jaxalign.select.samplers import SAMPLERS as every

  sys.path.insert(0, str(ROOT / "tests"))
  pools = importlib.import_module("pools")
  print(
    f"width {WIDTH}, two responses a row, a tenth kept, seconds of CPU, "
    f"the best of {args.count}; load {os.getloadavg()[0]:.1f}\n\n"
    "| sampler | rows N | at N | 2N | 4N | 8N | the last doubling: N to "
    "the |\n"
    "|---|---|---|---|---|---|---|"
  )
  for name, sampler in every.items():
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
    known = [s for s in seconds if not isinstance(s, str)]
    slope = f"{np.log2(known[-1] / known[-2]):.2f}" if len(known) > 1 else "-"
    cells = [s if isinstance(s, str) else f"{s:.3g} s" for s in seconds]
    cells += ["not run"] * (len(sizes) - len(cells))
    print(
      f"| {name} | {least:,} | " + " | ".join(cells) + f" | {slope} |",
      flush=True,
    )


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=["memory", "laws"])
  sizes = [200_000, 2_000_000]
  parser.add_argument("--rows", type=int, nargs="+", default=sizes)
  parser.add_argument("--only", nargs="*", default=[])
  parser.add_argument("--folder", default="", help="for the made-up pairs")
  parser.add_argument("--keep", action="store_true", help="print the logs")
  parser.add_argument("--least", type=int, default=1000)
  parser.add_argument("--count", type=int, default=1)
  parser.add_argument("--limit", type=float, default=60.0)
  args = parser.parse_args(argv)
  dict(memory=memory, laws=laws)[args.what](args)


if __name__ == "__main__":
  main()
