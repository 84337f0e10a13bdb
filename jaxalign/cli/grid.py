r"""Whole jobs side by side: worlds x seeds, each with a model of its own.

  python -m jaxalign.grid --config=configs/compare.py:smoke,nine \
    --worlds=natural,flips,junk --seeds=21,22,23,24,25 --workdir=runs/nine

`jaxalign.cli.main` trains the arms of several seeds from one reference, on one
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

from jaxalign.cli import main as main_lib
from jaxalign.core import disk
from jaxalign.core.errors import ConfigError, DataError

NATURAL = "natural"


class Cell(NamedTuple):
  """One job: a world and a seed."""

  world: str
  seed: int

  @property
  def folder(self) -> str:
    """Under the workdir."""
    return f"{self.world}/seed{self.seed}"


def parse(argv: list[str]) -> tuple[Any, list[str]]:
  """The flags, and those that every job is given."""
  from absl import flags

  values = flags.FlagValues()
  flags.DEFINE_string(
    "config", None, "Path of a config, with :variant.", flag_values=values
  )
  flags.DEFINE_string(
    "workdir", None, "Where the jobs lie.", flag_values=values
  )
  flags.DEFINE_list(
    "worlds", [NATURAL], "Variants of the config.", flag_values=values
  )
  flags.DEFINE_list("seeds", None, "Whole numbers.", flag_values=values)
  flags.DEFINE_integer(
    "processes",
    0,
    "Jobs at once; 0: one a core, up to "
    "the number of jobs. On accelerators say 1.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "baseline",
    "random",
    "The sampler that others are compared with.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "run",
    True,
    "--norun: only the page, of the jobs that are there.",
    flag_values=values,
  )
  flags.DEFINE_bool("help", False, "Show the flags.", flag_values=values)
  passed = [a for a in argv[1:] if a.startswith("--config.")]
  main_lib.parse_plain(values, [a for a in argv if a not in passed], __doc__)
  for name in ("config", "workdir", "seeds"):
    if not values[name].value:
      raise ConfigError(f"no {name}; say --{name}=...")
  for name in values.worlds:
    if not re.fullmatch(r"\w+", name):
      raise ConfigError(f"--worlds: {name!r} is no name of a variant")
  if not all(re.fullmatch(r"\d+", s) for s in values.seeds):
    raise ConfigError(f"--seeds={','.join(values.seeds)}, wanted whole numbers")
  if not os.path.exists(values.config.partition(":")[0]):
    raise ConfigError(
      f"config file {values.config.partition(':')[0]!r} does "
      "not exist; set --config"
    )
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
  variants = [v for v in variant.split(",") if v]
  if cell.world != NATURAL:
    variants.append(cell.world)
  joined = f"{path}:{','.join(variants)}" if variants else path
  k = cell.seed
  return [
    sys.executable,
    "-u",
    "-m",
    "jaxalign.main",
    f"--config={joined}",
    "--config.seeds=1",
    f"--config.seed={k}",
    f"--config.data.seed={k}",
    *passed,
    f"--workdir={values.workdir}/{cell.folder}",
  ]


def run(values: Any, passed: list[str], cells: list[Cell]) -> dict[Cell, int]:
  """Runs the jobs that are not finished; returns exit codes other than 0."""
  from jaxalign.core import progress

  cores = (
    sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
  )
  many = min(values.processes or len(cores), len(cells))
  share = max(1, len(cores) // many)
  waiting, running, failed, times = list(cells), {}, {}, []
  done = 0
  while waiting or running:
    while waiting and len(running) < many:
      cell = waiting.pop(0)
      place = next(i for i in range(many) if i not in running)
      folder = os.path.join(values.workdir, cell.folder)
      os.makedirs(folder, exist_ok=True)
      with open(f"{folder}/log.txt", "wb") as log:
        mine = cores[place * share : (place + 1) * share]
        process = subprocess.Popen(
          command_of(values, passed, cell), stdout=log, stderr=subprocess.STDOUT
        )
        if many > 1 and mine and hasattr(os, "sched_setaffinity"):
          try:  # before it has threads: those inherit
            os.sched_setaffinity(process.pid, mine)
          except ProcessLookupError:  # ended at once; its code says why
            pass
      running[place] = cell, process, time.monotonic()
    time.sleep(0.2)
    for place, (cell, process, start) in list(running.items()):
      if process.poll() is None:
        continue
      del running[place]
      done += 1
      took = time.monotonic() - start
      times.append(took)
      left = sum(times) / len(times) * (len(cells) - done) / many
      word = "done"
      if process.returncode:
        failed[cell] = process.returncode
        last = _last_line(f"{values.workdir}/{cell.folder}/log.txt")
        word = f"failed with {process.returncode}: {last}"
      progress.say(
        f"{cell.folder}: {word} in {progress.duration(took)} "
        f"({done} of {len(cells)}, about "
        f"{progress.duration(left)} left)"
      )
  return failed


def _last_line(path: str) -> str:
  with open(path, "rb") as file:
    lines = file.read().decode(errors="replace").strip().splitlines()
  return lines[-1][:300] if lines else "it said nothing"


# What the jobs found.


def read(workdir: Any, cells: list[Cell]) -> dict[Cell, dict[str, Any]]:
  """The summaries of the jobs that have one."""
  from etils import epath

  found = {}
  for cell in cells:
    path = epath.Path(workdir) / cell.folder / "summary.json"
    if path.exists():
      found[cell] = disk.read_json(path)
  return found


def outcomes(
  summary: dict[str, Any], seed: int, where: str
) -> dict[str, dict[str, Any]]:
  """Label of an arm -> its win rate, prompts, costs and rows.

  Raises:
    DataError: the job ran another seed, or has no win rate.
  """
  out = {}
  for arm in summary["arms"]:
    win = arm["metrics"].get("win_vs_target") or {}
    if arm["seed"] != seed or win.get("value") is None:
      raise DataError(
        f"{where}: arm {arm['name']} has no win rate of seed "
        f"{seed}; a grid compares win rates against the target"
      )
    label = arm["name"].removesuffix(f"-seed{seed}")
    cost = summary["ledger"]["arms"][arm["name"]]["total"]
    out[label] = dict(
      value=win["value"],
      prompts=win["n"],
      rows=arm["rows"],
      sampler="all" if arm["is_all"] else arm["sampler"],
      budget=arm["budget"],
      flops=cost,
      everything=summary["ledger"]["everything"],
      malformed=arm["metrics"]["malformed"]["value"],
    )
  return out


def truth(workdir: Any, cell: Cell, label: str) -> dict[str, float] | None:
  """Shares of wrong labels and of junk that an arm kept, where it is known."""
  from etils import epath

  from jaxalign.data import tables
  from jaxalign.data import world as world_lib

  folder = epath.Path(workdir) / cell.folder
  data = disk.read_json(folder / "config.json")["data"]
  path = folder / "runs" / f"{label}-seed{cell.seed}" / "subset.parquet"
  if data["source"] != "world" or not path.exists():
    return None
  rows = tables.read_table(path)
  if not rows or "chosen" not in rows[0]:
    return None
  world = world_lib.build_world(data["world"], data["seed"])
  return world_lib.faults(world, rows)


def summarise(values: Any, cells: list[Cell]) -> dict[str, Any]:
  """All that the page shows, from the jobs' artifacts alone."""
  import numpy as np

  from jaxalign.core import intervals

  found = read(values.workdir, cells)
  worlds = []
  for world in dict.fromkeys(c.world for c in cells):
    mine = [c for c in cells if c.world == world and c in found]
    told = {c.seed: outcomes(found[c], c.seed, c.folder) for c in mine}
    labels = [
      n
      for n in dict.fromkeys(n for t in told.values() for n in t)
      if all(n in t for t in told.values())
    ]
    start = [found[c]["baseline"]["win_vs_target"]["value"] for c in mine]
    arms = []
    for label in labels:
      runs = [told[c.seed][label] for c in mine]
      kept = [truth(values.workdir, c, label) for c in mine]
      arms.append(
        dict(
          label=label,
          sampler=runs[0]["sampler"],
          budget=runs[0]["budget"],
          rows=runs[0]["rows"],
          win=intervals.t_mean(np.array([r["value"] for r in runs])),
          values={c.seed: r["value"] for c, r in zip(mine, runs)},
          prompts=min(r["prompts"] for r in runs),
          cost=float(np.mean([r["flops"] / r["everything"] for r in runs])),
          malformed=float(np.mean([r["malformed"] for r in runs])),
          **{
            n: float(np.mean([k[n] for k in kept]))
            for n in ("wrong", "junk")
            if all(kept)
          },
        )
      )
    worlds.append(
      dict(
        world=world,
        seeds=[c.seed for c in mine],
        arms=arms,
        start=intervals.t_mean(np.array(start)) if start else None,
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


def _base(arms: list[dict], one: dict, baseline: str) -> dict | None:
  """The baseline's arm at the budget of `one`; None for itself."""
  for arm in arms:
    if (
      arm["sampler"] == baseline
      and arm["label"] != one["label"]
      and (arm["budget"] == one["budget"] or one["sampler"] == "all")
    ):
      return arm
  return None


def _pairs(arms: list[dict], baseline: str) -> list[tuple[dict, dict]]:
  return [
    (a, base)
    for a in arms
    if a["sampler"] != baseline
    and (base := _base(arms, a, baseline)) is not None
  ]


def _verdicts(arms: list[dict], baseline: str) -> list[dict[str, Any]]:
  """Each arm against the baseline at its budget, corrected together."""
  import numpy as np

  from jaxalign.eval import equivalence

  def as_arm(one):
    seeds = list(one["values"])
    outcome = np.repeat(
      np.array([one["values"][s] for s in seeds])[:, None],
      one["prompts"],
      axis=1,
    )
    return equivalence.ArmOutcomes(
      one["label"], seeds, range(one["prompts"]), outcome
    )

  pairs = _pairs(arms, baseline)
  return (
    [
      dict(v, label=a["label"])
      for v, (a, _) in zip(
        equivalence.compare_arms(
          [(as_arm(a), as_arm(b)) for a, b in pairs], nested=True
        ),
        pairs,
      )
    ]
    if pairs
    else []
  )


def _pooled(worlds: list[dict], baseline: str) -> list[dict[str, Any]]:
  """Differences to the baseline over all worlds and seeds, a seed's worlds
  first: they share nothing but the seed, and are one draw all the same."""
  import numpy as np

  from jaxalign.core import intervals

  by_label: dict[str, dict[int, list[float]]] = {}
  cells: dict[str, list[float]] = {}
  for world in worlds:
    for a, b in _pairs(world["arms"], baseline):
      for seed, value in a["values"].items():
        d = value - b["values"][seed]
        by_label.setdefault(a["label"], {}).setdefault(seed, []).append(d)
        cells.setdefault(a["label"], []).append(d)
  return [
    dict(
      label=label,
      difference=intervals.t_mean(
        np.array([np.mean(d) for d in seeds.values()])
      ),
      cells=len(cells[label]),
      above=sum(d > 0 for d in cells[label]),
      least=min(cells[label]),
    )
    for label, seeds in by_label.items()
  ]


def main(argv: list[str]) -> int:
  """Returns the exit code; one line on stderr says what went wrong."""
  status = 0

  def work():
    nonlocal status
    from etils import epath

    from jaxalign.core import progress
    from jaxalign.report import study_page, terminal

    values, passed = parse(argv)
    cells = cells_of(values)
    failed = run(values, passed, cells) if values.run else {}
    summary = json.loads(json.dumps(summarise(values, cells)))
    folder = epath.Path(values.workdir)
    disk.write_json(folder / "grid.json", summary)
    disk.write_bytes(
      folder / "grid.html", study_page.grid_html(summary).encode()
    )
    progress.say(terminal.grid_text(summary))
    progress.say(f"report: {folder}/grid.html")
    status = next(iter(failed.values()), 0)

  return main_lib.guarded(work) or status
