"""Bad data, numbers that are not finite: counted, named, or an exit code."""

import gzip
import json
import pathlib

import jobs
import numpy as np
import pytest
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


def pair(i, **change):
  """An explicit pair of about twelve tokens."""
  row = (
    dict(
      prompt=f"tell me of {i} ",
      chosen=f"it is {i} and good",
      rejected=f"no {i} at all",
    )
    | change
  )
  return {k: v for k, v in row.items() if v is not KeyError}


def thumb(i, label):
  return dict(prompt=f"tell me of {i} ", completion=f"it is {i}", label=label)


def write(path, rows):
  """Writes rows as .jsonl; a str row is written as it is."""
  path.write_text(
    "".join(
      (row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows
    )
  )
  return path


def read_data(workdir, path, *more, config="dpo_sub.py:tiny"):
  """Runs the data stage on a file; (Ended, summary, rejected rows)."""
  ended = jobs.run(workdir, f"data.source={path}", *SMALL, *more, config=config)
  folder = pathlib.Path(workdir) / "shared/data"
  if ended.code is not None:
    return ended, None, None
  return (
    ended,
    json.loads((folder / "data_summary.json").read_text()),
    jobs.lines(folder / "rejected.jsonl"),
  )


@pytest.fixture(autouse=True)
def only_data(request, monkeypatch):
  """Jobs of this file end after the data stage, unless they are marked."""
  if "whole" not in request.fixturenames:
    jobs.only_data(monkeypatch)


@pytest.fixture
def whole():
  """Asks for jobs that go on."""


# Files.


def test_a_missing_file(tmp_path):
  ended, _, _ = read_data(tmp_path / "w", tmp_path / "none.jsonl")
  assert ended.code == 65 and f"{tmp_path}/none.jsonl is missing" in ended.err
  assert "config.data.source" in ended.err


def test_an_empty_file(tmp_path):
  ended, _, _ = read_data(tmp_path / "w", write(tmp_path / "x.jsonl", []))
  assert ended.code == 65 and "is empty (0 bytes)" in ended.err
  (tmp_path / "x.jsonl").write_text("\n\n")
  ended, _, _ = read_data(tmp_path / "w", tmp_path / "x.jsonl")
  assert ended.code == 65 and "holds no rows" in ended.err


@pytest.mark.parametrize(
  "source, code, said",
  [
    ("ftp:x", 64, "unknown prefix 'ftp:'"),
    ("rows.txt", 64, "ends in none of .jsonl"),
    ("none-*.jsonl", 65, "matches no file"),
  ],
)
def test_unknown_kinds_of_source(tmp_path, source, code, said):
  ended, _, _ = read_data(tmp_path / "w", source)
  assert ended.code == code and said in ended.err
  assert "config.data.source" in ended.err and not (tmp_path / "w").exists()


def test_a_truncated_gzip(tmp_path):
  path = tmp_path / "x.jsonl.gz"
  data = gzip.compress(
    b"".join(json.dumps(pair(i)).encode() + b"\n" for i in range(3000))
  )
  path.write_bytes(data[: len(data) // 2])
  ended, _, _ = read_data(tmp_path / "w", path)
  assert ended.code == 65 and f"{path} is truncated" in ended.err
  assert "good rows were read before that" in ended.err


def test_a_changed_file_is_another_config(tmp_path):
  path = write(tmp_path / "x.jsonl", [pair(i) for i in range(60)])
  assert read_data(tmp_path / "w", path)[0].code is None
  assert not jobs.did(read_data(tmp_path / "w", path)[0])
  write(path, [pair(i) for i in range(61)])
  ended, _, _ = read_data(tmp_path / "w", path)
  assert ended.code == 64 and "source_digest was" in ended.err
  ended, summary, _ = read_data(tmp_path / "w", path, "--redo")
  assert ended.code is None and summary["seen"] == 61


# Rows.

IMPLICIT = "\n\nHuman: {}\n\nAssistant:{}"
BAD = {  # reason -> a row
  "malformed JSON": '{"prompt": "a", "chosen": ',
  "not an object": "[1, 2]",
  "missing field": pair(0, rejected=KeyError),
  "null": pair(0, chosen=None),
  "empty response": pair(0, chosen="  "),
  "empty prompt": pair(0, prompt=""),
  "not a string": pair(0, rejected=7),
  "chosen equals rejected": pair(0, chosen="same", rejected="same "),
  "lone surrogate": '{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_named_counted_and_skipped(tmp_path, reason):
  rows = [pair(i) for i in range(1, 60)]
  path = write(tmp_path / "x.jsonl", [*rows[:20], BAD[reason], *rows[20:]])
  ended, summary, rejected = read_data(tmp_path / "w", path)
  assert ended.code is None, ended
  assert summary["refused_by_reason"] == {reason: 1}
  assert (summary["seen"], summary["kept"], summary["refused"]) == (60, 59, 1)
  assert rejected[0]["file"] == str(path) and rejected[0]["line"] == 21
  assert rejected[0]["reason"] == reason and rejected[0]["detail"]
  assert "60 rows" in ended.out and f"1 {reason}" in ended.out
  # Or it stops the job, with the same place and reason.
  ended, _, _ = read_data(tmp_path / "v", path, "data.max_bad_fraction=0.0")
  assert ended.code == 65 and f"{path}:21" in ended.err
  assert reason in ended.err and "config.data.max_bad_fraction" in ended.err


def test_prompts_that_differ_between_the_sides(tmp_path):
  rows = [
    dict(
      chosen=IMPLICIT.format(f"what is {i}", f" {i} it is"),
      rejected=IMPLICIT.format(f"what is {i}", " who knows"),
    )
    for i in range(60)
  ]
  rows[7]["rejected"] = IMPLICIT.format("what was 7", " who knows")
  ended, summary, rejected = read_data(
    tmp_path / "w", write(tmp_path / "x.jsonl", rows)
  )
  assert ended.code is None and summary["schema"] == "pairs"
  assert summary["refused_by_reason"] == {"prompts differ": 1}
  assert rejected[0]["line"] == 8 and "'is 7" in rejected[0]["detail"]


def test_duplicate_ids_and_contents(tmp_path):
  rows = [pair(i, id=f"r{i}") for i in range(60)]
  rows[9]["id"] = "r3"
  path = write(tmp_path / "x.jsonl", rows)
  ended, summary, rejected = read_data(tmp_path / "w", path)
  assert summary["refused"] == 0 and summary["shared_ids"] == 2
  assert "2 rows that share an id with another" in ended.out
  # The same content twice is kept, and counted.
  rows = [pair(i) for i in range(60)] + [pair(5)]
  ended, summary, _ = read_data(tmp_path / "v", write(path, rows))
  assert summary["duplicates"] == 1 and summary["refused"] == 0


def test_too_many_bad_rows(tmp_path):
  path = write(
    tmp_path / "x.jsonl",
    [pair(i) for i in range(40)] + [pair(i, chosen="") for i in range(41)],
  )
  ended, _, _ = read_data(tmp_path / "w", path)
  assert ended.code == 65 and "41 of 81 rows refused" in ended.err
  assert "empty response 41" in ended.err and f"{path}:41" in ended.err
  assert "config.data.max_bad_fraction" in ended.err
  listed = tmp_path / "w/shared/data/rejected.jsonl"  # to repair them by
  assert f"{listed} names them all" in ended.err
  assert [r["line"] for r in jobs.lines(listed)] == list(range(41, 82))
  assert {r["reason"] for r in jobs.lines(listed)} == {"empty response"}
  # With more of them allowed the same command goes on, and counts once.
  ended, summary, rejected = read_data(
    tmp_path / "w", path, "data.max_bad_fraction=0.9"
  )
  assert ended.code is None and summary["refused"] == len(rejected) == 41


def test_every_bad_row_at_once_adds_up(tmp_path):
  rows = [pair(i) for i in range(1, 60)]
  path = write(
    tmp_path / "x.jsonl",
    [
      *rows,
      *BAD.values(),
      pair(70, id="a"),
      pair(71, id="a"),
      pair(72, chosen="x" * 300 + "a", rejected="x" * 300 + "b"),
    ],
  )
  ended, summary, rejected = read_data(tmp_path / "w", path)
  assert ended.code is None
  reasons = [r["reason"] for r in rejected]
  assert sorted(set(reasons)) == sorted(summary["refused_by_reason"])
  for reason, count in summary["refused_by_reason"].items():
    assert reasons.count(reason) == count
  assert (
    summary["refused"]
    == len(rejected)
    == sum(summary["refused_by_reason"].values())
  )
  assert (
    summary["seen"] == summary["kept"] + summary["refused"] == 59 + len(BAD) + 3
  )
  assert sum(summary["rows_by_split"].values()) == summary["kept"]


def test_the_worlds_rows_add_up(tmp_path):
  """Few words: prompts repeat, and one in two splits is left out of one."""
  ended = jobs.run(
    tmp_path,
    "data.world.arguments=1",
    "data.world.argument_words=2",
    "data.world.topics=2",
  )
  assert ended.code is None or "split" in ended.err
  ended = jobs.run(
    tmp_path / "w",
    "data.world.arguments=1",
    "data.world.argument_words=10",
    "data.world.topics=8",
  )
  assert ended.code is None, ended
  folder = tmp_path / "w/shared/data"
  summary = json.loads((folder / "data_summary.json").read_text())
  rejected = jobs.lines(folder / "rejected.jsonl")
  assert summary["refused_by_reason"]["prompt of another split"] > 0
  assert summary["refused"] == len(rejected)
  assert summary["seen"] == summary["kept"] + summary["refused"] == 400
  assert sum(summary["rows_by_split"].values()) == summary["kept"]
  splits = [
    {r["prompt"] for r in tables.read_table(folder / f"{n}.parquet")}
    for n in ("sft", "pool", "held_out")
  ]
  assert not (
    splits[0] & splits[1] or splits[1] & splits[2] or splits[0] & splits[2]
  )


def test_a_killed_data_stage_counts_once(tmp_path, monkeypatch):
  """What an attempt that died left behind is not added to."""
  rows = [pair(i) for i in range(60)] + [pair(99, chosen="")]
  path = write(tmp_path / "x.jsonl", rows)
  real = tables.write_rows

  def die(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(tables, "write_rows", die)
  assert read_data(tmp_path / "w", path)[0].code == 130
  monkeypatch.setattr(tables, "write_rows", real)
  _, summary, rejected = read_data(tmp_path / "w", path)
  assert len(rejected) == summary["refused"] == 1


# Lengths.


def test_a_question_is_never_cut_and_rows_too_long_are_counted(tmp_path):
  rows = [pair(i) for i in range(60)]
  for i in range(10):
    rows[i]["prompt"] = "word " * 60 + f"tell me of {i} "
  for i in range(10, 14):
    rows[i]["chosen"] = " ".join(f"{k} of {3 * k}" for k in range(90))
  path = write(tmp_path / "x.jsonl", rows)
  ended, summary, rejected = read_data(
    tmp_path / "v", path, "data.too_long=drop"
  )
  assert ended.code is None and summary["refused_by_reason"] == {"too long": 14}
  assert {r["line"] for r in rejected} == {*range(1, 15)}
  assert "too long for the context of 32 and left out" in ended.out
  assert "keeps 99 % whole" in ended.out
  ended, summary, rejected = read_data(tmp_path / "t", path)  # by itself: "cut"
  assert ended.code is None and not rejected
  cut = [summary["truncation"][name] for name in ("sft", "pool", "held_out")]
  assert sum(c["rows_cut_by_side"]["prompt"] for c in cut) >= 10
  ended, _, _ = read_data(tmp_path / "u", path, "data.too_long=error")
  assert ended.code == 65 and "config.data.too_long" in ended.err
  ended, summary, rejected = read_data(
    tmp_path / "w", path, "data.too_long=cut_answer"
  )
  assert ended.code is None
  assert summary["refused_by_reason"] == {"question too long": 10}
  cut = [summary["truncation"][name] for name in ("sft", "pool", "held_out")]
  assert (
    sum(
      c["rows_cut_by_side"].get("chosen", 0)
      + c["rows_cut_by_side"].get("response", 0)
      for c in cut
    )
    == 4
  )
  folder = tmp_path / "w/shared/data"
  job = Job.__new__(Job)
  job.shared = tmp_path / "w/shared"
  tokens, rows = job.tokens("pool"), job.rows("pool")
  assert np.diff(tokens.offsets).max() <= 32
  tok = load_tokenizer(folder / "tokenizer.model")
  for i, row in enumerate(rows):  # the question is there, whole
    ids = tokens.ids[tokens.offsets[2 * i] : tokens.offsets[2 * i + 1]]
    text = tok.decode([int(x) for x in ids])
    cut = tokens.cut[2 * i] > 0
    assert text == (row["prompt"] + row["chosen"])[: len(text)]
    assert len(text) > len(row["prompt"]) and ids[0] == tok.bos
    assert cut == (ids[-1] != tok.eos) == (len(row["chosen"]) > 200)


def test_pairs_that_truncation_makes_equal_are_refused(tmp_path):
  rows = [pair(i) for i in range(80)]
  long = " ".join(f"{k} of {3 * k}" for k in range(90))
  for row in rows[:20]:  # some of them land in the pool
    row |= dict(chosen=long + " yes", rejected=long + " no")
  _, summary, rejected = read_data(
    tmp_path / "w", write(tmp_path / "x.jsonl", rows)
  )
  reason = "identical after truncation"
  assert 0 < summary["refused_by_reason"][reason] == len(rejected) <= 20
  assert {(r["reason"], r["split"]) for r in rejected} <= {
    (reason, "pool"),
    (reason, "held_out"),
  }
  assert summary["seen"] == summary["kept"] + len(rejected) == 80
  assert sum(summary["rows_by_split"].values()) == summary["kept"]
  assert summary["truncation"]["sft"]["rows_cut_by_side"]["response"] == (
    20 - len(rejected)
  )  # imitated as far as they go


def test_too_few_rows_for_three_splits(tmp_path):
  path = write(tmp_path / "x.jsonl", [pair(0), pair(1)])
  ended, _, _ = read_data(tmp_path / "w", path)
  assert ended.code == 65 and "split" in ended.err and "is empty" in ended.err
  assert "config.data.split" in ended.err


# Thumbs.


def test_unpaired_with_a_pair_loss(tmp_path):
  path = write(tmp_path / "x.jsonl", [thumb(i, i % 2) for i in range(60)])
  ended, _, _ = read_data(tmp_path / "w", path, "loss.name=dpo(beta=0.1)")
  assert ended.code == 65 and "single answers (unpaired)" in ended.err
  assert "'dpo(beta" in ended.err and "config.loss.name" in ended.err
  ended, summary, _ = read_data(tmp_path / "v", path)  # no loss named: KTO
  assert ended.code is None and summary["kind"] == "unpaired"


def test_pairs_with_kto_are_split_and_it_is_said(tmp_path):
  path = write(tmp_path / "x.jsonl", [pair(i) for i in range(60)])
  ended, summary, _ = read_data(tmp_path / "w", path, config="kto_sub.py:tiny")
  assert ended.code is None and summary["kind"] == "unpaired"
  pool = tables.read_table(tmp_path / "w/shared/data/pool.parquet")
  assert f"pairs split into {len(pool)} answers for kto" in ended.out
  assert sum(r["label"] for r in pool) * 2 == len(pool)


@pytest.mark.parametrize("label", [True, False])
def test_unpaired_of_one_label_are_warned_of(tmp_path, label):
  """Disliked answers are nothing to imitate, so those need a checkpoint."""
  path = write(tmp_path / "x.jsonl", [thumb(i, label) for i in range(60)])
  ended, summary, _ = read_data(tmp_path / "w", path, config="kto_sub.py:tiny")
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
  (work / "shared/embed/store/shards/00000.json").unlink()
  real = embed._collect

  def poison(out, part, result, tick, own):
    real(out, part, result, tick, own)
    if out["embedding"].shape[0] == 320:
      out["embedding"][7, 3] = np.nan  # the rejected side of the fourth record

  monkeypatch.setattr(embed, "_collect", poison)
  ended = jobs.run(work)
  pool = tables.read_table(work / "shared/data/pool.parquet")
  assert ended.code == 76 and "1 of 320 rows" in ended.err
  assert f"rows [7] (ids {pool[3]['id']})" in ended.err
  assert not (work / "shared/embed/store/shards/00000.json").exists()
  monkeypatch.setattr(embed, "_collect", real)
  ended = jobs.run(work)
  assert ended.code == 0 and jobs.did(ended) == ["embed"]
  assert not jobs.differences(jobs.outcome(jobs.finished()), jobs.outcome(work))


def checkpoint(folder, **scale):
  """The finished job's export, with some tensors made larger."""
  jobs.shutil.copytree(jobs.finished() / "runs/isa-0.1-seed0/export", folder)
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  for name, factor in scale.items():
    name = [n for n in tensors if name in n.replace(".", "_")][0]
    tensors[name] = tensors[name] * np.float32(factor)
  safetensors.numpy.save_file(tensors, path)
  return folder


def test_weights_that_overflow(tmp_path, whole):
  """Finite weights, embeddings that are not: 76, with the ids."""
  folder = checkpoint(tmp_path / "model", model_norm_weight=3e38)
  ended = jobs.run(tmp_path / "work", f"model.checkpoint={folder}")
  assert ended.code == 76, ended
  pool = tables.read_table(tmp_path / "work/shared/data/pool.parquet")
  assert "embed: " in ended.err and pool[0]["id"] in ended.err


def test_weights_that_are_not_finite(tmp_path, whole):
  with np.errstate(invalid="ignore"):
    folder = checkpoint(tmp_path / "model", model_norm_weight=np.nan)
  ended = jobs.run(tmp_path / "work", f"model.checkpoint={folder}")
  assert ended.code == 65 and "model.norm.weight holds NaN" in ended.err


def test_a_loss_that_is_not_finite(tmp_path, whole):
  """Names the rows of the batch; nothing from that step on is saved."""
  ended = jobs.run(tmp_path, "sft.lr=1e30", "sft.save_every=1")
  assert ended.code == 76, ended
  folder = tmp_path / "shared/sft/checkpoints"
  saved = sorted(p.name for p in folder.iterdir())
  step = int(ended.err.split(" at step ")[1].split(";")[0])
  assert saved == ["1", "1.digests.json"] and step == 1
  assert f"nothing after step {step} is saved" in ended.err
  sft = tables.read_table(tmp_path / "shared/data/sft.parquet")
  named = ended.err.split("Rows of the batch: ")[1].split(";")[0].split(", ")
  rows = feed.batches.rows_at(step, len(sft), 8, 0)
  assert named == [sft[i]["id"] for i in rows]
  assert [
    line["step"] for line in jobs.lines(tmp_path / "shared/sft/metrics.jsonl")
  ] == [0]
  # The same again: it goes on from the good step and finds the same.
  again = jobs.run(tmp_path, "sft.lr=1e30", "sft.save_every=1")
  assert again.code == 76 and "resumed from step 1" in again.out
  assert again.err == ended.err
