"""Stages, their records, their bytes; locks; files written whole."""

import json
import multiprocessing
import os
import pathlib
import signal
import time

import jobs
import numpy as np
import pytest

from jaxalign.core import artifacts, disk, errors
from jaxalign.core.artifacts import Description
from jaxalign.core.checkpoints import Checkpoints
from jaxalign.model import job as job_lib
from jaxalign.model.job import arm_folder


def run(folder, make, fields=None, inputs={}, redo=False, resumes=()):
  how = Description(fields or dict(a=1), inputs, redo, resumes)
  return artifacts.run_stage(folder, "one", how, make)


def stage(folder, fields=None, *, content=b"first", fail=None, **how):
  """Runs a stage of two files; returns its record, and how often it ran."""
  ran = []

  def make(folder):
    ran.append(1)
    disk.write_bytes(folder / "part" / "file", b"begun")
    if fail:
      raise fail
    disk.write_bytes(folder / "part" / "file", content)
    disk.write_bytes(folder / "other", content * 2)
    return ["part", "other"], artifacts.Cost(7), dict(rows=3)

  return run(folder, make, fields, **how), len(ran)


def look(folder, fields=None, **how):
  """Runs a stage of one file; returns whether there was something of it."""
  seen = []

  def make(folder):
    seen.append((folder / "part").exists())
    disk.write_bytes(folder / "part" / "file", b"x")
    return ["part"], artifacts.Cost(), {}

  run(folder, make, fields, resumes=("part",), **how)
  return seen == [True]


def test_a_stage_runs_once(tmp_path, capsys):
  record, ran = stage(tmp_path)
  assert ran == 1 and not record.skipped and record.finished
  assert record.cost.flops == 7 and record.cost.bytes == 15
  again, ran = stage(tmp_path)
  assert ran == 0 and again.skipped and again.result == dict(rows=3)
  assert again.key == record.key and again.outputs == record.outputs
  assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(fields=dict(a=2)), "a was 1, now 2"),
    (dict(fields=dict(a=1, b=0)), "b was None, now 0"),
  ],
)
def test_another_config_is_refused_until_redo(tmp_path, change, words):
  stage(tmp_path)
  with pytest.raises(errors.ConfigError) as caught:
    stage(tmp_path, **change)
  for word in (words, "--redo", "--workdir", str(tmp_path)):
    assert word in str(caught.value)
  assert (tmp_path / "other").read_bytes() == b"firstfirst"  # nothing touched
  record, ran = stage(tmp_path, **change, redo=True, content=b"second")
  assert ran == 1 and (tmp_path / "other").read_bytes() == b"secondsecond"
  assert stage(tmp_path, **change)[1] == 0


def test_other_bytes_of_an_input_make_a_stage_stale(tmp_path, capsys):
  stage(tmp_path)
  record, ran = stage(tmp_path, inputs=dict(data="k"), content=b"second")
  assert ran == 1 and (tmp_path / "other").read_bytes() == b"secondsecond"
  assert "data has other bytes now" in capsys.readouterr().out
  assert stage(tmp_path, inputs=dict(data="k"))[1] == 0


@pytest.mark.parametrize(
  "corrupt, words",
  [
    (lambda f: (f / "other").unlink(), "other is missing"),
    (lambda f: (f / "other").write_bytes(b"firstfirsT"), "other has other"),
    (lambda f: (f / "part" / "file").write_bytes(b""), "part/file has other"),
  ],
)
def test_corrupt_files_are_made_again(tmp_path, capsys, corrupt, words):
  stage(tmp_path)
  corrupt(tmp_path)
  assert stage(tmp_path)[1] == 1
  assert words in capsys.readouterr().out
  assert (tmp_path / "other").read_bytes() == b"firstfirst"
  assert stage(tmp_path)[1] == 0


def test_every_bit_of_a_record_counts(tmp_path, capsys):
  """A record is not believed unless its own digest agrees."""
  stage(tmp_path)
  path = tmp_path / "records" / "one.json"
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  for at in rng.choice(len(whole), 40, replace=False):
    data = bytearray(whole)
    data[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(data))
    try:  # a bit in white space changes nothing
      same = json.loads(bytes(data)) == json.loads(whole)
    except ValueError:
      same = False
    damaged = artifacts.read_record(tmp_path, "one").key == artifacts.DAMAGED
    assert damaged != same, (at, bytes(data))
  assert stage(tmp_path)[1] == int(not same)
  path.write_bytes(whole[:40])
  assert stage(tmp_path)[1] == 1
  assert "its record has other bytes" in capsys.readouterr().out


