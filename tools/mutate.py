r"""Breaks a source file in small ways and names the breaks no test notices.

  python tools/mutate.py jaxalign/train/losses/pair.py tests/test_losses.py

Each mutant is the file with one change: a sign flipped, + and - or * and /
exchanged, a fraction turned over, a term or factor left out, a sum taken for a
mean, an index, constant, default, comparison or branch changed, a function's
argument negated, a gradient stopped no longer. The tests run on each, in a
process forked from one that has imported the slow libraries; the file on disk
is not touched. First run the tests whose names hold that of the changed
function, then all; the first failure ends it. Mutants that no test fails on
are listed and the exit code is 1: write the test, or see that the change
changes nothing. The unchanged file must pass.
"""

import argparse
import ast
from collections.abc import Callable, Iterator
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRELOAD = "numpy,scipy.optimize,sklearn.linear_model,jax,jax.numpy,pytest"

SWAPPED = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Div,
  ast.Div: ast.Mult,
  ast.Pow: ast.Mult,
  ast.FloorDiv: ast.Mult,
  ast.Mod: ast.Mult,
  ast.MatMult: ast.Mult,
  ast.BitAnd: ast.BitOr,
  ast.BitOr: ast.BitAnd,
}
COMPARED = {
  ast.Gt: (ast.GtE, ast.Lt),
  ast.GtE: (ast.Gt, ast.LtE),
  ast.Lt: (ast.LtE, ast.Gt),
  ast.LtE: (ast.Lt, ast.GtE),
  ast.Eq: (ast.NotEq,),
  ast.NotEq: (ast.Eq,),
  ast.Is: (ast.IsNot,),
  ast.IsNot: (ast.Is,),
  ast.In: (ast.NotIn,),
  ast.NotIn: (ast.In,),
}
EXCHANGED = {
  "sum": "mean",
  "mean": "sum",
  "maximum": "minimum",
  "minimum": "maximum",
  "max": "min",
  "min": "max",
  "exp": "expm1",
  "expm1": "exp",
  "log": "log1p",
  "log1p": "log",
  "argmax": "argmin",
  "argmin": "argmax",
  "all": "any",
  "any": "all",
}
# Functions of one array whose argument may be negated, and that may be dropped.
NEGATED = {
  "log_sigmoid",
  "sigmoid",
  "relu",
  "softplus",
  "exp",
  "expm1",
  "sort",
  "argsort",
  "tanh",
  "abs",
}
DROPPED = {
  "relu",
  "stop_gradient",
  "sort",
  "argsort",
  "abs",
  "sqrt",
  "log",
  "exp",
  "sigmoid",
  "mean",
  "cumsum",
}


class Mutant(NamedTuple):
  """One change."""

  line: int
  function: str
  what: str
  code: str


def variants(node: ast.AST) -> Iterator[ast.AST]:
  """The nodes that may stand in a node's place."""
  match node:
    case ast.BinOp(left, op, right):
      if type(op) in SWAPPED:
        yield ast.BinOp(left, SWAPPED[type(op)](), right)
      if isinstance(op, (ast.Div, ast.Sub)):
        yield ast.BinOp(right, op, left)
      if isinstance(op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)):
        yield left
        yield right
    case ast.UnaryOp(ast.USub() | ast.Not() | ast.Invert(), operand):
      yield operand
    case ast.Compare(left, [op], rights):
      for other in COMPARED.get(type(op), ()):
        yield ast.Compare(left, [other()], rights)
    case ast.BoolOp(op, values):
      yield ast.BoolOp(
        ast.Or() if isinstance(op, ast.And) else ast.And(), values
      )
    case ast.IfExp(test, body, orelse):
      yield body
      yield orelse
    case ast.If(test, body, orelse):
      yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
    case ast.Constant(bool() as value):
      yield ast.Constant(not value)
    case ast.Constant(int() as value):
      yield ast.Constant(1 if value == 0 else 0 if value == 1 else value + 1)
    case ast.Constant(float() as value):
      yield ast.Constant(2 * value if value else 1.0)
    case ast.Attribute(value, "sum", ast.Load()):
      yield ast.BinOp(
        node, ast.Div(), ast.Attribute(value, "count", ast.Load())
      )
    case ast.Name("policy" | "ref" as name, ast.Load()):
      yield ast.Name("ref" if name == "policy" else "policy", ast.Load())
    case ast.Call(fn, args, keywords):
      name = getattr(fn, "attr", getattr(fn, "id", ""))
      if name in EXCHANGED and isinstance(fn, ast.Attribute):
        yield ast.Call(
          ast.Attribute(fn.value, EXCHANGED[name], ast.Load()), args, keywords
        )
      if args and name in NEGATED:
        yield ast.Call(
          fn, [ast.UnaryOp(ast.USub(), args[0]), *args[1:]], keywords
        )
      if args and name in DROPPED:
        yield args[0]
      if name in ("where", "clip") and len(args) == 3:
        yield ast.Call(fn, [args[0], args[2], args[1]], keywords)


