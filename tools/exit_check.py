r"""Ends small jobs in every way, many times, and counts their exit codes.

  python tools/exit_check.py --runs=60 --together=6

More jobs than cores run at once, half of them with one OpenMP thread: a busy
machine is where the threads of a library outlive the interpreter. A code other
than the wanted one, a job that hangs or a file left in its folder for
temporary ones ends the program with 1.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
START = (
  "import sys\n{hook}\nfrom jaxalign.select import __main__ as select\n"
  "from jaxalign.cli import main\nmain.start(select.main)\n"
)
FAIL = (
  "from jaxalign.data import build_data\nreal = build_data.make_data\n"
  "def make(*a, **k):\n  real(*a, **k)\n  raise ZeroDivisionError\n"
  "build_data.make_data = make\n"
)


class Kind(NamedTuple):
  """A way to end: the code it must give, and what brings it about."""

  code: int
  flags: tuple[str, ...] = ()
  hook: str = ""  # Python that runs first
  number: int = 0  # a signal, sent while the data stage runs


KINDS = {
  "good end": Kind(0, ("select.budget=40",)),
  "good end, dry run": Kind(0, ("--dry_run", "select.budget=40")),
  "config error at once": Kind(64, ("select.sampler=isaa",)),
  "config error after the data": Kind(64, ("select.budget=1000",)),
  "data error after reading": Kind(65, ("data.source={bad}",)),
  "data error, .jsonl": Kind(65, ("data.source={bad_lines}",)),
  "cannot write": Kind(
    73, ("select.budget=40", "--output={file}/x.parquet", "--workdir={work}")
  ),
  "SIGTERM": Kind(75, ("select.budget=40",), number=signal.SIGTERM),
  "SIGINT": Kind(130, ("select.budget=40",), number=signal.SIGINT),
  "unexpected exception": Kind(1, hook=FAIL),
}


def rows(bad: int = 0) -> list[dict[str, str]]:
  """Sixty pairs, of which so many have no answer."""
  return [
    dict(
      prompt=f"tell me of {i} ",
      chosen=f"it is {i}, and that is good" if i >= bad else "",
      rejected=f"no {i}",
    )
    for i in range(60)
  ]


def prepare(folder: pathlib.Path) -> dict[str, str]:
  """Writes the inputs; their paths by name."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  paths = {
    name: str(folder / name)
    for name in ("good.parquet", "bad.parquet", "bad.jsonl", "file")
  }
  pq.write_table(pa.Table.from_pylist(rows()), paths["good.parquet"])
  pq.write_table(pa.Table.from_pylist(rows(50)), paths["bad.parquet"])
  pathlib.Path(paths["bad.jsonl"]).write_text(
    "".join(json.dumps(row) + "\n" for row in rows(50)), encoding="utf-8"
  )
  pathlib.Path(paths["file"]).write_text("no folder", encoding="utf-8")
  return dict(
    good=paths["good.parquet"],
    bad=paths["bad.parquet"],
    bad_lines=paths["bad.jsonl"],
    file=paths["file"],
  )


def end(
  folder: pathlib.Path, paths: dict[str, str], kind: Kind, single: bool
) -> tuple[int | str, str]:
  """Runs one job to its end; its code (or what is wrong), and its output."""
  folder.mkdir(parents=True)
  temporary = folder / "tmp"
  temporary.mkdir()
  flags = [
    f"--config={ROOT}/configs/select.py",
    f"--output={folder}/subset.parquet",
  ]
  # "tiny" in all but name: select.py has no variants.
  flags += [
    f"--config.{flag}"
    for flag in (
      f"data.source={paths['good']}",
      "select.sampler=random",
      "model.layers=1",
      "model.width=32",
      "model.heads=2",
      "model.ff=64",
      "train.batch_size=8",
    )
  ]
  flags += [
    flag if flag.startswith("--") else f"--config.{flag}"
    for flag in (
      flag.format(work=folder / "work", **paths) for flag in kind.flags
    )
  ]
  env = os.environ | dict(TMPDIR=str(temporary), JAX_PLATFORMS="cpu")
  if single:
    env["OMP_NUM_THREADS"] = "1"
  out = []
  with subprocess.Popen(
    [sys.executable, "-u", "-c", START.format(hook=kind.hook), *flags],
    cwd=ROOT,
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  ) as process:
    timer = threading.Timer(600, process.kill)
    timer.start()
    for line in process.stdout:
      out.append(line)
      if kind.number and line.startswith("data: ..."):
        process.send_signal(kind.number)
    process.wait()
    timer.cancel()
  left = [
    p.name
    for p in temporary.iterdir()
    if p.name.startswith(("tmp", "jaxalign"))
  ]
  left += [str(p.relative_to(folder)) for p in folder.rglob(".*.tmp-*")]
  return (
    f"{process.returncode}, left {', '.join(left)}"
    if left
    else process.returncode
  ), "".join(out)


def main() -> int:
  """Prints the table; 1 where a job ended otherwise than it should."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--runs", type=int, default=60, help="of each kind")
  parser.add_argument("--together", type=int, default=6, help="jobs at once")
  parser.add_argument(
    "--kind",
    action="append",
    choices=list(KINDS),
    help="one kind alone, again and again",
  )
  args = parser.parse_args()
  wrong, start = 0, time.monotonic()
  print(f"{'kind':30} {'wanted':>6}  codes")
  with (
    tempfile.TemporaryDirectory(prefix="exit_check_") as root,
    concurrent.futures.ThreadPoolExecutor(args.together) as pool,
  ):
    root = pathlib.Path(root)
    paths = prepare(root)
    for number, name in enumerate(args.kind or KINDS):
      kind = KINDS[name]
      ended = list(
        pool.map(
          lambda i, k=kind, n=number: end(root / f"{n}-{i}", paths, k, i % 2),
          range(args.runs),
        )
      )
      codes = collections.Counter(code for code, _ in ended)
      wrong += args.runs - codes[kind.code]
      print(
        f"{name:30} {kind.code:6}  "
        + ", ".join(f"{n} x {code}" for code, n in codes.most_common()),
        flush=True,
      )
      for code, out in ended:
        if code != kind.code:
          print(f"--- {code}\n{out[-1500:]}")
          break
  print(
    f"{wrong} ended otherwise than they should; "
    f"{time.monotonic() - start:.0f} s"
  )
  return int(wrong > 0)


if __name__ == "__main__":
  sys.exit(main())
