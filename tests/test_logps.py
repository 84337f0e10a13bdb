"""Every producer and layout in the losses: the same values and gradients.

The padded layout with the plain head is what the others are held to (against
the float64 Llama in test_layout); nothing but the plain head holds [B, L, V].
"""

import functools
import re

import flat
import jax
import numpy as np
import optax
import pytest
from test_layout import examples, make_mesh, MODEL, on_mesh, rows_of
from test_ledger import multiplied

from jaxalign.core import devices
from jaxalign.data import batches
from jaxalign.embed import passes
from jaxalign.model import adapters, decoder
from jaxalign.model.flops import decoder_flops, layer_flops, useful_flops
from jaxalign.train import feed, losses
from jaxalign.train import step as steps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import LOSSES
from jaxalign.train.metrics import divide
from jaxalign.train.training_cost import useful_cost

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, SEED = 16, 3


@functools.lru_cache
def scored(r):
  """A reference near the policy: sums, and of common prefixes, [n, R]."""
  rng = np.random.default_rng(r)
  n = len(examples(r=r))
  total = rng.normal(-20, 4, (n, r))
  return np.float32(total), np.float32(0.6 * total)


def feed_of(mesh, fn, layout, accumulation):
  """Of 16 rows with all that a loss may read."""
  r = 1 if fn.kind == "unpaired" else 2
  pairs, (total, prefix) = examples(r=r), scored(r)
  n, rng = len(pairs), np.random.default_rng(4)
  tokens = rows_of(pairs)
  label = rng.random(n) < 0.5 if r == 1 else None
  columns = dict(common_prefix=prefix) if "common_prefix" in fn.extras else {}
  if "weights" in fn.stats:
    columns["weights"] = np.float32(rng.uniform(0.5, 3, n))
  counts = np.float32([[len(a) for a in more] for _, *more in pairs])
  rows = flat.train_rows(tokens, r, total, counts, label=label, columns=columns)
  batching = feed.Batching(BATCH, SEED, accumulation, 64, layout)
  if "z0" in fn.stats:
    spliced = feed.make_mismatched(rows, batching, 2)
    sums = np.float32(rng.normal(-30, 1, 2 * BATCH))
    rows = rows._replace(mismatched=feed.MismatchedRows(spliced, sums))
  return feed.Feed(mesh, rows, batching, lambda step: 1e-3)


@functools.lru_cache
def gradients_of(name, head, m=MODEL):
  fn = losses.bind(LOSSES[name], name, {})
  return fn, jax.jit(steps.make_gradients(PRODUCERS[head](m, 5), fn))


def run(name, head, layout, shape, accumulation, m=MODEL):
  fn, gradients = gradients_of(name, head, m)
  mesh = make_mesh(*shape)
  with jax.set_mesh(mesh):
    batch = feed_of(mesh, fn, layout, accumulation).batch_at(0)
    grads, totals = gradients(on_mesh(mesh, m), batch, {})
    return jax.device_get(grads), divide(jax.device_get(totals))


@functools.lru_cache
def wanted(name):
  return run(name, "plain", "padded", (1, 1), 1)


def close(found, base, slope=1e-4):
  """1e-4 of the largest slope and 2e-5 of a metric: float32 sums of 30 nats
  in another order, squared by some losses."""
  (grads, totals), (base_grads, base_totals) = found, base
  assert set(totals) == set(base_totals)
  for n, x in base_totals.items():
    assert totals[n] == pytest.approx(x, rel=2e-5, abs=2e-5), n
  largest = max(np.abs(g).max() for g in base_grads.values())
  assert largest > 1e-3
  for n, g in base_grads.items():
    np.testing.assert_allclose(
      grads[n], g, rtol=0, atol=slope * largest, err_msg=n
    )


QUICK = ("ld_dpo", "kto")  # with all that Logps holds; a second pass
WAYS = [
  ("vocab", "packed", (1, 1), 1),
  ("vocab", "padded", (4, 2), 1),
  ("plain", "packed", (8, 1), 1),
  ("chunked", "padded", (1, 1), 2),
]
# Every loss packed with its head in chunks, and one of the other ways in turn;
# the quick ones all of them.
PACKED = [
  pytest.param(
    name,
    *way,
    marks=([] if name in QUICK and way == WAYS[0] else [pytest.mark.slow]),
  )
  for i, name in enumerate(LOSSES)
  for way in (
    ("chunked", "packed", (4, 2), 2),
    *(WAYS if name in QUICK else [WAYS[i % 4]]),
  )
]


