"""The decoder's recomputation, first values and sizes.

Its numbers are held to transformers' in `test_families`.
"""

import functools

import jax
import jax.numpy as jnp
from models import draw, make_mesh, put, sized
import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.model import decoder, logprob

pytestmark = pytest.mark.usefixtures("quick_compiles")

M = sized(1, 28, 4, 2, 10, 18, 46, 64, tied=False, remat="dots")


def batch_of(m):
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, m.vocab, (4, 24)).astype(np.int32)
  return tokens, (np.arange(24) >= 9)[None, :] & (tokens >= 0)


@functools.lru_cache
def grad_fn(m):
  """(params, tokens, mask) -> (sum of response log-probs, logits), gradient."""

  def total(params, tokens, mask):
    x = decoder.forward(params, tokens, m)
    head = decoder.head(params, m)
    logps = logprob.token_logps(x, head, tokens, chunk=7)
    return jnp.sum(logps * mask), decoder.logits(x, head)

  return jax.jit(jax.value_and_grad(total, has_aux=True))


def test_recomputation_changes_no_gradient():
  mesh = make_mesh(4, 2)
  with jax.set_mesh(mesh):
    tokens, mask = (sharding.put(mesh, x, "batch") for x in batch_of(M))
    params = put(mesh, M, draw(M))
    (value, _), plain = grad_fn(M._replace(remat="none"))(params, tokens, mask)
    for remat in ("dots", "full"):
      (again, _), grads = grad_fn(M._replace(remat=remat))(params, tokens, mask)
      np.testing.assert_allclose(value, again, rtol=1e-6)
      for n in plain:
        np.testing.assert_allclose(
          grads[n], plain[n], rtol=1e-5, atol=1e-5, err_msg=f"{remat} {n}"
        )


def test_remat_really_recomputes(alone):
  """What the backward pass keeps shrinks: none > dots > full."""

  def kept(remat):
    m = M._replace(layers=4, remat=remat)

    def pullback(params, tokens):
      total = lambda p: jnp.sum(decoder.forward(p, tokens, m))
      return jax.vjp(total, params)[1]

    tokens = jax.ShapeDtypeStruct((4, 24), jnp.int32)
    shapes = jax.eval_shape(pullback, decoder.abstract(m, alone), tokens)
    return sum(x.size for x in jax.tree.leaves(shapes))

  none, dots, full = map(kept, ("none", "dots", "full"))
  assert full < dots < none, (full, dots, none)


def test_init_is_the_table_and_is_the_same_on_any_mesh(monkeypatch):
  m, names = M, ("embed", "layers/wk", "layers/wo", "norm")
  rows = decoder.table(m)
  table = {n: rows[n] for n in names}  # each draw compiles 1 s
  monkeypatch.setattr(decoder, "table", lambda m: table)
  drawn = []
  for fsdp, tensor in ((1, 1), (4, 2)):
    mesh = make_mesh(fsdp, tensor)
    with jax.set_mesh(mesh):
      params = decoder.init(jax.random.key(4), m)
    assert set(params) == set(table)
    for n, s in decoder.abstract(m, mesh).items():
      x = params[n]
      assert (s.shape, s.dtype, s.sharding) == (x.shape, x.dtype, x.sharding)
      assert s.sharding == sharding.named_sharding(mesh, *table[n].axes), n
    drawn.append({n: np.asarray(x) for n, x in params.items()})
  for n, p in table.items():
    x = drawn[0][n]
    np.testing.assert_array_equal(drawn[1][n], x, err_msg=n)
    assert x.shape == p.shape and x.dtype == np.float32, n
    if p.scale == 0:
      assert (x == 1).all(), n
    else:  # four standard errors of a standard deviation
      assert abs(x.std() / p.scale - 1) < 4 / np.sqrt(2 * x.size), n
      assert abs(x.mean()) < 4 * p.scale / np.sqrt(x.size), n
  assert len({x.flat[0] for x in drawn[0].values() if x.flat[0] != 1}) == (
    sum(p.scale != 0 for p in table.values())
  )  # each has its own key
  assert decoder.parameter_count(m) == sum(x.size for x in drawn[0].values())


@pytest.mark.parametrize(
  "change,words",
  [
    (dict(kv_heads=3), "model.heads=4 is no multiple of model.kv_heads=3"),
    (dict(kv_heads=0), "model.kv_heads=0, wanted 1 or more"),
    (dict(layers=-1), "model.layers=-1, wanted 1 or more"),
    (dict(dtype="float99"), "model.dtype='float99' is unknown; known: float32"),
    (dict(head_size=5), "model.head_size=5 has 5 rotated dimensions"),
    (dict(remat="some"), "model.remat='some' is unknown; known: none"),
    (dict(width=30), "model.width=30 is no multiple of model.heads=4"),
  ],
)
def test_sizes_that_cannot_work_are_refused(change, words):
  with pytest.raises(ConfigError, match=words):
    decoder.check_model(M._replace(**change), make_mesh(4, 2))
