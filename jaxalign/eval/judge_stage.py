"""Which of two answers is better: the judge of a job, by arm.

The built-in world's true reward is measured with the policy (`evaluate`). A
reward model or a model behind an endpoint has two stages of its own:
`judged_reference`, shared by all arms (with its controls, and its verdicts on
labelled pairs), and `judge` of every arm. Where one ran, its win rates take the
place of the evaluation's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from jaxalign.core import disk
from jaxalign.core.errors import DataError
from jaxalign.core.settings import pick
from jaxalign.core.stage import Made
from jaxalign.data import world as world_lib
from jaxalign.embed.over_pool import checkpoint_digest
from jaxalign.eval import held_out, judging, winrate
from jaxalign.eval.judge_kinds import (
  CONTROLS,
  JUDGES,
  kind_of,
  name_of,
  of_scores,
  REFERENCE,
)
from jaxalign.eval.policies import read_samples
from jaxalign.model.job import Arm, arm_folder, Job

_VERDICT = ("judge.kind", "judge.baseline", "judge.prompts")
_OF_JUDGE = ("bias", "consistent", "unparsable")


class Shown(NamedTuple):
  """The prompts that are judged, and what answers are compared with."""

  rows: list[dict[str, Any]]  # n records of the held-out split
  reference: list[str]  # n answers of the reference
  theirs: list[str]  # n answers of the baseline
  groups: np.ndarray | None  # [n] topics or sources


def _shown(job: Job) -> Shown:
  """The first judge.prompts of the prompts generated from, in id order."""
  c, what = job.c, held_out.eval_set(job)
  n = min(len(what.prompt_rows), c.judge.prompts or len(what.prompt_rows))
  rows = [what.rows[i] for i in what.prompt_rows[:n]]
  side = c.judge.baseline
  if side == "chosen" and "chosen" not in rows[0]:
    raise DataError(
      "the held-out rows are single answers, of which none is "
      "chosen; set config.judge.baseline to target or reference"
    )
  reference = _answers(job.shared / "baseline", rows)
  theirs = [row.get(side) for row in rows]
  if what.world is not None:
    groups = [world_lib.topic(what.world, row["prompt"]) for row in rows]
  else:
    groups = [str(row.get("source", "")) for row in rows]
  return Shown(
    rows,
    reference,
    reference if side == "reference" else theirs,
    np.array(groups) if len(set(groups)) > 1 else None,
  )


def _answers(folder: Any, rows: Sequence[dict]) -> list[str]:
  """A policy's answers to the prompts of these rows.

  Raises:
    DataError: it answered others.
  """
  samples = read_samples(folder)[: len(rows)]
  if [s["id"] for s in samples] != [row["id"] for row in rows]:
    raise DataError(
      f"{folder}/samples.jsonl answers other prompts than the "
      f"{len(rows)} that are judged; evaluate all arms on one "
      "held-out set, or use another --workdir"
    )
  return [s["answer"] for s in samples]


# The stages.


def judge_fields(job: Job, arm: Arm | None) -> dict[str, Any]:
  """The config fields that verdicts depend on."""
  judge = JUDGES[kind_of(job.c)]
  fields = pick(job.c, *_VERDICT, *judge.knobs)
  if judge.model:
    fields["checkpoint"] = checkpoint_digest(job.c.judge[judge.model])
  return fields


def judged_reference_fields(job: Job, arm: None) -> dict[str, Any]:
  return judge_fields(job, arm) | pick(job.c, "judge.labels")


def _verdict_line(
  row: dict, ours: str, theirs: str, result: dict, k: int
) -> dict[str, Any]:
  """One line of verdicts.jsonl."""
  outcome = float(result["outcomes"][k])
  return dict(
    id=row["id"],
    prompt=row["prompt"],
    ours=ours,
    theirs=theirs,
    outcome=None if np.isnan(outcome) else outcome,
    verdicts=list(result["verdicts"][k]),
    replies=list(result["replies"][k]) if "replies" in result else [],
  )


def _write(
  job: Job,
  folder: epath.Path,
  what: Shown,
  ours: list[str],
  result: dict,
  **more: Any,
) -> list[str]:
  """verdicts.jsonl and judge.json of one policy; `more` goes into the latter,
  its "metrics" to those of the win rate."""
  strip = lambda answers: [answer.strip() for answer in answers]
  metrics, details = winrate.win_metrics(
    job.c.judge.baseline,
    result["outcomes"],
    strip(ours),
    strip(what.theirs),
    what.groups,
  )
  of_judge = {k: result[k] for k in _OF_JUDGE}
  judged = dict(
    more,
    metrics=metrics | more.get("metrics", {}),
    details=details,
    prompts=len(ours),
    read=int((~np.isnan(result["outcomes"])).sum()),
    **of_judge,
    doubts=judging.doubts(name_of(job.c), of_judge),
  )
  lines = [
    _verdict_line(*texts, result, k)
    for k, texts in enumerate(zip(what.rows, ours, what.theirs))
  ]
  disk.write_lines(folder / "verdicts.jsonl", lines)
  disk.write_json(folder / "judge.json", judged)
  return ["verdicts.jsonl", "judge.json"]


def make_judged_reference(job: Job, arm: None, folder: Any) -> Made:
  """The reference against the baseline; the controls; labelled pairs."""
  c, name, first = job.c, name_of(job.c), jax.process_index() == 0
  judge = JUDGES[kind_of(c)](job, folder)
  if not (judge.on_mesh or first):
    return [], judge.cost()[0], {}
  what = _shown(job)
  if c.judge.baseline == "reference":  # against itself it ties
    result = of_scores(*np.zeros((2, len(what.rows))))
  else:
    result = judge(what.rows, what.reference, what.theirs)
  few = what.rows[:CONTROLS]
  targets = [row["target"] for row in few]
  compare = lambda answers: judge(few, answers, targets)
  controls = judging.controls(name, compare, targets)
  pairs = [row for row in held_out.eval_set(job).rows if "chosen" in row]
  pairs = pairs[: c.judge.labels]
  sides = ([row[side] for row in pairs] for side in ("chosen", "rejected"))
  verdicts = judge(pairs, *sides)["verdicts"]
  if not first:
    return [], judge.cost()[0], {}
  agreement = None
  if pairs:
    truth, ids = _truth(job, pairs), [row["id"] for row in pairs]
    agreement = judging.against_labels(name, verdicts, truth, ids)
  more = dict(controls=controls, agreement=agreement)
  files = _write(job, folder, what, what.reference, result, **more)
  files += [*judge.keep(), *judge.files]
  passed = all(controls[k]["passed"] for k in judging.CONTROLS)
  say = "" if passed else "a control failed: do not believe this judge"
  cost, facts = judge.cost()
  return files, cost, facts | dict(say=say)


def _truth(job: Job, pairs: list[dict]) -> list[str] | None:
  """Which of chosen and rejected the world's true reward prefers."""
  world = held_out.eval_set(job).world
  if world is None:
    return None
  chosen, rejected = (
    [world_lib.reward(world, row["prompt"], row[side]) for row in pairs]
    for side in ("chosen", "rejected")
  )
  words = {1.0: "first", 0.5: "tie", 0.0: "second"}
  return [words[x] for x in winrate.wins(chosen, rejected).tolist()]


