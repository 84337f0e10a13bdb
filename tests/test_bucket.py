"""A whole job whose workdir, data and checkpoint are on gs://.

The bucket is a folder behind etils' own gs:// backend (see bucket.py), so
`open`, `os.path` or a memory map of such a path fails as it would there, or
leaves a folder "gs:" behind. The arrays of training states are the exception:
orbax's tensorstore speaks to the network by itself, and has a local copy here.
"""

import os

import bucket
import jobs
import pytest
from rows import put, short_pair

from jaxalign.core import artifacts
from jaxalign.data import sources
from jaxalign.embed import store as stores
from jaxalign.model.job import Job

ARM = "isa-0.1-seed0"


@pytest.fixture
def store(tmp_path, monkeypatch):
  """The folder behind gs://b; the current folder stays empty."""
  jobs.finished()  # on the disk
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  bucket.mount(tmp_path / "store", monkeypatch.setattr)
  yield tmp_path / "store" / "b"
  assert os.listdir(tmp_path / "here") == []
  assert not list(tmp_path.rglob("gs:*"))


def differences(wanted, work):
  """Of two outcomes; a store has a file a shard in a bucket alone."""
  found = jobs.differences(wanted, jobs.outcome(work))
  return [name for name in found if "/store/" not in name]


def test_a_job_on_a_bucket_ends_as_one_on_a_disk(store):
  wanted = jobs.outcome(jobs.finished())
  wanted.pop(".lock", None)
  ended = jobs.run("gs://b/work")
  assert ended.code == 0, ended
  assert "report: gs://b/work/report.html" in ended.out
  for name in ("embedding", "logp"):
    here, there = jobs.finished() / "shared/embed/store", "gs://b/work/shared"
    got = stores.read(f"{there}/embed/store", name)
    assert (got == stores.read(here, name)).all()
  assert not differences(wanted, store / "work")
  assert not list(store.rglob("*.tmp-*"))
  # A second run finds it all, digests and all.
  before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
  ended = jobs.run("gs://b/work")
  assert ended.code == 0 and not jobs.did(ended)
  assert "everything was finished before" in ended.out
  assert before == {p: p.stat().st_mtime_ns for p in before}
  # A corrupt file is noticed and repaired there, in a stage of files and in
  # one of checkpoints.
  for stage, name in (
    ("embed", "shared/embed/store/logp/00000.npy"),
    ("sft", "shared/sft/metrics.jsonl"),
  ):
    data = bytearray((store / "work" / name).read_bytes())
    data[-3] ^= 1
    (store / "work" / name).write_bytes(data)
    ended = jobs.run("gs://b/work")
    assert ended.code == 0 and jobs.did(ended) == [stage]
    assert not differences(wanted, store / "work")


@pytest.mark.slow
def test_a_job_killed_on_a_bucket_is_resumed(store, monkeypatch):
  """In the first arm's training, after a checkpoint."""
  real, saves = bucket.Mirrored.save, []

  def save(self, *args):
    real(self, *args)
    saves.append(args[0])
    if "/runs/" in str(self.remote):
      raise jobs.Stop

  monkeypatch.setattr(bucket.Mirrored, "save", save)
  assert jobs.run("gs://b/work").code is None
  monkeypatch.setattr(bucket.Mirrored, "save", real)
  ended = jobs.run("gs://b/work")
  assert ended.code == 0 and f"align {ARM}: resumed from step 2" in ended.out
  wanted = jobs.outcome(jobs.finished())
  wanted.pop(".lock", None)
  assert not differences(wanted, store / "work")


# These name the model and its source.
NAMED = (
  "config.json data_summary.json report.json data.json .lock selection.json "
  "selection.html"
).split()


@pytest.mark.slow
def test_data_and_checkpoint_on_a_bucket(store, tmp_path, monkeypatch):
  """The same files on a disk give the same rows, log-probs and policy."""
  given = jobs.finished() / "runs" / ARM / "export"
  jobs.shutil.copytree(given, store / "model")
  rows = [short_pair(i) for i in range(120)]
  for folder in (store / "rows", tmp_path / "rows"):
    folder.mkdir(parents=True)
    for k in range(2):
      put(folder / f"{k}.jsonl", rows[k::2])
  knobs = ("select.budget=0.5", "compare=()", "profile.steps=(1,3)")

  def run(work, rows, model):
    given = f"data.source={rows}/*.jsonl", f"model.checkpoint={model}"
    ended = jobs.run(work, *given, *knobs)
    assert ended.code == 0, ended

  run("gs://b/work", "gs://b/rows", "gs://b/model")
  monkeypatch.undo()
  run(tmp_path / "work", tmp_path / "rows", given)
  for name in differences(jobs.outcome(tmp_path / "work"), store / "work"):
    free = "/profile/" in name or "/records/" in name
    assert free or name.split("/")[-1] in NAMED, name
  for work in (tmp_path / "work", store / "work"):  # the trace is in its place
    assert list(work.glob("runs/*/profile/**/*.xplane.pb"))


@pytest.mark.parametrize(
  "source, words",
  [
    ("gs://b/none.jsonl", "gs://b/none.jsonl is missing"),
    ("gs://b/rows", "ends in none of"),
    ("gs://b/none-*.jsonl", "matches no file"),
  ],
)
def test_a_source_that_is_not_in_the_bucket(store, source, words):
  ended = jobs.run("gs://b/work", f"data.source={source}")
  assert ended.code in (64, 65) and words in ended.err
  assert not store.exists()


def test_token_rows_of_a_bucket_are_bytes_not_maps(store):
  jobs.shutil.copytree(jobs.finished() / "shared", store / "work/shared")
  job = Job.__new__(Job)
  job.shared = artifacts.epath.Path("gs://b/work/shared")
  local = Job.__new__(Job)
  local.shared = jobs.finished() / "shared"
  for found, wanted in zip(job.tokens("pool"), local.tokens("pool")):
    assert found.tolist() == wanted.tolist()
  assert job.column("pool", "id") == local.column("pool", "id")
  assert sources.source_digest("gs://b/work/shared/data/pool.parquet") == (
    sources.source_digest(f"{local.shared}/data/pool.parquet")
  )


@pytest.mark.slow
def test_compiled_programs_are_kept_in_a_bucket(store):
  """A process of its own: jax opens one compile cache a process."""
  hook = (
    f"sys.path.insert(0, {str(jobs.ROOT / 'tests')!r})\n"
    f"import bucket\nbucket.mount({str(store.parent)!r})\n"
  )
  ended = jobs.wait(
    jobs.start("gs://b/work", "compile_cache=gs://b/xla", hook=hook)
  )
  assert ended.code == 0, ended
  assert len(list(store.glob("xla/*-cache"))) > 3
