"""JSON that may lack anything, and its values as text for people."""

from collections.abc import Iterator
import math
from typing import Any

from jaxalign.core import progress

MISSING = "–"  # a value that was never measured
NO_BREAK = "\u00a0"
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")

# What stands in for characters that hide, reorder or break text.
_VISIBLE: dict[int, str] = {i: chr(0x2400 + i) for i in range(32)}
_VISIBLE |= {9: "\t", 10: "\n", 0x7F: "\u2421"}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
_BIDI = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_VISIBLE |= {i: f"[U+{i:04X}]" for i in _BIDI}


class Node:
  """A value read from JSON, to be walked without asking what is there.

  `node.name` and `node["name"]` are the entry of an object, `node[0]` of a
  list; what is missing, or of another kind, is a node of None. Iterating over
  a list gives nodes, over anything else nothing. As text it is `visible`. It
  has no public method, so that every key can be read as an attribute.
  """

  __slots__ = ("_raw",)

  def __init__(self, value: Any):
    self._raw = raw(value)

  def __getitem__(self, key: Any) -> "Node":
    try:
      return Node(self._raw[raw(key)])
    except (KeyError, IndexError, TypeError):
      return Node(None)

  def __getattr__(self, name: str) -> "Node":
    if name.startswith("__"):  # looked up by Python and its libraries
      raise AttributeError(name)
    return self[name]

  def __iter__(self) -> Iterator["Node"]:
    if isinstance(self._raw, (list, tuple)):
      yield from map(Node, self._raw)

  def __len__(self) -> int:
    return len(self._raw) if isinstance(self._raw, (dict, list, tuple)) else 0

  def __bool__(self) -> bool:
    return bool(self._raw)

  def __eq__(self, other: Any) -> bool:
    return self._raw == raw(other)

  def __hash__(self) -> int:
    return hash(str(self))

  def __str__(self) -> str:
    return visible(self._raw)


def raw(value: Any) -> Any:
  """What a node holds; any other value itself."""
  return value._raw if isinstance(value, Node) else value


def entries(value: Any) -> list[tuple[str, Node]]:
  """The (key, node) of an object in order; of anything else, nothing."""
  found = raw(value) if isinstance(raw(value), dict) else {}
  return [(k, Node(v)) for k, v in found.items()]


def records(value: Any) -> list[Node]:
  """The objects of a list."""
  return [node for node in Node(value) if isinstance(raw(node), dict)]


def sentences(value: Any) -> list[str]:
  """A list of sentences; one sentence alone is a list of one."""
  if isinstance(raw(value), str):
    return [visible(value)]
  return list(map(str, Node(value)))


def visible(value: Any) -> str:
  """`value` as text in which control characters are seen, not obeyed.

  Also what makes a name from data safe to print on a terminal, and a lone
  surrogate safe to encode.
  """
  value = raw(value)
  if value is None:
    return MISSING
  return str(value).replace("\r\n", "\n").translate(_VISIBLE)


def shorten(text: Any, limit: int) -> str:
  """At most `limit` characters, the last an ellipsis where some were cut."""
  words = " ".join(visible(text).split())
  return words if len(words) <= limit else words[: limit - 1] + "…"


def finite(value: Any) -> float | None:
  """`value` as a float, or None where it is no finite number."""
  value = raw(value)
  if value is None or isinstance(value, (bool, str, bytes)):
    return None
  try:
    found = float(value)
  except (TypeError, ValueError, OverflowError):
    return None
  return found if math.isfinite(found) else None


def _not_finite(value: Any) -> str:
  if isinstance(raw(value), float):
    return visible({"nan": "NaN", "inf": "∞"}.get(str(raw(value)), "−∞"))
  return visible(value)


def _signed(x: float, text: str, sign: bool) -> str:
  return ("+" if sign and x > 0 else "") + text.replace("-", "−")


def number(value: Any, digits: int = 3, sign: bool = False) -> str:
  """A count with thousands marked, or a float to `digits` significant."""
  x = finite(value)
  if x is None:
    return _not_finite(value)
  if isinstance(raw(value), int) or (x == int(x) and abs(x) >= 100):
    text = f"{int(raw(value)):,}"
  elif abs(x) >= 10**digits:
    text = f"{x:,.0f}"
  elif x and abs(x) < 1e-4:
    mantissa, _, power = f"{x:.{digits - 1}e}".partition("e")
    text = f"{mantissa}e{int(power)}"
  elif x == 0:
    text = "0"
  else:
    rounded = float(f"{x:.{digits - 1}e}")  # 0.9999 has become 1: a place fewer
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    text = f"{rounded:.{max(0, places)}f}"
  return _signed(x, text, sign)


def percent(value: Any, sign: bool = False, unit: str = "%") -> str:
  """A fraction as a percentage, one decimal; `unit` "" leaves the sign off."""
  x = finite(value)
  if x is None:
    return _not_finite(value)
  text = f"{100 * x:.1f}"
  text = _signed(x, "0.0" if text == "-0.0" else text, sign)
  return text + (NO_BREAK + unit if unit else "")


def prefix(value: Any) -> tuple[float, str]:
  """(divisor, SI prefix) that bring a magnitude between 1 and 1000."""
  x, power = abs(finite(value) or 0.0), 0
  # 999.5 already reads as 1,000 with three digits.
  while x >= 999.5 and power < len(PREFIXES) - 1:
    x, power = x / 1000, power + 1
  return 1000.0**power, PREFIXES[power]


def engineering(value: Any, unit: str = "FLOP") -> str:
  """3.4e15 as "3.40 PFLOP"."""
  x = finite(value)
  if x is None:
    return _not_finite(value)
  divisor, letter = prefix(x)
  text = number(x / divisor) if divisor > 1 else number(value)
  return f"{text}{NO_BREAK}{letter}{unit}"


def seconds(value: Any) -> str:
  """A duration; what is none stays as it is."""
  x = finite(value)
  return number(value) if x is None or x < 0 else progress.duration(x)


def budget(value: Any) -> str:
  """A fraction as a percentage, a number of records as a count."""
  x = finite(value)
  whole = x is None or isinstance(raw(value), int) or x > 1
  return number(value) if whole else percent(x)
