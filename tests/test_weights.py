"""Hugging Face folders: read, written, and refused with all that is wrong."""

import functools
import json
import os
import pathlib
import pickle
import re
import socket
import struct
import subprocess
import sys
import time

import emitters
import jax
import ml_dtypes
from models import draw, make_mesh, put, sized
import numpy as np
import pytest
import safetensors.numpy

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import tokenizer
from jaxalign.model import decoder, hf, safetensors_io, weights
from jaxalign.model.parameters import Layout, Param, Stored

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TEXTS = ["bako ti ruda\n\nmo", " ti ruda bako 12", "ruda", "ma\u00df \u2603 mo"]
TOK = tokenizer.Tokenizer(tokenizer.train_tokenizer(TEXTS * 9, 300))
SMALL = sized(
  2, 16, 4, 2, 6, 10, 320, 32, rope_theta=900.0, norm_eps=2e-4, tied=False
)


@functools.lru_cache
def logits_fn(m):
  def run(params, tokens):
    return decoder.logits(
      decoder.forward(params, tokens, m), decoder.head(params, m)
    )

  return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def ours(mesh, params, m, tokens):
  return np.asarray(logits_fn(m)(params, sharding.put(mesh, tokens, "batch")))


def theirs(folder, tokens):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, local_files_only=True, dtype=torch.float32
  )
  with torch.no_grad():
    return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_export_is_loaded_by_transformers_offline(mesh, tmp_path, tied):
  m = SMALL._replace(tied=tied)
  params = put(mesh, m, draw(m, scale=0.2))
  assert hf.export_folder(tmp_path / "export", params, m, TOK) == ["export"]
  folder = str(tmp_path / "export")
  tokens = np.random.default_rng(1).integers(0, m.vocab, (4, 16))
  np.testing.assert_allclose(
    ours(mesh, params, m, tokens), theirs(folder, tokens), rtol=0, atol=1e-4
  )
  peer = transformers.AutoTokenizer.from_pretrained(
    folder, local_files_only=True
  )
  for text in TEXTS:
    assert peer(text)["input_ids"] == TOK.encode(text, begins=True)
  assert (peer.bos_token_id, peer.eos_token_id) == (TOK.bos, TOK.eos)
  said = json.loads((tmp_path / "export/generation_config.json").read_text())
  assert said == dict(bos_token_id=TOK.bos, eos_token_id=TOK.eos)
  # And by us: the sizes, and every bit.
  assert hf.read_config(folder, "float32", "none") == m
  back = hf.load_folder(folder, m, mesh)
  for n, w in params.items():
    np.testing.assert_array_equal(back[n], w, err_msg=n)
    assert back[n].sharding == w.sharding, n


