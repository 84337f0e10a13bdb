"""Hugging Face folders: read, written, and refused with all that is wrong."""

import functools
import json
import pickle
import struct
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxalign import sharding
from jaxalign.data import tokenizer as tokenizers
from jaxalign.errors import ConfigError, DataError
from jaxalign.model import decoder
from jaxalign.model import weights

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TEXTS = ["bako ti ruda\n\nmo", " ti ruda bako 12", "ruda", "ma\u00df \u2603 mo"]
TOK = tokenizers.Tokenizer(tokenizers.train(TEXTS * 9, 300))
SMALL = decoder.ModelConfig(
    layers=2, width=16, heads=4, kv_heads=2, head_size=6, ff=10, vocab=320,
    context=32, rope_theta=900.0, norm_eps=2e-4, tied=False)


def random_params(m, mesh, seed=0):
  rng = np.random.default_rng(seed)
  return {n: sharding.put(mesh, np.float32(rng.normal(
      1.0 if p.scale == 0 else 0.0, 0.2, p.shape)), *p.axes)
          for n, p in decoder.table(m).items()}


@functools.lru_cache
def logits_fn(m):
  def run(params, tokens):
    return decoder.logits(decoder.forward(params, tokens, m),
                          decoder.head(params, m))
  return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def ours(mesh, params, m, tokens):
  return np.asarray(logits_fn(m)(params, sharding.put(mesh, tokens, "batch")))


def theirs(folder, tokens):
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, local_files_only=True)
  with torch.no_grad():
    return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_export_is_loaded_by_transformers_offline(mesh, tmp_path, tied):
  m = SMALL._replace(tied=tied)
  params = random_params(m, mesh)
  assert weights.export_folder(tmp_path / "export", params, m, TOK) == [
      "export"]
  folder = str(tmp_path / "export")
  tokens = np.random.default_rng(1).integers(0, m.vocab, (4, 16))
  np.testing.assert_allclose(ours(mesh, params, m, tokens),
                             theirs(folder, tokens), rtol=0, atol=1e-4)
  peer = transformers.AutoTokenizer.from_pretrained(
      folder, local_files_only=True)
  for text in TEXTS:
    assert peer(text)["input_ids"] == TOK.encode(text, begins=True)
  assert (peer.bos_token_id, peer.eos_token_id) == (TOK.bos, TOK.eos)
  said = json.loads((tmp_path / "export/generation_config.json").read_text())
  assert said == dict(bos_token_id=TOK.bos, eos_token_id=TOK.eos)
  # And by us: the sizes, and every bit.
  assert weights.read_config(folder, "float32", "none") == m
  back = weights.load_folder(folder, m, mesh)
  for n, w in params.items():
    np.testing.assert_array_equal(back[n], w, err_msg=n)
    assert back[n].sharding == w.sharding, n


def test_a_real_checkpoint_in_and_out(mesh, shared, tmp_path):
  folder = shared / "models/stories260K"
  m = weights.read_config(folder, "float32", "none")
  params = weights.load_folder(folder, m, mesh)
  tok = tokenizers.Tokenizer.load(folder)
  text = (folder / "greedy_257_tokens.txt").read_text()
  tokens = np.array(tok.encode(text, begins=True)[:64]).reshape(4, 16)
  logits = ours(mesh, params, m, tokens)
  np.testing.assert_allclose(logits, theirs(str(folder), tokens), rtol=0,
                             atol=1e-4)
  weights.export_folder(tmp_path, params, m, tok)
  np.testing.assert_allclose(theirs(str(tmp_path), tokens),
                             theirs(str(folder), tokens), rtol=0, atol=1e-5)


# What cannot be read.


@pytest.fixture
def alone():
  m = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  with jax.set_mesh(m):
    yield m


@pytest.fixture
def folder(tmp_path, alone):
  weights.export_folder(tmp_path, random_params(SMALL, alone), SMALL, TOK)
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
  raw = json.loads(data[8:8 + size])
  change(raw)
  text = json.dumps(raw).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size:])


def read(folder):
  return weights.read_config(folder, "float32", "none")


def test_no_config(tmp_path):
  with pytest.raises(ConfigError, match="no config.json; set config.model."):
    read(tmp_path)


@pytest.mark.parametrize("changes,words", [
    (dict(model_type="gpt2"), "model_type='gpt2' is unknown; known: llama"),
    (dict(model_type="mixtral"), "mixtures of experts are out of scope"),
    (dict(hidden_act="tanh"), "hidden_act='tanh' is unknown"),
    (dict(rope_parameters=dict(rope_type="magic")), "rope_type='magic'"),
    (dict(num_attention_heads="absent"), "num_attention_heads"),
    (dict(model_type="absent"), "model_type"),
    (dict(hidden_size="large"), "config.json is no config.*'large'")])
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
  with pytest.raises(ConfigError, match=(
      "has no model.safetensors and no model.safetensors.index.json$")):
    weights.load_folder(folder, SMALL, alone)
  (folder / "pytorch_model.bin").write_bytes(pickle.dumps(1))
  with pytest.raises(ConfigError, match=(
      "pytorch_model.bin is a pickle, which can run code: convert it with "
      "transformers' save_pretrained")):
    weights.load_folder(folder, SMALL, alone)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_a_file_cut_short(folder, alone, keep):
  path = folder / "model.safetensors"
  data = path.read_bytes()
  path.write_bytes(data[:int(keep * len(data)) if keep == 0.5 else keep])
  with pytest.raises(DataError, match="model.safetensors is cut short"):
    weights.load_folder(folder, SMALL, alone)


