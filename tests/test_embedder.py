"""What embeds the pool: first layers, another decoder, an encoder."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers

import jobs
from jaxalign import embedder
from jaxalign import sharding
from jaxalign.data import records
from jaxalign.data import tokens as tokens_lib
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.errors import ConfigError
from jaxalign.model import decoder
from jaxalign.model import weights
from jaxalign.select import store
from configs import common

TWO = "model.layers=2"


@pytest.fixture(scope="module")
def whole():
  """A tiny job of two layers whose reference embeds, only read."""
  folder = jobs.folder() / "two_layers"
  ended = jobs.run(folder, TWO)
  assert ended.code == 0, ended
  return folder


def branch(whole, tmp_path, *flags):
  """The same job from its embed stage on, by another embedder."""
  folder = tmp_path / "job"
  folder.mkdir()
  shutil.copytree(whole / "shared", folder / "shared",
                  ignore=shutil.ignore_patterns("embed", "mixture"))
  ended = jobs.run(folder, TWO, *flags)
  assert ended.code == 0, ended
  assert "sft" not in jobs.did(ended)
  return folder, ended


def array(folder, name):
  return np.load(folder / name)


def arm_of(folder, sampler="isa"):
  return folder / "runs" / f"{sampler}-0.1-seed0"


def test_take_is_the_rows_asked_for():
  rows = tokens_lib.TokenRows(
      np.arange(9, dtype=np.int32), np.array([0, 2, 5, 9]),
      np.array([1, 2, 3], np.int32), np.array([0, 7, 0], np.int32))
  some = tokens_lib.take(rows, np.array([2, 0, 2]))
  assert some.ids.tolist() == [5, 6, 7, 8, 0, 1, 5, 6, 7, 8]
  assert some.offsets.tolist() == [0, 4, 6, 10]
  assert some.start.tolist() == [3, 1, 3] and some.cut.tolist() == [0, 0, 0]
  assert tokens_lib.take(rows, np.array([1])).cut.tolist() == [7]
  assert len(tokens_lib.take(rows, np.array([], int)).ids) == 0


def test_first_layers_embed_and_the_reference_scores_what_is_kept(
    whole, tmp_path):
  folder, _ = branch(whole, tmp_path, "embed.layers=1")
  found = sorted(store.open_store(folder / "shared/embed/store").columns)
  assert found == ["embedding", "id"]  # no log-probabilities
  short = array(folder, "shared/embed/store/embedding/00000.npy")
  full = array(whole, "shared/embed/store/embedding/00000.npy")
  assert short.shape == full.shape and not np.allclose(short, full, atol=1e-3)
  # The cut decoder by hand: the same weights, one layer of two.
  c = common.base("tiny")
  c.model.layers = 2
  mesh = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    export = arm_of(whole) / "export"
    m = weights.read_config(export, "float32", "none")._replace(context=32)
    job = jobs.job_lib.Job(c, mesh, whole)
    params = {n: w[:1] if n.startswith("layers/") else w
              for n, w in job.reference.items()}
    rows = job.tokens("pool")
    tokens, _ = tokens_lib.pad(rows, np.arange(8), 32)
    x = np.asarray(jax.jit(lambda p, t: decoder.forward(
        p, t, m._replace(layers=1)))(params, tokens), np.float64)
  for i, n in enumerate(tokens_lib.lengths(rows)[:8]):
    np.testing.assert_allclose(short.reshape(-1, short.shape[-1])[i],
                               x[i, :n].mean(0), rtol=0, atol=1e-5)
  # The reference's numbers of the kept rows are those of its own full pass.
  ids = json.loads((arm_of(folder) / "ref_ids.json").read_text())
  where = [job.column("pool", "id").index(i) for i in ids]
  logp = store.read(whole / "shared/embed/store", "logp")
  np.testing.assert_allclose(array(arm_of(folder), "ref_sum.npy"),
                             logp[where], rtol=0, atol=1e-4)
  np.testing.assert_array_equal(
      array(arm_of(folder), "ref_count.npy"),
      array(whole, "shared/embed/store/count/00000.npy")[where])
  first = jobs.lines(arm_of(folder) / "metrics.jsonl")[0]
  assert first["train/preference_loss"] == pytest.approx(np.log(2), abs=1e-5)
  # The ledger: half the layers, no head; then the kept rows by the whole.
  cards = {s: json.loads((folder / at).read_text())["cost"]["operations"]
           for s, at in (("embed", "shared/embed/cards/embed.json"),
                         ("ref", "runs/isa-0.1-seed0/cards/ref_logps.json"))}
  sizes = tokens_lib.lengths(rows)
  d, f = 32, 64
  layer = lambda n: 2 * n * (4 * d * d + 3 * d * f) + 4 * d * n * n
  assert cards["embed"] == sum(layer(int(n)) for n in sizes)
  kept = sizes.reshape(-1, 2)[where].reshape(-1)
  assert cards["ref"] == sum(2 * layer(int(n)) + 2 * d * m.vocab * int(n)
                             for n in kept)
  summary = json.loads((folder / "summary.json").read_text())["ledger"]
  drawn, = [s["operations"] for s in summary["stages"]
            if (s["stage"], s["arm"]) == ("select", "random-0.1-seed0")]
  assert 0 < drawn == summary["arms"]["random-0.1-seed0"]["select"]
  everything = json.loads((whole / "summary.json").read_text())["ledger"]
  assert summary["everything"] == everything["everything"]


@pytest.mark.slow
def test_another_decoder_embeds_in_its_own_tokens(whole, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(arm_of(whole) / "export", other)
  folder, ended = branch(whole, tmp_path, f"embed.checkpoint={other}",
                         "embed.pooling=last", "embed.layers=1")
  tokens = tokens_lib.load_rows(folder / "shared/embed", "tokens")
  tok = load_tokenizer(other)
  texts = embedder.texts_of(records.read_table(
      folder / "shared/data/pool.parquet"))
  for i in (0, 1, 77):
    ids = tokens.ids[tokens.offsets[i]:tokens.offsets[i + 1]]
    assert ids.tolist() == [tok.bos, *tok.encode(texts[i])][:1] + tok.encode(
        texts[i])[-31:]
  x = array(folder, "shared/embed/store/embedding/00000.npy")
  assert x.shape == (160, 2, 32)
  again = jobs.run(folder, TWO, f"embed.checkpoint={other}",
                   "embed.pooling=last", "embed.layers=1")
  assert again.code == 0 and jobs.did(again) == []
  # Other weights under the same name are noticed.
  file = other / "model.safetensors"
  data = bytearray(file.read_bytes())
  data[-3] ^= 1
  file.write_bytes(data)
  changed = jobs.run(folder, TWO, f"embed.checkpoint={other}", "--redo",
                     "embed.pooling=last", "embed.layers=1")
  assert changed.code == 0 and jobs.did(changed)[0] == "embed"


def test_an_encoder_embeds(whole, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  import test_encoder
  encoder = tmp_path / "encoder"
  test_encoder.save(encoder)
  folder, _ = branch(whole, tmp_path, f"embed.checkpoint={encoder}",
                     "embed.pooling=auto")
  x = array(folder, "shared/embed/store/embedding/00000.npy")
  assert x.shape[:2] == (160, 2) and np.isfinite(x).all()
  # Another reference is no other embedding, but other log-probs and a start.
  card = lambda path: json.loads((folder / path).read_text())
  sft = card("shared/sft/cards/sft.json")["key"]
  for stage in ("ref_logps", "align"):
    assert card(f"runs/isa-0.1-seed0/cards/{stage}.json")["inputs"]["sft"] == (
        sft)
  # Chosen first, then rejected, of every row in order: by transformers.
  model = transformers.AutoModel.from_pretrained(encoder).eval()
  tok = tokenizers.Tokenizer.from_file(str(encoder / "tokenizer.json"))
  rows = records.read_table(folder / "shared/data/pool.parquet")
  for i, side in ((0, 0), (5, 1), (159, 1)):
    text = rows[i]["prompt"] + rows[i][("chosen", "rejected")[side]]
    with torch.no_grad():
      wanted = model(torch.tensor([tok.encode(text).ids])).last_hidden_state
    np.testing.assert_allclose(x[i, side], wanted[0].mean(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("flags,words", [
    (["embed.layers=3"], "embed.layers=3, the model has 1"),
    (["embed.layers=-1"], "embed.layers=-1, the model has 1"),
    (["embed.pooling=cls"], "embed.pooling='cls' is not of a decoder"),
    (["embed.checkpoint=nowhere"], "nowhere has no config.json")])
def test_what_cannot_embed_is_refused_before_anything(tmp_path, flags, words):
  ended = jobs.run(tmp_path / "job", *flags)
  assert ended.code == 64 and words in ended.err
  assert not (tmp_path / "job" / "shared").exists()


def test_an_encoder_has_no_first_layers(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "bert"}')
  c = common.base("tiny")
  c.embed.checkpoint, c.embed.layers = str(tmp_path), 2
  with pytest.raises(ConfigError, match="embed.layers=2 is of decoders"):
    embedder.choose(c, None)


@pytest.mark.parametrize("config,most", [
    ("mistral_7b_kto_isa.py", None), ("mistral_7b_kto_isa.py:early", 3.0),
    ("mistral_7b_kto_isa.py:encoder", 3.0), ("qwen3_8b_dpo.py", None),
    ("gemma3_4b_lora.py", None)])
def test_a_production_config_plans_without_the_net(tmp_path, config, most):
  """Selecting in the two cheap variants costs under 3 % of a full run."""
  ended = jobs.run(tmp_path / "job", "--dry_run", "--force", config=config,
                   *("data.assume_rows=101892", "data.assume_tokens=500"))
  assert ended.code == 0, ended.err
  assert "122,270" in ended.out or "61,135" in ended.out
  share = float(ended.out.split("selecting by isa costs ")[1].split("%")[0])
  assert share < most if most else share > 1.0
  assert "memory a device" in ended.out
