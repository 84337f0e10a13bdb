"""The train step: ln 2 at the start, and no cut of the batch changes it."""

import functools

from conftest import token_rows
from flat import batch_of
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.embed import passes
from jaxalign.model import adapters, decoder
from jaxalign.train import optim, step
from jaxalign.train.batch import Logps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import combine, LOSSES
from jaxalign.train.metrics import divide

LENGTH = 12


pytestmark = pytest.mark.usefixtures("quick_compiles")


def bound(name, **kwargs):
  fn = functools.partial(LOSSES[name], **kwargs)
  fn.kind, fn.stats = LOSSES[name].kind, LOSSES[name].stats
  return fn


DPO = bound("dpo", beta=0.5, label_smoothing=0.1)
KTO = bound("kto", beta=0.5, desirable=1.2, undesirable=0.8)
B1, B2, EPS = 0.9, 0.98, 1e-8


def imitating(loss, weight):
  """A loss plus so much of the chosen answer's negative log-likelihood."""
  return combine.weighted_sum(
    [(1.0, "dpo", loss), (weight, "sft", LOSSES["sft"])]
  )


RPO = imitating(DPO, 0.3)


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def make_mesh(fsdp, tensor):
  return sharding.make_mesh(
    dict(fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor]
  )


def cut(mesh, arrays, accumulation, lr=0.0):
  """Host arrays [rows, ...] -> a batch of micro-batches on the mesh."""
  shaped = lambda x: x.reshape(accumulation, -1, *x.shape[1:])
  put = lambda x: sharding.put(mesh, shaped(x), None, "batch")
  on_mesh = {n: put(x) for n, x in arrays.items()}
  return batch_of(**on_mesh, lr=np.float32(lr))


def rows_of(rows, responses, seed, vocab=32):
  """tokens, mask [rows, responses, LENGTH]: 3 to 12 tokens, 1 to 6 count."""
  rng = np.random.default_rng(seed)
  size = rng.integers(5, LENGTH + 1, (rows, responses, 1))
  start = size - rng.integers(1, 5, (rows, responses, 1))
  at = np.arange(LENGTH)
  tokens = rng.integers(1, vocab, (rows, responses, LENGTH)).astype(np.int32)
  return np.where(at < size, tokens, 0), (at >= start) & (at < size)


# A toy in place of the model: a token's log-prob is -softplus(w[token]).

VOCAB = 12


def toy(params, tokens, mask):
  hit = tokens[..., None] == jnp.arange(VOCAB)[None, None, None, :]
  w = jnp.sum(jnp.where(hit, params["w"][None, None, None, :], 0.0), -1)
  each = -jax.nn.softplus(w * jnp.mean(params["norm"]))
  m = mask.astype(jnp.float32)
  return Logps(jnp.sum(each * m, -1), jnp.sum(m, -1))


def toy_logps(params, tokens, mask):
  each = -np.logaddexp(0, params["w"][tokens] * params["norm"].mean())
  return (each * mask).sum(-1)


def toy_params():
  rng = np.random.default_rng(4)
  return dict(
    w=np.float32(rng.normal(size=VOCAB)),
    norm=np.float32(1 + rng.normal(size=3) / 9),
  )


def toy_batch(responses, seed=0, rows=16, spread=1.0):
  rng = np.random.default_rng(seed)
  tokens, mask = rows_of(rows, responses, seed, VOCAB)
  params = {n: np.float64(w) for n, w in toy_params().items()}
  ref = toy_logps(params, tokens, mask) + spread * rng.normal(
    size=(rows, responses)
  )
  out = dict(
    tokens=tokens,
    mask=mask,
    ref_sum=np.float32(ref),
    ref_count=np.float32(mask.sum(-1)),
  )
  if responses == 1:
    kl_tokens, kl_mask = rows_of(rows, 1, seed + 1, VOCAB)
    kl_ref = toy_logps(params, kl_tokens, kl_mask) + rng.normal(
      -0.7, 1.0, (rows, 1)
    )
    out |= dict(
      label=rng.random(rows) < 0.4,
      kl_tokens=kl_tokens,
      kl_mask=kl_mask,
      kl_ref_sum=np.float32(kl_ref),
    )
  return out


