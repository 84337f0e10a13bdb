"""Texts of a dialogue that could pass for special tokens, in disguise.

A content may hold "<|im_end|>" or the half of it. Its first character, and
the first or last of a half, is replaced by a private-use character that stands
for it, so that a template's own tokens are the only ones in what it renders.
A stand-in is one character for one: lengths, slices and the trimming of blanks
stay what they were.
"""

import collections
from collections.abc import Collection, Iterator, Sequence
import re
from typing import Any

from jaxalign.data.schemas.schema import Refused
from jaxalign.data.special import any_of

HALF = ""  # what `found` calls a text that begins or ends like a token
# Values that templates write next to their own tokens; of others (the names
# and arguments of tools) whole tokens are enough.
_ADJACENT = ("content", "text", "reasoning_content", "reasoning", "thinking")
_PRIVATE = range(0xE000, 0xF900)


class Marks:
  """The special tokens of a tokenizer, and all texts that look like them."""

  def __init__(self, specials: Sequence[str]):
    texts = {t for t in specials if len(t) > 1}
    self.written = re.compile(any_of(texts))
    rest = collections.defaultdict(list)
    for text in texts:
      rest[text[0]].append(text[1:])
    # A match is one character, so that of two that overlap both are found.
    ways = [f"{re.escape(c)}(?=({any_of(x)}))" for c, x in rest.items()]
    self._first = re.compile("|".join(ways) or "(?!)")
    self._starts = {t[:k] for t in texts for k in range(1, len(t))}
    self._ends = {t[k:] for t in texts for k in range(1, len(t))}
    self._sizes = range(1, max(map(len, texts), default=1))
    self._inside = "\0".join(texts)

  def found(self, value: Any) -> set[str]:
    """The tokens, or HALF, that the strings of a JSON value look like."""
    places = (self._places(text, key) for key, text in _strings(value))
    return {name for found in places for name, _ in found}

  def _places(self, text: str, key: str) -> Iterator[tuple[str, int]]:
    """(token or HALF, where the character to replace is) in a text."""
    for m in self._first.finditer(text):
      yield m[0] + m[m.lastindex], m.start()
    core = text.strip() if key in _ADJACENT else ""
    if core:
      at, alone = text.index(core), core in self._inside
      if alone or any(core[:k] in self._ends for k in self._sizes):
        yield HALF, at
      if alone or any(core[-k:] in self._starts for k in self._sizes):
        yield HALF, at + len(core) - 1

  def stand_ins(self, value: Any) -> dict[str, str]:
    """For each character to be replaced one that occurs nowhere.

    Raises:
      Refused: all 6,400 occur.
    """
    wanted, used = set(), set()
    for key, text in _strings(value):
      wanted.update(text[i] for _, i in self._places(text, key))
      used.update(text, re.findall(r"\\u([0-9a-f]{4})", text))
    free = (chr(i) for i in _PRIVATE if not {chr(i), f"{i:04x}"} & used)
    out = dict(zip(sorted(wanted), free))
    if len(out) < len(wanted):
      raise Refused(
        "too many private-use characters", f"all {len(_PRIVATE):,} of them"
      )
    return out

  def disguised(
    self,
    value: Any,
    names: Collection[str],
    stand_ins: dict[str, str],
    key: str = "",
  ) -> Any:
    """A JSON value in which nothing looks like one of `names` any more."""
    hide = lambda v, key="": self.disguised(v, names, stand_ins, key)
    if isinstance(value, dict):
      return {hide(k): hide(v, k) for k, v in value.items()}
    if isinstance(value, list):
      return [hide(v, key) for v in value]
    if not isinstance(value, str):
      return value
    out = list(value)
    for name, i in self._places(value, key):
      if name in names:
        out[i] = stand_ins[value[i]]
    return "".join(out)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
  """(key, text) of every string in a JSON value, its keys among them."""
  if isinstance(value, str):
    yield key, value
  elif isinstance(value, dict):
    for k, v in value.items():
      yield "", k
      yield from _strings(v, k)
  elif isinstance(value, list):
    for v in value:
      yield from _strings(v, key)
