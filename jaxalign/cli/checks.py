"""Every mistake that can be seen before data is read or code compiled.

`validate` needs no device: it runs before several processes join, so that
all of them end with the same line. `validate_on` needs the mesh.
"""

from typing import Any

from jaxalign.cli.knobs import check_knobs
from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.data import prepare, recipe
from jaxalign.embed import embedder, questions, row_scores
from jaxalign.eval import judge_kinds, while_training
from jaxalign.model import decoder, hf, memory
from jaxalign.model.job import (
  given_model,
  Job,
  kernel_of,
  lora_of,
  sizes,
  WHOLE,
)
from jaxalign.select import columns
from jaxalign.select.choose import sampler_kwargs
from jaxalign.select.samplers import chains
from jaxalign.train import feed, host_memory, optim, proxies
from jaxalign.train.losses import loss_of
from jaxalign.train.row_columns import check_reads


def _check_columns(c: Any, name: str, kind: str, knob: str) -> None:
  """Raises ConfigError for a sampler that reads what no stage makes."""
  sampler = chains.find_sampler(name, knob)
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


def _stages_read(c: Any, kind: str) -> set[str]:
  """The stages that the samplers of a config read."""
  return {
    stage
    for name in (c.select.sampler, *c.compare)
    if name not in WHOLE
    for stage in columns.stages(c, kind, chains.find_sampler(name))
  }


def _check_stages(c: Any, kind: str, m: decoder.ModelConfig) -> None:
  """Raises ConfigError for knobs of the stages that samplers read."""
  read = _stages_read(c, kind)
  if "ask" in read:
    questions.check_question(c.ask.question)
    row_scores.judge_config(c, m)
  if "rewards" in read:
    row_scores.reward_config(c)
  if read & {"proxy", "held_out"}:
    if not c.proxy.pairs > 0:
      raise ConfigError(
        f"proxy.pairs={c.proxy.pairs}, wanted more than 0; set "
        "config.proxy.pairs"
      )
    proxies.check_proxies(c)
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
  check_knobs(c)
  if not (planned and c.data.assume):
    prepare.check_source(c)
  judge_kinds.check_judge(c)
  loss, sampler = loss_of(c), chains.find_sampler(c.select.sampler)
  sampler_kwargs(c, sampler)
  _check_columns(c, c.select.sampler, loss.kind, "select.sampler")
  if "subset" in sampler.needs:
    raise ConfigError(
      f"sampler {c.select.sampler!r} copies another arm, the "
      "chosen sampler's; name it in config.compare and another "
      "in config.select.sampler"
    )
  if trains:
    _check_alignment(c, loss)
  m = _model(c, planned)
  decoder.check_model(m, sharding.nowhere())
  frozen = m._replace(lora=None)
  embedder.choose(c, frozen)
  optim.make_schedule(
    lr=c.sft.lr, updates=10, schedule="cosine", warmup_ratio=0.05
  )
  if trains:
    _check_recipe(c.train, c.train.lr)
  _check_stages(c, loss.kind, frozen)


def _check_recipe(t: Any, lr: float) -> None:
  """Raises ConfigError for a batch or a schedule that cannot be."""
  feed.check_batch(t.batch_size, t.accumulation, None, "config.train")
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
  if trains or _stages_read(c, job.kind) & {"proxy", "held_out"}:
    feed.check_batch(
      c.train.batch_size, c.train.accumulation, job.mesh, "config.train"
    )
  m = _model(c, planned)
  m = m._replace(attention=kernel_of(c, m, job.mesh))
  decoder.check_model(m, job.mesh)
  if trains and (context := prepare.requested_context(c)):
    memory.check_fits(
      host_memory.step_memory(c, m, job.mesh, context, job.kind),
      job.mesh.devices.flat[0],
      force,
    )


def _model(c: Any, planned: bool) -> decoder.ModelConfig:
  """The model's sizes; raises where it cannot be read or exported."""
  m, tokenizer = None, None
  if c.model.checkpoint:
    m = given_model(c)
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
        f"checkpoint {m.vocab} embeddings; set config.model.tokenizer"
      )
  vocab = tokenizer.vocab_size if tokenizer else c.model.vocab_size
  return (m or sizes(c, vocab))._replace(lora=lora_of(c))
