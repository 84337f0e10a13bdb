"""Every loss against NumPy float64: values, slopes, the start, extremes.

The oracles are written from the equations, defaults included, and import
nothing of the losses; an `Example` holds what they and the losses read.
"""

import dataclasses

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
  """float64 [N, R] sums, public sums and counts; statistics."""

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

  def replace(self, **fields):
    return dataclasses.replace(self, **fields)


def example(columns, spread=8.0, rows=32):
  """Log-probabilities exact in float32, so that both widths see the same."""
  rng = np.random.default_rng(columns)
  exact = lambda x: np.float64(np.float32(x))
  p = exact(rng.normal(-60, 15, (rows, columns)))
  q = exact(p + rng.normal(0, spread, (rows, columns)))
  share = rng.uniform(0.2, 1.0, (rows, columns))
  return Example(
    p,
    q,
    np.float64(rng.integers(3, 25, (rows, columns))),
    exact(p * share),
    exact(q * share * 0.9),
    rng.random(rows) < 0.4,
    exact(rng.uniform(0.5, 10, rows)),
  )


def inputs(x, dtype):
  """(policy, ref, stats) of an example, as a step would hand them over."""
  cast = lambda a: jnp.asarray(a, dtype)
  policy = Logps(cast(x.p), cast(x.n), cast(x.common_prefix_p))
  ref = Logps(cast(x.q), cast(x.n), cast(x.common_prefix_q))
  stats = dict(
    label=jnp.asarray(x.label),
    weights=cast(x.weights),
    z0=cast(x.z0),
    delta=cast(x.delta),
    mean_count=cast(x.mean_count),
  )
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


def cdpo(z, eps):
  return -((1 - eps) * ls(z) + eps * ls(-z))


def dpo(x, beta=0.1, label_smoothing=0.0):
  return cdpo(beta * gap(x.r), label_smoothing)


def robust(x, beta=0.1, label_smoothing=0.1):
  z, eps = beta * gap(x.r), label_smoothing
  return (-(1 - eps) * ls(z) + eps * ls(-z)) / (1 - 2 * eps)


def hinge(x, beta=0.1):
  return np.maximum(0.0, 1 - beta * gap(x.r))


def ipo(x, beta=0.1):
  return (gap(x.r / x.n) - 1 / (2 * beta)) ** 2


def ipo_sum(x, beta=0.1):
  return (gap(x.r) - 1 / (2 * beta)) ** 2


def dpo_norm(x, beta=5.0):
  return -ls(beta * gap(x.r / x.n))


def exo(x, beta=0.1, epsilon=1e-3):
  z = beta * gap(x.r)
  return s(z) * (ls(z) - np.log(1 - epsilon)) + s(-z) * (
    ls(-z) - np.log(epsilon)
  )


def nca(x, beta=0.1):
  w, l = (beta * x.r).T
  return -ls(w) - ls(-w) / 2 - ls(-l) / 2


def bco_pair(x, beta=0.1):
  w, l = (beta * x.r).T
  return -ls(w - x.delta) - ls(x.delta - l)


def sppo(x, beta=0.1):
  w, l = x.r.T
  return (w - 0.5 / beta) ** 2 + (l + 0.5 / beta) ** 2


def apo_zero(x, beta=0.1):
  w, l = (beta * x.r).T
  return s(-w) + s(l)


def apo_down(x, beta=0.1):
  w, l = (beta * x.r).T
  return s(w) + s(l - w)


def discopop(x, beta=0.1, tau=0.05):
  z = beta * gap(x.r)
  return s(-z / tau) * -ls(z) + e(ls(z / tau) - z)


def dpop(x, beta=0.1, penalty=50.0):
  drop = np.maximum(0.0, x.q[:, 0] - x.p[:, 0])
  return -ls(beta * (gap(x.r) - penalty * drop))


def ld_dpo(x, beta=0.1, tail_weight=0.5):
  a = tail_weight
  p = (1 - a) * x.common_prefix_p + a * x.p
  q = (1 - a) * x.common_prefix_q + a * x.q
  return -ls(beta * gap(p - q))


def dpo_forward_kl(x, beta=0.1):
  return -ls(beta * gap(-e(-x.r)))


def dpo_js(x, beta=0.1):
  return -ls(beta * gap(ls(x.r)))


def dpo_alpha(x, beta=0.1, alpha=0.5):
  if alpha == 1:
    return dpo(x, beta)
  return -ls(beta * gap(e((alpha - 1) * x.r) / (alpha - 1)))


def sft(x):
  return -x.p[:, 0] / x.n[:, 0]


def sft_tokens(x):
  return -x.p[:, 0] / x.mean_count


def slic(x, room=1.0, nll_weight=0.1):
  return np.maximum(0.0, room - x.p[:, 0] + x.p[:, 1]) + nll_weight * -x.p[:, 0]


def simpo(x, beta=2.0, gamma=0.5):
  return -ls(beta * gap(x.p / x.n) - gamma)


def alphapo(x, beta=2.0, gamma=0.5, alpha=0.25):
  if alpha == 0:
    return simpo(x, beta, gamma)
  return -ls(beta * gap((1 - e(-alpha * x.p / x.n)) / alpha) - gamma)


def cpo(x, beta=0.1, nll_weight=1.0):
  return -ls(beta * gap(x.p)) + nll_weight * sft(x)


def orpo(x, beta=0.1):
  mean = np.minimum(x.p / x.n, -1e-7)
  odds = mean - np.log(-np.expm1(mean))
  return sft(x) - beta * ls(gap(odds))


def kto(x, beta=0.1, desirable=1.0, undesirable=1.0):
  """Weight minus value, as the paper has it."""
  r, value = x.r[:, 0], np.where(x.label, desirable, undesirable)
  return value - value * np.where(
    x.label, s(beta * (r - x.z0)), s(beta * (x.z0 - r))
  )


def apo_zero_unpaired(x, beta=0.1, desirable=1.0, undesirable=1.0):
  r = x.r[:, 0]
  return np.where(x.label, desirable * s(-beta * r), undesirable * s(beta * r))


def bco(x, beta=0.1):
  reward = beta * x.r[:, 0]
  return np.where(x.label, -ls(reward - x.delta), -ls(x.delta - reward))


def bco_udm(x, beta=0.1):
  return np.where(x.label, 1.0, x.weights) * bco(x, beta)


# Each with the keywords it is tried with; {} tries the defaults.
BETA = dict(beta=0.3)
SMOOTH = dict(beta=0.5, label_smoothing=0.2)
CASES = {
  dpo: ({}, BETA, SMOOTH),
  robust: ({}, SMOOTH),
  hinge: ({}, BETA),
  ipo: ({}, BETA),
  ipo_sum: ({}, BETA),
  dpo_norm: ({}, BETA),
  exo: ({}, dict(beta=0.3, epsilon=0.1)),
  nca: ({}, BETA),
  bco_pair: ({}, BETA),
  sppo: ({}, BETA),
  apo_zero: ({}, BETA),
  apo_down: ({}, BETA),
  discopop: ({}, dict(beta=0.02, tau=0.7)),
  dpop: ({}, dict(beta=0.3, penalty=2.0)),
  ld_dpo: ({}, dict(beta=0.3, tail_weight=0.2)),
  dpo_forward_kl: ({}, dict(beta=1e-4)),
  dpo_js: ({}, BETA),
  dpo_alpha: ({}, dict(beta=0.3, alpha=1.2), dict(alpha=1.0)),
  sft: ({},),
  sft_tokens: ({},),
  slic: ({}, dict(room=9.0, nll_weight=0.4)),
  simpo: ({}, dict(beta=0.7, gamma=1.3)),
  alphapo: ({}, dict(beta=0.7, gamma=1.3, alpha=-0.3), dict(alpha=0.0)),
  cpo: ({}, dict(beta=0.3, nll_weight=0.4)),
  orpo: ({}, BETA),
  kto: ({}, dict(beta=0.3, desirable=1.3, undesirable=0.7)),
  apo_zero_unpaired: ({}, dict(beta=0.3, desirable=1.3, undesirable=0.7)),
  bco: ({}, BETA),
  bco_udm: ({}, BETA),
}
ORACLES = {fn.__name__: fn for fn in CASES}
SORTED = {"aot", "aot_unpaired"}  # in test_losses_batch.py


def test_every_loss_has_an_oracle():
  assert set(ORACLES) | SORTED == set(LOSSES)


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
    pytest.param(fn.__name__, kwargs, id=f"{fn.__name__}-{i}")
    for fn, cases in CASES.items()
    for i, kwargs in enumerate(cases)
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


# What a loss is where policy equals reference, delta 0 and z0 0, by hand.
LN2 = np.log(2.0)
START = dict(
  dpo=LN2,
  robust=LN2,
  hinge=1.0,
  ipo=25.0,
  ipo_sum=25.0,
  dpo_norm=LN2,
  exo=-LN2 - (np.log(1e-3) + np.log(0.999)) / 2,
  nca=2 * LN2,
  bco_pair=2 * LN2,
  sppo=50.0,
  apo_zero=1.0,
  apo_down=1.0,
  discopop=(1 + LN2) / 2,
  dpop=LN2,
  ld_dpo=LN2,
  aot=LN2,
  aot_unpaired=LN2,
  dpo_forward_kl=LN2,
  dpo_js=LN2,
  dpo_alpha=LN2,
  kto=0.5,
  apo_zero_unpaired=0.5,
  bco=LN2,
  bco_udm=LN2,
)


@pytest.mark.parametrize("name", [n for n in LOSSES if LOSSES[n].reference])
def test_where_policy_is_reference(name):
  x = example(columns_of(name))
  x = x.replace(
    q=x.p,
    common_prefix_q=x.common_prefix_p,
    z0=0.0,
    delta=0.0,
    weights=np.ones(32),
  )
  for beta in (0.1, 7.0):
    kwargs = dict(beta=beta)
    loss, metrics = LOSSES[name](*inputs(x, jnp.float32), **kwargs)
    # 1 / beta^2 is the only way that beta enters.
    wanted = START[name] * (
      (0.1 / beta) ** 2 if name in ("ipo", "ipo_sum", "sppo") else 1
    )
    np.testing.assert_allclose(loss, np.full(32, wanted), rtol=2e-6)
    means = {n: v[0] if isinstance(v, tuple) else v for n, v in metrics.items()}
    for key in ("chosen", "rejected", "margins", "accuracies"):
      if f"rewards/{key}" in means or LOSSES[name].kind == "pairs":
        assert (np.asarray(means[f"rewards/{key}"]) == 0).all(), key
    if LOSSES[name].kind == "pairs":  # ties are no wins
      assert (np.asarray(metrics["rewards/ties"]) == 1).all()


def test_only_the_reference_free_read_no_reference():
  for name, fn in LOSSES.items():
    policy, _, stats = inputs(example(columns_of(name)), jnp.float32)
    if fn.reference:
      with pytest.raises(AttributeError):
        fn(policy, None, stats)
    else:
      fn(policy, None, stats)
    assert fn.reference == (name in START)


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_are_finite(name, size):
  """In float32: values as the oracle's, gradients finite."""
  if size > 1e4 and name in ("ipo", "ipo_sum", "sppo"):
    return  # a square leaves float32
  columns = columns_of(name)
  one = np.float64(
    np.float32([[-size, 0.0], [0.0, -size], [-size, -size], [0.0, 0.0]])
  )[:, :columns]
  zero = np.zeros_like(one)
  for a, b in ((one, zero), (zero, one), (one, one[::-1])):
    for liked in (True, False):
      x = Example(
        a,
        b,
        np.full(a.shape, 4.0),
        a,
        b,
        np.full(4, liked),
        np.full(4, 3.0),
        z0=np.float64(np.float32(size)),
        delta=0.3,
      )
      policy, ref, stats = inputs(x, jnp.float32)
      loss, back, metrics = jax.vjp(
        lambda p: LOSSES[name](p, ref, stats), policy, has_aux=True
      )
      for value in jax.tree.leaves((loss, metrics, back(jnp.ones_like(loss)))):
        assert np.isfinite(value).all(), (a, b)
      if name in ORACLES:
        np.testing.assert_allclose(loss, ORACLES[name](x), rtol=2e-5, atol=2e-6)
      if columns == 2:
        break


@pytest.mark.parametrize("name", ["dpo_forward_kl", "dpo_alpha"])
def test_float32_keeps_a_small_gap(name):
  """1e-4 nats: e^r would round it to three digits."""
  x = example(2)
  x.p = np.float64(np.float32(x.p / 1e6))
  x.q = np.float64(np.float32(x.q / 1e6))
  loss, _ = LOSSES[name](*inputs(x, jnp.float32), beta=1e5)
  np.testing.assert_allclose(loss, ORACLES[name](x, beta=1e5), rtol=1e-5)


def test_orpo_keeps_the_odds_of_nearly_certain_answers():
  """1 - e^x of x = -1e-5 is 1e-5; in float32 e^x has lost half a percent."""
  x = Example(
    *np.float64(np.float32([[[-4e-5, -9e-6]], [[0, 0]], [[4, 3]]])),
    *[np.zeros((1, 2))] * 2,
    np.full(1, True),
    np.ones(1),
  )
  _, metrics = LOSSES["orpo"](*inputs(x, jnp.float32))
  mean = x.p / x.n
  np.testing.assert_allclose(
    metrics["log_odds"], gap(mean - np.log(-np.expm1(mean))), rtol=1e-5
  )


REWARDS = {
  "sums": ("slic",),
  "beta sums": ("cpo",),
  "beta means": ("simpo", "orpo"),
  "shaped": ("alphapo",),
}


@pytest.mark.parametrize(
  "name", [n for n in LOSSES if LOSSES[n].kind == "pairs"]
)
def test_metrics_of_pairs(name):
  x = example(2)
  x.p[:3] = x.q[:3] = x.p[:3, :1]  # ties, whatever the reward
  x.n[:3] = 5.0
  x.common_prefix_p[:3] = x.common_prefix_q[:3] = x.p[:3] / 2
  kwargs = {} if name == "slic" else BETA
  kind = next((k for k, names in REWARDS.items() if name in names), "ratios")
  reward = {
    "sums": x.p,
    "beta sums": 0.3 * x.p,
    "beta means": 0.3 * x.p / x.n,
    "shaped": 0.3 * (1 - np.exp(-x.p / x.n / 4)) * 4,
    "ratios": 0.3 * x.r,
  }[kind]
  if name == "ld_dpo":
    reward = 0.15 * (x.r + x.common_prefix_p - x.common_prefix_q)
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
    mean = x.p / x.n
    wanted["log_odds"] = gap(mean - np.log(1 - np.exp(mean)))
  assert set(wanted) == set(metrics)
  for key, value in wanted.items():
    np.testing.assert_allclose(
      metrics[key], value, rtol=2e-5, atol=5e-5, err_msg=key
    )


@pytest.mark.parametrize(
  "name", [n for n in LOSSES if LOSSES[n].kind == "unpaired"]
)
def test_metrics_of_thumbs_are_over_their_own_class(name):
  x = example(1)
  for label in (x.label, np.full(32, True), np.full(32, False)):
    x = x.replace(label=label)
    loss, metrics = LOSSES[name](*inputs(x, jnp.float32), **BETA)
    means, reward = divide(sums_and_counts(metrics)), 0.3 * x.r[:, 0]
    wanted = {"delta": x.delta} if "bco" in name else {}
    wanted |= {"kl": x.z0} if name == "kto" else {}
    for key, rows in (("chosen", label), ("rejected", ~label)):
      if rows.any():  # a class without rows has no mean
        wanted[f"rewards/{key}"] = reward[rows].mean()
        wanted[f"logps/{key}"] = x.p[rows, 0].mean()
    assert set(means) == set(wanted) and np.isfinite(loss).all()
    for key, value in wanted.items():
      np.testing.assert_allclose(means[key], value, rtol=2e-5, err_msg=key)


def test_metrics_of_imitation_are_nats_a_token():
  x = example(2)
  for name in ("sft", "sft_tokens"):
    _, metrics = LOSSES[name](*inputs(x, jnp.float32))
    np.testing.assert_allclose(metrics["nll"], sft(x), rtol=1e-6)


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
    ("kto", "z0"),
    ("bco", "delta"),
    ("bco_pair", "delta"),
    ("bco_udm", "weights"),
    ("sft_tokens", "mean_count"),
  ],
)
def test_no_gradient_runs_through_a_statistic(name, stat):
  policy, ref, stats = inputs(example(columns_of(name)), jnp.float32)

  def total(value):
    return jnp.sum(LOSSES[name](policy, ref, stats | {stat: value})[0])

  assert (np.asarray(jax.grad(total)(stats[stat])) == 0).all()
  assert total(stats[stat]) != total(stats[stat] + 1)


def as_logps(x):
  return Logps(jnp.float32(x), jnp.full(np.shape(x), 5.0))


def test_dpo_by_hand():
  """beta 0.5, policy +2 and -1 against the reference: margin 1.5."""
  loss, metrics = LOSSES["dpo"](
    as_logps([[-8.0, -21.0]]), as_logps([[-10.0, -20.0]]), {}, beta=0.5
  )
  np.testing.assert_allclose(loss, [0.20141328], rtol=1e-6)
  np.testing.assert_allclose(metrics["rewards/chosen"], [1.0])
  np.testing.assert_allclose(metrics["rewards/rejected"], [-0.5])
  loss, _ = LOSSES["dpo"](
    as_logps([[-8.0, -21.0]]),
    as_logps([[-10.0, -20.0]]),
    {},
    beta=0.5,
    label_smoothing=0.25,
  )
  np.testing.assert_allclose(loss, [0.20141328 + 0.25 * 1.5], rtol=1e-6)


def test_kto_by_hand():
  """r - z0 = 2 - 1; beta 1: a liked row pays 1 - s(1), a disliked 1 - s(-1)."""
  loss, _ = LOSSES["kto"](
    as_logps([[-8.0], [-8.0]]),
    as_logps([[-10.0], [-10.0]]),
    dict(label=jnp.array([True, False]), z0=jnp.float32(1.0)),
    beta=1.0,
  )
  np.testing.assert_allclose(loss, [0.26894142, 0.73105858], rtol=1e-6)


def test_an_empty_response_counts_as_one_token():
  """0 / 0 would be NaN; its sum is 0."""
  policy = Logps(jnp.float32([[0.0, -6.0]]), jnp.float32([[0.0, 3.0]]))
  for name in ("ipo", "dpo_norm", "simpo", "cpo", "orpo", "alphapo", "sft"):
    loss, _ = LOSSES[name](policy, policy, {})
    assert np.isfinite(loss).all(), name


def test_the_slope_at_a_kink_is_zero():
  """DPOP's first update is DPO's; a hinge that is met pushes no more."""
  policy = as_logps([[-8.0, -21.0]])

  def grad(name, ref, **kwargs):
    fn = lambda p: jnp.sum(
      LOSSES[name](policy.replace(sum=p), ref, {}, **kwargs)[0]
    )
    return np.asarray(jax.grad(fn)(policy.sum))

  np.testing.assert_array_equal(grad("dpop", policy), grad("dpo", policy))
  met = as_logps([[-9.0, -20.0]])  # D = 2
  assert (grad("hinge", met, beta=0.5) == 0).all()
  np.testing.assert_allclose(grad("hinge", met, beta=0.4), [[-0.4, 0.4]])
