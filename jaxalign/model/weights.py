"""Weights to and from a Hugging Face folder (Llama layout, safetensors)."""

import json
import math
import operator
import struct
from typing import Any

from etils import epath
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from jaxalign import artifacts
from jaxalign import sharding
from jaxalign.errors import ConfigError, DataError
from jaxalign.model import decoder

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def _layer_names(m: decoder.ModelConfig) -> dict[str, tuple]:
  """Our name -> (Hugging Face suffix, to_hf(w), from_hf(w)) for one layer."""
  d, g, q, c = m.width, m.kv_heads, m.heads // m.kv_heads, m.head_size
  same = (lambda w: w, lambda w: w)
  flip = (lambda w: w.T, lambda w: w.T)
  return {
      "layers/attention_norm": ("input_layernorm", *same),
      "layers/wq": ("self_attn.q_proj", lambda w: w.reshape(d, -1).T,
                    lambda w: w.T.reshape(d, g, q, c)),
      "layers/wk": ("self_attn.k_proj", lambda w: w.reshape(d, -1).T,
                    lambda w: w.T.reshape(d, g, c)),
      "layers/wv": ("self_attn.v_proj", lambda w: w.reshape(d, -1).T,
                    lambda w: w.T.reshape(d, g, c)),
      "layers/wo": ("self_attn.o_proj", lambda w: w.reshape(-1, d).T,
                    lambda w: w.T.reshape(g, q, c, d)),
      "layers/ff_norm": ("post_attention_layernorm", *same),
      "layers/w_gate": ("mlp.gate_proj", *flip),
      "layers/w_up": ("mlp.up_proj", *flip),
      "layers/w_down": ("mlp.down_proj", *flip),
  }


def _top_names(m: decoder.ModelConfig) -> dict[str, str]:
  names = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight"}
  return names if m.tied else names | {"head": "lm_head.weight"}


def hf_config(m: decoder.ModelConfig, bos: int, eos: int) -> dict[str, Any]:
  """`config.json` of a LlamaForCausalLM with these sizes."""
  return dict(
      architectures=["LlamaForCausalLM"], model_type="llama",
      hidden_size=m.width, intermediate_size=m.ff, num_hidden_layers=m.layers,
      num_attention_heads=m.heads, num_key_value_heads=m.kv_heads,
      head_dim=m.head_size, vocab_size=m.vocab,
      max_position_embeddings=m.context, rms_norm_eps=m.norm_eps,
      rope_theta=m.rope_theta, tie_word_embeddings=m.tied, hidden_act="silu",
      attention_bias=False, mlp_bias=False, bos_token_id=bos, eos_token_id=eos,
      dtype="float32")


def export_folder(folder: Any, params: decoder.Params, m: decoder.ModelConfig,
                  tokenizer: Any) -> list[str]:
  """Writes config, weights and tokenizer as transformers loads them.

  Returns:
    The names of the files written (by process 0).
  """
  tensors = {}
  for ours, theirs in _top_names(m).items():
    tensors[theirs] = sharding.fetch(params[ours])
  for ours, (suffix, to_hf, _) in _layer_names(m).items():
    stacked = sharding.fetch(params[ours])
    for i in range(m.layers):
      tensors[f"model.layers.{i}.{suffix}.weight"] = np.ascontiguousarray(
          to_hf(stacked[i]))
  if jax.process_index() == 0:
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_bytes(folder / "model.safetensors", safetensors.numpy.save(
        tensors, metadata={"format": "pt"}))
    artifacts.write_json(folder / "config.json", hf_config(
        m, tokenizer.bos, tokenizer.eos))
    artifacts.write_json(folder / "generation_config.json", dict(
        bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos))
    tokenizer.export(folder)
  return ["export"]


def read_config(folder: Any, dtype: str, remat: str) -> decoder.ModelConfig:
  """The sizes of a Llama folder.

  Raises:
    ConfigError: no config.json, or an architecture that is not a plain Llama.
  """
  path = epath.Path(folder) / "config.json"
  if not path.exists():
    raise ConfigError(f"{folder} has no config.json; set config.model."
                      "checkpoint to a Hugging Face folder")
  try:
    raw = json.loads(path.read_bytes())
    return _config(raw, path, dtype, remat)
  except (ValueError, TypeError, AttributeError, KeyError) as error:
    raise ConfigError(f"{path} is no config of a Llama ({type(error).__name__}:"
                      f" {error}); set config.model.checkpoint") from error