@pytest.mark.parametrize("name,head,layout,shape,accumulation", PACKED)
def test_every_loss_has_the_plain_padded_value_and_gradient(
  name, head, layout, shape, accumulation
):
  close(run(name, head, layout, shape, accumulation), wanted(name))


@pytest.mark.parametrize(
  "change",
  [
    dict(windows=(3, 0), kinds=(0, 1)),
    pytest.param(
      dict(windows=(4,), softcap=2.0, qk_norm=True), marks=pytest.mark.slow
    ),
    pytest.param(
      dict(windows=(5,), lora=adapters.Lora(3)), marks=pytest.mark.slow
    ),
  ],
  ids=["windows", "softcap", "lora"],
)
@pytest.mark.parametrize(
  "kernel", ["tiles", pytest.param("plain", marks=pytest.mark.slow)]
)
def test_windows_and_caps_are_by_position(kernel, change):
  m = MODEL._replace(**change)
  base = run("dpo", "plain", "padded", (1, 1), 1, m)
  # With these adapters one token's slope moves by 8e-4 of itself when the plain
  # form alone is compiled with other options: so much is rounding.
  close(
    run("dpo", "chunked", "packed", (1, 1), 1, m._replace(attention=kernel)),
    base,
    1e-3 if m.lora else 1e-4,
  )
  whole = wanted("dpo")[1]["logps/chosen"]
  assert abs(base[1]["logps/chosen"] - whole) > 1e-3  # it matters


def test_a_batch_is_a_function_of_its_step():
  mesh = make_mesh(4, 2)
  for name in ("dpo", "kto"):
    fed = feed_of(mesh, LOSSES[name], "packed", 2)
    again = feed_of(mesh, LOSSES[name], "packed", 2).batch_at
    again(1)  # whatever came before
    for step in (0, 1):
      a, b = fed.batch_at(step), again(step)
      assert jax.tree.structure(a) == jax.tree.structure(b)
      jax.tree.map(np.testing.assert_array_equal, a, b)
      own = batches.rows_at(step, 16, BATCH, SEED)
      assert fed.ids_at(step) == [f"r{i}" for i in own]
      total, _ = scored(1 if name == "kto" else 2)
      assert sorted(np.ravel(a.ref.sum)) == sorted(np.ravel(total))


def test_the_first_loss_is_ln_2_in_packed_rows(mesh):
  """1e-6 nat: the reference is another program, whose sums of up to 40 nats
  are rounded at 1e-5; that is divided by 2 and averaged over 16 pairs."""
  pairs = examples()
  tokens = rows_of(pairs)
  how = passes.PassOptions(4, 5)
  found = passes.score_rows(mesh, on_mesh(mesh), MODEL, tokens, how)
  rows = flat.train_rows(tokens, 2, found.logp, found.count)
  batching = feed.Batching(BATCH, 0, context=64, layout="packed")
  batch = feed.Feed(mesh, rows, batching).batch_at(0)
  _, gradients = gradients_of("dpo", "chunked")
  _, totals = gradients(on_mesh(mesh), batch, {})
  means = divide(jax.device_get(totals))
  assert abs(means["preference_loss"] - np.log(2)) < 1e-6
  assert abs(means["rewards/margins"]) < 2e-6


def test_what_is_shared_and_padded_is_logged():
  pairs, mesh = examples(), make_mesh(1, 1)
  fn, _ = gradients_of("dpo", "chunked")
  tx = optax.sgd(0.0)
  train_step = steps.make_train_step(PRODUCERS["chunked"](MODEL, 5), fn, tx)
  batch = feed_of(mesh, fn, "packed", 1).batch_at(0)
  with jax.set_mesh(mesh):
    _, totals = train_step(steps.init_state(on_mesh(mesh), tx), batch)
  means = divide(jax.device_get(totals))
  prompts = sum(len(p) for p, *_ in pairs)
  answers = sum(len(a) for _, *more in pairs for a in more)
  assert means["perf/shared"] == pytest.approx(
    prompts / (2 * prompts + answers)
  )
  slots = batch.tokens.tokens.size
  assert means["perf/padding"] == pytest.approx(1 - (prompts + answers) / slots)


