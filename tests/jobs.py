"""Whole jobs of the tests: run here or in a process of their own, compared."""

import atexit
import contextlib
import functools
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple
import warnings

import emitters
import jax
import numpy as np

from jaxalign.cli import main
from jaxalign.core import artifacts, interrupt, sharding
from jaxalign.core.checkpoints import Checkpoints
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.model import decoder
from jaxalign.model import job as job_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import common  # noqa: E402
from tools.job_checks import differences, outcome  # noqa: E402, F401


@functools.cache
def folder() -> pathlib.Path:
  """A folder of this test session; its `xla` holds compiled programs."""
  path = tempfile.mkdtemp(prefix="jaxalign_jobs_")
  atexit.register(shutil.rmtree, path, ignore_errors=True)
  return pathlib.Path(path)


class Ended(NamedTuple):
  """How a job ended."""

  code: int | None  # None where a test stopped it
  out: str
  err: str


class Stop(BaseException):
  """Ends a job where a test has seen enough; no part of jaxalign catches it."""


def flags(
  workdir: Any, *more: str, config: str = "dpo_sub.py:tiny"
) -> list[str]:
  """The flags of a tiny job; `more` without their "--config."."""
  return [
    f"--config={ROOT}/configs/{config}",
    *([f"--workdir={workdir}"] if workdir else []),
    f"--config.compile_cache={folder()}/xla",
    *(
      f if f.startswith("--") or "=" not in f else f"--config.{f}" for f in more
    ),
  ]


def run(
  workdir: Any,
  *more: str,
  config: str = "dpo_sub.py:tiny",
  command: Any = main.main,
) -> Ended:
  """Runs a job, or another command, in this process."""
  out, err, code = io.StringIO(), io.StringIO(), None
  handlers = {
    s: signal.getsignal(s)
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  }
  path = list(sys.path)
  with (
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    warnings.catch_warnings(),
  ):
    warnings.filterwarnings("ignore", "the load_module")  # in ml_collections
    try:
      code = command(["main", *flags(workdir, *more, config=config)])
    except Stop:
      pass
    finally:
      interrupt._STATE.update(deferred=False, signal=0)
      sys.path[:] = path
      for number, handler in handlers.items():
        signal.signal(number, handler)
  return Ended(code, out.getvalue(), err.getvalue())


@functools.cache
def finished() -> pathlib.Path:
  """The workdir of a finished tiny job, not to be touched."""
  ended = run(folder() / "finished")
  assert ended.code == 0, ended
  return folder() / "finished"


def copy(workdir: Any) -> pathlib.Path:
  """A copy of the finished job that a test may harm."""
  shutil.copytree(finished(), workdir)
  return pathlib.Path(workdir)


def unfinish(workdir: Any, arm: str, *stages: str) -> None:
  """Removes what stages of an arm ("": shared) wrote, and their records."""
  for stage in stages:
    at = pathlib.Path(workdir) / (f"runs/{arm}" if arm else f"shared/{stage}")
    record = artifacts.read_record(at, stage)
    artifacts._make_room(artifacts.epath.Path(at), record.outputs, ())
    (at / "records" / f"{stage}.json").unlink()


def parameters(stage_folder: Any, step: int = 0) -> dict[str, np.ndarray]:
  """The parameters of a checkpoint of a tiny job, the newest by default."""
  c = common.base("tiny")
  mesh = sharding.make_mesh(c.mesh)
  tokenizer = load_tokenizer(finished() / "shared/data/tokenizer.model")
  model = job_lib.sizes(c, tokenizer.vocab_size)
  with (
    jax.set_mesh(mesh),
    Checkpoints(pathlib.Path(stage_folder) / "checkpoints") as found,
  ):
    found = found.restore(
      step or max(found.manager.all_steps()),
      dict(params=decoder.abstract(model, mesh)),
    )
  return {name: np.asarray(x) for name, x in found["params"].items()}


def in_place_of(monkeypatch: Any, name: str, act: Any) -> None:
  """Makes every job call `act(job)` in place of its stage `name`; "" stands for
  the first stage behind the data."""
  run = job_lib.Job.run

  def running(job, stage, arm=None, folder=None):
    own = stage if isinstance(stage, str) else stage.name
    if own == name or not name and own != "data":
      return act(job)
    return run(job, stage, arm, folder)

  monkeypatch.setattr(job_lib.Job, "run", running)


def only_data(monkeypatch: Any) -> None:
  """Makes every job end after its data stage."""

  def stop(job):
    raise Stop

  in_place_of(monkeypatch, "", stop)


