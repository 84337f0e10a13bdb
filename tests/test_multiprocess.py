"""One device, eight, and two processes of four: the same job."""

import os
import re
import signal
import time

import emitters
import jobs
import numpy as np
import pytest
import safetensors.numpy

from jaxalign.core import disk
from jaxalign.data import tables

ARMS = ("isa-0.1-seed0", "random-0.1-seed0")
pytestmark = pytest.mark.slow  # each job of two processes compiles anew


@pytest.fixture(scope="module")
def given():
  """A checkpoint: the export of a finished job."""
  return jobs.finished() / "runs" / ARMS[0] / "export"


# Every writer's last call; of a store each process writes its own shards.
NO_WRITES = """
from jaxalign.core import disk
write = disk.write_bytes
def refuse(path, data):
  assert '/store/' in str(path), f'wrote {path}'
  write(path, data)
disk.write_bytes = refuse
"""


# Notes which rows of the pool's tokens are read at which stage, and which
# tables are read whole. `say` runs in every process, though one speaks.
NOTES = """
import atexit, json
import numpy as np
from jaxalign.core import progress
from jaxalign.data import tables, tokens
stage, read, whole = [""], [], []
def saying(text, say=progress.say):
  if text.endswith(": ..."): stage[0] = text[:-5]
  say(text)
progress.say = saying
class Noted(np.ndarray):
  def __getitem__(self, where):
    rows = np.searchsorted(self.ends, np.arange(len(self))[where], "right")
    read.append([stage[0], np.unique(rows).tolist()])
    return np.asarray(self)[where]
def loading(folder, name, load=tokens.load_rows):
  rows = load(folder, name)
  if name != "pool": return rows
  ids = rows.ids.view(Noted)
  ids.ends = rows.offsets[1:]
  return rows._replace(ids=ids)
tokens.load_rows = loading
def reading(path, table=tables.read_table):
  whole.append([stage[0], str(path)])
  return table(path)
tables.read_table = reading
atexit.register(lambda: open({path!r}, "w").write(json.dumps([read, whole])))
"""


@pytest.fixture(scope="module")
def together(given, tmp_path_factory):
  """The workdir of a job of two processes with four devices each."""
  work = tmp_path_factory.mktemp("together") / "work"
  paths = [repr(str(work.parent / f"read{k}")) for k in range(2)]
  hooks = {k: NOTES.replace("{path!r}", path) for k, path in enumerate(paths)}
  hooks[1] += NO_WRITES
  ended = jobs.together(work, f"model.checkpoint={given}", hooks=hooks)
  assert [e.code for e in ended] == [0, 0], ended
  return work, ended


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
  """The same on one device, and on eight."""
  works, flag = {}, f"model.checkpoint={given}"
  for devices in (1, 8):
    works[devices] = tmp_path_factory.mktemp(f"alone{devices}") / "work"
    env = dict(XLA_FLAGS=emitters.flags(devices))
    ended = jobs.wait(jobs.start(works[devices], flag, env=env))
    assert ended.code == 0, ended
  return works


def subset(work, arm):
  return tables.read_column(work / f"runs/{arm}/subset.parquet", "id")


@pytest.mark.parametrize("arm", ARMS)
def test_the_same_rows_are_chosen_everywhere(together, alone, arm):
  wanted = subset(together[0], arm)
  assert len(wanted) == 16
  for work in alone.values():
    assert subset(work, arm) == wanted


@pytest.mark.parametrize(
  "file",
  [
    "embed/store/embedding.npy",
    "embed/store/logp.npy",
    "mixture/log_likelihood.npy",
    "baseline/samples.jsonl",
    "baseline/held_out_logp.npy",
  ],
)
def test_what_comes_before_training_is_the_same_bits(together, alone, file):
  """From one checkpoint: rows are whole on a device, sums have an order."""
  wanted = (together[0] / "shared" / file).read_bytes()
  for work in alone.values():
    assert (work / "shared" / file).read_bytes() == wanted


@pytest.mark.parametrize("arm", ARMS)
def test_training_and_evaluation_are_close(together, alone, arm):
  """Gradients are summed over other shards: float32 rounding, no more.

  Four updates from the same weights: losses and gradient norms to 2e-5, the
  final parameters to 2e-5 absolute (learning rate 1e-3), shares to a row.
  """

  def read(work):
    folder = work / "runs" / arm
    params = safetensors.numpy.load_file(folder / "export/model.safetensors")
    lines = jobs.lines(folder / "metrics.jsonl")
    return lines, params, jobs.load(folder / "eval.json")

  lines, params, measured = read(together[0])
  for work in alone.values():
    other_lines, other_params, other = read(work)
    assert len(lines) == len(other_lines) == 4
    for a, b in zip(lines, other_lines):
      for name in ("train/loss", "train/grad_norm", "rewards/margins"):
        assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-5), name
    for name, x in params.items():
      np.testing.assert_allclose(
        x, other_params[name], atol=2e-5, rtol=0, err_msg=name
      )
    for name in ("accuracy", "win_vs_target"):
      gap = abs(measured[name]["value"] - other[name]["value"])
      assert gap <= 1.01 / measured[name]["n"]


