"""Hugging Face folders: read, written, and refused with all that is wrong."""

import functools
import json
import os
import re
import socket
import subprocess
import sys

from conftest import ROOT
import emitters
from etils import epath
import jax
import ml_dtypes
from models import draw, make_mesh, put, sized
import numpy as np
import pytest
import safetensors.numpy

from jaxalign.core import sharding
from jaxalign.core.errors import DataError
from jaxalign.data import tokenizer
from jaxalign.model import decoder, hf, safetensors_io, weights
from jaxalign.model.parameters import Layout, Param, Stored
from jaxalign.model.safetensors_io import FILE

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TEXTS = ["bako ti ruda\n\nmo", " ti ruda bako 12", "ruda", "ma\u00df \u2603 mo"]
TOK = tokenizer.Tokenizer(tokenizer.train_tokenizer(TEXTS * 9, 300))
loaded = safetensors.numpy.load_file
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


def theirs(folder, tokens, dtype=torch.float32):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, local_files_only=True, dtype=dtype
  )
  with torch.no_grad():
    return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def same(params, wanted, dtype=None):
  """Every bit, of all parameters."""
  assert set(params) == set(wanted)
  for n, w in wanted.items():
    w = np.asarray(w) if dtype is None else np.asarray(w).astype(dtype)
    np.testing.assert_array_equal(params[n], w, err_msg=n)


def drawn(mesh, m=SMALL):
  return put(mesh, m, draw(m, scale=0.2))


def tokens_of(m):
  return np.random.default_rng(1).integers(0, m.vocab, (4, 16))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_export_is_loaded_by_transformers_offline(mesh, tmp_path, tied):
  m, folder = SMALL._replace(tied=tied), str(tmp_path / "export")
  params, tokens = drawn(mesh, m), tokens_of(m)
  assert hf.export_folder(folder, params, m, TOK) == ["export"]
  close(ours(mesh, params, m, tokens), theirs(folder, tokens))
  peer = transformers.AutoTokenizer.from_pretrained(
    folder, local_files_only=True
  )
  for text in TEXTS:
    assert peer(text)["input_ids"] == TOK.encode(text, begins=True)
  assert (peer.bos_token_id, peer.eos_token_id) == (TOK.bos, TOK.eos)
  written = json.loads((tmp_path / "export/generation_config.json").read_text())
  assert written == dict(bos_token_id=TOK.bos, eos_token_id=TOK.eos)
  # And by us: the sizes, and every bit.
  assert hf.read_config(folder, "float32", "none") == m
  back = hf.load_folder(folder, m, mesh)
  same(back, params)
  assert all(back[n].sharding == w.sharding for n, w in params.items())


