"""Selection alone and training alone, as commands and in a notebook."""

import jobs
import numpy as np
import pytest

from jaxalign.cli import select as select_main
from jaxalign.cli import train
from jaxalign.data import tables
from jaxalign.select.pool import make_pool, Selection
from jaxalign.select.samplers import SAMPLERS


@pytest.fixture
def source(tmp_path):
  """300 pairs whose better answer says "good"."""
  return jobs.write_pairs(tmp_path / "pairs.jsonl", 300)


def split(sft, pool, held_out):
  sizes = dict(sft=sft, pool=pool, held_out=held_out)
  return [f"data.split.{name}={size}" for name, size in sizes.items()]


def select(folder, source, *more):
  """Runs the command; returns (ended, ids chosen, best first)."""
  output = folder / "out" / "subset.parquet"
  ended = jobs.run(
    None,
    f"data.source={source}",
    f"--output={output}",
    *more,
    config="select.py:tiny",
    command=select_main.main,
  )
  return ended, (tables.read_column(output, "id") if ended.code == 0 else [])


def test_rows_in_chosen_rows_out(tmp_path, source):
  """Without a forward pass; again, nothing is computed."""
  flags = ("select.sampler=crossfit_lite", "select.budget=30")
  ended, ids = select(tmp_path, source, *flags)
  assert ended.code == 0, ended
  assert len(ids) == len(set(ids)) == 30
  folder = tmp_path / "out" / "subset.jaxalign"
  assert not (folder / "shared" / "sft").exists()
  assert not (folder / "shared" / "embed").exists()
  pool = tables.read_table(folder / "shared/data/pool.parquet")
  assert len(pool) == 300  # nothing is held out
  arm = folder / "runs" / "crossfit_lite-30-seed0"
  assert (arm / "selection.html").exists()
  scores = tables.read_table(arm / "scores.parquet")
  best = sorted((s for s in scores if s["selected"]), key=lambda s: s["rank"])
  assert [s["id"] for s in best] == ids
  again, same = select(tmp_path, source, *flags)
  assert same == ids and "select: finished before" in again.out


@pytest.mark.slow
def test_a_model_is_trained_where_one_must_embed(tmp_path, source):
  ended, ids = select(tmp_path, source, "select.budget=0.1")
  assert ended.code == 0, ended
  assert len(ids) == 30
  folder = tmp_path / "out" / "subset.jaxalign"
  assert (folder / "shared" / "sft" / "checkpoints").exists()
  ended, other = select(
    tmp_path, source, "select.budget=0.1", "select.sampler=k_center"
  )
  assert ended.code == 0 and "embed: finished before" in ended.out
  assert set(other) != set(ids)


@pytest.mark.slow
def test_a_subset_trains_alone(tmp_path, source):
  _, ids = select(tmp_path, source, "select.sampler=random", "select.budget=40")
  work = tmp_path / "alone"
  ended = jobs.run(
    work, f"data.source={tmp_path}/out/subset.parquet", command=train.main
  )
  assert ended.code == 0, ended
  arm = work / "runs" / "all-1-seed0"
  assert (arm / "export" / "model.safetensors").exists()
  assert not (arm / "eval.json").exists()
  lines = jobs.lines(arm / "metrics.jsonl")
  assert abs(lines[0]["train/preference_loss"] - np.log(2)) < 1e-5
  trained = tables.read_column(arm / "subset.parquet", "id")
  assert len(trained) == len(ids) == 40
  measured = jobs.run(
    tmp_path / "measured",
    f"data.source={source}",
    *split(0.3, 0.4, 0.3),
    command=train.main,
  )
  assert measured.code == 0, measured
  assert (tmp_path / "measured/runs/all-1-seed0/eval.json").exists()


@pytest.mark.parametrize(
  "command,flags,said",
  [
    (select_main.main, ["data.source=x.jsonl"], "set --output=subset.parquet"),
    (
      select_main.main,
      ["data.source=x.jsonl", "--output=x.json"],
      "wanted a .parquet",
    ),
    (train.main, ["data.source=world"], "has rows of its own"),
  ],
)
def test_what_a_command_cannot_work_with(tmp_path, command, flags, said):
  ended = jobs.run(tmp_path, *flags, config="select.py:tiny", command=command)
  assert ended.code == 64 and said in ended.err, ended


def test_a_study_holds_rows_out(tmp_path, source):
  ended = jobs.run(
    tmp_path / "w", f"data.source={source}", *split(0.3, 0.7, 0.0)
  )
  assert ended.code == 64 and "data.split.held_out=0" in ended.err


def test_samplers_on_arrays(source):
  rng = np.random.default_rng(0)
  pool = make_pool(
    [f"row{i}" for i in range(200)],
    dict(embedding=rng.normal(size=(200, 2, 8))),
  )
  got = SAMPLERS["k_center"](0, pool, 20)
  assert len(set(got.rows.tolist())) == 20


def test_the_page_on_writing_a_sampler_runs():
  """Every block of Python in select/samplers/README.md, in order."""
  text = (jobs.ROOT / "jaxalign/select/samplers/README.md").read_text()
  blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
  assert len(blocks) >= 3
  scope = {}
  for block in blocks:
    exec(compile(block, "select/samplers/README.md", "exec"), scope)
  assert isinstance(scope["selection"], Selection)
