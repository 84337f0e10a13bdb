"""Attention of packed tokens tile by tile, where no fused kernel is: on a CPU.

A query of an answer sees its prompt and its own answer, so most tiles of the
square [T, T] are empty. The others are listed on the host; a loop goes over
them and keeps a running softmax (Milakov and Gimelshein 2018; Dao et al. 2022),
so that no scores are held and the prompt's are computed once. The loop's length
is data: no shape is compiled for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign.model.wide import wide

TILE = 64  # tokens a side
LOW = -1e30  # a score of a key that is not seen


class Tiles(NamedTuple):
  """Who sees whom in S dense rows of T tokens, T a multiple of TILE."""

  row: jax.Array  # [S, T] int32: the pair of a token, 0 for padding
  branch: jax.Array  # [S, T] int32: 0 in the prompt, else the response
  query: jax.Array  # [S, n] int32: tiles, by query block
  key: jax.Array  # [S, n] int32: the key block of each
  count: jax.Array  # [S, 1] int32: how many there are


class _How(NamedTuple):
  """What does not change over the tiles."""

  scale: float
  softcap: float


def _block(x, i):
  """[..., T, C] -> [..., TILE, C]; or [T] -> [TILE]."""
  axis = max(x.ndim - 2, 0)
  return jax.lax.dynamic_slice_in_dim(x, i * TILE, TILE, axis)


def _write(x, y, i, add=False):
  axis = x.ndim - 2
  if add:
    y = y + _block(x, i)
  return jax.lax.dynamic_update_slice_in_dim(
    x, y.astype(x.dtype), i * TILE, axis
  )


def _scores(q, k, i, j, who, how):
  """Capped scores [G, Q, TILE, TILE] float32, LOW where nothing is seen."""
  row, branch, position, window = who
  s = how.scale * jnp.einsum(
    "gqlc,gsc->gqls", q, k, preferred_element_type=wide(q)
  )
  if how.softcap:
    s = how.softcap * jnp.tanh(s / how.softcap)
  at = lambda x: (_block(x, i)[:, None], _block(x, j)[None, :])
  (row_q, row_k), (own, other), (here, there) = map(at, (row, branch, position))
  distance = here - there
  seen = (
    (row_q == row_k)
    & ((other == 0) | (other == own))
    & (distance >= 0)
    & (distance < window)
  )
  return jnp.where(seen[None, None], s, LOW)


def _forward(q, k, v, who, tiles, how):
  """(y like q float32, logsumexp [G, Q, T, 1]) of q [G, Q, T, C]."""
  first, second, count = tiles

  def one(t, carry):
    y, lse, top, total, sums = carry
    i, j = first[t], second[t]
    fresh = jnp.where((t == 0) | (i != first[jnp.maximum(t - 1, 0)]), 0.0, 1.0)
    s = _scores(_block(q, i), _block(k, j), i, j, who, how)
    top = jnp.where(fresh > 0, top, LOW)
    new = jnp.maximum(top, jnp.max(s, -1, keepdims=True))
    p, kept = jnp.exp(s - new), fresh * jnp.exp(top - new)
    total = kept * total + jnp.sum(p, -1, keepdims=True)
    sums = kept * sums + jnp.einsum(
      "gqls,gsc->gqlc",
      p.astype(v.dtype),
      _block(v, j),
      preferred_element_type=wide(q),
    )
    return (
      _write(y, sums / total, i),
      _write(lse, new + jnp.log(total), i),
      new,
      total,
      sums,
    )

  zeros = jnp.zeros((*q.shape[:2], TILE, 1), wide(q))
  y, lse, *_ = jax.lax.fori_loop(
    0,
    count,
    one,
    (
      jnp.zeros(q.shape, wide(q)),
      jnp.zeros((*q.shape[:3], 1), wide(q)),
      zeros,
      zeros,
      jnp.zeros((*q.shape[:2], TILE, q.shape[3]), wide(q)),
    ),
  )
  return y, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, who, tiles, how):
  return _forward(q, k, v, who, tiles, how)[0].astype(v.dtype)


def _attend_forward(q, k, v, who, tiles, how):
  y, lse = _forward(q, k, v, who, tiles, how)
  return y.astype(v.dtype), (q, k, v, who, tiles, y.astype(v.dtype), lse)


def _attend_backward(how, kept, g):
  q, k, v, who, tiles, y, lse = kept
  first, second, count = tiles
  delta = jnp.sum(g.astype(wide(q)) * y, -1, keepdims=True)

  def one(t, carry):
    dq, dk, dv = carry
    i, j = first[t], second[t]
    qi, kj, vj, gi = _block(q, i), _block(k, j), _block(v, j), _block(g, i)
    s = _scores(qi, kj, i, j, who, how)
    p = jnp.exp(s - _block(lse, i))
    dp = jnp.einsum("gqlc,gsc->gqls", gi, vj, preferred_element_type=wide(q))
    ds = p * (dp - _block(delta, i))
    if how.softcap:
      ds = jnp.where(s > LOW, ds * (1 - (s / how.softcap) ** 2), 0.0)
    ds = (how.scale * ds).astype(q.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=wide(q))
    dq = _write(dq, product("gqls,gsc->gqlc", ds, kj), i, add=True)
    dk = _write(dk, product("gqls,gqlc->gsc", ds, qi), j, add=True)
    dv = _write(
      dv, product("gqls,gqlc->gsc", p.astype(v.dtype), gi), j, add=True
    )
    return dq, dk, dv

  zeros = tuple(jnp.zeros(x.shape, wide(q)) for x in (q, k, v))
  slopes = jax.lax.fori_loop(0, count, one, zeros)
  return *(d.astype(x.dtype) for d, x in zip(slopes, (q, k, v))), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  tiles: Tiles,
  position: jax.Array,
  *,
  scale: float,
  softcap: float,
  windows: tuple[int, ...],
  which: jax.Array | None,
  place: sharding.Place,
) -> jax.Array:
  """Attention of packed tokens, on each device's own rows and heads.

  Args:
    q: [S, T, G, Q, C].
    k: [S, T, G, C].
    v: [S, T, G, C].
    tiles: who sees whom.
    position: [S, T] int32, in the sequence.
    scale, softcap, windows, which, place: as of `attention.attend`.

  Returns:
    [S, T, G, Q, C] in v's dtype; of padding any finite value.
  """
  reach = jnp.asarray([w or 2**30 for w in windows])
  window = reach[0] if which is None else reach[which]
  how = _How(scale, softcap)

  def local(q, k, v, position, row, branch, query, key, count, window):
    def one(q, k, v, position, row, branch, query, key, count):
      y = _attend(
        jnp.moveaxis(q, 0, 2),
        jnp.moveaxis(k, 0, 1),
        jnp.moveaxis(v, 0, 1),
        (row, branch, position, window),
        (query, key, count[0]),
        how,
      )
      return jnp.moveaxis(y, 2, 0)

    rows = (q, k, v, position, row, branch, query, key, count)
    return jnp.stack([one(*(x[s] for x in rows)) for s in range(len(q))])

  heads, flat = ("batch", None, "heads", None), ("batch", None)
  return place.local(
    local, [(*heads, None), heads, heads, *[flat] * 6, ()], (*heads, None)
  )(q, k, v, position, *tiles, window)
