"""Messages in every dress: lists, JSON in a cell, parts, tools, ShareGPT.

What comes out is a list of dicts with `role` (user, assistant, system,
developer or tool) and `content` (a text, or None beside `tool_calls`), and
where a message has them `tool_calls`, `tool_call_id`, `name` and the keys a
template reads a thought from. As a text, for a model without a template, a
dialogue is "\n\nHuman: ...\n\nAssistant: ..." with a system text in front.
"""

import ast
from collections.abc import Mapping
import json
import re
from typing import Any

from jaxalign.data.schemas.pairs import ASSISTANT, HUMAN, Refused

Message = dict[str, Any]

_CALL = "function_call"
ROLES = (
  dict.fromkeys(("user", "human", "prompter"), "user")
  | dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bing", "bard"),
    "assistant",
  )
  | dict.fromkeys(
    (
      "tool",
      "observation",
      "function",
      "ipython",
      "tool_response",
      "function_response",
    ),
    "tool",
  )
  | {
    "system": "system",
    "developer": "developer",
    "function_call": _CALL,
    "tool_call": _CALL,
  }
)
# Beside role and content; others hold nothing that a template writes.
KEYS = (
  "name",
  "tool_calls",
  "tool_call_id",
  "reasoning_content",
  "reasoning",
  "thinking",
)
_READ = {"role", "from", "content", "value", "function_call", *KEYS}
TOOLS = "\n\nTool:"
_LITERAL = 1 << 22  # characters of a Python literal; a longer one is no cell
_BEGINS = re.compile(r"\s*(\[\s*)?\{")
_KEYS = re.compile(r"""["'](role|from)["']\s*:""")
_TEXTS = re.compile(r"""["'](content|value)["']\s*:""")


def opened(value: Any, field: str) -> Any:
  """The messages that a text holds as JSON, or the value as it is.

  A spreadsheet or a CSV keeps a list as the text of it: JSON, or Python's own
  way to write it.

  Raises:
    Refused: it begins as messages do and cannot be read.
  """
  if (
    not isinstance(value, str)
    or not _BEGINS.match(value)
    or not (_KEYS.search(value) and _TEXTS.search(value))
  ):
    return value
  for read in (json.loads, ast.literal_eval):
    if read is ast.literal_eval and len(value) > _LITERAL:
      break
    try:
      found = read(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
      continue
    return found if is_messages(found) else value
  raise Refused(
    "messages in a text that cannot be read", f"{field} is {value[:60]!r}"
  )


def is_messages(value: Any) -> bool:
  """Whether a value is a message, or a list of some."""
  if isinstance(value, dict):
    value = _unzipped(value)
  return (
    isinstance(value, list)
    and bool(value)
    and all(
      isinstance(m, dict)
      and (
        {"role", "content"} <= m.keys()
        or {"from", "value"} <= m.keys()
        or {"role", "tool_calls"} <= m.keys()
      )
      for m in value
    )
  )


def _unzipped(value: dict) -> list:
  """A lone message in a list; {"role": [...], "content": [...]} as messages."""
  lists = [item for item in value.values() if isinstance(item, list)]
  if (
    len(lists) == len(value) > 1
    and len({*map(len, lists)}) == 1
    and ("role" in value or "from" in value)
  ):
    return [dict(zip(value, items)) for items in zip(*lists)]
  return [value]


def messages_of(value: Any, field: str) -> list[Message]:
  """The messages of a list, of a lone message, or of the text of either."""
  value = opened(value, field)
  if value is None:
    raise Refused("null", field)
  if isinstance(value, dict):
    value = _unzipped(value)
  if not isinstance(value, list):
    raise Refused(
      "not a list of messages", f"{field} is a {type(value).__name__}"
    )
  return [_message(one, field) for one in value]


def unread_keys(value: Any) -> set[str]:
  """Keys of messages that hold text and that nothing reads."""
  value = [value] if isinstance(value, dict) else value
  return (
    {
      str(key)
      for one in value
      if isinstance(one, dict)
      for key, item in one.items()
      if key not in _READ and isinstance(item, str) and item.strip()
    }
    if isinstance(value, list)
    else set()
  )


def _message(value: Any, field: str) -> Message:
  if not isinstance(value, dict):
    raise Refused(
      "not a list of messages", f"{field} holds a {type(value).__name__}"
    )
  role = value.get("role")
  role = value.get("from") if role is None else role
  known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
  if known is None:
    raise Refused("unknown role", f"{role!r:.40} in {field}")
  text = value.get("content")
  text = value.get("value") if text is None else text
  out = {
    key: _without_none(value[key])
    for key in KEYS
    if value.get(key) not in (None, [], "")
  }
  if known == _CALL:
    known, out["tool_calls"], text = "assistant", _calls(text, field), None
  elif isinstance(value.get("function_call"), Mapping):
    out["tool_calls"] = [
      dict(type="function", function=_without_none(value["function_call"]))
    ]
  if "tool_calls" in out and not (
    known == "assistant"
    and isinstance(out["tool_calls"], list)
    and all(isinstance(call, dict) for call in out["tool_calls"])
  ):
    raise Refused("bad tool call", f"{out['tool_calls']!r:.60} in {field}")
  if text is not None or "tool_calls" not in out:
    text = content_of(text, f"content of {known} in {field}")
  return dict(role=known, content=text) | out


def content_of(value: Any, where: str) -> str:
  """A content as one text: itself, or its text parts joined."""
  if isinstance(value, str):
    return value
  if value is None:
    raise Refused("null", where)
  if not isinstance(value, list):
    raise Refused("not a string", where)
  texts = []
  for part in value:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, str):
      texts.append(part)
    elif (
      isinstance(part, Mapping)
      and isinstance(part.get("text"), str)
      and (kind in (None, "text", "input_text", "output_text"))
    ):
      texts.append(part["text"])
    else:
      name = kind if isinstance(kind, str) else type(part).__name__
      raise Refused(
        "content is not text", f"a part of type {name!r:.40}, {where}"
      )
  return "".join(texts)


