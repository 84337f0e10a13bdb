"""Arms side by side: the chosen sampler, random, everything; then a page."""

from collections.abc import Sequence
import datetime
import json
import shlex
from typing import Any

from etils import epath
import jax
import numpy as np

import jaxalign
from jaxalign import pipeline
from jaxalign.core import disk
from jaxalign.core.artifacts import Cost
from jaxalign.core.stage import Made, Stage
from jaxalign.data import batches, tables, world
from jaxalign.data.summary import summary_lines
from jaxalign.embed import embedder, over_pool
from jaxalign.embed import passes as embed
from jaxalign.eval import held_out, judge_kinds, judge_stage
from jaxalign.eval.policies import read_samples
from jaxalign.model import decoder
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Arm, arm_folder, budget_of, Job, WHOLE
from jaxalign.report import study_page
from jaxalign.select import columns
from jaxalign.select.choose import selected_rows
from jaxalign.select.samplers import chains
from jaxalign.study import evidence, ledger, plan
from jaxalign.train import feed
from jaxalign.train.statistics import needs_batch_logps

REPORT = "report"  # the stage that writes a page
CURVES = (
  "train/loss",
  "train/preference_loss",
  "rewards/margins",
  "rewards/accuracies",
  "logps/chosen",
  "train/grad_norm",
)


def arms_of(c: Any) -> list[Arm]:
  """The chosen sampler first, then what it is compared with.

  Every sampler at every budget with every seed; seed by seed, so that a job
  cut short has whole comparisons.
  """
  budgets = [budget_of(b) for b in c.budgets or (c.select.budget,)]
  arms = {}
  for seed in range(c.seed, c.seed + c.seeds):
    for budget in budgets:
      for name in (c.select.sampler, *c.compare):
        arm = Arm(name, budget, seed)
        if name in WHOLE:
          arm = Arm("random", 1.0, seed, 0 if name == "all" else budget)
        arms.setdefault(arm.name, arm)
  return list(arms.values())


def run(job: Job, command: str, notes: Sequence[str] = ()) -> dict[str, Any]:
  """Runs or finds every stage of every arm, then writes the summary.

  Args:
    job: the run.
    command: what a person types for it.
    notes: sentences that stand before the verdicts.

  Returns:
    The summary, as in `summary.json`.
  """
  arms = arms_of(job.c)
  job.stages[REPORT] = PAGE
  pipeline.run(job, arms, (*pipeline.STUDY, REPORT))
  run_report(job, arms, command, notes)
  if jax.process_index() != 0:
    return {}
  return disk.read_json(job.workdir / "summary.json")


# Pages are stages too, one a page: made once, and again where what they show
# is another. That needs no --redo, since a page is all that is lost. Neither
# the command nor the machine is part of what they are made from: a page says
# which command made it, and when.


def _make_page(job: Job, arm: Arm, folder: Any) -> Made:
  """The page of one arm, beside its artifacts."""
  html = study_page.arm_html(describe(job, arm))
  disk.write_bytes(folder / "report.html", html.encode())
  return ["report.html"], Cost(), {}


def _page_needs(job: Job, arm: Arm) -> list[str]:
  return pipeline.reached(job, ("evaluate", "judge"))


def _page_fields(job: Job, arm: Arm | None) -> dict[str, Any]:
  return dict(version=jaxalign.__version__) | judge_kinds.page_fields(job.c)


_PAGE = dict(alone=True, remakes=True)
PAGE = Stage(REPORT, _make_page, _page_needs, _page_fields, True, **_PAGE)


