"""How a command begins and ends: its exit code, and one line of error.

Exit codes: 0 done, 64 usage or config, 65 data, 73 cannot write, 74 corrupt,
75 start the same command again, 76 not finite, 130 interrupted.
"""

import atexit
from collections.abc import Callable
import contextlib
import errno
import importlib
import os
import re
import signal
import sys
import threading
import traceback
from typing import Any

from jaxalign.core import progress
from jaxalign.core.errors import JaxalignError

_CANNOT_WRITE = {
  getattr(errno, name)
  for name in "ENOSPC EROFS EACCES EPERM EDQUOT ENOTDIR EISDIR EFBIG".split()
}
# How a collective or the coordination service reports that a peer is gone.
_PEER_MARKS = "Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|NCCL"
_PEER_MARKS += "|coordination service|Connection reset"


def guarded(run: Callable[[], Any]) -> int:
  """The exit code of `run()`; one line on stderr says what went wrong."""
  try:
    run()
    return 0
  except JaxalignError as error:
    return _fail(str(error), error.exit_code)
  except KeyboardInterrupt:
    words = "interrupted; what was finished is kept, run the same command to"
    return _fail(f"{words} go on", 128 + signal.SIGINT)
  except Exception as error:
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
      name, why = error.filename or "a file", error.strerror
      words = f"cannot write {name}: {why}; free space or set --workdir"
      return _fail(words, 73)
    if _lost_peer(error):
      why = str(error).splitlines()[0][:160]
      return _fail(
        f"another process of this job ended ({why}); its own message says "
        "why, run the same command to go on",
        75,
      )
    raise


def _jax_of_many() -> Any:
  """jax where it is imported and has joined other processes, else None."""
  jax = sys.modules.get("jax")
  return jax if jax is not None and jax.distributed.is_initialized() else None


def _lost_peer(error: BaseException | None) -> bool:
  """Whether a collective failed because another process is gone."""
  if (jax := _jax_of_many()) is None:
    return False
  while error is not None:
    known = isinstance(error, jax.errors.JaxRuntimeError)
    if known and re.search(_PEER_MARKS, str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


def _fail(message: str, code: int) -> int:
  line = " ".join(message.split())
  if len(line) > 4000:  # a flag of a megabyte; both ends say what is wrong
    line = f"{line[:2000]} [...] {line[-1000:]}"
  # One write: a library's thread may be printing a traceback of its own.
  with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()
  return code


def _leave(code: int) -> None:
  """Ends the process with the job's own code.

  What is left to do at exit is done here, and the interpreter is not taken
  apart: a C++ thread (of pyarrow's pool, of gRPC) that asks for it meanwhile
  is cut off inside a destructor, and the process ends with 134 in place of
  the code. With several processes an error waits for none of the others.
  """
  for number in (signal.SIGINT, signal.SIGTERM):  # impatient: end now
    signal.signal(number, lambda *_: os._exit(code))
  if not code or _jax_of_many() is None:
    try:
      threading._shutdown()
      atexit._run_exitfuncs()
    except BaseException:  # it must not take the job's code away
      traceback.print_exc()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      stream.flush()
  os._exit(code)


def start(run: Callable[[list[str]], int]) -> None:
  """Runs `run(argv) -> exit code` as a command, and ends the process."""
  progress.outlive_readers()
  ended = []
  try:  # guarded here too: a second signal may fall into the first one's end
    status = guarded(lambda: ended.append(run(sys.argv))) or ended[0]
  except SystemExit as end:  # of --help
    status = end.code if isinstance(end.code, int) else int(bool(end.code))
  except BaseException:  # a bug: the traceback is what helps
    traceback.print_exc()
    status = 1
  _leave(status)


def start_module(name: str, greeting: str = "") -> None:
  """Runs `main(argv)` of a module, which takes seconds to import, by `start`.

  Args:
    name: of the module.
    greeting: a line to print before the import.
  """

  def run(argv: list[str]) -> int:
    if greeting:
      progress.say(greeting)
    return importlib.import_module(name).main(argv)

  start(run)
