"""The shapes of row that are understood, by name; a new one is one line."""

from jaxalign.core.errors import DataError
from jaxalign.data.schemas import convert, layouts, ranked
from jaxalign.data.schemas.schema import Refused, Schema

SCHEMAS: dict[str, Schema] = {
  schema.name: schema
  for schema in (*layouts.SCHEMAS, *convert.SCHEMAS, *ranked.SCHEMAS)
}
BUILT_IN = frozenset(SCHEMAS)  # what others return is checked once more

__all__ = ["BUILT_IN", "SCHEMAS", "Refused", "Schema", "detect_schema"]


def detect_schema(row: dict) -> Schema:
  """The first schema that `row` has the shape of.

  Raises:
    DataError: it fits none; names the fields found, and for each schema the
      columns it wants and which of them are not there.
  """
  described = []
  for schema in SCHEMAS.values():
    if schema.fits(row):
      return schema
    lacks = [w for w in schema.wants if w not in row]
    why = f"missing: {', '.join(lacks)}" if lacks else "of another kind"
    text = f"{schema.name} wants {', '.join(schema.wants)} ({why})"
    described.append((len(lacks) / max(len(schema.wants), 1), text))
  columns = [f"{k} ({type(v).__name__})" for k, v in [*row.items()][:12]]
  wanted = "; ".join(text for _, text in sorted(described, key=lambda x: x[0]))
  raise DataError(
    f"no schema fits a row with the fields {', '.join(columns) or '(none)'}. "
    f"{wanted}. Where only the names differ, set "
    "--config.data.fields.prompt=<column> and so on, or write a function of "
    "your own, config.data.schema='module:function'"
  )
