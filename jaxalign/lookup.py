"""A name in a config becomes a function: a key of a table, or module:name."""

import difflib
import importlib
from typing import Any, Callable, Mapping

from jaxalign.errors import ConfigError


def lookup(table: Mapping[str, Callable[..., Any]], name: str, what: str,
           knob: str) -> Callable[..., Any]:
  """Returns `table[name]`, or the function a "module:function" name points to.

  Args:
    table: the known functions by name.
    name: a key of `table`, or "package.module:function" for a fork's own.
    what: what is looked up, for the error message ("sampler").
    knob: the config field that holds the name ("select.sampler").

  Raises:
    ConfigError: the name is unknown; the message lists the known ones.
  """
  if name in table:
    return table[name]
  if ":" in name:
    module, _, attribute = name.partition(":")
    try:
      found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
      raise ConfigError(f"{what} {name!r} cannot be imported ({error}); "
                        f"set config.{knob}") from error
    if not callable(found):
      raise ConfigError(f"{what} {name!r} is a {type(found).__name__}, wanted "
                        f"a function; set config.{knob}")
    return found
  near = difflib.get_close_matches(name, table, n=1)
  hint = f" (did you mean {near[0]!r}?)" if near else ""
  raise ConfigError(f"unknown {what} {name!r}{hint}; known: "
                    f"{', '.join(sorted(table))}, or 'module:function'; "
                    f"set config.{knob}")
