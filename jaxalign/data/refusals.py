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


def refused_later(
  row: dict, error: Refused, split: str, where: Mapping[str, Where]
) -> dict[str, Any]:
  """A row left out after it was read, with the file and line it stands at."""
  name = row["id"]
  pair = name.rpartition("/")[0]  # of a pair that was split into two
  at = where.get(name) or where.get(pair) or Where("", None)
  return refusal(at, name, error, split=split)


def count_reasons(refused: list[dict]) -> dict[str, int]:
  """How many rows were refused for each reason."""
  return dict(sorted(collections.Counter(r["reason"] for r in refused).items()))


def first_by_reason(refused: list[dict]) -> dict[str, str]:
  """reason -> where it was met first, and its words."""
  out = {}
  for row in refused:
    line = f" line {row['line']}" if row.get("line") else ""
    what = row["detail"] or f"id {row['id']}"
    out.setdefault(row["reason"], f"first{line}, {what}"[:200])
  return out


def described(refused: list[dict], first: dict | None = None) -> str:
  """Reasons, the most frequent first, and where the `first` row stands."""
  counts = sorted(count_reasons(refused).items(), key=lambda item: -item[1])
  reasons = ", ".join(f"{reason} {n}" for reason, n in counts) or "none"
  if not refused:
    return reasons
  row = first or refused[0]
  place = Where(row["file"], row["line"])
  return f"{reasons}; first at {place} ({row['reason']}: {row['detail']})"


def named_in(error: TooManyRefused, folder: epath.Path) -> DataError:
  """Writes the refused rows to a file, and the error that names it."""
  path = folder / "rejected.jsonl"
  tables.write_refused(path, error.refused)
  return DataError(f"{error}; {path} names them all")


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
  wrong = [(r, "too_long") for r in too_long if c.data.too_long == "error"]
  if not c.data.max_bad_fraction:
    wrong = [(r, "max_bad_fraction") for r in [x for x, _ in wrong] + late]
  for row, knob in wrong[:1]:
    raise DataError(
      f"{row['file']}:{row['line']}: id {row['id']}: {row['reason']}: "
      f"{row['detail']}; repair the row, or set config.data.{knob}"
    )
  before = (len(refused) - len(late)) / summary["seen"]
  fraction = before + (1 - before) * len(late) / max(rows, 1)
  allowed = c.data.max_bad_fraction
  if not late or c.data.source == "world" or fraction <= allowed:
    return
  longer = ""
  if too_long and c.model.context:
    longer = f" (now {c.model.context:,}; {fits:,} keep 99 % of the rows)"
  error = TooManyRefused(
    f"{summary['source']}: {fraction:.0%} of {summary['seen']} rows refused, "
    f"more than the fraction {allowed} allowed: "
    f"{described(refused, late[0])}; set config.data.max_bad_fraction, "
    f"config.data.template or config.model.context{longer}",
    refused,
  )
  raise named_in(error, folder)
