"""One EM iteration of each structure: sums on the mesh, parameters on the host.

The ridge adds `ridge` times the pooled covariance to each covariance (the
pooled covariance is the identity after whitening). It is the exact M-step for
rows blurred by Gaussian noise of that covariance, whose E-step takes
ridge * tr(S_k^-1) / 2 off component k's log-density; with that term the bound
never falls.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding
from jaxalign.select import exact
from jaxalign.select.exact import HIGHEST
from jaxalign.select.gaussians import (
  constants_of,
  factors_of,
  few_threads,
  is_low_rank,
  joint_of,
  spread_of,
  State,
)

# A component's second moment is the difference of two float32 sums in the
# forms that share a product. Its error, 1e-7 of all rows' moment, may be so
# many times larger beside the component's own narrowest direction.
SHARE_LIMIT = 1000.0
# Up to this width one product gives both distances, at the price of the
# host's eigenvectors in each iteration; wider, two products cost less.
JOINT_WIDTH = 1024
# A low-rank component's own noise is at least this share of the pooled
# variance. The M-step under this bound is the unbounded one cut off there, so
# the likelihood still never falls.
NOISE = 1e-3


class Sums(NamedTuple):
  """Sums over rows about each component's present mean, float64."""

  count: np.ndarray  # [K], sum of r
  first: np.ndarray  # [K, P], sum of r y, y = z - mean
  second: np.ndarray  # [K, P, P] or [K, P], sum of r y y^T; [P, P] where tied
  cross: np.ndarray  # [K, P, q], sum of r y f^T, of low rank


# On the device: a tile's log joint [K, rows], then its sums.


def _posterior(joint, weight):
  """[K, rows] log joint -> responsibilities, [rows / ROUND] log-likelihood."""
  log_likelihood = jax.nn.logsumexp(joint, axis=0)
  r = jnp.exp(joint - log_likelihood[None]) * weight[None]
  return r, (log_likelihood * weight).reshape(-1, exact.ROUND).sum(1)


def _firsts(r, z):
  """[K, P]: a vector times a matrix for each component; never cut."""
  return jnp.stack([jnp.matmul(one, z, precision=HIGHEST) for one in r])


def _distances(u, centres, precisions):
  """[rows, Q], [K, Q], [K, Q] -> [K, rows], squared and weighted."""
  return jnp.stack(
    [
      jnp.matmul((u - m[None]) ** 2, d, precision=HIGHEST)
      for m, d in zip(centres, precisions)
    ]
  )


def _shared_tile(params, z, weight, *, second):
  """One product for all distances; the Gram of component 0 where wanted.

  A basis [K, P, P] is one for each component instead.
  """
  constants, basis, centres, precisions = params
  if basis.ndim == 2:
    u = jnp.matmul(z, basis, precision=HIGHEST)
    squared = _distances(u, centres, precisions)
  else:
    squared = jnp.concatenate(
      [
        _distances(
          jnp.matmul(z, basis[k], precision=HIGHEST),
          centres[k : k + 1],
          precisions[k : k + 1],
        )
        for k in range(len(basis))
      ]
    )
  joint = constants[:, None] - 0.5 * squared
  r, bound = _posterior(joint, weight)
  sums = dict(count=r.sum(1), first=_firsts(r, z))
  if second:
    sums["second"] = exact.gram(r[0][:, None] * z, z)
  return sums, bound


def _full_tile(params, z, weight):
  """A product and a Gram for each component, about its own mean."""
  constants, means, scale = params

  def distance(part):
    mean, one = part
    white = jnp.matmul(z - mean[None], one, precision=HIGHEST)
    return (white**2).sum(1)

  joint = constants[:, None] - 0.5 * jax.lax.map(distance, (means, scale))
  r, bound = _posterior(joint, weight)

  def moments(part):
    one, mean = part
    y = z - mean[None]
    return (
      jnp.matmul(one, y, precision=HIGHEST),
      exact.gram(one[:, None] * y, y),
    )

  first, second = jax.lax.map(moments, (r, means))
  return dict(count=r.sum(1), first=first, second=second), bound


