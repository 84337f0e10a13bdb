"""Agreement figures that others published, and oracles for each measure."""

import itertools
import json

import numpy as np
import pytest
from sklearn import metrics

from jaxalign.core.errors import ConfigError, DataError
from jaxalign.eval import interrater, rating_tables
from jaxalign.eval.interrater import Verdict
from jaxalign.eval.rating_codes import Choice

beyond = interrater.beyond_chance
KM = (("m", "k"), ("k", "m"))  # two models, in both orders
OTHER = {"first": "second", "second": "first", "tie": "tie", None: None}


def swapped(rows, seed=0):
  """The same verdicts with half of the rows written the other way round."""
  turn = np.random.default_rng(seed).random(len(rows)) < 0.5
  return [
    Verdict(r.item, r.second, r.first, r.rater, OTHER[r.verdict]) if t else r
    for r, t in zip(rows, turn)
  ]


def coincidence_alpha(units):
  """Krippendorff's own steps: coincidences o_ck, then disagreements."""
  labels = sorted({w for u in units for w in u if w is not None})
  o = np.zeros((len(labels), len(labels)))
  for unit in units:
    given = [labels.index(w) for w in unit if w is not None]
    for x, y in itertools.permutations(given, 2):
      o[x, y] += 1 / (len(given) - 1)
  n_c, n = o.sum(1), o.sum()
  observed = o.sum() - np.trace(o)
  expected = (np.outer(n_c, n_c).sum() - (n_c**2).sum()) / (n - 1)
  return 1 - observed / expected


@pytest.mark.parametrize("turned", [False, True])
def test_pandalm_to_the_last_digit_printed(shared, turned):
  folder = shared / "data/pandalm"
  files = [folder / f"{n}testset-v1.json" for n in ("", "gpt-3.5-turbo-")]
  rows = rating_tables.read_ratings(list(map(str, files)), Choice()).rows
  humans = ["annotator1", "annotator2", "annotator3"]
  rows = swapped(rows) if turned else rows
  out = interrater.judged(rows, ["gpt-3.5-turbo"], humans)
  kappas = [v["kappa"]["value"] for v in out["humans"]["between"].values()]
  assert [f"{k:.3f}" for k in kappas] == ["0.852", "0.879", "0.862"]
  judge = out["judges"]["gpt-3.5-turbo"]
  for rule, agreement, kappa, n in (
    ("tie", "0.7107", "0.4958", 999),
    ("drop", "0.7156", "0.4929", 974),
    ("own", "0.6977", "0.4755", 999),
  ):
    got = judge["against"][rule]
    assert f"{got['agreement']['value']:.4f}" == agreement
    assert f"{got['kappa']['value']:.4f}" == kappa
    assert got["agreement"]["n"] == n
  assert judge["unparsable"] == 25
  assert judge["orders"]["consistent"]["n"] == 0  # one order only
  json.dumps(out, allow_nan=False)
  # An oracle on the codes as they stand; the winner's name gives .9016.
  units = [[row[h] for h in humans] for row in json.loads(files[0].read_text())]
  alpha = out["humans"]["alpha"]
  assert f"{alpha['value']:.4f}" == "0.8642"
  assert alpha["value"] == pytest.approx(coincidence_alpha(units), abs=1e-12)
  assert alpha["low"] < 0.8642 < alpha["high"]
  assert 0.03 < alpha["high"] - alpha["low"] < 0.05
  assert (alpha["units"], alpha["labels"]) == (999, 2997)


def random_rows(seed, n=200, raters=("a", "b", "c")):
  rng = np.random.default_rng(seed)
  words = np.array(["first", "second", "tie", None], object)
  rows = []
  for i in range(n):
    p = rng.dirichlet([2, 1, 1, 0.2])
    rows += [Verdict(i, "m", "k", r, rng.choice(words, p=p)) for r in raters]
  return rows


