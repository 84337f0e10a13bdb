"""Where EM begins: parameters of a partition of rows, by k-means or given."""

import numpy as np

from jaxalign.select import em
from jaxalign.select.gaussians import State

ROWS = 16384  # k-means reads at most so many rows
LLOYD_STEPS = 5
POWER_STEPS = 5  # of the subspace iteration that begins the loadings
TILE = 4096  # rows of one host product


def partition(
  z: np.ndarray,
  labels: np.ndarray,
  components: int,
  ridge: float,
  covariance: str,
  rank: int,
) -> State | None:
  """Parameters of a given partition; None where a part is empty.

  Closed form in "full", "tied" and "diag": the maximum of the likelihood in
  which each row's component is known, plus the ridge. Of low rank it is a
  beginning: the part's principal directions.

  Args:
    z: [n, P] whitened rows.
    labels: [n] from 0 to K - 1.
    components: K.
    ridge: as of `em`.
    covariance: one of `gaussians.COVARIANCES`.
    rank: q, of low rank.
  """
  width = z.shape[1]
  diagonal = covariance in ("diag", "low_rank")
  count = np.bincount(labels, minlength=components).astype(np.float64)
  if not count.all():
    return None
  first = np.zeros((components, width))
  second = np.zeros(
    (components, width) if diagonal else (components, width, width)
  )
  for start in range(0, len(z), TILE):
    part = np.float64(z[start : start + TILE])
    here = labels[start : start + TILE]
    for k in range(components):
      own = part[here == k]
      first[k] += own.sum(0)
      second[k] += (own**2).sum(0) if diagonal else own.T @ own
  if covariance == "tied":
    second = second.sum(0)
  state = State(
    np.zeros(components),
    np.zeros((components, width)),
    np.zeros(second.shape),
    np.zeros((components, width, 0)),
  )
  state = em.m_step(
    em.Sums(count, first, second, np.zeros(0)),
    state,
    ridge,
    "diag" if diagonal else covariance,
  )
  if covariance != "low_rank":
    return state
  loadings = np.stack(
    [
      _leading(z[labels == k][:ROWS], state.means[k], rank)
      for k in range(components)
    ]
  )
  noise = state.covariances - (loadings**2).sum(2)
  # Below `NOISE` the first M-step would cut it off and the bound would fall.
  least = np.maximum(0.05 * state.covariances, em.NOISE)
  return state._replace(loadings=loadings, covariances=np.maximum(noise, least))


def _leading(x: np.ndarray, mean: np.ndarray, rank: int) -> np.ndarray:
  """[n, P] -> [P, q]: leading directions times what they have beyond noise."""
  y = np.float64(x) - mean
  rng = np.random.Generator(
    np.random.Philox(key=np.array([0, rank], np.uint64))
  )
  basis = np.linalg.qr(rng.normal(size=(y.shape[1], rank)))[0]
  for _ in range(POWER_STEPS):
    basis = np.linalg.qr(y.T @ (y @ basis))[0]
  values, turn = np.linalg.eigh((y @ basis).T @ (y @ basis) / len(y))
  rest = max((y**2).mean() * y.shape[1] - values.sum(), 0.0)
  noise = rest / max(y.shape[1] - rank, 1)
  floor = 0.01 * values.max() + 1e-12  # loadings of 0 would stay 0
  return basis @ turn * np.sqrt(np.maximum(values - noise, floor))


def _distances(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
  """[n, P], [K, P] -> [n, K] squared distances."""
  return np.maximum(
    (x**2).sum(1)[:, None] - 2 * (x @ centre.T) + (centre**2).sum(1)[None], 0
  )


def k_means(
  x: np.ndarray, components: int, rng: np.random.Generator
) -> np.ndarray:
  """k-means++ and a few Lloyd steps on [n, P]; returns [n] labels."""
  centres = x[rng.integers(len(x))][None]
  near = np.full(len(x), np.inf)
  while len(centres) < components:
    near = np.minimum(near, _distances(x, centres[-1:])[:, 0])
    total = near.sum()
    share = near / total if total > 0 else None  # fewer distinct rows than K
    centres = np.append(centres, x[rng.choice(len(x), p=share)][None], axis=0)
  labels = _distances(x, centres).argmin(1)
  for _ in range(LLOYD_STEPS):
    for k in range(components):
      if (labels == k).any():
        centres[k] = x[labels == k].mean(0)
    labels = _distances(x, centres).argmin(1)
  return labels


def reseed(
  state: State, k: int, z: np.ndarray, ridge: float, rng: np.random.Generator
) -> State:
  """Component k begins again at a random row, as wide as all the rows."""
  means = state.means.copy()
  means[k] = z[rng.integers(len(z))]
  covariances = state.covariances.copy()
  wide = np.full(z.shape[1], 1 + ridge)
  covariances[k] = wide if covariances.ndim == 2 else np.diag(wide)
  loadings = state.loadings.copy()
  if loadings.shape[-1]:  # some width of the others', or it would stay 0
    loadings[k] = 0.1 * state.loadings.mean(0) + 0.01 * rng.normal(
      size=loadings.shape[1:]
    )
  weights = np.exp(state.log_weights)
  weights[k] = 1 / len(weights)
  return State(np.log(weights / weights.sum()), means, covariances, loadings)
