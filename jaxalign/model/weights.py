"""Weights to and from files of safetensors: straight onto the mesh, and back.

A `Layout` says where each parameter lies. Reading walks the stored tensors in
small chunks of their files and copies each chunk into the buffers of the shards
of this host that want it, so what is held besides the shards is a few chunks.
Writing fetches and writes one stored tensor at a time.
"""

from collections.abc import Mapping, Sequence
import contextlib
import math
import re
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from jaxalign.core import disk, sharding
from jaxalign.core.errors import DataError
from jaxalign.core.hub import resolve
from jaxalign.model import safetensors_io
from jaxalign.model.parameters import Layout, Params, Stored
from jaxalign.model.safetensors_io import (
  Box,
  Checkpoint,
  FILE,
  FLOATS,
  INDEX,
  printable,
)

SHARD_BYTES = 5 * 10**9  # of one exported file, as transformers has it
_OLD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|" + re.escape(FILE))


class _Shard(NamedTuple):
  """A shard, or one layer of it, that waits for its numbers."""

  box: Box  # of our parameter, or of its layer
  buffer: np.ndarray | None  # None: the numbers are only looked at


def load_weights(
  folder: Any, layout: Layout, mesh: jax.sharding.Mesh, dtype: Any = np.float32
) -> Params:
  """Reads a checkpoint onto the mesh; each host reads what its shards need.

  Host memory besides the host's own shards: a few chunks of a file, 1 MiB each
  (8 MiB from an object store, whose chunks are whole rows of the file: where a
  mesh cuts the file's last axis, it reads the columns between too). On a CPU
  the shards are the buffers that were read into.

  Args:
    folder: local, `gs://`, or `hf:<repo>[@revision]`.
    layout: our parameters, and where each of them lies.
    mesh: to lay them on, by their axes.
    dtype: of the parameters.

  Raises:
    ConfigError: no safetensors there.
    DataError: damaged files; or missing, surplus, misshapen and NaN tensors,
      all listed at once.
  """
  folder = resolve(folder)
  try:
    params, wrong = _read(Checkpoint(folder), layout, mesh, dtype)
  except OSError as error:
    raise DataError(
      f"{folder} cannot be read ({error.strerror or error}); set "
      "config.model.checkpoint"
    ) from error
  if wrong:
    problems = safetensors_io.listed(wrong)
    raise DataError(f"{folder} does not match its config.json: {problems}")
  return params


def _read(checkpoint, layout, mesh, dtype) -> tuple[Params, list[str]]:
  """The parameters; and what is wrong with the files, then all is looked at."""
  matches, wrong = _match(checkpoint, layout)
  spoiled: set[str] = set()
  params = {}
  for name, p in layout.rows.items():
    target = sharding.named_sharding(mesh, *p.axes)
    indices = target.addressable_devices_indices_map(p.shape).values()
    boxes = {_bounds(index, p.shape) for index in indices}
    # A copy on many devices: one buffer.
    whole = {box: None if wrong else _aligned(box, dtype) for box in boxes}
    for layer, theirs in matches[name]:
      shards = _of_layer(whole, layer)
      if shards and not _fill(checkpoint, theirs, layout.stored[name], shards):
        spoiled.add(theirs)
    if not wrong:
      shard = lambda index, p=p, whole=whole: whole[_bounds(index, p.shape)]
      params[name] = jax.make_array_from_callback(p.shape, target, shard)
      params[name].block_until_ready()  # then the buffers may go
  names = sorted(checkpoint.tensors)
  flags = np.array([n in spoiled for n in names])
  if jax.process_count() > 1:
    flags = np.asarray(multihost_utils.process_allgather(flags)).any(0)
  spoiled = [printable(n) for n, flag in zip(names, flags) if flag]
  return params, wrong + [f"{n} holds NaN or infinity" for n in spoiled]


def _of_layer(whole, layer: int | None) -> list[_Shard]:
  """Of box -> buffer what holds a layer; None: not stacked, all of it."""
  if layer is None:
    return [_Shard(box, buffer) for box, buffer in whole.items()]
  return [
    _Shard(box[1:], None if buffer is None else buffer[layer - box[0][0]])
    for box, buffer in whole.items()
    if box[0][0] <= layer < box[0][1]
  ]


def _match(checkpoint: Checkpoint, layout: Layout) -> tuple[dict, list[str]]:
  """Our name -> (layer, tensor) of it that can be read; and what is wrong."""
  theirs, wrong = {}, []
  for name in checkpoint.tensors:
    plain = layout.rename(name)
    if plain in theirs:
      twice = printable(name), printable(theirs[plain])
      wrong.append(f"{' and '.join(twice)} are the same")
    elif plain is not None:
      theirs[plain] = name
  matches, used = {}, {}  # used: name -> whether it is as wanted
  for ours, p in layout.rows.items():
    s, matches[ours] = layout.stored[ours], []
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
        matches[ours].append((layer, theirs[name]))
  surplus = sorted(theirs.keys() - used.keys())
  wrong += [f"{printable(theirs[n])} is surplus" for n in surplus]
  return matches, wrong


def _problem(checkpoint, name: str | None, wanted: str, s: Stored) -> str:
  """What is wrong with a tensor's place, type and shape, if anything."""
  if name is None:
    return f"{wanted} is missing"
  t = checkpoint.tensors[name]
  if t.shape != s.shape:
    return f"{printable(name)} is {printable(t.shape)}, wanted {s.shape}"
  if t.dtype not in FLOATS:
    known = ", ".join(FLOATS)
    return f"{printable(name)} is {t.dtype}, wanted one of {known}"
  return ""


