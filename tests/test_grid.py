"""Jobs side by side: their commands, and what may be said of them."""

import json

import jobs
import numpy as np
import pytest
from scipy import stats

from jaxalign.cli import grid
from jaxalign.core.errors import DataError
from jaxalign.data import world as world_lib
from jaxalign.eval import equivalence
from jaxalign.report import study_page, terminal


def flags(folder, *more):
  return [
    "grid",
    f"--config={jobs.ROOT}/configs/compare.py:tiny",
    f"--workdir={folder}",
    "--worlds=natural,junk",
    "--seeds=3,4",
    *more,
  ]


def test_the_command_of_a_job(tmp_path):
  values, passed = grid.parse_grid(flags(tmp_path, "--config.train.epochs=1"))
  cells = grid.cells_of(values)
  pairs = [("natural", 3), ("junk", 3), ("natural", 4), ("junk", 4)]
  assert cells == pairs
  first, second = (grid.command_of(values, passed, c) for c in cells[:2])
  assert first[4].endswith("compare.py:tiny")
  assert second[4].endswith("compare.py:tiny,junk")
  own = "seeds=1 seed=3 data.seed=3 train.epochs=1".split()
  wanted = [f"--config.{knob}" for knob in own]
  assert {*wanted, f"--workdir={tmp_path}/junk/seed3"} <= {*second}


@pytest.mark.parametrize(
  "change,said",
  [
    ("--seeds=", "no seeds"),
    ("--seeds=1,x", "whole numbers"),
    ("--worlds=../x", "is no name"),
    ("--config=none.py", "does not exist"),
    ("--what=1", "Unknown command line flag"),
  ],
)
def test_wrong_flags(tmp_path, capsys, change, said):
  assert grid.main(flags(tmp_path, change)) == 64
  assert said in capsys.readouterr().err


def job(folder, cell, arms, start=0.25):
  """Writes what a finished job leaves, as far as a grid reads it."""
  names = {label: f"{label}-seed{cell.seed}" for label in arms}
  rows = [
    dict(
      name=names[label],
      seed=cell.seed,
      rows=40,
      sampler=label.rpartition("-")[0],
      budget=0.1,
      is_all=False,
      metrics=dict(
        win_vs_target=dict(value=v, n=200), malformed=dict(value=0.0)
      ),
    )
    for label, v in arms.items()
  ]
  totals = {name: dict(total=20) for name in names.values()}
  out = dict(arms=rows, ledger=dict(arms=totals, everything=100))
  out["baseline"] = dict(win_vs_target=dict(value=start))
  at = folder / cell.folder
  at.mkdir(parents=True)
  (at / "summary.json").write_text(json.dumps(out))
  (at / "config.json").write_text(json.dumps(dict(data=dict(source="x"))))


def test_differences_are_paired_by_seed(tmp_path):
  """Against scipy's paired t test and Student's interval, Holm by hand."""
  rng = np.random.default_rng(0)
  values, _ = grid.parse_grid(flags(tmp_path, "--seeds=1,2,3,4,5", "--norun"))
  cells = grid.cells_of(values)
  told = {w: rng.uniform(0.2, 0.6, (3, 5)) for w in ("natural", "junk")}
  told["natural"][1] = told["natural"][0] + 0.1 + 0.01 * rng.normal(size=5)
  for cell in cells:
    x = told[cell.world][:, cell.seed - 1]
    job(tmp_path, cell, {"random-0.1": x[0], "isa-0.1": x[1], "real-0.1": x[2]})
  found = grid.summarise(values, cells)
  assert not found["missing"]
  for world in found["worlds"]:
    x = told[world["world"]]
    p = [stats.ttest_rel(x[i], x[0]).pvalue for i in (1, 2)]
    small, large = sorted(p)
    holm = {small: min(1, 2 * small), large: min(1, max(2 * small, large))}
    for i, v in enumerate(world["verdicts"], 1):
      d = x[i] - x[0]
      half = stats.t.ppf(0.975, 4) * d.std(ddof=1) / np.sqrt(5)
      assert v["label"] == ("isa-0.1", "real-0.1")[i - 1]
      np.testing.assert_allclose(
        [v["difference"][k] for k in ("value", "low", "high")],
        [d.mean(), d.mean() - half, d.mean() + half],
        atol=1e-12,
      )
      np.testing.assert_allclose(v["p_differ"], holm[p[i - 1]], rtol=1e-9)
    assert world["arms"][0]["cost"] == 0.2
  assert found["worlds"][0]["verdicts"][0]["verdict"] == "better"
  (pooled,) = (o for o in found["pooled"] if o["label"] == "real-0.1")
  d = np.mean([told[w][2] - told[w][0] for w in told], axis=0)
  assert np.isclose(pooled["difference"]["value"], d.mean())
  assert pooled["cells"] == 10
  html = study_page.grid_html(json.loads(json.dumps(found)))
  assert "isa-0.1" in html and "better" in html
  assert "isa-0.1" in terminal.grid_text(found)


