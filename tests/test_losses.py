"""Every loss against NumPy float64: values, slopes, the first step, extremes.

CASES is the table: the oracle, written from the equation and importing nothing
of the losses; the value where policy equals reference; the keywords tried.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

from flat import matched
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.train.batch import Logps
from jaxalign.train.losses import LOSSES
from jaxalign.train.metrics import divide, sums_and_counts

pytestmark = pytest.mark.usefixtures("quick_compiles")


@dataclasses.dataclass
class Example:
  """float64 [N, R] sums, of common prefixes too, and counts; statistics."""

  p: np.ndarray  # policy
  q: np.ndarray  # reference
  n: np.ndarray
  common_prefix_p: np.ndarray
  common_prefix_q: np.ndarray
  label: np.ndarray
  weights: np.ndarray
  z0: float = 1.5
  delta: float = -0.4
  mean_count: float = 7.25

  @property
  def r(self):
    return self.p - self.q

  @property
  def up(self):
    """r of the first response."""
    return self.r[:, 0]

  @property
  def down(self):
    """r of the rejected one."""
    return self.r[:, 1]

  @property
  def nll(self):
    return -self.p[:, 0] / self.n[:, 0]

  def replace(self, **fields):
    return dataclasses.replace(self, **fields)


def example(columns, spread=8.0, rows=32):
  """Log-probabilities exact in float32, so that both widths see the same."""
  rng = np.random.default_rng(columns)
  exact = lambda x: np.float64(np.float32(x))
  p = exact(rng.normal(-60, 15, (rows, columns)))
  q = exact(p + rng.normal(0, spread, (rows, columns)))
  part = rng.uniform(0.2, 1.0, (rows, columns))
  return Example(
    p,
    q,
    np.float64(rng.integers(3, 25, (rows, columns))),
    exact(p * part),
    exact(q * part * 0.9),
    rng.random(rows) < 0.4,
    exact(rng.uniform(0.5, 10, rows)),
  )


def inputs(x, dtype):
  """(policy, ref, stats) of an example, as a step would hand them over."""
  cast = lambda a: jnp.asarray(a, dtype)
  policy = Logps(cast(x.p), cast(x.n), cast(x.common_prefix_p))
  ref = Logps(cast(x.q), cast(x.n), cast(x.common_prefix_q))
  names = ("weights", "z0", "delta", "mean_count")
  stats = {n: cast(getattr(x, n)) for n in names}
  stats["label"] = jnp.asarray(x.label)
  if x.p.shape[1] == 2:
    names = ("matched_margins", "matched_ratios")
    stats |= {n: matched(n, policy.sum, ref.sum) for n in names}
  return policy, ref, stats


def columns_of(name):
  return 1 if LOSSES[name].kind == "unpaired" else 2


# The oracles: [N] values, from the equations.


def ls(x):
  """log sigmoid in float64, without overflow: -log(1 + e^-x)."""
  return -np.logaddexp(0.0, -np.float64(x))


def s(x):
  return np.exp(ls(x))


def gap(x):
  return x[:, 0] - x[:, 1]


def e(x):
  return np.exp(np.minimum(x, 80.0))


def smoothed(z, eps, sign=1):
  return -(1 - eps) * ls(z) - sign * eps * ls(-z)


def reverse_kl(z, eps):
  """From sigmoid(z) to (1 - eps, eps)."""
  return s(z) * (ls(z) - np.log(1 - eps)) + s(-z) * (ls(-z) - np.log(eps))


def lrml(z, tau):
  return s(-z / tau) * -ls(z) + e(ls(z / tau) - z)


def alpha_score(r, alpha):
  return r if alpha == 1 else e((alpha - 1) * r) / (alpha - 1)


def alpha_shape(x, alpha):
  return x if alpha == 0 else (1 - e(-alpha * x)) / alpha


def log_odds(mean):
  mean = np.minimum(mean, -1e-7)
  return mean - np.log(-np.expm1(mean))


def by_label(x, up, down, desirable=1.0, undesirable=1.0):
  return np.where(x.label, desirable * up, undesirable * down)


class Case(NamedTuple):
  """What a loss is tested by."""

  oracle: Callable | None  # None: in test_losses_batch.py
  first: float | None  # where policy equals reference, delta 0 and z0 0
  tried: tuple = ()  # keywords besides the defaults

  @property
  def beta_squared(self):
    """Whether 1 / beta^2 is the only way that beta enters the first value."""
    return self.first in (25.0, 50.0)


LN2 = np.log(2.0)
BETA = dict(beta=0.3)
SMOOTH = dict(beta=0.5, label_smoothing=0.2)
WEIGHED = dict(beta=0.3, desirable=1.3, undesirable=0.7)
CASES = dict(
  dpo=Case(
    lambda x, beta=0.1, label_smoothing=0.0: smoothed(
      beta * gap(x.r), label_smoothing
    ),
    LN2,
    (BETA, SMOOTH),
  ),
  robust=Case(
    lambda x, beta=0.1, label_smoothing=0.1: (
      smoothed(beta * gap(x.r), label_smoothing, -1) / (1 - 2 * label_smoothing)
    ),
    LN2,
    (SMOOTH,),
  ),
  hinge=Case(
    lambda x, beta=0.1: np.maximum(0.0, 1 - beta * gap(x.r)), 1.0, (BETA,)
  ),
  ipo=Case(
    lambda x, beta=0.1: (gap(x.r / x.n) - 0.5 / beta) ** 2, 25.0, (BETA,)
  ),
  ipo_sum=Case(lambda x, beta=0.1: (gap(x.r) - 0.5 / beta) ** 2, 25.0, (BETA,)),
  dpo_norm=Case(lambda x, beta=5.0: -ls(beta * gap(x.r / x.n)), LN2, (BETA,)),
  exo=Case(
    lambda x, beta=0.1, epsilon=1e-3: reverse_kl(beta * gap(x.r), epsilon),
    -LN2 - (np.log(1e-3) + np.log(0.999)) / 2,
    (dict(beta=0.3, epsilon=0.1),),
  ),
  nca=Case(
    lambda x, beta=0.1: (
      -ls(beta * x.up) - ls(-beta * x.up) / 2 - ls(-beta * x.down) / 2
    ),
    2 * LN2,
    (BETA,),
  ),
  bco_pair=Case(
    lambda x, beta=0.1: (
      -ls(beta * x.up - x.delta) - ls(x.delta - beta * x.down)
    ),
    2 * LN2,
    (BETA,),
  ),
  sppo=Case(
    lambda x, beta=0.1: (x.up - 0.5 / beta) ** 2 + (x.down + 0.5 / beta) ** 2,
    50.0,
    (BETA,),
  ),
  apo_zero=Case(
    lambda x, beta=0.1: s(-beta * x.up) + s(beta * x.down), 1.0, (BETA,)
  ),
  apo_down=Case(
    lambda x, beta=0.1: s(beta * x.up) + s(-beta * gap(x.r)), 1.0, (BETA,)
  ),
  discopop=Case(
    lambda x, beta=0.1, tau=0.05: lrml(beta * gap(x.r), tau),
    (1 + LN2) / 2,
    (dict(beta=0.02, tau=0.7),),
  ),
  dpop=Case(
    lambda x, beta=0.1, penalty=50.0: (
      -ls(beta * (gap(x.r) - penalty * np.maximum(0.0, -x.up)))
    ),
    LN2,
    (dict(beta=0.3, penalty=2.0),),
  ),
  ld_dpo=Case(
    lambda x, beta=0.1, tail_weight=0.5: (
      -ls(
        beta * (1 - tail_weight) * gap(x.common_prefix_p - x.common_prefix_q)
        + beta * tail_weight * gap(x.r)
      )
    ),
    LN2,
    (dict(beta=0.3, tail_weight=0.2),),
  ),
  aot=Case(None, LN2),
  aot_unpaired=Case(None, LN2),
  dpo_forward_kl=Case(
    lambda x, beta=0.1: -ls(beta * gap(-e(-x.r))), LN2, (dict(beta=1e-4),)
  ),
  dpo_js=Case(lambda x, beta=0.1: -ls(beta * gap(ls(x.r))), LN2, (BETA,)),
  dpo_alpha=Case(
    lambda x, beta=0.1, alpha=0.5: -ls(beta * gap(alpha_score(x.r, alpha))),
    LN2,
    (dict(beta=0.3, alpha=1.2), dict(alpha=1.0)),
  ),
  slic=Case(
    lambda x, room=1.0, nll_weight=0.1: (
      np.maximum(0.0, room - gap(x.p)) - nll_weight * x.p[:, 0]
    ),
    None,
    (dict(room=9.0, nll_weight=0.4),),
  ),
  simpo=Case(
    lambda x, beta=2.0, gamma=0.5: -ls(beta * gap(x.p / x.n) - gamma),
    None,
    (dict(beta=0.7, gamma=1.3),),
  ),
  alphapo=Case(
    lambda x, beta=2.0, gamma=0.5, alpha=0.25: (
      -ls(beta * gap(alpha_shape(x.p / x.n, alpha)) - gamma)
    ),
    None,
    (dict(beta=0.7, gamma=1.3, alpha=-0.3), dict(alpha=0.0)),
  ),
  cpo=Case(
    lambda x, beta=0.1, nll_weight=1.0: (
      -ls(beta * gap(x.p)) + nll_weight * x.nll
    ),
    None,
    (dict(beta=0.3, nll_weight=0.4),),
  ),
  orpo=Case(
    lambda x, beta=0.1: x.nll - beta * ls(gap(log_odds(x.p / x.n))),
    None,
    (BETA,),
  ),
  kto=Case(  # weight minus value, as the paper has it
    lambda x, beta=0.1, **more: by_label(
      x, 1 - s(beta * (x.up - x.z0)), 1 - s(beta * (x.z0 - x.up)), **more
    ),
    0.5,
    (WEIGHED,),
  ),
  apo_zero_unpaired=Case(
    lambda x, beta=0.1, **more: by_label(
      x, s(-beta * x.up), s(beta * x.up), **more
    ),
    0.5,
    (WEIGHED,),
  ),
  bco=Case(
    lambda x, beta=0.1: by_label(
      x, -ls(beta * x.up - x.delta), -ls(x.delta - beta * x.up)
    ),
    LN2,
    (BETA,),
  ),
  bco_udm=Case(
    lambda x, beta=0.1: by_label(
      x, -ls(beta * x.up - x.delta), -ls(x.delta - beta * x.up), 1.0, x.weights
    ),
    LN2,
    (BETA,),
  ),
  sft=Case(lambda x: x.nll, None),
  sft_tokens=Case(lambda x: -x.p[:, 0] / x.mean_count, None),
)
ORACLES = {n: case.oracle for n, case in CASES.items() if case.oracle}
FIRST = {n: case.first for n, case in CASES.items() if case.first}


def test_every_loss_has_a_case():
  """Only those without a first value read no reference."""
  assert set(CASES) == set(LOSSES)
  for name, fn in LOSSES.items():
    policy, _, stats = inputs(example(columns_of(name)), jnp.float32)
    assert fn.reference == (name in FIRST)
    if fn.reference:
      with pytest.raises(AttributeError):
        fn(policy, None, stats)
    else:
      fn(policy, None, stats)


def slopes(oracle, x, field, kwargs, step=1e-5):
  """Central differences of an oracle's sum by a field of the example."""
  value, out = getattr(x, field), []
  for column in range(value.shape[1]):
    nudge = step * (np.arange(value.shape[1]) == column)[None, :]
    up, down = (
      oracle(x.replace(**{field: value + d}), **kwargs) for d in (nudge, -nudge)
    )
    out.append((up - down) / (2 * step))
  return np.stack(out, 1)


