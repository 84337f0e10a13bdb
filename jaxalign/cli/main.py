r"""A study: the arms of a config side by side, their evaluations and a report.

  python -m jaxalign.main --config=configs/dpo_sub.py --workdir=runs/dpo_sub

Any knob of the config can be set: --config.select.budget=0.05. Exit codes: 0
done, 64 usage or config, 65 data, 73 cannot write, 74 corrupt, 75 start the
same command again, 76 not finite, 130 interrupted.
"""

from typing import Any

from jaxalign.cli.command import make_command
from jaxalign.core.errors import ConfigError
from jaxalign.core.progress import say
from jaxalign.model.job import Arm, Job
from jaxalign.report.terminal import study_text
from jaxalign.study import pilot
from jaxalign.study.arms import arms_of, command_line
from jaxalign.study.run import run_study


def _check(values: Any) -> None:
  data = values.config.data
  if data.source != "world" and not data.held_out and data.split.held_out <= 0:
    raise ConfigError(
      "data.split.held_out=0: a study measures on rows it "
      "holds out; set config.data.split or data.held_out, or run "
      "jaxalign.select or jaxalign.train alone"
    )


def _arms(c: Any) -> list[Arm]:
  """Of the pilots alone where one is due: what they settle is not known."""
  configs = pilot.configs(c).values() if pilot.is_open(c) else [c]
  return [arm for one in configs for arm in arms_of(one)]


def _work(job: Job, values: Any, argv: list[str]) -> None:
  command = command_line(argv)
  notes = pilot.settle(job, lambda small: run_study(small, command))
  summary = run_study(job, command, notes)
  say("")
  say(study_text(summary))
  if all(record.skipped for record in job.records.values()):
    say("everything was finished before; nothing was computed")
  say(f"report: {values.workdir}/report.html")


main = make_command(__doc__, _check, _work, _arms)