def test_a_real_checkpoint_in_and_out(mesh, shared, tmp_path):
  folder = shared / "models/stories260K"
  m = hf.read_config(folder, "float32", "none")
  params = hf.load_folder(folder, m, mesh)
  tok = tokenizer.load_tokenizer(folder)
  text = (folder / "greedy_257_tokens.txt").read_text()
  tokens = np.array(tok.encode(text, begins=True)[:64]).reshape(4, 16)
  wanted = theirs(str(folder), tokens)
  close(ours(mesh, params, m, tokens), wanted)
  hf.export_folder(tmp_path, params, m, tok)
  close(theirs(str(tmp_path), tokens), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_in_many_files(mesh, tmp_path, dtype):
  params, single = drawn(mesh), tmp_path / "model.safetensors"
  if dtype == "bfloat16":  # numbers that it can hold: then nothing is lost
    half = lambda w: np.float32(np.asarray(w).astype(ml_dtypes.bfloat16))
    params = put(mesh, SMALL, {n: half(w) for n, w in params.items()})
  hf.export_folder(tmp_path, params, SMALL, TOK)  # replaced by the next
  hf.export_folder(tmp_path, params, SMALL, TOK, dtype=dtype, shard_bytes=6_000)
  files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
  assert len(files) > 3 and files[0] == (
    f"model-00001-of-{len(files):05d}.safetensors"
  )
  listed = ["config.json", "model.safetensors.index.json", *files]
  assert hf.digest_names(tmp_path) == listed
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  stored = {f: safetensors.numpy.load_file(tmp_path / f) for f in files}
  kept = {n: w for f in files for n, w in stored[f].items()}
  assert {n: f for f in files for n in stored[f]} == index["weight_map"]
  assert index["metadata"]["total_size"] == sum(w.nbytes for w in kept.values())
  assert {str(w.dtype) for w in kept.values()} == {dtype}
  assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
  tokens = tokens_of(SMALL)
  close(ours(mesh, params, SMALL, tokens), theirs(tmp_path, tokens))
  same(hf.load_folder(tmp_path, SMALL, mesh), params)
  half = hf.load_folder(tmp_path, SMALL, mesh, ml_dtypes.bfloat16)
  same(half, params, ml_dtypes.bfloat16)
  # And back to one file, of which nothing else is left.
  hf.export_folder(tmp_path, params, SMALL, TOK)
  assert list(tmp_path.glob("*safetensors*")) == [single]


def test_files_that_transformers_has_spread(mesh, tmp_path):
  one, many = tmp_path / "one", tmp_path / "many"
  hf.export_folder(one, drawn(mesh), SMALL, TOK)
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    one, local_files_only=True
  )
  peer.save_pretrained(many, max_shard_size="15KB")
  assert len(list(many.glob("model-*-of-*.safetensors"))) > 2
  m = hf.read_config(many, "float32", "none")
  same(hf.load_folder(many, m, mesh), hf.load_folder(one, SMALL, mesh))


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
  """A checkpoint, and by the equation the parameters it holds."""
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
  params = weights.load_weights(tmp_path, LAYOUT, mesh)
  same(params, want)
  for n, p in ROWS.items():
    assert params[n].sharding == sharding.named_sharding(mesh, *p.axes)
  weights.save(tmp_path / "out", params, LAYOUT, weights.Export({}))
  same(safetensors.numpy.load_file(tmp_path / "out" / FILE), tensors)
  some = {n: s for n, s in STORED.items() if n != "layers/k"}
  layout = Layout({n: ROWS[n] for n in some}, some)
  with pytest.raises(ValueError, match="qkv is made of 2 parameters, wanted 3"):
    weights.save(tmp_path / "x", params, layout, weights.Export({}))


def test_names_by_another_rule(tmp_path, alone):
  tensors, want = fused_files()
  other = {f"model.{n}": w for n, w in tensors.items()}
  other["eyes"] = np.zeros(3, np.int64)
  safetensors.numpy.save_file(other, tmp_path / FILE)
  rule = lambda name: None if name == "eyes" else name.removeprefix("model.")
  layout = LAYOUT._replace(rename=rule)
  same(weights.load_weights(tmp_path, layout, alone), want)
  other["top"] = tensors["top"]
  safetensors.numpy.save_file(other, tmp_path / FILE)
  with pytest.raises(DataError, match="top and (model.)?top are the same"):
    weights.load_weights(tmp_path, layout, alone)


def test_what_was_read_is_not_written_to(tmp_path):
  """Devices share a buffer; a donated array must not be changed in it."""
  mesh = make_mesh(4, 2)
  rows = {"w": Param((64, 64), (None, None), 1.0)}
  stored = {"w": Stored.plain("w", 64, 64)}
  whole = {"w": np.ones((64, 64), np.float32)}
  safetensors.numpy.save_file(whole, tmp_path / FILE)
  with jax.set_mesh(mesh):
    w = weights.load_weights(tmp_path, Layout(rows, stored), mesh)["w"]
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
  export = weights.Export(dict(a=1), shard_bytes=600)
  weights.save("gs://b/x", params, LAYOUT, export)
  assert len(hf.digest_names("gs://b/x")) > 4
  same(weights.load_weights("gs://b/x", LAYOUT, mesh), want)


