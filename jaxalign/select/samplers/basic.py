"""Random rows, and ISA: the rows that change the data set's entropy most."""

import numpy as np

from jaxalign.errors import ConfigError, NumericError
from jaxalign.select.pool import Pool, Selection, needs
from jaxalign.select.topk import top, uniform

ORDERS = ("literal", "magnitude", "renormalised")
PAIR_SCORES = ("sum", "min", "max", "chosen", "difference")


@needs()
def random(seed: int, pool: Pool, budget: int) -> Selection:
  """Uniformly drawn rows: the highest hashes of (seed, record id).

  A smaller budget is a prefix of a larger one, and a record keeps its number
  when other records come or go.

  Args:
    seed: another seed gives an independent draw.
    pool: only `pool.ids` is read.
    budget: M, at most N.

  Returns:
    Selection; the score is the [N] uniform number.
  """
  score = uniform(seed, pool.ids, "random")
  return Selection(top(score, pool.ids, budget), score)


def entropy_change(log_likelihood: np.ndarray, order: str) -> np.ndarray:
  """How much the entropy of the data changes when one row is left out.

  Khera et al. 2024, eqs. 2-3 and Algorithm 1. With u the log-likelihood
  scaled to [0, 1] over all rows, p = exp(u) and H(X) = -sum p log p, leaving
  row i out changes H by exactly Delta_i = H(X) - H(X - i) = -u_i exp(u_i): no
  loop, and no difference of two large sums. Three readings of "sort by the
  maximum change":

    literal       Delta, as printed: <= 0, so rare rows come first.
    magnitude     |Delta|: dense rows come first.
    renormalised  H of p / sum(p), renormalised before and after. With Z the
                  sum of p, S the sum of p log p and t_i = p_i log p_i,
                  Delta_i = -log1p(-p_i/Z) + p_i (S/Z - u_i) / (Z - p_i);
                  highest near the weighted mean of u.

  Args:
    log_likelihood: [...] nats, finite; all its entries are scaled together.
    order: "literal", "magnitude" or "renormalised".

  Returns:
    [...] float64, higher is selected first.

  Raises:
    NumericError: a value is not finite, or all are equal (no order exists).
  """
  if order not in ORDERS:
    raise ConfigError(f"order {order!r} is unknown, wanted one of "
                      f"{', '.join(ORDERS)}; set config.select.order")
  value = np.asarray(log_likelihood, np.float64)
  bad = value.size - int(np.isfinite(value).sum())
  if bad:
    raise NumericError(f"{bad} of {value.size} log-likelihoods are not finite; "
                       "look at the embedding")
  low, high = value.min(), value.max()
  if not high > low:
    raise NumericError(f"all {value.size} log-likelihoods equal {low}; isa "
                       "cannot rank them, look at the embedding or set "
                       "config.select.sampler")
  u = (value - low) / (high - low)
  p = np.exp(u)
  t = p * u
  if order == "literal":
    return -t
  if order == "magnitude":
    return t
  z, s = p.sum(), t.sum()
  return -np.log1p(-p / z) + p * (s / z - u) / (z - p)


def _combine(change: np.ndarray, pair_score: str) -> np.ndarray:
  """[N, R] changes of the two sides -> [N]; one side stands for itself."""
  if pair_score not in PAIR_SCORES:
    raise ConfigError(f"pair_score {pair_score!r} is unknown, wanted one of "
                      f"{', '.join(PAIR_SCORES)}; set "
                      "config.select.pair_score")
  sides = change.shape[1]
  if sides == 1 and pair_score != "difference":
    return change[:, 0]
  if sides != 2:
    raise ConfigError(f"pair_score {pair_score!r} reads pairs, the pool has "
                      f"{sides} responses per row; set "
                      "config.select.pair_score")
  chosen, rejected = change[:, 0], change[:, 1]
  if pair_score == "difference":
    return chosen - rejected
  if pair_score == "chosen":
    return chosen
  return {"sum": np.add, "min": np.minimum,
          "max": np.maximum}[pair_score](chosen, rejected)


def top_with_quota(score: np.ndarray, pool: Pool, budget: int,
                   quota: float | str | None) -> np.ndarray:
  """The best rows, with a fixed share of desirable ones where asked for.

  Args:
    score: [N], higher is better.
    pool: `pool.label` [N] bool is read where a quota is set.
    budget: M.
    quota: None; the share of desirable rows, 0 to 1; or "as_pool", the share
      they have in the pool. The count is rounded to the nearest row.

  Raises:
    ConfigError: pairs have no label, or there are too few rows of one.
  """
  if quota is None:
    return top(score, pool.ids, budget)
  knob = "; set config.select.label_quota"
  if "label" not in pool.columns:
    raise ConfigError("label_quota needs rows with a label (thumbs), the pool "
                      f"has none{knob}")
  label = np.asarray(pool.label, bool)
  share = label.mean() if quota == "as_pool" else quota
  if isinstance(share, (str, bool)) or not 0.0 <= share <= 1.0:
    raise ConfigError(f"label_quota is {quota!r}, wanted a share from 0 to 1 "
                      f"or 'as_pool'{knob}")
  wanted = int(np.floor(float(share) * budget + 0.5))
  parts = []
  for value, count in ((True, wanted), (False, budget - wanted)):
    rows = np.flatnonzero(label == value)
    if rows.size < count:
      name = "desirable" if value else "undesirable"
      raise ConfigError(f"label_quota {quota!r} asks for {count} {name} rows, "
                        f"the pool has {rows.size}{knob} or "
                        "config.select.budget")
    parts.append(rows[top(score[rows], pool.ids[rows], count)])
  rows = np.sort(np.concatenate(parts))
  return rows[top(score[rows], pool.ids[rows], rows.size)]


@needs("log_likelihood")
def isa(seed: int, pool: Pool, budget: int, *, order: str = "literal",
        pair_score: str = "sum",
        label_quota: float | str | None = None) -> Selection:
  """Rows whose removal changes the data set's entropy most, Khera et al. 2024.

  Args:
    seed: unused; every sampler takes one.
    pool: `pool.log_likelihood` [N, R] nats, finite; with a label quota also
      `pool.label` [N].
    budget: M, at most N.
    order: "literal" (signed change, descending: rare rows first), "magnitude"
      (by size: dense rows first) or "renormalised"; see `entropy_change`.
    pair_score: how the changes of a pair's two sides become one: "sum",
      "min", "max", "chosen", or "difference" (chosen minus rejected). The
      paper ranks unpaired rows and does not say.
    label_quota: for thumbs, the share of desirable rows among those chosen,
      or "as_pool"; None lets the score decide.

  Returns:
    Selection; the [N] score is the (combined) change of entropy, nats.
  """
  del seed
  value = np.asarray(pool.log_likelihood, np.float64)
  score = _combine(entropy_change(value, order), pair_score)
  return Selection(top_with_quota(score, pool, budget, label_quota), score)
