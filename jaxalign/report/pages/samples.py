"""Answers side by side: the prompt, the baseline, every policy, the verdict."""

from typing import Any

from jaxalign.report import page
from jaxalign.report.page import Html, tag
from jaxalign.report.pages.run import fields, items, records

SAMPLES = 6  # prompts whose answers are shown
REASON = 300  # characters of what a judge wrote
_AGAINST = {
  "target": "the target",
  "sft": "the start",
  "reference": "the start",
  "chosen": "the chosen answer",
}
_SAID = {"first": "named it", "second": "named the other", "tie": "tie"}


def _won(value: Any) -> str:
  """An outcome in words; between a win and a tie the orders differed."""
  x = page.finite(value)
  if x is None:
    return "no verdict"
  return ("won" if x > 0.5 else "lost" if x < 0.5 else "tied") + (
    "" if x in (0, 0.5, 1) else " in one order"
  )


def _verdict(found: dict, against: str) -> tuple[str, Html | str]:
  """(what stands beside the answer's name, what the judge wrote)."""
  if not found:
    return "", ""
  words = f" · {_won(found.get('outcome'))} against {against}"
  said = items(found.get("verdicts"))
  replies = items(found.get("replies"))
  parts = []
  for k, (place, reply) in enumerate(zip(("first", "second"), replies)):
    # In the second order the names of the places are exchanged.
    word = said[k] if k < len(said) else None
    word = (
      {"first": "second", "second": "first"}.get(word, word) if (k) else word
    )
    parts.append(
      page.text_box(
        f"Shown {place}: {_SAID.get(str(word), 'could not be read')}",
        reply,
        "said",
        limit=REASON,
      )
    )
  return words, tag(
    "details", tag("summary", "What the judge wrote"), *parts
  ) if parts else ""


def section(found: Any, start: str) -> Html:
  """The blocks on a few prompts.

  Args:
    found: `summary["samples"]`, perhaps from a file.
    start: what the policies began from, in words.
  """
  found = records(found)
  if not found:
    return page.absent("Answers of the policies were not kept or")
  parts = []
  for sample in found[:SAMPLES]:
    rewards, verdicts = (fields(sample.get(k)) for k in ("rewards", "verdicts"))
    side = page.plain(sample.get("against") or "target")
    against = _AGAINST.get(side, side)
    texts = [("target", "Target", sample.get("target"))]
    if side == "chosen":
      one = next(iter(verdicts.values()), None)
      texts.append(("chosen", "Chosen", fields(one).get("theirs")))
    texts.append(("sft", start, sample.get("sft")))
    texts += [
      (name, page.plain(name), text)
      for name, text in fields(sample.get("arms")).items()
    ]
    boxes = []
    for key, label, text in texts:
      reward = rewards.get(key)
      if reward is not None:
        label = f"{label} · reward {page.number(reward)}"
      words, reasons = "", ""
      if not (key == "sft" and side == "reference"):  # itself
        words, reasons = _verdict(fields(verdicts.get(key)), against)
      won = page.finite(fields(verdicts.get(key)).get("outcome"))
      kind = (
        ""
        if not words or won is None or won == 0.5
        else ("yes" if won > 0.5 else "no")
      )
      boxes.append(
        tag("div", page.text_box(label + words, text, kind, limit=800), reasons)
      )
    parts.append(
      tag(
        "div",
        page.text_box("Prompt", sample.get("prompt"), limit=800),
        page.grid(*boxes),
        class_="example",
      )
    )
  if len(found) > SAMPLES:
    parts.append(
      page.paragraph(
        f"{len(found) - SAMPLES:,} more prompts are in the job's files.",
        kind="cut",
      )
    )
  return page.join(parts)
