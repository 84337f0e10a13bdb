"""How far judges agree: with humans, with each other, with themselves.

The table is a list of `Verdict`: who compared which two answers, shown in
which order, and what was said. Rows of one pair are matched whatever order
the two models stand in.
"""

import collections
from typing import Any, Hashable, Iterable, NamedTuple, Sequence

import numpy as np

from jaxalign.errors import ConfigError, DataError
from jaxalign.eval import intervals

UNPARSABLE = {
    "tie": "an unparsable verdict counts as a tie",
    "drop": "an unparsable verdict is left out",
    "own": "unparsable is a label of its own, right where both are unparsable",
}
_UNREAD = "unparsable"  # the label of the rule "own"
_DRAWS = 2000


class Verdict(NamedTuple):
  """One rater's word on one pair of answers."""

  item: Hashable  # of the prompt
  first: str  # the model whose answer was shown first
  second: str
  rater: str
  said: str | None  # "first", "second", "tie"; None: could not be read


Pair = tuple[Hashable, str, str]  # item, and the two models in sorted order


def canonical(rows: Iterable[Verdict], rater: str
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
      raise DataError(f"verdict of {rater} on item {row.item!r} compares "
                      f"{row.first!r} with {row.second!r}, wanted two models "
                      "with different names")
    winners = {"first": row.first, "second": row.second, "tie": "",
               None: None}
    if row.said not in winners:
      raise DataError(f"verdict of {rater} on item {row.item!r} is "
                      f"{row.said!r}, wanted 'first', 'second', 'tie', or "
                      "None where it could not be read")
    a, b = sorted((row.first, row.second))
    orders = out.setdefault((row.item, a, b), {})
    if (row.first == a) in orders:
      raise DataError(f"{rater} judged item {row.item!r}, {row.first} before "
                      f"{row.second}, twice; keep one of the two rows")
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


def majority(votes: Sequence[dict[Pair, str | None]]
             ) -> dict[Pair, str | None]:
  """What more than half of the readable verdicts say, else a tie.

  Args:
    votes: verdicts by pair of each rater; a pair some rater did not judge is
      settled by the others.
  """
  said: dict[Pair, list[str]] = collections.defaultdict(list)
  for rater in votes:
    for pair, winner in rater.items():
      said[pair] += [] if winner is None else [winner]
  out: dict[Pair, str | None] = {}
  for pair, words in said.items():
    top = collections.Counter(words).most_common(1)
    out[pair] = (None if not top else top[0][0] if 2 * top[0][1] > len(words)
                 else "")
  return out


def matched(a: dict[Pair, str | None], b: dict[Pair, str | None],
            unparsable: str) -> tuple[list[Any], list[Any]]:
  """The labels of the pairs both judged, in the order of `a`.

  A label is -1 (the model first in the alphabet), 0 (tie), 1, or
  "unparsable" under the rule "own".

  Args:
    a: winners by pair, as from `settled` or `majority`.
    b: the same of another rater.
    unparsable: a key of UNPARSABLE.
  """
  if unparsable not in UNPARSABLE:
    raise ConfigError(f"unknown rule for unparsable verdicts {unparsable!r}; "
                      f"known: {', '.join(UNPARSABLE)}")
  unread = {"tie": 0, "own": _UNREAD}
  xs, ys = [], []
  for pair in a:
    if pair not in b:
      continue
    both = a[pair], b[pair]
    if unparsable == "drop" and None in both:
      continue
    x, y = (unread[unparsable] if w is None else
            {"": 0, pair[1]: -1, pair[2]: 1}[w] for w in both)
    xs.append(x)
    ys.append(y)
  return xs, ys


def _table(xs: Sequence[Any], ys: Sequence[Any]) -> np.ndarray:
  """[c, c] counts of (label of x, label of y)."""
  labels = {w: i for i, w in enumerate(dict.fromkeys([*xs, *ys]))}
  table = np.zeros((len(labels),) * 2)
  for x, y in zip(xs, ys, strict=True):
    table[labels[x], labels[y]] += 1
  return table


def _kappa(table: np.ndarray) -> np.ndarray:
  """[...] Cohen's kappa of tables [..., c, c]; NaN where chance is 1."""
  p = table / table.sum((-1, -2), keepdims=True)
  observed = np.trace(p, axis1=-2, axis2=-1)
  chance = (p.sum(-1) * p.sum(-2)).sum(-1)
  with np.errstate(invalid="ignore", divide="ignore"):
    return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)


def cohen_kappa(xs: Sequence[Any], ys: Sequence[Any]) -> dict[str, Any]:
  """Agreement beyond chance of two raters, nominal labels (Cohen 1960).

  The interval is a percentile bootstrap over the items: 2,000 tables drawn
  from the multinomial of the one observed.

  Returns:
    {"value", "low", "high", "n"}; value None where nothing was judged, or
    where both used one and the same label (chance alone agrees always).
  """
  if not len(xs):
    return dict(value=None, low=None, high=None, n=0)
  table = _table(xs, ys)
  value = float(_kappa(table))
  if np.isnan(value):
    return dict(value=None, low=None, high=None, n=len(xs))
  rng = np.random.default_rng(0)
  drawn = rng.multinomial(len(xs), table.ravel() / len(xs), _DRAWS)
  drawn = _kappa(drawn.reshape(-1, *table.shape))
  low, high = np.quantile(drawn[~np.isnan(drawn)], [0.025, 0.975])
  return dict(value=value, low=float(low), high=float(high), n=len(xs))


