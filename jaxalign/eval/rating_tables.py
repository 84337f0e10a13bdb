"""Files of raters' verdicts as one table, and how each file was read."""

import collections
from collections.abc import Mapping, Sequence
import os
import re
from typing import Any, NamedTuple

from jaxalign.core.errors import ConfigError, DataError, JaxalignError
from jaxalign.data import sources
from jaxalign.data.json_rows import Where
from jaxalign.data.schemas.choices import WORDS
from jaxalign.eval import rating_codes, rating_layouts
from jaxalign.eval.interrater import Pair, Verdict
from jaxalign.eval.rating_codes import Choice, code_of_cell, Meaning
from jaxalign.eval.rating_layouts import TableLayout, value_at, VerdictColumn

_EXAMPLES = 2  # rows shown as they were understood
_LABELS = 100  # different ones, above which a column holds no labels
_OTHER = {"first": "second", "second": "first", "tie": "tie", None: None}
_UNCLEAR = (
  "an item of several pairs of answers, and no texts or models that tell which"
)
_TWICE = "judged twice and differently, of which the first is kept"


class RatingTable(NamedTuple):
  """All verdicts of all files."""

  rows: list[Verdict]  # none where labels are compared as they stand
  votes: dict[str, dict[Pair, str]]  # those labels: rater -> pair -> label
  sizes: dict[Pair, tuple[float, float]]  # lengths in characters
  roles: dict[str, str]  # rater -> "judge" or "human", where it is known
  files: list[dict[str, Any]]  # how each was read: name, lines, refused, ...


class _Cell(NamedTuple):
  """One verdict as it stands in a file."""

  where: Where
  item: str
  names: tuple[str, str] | None
  texts: tuple[str, str] | None
  rater: str
  column: VerdictColumn
  code: str | None  # None: an empty cell


class _File(NamedTuple):
  """One file's verdicts, before it is known what their codes mean."""

  name: str
  layout: TableLayout
  rows: int
  cells: list[_Cell]
  refused: dict[str, list[Where]]
  lines: list[str]
  examples: list[tuple[dict, list[_Cell]]]  # the first rows


def rater_name(path: str) -> str:
  """The name of a rater that no column names: that of the file."""
  name = os.path.basename(path)
  return re.sub(r"(\.jsonl|\.json|\.csv|\.parquet)?(\.gz)?$", "", name) or path


def answer_text(value: Any) -> str | None:
  """An answer's text; of a conversation, the assistant's turns; else None."""
  if isinstance(value, str):
    return value
  if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
    return None
  turns = [
    m.get("content", m.get("value"))
    for m in value
    if m.get("role", m.get("from")) in ("assistant", "gpt")
  ]
  whole = turns and all(isinstance(t, str) for t in turns)
  return "\n\n".join(turns) if whole else None


def _word(value: Any) -> str:
  """An item, a model or a prompt as text; "" where there is none."""
  if value is None or isinstance(value, str):
    return (value or "").strip()
  if isinstance(value, float) and abs(value) < 1e15 and value.is_integer():
    value = int(value)
  return repr(value)


# One file.


def _words_at(row: dict, paths: Sequence[str] | None) -> list[str]:
  return [_word(value_at(row, path)) for path in paths or ()]


def _texts_at(row: dict, layout: TableLayout) -> list[str | None]:
  return [answer_text(value_at(row, path)) for path in layout.texts or ()]


