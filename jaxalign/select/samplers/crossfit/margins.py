"""Margins by heads that never saw the row, and how far a gate trusts them.

Bradley-Terry heads (logistic, on the difference of two answers) are fitted to
the rows of other prompts; a boosted gate learns, blind to labels, where heads
and labels agree.
"""

from typing import NamedTuple

import numpy as np
import threadpoolctl

from jaxalign.core import progress
from jaxalign.core.errors import ConfigError
from jaxalign.select import grams
from jaxalign.select.costs import ID_BYTES, Sizes, Work
from jaxalign.select.samplers.crossfit import heads

RIDGES = (0.001, 0.004, 0.015, 0.06, 0.25, 1.0, 4.0)  # for one row
FOLDS, RIDGE_FOLDS, RIDGE_ROWS = 5, 3, 4000
NEWTON = 5  # steps of a fit that starts at another fold's, for the plan
SLICE_ROWS = 200  # a slice with fewer has no heads of its own


class Labelled(NamedTuple):
  """What heads read of N rows, and the labels."""

  parts: dict[str, np.ndarray]  # of the features, each [all rows, R, W]
  heads: tuple[tuple[str, ...], ...]  # the parts of each
  group: np.ndarray  # [N] names of prompts
  rows: np.ndarray  # [N] which rows of the parts
  label: np.ndarray | None = None  # [N] bool of unpaired rows; None for pairs
  habit: np.ndarray | None = None  # [N, H] what no head may use

  def signs(self) -> np.ndarray:
    """[N] 1 or -1; of pairs all 1."""
    if self.label is None:
      return np.ones(len(self.group))
    return np.where(self.label, 1.0, -1.0)

  def take(self, rows: np.ndarray) -> "Labelled":
    """Some of the rows; the parts are not copied."""
    return self._replace(
      group=self.group[rows],
      rows=self.rows[rows],
      label=None if self.label is None else self.label[rows],
      habit=None if self.habit is None else self.habit[rows],
    )


class Margins(NamedTuple):
  """What the heads say, none of which saw the row."""

  mean: np.ndarray  # [N], of the heads, each of median size 1, by their gain
  spread: np.ndarray  # [N], how far they differ, of the mean's size
  loss: np.ndarray  # [N] nats, of the best head
  chance: float  # nats, of who knows only how common each label is

  @property
  def accuracy(self) -> float:
    """Fraction of labels that the mean agrees with."""
    return float((self.mean > 0).mean())


def _chance(label: np.ndarray | None) -> float:
  if label is None:
    return float(np.log(2))
  liked = np.clip(label.mean(), 1e-9, 1 - 1e-9)
  return float(-liked * np.log(liked) - (1 - liked) * np.log(1 - liked))


class _Head(NamedTuple):
  """A head at two ridges, and what is done to its columns first."""

  parts: tuple[str, ...]
  longest: float  # of its rows; longer ones are clipped
  explained: np.ndarray | None  # [H, P] by a habit
  ridges: list[heads.Folds]


def _columns(
  head: _Head, parts: dict[str, np.ndarray], habit: np.ndarray | None
) -> np.ndarray:
  """[n, P] what the head reads of rows; a habit's columns come last."""
  x = np.concatenate([parts[name] for name in head.parts], axis=1)
  x = heads.clipped(x, head.longest)
  if habit is None:
    return x
  # Tenfold, so that the ridge leaves the habit alone.
  return np.concatenate([x - habit @ head.explained, 10 * habit], axis=1)


def _fit_head(
  data: Labelled,
  parts: dict[str, np.ndarray],
  names: tuple[str, ...],
  fold: np.ndarray,
  tuning: np.ndarray,
) -> _Head:
  """A head of these parts at its best ridge and the next larger.

  `tuning` [N] are the folds of the rows that choose the ridge, -1 of others.
  """
  y, habit, unread = data.signs(), data.habit, 0
  x = np.concatenate([parts[name] for name in names], axis=1)
  head = _Head(names, heads.longest(x), None, [])
  if habit is not None:
    unread, x = habit.shape[1], heads.clipped(x, head.longest)
    head = head._replace(explained=heads.explained(x, habit))
  x, few = _columns(head, parts, habit), np.flatnonzero(tuning >= 0)
  i, _ = heads.choose_ridge(x[few], y[few], tuning[few], RIDGES, unread)
  best = RIDGES[i : i + 2]
  fits = [heads.fit_folds(x, y, fold, ridge)[0] for ridge in best]
  return head._replace(ridges=fits)


