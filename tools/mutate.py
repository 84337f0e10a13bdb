r"""Breaks a source file in small ways and names the breaks no test notices.

  python tools/mutate.py jaxalign/train/losses/pair.py tests/test_losses.py

A mutant is the file with one change: an operator exchanged, a term left out, a
fraction turned over, a sum taken for a mean, a constant, default, comparison
or branch changed, a function's argument negated, a gradient stopped no longer.
Each runs in a process forked from one that has imported the slow libraries;
the file on disk is not touched. First run the tests whose names hold that of
the changed function, then all; the first failure ends it. Survivors are listed
and the exit code is 1: write the test, or see that the change changes nothing.

mutmut skips functions with decorators, which all losses and samplers have;
cosmic-ray edits the file on disk and imports jax anew for every mutant.
"""

import argparse
import ast
from collections.abc import Callable, Iterator
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
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

a = ast
SWAPPED = {a.Add: a.Sub, a.Sub: a.Add, a.Mult: a.Div, a.Div: a.Mult}
SWAPPED |= {a.BitAnd: a.BitOr, a.BitOr: a.BitAnd}
SWAPPED |= dict.fromkeys((a.Pow, a.FloorDiv, a.Mod, a.MatMult), a.Mult)
COMPARED = {a.Gt: (a.GtE, a.Lt), a.GtE: (a.Gt, a.LtE)}
COMPARED |= {a.Lt: (a.LtE, a.Gt), a.LtE: (a.Lt, a.GtE)}
PAIRS = ((a.Eq, a.NotEq), (a.Is, a.IsNot), (a.In, a.NotIn))
COMPARED |= {x: (y,) for pair in PAIRS for x, y in (pair, pair[::-1])}
EXCHANGED = "sum mean maximum minimum max min exp expm1 log log1p argmax argmin"
EXCHANGED = [*EXCHANGED.split(), "all", "any"]
EXCHANGED = {n: EXCHANGED[i ^ 1] for i, n in enumerate(EXCHANGED)}
# Functions of one array whose argument may be negated, and that may be dropped.
NEGATED = "log_sigmoid sigmoid relu softplus exp expm1 sort argsort tanh abs"
DROPPED = "relu stop_gradient sort argsort abs sqrt log exp sigmoid mean cumsum"
SKIPPED = (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr)


class Mutant(NamedTuple):
  """One change."""

  line: int
  function: str
  what: str
  code: str


def _calls(fn: ast.AST, args: list, keywords: list) -> Iterator[ast.AST]:
  """What may stand in a call's place."""
  name = getattr(fn, "attr", getattr(fn, "id", ""))
  if name in EXCHANGED and isinstance(fn, ast.Attribute):
    other = ast.Attribute(fn.value, EXCHANGED[name], ast.Load())
    yield ast.Call(other, args, keywords)
  if args and name in NEGATED.split():
    yield ast.Call(fn, [ast.UnaryOp(ast.USub(), args[0]), *args[1:]], keywords)
  if args and name in DROPPED.split():
    yield args[0]
  if name in ("where", "clip") and len(args) == 3:
    yield ast.Call(fn, [args[0], args[2], args[1]], keywords)


def variants(node: ast.AST) -> Iterator[ast.AST]:
  """The nodes that may stand in a node's place."""
  match node:
    case ast.BinOp(left, op, right):
      if type(op) in SWAPPED:
        yield ast.BinOp(left, SWAPPED[type(op)](), right)
      if isinstance(op, (ast.Div, ast.Sub)):
        yield ast.BinOp(right, op, left)
      if isinstance(op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)):
        yield from (left, right)
    case ast.UnaryOp(ast.USub() | ast.Not() | ast.Invert(), operand):
      yield operand
    case ast.Compare(left, [op], rights):
      for other in COMPARED.get(type(op), ()):
        yield ast.Compare(left, [other()], rights)
    case ast.BoolOp(op, values):
      yield ast.BoolOp([ast.And, ast.Or][isinstance(op, ast.And)](), values)
    case ast.IfExp(test, body, orelse):
      yield from (body, orelse)
    case ast.If(test, body, orelse):
      yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
    case ast.Constant(bool() as value):
      yield ast.Constant(not value)
    case ast.Constant(int() as value):
      yield ast.Constant({0: 1, 1: 0}.get(value, value + 1))
    case ast.Constant(float() as value):
      yield ast.Constant(2 * value if value else 1.0)
    case ast.Attribute(value, "sum", ast.Load()):
      count = ast.Attribute(value, "count", ast.Load())
      yield ast.BinOp(node, ast.Div(), count)
    case ast.Name("policy" | "ref" as name, ast.Load()):
      yield ast.Name("ref" if name == "policy" else "policy", ast.Load())
    case ast.Call(fn, args, keywords):
      yield from _calls(fn, args, keywords)


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
      children = (
        enumerate(value) if isinstance(value, list) else [(None, value)]
      )
      for place, child in children:
        if not isinstance(child, ast.AST) or isinstance(child, SKIPPED):
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

    def put(node, holder=parent, name=field, i=place):
      if i is None:
        setattr(holder, name, node)
      else:
        getattr(holder, name)[i] = node

    for new in variants(old):
      new = ast.copy_location(copy.deepcopy(new), old)
      put(new)
      code = ast.unparse(ast.fix_missing_locations(tree))
      put(old)
      if code in seen:
        continue
      seen.add(code)
      short = [" ".join(ast.unparse(x).split())[:60] for x in (old, new)]
      line = getattr(old, "lineno", 0)
      found.append(Mutant(line, function, "  ->  ".join(short), code))
  return sorted(found, key=lambda m: m.line)


