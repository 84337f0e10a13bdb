"""Which of two answers is better: what a code in a column means.

A code whose meaning is not certain is never guessed: 0 and 1 may count the
answers from 0 (PKU-SafeRLHF), or say whether the first is better (SHP). The
codes of a column are settled once all of them are known, for all rows alike.
"""

import collections
from collections.abc import Callable, Iterable, Mapping
import re
from typing import Any, NamedTuple

from jaxalign.core.errors import ConfigError, DataError

SIDES = ("first", "second", "tie")
LABELS = ("liked", "disliked")
BY_SCORE = "higher score wins"
ANSWER_NAMES = tuple(
  "model answer response output assistant completion candidate summary option "
  "conversation chat text human_ref system".split()
)
_SIDE_WORDS = {
  "first": "first a left a>b a>>b b<a b<<a",
  "second": "second b right b>a b>>a a<b a<<b",
  "tie": (
    "tie ties tied tie_(bothbad) tie(bothbad) tie_bothbad both bothbad "
    "both_bad both_good neither draw equal same a=b b=a"
  ),
}
_LABEL_WORDS = {
  "liked": (
    "true thumbs_up thumbsup up like liked good positive pos desirable chosen "
    "upvote +1 \N{THUMBS UP SIGN}"
  ),
  "disliked": (
    "false thumbs_down thumbsdown down dislike disliked bad negative neg "
    "undesirable rejected downvote \N{THUMBS DOWN SIGN}"
  ),
}


def _by_word(table: Mapping[str, str]) -> dict[str, str]:
  return {word: side for side, text in table.items() for word in text.split()}


LABEL_WORDS = _by_word(_LABEL_WORDS)
WORDS = _by_word(_SIDE_WORDS)
for _name in ANSWER_NAMES:  # model_a, modelb, first_model ...
  for _side, _letter in (("first", "a"), ("second", "b")):
    WORDS |= dict.fromkeys(
      (f"{_name}_{_letter}", f"{_name}{_letter}", f"{_side}_{_name}"), _side
    )
_NUMBERED = re.compile(rf"(?:{'|'.join(ANSWER_NAMES)})_?([012])")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_SURE_LABELS = ({"0"}, {"1"}, {"0", "1"}, {"-1", "1"}, {"-1"})


class Undecided(NamedTuple):
  """A row whose column of codes must be known before it can be converted."""

  code: Any  # as the row has it
  make: Callable[[str], dict]  # "first", "second"; or "liked", "disliked"
  sides: tuple[str, ...] = SIDES
  names: tuple[Any, Any] = (None, None)  # of the two answers, where they have
  scores: tuple[Any, Any] = (None, None)  # of the two answers
  more: Mapping[str, Any] = {}  # what the converted row gets besides


def code_of(value: Any) -> str:
  """A code as text: 1, 1.0 and "1" are one, and so are "Model A", "model_a"."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, float) and abs(value) < 1e15 and value.is_integer():
    value = int(value)
  text = str(value)
  if isinstance(value, str):
    text = re.sub(r"[\s-]+", "_", text.strip().strip("[]").lower())
  number = re.fullmatch(r"(_?)(\d+)(?:\.0+)?", text)
  return number[1].replace("_", "-") + number[2] if number else text


def check_choice(rule: Any) -> None:
  """Raises ConfigError for a `data.choice` that is no rule."""
  if rule in ("", None, BY_SCORE):
    return
  entries = rule.items() if isinstance(rule, Mapping) else ()
  if not entries or not all(
    side in SIDES + LABELS and isinstance(codes, (list, tuple))
    for side, codes in entries
  ):
    raise ConfigError(
      f"data.choice={rule!r:.80}, wanted {{'first': [codes], 'second': "
      "[codes], 'tie': [codes]}, of single answers {'liked': [codes], "
      f"'disliked': [codes]}}, or {BY_SCORE!r}; set config.data.choice"
    )
  codes = [code_of(code) for codes in rule.values() for code in codes]
  if twice := [c for c, n in collections.Counter(codes).items() if n > 1]:
    raise ConfigError(
      f"data.choice gives the code {twice[0]!r} two meanings; set "
      "config.data.choice"
    )


def _by_name(row: Undecided) -> str | None:
  """The side that a code names: a model's name, an id, or the text itself."""
  code = code_of(row.code)
  names = [(s, n) for s, n in zip(SIDES, row.names) if type(n) in (str, int)]
  hits = [side for side, name in names if code_of(name) == code]
  return hits[0] if len(hits) == 1 else None