def margins(seed: int, data: Labelled) -> Margins:
  """Out-of-fold margins of every head, at its best ridge and the next larger.

  The best ridge has the least out-of-fold loss on the observed labels of some
  4,000 rows; folds hold whole prompts. Of a pool above `heads.ROWS` rows a
  fair sample of so many is what heads are fitted to, and all rows are judged.
  A head counts by how far its loss is below chance: one that predicts nothing
  has no vote. A habit explains what it can of the labels, and features are
  taken without what it explains.

  Args:
    seed: of the folds.
    data: see `Labelled`.
  """
  chunks = heads.in_chunks(data.group)
  first, n = data.take(chunks[0]), len(data.group)
  fold = heads.folds(seed, data.group, FOLDS, "crossfit")
  tuning = heads.folds(seed, first.group, RIDGE_FOLDS, "crossfit ridge")
  draw = heads.folds(seed, first.group, 1_000_000, "crossfit rows")
  most = max(len(draw), RIDGE_ROWS)
  tuning = np.where(draw < 1e6 * RIDGE_ROWS / most, tuning, -1)
  views, parts = {}, {}
  for name, part in data.parts.items():
    views[name], parts[name] = heads.fit_view(part[first.rows], first.group)
  fitted = [
    _fit_head(first, parts, names, fold[chunks[0]], tuning)
    for names in data.heads
  ]
  count = sum(len(head.ridges) for head in fitted)
  margin, loss = np.empty((count, n)), np.empty((count, n))
  unread = 0 if data.habit is None else data.habit.shape[1]
  with progress.bar("crossfit", n) as tick:
    for rows in chunks:
      some = data.take(rows)
      if rows is not chunks[0]:
        parts = {
          name: views[name].of(part[some.rows], some.group)
          for name, part in data.parts.items()
        }
      y, found = some.signs(), []
      for head in fitted:
        x = _columns(head, parts, some.habit)
        found += [
          ridge.judge(x, y, fold[rows], unread) for ridge in head.ridges
        ]
      for k, (m, each) in enumerate(found):
        margin[k, rows], loss[k, rows] = m, each
      tick(len(rows))
  size = np.median(np.abs(margin), axis=1, keepdims=True)
  margin /= np.where(size > 0, size, 1)
  chance = _chance(data.label)
  losses = loss.mean(axis=1)
  gains = np.maximum(0.0, chance - losses)
  weight = gains if gains.any() else np.ones(count)
  weight = weight / weight.sum()
  mean = weight @ margin
  spread = np.sqrt(weight @ (margin - mean) ** 2)
  best = loss[np.argmin(losses)].copy()
  return Margins(mean, spread / (np.abs(mean) + 0.3), best, chance)


def with_own_heads(
  seed: int, shared: Margins, data: Labelled, code: np.ndarray
) -> tuple[Margins, set[int]]:
  """Margins by heads of a slice's own where those predict its labels better.

  Better: by `heads.LEAST_GAIN` and two standard errors of the rows'
  differences in out-of-fold loss, in a slice of SLICE_ROWS rows or more.

  Args:
    seed, data: as of `margins`, which made `shared`.
    code: [N] from 0, the slice.

  Returns:
    The margins, and the codes of the slices that have their own.
  """
  mean, spread = shared.mean.copy(), shared.spread.copy()
  loss, own = shared.loss.copy(), set()
  for k in np.flatnonzero(np.bincount(code) >= SLICE_ROWS):
    rows = np.flatnonzero(code == k)
    fit = margins(seed, data.take(rows))
    gain = shared.loss[rows] - fit.loss
    error = gain.std() / np.sqrt(len(rows))
    if gain.mean() > heads.LEAST_GAIN + 2 * error:
      own.add(int(k))
      mean[rows], spread[rows], loss[rows] = fit.mean, fit.spread, fit.loss
  return shared._replace(mean=mean, spread=spread, loss=loss), own


