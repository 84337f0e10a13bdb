"""The log-likelihood of rows given in tiles, float32 on the mesh.

For pools that do not fit: the mixture is fitted on a reservoir, and every row
is scored in one pass. `mixture.log_likelihood` is the float64 form.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding
from jaxalign.errors import ConfigError
from jaxalign.select import gaussians
from jaxalign.select.exact import HIGHEST
from jaxalign.select.gaussians import State

# Rows of one product; fixed, so that a row's bits do not follow the mesh.
BLOCK = 256
BLOCK_ACCELERATOR = 1024  # keeps the factors on the chip while they are used


def _is_scaling(matrix: np.ndarray) -> bool:
  """Whether a projection only scales axes (pca=0 with diag, low_rank)."""
  return (
    matrix.shape[0] == matrix.shape[1]
    and np.count_nonzero(matrix) == len(matrix)
    and (np.diagonal(matrix) != 0).all()
  )


def params_of(mixture: Any) -> dict[str, np.ndarray]:
  """A mixture as float32 arrays that read rows before any projection.

  joint_k = constant_k - sum((u - centre_k)^2 precision_k) / 2, u = (x - mean)
  basis, with one basis for all components or one for each; of low rank as
  `gaussians.Factors` has it. Products of matrices are taken in float64, here.
  """
  state = State(
    mixture.log_weights, mixture.means, mixture.covariances, mixture.loadings
  )
  mean = np.float32(mixture.mean)
  # What rounding the mean moves is put into the centres.
  rest = (mixture.mean - np.float64(mean)) @ mixture.projection
  means = state.means + rest
  width = means.shape[1]
  volume = 0.5 * np.log(mixture.variances).sum()
  full = state.covariances.ndim == 3
  out: dict[str, Any] = dict(mean=mean)
  if (
    full
    and len(means) == 2
    and not (state.covariances[0] == state.covariances[1]).all()
  ):
    joint = gaussians.joint_of(state.covariances)
    log_det, basis = joint.log_det, joint.basis
    out |= dict(
      basis=mixture.projection @ basis,
      centres=means @ basis,
      precisions=joint.precisions,
    )
  elif full:
    tied = (state.covariances == state.covariances[:1]).all()
    few = (
      state._replace(
        covariances=state.covariances[:1], loadings=state.loadings[:1]
      )
      if tied
      else state
    )
    f = gaussians.factors_of(few)
    log_det = f.log_det
    if tied:
      out |= dict(
        basis=mixture.projection @ f.scale[0],
        centres=means @ f.scale[0],
        precisions=np.ones(means.shape),
      )
    else:
      out |= dict(
        bases=mixture.projection @ f.scale,
        centres=np.einsum("kp,kpq->kq", means, f.scale),
      )
  else:
    f = gaussians.factors_of(state)
    log_det = f.log_det
    flat = _is_scaling(mixture.projection)
    out |= {
      "axes" if flat else "basis": np.diagonal(mixture.projection)
      if flat
      else mixture.projection
    }
    out |= dict(centres=means, precisions=f.scale**2)
    if f.low.shape[-1]:
      out |= dict(low=f.low, loadings=state.loadings)
  constants = (
    gaussians.constants_of(state.log_weights, log_det, np.zeros(1), width, 0.0)
    - volume
  )
  out["constants"] = np.broadcast_to(constants, (len(means),))
  return {name: np.asarray(a, np.float32) for name, a in out.items()}


def log_likelihood_tile(
  params: dict[str, jax.Array], x: jax.Array
) -> jax.Array:
  """[rows, E], any float type -> [rows] float32, nats; see `params_of`."""
  x = x.astype(jnp.float32) - params["mean"][None]
  dot = lambda a, b: jnp.matmul(a, b, precision=HIGHEST)
  centres = params["centres"]
  if "bases" in params:
    squared = jax.lax.map(
      lambda part: ((dot(x, part[0]) - part[1][None]) ** 2).sum(1),
      (params["bases"], centres),
    )
  else:
    u = (
      x * params["axes"][None] if "axes" in params else dot(x, params["basis"])
    )
    squared = []
    for k in range(len(centres)):
      y, factor = u - centres[k][None], None
      if "low" in params:
        factor = dot(y, params["low"][k])
        y = y - dot(factor, params["loadings"][k].T)
      squared.append(dot(y**2, params["precisions"][k]))
      if factor is not None:
        squared[k] += (factor**2).sum(1)
    squared = jnp.stack(squared)
  return jax.nn.logsumexp(params["constants"][:, None] - 0.5 * squared, axis=0)


def scoring(mesh: jax.sharding.Mesh) -> Callable:
  """Jitted (params, tile [T, E] over "pool") -> [T] over "pool"."""
  block = BLOCK if mesh.devices.flat[0].platform == "cpu" else BLOCK_ACCELERATOR

  def local(params, x):
    # Two blocks at least: XLA may fuse what it unrolls otherwise.
    count = max(2, -(-x.shape[0] // block))
    padded = jnp.pad(x, ((0, count * block - x.shape[0]), (0, 0)))
    out = jax.lax.map(
      lambda rows: log_likelihood_tile(params, rows),
      padded.reshape(count, block, x.shape[1]),
    )
    return out.reshape(-1)[: x.shape[0]]

  rows = sharding.spec("pool")
  return jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(jax.P(), rows),
      out_specs=rows,
      check_vma=False,
    )
  )


def make_scorer(
  mesh: jax.sharding.Mesh, mixture: Any
) -> Callable[[jax.Array], jax.Array]:
  """Scores rows tile by tile with the parameters fixed.

  Args:
    mesh: of the tiles.
    mixture: of `mixture.fit`.

  Returns:
    fn(tile [T, E] float32 or bfloat16, its rows over "pool") -> [T] float32
    log-likelihood, nats, over "pool". T is a multiple of the devices; a tile
    of another T compiles again. A row's bits depend on nothing but the row.
    Rows that are not finite score NaN.
  """
  params = jax.tree.map(
    lambda a: sharding.put(mesh, a, *([None] * a.ndim)), params_of(mixture)
  )
  run = scoring(mesh)

  def score(tile: jax.Array) -> jax.Array:
    if (
      tile.ndim != 2
      or tile.shape[1] != mixture.mean.size
      or (tile.shape[0] % mesh.size)
    ):
      raise ConfigError(
        f"a tile has shape {tile.shape}, wanted rows [T, "
        f"{mixture.mean.size}], T a multiple of the "
        f"{mesh.size} devices"
      )
    return run(params, tile)

  return score
