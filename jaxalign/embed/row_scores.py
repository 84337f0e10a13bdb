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

from jaxalign.core import artifacts, disk, hub, processes, sharding
from jaxalign.core.artifacts import Cost
from jaxalign.core.errors import ConfigError
from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.data import prepare, tokens
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.embed import passes, questions
from jaxalign.embed.over_pool import over_shards
from jaxalign.embed.store import ArraySpec
from jaxalign.model import decoder, hf, reward, weights
from jaxalign.model.flops import decoder_flops, reward_flops
from jaxalign.model.job import Job, kernel_of
from jaxalign.model.parameters import by_row, check_mesh

SIDES = ("chosen", "rejected", "completion")


def by_shard(
  job: Job,
  folder: Any,
  stage: str,
  made_of: dict[str, Any],
  name: str,
  make: Callable,
) -> list[str]:
  """Stores one number a response, from `make(parts, tick)`, shard by shard.

  A killed stage resumes at the next shard; see `over_pool.over_shards`.
  """
  responses = job.responses
  return over_shards(
    job,
    folder,
    stage,
    made_of,
    {name: ArraySpec((responses,))},
    job.c.embed.tile * job.mesh.size,
    lambda parts, tick: {name: make(parts, tick)},
  )


def tokens_of(
  folder: Any, make: Callable[[], tokens.TokenRows]
) -> tokens.TokenRows:
  """Token rows that process 0 makes of texts, which it alone reads."""
  if jax.process_index() == 0:
    tokens.save_rows(folder, "tokens", make())
  sharding.barrier("tokens of a stage")
  return tokens.load_rows(folder, "tokens")


TOKENS = [f"tokens.{field}.npy" for field in tokens.TokenRows._fields]


def digest_of(folder: Any) -> str:
  """The key of a checkpoint: its settings, tokenizer and weights."""

  def make():
    path = hub.resolve(folder)
    names = sorted(
      p.name
      for p in path.iterdir()
      if p.name.endswith((".json", ".model", ".safetensors", ".jinja"))
    )
    return artifacts.key_of("checkpoint", disk.digest_tree(path, names), {})

  return processes.from_first(make)


# Answers without their prompts.


def answers_alone(rows: tokens.TokenRows, start: int) -> tokens.TokenRows:
  """Every row's response behind the token `start`, the same tokens of it."""
  first, ends = rows.offsets[:-1] + rows.start, rows.offsets[1:]
  sizes = ends - first + 1
  offsets = np.concatenate([[0], np.cumsum(sizes)])
  row = np.repeat(np.arange(len(sizes)), sizes)
  place = np.arange(offsets[-1]) - offsets[row]
  ids = np.where(
    place == 0,
    start,
    np.asarray(rows.ids)[first[row] + np.maximum(place - 1, 0)],
  )
  return tokens.TokenRows(
    ids.astype(np.int32), offsets, np.ones(len(sizes), np.int32), rows.cut
  )


def make_alone(job: Job, arm: None, folder: Any) -> Made:
  """What the reference gives each answer without its prompt (IFD).

  The first token is predicted from the BOS; of a tokenizer that has none,
  from the EOS, behind which such models begin a text.
  """
  c, m = job.c, job.model
  tok = job.tokenizer
  rows = answers_alone(job.tokens("pool"), tok.bos if tok.bos >= 0 else tok.eos)
  files = by_shard(
    job,
    folder,
    "alone",
    job.made_of("alone"),
    "logp_alone",
    (
      lambda parts, tick: (
        passes.score_rows(
          job.mesh,
          job.reference,
          m,
          rows,
          tile=c.embed.tile,
          chunk=c.model.head_chunk,
          parts=parts,
          tick=tick,
          ids=job.column("pool", "id"),
        ).logp
      )
    ),
  )
  return files, Cost(passes.flops(m, rows), len(rows.ids)), {}


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
  *,
  tile: int,
  ids: Any = None,
  parts: Any = None,
  tick: Any = None,
) -> np.ndarray:
  """[n] float32, exp(l_yes) / (exp(l_yes) + exp(l_no)) behind every row.

  Args:
    mesh, params, m, rows, tile, ids, parts, tick: as of `embed.score_rows`.
    yes, no: tokens, whose logits are l_yes and l_no.
  """
  return passes.number_rows(
    mesh,
    _yes_fn(mesh, m, yes, no),
    params,
    m,
    rows,
    tile=tile,
    label="ask",
    ids=ids,
    parts=parts,
    tick=tick,
  )


def judge_config(
  c: Any, reference: decoder.ModelConfig | None
) -> decoder.ModelConfig:
  """The sizes of what is asked: config.ask.checkpoint, or the reference."""
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
  return fields | (dict(judge=digest_of(given)) if given else {})


