"""Rows under the names that are read, converted: texts, messages, choices.

A prompt may be a text, a list of messages (`prompt`, `messages`,
`conversations`, `trajectory`) or nothing, where the sides are whole dialogues;
a side may be a text, a message or a list of some. Each becomes one of two
forms: all texts, kept as they are, or all messages.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.data.schemas.choices import LABELS, SIDES, Undecided
from jaxalign.data.schemas.mapping import ROLES
from jaxalign.data.schemas.messages import (
  dialogue,
  is_messages,
  is_plain,
  Message,
  messages_of,
  opened,
  opened_or_none,
  text_of_message,
  tools_of,
)
from jaxalign.data.schemas.schema import (
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

BEFORE = "prompt messages conversations conversation trajectory context".split()
SYSTEM = ("system", "system_prompt", "system_message")


class Answers(NamedTuple):
  """A prompt and the answers to it."""

  prompt: str  # text, up to where the answer begins
  texts: list[str]
  group: str
  known: dict[str, Any]  # turns, tools, answers as messages: those there are


def answers_in(row: Mapping[str, Any], names: Sequence[str]) -> Answers:
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
  texts = not any(map(is_messages, values))
  prompt = _opened_prompt(row, texts)
  system = next((text_of(row, name) for name in SYSTEM if row.get(name)), None)
  tools = tools_of(row.get("tools"))
  turns = opened(row.get("turns"), "turns")
  turns = messages_of(turns, "turns") if is_messages(turns) else None
  has_more = tools or turns or any(name in row for name in SYSTEM)
  if texts and not isinstance(prompt, list) and not has_more:
    return _as_texts(row, prompt, names)
  if texts and isinstance(prompt, str):  # a dialogue's text beside a system
    turns = turns or turns_of(prompt)
  if turns:
    prompt = turns
    values = [v.removeprefix(" ") if isinstance(v, str) else v for v in values]
  whole = [_whole(prompt, v, name, row) for v, name in zip(values, names)]
  if system is not None:
    whole = [_with_system(system, turns) for turns in whole]
  if any(turns[:-1] != whole[0][:-1] for turns in whole):
    raise Refused("prompts differ", "the turns before the last are not equal")
  return _as_messages(whole, tools)


class _Beside(list):
  """Messages that may repeat a side (UltraFeedback) or stand before it."""


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
  if is_messages(prompt) or prompt is not None and not texts:
    return prompt
  for name in BEFORE[1:]:
    if is_messages(value := opened(row.get(name), name)):
      break
  else:
    return prompt
  messages = _Beside(messages_of(value, name))
  for text in [prompt] if isinstance(prompt, str) else prompt or ():
    if isinstance(text, str) and not _is_turn(text, messages):
      raise Refused("prompts differ", f"the prompt is no turn of {name}")
  return messages


def _is_turn(text: str, turns: list[Message]) -> bool:
  return text.strip() in [str(m["content"]).strip() for m in turns]


def _as_texts(row: Mapping, prompt: Any, names: Sequence[str]) -> Answers:
  """Texts, exactly as they are; whole dialogues where there is no prompt."""
  values = [row[name] for name in names]
  is_dialogue = any(isinstance(v, str) and ASSISTANT in v for v in values)
  if prompt is not None or not is_dialogue:
    text = text_of(row, "prompt", "empty prompt")
    texts = [text_of(row, name) for name in names]
    return Answers(text, texts, group_of(text), {})
  found = [split_dialogue(text_of(row, name), name) for name in names]
  text = found[0][0]
  for other, _ in found[1:]:
    if text != other:
      same = (i for i, (a, b) in enumerate(zip(text, other)) if a != b)
      at = next(same, min(len(text), len(other)))
      a, b = text[at : at + 30], other[at : at + 30]
      raise Refused("prompts differ", f"from character {at}: {a!r} and {b!r}")
  if not text[: -len(ASSISTANT)].strip():
    raise Refused("empty prompt", "nothing before the Assistant turn")
  return Answers(text, [answer for _, answer in found], group_of(text), {})


def _whole(prompt: Any, value: Any, name: str, row: Mapping) -> list[Message]:
  """The dialogue that ends in one answer."""
  if isinstance(prompt, list) and prompt:
    if all(isinstance(item, str) for item in prompt):
      return _with_questions(prompt, value, name)
  is_list, beside = isinstance(prompt, list), isinstance(prompt, _Beside)
  before = messages_of(list(prompt), "prompt") if is_list else []
  answered = bool(before) and before[-1]["role"] == "assistant"
  if isinstance(value, str):  # an answer alone
    answer = dict(role="assistant", content=value)
    if isinstance(prompt, str):
      return [dict(role="user", content=prompt), answer]
    if not before:
      raise Refused("missing field", "prompt")
    if answered:
      sides = [row.get("chosen"), row.get("rejected")]
      texts = [side for side in sides if isinstance(side, str)]
      if not beside or before[-1]["content"] not in texts:
        raise Refused("prompt ends in an assistant turn", f"before {name}")
      before = before[:-1]  # the list repeats one of the sides
    return [*before, answer]
  turns = messages_of(value, name)
  if not turns:
    raise Refused("empty response", f"{name} has no message")
  if isinstance(prompt, str):
    if len(turns) == 1:  # the prompt is a text of its own
      return [dict(role="user", content=prompt), *turns]
    if not _is_turn(prompt, turns[:-1]):
      raise Refused("prompts differ", f"the prompt is no turn of {name}")
    return turns
  if before and turns[: len(before)] == before and len(turns) > len(before):
    return turns  # the side is the whole dialogue already
  if beside and len(turns) > 1:
    return turns  # and `messages` is the other one
  if beside and answered and turns[-1]["role"] == "assistant":
    before = before[:-1]
  return before + turns


def _with_questions(
  questions: list[str], value: Any, name: str
) -> list[Message]:
  """A list of the user's questions beside the dialogue that answers them."""
  if isinstance(value, str):
    turns = [dict(role="assistant", content=value)]
  else:
    turns = messages_of(value, name)
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


