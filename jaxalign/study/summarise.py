"""Everything a study's pages show, from the artifacts alone."""

import datetime
from typing import Any

import jax
import numpy as np

import jaxalign
from jaxalign.core.disk import read_json, read_lines
from jaxalign.data.summary import summary_lines
from jaxalign.data.tables import read_table
from jaxalign.data.world import reward
from jaxalign.eval import judge_stage
from jaxalign.eval.held_out import eval_set
from jaxalign.eval.judge_kinds import JUDGES, kind_of
from jaxalign.eval.policies import read_samples
from jaxalign.model.job import Arm, arm_folder, Job, WHOLE
from jaxalign.study.ledger import ledger_of, saved_by
from jaxalign.study.outcomes import baseline_name
from jaxalign.study.stats import weigh

CURVES = (
  "train/loss",
  "train/preference_loss",
  "rewards/margins",
  "rewards/accuracies",
  "logps/chosen",
  "train/grad_norm",
)


def summarise(job: Job, arms: list[Arm], command: str) -> dict[str, Any]:
  """The summary of a study, as in `summary.json`."""
  c = job.c
  data = read_json(job.shared / "data" / "data_summary.json")
  ledger = ledger_of(job, arms)
  described = [describe_arm(job, arm) for arm in arms]
  for one in described:  # of an arm's own page
    one.pop("details")
  out = weigh(job, arms, described, ledger["arms"])
  judge = judge_stage.describe_judge(job, arms)
  notes, warnings = _notes(job, arms)
  out["verdicts"] += notes + _saving(ledger["saved"])
  out["warnings"] += [
    *(job.records["", "mixture"].result["warnings"] if _mixture(job) else ()),
    *_truncation(job, data),
    *judge_stage.judge_warnings(judge),
    *warnings,
    *_malformed(job, described),
  ]
  unit = "pairs" if job.kind == "pairs" else "answers"
  pool = f"{data['rows_by_split']['pool']:,} {unit}"
  title, question = title_and_question(c, described, pool)
  files = {
    "summary": "summary.json",
    "config": "config.json",
    "data summary": "shared/data/data_summary.json",
  }
  t, now = c.train, datetime.datetime.now(datetime.UTC)
  recipe = {n: t[n] for n in ("epochs", "max_updates", "batch_size", "lr")}
  return out | dict(
    title=title,
    question=question,
    judge=judge,
    command=command,
    version=jaxalign.__version__,
    created=now.strftime("%Y-%m-%d %H:%M UTC"),
    machine=dict(
      platform=jax.default_backend(),
      devices=job.mesh.size,
      mesh=dict(job.mesh.shape),
      jax=jax.__version__,
    ),
    recipe=recipe | dict(loss=c.loss.name, kwargs=c.loss.kwargs.to_dict()),
    data=_data(job, data),
    arms=described,
    baseline=_baseline(job),
    ledger=ledger,
    samples=_samples(job, [a for a in arms if a.seed == c.seed]),
    files=files | {a.name: f"runs/{a.name}/" for a in arms},
  )


def _mixture(job: Job) -> bool:
  return ("", "mixture") in job.records


def _truncation(job: Job, data: dict[str, Any]) -> list[str]:
  """Whether many rows do not fit the context, in words."""
  cut = data["truncation"]["pool"]
  lost = cut["rows_cut"] / cut["rows"] + cut["too_long"] / data["seen"]
  if lost <= 0.2:
    return []
  return [
    f"{100 * lost:.0f} % of the pool's rows were cut or left "
    f"out at {job.model.context} tokens; a context of "
    f"{cut['fits']:,} keeps 99 %: raise config.model.context"
  ]


def _notes(job: Job, arms: list[Arm]) -> tuple[list[str], list[str]]:
  """What samplers remark on their selections, and what they warn of."""
  lists: tuple[list, list] = [], []
  for arm in arms:
    report = read_json(arm_folder(job, arm) / "selection.json")
    for note in report["diagnostics"].get("notes", ()):
      words = note.removeprefix("warning: ")
      lists[words != note].append(f"{arm.name}: {words}.")
  return lists


