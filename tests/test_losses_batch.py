"""What losses take from the whole batch, and sums of losses by name."""

from flat import matched as matched_by
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import (
  as_logps,
  BETA,
  example,
  gap,
  inputs,
  ls,
  ORACLES,
  smoothed,
)

from jaxalign.core.errors import ConfigError, DataError
from jaxalign.core.lookup import keywords
from jaxalign.train import losses, statistics
from jaxalign.train.logps import common_prefix_sums
from jaxalign.train.losses import combine, find, LOSSES, unpaired
from jaxalign.train.losses.common import marks
from jaxalign.train.row_columns import density_ratios

pytestmark = pytest.mark.usefixtures("quick_compiles")


def pairs(rows=24, spread=8.0):
  rng = np.random.default_rng(5)
  p = rng.normal(-60, 15, (rows, 2))
  return p, p + rng.normal(0, spread, (rows, 2))


# Optimal transport: Melnyk et al. 2024.


def sorted_aot(p, q, beta=0.1, eps=0.0):
  """The mean over ranks of the margins, policy and reference sorted apart."""
  return np.mean(smoothed(beta * (np.sort(gap(p)) - np.sort(gap(q))), eps))


def sorted_aot_unpaired(p, q, beta=0.1, eps=0.0):
  """The mean over ranks of r, chosen and rejected sorted apart."""
  return np.mean(smoothed(beta * gap(np.sort(p - q, axis=0)), eps))


AOT = {
  "aot": (sorted_aot, "matched_margins"),
  "aot_unpaired": (sorted_aot_unpaired, "matched_ratios"),
}


@pytest.mark.parametrize("name", AOT)
@pytest.mark.parametrize(
  "kwargs", [{}, dict(beta=0.4, label_smoothing=0.2)], ids=["defaults", "given"]
)
def test_aot_is_the_sorted_loss_over_any_cut(name, kwargs):
  """Its mean, and the mean's slope by every policy sum; rows as micro-batches
  of 10 and 14 add up to the same."""
  (oracle, stat), (p, q) = AOT[name], pairs()
  n, eps = len(p), kwargs.get("label_smoothing", 0.0)
  of = lambda p: oracle(p, q, kwargs.get("beta", 0.1), eps)
  wanted = np.zeros_like(p)
  for at in np.ndindex(*p.shape):
    step = np.zeros_like(p)
    step[at] = 1e-5
    wanted[at] = (of(p + step) - of(p - step)) / 2e-5
  with jax.enable_x64(True):
    matched = matched_by(stat, jnp.asarray(p), jnp.asarray(q))

    def part(sums, rows):
      loss, _ = LOSSES[name](
        as_logps(sums[rows]), as_logps(q[rows]), {stat: matched[rows]}, **kwargs
      )
      return jnp.sum(loss) / n

    for cut in ((slice(0, n),), (slice(0, 10), slice(10, n))):
      values, grads = zip(
        *(jax.value_and_grad(part)(jnp.asarray(p), rows) for rows in cut)
      )
      np.testing.assert_allclose(sum(values), of(p), rtol=1e-12)
      np.testing.assert_allclose(sum(grads), wanted, rtol=1e-6, atol=1e-10)


def test_aot_of_a_row_is_the_one_at_its_rank():
  """Margins 5, 1, 3 and the reference's 2, 9, 4: by rank 9, 2, 4."""
  p = np.array([[-1.0, -6.0], [-1.0, -2.0], [-1.0, -4.0]])
  q = np.array([[-1.0, -3.0], [-1.0, -10.0], [-1.0, -5.0]])
  matched = matched_by("matched_margins", jnp.asarray(p), jnp.asarray(q))
  np.testing.assert_array_equal(matched, [9.0, 2.0, 4.0])
  loss, _ = LOSSES["aot"](
    as_logps(p), as_logps(q), dict(matched_margins=matched), beta=1.0
  )
  np.testing.assert_allclose(loss, -ls([-4.0, -1.0, -1.0]), rtol=1e-6)
  # r: chosen 0, 0, 0; rejected -3, 8, 1. Each side's value of the same rank.
  matched = matched_by("matched_ratios", jnp.asarray(p), jnp.asarray(q))
  np.testing.assert_array_equal(matched, [[-3, 0], [1, 0], [8, 0]])


def test_ranks_give_ties_to_the_row_that_comes_first():
  ranks = statistics.ranks(jnp.float32([2.0, 1.0, 2.0, 0.0]))
  np.testing.assert_array_equal(ranks, [2, 1, 3, 0])


def test_micro_batches_sorted_alone_would_differ():
  """TRL's way: the reason that the statistics are over the global batch."""
  p, q = pairs()
  for oracle in (sorted_aot, sorted_aot_unpaired):
    halves = (oracle(p[:12], q[:12]) + oracle(p[12:], q[12:])) / 2
    assert abs(halves - oracle(p, q)) > 1e-3


