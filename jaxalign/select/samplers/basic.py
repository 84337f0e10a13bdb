"""Random and stratified rows, and ISA: those that change the entropy most."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jaxalign.errors import ConfigError, NumericError
from jaxalign.select.pool import needs, Pool, Selection
from jaxalign.select.samplers.values import column, one_side, quantiles, SIDES
from jaxalign.select.topk import gumbel, id_hash, top, uniform

STRATA = ("source", "label", "length")
ORDERS = ("literal", "magnitude", "renormalised")
SOFT = "soft"  # the fourth of isa: drawn by the magnitude
PAIR_SCORES = SIDES
TILE = 65536  # rows whose numbers are added at once


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


def groups_of(pool: Pool, by: tuple[str, ...], bins: int = 4) -> np.ndarray:
  """[N] int64, which combination of the named columns' values a row has.

  Args:
    pool: has the columns; a length is the mean over a row's responses.
    by: column names; "length" is cut into `bins` parts of equal number, where
      equal lengths stay together.
    bins: of the length.
  """
  group = np.zeros(len(pool.ids), np.int64)
  for name in by:
    if name == "length":
      mean = column(pool, "length").mean(axis=1)
      part = np.minimum((quantiles(mean) * bins).astype(np.int64), bins - 1)
    else:
      part = np.asarray(getattr(pool, name))
    _, part = np.unique(part, return_inverse=True)
    group = group * (part.max() + 1) + part
  return np.unique(group, return_inverse=True)[1]


def apportion(shares: np.ndarray, room: np.ndarray, budget: int) -> np.ndarray:
  """Whole numbers that add up to `budget`, as near to the shares as can be.

  The method of largest remainders (a tie goes to the earlier); what does not
  fit into a full part is first divided among the others.

  Args:
    shares: [G] >= 0, any scale.
    room: [G] int64, the most each part can take.
    budget: at most the sum of `room`.
  """
  given = np.zeros(len(shares), np.int64)
  open_ = room > 0
  while True:
    left = budget - int(given[~open_].sum())
    weight = np.where(open_, shares, 0.0)
    if weight.sum() == 0:  # only parts without a share have room
      weight = np.where(open_, 1.0, 0.0)
    exact = weight * (left / max(weight.sum(), 1e-300))
    full = open_ & (exact >= room)
    if not full.any():
      break
    given[full] = room[full]
    open_ = open_ & ~full
  given[open_] = np.floor(exact[open_])
  last = budget - int(given.sum())
  order = np.argsort(
    -np.where(open_ & (weight > 0), exact - given, -1.0), kind="stable"
  )
  given[order[:last]] += 1
  return given


@needs("length", optional=("source", "label"))
def stratified(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  by: str | tuple[str, ...] = STRATA,
  bins: int = 4,
  shares: str = "pool",
) -> Selection:
  """Random rows, a fixed number from each source x label x length; O(N).

  Args:
    seed: another seed draws others within the strata.
    pool: `pool.length` [N, R]; `source` and `label` [N] where it has them (a
      pool without a column has one value of it).
    budget: M, at most N.
    by: the column or columns that make the strata.
    bins: parts of equal number into which lengths are cut.
    shares: "pool", as many of a stratum as it has of the pool; or "equal", as
      many of each as there are to take.

  Returns:
    Selection; best first by the draw. The score is the uniform number that
    `random` uses too, less 1 for the rows that their stratum had no place for.
  """
  if shares not in ("pool", "equal"):
    raise ConfigError(
      f"shares is {shares!r}, wanted 'pool' or 'equal'; set "
      "config.select.kwargs.shares"
    )
  if isinstance(bins, bool) or int(bins) != bins or bins < 1:
    raise ConfigError(
      f"bins is {bins!r}, wanted 1 or more; set config.select.kwargs.bins"
    )
  by = (by,) if isinstance(by, str) else tuple(by)
  unknown = [
    name for name in by if name not in STRATA and name not in pool.columns
  ]
  if unknown:
    raise ConfigError(
      f"by names {', '.join(unknown)}, the pool has "
      f"{', '.join(sorted(pool.columns))}; set "
      "config.select.kwargs.by"
    )
  group = groups_of(pool, tuple(n for n in by if n in pool.columns), int(bins))
  room = np.bincount(group)
  # Which stratum a lone row goes to where remainders tie must not follow the
  # order of values: the least hash of an id in it decides.
  hashes = id_hash(pool.ids, f"stratified:{int(seed)}")
  first = np.full(len(room), np.iinfo(np.uint64).max, np.uint64)
  np.minimum.at(first, group, hashes)
  order = np.argsort(first, kind="stable")
  weight = room if shares == "pool" else np.ones(len(room))
  count = np.empty(len(room), np.int64)
  count[order] = apportion(np.float64(weight[order]), room[order], budget)
  score = uniform(seed, pool.ids, "random")
  ranked = np.lexsort((-score, group))
  place = np.empty(len(score), np.int64)  # of a row within its stratum
  place[ranked] = np.arange(len(score)) - np.repeat(
    np.cumsum(room) - room, room
  )
  score = np.where(place < count[group], score, score - 1)
  return Selection(top(score, pool.ids, budget), score)


@needs("length", "subset")
def length_matched(
  seed: int, pool: Pool, budget: int, *, bins: int = 20
) -> Selection:
  """Random rows, as long as those of another arm: a control for length.

  What a sampler wins by taking longer answers, these rows win too.

  Args:
    seed: of the draw, which is that of `random` within a bin.
    pool: `pool.length` [N, R], the mean over responses is matched;
      `pool.subset` [N] bool, the rows of the other arm.
    budget: M, at most N; where it is the number of the other arm's rows, each
      bin gives just as many as that arm has in it.
    bins: parts of equal number into which the other arm's lengths are cut;
      equal lengths stay together.

  Returns:
    Selection; best first by the draw. The score is the uniform number of
    `random`, less 1 for the rows that their bin had no place for.
  """
  subset = column(pool, "subset")[:, 0] > 0
  mean = column(pool, "length").mean(axis=1)
  edges = np.unique(
    np.quantile(mean[subset], np.arange(1, bins) / bins)
    if subset.any()
    else mean[:0]
  )
  part = np.searchsorted(edges, mean, side="left")
  count = apportion(
    np.bincount(part[subset], minlength=bins).astype(float),
    np.bincount(part, minlength=bins),
    budget,
  )
  score = uniform(seed, pool.ids, "random")
  for i in np.unique(part):
    rows = np.flatnonzero(part == i)
    spare = np.argsort(-score[rows], kind="stable")[count[i] :]
    score[rows[spare]] -= 1
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
    order: one of `ORDERS`.

  Returns:
    [...] float64, higher is selected first.

  Raises:
    NumericError: a value is not finite, or all are equal (no order exists).
  """
  value = np.asarray(log_likelihood, np.float64)
  tiles = [value[at : at + TILE] for at in range(0, len(value), TILE)]
  return change_of(value, entropy_of(lambda: tiles, order), order)