def trust(
  seed: int, found: Margins, signs: dict[str, np.ndarray], group: np.ndarray
) -> np.ndarray:
  """[N] from 0 to 1: how often heads agree with labels on rows such as this.

  Gradient-boosted trees on what does not change when the two sides are
  exchanged, fitted to the rows of other prompts: they cannot read the label.

  Args:
    seed: of the folds.
    found: the margins.
    signs: [N, R] numbers; the least and the largest of a row are read.
    group: [N] names of prompts.
  """
  try:
    from sklearn.ensemble import HistGradientBoostingClassifier
  except ImportError as error:
    raise ConfigError(
      "crossfit's gate needs scikit-learn, which is not installed; pip "
      "install scikit-learn, or set config.select.sampler"
    ) from error
  z = [np.abs(found.mean), found.spread]
  for value in signs.values():
    z.append(value.min(axis=1))
    if value.shape[1] > 1:
      z.append(value.max(axis=1))
  z = np.stack(z, axis=1)
  agrees = found.mean > 0
  fold = heads.folds(seed, group, FOLDS, "crossfit gate")
  out = np.full(len(z), 0.5)
  # A fit is a second or less; on a busy machine OpenMP's threads that spin for
  # a core were seen to take minutes. Nor can a core change a bit so.
  with threadpoolctl.threadpool_limits(1, user_api="openmp"):
    for k in range(FOLDS):
      own, others = fold == k, fold != k
      if not own.any() or not others.any():
        continue
      if agrees[others].all() or not agrees[others].any():
        out[own] = agrees[others].mean()
        continue
      gate = HistGradientBoostingClassifier(
        max_iter=80,
        learning_rate=0.08,
        max_leaf_nodes=8,
        min_samples_leaf=60,
        l2_regularization=5,
        early_stopping=False,
        random_state=0,
        monotonic_cst=[1] + [0] * (z.shape[1] - 1),
      )
      gate.fit(z[others], agrees[others])
      out[own] = gate.predict_proba(z[own])[:, 1]
  return out


def predictable(found: Margins) -> tuple[bool, str]:
  """Whether any head predicts labels better than chance, and the numbers.

  Of shuffled labels none does: a mean loss that is not below chance by
  `heads.LEAST_GAIN` and two standard errors says nothing about any label.
  """
  gain = found.chance - found.loss.mean()
  error = found.loss.std() / np.sqrt(len(found.loss))
  text = (
    f"out-of-fold loss {found.loss.mean():.4f} nats, chance "
    f"{found.chance:.4f}, standard error {error:.4f}"
  )
  return bool(gain > heads.LEAST_GAIN + 2 * error), text


def heads_work(p: Sizes, *widths: tuple[int, ...]) -> Work:
  """Heads, each on parts of these widths, which are rotated once.

  Then Newton steps of each head at two ridges in every fold; the search for
  the best ridge runs on some 4,000 rows. A large pool's heads are fitted to
  `heads.ROWS` of its rows, and the others only rotated.
  """
  tokens, n = grams.WIDTH // 2, min(p.n, heads.ROWS)
  parts = {w for head in widths for w in head}
  typical, keep = [tokens, *{p.e} & parts], max(1, min(64, int(n * p.r) // 40))
  wide = [(1, w, heads.COLUMNS) for w in parts if w > heads.COLUMNS]
  wide += [(p.r, w, keep) for w in typical if w > keep]
  turned = [heads.principal_work(n * r, w, cut) for r, w, cut in wide]
  others = 2 * (p.n - n) * sum(r * w * cut for r, w, cut in wide)
  few = min(n, RIDGE_ROWS)
  fits = 2 * FOLDS * n * (1 - 1 / FOLDS)
  fits += len(RIDGES) * RIDGE_FOLDS * few * (1 - 1 / RIDGE_FOLDS)
  columns = [sum(min(w, heads.COLUMNS) for w in head) for head in widths]
  newton = sum(fits * NEWTON * 2 * c**2 for c in columns)
  # What is scaled, less its mean and laid out, and sums in float64; or the
  # heads' rows. Of all rows a few numbers.
  sums = [40 * w**2 for (_, w, _), t in zip(wide, turned) if t.device]
  laid = 3 * 4 * n * p.r * max(typical) + max(sums, default=0)
  whole = sum(min(w, heads.COLUMNS) for w in parts)
  return Work(
    newton + sum(t.host for t in turned),
    sum(t.devices for t in turned) + others,
    max(laid, 8 * n * (whole + 4.5 * max(columns))) + 2 * ID_BYTES * p.n,
    max((t.device for t in turned), default=0),
  )
