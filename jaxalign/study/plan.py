"""The dry run: stages, sizes, memory and time, before anything is computed.

Flops follow from the shapes; token counts of files are estimated from their
characters; times are flops over an assumed sustained rate, and are called
estimates. The ledger of the finished job is what to trust.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import pipeline
from jaxalign.core.devices import sustained_flops
from jaxalign.core.progress import duration, say
from jaxalign.core.stage import JobSizes, required
from jaxalign.data import build_data, prepare, sources
from jaxalign.data.tokens import context_for
from jaxalign.embed import embedder
from jaxalign.model import decoder, memory
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Arm, given_model, Job, kernel_of, lora_of, sizes
from jaxalign.select import choose
from jaxalign.select.samplers import vectors
from jaxalign.train import host_memory
from jaxalign.train.host_memory import CHARACTERS_PER_TOKEN
from jaxalign.train.statistics import needs_batch_logps
from jaxalign.train.training_cost import row_passes


class DataSizes(NamedTuple):
  """How many rows of how many tokens a job will have."""

  rows: dict[str, int]  # records by split
  tokens: dict[str, float]  # mean of a row, by split
  length: int = 0  # of a padded row
  sample: Sequence[dict[str, Any]] = ()  # of the pool, where a source was read


def _sizes(c: Any, kind: str) -> DataSizes:
  """As assumed, as the world makes them, or estimated from the source."""
  unpaired = 2 if kind == "unpaired" else 1  # rows of a pair
  if c.data.assume:
    context = prepare.requested_context(c) or _model(c).context
    mean = min(c.data.assume[1] or context, context)
    fractions = prepare.split_fractions(c)
    rows = {n: int(c.data.assume[0] * x) for n, x in fractions.items()}
    rows["pool"] *= unpaired
    return DataSizes(rows, dict.fromkeys(rows, float(mean)), context)
  if prepare.is_world(c):
    w = c.data.world
    rows = {n: w[f"{n}_rows"] for n in build_data.SPLITS}
    rows["pool"] *= unpaired
    tokens = 6.0 + w.arguments + 1 + 4.5 + w.arguments
    padded = -(-int(tokens + 2) // 4) * 4
    return DataSizes(rows, dict.fromkeys(rows, tokens), padded)
  found, remarks = build_data.preview(c, _model(c).context)
  for line in remarks:
    say(f"  {line}")
  rows = _all_rows(c, found)
  if found.kind == "pairs":
    rows["pool"] *= unpaired
  texts = [
    len(x["prompt"]) + len(x[s])
    for x in [*found.splits["pool"], *found.splits["held_out"]]
    for s in ("chosen", "rejected", "completion")
    if s in x
  ]
  length = np.array(texts) / CHARACTERS_PER_TOKEN
  context = prepare.requested_context(c) or context_for(
    length.astype(np.int64), _model(c).context
  )
  mean = float(np.minimum(length, context).mean())
  return DataSizes(
    rows, dict.fromkeys(rows, mean), context, found.splits["pool"]
  )


def _all_rows(c: Any, found: build_data.SplitRows) -> dict[str, int]:
  """Records by split of the whole source, of which the first rows were read."""
  rows, read = (
    {n: len(x) for n, x in found.splits.items()},
    found.summary["seen"],
  )
  names = prepare.sources_of(c)
  counted = [sources.count_rows(name, build_data.PEEKED) for name in names]
  total = sum(n for n, _ in counted)
  if c.data.limit:
    total = min(total, c.data.limit * len(names))
  if total <= read:
    return rows
  about = "" if all(exact for _, exact in counted) else "about "
  say(
    f"  read the first {read:,} rows; the source holds {about}{total:,}, and "
    "the plan counts on them all"
  )
  return {n: int(x * total / read) for n, x in rows.items()}


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
    return given_model(c)
  return sizes(c, c.model.vocab_size)


def _rate(job: Job) -> float:
  return sustained_flops(job.mesh.devices.flat[0]) * job.mesh.size


def plan_lines(
  job: Job,
  arms: list[Arm],
  sizes: DataSizes,
  goal: Sequence[str] = pipeline.STUDY,
) -> list[Line]:
  """The stages of a job in their order, with what each is expected to take.

  Args:
    job: the run.
    arms: its arms.
    sizes: its rows and their tokens.
    goal: what is made, as of `pipeline.run`.
  """
  stages = required(job, arms, pipeline.reached(job, goal))
  shared = frozenset(stage.name for stage, arm in stages if arm is None)
  z = JobSizes(job, sizes.rows, sizes.tokens, _model(job.c), shared)
  out = []
  for stage, arm in stages:
    price = stage.price(z, arm) if stage.price else None
    if price is not None:
      if price.seconds is None:
        price = price._replace(seconds=price.flops / _rate(job))
      out.append(Line(stage.name, arm.name if arm else "", *price))
  return out


def with_predictions(
  job: Job, arms: list[Arm], ledger: list[dict[str, Any]]
) -> list[dict[str, Any]]:
  """The ledger's lines with what was predicted for them, where it was.

  Predicted from the sizes that the data turned out to have, at the assumed
  rate of the devices: `predicted_flops` and `predicted_seconds`, and of
  a selection `predicted_held` and `predicted_device`, bytes.
  """
  splits = {n: job.tokens(n) for n in ("sft", "pool", "held_out")}
  rows = {n: len(job.column(n, "id")) for n in splits}
  tokens = {n: len(x.ids) / max(1, len(x.start)) for n, x in splits.items()}
  lines = plan_lines(job, arms, DataSizes(rows, tokens))
  planned = {(x.stage, x.arm): x for x in lines}
  out = []
  for line in ledger:
    more: dict[str, Any] = {}
    if x := planned.get((line["stage"], line["arm"])):
      more = dict(predicted_flops=int(x.flops), predicted_seconds=x.seconds)
      if x.held is not None:
        more |= dict(predicted_held=x.held, predicted_device=x.device)
    out.append(line | more)
  return out


def show_plan(
  job: Job, arms: list[Arm], goal: Sequence[str] = pipeline.STUDY
) -> None:
  """Prints how rows are read and the plan; computes nothing on the mesh.

  Args:
    job: the run.
    arms: its arms.
    goal: what is made, as of `pipeline.run`.
  """
  c, z, m = job.c, _sizes(job.c, job.kind), _model(job.c)
  decoder.check_model(m, job.mesh)
  lines = plan_lines(job, arms, z, goal)
  rows = ", ".join(f"{v:,} {k}" for k, v in z.rows.items())
  say(
    f"plan (nothing computed): {', '.join(prepare.sources_of(c))}, {rows} "
    f"rows of about {z.tokens['pool']:.0f} tokens"
  )
  for x in lines:
    name = f"{x.stage} {x.arm}".strip()
    say(
      f"  {name:<27} {x.count:>9,} {x.unit:<8}{x.flops:>10.2e} flops  about "
      f"{duration(x.seconds)}"
    )
  say(
    f"  {'in all':<28}{'':>18}{sum(x.flops for x in lines):>10.2e} flops  "
    f"about {duration(sum(x.seconds for x in lines))} at an assumed "
    f"{_rate(job) / 1e9:,.0f} GFLOP/s, compiling not counted"
  )
  for line in _sampler_lines(job, arms, z, m):
    say(line)
  if "align" in goal:
    for line in _training_lines(job, arms, z, m):
      say(line)


def _training_lines(
  job: Job, arms: list[Arm], z: DataSizes, m: decoder.ModelConfig
) -> Iterator[str]:
  """What selecting saves of aligning on the pool, and memory."""
  c, device = job.c, job.mesh.devices.flat[0]
  selecting = sum(x.flops for x in _selecting(job, arms[0], z))
  everything = aligning_all(job, m, z.rows["pool"], int(z.tokens["pool"]))
  ahead = job.loss.reference and c.train.reference != "online"
  yield (
    f"  selecting by {arms[0].sampler} costs {selecting / everything:.1%} of "
    f"aligning on the whole pool for {c.train.epochs:g} epochs"
    + ", its reference pass counted"
    * ahead
  )
  policy = m._replace(lora=lora_of(c), attention=kernel_of(c, m, job.mesh))
  held = host_memory.step_memory(c, policy, job.mesh, z.length, job.kind)
  yield f"  memory a device, training: {memory.words(held)}"
  if device.platform == "cpu":
    bytes_of = host_memory.row_sizes(
      c, job.kind, z.sample, z.tokens["pool"], z.length
    )
    words = host_memory.planned(job, policy, arms, z.rows["pool"], bytes_of)
    yield f"  {words}"
  yield (
    f"  {decoder.parameter_count(m):,} parameters, mesh "
    f"{dict(job.mesh.shape)} of {device.device_kind}, jax {jax.__version__}"
  )


def aligning_all(job: Job, m: decoder.ModelConfig, rows: int, t: int) -> float:
  """Flops of training on a whole pool for config.train.epochs.

  Args:
    job: the run; its loss says what it reads.
    m: sizes of the reference.
    rows: of the pool.
    t: tokens of a row.
  """
  c, answers = job.c, rows * (2 if job.kind == "pairs" else 1)
  online, policy = c.train.reference == "online", m._replace(lora=lora_of(c))
  passes = row_passes(policy, needs_batch_logps(job.loss), online)
  # A mismatched row passes through the policy and the reference, at every
  # update; the others through a stored reference once.
  mismatched = 2 if "z0" in job.loss.stats else 0
  stored = job.loss.reference and not online
  return answers * (
    c.train.epochs * decoder_flops(m, t, passes=passes)
    + decoder_flops(m, t) * (c.train.epochs * mismatched + stored)
  )


def _selecting(job: Job, arm: Arm, z: DataSizes) -> list[Line]:
  """The lines of all that an arm's selection takes, were it the only arm."""
  lines = plan_lines(job, [arm], z, ("select",))
  return [x for x in lines if x.stage != "sft"]


def _sampler_lines(
  job: Job, arms: list[Arm], z: DataSizes, m: decoder.ModelConfig
) -> Iterator[str]:
  """One line for each sampler and budget: all that selecting takes."""
  width = embedder.choose(job.c, m).model.width
  for arm in {a.label: a for a in arms}.values():
    lines = _selecting(job, arm, z)
    cost = choose.estimate(job, arm, z.rows["pool"], width, m.width)
    own = "what it takes itself is not known"
    if cost is not None:
      read, held = memory.size(cost.read), memory.size(cost.held)
      own = f"reads {read}, holds {held}, {memory.size(cost.device)} on the "
      own += "devices"
      if choose.hours(job, cost) > vectors.HOURS:
        own += "; a job refuses so long a selection"
    yield (
      f"  choosing by {arm.label}: {sum(x.flops for x in lines):.2e} flops "
      f"({', '.join(x.stage for x in lines)}), about "
      f"{duration(sum(x.seconds for x in lines))}; {own}"
    )
