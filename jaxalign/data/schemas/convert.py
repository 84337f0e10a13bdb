"""Rows under the names that are read, converted: texts, messages, choices.

A prompt may be a text, a list of messages (`prompt`, `messages`,
`conversations`, `trajectory`) or nothing, where the sides are whole dialogues;
a side may be a text, a message or a list of some. Each becomes one of two
forms: all texts, kept as they are, or all messages.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.data.schemas.choices import LABELS, SIDES, Undecided
from jaxalign.data.schemas.mapping import roles_for
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
    if row[name] is None:
      raise Refused("null", name)
    values.append(opened(row[name], name))
  texts = not any(map(is_messages, values))
  prompt, repeats = _opened_prompt(row, texts)
  system = next((text_of(row, name) for name in SYSTEM if row.get(name)), None)
  tools = tools_of(row.get("tools"))
  turns = opened(row.get("turns"), "turns")
  turns = messages_of(turns, "turns") if is_messages(turns) else None
  has_more = tools or turns or any(name in row for name in SYSTEM)
  if texts and not isinstance(prompt, list) and not has_more:
    return _as_texts(row, prompt, names)
  if texts and isinstance(prompt, str):  # a dialogue's text and a system
    turns = turns or turns_of(prompt)
  if turns:
    prompt, repeats = turns, False
    values = [v.removeprefix(" ") if isinstance(v, str) else v for v in values]
  sides = [
    [_turn("assistant", v)] if isinstance(v, str) else messages_of(v, name)
    for v, name in zip(values, names)
  ]
  last = [side[-1]["content"] for side in sides if side]
  repeated = [*filter(None, last)] if repeats else None
  whole = [
    _whole(prompt, side, name, isinstance(value, str), repeated)
    for side, value, name in zip(sides, values, names)
  ]
  if system is not None:
    whole = [_with_system(system, turns) for turns in whole]
  if any(turns[:-1] != whole[0][:-1] for turns in whole):
    raise Refused("prompts differ", "the turns before the last are not equal")
  return _as_messages(whole, tools)


def _turn(role: str, content: str) -> Message:
  return dict(role=role, content=content)


def _opened_prompt(row: Mapping[str, Any], texts: bool) -> tuple[Any, bool]:
  """The prompt, and whether it is another column's messages.

  Those may repeat a side (UltraFeedback) or, where the sides are `texts`, stand
  before them; a prompt that is a text is then one of their turns.
  """
  prompt = opened(row.get("prompt"), "prompt")
  if isinstance(prompt, dict) and is_messages(prompt):
    prompt = messages_of(prompt, "prompt")
  prompt = None if prompt == [] else prompt
  if prompt is not None and not isinstance(prompt, (str, list)):
    raise Refused("not a string", f"prompt is a {type(prompt).__name__}")
  if is_messages(prompt) or prompt is not None and not texts:
    return prompt, False
  for name in BEFORE[1:]:
    if is_messages(value := opened(row.get(name), name)):
      break
  else:
    return prompt, False
  messages = messages_of(value, name)
  for text in [prompt] if isinstance(prompt, str) else prompt or ():
    if isinstance(text, str) and not _is_turn(text, messages):
      raise Refused("prompts differ", f"the prompt is no turn of {name}")
  return messages, True


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
  texts = [text_of({n: answer}, n) for n, (_, answer) in zip(names, found)]
  return Answers(text, texts, group_of(text), {})


def _whole(
  prompt: Any,
  side: list[Message],
  name: str,
  is_text: bool,
  repeated: list | None,
) -> list[Message]:
  """The dialogue that ends in one answer, the last message of `side`.

  `prompt` is messages, a text, a list of the user's questions, or None;
  `repeated`: the answers that its messages may end in, None where they do not.
  """
  if not side:
    raise Refused("empty response", f"{name} has no message")
  if isinstance(prompt, str):
    if len(side) == 1:
      return [_turn("user", prompt), *side]
    if not _is_turn(prompt, side[:-1]):
      raise Refused("prompts differ", f"the prompt is no turn of {name}")
    return side
  before = prompt or []
  if before and all(isinstance(item, str) for item in before):
    users = [m["content"].strip() for m in side if m["role"] == "user"]
    if len(side) == len(before) == 1:
      return [_turn("user", before[0]), *side]
    if [question.strip() for question in before] != users:
      raise Refused(
        "several prompts",
        f"{len(before)} in a list, {len(users)} of the user's turns in {name}",
      )
    return side
  before = messages_of(before, "prompt")
  answered = bool(before) and before[-1]["role"] == "assistant"
  if is_text:
    if not before:
      raise Refused("missing field", "prompt")
    if answered and before[-1]["content"] not in (repeated or ()):
      raise Refused("prompt ends in an assistant turn", f"before {name}")
    return (before[:-1] if answered else before) + side
  if before and side[: len(before)] == before and len(side) > len(before):
    return side  # the whole dialogue already
  if repeated is not None and len(side) > 1:
    return side  # and `messages` is the other one
  if repeated is not None and answered and side[-1]["role"] == "assistant":
    before = before[:-1]
  return before + side


def _with_system(system: str, turns: list[Message]) -> list[Message]:
  if turns[0]["role"] != "system":
    return [_turn("system", system), *turns]
  if turns[0]["content"].strip() != system.strip():
    raise Refused("two system turns", "a column and a message, not alike")
  return turns


def _as_messages(
  whole: list[list[Message]], tools: list[dict] | None
) -> Answers:
  """The text of dialogues that share all but the last turn, and that turn."""
  answers = [turns[-1] for turns in whole]
  for answer in answers:
    role, content = answer["role"], answer["content"]
    if role != "assistant":
      raise Refused("no Assistant turn", f"the last message is {role}")
    if not text_of_message(answer).strip():
      raise Refused("empty response", f"content is {content!r:.20}")
  before = [m for m in whole[0][:-1] if m["content"] or m["role"] != "system"]
  text = dialogue(before)
  users = [m["content"] for m in before if m["role"] == "user"]
  if not users:
    raise Refused("empty prompt", "no user turn")
  known = dict(turns=before) | (dict(tools=tools) if tools else {})
  if not all(map(is_plain, answers)):
    known["answers"] = answers
  texts = [f" {text_of_message(m)}" for m in answers]
  return Answers(text, texts, users[0].strip(), known)


def _pair(
  found: Answers, row: Mapping, margin: float | None, first_wins: bool = True
) -> dict[str, Any]:
  """The pair of two answers; its chosen one is the first, or the second."""
  step = 1 if first_wins else -1
  chosen, rejected = found.texts[::step]
  if chosen.strip() == rejected.strip():
    raise Refused("chosen equals rejected", f"{chosen[:40]!r}")
  group = row.get("group") if isinstance(row.get("group"), str) else ""
  pair = dict(prompt=found.prompt, chosen=chosen, rejected=rejected)
  pair |= dict(group=group or found.group) | found.known
  if "answers" in pair:
    pair["answers"] = pair["answers"][::step]
  return pair if margin is None else dict(pair, margin=margin)


def convert_pair(row: dict) -> dict[str, Any]:
  """A prompt, chosen and rejected; texts or messages."""
  margin = margin_of(row)
  return _pair(answers_in(row, ("chosen", "rejected")), row, margin)


def flipped(row: dict[str, Any]) -> dict[str, Any]:
  """A converted pair with its sides exchanged."""
  out = dict(row, chosen=row["rejected"], rejected=row["chosen"])
  if "answers" in row:
    out["answers"] = row["answers"][::-1]
  if row.get("margin") is not None:
    out["margin"] = -row["margin"]
  return out


def convert_choice(row: dict) -> Undecided:
  """prompt, first and second, and which of them is better.

  `choice` is a code; or `first_score` and `second_score` decide. `strength` is
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
    rest = {k: v for k, v in row.items() if k not in BEFORE}
    row = rest | dict(completion=row["messages"])
  elif "prompt" not in row:
    if isinstance(opened(row["completion"], "completion"), str):
      raise Refused("missing field", "prompt")
  prompt, [answer], group, known = answers_in(row, ("completion",))

  def make(label):
    liked = label == "liked"
    texts = dict(prompt=prompt, completion=answer, label=liked)
    return texts | dict(group=group) | known

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


