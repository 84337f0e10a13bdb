"""The flags of a command; a wrong one is a ConfigError."""

import ast
from collections.abc import Iterable
import functools
import operator
import os
import pathlib
import re
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxalign.core.errors import ConfigError

Flag = tuple[str, str, Any, str]  # type, name, default, help
CONFIG_FLAGS: tuple[Flag, ...] = (
  ("string", "workdir", None, "Where everything is written."),
  ("bool", "dry_run", False, "Print the plan and stop."),
  ("bool", "redo", False, "Replace stages that another config made."),
  ("bool", "force", False, "Try a model that should not fit the devices."),
)
_SEE = "see configs/common.py for all knobs"
# Sections that are set whole: their names are not the config's to know.
_WHOLE = ("data.fields", "select.kwargs", "loss.kwargs")
# Knobs whose type no config can tell: keywords of a sampler or a loss, columns
# of a person's rows and their codes; a budget is a number, or the word "auto".
_UNTYPED = re.compile(
  r"--config\.((?:select\.kwargs|loss\.kwargs|data\.fields|data\.choice)\.\w+"
  r"|data\.choice|select\.budget(?==auto$))=(.*)",
  re.DOTALL,
)


def parse_flags(argv: list[str], doc: str, rows: Iterable[Flag]) -> Any:
  """The values of flags; `--help` prints them and ends the process.

  Args:
    argv: the command line.
    doc: what --help says first.
    rows: the flags.

  Raises:
    ConfigError: a wrong flag, or a word that is none.
  """
  values = flags.FlagValues()
  _define(values, rows)
  try:
    _read(values, argv, doc)
  except flags.Error as error:
    raise ConfigError(f"{error}; see --help") from error
  return values


def parse_config(argv: list[str], doc: str, rows: Iterable[Flag] = ()) -> Any:
  """The values of flags, a config among them; see `parse_flags`."""
  argv, untyped = _untyped(argv)
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Path of a config file, with :variant.",
    flag_values=values,
    lock_config=True,
    sys_argv=argv,
  )
  flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Whether to join other processes.",
    flag_values=values,
  )
  _define(values, (*CONFIG_FLAGS, *rows))
  for argument in argv[1:]:  # `from configs import common` from any folder
    if argument.startswith("--config="):
      path = check_exists(argument.removeprefix("--config="))
      sys.path.insert(0, str(pathlib.Path(path).resolve().parent.parent))
  try:
    _read(values, argv, doc)
    config = values.config
  except (
    flags.Error,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    OSError,
  ) as e:
    raise ConfigError(f"{_short(e)}; {_SEE}") from e
  if config is None:
    raise ConfigError("no config; set --config=configs/dpo_sub.py")
  for argument in argv[1:]:
    if match := re.match(r"--config\.([\w.]+)=", argument):
      name = match[1]
      if name not in _WHOLE and hasattr(_at(config, name.split(".")), "items"):
        raise ConfigError(
          f"config.{name} is a section, wanted one of its knobs; {_SEE}"
        )
  for (*path, name), value in untyped.items():
    if path == ["data", "choice"]:  # data.choice.first=... on the way
      value, name = {**(config.data.choice or {}), name: value}, path.pop()
    section = _at(config, path)
    with section.unlocked(), section.ignore_type():
      section[name] = value
  return values


def check_exists(config: str) -> str:
  """The path of --config, "path:variant"; ConfigError where no file is."""
  path = config.partition(":")[0]
  if not os.path.exists(path):
    raise ConfigError(f"config file {path!r} does not exist; set --config")
  return path


def _at(config: Any, path: list[str]) -> Any:
  return functools.reduce(operator.getitem, path, config)


def _define(values: Any, rows: Iterable[Flag]) -> None:
  for kind, name, default, words in (*rows, _HELP):
    define = getattr(flags, f"DEFINE_{kind}")
    define(name, default, words, flag_values=values)


_HELP = ("bool", "help", False, "Show the flags.")


def _read(values: Any, argv: list[str], doc: str) -> None:
  rest = values(argv)
  if values.help:
    print(doc + values.main_module_help())
    sys.exit(0)
  if len(rest) > 1:
    raise ConfigError(f"unexpected argument {rest[1]!r}; flags start with --")


def _untyped(argv: list[str]) -> tuple[list[str], dict[tuple, object]]:
  """The flags that a config gives a type, and the others' values by path."""
  rest, found = [], {}
  for argument in argv:
    if not (match := _UNTYPED.fullmatch(argument)):
      rest.append(argument)
      continue
    path, text = match.groups()
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = text  # a word
    found[tuple(path.split("."))] = value
  return rest, found


def _short(error: Exception) -> str:
  """What is wrong with the flags, in one line."""
  text = str(error).replace("\\n", "\n").strip()
  if isinstance(error, (KeyError, AttributeError)):
    name = re.match(r"""[\\'"]*(\w+)[\\'"]*(\n|$)""", text)
    near = re.search(r'mean "(\w+)"', text)
    if name:
      hint = f", did you mean {near[1]!r}?" if near else ""
      return f"unknown knob {name[1]!r}{hint}"
  if "Traceback (most recent call last):" in text:  # of the config file
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    where = [line for line in lines if line.startswith("File ")]
    text = f"{lines[-1]} ({where[-1]})"
  return " ".join(text.split()) or repr(error)
