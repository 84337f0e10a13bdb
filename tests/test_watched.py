"""What is measured while a policy trains: the numbers, their names, their cost.

The job here is a `Job` whose data are a few made-up rows; the model, the pass
over its rows and the losses are the real ones.
"""

import functools
import json

import jax
import jobs
import numpy as np
import pools
import pytest
import test_flops

from configs import common
from jaxalign import pipeline
from jaxalign.core import artifacts, disk
from jaxalign.core.errors import ConfigError
from jaxalign.data import recipe
from jaxalign.data import tokens as tokens_lib
from jaxalign.eval import while_training
from jaxalign.model import decoder
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Arm, arm_folder, Job, sft_sizes
from jaxalign.train import feed, losses
from jaxalign.train.losses import bind, LOSSES
from jaxalign.train.training_cost import training_cost

MODEL = decoder.ModelConfig(
  layers=1,
  width=8,
  heads=2,
  kv_heads=2,
  head_size=4,
  ff=8,
  vocab=16,
  context=12,
)
N = 9
LABEL = [i % 3 == 0 for i in range(N)]

pytestmark = pytest.mark.usefixtures("quick_compiles")


def params_of(mesh, seed):
  rng = np.random.default_rng(seed)
  return {
    n: jax.device_put(
      np.float32(rng.normal(1.0 if p.scale == 0 else 0.0, 0.3, p.shape)),
      x.sharding,
    )
    for (n, p), x in zip(
      decoder.table(MODEL).items(), decoder.abstract(MODEL, mesh).values()
    )
  }


def job_of(mesh, loss="dpo", label=LABEL):
  """N held-out pairs, or answers, of a policy like MODEL."""
  job = Job.__new__(Job)
  job.mesh, job.c = mesh, common.base("tiny")
  job.c.loss.name, job.c.loss.kwargs = loss, {}
  job.c.train.update(eval_every=1, eval_rows=N)
  job.loss = bind(LOSSES[loss], loss, {})
  job.model = job.policy = MODEL
  job.reference = params_of(mesh, 0)
  rows = pools.pairs_of_tokens(np.random.default_rng(1), N, 16, (2, 6), (1, 6))
  if job.kind == "unpaired":
    rows = tokens_lib.take_rows(rows, np.arange(N) * 2)
  columns = dict(id=[f"r{i}" for i in range(N)], label=label)
  job.tokens = lambda split: rows
  job.column = lambda split, name: columns[name]
  return job


def answers_of(job):
  return while_training._answers(job, "held_out", np.arange(N))


@functools.cache
def table():
  """(params, tokens [b, L]) -> logits; padding is behind what sees it."""
  return jax.jit(
    lambda params, tokens: decoder.logits(
      decoder.forward(params, tokens, MODEL), decoder.head(params, MODEL)
    )
  )


def sums(job, params):
  """[N, R] nats of the rows' answers, by the whole table of logits."""
  rows = job.tokens("")
  ids = np.zeros((len(rows.start), MODEL.context), np.int32)
  lengths = tokens_lib.row_lengths(rows)
  for i, n in enumerate(lengths):
    ids[i, :n] = rows.ids[rows.offsets[i] : rows.offsets[i + 1]]
  x = np.float64(jax.device_get(table()(params, ids)))
  x -= np.log(np.exp(x).sum(-1, keepdims=True))
  return np.array(
    [
      sum(x[i, k - 1, ids[i, k]] for k in range(start, n))
      for i, (start, n) in enumerate(zip(rows.start, lengths))
    ]
  ).reshape(N, -1)


def ratios(job, params):
  return sums(job, params) - sums(job, job.reference)


@pytest.fixture
def alone():
  from jaxalign.core import sharding

  m = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  with jax.set_mesh(m):
    yield m


def test_pairs_are_measured_with_ties_apart(alone):
  job = job_of(alone)
  measure = answers_of(job).of
  before = measure(job.reference)
  # As training's first line: a tie is no win.
  assert before["accuracy"] == before["margin"] == before["chosen_drift"] == 0
  assert before["ties"] == 1 and before["loss"] == pytest.approx(np.log(2))
  policy = params_of(alone, 3)
  found, r = measure(policy), ratios(job, policy)
  gap = r[:, 0] - r[:, 1]
  assert 0 < (gap > 0).sum() < N
  assert found["accuracy"] == (gap > 0).mean() and found["ties"] == 0
  wanted = dict(
    margin=gap.mean(),
    chosen_drift=r[:, 0].mean(),
    loss=np.log1p(np.exp(-0.1 * gap)).mean(),
  )
  for name, value in wanted.items():
    assert found[name] == pytest.approx(value, abs=1e-4), name


