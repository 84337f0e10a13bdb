"""The most memory that a block of code holds, of a process and its devices."""

from collections.abc import Iterator
import contextlib
import threading

import jax


def _resident() -> int:
  """Bytes of this process in memory; 0 where the system does not say."""
  try:
    with open("/proc/self/statm", encoding="ascii") as file:
      return int(file.read().split()[1]) * 4096
  except OSError:
    return 0


def _placed() -> int | None:
  """Bytes in use on this process's devices; None where they do not say."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  used = [s.get("bytes_in_use") for s in stats]
  return None if None in used else sum(used)


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, int | None]]:
  """What a block of code adds to memory at its largest moment.

  Measured every 10 ms: shorter peaks are missed, and memory that was freed
  before and is used again does not show.

  Yields:
    {"held": bytes of the process, "device": bytes on its devices, None where
    those do not say}; filled at the end.
  """
  out, over = {"held": 0, "device": None}, threading.Event()
  before = _resident(), _placed()

  def look():
    out["held"] = max(out["held"], _resident() - before[0])
    if before[1] is not None:
      out["device"] = max(out["device"] or 0, _placed() - before[1])

  def watch():
    while not over.wait(0.01):
      look()

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield out
    look()
  finally:
    over.set()
    thread.join()
