"""Verdicts paid for once: a file of lines, read again by the next run."""

import json
import pathlib
import threading
from typing import Any

from jaxalign.errors import WriteError

_SAID = ("first", "second", "tie", None)
SHOWN = 600  # characters of a reply that are kept in memory, to be shown


def _line(text: bytes) -> dict[str, Any] | None:
  """A line that holds together, or None."""
  try:
    found = json.loads(text)
  except ValueError:
    return None
  if not isinstance(found, dict) or not all(
    isinstance(found.get(k), int) and found[k] >= 0
    for k in ("requests", "tokens")
  ):
    return None
  if "key" in found and (
    not isinstance(found["key"], str)
    or found.get("said", 0) not in _SAID
    or not isinstance(found.get("reply", ""), str)
  ):
    return None
  return found


class Verdicts:
  """The verdicts in a file, by key, and what all its requests have cost.

  Every attempt is a line, failed ones too, so that a cap holds over restarts.
  A line torn by a kill is passed over, and its verdict asked for again.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self.said: dict[str, str | None] = {}
    self.replies: dict[str, str] = {}  # the start of each, by key
    self.requests = self.tokens = self.broken = 0
    self._lock = threading.Lock()
    data = self.path.read_bytes() if self.path.exists() else b""
    for text in data.splitlines():
      found = _line(text)
      if found is None:
        self.broken += 1
        continue
      self.requests += found["requests"]
      self.tokens += found["tokens"]
      if "key" in found:
        self._keep(found)
    # A torn last line must not swallow the next one.
    self._start = b"\n" if data and not data.endswith(b"\n") else b""

  def _keep(self, line: dict[str, Any]) -> None:
    self.said[line["key"]] = line["said"]
    self.replies[line["key"]] = line.get("reply", "")[:SHOWN]

  def add(self, **line: Any) -> None:
    """Appends one attempt: requests, tokens, and key and said if it has one.

    Raises:
      WriteError: the file could not be written.
    """
    text = json.dumps(line, ensure_ascii=True).encode() + b"\n"
    with self._lock:
      try:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as f:
          f.write(self._start + text)
      except OSError as error:
        raise WriteError(
          f"{self.path}: {error}; free some space or choose another workdir"
        ) from error
      self._start = b""
      self.requests += line["requests"]
      self.tokens += line["tokens"]
      if "key" in line:
        self._keep(line)
