"""The dry run: stages, sizes, memory and time, before anything is computed.

Operations follow from the shapes; token counts of files are estimated from
their characters; times are flops over an assumed sustained rate, and are
called estimates. The ledger of the finished job is what to trust.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import pipeline
from jaxalign.core import progress
from jaxalign.core.devices import sustained_flops
from jaxalign.core.stage import JobSizes
from jaxalign.data import build_data, prepare, sources
from jaxalign.data import tokens as tokens_lib
from jaxalign.embed import embedder
from jaxalign.model import decoder, hf, memory
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Arm, Job, kernel_of, lora_of, sft_sizes
from jaxalign.select import choose
from jaxalign.select.samplers import vectors
from jaxalign.train import feed, host_memory
from jaxalign.train.host_memory import CHARACTERS_PER_TOKEN
from jaxalign.train.statistics import needs_batch_logps


def _sizes(
  c: Any, kind: str
) -> tuple[dict[str, int], dict[str, float], int, list[dict[str, Any]]]:
  """Rows by split, mean tokens by split, the padded length, and records of the
  pool where a source was read."""
  r = 2 if kind == "pairs" else 1
  if c.data.assume:
    context = prepare.asked_context(c) or _model(c).context
    mean = min(c.data.assume[1] or context, context)
    rows = {
      n: int(c.data.assume[0] * share)
      for n, share in prepare.split_fractions(c).items()
    }
    if r == 1:
      rows["pool"] *= 2  # unpaired rows of pairs
    return rows, dict.fromkeys(rows, float(mean)), context, []
  if prepare.is_world(c):
    w = c.data.world
    rows = dict(
      sft=w.sft_rows, held_out=w.held_out_rows, pool=w.pool_rows * (2 // r)
    )
    tokens = 6.0 + w.arguments + 1 + 4.5 + w.arguments
    return rows, dict.fromkeys(rows, tokens), -(-int(tokens + 2) // 4) * 4, []
  found, said = build_data.preview(c, _model(c).context)
  for line in said:
    progress.say(f"  {line}")
  splits, read = found.splits, found.summary["seen"]
  rows = {n: len(x) for n, x in splits.items()}
  names = prepare.sources_of(c)
  counted = [sources.count_rows(name, build_data.PEEKED) for name in names]
  total = sum(n for n, _ in counted)
  if c.data.limit:
    total = min(total, c.data.limit * len(names))
  if total > read:
    about = "" if all(exact for _, exact in counted) else "about "
    progress.say(
      f"  read the first {read:,} rows; the source holds {about}"
      f"{total:,}, and the plan counts on them all"
    )
    rows = {n: int(x * total / read) for n, x in rows.items()}
  if found.kind == "pairs" and kind == "unpaired":
    rows["pool"] *= 2
  texts = [
    len(x["prompt"]) + len(x[s])
    for x in [*splits["pool"], *splits["held_out"]]
    for s in ("chosen", "rejected", "completion")
    if s in x
  ]
  length = np.array(texts) / CHARACTERS_PER_TOKEN
  context = prepare.asked_context(c) or tokens_lib.context_for(
    length.astype(np.int64), _model(c).context
  )
  mean = np.minimum(length, context).mean()
  return rows, dict.fromkeys(rows, float(mean)), context, splits["pool"]


class Line(NamedTuple):
  """What a stage is expected to take."""

  stage: str
  arm: str  # "" where all arms share it
  count: int
  unit: str  # of the count
  flops: float
  seconds: float
  held: int | None = None  # bytes on the host, where they are known
  device: int | None = None  # bytes on all devices


def _model(c: Any) -> decoder.ModelConfig:
  if c.model.checkpoint:
    return hf.read_config(c.model.checkpoint, c.model.dtype, c.model.remat)
  return sft_sizes(c, c.model.vocab_size)


def lines(
  job: Job,
  arms: list[Arm],
  rows: dict[str, int],
  tokens: dict[str, float],
  goal: Sequence[str] = pipeline.STUDY,
) -> list[Line]:
  """The stages of a job in their order, with what each is expected to take.

  Args:
    job: the run.
    arms: its arms.
    rows: records by split.
    tokens: mean tokens of a row, by split.
    goal: what is made, as of `pipeline.run`.
  """
  stages = pipeline.required(job, arms, pipeline.reached(job, goal))
  shared = frozenset(stage.name for stage, arm in stages if arm is None)
  z = JobSizes(job, rows, tokens, _model(job.c), shared)
  rate = sustained_flops(job.mesh.devices.flat[0]) * job.mesh.size
  out = []
  for stage, arm in stages:
    price = stage.cost(z, arm) if stage.cost else None
    if price is None:
      continue
    seconds = price.flops / rate if price.seconds is None else price.seconds
    name = arm.name if arm else ""
    out.append(
      Line(stage.name, name, **price._asdict() | dict(seconds=seconds))
    )
  return out


def beside(
  job: Job, arms: list[Arm], ledger: list[dict[str, Any]]
) -> list[dict[str, Any]]:
  """The ledger's lines with what was predicted for them, where it was.

  Predicted from the sizes that the data turned out to have, at the assumed
  rate of the devices: `predicted_flops` and `predicted_seconds`, and of
  a choice `predicted_held` and `predicted_device`, bytes.
  """
  splits = {n: job.tokens(n) for n in ("sft", "pool", "held_out")}
  rows = {n: len(job.column(n, "id")) for n in splits}
  tokens = {n: len(x.ids) / max(1, len(x.start)) for n, x in splits.items()}
  found = {(x.stage, x.arm): x for x in lines(job, arms, rows, tokens)}
  out = []
  for line in ledger:
    was = found.get((line["stage"], line["arm"]))
    out.append(
      line
      | (
        dict(predicted_flops=int(was.flops), predicted_seconds=was.seconds)
        if was
        else {}
      )
      | (
        dict(predicted_held=was.held, predicted_device=was.device)
        if was and was.held is not None
        else {}
      )
    )
  return out


def show(
  job: Job, arms: list[Arm], goal: Sequence[str] = pipeline.STUDY
) -> None:
  """Prints how rows are read and the plan; computes nothing on the mesh.

  Args:
    job: the run.
    arms: its arms.
    goal: what is made, as of `pipeline.run`.
  """
  c = job.c
  rows, tokens, length, sample = _sizes(c, job.kind)
  m = _model(c)
  decoder.check_model(m, job.mesh)
  rate = sustained_flops(job.mesh.devices.flat[0]) * job.mesh.size
  found = lines(job, arms, rows, tokens, goal)
  progress.say(
    f"plan (nothing computed): {', '.join(prepare.sources_of(c))}, "
    + ", ".join(f"{v:,} {k}" for k, v in rows.items())
    + f" rows of about {tokens['pool']:.0f} tokens"
  )
  for x in found:
    progress.say(
      f"  {f'{x.stage} {x.arm}'.strip():<28}{x.count:>9,} "
      f"{x.unit:<8}{x.flops:>10.2e} flops  about "
      f"{progress.duration(x.seconds)}"
    )
  total = sum(x.flops for x in found)
  progress.say(
    f"  {'in all':<28}{'':>18}{total:>10.2e} flops  about "
    f"{progress.duration(sum(x.seconds for x in found))} at an "
    f"assumed {rate / 1e9:,.0f} GFLOP/s, compiling not counted"
  )
  _show_samplers(job, arms, rows, tokens)
  if "align" not in goal:
    return
  selecting = sum(x.flops for x in _choosing(job, arms[0], rows, tokens))
  everything = aligning_all(job, m, rows["pool"], int(tokens["pool"]))
  reference = (
    ", its reference pass counted"
    if job.loss.reference and c.train.reference != "online"
    else ""
  )
  progress.say(
    f"  selecting by {arms[0].sampler} costs "
    f"{selecting / everything:.1%} of aligning on the whole pool "
    f"for {c.train.epochs:g} epochs{reference}"
  )
  policy = m._replace(lora=lora_of(c), attention=kernel_of(c, m, job.mesh))
  held = host_memory.step_memory(c, policy, job.mesh, length, job.kind)
  progress.say(f"  memory a device, training: {memory.words(held)}")
  if job.mesh.devices.flat[0].platform == "cpu":
    sizes = host_memory.row_sizes(c, job.kind, sample, tokens["pool"], length)
    line = host_memory.planned(job, policy, arms, rows["pool"], sizes)
    progress.say(f"  {line}")
  progress.say(
    f"  {decoder.parameter_count(m):,} parameters, mesh "
    f"{dict(job.mesh.shape)} of "
    f"{job.mesh.devices.flat[0].device_kind}, jax {jax.__version__}"
  )


def aligning_all(job: Job, m: decoder.ModelConfig, rows: int, t: int) -> float:
  """Operations of training on a whole pool for config.train.epochs.

  Args:
    job: the run; its loss says what it reads.
    m: sizes of the reference.
    rows: of the pool.
    t: tokens of a row.
  """
  c, answers = job.c, rows * (2 if job.kind == "pairs" else 1)
  online = c.train.reference == "online"
  trained = decoder_flops(
    m,
    t,
    passes=feed.passes(
      m._replace(lora=lora_of(c)), needs_batch_logps(job.loss), online
    ),
  )
  # A mismatched row passes through the policy and the reference, at every
  # update; the others through a stored reference once.
  mismatched = 2 if "z0" in job.loss.stats else 0
  stored = job.loss.reference and not online
  return answers * (
    c.train.epochs * trained
    + decoder_flops(m, t) * (c.train.epochs * mismatched + stored)
  )


def _choosing(
  job: Job, arm: Arm, rows: dict[str, int], tokens: dict[str, float]
) -> list[Line]:
  """The lines of all that an arm's choice takes, were it the only arm."""
  found = lines(job, [arm], rows, tokens, ("select",))
  return [x for x in found if x.stage != "sft"]


def _show_samplers(
  job: Job, arms: list[Arm], rows: dict[str, int], tokens: dict[str, float]
) -> None:
  """One line for each sampler and budget: all that choosing takes."""
  m = _model(job.c)
  width = embedder.choose(job.c, m).model.width
  for arm in {a.label: a for a in arms}.values():
    parts = _choosing(job, arm, rows, tokens)
    cost = choose.estimate(job, arm, rows["pool"], width, m.width)
    says = "what it takes itself is not known"
    if cost is not None:
      read, held = memory.size(cost.read), memory.size(cost.held)
      says = f"reads {read}, holds {held}, {memory.size(cost.device)} on the "
      says += "devices"
      if choose.hours(job, cost) > vectors.HOURS:
        says += "; a job refuses so long a choice"
    progress.say(
      f"  choosing by {arm.label}: {sum(x.flops for x in parts):.2e} "
      f"flops ({', '.join(x.stage for x in parts)}), about "
      f"{progress.duration(sum(x.seconds for x in parts))}; {says}"
    )
