"""Samplers made of samplers: gate, dedup, quota, diverse, product.

Each takes a sampler and returns one, with the same signature and keywords; it
needs what the inner one needs and what it reads itself. A config names a chain
wherever it names a sampler, the first step first, scores multiplied by "*":

  c.select.sampler = "dedup(threshold=0.9) | gate(column=reward, low=0.2) | isa"
  c.compare = ("quota(by=source, shares=equal) | ask_llm * external_margin",)
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
from typing import Any

import numpy as np

from jaxalign.core import lookup
from jaxalign.core.errors import ConfigError, JaxalignError
from jaxalign.select.costs import of_scores, one_after_another
from jaxalign.select.pool import Pool, Selection, SHAPES
from jaxalign.select.samplers import dedup as dedup_lib
from jaxalign.select.samplers import SAMPLERS, values
from jaxalign.select.samplers.draws import apportion, groups_of
from jaxalign.select.samplers.vectors import directions
from jaxalign.select.topk import top

Sampler = Callable[..., Selection]


def take(pool: Pool, rows: np.ndarray, reader: Sampler | None = None) -> Pool:
  """Some rows of a pool, in the same order (rows ascending).

  Wide columns [N, R, W], which are costly to copy, come along only where the
  reader reads them: a sampler, bound to its keywords.
  """
  columns = pool.columns
  if reader is not None:
    read = {*reader.func.needs, *reader.func.optional}
    for value in reader.keywords.values():
      read |= {value} if isinstance(value, str) else set()
      read |= {*value} if isinstance(value, (tuple, list)) else set()
    columns = {k: v for k, v in columns.items() if v.ndim < 3 or k in read}
  return Pool(pool.ids[rows], {k: v[rows] for k, v in columns.items()})


def _union(samplers: Sequence[Sampler], mark: str, *more: str) -> tuple:
  names = [n for one in samplers for n in getattr(one, mark)]
  return tuple(dict.fromkeys((*names, *more)))


def _total_cost(*samplers: Sampler, step: Callable | None = None):
  """The cost of a step and of samplers; None where one has none."""
  if any(getattr(one, "cost", None) is None for one in samplers):
    return None

  def cost(sizes, **kwargs):
    works = [step(sizes)] if step else []
    for one in samplers:
      works.append(one.cost(sizes, **kwargs | getattr(one, "keywords", {})))
    return one_after_another(*works)

  return cost


def _wrap(inner, fn, *columns, cost=of_scores, copies_rows=True) -> Sampler:
  """fn(inner with its keywords, seed, pool, budget), which reads more columns,
  as a sampler; the cost is of fn alone."""

  @functools.wraps(inner)
  def sampler(seed, pool, budget, **kwargs):
    return fn(functools.partial(inner, **kwargs), seed, pool, budget)

  sampler.keywords = getattr(inner, "keywords", {})  # bound, "isa(order=...)"
  sampler.needs = _union([inner], "needs", *columns)
  sampler.cost = _total_cost(inner, step=cost)
  copied = inner.needs if copies_rows else ()
  sampler.copied = {*getattr(inner, "copied", ()), *copied}
  return sampler


def _among(inner, what, mask, *columns, cost=of_scores):
  """The inner sampler on the rows of mask(pool); all others rank below."""

  def among(inner, seed, pool, budget):
    keep = mask(pool)
    rows = np.flatnonzero(keep)
    if rows.size < budget:
      raise ConfigError(
        f"{what} leaves {rows.size} of {len(keep)} rows, the budget wants "
        f"{budget}; set config.select.budget, or the {what.split(' ')[0]}"
      )
    inside = inner(seed, take(pool, rows, inner), budget)
    score = np.full(len(keep), inside.score.min() - 1)
    score[rows] = inside.score
    return Selection(rows[inside.rows], score, inside.notes)

  return _wrap(inner, among, *columns, cost=cost)


def gate(
  inner: Sampler,
  column: str,
  low: float = 0.0,
  high: float = 1.0,
  side: str = "min",
) -> Sampler:
  """Only rows whose value of a column lies between two quantiles.

  Args:
    inner: chooses among them.
    column: [N] or [N, R] numbers, "log_likelihood" or "reward" for instance.
    low, high: quantiles of the pool; 0.2 and 1 leave out the lowest fifth.
    side: of a pair, see `values.one_side`; with "min" both sides must pass.
  """
  what = f"gate on {column!r} from {low} to {high}"
  if not 0 <= low < high <= 1:
    raise ConfigError(
      f"{what}, wanted two quantiles from 0 to 1, the first below the second"
    )

  def passes(pool):
    value = values.one_side(values.column(pool, column), side)
    rank = values.quantiles(value)
    return (rank >= low) & (rank <= high)

  return _among(inner, what, passes, column)


def dedup(
  inner: Sampler,
  threshold: float = 0.95,
  pair: str = "mean",
  metric: str = "cosine",
  clusters: int | str = "auto",
) -> Sampler:
  """Drops near-copies first: SemDeDup with a threshold on the cosine.

  Args:
    inner: chooses among the rows that are left.
    threshold: a row is dropped where its cosine with an earlier one of its
      cluster is above this; see `dedup.most_alike`.
    pair, metric: see `vectors.vectors`.
    clusters: of the k-means, or "auto".
  """
  what = f"dedup above a cosine of {threshold}"
  if not -1 <= threshold < 1:
    raise ConfigError(f"{what}, wanted -1 or more and below 1")

  def distinct(pool):
    x = directions(pool, pair, metric)
    count = dedup_lib.cluster_count(clusters, len(x))
    return dedup_lib.most_alike(x, pool.ids, count, seed=0) <= threshold

  cost = functools.partial(
    dedup_lib.semdedup_work, clusters=clusters, pair=pair
  )
  return _among(inner, what, distinct, "embedding", cost=cost)


def quota(
  inner: Sampler, by: str | Sequence[str], shares: Any = "pool", bins: int = 4
) -> Sampler:
  """A fixed share of the budget for each label, source or length.

  Args:
    inner: chooses within each group, as if the group were the pool.
    by: a column, or several: "label", "source", "length" (in `bins`).
    shares: "pool" (as in the pool), "equal", or, for one column, a mapping
      from its value to a share, 0 for values that are left out.
    bins: of the length, of equal number.
  """
  by = (by,) if isinstance(by, str) else tuple(by)

  def by_group(inner, seed, pool, budget):
    group = groups_of(pool, by, bins)
    count = _quotas(pool, group, by, shares, budget)
    score = np.full(len(pool.ids), np.nan)
    kept = np.zeros(len(pool.ids), bool)
    notes, whole = {}, []
    for k in np.flatnonzero(count):
      rows = np.flatnonzero(group == k)
      name = _group_name(pool, by, rows)
      if count[k] == len(rows):
        kept[rows] = True
        whole.append(f"{name} ({len(rows)})")
        continue
      try:
        own = inner(seed, take(pool, rows, inner), int(count[k]))
      except JaxalignError as error:
        raise type(error)(
          f"quota by {', '.join(by)}, {count[k]} of {len(rows)} rows with "
          f"{name}: {error}"
        ) from error
      score[rows] = own.score
      kept[rows[own.rows]] = True
      notes[name] = own.notes
    lines = _joined_notes(notes)
    if whole:
      more = f" and {len(whole) - 5} more" if len(whole) > 5 else ""
      lines.append(
        f"quota takes all rows with {'; '.join(whole[:5])}{more}: no sampler "
        "ranked them, they come after those it chose"
      )
    # Rows no sampler saw rank as the last that one chose, and all that are not
    # kept below.
    unseen = np.isnan(score)
    score[unseen] = score[kept & ~unseen].min() if notes else 0
    score = np.where(kept, score, score - (np.ptp(score) + 1))
    return Selection(top(score, pool.ids, budget), score, tuple(lines))

  return _wrap(inner, by_group, *by)


def _quotas(pool, group, by, shares, budget):
  """[G] rows to take of each group; see `quota`."""
  room = np.bincount(group)
  if isinstance(shares, str) and shares in ("pool", "equal"):
    weight = np.float64(room) if shares == "pool" else np.ones(len(room))
    return apportion(weight, room, budget)
  if not isinstance(shares, Mapping):
    raise ConfigError(
      f"quota has shares {shares!r}, wanted 'pool', 'equal' or a mapping"
    )
  if len(by) != 1:
    raise ConfigError(f"quota gives shares for {by}, wanted one column")
  column = np.asarray(getattr(pool, by[0]))
  names = [column[np.argmax(group == k)].item() for k in range(len(room))]
  if unknown := set(shares) - set(names):
    raise ConfigError(
      f"quota names {sorted(map(str, unknown))}, the pool's {by[0]} has "
      f"{sorted(map(str, names))}"
    )
  weight = np.array([float(shares.get(name, 0)) for name in names])
  if not (weight >= 0).all() or not weight.sum() > 0:
    raise ConfigError(
      f"quota gives the shares {dict(shares)}, wanted numbers of 0 or more, "
      "one of them above"
    )
  every = np.full(len(room), budget)
  count = apportion(weight / weight.sum(), every, budget)
  for k in np.flatnonzero(count > room)[:1]:
    raise ConfigError(
      f"quota wants {count[k]} rows of {by[0]} {names[k]!r}, the pool has "
      f"{room[k]}; set config.select.budget or the shares"
    )
  return count


def _group_name(pool: Pool, by: Sequence[str], rows: np.ndarray) -> str:
  """What rows of one group have in common: "source 'web', length 3 to 9"."""
  names = []
  for name in by:
    value = np.asarray(getattr(pool, name))[rows]
    if name == "length":
      mean = value.reshape(len(rows), -1).mean(axis=1)
      names.append(f"length {mean.min():g} to {mean.max():g}")
    else:
      names.append(f"{name} {value[:1].tolist()[0]!r}")
  return ", ".join(names)


def _joined_notes(by_group: Mapping[str, Sequence[str]]) -> list[str]:
  """Notes of all groups once, the others with the group's name."""
  joined = []
  for name, notes in by_group.items():
    for note in notes:
      if not all(note in others for others in by_group.values()):
        text = note.removeprefix("warning: ")
        note = note.removesuffix(text) + f"{name}: {text}"
      joined.append(note)
  return list(dict.fromkeys(joined))


