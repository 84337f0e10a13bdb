"""The store: shards with digests, resumed, repaired, refused, read."""

import json
import pathlib
import shutil
import signal
import time

import bucket
import jobs
import numpy as np
import pytest

from jaxalign.core import artifacts
from jaxalign.core.errors import ConfigError, CorruptError
from jaxalign.embed import store as stores
from jaxalign.embed.store import ArraySpec

N, SHARD = 23, 5
IDS = np.array([f"é{i:03d}" for i in range(N)])
COLUMNS = dict(embedding=ArraySpec((2, 3), "bfloat16"), logp=ArraySpec((2,)))
FIELDS = dict(model="a", layers=2)


def arrays():
  rng = np.random.default_rng(0)
  return dict(
    embedding=np.float32(rng.normal(size=(N, 2, 3))),
    logp=np.float32(rng.normal(size=(N, 2))),
  )


def fill(store, shards):
  for shard in shards:
    rows = slice(*store.bounds(shard))
    some = {name: x[rows] for name, x in arrays().items()}
    stores.write_shard(store, shard, IDS, some)


def create(folder, ids=IDS, columns=COLUMNS, fields=FIELDS, shard=SHARD):
  return stores.create(folder, ids, columns, fields=fields, shard=shard)


@pytest.fixture
def store(tmp_path):
  made = create(tmp_path / "s")
  fill(made, stores.pending(made, IDS))
  return made


def rounded(x):
  """float32 -> the nearest bfloat16, ties to even, by the bits."""
  bits = x.view(np.uint32)
  bits = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
  return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def test_columns_come_back(store):
  x = arrays()
  assert store.shards == 5 and store.bounds(4) == (20, 23)
  assert store.sizes([1, 4]) == [5, 3]
  np.testing.assert_array_equal(stores.read(store.folder, "logp"), x["logp"])
  got = stores.read(store.folder, "embedding")
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, rounded(x["embedding"]))
  for name in COLUMNS:  # nothing is held: files are mapped
    assert isinstance(stores.read(store, name), np.memmap)
  plain = np.load(store.folder / "logp.npy")  # what anybody reads
  np.testing.assert_array_equal(plain, x["logp"])
  with pytest.raises(ConfigError, match="no column 'colour', it has"):
    stores.read(store, "colour")


def test_what_is_whole_is_not_made_again(tmp_path):
  store = create(tmp_path)
  assert stores.pending(store, IDS) == [0, 1, 2, 3, 4]
  fill(store, [0, 3])
  with pytest.raises(CorruptError, match="lacks 3 of 5 shards, 00001"):
    stores.open_store(tmp_path)
  again = create(tmp_path)
  assert again == store and stores.pending(again, IDS) == [1, 2, 4]


def bytes_of(store):
  """name -> bytes of its files, but for the description."""
  folder = pathlib.Path(store.folder)
  return {
    p.relative_to(folder).as_posix(): p.read_bytes()
    for p in sorted(folder.rglob("*"))
    if p.is_file() and p.name != "store.json"
  }


@pytest.mark.parametrize("how", ["bit", "short", "gone"])
def test_damaged_rows_alone_are_made_again(store, how, capsys):
  before = bytes_of(store)
  assert len(before) == 2 + 5  # two columns, and the digests of five shards
  rng = np.random.default_rng(4)
  for name, data in before.items():
    path, data = store.folder / name, bytearray(data)
    side = name.startswith("shards/")
    at = int(rng.integers(0 if side else 128, len(data)))
    if how == "bit":
      data[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(data[:at] if how == "short" else data)
    if how == "gone":
      path.unlink()
    row = (at - 128) * N // (len(data) - 128)  # a row's bytes are even
    first = 0 if how == "gone" else row // SHARD
    wanted = [first] if how == "bit" else [*range(first, 5)]
    if side:
      wanted = [int(name.split("/")[1][:5])]
    assert create(store.folder) == store
    assert stores.pending(store, IDS) == wanted, name
    out = capsys.readouterr().out
    if not (how == "gone" and side):
      assert f"shard {wanted[0]:05d}: " in out and "doing it again" in out
    fill(store, wanted)
    assert path.read_bytes() == before[name]
    assert stores.pending(store, IDS) == []


def test_a_damaged_header_or_description_is_written_again(store):
  for name, old, new in (
    ("store.json", b'"layers": 2', b'"layers": 3'),
    ("logp.npy", b"<f4", b"<f8"),
  ):
    path = store.folder / name
    data = path.read_bytes()
    path.write_bytes(data.replace(old, new))
    if name == "store.json":
      with pytest.raises(CorruptError, match="store.json is damaged"):
        stores.open_store(store.folder)
    else:
      assert stores.pending(store, IDS) == [0, 1, 2, 3, 4]
    again = create(store.folder)
    assert stores.pending(again, IDS) == [] and path.read_bytes() == data


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(fields=dict(model="b", layers=2)), "model was 'a', now 'b'"),
    (dict(fields=dict(model="a")), "layers was 2, now None"),
    (dict(ids=IDS[:-1]), "other records|rows was 23, now 22"),
    (dict(ids=np.append(IDS[:-1], "z")), "other records"),
    (dict(shard=6), "shard was 5, now 6"),
    (dict(columns=dict(logp=ArraySpec((3,)))), r"columns was .*\[2\]"),
  ],
)
def test_another_description_is_refused_by_its_field(store, changes, words):
  before = bytes_of(store)
  with pytest.raises(ConfigError, match=words):
    create(store.folder, **changes)
  assert before == bytes_of(store)


