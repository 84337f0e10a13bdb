"""Samplers made of samplers: gate, dedup, quota, diverse, product.

Each takes a sampler and returns one, with the same signature and keywords; it
needs what the inner one needs and what it reads itself. A config names a chain
wherever it names a sampler, the first step first, scores multiplied by "*":

  c.select.sampler = "dedup(threshold=0.9) | gate(column=reward, low=0.2) | isa"
  c.compare = ("quota(by=source, shares=equal) | ask_llm * external_margin",)
"""

import ast
from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
from typing import Any

import numpy as np

from jaxalign import lookup
from jaxalign.errors import ConfigError, JaxalignError
from jaxalign.select.pool import Pool, Selection, SHAPES
from jaxalign.select.samplers import basic, SAMPLERS, values
from jaxalign.select.samplers import dedup as dedup_lib
from jaxalign.select.samplers import rows as rows_lib
from jaxalign.select.topk import top

Sampler = Callable[..., Selection]


def take(pool: Pool, rows: np.ndarray) -> Pool:
  """Some rows of a pool, in the same order (rows ascending)."""
  return Pool(pool.ids[rows], {k: v[rows] for k, v in pool.columns.items()})


def _wrap(inner: Sampler, fn: Callable, *columns: str) -> Sampler:
  """fn(inner bound to its keywords, seed, pool, budget) as a sampler."""

  @functools.wraps(inner)
  def sampler(seed: int, pool: Pool, budget: int, **kwargs) -> Selection:
    return fn(functools.partial(inner, **kwargs), seed, pool, budget)

  sampler.__doc__ = fn.__doc__
  sampler.keywords = getattr(inner, "keywords", {})  # bound, "isa(order=...)"
  sampler.needs = tuple(dict.fromkeys((*inner.needs, *columns)))
  sampler.optional = tuple(inner.optional)
  sampler.pairs = inner.pairs
  return sampler


def _within(
  inner: Sampler,
  seed: int,
  pool: Pool,
  budget: int,
  keep: np.ndarray,
  what: str,
) -> Selection:
  """Runs a sampler on the rows of a mask; the others rank below them all."""
  rows = np.flatnonzero(keep)
  if rows.size < budget:
    raise ConfigError(
      f"{what} leaves {rows.size} of {len(keep)} rows, the "
      f"budget wants {budget}; set config.select.budget, or "
      f"the {what.split(' ')[0]}"
    )
  found = inner(seed, take(pool, rows), budget)
  score = np.full(len(keep), found.score.min() - 1)
  score[rows] = found.score
  return Selection(rows[found.rows], score, found.notes)


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
    side: of a pair, see `values.one_side`; "min" asks it of both sides.
  """
  if not 0 <= low < high <= 1:
    raise ConfigError(
      f"gate on {column!r} from {low} to {high}, wanted two "
      "quantiles from 0 to 1, the first below the second"
    )

  def gated(inner, seed, pool, budget):
    """The inner sampler's choice among the rows that pass the gate."""
    value = values.one_side(values.column(pool, column), side)
    rank = values.quantiles(value)
    return _within(
      inner,
      seed,
      pool,
      budget,
      (rank >= low) & (rank <= high),
      f"gate on {column!r} from {low} to {high}",
    )

  return _wrap(inner, gated, column)


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
    pair, metric: see `rows.vectors`.
    clusters: of the k-means, or "auto".
  """
  if not -1 <= threshold < 1:
    raise ConfigError(
      f"dedup above a cosine of {threshold}, wanted -1 or more and below 1"
    )

  def deduplicated(inner, seed, pool, budget):
    """The inner sampler's choice among rows that are no near-copies."""
    x = rows_lib.directions(pool, pair, metric)
    alike = dedup_lib.most_alike(
      x, pool.ids, dedup_lib.cluster_count(clusters, len(x)), seed=0
    )
    return _within(
      inner,
      seed,
      pool,
      budget,
      alike <= threshold,
      f"dedup above a cosine of {threshold}",
    )

  return _wrap(inner, deduplicated, "embedding")


