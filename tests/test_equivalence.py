"""Planted differences are detected, planted zeros not; little stays little."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from jaxalign.core import intervals
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.eval import equivalence
from jaxalign.eval.equivalence import ArmOutcomes as Arm


def study(rng, gains, seeds=10, prompts=400, sd=0.024):
  """Arms on shared prompts: hard ones, luck of a seed, ties, and a gain."""
  hard = rng.normal(0, 0.2, prompts)
  arms = []
  for i, gain in enumerate(gains):
    luck = rng.normal(0, sd, (seeds, 1))
    p = np.clip(0.5 + gain + luck + hard, 0.02, 0.98)
    wins = (rng.random((seeds, prompts)) < p).astype(float)
    wins[rng.random((seeds, prompts)) < 0.05] = 0.5
    arms.append(Arm(f"arm{i}", range(seeds), range(prompts), wins))
  return arms


def one(a, b, **kwargs):
  return equivalence.compare_arms([(a, b)], **kwargs)[0]


def verdicts(seed, times, *gains_and_sizes, **kwargs):
  rng = np.random.default_rng(seed)
  return [
    one(*study(rng, *gains_and_sizes), **kwargs)["verdict"]
    for _ in range(times)
  ]


SIX, EXTREMES = (0.06 / 0.95, 0), ("better", "worse")
FALSE_300 = 0.05 * 300 + 3 * np.sqrt(300 * 0.05 * 0.95)
FALSE_150 = 0.05 * 150 + 3 * np.sqrt(150 * 0.05 * 0.95)


@pytest.mark.parametrize(
  "verdict,least,most,args",
  [
    (("better",), 19, 20, (0, 20, SIX)),  # six points are detected
    (EXTREMES, 0, 1, (1, 20, (0, 0))),  # zero is not
    # The level is kept over many: 5 % of them, give or take three errors.
    (EXTREMES, 0, FALSE_300, (2, 300, (0, 0), 6, 100)),
    (("better",), 95, 100, (2, 100, SIX)),
    # True differences of the margin itself: the worst case of equivalence.
    (("equal",), 0, FALSE_150, (4, 150, (0.02 / 0.95, 0), 20, 1000, 0.01)),
    (("equal",), 9, 10, (4, 10, (0, 0), 40, 2000, 0.01)),
  ],
)
def test_verdicts_are_as_often_right_as_they_claim(verdict, least, most, args):
  given = verdicts(*args)
  assert least <= sum(v in verdict for v in given) <= most, given


def test_many_comparisons_stay_honest():
  """Ten samplers, none better than random: all silent in 19 of 20 studies."""
  rng = np.random.default_rng(3)
  loud = 0
  for _ in range(100):
    arms = study(rng, [0] * 11, 6, 100)
    out = equivalence.compare_arms([(a, arms[0]) for a in arms[1:]])
    loud += any(o["verdict"] in ("better", "worse") for o in out)
  assert loud <= 100 * 0.05 + 3 * np.sqrt(100 * 0.05 * 0.95)


def test_the_tests_by_hand():
  """Two-way mean squares, Satterthwaite's freedom, t; in float64 NumPy."""
  rng = np.random.default_rng(5)
  a, b = study(rng, (0.03, 0), 6, 50, 0.08)
  a.outcome[:, ::5] = np.maximum(a.outcome[:, ::5], b.outcome[:, ::5])
  a.outcome[:, 1::5] = np.minimum(a.outcome[:, 1::5], b.outcome[:, 1::5])
  d = a.outcome - b.outcome
  s, p = d.shape
  m = d.mean()
  ms_s = p * np.var(d.mean(1), ddof=1)
  ms_p = s * np.var(d.mean(0), ddof=1)
  rest = d - d.mean(1, keepdims=True) - d.mean(0, keepdims=True) + m
  ms_e = (rest**2).sum() / ((s - 1) * (p - 1))
  assert ms_s > ms_e and ms_p > ms_e  # nothing is cut off
  total = ms_s + ms_p - ms_e
  freedom = total**2 / (
    ms_s**2 / (s - 1) + ms_p**2 / (p - 1) + ms_e**2 / ((s - 1) * (p - 1))
  )
  error = np.sqrt(total / (s * p))
  out = one(a, b, margin=0.1)
  diff, half = out["difference"], stats.t.ppf(0.975, freedom) * error
  got = [diff["value"], diff["low"], diff["high"]]
  np.testing.assert_allclose(got, [m, m - half, m + half])
  two_sided = 2 * stats.t.sf(abs(m) / error, freedom)
  np.testing.assert_allclose(out["p_differ"], two_sided)
  lower = stats.t.sf((m + 0.1) / error, freedom)  # not below -0.1
  upper = stats.t.cdf((m - 0.1) / error, freedom)  # not above +0.1
  np.testing.assert_allclose(out["p_equal"], max(lower, upper))


