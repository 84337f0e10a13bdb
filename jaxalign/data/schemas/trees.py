"""Ranked trees of messages (an OpenAssistant export): one row, many pairs.

A node is {"text", "role", "replies", "rank", ...}; replies that were ranked
against each other (0 is best) answer the same dialogue, the path from the
root. Which two of them are compared is `data.answer_pairs`.
"""

from typing import Any

from jaxalign.data.schemas.lists import drawn
from jaxalign.data.schemas.messages import ROLES
from jaxalign.data.schemas.pairs import Refused, Schema
from jaxalign.data.schemas.rows import convert_pair


def convert(row: dict, pairs: str = "all") -> list[dict[str, Any] | Refused]:
  """Pairs of the ranked replies of every group.

  Args:
    row: the tree.
    pairs: "all" is n (n - 1) / 2 pairs of n replies, "adjacent" the n - 1 of
      neighbouring ranks, "best_worst" one.
  """
  root = row.get("prompt")
  if "prompt" not in row:
    raise Refused("missing field", "prompt")
  if not isinstance(root, dict):
    raise Refused(
      "null" if root is None else "not a tree",
      f"prompt is a {type(root).__name__}",
    )
  made = []
  todo = [(root, [])]
  while todo:  # a loop: a tree may be deeper than Python's stack
    node, before = todo.pop()
    path = before + [_message(node)]
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(
      isinstance(reply, dict) for reply in replies
    ):
      raise Refused("not a tree", f"replies of {_name(node)!r:.60}")
    ranked = sorted(
      (r for r in replies if r.get("rank") is not None), key=_rank
    )
    made += [
      _pair(path, better, worse) for better, worse in drawn(ranked, pairs)
    ]
    todo += [(reply, path) for reply in reversed(replies)]
  if not made:
    raise Refused("no ranked replies", _name(root))
  return made


def _pair(path: list, better: dict, worse: dict) -> dict[str, Any] | Refused:
  """A pair with the id "<better>><worse>", or why there is none."""
  name = f"{_name(better)}>{_name(worse)}"
  try:
    if any(reply.get("deleted") for reply in (better, worse)):
      raise Refused("deleted message", name)
    if _rank(better) == _rank(worse):
      raise Refused("tied ranks", name)
    made = convert_pair(
      dict(prompt=path, chosen=[_message(better)], rejected=[_message(worse)])
    )
    return dict(made, id=name if ">" not in (name[:1], name[-1:]) else None)
  except Refused as error:
    return error


def _message(node: dict) -> dict[str, str]:
  role, text = node.get("role"), node.get("text")
  if not isinstance(role, str) or role not in ROLES:
    raise Refused("unknown role", f"{role!r:.40}")
  if not isinstance(text, str):
    raise Refused(
      "null" if text is None else "not a string", f"text of {_name(node)!r:.60}"
    )
  return dict(role=ROLES[role], content=text)


def _rank(node: dict) -> int:
  rank = node["rank"]
  if isinstance(rank, bool) or not isinstance(rank, int):
    raise Refused("bad rank", f"{rank!r:.40} of {_name(node)!r:.60}")
  return rank


def _name(node: dict) -> str:
  value = node.get("message_id")
  return value if isinstance(value, str) else ""


def _matches(row: dict) -> bool:
  root = row.get("prompt")
  return isinstance(root, dict) and isinstance(root.get("replies"), list)


TREES = Schema(
  "trees",
  _matches,
  convert,
  "pairs",
  many=True,
  wants=("prompt",),
  roles=dict(prompt="the tree of messages", id="the row's id"),
)
