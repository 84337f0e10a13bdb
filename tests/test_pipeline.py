"""A whole tiny job: its order, its artifacts, and what depends on what."""

import json
import math

import jobs
import numpy as np
import pytest
import safetensors.numpy
import test_report

from configs import common
from jaxalign.cli import main
from jaxalign.core import artifacts, disk
from jaxalign.data import prepare, tables
from jaxalign.data import world as world_lib
from jaxalign.embed import store
from jaxalign.model import hf
from jaxalign.report import study_page

ISA, RANDOM = "isa-0.1-seed0", "random-0.1-seed0"
SHARED = ["data", "sft", "embed", "mixture", "baseline"]
ARM = ["select", "selection_report", "ref_logps", "align", "evaluate", "export"]
STORED = {"logp": "ref_sum", "count": "ref_count"}
PAGE = ["report"]  # of an arm; one over all arms follows


@pytest.fixture(scope="module")
def job():
  """The folder of a finished job, only read."""
  return jobs.finished()


def table(job, name):
  return tables.read_table(job / name)


def load(job, name):
  return jobs.load(job / name)


EVERY = [*SHARED, *ARM]
TRAINING = ["align", "evaluate", "export"]
CHANGED = {  # a knob -> the stages of the isa arm that it changes
  "data.seed=1": EVERY,
  "data.world.flips=0.1": EVERY,
  "model.vocab_size=500": EVERY,
  "model.context=31": EVERY,
  "sft.lr=0.1": EVERY[1:],
  "model.ff=32": EVERY[1:],
  "embed.pooling=last": ["embed", "mixture", *ARM],
  "select.mixture.components=3": ["mixture", *ARM],
  "select.stability_seeds=0": ["mixture", *ARM],
  "select.order=magnitude": ARM,
  "select.pair_score=max": ARM,
  "seed=1": [],  # another arm, in a folder of its own
  "select.budget=0.2": [],
  "loss.kwargs.beta=0.9": TRAINING,
  "loss.kwargs.label_smoothing=0.1": TRAINING,
  "train.lr=0.1": TRAINING,
  "train.max_updates=3": TRAINING,
  "train.save_every=1": TRAINING,
  "train.batch_size=16": ARM,
  "eval.prompts=8": ["baseline", "evaluate"],
  "eval.temperature=0.5": ["baseline", "evaluate"],
  "compare=('all',)": [],
  "mesh.tensor=2": [],  # the same job on another machine
  "compile_cache=''": [],
  "profile.steps=(1,2)": [],
}


@pytest.mark.parametrize("knob", CHANGED)
def test_a_knob_changes_its_stages_and_no_other(job, monkeypatch, knob):
  """By their keys: nothing is computed here."""
  changed = {}

  def look(folder, stage, how, make):
    found = artifacts.read_record(folder, stage)
    fields = json.loads(json.dumps(how.fields))
    key = artifacts.key_of(stage, fields, how.inputs)
    same = found is not None and found.key == key
    changed[stage, folder.name] = found is not None and not same
    record = artifacts.given(stage, key)
    record.content = found.content if same else key
    return record

  monkeypatch.setattr(artifacts, "run_stage", look)
  monkeypatch.setattr(main, "study_text", stop)
  assert jobs.run(job, knob).code is None
  own = [
    s
    for (s, folder), other in changed.items()
    if other and folder in {*SHARED, ISA} and s not in PAGE
  ]
  assert own == CHANGED[knob]
  # A page is made from what is evaluated, and no knob of its own.
  if ("report", ISA) in changed:
    assert changed["report", ISA] == changed["evaluate", ISA]
  arms = "seed=1", "select.budget=0.2", "compare=('all',)"
  assert changed["report", job.name] == (knob in arms or "evaluate" in own)


def stop(*_):
  raise jobs.Stop


def test_the_stages_run_in_order(job):
  paths = job.rglob("records/*.json")
  paths = sorted(paths, key=lambda p: p.stat().st_mtime_ns)
  assert [p.stem for p in paths] == [*SHARED, *(*ARM, *PAGE) * 2, *PAGE]
  keys = {(p.parent.parent.name, p.stem): jobs.load(p) for p in paths}
  for (folder, stage), record in keys.items():
    for label, content in record["inputs"].items():  # each names what it read
      name, _, arm = label.partition(" of ")
      owner = arm or (folder if name in ARM else name)
      assert keys[owner, name]["content"] == content, (folder, stage, label)


