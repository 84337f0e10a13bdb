"""What embeds the pool: first layers, another decoder, an encoder."""

import importlib
import json
import shutil
import sys

import jax
import jobs
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest
import tokenizers

from configs import common
from jaxalign import pipeline
from jaxalign.core import artifacts, sharding
from jaxalign.core.errors import ConfigError
from jaxalign.data import tables
from jaxalign.data import tokens as tokens_lib
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.embed import embedder, store
from jaxalign.embed import passes as embed
from jaxalign.embed.over_pool import KEEPS
from jaxalign.model import decoder, hf

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
  shutil.copytree(
    whole / "shared",
    folder / "shared",
    ignore=shutil.ignore_patterns("embed", "mixture"),
  )
  ended = jobs.run(folder, TWO, *flags)
  assert ended.code == 0, ended
  assert "sft" not in jobs.did(ended)
  return folder, ended


def array(folder, name):
  return np.load(folder / name)


def stored(folder, stage, name):
  return store.read(folder / f"shared/{stage}/store", name)


def arm_of(folder, sampler="isa"):
  return folder / "runs" / f"{sampler}-0.1-seed0"


def read_json(path):
  return json.loads(path.read_text())


def flops(folder, stage):
  return read_json(folder / f"records/{stage}.json")["cost"]["flops"]


def spent(folder, *stages):
  return [flops(folder / "shared" / s, s) for s in stages]


def ledger(folder):
  return read_json(folder / "summary.json")["ledger"]


def kept_rows(folder, ids, sampler="isa"):
  """Row numbers of an arm's kept rows, in the order of its arrays."""
  kept = read_json(arm_of(folder, sampler) / "ref_ids.json")
  return [ids.index(i) for i in kept]


def flip(path, at, bit):
  data = bytearray(path.read_bytes())
  data[at] ^= bit
  path.write_bytes(data)


def test_take_is_the_rows_asked_for():
  rows = tokens_lib.TokenRows(
    np.arange(9, dtype=np.int32),
    np.array([0, 2, 5, 9]),
    np.array([1, 2, 3], np.int32),
    np.array([0, 7, 0], np.int32),
  )
  some = tokens_lib.take_rows(rows, np.array([2, 0, 2]))
  assert some.ids.tolist() == [5, 6, 7, 8, 0, 1, 5, 6, 7, 8]
  assert some.offsets.tolist() == [0, 4, 6, 10]
  assert some.start.tolist() == [3, 1, 3] and some.cut.tolist() == [0, 0, 0]
  assert tokens_lib.take_rows(rows, np.array([1])).cut.tolist() == [7]
  assert len(tokens_lib.take_rows(rows, np.array([], int)).ids) == 0


def test_first_layers_embed_and_the_reference_scores_what_is_kept(
  whole, tmp_path
):
  folder, _ = branch(whole, tmp_path, "embed.layers=1")
  found = sorted(store.open_store(folder / "shared/embed/store").columns)
  assert found == ["embedding"]  # no log-probabilities
  short = array(folder, "shared/embed/store/embedding.npy")
  full = array(whole, "shared/embed/store/embedding.npy")
  assert short.shape == full.shape and not np.allclose(short, full, atol=1e-3)
  # The cut decoder by hand: the same weights, one layer of two.
  c = common.base("tiny")
  c.model.layers = 2
  mesh = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    m = hf.read_config(arm_of(whole) / "export", "float32", "none")
    one = m._replace(context=32, layers=1)
    job = pipeline.make_job(c, mesh, whole)
    params = {
      n: w[:1] if n.startswith("layers/") else w
      for n, w in job.reference.items()
    }
    rows = job.tokens("pool")
    tokens, _ = tokens_lib.pad_rows(rows, np.arange(8), 32)
    x = jax.jit(lambda p, t: decoder.forward(p, t, one))(params, tokens)
    x = np.asarray(x, np.float64)
  flat = short.reshape(-1, short.shape[-1])
  for i, n in enumerate(tokens_lib.row_lengths(rows)[:8]):
    assert_allclose(flat[i], x[i, :n].mean(0), rtol=0, atol=1e-5)
  # The reference's numbers of the kept rows are those of its own full pass.
  where = kept_rows(folder, job.column("pool", "id"))
  logp, count = (stored(whole, "embed", n)[where] for n in ("logp", "count"))
  got = array(arm_of(folder), "ref_sum.npy")
  assert_allclose(got, logp, rtol=0, atol=1e-4)
  assert_array_equal(array(arm_of(folder), "ref_count.npy"), count)
  first = jobs.lines(arm_of(folder) / "metrics.jsonl")[0]
  assert first["train/preference_loss"] == pytest.approx(np.log(2), abs=1e-5)
  # The ledger: half the layers, no head; then the kept rows by the whole.
  sizes = tokens_lib.row_lengths(rows)
  d, f = 32, 64
  layer = lambda n: 2 * n * (4 * d * d + 3 * d * f) + 4 * d * n * n
  assert spent(folder, "embed") == [sum(layer(int(n)) for n in sizes)]
  kept = map(int, sizes.reshape(-1, 2)[where].reshape(-1))
  whole_pass = sum(2 * layer(n) + 2 * d * m.vocab * n for n in kept)
  assert flops(arm_of(folder), "ref_logps") == whole_pass
  drawn = flops(arm_of(folder, "random"), "select")
  assert 0 < drawn == ledger(folder)["arms"]["random-0.1-seed0"]["select"]
  assert ledger(folder)["everything"] == ledger(whole)["everything"]


