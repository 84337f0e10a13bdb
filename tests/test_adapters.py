"""Adapters: products and gradients by NumPy, a start that is no change, and
training that moves on every mesh."""

import functools

from conftest import token_rows
import flat
import jax
import jax.numpy as jnp
from models import draw, make_mesh, put, sized
import numpy as np
import oracle
import pytest

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.data import recipe
from jaxalign.embed import passes
from jaxalign.model import adapters, decoder
from jaxalign.train import optim, step, subspace
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import LOSSES
from jaxalign.train.metrics import divide

LENGTH, RANK = 10, 4
M = sized(2, 16, 8, 4, 4, 24, 32, LENGTH)
SIZES = dict(kv_heads=4, rope_theta=10000.0, norm_eps=1e-5)
# Slow ones compile once more what a fast one compiles at another place.
SLOW = pytest.mark.slow
ONE, EIGHT = (1, 1), (4, 2)
LINEAR = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


pytestmark = pytest.mark.usefixtures("quick_compiles")


def placed(*cases):
  """(case, mesh shape) pairs as parameters; those after None are slow."""
  cut = cases.index(None) if None in cases else len(cases)
  marks = lambda i: SLOW if i > cut else ()
  return [pytest.param(*c, marks=marks(i)) for i, c in enumerate(cases) if c]


@pytest.fixture
def mesh(shape):
  """The current mesh, of the test's shape."""
  made = make_mesh(*shape)
  with jax.set_mesh(made):
    yield made


def with_lora(variant="lora", m=M, **more):
  return m._replace(lora=adapters.Lora(RANK, variant=variant, **more))


@functools.lru_cache
def numbers(m):
  """Every parameter of a table, adapters too, none of them zero."""
  return draw(m)


def merged_by_hand(params, factor):
  """W + factor A R B with one loop over layers, float64."""
  out = {n: np.float64(w) for n, w in params.items() if ":" not in n}
  for name in out:
    if f"{name}:a" in params:
      for t in range(len(out[name])):
        a = np.float64(params[f"{name}:a"][t]).reshape(-1, RANK)
        b = np.float64(params[f"{name}:b"][t]).reshape(RANK, -1)
        r = np.float64(params.get(f"{name}:r", [np.eye(RANK)] * 9)[t])
        out[name][t] += factor * (a @ r @ b).reshape(out[name][t].shape)
  return out


@pytest.mark.parametrize("with_r", [False, True])
@pytest.mark.parametrize(
  "equation,into,out",
  [
    ("bld,dgqc->blgqc", (5,), (2, 3, 4)),
    ("blgqc,gqcd->bld", (2, 3, 4), (5,)),
    ("bld,df->blf", (5,), (7,)),
  ],
)
def test_an_adapter_s_product_and_gradients(equation, into, out, with_r):
  """y = s x A R B; dA = s x'g B'R', dR = s A'x'g B', dB = s R'A'x'g."""
  rng = np.random.default_rng(0)
  x, a = rng.normal(size=(3, 2, *into)), rng.normal(size=(*into, RANK))
  r = rng.normal(size=(RANK, RANK)) if with_r else None
  b, g = rng.normal(size=(RANK, *out)), rng.normal(size=(3, 2, *out))
  fn = lambda a, r, b: adapters.apply(jnp.float32(x), equation, 0.7, a, r, b)
  args = [None if w is None else jnp.float32(w) for w in (a, r, b)]
  y, back = jax.vjp(fn, *args)
  da, dr, db = back(jnp.float32(g))
  flat = x.reshape(6, -1), a.reshape(-1, RANK), b.reshape(RANK, -1)
  fx, fa, fb = flat
  fr, fg = np.eye(RANK) if r is None else r, g.reshape(6, -1)
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
  close(y, (0.7 * fx @ fa @ fr @ fb).reshape(g.shape))
  close(da, (0.7 * fx.T @ fg @ fb.T @ fr.T).reshape(a.shape))
  close(db, (0.7 * fr.T @ fa.T @ fx.T @ fg).reshape(b.shape))
  if with_r:
    close(dr, 0.7 * fa.T @ fx.T @ fg @ fb.T)


@pytest.mark.parametrize(
  "lora,wanted",
  [
    (adapters.Lora(4, 12.0), 3.0),
    (adapters.Lora(4, 12.0, rs=True), 6.0),
    (adapters.Lora(4, 12.0, rs=True, variant="allora"), 1.0),
    (adapters.Lora(4, 12.0, variant="lora_sb"), 3.0),
  ],
)
def test_the_scale(lora, wanted):
  assert adapters.scale(lora) == wanted


