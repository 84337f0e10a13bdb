"""Checked records with stable ids: loaded, split by group, counted.

The order of the input never matters: rows are sorted by id, an id comes from
the row itself, and the split of a row is a hash of its group.
"""

import array
import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import itertools
import json
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core import progress
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.core.lookup import lookup
from jaxalign.data.json_rows import BadRow, Where
from jaxalign.data.row_table import RowTable
from jaxalign.data.schemas import (
  BUILT_IN,
  choices,
  detect_schema,
  layouts,
  Refused,
  Schema,
  SCHEMAS,
)
from jaxalign.data.schemas.choices import Undecided
from jaxalign.data.schemas.convert import (
  convert_pair,
  convert_unpaired,
  flipped,
  is_read,
)
from jaxalign.data.schemas.mapping import check_fields, remap, roles_of
from jaxalign.data.schemas.messages import is_messages, unread_keys
from jaxalign.data.schemas.schema import ANSWER_PAIRS
from jaxalign.data.sources import read_rows

_PEEK = 1000  # rows looked at before "no schema fits" is believed
# An id is a digest of these: what else is kept of a row may grow.
_CONTENT = ("prompt", "chosen", "rejected", "completion", "label", "group")
_TYPES = {
  str: "text",
  bool: "true or false",
  int: "number",
  float: "number",
  list: "list",
  dict: "object",
  type(None): "null",
}


class TooManyRefused(DataError):
  """More rows refused than allowed; `refused` are they, as in `Loaded`."""

  def __init__(self, message: str, refused: list[dict]):
    super().__init__(message)
    self.refused = refused


@dataclasses.dataclass(frozen=True)
class LoadOptions:
  """How rows are read; each is the knob of its name in config.data.

  Attributes:
    schema: a key of SCHEMAS, "module:function" (a convert of your own, which
      may return a list), or "auto": that of the first row that has one's shape.
    limit: rows of each source to read, good or bad; 0 for all.
    max_bad_fraction: a larger fraction of rows refused is an error; 0 stops at
      the first.
    fields: what a schema reads -> where the row has it, see `mapping.remap`;
      empty: rows are read as they are.
    answer_pairs: of several answers to a prompt, one of ANSWER_PAIRS.
    skip: pairs to leave out: those whose scores are "tied", or "contradicting"
      (the rejected answer scores higher than the chosen one).
    choice: what the codes of a choice or a label mean, see
      `choices.check_choice`.
    caps: rows of each source at most; 0: all.
    weights: of each source in the rows kept; (): as they come.
    seed: which rows stay within a cap or a weight.
  """

  schema: str = "auto"
  limit: int = 0
  max_bad_fraction: float = 0.5
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  answer_pairs: str = "all"
  skip: Sequence[str] = ()
  choice: Any = ""
  caps: Sequence[int] = ()
  weights: Sequence[float] = ()
  seed: int = 0

  def check(self, sources: Sequence[str]) -> None:
    """Raises ConfigError for a value that no reading of `sources` can take."""
    if self.answer_pairs not in ANSWER_PAIRS:
      raise ConfigError(
        f"answer_pairs is {self.answer_pairs!r}, wanted "
        f"{' or '.join(ANSWER_PAIRS)}; set config.data.answer_pairs"
      )
    check_fields(self.fields)
    choices.check_choice(self.choice)
    check_shares(sources, self.caps, self.weights)


