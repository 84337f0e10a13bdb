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
  try:
    tok = prepare.given_tokenizer(c)
  except ConfigError:  # of a checkpoint that this machine does not have
    tok = None
  by_characters = lambda text: int(len(text) / CHARACTERS_PER_TOKEN) + 1
  by_tokens = lambda ids: len(ids) + 1
  count = by_characters if tok is None else by_tokens
  encode = list if tok is None else tok.encode_many
  respond = list if tok is None else tok.encode_responses
  counted = lambda found: np.array([count(x) for x in found])
  prompt = counted(encode([row["prompt"] for row in sample]))
  answers = np.array(
    [counted(respond([row[side] for side in sides])) for row in sample]
  )
  turns = any(row.get("turns") for row in sample)
  source = tok and template_source(c.data.template, tok, turns)
  if source is not None:  # what it writes around a question, once
    text = sample[0]["prompt"]
    with chats.Chat(tok, source) as chat:
      whole = chat.encode([dict(role="user", content=text)], [])[0]
    prompt += len(whole) - len(tok.encode(text))
  prompt = np.minimum(prompt, max(length // 2, 1))
  answers = np.minimum(answers, length - prompt[:, None])
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
  c, t, r = job.c, job.c.train, answers.shape[1]
  size = t.batch_size // t.accumulation
  tokens = 0
  if t.layout != "padded":  # the largest of a few batches
    prompts = r if t.layout == "packed_apart" else 1
    each, draw = answers.sum(1) + prompts * prompt, np.random.default_rng(0)
    kept = lambda arm: budget_rows(arm.budget, pool, t.batch_size)
    updates = max(updates_of(c, arm, kept(arm), pool) for arm in arms)
    tokens = max(
      int(draw.choice(each, size, size > len(each)).sum())
      for _ in range(min(SAMPLED, updates * t.accumulation))
    )
  longest = int((prompt[:, None] + answers).max())
  return memory.on_host(
    m,
    job.mesh,
    _step_shape(c, size * r, longest, tokens),
    tile=min(c.embed.tile, answers.size),
    reference=t.reference == "online" or bool(t.eval_every),
    arms=len(arms),
  )


def _step_shape(c, rows, length, packed=0):
  """The `StepShape` of a config; packed: tokens of a micro-batch, or 0."""
  t = c.train
  moments = optim.OPTIMIZERS[t.optimizer].moments
  moments += bool(t.ema) + bool(t.ref_sync)
  size = jnp.dtype(c.model.param_dtype).itemsize
  head = c.model.head_chunk
  return memory.StepShape(rows, length, head, size, moments, packed)


def step_memory(
  c: Any, m: decoder.ModelConfig, mesh: Any, length: int, kind: str
) -> dict[str, int]:
  """`memory.train_step` of the alignment that a config asks for."""
  rows = c.train.batch_size * RESPONSES[kind] // c.train.accumulation
  return memory.train_step(m, mesh, _step_shape(c, rows, length))


def planned(
  job: Job,
  m: decoder.ModelConfig,
  arms: list[Arm],
  pool: int,
  sizes: tuple[np.ndarray, np.ndarray],
) -> str:
  """A plan's line on the peak memory of a CPU's host; arguments as of
  `host_memory`, `sizes` as from `row_sizes`."""
  held = host_memory(job, m, arms, pool, *sizes)
  free = memory.available()
  rest = f"; {memory.size(free)} are free" if free else ""
  return (
    f"peak memory of this host, above jax alone: {memory.words(held)}{rest}"
  )


def check_memory(job: Job, arms: list[Arm]) -> None:
  """Warns or raises, once the rows are known, where memory does not suffice.

  Raises:
    ConfigError: as `memory.check_host`.
  """
  m, device = job.policy, job.mesh.devices.flat[0]
  if device.platform != "cpu":
    held = step_memory(job.c, m, job.mesh, job.context, job.kind)
    memory.check_fits(held, device, job.force)
    return
  rows, n = job.tokens("pool"), len(job.column("pool", "id"))
  start = np.int64(rows.start).reshape(n, -1)
  answers = tokens_lib.row_lengths(rows).reshape(n, -1) - start
  held = host_memory(job, m, arms, n, start[:, 0], answers)
  if warning := memory.check_host(held, memory.available(), job.force):
    progress.say(f"  {warning}")
