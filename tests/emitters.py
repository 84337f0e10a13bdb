"""How programs are compiled in tests; imported before jax is."""

import os
import subprocess
import sys

OLD = " --xla_cpu_use_fusion_emitters=false"


def choose() -> None:
  """Has XLA compile with its older emitters for CPUs, where it has them.

  The newer ones take two and a half times as long. A flag that a version does
  not know ends the process, so one is asked, unless the flag stands already;
  what it starts inherits the answer. JAXALIGN_TEST_EMITTERS=new compiles as
  users do.
  """
  flags = os.environ["XLA_FLAGS"]
  if os.environ.get("JAXALIGN_TEST_EMITTERS") == "new":
    os.environ["XLA_FLAGS"] = flags.replace(OLD, "")
  elif OLD not in flags and "PYTEST_XDIST_WORKER" not in os.environ:
    asked = subprocess.run(
      [sys.executable, "-c", "import jax; jax.devices()"],
      env=os.environ | dict(XLA_FLAGS=flags + OLD),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    if not asked.returncode:
      os.environ["XLA_FLAGS"] = flags + OLD


def as_users() -> dict[str, str]:
  """The environment without that flag, for instance for libtpu, which knows
  other flags."""
  return os.environ | dict(XLA_FLAGS=os.environ["XLA_FLAGS"].replace(OLD, ""))


def flags(devices: int) -> str:
  """XLA_FLAGS of a process with so many CPU devices, compiled for as here."""
  return (
    f"--xla_force_host_platform_device_count={devices}"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    + (OLD if OLD in os.environ["XLA_FLAGS"] else "")
  )
