"""What all schemas share: a row refused, a pair or a single answer made.

A converted row of text holds `text = prompt + response` exactly: nothing is
stripped or joined, so a dialogue's prompt ends in "\n\nAssistant:" and its
response starts with the space that follows it. A row of messages holds `turns`
beside that text, for a chat template to write in its own way, `tools` where it
has some and `answers` where an answer is more than its text. Where the row has
scores, `margin` is how much better the chosen side was said to be.
"""

from collections.abc import Callable, Mapping
import math
import re
from typing import Any, NamedTuple

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Refused(Exception):
  """A row that cannot be trained on: a stable `reason`, and the `detail`."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.detail = reason, detail


class Schema(NamedTuple):
  """One shape of row: `matches(row)` knows it, `convert(row)` checks it."""

  name: str
  matches: Callable[[dict], bool]
  convert: Callable[..., Any]  # a dict or an Undecided; if `many`, a list
  kind: str  # "pairs" or "unpaired"
  many: bool = False  # `convert(row, pairs)` with one of ANSWER_PAIRS
  wants: tuple[str, ...] = ()  # columns it cannot do without
  roles: Mapping[str, str] = {}  # column -> what it becomes
  rule: Any = None  # what the codes of a choice mean, where that is known
  code: str = "choice"  # the column that holds them


ANSWER_PAIRS = ("all", "adjacent", "best_worst")


def text_of(row: Mapping, field: str, empty: str = "empty response") -> str:
  """`row[field]` if it is text with something in it; Refused otherwise."""
  if field not in row:
    raise Refused("missing field", field)
  value = row[field]
  if value is None:
    raise Refused("null", field)
  if not isinstance(value, str):
    raise Refused("not a string", f"{field} is a {type(value).__name__}")
  if not value.strip():
    raise Refused(empty, f"{field} is {value[:20]!r}")
  return value


def number_of(row: Mapping, field: str) -> float | None:
  """A finite number, also as text; None where there is none."""
  value = row.get(field)
  if value is None or value == "":
    return None
  if isinstance(value, str):
    try:
      value = float(value)
    except ValueError:
      pass
  if (
    isinstance(value, bool)
    or not isinstance(value, (int, float))
    or (not math.isfinite(value))
  ):
    raise Refused("bad score", f"{field} is {value!r:.40}, wanted a number")
  return float(value)


def group_of(prompt: str) -> str:
  """What one split must hold whole: the first human turn, or the prompt."""
  _, marker, rest = prompt.partition(HUMAN)
  first = rest.partition(ASSISTANT)[0].strip() if marker else ""
  return first or prompt


def turns_of(prompt: str) -> list[dict[str, str]] | None:
  """The messages of a dialogue's text; None where it is no dialogue.

  One space after a marker belongs to the marker; what stands before the first
  marker is the system's turn.
  """
  if HUMAN not in prompt or not prompt.endswith(ASSISTANT):
    return None
  system, *parts = re.split(f"({HUMAN}|{ASSISTANT})", prompt)
  turns = [dict(role="system", content=system)] if system.strip() else []
  for marker, text in zip(parts[:-2:2], parts[1:-2:2]):
    turns.append(
      dict(
        role="user" if marker == HUMAN else "assistant",
        content=text.removeprefix(" "),
      )
    )
  return turns


def margin_of(row: Mapping[str, Any]) -> float | None:
  """chosen_score - rejected_score, or None where the row has not both.

  They may be called score_chosen and score_rejected, or stand in `metadata`;
  or the row holds a `margin` itself.
  """
  if (margin := number_of(row, "margin")) is not None:
    return margin
  inner = row.get("metadata")
  for where in (row, inner if isinstance(inner, Mapping) else {}):
    for name in ("{}_score", "score_{}"):
      pair = [
        number_of(where, name.format(side)) for side in ("chosen", "rejected")
      ]
      if None not in pair:
        return pair[0] - pair[1]
  return None


def make_pair(
  prompt: str,
  chosen: str,
  rejected: str,
  group: str = "",
  turns: list[dict] | None = None,
  margin: float | None = None,
  **known: Any,
) -> dict[str, Any]:
  """The converted pair, once its two sides are known to differ."""
  if not prompt.strip():
    raise Refused("empty prompt", f"prompt is {prompt[:20]!r}")
  for side, text in (("chosen", chosen), ("rejected", rejected)):
    if not text.strip():
      raise Refused("empty response", f"{side} is {text[:20]!r}")
  if chosen.strip() == rejected.strip():
    raise Refused("chosen equals rejected", f"{chosen[:40]!r}")
  return dict(
    prompt=prompt,
    chosen=chosen,
    rejected=rejected,
    group=group or group_of(prompt),
  ) | _known(turns=turns, margin=margin, **known)


def _known(**values: Any) -> dict[str, Any]:
  return {name: value for name, value in values.items() if value is not None}


def make_unpaired(
  prompt: str,
  completion: str,
  label: bool,
  group: str = "",
  turns: list[dict] | None = None,
  **known: Any,
) -> dict[str, Any]:
  """The converted single answer, liked or disliked."""
  if not prompt.strip():
    raise Refused("empty prompt", f"prompt is {prompt[:20]!r}")
  if not completion.strip():
    raise Refused("empty response", f"completion is {completion[:20]!r}")
  return dict(
    prompt=prompt,
    completion=completion,
    label=label,
    group=group or group_of(prompt),
  ) | _known(turns=turns, **known)


def split_dialogue(text: str, side: str) -> tuple[str, str]:
  """A dialogue at its last Assistant marker: (prompt with marker, response).

  Splitting at the longest common prefix of the two sides instead would cut
  inside a word whenever both replies start alike.
  """
  at = text.rfind(ASSISTANT)
  if at < 0:
    raise Refused("no Assistant turn", f"{side} has no {ASSISTANT!r}")
  cut = at + len(ASSISTANT)
  if HUMAN in text[cut:]:
    raise Refused("ends in a Human turn", side)
  return text[:cut], text[cut:]
