"""Rows of other names: a mapping in the config, and answers with a verdict."""

from typing import Any, Mapping

from jaxalign.data.schemas.pairs import (Refused, Schema, make_pair, margin_of,
                                         text_of, turns_of)
from jaxalign.errors import ConfigError

TARGETS = ("id", "prompt", "messages", "conversations", "chosen", "rejected",
           "completion", "label", "chosen_score", "rejected_score", "first",
           "second", "choice")


def check_fields(fields: Mapping[str, str]) -> None:
  """Raises ConfigError for a target nobody reads, or a path that is none."""
  for target, path in fields.items():
    if target not in TARGETS:
      raise ConfigError(f"data.fields names {target!r}, wanted one of "
                        f"{', '.join(TARGETS)}; set config.data.fields")
    if not isinstance(path, str) or not all(path.split(".")):
      raise ConfigError(f"data.fields.{target}={path!r}, wanted a field of the "
                        "rows such as 'output' or 'meta.score'; set "
                        "config.data.fields")


def remap(row: Mapping[str, Any], fields: Mapping[str, str]
          ) -> dict[str, Any]:
  """The row under the names a schema reads, and nothing else.

  Args:
    row: as it was read.
    fields: target -> dotted path; "replies.0.text" goes into a list. A path
      that is not there leaves its target out; the schema then says so.
  """
  out = {}
  for target, path in fields.items():
    value = row
    for step in path.split("."):
      if isinstance(value, Mapping) and step in value:
        value = value[step]
      elif (isinstance(value, list) and step.isdecimal() and
            int(step) < len(value)):
        value = value[int(step)]
      else:
        break
    else:
      out[target] = value
  return out


def convert_choice(row: dict) -> dict[str, Any]:
  """prompt, first, second and the choice: 1, 2, or 0 for a tie."""
  prompt = text_of(row, "prompt", "empty prompt")
  sides = [text_of(row, side) for side in ("first", "second")]
  if "choice" not in row:
    raise Refused("missing field", "choice")
  choice = row["choice"]
  if isinstance(choice, str) and choice.strip() in ("0", "1", "2"):
    choice = int(choice)
  if isinstance(choice, bool) or choice not in (0, 1, 2):
    raise Refused("bad choice", f"{choice!r:.40}, wanted 0 (tie), 1 or 2")
  if choice == 0:
    raise Refused("tie", "neither side was chosen")
  chosen, rejected = sides if choice == 1 else sides[::-1]
  return make_pair(prompt, chosen, rejected, turns=turns_of(prompt),
                   margin=margin_of(row))


CHOICES = Schema("choices",
                 lambda row: (isinstance(row.get("prompt"), str) and
                              isinstance(row.get("first"), str) and
                              isinstance(row.get("second"), str) and
                              "choice" in row), convert_choice, "pairs")