def diverse(
  inner: Sampler,
  threshold: float = 0.9,
  pair: str = "mean",
  metric: str = "cosine",
) -> Sampler:
  """Down the inner sampler's scores, only rows unlike those kept (DEITA).

  Args:
    inner: a sampler by a score; of a greedy one the order is what counts.
    threshold, pair, metric: see `dedup.diverse` and `vectors.vectors`.
  """

  def spread(inner, seed, pool, budget):
    x = directions(pool, pair, metric)
    all_rows = inner(seed, pool, budget)
    kept = dedup_lib.diverse(all_rows.score, x, pool.ids, budget, threshold)
    return kept._replace(notes=all_rows.notes)

  cost = functools.partial(dedup_lib.diverse_work, pair=pair)
  return _wrap(inner, spread, "embedding", cost=cost, copies_rows=False)


def product(*inner: Sampler) -> Sampler:
  """Rows that rank high by every one of several scores.

  The score is the sum over the samplers of log(rank of the row's score / N),
  ranks from 0.5 and equal scores sharing theirs: the product of the scores,
  each made uniform, so that none counts for more because of its scale.
  """
  if not inner:
    raise ConfigError("a product of no samplers; wanted one or more")

  def sampler(seed, pool, budget):
    each = [one(seed, pool, budget) for one in inner]
    score = sum(np.log(values.quantiles(one.score)) for one in each)
    notes = dict.fromkeys(note for one in each for note in one.notes)
    return values.ranked(score, pool, budget)._replace(notes=tuple(notes))

  sampler.needs = _union(inner, "needs")
  sampler.optional = _union(inner, "optional")
  sampler.pairs = any(one.pairs for one in inner)
  sampler.cost = _total_cost(*inner)
  return sampler