def toy_objective(params, batch, z0=None, sft_weight=0.0):
  """(mean loss, z0) of the equations in float64; z0 is held where given."""
  policy = toy_logps(params, batch["tokens"], batch["mask"])
  r = policy - batch["ref_sum"]
  if "label" in batch:
    if z0 is None:
      z0 = max(
        0.0,
        (
          toy_logps(params, batch["kl_tokens"], batch["kl_mask"])
          - batch["kl_ref_sum"]
        ).mean(),
      )
    sign = np.where(batch["label"], 1.0, -1.0)
    weight = np.where(batch["label"], 1.2, 0.8)
    loss = weight * np.exp(log_sigmoid(-0.5 * sign * (r[:, 0] - z0)))
  else:
    gap = 0.5 * (r[:, 0] - r[:, 1])
    loss = -0.9 * log_sigmoid(gap) - 0.1 * log_sigmoid(-gap)
  nll = -policy[:, 0] / batch["mask"][:, 0].sum(-1)
  return (loss + sft_weight * nll).mean(), z0


def slopes(fn, params, h=1e-5):
  """Central differences by every parameter, float64."""
  out = {}
  for name, w in params.items():
    out[name] = np.zeros(w.shape)
    for i in np.ndindex(w.shape):
      ends = []
      for side in (h, -h):
        moved = {n: np.array(x, np.float64) for n, x in params.items()}
        moved[name][i] += side
        ends.append(fn(moved))
      out[name][i] = (ends[0] - ends[1]) / (2 * h)
  return out


@functools.lru_cache
def toy_step(loss, clip=0.0, weight_decay=0.0, name="adamw"):
  tx = optim.make_optimizer(
    clip=clip, weight_decay=weight_decay, b2=B2, name=name
  )
  return step.make_train_step(toy, loss, tx), tx


def toy_run(mesh, loss, batch, accumulation, count=1, lr=0.05, **kwargs):
  """[metrics of each step], parameters, first moments; all on the host."""
  train_step, tx = toy_step(loss, **kwargs)
  params = {n: sharding.put(mesh, w, None) for n, w in toy_params().items()}
  state, seen = step.init_state(params, tx), []
  for _ in range(count):
    state, totals = train_step(state, cut(mesh, batch, accumulation, lr))
    seen.append({n: np.asarray(x) for n, x in totals.items()})
  return seen, jax.device_get(state.params), first_moment(state.opt_state)


def first_moment(opt_state):
  found = [
    x.mu
    for x in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    if hasattr(x, "mu")
  ]
  return jax.device_get(found[0])


def gradient(mu):
  """The first gradient: mu = (1 - b1) g after one update."""
  return {n: m / (1 - B1) for n, m in mu.items()}


@pytest.mark.parametrize("responses", [2, 1], ids=["dpo", "kto"])
def test_a_step_is_its_equation(mesh, responses):
  """Loss and gradient against float64; none runs through z0."""
  loss, weight = ((RPO, 0.3), (KTO, 0.0))[responses == 1]
  batch = toy_batch(responses)
  (totals,), _, mu = toy_run(mesh, loss, batch, 4)
  params = {n: np.float64(w) for n, w in toy_params().items()}
  wanted, z0 = toy_objective(params, batch, sft_weight=weight)
  means = divide(totals)
  assert totals["loss"][1] == totals["preference_loss"][1] == 16
  assert means["loss"] == pytest.approx(wanted, rel=1e-5)
  assert means["preference_loss"] == pytest.approx(
    toy_objective(params, batch)[0], rel=1e-5
  )
  held = slopes(lambda p: toy_objective(p, batch, z0, weight)[0], params)
  got = gradient(mu)
  for n in params:
    np.testing.assert_allclose(got[n], held[n], rtol=2e-4, atol=1e-6)
  norm = np.sqrt(sum((g**2).sum() for g in held.values()))
  assert means["grad_norm"] == pytest.approx(norm, rel=1e-4)
  if responses == 1:
    assert z0 > 0.3 and means["kl"] == pytest.approx(z0, rel=1e-5)
    free = slopes(lambda p: toy_objective(p, batch, None, weight)[0], params)
    assert np.abs(free["w"] - held["w"]).max() > 1e-3  # the test can see it


