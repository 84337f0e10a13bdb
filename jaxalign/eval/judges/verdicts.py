"""A judge's outcomes as metrics: the win rate, its ties, lengths and topics."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.eval import agreement, intervals, lengths, winrate

# What answers are compared with -> the metric, and the same in words.
BASELINES = {
  "target": ("win_vs_target", "the target"),
  "reference": ("win_vs_sft", "the reference"),
  "chosen": ("win_vs_chosen", "the chosen answer"),
}
LEANING = 0.1  # of a first place, in outcomes, above which a page warns


def measured(
  baseline: str,
  won: np.ndarray,
  ours: Sequence[str],
  theirs: Sequence[str],
  groups: np.ndarray | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Win rate, mean over groups, win rate at equal length; and their details.

  A pair without a verdict is left out of all of them. Lengths are in
  characters, which no tokenizer shifts.

  Args:
    baseline: a key of BASELINES.
    won: [n] 1 won, 0.5 tied, 0 lost, between where two orders differ; NaN
      where no verdict could be read.
    ours: n answers.
    theirs: n answers of the baseline.
    groups: [n] topics or sources, or None.

  Returns:
    {metric: {"value", "low", "high", "n"}} and the outcomes apart, at equal
    length and by group.
  """
  name, words = BASELINES[baseline]
  won = np.asarray(won, np.float64)
  read = ~np.isnan(won)
  size = lambda texts: np.array([len(t) for t in texts], np.float64)[read]
  fair = lengths.controlled(won[read], size(ours), size(theirs))
  won = won[read]
  ties = {"ties": float((won == 0.5).mean()) if len(won) else None}
  out = {name: intervals.share(won) | ties}
  details: dict[str, Any] = dict(
    outcomes=winrate.outcomes(won), equal_length=fair, against=words
  )
  if groups is not None:
    groups = np.asarray(groups)[read]
    out[f"{name}_macro"] = intervals.macro(won, groups)
    details["by_topic"] = winrate.by_group(won, groups)
  out[f"{name}_equal_length"] = {
    k: fair[k] for k in ("value", "low", "high", "n")
  }
  return out, details


def doubts(name: str, found: dict[str, Any]) -> list[str]:
  """Sentences on verdicts not read, and on a preference for a place.

  Args:
    name: of the judge.
    found: "unparsable", "bias" and "consistent" as of `winrate.both_orders`;
      None, the last two, of a judge that sees one answer at a time.
  """
  out = []
  lost, bias = found["unparsable"], found["bias"] or dict(value=None)
  if lost["value"]:
    out.append(
      f"{name}: {100 * lost['value']:.1f} % of its {lost['n']:,} "
      "verdicts could not be read; a prompt counts where both of its "
      "orders could be"
    )
  if bias["value"] is not None and abs(bias["value"]) > LEANING:
    place = "first" if bias["value"] > 0 else "second"
    out.append(
      f"{name} leans to the answer shown {place}: the place alone moves an "
      f"outcome by {abs(bias['value']):.2f}, and it says the same in both "
      f"orders of {100 * found['consistent']['value']:.0f} % of prompts"
    )
  return out


def against_labels(
  name: str,
  said: Sequence[tuple[Any, Any]],
  truth: Sequence[str] | None,
  ids: Sequence[str],
) -> dict[str, Any]:
  """`agreement.judged` of a judge that was shown labelled pairs.

  Args:
    name: of the judge.
    said: its verdicts on (chosen, rejected) and on (rejected, chosen).
    truth: "first", "second" or "tie" of (chosen, rejected) where more than a
      label is known, and the labels are judged as well; else None.
    ids: of the pairs.
  """
  rows = [
    agreement.Verdict(i, "chosen", "rejected", "labels", "first") for i in ids
  ]
  for i, (as_is, turned) in zip(ids, said, strict=True):
    rows += [
      agreement.Verdict(i, "chosen", "rejected", name, as_is),
      agreement.Verdict(i, "rejected", "chosen", name, turned),
    ]
  if truth is None:
    return agreement.judged(rows, [name], ["labels"])
  rows += [
    agreement.Verdict(i, "chosen", "rejected", "true reward", t)
    for i, t in zip(ids, truth, strict=True)
  ]
  return agreement.judged(rows, [name, "labels"], ["true reward"])
