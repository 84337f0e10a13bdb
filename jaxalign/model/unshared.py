"""Attention of tightly packed tokens, on copies with the prompt in each.

The dense layers see every token once: [prompt | chosen | rejected], pairs end
to end. For the attention call alone queries, keys and values are copied into
the ordinary layout, prompt + chosen and prompt + rejected as segments of
their own, so that any kernel and any window does; what comes out is copied
back. Both directions and both gradients are gathers: a token has two copies at
most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign.model import attention
from jaxalign.model import tiles as tiles_lib


class Unshared(NamedTuple):
  """Where the copies of S dense rows of T tokens lie.

  Beside a dense row stand a attention rows of l slots each. Indices count
  within one dense row and its a * l slots, end to end.
  """

  token: jax.Array  # [S, a, l] int32: the token in a slot, 0 in an empty one
  segment: jax.Array  # [S, a, l] int32: which sequence of the row; 0: none
  first: jax.Array  # [S, T] int32: a token's slot; of padding -1
  second: jax.Array  # [S, T] int32: a prompt token's other slot, else -1
  tiles: tiles_lib.Tiles  # for the kernel that needs no copies


class Copies(NamedTuple):
  """`Unshared` as the layers read it."""

  token: jax.Array  # [S, a * l]
  first: jax.Array  # [S, T]
  second: jax.Array  # [S, T]
  seen: attention.Seen  # [S * a, l]
  tiles: tiles_lib.Tiles
  position: jax.Array  # [S, T]


@jax.custom_vjp
def copies(
  x: jax.Array, at: jax.Array, first: jax.Array, second: jax.Array
) -> jax.Array:
  """x[at] for x [n, ...], at [m]; slots of at that nothing names get no slope.

  Args:
    x: rows to copy.
    at: the row of each copy.
    first: [n] a row's copy; -1: none.
    second: [n] its other copy; -1: none.
  """
  del first, second
  return x.at[at].get(mode="promise_in_bounds")


def _copies_forward(x, at, first, second):
  return copies(x, at, first, second), (first, second)


def _copies_backward(kept, g):
  first, second = kept
  return _chosen(g, first) + _chosen(g, second), None, None, None


copies.defvjp(_copies_forward, _copies_backward)


@jax.custom_vjp
def originals(y: jax.Array, first: jax.Array, at: jax.Array) -> jax.Array:
  """y[first], 0 where first is -1: of every row the first copy alone."""
  del at
  return _chosen(y, first)


def _originals_forward(y, first, at):
  return originals(y, first, at), (first, at)


def _originals_backward(kept, g):
  first, at = kept
  own = first[at] == jnp.arange(len(at))  # not padding, not a second copy
  return jnp.where(_beside(own, g), g[at], 0), None, None


originals.defvjp(_originals_forward, _originals_backward)


def _beside(flag, x):
  return flag.reshape(flag.shape + (1,) * (x.ndim - 1))


def _chosen(x, at):
  """x[at], 0 where at is negative."""
  found = x.at[jnp.maximum(at, 0)].get(mode="promise_in_bounds")
  return jnp.where(_beside(at >= 0, found), found, 0)


def by_row(fn, x: jax.Array, *index: jax.Array) -> jax.Array:
  """`fn` on every dense row: x [S, n, ...], index [S, m] each, as `fn` is
  `copies` or `originals`."""
  return (
    jax.vmap(fn)(x, *index)
    if len(x) > 1
    else fn(x[0], *(i[0] for i in index))[None]
  )


def _axes(x):
  """Logical axes of queries, keys or values."""
  return "batch", None, "heads", *[None] * (x.ndim - 3)


def take(
  x: jax.Array,
  at: jax.Array,
  first: jax.Array,
  second: jax.Array,
  place: sharding.Place,
) -> jax.Array:
  """`copies` of hidden states x [S, T, D], on each device's own rows."""
  one, rows = ("batch", None), ("batch", None, None)
  return place.local(
    lambda *args: by_row(copies, *args), [rows, one, one, one], rows
  )(x, at, first, second)


def lay(where: Unshared, position: jax.Array, place: sharding.Place) -> Copies:
  """Positions and segments of the attention rows, once for all layers.

  Args:
    where: the copies.
    position: [S, T] int32, of the tokens.
    place: as of `attend`.
  """
  s, a, l = where.token.shape
  token = _shaped(where.token, (s, a * l))
  at = place.local(
    lambda x, token: jnp.take_along_axis(x, token, axis=1),
    [("batch", None)] * 2,
    ("batch", None),
  )(position, token)
  at = _shaped(at, (s * a, l))
  segment = _shaped(where.segment, (s * a, l))
  return Copies(
    token,
    where.first,
    where.second,
    attention.Seen(at, at, segment, segment),
    where.tiles,
    position,
  )


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  where: Copies,
  *,
  kernel: str,
  place: sharding.Place,
  **how,
) -> jax.Array:
  """`attention.attend` of packed tokens.

  Args:
    q: [S, T, G, Q, C].
    k: [S, T, G, C].
    v: [S, T, G, C].
    where: as from `lay`.
    kernel: a key of attention.KERNELS; "tiles" makes no copies.
    place: `sharding.SPREAD`, under jit on the mesh.
    **how: the other arguments of `attention.attend`.

  Returns:
    [S, T, G, Q, C]; of a prompt token what its first copy saw (the second saw
    the same), of padding 0.
  """
  if kernel == "tiles":
    return tiles_lib.attend(
      q, k, v, where.tiles, where.position, place=place, **how
    )
  token, first, second, seen = where[:4]
  flat, (rows, l) = ("batch", None), seen.q_position.shape

  def spread(x):
    axes = _axes(x)
    y = place.local(
      lambda *args: by_row(copies, *args), [axes, flat, flat, flat], axes
    )(x, token, first, second)
    return _shaped(y, (rows, l, *x.shape[2:]))

  y = attention.attend(
    spread(q), spread(k), spread(v), seen, place=place, kernel=kernel, **how
  )
  y = _shaped(y, (len(token), -1, *y.shape[2:]))
  return place.local(
    lambda *args: by_row(originals, *args), [_axes(y), flat, flat], _axes(y)
  )(y, first, token)


def _shaped(x, shape):
  """Reshapes the rows and slots in front; what lies behind keeps its place."""
  spec = tuple(jax.typeof(x).sharding.spec)
  behind = spec[2:] if x.ndim == len(shape) and x.ndim > 2 else ()
  return jnp.reshape(
    x,
    shape,
    out_sharding=jax.P(
      spec[0], *(None,) * (len(shape) - 1 - len(behind)), *behind
    ),
  )
