"""Passes over the pool in other words: answers alone, questions, rewards.

What can share a pass does, in `embed.over_pool`: embeddings, log-probs and
residuals of the reference. The stages here run other tokens (`alone`: the
answers without their prompts; `ask`: a question about each row) or other
weights (`rewards`), so each has a pass of its own, over every row once.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import disk, hub, sharding
from jaxalign.core.artifacts import Cost
from jaxalign.core.errors import ConfigError
from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.data import prepare, tokens
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.embed import passes, questions
from jaxalign.embed.embedder import answers_of, token_rows_of, TOKENS
from jaxalign.embed.over_pool import checkpoint_digest, over_shards, rows_price
from jaxalign.embed.passes import PassOptions
from jaxalign.embed.store import ArraySpec
from jaxalign.model import decoder, hf, reward, weights
from jaxalign.model.flops import decoder_flops, reward_flops
from jaxalign.model.job import Job, kernel_of
from jaxalign.model.parameters import by_row, check_mesh


def _store(job: Job, stage: str, name: str, make: Callable) -> list[str]:
  """Stores the column `name` of a number a response, `make(options)`."""
  columns = {stage: {name: ArraySpec((job.responses,))}}
  return over_shards(job, columns, lambda options: {name: make(options)})


# Answers without their prompts.


def answers_alone(rows: tokens.TokenRows, first_token: int) -> tokens.TokenRows:
  """Every row's response behind one token, the same tokens of it."""
  sizes = tokens.row_lengths(rows) - rows.start + 1
  offsets = np.concatenate([[0], np.cumsum(sizes)])
  row = np.repeat(np.arange(len(sizes)), sizes)
  place = np.arange(offsets[-1]) - offsets[row]
  taken = (rows.offsets[:-1] + rows.start)[row] + np.maximum(place - 1, 0)
  ids = np.where(place == 0, first_token, np.asarray(rows.ids)[taken])
  start = np.ones(len(sizes), np.int32)
  return tokens.TokenRows(ids.astype(np.int32), offsets, start, rows.cut)


def make_alone(job: Job, arm: None, folder: Any) -> Made:
  """The reference's log-probability of each answer without its prompt (IFD).

  The first token is predicted from the BOS; of a tokenizer that has none,
  from the EOS, behind which such models begin a text.
  """
  m, tok = job.model, job.tokenizer
  rows = answers_alone(job.tokens("pool"), tok.bos if tok.bos >= 0 else tok.eos)
  score = lambda how: passes.score_rows(job.mesh, job.reference, m, rows, how)
  files = _store(job, "alone", "logp_alone", lambda how: score(how).logp)
  return files, Cost(passes.pass_flops(m, rows), len(rows.ids)), {}


