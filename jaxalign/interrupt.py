"""SIGTERM and Ctrl-C: stop where nothing is lost, and say so.

Outside the training loop a signal ends the stage at once (a stage is whole or
absent, so nothing finished is lost). Inside it, the step in flight is
finished and saved first. With several processes all of them must stop at the
same step: `reached_preemption_sync_point` agrees on it.
"""

import contextlib
import signal
from typing import Callable, Iterator

import jax

from jaxalign.errors import RestartError

_STATE = {"deferred": False, "signal": 0}


def _handle(number, frame):
  del frame
  if _STATE["deferred"] and not _STATE["signal"]:
    _STATE["signal"] = number
    return
  if number == signal.SIGINT:
    raise KeyboardInterrupt
  raise RestartError("stopped by SIGTERM; what was finished is kept")


def install() -> None:
  """Takes over SIGTERM and SIGINT; main calls it once, with one process."""
  signal.signal(signal.SIGINT, _handle)
  if jax.process_count() == 1:
    signal.signal(signal.SIGTERM, _handle)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[int], bool]]:
  """Yields `requested(step)`: true once the run should save and stop."""
  _STATE.update(deferred=True, signal=0)

  def requested(step: int) -> bool:
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils
      return multihost_utils.reached_preemption_sync_point(step)
    return bool(_STATE["signal"])

  try:
    yield requested
  finally:
    _STATE["deferred"] = False


def stop_now() -> None:
  """Raises what the deferred signal asked for."""
  number, _STATE["signal"] = _STATE["signal"], 0
  if number == signal.SIGINT:
    raise KeyboardInterrupt
  raise RestartError("stopped after saving; run the same command to go on")