def make_judged_policy(job: Job, arm: Arm, folder: Any) -> Made:
  """An arm's answers against the baseline's."""
  baseline, first = job.c.judge.baseline, jax.process_index() == 0
  judge, more = JUDGES[kind_of(job.c)](job, folder), {}
  if not (judge.on_mesh or first):
    return [], judge.cost()[0], {}
  what = _shown(job)
  ours = _answers(folder, what.rows)
  result = judge(what.rows, ours, what.theirs)
  # A reward once given compares with any other: the reference costs nothing.
  if judge.on_mesh and baseline != "reference":
    more["win_vs_sft"] = judge(what.rows, ours, what.reference)["rate"]
  if not first:
    return [], judge.cost()[0], {}
  files = _write(job, folder, what, ours, result, metrics=more)
  value, against = result["rate"]["value"], winrate.BASELINES[baseline][1]
  say = "no verdict could be read"
  if value is not None:
    say = f"wins {100 * value:.1f} % against {against}"
  cost, facts = judge.cost()
  return [*files, *judge.files], cost, facts | dict(say=say)


# What pages and comparisons read.


def read_verdicts(folder: Any) -> list[dict[str, Any]]:
  """One dict a judged prompt: id, prompt, ours, theirs, outcome,
  verdicts, replies."""
  return disk.read_lines(epath.Path(folder) / "verdicts.jsonl")


