"""Which columns are read, as what, and where a row has them."""

from collections.abc import Mapping
from typing import Any

from jaxalign.core.errors import ConfigError

TARGETS = tuple(
  "id group source prompt system messages conversations tools chosen rejected "
  "completion label margin chosen_score rejected_score first second choice "
  "strength first_id second_id first_score second_score answers scores".split()
)
_COLUMNS_OF = {
  "the prompt": (
    "prompt messages conversations conversation trajectory context"
  ),
  "the system turn": "system system_prompt system_message",
  "the row's id": "id",
  "the row's source": "source",
  "the group": "group",
  "the tools": "tools",
  "the prompt's turns": "turns",
  "the chosen answer": "chosen",
  "the rejected answer": "rejected",
  "the answer": "completion",
  "its label": "label",
  "one answer": "first",
  "the other answer": "second",
  "which is better": "choice choice_first choice_second choice_tie",
  "the first answer's name": "first_id",
  "the second answer's name": "second_id",
  "the answers": "answers",
  "their scores": "scores",
  "the margin": (
    "chosen_score rejected_score score_chosen score_rejected margin "
    "first_score second_score strength"
  ),
  "the margin (score_chosen, score_rejected)": "metadata",
  # Columns of a selected subset; read by TRL, or by a person.
  "the reference's log-probabilities, for TRL": (
    "ref_chosen_logps ref_rejected_logps"
  ),
  "of the selection": "score rank",
}
ROLES = {c: role for role, text in _COLUMNS_OF.items() for c in text.split()}
_NOTHING = object()


def roles_for(columns: str) -> dict[str, str]:
  """Column -> what it becomes, of the columns that a text names."""
  return {name: ROLES[name] for name in columns.split()}


def check_fields(fields: Mapping[str, str]) -> None:
  """Raises ConfigError for a target nobody reads, or a path that is none."""
  for target, path in fields.items():
    if target not in TARGETS:
      raise ConfigError(
        f"data.fields names {target!r}, wanted one of {', '.join(TARGETS)}; "
        "set config.data.fields"
      )
    if not isinstance(path, str) or not all(path.split(".")):
      raise ConfigError(
        f"data.fields.{target}={path!r}, wanted a field of the rows such as "
        "'output' or 'meta.score'; set config.data.fields"
      )


def _at_path(value: Any, path: str) -> Any:
  """What stands at a dotted path, or _NOTHING.

  "replies.0.text" goes into a list, "replies.*.text" is a list of every text.
  """
  step, _, rest = path.partition(".")
  if not path:
    return value
  if isinstance(value, Mapping) and step in value:
    return _at_path(value[step], rest)
  if isinstance(value, list) and step == "*":
    found = [_at_path(item, rest) for item in value]
    return [None if item is _NOTHING else item for item in found]
  if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
    return _at_path(value[int(step)], rest)
  return _NOTHING


def remap(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
  """The row under the names a schema reads, and nothing else.

  Args:
    row: as it was read.
    fields: target -> dotted path ("replies.0.text", "replies.*.text"). A path
      that is not there leaves its target out, which the schema then reports.
  """
  found = {target: _at_path(row, path) for target, path in fields.items()}
  return {t: value for t, value in found.items() if value is not _NOTHING}


def has_path(row: Mapping[str, Any], path: str) -> bool:
  """Whether something stands at a dotted path, be it null."""
  found = _at_path(row, path)
  if "*" in path and found is not _NOTHING:
    return any(item is not None for item in found)
  return found is not _NOTHING


def roles_of(fields: Mapping[str, str]) -> dict[str, str]:
  """Column -> what it becomes, of a mapping of targets to paths."""
  roles: dict[str, str] = {}
  for target, path in fields.items():
    column, role = path.split(".")[0], ROLES.get(target, target)
    role += f" ({path})" if "." in path else ""
    have = roles.get(column)
    if not have or role not in have:
      roles[column] = f"{have}, {role}" if have else role
  return roles
