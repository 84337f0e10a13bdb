"""Padding on either side, its amount and its id leave log-probs alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_embed import MODEL, PARAMS, rows, SIZES, token_rows

from jaxalign.core import sharding
from jaxalign.embed import passes
from jaxalign.model import attention, decoder, logprob


@functools.lru_cache
def machine():
  """(params, tokens, keys) -> [B, L] log-probs; None: positions 0, 1, ..."""

  def run(placed, tokens, keys):
    seen = None
    if keys is not None:
      queries = jnp.where(keys == attention.FAR, 0, keys)
      seen = attention.Seen(queries, keys)
    x = decoder.forward(placed, tokens, MODEL, seen=seen)
    return logprob.token_logps(x, decoder.head(placed, MODEL), tokens, 7)

  return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def placed(mesh):
  axes = decoder.table(MODEL)
  return {n: sharding.put(mesh, w, *axes[n].axes) for n, w in PARAMS.items()}


def ran(mesh, ids, where=None):
  given = [
    None if x is None else sharding.put(mesh, x, "batch", None)
    for x in (ids, where)
  ]
  return np.asarray(machine()(placed(mesh), *given), np.float64)


def summed(mesh, sides, length, pad_id, picked):
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
  return (ran(mesh, ids, where) * mask).sum(1)


def by_hand(picked):
  """The same sums from the NumPy Llama, one row at a time, no padding."""
  logps = [oracle.token_logps(PARAMS, p + a, **SIZES) for p, a in picked]
  return np.array([x[len(p) :].sum() for x, (p, _) in zip(logps, picked)])


@pytest.mark.parametrize("length, pad_id", [(16, 0), (24, 2)])
def test_either_side_gives_the_same_log_probs(alone, length, pad_id):
  picked = rows()[:8]
  want = by_hand(picked)
  for sides in (["right"] * 8, ["left"] * 8, ["left", "right"] * 4):
    got = summed(alone, sides, length, pad_id, picked)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_row_and_neighbours_do_not_matter(alone):
  picked, others = rows()[:8], rows()[8:15]
  want = by_hand(picked)
  order = np.random.default_rng(3).permutation(8)
  got = summed(alone, ["left"] * 8, 16, 0, [picked[i] for i in order])
  np.testing.assert_allclose(got, want[order], rtol=0, atol=2e-5)
  among = others[:3] + [picked[5]] + others[3:]
  got = summed(alone, ["left"] * 8, 16, 0, among)[3]
  np.testing.assert_allclose(got, want[5], rtol=0, atol=2e-5)


def test_without_positions_left_padding_would_move_them(alone):
  """What the test above guards against (a pad that is looked at)."""
  picked = rows()[:4]
  ids = np.full((4, 20), 9, np.int32)
  for i, (prompt, answer) in enumerate(picked):
    ids[i, 20 - len(prompt + answer) :] = prompt + answer
  logp = zip(ran(alone, ids), picked)
  got = np.array([x[20 - len(answer) :].sum() for x, (_, answer) in logp])
  assert np.abs(got - by_hand(picked)).max() > 0.1


def test_scored_rows_do_not_see_their_neighbours(alone):
  """`passes.score_rows` buckets its rows; a row's number stays its own."""
  want, weights, how = by_hand(rows()), placed(alone), passes.PassOptions(2, 7)
  for part in (list(range(21)), list(range(20, -1, -1)), [20, 3]):
    picked = token_rows([rows()[i] for i in part])
    scores = passes.score_rows(alone, weights, MODEL, picked, how)
    np.testing.assert_allclose(scores.logp, want[part], rtol=0, atol=2e-5)
