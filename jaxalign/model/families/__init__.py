"""Families of decoders: config.json and tensor names to and from our own.

A new family is one `Family`: what its config fields mean and what its tensors
are called. Refused by name: mixtures of experts, and any architecture or
switch that is not listed here, since a wrong guess would still run.
"""

import json
from typing import Any

from etils import epath

from jaxalign.core.errors import ConfigError
from jaxalign.model import decoder
from jaxalign.model.families import gemma, llama, neox
from jaxalign.model.families.fields import (
  Family,
  Raw,
  read_rope,
  stored_under,
  write_rope,
)
from jaxalign.model.families.published import PUBLISHED
from jaxalign.model.parameters import Stored

__all__ = [
  "FAMILIES",
  "Family",
  "PUBLISHED",
  "canonical",
  "config_of",
  "hf_config",
  "read_json_object",
  "read_raw",
  "read_rope",
  "stored",
  "stored_under",
  "write_rope",
]

FAMILIES: dict[str, Family] = llama.FAMILIES | gemma.FAMILIES | neox.FAMILIES
TEXT_TOWERS = {"gemma3": "gemma3_text"}  # multimodal: the text is read
_PREFIXES = (
  ("language_model.model.", "model."),  # Gemma 3 with its eyes
  ("model.language_model.", "model."),
  ("language_model.lm_head.", "lm_head."),
)
_IGNORED = (
  "vision_tower.",
  "multi_modal_projector.",
  "model.vision_tower.",
  "model.multi_modal_projector.",
)
_BROKEN = ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError
_BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


def stored(m: decoder.ModelConfig) -> dict[str, Stored]:
  """Where each parameter of `decoder.table(m)` lies in a checkpoint."""
  plain = m._replace(lora=None)  # adapters have a folder apart
  return FAMILIES[m.family].stored(plain)


def canonical(m: decoder.ModelConfig, name: str) -> str | None:
  """A file's tensor name as `stored` spells it; None: knowingly not read."""
  if name.startswith(_IGNORED) or name.endswith(_BUFFERS):
    return None
  for old, new in _PREFIXES:
    if name.startswith(old):
      name = new + name[len(old) :]
      break
  if name == "embed_out.weight":  # NeoX's head, in files and in transformers 5
    name = "lm_head.weight"
  return None if m.tied and name == "lm_head.weight" else name


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
    experts = (
      "; mixtures of experts are out of scope"
      if isinstance(kind, str) and ("moe" in kind or "mixtral" in kind)
      else ""
    )
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
  except ConfigError as error:
    raise ConfigError(
      f"{where}: {error}; set config.model.checkpoint"
    ) from error
  except _BROKEN as error:
    raise ConfigError(
      f"{where} is no config of a {kind} "
      f"({type(error).__name__}: {error}); set "
      "config.model.checkpoint"
    ) from error


def read_raw(folder: Any) -> dict[str, Any]:
  """The parsed config.json of a Hugging Face folder.

  Raises:
    ConfigError: there is none, or it is no JSON object.
  """
  path = epath.Path(folder) / "config.json"
  if not path.exists():
    raise ConfigError(
      f"{folder} has no config.json; set config.model."
      "checkpoint to a Hugging Face folder"
    )
  return read_json_object(path)


def read_json_object(path: epath.Path) -> dict[str, Any]:
  """A file of a checkpoint that holds a JSON object.

  Raises:
    ConfigError: it does not.
  """
  try:
    raw = json.loads(path.read_bytes())
    if not isinstance(raw, dict):
      raise ValueError(f"a {type(raw).__name__}, wanted an object")
  except ValueError as error:
    raise ConfigError(
      f"{path} is no JSON object ({error!s:.100}); set config.model.checkpoint"
    ) from error
  return raw
