"""From columns of the pool to one finite number a row, and its ranking."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.core.errors import ConfigError
from jaxalign.select.pool import Pool, Selection
from jaxalign.select.topk import refuse_rows, top

DIRECTIONS = ("top", "middle", "low")
_SIDES = {
  "chosen": lambda chosen, rejected: chosen,
  "rejected": lambda chosen, rejected: rejected,
  "mean": lambda chosen, rejected: (chosen + rejected) / 2,
  "sum": np.add,
  "min": np.minimum,
  "max": np.maximum,
  "difference": np.subtract,
}
SIDES = tuple(_SIDES)


def require(
  holds: bool,
  name: str,
  value: Any,
  wanted: str | Sequence[str],
  knob: str = "kwargs.",
) -> None:
  """Raises ConfigError unless a sampler's keyword `holds`.

  Args:
    holds, name, value: of the keyword.
    wanted: in words, or the values that it may have.
    knob: the section of config.select that it is in.
  """
  if not holds:
    if not isinstance(wanted, str):
      wanted = f"one of {', '.join(wanted)}"
    raise ConfigError(
      f"{name} is {value!r}, wanted {wanted}; set config.select.{knob}{name}"
    )


def is_count(value: Any, least: int = 1) -> bool:
  """Whether a keyword is a whole number, `least` or more."""
  if isinstance(value, (bool, str)):
    return False
  return int(value) == value and value >= least


def not_finite(value: np.ndarray) -> np.ndarray:
  """[N] bool, which rows [N, ...] have a NaN or an infinity."""
  bad = np.zeros(len(value), bool)
  if value.dtype.kind not in "biu":
    for start in range(0, len(value), 1 << 16):
      rows = slice(start, start + (1 << 16))
      good = np.isfinite(value[rows])
      bad[rows] = ~good.reshape(len(good), -1).all(axis=1)
  return bad


def check_finite(value: np.ndarray, ids: np.ndarray, what: str) -> None:
  """Refuses, by id, rows [N, ...] with a NaN or an infinity."""
  advice = f"wanted numbers, look at what made the pool's {what}"
  refuse_rows(not_finite(value), ids, f"a {what} that is not finite", advice)


def finite(value: np.ndarray, ids: np.ndarray, what: str) -> np.ndarray:
  """[N, ...] as float64; a row with a NaN or an infinity is refused by id."""
  value = np.asarray(value, np.float64)
  check_finite(value, ids, what)
  return value


def column(pool: Pool, name: str, *, pairs: bool = False) -> np.ndarray:
  """[N, R] float64, finite, of a column that is [N, R] or [N]; with `pairs`,
  single responses are refused."""
  value = finite(getattr(pool, name), pool.ids, name)
  if value.ndim == 1:
    value = value[:, None]
  if value.ndim != 2:
    raise ConfigError(f"column {name!r} has shape {value.shape}, wanted [N, R]")
  if pairs and value.shape[1] != 2:
    raise ConfigError(
      f"this sampler compares the two responses of a pair; {name!r} has "
      f"{value.shape[1]} a row; set config.select.sampler"
    )
  return value


def one_side(
  value: np.ndarray, side: str, name: str = "side", knob: str = "kwargs."
) -> np.ndarray:
  """[N, R, ...] of the responses -> [N, ...]; a single one stands for itself.

  Args:
    value: R is 2 for pairs (chosen, rejected) and 1 for unpaired rows.
    side: one of SIDES; "difference" is chosen minus rejected, of pairs only.
    name, knob: of the keyword, see `require`.
  """
  require(side in SIDES, name, side, SIDES, knob)
  if value.shape[1] == 1 and side != "difference":
    return value[:, 0]
  if value.shape[1] != 2:
    raise ConfigError(
      f"{side!r} reads pairs, the pool has {value.shape[1]} responses per "
      f"row; set config.select.{knob}{name}"
    )
  return _SIDES[side](value[:, 0], value[:, 1])


def _twice_ranks(value: np.ndarray) -> np.ndarray:
  """[N] int64, twice the rank from 0.5 that equal values share: no rounding."""
  _, inverse, counts = np.unique(value, return_inverse=True, return_counts=True)
  return (2 * np.cumsum(counts) - counts)[inverse]


def quantiles(value: np.ndarray) -> np.ndarray:
  """[N] -> [N] ranks from 0.5/N to 1 - 0.5/N; equal values share their mean."""
  return _twice_ranks(value) / (2 * len(value))


def directed(value: np.ndarray, direction: str) -> np.ndarray:
  """[N] values -> [N] scores, higher is selected first.

  Args:
    value: [N] float64, finite.
    direction: "top" (the value itself), "low" (its negative), or "middle":
      minus the distance of its rank from the median's, as a fraction of N.
      Rows equally far below and above the median score exactly alike.
  """
  require(direction in DIRECTIONS, "direction", direction, DIRECTIONS)
  if direction == "middle":
    return -np.abs(_twice_ranks(value) - len(value)) / (2 * len(value))
  return value if direction == "top" else -value


def ranked(score: np.ndarray, pool: Pool, budget: int) -> Selection:
  """The best rows of a score, ties by a hash of the id."""
  score = np.asarray(score, np.float64)
  return Selection(top(score, pool.ids, budget), score)


def in_order(rows: np.ndarray, n: int) -> Selection:
  """Picks without a score of their own: 1 down to 1/M, 0 for the others."""
  rows, score = np.asarray(rows, np.int64), np.zeros(n)
  score[rows] = 1 - np.arange(len(rows)) / max(1, len(rows))
  return Selection(rows, score)
