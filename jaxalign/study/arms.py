"""The arms of a study: which are run, and which are compared with which."""

from collections.abc import Iterator
import itertools
import shlex
from typing import Any, NamedTuple

from jaxalign.model.job import Arm, budget_of, WHOLE


def arms_of(c: Any) -> list[Arm]:
  """The chosen sampler first, then what it is compared with.

  Every sampler at every budget with every seed; seed by seed, so that a job
  cut short has whole comparisons.
  """
  arms = {}
  for seed, given, name in itertools.product(
    range(c.seed, c.seed + c.seeds),
    c.budgets or (c.select.budget,),
    (c.select.sampler, *c.compare),
  ):
    budget = budget_of(given)
    arm = Arm(name, budget, seed)
    if name in WHOLE:
      arm = Arm("random", 1.0, seed, 0 if name == "all" else budget)
    arms.setdefault(arm.name, arm)
  return list(arms.values())


def grouped(arms: list[Arm]) -> dict[str, list[Arm]]:
  """Label -> the runs of an arm, one a seed."""
  out: dict[str, list[Arm]] = {}
  for arm in arms:
    out.setdefault(arm.label, []).append(arm)
  return out


class Comparison(NamedTuple):
  """Two arms, and how a page heads and labels them."""

  a: str  # label of an arm
  b: str  # label of the arm it is compared with
  title: str
  label: str  # what the title leaves open


def comparisons(groups: dict[str, list[Arm]], chosen: str) -> list[Comparison]:
  """The comparisons that a study makes, no more: each costs the others.

  Every sampler against random at its budget; the chosen one also against the
  others at its budget, and against everything. Each pair comes once.

  Args:
    groups: as from `grouped`.
    chosen: config.select.sampler.
  """
  once: dict[frozenset, Comparison] = {}
  for pair in _comparisons(groups, chosen):
    once.setdefault(frozenset((pair.a, pair.b)), pair)
  return list(once.values())


def _comparisons(
  groups: dict[str, list[Arm]], chosen: str
) -> Iterator[Comparison]:
  first = {label: runs[0] for label, runs in groups.items()}
  subsets = {n: a for n, a in first.items() if not a.is_all}
  for b, base in subsets.items():
    for a, arm in subsets.items():
      if base.sampler == "random" and arm.budget == base.budget and a != b:
        yield Comparison(a, b, f"Against {b}", a)
  ours = [a for a, arm in subsets.items() if arm.sampler == chosen]
  for a in ours:
    for b, other in first.items():
      budget = subsets[a].budget
      if other.is_all:
        fits = other.like in (0, budget)
      else:
        fits = other.budget == budget and a != b
      if fits and other.is_all and len(ours) > 1:
        yield Comparison(a, b, f"Against {b}", a)
      elif fits:
        yield Comparison(a, b, f"{a} against others", b)


def command_line(argv: list[str]) -> str:
  """The command of a run, as a person can paste it."""
  return "python -m jaxalign.main " + " ".join(shlex.quote(a) for a in argv[1:])
