"""Reward models: transformers' numbers, on any mesh; rows as they read them."""

import functools
import json

import jax
from models import make_mesh, save_drawn, sized, word_pieces
import numpy as np
import pytest
import safetensors.numpy
from test_encoder import VOCAB
from test_ledger import multiplied

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import tokens
from jaxalign.embed import questions, row_scores
from jaxalign.embed.passes import PassOptions
from jaxalign.model import encoder, reward, weights
from jaxalign.model.flops import reward_flops
from jaxalign.model.parameters import check_mesh

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("quick_compiles")

SIZES = dict(
  vocab_size=len(VOCAB),
  hidden_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=40,
  max_position_embeddings=40,
  num_labels=1,
  pad_token_id=0,
)
KINDS = {
  "llama": dict(num_key_value_heads=2),
  "qwen2": dict(num_key_value_heads=2, pad_token_id=1),
  "gpt_neox": dict(),
  "gemma2": dict(num_key_value_heads=2, head_dim=6, query_pre_attn_scalar=6),
  "bert": dict(),
  "roberta": dict(pad_token_id=1),
}


def save(folder, kind, **more):
  """A classifier of transformers with every number drawn; returns it."""
  torch.manual_seed(0)
  sizes = SIZES | KINDS[kind] | more
  model = transformers.AutoModelForSequenceClassification.from_config(
    transformers.AutoConfig.for_model(kind, **sizes),
    attn_implementation="eager",
  )
  return save_drawn(folder, model)


def drawn_rows(n=9, seed=0):
  """n rows of 2 to 19 tokens whose second text begins somewhere."""
  rng = np.random.default_rng(seed)
  sizes = rng.integers(2, 20, n)
  ids = rng.integers(2, len(VOCAB), sizes.sum()).astype(np.int32)
  return tokens.TokenRows(
    ids,
    np.cumsum([0, *sizes]),
    np.int32(rng.integers(1, sizes)),
    np.zeros(n, np.int32),
  )


def theirs(model, rows, kind):
  """The numbers of transformers, of each row alone and without padding."""
  out = []
  for i, start in enumerate(rows.start):
    ids = torch.tensor(rows.ids[rows.offsets[i] : rows.offsets[i + 1]]).long()
    second = (torch.arange(len(ids)) >= int(start)).long()[None]
    more = dict(token_type_ids=second) if kind == "bert" else {}
    with torch.no_grad():
      out.append(float(model(input_ids=ids[None], **more).logits[0, 0]))
  return np.array(out)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "kind,shape",
  [
    ("llama", (1, 1)),
    ("bert", (1, 1)),
    *(
      pytest.param(kind, shape, marks=SLOW)
      for kind in KINDS
      for shape in ((1, 1), (4, 2))
      if (kind in ("llama", "bert")) == (shape == (4, 2))
    ),
  ],
)
def test_rewards_are_the_logits_of_transformers(kind, shape, tmp_path):
  model, rows = save(tmp_path, kind), drawn_rows()
  r = reward.read_reward_config(tmp_path)
  assert r.encodes == (kind in ("bert", "roberta"))
  mesh = make_mesh(*shape)
  layout = reward.reward_layout(r)
  check_mesh(layout.rows, mesh)
  with jax.set_mesh(mesh):
    params = weights.load_weights(tmp_path, layout, mesh)
    got = row_scores.reward_rows(mesh, params, r, rows, PassOptions(2))
  wanted = theirs(model, rows, kind)
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
  assert np.ptp(wanted) > 0.5  # rows differ by more than an error


def test_flops_are_the_dot_generals(alone):
  m = sized(2, 8, 2, 1, 4, 6, 12, 16)
  e = encoder.EncoderConfig(
    layers=2, width=8, heads=2, ff=6, vocab=12, positions=16, context=16
  )
  whole = lambda w, axes: w
  place = sharding.PER_ROW._replace(weight=whole, bias=whole)
  ids, on = np.zeros((3, 5), np.int32), np.zeros((3, 5), bool)
  for model, kind in ((m, "llama"), (e, "bert")):
    r = reward.RewardConfig(model, kind)
    params = {
      n: jax.ShapeDtypeStruct(p.shape, np.float32)
      for n, p in reward.reward_layout(r).rows.items()
    }
    fn = functools.partial(reward.rewards, r=r, place=place)
    traced = jax.make_jaxpr(fn)(params, ids, np.full(3, 5), on)
    assert multiplied(traced.jaxpr) == 3 * reward_flops(r, 5)


@pytest.mark.parametrize(
  "more,words",
  [
    (dict(num_labels=2), "2 labels .* wanted one"),
    (dict(architectures=["LlamaForCausalLM"]), "wanted a reward model"),
    (dict(model_type="mamba"), "model_type='mamba' is unknown"),
  ],
)
def test_what_is_no_reward_model_is_refused(tmp_path, more, words):
  model = transformers.AutoConfig.for_model("llama", **SIZES).to_dict()
  model |= dict(architectures=["LlamaForSequenceClassification"])
  if "num_labels" in more:
    model["id2label"] = {"0": "no", "1": "yes"}
  (tmp_path / "config.json").write_text(json.dumps(model | more))
  with pytest.raises(ConfigError, match=words):
    reward.read_reward_config(tmp_path)


def test_a_model_without_its_head_is_named(tmp_path):
  save(tmp_path, "llama")
  path = tmp_path / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  del tensors["score.weight"]
  safetensors.numpy.save_file(tensors, path)
  mesh = make_mesh()
  with jax.set_mesh(mesh), pytest.raises(DataError, match="score.weight is mi"):
    layout = reward.reward_layout(reward.read_reward_config(tmp_path))
    weights.load_weights(tmp_path, layout, mesh)


# Rows as an encoder reads them.


def pair(prompt, answer, name="a"):
  return dict(id=name, prompt=prompt, completion=answer), "completion"


def test_two_texts_are_joined_as_transformers_does(tmp_path):
  save(tmp_path, "bert")
  tok = word_pieces(VOCAB, tmp_path)
  m = reward.read_reward_config(tmp_path).model
  texts = [pair("the cat runs", "a dog sleeps fast"), pair("over", "tree")]
  rows = questions.encode_two(tmp_path, m, texts)
  for i, (row, side) in enumerate(texts):
    both = tok.encode(row["prompt"], row[side])
    ids = rows.ids[rows.offsets[i] : rows.offsets[i + 1]]
    assert ids.tolist() == both.ids
    assert rows.start[i] == both.type_ids.index(1)
  assert rows.cut.tolist() == [0, 0]


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end(tmp_path):
  save(tmp_path, "bert")
  word_pieces(VOCAB, tmp_path)
  m = reward.read_reward_config(tmp_path).model._replace(context=13)
  one = lambda text: [VOCAB.index(w) for w in text.split()]
  long, short = "the cat " * 6 + "runs", "fast dog"
  rows = questions.encode_two(
    tmp_path, m, [pair(long, short), pair(short, long), pair(long, long)]
  )
  parts = [
    rows.ids[rows.offsets[i] : rows.offsets[i + 1]].tolist() for i in range(3)
  ]
  assert parts[0] == [2, *one(long)[-8:], 3, *one(short), 3]
  assert parts[1] == [2, *one(short), 3, *one(long)[:8], 3]
  assert parts[2] == [2, *one(long)[-5:], 3, *one(long)[:5], 3]
  assert rows.cut.tolist() == [5, 5, 16]
