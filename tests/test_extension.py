"""What a fork adds from outside the package: one function, one name."""

import textwrap

import numpy as np
import pools as make_pools
import pytest

from jaxalign.select import costs
from jaxalign.select.pool import checked
from jaxalign.select.samplers import combine

SAMPLER = """
from jaxalign.select.costs import of_scores
from jaxalign.select.pool import needs
from jaxalign.select.samplers.values import column, one_side, ranked

@needs("length", cost=of_scores)
def shortest(seed, pool, budget, *, side="chosen"):
  return ranked(-one_side(column(pool, "length"), side), pool, budget)

@needs("length")
def uncounted(seed, pool, budget):
  return shortest(seed, pool, budget)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
  """Writes a module that only sys.path knows."""

  def write(name, text):
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)

  return write


def test_sampler(outside):
  """One function over a column, named as module:function, and in chains."""
  outside("my_sampler", SAMPLER)
  pool, sizes = make_pools.make(2, 200), costs.Sizes(200, 8, 40)
  rejected = pool.length[:, 1]
  for name in (
    "my_sampler:shortest(side=rejected)",
    "gate(column=reward) | my_sampler:shortest(side=rejected)",
  ):
    sampler = combine.named(name)
    assert "length" in sampler.needs
    got = checked(sampler(0, pool, 40), 200, 40, name)
    assert rejected[got.rows].max() <= np.delete(rejected, got.rows).min()
    assert costs.estimate(sampler, sizes).flops > 0
  both = combine.named("my_sampler:shortest * ask_llm")
  assert both.needs == ("length", "p_yes")
  # The plan says of one without a cost that it is not known.
  assert costs.estimate(combine.named("my_sampler:uncounted"), sizes) is None
