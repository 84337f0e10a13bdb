"""A model's table of parameters: shapes, axes, first values, and file names.

Init, shardings, restore, import and export all map over a table, so a model
is one function that returns one and one forward pass over its names.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding
from jaxalign.errors import ConfigError

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


def count(rows: Mapping[str, Param]) -> int:
  """Number of parameters."""
  return sum(int(np.prod(p.shape)) for p in rows.values())


def check(rows: Mapping[str, Param], mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError where an axis does not divide over the mesh."""
  for name, p in rows.items():
    for size, axis in zip(p.shape, p.axes):
      parts = sharding.parts(mesh, axis)
      if size % parts:
        raise ConfigError(
          f"{name}: its axis {axis!r} of {size} does not divide into "
          f"{parts} parts; change the model's size or config.mesh"
        )


def init(
  key: jax.Array, rows: Mapping[str, Param], mesh: jax.sharding.Mesh
) -> Params:
  """Draws the parameters in float32, each straight onto its shards."""
  out = {name: sharding.named(mesh, *p.axes) for name, p in rows.items()}

  def draw(key):
    keys = jax.random.split(key, len(rows))
    return {
      name: (
        jnp.full(p.shape, p.constant, jnp.float32)
        if p.scale == 0
        else p.scale * jax.random.normal(k, p.shape)
      )
      for k, (name, p) in zip(keys, sorted(rows.items()))
    }

  # auto_axes: the draw has no operand whose sharding could be propagated.
  return jax.jit(
    jax.sharding.auto_axes(
      draw, out_sharding={n: s.spec for n, s in out.items()}
    )
  )(key)


def abstract(
  rows: Mapping[str, Param], mesh: jax.sharding.Mesh, dtype=jnp.float32
) -> Params:
  """Shapes and shardings of the parameters, for restore and compile."""
  return {
    name: jax.ShapeDtypeStruct(
      p.shape, dtype, sharding=sharding.named(mesh, *p.axes)
    )
    for name, p in rows.items()
  }
