"""Bradley-Terry heads that never saw the row they judge.

Columns are scaled, rotated and cut without a look at a label, and turning a
pair around only turns its row's sign. Sums over wide columns run on the mesh
in fixed chunks; the heads themselves, on 256 columns at most, in float64 on
the host, rows in id order: no bit depends on the devices. Newton's method is
our own, not scikit-learn's: a fit has an offset and begins at another fold's.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy.special import expit

from jaxalign.select import chunks, exact
from jaxalign.select.costs import Work
from jaxalign.select.topk import uniform

COLUMNS = 256  # of one head; wider features are rotated and cut to these
LEAST_GAIN = 0.003  # nats below chance that a head must predict labels by
LONG_ROW = 1.5  # times the median length: longer rows are clipped to it
STEPS = 50  # of Newton's method; 8 are usually enough


def scaled(x: np.ndarray, center: np.ndarray | None = None) -> np.ndarray:
  """[n, W] -> float32, less `center` [W], each column of root mean square 1."""
  x = x.astype(np.float32)
  if center is not None:
    x -= center.astype(np.float32)
  size = np.sqrt(np.einsum("nw,nw->w", x, x, dtype=np.float64) / len(x))
  return x * np.where(size > 0, 1 / np.maximum(size, 1e-30), 0.0).astype(
    np.float32
  )


def _rotate_chunk(basis, x):
  """[W, P], [T, W] -> [T, P]."""
  return jnp.einsum("tw,wp->tp", x, basis, precision=jax.lax.Precision.HIGHEST)


def principal(
  x: np.ndarray, columns: int = COLUMNS
) -> tuple[np.ndarray, np.ndarray]:
  """The directions in which rows are longest, and the rows along them.

  Args:
    x: [n, W] float32, from `scaled`.
    columns: P is at most this; directions that no row has are left out.

  Returns:
    [n, P] float64, most length first; [P] float64 mean squares. Where there
    are fewer rows than columns, by way of the products of rows: O(n^2 W).
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
    return np.zeros((n, 0)), np.zeros(0)
  most = (max(0, len(gram) - columns), len(gram) - 1)
  value, vector = scipy.linalg.eigh((gram + gram.T) / 2, subset_by_index=most)
  keep = min(columns, int((value > 1e-6 * value.max(initial=0)).sum()))
  value, vector = value[::-1][:keep], vector[:, ::-1][:, :keep]
  if not keep:  # rows of zeros
    return np.zeros((n, 0)), value
  if few:  # a direction's largest entry is above 0, however rows are turned
    along = x.T @ vector
    largest = np.abs(along).argmax(axis=0)
    sign = np.sign(along[largest, np.arange(keep)])
    return vector * (sign * np.sqrt(n * value)), value
  if width <= columns:
    return x.astype(np.float64) @ vector, value
  placed = chunks.place(x)
  return np.float64(chunks.by_row(_rotate_chunk, placed, vector)), value


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


def differences(value: np.ndarray, group: np.ndarray) -> np.ndarray:
  """[N, R, W] of responses -> [N, W] float32 of rows, as a head reads them.

  Pairs: chosen minus rejected, not centred: a pair turned around is its
  negative. Single responses are taken from the mean of their prompt's, or,
  where the prompt has one, from the mean of all such.
  """
  if value.shape[1] == 2:
    return np.float32(value[:, 0]) - np.float32(value[:, 1])
  x = np.float32(value[:, 0])
  _, inverse, size = np.unique(group, return_inverse=True, return_counts=True)
  inverse = np.where(size[inverse] > 1, inverse + 1, 0)  # 0: alone
  total = np.zeros((inverse.max(initial=0) + 1, x.shape[1]))
  np.add.at(total, inverse, x)
  count = np.maximum(np.bincount(inverse, minlength=len(total)), 1)
  return x - np.float32(total / count[:, None])[inverse]


def without(x: np.ndarray, habit: np.ndarray) -> np.ndarray:
  """[N, P] less what least squares on habit [N, H] says of each column.

  No sum of the columns is then correlated with a habit, over rows that are
  each turned around by chance. Turning a row changes only its own sign.
  """
  return x - habit @ np.linalg.lstsq(habit, x, rcond=None)[0]


def clipped(x: np.ndarray) -> np.ndarray:
  """[n, P] rows, none longer than LONG_ROW times the median.

  Rows of random words are longer than others and would lead the head.
  """
  length = np.sqrt(np.einsum("np,np->n", x, x))
  most = LONG_ROW * np.median(length)
  return x * np.minimum(1, most / np.maximum(length, 1e-300))[:, None]


def typical(x: np.ndarray) -> np.ndarray:
  """[n] nats up to a constant, how typical a row is: probabilistic PCA.

  Args:
    x: [n, W] float32, centred, from `scaled`; the n / 40 longest directions,
      64 at most, have their own variance, what is left over shares one.
  """
  keep = max(1, min(64, len(x) // 40))
  along, value = principal(x, keep)
  rest = np.maximum(
    np.einsum("nw,nw->n", x, x, dtype=np.float64) - (along**2).sum(1), 0
  )
  floor = max(rest.mean() / max(1, x.shape[1] - keep), 1e-6)
  return -0.5 * ((along**2 / (value + floor)).sum(1) + rest / floor)


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


def out_of_fold(
  x: np.ndarray,
  y: np.ndarray,
  fold: np.ndarray,
  ridge: float,
  start: np.ndarray | None = None,
  unread: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """Margins y (x.b) [n], b fitted to the rows of the other folds.

  Args:
    x, y: as for `fit`.
    fold: [n] from `folds`.
    ridge: for one row: `fit` has it times the rows that it sees.
    start: of the first fold's fit; the others begin at the one before.
    unread: so many of the last columns are fitted, to explain what labels owe
      to them, and count for nothing in margin and loss.

  Returns:
    margin [n]; loss [n], nats, with the log-odds of the other folds' labels
    added where labels differ (a Bradley-Terry model has none); the last b.
  """
  margin, loss, b = np.zeros(len(x)), np.full(len(x), np.log(2)), start
  differ = (y != y[0]).any() if len(y) else False
  for k in range(int(fold.max(initial=0)) + 1):
    own = fold == k
    others = ~own
    if not own.any() or not others.any():
      continue
    offset = 0.0
    if differ:
      share = np.clip((y[others] > 0).mean(), 1e-3, 1 - 1e-3)
      offset = float(np.log(share / (1 - share)))
    b = fit(x[others], y[others], ridge * others.sum(), offset, b)
    read = len(b) - unread
    margin[own] = y[own] * (x[own, :read] @ b[:read])
    loss[own] = np.logaddexp(0, -margin[own] - y[own] * offset)
  return margin, loss, b


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
    _, loss, start = out_of_fold(x, y, fold, ridges[i], start, unread)
    losses[i] = float(loss.mean())
  return int(np.argmin(losses)), losses
