"""All orbax calls: training states with digests, verified before use.

Orbax makes a step visible only when it is whole, but it does not checksum
array bytes: one flipped bit restores wrong numbers without an error. So a
manifest of sha256 digests is written for every step and checked first.
"""

from collections.abc import Iterator
import contextlib
import logging
import os
import shutil
import threading
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from jaxalign.core import disk, processes, progress, sharding
from jaxalign.core.errors import WriteError

for _name in ("absl", "asyncio"):  # they log the traceback of what orbax raises
  logging.getLogger(_name).setLevel(logging.CRITICAL)
_SPARE = 1 << 18  # bytes of a checkpoint besides its arrays


class Checkpoints:
  """The checkpoints of one training run, the newest `keep` of them.

  In the background a save returns once the arrays are copied to the host; a
  thread waits for the writing and then seals the step with its digests. A step
  without them counts as never finished. The next save, and leaving the context,
  wait for the thread and raise its error. Use it as a context.

  Args:
    folder: a path or a URL.
    keep: at least 1; with 1 nothing is left where the newest is damaged.
    background: whether training goes on while a step is written.
  """

  def __init__(self, folder: Any, keep: int = 2, background: bool = False):
    self.background = background
    self._sealing: threading.Thread | None = None
    self._step = -1  # being saved
    self._raised: BaseException | None = None
    self.folder = epath.Path(folder)
    if "://" not in str(folder):  # orbax refuses a relative path
      self.folder = epath.Path(os.path.abspath(folder))
    options = ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.LatestN(keep),
      create=True,
      cleanup_tmp_directories=True,
      enable_async_checkpointing=background,
    )
    try:
      self.manager = ocp.CheckpointManager(self.folder, options=options)
    except OSError as error:
      raise WriteError(
        f"cannot make {self.folder}: {error.strerror or error}; set --workdir"
      ) from error

  def __enter__(self):
    return self

  def __exit__(self, *_):
    try:
      self.finish()
    finally:
      self.manager.close()

  def _manifest(self, step: int) -> epath.Path:
    return self.folder / f"{step}.digests.json"

  def save(self, step: int, items: dict[str, Any]) -> None:
    """Saves named trees and a manifest of their bytes.

    Durable on return, or in the background once `finish` returned; the trees
    may be donated as soon as this returns.

    Args:
      step: updates done.
      items: name -> tree; each can be restored without the others.

    Raises:
      WriteError: the disk is full, or nearly, or the folder is read-only; of
        this step or of the one before.
    """
    self.finish()
    self._check_space(step, items)
    self._step = step
    trees = {n: ocp.args.StandardSave(x) for n, x in items.items()}
    with self._named(step):
      self.manager.save(step, args=ocp.args.Composite(**trees), force=True)
    self._sealing = threading.Thread(target=self._seal, args=(step,))
    self._sealing.start()
    if not self.background:
      self.finish()

  @contextlib.contextmanager
  def _named(self, step: int) -> Iterator[None]:
    """Turns an error of orbax into a WriteError that says what it means."""
    try:
      yield
    except (OSError, ValueError) as error:
      full = "No space left" in str(error)
      if not full and not isinstance(error, OSError):
        raise
      why = "No space left on device" if full else error
      raise self._cannot_save(step, why) from error

  def _cannot_save(self, step: int, why: Any) -> WriteError:
    return WriteError(
      f"cannot save step {step} to {self.folder}: {why}; the step before "
      "is still there, free space and run the same command"
    )

  def _seal(self, step: int) -> None:
    """Waits until a step is written, then writes its manifest."""
    try:
      self.manager.wait_until_finished()
      if jax.process_index() == 0:
        digests = disk.digest_tree(self.folder / str(step))
        disk.write_json(self._manifest(step), digests)
        for old in self.folder.glob("*.digests.json"):
          if not (self.folder / old.name.split(".")[0]).exists():
            old.unlink(missing_ok=True)
    except BaseException as error:  # raised where the main thread waits
      self._raised = error

  def finish(self) -> None:
    """Waits for the save in flight, if there is one.

    Raises:
      WriteError: it failed.
    """
    if self._sealing is None:
      return
    self._sealing.join()
    self._sealing, raised, self._raised = None, self._raised, None
    if raised is not None:
      with self._named(self._step):
        raise raised
    sharding.barrier(f"saved {self._step}")

  def _check_space(self, step: int, items: dict[str, Any]) -> None:
    """Refuses a save that the disk cannot hold, before orbax begins it."""
    if "://" in str(self.folder):
      return
    wanted = _SPARE + sum(
      shard.data.nbytes
      for x in jax.tree.leaves(items)
      for shard in x.addressable_shards
      if shard.replica_id == 0
    )
    free = shutil.disk_usage(self.folder).free
    if free < wanted:
      why = f"it takes {wanted:,} bytes, {free:,} are free"
      raise self._cannot_save(step, why)

  def verified(self, step: int) -> bool:
    """Whether a step's bytes are those that were written."""
    good, path = False, self._manifest(step)
    if jax.process_index() == 0 and path.exists():
      with contextlib.suppress(ValueError):
        digests = disk.read_json(path)
        good = not disk.corrupt(self.folder / str(step), digests)
    return processes.from_first(lambda: "good" if good else "") == "good"

  def latest(self) -> int | None:
    """The newest step that is whole; corrupt ones are named and removed."""
    self.finish()
    for step in sorted(self.manager.all_steps(), reverse=True):
      if self.verified(step):
        return step
      progress.say(
        f"  checkpoint {step} in {self.folder} is damaged or was never "
        "finished; falling back to the one before"
      )
      self.delete(step)
    return None

  def delete(self, step: int) -> None:
    """Removes a step and its manifest."""
    self.manager.delete(step)
    if jax.process_index() == 0:
      self._manifest(step).unlink(missing_ok=True)

  def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """The named trees of a step, on the shardings of `abstract`."""
    trees = {n: ocp.args.StandardRestore(x) for n, x in abstract.items()}
    found = self.manager.restore(step, args=ocp.args.Composite(**trees))
    return {n: found[n] for n in abstract}


def restore_params(folder: Any, abstract: Any, name: str = "params") -> Any:
  """One tree of the newest step under a folder; the record of the stage that
  wrote it has verified its bytes."""
  with Checkpoints(folder) as checkpoints:
    step = max(checkpoints.manager.all_steps())
    return checkpoints.restore(step, {name: abstract})[name]
