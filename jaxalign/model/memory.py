"""What a job holds, of a device and of a host, before anything compiles."""

import math
import os
import re
from typing import Any, NamedTuple

from etils import epath
import jax.numpy as jnp

from jaxalign.core import sharding
from jaxalign.core.devices import GIB, memory_of
from jaxalign.core.errors import ConfigError
from jaxalign.model import adapters, decoder
from jaxalign.model.decoder import ModelConfig
from jaxalign.model.parameters import layers_of

MIB = 2**20
# What a job on a CPU holds besides its arrays, above an interpreter that has
# started jax: libraries, tables and texts; what the compiler leaves behind, and
# with every arm once more (measured by tools/job_checks.py memory).
LIBRARIES, PROGRAMS, PROGRAMS_AN_ARM = 240 * MIB, 650 * MIB, 60 * MIB
_STATE = ("parameters", "gradients", "optimizer")


class StepShape(NamedTuple):
  """The sizes of a train step that its memory depends on."""

  rows: int  # responses of one micro-batch
  length: int  # their padded length
  chunk: int  # positions of the head at once
  frozen_size: int = 4  # bytes of a number that adapters leave as it is
  moments: int = 2  # what the optimizer keeps, see `optim.MOMENTS`
  packed: int = 0  # tokens of a packed micro-batch; 0: it is padded


