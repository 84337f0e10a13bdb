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
  ema: Any = ()  # running mean of the parameters, see `online.with_ema`
  ref: Any = ()  # a reference that is refreshed, see `online.with_refresh`


def init_state(
  params: dict[str, jax.Array],
  tx: optax.GradientTransformation,
  loss_fn: Callable | None = None,
) -> TrainState:
  """A fresh state; the moments are sharded as the parameters are."""
  opt_state, step = jax.jit(tx.init)(params), jnp.zeros((), jnp.int32)
  return TrainState(params, opt_state, step, init_statistics(loss_fn))


@functools.lru_cache(maxsize=8)
def make_gradients(
  logps_fn: Callable[..., Logps], loss_fn: Callable
) -> Callable:
  """Returns `gradients(trained, batch, frozen, found) -> (gradients, metrics)`.

  The parameters are `trained | frozen`; gradients are of `trained` alone. They
  are sums over rows, accumulated in float32 by a scan over the micro-batches of
  a `Batch` and divided once by A * b: equal to the large batch. `found` is the
  (scalars, rows) of `make_statistics` on this batch; None: before any update.

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

  `state` is donated. `frozen` are parameters that the step only reads, such as
  the base of adapters; not donated, so the reference may be these very arrays.

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
