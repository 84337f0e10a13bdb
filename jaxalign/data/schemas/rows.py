"""Rows under the names that are read, converted: texts, messages, choices.

A prompt may be a text, a list of messages (`prompt`, `messages`,
`conversations`, `trajectory`) or nothing, where the sides are whole dialogues;
a side may be a text, a message or a list of some. Each becomes one of two
forms: all texts, kept as they are, or all messages.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.data.schemas.choices import LABELS, SIDES, Undecided
from jaxalign.data.schemas.messages import (
  dialogue,
  is_messages,
  is_plain,
  Message,
  messages_of,
  opened,
  text_of_message,
  tools_of,
)
from jaxalign.data.schemas.pairs import (
  ASSISTANT,
  group_of,
  make_pair,
  make_unpaired,
  margin_of,
  number_of,
  Refused,
  Schema,
  split_dialogue,
  text_of,
  turns_of,
)

BEFORE = (
  "prompt",
  "messages",
  "conversations",
  "conversation",
  "trajectory",
  "context",
)
SYSTEM = ("system", "system_prompt", "system_message")
_PROMPT = dict.fromkeys(BEFORE, "the prompt")
_SHARED = (
  _PROMPT
  | dict.fromkeys(SYSTEM, "the system turn")
  | dict(
    id="the row's id",
    source="the row's source",
    tools="the tools",
    turns="the prompt's turns",
    group="the group",
  )
)
_SCORES = dict.fromkeys(
  (
    "chosen_score",
    "rejected_score",
    "score_chosen",
    "score_rejected",
    "margin",
  ),
  "the margin",
) | dict(metadata="the margin (score_chosen, score_rejected)")
# What our own subsets hold beside the rows; read by TRL, or by a person.
OURS = dict.fromkeys(
  ("ref_chosen_logps", "ref_rejected_logps"),
  "the reference's log-probabilities, for TRL",
) | dict.fromkeys(("score", "rank"), "of the selection")


class Sides(NamedTuple):
  """A prompt and the answers to it."""

  prompt: str  # text, up to where the answer begins
  answers: list[str]  # texts
  group: str
  known: dict[str, Any]  # turns, tools, answers as messages: those there are


def sides_of(row: Mapping[str, Any], names: Sequence[str]) -> Sides:
  """The prompt of a row and the answers in its columns `names`.

  Raises:
    Refused: the row cannot be trained on.
  """
  values = []
  for name in names:
    if name not in row:
      raise Refused("missing field", name)
    values.append(opened(row[name], name))
    if row[name] is None:
      raise Refused("null", name)
  messages = [is_messages(value) for value in values]
  prompt = _opened_prompt(row, not any(messages))
  system = next((text_of(row, name) for name in SYSTEM if row.get(name)), None)
  tools = tools_of(row.get("tools"))
  turns = opened(row.get("turns"), "turns")
  turns = turns if is_messages(turns) else None  # it may be their number
  if (
    not any(messages)
    and not isinstance(prompt, list)
    and not (tools or turns or any(name in row for name in SYSTEM))
  ):
    return _texts(row, prompt, names)
  if not any(messages) and isinstance(prompt, str) and turns_of(prompt):
    prompt = turns_of(prompt)  # a dialogue's text beside a system column
    values = [
      text.removeprefix(" ") if isinstance(text, str) else text
      for text in values
    ]
  if turns:
    prompt = messages_of(turns, "turns")
    values = [
      text.removeprefix(" ") if isinstance(text, str) else text
      for text in values
    ]
  whole = [
    _whole(prompt, value, name, row) for value, name in zip(values, names)
  ]
  if system is not None:
    whole = [_with_system(system, turns) for turns in whole]
  if any(turns[:-1] != whole[0][:-1] for turns in whole):
    raise Refused("prompts differ", "the turns before the last are not equal")
  return _rendered(whole, tools)


def _opened_prompt(row: Mapping[str, Any], texts: bool) -> Any:
  """The prompt's messages, or its text, or None where there is neither.

  Args:
    row: as it was read.
    texts: whether the sides are texts; messages beside them then stand before
      them, and a prompt that is a text repeats one of their turns.
  """
  prompt = opened(row.get("prompt"), "prompt")
  if isinstance(prompt, dict) and is_messages(prompt):
    prompt = messages_of(prompt, "prompt")
  prompt = None if prompt == [] else prompt
  if prompt is not None and not isinstance(prompt, (str, list)):
    raise Refused("not a string", f"prompt is a {type(prompt).__name__}")
  if is_messages(prompt):
    return prompt
  beside = next(
    (
      (name, value)
      for name in BEFORE[1:]
      if is_messages(value := opened(row.get(name), name))
    ),
    None,
  )
  if beside is None or prompt is not None and not texts:
    return prompt
  messages = messages_of(beside[1], beside[0])
  said = [str(m["content"]).strip() for m in messages]
  for one in [prompt] if isinstance(prompt, str) else prompt or ():
    if isinstance(one, str) and one.strip() not in said:
      raise Refused("prompts differ", f"the prompt is no turn of {beside[0]}")
  return _Beside(messages)


class _Beside(list):
  """Messages that may repeat a side (UltraFeedback) or stand before it."""


def _texts(row: Mapping, prompt: Any, names: Sequence[str]) -> Sides:
  """Texts, exactly as they are; whole dialogues where there is no prompt."""
  if prompt is not None or not any(
    isinstance(row[name], str) and ASSISTANT in row[name] for name in names
  ):
    text = text_of(row, "prompt", "empty prompt")
    return Sides(
      text, [text_of(row, name) for name in names], group_of(text), {}
    )
  found = [split_dialogue(text_of(row, name), name) for name in names]
  text = found[0][0]
  for other, _ in found[1:]:
    if text != other:
      at = next(
        (i for i, (a, b) in enumerate(zip(text, other)) if a != b),
        min(len(text), len(other)),
      )
      raise Refused(
        "prompts differ",
        f"from character {at}: "
        f"{text[at : at + 30]!r} and {other[at : at + 30]!r}",
      )
  if not text[: -len(ASSISTANT)].strip():
    raise Refused("empty prompt", "nothing before the Assistant turn")
  return Sides(text, [answer for _, answer in found], group_of(text), {})


def _whole(prompt: Any, value: Any, name: str, row: Mapping) -> list[Message]:
  """The dialogue that ends in one answer."""
  if (
    isinstance(prompt, list)
    and prompt
    and all(isinstance(one, str) for one in prompt)
  ):
    return _with_questions(prompt, value, name)
  if isinstance(prompt, list):
    before = list(messages_of(list(prompt), "prompt"))
  elif prompt is None:
    before = []
  else:
    before = None  # a text
  if isinstance(value, str):  # an answer alone
    answer = [dict(role="assistant", content=value)]
    if before is None:
      return [dict(role="user", content=prompt), *answer]
    if not before:
      raise Refused("missing field", "prompt")
    if before[-1]["role"] == "assistant":
      if isinstance(prompt, _Beside) and any(
        before[-1]["content"] == other
        for key in ("chosen", "rejected")
        if isinstance(other := row.get(key), str)
      ):
        before = before[:-1]  # the list repeats one of the sides
      else:
        raise Refused("prompt ends in an assistant turn", f"before {name}")
    return before + answer
  turns = messages_of(value, name)
  if not turns:
    raise Refused("empty response", f"{name} has no message")
  if before is None:
    if len(turns) == 1:  # the prompt is a text of its own
      return [dict(role="user", content=prompt), *turns]
    if prompt.strip() not in [str(m["content"]).strip() for m in turns[:-1]]:
      raise Refused("prompts differ", f"the prompt is no turn of {name}")
    return turns
  if before and turns[: len(before)] == before and len(turns) > len(before):
    return turns  # the side is the whole dialogue already
  if isinstance(prompt, _Beside) and len(turns) > 1:
    return turns  # and `messages` is the other one
  if (
    isinstance(prompt, _Beside)
    and before[-1:]
    and before[-1]["role"] == "assistant"
    and turns[-1]["role"] == "assistant"
  ):
    before = before[:-1]
  return before + turns


def _with_questions(
  questions: list[str], value: Any, name: str
) -> list[Message]:
  """A list of the user's questions beside the dialogue that answers them."""
  turns = (
    [dict(role="assistant", content=value)]
    if isinstance(value, str)
    else messages_of(value, name)
  )
  users = [m["content"].strip() for m in turns if m["role"] == "user"]
  if len(turns) == 1 and len(questions) == 1:
    return [dict(role="user", content=questions[0]), *turns]
  if [q.strip() for q in questions] != users:
    raise Refused(
      "several prompts",
      f"{len(questions)} in a list, {len(users)} of the user's turns in {name}",
    )
  return turns


