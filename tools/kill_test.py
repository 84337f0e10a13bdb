r"""Kills a small job at random moments, goes on, and compares where it ends.

  python tools/kill_test.py --kills=20 --seed=0

One job runs through undisturbed. Then every round starts the same job in an
empty folder, sends SIGKILL at a moment drawn uniformly from the undisturbed
wall time, and runs the same command until it is done. Subset, parameters,
metrics without their times, eval.json and every other artifact must have the
bytes of the undisturbed run; a difference ends the program with 1.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What two runs never agree on.
TIMES = (
  "time",
  "perf/tokens_per_s",
  "perf/rows_per_s",
  "perf/distinct_tokens_per_s",
)
PAGES = ("report.html", "summary.json", ".lock")  # hold times and commands


def outcome(workdir: str | os.PathLike) -> dict[str, str]:
  """Relative path -> digest of what a finished job must end with.

  Times are left out of metrics and cards; a checkpoint's files have random
  names, its parameters are those of the export.
  """
  workdir, found = pathlib.Path(workdir), {}
  for path in sorted(workdir.rglob("*")):
    name = path.relative_to(workdir).as_posix()
    if path.is_dir() or "/checkpoints/" in name or path.name in PAGES:
      continue
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
      lines = [json.loads(line) for line in data.splitlines()]
      data = json.dumps(
        [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
      ).encode()
    elif path.parent.name == "records":
      card = json.loads(data)
      card["cost"].pop("seconds"), card["cost"].pop("bytes")
      if card["stage"] == "select":  # memory as it was measured
        card["result"] = None
      data = json.dumps(
        {k: v for k, v in card.items() if k not in ("outputs", "digest")}
      ).encode()
    found[name] = hashlib.sha256(data).hexdigest()
  return found


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
  """The paths in which two outcomes differ."""
  return [
    name
    for name in sorted(wanted.keys() | found.keys())
    if wanted.get(name) != found.get(name)
  ]


def start(
  workdir: str | os.PathLike, flags: list[str], out: str | os.PathLike
) -> subprocess.Popen:
  """Starts a job in a process group of its own, its output in a file."""
  with open(out, "w", encoding="utf-8") as file:
    return subprocess.Popen(
      [
        sys.executable,
        "-u",
        "-m",
        "jaxalign.main",
        f"--workdir={workdir}",
        *flags,
      ],
      cwd=ROOT,
      stdout=file,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )


def _last_stage(log: pathlib.Path) -> str:
  """The stage that was running, from the lines a killed job left."""
  stage, arm = "start", ""
  for line in log.read_text().splitlines():
    if line.startswith("["):
      arm = line[1:-1]
    name, _, rest = line.partition(": ")
    if rest == "...":
      stage = f"{name} {arm}".strip()
    elif rest.startswith(("done", "finished before")):
      stage = f"after {name} {arm}".strip()
  return stage


def kill_once(
  folder: pathlib.Path, flags: list[str], moment: float
) -> tuple[str, int, int]:
  """One killed job, and the runs that finish it.

  Returns:
    The stage it was killed in, the runs it took to finish, the last exit code.
  """
  work, log = folder / "work", folder / "log"
  process = start(work, flags, log)
  try:
    process.wait(timeout=moment)
    return "finished before the kill", 0, process.returncode
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  stage, runs, code = _last_stage(log), 0, -1
  while code and runs < 3:
    runs += 1
    code = start(work, flags, log).wait()
  if code:
    print(log.read_text()[-2000:])
  return stage, runs, code


def main() -> int:
  """Prints the table; 1 where a killed job ended elsewhere."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--config", default="configs/dpo_sub.py:tiny")
  parser.add_argument(
    "--flag",
    action="append",
    default=[],
    help="a further flag of the job, again and again",
  )
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix="kill_test_") as folder:
    folder = pathlib.Path(folder)
    flags = [
      f"--config={args.config}",
      f"--config.compile_cache={folder}/cache",
      *args.flag,
    ]
    for name in ("warm", "undisturbed"):  # the first one compiles
      began = time.monotonic()
      code = start(folder / name, flags, folder / f"{name}.log").wait()
      if code:
        print((folder / f"{name}.log").read_text()[-2000:])
        return 1
    whole = time.monotonic() - began
    wanted = outcome(folder / "undisturbed")
    bad = differences(wanted, outcome(folder / "warm"))
    print(
      f"{args.config}: {len(wanted)} artifacts, {whole:.1f} s undisturbed, "
      f"two undisturbed runs differ in: {', '.join(bad) or 'nothing'}\n\n"
      "| kill | after | during | runs to finish | differs in |\n"
      "|---|---|---|---|---|",
      flush=True,
    )
    rng, killed, wrong = random.Random(args.seed), 0, 0
    for k in range(3 * args.kills):
      moment = rng.uniform(0, whole)
      own = folder / str(k)
      own.mkdir()
      stage, runs, code = kill_once(own, flags, moment)
      if not runs and not code:  # the machine is quicker now than it was
        whole = min(whole, moment)
        continue
      differs = (
        [f"exit code {code}"]
        if code
        else differences(wanted, outcome(own / "work"))
      )
      killed, wrong = killed + 1, wrong + bool(differs)
      print(
        f"| {killed} | {moment:.1f} s | {stage} | {runs} | "
        f"{', '.join(differs) or 'nothing'} |",
        flush=True,
      )
      if killed == args.kills:
        break
    print(
      f"\n{killed} jobs killed, {killed - wrong} ended as the undisturbed "
      f"one, {wrong} did not",
      flush=True,
    )
  return int(wrong > 0 or bool(bad) or killed < args.kills)


if __name__ == "__main__":
  sys.exit(main())
