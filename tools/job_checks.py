r"""Whole small jobs, many times: killed, ended in every way, weighed.

  python tools/job_checks.py kill --count=20 --seed=0
  python tools/job_checks.py exits --count=60 --together=6
  python tools/job_checks.py memory lora full --checkpoint=<folder> \
    --rows=pairs.jsonl

kill: SIGKILL at moments drawn uniformly from the wall time of an undisturbed
job; the same command then runs until it is done. Subset, parameters, metrics
without their times, eval.json and all other artifacts must have the bytes of
the undisturbed run.

exits: every end of a job has its exit code, with more jobs than cores at once,
half of them with one OpenMP thread: on a busy machine the threads of a library
may outlive the interpreter. Nothing may be left in a temporary folder.

memory: what --dry_run plans next to VmHWM, above that of an interpreter that
has imported jax, of configs/dpo_sub.py:smoke (`world`) or of a checkpoint
trained for 8 updates of 4 rows, by adapters (`lora`) or whole (`full`).
"""

import argparse
import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What two runs never agree on; pages hold times and commands.
RATES = ("tokens", "rows", "distinct_tokens")
TIMES = ("time", *(f"perf/{name}_per_s" for name in RATES))
PAGES = ("report.html", "summary.json", ".lock")
RUN = (
  "import sys\n{hook}\nfrom {module} import main as command\n"
  "from jaxalign.core.exits import start\nstart(command)\n"
)


def start(
  flags: list[str],
  *,
  module: str = "jaxalign.cli.main",
  hook: str = "",
  code: str = "",
  env: dict[str, str] = {},
  **more,
) -> subprocess.Popen:
  """Starts a job, `hook` (Python) first; or `code` in place of a job."""
  code = code or RUN.format(hook=hook, module=module)
  return subprocess.Popen(
    [sys.executable, "-u", "-c", code, *flags],
    cwd=ROOT,
    text=True,
    env=os.environ | env,
    **dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT) | more,
  )


def _without_times(path: pathlib.Path) -> bytes:
  """The bytes of a file that two runs have in common."""
  data = path.read_bytes()
  if path.name == "metrics.jsonl":
    lines = [json.loads(line) for line in data.splitlines()]
    lines = [{k: line[k] for k in line if k not in TIMES} for line in lines]
    return json.dumps(lines).encode()
  if path.parent.name != "records":
    return data
  record = json.loads(data)
  for name in ("seconds", "bytes"):
    record["cost"].pop(name)
  for name in ("outputs", "digest"):
    record.pop(name, None)
  if record["stage"] == "select":  # memory as it was measured
    record["result"] = None
  return json.dumps(record).encode()


def outcome(workdir: str | os.PathLike) -> dict[str, str]:
  """Relative path -> digest of what a finished job must end with.

  Times are left out of metrics and records; a checkpoint's files have random
  names, its parameters are those of the export.
  """
  workdir, found = pathlib.Path(workdir), {}
  for path in sorted(workdir.rglob("*")):
    name = path.relative_to(workdir).as_posix()
    if not (path.is_dir() or "/checkpoints/" in name or path.name in PAGES):
      found[name] = hashlib.sha256(_without_times(path)).hexdigest()
  return found


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
  """The paths in which two outcomes differ."""
  names = sorted(wanted.keys() | found.keys())
  return [name for name in names if wanted.get(name) != found.get(name)]


def _last_stage(text: str) -> str:
  """The stage that was running, from the lines a killed job left."""
  stage, arm = "start", ""
  for line in text.splitlines():
    if line.startswith("["):
      arm = line[1:-1]
    name, _, rest = line.partition(": ")
    if rest == "...":
      stage = f"{name} {arm}".strip()
    elif rest.startswith(("done", "finished before")):
      stage = f"after {name} {arm}".strip()
  return stage


def _killed_at(
  moment: float, flags: list[str], folder: pathlib.Path
) -> tuple[str, int, str]:
  """The stage a job was killed in ("": it ended first), the runs it took to
  finish, and what went wrong."""
  log = folder / "log"

  def begin():
    with open(log, "w", encoding="utf-8") as out:
      return start(flags, stdout=out, start_new_session=True)

  process = begin()
  try:
    return "", 0, f"exit code {process.wait(moment)}"
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  stage = _last_stage(log.read_text())
  for runs in range(1, 4):
    if not (code := begin().wait()):
      return stage, runs, ""
  print(log.read_text()[-2000:])
  return stage, runs, f"exit code {code}"