def sites(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, str]]:
  """(parent, field, place in a list or None, function) of what may change.

  Messages of errors, docstrings, decorators, annotations and imports are left
  alone: nothing computes with them.
  """

  def walk(node, function):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      function = node.name
    for field, value in ast.iter_fields(node):
      if field in ("decorator_list", "annotation", "returns"):
        continue
      for place, child in (
        enumerate(value) if isinstance(value, list) else ((None, value),)
      ):
        if not isinstance(child, ast.AST) or isinstance(
          child, (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr)
        ):
          continue
        # A method's name is not the attribute of an array.
        if not (field == "func" and isinstance(child, ast.Attribute)):
          yield node, field, place, function
        yield from walk(child, function)

  yield from walk(tree, "")


def mutants(source: str) -> list[Mutant]:
  """Every mutant of a source text, in the order of its lines."""
  tree, found = ast.parse(source), []
  seen = {ast.unparse(tree)}
  for parent, field, place, function in list(sites(tree)):
    held = getattr(parent, field)
    old = held if place is None else held[place]
    for new in variants(old):
      new = ast.copy_location(copy.deepcopy(new), old)
      if place is None:
        setattr(parent, field, new)
      else:
        held[place] = new
      code = ast.unparse(ast.fix_missing_locations(tree))
      if code not in seen:
        seen.add(code)
        short = [" ".join(ast.unparse(x).split())[:60] for x in (old, new)]
        found.append(
          Mutant(
            getattr(old, "lineno", 0),
            function,
            f"{short[0]}  ->  {short[1]}",
            code,
          )
        )
      if place is None:
        setattr(parent, field, old)
      else:
        held[place] = old
  return sorted(found, key=lambda m: m.line)


class Instead(importlib.abc.MetaPathFinder):
  """Imports one module from a text, others as ever."""

  def __init__(self, name: str, path: pathlib.Path, code: str):
    self.name, self.path, self.code = name, path, code

  def find_spec(self, fullname, path, target=None):
    if fullname != self.name:
      return None
    code, file = self.code, str(self.path)

    class Loader(importlib.machinery.SourceFileLoader):
      def get_code(self, fullname):
        return compile(code, file, "exec")

    package = self.path.name == "__init__.py"
    return importlib.util.spec_from_file_location(
      fullname,
      file,
      loader=Loader(fullname, file),
      submodule_search_locations=[str(self.path.parent)] if package else None,
    )


