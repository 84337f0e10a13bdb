"""Sets that cover the pool: facility location, and diverse sets: a DPP."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.select.chunks import by_chunk, by_row, ordered_sum, padded, place
from jaxalign.select.costs import ID_BYTES, Sizes, Work
from jaxalign.select.pool import needs, Selection
from jaxalign.select.samplers.density import bandwidth_bytes, check_bandwidth
from jaxalign.select.samplers.kmeans import BLOCKS, cost_in_blocks, run_greedy
from jaxalign.select.samplers.values import column, in_order, one_side, require
from jaxalign.select.samplers.vectors import (
  directions,
  refuse_above,
  refuse_long,
  vectors,
)
from jaxalign.select.topk import id_hash, largest, pick

EXACT_ROWS = 20_000  # above, facility location draws its candidates
DPP_NUMBERS = 1e9  # N x M float64, 8 GB
_CACHE = 2**27  # float32 numbers of columns that are kept, 512 MiB
_TOGETHER = 256  # candidates of one product
_HIGHEST = jax.lax.Precision.HIGHEST


class _Coverage:
  """How well the chosen rows cover every row, and what one more would add.

  In cosines, from -1 before the first pick: with s = (1 + cosine) / 2, gains
  are twice as large here.
  """

  def __init__(self, x: np.ndarray):
    n = len(x)
    self.x = x
    self.covered = np.full(n, -1, np.float32)
    self.room = min(_CACHE // n, n)  # of the rows that are kept
    self.columns = np.empty((self.room + _TOGETHER, n), np.float32)
    self.slot = np.full(n, -1)  # of the columns, where a row's cosines are
    self.kept = 0

  def _compute(self, rows: np.ndarray) -> None:
    """Puts the rows' cosines with all into slots; the last 256 are not kept."""
    self.slot[self.slot >= self.kept] = -1
    rows = rows[self.slot[rows] < 0]
    if not rows.size:
      return
    # Never of another shape: how a product is cut may change its last bit.
    wide = _TOGETHER if len(rows) > 32 else 32
    end = self.kept + len(rows)
    at = self.kept if end <= self.room else self.room
    out = self.columns[at : at + wide]
    np.matmul(self.x[np.resize(rows, wide)], self.x.T, out=out)
    self.slot[rows] = np.arange(at, at + len(rows))
    self.kept = end if end <= self.room else self.kept

  def gains(self, rows: np.ndarray) -> np.ndarray:
    """[rows], at most 256, sums over i of max(0, cosine_ij - covered_i)."""
    self._compute(rows)
    gains, more = [], np.empty_like(self.covered)
    for slot in self.slot[rows]:
      np.maximum(self.columns[slot], self.covered, out=more)
      more -= self.covered
      gains.append(more.sum(dtype=np.float64))
    return np.array(gains)

  def take(self, row: int) -> None:
    self._compute(np.array([row]))
    column = self.columns[self.slot[row]]
    np.maximum(self.covered, column, out=self.covered)


def lazy_greedy(
  x: np.ndarray, ids: np.ndarray, budget: int
) -> tuple[np.ndarray, np.ndarray]:
  """Exact greedy facility location, Minoux 1978, many candidates at a time.

  A gain only falls as rows are chosen, so an old one is a bound, and rows are
  computed anew while their bound beats the best. The first bounds need no
  product of rows with rows: sum_i s_ij is linear in x_j.

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
  # Two rows that cover but each other tie exactly; float32 must not decide.
  tie = 2 * (1e-6 + 1e-9 * n)
  chosen, gained, open_ = [], [], np.ones(n, bool)
  while len(chosen) < budget:
    stale, best, size = open_.copy(), -np.inf, 4
    while (rows := np.flatnonzero(stale & (bound >= best - 2 * tie))).size:
      rows = largest(bound, rows, size)
      bound[rows] = state.gains(rows)
      stale[rows] = False
      best = max(best, bound[rows].max())
      size = min(2 * size, _TOGETHER)
    rows = np.flatnonzero(open_ & ~stale)
    row = int(rows[pick(bound[rows], rows, ids, tie)])
    chosen.append(row)
    gained.append(float(bound[row]) / 2)
    open_[row] = False
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
  """[r] similarity to the first row."""
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
  alone, [real] = place(x), place(ones).columns
  chosen, gained, turn, order = [], [], 0, np.empty(0, np.int64)
  open_ = np.ones(n, bool)
  while len(chosen) < budget:
    order = order[open_[order]]
    if len(order) < min(few, n - len(chosen)):
      hashes = id_hash(ids, f"facility:{int(seed)}:{turn}")
      again = np.argsort(hashes, kind="stable")
      again = again[open_[again]]
      order = np.append(order, again[~np.isin(again, order)])
      turn += 1
    some, order = order[:few], order[few:]
    columns = (*alone.columns, *place(covered).columns, real)
    state, gain = alone._replace(columns=columns), np.empty(len(some))
    for start in range(0, len(some), _TOGETHER):
      rows = some[start : start + _TOGETHER]
      sums = by_chunk(_gains, state, padded(x[rows]))
      gain[start : start + _TOGETHER] = ordered_sum(sums)[: len(rows)]
    best = pick(gain, some, ids, 1e-6 + 1e-7 * gain.max())
    row = int(some[best])
    chosen.append(row)
    gained.append(float(gain[best]))
    open_[row] = False
    near = by_row(_covers, alone, padded(x[[row]]))
    np.maximum(covered, near, out=covered)
  return np.array(chosen, np.int64), np.array(gained)


def _is_exact(exact: bool | str, n: float) -> bool:
  return exact is True or (exact == "auto" and n <= EXACT_ROWS)


def _facility_work(p: Sizes, width: int, exact="auto", epsilon=0.05, **_):
  rows, work = 4 * p.n * width, 2 * p.n**2 * width
  if _is_exact(exact, p.n):
    kept = _TOGETHER + min(_CACHE // p.n, p.n)
    return Work(work, held=rows + 4 * p.n * kept)
  work *= math.log(1 / epsilon)
  held = 2 * rows + ID_BYTES * p.n
  return Work(devices=work, held=held, device=rows + 8 * p.n)


@needs("embedding", cost=cost_in_blocks(_facility_work))
def facility_location(
  seed,
  pool,
  budget,
  *,
  pair="mean",
  metric="cosine",
  exact="auto",
  epsilon=0.05,
  blocks=0,
):
  """Rows such that every row of the pool has one like it among them.

  Greedy maximum of sum_i max_{j chosen} s_ij with s = (1 + cosine) / 2, at
  least 1 - 1/e of the best set. Exact for up to 20,000 rows: 2 N^2 W flops
  where their similarities fit into 512 MiB (11,585 rows), above a few times
  that. Larger pools draw candidates (`stochastic_greedy`), 2 N^2 W
  ln(1 / epsilon) flops whatever the budget.

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
  x = directions(pool, pair, metric)

  def check(n, m):
    host = _is_exact(exact, int(np.max(n)))
    work = 2.0 * np.sum(np.float64(n) ** 2) * x.shape[1]
    work *= 1 if host else math.log(1 / epsilon)
    refuse_long(work, "facility_location", BLOCKS, host=host)

  def greedy(x, ids, m, rows):
    if _is_exact(exact, len(x)):
      picks, _ = lazy_greedy(x, ids, m)
    else:
      picks, _ = stochastic_greedy(x, ids, m, seed, epsilon)
    return in_order(picks, len(x))

  return run_greedy(
    greedy, x, pool, budget, blocks=blocks, seed=seed, check=check
  )


