"""Bradley-Terry heads that never saw the row they judge.

Columns are scaled, rotated and cut without a look at a label, as ROWS of the
pool's rows, drawn by a hash, say, and turning a pair around only turns its
row's sign. A larger pool is judged in chunks: what is held does not grow with
it. Sums over wide columns run on the mesh in fixed chunks; the heads
themselves, on 256 columns at most, in float64 on the host, rows in id order:
no bit depends on the devices. Newton's method is our own, not scikit-learn's:
a fit has an offset and begins at another fold's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy.special import expit

from jaxalign.select import chunks, exact
from jaxalign.select.costs import Work
from jaxalign.select.topk import uniform

ROWS = 1 << 17  # that heads are fitted to, and of a chunk that is judged
COLUMNS = 256  # of one head; wider features are rotated and cut to these
LEAST_GAIN = 0.003  # nats below chance that a head must predict labels by
LONG_ROW = 1.5  # times the median length: longer rows are clipped to it
STEPS = 50  # of Newton's method; 8 are usually enough


def in_chunks(group: np.ndarray) -> list[np.ndarray]:
  """Row numbers of chunks of about ROWS rows, prompts whole, drawn by hash.

  Args:
    group: [N] names of prompts.

  Returns:
    [n] int64 each, ascending; one of all rows where ROWS hold them.
  """
  if len(group) <= ROWS:
    return [np.arange(len(group))]
  names, inverse, size = np.unique(
    np.asarray(group, np.str_), return_inverse=True, return_counts=True
  )
  order = np.argsort(uniform(0, names, "crossfit chunk"), kind="stable")
  chunk = np.empty(len(names), np.int64)
  chunk[order] = (np.cumsum(size[order]) - 1) // ROWS
  chunk = chunk[inverse]
  ends = np.cumsum(np.bincount(chunk))
  found = np.split(np.argsort(chunk, kind="stable"), ends[:-1])
  return [rows for rows in found if rows.size]


def column_scale(x: np.ndarray) -> np.ndarray:
  """[W] float32 that gives the columns of x [n, W] a root mean square of 1."""
  size = np.sqrt(np.einsum("nw,nw->w", x, x, dtype=np.float64) / len(x))
  return np.where(size > 0, 1 / np.maximum(size, 1e-30), 0.0).astype(np.float32)


def scaled(x: np.ndarray) -> np.ndarray:
  """[n, W] -> float32, each column of root mean square 1."""
  x = np.float32(x)
  return x * column_scale(x)


def _rotate_chunk(basis, x):
  """[W, P], [T, W] -> [T, P]."""
  return jnp.einsum("tw,wp->tp", x, basis, precision=jax.lax.Precision.HIGHEST)


def principal(
  x: np.ndarray, columns: int = COLUMNS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The directions in which rows are longest, and the rows along them.

  Args:
    x: [n, W] float32, from `scaled`.
    columns: P is at most this; directions that no row has are left out.

  Returns:
    [n, P] float64, most length first; [P] float64 mean squares; [W, P] the
    directions. Where there are fewer rows than columns, by way of the products
    of rows: O(n^2 W).
  """
  n, width = x.shape
  few = columns < n < width
  if few:
    x = x.astype(np.float64)
    gram = x @ x.T / n
  elif width <= columns:
    gram = x.T.astype(np.float64) @ x / n
  else:
    mesh = chunks.own_mesh()
    with jax.set_mesh(mesh):
      gram = exact.gram_of(mesh, x) / n
  if not len(gram):
    return np.zeros((n, 0)), np.zeros(0), np.zeros((width, 0))
  most = (max(0, len(gram) - columns), len(gram) - 1)
  value, vector = scipy.linalg.eigh((gram + gram.T) / 2, subset_by_index=most)
  keep = min(columns, int((value > 1e-6 * value.max(initial=0)).sum()))
  value, vector = value[::-1][:keep], vector[:, ::-1][:, :keep]
  if not keep:  # rows of zeros
    return np.zeros((n, 0)), value, np.zeros((width, 0))
  if few:  # a direction's largest entry is above 0, however rows are turned
    along = x.T @ vector
    largest = np.abs(along).argmax(axis=0)
    size = np.sign(along[largest, np.arange(keep)]) * np.sqrt(n * value)
    return vector * size, value, along / size
  return rotated(x, vector, columns), value, vector


def rotated(x: np.ndarray, vector: np.ndarray, columns: int) -> np.ndarray:
  """[n, P] float64, rows [n, W] along the directions of `principal`."""
  if x.shape[1] <= columns:
    return x.astype(np.float64) @ vector
  return np.float64(chunks.by_row(_rotate_chunk, chunks.place(x), vector))


def principal_work(n: float, width: int, columns: int) -> Work:
  """What `principal` multiplies; on the devices rows, and of half the products
  of columns two whole numbers each."""
  few = columns < n < width
  if few or width <= columns:
    return Work(2 * n * width * ((n if few else width) + columns))
  upper = sum(
    (end - start) * (width - start) for start, end in exact.column_chunks(width)
  )
  flops = 2 * n * (upper + width * columns)
  return Work(devices=flops, device=4 * n * width + 8 * width**2)


