"""Files of raters' verdicts as one table, and how each file was read."""

import collections
from collections.abc import Mapping, Sequence
import hashlib
import os
import re
from typing import Any, NamedTuple

from jaxalign.data import sources
from jaxalign.data.sources import Where
from jaxalign.errors import ConfigError, DataError, JaxalignError
from jaxalign.eval import verdict_codes as codes
from jaxalign.eval import verdict_layouts as layouts
from jaxalign.eval.interrater import Pair, Verdict
from jaxalign.eval.verdict_codes import Choice
from jaxalign.eval.verdict_layouts import TableLayout, VerdictColumn

_EXAMPLES = 2  # rows shown as they were understood
_LABELS = 100  # different ones, above which a column holds no labels


class Table(NamedTuple):
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
  texts: tuple[bytes, bytes] | None  # digests
  sizes: tuple[float, float] | None
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
  examples: list[dict[str, Any]]


def rater_name(path: str) -> str:
  """What a rater is called whom only the file's name tells."""
  return (
    re.sub(
      r"(\.jsonl|\.json|\.csv|\.parquet)?(\.gz)?$", "", os.path.basename(path)
    )
    or path
  )


def _rows_of(source: str) -> list[tuple[Where, Any]]:
  """`sources.read_rows`; its errors name the flag of this command."""
  try:
    return list(sources.read_rows(source))
  except JaxalignError as error:
    raise type(error)(
      str(error).replace("set config.data.source", "set --data")
    ) from error


def _digest(text: str) -> bytes:
  return hashlib.blake2b(
    text.encode("utf-8", "surrogatepass"), digest_size=16
  ).digest()


def text_of(value: Any) -> str | None:
  """An answer's text; of a conversation, what the assistant said; else
  None."""
  if isinstance(value, str):
    return value
  if (
    isinstance(value, list)
    and value
    and all(isinstance(m, dict) for m in value)
  ):
    said = [
      m.get("content", m.get("value"))
      for m in value
      if m.get("role", m.get("from")) in ("assistant", "gpt")
    ]
    if said and all(isinstance(s, str) for s in said):
      return "\n\n".join(said)
  return None


def _word(value: Any) -> str:
  """An item, a model or a prompt as text; "" where there is none."""
  if value is None or isinstance(value, str):
    return (value or "").strip()
  if (
    isinstance(value, float)
    and value == value
    and abs(value) < 1e15
    and (value == int(value))
  ):
    value = int(value)
  return repr(value)


def _item(
  layout: TableLayout, row: dict, texts: Sequence[str | None], number: int
) -> str:
  """What names the item of a row; "" where nothing does."""
  if layout.item:
    found = [_word(layouts.at(row, path)) for path in layout.item]
    return " / ".join(found) if found[0] else ""
  prompt = [_word(layouts.at(row, path)) for path in layout.prompt]
  if any(prompt):
    return "\n\n".join(prompt)
  if None not in texts and texts:
    return "\n\n".join(sorted(texts))  # in whatever order they stand
  return f"row {number}"


def _read_file(
  name: str,
  pairs: list,
  stem: str,
  raters: Sequence[str],
  fields: Mapping[str, str],
) -> _File:
  """The cells of one file, and its rows that could not be read."""
  good = [(where, row) for where, row in pairs if isinstance(row, dict)]
  refused: dict[str, list[Where]] = collections.defaultdict(list)
  for where, row in pairs:
    if not isinstance(row, dict):
      refused[row.reason].append(where)
  if not good:
    raise DataError(
      f"{name}: none of {len(pairs):,} rows could be read "
      f"({', '.join(refused)}); set --data"
    )
  rows = [row for _, row in good]
  here = lambda path: any(layouts.at(row, path) is not None for row in rows)
  fields = {k: v for k, v in fields.items() if here(v)}
  layout = layouts.detect(
    rows, name, stem, [r for r in raters if here(r)], fields
  )
  cells, odd = [], collections.Counter()
  examples: list[dict] = []
  for number, (where, row) in enumerate(good, 1):
    raw = [layouts.at(row, p) for p in layout.texts or ()]
    texts = [text_of(v) for v in raw]
    odd.update(
      type(v).__name__
      for v, t in zip(raw, texts)
      if t is None and v is not None
    )
    item = _item(layout, row, texts, number)
    if not item:
      refused[f"no {layout.item[0]}"].append(where)
      continue
    both = None not in texts and bool(texts)
    names = tuple(_word(layouts.at(row, p)) for p in layout.names or ())
    if names and not all(names):
      refused["a model without a name"].append(where)
      continue
    if names and names[0] == names[1]:
      if not both:
        refused["a model against itself"].append(where)
        continue
      names = ()  # its two answers are told apart by their texts
    shared = dict(
      where=where,
      item=item,
      names=names or None,
      texts=tuple(map(_digest, texts)) if both else None,
      sizes=tuple(float(len(t.strip())) for t in texts) if both else None,
    )
    found = [
      _Cell(rater=rater, column=column, code=codes.code(value), **shared)
      for column, rater, value in layouts.verdicts(layout, row)
    ]
    if not all(cell.rater for cell in found):
      refused["no rater"].append(where)
      continue
    cells += found
    if len(examples) < _EXAMPLES:
      prompt = "\n".join(
        filter(None, (_word(layouts.at(row, p)) for p in layout.prompt))
      )
      examples.append(
        dict(
          where=f"{where.file}, line {where.line}",
          item=item,
          prompt=prompt,
          answers=list(names or layout.answers),
          texts=texts,
          cells=found,
        )
      )
  lines = layouts.described(layout, rows)
  if odd:
    lines.append(
      "answers that are no text, so without a length: "
      + ", ".join(f"{n:,} of type {kind}" for kind, n in odd.most_common(5))
    )
  return _File(name, layout, len(pairs), cells, refused, lines, examples)


