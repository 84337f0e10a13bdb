"""What training on a given checkpoint runs, and where it begins."""

import json

import jobs
import numpy as np
import pytest

from jaxalign.cli import train as train_main


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """40 pairs of unlike lengths; the better answer says "good"."""
  path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
  rng = np.random.default_rng(0)
  path.write_text(
    "".join(
      json.dumps(
        dict(
          prompt=f"tell me of {i} {'and of that ' * int(rng.integers(3))}",
          chosen=f"it is {i} and good {'indeed ' * int(rng.integers(4))}",
          rejected=f"no {i} {'at all ' * int(rng.integers(4))}",
        )
      )
      + "\n"
      for i in range(40)
    )
  )
  return path


@pytest.fixture(scope="module")
def given(tmp_path_factory, source):
  """A small Llama with its tokenizer, as a Hugging Face folder."""
  work = tmp_path_factory.mktemp("given")
  ended = train(work, source, "train.max_updates=1")
  assert ended.code == 0, ended
  return next(work.glob("runs/*/export"))


def train(work, source, *more):
  return jobs.run(
    work,
    f"data.source={source}",
    "data.template=none",
    "train.batch_size=8",
    *more,
    command=train_main.main,
  )


def first(work):
  """The metrics of the first update."""
  (path,) = work.glob(
    "runs/isa*/metrics.jsonl"
    if (work / "report.html").exists()
    else "runs/*/metrics.jsonl"
  )
  return jobs.lines(path)[0]


@pytest.mark.parametrize(
  "more,passes",
  [
    ((), ["ref_logps"]),
    (("loss.name=simpo",), []),
    (("loss.name=orpo",), []),
    (("train.reference=online",), []),
  ],
)
def test_only_the_passes_that_training_reads(
  tmp_path, source, given, more, passes
):
  """No embedding; and the reference only where its numbers are read."""
  ended = train(tmp_path, source, f"model.checkpoint={given}", *more)
  assert ended.code == 0, ended
  assert jobs.did(ended) == ["data", "select", "ref_logps", "align", "export"]
  assert not (tmp_path / "shared" / "embed").exists()
  card = json.loads(
    next(tmp_path.glob("runs/*/records/ref_logps.json")).read_text()
  )
  assert bool(card["cost"]["flops"]) == bool(passes)
  sums = np.load(next(tmp_path.glob("runs/*/ref_sum.npy")))
  assert (sums < 0).all() if passes else not sums.any()


def test_another_model_in_the_same_folder_is_refused(tmp_path, source, given):
  """What a job was made from is not replaced unasked."""
  folder, work = tmp_path / "model", tmp_path / "work"
  jobs.shutil.copytree(given, folder)
  flags = (f"model.checkpoint={folder}", "train.max_updates=1")
  ended = train(work, source, *flags)
  assert ended.code == 0 and f"\n{ended.out}".count("\ndata: ...") == 1
  assert "data: finished before" not in ended.out
  path = folder / "model.safetensors"
  data = bytearray(path.read_bytes())
  data[-2] ^= 1
  path.write_bytes(data)
  ended = train(work, source, *flags)
  assert ended.code == 64 and "sft was" in ended.err and "--redo" in ended.err
  assert train(work, source, *flags, "--redo").code == 0


@pytest.mark.parametrize(
  "more",
  [
    (),
    ("train.layout=padded",),
    ("model.param_dtype=bfloat16",),
    ("lora.rank=2",),
    ("train.batch_size=16", "train.accumulation=2", "train.layout=padded"),
    ("loss.name=kto(beta=0.3)",),
  ],
)
def test_in_bfloat16_the_policy_begins_as_the_reference(
  tmp_path, source, given, more
):
  """One layout, one dtype, the same batch: to the last float32 sum."""
  ended = train(
    tmp_path, source, f"model.checkpoint={given}", "model.dtype=bfloat16", *more
  )
  assert ended.code == 0, ended
  line = first(tmp_path)
  drift = {n: x for n, x in line.items() if n.startswith("drift/")}
  assert drift and max(map(abs, drift.values())) < 1e-5, drift


def test_also_where_the_embedding_pass_has_sums_in_bfloat16(tmp_path):
  ended = jobs.run(
    tmp_path, "model.dtype=bfloat16", "sft.updates=40", "compare=()"
  )
  assert ended.code == 0, ended
  line = first(tmp_path)
  assert line["drift/chosen"] == line["drift/rejected"] == 0
  assert line["train/preference_loss"] == pytest.approx(np.log(2), abs=1e-6)
