"""Other tools read what a job leaves: TRL trains on subset.parquet as it is."""

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  """A finished little job with one arm."""
  from jaxalign.cli import main

  folder = tmp_path_factory.mktemp("job")
  flags = [
    "--config=configs/dpo_sub.py:smoke",
    f"--workdir={folder}",
    "--config.compare=()",
    "--config.sft.updates=20",
    "--config.train.max_updates=3",
    "--config.eval.prompts=16",
    "--config.data.world.sft_rows=400",
    "--config.data.world.pool_rows=800",
    "--config.data.world.held_out_rows=60",
    "--config.select.mixture.starts=2",
    "--config.mesh.fsdp=8",
  ]
  assert main.main(["main", *flags]) == 0
  return folder / "runs" / "isa-0.1-seed0"


def test_the_folder_is_complete(job):
  names = {p.name for p in job.iterdir()}
  assert {
    "config.json",
    "scores.parquet",
    "subset.parquet",
    "metrics.jsonl",
    "eval.json",
    "report.html",
    "checkpoints",
    "export",
  } <= names
  import pyarrow.parquet as pq

  assert {"id", "row", "score", "rank", "selected"} <= set(
    pq.read_table(job / "scores.parquet").column_names
  )


def test_trl_takes_two_steps_on_the_subset(job, tmp_path):
  pytest.importorskip("trl")
  import datasets
  import transformers
  from trl import DPOConfig, DPOTrainer

  subset = datasets.load_dataset(
    "parquet",
    data_files=str(job / "subset.parquet"),
    split="train",
    cache_dir=str(tmp_path),
  )
  assert {"prompt", "chosen", "rejected", "id", "score", "rank"} <= set(
    subset.column_names
  )
  model = transformers.AutoModelForCausalLM.from_pretrained(job / "export")
  tokenizer = transformers.AutoTokenizer.from_pretrained(job / "export")
  trainer = DPOTrainer(
    model=model,
    train_dataset=subset,
    processing_class=tokenizer,
    args=DPOConfig(
      output_dir=str(tmp_path / "out"),
      max_steps=2,
      per_device_train_batch_size=4,
      report_to=[],
      use_cpu=True,
      logging_steps=1,
      save_strategy="no",
      bf16=False,
      gradient_checkpointing=False,
    ),
  )
  trainer.train()
  losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
  assert len(losses) == 2 and all(0 < x < 2 for x in losses)
  assert json.loads((job / "eval.json").read_text())["kl"]["n"] == 16
