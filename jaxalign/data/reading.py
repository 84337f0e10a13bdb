"""How rows of a source were read, in the words that a person sees."""

from collections.abc import Mapping
import json
from typing import Any

from jaxalign.data import tokens as tokens_lib

SHOWN = 2  # rows that are shown as they were understood
ANSWERS = ("chosen", "rejected", "completion", "response")


def shown(
  tok: Any, rows: list[dict], encoded: tokens_lib.TokenRows
) -> list[dict[str, str]]:
  """The first rows as the text that their tokens decode to."""
  read = tok.decode_visible
  each = len(encoded.start) // len(rows) if rows else 1
  out = []
  for i, row in enumerate(rows[:SHOWN]):
    one = dict(id=row["id"])
    for k, name in enumerate(n for n in ANSWERS if n in row):
      at = encoded.offsets[each * i + k]
      end = encoded.offsets[each * i + k + 1]
      start = at + encoded.start[each * i + k]
      one["prompt"] = read(encoded.ids[at:start])
      one[name] = read(encoded.ids[start:end])
    if "label" in row:
      one["label"] = "liked" if row["label"] else "disliked"
    out.append(one)
  return out


def lines(summary: Mapping[str, Any]) -> list[str]:
  """What a person should see of how rows were read, a line each."""
  lines = []
  for one in summary.get("readings", ()):
    kept = (
      f"{one['gave']:,} rows kept of {one['seen']:,}"
      if one["gave"] <= one["seen"]
      else f"{one['gave']:,} pairs kept, of {one['seen']:,} rows"
    )
    lines.append(
      f"{one['source']}: read as {one['schema']} ({one['why']}); {kept}"
    )
    told = [
      f"{x['column']} -> {x['became']}"
      for x in one["columns"]
      if x["became"] != "not read"
    ]
    left = [
      f"{x['column']} ({x['type']})"
      for x in one["columns"]
      if x["became"] == "not read"
    ]
    lines.append("  columns: " + "; ".join(told))
    if left:
      lines.append(f"  not read: {', '.join(left)}")
  if summary.get("refused") and summary.get("readings"):
    lines.append(f"refused: {summary['refused']:,} of {summary['seen']:,} rows")
    lines += _reasons(summary)
  for name, text in (
    (
      "against_scores",
      "pairs whose rejected answer scores higher than the "
      "chosen one (config.data.skip=('contradicting',) leaves them "
      "out)",
    ),
    ("tied_scores", "pairs with equal scores (config.data.skip=('tied',))"),
    ("contradicted", "pairs whose reverse is there too: A over B and B over A"),
    (
      "shared_ids",
      "rows that share an id with another: told apart by their content",
    ),
    ("duplicates", "rows whose whole content an earlier one has"),
    ("left_out", "rows left out by config.data.caps and weights"),
  ):
    if summary.get(name):
      first = summary.get("against_at") if name == "against_scores" else ""
      lines.append(
        f"{summary[name]:,} {text}" + (f"; first at {first}" if first else "")
      )
  if summary.get("readings") and summary.get("template"):
    lines.append(summary["template"])
  if sample := summary.get("sample"):
    lines.append(
      f"of the first {sample['rows']:,} rows, tokenized: "
      f"{sum(sample['refused_by_reason'].values()):,} refused; a "
      f"context of {sample['fits']:,} keeps 99 % of the others"
    )
    lines += _reasons(sample)
  for i, row in enumerate(
    summary.get("shown", ()) if summary.get("readings") else (), 1
  ):
    lines.append(f"row {i}, id {row['id']}, as its tokens decode:")
    for name in ("prompt", *ANSWERS, "label"):
      if name in row:
        text = row[name]
        lines.append(f"  {name:<10} {_clipped(text)}")
  return lines


def _reasons(summary: Mapping[str, Any]) -> list[str]:
  """A line for each reason, with where it was met first."""
  out = []
  for reason, n in summary["refused_by_reason"].items():
    first = summary.get("first_refused", {}).get(reason, "")
    out.append(f"  {n:,} {reason}" + (f": {first}" if first else ""))
  return out


def _clipped(text: str) -> str:
  """A text in one line, its middle left out where it is long."""
  text = json.dumps(text, ensure_ascii=False)[1:-1]
  return (
    text
    if len(text) <= 400
    else (f"{text[:250]} [... {len(text) - 400:,} more ...] {text[-150:]}")
  )


def counted(counts: Mapping[str, int]) -> str:
  return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