def test_a_missing_job_is_named_and_another_seed_refused(tmp_path):
  values, _ = grid.parse_grid(flags(tmp_path, "--norun"))
  cells = grid.cells_of(values)
  job(tmp_path, cells[0], {"random-0.1": 0.4, "isa-0.1": 0.5})
  found = grid.summarise(values, cells)
  assert found["missing"] == ["junk/seed3", "natural/seed4", "junk/seed4"]
  assert found["worlds"][0]["verdicts"][0]["verdict"] == "withheld"
  assert study_page.grid_html(json.loads(json.dumps(found)))
  summary = grid.read_summaries(tmp_path, cells)[cells[0]]
  with pytest.raises(DataError, match="no win rate of seed 9"):
    grid.arm_results(summary, 9, "natural/seed3")


@pytest.mark.parametrize("seeds,effect", [(5, 0.0), (8, 0.06)])
def test_intervals_cover_and_planted_differences_are_found(seeds, effect):
  """Seeds that differ by more than their prompts' chance, 1,000 studies."""
  rng = np.random.default_rng(seeds)
  covered, verdicts = [], []
  for _ in range(1000):
    rate = rng.normal(0.4, 0.05, seeds)
    own = rng.normal(effect, 0.015, seeds)  # of the difference, by seed
    a, b = (
      rng.binomial(500, np.clip(r, 0, 1)) / 500 for r in (rate + own, rate)
    )
    arms = tuple(
      equivalence.ArmOutcomes(
        name, range(seeds), range(500), np.repeat(v[:, None], 500, axis=1)
      )
      for name, v in (("a", a), ("b", b))
    )
    (one,) = equivalence.compare_arms([arms], nested=True)
    d = one["difference"]
    covered.append(d["low"] <= effect <= d["high"])
    verdicts.append(one["verdict"])
  assert 0.93 <= np.mean(covered) <= 0.97
  found = np.mean([v == "better" for v in verdicts])
  if effect:
    assert found >= 0.95
  else:
    assert np.mean([v in ("better", "worse") for v in verdicts]) <= 0.07


def test_faults_are_wrong_labels_and_junk():
  world = world_lib.build_world(
    jobs.common.base("tiny").data.world.to_dict(), 0
  )
  rows = [dict(r) for r in world_lib.generate_rows(world, 0)["pool"][:40]]
  value = lambda row, side: world_lib.reward(world, row["prompt"], row[side])
  gain = lambda row: value(row, "chosen") - value(row, "rejected")
  turn = lambda row: row.update(chosen=row["rejected"], rejected=row["chosen"])
  for row in rows:  # all right
    if gain(row) < 0:
      turn(row)
  assert world_lib.faults(world, rows) == dict(wrong=0.0, junk=0.0)
  differ = [r for r in rows if gain(r) > 0]
  turn(differ[0])
  differ[1].update(chosen="x", rejected="y")
  assert world_lib.faults(world, rows) == dict(wrong=1 / 40, junk=1 / 40)


@pytest.mark.slow
def test_a_grid_of_tiny_jobs_runs_once(tmp_path, capsys):
  say = flags(
    tmp_path,
    f"--config.compile_cache={jobs.folder()}/xla",
    "--seeds=3",
    "--processes=2",
    "--config.budgets=(0.1,)",
  )
  assert grid.main(say) == 0
  told = capsys.readouterr().out
  assert "junk/seed3: done" in told and "2 of 2" in told
  for world in ("natural", "junk"):
    assert (tmp_path / world / "seed3" / "summary.json").exists()
  found = json.loads((tmp_path / "grid.json").read_text())
  assert {a["label"] for a in found["worlds"][0]["arms"]} == {
    "isa-0.1",
    "random-0.1",
    "k_center-0.1",
  }
  junk = found["worlds"][1]["arms"]
  assert max(a["junk"] for a in junk) > 0
  before = (tmp_path / "junk/seed3/summary.json").stat().st_mtime_ns
  assert grid.main(say) == 0
  assert (tmp_path / "junk/seed3/summary.json").stat().st_mtime_ns == before
