r"""Whole jobs side by side: worlds x seeds, each with a model of its own.

  python -m jaxalign.grid --config=configs/compare.py:smoke,nine \
    --worlds=natural,flips,junk --seeds=21,22,23,24,25 --workdir=runs/nine

`jaxalign.main` trains the arms of several seeds from one reference, on one
world, and measures them on the same prompts. Here every seed has a world (or a
split of the source), a reference and prompts of its own, so an interval over
seeds speaks for those too. Each job is a process of its own with its share of
the cores, in <workdir>/<world>/seed<k>; a job that is there is not run again,
and one that was cut short goes on. `--worlds` are variants of the config,
"natural" adds none. Other --config.* flags go to every job. It ends with a
table in words, `grid.json` and `grid.html`. Exit codes as of jaxalign.main.
"""

import json
import os
import re
import subprocess
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from jaxalign.cli.parse import check_exists, parse_flags
from jaxalign.core import disk, intervals
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.core.exits import guarded
from jaxalign.core.progress import duration, say
from jaxalign.data.tables import read_table
from jaxalign.data.world import build_world, faults
from jaxalign.eval.equivalence import ArmOutcomes, compare_arms
from jaxalign.report import study_page, terminal

NATURAL = "natural"
FLAGS = (
  ("string", "config", None, "Path of a config, with :variant."),
  ("string", "workdir", None, "Where the jobs lie."),
  ("list", "worlds", [NATURAL], "Variants of the config."),
  ("list", "seeds", None, "Whole numbers."),
  (
    "integer",
    "processes",
    0,
    "Jobs at once; 0: one a core, up to the number of jobs. On accelerators 1.",
  ),
  ("string", "baseline", "random", "The sampler others are compared with."),
  ("bool", "run", True, "--norun: only the page, of the jobs that are there."),
)


class Cell(NamedTuple):
  """One job: a world and a seed."""

  world: str
  seed: int

  @property
  def folder(self) -> str:
    """Under the workdir."""
    return f"{self.world}/seed{self.seed}"


def parse_grid(argv: list[str]) -> tuple[Any, list[str]]:
  """The flags, and those that every job is given."""
  passed = [a for a in argv[1:] if a.startswith("--config.")]
  own = [a for a in argv if a not in passed]
  values = parse_flags(own, __doc__, FLAGS)
  for name in ("config", "workdir", "seeds"):
    if not values[name].value:
      raise ConfigError(f"no {name}; set --{name}=...")
  for name in values.worlds:
    if not re.fullmatch(r"\w+", name):
      raise ConfigError(f"--worlds: {name!r} is no name of a variant")
  if not all(re.fullmatch(r"\d+", s) for s in values.seeds):
    raise ConfigError(f"--seeds={','.join(values.seeds)}, wanted whole numbers")
  check_exists(values.config)
  return values, passed


def cells_of(values: Any) -> list[Cell]:
  """Seed by seed, so that a grid cut short has whole comparisons."""
  return [
    Cell(world, int(seed))
    for seed in dict.fromkeys(values.seeds)
    for world in dict.fromkeys(values.worlds)
  ]


def command_of(values: Any, passed: list[str], cell: Cell) -> list[str]:
  """The command of one job."""
  path, _, variant = values.config.partition(":")
  own = "" if cell.world == NATURAL else cell.world
  variants = ",".join(v for v in (*variant.split(","), own) if v)
  return [
    *(sys.executable, "-u", "-m", "jaxalign.main"),
    f"--config={path}:{variants}" if variants else f"--config={path}",
    "--config.seeds=1",
    f"--config.seed={cell.seed}",
    f"--config.data.seed={cell.seed}",
    *passed,
    f"--workdir={values.workdir}/{cell.folder}",
  ]