def quota(
  inner: Sampler, by: str | Sequence[str], shares: Any = "pool", bins: int = 4
) -> Sampler:
  """A fixed share of the budget for each label, source or length.

  Args:
    inner: chooses within each group, as if the group were the pool.
    by: a column, or several: "label", "source", "length" (in `bins` parts).
    shares: "pool" (as in the pool), "equal", or, for one column, a mapping
      from its value to a share, 0 for values that are left out.
    bins: parts of the length, of equal number.
  """
  by = (by,) if isinstance(by, str) else tuple(by)

  def shared(inner, seed, pool, budget):
    """The inner sampler's choice within each group, by quota."""
    group = basic.groups_of(pool, by, bins)
    room = np.bincount(group)
    if isinstance(shares, Mapping):
      if len(by) != 1:
        raise ConfigError(f"quota gives shares for {by}, wanted one column")
      column = np.asarray(getattr(pool, by[0]))
      first = [column[np.argmax(group == k)].item() for k in range(len(room))]
      unknown = set(shares) - set(first)
      if unknown:
        raise ConfigError(
          f"quota names {sorted(map(str, unknown))}, the "
          f"pool's {by[0]} has {sorted(map(str, first))}"
        )
      weight = np.array([float(shares.get(name, 0)) for name in first])
      if not (weight >= 0).all() or not weight.sum() > 0:
        raise ConfigError(
          f"quota gives the shares {dict(shares)}, wanted "
          "numbers of 0 or more, one of them above"
        )
      weight = weight / weight.sum()
      count = basic.apportion(weight, np.full(len(room), budget), budget)
      short = np.flatnonzero(count > room)
      if short.size:
        k = short[0]
        raise ConfigError(
          f"quota asks for {count[k]} rows of {by[0]} "
          f"{first[k]!r}, the pool has {room[k]}; set "
          "config.select.budget or the shares"
        )
    elif shares in ("pool", "equal"):
      weight = np.float64(room) if shares == "pool" else np.ones(len(room))
      count = basic.apportion(weight, room, budget)
    else:
      raise ConfigError(
        f"quota has shares {shares!r}, wanted 'pool', 'equal' or a mapping"
      )
    score = np.full(len(pool.ids), np.nan)
    kept = np.zeros(len(pool.ids), bool)
    said, whole = {}, []
    for k in np.flatnonzero(count):
      rows = np.flatnonzero(group == k)
      name = _group_name(pool, by, rows)
      if count[k] == room[k]:
        kept[rows] = True
        whole.append(f"{name} ({room[k]})")
        continue
      try:
        found = inner(seed, take(pool, rows), int(count[k]))
      except JaxalignError as error:
        raise type(error)(
          f"quota by {', '.join(by)}, {count[k]} of {room[k]} rows with "
          f"{name}: {error}"
        ) from error
      score[rows] = found.score
      kept[rows[found.rows]] = True
      said[name] = found.notes
    notes = _joined_notes(said)
    if whole:
      more = f" and {len(whole) - 5} more" if len(whole) > 5 else ""
      notes.append(
        f"quota takes all rows with {'; '.join(whole[:5])}{more}: "
        "no sampler ranked them, they come after those it chose"
      )
    # What no sampler saw ranks as the last that one chose, and what no place
    # was left for below all that was kept.
    unseen = np.isnan(score)
    score[unseen] = score[kept & ~unseen].min() if said else 0
    score = np.where(kept, score, score - (np.ptp(score) + 1))
    return Selection(top(score, pool.ids, budget), score, tuple(notes))

  return _wrap(inner, shared, *by)


def _group_name(pool: Pool, by: Sequence[str], rows: np.ndarray) -> str:
  """What rows of one group have in common: "source 'web', length 3 to 9"."""
  parts = []
  for name in by:
    value = np.asarray(getattr(pool, name))[rows]
    if name == "length":
      mean = value.reshape(len(rows), -1).mean(axis=1)
      parts.append(f"length {mean.min():g} to {mean.max():g}")
    else:
      parts.append(f"{name} {value[:1].tolist()[0]!r}")
  return ", ".join(parts)


def _joined_notes(said: Mapping[str, Sequence[str]]) -> list[str]:
  """Notes by group: once what all say, the others with the group's name."""
  every = [set(notes) for notes in said.values()]
  common = set.intersection(*every) if every else set()
  out = {}
  for name, notes in said.items():
    for note in notes:
      if note in common:
        out[note] = None
      else:
        text = note.removeprefix("warning: ")
        out[f"{note[: len(note) - len(text)]}{name}: {text}"] = None
  return list(out)


def diverse(
  inner: Sampler,
  threshold: float = 0.9,
  pair: str = "mean",
  metric: str = "cosine",
) -> Sampler:
  """Down the inner sampler's scores, only rows unlike those kept (DEITA).

  Args:
    inner: a sampler by a score; of a greedy one the order is what counts.
    threshold, pair, metric: see `dedup.diverse` and `rows.vectors`.
  """

  def spread(inner, seed, pool, budget):
    """The best rows of the inner sampler that are unlike one another."""
    x = rows_lib.directions(pool, pair, metric)
    found = inner(seed, pool, budget)
    return dedup_lib.diverse(
      found.score, x, pool.ids, budget, threshold
    )._replace(notes=found.notes)

  return _wrap(inner, spread, "embedding")


