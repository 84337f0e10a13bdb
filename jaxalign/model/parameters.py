"""A model's table of parameters: shapes, axes, first values, and file names.

Init, shardings, restore, import and export all map over a table, so a model
is one function that returns one and one forward pass over its names.
"""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError

Params = dict[str, jax.Array]


class Param(NamedTuple):
  """One row of the parameter table."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]  # logical axes, see sharding.RULES
  scale: float  # standard deviation of the first normal draw; 0: a constant
  constant: float = 1.0  # the first value where scale is 0


class Stored(NamedTuple):
  """Where a parameter lies in a Hugging Face checkpoint.

  The stored tensor is seen as `view`, its axis `pick[0]` is indexed by
  `pick[1]` where `pick` is given (a fused query, key and value), and the axes
  that are left are transposed by `order`; that is the parameter, or one layer
  of it. A stacked parameter [T, ...] names its tensors with "{}" for the layer.
  """

  name: str
  shape: tuple[int, ...]  # of the stored tensor
  view: tuple[int, ...]  # the same elements with fused axes apart
  order: tuple[int, ...]  # our axis i is axis order[i] of what pick leaves
  pick: tuple[int, int] | None = None

  @classmethod
  def plain(cls, name: str, *shape: int) -> "Stored":
    """A tensor that is the parameter as it stands."""
    return cls(name, shape, shape, tuple(range(len(shape))))


def count(rows: Mapping[str, Param]) -> int:
  """Number of parameters."""
  return sum(math.prod(p.shape) for p in rows.values())


def layers_of(by_name: Mapping[str, Any]) -> dict[str, Any]:
  """The stacked parameters (or rows) alone, as a scan takes them."""
  return {n: x for n, x in by_name.items() if n.startswith("layers/")}


def check_mesh(rows: Mapping[str, Param], mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError where an axis does not divide over the mesh."""
  for name, p in rows.items():
    for size, axis in zip(p.shape, p.axes):
      parts = sharding.parts(mesh, axis)
      if size % parts:
        raise ConfigError(
          f"{name}: its axis {axis!r} of {size} does not divide into "
          f"{parts} parts; change the model's size or config.mesh"
        )


def init_params(
  key: jax.Array, rows: Mapping[str, Param], mesh: jax.sharding.Mesh
) -> Params:
  """Draws the parameters in float32, each straight onto its shards."""
  specs = {n: sharding.named(mesh, *p.axes).spec for n, p in rows.items()}

  def one(key, p):
    if p.scale == 0:
      return jnp.full(p.shape, p.constant, jnp.float32)
    return p.scale * jax.random.normal(key, p.shape)

  def draw(key):
    keys = jax.random.split(key, len(rows))
    return {n: one(k, p) for k, (n, p) in zip(keys, sorted(rows.items()))}

  # auto_axes: the draw has no operand whose sharding could be propagated.
  return jax.jit(jax.sharding.auto_axes(draw, out_sharding=specs))(key)


def abstract_params(
  rows: Mapping[str, Param], mesh: jax.sharding.Mesh, dtype: Any = jnp.float32
) -> Params:
  """Shapes and shardings of the parameters, for restore and compile."""

  def one(p):
    where = sharding.named(mesh, *p.axes)
    return jax.ShapeDtypeStruct(p.shape, dtype, sharding=where)

  return {name: one(p) for name, p in rows.items()}


def wide(*values: Any) -> Any:
  """The dtype of sums over `values`: float32, or float64 where one is that.

  Float64 is for tests beside a peer, under jax's x64 mode with a ModelConfig
  whose dtype is "float64"; no job runs in it, so no config may name it.
  """
  return jnp.result_type(jnp.float32, *values)
