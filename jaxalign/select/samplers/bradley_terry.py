"""Margins by heads that never saw the row, and how far a gate trusts them.

Bradley-Terry heads (logistic, on the difference of two answers) are fitted to
the rows of other prompts; a boosted gate learns, blind to labels, where heads
and labels agree.
"""

from typing import NamedTuple

import numpy as np
import threadpoolctl

from jaxalign.core.errors import ConfigError
from jaxalign.select import grams
from jaxalign.select.costs import Sizes, Work
from jaxalign.select.samplers import habits, heads

RIDGES = (0.001, 0.004, 0.015, 0.06, 0.25, 1.0, 4.0)  # for one row
FOLDS, RIDGE_FOLDS, RIDGE_ROWS = 5, 3, 4000
NEWTON = 5  # steps of a fit that starts at another fold's, for the plan


class Margins(NamedTuple):
  """What the heads say, none of which saw the row."""

  mean: np.ndarray  # [N], of the heads, each of median size 1, by their gain
  spread: np.ndarray  # [N], how far they differ, of the mean's size
  loss: np.ndarray  # [N] nats, of the best head
  chance: float  # nats, of who knows only how common each label is
  accuracy: float  # share of labels that the mean agrees with
  ridges: list[float]


def _part(block: np.ndarray, group: np.ndarray) -> np.ndarray:
  """[N, R, W] -> [N, P] float64, see `lessons`."""
  part = heads.scaled(habits.differences(block, group))
  return (
    heads.principal(part)[0]
    if part.shape[1] > heads.COLUMNS
    else np.float64(part)
  )


