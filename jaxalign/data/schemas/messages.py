"""Messages however a row holds them: lists, JSON in a cell, parts, ShareGPT.

What comes out is a list of dicts with `role` (user, assistant, system,
developer or tool) and `content` (a text, or None where there are `tool_calls`),
and where a message has them `tool_calls`, `tool_call_id`, `name` and the keys a
template reads a thought from. As a text, for a model without a template, a
dialogue is "\n\nHuman: ...\n\nAssistant: ..." with a system text in front.
"""

import ast
from collections.abc import Mapping
import json
import re
from typing import Any

from jaxalign.data.schemas.schema import ASSISTANT, HUMAN, Refused

Message = dict[str, Any]

_CALL = "function_call"
_ROLE_NAMES = {
  "user": "user human prompter",
  "assistant": "assistant gpt chatgpt bot model ai bing bard",
  "tool": ("tool observation function ipython tool_response function_response"),
  "system": "system",
  "developer": "developer",
  _CALL: "function_call tool_call",
}
ROLE_OF = {name: role for role, x in _ROLE_NAMES.items() for name in x.split()}
# Besides role and content; others hold nothing that a template writes.
KEYS = (
  "name tool_calls tool_call_id reasoning_content reasoning thinking".split()
)
_READ = {"role", "from", "content", "value", "function_call", *KEYS}
_PAIRS_OF_KEYS = (
  {"role", "content"},
  {"from", "value"},
  {"role", "tool_calls"},
)
_MARKERS = dict(user=HUMAN, assistant=ASSISTANT, tool="\n\nTool:")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_LITERAL = 1 << 22  # characters of a Python literal; a longer one is no cell
_BEGINS = re.compile(r"\s*(\[\s*)?\{")
_KEYS = re.compile(r"""["'](role|from)["']\s*:""")
_TEXTS = re.compile(r"""["'](content|value)["']\s*:""")


def from_json(text: Any) -> Any:
  """What a text holds as JSON, None where it is none; others as they are."""
  try:
    return json.loads(text) if isinstance(text, str) else text
  except (ValueError, RecursionError):
    return None


def opened(value: Any, field: str) -> Any:
  """The messages that a text holds as JSON, or the value as it is.

  A spreadsheet or a CSV keeps a list as the text of it: JSON, or Python's own
  way to write it.

  Raises:
    Refused: it begins as messages do and cannot be read.
  """
  if not isinstance(value, str) or not _BEGINS.match(value):
    return value
  if not (_KEYS.search(value) and _TEXTS.search(value)):
    return value
  found = from_json(value)
  if found is None and len(value) <= _LITERAL:
    try:
      found = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
      pass
  if found is None:
    raise Refused(
      "messages in a text that cannot be read", f"{field} is {value[:60]!r}"
    )
  return found if is_messages(found) else value


def opened_or_none(value: Any) -> Any:
  """`opened`, None where the text cannot be read."""
  try:
    return opened(value, "")
  except Refused:
    return None


def is_messages(value: Any) -> bool:
  """Whether a value is a message, or a list of some."""
  value = _unzipped(value)
  return bool(value and is_dicts(value)) and all(
    any(keys <= message.keys() for keys in _PAIRS_OF_KEYS) for message in value
  )


def is_dicts(value: Any) -> bool:
  """Whether a value is a list of dicts."""
  return isinstance(value, list) and all(isinstance(x, dict) for x in value)


def _unzipped(value: Any) -> Any:
  """A lone message in a list; {"role": [...], "content": [...]} as messages."""
  if not isinstance(value, dict):
    return value
  lists = [item for item in value.values() if isinstance(item, list)]
  even = len(lists) == len(value) > 1 and len({*map(len, lists)}) == 1
  if even and ("role" in value or "from" in value):
    return [dict(zip(value, items)) for items in zip(*lists)]
  return [value]


def messages_of(value: Any, field: str) -> list[Message]:
  """The messages of a list, of a lone message, or of the text of either."""
  value = _unzipped(opened(value, field))
  if value is None:
    raise Refused("null", field)
  if not isinstance(value, list):
    kind = type(value).__name__
    raise Refused("not a list of messages", f"{field} is a {kind}")
  return [_message(item, field) for item in value]


def unread_keys(value: Any) -> set[str]:
  """Keys of messages that hold text and that nothing reads."""
  return {
    str(key)
    for message in ([value] if isinstance(value, dict) else value)
    for key, item in message.items()
    if key not in _READ and isinstance(item, str) and item.strip()
  }


def _first_of(value: dict, *keys: str) -> Any:
  return next((value[k] for k in keys if value.get(k) is not None), None)