class SourceReading(NamedTuple):
  """How one source was read."""

  source: str
  schema: str
  why: str  # this schema was chosen
  columns: list[dict[str, str]]  # column, type, became
  kept: int
  seen: int


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What the sources held: seen == len(rows) + len(refused) + left_out."""

  kind: str  # "pairs" or "unpaired"
  schema: str
  rows: RowTable  # by id: id, prompt, chosen, rejected | completion, label;
  #   group; where there are any turns, answers, tools, margin, source
  refused: list[dict]  # file, line, id, reason, detail, as they came
  counts: dict[str, int]  # refused, by reason
  seen: int
  duplicates: int  # rows kept whose whole content an earlier one had
  source: str
  tied: int  # rows whose two scores are equal, kept or not
  against: int  # rows whose scores contradict their label, kept or not
  against_at: str  # the first of them, file and line
  contradicted: int  # pairs kept whose reverse was kept too
  shared_ids: int  # rows that shared an id with another
  left_out: int  # by data.caps and data.weights
  readings: tuple[SourceReading, ...]
  where: Mapping[str, Where]  # id -> where the row stands


def load_records(
  source: str | Sequence[str], options: LoadOptions = LoadOptions()
) -> Loaded:
  """Reads, converts and checks every row of one source or of several.

  Args:
    source: see `sources.read_rows`; several are read by the same rules.
    options: of all of them.

  Raises:
    ConfigError: an unknown schema, field or choice.
    DataError: no schema fits; a bad row under "error"; too many bad rows;
      codes whose meaning is not certain.
  """
  names = [source] if isinstance(source, str) else list(source)
  options.check(names)
  refused, readings, scores = [], [], _Scores(options)
  own_ids, digests, places, origin = [], bytearray(), Places(), []

  def kept():
    kind = None
    for number, name in enumerate(names):
      reader = _SourceReader(name, options)
      for where, own, row in reader.converted():
        try:
          row = scores.checked(row, where)
          its_kind = "pairs" if "chosen" in row else "unpaired"
          kind = kind or its_kind
          if its_kind != kind:
            raise Refused("mixed kinds", f"{its_kind} among {kind}")
        except Refused as error:
          if not options.max_bad_fraction:
            raise _bad_row(where, own, error) from error
          refused.append(refusal(where, own, error))
          continue
        own_ids.append(own)
        digests.extend(_digest(row))
        places.add(where)
        origin.append(number)
        yield (dict(source=name) if len(names) > 1 else {}) | row
      readings.append(reader.reading())

  rows = RowTable.of(kept())
  schemas = ", ".join(dict.fromkeys(r.schema for r in readings))
  counts = count_reasons(refused)
  label, seen = ", ".join(names), len(rows) + len(refused)
  if len(refused) > options.max_bad_fraction * seen or not len(rows):
    raise TooManyRefused(
      f"{label}: {len(refused)} of {seen} rows refused, more than the share "
      f"{options.max_bad_fraction} allowed or all: {_by_count(counts)}; first "
      f"at {_first(refused)}; set config.data.max_bad_fraction, or "
      f"config.data.schema (now {schemas})",
      refused,
    )
  digests = np.frombuffer(bytes(digests), "V32")
  ids, duplicates, shared = _assign_ids(own_ids, digests)
  index, sizes = _within(ids, np.array(origin), len(names), options)
  index = index[np.argsort(np.array(ids)[index], kind="stable")]
  left_out = len(rows) - len(index)
  rows = rows.with_column("id", ids).take(index)
  kind = "pairs" if "chosen" in rows.table.column_names else "unpaired"
  places.sort(rows.column("id"), index)
  return Loaded(
    kind=kind,
    schema=schemas,
    rows=rows,
    refused=refused,
    counts=counts,
    seen=seen,
    duplicates=duplicates,
    source=label,
    tied=scores.tied,
    against=scores.against,
    against_at=scores.against_at,
    contradicted=_contradicted(rows),
    shared_ids=shared,
    left_out=left_out,
    readings=tuple(r._replace(kept=n) for r, n in zip(readings, sizes)),
    where=places,
  )


class Places(Mapping):
  """id -> Where a row stands, in two numbers a row."""

  def __init__(self):
    self._names, self._files = {}, array.array("i")
    self._lines, self._ids = array.array("q"), np.array([], np.str_)

  def add(self, where: Where) -> None:
    """The next row's place."""
    self._files.append(self._names.setdefault(where.file, len(self._names)))
    self._lines.append(where.line or 0)

  def sort(self, ids: list[str], index: np.ndarray) -> None:
    """Keeps the places `index` alone; they are those of these sorted ids."""
    self._ids = np.array(ids, np.str_)
    self._files = np.array(self._files)[index]
    self._lines = np.array(self._lines)[index]

  def __len__(self) -> int:
    return len(self._ids)

  def __iter__(self) -> Iterator[str]:
    return iter(self._ids.tolist())

  def __getitem__(self, name: str) -> Where:
    at = int(np.searchsorted(self._ids, name))
    if at == len(self._ids) or self._ids[at] != name:
      raise KeyError(name)
    return Where([*self._names][self._files[at]], int(self._lines[at]) or None)


