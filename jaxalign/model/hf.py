"""Hugging Face folders of decoders: their sizes, their weights, exports."""

from collections.abc import Mapping
import functools
import json
import math
import os
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np
import safetensors.numpy

from jaxalign.core import disk, progress, sharding
from jaxalign.core.errors import ConfigError
from jaxalign.core.hub import resolve, resolve_settings
from jaxalign.model import adapters, decoder, families, safetensors_io, weights
from jaxalign.model.parameters import Params, Stored
from jaxalign.model.safetensors_io import Checkpoint

DTYPES = ("float32", "bfloat16", "float16")  # of an export
_KEPT = ("bos_token_id", "pad_token_id")


def _json(folder: epath.Path, name: str) -> dict[str, Any]:
  """A file of a folder that holds a JSON object.

  Raises:
    ConfigError: there is none, or it is no JSON object.
  """
  if not (folder / name).exists():
    raise ConfigError(
      f"{folder} has no {name}; set config.model."
      "checkpoint to a Hugging Face folder"
    )
  try:
    raw = json.loads((folder / name).read_bytes())
    if not isinstance(raw, dict):
      raise ValueError(f"a {type(raw).__name__}, wanted an object")
  except ValueError as error:
    raise ConfigError(
      f"{folder / name} is no JSON object ({error!s:.100}); set "
      "config.model.checkpoint"
    ) from error
  return raw


def raw_config(folder: Any) -> dict[str, Any]:
  """The parsed config.json of a folder, or of `hf:<repo>`.

  A repository that cannot be had is planned with as it was published, where
  this code knows it; its weights are wanted later, and then it matters.

  Raises:
    ConfigError: there is none.
  """
  try:
    return _json(resolve_settings(folder), "config.json")
  except ConfigError as error:
    if str(folder) not in families.PUBLISHED:
      raise
    return _published(str(folder), str(error).partition(";")[0])


@functools.lru_cache
def _published(name, why):
  progress.say(f"  {why}; its sizes are taken as they were published")
  return families.PUBLISHED[name]


def model_type(folder: Any) -> str:
  """ "llama", "bert", ...: of a folder, or of `hf:<repo>`."""
  return str(raw_config(folder).get("model_type"))


def read_config(folder: Any, dtype: str, remat: str) -> decoder.ModelConfig:
  """The sizes of a Hugging Face folder, or of `hf:<repo>`.

  Raises:
    ConfigError: no config.json, or not one of a known family.
  """
  where = f"{folder}/config.json"
  return families.config_of(raw_config(folder), dtype, remat, where)


def load_folder(
  folder: Any,
  m: decoder.ModelConfig,
  mesh: jax.sharding.Mesh,
  dtype: Any = np.float32,
) -> Params:
  """`weights.load_weights` of a decoder."""
  return weights.load_weights(folder, families.decoder_layout(m), mesh, dtype)


class Given(NamedTuple):
  """What an export keeps of the checkpoint that was trained."""

  dtype: str = "float32"  # of its weights
  config: Mapping[str, Any] = {}  # its BOS and PAD, of config.json
  generation: Mapping[str, Any] = {}  # its generation_config.json


def given(folder: Any) -> Given:
  """Of a Hugging Face folder, or `hf:<repo>`: how it stores and generates.

  Raises:
    ConfigError: no config.json, or a file that is no JSON object.
  """
  folder = resolve(folder)
  raw = _json(folder, "config.json")
  raw = dict(raw.get("text_config") or {}) | raw  # of a multimodal one
  dtype = str(raw.get("dtype") or raw.get("torch_dtype")).split(".")[-1]
  if dtype not in DTYPES:  # then as most of its bytes are
    bytes_of = {"float32": 0}
    for t in Checkpoint(folder).tensors.values():
      kind = safetensors_io.FLOATS.get(t.dtype, np.dtype(np.float32)).name
      bytes_of[kind] = bytes_of.get(kind, 0) + t.end - t.begin
    dtype = max(bytes_of, key=bytes_of.get)
  name = "generation_config.json"
  generation = _json(folder, name) if (folder / name).exists() else {}
  config = {n: raw[n] for n in _KEPT if raw.get(n) is not None}
  return Given(dtype, config, generation)


def export_folder(
  folder: Any,
  params: Params,
  m: decoder.ModelConfig,
  tokenizer: Any,
  *,
  dtype: str = "",
  shard_bytes: int = weights.SHARD_BYTES,
  of: Given = Given(),
) -> list[str]:
  """`weights.save` of a decoder.

  Args:
    folder, params: as of `weights.save`.
    m: the model's sizes.
    tokenizer, shard_bytes: as of `weights.Export`.
    dtype: one of DTYPES, of the file; "": as `of`.
    of: the checkpoint that was trained.

  Returns:
    The names of the files written (by process 0).
  """
  stops, dtype = list(tokenizer.stops), dtype or of.dtype
  eos = stops if len(stops) > 1 else stops[0]
  config = families.hf_config(m, tokenizer.bos, eos, dtype)
  config |= {n: x for n, x in of.config.items() if config.get(n) is None}
  export = weights.Export(config, tokenizer, dtype, shard_bytes, of.generation)
  weights.save(folder, params, families.decoder_layout(m), export)
  return ["export"]