def _malformed(job: Job, described: list[dict]) -> list[str]:
  """The arms whose answers alignment made malformed, in words."""
  rate = lambda metrics: metrics["malformed"]["value"]
  before = rate(read_json(job.shared / "baseline" / "eval.json"))
  return [
    f"{one['name']}: {100 * rate(one['metrics']):.0f} % of its answers are "
    f"malformed, {100 * before:.0f} % before alignment"
    for one in described
    if rate(one["metrics"]) > before + 0.1
  ]


def _saving(saved: list[dict[str, Any]]) -> list[str]:
  """What the first arm saves; a loss is shown by the pages themselves."""
  return [
    f"With the selection counted, {one['arm']} saves "
    f"{100 * one['without_sft']:.0f} % of the flops of aligning "
    "on everything with the same recipe."
    for one in saved[:1]
    if one["without_sft"] >= 0
  ]


def describe_arm(job: Job, arm: Arm) -> dict[str, Any]:
  """What the report shows of one arm."""
  folder = arm_folder(job, arm)
  align = job.records[arm.name, "align"]
  metrics = judge_stage.read_metrics(job.c, folder, folder)
  return dict(
    details=metrics.pop("details", None),
    name=arm.name,
    **arm._asdict(),
    rows=align.result["rows"],
    updates=align.result["updates"],
    is_all=arm.is_all,
    saved=saved_by(job, arm),
    metrics=metrics,
    curves=_curves(folder),
    selection=_selection(job, arm),
  )


