"""What each stage cost, and what selecting saved once it is counted in.

Floating-point operations are multiply-adds times two, counted from the rows
that ran; padding and recomputation are not counted. An arm's cost is what it
would cost alone: selection (embedding every row and fitting, only where its
sampler needs it, and the sampler's own work), the reference's forward pass
over its rows where no embedding pass has already given it, and the training.
"""

from typing import Any

import numpy as np

from jaxalign.core.artifacts import Cost, Record
from jaxalign.data import batches
from jaxalign.embed import embedder, over_pool, passes
from jaxalign.model.decoder import parameter_count
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Arm, Job
from jaxalign.select import columns
from jaxalign.select.choose import selected_rows
from jaxalign.select.samplers import chains
from jaxalign.study.plan import with_predictions
from jaxalign.train import feed
from jaxalign.train.statistics import needs_batch_logps
from jaxalign.train.training_cost import training_cost

SELECTION = (
  "embed logps answer residual alone ask rewards proxy held_out mixture select"
).split()


def stage_lines(records: dict[tuple[str, str], Record]) -> list[dict[str, Any]]:
  """One line a stage: what ran, for which arm, and what it took.

  With "held" and "device" where `peak_memory` looked.
  """
  return [
    dict(stage=stage, arm=arm, **vars(record.cost), skipped=record.skipped)
    | {k: record.result[k] for k in ("held", "device") if k in record.result}
    for (arm, stage), record in records.items()
  ]


def total_cost(lines: list[dict[str, Any]]) -> Cost:
  """The sum of `stage_lines`."""
  return Cost(**{n: sum(x[n] for x in lines) for n in vars(Cost())})


def arm_flops(
  *, stages: dict[str, int], reference: int, ref_logps: int, align: int
) -> dict[str, int]:
  """Flops of one arm on its own.

  Args:
    stages: of every stage over the whole pool that the sampler's columns
      come from, of those that they read, and of the arm's own selection.
    reference: of a reference pass over the arm's own rows; nothing where the
      embedding pass (same weights, same rows) has given these numbers.
    ref_logps: of the mismatched rows (KTO).
    align: of the training.

  Returns:
    {"select", "reference", "align", "total"}.
  """
  select = sum(stages.values())
  reference = ref_logps + (0 if "embed" in stages else reference)
  total = select + reference + align
  return dict(select=select, reference=reference, align=align, total=total)


def fraction_saved(arm: int, everything: int, sft: int) -> dict[str, float]:
  """Fraction of flops saved against aligning on everything.

  Negative where selecting costs more than it saves.

  Args:
    arm: the arm's total, selection counted.
    everything: the total of aligning on the whole pool.
    sft: the supervised training that both share; 0 with a checkpoint.
  """
  return dict(
    without_sft=1 - arm / everything,
    with_sft=1 - (arm + sft) / (everything + sft),
  )


def ledger_of(job: Job, arms: list[Arm]) -> dict[str, Any]:
  """The lines of the stages, totals by arm, and fractions saved."""
  own = [saved_by(job, arm) for arm in arms if arm.seed == job.c.seed]
  records = {k: x for k, x in job.records.items() if k[1] != "report"}
  lines = with_predictions(job, arms, stage_lines(records))
  total = total_cost(lines)
  selecting = sum(x["flops"] for x in lines if x["stage"] in SELECTION)
  return dict(
    stages=lines,
    arms={arm.name: cost_of(job, arm) for arm in arms},
    saved=[one for one in own if one],
    everything=everything(job),
    total=vars(total),
    selection_share=selecting / max(total.flops, 1),
    parameters=parameter_count(job.model),
  )


def cost_of(job: Job, arm: Arm) -> dict[str, int]:
  """`arm_flops` of an arm of a job."""
  c, sampler = job.c, chains.find_sampler(arm.sampler)
  read = columns.before(c, columns.stages(c, job.kind, sampler))
  tokens, layers = job.tokens("pool"), c.embed.layers
  # Of a pass that arms share, what this one alone would have taken of it.
  of = lambda outputs: passes.pass_flops(job.model, tokens, outputs, layers)
  alone = over_pool.added_flops(c, read, of)
  stages = {stage: alone.get(stage, _flops(job, stage)) for stage in read}
  stages["select"] = _flops(job, "select", arm.name)
  # An embedder of its own, or products narrower than float32: the pass over
  # the kept rows is in ref_logps.
  elsewhere = embedder.alone(c) or not columns.exact(c)
  ahead = _reads_ahead(job) and not elsewhere
  align = job.records.get((arm.name, "align"))
  # Without its evaluations: they are `evaluate`'s kind.
  evaluating = align.result.get("evaluating", 0) if align else 0
  return arm_flops(
    stages=stages,
    reference=_over_selected(job, arm) if ahead else 0,
    ref_logps=_flops(job, "ref_logps", arm.name),
    align=_flops(job, "align", arm.name) - evaluating,
  )


def saved_by(job: Job, arm: Arm) -> dict[str, Any] | None:
  """What an arm saves against aligning on everything; None for that one."""
  if arm.is_all:
    return None
  total = cost_of(job, arm)["total"]
  saved = fraction_saved(total, everything(job), _flops(job, "sft"))
  return dict(arm=arm.name, against="all") | saved


def _flops(job: Job, stage: str, arm: str = "") -> int:
  record = job.records.get((arm, stage))
  return record.cost.flops if record else 0


def _reads_ahead(job: Job) -> bool:
  """Whether the loss reads the reference's log-probabilities from before
  training; online its passes are in align."""
  return job.loss.reference and job.c.train.reference != "online"


def _over_selected(job: Job, arm: Arm) -> int:
  """Flops of one reference pass over an arm's rows."""
  tokens, responses = job.tokens("pool"), job.responses
  index = selected_rows(job, arm)
  rows = (index[:, None] * responses + np.arange(responses)).reshape(-1)
  lengths = np.unique(np.diff(tokens.offsets)[rows], return_counts=True)
  return sum(
    decoder_flops(job.model, int(s)) * int(n) for s, n in zip(*lengths)
  )


def everything(job: Job) -> int:
  """Flops of aligning on the whole pool with the same recipe.

  Counted from the rows, whether or not that arm was run; KTO's mismatched
  rows are about as long as the matched ones and cost two forwards each.
  """
  if "everything" not in job.kept:
    job.kept["everything"] = _everything(job)
  return job.kept["everything"]


def _everything(job: Job) -> int:
  c, tokens, responses = job.c.train, job.tokens("pool"), job.responses
  n = len(job.column("pool", "id"))
  index = np.arange(n)[:, None] * responses + np.arange(responses)
  rows = feed.TrainRows([""] * n, tokens, index, None, None)
  updates = batches.updates(
    n, c.batch_size, c.epochs, c.max_updates, c.min_updates
  )
  batching = feed.Batching(c.batch_size, job.c.seed)
  cost = lambda m, **how: training_cost(m, rows, batching, updates, **how)[0]
  ahead, online = needs_batch_logps(job.loss), c.reference == "online"
  align = cost(job.policy, ahead=ahead, online=online)
  if "z0" in job.loss.stats:
    align += 2 * cost(job.policy._replace(lora=None)) // 3
  if not _reads_ahead(job):
    return align
  if embedder.alone(job.c):
    return align + passes.pass_flops(job.model, tokens)
  return align + _flops(job, "embed")
