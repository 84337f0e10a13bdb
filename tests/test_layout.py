"""Packed rows: every token where it should be, and the padded rows' numbers.

The packing is checked token by token against lists; log-probabilities and
slopes against the float64 Llama of `oracle` and against the padded layout.
"""

import functools

import flat
import jax
import jax.numpy as jnp
from models import draw, make_mesh, put, sized
import numpy as np
import oracle
import pytest

from jaxalign.core.errors import DataError
from jaxalign.data import tokens as tokens_lib
from jaxalign.train import feed, packing
from jaxalign.train import packed_shapes as shapes
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.metrics import packing_metrics

pytestmark = pytest.mark.usefixtures("quick_compiles")

EOS = 2
MODEL = sized(2, 16, 4, 2, 4, 24, 32, 64)
SIZES = dict(kv_heads=2, rope_theta=10000.0, norm_eps=1e-5)


def rows_of(pairs):
  """[(prompt, answer, answer..)] of ids -> TokenRows, R rows a pair."""
  ids = [np.array(p + a, np.int32) for p, *answers in pairs for a in answers]
  start = [len(p) for p, *answers in pairs for _ in answers]
  return tokens_lib.TokenRows(
    np.concatenate(ids),
    np.cumsum([0, *map(len, ids)]),
    np.array(start, np.int32),
    np.zeros(len(ids), np.int32),
  )


@functools.lru_cache
def examples(n=16, r=2, seed=0, longest=14):
  """Prompts of 1 to `longest` tokens, answers of 1 to 8 with their EOS."""
  rng = np.random.default_rng(seed)
  ids = lambda n: rng.integers(3, 32, n).tolist()
  return [
    (
      ids(rng.integers(1, longest + 1)),
      *(ids(rng.integers(0, 8)) + [EOS] for _ in range(r)),
    )
    for _ in range(n)
  ]


def sums_of(pairs):
  """[n, R] of a reference: a row is known by its first."""
  shape = len(pairs), len(pairs[0]) - 1
  return np.float32(np.random.default_rng(7).normal(-20, 4, shape))


def feed_of(
  pairs, *, seed=3, batch=16, mesh=None, accumulation=1, layout="packed"
):
  rows = flat.train_rows(rows_of(pairs), len(pairs[0]) - 1, sums_of(pairs))
  batching = feed.Batching(batch, seed, accumulation, 64, layout)
  return feed.Feed(mesh, rows, batching, lambda step: 1e-3)


# The packing, on lists.


def test_rows_are_dealt_evenly_and_all_of_them():
  sizes = np.array([9, 1, 1, 8, 2, 7, 3, 3])
  bins = packing.deal(sizes, 4)
  assert bins.shape == (4, 2)
  assert sorted(bins.ravel()) == list(range(8))
  assert sizes[bins].sum(1).tolist() == [10, 9, 9, 6]  # by hand: 9+1 8+1 7+2
  np.testing.assert_array_equal(packing.deal(np.ones(6), 1)[0], np.arange(6))


def test_first_fit_by_hand():
  rows = shapes.first_fit(np.array([3, 10, 6, 4, 1]), 10)
  assert rows == [[1], [2, 3], [0, 4]]


