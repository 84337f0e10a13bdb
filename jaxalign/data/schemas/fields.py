"""Rows of other names: a mapping in the config, target to path."""

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import ConfigError

TARGETS = (
  "id",
  "group",
  "source",
  "prompt",
  "system",
  "messages",
  "conversations",
  "tools",
  "chosen",
  "rejected",
  "completion",
  "label",
  "margin",
  "chosen_score",
  "rejected_score",
  "first",
  "second",
  "choice",
  "strength",
  "first_id",
  "second_id",
  "first_score",
  "second_score",
  "answers",
  "scores",
)
_NOTHING = object()


def check_fields(fields: Mapping[str, str]) -> None:
  """Raises ConfigError for a target nobody reads, or a path that is none."""
  for target, path in fields.items():
    if target not in TARGETS:
      raise ConfigError(
        f"data.fields names {target!r}, wanted one of "
        f"{', '.join(TARGETS)}; set config.data.fields"
      )
    if not isinstance(path, str) or not all(path.split(".")):
      raise ConfigError(
        f"data.fields.{target}={path!r}, wanted a field of the "
        "rows such as 'output' or 'meta.score'; set "
        "config.data.fields"
      )


def at_path(value: Any, path: str) -> Any:
  """What stands at a dotted path; a private object where nothing does.

  "replies.0.text" goes into a list, "replies.*.text" is a list of every text.
  """
  steps = path.split(".") if path else []
  for i, step in enumerate(steps):
    if isinstance(value, Mapping) and step in value:
      value = value[step]
    elif isinstance(value, list) and step == "*":
      rest = ".".join(steps[i + 1 :])
      found = [at_path(one, rest) for one in value]
      return [None if one is _NOTHING else one for one in found]
    elif (
      isinstance(value, list) and step.isdecimal() and int(step) < len(value)
    ):
      value = value[int(step)]
    else:
      return _NOTHING
  return value


def remap(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
  """The row under the names a schema reads, and nothing else.

  Args:
    row: as it was read.
    fields: target -> dotted path, see `at_path`. A path that is not there
      leaves its target out; the schema then says so.
  """
  return {
    target: value
    for target, path in fields.items()
    if (value := at_path(row, path)) is not _NOTHING
  }


def has_path(row: Mapping[str, Any], path: str) -> bool:
  """Whether something stands at a dotted path, be it null."""
  found = at_path(row, path)
  return found is not _NOTHING and not (
    path.count("*") and (not found or all(one is None for one in found))
  )
