r"""Flags in, one job out.

  python -m jaxalign.main --config=configs/dpo_sub.py --workdir=runs/dpo_sub

Any knob of the config can be set: --config.select.budget=0.05. Exit codes: 0
done, 64 usage or config, 65 data, 73 cannot write, 74 corrupt, 75 start me
again, 76 not finite, 130 interrupted.
"""

import ast
import atexit
import contextlib
import errno
import functools
import operator
import os
import pathlib
import re
import signal
import sys
import threading
import traceback

_CANNOT_WRITE = (
  errno.ENOSPC,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EDQUOT,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EFBIG,
)
# Sections that are set whole: their names are not the config's to know.
_WHOLE = ("data.fields", "select.kwargs", "loss.kwargs")
# How a collective or the coordination service says that a peer is gone.
_PEER_MARKS = (
  "Gloo",
  "UNAVAILABLE",
  "DEADLINE_EXCEEDED",
  "ABORTED",
  "NCCL",
  "coordination service",
  "Connection reset",
)


def _parse(argv: list[str], doc: str = __doc__, define=None):
  """The flags; a wrong one raises ConfigError."""
  from absl import flags
  from ml_collections import config_flags

  from jaxalign.core.errors import ConfigError

  argv, untyped = _untyped(argv)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Path of a config file, with :variant.",
    flag_values=values,
    lock_config=True,
    sys_argv=argv,
  )
  flags.DEFINE_string(
    "workdir", None, "Where everything is written.", flag_values=values
  )
  flags.DEFINE_bool(
    "dry_run", False, "Print the plan and stop.", flag_values=values
  )
  flags.DEFINE_bool(
    "redo",
    False,
    "Replace stages that another config made, instead of refusing.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "force",
    False,
    "Try a model that should not fit the devices.",
    flag_values=values,
  )
  flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Whether to join other processes.",
    flag_values=values,
  )
  flags.DEFINE_bool("help", False, "Show the flags.", flag_values=values)
  if define:
    define(values)
  for argument in argv[1:]:  # `from configs import common` from any folder
    if argument.startswith("--config="):
      path = argument.split("=", 1)[1].split(":")[0]
      if not os.path.exists(path):
        raise ConfigError(f"config file {path!r} does not exist; set --config")
      sys.path.insert(0, str(pathlib.Path(path).resolve().parent.parent))
  try:
    rest = values(argv)
    if values.help:
      print(doc + values.main_module_help())
      sys.exit(0)
    config = values.config
  except (
    flags.Error,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    OSError,
  ) as e:
    raise ConfigError(
      f"{_short(e)}; see configs/common.py for all knobs"
    ) from e
  if len(rest) > 1:
    raise ConfigError(f"unexpected argument {rest[1]!r}; flags start with --")
  if config is None:
    raise ConfigError("no config; say --config=configs/dpo_sub.py")
  for argument in argv[1:]:
    name = re.match(r"--config\.([\w.]+)=", argument)
    if (
      name
      and name[1] not in _WHOLE
      and hasattr(
        functools.reduce(operator.getitem, name[1].split("."), config), "items"
      )
    ):
      raise ConfigError(
        f"config.{name[1]} is a section, wanted one of its "
        "knobs; see configs/common.py for all knobs"
      )
  for (*path, name), value in untyped.items():
    if path == ["data", "choice"]:  # data.choice.first=... on the way
      value, name = {**(config.data.choice or {}), name: value}, path.pop()
    section = functools.reduce(operator.getitem, path, config)
    with section.unlocked(), section.ignore_type():
      section[name] = value
  return values


def parse_plain(values, argv: list[str], doc: str) -> None:
  """Parses the flags of a command that has no config; `--help` ends it.

  Args:
    values: the flags, "help" among them.
    argv: what was typed.
    doc: what --help says first.

  Raises:
    ConfigError: a wrong flag, or a word that is none.
  """
  from absl import flags

  from jaxalign.core.errors import ConfigError

  try:
    rest = values(argv)
  except flags.Error as error:
    raise ConfigError(f"{error}; see --help") from error
  if values.help:
    print(doc + values.main_module_help())
    sys.exit(0)
  if len(rest) > 1:
    raise ConfigError(f"unexpected argument {rest[1]!r}; flags start with --")


