"""Log-probs against a float64 softmax; nothing around a row moves them."""

import functools

import flat
import jax
import jax.numpy as jnp
from models import draw, make_mesh, put, sized
import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.data import tokens as tokens_lib
from jaxalign.model import logprob
from jaxalign.train.logps import PRODUCERS

QUICK = {"xla_backend_optimization_level": 0}


def oracle(x, weight, tokens):
  """[B, L] log p(token t | before), its gradients of sum(mask * logp)."""
  x, weight = np.float64(x), np.float64(weight)
  scores = x @ weight.T
  top = scores.max(-1, keepdims=True)
  logp = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
  out = np.zeros(tokens.shape)
  for b in range(tokens.shape[0]):
    for t in range(1, tokens.shape[1]):
      out[b, t] = logp[b, t - 1, tokens[b, t]]
  return out, np.exp(logp)


def oracle_gradients(x, weight, tokens, mask):
  """d(sum of mask * logp) by x and by weight: weight[y] - p @ weight."""
  _, p = oracle(x, weight, tokens)
  x, weight = np.float64(x), np.float64(weight)
  hit = np.zeros_like(p)
  for b in range(tokens.shape[0]):
    for t in range(1, tokens.shape[1]):
      hit[b, t - 1] = -p[b, t - 1] * mask[b, t]
      hit[b, t - 1, tokens[b, t]] += mask[b, t]
  return hit @ weight, np.einsum("blv,bld->vd", hit, x)


@functools.lru_cache
def grad_fn(chunk):
  def total(x, weight, tokens, mask):
    each = logprob.token_logps(x, weight, tokens, chunk)
    s, n = logprob.masked_sums(each, mask)
    return jnp.sum(s), (each, s, n)

  return jax.jit(
    jax.value_and_grad(total, (0, 1), has_aux=True), compiler_options=QUICK
  )


@functools.lru_cache
def example():
  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(size=(4, 16, 12)))
  weight = np.float32(rng.normal(size=(22, 12)))
  tokens = rng.integers(0, 22, (4, 16)).astype(np.int32)
  return x, weight, tokens, rng.random((4, 16)) < 0.6


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_values_and_gradients_are_the_softmax_s(chunk, mesh):
  x, weight, tokens, mask = example()
  (_, (each, s, n)), (dx, dweight) = grad_fn(chunk)(
    sharding.put(mesh, x, "batch"),
    sharding.put(mesh, weight, "vocab", None),
    sharding.put(mesh, tokens, "batch"),
    sharding.put(mesh, mask, "batch"),
  )
  wanted, _ = oracle(x, weight, tokens)
  np.testing.assert_allclose(each, wanted, rtol=2e-6, atol=2e-6)
  assert (np.asarray(each)[:, 0] == 0).all()
  np.testing.assert_allclose(s, (wanted * mask).sum(1), rtol=2e-6)
  np.testing.assert_array_equal(n, mask.sum(1))
  assert each.dtype == s.dtype == n.dtype == jnp.float32
  wanted_dx, wanted_dweight = oracle_gradients(x, weight, tokens, mask)
  np.testing.assert_allclose(dx, wanted_dx, rtol=1e-5, atol=5e-6)
  np.testing.assert_allclose(dweight, wanted_dweight, rtol=1e-5, atol=2e-5)


def test_extreme_scores_stay_finite_and_exact():
  x, weight, tokens, mask = example()
  with jax.set_mesh(make_mesh()):
    (_, (each, _, _)), grads = grad_fn(7)(1000 * x, weight, tokens, mask)
  assert all(np.isfinite(g).all() for g in grads)
  wanted, _ = oracle(1000 * x, weight, tokens)
  assert wanted.min() < -1000
  np.testing.assert_allclose(each, wanted, rtol=1e-5, atol=2e-3)


def test_bfloat16_states_are_multiplied_into_float32():
  """Bfloat16 logits would be off by up to 0.06 a token (pitfall 24)."""
  x, weight, tokens, mask = example()
  x, weight = jnp.bfloat16(8 * x), jnp.bfloat16(weight)
  with jax.set_mesh(make_mesh()):
    (_, (each, _, _)), _ = grad_fn(7)(x, weight, tokens, mask)
  wanted, _ = oracle(
    np.asarray(x, np.float64), np.asarray(weight, np.float64), tokens
  )
  assert each.dtype == jnp.float32
  np.testing.assert_allclose(each, wanted, rtol=0, atol=1e-4)


def test_one_token_rows():
  with jax.set_mesh(make_mesh()):
    each = logprob.token_logps(
      jnp.ones((2, 1, 3)), jnp.ones((5, 3)), jnp.zeros((2, 1), jnp.int32)
    )
  np.testing.assert_array_equal(each, np.zeros((2, 1)))


# Whole rows, through the decoder.

MODEL = sized(2, 16, 4, 2, 4, 24, 32, 64)
EOS = 2


@functools.lru_cache
def producer():
  return jax.jit(PRODUCERS["chunked"](MODEL, 7), compiler_options=QUICK)


def logps(mesh, rows, length, pad_id=0):
  tokens, mask = tokens_lib.pad_rows(
    flat.rows_of(rows), np.arange(len(rows)), length, pad_id
  )
  where = put(mesh, MODEL, draw(MODEL, 5))
  out = producer()(
    where,
    *(
      sharding.put(mesh, x.reshape(4, -1, length), "batch")
      for x in (tokens, mask)
    ),
  )
  return np.asarray(out.sum).ravel(), np.asarray(out.count).ravel()


def rows_of(seed, n=8):
  rng = np.random.default_rng(seed)
  return [
    (
      rng.integers(3, 32, rng.integers(1, 6)).tolist(),
      rng.integers(3, 32, rng.integers(0, 7)).tolist() + [EOS],
    )
    for _ in range(n)
  ]


def test_the_eos_counts(mesh):
  """log p(response, EOS) = log p(response) + log p(EOS | response)."""
  rows = rows_of(1)
  base, count = logps(mesh, rows, 16)
  cut, fewer = logps(mesh, [(p, r[:-1]) for p, r in rows], 16)
  last, one = logps(mesh, [(p + r[:-1], r[-1:]) for p, r in rows], 16)
  np.testing.assert_array_equal(count, fewer + 1)
  assert (one == 1).all() and (last < 0).all()
  np.testing.assert_allclose(base, cut + last, rtol=0, atol=1e-5)
