"""Agreement figures that others published, and oracles for each measure."""

import itertools
import json

import numpy as np
import pytest
from sklearn import metrics

from jaxalign.errors import ConfigError, DataError
from jaxalign.eval import interrater
from jaxalign.eval.interrater import Verdict


def pandalm(shared):
  """The human raters and the judge, models as the file orders them."""
  folder = shared / "data/pandalm"
  humans = json.loads((folder / "testset-v1.json").read_text())
  judge = json.loads((folder / "gpt-3.5-turbo-testset-v1.json").read_text())
  said = {0: "tie", 1: "first", 2: "second"}
  words = {"1": "first", "2": "second", "Tie": "tie"}
  rows = []
  for human, other in zip(humans, judge, strict=True):
    first, second = human["cmp_key"].split("_")
    assert human["idx"] == other["idx"]
    rows += [
      Verdict(
        human["idx"],
        first,
        second,
        f"annotator{i}",
        said[human[f"annotator{i}"]],
      )
      for i in (1, 2, 3)
    ]
    rows.append(
      Verdict(
        human["idx"],
        first,
        second,
        "gpt-3.5-turbo",
        words.get(other["gpt_result"]),
      )
    )
  return rows


def llmbar(shared):
  """The objective label, and four judges in both orders."""
  folder = shared / "data/llmbar-natural"
  rows = []
  for name in ("GPT-4", "ChatGPT", "LLaMA2", "PaLM2"):
    for i, row in enumerate(
      json.loads((folder / f"judge-{name}.json").read_text())
    ):
      if name == "GPT-4":
        rows.append(
          Verdict(
            i, "one", "two", "label", "first" if row["label"] == 1 else "second"
          )
        )
      for said in row["results"]:
        for key, shown in (
          ("swap = False", ("one", "two")),
          ("swap = True", ("two", "one")),
        ):
          winner = said[key]["winner"]  # "1" is "one" in either order
          winner = winner and {"1": "one", "2": "two"}[winner]
          word = winner and ("first" if winner == shown[0] else "second")
          rows.append(Verdict(i, *shown, name, word))
  return rows


def swapped(rows, seed=0):
  """The same verdicts with half of the rows written the other way round."""
  turn = np.random.default_rng(seed).random(len(rows)) < 0.5
  other = {"first": "second", "second": "first", "tie": "tie", None: None}
  return [
    Verdict(r.item, r.second, r.first, r.rater, other[r.verdict]) if t else r
    for r, t in zip(rows, turn)
  ]


HUMANS = ["annotator1", "annotator2", "annotator3"]


@pytest.mark.parametrize("turned", [False, True])
def test_pandalm_to_the_last_digit_printed(shared, turned):
  rows = pandalm(shared)
  rows = swapped(rows) if turned else rows
  out = interrater.judged(rows, ["gpt-3.5-turbo"], HUMANS)
  between = out["humans"]["between"]
  assert [f"{v['kappa']['value']:.3f}" for v in between.values()] == [
    "0.852",
    "0.879",
    "0.862",
  ]
  assert f"{out['humans']['alpha']['value']:.4f}" == "0.8642"
  judge = out["judges"]["gpt-3.5-turbo"]
  assert {
    rule: (f"{v['agreement']['value']:.4f}", f"{v['kappa']['value']:.4f}")
    for rule, v in judge["against"].items()
  } == {
    "tie": ("0.7107", "0.4958"),
    "drop": ("0.7156", "0.4929"),
    "own": ("0.6977", "0.4755"),
  }
  assert judge["unparsable"] == 25
  assert [
    judge["against"][r]["agreement"]["n"] for r in ("tie", "drop", "own")
  ] == [999, 974, 999]
  assert judge["orders"]["consistent"]["n"] == 0  # one order only
  json.dumps(out, allow_nan=False)


