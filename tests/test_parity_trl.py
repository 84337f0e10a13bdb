"""TRL 1.16: the same losses on the same log-probs, and the same five steps."""

import collections
import functools
import types

import flat
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.data import batches, tokenizer
from jaxalign.data import world as worlds
from jaxalign.data.encode import encode_texts
from jaxalign.embed import passes
from jaxalign.model import decoder, hf
from jaxalign.train import feed, optim
from jaxalign.train import step as steps
from jaxalign.train.batch import Logps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import LOSSES
from jaxalign.train.metrics import divide, sums_and_counts

# torch, transformers and trl warn of their own futures.
pytestmark = [
  pytest.mark.filterwarnings("ignore"),
  pytest.mark.usefixtures("quick_compiles"),
]

BETA, BATCH, STEPS = 0.5, 4, 5


@pytest.fixture
def trl():
  pytest.importorskip("torch")
  return pytest.importorskip("trl")


# TRL's own loss code, on log-probs that we choose.


def trainer_of(**more):
  """What `_compute_loss` reads of its trainer; one process, no model."""
  import torch

  same = lambda x: x
  return types.SimpleNamespace(
    model=types.SimpleNamespace(training=True),
    beta=BETA,
    accelerator=types.SimpleNamespace(
      device=torch.device("cpu"), gather=same, gather_for_metrics=same
    ),
    aux_loss_enabled=False,
    precompute_ref_logps=True,
    _tp_size=1,
    _total_train_tokens=0,
    use_weighting=False,
    _metrics={"train": collections.defaultdict(list)},
    **more,
  )


def model_of(policy):
  """A "model" whose rows have these summed log-probs, over three tokens."""
  import torch

  share = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)

  def call(**kwargs):
    each = torch.tensor(policy, dtype=torch.float64)[:, None] * share[None, :]
    zero = torch.zeros_like(each)
    return types.SimpleNamespace(
      log_probs=each, entropy=zero, mean_logits=zero, is_top1=zero.bool()
    )

  return call


def inputs_of(rows):
  import torch

  ids = torch.ones((rows, 4), dtype=torch.long)
  mask = torch.tensor([[0, 1, 1, 1]] * rows)
  return dict(
    input_ids=ids, attention_mask=torch.ones_like(ids), completion_mask=mask
  )


def as_logps(x):
  return Logps(jnp.float32(x), jnp.full(np.shape(x), 3.0))


def random_pairs(spread):
  rng = np.random.default_rng(0)
  policy = rng.normal(-40, 9, (32, 2))
  return policy, policy + rng.normal(0, spread, (32, 2))


@pytest.mark.parametrize("spread", [0.0, 3.0, 300.0])
def test_dpo_on_the_same_log_probs(trl, spread):
  import torch

  policy, ref = random_pairs(spread)
  trainer = trainer_of(
    ld_alpha=None,
    f_divergence_type="reverse_kl",
    loss_types=["sigmoid"],
    loss_weights=[1.0],
    label_smoothing=0.0,
  )
  flat = policy.T.reshape(-1)  # all chosen, then all rejected
  theirs = trl.DPOTrainer._compute_loss(
    trainer,
    model_of(flat),
    inputs_of(64)
    | dict(
      ref_chosen_logps=torch.tensor(ref[:, 0]),
      ref_rejected_logps=torch.tensor(ref[:, 1]),
    ),
    False,
  )
  loss, metrics = LOSSES["dpo"](as_logps(policy), as_logps(ref), {}, beta=BETA)
  means = divide(sums_and_counts(metrics))
  assert float(loss.mean()) == pytest.approx(theirs.item(), rel=1e-5)
  for name in (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
  ):
    assert means[name] == pytest.approx(
      trainer._metrics["train"][name][0], rel=1e-4, abs=1e-5
    ), name


