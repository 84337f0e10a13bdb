"""What the arms of a job allow one to say, read from their artifacts alone.

One seed: paired intervals over the prompts. Several: verdicts over seeds and
prompts (eval.verdict), in two families, each corrected for its own number:
arms among themselves, and arms against their start. Where one sampler was run
at four budgets or more, the curve through them (eval.plateau).
"""

from typing import Any, NamedTuple

import numpy as np

from jaxalign.core import disk, intervals
from jaxalign.core.errors import DataError
from jaxalign.data import batches, world
from jaxalign.eval import equivalence, held_out, judge_kinds, winrate
from jaxalign.eval.equivalence import ArmOutcomes
from jaxalign.eval.judge_stage import read_verdicts
from jaxalign.eval.policies import read_samples
from jaxalign.model.job import Arm, arm_folder, Job
from jaxalign.select.topk import budget_rows
from jaxalign.study import along, plateau

MIN_UPDATES = 50  # fewer compare recipes that have not begun, not rows
NOT_SHARES = ("kl", "length")  # metrics that may leave [0, 1]


class Told(NamedTuple):
  """The outcomes of every arm on the same prompts."""

  metric: str  # a metric of eval.json
  unit: str  # the same in words
  prompts: list[str]  # P
  # Of an arm or the start: [P] in [0, 1], NaN where no verdict was read.
  won: dict[str, np.ndarray]


def start_of(job: Job) -> str:
  """What the policy starts from, in words."""
  return "given checkpoint" if job.c.model.checkpoint else "SFT model"


def outcomes(job: Job, arms: list[Arm]) -> Told:
  """Win or loss of every arm by prompt, and of what they started from.

  Without a judge, or with one that could not be read, there is no win rate:
  then the pairs of held-out accuracy are told, which the start has none of.

  Raises:
    DataError: arms that were judged on different prompts.
  """
  kind = judge_kinds.kind_of(job.c)
  if kind in judge_kinds.JUDGES:
    told = _judged(job, arms)
    if legible(told):
      return told
  if kind == "world":
    return _in_world(job, arms)
  won = {a.name: _right(job, arm_folder(job, a)) for a in arms}
  n = len(next(iter(won.values())))
  return Told(
    "accuracy", "held-out preference accuracy", [str(i) for i in range(n)], won
  )


def _in_world(job: Job, arms: list[Arm]) -> Told:
  """By the true reward, against the target or the start."""
  start = read_samples(job.shared / "baseline")
  told = {a.name: read_samples(arm_folder(job, a)) for a in arms}
  told[start_of(job)] = start
  rewards = {
    n: np.array([s["reward"] for s in samples]) for n, samples in told.items()
  }
  against = "SFT target"
  if job.c.judge.baseline == "target":
    theirs = np.array(
      [
        world.reward(held_out.eval_set(job).world, s["prompt"], s["target"])
        for s in start
      ]
    )
  else:
    against, theirs = "reference", rewards[start_of(job)]
  return Told(
    winrate.BASELINES[job.c.judge.baseline][0],
    f"win rate against the {against}",
    [s["id"] for s in start],
    {n: winrate.wins(x, theirs) for n, x in rewards.items()},
  )


def _judged(job: Job, arms: list[Arm]) -> Told:
  """By the judge that was asked."""
  rows = {a.name: read_verdicts(arm_folder(job, a)) for a in arms}
  rows[start_of(job)] = read_verdicts(job.shared / "judged_reference")
  prompts = [row["id"] for row in rows[start_of(job)]]
  for name, found in rows.items():
    if [row["id"] for row in found] != prompts:
      raise DataError(
        f"{name} was judged on other prompts than the "
        f"{start_of(job)}; --redo, or use another --workdir"
      )
  metric, against = winrate.BASELINES[job.c.judge.baseline]
  return Told(
    metric,
    f"win rate against {against}, by {judge_kinds.name_of(job.c)}",
    prompts,
    {
      name: np.array(
        [np.nan if row["outcome"] is None else row["outcome"] for row in found],
        np.float64,
      )
      for name, found in rows.items()
    },
  )