def test_shards_of_another_store_do_not_count(store, tmp_path):
  """A side file copied from a store of another model is no proof."""
  other = create(tmp_path / "other", fields=dict(model="b"))
  shutil.copytree(store.folder / "shards", other.folder / "shards")
  for name in COLUMNS:
    shutil.copy(store.folder / f"{name}.npy", other.folder / f"{name}.npy")
  assert stores.pending(other, IDS) == [0, 1, 2, 3, 4]


def test_a_store_in_a_bucket_is_the_same(store, tmp_path, monkeypatch):
  bucket.mount(tmp_path / "far", monkeypatch.setattr)
  far = create("gs://b/s")
  fill(far, [0, 2, 3, 4])
  assert stores.pending(far, IDS) == [1]
  fill(far, [1])
  for name in COLUMNS:
    got = stores.read("gs://b/s", name)
    np.testing.assert_array_equal(got, stores.read(store, name))
    assert isinstance(got, np.memmap)  # a scratch file, not memory


# The embed stage.

SMALL = ("embed.shard=16", "compare=()")  # ten shards of the 160 records


def shards(work):
  return sorted(p.name for p in work.glob("shared/embed/store/shards/*.json"))


def times(paths):
  return {p: p.stat().st_mtime_ns for p in paths}


@pytest.mark.slow
def test_an_embed_stage_killed_goes_on_at_the_next_shard(tmp_path):
  """SIGKILL after the fourth shard; then the others alone, the same bytes."""
  wanted = jobs.run(tmp_path / "wanted", *SMALL)
  assert wanted.code == 0, wanted
  work = tmp_path / "work"
  ended = jobs.wait(jobs.start(work, *SMALL, hook=jobs.kill_at_shard(4)))
  assert ended.code == -signal.SIGKILL
  assert shards(work) == [f"{s:05d}.json" for s in range(4)]
  before = times(work.glob("shared/embed/store/shards/0000[0-3].*"))
  time.sleep(0.01)
  ended = jobs.run(work, *SMALL)
  assert ended.code == 0, ended
  assert len(shards(work)) == 10 and len(before) == 4
  assert before == times(before)
  outcomes = jobs.outcome(tmp_path / "wanted"), jobs.outcome(work)
  assert not jobs.differences(*outcomes)


@pytest.mark.slow
def test_shards_and_dtype_are_knobs_and_numbers_stay(tmp_path):
  """In shards of 16 the numbers are those of one; in bfloat16 rounded."""
  work = jobs.copy(tmp_path / "work")
  whole = work / "shared/embed/store"
  names = ("embedding", "logp", "count")
  wanted = {name: np.array(stores.read(whole, name)) for name in names}
  ended = jobs.run(work, *SMALL, "--redo")
  assert ended.code == 0 and jobs.did(ended)[0] == "embed"
  assert len(shards(work)) == 10
  for name, x in wanted.items():
    np.testing.assert_array_equal(stores.read(whole, name), x)
  card = json.loads((work / "shared/embed/records/embed.json").read_text())
  assert "store/embedding.npy" in card["outputs"]
  flipped = whole / "logp.npy"
  data = bytearray(flipped.read_bytes())
  data[128 + 7 * 16 * 8] ^= 4  # two float32 a record: the first of shard 7
  flipped.write_bytes(data)
  others = times(p for p in whole.rglob("*.json") if "00007" not in p.name)
  ended = jobs.run(work, *SMALL)
  assert ended.code == 0 and jobs.did(ended) == ["embed"]
  assert "shard 00007: logp has other bytes" in ended.out
  assert others == times(others)
  np.testing.assert_array_equal(stores.read(whole, "logp"), wanted["logp"])
  ended = jobs.run(work, *SMALL, "embed.store_dtype=bfloat16", "--redo")
  assert ended.code == 0, ended
  got = stores.read(whole, "embedding")
  np.testing.assert_array_equal(got, rounded(wanted["embedding"]))
  assert artifacts.read_record(work / "shared/embed", "embed").finished


OWN = (
  "import json\n"
  "from jaxalign.eval import held_out\n"
  "from jaxalign.embed import store\n"
  "real, wrote = store.write_shard, []\n"
  "def noted(s, shard, *a):\n"
  "  wrote.append([s.folder.name, shard])\n"
  "  real(s, shard, *a)\n"
  "store.write_shard = noted\n"
  "class Enough(SystemExit): pass\n"
  "def stop(*_):\n"
  "  json.dump(wrote, open({path!r}, 'w'))\n"
  "  raise Enough(0)\n"
  "held_out.run_policy = stop\n"
)


@pytest.mark.slow
def test_two_processes_write_their_own_shards(tmp_path):
  """Of what their devices computed, and of the scores; the same bits."""
  export = jobs.finished() / "runs/isa-0.1-seed0/export"
  flags = (
    f"model.checkpoint={export}",
    "select.mixture.reservoir=100",
    "select.stability_seeds=0",
    *SMALL,
  )
  notes = [str(tmp_path / f"wrote{k}") for k in range(3)]
  hook = lambda k: OWN.replace("{path!r}", repr(notes[k]))
  jobs.together(tmp_path / "two", *flags, hooks={0: hook(0), 1: hook(1)})
  jobs.wait(jobs.start(tmp_path / "one", *flags, hook=hook(2)))
  first, second, all_ = (json.loads(pathlib.Path(n).read_text()) for n in notes)
  written = [[shard for _, shard in one] for one in (first, second, all_)]
  assert written == [[*range(0, 10, 2)], [*range(1, 10, 2)], [*range(10)]]
  one, two = tmp_path / "one/shared", tmp_path / "two/shared"
  files = sorted(p.relative_to(one) for p in one.glob("embed/store/*.npy"))
  assert len(files) == 3
  for path in [*files, "mixture/log_likelihood.npy"]:
    assert (one / path).read_bytes() == (two / path).read_bytes(), path
