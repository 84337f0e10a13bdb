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
from jaxalign.core import artifacts, disk, sharding
from jaxalign.core.errors import ConfigError
from jaxalign.data import recipe
from jaxalign.data import tokens as tokens_lib
from jaxalign.eval import while_training
from jaxalign.model import decoder
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Arm, arm_folder, Job, sizes
from jaxalign.train import feed, losses
from jaxalign.train.losses import bind, LOSSES
from jaxalign.train.training_cost import training_cost

MODEL = decoder.ModelConfig(
  *(1, 8, 2, 2, 4, 8),  # layers, width, heads, kv_heads, head_size, ff
  vocab=16,
  context=12,
)
N = 9
LABEL = [i % 3 == 0 for i in range(N)]

pytestmark = pytest.mark.usefixtures("quick_compiles")


def params_of(mesh, seed):
  rng = np.random.default_rng(seed)
  center = lambda p: 1.0 if p.scale == 0 else 0.0
  draw = lambda p: np.float32(rng.normal(center(p), 0.3, p.shape))
  params = {n: draw(p) for n, p in decoder.table(MODEL).items()}
  where = {n: x.sharding for n, x in decoder.abstract(MODEL, mesh).items()}
  return jax.device_put(params, where)


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
  answer = lambda i: range(rows.start[i], lengths[i])
  nats = [sum(x[i, k - 1, ids[i, k]] for k in answer(i)) for i in range(len(x))]
  return np.array(nats).reshape(N, -1)


def ratios(job, params):
  return sums(job, params) - sums(job, job.reference)


@pytest.fixture
def alone():
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
  got, r = measure(policy), ratios(job, policy)
  gap = r[:, 0] - r[:, 1]
  assert 0 < (gap > 0).sum() < N
  assert got["accuracy"] == (gap > 0).mean() and got["ties"] == 0
  wanted = dict(
    margin=gap.mean(),
    chosen_drift=r[:, 0].mean(),
    loss=np.log1p(np.exp(-0.1 * gap)).mean(),
  )
  for name, value in wanted.items():
    assert got[name] == pytest.approx(value, abs=1e-4), name


def test_unpaired_are_every_liked_answer_with_every_disliked_one(alone):
  job = job_of(alone, "kto")
  policy = params_of(alone, 3)
  got, r = answers_of(job).of(policy), ratios(job, policy)[:, 0]
  up, down = r[LABEL], r[~np.array(LABEL)]
  gap = up[:, None] - down
  assert gap.size == 18
  assert got["accuracy"] == pytest.approx((gap > 0).mean()) and not got["ties"]
  assert got["margin"] == pytest.approx(gap.mean(), abs=1e-4)
  assert got["chosen_drift"] == pytest.approx(up.mean(), abs=1e-4)


def test_held_out_pairs_of_unpaired_are_pairs(alone):
  """A pool's pairs are split for a loss of unpaired, the held-out ones are not;
  the loss is that of both answers by themselves."""
  job, pairs = job_of(alone, "apo_zero_unpaired"), job_of(alone)
  ids = dict(id=[f"r{i}" for i in range(N)])
  job.tokens, job.column = pairs.tokens, lambda split, name: ids[name]
  policy = params_of(alone, 3)
  got, both = answers_of(job).of(policy), answers_of(pairs).of(policy)
  loss = got.pop("loss")
  assert loss != both.pop("loss") and got == both
  r = 0.1 * ratios(job, policy)
  each = np.stack([1 / (1 + np.exp(r[:, 0])), 1 / (1 + np.exp(-r[:, 1]))])
  assert loss == pytest.approx(each.mean(), abs=1e-5)


def test_the_fraction_in_order_by_hand_and_of_every_pair():
  # 2 over 1, 2 = 2, 2 under 3; 5 over all.
  two, three = np.array([2.0, 5.0]), np.array([1.0, 2.0, 3.0])
  assert while_training.ordered(two, three) == (4 / 6, 1 / 6)
  rng = np.random.default_rng(0)
  up, down = rng.integers(0, 9, 40) / 2, rng.integers(0, 7, 25) / 2
  gap = up[:, None] - down
  wanted = ((gap > 0).mean(), (gap == 0).mean())
  assert while_training.ordered(up, down) == pytest.approx(wanted)


@pytest.mark.parametrize(
  "name", [n for n, f in LOSSES.items() if f.kind != "rows"]
)
def test_what_is_measured_has_the_names_that_a_config_knows(alone, name):
  job = job_of(alone, name)
  got = answers_of(job).of(params_of(alone, 3))
  assert set(got) == set(while_training.measured(job.c)["held_out"])
  assert all(np.isfinite(x) for x in got.values())