@pytest.mark.parametrize(
  "name,kwargs",
  [
    pytest.param(name, kwargs, id=f"{name}-{i}")
    for name in ORACLES
    for i, kwargs in enumerate(({}, *CASES[name].tried))
  ],
)
def test_value_and_slope_are_the_equation_s(name, kwargs):
  x, oracle = example(columns_of(name)), ORACLES[name]
  with jax.enable_x64(True):
    policy, ref, stats = inputs(x, jnp.float64)
    loss, back, _ = jax.vjp(
      lambda p: LOSSES[name](p, ref, stats, **kwargs), policy, has_aux=True
    )
    (grads,) = back(jnp.ones_like(loss))
    wanted = oracle(x, **kwargs)
    assert wanted.shape == loss.shape == x.label.shape
    assert loss.dtype == jnp.float64
    np.testing.assert_allclose(loss, wanted, rtol=1e-10, atol=1e-10)
    for field, got in (
      ("p", grads.sum),
      ("common_prefix_p", grads.common_prefix),
    ):
      want = slopes(oracle, x, field, kwargs)
      scale = max(1.0, np.abs(want).max())
      np.testing.assert_allclose(
        got, want, rtol=1e-5, atol=1e-8 * scale, err_msg=field
      )


@pytest.mark.parametrize("name", FIRST)
def test_where_policy_is_reference(name):
  x, pairs = example(columns_of(name)), LOSSES[name].kind == "pairs"
  x = x.replace(q=x.p, common_prefix_q=x.common_prefix_p, z0=0.0, delta=0.0)
  x = x.replace(weights=np.ones(32))
  for beta in (0.1, 7.0):
    loss, metrics = LOSSES[name](*inputs(x, jnp.float32), beta=beta)
    scale = (0.1 / beta) ** 2 if CASES[name].beta_squared else 1
    np.testing.assert_allclose(
      loss, np.full(32, FIRST[name] * scale), rtol=2e-6
    )
    means = {n: v[0] if isinstance(v, tuple) else v for n, v in metrics.items()}
    for key in ("chosen", "rejected", "margins", "accuracies"):
      if f"rewards/{key}" in means or pairs:
        assert (np.asarray(means[f"rewards/{key}"]) == 0).all(), key
    if pairs:  # ties are no wins
      assert (np.asarray(metrics["rewards/ties"]) == 1).all()


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_are_finite(name, size):
  """In float32: values as the oracle's, gradients finite."""
  if size > 1e4 and CASES[name].beta_squared:
    return  # a square leaves float32
  columns = columns_of(name)
  size = np.float64(np.float32(size))
  one = np.array([[-size, 0.0], [0.0, -size], [-size, -size], [0.0, 0.0]])
  one, zero = one[:, :columns], np.zeros((4, columns))
  sides = ((one, zero), (zero, one), (one, one[::-1]))
  labels = (True, False) if columns == 1 else (True,)
  for a, b in sides:
    for label in labels:
      n, label = np.full(a.shape, 4.0), np.full(4, label)
      x = Example(a, b, n, a, b, label, np.full(4, 3.0), size, 0.3)
      policy, ref, stats = inputs(x, jnp.float32)
      loss, back, metrics = jax.vjp(
        lambda p: LOSSES[name](p, ref, stats), policy, has_aux=True
      )
      for value in jax.tree.leaves((loss, metrics, back(jnp.ones_like(loss)))):
        assert np.isfinite(value).all(), (a, b)
      if name in ORACLES:
        np.testing.assert_allclose(loss, ORACLES[name](x), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["dpo_forward_kl", "dpo_alpha"])