def legible(told: Told) -> bool:
  """Whether there is a prompt of which every verdict could be read."""
  return bool(_read(*told.won.values()).any())


def _read(*won: np.ndarray) -> np.ndarray:
  """[P] whether every one of [..., P] outcomes was read."""
  return ~np.isnan(np.concatenate([np.atleast_2d(w) for w in won])).any(axis=0)


def _right(job: Job, folder: Any) -> np.ndarray:
  """[n] 1, 0.5 or 0: whether the implicit reward prefers the chosen side."""
  policy, ref = held_out.as_pairs(
    held_out.eval_set(job),
    disk.read_array(folder / "held_out_logp.npy"),
    disk.read_array(job.shared / "baseline" / "held_out_logp.npy"),
  )
  margin = np.asarray(policy, np.float64) - ref
  return winrate.wins(margin[:, 0], margin[:, 1])


def paired(told: Told, names: list[str], start: str) -> list[dict[str, Any]]:
  """One seed: the first arm against the others, then each and its start."""
  pairs = [(names[0], other) for other in names[1:]]
  if start in told.won:
    pairs += [(name, start) for name in names]
  out = []
  for a, b in pairs:
    read = _read(told.won[a], told.won[b])
    diff = intervals.paired_difference(told.won[a][read], told.won[b][read])
    words = equivalence.one_seed_sentence(a, b, diff, told.unit)
    if 0 < diff["n"] < equivalence.MIN_PROMPTS:
      words = (
        f"{a} against {b}: {100 * diff['value']:+.1f} points of "
        f"{told.unit} (95 % interval {100 * diff['low']:+.1f} to "
        f"{100 * diff['high']:+.1f}, n = {diff['n']}). No verdict: it "
        f"needs at least {equivalence.MIN_PROMPTS} prompts."
      )
    out.append(dict(a=a, b=b, metric=told.metric, difference=diff, words=words))
  return out


def grouped(arms: list[Arm]) -> dict[str, list[Arm]]:
  """Label -> the runs of an arm, one a seed."""
  out: dict[str, list[Arm]] = {}
  for arm in arms:
    out.setdefault(arm.label, []).append(arm)
  return out


