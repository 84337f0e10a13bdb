"""The shapes of row that are understood, by name; a new one is one line."""

from jaxalign.data.schemas import layouts, lists, rows, trees
from jaxalign.data.schemas.pairs import Refused, Schema
from jaxalign.errors import DataError

SCHEMAS: dict[str, Schema] = {
  schema.name: schema
  for schema in (
    *layouts.SCHEMAS,
    lists.COMPARED,
    rows.EXPLICIT,
    rows.IMPLICIT,
    rows.CHAT_PAIRS,
    rows.UNPAIRED,
    rows.CHAT_UNPAIRED,
    trees.TREES,
    rows.CHOICES,
    lists.SCORED,
  )
}

__all__ = ["SCHEMAS", "Refused", "Schema", "detect"]


def detect(row: dict) -> Schema:
  """The first schema that `row` has the shape of.

  Raises:
    DataError: it fits none; names the fields found, and for each schema the
      columns it wants and which of them are not there.
  """
  for schema in SCHEMAS.values():
    if schema.matches(row):
      return schema
  found = ", ".join(
    f"{key} ({type(value).__name__})" for key, value in list(row.items())[:12]
  )
  lacks = {
    name: [w for w in schema.wants if w not in row]
    for name, schema in SCHEMAS.items()
  }
  near = sorted(
    SCHEMAS, key=lambda name: len(lacks[name]) / len(SCHEMAS[name].wants)
  )
  wanted = "; ".join(
    f"{name} wants {', '.join(SCHEMAS[name].wants)}"
    + (
      f" (missing: {', '.join(lacks[name])})"
      if lacks[name]
      else " (of another kind)"
    )
    for name in near
  )
  raise DataError(
    f"no schema fits a row with the fields {found or '(none)'}. {wanted}. "
    "Where only the names differ say so, "
    "--config.data.fields.prompt=<column> and so on, or write a function of "
    "your own, config.data.schema='module:function'"
  )
