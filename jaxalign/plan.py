"""The dry run: stages, sizes, memory and time, before anything is computed.

Operations follow from the shapes; token counts of files are estimated from
their characters; times are operations over an assumed sustained rate, and are
called estimates. The ledger of the finished job is what to trust.
"""

from typing import Any

import jax
import numpy as np

from jaxalign import checks
from jaxalign import embedder
from jaxalign import memory
from jaxalign import progress
from jaxalign.data import records
from jaxalign.job import Arm, Job, kernel_of, lora_of, sizes, updates_of
from jaxalign.model import decoder
from jaxalign.model import weights
from jaxalign.select.samplers import combine
from jaxalign.select.topk import budget_rows
from jaxalign.train import feed
from jaxalign.train import stats

# Sustained operations per second of one device, by the start of its kind:
# 40 % of the published bfloat16 peak; for a CPU core pair, as measured here.
RATES = {"TPU v4": 110e12, "TPU v5 lite": 79e12, "TPU v5e": 79e12,
         "TPU v5": 184e12, "TPU v6": 367e12, "NVIDIA H": 396e12,
         "NVIDIA A100": 125e12, "cpu": 30e9}
CHARACTERS_PER_TOKEN = 3.0  # of a small tokenizer on English


def rate_of(device: Any) -> float:
  """Assumed sustained operations per second of a device."""
  for start, rate in RATES.items():
    if device.device_kind.lower().startswith(start.lower()):
      return rate
  return RATES["cpu"]


