"""The formulas of flops are the products that a step's program holds.

Every dot_general of a jaxpr is counted by its shapes, a scan's body as often as
it runs, and the sum is the formula's to the last multiplication: of a forward
pass, of the gradients of padded and of packed rows, with adapters and without.
The compiler's own count says the same within 3 %.
"""

import functools
import math

import flat
import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
from models import sized
import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.data import tokens as tokens_lib
from jaxalign.model import adapters, decoder
from jaxalign.model.flops import decoder_flops
from jaxalign.train import feed, online, optim, statistics
from jaxalign.train import step as steps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import LOSSES
from jaxalign.train.training_cost import training_cost, useful_cost

MODEL = sized(3, 16, 4, 2, 6, 40, 48, 32, attention="plain")
BATCH, LENGTH = 4, 12
pytestmark = pytest.mark.usefixtures("alone")


def dots(jaxpr):
  """Multiply-adds x 2 of all dot_generals in a jaxpr and those inside it."""
  total = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      a = eqn.invars[0].aval.shape
      sums = math.prod(a[i] for i in contract)
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * sums
    inside = sum(dots(j) for j in jax_core.jaxprs_in_params(eqn.params))
    assert name not in ("while", "cond", "conv_general_dilated") or not inside
    total += inside * (eqn.params["length"] if name == "scan" else 1)
  return total


def by_hand(m, tokens, squares, logits):
  """Products of a forward pass, from the equations of the Llama.

  Args:
    m: sizes.
    tokens: that the dense layers see.
    squares: (query, key) pairs that attention multiplies.
    logits: places that meet the head.
  """
  d, h, g, c = m.width, m.heads, m.kv_heads, m.head_size
  dense = d * h * c + 2 * d * g * c + h * c * d + 3 * d * m.ff
  return 2 * (
    m.layers * (dense * tokens + 2 * h * c * squares) + d * m.vocab * logits
  )


ROW = by_hand(MODEL, LENGTH, LENGTH**2, LENGTH)  # of one padded row


def lengths_of(r, even):
  """Prompts [B] and answers [B, R], all rows of LENGTH tokens where even."""
  rng = np.random.default_rng(r)
  prompt = rng.integers(2, 6, BATCH)
  if even:
    return prompt, np.repeat(LENGTH - prompt[:, None], r, 1)
  return prompt, rng.integers(1, LENGTH - 5, (BATCH, r))


def rows_of(r, even):
  prompt, answers = lengths_of(r, even)
  rng = np.random.default_rng(7)
  ids = lambda n: rng.integers(3, 48, n)
  groups = [(ids(p), *map(ids, own)) for p, own in zip(prompt, answers)]
  label = np.arange(BATCH) % 2 == 0 if r == 1 else None
  return flat.train_rows(flat.rows_of(groups), r, label=label)


BATCHING = feed.Batching(BATCH, 0, context=MODEL.context)


def batch_of(mesh, rows, layout):
  return feed.Feed(mesh, rows, BATCHING._replace(layout=layout)).batch_at(0)


def with_mismatched(rows):
  tokens = feed.make_mismatched(rows, BATCHING, 1)
  other = feed.MismatchedRows(tokens, np.zeros(BATCH, np.float32))
  return rows._replace(mismatched=other)


def cost_of(m, rows, **more):
  return training_cost(m, rows, BATCHING, 1, **more)[0]


def useful_of(m, rows, **more):
  return useful_cost(m, rows, BATCHING, 0, **more)


def counted(mesh, m, batch, loss, head="plain", against=None):
  """Products of a whole train step, AdamW and its statistics included.

  `against`: of an online reference too, of these sizes.
  """
  tx = optim.make_optimizer(clip=1.0, weight_decay=0.01, b2=0.999)
  step = steps.make_train_step(PRODUCERS[head](m, 5), LOSSES[loss], tx)
  params = decoder.abstract(m, mesh)
  trained, frozen = adapters.split(params, m.lora)
  state = steps.TrainState(
    trained,
    jax.eval_shape(tx.init, trained),
    jax.ShapeDtypeStruct((), jnp.int32),
    statistics.init_statistics(LOSSES[loss]),
  )
  if against is None:
    return dots(jax.make_jaxpr(step)(state, batch, frozen).jaxpr)
  fill = online.make_fill(PRODUCERS[head](against, 5))

  def both(reference, state, batch, frozen):
    return step(state, fill(reference, batch), frozen)

  reference = decoder.abstract(against, mesh)
  return dots(jax.make_jaxpr(both)(reference, state, batch, frozen).jaxpr)


