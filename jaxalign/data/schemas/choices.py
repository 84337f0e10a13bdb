"""Which answer won: what a code in a column means, or that it must be asked.

A code whose meaning is not certain is never guessed: 0 and 1 may count the
answers from 0 (PKU-SafeRLHF), or say whether the first won (SHP). What a
column's codes mean is settled once all of them are known, for all rows alike.
"""

import collections
from collections.abc import Callable, Mapping
import re
from typing import Any, NamedTuple

from jaxalign.errors import ConfigError, DataError

SIDES = ("first", "second", "tie")
LABELS = ("liked", "disliked")
BY_SCORE = "higher score wins"
_TIES = (
  "tie",
  "ties",
  "tied",
  "tie_(bothbad)",
  "tie(bothbad)",
  "tie_bothbad",
  "both",
  "bothbad",
  "both_bad",
  "both_good",
  "neither",
  "draw",
  "equal",
  "same",
  "a=b",
  "b=a",
)
_FIRST = ("first", "a", "left", "a>b", "a>>b", "b<a", "b<<a")
_SECOND = ("second", "b", "right", "b>a", "b>>a", "a<b", "a<<b")
ANSWER_NAMES = (
  "model",
  "answer",
  "response",
  "output",
  "assistant",
  "completion",
  "candidate",
  "summary",
  "option",
  "conversation",
  "chat",
  "text",
  "human_ref",
  "system",
)
WORDS = (
  {
    word: side
    for side, words in zip(SIDES, (_FIRST, _SECOND, _TIES))
    for word in words
  }
  | {
    f"{name}{mark}{letter}": side
    for name in ANSWER_NAMES
    for mark in ("_", "")
    for letter, side in (("a", "first"), ("b", "second"))
  }
  | {
    f"{side}_{name}": side
    for name in ANSWER_NAMES
    for side in ("first", "second")
  }
)
_NUMBERED = re.compile(rf"(?:{'|'.join(ANSWER_NAMES)})_?([012])")
LABEL_WORDS = {
  word: label
  for label, words in (
    (
      "liked",
      (
        "true",
        "thumbs_up",
        "thumbsup",
        "up",
        "like",
        "liked",
        "good",
        "positive",
        "pos",
        "desirable",
        "chosen",
        "upvote",
        "+1",
        "👍",
      ),
    ),
    (
      "disliked",
      (
        "false",
        "thumbs_down",
        "thumbsdown",
        "down",
        "dislike",
        "disliked",
        "bad",
        "negative",
        "neg",
        "undesirable",
        "rejected",
        "downvote",
        "👎",
      ),
    ),
  )
  for word in words
}


class Undecided(NamedTuple):
  """A row whose column of codes must be known before it can be converted."""

  code: Any  # as the row has it
  make: Callable[[str], dict]  # "first", "second"; or "liked", "disliked"
  sides: tuple[str, ...] = SIDES
  names: tuple[Any, Any] = (None, None)  # of the two answers, where they have
  scores: tuple[Any, Any] = (None, None)  # of the two answers


def code_of(value: Any) -> str:
  """A code as text: 1, 1.0 and "1" are one, and so are "Model A", "model_a"."""
  if isinstance(value, bool):
    return str(value).lower()
  if (
    isinstance(value, float)
    and value == value
    and abs(value) < 1e15
    and (value == int(value))
  ):
    value = int(value)
  text = (
    re.sub(r"[\s-]+", "_", str(value).strip().strip("[]").lower())
    if isinstance(value, str)
    else str(value)
  )
  number = re.fullmatch(r"_?(\d+)(?:\.0+)?", text)
  if number:
    return ("-" if text.startswith("_") else "") + number[1]
  return text


