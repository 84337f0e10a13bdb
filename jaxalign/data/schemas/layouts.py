"""Public layouts whose columns, and what their codes mean, are known.

Each is a mapping onto the names that `rows` reads; what a code means comes
from the data set's own description, and holds too where `data.fields` names
the same columns.
"""

from collections.abc import Mapping
import json
from typing import Any, NamedTuple

from jaxalign.data.schemas.choices import BY_SCORE, Undecided
from jaxalign.data.schemas.fields import has_path, remap
from jaxalign.data.schemas.lists import convert_scored
from jaxalign.data.schemas.messages import messages_of, opened
from jaxalign.data.schemas.pairs import Refused, Schema
from jaxalign.data.schemas.rows import (
  convert_choice,
  convert_pair,
  convert_unpaired,
)

_SIGNED = {"first": [-3, -2, -1], "second": [1, 2, 3], "tie": [0]}
_FROM_0 = {"first": [0], "second": [1]}
_FIRST_IS_1 = {"first": [1], "second": [0]}


class Layout(NamedTuple):
  """One public layout."""

  name: str
  fields: Mapping[str, str]  # target -> path in the row
  convert: Any = convert_choice
  rule: Any = None  # what its codes mean
  optional: tuple[str, ...] = ()  # targets that a row may lack
  kind: str = "pairs"
  many: bool = False


LAYOUTS = (
  Layout(
    "pku_saferlhf",
    dict(
      prompt="prompt",
      first="response_0",
      second="response_1",
      choice="better_response_id",
    ),
    rule=_FROM_0,
  ),
  Layout(
    "shp",
    dict(
      prompt="history",
      first="human_ref_A",
      second="human_ref_B",
      choice="labels",
      first_score="score_A",
      second_score="score_B",
    ),
    rule=_FIRST_IS_1,
    optional=("first_score", "second_score"),
  ),
  Layout(
    "helpsteer2",
    dict(
      prompt="prompt",
      first="response_1",
      second="response_2",
      choice="preference_strength",
      strength="preference_strength",
    ),
    rule=_SIGNED,
  ),
  Layout(
    "helpsteer3",
    dict(
      messages="context",
      first="response1",
      second="response2",
      choice="overall_preference",
      strength="overall_preference",
    ),
    rule=_SIGNED,
  ),
  Layout(
    "chatbot_arena",
    dict(
      first="conversation_a",
      second="conversation_b",
      choice="winner",
      first_id="model_a",
      second_id="model_b",
    ),
    optional=("first_id", "second_id"),
  ),
  Layout(
    "summarize_from_feedback",
    dict(
      prompt="info.post",
      first="summaries.0.text",
      second="summaries.1.text",
      choice="choice",
    ),
    rule=_FROM_0,
  ),
  Layout(
    "webgpt",
    dict(
      prompt="question.full_text",
      first="answer_0",
      second="answer_1",
      first_score="score_0",
      second_score="score_1",
    ),
    rule=BY_SCORE,
  ),
  Layout(
    "halos_pairs",
    dict(
      prompt="prompt",
      first="output_A",
      second="output_B",
      choice="label",
      strength="reward_difference",
    ),
    rule=_FIRST_IS_1,
    optional=("strength",),
  ),
  Layout(
    "halos_binary",
    dict(prompt="prompt", completion="output", label="label"),
    convert_unpaired,
    kind="unpaired",
  ),
  Layout(
    "openai_preference",
    dict(
      messages="input.messages",
      tools="input.tools",
      chosen="preferred_output",
      rejected="non_preferred_output",
    ),
    convert_pair,
    optional=("tools",),
  ),
  Layout(
    "orca_dpo",
    dict(
      system="system", prompt="question", chosen="chosen", rejected="rejected"
    ),
    convert_pair,
  ),
  Layout(
    "argilla_orca",
    dict(system="system", prompt="input", chosen="chosen", rejected="rejected"),
    convert_pair,
  ),
  Layout("spin", dict(chosen="real", rejected="generated"), convert_pair),
  Layout(
    "ultrafeedback",
    dict(
      prompt="instruction",
      answers="completions.*.response",
      scores="completions.*.overall_score",
    ),
    convert_scored,
    many=True,
  ),
)
# Other columns of the same sets that hold codes of the same meaning.
_ALIKE = {("response_0", "response_1", "safer_response_id"): _FROM_0} | {
  ("response1", "response2", f"annotator{i}"): {
    "first": [1],
    "second": [2],
    "tie": [0],
  }
  for i in (1, 2, 3)
}  # PandaLM


def known_rule(fields: Mapping[str, str]) -> Any:
  """The rule of the known layout whose columns a mapping names, or None."""
  named = tuple(fields.get(t) for t in ("first", "second", "choice"))
  if named in _ALIKE:
    return _ALIKE[named]
  return next(
    (
      x.rule
      for x in LAYOUTS
      if x.rule
      and named == tuple(x.fields.get(t) for t in ("first", "second", "choice"))
    ),
    None,
  )


def known_strength(fields: Mapping[str, str]) -> dict[str, str]:
  """What a known layout reads beside the columns that a mapping names."""
  named = tuple(fields.get(t) for t in ("first", "second", "choice"))
  found = next(
    (
      x.fields
      for x in LAYOUTS
      if named == tuple(x.fields.get(t) for t in ("first", "second", "choice"))
    ),
    {},
  )
  return {
    t: path
    for t, path in found.items()
    if t in ("strength", "first_id", "second_id", "first_score", "second_score")
    and t not in fields
  }


