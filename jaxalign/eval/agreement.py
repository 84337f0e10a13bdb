"""How far raters agree: judges with humans, with each other, with themselves.

The table is a list of `Verdict`: who compared which two answers, shown in
which order, and what was said. Rows of one pair are matched whatever order
the two models stand in, and every measure takes one label a pair: -1 for the
model first in the alphabet, 0 for a tie, 1 for the other. A winner's name is
no label: it means another thing on the next pair.
"""

import collections
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
import itertools
from typing import Any, NamedTuple

import numpy as np

from jaxalign.errors import ConfigError, DataError
from jaxalign.eval import intervals
from jaxalign.eval import lengths as lengths_lib

UNPARSABLE = {
  "tie": "an unparsable verdict counts as a tie",
  "drop": "an unparsable verdict is left out",
  "own": "unparsable is a label of its own, right where both are unparsable",
}
_UNREAD = "unparsable"  # the label of the rule "own"
_DRAWS = 2000
_CELLS = 1 << 22  # numbers drawn at once: 32 MB
PAIRS_OF_RATERS = 200  # compared one by one, those with most in common first


class Verdict(NamedTuple):
  """One rater's word on one pair of answers."""

  item: Hashable  # of the prompt
  first: str  # the model whose answer was shown first
  second: str
  rater: str
  said: str | None  # "first", "second", "tie"; None: could not be read


Pair = tuple[Hashable, str, str]  # item, and the two models in sorted order


def canonical(
  rows: Iterable[Verdict], rater: str
) -> dict[Pair, dict[bool, str | None]]:
  """A rater's verdicts by pair, then by order, as the name of the winner.

  Returns:
    {(item, a, b): {shown with a first: winner}} with a < b; the winner is a,
    b, "" for a tie, or None where the verdict could not be read.

  Raises:
    DataError: a word that is no verdict, a model against itself, or one pair
      judged twice in the same order.
  """
  out: dict[Pair, dict[bool, str | None]] = {}
  for row in rows:
    if row.rater != rater:
      continue
    if row.first == row.second or not row.first or not row.second:
      raise DataError(
        f"verdict of {rater} on item {row.item!r} compares "
        f"{row.first!r} with {row.second!r}, wanted two models "
        "with different names"
      )
    winners = {"first": row.first, "second": row.second, "tie": "", None: None}
    if row.said not in winners:
      raise DataError(
        f"verdict of {rater} on item {row.item!r} is "
        f"{row.said!r}, wanted 'first', 'second', 'tie', or "
        "None where it could not be read"
      )
    a, b = sorted((row.first, row.second))
    orders = out.setdefault((row.item, a, b), {})
    if (row.first == a) in orders:
      raise DataError(
        f"{rater} judged item {row.item!r}, {row.first} before "
        f"{row.second}, twice; keep one of the two rows"
      )
    orders[row.first == a] = winners[row.said]
  return out


def settled(rows: Iterable[Verdict], rater: str) -> dict[Pair, str | None]:
  """One verdict a pair: of two orders, what both say, else a tie.

  Unparsable in one order is settled by the other; in both, it is None.
  """
  out = {}
  for pair, orders in canonical(rows, rater).items():
    said = {w for w in orders.values() if w is not None}
    out[pair] = None if not said else said.pop() if len(said) == 1 else ""
  return out


def majority(votes: Sequence[dict[Pair, str | None]]) -> dict[Pair, str | None]:
  """The verdict with most votes: the plurality, a tie where two lead.

  Args:
    votes: verdicts by pair of each rater; a pair some rater did not judge is
      settled by the others, and so is one whose verdict could not be read.
  """
  counts: dict[Pair, collections.Counter] = collections.defaultdict(
    collections.Counter
  )
  for rater in votes:
    for pair, winner in rater.items():
      counts[pair].update([] if winner is None else [winner])
  out: dict[Pair, str | None] = {}
  for pair, words in counts.items():
    top = words.most_common(2)
    leads = len(top) == 1 or (top and top[0][1] > top[1][1])
    out[pair] = None if not top else top[0][0] if leads else ""
  return out