def test_an_unfinished_stage_is_resumed_only_by_its_own_config(tmp_path):
  """A killed sft must not hand its checkpoint to another learning rate."""
  killed = dict(fail=KeyboardInterrupt(), resumes=("part",))
  with pytest.raises(KeyboardInterrupt):
    stage(tmp_path, **killed)
  assert not artifacts.read_record(tmp_path, "one").finished
  words = "an unfinished one made from another config: a was 1, now 2"
  with pytest.raises(errors.ConfigError, match=words):
    look(tmp_path, dict(a=2))
  with pytest.raises(KeyboardInterrupt):
    stage(tmp_path, **killed)
  assert look(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    stage(tmp_path, dict(a=3), redo=True, **killed)
  assert not look(tmp_path, dict(a=2), redo=True)


def test_a_stage_that_failed_with_nothing_to_lose_may_change(tmp_path):
  """A misspelt file name, a loss of NaN at once: mend the knob, run again."""
  with pytest.raises(errors.DataError):
    stage(tmp_path, fail=errors.DataError("bad"))
  assert stage(tmp_path, dict(a=2))[1] == 1
  with pytest.raises(errors.ConfigError):  # but not what was finished
    stage(tmp_path, dict(a=3))


def test_leftovers_without_a_record_are_not_resumed(tmp_path):
  stage(tmp_path, resumes=("part",))
  (tmp_path / "records" / "one.json").unlink()
  assert not look(tmp_path)


def test_half_written_files_are_swept(tmp_path):
  (tmp_path / ".other.tmp-4242").write_bytes(b"half")
  record, _ = stage(tmp_path)
  names = sorted(p.name for p in tmp_path.iterdir())
  assert names == ["other", "part", "records"]
  assert sorted(record.outputs) == ["other", "part/file"]


@pytest.fixture
def outside(tmp_path):
  """A folder beside the stage's, with somebody's files; they must stay."""
  folder = tmp_path / "outside"
  (folder / "deep").mkdir(parents=True)
  for name in ("mine", "deep/mine", "deep/.x.tmp-1"):
    (folder / name).write_bytes(b"somebody's")
  yield folder
  assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) == [
    "deep",
    "deep/.x.tmp-1",
    "deep/mine",
    "mine",
  ]
  for path in folder.rglob("*"):
    assert path.is_dir() or path.read_bytes() == b"somebody's"


