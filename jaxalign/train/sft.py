"""The sft stage: trains the reference, where no checkpoint is given."""

from typing import Any

import jax
import numpy as np

from jaxalign.core import artifacts, disk, hub, processes
from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.model import decoder, hf
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Job
from jaxalign.train.feed import TrainRows
from jaxalign.train.loop import TrainOptions
from jaxalign.train.losses import LOSSES
from jaxalign.train.trainer import from_knobs, Recipe, train

RECIPE = dict(  # of the SFT model; the rest stands in config.sft
  accumulation=1,
  warmup_ratio=0.05,
  schedule="cosine",
  clip=1.0,
  weight_decay=0.01,
  b2=0.98,
)
TRAINED = ("checkpoints", "metrics.jsonl")  # what a training stage leaves


def given_reference(job: Job) -> str:
  """The digest of config.model.checkpoint; "" where none is given."""
  given = job.c.model.checkpoint
  if not given:
    return ""
  digests = lambda: disk.digest_tree(hub.resolve(given), hf.digest_names(given))
  return processes.from_first(
    lambda: artifacts.key_of("checkpoint", digests(), {})
  )


def make_sft(job: Job, arm: None, folder: Any) -> Made:
  """Trains the reference, where no checkpoint is given."""
  c, m, seed = job.c, job.model, job.c.data.seed
  params = decoder.init(jax.random.key(seed), m)
  knobs = RECIPE | c.sft.to_dict()
  named = dict(folder=folder, label="sft", explode=c.train.explode)
  cost, weights = train(
    job.mesh,
    m,
    lambda _: (params, {}),
    _rows(job),
    LOSSES["sft"],
    from_knobs(Recipe, knobs, seed=seed, head_chunk=c.model.head_chunk),
    from_knobs(TrainOptions, knobs, **named),
  )
  return list(TRAINED), cost, dict(weights=weights)


def sft_fields(job: Job, arm: None) -> dict[str, Any]:
  return pick(job.c, "sft", "model")


def _rows(job: Job) -> TrainRows:
  """The sft split; without one, the pool's better answers."""
  split = "sft" if len(job.tokens("sft").start) else "pool"
  tokens, ids = job.tokens(split), job.column(split, "id")
  rows = np.arange(len(tokens.start))
  if split == "pool":
    pairs = job.kind == "pairs"
    label = () if pairs else np.array(job.column(split, "label"), bool)
    rows = rows[::2] if pairs else rows[label]
  each = len(tokens.start) // len(ids)
  none, one = np.zeros((len(rows), 1), np.float32), np.ones((len(rows), 1))
  ids = [ids[i // each] for i in rows]
  return TrainRows(ids, tokens, rows[:, None], none, np.float32(one))


def sft_price(z: JobSizes, arm: None) -> Price | None:
  """Three passes of every update; nothing where a checkpoint is given."""
  k = z.job.c.sft
  if z.job.c.model.checkpoint:
    return None
  each = decoder_flops(z.model, int(z.tokens["sft"]))
  return Price(k.updates, "updates", 3 * k.updates * k.batch_size * each)
