"""What a program compiled for TPUs holds, read from the compiler's text."""

import collections
import pathlib
import re
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from jaxalign.core.errors import ConfigError
from jaxalign.model import decoder

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)


VALUE = r"value: <\d+ (\S+) @\d+> \(size=(\d+),offset=\d+\): (\w+)\[([\d,]*)\]"
CALLS = r"(?:calls|body|condition|to_apply|called_computation)=%?([\w.\-]+)"


class Instruction(NamedTuple):
  """One line of a compiled program."""

  computation: str
  name: str
  op: str
  shapes: list[tuple[str, tuple[int, ...]]]  # of the result's arrays
  text: str


def instructions(text: str) -> list[Instruction]:
  """The lines of a compiled program, from its text."""
  out, computation = [], ""
  for line in text.splitlines():
    if line and not line[0].isspace():
      head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line)
      computation = head.group(1) if head else ""
      continue
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)
    if not found:
      continue
    # Layouts and comments out of the way: what is left is "type op(...".
    bare = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", found.group(2))
    parts = re.match(r"(\(.*?\)|\S+) ([\w\-]+)\(", bare)
    if parts:
      arrays = re.findall(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]", parts[1])
      shapes = [
        (kind, tuple(int(n) for n in dims.split(",") if n))
        for kind, dims in arrays
      ]
      out.append(Instruction(computation, found[1], parts[2], shapes, line))
  return out


def _called(program: list[Instruction], start: str) -> set[str]:
  """Computations that run inside those named by `start` (a pattern)."""
  calls = collections.defaultdict(set)
  seen, todo = set(), []
  for i in program:
    calls[i.computation].update(re.findall(CALLS, i.text))
    todo += re.findall(start, i.text)
  while todo:
    name = todo.pop()
    if name not in seen:
      seen.add(name)
      todo += calls[name]
  return seen


def _words(shape: tuple[str, tuple[int, ...]]) -> str:
  return f"{shape[0]}[{','.join(map(str, shape[1]))}]"


def collectives(program: list[Instruction]) -> dict[str, int]:
  """How many collectives of each kind stand in loops and outside of them.

  The TPU compiler writes a reduce-scatter as an all-reduce that is sliced in
  one fusion, and an asynchronous collective as several lines of one channel.
  """
  loops = _called(program, r"body=%?([\w.\-]+)")
  seen = set()
  for i in program:
    op = i.op.removesuffix("-start")
    if op not in COLLECTIVES:
      continue
    if op == "all-reduce" and "all-reduce-scatter" in i.computation:
      op = "reduce-scatter"
    channel = re.search(r"channel_id=(\d+)", i.text)
    where = "in loops" if i.computation in loops else "outside"
    seen.add((f"{op} {where}", channel[1] if channel else i.name))
  return dict(sorted(collections.Counter(kind for kind, _ in seen).items()))


def whole_gathers(
  program: list[Instruction], m: decoder.ModelConfig, tensor: int
) -> list[str]:
  """All-gathers of weights of more than one layer at once.

  Weights are gathered layer by layer inside the scan; a compiler that lifts
  the gather out of it makes every chip hold the whole model. A result counts
  where it has an axis of T and T times the smallest matrix of a layer.
  """
  if m.layers < 2:
    raise ConfigError("one layer is the whole stack; say --layers=2 or more")
  smallest = min(
    int(np.prod(p.shape[1:])) // tensor
    for n, p in decoder.table(m).items()
    if n.startswith("layers/") and len(p.shape) > 2
  )
  return [
    f"{_words(s)} {i.name}"
    for i in program
    if i.op in ("all-gather", "all-gather-start")
    for s in i.shapes
    if m.layers in s[1] and np.prod(s[1]) >= m.layers * smallest
  ]


def logit_elements(
  m: decoder.ModelConfig, *, positions: range, tensor: int
) -> int:
  """Logits of all positions of a chip that predict a token."""
  return positions[0] * m.vocab // tensor


def logit_buffers(
  program: list[Instruction],
  m: decoder.ModelConfig,
  *,
  positions: range,
  tensor: int,
) -> list[str]:
  """Arrays that hold logits of all positions of a chip's responses.

  They have as many elements as `logit_elements`, or more, and a multiple of
  V / tensor of them, whatever their axes are merged to. The embedding and the
  head may be as large: [V, D] is recognised by its shape.

  Args:
    program: from `instructions`.
    m: the model's sizes.
    positions: of one chip; from those that predict a token to as many as the
      layout and the head may fill up to.
    tensor: chips that share the vocabulary.

  Raises:
    ConfigError: logits of all positions would have the shape of the head.
  """
  if m.width in positions:
    raise ConfigError(
      f"{positions[0]} positions of a chip have as many logits "
      "as the head has weights; choose other --rows"
    )
  part = m.vocab // tensor
  least = logit_elements(m, positions=positions, tensor=tensor)
  weights = [sorted((v, m.width)) for v in (part, m.vocab)]
  found = []
  for i in program:
    for s in i.shapes:
      count = int(np.prod(s[1], dtype=np.int64))
      weight = sorted(n for n in s[1] if n > 1) in weights
      if count >= least and count % part == 0 and not weight:
        found.append(f"{_words(s)} {i.op} {i.name}")
  return found


def held(assignment: str) -> list[tuple[int, str, str]]:
  """The arrays for which the compiler set memory aside: (bytes, shape, name).

  Largest first, arguments left out; arrays that take turns in one place are
  all listed.

  Args:
    assignment: the text of the compiler's buffer assignment.
  """
  out = {}
  for part in re.split(r"^allocation ", assignment, flags=re.MULTILINE)[1:]:
    if re.match(r".*\bparameter \d+", part) or "thread-local" in part[:200]:
      continue
    for name, size, kind, dims in re.findall(VALUE, part):
      out.setdefault((int(size), f"{kind}[{dims}]"), name.split("{")[0])
  return [(*key, out[key]) for key in sorted(out, reverse=True)]


class Compiled(NamedTuple):
  """A program for TPUs, with what the compiler says of it."""

  text: str
  assignment: str  # of buffers
  memory: Any  # argument_size_in_bytes, temp_size_in_bytes, ...
  seconds: float


def compile_lowered(lowered: Any) -> Compiled:
  """Compiles; the text is read from a dump, `as_text` fails on some v5p."""
  with tempfile.TemporaryDirectory() as folder:
    start = time.monotonic()
    compiled = lowered.compile(
      compiler_options=dict(xla_dump_to=folder, xla_dump_hlo_as_text=True)
    )
    seconds = time.monotonic() - start

    def dumped(kind):
      found = pathlib.Path(folder).glob(f"*.after_optimizations{kind}.txt")
      return max((path.read_text() for path in found), key=len)

    return Compiled(
      dumped("_after_buffer_assignment"),
      dumped("-buffer-assignment"),
      compiled.memory_analysis(),
      seconds,
    )