def run_report(
  job: Job, arms: list[Arm], command: str, notes: Sequence[str] = ()
) -> None:
  """The page over all arms, and the summary that it is made from."""

  def make(job, arm, folder):
    summary = summarise(job, arms, command)
    summary["verdicts"] = [*notes, *summary["verdicts"]]
    config = json.loads(job.c.to_json_best_effort())
    disk.write_json(folder / "summary.json", summary)
    disk.write_json(folder / "config.json", config)
    html = study_page.study_html(summary)
    disk.write_bytes(folder / "report.html", html.encode())
    files = ["summary.json", "config.json", "report.html"]
    if evidence.curve_arms(job, arms):
      disk.write_json(folder / "fit.json", summary["fit"])
      files.append("fit.json")
    return files, Cost(), {}

  def fields(job, arm):
    named = dict(arms=[a.name for a in arms])
    return (
      _page_fields(job, arm) | named | (dict(notes=[*notes]) if notes else {})
    )

  pages = [(REPORT, arm) for arm in arms]
  judged = ["judged_reference"] * (("", "judged_reference") in job.records)
  needs = lambda *_: [*pages, *judged]
  own = dict(volatile=("summary.json", "report.html", "config.json"))  # a time
  stage = Stage(REPORT, make, needs, fields, **_PAGE, **own)
  job.run(stage, folder=job.workdir)


def _costs(job: Job, arms: list[Arm]) -> dict[str, Any]:
  """The ledger: lines, totals by arm, and shares saved."""
  whole = _whole_pool(job, _reference_pass(job))
  by_arm = {arm.name: _arm_costs(job, arm) for arm in arms}
  shares = [
    s
    for s in (_saved(job, arm, whole) for arm in arms if arm.seed == job.c.seed)
    if s
  ]
  lines = ledger.stages(
    {k: card for k, card in job.records.items() if k[1] != REPORT}
  )
  lines = plan.beside(job, arms, lines)
  total = ledger.total(lines)
  selecting = sum(x["flops"] for x in lines if x["stage"] in ledger.SELECTION)
  return dict(
    stages=lines,
    arms=by_arm,
    saved=shares,
    everything=whole,
    total=vars(total),
    selection_share=selecting / max(total.flops, 1),
    parameters=decoder.parameter_count(job.model),
  )


def _spent(job: Job, stage: str, arm: str = "") -> int:
  card = job.records.get((arm, stage))
  return card.cost.flops if card else 0


def _arm_costs(job: Job, arm: Arm) -> dict[str, int]:
  """Operations of one arm on its own."""
  sampler = chains.named(arm.sampler)
  align = job.records.get((arm.name, "align"))
  read = columns.before(
    job.c,
    [
      *columns.stages(job.c, job.kind, sampler),
      *["mixture"] * ("log_likelihood" in sampler.needs),
    ],
  )
  tokens, layers = job.tokens("pool"), job.c.embed.layers
  # Of a pass that arms share, what this one alone would have asked of it.
  own = over_pool.shares(
    job.c,
    read,
    lambda outputs: embed.pass_flops(job.model, tokens, outputs, layers),
  )
  return ledger.arm_flops(
    stages={stage: own.get(stage, _spent(job, stage)) for stage in read}
    | dict(select=_spent(job, "select", arm.name)),
    # An embedder of its own, or products narrower than float32: the pass over
    # the kept rows is in ref_logps.
    reference=(
      0
      if embedder.alone(job.c)
      or not columns.exact(job.c)
      or not _reads_ahead(job)
      else _subset_tokens(job, arm)
    ),
    ref_logps=_spent(job, "ref_logps", arm.name),
    # Without its evaluations: they are `evaluate`'s kind.
    align=_spent(job, "align", arm.name)
    - (align.result.get("evaluating", 0) if align else 0),
  )


def _online(job: Job) -> bool:
  return job.c.train.reference == "online"


def _reads_ahead(job: Job) -> bool:
  """Whether the loss reads what the reference said before training; online
  its passes are in align."""
  return job.loss.reference and not _online(job)


def _reference_pass(job: Job) -> int:
  """Operations of the reference over the whole pool, ahead of training."""
  if not _reads_ahead(job):
    return 0
  if embedder.alone(job.c):
    return embed.flops(job.model, job.tokens("pool"))
  return _spent(job, "embed")


def _saved(job: Job, arm: Arm, whole: int) -> dict[str, Any] | None:
  """What an arm saves against aligning on everything; None for that one."""
  if arm.is_all:
    return None
  return dict(arm=arm.name, against="all") | ledger.saved(
    _arm_costs(job, arm)["total"], whole, _spent(job, "sft")
  )