def _row_cells(
  layout: TableLayout, where: Where, row: dict, number: int
) -> tuple[list[_Cell], str]:
  """The verdicts of a row; or none, and why it is refused."""
  texts = _texts_at(row, layout)
  both = bool(texts) and None not in texts
  item = _words_at(row, layout.item)
  prompt = _words_at(row, layout.prompt)
  if item and not item[0]:
    return [], f"no {layout.item[0]}"
  if item:
    item = " / ".join(item)
  elif any(prompt):
    item = "\n\n".join(prompt)
  else:  # texts in whatever order they stand
    item = "\n\n".join(sorted(texts)) if both else f"row {number}"
  names = _words_at(row, layout.names)
  if names and not all(names):
    return [], "a model without a name"
  if names and names[0] == names[1]:
    if not both:
      return [], "a model against itself"
    names = []  # its two answers differ by their texts
  shared = dict(where=where, item=item, names=tuple(names) or None)
  shared["texts"] = tuple(texts) if both else None
  cells = [
    _Cell(rater=rater, column=column, code=code_of_cell(value), **shared)
    for column, rater, value in rating_layouts.verdict_cells(layout, row)
  ]
  if not all(cell.rater for cell in cells):
    return [], "no rater"
  return cells, ""


def _read_file(
  name: str,
  pairs: list,
  stem: str,
  raters: Sequence[str],
  fields: Mapping[str, str],
) -> _File:
  """The cells of one file, and its rows that could not be read."""
  refused: dict[str, list[Where]] = collections.defaultdict(list)
  for where, row in pairs:
    if not isinstance(row, dict):
      refused[row.reason].append(where)
  good = [(where, row) for where, row in pairs if isinstance(row, dict)]
  rows = [row for _, row in good]
  if not good:
    raise DataError(
      f"{name}: none of {len(pairs):,} rows could be read "
      f"({', '.join(refused)}); set --data"
    )
  here = lambda path: any(value_at(row, path) is not None for row in rows)
  raters = [r for r in raters if here(r)]
  fields = {k: v for k, v in fields.items() if here(v)}
  layout = rating_layouts.detect(rows, name, stem, raters, fields)
  cells, examples = [], []
  for number, (where, row) in enumerate(good, 1):
    own, why = _row_cells(layout, where, row, number)
    cells += own
    if why:
      refused[why].append(where)
    elif own and len(examples) < _EXAMPLES:
      examples.append((row, own))
  lines = rating_layouts.layout_lines(layout, rows)
  texts = (value_at(row, path) for row in rows for path in layout.texts or ())
  odd = collections.Counter(
    type(text).__name__
    for text in texts
    if text is not None and answer_text(text) is None
  )
  if odd:
    kinds = ", ".join(f"{n:,} of type {kind}" for kind, n in odd.most_common(5))
    lines.append(f"answers that are no text, so without a length: {kinds}")
  return _File(name, layout, len(pairs), cells, refused, lines, examples)


# What its verdicts mean.


def _named_side(cell: _Cell) -> str | None:
  """The side whose model the verdict names, if it names one."""
  first, second = map(code_of_cell, cell.names or ("", ""))
  if first == second:
    return None
  return {first: "first", second: "second"}.get(cell.code)


def _meaning(file: _File, choice: Choice) -> Meaning:
  """What the codes of a file mean, but for those that name a model."""
  if choice.word == rating_codes.LABELS:
    return Meaning()
  counts = collections.Counter(
    c.code for c in file.cells if c.code is not None and not _named_side(c)
  )
  if choice.word == rating_codes.NAMES:
    sides = {c: "tie" if WORDS.get(c) == "tie" else None for c in counts}
    unread = {c: n for c, n in counts.items() if not sides[c]}
    return Meaning(sides, "the winner's name", unread)
  columns = list(dict.fromkeys(c.column.path for c in file.cells))
  where = f"{file.name}, {', '.join(columns[:4])}"
  return rating_codes.code_meaning(
    counts, choice, where, file.layout.known, file.layout.forgiving
  )


def _is_empty(cell: _Cell, file: _File) -> bool:
  """Whether a cell is no verdict; a judge's empty one could not be read."""
  unread = file.layout.forgiving and cell.column.role == "judge"
  return cell.code is None and not unread


