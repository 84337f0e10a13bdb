"""Runs of TRL 1.16 and of ours, step by step.

Same weights, tokens, order, optimizer and rates. Ours goes through the loop
with packed rows, a stored reference and the head in chunks, as a job does.
"""

from collections.abc import Callable
import functools
import json
from typing import Any, NamedTuple

import flat
import jax.numpy as jnp
from models import draw, put, sized
import numpy as np

from jaxalign.core import sharding
from jaxalign.data import batches, tokenizer
from jaxalign.data import tokens as tokens_lib
from jaxalign.data import world as worlds
from jaxalign.data.encode import encode_texts
from jaxalign.embed import passes
from jaxalign.model import decoder, hf
from jaxalign.train import feed, loop, optim
from jaxalign.train import step as steps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.statistics import needs_mismatched

PAIR = (
  *(f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies")),
  "logps/chosen",
  "logps/rejected",
)
UNPAIRED = tuple(n for n in PAIR if n.split("/")[1] in ("chosen", "rejected"))
B2, DECAY, SEED = 0.98, 0.01, 7
MODEL = sized(1, 16, 4, 2, 4, 24, 400, 32, tied=False)
WORLD = dict(
  topics=6,
  clusters=3,
  arguments=3,
  argument_words=5,
  openers=3,
  closers=2,
  fillers=3,
  forms=3,
  corrupt=0.4,
  temperature=0.5,
  redundancy=0.0,
  flips=0.0,
  junk=0.0,
  sft_rows=30,
  pool_rows=30,
  held_out_rows=1,
)


class Setting(NamedTuple):
  """What both sides begin from; the model is exported to `folder`/export."""

  mesh: Any
  folder: Any
  model: decoder.ModelConfig
  load: Callable  # () -> our parameters
  tok: Any
  pool: list  # pairs
  chunk: int = 8  # of the head


class Run(NamedTuple):
  """How long, and how fast."""

  batch: int = 4
  updates: int = 20
  lr: float = 2e-3
  beta: float = 0.5

  @property
  def rate(self):
    """A warm-up over a tenth, then linearly to a tenth of it."""
    how = dict(warmup_ratio=0.1, schedule="linear")
    return optim.make_schedule(lr=self.lr, updates=self.updates, **how)

  def order(self, n):
    """Rows as our steps take them, end to end."""
    of = lambda step: batches.rows_at(step, n, self.batch, SEED)
    return np.concatenate([of(step) for step in range(self.updates)])


@functools.lru_cache
def world():
  """(pairs, tokenizer) of a little built-in world."""
  rows = worlds.generate_rows(worlds.build_world(WORLD, 0), 0)
  texts = [r["prompt"] + r["response"] for r in rows["sft"]]
  trained = tokenizer.train_tokenizer(texts, MODEL.vocab)
  return rows["pool"], tokenizer.Tokenizer(trained)


def little(mesh, folder, dtype="float32"):
  """A model of one layer and the little world's pairs."""
  pool, tok = world()
  drawn = draw(MODEL, 5, 0.2)
  hf.export_folder(folder / "export", put(mesh, MODEL, drawn), MODEL, tok)
  m = MODEL
  if dtype == "float64":
    m = m._replace(dtype=dtype, attention="tiles")
  load = lambda: put(mesh, m, {n: x.astype(dtype) for n, x in drawn.items()})
  return Setting(mesh, folder, m, load, tok, pool)


def ours(s, rows, loss, how):
  """The log of a run of the loop, a dict a step."""
  tx = optim.make_optimizer(clip=1.0, weight_decay=DECAY, b2=B2)
  logps_fn = PRODUCERS["chunked"](s.model, s.chunk)
  batching = feed.Batching(how.batch, SEED, 1, s.model.context, "packed")
  state = loop.run_updates(
    steps.init_state(s.load(), tx, loss),
    steps.make_train_step(logps_fn, loss, tx),
    feed.Feed(s.mesh, rows, batching, how.rate),
    loop.TrainOptions(s.folder / "ours", "align", how.updates, how.updates),
  )
  dtypes = {x.dtype for x in state.params.values()}
  assert dtypes == {jnp.dtype(s.model.dtype)}
  text = (s.folder / "ours" / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def theirs(trl, s, name, dataset, how, **options):
  """TRL's log, a dict a step, and its rows as it prepared them."""
  import datasets
  import torch
  import transformers

  datasets.disable_progress_bars()
  config = getattr(trl, f"{name}Config")(
    output_dir=str(s.folder / "trl"),
    max_length=None,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    disable_tqdm=True,
    dataloader_pin_memory=False,
    train_sampling_strategy="sequential",
    seed=0,
    per_device_train_batch_size=how.batch,
    max_steps=how.updates,
    learning_rate=how.lr,
    adam_beta2=B2,
    weight_decay=DECAY,
    beta=how.beta,
    **options,
  )
  local = dict(local_files_only=True)
  folder, dtype = s.folder / "export", getattr(torch, s.model.dtype)
  load = transformers.AutoModelForCausalLM.from_pretrained
  trainer = getattr(trl, f"{name}Trainer")(
    model=load(folder, dtype=dtype, **local),
    processing_class=transformers.AutoTokenizer.from_pretrained(
      folder, **local
    ),
    args=config,
    train_dataset=datasets.Dataset.from_list(dataset),
  )
  trainer.create_optimizer()
  rate = lambda step: float(how.rate(min(step, how.updates - 1))) / how.lr
  trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
    trainer.optimizer, rate
  )
  trainer.train()
  log = [x for x in trainer.state.log_history if "loss" in x]
  assert len(log) == how.updates
  return log, trainer.train_dataset


def gaps(a, b, names):
  """{metric: the largest difference of any step}. A batch of one class has no
  other side, in both. At the first step every pair ties but for rounding, so
  accuracies count from the second on."""
  out = {}
  for step, (mine, other) in enumerate(zip(a, b, strict=True)):
    mine = {n.removeprefix("train/"): x for n, x in mine.items()}
    mine["learning_rate"] = mine["lr"]
    assert {n for n in names if n in mine} == {n for n in names if n in other}
    for n in ("loss", "grad_norm", "learning_rate", *names):
      if n in mine and (step or n != "rewards/accuracies"):
        out[n] = max(out.get(n, 0.0), abs(mine[n] - float(other[n])))
  return out


def reference(s, tokens, r):
  """(sums, counts) [n, R] of the first weights: in float32 by the scoring pass,
  as the stage stores them, in float64 all at once."""
  if s.model.dtype == "float32":
    how = passes.PassOptions(tile=8, chunk=s.chunk)
    found = passes.score_rows(s.mesh, s.load(), s.model, tokens, how)
    return found.logp.reshape(-1, r), found.count.reshape(-1, r)
  n = len(tokens.start)
  longest = int(tokens_lib.row_lengths(tokens).max())
  shape = n // r, r, longest
  rows = tokens_lib.pad_rows(tokens, np.arange(n), longest)
  own = (
    sharding.put(s.mesh, np.asarray(x).reshape(shape), "batch") for x in rows
  )
  found = PRODUCERS["plain"](s.model)(s.load(), *own)
  assert found.sum.dtype == jnp.float64
  return np.asarray(found.sum), np.asarray(found.count)


def same_tokens(tokens, i, row, side):
  """Token for token: BOS, the boundary and EOS."""
  ids = tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist()
  whole = row.get(f"{side}_input_ids")
  assert ids == (whole or row["prompt_ids"] + row[f"{side}_ids"])
  assert whole or tokens.start[i] == len(row["prompt_ids"])


def on_pairs(trl, s, loss, how, names=PAIR, trainer="DPO", **options):
  """(gaps, our log) of a run on pairs, all of which fit the context."""
  sides = "chosen", "rejected"
  texts = {k: [r[k] for r in s.pool] for k in sides}
  prompts = [r["prompt"] for r in s.pool]
  tokens, _, refused = encode_texts(s.tok, prompts, texts, s.model.context)
  assert not refused and not tokens.cut.any()
  rows = flat.train_rows(tokens, 2, *reference(s, tokens, 2))
  taken = how.order(len(s.pool))
  dataset = [s.pool[i] for i in taken]
  b, prepared = theirs(trl, s, trainer, dataset, how, **options)
  for i, row in zip(taken, prepared, strict=True):
    for k, side in enumerate(sides):
      same_tokens(tokens, 2 * i + k, row, side)
  a = ours(s, rows, loss, how)
  return gaps(a, b, names), a


def on_unpaired(trl, s, loss, how, **options):
  """The same on unpaired rows, with TRL's choice of mismatched answers: the
  row before, in the batch. A mismatched row that no context holds is refused
  by neither side, so the context must have room."""
  n, context = len(s.pool), s.model.context
  label = np.random.default_rng(1).random(n) < 0.5
  sides = np.where(label, "chosen", "rejected")
  answers = [r[side] for r, side in zip(s.pool, sides)]
  prompts = [r["prompt"] for r in s.pool]
  texts = dict(response=answers)
  tokens = encode_texts(s.tok, prompts, texts, context, "cut_answer").rows
  taken = how.order(n)
  before = np.roll(taken.reshape(-1, how.batch), 1, axis=1).ravel()
  other = batches.mismatched(tokens, taken, before, context)
  assert not tokens.cut.any() and not other.cut.any()
  rows = flat.train_rows(tokens, 1, *reference(s, tokens, 1), label=label)
  reads = needs_mismatched(loss)
  if reads:
    sums = reference(s, other, 1)[0][:, 0]
    rows = rows._replace(mismatched=feed.MismatchedRows(other, sums))
  row_of = lambda i: dict(
    prompt=prompts[i], completion=answers[i], label=bool(label[i])
  )
  dataset = [row_of(i) for i in taken]
  b, prepared = theirs(trl, s, "KTO", dataset, how, **options)
  for k, (i, row) in enumerate(zip(taken, prepared, strict=True)):
    same_tokens(tokens, i, row, "completion")
    if reads:
      same_tokens(other, k, row, "KL_completion")
  a = ours(s, rows, loss, how)
  if reads:
    assert max(x["train/kl"] for x in a) > 0.01
  return gaps(a, b, (*UNPAIRED, *(["kl"] if reads else []))), a


def within(found, limits, rest):
  """Every gap is under its limit; those that are not named under `rest`."""
  print({n: f"{x:.2e}" for n, x in found.items()})
  for n, x in found.items():
    assert x <= limits.get(n, rest), (n, found)


def learnt(log, least=0.02):
  """The loss has moved."""
  assert abs(log[-1]["train/loss"] - log[0]["train/loss"]) > least