def forge(folder, **change):
  """Rewrites a record's facts, its own digest included."""
  path = folder / "records/one.json"
  raw = json.loads(path.read_text()) | change
  raw.pop("digest")
  raw["digest"] = artifacts._digest_of(raw)
  path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
  "name",
  [
    "../outside/mine",
    "..",
    "../outside",
    "part/../../outside/mine",
    "",
    ".",
    "part//file",
    "{outside}/mine",
    "/",
    "part/link/mine",
    "link/mine",
    "link",
    "part\\file",
    "a\0b",
    "../stage/other",
  ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_record_that_names_what_is_not_its_own(
  tmp_path, outside, monkeypatch, name, finished
):
  """It is not believed; nothing outside is removed, or so much as read."""
  folder = tmp_path / "stage"
  stage(folder)
  (folder / "link").symlink_to(outside)
  (folder / "part/link").symlink_to(outside / "deep")
  what = disk.digest(outside / "mine")
  forge(
    folder,
    finished=finished,
    outputs={
      name.format(outside=outside): what,
      "other": disk.digest(folder / "other"),
    },
  )
  read = []
  real = disk.digest
  monkeypatch.setattr(
    disk,
    "digest",
    lambda path: read.append(os.path.realpath(path)) or real(path),
  )
  assert "link" in name or (
    artifacts.read_record(folder, "one").key == artifacts.DAMAGED
  )
  record, ran = stage(folder, resumes=("part",))
  assert ran == 1 and set(record.outputs) == {"part/file", "other"}
  assert not [path for path in read if str(outside) in path]
  assert stage(folder)[1] == 0


@pytest.mark.parametrize("fields", [None, dict(a=2)])
def test_links_in_place_of_what_a_stage_made(tmp_path, outside, fields):
  """Removed as links, whether of a file, a folder or the records."""
  folder = tmp_path / "stage"
  stage(folder)
  jobs.shutil.rmtree(folder / "part")
  (folder / "part").symlink_to(outside / "deep")
  (folder / "other").unlink()
  (folder / "other").symlink_to(outside / "mine")
  record, ran = stage(folder, fields, redo=bool(fields))
  assert ran == 1 and record.outputs["part/file"]["bytes"] == 5
  assert not (folder / "part").is_symlink()
  assert not (folder / "other").is_symlink()
  assert stage(folder, fields)[1] == 0


def test_an_unfinished_stage_is_not_resumed_from_a_link(tmp_path, outside):
  folder = tmp_path / "stage"
  with pytest.raises(ZeroDivisionError):
    stage(folder, resumes=("part",), fail=ZeroDivisionError())
  jobs.shutil.rmtree(folder / "part")
  (folder / "part").symlink_to(outside / "deep")
  assert not look(folder) and not (folder / "part").is_symlink()


def test_records_that_lie_elsewhere_are_not_believed(tmp_path, outside):
  folder = tmp_path / "stage"
  stage(folder)
  (tmp_path / "records").mkdir()
  (folder / "records/one.json").rename(tmp_path / "records/one.json")
  (folder / "records").rmdir()
  (folder / "records").symlink_to(tmp_path / "records")
  before = (tmp_path / "records/one.json").read_bytes()
  assert stage(folder)[1] == 1 and not (folder / "records").is_symlink()
  assert (tmp_path / "records/one.json").read_bytes() == before
  assert stage(folder)[1] == 0


def test_a_folder_may_itself_be_a_link(tmp_path, outside):
  """A workdir on a larger disk."""
  (tmp_path / "disk").mkdir()
  (tmp_path / "stage").symlink_to(tmp_path / "disk")
  assert stage(tmp_path / "stage")[1] == 1
  assert stage(tmp_path / "stage")[1] == 0


def test_a_manifest_names_only_its_own_files(tmp_path, outside):
  want, name = disk.digest(outside / "mine"), "../outside/mine"
  bad = disk.corrupt(tmp_path / "stage", {name: want})
  assert bad == [f"{name!r} leads out of its folder"]
  assert not disk.corrupt(tmp_path, {"outside/mine": want})


@pytest.mark.parametrize(
  "change",
  [
    dict(outputs={"other": 3}),
    dict(outputs={"other": {}}),
    dict(outputs=[]),
    dict(outputs=None),
    dict(cost=3),
    dict(cost=dict(seconds="x")),
    dict(fields=3),
    dict(inputs=[]),
    dict(result=None),
    dict(stage="two"),
    dict(extra=1),
  ],
)
def test_a_record_of_wrong_types_is_damaged(tmp_path, change):
  stage(tmp_path)
  forge(tmp_path, **change)
  assert artifacts.read_record(tmp_path, "one").key == artifacts.DAMAGED
  assert stage(tmp_path)[1] == 1


def test_a_record_that_is_no_record(tmp_path):
  for text in ("", "null", "[]", "3", "{}", "[" * 99_999, '"\\ud800"', "\xff"):
    stage(tmp_path)
    (tmp_path / "records/one.json").write_text(text, encoding="latin-1")
    assert stage(tmp_path)[1] == 1


def test_a_key_depends_on_everything():
  parts = [
    ("one", dict(a=1), dict(b="x")),
    ("two", dict(a=1), dict(b="x")),
    ("one", dict(a=2), dict(b="x")),
    ("one", dict(a=1), dict(b="y")),
    ("one", dict(a=1, c=None), dict(b="x")),
  ]
  keys = [artifacts.key_of(*part) for part in parts]
  assert keys == [artifacts.key_of(*part) for part in parts]
  assert len(set(keys)) == 5


def test_fields_are_compared_as_json_holds_them(tmp_path):
  stage(tmp_path, dict(steps=(0, 0), lr=1e-3))
  assert stage(tmp_path, dict(steps=[0, 0], lr=0.001))[1] == 0


def test_nan_is_no_json(tmp_path):
  with pytest.raises(ValueError):
    disk.write_json(tmp_path / "x.json", dict(a=float("nan")))
  assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "x"
  disk.write_bytes(path, b"old")

  def full(file):
    file.write(b"n")
    raise OSError(28, "No space left on device")

  with pytest.raises(errors.WriteError, match=f"{path}: No space left"):
    disk.write_through(path, full)
  assert [p.name for p in tmp_path.iterdir()] == ["x"]
  assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
  "blocked", ["", "shared", "shared/data", "shared/sft", "runs"]
)
def test_a_file_in_place_of_a_folder_is_73(tmp_path, monkeypatch, blocked):
  """Root may write anywhere: it stands for a folder without permission."""
  work = tmp_path / "work"
  path = work / blocked
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("no folder")
  if blocked == "runs":
    run = job_lib.Job.run
    only = lambda job, stage, arm=None, folder=None: (
      artifacts.run_stage(arm_folder(job, arm), "select", Description({}), None)
      if arm
      else run(job, stage)
      if stage == "data"
      else None
    )
    monkeypatch.setattr(job_lib.Job, "run", only)
  ended = jobs.run(work)
  assert ended.code == 73, ended
  assert str(path) in ended.err and "--workdir" in ended.err
  assert ended.err.count("\n") == 1


