"""The optimizer: AdamW behind a clip, with a warm-up that is a RATIO.

A warm-up in steps never ends on a small subset: 150 steps are more than the
93 updates of a 3.5 % subset (selection is what this code is for).
"""

import functools

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
    raise ConfigError(f"lr={lr}, wanted more than 0; set config.train.lr or "
                      "config.sft.lr")
  if not 0 <= warmup_ratio < 1:
    raise ConfigError(f"warmup_ratio={warmup_ratio}, wanted a share in [0, 1);"
                      " set config.train.warmup_ratio")
  if schedule not in SCHEDULES:
    raise ConfigError(f"unknown schedule {schedule!r}; known: "
                      f"{', '.join(SCHEDULES)}; set config.train.schedule")
  return SCHEDULES[schedule](lr, int(round(warmup_ratio * updates)), updates)


@functools.lru_cache(maxsize=None)
def make_optimizer(*, clip: float, weight_decay: float, b2: float
                   ) -> optax.GradientTransformation:
  """AdamW at a learning rate of 1, with clipping by the global norm.

  The step multiplies its updates by the rate of the batch, so arms with other
  numbers of updates share one compiled step.

  Args:
    clip: largest global gradient norm; 0 for none.
    weight_decay: of AdamW, on matrices (not on the norms' scales).
    b2: decay of the second moment.
  """
  adamw = optax.adamw(
      1.0, b1=0.9, b2=b2, eps=1e-8, weight_decay=weight_decay,
      mask=lambda params: {n: "norm" not in n for n in params})
  return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw
