"""DPO and KTO against NumPy: values, gradients, extremes, metrics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.train.logps import Logps
from jaxalign.train.losses import LOSSES
from jaxalign.train.metrics import divide, sums_and_counts


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
  """Machine code that no LLVM pass has polished compiles in two thirds."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def log_sigmoid(x):
  """float64, without overflow: -log(1 + e^-x)."""
  return -np.logaddexp(0.0, -np.float64(x))


def sigmoid(x):
  return np.exp(log_sigmoid(x))


def dpo(policy, ref, beta, eps):
  """Rafailov et al. 2023, eq. 7, with the conservative labels of cDPO."""
  gap = beta * ((policy[:, 0] - policy[:, 1]) - (ref[:, 0] - ref[:, 1]))
  return -((1 - eps) * log_sigmoid(gap) + eps * log_sigmoid(-gap))


def kto(policy, ref, label, z0, beta, up, down):
  """Ethayarajh et al. 2024, eq. 8: weight minus value."""
  r = policy[:, 0] - ref[:, 0]
  value = np.where(label, up * sigmoid(beta * (r - z0)),
                   down * sigmoid(beta * (z0 - r)))
  return np.where(label, up, down) - value


def as_logps(x):
  return Logps(jnp.float32(x), jnp.full(np.shape(x), 5.0))


def example(columns, spread=8.0, n=64):
  rng = np.random.default_rng(columns)
  policy = np.float32(rng.normal(-60, 15, (n, columns)))
  return policy, np.float32(policy + rng.normal(0, spread, (n, columns)))


@pytest.mark.parametrize("beta,eps", [(0.1, 0.0), (0.5, 0.1), (2.0, 0.3)])
def test_dpo_is_its_equation(beta, eps):
  policy, ref = example(2)
  loss, metrics = LOSSES["dpo"](as_logps(policy), as_logps(ref), {}, beta=beta,
                                label_smoothing=eps)
  assert loss.shape == (64,)
  p, r = np.float64(policy), np.float64(ref)
  np.testing.assert_allclose(loss, dpo(p, r, beta, eps), rtol=2e-5, atol=1e-6)
  chosen, rejected = (beta * (p - r)).T
  for name, wanted in {
      "rewards/chosen": chosen, "rewards/rejected": rejected,
      "rewards/margins": chosen - rejected,
      "rewards/accuracies": chosen > rejected, "rewards/ties": 0 * chosen,
      "logps/chosen": p[:, 0], "logps/rejected": p[:, 1]}.items():
    np.testing.assert_allclose(metrics[name], wanted, rtol=1e-5, atol=2e-5,
                               err_msg=name)


def test_dpo_by_hand():
  """beta 0.5, policy +2 and -1 against the reference: margin 1.5."""
  loss, metrics = LOSSES["dpo"](as_logps([[-8.0, -21.0]]),
                                as_logps([[-10.0, -20.0]]), {}, beta=0.5)
  np.testing.assert_allclose(loss, [0.20141328], rtol=1e-6)
  np.testing.assert_allclose(metrics["rewards/chosen"], [1.0])
  np.testing.assert_allclose(metrics["rewards/rejected"], [-0.5])
  loss, _ = LOSSES["dpo"](as_logps([[-8.0, -21.0]]), as_logps([[-10.0, -20.0]]),
                          {}, beta=0.5, label_smoothing=0.25)
  np.testing.assert_allclose(loss, [0.20141328 + 0.25 * 1.5], rtol=1e-6)


@pytest.mark.parametrize("up,down,z0", [(1.0, 1.0, 0.0), (1.3, 0.7, 2.5)])
def test_kto_is_its_equation(up, down, z0):
  policy, ref = example(1)
  label = np.random.default_rng(7).random(64) < 0.4
  loss, metrics = LOSSES["kto"](
      as_logps(policy), as_logps(ref), dict(label=jnp.array(label),
                                            z0=jnp.float32(z0)),
      beta=0.3, desirable=up, undesirable=down)
  p, r = np.float64(policy), np.float64(ref)
  np.testing.assert_allclose(loss, kto(p, r, label, z0, 0.3, up, down),
                             rtol=2e-5, atol=1e-6)
  # Each class's means are over its own rows only.
  means = divide(sums_and_counts(metrics))
  reward = 0.3 * (p - r)[:, 0]
  for name, wanted in {
      "rewards/chosen": reward[label].mean(), "kl": z0,
      "rewards/rejected": reward[~label].mean(),
      "logps/chosen": p[label, 0].mean(),
      "logps/rejected": p[~label, 0].mean()}.items():
    np.testing.assert_allclose(means[name], wanted, rtol=1e-5, err_msg=name)


def test_kto_by_hand():
  """r - z0 = 2 - 1; beta 1: a liked row pays 1 - s(1), a disliked 1 - s(-1)."""
  loss, _ = LOSSES["kto"](
      as_logps([[-8.0], [-8.0]]), as_logps([[-10.0], [-10.0]]),
      dict(label=jnp.array([True, False]), z0=jnp.float32(1.0)), beta=1.0)
  np.testing.assert_allclose(loss, [0.26894142, 0.73105858], rtol=1e-6)


def test_one_class_leaves_the_other_s_metrics_out():
  policy, ref = example(1)
  for liked in (True, False):
    loss, metrics = LOSSES["kto"](
        as_logps(policy), as_logps(ref),
        dict(label=jnp.full(64, liked), z0=jnp.float32(0.0)))
    means = divide(sums_and_counts(metrics))
    assert np.isfinite(loss).all() and np.isfinite(list(means.values())).all()
    assert ("rewards/chosen" in means) == ("logps/chosen" in means) == liked
    assert ("rewards/rejected" in means) != liked


@pytest.mark.parametrize("beta", [0.1, 0.5, 7.0])
def test_where_policy_is_reference(beta):
  policy, _ = example(2)
  loss, metrics = LOSSES["dpo"](as_logps(policy), as_logps(policy), {},
                                beta=beta, label_smoothing=0.2)
  np.testing.assert_allclose(loss, np.log(2.0), rtol=1e-7)
  for name in ("chosen", "rejected", "margins", "accuracies"):
    assert (np.asarray(metrics[f"rewards/{name}"]) == 0).all(), name
  assert (np.asarray(metrics["rewards/ties"]) == 1).all()  # ties are no wins
  label = jnp.arange(64) < 20
  loss, metrics = LOSSES["kto"](
      as_logps(policy[:, :1]), as_logps(policy[:, :1]),
      dict(label=label, z0=jnp.float32(0.0)), beta=beta, desirable=1.5)
  np.testing.assert_array_equal(loss, np.where(label, 0.75, 0.5))
  assert (np.asarray(metrics["rewards/chosen"][0]) == 0).all()


def gradient(name, policy, ref, **kwargs):
  """d(sum of losses) by the policy's sums."""
  stats = kwargs.pop("stats", {})
  def total(p):
    loss, _ = LOSSES[name](Logps(p, jnp.ones_like(p)), as_logps(ref), stats,
                           **kwargs)
    return jnp.sum(loss)
  return np.asarray(jax.grad(total)(jnp.float32(policy)))


def slopes(fn, policy, step=1e-4):
  """Central differences of a [n]-valued oracle by each column, float64."""
  policy, out = np.float64(policy), []
  for column in range(policy.shape[1]):
    nudge = step * (np.arange(policy.shape[1]) == column)[None, :]
    out.append((fn(policy + nudge) - fn(policy - nudge)) / (2 * step))
  return np.stack(out, 1)


def test_gradients_are_the_slopes():
  policy, ref = example(2)
  for eps in (0.0, 0.2):
    np.testing.assert_allclose(
        gradient("dpo", policy, ref, beta=0.3, label_smoothing=eps),
        slopes(lambda p: dpo(p, np.float64(ref), 0.3, eps), policy),
        rtol=1e-4, atol=1e-6)
  policy, ref = example(1)
  label = np.random.default_rng(7).random(64) < 0.4
  np.testing.assert_allclose(
      gradient("kto", policy, ref, beta=0.3, desirable=1.3, undesirable=0.6,
               stats=dict(label=jnp.array(label), z0=jnp.float32(1.5))),
      slopes(lambda p: kto(p, np.float64(ref), label, 1.5, 0.3, 1.3, 0.6),
             policy), rtol=1e-4, atol=1e-6)


def test_no_gradient_runs_through_z0():
  policy, ref = example(1)
  def total(z0):
    loss, _ = LOSSES["kto"](as_logps(policy), as_logps(ref),
                            dict(label=jnp.arange(64) < 9, z0=z0))
    return jnp.sum(loss)
  assert jax.grad(total)(jnp.float32(1.0)) == 0
  assert total(jnp.float32(1.0)) != total(jnp.float32(2.0))


@pytest.mark.parametrize("size", [1e3, 1e6, 1e30])
def test_extremes_are_finite(size):
  policy = np.float32([[-size, 0.0], [0.0, -size], [-size, -size]])
  zero = np.zeros_like(policy)
  for a, b in ((policy, zero), (zero, policy)):
    for eps in (0.0, 0.1):
      loss, metrics = LOSSES["dpo"](as_logps(a), as_logps(b), {}, beta=0.1,
                                    label_smoothing=eps)
      wanted = dpo(np.float64(a), np.float64(b), 0.1, eps)
      np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=1e-30)
      assert all(np.isfinite(x).all() for x in metrics.values())
      assert np.isfinite(gradient("dpo", a, b, label_smoothing=eps)).all()
    for liked in (True, False):
      stats = dict(label=jnp.full(3, liked), z0=jnp.float32(size))
      loss, _ = LOSSES["kto"](as_logps(a), as_logps(b), stats)
      wanted = kto(np.float64(a), np.float64(b), liked,
                   np.float64(np.float32(size)), 0.1, 1.0, 1.0)
      np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=2e-7)
      assert np.isfinite(gradient("kto", a, b, stats=stats)).all()


def test_sft_is_nats_a_token_of_the_first_response():
  policy = Logps(jnp.float32([[-6.0, -100.0], [-9.0, -1.0]]),
                 jnp.float32([[3.0, 1.0], [2.0, 1.0]]))
  loss, metrics = LOSSES["sft"](policy, None, {})
  np.testing.assert_allclose(loss, [2.0, 4.5])
  np.testing.assert_allclose(metrics["nll"], [2.0, 4.5])


@pytest.mark.parametrize("name", LOSSES)
def test_the_contract(name):
  """Every loss: [B] float32, finite at the start, metrics a row, and the
  gradient of a mean that does not depend on how the batch is cut."""
  fn = LOSSES[name]
  assert fn.kind in ("pairs", "thumbs", "rows")
  assert set(fn.stats) <= {"label", "z0"}
  policy, ref = example(1 if fn.kind == "thumbs" else 2)
  def run(policy, ref, rows):
    stats = dict(label=(jnp.arange(64) % 3 == 0)[rows], z0=jnp.float32(0.5))
    return fn(as_logps(policy[rows]), as_logps(ref[rows]), stats)
  loss, metrics = run(policy, ref, slice(None))
  assert loss.shape == (64,) and loss.dtype == jnp.float32
  for value in jax.tree.leaves(metrics):
    assert value.shape == (64,)
  halves = [run(policy, ref, rows) for rows in (slice(0, 20), slice(20, 64))]
  np.testing.assert_allclose(np.concatenate([h[0] for h in halves]), loss,
                             rtol=1e-6)
  whole = sums_and_counts(metrics)
  parts = jax.tree.map(jnp.add, *(sums_and_counts(h[1]) for h in halves))
  for key in whole:
    np.testing.assert_allclose(whole[key], parts[key], rtol=1e-5, atol=1e-4)
  assert np.isfinite(run(policy, policy, slice(None))[0]).all()


def test_divide_weighs_and_leaves_out():
  totals = functools.reduce(
      lambda a, b: {n: a[n] + b[n] for n in a},
      [sums_and_counts(dict(x=jnp.array([1.0, 2.0]),
                            y=(jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])),
                            z=(jnp.zeros(2), jnp.zeros(2)))),
       sums_and_counts(dict(x=jnp.array([6.0]),
                            y=(jnp.array([4.0]), jnp.array([1.0])),
                            z=(jnp.zeros(1), jnp.zeros(1))))])
  assert divide(totals) == dict(x=3.0, y=3.5)  # not the means' mean 3.75
  assert np.isnan(divide(dict(x=np.array([1.0, np.nan])))["x"])
