"""A dry run answers any value of any knob: a plan, or one line of error."""

import os
import resource
import signal

from hypothesis import given, settings
from hypothesis import strategies as st
import jobs
import pytest
from rows import put, short_pair

from configs import common
from jaxalign.cli import main, select, train
from jaxalign.core.settings import flatten

KNOBS = [
  *sorted(flatten(common.base("tiny"), "")),
  *"mesh data data.fields data.fields.prompt select.mixture".split(),
  *"loss.kwargs loss.kwargs.beta select.kwargs.direction".split(),
  "",
]
NUMBERS = (
  "inf -inf nan -1 0 1 2 -0.5 0.5 1e30 -1e30 1e400 1e-300 3.7 0x10 1_000 1e5 "
  f"{2**31} {2**63} {2**70} -{2**70}"
).split()
_WORDS = (
  "x; None; True; False; (); (1,); (0, 0, 0); ('a', 'b'); ('',); (inf,); "
  "(-1, 5); (None,); []; [1]; {}; {'a': 1}; a:b; a.b.c; ../x; /; .; ~; %s; "
  "{prompt}; isa|isa; a=b; (; ); os:getcwd; json:loads; random; ('random',); "
  "'; \\; 1e30|x; hf:x; -; --; #; dpo+sft; 0*dpo; dpo(beta=inf); isa(order=nan)"
)
WORDS = [*_WORDS.split("; "), *("", " ", "x" * 5000, "a\nb")]
WORDS += ["\u4e2d\u6587", "\U0001f600", "\ud800"]
VALUES = (
  st.sampled_from(NUMBERS + WORDS)
  | st.text(st.characters(exclude_characters="\0"), max_size=20)
  | st.floats().map(repr)
  | st.integers().map(str)
  | st.tuples(st.floats() | st.integers() | st.text(max_size=3)).map(repr)
)
SECONDS, BYTES = 20, 24 << 30  # that a dry run of a tiny job may take


def answers(flags, command=main.main, config="dpo_sub.py:tiny"):
  """What is wrong with how a dry run ended, or ""."""

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
  good = line.startswith("error: ") and line.count("\n") == 1
  good = good and len(line) < 8000 and "Traceback" not in line
  return "" if good else f"wrote {line!r}"


SOURCE = "data.source={folder}/rows.jsonl"
_TUNED = (
  "select.sampler=selective_dpo lora.rank=2 train.eval_every=1 "
  "compare=('all_short',)"
).split()
_JUDGE = ("judge.kind=endpoint", "judge.model=m")
# Jobs that read different ones of the knobs.
JOBS = {
  "world": (main.main, "dpo_sub.py:tiny"),
  "kto": (main.main, "kto_sub.py:tiny", "train.reference=online"),
  "tuned": (main.main, "dpo_sub.py:tiny", *_TUNED),
  "pilot": (main.main, "dpo_sub.py:tiny", "select.budget=auto"),
  "judge": (main.main, "dpo_sub.py:tiny", *_JUDGE),
  "select": (select.main, "select.py", "select.budget=1.0", SOURCE),
  "train": (train.main, "dpo_sub.py:tiny", SOURCE),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Where the rows of a file lie."""
  folder = tmp_path_factory.mktemp("rows")
  put(folder / "rows.jsonl", [short_pair(i) for i in range(60)])
  return folder


def problem(job, folder, *changes):
  """What is wrong with a dry run of a job whose knobs are changed, or ""."""
  command, config, *flags = JOBS[job]
  flags = [flag.format(folder=folder) for flag in flags]
  flags += [f"--config.{knob}={value}" for knob, value in changes]
  return answers(flags, command, config)


@pytest.mark.parametrize("job", JOBS)
def test_each_job_has_a_plan(job, folder):
  assert not problem(job, folder)


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
  assert not problem(job, folder, *changes)


@pytest.mark.slow
@pytest.mark.parametrize(
  "value", f"inf nan -1 0 0.5 1e30 {2**31} {2**70}  x (None,) {{}}".split(" ")
)
def test_every_knob(folder, value):
  found = {knob: problem("world", folder, (knob, value)) for knob in KNOBS}
  wrong = {knob: text for knob, text in found.items() if text}
  assert not wrong, wrong
