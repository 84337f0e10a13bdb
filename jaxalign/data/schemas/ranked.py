"""Several answers to one prompt: one row, many pairs.

`answers` (texts or messages) with their `scores`, the higher the better;
FineGrainedRLHF's four predictions with the six comparisons of them; or a
ranked tree of messages (an OpenAssistant export): a node is {"text", "role",
"replies", "rank", ...}, and replies that were ranked against each other (0 is
best) answer the same dialogue, the path from the root.
"""

from collections.abc import Iterator
import itertools
from typing import Any

from jaxalign.data.schemas.convert import convert_pair
from jaxalign.data.schemas.mapping import roles_for
from jaxalign.data.schemas.messages import is_dicts, ROLE_OF
from jaxalign.data.schemas.schema import (
  list_of,
  number_of,
  Refused,
  row_or_refused,
  Schema,
)

_PREDICTIONS = tuple(f"prediction {i}" for i in range(1, 5))


def _compared(ranked: list, pairs: str) -> Iterator[tuple]:
  """Which two of some answers, best first, are compared."""
  if pairs == "best_worst":
    return iter([(ranked[0], ranked[-1])] if len(ranked) > 1 else [])
  if pairs == "adjacent":
    return itertools.pairwise(ranked)
  return itertools.combinations(ranked, 2)


def convert_scored(row: dict, pairs: str) -> list[dict[str, Any] | Refused]:
  """A prompt, its answers and their scores."""
  answers, scores = list_of(row, "answers"), list_of(row, "scores")
  counts = f"{len(answers)} answers, {len(scores)} scores"
  if len(answers) != len(scores):
    raise Refused("answers without scores", counts)
  if len(answers) < 2:
    raise Refused("fewer than two answers", counts)
  known = {k: v for k, v in row.items() if k not in ("answers", "scores")}

  def pair(better, worse):
    (high, chosen), (low, rejected) = better, worse
    if high == low:
      raise Refused("tied scores", f"two answers of {high:g}")
    sides = dict(chosen=chosen, rejected=rejected, margin=high - low)
    return convert_pair(known | sides)

  numbers = [number_of(dict(scores=score), "scores") for score in scores]
  rated = [(x, a) for x, a in zip(numbers, answers) if x is not None]
  rated.sort(key=lambda item: -item[0])  # of equal ones as they stand
  made = [row_or_refused(pair, *two) for two in _compared(rated, pairs)]
  if not made:
    raise Refused("fewer than two answers", "with a score")
  return made


def convert_compared(row: dict, pairs: str) -> list[dict[str, Any] | Refused]:
  """Four predictions, compared 1-2, 1-3, 1-4, 2-3, 2-4 and 3-4.

  1 means that the first of the two is better, 2 the second, 0 neither.
  """
  del pairs  # those that were compared
  codes = row.get("preference")
  couples = list(itertools.combinations(_PREDICTIONS, 2))
  if not isinstance(codes, list) or len(codes) != len(couples):
    raise Refused(
      "not a list", f"preference is {codes!r:.40}, wanted six codes"
    )

  def pair(first, second, code):
    if code not in (0, 1, 2) or isinstance(code, bool):
      raise Refused("bad choice", f"{code!r:.40}, wanted 0, 1 or 2")
    if code == 0:
      raise Refused("tie", f"{first} and {second}")
    chosen, rejected = (first, second) if code == 1 else (second, first)
    sides = dict(chosen=row.get(chosen), rejected=row.get(rejected))
    return convert_pair(dict(prompt=row.get("question")) | sides)

  return [row_or_refused(pair, *two, c) for two, c in zip(couples, codes)]


def convert_tree(row: dict, pairs: str) -> list[dict[str, Any] | Refused]:
  """Pairs of the ranked replies of every group, with ids "<better>><worse>".

  Args:
    row: the tree.
    pairs: "all" is n (n - 1) / 2 pairs of n replies, "adjacent" the n - 1 of
      neighbouring ranks, "best_worst" one.
  """
  root = row.get("prompt")
  if "prompt" not in row:
    raise Refused("missing field", "prompt")
  if not isinstance(root, dict):
    reason = "null" if root is None else "not a tree"
    raise Refused(reason, f"prompt is a {type(root).__name__}")
  made, todo = [], [(root, [])]
  while todo:  # a loop: a tree may be deeper than Python's stack
    node, before = todo.pop()
    path = before + [_node_message(node)]
    replies = node.get("replies") or []
    if not is_dicts(replies):
      raise Refused("not a tree", f"replies of {_node_id(node)!r:.60}")
    ranked = [reply for reply in replies if reply.get("rank") is not None]
    ranked.sort(key=_rank)
    for two in _compared(ranked, pairs):
      made.append(row_or_refused(_tree_pair, path, *two))
    todo += [(reply, path) for reply in reversed(replies)]
  if not made:
    raise Refused("no ranked replies", _node_id(root))
  return made


def _tree_pair(path: list, better: dict, worse: dict) -> dict[str, Any]:
  name = f"{_node_id(better)}>{_node_id(worse)}"
  if better.get("deleted") or worse.get("deleted"):
    raise Refused("deleted message", name)
  if _rank(better) == _rank(worse):
    raise Refused("tied ranks", name)
  chosen, rejected = [_node_message(better)], [_node_message(worse)]
  row = convert_pair(dict(prompt=path, chosen=chosen, rejected=rejected))
  return dict(row, id=name if ">" not in (name[:1], name[-1:]) else None)


def _node_message(node: dict) -> dict[str, str]:
  role, text = node.get("role"), node.get("text")
  if not isinstance(role, str) or role not in ROLE_OF:
    raise Refused("unknown role", f"{role!r:.40}")
  if not isinstance(text, str):
    reason = "null" if text is None else "not a string"
    raise Refused(reason, f"text of {_node_id(node)!r:.60}")
  return dict(role=ROLE_OF[role], content=text)


def _rank(node: dict) -> int:
  rank = node["rank"]
  if isinstance(rank, bool) or not isinstance(rank, int):
    raise Refused("bad rank", f"{rank!r:.40} of {_node_id(node)!r:.60}")
  return rank


def _node_id(node: dict) -> str:
  value = node.get("message_id")
  return value if isinstance(value, str) else ""


def _is_scored(row: dict) -> bool:
  lists = [isinstance(row.get(name), list) for name in ("answers", "scores")]
  return all(lists) and isinstance(row.get("prompt"), (str, list))


def _is_tree(row: dict) -> bool:
  root = row.get("prompt")
  return isinstance(root, dict) and isinstance(root.get("replies"), list)


SCHEMAS = (
  Schema(
    "fine_grained_rlhf",
    convert_compared,
    ("question", *_PREDICTIONS, "preference"),
    many=True,
    roles=dict.fromkeys(_PREDICTIONS, "an answer")
    | dict(question="the prompt", preference="which is better"),
  ),
  Schema(
    "trees",
    convert_tree,
    ("prompt",),
    _is_tree,
    many=True,
    roles=dict(prompt="the tree of messages", id="the row's id"),
  ),
  Schema(
    "scored_answers",
    convert_scored,
    ("prompt", "answers", "scores"),
    _is_scored,
    many=True,
    roles=roles_for("prompt answers scores system id"),
  ),
)
