"""Chat templates of strangers, rendered in a process of their own.

Jinja's immutable sandbox keeps a template from Python's internals, not from
time or memory: "x" * 10**9 is one operation, and so is 9**9**9. The process
has a bound on its memory, a deadline for each record, and a cap on what comes
out. It stays alive over many records and is killed when a deadline passes.
"""

import contextlib
import datetime
import json
import os
import pathlib
import select
import subprocess
import sys
import time
from typing import Any

from jaxalign.core.errors import ConfigError
from jaxalign.data.schemas.schema import Refused

SECONDS = 10.0  # one record; a real template takes a thousandth of that
MEMORY = 1 << 29  # bytes of address space
CHARACTERS = 1 << 20  # of output, and four times the messages'
_KNOB = "set config.data.template"
_WORKER = pathlib.Path(__file__).with_name("chat_worker.py")


class Renderer(contextlib.AbstractContextManager):
  """A template process; started at its first use, ended by `close`."""

  def __init__(self, now: str = "", *, seconds: float = SECONDS):
    """Makes one that is not started yet.

    Args:
      now: what strftime_now reads, ISO format; "" is this moment. Fixed, so
        that all rows of one job see one date.
      seconds: the deadline of a record.
    """
    self.now = now or datetime.datetime.now().isoformat(timespec="seconds")
    self._seconds, self._process = seconds, None

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    """Ends the process, if there is one."""
    process, self._process = self._process, None
    if process is not None:
      process.kill()
      process.wait()
      process.stdout.close()
      with contextlib.suppress(OSError):  # it did not read all of it
        process.stdin.close()

  def render(
    self, source: str, messages: list[dict[str, Any]], **values: Any
  ) -> str:
    """The text a template makes of messages.

    Args:
      source: the template.
      messages: dicts of "role", "content" and more, all of it JSON.
      **values: what else it reads: add_generation_prompt, bos_token, ...

    Raises:
      Refused: the template will not have these messages (raise_exception), or
        fails on them; they are no JSON.
      ConfigError: it is no template, reaches for Python's internals, or wants
        more time, memory or output than it gets.
    """
    try:
      data = json.dumps(dict(values, messages=messages))
    except (TypeError, ValueError, RecursionError) as error:
      raise Refused(
        "template failed", f"the messages are no JSON ({error})"
      ) from error
    cap = CHARACTERS + 4 * len(data)
    source = json.dumps(source)
    answer = self._answer(
      f'{{"cap": {cap}, "source": {source}, "values": {data}}}\n'
    )
    if "text" in answer:
      return answer["text"]
    kind, detail = answer["kind"], answer["detail"]
    if kind in ("raised", "failed"):
      how = "refused it" if kind == "raised" else "failed"
      raise Refused(f"template {how}", detail)
    what = {
      "memory": f"wants over {MEMORY >> 20} MiB of memory ({detail})",
      "length": f"writes over {cap:,} characters",
      "unsafe": f"wants Python's internals ({detail})",
      "syntax": f"is no Jinja template ({detail})",
      "time": f"ran over {self._seconds:g} s",
      "ended": "ended its process",
    }[kind]
    raise ConfigError(f"the chat template {what}; {_KNOB}")

  def _answer(self, request: str) -> dict:
    if self._process is None:
      self._start()
    try:
      self._process.stdin.write(request.encode())
      self._process.stdin.flush()
      return json.loads(self._line(self._seconds))
    except TimeoutError:
      kind = "time"
    except (OSError, EOFError):
      kind = "ended"
    self.close()
    return dict(kind=kind, detail="")

  def _line(self, seconds: float) -> bytes:
    """One line of the process's output."""
    deadline = time.monotonic() + seconds
    data, file = b"", self._process.stdout.fileno()
    while not data.endswith(b"\n"):
      left = deadline - time.monotonic()
      if left <= 0 or not select.select([file], [], [], left)[0]:
        raise TimeoutError
      more = os.read(file, 1 << 16)
      if not more:
        raise EOFError
      data += more
    return data

  def _start(self) -> None:
    # -P: the folder of the script holds modules with common names.
    env = dict(PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    env |= dict(PYTHONUTF8="1", PYTHONDONTWRITEBYTECODE="1")
    kept = ("LD_LIBRARY_PATH", "TZ")
    env |= {name: os.environ[name] for name in kept if name in os.environ}
    seconds = int(self._seconds) + 2
    command = [sys.executable, "-P", _WORKER, MEMORY, self.now, seconds]
    self._process = subprocess.Popen(
      list(map(str, command)),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env=env,
      start_new_session=True,
    )
    try:
      self._line(60)
    except (EOFError, TimeoutError) as error:
      self.close()
      raise ConfigError(
        "the process that renders chat templates cannot be "
        "started (is jinja2 installed?); pip install jinja2"
      ) from error