# BCO's delta.


def test_delta_is_the_mean_of_every_reward_so_far():
  rng = np.random.default_rng(0)
  rewards = rng.normal(3, 2, 70)
  with jax.enable_x64(True):
    for cuts in ((70,), (1, 30, 70), (64, 66, 70)):
      delta, start = statistics.init_mean(), 0
      assert delta.mean == 0
      for end in cuts:
        delta = statistics.update_mean(delta, jnp.asarray(rewards[start:end]))
        np.testing.assert_allclose(delta.mean, rewards[:end].mean(), rtol=1e-12)
        start = end
      assert delta.count == 70
  of = lambda x: statistics.update_mean(statistics.init_mean(), x)
  pairs_too = jnp.float32([[1.0, 2.0], [4.0, 5.0]])
  assert (of(pairs_too).mean, of(pairs_too).count) == (3.0, 4.0)
  assert (jax.grad(lambda x: of(x).mean)(pairs_too) == 0).all()


# BCO's underlying distribution matching.


def prompts(rows=300, width=6, shift=0.7):
  rng = np.random.default_rng(3)
  label = rng.random(rows) < 0.3
  return rng.normal(0, 1, (rows, width)) + shift * label[:, None], label


def test_density_ratios_are_scikit_learn_s():
  linear = pytest.importorskip("sklearn.linear_model")
  x, label = prompts()
  ours = density_ratios(x, label)
  theirs = linear.LogisticRegression(
    class_weight="balanced", tol=1e-10, max_iter=5000
  ).fit(x, label)
  p = theirs.predict_proba(x)[:, 1]
  wanted = np.where(label, 1.0, np.clip(p / (1 - p + 1e-8), 0.5, 10.0))
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours, wanted, rtol=1e-4)
  rest = ours[~label]
  assert (rest == 0.5).any() and (rest == 10.0).any()  # both ends are met
  assert ((rest > 0.5) & (rest < 10.0)).sum() > 50


def test_density_ratios_take_a_sample_of_each_class():
  x, label = prompts(2000)
  whole = density_ratios(x, label, sample=10000)
  some = density_ratios(x, label, sample=400, seed=1)
  again = density_ratios(x, label, sample=400, seed=1)
  other = density_ratios(x, label, sample=400, seed=2)
  np.testing.assert_array_equal(some, again)
  assert (some != other).any() and (some != whole).any()
  inner = (whole > 0.5) & (whole < 10) & (some > 0.5) & (some < 10) & ~label
  assert np.abs(np.log(some / whole)[inner]).mean() < 0.4


def test_prompts_of_one_distribution_weigh_one():
  x, label = prompts(4000, shift=0.0)
  rest = density_ratios(x, label, sample=4000)[~label]
  assert abs(rest.mean() - 1) < 0.05


@pytest.mark.parametrize(
  "x,label,words",
  [
    (np.ones((4, 2)), np.ones(4, bool), "all 4 rows"),
    (np.ones((4, 2)), np.zeros(4, bool), "all 4 rows"),
    (np.full((4, 2), np.nan), np.arange(4) < 2, "NaN"),
  ],
)
def test_density_ratios_refuse(x, label, words):
  with pytest.raises(DataError, match=words):
    density_ratios(x, label)


# LD-DPO's sums of common prefixes.


def test_common_prefix_sums_are_over_the_shorter_answer_s_length():
  """Responses of 3 and 2 tokens, then of 1 and 4, after prompts."""
  each = np.float32(
    [
      [[9, 9, 1, 2, 4, 9], [9, 8, 16, 9, 9, 9]],
      [[9, 32, 9, 9, 9, 9], [9, 1, 2, 4, 8, 9]],
    ]
  )
  mask = np.int32(
    [
      [[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]],
      [[0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]],
    ]
  )
  np.testing.assert_array_equal(
    common_prefix_sums(jnp.asarray(each), jnp.asarray(mask)), [[3, 24], [32, 1]]
  )


def test_ld_dpo_between_its_ends_is_dpo_and_its_common_prefix():
  policy, ref, _ = inputs(example(2), jnp.float32)
  value = lambda name, *of, **more: LOSSES[name](*of, {}, **more)[0]
  short = [x.replace(sum=x.common_prefix) for x in (policy, ref)]
  for weight, pair in ((1.0, (policy, ref)), (0.0, short)):
    got = value("ld_dpo", policy, ref, tail_weight=weight)
    np.testing.assert_allclose(got, value("dpo", *pair), rtol=2e-5)


# Weighted sums by name.


