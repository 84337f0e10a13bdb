"""What the arms of a job allow one to say, read from their artifacts alone.

One seed: paired intervals over the prompts. Several: verdicts over seeds and
prompts (eval.verdict), in two families, each corrected for its own number:
arms among themselves, and arms against their start. Where one sampler was run
at four budgets or more, the curve through them (eval.plateau).
"""

from typing import Any, NamedTuple

import numpy as np

from jaxalign import artifacts
from jaxalign.data import world as world_lib
from jaxalign.eval import evaluate
from jaxalign.eval import intervals
from jaxalign.eval import plateau
from jaxalign.eval import verdict
from jaxalign.eval import winrate
from jaxalign.job import Arm, Job, arm_folder
from jaxalign.select.topk import budget_rows
from jaxalign.stages.evaluate import read_samples

MIN_UPDATES = 50  # fewer compare recipes that have not begun, not rows
NOT_SHARES = ("kl", "length")  # metrics that may leave [0, 1]
MIN_SHARES = 4  # budgets of one sampler that a curve is drawn through


class Told(NamedTuple):
  """The outcomes of every arm on the same prompts."""

  metric: str  # a metric of eval.json
  unit: str  # the same in words
  prompts: list[str]  # P
  won: dict[str, np.ndarray]  # of an arm or the start: [P] in [0, 1]


def start_of(job: Job) -> str:
  """What the policy starts from, in words."""
  return "given checkpoint" if job.c.model.checkpoint else "SFT model"


def outcomes(job: Job, arms: list[Arm]) -> Told:
  """Win or loss of every arm by prompt, and of what they started from.

  Without a true reward there is no win rate: then the pairs of held-out
  accuracy are told, which the start has none of.
  """
  folders = {a.name: arm_folder(job, a) for a in arms}
  start = read_samples(job.shared / "baseline")
  if start[0]["reward"] is None:
    won = {n: _right(job, f) for n, f in folders.items()}
    n = len(next(iter(won.values())))
    return Told("accuracy", "held-out preference accuracy",
                [str(i) for i in range(n)], won)
  told = {n: read_samples(f) for n, f in folders.items()}
  world = job.examined.world
  target = np.array([world_lib.reward(world, s["prompt"], s["target"])
                     for s in start])
  return Told("win_vs_target", "win rate against the SFT target",
              [s["id"] for s in start],
              {n: winrate.wins(np.array([s["reward"] for s in samples]), target)
               for n, samples in {**told, start_of(job): start}.items()})


def _right(job: Job, folder: Any) -> np.ndarray:
  """[n] 1, 0.5 or 0: whether the implicit reward prefers the chosen side."""
  policy, ref = evaluate.as_pairs(
      job.examined, artifacts.read_array(folder / "held_out_logp.npy"),
      artifacts.read_array(job.shared / "baseline" / "held_out_logp.npy"))
  margin = np.asarray(policy, np.float64) - ref
  return winrate.wins(margin[:, 0], margin[:, 1])


def paired(told: Told, names: list[str], start: str) -> list[dict[str, Any]]:
  """One seed: the first arm against the others, then each and its start."""
  pairs = [(names[0], other) for other in names[1:]]
  if start in told.won:
    pairs += [(name, start) for name in names]
  out = []
  for a, b in pairs:
    diff = intervals.difference(told.won[a], told.won[b])
    out.append(dict(a=a, b=b, metric=told.metric, difference=diff,
                    words=intervals.in_words(a, b, diff, told.unit)))
  return out


def grouped(arms: list[Arm]) -> dict[str, list[Arm]]:
  """Label -> the runs of an arm, one a seed."""
  out: dict[str, list[Arm]] = {}
  for arm in arms:
    out.setdefault(arm.label, []).append(arm)
  return out


def compared(groups: dict[str, list[Arm]], chosen: str
             ) -> list[tuple[str, str, str, str]]:
  """The comparisons that a study makes, no more: each costs the others.

  Every sampler against random at its budget; the chosen one also against the
  others at its budget, and against everything.

  Args:
    groups: as from `grouped`.
    chosen: config.select.sampler.

  Returns:
    (label, label it is compared with, heading, the one the heading leaves
    open), each pair once.
  """
  first = {label: runs[0] for label, runs in groups.items()}
  part = {n: a for n, a in first.items() if not a.is_all}
  out = []
  for b, base in part.items():
    if base.sampler == "random":
      out += [(a, b, f"Against {b}", a) for a, arm in part.items()
              if arm.budget == base.budget and a != b]
  ours = [a for a, arm in part.items() if arm.sampler == chosen]
  for a in ours:
    for b, other in first.items():
      if (other.like in (0, part[a].budget) if other.is_all else
          other.budget == part[a].budget and a != b):
        out.append((a, b, f"{a} against others", b)
                   if len(ours) == 1 or not other.is_all else
                   (a, b, f"Against {b}", a))
  once: dict[frozenset, tuple] = {}
  for pair in out:
    once.setdefault(frozenset(pair[:2]), pair)
  return list(once.values())


