"""Every family against transformers: config, logits, gradients."""

import functools
import json

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from models import make_mesh
import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.model import decoder, families, hf, logprob
from jaxalign.model.attention import Rope
from jaxalign.model.families.fields import write_rope

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 14  # longer than every window drawn


pytestmark = pytest.mark.usefixtures("quick_compiles")


# One config of each family, with every switch the family has in a rare place.

ROPES = {
  "default": {},
  "linear": dict(factor=4.0),
  "dynamic": dict(factor=2.0),
  "llama3": dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
  ),
  "yarn": dict(factor=4.0, original_max_position_embeddings=16),
}


def sizes(
  group=2,
  kv_heads=3,
  head_size=6,
  layers=3,
  ff=11,
  tied=False,
  multiple=True,
  act="silu",
):
  heads = group * kv_heads
  width = heads * 4 if multiple else heads * 4 + 2
  return dict(
    hidden_size=width,
    num_hidden_layers=layers,
    intermediate_size=ff,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=head_size,
    vocab_size=43,
    max_position_embeddings=64,
    tie_word_embeddings=tied,
    hidden_act=act,
    rms_norm_eps=1e-3,
  )


def roped(kind, theta=300.0, **more):
  return dict(
    rope_parameters=dict(
      rope_type=kind, rope_theta=theta, **ROPES[kind], **more
    )
  )


def pattern(layers):
  return [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]


def gemma(s, **more):
  return dict(
    s,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=7,
    sliding_window=5,
    layer_types=pattern(s["num_hidden_layers"]),
    **more,
  )


def neox(s, kind, parallel):
  s = dict(
    s,
    layer_norm_eps=s["rms_norm_eps"],
    hidden_act="gelu",
    hidden_size=s["num_attention_heads"] * 8,
    use_parallel_residual=parallel,
  )
  for name in ("head_dim", "num_key_value_heads", "rms_norm_eps"):
    del s[name]
  return s | roped(kind, partial_rotary_factor=0.5)


def case(family, s, kind, switch):
  """The keywords of transformers' config class for one drawn example."""
  make = {
    "llama": lambda: dict(
      s, attention_bias=switch, mlp_bias=switch, **roped(kind)
    ),
    "mistral": lambda: dict(
      s, sliding_window=5 if switch else None, **roped(kind)
    ),
    "qwen2": lambda: dict(
      s,
      use_sliding_window=switch,
      sliding_window=5,
      max_window_layers=1,
      **roped(kind),
    ),
    "qwen3": lambda: dict(
      s,
      use_sliding_window=switch,
      sliding_window=5,
      attention_bias=switch,
      layer_types=pattern(s["num_hidden_layers"]) if switch else None,
      **roped(kind),
    ),
    "gemma2": lambda: gemma(
      s,
      attn_logit_softcapping=3.0 if switch else None,
      final_logit_softcapping=2.0 if switch else None,
      **roped(kind),
    ),
    "gemma3_text": lambda: gemma(
      s,
      rope_parameters={
        "sliding_attention": dict(rope_type="default", rope_theta=70.0),
        **dict(full_attention=roped(kind)["rope_parameters"]),
      },
    ),
    "gpt_neox": lambda: neox(s, kind, switch),
  }
  assert set(make) == set(families.FAMILIES), "a family without a parity case"
  return make[family]()


def torch_model(family, keywords):
  config = transformers.AutoConfig.for_model(family, **keywords)
  config._attn_implementation = "eager"  # the one with soft caps
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config)
  with torch.no_grad():
    for name, p in model.named_parameters():
      centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
      if family.startswith("gemma"):
        centre = 0.0
      p.copy_(centre + 0.3 * torch.randn(p.shape))
  return model.eval()


def ours_from(stored, tensors, layers):
  """Our parameters from a dict of arrays, as `Stored` says."""
  out = {}
  for name, s in stored.items():
    each = []
    for i in range(layers if "{}" in s.name else 1):
      w = np.asarray(tensors[s.name.format(i)])
      assert w.shape == s.shape, s
      w = w.reshape(s.view)
      if s.pick:
        w = np.take(w, s.pick[1], axis=s.pick[0])
      each.append(w.transpose(s.order))
    out[name] = np.stack(each) if "{}" in s.name else each[0]
  return out


