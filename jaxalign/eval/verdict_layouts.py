"""The columns of a table of verdicts, found by name, by shape, or as told.

A layout says where an item, its two answers, the rater and the verdicts
stand. Four are known as a whole: PandaLM's raters and judge, judges shown both
orders (LLMBar, MT-bench, jaxalign's own verdicts.jsonl), AlpacaEval, and
comparisons of summaries (OpenAI). Any other is read by its columns' names:
one verdict a row, with a rater's column, or a column for each rater.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
import re
from typing import Any, NamedTuple

from jaxalign.errors import ConfigError, DataError
from jaxalign.eval import verdict_codes as codes

FIELDS = (
  "item",
  "prompt",
  "first",
  "second",
  "first_text",
  "second_text",
  "rater",
  "verdict",
)
_ITEMS = (
  "item",
  "item_id",
  "question_id",
  "prompt_id",
  "instruction_id",
  "example_id",
  "sample_id",
  "pair_id",
  "qid",
  "idx",
  "index",
  "uid",
  "uuid",
  "id",
  "key",
)
_PROMPTS = ("instruction", "prompt", "question", "query", "input")
_RATERS = (
  "rater",
  "rater_id",
  "annotator",
  "annotator_id",
  "judge",
  "judge_id",
  "judge_name",
  "judge_model",
  "evaluator",
  "worker",
  "worker_id",
  "labeler",
  "labeller",
  "reviewer",
  "user",
  "user_id",
)
_VERDICTS = (
  "verdict",
  "winner",
  "choice",
  "preference",
  "preferred",
  "vote",
  "judgment",
  "judgement",
  "decision",
  "label",
  "labels",
  "gold",
  "preference_strength",
  "overall_preference",
  "gpt_result",
)
_TRUTH = ("label", "gold")
_PEOPLE = r"annotator|rater|human|coder|expert|worker|labell?er|reviewer"
_COLUMN = re.compile(
  rf"(?:{_PEOPLE}|judge|evaluator)[ _-]?(?:\d+|[a-z])", re.IGNORECASE
)
_NAMES = ("model", "generator", "system", "policy", "llm", "assistant")
_TEXTS = (
  "response",
  "output",
  "answer",
  "completion",
  "conversation",
  "reply",
  "generation",
  "candidate",
  "summary",
  "text",
  "humanref",
)
_ENDS = (("1", "2"), ("a", "b"), ("0", "1"))
_SIGNED = {
  str(i): "first" if i < 0 else "second" if i else "tie" for i in range(-3, 4)
}
_SEEN = 1000  # rows whose columns are looked at
_LONG = 60  # characters, above which a model's name is an answer's text


class VerdictColumn(NamedTuple):
  """One column that holds verdicts."""

  path: str
  rater: str  # "" where another column names the rater
  role: str = ""  # "judge", "human", or not known
  swapped: bool = False  # shown with the second answer first
  identity: bool = False  # means an answer, in whatever order it was shown


class TableLayout(NamedTuple):
  """Where everything stands; paths are as of `at`."""

  name: str
  columns: tuple[VerdictColumn, ...]
  item: tuple[str, ...] = ()  # none: the texts are the item
  prompt: tuple[str, ...] = ()
  names: tuple[str, str] | None = None
  texts: tuple[str, str] | None = None
  rater: str = ""
  known: Mapping[str, str] = {}  # code -> side, of a known layout
  forgiving: bool = False  # what is no known word is an unparsable verdict

  @property
  def answers(self) -> tuple[str, str]:
    """What the two answers are called in words."""
    return self.texts or self.names or ("the first answer", "the second answer")


def at(row: Any, path: str) -> Any:
  """The value at a dotted path ("info.id", "summaries.0.text"), or None."""
  if isinstance(row, dict) and path in row:
    return row[path]
  for step in path.split("."):
    if isinstance(row, dict):
      row = row.get(step)
    elif (
      isinstance(row, list)
      and step.isdecimal()
      and len(step) < 9
      and (int(step) < len(row))
    ):
      row = row[int(step)]
    else:
      return None
  return row


def parse_fields(text: str | None) -> dict[str, str]:
  """The value of --fields, a dict of FIELDS to columns."""
  if text is None:
    return {}
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    value = None
  if (
    not isinstance(value, dict)
    or not value.keys() <= set(FIELDS)
    or not (all(isinstance(v, str) and v for v in value.values()))
  ):
    raise ConfigError(
      f"--fields={text[:80]!r}, wanted a dict such as "
      "\"{'item': 'question', 'verdict': 'vote'}\" with keys "
      f"of {', '.join(FIELDS)}"
    )
  for a, b in (("first", "second"), ("first_text", "second_text")):
    if (a in value) != (b in value):
      raise ConfigError(f"--fields names one of {a} and {b}, wanted both")
  return value


def _both_ends(
  columns: Sequence[str], stems: Sequence[str]
) -> tuple[str, str] | None:
  """Two columns of one stem that end in 1 and 2, or in a and b."""
  plain = {re.sub(r"[ _-]", "", c).casefold(): c for c in reversed(columns)}
  for stem in stems:
    for ends in _ENDS:
      found = [plain.get(stem + end) for end in ends]
      if all(found):
        return found[0], found[1]
  return None


def _first(columns: Sequence[str], names: Sequence[str]) -> str:
  plain = {c.casefold(): c for c in reversed(columns)}
  return next((plain[n] for n in names if n in plain), "")


def _different(rows: Sequence[dict], path: str) -> tuple[int, int]:
  """How many different values a column has, and how many in all."""
  found = [repr(v)[:500] for row in rows if (v := at(row, path)) is not None]
  return len(set(found)), len(found)


def _answers(
  columns: Sequence[str], rows: Sequence[dict], fields: Mapping[str, str]
) -> dict[str, Any]:
  """The names and the texts of the two answers."""
  names = (
    (fields["first"], fields["second"])
    if "first" in fields
    else (_both_ends(columns, _NAMES))
  )
  texts = (
    (fields["first_text"], fields["second_text"])
    if "first_text" in fields
    else _both_ends(columns, _TEXTS)
  )
  for two in (("first", "second"), ("first_model", "second_model")):
    if names is None and set(two) <= set(columns):
      names = two
  for two in (
    ("first_text", "second_text"),
    ("first_answer", "second_answer"),
    ("first_response", "second_response"),
    ("ours", "theirs"),
    ("chosen", "rejected"),
  ):
    if texts is None and set(two) <= set(columns):
      texts = two
  if names and not texts and "first" not in fields:
    long = [
      isinstance(v, str) and len(v) > _LONG
      for row in rows
      for v in (at(row, names[0]), at(row, names[1]))
    ]
    if 2 * sum(long) > len(long):  # no model is called by a paragraph
      names, texts = None, names
  return dict(names=names, texts=texts)


def _certain(rows: Sequence[dict], path: str) -> bool:
  """Whether a column holds words with a certain meaning, and both sides."""
  found = {codes.code(at(row, path)) for row in rows} - {None}
  sides = {codes.side(c) for c in found}
  return {"first", "second"} <= sides and None not in sides


def _few(rows: Sequence[dict], path: str) -> bool:
  """Whether a column has so few different values that it may be a rater's."""
  found = {codes.code(at(row, path)) for row in rows} - {None}
  return 1 < len(found) < 6 and not any(c.startswith("a ") for c in found)


