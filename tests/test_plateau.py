"""The plateau on the paper's table, against a peer, and where there is none."""

import json

import numpy as np
import pytest
from scipy import optimize, stats

from jaxalign.core.errors import ConfigError, DataError
from jaxalign.study import plateau

X = np.array([0, 10, 25, 50, 75, 100.0])
PAPER = {  # table 2, Khera et al. 2024
  "hh": [18.27, 78.73, 81.32, 81.60, 83.17, 82.71],
  "oasst": [8.45, 15.23, 10.42, 17.51, 21.69, 24.66],
  "ultrafeedback": [7.60, 17.13, 23.74, 23.98, 27.48, 26.87],
}


def curve(x, r, a, b):
  return r - (r - a) * np.exp(-b * x)


def rss(y, x=X, **fixed):
  """Least weighted squares by scipy's own search, from many starts."""
  names = [n for n in "rab" if n not in fixed]

  def residual(v):
    return curve(x, **fixed, **dict(zip(names, v))) - y

  ranges = dict(r=(0, 100), a=(0, 100), b=(1e-6, 10))
  low, high = zip(*(ranges[n] for n in names))
  best = np.inf
  for b in (0.01, 0.05, 0.3):
    start = [dict(r=max(y), a=min(y), b=b)[n] for n in names]
    found = optimize.least_squares(
      residual,
      start,
      bounds=(low, high),
      x_scale=[dict(r=10, a=10, b=0.1)[n] for n in names],
      **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-14),
    )
    best = min(best, 2 * found.cost)
  return best


@pytest.mark.parametrize(
  "name,r,b", [("hh", "82.22", "0.290"), ("ultrafeedback", "26.52", "0.069")]
)
def test_the_paper_s_table(name, r, b):
  found = plateau.fit_plateau(X, PAPER[name])
  assert found["identified"]
  assert f"{found['r']['value']:.2f}" == r
  assert f"{found['b']['value']:.3f}" == b
  assert found["words"][0].startswith(f"A plateau is identified: r = {r}")
  assert found["words"][-1] == plateau.RECIPE
  json.dumps(found, allow_nan=False)


def test_openassistant_has_no_plateau():
  found = plateau.fit_plateau(X, PAPER["oasst"])
  assert not found["identified"]
  assert found["r"]["value"] == 100 and found["r"]["high"] is None
  assert found["words"][0].startswith("Plateau not identified")
  assert found["best"] == "line" and "not prefer" in found["words"][1]


@pytest.mark.parametrize("name", ["hh", "ultrafeedback"])
def test_the_intervals_end_where_the_fit_is_significantly_worse(name):
  y = np.array(PAPER[name])
  found = plateau.fit_plateau(X, y)
  least = rss(y)
  most = least * (1 + stats.f.ppf(0.95, 1, 3) / 3)
  for key in "rab":
    for end in ("low", "high"):
      assert rss(y, **{key: found[key][end]}) == pytest.approx(most, rel=1e-4)
    assert found[key]["low"] < found[key]["value"] < found[key]["high"]


def test_a_repeated_share_is_two_points():
  y = np.array(PAPER["ultrafeedback"])
  once = plateau.fit_plateau(X, y)
  twice = plateau.fit_plateau(np.tile(X, 2), np.tile(y, 2))
  for key in "rab":
    assert twice[key]["value"] == pytest.approx(once[key]["value"], rel=1e-5)
  assert twice["r"]["high"] < once["r"]["high"]


def test_an_exact_curve_is_found():
  found = plateau.fit_plateau(X, curve(X, 60, 30, 0.08))
  np.testing.assert_allclose(
    [found[k]["value"] for k in "rab"], [60, 30, 0.08], rtol=1e-5
  )
  assert found["identified"] and found["best"] == "plateau"
  half = plateau.data_for(found, 0.5)
  assert half["value"] == pytest.approx(np.log(2) / 0.08, rel=1e-4)
  assert half["low"] <= half["value"] <= half["high"]


@pytest.mark.parametrize(
  "make,best",
  [
    (lambda x: 20 + 0.3 * x, "line"),
    (lambda x: 20 + 8 * np.log1p(x), "logarithm"),
    (lambda x: 20 + 9 * x**0.4, "power law"),
  ],
)
def test_growth_without_an_end_is_no_plateau(make, best):
  x = np.array([0, 2, 5, 10, 25, 50, 75, 100.0])
  y = make(x) + np.random.default_rng(0).normal(0, 0.3, len(x))
  found = plateau.fit_plateau(x, y)
  assert found["best"] == best
  assert "do not prefer a plateau" in " ".join(found["words"])
  assert found["curves"][best]["held_out"] < 1


def test_no_growth_at_all_is_no_plateau():
  rng = np.random.default_rng(0)
  found = [
    plateau.fit_plateau(X, 50 + rng.normal(0, 2, 6))["identified"]
    for _ in range(10)
  ]
  assert sum(found) <= 1
  assert not plateau.fit_plateau(X, np.full(6, 50.0))["identified"]


def test_held_out_error_of_a_line_by_hand():
  y = np.array(PAPER["oasst"])
  missed = [
    y[i] - np.polyval(np.polyfit(np.delete(X, i), np.delete(y, i), 1), X[i])
    for i in range(1, 6)
  ]
  found = plateau.fit_plateau(X, y)["curves"]["line"]
  assert found["held_out"] == pytest.approx(np.sqrt(np.mean(np.square(missed))))
  r2 = np.corrcoef(X, y)[0, 1] ** 2
  assert found["r2"] == pytest.approx(r2)


@pytest.mark.parametrize(
  "x,y,words",
  [
    ([0, 10, 100], [1, 2, 3], "3 different data fractions, wanted at least 4"),
    ([0, 10, 100, 100], [1, 2, 3, 3], "3 different"),
    ([0, 1, 2, 3], [1, 2, 3], "one of each"),
    ([0, 1, 2, -3], [1, 2, 3, 4], "at least 0"),
    ([0, 1, 2, 3], [1, 2, np.nan, 4], "finite"),
    ([0, 1, 2, 3], [1, 2, 3, 101], "leave the bounds"),
  ],
)
def test_points_that_cannot_be_fitted(x, y, words):
  with pytest.raises(DataError, match=words):
    plateau.fit_plateau(x, y)


def test_knobs_that_cannot_work():
  with pytest.raises(ConfigError, match="between 0 and 1"):
    plateau.data_for({}, 1.0)


@pytest.mark.slow
def test_profiles_cover_95_percent():
  """On the built-in world's own curve, with its own noise."""
  rng = np.random.default_rng(0)
  x = np.array([0, 2, 3.5, 10, 25, 50, 75, 100])
  truth = dict(r=69.1, a=30.2, b=0.062)
  covered = {k: [] for k in truth}
  for _ in range(300):
    found = plateau.fit_plateau(x, curve(x, **truth) + rng.normal(0, 2, len(x)))
    for key, value in truth.items():
      low, high = found[key]["low"], found[key]["high"]
      covered[key].append(
        (low is None or low <= value) and (high is None or value <= high)
      )
  for key, hits in covered.items():
    assert 0.91 < np.mean(hits) < 0.985, (key, np.mean(hits))