@functools.lru_cache(maxsize=2)
def grad_fn(m):
  def total(params, tokens, mask):
    x = decoder.forward(params, tokens, m)
    head = decoder.head(params, m)
    logps = logprob.token_logps(x, head, tokens, 5, m.final_softcap)
    return jnp.sum(logps * mask), decoder.logits(x, head, m.final_softcap)

  return jax.jit(jax.value_and_grad(total, has_aux=True))


def compare(family, keywords, mesh):
  """Logits within 1e-4, every gradient of a log-prob within 1e-3."""
  model = torch_model(family, keywords)
  raw = json.loads(model.config.to_json_string())
  m = families.config_of(raw)
  again = families.config_of(
    json.loads(json.dumps(families.hf_config(m, 1, 2)))
  )
  assert again == m
  back = transformers.AutoConfig.for_model(**families.hf_config(m, 1, 2))
  back, known = back.to_dict()["rope_parameters"], raw["rope_parameters"]
  nested = isinstance(next(iter(known.values())), dict)
  for one in set(raw["layer_types"]) if nested else [None]:
    here, there = (d[one] if one else d for d in (known, back))
    assert here.items() <= there.items()  # defaults are written, too
  layout = families.decoder_layout(m)
  state = {layout.rename(n): p for n, p in model.named_parameters()}
  params = ours_from(
    layout.stored, {n: p.detach().numpy() for n, p in state.items()}, m.layers
  )
  rows = decoder.table(m)
  assert {n: p.shape for n, p in params.items()} == {
    n: p.shape for n, p in rows.items()
  }
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, m.vocab, (4, LENGTH)).astype(np.int32)
  mask = np.broadcast_to(np.arange(LENGTH) >= 4, tokens.shape)
  wanted = model(torch.tensor(tokens, dtype=torch.long)).logits
  logps = torch.log_softmax(wanted[:, :-1].double(), -1).gather(
    -1, torch.tensor(tokens[:, 1:, None], dtype=torch.long)
  )[..., 0]
  (logps * torch.tensor(mask[:, 1:])).sum().backward()
  slopes = ours_from(
    layout.stored, {n: p.grad.numpy() for n, p in state.items()}, m.layers
  )
  with jax.set_mesh(mesh):
    (total, logits), grads = grad_fn(m)(
      {n: sharding.put(mesh, w, *rows[n].axes) for n, w in params.items()},
      sharding.put(mesh, tokens, "batch"),
      sharding.put(mesh, np.float32(mask), "batch"),
    )
  wanted = wanted.detach().numpy()
  np.testing.assert_allclose(
    logits, wanted, rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max())
  )
  for name, g in grads.items():
    np.testing.assert_allclose(
      g,
      slopes[name],
      rtol=0,
      atol=1e-3 * max(1, np.abs(slopes[name]).max()),
      err_msg=name,
    )


@pytest.mark.parametrize("family", families.FAMILIES)
def test_one_config_of_every_family(family):
  compare(family, case(family, sizes(), "linear", True), make_mesh())


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_random_configs_of_every_family(family):
  @hypothesis.settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(
    st.sampled_from([1, 2, 4]),
    st.integers(1, 5),
    st.sampled_from([4, 6, 8]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(ROPES)),
  )
  def run(group, kv_heads, head_size, layers, tied, switch, kind):
    if family == "gpt_neox":
      group = 1
    s = sizes(
      group,
      kv_heads,
      head_size,
      layers,
      tied=tied,
      multiple=family in ("llama", "gemma2", "gemma3_text"),
    )
    compare(family, case(family, s, kind, switch), make_mesh())

  run()


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox"])
def test_a_mesh_changes_nothing(family):
  s = sizes(group=1 if family == "gpt_neox" else 2, kv_heads=2, layers=2, ff=16)
  s |= dict(hidden_size=16, vocab_size=64)
  keywords = case(family, s, "default", True)
  keywords |= dict(hidden_size=16)
  compare(family, keywords, make_mesh(4, 2))


