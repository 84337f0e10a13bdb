"""One pass over rows: right numbers, and the same bits on any mesh."""

import functools

import jax
import numpy as np
import oracle
import pytest

from jaxalign.core import sharding
from jaxalign.core.errors import NumericError
from jaxalign.data import tokens
from jaxalign.embed import passes
from jaxalign.model import decoder
from jaxalign.model.flops import decoder_flops

MODEL = decoder.ModelConfig(
  layers=2,
  width=16,
  heads=4,
  kv_heads=2,
  head_size=4,
  ff=24,
  vocab=32,
  context=24,
  tied=False,
)
SIZES = dict(kv_heads=2, rope_theta=10000.0, norm_eps=1e-5)
MESHES = ((1, 1), (8, 1), (4, 2))


@functools.lru_cache
def params():
  rng = np.random.default_rng(5)
  return {
    n: np.float32(rng.normal(1.0 if p.scale == 0 else 0.0, 0.3, p.shape))
    for n, p in decoder.table(MODEL).items()
  }


def token_rows(rows):
  ids = [np.array(p + r, np.int32) for p, r in rows]
  return tokens.TokenRows(
    np.concatenate(ids),
    np.cumsum([0] + [len(i) for i in ids]),
    np.array([len(p) for p, _ in rows], np.int32),
    np.zeros(len(rows), np.int32),
  )


@functools.lru_cache
def rows():
  """21 rows: no multiple of a tile; lengths 2 to 16."""
  rng = np.random.default_rng(1)
  out = [
    (
      [1] + rng.integers(3, 32, rng.integers(0, 8)).tolist(),
      rng.integers(3, 32, rng.integers(0, 7)).tolist() + [2],
    )
    for _ in range(20)
  ]
  return out + [([1] + [5] * 7, [6] * 7 + [2])]


@functools.cache
def score(shape, pooling="mean", order=None, spoilt=False):
  fsdp, tensor = shape
  mesh = sharding.make_mesh(
    dict(fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor]
  )
  with jax.set_mesh(mesh):
    where = {
      n: sharding.put(mesh, w, *decoder.table(MODEL)[n].axes)
      for n, w in params().items()
    }
    if spoilt:
      bad = params()["embed"].copy()
      bad[9] = np.nan
      where["embed"] = sharding.put(mesh, bad, "vocab", "width")
    picked = rows() if order is None else [rows()[i] for i in order]
    how = passes.PassOptions(2, 7, pooling)
    return passes.score_rows(mesh, where, MODEL, token_rows(picked), how)


@pytest.mark.parametrize("pooling", ["mean", "last", "response"])
def test_numbers_are_those_of_a_numpy_llama(pooling):
  got = score((1, 1), pooling)
  for i, (prompt, answer) in enumerate(rows()):
    ids = prompt + answer
    hidden = oracle.hidden_states(params(), ids, **SIZES)
    wanted = {
      "mean": hidden.mean(0),
      "last": hidden[-1],
      "response": hidden[len(prompt) :].mean(0),
    }[pooling]
    np.testing.assert_allclose(got.embedding[i], wanted, rtol=0, atol=2e-5)
    logp = oracle.token_logps(params(), ids, **SIZES)[len(prompt) :].sum()
    np.testing.assert_allclose(got.logp[i], logp, rtol=1e-5, atol=2e-5)
    assert got.count[i] == len(answer)
  assert all(x.dtype == np.float32 for x in got)


@pytest.mark.parametrize("shape", MESHES[1:])
def test_the_same_bits_on_any_mesh(shape):
  for a, b in zip(score(shape), score((1, 1))):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", MESHES)
def test_the_same_bits_in_any_order(shape):
  """Another tile, another device, other neighbours: the very same row."""
  order = tuple(np.random.default_rng(3).permutation(21).tolist())
  for a, b in zip(score(shape, order=order), score(shape)):
    np.testing.assert_array_equal(a, b[list(order)])


def test_a_part_alone_has_the_same_bits():
  """Reference log-probs of a subset join those of the pool exactly."""
  few = (20, 3, 7)  # with the longest row, so that the padding is the same
  for a, b in zip(score((8, 1), order=few), score((8, 1))):
    np.testing.assert_array_equal(a, b[list(few)])


# All that a pass can yield.


