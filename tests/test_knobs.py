"""Every knob that a message or a page names exists, and configs load."""

import inspect
import pathlib
import re

import pytest

from configs import common, dpo_sub, kto_sub
from jaxalign.data.schemas.mapping import TARGETS
from jaxalign.select.samplers import SAMPLERS
from jaxalign.train.losses import LOSSES

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _named():
  """config.some.knob in any source file, with the file that names it."""
  for path in sorted((ROOT / "jaxalign").rglob("*.py")):
    text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # joined strings
    for knob in re.findall(r"(?<!jax\.)config\.([a-z_]+(?:\.[a-z_]+)*)", text):
      yield knob, path.name


@pytest.mark.parametrize("knob,where", sorted(set(_named())))
def test_a_named_knob_exists(knob, where):
  c = common.base()
  # The file config.json; methods of a text and of a ConfigDict.
  if knob in ("json", "partition", "data.to_dict") or hasattr(type(c), knob):
    return
  section, _, name = knob.partition(".kwargs.")
  if name:
    table = dict(select=SAMPLERS, loss=LOSSES)[section]
    assert any(
      name in inspect.signature(f).parameters for f in table.values()
    ), f"{where}: nothing takes {name}"
    return
  section, _, name = knob.partition("data.fields.")
  if name:
    assert name in TARGETS, f"{where}: no schema reads {name}"
    return
  for part in knob.split("."):
    assert part in c, f"{where} names config.{knob}, which does not exist"
    c = c[part]


@pytest.mark.parametrize("config", [dpo_sub, kto_sub])
@pytest.mark.parametrize("variant", ["", "smoke", "hh", "smoke,hh"])
def test_configs_load(config, variant):
  assert config.get_config(variant).select.budget == 0.1


def test_an_unknown_variant_lists_the_known():
  with pytest.raises(ValueError, match="smoke"):
    common.base("smok")