def test_llmbar_to_the_last_digit_printed(shared):
  rows = llmbar(shared)
  out = interrater.judged(rows, ["GPT-4", "PaLM2"], ["label"])
  gpt4 = out["judges"]["GPT-4"]
  assert f"{gpt4['orders']['kappa']['value']:.3f}" == "0.939"
  assert gpt4["orders"]["consistent"]["value"] == 0.97
  assert out["judges"]["PaLM2"]["unparsable"] == 6
  assert out["judges"]["PaLM2"]["orders"]["unparsable"]["value"] == 0.03
  # A pair whose two orders disagree is a tie, which the label never is.
  winners = interrater.settle_orders(rows, "GPT-4")
  assert sum(w == "" for w in winners.values()) == 3


def random_rows(seed, n=200, raters=("a", "b", "c")):
  rng = np.random.default_rng(seed)
  words = np.array(["first", "second", "tie", None], object)
  rows = []
  for i in range(n):
    p = rng.dirichlet([2, 1, 1, 0.2])
    rows += [Verdict(i, "m", "k", r, rng.choice(words, p=p)) for r in raters]
  return rows


@pytest.mark.parametrize("rule", interrater.UNPARSABLE)
@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_scikit_learn_s(rule, seed):
  rows = random_rows(seed)
  a, b = (interrater.settle_orders(rows, r) for r in "ab")
  found = interrater.between(a, b)[rule]["kappa"]
  xs, ys = [], []
  for i in range(200):
    said = [
      next(r.verdict for r in rows if r.item == i and r.rater == w)
      for w in "ab"
    ]
    if rule == "drop" and None in said:
      continue
    said = ["tie" if s is None and rule == "tie" else str(s) for s in said]
    xs.append(said[0])
    ys.append(said[1])
  assert found["n"] == len(xs)
  assert found["value"] == pytest.approx(
    metrics.cohen_kappa_score(xs, ys), abs=1e-12
  )
  assert found["low"] < found["value"] < found["high"]


def coincidence_alpha(units):
  """Krippendorff's own steps: coincidences o_ck, then disagreements."""
  labels = sorted({w for u in units for w in u if w is not None})
  o = np.zeros((len(labels), len(labels)))
  for unit in units:
    said = [w for w in unit if w is not None]
    if len(said) < 2:
      continue
    for x, y in itertools.permutations(range(len(said)), 2):
      o[labels.index(said[x]), labels.index(said[y])] += 1 / (len(said) - 1)
  n_c, n = o.sum(1), o.sum()
  observed = o.sum() - np.trace(o)
  expected = (np.outer(n_c, n_c).sum() - (n_c**2).sum()) / (n - 1)
  return 1 - observed / expected


@pytest.mark.parametrize("seed", range(4))
def test_alpha_is_that_of_the_coincidence_matrix(seed):
  rng = np.random.default_rng(seed)
  units = rng.choice(
    np.array(["x", "y", "z", None], object), (80, 4), p=[0.4, 0.2, 0.1, 0.3]
  )
  units[:40] = units[:40, :1]  # some agreement
  found = interrater.krippendorff_alpha(units.tolist())
  assert found["value"] == pytest.approx(
    coincidence_alpha(units.tolist()), abs=1e-12
  )


def test_alpha_of_krippendorff_s_own_example():
  """Krippendorff 2011, section C: four observers, twelve units: 0.743."""
  table = [
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
  ]
  units = list(
    zip(*[[None if w == "." else w for w in line.split()] for line in table])
  )
  found = interrater.krippendorff_alpha(units)
  assert f"{found['value']:.3f}" == "0.743"
  assert (found["units"], found["labels"]) == (11, 40)


def alpha_from_the_equation(units):
  """Nominal alpha, Krippendorff 2011: D_o over units, D_e over all values."""
  units = [[w for w in u if w is not None] for u in units]
  units = [u for u in units if len(u) > 1]
  values = [w for u in units for w in u]
  n = len(values)
  observed = (
    sum(
      np.mean([x != y for x, y in itertools.permutations(u, 2)]) * len(u)
      for u in units
    )
    / n
  )
  expected = sum(
    values.count(w) * (n - values.count(w)) for w in set(values)
  ) / (n * (n - 1))
  return 1 - observed / expected


