"""The rows of one source, converted by its schema and the rules of a config."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

from jaxalign.core import progress
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.core.lookup import lookup
from jaxalign.data.json_rows import BadRow, Where
from jaxalign.data.schemas import (
  BUILT_IN,
  choices,
  detect_schema,
  Refused,
  Schema,
  SCHEMAS,
)
from jaxalign.data.schemas.choices import check_choice, Undecided
from jaxalign.data.schemas.convert import (
  convert_pair,
  convert_unpaired,
  is_read,
)
from jaxalign.data.schemas.layouts import known_layout
from jaxalign.data.schemas.mapping import check_fields, remap, roles_of
from jaxalign.data.schemas.messages import is_messages, unread_keys
from jaxalign.data.schemas.schema import ANSWER_PAIRS, row_or_refused
from jaxalign.data.sources import read_rows

_PEEK = 1000  # rows looked at before "no schema fits" is believed
_TYPES = {
  str: "text",
  bool: "true or false",
  int: "number",
  float: "number",
  list: "list",
  dict: "object",
  type(None): "null",
}


@dataclasses.dataclass(frozen=True)
class LoadOptions:
  """How rows are read: the knobs of config.data, by their names.

  `schema` may be a key of SCHEMAS, "module:function" (a convert of your own,
  which may return a list), or "auto": that of the first row that has one's
  shape. `caps` and `weights` are of each source, `seed` decides which rows stay
  within them.
  """

  schema: str = "auto"
  limit: int = 0  # rows of each source to read, good or bad; 0: all
  max_bad_fraction: float = 0.5  # of rows refused; 0: the first is an error
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  answer_pairs: str = "all"  # one of ANSWER_PAIRS
  skip: Sequence[str] = ()  # "tied", "contradicting": pairs by their scores
  choice: Any = ""  # see `choices.check_choice`
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
    check_choice(self.choice)
    caps = lambda x: x >= 0
    weights = lambda x: 0 < x < float("inf")
    for knob, fits, wanted in (
      ("caps", caps, "of 0 or more"),
      ("weights", weights, "above 0"),
    ):
      values = getattr(self, knob)
      good = [type(v) in (int, float) and fits(v) for v in values]
      if values and (len(values) != len(sources) or not all(good)):
        raise ConfigError(
          f"data.{knob}={tuple(values)} for {len(sources)} sources, wanted a "
          f"number {wanted} for each; set config.data.{knob}"
        )


class SourceReading(NamedTuple):
  """How one source was read."""

  source: str
  schema: str
  why: str  # this schema was chosen
  columns: list[dict[str, str]]  # column, type, became
  kept: int
  seen: int


class SourceReader:
  """Reads one source: its schema, its columns, what its codes mean.

  A class because a column's codes are settled after its rows were converted.
  """

  def __init__(self, name: str, options: LoadOptions):
    self.name, self.options, self.seen = name, options, 0
    rows = iter(read_rows(name, options.limit))
    self.peeked = list(itertools.islice(rows, _PEEK))
    self._rows = itertools.chain(self.peeked, rows)
    self.rule, more = known_layout(options.fields)
    self.fields = options.fields and {**options.fields, **more}
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
        first = first or DataError(f"{where}: {error}")
        continue
      have = ", ".join(w for w in found.wants if w in row)
      return found, f"row {where.line} has {have or 'its shape'}"
    if not self.peeked:
      raise DataError("no rows")
    where, bad = self.peeked[0]
    raise first or DataError(
      f"{where}: {bad.reason}: {bad.detail}; none of the first "
      f"{len(self.peeked)} rows can be read"
    )

  def converted(self) -> Iterator[tuple[Where, str | None, dict | Refused]]:
    """(Where, own id or None, converted row or Refused), some of one row."""
    waiting = []  # from the first row on that the codes of others decide
    for where, row in progress.counted(self._rows, f"read {self.name}"):
      self.seen += 1
      for own, fresh in self._convert(where, row):
        if isinstance(fresh, Refused) and not self.options.max_bad_fraction:
          raise bad_row(where, own, fresh) from fresh
        if waiting or isinstance(fresh, Undecided):
          waiting.append((where, own, fresh))
        else:
          yield where, own, fresh
    rule = self.options.choice or self.rule or self.schema.rule
    column = (self.fields or {}).get(self.schema.code, self.schema.code)
    undecided = [x for *_, x in waiting if isinstance(x, Undecided)]
    table = choices.meanings(
      undecided, rule, f"{self.name}: the column {column}"
    )
    for where, own, fresh in waiting:
      if isinstance(fresh, Undecided):
        fresh = row_or_refused(_decided, fresh, table, rule, column)
      yield where, own, fresh

  def _convert(self, where: Where, row: Any) -> list[tuple[str | None, Any]]:
    """(Own id, what a row becomes): a pair, several, or why there is none."""
    own = None
    try:
      if isinstance(row, BadRow):
        raise Refused(*row)
      row = self._renamed(row)
      own = _own_id(row)
      fresh = self._by_schema(row, where)
    except Refused as error:
      return [(own, error)]
    out, source = [], row.get("source")
    more = dict(source=source) if isinstance(source, str) else {}
    for item in fresh if isinstance(fresh, list) else [fresh]:
      name = own
      if isinstance(item, dict):
        item = item | more
        name = item.pop("id", None) or own
      elif isinstance(item, Undecided):
        item = item._replace(more=more)
      out.append((name, item))
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
        return [row_or_refused(_canonical, item) for item in fresh]
      return _canonical(fresh)
    except Refused:
      raise
    except Exception as error:  # it is the user's code
      made = f"returned {fresh!s:.80}" if fresh is not None else "failed"
      raise DataError(
        f"{where}: schema {schema.name} {made} ({error!r}), wanted a "
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
      kind = _TYPES.get(type(value), type(value).__name__)
      kind = "messages" if is_messages(value) else kind
      columns.append(dict(column=str(column), type=kind, became=became))
    for name in sorted(unread):
      columns.append(dict(column=name, type="text", became="not read"))
    name, schema = self.name, self.schema.name
    return SourceReading(name, schema, self.why, columns, 0, self.seen)


def _decided(
  row: Undecided, table: Mapping[str, str], rule: Any, column: str
) -> dict[str, Any]:
  """The row whose code means one of the sides; Refused where it means none."""
  side = choices.side_of(row, table, rule)
  if side not in row.sides:
    reason = "bad label" if row.sides == choices.LABELS else "bad choice"
    raise Refused(reason, f"{row.code!r:.40} in {column}")
  return row.make(side) | row.more


def _own_id(row: Mapping) -> str | None:
  value = row.get("id")
  if value is None or value == "":
    return None
  if isinstance(value, bool) or not isinstance(value, (str, int)):
    kind = type(value).__name__
    raise Refused("bad id", f"a {kind}, wanted text or a whole number")
  return str(value)


def _canonical(fresh: dict | Refused) -> dict[str, Any]:
  """What a fork's function returned, through the same checks as any row."""
  if isinstance(fresh, Refused):
    raise fresh
  if "chosen" in fresh:
    fresh["prompt"], fresh["rejected"]
    made = convert_pair(fresh)
  else:
    label = bool(fresh["label"])
    row = convert_unpaired(fresh | dict(label=label))
    made = row.make("liked" if label else "disliked")
  return made | {k: str(fresh[k]) for k in ("id",) if fresh.get(k)}


def bad_row(where: Where, own: str | None, error: Refused) -> DataError:
  """The error that a refused row is where none may be."""
  return DataError(
    f"{where}: id {own or '(none)'}: {error}; repair the row, or set "
    "config.data.max_bad_fraction"
  )
