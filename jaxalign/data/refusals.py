"""Rows that are left out: listed, counted, and when they are too many."""

import collections
from collections.abc import Mapping
from typing import Any

from etils import epath

from jaxalign.core.errors import DataError
from jaxalign.data import tables
from jaxalign.data.json_rows import Where
from jaxalign.data.schemas.schema import Refused


class TooManyRefused(DataError):
  """More rows refused than allowed; `refused` are they, as in `Loaded`."""

  def __init__(self, message: str, refused: list[dict]):
    super().__init__(message)
    self.refused = refused


def refusal(
  where: Where, own: str | None, error: Refused, **more: Any
) -> dict[str, Any]:
  """A refused row as it is listed."""
  row = dict(file=where.file, line=where.line, id=own) | more
  return row | dict(reason=error.reason, detail=error.detail)


def count_reasons(refused: list[dict]) -> dict[str, int]:
  """How many rows were refused for each reason."""
  return dict(sorted(collections.Counter(r["reason"] for r in refused).items()))


def by_count(counts: Mapping[str, int]) -> str:
  """Reasons and their counts, the most frequent first."""
  most = sorted(counts.items(), key=lambda item: -item[1])
  return ", ".join(f"{reason} {n}" for reason, n in most) or "none"


def first_refused(refused: list[dict]) -> str:
  """Where the first of some refused rows stands, and why it was refused."""
  if not refused:
    return "no row"
  row = refused[0]
  return f"{row['file']}:{row['line']} ({row['detail'][:80]})"


def refused_later(
  row: dict, error: Refused, split: str, where: Mapping[str, Where]
) -> dict[str, Any]:
  """A row left out after it was read, with the file and line it stands at."""
  name = row["id"]
  pair = name.rpartition("/")[0]  # of a pair that was split into two
  at = where.get(name) or where.get(pair) or Where("", None)
  return refusal(at, name, error, split=split)


def named_in(error: TooManyRefused, folder: epath.Path) -> DataError:
  """Writes the refused rows to a file, and the error that names it."""
  path = folder / "rejected.jsonl"
  tables.write_refused(path, error.refused)
  return DataError(f"{error}; {path} names them all")


def first_by_reason(refused: list[dict]) -> dict[str, str]:
  """reason -> where it was met first, and its words."""
  out = {}
  for row in refused:
    line = f" line {row['line']}" if row.get("line") else ""
    what = row["detail"] or f"id {row['id']}"
    out.setdefault(row["reason"], f"first{line}, {what}"[:200])
  return out


def check_late(
  c: Any,
  summary: dict,
  late: list[dict],
  refused: list[dict],
  folder: epath.Path,
  *,
  rows: int,
  fits: int,
) -> None:
  """Rows that a template or the context refused count as any others do.

  Args:
    c, summary, refused, folder: of the data stage.
    late: those of `refused` that were left out of the last `rows` rows.
    rows: of all splits; two for a pair that was split into single answers.
    fits: the context that keeps 99 % of them.
  """
  too_long = [r for r in late if r["reason"].endswith("too long")]
  wrong = too_long if c.data.too_long == "error" else []
  for row in (wrong + (late if not c.data.max_bad_fraction else []))[:1]:
    knob = "max_bad_fraction"
    if row in too_long and c.data.max_bad_fraction:
      knob = "too_long"
    raise DataError(
      f"{row['file']}:{row['line']}: id {row['id']}: {row['reason']}: "
      f"{row['detail']}; repair the row, or set config.data.{knob}"
    )
  before = (len(refused) - len(late)) / summary["seen"]
  fraction = before + (1 - before) * len(late) / max(rows, 1)
  world = c.data.source == "world"
  if not late or world or fraction <= c.data.max_bad_fraction:
    return
  one, longer = late[0], ""
  if too_long and c.model.context:
    longer = f" (now {c.model.context:,}; {fits:,} keep 99 % of the rows)"
  reasons = count_reasons(refused).items()
  error = TooManyRefused(
    f"{summary['source']}: {fraction:.0%} of {summary['seen']} rows refused, "
    f"more than the fraction {c.data.max_bad_fraction} allowed: "
    f"{', '.join(f'{n} {reason}' for reason, n in reasons)}; {one['file']}:"
    f"{one['line']}: {one['reason']}: {one['detail']}; set "
    "config.data.max_bad_fraction, config.data.template or "
    f"config.model.context{longer}",
    refused,
  )
  raise named_in(error, folder)
