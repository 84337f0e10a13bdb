"""Inter-rater agreement: judges with humans, with each other, with themselves.

The table is a list of `Verdict`. Rows of one pair are matched whatever order
the two models stand in, and every measure takes one label a pair: -1 for the
model first in the alphabet, 0 for a tie, 1 for the other. A winner's name is
no label: it means another thing on the next pair.

Kappa, pi and alpha are own code, in sums over items, because their intervals
take 2,000 draws of those sums; scikit-learn's kappa takes one list of labels.
"""

import collections
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
import itertools
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core import intervals
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.eval import winrate

UNPARSABLE = {
  "tie": "an unparsable verdict counts as a tie",
  "drop": "an unparsable verdict is left out",
  "own": "unparsable is a label of its own, right where both are unparsable",
}
_DRAWS = 2000
_CELLS = 1 << 22  # numbers drawn at once: 32 MB
PAIRS_OF_RATERS = 200  # compared one by one, those with most in common first
# How often two raters agree by chance, of the fractions of their labels.
_CHANCE = {
  "kappa": lambda x, y: (x * y).sum(-1),  # Cohen 1960
  "pi": lambda x, y: (((x + y) / 2) ** 2).sum(-1),  # Scott 1955
}


class Verdict(NamedTuple):
  """One rater's verdict on one pair of answers."""

  item: Hashable  # of the prompt
  first: str  # the model whose answer was shown first
  second: str
  rater: str
  verdict: str | None  # "first", "second", "tie"; None: could not be read


Pair = tuple[Hashable, str, str]  # item, and the two models in sorted order
Winners = Mapping[Pair, str | None]  # "": a tie; None: could not be read
Lengths = Mapping[Pair, tuple[float, float]]  # of the answers of the two models


