"""Who says which of two answers is better: the judge of a job, by arm.

The built-in world's true reward is measured with the policy (`evaluate`). A
reward model or a model behind an endpoint has a stage of its own: `judge` of
the start, shared by all arms (with its controls and its word on labelled
pairs), and `judge` of every arm. Where one ran, its win rates stand in place
of the evaluation's.
"""

from collections.abc import Sequence
import json
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


# What is compared.


class Shown(NamedTuple):
  """The prompts that are judged, and what answers are compared with."""

  rows: list[dict[str, Any]]  # n records of the held-out split
  start: list[str]  # n answers of the reference
  theirs: list[str]  # n answers of the baseline
  groups: np.ndarray | None  # [n] topics or sources


def shown(job: Job) -> Shown:
  """The first judge.prompts of the prompts asked, in id order."""
  c, what = job.c, held_out.eval_set(job)
  n = min(len(what.prompt_rows), c.judge.prompts or len(what.prompt_rows))
  rows = [what.rows[i] for i in what.prompt_rows[:n]]
  start = answers(job.shared / "baseline", rows)
  side = c.judge.baseline
  if side == "chosen" and "chosen" not in rows[0]:
    raise DataError(
      "the held-out rows are single answers, of which none is "
      "chosen; set config.judge.baseline to target or reference"
    )
  if what.world is not None:
    groups = [world_lib.topic(what.world, row["prompt"]) for row in rows]
  else:
    groups = [str(row.get("source", "")) for row in rows]
  return Shown(
    rows,
    start,
    start if side == "reference" else [row[side] for row in rows],
    np.array(groups) if len(set(groups)) > 1 else None,
  )


def answers(folder: Any, rows: Sequence[dict]) -> list[str]:
  """What a policy said to the prompts of these rows.

  Raises:
    DataError: it was asked others.
  """
  said = read_samples(folder)[: len(rows)]
  if [s["id"] for s in said] != [row["id"] for row in rows]:
    raise DataError(
      f"{folder}/samples.jsonl answers other prompts than the "
      f"{len(rows)} that are judged; evaluate all arms on one "
      "held-out set, or use another --workdir"
    )
  return [s["said"] for s in said]


def labelled(job: Job) -> list[dict[str, Any]]:
  """The held-out pairs that are judged beside their labels."""
  return [row for row in held_out.eval_set(job).rows if "chosen" in row][
    : job.c.judge.labels
  ]


# The stages.


def judge_fields(job: Job, arm: Arm | None) -> dict[str, Any]:
  """What of the config verdicts depend on."""
  judge = JUDGES[kind_of(job.c)]
  found = pick(job.c, *_VERDICT, *judge.knobs)
  if judge.model:
    found["checkpoint"] = checkpoint_digest(job.c.judge[judge.model])
  return found


def judged_reference_fields(job: Job, arm: None) -> dict[str, Any]:
  return judge_fields(job, arm) | pick(job.c, "judge.labels")


def _row(row: dict, ours: str, theirs: str, found: dict, k: int) -> dict:
  """One line of verdicts.jsonl."""
  outcome = float(found["outcomes"][k])
  return dict(
    id=row["id"],
    prompt=row["prompt"],
    ours=ours,
    theirs=theirs,
    outcome=None if np.isnan(outcome) else outcome,
    verdicts=list(found["verdicts"][k]),
    replies=list(found["replies"][k]) if "replies" in found else [],
  )


