"""Checked records with stable ids: loaded, split by group, written, counted.

The order of the input never matters: rows are sorted by id, an id comes from
the row itself, and the split of a row is a hash of its group.
"""

import collections
import hashlib
import io
import itertools
import json
from typing import Any, Iterable, Iterator, Mapping, NamedTuple

import numpy as np
from etils import epath

from jaxalign import artifacts
from jaxalign import progress
from jaxalign.data.schemas import SCHEMAS, Refused, Schema, detect
from jaxalign.data.schemas import trees
from jaxalign.data.schemas.fields import check_fields, remap
from jaxalign.data.schemas.pairs import make_pair, make_thumb
from jaxalign.data.sources import BadRow, Where, read_rows
from jaxalign.errors import ConfigError, CorruptError, DataError
from jaxalign.lookup import lookup

_PEEK = 1000  # rows looked at before "no schema fits" is believed
# An id is a digest of these: what else is kept of a row may grow.
_CONTENT = ("prompt", "chosen", "rejected", "completion", "label", "group")
_EXTRA = ("turns", "margin", "source")  # that some rows of a source may lack


class TooManyRefused(DataError):
  """More rows refused than allowed; `refused` are they, as in `Loaded`."""

  def __init__(self, message: str, refused: list[dict]):
    super().__init__(message)
    self.refused = refused


class Loaded(NamedTuple):
  """What a source held; `seen == len(rows) + len(refused)`, always."""
  kind: str  # "pairs" or "thumbs"
  schema: str
  rows: list[dict]  # by id: id, prompt, chosen, rejected | completion, label;
  #   group; where there are any turns (of the prompt), margin, source
  refused: list[dict]  # file, line, id, reason, detail, as they came
  counts: dict[str, int]  # refused, by reason
  seen: int
  duplicates: int  # rows kept whose whole content an earlier one had
  source: str
  tied: int = 0  # rows whose two scores are equal, kept or not


def load(source: str, *, schema: str = "auto", limit: int = 0,
         on_bad_rows: str = "skip", max_bad_fraction: float = 0.5,
         fields: Mapping[str, str] | None = None, tree_pairs: str = "all",
         on_tied_scores: str = "keep") -> Loaded:
  """Reads, converts and checks every row of `source`.

  Args:
    source: see `sources.read_rows`.
    schema: a key of SCHEMAS, "module:function" (a convert of your own), or
      "auto": the schema of the first row that has one's shape.
    limit: rows to read, good or bad; 0 for all.
    on_bad_rows: "skip" counts and keeps the reason; "error" stops at the first.
    max_bad_fraction: more refused rows than this share is an error.
    fields: what a schema reads -> where the row has it, see `fields.remap`;
      None or empty: rows are read as they are.
    tree_pairs: "all" or "adjacent" ranks of a tree's replies.
    on_tied_scores: "keep" pairs whose scores are equal, or "skip" them.

  Raises:
    ConfigError: an unknown schema, field or choice.
    DataError: no schema fits; a bad row under "error"; too many bad rows.
  """
  for knob, value, known in (
      ("on_bad_rows", on_bad_rows, ("skip", "error")),
      ("tree_pairs", tree_pairs, trees.TREE_PAIRS),
      ("on_tied_scores", on_tied_scores, ("keep", "skip"))):
    if value not in known:
      raise ConfigError(f"{knob} is {value!r}, wanted {known[0]!r} or "
                        f"{known[1]!r}; set config.data.{knob}")
  check_fields(fields or {})
  pairs = iter(read_rows(source, limit))
  if fields:
    pairs = ((where, row if isinstance(row, BadRow) else remap(row, fields))
             for where, row in pairs)
  if schema == "auto":
    found, pairs = _detected(pairs)
  else:
    found = lookup(SCHEMAS, schema, "schema", "data.schema")
    if not isinstance(found, Schema):
      found = Schema(schema, lambda row: True, found, "")
  if found is trees.TREES and tree_pairs == "adjacent":
    found = trees.ADJACENT
  kind = found.kind
  rows, refused, lines = [], [], {}
  seen = tied = 0
  for where, own, fresh in progress.counted(_converted_rows(found, pairs),
                                            f"read {source}"):
    seen += 1
    try:
      if isinstance(fresh, Refused):
        raise fresh
      if fresh.get("margin") == 0:
        tied += 1
        if on_tied_scores == "skip":
          raise Refused("tied scores", "")
      its_kind = "pairs" if "chosen" in fresh else "thumbs"
      kind = kind or its_kind
      if its_kind != kind:
        raise Refused("mixed kinds", f"{its_kind} among {kind}")
      if own in lines:
        raise Refused("duplicate id", f"{_at(lines[own])} has it too")
    except Refused as error:
      if on_bad_rows == "error":
        raise DataError(f"{_at(where)}: id {own or '(none)'}: {error}; repair "
                        "the row, or set config.data.on_bad_rows='skip'"
                        ) from error
      refused.append(dict(file=where.file, line=where.line, id=own,
                          reason=error.reason, detail=error.detail))
      continue
    if own is not None:
      lines[own] = where
    rows.append(dict(id=own) | fresh)
  counts = dict(sorted(collections.Counter(
      row["reason"] for row in refused).items()))
  if refused and len(refused) > max_bad_fraction * seen or not rows:
    raise TooManyRefused(
        f"{source}: {len(refused)} of {seen} rows refused, more than the share "
        f"{max_bad_fraction} allowed or all: {_listed(counts)}; first at "
        f"{_first(refused)}; set config.data.max_bad_fraction, or config.data."
        f"schema (now {found.name})", refused)
  duplicates = _name(rows, lines)
  rows.sort(key=lambda row: row["id"])
  for name in _EXTRA:  # all rows of a table have the same columns
    if any(name in row for row in rows):
      rows = [dict(row, **{name: row.get(name)}) for row in rows]
  return Loaded(kind, found.name, rows, refused, counts, seen, duplicates,
                source, tied)


