"""The mesh and the axis rules; the only file that names a mesh axis.

Training spreads a layer's width over `fsdp` and its heads, feed-forward and
vocabulary over `tensor`. Inference (embedding, log-probabilities, generation)
is row-parallel instead: each device runs whole rows and gathers the weights of
one layer at a time, so that a row's numbers are the same bits on any mesh.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils, multihost_utils
import numpy as np

from jaxalign.core.errors import ConfigError

AXES = ("fsdp", "tensor")
RULES = {
  "batch": "fsdp",
  "pool": AXES,
  "width": "fsdp",
  "heads": "tensor",
  "ff": "tensor",
  "vocab": "tensor",
}


def make_mesh(sizes: Any, devices: Any = None) -> jax.sharding.Mesh:
  """Builds the explicit ("fsdp", "tensor") mesh.

  Args:
    sizes: mapping with `fsdp` and `tensor`; one may be -1, for what is left.
    devices: the devices to use; all of them by default.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, or the
      devices are of several TPU slices.
  """
  found = jax.devices() if devices is None else devices
  slices = {getattr(d, "slice_index", 0) for d in found}
  if len(slices) > 1:
    raise ConfigError(
      f"found {len(slices)} TPU slices; a mesh over several is "
      "out of scope: run on one, set config.mesh"
    )
  count, sizes = len(found), {axis: int(sizes[axis]) for axis in AXES}
  wanted = " x ".join(f"{a}={n}" for a, n in sizes.items())
  free = [axis for axis, n in sizes.items() if n == -1]
  known = math.prod(n for n in sizes.values() if n != -1)
  bad = any(n < 1 and n != -1 for n in sizes.values())
  if bad or len(free) > 1 or (free and count % known):
    raise ConfigError(
      f"mesh {wanted} does not divide {count} devices (one "
      "size may be -1, the rest positive); set config.mesh"
    )
  if free:
    sizes[free[0]] = count // known
  if (needed := math.prod(sizes.values())) != count:
    raise ConfigError(
      f"mesh {wanted} needs {needed} devices, found {count}; set config.mesh"
    )
  shape = tuple(sizes.values())
  try:
    return jax.make_mesh(shape, AXES, devices=devices)
  except NotImplementedError:  # the shape splits an axis of the chips' torus
    grid = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
    return jax.sharding.Mesh(
      grid, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES)
    )


def nowhere() -> jax.sharding.AbstractMesh:
  """A mesh of one part and no device, for checks before there are any."""
  return jax.sharding.AbstractMesh((1,) * len(AXES), AXES)


def spec(*axes: str | None) -> jax.P:
  """PartitionSpec of logical axes; a misspelt axis is a KeyError."""
  return jax.P(*(RULES[a] if a else None for a in axes))


def named_sharding(mesh: jax.sharding.Mesh, *axes: str | None):
  """The sharding of logical axes on a mesh."""
  return jax.sharding.NamedSharding(mesh, spec(*axes))


def put(mesh: jax.sharding.Mesh, x: np.ndarray, *axes: str | None):
  """Host array -> global array; each process copies only its own shards."""
  x = np.asarray(x)
  where = named_sharding(mesh, *axes)
  return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def put_rows(
  mesh: jax.sharding.Mesh,
  shape: tuple[int, ...],
  make: Callable[[np.ndarray], Any],
  *axes: str | None,
) -> Any:
  """Global arrays of rows, of which a process makes only its own.

  Args:
    mesh: the mesh.
    shape: of the axes in front, n rows in all: (n,), or (micro-batches, rows).
    make: `make(places)` -> a tree of host arrays, one row for each of the
      places: int [k], ascending, numbers into `shape` laid flat. It is called
      once, with the places whose shards lie on this process.
    *axes: logical axes of `shape`; what `make` adds behind is not cut.
  """
  where = named_sharding(mesh, *axes)
  place = np.arange(np.prod(shape)).reshape(shape)
  shards = where.addressable_devices_indices_map(shape).values()
  own = np.unique(np.concatenate([place[index].ravel() for index in shards]))

  def spread(x):
    def shard(index):  # a shard's places are all among `own`
      return x[np.searchsorted(own, place[index[: len(shape)]])]

    return jax.make_array_from_callback((*shape, *x.shape[1:]), where, shard)

  return jax.tree.map(spread, make(own))


def fetch(x: jax.Array) -> np.ndarray:
  """Global array -> the whole of it on every host, wherever its shards lie."""
  if x.is_fully_addressable:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def own_rows(x: jax.Array) -> np.ndarray:
  """This process's rows of a global array, by place; those of `put_rows`."""
  shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
  return np.concatenate([np.asarray(x) for _, x in sorted(shards.items())])


