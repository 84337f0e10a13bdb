"""Rows that tests of the data put in files, and how they read them."""

import json

from jaxalign.data import records


def turn(role, content, **other):
  """A message."""
  return dict(role=role, content=content, **other)


def pair(i, **other):
  """A pair of texts in which `i` tells rows apart."""
  return dict(prompt=f"p{i}", chosen=f"c{i}", rejected=f"r{i}", **other)


def short_pair(i, **change):
  """A pair of about twelve tokens; a change to KeyError leaves a field out."""
  row = dict(prompt=f"tell me of {i} ", chosen=f"it is {i} and good")
  row |= dict(rejected=f"no {i} at all") | change
  return {k: v for k, v in row.items() if v is not KeyError}


def put(path, rows):
  """Writes rows as lines of JSON, a text as it is, bytes as the whole file."""
  if not isinstance(rows, (bytes, bytearray)):
    lines = [x if isinstance(x, str) else json.dumps(x) for x in rows]
    rows = "".join(f"{line}\n" for line in lines).encode()
  path.write_bytes(rows)
  return str(path)


def load(source, **options):
  """`load_records` with options by name."""
  return records.load_records(source, records.LoadOptions(**options))
