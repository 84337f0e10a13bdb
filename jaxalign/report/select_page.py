"""The page of a selection: its rows to search and sort, a map, the figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.report import charts, page
from jaxalign.report.charts import Row, Series
from jaxalign.report.nodes import finite, MISSING, Node, number, raw, visible
from jaxalign.select.selection_report import reasons
from jaxalign.select.selection_report.neighbourhood import ALIKE

TEXTS = 12_000_000  # characters of text a page holds, divided among its rows
LEAST, MOST = 90, 1500  # characters of one row
PLANE = 1000  # places on the map, from side to side
EDGE = 0.001  # fraction of the rows that may lie outside the map, at its border
SIDES = {
  "prompt": ("Prompt", ""),
  "chosen": ("Chosen", "yes"),
  "rejected": ("Rejected", "no"),
  "completion": ("Response", ""),
}
NAMES = {"False": "undesirable", "True": "desirable"}


def _coded(values: Sequence[Any], label: bool) -> dict[str, Any]:
  """A column as its distinct values, the commonest first, and places."""
  text = [visible(v) for v in values]
  values, inverse = np.unique(text, return_inverse=True)
  order = np.argsort(-np.bincount(inverse), kind="stable")
  names = [str(name) for name in values[order]]
  if label:
    names = [NAMES.get(name, name) for name in names]
  return {"names": names, "at": np.argsort(order)[inverse].tolist()}


def _places(values: np.ndarray) -> list[int]:
  """Coordinates as whole numbers; the outermost rows stand at the border."""
  values = np.asarray(values, np.float64)
  low, high = np.quantile(values, [EDGE, 1 - EDGE])
  span = high - low if high > low else 1.0
  low, span = low - 0.02 * span, 1.04 * span
  places = np.round(PLANE * (values - low) / span)
  return np.clip(places, 0, PLANE).astype(int).tolist()


def _cut(value: Any, limit: int) -> str:
  """A text of at most `limit` characters; what hides or reorders is shown."""
  if value is None:
    return ""
  text = str(value).strip()
  shown = visible(text[:limit])
  whole = len(text) <= limit and len(shown) <= limit
  return shown if whole else shown[: limit - 1] + "…"


def payload(record: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
  """The table of `selection_report.describe` as the page's script reads it."""
  n = len(table["id"])
  column = lambda name: np.asarray(table[name]).tolist()
  out = dict(
    selected=record["selected"],
    common=reasons.shared_words(record),
    words=dict(why=reasons.WHY, near=reasons.NEAR, length=reasons.LENGTH),
    copy=[2, 4],
    id=[visible(i) for i in table["id"]],
    score=[reasons.figure(float(v)) for v in column("score")],
    **{k: column(k) for k in ("rank", "why", "near_code", "tail")},
  )
  if any(table["near"]):
    place = {name: i for i, name in enumerate(column("id"))}
    near = [place.get(k, visible(k)) if k else -1 for k in column("near")]
    out["near"] = near
    out["cosine"] = [reasons.rounded_cosine(float(v)) for v in column("cosine")]
  if "x" in table:
    out["x"], out["y"] = _places(table["x"]), _places(table["y"])
  if "length" in table:
    out["length"] = np.round(table["length"], 1).tolist()
  for name in ("label", "source", "topic"):
    if name in table:
      out[name] = _coded(table[name], name == "label")
  texts = table.get("texts") or {}
  room = int(min(MOST, max(LEAST, TEXTS / max(1, n)))) // max(1, len(texts))
  out["texts"] = []
  for key, values in texts.items():
    name, kind = SIDES.get(key, (key, ""))
    at = [_cut(v, room) for v in values]
    out["texts"].append(dict(name=name, kind=kind, at=at))
  return out


def value_name(value: Any, column: Any) -> str:
  """A value of a column in words."""
  if raw(value) is None:
    return "all others"
  names = NAMES if column == "label" else {}
  return names.get(str(value), visible(value))


def shift_rows(rows: Sequence[Node], column: Any) -> list[Row]:
  """Kept minus pool of every value, and where random subsets lie."""
  drawn = []
  for row in rows:
    values = [finite(row[k]) for k in ("kept", "pool", "low", "high")]
    if None not in values:
      kept, pool, low, high = values
      colour = charts.MUTED if row.verdict == "within chance" else 1
      gap, low, high = (100 * (v - pool) for v in (kept, low, high))
      words = page.value_text(kept - pool, sign=True)
      name = value_name(row.value, column)
      drawn.append(Row(name, gap, low, high, words, colour))
  return drawn


def p_value(value: Any) -> str:
  """A probability; a very small one as a bound."""
  x = finite(value)
  if x is None:
    return MISSING
  return "< 0.001" if x < 0.001 else number(x, 2)


def spectrum_series(groups: Sequence[Node]) -> list[Series]:
  """The variance held by the first directions, in percent, a line a group."""
  percent = lambda value: (y := finite(value)) and 100 * y
  return [
    Series(group.name, list(enumerate(map(percent, group.curve), 1)), i)
    for i, group in enumerate(groups[:6])
  ]


def mixture_facts(record: Node) -> dict[str, Any]:
  """The mixture of a selection under the names of a job's summary."""
  found = dict(page.entries(record.mixture))
  held_out, labels = record.diagnostics.held_out, record.diagnostics.labels
  return found and found | dict(
    pca=found.get("directions"),
    in_fit=held_out.mean_fitted,
    held_out=held_out.mean_held_out,
    auc=held_out.auc,
    label_accuracy=labels.accuracy,
    nmi=labels.nmi,
  )


def selection_html(record: dict[str, Any], rows: dict[str, Any]) -> str:
  """The page of a selection; its texts are cut to TEXTS characters in all.

  Args:
    record: as `selection_report.describe` returns it.
    rows: the table that it returns with it.
  """
  data, node = payload(record, rows), Node(record)
  kinds = [(i, reasons.KINDS[i]) for i in sorted(set(data["why"]))]
  document = page.render(
    "select.html",
    record=node,
    mixture=Node(mixture_facts(node)),
    data=data,
    script=page.source("select.js"),
    reasons=kinds,
    alike=ALIKE,
  )
  size, words = number(len(document.encode()) / 1e6), "rows on this page"
  return document.replace(f"{words}</p>", f"{words} · {size} MB</p>", 1)


page.expose(globals())
