"""A dry run answers any value of any knob: a plan, or one line of error."""

import json
import os
import resource
import signal

from hypothesis import given, settings
from hypothesis import strategies as st
import jobs
import pytest

from configs import common
from jaxalign.cli import main, select, train
from jaxalign.core.settings import flatten

KNOBS = [
  *sorted(flatten(common.base("tiny"), "")),
  "mesh",
  "data",
  "data.fields",
  "data.fields.prompt",
  "loss.kwargs",
  "loss.kwargs.beta",
  "select.kwargs.direction",
  "select.mixture",
  "",
]
NUMBERS = [
  "inf",
  "-inf",
  "nan",
  "-1",
  "0",
  "1",
  "2",
  "-0.5",
  "0.5",
  "1e30",
  "-1e30",
  str(2**31),
  str(2**63),
  str(2**70),
  f"-{2**70}",
  "1e400",
  "1e-300",
  "3.7",
  "0x10",
  "1_000",
  "1e5",
]
WORDS = [
  "",
  " ",
  "x",
  "None",
  "True",
  "False",
  "()",
  "(1,)",
  "(0, 0, 0)",
  "('a', 'b')",
  "('',)",
  "(inf,)",
  "(-1, 5)",
  "(None,)",
  "[]",
  "[1]",
  "{}",
  "{'a': 1}",
  "x" * 5000,
  "\u4e2d\u6587",
  "\U0001f600",
  "\ud800",
  "a\nb",
  "a:b",
  "a.b.c",
  "../x",
  "/",
  ".",
  "~",
  "%s",
  "{prompt}",
  "isa|isa",
  "a=b",
  "(",
  ")",
  "os:getcwd",
  "json:loads",
  "random",
  "('random',)",
  "'",
  "\\",
  "1e30|x",
  "hf:x",
  "-",
  "--",
  "#",
  "dpo+sft",
  "0*dpo",
  "dpo(beta=inf)",
  "isa(order=nan)",
]
VALUES = (
  st.sampled_from(NUMBERS + WORDS)
  | st.text(st.characters(exclude_characters="\0"), max_size=20)
  | st.floats().map(repr)
  | st.integers().map(str)
  | st.tuples(st.floats() | st.integers() | st.text(max_size=3)).map(repr)
)
SECONDS, BYTES = 20, 24 << 30  # that a dry run of a tiny job may take


def answers(flags, command=main.main, config="dpo_sub.py:tiny"):
  """Runs a dry run; says what is wrong with how it ended, or ""."""

  def late(*_):
    raise jobs.Stop

  old = signal.signal(signal.SIGALRM, late)
  limits = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (BYTES, limits[1]))
  signal.alarm(SECONDS)
  try:
    ended = jobs.run("", "--dry_run", *flags, command=command, config=config)
  except Exception as error:
    return f"{type(error).__name__}: {error}"
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
    resource.setrlimit(resource.RLIMIT_AS, limits)
  if ended.code is None:
    return f"no end within {SECONDS} s"
  if ended.code == 0:
    return "" if "in all" in ended.out else f"no plan: {ended.out}"
  if ended.code not in (64, 65):
    return f"ended with {ended.code}: {ended.err}"
  line = ended.err
  good = (
    line.startswith("error: ")
    and line.count("\n") == 1
    and len(line) < 8000
    and "Traceback" not in line
  )
  return "" if good else f"said {line!r}"


SOURCE = "data.source={folder}/rows.jsonl"
# What the other knobs are asked about: jobs that read different ones of them.
JOBS = {
  "world": (main.main, "dpo_sub.py:tiny"),
  "kto": (main.main, "kto_sub.py:tiny", "train.reference=online"),
  "tuned": (
    main.main,
    "dpo_sub.py:tiny",
    "select.sampler=selective_dpo",
    "lora.rank=2",
    "train.eval_every=1",
    "compare=('all_short',)",
  ),
  "pilot": (main.main, "dpo_sub.py:tiny", "select.budget=auto"),
  "judge": (
    main.main,
    "dpo_sub.py:tiny",
    "judge.kind=endpoint",
    "judge.model=m",
  ),
  "select": (select.main, "select.py", "select.budget=1.0", SOURCE),
  "train": (train.main, "dpo_sub.py:tiny", SOURCE),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Where the rows of a file lie."""
  folder = tmp_path_factory.mktemp("rows")
  (folder / "rows.jsonl").write_text(
    "".join(
      json.dumps(
        dict(
          prompt=f"tell me of {i} ",
          chosen=f"it is {i} and good",
          rejected=f"no {i} at all",
        )
      )
      + "\n"
      for i in range(60)
    )
  )
  return folder


def asked(job, folder, *changes):
  """What is wrong with the answer to a job whose knobs are changed."""
  command, config, *flags = JOBS[job]
  return answers(
    [
      *(flag.format(folder=folder) for flag in flags),
      *(f"--config.{knob}={value}" for knob, value in changes),
    ],
    command,
    config,
  )


@pytest.mark.parametrize("job", JOBS)
def test_the_jobs_asked_about_have_a_plan(job, folder):
  assert not asked(job, folder)


@settings(
  max_examples=int(os.environ.get("JAXALIGN_EXAMPLES", 60)),
  deadline=None,
  derandomize="JAXALIGN_EXAMPLES" not in os.environ,
)
@given(
  st.sampled_from(sorted(JOBS)),
  st.lists(st.tuples(st.sampled_from(KNOBS), VALUES), min_size=1, max_size=2),
)
def test_any_value_of_any_knob(folder, job, changes):
  assert not asked(job, folder, *changes)


@pytest.mark.slow
@pytest.mark.parametrize(
  "value",
  [
    "inf",
    "nan",
    "-1",
    "0",
    "0.5",
    "1e30",
    str(2**31),
    str(2**70),
    "",
    "x",
    "(None,)",
    "{}",
  ],
)
def test_every_knob(folder, value):
  wrong = {
    knob: said
    for knob in KNOBS
    if (said := asked("world", folder, (knob, value)))
  }
  assert not wrong, wrong
