"""What a job on a CPU takes of its host, from the lengths of its rows."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign.core import progress
from jaxalign.core.errors import ConfigError
from jaxalign.data import chat as chats
from jaxalign.data import prepare
from jaxalign.data import tokens as tokens_lib
from jaxalign.data.chat_templates import template_source
from jaxalign.data.prepare import CHARACTERS_PER_TOKEN
from jaxalign.model import decoder, memory
from jaxalign.model.job import Arm, Job
from jaxalign.select.topk import budget_rows
from jaxalign.train import optim
from jaxalign.train.ref_logps import updates_of

RESPONSES = dict(pairs=2, unpaired=1)  # of a row of each kind
SAMPLED = 256  # rows whose tokens are counted, batches that are dealt


def row_sizes(
  c: Any, kind: str, sample: list[dict[str, Any]], mean: float, length: int
) -> tuple[np.ndarray, np.ndarray]:
  """[n] tokens of prompts and [n, R] of answers, of rows of the pool.

  Of a sample by the tokenizer that is given, through the template; else by
  the characters. Without a sample all are of the mean length.

  Args:
    c: the config.
    kind: "pairs" or "unpaired", of the job.
    sample: records of the pool, or none.
    mean: tokens of a row where there is no sample.
    length: the longest row.
  """
  r = RESPONSES[kind]
  if not sample:
    mean = max(2, round(mean))
    return np.array([mean // 2]), np.full((1, r), mean - mean // 2)
  sample = sample[:SAMPLED]
  sides = ("chosen", "rejected") if "chosen" in sample[0] else ("completion",)
  texts = [[row[side] for side in sides] for row in sample]
  try:
    tok = prepare.given_tokenizer(c)
  except ConfigError:  # of a checkpoint that is planned with from afar
    tok = None
  if tok is None:
    count = lambda text: int(len(text) / CHARACTERS_PER_TOKEN) + 1
    prompt = [count(row["prompt"]) for row in sample]
    answers = [[count(text) for text in each] for each in texts]
  else:
    count = lambda all_ids: [len(ids) + 1 for ids in all_ids]
    prompt = count(tok.encode_many([row["prompt"] for row in sample]))
    answers = [count(tok.encode_responses(each)) for each in texts]
    turns = any(row.get("turns") for row in sample)
    source = template_source(c.data.template, tok, turns)
    if source is not None:  # what it writes around a question, once
      text = sample[0]["prompt"]
      with chats.Chat(tok, source) as chat:
        more = len(chat.encode([dict(role="user", content=text)], [])[0])
      prompt = np.array(prompt) + more - len(tok.encode(text))
  prompt = np.minimum(np.array(prompt), max(length // 2, 1))
  answers = np.minimum(np.array(answers), length - prompt[:, None])
  if len(sides) > r:  # unpaired rows of pairs
    return np.repeat(prompt, len(sides)), answers.reshape(-1, 1)
  return prompt, answers


def host_memory(
  job: Job,
  m: decoder.ModelConfig,
  arms: list[Arm],
  pool: int,
  prompt: np.ndarray,
  answers: np.ndarray,
) -> dict[str, int]:
  """`memory.on_host` of a job's alignment.

  Args:
    job: the run.
    m: sizes of the policy.
    arms: its arms.
    pool: rows of the pool.
    prompt: [n] tokens of the prompts of the pool's rows, or of some.
    answers: [n, R] tokens of their answers.
  """
  c, t, draw = job.c, job.c.train, np.random.default_rng(0)
  size, each = t.batch_size // t.accumulation, prompt + answers.sum(1)
  kept = lambda arm: budget_rows(arm.budget, pool, t.batch_size)
  updates = max(updates_of(c, arm, kept(arm), pool) for arm in arms)
  longest = int((prompt[:, None] + answers).max())
  if t.layout == "packed_apart":
    each = each + prompt * (answers.shape[1] - 1)
  tokens = 0
  if t.layout != "padded":  # the largest of a few batches
    tokens = max(
      int(draw.choice(each, size, size > len(each)).sum())
      for _ in range(min(SAMPLED, updates * t.accumulation))
    )
  shape = memory.StepShape(
    rows=size * answers.shape[1], length=longest, packed=tokens, **_held(c)
  )
  return memory.on_host(
    m,
    job.mesh,
    shape,
    tile=min(c.embed.tile, len(answers) * answers.shape[1]),
    reference=t.reference == "online" or bool(t.eval_every),
    arms=len(arms),
  )


def _held(c: Any) -> dict[str, int]:
  """What a config says of a `StepShape`, whatever the rows."""
  t = c.train
  moments = optim.OPTIMIZERS[t.optimizer].moments
  moments += bool(t.ema) + bool(t.ref_sync)
  size = jnp.dtype(c.model.param_dtype).itemsize
  return dict(chunk=c.model.head_chunk, frozen_size=size, moments=moments)


def step_memory(
  c: Any, m: decoder.ModelConfig, mesh: Any, length: int, kind: str
) -> dict[str, int]:
  """`memory.train_step` of the alignment that a config asks for."""
  rows = c.train.batch_size * RESPONSES[kind] // c.train.accumulation
  shape = memory.StepShape(rows, length, **_held(c))
  return memory.train_step(m, mesh, shape)


def planned(
  job: Job,
  m: decoder.ModelConfig,
  arms: list[Arm],
  pool: int,
  sizes: tuple[np.ndarray, np.ndarray],
) -> str:
  """The line of a plan on what a job takes of a CPU's host at its peak.

  Args:
    job, m, arms, pool: as of `host_memory`.
    sizes: tokens of prompts and of answers, as from `row_sizes`.
  """
  held = host_memory(job, m, arms, pool, *sizes)
  free = memory.available()
  rest = f"; {memory.size(free)} are free" if free else ""
  return (
    f"peak memory of this host, above jax alone: {memory.words(held)}{rest}"
  )


def check_memory(job: Job, arms: list[Arm]) -> None:
  """Says or raises, once the rows are known, where there is too little.

  Raises:
    ConfigError: as `memory.check_host`.
  """
  device = job.mesh.devices.flat[0]
  if device.platform != "cpu":
    memory.check_fits(
      step_memory(job.c, job.policy, job.mesh, job.context, job.kind),
      device,
      job.force,
    )
    return
  rows, n = job.tokens("pool"), len(job.column("pool", "id"))
  start = np.int64(rows.start)
  answers = (tokens_lib.row_lengths(rows) - start).reshape(n, -1)
  held = host_memory(
    job, job.policy, arms, n, start.reshape(n, -1)[:, 0], answers
  )
  if warning := memory.check_host(held, memory.available(), job.force):
    progress.say(f"  {warning}")