def test_a_changed_knob_is_refused_then_redone(tmp_path):
  work = jobs.copy(tmp_path / "work")
  before = jobs.outcome(work)
  ended = jobs.run(work, "eval.temperature=0.5")
  assert ended.code == 64 and not jobs.did(ended)
  assert "eval.temperature was 1.0, now 0.5" in ended.err
  assert "baseline" in ended.err and "--redo" in ended.err
  assert jobs.outcome(work) == before
  ended = jobs.run(work, "eval.temperature=0.5", "--redo")
  assert ended.code == 0
  assert jobs.did(ended) == ["baseline", *["evaluate", "report"] * 2, "report"]
  # And back again, to the bytes there were.
  ended = jobs.run(work, "--redo")
  assert ended.code == 0 and not jobs.differences(before, jobs.outcome(work))


def test_arms_come_and_go_without_a_stage_twice(tmp_path):
  work = jobs.copy(tmp_path / "work")
  pages = {p: p.read_bytes() for p in work.glob("runs/*/report.html")}
  assert len(pages) == 2

  def run(stages, *knobs):
    ended = jobs.run(work, *knobs)
    assert ended.code == 0 and jobs.did(ended) == stages
    return ended

  run(PAGE, "compare=()")  # only the page over all is another
  assert RANDOM not in (work / "report.html").read_text()
  ended = run(PAGE, "select.sampler=random", "compare=()")
  assert "mixture:" not in ended.out  # a random arm needs none
  # An arm is the same whether it is the chosen one or another.
  run(PAGE, "select.sampler=random", "compare=('isa',)")
  run([*ARM, *PAGE, *PAGE], "select.budget=24", "compare=()")
  assert pages == {p: p.read_bytes() for p in pages}
  kept = [r["id"] for r in table(work, "runs/isa-24-seed0/subset.parquet")]
  small = [r["id"] for r in table(work, f"runs/{ISA}/subset.parquet")]
  assert len(kept) == 24 and kept[:16] == small  # best first


def test_the_isa_arm_kept_what_the_equation_ranks_first(job):
  """Khera et al. eq. 2-3 in NumPy: -u exp(u) a side, the sides added."""
  value = np.load(job / "shared/mixture/log_likelihood.npy")[0]
  u = (value - value.min()) / (value.max() - value.min())
  score = (-u * np.exp(u)).sum(axis=1)
  pool = table(job, "shared/data/pool.parquet")
  assert [r["id"] for r in pool] == sorted(r["id"] for r in pool)
  scores = table(job, f"runs/{ISA}/scores.parquet")
  np.testing.assert_allclose([s["score"] for s in scores], score, rtol=1e-12)
  best = [pool[i] for i in np.argsort(-score, kind="stable")[:16]]
  subset = table(job, f"runs/{ISA}/subset.parquet")
  for name in ("id", "prompt", "chosen"):
    assert [r[name] for r in subset] == [r[name] for r in best]
  assert [r["rank"] for r in subset] == list(range(16))
  kept = [s["id"] for s in scores if s["selected"]]
  assert kept == sorted(r["id"] for r in subset)
  assert sorted(s["rank"] for s in scores) == list(range(160))


def test_the_reference_numbers_are_those_of_the_embedding_pass(job):
  pool = [r["id"] for r in table(job, "shared/data/pool.parquet")]
  stored = {n: store.read(job / "shared/embed/store", n) for n in STORED}
  for arm in (ISA, RANDOM):
    ids = load(job, f"runs/{arm}/ref_ids.json")
    subset = table(job, f"runs/{arm}/subset.parquet")
    assert ids == [r["id"] for r in subset]
    rows = [pool.index(i) for i in ids]
    for name, file in STORED.items():
      found = np.load(job / f"runs/{arm}/{file}.npy")
      np.testing.assert_array_equal(found, stored[name][rows])
    # A subset has them where its sampler read that pass, as TRL calls them.
    names = [f"ref_{side}_logps" for side in ("chosen", "rejected")]
    assert (names[0] in subset[0]) == (arm == ISA)
    if arm == ISA:
      sums = np.float32([[r[n] for n in names] for r in subset])
      np.testing.assert_array_equal(sums, stored["logp"][rows])


