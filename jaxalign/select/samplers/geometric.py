"""Rows by where they lie: k-center, herding, and the distance in a pair.

Both greedy methods take one row after the other and are exact: a pick is
decided in float64 on the host. The devices only say, in float32 and with a
bound on its error, which rows cannot be the next one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.select.pool import Pool, Selection, needs
from jaxalign.select.samplers import clusters
from jaxalign.select.samplers import density
from jaxalign.select.samplers import rows as rows_lib
from jaxalign.select.samplers.values import directed, ranked
from jaxalign.select.topk import id_hash, pick, uniform

ACTIVE = 1024  # rows that are kept up to date after every pick
_TIE = 1e-12  # share of the scale within which two float64 numbers are equal
_HIGHEST = jax.lax.Precision.HIGHEST


def _nearest(centres, squares, x, xx):
  """[rows] smallest squared distance to the centres."""
  product = jnp.einsum("rw,pw->rp", x, centres, precision=_HIGHEST)
  return jnp.min(xx[:, None] + squares[None] - 2 * product, axis=1)


def _products(w, x):
  """[rows, P] products of the rows with each w."""
  return jnp.einsum("rw,pw->rp", x, w, precision=_HIGHEST)


def _padded(x: np.ndarray) -> np.ndarray:
  """Repeats the last row up to a power of two, so that few shapes compile."""
  size = max(8, 1 << (len(x) - 1).bit_length())
  return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])


def _in_parts(rows: list[int], size: int = 256) -> list[list[int]]:
  return [rows[i:i + size] for i in range(0, len(rows), size)]


class _Distances:
  """Smallest squared distance to the chosen rows: bounds, exact on demand."""

  def __init__(self, x: np.ndarray):
    self.mean = x.mean(axis=0, dtype=np.float64)
    self.x = x
    near = (x - self.mean).astype(np.float32)
    self.square = np.einsum("nw,nw->n", near, near, dtype=np.float64)
    self.placed = rows_lib.place(near, self.square)
    # Of float32: the product, the two squares, the centring, each a few ulp.
    self.slack = (4 * (x.shape[1] + 8) * rows_lib.ROUNDING
                  * (self.square + self.square.max()))
    self.bound = np.full(len(x), np.inf)  # never below the true value
    self.value = np.full(len(x), np.inf)  # exact for the first `seen` chosen
    self.seen = np.zeros(len(x), np.int64)

  def vectors(self, rows) -> np.ndarray:
    return np.float64(self.x[rows]) - self.mean

  def lower_bounds(self, chosen: list[int]) -> None:
    """Takes newly chosen rows into the bounds of all rows."""
    for part in _in_parts(chosen):
      centres = self.vectors(part)
      found = rows_lib.by_row(_nearest, self.placed, _padded(centres),
                              _padded((centres**2).sum(1)))
      np.minimum(self.bound, found + self.slack, out=self.bound)

  def refresh(self, rows: np.ndarray, chosen: list[int]) -> np.ndarray:
    """Exact values of some rows, [rows] float64."""
    for seen in np.unique(self.seen[rows]):
      old = rows[self.seen[rows] == seen]
      a = self.vectors(old)
      for part in _in_parts(chosen[seen:]):
        b = self.vectors(part)
        square = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
        self.value[old] = np.minimum(self.value[old],
                                     np.maximum(square, 0).min(axis=1))
    self.seen[rows] = len(chosen)
    return self.value[rows]


def farthest_first(x: np.ndarray, ids: np.ndarray, budget: int,
                   first: int) -> tuple[np.ndarray, np.ndarray]:
  """Gonzalez 1985: again and again the row farthest from those chosen.

  A distance to the chosen rows only falls as more are chosen, so an old one
  bounds the new. The rows with the highest bounds are kept up to date, in
  float64; while the farthest of them beats every other bound, it is the pick.
  When none does, one product of all rows with the picks since then renews the
  bounds: a product of matrices in place of one with a vector for every pick.

  Args:
    x: [N, W] float32.
    ids: [N]; a hash of them decides between equal distances.
    budget: M.
    first: the row to begin with.

  Returns:
    rows [M] in the order of the picks, and [N] distances: of a pick, to those
    before it (the first has the second's), of the others, to the nearest.
  """
  n = len(x)
  state = _Distances(x)
  tie = _TIE * max(state.square.max(), 1e-300)
  chosen, radius, taken = [first], [np.inf], 0
  size = min(n, ACTIVE)
  open_ = np.ones(n, bool)
  open_[first] = False
  while len(chosen) < budget:
    state.lower_bounds(chosen[taken:])
    taken = len(chosen)
    left = np.flatnonzero(open_)
    active, rest = left, -np.inf
    if len(left) > size:
      order = np.argpartition(state.bound[left], len(left) - size)
      active = np.sort(left[order[-size:]])
      rest = state.bound[left[order[:-size]]].max()
    value = state.refresh(active, chosen)
    near = state.vectors(active)
    square = (near**2).sum(1)
    while len(chosen) < budget and value.max() - tie > rest:
      if value.max() <= tie:  # only copies of chosen rows are left
        more = left[open_[left]]
        more = more[np.lexsort((more, id_hash(ids[more])))]
        more = more[:budget - len(chosen)].tolist()
        open_[more] = False
        chosen += more
        radius += [0.0] * len(more)
        break
      at = pick(value, active, ids, tie)
      chosen.append(int(active[at]))
      radius.append(float(value[at]))
      open_[active[at]] = False
      far = square + square[at] - 2 * near @ near[at]
      value = np.minimum(value, np.maximum(far, 0))
      value[at] = -np.inf
    state.value[active], state.seen[active] = value, len(chosen)
    if len(chosen) == taken:  # bounds too close to one another to tell apart
      size = min(n, 4 * size)
  state.lower_bounds(chosen[taken:])
  radius[0] = radius[1] if len(radius) > 1 else 0.0
  last = min(radius)
  score = np.clip(state.bound - state.slack, 0.0, last)
  score[chosen] = np.minimum.accumulate(radius)
  return np.array(chosen, np.int64), np.sqrt(score)


@needs("embedding")
def k_center(seed: int, pool: Pool, budget: int, *, pair: str = "mean",
             metric: str = "cosine") -> Selection:
  """Rows that leave none far from a chosen one, Sener and Savarese 2018.

  Greedy: argmax_i min_{j chosen} |x_i - x_j|, which is within twice the best
  radius. At most 2NMW operations, in products of matrices, and N + 1,024 W
  numbers beside the rows; see `farthest_first`. It hunts outliers.

  Args:
    seed: of the first row.
    pool: `pool.embedding` [N, R, E].
    budget: M, at most N.
    pair: which vector stands for a pair; see `rows.vectors`.
    metric: "cosine", "centred" or "euclidean".

  Returns:
    Selection in the order of the picks; the [N] score is the distance to the
    rows chosen before (of a row that was not: to the nearest chosen).
  """
  x = rows_lib.vectors(pool, pair, metric)
  first = int(np.argmax(uniform(seed, pool.ids, "k_center")))
  return Selection(*farthest_first(x, pool.ids, budget, first))


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
  placed = rows_lib.place(x)
  mean = x.mean(axis=0, dtype=np.float64)
  longest = rows_lib.lengths(x).max()
  open_ = np.ones(n, bool)
  chosen, w, guesses = [], mean.copy(), 8
  standing = rows_lib.by_row(_products, placed, _padded(w[None]))[:, 0]
  while len(chosen) < budget:
    left = np.flatnonzero(open_)
    active = left
    if len(left) > ACTIVE:
      order = np.argpartition(standing[left], len(left) - ACTIVE)
      active = np.sort(left[order[-ACTIVE:]])
    near = np.float64(x[active])
    ahead = min(guesses, budget - len(chosen), len(active))
    value, free, path, guess = near @ w, np.ones(len(active), bool), [w], []
    for _ in range(ahead):
      tie = _TIE * longest * np.sqrt(path[-1] @ path[-1])
      at = pick(np.where(free, value, -np.inf), active, ids, tie)
      guess.append((int(active[at]), float(value[at]), tie))
      free[at] = False
      path.append(path[-1] + (mean - near[at]))
      value = near @ path[-1]
    found = rows_lib.by_row(_products, placed, _padded(np.stack(path)))
    outside = open_.copy()
    outside[active] = False
    step = 0
    while step < ahead:
      row, best, tie = guess[step]
      error = (2 * (width + 8) * rows_lib.ROUNDING * longest
               * np.sqrt(path[step] @ path[step]))
      rivals = np.flatnonzero(outside & (found[:, step] >= best - error - tie))
      if rivals.size:
        rivals = np.append(rivals, row)
        exact = np.float64(x[rivals]) @ path[step]
        row = int(rivals[pick(exact, rivals, ids, tie)])
      chosen.append(row)
      open_[row] = False
      step += 1
      if row != guess[step - 1][0]:
        w = path[step - 1] + (mean - np.float64(x[row]))
        break
    else:
      w = path[step]
    standing = found[:, step]
    guesses = min(64, 2 * ahead) if step == ahead else max(4, step + 1)
  return np.array(chosen, np.int64)


@needs("embedding")
def herding(seed: int, pool: Pool, budget: int, *, pair: str = "mean",
            metric: str = "cosine", features: int = 0) -> Selection:
  """Rows whose mean stays closest to the pool's: kernel herding.

  Chen, Welling and Smola 2010, without replacement; see `herd`. At most 2NMW
  operations, in products of matrices, and 64N numbers beside the rows.

  Args:
    seed: of the random features; unused without.
    pool: `pool.embedding` [N, R, E].
    budget: M, at most N.
    pair: which vector stands for a pair; see `rows.vectors`.
    metric: "cosine", "centred" or "euclidean".
    features: 0 for the linear kernel (the mean is matched); D for a Gaussian
      kernel of median bandwidth through D random Fourier features (W = 2D):
      the whole distribution is matched.

  Returns:
    Selection in the order of the picks; the [N] score is 1 for the first down
    to 1/M for the last, and 0 for the others.
  """
  x = rows_lib.vectors(pool, pair, metric)
  if features:
    w = density.frequencies(seed, x.shape[1], int(features),
                            density.bandwidth_of(x, pool.ids))
    angle = np.concatenate([np.float64(x[i:i + 4096]) @ w.T
                            for i in range(0, len(x), 4096)])
    x = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    x = np.float32(x / np.sqrt(features))
  return clusters.in_order(herd(x, pool.ids, budget), len(x))


@needs("embedding", pairs=True)
def real(seed: int, pool: Pool, budget: int, *, direction: str = "top",
         metric: str = "cosine") -> Selection:
  """Pairs whose two responses are least alike, Zhang et al. 2024 (REAL); O(NE).

  Score 1 - cos(chosen, rejected); easy pairs to tell apart, so a correct
  label is likelier. Made for embeddings of the response without the prompt,
  which otherwise pulls the two together.

  Args:
    seed: unused.
    pool: `pool.embedding` [N, 2, E].
    budget: M, at most N.
    direction: "top" (unlike), "middle" or "low" (alike).
    metric: "cosine"; "centred" takes off the mean of all responses first;
      "euclidean" scores the distance itself.
  """
  del seed
  stored = np.asarray(pool.embedding)
  sides = stored if stored.ndim == 3 else stored[:, None]
  rows_lib.require_pairs(sides)
  n = len(sides)
  flat = Pool(np.repeat(pool.ids, 2),
              {"embedding": sides.reshape(2 * n, 1, -1)})
  x = np.float64(rows_lib.vectors(flat, "mean", metric)).reshape(n, 2, -1)
  if metric == "euclidean":
    value = np.sqrt(((x[:, 0] - x[:, 1])**2).sum(axis=1))
  else:
    value = 1 - (x[:, 0] * x[:, 1]).sum(axis=1)
  return ranked(directed(value, direction), pool, budget)
