"""What several seeds allow one to say: by hand, and of whole tiny jobs."""

import types

import jobs
import numpy as np
import pytest

from configs import common, compare, plateau, prove
from jaxalign.data import recipe, tables
from jaxalign.model.job import Arm
from jaxalign.report import terminal
from jaxalign.study.arms import arms_of, comparisons, grouped
from jaxalign.study.curves import budget_curve
from jaxalign.study.outcomes import Outcomes
from jaxalign.study.stats import (
  efficiency,
  over_cells,
  over_seeds,
  ranking,
  verdicts,
)
from jaxalign.study.summarise import title_and_question
from jaxalign.train import ref_logps

SEEDS, PROMPTS = 6, 400
RATES = {
  ("isa", 0.1, 0): 0.62,
  ("random", 0.1, 0): 0.45,
  ("length_matched", 0.1, 0): 0.45,
  ("random", 1.0, 0): 0.75,
  ("random", 1.0, 0.1): 0.62,
}
PROVE = "isa-0.1 random-0.1 length_matched-0.1 all-1 all-1-as-0.1".split()


def world(rates, seeds=SEEDS, prompts=PROMPTS, spread=0.0):
  """(outcomes, groups) of label -> win rate: shared prompts, drawn cells."""
  rng = np.random.default_rng(3)
  hard = rng.random(prompts)
  arms, wins = [], {"SFT model": (hard < 0.3) * 1.0}
  for (sampler, budget, like), rate in rates.items():
    for s in range(seeds):
      arm = Arm(sampler, budget, s, like)
      arms.append(arm)
      cell = 0.7 * hard + 0.3 * rng.random(prompts)
      wins[arm.name] = (cell < rate + spread * rng.normal()) * 1.0
  names = [f"p{i}" for i in range(prompts)]
  outcomes = Outcomes("win_vs_target", "win rate", names, wins)
  return outcomes, grouped(arms)


def test_the_arms_are_samplers_by_budgets_by_seeds():
  arms = arms_of(prove.get_config())
  assert [a.name for a in arms[:5]] == [f"{label}-seed0" for label in PROVE]
  assert len(arms) == 25 and {a.seed for a in arms} == set(range(5))
  arms = arms_of(plateau.get_config())
  assert len(arms) == 24 and all(a.sampler == "random" for a in arms)
  arms = arms_of(compare.get_config())
  assert len(arms) == 5 * (2 * 6 + 1)  # everything has one budget
  c = compare.get_config()
  c.seed, c.seeds, c.budgets = 7, 1, (32.0,)
  assert [a.name for a in arms_of(c)][:2] == ["isa-32-seed7", "random-32-seed7"]


def test_every_subset_arm_has_as_many_updates():
  c = prove.get_config()
  updates = {
    a.label: ref_logps.updates_of(c, a, 8000 if a.is_all else 800, 8000)
    for a in arms_of(c)
  }
  # 800 rows x 3 epochs / 32; everything: one epoch, 8000 / 32.
  assert updates == dict(zip(PROVE, (75, 75, 75, 250, 75)))
  small = Arm("isa", 0.02, 0)
  assert ref_logps.updates_of(c, small, 160, 8000) == 50  # not 15


def test_what_is_compared_with_what():
  pairs = lambda groups, chosen: [
    f"{x.a} {x.b}" for x in comparisons(groups, chosen)
  ]
  assert pairs(world(RATES)[1], "isa") == [
    "isa-0.1 random-0.1",
    "length_matched-0.1 random-0.1",
    "isa-0.1 length_matched-0.1",
    "isa-0.1 all-1",
    "isa-0.1 all-1-as-0.1",
  ]
  two = [Arm(s, b, 0) for b in (0.1, 0.2) for s in ("isa", "random")]
  wanted = ["isa-0.1 random-0.1", "isa-0.2 random-0.2"]
  assert pairs(grouped(two), "isa") == wanted
  # A curve of random: each part against everything, no pair turned around.
  curve = grouped([Arm("random", b, 0) for b in (0.1, 0.2, 1.0)])
  assert pairs(curve, "random") == ["random-0.1 all-1", "random-0.2 all-1"]


