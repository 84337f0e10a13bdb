"""Atomic files, their digests, and the lock of a workdir."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import fcntl
import hashlib
import io
import json
import os
import socket
from typing import Any, IO

from etils import epath
import jax
import numpy as np

from jaxalign.core import processes, progress
from jaxalign.core.errors import WriteError


def write_bytes(path: Any, data: bytes) -> None:
  """Writes a file whole or not at all; see `write_through`."""
  write_through(path, lambda file: file.write(data))


def write_through(path: Any, write: Callable[[IO[bytes]], Any]) -> None:
  """Writes a file whole or not at all: a temporary name, then a rename.

  Args:
    path: of the file.
    write: is handed the open file.

  Raises:
    WriteError: the folder is read-only, the disk is full, and the like.
  """
  path = epath.Path(path)
  temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
      write(file)
    temporary.replace(path)
  except BaseException as error:  # a signal too leaves no half of a file
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    if not isinstance(error, OSError):
      raise
    raise WriteError(
      f"cannot write {path}: {error.strerror or error}; free "
      "space or permissions, or another --workdir"
    ) from error


def write_json(path: Any, value: Any) -> None:
  """JSON, indented, atomic; NaN is refused rather than written as bad JSON."""
  text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
  write_bytes(path, f"{text}\n".encode())


def read_json(path: Any) -> Any:
  """Reads JSON."""
  return json.loads(epath.Path(path).read_text())


def write_lines(path: Any, rows: Iterable[dict[str, Any]]) -> None:
  """Writes a .jsonl file, one object a line."""
  write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_lines(path: Any) -> list[dict[str, Any]]:
  """The objects of a .jsonl file."""
  return [json.loads(x) for x in epath.Path(path).read_text().splitlines()]


def write_array(path: Any, x: np.ndarray) -> None:
  """Writes .npy, atomic."""
  x = np.asarray(x)
  write_through(path, lambda file: np.save(file, x, allow_pickle=False))


def read_array(path: Any) -> np.ndarray:
  """Reads .npy, mapped into memory where the file is local."""
  path = epath.Path(path)
  if "://" not in str(path):
    return np.load(os.fspath(path), allow_pickle=False, mmap_mode="r")
  return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)


def digest(path: Any) -> dict[str, Any]:
  """{sha256, bytes} of one file, read a megabyte at a time."""
  total, size = hashlib.sha256(), 0
  with epath.Path(path).open("rb") as file:
    while data := file.read(1 << 20):
      total.update(data)
      size += len(data)
  return dict(sha256=total.hexdigest(), bytes=size)


def digest_tree(
  folder: Any, only: Iterable[str] = ("",)
) -> dict[str, dict[str, Any]]:
  """Relative path -> {sha256, bytes} of files under a folder.

  Args:
    folder: where to look.
    only: relative files or folders; everything by default.
  """
  folder, found = epath.Path(folder), {}

  def walk(path: epath.Path, name: str) -> None:
    if name and leads_out(folder, name):
      return  # what a link shows is not this folder's
    if path.is_dir():
      for child in sorted(path.iterdir(), key=lambda p: p.name):
        walk(child, f"{name}/{child.name}" if name else child.name)
    elif ".tmp-" not in path.name:
      found[name] = digest(path)

  for name in only:
    walk(folder / name if name else folder, name)
  return found


def corrupt(folder: Any, outputs: dict[str, dict[str, Any]]) -> list[str]:
  """The files that are missing or whose bytes are not those written.

  No file outside the folder is looked at, whatever the names say.
  """
  bad = []
  for name, wanted in outputs.items():
    if leads_out(folder, name):
      bad.append(f"{name[:200]!a} leads out of its folder")
      continue
    path = epath.Path(folder) / name
    if not path.exists():
      bad.append(f"{name} is missing")
    elif digest(path) != wanted:
      bad.append(f"{name} has other bytes than were written")
  return bad


def leads_out(folder: Any, name: Any) -> bool:
  """Whether a name that stands in a file is none of a file in a folder.

  Names are relative, without "..", and no link on their way leaves the
  folder; the folder itself may be a link.
  """
  if not is_plain(name):
    return True
  if "://" in str(folder):
    return False  # an object store has no links
  root = os.path.realpath(folder)
  real = os.path.realpath(os.path.join(root, name))
  return not real.startswith(os.path.join(root, ""))


def is_plain(name: Any) -> bool:
  """Whether a name is relative and has no "..", whatever is on the disk."""
  return (
    isinstance(name, str)
    and not set(name) & {"\0", "\\"}
    and not {"", ".", ".."} & set(name.split("/"))
  )


def remove(path: epath.Path) -> None:
  """Removes a file, a folder with all in it, or a link alone."""
  if "://" not in str(path) and os.path.islink(path):
    os.unlink(path)
  elif path.is_dir():
    path.rmtree()
  else:
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(workdir: Any) -> Iterator[None]:
  """Holds a workdir for this job; process 0 does it for all.

  The kernel's lock on `.lock` ends with the process, however it ends, so no
  lock is ever stale; the text inside only says whose it is. Object stores
  have no such locks: nothing is held there.

  Raises:
    WriteError: another job holds it, or the workdir cannot be made.
  """
  workdir, mine, owner = epath.Path(workdir), None, ""
  if jax.process_index() == 0 and "://" not in str(workdir):
    mine, owner = _take(workdir)
  try:
    if taken := processes.from_first(lambda: owner):
      raise WriteError(
        f"{workdir} is in use by another job ({taken}); "
        "wait for it, stop it, or set another --workdir"
      )
    yield
  finally:
    if mine is not None:
      mine.close()


def _take(workdir: epath.Path) -> tuple[Any, str]:
  """The locked file (None where there are no locks), and who else has it."""
  path = workdir / ".lock"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(os.fspath(path), "a+", encoding="utf-8")
  except OSError as error:
    raise WriteError(
      f"cannot make {path}: {error.strerror or error}; set --workdir"
    ) from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
  except BlockingIOError:
    file.seek(0)
    owner = file.read(200).strip() or "it left no name"
    file.close()
    return None, owner
  except OSError as error:
    progress.say(
      f"{path} cannot be locked ({error.strerror or error}); see "
      "to it that no other job uses this workdir"
    )
  return file, ""