def module_name(path: pathlib.Path, root: pathlib.Path) -> str:
  """jaxalign/train/step.py -> jaxalign.train.step."""
  parts = path.relative_to(root).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def start(
  mutant: Mutant,
  path: pathlib.Path,
  root: pathlib.Path,
  tests: list[str],
  log: pathlib.Path,
) -> int:
  """Forks a process that exits with 0 if the tests pass on a mutant."""
  child = os.fork()
  if child:
    return child
  code = 1
  try:
    os.setsid()
    with open(log, "w") as out:
      os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
    import pytest

    sys.meta_path.insert(0, Instead(module_name(path, root), path, mutant.code))
    # Not the project's options: workers of xdist would import the file whole.
    flags = [
      "-x",
      "-q",
      "--tb=short",
      "-p",
      "no:cacheprovider",
      "-o",
      "addopts=",
      "-m",
      "not slow",
      *tests,
    ]
    code = 5
    if mutant.function:
      code = int(pytest.main([*flags, "-k", mutant.function]))
    if code in (0, 5):  # 5: no test of that name
      code = int(pytest.main(flags))
  finally:
    os._exit(code)


def verdicts(
  work: list[Mutant], begin: Callable[[Mutant], int], jobs: int, timeout: float
) -> Iterator[tuple[Mutant, bool]]:
  """(mutant, whether its tests passed) as they end; one that hangs fails."""
  work, running = list(work), {}
  while work or running:
    while work and len(running) < jobs:
      m = work.pop(0)
      running[begin(m)] = m, time.monotonic() + timeout
    time.sleep(0.02)
    for child, (m, end) in list(running.items()):
      if time.monotonic() > end:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        code = 1
      else:
        done, status = os.waitpid(child, os.WNOHANG)
        if not done:
          continue
        code = os.waitstatus_to_exitcode(status)
      del running[child]
      yield m, code == 0


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("source", type=pathlib.Path)
  parser.add_argument("tests", nargs="+")
  parser.add_argument("--root", type=pathlib.Path, default=ROOT)
  parser.add_argument("--jobs", type=int, default=os.cpu_count())
  parser.add_argument("--only", default="", help="functions, a regex")
  parser.add_argument("--sample", type=int, default=0, help="so many at random")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--timeout", type=float, default=300, help="seconds")
  parser.add_argument("--preload", default=PRELOAD, help="modules, by comma")
  parser.add_argument("--list", action="store_true", help="run nothing")
  args = parser.parse_args()
  root, path = args.root.resolve(), args.source.resolve()
  source = path.read_text()
  found = [m for m in mutants(source) if re.search(args.only, m.function)]
  if args.sample and args.sample < len(found):
    found = random.Random(args.seed).sample(found, args.sample)
  shown = args.source.as_posix()
  if args.list:
    for m in found:
      print(f"{shown}:{m.line} {m.function}: {m.what}")
    return
  with tempfile.TemporaryDirectory() as folder:
    # Before jax is imported: what one mutant compiled serves the next.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    sys.path.insert(0, str(root))
    os.chdir(root)
    for name in filter(None, args.preload.split(",")):
      try:
        importlib.import_module(name)
      except ImportError:
        pass
    began, survivors = time.monotonic(), []
    logs = (pathlib.Path(folder, f"{i}.log") for i in itertools.count())
    begin = lambda m: start(m, path, root, args.tests, next(logs))
    ((_, passes),) = verdicts(
      [Mutant(0, "", "unchanged", source)], begin, 1, 10 * args.timeout
    )
    if not passes:
      sys.exit(
        f"the unchanged {shown} fails its tests:\n"
        + pathlib.Path(folder, "0.log").read_text()[-3000:]
      )
    print(
      f"{shown}: {len(found)} mutants; unchanged passes in "
      f"{time.monotonic() - began:.0f} s",
      flush=True,
    )
    for done, (m, lives) in enumerate(
      verdicts(found, begin, args.jobs, args.timeout), 1
    ):
      if lives:
        survivors.append(m)
        print(f"SURVIVED {shown}:{m.line} {m.function}: {m.what}", flush=True)
      if done % 25 == 0:
        print(
          f"  {done} of {len(found)}, {len(survivors)} survived, "
          f"{time.monotonic() - began:.0f} s",
          flush=True,
        )
    print(f"{shown}: {len(found) - len(survivors)} of {len(found)} noticed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
  main()
