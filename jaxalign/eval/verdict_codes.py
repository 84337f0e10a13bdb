"""What the words and codes of raters mean: known, told by the user, or asked.

Words are certain (`A`, `model_b`, `first`, `tie`), so are the codes 1 and 2
where there is no third, and those of a known layout. No other is guessed: 0
and 1 may count the answers from 0, or say whether the first one won.
"""

import ast
import collections
from collections.abc import Mapping, Sequence
import math
import re
from typing import Any, NamedTuple

from jaxalign.data.schemas.choices import ANSWER_NAMES, SIDES, WORDS
from jaxalign.errors import ConfigError

LABELS = "labels"  # compare the labels as they stand
NAMES = "names"  # a verdict is the name of the winner
_NAMED = re.compile(rf"(?:{'|'.join(ANSWER_NAMES)})_?([012])")
_NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d{1,15})?")
_LOST = 0.2  # of a column's verdicts that may be no known word
_EXAMPLE = "--choice=\"{'first': [...], 'second': [...], 'tie': [...]}\""


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


def side(word: str | None) -> str | None:
  """ "first", "second" or "tie" where the word is certain, else None."""
  return WORDS.get(word)


def parse_choice(text: Any) -> Choice:
  """The value of --choice: a text, or the dict itself; None says nothing.

  Raises:
    ConfigError: it is neither a dict of codes nor a known word.
  """
  if text is None or text == "":
    return Choice()
  if text in (LABELS, NAMES):
    return Choice(word=text)
  try:
    value = ast.literal_eval(text) if isinstance(text, str) else dict(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    value = None
  if (
    not isinstance(value, dict)
    or not value.keys() <= set(SIDES)
    or not ({"first", "second"} <= value.keys())
  ):
    raise ConfigError(
      f"--choice={str(text)[:80]!r}, wanted {_EXAMPLE}, or "
      f"{LABELS!r} (compare labels as they stand), or "
      f"{NAMES!r} (a verdict is the winner's name)"
    )
  out: dict[str, str] = {}
  for name, codes in value.items():
    for one in codes if isinstance(codes, (list, tuple, set)) else [codes]:
      key = code(one)
      if key is None or out.setdefault(key, name) != name:
        raise ConfigError(
          f"--choice gives the code {one!r:.40} to "
          f"{out.get(key or '', 'nothing')} and to {name}"
        )
  return Choice(out)


class Meaning(NamedTuple):
  """What each code of a column means, and how that is known."""

  sides: dict[str, str | None]  # None: could not be read
  why: str
  lost: dict[str, int]  # codes that are no known word, and how many


def meaning(
  counts: Mapping[str, int],
  choice: Choice,
  *,
  where: str,
  known: Mapping[str, str],
  forgiving: bool,
) -> Meaning:
  """What the codes of one file's verdicts mean.

  Args:
    counts: of each code, as from `code`.
    choice: what the user says.
    where: file and columns, for messages.
    known: code -> side where the layout is a known one.
    forgiving: an unknown word is an unparsable verdict, however many.

  Raises:
    ConfigError: a code whose meaning is not certain.
  """
  numbers = {c for c in counts if _NUMBER.fullmatch(c)}
  named = {c: m[1] for c in counts if (m := _NAMED.fullmatch(c))}
  by_number = _in_order(
    named or dict(zip(numbers, numbers)),
    [("1", "2"), ("0", "1")] if named else [("1", "2")],
  )
  sides, ways, lost = {}, set(), collections.Counter()
  for c, n in counts.items():
    for way, found in (
      ("--choice", choice.codes.get(c)),
      ("the layout", known.get(c)),
      ("the word", side(c)),
      ("the answers' number", by_number.get(c)),
    ):
      if found:
        sides[c] = found
        ways.add(way)
        break
    else:
      lost[c] += n
  total = sum(counts.values())
  codes = [
    c for c in lost if c in numbers or c in named or c in ("true", "false")
  ]
  if (
    (codes and not choice.codes)
    or not forgiving
    and (sum(lost.values()) > _LOST * total)
  ):
    raise ConfigError(
      f"{where}: the meaning of {_list(lost)} is not certain; say it with "
      f"{_EXAMPLE}, or compare the labels as they stand with "
      f"--choice={LABELS}"
    )
  sides |= dict.fromkeys(lost)
  return Meaning(sides, ", ".join(sorted(ways)), dict(lost))


def _in_order(
  found: Mapping[str, str], pairs: Sequence[tuple[str, str]]
) -> dict[str, str]:
  """The sides of codes that hold exactly the numbers of one of the pairs."""
  for low, high in pairs:
    if set(found.values()) == {low, high}:
      return {c: "first" if n == low else "second" for c, n in found.items()}
  return {}


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
    out.append(
      f"{sum(m.lost.values()):,} verdicts could not be read: "
      f"{_list(m.lost)}; --choice says what a code means"
    )
  return out