@pytest.mark.parametrize("responses", [2, 1], ids=["dpo", "kto"])
def test_accumulation_changes_nothing(mesh, responses):
  """1 = 4 = 8 micro-batches: every sum and count, gradient, parameter."""
  loss, batch = (DPO, KTO)[responses == 1], toy_batch(responses)
  base, params, mu = toy_run(mesh, loss, batch, 1, count=3)
  for accumulation in (4,) if mesh.size > 1 else (4, 8):
    seen, again, mu2 = toy_run(mesh, loss, batch, accumulation, count=3)
    for a, b in zip(base, seen):
      assert set(a) == set(b)
      for n in a:
        np.testing.assert_allclose(a[n], b[n], rtol=1e-5, atol=1e-6, err_msg=n)
        assert a[n][1] == b[n][1], n  # counts are exact
    for n in params:
      np.testing.assert_allclose(mu[n], mu2[n], rtol=1e-5, atol=1e-7)
      np.testing.assert_allclose(params[n], again[n], rtol=1e-5, atol=1e-6)


def test_z0_is_clamped_after_the_mean(mesh):
  """Neither row by row nor micro-batch by micro-batch; never below 0."""
  batch = toy_batch(1)
  params = {n: np.float64(w) for n, w in toy_params().items()}
  gap = (
    toy_logps(params, batch["kl_tokens"], batch["kl_mask"])
    - batch["kl_ref_sum"]
  )[:, 0]
  assert (gap < 0).any() and (gap > 0).any()
  # Half the micro-batches below zero, and still their mean counts.
  batch["kl_ref_sum"] = np.float32(
    batch["kl_ref_sum"] + np.where(np.arange(16) < 8, 3.0, -2.0)[:, None]
  )
  gap = gap - np.where(np.arange(16) < 8, 3.0, -2.0)
  assert gap[:8].mean() < 0 < gap.mean()
  for accumulation in (1, 4):
    (totals,), _, _ = toy_run(mesh, KTO, batch, accumulation)
    assert divide(totals)["kl"] == pytest.approx(gap.mean(), rel=1e-4)
  batch["kl_ref_sum"] = batch["kl_ref_sum"] + np.float32(9)
  (totals,), _, _ = toy_run(mesh, KTO, batch, 4)
  assert divide(totals)["kl"] == 0.0


@pytest.mark.parametrize("liked", [True, False])
def test_a_batch_of_one_class_is_finite(mesh, liked):
  batch = toy_batch(1) | dict(label=np.full(16, liked))
  (totals,), params, _ = toy_run(mesh, KTO, batch, 4)
  means = divide(totals)
  assert np.isfinite(list(means.values())).all()
  assert all(np.isfinite(w).all() for w in params.values())
  assert ("rewards/chosen" in means) == liked
  assert ("rewards/rejected" in means) != liked
  want, _ = toy_objective(
    {n: np.float64(w) for n, w in toy_params().items()}, batch
  )
  assert means["preference_loss"] == pytest.approx(want, rel=1e-5)