def _item(
  columns: Sequence[str],
  rows: Sequence[dict],
  rater: str,
  by_text: bool,
  fields: Mapping[str, str],
) -> tuple[str, ...]:
  """The columns that name an item; none where the texts do.

  Args:
    columns: that may.
    rows: all.
    rater: the column that names raters; "" where a row is an item.
    by_text: whether texts could name it.
    fields: as the user says.
  """
  if "item" in fields:
    return (fields["item"],)
  plain = {c.casefold(): c for c in reversed(columns)}
  found = [plain[n] for n in _ITEMS if n in plain]
  if rater and by_text and _different(rows, rater)[0] > 1:
    # Several raters and no value twice: the number of the row, not an item.
    counts = {c: _different(rows, c) for c in found}
    found = [c for c in found if counts[c][0] < counts[c][1]]
  turn = tuple(c for c in ("turn",) if c in columns)
  return (found[0], *turn) if found else ()


def _is_both_orders(row: Any) -> bool:
  results = at(row, "results")
  return isinstance(results, list) and any(
    isinstance(r, dict) and {"swap = False", "swap = True"} & r.keys()
    for r in results
  )


def _known(
  columns: Sequence[str], rows: Sequence[dict], stem: str
) -> TableLayout | None:
  """A layout known as a whole."""
  has = lambda *names: set(names) <= set(columns)
  if has("results", "output_1", "output_2") and any(map(_is_both_orders, rows)):
    most = max(len(r["results"]) for r in rows if _is_both_orders(r))
    name = re.sub(r"^judge[-_]", "", stem)
    found = [
      VerdictColumn(
        f"results.{i}.swap = {swap}.winner", name, "judge", swap, True
      )
      for i in range(min(most, 100))
      for swap in (False, True)
    ]
    if "label" in columns:
      found.append(VerdictColumn("label", "label", "human"))
    return TableLayout(
      "a judge's verdicts in both orders (LLMBar)",
      tuple(found),
      texts=("output_1", "output_2"),
      prompt=("input",),
      known={"1": "first", "2": "second"},
      forgiving=True,
    )
  if has("question_id", "model_1", "model_2", "g1_winner", "g2_winner"):
    rater = "judge" if "judge" in columns else ""
    return TableLayout(
      "a judge's verdicts in both orders (MT-bench)",
      (
        VerdictColumn("g1_winner", "" if rater else stem, "judge", False, True),
        VerdictColumn("g2_winner", "" if rater else stem, "judge", True, True),
      ),
      item=("question_id", *(("turn",) if "turn" in columns else ())),
      names=("model_1", "model_2"),
      rater=rater,
      forgiving=True,
    )
  if has("id", "prompt", "ours", "theirs", "verdicts"):
    return TableLayout(
      "a judge's verdicts in both orders (verdicts.jsonl)",
      (
        VerdictColumn("verdicts.0", stem, "judge"),
        VerdictColumn("verdicts.1", stem, "judge", True),
      ),
      item=("id",),
      prompt=("prompt",),
      texts=("ours", "theirs"),
      forgiving=True,
    )
  if has("summaries", "choice", "worker"):
    return TableLayout(
      "comparisons of summaries (OpenAI)",
      (VerdictColumn("choice", "", "human"),),
      item=("info.id",),
      prompt=("info.post",),
      rater="worker",
      texts=("summaries.0.text", "summaries.1.text"),
      known={"0": "first", "1": "second"},
    )
  if has("gpt_result", "idx"):
    name = stem.removesuffix("-testset-v1")
    return TableLayout(
      "a judge's verdicts (PandaLM)",
      (VerdictColumn("gpt_result", name, "judge"),),
      item=("idx",),
      known={"1": "first", "2": "second"},
      forgiving=True,
    )
  return None