def test_a_header_that_claims_the_world(folder, alone):
  began = time.monotonic()
  def shape(raw):
    raw["model.norm.weight"].update(shape=[10**9, 10**9],
                                    data_offsets=[0, 4 * 10**18])
  header(folder, shape)
  with pytest.raises(DataError, match="damaged at model.norm.weight"):
    weights.load_folder(folder, SMALL, alone)
  path = folder / "model.safetensors"
  path.write_bytes(struct.pack("<Q", 10**18) + b"{}")
  with pytest.raises(DataError, match="its header wants 1,000,000,000,000"):
    weights.load_folder(folder, SMALL, alone)
  # A config may claim as much; nothing of that size is allocated.
  with pytest.raises(DataError):
    weights.load_folder(folder, SMALL._replace(vocab=10**12), alone)
  assert time.monotonic() - began < 2


@pytest.mark.parametrize("change", [
    dict(shape=[-16], data_offsets=[64, 0]), dict(shape=[16, -1]),
    dict(data_offsets=[-8, 56])], ids=str)
def test_a_header_that_makes_no_sense(folder, alone, change):
  header(folder, lambda raw: raw["model.norm.weight"].update(change))
  with pytest.raises(DataError, match="damaged at model.norm.weight"):
    weights.load_folder(folder, SMALL, alone)


@pytest.mark.parametrize("change", [
    dict(data_offsets=[0]), dict(shape="16"), dict(shape=[16.0]),
    dict(shape=3), dict(data_offsets=[0.0, 64.0]),
    dict(data_offsets=[None, 64])], ids=str)
def test_a_header_of_the_wrong_kind(folder, alone, change):
  header(folder, lambda raw: raw["model.norm.weight"].update(change))
  with pytest.raises(DataError, match="safetensors is damaged: its header"):
    weights.load_folder(folder, SMALL, alone)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"{'a'", b"[1, 2]", b"3",
                                  b'{"a": 3}', b'{"a": {"dtype": "F32"}}'])
def test_a_header_that_is_no_header(folder, alone, text):
  (folder / "model.safetensors").write_bytes(
      struct.pack("<Q", len(text)) + text)
  with pytest.raises(DataError, match="model.safetensors"):
    weights.load_folder(folder, SMALL, alone)


def test_a_kind_of_number_that_is_not_read(folder, alone):
  rewrite(folder, lambda t: t.update(
      {"model.norm.weight": np.zeros(16, np.float64)}))
  with pytest.raises(DataError, match="model.norm.weight is F64, wanted one "
                     "of F32, F16, BF16"):
    weights.load_folder(folder, SMALL, alone)


def test_everything_that_does_not_match_is_listed_at_once(folder, alone):
  def spoil(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.7.extra.weight"] = np.zeros(2, np.float32)
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    tensors["lm_head.weight"][3, 5] = np.nan
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.full(
        (12, 16), np.inf, np.float32)
  rewrite(folder, spoil)
  with pytest.raises(DataError) as caught:
    weights.load_folder(folder, SMALL, alone)
  for words in ("model.layers.1.mlp.up_proj.weight is missing",
                "model.layers.7.extra.weight is surplus",
                "model.norm.weight is (17,), wanted (16,)",
                "lm_head.weight holds NaN or infinity",
                "model.layers.0.self_attn.k_proj.weight holds NaN"):
    assert words in str(caught.value)
  assert str(caught.value).count(";") == 4


def test_a_long_list_is_cut_and_counted(folder, alone):
  rewrite(folder, lambda t: t.update(
      {f"x{i:02d}": np.zeros(1, np.float32) for i in range(25)}))
  with pytest.raises(DataError, match="x19 is surplus; and 5 more$"):
    weights.load_folder(folder, SMALL, alone)
  with pytest.raises(DataError, match="wanted \\(1000000000000, 16\\)"):
    weights.load_folder(folder, SMALL._replace(vocab=10**12), alone)


def test_half_precision_and_old_buffers_are_read(folder, alone):
  exact = weights.load_folder(folder, SMALL, alone)
  def halve(tensors):
    for n, kind in (("model.norm.weight", np.float16),
                    ("lm_head.weight", ml_dtypes.bfloat16)):
      tensors[n] = tensors[n].astype(kind)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(
        3, np.float32)
  rewrite(folder, halve)
  got = weights.load_folder(folder, SMALL, alone)
  assert all(w.dtype == np.float32 for w in got.values())
  np.testing.assert_allclose(got["norm"], exact["norm"], rtol=1e-3)
  np.testing.assert_allclose(got["head"], exact["head"], rtol=1e-2)
  np.testing.assert_array_equal(got["layers/wq"], exact["layers/wq"])
  # A tied model may carry its head a second time.
  rewrite(folder, lambda t: t.pop(
      "model.layers.0.self_attn.rotary_emb.inv_freq"))
  tied = weights.load_folder(folder, SMALL._replace(tied=True), alone)
  assert "head" not in tied