def sides_by_number(codes: Iterable[str]) -> tuple[dict[str, str], set[str]]:
  """Sides of codes that count the answers, with no third number among them.

  Returns:
    code -> side, and the codes that may count them or mean something else.
  """
  numbers = {c: c for c in codes if _NUMBER.fullmatch(c)}
  named = {c: m[1] for c in codes if (m := _NUMBERED.fullmatch(c))}
  found, sides = named or numbers, {}
  pair = set(found.values())
  if pair == {"1", "2"} or named and pair == {"0", "1"}:
    low = min(pair)
    sides = {c: "first" if n == low else "second" for c, n in found.items()}
  return sides, {*numbers, *named, "true", "false"}


def meanings(rows: list[Undecided], rule: Any, column: str) -> dict[str, str]:
  """What every code of a column means.

  Args:
    rows: of the whole source; all of one column.
    rule: `data.choice` or that of a known layout; empty where there is none.
    column: its name, for the message.

  Returns:
    code -> one of SIDES, or of LABELS; a code that is not there is refused.

  Raises:
    DataError: codes whose meaning is not certain; names them and the knob.
  """
  if rule and rule != BY_SCORE:
    return {code_of(x): side for side, codes in rule.items() for x in codes}
  labels = bool(rows) and rows[0].sides == LABELS
  known = [row for row in rows if row.code is not None and not _by_name(row)]
  counts = collections.Counter(code_of(row.code) for row in known)
  words = LABEL_WORDS if labels else WORDS
  table = {code: words[code] for code in counts if code in words}
  by_number, doubtful = sides_by_number(counts)
  if labels:
    doubtful = {code for code in counts if _NUMBER.fullmatch(code)}
    sure = doubtful if doubtful in _SURE_LABELS else ()
    by_number = {c: "liked" if c == "1" else "disliked" for c in sure}
  table |= by_number
  unknown = collections.Counter(
    {c: n for c, n in counts.items() if c not in table}
  )
  in_doubt = sum(n for code, n in unknown.items() if code in doubtful)
  # A few odd codes among certain ones are rows refused, not a column in doubt.
  if unknown and not table or in_doubt * 10 > sum(counts.values()):
    raise _uncertain(unknown, LABELS if labels else SIDES, column)
  return table


def _uncertain(
  unknown: collections.Counter, sides: tuple[str, ...], column: str
) -> DataError:
  most = unknown.most_common(6)
  found = ", ".join(f"{code!r:.30} ({n:,} rows)" for code, n in most)
  codes = [int(c) if re.fullmatch(r"-?\d{1,18}", c) else c for c in unknown]
  few = sorted(codes, key=lambda code: (isinstance(code, str), code))[:2]
  one, two = [repr([code]) for code in (few + ["..."])[:2]]
  tie = ", 'tie': []" if sides == SIDES else ""
  return DataError(
    f"{column} holds {found}, whose meaning is not certain; set "
    f"--config.data.choice=\"{{'{sides[0]}': {one}, '{sides[1]}': {two}{tie}}}"
    '" or the other way round'
  )


def side_of(row: Undecided, table: Mapping[str, str], rule: Any) -> str | None:
  """The side that a row's code means; None where it means none."""
  if rule != BY_SCORE or row.sides != SIDES:
    return _by_name(row) or table.get(code_of(row.code))
  first, second = row.scores
  if first is None or second is None:
    return None
  return "tie" if first == second else "first" if first > second else "second"