def test_a_given_checkpoint_is_called_one(together):
  work, (first, _) = together
  text = (work / "report.html").read_text()
  assert "given checkpoint" in first.out and "given checkpoint" in text
  assert "SFT model" not in first.out + text


def test_a_process_reads_its_own_rows_alone(together):
  """Of the pool's tokens: half each, of every batch too; texts once."""
  work, _ = together
  (first, whole), (second, others) = (
    jobs.load(work.parent / f"read{k}") for k in range(2)
  )

  def rows(notes, stage):
    return [i for at, part in notes if at == stage for i in part]

  a, b = rows(first, "embed"), rows(second, "embed")
  assert set(a) | set(b) == set(range(320))
  # A shard has one writer, and so small a pool is one shard; who has none
  # repeats a row of another to be part of the call.
  assert set(a) == set(range(320)) and len(set(b)) <= 2
  # Two arms of four updates on eight pairs: 64 rows an arm, a half each; to
  # pack a row its prompt is read, then its answer.
  a, b = rows(first, "align"), rows(second, "align")
  assert len(a) == len(b) == 2 * (2 * 4 * 8)
  ids = tables.read_column(work / "shared/data/pool.parquet", "id")
  pairs = [list(ids).index(i) for arm in ARMS for i in subset(work, arm)]
  wanted = [2 * i + side for i in pairs for side in (0, 1)]
  # 32 draws from 16 pairs are two epochs: every row twice, by someone.
  assert sorted(a + b) == sorted(4 * wanted)
  assert {at for at, _ in first + second} == {"embed", "align"}
  pool = [at for at, path in whole if path.endswith("pool.parquet")]
  assert pool == ["report"]  # selecting reads the kept rows alone
  assert [p for _, p in others if not p.endswith("held_out.parquet")] == []


def _without_gloo(text):
  """What is left of a process's words when gloo's own are taken out.

  Its threads print by pieces at once: a line may begin in another's middle.
  """
  pieces = (
    r"\[Gloo\] Rank |is connected to|peer ranks\.|"
    r"Expected number of connected peer ranks is :|\b\d+\b"
  )
  return " ".join(re.sub(pieces, "", text).split())


def test_gloos_words_are_known_however_torn():
  said = (
    "[Gloo] Rank [Gloo] Rank 0 is connected to 1 peer ranks. Expected "
    "number of connected peer ranks is : 1\n0 is connected to 0 peer "
    "ranks. Expected number of connected peer ranks is : 0\n"
  )
  assert _without_gloo(said) == ""
  assert _without_gloo(said + "report: 3\n") == "report:"


def test_only_process_0_speaks_and_writes(together):
  """But for orbax, whose every process writes its own shards."""
  work, (first, second) = together
  assert "report:" in first.out and "report:" not in second.out
  assert _without_gloo(second.out) == ""
  # As many files as one process writes, none of them half, none twice.
  files = lambda folder: {
    name
    for p in folder.rglob("*")
    if p.is_file()
    and "/checkpoints/" not in (name := p.relative_to(folder).as_posix())
  }
  names = files(work)
  wanted = {n for n in files(jobs.finished()) if "shared/sft" not in n}
  # A given checkpoint's tokenizer brings its files.
  wanted |= {
    f"shared/data/{n}.json"
    for n in ("tokenizer", "tokenizer_config", "special_tokens_map")
  }
  assert names == wanted
  assert not [n for n in names if ".tmp-" in n]


def test_a_finished_job_of_two_does_nothing_again(together, given):
  work, _ = together
  before = {p: p.stat().st_mtime_ns for p in (work / "shared").rglob("*")}
  ended = jobs.together(work, f"model.checkpoint={given}")
  assert [e.code for e in ended] == [0, 0] and not jobs.did(ended[0])
  assert "everything was finished before" in ended[0].out
  assert before == {p: p.stat().st_mtime_ns for p in before}
  # And one process of eight devices takes it as it is.
  ended = jobs.run(work, f"model.checkpoint={given}")
  assert ended.code == 0 and not jobs.did(ended)


def trouble(work, *flags, hooks=None, within=90):
  """A job that ends soon in both processes; the one in trouble says why."""
  began = time.monotonic()
  ended = jobs.together(work, *flags, hooks=hooks, timeout=within)
  assert time.monotonic() - began < within
  return ended