def kill(args: argparse.Namespace, root: pathlib.Path) -> int:
  """Prints a row for each killed job; how many did not end as they should."""
  cache = f"--config.compile_cache={root}/cache"
  flags = [f"--config={args.config}", cache, *args.flag]
  for name in ("warm", "undisturbed"):  # the first one compiles
    began = time.monotonic()
    process = start([f"--workdir={root}/{name}", *flags])
    out, _ = process.communicate()
    assert process.returncode == 0, out[-2000:]
  whole = time.monotonic() - began
  wanted = outcome(root / "undisturbed")
  bad = differences(wanted, outcome(root / "warm"))
  print(
    f"{args.config}: {len(wanted)} artifacts, {whole:.1f} s undisturbed, "
    f"two undisturbed runs differ in: {', '.join(bad) or 'nothing'}\n\n"
    "| kill | after | during | runs to finish | differs in |\n"
    "|---|---|---|---|---|",
    flush=True,
  )
  rng, killed, wrong = random.Random(args.seed), 0, 0
  for k in range(3 * args.count):
    moment, own = rng.uniform(0, whole), root / str(k)
    own.mkdir()
    command = [f"--workdir={own}/work", *flags]
    stage, runs, trouble = _killed_at(moment, command, own)
    if not stage:  # the machine is quicker now than it was
      whole = min(whole, moment)
      continue
    differs = trouble or ", ".join(differences(wanted, outcome(own / "work")))
    killed, wrong = killed + 1, wrong + bool(differs)
    cells = killed, f"{moment:.1f} s", stage, runs, differs or "nothing"
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if killed == args.count:
      break
  good = killed - wrong
  print(f"\n{killed} jobs killed, {good} ended as the undisturbed one")
  return wrong + bool(bad) + args.count - killed


class Kind(NamedTuple):
  """A way to end: the code it must give, and what brings it about."""

  code: int
  flags: tuple[str, ...] = ("select.budget=40",)  # enough rows for it
  hook: str = ""  # Python that runs first
  number: int = 0  # a signal, sent while the data stage runs


FAIL = (
  "from jaxalign.data import build_data\nreal = build_data.make_data\n"
  "def make(*a, **k):\n  real(*a, **k)\n  raise ZeroDivisionError\n"
  "build_data.make_data = make\n"
)
ROOM = "select.budget=40"
KINDS = {
  "good end": Kind(0),
  "good end, dry run": Kind(0, ("--dry_run", ROOM)),
  "config error at once": Kind(64, ("select.sampler=isaa",)),
  "config error after the data": Kind(64, ("select.budget=1000",)),
  "data error after reading": Kind(65, ("data.source={bad}",)),
  "data error, .jsonl": Kind(65, ("data.source={bad_lines}",)),
  "cannot write": Kind(
    73, (ROOM, "--output={file}/x.parquet", "--workdir={work}")
  ),
  "SIGTERM": Kind(75, number=signal.SIGTERM),
  "SIGINT": Kind(130, number=signal.SIGINT),
  "unexpected exception": Kind(1, hook=FAIL),
}


