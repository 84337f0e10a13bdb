"""One job's stages in order; the only file that knows the order.

`run` makes what a goal needs, and no more: shared stages first, then the
stages of each arm. Rooms meet here, through files: what `select` writes,
`train` reads.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

import jaxalign
from jaxalign.core import disk, processes, progress
from jaxalign.core.settings import pick
from jaxalign.core.stage import Kind, Made, required, Stage
from jaxalign.data import build_data, prepare, recipe
from jaxalign.data.summary import summary_lines
from jaxalign.embed.over_pool import (
  KEEPS,
  make_pass,
  pass_fields,
  pass_needs,
  pass_price,
)
from jaxalign.embed.row_scores import (
  alone_price,
  ask_fields,
  ask_needs,
  ask_price,
  make_alone,
  make_ask,
  make_rewards,
  rewards_fields,
  rewards_price,
)
from jaxalign.eval import judge_kinds
from jaxalign.eval.aligned import align_fields, align_price, make_aligned
from jaxalign.eval.judge_stage import (
  judge_fields,
  judged_reference_fields,
  make_judged_policy,
  make_judged_reference,
)
from jaxalign.eval.policies import (
  eval_fields,
  eval_price,
  export_fields,
  make_baseline,
  make_evaluation,
  make_export,
)
from jaxalign.model.decoder import parameter_count
from jaxalign.model.job import Arm, Job
from jaxalign.report.selection_stage import make_selection_report, report_needs
from jaxalign.select.choose import (
  check_hours,
  make_selection,
  select_fields,
  select_needs,
  select_price,
)
from jaxalign.select.columns import check_records
from jaxalign.select.fit_mixture import (
  make_mixture,
  mixture_fields,
  mixture_price,
)
from jaxalign.select.topk import budget_rows
from jaxalign.train.align import leaves
from jaxalign.train.host_memory import check_memory
from jaxalign.train.losses import loss_of
from jaxalign.train.proxies import (
  held_out_leaves,
  held_out_price,
  make_held_out,
  make_proxy,
  proxy_fields,
  proxy_needs,
  proxy_price,
)
from jaxalign.train.ref_logps import (
  make_ref_logps,
  ref_logps_fields,
  ref_logps_needs,
  ref_logps_price,
)
from jaxalign.train.sft import (
  given_reference,
  make_sft,
  sft_fields,
  sft_price,
  TRAINED,
)


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


def _store_fields(job: Job, arm: None) -> dict[str, Any]:
  return pick(job.c, "embed.tile", "embed.shard", "model")


def _version(job: Job, arm: Any) -> dict[str, Any]:
  return dict(version=jaxalign.__version__)


_PASS = make_pass, pass_needs, pass_fields, pass_price
_tuned_fields = proxy_fields("pairs", "updates")
_halves_fields = proxy_fields("models")

# Of files that vary (times, names of shards) a digest of the weights stands in
# the record; the digests of a store lie next to it.
_TRAINED = " ".join(TRAINED)
_VARY, _STORE = "metrics.jsonl checkpoints/* bases/* best/*", "store/*.npy"
SFT = Kind(resumes=_TRAINED, volatile=_VARY, given=given_reference)
ROWS = Kind(resumes="store", repairs=True, volatile=_STORE)
PROXY = Kind(resumes=f"{_TRAINED} store", volatile=f"{_VARY} {_STORE}")
HALVES = Kind(resumes=held_out_leaves)
CHOSEN = Kind(of_arm=True, alone=True, volatile="config.json")
PAGE = Kind(of_arm=True, alone=True, remakes=True)
ARM = Kind(of_arm=True)
POLICY = Kind(of_arm=True, resumes=leaves, volatile=_VARY)
_TABLE = (  # name, make, needs, fields, price, kind
  # Shared by all arms.
  ("data", _make_data, "", _data_fields),
  ("sft", make_sft, "data", sft_fields, sft_price, SFT),
  *((n, *(partial(f, n) for f in _PASS), ROWS) for n in KEEPS),
  ("alone", make_alone, "data sft", _store_fields, alone_price, ROWS),
  ("ask", make_ask, ask_needs, ask_fields, ask_price, ROWS),
  ("rewards", make_rewards, "data", rewards_fields, rewards_price, ROWS),
  ("proxy", make_proxy, proxy_needs, _tuned_fields, proxy_price, PROXY),
  (
    "held_out",
    make_held_out,
    proxy_needs,
    _halves_fields,
    held_out_price,
    HALVES,
  ),
  ("mixture", make_mixture, "embed", mixture_fields, mixture_price),
  ("baseline", make_baseline, "data sft", eval_fields, eval_price),
  (
    "judged_reference",
    make_judged_reference,
    "data baseline",
    judged_reference_fields,
  ),
  # Of each arm.
  ("select", make_selection, select_needs, select_fields, select_price, CHOSEN),
  (
    "selection_report",
    make_selection_report,
    report_needs,
    _version,
    None,
    PAGE,
  ),
  (
    "ref_logps",
    make_ref_logps,
    ref_logps_needs,
    ref_logps_fields,
    ref_logps_price,
    ARM,
  ),
  ("align", make_aligned, "ref_logps sft", align_fields, align_price, POLICY),
  ("evaluate", make_evaluation, "align baseline", eval_fields, eval_price, ARM),
  (
    "judge",
    make_judged_policy,
    "evaluate baseline judged_reference",
    judge_fields,
    None,
    ARM,
  ),
  ("export", make_export, "align", export_fields, None, ARM),
)
STAGES = tuple(Stage(*row) for row in _TABLE)
# What a command makes; what these need is found in the table.
_TRAINING = ("select", "align", "evaluate", "judge", "export")
GOALS = {
  "selection": ("select", "selection_report"),
  "training": _TRAINING,
  "study": ("embed", "selection_report", *_TRAINING),
}
STUDY = GOALS["study"]


def make_job(c: Any, mesh: Any, workdir: Any, redo: bool = False) -> Job:
  """A job of a config, what the config leaves open settled."""
  recipe.settle(c)
  return Job(c, mesh, workdir, loss_of(c), STAGES, redo)


def reached(job: Job, goal: Sequence[str]) -> list[str]:
  """The stages of a goal that a config has: not every one has a judge."""
  judged = judge_kinds.kind_of(job.c) in judge_kinds.JUDGES
  return [name for name in goal if judged or name != "judge"]


def run(job: Job, arms: Sequence[Arm], goal: Sequence[str] = STUDY) -> None:
  """Makes what a goal needs of every arm."""
  _run_data(job, arms, trains="align" in goal)
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


def _run_data(job: Job, arms: Sequence[Arm], trains: bool) -> None:
  """Runs the data stage, and refuses what cannot work with its rows."""
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
    f"{parameter_count(job.model):,} parameters"
  )
  pool = len(job.column("pool", "id"))
  for arm in arms:
    budget_rows(arm.budget, pool, job.c.train.batch_size)
    check_records(job, arm.sampler)
  check_hours(job, arms)
  if trains:
    check_memory(job, arms)
    if len(job.column("held_out", "id")):
      judge_kinds.check_enough(job, arms)
