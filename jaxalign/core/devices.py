"""One table of devices: their memory, and what they can compute."""

from typing import Any, NamedTuple

GIB = 2**30
SUSTAINED = 0.4  # of the peak, in what a plan assumes
CPU = 30e9  # FLOP/s of a pair of cores, as measured


class Device(NamedTuple):
  """One device, as published."""

  memory: int | None  # bytes; None where a device that is there says it
  peak: float  # dense bfloat16 FLOP/s


# By the start of a device's kind; the longer of two starts comes first.
DEVICES = {
  "TPU v4": Device(32 * GIB, 275e12),
  "TPU v5 lite": Device(16 * GIB, 197e12),
  "TPU v5e": Device(16 * GIB, 197e12),
  "TPU v5": Device(95 * GIB, 459e12),
  "TPU v6": Device(32 * GIB, 918e12),
  "TPU7x": Device(96 * GIB, 2307e12),
  "TPU v7": Device(96 * GIB, 2307e12),
  "NVIDIA H100 PCIe": Device(None, 756e12),
  "NVIDIA H100": Device(None, 989e12),
  "NVIDIA H200": Device(None, 989e12),
  "NVIDIA H800": Device(None, 989e12),
  "NVIDIA H20": Device(None, 148e12),
  "NVIDIA A100": Device(None, 312e12),
}


def known(device: Any) -> Device:
  """Its row of the table; of a CPU or a kind that is not there, nothing."""
  kind = device.device_kind.lower()
  rows = (x for start, x in DEVICES.items() if kind.startswith(start.lower()))
  return next(rows, Device(None, 0.0))


def memory_of(device: Any) -> int | None:
  """Bytes of a device's memory; None where it is not known (a CPU's)."""
  try:
    stats = device.memory_stats() or {}
  except Exception:  # a device that is only described has none
    stats = {}
  return int(stats.get("bytes_limit", 0)) or known(device).memory


def peak_flops(device: Any) -> float:
  """Peak FLOP/s of a device; 0 where it is not known."""
  return known(device).peak


def sustained_flops(device: Any) -> float:
  """FLOP/s that a device is assumed to sustain."""
  return SUSTAINED * known(device).peak or CPU


def seconds_for(flops: float, on_host: float, mesh: Any) -> float:
  """Assumed time of a selection, which the first process's devices make.

  Args:
    flops: of all of it.
    on_host: of them, those in NumPy.
    mesh: of the job.
  """
  devices = mesh.local_mesh.devices
  each = sustained_flops(devices.flat[0])
  return on_host / CPU + (flops - on_host) / (devices.size * each)