def _arms(told: Told, groups: dict[str, list[Arm]], start: str
          ) -> dict[str, verdict.Arm]:
  """The outcomes by seed and prompt; the start is one, met by every seed."""
  out = {label: verdict.Arm(label, [a.seed for a in runs], told.prompts,
                            np.stack([told.won[a.name] for a in runs]))
         for label, runs in groups.items()}
  if start in told.won:
    seeds = next(iter(out.values())).seeds
    out[start] = verdict.Arm(start, seeds, told.prompts, np.tile(
        told.won[start], (len(seeds), 1)))
  return out


def verdicts(told: Told, groups: dict[str, list[Arm]], chosen: str, start: str
             ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Several seeds: (verdicts between arms, each arm against its start)."""
  arms = _arms(told, groups, start)
  def judged(pairs):
    found = verdict.compare([(arms[a], arms[b]) for a, b, *_ in pairs],
                            unit=told.unit)
    return [dict(one, a=a, b=b, title=title, label=label, metric=told.metric)
            for (a, b, title, label), one in zip(pairs, found)]
  return judged(compared(groups, chosen)), judged(
      [(label, start, f"Against the {start}", label) for label in groups]
      if start in arms else [])


def _over_cells(outcome: np.ndarray) -> dict[str, Any]:
  """A mean of [S, P] shares with its interval over seeds and prompts.

  Cells that are all alike show no spread; then the prompts alone bound it.
  """
  found = intervals.crossed(outcome)
  if found["low"] is None or np.ptp(outcome) == 0:
    bounds = intervals.share(outcome.mean(axis=0))
    return found | dict(low=bounds["low"], high=bounds["high"])
  return found | dict(low=max(0.0, found["low"]), high=min(1.0, found["high"]))


def _over_seeds(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
  """A metric of several runs: its mean, with an interval over the seeds."""
  values = [one["value"] for one in runs]
  if len(set(values)) == 1:  # no spread to see: one run's own interval
    return {k: runs[0].get(k) for k in ("value", "low", "high", "n")}
  found = intervals.student(values)
  found["seeds"] = found["n"]
  if name in NOT_SHARES:
    return found
  return found | dict(low=max(0.0, found["low"]), high=min(1.0, found["high"]))


def ranking(told: Told, groups: dict[str, list[Arm]]) -> list[dict[str, Any]]:
  """The samplers of each budget by their mean, and the ranks left open.

  A rank's range counts the samplers that are told apart from it, with all
  pairs of all budgets in one correction (Holm): so all ranges hold together.

  Returns:
    For each budget of three samplers or more: {"budget", "rows": [{"name",
    "value", "low", "high", "n", "rank", "from", "to"}]}, best first.
  """
  arms = _arms(told, groups, "")
  budgets: dict[Any, list[str]] = {}
  for label, runs in groups.items():
    if not runs[0].is_all:
      budgets.setdefault(runs[0].budget, []).append(label)
  budgets = {b: names for b, names in budgets.items() if len(names) > 2}
  pairs = [(a, b) for names in budgets.values() for i, a in enumerate(names)
           for b in names[i + 1:]]
  better = set()
  for (a, b), one in zip(pairs, verdict.compare(
      [(arms[a], arms[b]) for a, b in pairs], unit=told.unit)):
    if one["p_differ"] is not None and one["verdict"] != "withheld" and (
        one["p_differ"] < one["level"]):
      better.add((a, b) if one["difference"]["value"] > 0 else (b, a))
  out = []
  for budget, names in budgets.items():
    order = sorted(names, key=lambda n: -float(arms[n].outcome.mean()))
    out.append(dict(budget=budget, rows=[
        dict(_over_cells(arms[n].outcome), name=n, rank=i + 1, **{
            "from": 1 + sum((m, n) in better for m in names),
            "to": len(names) - sum((n, m) in better for m in names)})
        for i, n in enumerate(order)]))
  return out


def curve_arms(job: Job, arms: list[Arm]) -> list[tuple[int, Arm]]:
  """(rows, arm) of the chosen sampler and everything, where a curve is due."""
  n = len(job.column("pool", "id"))
  found = [(budget_rows(a.budget, n), a) for a in arms if not a.like and (
      a.is_all or a.sampler == job.c.select.sampler)]
  return found if len({m for m, _ in found}) >= MIN_SHARES else []


def curve(job: Job, told: Told, arms: list[Arm], start: str
          ) -> dict[str, Any] | None:
  """`plateau.fit` of win rate over the share of the data, in percent.

  The start is the point without data. All points share their prompts, so the
  intervals are about more seeds, not about other prompts.
  """
  points = curve_arms(job, arms)
  if not points:
    return None
  n = len(job.column("pool", "id"))
  x = [100 * m / n for m, _ in points]
  y = [100 * float(told.won[a.name].mean()) for _, a in points]
  if start in told.won:
    x, y = [0.0, *x], [100 * float(told.won[start].mean()), *y]
  found = plateau.fit(x, y)
  return found | dict(
      sampler=job.c.select.sampler, metric=told.metric,
      rows=[m for m, _ in points], arms=[a.name for _, a in points],
      epochs=job.c.train.epochs, max_updates=job.c.train.max_updates,
      min_updates=job.c.train.min_updates)


def summed_up(told: Told, groups: dict[str, list[Arm]],
              described: dict[str, dict], spent: dict[str, dict]
              ) -> list[dict[str, Any]]:
  """One entry an arm over its seeds, shaped as one of a single run.

  The told metric has an interval over seeds and prompts, the others one over
  seeds alone.
  """
  arms = _arms(told, groups, "")
  out = []
  for label, runs in groups.items():
    seen = [described[a.name] for a in runs]
    metrics = {}
    for name in seen[0]["metrics"]:
      found = [one["metrics"][name] for one in seen]
      if all(one["value"] is not None for one in found):
        metrics[name] = _over_seeds(name, found)
    if told.metric in metrics:
      metrics[told.metric] = _over_cells(arms[label].outcome)
    out.append({k: seen[0][k] for k in (
        "sampler", "budget", "rows", "updates", "is_all", "like")} | dict(
            name=label, seeds=[a.seed for a in runs], metrics=metrics,
            operations=float(np.mean([spent[a.name]["total"] for a in runs]))))
  return out


def efficiency(groups: list[dict], against_start: list[dict]
               ) -> list[dict[str, Any]]:
  """What each arm gained over its start, for the operations it took alone."""
  gains = {one["a"]: one["difference"] for one in against_start}
  return [dict(name=g["name"], gain=gains[g["name"]],
               operations=g["operations"],
               per_tera=100 * gains[g["name"]]["value"] * 1e12
               / max(g["operations"], 1.0))
          for g in groups if g["name"] in gains]


def weigh(job: Job, arms: list[Arm], described: list[dict],
          spent: dict[str, dict]) -> dict[str, Any]:
  """Everything the summary says of how well the arms do.

  Args:
    job: the run.
    arms: its arms, the chosen sampler first.
    described: what the report shows of each.
    spent: operations of each arm on its own, by its name.

  Returns:
    "comparisons", "verdicts" and "warnings"; of several seeds also "groups",
    "ranking" and "efficiency"; "fit" where a curve is due.
  """
  start, groups = start_of(job), grouped(arms)
  told = outcomes(job, arms)
  out: dict[str, Any] = {}
  fit = curve(job, told, arms, start)
  if fit:
    out["fit"] = fit
  if job.c.seeds == 1:
    found = paired(told, [a.name for a in arms], start)
    words = [x["words"] for x in found[:len(arms) - 1]]
    return out | dict(comparisons=found, warnings=[], verdicts=(
        fit["words"] + words if fit else words))
  between, begun = verdicts(told, groups, job.c.select.sampler, start)
  out["groups"] = summed_up(told, groups, {d["name"]: d for d in described},
                            spent)
  out["ranking"] = ranking(told, groups)
  out["efficiency"] = efficiency(out["groups"], begun)
  warnings = ["Seeds differ in the selection, the order of batches and the "
              f"sampling; the pool, the {start} and the mixture are one for "
              "all, so intervals leave out what others would change"]
  few = [g for g in out["groups"] if g["updates"] < MIN_UPDATES
         and not g["is_all"]]
  if few and not fit:  # a curve begins at few by design
    warnings.append(f"{few[0]['name']} was trained for {few[0]['updates']} "
                    f"updates, fewer than the {MIN_UPDATES} of a fair test; "
                    "raise config.train.min_updates")
  words = [one["words"] for one in between]
  return out | dict(comparisons=between + begun, warnings=warnings,
                    verdicts=fit["words"] + words if fit else words)