def test_a_class_spread_unevenly_is_averaged_over_its_rows(mesh):
  """All liked rows in the last micro-batch: a mean of means would differ."""
  batch = toy_batch(1) | dict(label=np.arange(16) >= 13)
  (totals,), _, _ = toy_run(mesh, KTO, batch, 4)
  params = {n: np.float64(w) for n, w in toy_params().items()}
  r = (
    0.5
    * (toy_logps(params, batch["tokens"], batch["mask"]) - batch["ref_sum"])[
      :, 0
    ]
  )
  counts = [totals[f"rewards/{side}"][1] for side in ("chosen", "rejected")]
  assert counts == [3, 13]
  means = divide(totals)
  assert means["rewards/chosen"] == pytest.approx(r[13:].mean(), rel=1e-4)
  assert means["rewards/rejected"] == pytest.approx(r[:13].mean(), rel=1e-4)


def adamw(g, m, v, t, p):
  """Loshchilov and Hutter 2019, alg. 2."""
  m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
  return m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS), m, v


def lion(g, m, v, t, p):
  """Chen et al. 2023, alg. 2."""
  return np.sign(B1 * m + (1 - B1) * g), B2 * m + (1 - B2) * g, v


def rmsprop(g, m, v, t, p):
  """torch.optim.RMSprop, alpha = B2."""
  v = B2 * v + (1 - B2) * g * g
  return g / (np.sqrt(v) + EPS), m, v


def adafactor(g, m, v, t, p):
  """Shazeer and Stern 2018, alg. 4 and 5, where nothing is factored."""
  share = 1 - t**-0.8
  v = share * v + (1 - share) * (g * g + 1e-30)
  u = g / np.sqrt(v)
  size = lambda x: np.sqrt(np.mean(x**2))
  return u / max(1.0, size(u)) * max(1e-3, size(p)), m, v


def sgd(g, m, v, t, p):
  return g, m, v


RULES = dict(
  adamw=adamw,
  lion=lion,
  rmsprop=rmsprop,
  adafactor=adafactor,
  muon=adamw,
  sgd=sgd,
)  # no vector is a matrix; test_optim has some


def descend(rule, gradients, params, lrs, clip, decay):
  """float64 parameters after an update at each rate, behind a clip by the
  global norm, with decoupled decay of matrices."""
  p = {n: np.float64(w) for n, w in params.items()}
  m, v = ({n: 0.0 for n in p} for _ in range(2))
  for t, lr in enumerate(lrs, 1):
    g = gradients(p)
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    scale = min(1.0, clip / norm) if clip else 1.0
    for n in p:
      u, m[n], v[n] = rule(g[n] * scale, m[n], v[n], t, p[n])
      p[n] = p[n] - lr * (u + (0.0 if n == "norm" else decay) * p[n])
  return p


@pytest.mark.parametrize(
  "name,clip,decay",
  [("adamw", 0.0, 0.0), *((name, 0.05, 0.2) for name in optim.OPTIMIZERS)],
)
def test_the_update_is_the_rule_s_at_the_batch_s_rate(mesh, name, clip, decay):
  batch = toy_batch(2)
  train_step, tx = toy_step(DPO, clip=clip, weight_decay=decay, name=name)
  state = step.init_state(
    {n: sharding.put(mesh, w, None) for n, w in toy_params().items()}, tx
  )
  lrs = [0.1, 0.03, 0.2]
  for lr in lrs:
    state, totals = train_step(state, cut(mesh, batch, 2, lr))
    assert totals["lr"][0] == np.float32(lr)
  assert int(state.step) == 3
  wanted = descend(
    RULES[name],
    lambda p: slopes(lambda q: toy_objective(q, batch)[0], p),
    toy_params(),
    lrs,
    clip,
    decay,
  )
  for n, w in wanted.items():
    np.testing.assert_allclose(state.params[n], w, rtol=0, atol=2e-4)
    moved = np.abs(w - toy_params()[n]).max()
    assert moved > (0.002 if name == "sgd" else 0.02)  # a clipped gradient


