"""What a stage leaves on disk, the record beside it, and when it is skipped.

A stage is described by the config fields it depends on and by the keys of the
stages it reads; the hash of that description is its own key. Its record also
holds a digest of every byte it wrote, and of itself. A later run with the same
description and unharmed bytes skips the stage; harmed bytes make that stage
run again; another description is an error that names the field, unless `redo`
is given. The record is written before the stage starts, too: what a killed run
left is resumed only by a run with the same description.
"""

from collections.abc import Callable
import dataclasses
import fnmatch
import hashlib
import json
import time
from typing import Any

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
  finished: bool = True  # false from a stage's start to its end
  content: str = ""  # digest of the key and the bytes: what reads it depends on
  skipped: bool = False  # true where this run found it finished


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

  A record whose bytes are not those written has the key `DAMAGED`, and one that
  names files outside its folder too: nobody's files are removed by its word.
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


def changed(
  old: Record, fields: dict[str, Any], inputs: dict[str, str]
) -> list[str]:
  """What differs between a record and what is wanted now, in words."""
  out = [
    f"{n} was {old.fields.get(n)!r}, now {fields.get(n)!r}"
    for n in sorted(old.fields.keys() | fields.keys())
    if old.fields.get(n) != fields.get(n)
  ]
  return out + [
    f"its input {n} is another one"
    for n in sorted(old.inputs.keys() | inputs.keys())
    if old.inputs.get(n) != inputs.get(n)
  ]


def run(
  folder: Any,
  stage: str,
  *,
  fields: dict[str, Any],
  inputs: dict[str, str],
  make: Callable[[epath.Path], tuple],
  redo: bool = False,
  resumes: tuple[str, ...] = (),
  mends: bool = False,
  volatile: tuple[str, ...] = (),
) -> Record:
  """Runs a stage, or finds it finished.

  Args:
    folder: where its files and its record live.
    stage: the stage's name.
    fields: the config values it depends on, flat.
    inputs: stage name -> `Record.content` of every artifact it reads. Where
      these alone differ the stage is stale, and runs again.
    make: `make(folder) -> (files, Cost, result)`; `files` are relative names
      of files or folders. Every process calls it; only process 0 may write
      shared files.
    redo: run again, instead of refusing, where the description changed.
    resumes: files or folders that an unfinished run leaves and `make` goes on
      from; removed unless the same description made them.
    mends: `make` checks every byte of what it goes on from: where only that
      is harmed it is left to `make`, which does the harmed part alone.
    volatile: patterns of files whose bytes differ from run to run (times,
      names of shards); a "weights" of the result stands for them.

  Raises:
    ConfigError: the folder holds this stage made from another description.
    RestartError: SIGTERM came while several processes were between stages.
  """
  folder = epath.Path(folder)
  record, found, status = _look(
    folder, stage, fields, inputs, redo, resumes, mends
  )
  if status == "done":
    found.skipped = True
    progress.say(
      f"{stage}: finished before "
      f"({progress.duration(found.cost.seconds)}), skipped"
    )
    return found
  if found and status == "unfinished":
    record.result = found.result  # what `begin` said of it
  _enter(folder, record, found, status, resumes)
  progress.say(f"{stage}: ...")
  start = time.monotonic()
  files, cost, result = make(folder)
  sharding.barrier(f"after {stage}")
  cost.seconds = time.monotonic() - start
  if jax.process_index() == 0:
    record.outputs = disk.digest_tree(folder, files)
    cost.bytes = sum(o["bytes"] for o in record.outputs.values())
  record.cost, record.result, record.finished = cost, result, True
  record.content = processes.from_first(lambda: _content(record, volatile))
  if jax.process_index() == 0:
    _write_record(folder, record)
  sharding.barrier(f"record of {stage}")
  note = f", {result['say']}" if result.get("say") else ""
  progress.say(f"{stage}: done in {progress.duration(cost.seconds)}{note}")
  return record


def _content(record: Record, volatile: tuple[str, ...]) -> str:
  """The digest of what a finished stage leaves to those that read it."""
  kept = {
    name: digest["sha256"]
    for name, digest in record.outputs.items()
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in volatile)
  }
  weights = record.result.get("weights", "")
  return key_of(record.key, kept, dict(weights=weights))


def given(stage: str, digest: str) -> Record:
  """The record of what is given in place of what a stage would make."""
  return Record(
    stage, digest, {}, {}, {}, Cost(), {}, skipped=True, content=digest
  )


