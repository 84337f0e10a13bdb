"""Checked records with stable ids: loaded, split by group, counted.

The order of the input never matters: rows are sorted by id, an id comes from
the row itself, and the split of a row is a hash of its group.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import hashlib
import itertools
import json
from typing import Any, NamedTuple

import numpy as np

from jaxalign import progress
from jaxalign.data.schemas import (
  choices,
  detect,
  layouts,
  Refused,
  Schema,
  SCHEMAS,
)
from jaxalign.data.schemas.choices import Undecided
from jaxalign.data.schemas.fields import check_fields, remap
from jaxalign.data.schemas.messages import is_messages, unread_keys
from jaxalign.data.schemas.pairs import ANSWER_PAIRS
from jaxalign.data.schemas.rows import (
  convert_pair,
  convert_unpaired,
  flipped,
  is_read,
)
from jaxalign.data.sources import BadRow, read_rows, Where
from jaxalign.data.tables import MESSAGES
from jaxalign.errors import ConfigError, DataError
from jaxalign.lookup import lookup

_PEEK = 1000  # rows looked at before "no schema fits" is believed
# An id is a digest of these: what else is kept of a row may grow.
_CONTENT = ("prompt", "chosen", "rejected", "completion", "label", "group")
_EXTRA = (*MESSAGES, "margin", "source")  # that some rows of a source may lack


class TooManyRefused(DataError):
  """More rows refused than allowed; `refused` are they, as in `Loaded`."""

  def __init__(self, message: str, refused: list[dict]):
    super().__init__(message)
    self.refused = refused


class Reading(NamedTuple):
  """How one source was read."""

  source: str
  schema: str
  why: str  # this schema was chosen
  columns: list[dict[str, str]]  # column, type, became
  gave: int  # rows kept
  seen: int


class Loaded(NamedTuple):
  """What the sources held: seen == len(rows) + len(refused) + left_out."""

  kind: str  # "pairs" or "unpaired"
  schema: str
  rows: list[dict]  # by id: id, prompt, chosen, rejected | completion, label;
  #   group; where there are any turns, answers, tools, margin, source
  refused: list[dict]  # file, line, id, reason, detail, as they came
  counts: dict[str, int]  # refused, by reason
  seen: int
  duplicates: int  # rows kept whose whole content an earlier one had
  source: str
  tied: int = 0  # rows whose two scores are equal, kept or not
  against: int = 0  # rows whose scores contradict their label, kept or not
  against_at: str = ""  # the first of them, file and line
  contradicted: int = 0  # pairs kept whose reverse was kept too
  shared_ids: int = 0  # rows that shared an id with another
  left_out: int = 0  # by data.caps and data.weights
  readings: tuple[Reading, ...] = ()
  where: Mapping[str, Where] = {}  # id -> where the row stands


def load(
  source: str | Sequence[str],
  *,
  schema: str = "auto",
  limit: int = 0,
  on_bad_rows: str = "skip",
  max_bad_fraction: float = 0.5,
  fields: Mapping[str, str] | None = None,
  answer_pairs: str = "all",
  on_tied_scores: str = "keep",
  on_contradicting_scores: str = "keep",
  choice: Any = "",
  caps: Sequence[int] = (),
  weights: Sequence[float] = (),
  seed: int = 0,
) -> Loaded:
  """Reads, converts and checks every row of one source or of several.

  Args:
    source: see `sources.read_rows`; several are read by the same rules.
    schema: a key of SCHEMAS, "module:function" (a convert of your own, which
      may return a list), or "auto": that of the first row that has one's shape.
    limit: rows of each source to read, good or bad; 0 for all.
    on_bad_rows: "skip" counts and keeps the reason; "error" stops at the first.
    max_bad_fraction: more refused rows than this share is an error.
    fields: what a schema reads -> where the row has it, see `fields.remap`;
      None or empty: rows are read as they are.
    answer_pairs: of several answers to a prompt, one of ANSWER_PAIRS.
    on_tied_scores: "keep" pairs whose scores are equal, or "skip" them.
    on_contradicting_scores: the same of pairs whose rejected answer scores
      higher than the chosen one.
    choice: what the codes of a choice or a label mean, see `choices.check`.
    caps: rows of each source at most; 0: all.
    weights: of each source's share in the rows kept; (): as they come.
    seed: which rows stay within a cap or a weight.

  Raises:
    ConfigError: an unknown schema, field or choice.
    DataError: no schema fits; a bad row under "error"; too many bad rows;
      codes whose meaning is not certain.
  """
  names = [source] if isinstance(source, str) else list(source)
  for knob, value, known in (
    ("on_bad_rows", on_bad_rows, ("skip", "error")),
    ("answer_pairs", answer_pairs, ANSWER_PAIRS),
    ("on_tied_scores", on_tied_scores, ("keep", "skip")),
    ("on_contradicting_scores", on_contradicting_scores, ("keep", "skip")),
  ):
    if value not in known:
      raise ConfigError(
        f"{knob} is {value!r}, wanted {' or '.join(known)}; "
        f"set config.data.{knob}"
      )
  check_fields(fields or {})
  choices.check(choice)
  check_shares(names, caps, weights)
  rows, refused, readings = [], [], []
  seen = tied = against = 0
  kind, against_at = None, ""
  for name in names:
    found = _Source(name, schema, limit, fields or {}, answer_pairs, choice)
    kept = []
    for where, own, fresh in found.rows(on_bad_rows):
      seen += 1
      try:
        if isinstance(fresh, Refused):
          raise fresh
        margin = fresh.get("margin")
        if choice == choices.BY_SCORE and "chosen" in fresh:
          if margin is None:
            raise Refused("no scores", "of the two answers")
          if margin == 0:
            tied += 1
            raise Refused("tied scores", "neither answer won")
          if margin < 0:
            fresh, margin = flipped(fresh), -margin
        if margin is not None and "chosen" in fresh:
          tied += margin == 0
          against += margin < 0
          if margin < 0:
            against_at = against_at or _at(where)
          if margin == 0 and on_tied_scores == "skip":
            raise Refused("tied scores", "")
          if margin < 0 and on_contradicting_scores == "skip":
            raise Refused("scores against the label", f"margin {margin:g}")
        its_kind = "pairs" if "chosen" in fresh else "unpaired"
        kind = kind or its_kind
        if its_kind != kind:
          raise Refused("mixed kinds", f"{its_kind} among {kind}")
      except Refused as error:
        if on_bad_rows == "error":
          raise _at_once(where, own, error) from error
        refused.append(
          dict(
            file=where.file,
            line=where.line,
            id=own,
            reason=error.reason,
            detail=error.detail,
          )
        )
        continue
      if len(names) > 1:
        fresh = dict(source=name) | fresh
      kept.append((where, dict(id=own) | fresh))
    readings.append(found.reading(len(kept)))
    rows.append(kept)
  schemas = ", ".join(dict.fromkeys(r.schema for r in readings))
  counts = dict(
    sorted(collections.Counter(row["reason"] for row in refused).items())
  )
  label = ", ".join(names)
  if refused and len(refused) > max_bad_fraction * seen or not any(rows):
    raise TooManyRefused(
      f"{label}: {len(refused)} of {seen} rows refused, more than the share "
      f"{max_bad_fraction} allowed or all: {_listed(counts)}; first at "
      f"{_first(refused)}; set config.data.max_bad_fraction, or config.data."
      f"schema (now {schemas})",
      refused,
    )
  every = [pair for kept in rows for pair in kept]
  duplicates, shared = _name([row for _, row in every])
  left = _within(rows, caps, weights, seed)
  readings = [r._replace(gave=len(kept)) for r, kept in zip(readings, left)]
  kept = sorted(
    (pair for part in left for pair in part), key=lambda pair: pair[1]["id"]
  )
  out = [row for _, row in kept]
  for name in _EXTRA:  # all rows of a table have the same columns
    if any(name in row for row in out):
      out = [dict(row, **{name: row.get(name)}) for row in out]
  return Loaded(
    kind,
    schemas,
    out,
    refused,
    counts,
    seen,
    duplicates,
    label,
    tied,
    against,
    against_at,
    _contradicted(out),
    shared,
    len(every) - len(out),
    tuple(readings),
    {row["id"]: where for where, row in kept},
  )


def check_shares(
  names: Sequence[str], caps: Sequence[int], weights: Sequence[float]
) -> None:
  """Raises ConfigError for caps or weights that do not fit the sources."""
  for knob, values, least in (("caps", caps, 0), ("weights", weights, None)):
    if not values:
      continue
    good = all(
      isinstance(v, (int, float))
      and not isinstance(v, bool)
      and (v >= 0 if least == 0 else 0 < v < float("inf"))
      for v in values
    )
    if len(values) != len(names) or not good:
      raise ConfigError(
        f"data.{knob}={tuple(values)} for {len(names)} sources,"
        " wanted a number "
        f"{'of 0 or more' if least == 0 else 'above 0'} for "
        f"each; set config.data.{knob}"
      )


def _within(
  rows: list[list], caps: Sequence[int], weights: Sequence[float], seed: int
) -> list[list]:
  """Of each source the rows that its cap and its weight leave, by a hash."""
  sizes = [
    min(len(kept), int(cap) or len(kept))
    for kept, cap in zip(rows, caps or [0] * len(rows))
  ]
  if weights:
    least = min(size / weight for size, weight in zip(sizes, weights))
    sizes = [
      min(size, int(least * weight + 1e-9))
      for size, weight in zip(sizes, weights)
    ]
  order = lambda pair: hashlib.sha256(
    f"{seed}:{pair[1]['id']}".encode()
  ).digest()
  return [
    kept if size == len(kept) else sorted(kept, key=order)[:size]
    for kept, size in zip(rows, sizes)
  ]


def _contradicted(rows: list[dict]) -> int:
  """Pairs whose reverse, the same two answers the other way round, is there."""
  seen = {
    (r["prompt"], r["chosen"], r["rejected"]) for r in rows if "chosen" in r
  }
  return sum(
    (r["prompt"], r["rejected"], r["chosen"]) in seen
    for r in rows
    if "chosen" in r
  )


class _Source:
  """One source on its way: its schema, its columns, what its codes mean.

  A class because a column's codes are settled after its rows were converted.
  """

  def __init__(
    self,
    name: str,
    schema: str,
    limit: int,
    fields: Mapping[str, str],
    answer_pairs: str,
    choice: Any,
  ):
    self.name, self.fields, self.choice = name, fields, choice
    self.pairs, self.seen = answer_pairs, 0
    rows = iter(read_rows(name, limit))
    self.peeked = list(itertools.islice(rows, _PEEK))
    self._rows = itertools.chain(self.peeked, rows)
    more = layouts.known_strength(fields) if fields else {}
    self._read = (
      (lambda row: remap(row, {**fields, **more}))
      if fields
      else (lambda row: row)
    )
    if schema == "auto":
      self.schema, self.why = _detected(self.peeked, self._read)
    else:
      self.schema = lookup(SCHEMAS, schema, "schema", "data.schema")
      self.why = "config.data.schema names it"
      if not isinstance(self.schema, Schema):
        self.schema = Schema(schema, lambda row: True, self.schema, "")

  def rows(self, on_bad_rows: str) -> Iterator[tuple]:
    """(Where, own id or None, converted row or Refused), some of one row."""
    schema, open_rows, entries = self.schema, [], []
    for where, row in progress.counted(self._rows, f"read {self.name}"):
      self.seen += 1
      for own, fresh in self._converted(where, row):
        if isinstance(fresh, Undecided):
          open_rows.append(fresh)
        elif isinstance(fresh, Refused) and on_bad_rows == "error":
          raise _at_once(where, own, fresh) from fresh
        entries.append((where, own, fresh))
    rule = self.choice or layouts.known_rule(self.fields) or schema.rule
    column = self.fields.get(schema.code, schema.code)
    table = choices.decide(open_rows, rule, f"{self.name}: the column {column}")
    for where, own, fresh in entries:
      if isinstance(fresh, Undecided):
        side = choices.settled(fresh, table, rule)
        try:
          if side not in fresh.sides:
            raise Refused(
              "bad label" if fresh.sides == choices.LABELS else "bad choice",
              f"{fresh.code!r:.40} in {column}",
            )
          fresh = fresh.make(side)
        except Refused as error:
          fresh = error
      yield where, own, fresh

  def _converted(self, where: Where, row: Any) -> Iterator[tuple]:
    own = None
    try:
      if isinstance(row, BadRow):
        raise Refused(*row)
      row = self._read(row)
      own = _own_id(row)
      fresh = _converted(self.schema, row, where, self.pairs)
    except Refused as error:
      yield own, error
      return
    source = row.get("source")
    for one in fresh if isinstance(fresh, list) else [fresh]:
      if isinstance(one, dict):
        one = dict(one)
        mine = one.pop("id", None) or own
        if isinstance(source, str):
          one["source"] = source
        yield mine, one
      elif isinstance(one, Undecided) and isinstance(source, str):
        yield (
          own,
          one._replace(
            make=lambda side, make=one.make: dict(make(side), source=source)
          ),
        )
      else:
        yield own, one

  def reading(self, gave: int) -> Reading:
    """What became of every column that the first rows have."""
    first: dict[str, Any] = {}
    unread: set[str] = set()
    for _, row in self.peeked:
      if isinstance(row, BadRow):
        continue
      for column, value in row.items():
        if first.get(column) is None:
          first[column] = value
        if is_messages(value):
          unread |= {f"{column}: {key}" for key in unread_keys(value)}
    roles = (
      layouts.roles_of({**self.fields, **layouts.known_strength(self.fields)})
      if self.fields
      else self.schema.roles
    )
    if not roles:
      roles = dict.fromkeys(first, f"for {self.schema.name} to read")
    columns = [
      dict(
        column=str(column),
        type=_type_of(value),
        became=roles.get(column, "not read")
        if self.fields or is_read(column, value)
        else "not read",
      )
      for column, value in first.items()
    ]
    columns += [
      dict(column=name, type="text", became="not read")
      for name in sorted(unread)
    ]
    return Reading(
      self.name, self.schema.name, self.why, columns, gave, self.seen
    )


def _type_of(value: Any) -> str:
  if is_messages(value):
    return "messages"
  return {
    str: "text",
    bool: "true or false",
    int: "number",
    float: "number",
    list: "list",
    dict: "object",
    type(None): "null",
  }.get(type(value), type(value).__name__)


def _at_once(where: Where, own: str | None, error: Refused) -> DataError:
  return DataError(
    f"{_at(where)}: id {own or '(none)'}: {error}; repair the "
    "row, or set config.data.max_bad_fraction"
  )


def _detected(peeked: list, read: Callable) -> tuple[Schema, str]:
  first = None
  for where, row in peeked:
    if isinstance(row, BadRow):
      continue
    try:
      found = detect(read(row))
    except DataError as error:
      first = first or DataError(f"{_at(where)}: {error}")
      continue
    have = [w for w in found.wants if w in read(row)]
    return found, f"row {where.line} has {', '.join(have) or 'its shape'}"
  if not peeked:
    raise DataError("no rows")
  where, bad = peeked[0]
  raise first or DataError(
    f"{_at(where)}: {bad.reason}: {bad.detail}; none of "
    f"the first {len(peeked)} rows can be read"
  )


def _own_id(row: Mapping) -> str | None:
  value = row.get("id")
  if value is None or value == "":
    return None
  if isinstance(value, bool) or not isinstance(value, (str, int)):
    raise Refused(
      "bad id", f"a {type(value).__name__}, wanted text or a whole number"
    )
  return str(value)


def _converted(schema: Schema, row: dict, where: Where, pairs: str) -> Any:
  """The row in its canonical fields; a fork's own convert is checked too."""
  if schema.name in SCHEMAS:
    return schema.convert(row, pairs) if schema.many else schema.convert(row)
  fresh = None
  try:
    fresh = schema.convert(row)
    if isinstance(fresh, list):
      return [_or_refused(one) for one in fresh]
    return _own_row(fresh)
  except Refused:
    raise
  except Exception as error:  # it is the user's code
    made = f"returned {fresh!s:.80}" if fresh is not None else "failed"
    raise DataError(
      f"{_at(where)}: schema {schema.name} {made} ({error!r}), "
      "wanted a dict, or a list of some: prompt and chosen, "
      "rejected or completion, label (texts, or lists of "
      "messages); set config.data.schema"
    ) from error


