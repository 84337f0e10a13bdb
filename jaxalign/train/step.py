"""The train step: one jitted function that donates its state."""

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.train.logps import Logps
from jaxalign.train.losses.reference_free import sft
from jaxalign.train.metrics import sums_and_counts


class TrainState(NamedTuple):
  """Everything a run needs to go on: parameters, optimizer, step."""

  params: dict[str, jax.Array]
  opt_state: Any
  step: jax.Array  # int32 scalar: updates done


def init_state(params: dict[str, jax.Array],
               tx: optax.GradientTransformation) -> TrainState:
  """A fresh state around parameters; the optimizer's moments are sharded as
  the parameters are."""
  return TrainState(params, jax.jit(tx.init)(params),
                    jnp.zeros((), jnp.int32))


@functools.lru_cache(maxsize=8)
def make_gradients(logps_fn: Callable[..., Logps], loss_fn: Callable, *,
                   sft_weight: float = 0.0) -> Callable:
  """Returns `gradients(trained, batch, frozen) -> (gradients, metrics)`.

  Args:
    logps_fn: `(params, tokens [b, R, L], mask [b, R, L]) -> Logps [b, R]`.
    loss_fn: `(policy, ref, stats) -> ([b], metrics)`, from LOSSES with its
      keywords bound; `loss_fn.stats` lists the statistics it needs.
    sft_weight: weight of the chosen answer's negative log-likelihood, a mean
      over its tokens, added to the loss.

  The parameters are `trained | frozen`, two dicts with no name in common;
  gradients are those of `trained`, no other is formed.

  A batch is a dict of arrays, A micro-batches of b rows each: "tokens" and
  "mask" [A, b, R, L], "ref_sum" and "ref_count" [A, b, R];
  "lr", the scalar learning rate of this update; for a loss that
  needs them "label" [A, b], and for z0 "kl_tokens", "kl_mask" [A, b, 1, L],
  "kl_ref_sum" [A, b, 1]. Gradients are sums over rows, accumulated in float32
  by a scan and divided once by A * b: equal to the large batch.
  """
  stats_needed = getattr(loss_fn, "stats", ())

  def global_z0(params, batch):
    """max(0, mean of policy - ref over all mismatched rows of the step)."""
    def add(total, micro):
      tokens, mask, ref = micro
      return total + jnp.sum(logps_fn(params, tokens, mask).sum - ref), None
    total, _ = jax.lax.scan(
        add, jnp.zeros(()), (batch["kl_tokens"], batch["kl_mask"],
                             batch["kl_ref_sum"]))
    return jax.lax.stop_gradient(
        jnp.maximum(0.0, total / batch["kl_ref_sum"].size))

  def objective(trained, frozen, micro, z0):
    policy = logps_fn(trained | frozen, micro["tokens"], micro["mask"])
    ref = Logps(micro["ref_sum"], micro["ref_count"])
    stats = dict(label=micro.get("label"), z0=z0)
    loss, metrics = loss_fn(policy, ref, stats)
    metrics = dict(metrics, preference_loss=loss)
    if sft_weight:
      nll, extra = sft(policy, ref, stats)
      loss, metrics = loss + sft_weight * nll, metrics | extra
    metrics["loss"] = loss
    return jnp.sum(loss), sums_and_counts(metrics)

  def gradients(trained, batch, frozen):
    z0 = (global_z0(trained | frozen, batch) if "z0" in stats_needed
          else jnp.zeros(()))
    micro = {n: x for n, x in batch.items()
             if n != "lr" and not n.startswith("kl_")}
    rows = micro["ref_sum"].shape[0] * micro["ref_sum"].shape[1]
    grad_fn = jax.value_and_grad(objective, has_aux=True)

    def one(m):
      (_, totals), grads = grad_fn(trained, frozen, m, z0)
      return grads, totals

    first = jax.tree.map(lambda x: x[0], micro)
    if rows == micro["ref_sum"].shape[1]:
      grads, totals = one(first)
    else:
      start = jax.tree.map(lambda s: jnp.zeros_like(s), one(first))
      grads, totals = jax.lax.scan(
          lambda sums, m: (jax.tree.map(jnp.add, sums, one(m)), None),
          start, micro)[0]
    return jax.tree.map(lambda g: g / rows, grads), totals

  return gradients


@functools.lru_cache(maxsize=8)
def make_train_step(logps_fn: Callable[..., Logps], loss_fn: Callable,
                    tx: optax.GradientTransformation, *,
                    sft_weight: float = 0.0) -> Callable:
  """Returns `train_step(state, batch, frozen={}) -> (state, metrics)`.

  `state` is donated. `frozen` are parameters beside `state.params` that the
  step only reads, the base of adapters for instance; they are not donated, so
  that the reference may be these very arrays. `tx` is the optimizer; for the
  rest see `make_gradients`.
  """
  gradients = make_gradients(logps_fn, loss_fn, sft_weight=sft_weight)

  @jax.jit(donate_argnames=("state",))
  def train_step(state: TrainState, batch, frozen={}):  # read, never written
    params = state.params
    grads, totals = gradients(params, batch, frozen)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    updates = jax.tree.map(lambda u: batch["lr"] * u, updates)
    totals = totals | {
        "grad_norm": jnp.stack([optax.tree.norm(grads), jnp.ones(())]),
        "lr": jnp.stack([batch["lr"], jnp.ones(())])}
    return TrainState(optax.apply_updates(params, updates), opt_state,
                      state.step + 1), totals

  return train_step
