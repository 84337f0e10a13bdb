"""One pass over rows: right numbers, and the same bits on any mesh."""

import functools

import jax
from models import draw, make_mesh, put, sized
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import oracle
import pytest

from jaxalign.core.errors import NumericError
from jaxalign.data import tokens
from jaxalign.embed import passes
from jaxalign.model import decoder
from jaxalign.model.flops import decoder_flops

MODEL = sized(2, 16, 4, 2, 4, 24, 32, 24, tied=False)
SIZES = dict(kv_heads=2, rope_theta=10000.0, norm_eps=1e-5)
MESHES = ((1, 1), (8, 1), (4, 2))
PARAMS = draw(MODEL, 5)


def token_rows(rows):
  ids = [np.array(p + r, np.int32) for p, r in rows]
  return tokens.join_rows(ids, [len(p) for p, _ in rows])


@functools.lru_cache
def rows():
  """21 rows: no multiple of a tile; lengths 2 to 16."""
  rng = np.random.default_rng(1)
  drawn = lambda most: rng.integers(3, 32, rng.integers(0, most)).tolist()
  out = [([1] + drawn(8), drawn(7) + [2]) for _ in range(20)]
  return out + [([1] + [5] * 7, [6] * 7 + [2])]


@functools.cache
def score(shape, pooling="mean", order=range(21), spoilt=False):
  mesh, params = make_mesh(*shape), dict(PARAMS)
  if spoilt:
    bad = np.arange(32)[:, None] == 9
    params["embed"] = np.where(bad, np.float32(np.nan), params["embed"])
  with jax.set_mesh(mesh):
    placed, some = put(mesh, MODEL, params), [rows()[i] for i in order]
    how = passes.PassOptions(2, 7, pooling)
    return passes.score_rows(mesh, placed, MODEL, token_rows(some), how)


@pytest.mark.parametrize("pooling", ["mean", "last", "response"])
def test_numbers_are_those_of_a_numpy_llama(pooling):
  got = score((1, 1), pooling)
  for i, (prompt, answer) in enumerate(rows()):
    ids, start = prompt + answer, len(prompt)
    hidden = oracle.hidden_states(PARAMS, ids, **SIZES)
    first = dict(mean=0, last=len(ids) - 1, response=start)[pooling]
    assert_allclose(got.embedding[i], hidden[first:].mean(0), rtol=0, atol=2e-5)
    logp = oracle.token_logps(PARAMS, ids, **SIZES)[start:].sum()
    assert_allclose(got.logp[i], logp, rtol=1e-5, atol=2e-5)
    assert got.count[i] == len(answer)
  assert all(x.dtype == np.float32 for x in got)


# Another tile, another device, other neighbours: the very same row. The few
# are with the longest row, so that the padding is the same.
ORDER = tuple(np.random.default_rng(3).permutation(21).tolist())


@pytest.mark.parametrize(
  "shape, order",
  [((8, 1), tuple(range(21))), ((4, 2), tuple(range(21)))]
  + [(shape, ORDER) for shape in MESHES]
  + [((8, 1), (20, 3, 7))],
)
def test_the_same_bits_on_any_mesh_in_any_order_and_alone(shape, order):
  for a, b in zip(score(shape, order=order), score((1, 1))):
    assert_array_equal(a, b[list(order)])


@functools.cache
def whole_pass(shape, outputs=tuple(passes.OUTPUTS), layers=0, cut=0):
  """Of `rows` and a row without a response; of a model cut beforehand."""
  m = MODEL._replace(layers=cut, tied=True) if cut else MODEL
  mesh, how = make_mesh(*shape), passes.PassOptions(2, 7, "last", layers)
  with jax.set_mesh(mesh):
    table = decoder.table(m)
    params = {n: PARAMS[n][: p.shape[0]] for n, p in table.items()}
    every = token_rows([*rows(), ([1, 5, 6], [])])
    placed = put(mesh, m, params)
    return passes.pass_rows(mesh, placed, m, every, outputs, how)


@pytest.mark.parametrize("layers", [0, 1])
def test_one_pass_yields_all_of_it_in_float64(layers):
  """Both embeddings after `layers`, all else after the last layer."""
  got = whole_pass((1, 1), layers=layers)
  assert list(got) == list(passes.OUTPUTS)
  first = {
    n: w[: layers or 2] if n.startswith("layers/") else w
    for n, w in PARAMS.items()
  }
  head = np.float64(PARAMS["head"])
  near = lambda name, i, wanted: assert_allclose(
    got[name][i], wanted, rtol=1e-5, atol=1e-4, err_msg=name
  )
  for i, (prompt, answer) in enumerate([*rows(), ([1, 5, 6], [])]):
    ids = np.array(prompt + answer)
    early = oracle.hidden_states(first, ids, **SIZES)
    near("embedding", i, early[-1])
    # Without a response, the row that would be answered.
    near("answer_embedding", i, early[len(prompt) if answer else 0 :].mean(0))
    x = oracle.hidden_states(PARAMS, ids, **SIZES)
    p, at = oracle.softmax(x @ head.T), np.arange(len(prompt), len(ids))
    logp = np.log(p[at - 1, ids[at]])
    near("logp", i, logp.sum())
    near("count", i, len(answer))
    near("least", i, logp.min(initial=0))
    near("residual", i, (head[ids[at]] - p[at - 1] @ head).sum(0))


def test_together_alone_and_on_another_mesh_the_same_bits():
  """Other outputs of a pass do not change a number."""
  wanted = whole_pass((1, 1), layers=1)
  others = [
    whole_pass((4, 2), layers=1),
    # What stops early has what a longer pass has on its way.
    whole_pass((1, 1), ("embedding", "answer_embedding"), cut=1),
    whole_pass((1, 1), ("residual", "least")),
  ]
  for found in others:
    for name, x in found.items():
      assert_array_equal(x, wanted[name], err_msg=name)


def test_flops_of_a_pass_are_those_of_its_outputs():
  t, d, v = 10, 16, 32
  layer = 2 * t * (2 * d * d + 2 * d * 8 + 3 * d * 24) + 4 * d * t * t
  head = 2 * d * v * t
  count = lambda *outputs, layers=0: passes.row_flops(MODEL, t, outputs, layers)
  assert count("embedding") == count("answer_embedding") == 2 * layer
  assert count("embedding", "answer_embedding", layers=1) == layer
  assert count("embedding", "logp", "count") == 2 * layer + head
  assert count("embedding", "logp", layers=1) == 2 * layer + head
  # The head again, and its slope.
  residual = count("residual", "least")
  assert residual == count(*passes.OUTPUTS, layers=1) == 2 * layer + 3 * head
  three = token_rows([([1] * 4, [2] * 6)] * 3)
  assert passes.pass_flops(MODEL, three, ("residual",)) == 3 * residual
  wanted = sum(decoder_flops(MODEL, len(p) + len(r)) for p, r in rows())
  assert passes.pass_flops(MODEL, token_rows(rows())) == wanted


def test_rows_that_are_not_finite_are_named():
  bad = [i for i, (p, r) in enumerate(rows()) if 9 in p + r]
  assert 0 < len(bad) < 8
  with pytest.raises(NumericError) as caught:
    score((1, 1), spoilt=True)
  assert f"{len(bad)} of 21 rows" in str(caught.value)
  assert str(bad) in str(caught.value)