def lessons(
  blocks: list[np.ndarray], group: np.ndarray, label: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
  """What a head is fitted to: [N, P] rows, and [N] 1 or -1.

  Pairs become differences, single responses what they differ by from others,
  see `habits.differences`.

  Args:
    blocks: parts [N, R, W] side by side; one wider than `heads.COLUMNS` is
      rotated and cut to them.
    group: [N] names of prompts.
    label: [N] bool of unpaired rows; None for pairs.
  """
  return _side_by_side([_part(block, group) for block in blocks], label)


def _side_by_side(
  parts: list[np.ndarray], label: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
  x = heads.shortened(np.concatenate(parts, axis=1))
  y = np.ones(len(x)) if label is None else np.where(label, 1.0, -1.0)
  return x, y


def margins(
  seed: int,
  blocks: list[list[np.ndarray]],
  group: np.ndarray,
  label: np.ndarray | None = None,
  habit: np.ndarray | None = None,
) -> Margins:
  """Out-of-fold margins of every head, at its best ridge and the next larger.

  The best ridge has the least out-of-fold loss on the observed labels of some
  4,000 rows; folds hold whole prompts. A head counts by how far its loss is
  below chance: one that predicts nothing has no vote.

  Args:
    seed: of the folds.
    blocks: of each head, parts [N, R, W].
    group: [N] names of prompts.
    label: [N] bool of unpaired rows; None for pairs.
    habit: [N, H] what no head may use: features are taken without what it
      explains of them, and it explains what it can of the labels.
  """
  fold = heads.folds(seed, group, FOLDS, "crossfit")
  tuning = heads.folds(seed, group, RIDGE_FOLDS, "crossfit ridge")
  few = np.flatnonzero(
    heads.folds(seed, group, 1_000_000, "crossfit rows")
    < 1e6 * RIDGE_ROWS / max(len(group), RIDGE_ROWS)
  )
  chance = float(np.log(2))
  if label is not None:
    share = np.clip(label.mean(), 1e-9, 1 - 1e-9)
    chance = float(-share * np.log(share) - (1 - share) * np.log(1 - share))
  parts = {}  # a part of two heads is rotated once
  for part in (part for block in blocks for part in block):
    if id(part) not in parts:
      parts[id(part)] = _part(part, group)
  found, best, gains, ridges = [], None, [], []
  unread = 0 if habit is None else habit.shape[1]
  for block in blocks:
    x, y = _side_by_side([parts[id(part)] for part in block], label)
    if habit is not None:  # tenfold, so that the ridge leaves it alone
      x = np.concatenate([habits.without(x, habit), 10 * habit], axis=1)
    i, _ = heads.choose_ridge(x[few], y[few], tuning[few], RIDGES, unread)
    for ridge in RIDGES[i : i + 2]:
      margin, loss, _ = heads.out_of_fold(x, y, fold, ridge, unread=unread)
      size = np.median(np.abs(margin))
      found.append(margin / size if size > 0 else margin)
      ridges.append(ridge)
      gains.append(max(0.0, chance - loss.mean()))
      if best is None or loss.mean() < best.mean():
        best = loss
  weight = np.array(gains) if any(gains) else np.ones(len(gains))
  weight /= weight.sum()
  mean = weight @ np.stack(found)
  spread = np.sqrt(weight @ (np.stack(found) - mean) ** 2)
  return Margins(
    mean,
    spread / (np.abs(mean) + 0.3),
    best,
    chance,
    float((mean > 0).mean()),
    ridges,
  )


def heads_work(p: Sizes, *widths: tuple[int, ...]) -> Work:
  """Heads, each on parts of these widths, which are rotated once.

  Then Newton steps of each head at two ridges in every fold; the search for
  the best ridge runs on some 4,000 rows.
  """
  tokens, sides = grams.WIDTH // 2, p.n * p.r
  parts = {w for head in widths for w in head}
  typical, keep = [tokens, *{p.e} & parts], max(1, min(64, int(sides) // 40))
  wide = [(p.n, w, heads.COLUMNS) for w in parts if w > heads.COLUMNS]
  wide += [(sides, w, keep) for w in typical if w > keep]
  turned = [heads.principal_work(*one) for one in wide]
  few = min(p.n, RIDGE_ROWS)
  fits = 2 * FOLDS * p.n * (1 - 1 / FOLDS)
  fits += len(RIDGES) * RIDGE_FOLDS * few * (1 - 1 / RIDGE_FOLDS)
  columns = [sum(min(w, heads.COLUMNS) for w in head) for head in widths]
  newton = sum(fits * NEWTON * 2 * c**2 for c in columns)
  # What is read: counts as float32, the others as float64. Then what is
  # scaled, less its mean and laid out, sums in float64; or the heads' rows.
  stored = sides * (4 * tokens + 8 * sum(parts - {tokens}))
  sums = [40 * w**2 for (_, w, _), t in zip(wide, turned) if t.device]
  laid = 3 * 4 * sides * max(typical) + max(sums, default=0)
  whole = sum(min(w, heads.COLUMNS) for w in parts)
  return Work(
    newton + sum(t.host for t in turned),
    sum(t.devices for t in turned),
    stored + max(laid, 8 * p.n * (whole + 4.5 * max(columns))),
    max((t.device for t in turned), default=0),
  )


def with_own_heads(
  seed: int,
  found: Margins,
  blocks: list[list[np.ndarray]],
  group: np.ndarray,
  label: np.ndarray | None,
  habit: np.ndarray | None,
  code: np.ndarray,
) -> tuple[Margins, set[int]]:
  """Margins by heads of a slice's own where those predict its labels better.

  Better: by `heads.LEAST_GAIN` and two standard errors of the rows'
  differences in out-of-fold loss, in a slice of `habits.SLICE_ROWS` rows or
  more.

  Args:
    seed, blocks, group, label, habit: as of `margins`, which made `found`.
    code: [N] from 0, the slice.

  Returns:
    The margins, and the codes of the slices that have their own.
  """
  mean, spread, loss = found.mean.copy(), found.spread.copy(), found.loss.copy()
  own, kept = set(), {}
  for k in np.flatnonzero(np.bincount(code) >= habits.SLICE_ROWS):
    rows = np.flatnonzero(code == k)
    for part in (part for block in blocks for part in block):
      kept[id(part)] = part[rows]
    some = [[kept[id(part)] for part in block] for block in blocks]
    fit = margins(
      seed,
      some,
      group[rows],
      None if label is None else label[rows],
      None if habit is None else habit[rows],
    )
    gain = found.loss[rows] - fit.loss
    if gain.mean() > heads.LEAST_GAIN + 2 * gain.std() / np.sqrt(len(rows)):
      own.add(int(k))
      mean[rows], spread[rows], loss[rows] = fit.mean, fit.spread, fit.loss
  return found._replace(
    mean=mean, spread=spread, loss=loss, accuracy=float((mean > 0).mean())
  ), own


def trusted(
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
      "crossfit's gate needs scikit-learn, which is not "
      "installed; pip install scikit-learn, or set "
      "config.select.sampler"
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
  said = (
    f"out-of-fold loss {found.loss.mean():.4f} nats, chance "
    f"{found.chance:.4f}, standard error {error:.4f}"
  )
  return bool(gain > heads.LEAST_GAIN + 2 * error), said
