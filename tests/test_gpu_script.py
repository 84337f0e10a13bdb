"""tools/gpu.py: what it counts, and a rehearsal on a machine without GPU."""

import json
import os
import pathlib
import subprocess
import sys

import emitters
import pytest

from jaxalign.model import decoder

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"

# A GPU machine may have jax and torch, and none of these. The peer's process
# is let have what transformers itself wants.
BLOCKER = """
import importlib.abc, sys
missing = {"datasets", "ml_collections", "tensorflow_datasets", "trl"}
if not any("gpu_torch" in a for a in sys.orig_argv):
  missing |= {"sentencepiece", "tokenizers", "pyarrow", "torch", "transformers"}
class Blocker(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in missing:
      raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def measure(monkeypatch):
  monkeypatch.syspath_prepend(str(TOOLS))
  import gpu_measure

  return gpu_measure


def by_hand(m, length):
  """Useful flops of one row, pair of query and key by pair."""
  d, h, g, c = m["width"], m["heads"], m["kv_heads"], m["head_size"]
  pairs = sum(1 for i in range(length) for j in range(length) if j <= i)
  matrices = d * h * c + 2 * d * g * c + h * c * d + 3 * d * m["ff"]
  return (
    m["layers"] * (2 * matrices * length + 2 * 2 * h * c * pairs)
    + 2 * d * m["vocab"] * length
  )


def test_useful_flops_by_hand(measure):
  sizes = dict(
    layers=3, width=24, heads=6, kv_heads=2, head_size=5, ff=40, vocab=70
  )
  m = decoder.ModelConfig(**sizes, context=17)
  assert measure.useful(m, 17) == by_hand(sizes, 17)
  assert measure.useful(m, 17, 0) == by_hand(sizes | dict(vocab=0), 17)


def test_published_peaks(measure):
  assert measure.published("NVIDIA H100 80GB HBM3") == (989e12, 67e12)
  assert measure.published("NVIDIA H200")[0] == 989e12
  assert measure.published("NVIDIA A100-SXM4-80GB")[0] == 312e12
  assert measure.published("NVIDIA H100 PCIe")[0] == 756e12  # not the SXM's
  assert measure.published("cpu") == (None, None)


def test_sides_take_turns(measure):
  order = []
  side = lambda name, value: lambda: order.append(name) or value
  times = measure.alternate(dict(a=side("a", 1.0), b=side("b", 2.0)), 3)
  assert times == dict(a=[1.0] * 3, b=[2.0] * 3)
  assert order == ["a", "b", "b", "a", "a", "b"]


def test_a_failure_leaves_a_line_and_the_rest(measure, tmp_path, capsys):
  section = measure.Section("x", tmp_path, 10, {})
  section.peaks = dict(published=None, measured=100.0)
  assert section.attempt("bad", lambda: 1 // 0) is None
  section.add("good", "us", [4.0, 1.0, 2.0], flops=50, tokens=8)
  kept = json.loads((tmp_path / "x.json").read_text())
  assert kept["failures"][0].startswith("bad: ZeroDivisionError")
  row = kept["rows"][0]
  assert (row["seconds"], row["low"], row["high"]) == (2.0, 1.0, 4.0)
  assert row["of_measured"] == 0.25 and row["of_published"] is None
  line = "| good | us | 2000.000 (1000.000 to 4000.000; 3) |"
  assert line in capsys.readouterr().out


@pytest.mark.slow
def test_toy_rehearsal_without_what_is_missing_there(tmp_path):
  (tmp_path / "sitecustomize.py").write_text(BLOCKER)
  env = os.environ | dict(XLA_FLAGS=emitters.flags(1))
  run = subprocess.run(
    [sys.executable, str(TOOLS / "gpu.py"), "--toy", f"--out={tmp_path}"],
    env=env | dict(PYTHONPATH=str(tmp_path)),
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
  found = {}
  for name in ("attention", "train", "dpo", "mixture"):
    found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found[name]["rows"] and not found[name]["failures"]
    assert found[name]["settings"]["toy"]
    for row in found[name]["rows"]:
      assert 0 < row["low"] <= row["seconds"] <= row["high"]
      if row["flops"]:
        assert row["of_measured"] == pytest.approx(
          row["flops"] / row["seconds"] / found[name]["peaks"]["measured"]
        )
  assert all(x["holds"] for x in found["attention"]["settings"]["equality"])
  assert len(found["attention"]["settings"]["equality"]) == 7
  assert any("ln 2 within" in x for x in found["dpo"]["notes"])
  # Ours took turns with theirs, over the same flops.
  settings = found["train"]["settings"]
  rows, length = settings["rows"], settings["length"]
  turns = [
    r for r in found["train"]["rows"] if r["what"] == f"train step, {rows} rows"
  ]
  assert {r["who"].split(",")[0] for r in turns} == {"jaxalign", "transformers"}
  for row in turns:
    assert row["flops"] == 3 * rows * by_hand(settings["model"], length)
    assert row["tokens"] == rows * length
  # Both responses of every pair.
  settings = found["dpo"]["settings"]
  assert found["dpo"]["rows"][0]["flops"] == (
    3 * settings["rows"] * by_hand(settings["model"], length)
  )
  again = subprocess.run(
    [
      sys.executable,
      str(TOOLS / "gpu.py"),
      "--toy",
      "--summary",
      f"--out={tmp_path}",
    ],
    env=env,
    capture_output=True,
    text=True,
  )
  assert again.returncode == 0 and again.stdout.count("\n## ") == 4


def test_without_a_gpu_it_refuses(tmp_path):
  run = subprocess.run(
    [
      sys.executable,
      str(TOOLS / "gpu.py"),
      "--sections=mixture",
      f"--out={tmp_path}",
    ],
    env=os.environ | dict(JAX_PLATFORMS="cpu"),
    capture_output=True,
    text=True,
  )
  assert run.returncode == 2 and "found no GPU" in run.stderr
