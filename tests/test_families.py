"""Every family against transformers: config, logits, gradients."""

import functools
import json

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from models import make_mesh, put
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


def sizes(group=2, kv_heads=3, head_size=6, multiple=True, **changes):
  heads = group * kv_heads
  return dict(
    hidden_size=heads * 4 + 2 * (not multiple),
    num_hidden_layers=3,
    intermediate_size=11,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=head_size,
    vocab_size=43,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    hidden_act="silu",
    rms_norm_eps=1e-3,
    **changes,
  )


def roped(kind, theta=300.0, **more):
  rope = dict(rope_type=kind, rope_theta=theta, **ROPES[kind], **more)
  return dict(rope_parameters=rope)


def pattern(s):
  types = "sliding_attention", "full_attention"
  return [types[i % 2] for i in range(s["num_hidden_layers"])]


def gemma(s, **more):
  own = dict(hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=7)
  return {**s, **own, "sliding_window": 5, "layer_types": pattern(s), **more}


def neox(s, kind, parallel):
  own = dict(layer_norm_eps=s["rms_norm_eps"], hidden_act="gelu")
  own |= dict(hidden_size=s["num_attention_heads"] * 8)
  own |= dict(use_parallel_residual=parallel)
  away = ("head_dim", "num_key_value_heads", "rms_norm_eps")
  s = {n: x for n, x in s.items() if n not in away}
  return s | own | roped(kind, partial_rotary_factor=0.5)


def case(family, s, kind, switch):
  """The keywords of transformers' config class for one drawn example."""
  rope = roped(kind)
  near = dict(rope_type="default", rope_theta=70.0)
  both = dict(sliding_attention=near, full_attention=rope["rope_parameters"])
  qwen = dict(use_sliding_window=switch, sliding_window=5, **rope)
  bias = dict(attention_bias=switch)
  caps = dict(attn_logit_softcapping=3.0, final_logit_softcapping=2.0)
  caps = caps if switch else dict.fromkeys(caps)
  made = {
    "llama": dict(s, mlp_bias=switch, **bias, **rope),
    "mistral": dict(s, sliding_window=5 if switch else None, **rope),
    "qwen2": dict(s, max_window_layers=1, **qwen),
    "qwen3": dict(
      s, layer_types=pattern(s) if switch else None, **bias, **qwen
    ),
    "gemma2": gemma(s, **caps, **rope),
    "gemma3_text": gemma(s, rope_parameters=both),
    "gpt_neox": neox(s, kind, switch),
  }
  assert set(made) == set(families.FAMILIES), "a family without a parity case"
  return made[family]


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


def compare(family, keywords, mesh, remat="none"):
  """Logits within 1e-4, every gradient of a log-prob within 1e-3."""
  model = torch_model(family, keywords)
  raw = json.loads(model.config.to_json_string())
  m = families.config_of(raw, remat=remat)
  written = families.hf_config(m, 1, 2)
  again = families.config_of(json.loads(json.dumps(written)), remat=remat)
  assert again == m
  back = transformers.AutoConfig.for_model(**written)
  back, known = back.to_dict()["rope_parameters"], raw["rope_parameters"]
  nested = isinstance(next(iter(known.values())), dict)
  for one in set(raw["layer_types"]) if nested else [None]:
    here, there = (d[one] if one else d for d in (known, back))
    assert here.items() <= there.items()  # defaults are written, too
  rows, stored, rename = families.decoder_layout(m)
  state = {rename(n): p for n, p in model.named_parameters()}
  values = {n: p.detach().numpy() for n, p in state.items()}
  params = ours_from(stored, values, m.layers)
  shapes = lambda table: {n: p.shape for n, p in table.items()}
  assert shapes(params) == shapes(rows)
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, m.vocab, (4, LENGTH)).astype(np.int32)
  mask = np.broadcast_to(np.arange(LENGTH) >= 4, tokens.shape)
  ids = torch.tensor(tokens, dtype=torch.long)
  wanted = model(ids).logits
  logps = torch.log_softmax(wanted[:, :-1].double(), -1)
  logps = logps.gather(-1, ids[:, 1:, None])[..., 0]
  (logps * torch.tensor(mask[:, 1:])).sum().backward()
  slopes = {n: p.grad.numpy() for n, p in state.items()}
  slopes = ours_from(stored, slopes, m.layers)
  with jax.set_mesh(mesh):
    (_, logits), grads = grad_fn(m)(
      put(mesh, m, params),
      sharding.put(mesh, tokens, "batch"),
      sharding.put(mesh, np.float32(mask), "batch"),
    )
  close = functools.partial(np.testing.assert_allclose, rtol=0)
  largest = lambda x: max(1, np.abs(x).max())
  wanted = wanted.detach().numpy()
  close(logits, wanted, atol=1e-4 * largest(wanted))
  for name, g in grads.items():
    close(g, slopes[name], atol=1e-3 * largest(slopes[name]), err_msg=name)


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
    group = 1 if family == "gpt_neox" else group
    multiple = family in ("llama", "gemma2", "gemma3_text")
    s = sizes(group, kv_heads, head_size, multiple)
    s |= dict(num_hidden_layers=layers, tie_word_embeddings=tied)
    compare(family, case(family, s, kind, switch), make_mesh())

  run()