def start(
  workdir: Any,
  *more: str,
  hook: str = "",
  env: dict | None = None,
  config: str = "dpo_sub.py:tiny",
) -> subprocess.Popen:
  """Starts a job in a process of its own.

  Args:
    workdir: of the job.
    *more: further flags.
    hook: Python that runs before main, to make something happen at a point.
    env: further environment variables.
    config: the config file and variant.
  """
  code = (
    f"import os, signal, sys\n{hook}\n"
    "from jaxalign.core.exits import start_module\n"
    "start_module('jaxalign.cli.main')\n"
  )
  return subprocess.Popen(
    [sys.executable, "-u", "-c", code, *flags(workdir, *more, config=config)],
    cwd=ROOT,
    env=os.environ | (env or {}),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def wait(process: subprocess.Popen, timeout: float = 300) -> Ended:
  """Waits for a started job."""
  try:
    out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    out, err = process.communicate()
    raise AssertionError(f"no end within {timeout} s:\n{out}\n{err}") from None
  return Ended(process.returncode, out, err)


def kill_at_shard(shard: int, stage: str = "") -> str:
  """A hook: SIGKILL before a shard of a stage's store is written."""
  return (
    "import os, signal\n"
    "from jaxalign.embed import store\n"
    "from jaxalign.embed import over_pool as embed\n"
    "embed.CALLS = 0\n"
    "real = store.write_shard\n"
    "def dying(s, shard, *a):\n"
    f"  if shard == {shard} and {stage!r} in str(s.folder):\n"
    "    os.kill(os.getpid(), signal.SIGKILL)\n"
    "  real(s, shard, *a)\n"
    "store.write_shard = dying\n"
  )


def kill_when(point: str, at: int = 1, number: str = "SIGKILL") -> str:
  """A hook that sends this process a signal just after the n-th call of a
  function, given as "room.module:function" or "room.module:Class.method"."""
  module, names = point.split(":")
  names = names.split(".")
  holder = ".".join(["module", *names[:-1]])
  return (
    "import importlib\n"
    f"module = importlib.import_module('jaxalign.{module}')\n"
    f"calls, holder, name = [], {holder}, {names[-1]!r}\n"
    "real = getattr(holder, name)\n"
    "def hooked(*args, **kwargs):\n"
    "  result = real(*args, **kwargs)\n"
    "  calls.append(1)\n"
    f"  if len(calls) == {at}: os.kill(os.getpid(), signal.{number})\n"
    "  return result\n"
    "setattr(holder, name, hooked)\n"
  )


def together(
  workdir: Any,
  *more: str,
  count: int = 2,
  devices: int = 4,
  hooks: dict[int, str] | None = None,
  timeout: float = 240,
  config: str = "dpo_sub.py:tiny",
) -> list[Ended]:
  """One job in `count` processes of `devices` devices each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  started = [
    start(
      workdir,
      *more,
      config=config,
      hook=(hooks or {}).get(k, ""),
      env=dict(
        JAXALIGN_NUM_PROCESSES=str(count),
        JAXALIGN_PROCESS_ID=str(k),
        JAXALIGN_COORDINATOR=f"localhost:{port}",
        XLA_FLAGS=emitters.flags(devices),
      ),
    )
    for k in range(count)
  ]
  try:
    return [wait(process, timeout) for process in started]
  finally:
    for process in started:
      process.kill()


def check_same(work: Any) -> None:
  """A job ended with the bytes of the finished one, but for times."""
  assert not differences(outcome(finished()), outcome(work))


def load(path: Any) -> Any:
  """The value of a .json file."""
  return json.loads(pathlib.Path(path).read_text())


def write_pairs(path: Any, count: int) -> pathlib.Path:
  """A .jsonl of pairs whose better answer says "good"."""
  rows = [
    dict(
      prompt=f"tell me of {i} ",
      chosen=f"it is {i} and good",
      rejected=f"no {i} at all",
    )
    for i in range(count)
  ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  pathlib.Path(path).write_text(text)
  return pathlib.Path(path)


def lines(path: Any) -> list[dict[str, Any]]:
  """The objects of a .jsonl file."""
  return [json.loads(x) for x in pathlib.Path(path).read_text().splitlines()]


def did(ended: Ended) -> list[str]:
  """The stages that a job computed, in order."""
  return [
    line.partition(":")[0]
    for line in ended.out.splitlines()
    if line.endswith(": ...")
  ]