@pytest.mark.parametrize(
  "patterns,wanted",
  [
    (("all-linear",), LINEAR),
    (("*_proj",), LINEAR),
    (("w*",), LINEAR),
    (("w[qv]",), ("wq", "wv")),
    (("q_proj", "wv"), ("wq", "wv")),
    (("gate_proj", "down_proj"), ("w_gate", "w_down")),
    (("query_key_value", "dense"), ("wq", "wk", "wv", "wo")),
  ],
)
def test_targets_by_pattern(patterns, wanted):
  lora = adapters.Lora(2, targets=patterns)
  wanted = [f"layers/{n}" for n in wanted]
  assert adapters.targets(lora, decoder.table(M)) == wanted
  rows = decoder.table(M._replace(lora=lora))
  assert {n.split(":")[0] for n in rows if ":" in n} == set(wanted)


def test_a_target_that_matches_nothing_lists_what_there_is():
  m = M._replace(gated=False)
  lora = adapters.Lora(2, targets=("q_proj", "gate_proj"))
  with pytest.raises(ConfigError) as error:
    adapters.targets(lora, decoder.table(m))
  assert "'gate_proj' matches no weight" in str(error.value)
  for name in ("wq (q_proj", "w_down (down_proj", "config.lora.targets"):
    assert name in str(error.value)
  assert "w_gate" not in str(error.value)


@pytest.mark.parametrize(
  "change,words",
  [
    (dict(variant="dora"), "lora.variant='dora' is unknown; known: lora"),
    (dict(rank=17), "rank=17 is more than layers/wq can have, wanted 16"),
    (dict(rank=0), "rank=0"),
    (dict(alpha=0.0), "alpha=0.0"),
    (dict(alpha=float("nan")), "alpha=nan"),
    (dict(targets=()), "no LoRA targets"),
    (dict(targets=("embed",)), "'embed' matches no weight"),
  ],
)
def test_adapters_that_cannot_work(change, words):
  lora = adapters.Lora(RANK)._replace(**change)
  with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
    decoder.check_model(M._replace(lora=lora), sharding.nowhere())


@pytest.mark.parametrize("shape", [ONE, EIGHT], ids=str)
def test_the_first_adapters(mesh):
  """A as PEFT draws it, B zero, the same on any mesh, and float32."""
  m = with_lora()
  fresh = adapters.init(jax.random.key(3), decoder.table(m))
  assert set(fresh) == {f"layers/{n}:{s}" for n in LINEAR for s in "ab"}
  for n, x in fresh.items():
    assert x.dtype == jnp.float32 and x.shape == decoder.table(m)[n].shape
    if n.endswith(":b"):
      assert not np.asarray(x).any()
    else:
      bound = 1 / np.sqrt(np.prod(x.shape[1:-1]))
      assert 0.8 * bound < np.abs(x).max() <= bound
      assert abs(np.var(x) * 3 / bound**2 - 1) < 0.3  # uniform's
  with jax.set_mesh(make_mesh(1, 1)):
    one = adapters.init(jax.random.key(3), decoder.table(m))
  np.testing.assert_array_equal(fresh["layers/wq:a"], one["layers/wq:a"])
  adapters.assert_zero(fresh)
  bad = fresh | {"layers/wo:b": fresh["layers/wo:b"] + 1e-30}
  with pytest.raises(NumericError, match="layers/wo:b are not 0"):
    adapters.assert_zero(bad)
  sb = with_lora("lora_sb")
  bases = adapters.init(jax.random.key(3), decoder.table(sb))
  adapters.assert_zero(bases | {"layers/wo:b": bases["layers/wo:b"] + 1.0})
  with pytest.raises(NumericError, match="layers/wo:r are not 0"):
    adapters.assert_zero(bases | {"layers/wo:r": bases["layers/wo:r"] + 1.0})


@functools.lru_cache
def rows():
  """tokens, mask [16, 2, LENGTH]."""
  rng = np.random.default_rng(7)
  size = rng.integers(5, LENGTH + 1, (16, 2, 1))
  start = size - rng.integers(1, 4, (16, 2, 1))
  at = np.arange(LENGTH)
  tokens = rng.integers(1, M.vocab, (16, 2, LENGTH)).astype(np.int32)
  return np.where(at < size, tokens, 0), (at >= start) & (at < size)


def score(mesh, m, params):
  how = passes.PassOptions(4, 5)
  found = passes.score_rows(mesh, params, m, token_rows(*rows()), how)
  return found.logp.reshape(16, 2)