def make_ask(job: Job, arm: None, folder: Any) -> Made:
  """P(yes) of a question about every answer of the pool (Ask-LLM)."""
  c, given = job.c, job.c.ask.checkpoint
  m = judge_config(c, job.model)
  m = m._replace(attention=kernel_of(c, m, job.mesh))
  tok = load_tokenizer(
    hub.resolve_settings(given) if given else job.shared / "data"
  )

  def asked():
    rows = job.rows("pool")
    built = questions.build(
      tok,
      [
        (r["id"], r["prompt"], r[side])
        for r in rows
        for side in SIDES
        if side in r
      ],
      c.ask.question,
      questions.ANSWERS,
      m.context,
    )
    disk.write_json(
      folder / "ask.json",
      dict(yes=built.yes, no=built.no, shortened=built.shortened),
    )
    return built.rows

  rows = tokens_of(folder, asked)
  told = disk.read_json(folder / "ask.json")
  params = (
    hf.load_folder(given, m, job.mesh, np.dtype(c.model.param_dtype))
    if given
    else job.reference
  )
  files = by_shard(
    job,
    folder,
    "ask",
    job.made_of("ask"),
    "p_yes",
    (
      lambda parts, tick: p_yes(
        job.mesh,
        params,
        m,
        rows,
        told["yes"],
        told["no"],
        parts=parts,
        tile=c.embed.tile,
        ids=job.column("pool", "id"),
        tick=tick,
      )
    ),
  )
  say = (
    f"{told['shortened']:,} of {len(rows.start):,} were cut to fit"
    if told["shortened"]
    else ""
  )
  return (
    [*files, *TOKENS, "ask.json"],
    Cost(passes.flops(m, rows, 1), len(rows.ids)),
    dict(say=say),
  )


# A reward model.


def reward_config(c: Any) -> reward.RewardConfig:
  """The sizes of config.rewards.checkpoint, with the context it is used at."""
  r = reward.read_reward_config(c.rewards.checkpoint, c.model.dtype)
  context = min(r.model.context, prepare.asked_context(c) or r.model.context)
  return r._replace(model=r.model._replace(context=context))


@functools.lru_cache(maxsize=4)
def _reward_fn(mesh: Any, r: reward.RewardConfig) -> Callable:
  def one_tile(params, rows, shared):
    del shared
    return dict(
      number=reward.rewards(
        params, rows["tokens"], rows["length"], rows["mask"], r
      )
    )

  return by_row(mesh, reward.reward_layout(r).rows, one_tile)


def reward_rows(
  mesh: Any,
  params: Any,
  r: reward.RewardConfig,
  rows: tokens.TokenRows,
  *,
  tile: int,
  ids: Any = None,
  parts: Any = None,
  tick: Any = None,
) -> np.ndarray:
  """[n] float32 rewards of rows that a reward model's tokenizer made."""
  return passes.number_rows(
    mesh,
    _reward_fn(mesh, r),
    params,
    r.model,
    rows,
    tile=tile,
    label="rewards",
    ids=ids,
    parts=parts,
    tick=tick,
  )


def rewards_fields(job: Job, arm: None) -> dict[str, Any]:
  knobs = ("dtype", "context", "param_dtype")
  fields = pick(job.c, "rewards", "embed.tile", "embed.shard")
  fields |= pick(job.c, *(f"model.{name}" for name in knobs))
  return fields | dict(checkpoint=digest_of(job.c.rewards.checkpoint))


def make_rewards(job: Job, arm: None, folder: Any) -> Made:
  """What config.rewards.checkpoint gives every answer of the pool."""
  c, given = job.c, job.c.rewards.checkpoint
  r = reward_config(c)
  if not r.encodes:
    r = r._replace(
      model=r.model._replace(attention=kernel_of(c, r.model, job.mesh))
    )
  check_mesh(reward.reward_layout(r).rows, job.mesh)

  def encoded():
    texts = [
      (row, side) for row in job.rows("pool") for side in SIDES if side in row
    ]
    encode = questions.encode_two if r.encodes else questions.encode_chats
    return encode(hub.resolve_settings(given), r.model, texts)

  rows = tokens_of(folder, encoded)
  dtype = np.dtype(np.float32 if r.encodes else c.model.param_dtype)
  params = weights.load_weights(given, reward.reward_layout(r), job.mesh, dtype)
  files = by_shard(
    job,
    folder,
    "rewards",
    job.made_of("rewards"),
    "reward",
    (
      lambda parts, tick: reward_rows(
        job.mesh,
        params,
        r,
        rows,
        tile=c.embed.tile,
        parts=parts,
        ids=job.column("pool", "id"),
        tick=tick,
      )
    ),
  )
  sizes, counts = np.unique(tokens.row_lengths(rows), return_counts=True)
  flops = sum(reward_flops(r, int(s)) * int(k) for s, k in zip(sizes, counts))
  return [*files, *TOKENS], Cost(flops, len(rows.ids)), {}


def _price(z: JobSizes, each: float) -> Price:
  answers = z.rows["pool"] * z.responses
  return Price(answers, "rows", answers * each)


def alone_price(z: JobSizes, arm: None) -> Price:
  return _price(z, decoder_flops(z.model, int(z.tokens["pool"]) // 2 + 1))


def ask_price(z: JobSizes, arm: None) -> Price:
  """The question, two pairs of fences and the row; one logit."""
  c, judge = z.job.c, judge_config(z.job.c, z.model)
  question = (len(c.ask.question) + 4 * 16) / prepare.CHARACTERS_PER_TOKEN
  length = min(int(int(z.tokens["pool"]) + question), judge.context)
  return _price(z, decoder_flops(judge, length, 1))


def rewards_price(z: JobSizes, arm: None) -> Price:
  model = reward_config(z.job.c)
  return _price(z, reward_flops(model, int(z.tokens["pool"])))