def check(rule: Any) -> None:
  """Raises ConfigError for a `data.choice` that says nothing."""
  if rule in ("", None, BY_SCORE):
    return
  known = SIDES + LABELS
  if (
    not isinstance(rule, Mapping)
    or not rule
    or not all(
      side in known and isinstance(codes, (list, tuple))
      for side, codes in rule.items()
    )
  ):
    raise ConfigError(
      f"data.choice={rule!r:.80}, wanted {{'first': [codes], 'second': "
      "[codes], 'tie': [codes]}, of single answers {'liked': [codes], "
      f"'disliked': [codes]}}, or {BY_SCORE!r}; set config.data.choice"
    )
  codes = [code_of(code) for found in rule.values() for code in found]
  if twice := [c for c, n in collections.Counter(codes).items() if n > 1]:
    raise ConfigError(
      f"data.choice gives the code {twice[0]!r} two meanings; "
      "set config.data.choice"
    )


def by_name(row: Undecided) -> str | None:
  """The side that a code names: a model's name, an id, or the text itself."""
  hits = [
    side
    for side, name in zip(SIDES, row.names)
    if name is not None
    and not isinstance(name, bool)
    and isinstance(name, (str, int))
    and code_of(name) == code_of(row.code)
  ]
  return hits[0] if len(hits) == 1 else None


def decide(
  rows: list[Undecided], rule: Any, column: str, known: Any = None
) -> dict[str, str]:
  """What every code of a column means.

  Args:
    rows: of the whole source; all of one column.
    rule: `data.choice`, "" where nothing was said.
    column: its name, for the message.
    known: the rule of a known layout.

  Returns:
    code -> one of SIDES, or of LABELS; a code that is not there is refused.

  Raises:
    DataError: codes whose meaning is not certain; names them and the knob.
  """
  rule = rule or known
  if rule and rule != BY_SCORE:
    return {
      code_of(code): side for side, codes in rule.items() for code in codes
    }
  labels = bool(rows) and rows[0].sides == LABELS
  counts = collections.Counter(
    code_of(row.code)
    for row in rows
    if row.code is not None and by_name(row) is None
  )
  table = {
    c: w for c in counts if (w := (LABEL_WORDS if labels else WORDS).get(c))
  }
  numbers = {c for c in counts if re.fullmatch(r"-?\d+(\.\d+)?", c)}
  if labels and numbers in ({"0"}, {"1"}, {"0", "1"}, {"-1", "1"}, {"-1"}):
    table |= {c: "liked" if c == "1" else "disliked" for c in numbers}
  elif not labels:
    named = {c: m[1] for c in counts if (m := _NUMBERED.fullmatch(c))}
    pair = {*named.values()} or numbers
    if pair == {"1", "2"} or named and pair == {"0", "1"}:
      low = min(pair)
      table |= {
        c: "first" if n == low else "second"
        for c, n in (named or dict.fromkeys(numbers)).items()
        for n in [n or c]
      }
  unknown = {c: n for c, n in counts.items() if c not in table}
  asked = [
    c
    for c in unknown
    if c in numbers
    or not labels
    and (c in ("true", "false") or _NUMBERED.fullmatch(c))
  ]
  # A few odd codes among certain ones are rows refused, not a column in doubt.
  if (
    unknown
    and not table
    or sum(counts[c] for c in asked) * 10 > sum(counts.values())
  ):
    found = ", ".join(
      f"{c!r:.30} ({n:,} rows)"
      for c, n in collections.Counter(unknown).most_common(6)
    )
    few = sorted(
      (int(c) if re.fullmatch(r"-?\d{1,18}", c) else c for c in unknown),
      key=lambda c: (isinstance(c, str), c),
    )[:2]
    few += ["..."] * (2 - len(few))
    one, two = LABELS if labels else SIDES[:2]
    tie = "" if labels else ", 'tie': []"
    raise DataError(
      f"{column} holds {found}, and what that means is not certain; say it: "
      f"--config.data.choice=\"{{'{one}': [{few[0]!r}], '{two}': "
      f'[{few[1]!r}]{tie}}}" or the other way round'
    )
  return table


def settled(row: Undecided, table: Mapping[str, str], rule: Any) -> str | None:
  """The side that a row's code means; None where it means none."""
  if rule == BY_SCORE and row.sides == SIDES:
    first, second = row.scores
    return (
      None
      if first is None or second is None
      else (
        "tie" if first == second else "first" if first > second else "second"
      )
    )
  return by_name(row) or table.get(code_of(row.code))
