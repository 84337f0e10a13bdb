"""Weights to and from a Hugging Face folder: straight onto the mesh, and back.

A table of `Stored` says where each parameter lies. Reading walks the stored
tensors in small parts of their files and copies each part into the buffers of
the shards of this host that want it, so what is held besides the shards is a
few parts. Writing fetches and writes one stored tensor at a time.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import re
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from jaxalign import artifacts, progress, sharding
from jaxalign.errors import ConfigError, DataError
from jaxalign.hub import resolve, resolve_settings
from jaxalign.model import decoder, families, published, safetensors_io
from jaxalign.model.safetensors_io import Box, Checkpoint, FILE, INDEX, shown
from jaxalign.model.table import Param, Params, Stored

SHARD_BYTES = 5 * 10**9  # of one exported file, as transformers has it
_OLD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|" + re.escape(FILE))


# A decoder.


def raw_config(folder: Any) -> dict[str, Any]:
  """The parsed config.json of a folder, or of `hf:<repo>`.

  A repository that cannot be had is planned with as it was published, where
  this code knows it; its weights are asked for later, and then it matters.

  Raises:
    ConfigError: there is none.
  """
  try:
    return families.read_raw(resolve_settings(folder))
  except ConfigError as error:
    if str(folder) not in published.CONFIGS:
      raise
    return _published(str(folder), str(error).partition(";")[0])


@functools.lru_cache
def _published(name: str, why: str) -> dict[str, Any]:
  progress.say(f"  {why}; its sizes are taken as they were published")
  return published.CONFIGS[name]


def model_type(folder: Any) -> str:
  """ "llama", "bert", ...: of a folder, or of `hf:<repo>`."""
  return str(raw_config(folder).get("model_type"))


def read_config(folder: Any, dtype: str, remat: str) -> decoder.ModelConfig:
  """The sizes of a Hugging Face folder, or of `hf:<repo>`.

  Raises:
    ConfigError: no config.json, or not one of a known family.
  """
  return families.config_of(
    raw_config(folder), dtype, remat, f"{folder}/config.json"
  )


def load_folder(
  folder: Any,
  m: decoder.ModelConfig,
  mesh: jax.sharding.Mesh,
  dtype: Any = np.float32,
) -> Params:
  """`load` of a decoder."""
  return load(
    folder,
    decoder.table(m),
    families.stored(m),
    mesh,
    dtype=dtype,
    canonical=lambda name: families.canonical(m, name),
  )


class Given(NamedTuple):
  """What an export keeps of the checkpoint that it began from."""

  dtype: str = "float32"  # of its weights
  config: Mapping[str, Any] = {}  # of KEPT what its config.json has
  generation: Mapping[str, Any] = {}  # its generation_config.json


DTYPES = ("float32", "bfloat16", "float16")
KEPT = ("bos_token_id", "pad_token_id")


def given(folder: Any) -> Given:
  """Of a Hugging Face folder, or `hf:<repo>`: how it stores and generates.

  Raises:
    ConfigError: no config.json, or a file that is no JSON object.
  """
  folder = resolve(folder)
  raw = families.read_raw(folder)
  raw = dict(raw.get("text_config") or {}) | raw  # of a multimodal one
  dtype = str(raw.get("dtype") or raw.get("torch_dtype")).split(".")[-1]
  if dtype not in DTYPES:  # then as most of its bytes are
    names = {name: kind.name for name, kind in safetensors_io.FLOATS.items()}
    bytes_of: dict[str, int] = {}
    for t in Checkpoint(folder).tensors.values():
      name = names.get(t.dtype, "float32")
      bytes_of[name] = bytes_of.get(name, 0) + t.end - t.begin
    dtype = max(bytes_of, key=bytes_of.get, default="float32")
  path, generation = folder / "generation_config.json", {}
  if path.exists():
    try:
      generation = artifacts.read_json(path)
      if not isinstance(generation, dict):
        raise ValueError(f"a {type(generation).__name__}")
    except ValueError as error:
      raise ConfigError(
        f"{path} is no JSON object ({error!s:.100}); set "
        "config.model.checkpoint"
      ) from error
  return Given(
    dtype, {n: raw[n] for n in KEPT if raw.get(n) is not None}, generation
  )


def export_folder(
  folder: Any,
  params: Params,
  m: decoder.ModelConfig,
  tokenizer: Any,
  *,
  dtype: str = "",
  shard_bytes: int = SHARD_BYTES,
  of: Given = Given(),
) -> list[str]:
  """`save` of a decoder.

  Args:
    folder, params, tokenizer, shard_bytes: as of `save`.
    m: the model's sizes.
    dtype: one of DTYPES, of the file; "": as `of`.
    of: the checkpoint that it began from.

  Returns:
    The names of the files written (by process 0).
  """
  stops, dtype = list(tokenizer.stops), dtype or of.dtype
  config = families.hf_config(
    m, tokenizer.bos, stops if len(stops) > 1 else stops[0], dtype
  )
  config |= {n: x for n, x in of.config.items() if config.get(n) is None}
  save(
    folder,
    params,
    decoder.table(m),
    families.stored(m),
    dtype=dtype,
    config=config,
    tokenizer=tokenizer,
    shard_bytes=shard_bytes,
    generation=of.generation,
  )
  return ["export"]


def weights_file(folder: Any) -> epath.Path:
  """`model.safetensors` of a folder, or its index.

  Raises:
    ConfigError: neither is there.
  """
  folder = resolve(folder)
  return folder / safetensors_io.weights_files(folder)[0]


def digest_names(folder: Any) -> list[str]:
  """The files, by name, that a model is read from: config, index, weights."""
  return ["config.json", *safetensors_io.weights_files(resolve(folder))]


# In.


class _Part(NamedTuple):
  """A shard, or one layer of it, that waits for its numbers."""

  box: Box  # of our parameter, or of its layer
  buffer: np.ndarray | None  # None: the numbers are only looked at


def load(
  folder: Any,
  rows: Mapping[str, Param],
  stored: Mapping[str, Stored],
  mesh: jax.sharding.Mesh,
  *,
  canonical: Callable[[str], str | None] = lambda name: name,
  dtype: Any = np.float32,
) -> Params:
  """Reads a checkpoint onto the mesh; each host reads what its shards need.

  Host memory besides the host's own shards: a few parts of a file, 1 MiB each
  (8 MiB from an object store, whose parts are whole rows of the file: where a
  mesh cuts the file's last axis, it reads the columns between too). On a CPU
  the shards are the buffers that were read into.

  Args:
    folder: local, `gs://`, or `hf:<repo>[@revision]`.
    rows: our parameters.
    stored: where each of them lies.
    mesh: to lay them on, by their axes.
    canonical: a file's name of a tensor -> the name in `stored`; None: a
      tensor that is knowingly left alone.
    dtype: of the parameters.

  Raises:
    ConfigError: no safetensors there.
    DataError: damaged files; or missing, surplus, misshapen and NaN tensors,
      all listed at once.
  """
  folder = resolve(folder)
  try:
    return _load(folder, rows, stored, mesh, canonical, dtype)
  except OSError as error:
    raise DataError(
      f"{folder} cannot be read ({error.strerror or error}); set "
      "config.model.checkpoint"
    ) from error


def _load(folder, rows, stored, mesh, canonical, dtype) -> Params:
  checkpoint = Checkpoint(folder)
  found, wrong = _match(checkpoint, rows, stored, canonical)
  spoiled: set[str] = set()
  params = {}
  for name, p in rows.items():
    target = sharding.named(mesh, *p.axes)
    boxes = {
      device: _bounds(index, p.shape)
      for device, index in target.addressable_devices_indices_map(
        p.shape
      ).items()
    }
    shards = {
      box: None if wrong else _aligned(box, dtype) for box in boxes.values()
    }  # a copy on many devices: one buffer
    for layer, theirs in found[name]:
      parts = [
        _Part(box, buffer)
        if layer is None
        else _Part(box[1:], None if wrong else buffer[layer - box[0][0]])
        for box, buffer in shards.items()
        if layer is None or box[0][0] <= layer < box[0][1]
      ]
      if parts and not _fill(checkpoint, theirs, stored[name], parts):
        spoiled.add(theirs)
    if not wrong:
      params[name] = jax.make_array_from_callback(
        p.shape,
        target,
        lambda index, p=p, shards=shards: shards[_bounds(index, p.shape)],
      )
      params[name].block_until_ready()  # then the buffers may go
  wrong += [
    f"{shown(n)} holds NaN or infinity"
    for n in _anywhere(spoiled, sorted(checkpoint.tensors))
  ]
  if wrong:
    raise DataError(
      f"{folder} does not match its config.json: {safetensors_io.listed(wrong)}"
    )
  return params


def _match(
  checkpoint: Checkpoint,
  rows: Mapping[str, Param],
  stored: Mapping[str, Stored],
  canonical: Callable[[str], str | None],
) -> tuple[dict[str, list[tuple[int | None, str]]], list[str]]:
  """Our name -> (layer, tensor) of it that can be read; and what is wrong."""
  theirs, wrong = {}, []
  for name in checkpoint.tensors:
    plain = canonical(name)
    if plain in theirs:
      wrong.append(f"{shown(name)} and {shown(theirs[plain])} are the same")
    elif plain is not None:
      theirs[plain] = name
  found, used = {}, {}  # used: name -> whether it is as wanted
  for ours, p in rows.items():
    s, found[ours] = stored[ours], []
    stacked = "{}" in s.name
    if stacked and p.shape[0] > len(checkpoint.tensors):  # no list of 10^9
      wrong.append(f"{s.name} is missing, wanted {p.shape[0]} layers")
      continue
    for layer in range(p.shape[0]) if stacked else [None]:
      name = _name(s, layer)
      if name not in used:
        problem = _problem(checkpoint, theirs.get(name), name, s)
        wrong += [problem] if problem else []
        used[name] = not problem
      if used[name]:
        found[ours].append((layer, theirs[name]))
  wrong += [
    f"{shown(name)} is surplus"
    for plain, name in sorted(theirs.items())
    if plain not in used
  ]
  return found, wrong


def _problem(
  checkpoint: Checkpoint, found: str | None, wanted: str, s: Stored
) -> str:
  """What is wrong with a tensor's place, type and shape, if anything."""
  if found is None:
    return f"{wanted} is missing"
  t = checkpoint.tensors[found]
  if t.shape != s.shape:
    return f"{shown(found)} is {shown(t.shape)}, wanted {s.shape}"
  if t.dtype not in safetensors_io.FLOATS:
    return (
      f"{shown(found)} is {t.dtype}, wanted one of "
      f"{', '.join(safetensors_io.FLOATS)}"
    )
  return ""


def _name(s: Stored, layer: int | None) -> str:
  return s.name if layer is None else s.name.replace("{}", str(layer))


def _fill(
  checkpoint: Checkpoint, name: str, s: Stored, parts: Sequence[_Part]
) -> bool:
  """Copies a stored tensor into the parts; False where it is not finite."""
  hull = [
    (min(b for b, _ in axis), max(e for _, e in axis))
    for axis in zip(*(part.box for part in parts))
  ]
  finite = True
  for piece in checkpoint.pieces(name, s.view, _theirs(hull, s)):
    here = _ours(piece, s)
    common = [
      [(max(b, c), min(e, f)) for (b, e), (c, f) in zip(here, p.box)]
      for p in parts
    ]
    wanted = [
      (p, box) for p, box in zip(parts, common) if all(b < e for b, e in box)
    ]
    if not wanted:
      continue
    with np.errstate(invalid="ignore"):  # a signalling NaN
      x = np.asarray(checkpoint.read(name, s.view, piece), np.float32)
    finite = finite and bool(np.isfinite(x).all())
    if s.pick:
      x = x[(slice(None),) * s.pick[0] + (0,)]
    x = x.transpose(s.order)
    for part, box in wanted:
      if part.buffer is not None:
        part.buffer[_slices(box, part.box)] = x[_slices(box, here)]
  return finite


def _theirs(box: Sequence[tuple[int, int]], s: Stored) -> Box:
  """Our box as one of the stored tensor's view."""
  left = [box[s.order.index(i)] for i in range(len(s.order))]
  if s.pick:
    left.insert(s.pick[0], (s.pick[1], s.pick[1] + 1))
  return tuple(left)


def _ours(box: Box, s: Stored) -> Box:
  """The inverse of `_theirs`."""
  left = list(box)
  if s.pick:
    del left[s.pick[0]]
  return tuple(left[i] for i in s.order)


def _slices(box: Sequence[tuple[int, int]], base: Box) -> tuple[slice, ...]:
  """A box as an index of what begins where `base` does."""
  return tuple(slice(b - c, e - c) for (b, e), (c, _) in zip(box, base))


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
  """A sharding's index as a box."""
  return tuple(i.indices(n)[:2] for i, n in zip(index, shape))


def _aligned(box: Box, dtype: Any) -> np.ndarray:
  """An empty array that a CPU device takes as it is, without a copy.

  XLA holds such memory to be read-only, also where its array is donated, so
  that devices may share it.
  """
  shape = [e - b for b, e in box]
  size = int(np.prod(shape)) * np.dtype(dtype).itemsize
  raw = np.empty(size + 64, np.uint8)
  begin = -raw.ctypes.data % 64
  return raw[begin : begin + size].view(dtype).reshape(shape)


def _anywhere(some: set[str], names: list[str]) -> list[str]:
  """The names, of all, that some process has."""
  flags = np.array([n in some for n in names])
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    flags = np.asarray(multihost_utils.process_allgather(flags)).any(0)
  return [n for n, flag in zip(names, flags) if flag]


# Out.


def save(
  folder: Any,
  params: Params,
  rows: Mapping[str, Param],
  stored: Mapping[str, Stored],
  *,
  config: Mapping[str, Any],
  tokenizer: Any = None,
  dtype: str = "float32",
  shard_bytes: int = SHARD_BYTES,
  generation: Mapping[str, Any] = {},
) -> None:
  """Writes weights, config and tokenizer as transformers loads them.

  All processes call it, process 0 writes. The weights have temporary names
  until the last byte; config.json, without which nothing reads the folder,
  comes last.

  Args:
    folder: made where it is not there; older weights in it are replaced.
    params: the parameters.
    rows: their table.
    stored: where each goes.
    config: of config.json; its `dtype` is set here.
    tokenizer: what has an `export(folder)`, or None.
    dtype: one of DTYPES, of the file.
    shard_bytes: of tensors in a file, beyond which there are several.
    generation: of generation_config.json beside BOS, EOS and PAD; a BOS and
      a PAD that it names stay.

  Raises:
    WriteError: the folder cannot be written.
  """
  folder = epath.Path(folder)
  kind = np.dtype(dtype)
  sources = _sources(rows, stored)
  shapes = {n: source[0][0].shape for n, source in sources.items()}
  sizes = {n: int(np.prod(x)) * kind.itemsize for n, x in shapes.items()}
  files = safetensors_io.split(sizes, shard_bytes)
  writes = jax.process_index() == 0
  paths = [folder / name for name in files] if writes else []
  with safetensors_io.atomic(paths) as temporary:
    for i, names in enumerate(files.values()):
      with temporary[i].open("wb") if writes else contextlib.nullcontext() as f:
        if writes:
          f.write(safetensors_io.header({n: shapes[n] for n in names}, kind))
        for name in names:
          x = _gather(params, sources[name], kind)  # on all processes
          if writes:
            f.write(memoryview(x.reshape(-1).view(np.uint8)))
  if not writes:
    return
  for path in folder.iterdir():
    if path.name == INDEX or (
      _OLD.fullmatch(path.name) and path.name not in files
    ):
      path.unlink()  # of an export that was here before
  if len(files) > 1:
    artifacts.write_json(
      folder / INDEX,
      dict(
        metadata=dict(total_size=sum(sizes.values())),
        weight_map={n: file for file, names in files.items() for n in names},
      ),
    )
  if tokenizer is not None:
    tokenizer.export(folder)
  named = {
    n: config[n]
    for n in ("bos_token_id", "eos_token_id", "pad_token_id")
    if config.get(n) is not None
  }
  artifacts.write_json(
    folder / "generation_config.json",
    named
    | dict(generation)
    | {n: named[n] for n in ("eos_token_id",) if n in named},
  )
  artifacts.write_json(folder / "config.json", dict(config, dtype=dtype))


_Source = list[tuple[Stored, str, int | None]]  # ours by name, and its layer


def _sources(
  rows: Mapping[str, Param], stored: Mapping[str, Stored]
) -> dict[str, _Source]:
  """Stored name -> the parameters that it is made of; layer by layer."""
  out: dict[str, _Source] = {}

  def add(ours, layer):
    out.setdefault(_name(stored[ours], layer), []).append(
      (stored[ours], ours, layer)
    )

  stacked = [n for n in rows if "{}" in stored[n].name]
  for ours in rows:
    if ours not in stacked:
      add(ours, None)
  for layer in range(max((rows[n].shape[0] for n in stacked), default=0)):
    for ours in stacked:
      if layer < rows[ours].shape[0]:
        add(ours, layer)
  for name, source in out.items():
    picks = {s.pick for s, _, _ in source}
    whole = source[0][0].view[source[0][0].pick[0]] if None not in picks else 1
    if len(source) != whole or len(picks) != whole:
      raise ValueError(
        f"{name} is made of {len(source)} parameters, wanted {whole}"
      )
  return out


@jax.jit
def _layer(x: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _gather(params: Params, source: _Source, dtype: np.dtype) -> np.ndarray:
  """One stored tensor on the host, of its parameters."""
  out = None
  for s, ours, layer in source:
    x = params[ours] if layer is None else _layer(params[ours], layer)
    x = sharding.fetch(x).transpose(np.argsort(s.order))
    if not s.pick:
      return np.ascontiguousarray(x, dtype).reshape(s.shape)
    if out is None:
      out = np.empty(s.shape, dtype)
    # Each of the fused has a view of its own (a query's has an axis more).
    out.reshape(s.view)[(slice(None),) * s.pick[0] + (s.pick[1],)] = x
  return out
