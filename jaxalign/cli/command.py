"""One command that reads a config: parse, check, join, make, or only plan."""

from collections.abc import Callable, Iterable, Mapping
import os
from typing import Any

import jax

from jaxalign import pipeline
from jaxalign.cli import checks
from jaxalign.cli.parse import Flag, parse_config
from jaxalign.core import disk, interrupt, progress, sharding
from jaxalign.core.errors import ConfigError
from jaxalign.core.exits import guarded
from jaxalign.model.job import Arm
from jaxalign.study import plan


def make_command(
  doc: str,
  check: Callable[[Any], None],
  work: Callable[..., None],
  arms: Callable[[Any], list[Arm]],
  *,
  goal: str = "study",
  flags: Iterable[Flag] = (),
) -> Callable[[list[str]], int]:
  """`main(argv)` of a command, which returns its exit code.

  Args:
    doc: what --help says first.
    check: `check(values)` raises ConfigError for flags it cannot work with.
    work: `work(job, values, argv)`, inside the mesh and the workdir's lock.
    arms: `arms(c)`, what a dry run plans.
    goal: what it makes, a key of `pipeline.GOALS`.
    flags: further flags.
  """

  def run(argv: list[str]) -> None:
    values = parse_config(argv, doc, flags)
    # Before joining, so that all processes end with the same line.
    check(values)
    if not values.workdir and not values.dry_run:
      raise ConfigError("no workdir; set --workdir=runs/dpo_sub")
    _run(
      values, pipeline.GOALS[goal], lambda job: work(job, values, argv), arms
    )

  return lambda argv: guarded(lambda: run(argv))


def _run(
  values: Any,
  goal: tuple[str, ...],
  work: Callable[[Any], None],
  arms: Callable[[Any], list[Arm]],
) -> None:
  """Everything after the flags."""
  c, trains = values.config, "align" in goal
  checks.validate(c, values.dry_run, trains)
  _join(values.distributed)
  if c.compile_cache:
    folder = os.path.expanduser(c.compile_cache)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  interrupt.install()
  mesh = sharding.make_mesh(c.mesh)
  with jax.set_mesh(mesh):
    job = pipeline.make_job(c, mesh, values.workdir or "runs/plan", values.redo)
    checks.validate_on(
      job, planned=values.dry_run, force=values.force, trains=trains
    )
    if values.dry_run:
      plan.show_plan(job, arms(c), goal)
      return
    with disk.lock(values.workdir):
      work(job)


def announced(environment: Mapping[str, str]) -> str:
  """Which launcher announces several processes: "", or its name."""

  def count(name: str) -> int:
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
  return "tpu" if "," in environment.get("TPU_WORKER_HOSTNAMES", "") else ""


def _join(mode: str) -> None:
  """Starts jax.distributed where several processes are announced."""
  launcher = announced(os.environ)
  if mode == "on" or (mode == "auto" and launcher):
    get, kwargs = os.environ.get, {}
    try:
      if launcher == "jaxalign":
        kwargs = dict(
          coordinator_address=get(
            "JAXALIGN_COORDINATOR", get("JAX_COORDINATOR_ADDRESS")
          ),
          num_processes=int(get("JAXALIGN_NUM_PROCESSES")),
          process_id=int(get("JAXALIGN_PROCESS_ID", "0")),
        )
      jax.distributed.initialize(heartbeat_timeout_seconds=30, **kwargs)
    except (RuntimeError, ValueError) as error:
      raise ConfigError(
        f"cannot join the other processes ({error}); set "
        "JAXALIGN_PROCESS_ID and JAXALIGN_COORDINATOR, or "
        "--distributed=off for one process"
      ) from error
  progress.set_process(jax.process_index())
