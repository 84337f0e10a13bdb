"""Win rates from a score of each answer, and what was generated."""

from typing import Any

import numpy as np

from jaxalign.eval import intervals


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """[n] of 1 (won), 0.5 (tied) or 0, from the scores of the two answers."""
  ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
  return np.where(ours > theirs, 1.0, np.where(ours == theirs, 0.5, 0.0))


def rates(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray | None
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


def generation_health(said: list[np.ndarray], eos: int,
                      malformed: np.ndarray | None) -> dict[str, Any]:
  """Malformed, unended and empty answers, and their length.

  Pair accuracy can rise while generation collapses, so this is always
  measured.

  Args:
    said: n arrays of generated ids.
    eos: the id that ends an answer.
    malformed: [n] bool where the data's own grammar can tell, else None: then
      an answer counts as malformed when it is empty or has no end.
  """
  ended = np.array([len(s) > 0 and s[-1] == eos for s in said])
  empty = np.array([len(s) == 0 or s[0] == eos for s in said])
  bad = (empty | ~ended) if malformed is None else malformed
  return dict(malformed=intervals.share(bad.astype(float)),
              ended=intervals.share(ended.astype(float)),
              empty=intervals.share(empty.astype(float)),
              length=intervals.mean(np.array([len(s) for s in said])))
