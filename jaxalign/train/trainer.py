"""One training, from rows to weights: optimizer, feed, step and loop."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.core import devices
from jaxalign.core.artifacts import Cost
from jaxalign.core.fingerprint import fingerprint
from jaxalign.model import adapters, decoder
from jaxalign.train import loop, optim
from jaxalign.train.feed import Batching, Feed, TrainRows
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.statistics import needs_batch_logps
from jaxalign.train.step import init_state, make_train_step
from jaxalign.train.training_cost import training_cost, useful_cost

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

  def batching(self, m: decoder.ModelConfig) -> Batching:
    """How rows become the batches of a model."""
    cut = self.batch_size, self.seed, self.accumulation
    return Batching(*cut, m.context, self.layout)

  def optimizer_of(self, m: decoder.ModelConfig):
    """(optimizer, learning rate by update)."""
    decay = dict(clip=self.clip, weight_decay=self.weight_decay, b2=self.b2)
    tx = optim.make_optimizer(**decay, name=self.optimizer)
    if m.lora and m.lora.variant == "allora":
      tx = optim.allora(tx, ALLORA_ETA)
    names = "lr", "updates", "warmup_ratio", "schedule"
    return tx, optim.make_schedule(**{n: getattr(self, n) for n in names})


def from_knobs(kind: type, knobs: Any, **more: Any) -> Any:
  """A Recipe or TrainOptions whose fields are knobs of a config, and `more`."""
  return kind(**{n: knobs[n] for n in kind._fields if n in knobs} | more)


def begin_from(
  base: decoder.Params,
  m: decoder.ModelConfig,
  seed: int,
  fixed: decoder.Params = {},
) -> tuple[decoder.Params, decoder.Params]:
  """(trained, frozen) parameters that compute what the base does.

  Args:
    base: without adapters; emptied where all weights are trained: the step
      donates its state, and never are both held whole.
    m: the model's sizes, with adapters or without.
    seed: of the adapters.
    fixed: matrices of adapters that are not drawn but given.
  """
  if m.lora is None:
    own = lambda x: jnp.array(x, jnp.float32).block_until_ready()
    return {name: own(base.pop(name)) for name in list(base)}, {}
  fresh = adapters.init(jax.random.key(seed), decoder.table(m)) | fixed
  adapters.assert_zero(fresh)
  trained, still = adapters.split(fresh, m.lora)
  return trained, base | still


def train(
  mesh: Any,
  m: decoder.ModelConfig,
  begin: Callable,
  rows: TrainRows,
  loss: Callable,
  recipe: Recipe,
  options: loop.TrainOptions,
  extend: Callable = lambda state, step: (state, step),
) -> tuple[Cost, str]:
  """Trains in `options.folder`.

  Args:
    mesh: the current mesh.
    m: the model's sizes.
    begin: `begin(batch_at)` -> (trained, frozen) parameters; `batch_at` gives
      the batch of an update.
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
  feed = Feed(mesh, rows, batching, rate)
  logps_fn = PRODUCERS[recipe.logps](m, recipe.head_chunk)
  train_step = make_train_step(logps_fn, loss, tx, decoder.compiler_options(m))
  params, frozen = begin(feed.batch_at)
  state, step = extend(
    init_state(params, tx, loss),
    lambda state, batch: train_step(state, batch, frozen),
  )
  whole = lambda measure, params: measure(params | frozen)
  evaluations = {
    n: functools.partial(whole, f) for n, f in options.evaluations.items()
  }
  more = needs_batch_logps(loss), recipe.online
  peak = mesh.size * devices.peak_flops(mesh.devices.flat[0])
  ideal_seconds = lambda step: (
    useful_cost(m, rows, batching, step, *more) / peak if peak else 0.0
  )
  options = options._replace(evaluations=evaluations)
  last = loop.run_updates(state, step, feed, options, ideal_seconds)
  updates = int(last.step)  # it may have stopped early
  cost = training_cost(m, rows, batching, updates, *more)
  return Cost(*cost), fingerprint(last.params)