def _subset_tokens(job: Job, arm: Arm) -> int:
  """Operations of one reference pass over an arm's rows."""
  tokens, m = job.tokens("pool"), job.model
  responses = len(tokens.start) // len(job.column("pool", "id"))
  index = selected_rows(job, arm)
  rows = (index[:, None] * responses + np.arange(responses)).reshape(-1)
  sizes = np.diff(tokens.offsets)[rows]
  return int(
    sum(
      decoder_flops(m, int(s)) * int(n)
      for s, n in zip(*np.unique(sizes, return_counts=True))
    )
  )


def _whole_pool(job: Job, reference: int) -> int:
  """Operations of aligning on everything with the same recipe.

  Counted from the rows, whether or not that arm was run; KTO's mismatched
  rows are about as long as the matched ones and cost two forwards each.
  """
  c, tokens = job.c.train, job.tokens("pool")
  n = len(job.column("pool", "id"))
  responses = len(tokens.start) // n
  rows = feed.TrainRows(
    [""] * n,
    tokens,
    np.arange(n)[:, None] * responses + np.arange(responses),
    None,
    None,
  )
  updates = batches.updates(
    n, c.batch_size, c.epochs, c.max_updates, c.min_updates
  )
  batching = feed.Batching(c.batch_size, job.c.seed)
  cost = lambda m, **more: feed.training_cost(
    m, rows, batching, updates, **more
  )[0]
  align = cost(
    job.policy, ahead=needs_batch_logps(job.loss), online=_online(job)
  )
  if "z0" in job.loss.stats:
    align += 2 * cost(job.policy._replace(lora=None)) // 3
  return reference + align


