"""Adapters as a folder that Hugging Face's `peft` loads onto the base."""

import math
import os
from typing import Any

from etils import epath
import jax
import numpy as np

from jaxalign import artifacts, sharding
from jaxalign.model import adapters, decoder, families, safetensors_io
from jaxalign.model.table import Params, Stored

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save(
  folder: Any, params: Params, m: decoder.ModelConfig, base: str = ""
) -> None:
  """Writes the adapters; all processes call it, process 0 writes.

  ALLoRA and LoRA-SB are a plain LoRA by then: the scale is 1 where it was,
  and R is folded into B. Where the family fuses several of our weights into
  one (GPT-NeoX's query_key_value), the fused module's adapter holds theirs
  side by side: its A is their A above each other, its B is 0 but for each
  one's own rows, its rank is the sum.

  Args:
    folder: made where it is not there.
    params: the adapters; other parameters are not looked at.
    m: the policy's sizes, with `lora`.
    base: the model that these belong to: a folder, a repository's name, or
      `hf:<repo>[@revision]`.
  """
  own = {
    n: sharding.fetch(x) for n, x in params.items() if adapters.is_adapter(n)
  }
  if jax.process_index() != 0:
    return
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  modules: dict[str, list[tuple[str, Stored]]] = {}
  stored = families.stored(m)
  for name in adapters.targets(m.lora, stored):
    modules.setdefault(stored[name].name, []).append((name, stored[name]))
  tensors, fused = {}, {}
  for module, parts in modules.items():
    a, b = _module(own, parts)
    if len(parts) > 1:
      fused[_leaf(module)] = len(parts)
    for layer in range(len(a)):
      at = "base_model.model." + module.format(layer).removesuffix(".weight")
      tensors[f"{at}.lora_A.weight"] = np.ascontiguousarray(a[layer])
      tensors[f"{at}.lora_B.weight"] = np.ascontiguousarray(b[layer])
  with (
    safetensors_io.atomic([folder / WEIGHTS]) as (path,),
    path.open("wb") as f,
  ):
    f.write(
      safetensors_io.header(
        {n: x.shape for n, x in tensors.items()}, np.dtype(np.float32)
      )
    )
    for x in tensors.values():
      f.write(memoryview(x.reshape(-1).view(np.uint8)))
  lora = m.lora
  alpha = lora.rank if lora.variant == "allora" else lora.alpha
  rs = lora.rs and lora.variant != "allora"
  artifacts.write_json(
    folder / CONFIG,
    dict(
      peft_type="LORA",
      task_type="CAUSAL_LM",
      r=lora.rank,
      lora_alpha=alpha,
      use_rslora=rs,
      target_modules=sorted(map(_leaf, modules)),
      # A fused module has a multiple of the rank, and the scale of the rest.
      rank_pattern={n: k * lora.rank for n, k in fused.items()},
      alpha_pattern={
        n: alpha * (math.sqrt(k) if rs else k) for n, k in fused.items()
      },
      lora_dropout=0.0,
      bias="none",
      fan_in_fan_out=False,
      init_lora_weights=True,
      inference_mode=True,
      **_named(base),
    ),
  )


def _named(base: str) -> dict[str, str | None]:
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


def _module(
  own: dict[str, np.ndarray], parts: list[tuple[str, Stored]]
) -> tuple[np.ndarray, np.ndarray]:
  """A [T, r, in] and B [T, out, r] of one stored matrix [out, in].

  Our flat input and output run as the stored ones do: a weight's axes are
  moved between the two sides, never within one.
  """
  pairs = [adapters.folded(own, name) for name, _ in parts]
  a = np.concatenate([a.swapaxes(1, 2) for a, _ in pairs], axis=1)
  if parts[0][1].pick is None:
    ((_, b),) = pairs
    return a, b.swapaxes(1, 2)
  rank = pairs[0][1].shape[1]
  whole = np.zeros((len(a), parts[0][1].shape[0], a.shape[1]), np.float32)
  for i, ((_, b), (_, s)) in enumerate(zip(pairs, parts)):
    view = whole.reshape(len(a), *s.view[:-1], a.shape[1])  # no copy
    at = [slice(None)] * view.ndim
    at[1 + s.pick[0]], at[-1] = s.pick[1], slice(i * rank, (i + 1) * rank)
    view[tuple(at)] = b.swapaxes(1, 2).reshape(view[tuple(at)].shape)
  return a, whole
