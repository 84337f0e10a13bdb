"""What a person sees while a job runs: lines, and bars with rate and ETA."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import io
import os
import select
import sys
import time

_STATE = {"process": 0}  # set once by main, before the first stage
_BAR_AFTER_S = 2.0  # a stage shorter than this draws no bar
_LINE_EVERY_S = 15.0  # off a terminal: a plain line, this often


def set_process(index: int) -> None:
  """Only process 0 speaks; main calls this after jax.distributed started."""
  _STATE["process"] = index


class _Output(io.FileIO):
  """A stream of bytes that goes on when nobody can read it any more."""

  def write(self, data):
    size = memoryview(data).nbytes
    try:
      if (done := super().write(data)) is None:  # a full pipe that never waits
        select.select([], [self], [])
        return 0
      return done
    except OSError:  # closed, a reader that left, a full disk
      return size


def outlive_readers() -> None:
  """Makes standard output and error harmless to lose; a command calls it once.

  `| head -1`, a closed terminal or a full disk under a log stop the printing,
  not the job, and a character that they cannot show is written as \\u....
  """
  while (number := os.open(os.devnull, os.O_RDWR)) < 3:
    pass  # a closed one would else be the next file that is opened
  os.close(number)
  for number, name in ((1, "stdout"), (2, "stderr")):
    old = getattr(sys, name)
    setattr(
      sys,
      name,
      io.TextIOWrapper(
        io.BufferedWriter(_Output(number, "w", closefd=False)),
        encoding=getattr(old, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=True,
      ),
    )


def _print(text: str, end: str = "\n") -> None:
  """Prints at once, from process 0 only, where anybody can read it."""
  if _STATE["process"] == 0:
    with contextlib.suppress(OSError, ValueError):  # left; closed
      try:
        print(text, end=end, flush=True)
      except UnicodeEncodeError:
        print(ascii(text)[1:-1], end=end, flush=True)


def _terminal() -> bool:
  try:
    return sys.stdout is not None and sys.stdout.isatty()
  except ValueError:  # closed
    return False


def say(text: str) -> None:
  """Prints one line, from process 0 only, at once."""
  _print(text)


def duration(seconds: float) -> str:
  """Seconds as a person writes them: 0.4s, 12s, 3m05s, 2h10m."""
  if seconds < 10:
    return f"{seconds:.1f}s"
  if seconds < 60:
    return f"{seconds:.0f}s"
  if seconds < 3600:
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
  return f"{int(seconds) // 3600}h{int(seconds) % 3600 // 60:02d}m"


def counted(items: Iterable, label: str, unit: str = "rows") -> Iterator:
  """The items as they come; says their number and rate, as `bar` would.

  For work whose amount is not known before it is done.
  """
  start = drawn = time.monotonic()
  terminal = _terminal()
  every = 0.2 if terminal else _LINE_EVERY_S
  try:
    for n, item in enumerate(items, 1):
      yield item
      now = time.monotonic()
      if now - start >= _BAR_AFTER_S and now - drawn >= every:
        drawn = now
        text = f"  {label} {n:,} {unit}, {n / max(now - start, 1e-9):,.1f}/s"
        _print(
          f"\r\x1b[2K{text}" if terminal else text, end="" if terminal else "\n"
        )
  finally:
    if terminal and drawn > start:
      _print("\r\x1b[2K", end="")


@contextlib.contextmanager
def bar(
  label: str, total: int, unit: str = "rows", done: int = 0
) -> Iterator[Callable[..., None]]:
  """Yields `tick(n=1, note="")`; draws once the work has taken two seconds.

  Args:
    label: the stage's name.
    total: units of work in all.
    unit: what is counted.
    done: units that an earlier run had finished (they count in the fraction,
      not in the rate).
  """
  start = time.monotonic()
  terminal = _terminal()
  state = {"done": done, "drawn": start}

  def tick(n: int = 1, note: str = "") -> None:
    state["done"] += n
    now = time.monotonic()
    every = 0.2 if terminal else _LINE_EVERY_S
    if now - start < _BAR_AFTER_S or now - state["drawn"] < every:
      return
    state["drawn"] = now
    rate = (state["done"] - done) / (now - start)
    left = (total - state["done"]) / rate if rate > 0 else float("inf")
    text = (
      f"  {label} {state['done']:,}/{total:,} {unit}, {rate:,.1f}/s, "
      f"{duration(left) if left < 1e7 else '?'} left"
      f"{', ' + note if note else ''}"
    )
    if terminal:
      width = int(20 * min(1.0, state["done"] / max(total, 1)))
      _print(f"\r\x1b[2K[{'#' * width}{'.' * (20 - width)}]{text}", end="")
    else:
      _print(text)

  try:
    yield tick
  finally:
    if terminal and state["drawn"] > start:
      _print("\r\x1b[2K", end="")
