"""The columns of a table of verdicts, found by name, by shape, or as given.

A layout says where an item, its two answers, the rater and the verdicts
stand. Four are known as a whole: PandaLM's raters and judge, judges shown both
orders (LLMBar, MT-bench, jaxalign's own verdicts.jsonl), AlpacaEval, and
comparisons of summaries (OpenAI). Any other is read by its columns' names:
one verdict a row, with a rater's column, or a column for each rater.
"""

from collections.abc import Iterator, Mapping, Sequence
import re
from typing import Any, NamedTuple

from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data.schemas.choices import WORDS
from jaxalign.eval.rating_codes import code_of_cell, literal

FIELDS = "item prompt first second first_text second_text rater verdict".split()
_ITEMS = (
  "item item_id question_id prompt_id instruction_id example_id sample_id "
  "pair_id qid idx index uid uuid id key".split()
)
_PROMPTS = ("instruction", "prompt", "question", "query", "input")
_RATERS = (
  "rater rater_id annotator annotator_id judge judge_id judge_name judge_model "
  "evaluator worker worker_id labeler labeller reviewer user user_id".split()
)
_VERDICTS = (
  "verdict winner choice preference preferred vote judgment judgement decision "
  "label labels gold preference_strength overall_preference gpt_result".split()
)
_PEOPLE = r"annotator|rater|human|coder|expert|worker|labell?er|reviewer"
_COLUMN = re.compile(
  rf"(?:{_PEOPLE}|judge|evaluator)[ _-]?(?:\d+|[a-z])", re.IGNORECASE
)
_NAMES = "model generator system policy llm assistant".split()
_NAME_PAIRS = [("first", "second"), ("first_model", "second_model")]
_TEXTS = (
  "response output answer completion conversation reply generation candidate "
  "summary text humanref".split()
)
_TEXT_PAIRS = [
  ("first_text", "second_text"),
  ("first_answer", "second_answer"),
  ("first_response", "second_response"),
  ("ours", "theirs"),
  ("chosen", "rejected"),
]
_ONE_TWO = {"1": "first", "2": "second"}
_SIGNED = {
  str(i): "first" if i < 0 else "second" if i else "tie" for i in range(-3, 4)
}
_SEEN = 1000  # rows whose columns are looked at
_LONG = 60  # characters, above which a model's name is an answer's text

Rows = Sequence[dict]
Fields = Mapping[str, str]


class VerdictColumn(NamedTuple):
  """One column that holds verdicts."""

  path: str
  rater: str  # "" where another column names the rater
  role: str = ""  # "judge", "human", or not known
  swapped: bool = False  # shown with the second answer first
  identity: bool = False  # means an answer, in whatever order it was shown


class TableLayout(NamedTuple):
  """Where everything stands; paths are as of `value_at`."""

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


def _find(row: Any, path: str) -> tuple[bool, Any]:
  """Whether a row has a place of this path, and what stands there."""
  if isinstance(row, dict) and path in row:
    return True, row[path]
  for step in path.split("."):
    number = isinstance(row, list) and step.isdecimal()
    try:
      row = row[int(step) if number else step]
    except (KeyError, IndexError, TypeError, ValueError):
      return False, None
  return True, row


def value_at(row: Any, path: str) -> Any:
  """The value at a dotted path ("info.id", "summaries.0.text"), or None."""
  return _find(row, path)[1]


