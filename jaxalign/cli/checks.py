"""Every mistake that can be seen before data is read or code compiled.

`validate` needs no device: it runs before several processes join, so that
all of them end with the same line. `validate_on` needs the mesh.
"""

import math
import re
from typing import Any

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.core.settings import flatten, pick
from jaxalign.data import prepare, recipe, tokens
from jaxalign.embed import embedder, questions, row_scores, store
from jaxalign.eval import judge_kinds, while_training
from jaxalign.model import decoder, hf, memory
from jaxalign.model.job import Job, kernel_of, lora_of, sft_sizes, WHOLE
from jaxalign.select import columns, mixture
from jaxalign.select.choose import sampler_kwargs
from jaxalign.select.samplers import chains, isa, values
from jaxalign.select.topk import budget_rows
from jaxalign.study import pilot
from jaxalign.train import feed, host_memory, optim, proxies
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import loss_of
from jaxalign.train.row_columns import check_reads

# Knobs that count something there must be at least one of, or may be none.
COUNTS = (
  "sft.updates",
  "sft.save_every",
  "train.save_every",
  "embed.tile",
  "embed.shard",
  "model.layers",
  "model.width",
  "model.heads",
  "model.ff",
  "model.head_chunk",
  "eval.prompts",
  "eval.new_tokens",
  "select.mixture.starts",
  "select.mixture.reservoir",
  "train.eval_rows",
  "train.eval_prompts",
  "seeds",
  "train.min_updates",
  "proxy.updates",
  "proxy.models",
  "train.keep",
)
NOT_NEGATIVE = (
  "train.max_updates",
  "select.stability_seeds",
  "data.limit",
  "eval.temperature",
  "train.clip",
  "lora.rank",
  "train.ref_sync",
  "train.eval_every",
  "train.stop_after",
  "train.explode",
  "ask.context",
  "judge.prompts",
  "judge.labels",
  "train.weight_decay",
)
SHARES = ("train.b2",)  # in [0, 1): 1 keeps all for ever
PARTS = (
  "data.world.redundancy",
  "data.world.flips",
  "data.world.junk",
  "data.max_bad_fraction",
  "data.split",
  "train.warmup_ratio",
  "train.ref_mix",
)  # in [0, 1]
CHOICES = {
  "select.order": (*isa.ORDERS, isa.SOFT),
  "select.pair_score": values.SIDES,
  "select.mixture.covariance": mixture.COVARIANCES,
  "model.param_dtype": decoder.DTYPES,
  "embed.store_dtype": store.DTYPES,
  "train.optimizer": tuple(optim.OPTIMIZERS),
  "train.reference": ("stored", "online"),
  "train.layout": tuple(feed.LAYOUTS),
  "train.logps": tuple(PRODUCERS),
}


# Knobs that are lists, of what; a config file or a flag may hold anything.
LISTS = {
  "compare": str,
  "train.trackers": str,
  "train.eval_sets": str,
  "lora.targets": str,
  "budgets": float,
  "pilot.budgets": float,
  "profile.steps": int,
  "data.caps": int,
  "data.assume": int,
  "data.skip": str,
  "data.weights": float,
}
# Numbers whose own checks say more than "is no finite number".
TOLD = (
  "select.budget",
  "budgets",
  "pilot.budgets",
  "train.lr",
  "sft.lr",
  *SHARES,
)
LARGEST = 1 << 53  # of a whole number: beyond, a float loses count
# How many there may be of what a plan lists one by one, or draws.
MOST = {"seeds": 10_000, "pilot.seeds": 10_000}


def _check_kinds(c: Any) -> None:
  """Raises ConfigError for a value that is not of its knob's kind.

  It goes over the whole config: a knob added later is looked at too.
  """
  for name, value in flatten(c, "").items():
    kind = LISTS.get(name)
    if kind and (
      not isinstance(value, (list, tuple))
      or not all(
        isinstance(x, (int, float) if kind is float else kind)
        and not isinstance(x, bool)
        for x in value
      )
    ):
      raise ConfigError(
        f"{name}={_shown(value)}, wanted a list of "
        + {str: "names", float: "numbers", int: "whole numbers"}[kind]
        + f"; set config.{name}"
      )
    for x in value if isinstance(value, (list, tuple)) else (value,):
      if not isinstance(x, (int, float)) or isinstance(x, bool):
        continue
      if isinstance(x, float) and not math.isfinite(x):
        if name not in TOLD or name.endswith("lr") and not math.isnan(x):
          raise ConfigError(
            f"{name}={x}, wanted a finite number; set config.{name}"
          )
      elif isinstance(x, int) and abs(x) > LARGEST:
        raise ConfigError(
          f"{name}={_shown(x)}, wanted a whole number of at "
          f"most {LARGEST:,}; set config.{name}"
        )
      elif name.rpartition(".")[2] == "seed" and not 0 <= x < 1 << 32:
        raise ConfigError(
          f"{name}={x}, wanted a seed from 0 to "
          f"{(1 << 32) - 1:,}; set config.{name}"
        )
      elif name in MOST and x > MOST[name]:
        raise ConfigError(
          f"{name}={x:,}, wanted {MOST[name]:,} or fewer; set config.{name}"
        )


