"""The shapes of row that are understood, by name; a new one is one line."""

from jaxalign.data.schemas import chat, fields, pairs, trees
from jaxalign.data.schemas.pairs import Refused, Schema
from jaxalign.errors import DataError

SCHEMAS: dict[str, Schema] = {schema.name: schema for schema in (
    pairs.EXPLICIT, pairs.IMPLICIT, pairs.THUMBS, chat.CHAT_PAIRS,
    chat.CHAT_THUMBS, trees.TREES, fields.CHOICES)}

__all__ = ["SCHEMAS", "Refused", "Schema", "detect"]


def detect(row: dict) -> Schema:
  """The one schema that `row` has the shape of.

  Raises:
    DataError: it fits none; names the fields found and the schemas known.
  """
  for schema in SCHEMAS.values():
    if schema.matches(row):
      return schema
  fields = ", ".join(f"{key} ({type(value).__name__})"
                     for key, value in list(row.items())[:12])
  raise DataError(f"no schema fits a row with the fields {fields or '(none)'}; "
                  f"known: {', '.join(SCHEMAS)}; set config.data.schema, or "
                  "config.data.fields where only the names differ")
