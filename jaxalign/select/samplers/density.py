"""Inverse-propensity sampling: rows of thin regions are kept more often."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.errors import NumericError
from jaxalign.select.chunks import by_chunk, by_row, less, ordered_sum, place
from jaxalign.select.costs import ID_BYTES, Sizes, Work
from jaxalign.select.pool import needs
from jaxalign.select.samplers.values import is_count, ranked, require
from jaxalign.select.samplers.vectors import (
  refuse_above,
  refuse_long,
  vectors,
  width_of,
)
from jaxalign.select.topk import gumbel, uniform

EXACT_ROWS = 200_000  # N^2 kernels are computed up to here
_TOGETHER = 256  # rows compared with all others at once, where exact
_HIGHEST = jax.lax.Precision.HIGHEST


def median_distance(x: np.ndarray, ids: np.ndarray) -> float:
  """The median distance between 512 rows, chosen by a hash of their ids."""
  some = np.argsort(uniform(0, ids, "bandwidth"), kind="stable")[:512]
  sample = np.float64(x[np.sort(some)])
  sample -= sample.mean(axis=0)
  square = (sample**2).sum(1)
  distance = square[:, None] + square[None] - 2 * sample @ sample.T
  upper = distance[np.triu_indices(len(sample), 1)]
  median = math.sqrt(max(0.0, np.median(upper))) if upper.size else 0.0
  if not median > 1e-6 * math.sqrt(max(square.max(), 1e-60)):
    raise NumericError(
      "half of the distances between rows are 0: no bandwidth can be read off "
      "them; set config.select.kwargs.bandwidth, or look at the embedding"
    )
  return median


def check_bandwidth(
  bandwidth: float | str, x: np.ndarray, ids: np.ndarray
) -> float:
  """A number above 0; "median" is the median distance between 512 rows."""
  if bandwidth == "median":
    bandwidth = median_distance(x, ids)
  holds = not isinstance(bandwidth, (str, bool)) and 0 < bandwidth < np.inf
  require(holds, "bandwidth", bandwidth, "'median' or a number above 0")
  return float(bandwidth)


def frequencies(
  seed: int, width: int, features: int, bandwidth: float
) -> np.ndarray:
  """[features, width] normal draws of deviation 1 / bandwidth."""
  rng = np.random.Generator(np.random.Philox(key=int(seed) % 2**64))
  return rng.normal(size=(features, width)) / bandwidth


def _chunked(w):
  """[D, W] -> [chunks, D / chunks, W], so that few angles are held at once."""
  return w.reshape(-1, math.gcd(w.shape[0], 128), w.shape[1])


def _angles(x, w):
  return jnp.einsum("rw,dw->rd", x, w, precision=_HIGHEST)


def _feature_sums(w, x, real):
  """Sums over the rows of the cosines and sines: [2, chunks, D / chunks]."""

  def sums(some):
    a = _angles(x, some)
    return jnp.stack(
      [jnp.sum(real[:, None] * f(a), axis=0) for f in (jnp.cos, jnp.sin)]
    )

  return jnp.moveaxis(jax.lax.map(sums, _chunked(w)), 1, 0)


def _feature_scores(w, means, x, real):
  """[rows] products of each row's features with the means of all."""
  del real

  def add(total, chunk):
    some, cosines, sines = chunk
    a = _angles(x, some)
    return total + jnp.sum(
      jnp.cos(a) * cosines[None] + jnp.sin(a) * sines[None], axis=1
    ), None

  zero = jnp.zeros_like(x[:, 0])
  return jax.lax.scan(add, zero, (_chunked(w), means[0], means[1]))[0]


def _kernel_sums(other, real, scale, x, mine):
  """[rows] sums of exp(-|x - y|^2 scale) over the rows of `other`."""
  del mine
  square = (
    jnp.sum(x * x, axis=1)[:, None]
    + jnp.sum(other * other, 1)[None]
    - 2 * _angles(x, other)
  )
  return jnp.sum(jnp.exp(-jnp.maximum(square, 0.0) * scale) * real[None], 1)


