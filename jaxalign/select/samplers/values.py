"""From a column of the pool to one finite number a row, and its ranking."""

import numpy as np

from jaxalign.errors import ConfigError, NumericError
from jaxalign.select.pool import Pool, Selection
from jaxalign.select.topk import top

DIRECTIONS = ("top", "middle", "low")
SIDES = ("chosen", "rejected", "mean", "sum", "min", "max", "difference")


def finite(value: np.ndarray, ids: np.ndarray, what: str) -> np.ndarray:
  """[N, ...] as float64; a row with a NaN or an infinity is refused by id."""
  value = np.asarray(value, np.float64)
  bad = np.flatnonzero(~np.isfinite(value).reshape(len(value), -1).all(axis=1))
  if bad.size:
    named = ", ".join(str(ids[i]) for i in bad[:5])
    more = ", ..." if bad.size > 5 else ""
    raise NumericError(
      f"{bad.size} of {len(value)} rows have a {what} that is "
      f"not finite (ids {named}{more}); wanted numbers, look "
      f"at what made the pool's {what}"
    )
  return value


def column(pool: Pool, name: str, *, pairs: bool = False) -> np.ndarray:
  """[N, R] float64 of a column with a number for each response, finite.

  Args:
    pool: has the column, [N, R], or [N] for one response a row.
    name: of the column.
    pairs: refuses a pool of single responses.
  """
  value = finite(getattr(pool, name), pool.ids, name)
  if value.ndim == 1:
    value = value[:, None]
  if value.ndim != 2:
    raise ConfigError(f"column {name!r} has shape {value.shape}, wanted [N, R]")
  if pairs and value.shape[1] != 2:
    raise ConfigError(
      f"this sampler compares the two responses of a pair; "
      f"{name!r} has {value.shape[1]} a row; set "
      "config.select.sampler"
    )
  return value


def one_side(
  value: np.ndarray, side: str, knob: str = "kwargs.side"
) -> np.ndarray:
  """[N, R] numbers of the responses -> [N]; a single one stands for itself.

  Args:
    value: R is 2 for pairs (chosen, rejected) and 1 for unpaired rows.
    side: "chosen", "rejected", "mean", "sum", "min", "max" or "difference"
      (chosen minus rejected); unpaired: all but the last are the one response.
    knob: of config.select, that holds the side.
  """
  if side not in SIDES:
    raise ConfigError(
      f"{knob.split('.')[-1]} {side!r} is unknown, wanted one "
      f"of {', '.join(SIDES)}; set config.select.{knob}"
    )
  if value.shape[1] == 1 and side != "difference":
    return value[:, 0]
  if value.shape[1] != 2:
    raise ConfigError(
      f"{side!r} reads pairs, the pool has {value.shape[1]} "
      f"responses per row; set config.select.{knob}"
    )
  chosen, rejected = value[:, 0], value[:, 1]
  return {
    "chosen": lambda: chosen,
    "rejected": lambda: rejected,
    "mean": lambda: (chosen + rejected) / 2,
    "sum": lambda: chosen + rejected,
    "min": lambda: np.minimum(chosen, rejected),
    "max": lambda: np.maximum(chosen, rejected),
    "difference": lambda: chosen - rejected,
  }[side]()


def quantiles(value: np.ndarray) -> np.ndarray:
  """[N] -> [N] ranks from 0.5/N to 1 - 0.5/N; equal values share their mean."""
  return _twice_ranks(value) / (2 * len(value))


def _twice_ranks(value: np.ndarray) -> np.ndarray:
  """[N] int64, twice the rank from 0.5 that equal values share: no rounding."""
  _, inverse, counts = np.unique(value, return_inverse=True, return_counts=True)
  return (2 * np.cumsum(counts) - counts)[inverse]


def from_middle(twice: np.ndarray | int, n: int) -> np.ndarray:
  """Minus how far ranks of n rows are from the median's, as a share of n.

  Args:
    twice: whole numbers, twice the rank from 0.5: rows that are as far below
      the median as others above it score exactly what those do.
    n: above 0.
  """
  return -np.abs(twice - n) / (2 * n)


def directed(value: np.ndarray, direction: str) -> np.ndarray:
  """[N] values -> [N] scores, higher is selected first.

  Args:
    value: [N] float64, finite.
    direction: "top" (the value itself), "low" (its negative), or "middle":
      minus the distance of the row's rank from the median rank, as a share of
      the rows, so that a budget of M takes the M middle ranks.
  """
  if direction not in DIRECTIONS:
    raise ConfigError(
      f"direction {direction!r} is unknown, wanted one of "
      f"{', '.join(DIRECTIONS)}; set "
      "config.select.kwargs.direction"
    )
  if direction == "middle":
    return from_middle(_twice_ranks(value), len(value))
  return value if direction == "top" else -value


def ranked(score: np.ndarray, pool: Pool, budget: int) -> Selection:
  """The best rows of a score, ties by a hash of the id."""
  score = np.asarray(score, np.float64)
  return Selection(top(score, pool.ids, budget), score)
