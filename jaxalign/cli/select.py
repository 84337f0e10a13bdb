r"""Selection on its own: rows in, the chosen rows out.

  python -m jaxalign.select --config=configs/select.py \
    --config.data.source=pairs.parquet --config.select.sampler=isa \
    --config.select.budget=0.1 --output=subset.parquet

What was computed stays in a folder beside the output (or in --workdir), with
every row's score and the selection's page: the next sampler on the same rows
embeds nothing. Exit codes as of jaxalign.main.
"""

from typing import Any

from jaxalign.cli import main as main_lib
from jaxalign.core import disk
from jaxalign.core.errors import ConfigError


def _define(values: Any) -> None:
  from absl import flags

  flags.DEFINE_string(
    "output", None, "The .parquet of the chosen rows.", flag_values=values
  )


def _arm(c: Any) -> Any:
  from jaxalign.model.job import Arm, budget_of

  return Arm(c.select.sampler, budget_of(c.select.budget), c.seed)


def _check(values: Any) -> None:
  from jaxalign.study import pilot

  if not values.config.data.source:
    raise ConfigError("no rows; say --config.data.source=pairs.jsonl")
  values.config.train.batch_size = 1  # a subset need not fill a batch
  pilot.refuse(values.config, "jaxalign.select")
  if not (values.output or values.dry_run):
    raise ConfigError("no output; say --output=subset.parquet")
  if values.output and not values.output.endswith(".parquet"):
    raise ConfigError(f"--output={values.output}, wanted a .parquet")
  if values.output and not values.workdir:
    values.workdir = values.output.removesuffix(".parquet") + ".jaxalign"


def _work(job: Any, values: Any, argv: list[str]) -> None:
  del argv
  from etils import epath
  import jax

  from jaxalign import pipeline
  from jaxalign.core import progress
  from jaxalign.model.job import arm_folder

  arm = _arm(job.c)
  pipeline.run(job, [arm], pipeline.GOALS["selection"])
  folder = arm_folder(job, arm)
  if jax.process_index() == 0:
    data = (folder / "subset.parquet").read_bytes()
    disk.write_bytes(epath.Path(values.output), data)
  progress.say(f"subset: {values.output}")
  progress.say(f"scores of all rows: {folder}/scores.parquet")
  progress.say(f"page: {folder}/selection.html")


def main(argv: list[str]) -> int:
  """Returns the exit code; one line on stderr says what went wrong."""
  return main_lib.command(
    argv,
    __doc__,
    check=_check,
    work=_work,
    arms=lambda c: [_arm(c)],
    define=_define,
    goal="selection",
  )


if __name__ == "__main__":
  main_lib.start(main)