def _shown(value: Any) -> str:
  """A value as it may stand in a line of error."""
  text = repr(value)
  return text if len(text) <= 100 else f"{text[:100]}..."


def _check_values(c: Any) -> None:
  """Raises ConfigError for a knob whose value can never work."""
  _check_kinds(c)
  for least, names in ((1, COUNTS), (0, NOT_NEGATIVE)):
    for name, value in pick(c, *names).items():
      if not value >= least:
        raise ConfigError(
          f"{name}={value}, wanted {least} or more; set config.{name}"
        )
  for name, value in pick(c, *SHARES).items():
    if not 0 <= value < 1:
      raise ConfigError(
        f"{name}={value}, wanted a decay in [0, 1); set config.{name}"
      )
  for name, value in pick(c, *PARTS).items():
    if not 0 <= value <= 1:
      raise ConfigError(
        f"{name}={value}, wanted a share from 0 to 1; set config.{name}"
      )
  pca = str(c.select.mixture.pca)
  if pca != "auto" and not re.fullmatch("[0-9]{1,9}", pca):
    raise ConfigError(
      f"select.mixture.pca={_shown(pca)}, wanted auto or a "
      "number of directions (0: all); set "
      "config.select.mixture.pca"
    )
  if c.model.width % c.model.heads:
    raise ConfigError(
      f"model.width={c.model.width} is no multiple of "
      f"model.heads={c.model.heads}; set one of them"
    )
  if c.data.assume and (len(c.data.assume) != 2 or min(c.data.assume) < 0):
    raise ConfigError(
      f"data.assume={tuple(c.data.assume)}, wanted (rows, tokens of a row), "
      "0 tokens for the context; set config.data.assume"
    )
  if unknown := set(c.data.skip) - {"tied", "contradicting"}:
    raise ConfigError(
      f"data.skip has {', '.join(sorted(unknown))}, wanted tied or "
      "contradicting; set config.data.skip"
    )
  steps = tuple(c.profile.steps)
  if len(steps) != 2 or steps != (0, 0) and not 0 <= steps[0] < steps[1]:
    raise ConfigError(
      f"profile.steps={steps}, wanted the first step to trace "
      "and, above it, the one after the last, or (0, 0); set "
      "config.profile.steps"
    )
  mixture.components_of(c.select.mixture.components)
  for name, known in CHOICES.items():
    value = pick(c, name)[name]
    if value not in known:
      raise ConfigError(
        f"{name}={value!r} is unknown, wanted one of "
        f"{', '.join(known)}; set config.{name}"
      )
  budgets = (*c.pilot.budgets, *c.budgets)
  if c.select.budget != pilot.AUTO:
    budgets += (c.select.budget,)
  pilot.check(c)
  for budget in budgets:
    if not budget > 1 or budget % 1:
      budget_rows(float(budget), 1 << 40)  # rows: once the pool is read
  if 0 < c.train.max_updates < c.train.min_updates:
    raise ConfigError(
      f"train.min_updates={c.train.min_updates} is above "
      f"train.max_updates={c.train.max_updates}; set one of "
      "them"
    )
  if not (context := prepare.asked_context(c)):
    return  # the data stage chooses it
  room = context - tokens.LEAST_CONTEXT + 1
  if room < 1:
    raise ConfigError(
      f"model.context={context} holds no prompt and "
      f"response, wanted {tokens.LEAST_CONTEXT} or more;"
      " set config.model.context"
    )
  if c.eval.new_tokens > room:
    raise ConfigError(
      f"eval.new_tokens={c.eval.new_tokens} leaves no room for "
      f"a prompt in model.context={context}, wanted "
      f"{room} or less; set one of them"
    )


def _check_columns(c: Any, name: str, kind: str, knob: str) -> None:
  """Raises ConfigError for a sampler that reads what no stage makes."""
  sampler = chains.named(name, knob)
  if lacking := columns.lacking(c, kind, sampler):
    why = "; ".join(f"{n}: {w}" for n, w in lacking.items() if w)
    raise ConfigError(
      f"sampler {name!r} reads {', '.join(lacking)}, which no stage of this "
      f"job makes{why and f' ({why})'}; it works on arrays of your own "
      f"(jaxalign.select.samplers), or set config.{knob}"
    )
  if sampler.pairs and kind == "unpaired":
    raise ConfigError(
      f"sampler {name!r} compares the two answers of a pair, "
      f"and {c.loss.name!r} takes single answers; set "
      f"config.{knob} or config.loss.name"
    )


def _check_stages(c: Any, kind: str, m: decoder.ModelConfig) -> None:
  """Raises ConfigError for knobs of the stages that samplers read."""
  asked = {
    stage
    for name in (c.select.sampler, *c.compare)
    if name not in WHOLE
    for stage in columns.stages(c, kind, chains.named(name))
  }
  if "ask" in asked:
    questions.check(c.ask.question)
    row_scores.judge_config(c, m)
  if "rewards" in asked:
    row_scores.reward_config(c)
  if asked & {"proxy", "held_out"}:
    if not c.proxy.pairs > 0:
      raise ConfigError(
        f"proxy.pairs={c.proxy.pairs}, wanted more than 0; set "
        "config.proxy.pairs"
      )
    proxies.check(c)
    _check_recipe(c.train, c.proxy.lr)  # theirs, but for the rate


