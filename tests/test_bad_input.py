"""Bad data, numbers that are not finite: counted, named, or an exit code."""

import gzip
import itertools
import json

import jobs
import numpy as np
import pytest
from rows import put, short_pair
import safetensors.numpy

from jaxalign.data import tables
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.embed import passes as embed
from jaxalign.model.job import Job
from jaxalign.train import feed

SMALL = (
  "data.split.sft=0.3 data.split.pool=0.5 data.split.held_out=0.2 "
  "select.budget=1.0 train.batch_size=8"
).split()
SPLITS = ("sft", "pool", "held_out")
PAIRS = [short_pair(i) for i in range(60)]


def answer(i, label):
  """A single answer with its label."""
  row = short_pair(i)
  return dict(prompt=row["prompt"], completion=row["chosen"], label=label)


def read_data(tmp_path, rows, *more, work="w", config="dpo_sub.py:tiny"):
  """Runs the data stage on rows or a file; (Ended, summary, refused rows)."""
  path, workdir = rows, tmp_path / work
  if isinstance(rows, list):
    path = put(tmp_path / "x.jsonl", rows)
  ended = jobs.run(workdir, f"data.source={path}", *SMALL, *more, config=config)
  if ended.code is not None:
    return ended, None, None
  folder = workdir / "shared/data"
  summary = json.loads((folder / "data_summary.json").read_text())
  return ended, summary, jobs.lines(folder / "rejected.jsonl")


@pytest.fixture(autouse=True)
def only_data(request, monkeypatch):
  """Jobs of this file end after the data stage, unless they are marked."""
  if "whole" not in request.fixturenames:
    jobs.only_data(monkeypatch)


@pytest.fixture
def whole():
  """Requests jobs that go on."""


# Files.

GZIP = gzip.compress(json.dumps(short_pair(0)).encode(), mtime=0)


@pytest.mark.parametrize(
  "source, data, code, words",
  [
    ("none.jsonl", None, 65, "none.jsonl is missing; set config.data.source"),
    ("x.jsonl", b"", 65, "is empty (0 bytes)"),
    ("x.jsonl.gz", GZIP[:-9], 65, "x.jsonl.gz is truncated"),
    ("ftp:x", None, 64, "unknown prefix 'ftp:'"),
    ("rows.txt", None, 64, "ends in none of .jsonl"),
    ("none-*.jsonl", None, 65, "matches no file; set config.data.source"),
  ],
)
def test_bad_files(tmp_path, source, data, code, words):
  if data is not None:
    put(tmp_path / source, data)
  source = source if ":" in source else str(tmp_path / source)
  ended, _, _ = read_data(tmp_path, source)
  assert ended.code == code and words in ended.err
  if data is None:
    assert "config.data.source" in ended.err
    assert not (tmp_path / "w/shared").exists() or code == 65


def test_a_changed_file_is_another_config(tmp_path):
  assert read_data(tmp_path, PAIRS)[0].code is None
  assert not jobs.did(read_data(tmp_path, PAIRS)[0])
  more = [*PAIRS, short_pair(60)]
  ended, _, _ = read_data(tmp_path, more)
  assert ended.code == 64 and "source_digest was" in ended.err
  ended, summary, _ = read_data(tmp_path, more, "--redo")
  assert ended.code is None and summary["seen"] == 61


# Rows.

BAD = {  # reason -> a row
  "malformed JSON": '{"prompt": "a", "chosen": ',
  "not an object": "[1, 2]",
  "missing field": short_pair(0, rejected=KeyError),
  "null": short_pair(0, chosen=None),
  "empty response": short_pair(0, chosen="  "),
  "empty prompt": short_pair(0, prompt=""),
  "not a string": short_pair(0, rejected=7),
  "chosen equals rejected": short_pair(0, chosen="same", rejected="same "),
  "lone surrogate": '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
}