def test_training_starts_at_the_reference(job):
  """At step 0 every margin is 0 and DPO's loss is log 2."""
  for arm in (ISA, RANDOM):
    first, *rest = jobs.lines(job / f"runs/{arm}/metrics.jsonl")
    loss, margins = first["train/preference_loss"], first["rewards/margins"]
    assert loss == pytest.approx(math.log(2), abs=2e-5)
    assert margins == pytest.approx(0, abs=2e-4)
    assert [x["step"] for x in (first, *rest)] == [0, 1, 2, 3]
    assert any(abs(x["rewards/margins"]) > 1e-4 for x in rest)


def test_the_export_holds_the_trained_parameters(job):
  before = jobs.parameters(job / "shared/sft")
  for arm in (ISA, RANDOM):
    folder = job / f"runs/{arm}/export"
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    params, gate = jobs.parameters(job / f"runs/{arm}"), "mlp.gate_proj.weight"
    for name, wanted in (
      ("model.embed_tokens.weight", params["embed"]),
      (f"model.layers.0.{gate}", params["layers/w_gate"][0].T),
    ):
      np.testing.assert_array_equal(tensors[name], wanted)
    assert (before["embed"] != params["embed"]).any()  # it did train
    assert hf.read_config(folder, "float32", "none").width == 32


def test_pages_ask_only_for_what_a_job_writes(job):
  summary = load(job, "summary.json")
  with test_report.missing_keys() as missing:
    study_page.study_html(summary)
    study_page.arm_html(summary["arms"][0])
  # What only larger jobs have; of the baseline; by arm and by stage.
  absent = (
    "along details efficiency fit groups ranking prompts seeds ties title "
    "metrics rows updates mixture stability sft target flops held "
    "predicted_flops predicted_seconds"
  )
  assert missing <= {*absent.split(), ISA, RANDOM}


def test_the_pages_and_the_summary(job):
  summary = load(job, "summary.json")
  assert [a["name"] for a in summary["arms"]] == [ISA, RANDOM]
  assert summary["command"].startswith("python -m jaxalign.main --config=")
  lines = summary["ledger"]["stages"]
  assert [(x["stage"], x["arm"]) for x in lines] == (
    [(s, "") for s in SHARED] + [(s, a) for a in (ISA, RANDOM) for s in ARM]
  )
  for name in ("flops", "tokens", "bytes"):
    assert summary["ledger"]["total"][name] == sum(x[name] for x in lines)
  assert all(x["seconds"] >= 0 for x in lines)
  # What choosing took is its arm's: eight flops a number of 320, and of
  # ISA's two fits; and memory beside what was predicted.
  spent = {(x["stage"], x["arm"]): x["flops"] for x in lines}
  assert spent["select", RANDOM] == 8 * 320 and spent["select", ISA] == 16 * 320
  arms = summary["ledger"]["arms"]
  assert arms[RANDOM]["select"] == 8 * 320
  assert arms[ISA]["select"] == (
    spent["embed", ""] + spent["mixture", ""] + 16 * 320
  )
  for x in lines:
    assert ("held" in x) == ("predicted_held" in x) == (x["stage"] == "select")
    if x["stage"] == "select":
      assert x["flops"] == x["predicted_flops"]
      assert 0 <= x["held"] < 2**30 and x["predicted_held"] > 0
      assert x["device"] is None and x["predicted_device"] == 0
  assert "Memory of selecting" in (job / "report.html").read_text()
  for path in (job / "report.html", *job.glob("runs/*/report.html")):
    text = path.read_text()
    assert ISA in text or RANDOM in text
    assert "NaN" not in text and "<script" not in text
  for arm in (ISA, RANDOM):
    measured = load(job, f"runs/{arm}/eval.json")
    assert 0 <= measured["win_vs_target"]["value"] <= 1
    assert measured["win_vs_target"]["n"] == 16
    assert measured["accuracy"]["n"] <= 40
    config = load(job, f"runs/{arm}/config.json")
    assert config["arm"]["sampler"] == arm.split("-")[0]