@pytest.mark.parametrize("r", [1, 2])
def test_every_token_is_where_it_should_be(r):
  pairs = examples(6, r, seed=1)
  rows, index = rows_of(pairs), np.arange(6 * r).reshape(6, r)
  starts = np.array([len(p) for p, *_ in pairs])
  answers = np.array([[len(a) for a in more] for _, *more in pairs])
  need = shapes.needed_shape(starts, answers, 32)
  shape = need._replace(
    tokens=need.tokens + 64,
    targets=need.targets + 16,
    rows=need.rows + 1,
    tiles=need.tiles + 3,
  )
  least = np.repeat(answers.min(1)[:, None], r, 1)
  x = packing.pack(shape, rows, index, least)
  flat = [t for p, *more in pairs for part in (p, *more) for t in part]
  assert x.tokens[: len(flat)].tolist() == flat
  positions = [
    i
    for p, *more in pairs
    for i in (
      *range(len(p)),
      *(len(p) + j for a in more for j in range(len(a))),
    )
  ]
  assert x.position[: len(flat)].tolist() == positions
  # Every response is predicted token by token, from the token before it.
  owned = {}
  for s, t, o, prefix in zip(x.source, x.target, x.owner, x.in_prefix):
    if o >= 0:
      owned.setdefault(int(o), []).append((int(s), int(t), bool(prefix)))
  at = 0
  for k, (p, *more) in enumerate(pairs):
    last, at = at + len(p) - 1, at + len(p)
    for side, a in enumerate(more):
      mine = owned.pop(k * r + side)
      assert [t for _, t, _ in mine] == a
      assert [s for s, _, _ in mine] == [last, *range(at, at + len(a) - 1)]
      assert [q for _, _, q in mine] == [
        j < min(map(len, more)) for j in range(len(a))
      ]
      at += len(a)
  assert not owned
  # Every sequence stands whole in an attention row, in a segment of its own.
  found = []
  for token, segment in zip(x.copies.token, x.copies.segment):
    for number in sorted(set(segment.tolist()) - {0}):
      where = np.flatnonzero(segment == number)
      assert (np.diff(where) == 1).all()
      found.append(x.tokens[token[where]].tolist())
      assert x.position[token[where]].tolist() == list(range(len(where)))
  assert sorted(found) == sorted(p + a for p, *more in pairs for a in more)
  # The way back: each copy is named once, by its token.
  slots = x.copies.token.reshape(-1)
  named = []
  for name in (x.copies.first, x.copies.second):
    for i in np.flatnonzero(name >= 0):
      assert slots[name[i]] == i
      named.append(int(name[i]))
  assert sorted(named) == np.flatnonzero(x.copies.segment.reshape(-1)).tolist()
  uses = sorted([*x.first[x.first >= 0], *x.second[x.second >= 0]])
  assert uses == list(range(answers.sum()))
  share = packing_metrics(jax.tree.map(jnp.asarray, x))
  assert share["perf/padding"].tolist() == [
    len(x.tokens) - len(flat),
    len(x.tokens),
  ]
  shared = starts.sum() * (r - 1)
  assert share["perf/shared"].tolist() == [shared, len(flat) + shared]


def test_prompts_that_differ_are_refused():
  shape, pair = shapes.Shape(64, 16, 1, 16, 1), np.array([[0, 1]])
  words = "its responses have different prompts.*config.train.layout='padded'"
  for other, ids in ((([5, 9], [8, 8]), ["b"]), (([5], [6, 8]), None)):
    rows = rows_of([([5, 6], [7]), other])
    with pytest.raises(DataError, match=f"row {ids[0] if ids else 0}: {words}"):
      packing.pack(shape, rows, pair, np.ones((1, 2)), ids)


def test_shapes_are_few_and_hold_everything():
  rng = np.random.default_rng(0)
  needs = [
    shapes.Shape(*(16 * rng.integers(1, 9, 3)), 64, 16) for _ in range(40)
  ]
  price = {}
  for most in (1, 2, 4, 40):
    found = shapes.choose_shapes(needs, most)
    assert len(found) <= most
    assert found == sorted(found, key=shapes.shape_cost)
    first = [next(s for s in found if shapes.shape_holds(s, n)) for n in needs]
    price[most] = sum(map(shapes.shape_cost, first))
  assert price[1] > price[2] > price[4] > price[40]
  assert shapes.choose_shapes(needs, 1) == [shapes.common_shape(needs)]
  assert price[40] == pytest.approx(sum(map(shapes.shape_cost, needs)))
  small = shapes.Shape(16, 16, 1, 64, 9)
  assert not shapes.shape_holds(small, small._replace(rows=2))
  for n in needs:
    assert shapes.shape_holds(shapes.larger_shape(n), n)
  assert len({shapes.larger_shape(n).tokens for n in needs}) <= 8


# Values and slopes.


@functools.lru_cache
def params(m=MODEL):
  return draw(m, 5)


def on_mesh(mesh, m=MODEL):
  return put(mesh, m, params(m))


@functools.lru_cache
def run_fn(m, head, chunk, r):
  """Sums, and slopes of a sum of all that Logps holds with odd weights."""
  producer = PRODUCERS[head](m, chunk)

  def total(params, tokens, mask, weight):
    out = producer(params, tokens, mask)
    return jnp.sum(weight * out.sum + 0.3 * out.common_prefix), out

  return jax.jit(jax.value_and_grad(total, has_aux=True))


