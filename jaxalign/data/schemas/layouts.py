"""Public layouts whose columns, and what their codes mean, are known.

Each is a mapping onto the names that `convert` reads; what a code means comes
from the data set's own description, and holds too where `data.fields` names
the same columns.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxalign.data.schemas.choices import BY_SCORE, Undecided
from jaxalign.data.schemas.convert import (
  convert_choice,
  convert_pair,
  convert_unpaired,
)
from jaxalign.data.schemas.mapping import has_path, remap, ROLES, roles_of
from jaxalign.data.schemas.messages import from_json, messages_of, opened
from jaxalign.data.schemas.ranked import convert_scored
from jaxalign.data.schemas.schema import Refused, Schema

_SIGNED = {"first": [-3, -2, -1], "second": [1, 2, 3], "tie": [0]}
_FROM_0 = {"first": [0], "second": [1]}
_FIRST_IS_1 = {"first": [1], "second": [0]}
_FROM_1_OR_TIE = {"first": [1], "second": [2], "tie": [0]}
_DECIDED_BY = ("first", "second", "choice")
_STRENGTH = ("strength", "first_id", "second_id", "first_score", "second_score")


class PublicLayout(NamedTuple):
  """One public layout."""

  columns: str  # "target=path" pairs; a path where a row of the set has it
  convert: Callable[..., Any] = convert_choice
  rule: Any = None  # what its codes mean
  optional: tuple[str, ...] = ()  # targets that a row may lack

  @property
  def fields(self) -> dict[str, str]:
    """Target -> path."""
    return dict(item.split("=") for item in self.columns.split())


_SCORES = ("first_score", "second_score")
LAYOUTS = {
  "pku_saferlhf": PublicLayout(
    "prompt=prompt first=response_0 second=response_1 "
    "choice=better_response_id",
    rule=_FROM_0,
  ),
  "shp": PublicLayout(
    "prompt=history first=human_ref_A second=human_ref_B choice=labels "
    "first_score=score_A second_score=score_B",
    rule=_FIRST_IS_1,
    optional=_SCORES,
  ),
  "helpsteer2": PublicLayout(
    "prompt=prompt first=response_1 second=response_2 "
    "choice=preference_strength strength=preference_strength",
    rule=_SIGNED,
  ),
  "helpsteer3": PublicLayout(
    "messages=context first=response1 second=response2 "
    "choice=overall_preference strength=overall_preference",
    rule=_SIGNED,
  ),
  "chatbot_arena": PublicLayout(
    "first=conversation_a second=conversation_b choice=winner "
    "first_id=model_a second_id=model_b",
    optional=("first_id", "second_id"),
  ),
  "summarize_from_feedback": PublicLayout(
    "prompt=info.post first=summaries.0.text second=summaries.1.text "
    "choice=choice",
    rule=_FROM_0,
  ),
  "webgpt": PublicLayout(
    "prompt=question.full_text first=answer_0 second=answer_1 "
    "first_score=score_0 second_score=score_1",
    rule=BY_SCORE,
  ),
  "halos_pairs": PublicLayout(
    "prompt=prompt first=output_A second=output_B choice=label "
    "strength=reward_difference",
    rule=_FIRST_IS_1,
    optional=("strength",),
  ),
  "halos_binary": PublicLayout(
    "prompt=prompt completion=output label=label", convert_unpaired
  ),
  "openai_preference": PublicLayout(
    "messages=input.messages tools=input.tools chosen=preferred_output "
    "rejected=non_preferred_output",
    convert_pair,
    optional=("tools",),
  ),
  "orca_dpo": PublicLayout(
    "system=system prompt=question chosen=chosen rejected=rejected",
    convert_pair,
  ),
  "argilla_orca": PublicLayout(
    "system=system prompt=input chosen=chosen rejected=rejected", convert_pair
  ),
  "spin": PublicLayout("chosen=real rejected=generated", convert_pair),
  "ultrafeedback": PublicLayout(
    "prompt=instruction answers=completions.*.response "
    "scores=completions.*.overall_score",
    convert_scored,
  ),
}
# Other columns of the same sets that hold codes of the same meaning.
_ALIKE = {("response_0", "response_1", "safer_response_id"): _FROM_0} | {
  ("response1", "response2", f"annotator{i}"): _FROM_1_OR_TIE for i in (1, 2, 3)
}  # PandaLM


def _deciding(fields: Mapping[str, str]) -> tuple[str | None, ...]:
  return tuple(fields.get(target) for target in _DECIDED_BY)


def _known(fields: Mapping[str, str]) -> PublicLayout | None:
  """The layout whose answers and code a mapping names."""
  named = _deciding(fields)
  return next(
    (x for x in LAYOUTS.values() if named == _deciding(x.fields)), None
  )


def known_rule(fields: Mapping[str, str]) -> Any:
  """The rule of the known layout whose columns a mapping names, or None."""
  layout = _known(fields)
  return _ALIKE.get(_deciding(fields), layout and layout.rule)


def known_strength(fields: Mapping[str, str]) -> dict[str, str]:
  """What a known layout reads beside the columns that a mapping names."""
  layout = _known(fields)
  more = layout.fields if layout else {}
  return {t: more[t] for t in _STRENGTH if t in more and t not in fields}


def _schema(name: str, layout: PublicLayout) -> Schema:
  fields = layout.fields
  needed = [path for t, path in fields.items() if t not in layout.optional]
  codes = [fields[t] for t in ("choice", "label", "first_score") if t in fields]

  def convert(row, *pairs):
    kept = {n: n for n in ("id", "source", "group") if n in row}
    return layout.convert(remap(row, fields | kept), *pairs)

  return Schema(
    name,
    convert,
    tuple(dict.fromkeys(path.split(".")[0] for path in needed)),
    lambda row: all(has_path(row, path) for path in needed),
    many=layout.convert is convert_scored,
    roles=roles_of(fields | dict(id="id", source="source")),
    rule=layout.rule,
    code=[*codes, "choice"][0],
  )


def _convert_swift(row: dict) -> dict[str, Any]:
  """messages that end in the chosen answer, and the rejected one beside."""
  chosen = messages_of(row.get("messages"), "messages")
  if not chosen or chosen[-1]["role"] != "assistant":
    raise Refused("no Assistant turn", "messages end without one")
  if "rejected_response" not in row:
    raise Refused("missing field", "rejected_response")
  rejected = opened(row["rejected_response"], "rejected_response")
  names = ("id", "source", "system", "tools", "margin")
  sides = dict(prompt=chosen[:-1], chosen=chosen[-1:], rejected=rejected)
  return convert_pair({n: row[n] for n in names if n in row} | sides)


def _is_swift(row: dict) -> bool:
  rejected = row.get("rejected_response")
  return isinstance(rejected, (str, list)) and bool(row.get("messages"))


SWIFT = Schema(
  "ms_swift",
  _convert_swift,
  ("messages", "rejected_response"),
  _is_swift,
  roles=dict(
    messages="the prompt and the chosen answer",
    rejected_response="the rejected answer",
  )
  | {name: ROLES[name] for name in ("system", "tools", "id", "source")},
)


def _convert_lmsys(row: dict) -> Undecided:
  """Lists of questions and answers as JSON; one question a row."""
  for name in LMSYS.wants:
    if name not in row:
      raise Refused("missing field", name)
  texts = []
  for name in ("prompt", "response_a", "response_b"):
    value = from_json(row[name])
    if not isinstance(value, list):
      raise Refused("not a list", f"{name} is no list of texts")
    if len(value) != 1:
      raise Refused(
        "several turns",
        f"{len(value)} in {name}: the two dialogues differ before their last "
        "answer",
      )
    texts += value
  wins = [
    side for name, side in _ONE_HOT.items() if row[name] in (1, "1", True)
  ]
  if len(wins) != 1:
    raise Refused("bad choice", f"{len(wins)} winners, wanted one")
  fields = dict(zip(("prompt", "first", "second"), texts), choice=wins[0])
  return convert_choice(fields | {k: row[k] for k in ("id",) if k in row})


_ONE_HOT = dict(winner_model_a="first", winner_model_b="second")
_ONE_HOT |= dict(winner_tie="tie")
LMSYS = Schema(
  "lmsys_arena",
  _convert_lmsys,
  ("prompt", "response_a", "response_b", *_ONE_HOT),
  roles=dict(
    prompt="the prompt",
    response_a="one answer",
    response_b="the other answer",
    id="the row's id",
  )
  | dict.fromkeys(_ONE_HOT, "which is better"),
)

SCHEMAS = (*(_schema(*item) for item in LAYOUTS.items()), SWIFT, LMSYS)