def _or_refused(fresh: Any) -> dict[str, Any] | Refused:
  try:
    return fresh if isinstance(fresh, Refused) else _own_row(fresh)
  except Refused as error:
    return error


def _own_row(fresh: dict) -> dict[str, Any]:
  """What a fork's function returned, through the same checks as any row."""
  if "chosen" in fresh:
    fresh["prompt"], fresh["rejected"]
    made = convert_pair(fresh)
  else:
    made = convert_unpaired(fresh | dict(label=bool(fresh["label"]))).make(
      "liked" if fresh["label"] else "disliked"
    )
  return made | {k: str(fresh[k]) for k in ("id",) if fresh.get(k)}


def _name(rows: list[dict]) -> tuple[int, int]:
  """Gives every row an id of its own, whatever order they are in.

  A row without an id is called by its content; rows that share an id (a
  prompt's, for instance) by it and their content.

  Returns:
    How many contents repeat, and how many rows shared an id.
  """
  digests, times = [], collections.Counter()
  for row in rows:
    content = json.dumps(
      {k: row[k] for k in _CONTENT if k in row},
      sort_keys=True,
      ensure_ascii=False,
    )
    digests.append(hashlib.sha256(content.encode()).hexdigest())
  own = collections.Counter(row["id"] for row in rows if row["id"] is not None)
  taken = {name for name, n in own.items() if n == 1}
  shared = 0
  numbers: collections.Counter = collections.Counter()
  for row, digest in zip(rows, digests):
    times[digest] += 1
    if row["id"] in taken:
      continue
    shared += row["id"] is not None
    stem = digest[:16] if row["id"] is None else f"{row['id']}-{digest[:8]}"
    if row["id"] is None:
      number = times[digest] - 1
    else:
      number = numbers[stem]
    name = f"{stem}-{number}" if row["id"] is None or number else stem
    while name in taken:
      number += 1
      name = f"{stem}-{number}"
    numbers[stem] = number + 1
    taken.add(name)
    row["id"] = name
  return sum(n - 1 for n in times.values()), shared


