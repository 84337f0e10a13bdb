"""A model's table of parameters: shapes, axes, first values, and file names.

Init, shardings, restore, import and export all map over a table, so a model
is one function that returns one and one forward pass over its names.
"""

from collections.abc import Callable, Mapping
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

  @classmethod
  def flat(cls, name: str, *view: int) -> "Stored":
    """A tensor of one axis that has several here."""
    return cls(name, (math.prod(view),), view, tuple(range(len(view))))

  @classmethod
  def linear(cls, name: str, shape: tuple[int, ...], inputs: int) -> "Stored":
    """A matrix [out, in], ours of `shape` with `inputs` input axes in front."""
    into, out = shape[:inputs], shape[inputs:]
    order = (*range(len(out), len(shape)), *range(len(out)))
    return cls(name, (math.prod(out), math.prod(into)), (*out, *into), order)


class Layout(NamedTuple):
  """A model's parameters, and how a Hugging Face checkpoint holds them."""

  rows: Mapping[str, Param]
  stored: Mapping[str, Stored]
  # a file's name of a tensor -> the name in `stored`; None: knowingly not read
  rename: Callable[[str], str | None] = lambda name: name


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
      if size % (parts := sharding.parts(mesh, axis)):
        raise ConfigError(
          f"{name}: its axis {axis!r} of {size} does not divide into "
          f"{parts} parts; change the model's size or config.mesh"
        )


def normal(key: jax.Array, p: Param) -> jax.Array:
  """The first values of one parameter, float32."""
  if p.scale == 0:
    return jnp.full(p.shape, p.constant, jnp.float32)
  return p.scale * jax.random.normal(key, p.shape)


def init_params(
  key: jax.Array,
  rows: Mapping[str, Param],
  draw: Callable[[jax.Array, Param], jax.Array] = normal,
) -> Params:
  """Draws every row with a key of its own, straight onto the current mesh."""
  specs = {n: sharding.spec(*p.axes) for n, p in rows.items()}

  def run(key):
    keys = jax.random.split(key, len(rows))
    return {n: draw(k, p) for k, (n, p) in zip(keys, sorted(rows.items()))}

  # auto_axes: the draw has no operand whose sharding could be propagated.
  return jax.jit(jax.sharding.auto_axes(run, out_sharding=specs))(key)


def abstract_params(
  rows: Mapping[str, Param], mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and shardings of float32 parameters, for restore and compile."""
  place = {n: sharding.named_sharding(mesh, *p.axes) for n, p in rows.items()}
  return {
    n: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=place[n])
    for n, p in rows.items()
  }


def by_row(mesh: jax.sharding.Mesh, rows: Mapping[str, Param], fn: Callable):
  """Jits `fn(params, rows, shared) -> rows`, see `sharding.per_row`."""
  axes = {n: p.axes for n, p in rows.items()}
  return jax.jit(sharding.per_row(mesh, fn, axes))


def wide(*values: Any) -> Any:
  """The dtype of sums over `values`: float32, or float64 where one is that.

  Float64 is for comparisons with a peer, under jax's x64 mode with a
  ModelConfig whose dtype is "float64"; no config may name it.
  """
  return jnp.result_type(jnp.float32, *values)
