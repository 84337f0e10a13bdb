"""What a job on a CPU is planned to hold, and what it does hold."""

import os
import pathlib
import re
import sys

import jobs
from models import make_mesh, sized
import pytest

from jaxalign.cli import train
from jaxalign.core.errors import ConfigError
from jaxalign.model import adapters, memory
from jaxalign.train import host_memory

M = sized(2, 4, 2, 1, 2, 3, 10, 16, attention="tiles")
GIB = 2**30
SHAPE = memory.StepShape(rows=6, length=5, chunk=2, packed=30)


def test_a_whole_policy_and_its_reference():
  """Weights, gradients and two moments; the reference where it stays."""
  held = memory.on_host(M, make_mesh(), SHAPE, tile=2)
  numbers = 2 * 92 + 44  # as in test_plan
  assert held["parameters"] == held["gradients"] == 4 * numbers
  assert held["optimizer"] == 8 * numbers and "reference" not in held
  shape = SHAPE._replace(frozen_size=2)
  both = memory.on_host(M, make_mesh(), shape, tile=2, reference=True)
  assert both["reference"] == 2 * numbers
  small = M._replace(lora=adapters.Lora(1))
  lora = memory.on_host(small, make_mesh(), SHAPE, tile=2, reference=True)
  assert "reference" not in lora  # it is the frozen base
  assert lora["gradients"] < held["gradients"]


def test_packed_rows_hold_their_own_tokens_and_no_scores():
  def by(packed):
    shape = SHAPE._replace(packed=packed)
    return memory.on_host(M, make_mesh(), shape, tile=2)["activations"]

  assert by(15) * 2 == by(30)
  scores = 2 * 30 * 2 * 4 * 2 * 5  # layers, tokens, float32 twice, heads, keys
  assert by(0) == by(30) + scores  # padded


def test_a_pass_over_many_rows_may_be_the_peak():
  held = memory.on_host(M, make_mesh(), SHAPE, tile=4096)
  assert "gradients" not in held
  assert held["logits"] == 8 * 4096 * 2 * 10


def test_what_a_host_lacks_is_a_warning_or_refused():
  held = dict(libraries=1, parameters=2, gradients=2, optimizer=4)
  held |= dict(activations=4, programs=1)
  held = {n: x * GIB for n, x in held.items()}
  assert memory.check_host(held, None) == ""
  assert memory.check_host(held, 14 * GIB) == ""
  text = memory.check_host(held, 12 * GIB)
  assert "14.0 GiB at its peak" in text
  assert "12.0 GiB of memory are free" in text
  with pytest.raises(ConfigError, match="lora.rank; --force tries"):
    memory.check_host(held, 11 * GIB)
  assert memory.check_host(held, 11 * GIB, force=True)


def test_what_is_free_is_what_the_system_says():
  if not os.path.exists("/proc/meminfo"):
    assert memory.available() is None
    return
  text = pathlib.Path("/proc/meminfo").read_text()
  free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1])
  assert 0 < memory.available() < 1.2 * free


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "pairs.jsonl"
  row = '{"prompt": "tell of %d", "chosen": "it is %d", "rejected": "no"}\n'
  path.write_text("".join(row % (i, i) for i in range(40)))
  return path


def test_it_is_known_before_anything_is_compiled(tmp_path, source, monkeypatch):
  run = lambda *flags: jobs.run(
    tmp_path / "job", f"data.source={source}", *flags, command=train.main
  )
  planned = run("--dry_run")
  together = re.search(
    r"above jax alone: .*together ([\d.,]+) MiB", planned.out
  )
  assert planned.code == 0 and together, planned
  number = float(together[1].replace(",", "")) * 2**20
  monkeypatch.setattr(memory, "available", lambda: int(number * 0.3))
  ended = run()
  assert ended.code == 64 and "--force" in ended.err, ended
  assert jobs.did(ended) == ["data"]
  monkeypatch.setattr(memory, "available", lambda: int(number * 0.9))
  ended = run("train.max_updates=1", "--redo")
  free, began = map(ended.out.index, ("of memory are free", "sft: ..."))
  assert ended.code == 0 and free < began, ended


def test_tokens_are_counted_as_the_template_has_them():
  """Of a sample; a row never has more than the context."""
  c = jobs.common.base("tiny")
  rows = [dict(prompt="a" * 30, chosen="b" * 300, rejected="c" * 6)] * 3
  prompt, answers = host_memory.row_sizes(c, "pairs", rows, 0, 32)
  assert prompt.tolist() == [11] * 3
  assert answers.tolist() == [[21, 3]] * 3
  prompt, answers = host_memory.row_sizes(c, "unpaired", rows, 0, 32)
  assert len(prompt) == 6 and answers.shape == (6, 1)


@pytest.mark.slow
def test_a_job_takes_about_what_it_plans():
  """A short world, within a third; `job_checks.py memory` has the others."""
  sys.path.insert(0, str(jobs.ROOT))
  from tools import job_checks

  flags = "sft.updates=20", "train.max_updates=5", "compare=()"
  flags = [f"--config.{flag}" for flag in flags]
  planned, taken = job_checks.measure("world", more=flags)
  assert 0.75 < planned / taken < 1.34, (planned, taken)