def run(mesh, kind, *, m=MODEL, head="chunked", pairs=None, accumulation=1):
  """[n, R, 3] sum, count, common prefix, and the slopes, of a whole batch."""
  pairs = pairs or examples()
  batch = feed_of(
    pairs, mesh=mesh, layout=kind, accumulation=accumulation
  ).batch_at(0)
  with jax.set_mesh(mesh):
    where, found, slopes = on_mesh(mesh, m), {}, None
    names = {float(x): i for i, x in enumerate(sums_of(pairs)[:, 0])}
    for a in range(accumulation):
      micro = jax.tree.map(lambda x: x[a], batch.micro())
      weight = jnp.cos(micro.ref.sum)  # goes with the pair, wherever it is
      (_, out), g = run_fn(m, head, 5, len(pairs[0]) - 1)(
        where, micro.tokens, micro.mask, weight
      )
      slopes = g if slopes is None else jax.tree.map(jnp.add, slopes, g)
      for key, *row in zip(
        np.asarray(micro.ref.sum)[:, 0],
        *map(np.asarray, (out.sum, out.count, out.common_prefix)),
      ):
        found[names[float(key)]] = np.stack(row, -1)
    assert len(found) == len(pairs)
    return np.stack([found[i] for i in range(len(pairs))]), jax.device_get(
      slopes
    )


def wanted(pairs):
  """[n, R, 3] in float64."""
  out = np.zeros((len(pairs), len(pairs[0]) - 1, 3))
  for i, (p, *more) in enumerate(pairs):
    least = min(map(len, more))
    for side, a in enumerate(more):
      each = oracle.token_logps(params(), p + a, **SIZES)[len(p) :]
      out[i, side] = each.sum(), len(a), each[:least].sum()
  return out


@functools.lru_cache
def truth(r):
  """The padded layout with the plain head, on one device."""
  return run(make_mesh(1, 1), "padded", head="plain", pairs=examples(r=r))


def close(found, base):
  """Float32 sums of at most 30 nats, and slopes, in another order."""
  np.testing.assert_allclose(found[0], base[0], rtol=2e-6, atol=2e-5)
  for n, g in base[1].items():
    np.testing.assert_allclose(
      found[1][n], g, rtol=0, atol=1e-5 * max(1, np.abs(g).max()), err_msg=n
    )


@pytest.mark.parametrize("r", [1, 2])
def test_the_padded_rows_are_a_numpy_llama_s(r):
  np.testing.assert_allclose(
    truth(r)[0], wanted(examples(r=r)), rtol=1e-5, atol=1e-5
  )


CASES = [
  ("chunked", 2, (1, 1), 1, "tiles"),
  ("chunked", 2, (4, 2), 2, "plain"),
  ("vocab", 1, (4, 2), 1, "tiles"),
  ("plain", 2, (1, 1), 2, "plain"),
  *(
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
      ("vocab", 2, (8, 1), 1, "plain"),
      ("vocab", 2, (2, 4), 4, "tiles"),
      ("chunked", 1, (8, 1), 2, "plain"),
      ("plain", 2, (2, 4), 1, "plain"),
      ("chunked", 2, (8, 1), 1, "tiles"),
      ("chunked", 2, (2, 4), 2, "tiles"),
    )
  ),
]


@pytest.mark.parametrize("head,r,shape,accumulation,kernel", CASES)
def test_packed_rows_have_the_padded_rows_values_and_slopes(
  head, r, shape, accumulation, kernel
):
  m, base = MODEL._replace(attention=kernel), truth(r)
  if shape[1] > m.kv_heads:
    m = m._replace(kv_heads=4)
    base = run(make_mesh(), "padded", m=m, head="plain", pairs=examples(r=r))
  how = dict(m=m, head=head, pairs=examples(r=r), accumulation=accumulation)
  close(run(make_mesh(*shape), "packed", **how), base)


def test_packed_rows_with_a_prompt_each_have_them_too():
  close(run(make_mesh(4, 2), "packed_apart", accumulation=2), truth(2))


@pytest.mark.parametrize("head", ["vocab", "chunked"])
def test_heads_of_padded_rows(head):
  close(run(make_mesh(4, 2), "padded", head=head), truth(2))
