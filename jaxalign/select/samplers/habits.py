"""What annotators may judge by that is no quality: length, whose rows they are.

Numbers for the notes of `crossfit`, which follows the labels, and what takes
a habit out of its heads.
"""

from collections.abc import Sequence

import numpy as np

from jaxalign.core.errors import ConfigError
from jaxalign.select.pool import Pool
from jaxalign.select.samplers import heads
from jaxalign.select.samplers.draws import apportion
from jaxalign.select.samplers.values import column
from jaxalign.select.topk import top

SLICE_ROWS = 200  # a slice with fewer has no heads of its own
NOTED_ROWS = 50  # and with fewer no note
ALONE = 0.2  # share of the heads' gain that length alone may have unremarked


def named(names: str | Sequence[str] | None) -> tuple[str, ...]:
  """A keyword that is None, one column or several."""
  return (names,) if isinstance(names, str) else tuple(names or ())


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


def columns(
  pool: Pool, names: tuple[str, ...], group: np.ndarray
) -> np.ndarray | None:
  """[N, H] float64 differences in the named columns [N, R]; None of none."""
  if not names:
    return None
  found = []
  for name in names:
    if name not in pool.columns:
      raise ConfigError(
        f"orthogonal names {name!r}, the pool has "
        f"{', '.join(sorted(pool.columns))}; set "
        "config.select.kwargs.orthogonal"
      )
    value = column(pool, name)
    if value.shape[1] != pool.grams.shape[1]:
      raise ConfigError(
        f"orthogonal names {name!r} with {value.shape[1]} numbers a row, "
        f"wanted one for each of {pool.grams.shape[1]} responses; set "
        "config.select.kwargs.orthogonal"
      )
    found.append(value)
  return np.float64(heads.scaled(differences(np.stack(found, 2), group)))


def without(x: np.ndarray, habit: np.ndarray) -> np.ndarray:
  """[N, P] less what least squares on habit [N, H] says of each column.

  No sum of the columns is then correlated with a habit, over rows that are
  each turned around by chance. Turning a row changes only its own sign.
  """
  return x - habit @ np.linalg.lstsq(habit, x, rcond=None)[0]


def alone(
  x: np.ndarray, y: np.ndarray, fold: np.ndarray
) -> tuple[float, float]:
  """Out-of-fold loss, nats, and accuracy of a head on x [N, H] alone."""
  margin, loss, _ = heads.out_of_fold(x, y, fold, 1e-3)
  # Equal lengths say nothing: half of them are right.
  return float(loss.mean()), float(((margin > 0) + (margin == 0) / 2).mean())


def length_note(
  lost: tuple[float, float],
  loss: float,
  accuracy: float,
  chance: float,
  cut: bool,
) -> list[str]:
  """A warning where length alone has ALONE of what the heads gain on chance.

  Args:
    lost: loss and accuracy of length alone.
    loss, accuracy, chance: of the heads, and of knowing nothing.
    cut: the heads do not use length.
  """
  gain, most = chance - lost[0], chance - loss
  if cut or gain < max(ALONE * most, heads.LEAST_GAIN):
    return []
  return [
    f"warning: length alone predicts {100 * lost[1]:.1f} % of labels, "
    f"the heads {100 * accuracy:.1f} % ({gain:.3f} of {most:.3f} nats "
    "below chance): labels that follow length are kept first; if length "
    "is no merit here, set config.select.kwargs.orthogonal to 'length'"
  ]


def gap(value: np.ndarray, label: np.ndarray | None, rows: np.ndarray) -> float:
  """Chosen less rejected, or liked less disliked, mean over some rows."""
  value = value[rows]
  if label is None:
    return float((value[:, 0] - value[:, 1]).mean())
  liked = label[rows]
  if liked.all() or not liked.any():
    return float("nan")
  return float(value[liked].mean() - value[~liked].mean())


def slice_codes(
  pool: Pool, names: tuple[str, ...]
) -> tuple[np.ndarray, list[str]]:
  """[N] int64 which combination of the columns' values a row has; names."""
  for name in names:
    if name not in pool.columns or np.ndim(pool.columns[name]) != 1:
      raise ConfigError(
        f"slices names {name!r}, which is no [N] column; the pool has "
        f"{', '.join(sorted(pool.columns))}; set "
        "config.select.kwargs.slices"
      )
  text = [
    ", ".join(map(str, row))
    for row in zip(*(np.asarray(pool.columns[n]).tolist() for n in names))
  ]
  found, code = np.unique(np.asarray(text, np.str_), return_inverse=True)
  return code, [str(name) for name in found]


def slice_notes(
  code: np.ndarray,
  names: list[str],
  by: str,
  agrees: np.ndarray,
  kept: np.ndarray,
  own: set[int],
  proportional: bool,
) -> list[str]:
  """What is said of slices whose labels contradict the shared heads.

  A slice does where the heads agree with fewer than half of its labels by two
  standard errors, or with so few more that less than half of its share is
  kept.

  Args:
    code: [N] from 0; names: of the codes; by: the columns that make them.
    agrees: [N] bool, whether shared heads agree with the label.
    kept: row numbers.
    own: codes of slices whose own heads are used.
    proportional: each slice keeps its share.
  """
  notes = []
  size = np.bincount(code, minlength=len(names))
  for k in np.flatnonzero(size >= NOTED_ROWS):
    share, got = size[k] / len(code), float((code[kept] == k).mean())
    right = float(agrees[code == k].mean())
    error = np.sqrt(right * (1 - right) / size[k])
    said = (
      f"{by} {names[k]!r} ({100 * share:.1f} % of rows): shared heads "
      f"agree with {100 * right:.1f} % of its labels"
    )
    if k in own:
      notes.append(
        f"{said}, heads of its own judge it; {100 * got:.1f} % of what is kept"
      )
    elif right + 2 * error < 0.5 or got < share / 2 and not proportional:
      notes.append(
        f"warning: {said}, and it is {100 * got:.1f} % of what is kept: it "
        "may prefer otherwise, and the majority is followed"
        + (
          "" if proportional else f"; set config.select.kwargs.slices to {by!r}"
        )
      )
  return notes[:8]


def by_share(
  score: np.ndarray, pool: Pool, budget: int, code: np.ndarray
) -> np.ndarray:
  """The best rows, as many of each code as its share of the pool."""
  room = np.bincount(code)
  rows = []
  for k, count in enumerate(apportion(np.float64(room), room, budget)):
    own = np.flatnonzero(code == k)
    rows.append(own[top(score[own], pool.ids[own], int(count))])
  rows = np.sort(np.concatenate(rows))
  return rows[top(score[rows], pool.ids[rows], rows.size)]