def test_float32_keeps_a_small_gap(name):
  """1e-4 nats: e^r would round it to three digits."""
  x = example(2)
  small = lambda a: np.float64(np.float32(a / 1e6))
  x = x.replace(p=small(x.p), q=small(x.q))
  loss, _ = LOSSES[name](*inputs(x, jnp.float32), beta=1e5)
  np.testing.assert_allclose(loss, ORACLES[name](x, beta=1e5), rtol=1e-5)


def test_orpo_keeps_the_odds_of_nearly_certain_answers():
  """1 - e^x of x = -1e-5 is 1e-5; in float32 e^x has lost half a percent."""
  p = np.float64(np.float32([[-4e-5, -9e-6]]))
  zero, n = np.zeros((1, 2)), np.array([[4.0, 3.0]])
  x = Example(p, zero, n, zero, zero, np.full(1, True), np.ones(1))
  _, metrics = LOSSES["orpo"](*inputs(x, jnp.float32))
  wanted = gap(log_odds(p / n))
  np.testing.assert_allclose(metrics["log_odds"], wanted, rtol=1e-5)


# What "rewards/..." are where they are not beta r.
REWARDS = dict(
  slic=lambda x: x.p,
  cpo=lambda x: 0.3 * x.p,
  simpo=lambda x: 0.3 * x.p / x.n,
  orpo=lambda x: 0.3 * x.p / x.n,
  alphapo=lambda x: 0.3 * alpha_shape(x.p / x.n, 0.25),
  ld_dpo=lambda x: 0.15 * (x.r + x.common_prefix_p - x.common_prefix_q),
)


