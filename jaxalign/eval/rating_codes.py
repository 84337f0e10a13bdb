"""What the words and codes of raters mean: known, or given by the user.

Words are certain (`A`, `model_b`, `first`, `tie`), so are the codes 1 and 2
where there is no third, and those of a known layout. No other is guessed: 0
and 1 may count the answers from 0, or tell whether the first one wins.
"""

import ast
from collections.abc import Mapping
import re
from typing import Any, NamedTuple

from jaxalign.core.errors import ConfigError
from jaxalign.data.schemas.choices import SIDES, sides_by_number, WORDS

LABELS = "labels"  # compare the labels as they stand
NAMES = "names"  # a verdict is the name of the winner
_NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d{1,15})?")
_UNREAD = 0.2  # of a column's verdicts that may be no known word
_EXAMPLE = "--choice=\"{'first': [...], 'second': [...], 'tie': [...]}\""


class Choice(NamedTuple):
  """The value of --choice: codes and their sides, or one of the two words."""

  codes: dict[str, str] = {}
  word: str = ""  # LABELS, NAMES, or none of them


class Meaning(NamedTuple):
  """What each code of a column means, and how that is known."""

  sides: dict[str, str | None] = {}  # None: could not be read
  why: str = ""
  unread: dict[str, int] = {}  # codes that are no known word, and how many


def code_of_cell(value: Any) -> str | None:
  """A verdict as one word in lower case, a number as it is counted; None
  where there is none."""
  if value is None or value != value:
    return None
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, (int, float)):
    if abs(value) > 1e15:
      return "a number beyond 1e15"
    return str(int(value)) if value == int(value) else repr(float(value))
  if not isinstance(value, str):
    return f"a {type(value).__name__}"
  text = value.strip()
  if marked := re.fullmatch(r"\[\[(.*)\]\]", text, re.DOTALL):  # of MT-bench
    text = "tie" if marked[1].strip() in "cC" else marked[1].strip()
  if _NUMBER.fullmatch(text):
    return code_of_cell(float(text))
  return re.sub(r"[\s_-]+", "_", text.casefold())[:100] or None


def literal(text: Any) -> Any:
  """The value of a Python literal, or None where there is none."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return None


def parse_choice(text: str | None) -> Choice:
  """The value of --choice, None or "" where it is not set.

  Raises:
    ConfigError: it is neither a dict of codes nor a known word.
  """
  if not text:
    return Choice()
  if text in (LABELS, NAMES):
    return Choice(word=text)
  value = literal(text)
  sides = value.keys() if isinstance(value, dict) else set()
  if not {"first", "second"} <= sides <= set(SIDES):
    raise ConfigError(
      f"--choice={text[:80]!r}, wanted {_EXAMPLE}, or "
      f"{LABELS!r} (compare labels as they stand), or "
      f"{NAMES!r} (a verdict is the winner's name)"
    )
  codes: dict[str, str] = {}
  for side, cells in value.items():
    for cell in cells if isinstance(cells, (list, tuple, set)) else [cells]:
      code = code_of_cell(cell)
      if code is None or codes.setdefault(code, side) != side:
        other = codes.get(code or "", "nothing")
        raise ConfigError(
          f"--choice gives the code {cell!r:.40} to {other} and to {side}"
        )
  return Choice(codes)


def code_meaning(
  counts: Mapping[str, int],
  choice: Choice,
  where: str,
  known: Mapping[str, str],
  forgiving: bool,
) -> Meaning:
  """What the codes of one file's verdicts mean.

  Args:
    counts: of each code, as from `code_of_cell`.
    choice: given by the user.
    where: file and columns, for messages.
    known: code -> side where the layout is a known one.
    forgiving: an unknown word is an unparsable verdict, however many.

  Raises:
    ConfigError: a code whose meaning is not certain.
  """
  by_number, doubtful = sides_by_number(counts)
  ways = {
    "--choice": choice.codes,
    "the layout": known,
    "the word": WORDS,
    "the answers' number": by_number,
  }
  sides, used = dict.fromkeys(counts), set()
  for code in counts:
    way = next((way for way, table in ways.items() if table.get(code)), None)
    if way is not None:
      sides[code] = ways[way][code]
      used.add(way)
  unread = {code: n for code, n in counts.items() if not sides[code]}
  many = sum(unread.values()) > _UNREAD * sum(counts.values())
  doubt = doubtful & unread.keys() and not choice.codes
  if doubt or many and not forgiving:
    raise ConfigError(
      f"{where}: the meaning of {_listed(unread)} is not certain; give it with "
      f"{_EXAMPLE}, or compare the labels as they stand with "
      f"--choice={LABELS}"
    )
  return Meaning(sides, ", ".join(sorted(used)), unread)


def _listed(codes: Mapping[str, int]) -> str:
  """Codes in words, with their number."""
  first = sorted(codes, key=lambda c: (-codes[c], c))[:6]
  text = ", ".join(f"{c!r:.40} ({codes[c]:,} times)" for c in first)
  more = len(codes) - len(first)
  return text + (f" and {more:,} more" if more else "")


def meaning_lines(m: Meaning, first: str, second: str) -> list[str]:
  """How a column's codes were read; `first` and `second` name the answers."""
  names = dict(first=f"{first} wins", second=f"{second} wins", tie="tie")
  read = [f"{c!r:.40} = {names[s]}" for c, s in sorted(m.sides.items()) if s]
  text = ", ".join(read[:12]) or "none"
  if len(read) > 12:
    text += f" and {len(read) - 12:,} more codes"
  out = [f"verdicts: {text}" + (f" (by {m.why})" if m.why else "")]
  if m.unread:
    out.append(
      f"{sum(m.unread.values()):,} verdicts could not be read: "
      f"{_listed(m.unread)}; set --choice to give a code its meaning"
    )
  return out