def greedy_map(
  x: np.ndarray,
  quality: np.ndarray,
  ids: np.ndarray,
  budget: int,
  bandwidth: float,
) -> Selection:
  """Greedy maximum of log det L, Chen, Zhang and Zhou 2018.

  L_ij = q_i exp(-|x_i - x_j|^2 / (2 h^2)) q_j. d_i^2, how much of row i the
  chosen leave unexplained, starts as L_ii; the pick j is its argmax; then e_i
  = (L_ji - <c_j, c_i>) / d_j, c_i grows by e_i and d_i^2 falls by e_i^2: the
  next row of a Cholesky factor. N M^2 + 2 N M W flops, N M numbers. Rows
  that the chosen explain to 1e-10 follow by quality.

  Args:
    x: [N, W] float32.
    quality: [N] float64, above 0.
    ids: [N].
    budget: M.
    bandwidth: h.

  Returns:
    Selection in the order of the picks; the [N] score is d^2: of a pick, when
    it was picked; of the others, what is left.
  """
  n = len(x)
  near = np.float64(x) - x.mean(axis=0, dtype=np.float64)
  square = (near**2).sum(1)
  left = quality**2
  least = 1e-10 * left.max()
  factor = np.empty((budget, n))
  chosen, value, open_ = [], [], np.ones(n, bool)
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
    score[open_] = 0
    chosen += rows[order[: budget - len(chosen)]].tolist()
  return Selection(np.array(chosen, np.int64), score)


def _dpp_work(p: Sizes, width: int, **_) -> Work:
  numbers = max(8 * p.n * p.budget, bandwidth_bytes(p))
  return Work(
    p.n * p.budget**2 + 2 * p.n * p.budget * width,
    held=3 * 4 * p.n * width + numbers,
  )


@needs("embedding", optional=("reward",), cost=cost_in_blocks(_dpp_work))
def dpp(
  seed,
  pool,
  budget,
  *,
  metric="cosine",
  quality="",
  weight=1.0,
  bandwidth="median",
  blocks=0,
):
  """A good and diverse set: greedy MAP of a determinantal point process.

  L = q_i S_ij q_j with a Gaussian kernel S (of full rank, so that a budget
  above the width of the embedding still has something to rank) of the mean of
  a pair's vectors, and q = exp(weight z), z the standardised quality of the
  chosen response; see `greedy_map`.

  Args:
    pool: `embedding` [N, R, E]; the column that `quality` names.
    budget: M; N x M is at most 10^9 (in blocks: of the largest).
    quality: "" for none, or a column [N, R], "reward" for instance.
    weight: of the quality against diversity.
    bandwidth: h, or "median", the median distance between 512 rows.

  Returns:
    Selection in the order of the picks; the [N] score is what the rows before
    it left unexplained (in blocks: 1 down to 1/M, 0 for the others).
  """
  x = vectors(pool, "mean", metric)
  q = np.ones(len(x))
  if quality:
    value = one_side(column(pool, quality), "chosen")
    q = np.exp(weight * (value - value.mean()) / (value.std() or 1.0))
  bandwidth = check_bandwidth(bandwidth, x, pool.ids)

  def check(n, m):
    n = np.float64(n)
    what = "dpp keeps N x M numbers, and N x M"
    refuse_above(np.max(n * m), DPP_NUMBERS, what, BLOCKS)
    work = np.sum(n * m**2 + 2 * n * m * x.shape[1])
    refuse_long(work, "dpp", BLOCKS, host=True)

  def greedy(x, ids, m, rows):
    return greedy_map(x, q[rows], ids, m, bandwidth)

  return run_greedy(
    greedy, x, pool, budget, blocks=blocks, seed=seed, check=check
  )
