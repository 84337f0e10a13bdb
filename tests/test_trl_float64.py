"""Twenty steps beside TRL 1.16 with float64 on both sides, for every loss.

Same weights, tokens, order, optimizer and rates. Transformers keeps its norms
and its rotary tables in float32 whatever the model's dtype, and TRL some of
its sums; ours are wide. What is left is their rounding: at most 9e-6 nat of a
sum of log-probabilities and 9e-6 of a loss over the 20 steps, but for DiscoPOP.
"""

import flat
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parity_trl as harness
import test_parity_trl_losses as tables
import test_trl_trajectory as runs

from jaxalign.core import sharding
from jaxalign.data import batches
from jaxalign.data import tokens as tokens_lib
from jaxalign.data.encode import encode_texts
from jaxalign.model import hf
from jaxalign.train import feed, optim
from jaxalign.train import step as steps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import bind, LOSSES
from jaxalign.train.metrics import divide

# torch, transformers and trl warn of their own futures.
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings("ignore"),
  pytest.mark.usefixtures("quick_compiles"),
]

MODEL = harness.MODEL._replace(dtype="float64", attention="tiles")
HOW = dict(batch=4, updates=20, lr=2e-3, beta=0.5)
# A gradient's norm is of 2 to 80, and no nat.
LIMITS = dict(learning_rate=1e-8, grad_norm=1e-3)

trl, alone = harness.trl, harness.alone  # fixtures


@pytest.fixture(autouse=True)
def float64(alone):
  with jax.enable_x64(True):
    yield


def fresh(mesh):
  return {
    n: sharding.put(mesh, np.float64(x), *p.axes)
    for (n, p), x in zip(
      runs.decoder.table(MODEL).items(), harness.fresh(mesh).values()
    )
  }


def reference(mesh, tokens, responses):
  """(sums, counts) float64 [N, R] of the first weights, all at once."""
  size = tokens_lib.row_lengths(tokens)
  n, length = len(size), int(size.max())
  ids, mask = np.zeros((n, length), np.int32), np.zeros((n, length), np.int32)
  for i, each in enumerate(np.split(tokens.ids, tokens.offsets[1:-1])):
    ids[i, : len(each)] = each
    mask[i, tokens.start[i] : len(each)] = 1
  shape = (n // responses, responses, length)
  put = lambda x: sharding.put(mesh, x.reshape(shape), "batch", None, None)
  found = PRODUCERS["plain"](MODEL)(fresh(mesh), put(ids), put(mask))
  assert found.sum.dtype == jnp.float64
  return np.asarray(found.sum), np.asarray(found.count)


def ours(mesh, rows, loss, batch=HOW["batch"]):
  """Metrics of every step, through the feed and the train step of a job."""
  tx = optim.make_optimizer(clip=1.0, weight_decay=runs.DECAY, b2=runs.B2)
  train_step = steps.make_train_step(PRODUCERS["chunked"](MODEL, 8), loss, tx)
  rate = runs.rate_of(HOW["lr"], HOW["updates"])
  batching = feed.Batching(batch, runs.SEED, 1, MODEL.context, "packed")
  batch_at = feed.Feed(mesh, rows, batching, rate).batch_at
  state, seen = steps.init_state(fresh(mesh), tx, loss), []
  for step in range(HOW["updates"]):
    state, totals = train_step(state, batch_at(step))
    seen.append(
      {f"train/{n}": x for n, x in divide(jax.device_get(totals)).items()}
    )
  assert {x.dtype for x in state.params.values()} == {jnp.dtype("float64")}
  return [x | dict(lr=x["train/lr"]) for x in seen]


def loss_of(name):
  """(our loss of TRL's name, TRL's options for it)."""
  mine, both, own = tables.DPO[name]
  if name != "sft":
    own = own | dict(beta=HOW["beta"])
  bound = bind(LOSSES[mine], mine, own)
  if mine == "bco_pair":  # TRL's has no running mean
    stats, still = bound.stats, bound
    bound = lambda policy, ref, given: still(policy, ref, dict(delta=0.0))
    bound.__dict__.update(
      still.__dict__, stats=tuple(s for s in stats if s != "delta")
    )
  return bound, both


@pytest.mark.parametrize("name", tables.DPO)
def test_every_loss_of_dpo_trainer(trl, alone, tmp_path, name):
  pool, tok = harness.data()
  hf.export_folder(
    tmp_path / "export", harness.fresh(alone), harness.MODEL, tok
  )
  tokens, _, refused = encode_texts(
    tok,
    [r["prompt"] for r in pool],
    {k: [r[k] for r in pool] for k in ("chosen", "rejected")},
    MODEL.context,
  )
  assert not refused
  n = len(pool)
  rows = flat.train_rows(tokens, 2, *reference(alone, tokens, 2))
  loss, options = loss_of(name)
  taken = runs.order(n, HOW["batch"], HOW["updates"])
  theirs, _ = runs.theirs(
    trl,
    tmp_path,
    "DPO",
    [pool[i] for i in taken],
    dtype="float64",
    loss_type=[name],
    **HOW,
    **options,
  )
  # Ours of a likelihood has no rewards, which need a reference.
  found = runs.gaps(
    ours(alone, rows, loss), theirs, () if name == "sft" else runs.PAIR
  )
  if name == "discopop":  # its gate is 20 times as steep as a sigmoid, so the
    # rounding of transformers' norms grows from step to step: 3e-4 measured
    runs.within(found, LIMITS | dict(grad_norm=3e-2), 1e-3)
  else:
    runs.within(found, LIMITS, 1e-5)


@pytest.mark.parametrize("name", tables.KTO)
def test_every_loss_of_kto_trainer(trl, alone, tmp_path, name):
  """With TRL's choice of mismatched answers: the row before, in the batch."""
  pool, tok = harness.data()
  hf.export_folder(
    tmp_path / "export", harness.fresh(alone), harness.MODEL, tok
  )
  n = len(pool)
  label = np.random.default_rng(1).random(n) < 0.5
  said = [r["chosen"] if up else r["rejected"] for r, up in zip(pool, label)]
  tokens = encode_texts(
    tok,
    [r["prompt"] for r in pool],
    dict(response=said),
    MODEL.context,
    "cut_answer",
  ).rows
  taken = runs.order(n, HOW["batch"], HOW["updates"])
  before = np.roll(taken.reshape(-1, HOW["batch"]), 1, axis=1).ravel()
  other = batches.mismatched(tokens, taken, before, MODEL.context)
  rows = flat.train_rows(tokens, 1, *reference(alone, tokens, 1), label=label)
  if name == "kto":
    sums = reference(alone, other, 1)[0][:, 0]
    rows = rows._replace(mismatched=feed.MismatchedRows(other, sums))
  mine = tables.KTO[name]
  loss = bind(LOSSES[mine], mine, dict(beta=HOW["beta"]))
  theirs, _ = runs.theirs(
    trl,
    tmp_path,
    "KTO",
    [
      dict(prompt=pool[i]["prompt"], completion=said[i], label=bool(label[i]))
      for i in taken
    ],
    dtype="float64",
    loss_type=name,
    **HOW,
  )
  names = [n for n in runs.THUMB if n != "kl" or name == "kto"]
  found = runs.gaps(ours(alone, rows, loss), theirs, names)
  runs.within(found, LIMITS, 1e-5)