def _with_system(system: str, turns: list[Message]) -> list[Message]:
  if turns[0]["role"] != "system":
    return [dict(role="system", content=system), *turns]
  if turns[0]["content"].strip() != system.strip():
    raise Refused("two system turns", "a column and a message, not alike")
  return turns


def _rendered(whole: list[list[Message]], tools: list[dict] | None) -> Sides:
  """The text of dialogues that share all but the last turn, and that turn."""
  for turns in whole:
    if not turns or turns[-1]["role"] != "assistant":
      raise Refused(
        "no Assistant turn",
        f"the last message is {turns[-1]['role'] if turns else 'missing'}",
      )
    if not text_of_message(turns[-1]).strip():
      raise Refused(
        "empty response", f"content is {turns[-1]['content']!r:.20}"
      )
  before = [m for m in whole[0][:-1] if m["content"] or m["role"] != "system"]
  text = dialogue(before)
  users = [m["content"] for m in before if m["role"] == "user"]
  if not users:
    raise Refused("empty prompt", "no user turn")
  answers = [turns[-1] for turns in whole]
  known = dict(turns=before) | (dict(tools=tools) if tools else {})
  if not all(map(is_plain, answers)):
    known["answers"] = answers
  return Sides(
    text, [f" {text_of_message(m)}" for m in answers], users[0].strip(), known
  )


