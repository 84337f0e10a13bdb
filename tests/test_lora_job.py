"""A job with adapters: what it keeps, what it exports, how it goes on."""

import json
import pathlib

import jobs
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxalign.core import checkpoints
from jaxalign.model import safetensors_io

ISA = "isa-0.1-seed0"
KNOBS = ("lora.rank=4", "train.lr=0.01", "compare=()")
pytestmark = pytest.mark.slow  # each compiles a training and a generation


def prepared(tmp_path):
  """A job whose shared stages are done and whose arm is not trained."""
  work = jobs.copy(tmp_path / "work")
  jobs.unfinish(work, ISA, "align", "evaluate", "export")
  return work


def saved(work, item="params"):
  """What the newest checkpoint holds, on the host."""
  at = max(
    (
      p
      for p in (work / f"runs/{ISA}/checkpoints").iterdir()
      if p.name.isdigit()
    ),
    key=lambda p: int(p.name),
  )
  with ocp.StandardCheckpointer() as reader:
    return {
      n: np.asarray(x) for n, x in reader.restore(at.resolve() / item).items()
    }


def weights(folder):
  found = safetensors_io.Checkpoint(safetensors_io.epath.Path(folder))
  return {n: t.shape for n, t in found.tensors.items()}


@pytest.mark.parametrize("variant", ["lora", "allora", "lora_sb"])
def test_a_job_keeps_adapters_alone(tmp_path, variant):
  work = prepared(tmp_path)
  knobs = (*KNOBS, f"lora.variant={variant}")
  ended = jobs.run(work, *knobs)
  assert ended.code == 0, ended
  assert jobs.did(ended)[:3] == ["align", "evaluate", "export"]
  arm = work / f"runs/{ISA}"
  params = saved(work)
  ends = {":r"} if variant == "lora_sb" else {":a", ":b"}
  assert {n[-2:] for n in params} == ends  # and no weight of the base
  assert all(x.dtype == np.float32 for x in params.values())
  assert all(np.abs(x).max() > 0 for x in params.values())  # they moved
  full = jobs.parameters(jobs.finished() / f"runs/{ISA}")
  assert sum(x.nbytes for x in params.values()) < 0.3 * sum(
    x.nbytes for x in full.values()
  )
  assert (arm / "bases").exists() == (variant == "lora_sb")
  lines = jobs.lines(arm / "metrics.jsonl")
  assert abs(lines[0]["train/preference_loss"] - np.log(2)) < 1e-6
  assert lines[-1]["train/preference_loss"] < np.log(2) - 1e-4
  assert json.loads((arm / "eval.json").read_text())["kl"]["value"] != 0
  config = json.loads((arm / "adapter/adapter_config.json").read_text())
  assert config["r"] == 4 and config["peft_type"] == "LORA"
  assert weights(arm / "export") == weights(
    jobs.finished() / f"runs/{ISA}/export"
  )
  again = jobs.run(work, *knobs)
  assert again.code == 0 and not jobs.did(again)


@pytest.mark.parametrize("variant", ["lora", "lora_sb"])
def test_a_stopped_job_goes_on_to_the_same_bits(tmp_path, monkeypatch, variant):
  knobs = (*KNOBS, f"lora.variant={variant}")
  whole = prepared(tmp_path / "whole")
  assert jobs.run(whole, *knobs).code == 0
  work, real = prepared(tmp_path / "cut"), checkpoints.Checkpoints.save

  def save(self, step, items):
    real(self, step, items)
    if step == 2:
      raise jobs.Stop

  monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
  assert jobs.run(work, *knobs).code is None
  monkeypatch.undo()
  ended = jobs.run(work, *knobs)
  assert ended.code == 0 and "resumed from step 2" in ended.out
  one, other = saved(whole), saved(work)
  assert set(one) == set(other)
  for n in one:
    np.testing.assert_array_equal(one[n], other[n], err_msg=n)
  for name in ("eval.json", "adapter/adapter_model.safetensors"):
    files = [pathlib.Path(w) / f"runs/{ISA}" / name for w in (whole, work)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
  "knobs,words",
  [
    (("lora.rank=4", "lora.targets=('q_projj',)"), "'q_projj' matches no"),
    (("lora.rank=64",), "lora.rank=64 is more than"),
    (("lora.rank=-1",), "lora.rank=-1, wanted 0 or more"),
    (("lora.rank=2", "lora.variant=dora"), "lora.variant='dora' is unknown"),
    (("lora.rank=2", "train.lr=-1.0"), "config.train.lr"),
    (("model.param_dtype=int8",), "model.param_dtype='int8' is unknown"),
  ],
)
def test_bad_knobs_end_before_anything_runs(tmp_path, knobs, words):
  ended = jobs.run(tmp_path, *knobs)
  assert ended.code == 64 and words in ended.err, ended
  assert not jobs.did(ended)


def test_a_bfloat16_reference(tmp_path):
  """Its log-probs are the adapters' start, too."""
  ended = jobs.run(tmp_path / "work", *KNOBS, "model.param_dtype=bfloat16")
  assert ended.code == 0, ended
  lines = jobs.lines(tmp_path / f"work/runs/{ISA}/metrics.jsonl")
  assert abs(lines[0]["train/preference_loss"] - np.log(2)) < 1e-6
  assert lines[-1]["train/preference_loss"] < np.log(2) - 1e-4
