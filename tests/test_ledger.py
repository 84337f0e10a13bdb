"""What is counted, by hand: a two-stage job, flops, a training run."""

import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import peak_memory, sharding
from jaxalign.core.artifacts import Cost, Record
from jaxalign.data.tokens import TokenRows
from jaxalign.embed import passes
from jaxalign.model import decoder
from jaxalign.model.flops import decoder_flops
from jaxalign.study import ledger
from jaxalign.train import feed


def record(stage, cost, skipped=False):
  return Record(stage, "key", {}, {}, {}, cost, {}, skipped=skipped)


def test_two_stages_by_hand():
  records = {
    ("", "embed"): record("embed", Cost(600, 30, 1.5, 4000), True),
    ("isa-0.1-seed0", "align"): record("align", Cost(450, 9, 2.25, 100)),
  }
  lines = ledger.stages(records)
  assert lines == [
    dict(
      stage="embed",
      arm="",
      flops=600,
      tokens=30,
      seconds=1.5,
      bytes=4000,
      skipped=True,
    ),
    dict(
      stage="align",
      arm="isa-0.1-seed0",
      flops=450,
      tokens=9,
      seconds=2.25,
      bytes=100,
      skipped=False,
    ),
  ]
  # A skipped stage keeps what it once cost.
  assert ledger.total(lines) == Cost(1050, 39, 3.75, 4100)
  assert ledger.total([]) == Cost(0, 0, 0, 0)


def test_what_a_piece_of_work_adds_to_memory():
  with peak_memory.peak_memory() as peak:
    x = np.ones(2**26, np.uint8)
    time.sleep(0.1)
    del x  # it is the largest moment that counts
  assert peak["device"] is None  # a CPU does not say
  if pathlib.Path("/proc/self/statm").exists():
    assert 0.9 * 2**26 < peak["held"] < 3 * 2**26
  with peak_memory.peak_memory() as peak:
    pass
  assert peak["held"] < 2**24
  with pytest.raises(ValueError), peak_memory.peak_memory():
    raise ValueError("no thread is left behind")
  records = {("a", "select"): record("select", Cost(7))}
  records["a", "select"].result.update(peak, say="words")
  (line,) = ledger.stages(records)
  assert line["held"] == peak["held"] and line["device"] is None
  assert "say" not in line


COSTS = dict(reference=60, ref_logps=0, align=180)


@pytest.mark.parametrize(
  "stages, select, reference, total",
  [
    # ISA: the embedding pass has given the reference's numbers.
    (dict(embed=600, mixture=50), 650, 0, 830),
    (dict(embed=600), 600, 0, 780),
    # A greedy sampler's own work is its arm's, too.
    (dict(embed=600, select=1000), 1600, 0, 1780),
    # Tuned proxies: they read the embedding pass, too.
    (dict(embed=600, proxy=900), 1500, 0, 1680),
    # Random: nothing is embedded, so the kept rows need a pass of their own;
    # so they do where a judge alone has read the pool.
    (dict(), 0, 60, 240),
    (dict(ask=700), 700, 60, 940),
  ],
)
def test_an_arm_alone(stages, select, reference, total):
  assert ledger.arm_flops(stages=stages, **COSTS) == dict(
    select=select, reference=reference, align=180, total=total
  )


@pytest.mark.parametrize(
  "stages, reference, total",
  [(dict(embed=600, mixture=50), 40, 870), (dict(), 100, 280)],
)
def test_mismatched_rows_are_always_counted(stages, reference, total):
  assert ledger.arm_flops(stages=stages, **COSTS | dict(ref_logps=40)) == dict(
    select=sum(stages.values()), reference=reference, align=180, total=total
  )


def test_savings_with_and_without_sft():
  # A tenth of the rows: 830 against 600 + 1800 for all of them.
  share = ledger.saved(830, 2400, 0)
  assert share == dict(without_sft=1 - 830 / 2400, with_sft=1 - 830 / 2400)
  # 2400 more on both sides: (830 + 2400) / (2400 + 2400).
  assert ledger.saved(830, 2400, 2400) == dict(
    without_sft=1 - 830 / 2400, with_sft=1 - 3230 / 4800
  )


def test_selecting_can_cost_more_than_it_saves():
  # Half the rows, but the fit alone is twice the training.
  arm = ledger.arm_flops(
    stages=dict(embed=600, mixture=4000), reference=300, ref_logps=0, align=900
  )
  share = ledger.saved(arm["total"], 2400, 2400)
  assert arm["total"] == 5500
  np.testing.assert_allclose(share["without_sft"], -3100 / 2400)
  np.testing.assert_allclose(share["with_sft"], -3100 / 4800)


# Operations, against what a program really multiplies.


def multiplied(jaxpr):
  """Multiply-adds x 2 of all dot_generals, loops as often as they run."""
  total = 0
  for eqn in jaxpr.eqns:
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    assert eqn.primitive.name not in ("while", "cond")  # none: not countable
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      left = eqn.invars[0].aval.shape
      total += 2 * int(
        np.prod(eqn.outvars[0].aval.shape)
        * np.prod([left[d] for d in contracted])
      )
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          total += times * multiplied(inner)
  return total