def _diagonal_tile(params, z, weight):
  """Diagonal covariances, with loadings [K, P, q] where q is above 0."""
  constants, means, scale, low, loadings = params
  dot = functools.partial(jnp.matmul, precision=HIGHEST)

  def distance(part):
    mean, one, *rank = part
    y = z - mean[None]
    if not rank:
      return ((y * one[None]) ** 2).sum(1), None
    f = dot(y, rank[0])
    rest = y - dot(f, rank[1].T)
    return ((rest * one[None]) ** 2).sum(1) + (f**2).sum(1), f

  parts = (means, scale) + ((low, loadings) if low.shape[-1] else ())
  squared, factors = jax.lax.map(distance, parts)
  r, bound = _posterior(constants[:, None] - 0.5 * squared, weight)

  def moments(part):
    one, mean, *f = part
    y = z - mean[None]
    return (
      dot(one, y),
      dot(one, y * y),
      *(exact.product(one[:, None] * y, f[0]) for _ in f),
    )

  parts = (r, means) + ((factors,) if low.shape[-1] else ())
  names = ("first", "second", "cross")
  return dict(zip(names, jax.lax.map(moments, parts)), count=r.sum(1)), bound


def _total_tile(params, z, weight):
  """The Gram of all rows; the weights are 0 or 1."""
  del params
  return (dict(second=exact.gram(z, z)), weight.reshape(-1, exact.ROUND).sum(1))


TILES = {
  "pair": functools.partial(_shared_tile, second=True),
  "tied": functools.partial(_shared_tile, second=False),
  "full": _full_tile,
  "diagonal": _diagonal_tile,
  "total": _total_tile,
}


@functools.lru_cache(maxsize=32)
def program(mesh: jax.sharding.Mesh, kind: str) -> Callable:
  """The jitted sums of a kind of `TILES` on a mesh; compiled once a shape."""
  tile = TILES[kind]
  return exact.program(
    mesh,
    lambda params, z, weight: exact.over_tiles(
      functools.partial(tile, params), z, weight
    ),
  )


def _summed(
  mesh: jax.sharding.Mesh,
  kind: str,
  rows: exact.Rows,
  params: tuple,
  bounds: dict[str, float],
) -> tuple[dict, float]:
  """Runs a program -> (float64 sums by name, mean log-likelihood per row)."""
  params = tuple(np.asarray(a, np.float32) for a in params)
  scales = {name: exact.scale_of(bound) for name, bound in bounds.items()}
  by_leaf = dict(scales)
  if "second" in scales and kind != "diagonal":
    by_leaf["second"] = (scales["second"],) * len(
      exact.panels(rows.tiles.shape[-1])
    )
  put = lambda a: sharding.put(mesh, a, *([None] * np.ndim(a)))
  found, bound = program(mesh, kind)(
    jax.tree.map(put, params),
    jax.tree.map(put, by_leaf),
    rows.tiles,
    rows.weight,
  )
  sums = {}
  for name, scale in scales.items():
    if isinstance(by_leaf[name], tuple):
      sums[name] = exact.mirrored(
        tuple(exact.joined(pair, scale) for pair in found[name])
      )
    else:
      sums[name] = exact.joined(found[name], scale)
  used = exact.chunk_count(rows.n)  # the chunks behind are empty
  values = sharding.fetch(bound)[:used].astype(np.float64)
  return sums, float(values.sum() / rows.n)


# On the host, float64.


def seen(state: State) -> State:
  """The state with its means as float32 holds them: sums are about those."""
  return state._replace(means=np.float64(np.float32(state.means)))


def total_of(mesh: jax.sharding.Mesh, rows: exact.Rows) -> np.ndarray:
  """[P, P]: z^T z of all rows, rounded as a component's Gram is."""
  return _summed(mesh, "total", rows, (), dict(second=rows.square))[0]["second"]


def sweep(
  mesh: jax.sharding.Mesh,
  rows: exact.Rows,
  state: State,
  ridge: float,
  covariance: str,
  total: np.ndarray | None,
) -> tuple[Sums, float]:
  """Sums over all rows, and the mean bound per row.

  Args:
    mesh: as of `rows`.
    rows: whitened, centred.
    state: means as `seen` leaves them.
    ridge: >= 0.
    covariance: one of `gaussians.COVARIANCES`.
    total: of `total_of`; None computes every component's Gram by itself.
  """
  if covariance in ("diag", "low_rank"):
    return _diagonal_sweep(mesh, rows, state, ridge)
  if total is not None and covariance == "tied":
    found = _tied_sweep(mesh, rows, state, ridge, total)
    if found:
      return found
  if total is not None and covariance == "full" and len(state.means) == 2:
    found = _pair_sweep(mesh, rows, state, ridge, total)
    if found:
      return found
  f = factors_of(state)
  width = state.means.shape[1]
  constants = constants_of(state.log_weights, f.log_det, f.trace, width, ridge)
  sums, bound = _summed(
    mesh,
    "full",
    rows,
    (constants, state.means, f.scale),
    _bounds(rows, state.means),
  )
  if covariance == "tied":
    sums["second"] = sums["second"].sum(0)
  return Sums(**sums, cross=np.zeros(state.loadings.shape)), bound


