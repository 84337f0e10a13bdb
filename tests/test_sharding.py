"""The mesh, the axis rules, whole rows on any mesh, and sums of gradients."""

import types

import jax
import jax.numpy as jnp
from models import draw, make_mesh, put, sized
import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.model import decoder, logprob
from jaxalign.model.parameters import by_row

MESHES = [(1, 1), (8, 1), (4, 2), (2, 4)]
M = sized(3, 32, 8, 4, 6, 40, 48, 16, tied=False)


@pytest.mark.parametrize(
  "sizes, shape",
  [
    (dict(fsdp=-1, tensor=1), (8, 1)),
    (dict(fsdp=-1, tensor=4), (2, 4)),
    (dict(fsdp=4, tensor=-1), (4, 2)),
    (dict(fsdp="4", tensor="2"), (4, 2)),
  ],
)
def test_a_mesh_takes_what_is_left(sizes, shape):
  mesh = sharding.make_mesh(sizes)
  assert tuple(mesh.shape.items()) == (("fsdp", shape[0]), ("tensor", shape[1]))
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


@pytest.mark.parametrize(
  "fsdp, tensor, count, words",
  [
    (4, 4, 8, "mesh fsdp=4 x tensor=4 needs 16 devices, found 8"),
    (2, 2, 8, "mesh fsdp=2 x tensor=2 needs 4 devices, found 8"),
    (1, 2, 1, "mesh fsdp=1 x tensor=2 needs 2 devices, found 1"),
    (-1, 3, 8, "mesh fsdp=-1 x tensor=3 does not divide 8 devices"),
    (-1, -1, 8, "mesh fsdp=-1 x tensor=-1 does not divide 8 devices"),
    (0, 8, 8, "mesh fsdp=0 x tensor=8 does not divide 8 devices"),
    (-2, 4, 8, "mesh fsdp=-2 x tensor=4 does not divide 8 devices"),
  ],
)
def test_sizes_that_do_not_fit_are_named(fsdp, tensor, count, words):
  with pytest.raises(ConfigError) as error:
    sharding.make_mesh(dict(fsdp=fsdp, tensor=tensor), jax.devices()[:count])
  assert str(error.value).startswith(words)
  assert str(error.value).endswith("set config.mesh")


def test_axes_are_translated_and_a_misspelt_one_is_a_key_error():
  assert sharding.spec("batch", None, "heads") == jax.P("fsdp", None, "tensor")
  assert sharding.spec("pool") == jax.P(("fsdp", "tensor"))
  assert sharding.spec() == jax.P()
  for misspelt in ("bacth", "head", "fsdp"):
    with pytest.raises(KeyError, match=misspelt):
      sharding.spec(None, misspelt)
    with pytest.raises(KeyError, match=misspelt):
      sharding.parts(make_mesh(4, 2), misspelt)


def test_parts_of_an_axis():
  mesh = make_mesh(4, 2)
  parts = {a: sharding.parts(mesh, a) for a in sharding.RULES}
  assert parts == dict(batch=4, pool=8, width=4, heads=2, ff=2, vocab=2)
  assert sharding.parts(mesh, None) == 1
  assert set(sharding.parts(make_mesh(1, 1), a) for a in sharding.RULES) == {1}


@pytest.mark.parametrize(
  "shape, axes",
  [
    ((8,), ("pool",)),
    ((2, 4), (None, "batch")),
    ((8,), ("batch",)),
    ((3, 8), (None, None)),
  ],
)
@pytest.mark.parametrize("fsdp, tensor", MESHES)
def test_rows_made_where_they_lie_are_the_rows_put(fsdp, tensor, shape, axes):
  """Each made once, whatever number of devices holds a copy."""
  if axes[-1] == "batch" and shape[-1] % fsdp:
    pytest.skip("four rows do not divide over eight devices")
  mesh, made = make_mesh(fsdp, tensor), []
  n = int(np.prod(shape))
  wide = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
  flat = np.arange(100, 100 + n, dtype=np.int32)

  def make(places):
    made.extend(places.tolist())
    return dict(wide=wide[places], flat=flat[places])

  found = sharding.put_rows(mesh, shape, make, *axes)
  assert made == list(range(n))
  for name, x in dict(wide=wide, flat=flat).items():
    wanted = sharding.put(mesh, x.reshape(*shape, *x.shape[1:]), *axes)
    assert found[name].sharding.is_equivalent_to(wanted.sharding, wanted.ndim)
    np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(wanted))


@pytest.mark.parametrize(
  "axes, shape",
  [
    (("batch", "heads"), (2, 2)),
    ((None, "batch"), (8, 1)),
    (("pool",), (1, 4)),
    ((), (8, 4)),
    (("heads", "width"), (4, 1)),
  ],
)
@pytest.mark.parametrize("kind", [np.float32, np.int32, bool])
def test_an_array_comes_back_from_its_shards(axes, shape, kind):
  mesh = make_mesh(4, 2)
  x = np.random.default_rng(0).normal(size=(8, 4)).astype(kind)
  y = sharding.put(mesh, x, *axes)
  assert y.sharding.is_equivalent_to(sharding.named_sharding(mesh, *axes), 2)
  for shard in y.addressable_shards:
    assert shard.data.shape == shape
    np.testing.assert_array_equal(np.asarray(shard.data), x[shard.index])
  back = sharding.fetch(y)
  assert back.dtype == x.dtype
  np.testing.assert_array_equal(back, x)


def test_a_barrier_of_one_process_does_not_wait():
  sharding.barrier("alone")


# Whole rows.