def test_a_real_checkpoint_in_and_out(mesh, shared, tmp_path):
  folder = shared / "models/stories260K"
  m = hf.read_config(folder, "float32", "none")
  params = hf.load_folder(folder, m, mesh)
  tok = tokenizer.Tokenizer.load(folder)
  text = (folder / "greedy_257_tokens.txt").read_text()
  tokens = np.array(tok.encode(text, begins=True)[:64]).reshape(4, 16)
  logits = ours(mesh, params, m, tokens)
  np.testing.assert_allclose(
    logits, theirs(str(folder), tokens), rtol=0, atol=1e-4
  )
  hf.export_folder(tmp_path, params, m, tok)
  np.testing.assert_allclose(
    theirs(str(tmp_path), tokens),
    theirs(str(folder), tokens),
    rtol=0,
    atol=1e-5,
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_in_many_files(mesh, tmp_path, dtype):
  params = put(mesh, SMALL, draw(SMALL, scale=0.2))
  if dtype == "bfloat16":  # numbers that it can hold: then nothing is lost
    half = lambda w: np.float32(np.asarray(w).astype(ml_dtypes.bfloat16))
    params = put(mesh, SMALL, {n: half(w) for n, w in params.items()})
  hf.export_folder(tmp_path, params, SMALL, TOK)  # replaced by the next
  hf.export_folder(tmp_path, params, SMALL, TOK, dtype=dtype, shard_bytes=6_000)
  files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
  assert len(files) > 3 and files[0] == (
    f"model-00001-of-{len(files):05d}.safetensors"
  )
  assert hf.digest_names(tmp_path) == [
    "config.json",
    "model.safetensors.index.json",
    *files,
  ]
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  stored = safetensors.numpy.load_file
  kept = {n: w for f in files for n, w in stored(tmp_path / f).items()}
  where = {n: f for f in files for n in stored(tmp_path / f)}
  assert where == index["weight_map"]
  assert index["metadata"]["total_size"] == sum(w.nbytes for w in kept.values())
  assert {str(w.dtype) for w in kept.values()} == {dtype}
  assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
  tokens = np.random.default_rng(1).integers(0, SMALL.vocab, (4, 16))
  here, there = ours(mesh, params, SMALL, tokens), theirs(tmp_path, tokens)
  np.testing.assert_allclose(here, there, rtol=0, atol=1e-4)
  back = hf.load_folder(tmp_path, SMALL, mesh)
  for n, w in params.items():
    np.testing.assert_array_equal(back[n], w, err_msg=n)
  half = hf.load_folder(tmp_path, SMALL, mesh, dtype=ml_dtypes.bfloat16)
  for n, w in params.items():
    np.testing.assert_array_equal(
      half[n], np.asarray(w).astype(ml_dtypes.bfloat16), err_msg=n
    )
  # And back to one file, of which nothing else is left.
  hf.export_folder(tmp_path, params, SMALL, TOK)
  assert [p.name for p in tmp_path.glob("*safetensors*")] == [
    "model.safetensors"
  ]


def test_files_that_transformers_has_spread(mesh, tmp_path):
  hf.export_folder(
    tmp_path / "one", put(mesh, SMALL, draw(SMALL, scale=0.2)), SMALL, TOK
  )
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "one", local_files_only=True
  )
  peer.save_pretrained(tmp_path / "many", max_shard_size="15KB")
  assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
  m = hf.read_config(tmp_path / "many", "float32", "none")
  params = hf.load_folder(tmp_path / "many", m, mesh)
  for n, w in hf.load_folder(tmp_path / "one", SMALL, mesh).items():
    np.testing.assert_array_equal(params[n], w, err_msg=n)


# Any table: fused, transposed, stacked, and cut over the mesh.

T, D, G, C = 3, 8, 2, 5
ROWS = {
  "top": Param((8, D), ("vocab", "width"), 1.0),
  "layers/q": Param((T, D, G, C), (None, "width", "heads", None), 1.0),
  "layers/k": Param((T, D, G, C), (None, "width", "heads", None), 1.0),
  "layers/v": Param((T, G, C, D), (None, "heads", None, "width"), 1.0),
  "layers/b": Param((T, D), (None, None), 1.0),
}
FUSED = "h.{}.qkv"
STORED = {
  "top": Stored("top", (D, 8), (D, 8), (1, 0)),
  "layers/q": Stored(FUSED, (G * 3 * C, D), (G, 3, C, D), (2, 0, 1), (1, 0)),
  "layers/k": Stored(FUSED, (G * 3 * C, D), (G, 3, C, D), (2, 0, 1), (1, 1)),
  "layers/v": Stored(FUSED, (G * 3 * C, D), (G, 3, C, D), (0, 1, 2), (1, 2)),
  "layers/b": Stored("h.{}.b", (D,), (D,), (0,)),
}
LAYOUT = Layout(ROWS, STORED)


def fused_files():
  """A checkpoint, and by the equation what it says."""
  rng = np.random.default_rng(3)
  tensors = {"top": rng.normal(size=(D, 8)).astype(np.float32)}
  want = {n: np.zeros(p.shape) for n, p in ROWS.items()}
  want["top"] = tensors["top"].T
  for t in range(T):
    w = rng.normal(size=(G * 3 * C, D)).astype(np.float32)
    tensors[f"h.{t}.qkv"] = w
    tensors[f"h.{t}.b"] = rng.normal(size=D).astype(np.float32)
    want["layers/b"][t] = tensors[f"h.{t}.b"]
    for g in range(G):
      for c in range(C):
        row = g * 3 * C + c
        want["layers/q"][t, :, g, c] = w[row]
        want["layers/k"][t, :, g, c] = w[row + C]
        want["layers/v"][t, g, c, :] = w[row + 2 * C]
  return tensors, want