def test_no_prompt_is_in_two_splits(job):
  sft, pool, held_out = (
    {r["prompt"] for r in table(job, f"shared/data/{n}.parquet")}
    for n in ("sft", "pool", "held_out")
  )
  assert not (sft & pool or sft & held_out or pool & held_out)


def test_reference_numbers_of_other_rows_are_refused(tmp_path):
  """The one check between selection and training that reads ids."""
  work = jobs.copy(tmp_path / "work")
  folder = work / "runs" / ISA
  ids = load(folder, "ref_ids.json")
  disk.write_json(folder / "ref_ids.json", ids[::-1])
  record = artifacts.read_record(folder, "ref_logps")
  record.outputs["ref_ids.json"] = disk.digest(folder / "ref_ids.json")
  artifacts._write_record(folder, record)
  jobs.unfinish(work, ISA, "align")
  ended = jobs.run(work)
  assert ended.code == 65 and "names other rows" in ended.err
  assert "--redo" in ended.err


@pytest.mark.parametrize(
  "file, content, code, words",
  [
    ("config.json", None, 64, "has no config.json"),
    ("model.safetensors", None, 64, "model.safetensors"),
    ("model.safetensors", b"12345678", 65, "cut"),
    ("tokenizer.json", b"x", 64, "tokenizer.json"),
    ("tokenizer.model", b"x", 64, "SentencePiece"),
  ],
)
def test_a_checkpoint_that_cannot_be_read(
  job, tmp_path, file, content, code, words
):
  folder = tmp_path / "model"
  jobs.shutil.copytree(job / f"runs/{ISA}/export", folder)
  if content:
    (folder / file).write_bytes(content)
  else:
    (folder / file).unlink()
  if file == "tokenizer.model":
    (folder / "tokenizer.json").unlink()
  ended = jobs.run(tmp_path / "work", f"model.checkpoint={folder}")
  assert ended.code == code and words in ended.err, ended
  # The bytes of the weights are looked at when they are loaded.
  assert jobs.did(ended) == (["data", "embed"] if code == 65 else [])
  assert str(folder) in ended.err and ended.err.count("\n") == 1


def test_a_tokenizer_that_cannot_be_used_is_refused_first(
  job, tmp_path, shared
):
  """Not after hours of training: the export is the last stage."""
  folder = f"{shared}/tokenizers"
  ended = jobs.run(tmp_path, f"model.tokenizer={folder}/t5/sentencepiece.model")
  assert ended.code == 64 and "exported" in ended.err and not jobs.did(ended)
  assert "config.model.tokenizer" in ended.err
  ended = jobs.run(
    tmp_path,
    f"model.checkpoint={job}/runs/{ISA}/export",
    f"model.tokenizer={folder}/mistral-v1/tokenizer.model",
  )
  assert ended.code == 64 and "32000 pieces" in ended.err
  assert not jobs.did(ended)


@pytest.mark.parametrize(
  "flags, words",
  [
    (
      ("model.context=64", "eval.new_tokens=8"),
      ("model.context=64", "the checkpoint's 32"),
    ),
    (("mesh.fsdp=2", "mesh.tensor=4"), ("config.mesh",)),
  ],
)
def test_a_checkpoint_of_other_sizes(job, tmp_path, flags, words):
  folder = job / f"runs/{ISA}/export"
  ended = jobs.run(tmp_path, f"model.checkpoint={folder}", *flags)
  assert ended.code == 64 and all(word in ended.err for word in words)


