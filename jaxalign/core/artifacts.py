"""What a stage leaves on disk, the record next to it, and when it is skipped.

A stage is described by the config fields it depends on and by the contents of
the stages it reads; the hash of that description is its own key. Its record
also holds a digest of every byte it wrote, and of itself. A later run with the
same description and the same bytes skips the stage; corrupt bytes make that
stage run again; another description is an error that names the field, unless
`redo` is given. The record is written before the stage starts, too: what a
killed run left is resumed only by a run with the same description.
"""

from collections.abc import Callable, Iterable
import dataclasses
import fnmatch
import hashlib
import json
import time
from typing import Any, NamedTuple

from etils import epath
import jax

from jaxalign.core import disk, interrupt, processes, progress, sharding
from jaxalign.core.errors import ConfigError, WriteError

VERSION = 3  # raise when a stage's files change their meaning
DAMAGED = "damaged"  # the key of a record whose own bytes are not those written


@dataclasses.dataclass
class Cost:
  """What a stage really cost."""

  flops: int = 0  # floating-point, counted from the shapes that ran
  tokens: int = 0  # through the model, padding not counted
  seconds: float = 0.0
  bytes: int = 0  # written

  def __add__(self, other: "Cost") -> "Cost":
    both = zip(dataclasses.astuple(self), dataclasses.astuple(other))
    return Cost(*map(sum, both))


@dataclasses.dataclass
class Record:
  """The record of one finished stage; `key` names what made it."""

  stage: str
  key: str
  fields: dict[str, Any]
  inputs: dict[str, str]
  outputs: dict[str, dict[str, Any]]  # relative path -> {sha256, bytes}
  cost: Cost
  result: dict[str, Any]  # small facts that later stages or pages read
  finished: bool = True  # false while the stage runs
  content: str = ""  # digest of the key and the bytes: what reads it depends on
  skipped: bool = False  # this run did not have to make it


class Description(NamedTuple):
  """What a stage is made from, and how it is made again."""

  # The config values it depends on, flat.
  fields: dict[str, Any]
  # Stage name -> `Record.content` of every artifact it reads. Where these
  # alone differ the stage is stale, and runs again.
  inputs: dict[str, str] = {}
  # Run again, instead of refusing, where the description changed.
  redo: bool = False
  # Files or folders that an unfinished run leaves and `make` continues from;
  # removed unless the same description made them.
  resumes: tuple[str, ...] = ()
  # `make` checks every byte of what it resumes: where only that is corrupt it
  # is left to `make`, which repairs the corrupt shards alone.
  repairs: bool = False
  # Patterns of files whose bytes differ from run to run (times, names of
  # shards); a "weights" of the result stands for them.
  volatile: tuple[str, ...] = ()


