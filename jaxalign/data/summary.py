"""How the rows of a source were read, in the words that a person sees."""

from collections.abc import Mapping, Sequence
import json
from typing import Any

import numpy as np

from jaxalign.data.encode import ANSWERS
from jaxalign.data.records import Loaded
from jaxalign.data.tokens import TokenRows

SHOWN = 2  # rows that are shown as they were understood
_COUNTS = dict(
  against_scores=(
    "pairs whose rejected answer scores higher than the chosen one "
    "(config.data.skip=('contradicting',) leaves them out)"
  ),
  tied_scores="pairs with equal scores (config.data.skip=('tied',))",
  contradicted="pairs whose reverse is there too: A over B and B over A",
  shared_ids="rows that share an id with another and are named by content too",
  duplicates="rows whose whole content an earlier one has",
  left_out="rows left out by config.data.caps and weights",
)


def data_summary(
  loaded: Loaded, splits: Mapping[str, Sequence[dict]]
) -> dict[str, Any]:
  """What was read and kept, as JSON: counts, lengths, refusals, splits."""
  rows = loaded.rows
  sides = ("chosen", "rejected") if loaded.kind == "pairs" else ("completion",)
  names = ("source", "kind", "schema", "seen", "duplicates", "contradicted")
  summary = {n: getattr(loaded, n) for n in (*names, "shared_ids", "left_out")}
  summary |= dict(
    kept=len(rows),
    refused=len(loaded.refused),
    refused_by_reason=loaded.counts,
    groups=len({*rows.column("group")}),
    rows_by_split={name: len(split) for name, split in splits.items()},
    characters=dict(
      prompt=_quantiles(rows.column("prompt")),
      response=_quantiles([x for side in sides for x in rows.column(side)]),
    ),
    readings=[r._asdict() for r in loaded.readings],
  )
  if any(margin is not None for margin in rows.column("margin")):
    summary |= dict(tied_scores=loaded.tied, against_scores=loaded.against)
    summary["against_at"] = loaded.against_at
  if loaded.kind == "unpaired":
    summary["liked"] = sum(rows.column("label"))
  return summary


def _quantiles(texts: list[str]) -> dict[str, float]:
  """Of the characters of texts."""
  if not texts:
    return {}
  sizes = np.fromiter(map(len, texts), np.int64)
  low, middle, high = np.percentile(sizes, [5, 50, 95])
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
  lines = [line for x in summary.get("readings", ()) for line in _reading(x)]
  read = bool(lines)
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


def _reading(reading: Mapping[str, Any]) -> list[str]:
  """How one source was read."""
  kept, seen = reading["kept"], reading["seen"]
  rows = f"{kept:,} rows kept of {seen:,}"
  if kept > seen:
    rows = f"{kept:,} pairs kept, of {seen:,} rows"
  used, left = [], []
  for x in reading["columns"]:
    if x["became"] == "not read":
      left.append(f"{x['column']} ({x['type']})")
    else:
      used.append(f"{x['column']} -> {x['became']}")
  how = f"read as {reading['schema']} ({reading['why']})"
  lines = [f"{reading['source']}: {how}; {rows}"]
  lines.append(f"  columns: {'; '.join(used)}")
  return lines + [f"  not read: {', '.join(left)}"] * bool(left)


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