class Instead(importlib.abc.MetaPathFinder):
  """Imports the module of one file from a text, others as ever."""

  def __init__(self, path: pathlib.Path, root: pathlib.Path, code: str):
    parts = path.relative_to(root).with_suffix("").parts
    self.package = parts[-1] == "__init__"
    self.name = ".".join(parts[:-1] if self.package else parts)
    self.path, self.code = path, code

  def find_spec(self, fullname, path, target=None):
    if fullname != self.name:
      return None
    code, file = self.code, str(self.path)

    class Loader(importlib.machinery.SourceFileLoader):
      def get_code(self, fullname):
        return compile(code, file, "exec")

    return importlib.util.spec_from_file_location(
      fullname,
      file,
      loader=Loader(fullname, file),
      submodule_search_locations=[os.path.dirname(file)] * self.package or None,
    )


def start(mutant: Mutant, finder: Instead, tests: list[str], log: str) -> int:
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

    sys.meta_path.insert(0, finder)
    # Not the project's options: workers of xdist would import the file whole.
    flags = "-x -q --tb=short -p no:cacheprovider -o addopts= -m".split()
    flags += ["not slow", *tests]
    code = 5  # no test of that name
    if mutant.function:
      code = int(pytest.main([*flags, "-k", mutant.function]))
    if code in (0, 5):
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
      late = time.monotonic() > end
      if late:
        os.killpg(child, signal.SIGKILL)
      done, status = os.waitpid(child, 0 if late else os.WNOHANG)
      if done:
        del running[child]
        yield m, not late and os.waitstatus_to_exitcode(status) == 0


def prepare(folder: str, root: pathlib.Path, preload: str) -> None:
  """Imports the slow libraries; what one mutant compiles serves the next."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/xla")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  sys.path.insert(0, str(root))
  os.chdir(root)
  for name in preload.split(","):
    if importlib.util.find_spec(name.split(".")[0]):
      importlib.import_module(name)


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
  source, shown = path.read_text(), args.source.as_posix()
  found = [m for m in mutants(source) if re.search(args.only, m.function)]
  if 0 < args.sample < len(found):
    found = random.Random(args.seed).sample(found, args.sample)
  name = lambda m: f"{shown}:{m.line} {m.function}: {m.what}"
  if args.list:
    print("\n".join(map(name, found)))
    return
  with tempfile.TemporaryDirectory() as folder:
    prepare(folder, root, args.preload)
    began, survivors = time.monotonic(), 0
    begin = lambda m: start(
      m, Instead(path, root, m.code), args.tests, f"{folder}/log"
    )
    whole = [Mutant(0, "", "unchanged", source)]
    ((_, passes),) = verdicts(whole, begin, 1, 10 * args.timeout)
    if not passes:
      log = pathlib.Path(folder, "log").read_text()[-3000:]
      sys.exit(f"the unchanged {shown} fails its tests:\n{log}")
    seconds = time.monotonic() - began
    print(
      f"{shown}: {len(found)} mutants; unchanged: {seconds:.0f} s", flush=True
    )
    for m, lives in verdicts(found, begin, args.jobs, args.timeout):
      if lives:
        survivors += 1
        print(f"SURVIVED {name(m)}", flush=True)
    print(f"{shown}: {len(found) - survivors} of {len(found)} noticed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
  main()