def _curves(folder: Any) -> dict[str, list]:
  lines = [
    json.loads(x)
    for x in (epath.Path(folder) / "metrics.jsonl").read_text().splitlines()
  ]
  keep = lines[:: max(1, len(lines) // 200)]
  return {
    name: [[x["step"], x[name]] for x in keep if name in x]
    for name in CURVES
    if any(name in x for x in lines)
  }


def _selection(job: Job, arm: Arm) -> dict[str, Any]:
  """The selection card in the words of the report."""
  folder = arm_folder(job, arm)
  card = disk.read_json(folder / "selection.json")
  scores = tables.read_table(folder / "scores.parquet")
  value = np.array([s["score"] for s in scores])
  kept = np.array([s["selected"] for s in scores])
  edges = np.histogram_bin_edges(value, 30)
  out = dict(
    score_histogram=dict(
      edges=edges.tolist(),
      selected=np.histogram(value[kept], edges)[0].tolist(),
      rest=np.histogram(value[~kept], edges)[0].tolist(),
    )
  )
  quantile = lambda part: part and [part[0], part[2], part[4]]
  out["length"] = dict(
    selected=quantile(card["length"]["chosen"]),
    rest=quantile(card["length"]["rest"]),
  )
  if "topic" in card:
    out["topics"] = dict(
      selected=card["topic"]["covered"], pool=card["topic"]["topics"]
    )
  if "label_share" in card:
    out["label_share"] = card["label_share"]
  diagnostics = card.get("diagnostics", {})
  if "stability" in diagnostics:
    out["stability"] = diagnostics["stability"]
  if "mixture" in card:
    m, knobs = card["mixture"], job.c.select.mixture
    halves, labels = diagnostics["held_out"], diagnostics["labels"]
    out["mixture"] = dict(
      components=m["components"],
      covariance=knobs.covariance,
      pca=m["directions"],
      in_fit=halves["mean_fitted"],
      held_out=halves["mean_held_out"],
      auc=halves["auc"],
      label_accuracy=labels["accuracy"],
      nmi=labels["nmi"],
      warnings=m["warnings"],
    )
  rows = job.rows("pool")
  order = np.argsort(-value, kind="stable")
  show = lambda picks: [
    {k: v for k, v in rows[i].items() if k not in ("group", "label")}
    | dict(score=float(value[i]))
    for i in picks
  ]
  out["page"] = "selection.html"
  out["examples_top"] = show(order[:3])
  out["examples_bottom"] = show(order[-3:])
  return out


def _samples(job: Job, arms: list[Arm]) -> list[dict]:
  """A few prompts with every policy's answer."""
  told = {a.name: read_samples(arm_folder(job, a)) for a in arms}
  said = (
    {
      n: judge_stage.read_verdicts(folder)
      for n, folder in (
        ("sft", job.shared / "judged_reference"),
        *((a.name, arm_folder(job, a)) for a in arms),
      )
    }
    if judge_kinds.kind_of(job.c) in judge_kinds.JUDGES
    else {}
  )
  out = []
  for k, sft in enumerate(read_samples(job.shared / "baseline")[:6]):
    rewards = dict(sft=sft["reward"]) | {
      n: s[k]["reward"] for n, s in told.items()
    }
    if held_out.eval_set(job).world is not None:
      rewards["target"] = world.reward(
        held_out.eval_set(job).world, sft["prompt"], sft["target"]
      )
    out.append(
      dict(
        prompt=sft["prompt"],
        target=sft["target"],
        sft=sft["answer"],
        arms={n: s[k]["answer"] for n, s in told.items()},
        against=job.c.judge.baseline,
        verdicts={
          n: {x: s[k][x] for x in ("outcome", "verdicts", "replies", "theirs")}
          for n, s in said.items()
          if k < len(s)
        },
        rewards={n: r for n, r in rewards.items() if r is not None},
      )
    )
  return out


def describe(job: Job, arm: Arm) -> dict[str, Any]:
  """What the report shows of one arm, from the artifacts alone."""
  folder = arm_folder(job, arm)
  align = job.records[arm.name, "align"]
  metrics = judge_stage.read_metrics(job.c, folder, folder)
  return dict(
    details=metrics.pop("details", None),
    name=arm.name,
    sampler=arm.sampler,
    budget=arm.budget,
    seed=arm.seed,
    like=arm.like,
    rows=align.result["rows"],
    updates=align.result["updates"],
    is_all=arm.is_all,
    saved=_saved(job, arm, _whole_pool(job, _reference_pass(job))),
    metrics=metrics,
    curves=_curves(folder),
    selection=_selection(job, arm),
  )


def summarise(job: Job, arms: list[Arm], command: str) -> dict[str, Any]:
  """Everything the report shows, from the artifacts alone."""
  c = job.c
  data = disk.read_json(job.shared / "data" / "data_summary.json")
  costs = _costs(job, arms)
  described = [describe(job, arm) for arm in arms]
  for one in described:  # of an arm's own page
    one.pop("details")
  found = evidence.weigh(job, arms, described, costs["arms"])
  verdicts = found["verdicts"]
  warnings = found["warnings"]
  if ("", "mixture") in job.records:
    warnings += job.records["", "mixture"].result["warnings"]
  cut = data["truncation"]["pool"]
  lost = cut["rows_cut"] / cut["rows"] + cut["too_long"] / data["seen"]
  if lost > 0.2:
    warnings.append(
      f"{100 * lost:.0f} % of the pool's rows were cut or left "
      f"out at {job.model.context} tokens; a context of "
      f"{cut['fits']:,} keeps 99 %: raise config.model.context"
    )
  judge = judge_stage.describe_judge(job, arms)
  warnings += judge_stage.judge_warnings(judge)
  for arm in arms:
    card = disk.read_json(arm_folder(job, arm) / "selection.json")
    for note in card["diagnostics"].get("notes", ()):
      (warnings if note.startswith("warning") else verdicts).append(
        f"{arm.name}: {note.removeprefix('warning: ')}."
      )
  for arm, one in zip(arms, described):
    share = one["metrics"]["malformed"]["value"]
    before = disk.read_json(job.shared / "baseline" / "eval.json")["malformed"][
      "value"
    ]
    if share > before + 0.1:
      warnings.append(
        f"{arm.name}: {100 * share:.0f} % of its answers are "
        f"malformed, {100 * before:.0f} % before alignment"
      )
  for share in costs["saved"][:1]:
    if share["without_sft"] >= 0:  # a loss is told by the pages themselves
      verdicts.append(
        f"With the selection counted, {share['arm']} saves "
        f"{100 * share['without_sft']:.0f} % of the flops of aligning "
        "on everything with the same recipe."
      )
  pool = data["rows_by_split"]["pool"]
  unit = "pairs" if job.kind == "pairs" else "answers"
  title, question = _question(c, described, f"{pool:,} {unit}")
  return found | dict(
    title=title,
    asked=question,
    judge=judge,
    command=command,
    version=jaxalign.__version__,
    created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    verdicts=verdicts,
    warnings=warnings,
    machine=dict(
      platform=jax.default_backend(),
      devices=job.mesh.size,
      mesh=dict(job.mesh.shape),
      jax=jax.__version__,
    ),
    recipe=dict(
      epochs=c.train.epochs,
      max_updates=c.train.max_updates,
      batch_size=c.train.batch_size,
      lr=c.train.lr,
      loss=c.loss.name,
      kwargs=c.loss.kwargs.to_dict(),
    ),
    data=_data(job, data),
    arms=described,
    baseline=_baseline(job),
    ledger=costs,
    samples=_samples(job, [a for a in arms if a.seed == c.seed]),
    files=dict(
      {
        "summary": "summary.json",
        "config": "config.json",
        "data summary": "shared/data/data_summary.json",
      },
      **{f"{a.name}": f"runs/{a.name}/" for a in arms},
    ),
  )


def _question(c: Any, described: list[dict], of: str) -> tuple[str, str]:
  """The title of the report, and what was asked; `of` is "8,000 pairs"."""
  name, loss = c.select.sampler, c.loss.name
  seeds = f", {c.seeds} seeds" if c.seeds > 1 else ""
  rows = sorted({d["rows"] for d in described if not d["is_all"]})
  samplers = [n for n in (name, *c.compare) if n not in WHOLE]
  if len(set(samplers) - {"random", "length_matched"}) > 1:
    at = " and ".join(f"{m:,}" for m in rows)
    return (
      f"{len(samplers)} samplers at {at} of {of}, {loss}{seeds}",
      f"Which of {', '.join(samplers)} picks the {at} of {of} that align "
      f"a policy with {loss} best?",
    )
  if len(c.budgets) > 1:
    rows = sorted(
      {d["rows"] for d in described if d["sampler"] == name or d["is_all"]}
    )
    return (
      f"{name} at {len(rows)} budgets of {of}, {loss}{seeds}",
      f"How does a policy aligned with {loss} improve from "
      f"{rows[0]:,} to {rows[-1]:,} of {of}?",
    )
  rows = f"{described[0]['rows']:,} of {of}"
  return (
    f"{name} at {rows}, {loss}{seeds}",
    f"Do the {rows} that {name} ranks first align a policy with "
    f"{loss} as well as as many random ones, and as well as all?",
  )


def _baseline(job: Job) -> dict[str, Any]:
  """The start and its metrics."""
  metrics = judge_stage.read_metrics(
    job.c, job.shared / "baseline", job.shared / "judged_reference"
  )
  metrics.pop("details", None)
  return dict(name=evidence.start_of(job)) | metrics


def _data(job: Job, summary: dict[str, Any]) -> dict[str, Any]:
  """The data summary in the words of the report."""
  quantiles = lambda q: [q["p5"], q["p50"], q["p95"]] if q else None
  cut = summary["truncation"]["pool"]
  return dict(
    source=summary["source"],
    schema=summary["schema"],
    kind=summary["kind"],
    seen=summary["seen"],
    rows=summary["rows_by_split"],
    refused=summary["refused_by_reason"],
    duplicates=summary["duplicates"],
    chars={k: quantiles(v) for k, v in summary["characters"].items()},
    tokens=summary.get("tokens"),
    truncation=dict(
      rows_cut=cut["rows_cut"],
      too_long=cut["too_long"],
      context=cut["context"],
      fits=cut["fits"],
    ),
    reading=summary_lines(summary),
    examples=[
      {k: v for k, v in row.items() if k != "group"}
      for row in job.rows("pool")[:2]
    ],
  )


def command_line(argv: list[str]) -> str:
  """The command of a run, as a person can paste it."""
  return "python -m jaxalign.main " + " ".join(shlex.quote(a) for a in argv[1:])