def refusal(where: Where, own: str | None, error: Refused) -> dict[str, Any]:
  """A refused row as it is listed."""
  at = dict(file=where.file, line=where.line, id=own)
  return at | dict(reason=error.reason, detail=error.detail)


def count_reasons(refused: list[dict]) -> dict[str, int]:
  """How many rows were refused for each reason."""
  return dict(sorted(collections.Counter(r["reason"] for r in refused).items()))


@dataclasses.dataclass
class _Scores:
  """Checks the scores of pairs, and counts what contradicts their labels."""

  options: LoadOptions
  tied: int = 0
  against: int = 0
  against_at: str = ""

  def checked(self, row: dict | Refused, where: Where) -> dict:
    """The row, its sides changed round where the scores alone decide."""
    if isinstance(row, Refused):
      raise row
    if "chosen" not in row:
      return row
    options, margin = self.options, row.get("margin")
    if options.choice == choices.BY_SCORE:
      if margin is None:
        raise Refused("no scores", "of the two answers")
      if margin == 0:
        self.tied += 1
        raise Refused("tied scores", "neither answer won")
      return flipped(row) if margin < 0 else row
    if margin is None:
      return row
    self.tied += margin == 0
    if margin == 0 and "tied" in options.skip:
      raise Refused("tied scores", "")
    if margin < 0:
      self.against += 1
      self.against_at = self.against_at or _at(where)
      if "contradicting" in options.skip:
        raise Refused("scores against the label", f"margin {margin:g}")
    return row


def check_shares(
  names: Sequence[str], caps: Sequence[int], weights: Sequence[float]
) -> None:
  """Raises ConfigError for caps or weights that do not fit the sources."""
  for knob, values, wanted in (
    ("caps", caps, "of 0 or more"),
    ("weights", weights, "above 0"),
  ):
    numbers = [
      isinstance(v, (int, float))
      and not isinstance(v, bool)
      and (v >= 0 if knob == "caps" else 0 < v < float("inf"))
      for v in values
    ]
    if values and (len(values) != len(names) or not all(numbers)):
      raise ConfigError(
        f"data.{knob}={tuple(values)} for {len(names)} sources, wanted a "
        f"number {wanted} for each; set config.data.{knob}"
      )


def _within(
  ids: list[str], origin: np.ndarray, sources: int, options: LoadOptions
) -> tuple[np.ndarray, list[int]]:
  """Of each source the rows that its cap and its weight leave, by a hash.

  Returns:
    Row numbers, and how many there are of each source.
  """
  rows = [np.flatnonzero(origin == k) for k in range(sources)]
  caps, weights = options.caps or [0] * sources, options.weights
  sizes = [min(len(k), int(cap) or len(k)) for k, cap in zip(rows, caps)]
  if weights:
    least = min(size / weight for size, weight in zip(sizes, weights))
    most = [int(least * weight + 1e-9) for weight in weights]
    sizes = list(map(min, sizes, most))

  def order(row):
    return hashlib.sha256(f"{options.seed}:{ids[row]}".encode()).digest()

  left = [
    kept if size == len(kept) else np.array(sorted(kept, key=order)[:size], int)
    for kept, size in zip(rows, sizes)
  ]
  return np.concatenate(left), sizes


def _contradicted(rows: RowTable) -> int:
  """Pairs whose reverse, the same two answers the other way round, is there."""
  if "chosen" not in rows.table.column_names:
    return 0
  texts = [rows.column(name) for name in ("prompt", "chosen", "rejected")]

  def codes(rows):
    digest = lambda row: hashlib.blake2b(repr(row).encode(), digest_size=8)
    each = b"".join(digest(row).digest() for row in rows)
    return np.frombuffer(each, np.int64)

  turned = codes((p, b, a) for p, a, b in zip(*texts))
  return int(np.isin(turned, codes(zip(*texts))).sum())


