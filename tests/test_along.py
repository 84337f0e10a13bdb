"""The cheap plateau: which checkpoints are points, and that it is labelled."""

import json
import types

import jobs
import numpy as np
import pytest

from configs import plateau as config
from jaxalign.model.job import Arm
from jaxalign.study.curves import checkpoint_curve, checkpoint_points

SHARES = (10, 20, 40, 60, 80, 100)


def made_up(tmp_path, shares=SHARES, batch=16):
  """A job of 160 rows whose arms wrote R(x) = 70 - 50 exp(-x / 20)."""
  arms = [Arm("random", 1.0, 0), Arm("random", 0.1, 0)]
  lines = []
  for step in range(12):  # two rows more than an epoch
    line = dict(step=step, loss=0.5)
    share = 10 * (step + 1)
    if share in (*shares, 110, 120):
      line["eval/generations/win_vs_target"] = (
        70 - 50 * np.exp(-share / 20)
      ) / 100
    lines.append(json.dumps(line))
  for arm in arms:
    folder = tmp_path / "runs" / arm.name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  train = types.SimpleNamespace(batch_size=batch)
  return types.SimpleNamespace(
    workdir=tmp_path,
    c=types.SimpleNamespace(train=train),
    column=lambda split, name: ["id"] * 160,
  ), arms


def test_points_are_of_the_first_epoch_of_the_whole_pool(tmp_path):
  job, arms = made_up(tmp_path)
  found = checkpoint_points(job, arms)
  assert [x for x, _ in found] == list(SHARES)  # the tenth's run has none
  np.testing.assert_allclose(
    [y for _, y in found], 70 - 50 * np.exp(-np.array(SHARES) / 20)
  )


def test_the_curve_is_found_and_labelled(tmp_path):
  job, arms = made_up(tmp_path)
  fit = checkpoint_curve(job, arms, np.array([0.0, 0.0, 1.0, 0.0, 0.0]))
  assert fit["x"][0] == 0 and fit["y"][0] == pytest.approx(20)
  assert [fit[k]["value"] for k in "rab"] == pytest.approx(
    [70, 20, 0.05], rel=1e-3
  )
  assert fit["cheap"] and fit["words"][0].startswith("Along one epoch (check")


def test_too_few_shares_are_no_curve(tmp_path):
  job, arms = made_up(tmp_path, shares=(10, 20, 30))
  assert checkpoint_curve(job, arms, None) is None


@pytest.mark.slow
def test_a_job_ends_with_a_labelled_page(tmp_path):
  ended = jobs.run(tmp_path, config="plateau.py:tiny,along")
  assert ended.code == 0, ended
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert "fit" not in summary  # two budgets are no curve of their own
  assert sorted(set(summary["along"]["x"])) == [0, *range(10, 101, 10)]
  lines = jobs.lines(tmp_path / "runs/all-1-seed0/metrics.jsonl")
  assert (
    summary["along"]["y"][1] == 100 * lines[1]["eval/generations/win_vs_target"]
  )
  # Seed 0 samples as the evaluation does: after the last update, the same.
  ended = json.loads((tmp_path / "runs/all-1-seed0/eval.json").read_text())
  for name in ("win_vs_target", "malformed", "kl"):
    assert lines[-1][f"eval/generations/{name}"] == pytest.approx(
      ended[name]["value"], rel=1e-6
    )
  page = (tmp_path / "report.html").read_text()
  assert "Along one epoch" in page and "Checkpoints of one epoch" in page


def test_the_variant_keeps_a_run_of_its_own():
  c = config.get_config("along")
  assert c.budgets == (0.1, 1.0) and c.train.epochs == 1