@pytest.mark.parametrize(
  "variant,shape",
  placed(
    *[("lora", EIGHT), ("lora_sb", ONE), None],
    *[("lora", ONE), ("lora_sb", EIGHT), ("allora", ONE)],
  ),
)
def test_unmerged_and_merged_are_a_numpy_llama(mesh, variant):
  """Training's pass, the row-parallel one, and the merged base."""
  m = with_lora(variant, alpha=2.0)
  params = put(mesh, m, numbers(m))
  factor = adapters.scale(m.lora)
  whole = dict(adapters.Merged(params, m.lora))
  assert set(whole) == set(decoder.table(M))
  for n, w in merged_by_hand(numbers(m), factor).items():
    np.testing.assert_allclose(whole[n], w, rtol=0, atol=2e-6, err_msg=n)
    assert whole[n].sharding.spec == params[n].sharding.spec
  tokens, mask = rows()
  p = merged_by_hand(numbers(m), factor)
  logp = lambda t, k: oracle.token_logps(p, t, **SIZES)[k].sum()
  each = [list(map(logp, *pair)) for pair in zip(tokens, mask)]
  wanted, plain = np.array(each), {n: params[n] for n in whole}
  # The adapters matter.
  assert np.abs(wanted - score(mesh, M, plain)).max() > 1.0
  np.testing.assert_allclose(score(mesh, m, params), wanted, atol=2e-4)
  np.testing.assert_allclose(score(mesh, M, whole), wanted, atol=2e-4)
  spread = jax.jit(PRODUCERS["chunked"](m, 5))(
    params, *(sharding.put(mesh, x, "batch") for x in rows())
  )
  np.testing.assert_allclose(spread.sum, wanted, atol=2e-4)


def dpo(policy, ref, stats):
  return LOSSES["dpo"](policy, ref, stats, beta=0.5)


def batch_of(mesh, ref, lr=0.0):
  tokens, mask = rows()
  arrays = dict(tokens=tokens, mask=mask, ref_sum=np.float32(ref))
  arrays["ref_count"] = np.float32(mask.sum(-1))
  put = lambda x: sharding.put(mesh, x[None], None, "batch")
  on_mesh = {n: put(x) for n, x in arrays.items()}
  return flat.batch_of(**on_mesh, lr=np.float32(lr))


@functools.lru_cache
def step_of(m, weight_decay=0.0):
  tx = optim.make_optimizer(clip=1.0, weight_decay=weight_decay, b2=0.98)
  if m.lora.variant == "allora":
    tx = optim.allora(tx, 4.0)
  return step.make_train_step(PRODUCERS["chunked"](m, 5), dpo, tx), tx


def run(mesh, m, lrs, base, fresh=None, ref=None):
  """[means of each step], the last state, the frozen parameters."""
  if fresh is None:
    fresh = adapters.init(jax.random.key(1), decoder.table(m))
  trained, fixed = adapters.split(fresh, m.lora)
  frozen = base | fixed
  train_step, tx = step_of(m)
  ref = score(mesh, m._replace(lora=None), base) if ref is None else ref
  state, seen = step.init_state(trained, tx), []
  for lr in lrs:
    state, totals = train_step(state, batch_of(mesh, ref, lr), frozen)
    seen.append(divide(jax.device_get(totals)))
  return seen, state, frozen


def base_of(mesh):
  return put(mesh, M, numbers(M))


@pytest.mark.parametrize("shape", [ONE, EIGHT], ids=str)
def test_the_start_is_the_reference(mesh):
  """Loss ln 2; scored by one pass, rewards that are 0 to the bit."""
  m, base = with_lora(), base_of(mesh)
  fresh = adapters.init(jax.random.key(1), decoder.table(m))
  ref = score(mesh, M, base)
  np.testing.assert_array_equal(score(mesh, m, base | fresh), ref)
  (means,), state, _ = run(mesh, m, [0.0], base, ref=ref)
  assert abs(means["preference_loss"] - np.log(2)) < 1e-6
  for n in ("rewards/chosen", "rewards/rejected"):
    assert abs(means[n]) < 1e-6
  assert set(state.params) == set(fresh)  # no base weight is trained


def gradient_fn(m):
  return step.make_gradients(PRODUCERS["chunked"](m, 5), dpo)


def gradients(mesh, m, trained, frozen, ref):
  fn = gradient_fn(m)
  return jax.device_get(jax.jit(fn)(trained, batch_of(mesh, ref), frozen)[0])


