"""Samplers made of samplers: gate, dedup, quota, diverse, product, compose."""

import functools
import inspect

import numpy as np
import pytest
import scipy.stats

from configs import common
from jaxalign import job
from jaxalign.errors import ConfigError
from jaxalign.select import pool as pools
from jaxalign.select.samplers import SAMPLERS, combine, dedup
import pools as make_pools
from test_samplers_geometric import by_hand
from test_samplers_sets import naive_diverse, planted

N = 300
POOL = make_pools.make(2, N)
THUMBS = make_pools.make(1, N)
ISA = SAMPLERS["isa"]
MADE = {
    "gate": combine.gate(ISA, "reward", 0.2),
    "dedup": combine.dedup(SAMPLERS["random"], 0.8),
    "quota": combine.quota(SAMPLERS["length"], "source"),
    "diverse": combine.diverse(SAMPLERS["ask_llm"], 0.8),
    "product": combine.product(SAMPLERS["ask_llm"],
                               SAMPLERS["external_margin"]),
    "all": combine.compose(ISA, [
        dict(name="gate", column="reward", low=0.2),
        dict(name="dedup", threshold=0.9),
        dict(name="quota", by="source", shares="equal")]),
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
  again = sampler(2, pools.make_pool(
      only.ids[order], {k: v[order] for k, v in only.columns.items()}), 60)
  assert list(again.rows) == list(got.rows)
  assert len(sampler(2, only, 1).rows) == 1


def test_gate_takes_the_inner_choice_from_what_passes():
  worst = POOL.reward.min(axis=1)
  inside = scipy.stats.rankdata(worst) > 0.2 * N + 0.5
  got = MADE["gate"](0, POOL, 50)
  part = np.flatnonzero(inside)
  wanted = part[ISA(0, combine.take(POOL, part), 50).rows]
  assert list(got.rows) == list(wanted) and inside[got.rows].all()
  # The keywords of the inner sampler go through.
  other = MADE["gate"](0, POOL, 50, order="magnitude")
  assert set(other.rows) != set(got.rows) and inside[other.rows].all()
  with pytest.raises(ConfigError, match="leaves 240 of 300.*wants 241"):
    MADE["gate"](0, POOL, 241)
  with pytest.raises(ConfigError, match="from 0.5 to 0.2"):
    combine.gate(ISA, "reward", 0.5, 0.2)


def test_dedup_drops_one_of_each_planted_two():
  pool = planted()
  n = len(pool.ids)
  sampler = combine.dedup(SAMPLERS["random"], 0.95, clusters=1)
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
    combine.dedup(ISA, 1.0)


def test_quota_by_label_is_the_quota_of_isa():
  """`isa` has a label quota of its own; the combinator gives the same rows."""

  for share, quota in ((0.5, 0.5), (0.25, 0.25)):
    made = combine.quota(ISA, "label", {True: share, False: 1 - share})
    got = made(0, THUMBS, 80)
    own = ISA(0, THUMBS, 80, label_quota=quota)
    assert set(got.rows) == set(own.rows)
  with pytest.raises(ConfigError, match="160 rows of label True, .* has 8"):
    combine.quota(ISA, "label", {True: 1.0})(0, THUMBS, 160)


def test_quota_counts_by_hand():
  for shares, wanted in (("equal", [20, 20, 20]), ("pool", None),
                         ({"web": 3, "chat": 1}, [15, 0, 45])):
    got = combine.quota(SAMPLERS["random"], "source", shares)(0, POOL, 60)
    source = POOL.source[got.rows]
    kept = [(source == s).sum() for s in ("chat", "code", "web")]
    if wanted is None:
      everywhere = [(POOL.source == s).sum() / 5
                    for s in ("chat", "code", "web")]
      assert (abs(np.array(kept) - everywhere) < 1).all()
    else:
      assert kept == wanted
  with pytest.raises(ConfigError, match="names .'book'"):
    combine.quota(ISA, "source", {"book": 1})(0, POOL, 60)
  with pytest.raises(ConfigError, match="shares 'fair'"):
    combine.quota(ISA, "source", "fair")(0, POOL, 60)


def test_diverse_is_deita_over_another_score():
  pool = planted()
  x = by_hand(pool)
  got = combine.diverse(SAMPLERS["ask_llm"], 0.9)(0, pool, 80)
  wanted, _ = naive_diverse(pool.p_yes[:, 0], x, 80, 0.9)
  assert list(got.rows) == wanted


def test_product_is_the_product_of_ranks():
  a = POOL.p_yes[:, 0]
  b = POOL.reward[:, 0] - POOL.reward[:, 1]
  rank = [(scipy.stats.rankdata(v) - 0.5) / N for v in (a, b)]
  got = MADE["product"](0, POOL, 60)
  np.testing.assert_allclose(np.exp(got.score), rank[0] * rank[1], rtol=1e-9)
  assert set(got.rows) == set(np.argsort(-rank[0] * rank[1])[:60])
  assert MADE["product"].needs == ("p_yes", "reward") and MADE["product"].pairs
  with pytest.raises(ConfigError, match="no samplers"):
    combine.product()


def test_the_first_step_sees_the_whole_pool():
  made = combine.compose(SAMPLERS["random"], [
      dict(name="gate", column="reward", low=0.5, side="chosen"),
      dict(name="gate", column="p_yes", low=0.5, side="chosen")])
  best = np.argsort(-POOL.reward[:, 0])[:N // 2]
  best = best[np.argsort(-POOL.p_yes[best, 0])[:N // 4]]
  assert set(made(0, POOL, N // 4).rows) == set(best)
  assert made.needs == ("p_yes", "reward")
  with pytest.raises(ConfigError, match="unknown step 'sieve'"):
    combine.compose(ISA, [dict(name="sieve")])
  with pytest.raises(ConfigError, match="takes no 'lower'"):
    combine.compose(ISA, [dict(name="gate", column="reward", lower=0.1)])


# By name, as a config has them.


@pytest.mark.parametrize("name,made", [
    ("isa", lambda: ISA),
    ("isa(order=magnitude)", lambda: functools.partial(
        ISA, order="magnitude")),
    ("gate(column=reward, low=0.2) | isa", lambda: MADE["gate"]),
    ("dedup(threshold=0.8)|random", lambda: MADE["dedup"]),
    ("quota(by=source) | length", lambda: MADE["quota"]),
    ("diverse(threshold=0.8)|ask_llm", lambda: MADE["diverse"]),
    ("ask_llm * external_margin", lambda: MADE["product"]),
    ("gate(column='reward', low=0.2) | dedup(threshold=0.9) | "
     "quota(by=source, shares=equal) | isa", lambda: MADE["all"]),
    ("quota(by=(source,), shares={web: 3, 'chat': 1}) | random",
     lambda: combine.quota(SAMPLERS["random"], "source",
                           {"web": 3, "chat": 1})),
    ("gate(column=p_yes,low=.5) | isa(order=magnitude) * length",
     lambda: combine.gate(combine.product(functools.update_wrapper(
         functools.partial(ISA, order="magnitude"), ISA),
         SAMPLERS["length"]), "p_yes", 0.5))])
def test_a_name_means_what_the_functions_make(name, made):
  got, wanted = combine.named(name), made()
  a, b = got(1, POOL, 40), wanted(1, POOL, 40)
  assert list(a.rows) == list(b.rows)
  np.testing.assert_array_equal(a.score, b.score)
  if hasattr(wanted, "needs"):
    assert got.needs == wanted.needs


def test_knobs_reach_the_sampler_behind_the_steps():
  c = common.base()
  c.select.order = "magnitude"
  chain = combine.named("gate(column=reward) | isa")
  assert job.sampler_kwargs(c, chain)["order"] == "magnitude"
  # What the name itself binds stands.
  bound = combine.named("gate(column=reward) | isa(order=renormalised)")
  assert "order" not in job.sampler_kwargs(c, bound)


@pytest.mark.parametrize("name,words", [
    ("sieve(a=1) | isa", "unknown step 'sieve'"),
    ("gate(reward) | isa", "name.keyword=value."),
    ("gate(column=reward, lower=1) | isa", "takes no 'lower'"),
    ("gate(low=0.1) | isa", "column"),
    ("gate(column=__import__('os')) | isa", "name.keyword=value."),
    ("1 + 1 | isa", "name.keyword=value."),
    ("gate(column=reward) | is", "did you mean 'isa'"),
    ("dedup | ", "unknown sampler ''"),
    ("ask_llm * nothing", "unknown sampler 'nothing'"),
    ("gate(column=reward, low=2) | isa", "two quantiles")])
def test_a_wrong_chain_says_where(name, words):
  with pytest.raises(ConfigError, match=words) as error:
    combine.named(name, "compare")
  assert "config.compare" in str(error.value)


def test_a_chain_has_a_folder_of_its_own():
  arm = job.Arm("dedup(threshold=0.9) | quota(by='source') | a:b * isa", 0.1, 0)
  assert arm.name == (
      "dedup(threshold=0.9)-then-quota(by=source)-then-a.b-x-isa-0.1-seed0")