@pytest.mark.slow
def test_a_kto_job(tmp_path):
  """Pairs become unpaired rows; mismatched rows get their reference numbers."""
  flags = "train.batch_size=16", "compare=()"
  ended = jobs.run(tmp_path, *flags, config="kto_sub.py:tiny")
  assert ended.code == 0, ended
  assert "pairs split into 320 answers for kto" in ended.out
  folder = tmp_path / "runs" / ISA
  assert len(table(folder, "subset.parquet")) == 32
  assert np.load(folder / "mismatched_sum.npy").shape == (4 * 16,)
  # The classes weigh by what was kept, and a row's loss begins at half of that.
  up = sum(row["label"] for row in table(folder, "subset.parquet"))
  weight = max(1, (32 - up) / up), max(1, up / (32 - up) * 3 / 4)
  assert (
    f"{up} liked answers and {32 - up} disliked: a row of the first weighs "
    f"{weight[0]:.3f}, of the second {weight[1]:.3f}"
  ) in ended.out
  loss = jobs.lines(folder / "metrics.jsonl")[0]["train/preference_loss"]
  wanted = np.arange(17) * weight[0] + np.arange(16, -1, -1) * weight[1]
  assert np.abs(loss - wanted / 32).min() < 1e-5
  again = jobs.run(tmp_path, *flags, config="kto_sub.py:tiny")
  assert again.code == 0 and not jobs.did(again)


@pytest.mark.slow
def test_unpaired_of_one_label_end_in_a_whole_report(tmp_path):
  """Nothing can be ranked: accuracy has no pairs, and no JSON holds NaN."""
  rows = [
    dict(
      prompt=f"tell me of {i} ", completion=f"it is {i} and {i % 7}", label=True
    )
    for i in range(120)
  ]
  path = tmp_path / "x.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  ended = jobs.run(
    tmp_path / "work",
    f"data.source={path}",
    "compare=()",
    "select.budget=1.0",
    "train.batch_size=8",
    "data.seed=1",
    config="kto_sub.py:tiny",
  )
  assert ended.code == 0, ended
  assert "are liked; kto(beta=0.3) will only push one way" in ended.out
  assert "all kept rows have the same label" in ended.out
  arm = next((tmp_path / "work/runs").iterdir())
  assert load(arm, "eval.json")["accuracy"]["n"] == 0
  assert (tmp_path / "work/report.html").exists()


@pytest.mark.slow
def test_a_file_of_pairs_without_a_known_truth(tmp_path):
  """No world: no win rate; accuracy, KL and samples are there."""
  path = jobs.write_pairs(tmp_path / "x.jsonl", 200)
  ended = jobs.run(
    tmp_path / "work", f"data.source={path}", "select.budget=0.2"
  )
  assert ended.code == 0, ended
  measured = load(tmp_path, "work/runs/isa-0.2-seed0/eval.json")
  assert "win_vs_target" not in measured and measured["accuracy"]["n"] > 10
  assert "held-out preference accuracy" in ended.out


@pytest.mark.slow
def test_a_mesh_with_two_axes_chooses_the_same_rows(job, tmp_path):
  """From one checkpoint, weights cut over heads too: the same bits."""
  flag = f"model.checkpoint={job}/runs/{ISA}/export"
  wanted = jobs.run(tmp_path / "8x1", flag, "compare=()")
  found = jobs.run(tmp_path / "4x2", flag, "compare=()", "mesh.tensor=2")
  assert wanted.code == found.code == 0
  names = "shared/embed/store/embedding.npy", "shared/baseline/samples.jsonl"
  for name in (*names, f"runs/{ISA}/subset.parquet"):
    one, two = ((tmp_path / w / name).read_bytes() for w in ("8x1", "4x2"))
    assert one == two, name
  one, two = (
    jobs.lines(tmp_path / w / f"runs/{ISA}/metrics.jsonl")
    for w in ("8x1", "4x2")
  )
  for a, b in zip(one, two, strict=True):
    assert a["train/loss"] == pytest.approx(b["train/loss"], abs=2e-5)


@pytest.mark.slow
def test_the_true_margin_is_an_oracle_and_says_so(tmp_path):
  ended = jobs.run(tmp_path, "select.sampler=external_margin", "compare=()")
  assert ended.code == 0, ended
  assert "it reads the world's true reward" in ended.out
  world = prepare.world_of(common.base("tiny"))
  rows = tables.read_table(tmp_path / "shared/data/pool.parquet")
  value = lambda row, side: world_lib.reward(world, row["prompt"], row[side])
  margin = np.array([value(r, "chosen") - value(r, "rejected") for r in rows])
  (folder,) = (tmp_path / "runs").iterdir()
  kept = set(tables.read_column(folder / "subset.parquet", "id"))
  inside = np.array([row["id"] in kept for row in rows])
  assert margin[inside].min() >= margin[~inside].max() > margin.min()