def is_given(record: Record) -> bool:
  """Whether no stage made what a record stands for."""
  return record.content == record.key


def begin(
  folder: Any,
  stage: str,
  *,
  fields: dict[str, Any],
  inputs: dict[str, str],
  result: dict[str, Any],
  redo: bool = False,
  resumes: tuple[str, ...] = (),
  mends: bool = False,
) -> bool:
  """Marks a stage as begun, for another stage that makes its files too.

  `run` then finds it unfinished and goes on from those files.

  Args:
    folder, stage, fields, inputs, redo, resumes, mends: as of `run`.
    result: what its record says until it is finished; `make` may read it.

  Returns:
    Whether anything is missing of it; False: it is finished and whole.
  """
  folder = epath.Path(folder)
  record, found, status = _look(
    folder, stage, fields, inputs, redo, resumes, mends
  )
  if status == "done":
    return False
  record.result = result
  _enter(folder, record, found, status, resumes)
  return True


def _look(
  folder: epath.Path,
  stage: str,
  fields: dict[str, Any],
  inputs: dict[str, str],
  redo: bool,
  resumes: tuple[str, ...],
  mends: bool,
) -> tuple[Record, Record | None, str]:
  """The record to be written, the one that is there, and what is to be done."""
  fields = json.loads(json.dumps(fields))  # as it will be read back
  key = key_of(stage, fields, inputs)
  record = Record(stage, key, fields, inputs, {}, Cost(), {}, finished=False)
  found = read_record(folder, stage)
  status, bad = "new", []
  if found is not None:
    if found.key == DAMAGED:
      bad = ["its record has other bytes than were written"]
    elif (
      found.key == key
      and not found.finished
      and (links := [name for name in resumes if disk.leads_out(folder, name)])
    ):
      bad = [f"{name} is a link out of its folder" for name in links]
    elif found.key == key and found.finished and jax.process_index() == 0:
      bad = disk.corrupt(folder, found.outputs)
    if bad:
      status = "harmed"
    elif (
      found.key != key
      and not found.finished
      and not any(_holds(folder / name) for name in resumes)
    ):
      status = "new"  # a run that failed early has left nothing to lose
    elif found.key != key and found.fields == fields and found.inputs != inputs:
      status = "stale"
    elif found.key != key:
      status = "changed"
    elif found.finished:
      status = "done"
    else:
      status = "unfinished"
  if (
    status == "harmed"
    and found.key == key
    and mends
    and all(what.split("/")[0] in resumes for what in bad)
  ):
    progress.say(
      f"{stage}: {'; '.join(bad[:4])}; doing this stage again where "
      "it is harmed"
    )
    status = "unfinished"
  status = processes.agree(status)
  if status == "stale":
    was = found.inputs if found else {}  # process 0 may see a shared disk first
    names = sorted(n for n in inputs if was.get(n) != inputs[n])
    progress.say(
      f"{stage}: {', '.join(names) or 'what it read'} has other bytes now; "
      "running again"
    )
  if status == "changed":
    found = found or record  # a shared disk may show it to process 0 first
    words = "; ".join(changed(found, fields, inputs)[:4]) or "another version"
    if not redo:
      part = "" if found.finished else "an unfinished "
      raise ConfigError(
        f"{folder} holds {part}{stage} made from another config: {words}. "
        "Use another --workdir, or --redo to replace it"
      )
    progress.say(f"{stage}: {words}; running again")
  if status == "harmed":
    progress.say(f"{stage}: {'; '.join(bad)}; doing this stage again")
  return record, found, status


def _enter(
  folder: epath.Path,
  record: Record,
  found: Record | None,
  status: str,
  resumes: tuple[str, ...],
) -> None:
  """Clears the folder of what is no longer true, and writes the record."""
  interrupt.check()
  if jax.process_index() == 0:
    gone_on = status == "unfinished"
    _make_room(
      folder,
      found.outputs if found and not gone_on else {},
      () if gone_on else resumes,
    )
    _write_record(folder, record)
  sharding.barrier(f"before {record.stage}")


def _holds(path: epath.Path) -> bool:
  """Whether a file is there, or a folder with something in it."""
  return any(path.iterdir()) if path.is_dir() else path.exists()


def _make_room(
  folder: epath.Path, outputs: dict[str, Any], resumes: tuple[str, ...]
) -> None:
  """Makes the folder, and removes from it what is no longer true.

  Args:
    folder: of the stage.
    outputs: files that this stage wrote, from its record.
    resumes: files and folders that it would go on from.
  """
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