def _made(
  sides: Sides,
  row: Mapping,
  order: tuple[int, int] = (0, 1),
  margin: float | None = None,
) -> dict[str, Any]:
  known = dict(sides.known)
  if "answers" in known:
    known["answers"] = [known["answers"][i] for i in order]
  group = row.get("group") if isinstance(row.get("group"), str) else ""
  return make_pair(
    sides.prompt,
    *(sides.answers[i] for i in order),
    group=group or sides.group,
    margin=margin,
    **known,
  )


def convert_pair(row: dict) -> dict[str, Any] | Undecided:
  """A prompt, chosen and rejected; texts or messages."""
  margin = margin_of(row)
  sides = sides_of(row, ("chosen", "rejected"))
  return _made(sides, row, margin=margin)


def flipped(row: dict[str, Any]) -> dict[str, Any]:
  """A converted pair with its sides changed round."""
  out = dict(row, chosen=row["rejected"], rejected=row["chosen"])
  if "answers" in row:
    out["answers"] = row["answers"][::-1]
  if row.get("margin") is not None:
    out["margin"] = -row["margin"]
  return out


def convert_choice(row: dict) -> Undecided:
  """prompt, first and second, and which of them is better.

  `choice` is a code; or `first_score` and `second_score` say it. `strength` is
  how much better, whatever its sign.
  """
  sides = sides_of(row, ("first", "second"))
  scores = number_of(row, "first_score"), number_of(row, "second_score")
  strength = number_of(row, "strength")
  if "choice" not in row and None in scores:
    raise Refused("missing field", "choice")
  code = row.get("choice")
  if code is None and None in scores:
    raise Refused("null", "choice")

  def make(side):
    if side == "tie":
      raise Refused("tie", "neither side was chosen")
    order = (0, 1) if side == "first" else (1, 0)
    margin = None if strength is None else abs(strength)
    if None not in scores:
      margin = scores[order[0]] - scores[order[1]]
    return _made(sides, row, order, margin)

  return Undecided(
    code, make, SIDES, (row.get("first_id"), row.get("second_id")), scores
  )


def convert_unpaired(row: dict) -> Undecided:
  """A prompt and one answer, or a dialogue that ends in it, and a label."""
  if "label" not in row:
    raise Refused("missing field", "label")
  if row["label"] is None:
    raise Refused("null", "label")
  if not isinstance(row["label"], (str, bool, int, float)):
    raise Refused("bad label", f"{row['label']!r:.40}")
  name = "completion" if "completion" in row else "messages"
  if name not in row:
    raise Refused("missing field", "completion")
  if name == "completion":
    if "prompt" not in row and isinstance(opened(row[name], name), str):
      raise Refused("missing field", "prompt")
    sides = sides_of(row, (name,))
  else:
    sides = sides_of(
      {k: v for k, v in row.items() if k not in BEFORE}
      | dict(completion=row[name]),
      ("completion",),
    )
  return Undecided(
    row["label"],
    lambda label: make_unpaired(
      sides.prompt,
      sides.answers[0],
      label == "liked",
      sides.group,
      **sides.known,
    ),
    LABELS,
  )