@pytest.fixture
def full_disk(tmp_path):
  """A file system of a megabyte; skips where none can be mounted."""
  folder = tmp_path / "disk"
  folder.mkdir()
  if os.system(f"mount -t tmpfs -o size=1m tmpfs {folder} 2>/dev/null"):
    pytest.skip("no tmpfs can be mounted here")
  try:
    yield folder
  finally:
    os.system(f"umount -l {folder}")


@pytest.mark.slow
@pytest.mark.parametrize(
  "hook",
  [
    "",  # seen before the save
    "from jaxalign.core import checkpoints\n"  # by orbax, amid it
    "checkpoints.Checkpoints._check_space = lambda *_: None\n",
  ],
  ids=["before", "during"],
)
def test_a_full_disk_is_73_and_can_be_gone_on_from(full_disk, hook):
  """The data fits, the checkpoints do not; which write is the first that does
  not depends on the bytes of a page, so any of them may be named."""
  jobs.finished()  # compiles
  work = full_disk / "work"
  ended = jobs.wait(jobs.start(work, hook=hook))
  assert ended.code == 73, ended
  # A thread of orbax's may print in between, without a newline.
  line = ended.err[ended.err.index("error: cannot ") :]
  assert f"{work}/shared/" in line
  assert "bytes, " in line or "No space left on device" in line
  assert os.system(f"mount -o remount,size=9m {full_disk}") == 0
  ended = jobs.run(work)
  assert ended.code == 0, ended
  jobs.check_same(work)


def _hold(workdir, ready, done):
  with disk.lock(workdir):
    ready.set()
    done.wait(60)


@pytest.fixture
def holder(tmp_path):
  """Another process that holds tmp_path."""
  context = multiprocessing.get_context("spawn")
  ready, done = context.Event(), context.Event()
  process = context.Process(target=_hold, args=(tmp_path, ready, done))
  process.start()
  assert ready.wait(60)
  yield process, done
  process.kill()
  process.join()


def test_a_second_job_is_refused_and_told_whose_it_is(tmp_path, holder):
  process, done = holder
  ended = jobs.run(tmp_path)
  assert ended.code == 73 and not jobs.did(ended)
  assert f"pid {process.pid} on {os.uname().nodename}" in ended.err
  assert "--workdir" in ended.err
  done.set()
  process.join(30)
  with disk.lock(tmp_path):  # let go of: free
    pass


def test_the_lock_of_a_killed_job_is_taken_over(tmp_path, holder):
  process, _ = holder
  os.kill(process.pid, signal.SIGKILL)
  process.join(30)
  assert f"pid {process.pid}" in (tmp_path / ".lock").read_text()
  with disk.lock(tmp_path):
    assert f"pid {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_a_lock_is_let_go_of_after_an_error(tmp_path):
  for _ in range(2):
    with pytest.raises(ZeroDivisionError):
      with disk.lock(tmp_path):
        raise ZeroDivisionError
  with disk.lock(tmp_path):
    with pytest.raises(errors.WriteError, match="in use by another job"):
      with disk.lock(tmp_path):
        pass


STAGES = {  # stage -> a file of it
  "data": "shared/data/pool.ids.npy",
  "sft": "shared/sft/metrics.jsonl",
  "embed": "shared/embed/store/embedding.npy",
  "mixture": "shared/mixture/mixture.npz",
  "baseline": "shared/baseline/samples.jsonl",
  "select": "runs/isa-0.1-seed0/subset.parquet",
  "selection_report": "runs/isa-0.1-seed0/selection.html",
  "ref_logps": "runs/isa-0.1-seed0/ref_sum.npy",
  "align": "runs/isa-0.1-seed0/metrics.jsonl",
  "evaluate": "runs/isa-0.1-seed0/eval.json",
  "export": "runs/isa-0.1-seed0/export/model.safetensors",
  "report": "report.html",
}
PAGES = (
  "report.html",
  "summary.json",
  "config.json",
  "runs/isa-0.1-seed0/report.html",
)