@pytest.mark.parametrize(
  "spread,kl", [(0.0, 0.0), (3.0, 1.7), (3.0, -2.0), (300.0, 9.0)]
)
def test_kto_on_the_same_log_probs(trl, spread, kl):
  import torch

  policy, ref = (x.reshape(-1) for x in random_pairs(spread))
  label = np.random.default_rng(2).random(64) < 0.4
  kl_logps = torch.tensor(policy + kl)
  trainer = trainer_of(
    calculate_KL=True,
    loss_type="kto",
    desirable_weight=1.3,
    undesirable_weight=0.7,
    _compute_kl_logps=lambda model, batch: kl_logps,
  )
  theirs = trl.KTOTrainer._compute_loss(
    trainer,
    model_of(policy),
    inputs_of(64)
    | dict(
      label=torch.tensor(label),
      ref_logps=torch.tensor(ref),
      ref_KL_logps=torch.tensor(policy),
    ),
    False,
  )
  loss, metrics = LOSSES["kto"](
    as_logps(policy[:, None]),
    as_logps(ref[:, None]),
    dict(label=jnp.array(label), z0=jnp.float32(max(0.0, kl))),
    beta=BETA,
    desirable=1.3,
    undesirable=0.7,
  )
  means = divide(sums_and_counts(metrics))
  assert float(loss.mean()) == pytest.approx(theirs.item(), rel=1e-5)
  for name in (
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "kl",
  ):
    assert means[name] == pytest.approx(
      trainer._metrics["train"][name][0], rel=1e-4, abs=1e-5
    ), name


# A real run: the same texts, weights, order, optimizer.


@functools.lru_cache
def data():
  knobs = dict(
    topics=6,
    clusters=3,
    arguments=3,
    argument_words=5,
    openers=3,
    closers=2,
    fillers=3,
    forms=3,
    corrupt=0.4,
    temperature=0.5,
    redundancy=0.0,
    flips=0.0,
    junk=0.0,
    sft_rows=30,
    pool_rows=30,
    held_out_rows=1,
  )
  world = worlds.build_world(knobs, 0)
  rows = worlds.generate_rows(world, 0)
  texts = [r["prompt"] + r["response"] for r in rows["sft"]]
  return rows["pool"], tokenizer.Tokenizer(
    tokenizer.train_tokenizer(texts, 400)
  )


MODEL = decoder.ModelConfig(
  layers=1,
  width=16,
  heads=4,
  kv_heads=2,
  head_size=4,
  ff=24,
  vocab=400,
  context=32,
  tied=False,
)


@pytest.fixture
def alone():
  m = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  with jax.set_mesh(m):
    yield m


def fresh(mesh):
  rng = np.random.default_rng(5)
  return {
    n: sharding.put(
      mesh,
      np.float32(rng.normal(1.0 if p.scale == 0 else 0.0, 0.2, p.shape)),
      *p.axes,
    )
    for n, p in decoder.table(MODEL).items()
  }


def our_run(mesh, rows, loss):
  """Metrics of each step, through the feed and the train step."""
  bound = functools.partial(LOSSES[loss], beta=BETA)
  bound.kind, bound.stats = LOSSES[loss].kind, LOSSES[loss].stats
  tx = optim.make_optimizer(clip=1.0, weight_decay=0.0, b2=0.999)
  train_step = steps.make_train_step(PRODUCERS["chunked"](MODEL, 8), bound, tx)
  batching = feed.Batching(BATCH, 7, context=32)
  batch_at = feed.Feed(mesh, rows, batching, lambda step: 5e-3).batch_at
  state, seen = steps.init_state(fresh(mesh), tx), []
  for step in range(STEPS):
    state, totals = train_step(state, batch_at(step))
    seen.append(divide(jax.device_get(totals)))
  return seen


def their_trainer(trl, folder, name, dataset, dtype="float32", **options):
  """TRL's trainer of the exported model, rows in their order."""
  import datasets
  import torch
  import transformers

  datasets.disable_progress_bars()
  config = getattr(trl, f"{name}Config")(
    output_dir=str(folder / "trl"),
    max_length=None,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    disable_tqdm=True,
    dataloader_pin_memory=False,
    train_sampling_strategy="sequential",
    seed=0,
    **options,
  )
  return getattr(trl, f"{name}Trainer")(
    model=transformers.AutoModelForCausalLM.from_pretrained(
      folder / "export", local_files_only=True, dtype=getattr(torch, dtype)
    ),
    processing_class=transformers.AutoTokenizer.from_pretrained(
      folder / "export", local_files_only=True
    ),
    args=config,
    train_dataset=datasets.Dataset.from_list(dataset),
  )