def parse_fields(text: str | None) -> dict[str, str]:
  """The value of --fields, a dict of FIELDS to columns."""
  if text is None:
    return {}
  value = literal(text)
  if (
    not isinstance(value, dict)
    or not value.keys() <= set(FIELDS)
    or not all(isinstance(v, str) and v for v in value.values())
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


# Columns by their names.


def _two(
  columns: Sequence[str], stems: Sequence[str], pairs: list[tuple[str, str]]
) -> tuple[str, str] | None:
  """Two columns of one stem that end in 1 and 2, or in a and b; or a pair."""
  plain = {re.sub(r"[ _-]", "", c).casefold(): c for c in reversed(columns)}
  for stem in stems:
    for a, b in ("12", "ab", "01"):
      if stem + a in plain and stem + b in plain:
        return plain[stem + a], plain[stem + b]
  return next((two for two in pairs if set(two) <= set(columns)), None)


def _answers(
  columns: Sequence[str], rows: Rows, fields: Fields
) -> dict[str, Any]:
  """The names and the texts of the two answers."""
  names = _two(columns, _NAMES, _NAME_PAIRS)
  texts = _two(columns, _TEXTS, _TEXT_PAIRS)
  if "first_text" in fields:
    texts = fields["first_text"], fields["second_text"]
  if "first" in fields:
    names = fields["first"], fields["second"]
  elif names and not texts:
    long = [
      isinstance(v := value_at(row, name), str) and len(v) > _LONG
      for row in rows
      for name in names
    ]
    if 2 * sum(long) > len(long):  # no model is called by a paragraph
      names, texts = None, names
  return dict(names=names, texts=texts)


def _codes(rows: Rows, path: str) -> set[str]:
  return {code_of_cell(value_at(row, path)) for row in rows} - {None}


def _certain(rows: Rows, path: str) -> bool:
  """Whether a column holds words with a certain meaning, and both sides."""
  sides = {WORDS.get(c) for c in _codes(rows, path)}
  return {"first", "second"} <= sides and None not in sides


def _few(rows: Rows, path: str) -> bool:
  """Whether a column has so few different values that it may be a rater's."""
  codes = _codes(rows, path)
  return 1 < len(codes) < 6 and not any(c.startswith("a ") for c in codes)


def _repeats(rows: Rows, path: str) -> tuple[bool, bool]:
  """Whether a column has several values, and whether one comes twice."""
  found = [
    repr(v)[:500] for row in rows if (v := value_at(row, path)) is not None
  ]
  return len(set(found)) > 1, len(set(found)) < len(found)


def _first(columns: Sequence[str], names: Sequence[str]) -> str:
  plain = {c.casefold(): c for c in reversed(columns)}
  return next((plain[n] for n in names if n in plain), "")


def _item(columns: Sequence[str], fields: Fields) -> tuple[str, ...]:
  """The columns that name an item; none where the texts do."""
  if "item" in fields:
    return (fields["item"],)
  found = _first(columns, _ITEMS)
  turn = ("turn",) if "turn" in columns else ()
  return (found, *turn) if found else ()


# Layouts known as a whole.


def _both(first: str, second: str, identity: bool = False):
  """A judge's columns of the two orders."""
  column = VerdictColumn(first, "", "judge", False, identity)
  return column, column._replace(path=second, swapped=True)


def _layout(name: str, columns: tuple = (), **paths: Any) -> TableLayout:
  """A layout whose paths are given as text; a judge's is forgiving."""
  paths = {
    k: tuple(v.split()) if isinstance(v, str) and k != "rater" else v
    for k, v in paths.items()
  }
  return TableLayout(name, columns, forgiving="judge" in name, **paths)


_ORDERS = "a judge's verdicts in both orders ({})".format
# By columns that all have to be there. A rater without a name is the file's.
_KNOWN = {
  "results output_1 output_2": _layout(  # columns: as many as there are results
    _ORDERS("LLMBar"), texts="output_1 output_2", prompt="input", known=_ONE_TWO
  ),
  "question_id model_1 model_2 g1_winner g2_winner": _layout(
    _ORDERS("MT-bench"),
    _both("g1_winner", "g2_winner", True),
    item="question_id turn",
    names="model_1 model_2",
    rater="judge",
  ),
  "id prompt ours theirs verdicts": _layout(
    _ORDERS("verdicts.jsonl"),
    _both("verdicts.0", "verdicts.1"),
    item="id",
    prompt="prompt",
    texts="ours theirs",
  ),
  "summaries choice worker": _layout(
    "comparisons of summaries (OpenAI)",
    (VerdictColumn("choice", "", "human"),),
    item="info.id",
    prompt="info.post",
    rater="worker",
    texts="summaries.0.text summaries.1.text",
    known={"0": "first", "1": "second"},
  ),
  "gpt_result idx": _layout(
    "a judge's verdicts (PandaLM)",
    (VerdictColumn("gpt_result", "", "judge"),),
    item="idx",
    known=_ONE_TWO,
  ),
}
_SWAPS = {"swap = False", "swap = True"}


def _llmbar_columns(
  columns: Sequence[str], rows: Rows
) -> tuple[VerdictColumn, ...]:
  """Both orders of every result, and the label; none in other tables."""
  most = 0
  for results in (value_at(row, "results") for row in rows):
    both = lambda r: isinstance(r, dict) and r.keys() & _SWAPS
    if isinstance(results, list) and any(map(both, results)):
      most = max(most, len(results))
  path = "results.{}.swap = {}.winner".format
  found = [
    column
    for i in range(min(most, 100))
    for column in _both(path(i, False), path(i, True), True)
  ]
  if found and "label" in columns:
    found.append(VerdictColumn("label", "label", "human"))
  return tuple(found)


def _known_layout(
  columns: Sequence[str], rows: Rows, stem: str
) -> TableLayout | None:
  """A layout known as a whole, that has all its columns."""
  stem = re.sub(r"^judge[-_]|-testset-v1$", "", stem)
  for names, layout in _KNOWN.items():
    if not set(names.split()) <= set(columns):
      continue
    found = layout.columns or _llmbar_columns(columns, rows)
    rater = layout.rater if layout.rater in columns else ""
    if not rater:
      found = tuple(c._replace(rater=c.rater or stem) for c in found)
    if found:
      item = [c for c in layout.item if c != "turn" or c in columns]
      return layout._replace(columns=found, rater=rater, item=tuple(item))
  return None


def _with_known_codes(
  layout: TableLayout, columns: Sequence[str], rows: Rows
) -> TableLayout:
  """The layout with codes that its columns make certain."""
  paths = [c.path for c in layout.columns]
  is_known = lambda name, known: layout._replace(
    name=f"{layout.name} ({name})", known=known
  )
  if layout.texts == ("response1", "response2"):
    codes = set().union(*(_codes(rows, path) for path in paths))
    annotators = all(re.fullmatch(r"annotator\d+", path) for path in paths)
    if annotators and "2" in codes and codes <= {"0", "1", "2"}:
      return is_known("PandaLM", _ONE_TWO | {"0": "tie"})
  if layout.texts == ("output_1", "output_2"):
    if {"generator_1", "generator_2", "preference"} <= set(columns):
      return is_known("AlpacaEval", _ONE_TWO | {"0": "tie", "1.5": "tie"})
  strengths = (["preference_strength"], ["overall_preference"])
  if layout.texts and paths in strengths:
    return is_known("HelpSteer", _SIGNED)
  return layout


def detect(
  rows: Rows,
  file: str,
  stem: str,
  raters: Sequence[str] = (),
  fields: Fields = {},
) -> TableLayout:
  """The layout of a file.

  Args:
    rows: all that could be read, at least one.
    file: for messages.
    stem: what a rater is called whom no column names.
    raters: columns that hold verdicts, as the user says.
    fields: what the user says of the other columns, see `parse_fields`.

  Raises:
    DataError: no layout fits.
  """
  some = rows[:_SEEN]
  columns = list(dict.fromkeys(c for row in some for c in row))
  if not raters and not fields:
    if found := _known_layout(columns, some, stem):
      return found
  where = _answers(columns, some, fields)
  prompt = tuple(c for c in _PROMPTS if c in columns)
  where["prompt"] = (fields["prompt"],) if "prompt" in fields else prompt
  used = {c for two in where.values() for c in two or ()}
  free = [c for c in columns if c not in used]
  rater = fields.get("rater") or _first(free, _RATERS)
  verdict = fields.get("verdict") or _first(free, _VERDICTS)
  if rater and verdict and not raters:
    may_be_item = free
    if (where["prompt"] or where["texts"]) and _repeats(rows, rater)[0]:
      # Several raters and no value twice: the number of the row, not an item.
      may_be_item = [
        c for c in free if c.casefold() not in _ITEMS or _repeats(rows, c)[1]
      ]
    item = _item(may_be_item, fields)
    column = (VerdictColumn(verdict, ""),)
    layout = TableLayout(
      "one verdict a row", column, item=item, rater=rater, **where
    )
    return _with_known_codes(layout, columns, rows)
  item = _item(free, fields)
  free = [c for c in free if c not in item]
  chosen = (
    list(raters)
    or ([verdict] if "verdict" in fields else [])
    or [c for c in free if _COLUMN.fullmatch(c)]
    or [c for c in free if c == verdict or _certain(some, c)]
  )
  if not chosen:
    likely = [c for c in free if _few(some, c)][:6]
    raise DataError(
      f"{file}: no verdicts found in the columns {_listed(columns)}; wanted "
      f"a rater ({', '.join(_RATERS[:3])}, ...) and a verdict "
      f"({', '.join(_VERDICTS[:3])}, ...), or a column for each rater "
      "(annotator1, annotator2, ...); name them with --raters="
      f"{','.join(likely) or 'a,b'} or "
      "--fields=\"{'rater': ..., 'verdict': ...}\""
    )
  by_file = lambda c: c.casefold() in _VERDICTS and not raters
  layout = TableLayout(
    "one row an item, a column for each rater",
    tuple(_column(c, stem if by_file(c) else c) for c in chosen),
    item=item,
    **where,
  )
  return _with_known_codes(layout, columns, rows)


def _column(path: str, name: str) -> VerdictColumn:
  if path in ("label", "gold"):
    return VerdictColumn(path, path, "human")
  if re.match(_PEOPLE, path, re.IGNORECASE):
    return VerdictColumn(path, name, "human")
  judge = path.casefold().startswith("judge")
  return VerdictColumn(path, name, "judge" if judge else "")


def _listed(columns: Sequence[str], limit: int = 12) -> str:
  more = len(columns) - limit
  text = ", ".join(f"{c!r:.60}" for c in columns[:limit]) or "none"
  return text + (f" and {more:,} more" if more > 0 else "")


def layout_lines(layout: TableLayout, rows: Rows) -> list[str]:
  """What each column became, in lines."""
  item, texts, names = layout.item, layout.texts, layout.names
  what = " and ".join(item) or "the number of the row"
  if not item and layout.prompt:
    what = f"the text of {', '.join(layout.prompt)}"
  elif not item and texts:
    what = "the texts of the answers"
  answers = [f"models named by {' and '.join(names)}"] if names else []
  text = f"texts in {' and '.join(texts)}" if texts else ""
  answers.append(text or "no texts, so no length bias")
  raters = dict.fromkeys(
    f"{c.path} as {c.rater}" if c.rater not in ("", c.path) else c.path
    for c in layout.columns
  )
  by = f", raters named by {layout.rater}" if layout.rater else ""
  paths = [*item, *layout.prompt, *(names or ()), *(texts or ()), layout.rater]
  paths += [c.path for c in layout.columns]
  used = {p for path in paths for p in (path, path.split(".")[0])}
  columns = dict.fromkeys(c for row in rows[:_SEEN] for c in row)
  unused = [c for c in columns if c not in used]
  return [
    f"item: {what}",
    f"answers: {'; '.join(answers)}",
    f"verdicts in {_listed(list(raters))}{by}",
    *([f"not used: {_listed(unused)}"] if unused else []),
  ]


def cells(
  layout: TableLayout, row: dict
) -> Iterator[tuple[VerdictColumn, str, Any]]:
  """(column, rater, value) of every cell of a row that may hold a verdict.

  A cell that is not there is passed over where one row holds one order or
  one run and not another; an empty one is handed on as None.
  """
  rater = value_at(row, layout.rater) if layout.rater else ""
  if isinstance(rater, list):
    rater = " ".join(map(str, rater))
  rater = str("" if rater is None else rater).strip()[:200]
  for column in layout.columns:
    there, value = _find(row, column.path)
    if there or "." not in column.path:
      yield column, column.rater or rater, value
