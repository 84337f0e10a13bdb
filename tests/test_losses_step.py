"""Every loss of the table in real train steps, on every mesh and cut.

The first step's mean is the equation's, in NumPy float64, with every statistic
taken over the whole batch; the second step, its gradient and the running mean
are the same however the batch was cut. Each runs on a table of token
log-probabilities, which compiles in a fraction of a second, and on the decoder
(slow, but for one loss of each statistic).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from test_losses import columns_of, Example, ORACLES
from test_losses_batch import AOT
from test_step import (
  cut,
  make_mesh,
  MODEL,
  on_mesh,
  real_params,
  rows_of,
  SIZES,
)

from configs import common
from jaxalign.cli import checks
from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.train import losses, row_columns, statistics, step
from jaxalign.train.batch import Logps
from jaxalign.train.logps import common_prefix_sums, PRODUCERS
from jaxalign.train.losses import find, LOSSES
from jaxalign.train.metrics import divide

ROWS, RATE, VOCAB = 16, 1e-4, 32
NOISE = 2.0  # nats between reference and policy
MODELS = ("table", "decoder")
# One loss of each statistic, and of each extra.
DECODED = ("aot", "bco", "ld_dpo")


pytestmark = pytest.mark.usefixtures("quick_compiles")


def table(params, tokens, mask):
  """In place of a model: a token's log-probability is -softplus(w[token])."""
  hit = tokens[..., None] == jnp.arange(VOCAB)[None, None, None, :]
  w = jnp.sum(jnp.where(hit, params["w"][None, None, None, :], 0.0), -1)
  each = -jax.nn.softplus(w)
  return Logps(
    jnp.sum(each * mask, -1),
    jnp.sum(mask, -1, dtype=jnp.float32),
    common_prefix_sums(each, mask),
  )


def parameters(model, mesh):
  if model == "decoder":
    return on_mesh(mesh)
  return dict(w=sharding.put(mesh, table_params(), None))


def table_params():
  return np.float32(np.random.default_rng(3).normal(size=VOCAB))


def sums_of(model, tokens, mask):
  """float64 sums [rows, R] of the first policy, and of common prefixes."""
  total, prefix = np.zeros((2, *tokens.shape[:2]))
  shortest = mask.sum(-1).min(1)
  for i in np.ndindex(total.shape):
    if model == "decoder":
      each = oracle.token_logps(real_params(), tokens[i], **SIZES)[mask[i]]
    else:
      each = -np.logaddexp(0, np.float64(table_params())[tokens[i]])[mask[i]]
    total[i], prefix[i] = each.sum(), each[: shortest[i[0]]].sum()
  return total, prefix


@functools.lru_cache
def data(model, columns):
  """(batch, Example) of 16 rows whose reference is a noisy policy."""
  rng = np.random.default_rng(columns)
  tokens, mask = rows_of(ROWS, columns, 8)
  policy, prefix = sums_of(model, tokens, mask)
  ref = np.float32(policy + rng.normal(0, NOISE, policy.shape))
  ref_prefix = np.float32(prefix + rng.normal(0, NOISE, policy.shape))
  label = rng.random(ROWS) < 0.4
  weights = np.float32(rng.uniform(0.5, 10.0, ROWS))
  kl_tokens, kl_mask = rows_of(ROWS, 1, 9)
  kl, _ = sums_of(model, kl_tokens, kl_mask)
  kl_ref = np.float32(kl - NOISE * rng.normal(0.5, 1.0, kl.shape))
  batch = dict(
    tokens=tokens,
    mask=mask,
    ref_sum=ref,
    ref_common_prefix=ref_prefix,
    ref_count=np.float32(mask.sum(-1)),
    label=label,
    weights=weights,
    kl_tokens=kl_tokens,
    kl_mask=kl_mask,
    kl_ref_sum=kl_ref,
  )
  x = Example(
    policy,
    np.float64(ref),
    np.float64(mask.sum(-1)),
    prefix,
    np.float64(ref_prefix),
    label,
    np.float64(weights),
    z0=max(0.0, (kl - kl_ref).mean()),
    delta=None,
    mean_count=mask[:, 0].sum() / ROWS,
  )
  return batch, x


def own(fn, batch):
  """What of a batch the feed would carry for this loss."""
  left = {"weights", "label"} - set(fn.stats)
  left |= set() if "common_prefix" in fn.extras else {"ref_common_prefix"}
  return {
    n: v
    for n, v in batch.items()
    if n not in left and ("z0" in fn.stats or not n.startswith("kl_"))
  }


@functools.lru_cache
def step_of(model, name):
  tx = optax.sgd(1.0, momentum=0.9)  # its state is the gradient
  fn = losses.bind(find(name), name, {})
  logps_fn = PRODUCERS["chunked"](MODEL, 6) if model == "decoder" else table
  return fn, step.make_train_step(logps_fn, fn, tx), tx


@functools.lru_cache
def run(model, name, shape, accumulation):
  """[metrics of each step], (g2 + 0.9 g1, parameters, delta); on the host."""
  fn, train_step, tx = step_of(model, name)
  mesh = make_mesh(*shape)
  with jax.set_mesh(mesh):
    rows = own(fn, data(model, columns_of(name))[0])
    batch = cut(mesh, rows, accumulation, RATE)
    state, seen = step.init_state(parameters(model, mesh), tx, fn), []
    for _ in range(2):
      state, totals = train_step(state, batch)
      seen.append(jax.device_get(totals))
    trace = optax.tree.get(state.opt_state, "trace")
    return seen, jax.device_get((trace, state.params, state.statistics))


