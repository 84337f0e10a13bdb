"""The train step: one jitted function that donates its state."""

from collections.abc import Callable
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.train.batch import Batch, Logps
from jaxalign.train.metrics import (
  common_metrics,
  packing_metrics,
  sums_and_counts,
)
from jaxalign.train.packing import Packed
from jaxalign.train.statistics import init_statistics, make_statistics


@struct.dataclass
class TrainState:
  """Everything a run needs to be resumed."""

  params: dict[str, jax.Array]  # that are trained
  opt_state: Any
  step: jax.Array  # int32 scalar: updates done
  # States of the running statistics of the loss, see `statistics.STATISTICS`.
  statistics: dict[str, Any] = struct.field(default_factory=dict)
  ema: Any = ()  # running mean of the parameters, see `keep_ema`
  ref: Any = ()  # a reference that is refreshed, see `online.with_refresh`


def init_state(
  params: dict[str, jax.Array],
  tx: optax.GradientTransformation,
  loss_fn: Callable | None = None,
) -> TrainState:
  """A fresh state around parameters; the optimizer's moments are sharded as
  the parameters are."""
  opt_state, step = jax.jit(tx.init)(params), jnp.zeros((), jnp.int32)
  return TrainState(params, opt_state, step, init_statistics(loss_fn))


@functools.lru_cache(maxsize=8)
def make_gradients(
  logps_fn: Callable[..., Logps], loss_fn: Callable
) -> Callable:
  """Returns `gradients(trained, batch, frozen, found) -> (gradients, metrics)`.

  The parameters are `trained | frozen`, two dicts with no name in common;
  gradients are those of `trained`, no other is formed. They are sums over rows,
  accumulated in float32 by a scan over the micro-batches of a `Batch` and
  divided once by A * b: equal to the large batch. `found` is the (scalars,
  rows) of `make_statistics` on this batch; None: as at the start of a run.

  Args:
    logps_fn: `(params, tokens, mask) -> Logps [b, R]`, see `logps.PRODUCERS`.
    loss_fn: `(policy, ref, stats) -> ([b], metrics)`, from LOSSES with its
      keywords bound; `loss_fn.stats` lists the statistics it needs.
  """
  statistics = make_statistics(logps_fn, loss_fn)
  reads_reference = getattr(loss_fn, "reference", True)

  def objective(trained, frozen, micro, rows, scalars):
    policy = logps_fn(trained | frozen, micro.tokens, micro.mask)
    stats = scalars | rows | micro.columns | dict(label=micro.label)
    loss, metrics = loss_fn(policy, micro.ref, stats)
    common = common_metrics(policy, micro.ref, micro.label, reads_reference)
    metrics = common | dict(preference_loss=loss) | metrics | dict(loss=loss)
    return jnp.sum(loss), sums_and_counts(metrics)

  def gradients(trained, batch, frozen, found=None):
    if found is None:
      states = init_statistics(loss_fn)
      found = statistics(trained | frozen, batch, states)[:2]
    scalars, by_row = found
    micro = batch.micro(), by_row
    count, rows = batch.ref.sum.shape[:2]
    grad_fn = jax.value_and_grad(objective, has_aux=True)

    def one(m):
      (_, totals), grads = grad_fn(trained, frozen, *m, scalars)
      return grads, totals

    first = jax.tree.map(lambda x: x[0], micro)
    if count == 1:
      grads, totals = one(first)
    else:
      add = lambda sums, m: (jax.tree.map(jnp.add, sums, one(m)), None)
      start = jax.tree.map(jnp.zeros_like, one(first))
      (grads, totals), _ = jax.lax.scan(add, start, micro)
    return jax.tree.map(lambda g: g / (count * rows), grads), totals

  return gradients


@functools.lru_cache(maxsize=8)
def make_train_step(
  logps_fn: Callable[..., Logps],
  loss_fn: Callable,
  tx: optax.GradientTransformation,
  options: tuple[tuple[str, Any], ...] = (),
) -> Callable:
  """Returns `train_step(state, batch, frozen={}) -> (state, metrics)`.

  `state` is donated. `frozen` are parameters beside `state.params` that the
  step only reads, the base of adapters for instance; they are not donated, so
  that the reference may be these very arrays.

  Args:
    logps_fn, loss_fn: as of `make_gradients`.
    tx: the optimizer, at a learning rate of 1.
    options: the compiler's, `decoder.compiler_options`.
  """
  statistics = make_statistics(logps_fn, loss_fn)
  gradients = make_gradients(logps_fn, loss_fn)

  @jax.jit(donate_argnames=("state",), compiler_options=dict(options))
  def train_step(state: TrainState, batch: Batch, frozen={}):  # never written
    params = state.params
    *found, states = statistics(params | frozen, batch, state.statistics)
    grads, totals = gradients(params, batch, frozen, found)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    updates = jax.tree.map(lambda u: batch.lr * u, updates)
    totals = totals | {
      "grad_norm": jnp.stack([optax.tree.norm(grads), jnp.ones(())]),
      "lr": jnp.stack([batch.lr, jnp.ones(())]),
    }
    if isinstance(batch.tokens, Packed):
      totals |= packing_metrics(batch.tokens)
    params = optax.apply_updates(params, updates)
    return TrainState(params, opt_state, state.step + 1, states), totals

  return train_step


def begin_ema(state: TrainState) -> TrainState:
  """A fresh state whose running mean is its own parameters."""
  return state.replace(ema=jax.tree.map(jnp.copy, state.params))


@functools.lru_cache(maxsize=8)
def _make_mix(decay):
  def mix(ema, params):
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)

  return jax.jit(mix, donate_argnums=0)


def keep_ema(train_step: Callable, decay: float) -> Callable:
  """`train_step` that also moves `state.ema`, by
  ema = decay ema + (1 - decay) params after every update, in float32.

  The mean starts at the first weights, so nothing is corrected for a start at
  zero; a short run wants a small decay: 0.99 remembers about 100 updates. Of
  adapters A and B are averaged apart, which is not the mean of their product.

  Args:
    train_step: `(state, batch) -> (state, metrics)`.
    decay: in (0, 1).
  """
  mix = _make_mix(decay)

  def step(state, batch):
    after, totals = train_step(state.replace(ema=()), batch)
    return after.replace(ema=mix(state.ema, after.params)), totals

  return step