def train_step(m: ModelConfig, mesh: Any, shape: StepShape) -> dict[str, int]:
  """Bytes a device of one train step, by what they hold.

  Returns:
    "parameters", "gradients" and "optimizer" (float32 moments) of what is
    trained, and the estimates "activations" (what the backward pass keeps of
    every layer), "logits" (of one chunk, with their gradient) and "workspace"
    (what else one layer, or the head, needs while it runs backward).
    Compiled for TPU with padded rows (tools/aot.py), gradients and estimates
    together were between 1 % below and 28 % above what the compiler set aside.
  """
  table, numbers = decoder.table(m), {True: 0, False: 0}
  for name, p in table.items():
    cut = math.prod(sharding.parts(mesh, a) for a in p.axes if a)
    moves = m.lora is None or adapters.is_adapter(name)
    numbers[moves] += math.prod(p.shape) // cut
  trained, frozen = numbers[True], numbers[False]
  batch, tensor = sharding.parts(mesh, "batch"), sharding.parts(mesh, "heads")
  size, length = jnp.dtype(m.dtype).itemsize, shape.length
  rows = -(-shape.rows // batch)  # of a device, whole
  tokens = -(-shape.packed // batch) or rows * length
  heads, ff = m.heads * m.head_size, (2 + m.gated) * m.ff
  dots = (2 * heads + (1 + m.gated) * m.ff) // tensor
  per_token = {
    "none": 6 * m.width + (4 * heads + ff) // tensor,
    "dots": 4 * m.width + dots,
    "full": m.width,
  }
  # Of attention, a token; a flash kernel never holds them.
  whole = m.attention == "plain" or (
    m.attention == "tiles" and not shape.packed
  )
  scores = m.heads // tensor * length if whole else 0
  activations = m.layers * tokens * per_token[m.remat] * size
  # Whole weights of one layer, and their gradients in float32.
  layers = layers_of(table).values()
  layer = (size + 4) * sum(math.prod(p.shape[1:]) for p in layers) // tensor
  if m.remat == "none":
    activations += m.layers * tokens * 2 * 4 * scores
  else:
    layer += tokens * (per_token["none"] * size + scores * (4 + size))
  logits = 2 * 4 * rows * min(shape.chunk, length) * m.vocab // tensor
  # Of a number of the output matrix while the head runs backward. A trained
  # one is there whole in float32, the master that every chunk of positions
  # reads, with its gradient, a sum over the chunks in float32; where products
  # are narrower, in their dtype, too, gathered and laid out once more for the
  # product. With adapters there is no gradient: the frozen one and its other
  # layout. (So the compiler held Qwen3's and Gemma 3's.)
  each = shape.frozen_size + size
  if m.lora is None:
    each = 4 + 4 + (2 * size if size < 4 else 0)
  head = each * m.vocab * m.width // tensor
  head += 2 * 4 * tokens * m.width  # what it reads and its slope, float32
  return dict(
    parameters=4 * trained + shape.frozen_size * frozen,
    gradients=4 * trained,
    optimizer=4 * shape.moments * trained,
    activations=activations,
    logits=logits,
    workspace=max(layer - logits, head),
  )


def on_host(
  m: ModelConfig,
  mesh: Any,
  shape: StepShape,
  tile: int,
  reference: bool = False,
  arms: int = 1,
) -> dict[str, int]:
  """Bytes of a CPU job's peak, above an interpreter that has started jax.

  The peak is the train step's, or that of a pass of the reference over `tile`
  rows, whichever is more.

  Args:
    m, mesh, shape: as of `train_step`; of its largest micro-batch.
    tile: rows that a device runs at once where there is no gradient.
    reference: whether its weights stay while a policy is trained whole.
    arms: trained one after the other.
  """
  own = mesh.devices.flat[0].process_index
  here = sum(d.process_index == own for d in mesh.devices.flat)
  step = train_step(m, mesh, shape)
  tokens = shape.packed or shape.rows * shape.length
  ff = (2 + m.gated) * m.ff
  if m.remat == "none":  # the compiler for CPUs keeps them twice, as measured
    local = tokens / sharding.parts(mesh, "batch")
    step["activations"] += int(4 * m.layers * local * ff)
  weights = shape.frozen_size * decoder.parameter_count(m._replace(lora=None))
  if reference and m.lora is None:
    step["reference"] = weights // here
  scores = 0 if shape.packed else 2 * m.heads * shape.length
  each = 6 * m.width + 4 * m.heads * m.head_size + 2 * ff + scores
  forward = dict(
    parameters=weights // here,
    activations=int(4 * tile * (tokens / shape.rows) * each),
    logits=8 * tile * min(shape.chunk, shape.length) * m.vocab,
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

  line, group = r"^MemAvailable:\s+(\d+) kB", r"^\d+:(.*?):(/.*)$"
  found = re.findall(line, text("/proc/meminfo"), re.MULTILINE)
  free = [int(x) * 1024 for x in found]
  groups = text("/proc/self/cgroup")
  for controllers, path in re.findall(group, groups, re.MULTILINE):
    root, names = "/sys/fs/cgroup", ("memory.max", "memory.current")
    if controllers:  # the first version of control groups
      if "memory" not in controllers.split(","):
        continue
      root += "/memory"
      names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    while True:
      most, now = (text(f"{root}{path.rstrip('/')}/{n}").strip() for n in names)
      if most.isdigit() and now.isdigit() and int(most) < 1 << 60:
        free.append(max(0, int(most) - int(now)))
      if path in ("/", ""):
        break
      path = os.path.dirname(path)
  return min(free, default=None)


def check_host(
  held: dict[str, int], free: int | None, force: bool = False
) -> str:
  """A warning where a host has less than `on_host` plans; "": enough.

  Raises:
    ConfigError: not even the weights, their gradients and moments and half of
      the estimates fit, and `force` is not set.
  """
  planned = sum(held.values())
  if free is None or planned <= free:
    return ""
  found = (
    f"this job is planned to take {size(planned)} at its peak "
    f"({words(held)}), and {size(free)} of memory are free"
  )
  helps = (
    "a smaller config.train.batch_size or a larger "
    "config.train.accumulation, config.model.remat='full', "
    "config.lora.rank"
  )
  if _certain(held, *_STATE, "reference", "libraries") > free and not force:
    raise ConfigError(f"{found}; set {helps}; --force tries anyway")
  return f"warning: {found}; {helps} take less"


def _certain(held: dict[str, int], *names: str) -> int:
  """What is certain, and half of the estimates."""
  certain = sum(held.get(n, 0) for n in names)
  return certain + (sum(held.values()) - certain) // 2


def words(held: dict[str, int]) -> str:
  """ "parameters 1.0 MiB, ...; together 3.2 MiB"."""
  each = ", ".join(f"{name} {size(count)}" for name, count in held.items())
  return f"{each}; together {size(sum(held.values()))}"


def size(count: int) -> str:
  """ "1.5 GiB", "20.0 MiB" or "3.1 KiB"."""
  for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
    if count >= unit:
      return f"{count / unit:,.1f} {name}"
  return f"{count / 2**10:,.1f} KiB"


def check_fits(held: dict[str, int], device: Any, force: bool = False) -> None:
  """Raises ConfigError where a step cannot fit a device, unless forced.

  Only what is certain counts against it: state and gradients, and half of the
  estimates (they were up to 28 % above the compiler's own).
  """
  memory = memory_of(device)
  if memory is None or _certain(held, *_STATE) <= memory or force:
    return
  raise ConfigError(
    f"training needs about {size(sum(held.values()))} a device "
    f"({words(held)}), a {device.device_kind} has {size(memory)}; "
    "raise config.mesh.fsdp or tensor (more devices), "
    "config.train.accumulation, set config.model.remat='full', a smaller "
    "config.model.head_chunk, or config.lora.rank; --force tries anyway"
  )
