"""SIGTERM, SIGHUP and Ctrl-C: stop where nothing is lost, and say so.

Outside the training loop a signal ends the stage at once (a stage is whole or
absent, so nothing finished is lost). Inside it, the step in flight is
finished and saved first. With several processes all of them must stop at the
same place: each polls `reached_preemption_sync_point` with its count of
polls, between stages and at every step, and the runtime agrees on one count.
"""

from collections.abc import Callable, Iterator
import contextlib
import signal

import jax
from jax.experimental import multihost_utils

from jaxalign.core.errors import RestartError

_STATE = {"deferred": False, "signal": 0, "polls": 0}


def _handle(number, frame):
  del frame
  first, _STATE["signal"] = not _STATE["signal"], number
  # Processes cannot agree on a Ctrl-C, so one of several does not wait for it.
  if _STATE["deferred"] and first and jax.process_count() == 1:
    return
  stop_now()


def install() -> None:
  """Takes over the signals that end a process; main calls it once.

  Of several processes SIGTERM is the runtime's, and `nohup` ignores SIGHUP.
  """
  _STATE.update(deferred=False, signal=0)
  signal.signal(signal.SIGINT, _handle)
  if jax.process_count() == 1:
    signal.signal(signal.SIGTERM, _handle)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
      signal.signal(signal.SIGHUP, _handle)


def _requested() -> bool:
  """Whether to stop here; every process must ask equally often."""
  if jax.process_count() > 1 and not _STATE["signal"]:
    _STATE["polls"] += 1
    if multihost_utils.reached_preemption_sync_point(_STATE["polls"]):
      _STATE["signal"] = signal.SIGTERM
  return bool(_STATE["signal"])


def check() -> None:
  """Stops here if a signal asks for it; called between stages."""
  if _requested():
    stop_now()


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
  """Yields `requested()`: true once the run should save and stop.

  A signal that came inside is raised on leaving, if nothing else is.
  """
  _STATE["deferred"] = True
  try:
    yield _requested
  finally:
    _STATE["deferred"] = False
  if _STATE["signal"]:
    stop_now()


def stop_now() -> None:
  """Raises the error of the signal.

  The signal stays noted: an exception raised inside a library's callback may
  be swallowed there, and `check` then raises it again.
  """
  if _STATE["signal"] == signal.SIGINT:
    raise KeyboardInterrupt
  name = signal.Signals(_STATE["signal"] or signal.SIGTERM).name
  raise RestartError(
    f"stopped by {name}; what was finished is kept, run the "
    "same command to go on"
  )
