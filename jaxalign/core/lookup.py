"""Names in a config become functions: one grammar for all tables.

  isa                               a key of the table
  my_package.samplers:mine          a function of one's own
  isa(order=magnitude)              keywords: literals, or words without quotes
  gate(column=reward) | isa * ifd   a chain of samplers
  0.8*dpo + 0.2*sft                 a weighted sum of losses

Python's own parser reads the text: spaces, brackets and quotes are Python's.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
import difflib
import functools
import hashlib
import importlib
import inspect
import re
from typing import Any, NamedTuple

from jaxalign.core.errors import ConfigError

_OPERATORS = {"|": ast.BitOr, "+": ast.Add, "*": ast.Mult}
_OWN = re.compile(r"(^|[|*+])(\s*[A-Za-z_][\w.]*):(?=[A-Za-z_])")
_COLON = "._function_."  # stands for the colon of "module:function"


class Term(NamedTuple):
  """A function by name, and the keywords written behind it."""

  name: str  # a key of a table, or "module:function"
  kwargs: dict[str, Any]

  def __str__(self) -> str:
    words = ", ".join(f"{k}={v}" for k, v in self.kwargs.items())
    return f"{self.name}({words})" if words else self.name


def parse(
  text: str, outer: str, what: str, knob: str
) -> list[list[Term | float]]:
  """The factors of "*" in each part between `outer` operators, in order.

  Args:
    text: as the module's docstring shows it.
    outer: "|" of a chain, "+" of a sum.
    what: what is named, for the error message ("sampler").
    knob: the config field that holds the text ("select.sampler").

  Raises:
    ConfigError: the text is no such expression.
  """
  try:
    tree = ast.parse(_OWN.sub(rf"\1\2{_COLON}", text.strip()), mode="eval").body
    parts = _operands(tree, _OPERATORS[outer])
    return [
      [_factor(node) for node in _operands(part, ast.Mult)] for part in parts
    ]
  except SyntaxError as error:
    found = f"cannot be read: {error.msg}"
  except ValueError as error:
    found = str(error)
  raise ConfigError(
    f"{what} {text!r}: {found}; wanted name, 'module:function' or "
    f"name(keyword=value) between '{outer}' and '*'; set config.{knob}"
  )


def _operands(node: ast.expr, operator: type) -> Iterator[ast.expr]:
  if isinstance(node, ast.BinOp) and isinstance(node.op, operator):
    yield from _operands(node.left, operator)
    yield from _operands(node.right, operator)
  else:
    yield node


def _factor(node: ast.expr) -> Term | float:
  call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
  names = isinstance(call.func, (ast.Name, ast.Attribute))
  if names and not call.args and all(k.arg for k in call.keywords):
    name = ast.unparse(call.func).replace(_COLON, ":")
    return Term(name, {k.arg: _value(k.value) for k in call.keywords})
  try:
    return float(ast.literal_eval(node))
  except (ValueError, TypeError) as error:
    text = ast.unparse(node).replace(_COLON, ":")
    raise ValueError(f"{text!r} is no function with keywords") from error


def _value(node: ast.expr) -> Any:
  """A literal in which words need no quotes."""
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, (ast.Tuple, ast.List)):
    return tuple(_value(part) for part in node.elts)
  if isinstance(node, ast.Dict):
    return {_value(k): _value(v) for k, v in zip(node.keys, node.values)}
  try:
    return ast.literal_eval(node)
  except ValueError as error:
    raise ValueError(f"{ast.unparse(node)!r} is no literal") from error


def find(
  table: Mapping[str, Callable[..., Any]],
  term: Term | float,
  what: str,
  knob: str,
) -> Callable[..., Any]:
  """The function that a term of `parse` names, its keywords bound.

  Raises:
    ConfigError: the name is unknown; the message lists the known ones. Or a
      keyword is.
  """
  name, kwargs = term if isinstance(term, Term) else (f"{term:g}", {})
  if name in table:
    found = table[name]
  elif ":" in name:
    found = _imported(name, what, knob)
  else:
    near = difflib.get_close_matches(name, table, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    known = ", ".join(sorted(table))
    raise ConfigError(
      f"unknown {what} {name!r}{hint}; known: {known}, or "
      f"'module:function'; set config.{knob}"
    )
  return _bound(found, kwargs, f"{what} {name!r}", knob) if kwargs else found


def lookup(
  table: Mapping[str, Callable[..., Any]], text: str, what: str, knob: str
) -> Callable[..., Any]:
  """The one function that a text names; see `find`."""
  parts = parse(text, "|", what, knob)
  if len(parts) > 1 or len(parts[0]) > 1:
    raise ConfigError(
      f"{what} {text!r} names several, wanted one; set config.{knob}"
    )
  return find(table, parts[0][0], what, knob)


def _imported(name: str, what: str, knob: str) -> Callable[..., Any]:
  module, _, attribute = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ConfigError(
      f"{what} {name!r} cannot be imported ({error}); set config.{knob}"
    ) from error
  if not callable(found):
    raise ConfigError(
      f"{what} {name!r} is a {type(found).__name__}, wanted a function; "
      f"set config.{knob}"
    )
  return found


def keywords(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
  """The keyword-only parameters of a function by name."""
  parameters = inspect.signature(fn).parameters
  return {n: p for n, p in parameters.items() if p.kind == p.KEYWORD_ONLY}


def check_keywords(
  kwargs: Mapping[str, Any], known: Mapping[str, Any], what: str, knob: str
) -> None:
  """Raises ConfigError for a keyword that is not a known one."""
  for key in kwargs:
    if key not in known:
      takes = ", ".join(sorted(known)) or "no keywords"
      raise ConfigError(
        f"{what} takes no {key!r}; it takes {takes}; set config.{knob}"
      )


def _bound(fn, kwargs, what, knob):
  check_keywords(kwargs, keywords(fn), what, knob)
  bound = functools.partial(fn, **kwargs)
  return functools.update_wrapper(bound, fn, updated=("__dict__",))


def bound_keywords(fn: Callable[..., Any]) -> dict[str, Any]:
  """The keywords bound to what `lookup` returned, or to its `terms`."""
  if isinstance(fn, functools.partial):
    return bound_keywords(fn.func) | fn.keywords
  terms = getattr(fn, "terms", ())
  return {k: v for term in terms for k, v in bound_keywords(term).items()}


def source_digests(text: str) -> dict[str, str]:
  """{module: digest of its file} of each "module:function" in a text.

  A stage runs again when a function from outside the tables was edited; what
  that file imports is not looked at.
  """
  found = {}
  for match in _OWN.finditer(text):
    module = match[2].strip()
    try:
      file = importlib.import_module(module).__file__
    except ImportError:  # `find` says so
      continue
    with open(file, "rb") as source:
      found[module] = hashlib.sha256(source.read()).hexdigest()
  return found