def read_metrics(c: Any, folder: Any, judged: Any) -> dict[str, Any]:
  """The metrics of eval.json, the win rates as the job's judge has them.

  Args:
    c: the config.
    folder: that holds eval.json.
    judged: that holds judge.json, where a judge has a stage.

  Returns:
    As `held_out.policy_metrics`. Where a judge has a stage in the built-in
    world, the true win rate is there too, as "win_vs_target_true".
  """
  metrics, kind = disk.read_json(epath.Path(folder) / "eval.json"), kind_of(c)
  if kind == "world":
    return metrics
  true = metrics.get("win_vs_target")
  of_judge = lambda name: name == "details" or name.startswith("win_vs")
  metrics = {k: v for k, v in metrics.items() if not of_judge(k)}
  if kind == "none":
    return metrics
  one = disk.read_json(epath.Path(judged) / "judge.json")
  more = {} if true is None else dict(win_vs_target_true=true)
  return one["metrics"] | more | metrics | dict(details=one["details"])


def describe_judge(job: Job, arms: list[Arm]) -> dict[str, Any]:
  """The judge's part of the report, from the artifacts alone."""
  c, kind, name = job.c, kind_of(job.c), name_of(job.c)
  metric, against = winrate.BASELINES[c.judge.baseline]
  out = dict(kind=kind, name=name, metric=metric, against=against)
  if kind not in JUDGES:
    return out
  judged = {a.name: arm_folder(job, a) for a in arms}
  reference = disk.read_json(job.shared / REFERENCE / "judge.json")
  judged = {n: disk.read_json(x / "judge.json") for n, x in judged.items()}
  if c.judge.baseline != "reference":
    judged["reference"] = reference
  costs = [
    record.result
    for (_, stage), record in job.records.items()
    if stage in ("judge", REFERENCE) and "requests" in record.result
  ]
  most = lambda what: max(cost[what] for cost in costs)
  doubts = (f"{n}: {d}" for n, one in judged.items() for d in one["doubts"])
  return out | dict(
    arms=[_arm_line(n, one, metric) for n, one in judged.items()],
    controls={name: reference["controls"]},
    agreement=reference["agreement"],
    cost={k: most(k) for k in ("requests", "tokens")} if costs else None,
    doubts=list(dict.fromkeys(doubts)),
  )


def _arm_line(name: str, one: dict[str, Any], metric: str) -> dict[str, Any]:
  keys = ("prompts", "read", *_OF_JUDGE, "doubts")
  details = {k: one["details"][k] for k in ("outcomes", "equal_length")}
  rate = one["metrics"][metric]
  return dict(name=name, rate=rate) | details | {k: one[k] for k in keys}


def judge_warnings(judge: dict[str, Any]) -> list[str]:
  """What a reader of the job's win rates has to know of its judge.

  Args:
    judge: as from `describe_judge`.
  """
  name = judge["name"]
  if judge["kind"] == "none":
    return [
      "No win rate: the job has no judge, so arms are compared by "
      "held-out accuracy, which can rise while generation gets worse; "
      "set config.judge.kind"
    ]
  if judge["kind"] not in JUDGES:
    return []
  out = [
    words
    for control in judge["controls"].values()
    for words, k in zip(control["words"], judging.CONTROLS)
    if control[k]["passed"] is not True
  ]
  if not all(line["read"] for line in judge["arms"]):
    out.append(
      f"No win rate of every arm: {name} gave verdicts that could "
      "not be read, and none is guessed"
    )
  out += judge["doubts"][:3]
  if len(judge["doubts"]) > 3:
    out.append(
      f"{len(judge['doubts']) - 3} more doubts about {name} are in the section "
      "on the judge"
    )
  return out