def key_of(stage: str, fields: dict[str, Any], inputs: dict[str, str]) -> str:
  """The hash of everything a stage depends on."""
  text = json.dumps([stage, VERSION, fields, inputs], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _record_path(folder: Any, stage: str) -> epath.Path:
  return epath.Path(folder) / "records" / f"{stage}.json"


def _write_record(folder: Any, record: Record) -> None:
  raw = dataclasses.asdict(record)
  raw.pop("skipped")
  disk.write_json(
    _record_path(folder, record.stage), raw | {"digest": _digest_of(raw)}
  )


def _digest_of(raw: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def read_record(folder: Any, stage: str) -> Record | None:
  """The record of a stage, None where there is none.

  A record whose bytes are not those written has the key `DAMAGED`, and so has
  one that names files outside its folder: those must never be removed.
  """
  path = _record_path(folder, stage)
  if not path.exists():
    return None
  try:
    if disk.leads_out(folder, f"records/{stage}.json"):
      raise ValueError("it is a link")
    raw = disk.read_json(path)
    if raw.pop("digest") != _digest_of(raw):
      raise ValueError("its digest is another one")
    record = Record(**{**raw, "cost": Cost(**raw["cost"])})
    for name, wanted in record.outputs.items():
      if not disk.is_plain(name):  # links are seen where the bytes are
        raise ValueError("it names what is not in its folder")
      if wanted.keys() != {"sha256", "bytes"}:
        raise ValueError("it does not say what was written")
    record.fields.keys(), record.inputs.keys(), record.result.keys()
    if record.stage != stage or not isinstance(
      record.cost.seconds, (int, float)
    ):
      raise ValueError("it is another stage's")
    return record
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return Record(stage, DAMAGED, {}, {}, {}, Cost(), {})


def run_stage(
  folder: Any, stage: str, how: Description, make: Callable[[epath.Path], tuple]
) -> Record:
  """Runs a stage, or skips one that is finished.

  Args:
    folder: where its files and its record live.
    stage: the stage's name.
    how: what it is made from.
    make: `make(folder) -> (files, Cost, result)`; `files` are relative names
      of files or folders. Every process calls it; only process 0 may write
      shared files.

  Raises:
    ConfigError: the folder holds this stage made from another description.
    RestartError: SIGTERM came while several processes were between stages.
  """
  folder = epath.Path(folder)
  record, old, state = _inspect(folder, stage, how)
  if state == "done":
    old.skipped = True
    took = progress.duration(old.cost.seconds)
    progress.say(f"{stage}: finished before ({took}), skipped")
    return old
  if old and state == "unfinished":
    record.result = old.result  # of `begin_stage`
  _enter(folder, record, old, state, how.resumes)
  progress.say(f"{stage}: ...")
  start = time.monotonic()
  files, cost, result = make(folder)
  sharding.barrier(f"after {stage}")
  cost.seconds = time.monotonic() - start
  if jax.process_index() == 0:
    record.outputs = disk.digest_tree(folder, files)
    cost.bytes = sum(o["bytes"] for o in record.outputs.values())
  record.cost, record.result, record.finished = cost, result, True
  record.content = processes.from_first(lambda: _content(record, how.volatile))
  if jax.process_index() == 0:
    _write_record(folder, record)
  sharding.barrier(f"record of {stage}")
  note = f", {result['say']}" if result.get("say") else ""
  progress.say(f"{stage}: done in {progress.duration(cost.seconds)}{note}")
  return record


def begin_stage(
  folder: Any, stage: str, how: Description, result: dict[str, Any]
) -> bool:
  """Marks a stage as begun, for another stage that makes its files too.

  `run_stage` then resumes it from those files.

  Args:
    folder, stage, how: as of `run_stage`.
    result: what its record holds until it is finished; `make` may read it.

  Returns:
    Whether anything is missing of it; False: it is finished and whole.
  """
  folder = epath.Path(folder)
  record, old, state = _inspect(folder, stage, how)
  if state == "done":
    return False
  record.result = result
  _enter(folder, record, old, state, how.resumes)
  return True


def given(stage: str, digest: str) -> Record:
  """The record of what is given in place of what a stage would make."""
  return Record(
    stage, digest, {}, {}, {}, Cost(), {}, skipped=True, content=digest
  )


def is_given(record: Record) -> bool:
  """Whether no stage made what a record stands for."""
  return record.content == record.key


def _content(record: Record, volatile: tuple[str, ...]) -> str:
  """The digest of what a finished stage leaves to those that read it."""
  kept = {
    name: digest["sha256"]
    for name, digest in record.outputs.items()
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in volatile)
  }
  weights = record.result.get("weights", "")
  return key_of(record.key, kept, dict(weights=weights))


def _inspect(
  folder: epath.Path, stage: str, how: Description
) -> tuple[Record, Record | None, str]:
  """The record to be written, the one on disk, and the state of the stage."""
  fields = json.loads(json.dumps(how.fields))  # as it will be read back
  key = key_of(stage, fields, how.inputs)
  record = Record(
    stage, key, fields, how.inputs, {}, Cost(), {}, finished=False
  )
  old = read_record(folder, stage)
  bad = _corrupt(folder, old, key, how.resumes) if old else []
  state = _state(folder, old, record, how, bad) if old else "new"
  state = processes.from_first(lambda: state)
  if state in ("stale", "changed"):
    old = old or record  # a shared disk may show it to process 0 first
  if state == "stale":
    names = ", ".join(_differing(old.inputs, how.inputs)) or "what it read"
    progress.say(f"{stage}: {names} has other bytes now; running again")
  if state == "changed":
    words = "; ".join(_changes(old, record)[:4]) or "another version"
    if not how.redo:
      unfinished = "" if old.finished else "an unfinished "
      raise ConfigError(
        f"{folder} holds {unfinished}{stage} made from another config: "
        f"{words}. Use another --workdir, or --redo to replace it"
      )
    progress.say(f"{stage}: {words}; running again")
  if bad:
    where = " where it is corrupt" if state == "unfinished" else ""
    words = "; ".join(bad[:4])
    progress.say(f"{stage}: {words}; doing this stage again{where}")
  return record, old, state


def _corrupt(
  folder: epath.Path, old: Record, key: str, resumes: Iterable[str]
) -> list[str]:
  """What is corrupt of a stage on disk, in words."""
  if old.key == DAMAGED:
    return ["its record has other bytes than were written"]
  if old.key != key:
    return []
  if not old.finished:
    links = [name for name in resumes if disk.leads_out(folder, name)]
    return [f"{name} is a link out of its folder" for name in links]
  return disk.corrupt(folder, old.outputs) if jax.process_index() == 0 else []


def _state(
  folder: epath.Path,
  old: Record,
  record: Record,
  how: Description,
  bad: list[str],
) -> str:
  """What is to be done about a stage that has a record."""
  same = old.key == record.key
  if bad:
    inside = all(what.split("/")[0] in how.resumes for what in bad)
    return "unfinished" if same and how.repairs and inside else "corrupt"
  if same:
    return "done" if old.finished else "unfinished"
  if not old.finished and not any(_holds(folder / n) for n in how.resumes):
    return "new"  # a run that failed early has left nothing to lose
  stale = old.fields == record.fields and old.inputs != record.inputs
  return "stale" if stale else "changed"


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  return sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))