def test_alpha_by_hand():
  """Units ab, aa, bb, b.: o_ab = 1 twice, so 1 - (6 - 1) 2 / (2 * 3 * 3)."""
  units = [["a", "b"], ["a", "a"], ["b", "b"], ["b", None]]
  found = interrater.krippendorff_alpha(units)
  assert found["value"] == pytest.approx(1 - 10 / 18, abs=1e-15)
  assert (found["units"], found["labels"]) == (3, 6)
  assert found["value"] == pytest.approx(alpha_from_the_equation(units))


def test_alpha_of_pandalm_from_the_file_alone(shared):
  """Two oracles on the codes as they stand; the winner's name gives .9016."""
  rows = json.loads((shared / "data/pandalm/testset-v1.json").read_text())
  units = [[row[f"annotator{i}"] for i in (1, 2, 3)] for row in rows]
  assert f"{coincidence_alpha(units):.4f}" == "0.8642"
  assert f"{alpha_from_the_equation(units):.4f}" == "0.8642"
  found = interrater.judged(pandalm(shared), ["gpt-3.5-turbo"], HUMANS)
  alpha = found["humans"]["alpha"]
  assert alpha["value"] == pytest.approx(coincidence_alpha(units), abs=1e-12)
  assert alpha["low"] < 0.8642 < alpha["high"]
  assert 0.03 < alpha["high"] - alpha["low"] < 0.05
  assert (alpha["units"], alpha["labels"]) == (999, 2997)


def test_coin_flippers_have_no_agreement():
  """Three raters without a clue, on pairs of six models."""
  rng = np.random.default_rng(1)
  models = ["bloom", "cerebras", "llama", "opt", "pythia", "gpt"]
  rows = []
  for i in range(1000):
    first, second = rng.permutation(models)[:2]
    rows += [
      Verdict(
        i,
        str(first),
        str(second),
        r,
        str(rng.choice(["first", "second", "tie"], p=[0.45, 0.45, 0.1])),
      )
      for r in "abc"
    ]
  found = interrater.judged(rows, ["a"], ["b", "c"])
  three = interrater.among(
    {
      r: interrater.labels(interrater.settle_orders(rows, r), "drop")
      for r in "abc"
    }
  )
  for alpha in (found["humans"]["alpha"], three["alpha"]):
    assert abs(alpha["value"]) < 0.05
    assert alpha["low"] < 0 < alpha["high"]


def test_scott_s_pi_by_hand():
  """[[45, 15], [25, 15]]: kappa .130435, pi .120879."""
  xs = [0] * 60 + [1] * 40
  ys = [0] * 45 + [1] * 15 + [0] * 25 + [1] * 15
  assert f"{interrater.cohen_kappa(xs, ys)['value']:.6f}" == "0.130435"
  found = interrater.scott_pi(xs, ys)
  # Observed .6; shares (60 + 70) / 200 and (40 + 30) / 200.
  chance = 0.65**2 + 0.35**2
  assert found["value"] == pytest.approx((0.6 - chance) / (1 - chance))
  assert f"{found['value']:.6f}" == "0.120879"
  assert found["low"] < found["value"] < found["high"] and found["n"] == 100


@pytest.mark.parametrize("seed", range(3))
def test_pi_is_alpha_of_two_raters_but_for_the_size_of_the_sample(seed):
  """Krippendorff: with n labels, 1 - alpha = (1 - pi) (n - 1) / n."""
  rows = random_rows(seed)
  a, b = (interrater.settle_orders(rows, r) for r in "ab")
  for rule, found in interrater.between(a, b).items():
    n = found["alpha"]["labels"]
    assert 1 - found["alpha"]["value"] == pytest.approx(
      (1 - found["pi"]["value"]) * (n - 1) / n, abs=1e-12
    ), rule
    assert found["pi"]["value"] <= found["kappa"]["value"]