def equation(name, x):
  """The mean loss of the batch in float64, by test_losses' oracles."""
  if name in AOT:
    return AOT[name][0](x.p, x.q)
  beta = 0.1  # the default of every loss that reads delta
  return ORACLES[name](x.replace(delta=(beta * x.r).mean())).mean()


def test_no_loss_asks_for_more_than_a_step_computes():
  for name, fn in LOSSES.items():
    row_columns.check_reads(fn, name)
    bound = losses.bind(fn, name, {})
    if "delta" in fn.stats:
      assert statistics.beta_of(bound) == statistics.beta_of(fn) == 0.1


def asks_for_more(policy, ref, stats):
  """A fork's loss."""
  return policy.sum[:, 0] * stats["temperature"], {}


asks_for_more.kind, asks_for_more.stats = "pairs", ("temperature",)


def test_a_loss_that_asks_for_more_is_refused_before_anything_runs():
  c = common.base("tiny")
  c.loss.kwargs = {}
  checks.validate(c)
  c.loss.name = "dpo+test_losses_step:asks_for_more"
  with pytest.raises(
    ConfigError,
    match="asks for temperature, which no step "
    "computes .known: label.*config.loss.name",
  ):
    checks.validate(c)


def test_the_running_mean_has_the_beta_of_its_own_term():
  """Of a sum each term keeps its default; one that is given reaches all."""
  for name in ("dpo_norm+bco_pair", "bco_pair+dpo_norm"):
    fn = find(name)
    assert statistics.beta_of(losses.bind(fn, name, {})) == 0.1
    assert statistics.beta_of(losses.bind(fn, name, dict(beta=0.3))) == 0.3
  assert not statistics.needs_batch_logps(find("dpo+sft_tokens"))
  assert statistics.needs_batch_logps(find("aot+sft"))


EACH = [
  pytest.param(
    model,
    name,
    marks=[pytest.mark.slow]
    if (model == "decoder" and name not in DECODED)
    else [],
  )
  for model in MODELS
  for name in LOSSES
]


MORE_CUTS = [((1, 1), 2), ((4, 2), 1), ((2, 4), 8)]
# Each loss on one of those too, in turn: no mesh depends on a loss. Those
# that read nothing of the batch are like dpo.
NOW = ["dpo", *(name for name, fn in LOSSES.items() if fn.stats or fn.extras)]
CUTS = [
  pytest.param(
    *each.values,
    (4, 2),
    2,
    marks=each.marks or ([] if each.values[1] in NOW else [pytest.mark.slow]),
  )
  for each in EACH
] + [
  pytest.param(model, name, *MORE_CUTS[i % 3], marks=pytest.mark.slow)
  for model, names in (("table", LOSSES), ("decoder", sorted(DECODED)))
  for i, name in enumerate(names)
]


@pytest.fixture(autouse=True)
def forget(request):
  """A decoder's programs are large: hundreds exhaust the memory maps."""
  yield
  if "decoder" in request.node.name:
    jax.clear_caches()


@pytest.mark.parametrize("model,name,shape,accumulation", CUTS)
def test_two_steps_are_the_same_on_every_mesh_and_cut(
  model, name, shape, accumulation
):
  """1e-4 of the largest gradient: float32 sums in another order."""
  seen, (trace, params, states) = run(model, name, (1, 1), 1)
  again, (trace2, params2, states2) = run(model, name, shape, accumulation)
  _, x = data(model, columns_of(name))
  for totals in (seen[0], again[0]):
    means = divide(totals)
    assert means["loss"] == pytest.approx(equation(name, x), rel=2e-5)
    assert totals["loss"][1] == ROWS
  for a, b in zip(seen, again, strict=True):
    assert set(a) == set(b)
    for n in a:
      assert np.isfinite(a[n]).all(), n
      assert a[n][1] == b[n][1], n  # counts are exact
      np.testing.assert_allclose(a[n], b[n], rtol=1e-4, atol=1e-4, err_msg=n)
  largest = max(np.abs(g).max() for g in trace.values())
  assert largest > 1e-4
  for n, g in trace.items():
    np.testing.assert_allclose(trace2[n], g, rtol=0, atol=1e-4 * largest)
    np.testing.assert_allclose(params2[n], params[n], rtol=0, atol=1e-6)
  if "delta" in LOSSES[name].stats:
    delta, delta2 = states["delta"], states2["delta"]
    assert delta.count == delta2.count == 2 * x.r.size
    first = 0.1 * x.r.mean()  # the second step moved by 1e-4 of a gradient
    assert delta.mean == pytest.approx(first, rel=0.2)
    assert delta2.mean == pytest.approx(float(delta.mean), rel=1e-4)
    assert divide(seen[0])["delta"] == pytest.approx(first, rel=1e-5)
    assert divide(seen[1])["delta"] == pytest.approx(
      float(delta.mean), rel=1e-6
    )
  else:
    assert states == states2 == {}