def _converted_rows(schema: Schema, pairs: Iterable) -> Iterator[tuple]:
  """(Where, own id or None, converted row or Refused), many of a tree."""
  for where, row in pairs:
    own = None
    try:
      if isinstance(row, BadRow):
        raise Refused(*row)
      own = _own_id(row)
      fresh = _converted(schema, row, where)
      if not schema.many and isinstance(row.get("source"), str):
        fresh = dict(fresh, source=row["source"])
    except Refused as error:
      yield where, own, error
      continue
    if not schema.many:
      yield where, own, fresh
      continue
    for one in fresh:
      if isinstance(one, Refused):
        yield where, own, one
      else:
        yield where, one["id"], {k: v for k, v in one.items() if k != "id"}


def _detected(pairs: Any) -> tuple[Schema, Any]:
  peeked, first = [], None
  for pair in itertools.islice(pairs, _PEEK):
    peeked.append(pair)
    if isinstance(pair[1], BadRow):
      continue
    try:
      return detect(pair[1]), itertools.chain(peeked, pairs)
    except DataError as error:
      first = first or DataError(f"{_at(pair[0])}: {error}")
  where, bad = peeked[0]
  raise first or DataError(f"{_at(where)}: {bad.reason}: {bad.detail}; none of "
                           f"the first {len(peeked)} rows can be read")


def _own_id(row: Mapping) -> str | None:
  value = row.get("id")
  if value is None or value == "":
    return None
  if isinstance(value, bool) or not isinstance(value, (str, int)):
    raise Refused("bad id", f"a {type(value).__name__}, wanted text or a "
                  "whole number")
  return str(value)


def _converted(schema: Schema, row: dict, where: Where) -> dict[str, Any]:
  """The row in its canonical fields; a fork's own convert is checked too."""
  if schema.name in SCHEMAS:
    return schema.convert(row)
  fresh = None
  try:
    fresh = schema.convert(row)
    if "chosen" in fresh:
      return make_pair(fresh["prompt"], fresh["chosen"], fresh["rejected"],
                       fresh.get("group", ""), fresh.get("turns"),
                       fresh.get("margin"))
    return make_thumb(fresh["prompt"], fresh["completion"],
                      bool(fresh["label"]), fresh.get("group", ""),
                      fresh.get("turns"))
  except Refused:
    raise
  except Exception as error:  # it is the user's code
    made = f"returned {fresh!s:.80}" if fresh is not None else "failed"
    raise DataError(f"{_at(where)}: schema {schema.name} {made} ({error!r}), "
                    "wanted a dict of texts: prompt and chosen, rejected or "
                    "completion, label; set config.data.schema") from error