@pytest.mark.parametrize(
  "name", [n for n in LOSSES if LOSSES[n].kind == "pairs"]
)
def test_metrics_of_pairs(name):
  x = example(2)
  x.p[:3] = x.q[:3] = x.p[:3, :1]  # ties, whatever the reward
  x.n[:3] = 5.0
  x.common_prefix_p[:3] = x.common_prefix_q[:3] = x.p[:3] / 2
  kwargs = {} if name == "slic" else BETA
  reward = REWARDS.get(name, lambda x: 0.3 * x.r)(x)
  _, metrics = LOSSES[name](*inputs(x, jnp.float32), **kwargs)
  wanted = {
    "rewards/chosen": reward[:, 0],
    "rewards/rejected": reward[:, 1],
    "rewards/margins": gap(reward),
    "rewards/accuracies": gap(reward) > 0,
    "rewards/ties": gap(reward) == 0,
    "logps/chosen": x.p[:, 0],
    "logps/rejected": x.p[:, 1],
  }
  if name == "bco_pair":
    wanted["delta"] = np.full(32, x.delta)
  if name == "orpo":
    wanted["log_odds"] = gap(log_odds(x.p / x.n))
  assert set(wanted) == set(metrics)
  for key, value in wanted.items():
    np.testing.assert_allclose(
      metrics[key], value, rtol=2e-5, atol=5e-5, err_msg=key
    )


