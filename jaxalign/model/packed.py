"""Attention of tightly packed tokens: [prompt | chosen | rejected], end to end.

The dense layers see every token once. For attention there are two ways.
Copies, for any kernel and any window: queries, keys and values are copied into
the ordinary layout, prompt + chosen and prompt + rejected as segments of their
own, and the result is copied back; both directions and both gradients are
gathers, since a token has two copies at most.
Tiles, where there is no fused kernel, on a CPU: a query of an answer sees its
prompt and its own answer, so most tiles of the square [T, T] are empty. The
others are listed on the host; a loop over them keeps a running softmax (Milakov
and Gimelshein 2018; Dao et al. 2022), so that no scores are held and the
prompt's are computed once. The loop's length is data, no shape depends on it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.core import sharding
from jaxalign.model import attention
from jaxalign.model.attention import Attention, FAR, Seen
from jaxalign.model.parameters import wide

TILE = 64  # tokens a side
LOW = -1e30  # a score of a key that is not seen


class Tiles(NamedTuple):
  """Who sees whom in S dense rows of T tokens, T a multiple of TILE."""

  row: jax.Array  # [S, T] int32: the pair of a token, 0 for padding
  branch: jax.Array  # [S, T] int32: 0 in the prompt, else the response
  query: jax.Array  # [S, n] int32: tiles, by query block
  key: jax.Array  # [S, n] int32: the key block of each
  count: jax.Array  # [S, 1] int32: how many there are


class Copies(NamedTuple):
  """Where the copies of S dense rows of T tokens lie.

  A dense row has a attention rows of l slots each. Indices count within one
  dense row and its a * l slots, end to end.
  """

  token: jax.Array  # [S, a, l] int32: the token in a slot, 0 in an empty one
  segment: jax.Array  # [S, a, l] int32: which sequence of the row; 0: none
  first: jax.Array  # [S, T] int32: a token's slot; of padding -1
  second: jax.Array  # [S, T] int32: a prompt token's other slot, else -1
  tiles: Tiles  # for the kernel that needs no copies


class PackedSeen(NamedTuple):
  """`Copies` as the layers read them, made once for all by `see_packed`."""

  token: jax.Array  # [S, a * l]
  first: jax.Array  # [S, T]
  second: jax.Array  # [S, T]
  seen: Seen  # [S * a, l]
  tiles: Tiles
  position: jax.Array  # [S, T]


def _flag(flag, x):
  """[n] with as many axes as x [n, ...]."""
  return flag.reshape(flag.shape + (1,) * (x.ndim - 1))


def _picked(x, at):
  """x[at], 0 where at is negative."""
  found = x.at[jnp.maximum(at, 0)].get(mode="promise_in_bounds")
  return jnp.where(_flag(at >= 0, found), found, 0)


@jax.custom_vjp
def copy_out(
  x: jax.Array, at: jax.Array, first: jax.Array, second: jax.Array
) -> jax.Array:
  """x[at] for x [n, ...], at [m]; slots of at that nothing names get no slope.

  Row i of x has its copies at slots first[i] and second[i]; -1: none.
  """
  del first, second
  return x.at[at].get(mode="promise_in_bounds")


def _copy_out_backward(kept, g):
  first, second = kept
  return _picked(g, first) + _picked(g, second), None, None, None


copy_out.defvjp(lambda *args: (copy_out(*args), args[2:]), _copy_out_backward)


@jax.custom_vjp
def copy_back(y: jax.Array, first: jax.Array, at: jax.Array) -> jax.Array:
  """y[first], 0 where first is -1: of every row the first copy alone."""
  del at
  return _picked(y, first)


def _copy_back_backward(kept, g):
  first, at = kept
  own = first[at] == jnp.arange(len(at))  # not padding, not a second copy
  return jnp.where(_flag(own, g), g[at], 0), None, None


copy_back.defvjp(
  lambda *args: (copy_back(*args), args[1:]), _copy_back_backward
)


def _by_row(fn, place, axes, x, *index):
  """`fn` on every dense row of a device: x [S, n, ...], index [S, m] each."""

  def local(x, *index):
    if len(x) > 1:
      return jax.vmap(fn)(x, *index)
    return fn(x[0], *(i[0] for i in index))[None]

  flat = [("batch", None)] * len(index)
  return place.local(local, [axes, *flat], axes)(x, *index)


def take(
  x: jax.Array,
  at: jax.Array,
  first: jax.Array,
  second: jax.Array,
  place: sharding.Place,
) -> jax.Array:
  """`copy_out` of hidden states x [S, T, D], on each device's own rows."""
  axes = ("batch", None, None)
  return _by_row(copy_out, place, axes, x, at, first, second)


