"""One job's stages in order; the only file that knows the order.

`run` makes what a goal needs, and no more: shared stages first, then the
stages of each arm. Rooms meet here, through files: what `select` writes,
`train` reads.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax

import jaxalign
from jaxalign.core import disk, processes, progress
from jaxalign.core.settings import pick
from jaxalign.core.stage import Made, needs, Stage
from jaxalign.data import build_data, prepare, recipe
from jaxalign.data.summary import summary_lines
from jaxalign.embed import over_pool, row_scores
from jaxalign.eval import judge_kinds, judge_stage, policies, while_training
from jaxalign.model import decoder
from jaxalign.model.job import Arm, Job
from jaxalign.report import selection_stage
from jaxalign.select import choose, columns, fit_mixture
from jaxalign.select.topk import budget_rows
from jaxalign.train import align, proxies, ref_logps, sft
from jaxalign.train.host_memory import check_memory
from jaxalign.train.losses import loss_of


def _make_data(job: Job, arm: None, folder: Any) -> Made:
  """Reads, checks, splits and tokenizes the source."""
  writes = jax.process_index() == 0
  return build_data.make_data(
    job.c, folder, most=job.most, wanted=job.kind, writes=writes
  )


def _data_fields(job: Job, arm: None) -> dict[str, Any]:
  c, sizes = job.c, ("checkpoint", "tokenizer", "vocab_size", "context")
  fields = pick(c, "data", *(f"model.{name}" for name in sizes))
  fields["data.source"] = prepare.sources_of(c)
  fields["data.choice"] = prepare.choice_of(c)
  digest = processes.from_first(lambda: prepare.fingerprint(c))
  return fields | dict(kind=job.kind, source_digest=digest)


def _version(job: Job, arm: Any) -> dict[str, Any]:
  return dict(version=jaxalign.__version__)


def _over_rows(name: str, make: Callable, fields: Callable, **more) -> Stage:
  """A stage that stores numbers of every row of the pool, shard by shard."""
  own = dict(needs=needs("data", "sft")) | more  # `cost` among them
  resumes = lambda job, arm: ("store",)
  own |= dict(repairs=True, volatile=("store/*.npy",))  # digests stand beside
  return Stage(name, make, fields=fields, resumes=resumes, **own)


def _pass(name: str) -> Stage:
  """A stage that keeps something of the one forward pass over the pool."""
  of = lambda fn: functools.partial(fn, name)
  more = dict(needs=of(over_pool.pass_needs), cost=of(over_pool.pass_price))
  make, fields = of(over_pool.make_pass), of(over_pool.pass_fields)
  return _over_rows(name, make, fields, **more)


_trained = lambda job, arm: sft.TRAINED
# Times, and names of shards; a digest of the weights stands for them.
_VARY = ("metrics.jsonl", "checkpoints/*", "bases/*", "best/*")
_store_fields = lambda job, arm: pick(
  job.c, "embed.tile", "embed.shard", "model"
)
_arm = dict(of_arm=True)

STAGES = (
  # Shared by all arms.
  Stage("data", _make_data, fields=_data_fields),
  Stage(
    "sft",
    sft.make_sft,
    needs("data"),
    sft.sft_fields,
    resumes=_trained,
    volatile=_VARY,
    given=sft.given_reference,
    cost=sft.sft_price,
  ),
  *(_pass(name) for name in over_pool.KEEPS),
  _over_rows(
    "alone", row_scores.make_alone, _store_fields, cost=row_scores.alone_price
  ),
  _over_rows(
    "ask",
    row_scores.make_ask,
    row_scores.ask_fields,
    needs=row_scores.ask_needs,
    cost=row_scores.ask_price,
  ),
  _over_rows(
    "rewards",
    row_scores.make_rewards,
    row_scores.rewards_fields,
    needs=needs("data"),
    cost=row_scores.rewards_price,
  ),
  Stage(
    "proxy",
    proxies.make_proxy,
    proxies.proxy_needs,
    proxies.proxy_fields("pairs", "updates"),
    resumes=lambda job, arm: (*sft.TRAINED, "store"),
    volatile=(*_VARY, "store/*.npy"),
    cost=proxies.proxy_price,
  ),
  Stage(
    "held_out",
    proxies.make_held_out,
    proxies.proxy_needs,
    proxies.proxy_fields("models"),
    resumes=proxies.held_out_leaves,
    cost=proxies.held_out_price,
  ),
  Stage(
    "mixture",
    fit_mixture.make_mixture,
    needs("embed"),
    fit_mixture.mixture_fields,
    cost=fit_mixture.mixture_price,
  ),
  Stage(
    "baseline",
    policies.make_baseline,
    needs("data", "sft"),
    policies.eval_fields,
    cost=policies.eval_price,
  ),
  Stage(
    "judged_reference",
    judge_stage.make_judged_reference,
    needs("data", "baseline"),
    judge_stage.judged_reference_fields,
  ),
  # Of each arm.
  Stage(
    "select",
    choose.make_selection,
    choose.select_needs,
    choose.select_fields,
    alone=True,
    volatile=("config.json",),
    cost=choose.select_price,
    **_arm,
  ),
  Stage(
    "selection_report",
    selection_stage.make_selection_report,
    selection_stage.report_needs,
    _version,
    alone=True,
    remakes=True,
    **_arm,
  ),
  Stage(
    "ref_logps",
    ref_logps.make_ref_logps,
    ref_logps.ref_logps_needs,
    ref_logps.ref_logps_fields,
    cost=ref_logps.ref_logps_price,
    **_arm,
  ),
  Stage(
    "align",
    while_training.make_aligned,
    needs("ref_logps", "sft"),
    while_training.align_fields,
    resumes=align.leaves,
    volatile=_VARY,
    cost=while_training.align_price,
    **_arm,
  ),
  Stage(
    "evaluate",
    policies.make_evaluation,
    needs("align", "baseline"),
    policies.eval_fields,
    cost=policies.eval_price,
    **_arm,
  ),
  Stage(
    "judge",
    judge_stage.make_judged_policy,
    needs("evaluate", "baseline", "judged_reference"),
    judge_stage.judge_fields,
    **_arm,
  ),
  Stage(
    "export",
    policies.make_export,
    needs("align"),
    policies.export_fields,
    **_arm,
  ),
)
# What a command makes; what these need is found in the table.
_TRAINED = ("select", "align", "evaluate", "judge", "export")
GOALS = {
  "selection": ("select", "selection_report"),
  "training": _TRAINED,
  "study": ("embed", "selection_report", *_TRAINED),
}
STUDY = GOALS["study"]


def make_job(c: Any, mesh: Any, workdir: Any, redo: bool = False) -> Job:
  """A job of a config, what the config leaves open settled."""
  recipe.settle(c)
  return Job(c, mesh, workdir, loss_of(c), STAGES, redo)


def required(
  job: Job, arms: Sequence[Arm], goal: Sequence[str]
) -> list[tuple[Stage, Arm | None]]:
  """The stages that a goal needs, in the order in which they run."""
  wanted = set()

  def visit(name: str, arm: Arm | None) -> None:
    stage = job.stages[name]
    key = name, arm if stage.of_arm else None
    if key not in wanted:
      wanted.add(key)
      for need in stage.needs(job, arm):
        visit(*need) if isinstance(need, tuple) else visit(need, arm)

  for arm in arms:
    for name in goal:
      visit(name, arm)
  return [
    (stage, arm)
    for arm in (None, *arms)
    for stage in job.stages.values()
    if (stage.name, arm) in wanted
  ]


def reached(job: Job, goal: Sequence[str]) -> list[str]:
  """The stages of a goal that a config has: not all judge, or hold out."""
  judged = judge_kinds.kind_of(job.c) in judge_kinds.JUDGES
  return [name for name in goal if judged or name != "judge"]


def prepare_data(job: Job, arms: Sequence[Arm], goal: Sequence[str]) -> None:
  """Runs the data stage, and refuses what cannot work with its rows."""
  trains = "align" in goal
  if trains:
    judge_kinds.check_ready(job, arms)
  job.run("data")
  if jax.process_index() == 0:
    path = job.shared / "data" / "data_summary.json"
    for line in summary_lines(disk.read_json(path)):
      progress.say(f"  {line}")
  device = job.mesh.devices.flat[0].device_kind
  progress.say(
    f"  mesh {dict(job.mesh.shape)} on {job.mesh.size} x {device}; model of "
    f"{decoder.parameter_count(job.model):,} parameters"
  )
  for arm in arms:
    pool = len(job.column("pool", "id"))
    budget_rows(arm.budget, pool, job.c.train.batch_size)
    columns.check_records(job, arm.sampler)
  choose.check_hours(job, arms)
  if trains:
    check_memory(job, arms)
    if len(job.column("held_out", "id")):
      judge_kinds.check_enough(job, arms)


def run(job: Job, arms: Sequence[Arm], goal: Sequence[str] = STUDY) -> None:
  """Makes what a goal needs of every arm."""
  prepare_data(job, arms, goal)
  goal = reached(job, goal)
  if not len(job.column("held_out", "id")):
    goal = [name for name in goal if name not in ("evaluate", "judge")]
  stages = required(job, arms, goal)
  job.planned = frozenset(stage.name for stage, arm in stages if arm is None)
  for stage, arm in stages:
    if stage.name == "data":  # it has run
      continue
    if stage.name == "select":
      job.kept.pop("policy", None)  # of the arm before
      progress.say(f"[{arm.name}]")
    job.run(stage, arm)