def _as_messages(
  whole: list[list[Message]], tools: list[dict] | None
) -> Answers:
  """The text of dialogues that share all but the last turn, and that turn."""
  for turns in whole:
    role = turns[-1]["role"] if turns else "missing"
    if role != "assistant":
      raise Refused("no Assistant turn", f"the last message is {role}")
    if not text_of_message(turns[-1]).strip():
      content = turns[-1]["content"]
      raise Refused("empty response", f"content is {content!r:.20}")
  before = [m for m in whole[0][:-1] if m["content"] or m["role"] != "system"]
  text = dialogue(before)
  users = [m["content"] for m in before if m["role"] == "user"]
  if not users:
    raise Refused("empty prompt", "no user turn")
  answers = [turns[-1] for turns in whole]
  known = dict(turns=before) | (dict(tools=tools) if tools else {})
  if not all(map(is_plain, answers)):
    known["answers"] = answers
  texts = [f" {text_of_message(m)}" for m in answers]
  return Answers(text, texts, users[0].strip(), known)


def _pair(
  found: Answers, row: Mapping, margin: float | None, first_wins: bool = True
) -> dict[str, Any]:
  """The pair of two answers; its second is the chosen one, or its first."""
  step, known = 1 if first_wins else -1, dict(found.known)
  if "answers" in known:
    known["answers"] = known["answers"][::step]
  group = row.get("group") if isinstance(row.get("group"), str) else ""
  chosen, rejected = found.texts[::step]
  known |= dict(group=group or found.group, margin=margin)
  return make_pair(found.prompt, chosen, rejected, **known)


def convert_pair(row: dict) -> dict[str, Any]:
  """A prompt, chosen and rejected; texts or messages."""
  margin = margin_of(row)
  return _pair(answers_in(row, ("chosen", "rejected")), row, margin)


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
  found = answers_in(row, ("first", "second"))
  scores = number_of(row, "first_score"), number_of(row, "second_score")
  strength = number_of(row, "strength")
  code = row.get("choice")
  if code is None and None in scores:
    raise Refused("null" if "choice" in row else "missing field", "choice")

  def make(side):
    if side == "tie":
      raise Refused("tie", "neither side was chosen")
    margin = None if strength is None else abs(strength)
    if None not in scores:
      better, worse = scores if side == "first" else scores[::-1]
      margin = better - worse
    return _pair(found, row, margin, side == "first")

  names = (row.get("first_id"), row.get("second_id"))
  return Undecided(code, make, SIDES, names, scores)


def convert_unpaired(row: dict) -> Undecided:
  """A prompt and one answer, or a dialogue that ends in it, and a label."""
  if row.get("label") is None:
    raise Refused("null" if "label" in row else "missing field", "label")
  if not isinstance(row["label"], (str, bool, int, float)):
    raise Refused("bad label", f"{row['label']!r:.40}")
  if "completion" not in row:
    if "messages" not in row:
      raise Refused("missing field", "completion")
    whole = row["messages"]
    row = {k: v for k, v in row.items() if k not in BEFORE}
    row["completion"] = whole
  elif "prompt" not in row:
    if isinstance(opened(row["completion"], "completion"), str):
      raise Refused("missing field", "prompt")
  prompt, [answer], group, known = answers_in(row, ("completion",))

  def make(label):
    return make_unpaired(prompt, answer, label == "liked", group, **known)

  return Undecided(row["label"], make, LABELS)


