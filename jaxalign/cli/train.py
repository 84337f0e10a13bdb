r"""Training on its own: every row of the source, selected by us or not.

  python -m jaxalign.train --config=configs/dpo_sub.py --workdir=runs/alone \
    --config.data.source=subset.parquet --config.model.checkpoint=hf:<repo>

Nothing is selected. Rows are held out, and the policy measured on them, as
far as config.data.split says so; by default none are. The policy is in
`export/`, as a Hugging Face folder. Exit codes as of jaxalign.main.
"""

from typing import Any

from jaxalign import pipeline
from jaxalign.cli.command import make_command
from jaxalign.core.errors import ConfigError
from jaxalign.core.progress import say
from jaxalign.model.job import Arm, arm_folder, Job


def _arms(c: Any) -> list[Arm]:
  return [Arm("random", 1.0, c.seed)]


def _check(values: Any) -> None:
  c = values.config
  if c.data.source == "world":
    raise ConfigError(
      "data.source=world has rows of its own; set "
      "--config.data.source=subset.parquet, or run jaxalign.main"
    )
  if not any(name.startswith("config.data.split.") for name in values):
    c.data.split.update(sft=0.0, pool=1.0, held_out=0.0)


def _work(job: Job, values: Any, argv: list[str]) -> None:
  (arm,) = arms = _arms(job.c)
  pipeline.run(job, arms, pipeline.GOALS["training"])
  folder = arm_folder(job, arm)
  if (arm.name, "evaluate") in job.records:
    say(f"measures: {folder}/eval.json")
  say(f"policy: {folder}/export")


main = make_command(__doc__, _check, _work, _arms, goal="training")