def validate(c: Any, planned: bool = False, trains: bool = True) -> None:
  """Every mistake that the config and the files it names show by themselves.

  It touches no device: `jax.distributed.initialize` may come after it.

  Args:
    c: the config.
    planned: nothing will run: a source of assumed size and a tokenizer that
      cannot be had are no mistakes.
    trains: whether the job aligns a policy; selection alone does not, and
      needs no loss, no batch and no learning rate.
  """
  recipe.settle(c)
  _check_values(c)
  if not (planned and c.data.assume):
    prepare.check_source(c)
  judge_kinds.check_judge(c)
  sampler = chains.named(c.select.sampler)
  sampler_kwargs(c, sampler)
  _check_columns(c, c.select.sampler, loss_of(c).kind, "select.sampler")
  if "subset" in sampler.needs:
    raise ConfigError(
      f"sampler {c.select.sampler!r} copies another arm, the "
      "chosen sampler's; name it in config.compare and another "
      "in config.select.sampler"
    )
  loss = loss_of(c)
  if trains:
    _check_alignment(c, loss)
  m = _model(c, planned)
  decoder.check_model(m, sharding.nowhere())
  embedder.choose(c, m._replace(lora=None))
  optim.make_schedule(
    lr=c.sft.lr, updates=10, schedule="cosine", warmup_ratio=0.05
  )
  if trains:
    _check_recipe(c.train, c.train.lr)
  _check_stages(c, loss.kind, m._replace(lora=None))


def _check_recipe(t: Any, lr: float) -> None:
  """Raises ConfigError for a batch or a schedule that cannot be."""
  feed.check_divides(t.batch_size, t.accumulation, "config.train")
  optim.make_schedule(
    lr=lr, updates=10, schedule=t.schedule, warmup_ratio=t.warmup_ratio
  )


def _check_alignment(c: Any, loss: Any) -> None:
  """Raises ConfigError for what cannot align: a loss, an arm, a rate."""
  if loss.kind == "rows":
    raise ConfigError(
      f"loss {c.loss.name!r} prefers nothing: it cannot align; "
      "set config.loss.name"
    )
  check_reads(loss, c.loss.name)
  if "z0" in loss.stats and c.train.batch_size < 2:
    raise ConfigError(
      f"loss {c.loss.name!r} mismatches the answers of a "
      f"batch; train.batch_size={c.train.batch_size}, wanted "
      "2 or more"
    )
  for name in c.compare:
    if name not in WHOLE:
      _check_columns(c, name, loss.kind, "compare")
  while_training.check_evaluations(c)
  if c.train.epochs <= 0:
    raise ConfigError(f"train.epochs={c.train.epochs}, wanted more than 0")


def validate_on(
  job: Job, *, planned: bool = False, force: bool = False, trains: bool = True
) -> None:
  """Every mistake that shows once the mesh is known.

  Args:
    job: the run.
    planned: as of `validate`.
    force: a step that cannot fit the devices is no mistake.
    trains: as of `validate`.
  """
  c, job.force = job.c, force
  feed.check_batch(c.sft.batch_size, 1, job.mesh, "config.sft")
  asked = {
    stage
    for name in (c.select.sampler, *c.compare)
    if name not in WHOLE
    for stage in columns.stages(c, job.kind, chains.named(name))
  }
  if trains or asked & {"proxy", "held_out"}:
    feed.check_batch(
      c.train.batch_size, c.train.accumulation, job.mesh, "config.train"
    )
  m = _model(c, planned)
  m = m._replace(attention=kernel_of(c, m, job.mesh))
  decoder.check_model(m, job.mesh)
  if trains and (context := prepare.asked_context(c)):
    memory.check_fits(
      host_memory.step_memory(c, m, job.mesh, context, job.kind),
      job.mesh.devices.flat[0],
      force,
    )


def _model(c: Any, planned: bool) -> decoder.ModelConfig:
  """The model's sizes; raises where it cannot be read or exported."""
  m, tokenizer = None, None
  if c.model.checkpoint:
    m = hf.read_config(c.model.checkpoint, c.model.dtype, c.model.remat)
    prepare.context_of(c, m.context)
    if not planned:
      hf.digest_names(c.model.checkpoint)
  try:
    tokenizer = prepare.given_tokenizer(c)
  except ConfigError:
    if not planned or m is None:
      raise
  if tokenizer is not None:
    tokenizer.check_export()
    if m is not None and tokenizer.vocab_size > m.vocab:
      raise ConfigError(
        f"the tokenizer has {tokenizer.vocab_size} pieces, the "
        f"checkpoint {m.vocab} embeddings; set "
        "config.model.tokenizer"
      )
  pieces = tokenizer.vocab_size if tokenizer else c.model.vocab_size
  return (m or sft_sizes(c, pieces))._replace(lora=lora_of(c))
