"""Rows of plain text: explicit pairs, implicit-prompt pairs, and thumbs.

A converted row holds `text = prompt + response` exactly: nothing is stripped
or joined, so a dialogue's prompt ends in "\n\nAssistant:" and its response
starts with the space that follows it. Where the prompt is a dialogue its turns
are kept beside it, for a chat template to write in its own way; where the row
has scores, `margin` is how much better the chosen side was said to be.
"""

import math
import re
from typing import Any, Callable, Mapping, NamedTuple

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_LABELS = {"true": True, "false": False, "1": True, "0": False}  # from CSV


class Refused(Exception):
  """A row that cannot be trained on: a stable `reason`, and the `detail`."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.detail = reason, detail


class Schema(NamedTuple):
  """One shape of row: `matches(row)` knows it, `convert(row)` checks it."""
  name: str
  matches: Callable[[dict], bool]
  convert: Callable[[dict], Any]  # a dict; if `many`, a list, see trees.py
  kind: str  # "pairs" or "thumbs"
  many: bool = False


def text_of(row: dict, field: str, empty: str = "empty response") -> str:
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


def label_of(row: dict) -> bool:
  """`row["label"]` from a bool, 0, 1, or those as text; Refused otherwise."""
  if "label" not in row:
    raise Refused("missing field", "label")
  value = row["label"]
  if value is None:
    raise Refused("null", "label")
  if isinstance(value, str):
    value = _LABELS.get(value.strip().lower(), value)
  if not isinstance(value, (bool, int, float)) or value not in (0, 1):
    raise Refused("bad label", f"{value!r:.40}, wanted true, false, 0 or 1")
  return bool(value)


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
    turns.append(dict(role="user" if marker == HUMAN else "assistant",
                      content=text.removeprefix(" ")))
  return turns


def margin_of(row: Mapping[str, Any]) -> float | None:
  """chosen_score - rejected_score, or None where the row has not both.

  They may be called score_chosen and score_rejected, or stand in `metadata`.
  """
  inner = row.get("metadata")
  for where in (row, inner if isinstance(inner, Mapping) else {}):
    for name in ("{}_score", "score_{}"):
      pair = [where.get(name.format(side)) for side in ("chosen", "rejected")]
      if any(value is None for value in pair):
        continue
      if any(isinstance(value, bool) or not isinstance(value, (int, float)) or
             not math.isfinite(value) for value in pair):
        raise Refused("bad score", f"{pair!r:.60}, wanted two numbers")
      return float(pair[0] - pair[1])
  return None


def make_pair(prompt: str, chosen: str, rejected: str, group: str = "",
              turns: list[dict[str, str]] | None = None,
              margin: float | None = None) -> dict[str, Any]:
  """The converted pair, once its two sides are known to differ."""
  if not prompt.strip():
    raise Refused("empty prompt", f"prompt is {prompt[:20]!r}")
  for side, text in (("chosen", chosen), ("rejected", rejected)):
    if not text.strip():
      raise Refused("empty response", f"{side} is {text[:20]!r}")
  if chosen.strip() == rejected.strip():
    raise Refused("chosen equals rejected", f"{chosen[:40]!r}")
  return dict(prompt=prompt, chosen=chosen, rejected=rejected,
              group=group or group_of(prompt)) | _known(turns=turns,
                                                        margin=margin)


def _known(**values: Any) -> dict[str, Any]:
  return {name: value for name, value in values.items() if value is not None}


def make_thumb(prompt: str, completion: str, label: bool, group: str = "",
               turns: list[dict[str, str]] | None = None) -> dict[str, Any]:
  """The converted thumbs row."""
  if not prompt.strip():
    raise Refused("empty prompt", f"prompt is {prompt[:20]!r}")
  if not completion.strip():
    raise Refused("empty response", f"completion is {completion[:20]!r}")
  return dict(prompt=prompt, completion=completion, label=label,
              group=group or group_of(prompt)) | _known(turns=turns)


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


def convert_explicit(row: dict) -> dict[str, Any]:
  """prompt, chosen, rejected: three texts."""
  prompt = text_of(row, "prompt", "empty prompt")
  return make_pair(prompt, text_of(row, "chosen"), text_of(row, "rejected"),
                   turns=turns_of(prompt), margin=margin_of(row))


def convert_implicit(row: dict) -> dict[str, Any]:
  """chosen and rejected: two whole dialogues, as in hh-rlhf."""
  sides = [split_dialogue(text_of(row, side), side)
           for side in ("chosen", "rejected")]
  (prompt, chosen), (other, rejected) = sides
  if prompt != other:
    at = next((i for i, (a, b) in enumerate(zip(prompt, other)) if a != b),
              min(len(prompt), len(other)))
    raise Refused("prompts differ", f"from character {at}: "
                  f"{prompt[at:at + 30]!r} and {other[at:at + 30]!r}")
  if not prompt[:-len(ASSISTANT)].strip():
    raise Refused("empty prompt", "nothing before the Assistant turn")
  return make_pair(prompt, chosen, rejected, turns=turns_of(prompt),
                   margin=margin_of(row))


def convert_thumbs(row: dict) -> dict[str, Any]:
  """prompt, completion and a label: one text liked or disliked."""
  prompt = text_of(row, "prompt", "empty prompt")
  return make_thumb(prompt, text_of(row, "completion"), label_of(row),
                    turns=turns_of(prompt))


def _texts(row: dict, *fields: str) -> bool:
  return all(isinstance(row.get(field), str) for field in fields)


EXPLICIT = Schema("explicit_pairs",
                  lambda row: _texts(row, "prompt", "chosen", "rejected"),
                  convert_explicit, "pairs")
IMPLICIT = Schema("implicit_pairs",
                  lambda row: (_texts(row, "chosen", "rejected") and
                               row.get("prompt") is None and
                               ASSISTANT in row["chosen"] + row["rejected"]),
                  convert_implicit, "pairs")
THUMBS = Schema("thumbs",
                lambda row: (_texts(row, "prompt", "completion") and
                             "label" in row), convert_thumbs, "thumbs")