def _config(raw: dict[str, Any], path: Any, dtype: str, remat: str
            ) -> decoder.ModelConfig:
  wanted = dict(hidden_act="silu", attention_bias=False, mlp_bias=False,
                rope_scaling=None)
  for name, value in dict(model_type="llama", **wanted).items():
    if raw.get(name, wanted.get(name)) != value:
      raise ConfigError(f"{path}: {name}={raw.get(name)!r}; only plain Llama "
                        f"checkpoints ({name}={value!r}) are read so far")
  rope = raw.get("rope_parameters") or {}  # as transformers 5 writes it
  if rope.get("rope_type", "default") != "default":
    raise ConfigError(f"{path}: rope_parameters={rope!r}; only plain Llama "
                      "checkpoints (rope_type='default') are read so far")
  heads = int(raw["num_attention_heads"])
  width = int(raw["hidden_size"])
  return decoder.ModelConfig(
      layers=int(raw["num_hidden_layers"]), width=width, heads=heads,
      kv_heads=int(raw.get("num_key_value_heads") or heads),
      head_size=int(raw.get("head_dim") or width // heads),
      ff=int(raw["intermediate_size"]), vocab=int(raw["vocab_size"]),
      context=int(raw["max_position_embeddings"]),
      rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta")
                       or 10000.0),
      norm_eps=float(raw["rms_norm_eps"]),
      tied=bool(raw.get("tie_word_embeddings", False)), dtype=dtype,
      remat=remat)


def weights_file(folder: Any) -> epath.Path:
  """`model.safetensors` of a folder.

  Raises:
    ConfigError: it is not there.
  """
  folder = epath.Path(folder)
  path = folder / "model.safetensors"
  if not path.exists():
    found = [p.name for p in folder.iterdir()] if folder.exists() else []
    pickles = [n for n in found if n.endswith((".bin", ".pt", ".pth"))]
    hint = (f"; {pickles[0]} is a pickle, which can run code: convert it with "
            "transformers' save_pretrained(safe_serialization=True)"
            if pickles else "")
    raise ConfigError(f"{folder} has no model.safetensors{hint}")
  return path


def _read_tensors(folder: epath.Path) -> dict[str, np.ndarray]:
  """All tensors of `model.safetensors`, viewed in the file's own bytes."""
  path = weights_file(folder)
  data = path.read_bytes()
  size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else len(data)
  if size > len(data) - 8:
    raise DataError(f"{path} is cut short: its header wants {size:,} bytes, "
                    f"the file has {len(data):,}")
  try:
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    rows = []
    for name, info in header.items():
      begin, end = map(operator.index, info["data_offsets"])
      rows.append((name, str(info["dtype"]), begin, end,
                   [operator.index(x) for x in info["shape"]]))
  except (ValueError, TypeError, AttributeError, KeyError) as error:
    raise DataError(f"{path} is damaged: its header cannot be read "
                    f"({type(error).__name__}: {error})") from error
  tensors = {}
  for name, kind, begin, end, shape in rows:
    if kind not in _DTYPES:
      raise DataError(f"{path}: {name} is {kind}, wanted one of "
                      f"{', '.join(_DTYPES)}")
    dtype = np.dtype(_DTYPES[kind])
    count = math.prod(shape)
    if (not 0 <= begin <= end <= len(data) - 8 - size or
        min(shape, default=0) < 0 or count * dtype.itemsize != end - begin):
      raise DataError(f"{path} is cut short or damaged at {name}")
    tensors[name] = np.frombuffer(data, dtype, count, 8 + size + begin
                                  ).reshape(shape)
  return tensors


def load_folder(folder: Any, m: decoder.ModelConfig, mesh: Any
                ) -> decoder.Params:
  """Reads a Hugging Face Llama folder straight onto the mesh, as float32.

  Raises:
    DataError: missing, surplus, misshapen or NaN tensors, all listed at once.
  """
  tensors = _read_tensors(epath.Path(folder))
  wrong, params = [], {}
  rows = decoder.table(m)

  def take(name, shape):
    if name not in tensors:
      return wrong.append(f"{name} is missing")
    w = np.asarray(tensors.pop(name), np.float32)
    if w.shape != shape:
      return wrong.append(f"{name} is {w.shape}, wanted {shape}")
    if not np.isfinite(w).all():
      return wrong.append(f"{name} holds NaN or infinity")
    return w

  for ours, theirs in _top_names(m).items():
    params[ours] = take(theirs, rows[ours].shape)
  for ours, (suffix, to_hf, from_hf) in _layer_names(m).items():
    shape = to_hf(np.broadcast_to(0.0, rows[ours].shape[1:])).shape
    each = [take(f"model.layers.{i}.{suffix}.weight", shape)
            for i in range(m.layers)]
    if not wrong:
      params[ours] = np.stack([from_hf(w) for w in each])
  ignored = {"lm_head.weight"} if m.tied else set()
  wrong += [f"{n} is surplus" for n in sorted(set(tensors) - ignored)
            if not n.endswith("rotary_emb.inv_freq")]
  if wrong:
    more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
    raise DataError(f"{folder} does not match its config.json: "
                    f"{'; '.join(wrong[:20])}{more}")
  return {n: sharding.put(mesh, w, *rows[n].axes) for n, w in params.items()}