def _message(value: Any, field: str) -> Message:
  if not isinstance(value, dict):
    kind = type(value).__name__
    raise Refused("not a list of messages", f"{field} holds a {kind}")
  role = _first_of(value, "role", "from")
  text = _first_of(value, "content", "value")
  known = ROLE_OF.get(role.strip().lower()) if isinstance(role, str) else None
  if known is None:
    raise Refused("unknown role", f"{role!r:.40} in {field}")
  out = {k: value.get(k) for k in KEYS}
  out = {k: without_none(v) for k, v in out.items() if v not in (None, [], "")}
  if known == _CALL:
    known, out["tool_calls"], text = "assistant", _calls(text, field), None
  elif isinstance(value.get("function_call"), Mapping):
    call = without_none(value["function_call"])
    out["tool_calls"] = [dict(type="function", function=call)]
  calls = out.get("tool_calls", [])
  if not is_dicts(calls) or calls and known != "assistant":
    raise Refused("bad tool call", f"{calls!r:.60} in {field}")
  if text is not None or not calls:
    text = _text_of_content(text, f"content of {known} in {field}")
  return dict(role=known, content=text) | out


def _text_of_content(value: Any, where: str) -> str:
  """A content as one text: itself, or its text parts joined."""
  if isinstance(value, str):
    return value
  if not isinstance(value, list):
    raise Refused("null" if value is None else "not a string", where)
  return "".join(_text_of_part(part, where) for part in value)


def _text_of_part(part: Any, where: str) -> str:
  if isinstance(part, str):
    return part
  kind, text = None, None
  if isinstance(part, Mapping):
    kind, text = part.get("type"), part.get("text")
  if kind in _TEXT_PARTS and isinstance(text, str):
    return text
  name = kind if isinstance(kind, str) else type(part).__name__
  raise Refused("content is not text", f"a part of type {name!r:.40}, {where}")


def _calls(text: Any, field: str) -> list[dict]:
  """The calls of ShareGPT's function_call: JSON with name and arguments."""
  calls = from_json(text)
  calls = [calls] if isinstance(calls, dict) else calls
  named = calls and is_dicts(calls)
  if not named or not all(isinstance(c.get("name"), str) for c in calls):
    raise Refused(
      "bad tool call",
      f"{text!r:.60} in {field}, wanted JSON with a name and arguments",
    )
  functions = [
    dict(name=call["name"], arguments=call.get("arguments", {}))
    for call in calls
  ]
  return [dict(type="function", function=function) for function in functions]


def tools_of(value: Any) -> list[dict] | None:
  """The tools of a row, from a list or the JSON of one; None where none."""
  if isinstance(value, str) and value.strip():
    text = value
    if (value := from_json(text)) is None and text.strip() != "null":
      raise Refused("bad tools", f"{text[:40]!r} is no JSON")
  if value in (None, [], {}) or isinstance(value, str) and not value.strip():
    return None
  if not is_dicts(value):
    raise Refused("bad tools", f"{value!r:.60}, wanted a list of schemas")
  return without_none(value)


def without_none(value: Any) -> Any:
  """Without the nulls that a table puts where one row lacks another's key."""
  if isinstance(value, Mapping):
    return {k: without_none(v) for k, v in value.items() if v is not None}
  if isinstance(value, (list, tuple)):
    return [without_none(v) for v in value]
  return value


def is_plain(message: Message) -> bool:
  """Whether a message is its role and its text, and no more."""
  only_text = message.keys() == {"role", "content"}
  return only_text and message["content"] is not None


def uses_tools(row: Mapping[str, Any]) -> bool:
  """Whether a converted row has tools, calls of them or their answers."""
  messages = [*(row.get("turns") or ()), *(row.get("answers") or ())]
  return bool(row.get("tools")) or any(
    m["role"] == "tool" or "tool_calls" in m for m in messages
  )


def text_of_message(message: Message) -> str:
  """What a person reads of a message; calls as JSON after its text."""
  calls = [call.get("function", call) for call in message.get("tool_calls", ())]
  lines = [json.dumps(x, ensure_ascii=False, default=str) for x in calls]
  return "\n".join([*filter(None, [message["content"]]), *lines])


def dialogue(turns: list[Message]) -> str:
  """The text of a prompt's turns, up to the marker that the answer follows.

  Raises:
    Refused: a system turn is not the first, or an earlier turn is empty.
  """
  text = ""
  for i, message in enumerate(turns):
    role, content = message["role"], text_of_message(message)
    if role in ("system", "developer"):
      if i:
        raise Refused("system turn not first", f"message {i + 1}")
      text = content
    elif not content.strip() and role != "tool":
      raise Refused("empty prompt", f"message {i + 1} ({role}) is empty")
    else:
      text += f"{_MARKERS[role]} {content}"
  return text + ASSISTANT