def _write(
  folder: epath.Path,
  what: Shown,
  ours: list[str],
  found: dict,
  judged: dict[str, Any],
  name: str,
  baseline: str,
) -> list[str]:
  """verdicts.jsonl and judge.json of one policy."""
  metrics, details = winrate.win_metrics(
    baseline,
    found["outcomes"],
    [a.strip() for a in ours],
    [a.strip() for a in what.theirs],
    what.groups,
  )
  judged |= dict(
    metrics=metrics | judged.pop("beside", {}),
    details=details,
    prompts=len(ours),
    read=int((~np.isnan(found["outcomes"])).sum()),
    **{k: found[k] for k in ("bias", "consistent", "unparsable")},
  )
  judged["doubts"] = judging.doubts(name, judged)
  lines = [
    _row(row, a, b, found, k)
    for k, (row, a, b) in enumerate(zip(what.rows, ours, what.theirs))
  ]
  disk.write_bytes(
    folder / "verdicts.jsonl",
    "".join(json.dumps(x) + "\n" for x in lines).encode(),
  )
  disk.write_json(folder / "judge.json", judged)
  return ["verdicts.jsonl", "judge.json"]


def make_judged_reference(job: Job, arm: None, folder: Any) -> Made:
  """The reference against the baseline; the controls; labelled pairs."""
  c, kind = job.c, kind_of(job.c)
  judge, files = JUDGES[kind](job, folder), []
  if JUDGES[kind].on_mesh or jax.process_index() == 0:
    what, pairs = shown(job), labelled(job)
    # Against itself the reference ties: nobody has to be asked.
    found = (
      None
      if c.judge.baseline == "reference"
      else judge(what.rows, what.start, what.theirs)
    )
    k = CONTROLS
    held = (
      judging.controls(
        name_of(c),
        judge.pairs,
        [row["prompt"] for row in what.rows[:k]],
        [row["target"] for row in what.rows[:k]],
      )
      if k
      else None
    )
    said = judge(
      pairs, *([row[side] for row in pairs] for side in ("chosen", "rejected"))
    )["verdicts"]
    if jax.process_index() == 0:
      if found is None:
        n = len(what.rows)
        found = of_scores(np.zeros(n), np.zeros(n)) | dict(replies=[()] * n)
      agree = (
        judging.against_labels(
          name_of(c), said, _truth(job, pairs), [row["id"] for row in pairs]
        )
        if pairs
        else None
      )
      files = _write(
        folder,
        what,
        what.start,
        found,
        dict(controls=held, agreement=agree),
        name_of(c),
        c.judge.baseline,
      )
      files += judge.keep()
      cost, told = judge.cost()
      held_up = held is None or all(
        held[k]["passed"] for k in ("null", "injected")
      )
      say = "" if held_up else "a control failed: do not believe this judge"
      return [*files, *judge.files], cost, dict(told, say=say)
  return [], judge.cost()[0], {}


def _truth(job: Job, pairs: list[dict]) -> list[str] | None:
  """Which of chosen and rejected the world's true reward prefers."""
  world = held_out.eval_set(job).world
  if world is None:
    return None
  gap = [
    world_lib.reward(world, row["prompt"], row["chosen"])
    - world_lib.reward(world, row["prompt"], row["rejected"])
    for row in pairs
  ]
  return ["first" if g > 0 else "second" if g < 0 else "tie" for g in gap]


def make_judged_policy(job: Job, arm: Arm, folder: Any) -> Made:
  """An arm's answers against the baseline's."""
  c, kind = job.c, kind_of(job.c)
  judge = JUDGES[kind](job, folder)
  if JUDGES[kind].on_mesh or jax.process_index() == 0:
    what = shown(job)
    ours = answers(folder, what.rows)
    found = judge(what.rows, ours, what.theirs)
    # A reward once given compares with any other: the start costs nothing.
    beside = (
      {"win_vs_sft": judge(what.rows, ours, what.start)["rate"]}
      if (JUDGES[kind].on_mesh and c.judge.baseline != "reference")
      else {}
    )
    if jax.process_index() == 0:
      files = _write(
        folder,
        what,
        ours,
        found,
        dict(beside=beside),
        name_of(c),
        c.judge.baseline,
      )
      rate, (cost, told) = found["rate"], judge.cost()
      say = (
        "no verdict could be read"
        if rate["value"] is None
        else (
          f"wins {100 * rate['value']:.1f} % against "
          f"{winrate.BASELINES[c.judge.baseline][1]}"
        )
      )
      return [*files, *judge.files], cost, dict(told, say=say)
  return [], judge.cost()[0], {}