# Memory, by the compiled text.


@pytest.mark.parametrize(
  "head,layout",
  [
    ("chunked", "packed"),
    ("vocab", "packed"),
    ("plain", "packed"),
    *(
      pytest.param(head, "padded", marks=pytest.mark.slow) for head in PRODUCERS
    ),
  ],
)
def test_only_the_plain_head_holds_all_logits(head, layout):
  """No array, of any shape, is as large as [positions, V] of what is scored."""
  mesh = make_mesh(1, 1)
  m = MODEL._replace(layers=1, vocab=1021)  # no size but the vocabulary's
  pairs = [(p, a * 6, b * 6) for p, a, b in examples(n=BATCH)]
  rows = flat.train_rows(rows_of(pairs), 2)
  with jax.set_mesh(mesh):
    batching = feed.Batching(BATCH, 0, context=64, layout=layout)
    batch = feed.Feed(mesh, rows, batching).batch_at(0)
    scored = (batch.tokens.target if layout == "packed" else batch.tokens).size
    loss = losses.bind(LOSSES["dpo"], "dpo", {})
    gradients = jax.jit(steps.make_gradients(PRODUCERS[head](m, 4), loss))
    lowered = gradients.lower(decoder.abstract(m, mesh), batch, {})
    text = lowered.compile().as_text()
  sizes = [
    int(np.prod([int(x) for x in dims.split(",")]))
    for dims in re.findall(r"(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)
  ]
  assert (max(sizes) >= scored * 1021) == (head == "plain"), max(sizes)


# FLOPs.


def brute(m, prompt, answers):
  """By hand: every product of every token, every pair that sees each other."""
  layer = 2 * m.width * m.head_size * (2 * m.heads + 2 * m.kv_heads)
  layer += 2 * m.width * m.ff * (3 if m.gated else 2)
  total = 0
  for p, more in zip(prompt, answers):
    total += m.layers * layer * (p + sum(more))
    for i in range(p):
      total += m.layers * 4 * m.heads * m.head_size * (i + 1)
    for a in more:
      for i in range(a):
        total += m.layers * 4 * m.heads * m.head_size * (p + i + 1)
      total += a * 2 * m.width * m.vocab
  return total


def test_useful_flops_by_hand():
  prompt, answers = np.array([3, 5]), np.array([[2, 4], [1, 6]])
  for m in (MODEL, MODEL._replace(gated=False, layers=3)):
    assert useful_flops(m, prompt, answers) == brute(
      m, prompt.tolist(), answers.tolist()
    )
  rows = flat.train_rows(
    rows_of([([7] * 3, [8] * 2, [9] * 4), ([7] * 5, [8], [9] * 6)]), 2
  )
  found = useful_cost(MODEL, rows, feed.Batching(2, 0), 0)
  assert found == 3 * brute(MODEL, [3, 5], [[2, 4], [1, 6]])


def test_packed_flops_are_the_dot_generals():
  """Dense layers on T tokens, attention on its rows, the head on U states."""
  mesh, m = make_mesh(1, 1), MODEL._replace(attention="plain")
  with jax.set_mesh(mesh):
    batch = feed_of(mesh, LOSSES["dpo"], "packed", 1).batch_at(0)
    rows, mask = jax.tree.map(lambda x: x[0], (batch.tokens, batch.mask))
    jaxpr = jax.make_jaxpr(PRODUCERS["plain"](m, 0))(
      decoder.abstract(m, mesh), rows, mask
    )
  _, a, l = rows.copies.token.shape
  dense, answered = rows.tokens.size, rows.target.size
  square = a * (decoder_flops(m, l, 0) - m.layers * layer_flops(m) * l)
  head = 2 * m.width * m.vocab * answered
  layers = m.layers * layer_flops(m) * dense
  assert multiplied(jaxpr.jaxpr) == layers + square + head


def test_a_peak_is_known_or_none():
  class Device:
    device_kind = "TPU v5 lite"

  assert devices.peak_flops(Device()) == 197e12
  Device.device_kind = "TPU v5p"
  assert devices.peak_flops(Device()) == 459e12
  assert devices.peak_flops(jax.devices()[0]) == 0.0
