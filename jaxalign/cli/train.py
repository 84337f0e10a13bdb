r"""Training on its own: every row of the source, chosen by us or not.

  python -m jaxalign.train --config=configs/dpo_sub.py --workdir=runs/alone \
    --config.data.source=subset.parquet --config.model.checkpoint=hf:<repo>

Nothing is selected. Rows are held out, and the policy measured on them, as
far as config.data.split says so; by default none are. The policy is in
`export/`, as a Hugging Face folder. Exit codes as of jaxalign.main.
"""

from typing import Any

from jaxalign.cli import main as main_lib
from jaxalign.core.errors import ConfigError


def _arm(c: Any) -> Any:
  from jaxalign.model.job import Arm

  return Arm("random", 1.0, c.seed)


def _check(values: Any) -> None:
  c = values.config
  if c.data.source == "world":
    raise ConfigError(
      "data.source=world has rows of its own; say "
      "--config.data.source=subset.parquet, or run "
      "jaxalign.main"
    )
  if not any(name.startswith("config.data.split.") for name in values):
    c.data.split.update(sft=0.0, pool=1.0, held_out=0.0)


def _work(job: Any, values: Any, argv: list[str]) -> None:
  del values, argv
  from jaxalign import pipeline
  from jaxalign.core import progress
  from jaxalign.model.job import arm_folder

  arm = _arm(job.c)
  pipeline.run(job, [arm], pipeline.GOALS["training"])
  folder = arm_folder(job, arm)
  if (arm.name, "evaluate") in job.records:
    progress.say(f"measures: {folder}/eval.json")
  progress.say(f"policy: {folder}/export")


def main(argv: list[str]) -> int:
  """Returns the exit code; one line on stderr says what went wrong."""
  return main_lib.command(
    argv,
    __doc__,
    check=_check,
    work=_work,
    arms=lambda c: [_arm(c)],
    goal="training",
  )


if __name__ == "__main__":
  main_lib.start(main)
