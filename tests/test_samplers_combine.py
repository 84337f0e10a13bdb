"""Samplers made of samplers: gate, dedup, quota, diverse, product, compose."""

import functools
import inspect

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pools as make_pools
from pools import with_columns
import pytest
import scipy.stats
from test_samplers_geometric import by_hand
from test_samplers_sets import naive_diverse, planted

from configs import common
from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.core.lookup import Term
from jaxalign.model.job import Arm
from jaxalign.select import choose, columns
from jaxalign.select import pool as pools
from jaxalign.select.samplers import chains, crossfit, dedup, SAMPLERS

N = 300
POOL = make_pools.make(2, N)
UNPAIRED = make_pools.make(1, N)
ISA = SAMPLERS["isa"]
MADE = {
  "gate": chains.gate(ISA, "reward", 0.2),
  "dedup": chains.dedup(SAMPLERS["random"], 0.8),
  "quota": chains.quota(SAMPLERS["length"], "source"),
  "diverse": chains.diverse(SAMPLERS["ask_llm"], 0.8),
  "product": chains.product(SAMPLERS["ask_llm"], SAMPLERS["external_margin"]),
  "all": chains.compose(
    ISA,
    [
      Term("gate", dict(column="reward", low=0.2)),
      Term("dedup", dict(threshold=0.9)),
      Term("quota", dict(by="source", shares="equal")),
    ],
  ),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_keeps_the_contract(name):
  sampler = MADE[name]
  parameters = list(inspect.signature(sampler).parameters)
  assert parameters[:3] == ["seed", "pool", "budget"]
  only = pools.Pool(POOL.ids, {k: POOL.columns[k] for k in sampler.needs})
  got = sampler(2, only, 60)
  assert got.rows.dtype == np.int64 and len(set(got.rows.tolist())) == 60
  assert np.isfinite(got.score).all()
  assert (np.diff(got.score[got.rows]) <= 0).all()
  assert np.delete(got.score, got.rows).max() <= got.score[got.rows].min()
  order = np.random.default_rng(1).permutation(N)
  again = sampler(
    2,
    pools.make_pool(
      only.ids[order], {k: v[order] for k, v in only.columns.items()}
    ),
    60,
  )
  assert list(again.rows) == list(got.rows)
  assert len(sampler(2, only, 1).rows) == 1


def test_gate_takes_the_inner_choice_from_what_passes():
  worst = POOL.reward.min(axis=1)
  inside = scipy.stats.rankdata(worst) > 0.2 * N + 0.5
  got = MADE["gate"](0, POOL, 50)
  part = np.flatnonzero(inside)
  wanted = part[ISA(0, chains.take(POOL, part), 50).rows]
  assert list(got.rows) == list(wanted) and inside[got.rows].all()
  # The keywords of the inner sampler go through.
  other = MADE["gate"](0, POOL, 50, order="magnitude")
  assert set(other.rows) != set(got.rows) and inside[other.rows].all()
  with pytest.raises(ConfigError, match="leaves 240 of 300.*wants 241"):
    MADE["gate"](0, POOL, 241)
  with pytest.raises(ConfigError, match="from 0.5 to 0.2"):
    chains.gate(ISA, "reward", 0.5, 0.2)


def test_dedup_drops_one_of_each_planted_two():
  pool = planted()
  n = len(pool.ids)
  sampler = chains.dedup(SAMPLERS["random"], 0.95, clusters=1)
  x = np.float32(by_hand(pool))
  kept = dedup.most_alike(x, pool.ids, 1, 0) <= 0.95
  assert kept.sum() == n * 2 // 3
  got = sampler(0, pool, n * 2 // 3)
  assert set(got.rows) == set(np.flatnonzero(kept))
  cosine = np.float64(x[kept]) @ np.float64(x[kept]).T
  assert (cosine - np.eye(len(cosine))).max() <= 0.95
  with pytest.raises(ConfigError, match="dedup above a cosine of 0.95 leaves"):
    sampler(0, pool, n)
  with pytest.raises(ConfigError, match="cosine of 1.0"):
    chains.dedup(ISA, 1.0)


def test_quota_by_label_is_the_quota_of_isa():
  """`isa` has a label quota of its own; the combinator gives the same rows."""

  for share, quota in ((0.5, 0.5), (0.25, 0.25)):
    made = chains.quota(ISA, "label", {True: share, False: 1 - share})
    got = made(0, UNPAIRED, 80)
    own = ISA(0, UNPAIRED, 80, label_quota=quota)
    assert set(got.rows) == set(own.rows)
  with pytest.raises(ConfigError, match="160 rows of label True, .* has 8"):
    chains.quota(ISA, "label", {True: 1.0})(0, UNPAIRED, 160)


def test_quota_counts_by_hand():
  for shares, wanted in (
    ("equal", [20, 20, 20]),
    ("pool", None),
    ({"web": 3, "chat": 1}, [15, 0, 45]),
  ):
    got = chains.quota(SAMPLERS["random"], "source", shares)(0, POOL, 60)
    source = POOL.source[got.rows]
    kept = [(source == s).sum() for s in ("chat", "code", "web")]
    if wanted is None:
      everywhere = [
        (POOL.source == s).sum() / 5 for s in ("chat", "code", "web")
      ]
      assert (abs(np.array(kept) - everywhere) < 1).all()
    else:
      assert kept == wanted
  with pytest.raises(ConfigError, match="names .'book'"):
    chains.quota(ISA, "source", {"book": 1})(0, POOL, 60)
  with pytest.raises(ConfigError, match="shares 'fair'"):
    chains.quota(ISA, "source", "fair")(0, POOL, 60)


def test_quota_asks_no_sampler_where_there_is_nothing_to_choose():
  """A source of one row, for whose row there is no place, or its own."""
  pool = with_columns(
    POOL,
    source=np.where(
      np.arange(N) == 7, "lone", np.where(np.arange(N) < 100, "a", "b")
    ),
  )
  shares = {"a": 0.5, "b": 0.5}
  isa, seen = SAMPLERS["isa"], []

  @functools.wraps(isa)
  def counted(seed, pool, budget, **kwargs):
    seen.append(sorted(set(pool.source.tolist())))
    return isa(seed, pool, budget, **kwargs)

  with pytest.raises(NumericError, match="distances"):  # what it says of one
    SAMPLERS["density"](0, chains.take(pool, np.array([7])), 1)
  for name in ("isa", "density"):
    for given, wanted in (
      (shares, [30, 30, 0]),
      ("pool", [20, 40, 0]),
      ("equal", [30, 29, 1]),
    ):
      got = chains.quota(SAMPLERS[name], "source", given)(0, pool, 60)
      kept = [(pool.source[got.rows] == s).sum() for s in ("a", "b", "lone")]
      assert kept == wanted, (name, given)
      assert np.delete(got.score, got.rows).max() < got.score[got.rows].min()
      assert any(
        "quota takes all rows with source 'lone' (1)" in note
        for note in got.notes
      ) == (given == "equal")
  made = chains.quota(counted, "source", shares)
  got = made(0, pool, 60)
  assert seen == [["a"], ["b"]] and got.notes == ()
  for source in "ab":
    rows = np.flatnonzero(pool.source == source)
    wanted = rows[isa(0, chains.take(pool, rows), 30).rows]
    own = got.rows[pool.source[got.rows] == source]
    assert list(own) == list(wanted)
  # Rows that none ranked come after those that one chose.
  equal = chains.quota(isa, "source", "equal")(0, pool, 60)
  assert equal.score[7] == equal.score[equal.rows].min()
  everything = chains.quota(counted, "source")(0, pool, N)
  assert len(seen) == 2 and sorted(everything.rows) == list(range(N))


def test_a_sampler_that_fails_in_a_group_says_which():
  pool = with_columns(
    POOL,
    log_likelihood=np.where(
      (POOL.source == "web")[:, None], -3.0, POOL.log_likelihood
    ),
  )
  with pytest.raises(
    NumericError,
    match=(
      "quota by source, length, .* rows with source 'web', length [0-9.]+ to "
      "[0-9.]+: all .* log-likelihoods equal"
    ),
  ):
    chains.quota(ISA, ("source", "length"))(0, pool, 60)


def noted(*columns):
  """A sampler that says which sources it saw, and what all say."""

  @pools.needs("source", *columns)
  def sampler(seed, pool, budget):
    found = SAMPLERS["random"](seed, pool, budget)
    alone = len(set(pool.source.tolist())) == 1
    return found._replace(
      notes=("warning: it reads",) + ("warning: few", "of one")[: 2 * alone]
    )

  return sampler


def test_notes_come_through_every_step():
  for made in (
    chains.gate(noted(), "reward", 0.2),
    chains.dedup(noted(), 0.8),
    chains.diverse(noted(), 0.8),
    chains.product(noted(), SAMPLERS["random"], noted()),
  ):
    assert made(0, POOL, 40).notes == ("warning: it reads",)
  by_source = chains.quota(noted(), "source")(0, POOL, 40).notes
  assert by_source == ("warning: it reads", "warning: few", "of one")

  @pools.needs("source")
  def differs(seed, pool, budget):
    found = noted()(seed, pool, budget)
    return (
      found
      if pool.source[0] == "web"
      else found._replace(notes=found.notes[:1] + ("warning: other",))
    )

  assert chains.quota(differs, "source")(0, POOL, 40).notes == (
    "warning: it reads",
    "warning: source 'chat': other",
    "warning: source 'code': other",
    "warning: source 'web': few",
    "source 'web': of one",
  )


@pytest.mark.parametrize(
  "steps",
  [
    "gate(column=reward, low=0.2)",
    "dedup(threshold=0.99)",
    "quota(by=source)",
    "diverse(threshold=0.99)",
  ],
)
def test_what_crossfit_says_comes_through_steps(steps):
  for name in (
    f"{steps} | crossfit_lite",
    f"{steps} | crossfit_lite * crossfit_lite",
  ):
    notes = chains.named(name)(0, POOL, 40).notes  # made-up labels
    assert any(crossfit.SENTENCE in note for note in notes)
    assert any(
      note.startswith("warning: ") and "refuses these labels" in note
      for note in notes
    )
    assert len(set(notes)) == len(notes)


def test_diverse_is_deita_over_another_score():
  pool = planted()
  x = by_hand(pool)
  got = chains.diverse(SAMPLERS["ask_llm"], 0.9)(0, pool, 80)
  wanted, _ = naive_diverse(pool.p_yes[:, 0], x, 80, 0.9)
  assert list(got.rows) == wanted


def test_product_is_the_product_of_ranks():
  a = POOL.p_yes[:, 0]
  b = POOL.reward[:, 0] - POOL.reward[:, 1]
  rank = [(scipy.stats.rankdata(v) - 0.5) / N for v in (a, b)]
  got = MADE["product"](0, POOL, 60)
  assert_allclose(np.exp(got.score), rank[0] * rank[1], rtol=1e-9)
  assert set(got.rows) == set(np.argsort(-rank[0] * rank[1])[:60])
  assert MADE["product"].needs == ("p_yes", "reward") and MADE["product"].pairs
  with pytest.raises(ConfigError, match="no samplers"):
    chains.product()


def test_the_first_step_sees_the_whole_pool():
  made = chains.compose(
    SAMPLERS["random"],
    [
      Term("gate", dict(column="reward", low=0.5, side="chosen")),
      Term("gate", dict(column="p_yes", low=0.5, side="chosen")),
    ],
  )
  best = np.argsort(-POOL.reward[:, 0])[: N // 2]
  best = best[np.argsort(-POOL.p_yes[best, 0])[: N // 4]]
  assert set(made(0, POOL, N // 4).rows) == set(best)
  assert made.needs == ("p_yes", "reward")
  with pytest.raises(ConfigError, match="unknown step 'sieve'"):
    chains.compose(ISA, [Term("sieve", {})])
  with pytest.raises(ConfigError, match="takes no 'lower'"):
    chains.compose(ISA, [Term("gate", dict(column="reward", lower=0.1))])


# By name, as a config has them.


@pytest.mark.parametrize(
  "name,made",
  [
    ("isa", lambda: ISA),
    ("isa(order=magnitude)", lambda: functools.partial(ISA, order="magnitude")),
    ("gate(column=reward, low=0.2) | isa", lambda: MADE["gate"]),
    ("dedup(threshold=0.8)|random", lambda: MADE["dedup"]),
    ("quota(by=source) | length", lambda: MADE["quota"]),
    ("diverse(threshold=0.8)|ask_llm", lambda: MADE["diverse"]),
    ("ask_llm * external_margin", lambda: MADE["product"]),
    (
      "gate(column='reward', low=0.2) | dedup(threshold=0.9) | "
      "quota(by=source, shares=equal) | isa",
      lambda: MADE["all"],
    ),
    (
      "quota(by=(source,), shares={web: 3, 'chat': 1}) | random",
      lambda: chains.quota(SAMPLERS["random"], "source", {"web": 3, "chat": 1}),
    ),
    (
      "gate(column=p_yes,low=.5) | isa(order=magnitude) * length",
      lambda: chains.gate(
        chains.product(
          functools.update_wrapper(
            functools.partial(ISA, order="magnitude"), ISA
          ),
          SAMPLERS["length"],
        ),
        "p_yes",
        0.5,
      ),
    ),
  ],
)
def test_a_name_means_what_the_functions_make(name, made):
  got, wanted = chains.named(name), made()
  a, b = got(1, POOL, 40), wanted(1, POOL, 40)
  assert list(a.rows) == list(b.rows)
  assert_array_equal(a.score, b.score)
  if hasattr(wanted, "needs"):
    assert got.needs == wanted.needs


def test_knobs_reach_the_sampler_behind_the_steps():
  c = common.base()
  c.select.order = "magnitude"
  chain = chains.named("gate(column=reward) | isa")
  assert choose.sampler_kwargs(c, chain)["order"] == "magnitude"
  # What the sampler does by itself is not said twice.
  c.select.order, c.select.kwargs = "literal", dict(label_quota=0.3)
  assert choose.sampler_kwargs(c, chain) == dict(label_quota=0.3)
  c.select.order = "magnitude"
  # What the name itself binds stands.
  bound = chains.named("gate(column=reward) | isa(order=renormalised)")
  assert "order" not in choose.sampler_kwargs(c, bound)


def test_columns_that_keywords_name_are_made():
  c = common.base()
  wanted = lambda name: set(columns.wanted(c, "pairs", chains.named(name)))
  stages = lambda name: columns.stages(c, "pairs", chains.named(name))
  assert chains.named("dpp(quality=p_yes)").needs == ("embedding", "p_yes")
  assert "p_yes" not in SAMPLERS["dpp"].needs and "p_yes" not in wanted("dpp")
  for name in (
    "dpp(quality=p_yes)",
    "gate(column=length) | dpp(quality=p_yes)",
    "random * crossfit_lite(orthogonal=p_yes)",
  ):
    assert "p_yes" in wanted(name) and "ask" in stages(name)
  # Made by the select stage, where a sampler needs it.
  assert "log_likelihood" in chains.named("dpp(quality=log_likelihood)").needs
  reward = chains.named("dpp(quality=reward)")
  assert "reward" in wanted("dpp(quality=reward)")  # the world's, so it is said
  assert "true reward" in columns.notes(c, reward)[0]
  assert "reward" not in wanted("dpp") and not columns.notes(c, SAMPLERS["dpp"])
  lacking = columns.lacking(
    c, "pairs", chains.named("crossfit_lite(slices=source)")
  )
  assert lacking == {"source": "the built-in world is one source"}
  # By config.select.kwargs, of samplers that take the keyword.
  c.select.kwargs = dict(orthogonal=("p_yes", "length"), slices="source")
  assert "ask" in stages("crossfit_lite") and "p_yes" in wanted("crossfit")
  assert "p_yes" not in wanted("dpp") and "source" not in wanted("crossfit")
  assert "ask" not in stages("crossfit_lite(orthogonal=length)")
  c.select.kwargs = dict(quality="reward")
  assert "reward" in wanted("dpp") and columns.notes(c, SAMPLERS["dpp"])
  got = chains.named("dpp(quality=p_yes)")
  only = pools.Pool(POOL.ids, {k: POOL.columns[k] for k in got.needs})
  assert list(got(0, only, 20).rows) == list(
    SAMPLERS["dpp"](0, POOL, 20, quality="p_yes").rows
  )


@pytest.mark.parametrize(
  "name,words",
  [
    ("sieve(a=1) | isa", "unknown step 'sieve'"),
    ("gate(reward) | isa", "name.keyword=value."),
    ("gate(column=reward, lower=1) | isa", "takes no 'lower'"),
    ("gate(low=0.1) | isa", "column"),
    ("gate(column=__import__('os')) | isa", "name.keyword=value."),
    ("1 + 1 | isa", "name.keyword=value."),
    ("gate(column=reward) | isaa", "did you mean 'isa'"),
    ("dedup | ", "cannot be read"),
    ("ask_llm * nothing", "unknown sampler 'nothing'"),
    ("gate(column=reward, low=2) | isa", "two quantiles"),
  ],
)
def test_a_wrong_chain_says_where(name, words):
  with pytest.raises(ConfigError, match=words) as error:
    chains.named(name, "compare")
  assert "config.compare" in str(error.value)


def test_a_chain_has_a_folder_of_its_own():
  arm = Arm("dedup(threshold=0.9) | quota(by='source') | a:b * isa", 0.1, 0)
  assert arm.name == (
    "dedup(threshold=0.9)-then-quota(by=source)-then-a.b-x-isa-0.1-seed0"
  )