COMBINATORS = {"gate": gate, "dedup": dedup, "quota": quota, "diverse": diverse}


def _behind(step: list[lookup.Term | float], sampler: Sampler) -> Sampler:
  """A sampler that sees what a step leaves."""
  if len(step) != 1 or not isinstance(step[0], lookup.Term):
    text = " * ".join(map(str, step))
    raise ConfigError(f"step {text!r} is not of the form name(keyword=value)")
  name, kwargs = step[0]
  if name not in COMBINATORS:
    raise ConfigError(
      f"unknown step {name!r}, wanted one of {', '.join(COMBINATORS)}"
    )
  known = list(inspect.signature(COMBINATORS[name]).parameters)[1:]
  lookup.check_keywords(kwargs, known, f"step {name!r}", "select.sampler")
  return COMBINATORS[name](sampler, **kwargs)


def find_sampler(name: str, knob: str = "select.sampler") -> Sampler:
  """The sampler that a config's name or chain means.

  It needs the columns that its keywords name too, "dpp(quality=p_yes)".

  Args:
    name: what `lookup` takes; "a * b", the `product` of some; with steps in
      front, "step(keyword=value) | sampler", keys of COMBINATORS, the first
      of which sees the whole pool.
    knob: the config field that holds the name.

  Raises:
    ConfigError: an unknown name, step or keyword.
  """
  *steps, last = lookup.parse(name, "|", "sampler", knob)
  samplers = []
  for term in last:
    one = lookup.find(SAMPLERS, term, "sampler", knob)
    if not hasattr(one, "needs"):
      raise ConfigError(
        f"sampler {str(term)!r} does not declare what it reads; mark it "
        f"with jaxalign.select.pool.needs, or set config.{knob}"
      )
    words = getattr(one, "keywords", {}).values()
    columns = [v for v in words if isinstance(v, str) and v in SHAPES]
    if columns:
      one.needs = _union([one], "needs", *columns)
    samplers.append(one)
  sampler = samplers[0] if len(samplers) == 1 else product(*samplers)
  try:
    return functools.reduce(
      lambda s, step: _behind(step, s), steps[::-1], sampler
    )
  except (ConfigError, TypeError) as error:
    raise ConfigError(
      f"sampler {name!r}: {error}; set config.{knob}"
    ) from error


def sampler_names(name: str) -> list[str]:
  """The samplers of a chain without steps and keywords; of other texts none."""
  try:
    last = lookup.parse(name, "|", "sampler", "select.sampler")[-1]
  except ConfigError:
    return []
  return [term.name for term in last if isinstance(term, lookup.Term)]
