"""Checked records with stable ids: loaded, split by group, counted.

The order of the input never matters: rows are sorted by id, an id comes from
the row itself, and the split of a row is a hash of its group.
"""

import array
import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json

import numpy as np
import pyarrow as pa

from jaxalign.core.errors import ConfigError
from jaxalign.data import refusals
from jaxalign.data.json_rows import Where
from jaxalign.data.refusals import TooManyRefused
from jaxalign.data.row_table import RowTable
from jaxalign.data.schemas import choices, Refused
from jaxalign.data.schemas.convert import flipped
from jaxalign.data.source_reader import (
  bad_row,
  LoadOptions,
  SourceReader,
  SourceReading,
)

# An id is a digest of these: what else is kept of a row may grow.
_CONTENT = ("prompt", "chosen", "rejected", "completion", "label", "group")


class Places(Mapping):
  """id -> Where a row stands, in a few bytes a row."""

  def __init__(self, ids: np.ndarray, files: np.ndarray, lines: np.ndarray):
    self.ids, self.files, self.lines = ids, files, lines  # by id

  def __len__(self) -> int:
    return len(self.ids)

  def __iter__(self) -> Iterator[str]:
    return iter(self.ids.tolist())

  def __getitem__(self, name: str) -> Where:
    at = int(np.searchsorted(self.ids, name))
    if at == len(self.ids) or self.ids[at] != name:
      raise KeyError(name)
    return Where(self.files[at], int(self.lines[at]) or None)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What the sources held: seen == len(rows) + len(refused) + left_out."""

  schema: str
  rows: RowTable  # by id: id, prompt, chosen, rejected | completion, label;
  #   group; where there are any turns, answers, tools, margin, source
  refused: list[dict]  # file, line, id, reason, detail, as they came
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

  @property
  def kind(self) -> str:
    """ "pairs" or "unpaired"."""
    return "pairs" if "chosen" in self.rows.table.column_names else "unpaired"

  @property
  def counts(self) -> dict[str, int]:
    """Refused rows by reason."""
    return refusals.count_reasons(self.refused)


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
  own_ids, digests, origin = [], bytearray(), []  # of the rows kept
  files, lines = [], array.array("q")

  def kept():
    kind = None
    for number, name in enumerate(names):
      reader = SourceReader(name, options)
      for where, own, row in reader.converted():
        try:
          row = scores.checked(row, where)
          its_kind = "pairs" if "chosen" in row else "unpaired"
          kind = kind or its_kind
          if its_kind != kind:
            raise Refused("mixed kinds", f"{its_kind} among {kind}")
        except Refused as error:
          if not options.max_bad_fraction:
            raise bad_row(where, own, error) from error
          refused.append(refusals.refusal(where, own, error))
          continue
        own_ids.append(own)
        digests.extend(_digest(row))
        origin.append(number)
        files.append(where.file)
        lines.append(where.line or 0)
        yield (dict(source=name) if len(names) > 1 else {}) | row
      readings.append(reader.reading())

  rows = RowTable.of(kept())
  schemas = ", ".join(dict.fromkeys(r.schema for r in readings))
  label, seen = ", ".join(names), len(rows) + len(refused)
  if len(refused) > options.max_bad_fraction * seen or not len(rows):
    raise TooManyRefused(
      f"{label}: {len(refused)} of {seen} rows refused, more than the fraction "
      f"{options.max_bad_fraction} allowed or all: "
      f"{refusals.described(refused)}; set config.data.max_bad_fraction, or "
      f"config.data.schema (now {schemas})",
      refused,
    )
  ids, duplicates, shared = _assign_ids(
    own_ids, np.frombuffer(bytes(digests), "V32")
  )
  rows = rows.table.add_column(0, "id", pa.array(ids, pa.large_string()))
  ids = np.array(ids)
  index, sizes = _within(ids, np.array(origin), len(names), options)
  index = index[np.argsort(ids[index], kind="stable")]
  rows = RowTable(rows).take(index)
  where = Places(ids[index], np.array(files)[index], np.array(lines)[index])
  return Loaded(
    schema=schemas,
    rows=rows,
    refused=refused,
    seen=seen,
    duplicates=duplicates,
    source=label,
    tied=scores.tied,
    against=scores.against,
    against_at=scores.against_at,
    contradicted=_contradicted(rows),
    shared_ids=shared,
    left_out=len(ids) - len(index),
    readings=tuple(r._replace(kept=n) for r, n in zip(readings, sizes)),
    where=where,
  )


@dataclasses.dataclass
class _Scores:
  """Checks the scores of pairs, and counts what contradicts their labels."""

  options: LoadOptions
  tied: int = 0
  against: int = 0
  against_at: str = ""

  def checked(self, row: dict | Refused, where: Where) -> dict:
    """The row, its sides exchanged where the scores alone decide."""
    if isinstance(row, Refused):
      raise row
    options, margin = self.options, row.get("margin")
    by_score = options.choice == choices.BY_SCORE
    if "chosen" not in row or margin is None and not by_score:
      return row
    if margin is None:
      raise Refused("no scores", "of the two answers")
    if margin == 0:
      self.tied += 1
      if by_score or "tied" in options.skip:
        raise Refused("tied scores", "neither answer is better")
    if margin < 0 and by_score:
      return flipped(row)
    if margin < 0:
      self.against += 1
      self.against_at = self.against_at or str(where)
      if "contradicting" in options.skip:
        raise Refused("scores against the label", f"margin {margin:g}")
    return row


def _within(
  ids: np.ndarray, origin: np.ndarray, sources: int, options: LoadOptions
) -> tuple[np.ndarray, list[int]]:
  """Row numbers that caps and weights leave, by a hash; and their counts."""
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

  def codes(*names):
    columns = zip(*(rows.column(name) for name in names))
    digest = lambda row: hashlib.blake2b(repr(row).encode(), digest_size=8)
    return np.frombuffer(b"".join(digest(x).digest() for x in columns), "i8")

  turned = codes("prompt", "rejected", "chosen")
  return int(np.isin(turned, codes("prompt", "chosen", "rejected")).sum())


def _digest(row: dict) -> bytes:
  """Of what an id is made of."""
  content = {k: row[k] for k in _CONTENT if k in row}
  text = json.dumps(content, sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(text.encode()).digest()


def _assign_ids(
  own: Sequence[str | None], digests: np.ndarray
) -> tuple[list[str], int, int]:
  """An id of its own for every row, whatever order they are in.

  A row without an id is called by its content; rows that share an id (a
  prompt's, for instance) by it and their content. Returned with the ids: how
  many contents repeat, and how many rows shared an id.
  """
  counts = collections.Counter(name for name in own if name is not None)
  unique = {name for name, n in counts.items() if n == 1}
  numbers: collections.Counter = collections.Counter()
  ids, taken = [], set(unique)
  for name, digest in zip(own, digests.tolist()):
    if name in unique:
      ids.append(name)
      continue
    new = stem = f"{name}-{digest[:4].hex()}"
    if name is None:
      stem = digest[:8].hex()
    if name is None or numbers[stem]:
      new = f"{stem}-{numbers[stem]}"
    while new in taken:
      numbers[stem] += 1
      new = f"{stem}-{numbers[stem]}"
    taken.add(new)
    ids.append(new)
  duplicates = len(own) - len(np.unique(digests))
  return ids, duplicates, sum(n for n in counts.values() if n > 1)


def split_rows(
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
  sizes = np.array([fractions[name] for name in order], np.float64)
  if not (sizes >= 0).all() or not abs(sizes.sum() - 1) <= 1e-9:  # nor NaN
    raise ConfigError(
      f"split fractions {dict(fractions)} sum to {sizes.sum():g}, wanted some "
      "of 0 or more that sum to 1; set config.data.split"
    )
  names = [name for name in order if fractions[name] > 0]
  ends = np.cumsum(sizes[sizes > 0])[:-1]
  rows = RowTable.of(rows)
  digest = lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest()[:8]
  bits = np.frombuffer(b"".join(map(digest, rows.column("group"))), ">u8")
  split = np.searchsorted(ends, bits.astype(np.float64) / 2.0**64, "right")
  found = {name: rows.where(split == k) for k, name in enumerate(names)}
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