SUMS = {  # name: (keywords of the config, (weight, loss, its keywords) ...)
  "dpo + 0.2*sft": (BETA, (1, "dpo", BETA), (0.2, "sft", {})),
  # MPO; its rewards are those of the first term.
  "0.8*ld_dpo+0.2*bco_pair+1e-2*sft_tokens": (
    dict(beta=0.3, tail_weight=0.1),
    (0.8, "ld_dpo", dict(beta=0.3, tail_weight=0.1)),
    (0.2, "bco_pair", BETA),
    (0.01, "sft_tokens", {}),
  ),
  # A keyword that is not given keeps each term's default.
  "simpo+dpo": ({}, (1, "simpo", {}), (1, "dpo", {})),
  "0.5*dpo(beta=0.3, label_smoothing=0.1) + ipo(beta=1e+0)": (
    {},
    (0.5, "dpo", dict(beta=0.3, label_smoothing=0.1)),
    (1, "ipo", dict(beta=1.0)),
  ),
  # What the config gives to all terms goes over what stands in brackets.
  "0.5*dpo(beta=0.3, label_smoothing=0.1)+ipo(beta=1)": (
    dict(beta=0.2),
    (0.5, "dpo", dict(beta=0.2, label_smoothing=0.1)),
    (1, "ipo", dict(beta=0.2)),
  ),
  "dpo(beta=0.7)": ({}, (1, "dpo", dict(beta=0.7))),
  "dpo": (dict(label_smoothing=0), (1, "dpo", {})),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_its_terms(name):
  kwargs, *terms = SUMS[name]
  policy, ref, stats = inputs(example(2), jnp.float32)
  loss, metrics = losses.bind(find(name), name, kwargs)(policy, ref, stats)
  total, prefers, wanted = 0.0, 0.0, {}
  for weight, n, more in terms:
    value, own = LOSSES[n](policy, ref, stats, **more)
    total += weight * value
    prefers += weight * value * (LOSSES[n].kind == "pairs")
    wanted = own | wanted | ({f"loss/{n}": value} if len(terms) > 1 else {})
  if {LOSSES[n].kind for _, n, _ in terms} == {"pairs", "rows"}:
    wanted["preference_loss"] = prefers  # else it is the loss
  np.testing.assert_allclose(loss, total, rtol=1e-6)
  assert set(metrics) == set(wanted)
  for n, x in wanted.items():
    np.testing.assert_allclose(metrics[n], x, rtol=1e-6, err_msg=n)


def test_a_sum_declares_all_that_its_terms_need():
  of = lambda name: marks(find(name))
  assert of("0.8*ld_dpo+0.2*bco_pair+1e-2*sft_tokens") == dict(
    kind="pairs",
    stats=("delta", "mean_count"),
    extras=("common_prefix",),
    reference=True,
  )
  assert not of("cpo+sft")["reference"]
  assert of("2*sft+sft_tokens")["kind"] == "rows"
  assert of("2*kto")["kind"] == "unpaired"
  known = keywords(find("0.8*ld_dpo+0.2*bco_pair"))
  defaults = {n: p.default for n, p in known.items()}
  assert defaults == dict(beta=0.1, tail_weight=0.5)


def test_a_name_alone_is_the_table_s_function():
  assert find("exo") is LOSSES["exo"]
  assert find("1*exo") is LOSSES["exo"]
  path = "jaxalign.train.losses.pair:nca"
  assert find(path) is LOSSES["nca"]
  assert find(f"0.5*{path}+sft").kind == "pairs"


@pytest.mark.parametrize(
  "up,down,wanted",
  [
    (10, 10, (1, 1)),
    (12, 9, (1, 1)),
    (8, 10, (1.25, 1)),
    (20, 10, (1, 1.5)),
    (1, 9, (9, 1)),
    (0, 5, (1, 1)),
    (5, 0, (1, 1)),
  ],
)
def test_classes_weigh_by_the_rows_that_are_kept(up, down, wanted):
  """desirable * n_up / (undesirable * n_down) is within [1, 4/3]."""
  assert unpaired.class_weights(up, down) == pytest.approx(wanted)
  label = np.arange(up + down) < up
  kto = losses.bind(LOSSES["kto"], "kto", dict(beta=0.5))
  loss, text = unpaired.with_class_weights(kto, label)
  x, named = example(1), dict(zip(("desirable", "undesirable"), wanted))
  got, _ = loss(*inputs(x, jnp.float32))
  oracle = ORACLES["kto"](x, beta=0.5, **named)
  np.testing.assert_allclose(got, oracle, rtol=1e-5)
  assert bool(text) == (tuple(wanted) != (1, 1))
  assert marks(loss) == marks(kto)


def test_given_weights_of_classes_stay_and_are_judged():
  label = np.arange(30) < 20
  for name, kwargs, warned in (
    ("kto(desirable=1)", {}, True),
    ("kto", dict(undesirable=1.5), False),
    ("0.5*apo_zero_unpaired(undesirable=3)", {}, True),
    ("bco", {}, False),
  ):
    loss = losses.bind(find(name), name, kwargs)
    found, text = unpaired.with_class_weights(loss, label)
    assert found is loss and bool(text) == warned
  loss = losses.bind(find("kto(undesirable=3)"), "", {})
  _, text = unpaired.with_class_weights(loss, label)
  assert "20 liked answers and 10 disliked weigh 0.67 to 1" in text


@pytest.mark.parametrize(
  "name,words",
  [
    ("dpo(beta=-1)+sft", "beta=-1"),
    ("kto(desirable=much)", "desirable='much'"),
    ("dpo(bta=1)", "takes no 'bta'"),
    ("dpo(beta=1)+dpo(beta=2)", "summed twice"),
    ("dpo+kto", "dpo pairs, kto unpaired"),
    ("kto+sft", "kto unpaired, sft rows"),
    ("dpo+x*sft", "weight 'x'"),
    ("-1*dpo", "weight '-1'"),
    ("0*dpo", "weight '0'"),
    ("nan*dpo", "weight 'nan'"),
    ("inf*dpo", "weight 'inf'"),
    ("dpo+dpo", "summed twice"),
    ("dpo+", "cannot be read"),
    ("dpo-sft", "'dpo - sft' is no function"),
    ("json:dumps", "mark the function with jaxalign.train.losses.needs"),
    ("dpo+json:dumps", "loss 'json:dumps' does not say what it reads"),
  ],
)
def test_sums_that_cannot_be(name, words):
  with pytest.raises(ConfigError, match=words) as raised:
    find(name)
  assert "config.loss.name" in str(raised.value)


# Keywords of a config.


@pytest.mark.parametrize(
  "name,kwargs,words",
  [
    ("dpo", dict(gamma=1), "takes no 'gamma'; it takes beta, label_smoothing"),
    ("sft", dict(beta=1), "takes no 'beta'; it takes no keywords"),
    ("dpo", dict(beta=0), "beta=0, wanted more than 0"),
    ("dpo", dict(beta="x"), "beta='x'"),
    ("dpo", dict(beta=float("nan")), "beta=nan"),
    ("dpo", dict(beta=float("inf")), "beta=inf"),
    ("robust", dict(label_smoothing=0.5), "0 or more, less than 0.5"),
    ("robust", dict(label_smoothing=-0.1), "0 or more, less than 0.5"),
    ("exo", dict(epsilon=0.0), "more than 0, less than 0.5"),
    ("exo", dict(epsilon=0.5), "more than 0, less than 0.5"),
    ("discopop", dict(tau=0), "tau=0"),
    ("ld_dpo", dict(tail_weight=1.1), "from 0 to 1"),
    ("ld_dpo", dict(tail_weight=-0.1), "from 0 to 1"),
    ("dpop", dict(penalty=-1), "penalty=-1, wanted 0 or more"),
    ("cpo", dict(nll_weight=-1), "0 or more"),
    ("slic", dict(room=-1), "room"),
    ("kto", dict(desirable=-1), "desirable=-1"),
    ("dpo_alpha", dict(alpha=float("inf")), "a finite number"),
    ("simpo", dict(gamma=float("nan")), "a finite number"),
    ("dpo+sft", dict(tau=1), "takes no 'tau'"),
  ],
)
def test_keywords_that_cannot_be(name, kwargs, words):
  with pytest.raises(ConfigError, match=words) as raised:
    losses.bind(find(name), name, kwargs)
  assert "config.loss.kwargs" in str(raised.value)


@pytest.mark.parametrize("name", LOSSES)
def test_every_keyword_has_limits_that_its_default_meets(name):
  fn = LOSSES[name]
  kwargs = {n: p.default for n, p in keywords(fn).items()}
  assert set(kwargs) <= set(combine.LIMITS)
  assert marks(losses.bind(fn, name, kwargs)) == marks(fn)


def test_a_loss_from_elsewhere_may_declare_less():
  """A fork's function with `kind` and `stats` alone."""

  def mine(policy, ref, stats, *, strength=2.0):
    del ref, stats
    return strength * policy.sum[:, 0], {}

  mine.kind, mine.stats = "pairs", ()
  bound = losses.bind(mine, "mine", dict(strength="any"))
  assert bound.extras == () and bound.reference
  both = combine.weighted_sum(
    [(1.0, "mine", mine), (2.0, "sft", LOSSES["sft"])]
  )
  assert both.reference  # what does not declare itself free of one
  loss, _ = both(as_logps([[-3.0, -1.0]]), None, {})
  np.testing.assert_allclose(loss, [-6.0 + 2 * 0.6], rtol=1e-6)
