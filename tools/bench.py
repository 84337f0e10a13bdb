r"""The speeds of BENCHMARKS.md, as lines of Markdown.

  python tools/bench.py times            # default and :smoke, from empty, again
  python tools/bench.py train --data=<pairs>  # alignment and TRL's
  python tools/bench.py encoder          # MiniLM and sentence-transformers'
  python tools/bench.py mixture          # EM and scikit-learn's, share of peak
  python tools/bench.py pool             # selection of a large pool

Nothing is asserted away. `encoder` and `mixture` run both libraries in one
process, in turn; `train` runs each in a process of its own.
"""

import importlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def clocked(run):
  """Wall seconds, seconds of CPU of all threads, and what run returned."""
  cpu, start = time.process_time(), time.perf_counter()
  found = run()
  return time.perf_counter() - start, time.process_time() - cpu, found


def _job(*flags: str) -> tuple[float, float]:
  """Seconds in all and seconds to the first line of one job."""
  start, first, lines = time.monotonic(), None, []
  command = [sys.executable, "-u", "-m", "jaxalign.main", *flags]
  out = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  with subprocess.Popen(command, cwd=ROOT, **out) as process:
    for line in process.stdout:
      first = first or time.monotonic() - start
      lines.append(line)
  if process.returncode:
    raise SystemExit("".join(lines[-20:]))
  return time.monotonic() - start, first


def times() -> None:
  """Wall time of the two commands from an empty workdir, and again."""
  print("| command | from empty | again | first line | load at start |")
  print("|---|---|---|---|---|")
  for variant in ("", ":smoke"):
    with tempfile.TemporaryDirectory() as folder:
      flags = (
        f"--config=configs/dpo_sub.py{variant}",
        f"--workdir={folder}/work",
        f"--config.compile_cache={folder}/cache",
      )
      load = os.getloadavg()[0]
      (whole, first), (again, _) = _job(*flags), _job(*flags)
      times = f"{whole:.0f} s | {again:.1f} s | {first:.2f} s | {load:.1f}"
      print(f"| `configs/dpo_sub.py{variant}` | {times} |", flush=True)


def main() -> None:
  what, *flags = sys.argv[1:] or [""]
  if what == "times":
    return times()
  if what in (
    "encoder",
    "mixture",
    "train",
    "pool",
  ):  # files with flags of their own
    return importlib.import_module(f"bench_{what}").main(flags)
  raise SystemExit(__doc__)


if __name__ == "__main__":
  main()
