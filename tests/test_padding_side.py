"""Padding on either side, its amount and its id leave log-probs alone."""

import functools

import jax
import jax.numpy as jnp
from models import make_mesh, put
import numpy as np
import oracle
import pytest
from test_embed import MODEL, params, rows, SIZES, token_rows

from jaxalign.core import sharding
from jaxalign.embed import passes
from jaxalign.model import attention, decoder, logprob


@functools.lru_cache
def machine():
  """(params, tokens, keys) -> [B, L] log-probs; None: positions 0, 1, ..."""

  def run(placed, tokens, keys):
    seen = None
    if keys is not None:
      asks = jnp.where(keys == attention.FAR, 0, keys)
      seen = attention.Seen(asks, keys)
    x = decoder.forward(placed, tokens, MODEL, seen=seen)
    return logprob.token_logps(x, decoder.head(placed, MODEL), tokens, 7)

  return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def ran(ids, where=None):
  mesh = make_mesh()
  with jax.set_mesh(mesh):
    lay = lambda x: None if x is None else sharding.put(mesh, x, "batch", None)
    logps = machine()(put(mesh, MODEL, params()), lay(ids), lay(where))
    return np.asarray(logps, np.float64)


def summed(sides, length, pad_id, picked):
  """Response log-probs [n] of rows padded to `length` on the given sides."""
  n = len(picked)
  ids = np.full((n, length), pad_id, np.int32)
  where = np.full((n, length), attention.FAR, np.int32)  # of the keys
  mask = np.zeros((n, length), bool)
  for i, (prompt, answer) in enumerate(picked):
    size = len(prompt) + len(answer)
    at = length - size if sides[i] == "left" else 0
    ids[i, at : at + size] = prompt + answer
    where[i, at : at + size] = np.arange(size)
    mask[i, at + len(prompt) : at + size] = True
  return (ran(ids, where) * mask).sum(1)


def by_hand(picked):
  """The same sums from the NumPy Llama, one row at a time, no padding."""
  each = lambda p, a: oracle.token_logps(params(), p + a, **SIZES)[len(p) :]
  return np.array([each(*pair).sum() for pair in picked])


@pytest.mark.parametrize("length, pad_id", [(16, 0), (24, 2)])
def test_either_side_gives_the_same_log_probs(length, pad_id):
  picked = rows()[:8]
  want = by_hand(picked)
  for sides in (["right"] * 8, ["left"] * 8, ["left", "right"] * 4):
    np.testing.assert_allclose(
      summed(sides, length, pad_id, picked), want, rtol=0, atol=2e-5
    )


def test_row_and_neighbours_do_not_matter():
  picked = rows()[:8]
  want = by_hand(picked)
  order = np.random.default_rng(3).permutation(8)
  got = summed(["left"] * 8, 16, 0, [picked[i] for i in order])
  np.testing.assert_allclose(got, want[order], rtol=0, atol=2e-5)
  others = rows()[8:15]
  alone = summed(["left"] * 8, 16, 0, others[:3] + [picked[5]] + others[3:])
  np.testing.assert_allclose(alone[3], want[5], rtol=0, atol=2e-5)


def test_without_positions_left_padding_would_move_them():
  """What the test above guards against (a pad that is looked at)."""
  picked = rows()[:4]
  ids = np.full((4, 20), 9, np.int32)
  for i, (prompt, answer) in enumerate(picked):
    ids[i, 20 - len(prompt + answer) :] = prompt + answer
  each = zip(ran(ids), picked)
  got = np.array([logp[20 - len(a) :].sum() for logp, (_, a) in each])
  assert np.abs(got - by_hand(picked)).max() > 0.1


def test_scored_rows_do_not_see_their_neighbours(alone):
  """`passes.score_rows` buckets and tiles; a row's number stays its own."""
  want, placed = by_hand(rows()), put(alone, MODEL, params())
  how = passes.PassOptions(2, 7)
  for chosen in (list(range(21)), list(range(20, -1, -1)), [20, 3]):
    tokens = token_rows([rows()[i] for i in chosen])
    got = passes.score_rows(alone, placed, MODEL, tokens, how).logp
    np.testing.assert_allclose(got, want[chosen], rtol=0, atol=2e-5)
