"""What the words and codes of raters mean: known, told by the user, or asked.

Some words are certain (`A`, `model_b`, `first`, `tie`), some codes are where
the answers are numbered alike (1 and 2 beside `response1` and `response2`) or
the layout is a known one. No other is guessed.
"""

import ast
import collections
import math
import re
from typing import Any, Mapping, NamedTuple

from jaxalign.errors import ConfigError

LABELS = "labels"  # compare the labels as they stand
NAMES = "names"  # a verdict is the name of the winner
_SIDES = ("first", "second", "tie")
_ANSWER = (r"(?:model|answer|response|assistant|output|option|completion|"
           r"candidate|conversation|system|summary|text)")
_WORDS = {"first": rf"first(_{_ANSWER})?|({_ANSWER}_?)?a|{_ANSWER}_?1",
          "second": rf"second(_{_ANSWER})?|({_ANSWER}_?)?b|{_ANSWER}_?2",
          "tie": r"tie|ties|tied|draw|equal|same|tie_\(?both_?bad\)?|both_?bad"}
_NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d{1,15})?")
_LOST = 0.2  # of a column's verdicts that may be no known word
_EXAMPLE = "--choice=\"{'first': [1], 'second': [2], 'tie': [0]}\""


class Choice(NamedTuple):
  """What --choice says: codes and their sides, or one of the two words."""

  codes: dict[str, str] = {}
  word: str = ""  # LABELS, NAMES, or none of them


def code(value: Any) -> str | None:
  """A verdict as one word in lower case, a number as it is counted; None
  where there is none."""
  if value is None:
    return None
  if isinstance(value, bool):
    return "true" if value else "false"
  if isinstance(value, (int, float)):
    if not (isinstance(value, int) or math.isfinite(value)):
      return None if math.isnan(value) else str(value)
    if abs(value) > 1e15:
      return "a number beyond 1e15"
    return str(int(value)) if value == int(value) else repr(float(value))
  if not isinstance(value, str):
    return f"a {type(value).__name__}"
  text = value.strip()
  marked = re.fullmatch(r"\[\[(.*)\]\]", text, re.DOTALL)  # MT-bench: [[C]]
  if marked:
    text = "tie" if marked[1].strip() in "cC" else marked[1].strip()
  if _NUMBER.fullmatch(text):
    return code(float(text))
  return re.sub(r"[\s_-]+", "_", text.casefold())[:100] or None


def side(word: str) -> str | None:
  """"first", "second" or "tie" where the word is certain, else None."""
  return next((s for s, words in _WORDS.items() if re.fullmatch(words, word)),
              None)


def parse_choice(text: str | None) -> Choice:
  """The value of --choice.

  Raises:
    ConfigError: it is neither a dict of codes nor a known word.
  """
  if text is None:
    return Choice()
  if text in (LABELS, NAMES):
    return Choice(word=text)
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError,
          RecursionError):
    value = None
  if not isinstance(value, dict) or not value.keys() <= set(_SIDES) or not (
      {"first", "second"} <= value.keys()):
    raise ConfigError(f"--choice={text[:80]!r}, wanted {_EXAMPLE}, or "
                      f"{LABELS!r} (compare labels as they stand), or "
                      f"{NAMES!r} (a verdict is the winner's name)")
  out: dict[str, str] = {}
  for name, codes in value.items():
    for one in codes if isinstance(codes, (list, tuple, set)) else [codes]:
      key = code(one)
      if key is None or out.setdefault(key, name) != name:
        raise ConfigError(f"--choice gives the code {one!r:.40} to "
                          f"{out.get(key or '', 'nothing')} and to {name}")
  return Choice(out)


class Meaning(NamedTuple):
  """What each code of a column means, and how that is known."""

  sides: dict[str, str | None]  # None: could not be read
  why: str
  lost: dict[str, int]  # codes that are no known word, and how many


def meaning(counts: Mapping[str, int], choice: Choice, *, where: str,
            known: Mapping[str, str], numbered: bool, forgiving: bool
            ) -> Meaning:
  """What the codes of one file's verdicts mean.

  Args:
    counts: of each code, as from `code`.
    choice: what the user says.
    where: file and columns, for messages.
    known: code -> side where the layout is a known one.
    numbered: the answers' columns are numbered 1 and 2.
    forgiving: an unknown word is an unparsable verdict, however many.

  Raises:
    ConfigError: a code whose meaning is not certain.
  """
  numbers = {c for c in counts if _NUMBER.fullmatch(c)}
  by_number = {"1": "first", "2": "second"} if (
      numbered and numbers == {"1", "2"}) else {}
  sides, ways, lost = {}, set(), collections.Counter()
  for c, n in counts.items():
    for way, found in (("--choice", choice.codes.get(c)),
                       ("the layout", known.get(c)), ("the word", side(c)),
                       ("the answers' numbers", by_number.get(c))):
      if found:
        sides[c] = found
        ways.add(way)
        break
    else:
      lost[c] += n
  total = sum(counts.values())
  codes = [c for c in lost if c in numbers or c in ("true", "false")]
  if (codes and not choice.codes) or not forgiving and (
      sum(lost.values()) > _LOST * total):
    raise ConfigError(
        f"{where}: the meaning of {_list(lost)} is not certain; say it with "
        f"{_EXAMPLE}, or compare the labels as they stand with "
        f"--choice={LABELS}")
  sides |= dict.fromkeys(lost)
  return Meaning(sides, ", ".join(sorted(ways)), dict(lost))


def _list(codes: Mapping[str, int], limit: int = 6) -> str:
  """Codes in words, with their number."""
  shown = sorted(codes, key=lambda c: (-codes[c], c))[:limit]
  text = ", ".join(f"{c!r:.40} ({codes[c]:,} times)" for c in shown)
  more = len(codes) - len(shown)
  return text + (f" and {more:,} more" if more else "")


def described(m: Meaning, first: str, second: str) -> list[str]:
  """The reading of a column's codes, in lines."""
  names = dict(first=f"{first} wins", second=f"{second} wins", tie="tie")
  told = {c: s for c, s in sorted(m.sides.items()) if s}
  shown = list(told.items())[:12]
  text = ", ".join(f"{c!r:.40} = {names[s]}" for c, s in shown)
  if len(told) > len(shown):
    text += f" and {len(told) - len(shown):,} more codes"
  out = [f"verdicts: {text or 'none'}" + (f" (by {m.why})" if m.why else "")]
  if m.lost:
    out.append(f"{sum(m.lost.values()):,} verdicts could not be read: "
               f"{_list(m.lost)}; --choice says what a code means")
  return out