def test_bad_data_ends_both(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text("no json\n")
  first, second = trouble(tmp_path / "work", f"data.source={path}")
  assert first.code == 65 and "malformed JSON" in first.err
  assert second.code in (65, 75, -signal.SIGABRT), second


@pytest.mark.parametrize(
  "knob, said",
  [
    ("select.sampler=isaa", "unknown sampler"),
    ("model.dtype=int8", "'int8'"),
    ("model.checkpoint=/nowhere", "has no config.json"),
  ],
)
def test_a_wrong_knob_ends_both_alike(tmp_path, knob, said):
  """Before they join: neither waits for the other, and both say it."""
  never = """import jax
def never(**_): raise AssertionError('joined')
jax.distributed.initialize = never
"""
  for ended in trouble(tmp_path / "work", knob, hooks={0: never, 1: never}):
    assert ended.code == 64 and said in ended.err, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1


def test_a_loss_that_is_not_finite_ends_both_alike(tmp_path):
  for ended in trouble(tmp_path, "sft.lr=1e30"):
    assert ended.code == 76 and "Rows of the batch: sft-" in ended.err


def test_a_second_job_of_two_is_refused_in_both(tmp_path):
  with disk.lock(tmp_path):
    first, second = trouble(tmp_path)
  assert first.code == 73 and f"pid {os.getpid()} on" in first.err
  assert second.code == 73 and "in use by another job" in second.err


def broken(act):
  """A hook for trouble while the pool is embedded."""
  return f"""from jaxalign.embed import passes
def broken(*_): {act}
passes._collect = broken
"""


HEARTBEAT = """import jax  # 30 s in earnest
join = jax.distributed.initialize
jax.distributed.initialize = lambda **kwargs: join(
    **kwargs | dict(heartbeat_timeout_seconds=10))
"""


@pytest.mark.parametrize(
  "act, own",
  [
    ("raise ZeroDivisionError('a bug')", 1),
    ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
  ],
  ids=["bug", "killed"],
)
@pytest.mark.parametrize("which", [0, 1])
def test_trouble_in_one_process_ends_the_other(
  tmp_path, given, act, own, which
):
  """With 75 where a collective notices; else the heartbeat aborts it.

  A launcher starts both again: the abort is a signal.
  """
  ended = trouble(
    tmp_path,
    f"model.checkpoint={given}",
    within=60,
    hooks={which: HEARTBEAT + broken(act), 1 - which: HEARTBEAT},
  )
  assert ended[which].code == own
  other = ended[1 - which]
  assert other.code in (75, -signal.SIGABRT), other
  if other.code == 75:
    assert "another process of this job ended" in other.err


def term(stage):
  """A hook that sends a process SIGTERM as a stage begins."""
  return f"""from jaxalign.core import progress
say = progress.say
def saying(text):
  if text == '{stage}: ...': os.kill(os.getpid(), signal.SIGTERM)
  say(text)
progress.say = saying
"""


ONLY_SFT = (
  "from jaxalign.embed import over_pool\n"
  "over_pool._by_reference = lambda *_: sys.exit(0)\n"
)


def test_sigterm_to_one_process_saves_in_both(tmp_path):
  """Within sft: one step is agreed on, saved, and gone on from."""
  flags = ("sft.updates=40", "sft.save_every=30")
  first, second = trouble(tmp_path, *flags, hooks={1: term("sft")})
  assert (first.code, second.code) == (75, 75), (first, second)
  folder = tmp_path / "shared/sft/checkpoints"
  saved = [int(p.name) for p in folder.iterdir() if p.name.isdigit()]
  assert len(saved) == 1 and 0 < saved[0] < 30
  first, second = trouble(tmp_path, *flags, hooks={0: ONLY_SFT, 1: ONLY_SFT})
  assert (first.code, second.code) == (0, 0), (first, second)
  assert f"resumed from step {saved[0]}" in first.out
  assert len(jobs.lines(tmp_path / "shared/sft/metrics.jsonl")) == 40


def test_sigterm_between_stages_stops_both(tmp_path):
  """A stage without steps of its own ends; the next one does not begin."""
  first, second = trouble(tmp_path, hooks={1: term("data")})
  assert (first.code, second.code) == (75, 75), (first, second)
  assert "stopped by SIGTERM" in first.err
  did = jobs.did(first)
  assert did in (["data"], ["data", "sft"])  # the notice takes a moment


def test_a_job_killed_in_both_is_gone_on_from(tmp_path, together, given):
  """In the first arm's training; it ends as the one that nobody killed."""
  flag = f"model.checkpoint={given}"
  hook = jobs.kill_when("core.checkpoints:Checkpoints.save", 1)
  ended = trouble(tmp_path / "work", flag, hooks={0: hook, 1: hook})
  assert {e.code for e in ended} <= {-signal.SIGKILL, 75, -signal.SIGABRT}
  first, second = jobs.together(tmp_path / "work", flag)
  assert (first.code, second.code) == (0, 0), (first, second)
  assert "align isa-0.1-seed0: resumed from step 2" in first.out
  assert not jobs.differences(
    jobs.outcome(together[0]), jobs.outcome(tmp_path / "work")
  )


def test_a_coordinator_that_is_not_there(tmp_path):
  process = jobs.start(
    tmp_path, env=dict(JAXALIGN_NUM_PROCESSES="2", JAXALIGN_PROCESS_ID="1")
  )
  ended = jobs.wait(process, 60)
  assert ended.code == 64 and "JAXALIGN_COORDINATOR" in ended.err