def test_a_sum_with_imitation_has_a_value_on_a_set(alone):
  """Its mean count is the set's own."""
  job = job_of(alone)
  job.c.loss.name = "dpo+0.2*sft_tokens"
  assert "loss" in while_training.measured(job.c)["rest"]
  job.loss = losses.loss_of(job.c)
  policy = params_of(alone, 3)
  got = answers_of(job).of(policy)
  counts = (tokens_lib.row_lengths(job.tokens("")) - job.tokens("").start)[::2]
  gap = ratios(job, policy) @ np.array([1.0, -1.0])
  wanted = (
    np.log1p(np.exp(-0.1 * gap)).mean()
    - 0.2 * sums(job, policy)[:, 0].sum() / counts.sum()
  )
  assert got["loss"] == pytest.approx(wanted, abs=1e-4)


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
  lengths = tokens_lib.row_lengths(job.tokens("")).tolist()
  one = sum(test_flops.by_hand(MODEL, n, n * n, n) for n in lengths)
  measures = dict(held_out=answers_of(job))
  lines = [
    {"step": 0, "train/loss": 1.0} | more
    for more in (
      {},
      {"eval/held_out/margin": 1.0, "eval/held_out/ties": 0.0},
      {"eval/rest/margin": 1.0},
      {"eval/held_out/margin": 2.0},
    )
  ]
  cost, none = while_training.evaluation_cost, artifacts.Cost()
  passes = artifacts.Cost(3 * one, 3 * len(job.tokens("").ids))
  assert cost(measures, lines) == passes
  assert cost(measures, lines[:1]) == none == cost({}, lines)


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


@pytest.mark.parametrize("of_pool", [2, 1])
def test_what_is_planned_for_evaluations(of_pool):
  """After 4, 8 and 9 updates: three of the policy and one of the reference;
  answers are written, and scored by both, three times."""
  c = common.base("tiny")
  rows = dict(held_out=40, kept=16, rest=144)
  each = dict(held_out=2, pool=of_pool)
  planned = lambda: while_training.planned_rows(c, 9, rows, each)
  assert planned() == dict(held_out=0, pool=0)
  c.train.update(eval_every=4, eval_rows=20, eval_prompts=5)
  c.train.eval_sets = while_training.SETS
  held_out, pool = 4 * 20 * 2 + 3 * 3 * 5, 4 * (16 + 20) * of_pool
  assert planned() == dict(held_out=held_out, pool=pool)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["dpo_sub.py:tiny", "kto_sub.py:tiny"])
def test_a_job_that_evaluates_everything(tmp_path, config):
  """What is logged is what was promised; the record and the ledger have it."""
  flags = (
    *("compare=()", "train.eval_every=2", "train.eval_rows=24"),
    *("train.eval_prompts=6", "train.reference=online"),
    *("train.best=generations/kl", "train.batch_size=16"),
    "train.eval_sets=('held_out','kept','rest','generations')",
  )
  ended = jobs.run(tmp_path, *flags, config=config)
  assert ended.code == 0, ended
  arm = next((tmp_path / "runs").iterdir())
  lines = jobs.lines(arm / "metrics.jsonl")
  evaluated = [x for x in lines if "eval/generations/kl" in x]
  updates = len(lines)
  assert [x["step"] for x in evaluated] == [1, updates - 1]
  assert updates in (3, 4)
  c = common.base("tiny" + (",kto" if "kto" in config else ""))
  recipe.settle(c)
  known = while_training.measured(c)
  for name in while_training.SETS:
    prefix = f"eval/{name}/"
    have = {n.removeprefix(prefix) for n in evaluated[0] if prefix in n}
    assert have - {"flops"} == set(known[name])
  # The best weights hang on how answers are written.
  record = artifacts.read_record(arm, "align")
  assert record.fields["eval.temperature"] == 1.0
  assert record.fields["eval.new_tokens"] == 8
  refused = jobs.run(tmp_path, *flags, "eval.temperature=0.5", config=config)
  assert refused.code == 64 and "eval.temperature was 1.0" in refused.err
  # Training, with the reference's passes; and the evaluations.
  job = pipeline.make_job(c, None, tmp_path)
  tokens, m = job.tokens("pool"), sizes(job.c, job.tokenizer.vocab_size)
  ids = disk.read_json(arm / "ref_ids.json")
  number = {n: i for i, n in enumerate(job.column("pool", "id"))}
  kept = np.array([number[n] for n in ids])
  each = len(tokens.start) // len(number)
  answers = lambda rows: rows[:, None] * each + np.arange(each)
  rows = feed.TrainRows(ids, tokens, answers(kept), None, None)
  batching = feed.Batching(16, 0, context=32)
  if each == 1:
    other = feed.make_mismatched(rows, batching, updates)
    rows = rows._replace(mismatched=feed.MismatchedRows(other, None))
  train, _ = training_cost(m, rows, batching, updates, online=True)
  written = round(sum(x["eval/generations/flops"] for x in evaluated))
  assert written > 0
  lengths = tokens_lib.row_lengths(tokens)
  held = tokens_lib.row_lengths(job.tokens("held_out"))
  of = lambda sizes: sum(decoder_flops(m, int(n)) for n in sizes)
  rest = np.setdiff1d(np.arange(len(number)), kept)
  some = [answers(x[:24]).reshape(-1) for x in (np.sort(kept), rest)]
  scored = of(held[: 24 * 2]) + sum(of(lengths[x]) for x in some)
  assert record.result["evaluating"] == written + 3 * scored
  assert record.cost.flops == train + written + 3 * scored
  # The plan says about as much of the whole stage.
  ledger = json.loads((tmp_path / "summary.json").read_text())["ledger"]
  (line,) = [x for x in ledger["stages"] if x["stage"] == "align"]
  assert line["predicted_flops"] == pytest.approx(line["flops"], rel=0.2)
  # The cost of an arm on its own is without its evaluations.
  assert ledger["arms"][arm.name]["align"] == train