def _name(rows: list[dict], taken: Mapping) -> int:
  """Gives every row without an id one; returns how many contents repeat."""
  times = collections.Counter()
  for row in rows:
    content = json.dumps({k: row[k] for k in _CONTENT if k in row},
                         sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(content.encode()).hexdigest()
    if row["id"] is None:
      number = times[digest]
      while (name := f"{digest[:16]}-{number}") in taken:
        number += 1
      row["id"] = name
    times[digest] += 1
  return sum(n - 1 for n in times.values())


def _at(where: Where) -> str:
  return f"{where.file}:{where.line}"


def _listed(counts: Mapping[str, int]) -> str:
  return ", ".join(f"{reason} {n}" for reason, n in sorted(
      counts.items(), key=lambda item: -item[1])) or "none"


def _first(refused: list[dict]) -> str:
  return (f"{refused[0]['file']}:{refused[0]['line']} "
          f"({refused[0]['detail'][:80]})" if refused else "no row")


def split(rows: Iterable[dict], fractions: Mapping[str, float],
          seed: int) -> dict[str, list[dict]]:
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
    raise ConfigError(f"split shares {dict(fractions)} sum to "
                      f"{shares.sum():g}, wanted shares of 0 or more that sum "
                      "to 1; set config.data.split")
  names = [name for name in order if fractions[name] > 0]
  ends = np.cumsum(shares[shares > 0])[:-1]
  parts = {name: [] for name in fractions}
  for row in rows:
    digest = hashlib.sha256(f"{seed}:{row['group']}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2.0 ** 64
    parts[names[int(np.searchsorted(ends, u, side="right"))]].append(row)
  return parts


def pairs_to_thumbs(rows: Iterable[dict]) -> list[dict]:
  """Each pair as two thumbs rows: chosen liked, rejected disliked."""
  return sorted((dict(id=f"{row['id']}/{side}", prompt=row["prompt"],
                      completion=row[side], label=side == "chosen",
                      group=row["group"]) | {
                          n: row[n] for n in ("turns", "source") if n in row}
                 for row in rows for side in ("chosen", "rejected")),
                key=lambda row: row["id"])


def write_rows(path: epath.PathLike, rows: list[dict]) -> None:
  """Writes rows as parquet, whole or not at all (a temp name, then renamed).

  Raises:
    WriteError: the disk is full or the folder cannot be written.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq
  table = (pa.Table.from_pylist(rows) if rows else pa.table(
      {name: pa.array([], pa.string()) for name in ("id", "prompt", "group")}))
  buffer = io.BytesIO()
  pq.write_table(table, buffer, compression="zstd", row_group_size=4096,
                 write_page_checksum=True)
  artifacts.write_bytes(path, buffer.getvalue())


def read_table(path: epath.PathLike) -> list[dict]:
  """The rows that `write_rows` wrote.

  Raises:
    CorruptError: missing, truncated, or no parquet file.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq
  try:
    with epath.Path(path).open("rb") as file:
      return pq.ParquetFile(
          file, page_checksum_verification=True).read().to_pylist()
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise CorruptError(f"table {path} cannot be read: {str(error)[:200]}; "
                       "delete it and run the data stage again") from error


def read_column(path: epath.PathLike, name: str) -> list:
  """One column of what `write_rows` wrote; the others are not read.

  Raises:
    CorruptError: missing, truncated, or no parquet file.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq
  try:
    with epath.Path(path).open("rb") as file:
      return pq.ParquetFile(file, page_checksum_verification=True).read(
          [name]).column(name).to_pylist()
  except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
    raise CorruptError(f"column {name} of {path} cannot be read: "
                       f"{str(error)[:200]}; delete it and run the stage that "
                       "wrote it again") from error


def column_names(path: epath.PathLike) -> list[str]:
  """The names of the columns that `write_rows` wrote."""
  import pyarrow.parquet as pq
  with epath.Path(path).open("rb") as file:
    return pq.ParquetFile(file).schema_arrow.names


def write_refused(path: epath.PathLike, refused: Iterable[dict]) -> None:
  """Writes the refused rows' file, line, id, reason, detail as .jsonl."""
  text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in refused)
  artifacts.write_bytes(path, text.encode())


def data_card(loaded: Loaded, splits: Mapping[str, list[dict]]
              ) -> dict[str, Any]:
  """What was read and kept, as JSON: counts, lengths, refusals, splits."""
  responses = (("chosen", "rejected") if loaded.kind == "pairs"
               else ("completion",))
  lengths = dict(prompt=[len(row["prompt"]) for row in loaded.rows],
                 response=[len(row[side]) for row in loaded.rows
                           for side in responses])
  card = dict(
      source=loaded.source, kind=loaded.kind, schema=loaded.schema,
      seen=loaded.seen, kept=len(loaded.rows), refused=len(loaded.refused),
      refused_by_reason=loaded.counts, duplicates=loaded.duplicates,
      groups=len({row["group"] for row in loaded.rows}),
      rows_by_split={name: len(rows) for name, rows in splits.items()},
      characters={name: _quantiles(values)
                  for name, values in lengths.items()})
  if any(row.get("margin") is not None for row in loaded.rows):
    card["tied_scores"] = loaded.tied
  if loaded.kind == "thumbs":
    card["liked"] = sum(row["label"] for row in loaded.rows)
  return card


def _quantiles(values: list[int]) -> dict[str, float]:
  if not values:
    return {}
  low, middle, high = np.percentile(values, [5, 50, 95])
  return dict(p5=float(low), p50=float(middle), p95=float(high))
