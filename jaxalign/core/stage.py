"""A stage: one row of the pipeline's table."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxalign.core.artifacts import Cost

Made = tuple[list[str], Cost, dict[str, Any]]  # files, cost, small facts


def nothing(job: Any, arm: Any) -> tuple:
  """What a stage needs, or resumes, by default."""
  del job, arm
  return ()


def needs(*names: str) -> Callable[[Any, Any], tuple[str, ...]]:
  """The `needs` of a stage that always reads the same ones."""
  return lambda job, arm: names


class Stage(NamedTuple):
  """What a job runs, skips, records, prices and shows as one step.

  Every function is called with the job and the arm (None of a stage that all
  arms share). A stage runs again where its fields differ from those on record,
  or where the bytes of what it needs do.
  """

  name: str
  # (job, arm, folder) -> files by relative name, cost and a result. All
  # processes call it, unless `alone`.
  make: Callable[[Any, Any, Any], Made]
  # Names of the stages whose files it reads; (name, arm) for another arm's.
  needs: Callable[[Any, Any], Iterable] = nothing
  fields: Callable[[Any, Any], dict[str, Any]] = lambda job, arm: {}
  of_arm: bool = False  # in the folder of an arm; else shared by all
  alone: bool = False  # made by process 0
  # Files or folders that an unfinished run leaves and `make` continues from.
  resumes: Callable[[Any, Any], Iterable[str]] = nothing
  repairs: bool = False  # `make` checks them, and makes corrupt ones again
  remakes: bool = False  # a page: made again without --redo
  volatile: tuple[str, ...] = ()  # patterns of files that vary by run
  # The digest of what is given in place of what the stage would make.
  given: Callable[[Any], str] = lambda job: ""
  # (sizes, arm) -> `Price`, before anything runs; None: it takes next to none.
  cost: Callable[[Any, Any], "Price | None"] | None = None


class Price(NamedTuple):
  """What a stage is expected to take."""

  count: int
  unit: str  # of the count
  flops: float
  seconds: float | None = None  # None: at the rate of the devices
  held: int | None = None  # bytes on the host, where they are known
  device: int | None = None  # bytes on all devices


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
