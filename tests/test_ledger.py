"""What is counted, by hand: a two-stage job, flops, a training run."""

import pathlib
import time

import jax
import jax.numpy as jnp
from models import make_mesh, sized
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
from jaxalign.train.training_cost import training_cost


def record(stage, cost, skipped=False):
  return Record(stage, "key", {}, {}, {}, cost, {}, skipped=skipped)


def test_two_stages_by_hand():
  records = {
    ("", "embed"): record("embed", Cost(600, 30, 1.5, 4000), True),
    ("isa-0.1-seed0", "align"): record("align", Cost(450, 9, 2.25, 100)),
  }
  lines = ledger.stage_lines(records)
  names = "stage arm flops tokens seconds bytes skipped".split()
  assert lines == [
    dict(zip(names, ("embed", "", 600, 30, 1.5, 4000, True))),
    dict(zip(names, ("align", "isa-0.1-seed0", 450, 9, 2.25, 100, False))),
  ]
  # A skipped stage keeps what it once cost.
  assert ledger.total_cost(lines) == Cost(1050, 39, 3.75, 4100)
  assert ledger.total_cost([]) == Cost(0, 0, 0, 0)


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
  (line,) = ledger.stage_lines(records)
  assert line["held"] == peak["held"] and line["device"] is None
  assert "say" not in line


@pytest.mark.parametrize(
  "stages, ref_logps, select, reference, total",
  [
    # ISA: the embedding pass has given the reference's numbers.
    (dict(embed=600, mixture=50), 0, 650, 0, 830),
    (dict(embed=600), 0, 600, 0, 780),
    # A greedy sampler's own work is its arm's, too.
    (dict(embed=600, select=1000), 0, 1600, 0, 1780),
    # Tuned proxies: they read the embedding pass, too.
    (dict(embed=600, proxy=900), 0, 1500, 0, 1680),
    # Random: nothing is embedded, so the kept rows need a pass of their own;
    # so they do where a judge alone has read the pool.
    (dict(), 0, 0, 60, 240),
    (dict(ask=700), 0, 700, 60, 940),
    # Mismatched rows are always counted.
    (dict(embed=600, mixture=50), 40, 650, 40, 870),
    (dict(), 40, 0, 100, 280),
  ],
)
def test_an_arm_alone(stages, ref_logps, select, reference, total):
  costs = dict(reference=60, ref_logps=ref_logps, align=180)
  found = ledger.arm_flops(stages=stages, **costs)
  assert list(found) == ["select", "reference", "align", "total"]
  assert [*found.values()] == [select, reference, 180, total]


def test_savings_with_and_without_sft():
  # A tenth of the rows: 830 against 600 + 1800 for all of them.
  share = ledger.fraction_saved(830, 2400, 0)
  assert share == dict(without_sft=1 - 830 / 2400, with_sft=1 - 830 / 2400)
  # 2400 more on both sides: (830 + 2400) / (2400 + 2400).
  assert ledger.fraction_saved(830, 2400, 2400) == dict(
    without_sft=1 - 830 / 2400, with_sft=1 - 3230 / 4800
  )


def test_selecting_can_cost_more_than_it_saves():
  # Half the rows, but the fit alone is twice the training.
  arm = ledger.arm_flops(
    stages=dict(embed=600, mixture=4000), reference=300, ref_logps=0, align=900
  )
  share = ledger.fraction_saved(arm["total"], 2400, 2400)
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
  sized(3, 12, 4, 2, 6, 20, 34, 16, tied=False),
  sized(1, 8, 2, 2, 2, 10, 18, 16),
]
SMALL = sized(2, 4, 2, 1, 2, 3, 10, 16)


@pytest.mark.parametrize("m", MODELS)
@pytest.mark.parametrize("length", [1, 5, 16])
def test_flops_are_the_dot_generals_of_the_forward_pass(m, length):
  mesh = make_mesh()

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
  m = SMALL
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
  m = SMALL
  # One row of L tokens: 336 L + 32 L^2 in the layers and 80 L in the head.
  one = {3: 1536, 5: 2880, 7: 4480}
  assert {n: decoder_flops(m, n) for n in one} == one

  def train_rows(lengths, row_of):
    shape, row_of = np.shape(row_of), np.array(row_of)
    sums = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    return feed.TrainRows(
      list("abc")[: len(row_of)], rows_of(lengths), row_of, *sums
    )

  cost, batching = training_cost, feed.Batching(3, 0)
  # Three rows of one response, of 3, 5 and 7 tokens, each seen twice.
  rows = train_rows([3, 5, 7], [[0], [1], [2]])
  with_other = lambda sizes: rows._replace(
    mismatched=feed.MismatchedRows(rows_of(sizes), None)
  )
  forward = 2 * (1536 + 2880 + 4480)  # 17,792
  assert cost(m, rows, batching, 2) == (3 * forward, 30)
  # The policy runs over its whole batch first.
  assert cost(m, rows, batching, 2, ahead=True) == (4 * forward, 30)
  assert 3 * forward == 53376
  # Selection's one pass over the same rows, and KTO's mismatched rows: each
  # is a forward pass alone.
  assert passes.pass_flops(m, rows.tokens) == 8896
  extra = 2 * 2880 + 1536
  assert cost(m, with_other([5, 5, 3]), batching, 2) == (
    3 * forward + extra,
    43,
  )
  # Of a run that ended after one of its two updates, those of that one.
  ended = cost(m, with_other([5, 5, 3] * 2), batching, 1)
  assert ended == (3 * forward // 2 + extra, 15 + 13)
  # Two responses a row: the pair (3, 7), twice in two updates of one pair.
  pairs = train_rows([3, 5, 7], [[0, 2]])
  found = cost(m, pairs, feed.Batching(1, 0), 2)
  assert found == (3 * 2 * (1536 + 4480), 20)