def flip(path, seed=0):
  """Flips one bit of a file, somewhere."""
  path = pathlib.Path(path)
  data = bytearray(path.read_bytes())
  rng = np.random.default_rng(seed)
  data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
  path.write_bytes(bytes(data))


def checkpoint_file(work, step="6"):
  """The largest file of a checkpoint: its arrays."""
  folder = work / "shared/sft/checkpoints" / step
  files = [p for p in folder.rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def only(work, stages, file):
  """A run on a corrupt copy does just these stages and repairs everything."""
  ended = jobs.run(work)
  assert ended.code == 0, ended
  assert jobs.did(ended) == stages, ended.out
  jobs.check_same(work)
  assert file in ended.out and "doing this stage again" in ended.out


@pytest.mark.parametrize("stage", [*STAGES, "checkpoint"])
def test_a_flipped_bit_redoes_its_stage_alone(tmp_path, stage):
  work = jobs.copy(tmp_path / "work")
  path, made = STAGES.get(stage), stage
  if path is None:
    path, made = checkpoint_file(work), "sft"
  flip(work / path)
  only(work, [made], pathlib.Path(path).name)


@pytest.mark.parametrize("page", PAGES)
def test_a_corrupt_page_is_made_again_alone(tmp_path, page):
  """And says what it said: what it shows is read from the artifacts."""
  work = jobs.copy(tmp_path / "work")
  before = {
    p: p.stat().st_mtime_ns
    for p in work.rglob("*")
    if p.is_file() and p.name not in (*PAGES, "report.json", ".lock")
  }
  flip(work / page)
  only(work, ["report"], pathlib.Path(page).name)
  assert before == {p: p.stat().st_mtime_ns for p in before}
  if page.startswith("runs/"):  # it holds no time and no command
    assert (work / page).read_bytes() == (jobs.finished() / page).read_bytes()
  ended = jobs.run(work)
  assert ended.code == 0 and not jobs.did(ended)


def test_a_flipped_bit_in_a_record(tmp_path):
  work = jobs.copy(tmp_path / "work")
  path = work / "shared/embed/records/embed.json"
  whole = path.read_text()
  path.write_text(whole.replace('"embed.tile": 8', '"embed.tile": 9'))
  assert path.read_text() != whole
  only(work, ["embed"], "its record")


@pytest.mark.parametrize("steps", [(6,), (4, 6)])
def test_a_flipped_bit_in_a_checkpoint_that_is_resumed(tmp_path, steps):
  """Orbax restores such bytes without a word; their digests tell."""
  work = jobs.copy(tmp_path / "work")
  folder = work / "shared/sft"
  found = artifacts.read_record(folder, "sft")
  found.finished, found.outputs = False, {}
  artifacts._write_record(folder, found)
  for step in steps:
    flip(checkpoint_file(work, str(step)))
  ended = jobs.run(work)
  assert ended.code == 0 and jobs.did(ended) == ["sft"]
  for step in steps:
    assert f"checkpoint {step}" in ended.out
  assert ("resumed from step 4" in ended.out) == (4 not in steps)
  assert ("resumed from" in ended.out) == (4 not in steps)
  jobs.check_same(work)


def test_a_checkpoint_without_its_digests_is_not_believed(tmp_path):
  work = jobs.copy(tmp_path / "work")
  folder = work / "shared/sft/checkpoints"
  (folder / "6.digests.json").write_text("{")
  with Checkpoints(folder) as found:
    assert found.latest() == 4
    assert not list(folder.glob("6*"))


@pytest.mark.slow
def test_a_flipped_bit_in_any_file(tmp_path):
  """Every file of the shared stages and of one arm, checkpoints by kind."""
  work = jobs.copy(tmp_path / "work")
  wanted = jobs.outcome(jobs.finished())
  began, seen = time.monotonic(), 0
  for path in sorted(jobs.finished().rglob("*")):
    name = path.relative_to(jobs.finished()).as_posix()
    if (
      path.is_dir()
      or "/checkpoints/" in name
      or not name.startswith(("shared/", "runs/isa"))
      or not path.stat().st_size
    ):
      continue
    flip(work / name, seen)
    ended = jobs.run(work)
    assert ended.code == 0 and len(jobs.did(ended)) == 1, (name, ended)
    assert not jobs.differences(wanted, jobs.outcome(work)), name
    seen += 1
    if time.monotonic() - began > 100:
      break
  assert seen > 20
