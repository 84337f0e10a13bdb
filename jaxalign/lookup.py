"""A name in a config becomes a function: a key of a table, or module:name.

Keywords may follow in brackets, "isa(order=magnitude)", so that one list can
name a function twice.
"""

import ast
from collections.abc import Callable, Mapping
import difflib
import functools
import hashlib
import importlib
import inspect
import re
from typing import Any

from jaxalign.errors import ConfigError


def lookup(
  table: Mapping[str, Callable[..., Any]], name: str, what: str, knob: str
) -> Callable[..., Any]:
  """Returns `table[name]`, or the function a "module:function" name points to.

  Args:
    table: the known functions by name.
    name: a key of `table`, or "package.module:function" for a fork's own;
      "name(keyword=value,...)" binds keywords: numbers, True, False, None, or
      words without quotes.
    what: what is looked up, for the error message ("sampler").
    knob: the config field that holds the name ("select.sampler").

  Raises:
    ConfigError: the name is unknown; the message lists the known ones. Or a
      keyword is.
  """
  if (parts := re.fullmatch(r"([\w.:]+)\((.*)\)", name)) is not None:
    found = lookup(table, parts[1], what, knob)
    return _bound(found, parts[2], f"{what} {name!r}", knob)
  if name in table:
    return table[name]
  if ":" in name:
    module, _, attribute = name.partition(":")
    try:
      found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
      raise ConfigError(
        f"{what} {name!r} cannot be imported ({error}); set config.{knob}"
      ) from error
    if not callable(found):
      raise ConfigError(
        f"{what} {name!r} is a {type(found).__name__}, wanted "
        f"a function; set config.{knob}"
      )
    return found
  near = difflib.get_close_matches(name, table, n=1)
  hint = f" (did you mean {near[0]!r}?)" if near else ""
  raise ConfigError(
    f"unknown {what} {name!r}{hint}; known: "
    f"{', '.join(sorted(table))}, or 'module:function'; "
    f"set config.{knob}"
  )


def parts(text: str, mark: str) -> list[str]:
  """The text cut at a mark, but not inside brackets; ends without spaces."""
  out, depth = [""], 0
  for letter in text:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == mark and not depth:
      out.append("")
    else:
      out[-1] += letter
  return [part.strip() for part in out]


def edition(name: str) -> dict[str, str]:
  """{module: digest of its file} of each "module:function" in a name.

  So that a stage runs again when a function from outside the tables was
  edited; of what that file imports nothing is asked.
  """
  found = {}
  for module in re.findall(r"([A-Za-z_][\w.]*):[A-Za-z_]", name):
    try:
      file = importlib.import_module(module).__file__
    except ImportError:  # `lookup` says so
      continue
    with open(file, "rb") as source:
      found[module] = hashlib.sha256(source.read()).hexdigest()
  return found


def given(found: Callable[..., Any]) -> dict[str, Any]:
  """The keywords bound to what `lookup` returned, or to its `terms`."""
  if isinstance(found, functools.partial):
    return given(found.func) | found.keywords
  return {
    name: value
    for term in getattr(found, "terms", ())
    for name, value in given(term).items()
  }


def _bound(
  found: Callable[..., Any], text: str, what: str, knob: str
) -> Callable[..., Any]:
  """`found` with the keywords of "order=magnitude,beta=0.5" and its marks."""
  known = {
    p.name
    for p in inspect.signature(found).parameters.values()
    if p.kind == p.KEYWORD_ONLY
  }
  kwargs = {}
  for part in filter(None, re.split(r"\s*,\s*", text.strip())):
    key, equals, value = part.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or key not in known or not re.fullmatch(r"[\w.+-]+", value):
      raise ConfigError(
        f"{what}: {part!r} is no keyword=value of it; it takes "
        f"{', '.join(sorted(known)) or 'no keywords'}; set "
        f"config.{knob}"
      )
    try:
      kwargs[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      kwargs[key] = value
  return functools.update_wrapper(
    functools.partial(found, **kwargs), found, updated=("__dict__",)
  )
