"""All orbax calls: training states with digests, verified before use.

Orbax makes a step visible only when it is whole, but it does not checksum
array bytes: one flipped bit restores wrong numbers without an error. So a
manifest of sha256 digests is written beside every step and checked first.
"""

import logging
import os
import shutil
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from jaxalign import artifacts
from jaxalign import progress
from jaxalign import sharding
from jaxalign.errors import WriteError

for _name in ("absl", "asyncio"):  # they log the traceback of what orbax raises
  logging.getLogger(_name).setLevel(logging.CRITICAL)
_SPARE = 1 << 18  # bytes of a checkpoint beside its arrays


class Checkpoints:
  """The checkpoints of one training run, newest two kept.

  A class because orbax's manager holds open resources; use it as a context.
  """

  def __init__(self, folder: Any, keep: int = 2):
    self.folder = epath.Path(folder)
    if "://" not in str(folder):  # orbax refuses a relative path
      self.folder = epath.Path(os.path.abspath(folder))
    policy = ocp.checkpoint_managers.LatestN(keep)
    try:
      self.manager = ocp.CheckpointManager(
          self.folder, options=ocp.CheckpointManagerOptions(
              preservation_policy=policy, create=True,
              cleanup_tmp_directories=True, enable_async_checkpointing=False))
    except OSError as error:
      raise WriteError(f"cannot make {self.folder}: {error.strerror or error}; "
                       "set --workdir") from error

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.manager.close()

  def _manifest(self, step: int) -> epath.Path:
    return self.folder / f"{step}.digests.json"

  def save(self, step: int, items: dict[str, Any]) -> None:
    """Saves named trees and a manifest of their bytes; durable on return.

    Args:
      step: updates done.
      items: name -> tree; each can be restored without the others.

    Raises:
      WriteError: the disk is full, or nearly, or the folder is read-only.
    """
    self._check_space(step, items)
    try:
      self.manager.save(step, args=ocp.args.Composite(
          **{n: ocp.args.StandardSave(x) for n, x in items.items()}),
          force=True)
      self.manager.wait_until_finished()
    except (OSError, ValueError) as error:
      full = "No space left" in str(error)
      if full or isinstance(error, OSError):
        raise WriteError(
            f"cannot save step {step} to {self.folder}: "
            f"{'No space left on device' if full else error}; the step before "
            "is still there, free space and run the same command") from error
      raise
    if jax.process_index() == 0:
      artifacts.write_json(self._manifest(step), artifacts.digest_tree(
          self.folder / str(step)))
      for old in self.folder.glob("*.digests.json"):
        if not (self.folder / old.name.split(".")[0]).exists():
          old.unlink(missing_ok=True)
    sharding.barrier(f"saved {step}")

  def _check_space(self, step: int, items: dict[str, Any]) -> None:
    """Refuses a save that the disk cannot hold, before orbax begins it."""
    if "://" in str(self.folder):
      return
    wanted = _SPARE + sum(
        shard.data.nbytes for x in jax.tree.leaves(items)
        for shard in x.addressable_shards if shard.replica_id == 0)
    free = shutil.disk_usage(self.folder).free
    if free < wanted:
      raise WriteError(f"cannot save step {step} to {self.folder}: it takes "
                       f"{wanted:,} bytes, {free:,} are free; the step before "
                       "is still there, free space and run the same command")

  def verified(self, step: int) -> bool:
    """Whether a step's bytes are those that were written."""
    good = False
    if jax.process_index() == 0:
      path = self._manifest(step)
      try:
        good = path.exists() and not artifacts.harmed(
            self.folder / str(step), artifacts.read_json(path))
      except ValueError:
        good = False
    return artifacts.agree("done" if good else "harmed") == "done"

  def latest(self) -> int | None:
    """The newest step that is whole; harmed ones are named and removed."""
    for step in sorted(self.manager.all_steps(), reverse=True):
      if self.verified(step):
        return step
      progress.say(f"  checkpoint {step} in {self.folder} is damaged or was "
                   "never finished; going back to the one before")
      self.manager.delete(step)
      if jax.process_index() == 0:
        self._manifest(step).unlink(missing_ok=True)
    return None

  def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """The named trees of a step, on the shardings of `abstract`."""
    found = self.manager.restore(step, args=ocp.args.Composite(
        **{n: ocp.args.StandardRestore(x) for n, x in abstract.items()}))
    return {n: found[n] for n in abstract}


def restore_params(folder: Any, abstract: Any) -> Any:
  """The parameters of the newest step under a folder.

  Their bytes were verified by the card of the stage that wrote them.
  """
  with Checkpoints(folder) as checkpoints:
    step = max(checkpoints.manager.all_steps())
    return checkpoints.restore(step, dict(params=abstract))["params"]