def is_read(column: str, value: Any) -> bool:
  """Whether a column of a known name holds what is read of it."""
  if column in (*BEFORE[1:], "turns"):
    return is_messages(opened_or_none(value))
  if column == "metadata":
    keys = value.keys() if isinstance(value, Mapping) else ()
    return "score_chosen" in keys or "chosen_score" in keys
  if column in ("source", "group", *SYSTEM):
    return isinstance(value, str)
  return True


def _texts_in(row: Mapping, *names: str) -> bool:
  return all(isinstance(row.get(name), str) for name in names)


def _answers_in(row: Mapping, *names: str) -> bool:
  """Whether all of these columns hold an answer, in whatever dress."""
  values = [row.get(name) for name in names]
  return all(isinstance(v, str) or is_messages(v) for v in values)


def _has_messages(row: Mapping, names: Sequence[str] = BEFORE) -> bool:
  return any(is_messages(opened_or_none(row.get(name))) for name in names)


def _is_chat(row: Mapping, *names: str) -> bool:
  """Whether a row is one of messages: its sides, or what stands before."""
  if not _answers_in(row, *names):
    return False
  if _has_messages(row):
    return True
  if any(not isinstance(opened_or_none(row.get(n)), str) for n in names):
    return True
  return _texts_in(row, "prompt") and any(row.get(name) for name in SYSTEM)


def _is_chat_pair(row: dict) -> bool:
  return _is_chat(row, "chosen", "rejected")


def _is_explicit(row: dict) -> bool:
  texts = _texts_in(row, "prompt", "chosen", "rejected")
  return texts and not _is_chat_pair(row)


def _is_unpaired(row: dict) -> bool:
  texts = _texts_in(row, "prompt", "completion") and "label" in row
  return texts and not _is_chat(row, "completion")


def _is_implicit(row: dict) -> bool:
  if not _texts_in(row, "chosen", "rejected") or row.get("prompt") is not None:
    return False
  return not _has_messages(row) and ASSISTANT in row["chosen"] + row["rejected"]


def _is_chat_unpaired(row: dict) -> bool:
  if "completion" in row:
    return "label" in row and _is_chat(row, "completion")
  return "label" in row and _has_messages(row, ("messages",))


def _is_choice(row: dict) -> bool:
  decided = "choice" in row or {"first_score", "second_score"} <= row.keys()
  if not decided or not _answers_in(row, "first", "second"):
    return False
  if isinstance(row.get("prompt"), (str, list)):
    return True
  return _has_messages(row, (*BEFORE, "first"))


def _roles(columns: str) -> dict[str, str]:
  return {name: ROLES[name] for name in columns.split()}


_SHARED = _roles(
  "prompt messages conversations conversation trajectory context system "
  "system_prompt system_message id source tools turns group"
)
_PAIR = _SHARED | _roles(
  "chosen rejected chosen_score rejected_score score_chosen score_rejected "
  "margin metadata ref_chosen_logps ref_rejected_logps score rank"
)
_UNPAIRED = _SHARED | _roles(
  "completion label ref_chosen_logps ref_rejected_logps score rank"
)
_CHOICE = _SHARED | _roles(
  "first second choice first_id second_id first_score second_score strength"
)

_SIDES = ("chosen", "rejected")
_EXPLICIT = ("prompt", *_SIDES)
_CODES = ("prompt", "first", "second", "choice")
_LABELLED = ("prompt", "completion", "label")
_DIALOGUE = _UNPAIRED | dict(messages="the prompt and the answer")
SCHEMAS = (
  Schema(
    "explicit_pairs",
    convert_pair,
    ("prompt", *_SIDES),
    _is_explicit,
    roles=_PAIR,
  ),
  Schema("implicit_pairs", convert_pair, _SIDES, _is_implicit, roles=_PAIR),
  Schema("chat_pairs", convert_pair, _SIDES, _is_chat_pair, roles=_PAIR),
  Schema(
    "unpaired",
    convert_unpaired,
    _LABELLED,
    _is_unpaired,
    roles=_UNPAIRED,
    code="label",
  ),
  Schema(
    "chat_unpaired",
    convert_unpaired,
    ("messages", "label"),
    _is_chat_unpaired,
    roles=_DIALOGUE,
    code="label",
  ),
  Schema("choices", convert_choice, _CODES, _is_choice, roles=_CHOICE),
)
