"""The dry run: stages, sizes, memory and time, before anything is computed.

Operations follow from the shapes; token counts of files are estimated from
their characters; times are flops over an assumed sustained rate, and are
called estimates. The ledger of the finished job is what to trust.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.core import devices, progress
from jaxalign.core.devices import sustained_flops
from jaxalign.data import build_data, prepare, sources
from jaxalign.data import tokens as tokens_lib
from jaxalign.embed import embedder, over_pool, row_scores
from jaxalign.embed import passes as embed
from jaxalign.eval import while_training
from jaxalign.model import decoder, hf, memory
from jaxalign.model.flops import decoder_flops, reward_flops
from jaxalign.model.job import Arm, Job, kernel_of, lora_of, sizes
from jaxalign.select import choose, columns, costs, fit_mixture, mixture
from jaxalign.select.samplers import chains, vectors
from jaxalign.select.topk import budget_rows
from jaxalign.train import feed, host_memory, proxies
from jaxalign.train.host_memory import CHARACTERS_PER_TOKEN
from jaxalign.train.ref_logps import updates_of
from jaxalign.train.statistics import needs_batch_logps

READING = 1e9  # bytes a second from a disk
SECONDS_A_ROW = 3e-5  # of the select stage: ids hashed, rows written
TRAINING = ("baseline", "ref_logps", "align", "evaluate")


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
  return sizes(c, c.model.vocab_size)


def lines(
  job: Job, arms: list[Arm], rows: dict[str, int], tokens: dict[str, float]
) -> list[Line]:
  """The stages of a job in their order, with what each is expected to take.

  Args:
    job: the run.
    arms: its arms.
    rows: records by split.
    tokens: mean tokens of a row, by split.
  """
  c, m = job.c, _model(job.c)
  r = 2 if job.kind == "pairs" else 1
  rate = sustained_flops(job.mesh.devices.flat[0]) * job.mesh.size
  one = lambda split: decoder_flops(m, int(tokens[split]))
  out = []

  def add(stage, count, unit, flops, arm="", seconds=None, **held):
    out.append(
      Line(
        stage,
        arm,
        count,
        unit,
        flops,
        flops / rate if seconds is None else seconds,
        **held,
      )
    )

  if not c.model.checkpoint:
    add(
      "sft",
      c.sft.updates,
      "updates",
      3 * c.sft.updates * c.sft.batch_size * one("sft"),
    )
  chosen = embedder.choose(c, m)
  answers, t = rows["pool"] * r, int(tokens["pool"])
  samplers = {a.sampler: chains.named(a.sampler) for a in arms}
  asked = {
    *columns.before(
      c,
      [
        stage
        for sampler in samplers.values()
        for stage in columns.stages(c, job.kind, sampler)
      ],
    )
  }
  # An arm of all rows alone, as of jaxalign.train, embeds nothing.
  alone = len(arms) == 1 and arms[0].is_all
  ran = [*([] if alone else ["embed"]), *asked]
  for stage, each in _passes(c, m, chosen, ran, t).items():
    add(stage, answers, "rows", answers * each)
  scoring = {  # what a column of the pool takes, beside those passes
    "alone": lambda: answers * decoder_flops(m, t // 2 + 1),
    "ask": lambda: _ask(c, m, answers, t),
    "rewards": lambda: answers * reward_flops(row_scores.reward_config(c), t),
    "proxy": lambda: _tuning(c, m, rows["pool"], t, 1, c.proxy.updates),
    "held_out": lambda: _tuning(
      c,
      m,
      rows["pool"],
      t,
      c.proxy.models,
      -(-rows["pool"] // 2 // c.train.batch_size),
    ),
  }
  for stage, flops in scoring.items():
    if stage in asked:
      add(stage, answers, "rows", flops())
  if any("log_likelihood" in x.needs for x in samplers.values()):
    k = mixture.components_of(c.select.mixture.components)
    starts = 1 if k == mixture.LABELS else c.select.mixture.starts
    k, wide = 2 if k == mixture.LABELS else k, chosen.model.width
    width = (
      max(1, min(64, answers // 40, wide))
      if c.select.mixture.pca == "auto"
      else min(int(c.select.mixture.pca) or wide, wide)
    )
    fits = starts * (2 + fit_mixture.refits(c))
    add(
      "mixture",
      fits,
      "fits",
      2 * answers * wide**2 + fits * 20 * 4 * answers * k * width**2,
    )
  asked = min(c.eval.prompts, rows["held_out"])
  measured = (2 * rows["held_out"] + 3 * asked) * one("held_out")
  add("baseline", asked, "prompts", measured)
  for arm in arms:
    kept = budget_rows(arm.budget, rows["pool"], c.train.batch_size)
    if (cost := sampling(job, arm, rows["pool"], chosen, m)) is not None:
      add(
        "select",
        rows["pool"],
        "rows",
        cost.flops,
        arm.name,
        devices.seconds_for(cost.flops, cost.on_host, job.mesh)
        + cost.read / READING
        + rows["pool"] * SECONDS_A_ROW,
        held=cost.held,
        device=cost.device,
      )
    updates = updates_of(c, arm, kept, rows["pool"])
    forward = updates * c.train.batch_size * r * one("pool")
    online = c.train.reference == "online"  # the reference's pass is align's
    extra = forward if "z0" in job.loss.stats else 0
    stored = 0 if online else extra
    source = columns.sums(c, job.kind, samplers[arm.sampler])
    passed = (
      0
      if (online or not job.loss.reference or source in ran)
      else kept * r * one("pool")
    )
    if stored or passed:
      add(
        "ref_logps",
        updates * c.train.batch_size * bool(stored) + kept * r * bool(passed),
        "rows",
        stored + passed,
        arm.name,
      )
    trained = decoder_flops(
      m,
      int(tokens["pool"]),
      passes=feed.passes(
        m._replace(lora=lora_of(c)), needs_batch_logps(job.loss), online
      ),
    )
    seen = while_training.planned(
      c,
      updates,
      dict(held_out=rows["held_out"], kept=kept, rest=rows["pool"] - kept),
      dict(held_out=2, pool=r),
    )  # as in `measured`
    add(
      "align",
      updates,
      "updates",
      updates * c.train.batch_size * r * trained
      + (1 + online) * extra
      + sum(n * one(split) for split, n in seen.items()),
      arm.name,
    )
    add("evaluate", asked, "prompts", measured, arm.name)
  return out


def _passes(
  c: Any,
  m: decoder.ModelConfig,
  chosen: embedder.Embedder,
  names: list[str],
  t: int,
) -> dict[str, float]:
  """Operations of a row of t tokens in the stages of `passes.KEEPS`.

  What the reference runs is one pass; each stage has what it adds.
  """
  found = over_pool.shares(
    c, names, lambda outputs: embed.row_flops(m, t, outputs, c.embed.layers)
  )
  for name in (n for n in names if not over_pool.by_reference(c, n)):
    texts = embedder.of_answers(chosen) if name == "answer" else chosen
    found[name] = embedder.flops(chosen, t // 2 + 1 if texts.answers else t)
  return {n: found[n] for n in over_pool.KEEPS if n in found}


def _ask(c: Any, m: decoder.ModelConfig, answers: int, t: int) -> float:
  """Of P(yes): the question, two pairs of fences and the row, one logit."""
  judge = row_scores.judge_config(c, m)
  asked = t + (len(c.ask.question) + 4 * 16) / CHARACTERS_PER_TOKEN
  return answers * decoder_flops(judge, min(int(asked), judge.context), 1)


def _tuning(
  c: Any, m: decoder.ModelConfig, pairs: int, t: int, models: int, updates: int
) -> float:
  """Of tuned proxies: three passes of every update, one over the pool each."""
  proxy = proxies.config_of(c, m)._replace(lora=lora_of(c))
  row = decoder_flops(proxy, t)
  trained = decoder_flops(proxy, t, passes=feed.passes(proxy))
  before = 0 if columns.tuned(c) else 2 * pairs * row
  return before + models * 2 * (
    pairs * row + updates * c.train.batch_size * trained
  )


def sampling(
  job: Job,
  arm: Arm,
  pool: int,
  chosen: embedder.Embedder,
  m: decoder.ModelConfig,
) -> costs.Estimate | None:
  """What an arm's sampler takes; None for one that says nothing."""
  return choose.estimate(job, arm, pool, chosen.model.width, m.width)


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