@pytest.mark.parametrize(
  "variant,shape",
  placed(
    ("lora", EIGHT), None, ("lora", ONE), ("lora_sb", EIGHT), ("lora_sb", ONE)
  ),
)
def test_gradients_are_those_of_the_merged_model(mesh, variant):
  """By the chain rule, from the gradient of every whole weight."""
  m = with_lora(variant, alpha=2.0)
  params = put(mesh, m, numbers(m))
  trained, frozen = adapters.split(params, m.lora)
  tokens, _ = rows()
  ref = np.random.default_rng(2).normal(-20, 3, tokens.shape[:2])
  own = gradients(mesh, m, trained, frozen, ref)
  assert set(own) == set(trained)
  full = gradients(mesh, M, dict(adapters.Merged(params, m.lora)), {}, ref)
  factor = adapters.scale(m.lora)
  for n in LINEAR:
    for t in range(M.layers):
      a, b, r = (
        np.float64(numbers(m)[f"layers/{n}:{s}"][t])
        if f"layers/{n}:{s}" in params
        else np.eye(RANK)
        for s in "abr"
      )
      a, b = a.reshape(-1, RANK), b.reshape(RANK, -1)
      g = np.float64(full[f"layers/{n}"][t]).reshape(len(a), -1)
      wanted = dict(a=g @ b.T @ r.T, b=r.T @ a.T @ g, r=a.T @ g @ b.T)
      for s in ("r",) if variant == "lora_sb" else "ab":
        found = own[f"layers/{n}:{s}"][t].reshape(wanted[s].shape)
        np.testing.assert_allclose(
          found, factor * wanted[s], rtol=1e-3, atol=2e-5, err_msg=f"{n}:{s}"
        )
        assert np.abs(found).max() > 1e-4


@functools.lru_cache
def trajectory(shape, lr):
  mesh = make_mesh(*shape)
  with jax.set_mesh(mesh):
    seen, state, _ = run(mesh, with_lora(), [lr] * 10, base_of(mesh))
    return seen, jax.device_get(state.params)


@pytest.mark.parametrize(
  "shape",
  [EIGHT, pytest.param((8, 1), marks=SLOW), pytest.param((2, 4), marks=SLOW)],
  ids=str,
)
def test_ten_steps_at_the_default_rate_move_alike_on_every_mesh(shape):
  """Losses within 2e-5 of each other, where they fell by a hundred times
  that; the marin fault (stuck at 0.693 on one mesh) would show."""
  lr = recipe.LORA_LR
  (one, params), (other, again) = trajectory((1, 1), lr), trajectory(shape, lr)
  for a, b in zip(one, other):
    assert abs(a["loss"] - b["loss"]) < 2e-5
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
  fell = one[0]["loss"] - one[-1]["loss"]
  assert fell > 2e-3, fell
  for n, x in params.items():
    np.testing.assert_allclose(again[n], x, rtol=0, atol=4e-4)
  # Adam's eps of 1e-8 must be nothing next to a gradient's usual element.
  count = sum(x.size for x in params.values())
  assert one[0]["grad_norm"] / np.sqrt(count) > 1e-5


def test_a_full_run_s_rate_would_hardly_move():
  """What the knob of its own is for."""
  fell = [
    seen[0]["loss"] - seen[-1]["loss"]
    for seen, _ in (trajectory((1, 1), lr) for lr in (recipe.LORA_LR, 5e-7))
  ]
  assert fell[1] < fell[0] / 50, fell


@pytest.mark.parametrize(
  "dtype,shape",
  placed(
    *[("bfloat16", ONE), None, ("bfloat16", EIGHT)],
    *[("float32", ONE), ("float32", EIGHT)],
  ),
)
def test_a_bfloat16_base_with_float32_adapters(dtype, mesh):
  """Adapters stay float32, the base stays as it was, the loss falls."""
  m = with_lora(m=M._replace(dtype=dtype))
  base = {n: x.astype(jnp.bfloat16) for n, x in base_of(mesh).items()}
  before = {n: np.asarray(x) for n, x in base.items()}
  seen, state, frozen = run(mesh, m, [2e-3] * 6, base)
  assert abs(seen[0]["preference_loss"] - np.log(2)) < (
    1e-6 if dtype == "float32" else 0.05
  )  # two passes, one row bucket each
  assert seen[-1]["loss"] < seen[0]["loss"] - 0.02
  assert {x.dtype for x in state.params.values()} == {jnp.dtype("float32")}
  for n, x in before.items():
    assert frozen[n].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(frozen[n]), x)
  whole = adapters.Merged(frozen | state.params, m.lora)
  assert {x.dtype for x in whole.values()} == {jnp.dtype("bfloat16")}


