"""Rows of messages, rendered as plain dialogue text.

Messages are `{"role", "content"}` (or ShareGPT's `{"from", "value"}`); what
comes out is "\n\nHuman: ...\n\nAssistant:" with a system text in front and
the response as " ...". The turns of the prompt are kept beside that text: a
model's chat template is applied to them later, if at all.
"""

from typing import Any

from jaxalign.data.schemas.pairs import (ASSISTANT, HUMAN, Refused, Schema,
                                         label_of, make_pair, make_thumb,
                                         margin_of)

_ROLES = {"user": "user", "human": "user", "prompter": "user",
          "assistant": "assistant", "gpt": "assistant", "system": "system"}
_PROMPTS = ("prompt", "conversations", "messages")


def messages_of(value: Any, field: str) -> list[tuple[str, str]]:
  """(role, text) of every message in a list, or of a lone message."""
  if value is None:
    raise Refused("null", field)
  if isinstance(value, dict):
    value = [value]
  if not isinstance(value, list):
    raise Refused("not a list of messages",
                  f"{field} is a {type(value).__name__}")
  messages = []
  for message in value:
    if not isinstance(message, dict):
      raise Refused("not a list of messages",
                    f"{field} holds a {type(message).__name__}")
    role = message.get("role", message.get("from"))
    text = message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
      raise Refused("unknown role", f"{role!r:.40} in {field}")
    if not isinstance(text, str):
      raise Refused("null" if text is None else "not a string",
                    f"content of {role} in {field}")
    messages.append((_ROLES[role], text))
  return messages


def render(messages: list[tuple[str, str]]
           ) -> tuple[str, str, str, list[dict[str, str]]]:
  """(prompt, response, group, the prompt's turns) of a whole dialogue.

  Raises:
    Refused: it does not end in an assistant turn, or has an empty one.
  """
  if not messages or messages[-1][0] != "assistant":
    raise Refused("no Assistant turn", "the last message is "
                  f"{messages[-1][0] if messages else 'missing'}")
  text = ""
  for i, (role, content) in enumerate(messages[:-1]):
    if role == "system":
      if i:
        raise Refused("system turn not first", f"message {i + 1}")
      text = content
    elif not content.strip():
      raise Refused("empty prompt", f"message {i + 1} ({role}) is empty")
    else:
      text += f"{HUMAN if role == 'user' else ASSISTANT} {content}"
  users = [content for role, content in messages[:-1] if role == "user"]
  if not users:
    raise Refused("empty prompt", "no user turn")
  response = messages[-1][1]
  if not response.strip():
    raise Refused("empty response", f"content is {response[:20]!r}")
  turns = [dict(role=role, content=content) for role, content in messages[:-1]
           if content or role != "system"]
  return text + ASSISTANT, f" {response}", users[0].strip(), turns


def convert_pairs(row: dict) -> dict[str, Any]:
  """A prompt of messages (or none) and chosen, rejected message lists."""
  for side in ("chosen", "rejected"):
    if side not in row:
      raise Refused("missing field", side)
  asked = row.get("prompt")
  before = _before(row)
  sides = []
  for side in ("chosen", "rejected"):
    turns = messages_of(row[side], side)
    if not turns:
      raise Refused("empty response", f"{side} has no message")
    if not before and isinstance(asked, str):
      if len(turns) == 1:  # the prompt is a text of its own
        turns = [("user", asked), *turns]
      elif asked.strip() not in [text.strip() for _, text in turns[:-1]]:
        raise Refused("prompts differ", f"the prompt is no turn of {side}")
    sides.append(before + turns)
  if sides[0][:-1] != sides[1][:-1]:
    raise Refused("prompts differ", "the turns before the last are not equal")
  prompt, chosen, group, turns = render(sides[0])
  rejected = render(sides[1])[1]
  return make_pair(prompt, chosen, rejected, group, turns, margin_of(row))


def convert_thumbs(row: dict) -> dict[str, Any]:
  """Messages that end in the judged reply, or prompt and completion lists."""
  label = label_of(row)
  if "completion" in row:
    if "prompt" not in row:
      raise Refused("missing field", "prompt")
    turns = (messages_of(row["prompt"], "prompt") +
             messages_of(row["completion"], "completion"))
  elif "messages" in row:
    turns = messages_of(row["messages"], "messages")
  else:
    raise Refused("missing field", "messages")
  prompt, completion, group, before = render(turns)
  return make_thumb(prompt, completion, label, group, before)


def _before(row: dict) -> list[tuple[str, str]]:
  """The turns given apart from the two sides; UltraFeedback gives none.

  Its `messages` repeats the chosen dialogue, so `messages` counts only where
  the sides are single messages and there is no `prompt`.
  """
  for field in _PROMPTS:
    value = row.get(field)
    if isinstance(value, list) and value:
      if field == "messages" and ("prompt" in row or
                                  not isinstance(row["chosen"], dict)):
        continue
      return messages_of(value, field)
  return []


def _is_messages(value: Any) -> bool:
  if isinstance(value, dict):
    value = [value]
  return (isinstance(value, list) and bool(value) and
          all(isinstance(m, dict) and ({"role", "content"} <= m.keys() or
                                       {"from", "value"} <= m.keys())
              for m in value))


def _matches_thumbs(row: dict) -> bool:
  return "label" in row and (
      _is_messages(row.get("messages")) or
      _is_messages(row.get("prompt")) and _is_messages(row.get("completion")))


CHAT_PAIRS = Schema("chat_pairs",
                    lambda row: (_is_messages(row.get("chosen")) and
                                 _is_messages(row.get("rejected"))),
                    convert_pairs, "pairs")
CHAT_THUMBS = Schema("chat_thumbs", _matches_thumbs, convert_thumbs, "thumbs")
