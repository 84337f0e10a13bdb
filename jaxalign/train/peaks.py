"""Peak rates of devices, to tell what share of one a run made use of."""

from typing import Any

# Published dense bfloat16 FLOP/s of one device, by the start of its kind.
PEAKS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v6": 918e12,
  "TPU7x": 2307e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA A100": 312e12,
}


def peak_of(device: Any) -> float:
  """FLOP/s of a device; 0 where it is not known."""
  return next(
    (
      rate
      for start, rate in PEAKS.items()
      if device.device_kind.lower().startswith(start.lower())
    ),
    0.0,
  )
