"""TensorBoard's files hold the log; a tracker that fails ends nothing."""

import sys
import types

import jax
import pytest

from jaxalign.core.errors import ConfigError
from jaxalign.train import trackers


def scalars(folder):
  """(step, name, value) of TensorBoard event files, and the purged steps."""
  proto = pytest.importorskip("tensorboardX.proto.event_pb2")
  found, purged = [], []
  for path in sorted(folder.glob("events.*")):
    data = path.read_bytes()
    while data:  # length, its checksum, the event, its checksum
      size = int.from_bytes(data[:8], "little")
      event = proto.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.session_log.status:
        purged.append(event.step)
      found += [
        (event.step, v.tag, v.simple_value)
        for v in event.summary.value
        if v.HasField("simple_value")
      ]
  return found, purged


def test_tensorboard_holds_every_number(tmp_path):
  pytest.importorskip("tensorboardX")
  one = trackers.open_all(("tensorboard",), tmp_path, "align isa", 0)
  for step in range(3):
    one.log(step, {"train/loss": 0.5 * step, "rewards/margins": -1.0})
  one.close()
  found, purged = scalars(tmp_path / "tensorboard")
  assert found == [
    (s, n, v)
    for s in range(3)
    for n, v in (("train/loss", 0.5 * s), ("rewards/margins", -1.0))
  ]
  assert purged == []
  again = trackers.open_all(("tensorboard",), tmp_path, "align isa", 2)
  again.log(2, {"train/loss": 9.0})
  again.close()
  assert scalars(tmp_path / "tensorboard")[1] == [2]


def test_nothing_is_imported_unless_it_is_named(tmp_path, monkeypatch, capsys):
  """What is not installed is named once and left out."""
  for name in ("tensorboardX", "wandb"):
    monkeypatch.setitem(sys.modules, name, None)  # an import raises
  for names in ((), ("wandb",)):
    one = trackers.open_all(names, tmp_path, "align", 0)
    one.log(0, {"train/loss": 1.0})
    one.close()
    out = capsys.readouterr().out
    assert out.count("tracker wandb is left out: ") == len(names)
    assert ("ImportError" in out or "ModuleNotFoundError" in out) == bool(names)
    assert names or list(tmp_path.iterdir()) == []


def test_one_that_fails_midway_is_left_out_and_the_others_go_on(
  tmp_path, monkeypatch, capsys
):
  """On process 0; no other opens any."""
  seen, opened = [], []
  good = trackers.Tracker(lambda step, values: seen.append(step), lambda: None)

  def failing(step, values):
    if step:
      raise RuntimeError("no network")

  bad = trackers.Tracker(failing, lambda: pytest.fail("closed after it broke"))
  table = dict(bad=lambda *_: bad, good=lambda *_: opened.append(1) or good)
  monkeypatch.setattr(trackers, "TRACKERS", table)
  for process in (0, 1):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    one = trackers.open_all(("bad", "good"), tmp_path, "align", 0)
    for step in range(3):
      one.log(step, {})
    one.close()
  assert seen == [0, 1, 2] and opened == [1]
  words = "tracker bad is left out: RuntimeError: no network"
  assert capsys.readouterr().out.count(words) == 1


def test_wandb_gets_the_run_and_its_numbers(tmp_path, monkeypatch):
  """Against the shape of its client: a run that logs and finishes."""
  calls, runs = [], []
  run = types.SimpleNamespace(
    log=lambda values, step: calls.append((step, values)),
    finish=lambda: calls.append("finish"),
  )
  client = types.SimpleNamespace(init=lambda **kw: runs.append(kw) or run)
  monkeypatch.setitem(sys.modules, "wandb", client)
  monkeypatch.delenv("WANDB_PROJECT", raising=False)

  def opened(start, folder=tmp_path):
    trackers.open_all(("wandb",), folder, "align isa", start).close()
    return runs[-1]["id"]

  one = trackers.open_all(("wandb",), tmp_path, "align isa", 0)
  one.log(3, {"train/loss": 1.0})
  one.close()
  assert calls == [(3, {"train/loss": 1.0}), "finish"]
  wanted = dict(name="align isa", project="jaxalign", resume="allow")
  wanted |= dict(group=tmp_path.name, dir=str(tmp_path))
  assert runs[0].items() >= wanted.items()
  # Resumed, it is the same run; begun anew, or elsewhere, another one.
  first = runs[0]["id"]
  assert len(first) == 16 and opened(4) == first == opened(6)
  other = opened(0)
  assert other != first and opened(2) == other
  assert opened(2, tmp_path / "elsewhere") not in (first, other)
  monkeypatch.setenv("WANDB_PROJECT", "mine")
  opened(2)
  assert runs[-1]["project"] == "mine"


def test_an_unknown_tracker_names_the_knob():
  with pytest.raises(ConfigError, match="'mlflow'.*config.train.trackers"):
    trackers.check_trackers(("mlflow",))
