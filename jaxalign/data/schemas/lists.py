"""Several answers to one prompt: one row, many pairs.

`answers` (texts or messages) beside `scores`, the higher the better; or
FineGrainedRLHF's four predictions with the six comparisons of them.
"""

from collections.abc import Iterator
import itertools
from typing import Any

from jaxalign.data.schemas.pairs import number_of, Refused, Schema
from jaxalign.data.schemas.rows import convert_pair

_PREDICTIONS = tuple(f"prediction {i}" for i in range(1, 5))


def drawn(ranked: list, pairs: str) -> Iterator[tuple]:
  """Which two of some answers, best first, are compared."""
  if pairs == "best_worst":
    return iter([(ranked[0], ranked[-1])] if len(ranked) > 1 else [])
  return (
    itertools.pairwise(ranked)
    if pairs == "adjacent"
    else itertools.combinations(ranked, 2)
  )


def convert_scored(row: dict, pairs: str) -> list[dict[str, Any] | Refused]:
  """A prompt, its answers and their scores."""
  answers, scores = (row.get(name) for name in ("answers", "scores"))
  for name, value in (("answers", answers), ("scores", scores)):
    if name not in row:
      raise Refused("missing field", name)
    if not isinstance(value, list):
      raise Refused(
        "null" if value is None else "not a list",
        f"{name} is a {type(value).__name__}",
      )
  if len(answers) != len(scores) or len(answers) < 2:
    raise Refused(
      "answers without scores"
      if len(answers) != len(scores)
      else "fewer than two answers",
      f"{len(answers)} answers, {len(scores)} scores",
    )
  found = [number_of(dict(scores=s), "scores") for s in scores]
  rated = [(s, a) for s, a in zip(found, answers) if s is not None]
  rated.sort(key=lambda one: -one[0])  # of equal ones as they stand
  made = [_pair(row, better, worse) for better, worse in drawn(rated, pairs)]
  if not made:
    raise Refused("fewer than two answers", "with a score")
  return made


def _pair(row: dict, better: tuple, worse: tuple) -> dict[str, Any] | Refused:
  try:
    if better[0] == worse[0]:
      raise Refused("tied scores", f"two answers of {better[0]:g}")
    known = {k: v for k, v in row.items() if k not in ("answers", "scores")}
    return convert_pair(
      known
      | dict(chosen=better[1], rejected=worse[1], margin=better[0] - worse[0])
    )
  except Refused as error:
    return error


def convert_compared(row: dict, pairs: str) -> list[dict[str, Any] | Refused]:
  """Four predictions, compared 1-2, 1-3, 1-4, 2-3, 2-4 and 3-4.

  1 says that the first of the two is better, 2 the second, 0 neither.
  """
  del pairs  # those that were compared
  said = row.get("preference")
  couples = list(itertools.combinations(_PREDICTIONS, 2))
  if not isinstance(said, list) or len(said) != len(couples):
    raise Refused("not a list", f"preference is {said!r:.40}, wanted six codes")
  made = []
  for (first, second), code in zip(couples, said):
    try:
      if code not in (0, 1, 2) or isinstance(code, bool):
        raise Refused("bad choice", f"{code!r:.40}, wanted 0, 1 or 2")
      if code == 0:
        raise Refused("tie", f"{first} and {second}")
      chosen, rejected = (first, second) if code == 1 else (second, first)
      made.append(
        convert_pair(
          dict(
            prompt=row.get("question"),
            chosen=row.get(chosen),
            rejected=row.get(rejected),
          )
        )
      )
    except Refused as error:
      made.append(error)
  return made


SCORED = Schema(
  "scored_answers",
  lambda row: (
    isinstance(row.get("prompt"), (str, list))
    and isinstance(row.get("answers"), list)
    and isinstance(row.get("scores"), list)
  ),
  convert_scored,
  "pairs",
  many=True,
  wants=("prompt", "answers", "scores"),
  roles=dict(
    prompt="the prompt",
    system="the system turn",
    id="the row's id",
    answers="the answers",
    scores="their scores",
  ),
)
COMPARED = Schema(
  "fine_grained_rlhf",
  lambda row: {"question", "preference", *_PREDICTIONS} <= row.keys(),
  convert_compared,
  "pairs",
  many=True,
  wants=("question", *_PREDICTIONS, "preference"),
  roles=dict(question="the prompt", preference="which is better")
  | dict.fromkeys(_PREDICTIONS, "an answer"),
)
