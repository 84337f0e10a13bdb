"""Parts of a config as flat names and plain values."""

from typing import Any


def flatten(value: Any, prefix: str) -> dict[str, Any]:
  """A nested config -> {"dotted.name": plain value}, tuples as lists."""
  if hasattr(value, "items"):
    out = {}
    for name, child in value.items():
      out |= flatten(child, f"{prefix}.{name}" if prefix else str(name))
    return out
  if isinstance(value, (tuple, list)):
    return {prefix: [v for v in value]}
  return {prefix: value}


def pick(c: Any, *names: str) -> dict[str, Any]:
  """The named parts of a config, flat: what a stage's record records."""
  out = {}
  for name in names:
    value = c
    for part in name.split("."):
      value = value[part]
    out |= flatten(value, name)
  return out
