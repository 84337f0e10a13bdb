"""Win rates from a score of each answer, and what was generated."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.eval import intervals


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """[n] of 1 (won), 0.5 (tied) or 0, from the scores of the two answers."""
  ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
  return np.where(ours > theirs, 1.0, np.where(ours == theirs, 0.5, 0.0))


def rates(
  ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray | None
) -> dict[str, Any]:
  """Win rate, its macro mean over groups, and the share of ties.

  Args:
    ours: [n] scores of the policy's answers.
    theirs: [n] scores of the baseline's, on the same prompts.
    groups: [n] topics, or None.
  """
  w = wins(ours, theirs)
  out = dict(micro=intervals.share(w) | {"ties": float((w == 0.5).mean())})
  if groups is not None:
    out["macro"] = intervals.macro(w, np.asarray(groups))
  return out


def outcomes(won: np.ndarray) -> dict[str, Any]:
  """Won, tied and lost apart, and the win rate among what was decided.

  Args:
    won: [n] 1 won, 0.5 tied, 0 lost; of two orders between: 0.75, won in one
      and tied in the other, is won.
  """
  won = np.asarray(won, np.float64)
  return dict(
    won=intervals.share(won > 0.5),
    tied=intervals.share(won == 0.5),
    lost=intervals.share(won < 0.5),
    decided=intervals.share(won[won != 0.5]),
  )


def by_group(won: np.ndarray, groups: np.ndarray) -> dict[str, dict]:
  """Win rate and share of ties of every topic or source, largest first.

  Args:
    won: [n] 1 won, 0.5 tied, 0 lost.
    groups: [n] labels.
  """
  won, groups = np.asarray(won, np.float64), np.asarray(groups)
  names, group, sizes = np.unique(
    groups, return_inverse=True, return_counts=True
  )
  return {
    str(names[i]): intervals.share(won[group == i])
    | {"ties": float((won[group == i] == 0.5).mean())}
    for i in np.argsort(-sizes, kind="stable")
  }


def both_orders(
  shown_first: np.ndarray, shown_second: np.ndarray
) -> dict[str, Any]:
  """A judge's outcomes when each pair was shown in both orders.

  Args:
    shown_first: [n] our outcome where our answer was shown first: 1 won, 0.5
      tied, 0 lost; NaN where the verdict could not be read.
    shown_second: [n] our outcome where it was shown second.

  Returns:
    "won" [n]: one outcome a pair, the mean of its two orders; NaN where
    either could not be read: one order alone would carry the bias of its
    place;
    "rate": win rate over the pairs that have one, and its ties;
    "bias": mean of (first - second) / 2, what the first place adds to an
    outcome: 0 without position bias, 0.5 where the first always wins;
    "consistent": share of pairs with the same outcome in both orders;
    "unparsable": share of verdicts.
  """
  a = np.asarray(shown_first, np.float64)
  b = np.asarray(shown_second, np.float64)
  won = (a + b) / 2
  read = ~np.isnan(won)
  bias = intervals.mean((a[read] - b[read]) / 2)
  return dict(
    won=won,
    rate=intervals.share(won[read])
    | {"ties": float((won[read] == 0.5).mean()) if read.any() else None},
    bias=bias,
    consistent=intervals.share(a[read] == b[read]),
    unparsable=intervals.share(np.isnan(np.concatenate([a, b]))),
  )


def generation_health(
  said: list[np.ndarray], eos: int | Sequence[int], malformed: np.ndarray | None
) -> dict[str, Any]:
  """Malformed, unended and empty answers, and their length.

  Pair accuracy can rise while generation collapses, so this is always
  measured.

  Args:
    said: n arrays of generated ids.
    eos: the id that ends an answer, or several.
    malformed: [n] bool where the data's own grammar can tell, else None: then
      an answer counts as malformed when it is empty or has no end.
  """
  stops = set(np.atleast_1d(eos).tolist())
  ended = np.array([len(s) > 0 and s[-1] in stops for s in said])
  empty = np.array([len(s) == 0 or s[0] in stops for s in said])
  bad = (empty | ~ended) if malformed is None else malformed
  return dict(
    malformed=intervals.share(bad.astype(float)),
    ended=intervals.share(ended.astype(float)),
    empty=intervals.share(empty.astype(float)),
    length=intervals.mean(np.array([len(s) for s in said])),
  )
