"""Clocks, peaks, useful FLOPs, tables and the torch process of tools/gpu.py.

A figure is the median of several repeats with their range; each repeat runs a
few calls and waits for the last. Compiling and a first call lie outside the
clock. Useful FLOPs are those the mathematics needs: causal attention is counted
as the half that is not masked, the head on every position, the embedding
lookup not at all, and nothing that is recomputed counts.
"""

from collections.abc import Callable
import json
import pathlib
import queue
import statistics
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.model import decoder
from jaxalign.model.flops import decoder_flops

# Published dense peaks, FLOP/s: (bfloat16 on the matrix units, float32 without
# them), by the first words of the card's name, longest first.
PEAKS = {
  "NVIDIA H100 PCIe": (756e12, 51e12),
  "NVIDIA H100 NVL": (835e12, 60e12),
  "NVIDIA H200 NVL": (835e12, 60e12),
  "NVIDIA GH200": (989e12, 67e12),
  "NVIDIA H100": (989e12, 67e12),
  "NVIDIA H200": (989e12, 67e12),
  "NVIDIA A100": (312e12, 19.5e12),
}
HEADER = (
  "| what | who | ms a call, median (range; repeats) | TFLOP/s | of "
  "published peak | of measured peak | tokens/s |\n"
  "|---|---|---|---|---|---|---|"
)


def published(kind: str) -> tuple[float | None, float | None]:
  """(bfloat16, float32) published peak of a card; None where not listed."""
  found = (peaks for start, peaks in PEAKS.items() if kind.startswith(start))
  return next(found, (None, None))


def useful(
  m: decoder.ModelConfig, length: int, logit_rows: int | None = None
) -> int:
  """Useful FLOPs of one forward pass over one row, see the docstring.

  `decoder_flops` counts the full square of attention, 4 H C L^2 a layer;
  causal needs L (L + 1) / 2 of the L^2 products of a query and a key.
  """
  masked = 2 * m.heads * m.head_size * length * (length - 1)
  return decoder_flops(m, length, logit_rows) - m.layers * masked


def clock(run: Callable[[], Any], calls: int) -> Callable[[], float]:
  """A function that returns wall seconds of one call, of `calls` in a row.

  `run` is called once first, outside the clock.
  """
  jax.block_until_ready(run())

  def seconds():
    start = time.perf_counter()
    for _ in range(calls):
      out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls

  return seconds


def alternate(
  sides: dict[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
  """Seconds of every side, in turn, every other time in reverse."""
  out = {name: [] for name in sides}
  for number in range(repeats):
    for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
      out[name].append(sides[name]())
  return out


def product_peak(dtype: str, size: int, calls: int, repeats: int) -> float:
  """FLOP/s of a square matrix product, the best of the repeats.

  Random data (zeros run faster), a chain of dependent products whose values
  keep their size; float32 at its full precision.
  """
  draw = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
  exact = jax.lax.Precision.HIGHEST if dtype == "float32" else None
  a, steps = draw.astype(dtype), 4

  @jax.jit
  def chain(a, x):
    once = lambda _, x: jnp.dot(a, x, precision=exact)
    return jax.lax.fori_loop(0, steps, once, x)

  side = clock(lambda: chain(a, a), calls)
  return 2 * size**3 * steps / min(side() for _ in range(repeats))


class Peer:
  """tools/gpu_torch.py as a child that answers one JSON line with another."""

  def __init__(self, log: pathlib.Path, toy: bool):
    self.log = open(log, "a")
    tool = str(pathlib.Path(__file__).with_name("gpu_torch.py"))
    command = [sys.executable, tool, *(["--toy"] if toy else [])]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    self.child = subprocess.Popen(command, text=True, stderr=self.log, **pipes)
    self.answers = queue.Queue()
    threading.Thread(target=self._read, daemon=True).start()

  def _read(self):
    for line in self.child.stdout:
      self.answers.put(line)
    self.answers.put(None)

  def ask(self, timeout: float, **request) -> dict[str, Any]:
    """The answer; RuntimeError where the child failed, or took too long."""
    try:
      self.child.stdin.write(json.dumps(request) + "\n")
      self.child.stdin.flush()
      line = self.answers.get(timeout=max(timeout, 1.0))
    except (queue.Empty, OSError):
      line = None
    if line is None:
      self.close()
      raise RuntimeError(
        f"torch's process gave no answer within {timeout:.0f} s or ended; "
        f"see {self.log.name}"
      )
    answer = json.loads(line)
    if "error" in answer:
      raise RuntimeError(answer["error"])
    return answer

  def close(self) -> None:
    self.child.kill()
    self.child.wait()
    self.log.close()


class Section:
  """Rows, notes and failures of one section; written to a file as they come.

  Attributes:
    name: of the section.
    peaks: "published" and "measured" FLOP/s that the rows' fractions are of.
  """

  def __init__(
    self, name: str, out: pathlib.Path, limit: float, settings: dict
  ):
    self.name, self.path = name, out / f"{name}.json"
    self.end = time.monotonic() + limit
    self.settings, self.peaks = settings, {}
    self.rows, self.notes, self.failures = [], [], []

  def left(self) -> float:
    """Seconds until the section should be done."""
    return self.end - time.monotonic()

  def add(
    self,
    what: str,
    who: str,
    seconds: list[float],
    *,
    flops: float = 0,
    tokens: int = 0,
  ) -> None:
    """One row; `flops` and `tokens` are of the one call timed."""
    middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
    row = dict(what=what, who=who, repeats=len(seconds))
    row |= dict(seconds=middle, low=low, high=high, flops=flops, tokens=tokens)
    for name, peak in self.peaks.items():
      row[f"of_{name}"] = flops / middle / peak if peak else None
    self.rows.append(row)
    self.save()
    if len(self.rows) == 1:
      print(HEADER, flush=True)
    print(as_line(row), flush=True)

  def note(self, text: str) -> None:
    self.notes.append(text)
    print(f"- {text}", flush=True)
    self.save()

  def attempt(self, what: str, run: Callable[[], Any]) -> Any:
    """run(), or None and a line that says how it failed."""
    try:
      return run()
    except Exception as error:  # whatever it is, the rest goes on
      first = (str(error).strip() or "no message").splitlines()[0][:300]
      self.failures.append(f"{what}: {type(error).__name__}: {first}")
      print(f"- FAILED {self.failures[-1]}", flush=True)
      traceback.print_exc(file=sys.stderr)
      self.save()

  def save(self) -> None:
    names = ("settings", "peaks", "rows", "notes", "failures")
    found = {name: getattr(self, name) for name in names}
    self.path.write_text(json.dumps(found, indent=1))


def as_line(row: dict[str, Any]) -> str:
  """A row as a line of Markdown under HEADER."""

  def fraction(name):
    value = row.get(f"of_{name}")
    return f"{100 * value:.1f} %" if value and row["flops"] else "-"

  ms, low, high = (1e3 * row[n] for n in ("seconds", "low", "high"))
  rate = row["flops"] / row["seconds"] / 1e12
  speed = row["tokens"] / row["seconds"]
  cells = row["what"], row["who"]
  cells += (f"{ms:.3f} ({low:.3f} to {high:.3f}; {row['repeats']})",)
  cells += (f"{rate:.2f}" if rate else "-",)
  cells += fraction("published"), fraction("measured")
  cells += (f"{speed:,.0f}" if speed else "-",)
  return f"| {' | '.join(cells)} |"