def test_fused_tensors_in_and_out(mesh, tmp_path):
  tensors, want = fused_files()
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  params = weights.load(tmp_path, LAYOUT, mesh)
  for n, w in want.items():
    np.testing.assert_array_equal(params[n], w, err_msg=n)
    assert params[n].sharding == sharding.named_sharding(mesh, *ROWS[n].axes)
  weights.save(tmp_path / "out", params, LAYOUT, weights.Export({}))
  back = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
  assert sorted(back) == sorted(tensors)
  for n, w in tensors.items():
    np.testing.assert_array_equal(back[n], w, err_msg=n)
  some = {n: s for n, s in STORED.items() if n != "layers/k"}
  with pytest.raises(ValueError, match="qkv is made of 2 parameters, wanted 3"):
    weights.save(
      tmp_path / "x",
      params,
      Layout({n: ROWS[n] for n in some}, some),
      weights.Export({}),
    )


def test_names_by_another_rule(tmp_path, alone):
  tensors, want = fused_files()
  other = {f"model.{n}": w for n, w in tensors.items()}
  other["eyes"] = np.zeros(3, np.int64)
  safetensors.numpy.save_file(other, tmp_path / "model.safetensors")
  rule = lambda name: None if name == "eyes" else name.removeprefix("model.")
  params = weights.load(tmp_path, LAYOUT._replace(rename=rule), alone)
  np.testing.assert_array_equal(params["layers/k"], want["layers/k"])
  safetensors.numpy.save_file(
    other | {"top": tensors["top"]}, tmp_path / "model.safetensors"
  )
  with pytest.raises(
    DataError,
    match="top and model.top are the same|model.top and top are the same",
  ):
    weights.load(tmp_path, LAYOUT._replace(rename=rule), alone)


def test_what_was_read_is_not_written_to(tmp_path):
  """Devices share a buffer; a donated array must not be changed in it."""
  mesh = make_mesh(4, 2)
  rows = {"w": Param((64, 64), (None, None), 1.0)}
  stored = {"w": Stored("w", (64, 64), (64, 64), (0, 1))}
  safetensors.numpy.save_file(
    {"w": np.ones((64, 64), np.float32)}, tmp_path / "model.safetensors"
  )
  with jax.set_mesh(mesh):
    w = weights.load(tmp_path, Layout(rows, stored), mesh)["w"]
    where = {s.data.unsafe_buffer_pointer() for s in w.addressable_shards}
    assert len(where) == 1  # one buffer, read once
    twice = jax.jit(lambda x: x + x, donate_argnums=0)
    w = twice(twice(w))
    for shard in w.addressable_shards:
      np.testing.assert_array_equal(shard.data, np.full((64, 64), 4.0))


# Object stores.


@pytest.fixture
def bucket(monkeypatch):
  """A store in memory behind gs://, through the path that real ones take.

  Yields the (offset, bytes) of every read of it.
  """
  from etils.epath import backend
  from fsspec.implementations.memory import MemoryFileSystem

  reads = []

  class Store(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store: dict = {}
    pseudo_dirs = [""]

    def __init__(self, *args, **kwargs):
      super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
      return "/" + path.removeprefix("gs://").removeprefix("gcs://").strip("/")

    def _open(self, path, mode="rb", **kwargs):
      f = super()._open(path, mode, **kwargs)
      if mode == "rb":
        f.read = lambda n=-1: reads.append((f.tell(), n)) or type(f).read(f, n)
      return f

  monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Store)
  backend.fsspec_backend._get_filesystem.cache_clear()
  yield reads
  backend.fsspec_backend._get_filesystem.cache_clear()


def test_google_storage_in_and_out(mesh, bucket):
  _, want = fused_files()
  params = {
    n: sharding.put(mesh, np.float32(w), *ROWS[n].axes) for n, w in want.items()
  }
  weights.save(
    "gs://b/x", params, LAYOUT, weights.Export(dict(a=1), shard_bytes=600)
  )
  names = hf.digest_names("gs://b/x")
  assert len(names) > 4
  back = weights.load("gs://b/x", LAYOUT, mesh)
  for n, w in want.items():
    np.testing.assert_array_equal(back[n], w, err_msg=n)