def test_a_counter_that_counts():
  """By hand, of a product alone, in a scan, in a gradient."""
  a, b = np.ones((2, 3), np.float32), np.ones((3, 5), np.float32)
  of = lambda fn, *x: dots(jax.make_jaxpr(fn)(*x).jaxpr)
  assert of(jnp.dot, a, b) == 2 * 2 * 3 * 5
  twice = lambda x, _: (x @ b @ b.T, None)
  loop = lambda a: jax.lax.scan(twice, a, None, length=7)[0]
  assert of(loop, a) == 7 * 2 * 2 * (2 * 3 * 5)
  slopes = jax.grad(lambda a, b: jnp.sum(jnp.sin(a @ b)), (0, 1))
  assert of(slopes, a, b) == 3 * 2 * 2 * 3 * 5


@pytest.mark.parametrize(
  "m",
  [MODEL, MODEL._replace(kv_heads=4, tied=False, head_size=4)],
  ids=["grouped", "untied"],
)
def test_a_forward_pass(alone, m):
  tokens = jax.ShapeDtypeStruct((3, 20), jnp.int32)

  def fn(params, tokens):
    return decoder.logits(
      decoder.forward(params, tokens, m), decoder.head(params, m)
    )

  found = dots(jax.make_jaxpr(fn)(decoder.abstract(m, alone), tokens).jaxpr)
  assert found == by_hand(m, 60, 3 * 20 * 20, 60)
  assert found == 3 * decoder_flops(m, 20)
  assert decoder_flops(m, 20, 1) == by_hand(m, 20, 400, 1)


@pytest.mark.parametrize("loss,r", [("dpo", 2), ("apo_zero_unpaired", 1)])
def test_a_step_on_padded_rows_is_three_passes(alone, loss, r):
  rows = rows_of(r, even=True)
  found = counted(alone, MODEL, batch_of(alone, rows, "padded"), loss)
  assert found == 3 * BATCH * r * ROW
  assert found == cost_of(MODEL, rows)


def test_kto_adds_a_pass_of_its_mismatched_rows(alone):
  rows = with_mismatched(rows_of(1, even=True))
  other = rows.mismatched
  batch = batch_of(alone, rows, "padded")
  size = batch.mismatched.tokens.shape[-1]
  found = counted(alone, MODEL, batch, "kto")
  own = 3 * BATCH * ROW
  assert found == own + BATCH * by_hand(MODEL, size, size**2, size)
  cost = cost_of(MODEL, rows)
  real = tokens_lib.row_lengths(other.tokens)  # the formula counts no padding
  assert cost == own + sum(by_hand(MODEL, n, n * n, n) for n in real.tolist())


def test_a_loss_that_looks_ahead_adds_a_pass(alone):
  rows = rows_of(2, even=True)
  found = counted(alone, MODEL, batch_of(alone, rows, "padded"), "aot")
  assert found == cost_of(MODEL, rows, ahead=True)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_online_reference_adds_a_pass(alone, rank):
  """Of its own weights, without adapters."""
  m = MODEL._replace(lora=adapters.Lora(rank=rank) if rank else None)
  rows = rows_of(2, even=True)
  batch = batch_of(alone, rows, "padded")
  stored = counted(alone, m, batch, "dpo")
  one = 2 * BATCH * ROW
  assert counted(alone, m, batch, "dpo", against=MODEL) == stored + one
  cost, tokens = training_cost(m, rows, BATCHING, 1)
  with_reference = training_cost(m, rows, BATCHING, 1, online=True)
  assert with_reference == (cost + one, tokens)
  more = useful_of(m, rows, online=True) - useful_of(m, rows)
  assert 3 * more == useful_of(MODEL, rows)


def test_an_online_reference_reads_the_mismatched_rows_too(alone):
  rows = with_mismatched(rows_of(1, even=True))
  batch = batch_of(alone, rows, "padded")
  size = batch.mismatched.tokens.shape[-1]
  count = functools.partial(counted, alone, MODEL, batch, "kto")
  other = by_hand(MODEL, size, size**2, size)
  assert count(against=MODEL) - count() == BATCH * (ROW + other)
  # The formula counts no padding.
  real = tokens_lib.row_lengths(rows.mismatched.tokens).tolist()
  own = BATCH * ROW + sum(by_hand(MODEL, n, n * n, n) for n in real)
  assert cost_of(MODEL, rows, online=True) - cost_of(MODEL, rows) == own
  both, one = useful_of(MODEL, rows, online=True), useful_of(MODEL, rows)
  without = useful_of(MODEL, rows._replace(mismatched=None))
  assert both - one == without // 3 + one - without