def _verdict(cell: _Cell, meaning: Meaning, choice: Choice) -> str | None:
  """ "first", "second" (of the answers as they were shown), "tie" or None."""
  word, name = meaning.sides.get(cell.code), _named_side(cell)
  if name and not choice.codes and not choice.word:
    place = WORDS.get(cell.code)
    if place in ("first", "second") and place != name:
      raise ConfigError(
        f"{cell.where.file}, line {cell.where.line}: the verdict "
        f"{cell.code!r:.40} names the model of the {name} answer and the "
        f"place of the {place}; set --choice={rating_codes.NAMES}, or which it "
        "is with --choice=\"{'first': [...], 'second': [...]}\""
      )
  verdict, is_answer = name or word, cell.column.identity or bool(name)
  if cell.code in choice.codes:
    verdict, is_answer = choice.codes[cell.code], cell.column.identity
  return _OTHER[verdict] if is_answer and cell.column.swapped else verdict


def _text_pairs(files: Sequence[_File]) -> dict[str, list[tuple]]:
  """The different pairs of texts of every item whose rows name no models."""
  out: dict[str, list] = collections.defaultdict(list)
  for cell in (cell for file in files for cell in file.cells):
    if cell.names is None and cell.texts is not None:
      known = out[cell.item]
      if cell.texts not in known and cell.texts[::-1] not in known:
        known.append(cell.texts)
  return out


def _answer_names(cell: _Cell, pairs: dict) -> tuple[str, str] | None:
  """Names of the two answers, by their texts where the row has none.

  The texts identify them in whatever order they stand; None: nothing does.
  """
  if cell.names:
    return cell.names
  known, k, turned = pairs.get(cell.item, []), 0, False
  if cell.texts is not None:
    turned = cell.texts not in known
    k = known.index(cell.texts[::-1] if turned else cell.texts)
  elif len(known) > 1:
    return None
  names = (f"pair {k + 1:04d} answer 1", f"pair {k + 1:04d} answer 2")
  return names[::-1] if turned else names


# All files.


def read_ratings(
  names: Sequence[str],
  choice: Choice,
  raters: Sequence[str] = (),
  fields: Mapping[str, str] = {},
) -> RatingTable:
  """The verdicts of some files, joined by item and answers.

  Args:
    names: paths or globs, as `sources.read_rows` takes them.
    choice: what codes mean, as from `rating_codes.parse_choice`.
    raters: columns that hold verdicts, of whichever file has them.
    fields: the same of other columns, see `rating_layouts.parse_fields`.

  Raises:
    ConfigError: a code that is not certain; a column that no file has.
    DataError: a file that cannot be read, or that holds no verdict.
  """
  by_file: dict[str, list[tuple[Where, Any]]] = {}
  try:
    for name in names:
      for where, row in sources.read_rows(name):
        by_file.setdefault(where.file, []).append((where, row))
  except JaxalignError as error:  # which names the knob of another command
    message = str(error).replace("set config.data.source", "set --data")
    raise type(error)(message) from error
  stems = collections.Counter(map(rater_name, by_file))
  files = []
  for name, pairs in by_file.items():
    stem = rater_name(name)
    if stems[stem] > 1:
      stem = f"{os.path.basename(os.path.dirname(name))}/{stem}"
    files.append(_read_file(name, pairs, stem, raters, fields))
  rows = [row for pairs in by_file.values() for _, row in pairs]
  for name in (*raters, *fields.values()):
    if all(value_at(row, name) is None for row in rows):
      raise ConfigError(
        f"no file has a column {name!r}; set --raters or --fields"
      )
  pairs, seen = _text_pairs(files), {}
  table = RatingTable([], {}, {}, {}, [])
  for file in files:
    _add(table, file, pairs, choice, seen)
  if not seen:
    raise DataError(
      f"no verdict in {', '.join(by_file)}; set --data, --raters or --fields"
    )
  return table