@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_scikit_learn_s_and_pi_is_nearly_alpha(seed):
  """Of two raters with n labels, 1 - alpha = (1 - pi) (n - 1) / n."""
  rows = random_rows(seed)
  a, b = (interrater.settle_orders(rows, r) for r in "ab")
  words = [[row.verdict for row in rows if row.rater == r] for r in "ab"]
  for rule, got in interrater.between(a, b).items():
    unread = {"tie": "tie", "own": "None"}.get(rule)
    both = [[w or unread for w in two] for two in zip(*words)]
    xs, ys = zip(*(two for two in both if None not in two))
    kappa, alpha, pi = got["kappa"], got["alpha"], got["pi"]["value"]
    assert kappa["n"] == len(xs)
    wanted = metrics.cohen_kappa_score(xs, ys)
    assert kappa["value"] == pytest.approx(wanted, abs=1e-12)
    assert kappa["low"] < kappa["value"] < kappa["high"]
    wanted = (1 - pi) * (alpha["labels"] - 1) / alpha["labels"]
    assert 1 - alpha["value"] == pytest.approx(wanted, abs=1e-12), rule
    assert pi <= kappa["value"]


@pytest.mark.parametrize("seed", range(4))
def test_alpha_is_that_of_the_coincidence_matrix(seed):
  rng = np.random.default_rng(seed)
  labels = np.array(["x", "y", "z", None], object)
  units = rng.choice(labels, (80, 4), p=[0.4, 0.2, 0.1, 0.3])
  units[:40] = units[:40, :1]  # some agreement
  alpha = interrater.krippendorff_alpha(units.tolist())
  wanted = coincidence_alpha(units.tolist())
  assert alpha["value"] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
  "raters,value,within,units,labels",
  [
    # Krippendorff 2011, section C: four observers, twelve units.
    (
      ["123321412...", "1233224125.3", ".3332342251.", "12332441251."],
      *(0.743, 5e-4, 11, 40),
    ),
    # Units ab, aa, bb, b.: o_ab = 1 twice, so 1 - (6 - 1) 2 / (2 * 3 * 3).
    (["aabb", "bab."], 1 - 10 / 18, 1e-15, 3, 6),
  ],
)
def test_alpha_of_examples(raters, value, within, units, labels):
  rows = [[None if w == "." else w for w in text] for text in raters]
  alpha = interrater.krippendorff_alpha(list(zip(*rows)))
  assert alpha["value"] == pytest.approx(value, abs=within)
  assert (alpha["units"], alpha["labels"]) == (units, labels)


def test_coin_flippers_have_no_agreement():
  """Three raters without a clue, on pairs of six models."""
  rng = np.random.default_rng(1)
  models = ["bloom", "cerebras", "llama", "opt", "pythia", "gpt"]
  words, p = ["first", "second", "tie"], [0.45, 0.45, 0.1]
  rows = []
  for i in range(1000):
    shown = rng.permutation(models)[:2].tolist()
    rows += [Verdict(i, *shown, r, str(rng.choice(words, p=p))) for r in "abc"]
  settled = {r: interrater.settle_orders(rows, r) for r in "abc"}
  labels = {r: interrater.labels(w, "drop") for r, w in settled.items()}
  two = interrater.judged(rows, ["a"], ["b", "c"])["humans"]
  for alpha in (two["alpha"], interrater.among(labels)["alpha"]):
    assert abs(alpha["value"]) < 0.05
    assert alpha["low"] < 0 < alpha["high"]


def test_scott_s_pi_by_hand():
  """[[45, 15], [25, 15]]: kappa .130435, pi .120879."""
  xs = [0] * 60 + [1] * 40
  ys = [0] * 45 + [1] * 15 + [0] * 25 + [1] * 15
  assert f"{beyond('kappa', xs, ys)['value']:.6f}" == "0.130435"
  pi = beyond("pi", xs, ys)
  # Observed .6; fractions (60 + 70) / 200 and (40 + 30) / 200.
  chance = 0.65**2 + 0.35**2
  assert pi["value"] == pytest.approx((0.6 - chance) / (1 - chance))
  assert f"{pi['value']:.6f}" == "0.120879"
  assert pi["low"] < pi["value"] < pi["high"] and pi["n"] == 100


