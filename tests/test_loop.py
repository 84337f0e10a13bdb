"""A killed run is resumed bit for bit; NaN and damage are named, never kept."""

import functools
import json
import os
import shutil
import signal
import types

import flat
import jax
import jobs
from models import draw, make_mesh, put, sized
import numpy as np
import pytest

from jaxalign.core import checkpoints, disk, interrupt, sharding
from jaxalign.core.errors import NumericError, RestartError
from jaxalign.data import tokens as tokens_lib
from jaxalign.model import decoder
from jaxalign.train import feed, log, loop, optim
from jaxalign.train import step as steps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import find, LOSSES

MODEL = sized(1, 8, 2, 2, 4, 8, 16, 12)
UPDATES, SAVE_EVERY = 6, 2
RATES = ("tokens_per_s", "distinct_tokens_per_s", "rows_per_s")
TIMES = ("time", *(f"perf/{n}" for n in RATES))


pytestmark = pytest.mark.usefixtures("quick_compiles")


class Killed(Exception):
  """Stands for a power cut."""


@functools.lru_cache
def rows():
  rng = np.random.default_rng(0)
  ids = [rng.integers(3, 16, rng.integers(5, 12)) for _ in range(22)]
  tokens = tokens_lib.TokenRows(
    np.concatenate(ids).astype(np.int32),
    np.cumsum([0] + [len(i) for i in ids]),
    np.array([len(i) - 2 for i in ids], np.int32),
    np.zeros(22, np.int32),
  )
  sums = np.float32(rng.normal(-6, 1, (11, 2)))
  return flat.train_rows(tokens, 2, sums, 2.0)


@functools.lru_cache
def train_step(name="dpo+0.2*sft"):
  tx = optim.make_optimizer(clip=1.0, weight_decay=0.0, b2=0.98)
  logps_fn = PRODUCERS["chunked"](MODEL, 5)
  return steps.make_train_step(logps_fn, find(name), tx), tx


def fresh(mesh):
  return steps.init_state(put(mesh, MODEL, draw(MODEL, 5)), train_step()[1])


def run(mesh, folder, at=None, seen=None, **changes):
  """`loop.run_updates`; `at(step)` is called before a batch is made."""
  fed = feed_of(mesh)
  batch_at = fed.batch_at

  def watched(step):
    if seen is not None:
      seen.append(step)
    return (at and at(step, batch_at)) or batch_at(step)

  fed.batch_at = watched
  options = options_of(folder, **changes)
  return loop.run_updates(fresh(mesh), train_step()[0], fed, options)


def kill(k):
  """`at` of a run that is killed before the batch of step k."""

  def at(step, _):
    if step == k:
      raise Killed

  return at


def killed(mesh, folder, k, **changes):
  with pytest.raises(Killed):
    run(mesh, folder, kill(k), **changes)


def resumed(mesh, folder, whole, steps):
  """Runs on to the end of `whole`, bit for bit, by these steps."""
  seen = []
  same(run(mesh, folder, seen=seen), folder, whole)
  assert seen == list(steps)


def options_of(folder, **changes):
  options = loop.TrainOptions(folder, "align", UPDATES, SAVE_EVERY)
  return options._replace(**changes)


def feed_of(mesh, of=None, accumulation=1):
  batching = feed.Batching(4, 3, accumulation, 12)
  rate = lambda step: 0.01 * (step + 1)
  return feed.Feed(mesh, of or rows(), batching, rate)


def reference_of(batch, change):
  """The batch with another reference: `change(sums)` works in place."""
  sums = np.asarray(batch.ref.sum).copy()
  change(sums)
  mesh = batch.ref.sum.sharding.mesh
  sums = sharding.put(mesh, sums, None, "batch")
  return batch.replace(ref=batch.ref.replace(sum=sums))


def log_of(folder):
  """The log's lines without their times, and that the times are there."""
  lines = jobs.lines(folder / "metrics.jsonl")
  for line in lines:
    assert all(line.pop(t) >= 0 for t in TIMES)
  return lines


def saved(folder):
  return sorted(
    int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()
  )


@pytest.fixture
def whole(mesh, once_a_mesh):
  """An uninterrupted run on this mesh: (state, log, folder)."""

  def make(folder):
    state = jax.device_get(run(mesh, folder))
    assert saved(folder) == [4, 6]  # the newest two
    return state, log_of(folder), folder

  return once_a_mesh(mesh, make)