def test_verdicts_say_better_worse_equal_or_cannot_tell():
  outcomes, groups = world(RATES)
  between, against = verdicts(outcomes, groups, "isa", "SFT model")
  found = {(x["a"], x["b"]): x for x in between}
  assert found["isa-0.1", "random-0.1"]["verdict"] == "better"
  assert found["isa-0.1", "all-1"]["verdict"] == "worse"
  # By NumPy: the mean over all cells of the difference.
  mean = lambda label: np.mean([outcomes.wins[a.name] for a in groups[label]])
  for (a, b), one in found.items():
    assert one["difference"]["value"] == pytest.approx(mean(a) - mean(b))
    assert one["comparisons"] == 5
  assert "better than random-0.1 by" in found["isa-0.1", "random-0.1"]["words"]
  assert len(against) == 5 and all(x["b"] == "SFT model" for x in against)
  assert all(x["verdict"] == "better" for x in against)
  alike = {("isa", 0.1, 0): 0.5, ("random", 0.1, 0): 0.5}
  verdict = lambda *made: verdicts(*made, "isa", "")[0]
  (one,) = verdict(*world(alike, seeds=12, prompts=3000))
  assert one["verdict"] == "equal" and "within 2 points" in one["words"]
  (one,) = verdict(*world(alike, spread=0.1))
  assert one["verdict"] == "cannot tell" and one["needed"]["seeds"] > SEEDS
  few = verdict(*world(RATES, seeds=4))
  assert all(x["verdict"] == "withheld" for x in few)


def test_ranks_that_are_not_told_apart_are_shared():
  rates = dict(isa=0.3, random=0.6, density=0.6, k_center=0.8)
  made = world({(name, 0.1, 0): rate for name, rate in rates.items()})
  (one,) = ranking(*made)
  ranks = {r["name"]: (r["from"], r["to"]) for r in one["rows"]}
  assert one["rows"][0]["name"] == "k_center-0.1" and ranks == {
    "k_center-0.1": (1, 1),
    "random-0.1": (2, 3),
    "density-0.1": (2, 3),
    "isa-0.1": (4, 4),
  }
  values = [r["value"] for r in one["rows"]]
  assert values == sorted(values, reverse=True)
  (one,) = ranking(*world(RATES, seeds=2))
  assert all((r["from"], r["to"]) == (1, 3) for r in one["rows"])


def test_cells_all_alike_do_not_pass_for_certainty():
  found = over_cells(np.zeros((5, 16)))
  assert found["value"] == 0 and found["high"] == pytest.approx(0.194, abs=1e-3)
  same = [dict(value=0.5, low=0.4, high=0.6, n=9)] * 3
  far = [dict(value=0.2), dict(value=0.9)]
  ends = lambda name, runs: [over_seeds(name, runs)[k] for k in ("low", "high")]
  assert ends("accuracy", same) == [0.4, 0.6]
  assert ends("accuracy", far) == [0.0, 1.0]
  low, high = ends("kl", far)
  assert low < 0 and high > 1


def test_the_curve_reads_the_right_rows():
  """Points made from R(x) itself: the fit gives back r, a and b."""
  n, r, a, b = 1000, 80.0, 30.0, 0.06
  budgets = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
  arms = [Arm("random", x, s) for s in (0, 1) for x in budgets]
  arms += [Arm("random", 1.0, 0, 0.1), Arm("isa", 0.1, 0)]
  at = lambda x: (r - (r - a) * np.exp(-b * 100 * x)) / 100
  wins = {arm.name: np.full(8, at(arm.budget)) for arm in arms}
  wins["all-1-as-0.1-seed0"] = wins["isa-0.1-seed0"] = np.ones(8)
  wins["SFT model"] = np.full(8, a / 100)
  job = types.SimpleNamespace(
    c=plateau.get_config(), column=lambda *_: list(range(n))
  )
  outcomes = Outcomes("win_vs_target", "win rate", list("abcdefgh"), wins)
  found = budget_curve(job, outcomes, arms, "SFT model")
  values = [found[name]["value"] for name in "rab"]
  assert values == pytest.approx([r, a, b], rel=1e-4)
  assert found["x"] == [0, *[100 * x for x in budgets] * 2]
  words = "learning rate and the number of epochs as much as"
  assert words in " ".join(found["words"])
  assert budget_curve(job, outcomes, arms[:3], "SFT model") is None


def test_quality_for_its_cost_by_hand():
  groups = [dict(name="isa-0.1", flops=2e12)]
  gain = dict(value=0.3, low=0.2, high=0.4)
  (one,) = efficiency(groups, [dict(a="isa-0.1", difference=gain)])
  assert one["per_tera"] == pytest.approx(15.0) and one["gain"] == gain