def _sizes(c: Any, kind: str) -> tuple[dict[str, int], dict[str, float], int]:
  """Rows by split, mean tokens by split, and the padded length."""
  r = 2 if kind == "pairs" else 1
  if c.data.assume_rows:
    mean = min(c.data.assume_tokens or c.model.context, c.model.context)
    rows = {n: int(c.data.assume_rows * share)
            for n, share in c.data.split.to_dict().items()}
    if r == 1:
      rows["pool"] *= 2  # thumbs of pairs
    return rows, dict.fromkeys(rows, float(mean)), c.model.context
  if c.data.source == "world":
    w = c.data.world
    rows = dict(sft=w.sft_rows, held_out=w.held_out_rows,
                pool=w.pool_rows * (2 // r))
    tokens = 6.0 + w.arguments + 1 + 4.5 + w.arguments
    return rows, dict.fromkeys(rows, tokens), -(-int(tokens + 2) // 4) * 4
  loaded = records.load(
      c.data.source, schema=c.data.schema, limit=c.data.limit,
      on_bad_rows=c.data.on_bad_rows, max_bad_fraction=c.data.max_bad_fraction)
  splits = records.split(loaded.rows, c.data.split.to_dict(), c.data.seed)
  rows = {n: len(x) for n, x in splits.items()}
  if loaded.kind == "pairs" and kind == "thumbs":
    rows["pool"] *= 2
  sides = ("chosen", "rejected") if loaded.kind == "pairs" else ("completion",)
  length = [len(x["prompt"]) + len(x[s]) for x in loaded.rows for s in sides]
  mean = np.minimum(np.array(length) / CHARACTERS_PER_TOKEN,
                    c.model.context).mean()
  return rows, dict.fromkeys(rows, float(mean)), c.model.context


def show(job: Job, arms: list[Arm]) -> None:
  """Prints the plan; reads the source, computes nothing on the mesh."""
  c = job.c
  rows, tokens, length = _sizes(c, job.kind)
  if c.model.checkpoint:
    m = weights.read_config(c.model.checkpoint, c.model.dtype,
                                     c.model.remat)
  else:
    m = sizes(c, c.model.vocab_size)
  decoder.check(m, job.mesh)
  r = 2 if job.kind == "pairs" else 1
  rate = rate_of(job.mesh.devices.flat[0]) * job.mesh.size
  one = lambda split: decoder.operations(m, int(tokens[split]))
  lines = []

  def add(stage, count, unit, operations):
    lines.append((stage, count, unit, operations))

  if not c.model.checkpoint:
    add("sft", c.sft.updates, "updates",
        3 * c.sft.updates * c.sft.batch_size * one("sft"))
  chosen = embedder.choose(c, m)
  embedding = rows["pool"] * r * embedder.operations(
      chosen, int(tokens["pool"]))
  add("embed", rows["pool"] * r, "rows", embedding)
  n, k = rows["pool"] * r, c.select.mixture.components
  needs = [combine.named(a.sampler).needs
           for a in arms]
  if any("residual" in x for x in needs):  # the head's slope beside it
    add("residual", rows["pool"] * r, "rows", rows["pool"] * r * (
        one("pool") + 4 * m.vocab * m.width * int(tokens["pool"])))
  fitting = 0
  if any("log_likelihood" in x for x in needs):
    wide = chosen.model.width
    width = (max(1, min(64, n // 40, wide))
             if c.select.mixture.pca == "auto" else
             min(int(c.select.mixture.pca) or wide, wide))
    fits = c.select.mixture.starts * (2 + c.select.stability_seeds)
    fitting = 2 * n * wide ** 2 + fits * 20 * 4 * n * k * width ** 2
    add("mixture", fits, "fits", fitting)
  asked = min(c.eval.prompts, rows["held_out"])
  measured = rows["held_out"] * 2 * one("held_out") + 3 * asked * one("held_out")
  add("baseline", asked, "prompts", measured)
  for arm in arms:
    kept = budget_rows(arm.budget, rows["pool"], c.train.batch_size)
    updates = updates_of(c, arm, kept, rows["pool"])
    forward = updates * c.train.batch_size * r * one("pool")
    extra = forward if "z0" in job.loss.stats else 0
    passed = kept * r * one("pool") if chosen.alone else 0
    if extra or passed:
      add(f"ref_logps {arm.name}",
          updates * c.train.batch_size * bool(extra) + kept * r * bool(passed),
          "rows", extra + passed)
    passes = feed.passes(m._replace(lora=lora_of(c)))
    passes += stats.looks_ahead(job.loss)
    add(f"align {arm.name}", updates, "updates", passes * forward + extra)
    add(f"evaluate {arm.name}", asked, "prompts", measured)
  progress.say(f"plan (nothing computed): {c.data.source}, "
               + ", ".join(f"{v:,} {k}" for k, v in rows.items())
               + f" rows of about {tokens['pool']:.0f} tokens")
  for stage, count, unit, operations in lines:
    progress.say(f"  {stage:<28}{count:>9,} {unit:<8}"
                 f"{operations:>10.2e} operations  about "
                 f"{progress.duration(operations / rate)}")
  total = sum(x[3] for x in lines)
  progress.say(f"  {'in all':<28}{'':>18}{total:>10.2e} operations  about "
               f"{progress.duration(total / rate)} at an assumed "
               f"{rate / 1e9:,.0f} GFLOP/s, compiling not counted")
  selecting = embedding + fitting
  everything = (epochs := c.train.epochs) * rows["pool"] * r * one("pool") * (
      4 if "z0" in job.loss.stats else 3) + (
          rows["pool"] * r * one("pool") * (
              1 + (epochs if "z0" in job.loss.stats else 0)))
  progress.say(f"  selecting costs {selecting / everything:.1%} of aligning on "
               f"the whole pool for {epochs:g} epochs, its reference pass "
               "counted")
  held = checks.step_memory(c, m._replace(
      lora=lora_of(c), attention=kernel_of(c, m, job.mesh)), job.mesh, length,
                            job.kind)
  progress.say(f"  memory a device, training: {memory.words(held)}")
  progress.say(f"  {decoder.parameter_count(m):,} parameters, mesh "
               f"{dict(job.mesh.shape)} of {job.mesh.devices.flat[0].device_kind}"
               f", jax {jax.__version__}")
