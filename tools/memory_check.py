r"""Memory that a job plans beside what it takes, on a CPU.

  python tools/memory_check.py world
  python tools/memory_check.py lora full --checkpoint=<folder> \
    --rows=pairs.jsonl

Planned is what --dry_run prints; taken is the job's VmHWM above that of an
interpreter that has imported jax and started its CPU. `world` is
configs/dpo_sub.py:smoke; `lora` and `full` train a checkpoint on rows of one's
own, 8 updates of 4.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
IDLE = "import jax; jax.devices()"
RUN = (
  "import importlib, sys\n"
  "code = importlib.import_module({!r}).main(['x', *sys.argv[1:]])\n"
  "assert code == 0, code"
)
PEAK = (
  "\nprint('VmHWM', next(line.split()[1] for line in "
  "open('/proc/self/status') if line.startswith('VmHWM')))"
)
UNITS = dict(KiB=2**10, MiB=2**20, GiB=2**30)


def said(code: str, *flags: str) -> str:
  """What a process of one CPU device prints."""
  return subprocess.run(
    [sys.executable, "-c", code, *flags],
    cwd=ROOT,
    check=True,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env=os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS=""),
  ).stdout


def peak(code: str, *flags: str) -> int:
  """Bytes of its VmHWM, of one process whatever its parent held."""
  return 1024 * int(said(code + PEAK, *flags).split("VmHWM ")[1].split()[0])


def planned(text: str) -> int:
  """Bytes of a plan's last "together"."""
  number, unit = re.findall(r"together ([\d.,]+) (\w+)", text)[-1]
  return int(float(number.replace(",", "")) * UNITS[unit])


def measure(
  name: str, checkpoint: str = "", rows: str = "", more: tuple[str, ...] = ()
) -> tuple[int, int]:
  """(planned, taken) bytes of one of the jobs, with `more` flags."""
  if name == "world":
    module, flags = "main", ["--config=configs/dpo_sub.py:smoke"]
  else:
    module = "train.__main__"
    flags = [
      "--config=configs/dpo_sub.py",
      f"--config.data.source={rows}",
      f"--config.model.checkpoint={checkpoint}",
      "--config.train.max_updates=8",
      "--config.train.batch_size=4",
      "--config.model.context=256",
      "--config.loss.name=dpo(beta=0.1)",
      f"--config.lora.rank={8 * (name == 'lora')}",
    ]
  flags += [*more, "--config.compile_cache="]
  code = RUN.format(f"jaxalign.{module}")
  with tempfile.TemporaryDirectory() as folder:
    plan = planned(said(code, *flags, "--dry_run"))
    took = peak(code, *flags, f"--workdir={folder}/job")
  return plan, took - peak(IDLE)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("jobs", nargs="+", choices=("world", "lora", "full"))
  parser.add_argument("--checkpoint", default="")
  parser.add_argument("--rows", default="")
  args = parser.parse_args()
  if {*args.jobs} - {"world"} and not (args.checkpoint and args.rows):
    parser.error("lora and full want --checkpoint and --rows")
  print(f"{'job':<8}{'planned':>12}{'taken':>12}{'planned / taken':>18}")
  for name in args.jobs:
    plan, took = measure(
      name,
      os.path.abspath(args.checkpoint) if args.checkpoint else "",
      os.path.abspath(args.rows) if args.rows else "",
    )
    print(
      f"{name:<8}{plan / 2**20:>8,.0f} MiB{took / 2**20:>8,.0f} MiB"
      f"{plan / took:>18.2f}",
      flush=True,
    )


if __name__ == "__main__":
  main()