def _curves(folder: Any) -> dict[str, list]:
  lines = read_lines(folder / "metrics.jsonl")
  keep = lines[:: max(1, len(lines) // 200)]
  return {
    name: [[x["step"], x[name]] for x in keep if name in x]
    for name in CURVES
    if any(name in x for x in lines)
  }


def _selection(job: Job, arm: Arm) -> dict[str, Any]:
  """The selection report in the words of the page."""
  folder = arm_folder(job, arm)
  report = read_json(folder / "selection.json")
  scores = read_table(folder / "scores.parquet")
  value = np.array([s["score"] for s in scores])
  kept = np.array([s["selected"] for s in scores])
  edges = np.histogram_bin_edges(value, 30)
  count = lambda mask: np.histogram(value[mask], edges)[0].tolist()
  quantiles = lambda five: five and [five[0], five[2], five[4]]
  length = report["length"]
  out: dict[str, Any] = dict(
    score_histogram=dict(
      edges=edges.tolist(), selected=count(kept), rest=count(~kept)
    ),
    length=dict(
      selected=quantiles(length["chosen"]), rest=quantiles(length["rest"])
    ),
  )
  if "topic" in report:
    topic = report["topic"]
    out["topics"] = dict(selected=topic["covered"], pool=topic["topics"])
  diagnostics = report.get("diagnostics", {})
  if "stability" in diagnostics:
    out["stability"] = diagnostics["stability"]
  if "mixture" in report:
    m, halves = report["mixture"], diagnostics["held_out"]
    out["mixture"] = dict(
      components=m["components"],
      covariance=job.c.select.mixture.covariance,
      pca=m["directions"],
      in_fit=halves["mean_fitted"],
      held_out=halves["mean_held_out"],
      auc=halves["auc"],
      label_accuracy=diagnostics["labels"]["accuracy"],
      nmi=diagnostics["labels"]["nmi"],
      warnings=m["warnings"],
    )
  rows, order = job.rows("pool"), np.argsort(-value, kind="stable")
  show = lambda picks: [
    _without(rows[i], "group", "label") | dict(score=float(value[i]))
    for i in picks
  ]
  return out | dict(
    page="selection.html",
    examples_top=show(order[:3]),
    examples_bottom=show(order[-3:]),
  )


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
  return {k: v for k, v in row.items() if k not in names}


def _samples(job: Job, arms: list[Arm]) -> list[dict]:
  """A few prompts with every policy's answer."""
  samples = {a.name: read_samples(arm_folder(job, a)) for a in arms}
  verdicts = {}
  if kind_of(job.c) in JUDGES:
    folders = {a.name: arm_folder(job, a) for a in arms}
    folders = {"sft": job.shared / "judged_reference"} | folders
    verdicts = {n: judge_stage.read_verdicts(f) for n, f in folders.items()}
  world, out = eval_set(job).world, []
  shown = ("outcome", "verdicts", "replies", "theirs")
  for k, sft in enumerate(read_samples(job.shared / "baseline")[:6]):
    prompt, target = sft["prompt"], sft["target"]
    rewards = {n: s[k]["reward"] for n, s in samples.items()}
    rewards = dict(sft=sft["reward"]) | rewards
    if world is not None:
      rewards["target"] = reward(world, prompt, target)
    out.append(
      dict(
        prompt=prompt,
        target=target,
        sft=sft["answer"],
        arms={n: s[k]["answer"] for n, s in samples.items()},
        against=job.c.judge.baseline,
        verdicts={
          n: {x: rows[k][x] for x in shown}
          for n, rows in verdicts.items()
          if k < len(rows)
        },
        rewards={n: r for n, r in rewards.items() if r is not None},
      )
    )
  return out


def title_and_question(
  c: Any, described: list[dict], pool: str
) -> tuple[str, str]:
  """The report's title and what it answers; `pool` is "8,000 pairs"."""
  name, loss = c.select.sampler, c.loss.name
  seeds = f", {c.seeds} seeds" if c.seeds > 1 else ""
  samplers = [n for n in (name, *c.compare) if n not in WHOLE]
  if len(set(samplers) - {"random", "length_matched"}) > 1:
    rows = sorted({d["rows"] for d in described if not d["is_all"]})
    at = " and ".join(f"{m:,}" for m in rows)
    return (
      f"{len(samplers)} samplers at {at} of {pool}, {loss}{seeds}",
      f"Which of {', '.join(samplers)} picks the {at} of {pool} that align "
      f"a policy with {loss} best?",
    )
  if len(c.budgets) > 1:
    own = [d for d in described if d["sampler"] == name or d["is_all"]]
    rows = sorted({d["rows"] for d in own})
    return (
      f"{name} at {len(rows)} budgets of {pool}, {loss}{seeds}",
      f"How does a policy aligned with {loss} improve from "
      f"{rows[0]:,} to {rows[-1]:,} of {pool}?",
    )
  rows = f"{described[0]['rows']:,} of {pool}"
  return (
    f"{name} at {rows}, {loss}{seeds}",
    f"Do the {rows} that {name} ranks first align a policy with "
    f"{loss} as well as as many random ones, and as well as all?",
  )


def _baseline(job: Job) -> dict[str, Any]:
  """The policy before alignment and its metrics."""
  metrics = judge_stage.read_metrics(
    job.c, job.shared / "baseline", job.shared / "judged_reference"
  )
  return dict(name=baseline_name(job)) | _without(metrics, "details")


def _data(job: Job, summary: dict[str, Any]) -> dict[str, Any]:
  """The data summary in the words of the report."""
  quantiles = lambda q: [q["p5"], q["p50"], q["p95"]] if q else None
  cut = summary["truncation"]["pool"]
  same = ("source", "schema", "kind", "seen", "duplicates")
  return {name: summary[name] for name in same} | dict(
    rows=summary["rows_by_split"],
    refused=summary["refused_by_reason"],
    chars={k: quantiles(v) for k, v in summary["characters"].items()},
    tokens=summary.get("tokens"),
    truncation={n: cut[n] for n in ("rows_cut", "too_long", "context", "fits")},
    reading=summary_lines(summary),
    examples=[_without(row, "group") for row in job.rows("pool")[:2]],
  )
