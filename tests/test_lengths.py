"""Length control: against Newton's steps in float64, and on planted worlds."""

import json

import numpy as np
import pytest
from sklearn import linear_model

from jaxalign.errors import DataError
from jaxalign.eval import winrate


def planted(rng, n, quality, slope):
  """Answers longer by 30 words on average; log-odds of both causes."""
  ours, theirs = rng.gamma(4, 40, n) + 30, rng.gamma(4, 40, n)
  d = ours - theirs
  p = 1 / (1 + np.exp(-(quality + slope * d / d.std())))
  return (rng.random(n) < p).astype(float), ours, theirs


@pytest.mark.parametrize(
  "seed,quality,slope", [(0, 0.0, 1.0), (1, 0.7, -0.5), (2, -1.0, 2.0)]
)
def test_the_fit_is_scikit_learn_s(seed, quality, slope):
  won, ours, theirs = planted(np.random.default_rng(seed), 400, quality, slope)
  d = ours - theirs
  peer = linear_model.LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
  peer.fit((d / d.std())[:, None], won)
  found = winrate.at_equal_length(won, ours, theirs)
  assert found["slope"]["value"] == pytest.approx(peer.coef_[0, 0], abs=1e-5)
  assert found["value"] == pytest.approx(
    peer.predict_proba([[0.0]])[0, 1], abs=1e-6
  )
  assert found["raw"]["value"] == won.mean()
  assert found["longer"] == pytest.approx(d.mean())


def newton(won, x):
  """Plain Newton and the sandwich of the estimating equations."""
  x = np.stack([np.ones(len(x)), x], 1)
  v = np.zeros(2)
  for _ in range(30):
    p = 1 / (1 + np.exp(-x @ v))
    v += np.linalg.solve((x.T * (p * (1 - p))) @ x, x.T @ (won - p))
  bread = np.linalg.inv((x.T * (p * (1 - p))) @ x)
  meat = (x.T * (won - p) ** 2) @ x
  return v, bread @ meat @ bread * len(won) / (len(won) - 2)


def test_ties_are_halves():
  rng = np.random.default_rng(3)
  won, ours, theirs = planted(rng, 300, 0.3, 0.8)
  won[rng.random(300) < 0.3] = 0.5
  d = ours - theirs
  v, variance = newton(won, d / d.std())
  found = winrate.at_equal_length(won, ours, theirs)
  half = 1.959963984540054 * np.sqrt(variance[0, 0])
  np.testing.assert_allclose(
    [found[k] for k in ("value", "low", "high")],
    1 / (1 + np.exp(-(v[0] + half * np.array([0, -1, 1])))),
    rtol=1e-8,
  )
  half = 1.959963984540054 * np.sqrt(variance[1, 1])
  np.testing.assert_allclose(found["slope"]["low"], v[1] - half, rtol=1e-7)


def test_length_that_buys_wins_is_taken_out():
  won, ours, theirs = planted(np.random.default_rng(4), 4000, 0.0, 1.5)
  found = winrate.at_equal_length(won, ours, theirs)
  assert found["raw"]["low"] > 0.54  # looks better
  assert found["low"] < 0.5 < found["high"]  # and is not
  other = winrate.at_equal_length(1 - won, theirs, ours)
  assert other["value"] == pytest.approx(1 - found["value"])
  assert other["slope"]["value"] == pytest.approx(found["slope"]["value"])


def test_the_interval_covers_95_percent():
  rng = np.random.default_rng(5)
  hits = []
  for _ in range(1000):
    won, ours, theirs = planted(rng, 200, 0.4, 0.8)
    found = winrate.at_equal_length(won, ours, theirs)
    hits.append(found["low"] <= 1 / (1 + np.exp(-0.4)) <= found["high"])
  assert 0.93 <= np.mean(hits) <= 0.97, np.mean(hits)


def test_equal_lengths_leave_the_raw_rate():
  won = np.repeat([1.0, 0.0], [7, 3])
  found = winrate.at_equal_length(won, np.full(10, 5), np.full(10, 5))
  assert found["value"] == 0.7 and found["low"] == found["raw"]["low"]


@pytest.mark.parametrize(
  "won,ours,why",
  [
    ([1, 0, 1, 0], [9, 1, 9, 1], "has no bound"),  # the longer one wins
    ([1, 1, 1, 1], [9, 1, 7, 3], "has no bound"),
    ([1, 0, 1, 0], [9, 9, 9, 9], "cannot be told apart"),
    ([1, 0], [9, 1], "wanted at least 3"),
    ([], [], "0 outcomes"),
  ],
)
def test_what_cannot_be_told_is_not(won, ours, why):
  found = winrate.at_equal_length(won, ours, np.full(len(won), 5))
  assert found["value"] is None and why in found["why"]
  assert found["raw"]["n"] == len(won)
  json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
  "won,ours,words",
  [
    ([1, 0], [1, 2, 3], "one of each"),
    ([1, 2, 0], [1, 2, 3], "leave"),
    ([1, np.nan, 0], [1, 2, 3], "leave"),
    ([1, 1, 0], [1, np.inf, 3], "no number"),
  ],
)
def test_arrays_that_cannot_be_right(won, ours, words):
  with pytest.raises(DataError, match=words):
    winrate.at_equal_length(won, ours, ours)