def total(x: int) -> int:
  """The sum of a number of each process, on all of them."""
  if jax.process_count() == 1:
    return int(x)
  return int(np.asarray(multihost_utils.process_allgather(np.int32(x))).sum())


def barrier(name: str) -> None:
  """All processes wait here; nothing with one process."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def platform() -> str:
  """ "cpu", "gpu" or "tpu": of the current mesh, which need not be here."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def parts(mesh: jax.sharding.Mesh, axis: str | None) -> int:
  """Into how many parts a logical axis is cut."""
  rule = RULES[axis] if axis else ()
  names = rule if isinstance(rule, tuple) else (rule,)
  return math.prod(mesh.shape[n] for n in names)


class Place(NamedTuple):
  """How a forward pass meets the mesh; `SPREAD` and `PER_ROW` are the two."""

  weight: Callable[..., jax.Array]  # (w, logical axes) -> w ready to multiply
  bias: Callable[..., jax.Array]  # (b, logical axes) -> b ready to add
  lookup: Callable[..., jax.Array]  # (table [V, D], ids [B, L]) -> [B, L, D]
  spec: Callable[..., Any]  # logical axes of a sum -> out_sharding, or None
  # (fn, logical axes of each argument, of the result) -> fn on local shards
  local: Callable[..., Callable[..., jax.Array]]


def _gather_width(w, axes):
  whole = spec(*(None if a == "width" else a for a in axes))
  # `reduced`: the cotangent of the gathered w is a sum still to be taken over
  # these devices. It is taken once, here, in w's own float32; otherwise each
  # product of the backward pass sums its own, in bfloat16.
  return jax.reshard(w, jax.P(*whole, reduced={RULES["width"]}))


def _gather_all(w, axes):
  for dim, axis in enumerate(axes):
    if axis:
      w = jax.lax.all_gather(w, RULES[axis], axis=dim, tiled=True)
  return w


def _on_shards(fn, in_axes, out_axes):
  # check_vma: a Pallas kernel does not say over which axes its results vary.
  return jax.shard_map(
    fn,
    in_specs=tuple(spec(*a) for a in in_axes),
    out_specs=spec(*out_axes),
    check_vma=False,
  )


# Training: rows over fsdp, heads and features over tensor.
SPREAD = Place(
  _gather_width,
  lambda b, axes: b,  # cut as the sum that it is added to
  lambda table, ids: table.at[ids].get(out_sharding=spec("batch", None, None)),
  spec,
  _on_shards,
)
# Inference, inside `per_row`: whole rows, whole weights, one layer at a time.
PER_ROW = Place(
  _gather_all,
  _gather_all,
  lambda table, ids: table[ids],
  lambda *axes: None,
  lambda fn, in_axes, out_axes: fn,
)


def per_row(mesh: jax.sharding.Mesh, fn: Callable[..., Any], params_axes: Any):
  """Maps `fn(params, rows, shared) -> rows` over devices, whole rows each.

  Every leaf of `rows` and of the result has the rows in front, divided over
  all devices of the mesh; each device runs the same program on the same
  number of rows, so a row's bits do not depend on the mesh.

  Args:
    mesh: the mesh.
    fn: takes sharded params (gather with `PER_ROW`), its rows, and whatever
      is the same for all rows.
    params_axes: logical axes of every parameter, by name.
  """

  def run(params, rows, shared):
    return jax.shard_map(
      fn,
      mesh=mesh,
      in_specs=(
        {n: spec(*a) for n, a in params_axes.items()},
        jax.tree.map(lambda _: jax.P(AXES), rows),
        jax.tree.map(lambda _: jax.P(), shared),
      ),
      out_specs=jax.P(AXES),
      check_vma=False,
    )(params, rows, shared)

  return run
