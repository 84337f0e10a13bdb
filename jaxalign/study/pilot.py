"""Small studies that settle what a config leaves open, before the large one.

`select.budget="auto"`: the chosen sampler at a few small budgets, a curve
through them, and the least budget whose predicted win rate is near enough to
its plateau. `direction=auto` in the sampler's name: top, middle and low at one
small budget, and the best of them. Each is a study of its own under
<workdir>/pilot, with its page; the shared stages are the large study's.
"""

from collections.abc import Callable
import re
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from jaxalign import pipeline
from jaxalign.core.disk import read_json, write_json
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.core.progress import say
from jaxalign.model.job import Arm, Job
from jaxalign.select.topk import budget_rows
from jaxalign.study.plateau import enough, LEAST
from jaxalign.train.ref_logps import updates_of

AUTO = "auto"
MARGIN = 0.02  # of the plateau: wins that a smaller budget may give up
DIRECTIONS = ("top", "middle", "low")
_OPEN = re.compile(r"\bdirection\s*=\s*auto\b")


def is_open(c: Any) -> bool:
  """Whether a pilot is due."""
  return c.select.budget == AUTO or bool(_OPEN.search(c.select.sampler))


def with_direction(name: str, direction: str) -> str:
  """ "ifd(direction=auto)" -> "ifd(direction=low)"."""
  return _OPEN.sub(f"direction={direction}", name)


def refuse_open(c: Any, command: str) -> None:
  """For commands that train no policy to compare, or one only."""
  if is_open(c):
    raise ConfigError(
      f"{command} cannot settle what a pilot must: set "
      "config.select.budget to a number and the direction in "
      "config.select.sampler, or run jaxalign.main"
    )


def configs(c: Any) -> dict[str, Any]:
  """The configs of the pilots that are due, by the name of their folder.

  Where both are, the budgets' is of an open direction still: "top" stands in
  until the other pilot has settled it.
  """
  top, *others = (with_direction(c.select.sampler, d) for d in DIRECTIONS)
  due = {}
  if _OPEN.search(c.select.sampler):
    due["directions"] = _changed(c, top, at(c), (), (*others, "random"))
  if c.select.budget == AUTO:
    due["budgets"] = _changed(c, top, c.pilot.budgets[-1], c.pilot.budgets, ())
  return due