def differences(
  value: np.ndarray, group: np.ndarray, alone: np.ndarray | None = None
) -> np.ndarray:
  """[n, R, W] of responses -> [n, W] float32 of rows, as a head reads them.

  Pairs: chosen minus rejected, not centred: a pair turned around is its
  negative. Single responses are taken from the mean of their prompt's, or,
  where the prompt has one, from the mean of all such: of these, or `alone`.
  """
  if value.shape[1] == 2:
    return np.float32(value[:, 0]) - np.float32(value[:, 1])
  x = np.float32(value[:, 0])
  mean, inverse = _prompt_means(x, group)
  if alone is not None:
    mean[0] = alone
  return x - np.float32(mean)[inverse]


def _prompt_means(
  x: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """[G, W] means of prompts, the first of those with one row; [n] which."""
  _, inverse, size = np.unique(group, return_inverse=True, return_counts=True)
  inverse = np.where(size[inverse] > 1, inverse + 1, 0)
  total = np.zeros((inverse.max(initial=0) + 1, x.shape[1]))
  np.add.at(total, inverse, x)
  count = np.maximum(np.bincount(inverse, minlength=len(total)), 1)
  return total / count[:, None], inverse


class View(NamedTuple):
  """How heads read a part of the features: fitted to rows, not to labels."""

  alone: np.ndarray | None  # [W] mean of single responses alone with a prompt
  scale: np.ndarray  # [W]
  vector: np.ndarray | None  # [W, P] of wide parts, which are rotated and cut

  def of(self, part: np.ndarray, group: np.ndarray) -> np.ndarray:
    """[n, R, W] -> [n, P] float64."""
    x = differences(part, group, self.alone) * self.scale
    return (
      np.float64(x) if self.vector is None else rotated(x, self.vector, COLUMNS)
    )


def fit_view(part: np.ndarray, group: np.ndarray) -> tuple[View, np.ndarray]:
  """The view that rows [n, R, W] give, and they themselves in it [n, P]."""
  alone = None
  if part.shape[1] == 1:
    alone = _prompt_means(np.float32(part[:, 0]), group)[0][0]
  x = differences(part, group, alone)
  scale = column_scale(x)
  x *= scale
  if x.shape[1] <= COLUMNS:
    return View(alone, scale, None), np.float64(x)
  along, _, vector = principal(x)
  return View(alone, scale, vector), along


def explained(x: np.ndarray, habit: np.ndarray) -> np.ndarray:
  """[H, P] by which a habit [n, H] explains columns x [n, P]: least squares.

  No sum of the columns less `habit @ explained(x, habit)` is correlated with a
  habit, over rows that are each turned around by chance. Turning a row changes
  only its own sign.
  """
  return np.linalg.lstsq(habit, x, rcond=None)[0]


def longest(x: np.ndarray) -> float:
  """LONG_ROW times the median length of rows [n, P]."""
  return LONG_ROW * np.median(np.sqrt(np.einsum("np,np->n", x, x)))


def clipped(x: np.ndarray, most: float) -> np.ndarray:
  """[n, P] rows, none longer than `most`.

  Rows of random words are longer than others and would lead the head.
  """
  length = np.sqrt(np.einsum("np,np->n", x, x))
  return x * np.minimum(1, most / np.maximum(length, 1e-300))[:, None]


class Density(NamedTuple):
  """Probabilistic PCA, up to a constant, of rows as `fit_density` saw them."""

  center: np.ndarray  # [W]
  scale: np.ndarray  # [W]
  vector: np.ndarray  # [W, P], what have a variance of their own
  value: np.ndarray  # [P] mean squares
  floor: float  # of what is left over, each
  columns: int  # see `principal`

  def of(self, x: np.ndarray) -> np.ndarray:
    """[n, W] -> [n] nats, how typical each row is."""
    x = (np.float32(x) - self.center) * self.scale
    along = rotated(x, self.vector, self.columns)
    return self.score(along, left_over(x, along))

  def score(self, along: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """[n, P], [n] -> [n]."""
    near = (along**2 / (self.value + self.floor)).sum(1)
    return -0.5 * (near + rest / self.floor)


def left_over(x: np.ndarray, along: np.ndarray) -> np.ndarray:
  """[n] squared length of rows less that along some directions."""
  square = np.einsum("nw,nw->n", x, x, dtype=np.float64)
  return np.maximum(square - (along**2).sum(1), 0)


def fit_density(x: np.ndarray) -> tuple[Density, np.ndarray]:
  """How typical rows [n, W] are of themselves [n], and what says so of others.

  Columns are centred and scaled; the n / 40 longest directions, 64 at most,
  have their own variance, what is left over shares one.
  """
  x = np.array(x, np.float32)
  center = x.mean(axis=0, dtype=np.float64).astype(np.float32)
  x -= center
  scale = column_scale(x)
  x *= scale
  columns = max(1, min(64, len(x) // 40))
  along, value, vector = principal(x, columns)
  rest = left_over(x, along)
  floor = max(rest.mean() / max(1, x.shape[1] - columns), 1e-6)
  found = Density(center, scale, vector, value, floor, columns)
  return found, found.score(along, rest)


def fit(
  x: np.ndarray,
  y: np.ndarray,
  ridge: float,
  offset: float = 0.0,
  start: np.ndarray | None = None,
) -> np.ndarray:
  """argmin over b of sum log(1 + exp(-y (x.b + offset))) + ridge/2 |b|^2.

  Newton's method, a step halved while it does not descend.

  Args:
    x: [n, P] float64. Of pairs chosen minus rejected, and no intercept: the
      Bradley-Terry model.
    y: [n] 1 or -1; of pairs all 1.
    ridge: above 0.
    offset: log-odds of a row of zeros.
    start: [P], where to begin.
  """
  b = np.zeros(x.shape[1]) if start is None else start

  def loss(b):
    return np.logaddexp(0, -y * (x @ b + offset)).sum() + ridge / 2 * b @ b

  now = loss(b)
  for _ in range(STEPS):
    wrong = expit(-y * (x @ b + offset))
    slope = ridge * b - x.T @ (y * wrong)
    curve = (x * (wrong * (1 - wrong))[:, None]).T @ x
    curve[np.diag_indices_from(curve)] += ridge
    # Not SciPy's: its BLAS has threads of its own, and two pools that wait
    # by spinning make small products several times slower.
    step = np.linalg.solve(curve, slope)
    gain = slope @ step
    size = 1.0
    while (after := loss(b - size * step)) > now and size > 1e-6:
      size /= 2
    if after > now:
      break
    b, now = b - size * step, after
    if gain < 1e-9 * len(x):
      break
  return b


def folds(seed: int, group: np.ndarray, count: int, purpose: str) -> np.ndarray:
  """[n] names of groups -> [n] from 0 to count - 1, alike within a group.

  A hash of (seed, name): a group stays in its fold whatever other rows come.
  """
  names, inverse = np.unique(np.asarray(group, np.str_), return_inverse=True)
  return (uniform(seed, names, purpose) * count).astype(np.int64)[inverse]


class Folds(NamedTuple):
  """A head for each fold, fitted to the rows of the others."""

  b: np.ndarray  # [K, P]
  offset: np.ndarray  # [K] log-odds of the other folds' labels; 0 of pairs
  fitted: np.ndarray  # [K] bool; a fold that has no other rows has no head

  def judge(
    self, x: np.ndarray, y: np.ndarray, fold: np.ndarray, unread: int = 0
  ) -> tuple[np.ndarray, np.ndarray]:
    """Margins y (x.b) [n] by the heads that did not see a fold, and losses.

    Args:
      x, y: as for `fit`.
      fold: [n] from `folds`.
      unread: so many of the last columns explain what labels owe to them, and
        count for nothing.

    Returns:
      margin [n]; loss [n], nats, of the margin and the offset.
    """
    margin, loss = np.zeros(len(x)), np.full(len(x), np.log(2))
    read = self.b.shape[1] - unread
    for k in np.flatnonzero(self.fitted):
      own = fold == k
      margin[own] = y[own] * (x[own, :read] @ self.b[k, :read])
      loss[own] = np.logaddexp(0, -margin[own] - y[own] * self.offset[k])
    return margin, loss


def fit_folds(
  x: np.ndarray,
  y: np.ndarray,
  fold: np.ndarray,
  ridge: float,
  start: np.ndarray | None = None,
) -> tuple[Folds, np.ndarray | None]:
  """A head for each fold, fitted to the rows of the others.

  Args:
    x, y: as for `fit`.
    fold: [n] from `folds`.
    ridge: for one row: `fit` has it times the rows that it sees.
    start: of the first fold's fit; the others begin at the one before.

  Returns:
    The heads; the last b, or `start`.
  """
  count, b = int(fold.max(initial=0)) + 1, start
  out = Folds(
    np.zeros((count, x.shape[1])), np.zeros(count), np.zeros(count, bool)
  )
  differ = (y != y[0]).any() if len(y) else False
  for k in range(count):
    own = fold == k
    others = ~own
    if not own.any() or not others.any():
      continue
    if differ:
      liked = np.clip((y[others] > 0).mean(), 1e-3, 1 - 1e-3)
      out.offset[k] = np.log(liked / (1 - liked))
    ridges = ridge * others.sum()
    b = fit(x[others], y[others], ridges, float(out.offset[k]), b)
    out.b[k], out.fitted[k] = b, True
  return out, b


def choose_ridge(
  x: np.ndarray,
  y: np.ndarray,
  fold: np.ndarray,
  ridges: Sequence[float],
  unread: int = 0,
) -> tuple[int, list[float]]:
  """Which ridge has the least out-of-fold loss, and the losses of all."""
  losses, start = [0.0] * len(ridges), None
  for i in reversed(range(len(ridges))):  # the smooth one first
    found, start = fit_folds(x, y, fold, ridges[i], start)
    losses[i] = float(found.judge(x, y, fold, unread)[1].mean())
  return int(np.argmin(losses)), losses