def test_intervals_cover_what_they_should():
  """Of samples from a known table, about 95 % have the truth inside."""
  table = np.array([[0.35, 0.1, 0.05], [0.05, 0.2, 0.05], [0.05, 0.05, 0.1]])
  x, y = table.sum(1), table.sum(0)
  beyond = lambda chance: (np.trace(table) - chance) / (1 - chance)
  truth = dict(kappa=beyond(x @ y), pi=beyond((((x + y) / 2) ** 2).sum()))
  truth["alpha"] = truth["pi"]
  rng, inside = np.random.default_rng(3), dict.fromkeys(truth, 0)
  for _ in range(200):
    cells = rng.choice(9, 150, p=table.ravel())
    labels = lambda side: {(i, "k", "m"): int(w) for i, w in enumerate(side)}
    got = interrater.agreement_of_two(labels(cells // 3), labels(cells % 3))
    for name in truth:
      inside[name] += got[name]["low"] <= truth[name] <= got[name]["high"]
  assert all(180 <= n <= 199 for n in inside.values()), inside


def test_pairs_of_one_item_are_drawn_together():
  """Ten copies of every pair under one item say no more than one."""
  rng = np.random.default_rng(0)
  xs = rng.integers(0, 3, 60).tolist()
  ys = [x if keep else 2 - x for x, keep in zip(xs, rng.random(60) < 0.7)]
  items = list(range(60)) * 10
  for measure in ("kappa", "pi"):
    one = beyond(measure, xs, ys)
    many = beyond(measure, xs * 10, ys * 10, items)
    alone = beyond(measure, xs * 10, ys * 10)
    assert many["value"] == pytest.approx(one["value"])
    assert many["low"] == pytest.approx(one["low"], abs=0.02)
    assert alone["high"] - alone["low"] < 0.5 * (many["high"] - many["low"])
  units = list(zip(xs, ys, xs))
  one = interrater.krippendorff_alpha(units)
  many = interrater.krippendorff_alpha(units * 10, items)
  assert many["low"] == pytest.approx(one["low"], abs=0.02)
  # One item alone varies with nothing: no interval, rather than one of zero.
  assert beyond("kappa", [0, 1, 1], [0, 1, 0], ["i"] * 3)["low"] is None


def test_only_raters_who_share_a_pair_are_compared(monkeypatch):
  pair = lambda i: (i, "k", "m")
  votes = {
    "a": {pair(0): 1, pair(1): 0},
    "b": {pair(0): 1, pair(1): None},
    "c": {pair(1): 0, pair(2): 1},
    "d": {pair(3): 1},
  }
  got = interrater.among(votes)
  assert list(got["between"]) == ["a / b", "a / c"]
  assert (got["pairs"], got["more"]) == (4, 0)
  assert (got["alpha"]["units"], got["alpha"]["labels"]) == (2, 4)
  monkeypatch.setattr(interrater, "PAIRS_OF_RATERS", 1)
  assert interrater.among(votes)["more"] == 1


def test_length_bias_by_hand():
  by_pair = lambda values: {
    (i, "k", "m"): v for i, v in enumerate(values) if v is not None
  }
  sizes = by_pair([(10, 20), (20, 10), (10, 20), (5, 5), (10, 20)])
  winners = by_pair(["m", "k", "k", "k", "", "m"])
  truth = by_pair(["k", "k", "m", None, "m"])
  got = interrater.length_bias(winners, sizes, truth)
  # Winners of unequal answers: longer, longer, shorter; errors: 0 and 2.
  assert (got["longer"]["value"], got["longer"]["n"]) == (2 / 3, 3)
  assert (got["errors"]["value"], got["errors"]["n"]) == (0.5, 2)
  assert got["n"] == 5
  assert interrater.length_bias({}, sizes)["longer"]["value"] is None


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_models_changes_nothing(seed):
  rows = random_rows(seed)
  one = interrater.judged(rows, ["a"], ["b", "c"])
  two = interrater.judged(swapped(rows, seed), ["a"], ["b", "c"])
  # How often the first place wins is about the order, all else is not.
  for out in (one, two):
    out["judges"]["a"]["orders"].pop("first")
  assert one == two


@pytest.mark.parametrize(
  "verdicts,consistent,first,unparsable,winners",
  [
    (
      [("first",) * 2, ("first", "second"), ("tie",) * 2, (None, "first")],
      *(2 / 3, 4 / 5, 1 / 8, ["", "m", "", "k"]),  # first: of 5 with a winner
    ),
    ([("first", "first")] * 40, 0.0, 1.0, 0.0, [""] * 40),
  ],
)
def test_orders_by_hand(verdicts, consistent, first, unparsable, winners):
  rows = [
    Verdict(i, *names, "j", verdict)
    for i, both in enumerate(verdicts)
    for names, verdict in zip(KM, both)
  ]
  out = interrater.order_effects(rows, "j")
  assert out["consistent"]["value"] == pytest.approx(consistent)
  assert out["first"]["value"] == pytest.approx(first)
  assert out["unparsable"]["value"] == unparsable
  wanted = {(i, "k", "m"): w for i, w in enumerate(winners)}
  assert interrater.settle_orders(rows, "j") == wanted


def test_a_judge_that_cannot_be_read():
  given = (("j", None), ("h", "first"))
  rows = [Verdict(i, "m", "k", r, v) for i in range(4) for r, v in given]
  out = interrater.judged(rows, ["j"], ["h"])["judges"]["j"]
  assert out["unparsable"] == 4
  assert out["against"]["drop"]["agreement"]["n"] == 0
  assert out["against"]["drop"]["kappa"]["value"] is None
  assert out["against"]["tie"]["agreement"]["value"] == 0.0
  json.dumps(out, allow_nan=False)


MAJORITIES = {  # -: a tie, .: could not be read
  "k": "kkm kk-m kkkmm-- kkk.mm..",  # perhaps no more than half
  "m": "m m..",
  "": "km km- kkmm kkmm- kk--m --km ---kk",
  None: ".",
}


@pytest.mark.parametrize(
  "votes,winner",
  [(v, w) for w, text in MAJORITIES.items() for v in text.split()],
)
def test_the_majority_is_the_plurality_and_a_tie_where_two_lead(votes, winner):
  pair = (0, "k", "m")
  winners = [{"-": "", ".": None}.get(v, v) for v in votes]
  assert interrater.majority([{pair: w} for w in winners]) == {pair: winner}


def test_one_label_only_has_no_value():
  none = dict(value=None, low=None, high=None)
  for xs in ([1, 1, 1], []):
    for measure in ("kappa", "pi"):
      assert beyond(measure, xs, xs) == none | dict(n=len(xs))
    sizes = dict(units=len(xs), labels=2 * len(xs))
    units = list(zip(xs, xs))
    assert interrater.krippendorff_alpha(units) == none | sizes


@pytest.mark.parametrize(
  "rows,words",
  [
    ("7 m m j tie", "item 7 .*different names"),
    ("7 m k j A", "is 'A', wanted"),
    ("7 m k j tie, 7 m k j tie", "twice"),
    ("7 m k h tie, 8 m k j tie", "judged no pair"),
    ("7 m k x tie", "no verdict of rater 'j'"),
  ],
)
def test_tables_that_cannot_be_right(rows, words):
  rows = [Verdict(*row.split()) for row in rows.split(", ")]
  rows = [row._replace(item=int(row.item)) for row in rows]
  humans = ["h"] if any(r.rater == "h" for r in rows) else ["j"]
  with pytest.raises(DataError, match=words):
    interrater.judged(rows, ["j"], humans)


def test_an_unknown_rule():
  with pytest.raises(ConfigError, match="tie, drop, own"):
    interrater.labels({}, "guess")