def at(c: Any) -> float:
  """The budget at which directions are compared: the middle one."""
  return sorted(c.pilot.budgets)[len(c.pilot.budgets) // 2]


def _changed(
  c: Any, sampler: str, budget: float, budgets: tuple, compare: tuple
) -> Any:
  out = ConfigDict(c.to_dict(), type_safe=False)
  out.select.sampler, out.select.budget = sampler, budget
  out.budgets, out.compare, out.seeds = budgets, compare, c.pilot.seeds
  out.lock()
  return out


def check_pilot(c: Any) -> None:
  """Raises ConfigError for knobs of a pilot that cannot work."""
  if _OPEN.search(c.select.sampler) and not re.fullmatch(
    r"[\w:.]+\(.*\)", c.select.sampler
  ):
    raise ConfigError(
      f"select.sampler={c.select.sampler!r}: direction=auto is "
      "settled for one sampler, no chain; set "
      "config.select.sampler"
    )
  for name in c.compare:
    if _OPEN.search(name):
      raise ConfigError(
        f"compare has {name!r}: the direction of "
        "select.sampler alone can be settled; set a direction "
        "in config.compare"
      )
  if c.pilot.seeds < 1:
    raise ConfigError(
      f"pilot.seeds={c.pilot.seeds}, wanted 1 or more; set config.pilot.seeds"
    )
  if c.select.budget == AUTO:
    if len(set(c.pilot.budgets)) < LEAST:
      raise ConfigError(
        f"pilot.budgets={tuple(c.pilot.budgets)}, wanted four "
        "different ones or more: a curve has three numbers; "
        "set config.pilot.budgets"
      )
    if c.budgets:
      raise ConfigError(
        "select.budget='auto' settles one budget; set config.budgets=()"
      )


def settle(job: Job, study: Callable[[Job], Any]) -> list[str]:
  """Runs the pilots that are due, and sets in `job.c` what they settle.

  Args:
    job: its config is changed, the workdir's stages are not.
    study: `study(job)` runs all arms of a pilot and writes its summary.

  Returns:
    What it allows one to say, sentences for the large study's report.

  Raises:
    ConfigError: a pilot that takes more than config.pilot.most of what it
      could save.
    DataError: a curve whose plateau the pilot's points do not bound.
  """
  due, notes = configs(job.c), []
  if not due:
    return []
  job.run("data")
  cost = sum(_updates(job, c) for c in due.values())
  if cost > job.c.pilot.most:
    raise ConfigError(
      f"the pilot would take {cost:.0%} of the updates of aligning on "
      f"everything, above {job.c.pilot.most:.0%}; lower "
      "config.pilot.budgets or config.pilot.seeds, or "
      "raise config.pilot.most"
    )
  for name in due:  # the second is of the direction that the first settled
    say(f"pilot of {name}: {job.workdir}/pilot/{name}")
    summary = _run(job, name, configs(job.c)[name], study)
    if name == "directions":
      knob, (value, words) = "sampler", _best_direction(job.c, summary)
    else:
      knob, (value, words) = "budget", _advice(job, summary, cost)
    with job.c.unlocked(), job.c.ignore_type():
      job.c.select[knob] = value
    notes.append(words)
  for words in notes:
    say(words)
  return notes


def _updates(job: Job, c: Any) -> float:
  """Updates of a pilot's arms over those of everything."""
  n = len(job.column("pool", "id"))
  budgets = c.budgets or (c.select.budget,)
  rows = [budget_rows(budget, n, c.train.batch_size) for budget in budgets]
  total = sum(_updates_of(c, budget, m, n) for budget, m in zip(budgets, rows))
  runs = (1 + len(c.compare)) * c.seeds
  return total * runs / _updates_of(c, 1.0, n, n)


def _updates_of(c: Any, budget: float, rows: int, pool: int) -> int:
  return updates_of(c, Arm("random", budget, 0), rows, pool)


def _run(
  job: Job, name: str, c: Any, study: Callable[[Job], Any]
) -> dict[str, Any]:
  """The summary of a pilot; a job of its own over the same shared stages."""
  folder = job.workdir / "pilot" / name
  small = pipeline.make_job(c, job.mesh, folder, job.redo)
  small.shared = job.shared
  study(small)
  return read_json(small.workdir / "summary.json")


def _best_direction(c: Any, summary: dict[str, Any]) -> tuple[str, str]:
  """The sampler with the direction of the best mean, and what was seen."""
  values: dict[str, list[float]] = {}
  metric = summary["comparisons"][0]["metric"]
  for arm in summary["arms"]:
    value = arm["metrics"][metric]["value"]
    values.setdefault(arm["sampler"], []).append(value)
  names = {with_direction(c.select.sampler, d): d for d in DIRECTIONS}
  mean = {n: float(np.mean(values[n])) for n in (*names, "random")}
  best = max(names, key=mean.__getitem__)
  listed = ", ".join(
    f"{names.get(n, n)} {100 * value:.1f}" for n, value in mean.items()
  )
  below = "; none was above random: this score may have nothing to say here"
  return best, (
    f"A pilot at {at(c):.1%} of the pool ({c.pilot.seeds} seeds; "
    f"pilot/directions/report.html has the intervals) chose {best}: "
    f"{listed} %{below * (mean[best] <= mean['random'])}."
  )


def _advice(job: Job, summary: dict[str, Any], cost: float) -> tuple[int, str]:
  """Rows to keep and a sentence, from the curve of the pilot."""
  c, fit = job.c, summary["fit"]
  n, page = len(job.column("pool", "id")), "pilot/budgets/report.html"
  if not fit["identified"]:
    raise DataError(
      "select.budget='auto': the pilot's points do not bound a plateau, so "
      "no budget can be advised; add larger ones to config.pilot.budgets, "
      "raise config.pilot.seeds or config.eval.prompts, or set "
      f"config.select.budget; see {job.workdir}/{page}"
    )
  near = enough(fit, 100 * MARGIN)
  least = max(min(fit["rows"]), c.train.batch_size)
  rows = min(n, max(least, int(np.ceil(near["value"] / 100 * n))))
  takes = _updates_of(c, rows, rows, n) / _updates_of(c, 1.0, n, n)
  saved = 1 - takes - cost
  if jax.process_index() == 0:
    advice = dict(rows=rows, share=rows / n, near=near, saved=saved)
    advice |= dict(pilot_updates=cost, updates=takes)
    write_json(job.workdir / "pilot" / "advice.json", advice)
  top = "no bound" if near["high"] is None else f"{near['high']:.1f} %"
  beyond = ", beyond the largest fraction measured"
  return rows, (
    f"A pilot ({page}) puts the plateau at {fit['r']['value']:.1f} % and "
    f"within {100 * MARGIN:g} points of it at {near['value']:.1f} % of the "
    f"pool (95 % interval {near['low']:.1f} to {top}"
    f"{beyond * (near['value'] > max(fit['x']))}): "
    f"{rows:,} of {n:,} rows are kept. Of the updates of aligning on "
    f"everything the pilot took {cost:.0%} and these take {takes:.0%}: "
    + (f"{saved:.0%} are saved." if saved > 0 else "nothing is saved.")
  )
