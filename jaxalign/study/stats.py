"""What the arms of a job allow one to say.

One seed: paired intervals over the prompts. Several: verdicts over seeds and
prompts, in two families, each corrected for its own number: arms among
themselves, and arms against the policy before alignment. Where one sampler was
run at four budgets or more, the curve through them.
"""

import itertools
from typing import Any

import numpy as np

from jaxalign.core import intervals
from jaxalign.eval.equivalence import (
  ArmOutcomes,
  compare_arms,
  MIN_PROMPTS,
  one_seed_sentence,
)
from jaxalign.eval.judge_kinds import kind_of
from jaxalign.model.job import Arm, Job
from jaxalign.study.arms import comparisons, grouped
from jaxalign.study.curves import budget_curve, checkpoint_curve
from jaxalign.study.outcomes import (
  all_read,
  baseline_name,
  Outcomes,
  read_outcomes,
)

MIN_UPDATES = 50  # fewer compare recipes that have not begun, not rows
UNBOUNDED = ("kl", "length")  # metrics that may leave [0, 1]


def paired(
  outcomes: Outcomes, names: list[str], baseline: str
) -> list[dict[str, Any]]:
  """One seed: the first arm against the others, then each and the baseline."""
  pairs = [(names[0], other) for other in names[1:]]
  if baseline in outcomes.wins:
    pairs += [(name, baseline) for name in names]
  out = []
  for a, b in pairs:
    ours, theirs = outcomes.wins[a], outcomes.wins[b]
    read = all_read(ours, theirs)
    diff = intervals.paired_difference(ours[read], theirs[read])
    words = one_seed_sentence(a, b, diff, outcomes.unit)
    if 0 < diff["n"] < MIN_PROMPTS:
      value, low, high = (
        f"{100 * diff[k]:+.1f}" for k in ("value", "low", "high")
      )
      words = (
        f"{a} against {b}: {value} points of {outcomes.unit} (95 % interval "
        f"{low} to {high}, n = {diff['n']}). No verdict: it needs at least "
        f"{MIN_PROMPTS} prompts."
      )
    metric = outcomes.metric
    out.append(dict(a=a, b=b, metric=metric, difference=diff, words=words))
  return out


def _arm_outcomes(
  outcomes: Outcomes, groups: dict[str, list[Arm]], baseline: str = ""
) -> dict[str, ArmOutcomes]:
  """The outcomes by seed and prompt; the baseline is one, met by every seed."""
  wins, prompts = outcomes.wins, outcomes.prompts
  out = {}
  for label, runs in groups.items():
    seeds = [a.seed for a in runs]
    cells = np.stack([wins[a.name] for a in runs])
    out[label] = ArmOutcomes(label, seeds, prompts, cells)
  if baseline in wins:
    seeds = next(iter(out.values())).seeds
    cells = np.tile(wins[baseline], (len(seeds), 1))
    out[baseline] = ArmOutcomes(baseline, seeds, prompts, cells)
  return out


def _compare(
  arms: dict[str, ArmOutcomes], pairs: list[tuple[str, str]], unit: str
) -> list[dict[str, Any]]:
  """Verdicts, each on the prompts that were read of both, whatever the seed."""

  def of_both(a: ArmOutcomes, b: ArmOutcomes) -> list[ArmOutcomes]:
    read = all_read(a.outcome, b.outcome)
    prompts = list(itertools.compress(a.prompts, read))
    cut = lambda x: x._replace(prompts=prompts, outcome=x.outcome[:, read])
    return [cut(a), cut(b)]

  return compare_arms([of_both(arms[a], arms[b]) for a, b in pairs], unit=unit)