@pytest.mark.slow
def test_another_decoder_embeds_in_its_own_tokens(whole, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(arm_of(whole) / "export", other)
  flags = (f"embed.checkpoint={other}", "embed.pooling=last")
  flags += ("embed.layers=1", "select.sampler=real", "compare=()")
  folder, ended = branch(whole, tmp_path, *flags)
  tokens = tokens_lib.load_rows(folder / "shared/embed", "tokens")
  # Answers in a pass of their own, behind prompts tokenised apart.
  apart = tokens_lib.load_rows(folder / "shared/answer", "tokens")
  tok = load_tokenizer(other)
  rows = tables.read_table(folder / "shared/data/pool.parquet")
  ids_of = lambda x, i: x.ids[x.offsets[i] : x.offsets[i + 1]].tolist()
  for i in (0, 1, 77):
    row, side = rows[i // 2], ("chosen", "rejected")[i % 2]
    whole_text = tok.encode(row["prompt"] + row[side])
    assert ids_of(tokens, i) == [tok.bos] + whole_text[-31:]
    answer = tok.encode_responses([row[side]])[0]
    got = ids_of(apart, i)
    assert got == [tok.bos] + (tok.encode(row["prompt"]) + answer)[-31:]
    assert got[apart.start[i] :] == answer[-31:]
  x = array(folder, "shared/embed/store/embedding.npy")
  assert x.shape == (160, 2, 32)
  y = stored(folder, "answer", "answer_embedding")
  assert y.shape == x.shape and not np.allclose(x, y, atol=1e-3)
  again = jobs.run(folder, TWO, *flags)
  assert again.code == 0 and jobs.did(again) == []
  # Other weights under the same name are noticed.
  flip(other / "model.safetensors", -3, 1)
  changed = jobs.run(folder, TWO, *flags, "--redo")
  assert changed.code == 0 and jobs.did(changed)[:2] == ["embed", "answer"]


def test_an_encoder_embeds(whole, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  import test_encoder

  encoder = tmp_path / "encoder"
  encoder.mkdir()
  test_encoder.save(encoder)
  flags = (f"embed.checkpoint={encoder}", "embed.pooling=auto")
  flags += ("select.sampler=real", "compare=()")
  folder, _ = branch(whole, tmp_path, *flags)
  x = array(folder, "shared/embed/store/embedding.npy")
  assert x.shape[:2] == (160, 2) and np.isfinite(x).all()
  # Another reference is no other embedding, but other log-probs and a start.
  sft = read_json(folder / "shared/sft/records/sft.json")["content"]
  for stage in ("ref_logps", "align"):
    record = read_json(arm_of(folder, "real") / f"records/{stage}.json")
    assert record["inputs"]["sft"] == sft
  y = stored(folder, "answer", "answer_embedding")
  # Chosen first, then rejected, of every row in order: by transformers. Of
  # answers the text alone.
  model = transformers.AutoModel.from_pretrained(encoder).eval()
  tok = tokenizers.Tokenizer.from_file(str(encoder / "tokenizer.json"))
  rows = tables.read_table(folder / "shared/data/pool.parquet")
  for i, side in ((0, 0), (5, 1), (159, 1)):
    answer = rows[i][("chosen", "rejected")[side]]
    for text, got in ((rows[i]["prompt"] + answer, x), (answer, y)):
      with torch.no_grad():
        wanted = model(torch.tensor([tok.encode(text).ids])).last_hidden_state
      assert_allclose(got[i, side], wanted[0].mean(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  "flags,words",
  [
    (["embed.layers=3"], "embed.layers=3, the model has 1"),
    (["embed.layers=-1"], "embed.layers=-1, the model has 1"),
    (["embed.pooling=cls"], "embed.pooling='cls' is not of a decoder"),
    (["embed.shard=0"], "config.embed.shard"),
    (["embed.store_dtype=int7"], "config.embed.store_dtype"),
    (["embed.checkpoint=nowhere"], "nowhere has no config.json"),
  ],
)
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


@pytest.mark.parametrize(
  "config,most",
  [
    ("mistral_7b_kto_isa.py", None),
    ("mistral_7b_kto_isa.py:early", 3.0),
    ("mistral_7b_kto_isa.py:encoder", 3.0),
    ("qwen3_8b_dpo.py", None),
    ("gemma3_4b_lora.py", None),
  ],
)
def test_a_production_config_plans_without_the_net(tmp_path, config, most):
  """Selecting in the two cheap variants costs under 3 % of a full run."""
  flags = ("--dry_run", "--force", "data.assume=(71924,500)")
  ended = jobs.run(tmp_path / "job", *flags, config=config)
  assert ended.code == 0, ended.err
  assert "122,270" in ended.out or "61,135" in ended.out
  percent = float(ended.out.split("selecting by isa costs ")[1].split("%")[0])
  assert percent < most if most else percent > 1.0
  assert "memory a device" in ended.out


# One pass of the reference, whatever its outputs.


def passes_of(monkeypatch):
  """Grows by (label, outputs) with every pass over rows of the pool."""
  seen, real = [], embed.map_rows

  def noted(mesh, fn, params, rows, shapes, context, options):
    if options.label in KEEPS:
      seen.append((options.label, tuple(shapes)))
    return real(mesh, fn, params, rows, shapes, context, options)

  monkeypatch.setattr(embed, "map_rows", noted)
  return seen


def test_first_layers_and_all_that_the_last_says_come_of_one_pass(
  whole, tmp_path, monkeypatch
):
  seen = passes_of(monkeypatch)
  flags = ("embed.layers=1", "select.sampler=random")
  folder, ended = branch(whole, tmp_path, *flags, "compare=('crossfit',)")
  assert jobs.did(ended)[:5] == [*KEEPS, "select"]
  assert seen == [("embed", tuple(embed.OUTPUTS))]
  for name in ("logp", "count"):  # of all layers, as of a pass of their own
    got = stored(folder, "logps", name)
    assert_array_equal(got, stored(whole, "embed", name))
  ids = tables.read_column(folder / "shared/data/pool.parquet", "id")
  wanted = stored(folder, "logps", "logp")[kept_rows(folder, ids, "crossfit")]
  crossfit = arm_of(folder, "crossfit")
  assert_array_equal(array(crossfit, "ref_sum.npy"), wanted)
  assert flops(crossfit, "ref_logps") == 0
  # What each adds: a layer; a layer and the head; nothing; the head's slope.
  d, f, v = 32, 64, 512
  rows = tokens_lib.load_rows(folder / "shared/data", "pool")
  sizes = tokens_lib.row_lengths(rows)
  each = lambda n: 2 * n * (4 * d * d + 3 * d * f) + 4 * d * n**2
  layer = sum(each(int(n)) for n in sizes)
  head = 2 * d * v * int(sizes.sum())
  assert spent(folder, *KEEPS) == [layer, layer + head, 0, 2 * head]
  costs = ledger(folder)["arms"]["crossfit-0.1-seed0"]
  both = flops(crossfit, "select") + (2 * layer + 3 * head)
  assert (costs["select"], costs["reference"]) == (both, 0)
  # Another sampler's arm finds its column there; alone it had cost a layer.
  more = jobs.run(folder, TWO, *flags, "compare=('crossfit','real')")
  assert more.code == 0 and not {*jobs.did(more)} & {*KEEPS}, more
  assert len(seen) == 1
  arms = ledger(folder)["arms"]
  choice = flops(arm_of(folder, "real"), "select")
  assert arms["real-0.1-seed0"]["select"] == choice + layer
  assert arms["crossfit-0.1-seed0"]["select"] == both


@pytest.mark.slow
def test_a_sampler_that_comes_later_has_only_what_is_missing_made(
  tmp_path, monkeypatch
):
  work, seen = jobs.copy(tmp_path / "work"), passes_of(monkeypatch)
  before = {
    p: p.stat().st_mtime_ns for p in (work / "shared").rglob("*") if p.is_file()
  }
  flags = ("select.sampler=crossfit", "compare=()")
  ended = jobs.run(work, *flags)
  assert ended.code == 0, ended
  assert jobs.did(ended)[:3] == ["answer", "residual", "select"]
  assert seen == [("answer", ("answer_embedding", "residual", "least"))]
  assert before == {p: p.stat().st_mtime_ns for p in before}
  # A corrupt shard of one is made again, and no other.
  names = ("residual", "least")
  wanted = {n: np.array(stored(work, "residual", n)) for n in names}
  flip(work / "shared/residual/store/least.npy", -2, 4)
  again = jobs.run(work, *flags)
  assert again.code == 0 and jobs.did(again) == ["residual"], again
  assert seen[1:] == [("residual", ("residual", "least"))]
  for name, x in wanted.items():
    assert_array_equal(stored(work, "residual", name), x)


@pytest.mark.slow
def test_a_pass_that_is_killed_goes_on_in_all_its_stores(tmp_path):
  flags = ("select.sampler=crossfit", "compare=('real',)", "embed.shard=16")
  wanted = jobs.run(tmp_path / "wanted", *flags)
  assert wanted.code == 0, wanted
  work = tmp_path / "work"
  hook = jobs.kill_at_shard(4, "residual")
  assert jobs.wait(jobs.start(work, *flags, hook=hook)).code == -9
  count = lambda s: len([*work.glob(f"shared/{s}/store/shards/*.json")])
  assert (count("embed"), count("answer"), count("residual")) == (5, 5, 4)
  # Once more, between the stages: the first has finished, no other.
  hook = jobs.kill_when("core.artifacts:_write_record", at=5)
  assert jobs.wait(jobs.start(work, *flags, hook=hook)).code == -9
  record = lambda stage: artifacts.read_record(work / "shared" / stage, stage)
  assert record("embed").finished and not record("residual").finished
  ended = jobs.run(work, *flags)
  assert ended.code == 0 and "embed" not in jobs.did(ended), ended
  outcomes = jobs.outcome(tmp_path / "wanted"), jobs.outcome(work)
  assert not jobs.differences(*outcomes)
  stages = ("embed", "answer", "residual")
  assert spent(work, *stages) == spent(tmp_path / "wanted", *stages)


@pytest.mark.slow
def test_a_loss_without_a_reference_pays_for_no_pass_of_it(tmp_path):
  """In an arm alone and in aligning on everything alike."""
  before = ledger(jobs.finished())
  work = jobs.copy(tmp_path / "work")
  ended = jobs.run(work, "loss.name=simpo", "--redo")
  assert ended.code == 0, ended
  found, name = ledger(work), "random-0.1-seed0"
  assert before["arms"][name]["reference"] > 0
  assert found["arms"][name]["reference"] == 0
  # One forward and its backward: what is left is the whole pool's one pass.
  saved = before["everything"] - found["everything"]
  assert [saved] == spent(work, "embed")


@pytest.mark.slow
def test_a_loss_that_is_edited_to_read_the_reference_gets_it(
  tmp_path, monkeypatch
):
  """Its name is as before; zeros stand where nothing was to be read."""
  monkeypatch.syspath_prepend(tmp_path)
  work = jobs.copy(tmp_path / "work")

  def sums(**marks):
    (tmp_path / "edited_loss.py").write_text(
      "from jaxalign.train.losses import needs\n"
      f"@needs('pairs', **{marks})\n"
      "def pull(policy, ref, stats):\n"
      "  return policy.sum[:, 1] - policy.sum[:, 0], {}\n"
    )
    sys.modules.pop("edited_loss", None)
    importlib.invalidate_caches()
    flags = ("loss.name=edited_loss:pull", "embed.layers=1", "compare=()")
    ended = jobs.run(work, *flags, "--redo")
    assert ended.code == 0, ended
    return array(arm_of(work), "ref_sum.npy")

  try:
    assert not sums(reference=False).any()
    assert (sums(reference=True) < 0).all()
  finally:
    sys.modules.pop("edited_loss", None)