def _bounds(rows: exact.Rows, means: np.ndarray) -> dict[str, float]:
  """What no chunk's sum about these means can exceed (Cauchy-Schwarz)."""
  size = rows.tiles.shape[1]
  second = 2.1 * (rows.square + size * float((means**2).max()))
  return dict(count=1.1 * size, first=(size * second) ** 0.5, second=second)


def _about(sums: dict, means: np.ndarray) -> np.ndarray:
  """[K, P]: sums of r z -> sums of r (z - mean)."""
  return sums["first"] - sums["count"][:, None] * means


def _moved(second, first, count, mean):
  """Sum of r z z^T -> sum of r y y^T, y = z - mean."""
  outer = np.outer(first, mean)
  return second - outer - outer.T + count * np.outer(mean, mean)


def _tied_sweep(mesh, rows, state, ridge, total):
  """One product; the scatter is the rest of the total. None: too narrow."""
  one = state._replace(
    covariances=state.covariances[:1], loadings=state.loadings[:1]
  )
  f = factors_of(one)
  if spread_of(f.scale[0]) > SHARE_LIMIT:
    return None
  width = state.means.shape[1]
  constants = constants_of(state.log_weights, f.log_det, f.trace, width, ridge)
  params = (
    constants,
    f.scale[0],
    state.means @ f.scale[0],
    np.ones(state.means.shape),
  )
  bounds = _bounds(rows, np.zeros((1, 1)))
  bounds.pop("second")
  sums, bound = _summed(mesh, "tied", rows, params, bounds)
  second = total
  for first, count, mean in zip(sums["first"], sums["count"], state.means):
    outer = np.outer(first, mean)
    second = second - outer - outer.T + count * np.outer(mean, mean)
  return Sums(
    sums["count"],
    _about(sums, state.means),
    second,
    np.zeros(state.loadings.shape),
  ), bound


def _pair_sweep(mesh, rows, state, ridge, total):
  """One Gram for two components, mostly one product. None: too narrow."""
  width = state.means.shape[1]
  if width <= JOINT_WIDTH:
    f = joint_of(state.covariances)
    basis, centres, precisions = f.basis, state.means @ f.basis, f.precisions
    spread = f.spread
  else:
    f = factors_of(state)
    basis, precisions = f.scale, np.ones(state.means.shape)
    centres = np.stack([m @ s for m, s in zip(state.means, f.scale)])
    spread = np.array([spread_of(s) for s in f.scale])
  narrow = spread / np.exp(state.log_weights)
  if narrow.max() > SHARE_LIMIT:
    return None
  constants = constants_of(state.log_weights, f.log_det, f.trace, width, ridge)
  # Summed by itself is the component that bears a difference less well.
  order = [1, 0] if narrow[1] > narrow[0] else [0, 1]
  params = (
    constants[order],
    basis if basis.ndim == 2 else basis[order],
    centres[order],
    precisions[order],
  )
  sums, bound = _summed(
    mesh, "pair", rows, params, _bounds(rows, np.zeros((1, 1)))
  )
  sums = {
    name: value[order] if name != "second" else value
    for name, value in sums.items()
  }
  seconds = [None, None]
  seconds[order[0]] = sums["second"]
  seconds[order[1]] = total - sums["second"]
  second = np.stack(
    [
      _moved(*each)
      for each in zip(seconds, sums["first"], sums["count"], state.means)
    ]
  )
  return Sums(
    sums["count"],
    _about(sums, state.means),
    second,
    np.zeros(state.loadings.shape),
  ), bound