def released(**changes):
  """config.json as the first Llama 3.1 files had it."""
  return (
    dict(
      model_type="llama",
      hidden_size=64,
      intermediate_size=96,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      vocab_size=128,
      max_position_embeddings=131072,
      rms_norm_eps=1e-5,
      rope_theta=500000.0,
      hidden_act="silu",
      rope_scaling=dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
      ),
    )
    | changes
  )


def test_older_files_are_read_as_transformers_reads_them():
  m = families.config_of(released())
  assert m.rope_theta == 500000.0 and m.ropes[0].kind == "llama3"
  theirs = transformers.LlamaConfig(**released()).to_dict()["rope_parameters"]
  assert theirs.items() <= write_rope(m.ropes[0]).items()
  # Gemma 3 4B's own file: a text tower with most fields left out.
  raw = dict(
    model_type="gemma3",
    text_config=dict(
      hidden_size=2560,
      intermediate_size=10240,
      model_type="gemma3_text",
      num_hidden_layers=34,
      rope_scaling=dict(factor=8.0, rope_type="linear"),
      sliding_window=1024,
    ),
    vision_config=dict(model_type="siglip"),
  )
  m = families.config_of(raw)
  theirs = transformers.Gemma3TextConfig(**raw["text_config"])
  assert (m.heads, m.kv_heads, m.head_size, m.vocab) == (
    theirs.num_attention_heads,
    theirs.num_key_value_heads,
    theirs.head_dim,
    theirs.vocab_size,
  )
  assert [("sliding_attention", "full_attention")[k] for k in m.kinds] == (
    theirs.layer_types
  )
  assert m.windows == (1024, 0) and m.tied
  assert m.ropes == (Rope(1e4), Rope(1e6, "linear", 8.0))
  assert m.context == theirs.max_position_embeddings
  name = "language_model.model.layers.3.mlp.up_proj.weight"
  assert (
    families.decoder_layout(m).rename(name)
    == "model.layers.3.mlp.up_proj.weight"
  )
  assert (
    families.decoder_layout(m).rename("vision_tower.vision_model.x.weight")
    is None
  )
  assert families.decoder_layout(m).rename("lm_head.weight") is None
  pythia = families.config_of(
    dict(
      model_type="gpt_neox",
      hidden_size=64,
      intermediate_size=256,
      num_hidden_layers=2,
      num_attention_heads=4,
      vocab_size=128,
      max_position_embeddings=64,
      rotary_pct=0.25,
      rotary_emb_base=10000,
      hidden_act="gelu",
      layer_norm_eps=1e-5,
      use_parallel_residual=True,
    )
  )
  assert pythia.rotary == 0.25 and pythia.parallel and not pythia.gated


@pytest.mark.parametrize(
  "raw,words",
  [
    (dict(model_type="mamba"), "'mamba' is unknown; known: llama, mistral"),
    (dict(model_type="qwen3_moe"), "mixtures of experts are out of scope"),
    ({}, "model_type=None is unknown"),
    (dict(model_type=7), "model_type=7 is unknown"),
    (
      released(rope_scaling=dict(rope_type="spiral")),
      "rope_type='spiral' is unknown; known: default, linear",
    ),
    (
      released(rope_scaling=dict(rope_type="llama3", factor=8.0)),
      "low_freq_factor",
    ),
    (released(hidden_act="swoosh"), "hidden_act='swoosh' is unknown"),
    (released(num_hidden_layers="two"), "no config of a llama"),
    (released(num_attention_heads=0), "no config of a llama"),
    (
      dict(released(), model_type="gemma2", use_bidirectional_attention=True),
      "use_bidirectional_attention=True is not read",
    ),
    (
      dict(
        released(), model_type="qwen2", layer_types=["linear_attention"] * 2
      ),
      "layer_types holds",
    ),
  ],
)
def test_what_is_not_known_is_named(raw, words):
  with pytest.raises(ConfigError, match=words):
    families.config_of(raw)


def test_a_folder_without_a_config_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="has no config.json"):
    hf.read_config(tmp_path, "float32", "none")
  (tmp_path / "config.json").write_text("[1]")
  with pytest.raises(ConfigError, match="a list, wanted an object"):
    hf.read_config(tmp_path, "float32", "none")