def digest_names(folder: Any) -> list[str]:
  """The files, by name, that a model is read from: config, index, weights.

  Raises:
    ConfigError: it has no weights.
  """
  return ["config.json", *safetensors_io.weights_files(resolve(folder))]


def save_adapters(
  folder: Any, params: Params, m: decoder.ModelConfig, base: str = ""
) -> None:
  """Writes the adapters as Hugging Face's `peft` loads them onto the base.

  All processes call it, process 0 writes. ALLoRA and LoRA-SB are a plain LoRA
  by then: the scale is 1 where it was, and R is folded into B. Where the family
  fuses several of our weights into one (GPT-NeoX's query_key_value), the fused
  module's adapter holds theirs side by side: its A is their A above each other,
  its B is 0 but for each one's own rows, its rank is the sum.

  Args:
    folder: made where it is not there.
    params: the adapters; other parameters are not looked at.
    m: the policy's sizes, with `lora`.
    base: the model that these belong to: a folder, a repository's name, or
      `hf:<repo>[@revision]`.
  """
  own = {n: x for n, x in params.items() if adapters.is_adapter(n)}
  own = {n: sharding.fetch(x) for n, x in own.items()}
  if jax.process_index() != 0:
    return
  folder = epath.Path(folder)
  modules: dict[str, list[tuple[str, Stored]]] = {}
  stored = families.decoder_layout(m).stored
  for name in adapters.targets(m.lora, stored):
    modules.setdefault(stored[name].name, []).append((name, stored[name]))
  tensors = {}
  for module, members in modules.items():
    a, b = _module(own, members)
    for layer in range(len(a)):
      at = "base_model.model." + module.format(layer).removesuffix(".weight")
      tensors[f"{at}.lora_A.weight"] = np.ascontiguousarray(a[layer])
      tensors[f"{at}.lora_B.weight"] = np.ascontiguousarray(b[layer])
  data = safetensors.numpy.save(tensors, {"format": "pt"})
  disk.write_bytes(folder / "adapter_model.safetensors", data)
  lora = m.lora
  alpha = lora.rank if lora.variant == "allora" else lora.alpha
  rs = lora.rs and lora.variant != "allora"
  # A fused module has a multiple of the rank, and the scale of the rest.
  fused = {_leaf(n): len(x) for n, x in modules.items() if len(x) > 1}
  scaled = {n: alpha * (math.sqrt(k) if rs else k) for n, k in fused.items()}
  config = dict(
    peft_type="LORA",
    task_type="CAUSAL_LM",
    r=lora.rank,
    lora_alpha=alpha,
    use_rslora=rs,
    target_modules=sorted(map(_leaf, modules)),
    rank_pattern={n: k * lora.rank for n, k in fused.items()},
    alpha_pattern=scaled,
    lora_dropout=0.0,
    bias="none",
    fan_in_fan_out=False,
    init_lora_weights=True,
    inference_mode=True,
  )
  disk.write_json(folder / "adapter_config.json", config | _base_of(base))


def _base_of(base: str) -> dict[str, str | None]:
  """A base as peft finds it again: a repository and its revision, or a folder
  by its whole path."""
  if base.startswith("hf:") and not base.startswith("hf://"):
    name, _, revision = base.removeprefix("hf:").partition("@")
    return dict(base_model_name_or_path=name, revision=revision or None)
  if base and "://" not in base and os.path.isdir(base):
    base = os.path.abspath(base)
  return dict(base_model_name_or_path=base or None)


def _leaf(module: str) -> str:
  """ "model.layers.{}.self_attn.q_proj.weight" -> "q_proj"."""
  return module.split(".")[-2]


def _module(own, members) -> tuple[np.ndarray, np.ndarray]:
  """A [T, r, in] and B [T, out, r] of one stored matrix [out, in].

  Our flat input and output run as the stored ones do: a weight's axes are
  moved between the two sides, never within one.
  """
  pairs = [adapters.folded(own, name) for name, _ in members]
  a = np.concatenate([a.swapaxes(1, 2) for a, _ in pairs], axis=1)
  if members[0][1].pick is None:
    ((_, b),) = pairs
    return a, b.swapaxes(1, 2)
  rank = pairs[0][1].shape[1]
  whole = np.zeros((len(a), members[0][1].shape[0], a.shape[1]), np.float32)
  for i, ((_, b), (_, s)) in enumerate(zip(pairs, members)):
    view = whole.reshape(len(a), *s.view[:-1], a.shape[1])  # no copy
    at = [slice(None)] * view.ndim
    at[1 + s.pick[0]], at[-1] = s.pick[1], slice(i * rank, (i + 1) * rank)
    view[tuple(at)] = b.swapaxes(1, 2).reshape(view[tuple(at)].shape)
  return a, whole