def test_only_the_bytes_of_a_shard_are_read(bucket, monkeypatch):
  """A host with the rows 2 to 5 of a vocabulary of 8."""
  from etils import epath

  wide = 1000
  x = np.arange(8 * wide, dtype=np.float32).reshape(8, wide)
  epath.Path("gs://b/y").mkdir(parents=True)
  epath.Path("gs://b/y/model.safetensors").write_bytes(
    safetensors.numpy.save({"w": x})
  )
  found = safetensors_io.Checkpoint(epath.Path("gs://b/y"))
  begin = found.tensors["w"].begin
  buffers = [np.zeros((2, wide), np.float32) for _ in range(2)]
  parts = [
    weights._Shard(((2 * i, 2 * i + 2), (0, wide)), b)
    for i, b in zip((1, 2), buffers)
  ]
  stored = Stored("w", x.shape, x.shape, (0, 1))
  bucket.clear()
  assert weights._fill(found, "w", stored, parts)
  assert bucket == [(begin + 2 * wide * 4, 4 * wide * 4)]
  np.testing.assert_array_equal(np.concatenate(buffers), x[2:6])
  bucket.clear()
  monkeypatch.setattr(safetensors_io, "_REMOTE", 2 * wide * 4)
  assert weights._fill(
    found,
    "w",
    stored,
    [
      weights._Shard(((0, 2), (0, 1000)), buffers[0]),
      weights._Shard(((6, 8), (0, 1000)), buffers[1]),
    ],
  )
  assert bucket == [(begin, 2 * wide * 4), (begin + 6 * wide * 4, 2 * wide * 4)]
  np.testing.assert_array_equal(buffers[1], x[6:])


# Memory, and several processes.