def is_read(column: str, value: Any) -> bool:
  """Whether a column of a known name holds what is read of it."""
  if column in (*BEFORE[1:], "turns"):
    return is_messages(opened_or_none(value))
  if column == "metadata":
    return isinstance(value, Mapping) and bool(
      {"score_chosen", "chosen_score"} & value.keys()
    )
  if column in ("source", "group", *SYSTEM):
    return isinstance(value, str)
  return True


def _texts_in(row: Mapping, *fields: str) -> bool:
  return all(isinstance(row.get(field), str) for field in fields)


def _said(row: Mapping, *names: str) -> bool:
  """Whether all of these columns hold an answer, in whatever dress."""
  return all(
    isinstance(row.get(name), str) or is_messages(row.get(name))
    for name in names
  )


def _chat(row: Mapping, *names: str) -> bool:
  """Whether a row is one of messages: its sides, or what stands before."""
  return _said(row, *names) and (
    any(not isinstance(opened_or_none(row.get(name)), str) for name in names)
    or _has_messages(row)
    or isinstance(row.get("prompt"), str)
    and any(row.get(name) for name in SYSTEM)
  )


def opened_or_none(value: Any) -> Any:
  """`messages.opened`, None where the text cannot be read."""
  try:
    return opened(value, "")
  except Refused:
    return None


def _has_messages(row: Mapping) -> bool:
  return any(is_messages(opened_or_none(row.get(name))) for name in BEFORE)


_PAIR = (
  _SHARED
  | _SCORES
  | OURS
  | dict(chosen="the chosen answer", rejected="the rejected answer")
)
_UNPAIRED = _SHARED | OURS | dict(completion="the answer", label="its label")
_CHOICE = _SHARED | dict(
  first="one answer",
  second="the other answer",
  choice="which is better",
  first_id="the first answer's name",
  second_id="the second answer's name",
  first_score="the margin",
  second_score="the margin",
  strength="the margin",
)

EXPLICIT = Schema(
  "explicit_pairs",
  lambda row: (
    _texts_in(row, "prompt", "chosen", "rejected")
    and not _chat(row, "chosen", "rejected")
  ),
  convert_pair,
  "pairs",
  wants=("prompt", "chosen", "rejected"),
  roles=_PAIR,
)
IMPLICIT = Schema(
  "implicit_pairs",
  lambda row: (
    _texts_in(row, "chosen", "rejected")
    and row.get("prompt") is None
    and not _has_messages(row)
    and ASSISTANT in row["chosen"] + row["rejected"]
  ),
  convert_pair,
  "pairs",
  wants=("chosen", "rejected"),
  roles=_PAIR,
)
CHAT_PAIRS = Schema(
  "chat_pairs",
  lambda row: _chat(row, "chosen", "rejected"),
  convert_pair,
  "pairs",
  wants=("chosen", "rejected"),
  roles=_PAIR,
)
UNPAIRED = Schema(
  "unpaired",
  lambda row: (
    _texts_in(row, "prompt", "completion")
    and "label" in row
    and not _chat(row, "completion")
  ),
  convert_unpaired,
  "unpaired",
  wants=("prompt", "completion", "label"),
  roles=_UNPAIRED,
  code="label",
)
CHAT_UNPAIRED = Schema(
  "chat_unpaired",
  lambda row: (
    "label" in row
    and (
      "completion" in row
      and _chat(row, "completion")
      or "completion" not in row
      and is_messages(opened_or_none(row.get("messages")))
    )
  ),
  convert_unpaired,
  "unpaired",
  wants=("messages", "label"),
  roles=_UNPAIRED | dict(messages="the prompt and the answer"),
  code="label",
)
CHOICES = Schema(
  "choices",
  lambda row: (
    _said(row, "first", "second")
    and (
      isinstance(row.get("prompt"), str)
      or _has_messages(row)
      or is_messages(opened_or_none(row.get("first")))
      or isinstance(row.get("prompt"), list)
    )
    and ("choice" in row or {"first_score", "second_score"} <= row.keys())
  ),
  convert_choice,
  "pairs",
  wants=("prompt", "first", "second", "choice"),
  roles=_CHOICE,
)
