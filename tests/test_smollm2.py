"""A real instruct checkpoint: where its training begins, what is left of it."""

import gzip
import json
import os
import subprocess
import sys
import warnings

import jobs
import numpy as np
import pytest
import smollm2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given():
  return smollm2.folder()


@pytest.fixture
def rows(shared, tmp_path):
  """The four shortest real pairs of some length."""
  with gzip.open(shared / "data/ultrafeedback/pairs.jsonl.gz", "rt") as file:
    found = [json.loads(line) for line in file]
  texts = lambda r: [r[n] for n in ("prompt", "chosen", "rejected")]
  differ = lambda r: r["chosen"].strip() != r["rejected"].strip()
  long = [r for r in found if differ(r) and min(map(len, texts(r))) > 40]
  kept = sorted(long, key=lambda r: sum(map(len, texts(r))))[:4]
  lines = [dict(zip(("prompt", "chosen", "rejected"), texts(r))) for r in kept]
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(x) + "\n" for x in lines))
  return path


def command(module, *flags):
  """A command in a process of one device."""
  ended = subprocess.run(
    [sys.executable, "-m", f"jaxalign.{module}", *flags],
    cwd=jobs.ROOT,
    env=os.environ | dict(XLA_FLAGS="", JAX_PLATFORMS="cpu"),
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended
  return ended.stdout


def train(work, given, rows, *more):
  command(
    "train",
    *jobs.flags(
      work,
      f"data.source={rows}",
      f"model.checkpoint={given}",
      "data.template=chatml",
      "model.context=128",
      "train.batch_size=4",
      "train.max_updates=1",
      "loss.name=dpo(beta=0.1)",
      "model.dtype=bfloat16",
      *more,
      config="dpo_sub.py",
    ),
  )
  return next(work.glob("runs/*"))


def begins_as_the_reference(arm):
  line = jobs.lines(arm / "metrics.jsonl")[0]
  assert line["train/preference_loss"] == pytest.approx(np.log(2), abs=1e-3)
  for name in ("rewards/chosen", "rewards/rejected"):
    assert abs(line[name]) < 5e-3, line


def test_padded_in_bfloat16_and_its_weights(tmp_path, given, rows):
  flags = "train.layout=padded", "model.param_dtype=bfloat16"
  begins_as_the_reference(train(tmp_path / "job", given, rows, *flags))


def test_adapters_their_export_and_its_answers(tmp_path, given, rows):
  """Packed rows; transformers and peft read what is left."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  peft = pytest.importorskip("peft")
  arm = train(tmp_path / "job", given, rows, "lora.rank=4")
  begins_as_the_reference(arm)
  read = transformers.AutoModelForCausalLM.from_pretrained
  base, out = read(given), read(arm / "export")
  assert out.dtype == base.dtype == torch.bfloat16
  kept = "temperature top_p do_sample pad_token_id bos_token_id".split()
  had, has = (m.generation_config.to_dict() for m in (base, out))
  assert [has[n] for n in kept] == [had[n] for n in kept]
  read = transformers.AutoTokenizer.from_pretrained
  tok, was = read(arm / "export"), read(given)
  assert tok.pad_token == was.pad_token == "<|im_end|>"
  end = tok.convert_tokens_to_ids("<|im_end|>")
  assert end in np.atleast_1d(has["eos_token_id"])
  assert tok.chat_template
  config = json.loads((arm / "adapter/adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == str(given)
  with warnings.catch_warnings():  # peft asks transformers in an old way
    warnings.simplefilter("ignore", FutureWarning)
    peft.PeftModel.from_pretrained(base, arm / "adapter")
  path = tmp_path / "answers.jsonl"
  command(
    "generate",
    f"--checkpoint={arm}/export",
    "--temperature=0",
    "--prompt=What is the capital of France?",
    "--new_tokens=16",
    "--answers=2",
    "--tile=2",
    f"--output={path}",
  )
  answers = jobs.lines(path)
  assert [x["sample"] for x in answers] == [0, 1]
  for x in answers:  # greedy, and one update moves little
    assert x["answer"] == "The capital of France is Paris." and x["ended"], x
