"""How often an endpoint may be asked, and how much in all."""

import random
import threading
import time

from jaxalign.errors import ConfigError

_LONGEST_S = 60.0  # between two attempts


class Budget:
  """Requests and tokens left, and the next moment one may start.

  The caps are hard: a request is let through only if the most it can cost is
  still there, and what it did not use is given back.
  """

  def __init__(
    self,
    *,
    max_requests: int,
    max_total_tokens: int,
    per_minute: float,
    requests: int = 0,
    tokens: int = 0,
  ):
    self.max_requests, self.max_tokens = max_requests, max_total_tokens
    self.requests, self.tokens = requests, tokens
    self._every = 60.0 / per_minute
    self._next = 0.0
    self._lock = threading.Lock()

  def take(self, most: int) -> None:
    """Waits for a turn and reserves a request of at most `most` tokens.

    Raises:
      ConfigError: a cap would be exceeded.
    """
    with self._lock:
      for what, used, cap, knob in (
        ("requests", self.requests + 1, self.max_requests, "max_requests"),
        ("tokens", self.tokens + most, self.max_tokens, "max_total_tokens"),
      ):
        if used > cap:
          raise ConfigError(
            f"the judge's cap of {cap} {what} is reached (the next request "
            f"could make it {used}); the verdicts so far are kept: raise "
            f"{knob} and start the same command again"
          )
      self.requests += 1
      self.tokens += most
      start = max(time.monotonic(), self._next)
      self._next = start + self._every
    time.sleep(max(0.0, start - time.monotonic()))

  def give_back(self, tokens: int) -> None:
    """Returns tokens that were reserved and not used."""
    with self._lock:
      self.tokens -= tokens


def pause(attempt: int, backoff_s: float, asked: str | None) -> float:
  """Seconds before the next attempt: what the server asked, or doubling.

  Args:
    attempt: 0 after the first failure.
    backoff_s: the first pause.
    asked: its Retry-After header, if it sent one.
  """
  try:
    wanted = float(asked) if asked else 0.0
  except ValueError:  # a date; the doubling does
    wanted = 0.0
  # Spread out, or many that failed together come back together.
  doubled = backoff_s * 2.0 ** min(attempt, 30) * random.uniform(0.5, 1.0)
  return min(_LONGEST_S, max(wanted if wanted > 0 else 0.0, doubled))
