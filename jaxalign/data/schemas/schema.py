"""What all schemas share: `Schema`, a refused row, texts, scores, dialogues.

A converted row of text holds `text = prompt + response` exactly: nothing is
stripped or joined, so a dialogue's prompt ends in "\n\nAssistant:" and its
response starts with the space that follows it. A row of messages also holds
`turns`, for a chat template to write in its own way, `tools` where it has some
and `answers` where an answer is more than its text. Where the row has scores,
`margin` is how much better the chosen side was rated.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import re
from typing import Any

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ANSWER_PAIRS = ("all", "adjacent", "best_worst")


class Refused(Exception):
  """A row that cannot be trained on: a stable `reason`, and the `detail`."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.detail = reason, detail


def row_or_refused(convert: Callable[..., Any], *values: Any) -> Any:
  """What `convert` returns, or the Refused that it raises."""
  try:
    return convert(*values)
  except Refused as error:
    return error


@dataclasses.dataclass(frozen=True)
class Schema:
  """One shape of row.

  Attributes:
    name: as in `config.data.schema`.
    convert: row -> a dict (prompt, chosen and rejected, or completion and
      label), an `Undecided`, or a list of dicts; raises Refused.
    wants: the columns it cannot do without.
    matches: whether a row has this shape; None: it has all that it `wants`.
    many: `convert(row, pairs)` returns a list; `pairs`: one of ANSWER_PAIRS.
    roles: column -> what it becomes, in words.
    rule: what the codes of a choice mean, where that is known.
    code: the column that holds them.
    fields: of a public layout, target -> path.
  """

  name: str
  convert: Callable[..., Any]
  wants: tuple[str, ...] = ()
  matches: Callable[[dict], bool] | None = None
  many: bool = False
  roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
  rule: Any = None
  code: str = "choice"
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def fits(self, row: dict) -> bool:
    """Whether a row has this shape."""
    if self.matches is None:
      return all(name in row for name in self.wants)
    return self.matches(row)


def text_of(row: Mapping, field: str, empty: str = "empty response") -> str:
  """`row[field]` if it is a text that is not blank; Refused otherwise."""
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


def list_of(row: Mapping, field: str) -> list:
  """`row[field]` if it is a list; Refused otherwise."""
  if field not in row:
    raise Refused("missing field", field)
  if not isinstance(value := row[field], list):
    reason = "null" if value is None else "not a list"
    raise Refused(reason, f"{field} is a {type(value).__name__}")
  return value


def number_of(row: Mapping, field: str) -> float | None:
  """A finite number, also as text; None where there is none."""
  value = row.get(field)
  if value is None or value == "":
    return None
  known = isinstance(value, (str, int, float)) and not isinstance(value, bool)
  try:
    number = float(value) if known else math.nan
  except ValueError:
    number = math.nan
  if not math.isfinite(number):
    raise Refused("bad score", f"{field} is {value!r:.40}, wanted a number")
  return number


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
      chosen = number_of(where, name.format("chosen"))
      rejected = number_of(where, name.format("rejected"))
      if chosen is not None and rejected is not None:
        return chosen - rejected
  return None


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
    role = "user" if marker == HUMAN else "assistant"
    turns.append(dict(role=role, content=text.removeprefix(" ")))
  return turns


def split_dialogue(text: str, side: str) -> tuple[str, str]:
  """A dialogue at its last Assistant marker: (prompt with marker, response).

  Splitting at the longest common prefix of the two sides instead would cut
  inside a word whenever both replies start alike.
  """
  before, marker, answer = text.rpartition(ASSISTANT)
  if not marker:
    raise Refused("no Assistant turn", f"{side} has no {ASSISTANT!r}")
  if HUMAN in answer:
    raise Refused("ends in a Human turn", side)
  return before + marker, answer