MODELS = [
  decoder.ModelConfig(
    layers=3,
    width=12,
    heads=4,
    kv_heads=2,
    head_size=6,
    ff=20,
    vocab=34,
    context=16,
    tied=False,
  ),
  decoder.ModelConfig(
    layers=1,
    width=8,
    heads=2,
    kv_heads=2,
    head_size=2,
    ff=10,
    vocab=18,
    context=16,
  ),
]


@pytest.mark.parametrize("m", MODELS)
@pytest.mark.parametrize("length", [1, 5, 16])
def test_flops_are_the_dot_generals_of_the_forward_pass(m, length):
  mesh = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])

  def forward(params, tokens):
    return decoder.logits(
      decoder.forward(params, tokens, m), decoder.head(params, m)
    )

  def total(params, tokens):
    return jnp.sum(forward(params, tokens))

  with jax.set_mesh(mesh):
    args = (
      decoder.abstract(m, mesh),
      jax.ShapeDtypeStruct(
        (3, length),
        jnp.int32,
        sharding=sharding.named_sharding(mesh, "batch", None),
      ),
    )
    counted = multiplied(jax.make_jaxpr(forward)(*args).jaxpr)
    trained = multiplied(jax.make_jaxpr(jax.value_and_grad(total))(*args).jaxpr)
  assert counted == 3 * decoder_flops(m, length)
  # Backward multiplies each product twice more: 3 x, nothing recomputed.
  assert trained == 3 * counted


def test_flops_by_hand_and_without_the_head():
  m = decoder.ModelConfig(
    layers=2,
    width=4,
    heads=2,
    kv_heads=1,
    head_size=2,
    ff=3,
    vocab=10,
    context=16,
  )
  # A layer and token: q and o 4x4, k and v 4x2, three of 4x3: 84 products.
  # Attention: 2 heads x 2 deep x 2 products a pair of positions: 8.
  # The head: 4 x 10 a position.
  for length in (1, 5):
    layers = 2 * (2 * 84 * length + 2 * 8 * length**2)
    assert decoder_flops(m, length) == layers + 2 * 40 * length
    assert decoder_flops(m, length, 0) == layers
    assert decoder_flops(m, length, 1) == layers + 80


def rows_of(lengths):
  """Token rows of these lengths; their responses begin at 1."""
  offsets = np.cumsum([0, *lengths])
  return TokenRows(
    np.arange(offsets[-1], dtype=np.int32) % 10,
    offsets,
    np.ones(len(lengths), np.int32),
    np.zeros(len(lengths), np.int32),
  )


def test_a_training_run_is_three_forward_passes():
  m = decoder.ModelConfig(
    layers=2,
    width=4,
    heads=2,
    kv_heads=1,
    head_size=2,
    ff=3,
    vocab=10,
    context=16,
  )
  # One row of L tokens: 336 L + 32 L^2 in the layers and 80 L in the head.
  one = {3: 1536, 5: 2880, 7: 4480}
  assert {n: decoder_flops(m, n) for n in one} == one
  # Three rows of one response, of 3, 5 and 7 tokens, each seen twice.
  rows = feed.TrainRows(
    list("abc"),
    rows_of([3, 5, 7]),
    np.arange(3)[:, None],
    np.zeros((3, 1), np.float32),
    np.ones((3, 1), np.float32),
  )
  seen = feed.Batching(3, 0), 2
  with_other = lambda sizes: rows._replace(
    mismatched=feed.MismatchedRows(rows_of(sizes), None)
  )
  forward = 2 * (1536 + 2880 + 4480)  # 17,792
  assert feed.training_cost(m, rows, *seen) == (3 * forward, 30)
  # The policy runs over its whole batch first.
  assert feed.training_cost(m, rows, *seen, ahead=True) == (4 * forward, 30)
  assert 3 * forward == 53376
  # Selection's one pass over the same rows, and KTO's mismatched rows: each
  # is a forward pass alone.
  assert passes.flops(m, rows.tokens) == 8896
  assert feed.training_cost(m, with_other([5, 5, 3]), *seen) == (
    3 * forward + 2 * 2880 + 1536,
    43,
  )
  # Of a run that ended after one of its two updates, those of that one.
  assert feed.training_cost(
    m, with_other([5, 5, 3] * 2), feed.Batching(3, 0), 1
  ) == (3 * forward // 2 + 2 * 2880 + 1536, 15 + 13)
  # Two responses a row: the pair (3, 7), twice in two updates of one pair.
  pairs = feed.TrainRows(
    ["a"],
    rows_of([3, 5, 7]),
    np.array([[0, 2]]),
    np.zeros((1, 2), np.float32),
    np.ones((1, 2), np.float32),
  )
  assert feed.training_cost(m, pairs, feed.Batching(1, 0), 2) == (
    3 * 2 * (1536 + 4480),
    20,
  )
