"""Killed, stopped and started again: the same job, bit for bit."""

import signal
import time

import jobs
import numpy as np
import pytest

from jaxalign.core import checkpoints, disk
from jaxalign.train import log, loop

ISA = "isa-0.1-seed0"


def same(work):
  """The job in `work` ended as an undisturbed one."""
  jobs.check_same(work)
  for folder in ("shared/sft", f"runs/{ISA}"):
    wanted = jobs.parameters(jobs.finished() / folder)
    found = jobs.parameters(work / folder)
    for name in wanted:
      assert np.array_equal(wanted[name], found[name]), (folder, name)


@pytest.fixture
def before_sft(tmp_path):
  """A finished job of which sft is to be done again, and it alone."""
  work = jobs.copy(tmp_path / "work")
  jobs.unfinish(work, "", "sft")
  return work


@pytest.fixture
def before_align(tmp_path):
  """A finished job of which one arm's training is to be done again."""
  work = jobs.copy(tmp_path / "work")
  jobs.unfinish(work, ISA, "align", "evaluate", "export")
  return work


def at_call(monkeypatch, holder, name, at, act):
  """Makes the n-th call of a function do something first; the calls so far."""
  real, calls = getattr(holder, name), []

  def hooked(*args, **kwargs):
    calls.append(args[0])
    if len(calls) == at:
      act()
    return real(*args, **kwargs)

  monkeypatch.setattr(holder, name, hooked)
  return calls


def at_write(monkeypatch, at, act):
  """`at_call` of the n-th write, whole or at the end of the log."""
  calls = []
  for holder, name in ((disk, "write_bytes"), (log, "_append")):

    def hooked(path, data, real=getattr(holder, name)):
      calls.append(path)
      if len(calls) == at:
        act()
      return real(path, data)

    monkeypatch.setattr(holder, name, hooked)
  return calls


def stop(*_):
  raise jobs.Stop


def signalled(number):
  return lambda: signal.raise_signal(number)


def saves_at(monkeypatch, at, act):
  return at_call(monkeypatch, checkpoints.Checkpoints, "save", at, act)


def test_a_second_run_does_nothing_says_so_and_is_fast(tmp_path):
  work = jobs.copy(tmp_path / "work")
  before = {
    p: p.stat().st_mtime_ns
    for p in work.rglob("*")
    if p.is_file() and p.name != ".lock"
  }
  began = time.monotonic()
  ended = jobs.run(work)
  assert ended.code == 0 and not jobs.did(ended)
  assert time.monotonic() - began < 10
  # 5 shared stages (data runs first, above), 7 an arm, and the page.
  assert ended.out.count(", skipped") == 20
  assert "wins/target, %" in ended.out  # the summary is printed all the same
  assert "everything was finished before; nothing was computed" in ended.out
  assert before == {p: p.stat().st_mtime_ns for p in before}
  same(work)


def test_killed_three_times_and_gone_on_from(tmp_path):
  """SIGKILL in sft after a checkpoint, between stages, and in align."""
  jobs.finished()  # compiles
  work = tmp_path / "work"
  points = [
    ("core.checkpoints:Checkpoints.save", 2),
    ("core.artifacts:_write_record", 4),
    ("core.checkpoints:Checkpoints.save", 1),
  ]
  ended = []
  for point, at in points:
    ended.append(jobs.wait(jobs.start(work, hook=jobs.kill_when(point, at))))
    assert ended[-1].code == -signal.SIGKILL, ended[-1]
  assert jobs.did(ended[0]) == ["data", "sft"]
  assert "sft: resumed from step 4" in ended[1].out
  assert jobs.did(ended[1]) == ["sft", "embed"]
  assert jobs.did(ended[2])[-1] == "align"
  ended = jobs.run(work)
  assert ended.code == 0 and jobs.did(ended)[0] == "align"
  assert f"align {ISA}: resumed from step 2" in ended.out
  same(work)