def test_allora_s_factor_stands_behind_adam():
  """Three steps of Adam and 1 / sqrt(||b_i|| + 1 / eta^2), in float64."""
  rng = np.random.default_rng(0)
  params = {
    "layers/wq:a": np.float32(rng.normal(size=(2, 3, 4))),
    "layers/wq:b": np.zeros((2, 4, 3, 2), np.float32),
  }
  adam = optim.make_optimizer(clip=0.0, weight_decay=0.0, b2=0.98)
  tx = optim.allora(adam, 3.0)
  state = tx.init(params)
  p = {n: np.float64(w) for n, w in params.items()}
  m, v = ({n: 0.0 for n in p} for _ in range(2))
  for t in range(1, 4):
    grads = {n: rng.normal(size=w.shape) for n, w in params.items()}
    rounded = {n: np.float32(g) for n, g in grads.items()}
    updates, state = tx.update(rounded, state, params)
    params = {n: w + 0.5 * updates[n] for n, w in params.items()}
    for n, g in grads.items():
      m[n] = 0.9 * m[n] + 0.1 * g
      v[n] = 0.98 * v[n] + 0.02 * g * g
      hat = m[n] / (1 - 0.9**t) / (np.sqrt(v[n] / (1 - 0.98**t)) + 1e-8)
      if n.endswith(":b"):
        size = np.sqrt((p[n] ** 2).sum(1, keepdims=True))
        factor = 1 / np.sqrt(size + 1 / 9)
        assert t > 1 or np.allclose(factor, 3.0)  # eta, where B is 0
        hat = hat * factor
      p[n] = p[n] - 0.5 * hat
      np.testing.assert_allclose(params[n], p[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "shape", [EIGHT, pytest.param(ONE, marks=SLOW)], ids=str
)
def test_bases_are_the_gradient_s_singular_vectors(mesh):
  """Against a whole gradient and NumPy's SVD."""
  m, base = with_lora("lora_sb"), base_of(mesh)
  ref = score(mesh, M, base)
  found = subspace.bases(
    jax.random.key(0),
    m,
    mesh,
    base,
    gradient_fn,
    [batch_of(mesh, ref), batch_of(mesh, ref)],
  )
  assert set(found) == {f"layers/{n}:{s}" for n in LINEAR for s in "ab"}
  full = gradients(mesh, M, base, {}, ref)
  for n in LINEAR:
    for t in range(M.layers):
      a = np.float64(found[f"layers/{n}:a"][t]).reshape(-1, RANK)
      b = np.float64(found[f"layers/{n}:b"][t]).reshape(RANK, -1)
      np.testing.assert_allclose(a.T @ a, np.eye(RANK), atol=1e-5)
      np.testing.assert_allclose(b @ b.T, np.eye(RANK), atol=1e-5)
      g = np.float64(full[f"layers/{n}"][t]).reshape(len(a), -1)
      left, size, right = np.linalg.svd(g, full_matrices=False)
      best = (left[:, :RANK] * size[:RANK]) @ right[:RANK]
      kept = a @ (a.T @ g @ b.T) @ b
      # As near to G as the best of this rank, and its singular values.
      assert np.linalg.norm(g - kept) <= 1.001 * np.linalg.norm(g - best)
      np.testing.assert_allclose(np.diag(a.T @ g @ b.T), size[:RANK], rtol=2e-3)


@SLOW
@pytest.mark.parametrize("shape", [ONE, EIGHT], ids=str)
def test_the_matrix_between_the_bases_is_trained_alone(mesh):
  m, base = with_lora("lora_sb"), base_of(mesh)
  fresh = adapters.init(jax.random.key(1), decoder.table(m))
  rng = np.random.default_rng(0)
  for n, p in decoder.table(m).items():  # any bases will do
    if n.endswith((":a", ":b")):
      drawn = np.float32(rng.normal(0, 0.4, p.shape))
      fresh[n] = sharding.put(mesh, drawn, *p.axes)
  seen, state, _ = run(mesh, m, [1e-2] * 6, base, fresh)
  assert abs(seen[0]["preference_loss"] - np.log(2)) < 1e-6
  assert seen[-1]["loss"] < seen[0]["loss"] - 0.01
  assert set(state.params) == {f"layers/{n}:r" for n in LINEAR}


@SLOW
def test_bases_of_a_gradient_that_is_not_finite():
  mesh = make_mesh(1, 1)
  with jax.set_mesh(mesh), pytest.raises(NumericError, match="not finite"):
    subspace.bases(
      jax.random.key(0),
      with_lora("lora_sb"),
      mesh,
      base_of(mesh),
      gradient_fn,
      [batch_of(mesh, np.full((16, 2), np.nan))],
    )