def product(*inner: Sampler) -> Sampler:
  """Rows that rank high by every one of several scores.

  The score is the sum over the samplers of log(rank of the row's score / N),
  ranks from 0.5 and equal scores sharing theirs: the product of the scores,
  each made uniform, so that none counts for more because of its scale.
  """
  if not inner:
    raise ConfigError("a product of no samplers; wanted one or more")

  def sampler(seed: int, pool: Pool, budget: int) -> Selection:
    """Rows by the product of the ranks of several scores."""
    found = [one(seed, pool, budget) for one in inner]
    score = sum(np.log(values.quantiles(one.score)) for one in found)
    notes = dict.fromkeys(note for one in found for note in one.notes)
    return values.ranked(score, pool, budget)._replace(notes=tuple(notes))

  sampler.needs = tuple(dict.fromkeys(n for one in inner for n in one.needs))
  sampler.optional = tuple(
    dict.fromkeys(n for one in inner for n in one.optional)
  )
  sampler.pairs = any(one.pairs for one in inner)
  return sampler


COMBINATORS = {"gate": gate, "dedup": dedup, "quota": quota, "diverse": diverse}


def compose(sampler: Sampler, steps: Sequence[Mapping[str, Any]]) -> Sampler:
  """A sampler behind some steps, the first of which sees the whole pool.

  Args:
    sampler: chooses from what the steps leave.
    steps: mappings with the `name` of a combinator and its keywords, as
      dict(name="gate", column="log_likelihood", low=0.1).

  Raises:
    ConfigError: an unknown name or keyword.
  """
  for step in reversed(steps):
    rest = dict(step)
    name = rest.pop("name", None)
    if name not in COMBINATORS:
      raise ConfigError(
        f"unknown step {name!r}, wanted one of {', '.join(COMBINATORS)}"
      )
    known = list(inspect.signature(COMBINATORS[name]).parameters)[1:]
    unknown = set(rest) - set(known)
    if unknown:
      raise ConfigError(
        f"step {name!r} takes no {sorted(unknown)[0]!r}; it "
        f"takes {', '.join(known)}"
      )
    sampler = COMBINATORS[name](sampler, **rest)
  return sampler


def named(name: str, knob: str = "select.sampler") -> Sampler:
  """The sampler that a config's name or chain means.

  It needs the columns that its keywords name too, "dpp(quality=p_yes)".

  Args:
    name: what `lookup` takes; "a * b", the `product` of some; with steps in
      front, "step(keyword=value) | sampler", keys of COMBINATORS, the first
      of which sees the whole pool. A value is a Python literal or a word.
    knob: the config field that holds the name.

  Raises:
    ConfigError: an unknown name, step or keyword.
  """
  *steps, last = lookup.parts(name, "|")
  found = [
    lookup.lookup(SAMPLERS, part, "sampler", knob)
    for part in lookup.parts(last, "*")
  ]
  for part, one in zip(lookup.parts(last, "*"), found):
    if not hasattr(one, "needs"):
      raise ConfigError(
        f"sampler {part!r} does not say what it reads; mark "
        "the function with jaxalign.select.pool.needs, or set "
        f"config.{knob}"
      )
    if columns := [
      v
      for v in getattr(one, "keywords", {}).values()
      if isinstance(v, str) and v in SHAPES
    ]:
      one.needs = tuple(dict.fromkeys((*one.needs, *columns)))
  sampler = found[0] if len(found) == 1 else product(*found)
  try:
    return compose(sampler, [_step(text) for text in steps])
  except (ConfigError, TypeError) as error:
    raise ConfigError(
      f"sampler {name!r}: {error}; set config.{knob}"
    ) from error


def links(name: str) -> tuple[list[dict[str, Any]], list[str]]:
  """The steps of a chain, as `compose` takes them, and its samplers' texts."""
  *steps, last = lookup.parts(name, "|")
  return [_step(text) for text in steps], lookup.parts(last, "*")


def bare(name: str) -> list[str]:
  """The samplers of a chain without their keywords."""
  return [
    part.partition("(")[0].strip()
    for part in lookup.parts(lookup.parts(name, "|")[-1], "*")
  ]


def _step(text: str) -> dict[str, Any]:
  """ "gate(column=reward, low=0.2)" -> what `compose` takes."""
  wrong = ConfigError(f"step {text!r} is not of the form name(keyword=value)")
  try:
    call = ast.parse(text, mode="eval").body
    if isinstance(call, ast.Name):
      return dict(name=call.id)
    if call.args or any(k.arg is None for k in call.keywords):
      raise wrong
    return dict(name=call.func.id) | {
      k.arg: _value(k.value) for k in call.keywords
    }
  except (SyntaxError, ValueError, AttributeError) as error:
    raise wrong from error


def _value(node: ast.expr) -> Any:
  """A literal in which words need no quotes."""
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, (ast.Tuple, ast.List)):
    return tuple(_value(part) for part in node.elts)
  if isinstance(node, ast.Dict):
    return {_value(k): _value(v) for k, v in zip(node.keys, node.values)}
  return ast.literal_eval(node)
