"""One training, from rows to weights: optimizer, feed, step and loop."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from jaxalign.core import devices
from jaxalign.core.artifacts import Cost
from jaxalign.core.fingerprint import fingerprint
from jaxalign.model import decoder
from jaxalign.train import feed as feeds
from jaxalign.train import loop, optim
from jaxalign.train import step as steps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.statistics import needs_batch_logps

ALLORA_ETA = 4.0  # an update's factor where B is 0


class Recipe(NamedTuple):
  """How a model is trained; the fields are knobs of config.train."""

  updates: int
  seed: int
  batch_size: int
  accumulation: int
  lr: float
  warmup_ratio: float
  schedule: str
  clip: float
  weight_decay: float
  b2: float
  head_chunk: int
  optimizer: str = "adamw"
  layout: str = "padded"
  logps: str = "chunked"
  online: bool = False  # whether every update has a pass of the reference

  @classmethod
  def of(cls, knobs: Any, **more: Any) -> "Recipe":
    """The recipe of some knobs, others left out."""
    known = {n: knobs[n] for n in cls._fields if n in knobs}
    return cls(**known | more)

  def batching(self, m: decoder.ModelConfig) -> feeds.Batching:
    """How rows become the batches of a model."""
    cut = self.batch_size, self.seed, self.accumulation
    return feeds.Batching(*cut, m.context, self.layout)

  def optimizer_of(self, m: decoder.ModelConfig):
    """(optimizer, learning rate by update)."""
    decay = dict(clip=self.clip, weight_decay=self.weight_decay, b2=self.b2)
    tx = optim.make_optimizer(**decay, name=self.optimizer)
    if m.lora and m.lora.variant == "allora":
      tx = optim.allora(tx, ALLORA_ETA)
    rate = optim.make_schedule(
      lr=self.lr,
      updates=self.updates,
      warmup_ratio=self.warmup_ratio,
      schedule=self.schedule,
    )
    return tx, rate


def train(
  mesh: Any,
  m: decoder.ModelConfig,
  begin: Callable,
  rows: feeds.TrainRows,
  loss: Callable,
  recipe: Recipe,
  options: loop.TrainOptions,
  extend: Callable = lambda state, step: (state, step),
) -> tuple[Cost, str]:
  """Trains in `options.folder`.

  Args:
    mesh: the current mesh.
    m: the model's sizes.
    begin: `begin(batch_at)` -> (parameters to train, those beside them that
      stay); `batch_at` gives the batch of an update.
    rows: what is trained on.
    loss: from `losses.bind`.
    recipe: how.
    options: of the loop; its evaluations are given all parameters.
    extend: `(state, train_step) -> (state, train_step)`.

  Returns:
    What it cost, without its evaluations, and a digest of the weights.
  """
  batching = recipe.batching(m)
  tx, rate = recipe.optimizer_of(m)
  feed = feeds.Feed(mesh, rows, batching, rate)
  logps_fn = PRODUCERS[recipe.logps](m, recipe.head_chunk)
  compiler = decoder.compiler_options(m)
  train_step = steps.make_train_step(logps_fn, loss, tx, compiler)
  params, frozen = begin(feed.batch_at)
  state, step = extend(
    steps.init_state(params, tx, loss),
    lambda state, batch: train_step(state, batch, frozen),
  )
  whole = lambda measure, params: measure(params | frozen)
  evaluations = {
    n: functools.partial(whole, f) for n, f in options.evaluations.items()
  }
  more = needs_batch_logps(loss), recipe.online
  peak = mesh.size * devices.peak_flops(mesh.devices.flat[0])

  def ideal_seconds(step):
    if not peak:
      return 0.0
    return feeds.useful_cost(m, rows, batching, step, *more) / peak

  options = options._replace(evaluations=evaluations)
  last = loop.fit(state, step, feed, options, ideal_seconds)
  updates = int(last.step)  # it may have stopped early
  cost = Cost(*feeds.training_cost(m, rows, batching, updates, *more))
  return cost, fingerprint(last.params)