MEASURE = r"""
import sys, threading, time
import jax
import ml_dtypes
import numpy as np
from jaxalign.core import sharding
from jaxalign.core.errors import DataError
from jaxalign.model import weights
from jaxalign.model.parameters import Layout, Param, Stored

folder, port, process, count = sys.argv[1], *map(int, sys.argv[2:])
if count > 1:
  jax.distributed.initialize(f"127.0.0.1:{port}", count, process)
T, D, F, V = 8, 1024, 4096, 32000
rows = {
    "embed": Param((V, D), ("vocab", "width"), 1.0),
    "layers/up": Param((T, D, F), (None, "width", "ff"), 1.0),
    "layers/gate": Param((T, D, F), (None, "width", "ff"), 1.0),
    "layers/down": Param((T, F, D), (None, "ff", "width"), 1.0),
    "layers/norm": Param((T, D), (None, None), 1.0),
    "head": Param((V, D), ("vocab", "width"), 1.0)}
stored = {
    "embed": Stored("embed", (V, D), (V, D), (0, 1)),
    "head": Stored("head", (V, D), (V, D), (0, 1)),
    "layers/up": Stored("h.{}.up", (F, D), (F, D), (1, 0)),
    "layers/gate": Stored("h.{}.gate", (F, D), (F, D), (1, 0)),
    "layers/norm": Stored("h.{}.norm", (D,), (D,), (0,)),
    "layers/down": Stored("h.{}.down", (D, F), (D, F), (1, 0))}
layout = Layout(rows, stored)

def anonymous():
  for line in open("/proc/self/status"):
    if line.startswith("RssAnon:"):
      return int(line.split()[1]) * 1024

peak, done = [0], threading.Event()
def watch():
  while not done.is_set():
    peak[0] = max(peak[0], anonymous())
    time.sleep(0.001)

mesh = sharding.make_mesh(dict(fsdp=4, tensor=2))
with jax.set_mesh(mesh):
  sharding.put(mesh, np.ones((8, 8), np.float32), "width").block_until_ready()
  sharding.barrier("before")
  before = anonymous()
  threading.Thread(target=watch, daemon=True).start()
  params = weights.load(folder, layout, mesh)
  done.set()
  own = sum(s.data.nbytes for w in params.values()
            for s in w.addressable_shards)
  print("measured", peak[0] - before, own, flush=True)
  weights.save(folder + "-out", params, layout, weights.Export(
      {}, dtype="bfloat16", shard_bytes=120_000_000))
  sharding.barrier("after")
  try:
    weights.load(folder + "-nan", layout, mesh)
  except DataError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_host_memory_stays_below_shards_and_a_tensor(tmp_path, processes):
  """Own shards + 1.3 x the file's largest tensor + 16 MiB of the process."""
  rng = np.random.default_rng(0)
  random = lambda *shape: rng.standard_normal(shape, np.float32).astype(
    ml_dtypes.bfloat16
  )
  tensors = {"embed": random(32000, 1024), "head": random(32000, 1024)}
  for i in range(8):
    tensors |= {
      f"h.{i}.up": random(4096, 1024),
      f"h.{i}.norm": random(1024),
      f"h.{i}.gate": random(4096, 1024),
      f"h.{i}.down": random(1024, 4096),
    }
  good, bad = tmp_path / "good", tmp_path / "good-nan"
  for folder in (good, bad):
    folder.mkdir()
    if folder == bad:  # two numbers, of which the second process has one
      tensors["embed"][5, -1] = tensors["h.3.norm"][0] = np.nan
    names = list(tensors)
    files = dict(zip(names, ["a", "b", *"ccc" * 8]))
    for letter in "abc":
      safetensors.numpy.save_file(
        {n: tensors[n] for n in names if files.get(n, "c") == letter},
        folder / f"model-{letter}.safetensors",
      )
    (folder / "model.safetensors.index.json").write_text(
      json.dumps(
        dict(
          weight_map={
            n: f"model-{files.get(n, 'c')}.safetensors" for n in names
          }
        )
      )
    )
  largest = tensors["embed"].nbytes
  del tensors
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  env = dict(os.environ, XLA_FLAGS=emitters.flags(8 // processes))
  running = [
    subprocess.Popen(
      [sys.executable, "-c", MEASURE, good, str(port), str(i), str(processes)],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=pathlib.Path(__file__).parent.parent,
    )
    for i in range(processes)
  ]
  ended = [p.communicate(timeout=500) for p in running]
  for out, err in ended:
    found = re.search(r"measured (\d+) (\d+)", out)
    assert found, err
    peak, own = map(int, found.groups())
    # The shards themselves are anonymous memory on a CPU: less is impossible.
    assert 0.95 * own < peak < own + 1.3 * largest + 16 * 2**20, (peak, own)
    # One process found each, and both say both.
    assert (
      "does not match its config.json: embed holds NaN or infinity; "
      "h.3.norm holds NaN or infinity"
    ) in out
  before, after = (
    {
      n: w
      for f in at.glob("*.safetensors")
      for n, w in safetensors.numpy.load_file(f).items()
    }
    for at in (good, tmp_path / "good-out")
  )
  assert len(list((tmp_path / "good-out").glob("model-*"))) > 2
  assert sorted(before) == sorted(after)
  for n, w in before.items():
    np.testing.assert_array_equal(after[n].view(np.uint16), w.view(np.uint16))


# What cannot be read.


@pytest.fixture
def folder(tmp_path, alone):
  hf.export_folder(
    tmp_path, put(alone, SMALL, draw(SMALL, scale=0.2)), SMALL, TOK
  )
  return tmp_path


def config(folder, **changes):
  path = folder / "config.json"
  raw = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({n: v for n, v in raw.items() if v != "absent"}))


def rewrite(folder, change):
  path = folder / "model.safetensors"
  tensors = dict(safetensors.numpy.load_file(path))
  change(tensors)
  path.write_bytes(safetensors.numpy.save(tensors))


def header(folder, change):
  """Rewrites the JSON in front of the tensors."""
  path = folder / "model.safetensors"
  data = path.read_bytes()
  size = struct.unpack("<Q", data[:8])[0]
  raw = json.loads(data[8 : 8 + size])
  change(raw)
  text = json.dumps(raw).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def read(folder):
  return hf.read_config(folder, "float32", "none")


def test_no_config(tmp_path):
  with pytest.raises(ConfigError, match="no config.json; set config.model."):
    read(tmp_path)


@pytest.mark.parametrize(
  "changes,words",
  [
    (dict(model_type="gpt2"), "model_type='gpt2' is unknown; known: llama"),
    (dict(model_type="mixtral"), "mixtures of experts are out of scope"),
    (dict(hidden_act="tanh"), "hidden_act='tanh' is unknown"),
    (dict(rope_parameters=dict(rope_type="magic")), "rope_type='magic'"),
    (dict(num_attention_heads="absent"), "num_attention_heads"),
    (dict(model_type="absent"), "model_type"),
    (dict(hidden_size="large"), "config.json is no config.*'large'"),
  ],
)
def test_configs_of_no_known_family(folder, changes, words):
  config(folder, **changes)
  with pytest.raises(ConfigError, match=words):
    read(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff"])
def test_a_config_that_is_no_json_object(folder, text):
  (folder / "config.json").write_text(text, encoding="latin-1")
  with pytest.raises(ConfigError, match="config.json"):
    read(folder)


def test_a_missing_file_and_a_pickle(folder, alone):
  (folder / "model.safetensors").unlink()
  with pytest.raises(
    ConfigError,
    match=("has no model.safetensors and no model.safetensors.index.json$"),
  ):
    hf.load_folder(folder, SMALL, alone)
  (folder / "pytorch_model.bin").write_bytes(pickle.dumps(1))
  with pytest.raises(
    ConfigError,
    match=(
      "pytorch_model.bin is a pickle, which can run code: convert it with "
      "transformers' save_pretrained"
    ),
  ):
    hf.load_folder(folder, SMALL, alone)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_a_file_cut_short(folder, alone, keep):
  path = folder / "model.safetensors"
  data = path.read_bytes()
  path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else keep])
  with pytest.raises(DataError, match="safetensors is damaged or cut short"):
    hf.load_folder(folder, SMALL, alone)


