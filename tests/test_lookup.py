"""A name becomes a function, its keywords bound."""

import pytest

from jaxalign.errors import ConfigError
from jaxalign.lookup import lookup
from jaxalign.select.samplers import SAMPLERS


def named(name):
  return lookup(SAMPLERS, name, "sampler", "select.sampler")


@pytest.mark.parametrize("name,bound", [
    ("isa(order=magnitude)", dict(order="magnitude")),
    ("isa( order=renormalised , pair_score=min )",
     dict(order="renormalised", pair_score="min")),
    ("density(bandwidth=0.5)", dict(bandwidth=0.5)),
    ("jaxalign.select.samplers.basic:isa(order=magnitude)",
     dict(order="magnitude")),
    ("random()", {}),
])
def test_keywords_in_brackets_are_bound(name, bound):
  plain = named(name.partition("(")[0].replace(
      "jaxalign.select.samplers.basic:", ""))
  got = named(name)
  assert got.keywords == bound and got.func is plain
  assert (got.needs, got.optional, got.pairs) == (
      plain.needs, plain.optional, plain.pairs)
  assert got.__doc__ == plain.__doc__


@pytest.mark.parametrize("name,said", [
    ("isa(ordre=magnitude)", "takes label_quota, order"),
    ("isa(magnitude)", "'magnitude' is no keyword=value"),
    ("isa(order=__import__('os'))", "is no keyword=value"),
    ("random(x=1)", "no keywords"),
    ("issa(order=magnitude)", "did you mean 'isa'"),
    ("isa(order=magnitude", "unknown sampler"),
])
def test_a_wrong_keyword_is_named(name, said):
  with pytest.raises(ConfigError, match="config.select.sampler") as error:
    named(name)
  assert said in str(error.value)