@pytest.mark.parametrize(
  "name", [n for n in LOSSES if LOSSES[n].kind == "unpaired"]
)
def test_metrics_of_unpaired_rows_are_over_their_own_class(name):
  x = example(1)
  for label in (x.label, np.full(32, True), np.full(32, False)):
    x = x.replace(label=label)
    loss, metrics = LOSSES[name](*inputs(x, jnp.float32), **BETA)
    means, reward = divide(sums_and_counts(metrics)), 0.3 * x.up
    wanted = {"delta": x.delta} if "bco" in name else {}
    wanted |= {"kl": x.z0} if name == "kto" else {}
    for key, rows in (("chosen", label), ("rejected", ~label)):
      if rows.any():  # a class without rows has no mean
        wanted[f"rewards/{key}"] = reward[rows].mean()
        wanted[f"logps/{key}"] = x.p[rows, 0].mean()
    assert set(means) == set(wanted) and np.isfinite(loss).all()
    for key, value in wanted.items():
      np.testing.assert_allclose(means[key], value, rtol=2e-5, err_msg=key)


@pytest.mark.parametrize("name", LOSSES)
def test_the_contract(name):
  """Every loss: [B] float32 near the float64 oracle, metrics a row, and sums
  that do not depend on how the batch is cut; undeclared statistics and extras
  are not read."""
  fn = LOSSES[name]
  assert fn.kind in ("pairs", "unpaired", "rows")
  x = example(columns_of(name))
  policy, ref, stats = inputs(x, jnp.float32)
  assert set(fn.stats) <= set(stats)
  stats = {n: stats[n] for n in fn.stats}
  if "common_prefix" not in fn.extras:
    policy, ref = (x.replace(common_prefix=None) for x in (policy, ref))

  def run(rows):
    cut = lambda a: a[rows] if a.ndim else a
    return fn(*jax.tree.map(cut, (policy, ref, stats)))

  loss, metrics = run(slice(None))
  assert loss.shape == (32,) and loss.dtype == jnp.float32
  if name in ORACLES:
    np.testing.assert_allclose(loss, ORACLES[name](x), rtol=1e-4, atol=1e-5)
  for value in jax.tree.leaves(metrics):
    assert value.shape == (32,)
  if fn.kind == "rows":
    np.testing.assert_allclose(metrics["nll"], x.nll, rtol=1e-6)
  halves = [run(rows) for rows in (slice(0, 10), slice(10, 32))]
  np.testing.assert_allclose(
    np.concatenate([h[0] for h in halves]), loss, rtol=1e-5, atol=1e-6
  )
  whole = sums_and_counts(metrics)
  parts = jax.tree.map(jnp.add, *(sums_and_counts(h[1]) for h in halves))
  for key in whole:
    np.testing.assert_allclose(whole[key], parts[key], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
  "name,stat",
  [
    (name, stat)
    for name, fn in LOSSES.items()
    for stat in fn.stats
    if stat != "label"
  ],
)
def test_no_gradient_runs_through_a_statistic(name, stat):
  policy, ref, stats = inputs(example(columns_of(name)), jnp.float32)

  def total(value):
    return jnp.sum(LOSSES[name](policy, ref, stats | {stat: value})[0])

  assert (np.asarray(jax.grad(total)(stats[stat])) == 0).all()
  assert total(stats[stat]) != total(stats[stat] + 1)