@functools.cache
def whole_pass(shape, outputs=tuple(passes.OUTPUTS), layers=0, cut=0):
  """Of `rows` and a row without a response; of a model cut beforehand."""
  fsdp, tensor = shape
  mesh = sharding.make_mesh(
    dict(fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor]
  )
  m = MODEL._replace(layers=cut, tied=True) if cut else MODEL
  with jax.set_mesh(mesh):
    where = {
      n: sharding.put(mesh, params()[n][: p.shape[0]], *p.axes)
      for n, p in decoder.table(m).items()
    }
    how = passes.PassOptions(2, 7, "last", layers)
    every = token_rows([*rows(), ([1, 5, 6], [])])
    return passes.pass_rows(mesh, where, m, every, outputs, how)


@pytest.mark.parametrize("layers", [0, 1])
def test_one_pass_yields_all_of_it_in_float64(layers):
  """Both embeddings after `layers`, all else after the last layer."""
  got = whole_pass((1, 1), layers=layers)
  assert list(got) == list(passes.OUTPUTS)
  first = {
    n: w[: layers or 2] if n.startswith("layers/") else w
    for n, w in params().items()
  }
  head = np.float64(params()["head"])
  near = lambda name, i, wanted: np.testing.assert_allclose(
    got[name][i], wanted, rtol=1e-5, atol=1e-4, err_msg=name
  )
  for i, (prompt, answer) in enumerate([*rows(), ([1, 5, 6], [])]):
    ids = prompt + answer
    early = oracle.hidden_states(first, ids, **SIZES)
    near("embedding", i, early[-1])
    # Without a response, the row that would be answered.
    near("answer_embedding", i, early[len(prompt) if answer else 0 :].mean(0))
    x = oracle.hidden_states(params(), ids, **SIZES)
    p = oracle.softmax(x @ head.T)
    at = np.arange(len(prompt), len(ids))
    logp = np.log(p[at - 1, np.array(ids)[at]])
    near("logp", i, logp.sum())
    near("count", i, len(answer))
    near("least", i, logp.min(initial=0))
    near("residual", i, (head[np.array(ids)[at]] - p[at - 1] @ head).sum(0))


def test_together_alone_and_on_another_mesh_the_same_bits():
  """What a pass is asked for beside a number does not change the number."""
  for name, x in whole_pass((1, 1), layers=1).items():
    np.testing.assert_array_equal(
      whole_pass((4, 2), layers=1)[name], x, err_msg=name
    )
  # What stops early has what a longer pass has on its way.
  pooled = whole_pass((1, 1), ("embedding", "answer_embedding"), cut=1)
  said = whole_pass((1, 1), ("residual", "least"))
  for name, x in (pooled | said).items():
    np.testing.assert_array_equal(
      whole_pass((1, 1), layers=1)[name], x, err_msg=name
    )


def test_flops_of_a_pass_are_those_of_its_outputs():
  t, d, v = 10, 16, 32
  layer = 2 * t * (2 * d * d + 2 * d * 8 + 3 * d * 24) + 4 * d * t * t
  head = 2 * d * v * t
  count = lambda *outputs, layers=0: passes.row_flops(MODEL, t, outputs, layers)
  assert count("embedding") == count("answer_embedding") == 2 * layer
  assert count("embedding", "answer_embedding", layers=1) == layer
  assert count("embedding", "logp", "count") == 2 * layer + head
  assert count("embedding", "logp", layers=1) == 2 * layer + head
  assert (
    count("residual", "least")
    == count(*passes.OUTPUTS, layers=1)
    == (2 * layer + 3 * head)
  )  # the head again, and its slope
  assert passes.pass_flops(
    MODEL, token_rows([([1] * 4, [2] * 6)] * 3), ("residual",)
  ) == (3 * count("residual"))


def test_rows_that_are_not_finite_are_named():
  bad = [i for i, (p, r) in enumerate(rows()) if 9 in p + r]
  assert 0 < len(bad) < 8
  with pytest.raises(NumericError) as caught:
    score((1, 1), spoilt=True)
  assert f"{len(bad)} of 21 rows" in str(caught.value)
  assert str(bad) in str(caught.value)


def test_flops_count_every_row():
  wanted = sum(decoder_flops(MODEL, len(p) + len(r)) for p, r in rows())
  assert passes.pass_flops(MODEL, token_rows(rows())) == wanted