def test_a_header_that_claims_the_world(folder, alone):
  began = time.monotonic()

  def shape(raw):
    raw["model.norm.weight"].update(
      shape=[10**9, 10**9], data_offsets=[0, 4 * 10**18]
    )

  header(folder, shape)
  with pytest.raises(DataError, match="damaged or cut short"):
    hf.load_folder(folder, SMALL, alone)
  path = folder / "model.safetensors"
  path.write_bytes(struct.pack("<Q", 10**18) + b"{}")
  with pytest.raises(DataError, match="cut short: header too large"):
    hf.load_folder(folder, SMALL, alone)
  # A config may claim as much; nothing of that size is allocated.
  with pytest.raises(DataError):
    hf.load_folder(folder, SMALL._replace(vocab=10**12), alone)
  assert time.monotonic() - began < 2


WRONG = [
  dict(shape=[-16], data_offsets=[64, 0]),
  dict(shape=[16, -1]),
  dict(data_offsets=[-8, 56]),
  dict(data_offsets=[0]),
  dict(shape="16"),
  dict(shape=[16.0]),
  dict(shape=3),
  dict(data_offsets=[0.0, 64.0]),
  dict(data_offsets=[None, 64]),
  *(b"\xff\xfe", b"{'a'", b"[1, 2]", b"3", b'{"a": 3}'),
  b'{"a": {"dtype": "F32"}}',
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_header_that_makes_no_sense(folder, alone, wrong):
  if isinstance(wrong, bytes):
    text = struct.pack("<Q", len(wrong)) + wrong
    (folder / "model.safetensors").write_bytes(text)
  else:
    header(folder, lambda raw: raw["model.norm.weight"].update(wrong))
  with pytest.raises(DataError, match="safetensors is damaged or cut short"):
    hf.load_folder(folder, SMALL, alone)


def test_a_kind_of_number_that_is_not_read(folder, alone):
  rewrite(
    folder, lambda t: t.update({"model.norm.weight": np.zeros(16, np.float64)})
  )
  with pytest.raises(
    DataError, match="model.norm.weight is F64, wanted one of F32, F16, BF16"
  ):
    hf.load_folder(folder, SMALL, alone)


def test_everything_that_does_not_match_is_listed_at_once(folder, alone):
  def spoil(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.7.extra.weight"] = np.zeros(2, np.float32)
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    tensors["lm_head.weight"][3, 5] = np.nan
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.full(
      (12, 16), np.inf, np.float32
    )

  rewrite(folder, spoil)
  with pytest.raises(DataError) as caught:
    hf.load_folder(folder, SMALL, alone)
  for words in (
    "model.layers.1.mlp.up_proj.weight is missing",
    "model.layers.7.extra.weight is surplus",
    "model.norm.weight is (17,), wanted (16,)",
    "lm_head.weight holds NaN or infinity",
    "model.layers.0.self_attn.k_proj.weight holds NaN",
  ):
    assert words in str(caught.value)
  assert str(caught.value).count(";") == 4


def test_a_long_list_is_cut_and_counted(folder, alone):
  rewrite(
    folder,
    lambda t: t.update(
      {f"x{i:02d}": np.zeros(1, np.float32) for i in range(25)}
    ),
  )
  with pytest.raises(DataError, match="x19 is surplus; and 5 more$"):
    hf.load_folder(folder, SMALL, alone)
  with pytest.raises(DataError, match="wanted \\(1000000000000, 16\\)"):
    hf.load_folder(folder, SMALL._replace(vocab=10**12), alone)


def test_half_precision_and_old_buffers_are_read(folder, alone):
  exact = hf.load_folder(folder, SMALL, alone)

  def halve(tensors):
    for n, kind in (
      ("model.norm.weight", np.float16),
      ("lm_head.weight", ml_dtypes.bfloat16),
    ):
      tensors[n] = tensors[n].astype(kind)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(
      3, np.float32
    )

  rewrite(folder, halve)
  got = hf.load_folder(folder, SMALL, alone)
  assert all(w.dtype == np.float32 for w in got.values())
  np.testing.assert_allclose(got["norm"], exact["norm"], rtol=1e-3)
  np.testing.assert_allclose(got["head"], exact["head"], rtol=1e-2)
  np.testing.assert_array_equal(got["layers/wq"], exact["layers/wq"])
  # A tied model may carry its head a second time.
  rewrite(
    folder, lambda t: t.pop("model.layers.0.self_attn.rotary_emb.inv_freq")
  )
  tied = hf.load_folder(folder, SMALL._replace(tied=True), alone)
  assert "head" not in tied


@pytest.mark.parametrize(
  "dtype,key",
  [("bfloat16", "dtype"), ("float16", "torch_dtype"), ("float32", "")],
)
def test_an_export_keeps_what_the_checkpoint_said(tmp_path, alone, dtype, key):
  """Its dtype, PAD and generation config; EOS with the template's end."""
  hf.export_folder(
    tmp_path / "given",
    put(alone, SMALL, draw(SMALL, scale=0.2)),
    SMALL,
    TOK,
    dtype=dtype,
  )
  path = tmp_path / "given/config.json"
  raw = json.loads(path.read_text())
  raw.pop("dtype")
  path.write_text(
    json.dumps(
      raw | dict(pad_token_id=5, bos_token_id=1) | ({key: dtype} if key else {})
    )
  )
  (tmp_path / "given/generation_config.json").write_text(
    json.dumps(
      dict(
        do_sample=True,
        temperature=0.25,
        eos_token_id=2,
        pad_token_id=5,
        bos_token_id=1,
        transformers_version="4.40.0",
      )
    )
  )
  of = hf.given(tmp_path / "given")
  assert of.dtype == dtype
  params = hf.load_folder(tmp_path / "given", SMALL, alone)
  tok = tokenizer.Tokenizer(TOK.proto)
  tok.ends_with(9)
  hf.export_folder(tmp_path / "out", params, SMALL, tok, of=of)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", local_files_only=True, dtype="auto"
  )
  assert model.dtype == getattr(torch, dtype)
  g = model.generation_config
  assert (g.do_sample, g.temperature, g.pad_token_id, g.bos_token_id) == (
    True,
    0.25,
    5,
    1,
  )
  assert g.eos_token_id == [9, TOK.eos]
  assert (model.config.pad_token_id, model.config.eos_token_id) == (
    5,
    [9, TOK.eos],
  )
  for n, x in hf.load_folder(tmp_path / "out", SMALL, alone).items():
    np.testing.assert_array_equal(x, params[n], err_msg=n)
  hf.export_folder(
    tmp_path / "wide", params, SMALL, tok, of=of, dtype="float32"
  )
  assert hf.given(tmp_path / "wide").dtype == "float32"
