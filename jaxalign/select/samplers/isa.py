"""ISA, information-based sample addition: rows that change the entropy most."""

import numpy as np

from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.select.costs import of_scores
from jaxalign.select.pool import needs, Pool, Selection
from jaxalign.select.samplers.values import one_side, require
from jaxalign.select.topk import gumbel, top

ORDERS = ("literal", "magnitude", "renormalised")
SOFT = "soft"  # the fourth: rows are drawn by the magnitude
CHUNK = 65536  # rows whose numbers are added at once


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
    order: one of `ORDERS`.

  Returns:
    [...] float64, higher is selected first.

  Raises:
    NumericError: a value is not finite, or all are equal (no order exists).
  """
  require(order in ORDERS, "order", order, (*ORDERS, SOFT), knob="")
  value = np.asarray(log_likelihood, np.float64)
  bad = int((~np.isfinite(value)).sum())
  if bad:
    raise NumericError(
      f"{bad} of {value.size} log-likelihoods are not finite; look at the "
      "embedding"
    )
  low, high = value.min(initial=np.inf), value.max(initial=-np.inf)
  if not high > low:
    raise NumericError(
      f"all {value.size} log-likelihoods equal {low}; isa cannot rank them, "
      "look at the embedding or set config.select.sampler"
    )
  u = (value - low) / (high - low)
  p = np.exp(u)
  t = p * u
  if order == "literal":
    return -t
  if order == "magnitude":
    return t
  z, s = _sum(p), _sum(t)
  return -np.log1p(-p / z) + p * (s / z - u) / (z - p)


def _sum(x: np.ndarray) -> float:
  """By chunk, in order: one rounding, however many rows there are."""
  return sum(float(x[i : i + CHUNK].sum()) for i in range(0, len(x), CHUNK))


def top_with_quota(
  score: np.ndarray, pool: Pool, budget: int, quota: float | str | None
) -> np.ndarray:
  """The best rows, perhaps with a fixed fraction of desirable ones.

  Args:
    score: [N], higher is better.
    pool: `pool.label` [N] bool is read where a quota is set.
    quota: None; the fraction of desirable rows, 0 to 1; or "as_pool", the
      fraction they have in the pool. The count is rounded to the nearest row.

  Raises:
    ConfigError: pairs have no label, or there are too few rows of one.
  """
  if quota is None:
    return top(score, pool.ids, budget)
  wanted = "rows with a label (unpaired feedback), the pool has none"
  require("label" in pool.columns, "label_quota", quota, wanted, knob="")
  label = np.asarray(pool.label, bool)
  fraction = label.mean() if quota == "as_pool" else quota
  holds = not isinstance(fraction, (str, bool)) and 0.0 <= fraction <= 1.0
  wanted = "a fraction from 0 to 1 or 'as_pool'"
  require(holds, "label_quota", quota, wanted, knob="")
  desirable = int(np.floor(float(fraction) * budget + 0.5))
  kept = []
  for name, count in (
    ("desirable", desirable),
    ("undesirable", budget - desirable),
  ):
    rows = np.flatnonzero(label == (name == "desirable"))
    if rows.size < count:
      raise ConfigError(
        f"label_quota {quota!r} wants {count} {name} rows, the pool has "
        f"{rows.size}; set config.select.kwargs.label_quota or "
        "config.select.budget"
      )
    kept.append(rows[top(score[rows], pool.ids[rows], count)])
  rows = np.sort(np.concatenate(kept))
  return rows[top(score[rows], pool.ids[rows], rows.size)]


@needs("log_likelihood", cost=of_scores)
def isa(
  seed,
  pool,
  budget,
  *,
  order="literal",
  pair_score="sum",
  soft=0.0,
  label_quota=None,
):
  """Rows whose removal changes the data set's entropy most, Khera et al. 2024.

  Args:
    seed: of the draw, of order "soft" or where `soft` is above 0.
    pool: `log_likelihood` [N, R] nats, finite; with a label quota also `label`.
    budget: M, at most N.
    order: "literal" (signed change, descending: rare rows first), "magnitude"
      (by size: dense rows first) or "renormalised", see `entropy_change`; or
      "soft": rows drawn without replacement with weights |Delta|, the size of
      the change, so that dense rows are likelier and no row is certain.
    pair_score: how the changes of a pair's two sides become one, one of
      `values.SIDES`. The paper ranks unpaired rows and leaves this open.
    soft: 0 keeps the highest changes. Above 0, rows are drawn without
      replacement with weights exp(change / (soft x standard deviation of the
      changes)): small is nearly hard, large nearly random. Not with order
      "soft", whose weights have no scale.
    label_quota: the fraction of desirable rows among unpaired ones that are
      kept, or "as_pool"; None lets the score decide.

  Returns:
    Selection; the [N] score is the (combined) change of entropy, nats; of a
    draw, the logarithm of the weight plus the row's Gumbel number.
  """
  require(0 <= soft < np.inf, "soft", soft, "0 or more")
  if order == SOFT and soft:
    raise ConfigError(
      f"order 'soft' draws by the change itself, and soft is {soft!r}; set "
      "config.select.order or config.select.kwargs.soft to 0"
    )
  by = "magnitude" if order == SOFT else order
  score = entropy_change(pool.log_likelihood, by)
  score = one_side(score, pair_score, "pair_score", knob="")
  if order == SOFT:
    if (score < 0).any():
      raise ConfigError(
        f"pair_score {pair_score!r} makes weights below 0, which order 'soft' "
        "cannot draw by; set config.select.pair_score to sum, mean, min or max"
      )
    # The least likely row of all has weight 0: it comes last.
    score = np.log(np.maximum(score, np.finfo(np.float64).tiny))
  if soft:
    spread = score.std()
    if not spread > 0:
      raise NumericError(
        "all changes of entropy are equal: there is nothing to weigh; set "
        "config.select.pair_score"
      )
    score = score / (soft * spread)
  if soft or order == SOFT:
    score = score + gumbel(seed, pool.ids, "isa")
  return Selection(top_with_quota(score, pool, budget, label_quota), score)