def same(state, folder, whole):
  for a, b in zip(
    jax.tree.leaves(jax.device_get(state)),
    jax.tree.leaves(whole[0]),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  assert log_of(folder) == whole[1]


@pytest.fixture
def golden(alone, once_a_mesh):
  return whole.__wrapped__(alone, once_a_mesh)


def test_the_log_of_a_whole_run(whole):
  _, log, _ = whole
  assert [x["step"] for x in log] == list(range(UPDATES))
  assert [x["train/lr"] for x in log] == pytest.approx(
    [0.01 * (s + 1) for s in range(UPDATES)]
  )
  for name in (
    "train/loss",
    "train/grad_norm",
    "train/nll",
    "train/preference_loss",
    "rewards/margins",
    "logps/chosen",
  ):
    assert all(np.isfinite(x[name]) for x in log), name
  assert log[-1]["train/loss"] < log[0]["train/loss"]


def test_a_finished_run_does_nothing(golden, alone):
  resumed(alone, golden[2], golden, [])


# Killed.


@pytest.mark.parametrize(
  "k,first", [(0, 0), (3, 2), (4, 4)], ids=["first", "middle", "after-a-save"]
)
def test_a_killed_run_is_resumed_bit_for_bit(mesh, whole, tmp_path, k, first):
  killed(mesh, tmp_path, k)
  resumed(mesh, tmp_path, whole, range(first, UPDATES))


@pytest.mark.parametrize("where", ["log", "torn", "arrays", "manifest"])
def test_killed_inside_a_save(golden, alone, tmp_path, monkeypatch, where):
  """Before or within the log, before the arrays, before the digests of
  step 4."""
  count = dict(log=0, arrays=0, manifest=0)

  def dying(name, real):
    def call(*args, **kwargs):
      count[name] += 1
      if name == where and count[name] == 2:
        raise Killed
      return real(*args, **kwargs)

    return call

  real = log.Log.write

  def torn(self):
    there = self.written
    real(self)
    if there:
      with open(self.path, "rb+") as file:
        file.truncate(os.path.getsize(self.path) - 40)
      raise Killed

  with monkeypatch.context() as patch:
    write_log = torn if where == "torn" else dying("log", real)
    patch.setattr(log.Log, "write", write_log)
    plain = disk.write_bytes
    digests = dying("manifest", plain)

    def write(path, data):
      in_log = str(path).endswith("metrics.jsonl")
      return (plain if in_log else digests)(path, data)

    patch.setattr(disk, "write_bytes", write)
    save = dying("arrays", checkpoints.Checkpoints.save)
    patch.setattr(checkpoints.Checkpoints, "save", save)
    with pytest.raises(Killed):
      run(alone, tmp_path)
  resumed(alone, tmp_path, golden, [2, 3, 4, 5])


def test_killed_again_and_again(golden, alone, tmp_path):
  for k in (1, 3, 5):
    killed(alone, tmp_path, k)
  resumed(alone, tmp_path, golden, [4, 5])


@pytest.mark.parametrize(
  "number,error",
  [(signal.SIGTERM, RestartError), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_saves_first(golden, alone, tmp_path, number, error):
  before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
  interrupt.install()

  def at(step, _):
    if step == 2:
      os.kill(os.getpid(), number)

  try:
    with pytest.raises(error):
      run(alone, tmp_path, at)
  finally:
    interrupt.install()  # forgets the signal
    for s, handler in before.items():
      signal.signal(s, handler)
  assert saved(tmp_path) == [2, 3]  # the step in flight was finished
  assert [x["step"] for x in log_of(tmp_path)] == [0, 1, 2]
  resumed(alone, tmp_path, golden, [3, 4, 5])


def test_how_often_it_saves_changes_nothing(golden, alone, tmp_path):
  same(run(alone, tmp_path, save_every=100), tmp_path, golden)
  assert saved(tmp_path) == [6]


def test_a_save_writes_the_new_lines_alone(
  golden, alone, tmp_path, monkeypatch
):
  """Whole once, then longer: at 100,000 lines a save is no slower."""
  whole, sizes = [], []
  real, save = disk.write_bytes, checkpoints.Checkpoints.save

  def write(path, data):
    if str(path).endswith("metrics.jsonl"):
      whole.append(data.count(b"\n"))
    real(path, data)

  def saving(self, step, items):
    sizes.append(len((tmp_path / "metrics.jsonl").read_text().splitlines()))
    save(self, step, items)

  monkeypatch.setattr(disk, "write_bytes", write)
  monkeypatch.setattr(checkpoints.Checkpoints, "save", saving)
  same(run(alone, tmp_path), tmp_path, golden)
  assert whole == [2] and sizes == [2, 4, 6]


# Time.


def test_writing_is_in_no_update_s_time(alone, tmp_path, monkeypatch):
  """By a clock that a batch moves by 1 s and a save by 100 s.

  An update's time is from the metrics before it to its own, and one step is in
  flight: the first line has two batches, one behind a save its own alone.
  """
  clock = [0.0]
  monkeypatch.setattr(
    loop, "time", types.SimpleNamespace(monotonic=lambda: clock[0])
  )
  save = checkpoints.Checkpoints.save

  def slow(*args):
    clock[0] += 100
    save(*args)

  def at(step, _):
    clock[0] += 1

  monkeypatch.setattr(checkpoints.Checkpoints, "save", slow)
  distinct = feed_of(alone).distinct_at
  run(alone, tmp_path, at, save_every=3)
  lines = jobs.lines(tmp_path / "metrics.jsonl")
  # The metrics of a saved step are read at once: no second later.
  seconds = [2, 1, 0, 2, 1, 0]
  assert [round(4 / x["perf/rows_per_s"]) for x in lines] == seconds
  for step, line in enumerate(lines):
    took = max(seconds[step], 1e-9)
    if seconds[step]:
      assert line["perf/distinct_tokens_per_s"] == distinct(step) / took


def test_a_prompt_is_counted_once_or_with_each_answer():
  """Pairs of prompts 3 and 5 with answers (1, 4) and (2, 2)."""
  lengths, start = [4, 7, 7, 7], [3, 3, 5, 5]
  tokens = tokens_lib.TokenRows(
    np.full(25, 5, np.int32),
    np.cumsum([0, *lengths]),
    np.array(start, np.int32),
    np.zeros(4, np.int32),
  )
  pairs = flat.train_rows(tokens, 2)
  fed = feed.Feed(make_mesh(), pairs, feed.Batching(2, 0, context=12))
  assert (fed.distinct_at(0), fed.tokens_at(0)) == (3 + 5 + 5 + 4, 25)


# The profile.


def test_a_profile_is_begun_and_ended_wherever_a_run_is(alone, tmp_path):
  """Killed within the window, resumed within it, and ended before its end: jax
  has one profile at a time, so one left open is an error."""
  traces = lambda: len(list((tmp_path / "profile").rglob("*.xplane.pb")))
  killed(alone, tmp_path, 5, trace=(2, 6))
  assert traces() == 1
  shutil.rmtree(tmp_path / "profile")
  assert run(alone, tmp_path, trace=(2, 100)).step == UPDATES  # from 4
  assert traces() == 1
  jax.profiler.start_trace(str(tmp_path / "another"))
  jax.profiler.stop_trace()


# Not a number.


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_nan_is_named_and_nothing_after_it_is_kept(golden, alone, tmp_path, k):
  def at(step, batch_at):
    if step == k:
      nan = lambda sums: sums.__setitem__((0, 1, 0), np.nan)
      return reference_of(batch_at(step), nan)

  with pytest.raises(NumericError) as caught:
    run(alone, tmp_path, at)
  text, kept = str(caught.value), SAVE_EVERY * (k // SAVE_EVERY)
  assert f"align: loss nan, gradient norm nan at step {k}; " in text
  assert f"nothing after step {kept} is saved" in text
  ids_at = feed_of(alone).ids_at
  assert ", ".join(ids_at(k)) in text and caught.value.exit_code == 76
  assert max(saved(tmp_path), default=0) == kept
  if kept:
    assert [x["step"] for x in log_of(tmp_path)] == list(range(kept))
  else:
    assert not (tmp_path / "metrics.jsonl").exists()
  # The way there is kept, and all of the rows.
  path = tmp_path / "diverged.jsonl"
  assert f"{path} has all of them" in text
  *before, last = [
    json.loads(x, parse_constant=pytest.fail)
    for x in path.read_text().splitlines()
  ]
  for line, wanted in zip(before, golden[1][kept:k], strict=True):
    assert wanted.items() <= line.items()
  assert (last["step"], last["train/loss"], last["ids"]) == (k, None, ids_at(k))
  assert last["train/lr"] == pytest.approx(0.01 * (k + 1))
  assert f"at step {k}" in last["why"]
  # With the row repaired the run ends as if nothing had been.
  same(run(alone, tmp_path), tmp_path, golden)
  assert not path.exists()


def test_an_infinite_gradient_stops_a_finite_loss(alone, tmp_path):
  real = train_step()[0]

  def broken(state, batch):
    state, totals = real(state, batch)
    return state, totals | {"grad_norm": np.array([np.inf, 1.0])}

  options = options_of(tmp_path, updates=2, save_every=1)
  with pytest.raises(NumericError, match="gradient norm inf at step 0"):
    loop.run_updates(fresh(alone), broken, feed_of(alone), options)
  assert saved(tmp_path) == []


# Damage.


def stop_at_5(alone, folder):
  killed(alone, folder, 5)
  assert saved(folder) == [2, 4]


def files_of(folder, step):
  return sorted(
    p
    for p in (folder / "checkpoints" / str(step)).rglob("*")
    if p.is_file() and p.stat().st_size
  )


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


def test_one_flipped_bit_falls_back_a_save(golden, alone, tmp_path, capsys):
  stop_at_5(alone, tmp_path)
  flip(max(files_of(tmp_path, 4), key=lambda p: p.stat().st_size))
  capsys.readouterr()
  resumed(alone, tmp_path, golden, [2, 3, 4, 5])
  out = capsys.readouterr().out
  assert "checkpoint 4 in" in out and "damaged" in out
  assert "align: resumed from step 2" in out


def test_a_flip_anywhere_is_seen(alone, tmp_path):
  stop_at_5(alone, tmp_path)
  files = files_of(tmp_path, 4)
  assert len(files) > 3
  with checkpoints.Checkpoints(tmp_path / "checkpoints") as found:
    assert found.verified(4)
    for path in files:
      data = path.read_bytes()
      flip(path)
      assert not found.verified(4), path
      path.write_bytes(data)
    path.unlink()
    assert not found.verified(4)
    path.write_bytes(data)
    assert found.verified(4)
    manifest = tmp_path / "checkpoints" / "4.digests.json"
    manifest.write_text(manifest.read_text()[:-20])
    assert not found.verified(4)


def test_nothing_whole_starts_anew(golden, alone, tmp_path):
  stop_at_5(alone, tmp_path)
  for step in (2, 4):
    flip(files_of(tmp_path, step)[0])
  resumed(alone, tmp_path, golden, range(UPDATES))


def test_a_torn_log_line_is_dropped(golden, alone, tmp_path):
  stop_at_5(alone, tmp_path)
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 4, "tr')
  resumed(alone, tmp_path, golden, [4, 5])


def test_parameters_alone_are_restored_on_another_mesh(golden):
  state, _, folder = golden
  mesh = sharding.make_mesh(dict(fsdp=4, tensor=2))
  with jax.set_mesh(mesh):
    found = checkpoints.restore_params(
      folder / "checkpoints", decoder.abstract(MODEL, mesh)
    )
  for n, p in decoder.table(MODEL).items():
    np.testing.assert_array_equal(found[n], state.params[n])
    assert found[n].sharding == sharding.named_sharding(mesh, *p.axes)


# A loss with a running mean.


def bco_run(mesh, folder, killed_at=None):
  """`run` on the same tokens as unpaired."""
  one = rows()
  unpaired = flat.train_rows(
    one.tokens,
    1,
    one.ref_sum.reshape(22, 1),
    one.ref_count.reshape(22, 1),
    label=np.arange(22) % 3 == 0,
  )
  fed = feed_of(mesh, unpaired, accumulation=2)
  batch_at, at = fed.batch_at, kill(killed_at)
  fed.batch_at = lambda step: at(step, None) or batch_at(step)
  step, tx = train_step("bco")
  state = steps.init_state(fresh(mesh).params, tx, LOSSES["bco"])
  return loop.run_updates(state, step, fed, options_of(folder))


def test_a_killed_run_keeps_its_running_mean(alone, tmp_path):
  state = jax.device_get(bco_run(alone, tmp_path / "whole"))
  log = log_of(tmp_path / "whole")
  assert state.statistics["delta"].count == 4 * UPDATES
  assert log[-1]["train/delta"] == float(state.statistics["delta"].mean)
  assert len({x["train/delta"] for x in log}) == UPDATES
  with pytest.raises(Killed):
    bco_run(alone, tmp_path / "killed", 5)
  again = bco_run(alone, tmp_path / "killed")
  same(again, tmp_path / "killed", (state, log))
