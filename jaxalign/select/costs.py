"""What choosing rows costs, told before anything runs: one function a sampler.

Operations are multiply-adds x 2 with the sampler's default keywords, counted
by the equations its docstring names; what is of lower order (scaling vectors,
sorting scores) is left out. Greedy methods that may stop early or look again
are counted as one whole sweep.
"""

import math
from typing import Callable, NamedTuple

from jaxalign.select import grams
from jaxalign.select.samplers import bradley_terry
from jaxalign.select.samplers import combine
from jaxalign.select.samplers import heads
from jaxalign.select.samplers import submodular


class Pool(NamedTuple):
  """Sizes of a pool, and how many of its rows are to be kept."""

  n: int  # N rows
  e: int  # E, width of an embedding
  budget: int  # M
  r: int = 2  # R responses a row
  d: int = 0  # D, width of a residual


class Estimate(NamedTuple):
  """What a sampler takes beside the stages that make its columns."""

  operations: float
  read: int  # bytes of its columns, from disk
  held: int  # bytes on the host beside those columns
  device: int  # bytes on all devices together; 0: it runs on the host


# Bytes of a row of a column; what is not here is one number a response.
BYTES = {
    "embedding": lambda p: 4 * p.r * p.e,
    "answer_embedding": lambda p: 4 * p.r * p.e,
    "residual": lambda p: 4 * p.r * p.d,
    "grams": lambda p: p.r * grams.WIDTH,
    "overlap": lambda p: 8 * p.r,
    "held_out_loss": lambda p: 8 * 6,
    "group": lambda p: 64, "source": lambda p: 64, "topic": lambda p: 8,
    "label": lambda p: 1, "subset": lambda p: 1,
}


def _scores(p: Pool) -> tuple[float, int, int]:
  """A few operations on each number; the score and its ranks."""
  return 8 * p.n * p.r, 24 * p.n, 0


def _vectors(p: Pool) -> int:
  return 4 * p.n * p.e


def _density(p: Pool, features: int = 1024) -> tuple[float, int, int]:
  return 4 * p.n * features * p.e, _vectors(p), _vectors(p)


def _k_center(p: Pool) -> tuple[float, int, int]:
  return 2 * p.n * p.budget * p.e, 2 * _vectors(p), _vectors(p) + 4 * p.n


def _herding(p: Pool) -> tuple[float, int, int]:
  return 2 * p.n * p.budget * p.e, _vectors(p) + 4 * 64 * p.n, 0


def _real(p: Pool) -> tuple[float, int, int]:
  return 2 * p.n * p.e, 2 * 8 * p.n * p.e, 0


def _facility_location(p: Pool) -> tuple[float, int, int]:
  drawn = p.n > submodular.EXACT_ROWS
  columns = p.n * (256 + min(2**27 // p.n, p.n))  # float32, that are kept
  return (2 * p.n**2 * p.e * (math.log(20) if drawn else 1),
          _vectors(p) + 4 * columns, 0)


def _dpp(p: Pool) -> tuple[float, int, int]:
  return (p.n * p.budget**2 + 2 * p.n * p.budget * p.e,
          3 * _vectors(p) + 8 * p.n * p.budget, 0)


def _semdedup(p: Pool) -> tuple[float, int, int]:
  k = math.ceil(p.n / 1024)
  some = min(p.n, max(20_000, 32 * k))
  return (2 * k * p.e * (10 * some + p.n) + p.n**2 * p.e / k,
          _vectors(p) + 4 * 512**2, _vectors(p))


def _diverse(p: Pool) -> tuple[float, int, int]:
  return 2 * p.n * p.budget * p.e, _vectors(p) + 4 * p.budget * p.e, 0


def _heads(p: Pool, *widths: int) -> tuple[float, int, int]:
  """Heads on features of these widths: rotated, then ten Newton steps a fold.

  Each head is fitted at two ridges; the search for one runs on few rows.
  """
  columns = heads.COLUMNS
  total = sum((2 * p.n * w**2 + 2 * p.n * w * columns if w > columns else 0)
              + 2 * bradley_terry.FOLDS * 10 * 2 * p.n * min(w, columns)**2
              for w in widths)
  return total, 4 * p.r * p.n * sum(widths) + 8 * p.n * columns, 0


# (operations, bytes held, bytes on devices) of every key of SAMPLERS.
COSTS: dict[str, Callable[[Pool], tuple[float, int, int]]] = {
    **dict.fromkeys(("random", "stratified", "length_matched", "isa", "length",
                     "perplexity", "ifd", "ask_llm", "selective_dpo",
                     "external_margin", "implicit_margin", "bees"), _scores),
    "real": _real, "density": _density, "k_center": _k_center,
    "herding": _herding, "facility_location": _facility_location,
    "dpp": _dpp, "semdedup": _semdedup, "deita": _diverse,
    "crossfit_lite": lambda p: _heads(p, grams.WIDTH // 2),
    "crossfit": lambda p: _heads(p, grams.WIDTH // 2, p.d,
                                 grams.WIDTH // 2 + p.d + p.e),
}
STEPS = {"gate": _scores, "quota": _scores, "dedup": _semdedup,
         "diverse": _diverse}


def of(name: str, pool: Pool) -> Estimate | None:
  """The cost of a sampler or a chain of them; None: it is not known here.

  Args:
    name: as `combine.named` takes it; keywords are not looked at.
    pool: the sizes.
  """
  steps, samplers = combine.links(name)
  parts = [STEPS.get(s) for s in steps] + [COSTS.get(s) for s in samplers]
  if None in parts:
    return None
  found = [part(pool) for part in parts]
  read = sum(BYTES.get(column, lambda p: 8 * p.r)(pool)
             for column in combine.named(name).needs)
  return Estimate(sum(f[0] for f in found), pool.n * read,
                  max(f[1] for f in found), max(f[2] for f in found))
