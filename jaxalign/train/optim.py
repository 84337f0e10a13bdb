"""The optimizers behind a clip, and rates with a warm-up that is a RATIO.

A warm-up in steps never ends on a small subset: 150 steps are more than the
93 updates of a 3.5 % subset (selection is what this code is for).
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxalign.core.errors import ConfigError
from jaxalign.model import adapters

# What follows the warm-up: (peak rate, updates left) -> schedule.
SCHEDULES = {
  "linear": lambda lr, left: optax.linear_schedule(lr, 0.1 * lr, left),
  "cosine": lambda lr, left: optax.cosine_decay_schedule(lr, left, 0.1),
  "constant": lambda lr, left: optax.constant_schedule(lr),
}


def make_schedule(
  *, lr: float, updates: int, warmup_ratio: float, schedule: str
) -> optax.Schedule:
  """Update number -> learning rate; evaluated on the host, once a step.

  It rises from near 0 to `lr`, and then decays linearly or by a cosine to a
  tenth of it, or stays.

  Args:
    lr: peak learning rate, > 0.
    updates: optimizer updates in the whole run.
    warmup_ratio: fraction of `updates` spent warming up, in [0, 1).
    schedule: a key of SCHEDULES.
  """
  if not lr > 0:
    raise ConfigError(
      f"lr={lr}, wanted more than 0; set config.train.lr or config.sft.lr"
    )
  if not 0 <= warmup_ratio < 1:
    raise ConfigError(
      f"warmup_ratio={warmup_ratio}, wanted a fraction in [0, 1); "
      "set config.train.warmup_ratio"
    )
  if schedule not in SCHEDULES:
    raise ConfigError(
      f"unknown schedule {schedule!r}; known: "
      f"{', '.join(SCHEDULES)}; set config.train.schedule"
    )
  warmup = int(round(warmup_ratio * updates))
  rise = optax.linear_schedule(lr / (warmup + 1), lr, warmup)
  after = SCHEDULES[schedule](lr, max(updates - warmup, 1))
  return optax.join_schedules([rise, after], [warmup])


def decays(name: str) -> bool:
  """Whether weight decay is for a parameter, by its name in the table."""
  last = name.split("/")[-1]  # "bq", "b_gate"; an adapter's is "wq:b"
  return "norm" not in name and not last.startswith("b")


def adamw(b2: float) -> optax.GradientTransformation:
  """Loshchilov and Hutter 2019; b1 is 0.9, `b2` decays the second moment."""
  return optax.scale_by_adam(b1=0.9, b2=b2, eps=1e-8)


def lion(b2: float) -> optax.GradientTransformation:
  """Chen et al. 2023: the sign of 0.9 m + 0.1 g, and `b2` decays m.

  Every number moves by the whole rate: the authors take one 3 to 10 times
  smaller than AdamW's, a decay as much larger, and b2 = 0.99.
  """
  return optax.scale_by_lion(b1=0.9, b2=b2)


def rmsprop(b2: float) -> optax.GradientTransformation:
  """The original DPO code's, g / (sqrt(v) + 1e-8), torch's defaults at
  b2 = 0.99. v starts at 0 and is not corrected: the first update is
  1 / sqrt(1 - b2) rates long, so warm up."""
  return optax.scale_by_rms(decay=b2, eps=1e-8, eps_in_sqrt=False)


def adafactor(b2: float) -> optax.GradientTransformation:
  """Shazeer and Stern 2018: row and column sums in place of second moments.

  As `optax.adafactor`: the rate is relative to each parameter's own size, the
  second moment decays by 1 - t^-0.8 (`b2` is not read), nothing is averaged,
  and a parameter's update is held at a root mean square of 1; a stack of
  layers is one parameter, of which dimensions under 128 are not factored.
  """
  del b2
  return optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(),
  )


def matrix_axes(
  name: str, shape: tuple[int, ...]
) -> contrib.MuonDimensionNumbers | None:
  """Which axes of a parameter are a matrix's rows and columns, for Muon.

  Attention's and the feed-forward's weights and the adapters' A, B and R, of
  each layer apart; all heads are one matrix. None (AdamW's) for the embedding
  and the head, whose rows are words, and for norms and biases.
  """
  if len(shape) < 2 or not decays(name) or name in ("embed", "head"):
    return None
  weight, _, part = name.partition(":")
  first = int(weight.startswith("layers/"))  # a stack has a leading axis
  cut = first + 1
  if part == "a":
    cut = len(shape) - 1
  elif first and not part:
    cut = 1 + len(adapters.sides(weight, shape)[0])
  return contrib.MuonDimensionNumbers(
    tuple(range(first, cut)), tuple(range(cut, len(shape)))
  )


def muon(b2: float) -> optax.GradientTransformation:
  """Jordan 2024: the momentum of a matrix, made nearly orthogonal.

  `optax.contrib`'s: Nesterov's momentum of 0.95, five steps of Newton and
  Schulz, times 0.2 sqrt(max(rows, columns)) (Liu et al. 2025), so that a number
  moves about as far as AdamW's at the same rate. What `matrix_axes` calls no
  matrix is AdamW's, of which `b2` is.
  """

  def axes(params):
    masked = lambda x: isinstance(x, optax.MaskedNode)
    found = lambda n, x: x if masked(x) else matrix_axes(n, x.shape)
    return {n: found(n, x) for n, x in params.items()}

  kinds = lambda params: {
    n: "muon" if a else "adamw" for n, a in axes(params).items()
  }

  def scaled(x, of):
    sides = of.reduction_axis, of.output_axis
    sizes = (math.prod(x.shape[i] for i in side) for side in sides)
    return x * 0.2 * math.sqrt(max(sizes))

  orthogonal = optax.chain(
    contrib.scale_by_muon(weight_dimension_numbers=axes),
    optax.stateless(lambda u, _: jax.tree.map(scaled, u, axes(u))),
  )
  inner = optax.partition(dict(muon=orthogonal, adamw=adamw(b2)), kinds)

  def update(updates, state, params):
    # Fused axes of a sharded matrix have no sharding that could be named: the
    # compiler chooses, and what comes out lies as it lay.
    spec = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
    return jax.sharding.auto_axes(inner.update, out_sharding=spec)(
      updates, state, params
    )

  return optax.GradientTransformation(inner.init, update)


def sgd(b2: float) -> optax.GradientTransformation:
  """The gradient itself: no state; `b2` is not read."""
  del b2
  return optax.identity()


class Optimizer(NamedTuple):
  """An optimizer, and the numbers that it keeps for one that is trained."""

  make: Callable[[float], optax.GradientTransformation]  # of b2
  moments: int  # at least: factors are few


OPTIMIZERS = {
  "adamw": Optimizer(adamw, 2),
  "lion": Optimizer(lion, 1),
  "rmsprop": Optimizer(rmsprop, 1),
  "adafactor": Optimizer(adafactor, 0),
  "muon": Optimizer(muon, 1),
  "sgd": Optimizer(sgd, 0),
}


@functools.cache
def make_optimizer(
  *, clip: float, weight_decay: float, b2: float, name: str = "adamw"
) -> optax.GradientTransformation:
  """An optimizer at a learning rate of 1, with clipping by the global norm.

  The step multiplies its updates by the rate of the batch, so arms with other
  numbers of updates share one compiled step.

  Args:
    clip: largest global gradient norm; 0 for none.
    weight_decay: decoupled, times the rate, on matrices (no norm's scale or
      bias, no bias).
    b2: decay of the moment that the optimizer keeps longest.
    name: a key of OPTIMIZERS.
  """
  decayed = lambda params: {n: decays(n) for n in params}
  tx = optax.chain(
    OPTIMIZERS[name].make(b2),
    optax.add_decayed_weights(weight_decay, decayed),
    optax.scale(-1.0),
  )
  return optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx


@functools.cache
def allora(
  tx: optax.GradientTransformation, eta: float
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
    return u * jax.lax.rsqrt(size + 1 / eta**2)

  def update(updates, state, params):
    return {n: scaled(n, u, params[n]) for n, u in updates.items()}, state

  return optax.chain(
    tx, optax.GradientTransformation(lambda params: optax.EmptyState(), update)
  )
