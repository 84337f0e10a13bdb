"""Public layouts whose columns, and what their codes mean, are known.

Each is a mapping onto the names that `convert` reads; what a code means comes
from the data set's own description, and holds too where `data.fields` names
the same columns.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.data.schemas.choices import BY_SCORE, SIDES, Undecided
from jaxalign.data.schemas.convert import (
  convert_choice,
  convert_pair,
  convert_unpaired,
)
from jaxalign.data.schemas.mapping import has_path, remap, roles_of
from jaxalign.data.schemas.messages import from_json
from jaxalign.data.schemas.ranked import convert_scored
from jaxalign.data.schemas.schema import list_of, Refused, Schema

_SIGNED = {"first": [-3, -2, -1], "second": [1, 2, 3], "tie": [0]}
_FROM_0 = {"first": [0], "second": [1]}
_FIRST_IS_1 = {"first": [1], "second": [0]}
_FROM_1_OR_TIE = {"first": [1], "second": [2], "tie": [0]}
_STRENGTH = ("strength", "first_id", "second_id", "first_score", "second_score")


def _layout(
  name: str,
  columns: str,
  convert: Callable[..., Any] = convert_choice,
  rule: Any = None,
  optional: str = "",
) -> Schema:
  """The schema of "target=path" columns; a row may lack `optional` targets."""
  fields = dict(item.split("=") for item in columns.split())
  needed = [path for t, path in fields.items() if t not in optional.split()]
  codes = [fields[t] for t in ("choice", "label", "first_score") if t in fields]

  def convert_row(row, *pairs):
    kept = {n: n for n in ("id", "source", "group") if n in row}
    return convert(remap(row, fields | kept), *pairs)

  return Schema(
    name,
    convert_row,
    tuple(dict.fromkeys(path.split(".")[0] for path in needed)),
    lambda row: all(has_path(row, path) for path in needed),
    many=convert is convert_scored,
    roles=roles_of(fields | dict(id="id", source="source")),
    rule=rule,
    code=[*codes, "choice"][0],
    fields=fields,
  )


def _convert_lists(row: dict) -> Undecided:
  """Lists of questions and answers as JSON, of one question; a flag a side."""
  texts, lists = {}, {name: from_json(value) for name, value in row.items()}
  for name in ("prompt", "first", "second"):
    value = list_of(lists, name)
    if len(value) != 1:
      raise Refused(
        "several turns",
        f"{len(value)} in {name}: the two dialogues differ before their last "
        "answer",
      )
    texts[name] = value[0]
  wins = [s for s in SIDES if row.get(f"choice_{s}") in (1, "1", True)]
  if len(wins) != 1:
    raise Refused("bad choice", f"{len(wins)} winners, wanted one")
  return convert_choice(row | texts | dict(choice=wins[0]))


SCHEMAS = (
  _layout(
    "pku_saferlhf",
    "prompt=prompt first=response_0 second=response_1 "
    "choice=better_response_id",
    rule=_FROM_0,
  ),
  _layout(
    "shp",
    "prompt=history first=human_ref_A second=human_ref_B choice=labels "
    "first_score=score_A second_score=score_B",
    rule=_FIRST_IS_1,
    optional="first_score second_score",
  ),
  _layout(
    "helpsteer2",
    "prompt=prompt first=response_1 second=response_2 "
    "choice=preference_strength strength=preference_strength",
    rule=_SIGNED,
  ),
  _layout(
    "helpsteer3",
    "messages=context first=response1 second=response2 "
    "choice=overall_preference strength=overall_preference",
    rule=_SIGNED,
  ),
  _layout(
    "chatbot_arena",
    "first=conversation_a second=conversation_b choice=winner "
    "first_id=model_a second_id=model_b",
    optional="first_id second_id",
  ),
  _layout(
    "summarize_from_feedback",
    "prompt=info.post first=summaries.0.text second=summaries.1.text "
    "choice=choice",
    rule=_FROM_0,
  ),
  _layout(
    "webgpt",
    "prompt=question.full_text first=answer_0 second=answer_1 "
    "first_score=score_0 second_score=score_1",
    rule=BY_SCORE,
  ),
  _layout(
    "halos_pairs",
    "prompt=prompt first=output_A second=output_B choice=label "
    "strength=reward_difference",
    rule=_FIRST_IS_1,
    optional="strength",
  ),
  _layout(
    "halos_binary",
    "prompt=prompt completion=output label=label",
    convert_unpaired,
  ),
  _layout(
    "openai_preference",
    "messages=input.messages tools=input.tools chosen=preferred_output "
    "rejected=non_preferred_output",
    convert_pair,
    optional="tools",
  ),
  _layout(
    "orca_dpo",
    "system=system prompt=question chosen=chosen rejected=rejected",
    convert_pair,
  ),
  _layout(
    "argilla_orca",
    "system=system prompt=input chosen=chosen rejected=rejected",
    convert_pair,
  ),
  _layout("spin", "chosen=real rejected=generated", convert_pair),
  _layout(
    "ultrafeedback",
    "prompt=instruction answers=completions.*.response "
    "scores=completions.*.overall_score",
    convert_scored,
  ),
  _layout(
    "ms_swift",
    "messages=messages chosen=messages rejected=rejected_response "
    "system=system tools=tools margin=margin",
    convert_pair,
    optional="system tools margin",
  ),
  _layout(
    "lmsys_arena",
    "prompt=prompt first=response_a second=response_b "
    "choice_first=winner_model_a choice_second=winner_model_b "
    "choice_tie=winner_tie",
    _convert_lists,
  ),
)
# Other columns of the same sets that hold codes of the same meaning.
_ALIKE = {("response_0", "response_1", "safer_response_id"): _FROM_0} | {
  ("response1", "response2", f"annotator{i}"): _FROM_1_OR_TIE for i in (1, 2, 3)
}  # PandaLM


def _deciding(fields: Mapping[str, str]) -> tuple[str | None, ...]:
  """The columns that decide which answer is better."""
  return tuple(fields.get(target) for target in ("first", "second", "choice"))


def known_layout(fields: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
  """What a layout of the answers and the code that a mapping names adds to it.

  Returns:
    The rule of their codes, None where it is not known; target -> path of what
    the layout reads of other columns.
  """
  named = _deciding(fields)
  layout = next((x for x in SCHEMAS if _deciding(x.fields) == named), None)
  more = layout.fields if layout else {}
  strength = {t: more[t] for t in _STRENGTH if t in more and t not in fields}
  return _ALIKE.get(named, layout and layout.rule), strength
