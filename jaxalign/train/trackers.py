"""Where metrics and profiles go: TensorBoard, Weights & Biases, JAX's profiler.

A tracker is imported where it is named, by process 0 alone. One that fails is
named once and left out: no run ends because a plot could not be drawn.
"""

from collections.abc import Callable, Mapping
import os
import pathlib
import secrets
import shutil
import tempfile
from typing import Any, NamedTuple

from etils import epath
import jax

from jaxalign.core import disk, progress
from jaxalign.core.errors import ConfigError


class Tracker(NamedTuple):
  """An open tracker."""

  log: Callable[[int, Mapping[str, float]], None]  # (step, values)
  close: Callable[[], None]


def tensorboard(folder: epath.Path, label: str, start: int) -> Tracker:
  """Event files in `folder`/tensorboard; what a lost run wrote from `start`
  on is purged."""
  import tensorboardX

  writer = tensorboardX.SummaryWriter(
    str(folder / "tensorboard"), purge_step=start if start else None
  )

  def log(step, values):
    for name, value in values.items():
      writer.add_scalar(name, value, step)

  writer.add_text("run", label)
  return Tracker(log, writer.close)


def wandb(folder: epath.Path, label: str, start: int) -> Tracker:
  """A run of Weights & Biases; its own WANDB_* variables say where and how.

  The run's id stands in `folder`/wandb_id, so that a run that is resumed from a
  checkpoint is resumed there too, and one that begins anew is another one: the
  path alone is another job's on another machine.
  """
  import wandb as client

  kept = folder / "wandb_id"
  if not start or not kept.exists():
    disk.write_bytes(kept, secrets.token_hex(8).encode())
  local = None if "://" in str(folder) else str(folder)
  run = client.init(
    id=kept.read_text(),
    name=label,
    dir=local,
    resume="allow",
    project=os.environ.get("WANDB_PROJECT") or "jaxalign",
    group=folder.name,
  )
  log = lambda step, values: run.log(dict(values), step=step)
  return Tracker(log, run.finish)


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb}


def check_trackers(names: tuple[str, ...]) -> None:
  """Raises ConfigError for a tracker that nothing here knows."""
  for name in names:
    if name not in TRACKERS:
      raise ConfigError(
        f"unknown tracker {name!r}; known: {', '.join(TRACKERS)} "
        "(metrics.jsonl is always written); set config.train.trackers"
      )


def open_all(
  names: tuple[str, ...], folder: Any, label: str, start: int
) -> Tracker:
  """All trackers of a run, as one that never raises.

  Args:
    names: keys of TRACKERS.
    folder: of the stage.
    label: what the run is called.
    start: the step it is resumed from; what is later was never kept.
  """
  check_trackers(names)
  live = {}

  def guarded(name, act, *args):
    try:
      return act(*args)
    except Exception as error:  # whatever a plotting library may raise
      progress.say(
        f"  tracker {name} is left out: {type(error).__name__}: {error}"
      )
      live.pop(name, None)

  for name in names if jax.process_index() == 0 else ():
    one = guarded(name, TRACKERS[name], epath.Path(folder), label, start)
    if one:
      live[name] = one

  def log(step, values):
    for name, one in list(live.items()):
      guarded(name, one.log, step, values)

  def close():
    for name, one in list(live.items()):
      guarded(name, one.close)

  return Tracker(log, close)


def start_profile(folder: epath.Path) -> Callable[[], None]:
  """Starts a profile of JAX; the function returned ends it, in `folder`.

  The profiler writes local files alone: for gs:// it writes into a temporary
  folder, which is then copied.
  """
  if "://" not in str(folder):
    jax.profiler.start_trace(str(folder))
    return jax.profiler.stop_trace
  local = pathlib.Path(tempfile.mkdtemp(prefix="jaxalign_profile_"))
  jax.profiler.start_trace(str(local))

  def stop():
    jax.profiler.stop_trace()
    for path in (p for p in local.rglob("*") if p.is_file()):
      disk.write_bytes(folder / path.relative_to(local), path.read_bytes())
    shutil.rmtree(local)

  return stop