class Entropy(NamedTuple):
  """What the change of one row's entropy needs to know of all rows."""

  low: float  # of the log-likelihoods, nats
  high: float
  z: float = 1.0  # sum of p
  s: float = 0.0  # sum of p log p


def entropy_of(
  tiles: Callable[[], Iterable[np.ndarray]], order: str
) -> Entropy:
  """The scalars of `entropy_change`, in one pass over the rows or two.

  Args:
    tiles: gives the log-likelihoods from the start, [TILE, ...] float64 and a
      last one that may be shorter: sums are added by tile, in order.
    order: "renormalised" takes the second pass.
  """
  if order not in ORDERS:
    raise ConfigError(
      f"order {order!r} is unknown, wanted one of "
      f"{', '.join(ORDERS)}; set config.select.order"
    )
  low, high, size, bad = np.inf, -np.inf, 0, 0
  for value in tiles():
    size, bad = size + value.size, bad + int((~np.isfinite(value)).sum())
    low, high = min(low, value.min()), max(high, value.max())
  if bad:
    raise NumericError(
      f"{bad} of {size} log-likelihoods are not finite; look at the embedding"
    )
  if not high > low:
    raise NumericError(
      f"all {size} log-likelihoods equal {low}; isa "
      "cannot rank them, look at the embedding or set "
      "config.select.sampler"
    )
  z = s = 0.0
  if order == "renormalised":
    for value in tiles():
      u = (value - low) / (high - low)
      p = np.exp(u)
      z, s = z + p.sum(), s + (p * u).sum()
  return Entropy(float(low), float(high), float(z) or 1.0, float(s))


def change_of(value: np.ndarray, entropy: Entropy, order: str) -> np.ndarray:
  """[...] log-likelihoods -> [...] changes; see `entropy_change`."""
  u = (value - entropy.low) / (entropy.high - entropy.low)
  p = np.exp(u)
  t = p * u
  if order == "literal":
    return -t
  if order == "magnitude":
    return t
  z, s = entropy.z, entropy.s
  return -np.log1p(-p / z) + p * (s / z - u) / (z - p)


