"""The columns of a table of verdicts: by name, by shape, or as given.

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
_ROWS = 1000  # whose columns are looked at
_LONG = 60  # characters, above which a model's name is an answer's text
_ABSENT = object()

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


def value_at(row: Any, path: str, default: Any = None) -> Any:
  """The value at a dotted path ("info.id", "summaries.0.text")."""
  if isinstance(row, dict) and path in row:
    return row[path]
  for step in path.split("."):
    number = isinstance(row, list) and step.isdecimal()
    try:
      row = row[int(step) if number else step]
    except (KeyError, IndexError, TypeError, ValueError):
      return default
  return row


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


# Layouts known as a whole.


def _both(first: str, second: str, identity: bool = False):
  """A judge's columns of the two orders."""
  column = VerdictColumn(first, "", "judge", False, identity)
  return column, column._replace(path=second, swapped=True)


# By columns that all have to be there. A rater without a name is the file's.
_KNOWN = {
  ("results", "output_1", "output_2"): TableLayout(
    "a judge's verdicts in both orders (LLMBar)",
    (),  # as many as there are results, see `_llmbar_columns`
    prompt=("input",),
    texts=("output_1", "output_2"),
    known=_ONE_TWO,
    forgiving=True,
  ),
  ("question_id", "model_1", "model_2", "g1_winner", "g2_winner"): TableLayout(
    "a judge's verdicts in both orders (MT-bench)",
    _both("g1_winner", "g2_winner", True),
    item=("question_id", "turn"),
    names=("model_1", "model_2"),
    rater="judge",
    forgiving=True,
  ),
  ("id", "prompt", "ours", "theirs", "verdicts"): TableLayout(
    "a judge's verdicts in both orders (verdicts.jsonl)",
    _both("verdicts.0", "verdicts.1"),
    item=("id",),
    prompt=("prompt",),
    texts=("ours", "theirs"),
    forgiving=True,
  ),
  ("summaries", "choice", "worker"): TableLayout(
    "comparisons of summaries (OpenAI)",
    (VerdictColumn("choice", "", "human"),),
    item=("info.id",),
    prompt=("info.post",),
    texts=("summaries.0.text", "summaries.1.text"),
    rater="worker",
    known={"0": "first", "1": "second"},
  ),
  ("gpt_result", "idx"): TableLayout(
    "a judge's verdicts (PandaLM)",
    (VerdictColumn("gpt_result", "", "judge"),),
    item=("idx",),
    known=_ONE_TWO,
    forgiving=True,
  ),
}


def _llmbar_columns(columns: Sequence[str], rows: Rows) -> tuple:
  """Both orders of every result, and the label; none in other tables."""
  most, swaps = 0, {"swap = False", "swap = True"}
  for results in (value_at(row, "results") for row in rows):
    both = lambda r: isinstance(r, dict) and r.keys() & swaps
    if isinstance(results, list) and any(map(both, results)):
      most = max(most, len(results))
  path = "results.{}.swap = {}.winner".format
  out = [
    column
    for i in range(min(most, 100))
    for column in _both(path(i, False), path(i, True), True)
  ]
  if out and "label" in columns:
    out.append(VerdictColumn("label", "label", "human"))
  return tuple(out)


def _known_layout(columns: Sequence[str], rows: Rows, stem: str):
  """A layout known as a whole, that has all its columns; or None."""
  stem = re.sub(r"^judge[-_]|-testset-v1$", "", stem)
  for names, layout in _KNOWN.items():
    if not set(names) <= set(columns):
      continue
    verdicts = layout.columns or _llmbar_columns(columns, rows)
    rater = layout.rater if layout.rater in columns else ""
    if not rater:
      verdicts = tuple(c._replace(rater=c.rater or stem) for c in verdicts)
    if verdicts:
      item = tuple(c for c in layout.item if c != "turn" or c in columns)
      return layout._replace(columns=verdicts, rater=rater, item=item)
  return None


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


def _answers(columns: Sequence[str], rows: Rows, fields: Fields) -> dict:
  """The names and the texts of the two answers."""
  names = _two(columns, _NAMES, _NAME_PAIRS)
  texts = _two(columns, _TEXTS, _TEXT_PAIRS)
  if "first_text" in fields:
    texts = fields["first_text"], fields["second_text"]
  if "first" in fields:
    names = fields["first"], fields["second"]
  elif names and not texts:
    values = [value_at(row, name) for row in rows for name in names]
    long = [isinstance(v, str) and len(v) > _LONG for v in values]
    if 2 * sum(long) > len(long):  # no model is called by a paragraph
      names, texts = None, names
  return dict(names=names, texts=texts)


def _codes(rows: Rows, path: str) -> set[str]:
  return {code_of_cell(value_at(row, path)) for row in rows} - {None}


def _first(columns: Sequence[str], names: Sequence[str]) -> str:
  plain = {c.casefold(): c for c in reversed(columns)}
  return next((plain[n] for n in names if n in plain), "")


def _item(columns: Sequence[str], fields: Fields) -> tuple[str, ...]:
  """The columns that name an item; none where the texts do."""
  if "item" in fields:
    return (fields["item"],)
  name = _first(columns, _ITEMS)
  return (name, *(["turn"] if "turn" in columns else [])) if name else ()


