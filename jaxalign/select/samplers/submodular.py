"""Sets that cover the pool: facility location, and diverse sets: a DPP."""

from collections.abc import Iterator
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.select.chunks import ordered_sum
from jaxalign.select.costs import ID_BYTES, Sizes, Work
from jaxalign.select.pool import needs, Pool, Selection
from jaxalign.select.samplers import vectors
from jaxalign.select.samplers.density import bandwidth_bytes, check_bandwidth
from jaxalign.select.samplers.kmeans import BLOCKS, cost_in_blocks, run_greedy
from jaxalign.select.samplers.values import column, in_order, one_side, require
from jaxalign.select.topk import id_hash, pick

EXACT_ROWS = 20_000  # above, facility location draws its candidates
DPP_NUMBERS = 1e9  # N x M float64, 8 GB
_CACHE = 2**27  # float32 numbers of columns that are kept, 512 MiB
_BLOCK = 256  # candidates of one product
_STRIP = 32  # of them, whose numbers stay in the cache
_HIGHEST = jax.lax.Precision.HIGHEST


# Facility location.


class _Coverage:
  """How well the chosen rows cover every row, and what one more would add.

  In cosines, from -1 before the first pick: with s = (1 + cosine) / 2, gains
  are twice as large here.
  """

  def __init__(self, x: np.ndarray):
    self.x = x
    self.covered = np.full(len(x), -1, np.float32)
    self.folded = self.covered.copy()  # what the last `fold` went up to
    self.spare = max(32, _BLOCK)  # rows that are computed and not kept
    room = self.spare + min(_CACHE // len(x), len(x))
    self.slot = np.full(len(x), -1)  # where a row's cosines are kept
    self.columns = np.empty((room, len(x)), np.float32)
    self.kept = 0
    self.buffer = np.empty((_STRIP, len(x)), np.float32)

  def similar(self, rows: np.ndarray) -> np.ndarray:
    """[rows, N] cosines with all rows; kept while there is room."""
    # Never of another shape: how a product is cut may change its last bit.
    wide = _BLOCK if len(rows) > 32 else 32
    end = self.kept + len(rows)
    keep = end <= len(self.columns) - self.spare
    at = self.kept if keep else len(self.columns) - self.spare
    out = self.columns[at : at + wide]
    np.matmul(self.x[np.resize(rows, wide)], self.x.T, out=out)
    if keep:
      self.slot[rows], self.kept = np.arange(at, end), end
    return out[: len(rows)]

  def strips(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places in `rows`, and their cosines, as many as stay in the cache."""
    slot = self.slot[rows]
    known, missing = np.flatnonzero(slot >= 0), np.flatnonzero(slot < 0)
    for start in range(0, len(known), _STRIP):
      part = known[start : start + _STRIP]
      yield part, self.columns[slot[part]]
    for start in range(0, len(missing), _BLOCK):
      part = missing[start : start + _BLOCK]
      found = self.similar(rows[part])
      for first in range(0, len(part), _STRIP):
        some = slice(first, first + _STRIP)
        yield part[some], found[some]

  def gains(self, rows: np.ndarray) -> np.ndarray:
    """[rows] float64 sums over i of max(0, cosine_ij - covered_i)."""
    out = np.empty(len(rows))
    for part, cosine in self.strips(rows):
      more = np.maximum(cosine, self.covered, out=self.buffer[: len(part)])
      more -= self.covered
      out[part] = more.sum(axis=1, dtype=np.float64)
    return out

  def changed(self) -> np.ndarray:
    """Rows that are covered better than at the last `fold`."""
    return np.flatnonzero(self.covered > self.folded)

  def fold(self) -> np.ndarray:
    """[N] what every row's gain has lost at least since the last `fold`.

    The sum, over the rows i now covered better, of the part of cosine_ij
    between the old and the new coverage: N numbers for each i, where a gain
    from the start takes N for each j.
    """
    lost = np.zeros(len(self.x))
    rows = self.changed()
    for part, cosine in self.strips(rows):
      low = self.folded[rows[part]][:, None]
      less = self.buffer[: len(part)]
      np.clip(cosine, low, self.covered[rows[part]][:, None], out=less)
      less -= low
      lost += np.ones(len(part), np.float32) @ less
    self.folded = self.covered.copy()
    # No term is negative, so float32 is off by a share: it stays a bound.
    return lost * (1 - 2 * _STRIP * vectors.ROUNDING)

  def take(self, row: int) -> None:
    slot = self.slot[row]
    cosine = (
      self.columns[slot] if slot >= 0 else self.similar(np.array([row]))[0]
    )
    np.maximum(self.covered, cosine, out=self.covered)


def lazy_greedy(
  x: np.ndarray, ids: np.ndarray, budget: int
) -> tuple[np.ndarray, np.ndarray]:
  """Exact greedy facility location, Minoux 1978, many candidates at a time.

  A gain only falls as rows are chosen, so an old one is a bound, and rows are
  computed anew while their bound beats the best. Where that has cost more than
  a quarter of it, what all gains have lost since is summed instead, over the
  rows that have come to be covered better: few, once the pool is covered. The
  first bounds need no product of rows with rows: sum_i s_ij is linear in x_j.

  Args:
    x: [N, W] float32 of length 1.
    ids: [N]; a hash of them decides between gains equal to 1e-6.
    budget: M.

  Returns:
    rows [M] in the order of the picks, and their gains [M].
  """
  n = len(x)
  state = _Coverage(x)
  bound = n + np.float64(x) @ x.sum(axis=0, dtype=np.float64)
  whole = bound.copy()  # bounds by what is folded
  # Two rows that cover but each other tie exactly; float32 must not decide.
  tie = 2 * (1e-6 + 1e-9 * n)
  chosen, gained, spent = [], [], 0
  open_ = np.ones(n, bool)
  while len(chosen) < budget:
    fresh = np.zeros(n, bool)
    best, some, waiting = -np.inf, 4, len(state.changed())
    while True:
      stale = np.flatnonzero(open_ & ~fresh & (bound >= best - 2 * tie))
      if not stale.size:
        break
      if 0 < waiting < min(4 * spent, 3 * n // 4):
        whole -= state.fold()
        old = open_ & ~fresh
        bound[old] = np.minimum(bound[old], whole[old])
        spent = waiting = 0
        continue
      if stale.size > some:
        order = np.argpartition(bound[stale], stale.size - some)
        stale = np.sort(stale[order[-some:]])
      bound[stale] = state.gains(stale)
      fresh[stale] = True
      best = max(best, bound[stale].max())
      spent += len(stale)
      some = min(2 * some, _BLOCK)
    rows = np.flatnonzero(fresh)
    row = int(rows[pick(bound[rows], rows, ids, tie)])
    chosen.append(row)
    gained.append(float(bound[row]) / 2)
    open_[row] = False
    if not (open_ & ~fresh).any():  # all are known: as good as a fold
      whole, state.folded = bound.copy(), state.covered.copy()
      spent = 0
    state.take(row)
  return np.array(chosen, np.int64), np.minimum.accumulate(gained)


def _similar(rows, x):
  """[r, P] (1 + cosine) / 2."""
  return 0.5 + 0.5 * jnp.einsum("rw,pw->rp", x, rows, precision=_HIGHEST)


def _gains(rows, x, covered, real):
  """[P] sums over the chunk's rows of max(0, similarity - covered)."""
  more = jnp.maximum(_similar(rows, x) - covered[:, None], 0.0)
  return jnp.sum(more * real[:, None], axis=0)


def _covers(rows, x):
  """[r] similarity to one row, given eight times."""
  return _similar(rows, x)[:, 0]


def stochastic_greedy(
  x: np.ndarray, ids: np.ndarray, budget: int, seed: int, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
  """Mirzasoleiman et al. 2015: each pick is the best of a random few.

  Of ceil(N / M ln(1 / epsilon)) candidates; the expected value is at least (1
  - 1/e - epsilon) of the best. They are the next in an order by a hash of
  (seed, round, id). In all 2 N^2 W ln(1 / epsilon) flops, on the
  devices, and N x 256 numbers at once.

  Returns:
    As `lazy_greedy`; gains need not fall.
  """
  n = len(x)
  few = min(n, math.ceil(n / max(1, budget) * math.log(1 / epsilon)))
  covered, ones = np.zeros(n, np.float32), np.ones(n, np.float32)
  alone = vectors.place(x)
  real = vectors.place(ones).tiles[0]
  chosen, gained, turn, order = [], [], 0, np.empty(0, np.int64)
  open_ = np.ones(n, bool)
  while len(chosen) < budget:
    order = order[open_[order]]
    if len(order) < min(few, n - len(chosen)):
      again = np.argsort(
        id_hash(ids, f"facility:{int(seed)}:{turn}"), kind="stable"
      )
      again = again[open_[again]]
      order = np.append(order, again[~np.isin(again, order)])
      turn += 1
    some, order = order[:few], order[few:]
    state = alone._replace(
      tiles=(alone.tiles[0], vectors.place(covered).tiles[0], real)
    )
    gain = np.empty(len(some))
    for start in range(0, len(some), _BLOCK):
      part = some[start : start + _BLOCK]
      size = max(8, 1 << (len(part) - 1).bit_length())
      found = vectors.by_chunk(_gains, state, x[np.resize(part, size)])
      gain[start : start + _BLOCK] = ordered_sum(found)[: len(part)]
    best = pick(gain, some, ids, 1e-6 + 1e-7 * gain.max())
    row = int(some[best])
    chosen.append(row)
    gained.append(float(gain[best]))
    open_[row] = False
    np.maximum(
      covered, vectors.by_row(_covers, alone, x[np.resize(row, 8)]), out=covered
    )
  return np.array(chosen, np.int64), np.array(gained)


def _is_exact(exact: bool | str, n: float) -> bool:
  return exact is True or (exact == "auto" and n <= EXACT_ROWS)


def _facility_work(
  p: Sizes, width: int, exact: bool | str = "auto", epsilon: float = 0.05, **_
) -> Work:
  rows, work = 4 * p.n * width, 2 * p.n**2 * width
  if _is_exact(exact, p.n):
    kept = 256 + min(_CACHE // p.n, p.n) + _STRIP
    return Work(work, held=rows + 4 * p.n * kept)
  work *= math.log(1 / epsilon)
  held = 2 * rows + ID_BYTES * p.n
  return Work(devices=work, held=held, device=rows + 8 * p.n)


@needs("embedding", cost=cost_in_blocks(_facility_work))
def facility_location(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  pair: str = "mean",
  metric: str = "cosine",
  exact: bool | str = "auto",
  epsilon: float = 0.05,
  blocks: int = 0,
) -> Selection:
  """Rows such that every row of the pool has one like it among them.

  Greedy maximum of sum_i max_{j chosen} s_ij with s = (1 + cosine) / 2, at
  least 1 - 1/e of the best set. Exact for up to 20,000 rows: at most a few
  times 2 N^2 W flops, and at most 512 MiB of similarities are kept.
  Larger pools draw candidates (`stochastic_greedy`), 2 N^2 W ln(1 / epsilon)
  flops whatever the budget.

  Args:
    seed: of the candidates and blocks; unused where exact.
    metric: "cosine" or "centred".
    exact: True, False, or "auto", up to 20,000 rows (of a block).
    epsilon: of the drawn candidates, above 0 and below 1.

  Returns:
    Selection in the order of the picks; the [N] score is 1 for the first down
    to 1/M for the last, and 0 for the others, whose gains are never computed.
  """
  require(0 < epsilon < 1, "epsilon", epsilon, "above 0 and below 1")
  known = exact in (True, False, "auto")
  require(known, "exact", exact, "True, False or 'auto'")
  x = vectors.directions(pool, pair, metric)

  def check(n, m):
    host = _is_exact(exact, int(np.max(n)))
    work = 2.0 * np.sum(np.float64(n) ** 2) * x.shape[1]
    work *= 1 if host else math.log(1 / epsilon)
    vectors.refuse_long(work, "facility_location", BLOCKS, host=host)

  def greedy(part, ids, m, rows):
    if _is_exact(exact, len(part)):
      picks, _ = lazy_greedy(part, ids, m)
    else:
      picks, _ = stochastic_greedy(part, ids, m, seed, epsilon)
    return in_order(picks, len(part))

  return run_greedy(
    greedy, x, pool, budget, blocks=blocks, seed=seed, check=check
  )


# Determinantal point process.


def greedy_map(
  x: np.ndarray,
  quality: np.ndarray,
  ids: np.ndarray,
  budget: int,
  bandwidth: float,
) -> tuple[np.ndarray, np.ndarray]:
  """Greedy maximum of log det L, Chen, Zhang and Zhou 2018.

  L_ij = q_i exp(-|x_i - x_j|^2 / (2 h^2)) q_j. d_i^2, how much of row i the
  chosen leave unexplained, starts as L_ii; the pick j is its argmax; then e_i
  = (L_ji - <c_j, c_i>) / d_j, c_i grows by e_i and d_i^2 falls by e_i^2: the
  next row of a Cholesky factor. N M^2 + 2 N M W flops, N M numbers. Rows
  that the chosen explain to one part in 10^10 follow by quality.

  Args:
    x: [N, W] float32.
    quality: [N] float64, above 0.
    ids: [N].
    budget: M.
    bandwidth: h.

  Returns:
    rows [M] in the order of the picks, and [N] d^2: of a pick, when it was
    picked; of the others, what is left.
  """
  n = len(x)
  near = np.float64(x) - x.mean(axis=0, dtype=np.float64)
  square = (near**2).sum(1)
  left = quality**2
  least = 1e-10 * left.max()
  factor = np.empty((budget, n))
  chosen, value = [], []
  open_ = np.ones(n, bool)
  while len(chosen) < budget:
    rows = np.flatnonzero(open_)
    row = int(rows[pick(left[rows], rows, ids, 1e-3 * least)])
    if left[row] <= least:
      break
    t, d = len(chosen), math.sqrt(left[row])
    distance = np.maximum(square + square[row] - 2 * near @ near[row], 0)
    kernel = quality * quality[row] * np.exp(-distance / (2 * bandwidth**2))
    factor[t] = (kernel - factor[:t, row] @ factor[:t]) / d
    chosen.append(row)
    value.append(left[row])
    open_[row] = False
    left = np.maximum(left - factor[t] ** 2, 0)
  score = np.minimum(left, value[-1])
  score[chosen] = np.minimum.accumulate(value)
  if len(chosen) < budget:
    rows = np.flatnonzero(open_)
    order = np.lexsort((rows, id_hash(ids[rows]), -quality[rows]))
    more = rows[order[: budget - len(chosen)]]
    score[open_] = 0
    chosen += more.tolist()
  return np.array(chosen, np.int64), score


def _dpp_work(p: Sizes, width: int, **_) -> Work:
  numbers = max(8 * p.n * p.budget, bandwidth_bytes(p))
  return Work(
    p.n * p.budget**2 + 2 * p.n * p.budget * width,
    held=3 * 4 * p.n * width + numbers,
  )


@needs("embedding", optional=("reward",), cost=cost_in_blocks(_dpp_work))
def dpp(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  pair: str = "mean",
  metric: str = "cosine",
  quality: str = "",
  weight: float = 1.0,
  side: str = "chosen",
  bandwidth: float | str = "median",
  blocks: int = 0,
) -> Selection:
  """A good and diverse set: greedy MAP of a determinantal point process.

  L = q_i S_ij q_j with a Gaussian kernel S (of full rank, so that a budget
  above the width of the embedding still has something to rank) and q =
  exp(weight z), z the standardised quality; see `greedy_map`.

  Args:
    pool: `embedding` [N, R, E]; the column that `quality` names.
    budget: M; N x M is at most 10^9 (in blocks: of the largest).
    quality: "" for none, or a column [N, R], "reward" for instance.
    weight: of the quality against diversity.
    side: of a pair's quality; see `values.one_side`.
    bandwidth: h, or "median", the median distance between 512 rows.

  Returns:
    Selection in the order of the picks; the [N] score is what the rows before
    it left unexplained (in blocks: 1 down to 1/M, 0 for the others).
  """
  x = vectors.vectors(pool, pair, metric)
  q = np.ones(len(x))
  if quality:
    value = one_side(column(pool, quality), side)
    q = np.exp(weight * (value - value.mean()) / (value.std() or 1.0))
  bandwidth = check_bandwidth(bandwidth, x, pool.ids)

  def check(n, m):
    n = np.float64(n)
    what = "dpp keeps N x M numbers, and N x M"
    vectors.refuse_above(np.max(n * m), DPP_NUMBERS, what, BLOCKS)
    work = np.sum(n * m**2 + 2 * n * m * x.shape[1])
    vectors.refuse_long(work, "dpp", BLOCKS, host=True)

  def greedy(part, ids, m, rows):
    return Selection(*greedy_map(part, q[rows], ids, m, bandwidth))

  return run_greedy(
    greedy, x, pool, budget, blocks=blocks, seed=seed, check=check
  )