def compared(
  groups: dict[str, list[Arm]], chosen: str
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
      out += [
        (a, b, f"Against {b}", a)
        for a, arm in part.items()
        if arm.budget == base.budget and a != b
      ]
  ours = [a for a, arm in part.items() if arm.sampler == chosen]
  for a in ours:
    for b, other in first.items():
      if (
        other.like in (0, part[a].budget)
        if other.is_all
        else other.budget == part[a].budget and a != b
      ):
        out.append(
          (a, b, f"{a} against others", b)
          if len(ours) == 1 or not other.is_all
          else (a, b, f"Against {b}", a)
        )
  once: dict[frozenset, tuple] = {}
  for pair in out:
    once.setdefault(frozenset(pair[:2]), pair)
  return list(once.values())


def _arms(
  told: Told, groups: dict[str, list[Arm]], start: str
) -> dict[str, ArmOutcomes]:
  """The outcomes by seed and prompt; the start is one, met by every seed."""
  out = {
    label: ArmOutcomes(
      label,
      [a.seed for a in runs],
      told.prompts,
      np.stack([told.won[a.name] for a in runs]),
    )
    for label, runs in groups.items()
  }
  if start in told.won:
    seeds = next(iter(out.values())).seeds
    out[start] = ArmOutcomes(
      start, seeds, told.prompts, np.tile(told.won[start], (len(seeds), 1))
    )
  return out


def _both(a: ArmOutcomes, b: ArmOutcomes) -> tuple[ArmOutcomes, ArmOutcomes]:
  """Two arms on the prompts that were read of both, whatever the seed."""
  read = _read(a.outcome, b.outcome)
  if read.all():
    return a, b
  cut = lambda x: x._replace(
    prompts=[p for p, kept in zip(x.prompts, read) if kept],
    outcome=x.outcome[:, read],
  )
  return cut(a), cut(b)


def verdicts(
  told: Told, groups: dict[str, list[Arm]], chosen: str, start: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Several seeds: (verdicts between arms, each arm against its start)."""
  arms = _arms(told, groups, start)

  def judged(pairs):
    found = equivalence.compare_arms(
      [_both(arms[a], arms[b]) for a, b, *_ in pairs], unit=told.unit
    )
    return [
      dict(one, a=a, b=b, title=title, label=label, metric=told.metric)
      for (a, b, title, label), one in zip(pairs, found)
    ]

  return judged(compared(groups, chosen)), judged(
    [(label, start, f"Against the {start}", label) for label in groups]
    if start in arms
    else []
  )


def _over_cells(outcome: np.ndarray) -> dict[str, Any]:
  """A mean of [S, P] shares with its interval over seeds and prompts.

  A prompt counts where it was read of every seed.

  Cells that are all alike show no spread; then the prompts alone bound it.
  """
  outcome = outcome[:, _read(outcome)]
  found = intervals.crossed_mean(outcome)
  if found["low"] is None or np.ptp(outcome) == 0:
    bounds = intervals.proportion(outcome.mean(axis=0))
    return found | dict(low=bounds["low"], high=bounds["high"])
  return found | dict(low=max(0.0, found["low"]), high=min(1.0, found["high"]))


def _over_seeds(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
  """A metric of several runs: its mean, with an interval over the seeds."""
  values = [one["value"] for one in runs]
  if len(set(values)) == 1:  # no spread to see: one run's own interval
    return {k: runs[0].get(k) for k in ("value", "low", "high", "n")}
  found = intervals.t_mean(values)
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
  pairs = [
    (a, b)
    for names in budgets.values()
    for i, a in enumerate(names)
    for b in names[i + 1 :]
  ]
  better = set()
  for (a, b), one in zip(
    pairs,
    equivalence.compare_arms(
      [_both(arms[a], arms[b]) for a, b in pairs], unit=told.unit
    ),
  ):
    if (
      one["p_differ"] is not None
      and one["verdict"] != "withheld"
      and (one["p_differ"] < one["level"])
    ):
      better.add((a, b) if one["difference"]["value"] > 0 else (b, a))
  out = []
  for budget, names in budgets.items():
    cells = {n: _over_cells(arms[n].outcome) for n in names}
    order = sorted(names, key=lambda n: -cells[n]["value"])
    out.append(
      dict(
        budget=budget,
        rows=[
          dict(
            cells[n],
            name=n,
            rank=i + 1,
            **{
              "from": 1 + sum((m, n) in better for m in names),
              "to": len(names) - sum((n, m) in better for m in names),
            },
          )
          for i, n in enumerate(order)
        ],
      )
    )
  return out


def curve_arms(job: Job, arms: list[Arm]) -> list[tuple[int, Arm]]:
  """(rows, arm) of the chosen sampler and everything, where a curve is due."""
  n = len(job.column("pool", "id"))
  found = [
    (budget_rows(a.budget, n), a)
    for a in arms
    if not a.like and (a.is_all or a.sampler == job.c.select.sampler)
  ]
  return found if len({m for m, _ in found}) >= plateau.LEAST else []


def curve(
  job: Job, told: Told, arms: list[Arm], start: str
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
  y = [100 * float(np.nanmean(told.won[a.name])) for _, a in points]
  if start in told.won:
    x, y = [0.0, *x], [100 * float(np.nanmean(told.won[start])), *y]
  found = plateau.fit(x, y)
  found["words"] += _held_back(job, points)
  return found | dict(
    sampler=job.c.select.sampler,
    metric=told.metric,
    rows=[m for m, _ in points],
    arms=[a.name for _, a in points],
    epochs=job.c.train.epochs,
    max_updates=job.c.train.max_updates,
    min_updates=job.c.train.min_updates,
  )


def _held_back(job: Job, points: list[tuple[int, Arm]]) -> list[str]:
  """Whether a bound on updates makes large parts alike, in words."""
  c, n = job.c.train, len(job.column("pool", "id"))
  held = [
    m
    for m, _ in points
    if c.max_updates
    and c.max_updates
    < (batches.updates(m, c.batch_size, c.epochs, 0, c.min_updates))
  ]
  if not held:
    return []
  return [
    f"Parts of {100 * min(held) / n:.3g} % and more were trained for "
    f"train.max_updates={c.max_updates} updates, fewer than their epochs "
    "take: a plateau there is of updates as much as of data; set "
    "config.train.max_updates=0."
  ]


def summed_up(
  told: Told,
  groups: dict[str, list[Arm]],
  described: dict[str, dict],
  spent: dict[str, dict],
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
    out.append(
      {
        k: seen[0][k]
        for k in ("sampler", "budget", "rows", "updates", "is_all", "like")
      }
      | dict(
        name=label,
        seeds=[a.seed for a in runs],
        metrics=metrics,
        flops=float(np.mean([spent[a.name]["total"] for a in runs])),
      )
    )
  return out


def efficiency(
  groups: list[dict], against_start: list[dict]
) -> list[dict[str, Any]]:
  """What each arm gained over its start, for the flops it took alone."""
  gains = {one["a"]: one["difference"] for one in against_start}
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
  job: Job, arms: list[Arm], described: list[dict], spent: dict[str, dict]
) -> dict[str, Any]:
  """Everything the summary says of how well the arms do.

  Args:
    job: the run.
    arms: its arms, the chosen sampler first.
    described: what the report shows of each.
    spent: flops of each arm on its own, by its name.

  Returns:
    "comparisons", "verdicts" and "warnings"; of several seeds also "groups",
    "ranking" and "efficiency"; "fit" where a curve is due, "along" where one
    through checkpoints is.
  """
  start, groups = start_of(job), grouped(arms)
  told = outcomes(job, arms)
  out: dict[str, Any] = {}
  fit = curve(job, told, arms, start)
  if fit:
    out["fit"] = fit
  # Checkpoints are told by the true reward, whoever else judges.
  cheap = along.curve(
    job,
    arms,
    told.won.get(start) if judge_kinds.kind_of(job.c) == "world" else None,
  )
  if cheap:
    out["along"] = cheap
  grown = [w for one in (fit, cheap) if one for w in one["words"]]
  if job.c.seeds == 1:
    found = paired(told, [a.name for a in arms], start)
    words = [x["words"] for x in found[: len(arms) - 1]]
    return out | dict(comparisons=found, warnings=[], verdicts=grown + words)
  between, begun = verdicts(told, groups, job.c.select.sampler, start)
  out["groups"] = summed_up(
    told, groups, {d["name"]: d for d in described}, spent
  )
  out["ranking"] = ranking(told, groups)
  out["efficiency"] = efficiency(out["groups"], begun)
  warnings = [
    "Seeds differ in the selection, the order of batches and the "
    f"sampling; the pool, the {start} and the mixture are one for "
    "all, so intervals leave out what others would change"
  ]
  few = [
    g for g in out["groups"] if g["updates"] < MIN_UPDATES and not g["is_all"]
  ]
  if few and not fit:  # a curve begins at few by design
    warnings.append(
      f"{few[0]['name']} was trained for {few[0]['updates']} "
      f"updates, fewer than the {MIN_UPDATES} of a fair test; "
      "raise config.train.min_updates"
    )
  words = [one["words"] for one in between]
  return out | dict(
    comparisons=between + begun, warnings=warnings, verdicts=grown + words
  )