def _add(
  table: RatingTable, file: _File, pairs: dict, choice: Choice, seen: dict
) -> None:
  """Adds one file's verdicts to the table, and how they were read.

  `seen` holds the verdict by item, rater and answers, of all files so far.
  """
  as_is = choice.word == rating_codes.LABELS
  meaning, refused = _meaning(file, choice), dict(file.refused)
  counts = collections.Counter()
  for cell in file.cells:
    if _is_empty(cell, file) or (as_is and cell.code is None):
      counts["empty"] += 1
      continue
    names = _answer_names(cell, pairs)
    if names is None:
      refused.setdefault(_UNCLEAR, []).append(cell.where)
      continue
    shown = names[::-1] if cell.column.swapped else names
    verdict = cell.code if as_is else _verdict(cell, meaning, choice)
    key = (cell.item, cell.rater, *(sorted(shown) if as_is else shown))
    if key in seen:
      if seen[key] == verdict:
        counts["repeated"] += 1
      else:
        refused.setdefault(_TWICE, []).append(cell.where)
      continue
    seen[key] = verdict
    counts["verdicts"] += 1
    pair: Pair = (cell.item, *sorted(names))
    if cell.column.role:
      table.roles[cell.rater] = cell.column.role
    if cell.texts:
      sizes = tuple(float(len(text.strip())) for text in cell.texts)
      turned = names[0] != pair[1]
      table.sizes.setdefault(pair, sizes[::-1] if turned else sizes)
    if as_is:
      table.votes.setdefault(cell.rater, {})[pair] = cell.code
    else:
      table.rows.append(Verdict(cell.item, *shown, cell.rater, verdict))
  labels = {w for votes in table.votes.values() for w in votes.values()}
  if len(labels) > _LABELS:
    raise ConfigError(
      f"{file.name}: {len(labels):,} different labels, wanted "
      f"at most {_LABELS}; set --raters"
    )
  table.files.append(
    dict(
      name=file.name,
      rows=file.rows,
      layout=file.layout.name,
      verdicts=counts["verdicts"],
      lines=_lines(file, meaning, choice, counts, refused),
      raters=list(dict.fromkeys(c.rater for c in file.cells)),
      refused={k: len(v) for k, v in refused.items()},
      examples=[_example(*e, file, meaning, choice) for e in file.examples],
    )
  )


def _lines(
  file: _File, meaning: Meaning, choice: Choice, counts: dict, refused: dict
) -> list[str]:
  """How a file was read."""
  out = list(file.lines)
  if choice.word == rating_codes.LABELS:
    out.append("labels are compared as they stand: no order, no lengths")
  else:
    out += rating_codes.meaning_lines(meaning, *file.layout.answers)
  if counts["empty"]:
    out.append(f"{counts['empty']:,} cells are empty: no verdict")
  if n := counts["repeated"]:
    out.append(f"{n:,} verdicts stand there twice, with the same word")
  for reason, places in refused.items():
    lines = ", ".join(f"{w.line:,}" for w in places[:3])
    lines = f"line{'s' * (len(places) > 1)} {lines}"
    lines += ", ..." if len(places) > 3 else ""
    if len({w.file for w in places}) > 1:
      lines += f" of {places[0].file}"
    out.append(f"refused: {len(places):,} with {reason} ({lines})")
  return out


def _example(
  row: dict, cells: list[_Cell], file: _File, meaning: Meaning, choice: Choice
) -> dict[str, Any]:
  """A row as it was understood: (rater, winner) of its first verdicts."""
  where, layout = cells[0].where, file.layout
  answers, words = cells[0].names or layout.answers, []
  for cell in cells[:12]:
    swapped, word = cell.column.swapped, cell.code
    if choice.word != rating_codes.LABELS:
      first, second = answers[:: -1 if swapped else 1]
      unread = "no verdict" if _is_empty(cell, file) else "could not be read"
      names = dict(first=first, second=second, tie="tie")
      word = names.get(_verdict(cell, meaning, choice)) or unread
    words.append((cell.rater + ", order exchanged" * swapped, word))
  return dict(
    where=f"{where.file}, line {where.line}",
    item=cells[0].item,
    prompt="\n".join(filter(None, _words_at(row, layout.prompt))),
    answers=list(answers),
    texts=_texts_at(row, layout),
    cells=words,
  )