def test_bad_rows_are_named_counted_and_skipped(tmp_path):
  long = "x" * 300
  odd = [short_pair(70, id="a"), short_pair(71, id="a"), short_pair(5)]
  odd.append(short_pair(72, chosen=long + "a", rejected=long + "b"))
  rows = [*PAIRS[:20], *BAD.values(), *PAIRS[20:], *odd]
  ended, summary, refused = read_data(tmp_path, rows)
  assert ended.code is None, ended
  path, line = str(tmp_path / "x.jsonl"), {x: i for i, x in enumerate(BAD, 21)}
  assert {r["reason"]: r["line"] for r in refused if r["line"] < 99} == line
  assert all(r["file"] == path and r["detail"] for r in refused)
  reasons = [r["reason"] for r in refused]
  counts = summary["refused_by_reason"]
  assert counts == {reason: reasons.count(reason) for reason in reasons}
  assert f"{len(rows)} rows" in ended.out
  assert all(f"{counts[reason]} {reason}" in ended.out for reason in BAD)
  assert "2 rows that share an id with another" in ended.out
  assert (summary["shared_ids"], summary["duplicates"]) == (2, 1)
  assert summary["refused"] == len(refused)
  assert summary["seen"] == summary["kept"] + summary["refused"] == len(rows)
  assert sum(summary["rows_by_split"].values()) == summary["kept"]


@pytest.mark.parametrize("reason", ["malformed JSON", "null"])
def test_a_bad_row_may_stop_the_job(tmp_path, reason):
  rows = [*PAIRS[:20], BAD[reason], *PAIRS[20:]]
  ended, _, _ = read_data(tmp_path, rows, "data.max_bad_fraction=0.0")
  assert ended.code == 65 and f"{tmp_path}/x.jsonl:21" in ended.err
  assert reason in ended.err and "config.data.max_bad_fraction" in ended.err


def test_too_many_bad_rows(tmp_path):
  rows = PAIRS[:40] + [short_pair(i, chosen="") for i in range(41)]
  ended, _, _ = read_data(tmp_path, rows)
  for words in (
    "41 of 81 rows refused",
    "empty response 41",
    f"{tmp_path}/x.jsonl:41",
    "config.data.max_bad_fraction",
    f"{tmp_path}/w/shared/data/rejected.jsonl names them all",
  ):
    assert ended.code == 65 and words in ended.err
  listed = jobs.lines(tmp_path / "w/shared/data/rejected.jsonl")
  assert [r["line"] for r in listed] == list(range(41, 82))
  assert {r["reason"] for r in listed} == {"empty response"}
  # With more of them allowed the same command goes on, and counts once.
  most = "data.max_bad_fraction=0.9"
  ended, summary, refused = read_data(tmp_path, rows, most)
  assert ended.code is None and summary["refused"] == len(refused) == 41


def test_the_worlds_rows_add_up(tmp_path):
  """Few words: prompts repeat, and one in two splits is left out of one."""
  few = [f"data.world.{x}" for x in ("arguments=1", "argument_words=2")]
  ended = jobs.run(tmp_path, *few, "data.world.topics=2")
  assert ended.code is None or "split" in ended.err
  few = [f"data.world.{x}" for x in ("arguments=1", "argument_words=10")]
  ended = jobs.run(tmp_path / "w", *few, "data.world.topics=8")
  assert ended.code is None, ended
  folder = tmp_path / "w/shared/data"
  summary = json.loads((folder / "data_summary.json").read_text())
  refused = jobs.lines(folder / "rejected.jsonl")
  assert summary["refused_by_reason"]["prompt of another split"] > 0
  assert summary["refused"] == len(refused)
  assert summary["seen"] == summary["kept"] + summary["refused"] == 400
  assert sum(summary["rows_by_split"].values()) == summary["kept"]
  paths = [folder / f"{name}.parquet" for name in SPLITS]
  prompts = [{*tables.read_column(path, "prompt")} for path in paths]
  assert not any(a & b for a, b in itertools.combinations(prompts, 2))