def _name(s: Stored, layer: int | None) -> str:
  return s.name if layer is None else s.name.replace("{}", str(layer))


def _fill(
  checkpoint: Checkpoint, name: str, s: Stored, shards: Sequence[_Shard]
) -> bool:
  """Copies a stored tensor into the shards; False where it is not finite."""
  axes = zip(*(shard.box for shard in shards))
  hull = [(min(b for b, _ in x), max(e for _, e in x)) for x in map(list, axes)]
  left = [hull[s.order.index(i)] for i in range(len(s.order))]
  if s.pick:
    left.insert(s.pick[0], (s.pick[1], s.pick[1] + 1))
  finite = True
  for chunk in checkpoint.chunks(name, s.view, tuple(left)):
    left = list(chunk)
    if s.pick:
      del left[s.pick[0]]
    here = tuple(left[i] for i in s.order)
    wanted = [(shard, _common(here, shard.box)) for shard in shards]
    wanted = [(x, box) for x, box in wanted if all(b < e for b, e in box)]
    if not wanted:
      continue
    with np.errstate(invalid="ignore"):  # a signalling NaN
      x = np.asarray(checkpoint.read(name, s.view, chunk), np.float32)
    finite = finite and bool(np.isfinite(x).all())
    if s.pick:
      x = x.squeeze(s.pick[0])
    x = x.transpose(s.order)
    for shard, box in wanted:
      if shard.buffer is not None:
        shard.buffer[_slices(box, shard.box)] = x[_slices(box, here)]
  return finite


def _common(one: Box, other: Box) -> Box:
  return tuple((max(b, c), min(e, f)) for (b, e), (c, f) in zip(one, other))


def _slices(box: Box, base: Box) -> tuple[slice, ...]:
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
  size = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(size + 64, np.uint8)
  begin = -raw.ctypes.data % 64
  return raw[begin : begin + size].view(dtype).reshape(shape)


# Writing.


class Export(NamedTuple):
  """What a written folder holds besides the weights, and how they lie."""

  config: Mapping[str, Any]  # of config.json; its `dtype` is set by ours
  tokenizer: Any = None  # has an `export(folder)`
  dtype: str = "float32"  # of the file: one of hf.DTYPES
  shard_bytes: int = SHARD_BYTES  # beyond which there are several files
  generation: Mapping[str, Any] = {}  # of generation_config.json; see `save`


def save(
  folder: Any, params: Mapping[str, jax.Array], layout: Layout, export: Export
) -> None:
  """Writes weights, config and tokenizer as transformers loads them.

  All processes call it, process 0 writes. The weights have temporary names
  until the last byte; config.json, without which nothing reads the folder,
  comes last. generation_config.json has the config's BOS, EOS and PAD; a BOS
  and a PAD that `export.generation` names stay.

  Args:
    folder: made where it is not there; older weights in it are replaced.
    params: the parameters.
    layout: their table, and where each goes.
    export: what else is written.

  Raises:
    WriteError: the folder cannot be written.
  """
  folder, kind = epath.Path(folder), np.dtype(export.dtype)
  sources = _sources(layout)
  shapes = {n: source[0][0].shape for n, source in sources.items()}
  sizes = {n: math.prod(x) * kind.itemsize for n, x in shapes.items()}
  files = safetensors_io.split(sizes, export.shard_bytes)
  writes = jax.process_index() == 0
  paths = [folder / n for n in files if writes]
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
  for path in folder.iterdir():  # of an export that was here before
    old = _OLD.fullmatch(path.name) and path.name not in files
    if path.name == INDEX or old:
      path.unlink()
  if len(files) > 1:
    where = {n: file for file, names in files.items() for n in names}
    total = dict(total_size=sum(sizes.values()))
    disk.write_json(folder / INDEX, dict(metadata=total, weight_map=where))
  if export.tokenizer is not None:
    export.tokenizer.export(folder)
  config = dict(export.config, dtype=export.dtype)
  ids = {f"{n}_token_id": config.get(f"{n}_token_id") for n in _SPECIAL}
  ids = {n: x for n, x in ids.items() if x is not None}
  eos = {n: x for n, x in ids.items() if n == "eos_token_id"}
  generation = {**ids, **export.generation, **eos}
  disk.write_json(folder / "generation_config.json", generation)
  disk.write_json(folder / "config.json", config)


_SPECIAL = ("bos", "eos", "pad")
_Source = list[tuple[Stored, str, int | None]]  # ours by name, and its layer


def _sources(layout: Layout) -> dict[str, _Source]:
  """Stored name -> the parameters that it is made of; layer by layer."""
  rows, stored = layout.rows, layout.stored
  stacked = [n for n in rows if "{}" in stored[n].name]
  each = [(ours, None) for ours in rows if ours not in stacked]
  for layer in range(max((rows[n].shape[0] for n in stacked), default=0)):
    each += [(n, layer) for n in stacked if layer < rows[n].shape[0]]
  out: dict[str, _Source] = {}
  for ours, layer in each:
    s = stored[ours]
    out.setdefault(_name(s, layer), []).append((s, ours, layer))
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


def _gather(params, source: _Source, dtype: np.dtype) -> np.ndarray:
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