def _at(where: Where) -> str:
  return f"{where.file}:{where.line}"


def _listed(counts: Mapping[str, int]) -> str:
  return (
    ", ".join(
      f"{reason} {n}"
      for reason, n in sorted(counts.items(), key=lambda item: -item[1])
    )
    or "none"
  )


def _first(refused: list[dict]) -> str:
  return (
    f"{refused[0]['file']}:{refused[0]['line']} ({refused[0]['detail'][:80]})"
    if refused
    else "no row"
  )


def split(
  rows: Iterable[dict], fractions: Mapping[str, float], seed: int
) -> dict[str, list[dict]]:
  """Rows by split, whole groups only, whatever order the rows are in.

  A group lands by sha256("<seed>:<group>") read as a number in [0, 1), so a
  new row never moves an old one.

  Args:
    rows: each has a "group".
    fractions: name -> share, summing to 1.
    seed: another seed, another split.

  Raises:
    ConfigError: shares that are negative or do not sum to 1.
  """
  order = sorted(fractions)  # a config may list them in any order
  shares = np.array([fractions[name] for name in order], np.float64)
  if not (shares >= 0).all() or not abs(shares.sum() - 1) <= 1e-9:  # nor NaN
    raise ConfigError(
      f"split shares {dict(fractions)} sum to "
      f"{shares.sum():g}, wanted shares of 0 or more that sum "
      "to 1; set config.data.split"
    )
  names = [name for name in order if fractions[name] > 0]
  ends = np.cumsum(shares[shares > 0])[:-1]
  parts = {name: [] for name in fractions}
  for row in rows:
    digest = hashlib.sha256(f"{seed}:{row['group']}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2.0**64
    parts[names[int(np.searchsorted(ends, u, side="right"))]].append(row)
  return parts


def pairs_to_unpaired(rows: Iterable[dict]) -> list[dict]:
  """Each pair as two unpaired rows: chosen liked, rejected disliked."""
  return sorted(
    (
      dict(
        id=f"{row['id']}/{side}",
        prompt=row["prompt"],
        completion=row[side],
        label=side == "chosen",
        group=row["group"],
      )
      | {n: row[n] for n in ("turns", "tools", "source") if n in row}
      | (
        dict(answers=row["answers"] and [row["answers"][k]])
        if "answers" in row
        else {}
      )
      for row in rows
      for k, side in enumerate(("chosen", "rejected"))
    ),
    key=lambda row: row["id"],
  )


def data_summary(
  loaded: Loaded, splits: Mapping[str, list[dict]]
) -> dict[str, Any]:
  """What was read and kept, as JSON: counts, lengths, refusals, splits."""
  responses = (
    ("chosen", "rejected") if loaded.kind == "pairs" else ("completion",)
  )
  lengths = dict(
    prompt=[len(row["prompt"]) for row in loaded.rows],
    response=[len(row[side]) for row in loaded.rows for side in responses],
  )
  summary = dict(
    source=loaded.source,
    kind=loaded.kind,
    schema=loaded.schema,
    seen=loaded.seen,
    kept=len(loaded.rows),
    refused=len(loaded.refused),
    refused_by_reason=loaded.counts,
    duplicates=loaded.duplicates,
    groups=len({row["group"] for row in loaded.rows}),
    rows_by_split={name: len(rows) for name, rows in splits.items()},
    characters={name: _quantiles(values) for name, values in lengths.items()},
  )
  summary |= dict(
    readings=[r._asdict() for r in loaded.readings],
    contradicted=loaded.contradicted,
    shared_ids=loaded.shared_ids,
    left_out=loaded.left_out,
  )
  if any(row.get("margin") is not None for row in loaded.rows):
    summary |= dict(
      tied_scores=loaded.tied,
      against_scores=loaded.against,
      against_at=loaded.against_at,
    )
  if loaded.kind == "unpaired":
    summary["liked"] = sum(row["label"] for row in loaded.rows)
  return summary


def _quantiles(values: list[int]) -> dict[str, float]:
  if not values:
    return {}
  low, middle, high = np.percentile(values, [5, 50, 95])
  return dict(p5=float(low), p50=float(middle), p95=float(high))