@pytest.mark.slow
def test_killed_at_each_write_of_sft(before_sft, monkeypatch):
  """The log, a checkpoint, its digests, the record: nothing is lost."""
  work = before_sft
  calls = at_write(monkeypatch, 0, None)
  assert jobs.run(work).code == 0
  monkeypatch.undo()
  sft = [i for i, path in enumerate(calls) if "/sft/" in str(path)]
  assert sft == list(range(8))  # record, (log, digests) of 3 saves, record
  for at in sft:
    jobs.unfinish(work, "", "sft")
    at_write(monkeypatch, at + 1, stop)
    assert jobs.run(work).code is None
    monkeypatch.undo()
    ended = jobs.run(work)
    assert ended.code == 0 and jobs.did(ended) == ["sft"]
    # A checkpoint without its digests is not believed.
    good = max(0, 2 * ((at - 1) // 2))
    assert ("resumed from" in ended.out) == bool(good), (at, ended)
    assert not good or f"resumed from step {good}" in ended.out
    assert ("was never finished" in ended.out) == (at in (2, 4, 6))
    same(work)


@pytest.mark.parametrize("number, code", [("SIGTERM", 75), ("SIGINT", 130)])
@pytest.mark.parametrize("stage", ["sft", "align"])
def test_a_signal_in_training_saves_and_stops(
  request, monkeypatch, number, code, stage
):
  """The step in flight is finished and saved; the rest is done later."""
  work = request.getfixturevalue(f"before_{stage}")
  # It comes while the first checkpoint's metrics are read; the step after
  # it is saved, though no checkpoint is due there.
  act = signalled(getattr(signal, number))
  at_call(monkeypatch, loop, "divide", 2, act)
  ended = jobs.run(work)
  assert ended.code == code and jobs.did(ended) == [stage]
  assert "run the same command" in ended.err and ended.err.count("\n") == 1
  monkeypatch.undo()
  ended = jobs.run(work)
  assert ended.code == 0 and jobs.did(ended)[0] == stage
  assert "resumed from step 3" in ended.out
  same(work)


def test_a_signal_in_the_last_step_is_not_lost(before_sft, monkeypatch):
  saves_at(monkeypatch, 3, signalled(signal.SIGTERM))
  assert jobs.run(before_sft).code == 75
  monkeypatch.undo()
  ended = jobs.run(before_sft)
  assert ended.code == 0 and "resumed from step 6" in ended.out
  same(before_sft)


def test_a_second_ctrl_c_does_not_wait(before_sft, monkeypatch):
  def twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)

  at_call(monkeypatch, loop, "divide", 1, twice)
  saves = saves_at(monkeypatch, 0, None)
  assert jobs.run(before_sft).code == 130 and not saves
  monkeypatch.undo()
  assert jobs.run(before_sft).code == 0
  same(before_sft)


def test_another_config_does_not_go_on_from_a_killed_run(tmp_path, monkeypatch):
  """The checkpoints of a killed sft belong to its learning rate."""
  at_call(monkeypatch, loop, "divide", 2, signalled(signal.SIGTERM))
  assert jobs.run(tmp_path, "sft.lr=0.5").code == 75
  monkeypatch.undo()
  ended = jobs.run(tmp_path)
  assert ended.code == 64 and "unfinished sft" in ended.err
  assert "sft.lr was 0.5, now 0.002" in ended.err and "--redo" in ended.err
  jobs.in_place_of(monkeypatch, "embed", stop)
  ended = jobs.run(tmp_path, "--redo")
  assert ended.code is None and "resumed from" not in ended.out
  monkeypatch.undo()  # where this test runs alone, the finished job is to come
  wanted = jobs.parameters(jobs.finished() / "shared/sft")
  for name, x in jobs.parameters(tmp_path / "shared/sft").items():
    assert np.array_equal(x, wanted[name])


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_from_outside(tmp_path, number, code):
  """A real process, a real signal, at a moment nobody chose."""
  jobs.finished()  # compiles
  process = jobs.start(tmp_path, "sft.updates=4000", "sft.save_every=2000")
  for line in process.stdout:
    if line.startswith("sft: ..."):
      break
  time.sleep(3)
  process.send_signal(getattr(signal, number))
  began = time.monotonic()
  ended = jobs.wait(process, 60)
  assert ended.code == code and ended.err.count("\n") == 1, ended
  assert time.monotonic() - began < 20
  saved = [p.name for p in (tmp_path / "shared/sft/checkpoints").iterdir()]
  assert any(name.isdigit() for name in saved), saved


@pytest.mark.slow
@pytest.mark.parametrize("at", (2, 5, 9, 16, 28))
def test_killed_after_each_card(tmp_path, at):
  """SIGKILL just after a record is written, at a stage's start or its end."""
  jobs.finished()
  hook = jobs.kill_when("core.artifacts:_write_record", at)
  ended = jobs.wait(jobs.start(tmp_path, hook=hook))
  assert ended.code == -signal.SIGKILL
  assert jobs.run(tmp_path).code == 0
  same(tmp_path)


@pytest.mark.slow
def test_a_damaged_compile_cache_costs_time_alone(tmp_path):
  """Its entries are flipped, cut and emptied: compiled anew, the same job."""
  jobs.finished()
  cache = tmp_path / "xla"
  jobs.shutil.copytree(jobs.folder() / "xla", cache)
  entries = sorted(p for p in cache.iterdir() if p.name.endswith("-cache"))
  assert len(entries) > 3
  for k, path in enumerate(entries):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << (k % 8)
    path.write_bytes([bytes(data), bytes(data[: len(data) // 3]), b""][k % 3])
  ended = jobs.wait(jobs.start(tmp_path / "work", f"compile_cache={cache}"))
  assert ended.code == 0, ended
  wanted, found = jobs.outcome(jobs.finished()), jobs.outcome(tmp_path / "work")
  names = {n.split("/")[-1] for n in jobs.differences(wanted, found)}
  assert names == {"config.json"}  # which names the cache


@pytest.mark.slow
def test_a_relative_workdir_is_one_too(tmp_path, monkeypatch):
  """The README's command has one; orbax alone wants absolute paths."""
  jobs.finished()
  monkeypatch.chdir(tmp_path)
  ended = jobs.run("runs/here")
  assert ended.code == 0, ended
  jobs.check_same(tmp_path / "runs/here")
  assert "nothing was computed" in jobs.run("runs/here").out