def run_cells(
  values: Any, passed: list[str], cells: list[Cell]
) -> dict[Cell, int]:
  """Runs the jobs that are not finished; returns exit codes other than 0."""
  known = hasattr(os, "sched_getaffinity")
  cores = sorted(os.sched_getaffinity(0)) if known else [0]
  many = min(values.processes or len(cores), len(cells))
  each = max(1, len(cores) // many)
  waiting, running, failed, times = list(cells), {}, {}, []
  while waiting or running:
    while waiting and len(running) < many:
      cell = waiting.pop(0)
      place = next(i for i in range(many) if i not in running)
      own = cores[place * each : (place + 1) * each] if many > 1 else []
      process = _start(values, passed, cell, own if known else [])
      running[place] = cell, process, time.monotonic()
    time.sleep(0.2)
    for place, (cell, process, start) in list(running.items()):
      if process.poll() is None:
        continue
      del running[place]
      times.append(time.monotonic() - start)
      left = np.mean(times) * (len(cells) - len(times)) / many
      word = "done"
      if process.returncode:
        failed[cell] = process.returncode
        last = _last_line(f"{values.workdir}/{cell.folder}/log.txt")
        word = f"failed with {process.returncode}: {last}"
      say(
        f"{cell.folder}: {word} in {duration(times[-1])} "
        f"({len(times)} of {len(cells)}, about {duration(left)} left)"
      )
  return failed


def _start(
  values: Any, passed: list[str], cell: Cell, cores: list[int]
) -> subprocess.Popen:
  folder = os.path.join(values.workdir, cell.folder)
  os.makedirs(folder, exist_ok=True)
  with open(f"{folder}/log.txt", "wb") as log:
    process = subprocess.Popen(
      command_of(values, passed, cell), stdout=log, stderr=subprocess.STDOUT
    )
  if cores:
    try:  # before it has threads: those inherit
      os.sched_setaffinity(process.pid, cores)
    except ProcessLookupError:  # ended at once; its code says why
      pass
  return process


def _last_line(path: str) -> str:
  with open(path, "rb") as file:
    lines = file.read().decode(errors="replace").strip().splitlines()
  return lines[-1][:300] if lines else "it printed nothing"


def read_summaries(
  workdir: Any, cells: list[Cell]
) -> dict[Cell, dict[str, Any]]:
  """The summaries of the jobs that have one."""
  paths = {c: epath.Path(workdir) / c.folder / "summary.json" for c in cells}
  return {c: disk.read_json(p) for c, p in paths.items() if p.exists()}


def arm_results(
  summary: dict[str, Any], seed: int, where: str
) -> dict[str, dict[str, Any]]:
  """Label of an arm -> its win rate, prompts, costs and rows.

  Raises:
    DataError: the job ran another seed, or has no win rate.
  """
  out, ledger = {}, summary["ledger"]
  for arm in summary["arms"]:
    win = arm["metrics"].get("win_vs_target") or {}
    if arm["seed"] != seed or win.get("value") is None:
      raise DataError(
        f"{where}: arm {arm['name']} has no win rate of seed "
        f"{seed}; a grid compares win rates against the target"
      )
    flops = ledger["arms"][arm["name"]]["total"]
    out[arm["name"].removesuffix(f"-seed{seed}")] = dict(
      value=win["value"],
      prompts=win["n"],
      rows=arm["rows"],
      sampler="all" if arm["is_all"] else arm["sampler"],
      budget=arm["budget"],
      cost=flops / ledger["everything"],
      malformed=arm["metrics"]["malformed"]["value"],
    )
  return out


def kept_faults(
  workdir: Any, cell: Cell, label: str
) -> dict[str, float] | None:
  """Fractions of wrong labels and of junk an arm kept, where it is known."""
  folder = epath.Path(workdir) / cell.folder
  data = disk.read_json(folder / "config.json")["data"]
  path = folder / "runs" / f"{label}-seed{cell.seed}" / "subset.parquet"
  if data["source"] != "world" or not path.exists():
    return None
  rows = read_table(path)
  if not rows or "chosen" not in rows[0]:
    return None
  return faults(build_world(data["world"], data["seed"]), rows)


def summarise(values: Any, cells: list[Cell]) -> dict[str, Any]:
  """All that the page shows, from the jobs' artifacts alone."""
  found = read_summaries(values.workdir, cells)
  worlds = []
  for world in dict.fromkeys(c.world for c in cells):
    mine = [c for c in cells if c.world == world and c in found]
    arms = _arms(values.workdir, mine, found)
    start = [found[c]["baseline"]["win_vs_target"]["value"] for c in mine]
    worlds.append(
      dict(
        world=world,
        seeds=[c.seed for c in mine],
        arms=arms,
        start=intervals.t_mean(start) if start else None,
        verdicts=_verdicts(arms, values.baseline),
      )
    )
  return dict(
    command=" ".join(sys.argv[1:]),
    baseline=values.baseline,
    worlds=worlds,
    pooled=_pooled(worlds, values.baseline),
    missing=[c.folder for c in cells if c not in found],
  )


def _arms(
  workdir: Any, cells: list[Cell], found: dict[Cell, dict[str, Any]]
) -> list[dict[str, Any]]:
  """The arms that every job of a world has, over its seeds."""
  results = {c: arm_results(found[c], c.seed, c.folder) for c in cells}
  every = dict.fromkeys(n for one in results.values() for n in one)
  arms = []
  for label in every:
    if not all(label in one for one in results.values()):
      continue
    runs = [results[c][label] for c in cells]
    mean = lambda name, of=runs: float(np.mean([one[name] for one in of]))
    kept = [kept_faults(workdir, c, label) for c in cells]
    known = dict(label=label, win=intervals.t_mean([r["value"] for r in runs]))
    known |= {n: runs[0][n] for n in ("sampler", "budget", "rows")}
    known |= dict(
      values={c.seed: r["value"] for c, r in zip(cells, runs)},
      prompts=min(r["prompts"] for r in runs),
      cost=mean("cost"),
      malformed=mean("malformed"),
    )
    if all(kept):
      known |= {name: mean(name, kept) for name in ("wrong", "junk")}
    arms.append(known)
  return arms


def _pairs(arms: list[dict], baseline: str) -> list[tuple[dict, dict]]:
  """Each arm with the baseline's at its budget."""
  bases = [arm for arm in arms if arm["sampler"] == baseline]
  fits = lambda one, base: (
    base["budget"] == one["budget"] or one["sampler"] == "all"
  )
  pairs = [
    (one, next((base for base in bases if fits(one, base)), None))
    for one in arms
    if one["sampler"] != baseline
  ]
  return [(one, base) for one, base in pairs if base]


def _verdicts(arms: list[dict], baseline: str) -> list[dict[str, Any]]:
  """Each arm against the baseline at its budget, corrected together."""

  def outcomes(one: dict) -> ArmOutcomes:
    seeds, prompts = list(one["values"]), one["prompts"]
    means = np.array([one["values"][s] for s in seeds])[:, None]
    outcome = np.repeat(means, prompts, axis=1)
    return ArmOutcomes(one["label"], seeds, range(prompts), outcome)

  pairs = _pairs(arms, baseline)
  if not pairs:
    return []
  found = compare_arms(
    [(outcomes(a), outcomes(b)) for a, b in pairs], nested=True
  )
  return [dict(v, label=a["label"]) for v, (a, _) in zip(found, pairs)]


def _pooled(worlds: list[dict], baseline: str) -> list[dict[str, Any]]:
  """Differences to the baseline over all worlds and seeds, a seed's worlds
  first: they share nothing but the seed, and are one draw all the same."""
  by_label: dict[str, dict[int, list[float]]] = {}
  for world in worlds:
    for a, b in _pairs(world["arms"], baseline):
      seeds = by_label.setdefault(a["label"], {})
      for seed, value in a["values"].items():
        seeds.setdefault(seed, []).append(value - b["values"][seed])
  out = []
  for label, seeds in by_label.items():
    cells = [d for one in seeds.values() for d in one]
    out.append(
      dict(
        label=label,
        difference=intervals.t_mean([np.mean(d) for d in seeds.values()]),
        cells=len(cells),
        above=sum(d > 0 for d in cells),
        least=min(cells),
      )
    )
  return out


def main(argv: list[str]) -> int:
  """Returns the exit code; one line on stderr says what went wrong."""
  failed: dict[Cell, int] = {}

  def work() -> None:
    values, passed = parse_grid(argv)
    cells = cells_of(values)
    if values.run:
      failed.update(run_cells(values, passed, cells))
    summary = json.loads(json.dumps(summarise(values, cells)))
    folder = epath.Path(values.workdir)
    disk.write_json(folder / "grid.json", summary)
    html = study_page.grid_html(summary)
    disk.write_bytes(folder / "grid.html", html.encode())
    say(terminal.grid_text(summary))
    say(f"report: {folder}/grid.html")

  return guarded(work) or next(iter(failed.values()), 0)
