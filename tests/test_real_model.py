"""Real rows and a real instruct model: select, train and generate in a row."""

import gzip
import json
import os
import subprocess
import sys

import jobs
import pytest
import smollm2

from jaxalign.data import records

CAPITAL = "What is the capital of France?"


def run(command, *flags):
  """A command in a process of its own, on one device, as a person types it."""
  done = subprocess.run(
    [sys.executable, "-m", f"jaxalign.{command}", *map(str, flags)],
    cwd=jobs.ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | dict(XLA_FLAGS="", JAX_PLATFORMS="cpu"),
  )
  assert done.returncode == 0, done
  return done.stdout


@pytest.mark.slow
def test_a_hundred_real_rows_from_file_to_answers(tmp_path, shared):
  model = smollm2.folder()
  rows = tmp_path / "rows.jsonl"
  source = shared / "data/hh-harmless/pairs.jsonl.gz"
  with gzip.open(source, "rt", encoding="utf-8") as file:
    rows.write_text("".join(next(file) for _ in range(100)))

  subset = tmp_path / "subset.parquet"
  said = run(
    "select",
    "--config=configs/select.py",
    f"--output={subset}",
    f"--config.data.source={rows}",
    "--config.select.budget=16",
    "--config.select.sampler=length",
    "--config.model.context=192",
    f"--config.model.checkpoint={model}",
  )
  assert "read as pairs" in said and "refused: " in said
  assert "<|im_start|>user\\n" in said  # the rows, as their tokens decode
  assert "SmolLM, trained by Hugging Face" in said  # what the template adds
  kept = records.load_records(str(subset))
  assert kept.schema == "pairs" and len(kept.rows) == 16

  work = tmp_path / "tuned"
  said = run(
    "train",
    "--config=configs/dpo_sub.py",
    f"--workdir={work}",
    f"--config.data.source={subset}",
    "--config.lora.rank=8",
    f"--config.model.checkpoint={model}",
    "--config.train.batch_size=2",
    "--config.train.max_updates=8",
  )
  assert "16 pool" in said and "embed" not in said
  (arm,) = (work / "runs").iterdir()
  steps = jobs.lines(arm / "metrics.jsonl")
  assert len(steps) == 8
  # The policy is the reference before the first update: ln 2, rewards 0.
  assert steps[0]["train/loss"] == pytest.approx(0.693147, abs=1e-4)
  assert (
    abs(steps[0]["rewards/chosen"]) < 1e-3 > abs(steps[0]["rewards/rejected"])
  )
  assert max(step["train/lr"] for step in steps) == pytest.approx(2e-4)
  # Its recipe is a pretrained model's, its context what the rows take.
  config = json.loads((arm / "config.json").read_text())
  assert config["loss"]["name"] == "dpo(beta=0.1)"
  card = json.loads((work / "shared/data/data_summary.json").read_text())
  assert card["refused"] == 0 and card["context"] <= 192
  adapter = json.loads((arm / "adapter/adapter_config.json").read_text())
  assert adapter["base_model_name_or_path"] == str(model)

  for folder in (model, arm / "export"):
    said = run(
      "generate",
      f"--checkpoint={folder}",
      f"--prompt={CAPITAL}",
      "--temperature=0",
      "--new_tokens=16",
    )
    assert "The capital of France is Paris." in said
    assert "<|im_end|>" not in said  # it stops at the turn's end