@pytest.mark.parametrize(
  "family,group,remat",
  [
    ("gemma3_text", 2, "none"),
    ("gpt_neox", 1, "none"),
    ("llama", 1, "full"),
    ("llama", 2, "dots"),
  ],
)
def test_a_mesh_and_recomputation_change_nothing(family, group, remat):
  s = sizes(group=group, kv_heads=2)
  even = dict(hidden_size=16, vocab_size=64, intermediate_size=16)
  s |= even | dict(num_hidden_layers=2, tie_word_embeddings=remat == "full")
  keywords = case(family, s, "default", True) | dict(hidden_size=16)
  compare(family, keywords, make_mesh(4, 2), remat)


SIZES = dict(
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
  vocab_size=128,
)


def released(**changes):
  """config.json as the first Llama 3.1 files had it."""
  own = dict(
    model_type="llama",
    num_key_value_heads=2,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    hidden_act="silu",
    rope_scaling=dict(ROPES["llama3"], rope_type="llama3"),
  )
  return SIZES | own | changes


def test_older_files_are_read_as_transformers_reads_them():
  m = families.config_of(released())
  assert m.rope_theta == 500000.0 and m.ropes[0].kind == "llama3"
  theirs = transformers.LlamaConfig(**released()).to_dict()["rope_parameters"]
  assert theirs.items() <= write_rope(m.ropes[0]).items()
  # Gemma 3 4B's own file: a text tower with most fields left out.
  raw = families.PUBLISHED["hf:google/gemma-3-4b-it"]
  raw = raw | dict(vision_config=dict(model_type="siglip"))
  m = families.config_of(raw)
  theirs = transformers.Gemma3TextConfig(**raw["text_config"])
  wanted = theirs.num_attention_heads, theirs.num_key_value_heads
  wanted += theirs.head_dim, theirs.vocab_size, theirs.max_position_embeddings
  assert (m.heads, m.kv_heads, m.head_size, m.vocab, m.context) == wanted
  types = "sliding_attention", "full_attention"
  assert [types[k] for k in m.kinds] == theirs.layer_types
  assert m.windows == (1024, 0) and m.tied
  assert m.ropes == (Rope(1e4), Rope(1e6, "linear", 8.0))
  rename = families.decoder_layout(m).rename
  name = "language_model.model.layers.3.mlp.up_proj.weight"
  assert rename(name) == "model.layers.3.mlp.up_proj.weight"
  assert rename("vision_tower.vision_model.x.weight") is None
  assert rename("lm_head.weight") is None
  own = dict(rotary_pct=0.25, rotary_emb_base=10000, hidden_act="gelu")
  own |= dict(layer_norm_eps=1e-5, use_parallel_residual=True)
  raw = dict(SIZES, model_type="gpt_neox", max_position_embeddings=64, **own)
  m = families.config_of(raw)
  assert m.rotary == 0.25 and m.parallel and not m.gated


KNOWN = "rope_type='spiral' is unknown; known: default, linear"
BIDIRECTIONAL = dict(model_type="gemma2", use_bidirectional_attention=True)
LINEAR = dict(model_type="qwen2", layer_types=["linear_attention"] * 2)


@pytest.mark.parametrize(
  "raw,words",
  [
    (dict(model_type="mamba"), "'mamba' is unknown; known: llama, mistral"),
    (dict(model_type="qwen3_moe"), "mixtures of experts are out of scope"),
    (dict(model_type="mixtral"), "mixtures of experts are out of scope"),
    ({}, "model_type=None is unknown"),
    (dict(model_type=7), "model_type=7 is unknown"),
    (released(rope_scaling=dict(rope_type="spiral")), KNOWN),
    (released(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_"),
    (released(hidden_act="swoosh"), "hidden_act='swoosh' is unknown"),
    (released(num_hidden_layers="two"), "no config of a llama .*'two'"),
    (released(num_attention_heads=0), "no config of a llama"),
    (released(num_attention_heads=None), "no config of a llama"),
    (released(**BIDIRECTIONAL), "use_bidirectional_attention=True is not read"),
    (released(**LINEAR), "layer_types holds"),
  ],
)
def test_what_is_not_known_is_named(raw, words):
  with pytest.raises(ConfigError, match=words):
    families.config_of(raw)


@pytest.mark.parametrize(
  "text,words",
  [
    (None, "has no config.json; set config.model.checkpoint"),
    ("[1]", "a list, wanted an object"),
    *((text, "config.json is no JSON obj") for text in ("", "{", "\x00\xff")),
  ],
)
def test_a_folder_without_a_config_is_refused(tmp_path, text, words):
  if text is not None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
  with pytest.raises(ConfigError, match=words):
    hf.read_config(tmp_path, "float32", "none")