class _SourceReader:
  """One source on its way: its schema, its columns, what its codes mean.

  A class because a column's codes are settled after its rows were converted.
  """

  def __init__(self, name: str, options: LoadOptions):
    self.name, self.options, self.seen = name, options, 0
    rows = iter(read_rows(name, options.limit))
    self.peeked = list(itertools.islice(rows, _PEEK))
    self._rows = itertools.chain(self.peeked, rows)
    self.fields = dict(options.fields)
    self.fields |= layouts.known_strength(self.fields) if self.fields else {}
    if options.schema == "auto":
      self.schema, self.why = self._detected()
    else:
      found = lookup(SCHEMAS, options.schema, "schema", "data.schema")
      named = isinstance(found, Schema)
      self.schema = found if named else Schema(options.schema, found)
      self.why = "config.data.schema names it"

  def _renamed(self, row: dict) -> dict:
    return remap(row, self.fields) if self.fields else row

  def _detected(self) -> tuple[Schema, str]:
    first = None
    for where, row in self.peeked:
      if isinstance(row, BadRow):
        continue
      row = self._renamed(row)
      try:
        found = detect_schema(row)
      except DataError as error:
        first = first or DataError(f"{_at(where)}: {error}")
        continue
      have = ", ".join(w for w in found.wants if w in row)
      return found, f"row {where.line} has {have or 'its shape'}"
    if not self.peeked:
      raise DataError("no rows")
    where, bad = self.peeked[0]
    raise first or DataError(
      f"{_at(where)}: {bad.reason}: {bad.detail}; none of the first "
      f"{len(self.peeked)} rows can be read"
    )

  def converted(self) -> Iterable[tuple[Where, str | None, dict | Refused]]:
    """(Where, own id or None, converted row or Refused), some of one row."""
    entries = []  # from the first row on that another may decide
    for where, row in progress.counted(self._rows, f"read {self.name}"):
      self.seen += 1
      for own, fresh, source in self._convert(where, row):
        if isinstance(fresh, Refused) and not self.options.max_bad_fraction:
          raise _bad_row(where, own, fresh) from fresh
        if entries or isinstance(fresh, Undecided):
          entries.append((where, own, fresh, source))
        else:
          yield where, own, _of_source(fresh, source)
    rule = self.options.choice or layouts.known_rule(self.fields)
    rule = rule or self.schema.rule
    column = self.fields.get(self.schema.code, self.schema.code)
    undecided = [x for _, _, x, _ in entries if isinstance(x, Undecided)]
    where = f"{self.name}: the column {column}"
    table = choices.meanings(undecided, rule, where)
    for where, own, fresh, source in entries:
      if isinstance(fresh, Undecided):
        side = choices.side_of(fresh, table, rule)
        label = fresh.sides == choices.LABELS
        try:
          if side not in fresh.sides:
            reason = "bad label" if label else "bad choice"
            raise Refused(reason, f"{fresh.code!r:.40} in {column}")
          fresh = fresh.make(side)
        except Refused as error:
          fresh = error
      yield where, own, _of_source(fresh, source)

  def _convert(self, where: Where, row: Any) -> list[tuple]:
    """(Own id, converted row, its source) of each pair of a row."""
    own = None
    try:
      if isinstance(row, BadRow):
        raise Refused(*row)
      row = self._renamed(row)
      own = _own_id(row)
      fresh = self._by_schema(row, where)
    except Refused as error:
      return [(own, error, None)]
    out = []
    for item in fresh if isinstance(fresh, list) else [fresh]:
      name = own
      if isinstance(item, dict):
        item = dict(item)
        name = item.pop("id", None) or own
      out.append((name, item, row.get("source")))
    return out

  def _by_schema(self, row: dict, where: Where) -> Any:
    """The row in its canonical fields; a fork's own convert is checked too."""
    schema, fresh = self.schema, None
    arguments = (self.options.answer_pairs,) if schema.many else ()
    if schema.name in BUILT_IN:
      return schema.convert(row, *arguments)
    try:
      fresh = schema.convert(row, *arguments)
      if isinstance(fresh, list):
        return [_or_refused(item) for item in fresh]
      return _canonical(fresh)
    except Refused:
      raise
    except Exception as error:  # it is the user's code
      made = f"returned {fresh!s:.80}" if fresh is not None else "failed"
      raise DataError(
        f"{_at(where)}: schema {schema.name} {made} ({error!r}), wanted a "
        "dict, or a list of some: prompt and chosen, rejected or completion, "
        "label (texts, or lists of messages); set config.data.schema"
      ) from error

  def reading(self) -> SourceReading:
    """What became of every column that the first rows have."""
    first: dict[str, Any] = {}
    unread: set[str] = set()
    for _, row in self.peeked:
      for column, value in () if isinstance(row, BadRow) else row.items():
        if first.get(column) is None:
          first[column] = value
        if is_messages(value):
          unread |= {f"{column}: {key}" for key in unread_keys(value)}
    roles = roles_of(self.fields) if self.fields else self.schema.roles
    if not roles:
      roles = dict.fromkeys(first, f"for {self.schema.name} to read")
    columns = []
    for column, value in first.items():
      known = bool(self.fields) or is_read(column, value)
      became = roles.get(column, "not read") if known else "not read"
      kind = type(value)
      kind = _TYPES.get(kind, kind.__name__)
      kind = "messages" if is_messages(value) else kind
      columns.append(dict(column=str(column), type=kind, became=became))
    for name in sorted(unread):
      columns.append(dict(column=name, type="text", became="not read"))
    name, schema = self.name, self.schema.name
    return SourceReading(name, schema, self.why, columns, 0, self.seen)