def kernel_density(
  x: np.ndarray, bandwidth: float, features: int, seed: int
) -> np.ndarray:
  """Mean Gaussian kernel of each row with all N, itself among them.

  f_i = 1/N sum_j exp(-|x_i - x_j|^2 / (2 h^2)). With D frequencies w_d ~
  N(0, 1/h^2), the kernel is the mean of cos(w_d (x - y)), so f_i = 1/D sum_d
  [cos(w_d x_i) C_d + sin(w_d x_i) S_d] with C and S the means over all rows:
  Rahimi and Recht 2007. Two passes, 4NDW flops, D numbers kept; its
  standard error is at most 1 / sqrt(2D).

  Args:
    x: [N, W] float32.
    bandwidth: h > 0.
    features: D; 0 sums the kernel over all pairs, 2N^2W flops.
    seed: of the frequencies.

  Returns:
    [N] float64, at least 1/N, which is the kernel of a row with itself.
  """
  n = len(x)
  x = less(x, x.mean(axis=0, dtype=np.float64))
  placed = place(x, np.ones(n))
  if features:
    w = frequencies(seed, x.shape[1], features, bandwidth)
    means = ordered_sum(by_chunk(_feature_sums, placed, w)) / n
    f = by_row(_feature_scores, placed, w, means) / features
  else:
    f, scale = np.zeros(n), 0.5 / bandwidth**2
    for start in range(0, n, _TOGETHER):
      some = x[start : start + _TOGETHER]
      more = _TOGETHER - len(some)
      real = np.arange(_TOGETHER) < len(some)
      some = np.pad(some, ((0, more), (0, 0)))
      f += by_row(_kernel_sums, placed, some, real, scale)
    f /= n
  return np.maximum(np.float64(f), 1 / n)


def bandwidth_bytes(p: Sizes) -> float:
  """Of the distances between 512 rows, float64."""
  return 3 * 8 * min(p.n, 512) ** 2


def _density_work(p: Sizes, *, features=1024, pair="mean", **_) -> Work:
  width = width_of(p, pair)
  rows = 4 * p.n * width
  return Work(
    devices=4 * p.n * features * width if features else 2 * p.n**2 * width,
    held=max(3 * rows + ID_BYTES * p.n, rows + bandwidth_bytes(p)),
    device=rows + 4 * p.n,
  )


@needs("embedding", cost=_density_work)
def density(
  seed,
  pool,
  budget,
  *,
  pair="mean",
  metric="cosine",
  bandwidth="median",
  features=1024,
):
  """Draws rows with probability 1 / density, Sachdeva et al. 2024, Alg. 2.

  Without replacement, w_i = 1 / f_i with f the kernel density of
  `kernel_density`: the sample tends to cover the support evenly. The printed
  algorithm ends with p = S / sum(S), which is the opposite of its text and of
  its theorem. It hunts outliers, and so junk where there is some.

  Args:
    seed: of the draw and of the frequencies.
    bandwidth: h, or "median", the median distance between 512 rows.
    features: D random Fourier features; 0 is the exact sum, for up to 200,000
      rows.

  Returns:
    Selection; the [N] score is -log f plus the row's Gumbel number.
  """
  wanted = "0 (exact) or a number of frequencies"
  require(is_count(features, 0), "features", features, wanted)
  x = vectors(pool, pair, metric)
  if not features:
    what = "density over all pairs"
    advice = "set config.select.kwargs.features to 1024"
    refuse_above(len(x), EXACT_ROWS, f"{what}: the number of rows", advice)
    refuse_long(2.0 * len(x) ** 2 * x.shape[1], what, advice, host=False)
  bandwidth = check_bandwidth(bandwidth, x, pool.ids)
  f = kernel_density(x, bandwidth, int(features), seed)
  return ranked(-np.log(f) + gumbel(seed, pool.ids, "density"), pool, budget)