def test_unpaired_are_every_liked_answer_beside_every_disliked_one(alone):
  job = job_of(alone, "kto")
  policy = params_of(alone, 3)
  found, r = answers_of(job).of(policy), ratios(job, policy)[:, 0]
  up = [x for x, liked in zip(r, LABEL) if liked]
  down = [x for x, liked in zip(r, LABEL) if not liked]
  pairs = [(a, b) for a in up for b in down]
  assert len(pairs) == 18
  assert (
    found["accuracy"] == pytest.approx(np.mean([a > b for a, b in pairs]))
    and found["ties"] == 0
  )
  assert found["margin"] == pytest.approx(
    np.mean([a - b for a, b in pairs]), abs=1e-4
  )
  assert found["chosen_drift"] == pytest.approx(np.mean(up), abs=1e-4)


def test_held_out_pairs_of_unpaired_are_pairs(alone):
  """A pool's pairs are split for a loss of unpaired, the held-out ones are not;
  the loss is that of both answers by themselves."""
  job, pairs = job_of(alone, "apo_zero_unpaired"), job_of(alone)
  job.tokens, job.column = (
    pairs.tokens,
    lambda split, name: dict(id=[f"r{i}" for i in range(N)])[name],
  )
  policy = params_of(alone, 3)
  found, both = answers_of(job).of(policy), answers_of(pairs).of(policy)
  assert found.pop("loss") != both.pop("loss") and found == both
  r = 0.1 * ratios(job, policy)
  each = np.stack([1 / (1 + np.exp(r[:, 0])), 1 / (1 + np.exp(-r[:, 1]))])
  assert answers_of(job).of(policy)["loss"] == pytest.approx(
    each.mean(), abs=1e-5
  )


def test_the_share_in_order_by_hand_and_of_every_pair():
  # 2 over 1, 2 = 2, 2 under 3; 5 over all.
  assert while_training.ordered(
    np.array([2.0, 5.0]), np.array([1.0, 2.0, 3.0])
  ) == (4 / 6, 1 / 6)
  rng = np.random.default_rng(0)
  up, down = rng.integers(0, 9, 40) / 2, rng.integers(0, 7, 25) / 2
  assert while_training.ordered(up, down) == pytest.approx(
    (
      np.mean([a > b for a in up for b in down]),
      np.mean([a == b for a in up for b in down]),
    )
  )


@pytest.mark.parametrize(
  "name", [n for n, f in LOSSES.items() if f.kind != "rows"]
)
def test_what_is_said_to_be_measured_is(alone, name):
  job = job_of(alone, name)
  found = answers_of(job).of(params_of(alone, 3))
  assert set(found) == set(while_training.measured(job.c)["held_out"])
  assert all(np.isfinite(x) for x in found.values())


def test_a_sum_with_imitation_has_a_value_on_a_set(alone):
  """Its mean count is the set's own."""
  job = job_of(alone)
  job.c.loss.name = "dpo+0.2*sft_tokens"
  assert "loss" in while_training.measured(job.c)["rest"]
  job.loss = losses.loss_of(job.c)
  policy = params_of(alone, 3)
  found = answers_of(job).of(policy)
  counts = (tokens_lib.row_lengths(job.tokens("")) - job.tokens("").start)[::2]
  gap = ratios(job, policy) @ np.array([1.0, -1.0])
  wanted = (
    np.log1p(np.exp(-0.1 * gap)).mean()
    - 0.2 * sums(job, policy)[:, 0].sum() / counts.sum()
  )
  assert found["loss"] == pytest.approx(wanted, abs=1e-4)


def test_a_best_that_one_label_cannot_have_is_named_before_training(alone):
  job = job_of(alone, "kto", label=[True] * N)
  assert set(answers_of(job).of(job.reference)) == {"chosen_drift"}
  job.c.train.best = "held_out/accuracy"
  with pytest.raises(
    ConfigError, match="'held_out' has 9 liked of 9; set config.train.best"
  ):
    answers_of(job)


def test_what_evaluations_take(alone):
  """By hand: the policy's pass each time, the reference's once."""
  job = job_of(alone)
  one = sum(
    test_flops.by_hand(MODEL, n, n * n, n)
    for n in tokens_lib.row_lengths(job.tokens("")).tolist()
  )
  measures = dict(held_out=answers_of(job))
  line = lambda **more: (
    {"step": 0, "train/loss": 1.0}
    | {f"eval/{n.replace('_of_', '/')}": x for n, x in more.items()}
  )
  lines = [
    line(),
    line(held_out_of_margin=1.0, held_out_of_ties=0.0),
    line(rest_of_margin=1.0),
    line(held_out_of_margin=2.0),
  ]
  assert while_training.evaluation_cost(measures, lines) == artifacts.Cost(
    3 * one, 3 * len(job.tokens("").ids)
  )
  assert while_training.evaluation_cost(measures, lines[:1]) == artifacts.Cost()
  assert while_training.evaluation_cost({}, lines) == artifacts.Cost()


def test_an_arm_of_all_rows_has_no_rest(alone, tmp_path):
  """A study's other arms are measured on theirs: it must not end here."""
  job, arm = job_of(alone), Arm("random", 1.0, 0)
  job.workdir = tmp_path
  job.c.train.eval_sets = ("kept", "rest")
  kept = arm_folder(job, arm) / "selected.npy"
  keep = lambda n: disk.write_array(kept, np.arange(n))
  keep(N - 2)
  assert list(while_training.measures_of(job, arm)) == ["kept", "rest"]
  keep(N)
  assert list(while_training.measures_of(job, arm)) == ["kept"]
  job.c.train.best = "rest/margin"
  with pytest.raises(ConfigError, match="'rest' has no rows"):
    while_training.measures_of(job, arm)