@pytest.mark.slow
def test_a_fair_test_end_to_end(tmp_path):
  run = lambda *more: jobs.run(tmp_path, *more, config="prove.py:tiny")
  ended = run()
  assert ended.code == 0, ended
  summary = jobs.load(tmp_path / "summary.json")
  assert len(summary["arms"]) == 10 and len(summary["groups"]) == 5
  updates = {g["name"]: g["updates"] for g in summary["groups"]}
  assert updates.pop("all-1") and set(updates.values()) == {4}
  assert len(summary["comparisons"]) == 10
  assert all(x["verdict"] == "withheld" for x in summary["comparisons"])
  assert any("fewer than the 50" in w for w in summary["warnings"])
  assert "isa-0.1 against random-0.1" in ended.out
  text = terminal.study_text(summary).splitlines()
  assert len(text) <= 25 and any("all-1-as-0.1" in x for x in text)
  assert text[2].split()[-1] == "FLOP"  # selecting counted
  html = (tmp_path / "report.html").read_text()
  assert "Quality for its cost" in html and "Against random-0.1" in html
  # The lengths of the control are those of the chosen rows, bin by bin.
  tokens = {
    r["id"]: len(r["chosen"].split()) + len(r["rejected"].split())
    for r in tables.read_table(tmp_path / "shared/data/pool.parquet")
  }
  run_of = lambda name, seed=0: tmp_path / f"runs/{name}-0.1-seed{seed}"
  ids = lambda name: tables.read_column(run_of(name) / "subset.parquet", "id")
  mean = lambda name: np.mean([tokens[i] for i in ids(name)])
  assert mean("length_matched") == pytest.approx(mean("isa"), rel=0.1)
  seeds = [(run_of("isa", s) / "metrics.jsonl").read_text() for s in (0, 1)]
  assert seeds[0] != seeds[1]
  again = run()
  assert again.code == 0 and not jobs.did(again)
  # More seeds: the arms that are there stay, shared stages too.
  more = run("seeds=3", "compare=('random',)")
  stages = "select selection_report ref_logps align evaluate export report"
  assert more.code == 0
  assert jobs.did(more) == [*stages.split() * 2, "report"]


@pytest.mark.slow
def test_a_plateau_end_to_end(tmp_path):
  ended = jobs.run(tmp_path, config="plateau.py:tiny")
  assert ended.code == 0, ended
  fit = jobs.load(tmp_path / "fit.json")
  assert sorted(set(fit["x"])) == [0, 5, 10, 25, 100]
  assert fit["rows"] == [8, 16, 40, 160] * 2
  # Three epochs of 16 rows are six updates of eight, and four are allowed.
  assert [w for w in fit["words"] if "Subsets of 10 % and more" in w]
  costs = jobs.load(tmp_path / "summary.json")["ledger"]
  lines = costs["stages"]
  of = lambda stage: [x["flops"] for x in lines if x["stage"] == stage]
  (embedding,), drawn = of("embed"), of("select")  # all but the draws
  assert drawn == [8 * 160 * 2] * len(drawn)
  total = sum(x["flops"] for x in lines)
  wanted = (embedding + sum(drawn)) / total
  assert costs["selection_share"] == pytest.approx(wanted)
  saved = [f"random-{b}-seed0" for b in ("0.05", "0.1", "0.25")]
  assert {x["arm"] for x in costs["saved"]} == {*saved}
  html = (tmp_path / "report.html").read_text()
  assert "How it grows with data" in html and "b is set by" in html
  small, middle, large = (
    tables.read_column(tmp_path / f"runs/random-{b}-seed1/subset.parquet", "id")
    for b in ("0.05", "0.1", "0.25")
  )
  assert small == middle[:8] and middle == large[:16]  # nested


@pytest.mark.slow
def test_samplers_side_by_side_end_to_end(tmp_path):
  ended = jobs.run(tmp_path, config="compare.py:tiny")
  assert ended.code == 0, ended
  summary = jobs.load(tmp_path / "summary.json")
  assert [len(x["rows"]) for x in summary["ranking"]] == [3, 3]
  html = (tmp_path / "report.html").read_text()
  assert "Ranking at" in html and "Ranks left open" in html


@pytest.mark.parametrize(
  "change",
  [{}, dict(budgets=(0.1, 0.2)), dict(compare=("random", "real", "ifd"))],
)
def test_the_question_names_the_loss_as_it_is_typed(change):
  c = common.base()
  c.update(change)
  recipe.settle(c)
  arms = [dict(rows=n, is_all=False, sampler="isa") for n in (16, 32)]
  for text in title_and_question(c, arms, "160 pairs"):
    assert "dpo(beta=0.5)+0.2*sft" in text
