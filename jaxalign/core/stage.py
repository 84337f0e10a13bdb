"""A stage: one row of the pipeline's table."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxalign.core.artifacts import Cost

Made = tuple[list[str], Cost, dict[str, Any]]  # files, cost, small facts


class Price(NamedTuple):
  """What a stage is expected to take."""

  count: int
  unit: str  # of the count
  flops: float
  seconds: float | None = None  # None: at the rate of the devices
  held: int | None = None  # bytes on the host, where they are known
  device: int | None = None  # bytes on all devices


class Kind(NamedTuple):
  """How stages of one kind are made, kept and resumed."""

  of_arm: bool = False  # in the folder of an arm; else shared by all
  alone: bool = False  # made by process 0
  # Files or folders that an unfinished run leaves and `make` continues from:
  # names between spaces, or (job, arm) -> names.
  resumes: str | Callable[[Any, Any], Iterable[str]] = ""
  repairs: bool = False  # `make` checks them, and makes corrupt ones again
  remakes: bool = False  # a page: made again without --redo
  volatile: str = ""  # patterns of files that vary by run, between spaces
  # The digest of what is given in place of what the stage would make.
  given: Callable[[Any], str] = lambda job: ""


class Stage(NamedTuple):
  """What a job runs, skips, records, prices and shows as one step.

  Every function is called with the job and the arm (None of a stage that all
  arms share). A stage runs again where its fields differ from those on record,
  or where the bytes of what it needs do.
  """

  name: str
  # (job, arm, folder) -> files by relative name, cost and a result. All
  # processes call it, unless the kind is `alone`.
  make: Callable[[Any, Any, Any], Made]
  # Stages whose files it reads: names between spaces, or (job, arm) -> names,
  # (name, arm) for another arm's.
  needs: str | Callable[[Any, Any], Iterable] = ""
  fields: Callable[[Any, Any], dict[str, Any]] = lambda job, arm: {}
  # (sizes, arm) -> its price, before anything runs; None: next to nothing.
  price: Callable[[Any, Any], Price | None] | None = None
  kind: Kind = Kind()


def names_of(names: Any, job: Any, arm: Any) -> tuple:
  """The `needs` or `resumes` of a stage, of this job and arm."""
  return tuple(names.split() if isinstance(names, str) else names(job, arm))


class JobSizes(NamedTuple):
  """What prices are counted from, before anything has run."""

  job: Any
  rows: dict[str, int]  # records by split
  tokens: dict[str, float]  # mean of a row, by split
  model: Any  # sizes of the reference
  planned: frozenset[str]  # shared stages that will run

  @property
  def responses(self) -> int:
    """R, of a record of the pool."""
    return 2 if self.job.kind == "pairs" else 1


def required(
  job: Any, arms: Sequence[Any], goal: Iterable[str]
) -> list[tuple[Stage, Any]]:
  """(stage, arm) of all that the stages of a goal need, in the table's order.

  Shared stages come first, with None for the arm; then those of each arm.
  """
  wanted = set()

  def visit(name: str, arm: Any) -> None:
    stage = job.stages[name]
    key = name, arm if stage.kind.of_arm else None
    if key not in wanted:
      wanted.add(key)
      for need in names_of(stage.needs, job, arm):
        visit(*need) if isinstance(need, tuple) else visit(need, arm)

  for arm in arms:
    for name in goal:
      visit(name, arm)
  return [
    (stage, arm)
    for arm in (None, *arms)
    for stage in job.stages.values()
    if (stage.name, arm) in wanted
  ]