def top_with_quota(
  score: np.ndarray, pool: Pool, budget: int, quota: float | str | None
) -> np.ndarray:
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
  knob = "; set config.select.kwargs.label_quota"
  if "label" not in pool.columns:
    raise ConfigError(
      f"label_quota needs rows with a label (unpaired), the pool has none{knob}"
    )
  label = np.asarray(pool.label, bool)
  share = label.mean() if quota == "as_pool" else quota
  if isinstance(share, (str, bool)) or not 0.0 <= share <= 1.0:
    raise ConfigError(
      f"label_quota is {quota!r}, wanted a share from 0 to 1 or 'as_pool'{knob}"
    )
  wanted = int(np.floor(float(share) * budget + 0.5))
  parts = []
  for value, count in ((True, wanted), (False, budget - wanted)):
    rows = np.flatnonzero(label == value)
    if rows.size < count:
      name = "desirable" if value else "undesirable"
      raise ConfigError(
        f"label_quota {quota!r} asks for {count} {name} rows, "
        f"the pool has {rows.size}{knob} or "
        "config.select.budget"
      )
    parts.append(rows[top(score[rows], pool.ids[rows], count)])
  rows = np.sort(np.concatenate(parts))
  return rows[top(score[rows], pool.ids[rows], rows.size)]


def check_soft(order: str, soft: float) -> None:
  """Raises ConfigError for a draw that cannot be."""
  if not 0 <= soft < np.inf:
    raise ConfigError(
      f"soft is {soft!r}, wanted 0 or more; set config.select.kwargs.soft"
    )
  if order == SOFT and soft:
    raise ConfigError(
      f"order 'soft' draws by the change itself, and soft is "
      f"{soft!r}; set config.select.order or "
      "config.select.kwargs.soft to 0"
    )


def drawn(
  change: np.ndarray, seed: int, ids: np.ndarray, pair_score: str
) -> np.ndarray:
  """Changes [n] of order "magnitude" as weights of a draw: log w + Gumbel."""
  if (change < 0).any():
    raise ConfigError(
      f"pair_score {pair_score!r} makes weights below 0, "
      "which order 'soft' cannot draw by; set "
      "config.select.pair_score to sum, mean, min or max"
    )
  # The least likely row of all has weight 0: it comes last.
  weight = np.maximum(change, np.finfo(np.float64).tiny)
  return np.log(weight) + gumbel(seed, ids, "isa")


@needs("log_likelihood")
def isa(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  order: str = "literal",
  pair_score: str = "sum",
  soft: float = 0.0,
  label_quota: float | str | None = None,
) -> Selection:
  """Rows whose removal changes the data set's entropy most, Khera et al. 2024.

  Args:
    seed: of the draw, of order "soft" or where `soft` is above 0.
    pool: `pool.log_likelihood` [N, R] nats, finite; with a label quota also
      `pool.label` [N].
    budget: M, at most N.
    order: "literal" (signed change, descending: rare rows first), "magnitude"
      (by size: dense rows first) or "renormalised", see `entropy_change`; or
      "soft": rows drawn without replacement with weights |Delta|, the size of
      the change, so that dense rows are likelier and no row is certain.
    pair_score: how the changes of a pair's two sides become one: "sum",
      "min", "max", "chosen", "difference" (chosen minus rejected) and the
      other `values.SIDES`. The paper ranks unpaired rows and does not say.
    soft: 0 keeps the highest changes. Above 0, rows are drawn without
      replacement with weights exp(change / (soft x standard deviation of the
      changes)): small is nearly hard, large nearly random. Not with order
      "soft", whose weights have no scale.
    label_quota: for unpaired, the share of desirable rows among those chosen,
      or "as_pool"; None lets the score decide.

  Returns:
    Selection; the [N] score is the (combined) change of entropy, nats; of a
    draw, the logarithm of the weight plus the row's Gumbel number.
  """
  check_soft(order, soft)
  value = np.asarray(pool.log_likelihood, np.float64)
  change = entropy_change(value, "magnitude" if order == SOFT else order)
  score = one_side(change, pair_score, "pair_score")
  if order == SOFT:
    score = drawn(score, seed, pool.ids, pair_score)
  if soft:
    spread = score.std()
    if not spread > 0:
      raise NumericError(
        "all changes of entropy are equal: there is nothing "
        "to weigh; set config.select.pair_score"
      )
    score = score / (soft * spread) + gumbel(seed, pool.ids, "isa")
  return Selection(top_with_quota(score, pool, budget, label_quota), score)