def _changes(old: Record, new: Record) -> list[str]:
  """How two descriptions differ, in words."""
  fields = [
    f"{n} was {old.fields.get(n)!r}, now {new.fields.get(n)!r}"
    for n in _differing(old.fields, new.fields)
  ]
  inputs = _differing(old.inputs, new.inputs)
  return fields + [f"its input {n} is another one" for n in inputs]


def _enter(
  folder: epath.Path,
  record: Record,
  old: Record | None,
  state: str,
  resumes: Iterable[str],
) -> None:
  """Clears the folder of what is no longer true, and writes the record."""
  interrupt.check()
  if jax.process_index() == 0:
    resumed = state == "unfinished"
    outputs = {} if resumed or old is None else old.outputs
    _make_room(folder, outputs, () if resumed else resumes)
    _write_record(folder, record)
  sharding.barrier(f"before {record.stage}")


def _holds(path: epath.Path) -> bool:
  """Whether a file is there, or a folder with something in it."""
  return any(path.iterdir()) if path.is_dir() else path.exists()


def _make_room(
  folder: epath.Path, outputs: Iterable[str], resumes: Iterable[str]
) -> None:
  """Makes the folder, and removes a record's outputs and what it resumes."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for name in {n.split("/")[0] for n in outputs} | {*resumes}:
      disk.remove(folder / name)
    # A link would have the record written, and so replaced, somewhere else.
    if disk.leads_out(folder, "records"):
      disk.remove(folder / "records")
    # An object store has no folder before it has a file.
    for path in folder.iterdir() if folder.exists() else ():
      if ".tmp-" in path.name:  # a killed run's half-written file
        disk.remove(path)
  except OSError as error:
    raise WriteError(
      f"cannot make {folder}: {error.strerror or error}; set --workdir"
    ) from error
