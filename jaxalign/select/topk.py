"""The best M rows by a score, the same on any mesh and in any input order."""

import hashlib
import numbers
from typing import Any

import numpy as np

from jaxalign.core.errors import ConfigError, NumericError


def few_ids(ids: Any) -> str:
  """The first five, for a message."""
  return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")


def refuse_rows(bad: np.ndarray, ids: np.ndarray, what: str, advice: str):
  """Raises NumericError that names the ids of `bad` [N] rows, if any."""
  if bad.any():
    raise NumericError(
      f"{int(bad.sum())} of {len(ids)} rows have {what} "
      f"(ids {few_ids(ids[bad])}); {advice}"
    )


def id_hash(ids: np.ndarray, salt: str = "") -> np.ndarray:
  """[n] ids -> [n] uint64, blake2b of the id; the salt makes another stream.

  An id is text, or its UTF-8 bytes as a store keeps it: the same number.
  """
  key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
  fresh = hashlib.blake2b(digest_size=8, key=key).copy
  ids = np.asarray(ids)
  if ids.dtype.kind == "S":
    encoded = ids.tolist()
  else:
    encoded = [i.encode() for i in ids.astype(np.str_).tolist()]

  def digest(record: bytes) -> bytes:
    state = fresh()
    state.update(record)
    return state.digest()

  return np.frombuffer(b"".join(map(digest, encoded)), ">u8").astype(np.uint64)


def uniform(seed: int, ids: np.ndarray, purpose: str) -> np.ndarray:
  """[n] float64 in (0, 1), one per id, whatever the order, mesh or subset.

  Args:
    seed: any int; another seed gives independent numbers.
    ids: [n] record ids.
    purpose: names the stream, so that two uses share no numbers.
  """
  bits = id_hash(ids, f"{purpose}:{int(seed)}") >> np.uint64(11)
  return (bits.astype(np.float64) + 0.5) / 2.0**53


def gumbel(seed: int, ids: np.ndarray, purpose: str) -> np.ndarray:
  """[n] float64 standard Gumbel numbers, one per id as in `uniform`.

  The m highest of log(w) + gumbel are m draws without replacement with
  probability proportional to w (Efraimidis and Spirakis 2006).
  """
  return -np.log(-np.log(uniform(seed, ids, purpose)))


def pick(
  value: np.ndarray, rows: np.ndarray, ids: np.ndarray, tolerance: float = 0.0
) -> int:
  """The place where `value` is highest; a hash of the id decides ties.

  Args:
    value: [n] float64, no NaN.
    rows: [n] row numbers of the values, into `ids`.
    ids: [N] record ids.
    tolerance: values this close to the highest count as equal to it: what
      rounding may have put between two copies of a row.
  """
  tied = np.flatnonzero(value >= value.max() - tolerance)
  if tied.size == 1:
    return int(tied[0])
  return int(tied[np.lexsort((rows[tied], id_hash(ids[rows[tied]])))[0]])


def largest(value: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
  """The `size` of the rows [n] whose value [N] is largest, ascending."""
  if len(rows) <= size:
    return rows
  order = np.argpartition(value[rows], len(rows) - size)
  return np.sort(rows[order[-size:]])


def top(score: np.ndarray, ids: np.ndarray, m: int) -> np.ndarray:
  """Row numbers [m] int64 of the m highest scores, best first.

  Equal scores are ordered by a hash of the record id, so neither the order of
  the input nor how the ids were made decides between them.

  Args:
    score: [n] float64, no NaN; infinities are ranked.
    ids: [n] record ids, sorted (the last resort where two hashes agree).
    m: how many, 0 to n.

  Raises:
    NumericError: a score is NaN; the message names the ids.
  """
  score = np.asarray(score, np.float64)
  advice = "wanted finite numbers, look at the embedding of those records"
  refuse_rows(np.isnan(score), ids, "a NaN score", advice)
  if not 0 <= m <= score.size:
    raise ConfigError(
      f"cannot take the best {m} of {score.size} rows; set config.select.budget"
    )
  if m == 0:
    return np.empty(0, np.int64)
  least = np.partition(score, score.size - m)[score.size - m]
  rows = np.flatnonzero(score >= least)
  rows = rows[np.argsort(-score[rows], kind="stable")]
  same = score[rows][1:] == score[rows][:-1]
  tied = np.append(same, False) | np.append(False, same)
  tie = np.zeros(rows.size, np.uint64)
  tie[tied] = id_hash(ids[rows[tied]])  # hash only where it can matter
  return rows[np.lexsort((rows, tie, -score[rows]))][:m].astype(np.int64)


def budget_rows(budget: Any, n: int, batch: int = 1) -> int:
  """How many rows a budget buys.

  Args:
    budget: a float in (0, 1] is a fraction of the rows, rounded to the nearest
      whole row (1.0 is all of them); an int is a number of rows (1 is one).
    n: rows of the pool.
    batch: rows of one training batch; fewer cannot fill a single step.

  Raises:
    ConfigError: not a number, zero, negative, above n, or below one batch.
  """
  knob = "set config.select.budget"
  if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
    raise ConfigError(
      f"budget is {budget!r}, wanted a fraction in (0, 1] or a whole number of "
      f"rows; {knob}"
    )
  m = budget
  if isinstance(budget, numbers.Integral):
    if not 1 <= budget <= n:
      raise ConfigError(
        f"budget is {budget} rows, wanted 1 to {n}, the rows of the pool; "
        f"{knob}"
      )
  elif 0.0 < budget <= 1.0:
    m = np.floor(float(budget) * n + 0.5)
  else:  # NaN too
    raise ConfigError(
      f"budget is the fraction {budget}, wanted above 0 and at most 1 (a "
      f"number of rows is written as an int); {knob}"
    )
  if m < batch:
    raise ConfigError(
      f"budget {budget} of {n} rows is {int(m)} rows, below one batch of "
      f"{batch}; {knob} or config.train.batch_size"
    )
  return int(m)