def _by_name(cell: _Cell) -> str | None:
  """The side whose model the verdict names, if it names one."""
  if not cell.names:
    return None
  first, second = map(codes.code, cell.names)
  if first == second:
    return None
  return {first: "first", second: "second"}.get(cell.code)


def _meaning(file: _File, choice: Choice) -> codes.Meaning:
  """What the codes of a file mean, those aside that name a model."""
  counts = collections.Counter(
    c.code for c in file.cells if c.code is not None and _by_name(c) is None
  )
  columns = list(dict.fromkeys(c.column.path for c in file.cells))
  if choice.word == codes.NAMES:
    sides = {c: "tie" if codes.side(c) == "tie" else None for c in counts}
    return codes.Meaning(
      sides,
      "the winner's name",
      {c: n for c, n in counts.items() if not sides[c]},
    )
  return codes.meaning(
    counts,
    choice,
    where=f"{file.name}, {', '.join(columns[:4])}",
    known=file.layout.known,
    forgiving=file.layout.forgiving,
  )


def _not_judged(cell: _Cell, file: _File) -> bool:
  """Whether an empty cell is no verdict; a judge's is one that was lost."""
  return cell.code is None and not (
    file.layout.forgiving and cell.column.role == "judge"
  )


_OTHER = {"first": "second", "second": "first", "tie": "tie", None: None}


def _said(cell: _Cell, meaning: codes.Meaning, choice: Choice) -> str | None:
  """ "first", "second" (of the answers as they were shown), "tie" or None."""
  word, name = meaning.sides.get(cell.code), _by_name(cell)
  if name and not choice.codes and not choice.word:
    word = codes.side(cell.code)
    if word in ("first", "second") and word != name:
      raise ConfigError(
        f"{cell.where.file}, line {cell.where.line}: the verdict "
        f"{cell.code!r:.40} names the model of the {name} answer and the "
        f"place of the {word}; say --choice={codes.NAMES}, or which it is "
        "with --choice=\"{'first': [...], 'second': [...]}\""
      )
  if choice.codes and cell.code in choice.codes:
    found, identity = choice.codes[cell.code], cell.column.identity
  else:
    found, identity = name or word, cell.column.identity or bool(name)
  return _OTHER[found] if identity and cell.column.swapped else found


class _Answers:
  """Names for the answers of rows that name none: their texts tell them
  apart, in whatever order they stand."""

  def __init__(self, files: Sequence[_File]):
    self.known: dict[str, list[tuple[bytes, bytes]]] = collections.defaultdict(
      list
    )
    for file in files:
      for cell in file.cells:
        if cell.names is None and cell.texts is not None:
          known = self.known[cell.item]
          if cell.texts not in known and cell.texts[::-1] not in known:
            known.append(cell.texts)

  def names(self, cell: _Cell) -> tuple[str, str] | None:
    """The two answers as the row has them; None where it cannot be told."""
    if cell.names:
      return cell.names
    known = self.known.get(cell.item, [])
    k, turned = 0, False
    if cell.texts is not None:
      turned = cell.texts not in known
      k = known.index(cell.texts[::-1] if turned else cell.texts)
    elif len(known) > 1:
      return None
    names = (f"pair {k + 1:04d} answer 1", f"pair {k + 1:04d} answer 2")
    return names[::-1] if turned else names


def _where(places: Sequence[Where], limit: int = 3) -> str:
  """The first lines of some rows."""
  lines = ", ".join(f"{w.line:,}" for w in places[:limit])
  files = {w.file for w in places}
  return (
    f"line{'s' * (len(places) > 1)} {lines}"
    + (", ..." if len(places) > limit else "")
    + (f" of {places[0].file}" if len(files) > 1 else "")
  )


