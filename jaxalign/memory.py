"""What a job holds, of a device and of a host, told before it compiles."""

import os
import re
from typing import Any

from etils import epath
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding
from jaxalign.errors import ConfigError
from jaxalign.model import decoder

# Memory of one device, by the start of its kind, where it does not say itself
# (a TPU that is not there); bytes, as published.
GIB = 2**30
MIB = 2**20
SIZES = {
  "TPU v4": 32 * GIB,
  "TPU v5 lite": 16 * GIB,
  "TPU v5e": 16 * GIB,
  "TPU v5": 95 * GIB,
  "TPU v6": 32 * GIB,
  "TPU7x": 96 * GIB,
  "TPU v7": 96 * GIB,
}
# What a job on a CPU holds beside its arrays, above an interpreter that has
# started jax: libraries, tables and texts; what the compiler leaves behind, and
# with every arm once more (measured by tools/job_checks.py memory).
LIBRARIES, PROGRAMS, PROGRAMS_AN_ARM = 240 * MIB, 650 * MIB, 60 * MIB


def size_of(device: Any) -> int | None:
  """Bytes of a device's memory; None where it is not known (a CPU's)."""
  try:
    stats = device.memory_stats() or {}
  except Exception:  # a device that is only described has none
    stats = {}
  if "bytes_limit" in stats:
    return int(stats["bytes_limit"])
  for start, size in SIZES.items():
    if device.device_kind.lower().startswith(start.lower()):
      return size
  return None


