"""Rows drawn at random: uniformly, from strata, or as long as another arm's."""

import numpy as np

from jaxalign.select.costs import of_draws
from jaxalign.select.pool import needs, Pool
from jaxalign.select.samplers.values import (
  column,
  is_count,
  quantiles,
  ranked,
  require,
)
from jaxalign.select.topk import id_hash, uniform

STRATA = ("source", "label", "length")


@needs(cost=of_draws)
def random(seed, pool, budget):
  """Uniformly drawn rows: the highest hashes of (seed, record id).

  A smaller budget is a prefix of a larger one, and a record keeps its number,
  the score, when other records come or go.
  """
  return ranked(uniform(seed, pool.ids, "random"), pool, budget)


def groups_of(pool: Pool, by: tuple[str, ...], bins: int = 4) -> np.ndarray:
  """[N] int64, which combination of the named columns' values a row has.

  "length" is the mean over a row's responses, cut into `bins` of equal number;
  equal lengths stay together.
  """
  group = np.zeros(len(pool.ids), np.int64)
  for name in by:
    if name == "length":
      mean = column(pool, "length").mean(axis=1)
      value = np.minimum((quantiles(mean) * bins).astype(np.int64), bins - 1)
    else:
      value = np.asarray(getattr(pool, name))
    _, code = np.unique(value, return_inverse=True)
    group = group * (code.max() + 1) + code
  return np.unique(group, return_inverse=True)[1]


def apportion(shares: np.ndarray, room: np.ndarray, budget: int) -> np.ndarray:
  """Whole numbers that add up to `budget`, as near to the shares as can be.

  The method of largest remainders (a tie goes to the earlier); what does not
  fit into a full group is first divided among the others.

  Args:
    shares: [G] >= 0, any scale.
    room: [G] int64, the most each group can take.
    budget: at most the sum of `room`.
  """
  given = np.zeros(len(shares), np.int64)
  open_ = room > 0
  while True:
    left = budget - int(given[~open_].sum())
    weight = np.where(open_, shares, 0.0)
    if weight.sum() == 0:  # only groups without a share have room
      weight = np.where(open_, 1.0, 0.0)
    exact = weight * (left / max(weight.sum(), 1e-300))
    full = open_ & (exact >= room)
    if not full.any():
      break
    given[full] = room[full]
    open_ = open_ & ~full
  given[open_] = np.floor(exact[open_])
  last = budget - int(given.sum())
  remainder = np.where(open_ & (weight > 0), exact - given, -1.0)
  given[np.argsort(-remainder, kind="stable")[:last]] += 1
  return given


def place_in_group(
  group: np.ndarray, score: np.ndarray, hashes: np.ndarray
) -> np.ndarray:
  """[N] how many rows of the same group score higher; ties by the hash."""
  order = np.lexsort((hashes, -score, group))
  size = np.bincount(group, minlength=group.max(initial=0) + 1)
  out = np.empty(len(group), np.int64)
  out[order] = np.arange(len(group)) - np.repeat(np.cumsum(size) - size, size)
  return out


def _drawn_by_group(seed, pool, budget, group, count):
  """The draw of `random`, `count` of each group; the others lose 1."""
  score = uniform(seed, pool.ids, "random")
  place = place_in_group(group, score, np.arange(len(score)))
  return ranked(np.where(place < count[group], score, score - 1), pool, budget)


@needs("length", optional=("source", "label"), cost=of_draws)
def stratified(seed, pool, budget, *, by=STRATA, bins=4, shares="pool"):
  """Random rows, a fixed number from each source x label x length; O(N).

  Args:
    by: the column or columns that make the strata; of the default ones those
      that the pool has.
    bins: of equal number, into which lengths are cut.
    shares: "pool", as many of a stratum as it has of the pool; or "equal", as
      many of each as there are to take.
  """
  known = ("pool", "equal")
  require(shares in known, "shares", shares, known)
  require(is_count(bins), "bins", bins, "1 or more")
  by = (by,) if isinstance(by, str) else tuple(by)
  wanted = f"columns of {', '.join(sorted(pool.columns))}"
  require({*by} <= {*STRATA, *pool.columns}, "by", by, wanted)
  group = groups_of(pool, tuple(n for n in by if n in pool.columns), int(bins))
  room = np.bincount(group)
  # Which stratum a lone row goes to where remainders tie must not follow the
  # order of values: the least hash of an id in it decides.
  first = np.full(len(room), np.iinfo(np.uint64).max, np.uint64)
  np.minimum.at(first, group, id_hash(pool.ids, f"stratified:{int(seed)}"))
  order = np.argsort(first, kind="stable")
  weight = np.float64(room if shares == "pool" else np.ones(len(room)))
  count = np.empty(len(room), np.int64)
  count[order] = apportion(weight[order], room[order], budget)
  return _drawn_by_group(seed, pool, budget, group, count)


@needs("length", "subset", cost=of_draws)
def length_matched(seed, pool, budget, *, bins=20):
  """Random rows, as long as those of another arm: a control for length.

  What a sampler gains by taking longer answers, these rows gain too.

  Args:
    pool: `length` [N, R], whose mean over responses is matched; `subset` [N]
      bool, the rows of the other arm.
    bins: of equal number, into which the other arm's lengths are cut; equal
      lengths stay together. Each bin gives as many rows as that arm has in it
      where the budgets are the same.
  """
  subset = column(pool, "subset")[:, 0] > 0
  mean = column(pool, "length").mean(axis=1)
  edges = mean[:0]
  if subset.any():
    edges = np.quantile(mean[subset], np.arange(1, bins) / bins)
  group = np.searchsorted(np.unique(edges), mean, side="left")
  wanted = np.bincount(group[subset], minlength=bins).astype(float)
  count = apportion(wanted, np.bincount(group, minlength=bins), budget)
  return _drawn_by_group(seed, pool, budget, group, count)