def _of_source(fresh: Any, source: Any) -> Any:
  named = isinstance(fresh, dict) and isinstance(source, str)
  return dict(fresh, source=source) if named else fresh


def _own_id(row: Mapping) -> str | None:
  value = row.get("id")
  if value is None or value == "":
    return None
  if isinstance(value, bool) or not isinstance(value, (str, int)):
    kind = type(value).__name__
    raise Refused("bad id", f"a {kind}, wanted text or a whole number")
  return str(value)


def _or_refused(fresh: Any) -> dict[str, Any] | Refused:
  try:
    return fresh if isinstance(fresh, Refused) else _canonical(fresh)
  except Refused as error:
    return error


def _canonical(fresh: dict) -> dict[str, Any]:
  """What a fork's function returned, through the same checks as any row."""
  if "chosen" in fresh:
    fresh["prompt"], fresh["rejected"]
    made = convert_pair(fresh)
  else:
    row = convert_unpaired(fresh | dict(label=bool(fresh["label"])))
    made = row.make("liked" if fresh["label"] else "disliked")
  return made | {k: str(fresh[k]) for k in ("id",) if fresh.get(k)}


def _digest(row: dict) -> bytes:
  """Of what an id is made of."""
  content = {k: row[k] for k in _CONTENT if k in row}
  text = json.dumps(content, sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(text.encode()).digest()


def _assign_ids(
  own: Sequence[str | None], digests: np.ndarray
) -> tuple[list[str], int, int]:
  """Gives every row an id of its own, whatever order they are in.

  A row without an id is called by its content; rows that share an id (a
  prompt's, for instance) by it and their content.

  Args:
    own: the ids that rows have.
    digests: [n] of their contents.

  Returns:
    The ids, how many contents repeat, and how many rows shared an id.
  """
  counts = collections.Counter(name for name in own if name is not None)
  taken = {name for name, n in counts.items() if n == 1}
  _, which = np.unique(digests, return_inverse=True)
  order = np.argsort(which, kind="stable")
  starts = np.flatnonzero(np.diff(which[order], prepend=-1))
  repeat = np.empty(len(own), np.int64)  # how many were alike before
  repeat[order] = np.arange(len(own)) - starts[which[order]]
  numbers: collections.Counter = collections.Counter()
  ids, shared = [], 0
  for name, digest, times in zip(own, digests.tolist(), repeat.tolist()):
    if name is not None and name in taken and counts[name] == 1:
      ids.append(name)
      continue
    if name is None:
      stem, number, numbered = digest[:8].hex(), times, True
    else:
      stem = f"{name}-{digest[:4].hex()}"
      number, numbered, shared = numbers[stem], numbers[stem] > 0, shared + 1
    new = f"{stem}-{number}" if numbered else stem
    while new in taken:
      number += 1
      new = f"{stem}-{number}"
    if name is not None:
      numbers[stem] = number + 1
    taken.add(new)
    ids.append(new)
  return ids, int((repeat > 0).sum()), shared


def _bad_row(where: Where, own: str | None, error: Refused) -> DataError:
  return DataError(
    f"{_at(where)}: id {own or '(none)'}: {error}; repair the row, or set "
    "config.data.max_bad_fraction"
  )


def _at(where: Where) -> str:
  return f"{where.file}:{where.line}"


def _by_count(counts: Mapping[str, int]) -> str:
  most = sorted(counts.items(), key=lambda item: -item[1])
  return ", ".join(f"{reason} {n}" for reason, n in most) or "none"


def _first(refused: list[dict]) -> str:
  if not refused:
    return "no row"
  row = refused[0]
  return f"{row['file']}:{row['line']} ({row['detail'][:80]})"


def split(
  rows: Iterable[dict], fractions: Mapping[str, float], seed: int
) -> dict[str, RowTable]:
  """Rows by split, whole groups only, whatever order the rows are in.

  A group lands by sha256("<seed>:<group>") read as a number in [0, 1), so a
  new row never moves an old one.

  Args:
    rows: each has a "group".
    fractions: name -> fraction of the groups, summing to 1.
    seed: another seed, another split.

  Raises:
    ConfigError: fractions that are negative or do not sum to 1.
  """
  order = sorted(fractions)  # a config may list them in any order
  shares = np.array([fractions[name] for name in order], np.float64)
  if not (shares >= 0).all() or not abs(shares.sum() - 1) <= 1e-9:  # nor NaN
    raise ConfigError(
      f"split shares {dict(fractions)} sum to {shares.sum():g}, wanted shares "
      "of 0 or more that sum to 1; set config.data.split"
    )
  names = [name for name in order if fractions[name] > 0]
  ends = np.cumsum(shares[shares > 0])[:-1]
  rows = RowTable.of(rows)
  digest = lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest()[:8]
  bits = np.frombuffer(b"".join(map(digest, rows.column("group"))), ">u8")
  u = bits.astype(np.float64) / 2.0**64
  part = np.searchsorted(ends, u, side="right")
  found = {name: rows.where(part == k) for k, name in enumerate(names)}
  return {name: found.get(name, RowTable.of(())) for name in fractions}


def pairs_to_unpaired(rows: Iterable[dict]) -> RowTable:
  """Each pair as two unpaired rows: chosen liked, rejected disliked."""

  def answers():
    for row in rows:
      for k, side in enumerate(("chosen", "rejected")):
        one = dict(id=f"{row['id']}/{side}", prompt=row["prompt"])
        one |= dict(completion=row[side], label=k == 0, group=row["group"])
        one |= {n: row[n] for n in ("turns", "tools", "source") if n in row}
        if "answers" in row:
          one["answers"] = row["answers"] and [row["answers"][k]]
        yield one

  out = RowTable.of(answers())
  return out.take(np.argsort(np.array(out.column("id")), kind="stable"))


def data_summary(
  loaded: Loaded, splits: Mapping[str, RowTable]
) -> dict[str, Any]:
  """What was read and kept, as JSON: counts, lengths, refusals, splits."""
  rows = loaded.rows
  sides = ("chosen", "rejected") if loaded.kind == "pairs" else ("completion",)
  characters = dict(
    prompt=_quantiles([rows.column("prompt")]),
    response=_quantiles([rows.column(side) for side in sides]),
  )
  summary = dict(
    source=loaded.source,
    kind=loaded.kind,
    schema=loaded.schema,
    seen=loaded.seen,
    kept=len(rows),
    refused=len(loaded.refused),
    refused_by_reason=loaded.counts,
    duplicates=loaded.duplicates,
    groups=len({*rows.column("group")}),
    rows_by_split={name: len(part) for name, part in splits.items()},
    characters=characters,
    readings=[r._asdict() for r in loaded.readings],
    contradicted=loaded.contradicted,
    shared_ids=loaded.shared_ids,
    left_out=loaded.left_out,
  )
  if any(margin is not None for margin in rows.column("margin")):
    summary |= dict(tied_scores=loaded.tied, against_scores=loaded.against)
    summary["against_at"] = loaded.against_at
  if loaded.kind == "unpaired":
    summary["liked"] = sum(rows.column("label"))
  return summary


def _quantiles(columns: list[list[str]]) -> dict[str, float]:
  """Of the characters of texts."""
  sizes = [np.fromiter(map(len, texts), np.int64) for texts in columns]
  if not sizes or not len(sizes[0]):
    return {}
  low, middle, high = np.percentile(np.concatenate(sizes), [5, 50, 95])
  return dict(p5=float(low), p50=float(middle), p95=float(high))