def by_rows(mesh, m, params, tokens, each):
  """The decoder over `tokens`, `each` rows a device at a time, on the host."""

  def one_tile(params, rows, shared):
    x = decoder.forward(params, rows["tokens"], m, sharding.PER_ROW)
    head = decoder.head(params, m, sharding.PER_ROW)
    return dict(
      x=x.astype(jnp.float32) * shared["scale"], logits=decoder.logits(x, head)
    )

  run = by_row(mesh, decoder.table(m), one_tile)
  with jax.set_mesh(mesh):
    placed, shared = put(mesh, m, params), dict(scale=jnp.ones(()))
    step, out = each * mesh.size, []
    for at in range(0, len(tokens), step):
      rows = dict(tokens=sharding.put(mesh, tokens[at : at + step], "pool"))
      out.append(jax.tree.map(sharding.fetch, run(placed, rows, shared)))
  return {n: np.concatenate([o[n] for o in out]) for n in out[0]}


@pytest.fixture(scope="module")
def drawn():
  """Parameters larger than the first, and 16 rows of tokens."""
  tokens = np.random.default_rng(1).integers(0, M.vocab, (16, 7))
  return draw(M), tokens.astype(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_on_any_mesh(drawn, dtype):
  m = M._replace(dtype=dtype)
  first = None
  for sizes in MESHES:
    out = by_rows(make_mesh(*sizes), m, *drawn, each=2)
    first = first or out
    for name in ("x", "logits"):
      assert out[name].dtype == np.float32
      assert out[name].tobytes() == first[name].tobytes(), (sizes, name)
  # They are the numbers of the rows, in the rows' order, and no two alike.
  assert len({row.tobytes() for row in first["logits"]}) == 16


def test_whole_rows_and_spread_rows_are_the_same_numbers(drawn, mesh):
  params, tokens = drawn
  logits = lambda p, t: decoder.logits(
    decoder.forward(p, t, M), decoder.head(p, M)
  )
  where = put(mesh, M, params), sharding.put(mesh, tokens, "batch")
  spread = jax.jit(logits)(*where)
  rows = by_rows(make_mesh(1, 1), M, params, tokens, each=16)
  np.testing.assert_allclose(
    sharding.fetch(spread), rows["logits"], rtol=2e-4, atol=2e-5
  )


@pytest.mark.parametrize(
  "change, name, axis, size, parts",
  [
    (dict(width=30, heads=6, kv_heads=6), "embed", "width", 30, 4),
    (dict(width=36, heads=3, kv_heads=3), "layers/wq", "heads", 3, 2),
    (dict(heads=8, kv_heads=1), "layers/wq", "heads", 1, 2),
    (dict(ff=41), "layers/w_gate", "ff", 41, 2),
    (dict(vocab=47), "embed", "vocab", 47, 2),
  ],
)
def test_a_size_that_does_not_divide_is_refused(
  change, name, axis, size, parts
):
  m = M._replace(**change)
  decoder.check_model(m, make_mesh(1, 1))
  with pytest.raises(ConfigError) as error:
    decoder.check_model(m, make_mesh(4, 2))
  assert str(error.value) == (
    f"{name}: its axis {axis!r} of {size} does not divide into {parts} "
    "parts; change the model's size or config.mesh"
  )


# Sums of gradients.


def test_a_gathered_weights_gradient_is_summed_in_float32():
  # One device adds 256, seven add 1: 263 in float32, 264 in bfloat16.
  mesh = make_mesh(8, 1)
  with jax.set_mesh(mesh):
    w = sharding.put(mesh, np.ones((8, 4), np.float32), "width", "ff")
    rows = np.repeat(np.float32([256] + [1] * 7)[:, None], 8, axis=1)
    x = sharding.put(mesh, rows, "batch").astype(jnp.bfloat16)

    def total(w):
      whole = sharding.SPREAD.weight(w, ("width", "ff")).astype(jnp.bfloat16)
      return jnp.sum(jnp.einsum("bd,df->bf", x, whole).astype(jnp.float32))

    grad = jax.jit(jax.grad(total))(w)
  assert grad.dtype == np.float32
  assert grad.sharding.spec == sharding.spec("width", "ff")
  np.testing.assert_array_equal(sharding.fetch(grad), np.full((8, 4), 263.0))


@pytest.mark.parametrize("sizes", [(1, 1), (4, 2)])
def test_the_heads_gradient_is_summed_over_chunks_in_float32(sizes):
  rng = np.random.default_rng(2)
  x, w = rng.normal(size=(8, 256, 32)), rng.normal(0, 0.02, (48, 32))
  tokens = rng.integers(0, 24, (8, 256)).astype(np.int32)
  mesh = make_mesh(*sizes)

  def grad(dtype, chunk):
    with jax.set_mesh(mesh):
      hidden = sharding.put(mesh, x.astype(np.float32), "batch").astype(dtype)
      ids = sharding.put(mesh, tokens, "batch")
      table = sharding.put(mesh, w.astype(np.float32), "vocab", "width")

      def total(table):
        head = decoder.head(dict(head=table), M._replace(dtype=dtype))
        return jnp.sum(logprob.token_logps(hidden, head, ids, chunk))

      return sharding.fetch(jax.jit(jax.grad(total))(table))

  exact = grad("float32", 256)
  off = lambda g: np.linalg.norm(g - exact) / np.linalg.norm(exact)
  # 128 chunks; a bfloat16 sum over them is 1.3 % off.
  assert off(grad("bfloat16", 2)) < 0.004
  assert off(grad("float32", 2)) < 1e-5


def test_several_slices_are_out_of_scope():
  chips = [types.SimpleNamespace(slice_index=i // 4) for i in range(8)]
  with pytest.raises(ConfigError, match="found 2 TPU slices"):
    sharding.make_mesh(dict(fsdp=-1, tensor=1), chips)