def show(job: Job, arms: list[Arm], trains: bool = True) -> None:
  """Prints how rows are read and the plan; computes nothing on the mesh.

  Args:
    job: the run.
    arms: its arms.
    trains: false of selection alone, which ends with the chosen rows.
  """
  c = job.c
  rows, tokens, length, sample = _sizes(c, job.kind)
  m = _model(c)
  decoder.check_model(m, job.mesh)
  rate = sustained_flops(job.mesh.devices.flat[0]) * job.mesh.size
  found = [
    x
    for x in lines(job, arms, rows, tokens)
    if trains or x.stage not in TRAINING
  ]
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
  _show_samplers(job, arms, rows["pool"], tokens["pool"], m, found)
  if not trains:
    return
  selecting = sum(
    x.flops for x in _choosing(job, arms[0], found, m, tokens["pool"])
  )
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
  job: Job, arm: Arm, found: list[Line], m: decoder.ModelConfig, tokens: float
) -> list[Line]:
  """The lines of all that an arm's choice takes, were it the only arm."""
  sampler = chains.named(arm.sampler)
  read = columns.before(
    job.c,
    [
      *columns.stages(job.c, job.kind, sampler),
      *["mixture"] * ("log_likelihood" in sampler.needs),
    ],
  )
  alone = _passes(
    job.c,
    m,
    embedder.choose(job.c, m),
    [n for n in read if n in over_pool.KEEPS],
    int(tokens),
  )
  rate = sustained_flops(job.mesh.devices.flat[0]) * job.mesh.size
  return [
    x
    if x.stage not in alone
    else x._replace(
      flops=x.count * alone[x.stage], seconds=x.count * alone[x.stage] / rate
    )
    for x in found
    if not x.arm
    and x.stage in read
    or x.stage == "select"
    and x.arm == arm.name
  ]


def _show_samplers(
  job: Job,
  arms: list[Arm],
  pool: int,
  tokens: float,
  m: decoder.ModelConfig,
  found: list[Line],
) -> None:
  """One line for each sampler and budget: all that choosing takes."""
  chosen = embedder.choose(job.c, m)
  for arm in {a.label: a for a in arms}.values():
    parts = _choosing(job, arm, found, m, tokens)
    cost = sampling(job, arm, pool, chosen, m)
    says = (
      "what it takes itself is not known"
      if cost is None
      else f"reads {memory.size(cost.read)}, holds {memory.size(cost.held)}, "
      f"{memory.size(cost.device)} on the devices"
      + (
        "; a job refuses so long a choice"
        if choose.hours(job, cost) > vectors.HOURS
        else ""
      )
    )
    progress.say(
      f"  choosing by {arm.label}: {sum(x.flops for x in parts):.2e} "
      f"flops ({', '.join(x.stage for x in parts)}), about "
      f"{progress.duration(sum(x.seconds for x in parts))}; {says}"
    )