def _known_codes(
  columns: Sequence[str],
  rows: Sequence[dict],
  verdicts: Sequence[str],
  layout: TableLayout,
) -> TableLayout:
  """Codes that the columns of a layout make certain."""
  found = {codes.code(at(row, path)) for row in rows for path in verdicts}
  if (
    layout.texts == ("response1", "response2")
    and {"0", "1", "2"} >= found - {None}
    and "2" in found
    and all(re.fullmatch(r"annotator\d+", v) for v in verdicts)
  ):
    return layout._replace(
      name=f"{layout.name} (PandaLM)",
      known={"0": "tie", "1": "first", "2": "second"},
    )
  if {"generator_1", "generator_2", "preference"} <= set(
    columns
  ) and layout.texts == ("output_1", "output_2"):
    return layout._replace(
      name=f"{layout.name} (AlpacaEval)",
      known={"0": "tie", "1": "first", "1.5": "tie", "2": "second"},
    )
  if layout.texts and list(verdicts) in (
    ["preference_strength"],
    ["overall_preference"],
  ):
    return layout._replace(name=f"{layout.name} (HelpSteer)", known=_SIGNED)
  return layout


def detect(
  rows: Sequence[dict],
  file: str,
  stem: str,
  raters: Sequence[str] = (),
  fields: Mapping[str, str] = {},
) -> TableLayout:
  """The layout of a file.

  Args:
    rows: all that could be read, at least one.
    file: for messages.
    stem: what a rater is called whom no column names.
    raters: columns that hold verdicts, as the user says.
    fields: what the user says of the other columns, see `parse_fields`.

  Raises:
    ConfigError: a column that the user names is not there.
    DataError: no layout fits.
  """
  columns = list(dict.fromkeys(c for row in rows[:_SEEN] for c in row))
  some = rows[:_SEEN]
  for name in (*fields.values(), *raters):
    if all(at(row, name) is None for row in rows):
      raise ConfigError(
        f"{file} has no column {name!r}; it has "
        f"{_names(columns)}; set --raters or --fields"
      )
  if not raters and not fields:
    found = _known(columns, some, stem)
    if found:
      return found
  answers = _answers(columns, some, fields)
  prompt = (
    (fields["prompt"],)
    if "prompt" in fields
    else tuple(c for c in _PROMPTS if c in columns)
  )
  used = {*prompt, *(c for two in answers.values() if two for c in two)}
  free = [c for c in columns if c not in used]
  rater = fields.get("rater") or _first(free, _RATERS)
  verdict = fields.get("verdict") or _first(free, _VERDICTS)
  if rater and verdict and not raters:
    layout = TableLayout(
      "one verdict a row",
      (VerdictColumn(verdict, ""),),
      rater=rater,
      prompt=prompt,
      **answers,
      item=_item(free, rows, rater, bool(prompt or answers["texts"]), fields),
    )
    return _known_codes(columns, rows, [verdict], layout)
  taken = _item(free, rows, "", False, fields)
  free = [c for c in free if c not in taken]
  chosen = list(raters)
  if not chosen and "verdict" in fields:
    chosen = [verdict]
  chosen = chosen or [c for c in free if _COLUMN.fullmatch(c)]
  if not chosen:
    chosen = [c for c in free if c == verdict or _certain(some, c)]
  if not chosen:
    likely = [c for c in free if _few(some, c)]
    raise DataError(
      f"{file}: no verdicts found in the columns {_names(columns)}; wanted "
      f"a rater ({', '.join(_RATERS[:3])}, ...) and a verdict "
      f"({', '.join(_VERDICTS[:3])}, ...), or a column for each rater "
      "(annotator1, annotator2, ...); name them with --raters="
      f"{','.join(likely[:6]) or 'a,b'} or "
      "--fields=\"{'rater': ..., 'verdict': ...}\""
    )
  layout = TableLayout(
    "one row an item, a column for each rater",
    tuple(
      _column(c, stem if c.casefold() in _VERDICTS and not raters else c)
      for c in chosen
    ),
    prompt=prompt,
    item=taken,
    **answers,
  )
  return _known_codes(columns, rows, chosen, layout)