# What pages and comparisons read.


def read_verdicts(folder: Any) -> list[dict[str, Any]]:
  """One dict a judged prompt: id, prompt, ours, theirs, outcome,
  verdicts, replies."""
  text = (epath.Path(folder) / "verdicts.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def metrics_in(c: Any, folder: Any, judged: Any) -> dict[str, Any]:
  """The metrics of eval.json, the win rates as the job's judge has them.

  Args:
    c: the config.
    folder: that holds eval.json.
    judged: that holds judge.json, where a judge was asked.

  Returns:
    As `evaluate.measure`. Where a judge was asked of a world, the true win
    rate stands beside its own as "win_vs_target_true".
  """
  found = disk.read_json(epath.Path(folder) / "eval.json")
  kind = kind_of(c)
  if kind == "world":
    return found
  true = found.get("win_vs_target")
  out = {
    k: v
    for k, v in found.items()
    if k != "details" and not k.startswith("win_vs")
  }
  if kind == "none":
    return out
  one = disk.read_json(epath.Path(judged) / "judge.json")
  more = {} if true is None else dict(win_vs_target_true=true)
  return one["metrics"] | more | out | dict(details=one["details"])


def described(job: Job, arms: list[Arm]) -> dict[str, Any]:
  """What the report says of the judge, from the artifacts alone."""
  c, kind = job.c, kind_of(job.c)
  metric, against = winrate.BASELINES[c.judge.baseline]
  out = dict(kind=kind, name=name_of(c), metric=metric, against=against)
  if kind not in JUDGES:
    return out
  read = lambda folder: disk.read_json(folder / "judge.json")
  start = read(job.shared / REFERENCE)
  lines = [
    dict(name=a.name, **_line(read(arm_folder(job, a)), metric)) for a in arms
  ]
  if c.judge.baseline != "reference":
    lines.append(dict(name="start", **_line(start, metric)))
  totals = [
    record.result
    for (_, stage), record in job.records.items()
    if stage in ("judge", REFERENCE) and "requests" in record.result
  ]
  return out | dict(
    arms=lines,
    controls=start["controls"] and {name_of(c): start["controls"]},
    agreement=start["agreement"],
    cost=dict(
      requests=max(t["requests"] for t in totals),
      tokens=max(t["tokens"] for t in totals),
    )
    if totals
    else None,
    doubts=list(
      dict.fromkeys(
        f"{line['name']}: {d}" for line in lines for d in line["doubts"]
      )
    ),
  )


def _line(one: dict[str, Any], metric: str) -> dict[str, Any]:
  return dict(
    rate=one["metrics"][metric],
    outcomes=one["details"]["outcomes"],
    equal_length=one["details"]["equal_length"],
    **{
      k: one[k]
      for k in ("prompts", "read", "bias", "consistent", "unparsable", "doubts")
    },
  )


def warnings(found: dict[str, Any]) -> list[str]:
  """What a reader of the job's win rates has to know of its judge.

  Args:
    found: as from `described`.
  """
  name = found["name"]
  if found["kind"] == "none":
    return [
      "No win rate: no judge was asked, so arms are compared by "
      "held-out accuracy, which can rise while generation gets worse; "
      "set config.judge.kind"
    ]
  if found["kind"] not in JUDGES:
    return []
  out = []
  for control in (found["controls"] or {}).values():
    out += [
      words
      for words, k in zip(control["words"], ("null", "injected"))
      if control[k]["passed"] is not True
    ]
  read = [line["read"] for line in found["arms"]]
  if not all(read):
    out.append(
      f"No win rate of every arm: {name} gave verdicts that could "
      "not be read, and none is guessed"
    )
  return (
    out
    + found["doubts"][:3]
    + [
      f"{len(found['doubts']) - 3} more doubts about {name} are in the section "
      "on the judge"
    ]
    * (len(found["doubts"]) > 3)
  )
