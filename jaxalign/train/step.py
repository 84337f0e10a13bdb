"""The train step: one jitted function that donates its state."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.train.layout import Packed, shares
from jaxalign.train.logps import Logps
from jaxalign.train.losses.unpaired import init_delta
from jaxalign.train.metrics import beside, sums_and_counts
from jaxalign.train.stats import make_statistics

# What of a batch a micro-batch reads beside its statistics.
MICRO = ("tokens", "mask", "ref_sum", "ref_count", "ref_common_prefix")


class TrainState(NamedTuple):
  """Everything a run needs to go on: parameters, optimizer, step."""

  params: dict[str, jax.Array]
  opt_state: Any
  step: jax.Array  # int32 scalar: updates done
  delta: Any = ()  # BCO's `Delta`; of other losses nothing
  ema: Any = ()  # running mean of the parameters, see `train.ema`
  ref: Any = ()  # a reference that is refreshed, see `train.online`


def init_state(
  params: dict[str, jax.Array],
  tx: optax.GradientTransformation,
  loss_fn: Callable | None = None,
) -> TrainState:
  """A fresh state around parameters; the optimizer's moments are sharded as
  the parameters are. A loss that reads a running mean has one in the state."""
  return TrainState(
    params,
    jax.jit(tx.init)(params),
    jnp.zeros((), jnp.int32),
    fresh_delta(loss_fn),
  )


def fresh_delta(loss_fn: Callable | None) -> Any:
  """The `Delta` that a loss begins with; () for one that reads none."""
  return init_delta() if "delta" in getattr(loss_fn, "stats", ()) else ()


@functools.lru_cache(maxsize=8)
def make_gradients(
  logps_fn: Callable[..., Logps], loss_fn: Callable
) -> Callable:
  """Returns `gradients(trained, batch, frozen, found) -> (gradients, metrics)`.

  Args:
    logps_fn: `(params, tokens [b, R, L], mask [b, R, L]) -> Logps [b, R]`; of
      packed rows see `layout.Packed`.
    loss_fn: `(policy, ref, stats) -> ([b], metrics)`, from LOSSES with its
      keywords bound; `loss_fn.stats` lists the statistics it needs.

  The parameters are `trained | frozen`, two dicts with no name in common;
  gradients are those of `trained`, no other is formed.

  A batch is a dict of arrays, A micro-batches of b rows each: "tokens" and
  "mask" [A, b, R, L], "ref_sum" and "ref_count" [A, b, R];
  "lr", the scalar learning rate of this update; for a loss that
  needs them "label", "weights" [A, b], "ref_common_prefix" [A, b, R], for z0
  "kl_tokens", "kl_mask" [A, b, 1, L], "kl_ref_sum" [A, b, 1]. Gradients are
  sums over rows, accumulated in float32 by a scan and divided once by A * b:
  equal to the large batch. `found` is the (scalars, rows) of `make_statistics`
  on this batch; None: as at the start of a run.
  """
  statistics = make_statistics(logps_fn, loss_fn)

  def objective(trained, frozen, micro, rows, scalars):
    policy = logps_fn(trained | frozen, micro["tokens"], micro["mask"])
    ref = Logps(
      micro["ref_sum"], micro["ref_count"], micro.get("ref_common_prefix")
    )
    stats = scalars | rows
    loss, metrics = loss_fn(policy, ref, stats)
    metrics = (
      beside(
        policy, ref, stats.get("label"), getattr(loss_fn, "reference", True)
      )
      | dict(preference_loss=loss)
      | metrics
    )
    metrics["loss"] = loss
    return jnp.sum(loss), sums_and_counts(metrics)

  def gradients(trained, batch, frozen, found=None):
    if found is None:
      found = statistics(trained | frozen, batch, fresh_delta(loss_fn))[:2]
    scalars, by_row = found
    micro = {n: x for n, x in batch.items() if n in MICRO}, by_row
    count = batch["ref_sum"].shape[0]
    rows = count * batch["ref_sum"].shape[1]
    grad_fn = jax.value_and_grad(objective, has_aux=True)

    def one(m):
      (_, totals), grads = grad_fn(trained, frozen, *m, scalars)
      return grads, totals

    first = jax.tree.map(lambda x: x[0], micro)
    if count == 1:
      grads, totals = one(first)
    else:
      start = jax.tree.map(lambda s: jnp.zeros_like(s), one(first))
      grads, totals = jax.lax.scan(
        lambda sums, m: (jax.tree.map(jnp.add, sums, one(m)), None),
        start,
        micro,
      )[0]
    return jax.tree.map(lambda g: g / rows, grads), totals

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
  that the reference may be these very arrays. `tx` is the optimizer, `options`
  are the compiler's (`decoder.compiler_options`); for the rest see
  `make_gradients`.
  """
  statistics = make_statistics(logps_fn, loss_fn)
  gradients = make_gradients(logps_fn, loss_fn)

  @jax.jit(donate_argnames=("state",), compiler_options=dict(options))
  def train_step(state: TrainState, batch, frozen={}):  # read, never written
    params = state.params
    *found, delta = statistics(params | frozen, batch, state.delta)
    grads, totals = gradients(params, batch, frozen, found)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    updates = jax.tree.map(lambda u: batch["lr"] * u, updates)
    totals = totals | {
      "grad_norm": jnp.stack([optax.tree.norm(grads), jnp.ones(())]),
      "lr": jnp.stack([batch["lr"], jnp.ones(())]),
    }
    if isinstance(batch["tokens"], Packed):
      totals |= shares(batch["tokens"])
    return TrainState(
      optax.apply_updates(params, updates), opt_state, state.step + 1, delta
    ), totals

  return train_step