def train_step(
  m: decoder.ModelConfig,
  mesh: Any,
  *,
  rows: int,
  length: int,
  chunk: int,
  frozen_size: int = 4,
  moments: int = 2,
  packed: int = 0,
) -> dict[str, int]:
  """Bytes a device of one train step, by what they hold.

  Args:
    m: the model's sizes.
    mesh: the mesh.
    rows: responses of one micro-batch.
    length: their padded length.
    chunk: positions of the head at once.
    frozen_size: bytes of a number that adapters leave as it is.
    moments: what the optimizer keeps, see `optim.MOMENTS`.
    packed: tokens of a micro-batch that is packed; 0: as many as padded.

  Returns:
    "parameters", "gradients" and "optimizer" (float32 moments) of what is
    trained, and the estimates "activations" (what the backward pass keeps of
    every layer), "logits" (of one chunk, with their gradient) and "workspace"
    (what else one layer, or the head, needs while it runs backward).
    Compiled for TPU with padded rows (tools/aot.py), gradients and estimates
    together were between 1 % below and 28 % above what the compiler set aside.
  """
  held = trained = 0
  for name, p in decoder.table(m).items():
    parts = np.prod([sharding.parts(mesh, a) for a in p.axes if a] or [1])
    numbers = int(np.prod(p.shape)) // int(parts)
    moves = m.lora is None or name[-2:] in (":a", ":b", ":r")
    held += (4 if moves else frozen_size) * numbers
    trained += 4 * numbers if moves else 0
  local = -(-rows // sharding.parts(mesh, "batch"))
  tensor = sharding.parts(mesh, "heads")
  size = jnp.dtype(m.dtype).itemsize
  tokens = -(-packed // sharding.parts(mesh, "batch")) or local * length
  wide = (2 + m.gated) * m.ff
  per_token = {
    "none": 6 * m.width + (4 * m.heads * m.head_size + wide) // tensor,
    "dots": 4 * m.width
    + (2 * m.heads * m.head_size + (1 + m.gated) * m.ff) // tensor,
    "full": m.width,
  }
  # Of attention, a token; a flash kernel never holds them.
  scores = (
    m.heads // tensor * length
    if m.attention == "plain" or (m.attention == "tiles" and not packed)
    else 0
  )
  activations = m.layers * tokens * per_token[m.remat] * size
  # Whole weights of one layer, and their gradients in float32.
  layer = (
    (size + 4)
    * sum(
      int(np.prod(p.shape[1:]))
      for p in decoder.layers_of(decoder.table(m)).values()
    )
    // tensor
  )
  if m.remat == "none":
    activations += m.layers * tokens * 2 * 4 * scores
  else:
    layer += tokens * (per_token["none"] * size + scores * (4 + size))
  logits = 2 * 4 * local * min(chunk, length) * m.vocab // tensor
  head = (
    _head_bytes(m, size, frozen_size) * m.vocab * m.width // tensor
    + 2 * 4 * tokens * m.width
  )  # what it reads and its slope, float32
  return dict(
    parameters=held,
    gradients=trained,
    optimizer=moments * trained,
    activations=activations,
    logits=logits,
    workspace=max(layer - logits, head),
  )


def _head_bytes(m, size, frozen_size):
  """Bytes of a number of the output matrix while the head runs backward.

  A trained one is there whole in float32, the master that every chunk of
  positions reads, beside its gradient, a sum over the chunks in float32; where
  products are narrower, in their dtype, too, gathered and laid out once more
  for the product. With adapters there is no gradient: the frozen one and its
  other layout. (So the compiler held Qwen3's and Gemma 3's.)
  """
  if m.lora is not None:
    return frozen_size + size
  return 4 + 4 + (2 * size if size < 4 else 0)


def on_host(
  m: decoder.ModelConfig,
  mesh: Any,
  *,
  tokens: int,
  packed: bool,
  rows: int,
  length: int,
  chunk: int,
  tile: int,
  frozen_size: int = 4,
  moments: int = 2,
  reference: bool = False,
  arms: int = 1,
) -> dict[str, int]:
  """Bytes of a CPU job's peak, above an interpreter that has started jax.

  The peak is the train step's, or that of a pass of the reference over `tile`
  rows, whichever is more.

  Args:
    m, mesh, rows, length, chunk, frozen_size, moments: as of `train_step`.
    tokens: of the largest micro-batch.
    packed: whether it is packed.
    tile: rows that a device runs at once where there is no gradient.
    reference: whether its weights stay beside a policy that is trained whole.
    arms: trained one after the other.
  """
  here = sum(
    d.process_index == mesh.devices.flat[0].process_index
    for d in mesh.devices.flat
  )
  step = train_step(
    m,
    mesh,
    rows=rows,
    length=length,
    chunk=chunk,
    frozen_size=frozen_size,
    moments=moments,
    packed=tokens if packed else 0,
  )
  local = tokens / sharding.parts(mesh, "batch")
  wide = (2 + m.gated) * m.ff
  if m.remat == "none":  # the compiler for CPUs keeps them twice, as measured
    step["activations"] += int(4 * m.layers * local * wide)
  numbers = decoder.parameter_count(m._replace(lora=None))
  if reference and m.lora is None:
    step["reference"] = frozen_size * numbers // here
  mean = tokens / rows
  scores = 0 if packed else 2 * m.heads * length
  forward = dict(
    parameters=frozen_size * numbers // here,
    activations=int(
      4
      * tile
      * mean
      * (6 * m.width + 4 * m.heads * m.head_size + 2 * wide + scores)
    ),
    logits=8 * tile * min(chunk, length) * m.vocab,
  )
  most = max(step, forward, key=lambda x: sum(x.values()))
  return dict(
    libraries=LIBRARIES,
    **{n: here * x for n, x in most.items()},
    programs=PROGRAMS + arms * PROGRAMS_AN_ARM,
  )


def available() -> int | None:
  """Bytes that this process may still take on its host; None: not known.

  What the system can give, and what the control groups it is in leave.
  """

  def text(path):
    try:
      return epath.Path(path).read_text()
    except OSError:
      return ""

  found = [
    int(x) * 1024
    for x in re.findall(
      r"^MemAvailable:\s+(\d+) kB", text("/proc/meminfo"), re.MULTILINE
    )
  ]
  for controllers, path in re.findall(
    r"^\d+:(.*?):(/.*)$", text("/proc/self/cgroup"), re.MULTILINE
  ):
    root, names = "/sys/fs/cgroup", ("memory.max", "memory.current")
    if controllers:  # the first version of control groups
      if "memory" not in controllers.split(","):
        continue
      root += "/memory"
      names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    while True:
      most, now = (text(f"{root}{path.rstrip('/')}/{n}").strip() for n in names)
      if most.isdigit() and now.isdigit() and int(most) < 1 << 60:
        found.append(max(0, int(most) - int(now)))
      if path in ("/", ""):
        break
      path = os.path.dirname(path)
  return min(found, default=None)


def check_host(
  held: dict[str, int], free: int | None, force: bool = False
) -> str:
  """What to say where a host has less than `on_host` plans; "": enough.

  Raises:
    ConfigError: not even the weights, their gradients and moments and half of
      the estimates fit, and nobody forces it.
  """
  planned = sum(held.values())
  if free is None or planned <= free:
    return ""
  said = (
    f"this job is planned to take {size(planned)} at its peak "
    f"({words(held)}), and {size(free)} of memory are free"
  )
  helps = (
    "a smaller config.train.batch_size or a larger "
    "config.train.accumulation, config.model.remat='full', "
    "config.lora.rank"
  )
  sure = sum(
    held.get(n, 0)
    for n in ("parameters", "gradients", "optimizer", "reference", "libraries")
  )
  if sure + (planned - sure) // 2 > free and not force:
    raise ConfigError(f"{said}; set {helps}; --force tries all the same")
  return f"warning: {said}; {helps} take less"


def words(held: dict[str, int]) -> str:
  """ "parameters 1.0 MiB, ...; together 3.2 MiB"."""
  unit, name = (GIB, "GiB") if sum(held.values()) >= GIB else (2**20, "MiB")
  return (
    ", ".join(f"{k} {v / unit:,.1f}" for k, v in held.items())
    + f"; together {sum(held.values()) / unit:,.1f} {name}"
  )


def size(count: int) -> str:
  """ "1.5 GiB", "20.0 MiB" or "3.1 KiB"."""
  for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
    if count >= unit:
      return f"{count / unit:,.1f} {name}"
  return f"{count / 2**10:,.1f} KiB"


def check_fits(held: dict[str, int], device: Any, force: bool = False) -> None:
  """Raises ConfigError where a step cannot fit a device, unless forced.

  Only what is certain counts against it: state and gradients, and half of the
  estimates (they were up to 28 % above the compiler's own).
  """
  size = size_of(device)
  sure = sum(held[n] for n in ("parameters", "gradients", "optimizer"))
  needed = sure + (sum(held.values()) - sure) // 2
  if size is None or needed <= size or force:
    return
  raise ConfigError(
    f"training needs about {sum(held.values()) / GIB:,.1f} GiB a device "
    f"({words(held)}), a {device.device_kind} has {size / GIB:,.1f} GiB; "
    "raise config.mesh.fsdp or tensor (more devices), "
    "config.train.accumulation, set config.model.remat='full', a smaller "
    "config.model.head_chunk, or config.lora.rank; --force tries all the "
    "same"
  )