def _diagonal_sweep(mesh, rows, state, ridge):
  f = factors_of(state)
  width = state.means.shape[1]
  constants = constants_of(state.log_weights, f.log_det, f.trace, width, ridge)
  bounds = _bounds(rows, state.means)
  if is_low_rank(state):
    # |f|^2 <= y^T D^-1 y, and f is no longer than its matrix times y.
    least = min(float((f.low**2).sum(1).max()), float((f.scale**2).max()))
    bounds["cross"] = bounds["second"] * max(width * least, 1e-12) ** 0.5
  sums, bound = _summed(
    mesh,
    "diagonal",
    rows,
    (constants, state.means, f.scale, f.low, state.loadings),
    bounds,
  )
  return Sums(
    sums["count"],
    sums["first"],
    sums["second"],
    sums.get("cross", np.zeros(state.loadings.shape)),
  ), bound


def m_step(sums: Sums, state: State, ridge: float, covariance: str) -> State:
  """New parameters from sums about the present means."""
  n = sums.count
  if covariance == "low_rank":
    return _m_step_low_rank(sums, state, ridge)
  shift = sums.first / n[:, None]
  if covariance == "diag":
    covariances = sums.second / n[:, None] - shift**2
    covariances = np.maximum(covariances, 0) + ridge
  else:
    outer = shift[:, :, None] * shift[:, None, :]
    if covariance == "tied":
      inner = (sums.second - np.tensordot(n, outer, 1)) / n.sum()
      covariances = np.broadcast_to(inner, outer.shape)
    else:
      covariances = sums.second / n[:, None, None] - outer
    covariances = (covariances + covariances.swapaxes(1, 2)) / 2
    covariances = covariances + ridge * np.eye(shift.shape[1])
  return State(
    np.log(n / n.sum()), state.means + shift, covariances, state.loadings
  )


def _m_step_low_rank(sums: Sums, state: State, ridge: float) -> State:
  """The M-step of a mixture of factor analysers.

  Ghahramani and Hinton 1996, with the mean as the loading of a constant
  factor: y = W f + m + noise, E[f | y] = B y with B = W^T Sigma^-1.
  Rows blurred by the ridge add count * ridge to the moments of y.
  """
  count, width, rank = sums.cross.shape
  means, noise, loadings = [], [], []
  for k in range(count):
    d, w, n = state.covariances[k], state.loadings[k], sums.count[k]
    scaled = w / d[:, None]
    inner = np.eye(rank) + w.T @ scaled
    b = np.linalg.solve(inner, scaled.T)  # [q, P]
    cross = sums.cross[k] + n * ridge * b.T
    second = sums.second[k] + n * ridge  # of the diagonal
    f = b @ sums.first[k]
    moment = n * (np.eye(rank) - b @ w) + b @ cross
    left = np.concatenate([cross, sums.first[k][:, None]], axis=1)
    right = np.block([[moment, f[:, None]], [f[None], np.array([[n]])]])
    both = np.linalg.solve(right, left.T).T  # [P, q + 1], W and m
    loadings.append(both[:, :rank])
    means.append(state.means[k] + both[:, rank])
    noise.append(np.maximum((second - (both * left).sum(1)) / n, NOISE))
  return State(
    np.log(sums.count / sums.count.sum()),
    np.stack(means),
    np.stack(noise),
    np.stack(loadings),
  )


def flops(
  n: int, width: int, components: int, covariance: str, rank: int = 0
) -> int:
  """Multiplications and additions of one iteration's products."""
  square = 2 * n * width**2
  triangle = 2 * n * sum((e - s) * (width - s) for s, e in exact.panels(width))
  if covariance == "diag":
    return 8 * components * n * width
  if covariance == "low_rank":
    return components * n * width * (8 + 6 * rank)
  if covariance == "tied":
    return square
  if components == 2:
    return (1 + (width > JOINT_WIDTH)) * square + triangle
  return components * (square + triangle)


def sweep_of(
  mesh: jax.sharding.Mesh,
  z: np.ndarray,
  ridge: float,
  covariance: str,
  share: bool = True,
) -> Callable[[State], tuple[Sums, float]]:
  """Places rows once -> sweep(state); see `sweep`.

  Args:
    share: lets two full, or all tied, components share products where that
      is accurate enough (`SHARE_LIMIT`).
  """
  rows = exact.place(mesh, z)
  total: Any = None

  def run(state: State) -> tuple[Sums, float]:
    nonlocal total
    shared = share and (
      covariance == "tied" or (covariance == "full" and len(state.means) == 2)
    )
    if shared and total is None:
      total = total_of(mesh, rows)
    with few_threads(z.shape[1]):
      return sweep(mesh, rows, state, ridge, covariance, total)

  return run
