"""Rooms in their order: an import points down only, and nothing is knotted."""

import ast
import collections
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
# From the top. `jaxalign/` itself holds pipeline.py and shims of commands.
ROOMS = [
  "shims",
  "cli",
  "study",
  "pipeline",
  "report",
  "eval",
  "train",
  "select",
  "embed",
  "model",
  "data",
  "core",
]
SHIMS = ("__init__", "main", "generate", "grid", "agreement")


def modules() -> dict[str, pathlib.Path]:
  """Dotted name -> file, of every module of the package."""
  found = {}
  for path in sorted((ROOT / "jaxalign").rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found[name.removesuffix(".__init__")] = path
  return found


def room(name: str) -> str:
  part = (name.split(".") + ["__init__"])[1]
  if part in SHIMS or name.endswith("__main__"):
    return "shims"
  return part


def imports(path: pathlib.Path, known: dict) -> list[tuple[int, str]]:
  """(line, module of ours) of every import, those inside functions too."""
  out = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      out += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        out.append((node.lineno, full if full in known else node.module))
  return [(line, name) for line, name in out if name in known]


def test_an_import_points_down():
  known, wrong = modules(), []
  for name, path in known.items():
    for line, other in imports(path, known):
      above = ROOMS.index(room(name)) > ROOMS.index(room(other))
      if above and other != "jaxalign":  # of which only the version is read
        at = path.relative_to(ROOT)
        wrong.append(f"{at}:{line}: {room(name)} imports {other}, above it")
  assert not wrong, "\n" + "\n".join(wrong)


def test_no_knot_between_files():
  known = modules()
  graph = {
    name: {other for _, other in imports(path, known)} - {name}
    for name, path in known.items()
  }
  while graph:  # takes away, again and again, what imports nothing that is left
    leaves = {name for name in graph if not graph[name] & graph.keys()}
    assert leaves, f"files that import each other: {sorted(graph)}"
    graph = {name: graph[name] for name in graph.keys() - leaves}


def test_the_top_level_holds_the_pipeline_and_shims():
  top = {path.stem for path in (ROOT / "jaxalign").glob("*.py")}
  assert top == {"pipeline", *SHIMS}
  for name in set(SHIMS) - {"__init__"}:
    assert len((ROOT / f"jaxalign/{name}.py").read_text().splitlines()) < 10


def test_no_file_name_twice():
  shims = [p for name, p in modules().items() if room(name) == "shims"]
  stems = collections.Counter(
    path.stem
    for path in modules().values()
    if path not in shims and path.stem != "__init__"
  )
  assert not [name for name, n in stems.items() if n > 1]