def _untyped(argv: list[str]) -> tuple[list[str], dict[tuple, object]]:
  """The flags without those whose type no config can tell, and these by path.

  What a sampler or a loss takes beside the common knobs (select.kwargs,
  loss.kwargs) is its own affair, and so are the columns of a person's rows
  (data.fields) and their codes (data.choice), so no config can list them; they
  are checked with the config. A budget is a number, or the word "auto".
  """
  rest, found = [], {}
  for argument in argv:
    match = re.fullmatch(
      r"--config\.((?:select\.kwargs|loss\.kwargs|data\.fields|data\.choice)"
      r"\.\w+|data\.choice)=(.*)",
      argument,
      re.DOTALL,
    ) or re.fullmatch(r"--config\.(select\.budget)=(auto)", argument)
    if not match:
      rest.append(argument)
      continue
    path, text = match.groups()
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = text  # a word
    found[tuple(path.split("."))] = value
  return rest, found


def _short(error: Exception) -> str:
  """What is wrong with the flags, in one line."""
  text = str(error).replace("\\n", "\n").strip()
  if isinstance(error, (KeyError, AttributeError)):
    name = re.match(r"""[\\'"]*(\w+)[\\'"]*(\n|$)""", text)
    near = re.search(r'mean "(\w+)"', text)
    if name:
      return f"unknown knob {name[1]!r}" + (
        f", did you mean {near[1]!r}?" if near else ""
      )
  if "Traceback (most recent call last):" in text:  # of the config file
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    where = [line for line in lines if line.startswith("File ")]
    text = f"{lines[-1]} ({where[-1]})"
  return " ".join(text.split()) or repr(error)