def test_factors_are_optax_s_on_every_mesh(mesh):
  """A matrix large enough to be factored, cut over the mesh, and a stack."""
  rng = np.random.default_rng(2)
  shapes = {"w": (128, 136), "layers/w": (2, 136, 128)}
  host = {n: np.float32(rng.normal(size=s)) for n, s in shapes.items()}
  tx = optim.make_optimizer(
    clip=0.0, weight_decay=0.25, b2=B2, name="adafactor"
  )
  peer = optax.adafactor(1.0, weight_decay_rate=0.25)
  axes = {"w": ("width", "vocab"), "layers/w": (None, "width", "ff")}
  params = {n: sharding.put(mesh, w, *axes[n]) for n, w in host.items()}
  state, theirs = jax.jit(tx.init)(params), peer.init(host)
  kept = sum(x.size for x in jax.tree.leaves(state))
  assert kept < 0.05 * sum(w.size for w in host.values())
  for _ in range(3):
    grads = {n: np.float32(rng.normal(size=s)) for n, s in shapes.items()}
    got, state = jax.jit(tx.update)(
      {n: sharding.put(mesh, g, *axes[n]) for n, g in grads.items()},
      state,
      params,
    )
    wanted, theirs = peer.update(grads, theirs, host)
    for n in shapes:
      assert got[n].sharding == params[n].sharding
      np.testing.assert_allclose(got[n], wanted[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_moments_are_counted(name):
  tx = optim.make_optimizer(clip=1.0, weight_decay=0.1, b2=B2, name=name)
  state = tx.init({"w": np.zeros((256, 256), np.float32)})
  kept = sum(x.size for x in jax.tree.leaves(state)) / 256**2
  assert round(kept) == optim.OPTIMIZERS[name].moments


def test_weight_decay_is_for_matrices_alone():
  """Every parameter of the families that have biases, and adapters."""
  m = MODEL._replace(
    norm="layer",
    qkv_bias=True,
    out_bias=True,
    ff_bias=True,
    qk_norm=True,
    tied=False,
    lora=adapters.Lora(2),
  )
  params = {
    n: np.ones(p.shape, np.float32) for n, p in decoder.table(m).items()
  }
  tx = optim.make_optimizer(clip=0.0, weight_decay=0.25, b2=B2)
  updates, _ = tx.update(
    {n: 0 * w for n, w in params.items()}, tx.init(params), params
  )
  moved = {n for n, u in updates.items() if np.any(u)}
  matrices = {
    f"layers/{n}" for n in ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
  }
  assert moved == {
    "embed",
    "head",
    *matrices,
    *(f"{n}:{side}" for n in matrices for side in "ab"),
  }
  assert all(np.all(updates[n] == -0.25) for n in moved)
  assert {"layers/bq", "layers/b_up", "norm_bias", "layers/q_norm"} <= set(
    params
  )


# Rates.


def test_warm_up_is_a_share_and_the_end_is_a_tenth():
  for schedule, middle in (
    ("linear", 0.55),
    ("cosine", 0.55),
    ("constant", 1.0),
  ):
    rate = optim.make_schedule(
      lr=2.0, updates=100, warmup_ratio=0.1, schedule=schedule
    )
    up = np.array([float(rate(s)) for s in range(11)])
    np.testing.assert_allclose(up, 2.0 * np.arange(1, 12) / 11, rtol=1e-5)
    assert float(rate(55)) == pytest.approx(2.0 * middle, rel=1e-4)
    end = 2.0 if schedule == "constant" else 0.2
    assert float(rate(100)) == pytest.approx(end, rel=1e-4)
    rates = [float(rate(s)) for s in range(10, 101)]
    assert all(a >= b - 1e-7 for a, b in zip(rates, rates[1:]))


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
@pytest.mark.parametrize(
  "updates,warmup", [(1, 0.0), (1, 0.9), (3, 0.1), (93, 0.1), (5, 0.0)]
)
def test_short_runs_reach_the_peak_and_stay_positive(schedule, updates, warmup):
  rate = optim.make_schedule(
    lr=1e-3, updates=updates, warmup_ratio=warmup, schedule=schedule
  )
  rates = [float(rate(s)) for s in range(updates)]
  assert all(0 < r <= 1e-3 * (1 + 1e-6) for r in rates)
  if warmup < 0.5:
    assert max(rates) == pytest.approx(1e-3, rel=1e-5)


@pytest.mark.parametrize(
  "change,words",
  [
    (dict(lr=0.0), "lr=0.0, wanted more than 0"),
    (dict(lr=float("nan")), "lr=nan"),
    (dict(warmup_ratio=1.0), "warmup_ratio=1.0, wanted a fraction"),
    (dict(warmup_ratio=-0.1), "warmup_ratio=-0.1"),
    (dict(schedule="flat"), "unknown schedule 'flat'; known: linear"),
  ],
)
def test_rates_that_cannot_work(change, words):
  with pytest.raises(ConfigError, match=words):
    optim.make_schedule(
      **dict(lr=1.0, updates=10, warmup_ratio=0.1, schedule="linear") | change
    )


# The real model.

MODEL = decoder.ModelConfig(
  layers=1,
  width=16,
  heads=4,
  kv_heads=4,
  head_size=4,
  ff=24,
  vocab=32,
  context=LENGTH,
)
SIZES = dict(kv_heads=4, rope_theta=10000.0, norm_eps=1e-5)


@functools.lru_cache
def real_params():
  rng = np.random.default_rng(5)
  return {
    n: np.float32(rng.normal(1.0 if p.scale == 0 else 0.0, 0.3, p.shape))
    for n, p in decoder.table(MODEL).items()
  }


def on_mesh(mesh):
  return {
    n: sharding.put(mesh, w, *decoder.table(MODEL)[n].axes)
    for n, w in real_params().items()
  }


def real_logps(params, tokens, mask):
  """[rows, responses] sums, by the float64 Llama."""
  out = np.zeros(tokens.shape[:2])
  for i in np.ndindex(out.shape):
    each = oracle.token_logps(params, tokens[i], **SIZES)
    out[i] = each[mask[i]].sum()
  return out


@functools.lru_cache
def real_batch(responses):
  """16 rows whose reference is a noisy copy of the policy."""
  rng = np.random.default_rng(responses)
  tokens, mask = rows_of(16, responses, 8)
  ref = real_logps(real_params(), tokens, mask) + rng.normal(
    size=(16, responses)
  )
  out = dict(
    tokens=tokens,
    mask=mask,
    ref_sum=np.float32(ref),
    ref_count=np.float32(mask.sum(-1)),
  )
  if responses == 1:
    kl_tokens, kl_mask = rows_of(16, 1, 9)
    kl_ref = real_logps(real_params(), kl_tokens, kl_mask) - rng.normal(
      0.5, 1.0, (16, 1)
    )
    out |= dict(
      label=rng.random(16) < 0.5,
      kl_tokens=kl_tokens,
      kl_mask=kl_mask,
      kl_ref_sum=np.float32(kl_ref),
    )
  return out


@functools.lru_cache
def real_step(name):
  tx = optim.make_optimizer(clip=1.0, weight_decay=0.01, b2=B2)
  return step.make_train_step(
    PRODUCERS["chunked"](MODEL, 5),
    imitating(bound(name, beta=0.5), 0.2)
    if name == "dpo"
    else bound(name, beta=0.5),
    tx,
  ), tx


def real_run(name, shape, accumulation, count, batch=None):
  """[totals of each step], parameters and first moments at the end."""
  batch = real_batch(2 if name == "dpo" else 1) if batch is None else batch
  mesh, (train_step, tx) = make_mesh(*shape), real_step(name)
  with jax.set_mesh(mesh):
    state, seen = step.init_state(on_mesh(mesh), tx), []
    for t in range(count):
      state, totals = train_step(
        state, cut(mesh, batch, accumulation, 1e-3 * (t + 1))
      )
      seen.append({n: np.asarray(x) for n, x in totals.items()})
    return seen, jax.device_get(state.params), first_moment(state.opt_state)


@functools.lru_cache
def trajectory(name, shape, accumulation):
  return real_run(name, shape, accumulation, 10)


def compare(one, other):
  """Ten AdamW steps; an update is about lr = 0.001 to 0.01 an element."""
  for t, (a, b) in enumerate(zip(one[0], other[0])):
    assert set(a) == set(b)
    for n in a:
      # Sums and counts at the first step to 1e-6, before Adam amplifies.
      tol = 1e-6 if t == 0 else 2e-4
      near = a.get(n.replace("drift/", "logps/"), a[n])  # their difference
      scale = np.abs(near[0]) + (0 if t else 1)
      assert abs(a[n][0] - b[n][0]) <= tol * max(scale, 1.0), (t, n, a[n], b[n])
      assert a[n][1] == b[n][1], (t, n)
  for n, w in one[1].items():
    np.testing.assert_allclose(other[1][n], w, rtol=0, atol=5e-4, err_msg=n)


CUTS = [
  ((4, 2), 4),
  *(
    pytest.param(*cut, marks=pytest.mark.slow)
    for cut in (((8, 1), 1), ((2, 4), 1), ((1, 1), 8), ((1, 1), 4), ((2, 4), 8))
  ),
]


@pytest.mark.parametrize("shape,accumulation", CUTS, ids=str)
def test_ten_steps_are_the_same_on_every_mesh_and_cut(shape, accumulation):
  compare(trajectory("dpo", (1, 1), 1), trajectory("dpo", shape, accumulation))


def test_ten_steps_of_kto_are_the_same_cut_in_four():
  compare(trajectory("kto", (1, 1), 1), trajectory("kto", (4, 2), 4))


def test_they_learn():
  for name in ("dpo", "kto"):
    seen, params, _ = trajectory(name, (1, 1), 1)
    loss = [divide(t)["preference_loss"] for t in seen]
    assert loss[-1] < 0.9 * loss[0]
    moved = max(np.abs(params[n] - w).max() for n, w in real_params().items())
    assert 0.02 < moved < 0.06  # ten steps, 0.055 at most


@functools.lru_cache
def real_z0():
  batch = real_batch(1)
  gap = real_logps(real_params(), batch["kl_tokens"], batch["kl_mask"])
  return max(0.0, (gap - batch["kl_ref_sum"]).mean())


def real_objective(params, name):
  """Mean loss in float64, z0 held at its value for the true parameters."""
  batch = real_batch(2 if name == "dpo" else 1)
  policy = real_logps(params, batch["tokens"], batch["mask"])
  r = policy - batch["ref_sum"]
  if name == "dpo":
    nll = -policy[:, 0] / batch["mask"][:, 0].sum(-1)
    return (-log_sigmoid(0.5 * (r[:, 0] - r[:, 1])) + 0.2 * nll).mean()
  sign = np.where(batch["label"], 1.0, -1.0)
  return np.exp(log_sigmoid(-0.5 * sign * (r[:, 0] - real_z0()))).mean()


@pytest.mark.parametrize(
  "name,shape,accumulation", [("dpo", (1, 1), 1), ("kto", (4, 2), 4)]
)
def test_a_step_is_a_numpy_llama_s(name, shape, accumulation):
  """Loss, z0, and the slope of the loss along a random direction."""
  (totals,), _, mu = real_run(name, shape, accumulation, 1)
  means = divide(totals)
  assert means["loss"] == pytest.approx(
    real_objective(real_params(), name), rel=1e-5
  )
  if name == "kto":
    assert real_z0() > 0.2
    assert means["kl"] == pytest.approx(real_z0(), rel=1e-5)
  unclipped = max(1.0, means["grad_norm"])  # the clip is at 1
  rng = np.random.default_rng(11)
  v = {n: rng.normal(size=w.shape) for n, w in real_params().items()}
  ends = [
    real_objective({n: w + h * v[n] for n, w in real_params().items()}, name)
    for h in (1e-5, -1e-5)
  ]
  along = sum((g * v[n]).sum() for n, g in gradient(mu).items()) * unclipped
  assert along == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3)


# The step-0 contract.


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_start_is_ln_2_and_one_half(name, mesh):
  """The reference's log-probs come from the row-parallel scoring pass."""
  shape = tuple(mesh.shape.values())
  responses = 2 if name == "dpo" else 1
  batch = dict(real_batch(responses))

  def score(tokens, mask):
    rows, how = token_rows(tokens, mask), passes.PassOptions(4, 5)
    scores = passes.score_rows(mesh, on_mesh(mesh), MODEL, rows, how)
    np.testing.assert_array_equal(scores.count, mask.sum(-1).ravel())
    return scores.logp.reshape(-1, responses)

  batch["ref_sum"] = score(batch["tokens"], batch["mask"])
  if name == "kto":
    batch["kl_ref_sum"] = score(batch["kl_tokens"], batch["kl_mask"])
  (totals,), _, _ = real_run(name, shape, 4 if mesh.size > 1 else 1, 1, batch)
  means = divide(totals)
  start = np.log(2) if name == "dpo" else 0.5
  assert abs(means["preference_loss"] - start) < 1e-6
  for n in ("rewards/chosen", "rewards/rejected"):
    assert abs(means[n]) < 1e-6, n
  if name == "kto":
    assert 0 <= means["kl"] < 1e-6
  # Scored by the same pass, the rewards are exactly 0, and every pair ties.
  again = score(batch["tokens"], batch["mask"])
  np.testing.assert_array_equal(again - batch["ref_sum"], 0)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_batch_of_one_pair_on_one_device(accumulation):
  """Its gradient is the sum's: R is not taken for the batch."""
  mesh = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  m = decoder.ModelConfig(
    layers=1,
    width=8,
    heads=2,
    kv_heads=2,
    head_size=4,
    ff=8,
    vocab=16,
    context=16,
  )
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 16, (accumulation, 1, 2, 8)).astype(np.int32)
  with jax.set_mesh(mesh):
    params = decoder.init(jax.random.key(0), m)
    logps_fn = PRODUCERS["chunked"](m, 4)
    put = lambda x: sharding.put(mesh, x, None, "batch")
    batch = dict(
      tokens=put(tokens),
      mask=put(np.arange(8) >= 3 + 0 * tokens),
      ref_sum=put(np.zeros(tokens.shape[:3], np.float32)),
      ref_count=put(np.ones(tokens.shape[:3], np.float32)),
    )
    grads, _ = jax.jit(step.make_gradients(logps_fn, LOSSES["dpo"]))(
      params, batch_of(**batch), {}
    )
    one = jax.jit(
      jax.grad(
        lambda p, t, k: jnp.sum(
          LOSSES["dpo"](
            logps_fn(p, t, k),
            Logps(jnp.zeros(k.shape[:2]), jnp.ones(k.shape[:2])),
            {},
          )[0]
        )
      )
    )
    # Two copies of a pair have twice its gradient; a mean halves it again.
    for name, g in grads.items():
      wanted = sum(
        np.asarray(
          one(
            params,
            *(
              sharding.put(
                mesh, np.repeat(np.asarray(batch[n])[i], 2, 0), "batch"
              )
              for n in ("tokens", "mask")
            ),
          )[name]
        )
        for i in range(accumulation)
      ) / (2 * accumulation)
      np.testing.assert_allclose(g, wanted, rtol=0, atol=1e-6, err_msg=name)
