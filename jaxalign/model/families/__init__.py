"""Families of decoders: config.json and tensor names to and from our own.

A new family is one `Family`: what its config fields mean and what its tensors
are called. Refused by name: mixtures of experts, and any architecture or
switch that is not listed here, since a wrong guess would still run.
"""

import functools
from typing import Any

from jaxalign.core.errors import ConfigError
from jaxalign.model import decoder
from jaxalign.model.families import gemma, llama, neox
from jaxalign.model.families.fields import Family, Raw
from jaxalign.model.families.published import PUBLISHED
from jaxalign.model.parameters import Layout

__all__ = ["FAMILIES", "Family", "PUBLISHED"]

FAMILIES: dict[str, Family] = llama.FAMILIES | gemma.FAMILIES | neox.FAMILIES
TEXT_TOWERS = {"gemma3": "gemma3_text"}  # multimodal: the text is read
_PREFIXES = (
  ("language_model.model.", "model."),  # Gemma 3 with its eyes
  ("model.language_model.", "model."),
  ("language_model.lm_head.", "lm_head."),
  # NeoX's head, in files and in transformers 5
  ("embed_out.weight", "lm_head.weight"),
)
_IGNORED = (
  "vision_tower.",
  "multi_modal_projector.",
  "model.vision_tower.",
  "model.multi_modal_projector.",
)
_BROKEN = ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError
_BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


def decoder_layout(m: decoder.ModelConfig) -> Layout:
  """Where the parameters of a decoder lie, without adapters."""
  m = m._replace(lora=None)
  rename = functools.partial(_rename, m.tied)
  return Layout(decoder.table(m), FAMILIES[m.family].stored(m), rename)


def _rename(tied: bool, name: str) -> str | None:
  if name.startswith(_IGNORED) or name.endswith(_BUFFERS):
    return None
  for old, new in _PREFIXES:
    if name.startswith(old):
      name = new + name[len(old) :]
      break
  return None if tied and name == "lm_head.weight" else name


def hf_config(
  m: decoder.ModelConfig, bos: int, eos: Any, dtype: str = "float32"
) -> dict[str, Any]:
  """`config.json` of these sizes, as transformers reads it."""
  family = FAMILIES[m.family]
  return dict(
    architectures=[family.architecture],
    model_type=m.family,
    **family.write(m),
    bos_token_id=bos if bos >= 0 else None,
    eos_token_id=eos,
    dtype=dtype,
  )


def config_of(
  raw: Raw,
  dtype: str = "float32",
  remat: str = "none",
  where: str = "config.json",
) -> decoder.ModelConfig:
  """The ModelConfig of a parsed config.json.

  Raises:
    ConfigError: an architecture, or a value of a field, that is not known.
  """
  kind = raw.get("model_type")
  if kind in TEXT_TOWERS:
    raw, kind = dict(raw.get("text_config") or {}), TEXT_TOWERS[kind]
  if kind not in FAMILIES:
    moe = isinstance(kind, str) and ("moe" in kind or "mixtral" in kind)
    experts = "; mixtures of experts are out of scope" if moe else ""
    raise ConfigError(
      f"{where}: model_type={kind!r} is unknown{experts}; known: "
      f"{', '.join([*FAMILIES, *TEXT_TOWERS])}; set config.model.checkpoint"
    )
  family = FAMILIES[kind]
  raw = family.defaults | raw
  for name, value in family.refused.items():
    if (raw.get(name) or value) != value:
      raise ConfigError(
        f"{where}: {name}={raw[name]!r} is not read, only {value!r}"
      )
  try:
    return decoder.ModelConfig(
      dtype=dtype, remat=remat, family=kind, **family.read(raw)
    )
  except (ConfigError, *_BROKEN) as error:
    why = f": {error}"
    if not isinstance(error, ConfigError):
      why = f" is no config of a {kind} ({type(error).__name__}: {error})"
    raise ConfigError(f"{where}{why}; set config.model.checkpoint") from error