def _have_prompt(row: Mapping, *names: str) -> bool:
  """Whether these columns hold answers, and the row what they answer."""
  values = [row.get(name) for name in names]
  if not all(isinstance(v, str) or is_messages(v) for v in values):
    return False
  if isinstance(row.get("prompt"), (str, list)) or _have_messages(row):
    return True
  return any(not isinstance(opened_or_none(v), str) for v in values)


def _have_messages(row: Mapping, names: Sequence[str] = BEFORE) -> bool:
  return any(is_messages(opened_or_none(row.get(name))) for name in names)


def _is_pair(row: dict) -> bool:
  if _have_prompt(row, "chosen", "rejected"):
    return True
  sides = [row.get(name) for name in ("chosen", "rejected")]
  texts = all(isinstance(side, str) for side in sides)
  return texts and row.get("prompt") is None and ASSISTANT in "".join(sides)


def _is_unpaired(row: dict) -> bool:
  if "completion" in row:
    return "label" in row and _have_prompt(row, "completion")
  return "label" in row and _have_messages(row, ("messages",))


def _is_choice(row: dict) -> bool:
  decided = "choice" in row or {"first_score", "second_score"} <= row.keys()
  return decided and _have_prompt(row, "first", "second")


_SHARED = roles_for(
  "prompt messages conversations conversation trajectory context system "
  "system_prompt system_message id source tools turns group"
)
_PAIR = _SHARED | roles_for(
  "chosen rejected chosen_score rejected_score score_chosen score_rejected "
  "margin metadata ref_chosen_logps ref_rejected_logps score rank"
)
_UNPAIRED = _SHARED | roles_for(
  "completion label ref_chosen_logps ref_rejected_logps score rank"
)
_CHOICE = _SHARED | roles_for(
  "first second choice first_id second_id first_score second_score strength"
)
_EXPLICIT = ("prompt", "chosen", "rejected")
_LABELLED = ("prompt", "completion", "label")
_CODES = ("prompt", "first", "second", "choice")
SCHEMAS = (
  Schema("pairs", convert_pair, _EXPLICIT, _is_pair, roles=_PAIR),
  Schema(
    "unpaired",
    convert_unpaired,
    _LABELLED,
    _is_unpaired,
    roles=_UNPAIRED,
    code="label",
  ),
  Schema("choices", convert_choice, _CODES, _is_choice, roles=_CHOICE),
)