def prepare(folder: pathlib.Path) -> dict[str, str]:
  """Writes sixty pairs, of which none or fifty have no answer; the paths."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  def row(i, bad):
    chosen = f"it is {i}, and that is good" if i >= bad else ""
    return dict(prompt=f"tell me of {i} ", chosen=chosen, rejected=f"no {i}")

  good, bad = ([row(i, n) for i in range(60)] for n in (0, 50))
  files = dict(
    good="good.parquet", bad="bad.parquet", bad_lines="bad.jsonl", file="file"
  )
  paths = {k: str(folder / name) for k, name in files.items()}
  pq.write_table(pa.Table.from_pylist(good), paths["good"])
  pq.write_table(pa.Table.from_pylist(bad), paths["bad"])
  lines = "".join(json.dumps(row) + "\n" for row in bad)
  (folder / "bad.jsonl").write_text(lines, encoding="utf-8")
  (folder / "file").write_text("no folder", encoding="utf-8")
  return paths


def end(
  folder: pathlib.Path, paths: dict[str, str], kind: Kind, single: bool
) -> tuple[int | str, str]:
  """Runs one job to its end; its code (or what is wrong), and its output."""
  temporary = folder / "tmp"
  temporary.mkdir(parents=True)
  small = "layers=1 width=32 heads=2 ff=64".split()
  knobs = [f"data.source={paths['good']}", "select.sampler=random"]
  knobs += [f"model.{x}" for x in small] + ["train.batch_size=8"]
  knobs += [f.format(work=folder / "work", **paths) for f in kind.flags]
  flags = [x if x.startswith("--") else f"--config.{x}" for x in knobs]
  # The last of two outputs is the one that counts.
  flags = [f"--output={folder}/subset.parquet", *flags]
  flags = [f"--config={ROOT}/configs/select.py", *flags]
  env = dict(TMPDIR=str(temporary), JAX_PLATFORMS="cpu")
  env |= dict(OMP_NUM_THREADS="1") if single else {}
  module, out = "jaxalign.cli.select", []
  with start(flags, module=module, hook=kind.hook, env=env) as process:
    timer = threading.Timer(600, process.kill)
    timer.start()
    for line in process.stdout:
      out.append(line)
      if kind.number and line.startswith("data: ..."):
        process.send_signal(kind.number)
    code = process.wait()
    timer.cancel()
  names = [p.name for p in temporary.iterdir()]
  left = [n for n in names if n.startswith(("tmp", "jaxalign"))]
  left += [str(p.relative_to(folder)) for p in folder.rglob(".*.tmp-*")]
  return f"{code}, left {', '.join(left)}" if left else code, "".join(out)


def exits(args: argparse.Namespace, root: pathlib.Path) -> int:
  """Prints the codes of every kind; how many jobs ended otherwise."""
  wrong, began, paths = 0, time.monotonic(), prepare(root)
  print(f"{'kind':30} {'wanted':>6}  codes")
  with concurrent.futures.ThreadPoolExecutor(args.together) as pool:
    for name, kind in KINDS.items():
      one = lambda i, k=kind: end(
        root / f"{k.code}-{name}-{i}", paths, k, i % 2
      )
      ended = list(pool.map(one, range(args.count)))
      codes = collections.Counter(code for code, _ in ended)
      wrong += args.count - codes[kind.code]
      words = (f"{n} x {code}" for code, n in codes.most_common())
      print(f"{name:30} {kind.code:6}  {', '.join(words)}", flush=True)
      for code, out in [x for x in ended if x[0] != kind.code][:1]:
        print(f"--- {code}\n{out[-1500:]}")
  print(f"{wrong} ended otherwise; {time.monotonic() - began:.0f} s")
  return wrong


IDLE = "import jax; jax.devices()"
COMMAND = (
  "import sys\nfrom {} import main as command\n"
  "assert command(['x', *sys.argv[1:]]) == 0"
)
PEAK = (
  "\nprint('VmHWM', next(line.split()[1] for line in "
  "open('/proc/self/status') if line.startswith('VmHWM')))"
)
UNITS = dict(KiB=2**10, MiB=2**20, GiB=2**30)


def _printed(code: str, flags: list[str]) -> str:
  """What a process of one CPU device prints."""
  alone = dict(JAX_PLATFORMS="cpu", XLA_FLAGS="")
  process = start(flags, code=code, env=alone, stderr=subprocess.DEVNULL)
  out, _ = process.communicate()
  assert process.returncode == 0, out[-2000:]
  return out


def _peak(code: str, flags: list[str] = []) -> int:
  """Bytes of its VmHWM, of one process whatever its parent held."""
  return 1024 * int(_printed(code + PEAK, flags).split("VmHWM ")[1].split()[0])


def measure(
  name: str, checkpoint: str = "", rows: str = "", more: tuple[str, ...] = ()
) -> tuple[int, int]:
  """(planned, taken) bytes of one of the jobs, with `more` flags."""
  module, flags = "main", ["--config=configs/dpo_sub.py:smoke"]
  if name != "world":
    module, flags = "train", ["--config=configs/dpo_sub.py"]
    knobs = {
      "data.source": rows,
      "model.checkpoint": checkpoint,
      "model.context": 256,
      "train.max_updates": 8,
      "train.batch_size": 4,
      "loss.name": "dpo(beta=0.1)",
      "lora.rank": 8 * (name == "lora"),
    }
    flags += [f"--config.{knob}={value}" for knob, value in knobs.items()]
  flags += [*more, "--config.compile_cache="]
  code = COMMAND.format(f"jaxalign.cli.{module}")
  with tempfile.TemporaryDirectory() as folder:
    plan = _printed(code, [*flags, "--dry_run"])
    took = _peak(code, [*flags, f"--workdir={folder}/job"])
  number, unit = re.findall(r"together ([\d.,]+) (\w+)", plan)[-1]
  return int(float(number.replace(",", "")) * UNITS[unit]), took - _peak(IDLE)


def memory(args: argparse.Namespace, root: pathlib.Path) -> int:
  """Prints a line for each job."""
  del root
  print(f"{'job':<8}{'planned':>12}{'taken':>12}{'planned / taken':>18}")
  files = [os.path.abspath(path) for path in (args.checkpoint, args.rows)]
  for name in args.jobs:
    plan, took = measure(name, *files)
    sizes = [f"{n / 2**20:>8,.0f} MiB" for n in (plan, took)]
    print(f"{name:<8}{''.join(sizes)}{plan / took:>18.2f}", flush=True)
  return 0


def main() -> int:
  """Prints the table of a check; 1 where something is not as it should be."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  checks = dict(kill=kill, exits=exits, memory=memory)
  parser.add_argument("check", choices=checks)
  parser.add_argument("jobs", nargs="*", help="memory: world, lora, full")
  parser.add_argument("--count", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--config", default="configs/dpo_sub.py:tiny")
  parser.add_argument("--flag", action="append", default=[], help="of the job")
  parser.add_argument("--together", type=int, default=6, help="jobs at once")
  parser.add_argument("--checkpoint", default="")
  parser.add_argument("--rows", default="")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix="job_checks_") as folder:
    return int(checks[args.check](args, pathlib.Path(folder)) > 0)


if __name__ == "__main__":
  sys.exit(main())
