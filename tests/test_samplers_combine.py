"""Samplers made of samplers: gate, dedup, quota, diverse, product, by name."""

import functools
import inspect

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pools as make_pools
from pools import planted, vectors_of, with_columns
import pytest
import scipy.stats
from test_samplers_sets import naive_diverse

from configs import common
from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.model.job import Arm
from jaxalign.select import choose, columns
from jaxalign.select.pool import make_pool, needs, Pool
from jaxalign.select.samplers import chains, crossfit, dedup, SAMPLERS

N = 300
POOL = make_pools.make(2, N)
UNPAIRED = make_pools.make(1, N)
ISA, RANDOM = SAMPLERS["isa"], SAMPLERS["random"]
MADE = {
  "gate": chains.gate(ISA, "reward", 0.2),
  "dedup": chains.dedup(RANDOM, 0.8),
  "quota": chains.quota(SAMPLERS["length"], "source"),
  "diverse": chains.diverse(SAMPLERS["ask_llm"], 0.8),
  "product": chains.product(SAMPLERS["ask_llm"], SAMPLERS["external_margin"]),
  "all": chains.gate(
    chains.dedup(chains.quota(ISA, "source", "equal"), 0.9), "reward", 0.2
  ),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_keeps_the_contract(name):
  sampler = MADE[name]
  parameters = list(inspect.signature(sampler).parameters)
  assert parameters[:3] == ["seed", "pool", "budget"]
  only = Pool(POOL.ids, {k: POOL.columns[k] for k in sampler.needs})
  got = sampler(2, only, 60)
  assert got.rows.dtype == np.int64 and len(set(got.rows.tolist())) == 60
  assert np.isfinite(got.score).all()
  assert (np.diff(got.score[got.rows]) <= 0).all()
  assert np.delete(got.score, got.rows).max() <= got.score[got.rows].min()
  order = np.random.default_rng(1).permutation(N)
  turned = {k: v[order] for k, v in only.columns.items()}
  again = sampler(2, make_pool(only.ids[order], turned), 60)
  assert list(again.rows) == list(got.rows)
  assert len(sampler(2, only, 1).rows) == 1


def test_gate_takes_the_inner_selection_from_what_passes():
  worst = POOL.reward.min(axis=1)
  inside = scipy.stats.rankdata(worst) > 0.2 * N + 0.5
  got = MADE["gate"](0, POOL, 50)
  rows = np.flatnonzero(inside)
  wanted = rows[ISA(0, chains.take(POOL, rows), 50).rows]
  assert list(got.rows) == list(wanted) and inside[got.rows].all()
  # The keywords of the inner sampler go through.
  other = MADE["gate"](0, POOL, 50, order="magnitude")
  assert set(other.rows) != set(got.rows) and inside[other.rows].all()
  with pytest.raises(ConfigError, match="leaves 240 of 300.*wants 241"):
    MADE["gate"](0, POOL, 241)
  with pytest.raises(ConfigError, match="from 0.5 to 0.2"):
    chains.gate(ISA, "reward", 0.5, 0.2)


def test_the_first_step_sees_the_whole_pool():
  step = "gate(column={}, low=.5, side=chosen)".format
  made = chains.find_sampler(f"{step('reward')} | {step('p_yes')} | random")
  best = np.argsort(-POOL.reward[:, 0])[: N // 2]
  best = best[np.argsort(-POOL.p_yes[best, 0])[: N // 4]]
  assert set(made(0, POOL, N // 4).rows) == set(best)
  assert made.needs == ("p_yes", "reward")


def test_dedup_drops_one_of_each_planted_two():
  pool = planted()
  n = len(pool.ids)
  sampler = chains.dedup(RANDOM, 0.95, clusters=1)
  x = np.float32(vectors_of(pool))
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
  for share in (0.5, 0.25):
    made = chains.quota(ISA, "label", {True: share, False: 1 - share})
    own = ISA(0, UNPAIRED, 80, label_quota=share)
    assert set(made(0, UNPAIRED, 80).rows) == set(own.rows)
  with pytest.raises(ConfigError, match="160 rows of label True, .* has 8"):
    chains.quota(ISA, "label", {True: 1.0})(0, UNPAIRED, 160)


def counts(pool, rows, sources):
  return [int((pool.source[rows] == s).sum()) for s in sources]


def test_quota_counts_by_hand():
  sources = ("chat", "code", "web")
  quota = lambda shares: chains.quota(RANDOM, "source", shares)(0, POOL, 60)
  assert counts(POOL, quota("equal").rows, sources) == [20, 20, 20]
  shares = {"web": 3, "chat": 1}
  assert counts(POOL, quota(shares).rows, sources) == [15, 0, 45]
  whole = np.array(counts(POOL, np.arange(N), sources))
  assert (abs(counts(POOL, quota("pool").rows, sources) - whole / 5) < 1).all()
  for shares, match in (({"book": 1}, "names .'book'"), ("fair", "'fair'")):
    with pytest.raises(ConfigError, match=match):
      quota(shares)


def test_quota_runs_no_sampler_where_there_is_nothing_to_choose():
  """A source of one row, for whose row there is no place, or its own."""
  rank = np.arange(N)
  source = np.where(rank < 100, "a", "b").astype("<U4")
  source[7] = "lone"
  pool = with_columns(POOL, source=source)
  shares, seen = {"a": 0.5, "b": 0.5}, []

  @functools.wraps(ISA)
  def counted(seed, pool, budget, **kwargs):
    seen.append(sorted(set(pool.source.tolist())))
    return ISA(seed, pool, budget, **kwargs)

  with pytest.raises(NumericError, match="distances"):  # of one row alone
    SAMPLERS["density"](0, chains.take(pool, np.array([7])), 1)
  note = "quota takes all rows with source 'lone' (1)"
  for name in ("isa", "density"):
    for given, wanted in (
      (shares, [30, 30, 0]),
      ("pool", [20, 40, 0]),
      ("equal", [30, 29, 1]),
    ):
      got = chains.quota(SAMPLERS[name], "source", given)(0, pool, 60)
      assert counts(pool, got.rows, ("a", "b", "lone")) == wanted, (name, given)
      assert np.delete(got.score, got.rows).max() < got.score[got.rows].min()
      assert any(note in line for line in got.notes) == (given == "equal")
  got = chains.quota(counted, "source", shares)(0, pool, 60)
  assert seen == [["a"], ["b"]] and got.notes == ()
  for name in "ab":
    rows = np.flatnonzero(source == name)
    wanted = rows[ISA(0, chains.take(pool, rows), 30).rows]
    assert list(got.rows[source[got.rows] == name]) == list(wanted)
  # Rows that none ranked come after those that one chose.
  equal = chains.quota(ISA, "source", "equal")(0, pool, 60)
  assert equal.score[7] == equal.score[equal.rows].min()
  everything = chains.quota(counted, "source")(0, pool, N)
  assert len(seen) == 2 and sorted(everything.rows) == list(range(N))


def test_a_sampler_that_fails_in_a_group_says_which():
  web = (POOL.source == "web")[:, None]
  value = np.where(web, -3.0, POOL.log_likelihood)
  match = (
    "quota by source, length, .* rows with source 'web', length [0-9.]+ to "
    "[0-9.]+: all .* log-likelihoods equal"
  )
  with pytest.raises(NumericError, match=match):
    pool = with_columns(POOL, log_likelihood=value)
    chains.quota(ISA, ("source", "length"))(0, pool, 60)


@needs("source")
def noted(seed, pool, budget):
  """Notes for all, and more where it sees one source alone."""
  notes = ("warning: it reads",)
  if len(set(pool.source.tolist())) == 1:
    web = pool.source[0] == "web"
    notes += ("of one", "warning: few" if web else "warning: other")
  return RANDOM(seed, pool, budget)._replace(notes=notes)


def test_notes_come_through_every_step():
  for made in (
    chains.gate(noted, "reward", 0.2),
    chains.dedup(noted, 0.8),
    chains.diverse(noted, 0.8),
    chains.product(noted, RANDOM, noted),
  ):
    assert made(0, POOL, 40).notes == ("warning: it reads",)
  assert chains.quota(noted, "source")(0, POOL, 40).notes == (
    "warning: it reads",
    "of one",
    "warning: source 'chat': other",
    "warning: source 'code': other",
    "warning: source 'web': few",
  )


@pytest.mark.parametrize(
  "step",
  [
    "gate(column=reward, low=0.2)",
    "dedup(threshold=0.99)",
    "quota(by=source)",
    "diverse(threshold=0.99)",
  ],
)
def test_the_notes_of_crossfit_come_through_steps(step):
  for name in ("crossfit_lite", "crossfit_lite * crossfit_lite"):
    sampler = chains.find_sampler(f"{step} | {name}")
    notes = sampler(0, POOL, 40).notes  # made-up labels
    assert any(crossfit.SENTENCE in note for note in notes)
    warnings = [note for note in notes if note.startswith("warning: ")]
    assert any("refuses these labels" in note for note in warnings)
    assert len(set(notes)) == len(notes)


def test_diverse_is_deita_over_another_score():
  pool = planted()
  got = chains.diverse(SAMPLERS["ask_llm"], 0.9)(0, pool, 80)
  wanted, _ = naive_diverse(pool.p_yes[:, 0], vectors_of(pool), 80, 0.9)
  assert list(got.rows) == wanted


def test_product_is_the_product_of_ranks():
  made = MADE["product"]
  margin = POOL.reward[:, 0] - POOL.reward[:, 1]
  rank = lambda value: (scipy.stats.rankdata(value) - 0.5) / N
  wanted = rank(POOL.p_yes[:, 0]) * rank(margin)
  got = made(0, POOL, 60)
  assert_allclose(np.exp(got.score), wanted, rtol=1e-9)
  assert set(got.rows) == set(np.argsort(-wanted)[:60])
  assert made.needs == ("p_yes", "reward") and made.pairs
  with pytest.raises(ConfigError, match="no samplers"):
    chains.product()


@functools.wraps(ISA)
def dense(seed, pool, budget):
  return ISA(seed, pool, budget, order="magnitude")


@pytest.mark.parametrize(
  "name,made",
  [
    ("isa", ISA),
    ("isa(order=magnitude)", dense),
    ("gate(column=reward, low=0.2) | isa", MADE["gate"]),
    ("dedup(threshold=0.8)|random", MADE["dedup"]),
    ("quota(by=source) | length", MADE["quota"]),
    ("diverse(threshold=0.8)|ask_llm", MADE["diverse"]),
    ("ask_llm * external_margin", MADE["product"]),
    (
      "gate(column='reward', low=0.2) | dedup(threshold=0.9) | "
      "quota(by=source, shares=equal) | isa",
      MADE["all"],
    ),
    (
      "quota(by=(source,), shares={web: 3, 'chat': 1}) | random",
      chains.quota(RANDOM, "source", {"web": 3, "chat": 1}),
    ),
    (
      "gate(column=p_yes,low=.5) | isa(order=magnitude) * length",
      chains.gate(chains.product(dense, SAMPLERS["length"]), "p_yes", 0.5),
    ),
  ],
)
def test_a_name_means_what_the_functions_make(name, made):
  got = chains.find_sampler(name)
  a, b = got(1, POOL, 40), made(1, POOL, 40)
  assert list(a.rows) == list(b.rows)
  assert_array_equal(a.score, b.score)
  assert got.needs == made.needs


def test_knobs_reach_the_sampler_behind_the_steps():
  c = common.base()
  kwargs = lambda name: choose.sampler_kwargs(c, chains.find_sampler(name))
  chain = "gate(column=reward) | isa"
  c.select.order = "magnitude"
  assert kwargs(chain)["order"] == "magnitude"
  # What the name itself binds stands.
  assert "order" not in kwargs("gate(column=reward) | isa(order=renormalised)")
  # A keyword that is the sampler's default is left out.
  c.select.order, c.select.kwargs = "literal", dict(label_quota=0.3)
  assert kwargs(chain) == dict(label_quota=0.3)


def test_columns_that_keywords_name_are_made():
  c = common.base()
  find = chains.find_sampler
  wanted = lambda name: set(columns.wanted(c, "pairs", find(name)))
  stages = lambda name: columns.stages(c, "pairs", find(name))
  got = find("dpp(quality=p_yes)")
  assert got.needs == ("embedding", "p_yes")
  only = Pool(POOL.ids, {k: POOL.columns[k] for k in got.needs})
  own = SAMPLERS["dpp"](0, POOL, 20, quality="p_yes")
  assert list(got(0, only, 20).rows) == list(own.rows)
  assert "p_yes" not in SAMPLERS["dpp"].needs and "p_yes" not in wanted("dpp")
  for name in (
    "dpp(quality=p_yes)",
    "gate(column=length) | dpp(quality=p_yes)",
    "random * crossfit_lite(orthogonal=p_yes)",
  ):
    assert "p_yes" in wanted(name) and "ask" in stages(name)
  # Made by the select stage, where a sampler needs it.
  assert "log_likelihood" in find("dpp(quality=log_likelihood)").needs
  assert "reward" in wanted("dpp(quality=reward)")
  note = columns.notes(c, find("dpp(quality=reward)"))[0]
  assert "true reward" in note  # the world's, so there is a note
  assert "reward" not in wanted("dpp") and not columns.notes(c, SAMPLERS["dpp"])
  lacking = columns.lacking(c, "pairs", find("crossfit_lite(slices=source)"))
  assert lacking == {"source": "the built-in world is one source"}
  # By config.select.kwargs, of samplers that take the keyword.
  c.select.kwargs = dict(orthogonal=("p_yes", "length"), slices="source")
  assert "ask" in stages("crossfit_lite") and "p_yes" in wanted("crossfit")
  assert "p_yes" not in wanted("dpp") and "source" not in wanted("crossfit")
  assert "ask" not in stages("crossfit_lite(orthogonal=length)")
  c.select.kwargs = dict(quality="reward")
  assert "reward" in wanted("dpp") and columns.notes(c, SAMPLERS["dpp"])


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
    chains.find_sampler(name, "compare")
  assert "config.compare" in str(error.value)


def test_a_chain_has_a_folder_of_its_own():
  arm = Arm("dedup(threshold=0.9) | quota(by='source') | a:b * isa", 0.1, 0)
  assert arm.name == (
    "dedup(threshold=0.9)-then-quota(by=source)-then-a.b-x-isa-0.1-seed0"
  )