def as_logps(x, count=5.0):
  return Logps(jnp.asarray(x), jnp.full(np.shape(x), count))


def test_an_empty_response_counts_as_one_token():
  """0 / 0 would be NaN; its sum is 0."""
  policy = Logps(jnp.float32([[0.0, -6.0]]), jnp.float32([[0.0, 3.0]]))
  for name in ("ipo", "dpo_norm", "simpo", "cpo", "orpo", "alphapo", "sft"):
    loss, _ = LOSSES[name](policy, policy, {})
    assert np.isfinite(loss).all(), name


def test_the_slope_at_a_kink_is_zero():
  """DPOP's first update is DPO's; a hinge that is met pushes no more."""
  policy = as_logps(np.float32([[-8.0, -21.0]]))

  def grad(name, ref, **kwargs):
    loss = lambda p: LOSSES[name](policy.replace(sum=p), ref, {}, **kwargs)[0]
    return np.asarray(jax.grad(lambda p: jnp.sum(loss(p)))(policy.sum))

  np.testing.assert_array_equal(grad("dpop", policy), grad("dpo", policy))
  met = as_logps(np.float32([[-9.0, -20.0]]))  # D = 2
  assert (grad("hinge", met, beta=0.5) == 0).all()
  np.testing.assert_allclose(grad("hinge", met, beta=0.4), [[-0.4, 0.4]])
