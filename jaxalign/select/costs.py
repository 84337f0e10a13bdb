"""What a selection costs: the sizes of a pool in, flops and bytes out.

A sampler declares its cost, `@needs(..., cost=fn)`: `fn(sizes, **keywords) ->
Work` counts multiply-adds x 2 by the equations of its docstring and leaves out
lower orders. Greedy methods that may stop early count as one whole sweep. Bytes
are of the largest moment; a test compares them with what was held. A sampler
without a cost is "not known" in the plan.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxalign.select import grams

ID_BYTES = 200  # of a row's id while it is hashed


class Sizes(NamedTuple):
  """Sizes of a pool and of its selection."""

  n: float  # N rows
  e: int  # E, width of an embedding
  budget: float  # M
  r: int = 2  # R responses a row
  d: int = 0  # D, width of a residual


class Work(NamedTuple):
  """The cost of one step of a selection, without its columns."""

  host: float = 0  # flops on the host
  devices: float = 0  # flops on the devices
  held: float = 0  # bytes on the host
  device: float = 0  # bytes on all devices together


class Estimate(NamedTuple):
  """The cost of a sampler, without the stages that make its columns."""

  flops: float
  read: int  # bytes of its columns, from disk
  held: int  # bytes on the host, without those columns
  device: int  # bytes on all devices together; 0: it runs on the host
  on_host: float = 0.0  # of the flops


# Bytes of a row of a column; what is not here is one number a response.
COLUMN_BYTES = {
  "embedding": lambda p: 4 * p.r * p.e,
  "answer_embedding": lambda p: 4 * p.r * p.e,
  "residual": lambda p: 4 * p.r * p.d,
  "grams": lambda p: p.r * grams.WIDTH,
  "overlap": lambda p: 8 * p.r,
  "held_out_loss": lambda p: 8 * 6,
  "group": lambda p: 64,
  "source": lambda p: 64,
  "topic": lambda p: 8,
  "label": lambda p: 1,
  "subset": lambda p: 1,
}


def of_ranks(p: Sizes, **_: Any) -> Work:
  """Of a column that is ranked as it is."""
  return Work(8 * p.n * p.r, held=8 * p.r * p.n)


def of_scores(p: Sizes, **_: Any) -> Work:
  """Of a few flops on each number; the score and its ranks."""
  return Work(8 * p.n * p.r, held=40 * p.r * p.n)


def of_draws(p: Sizes, **_: Any) -> Work:
  """As `of_scores`, where every row's id is hashed."""
  return Work(8 * p.n * p.r, held=ID_BYTES * p.n)


def one_after_another(*steps: Work) -> Work:
  """Flops add up; of bytes the largest step counts."""
  host, devices, held, device = zip(*steps)
  return Work(sum(host), sum(devices), max(held), max(device))


def estimate(sampler: Callable, sizes: Sizes, **kwargs: Any) -> Estimate | None:
  """The cost of a sampler or a chain; None where one of it has none.

  Args:
    sampler: of `chains.find_sampler`, or one with `needs`.
    sizes: of the pool.
    **kwargs: of the sampler; those in its name come first.
  """
  if getattr(sampler, "cost", None) is None:
    return None
  bound = getattr(sampler, "keywords", {})
  work = sampler.cost(sizes, **kwargs | bound)
  size = lambda name: COLUMN_BYTES.get(name, lambda p: 8 * p.r)(sizes)
  read = sizes.n * sum(map(size, sampler.needs))
  copied = sizes.n * sum(map(size, getattr(sampler, "copied", ())))
  flops, held = work.host + work.devices, copied + work.held
  return Estimate(flops, int(read), int(held), int(work.device), work.host)
