r"""Selection on its own: rows in, the selected rows out.

  python -m jaxalign.select --config=configs/select.py \
    --config.data.source=pairs.parquet --config.select.sampler=isa \
    --config.select.budget=0.1 --output=subset.parquet

What was computed stays in a folder next to the output (or in --workdir), with
every row's score and the selection's page: the next sampler on the same rows
embeds nothing. Exit codes as of jaxalign.main.
"""

from typing import Any

from etils import epath
import jax

from jaxalign import pipeline
from jaxalign.cli.command import make_command
from jaxalign.core.disk import write_bytes
from jaxalign.core.errors import ConfigError
from jaxalign.core.progress import say
from jaxalign.model.job import Arm, arm_folder, budget_of, Job
from jaxalign.study.pilot import refuse_open

_OUTPUT = ("string", "output", None, "The .parquet of the selected rows.")


def _arms(c: Any) -> list[Arm]:
  return [Arm(c.select.sampler, budget_of(c.select.budget), c.seed)]


def _check(values: Any) -> None:
  if not values.config.data.source:
    raise ConfigError("no rows; set --config.data.source=pairs.jsonl")
  values.config.train.batch_size = 1  # a subset need not fill a batch
  refuse_open(values.config, "jaxalign.select")
  output = values.output or ""
  if not (output or values.dry_run):
    raise ConfigError("no output; set --output=subset.parquet")
  if output and not output.endswith(".parquet"):
    raise ConfigError(f"--output={output}, wanted a .parquet")
  if output and not values.workdir:
    values.workdir = output.removesuffix(".parquet") + ".jaxalign"


def _work(job: Job, values: Any, argv: list[str]) -> None:
  (arm,) = arms = _arms(job.c)
  pipeline.run(job, arms, pipeline.GOALS["selection"])
  folder = arm_folder(job, arm)
  if jax.process_index() == 0:
    data = (folder / "subset.parquet").read_bytes()
    write_bytes(epath.Path(values.output), data)
  say(f"subset: {values.output}")
  say(f"scores of all rows: {folder}/scores.parquet")
  say(f"page: {folder}/selection.html")


main = make_command(
  __doc__, _check, _work, _arms, goal="selection", flags=[_OUTPUT]
)