def alone_price(z: JobSizes, arm: None) -> Price:
  return rows_price(z, decoder_flops(z.model, int(z.tokens["pool"]) // 2 + 1))


# A question about each answer.


@functools.lru_cache(maxsize=4)
def _yes_fn(mesh: Any, m: decoder.ModelConfig, yes: int, no: int) -> Callable:
  """Jitted pass that gives P(yes) of two tokens behind every row."""

  def one_tile(params, rows, shared):
    del shared
    x = decoder.forward(params, rows["tokens"], m, sharding.PER_ROW)
    last = jnp.take_along_axis(x, (rows["length"] - 1)[:, None, None], axis=1)
    head = decoder.head(params, m, sharding.PER_ROW)
    two = decoder.logits(last, head[jnp.array([yes, no])], m.final_softcap)
    return dict(number=jax.nn.sigmoid(two[:, 0, 0] - two[:, 0, 1]))

  return by_row(mesh, decoder.table(m), one_tile)


def p_yes(
  mesh: Any,
  params: decoder.Params,
  m: decoder.ModelConfig,
  rows: tokens.TokenRows,
  yes: int,
  no: int,
  options: PassOptions,
) -> np.ndarray:
  """[n] float32, exp(l_yes) / (exp(l_yes) + exp(l_no)) behind every row.

  Args:
    mesh, params, m, rows, options: as of `passes.pass_rows`.
    yes, no: tokens, whose logits are l_yes and l_no.
  """
  fn, shapes = _yes_fn(mesh, m, yes, no), dict(number=())
  found = passes.map_rows(mesh, fn, params, rows, shapes, m.context, options)
  return found["number"]


def judge_config(
  c: Any, reference: decoder.ModelConfig | None
) -> decoder.ModelConfig:
  """The sizes of the judge: config.ask.checkpoint, or the reference."""
  m = reference
  if c.ask.checkpoint:
    m = hf.read_config(c.ask.checkpoint, c.model.dtype, "none")
  own = m.positions or m.context
  if c.ask.checkpoint and c.ask.context > own:
    raise ConfigError(
      f"ask.context={c.ask.context} is more than the {own} of "
      "config.ask.checkpoint; set config.ask.context"
    )
  return m._replace(context=c.ask.context or own, lora=None)


def ask_needs(job: Job, arm: None) -> list[str]:
  return ["data"] if job.c.ask.checkpoint else ["data", "sft"]


def ask_fields(job: Job, arm: None) -> dict[str, Any]:
  given = job.c.ask.checkpoint
  fields = pick(job.c, "ask", "embed.tile", "embed.shard", "model")
  return fields | (dict(judge=checkpoint_digest(given)) if given else {})


def make_ask(job: Job, arm: None, folder: Any) -> Made:
  """P(yes) of a question about every answer of the pool (Ask-LLM)."""
  c, given = job.c, job.c.ask.checkpoint
  m = judge_config(c, job.model)
  m = m._replace(attention=kernel_of(c, m, job.mesh))
  own = hub.resolve_settings(given) if given else job.shared / "data"
  tok, path = load_tokenizer(own), folder / "ask.json"

  def encoded():
    answers = answers_of(job.rows("pool"))
    texts = [(r["id"], r["prompt"], r[side]) for r, side in answers]
    question, words = c.ask.question, questions.ANSWERS
    made = questions.build(tok, texts, question, words, m.context)
    facts = dict(yes=made.yes, no=made.no, shortened=made.shortened)
    disk.write_json(path, facts)
    return made.rows

  rows = token_rows_of(folder, encoded)
  yes, no, cut = (disk.read_json(path)[k] for k in ("yes", "no", "shortened"))
  if given:
    params = hf.load_folder(given, m, job.mesh, np.dtype(c.model.param_dtype))
  else:
    params = job.reference
  score = lambda how: p_yes(job.mesh, params, m, rows, yes, no, how)
  files = _store(job, "ask", "p_yes", score)
  flops = passes.sum_flops(rows, lambda s: decoder_flops(m, s, 1))
  say = f"{cut:,} of {len(rows.start):,} were cut to fit" if cut else ""
  files = [*files, *TOKENS, "ask.json"]
  return files, Cost(flops, len(rows.ids)), dict(say=say)


def ask_price(z: JobSizes, arm: None) -> Price:
  """The question, two pairs of fences and the row; one logit."""
  c, judge = z.job.c, judge_config(z.job.c, z.model)
  question = (len(c.ask.question) + 4 * 16) / prepare.CHARACTERS_PER_TOKEN
  length = min(int(int(z.tokens["pool"]) + question), judge.context)
  return rows_price(z, decoder_flops(judge, length, 1))


# A reward model.


def reward_config(c: Any) -> reward.RewardConfig:
  """The sizes of config.rewards.checkpoint, with the context it is used at."""
  r = reward.read_reward_config(c.rewards.checkpoint, c.model.dtype)
  own = r.model.context
  context = min(own, prepare.requested_context(c) or own)
  return r._replace(model=r.model._replace(context=context))


@functools.lru_cache(maxsize=4)
def _reward_fn(mesh: Any, r: reward.RewardConfig) -> Callable:
  def one_tile(params, rows, shared):
    del shared
    x = (rows[name] for name in ("tokens", "length", "mask"))
    return dict(number=reward.rewards(params, *x, r))

  return by_row(mesh, reward.reward_layout(r).rows, one_tile)


def reward_rows(
  mesh: Any,
  params: Any,
  r: reward.RewardConfig,
  rows: tokens.TokenRows,
  options: PassOptions,
) -> np.ndarray:
  """[n] float32 rewards of rows that a reward model's tokenizer made."""
  fn, shapes, context = _reward_fn(mesh, r), dict(number=()), r.model.context
  found = passes.map_rows(mesh, fn, params, rows, shapes, context, options)
  return found["number"]


def rewards_fields(job: Job, arm: None) -> dict[str, Any]:
  knobs = ("dtype", "context", "param_dtype")
  fields = pick(job.c, "rewards", "embed.tile", "embed.shard")
  fields |= pick(job.c, *(f"model.{name}" for name in knobs))
  return fields | dict(checkpoint=checkpoint_digest(job.c.rewards.checkpoint))


def make_rewards(job: Job, arm: None, folder: Any) -> Made:
  """What config.rewards.checkpoint gives every answer of the pool."""
  c, given = job.c, job.c.rewards.checkpoint
  r, dtype = reward_config(c), np.dtype(np.float32)
  encode = questions.encode_two
  if not r.encodes:
    kernel = kernel_of(c, r.model, job.mesh)
    r = r._replace(model=r.model._replace(attention=kernel))
    dtype, encode = np.dtype(c.model.param_dtype), questions.encode_chats
  layout = reward.reward_layout(r)
  check_mesh(layout.rows, job.mesh)

  def encoded():
    answers = answers_of(job.rows("pool"))
    return encode(hub.resolve_settings(given), r.model, answers)

  rows = token_rows_of(folder, encoded)
  params = weights.load_weights(given, layout, job.mesh, dtype)
  score = lambda how: reward_rows(job.mesh, params, r, rows, how)
  files = _store(job, "rewards", "reward", score)
  flops = passes.sum_flops(rows, functools.partial(reward_flops, r))
  return [*files, *TOKENS], Cost(flops, len(rows.ids)), {}


def rewards_price(z: JobSizes, arm: None) -> Price:
  flops = reward_flops(reward_config(z.job.c), int(z.tokens["pool"]))
  return rows_price(z, flops)