def labels(
  winners: Mapping[Pair, str | None], unparsable: str
) -> dict[Pair, Any]:
  """What the measures compare, by pair: -1 (the model first in the alphabet),
  0 (tie) or 1.

  Args:
    winners: by pair, as from `settled` or `majority`.
    unparsable: a key of UNPARSABLE: None becomes 0 ("tie"), stays None, a gap
      ("drop"), or becomes the label "unparsable" ("own").
  """
  if unparsable not in UNPARSABLE:
    raise ConfigError(
      f"unknown rule for unparsable verdicts {unparsable!r}; "
      f"known: {', '.join(UNPARSABLE)}"
    )
  unread = {"tie": 0, "drop": None, "own": _UNREAD}[unparsable]
  return {
    pair: unread if w is None else {"": 0, pair[1]: -1, pair[2]: 1}[w]
    for pair, w in winners.items()
  }


def _shared(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> list[Any]:
  """The pairs that both labelled, in the order of `a`."""
  return [
    pair
    for pair, label in a.items()
    if label is not None and b.get(pair) is not None
  ]


def matched(
  a: dict[Pair, str | None], b: dict[Pair, str | None], unparsable: str
) -> tuple[list[Any], list[Any]]:
  """The labels of the pairs both judged, in the order of `a`.

  Args:
    a: winners by pair, as from `settled` or `majority`.
    b: the same of another rater.
    unparsable: a key of UNPARSABLE, see `labels`.
  """
  x, y = labels(a, unparsable), labels(b, unparsable)
  pairs = _shared(x, y)
  return [x[p] for p in pairs], [y[p] for p in pairs]


# Measures beyond chance, for nominal labels.


def _codes(values: Iterable[Any]) -> dict[Any, int]:
  """Each different label and its number."""
  return {w: i for i, w in enumerate(dict.fromkeys(values))}


def _beyond(sums: np.ndarray, chance: Callable) -> np.ndarray:
  """(observed - chance) / (1 - chance), NaN where chance is 1.

  Args:
    sums: [..., 1 + 2 c]: pairs with equal labels, then how often each rater
      used each label.
    chance: of the shares [..., c] of the two raters' labels.
  """
  x, y = np.split(sums[..., 1:], 2, axis=-1)
  n = x.sum(-1)
  expected = chance(x / n[..., None], y / n[..., None])
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.where(
      expected < 1, (sums[..., 0] / n - expected) / (1 - expected), np.nan
    )


def _kappa(sums: np.ndarray) -> np.ndarray:
  """Cohen's: each rater has shares of its own."""
  return _beyond(sums, lambda x, y: (x * y).sum(-1))


def _pi(sums: np.ndarray) -> np.ndarray:
  """Scott's: both have the shares of the two together."""
  return _beyond(sums, lambda x, y: (((x + y) / 2) ** 2).sum(-1))


def _bootstrap(
  value: float, rows: np.ndarray, times: np.ndarray, measure: Callable
) -> dict[str, float | None]:
  """A measure and its percentile interval over items.

  Items that add the same to the sums are drawn together, so that a million
  items cost no more than the few kinds there are of them.

  Args:
    value: the measure of all items; NaN where it is not defined.
    rows: [kinds, s] what an item of each kind adds to the sums.
    times: [kinds] items of each kind.
    measure: [draws, s] sums -> [draws].
  """
  if np.isnan(value):
    return dict(value=None, low=None, high=None)
  n = int(times.sum())
  rng = np.random.default_rng(0)
  chunk = max(1, _CELLS // max(rows.shape))
  drawn = np.concatenate(
    [
      measure(rng.multinomial(n, times / n, min(chunk, _DRAWS - at)) @ rows)
      for at in range(0, _DRAWS, chunk)
    ]
  )
  drawn = drawn[~np.isnan(drawn)]
  if n < 2 or not len(drawn):  # one item varies with nothing
    return dict(value=value, low=None, high=None)
  low, high = np.quantile(drawn, [0.025, 0.975])
  return dict(value=value, low=float(low), high=float(high))


def _kinds(
  rows: np.ndarray, items: Sequence[Any] | None
) -> tuple[np.ndarray, np.ndarray]:
  """Rows [n, s] added up by item; the different sums, and how many of each."""
  if items is not None:
    codes = _codes(items)
    at = np.array([codes[i] for i in items])
    sums = np.zeros((len(codes), rows.shape[1]))
    np.add.at(sums, at, rows)
    rows = sums
  return np.unique(rows, axis=0, return_counts=True)


def _of_two(
  xs: Sequence[Any],
  ys: Sequence[Any],
  items: Sequence[Any] | None,
  measure: Callable,
) -> dict[str, Any]:
  """A measure of two raters' labels, see `_beyond`."""
  n = len(xs)
  if not n:
    return dict(value=None, low=None, high=None, n=0)
  codes = _codes([*xs, *ys])
  x, y = (np.array([codes[w] for w in side]) for side in (xs, ys))
  unit = np.eye(len(codes))
  rows = np.concatenate([(x == y)[:, None], unit[x], unit[y]], axis=1)
  return _bootstrap(
    float(measure(rows.sum(0))), *_kinds(rows, items), measure
  ) | dict(n=n)


def cohen_kappa(
  xs: Sequence[Any], ys: Sequence[Any], items: Sequence[Any] | None = None
) -> dict[str, Any]:
  """Agreement beyond chance of two raters, nominal labels (Cohen 1960).

  The interval is a percentile bootstrap over the items, 2,000 draws.

  Args:
    xs: a label of each pair.
    ys: the other rater's.
    items: what each pair belongs to: pairs of one item are drawn together.
      None: every pair is an item.

  Returns:
    {"value", "low", "high", "n"}; value None where nothing was judged, or
    where both used one and the same label (chance alone agrees always).
  """
  return _of_two(xs, ys, items, _kappa)


def scott_pi(
  xs: Sequence[Any], ys: Sequence[Any], items: Sequence[Any] | None = None
) -> dict[str, Any]:
  """Agreement beyond chance, where chance has one distribution of labels.

  Scott 1955: chance is sum_k ((x_k + y_k) / 2)^2 with x_k, y_k the shares of
  label k of the two raters, where Cohen's kappa takes sum_k x_k y_k. So two
  raters with different habits, one of whom calls more ties, lose by it: pi is
  at most kappa. Arguments, interval and result as of `cohen_kappa`.
  """
  return _of_two(xs, ys, items, _pi)


def _alpha(sums: np.ndarray) -> np.ndarray:
  """[...] alpha from [..., c + 1]: labels by kind, and what was observed."""
  total, observed = sums[..., :-1], sums[..., -1]
  n = total.sum(-1)
  differ = n * n - (total * total).sum(-1)
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.where(differ > 0, 1 - (n - 1) * observed / differ, np.nan)


def krippendorff_alpha(
  units: Iterable[Sequence[Any]], items: Sequence[Any] | None = None
) -> dict[str, Any]:
  """Krippendorff's alpha, nominal, any number of raters, gaps allowed.

  1 - observed / expected disagreement, where a unit of m labels counts each
  ordered pair of its labels 1 / (m - 1) times (Krippendorff 2011). A label
  must mean the same in every unit, as those of `labels` do: the expected
  disagreement pools them over all units. The interval is a percentile
  bootstrap over the items, 2,000 draws.

  Args:
    units: the labels each unit got; None is a gap. A unit with fewer than two
      labels says nothing and is left out.
    items: what each unit belongs to, see `cohen_kappa`.

  Returns:
    {"value", "low", "high", "units", "labels"}; value None where all labels
    are the same.
  """
  units = [[w for w in unit if w is not None] for unit in units]
  kept = [i for i, unit in enumerate(units) if len(unit) > 1]
  codes = _codes(w for i in kept for w in units[i])
  rows = np.zeros((len(kept), len(codes) + 1))
  for row, i in zip(rows, kept):
    for w in units[i]:
      row[codes[w]] += 1
  counts, m = rows[:, :-1], rows.sum(-1)
  rows[:, -1] = (m * m - (counts * counts).sum(-1)) / (m - 1)
  out = dict(units=len(kept), labels=int(m.sum()))
  if not kept:
    return dict(value=None, low=None, high=None) | out
  kinds, times = _kinds(
    rows, None if items is None else [items[i] for i in kept]
  )
  return _bootstrap(float(_alpha(rows.sum(0))), kinds, times, _alpha) | out


# Tables of raters.


def compared(a: Mapping[Pair, Any], b: Mapping[Pair, Any]) -> dict[str, Any]:
  """Share of equal labels, kappa, pi and alpha of two raters.

  Args:
    a: label by pair, as from `labels`; None is a gap.
    b: the same of another rater. Intervals are over items, the first field of
      a pair.
  """
  pairs = _shared(a, b)
  xs, ys, items = (
    [a[p] for p in pairs],
    [b[p] for p in pairs],
    [p[0] for p in pairs],
  )
  return dict(
    agreement=intervals.share([float(x == y) for x, y in zip(xs, ys)]),
    kappa=cohen_kappa(xs, ys, items),
    pi=scott_pi(xs, ys, items),
    alpha=krippendorff_alpha(list(zip(xs, ys)), items),
  )


def between(
  a: dict[Pair, str | None], b: dict[Pair, str | None]
) -> dict[str, dict[str, Any]]:
  """`compared` under each rule for the unparsable.

  Args:
    a: winners by pair.
    b: the same of another rater.
  """
  return {
    rule: dict(rule=words) | compared(labels(a, rule), labels(b, rule))
    for rule, words in UNPARSABLE.items()
  }


def among(votes: Mapping[str, Mapping[Pair, Any]]) -> dict[str, Any]:
  """Some raters beside each other, two by two and all together.

  Args:
    votes: rater -> label by pair, as from `labels`; None is a gap.

  Returns:
    {"pairs": labelled by anyone; "between": {"x / y": `compared`}, those two
    who share a pair, at most PAIRS_OF_RATERS; "more": how many two are left
    out; "alpha": `krippendorff_alpha` over all raters}.
  """
  units: dict[Pair, dict[str, Any]] = collections.defaultdict(dict)
  for rater, given in votes.items():
    for pair, label in given.items():
      if label is not None:
        units[pair][rater] = label
  common = collections.Counter(
    two for unit in units.values() for two in itertools.combinations(unit, 2)
  )
  place = {rater: i for i, rater in enumerate(votes)}
  kept = sorted(two for two, _ in common.most_common(PAIRS_OF_RATERS))
  kept.sort(key=lambda two: [place[r] for r in two])
  return dict(
    pairs=len(units),
    more=len(common) - len(kept),
    between={f"{x} / {y}": compared(votes[x], votes[y]) for x, y in kept},
    alpha=krippendorff_alpha(
      [list(u.values()) for u in units.values()], [pair[0] for pair in units]
    ),
  )


def orders(rows: Iterable[Verdict], rater: str) -> dict[str, Any]:
  """Whether a rater says the same when the two answers change places.

  Returns:
    "consistent": share of pairs, readable in both orders, with one verdict;
    "kappa": between the two orders; "first": share of all verdicts with a
    winner that named the answer shown first (0.5: no position bias; its
    interval takes verdicts as independent); "unparsable": share of verdicts.
  """
  table = canonical(rows, rater)
  said = [
    (a_first, winner, pair)
    for pair, o in table.items()
    for a_first, winner in o.items()
  ]
  first = [
    float((winner == pair[1]) == a_first)
    for a_first, winner, pair in said
    if winner
  ]
  both = compared(
    *(
      labels({pair: o[k] for pair, o in table.items() if k in o}, "drop")
      for k in (True, False)
    )
  )
  return dict(
    consistent=both["agreement"],
    kappa=both["kappa"],
    first=intervals.share(first),
    unparsable=intervals.share([float(w is None) for _, w, _ in said]),
  )


def _sizes(
  winners: Mapping[Pair, str | None],
  sizes: Mapping[Pair, tuple[float, float]],
  keep: Callable,
) -> dict[str, Any]:
  """`lengths.bias` of the pairs that `keep` picks and that have lengths."""
  rows = [
    ({pair[1]: 1.0, "": 0.5, pair[2]: 0.0}[w], *sizes[pair])
    for pair, w in winners.items()
    if w is not None and pair in sizes and keep(pair)
  ]
  return lengths_lib.bias(*(np.array([r[k] for r in rows]) for k in range(3)))


def length_bias(
  winners: Mapping[Pair, str | None],
  sizes: Mapping[Pair, tuple[float, float]],
  truth: Mapping[Pair, str | None] | None = None,
) -> dict[str, Any]:
  """Whether a rater likes the longer answer, and errs towards it.

  Args:
    winners: of the rater, by pair, as from `settled`.
    sizes: pair -> lengths of the answers of its two models, in its order.
    truth: what is held against the rater, as from `majority`.

  Returns:
    As `lengths.bias`; with `truth`, "errors": the share of the pairs where it
    and the truth name different winners in which it named the longer.
  """
  out = _sizes(winners, sizes, lambda pair: True)
  if truth is not None:
    out["errors"] = _sizes(
      winners,
      sizes,
      lambda pair: (
        winners[pair] and truth.get(pair) and winners[pair] != truth[pair]
      ),
    )["longer"]
  return out


def judged(
  rows: Sequence[Verdict],
  judges: Sequence[str],
  humans: Sequence[str],
  sizes: Mapping[Pair, tuple[float, float]] | None = None,
) -> dict[str, Any]:
  """All there is to say of some judges beside some humans.

  Args:
    rows: the table.
    judges: raters to be judged.
    humans: raters they are held against; may be one (an objective label).
    sizes: lengths of the two answers by pair, see `length_bias`; or None.

  Returns:
    {"humans": `among` them, an unparsable verdict a gap,
     "judges": {judge: {"against": `between` with the majority of the humans,
     "orders": `orders`, "unparsable": number of verdicts, and where there are
     sizes "lengths": `length_bias`}}}.

  Raises:
    DataError: a rater without a row, or a judge with no pair a human judged.
  """
  table: dict[str, list[Verdict]] = collections.defaultdict(list)
  for row in rows:
    table[row.rater].append(row)
  for rater in (*judges, *humans):
    if rater not in table:
      raise DataError(
        f"no verdict of rater {rater!r}; the table has "
        f"{', '.join(sorted(table)) or 'no rows'}"
      )
  votes = {h: settled(table[h], h) for h in humans}
  truth = majority(list(votes.values()))
  out: dict[str, Any] = dict(
    humans=among({h: labels(v, "drop") for h, v in votes.items()}), judges={}
  )
  for judge in judges:
    found = settled(table[judge], judge)
    if not found.keys() & truth.keys():
      raise DataError(
        f"{judge!r} judged no pair that "
        f"{', '.join(humans)} judged; do the tables name items "
        "and models alike?"
      )
    out["judges"][judge] = dict(
      against=between(truth, found),
      orders=orders(table[judge], judge),
      unparsable=sum(row.said is None for row in table[judge]),
    )
    if sizes is not None:
      out["judges"][judge]["lengths"] = length_bias(found, sizes, truth)
  return out