def see_packed(
  copies: Copies, position: jax.Array, place: sharding.Place
) -> PackedSeen:
  """Positions and segments of the attention rows, once for all layers.

  `position` [S, T] int32 is of the tokens.
  """
  s, a, l = copies.token.shape
  token, flat = _shaped(copies.token, (s, a * l)), ("batch", None)
  pick = lambda x, token: jnp.take_along_axis(x, token, axis=1)
  at = place.local(pick, [flat] * 2, flat)(position, token)
  at = _shaped(at, (s * a, l))
  segment = _shaped(copies.segment, (s * a, l))
  seen = Seen(at, at, segment, segment)
  first, second = copies.first, copies.second
  return PackedSeen(token, first, second, seen, copies.tiles, position)


def attend_packed(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  packed: PackedSeen,
  spec: Attention,
  kind: jax.Array | None,
  place: sharding.Place,
) -> jax.Array:
  """`attention.attend` of packed tokens.

  Args:
    q: [S, T, G, Q, C]; k and v [S, T, G, C].
    packed: as from `see_packed`.
    spec, kind: as of `attention.attend`; the kernel "tiles" makes no copies.
    place: `sharding.SPREAD`, under jit on the mesh.

  Returns:
    [S, T, G, Q, C]; of a prompt token the value of its first copy (the second's
    is the same), of padding 0 (or, of tiles, any finite value).
  """
  if spec.kernel == "tiles":
    return _attend_tiles(q, k, v, packed, spec, kind, place)
  token, first, second, seen = packed[:4]
  rows, l = seen.q_position.shape
  axes = lambda x: ("batch", None, "heads", *[None] * (x.ndim - 3))

  def spread(x):
    y = _by_row(copy_out, place, axes(x), x, token, first, second)
    return _shaped(y, (rows, l, *x.shape[2:]))

  q, k, v = spread(q), spread(k), spread(v)
  y = attention.attend(q, k, v, seen, spec, kind, place)
  y = _shaped(y, (len(token), -1, *y.shape[2:]))
  return _by_row(copy_back, place, axes(y), y, first, token)


def _shaped(x, shape):
  """Reshapes the rows and slots in front; what lies behind keeps its place."""
  spec = tuple(jax.typeof(x).sharding.spec)
  behind = spec[2:] if x.ndim == len(shape) and x.ndim > 2 else ()
  front = (None,) * (len(shape) - 1 - len(behind))
  return jnp.reshape(x, shape, out_sharding=jax.P(spec[0], *front, *behind))


def _tile(x, i):
  """[..., T, C] -> [..., TILE, C]; or [T] -> [TILE]."""
  axis = max(x.ndim - 2, 0)
  return jax.lax.dynamic_slice_in_dim(x, i * TILE, TILE, axis)


def _write(x, y, i, add=False):
  if add:
    y = y + _tile(x, i)
  y = y.astype(x.dtype)
  return jax.lax.dynamic_update_slice_in_dim(x, y, i * TILE, x.ndim - 2)


def _scores(q, k, i, j, who, spec):
  """Capped scores [G, Q, TILE, TILE] float32, LOW where nothing is seen."""
  row, branch, position, window = who
  s = spec.scale * jnp.einsum(
    "gqlc,gsc->gqls", q, k, preferred_element_type=wide(q)
  )
  if spec.softcap:
    s = spec.softcap * jnp.tanh(s / spec.softcap)
  at = lambda x: (_tile(x, i)[:, None], _tile(x, j)[None, :])
  (row_q, row_k), (own, other), (here, there) = map(at, (row, branch, position))
  distance = here - there
  same = (row_q == row_k) & ((other == 0) | (other == own))
  seen = same & (distance >= 0) & (distance < window)
  return jnp.where(seen[None, None], s, LOW)