def test_a_window_s_queries_see_no_further_back(alone):
  """By the mask that attention has, query by query."""
  m = MODEL._replace(windows=(0, 4), kinds=(1, 0, 1))
  prompt, answers = lengths_of(2, even=False)
  full = useful_of(MODEL, rows_of(2, even=False))
  found = useful_of(m, rows_of(2, even=False))
  hidden = 0
  for p, own in zip(prompt.tolist(), answers.tolist()):
    places = [*range(p), *(p + i for n in own for i in range(n))]
    hidden += sum(max(0, i + 1 - 4) for i in places)
  # Two layers of three, both of attention's products, three passes.
  assert found == full - 3 * 2 * 2 * 2 * m.heads * m.head_size * hidden
  assert hidden > 0


def test_a_head_in_chunks_is_computed_once_more(alone):
  """Recomputation, which no formula counts: 12 places in 3 chunks of 4."""
  rows = rows_of(2, even=True)
  batch = batch_of(alone, rows, "padded")
  again = BATCH * 2 * 2 * MODEL.width * MODEL.vocab * LENGTH
  assert counted(alone, MODEL, batch, "dpo", "chunked") == again + counted(
    alone, MODEL, batch, "dpo"
  )


@pytest.mark.parametrize("r", [1, 2])
def test_packed_rows_compute_what_their_shape_holds(alone, r):
  """Every slot of the dense row once, a square a row of attention, the head on
  the slots of predictions; `useful` is the same without what is empty."""
  rows = rows_of(r, even=False)
  batch = batch_of(alone, rows, "packed")
  loss = "dpo" if r == 2 else "apo_zero_unpaired"
  x = jax.tree.map(lambda x: x.shape[1:], batch.tokens)
  slots, places = math.prod(x.tokens), math.prod(x.target)
  _, a, l = x.copies.token
  found = counted(alone, MODEL, batch, loss)
  assert found == 3 * by_hand(MODEL, slots, a * l * l, places)
  prompt, answers = lengths_of(r, even=False)
  seen = sum(
    (p + n) * (p + n + 1) // 2 - (p * (p + 1) // 2) * (i > 0)
    for p, own in zip(prompt.tolist(), answers.tolist())
    for i, n in enumerate(own)
  )
  answered = int(answers.sum())
  useful = 3 * by_hand(MODEL, int(prompt.sum()) + answered, seen, answered)
  assert useful_of(MODEL, rows) == useful
  assert useful < found


def test_adapters_spare_the_gradients_of_frozen_weights(alone):
  """Two passes; attention's products have two operands that move, so three;
  and three of the adapters' own, which the formula leaves out."""
  m = MODEL._replace(lora=adapters.Lora(rank=2))
  rows = rows_of(2, even=True)
  found = counted(alone, m, batch_of(alone, rows, "padded"), "dpo")
  n = BATCH * 2
  d, h, g, c, f = m.width, m.heads, m.kv_heads, m.head_size, m.ff
  ends = [(d, h * c), (d, g * c), (d, g * c), (h * c, d)]
  ends += [(d, f), (d, f), (f, d)]
  small = 2 * m.layers * LENGTH * sum(2 * (i + o) for i, o in ends)
  square = 2 * m.layers * 2 * h * c * LENGTH**2
  formula = cost_of(m, rows)
  assert formula == n * (square + 2 * by_hand(m, LENGTH, LENGTH**2, LENGTH))
  assert found == formula + 3 * n * small
  useful = useful_of(m, rows)
  seen = useful_of(MODEL, rows) // 3
  prompt, answers = lengths_of(2, even=True)
  pairs = sum(
    p * (p + 1) // 2 + sum(p * a + a * (a + 1) // 2 for a in own)
    for p, own in zip(prompt.tolist(), answers.tolist())
  )
  assert useful == 2 * seen + 2 * m.layers * 2 * h * c * pairs


@pytest.mark.slow
@pytest.mark.parametrize("width", [256, 384])
def test_the_compiler_counts_as_much(alone, monkeypatch, width):
  """Gradients of two layers, unrolled, for the compiler counts a loop once.

  It also counts what is no product (norms, softmax, rotations): 1 to 2 %.
  """
  m = sized(2, width, 4, 4, width // 4, 3 * width, 1024, 64)
  scan = jax.lax.scan
  monkeypatch.setattr(jax.lax, "scan", functools.partial(scan, unroll=True))
  tokens = jax.ShapeDtypeStruct(
    (1, 2, 64), jnp.int32, sharding=sharding.named_sharding(alone, "batch")
  )

  def loss(params, tokens):
    out = PRODUCERS["plain"](m, 0)(params, tokens, tokens > 0)
    return jnp.sum(out.sum)

  lowered = jax.jit(jax.grad(loss)).lower(decoder.abstract(m, alone), tokens)
  cost = lowered.compile().cost_analysis()
  assert 3 * 2 * decoder_flops(m, 64) == pytest.approx(cost["flops"], rel=0.03)
