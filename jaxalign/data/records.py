"""Checked records with stable ids: loaded, split by group, counted.

The order of the input never matters: rows are sorted by id, an id comes from
the row itself, and the split of a row is a hash of its group.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import itertools
import json

import numpy as np

from jaxalign.core.errors import ConfigError
from jaxalign.data import refusals
from jaxalign.data.json_rows import Where
from jaxalign.data.refusals import TooManyRefused
from jaxalign.data.schemas import choices, Refused
from jaxalign.data.schemas.convert import flipped
from jaxalign.data.source_reader import (
  at_line,
  bad_row,
  LoadOptions,
  SourceReader,
  SourceReading,
)
from jaxalign.data.tables import MESSAGES

# An id is a digest of these: what else is kept of a row may grow.
_CONTENT = ("prompt", "chosen", "rejected", "completion", "label", "group")
_EXTRA = (*MESSAGES, "margin", "source")  # that some rows of a source may lack


@dataclasses.dataclass(frozen=True)
class Loaded:
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
  rows, refused, readings, scores = [], [], [], _Scores(options)
  kind = None
  for name in names:
    reader, kept = SourceReader(name, options), []
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
      first = dict(id=own) | (dict(source=name) if len(names) > 1 else {})
      kept.append((where, first | row))
    readings.append(reader.reading())
    rows.append(kept)
  schemas = ", ".join(dict.fromkeys(r.schema for r in readings))
  counts = refusals.count_reasons(refused)
  label = ", ".join(names)
  seen = sum(map(len, rows)) + len(refused)
  if len(refused) > options.max_bad_fraction * seen or not any(rows):
    raise TooManyRefused(
      f"{label}: {len(refused)} of {seen} rows refused, more than the fraction "
      f"{options.max_bad_fraction} allowed or all: "
      f"{refusals.by_count(counts)}; first at "
      f"{refusals.first_refused(refused)}; set config.data.max_bad_fraction, "
      f"or config.data.schema (now {schemas})",
      refused,
    )
  duplicates, shared = _assign_ids([row for kept in rows for _, row in kept])
  left = _within(rows, options)
  kept = sorted(itertools.chain(*left), key=lambda pair: pair[1]["id"])
  out = [row for _, row in kept]
  for name in _EXTRA:  # all rows of a table have the same columns
    if any(name in row for row in out):
      out = [dict(row, **{name: row.get(name)}) for row in out]
  return Loaded(
    kind=kind,
    schema=schemas,
    rows=out,
    refused=refused,
    counts=counts,
    seen=seen,
    duplicates=duplicates,
    source=label,
    tied=scores.tied,
    against=scores.against,
    against_at=scores.against_at,
    contradicted=_contradicted(out),
    shared_ids=shared,
    left_out=sum(map(len, rows)) - len(out),
    readings=tuple(r._replace(kept=len(k)) for r, k in zip(readings, left)),
    where={row["id"]: where for where, row in kept},
  )


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
      self.against_at = self.against_at or at_line(where)
      if "contradicting" in options.skip:
        raise Refused("scores against the label", f"margin {margin:g}")
    return row


def _within(rows: list[list], options: LoadOptions) -> list[list]:
  """Of each source the rows that its cap and its weight leave, by a hash."""
  caps, weights = options.caps or [0] * len(rows), options.weights
  sizes = [min(len(k), int(cap) or len(k)) for k, cap in zip(rows, caps)]
  if weights:
    least = min(size / weight for size, weight in zip(sizes, weights))
    most = [int(least * weight + 1e-9) for weight in weights]
    sizes = list(map(min, sizes, most))

  def order(pair):
    text = f"{options.seed}:{pair[1]['id']}"
    return hashlib.sha256(text.encode()).digest()

  return [
    kept if size == len(kept) else sorted(kept, key=order)[:size]
    for kept, size in zip(rows, sizes)
  ]


def _contradicted(rows: list[dict]) -> int:
  """Pairs whose reverse, the same two answers the other way round, is there."""
  pairs = [r for r in rows if "chosen" in r]
  seen = {(r["prompt"], r["chosen"], r["rejected"]) for r in pairs}
  return sum((r["prompt"], r["rejected"], r["chosen"]) in seen for r in pairs)


def _assign_ids(rows: list[dict]) -> tuple[int, int]:
  """Gives every row an id of its own, whatever order they are in.

  A row without an id is called by its content; rows that share an id (a
  prompt's, for instance) by it and their content.

  Returns:
    How many contents repeat, and how many rows shared an id.
  """
  own = collections.Counter(row["id"] for row in rows if row["id"] is not None)
  taken = {name for name, n in own.items() if n == 1}
  times: collections.Counter = collections.Counter()
  numbers: collections.Counter = collections.Counter()
  shared = 0
  for row in rows:
    content = {k: row[k] for k in _CONTENT if k in row}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    times[digest] += 1
    if row["id"] in taken:
      continue
    if row["id"] is None:
      stem, number, numbered = digest[:16], times[digest] - 1, True
    else:
      stem = f"{row['id']}-{digest[:8]}"
      number, numbered, shared = numbers[stem], numbers[stem] > 0, shared + 1
    name = f"{stem}-{number}" if numbered else stem
    while name in taken:
      number += 1
      name = f"{stem}-{number}"
    numbers[stem] = number + 1
    taken.add(name)
    row["id"] = name
  return sum(n - 1 for n in times.values()), shared


def split_rows(
  rows: Iterable[dict], fractions: Mapping[str, float], seed: int
) -> dict[str, list[dict]]:
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
  parts = {name: [] for name in fractions}
  for row in rows:
    digest = hashlib.sha256(f"{seed}:{row['group']}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2.0**64
    parts[names[int(np.searchsorted(ends, u, side="right"))]].append(row)
  return parts


def pairs_to_unpaired(rows: Iterable[dict]) -> list[dict]:
  """Each pair as two unpaired rows: chosen liked, rejected disliked."""
  out = []
  for row in rows:
    for k, side in enumerate(("chosen", "rejected")):
      one = dict(id=f"{row['id']}/{side}", prompt=row["prompt"])
      one |= dict(completion=row[side], label=k == 0, group=row["group"])
      one |= {n: row[n] for n in ("turns", "tools", "source") if n in row}
      if "answers" in row:
        one["answers"] = row["answers"] and [row["answers"][k]]
      out.append(one)
  return sorted(out, key=lambda row: row["id"])