def test_intervals_cover_what_they_should():
  """Of samples from a known table, about 95 % have the truth inside."""
  table = np.array([[0.35, 0.1, 0.05], [0.05, 0.2, 0.05], [0.05, 0.05, 0.1]])
  x, y = table.sum(1), table.sum(0)
  observed = np.trace(table)
  truth = {}
  for name, chance in (("kappa", x @ y), ("pi", (((x + y) / 2) ** 2).sum())):
    truth[name] = (observed - chance) / (1 - chance)
  truth["alpha"] = truth["pi"]
  rng, inside = np.random.default_rng(3), dict.fromkeys(truth, 0)
  for _ in range(200):
    cells = rng.choice(9, 150, p=table.ravel())
    found = interrater.compared(
      *(
        {(i, "k", "m"): int(w) for i, w in enumerate(side)}
        for side in (cells // 3, cells % 3)
      )
    )
    for name in truth:
      inside[name] += found[name]["low"] <= truth[name] <= found[name]["high"]
  assert all(180 <= n <= 199 for n in inside.values()), inside


def test_pairs_of_one_item_are_drawn_together():
  """Ten copies of every pair under one item say no more than one."""
  rng = np.random.default_rng(0)
  xs = rng.integers(0, 3, 60).tolist()
  ys = [x if keep else 2 - x for x, keep in zip(xs, rng.random(60) < 0.7)]
  for measure in (interrater.cohen_kappa, interrater.scott_pi):
    one = measure(xs, ys)
    many = measure(xs * 10, ys * 10, list(range(60)) * 10)
    alone = measure(xs * 10, ys * 10)
    assert many["value"] == pytest.approx(one["value"])
    assert many["low"] == pytest.approx(one["low"], abs=0.02)
    assert alone["high"] - alone["low"] < 0.5 * (many["high"] - many["low"])
  units = list(zip(xs, ys, xs))
  one = interrater.krippendorff_alpha(units)
  many = interrater.krippendorff_alpha(units * 10, list(range(60)) * 10)
  assert many["low"] == pytest.approx(one["low"], abs=0.02)
  # One item alone varies with nothing: no interval, rather than one of zero.
  assert interrater.cohen_kappa([0, 1, 1], [0, 1, 0], ["i"] * 3)["low"] is None


def test_only_raters_who_share_a_pair_are_compared(monkeypatch):
  pair = lambda i: (i, "k", "m")
  votes = {
    "a": {pair(0): 1, pair(1): 0},
    "b": {pair(0): 1, pair(1): None},
    "c": {pair(1): 0, pair(2): 1},
    "d": {pair(3): 1},
  }
  found = interrater.among(votes)
  assert list(found["between"]) == ["a / b", "a / c"]
  assert (found["pairs"], found["more"]) == (4, 0)
  assert (found["alpha"]["units"], found["alpha"]["labels"]) == (2, 4)
  monkeypatch.setattr(interrater, "PAIRS_OF_RATERS", 1)
  assert interrater.among(votes)["more"] == 1


def test_length_bias_by_hand():
  sizes = {
    (i, "k", "m"): s
    for i, s in enumerate([(10, 20), (20, 10), (10, 20), (5, 5), (10, 20)])
  }
  winners = {
    (0, "k", "m"): "m",
    (1, "k", "m"): "k",
    (2, "k", "m"): "k",
    (3, "k", "m"): "k",
    (4, "k", "m"): "",
    (5, "k", "m"): "m",
  }
  truth = {
    (0, "k", "m"): "k",
    (1, "k", "m"): "k",
    (2, "k", "m"): "m",
    (4, "k", "m"): "m",
  }
  found = interrater.length_bias(winners, sizes, truth)
  # Winners of unequal answers: longer, longer, shorter; errors: 0 and 2.
  assert (found["longer"]["value"], found["longer"]["n"]) == (2 / 3, 3)
  assert (found["errors"]["value"], found["errors"]["n"]) == (0.5, 2)
  assert found["n"] == 5
  assert interrater.length_bias({}, sizes)["longer"]["value"] is None


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_models_changes_nothing(seed):
  rows = random_rows(seed)
  one = interrater.judged(rows, ["a"], ["b", "c"])
  two = interrater.judged(swapped(rows, seed), ["a"], ["b", "c"])
  # How often the first place won is about the order, all else is not.
  for out in (one, two):
    out["judges"]["a"]["orders"].pop("first")
  assert one == two


def test_orders_by_hand():
  said = [
    ("first", "first"),
    ("first", "second"),
    ("tie", "tie"),
    (None, "first"),
  ]
  rows = [
    Verdict(i, *names, "j", word)
    for i, words in enumerate(said)
    for names, word in zip((("m", "k"), ("k", "m")), words)
  ]
  out = interrater.order_effects(rows, "j")
  assert out["consistent"]["value"] == pytest.approx(2 / 3)
  assert out["first"]["value"] == pytest.approx(4 / 5)  # of 5 with a winner
  assert out["unparsable"]["value"] == 1 / 8
  assert interrater.settle_orders(rows, "j") == {
    (0, "k", "m"): "",
    (1, "k", "m"): "m",
    (2, "k", "m"): "",
    (3, "k", "m"): "k",
  }


def test_a_judge_that_always_names_the_first():
  rows = [
    Verdict(i, *names, "j", "first")
    for i in range(40)
    for names in (("m", "k"), ("k", "m"))
  ]
  out = interrater.order_effects(rows, "j")
  assert out["first"]["value"] == 1.0 and out["consistent"]["value"] == 0.0
  assert set(interrater.settle_orders(rows, "j").values()) == {""}


def test_a_judge_that_cannot_be_read():
  rows = [
    Verdict(i, "m", "k", r, s)
    for i in range(4)
    for r, s in (("j", None), ("h", "first"))
  ]
  out = interrater.judged(rows, ["j"], ["h"])["judges"]["j"]
  assert out["unparsable"] == 4
  assert out["against"]["drop"]["agreement"]["n"] == 0
  assert out["against"]["drop"]["kappa"]["value"] is None
  assert out["against"]["tie"]["agreement"]["value"] == 0.0
  json.dumps(out, allow_nan=False)


@pytest.mark.parametrize(
  "votes,winner",
  [
    ("kkm", "k"),
    ("km-", ""),
    ("km", ""),
    ("m", "m"),
    ("m..", "m"),
    (".", None),
    ("", None),
    ("kk-m", "k"),  # no more than half, and more than any other
    ("kkmm", ""),
    ("kkmm-", ""),
    ("kk--m", ""),
    ("--km", ""),
    ("---kk", ""),
    ("kkkmm--", "k"),
    ("kkk.mm..", "k"),
  ],
)
def test_the_majority_is_the_plurality_and_a_tie_where_two_lead(votes, winner):
  pair = (0, "k", "m")
  words = [{"-": "", ".": None}.get(v, v) for v in votes]
  found = interrater.majority([{pair: w} for w in words] or [{pair: None}])
  assert found == {pair: winner}


@pytest.mark.parametrize(
  "measure", [interrater.cohen_kappa, interrater.scott_pi]
)
def test_one_label_only_has_no_kappa(measure):
  assert measure([1, 1, 1], [1, 1, 1]) == dict(
    value=None, low=None, high=None, n=3
  )
  assert measure([], []) == dict(value=None, low=None, high=None, n=0)
  assert interrater.krippendorff_alpha([[1, 1], [1, 1]])["value"] is None
  assert interrater.krippendorff_alpha([])["value"] is None


@pytest.mark.parametrize(
  "rows,words",
  [
    ([Verdict(7, "m", "m", "j", "tie")], "item 7 .*different names"),
    ([Verdict(7, "m", "k", "j", "A")], "is 'A', wanted"),
    ([Verdict(7, "m", "k", "j", "tie")] * 2, "twice"),
    (
      [Verdict(7, "m", "k", "h", "tie"), Verdict(8, "m", "k", "j", "tie")],
      "judged no pair",
    ),
    ([Verdict(7, "m", "k", "x", "tie")], "no verdict of rater 'j'"),
  ],
)
def test_tables_that_cannot_be_right(rows, words):
  with pytest.raises(DataError, match=words):
    interrater.judged(
      rows, ["j"], ["h"] if any(r.rater == "h" for r in rows) else ["j"]
    )


def test_an_unknown_rule():
  with pytest.raises(ConfigError, match="tie, drop, own"):
    interrater.labels({}, "guess")