def test_holm_by_hand():
  np.testing.assert_allclose(
    intervals.holm([0.04, 0.01, 0.03, 0.9]), [0.09, 0.04, 0.09, 0.9]
  )
  np.testing.assert_allclose(intervals.holm([0.6, 0.7]), [1.0, 1.0])
  assert intervals.holm([]).shape == (0,)


def test_the_order_of_prompts_and_seeds_changes_nothing():
  rng = np.random.default_rng(6)
  a, b = study(rng, (0.05, 0), 5, 40)
  rows, columns = rng.permutation(5), rng.permutation(40)
  outcome = b.outcome[np.ix_(rows, columns)]
  turned = Arm(b.name, rows.tolist(), columns.tolist(), outcome)
  assert one(a, b) == one(a, turned)


def test_the_two_sides_say_opposite_things():
  a, b = study(np.random.default_rng(7), (0.2, 0))
  up, down = one(a, b), one(b, a)
  assert (up["verdict"], down["verdict"]) == ("better", "worse")
  assert up["difference"]["low"] == -down["difference"]["high"]
  points = f"{100 * up['difference']['value']:.1f}"
  assert f"arm0 is better than arm1 by {points} points" in up["words"]
  assert f"arm1 is worse than arm0 by {points} points" in down["words"]


@pytest.mark.parametrize(
  "seeds,prompts", [(4, 400), (5, 29), (1, 400), (2, 1), (1, 1)]
)
def test_too_little_is_withheld_and_still_shown(seeds, prompts):
  a, b = study(np.random.default_rng(8), (0.4, 0), seeds, prompts)
  out = one(a, b)
  assert out["verdict"] == "withheld"
  assert "No verdict: it needs at least 5 seeds and 30" in out["words"]
  assert not re.search("better|worse|equal", out["words"])
  assert (out["difference"]["low"] is None) == (min(seeds, prompts) < 2)
  assert ("95 % interval" in out["words"]) == (min(seeds, prompts) > 1)
  json.dumps(out, allow_nan=False)


CLAIMS = dict(better="is better than", worse="is worse than")
CLAIMS["equal"] = "are equal within 2 points"


def test_the_verdict_and_the_words_agree():
  rng = np.random.default_rng(9)
  seen = set()
  for _ in range(60):
    gain, seeds = rng.choice([0, 0.01, 0.08]), int(rng.choice([5, 12, 40]))
    a, b, c = study(rng, (gain, 0, 0), seeds, 600, 0.01)
    for out in equivalence.compare_arms([(a, b), (c, b)]):
      verdict, text = out["verdict"], out["words"]
      seen.add(verdict)
      for key, words in CLAIMS.items():
        assert (words in text) == (verdict == key), text
      unsure = verdict == "cannot tell"
      assert ("Cannot tell" in text) == (out["needed"] is not None) == unsure
      assert "correction for 2 comparisons" in text
      json.dumps(out, allow_nan=False)
  assert seen >= {"better", "equal", "cannot tell"}