def test_what_is_planned_for_evaluations():
  c = common.base("tiny")
  rows = dict(held_out=40, kept=16, rest=144)
  two, split = dict(held_out=2, pool=2), dict(held_out=2, pool=1)
  assert while_training.planned_rows(c, 9, rows, two) == dict(
    held_out=0, pool=0
  )
  c.train.update(
    eval_every=4,
    eval_rows=20,
    eval_prompts=5,
    eval_sets=("held_out", "kept", "rest", "generations"),
  )
  # After 4, 8 and 9 updates: three of the policy and one of the reference;
  # answers are written, and scored by both, three times.
  assert while_training.planned_rows(c, 9, rows, two) == dict(
    held_out=4 * 20 * 2 + 3 * 3 * 5, pool=4 * (16 + 20) * 2
  )
  assert while_training.planned_rows(c, 9, rows, split) == dict(
    held_out=4 * 20 * 2 + 3 * 3 * 5, pool=4 * (16 + 20)
  )


@pytest.mark.slow
@pytest.mark.parametrize("config", ["dpo_sub.py:tiny", "kto_sub.py:tiny"])
def test_a_job_that_watches_everything(tmp_path, config):
  """What is logged is what was said, and the card and the ledger have it."""
  flags = (
    "compare=()",
    "train.eval_every=2",
    "train.eval_rows=24",
    "train.eval_prompts=6",
    "train.reference=online",
    "train.best=generations/kl",
    "train.batch_size=16",
    "train.eval_sets=('held_out','kept','rest','generations')",
  )
  ended = jobs.run(tmp_path, *flags, config=config)
  assert ended.code == 0, ended
  arm = next((tmp_path / "runs").iterdir())
  lines = jobs.lines(arm / "metrics.jsonl")
  found = [x for x in lines if "eval/generations/kl" in x]
  updates = len(lines)
  assert [x["step"] for x in found] == [1, updates - 1] and updates in (3, 4)
  c = common.base("tiny" + (",kto" if "kto" in config else ""))
  recipe.settle(c)
  known = while_training.measured(c)
  for name in while_training.SETS:
    have = {n.split("/")[2] for n in found[0] if n.startswith(f"eval/{name}/")}
    assert have - {"flops"} == set(known[name])
  # The best weights hang on how answers are written.
  fields = artifacts.read_record(arm, "align").fields
  assert fields["eval.temperature"] == 1.0 and fields["eval.new_tokens"] == 8
  refused = jobs.run(tmp_path, *flags, "eval.temperature=0.5", config=config)
  assert refused.code == 64 and "eval.temperature was 1.0" in refused.err
  # Training, with the reference's passes; and what watching took.
  card = artifacts.read_record(arm, "align")
  job = pipeline.make_job(common.base("tiny"), None, tmp_path)
  if "kto" in config:
    job.c = c
  tokens, m = job.tokens("pool"), sft_sizes(job.c, job.tokenizer.vocab_size)
  ids = disk.read_json(arm / "ref_ids.json")
  place = {n: i for i, n in enumerate(job.column("pool", "id"))}
  each = len(tokens.start) // len(place)
  rows = feed.TrainRows(
    ids,
    tokens,
    np.array([place[n] for n in ids])[:, None] * each + np.arange(each),
    None,
    None,
  )
  batching = feed.Batching(16, 0, context=32)
  if each == 1:
    other = feed.make_mismatched(rows, batching, updates)
    rows = rows._replace(mismatched=feed.MismatchedRows(other, None))
  train, _ = training_cost(m, rows, batching, updates, online=True)
  said = round(sum(x["eval/generations/flops"] for x in found))
  lengths = tokens_lib.row_lengths(tokens)
  held = tokens_lib.row_lengths(job.tokens("held_out"))
  of = lambda sizes: sum(decoder_flops(m, int(n)) for n in sizes)
  place = np.array([place[n] for n in ids])
  kept = np.sort(place)[:24]
  rest = np.setdiff1d(np.arange(len(lengths) // each), place)[:24]
  scored = of(held[: 24 * 2]) + sum(
    of(lengths[(x[:, None] * each + np.arange(each)).reshape(-1)])
    for x in (kept, rest)
  )
  assert card.result["evaluating"] == said + 3 * scored
  assert card.cost.flops == train + said + 3 * scored
  assert said > 0
  # The plan says about as much of the whole stage.
  ledger = json.loads((tmp_path / "summary.json").read_text())["ledger"]
  (line,) = [x for x in ledger["stages"] if x["stage"] == "align"]
  assert line["predicted_flops"] == pytest.approx(line["flops"], rel=0.2)
  # What an arm costs beside another is without its evaluations.
  assert ledger["arms"][arm.name]["align"] == train