def verdicts(
  outcomes: Outcomes, groups: dict[str, list[Arm]], chosen: str, baseline: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Several seeds: (verdicts between arms, each arm against the baseline)."""
  arms = _arm_outcomes(outcomes, groups, baseline)
  title = f"Against the {baseline}"
  against = [(label, baseline, title, label) for label in groups]
  out = []
  for rows in (comparisons(groups, chosen), against * (baseline in arms)):
    found = _compare(arms, [(a, b) for a, b, *_ in rows], outcomes.unit)
    shared = dict(metric=outcomes.metric)
    out.append(
      [
        dict(one, a=a, b=b, title=title, label=label, **shared)
        for (a, b, title, label), one in zip(rows, found)
      ]
    )
  return out[0], out[1]


def over_cells(outcome: np.ndarray) -> dict[str, Any]:
  """A mean of [S, P] outcomes with its interval over seeds and prompts.

  A prompt counts where it was read of every seed. Cells that are all alike
  show no spread; then the prompts alone bound it.
  """
  outcome = outcome[:, all_read(outcome)]
  found = intervals.crossed_mean(outcome)
  if found["low"] is None or np.ptp(outcome) == 0:
    bounds = intervals.proportion(outcome.mean(axis=0))
    return found | dict(low=bounds["low"], high=bounds["high"])
  return intervals.clipped(found)


def over_seeds(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
  """A metric of several runs: its mean, with an interval over the seeds."""
  values = [one["value"] for one in runs]
  if len(set(values)) == 1:  # no spread to see: one run's own interval
    return {k: runs[0].get(k) for k in ("value", "low", "high", "n")}
  found = intervals.t_mean(values)
  found["seeds"] = found["n"]
  return found if name in UNBOUNDED else intervals.clipped(found)


def ranking(
  outcomes: Outcomes, groups: dict[str, list[Arm]]
) -> list[dict[str, Any]]:
  """The samplers of each budget by their mean, and the ranks left open.

  A rank's range counts the samplers that differ significantly from it, with
  all pairs of all budgets in one correction (Holm): all ranges hold together.

  Returns:
    For each budget of three samplers or more: {"budget", "rows": [{"name",
    "value", "low", "high", "n", "rank", "from", "to"}]}, best first.
  """
  arms = _arm_outcomes(outcomes, groups)
  budgets: dict[Any, list[str]] = {}
  for label, runs in groups.items():
    if not runs[0].is_all:
      budgets.setdefault(runs[0].budget, []).append(label)
  budgets = {b: names for b, names in budgets.items() if len(names) > 2}
  pairs = [p for n in budgets.values() for p in itertools.combinations(n, 2)]
  better = set()
  for (a, b), one in zip(pairs, _compare(arms, pairs, outcomes.unit)):
    claims = one["p_differ"] is not None and one["verdict"] != "withheld"
    if claims and one["p_differ"] < one["level"]:
      better.add((a, b) if one["difference"]["value"] > 0 else (b, a))
  out = []
  for budget, names in budgets.items():
    cells = {n: over_cells(arms[n].outcome) for n in names}
    rows = []
    for n in sorted(names, key=lambda n: -cells[n]["value"]):
      above = sum((m, n) in better for m in names)
      below = sum((n, m) in better for m in names)
      span = {"from": 1 + above, "to": len(names) - below}
      rows.append(dict(cells[n], name=n, rank=len(rows) + 1, **span))
    out.append(dict(budget=budget, rows=rows))
  return out


def summed_up(
  outcomes: Outcomes,
  groups: dict[str, list[Arm]],
  described: dict[str, dict],
  costs: dict[str, dict],
) -> list[dict[str, Any]]:
  """One entry an arm over its seeds, shaped as one of a single run.

  The metric of the outcomes has an interval over seeds and prompts, the
  others one over seeds alone.
  """
  arms = _arm_outcomes(outcomes, groups)
  kept = ("sampler", "budget", "rows", "updates", "is_all", "like")
  out = []
  for label, runs in groups.items():
    seen = [described[a.name] for a in runs]
    metrics = {}
    for name in seen[0]["metrics"]:
      found = [one["metrics"][name] for one in seen]
      if all(one["value"] is not None for one in found):
        metrics[name] = over_seeds(name, found)
    if outcomes.metric in metrics:
      metrics[outcomes.metric] = over_cells(arms[label].outcome)
    flops = float(np.mean([costs[a.name]["total"] for a in runs]))
    own = dict(name=label, seeds=[a.seed for a in runs])
    own |= dict(metrics=metrics, flops=flops)
    out.append({k: seen[0][k] for k in kept} | own)
  return out


def efficiency(
  groups: list[dict], against_baseline: list[dict]
) -> list[dict[str, Any]]:
  """What each arm gained over the baseline, for the flops it took alone."""
  gains = {one["a"]: one["difference"] for one in against_baseline}
  return [
    dict(
      name=g["name"],
      gain=gains[g["name"]],
      flops=g["flops"],
      per_tera=100 * gains[g["name"]]["value"] * 1e12 / max(g["flops"], 1.0),
    )
    for g in groups
    if g["name"] in gains
  ]


def weigh(
  job: Job, arms: list[Arm], described: list[dict], costs: dict[str, dict]
) -> dict[str, Any]:
  """Everything the summary says of how well the arms do.

  Args:
    job: the run.
    arms: its arms, the chosen sampler first.
    described: what the report shows of each.
    costs: flops of each arm on its own, by its name.

  Returns:
    "comparisons", "verdicts" and "warnings"; of several seeds also "groups",
    "ranking" and "efficiency"; "fit" where a curve is due, "along" where one
    through checkpoints is.
  """
  baseline, groups = baseline_name(job), grouped(arms)
  outcomes = read_outcomes(job, arms)
  # Checkpoints are measured by the true reward, whoever else judges.
  true = kind_of(job.c) == "world"
  curves = dict(
    fit=budget_curve(job, outcomes, arms, baseline),
    along=checkpoint_curve(
      job, arms, outcomes.wins.get(baseline) if true else None
    ),
  )
  out = {name: one for name, one in curves.items() if one}
  words = [w for one in out.values() for w in one["words"]]
  if job.c.seeds == 1:
    found = paired(outcomes, [a.name for a in arms], baseline)
    words += [x["words"] for x in found[: len(arms) - 1]]
    return out | dict(comparisons=found, warnings=[], verdicts=words)
  between, against = verdicts(outcomes, groups, job.c.select.sampler, baseline)
  by_name = {d["name"]: d for d in described}
  out["groups"] = summed_up(outcomes, groups, by_name, costs)
  out["ranking"] = ranking(outcomes, groups)
  out["efficiency"] = efficiency(out["groups"], against)
  warnings = [
    "Seeds differ in the selection, the order of batches and the "
    f"sampling; the pool, the {baseline} and the mixture are one for "
    "all, so intervals leave out what others would change"
  ]
  few = [
    g for g in out["groups"] if g["updates"] < MIN_UPDATES and not g["is_all"]
  ]
  if few and "fit" not in out:  # a curve begins at few by design
    warnings.append(
      f"{few[0]['name']} was trained for {few[0]['updates']} "
      f"updates, fewer than the {MIN_UPDATES} of a fair test; "
      "raise config.train.min_updates"
    )
  words += [one["words"] for one in between]
  return out | dict(
    comparisons=between + against, warnings=warnings, verdicts=words
  )