def their_run(trl, folder, name, dataset):
  """TRL's log, a line a step."""
  trainer = their_trainer(
    trl,
    folder,
    name,
    dataset,
    per_device_train_batch_size=BATCH,
    max_steps=STEPS,
    learning_rate=5e-3,
    lr_scheduler_type="constant",
    beta=BETA,
  )
  trainer.train()
  log = [x for x in trainer.state.log_history if "loss" in x]
  assert len(log) == STEPS
  return log, trainer.train_dataset


def compare(ours, theirs, names):
  for step, (a, b) in enumerate(zip(ours, theirs)):
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-3), step
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-3), step
    for name in names:
      assert a[name] == pytest.approx(b[name], rel=1e-3, abs=3e-3), (step, name)
  assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 0.03  # something was learnt


def order(n):
  """Rows as our steps take them, end to end."""
  return np.concatenate([batches.rows_at(s, n, BATCH, 7) for s in range(STEPS)])


def test_five_steps_of_dpo(trl, alone, tmp_path):
  pool, tok = data()
  hf.export_folder(tmp_path / "export", fresh(alone), MODEL, tok)
  prompts, chosen, rejected = (
    [r[k] for r in pool] for k in ("prompt", "chosen", "rejected")
  )
  tokens, _, refused = encode_texts(
    tok, prompts, dict(chosen=chosen, rejected=rejected), 32
  )
  assert not refused
  scores = passes.score_rows(
    alone, fresh(alone), MODEL, tokens, passes.PassOptions(8, 8)
  )
  n = len(pool)
  ours = our_run(
    alone, flat.train_rows(tokens, 2, scores.logp, scores.count), "dpo"
  )
  theirs, prepared = their_run(
    trl, tmp_path, "DPO", [pool[i] for i in order(n)]
  )
  # Token for token the same rows, BOS, boundary and EOS.
  for i, row in zip(order(n), prepared):
    for side, name in enumerate(("chosen", "rejected")):
      at = 2 * i + side
      ids = tokens.ids[tokens.offsets[at] : tokens.offsets[at + 1]].tolist()
      assert ids == row["prompt_ids"] + row[f"{name}_ids"]
      assert tokens.start[at] == len(row["prompt_ids"])
  compare(
    ours,
    theirs,
    (
      "rewards/chosen",
      "rewards/rejected",
      "rewards/margins",
      "rewards/accuracies",
      "logps/chosen",
      "logps/rejected",
    ),
  )


def test_five_steps_of_kto(trl, alone, tmp_path):
  """With TRL's choice of mismatched answers: the row before, in the batch."""
  pool, tok = data()
  hf.export_folder(tmp_path / "export", fresh(alone), MODEL, tok)
  n = len(pool)
  label = np.random.default_rng(1).random(n) < 0.5
  said = [r["chosen"] if up else r["rejected"] for r, up in zip(pool, label)]
  tokens = encode_texts(
    tok, [r["prompt"] for r in pool], dict(response=said), 32, "cut_answer"
  ).rows
  scores = passes.score_rows(
    alone, fresh(alone), MODEL, tokens, passes.PassOptions(8, 8)
  )
  before = np.roll(order(n).reshape(STEPS, BATCH), 1, axis=1).ravel()
  other = batches.mismatched(tokens, order(n), before, 32)
  other_ref = passes.score_rows(
    alone, fresh(alone), MODEL, other, passes.PassOptions(8, 8)
  ).logp
  ours = our_run(
    alone,
    flat.train_rows(
      tokens,
      1,
      scores.logp,
      scores.count,
      label=label,
      mismatched=feed.MismatchedRows(other, other_ref),
    ),
    "kto",
  )
  theirs, prepared = their_run(
    trl,
    tmp_path,
    "KTO",
    [
      dict(prompt=pool[i]["prompt"], completion=said[i], label=bool(label[i]))
      for i in order(n)
    ],
  )
  for k, row in enumerate(prepared):
    ids = other.ids[other.offsets[k] : other.offsets[k + 1]].tolist()
    assert ids == row["prompt_ids"] + row["KL_completion_ids"]
  names = ["kl"] + [
    f"{what}/{side}"
    for what in ("rewards", "logps")
    for side in ("chosen", "rejected")
  ]
  assert max(a["kl"] for a in ours) > 0.1
  for a, b in zip(ours, theirs):  # a batch of one class has no other side
    assert {n for n in names if n in a} == {n for n in names if n in b}
  compare(ours, theirs, [n for n in names if all(n in a for a in ours)])
