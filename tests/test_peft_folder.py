"""Adapters in Hugging Face's hands: `peft` computes what we do."""

import functools
import json
import warnings

import jax
from models import draw, make_mesh, put
import numpy as np
import pytest

from jaxalign.model import adapters, decoder, families, hf, weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CONFIGS = {
  "llama": dict(num_key_value_heads=2, head_dim=6),
  "qwen3": dict(num_key_value_heads=2, head_dim=6),
  "gpt_neox": dict(rotary_pct=0.5, use_parallel_residual=True),
}


@functools.lru_cache
def sizes(family):
  raw = dict(
    model_type=family,
    hidden_size=32,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=40,
    max_position_embeddings=32,
    tie_word_embeddings=False,
    hidden_act="gelu" if family == "gpt_neox" else "silu",
  )
  return families.config_of(raw | CONFIGS[family])


TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))


def ours(m, params):
  with jax.set_mesh(make_mesh()):
    x = decoder.forward(params, TOKENS, m)
    return np.asarray(decoder.logits(x, decoder.head(params, m)))


def theirs(model):
  with torch.no_grad():
    return model.eval()(torch.tensor(TOKENS)).logits.numpy()


CASES = [(family, dict(rs=rs)) for family in CONFIGS for rs in (False, True)]
CASES += [
  ("llama", dict(variant="allora", rs=True)),
  ("qwen3", dict(variant="lora_sb")),
  ("llama", dict(targets=("q_proj", "down_proj"))),
  ("gpt_neox", dict(targets=("wk", "dense"))),
  ("gpt_neox", dict(targets=("wq", "wv"), rs=True)),
]


@pytest.mark.parametrize("family,kind", CASES, ids=str)
def test_peft_and_the_merged_export_have_our_logits(tmp_path, family, kind):
  lora = adapters.Lora(3, 5.0, **kind)
  m = sizes(family)._replace(lora=lora)
  host, mesh = draw(m, 1, 0.2), make_mesh(2, 2)
  with jax.set_mesh(mesh):
    params = put(mesh, m, host)

    def save(name, params):
      config, layout = families.hf_config(m, 1, 2), families.decoder_layout(m)
      weights.save(tmp_path / name, params, layout, weights.Export(config))

    save("base", {n: x for n, x in params.items() if ":" not in n})
    save("merged", adapters.Merged(params, lora))
    hf.save_adapters(tmp_path / "adapter", params, m, base="some/base")
  wanted = ours(m, host)
  load = transformers.AutoModelForCausalLM.from_pretrained
  merged = theirs(load(tmp_path / "merged", dtype=torch.float32))
  base = load(tmp_path / "base", dtype=torch.float32)
  plain = theirs(base)
  assert np.abs(wanted - plain).max() > 0.1  # the adapters matter
  np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-4)
  with warnings.catch_warnings():  # peft asks transformers in an old way
    warnings.simplefilter("ignore", FutureWarning)
    found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
  np.testing.assert_allclose(theirs(found), wanted, rtol=0, atol=1e-4)
  config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == "some/base"
  names = [n for n in found.state_dict() if ".lora_A." in n]
  modules = {n.split(".lora_")[0].split(".")[-1] for n in names}
  assert config["target_modules"] == sorted(modules)


@pytest.mark.parametrize(
  "given,name,revision",
  [
    ("hf:Qwen/Qwen3-8B", "Qwen/Qwen3-8B", None),
    ("hf:gpt2@v1.0", "gpt2", "v1.0"),
    ("some/base", "some/base", None),
    ("", None, None),
  ],
)
def test_the_base_is_named_as_peft_finds_it(tmp_path, given, name, revision):
  m = sizes("llama")._replace(lora=adapters.Lora(2))
  params = {n: jax.device_put(x) for n, x in draw(m).items() if ":" in n}
  with jax.set_mesh(make_mesh(2, 2)):
    hf.save_adapters(tmp_path, params, m, base=given)
  found = peft.PeftConfig.from_pretrained(tmp_path)
  assert (found.base_model_name_or_path, found.revision) == (name, revision)


def test_a_base_folder_is_found_from_anywhere(tmp_path, monkeypatch):
  (tmp_path / "base").mkdir()
  monkeypatch.chdir(tmp_path)
  assert hf._base_of("base") == dict(
    base_model_name_or_path=str(tmp_path / "base")
  )
