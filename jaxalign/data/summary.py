"""How the rows of a source were read, in the words that a person sees."""

from collections.abc import Mapping, Sequence
import json
from typing import Any

import numpy as np

from jaxalign.data.encode import ANSWERS
from jaxalign.data.records import Loaded
from jaxalign.data.tokens import TokenRows

SHOWN = 2  # rows that are shown as they were understood
_AGAINST = (
  "pairs whose rejected answer scores higher than the chosen one "
  "(config.data.skip=('contradicting',) leaves them out)"
)
_COUNTS = dict(
  against_scores=_AGAINST,
  tied_scores="pairs with equal scores (config.data.skip=('tied',))",
  contradicted="pairs whose reverse is there too: A over B and B over A",
  shared_ids="rows that share an id with another: told apart by their content",
  duplicates="rows whose whole content an earlier one has",
  left_out="rows left out by config.data.caps and weights",
)


def data_summary(
  loaded: Loaded, splits: Mapping[str, Sequence[dict]]
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


def decoded_rows(
  tok: Any, rows: list[dict], encoded: TokenRows
) -> list[dict[str, str]]:
  """The first rows as the text that their tokens decode to."""
  each = len(encoded.start) // len(rows) if rows else 1
  out = []
  for i, row in enumerate(rows[:SHOWN]):
    one = dict(id=row["id"])
    for k, name in enumerate((n for n in ANSWERS if n in row), each * i):
      ids = encoded.ids[encoded.offsets[k] : encoded.offsets[k + 1]]
      one["prompt"] = tok.decode_visible(ids[: encoded.start[k]])
      one[name] = tok.decode_visible(ids[encoded.start[k] :])
    if "label" in row:
      one["label"] = "liked" if row["label"] else "disliked"
    out.append(one)
  return out


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
  """What a person should see of how rows were read, a line each."""
  lines, read = [], bool(summary.get("readings"))
  for one in summary.get("readings", ()):
    kept, seen = one["kept"], one["seen"]
    rows = f"{kept:,} rows kept of {seen:,}"
    if kept > seen:
      rows = f"{kept:,} pairs kept, of {seen:,} rows"
    name = one["source"]
    lines.append(f"{name}: read as {one['schema']} ({one['why']}); {rows}")
    used = [x for x in one["columns"] if x["became"] != "not read"]
    roles = [f"{x['column']} -> {x['became']}" for x in used]
    lines.append(f"  columns: {'; '.join(roles)}")
    left = [x for x in one["columns"] if x["became"] == "not read"]
    if left:
      names = [f"{x['column']} ({x['type']})" for x in left]
      lines.append(f"  not read: {', '.join(names)}")
  if summary.get("refused") and read:
    lines.append(f"refused: {summary['refused']:,} of {summary['seen']:,} rows")
    lines += _reasons(summary)
  for name, text in _COUNTS.items():
    if summary.get(name):
      first = summary.get("against_at") if name == "against_scores" else ""
      first = f"; first at {first}" if first else ""
      lines.append(f"{summary[name]:,} {text}{first}")
  if read and summary.get("template"):
    lines.append(summary["template"])
  if sample := summary.get("sample"):
    lines.append(
      f"of the first {sample['rows']:,} rows, tokenized: "
      f"{sum(sample['refused_by_reason'].values()):,} refused; a context of "
      f"{sample['fits']:,} keeps 99 % of the others"
    )
    lines += _reasons(sample)
  for i, row in enumerate(summary.get("shown", ()) if read else (), 1):
    lines.append(f"row {i}, id {row['id']}, as its tokens decode:")
    names = [n for n in ("prompt", *ANSWERS, "label") if n in row]
    lines += [f"  {name:<10} {_clipped(row[name])}" for name in names]
  return lines


def _reasons(summary: Mapping[str, Any]) -> list[str]:
  """A line for each reason, with where it was met first."""
  first = summary.get("first_refused", {})
  where = {reason: f": {text}" for reason, text in first.items() if text}
  counts = summary["refused_by_reason"].items()
  return [f"  {n:,} {reason}{where.get(reason, '')}" for reason, n in counts]


def _clipped(text: str) -> str:
  """A text in one line, its middle left out where it is long."""
  text = json.dumps(text, ensure_ascii=False)[1:-1]
  if len(text) <= 400:
    return text
  return f"{text[:250]} [... {len(text) - 400:,} more ...] {text[-150:]}"