def _with_known_codes(
  layout: TableLayout, columns: Sequence[str], rows: Rows
) -> TableLayout:
  """The layout with codes that its columns make certain."""
  paths, name, known = [c.path for c in layout.columns], "", {}
  if layout.texts == ("response1", "response2"):
    codes = set().union(*(_codes(rows, path) for path in paths))
    annotators = all(re.fullmatch(r"annotator\d+", path) for path in paths)
    if annotators and "2" in codes and codes <= {"0", "1", "2"}:
      name, known = "PandaLM", _ONE_TWO | {"0": "tie"}
  elif layout.texts == ("output_1", "output_2"):
    if {"generator_1", "generator_2", "preference"} <= set(columns):
      name, known = "AlpacaEval", _ONE_TWO | {"0": "tie", "1.5": "tie"}
  if layout.texts and not name:
    if paths in (["preference_strength"], ["overall_preference"]):
      name, known = "HelpSteer", _SIGNED
  if not name:
    return layout
  return layout._replace(name=f"{layout.name} ({name})", known=known)


def _rater_columns(
  file: str, columns: Sequence[str], free: Sequence[str], rows: Rows, verdict
) -> list[str]:
  """Columns that hold verdicts, by their names or by the words in them."""
  if named := [c for c in free if _COLUMN.fullmatch(c)]:
    return named
  codes = {c: _codes(rows, c) for c in free}
  sides = {c: {WORDS.get(code) for code in codes[c]} for c in free}
  certain = lambda c: {"first", "second"} <= sides[c] and None not in sides[c]
  if chosen := [c for c in free if c == verdict or certain(c)]:
    return chosen
  of_few = lambda s: 1 < len(s) < 6 and not any(x.startswith("a ") for x in s)
  likely = [c for c in free if of_few(codes[c])][:6]
  raise DataError(
    f"{file}: no verdicts in the columns {_listed(columns)}; wanted "
    f"a rater ({', '.join(_RATERS[:3])}, ...) and a verdict "
    f"({', '.join(_VERDICTS[:3])}, ...), or a column for each rater "
    "(annotator1, annotator2, ...); name them with --raters="
    f"{','.join(likely) or 'a,b'} or "
    "--fields=\"{'rater': ..., 'verdict': ...}\""
  )


def detect(
  rows: Rows, file: str, stem: str, raters: Sequence[str], fields: Fields
) -> TableLayout:
  """The layout of a file.

  Args:
    rows: all that could be read, at least one.
    file: for messages.
    stem: name of a rater whom no column names.
    raters: columns that hold verdicts, given by the user.
    fields: other columns given by the user, see `parse_fields`.

  Raises:
    DataError: no layout fits.
  """
  some = rows[:_ROWS]
  columns = list(dict.fromkeys(c for row in some for c in row))
  if not raters and not fields:
    if layout := _known_layout(columns, some, stem):
      return layout
  where = _answers(columns, some, fields)
  prompt = tuple(c for c in _PROMPTS if c in columns)
  where["prompt"] = (fields["prompt"],) if "prompt" in fields else prompt
  used = {c for two in where.values() for c in two or ()}
  free = [c for c in columns if c not in used]
  rater = fields.get("rater") or _first(free, _RATERS)
  verdict = fields.get("verdict") or _first(free, _VERDICTS)
  if rater and verdict and not raters:
    name, verdicts = "one verdict a row", [VerdictColumn(verdict, "")]
    values = {
      c: [repr(v)[:500] for row in some if (v := value_at(row, c)) is not None]
      for c in [rater, *(c for c in free if c.casefold() in _ITEMS)]
    }
    repeats = lambda c: len(set(values[c])) < len(values[c])
    if (where["prompt"] or where["texts"]) and len(set(values[rater])) > 1:
      # Several raters and no value twice: the number of the row, not an item.
      free = [c for c in free if c.casefold() not in _ITEMS or repeats(c)]
    item = _item(free, fields)
  else:
    name, rater = "one row an item, a column for each rater", ""
    item = _item(free, fields)
    chosen = list(raters) or [verdict] * ("verdict" in fields)
    if not chosen:
      free = [c for c in free if c not in item]
      chosen = _rater_columns(file, columns, free, some, verdict)
    by_file = lambda c: c.casefold() in _VERDICTS and not raters
    verdicts = [_column(c, stem if by_file(c) else c) for c in chosen]
  layout = TableLayout(name, tuple(verdicts), item=item, rater=rater, **where)
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
  columns = dict.fromkeys(c for row in rows[:_ROWS] for c in row)
  unused = [c for c in columns if c not in used]
  return [
    f"item: {what}",
    f"answers: {'; '.join(answers)}",
    f"verdicts in {_listed(list(raters))}{by}",
    *([f"not used: {_listed(unused)}"] if unused else []),
  ]


def verdict_cells(
  layout: TableLayout, row: dict
) -> Iterator[tuple[VerdictColumn, str, Any]]:
  """(column, rater, value) of every cell of a row that may hold a verdict.

  A cell that is not there is passed over where one row holds one order or
  one run and not another; an empty one is None.
  """
  rater = value_at(row, layout.rater) if layout.rater else ""
  if isinstance(rater, list):
    rater = " ".join(map(str, rater))
  rater = str("" if rater is None else rater).strip()[:200]
  for column in layout.columns:
    value = value_at(row, column.path, _ABSENT)
    if value is not _ABSENT or "." not in column.path:
      value = None if value is _ABSENT else value
      yield column, column.rater or rater, value
