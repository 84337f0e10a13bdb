"""Operations per second that a device is assumed to sustain."""

from typing import Any

# Of one device, by the start of its kind: 40 % of the published bfloat16
# peak; for a CPU core pair, as measured here.
RATES = {
  "TPU v4": 110e12,
  "TPU v5 lite": 79e12,
  "TPU v5e": 79e12,
  "TPU v5": 184e12,
  "TPU v6": 367e12,
  "NVIDIA H": 396e12,
  "NVIDIA A100": 125e12,
  "cpu": 30e9,
}


def rate_of(device: Any) -> float:
  """Assumed sustained flops per second of a device."""
  for start, rate in RATES.items():
    if device.device_kind.lower().startswith(start.lower()):
      return rate
  return RATES["cpu"]


def seconds(flops: float, on_host: float, mesh: Any) -> float:
  """Assumed time of a choice, which the first process's devices make.

  Args:
    flops: of all of it.
    on_host: of them, those in NumPy.
    mesh: of the job.
  """
  devices = mesh.local_mesh.devices
  return on_host / RATES["cpu"] + (flops - on_host) / (
    devices.size * rate_of(devices.flat[0])
  )