@pytest.mark.parametrize("gain", [0.008, 0.0])
def test_a_difference_too_small_to_count_is_still_shown(gain):
  """Always 0.8 points: surely there, and surely under 2."""
  rng = np.random.default_rng(11)
  base = rng.random((6, 200)) * 0.9
  noise = rng.normal(0, 0.01, base.shape) * 0.1
  a = Arm("a", range(6), range(200), base + gain + noise)
  out = one(a, a._replace(name="b", outcome=base))
  assert out["verdict"] == "equal"
  assert ("A difference is there, +0.8 points" in out["words"]) == (gain > 0)


def test_a_study_of_the_size_needed_decides():
  """Power as promised: at the size needed, both verdicts are given."""
  rng = np.random.default_rng(10)
  out = one(*study(rng, (0, 0), 5, 100, 0.02), margin=0.05)
  assert out["verdict"] == "cannot tell", out["words"]
  need = out["needed"]
  assert f"To tell 5 points: {need['seeds']} seeds" in out["words"]
  size = (need["seeds"], need["prompts"], 0.02)
  for gain, verdict in ((0.05 / 0.95, "better"), (0, "equal")):
    arms = (study(rng, (gain, 0), *size) for _ in range(60))
    given = [one(*two, margin=0.05)["verdict"] for two in arms]
    assert given.count(verdict) > 0.6 * 60  # 0.8, one spread's luck


def test_needed_grows_what_stands_in_the_way():
  def need(**variances):
    none = dict.fromkeys(("value", "seeds", "prompts", "noise"), 0.0)
    own = none | dict(error=0.1, freedom=5.0) | variances
    spread = intervals.Spread(**own)
    return equivalence.size_needed(spread, 5, 100, 0.02, 0.05)

  by_seed = need(seeds=0.03**2)
  assert by_seed["seeds"] > 5 and by_seed["prompts"] == 100

  def enough(s):  # Student's t for a mean of S seeds
    t = lambda q: stats.t.ppf(q, s - 1)
    limit = 0.02 / (0.03 / np.sqrt(s))
    return max(t(0.975) + t(0.8), t(0.95) + t(0.9)) <= limit

  assert by_seed["seeds"] == next(s for s in range(6, 1000) if enough(s))
  by_prompt = need(prompts=0.3**2)
  assert by_prompt["seeds"] == 5 and by_prompt["prompts"] > 1000
  both = need(seeds=0.03**2, prompts=0.3**2)
  assert both["seeds"] > 5 and both["prompts"] > 1000
  assert need(seeds=1e9) is None


def test_arms_that_never_differ_are_not_certain():
  """All cells alike: an interval with a width, and no better or worse."""
  arm = Arm("a", range(5), range(30), np.ones((5, 30)))
  out = one(arm, arm._replace(name="b"))
  half = stats.t.ppf(0.975, 4) * np.sqrt(2) / 152  # one +1, one -1 added
  np.testing.assert_allclose(out["difference"]["high"], half)
  np.testing.assert_allclose(out["difference"]["low"], -half)
  assert out["verdict"] in ("equal", "cannot tell")
  json.dumps(out, allow_nan=False)


@pytest.mark.parametrize(
  "change,words",
  [
    (dict(prompts=range(1, 41)), "different prompts .40 and 40, 2 in one"),
    (dict(seeds=range(1, 6)), "different seeds"),
    (dict(prompts=[0] * 40), "a prompt comes twice"),
    (dict(seeds=range(4)), "outcomes .5, 40., wanted one of each of 4 seeds"),
    (dict(outcome=np.full((5, 40), 2.0)), "outcomes leave"),
    (dict(outcome=np.full((5, 40), np.nan)), "outcomes leave"),
  ],
)
def test_arms_that_cannot_be_compared(change, words):
  a, b = study(np.random.default_rng(0), (0, 0), 5, 40)
  with pytest.raises(DataError, match=words):
    one(a, b._replace(**change))


def test_knobs_that_cannot_work():
  a, b = study(np.random.default_rng(0), (0, 0), 5, 40)
  with pytest.raises(ConfigError, match="0.02 is 2 points"):
    one(a, b, margin=2)
  with pytest.raises(ConfigError, match="level"):
    one(a, b, level=0.0)
  assert equivalence.compare_arms([]) == []
