"""Rows by where they lie: k-center and herding.

Both greedy methods take one row after the other and are exact: a pick is
decided in float64 on the host. The devices only rule out, in float32 and with
a bound on its error, rows that cannot be the next one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.select.chunks import by_row, less, padded, place
from jaxalign.select.costs import ID_BYTES, Sizes, Work
from jaxalign.select.pool import needs, Selection
from jaxalign.select.samplers.density import (
  bandwidth_bytes,
  frequencies,
  median_distance,
)
from jaxalign.select.samplers.kmeans import (
  cost_in_blocks,
  refuse_long_picks,
  run_greedy,
)
from jaxalign.select.samplers.values import in_order
from jaxalign.select.samplers.vectors import lengths, ROUNDING, vectors
from jaxalign.select.topk import id_hash, largest, pick, uniform

ACTIVE = 1024  # rows that are kept up to date after every pick
_TIE = 1e-12  # of the scale, within which two float64 numbers are equal
_HIGHEST = jax.lax.Precision.HIGHEST


def _products(w, x):
  """[rows, P] products of the rows with each w."""
  return jnp.einsum("rw,pw->rp", x, w, precision=_HIGHEST)


def _nearest(centres, squares, x, xx):
  """[rows] smallest squared distance to the centres."""
  distance = xx[:, None] + squares[None] - 2 * _products(centres, x)
  return jnp.min(distance, axis=1)


def _on_host() -> bool:
  """Whether NumPy multiplies all rows with a few vectors.

  On a CPU its BLAS is several times faster than XLA at so few columns.
  """
  return jax.default_backend() == "cpu"


class _Distances:
  """Smallest squared distance to the chosen rows: near, and exact on demand."""

  def __init__(self, x: np.ndarray, budget: int):
    n, width = x.shape
    self.x, self.near = x, less(x, x.mean(axis=0, dtype=np.float64))
    self.square = np.einsum("nw,nw->n", self.near, self.near)
    self.placed = place(self.near, self.square)
    # Of float32: the product of two rows, their squares, the centring.
    self.slack = float(2 * (width + 16) * ROUNDING * self.square.max())
    self.rows = np.empty(budget, np.int64)  # the chosen, `count` of them
    self.centres = np.empty((budget, width), np.float32)
    self.guess = np.full(n, np.inf, np.float32)  # to `known`, within slack
    self.exact = np.full(n, np.inf)  # to the first `seen` of the chosen
    self.seen = np.zeros(n, np.int64)
    self.count = self.known = 0

  def choose(self, row: int) -> None:
    self.rows[self.count], self.centres[self.count] = row, self.near[row]
    self.count += 1

  def renew(self) -> None:
    """Takes the newly chosen rows into the guesses of all rows."""
    for start in range(self.known, self.count, 256):
      new = slice(start, min(start + 256, self.count))
      centres, squares = self.centres[new], self.square[self.rows[new]]
      near = by_row(_nearest, self.placed, padded(centres), padded(squares))
      np.minimum(self.guess, near, out=self.guess)
    self.known = self.count

  def decide(self, rows: np.ndarray) -> np.ndarray:
    """[rows] float64 from the rows themselves, where float32 cannot tell."""
    since = int(self.seen[rows].min())
    chosen, centres = self.rows[since : self.count], self.centres[since:]
    product = self.near[rows] @ centres[: len(chosen)].T
    square = self.square[rows][:, None] + self.square[chosen][None]
    near = square - 2 * product
    limit = np.minimum(near.min(axis=1), self.exact[rows]) + 2 * self.slack
    i, j = np.nonzero(near <= limit[:, None])
    for start in range(0, len(i), 4096):
      a, b = rows[i[start : start + 4096]], chosen[j[start : start + 4096]]
      apart = np.float64(self.x[a]) - self.x[b]
      np.minimum.at(self.exact, a, np.einsum("nw,nw->n", apart, apart))
    self.seen[rows] = self.count
    return self.exact[rows]


def farthest_first(
  x: np.ndarray, ids: np.ndarray, budget: int, first: int
) -> tuple[np.ndarray, np.ndarray]:
  """Gonzalez 1985: again and again the row farthest from those chosen.

  A distance to the chosen rows only falls as more are chosen, so an old one
  bounds the new. The rows with the largest are kept up to date; while the
  farthest of them beats the old distance of every other row, it is the pick.
  When none does, one product of all rows with the picks since then renews
  all: a product of matrices in place of one with a vector for every pick.
  Where float32 leaves more than one row that may be the farthest, float64
  decides.

  Args:
    x: [N, W] float32.
    ids: [N]; a hash of them decides between equal distances.
    budget: M.
    first: the row to begin with.

  Returns:
    rows [M] in the order of the picks, and [N] distances: of a pick, to those
    before it (the first has the second's), of the others, to the nearest.
  """
  state = _Distances(x, budget)
  slack, tie = state.slack, _TIE * max(float(state.square.max()), 1e-300)
  state.choose(first)
  radius, size = [np.inf], ACTIVE
  open_ = np.ones(len(x), bool)
  open_[first] = False
  while state.count < budget:
    state.renew()
    left = np.flatnonzero(open_)
    active, others = largest(state.guess, left, size), open_.copy()
    others[active] = False
    rest = state.guess[others].max(initial=-np.inf)
    guess, near = state.guess[active], state.near[active]
    square = state.square[active]
    while state.count < budget and guess.max() - slack > rest + slack:
      maybe = np.flatnonzero(guess >= guess.max() - 2 * slack)
      value = np.float64(guess[maybe])
      if maybe.size > 1 or value[0] <= 2 * slack:
        value = state.decide(active[maybe])
      if value.max() <= tie:  # only copies of chosen rows are left
        more = left[open_[left]]
        more = more[np.lexsort((more, id_hash(ids[more])))]
        for row in more[: budget - state.count]:
          state.choose(row)
          radius.append(0.0)
        break
      best = pick(value, active[maybe], ids, tie)
      at = maybe[best]
      state.choose(int(active[at]))
      radius.append(float(value[best]))
      open_[active[at]] = False
      np.minimum(guess, square + square[at] - 2 * (near @ near[at]), out=guess)
      guess[at] = -np.inf
    if state.count == state.known:  # too close to one another to tell apart
      size *= 4
  state.renew()
  radius[0] = radius[1] if len(radius) > 1 else 0.0
  score = np.clip(np.float64(state.guess), 0.0, min(radius))
  score[state.rows] = np.minimum.accumulate(radius)
  return state.rows, np.sqrt(score)


def _k_center_work(p: Sizes, width: int, **_) -> Work:
  rows = 4 * p.n * width
  return Work(
    devices=2 * p.n * p.budget * width,
    held=3 * rows + 4 * p.budget * width + ID_BYTES * p.n,
    device=rows + 4 * p.n,
  )


@needs("embedding", cost=cost_in_blocks(_k_center_work))
def k_center(seed, pool, budget, *, pair="mean", metric="cosine", blocks=0):
  """Rows that leave none far from a chosen one, Sener and Savarese 2018.

  Greedy: argmax_i min_{j chosen} |x_i - x_j|, which is within twice the best
  radius. At most 2NMW flops, in products of matrices, and N + 1,024 W
  numbers held with the rows; see `farthest_first`. It hunts outliers.

  Args:
    seed: of the first row.

  Returns:
    Selection in the order of the picks; the [N] score is the distance to the
    rows chosen before (of a row that was not: to the nearest chosen). In
    blocks see `kmeans.run_greedy`.
  """
  x = vectors(pool, pair, metric)
  draw = uniform(seed, pool.ids, "k_center")

  def greedy(x, ids, m, rows):
    return Selection(*farthest_first(x, ids, m, int(draw[rows].argmax())))

  check = refuse_long_picks("k_center", x.shape[1], host=False)
  return run_greedy(
    greedy, x, pool, budget, blocks=blocks, seed=seed, check=check
  )


def herd(x: np.ndarray, ids: np.ndarray, budget: int) -> np.ndarray:
  """Welling 2009 with a linear kernel: rows whose mean follows the pool's.

  w_0 = mu; pick argmax_i <w, x_i> among the rows not yet chosen; w += mu -
  x_pick. A few picks ahead are guessed from the rows that score highest now;
  one product of all rows with the w of each guess then confirms them, or
  shows, in float64, which row comes in place of the first wrong one.

  Args:
    x: [N, W] float32.
    ids: [N]; a hash of them decides between equal products.
    budget: M.

  Returns:
    [M] int64 row numbers in the order of the picks.
  """
  n, width = x.shape
  placed = None if _on_host() else place(x)
  mean = x.mean(axis=0, dtype=np.float64)
  longest = lengths(x).max()
  rounding = 2 * (width + 8) * ROUNDING

  def products(w):
    """[N, P] float32 of all rows with each w [P, W]."""
    if placed is None:
      return x @ np.float32(w).T
    return by_row(_products, placed, padded(w))

  open_, chosen, ahead, w = np.ones(n, bool), [], 8, mean.copy()
  standing = products(w[None])[:, 0]
  while len(chosen) < budget:
    active = largest(standing, np.flatnonzero(open_), ACTIVE)
    others = open_.copy()
    others[active] = False
    near = np.float64(x[active])
    ahead = min(ahead, budget - len(chosen), len(active))
    free, path, guesses = np.ones(len(active), bool), [w], []
    for _ in range(ahead):
      value = np.where(free, near @ path[-1], -np.inf)
      scale = longest * np.sqrt(path[-1] @ path[-1])
      at = pick(value, active, ids, _TIE * scale)
      guesses.append((int(active[at]), float(value[at]), scale))
      free[at] = False
      path.append(path[-1] + (mean - near[at]))
    everywhere = products(np.stack(path))
    for step, (row, best, scale) in enumerate(guesses, 1):
      w, guess, tie = path[step - 1], row, _TIE * scale
      low = best - rounding * scale - tie
      rivals = np.flatnonzero(others & (everywhere[:, step - 1] >= low))
      if rivals.size:
        rivals = np.append(rivals, row)
        exact = np.float64(x[rivals]) @ w
        row = int(rivals[pick(exact, rivals, ids, tie)])
      chosen.append(row)
      open_[row] = False
      if row != guess:
        w = w + (mean - np.float64(x[row]))
        break
      w = path[step]
    standing = everywhere[:, step]
    ahead = min(64, 2 * ahead) if step == ahead else max(4, step + 1)
  return np.array(chosen, np.int64)


def _herding_work(p: Sizes, width: int, features: int = 0, **_) -> Work:
  width = 2 * features or width
  work, rows = 2 * p.n * p.budget * width, 4 * p.n * width
  # A kernel's angles are float64, as are their cosines and sines.
  kernel = bandwidth_bytes(p) if features else 0
  held = max(rows * (8 if features else 2), rows + 4 * 65 * p.n, kernel)
  if _on_host():
    return Work(work, held=held)
  return Work(devices=work, held=held + rows, device=rows)


@needs("embedding", cost=cost_in_blocks(_herding_work))
def herding(
  seed, pool, budget, *, pair="mean", metric="cosine", features=0, blocks=0
):
  """Rows whose mean stays closest to the pool's: kernel herding.

  Chen, Welling and Smola 2010, without replacement; see `herd`. At most 2NMW
  flops, in products of matrices, and 64N numbers held with the rows.

  Args:
    seed: of the random features and of the blocks; unused without.
    features: 0 for the linear kernel (the mean is matched); D for a Gaussian
      kernel of median bandwidth through D random Fourier features (W = 2D):
      the whole distribution is matched.

  Returns:
    Selection in the order of the picks; the [N] score is 1 for the first down
    to 1/M for the last, and 0 for the others.
  """
  x = vectors(pool, pair, metric)
  if features:
    bandwidth = median_distance(x, pool.ids)
    w = frequencies(seed, x.shape[1], int(features), bandwidth)
    chunks = [x[i : i + 4096] for i in range(0, len(x), 4096)]
    angle = np.concatenate([np.float64(rows) @ w.T for rows in chunks])
    x = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    x = np.float32(x / np.sqrt(features))

  def greedy(x, ids, m, rows):
    return in_order(herd(x, ids, m), len(x))

  check = refuse_long_picks("herding", x.shape[1], host=_on_host())
  return run_greedy(
    greedy, x, pool, budget, blocks=blocks, seed=seed, check=check
  )