def krippendorff_alpha(units: Iterable[Sequence[Any]]) -> dict[str, Any]:
  """Krippendorff's alpha, nominal, any number of raters, gaps allowed.

  1 - observed / expected disagreement, where a unit of m labels counts each
  ordered pair of its labels 1 / (m - 1) times (Krippendorff 2011).

  Args:
    units: the labels each unit got; None is a gap. A unit with fewer than two
      labels says nothing and is left out.

  Returns:
    {"value", "units", "labels"}; value None where all labels are the same.
  """
  units = [[w for w in unit if w is not None] for unit in units]
  units = [unit for unit in units if len(unit) > 1]
  total = collections.Counter(w for unit in units for w in unit)
  n = sum(total.values())
  differ = n * n - sum(c * c for c in total.values())
  out = dict(value=None, units=len(units), labels=n)
  if not differ:
    return out
  observed = sum(
      (len(unit) ** 2 - sum(c * c for c in collections.Counter(unit).values()))
      / (len(unit) - 1) for unit in units)
  return out | dict(value=1 - (n - 1) * observed / differ)


def orders(rows: Iterable[Verdict], rater: str) -> dict[str, Any]:
  """Whether a rater says the same when the two answers change places.

  Returns:
    "consistent": share of pairs, readable in both orders, with one verdict;
    "kappa": between the two orders; "first": share of all verdicts with a
    winner that named the answer shown first (0.5: no position bias; its
    interval takes verdicts as independent); "unparsable": share of verdicts.
  """
  table = canonical(rows, rater)
  said = [(a_first, winner, pair) for pair, o in table.items()
          for a_first, winner in o.items()]
  first = [float((winner == pair[1]) == a_first)
           for a_first, winner, pair in said if winner]
  both = [[{pair[1]: -1, pair[2]: 1, "": 0}[o[k]] for k in (True, False)]
          for pair, o in table.items()
          if len(o) == 2 and None not in o.values()]
  return dict(
      consistent=intervals.share([float(x == y) for x, y in both]),
      kappa=cohen_kappa([x for x, _ in both], [y for _, y in both]),
      first=intervals.share(first),
      unparsable=intervals.share([float(w is None) for _, w, _ in said]))


def between(a: dict[Pair, str | None], b: dict[Pair, str | None]
            ) -> dict[str, dict[str, Any]]:
  """Percent agreement, kappa and alpha under each rule for the unparsable."""
  out = {}
  for rule in UNPARSABLE:
    xs, ys = matched(a, b, rule)
    out[rule] = dict(
        rule=UNPARSABLE[rule],
        agreement=intervals.share([float(x == y) for x, y in zip(xs, ys)]),
        kappa=cohen_kappa(xs, ys),
        alpha=krippendorff_alpha(zip(xs, ys)))
  return out


def judged(rows: Sequence[Verdict], judges: Sequence[str],
           humans: Sequence[str]) -> dict[str, Any]:
  """All there is to say of some judges beside some humans.

  Args:
    rows: the table.
    judges: raters to be judged.
    humans: raters they are held against; may be one (an objective label).

  Returns:
    {"humans": between each two of them, and alpha over all,
     "judges": {judge: {"against": `between` with the majority of the humans,
     "orders": `orders`, "unparsable": number of verdicts}}}.

  Raises:
    DataError: a rater without a row, or a judge with no pair a human judged.
  """
  known = {row.rater for row in rows}
  for rater in (*judges, *humans):
    if rater not in known:
      raise DataError(f"no verdict of rater {rater!r}; the table has "
                      f"{', '.join(sorted(known)) or 'no rows'}")
  votes = {h: settled(rows, h) for h in humans}
  truth = majority(list(votes.values()))
  names = list(humans)
  pairs = dict.fromkeys(p for v in votes.values() for p in v)
  out: dict[str, Any] = dict(
      humans=dict(
          pairs=len(pairs),
          between={f"{g} / {h}": between(votes[g], votes[h])["tie"]
                   for i, g in enumerate(names) for h in names[i + 1:]},
          alpha=krippendorff_alpha(
              [v.get(pair) for v in votes.values()] for pair in pairs)),
      judges={})
  for judge in judges:
    found = settled(rows, judge)
    if not found.keys() & truth.keys():
      raise DataError(f"{judge!r} judged no pair that {', '.join(names)} "
                      "judged; do the tables name items and models alike?")
    out["judges"][judge] = dict(
        against=between(truth, found), orders=orders(rows, judge),
        unparsable=sum(row.said is None for row in rows
                       if row.rater == judge))
  return out