def _calls(text: Any, field: str) -> list[dict]:
  """The calls of ShareGPT's function_call: JSON with name and arguments."""
  try:
    found = json.loads(text) if isinstance(text, str) else text
  except (ValueError, RecursionError):
    found = None
  found = [found] if isinstance(found, dict) else found
  if not (
    isinstance(found, list)
    and found
    and all(
      isinstance(one, dict) and isinstance(one.get("name"), str)
      for one in found
    )
  ):
    raise Refused(
      "bad tool call",
      f"{text!r:.60} in {field}, wanted JSON with a name and arguments",
    )
  return [
    dict(
      type="function",
      function=dict(name=one["name"], arguments=one.get("arguments", {})),
    )
    for one in found
  ]


def tools_of(value: Any) -> list[dict] | None:
  """The tools of a row, from a list or the JSON of one; None where none."""
  if isinstance(value, str):
    if not value.strip():
      return None
    try:
      value = json.loads(value)
    except (ValueError, RecursionError) as error:
      raise Refused("bad tools", f"{value[:40]!r} is no JSON") from error
  if value is None or value == [] or value == {}:
    return None
  if not (
    isinstance(value, list) and all(isinstance(tool, dict) for tool in value)
  ):
    raise Refused("bad tools", f"{value!r:.60}, wanted a list of schemas")
  return _without_none(value)


def _without_none(value: Any) -> Any:
  """Without the nulls that a table puts where one row lacks another's key."""
  if isinstance(value, Mapping):
    return {k: _without_none(v) for k, v in value.items() if v is not None}
  if isinstance(value, (list, tuple)):
    return [_without_none(v) for v in value]
  return value


def is_plain(message: Message) -> bool:
  """Whether a message is its role and its text, and no more."""
  return (
    message.keys() == {"role", "content"} and message["content"] is not None
  )


def uses_tools(row: Mapping[str, Any]) -> bool:
  """Whether a converted row has tools, calls of them or their answers."""
  return bool(row.get("tools")) or any(
    m["role"] == "tool" or "tool_calls" in m
    for m in [*(row.get("turns") or ()), *(row.get("answers") or ())]
  )


def text_of_message(message: Message) -> str:
  """What a person reads of a message; calls as JSON after its text."""
  calls = [
    json.dumps(call.get("function", call), ensure_ascii=False, default=str)
    for call in message.get("tool_calls", ())
  ]
  return "\n".join([*filter(None, [message["content"]]), *calls])


def dialogue(turns: list[Message]) -> str:
  """The text of a prompt's turns, up to the marker that the answer follows.

  Raises:
    Refused: a system turn is not the first, or an earlier turn is empty.
  """
  text = ""
  marks = dict(user=HUMAN, assistant=ASSISTANT, tool=TOOLS)
  for i, message in enumerate(turns):
    content = text_of_message(message)
    if message["role"] in ("system", "developer"):
      if i:
        raise Refused("system turn not first", f"message {i + 1}")
      text = content
    elif not content.strip() and message["role"] != "tool":
      raise Refused(
        "empty prompt", f"message {i + 1} ({message['role']}) is empty"
      )
    else:
      text += f"{marks[message['role']]} {content}"
  return text + ASSISTANT
