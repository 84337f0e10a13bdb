"""The reference: given, or trained; and how a stage trains."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np

from jaxalign.core import artifacts, devices, hub
from jaxalign.core.artifacts import Cost, pick
from jaxalign.core.job import Job
from jaxalign.model import decoder, hf
from jaxalign.train import feed, loop, optim, stats
from jaxalign.train import step as steps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import LOSSES

TRAINED = ("checkpoints", "metrics.jsonl")  # what a training stage leaves
ALLORA_ETA = 4.0  # an update's factor where B is 0
RECIPE = dict(  # of the SFT model; the rest stands in config.sft
  accumulation=1,
  warmup_ratio=0.05,
  schedule="cosine",
  clip=1.0,
  weight_decay=0.01,
  b2=0.98,
)


def run_sft(job: Job) -> None:
  """Trains the reference, where no checkpoint is given."""
  c, m, mesh = job.c, job.model, job.mesh
  if c.model.checkpoint:
    given = c.model.checkpoint
    key = artifacts.told(
      lambda: artifacts.key_of(
        "checkpoint",
        artifacts.digest_tree(hub.resolve(given), hf.digest_names(given)),
        {},
      )
    )
    job.records["", "sft"] = artifacts.Record(
      "sft", key, {}, {}, {}, Cost(), {}, skipped=True
    )
    return

  def make(folder):
    split, tokens = "sft", job.tokens("sft")
    rows = np.arange(len(tokens.start))
    if not len(rows):  # data.split.sft is 0: the pool's better answers
      split, tokens = "pool", job.tokens("pool")
      rows = np.arange(len(tokens.start))
      if job.kind == "pairs":
        rows = rows[::2]
      else:
        rows = rows[np.array(job.column("pool", "label"), bool)]
    ids = job.column(split, "id")
    n, each = len(rows), len(tokens.start) // len(ids)
    rows = feed.Rows(
      [ids[i // each] for i in rows],
      tokens,
      rows[:, None],
      np.zeros((n, 1), np.float32),
      np.ones((n, 1), np.float32),
    )
    params = decoder.init(jax.random.key(c.data.seed), m, mesh)
    cost = train(
      job,
      folder,
      "sft",
      m,
      lambda _: (params, {}),
      rows,
      LOSSES["sft"],
      RECIPE | c.sft.to_dict(),
      lr=c.sft.lr,
      updates=c.sft.updates,
      seed=c.data.seed,
    )
    return list(TRAINED), cost, {}

  job.run(
    job.shared / "sft",
    "sft",
    make=make,
    resumes=TRAINED,
    fields=pick(c, "sft", "model"),
    inputs=dict(data=job.key("data")),
  )


def train(
  job: Job,
  folder: Any,
  label: str,
  m: decoder.ModelConfig,
  begin: Callable,
  rows: feed.Rows,
  loss: Callable,
  knobs: Any,
  *,
  lr: float,
  updates: int,
  seed: int,
  optimizer: str = "adamw",
  layout: str = "padded",
  producer: str = "chunked",
  mismatched: feed.Mismatched | None = None,
  online: bool = False,
  extend: Callable = lambda state, step: (state, step),
  measures: dict[str, Callable] = {},
  **fit: Any,
) -> Cost:
  """Trains in `folder`. Shared by sft, align and proxies.

  `begin(batch_at)` returns the parameters to train and those beside them that
  stay; `extend` and `measures` are those of `stages.watched`, `online` says
  that every update has a pass of the reference, and `fit` is what else
  `loop.fit` is told. The cost is without what `measures` take.
  """
  c, mesh = job.c, job.mesh
  tx = optim.make_optimizer(
    clip=knobs["clip"],
    b2=knobs["b2"],
    weight_decay=knobs["weight_decay"],
    name=optimizer,
  )
  if m.lora and m.lora.variant == "allora":
    tx = optim.allora(tx, ALLORA_ETA)
  rate = optim.make_schedule(
    lr=lr,
    updates=updates,
    warmup_ratio=knobs["warmup_ratio"],
    schedule=knobs["schedule"],
  )
  batch_at, ids_at, tokens_at = feed.make_feed(
    mesh,
    rows,
    batch=knobs["batch_size"],
    accumulation=knobs["accumulation"],
    seed=seed,
    context=m.context,
    rate=rate,
    mismatched=mismatched,
    layout=layout,
  )
  train_step = steps.make_train_step(
    PRODUCERS[producer](m, c.model.head_chunk),
    loss,
    tx,
    decoder.compiler_options(m),
  )
  params, frozen = begin(batch_at)
  state, step = extend(
    steps.init_state(params, tx, loss),
    lambda state, batch: train_step(state, batch, frozen),
  )
  last = loop.fit(
    state,
    step,
    batch_at,
    ids_at,
    folder=folder,
    label=label,
    updates=updates,
    save_every=knobs["save_every"],
    tokens_at=tokens_at,
    evaluations={
      n: functools.partial(lambda f, p: f(p | frozen), f)
      for n, f in measures.items()
    },
    **dict(explode=c.train.explode) | fit,
    peak=mesh.size * devices.peak_flops(mesh.devices.flat[0]),
    distinct_at=feed.make_distinct(rows, batch=knobs["batch_size"], seed=seed),
    useful_at=feed.make_useful(
      m,
      rows,
      batch=knobs["batch_size"],
      seed=seed,
      mismatched=mismatched,
      ahead=stats.needs_batch_logps(loss),
      online=online,
    ),
  )
  flops, tokens = feed.training_cost(  # of what was not stopped early
    m,
    rows,
    updates=int(last.step),
    batch=knobs["batch_size"],
    seed=seed,
    mismatched=mismatched.tokens if mismatched else None,
    ahead=stats.needs_batch_logps(loss),
    online=online,
  )
  return Cost(flops, tokens)