def by_order(
  rows: Iterable[Verdict], rater: str
) -> dict[Pair, dict[bool, str | None]]:
  """A rater's winners: {(item, a, b): {shown with a first: winner}}, a < b.

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
        f"verdict of {rater} on item {row.item!r} compares {row.first!r} with "
        f"{row.second!r}, wanted two models with different names"
      )
    winners = {"first": row.first, "second": row.second, "tie": "", None: None}
    if row.verdict not in winners:
      raise DataError(
        f"verdict of {rater} on item {row.item!r} is {row.verdict!r}, wanted "
        "'first', 'second', 'tie', or None where it could not be read"
      )
    a, b = sorted((row.first, row.second))
    orders, a_first = out.setdefault((row.item, a, b), {}), row.first == a
    if a_first in orders:
      raise DataError(
        f"{rater} judged item {row.item!r}, {row.first} before "
        f"{row.second}, twice; keep one of the two rows"
      )
    orders[a_first] = winners[row.verdict]
  return out


def settle_orders(rows: Iterable[Verdict], rater: str) -> dict:
  """Winners by pair: of two orders the one that both name, else a tie.

  Unparsable in one order is settled by the other; in both, it is None.
  """
  out = {}
  for pair, orders in by_order(rows, rater).items():
    read = {w for w in orders.values() if w is not None}
    out[pair] = None if not read else read.pop() if len(read) == 1 else ""
  return out


def majority(votes: Sequence[Winners]) -> dict[Pair, str | None]:
  """The plurality of votes, a tie where two lead; missing ones do not count."""
  counts: dict = collections.defaultdict(collections.Counter)
  for winners in votes:
    for pair, winner in winners.items():
      counts[pair].update([] if winner is None else [winner])
  out: dict[Pair, str | None] = {}
  for pair, count in counts.items():
    top = count.most_common(2)
    draw = len(top) == 2 and top[0][1] == top[1][1]
    out[pair] = None if not top else "" if draw else top[0][0]
  return out


def labels(winners: Winners, unparsable: str) -> dict[Pair, Any]:
  """-1 (the model first in the alphabet wins), 0 (a tie) or 1, by pair.

  `unparsable` is a key of UNPARSABLE: None becomes 0 ("tie"), stays None, a
  gap ("drop"), or becomes the label "unparsable" ("own").
  """
  if unparsable not in UNPARSABLE:
    raise ConfigError(
      f"unknown rule for unparsable verdicts {unparsable!r}; "
      f"known: {', '.join(UNPARSABLE)}"
    )
  unread = {"tie": 0, "drop": None, "own": "unparsable"}[unparsable]
  return {
    pair: {None: unread, "": 0, pair[1]: -1, pair[2]: 1}[winner]
    for pair, winner in winners.items()
  }


# Measures beyond chance, for nominal labels.


def _numbered(values: Iterable[Any]) -> dict[Any, int]:
  """Each different value and its number."""
  return {w: i for i, w in enumerate(dict.fromkeys(values))}


def _with_interval(
  rows: np.ndarray, items: Sequence[Any] | None, measure: Callable
) -> dict[str, float | None]:
  """A measure of sums over [n, s] rows, and its bootstrap over their items.

  Items that add the same to the sums are drawn together, so that a million
  items cost no more than the few kinds there are of them.
  """
  with np.errstate(invalid="ignore", divide="ignore"):
    value = float(measure(rows.sum(0)))
    if np.isnan(value):
      return dict(value=None, low=None, high=None)
    if items is not None:
      number = _numbered(items)
      sums = np.zeros((len(number), rows.shape[1]))
      np.add.at(sums, np.array([number[i] for i in items]), rows)
      rows = sums
    n = len(rows)
    kinds, times = np.unique(rows, axis=0, return_counts=True)
    rng = np.random.default_rng(0)
    chunk = max(1, _CELLS // max(kinds.shape))
    sizes = [min(chunk, _DRAWS - at) for at in range(0, _DRAWS, chunk)]
    draw = lambda size: rng.multinomial(n, times / n, size) @ kinds
    drawn = np.concatenate([measure(draw(size)) for size in sizes])
  drawn = drawn[~np.isnan(drawn)]
  if n < 2 or not len(drawn):  # one item varies with nothing
    return dict(value=value, low=None, high=None)
  low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
  return dict(value=value, low=low, high=high)


def beyond_chance(
  measure: str,
  xs: Sequence[Any],
  ys: Sequence[Any],
  items: Sequence[Any] | None = None,
) -> dict[str, Any]:
  """Agreement of two raters beyond chance, nominal labels.

  Scott's pi takes both raters' habits together, so it is at most Cohen's
  kappa. The interval is a percentile bootstrap over the items, 2,000 draws.

  Args:
    measure: "kappa" or "pi".
    xs: n labels of one rater.
    ys: n labels of the other.
    items: n items: pairs of one item are drawn together. None: every pair is
      an item.

  Returns:
    {"value", "low", "high", "n"}; value None where nothing was judged, or
    where both used one and the same label (chance alone agrees always).
  """
  number = _numbered([*xs, *ys])
  x, y = (np.array([number[w] for w in side], int) for side in (xs, ys))
  unit = np.eye(len(number))
  rows = np.concatenate([(x == y)[:, None], unit[x], unit[y]], axis=1)

  def value(sums):  # equal labels, then how often each rater used each label
    x, y = np.split(sums[..., 1:], 2, axis=-1)
    n = x.sum(-1)
    chance = _CHANCE[measure](x / n[..., None], y / n[..., None])
    kappa = (sums[..., 0] / n - chance) / (1 - chance)
    return np.where(chance < 1, kappa, np.nan)

  return _with_interval(rows, items, value) | dict(n=len(xs))


def krippendorff_alpha(
  units: Iterable[Sequence[Any]], items: Sequence[Any] | None = None
) -> dict[str, Any]:
  """Krippendorff's alpha, nominal, any number of raters, gaps allowed.

  1 - observed / expected disagreement, where a unit of m labels counts each
  ordered pair of its labels 1 / (m - 1) times (Krippendorff 2011). The interval
  is a percentile bootstrap over the items, 2,000 draws.

  Args:
    units: the labels of each unit, of one meaning in all units; None is a gap.
      A unit with fewer than two labels is left out.
    items: of each unit, see `beyond_chance`.

  Returns:
    {"value", "low", "high", "units", "labels"}; value None where all labels
    are the same.
  """
  units = [[w for w in unit if w is not None] for unit in units]
  kept = [i for i, unit in enumerate(units) if len(unit) > 1]
  number = _numbered(w for i in kept for w in units[i])
  rows = np.zeros((len(kept), len(number) + 1))
  for row, i in zip(rows, kept):
    np.add.at(row, [number[w] for w in units[i]], 1)
  counts, m = rows[:, :-1], rows.sum(-1)
  rows[:, -1] = (m * m - (counts * counts).sum(-1)) / (m - 1)

  def value(sums):  # labels by kind, then what was observed
    total, observed = sums[..., :-1], sums[..., -1]
    n = total.sum(-1)
    differ = n * n - (total * total).sum(-1)
    return np.where(differ > 0, 1 - (n - 1) * observed / differ, np.nan)

  items = None if items is None else [items[i] for i in kept]
  sizes = dict(units=len(kept), labels=int(m.sum()))
  return _with_interval(rows, items, value) | sizes


# Tables of raters.


def agreement_of_two(
  a: Mapping[Pair, Any], b: Mapping[Pair, Any]
) -> dict[str, Any]:
  """Fraction of equal labels, kappa, pi and alpha of two raters' `labels`.

  Intervals are over items, the first field of a pair.
  """
  both = [
    (x, b[pair], pair[0])
    for pair, x in a.items()
    if x is not None and b.get(pair) is not None
  ]
  xs, ys, items = zip(*both) if both else ((), (), ())
  return dict(
    agreement=intervals.proportion([x == y for x, y in zip(xs, ys)]),
    kappa=beyond_chance("kappa", xs, ys, items),
    pi=beyond_chance("pi", xs, ys, items),
    alpha=krippendorff_alpha(list(zip(xs, ys)), items),
  )


def between(a: Winners, b: Winners) -> dict[str, dict[str, Any]]:
  """`agreement_of_two` of two raters under each rule for the unparsable."""
  return {
    rule: dict(rule=words) | agreement_of_two(labels(a, rule), labels(b, rule))
    for rule, words in UNPARSABLE.items()
  }


def among(votes: Mapping[str, Mapping[Pair, Any]]) -> dict[str, Any]:
  """Agreement of raters, two by two and all together.

  Args:
    votes: rater -> label by pair, as from `labels`; None is a gap.

  Returns:
    {"pairs": labelled by anyone; "between": {"x / y": `agreement_of_two`},
    those two who judged a common pair, at most PAIRS_OF_RATERS; "more": how
    many two are left out; "alpha": `krippendorff_alpha` over all raters}.
  """
  units: dict[Pair, dict[str, Any]] = collections.defaultdict(dict)
  for rater, given in votes.items():
    for pair, label in given.items():
      if label is not None:
        units[pair][rater] = label
  common = collections.Counter(
    two for unit in units.values() for two in itertools.combinations(unit, 2)
  )
  place = _numbered(votes)
  kept = sorted(two for two, _ in common.most_common(PAIRS_OF_RATERS))
  kept.sort(key=lambda two: [place[r] for r in two])
  given = [list(unit.values()) for unit in units.values()]
  return dict(
    pairs=len(units),
    more=len(common) - len(kept),
    between={
      f"{x} / {y}": agreement_of_two(votes[x], votes[y]) for x, y in kept
    },
    alpha=krippendorff_alpha(given, [pair[0] for pair in units]),
  )


def order_effects(rows: Iterable[Verdict], rater: str) -> dict[str, Any]:
  """Whether a rater's verdicts stay when the two answers change places.

  Returns:
    "consistent": fraction of pairs, readable in both orders, with one verdict;
    "kappa": between the two orders; "first": fraction of all verdicts with a
    winner that named the answer shown first (0.5: no position bias; its
    interval takes verdicts as independent); "unparsable": of all verdicts.
  """
  table = by_order(rows, rater)
  cells = [
    (winner, (winner == pair[1]) == a_first)
    for pair, orders in table.items()
    for a_first, winner in orders.items()
  ]
  one_order = lambda a_first: labels(
    {pair: o[a_first] for pair, o in table.items() if a_first in o}, "drop"
  )
  both = agreement_of_two(one_order(True), one_order(False))
  return dict(
    consistent=both["agreement"],
    kappa=both["kappa"],
    first=intervals.proportion([first for w, first in cells if w]),
    unparsable=intervals.proportion([w is None for w, _ in cells]),
  )


def length_bias(
  winners: Winners, sizes: Lengths, truth: Winners | None = None
) -> dict[str, Any]:
  """Whether a rater likes the longer answer, and errs towards it.

  Args:
    winners: of the rater, as from `settle_orders`.
    sizes: lengths of the answers.
    truth: winners to compare with, as from `majority`.

  Returns:
    As `winrate.length_preference`; with `truth`, "errors": the fraction of the
    pairs where it and the truth name different winners in which it named the
    longer.
  """
  rows, errs = [], []
  for pair, winner in winners.items():
    if winner is not None and pair in sizes:
      outcome = {pair[1]: 1.0, "": 0.5, pair[2]: 0.0}[winner]
      rows.append((outcome, *sizes[pair]))
      right = (truth or {}).get(pair)
      errs.append(bool(winner and right and winner != right))
  rows = np.array(rows, np.float64).reshape(-1, 3)
  out = winrate.length_preference(*rows.T)
  if truth is not None:
    wrong = winrate.length_preference(*rows[np.array(errs, bool)].T)
    out["errors"] = wrong["longer"]
  return out


def judged(
  rows: Sequence[Verdict],
  judges: Sequence[str],
  humans: Sequence[str],
  sizes: Lengths | None = None,
) -> dict[str, Any]:
  """All measures of some judges against some humans.

  Args:
    rows: the table.
    judges: raters to be judged.
    humans: raters they are compared with; may be one (an objective label).
    sizes: lengths of the two answers by pair; or None.

  Returns:
    {"humans": `among` them, an unparsable verdict a gap,
     "judges": {judge: {"against": `between` with the majority of the humans,
     "orders": `order_effects`, "unparsable": number of verdicts, and where
     there are sizes "lengths": `length_bias`}}}.

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
  votes = {h: settle_orders(table[h], h) for h in humans}
  truth = majority(list(votes.values()))
  of_humans = {h: labels(winners, "drop") for h, winners in votes.items()}
  out = dict(humans=among(of_humans), judges={})
  for judge in judges:
    winners = settle_orders(table[judge], judge)
    if not winners.keys() & truth.keys():
      raise DataError(
        f"{judge!r} judged no pair that {', '.join(humans)} judged; do the "
        "tables name items and models alike?"
      )
    out["judges"][judge] = dict(
      against=between(truth, winners),
      orders=order_effects(table[judge], judge),
      unparsable=sum(row.verdict is None for row in table[judge]),
    )
    if sizes is not None:
      out["judges"][judge]["lengths"] = length_bias(winners, sizes, truth)
  return out