def _tiles_forward(q, k, v, who, tiles, spec):
  """(y like q float32, logsumexp [G, Q, T, 1]) of q [G, Q, T, C]."""
  first, second, count = tiles

  def one(t, carry):
    y, lse, top, total, sums = carry
    i, j = first[t], second[t]
    fresh = jnp.where((t == 0) | (i != first[jnp.maximum(t - 1, 0)]), 0.0, 1.0)
    s = _scores(_tile(q, i), _tile(k, j), i, j, who, spec)
    top = jnp.where(fresh > 0, top, LOW)
    new = jnp.maximum(top, jnp.max(s, -1, keepdims=True))
    p, kept = jnp.exp(s - new), fresh * jnp.exp(top - new)
    total = kept * total + jnp.sum(p, -1, keepdims=True)
    p, vj = p.astype(v.dtype), _tile(v, j)
    more = jnp.einsum("gqls,gsc->gqlc", p, vj, preferred_element_type=wide(q))
    sums = kept * sums + more
    y = _write(y, sums / total, i)
    return y, _write(lse, new + jnp.log(total), i), new, total, sums

  zeros = lambda *shape: jnp.zeros((*q.shape[:2], *shape), wide(q))
  t, c = q.shape[2:]
  one_tile = zeros(TILE, 1), zeros(TILE, 1), zeros(TILE, c)
  start = zeros(t, c), zeros(t, 1), *one_tile
  y, lse, *_ = jax.lax.fori_loop(0, count, one, start)
  return y, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _over_tiles(q, k, v, who, tiles, spec):
  return _tiles_forward(q, k, v, who, tiles, spec)[0].astype(v.dtype)


def _over_tiles_forward(q, k, v, who, tiles, spec):
  y, lse = _tiles_forward(q, k, v, who, tiles, spec)
  return y.astype(v.dtype), (q, k, v, who, tiles, y.astype(v.dtype), lse)


def _over_tiles_backward(spec, kept, g):
  q, k, v, who, tiles, y, lse = kept
  first, second, count = tiles
  delta = jnp.sum(g.astype(wide(q)) * y, -1, keepdims=True)
  product = functools.partial(jnp.einsum, preferred_element_type=wide(q))

  def one(t, carry):
    dq, dk, dv = carry
    i, j = first[t], second[t]
    qi, kj, vj, gi = _tile(q, i), _tile(k, j), _tile(v, j), _tile(g, i)
    s = _scores(qi, kj, i, j, who, spec)
    p = jnp.exp(s - _tile(lse, i))
    dp = product("gqlc,gsc->gqls", gi, vj)
    ds = p * (dp - _tile(delta, i))
    if spec.softcap:
      ds = jnp.where(s > LOW, ds * (1 - (s / spec.softcap) ** 2), 0.0)
    ds, p = (spec.scale * ds).astype(q.dtype), p.astype(v.dtype)
    dq = _write(dq, product("gqls,gsc->gqlc", ds, kj), i, add=True)
    dk = _write(dk, product("gqls,gqlc->gsc", ds, qi), j, add=True)
    dv = _write(dv, product("gqls,gqlc->gsc", p, gi), j, add=True)
    return dq, dk, dv

  zeros = tuple(jnp.zeros(x.shape, wide(q)) for x in (q, k, v))
  slopes = jax.lax.fori_loop(0, count, one, zeros)
  return *(d.astype(x.dtype) for d, x in zip(slopes, (q, k, v))), None, None


_over_tiles.defvjp(_over_tiles_forward, _over_tiles_backward)


def _attend_tiles(q, k, v, packed, spec, kind, place):
  """Attention of packed tokens, on each device's own rows and heads."""
  window = attention.window_of(spec, kind)
  window = jnp.asarray(window or FAR if kind is None else window)

  def one(q, k, v, position, row, branch, *tiles, window):
    query, key, count = tiles
    y = _over_tiles(
      jnp.moveaxis(q, 0, 2),
      jnp.moveaxis(k, 0, 1),
      jnp.moveaxis(v, 0, 1),
      (row, branch, position, window),
      (query, key, count[0]),
      spec,
    )
    return jnp.moveaxis(y, 2, 0)

  def local(window, *rows):
    dense = range(len(rows[0]))
    return jnp.stack([one(*(x[s] for x in rows), window=window) for s in dense])

  queries = ("batch", None, "heads", None, None)
  axes = [(), queries, queries[:4], queries[:4], *[("batch", None)] * 6]
  args = window, q, k, v, packed.position, *packed.tiles
  return place.local(local, axes, queries)(*args)