def test_a_killed_data_stage_counts_once(tmp_path, monkeypatch):
  """What an attempt that died left behind is not added to."""
  rows = [*PAIRS, short_pair(99, chosen="")]

  def die(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(tables, "write_rows", die)
    assert read_data(tmp_path, rows)[0].code == 130
  _, summary, refused = read_data(tmp_path, rows)
  assert len(refused) == summary["refused"] == 1


# Lengths.

LONG = " ".join(f"{k} of {3 * k}" for k in range(90))


def rows_cut(summary, *sides):
  """Rows cut at any of these sides, of all splits."""
  cut = [summary["truncation"][name]["rows_cut_by_side"] for name in SPLITS]
  return sum(by_side.get(side, 0) for by_side in cut for side in sides)


def test_a_question_is_never_cut_and_rows_too_long_are_counted(tmp_path):
  question = lambda i: "word " * 60 + f"tell me of {i} "
  rows = [short_pair(i, prompt=question(i)) for i in range(10)]
  rows += [short_pair(i, chosen=LONG) for i in range(10, 14)] + PAIRS[14:]
  drop, cut = "data.too_long=drop", "data.too_long=cut_answer"
  ended, summary, refused = read_data(tmp_path, rows, drop, work="v")
  assert ended.code is None and summary["refused_by_reason"] == {"too long": 14}
  assert {r["line"] for r in refused} == {*range(1, 15)}
  assert "too long for the context of 32 and left out" in ended.out
  assert "keeps 99 % whole" in ended.out
  ended, summary, refused = read_data(tmp_path, rows, work="t")  # "cut"
  assert ended.code is None and not refused
  assert rows_cut(summary, "prompt") >= 10
  ended, _, _ = read_data(tmp_path, rows, "data.too_long=error", work="u")
  assert ended.code == 65 and "config.data.too_long" in ended.err
  ended, summary, refused = read_data(tmp_path, rows, cut)
  assert ended.code is None
  assert summary["refused_by_reason"] == {"question too long": 10}
  assert rows_cut(summary, "chosen", "response") == 4
  job = Job.__new__(Job)
  job.shared = tmp_path / "w/shared"
  tokens, rows = job.tokens("pool"), job.rows("pool")
  assert np.diff(tokens.offsets).max() <= 32
  tok = load_tokenizer(tmp_path / "w/shared/data/tokenizer.model")
  for i, row in enumerate(rows):  # the question is there, whole
    ids = tokens.ids[tokens.offsets[2 * i] : tokens.offsets[2 * i + 1]]
    text = tok.decode([int(x) for x in ids])
    cut = tokens.cut[2 * i] > 0
    assert text == (row["prompt"] + row["chosen"])[: len(text)]
    assert len(text) > len(row["prompt"]) and ids[0] == tok.bos
    assert cut == (ids[-1] != tok.eos) == (len(row["chosen"]) > 200)


def test_pairs_that_truncation_makes_equal_are_refused(tmp_path):
  same = dict(chosen=LONG + " yes", rejected=LONG + " no")
  rows = [short_pair(i, **same) for i in range(20)]  # some are in the pool
  rows += [short_pair(i) for i in range(20, 80)]
  _, summary, refused = read_data(tmp_path, rows)
  reason = "identical after truncation"
  assert 0 < summary["refused_by_reason"][reason] == len(refused) <= 20
  assert {r["reason"] for r in refused} == {reason}
  assert {r["split"] for r in refused} <= {"pool", "held_out"}
  assert summary["seen"] == summary["kept"] + len(refused) == 80
  assert sum(summary["rows_by_split"].values()) == summary["kept"]
  # Those of the sft split are imitated as far as they go.
  cut = summary["truncation"]["sft"]["rows_cut_by_side"]
  assert cut["response"] == 20 - len(refused)


def test_too_few_rows_for_three_splits(tmp_path):
  ended, _, _ = read_data(tmp_path, PAIRS[:2])
  assert ended.code == 65 and "split" in ended.err and "is empty" in ended.err
  assert "config.data.split" in ended.err


# Single answers.

KTO = "kto_sub.py:tiny"


def test_unpaired_with_a_pair_loss(tmp_path):
  rows = [answer(i, i % 2) for i in range(60)]
  ended, _, _ = read_data(tmp_path, rows, "loss.name=dpo(beta=0.1)")
  assert ended.code == 65 and "single answers (unpaired)" in ended.err
  assert "'dpo(beta" in ended.err and "config.loss.name" in ended.err
  ended, summary, _ = read_data(tmp_path, rows, work="v")  # none named: KTO
  assert ended.code is None and summary["kind"] == "unpaired"


def test_pairs_with_kto_are_split_and_it_is_reported(tmp_path):
  ended, summary, _ = read_data(tmp_path, PAIRS, config=KTO)
  assert ended.code is None and summary["kind"] == "unpaired"
  pool = tables.read_table(tmp_path / "w/shared/data/pool.parquet")
  assert f"pairs split into {len(pool)} answers for kto" in ended.out
  assert sum(r["label"] for r in pool) * 2 == len(pool)


@pytest.mark.parametrize("label", [True, False])
def test_unpaired_of_one_label_are_warned_of(tmp_path, label):
  """Disliked answers are nothing to imitate, so those need a checkpoint."""
  rows = [answer(i, label) for i in range(60)]
  ended, summary, _ = read_data(tmp_path, rows, config=KTO)
  if label:
    assert ended.code is None and summary["liked"] == 60
    assert "warning: all" in ended.out and "liked" in ended.out
  else:
    assert ended.code == 65 and "sft split" in ended.err
    assert "disliked" in ended.err and "config.model.checkpoint" in ended.err


# Numbers that are not finite.


def test_an_embedding_that_is_not_finite_names_its_rows(
  tmp_path, monkeypatch, whole
):
  work = jobs.copy(tmp_path / "work")
  record = work / "shared/embed/store/shards/00000.json"
  record.unlink()
  real = embed._collect

  def poison(out, part, result, tick, own):
    real(out, part, result, tick, own)
    if out["embedding"].shape[0] == 320:
      out["embedding"][7, 3] = np.nan  # the rejected side of the fourth record

  with monkeypatch.context() as patch:
    patch.setattr(embed, "_collect", poison)
    ended = jobs.run(work)
  pool = tables.read_table(work / "shared/data/pool.parquet")
  assert ended.code == 76 and "1 of 320 rows" in ended.err
  assert f"rows [7] (ids {pool[3]['id']})" in ended.err
  assert not record.exists()
  ended = jobs.run(work)
  assert ended.code == 0 and jobs.did(ended) == ["embed"]
  assert not jobs.differences(jobs.outcome(jobs.finished()), jobs.outcome(work))


def checkpoint(folder, factor):
  """The finished job's export, with the weights of its last norm scaled."""
  jobs.shutil.copytree(jobs.finished() / "runs/isa-0.1-seed0/export", folder)
  path, name = folder / "model.safetensors", "model.norm.weight"
  tensors = safetensors.numpy.load_file(path)
  with np.errstate(invalid="ignore"):
    tensors[name] = tensors[name] * np.float32(factor)
  safetensors.numpy.save_file(tensors, path)
  return folder


def test_weights_that_overflow(tmp_path, whole):
  """Finite weights, embeddings that are not: 76, with the ids."""
  folder = checkpoint(tmp_path / "model", 3e38)
  ended = jobs.run(tmp_path / "work", f"model.checkpoint={folder}")
  assert ended.code == 76, ended
  pool = tables.read_table(tmp_path / "work/shared/data/pool.parquet")
  assert "embed: " in ended.err and pool[0]["id"] in ended.err


def test_weights_that_are_not_finite(tmp_path, whole):
  folder = checkpoint(tmp_path / "model", np.nan)
  ended = jobs.run(tmp_path / "work", f"model.checkpoint={folder}")
  assert ended.code == 65 and "model.norm.weight holds NaN" in ended.err


def test_a_loss_that_is_not_finite(tmp_path, whole):
  """Names the rows of the batch; nothing from that step on is saved."""
  knobs = ("sft.lr=1e30", "sft.save_every=1")
  ended = jobs.run(tmp_path, *knobs)
  assert ended.code == 76, ended
  folder = tmp_path / "shared/sft"
  saved = sorted(p.name for p in (folder / "checkpoints").iterdir())
  step = int(ended.err.split(" at step ")[1].split(";")[0])
  assert saved == ["1", "1.digests.json"] and step == 1
  assert f"nothing after step {step} is saved" in ended.err
  sft = tables.read_table(tmp_path / "shared/data/sft.parquet")
  named = ended.err.split("Rows of the batch: ")[1].split(";")[0].split(", ")
  rows = feed.batches.rows_at(step, len(sft), 8, 0)
  assert named == [sft[i]["id"] for i in rows]
  assert [x["step"] for x in jobs.lines(folder / "metrics.jsonl")] == [0]
  # The same again: it goes on from the good step and finds the same.
  again = jobs.run(tmp_path, *knobs)
  assert again.code == 76 and "resumed from step 1" in again.out
  assert again.err == ended.err
