"""Every mistake that can be seen before data is read or code compiled.

`validate` needs no device: it runs before several processes join, so that
all of them end with the same line. `validate_on` needs the mesh.
"""

from typing import Any

from jaxalign import sharding
from jaxalign.artifacts import pick
from jaxalign.data import prepare
from jaxalign.data import tokens as tokens_lib
from jaxalign.errors import ConfigError
from jaxalign.job import Job, lora_of, loss_of, sampler_kwargs, sizes
from jaxalign.lookup import lookup
from jaxalign.model import decoder
from jaxalign.model import weights
from jaxalign.select import embed
from jaxalign.select import mixture as mixtures
from jaxalign.select.samplers import SAMPLERS
from jaxalign.select.samplers import basic
from jaxalign.select.topk import budget_rows
from jaxalign.train import feed
from jaxalign.train import optim


# Knobs that count something there must be at least one of, or may be none.
COUNTS = ("sft.updates", "sft.save_every", "train.save_every", "embed.tile",
          "model.layers", "model.width", "model.heads", "model.kv_heads",
          "model.head_size", "model.ff", "model.head_chunk", "eval.prompts",
          "eval.new_tokens", "eval.tile", "select.mixture.starts",
          "select.mixture.max_iterations", "select.mixture.components",
          "lora.batches")
NOT_NEGATIVE = ("train.max_updates", "select.stability_seeds", "data.limit",
                "eval.temperature", "loss.sft_weight", "train.clip",
                "sft.clip", "select.mixture.ridge", "lora.rank")
CHOICES = {"embed.pooling": embed.POOLINGS, "select.order": basic.ORDERS,
           "select.pair_score": basic.PAIR_SCORES,
           "select.mixture.covariance": mixtures.COVARIANCES,
           "data.on_bad_rows": ("skip", "error"),
           "model.param_dtype": decoder.DTYPES}


def _check_values(c: Any) -> None:
  """Raises ConfigError for a knob whose value can never work."""
  for least, names in ((1, COUNTS), (0, NOT_NEGATIVE)):
    for name, value in pick(c, *names).items():
      if not value >= least:
        raise ConfigError(f"{name}={value}, wanted {least} or more; set "
                          f"config.{name}")
  for name, known in CHOICES.items():
    value = pick(c, name)[name]
    if value not in known:
      raise ConfigError(f"{name}={value!r} is unknown, wanted one of "
                        f"{', '.join(known)}; set config.{name}")
  if not c.select.budget > 1 or c.select.budget % 1:
    budget_rows(float(c.select.budget), 1 << 40)  # rows: once the pool is read
  room = c.model.context - tokens_lib.KEEP_PROMPT - 1
  if room < 1:
    raise ConfigError(f"model.context={c.model.context} holds no prompt and "
                      f"response, wanted {tokens_lib.KEEP_PROMPT + 2} or more;"
                      " set config.model.context")
  if c.eval.new_tokens > room:
    raise ConfigError(f"eval.new_tokens={c.eval.new_tokens} leaves no room for "
                      f"a prompt in model.context={c.model.context}, wanted "
                      f"{room} or less; set one of them")


def validate(c: Any) -> None:
  """Every mistake that the config and the files it names show by themselves.

  It touches no device: `jax.distributed.initialize` may come after it.
  """
  _check_values(c)
  prepare.check_source(c)
  sampler = lookup(SAMPLERS, c.select.sampler, "sampler", "select.sampler")
  sampler_kwargs(c, sampler)
  loss = loss_of(c)
  if loss.kind == "rows":
    raise ConfigError(f"loss {c.loss.name!r} prefers nothing: it cannot align; "
                      "set config.loss.name")
  if "z0" in loss.stats and c.train.batch_size < 2:
    raise ConfigError(f"loss {c.loss.name!r} mismatches the answers of a "
                      f"batch; train.batch_size={c.train.batch_size}, wanted "
                      "2 or more")
  for name in c.compare:
    if name != "all":
      lookup(SAMPLERS, name, "sampler", "compare")
  for part, name in ((c.train, "config.train"), (c.sft, "config.sft")):
    feed.check_divides(part.batch_size, part.accumulation, name)
    optim.make_schedule(lr=part.lr, updates=10, schedule=part.schedule,
                        warmup_ratio=part.warmup_ratio)
  if c.lora.rank:
    optim.make_schedule(lr=c.lora.lr, updates=10, schedule=c.train.schedule,
                        warmup_ratio=c.train.warmup_ratio)
    if not c.lora.eta > 0:
      raise ConfigError(f"lora.eta={c.lora.eta}, wanted more than 0; set "
                        "config.lora.eta")
  if c.train.epochs <= 0:
    raise ConfigError(f"train.epochs={c.train.epochs}, wanted more than 0")
  decoder.check(_model(c), sharding.nowhere())


def validate_on(job: Job) -> None:
  """Every mistake that shows once the mesh is known."""
  c = job.c
  for part, name in ((c.train, "config.train"), (c.sft, "config.sft")):
    feed.check_batch(part.batch_size, part.accumulation, job.mesh, name)
  decoder.check(_model(c), job.mesh)


def _model(c: Any) -> decoder.ModelConfig:
  """The model's sizes; raises where it cannot be read or exported."""
  m = None
  if c.model.checkpoint:
    m = weights.read_config(c.model.checkpoint, c.model.dtype, c.model.remat)
    prepare.checked_context(c, m.context)
    weights.weights_file(c.model.checkpoint)
  tokenizer = prepare.given_tokenizer(c)
  if tokenizer is not None:
    tokenizer.check_export()
    if m is not None and tokenizer.vocab_size > m.vocab:
      raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} pieces, the "
                        f"checkpoint {m.vocab} embeddings; set "
                        "config.model.tokenizer")
  pieces = tokenizer.vocab_size if tokenizer else c.model.vocab_size
  return (m or sizes(c, pieces))._replace(lora=lora_of(c))
