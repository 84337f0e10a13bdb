"""A name becomes a function, its keywords bound."""

import pytest

from jaxalign.core.errors import ConfigError
from jaxalign.core.lookup import lookup, source_digests
from jaxalign.select.samplers import chains, SAMPLERS


def named(name):
  return lookup(SAMPLERS, name, "sampler", "select.sampler")


@pytest.mark.parametrize(
  "name,bound",
  [
    ("isa(order=magnitude)", dict(order="magnitude")),
    (
      "isa( order=renormalised , pair_score=min )",
      dict(order="renormalised", pair_score="min"),
    ),
    ("density(bandwidth=0.5)", dict(bandwidth=0.5)),
    (
      "jaxalign.select.samplers.isa:isa(order=magnitude)",
      dict(order="magnitude"),
    ),
  ],
)
def test_keywords_in_brackets_are_bound(name, bound):
  plain = named(
    name.partition("(")[0].replace("jaxalign.select.samplers.isa:", "")
  )
  got = named(name)
  assert got.keywords == bound and got.func is plain
  assert (got.needs, got.optional, got.pairs) == (
    plain.needs,
    plain.optional,
    plain.pairs,
  )
  assert got.__doc__ == plain.__doc__


@pytest.mark.parametrize(
  "name,said",
  [
    ("isa(ordre=magnitude)", "takes no 'ordre'; it takes label_quota, order"),
    ("isa(magnitude)", "'isa(magnitude)' is no function with keywords"),
    ("isa(order=__import__('os'))", "\"__import__('os')\" is no literal"),
    ("isa | random", "names several"),
    ("random(x=1)", "it takes no keywords"),
    ("issa(order=magnitude)", "did you mean 'isa'"),
    ("isa(order=magnitude", "cannot be read"),
  ],
)
def test_a_wrong_keyword_is_named(name, said):
  with pytest.raises(ConfigError, match="config.select.sampler") as error:
    named(name)
  assert said in str(error.value)


def test_an_edited_function_from_outside_is_another(tmp_path, monkeypatch):
  file = tmp_path / "mine_edition.py"
  file.write_text("def one(): ...\n")
  monkeypatch.syspath_prepend(tmp_path)
  name = "dedup(threshold=0.9) | mine_edition:one(x=1) * isa"
  first = source_digests(name)
  assert list(first) == ["mine_edition"] and source_digests(name) == first
  file.write_text("def one(): return 1\n")
  assert source_digests(name) != first
  assert source_digests("isa(order=soft) * random") == {}
  assert source_digests("no_such_module_of_mine:one") == {}


def test_a_sampler_that_does_not_say_what_it_reads():
  with pytest.raises(ConfigError, match="pool.needs.*config.compare"):
    chains.find_sampler("gate(column=reward) | os.path:join", "compare")