def announced(environment) -> str:
  """Which launcher announces several processes: "", or its name."""
  from jaxalign.core.errors import ConfigError

  def count(name):
    value = environment.get(name) or "1"
    if not value.isdigit():
      raise ConfigError(f"{name}={value!r}, wanted a whole number")
    return int(value)

  if count("JAXALIGN_NUM_PROCESSES") > 1:
    return "jaxalign"
  if count("SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environment:
    return "slurm"
  if count("OMPI_COMM_WORLD_SIZE") > 1:
    return "openmpi"
  if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
    return "tpu"
  return ""


def _join(mode: str) -> None:
  """Starts jax.distributed where several processes are announced."""
  import jax

  from jaxalign.core import progress
  from jaxalign.core.errors import ConfigError

  launcher = announced(os.environ)
  if mode == "on" or (mode == "auto" and launcher):
    try:
      kwargs = {}
      if launcher == "jaxalign":
        kwargs = dict(
          coordinator_address=os.environ.get(
            "JAXALIGN_COORDINATOR", os.environ.get("JAX_COORDINATOR_ADDRESS")
          ),
          num_processes=int(os.environ["JAXALIGN_NUM_PROCESSES"]),
          process_id=int(os.environ.get("JAXALIGN_PROCESS_ID", "0")),
        )
      jax.distributed.initialize(heartbeat_timeout_seconds=30, **kwargs)
    except (RuntimeError, ValueError) as error:
      raise ConfigError(
        f"cannot join the other processes ({error}); set "
        "JAXALIGN_PROCESS_ID and JAXALIGN_COORDINATOR, or "
        "--distributed=off for one process"
      ) from error
  progress.set_process(jax.process_index())


def _run(values, argv: list[str], check, work, arms, goal: str) -> None:
  """Everything after the flags."""
  c = values.config
  import jax

  from jaxalign import pipeline
  from jaxalign.cli import checks
  from jaxalign.core import disk, interrupt, sharding
  from jaxalign.core.errors import ConfigError
  from jaxalign.study import plan

  # Before joining, so that all processes end with the same line.
  check(values)
  if not values.workdir and not values.dry_run:
    raise ConfigError("no workdir; say --workdir=runs/dpo_sub")
  trains = "align" in pipeline.GOALS[goal]
  checks.validate(c, values.dry_run, trains)
  _join(values.distributed)
  if c.compile_cache:
    jax.config.update(
      "jax_compilation_cache_dir", os.path.expanduser(c.compile_cache)
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  interrupt.install()
  mesh = sharding.make_mesh(c.mesh)
  with jax.set_mesh(mesh):
    job = pipeline.make_job(c, mesh, values.workdir or "runs/plan", values.redo)
    checks.validate_on(
      job, planned=values.dry_run, force=values.force, trains=trains
    )
    if values.dry_run:
      plan.show(job, arms(c), pipeline.GOALS[goal])
      return
    with disk.lock(values.workdir):
      work(job, values, argv)


def ran(job) -> bool:
  """Whether a stage of this run was not found finished."""
  return any(not card.skipped for card in job.records.values())


def command(
  argv: list[str],
  doc: str,
  *,
  check,
  work,
  arms,
  define=None,
  goal: str = "study",
) -> int:
  """One command of the package that reads a config; returns its exit code.

  Args:
    argv: the flags.
    doc: what --help says first.
    check: `check(values)` raises ConfigError for flags it cannot work with.
    work: `work(job, values, argv)`, inside the mesh and the workdir's lock.
    arms: `arms(c)`, what a dry run plans.
    define: `define(values)` adds flags.
    goal: what it makes, a key of `pipeline.GOALS`.
  """
  from jaxalign.core import progress

  progress.say("jaxalign: reading the config")
  return guarded(
    lambda: _run(_parse(argv, doc, define), argv, check, work, arms, goal)
  )


def _check(values) -> None:
  from jaxalign.core.errors import ConfigError

  c = values.config
  if c.data.source != "world" and not (
    c.data.held_out or c.data.split.held_out > 0
  ):
    raise ConfigError(
      "data.split.held_out=0: a study measures on rows it "
      "holds out; set config.data.split or data.held_out, or run "
      "jaxalign.select or jaxalign.train alone"
    )


def _arms(c):
  from jaxalign.study import pilot
  from jaxalign.study import run as study

  if pilot.is_open(c):  # what it settles is not known
    return [
      arm for small in pilot.configs(c).values() for arm in study.arms_of(small)
    ]
  return study.arms_of(c)


def _study(job, values, argv: list[str]) -> None:
  """All arms, the summary and its page."""
  from jaxalign.core import progress
  from jaxalign.report import terminal
  from jaxalign.study import pilot
  from jaxalign.study import run as study

  command_line = study.command_line(argv)
  notes = pilot.settle(job, lambda small: study.run(small, command_line))
  summary = study.run(job, command_line, notes)
  progress.say("")
  progress.say(terminal.study_text(summary))
  if not ran(job):
    progress.say("everything was finished before; nothing was computed")
  progress.say(f"report: {values.workdir}/report.html")


def main(argv: list[str]) -> int:
  """Returns the exit code; one line on stderr says what went wrong."""
  return command(argv, __doc__, check=_check, work=_study, arms=_arms)


def guarded(run) -> int:
  """The exit code of `run()`, for every command of the package."""
  from jaxalign.core.errors import JaxalignError

  try:
    run()
    return 0
  except JaxalignError as error:
    return _fail(str(error), error.exit_code)
  except KeyboardInterrupt:
    return _fail(
      "interrupted; what was finished is kept, run the same command to go on",
      128 + signal.SIGINT,
    )
  except Exception as error:
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
      return _fail(
        f"cannot write {error.filename or 'a file'}: "
        f"{error.strerror}; free space or set --workdir",
        73,
      )
    if _lost_peer(error):
      return _fail(
        "another process of this job ended ("
        f"{str(error).splitlines()[0][:160]}); its own message says "
        "why, run the same command to go on",
        75,
      )
    raise


def _lost_peer(error: BaseException | None) -> bool:
  """Whether a collective failed because another process is gone."""
  jax = sys.modules.get("jax")
  if jax is None or not jax.distributed.is_initialized():
    return False
  while error is not None:
    if isinstance(error, jax.errors.JaxRuntimeError) and any(
      mark in str(error) for mark in _PEER_MARKS
    ):
      return True
    error = error.__cause__ or error.__context__
  return False


def _fail(message: str, code: int) -> int:
  line = " ".join(message.split())
  if len(line) > 4000:  # a flag of a megabyte; both ends say what is wrong
    line = f"{line[:2000]} [...] {line[-1000:]}"
  # One write: a library's thread may be printing a traceback of its own.
  with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()
  return code


def _leave(code: int) -> None:
  """Ends the process with the job's own code.

  What is left to do at an end is done here, and the interpreter is not taken
  apart: a C++ thread (of pyarrow's pool, of gRPC) that asks for it meanwhile
  is cut off inside a destructor, and the process ends with 134 in place of
  the code. With several processes an error waits for none of the others.
  """
  for number in (signal.SIGINT, signal.SIGTERM):  # impatient: end now
    signal.signal(number, lambda *_: os._exit(code))
  jax = sys.modules.get("jax")
  if not (code and jax is not None and jax.distributed.is_initialized()):
    try:
      threading._shutdown()
      atexit._run_exitfuncs()
    except BaseException:  # it must not take the job's code away
      traceback.print_exc()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      stream.flush()
  os._exit(code)


def start(run) -> None:
  """Runs `run(argv) -> exit code` as a command, and ends the process."""
  from jaxalign.core import progress

  progress.outlive_readers()
  ended = []
  try:  # guarded here too: a second signal may fall into the first one's end
    status = guarded(lambda: ended.append(run(sys.argv))) or ended[0]
  except SystemExit as end:  # of --help
    status = end.code if isinstance(end.code, int) else int(bool(end.code))
  except BaseException:  # a bug: the traceback is what helps
    traceback.print_exc()
    status = 1
  _leave(status)
