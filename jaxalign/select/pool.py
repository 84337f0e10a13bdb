"""The pool as the samplers see it, and what a sampler hands back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core.errors import ConfigError, DataError

# What a column looks like; R is 2 for pairs (chosen, rejected), 1 for unpaired.
SHAPES = {
  "embedding": "[N, R, E] float32",
  "answer_embedding": "[N, R, E] float32, the response without its prompt",
  "log_likelihood": "[N, R] float64, nats",
  "length": "[N, R] int32, response tokens",
  "label": "[N] bool, unpaired rows only",
  "subset": "[N] bool, the rows that the chosen sampler kept",
  "topic": "[N], where it is known",
  "source": "[N] str, where the record came from",
  "logp": "[N, R] nats, summed over the response, of the reference",
  "logp_count": "[N, R] response tokens that logp sums",
  "logp_alone": "[N, R] as logp, without the prompt",
  "p_yes": "[N, R] from 0 to 1, a judge's answer about each response",
  "reward": "[N, R] a reward model's or judge's score of each response",
  "proxy_logp": "[N, R] nats, summed, of a small model tuned on a few pairs",
  "proxy_ref_logp": "[N, R] as proxy_logp, before that tuning",
  "residual": "[N, R, D] of the reference: the response less what was expected",
  "least": "[N, R] nats, of the response's least likely token",
  "grams": "[N, R, W] counts of hashed tokens, then of pairs of them",
  "overlap": "[N, R, 2] tokens and pairs of them that the prompt has too",
  "group": "[N] str, alike for rows of one prompt",
  "held_out_loss": "[N, S] nats, of S models; NaN where one saw the row",
}


class Pool(NamedTuple):
  """N rows in id order and the columns that were computed for them.

  `pool.log_likelihood` reads `pool.columns["log_likelihood"]`; a column that
  was not computed is a ConfigError that names it. The order by id is what
  makes a selection independent of the order in which the rows arrived.
  """

  ids: np.ndarray  # [N] str, sorted, unique
  columns: dict[str, np.ndarray]

  def __getattr__(self, name: str) -> np.ndarray:
    if name.startswith("_"):
      raise AttributeError(name)
    if name not in self.columns:
      wanted = f" ({SHAPES[name]})" if name in SHAPES else ""
      raise ConfigError(
        f"the pool has no column {name!r}{wanted}, it has "
        f"{', '.join(sorted(self.columns)) or 'none'}; a sampler declares "
        f"what it reads with @needs({name!r}); set config.select.sampler"
      )
    return self.columns[name]


class Selection(NamedTuple):
  """M rows of the pool, best first, and the score all N were ranked by."""

  rows: np.ndarray  # [M] int64, row numbers in id order
  score: np.ndarray  # [N] float64, higher is better
  notes: tuple[str, ...] = ()  # what a person should know; in the report


def checked(found: Selection, n: int, budget: int, name: str) -> Selection:
  """What a sampler returned, if it is what one returns.

  Args:
    found: of the sampler.
    n: N, rows of the pool.
    budget: M, rows that are wanted.
    name: of the sampler, for the message.

  Raises:
    ConfigError: not M different rows of the pool, or a score that is not of
      all N rows and finite.
  """
  rows, score = np.asarray(found.rows), np.asarray(found.score)
  wrong = ""
  if rows.shape != (budget,) or rows.dtype.kind not in "iu":
    wrong = f"rows of shape {rows.shape} and dtype {rows.dtype}"
  elif budget and not 0 <= rows.min() <= rows.max() < n:
    wrong = f"rows from {rows.min()} to {rows.max()}"
  elif len(np.unique(rows)) < budget:
    wrong = f"{budget - len(np.unique(rows))} rows twice"
  elif score.shape != (n,) or not np.isfinite(score).all():
    wrong = (
      f"a score of shape {score.shape} with "
      f"{int((~np.isfinite(score)).sum())} numbers not finite"
    )
  if wrong:
    raise ConfigError(
      f"sampler {name!r} returned {wrong}, wanted {budget} "
      f"different rows of {n} and a finite score of each of "
      f"the {n}; repair it, or set config.select.sampler"
    )
  return found


def make_pool(ids: Any, columns: dict[str, Any]) -> Pool:
  """Sorts rows and columns by id.

  Args:
    ids: [N] record ids, unique, in any order.
    columns: arrays whose first axis is N, in the same order.

  Raises:
    DataError: an id occurs twice, or a column has another number of rows.
  """
  ids = np.asarray(ids, dtype=np.str_)
  order = np.argsort(ids, kind="stable")
  ids = ids[order]
  twice = ids[1:][ids[1:] == ids[:-1]]
  if twice.size:
    raise DataError(
      f"record id {str(twice[0])!r} occurs more than once "
      f"({twice.size} such rows); ids must be unique"
    )
  table = {}
  for name, column in columns.items():
    column = np.asarray(column)
    if column.ndim == 0 or column.shape[0] != ids.size:
      raise DataError(
        f"column {name!r} has shape {column.shape}, wanted "
        f"{ids.size} rows, one per id"
      )
    table[name] = column[order]
  return Pool(ids, table)


def needs(
  *columns: str,
  optional: tuple[str, ...] = (),
  pairs: bool = False,
  cost: Callable | None = None,
) -> Callable[[Callable], Callable]:
  """Declares the pool columns a sampler reads; only those are computed.

  Args:
    *columns: read whatever its keywords are.
    optional: read where the pool has them, or where a keyword names them.
    pairs: it compares two responses, and refuses rows of one.
    cost: (`costs.Sizes`, its keywords) -> `costs.Work`, for the plan.
  """

  def mark(sampler: Callable) -> Callable:
    sampler.needs = columns
    sampler.optional = optional
    sampler.pairs = pairs
    sampler.cost = cost
    return sampler

  return mark
