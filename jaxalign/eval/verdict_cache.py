"""Verdicts paid for once: a file of lines, read again by the next run."""

import json
import pathlib
import threading
import time
from typing import Any

from jaxalign.core.errors import ConfigError, WriteError

_VERDICTS = ("first", "second", "tie", None)
_SHOWN = 600  # characters of a reply that are kept in memory, to be shown


def _parsed(text: bytes) -> dict[str, Any] | None:
  """A line of the file that holds together, or None."""
  try:
    line = json.loads(text)
    counts = [line["requests"], line["tokens"]]
    good = all(isinstance(n, int) and n >= 0 for n in counts)
    if "key" in line:
      good = good and line["verdict"] in _VERDICTS
      good = good and isinstance(line["key"], str)
      good = good and isinstance(line.get("reply", ""), str)
  except (ValueError, TypeError, KeyError):
    return None
  return line if good else None


class VerdictCache:
  """The verdicts in a file, by key, and what all its requests have cost.

  Every attempt is a line, failed ones too, so that a cap holds over restarts.
  The caps are hard: a request is let through only if the most it can cost is
  still there. A line torn by a kill is passed over, and its pair judged again.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self.verdicts: dict[str, str | None] = {}
    self.replies: dict[str, str] = {}  # the beginning of each, by key
    self.requests = self.tokens = self.broken = 0
    self._pending = self._reserved = 0  # requests, and tokens they may take
    self._next = 0.0  # when the next request may start
    self._lock = threading.Lock()
    data = self.path.read_bytes() if self.path.exists() else b""
    for line in map(_parsed, data.splitlines()):
      if line is None:
        self.broken += 1
      else:
        self._count(line)
    # A torn last line must not swallow the next one.
    self._start = b"\n" if data and not data.endswith(b"\n") else b""

  def _count(self, line: dict[str, Any]) -> None:
    self.requests += line["requests"]
    self.tokens += line["tokens"]
    if "key" in line:
      self.verdicts[line["key"]] = line["verdict"]
      self.replies[line["key"]] = line.get("reply", "")[:_SHOWN]

  def reserve(self, e: Any, most: int) -> None:
    """Waits for a turn, and reserves a request of at most `most` tokens.

    Raises:
      ConfigError: a cap of `e`, an endpoint, would be exceeded.
    """
    with self._lock:
      requests = self.requests + self._pending + 1
      tokens = self.tokens + self._reserved + most
      for what, used, knob in (
        ("requests", requests, "max_requests"),
        ("tokens", tokens, "max_total_tokens"),
      ):
        if used > (cap := getattr(e, knob)):
          raise ConfigError(
            f"the judge's cap of {cap} {what} is reached (the next request "
            f"could make it {used}); the verdicts so far are kept: raise "
            f"{knob} and start the same command again"
          )
      self._pending += 1
      self._reserved += most
      start = max(time.monotonic(), self._next)
      self._next = start + 60.0 / e.per_minute
    time.sleep(max(0.0, start - time.monotonic()))

  def add(self, reserved: int, line: dict[str, Any]) -> None:
    """Appends one attempt, and frees the tokens that it had reserved."""
    text = json.dumps(line, ensure_ascii=True).encode() + b"\n"
    with self._lock:
      self._pending -= 1
      self._reserved -= reserved
      try:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as f:
          f.write(self._start + text)
      except OSError as error:
        raise WriteError(
          f"{self.path}: {error}; free some space or choose another workdir"
        ) from error
      self._start = b""
      self._count(line)