_ROLES = dict(
  prompt="the prompt",
  messages="the prompt",
  system="the system turn",
  tools="the tools",
  first="one answer",
  second="the other answer",
  choice="which is better",
  strength="the margin",
  chosen="the chosen answer",
  rejected="the rejected answer",
  first_score="the margin",
  second_score="the margin",
  first_id="the first answer's name",
  second_id="the second answer's name",
  completion="the answer",
  label="its label",
  answers="the answers",
  scores="their scores",
  id="the row's id",
  source="the row's source",
)


def roles_of(fields: Mapping[str, str]) -> dict[str, str]:
  """Column -> what it becomes, of a mapping of targets to paths."""
  roles: dict[str, str] = {}
  for target, path in fields.items():
    column, role = path.split(".")[0], _ROLES.get(target, target)
    role += f" ({path})" if "." in path else ""
    have = roles.get(column, "")
    roles[column] = (
      have if role in have else ", ".join(filter(None, [have, role]))
    )
  return roles


def _schema(layout: Layout) -> Schema:
  needed = [
    path
    for target, path in layout.fields.items()
    if target not in layout.optional
  ]
  code = next(
    (
      layout.fields[t]
      for t in ("choice", "label", "first_score")
      if t in layout.fields
    ),
    "choice",
  )

  def convert(row, *pairs):
    fields = dict(layout.fields)
    fields |= {n: n for n in ("id", "source", "group") if n in row}
    return layout.convert(remap(row, fields), *pairs)

  return Schema(
    layout.name,
    lambda row: all(has_path(row, path) for path in needed),
    convert,
    layout.kind,
    layout.many,
    wants=tuple(dict.fromkeys(path.split(".")[0] for path in needed)),
    roles=roles_of(layout.fields)
    | dict(id="the row's id", source="the row's source"),
    rule=layout.rule,
    code=code,
  )


def _convert_swift(row: dict) -> dict[str, Any] | Undecided:
  """messages that end in the chosen answer, and the rejected one beside."""
  chosen = messages_of(row.get("messages"), "messages")
  if not chosen or chosen[-1]["role"] != "assistant":
    raise Refused("no Assistant turn", "messages end without one")
  if "rejected_response" not in row:
    raise Refused("missing field", "rejected_response")
  rejected = opened(row["rejected_response"], "rejected_response")
  known = {
    k: v
    for k, v in row.items()
    if k in ("id", "source", "system", "tools", "margin")
  }
  return convert_pair(
    known | dict(prompt=chosen[:-1], chosen=chosen[-1:], rejected=rejected)
  )


SWIFT = Schema(
  "ms_swift",
  lambda row: (
    isinstance(row.get("rejected_response"), (str, list))
    and bool(row.get("messages"))
  ),
  _convert_swift,
  "pairs",
  wants=("messages", "rejected_response"),
  roles=dict(
    messages="the prompt and the chosen answer",
    rejected_response="the rejected answer",
    system="the system turn",
    tools="the tools",
    id="the row's id",
    source="the row's source",
  ),
)


def _convert_lmsys(row: dict) -> Undecided:
  """Lists of questions and answers as JSON; one question a row."""
  for name in LMSYS.wants:
    if name not in row:
      raise Refused("missing field", name)
  lists = {}
  for name in ("prompt", "response_a", "response_b"):
    lists[name] = _list_of(row[name], name)
    if len(lists[name]) != 1:
      raise Refused(
        "several turns",
        f"{len(lists[name])} in {name}: the two "
        "dialogues differ before their last answer",
      )
  won = [
    name
    for name in ("winner_model_a", "winner_model_b", "winner_tie")
    if row[name] in (1, "1", True)
  ]
  if len(won) != 1:
    raise Refused("bad choice", f"{len(won)} winners, wanted one")
  return convert_choice(
    dict(
      prompt=lists["prompt"][0],
      first=lists["response_a"][0],
      second=lists["response_b"][0],
      choice=dict(
        winner_model_a="first", winner_model_b="second", winner_tie="tie"
      )[won[0]],
    )
    | {k: row[k] for k in ("id",) if k in row}
  )


def _list_of(value: Any, name: str) -> list:
  try:
    value = json.loads(value) if isinstance(value, str) else value
  except (ValueError, RecursionError):
    value = None
  if not isinstance(value, list):
    raise Refused("not a list", f"{name} is no list of texts")
  return value


_ONE_HOT = ("winner_model_a", "winner_model_b", "winner_tie")
LMSYS = Schema(
  "lmsys_arena",
  lambda row: {"prompt", "response_a", "response_b", *_ONE_HOT} <= row.keys(),
  _convert_lmsys,
  "pairs",
  wants=("prompt", "response_a", "response_b", *_ONE_HOT),
  roles=dict(
    prompt="the prompt",
    response_a="one answer",
    response_b="the other answer",
    id="the row's id",
  )
  | dict.fromkeys(_ONE_HOT, "which is better"),
)

SCHEMAS = (*map(_schema, LAYOUTS), SWIFT, LMSYS)