def _shown(
  example: dict, file: _File, meaning: codes.Meaning, choice: Choice
) -> dict[str, Any]:
  """A row as it was understood."""
  words = []
  for cell in example["cells"][:12]:
    names = [a for a in example["answers"]]
    if cell.column.swapped:
      names.reverse()
    if choice.word == codes.LABELS:
      word = cell.code
    else:
      said = _said(cell, meaning, choice)
      word = dict(first=names[0], second=names[1], tie="tie").get(said)
      word = word or (
        "no verdict" if _not_judged(cell, file) else "could not be read"
      )
    words.append(
      (cell.rater + (", order exchanged" if cell.column.swapped else ""), word)
    )
  return dict(example, cells=words)


def read(
  names: Sequence[str],
  choice: Choice,
  raters: Sequence[str] = (),
  fields: Mapping[str, str] = {},
) -> Table:
  """The verdicts of some files, joined by item and answers.

  Args:
    names: paths or globs, as `sources.read_rows` takes them.
    choice: what codes mean, as from `verdict_codes.parse_choice`.
    raters: columns that hold verdicts, of whichever file has them.
    fields: the same of other columns, see `verdict_layouts.parse_fields`.

  Raises:
    ConfigError: a code that is not certain; a column that no file has.
    DataError: a file that cannot be read, or that holds no verdict.
  """
  pairs: dict[str, list] = {}
  for name in names:
    for where, row in _rows_of(name):
      pairs.setdefault(where.file, []).append((where, row))
  stems = collections.Counter(map(rater_name, pairs))
  files = []
  for name, found in pairs.items():
    stem = rater_name(name)
    if stems[stem] > 1:
      stem = f"{os.path.basename(os.path.dirname(name))}/{stem}"
    files.append(_read_file(name, found, stem, raters, fields))
  for name in (*raters, *fields.values()):
    if not any(
      layouts.at(row, name) is not None
      for found in pairs.values()
      for _, row in found
      if isinstance(row, dict)
    ):
      raise ConfigError(
        f"no file has a column {name!r}; set --raters or --fields"
      )
  answers = _Answers(files)
  table = Table([], {}, {}, {}, [])
  seen: dict[tuple, Any] = {}
  for file in files:
    _add(table, file, answers, choice, seen)
  if not seen:
    raise DataError(
      f"no verdict in {', '.join(pairs)}; set --data, --raters or --fields"
    )
  return table


def _add(
  table: Table,
  file: _File,
  answers: _Answers,
  choice: Choice,
  seen: dict[tuple, Any],
) -> None:
  """Adds one file's verdicts to the table, and how they were read."""
  as_is = choice.word == codes.LABELS
  meaning = codes.Meaning({}, "", {}) if as_is else _meaning(file, choice)
  refused, repeats, given, empty = dict(file.refused), 0, 0, 0
  for cell in file.cells:
    if _not_judged(cell, file) or (as_is and cell.code is None):
      empty += 1
      continue
    names = answers.names(cell)
    if names is None:
      refused.setdefault(
        "an item of several pairs of answers, and no texts or "
        "models that tell which",
        [],
      ).append(cell.where)
      continue
    shown = names[::-1] if cell.column.swapped else names
    said = cell.code if as_is else _said(cell, meaning, choice)
    key = (cell.item, cell.rater, *(sorted(shown) if as_is else shown))
    if key in seen:
      if seen[key] == said:
        repeats += 1
      else:
        refused.setdefault(
          "judged twice and differently, of which the first is kept", []
        ).append(cell.where)
      continue
    seen[key] = said
    given += 1
    pair: Pair = (cell.item, *sorted(names))
    if cell.column.role:
      table.roles[cell.rater] = cell.column.role
    if cell.sizes:
      table.sizes.setdefault(
        pair, cell.sizes if names[0] == pair[1] else cell.sizes[::-1]
      )
    if as_is:
      table.votes.setdefault(cell.rater, {})[pair] = cell.code
    else:
      table.rows.append(Verdict(cell.item, *shown, cell.rater, said))
  labels = {w for votes in table.votes.values() for w in votes.values()}
  if len(labels) > _LABELS:
    raise ConfigError(
      f"{file.name}: {len(labels):,} different labels, wanted "
      f"at most {_LABELS}; set --raters"
    )
  lines = [
    *file.lines,
    *(
      ["labels are compared as they stand: no order, no lengths"]
      if as_is
      else codes.described(meaning, *file.layout.answers)
    ),
  ]
  if empty:
    lines.append(f"{empty:,} cells are empty: no verdict")
  if repeats:
    lines.append(f"{repeats:,} verdicts stand there twice, with the same word")
  lines += [
    f"refused: {len(places):,} with {reason} ({_where(places)})"
    for reason, places in refused.items()
  ]
  table.files.append(
    dict(
      name=file.name,
      rows=file.rows,
      layout=file.layout.name,
      verdicts=given,
      lines=lines,
      raters=list(dict.fromkeys(c.rater for c in file.cells)),
      refused={k: len(v) for k, v in refused.items()},
      examples=[_shown(e, file, meaning, choice) for e in file.examples],
    )
  )