def test_only_the_bytes_of_a_shard_are_read(bucket, monkeypatch):
  """A host with the rows 2 to 5 of a vocabulary of 8; then 0, 1, 6 and 7."""
  x = np.arange(8000, dtype=np.float32).reshape(8, 1000)
  folder = epath.Path("gs://b/y")
  folder.mkdir(parents=True)
  (folder / FILE).write_bytes(safetensors.numpy.save({"w": x}))
  found = safetensors_io.Checkpoint(folder)
  stored, begin = Stored.plain("w", *x.shape), found.tensors["w"].begin
  two_rows = 2 * 1000 * 4  # bytes

  def read(*starts):
    bucket.clear()
    buffers = [np.zeros((2, 1000), np.float32) for _ in starts]
    boxes = [((i, i + 2), (0, 1000)) for i in starts]
    assert weights._fill(
      found, "w", stored, list(map(weights._Shard, boxes, buffers))
    )
    for i, buffer in zip(starts, buffers):
      np.testing.assert_array_equal(buffer, x[i : i + 2])
    return [(at - begin, size) for at, size in bucket]

  assert read(2, 4) == [(two_rows, 2 * two_rows)]
  monkeypatch.setattr(safetensors_io, "_REMOTE", two_rows)
  assert read(0, 6) == [(0, two_rows), (3 * two_rows, two_rows)]


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
  params = weights.load_weights(folder, layout, mesh)
  done.set()
  own = sum(s.data.nbytes for w in params.values()
            for s in w.addressable_shards)
  print("measured", peak[0] - before, own, flush=True)
  weights.save(folder + "-out", params, layout, weights.Export(
      {}, dtype="bfloat16", shard_bytes=120_000_000))
  sharding.barrier("after")
  try:
    weights.load_weights(folder + "-nan", layout, mesh)
  except DataError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_host_memory_stays_below_shards_and_a_tensor(tmp_path, processes):
  """Own shards + 1.3 x the file's largest tensor + 16 MiB of the process."""
  rng = np.random.default_rng(0)
  shapes = {"embed": (32000, 1024), "head": (32000, 1024)}
  for i in range(8):
    layer = dict(up=(4096, 1024), norm=(1024,), gate=(4096, 1024))
    layer["down"] = (1024, 4096)
    shapes |= {f"h.{i}.{n}": shape for n, shape in layer.items()}
  tensors = {
    n: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    for n, shape in shapes.items()
  }
  file_of = dict(zip(tensors, "abcccccccc"))
  where = {n: f"model-{file_of.get(n, 'c')}.safetensors" for n in tensors}
  good, bad = tmp_path / "good", tmp_path / "good-nan"
  for folder in (good, bad):
    folder.mkdir()
    if folder == bad:  # two numbers, of which the second process has one
      tensors["embed"][5, -1] = tensors["h.3.norm"][0] = np.nan
    for file in set(where.values()):
      own = {n: x for n, x in tensors.items() if where[n] == file}
      safetensors.numpy.save_file(own, folder / file)
    index = json.dumps(dict(weight_map=where))
    (folder / "model.safetensors.index.json").write_text(index)
  largest = tensors["embed"].nbytes
  del tensors
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  command = [sys.executable, "-c", MEASURE, good, str(port)]
  how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  how |= dict(env=dict(os.environ, XLA_FLAGS=emitters.flags(8 // processes)))
  running = [
    subprocess.Popen([*command, str(i), str(processes)], cwd=ROOT, **how)
    for i in range(processes)
  ]
  ended = [p.communicate(timeout=500) for p in running]
  for out, err in ended:
    found = re.search(r"measured (\d+) (\d+)", out)
    assert found, err
    peak, own = map(int, found.groups())
    # The shards themselves are anonymous memory on a CPU: less is impossible.
    assert 0.95 * own < peak < own + 1.3 * largest + 16 * 2**20, (peak, own)
    # Each process finds one of them, and both print both.
    assert (
      "does not match its config.json: embed holds NaN or infinity; "
      "h.3.norm holds NaN or infinity"
    ) in out
  out = tmp_path / "good-out"
  assert len(list(out.glob("model-*"))) > 2
  before, after = (
    {n: w.view(np.uint16) for f in at for n, w in loaded(f).items()}
    for at in (good.glob("*.safetensors"), out.glob("*.safetensors"))
  )
  same(after, before)


# What cannot be read.


@pytest.fixture
def folder(tmp_path, alone):
  hf.export_folder(tmp_path, drawn(alone), SMALL, TOK)
  return tmp_path


def rewrite(folder, change):
  tensors = loaded(folder / FILE)
  change(tensors)
  (folder / FILE).write_bytes(safetensors.numpy.save(tensors))


def spoil(tensors):
  del tensors["model.layers.1.mlp.up_proj.weight"]
  tensors["model.layers.7.extra.weight"] = np.zeros(2, np.float32)
  tensors["model.norm.weight"] = np.zeros(17, np.float32)
  tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
  tensors["lm_head.weight"][3, 5] = np.nan
  key = np.full((12, 16), np.inf, np.float32)
  tensors["model.layers.0.self_attn.k_proj.weight"] = key


LISTED = (
  "model.layers.1.mlp.up_proj.weight is missing",
  "model.layers.7.extra.weight is surplus",
  "model.norm.weight is (17,), wanted (16,)",
  "lm_head.weight holds NaN or infinity",
  "model.layers.0.self_attn.k_proj.weight holds NaN",
)
DOUBLE = {"model.norm.weight": np.zeros(16, np.float64)}
MANY = {f"x{i:02d}": np.zeros(1, np.float32) for i in range(25)}


@pytest.mark.parametrize(
  "change,sizes,words",
  [
    # Everything that does not match at once.
    (spoil, {}, LISTED),
    (
      lambda t: t.update(DOUBLE),
      {},
      ["model.norm.weight is F64, wanted one of F32, F16, BF16"],
    ),
    (lambda t: t.update(MANY), {}, ["x19 is surplus; and 5 more"]),
    # A config may claim the world; nothing of that size is allocated.
    (lambda t: None, dict(vocab=10**12), ["wanted (1000000000000, 16)"]),
    (lambda t: None, dict(layers=10**12), ["wanted 1000000000000 layers"]),
  ],
)
def test_tensors_that_do_not_match_the_config(
  folder, alone, change, sizes, words
):
  rewrite(folder, change)
  with pytest.raises(DataError) as caught:
    hf.load_folder(folder, SMALL._replace(**sizes), alone)
  assert all(w in str(caught.value) for w in words), caught.value
  if words is LISTED:
    assert str(caught.value).count(";") == 4


def test_half_precision_and_old_buffers_are_read(folder, alone):
  exact = hf.load_folder(folder, SMALL, alone)
  buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"

  def halve(tensors):
    for n, kind in (
      ("model.norm", np.float16),
      ("lm_head", ml_dtypes.bfloat16),
    ):
      tensors[f"{n}.weight"] = tensors[f"{n}.weight"].astype(kind)
    tensors[buffer] = np.zeros(3, np.float32)

  rewrite(folder, halve)
  got = hf.load_folder(folder, SMALL, alone)
  assert all(w.dtype == np.float32 for w in got.values())
  np.testing.assert_allclose(got["norm"], exact["norm"], rtol=1e-3)
  np.testing.assert_allclose(got["head"], exact["head"], rtol=1e-2)
  np.testing.assert_array_equal(got["layers/wq"], exact["layers/wq"])
  # A tied model may carry its head a second time.
  assert "head" not in hf.load_folder(folder, SMALL._replace(tied=True), alone)


@pytest.mark.parametrize(
  "dtype,key",
  [("bfloat16", "dtype"), ("float16", "torch_dtype"), ("float32", "")],
)
def test_an_export_keeps_the_settings_of_the_checkpoint(
  tmp_path, alone, dtype, key
):
  """Its dtype, PAD and generation config; EOS with the template's end."""
  given, out, wide = (tmp_path / n for n in ("given", "out", "wide"))
  hf.export_folder(given, drawn(alone), SMALL, TOK, dtype=dtype)
  raw = json.loads((given / "config.json").read_text())
  raw.pop("dtype")
  ids = dict(pad_token_id=5, bos_token_id=1)
  raw |= ids | ({key: dtype} if key else {})
  (given / "config.json").write_text(json.dumps(raw))
  generation = dict(do_sample=True, temperature=0.25, eos_token_id=2, **ids)
  generation["transformers_version"] = "4.40.0"
  (given / "generation_config.json").write_text(json.dumps(generation))
  of = hf.given(given)
  assert of.dtype == dtype
  params = hf.load_folder(given, SMALL, alone)
  tok = tokenizer.Tokenizer(TOK.proto)
  tok.ends_with(9)
  hf.export_folder(out, params, SMALL, tok, of=of)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    out, local_files_only=True, dtype="auto"
  )
  assert model.dtype == getattr(torch, dtype)
  kept = dict(
    do_sample=True, temperature=0.25, eos_token_id=[9, TOK.eos], **ids
  )
  assert kept.items() <= model.generation_config.to_dict().items()
  assert model.config.pad_token_id == 5
  assert model.config.eos_token_id == [9, TOK.eos]
  same(hf.load_folder(out, SMALL, alone), params)
  hf.export_folder(wide, params, SMALL, tok, of=of, dtype="float32")
  assert hf.given(wide).dtype == "float32"