def _column(path: str, name: str) -> VerdictColumn:
  if path in _TRUTH:
    return VerdictColumn(path, path, "human")
  role = (
    "human"
    if re.match(_PEOPLE, path, re.IGNORECASE)
    else ("judge" if path.casefold().startswith("judge") else "")
  )
  return VerdictColumn(path, name, role)


def _names(columns: Sequence[str], limit: int = 12) -> str:
  more = len(columns) - limit
  return (", ".join(f"{c!r:.60}" for c in columns[:limit]) or "none") + (
    f" and {more:,} more" if more > 0 else ""
  )


def described(layout: TableLayout, rows: Sequence[dict]) -> list[str]:
  """What each column became, in lines."""
  columns = list(dict.fromkeys(c for row in rows[:_SEEN] for c in row))
  raters = list(
    dict.fromkeys(
      f"{c.path} as {c.rater}" if c.rater and c.rater != c.path else c.path
      for c in layout.columns
    )
  )
  out = [
    "item: "
    + (
      " and ".join(layout.item)
      or (
        f"the text of {', '.join(layout.prompt)}"
        if layout.prompt
        else "the texts of the answers"
        if layout.texts
        else "the number of the row"
      )
    )
  ]
  out.append(
    "answers: "
    + "; ".join(
      [
        *(
          [f"models named by {' and '.join(layout.names)}"]
          if layout.names
          else []
        ),
        *(
          [f"texts in {' and '.join(layout.texts)}"]
          if layout.texts
          else ["no texts, so no length bias"]
        ),
      ]
    )
  )
  out.append(
    "verdicts in "
    + _names(raters)
    + (f", raters named by {layout.rater}" if layout.rater else "")
  )
  paths = [
    *layout.item,
    *layout.prompt,
    *(layout.names or ()),
    *(layout.texts or ()),
    layout.rater,
    *(c.path for c in layout.columns),
  ]
  used = {p for path in paths for p in (path, path.split(".")[0])}
  unused = [c for c in columns if c not in used]
  return out + ([f"not used: {_names(unused)}"] if unused else [])


def verdicts(
  layout: TableLayout, row: dict
) -> Iterator[tuple[VerdictColumn, str, Any]]:
  """(column, rater, value) of every cell of a row that may hold a verdict.

  A cell that is not there is passed over where one row holds one order or
  one run and not another; an empty one is handed on as None.
  """
  given = at(row, layout.rater) if layout.rater else ""
  if isinstance(given, list):
    given = " ".join(str(g) for g in given)
  for column in layout.columns:
    head, _, last = column.path.rpartition(".")
    if head and column.path not in row:
      holder = at(row, head)
      if not (
        last in holder
        if isinstance(holder, dict)
        else isinstance(holder, list) and int(last) < len(holder)
        if last.isdecimal()
        else False
      ):
        continue
    yield (
      column,
      column.rater or str("" if given is None else given).strip()[:200],
      at(row, column.path),
    )
