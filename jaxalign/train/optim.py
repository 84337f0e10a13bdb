"""The optimizer: AdamW behind a clip, with a warm-up that is a RATIO.

A warm-up in steps never ends on a small subset: 150 steps are more than the
93 updates of a 3.5 % subset (selection is what this code is for).
"""

import functools

import jax
import jax.numpy as jnp
import optax

from jaxalign.errors import ConfigError


def decay_linear(lr: float, warmup: int, updates: int):
  """Linear from 0 to lr, then linearly to a tenth of it."""
  return optax.join_schedules(
      [optax.linear_schedule(lr / (warmup + 1), lr, warmup),
       optax.linear_schedule(lr, 0.1 * lr, max(updates - warmup, 1))], [warmup])


def decay_cosine(lr: float, warmup: int, updates: int):
  """Linear from 0 to lr, then a cosine to a tenth of it."""
  return optax.join_schedules(
      [optax.linear_schedule(lr / (warmup + 1), lr, warmup),
       optax.cosine_decay_schedule(lr, max(updates - warmup, 1), 0.1)],
      [warmup])


def decay_constant(lr: float, warmup: int, updates: int):
  """Linear from 0 to lr, then constant."""
  del updates
  return optax.join_schedules(
      [optax.linear_schedule(lr / (warmup + 1), lr, warmup),
       optax.constant_schedule(lr)], [warmup])


SCHEDULES = {"linear": decay_linear, "cosine": decay_cosine,
             "constant": decay_constant}


def make_schedule(*, lr: float, updates: int, warmup_ratio: float,
                  schedule: str) -> optax.Schedule:
  """Update number -> learning rate; evaluated on the host, once a step.

  Args:
    lr: peak learning rate, > 0.
    updates: optimizer updates in the whole run.
    warmup_ratio: share of `updates` spent warming up, in [0, 1).
    schedule: a key of SCHEDULES.
  """
  if not lr > 0:
    raise ConfigError(f"lr={lr}, wanted more than 0; set config.train.lr, "
                      "config.sft.lr or config.lora.lr")
  if not 0 <= warmup_ratio < 1:
    raise ConfigError(f"warmup_ratio={warmup_ratio}, wanted a share in [0, 1);"
                      " set config.train.warmup_ratio")
  if schedule not in SCHEDULES:
    raise ConfigError(f"unknown schedule {schedule!r}; known: "
                      f"{', '.join(SCHEDULES)}; set config.train.schedule")
  return SCHEDULES[schedule](lr, int(round(warmup_ratio * updates)), updates)


def decays(name: str) -> bool:
  """Whether weight decay is for a parameter, by its name in the table."""
  last = name.split("/")[-1]  # "bq", "b_gate"; an adapter's is "wq:b"
  return "norm" not in name and not last.startswith("b")


@functools.lru_cache(maxsize=None)
def make_optimizer(*, clip: float, weight_decay: float, b2: float
                   ) -> optax.GradientTransformation:
  """AdamW at a learning rate of 1, with clipping by the global norm.

  The step multiplies its updates by the rate of the batch, so arms with other
  numbers of updates share one compiled step.

  Args:
    clip: largest global gradient norm; 0 for none.
    weight_decay: of AdamW, on matrices (no norm's scale or bias, no bias).
    b2: decay of the second moment.
  """
  adamw = optax.adamw(
      1.0, b1=0.9, b2=b2, eps=1e-8, weight_decay=weight_decay,
      mask=lambda params: {n: decays(n) for n in params})
  return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw


@functools.lru_cache(maxsize=None)
def allora(tx: optax.GradientTransformation, eta: float
           ) -> optax.GradientTransformation:
  """ALLoRA's step sizes, Huang and Balestriero 2024: small rows move faster.

  The paper multiplies the gradient of what adds to output i by
  1 / sqrt(||B_i||_2 + 1 / eta^2), B_i being the r numbers of B that make
  output i. Adam divides a gradient by its own running size, and so takes out
  again whatever factor changes slowly; therefore the factor stands behind
  `tx`, on the update of each B_i (here `b[:, :, i]`), where it acts: at B = 0
  it is eta, and where B has grown it is 1 / sqrt(||B_i||). A's update is that
  of `tx`. The adapter's scale is 1 and there is no dropout, as in the paper.

  Args:
    tx: the optimizer whose updates are multiplied.
    eta: the factor at B = 0, > 0.
  """
  def scaled(name, u, b):
    if not name.endswith(":b"):
      return u
    size = jnp.sqrt(jnp.sum(b * b, axis=1, keepdims=True))
    return u * jax.lax.rsqrt(size + 1 / eta ** 2)

  def update(updates, state, params):
    return {n: scaled(n, u, params[n]) for n, u in updates.items()}, state

  return optax.chain(tx, optax.GradientTransformation(
      lambda params: optax.EmptyState(), update))
