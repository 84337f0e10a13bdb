"""What a fork adds from outside the package: one function, one name."""

import importlib
import json
import textwrap

import jax
import jobs
import numpy as np
from numpy.testing import assert_allclose
import pools as make_pools
import pytest
from test_step import cut, make_mesh, toy, toy_batch, toy_logps, toy_params

from jaxalign.core import sharding
from jaxalign.core.artifacts import Cost
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import schemas, tables
from jaxalign.data.records import load_records, LoadOptions
from jaxalign.eval import judge_kinds
from jaxalign.model import families
from jaxalign.select import columns, costs
from jaxalign.select.pool import checked
from jaxalign.select.samplers import chains
from jaxalign.train import losses, optim, row_columns, statistics, trackers
from jaxalign.train import step as steps
from jaxalign.train.batch import Logps
from jaxalign.train.metrics import divide

SAMPLER = """
from jaxalign.select.costs import of_scores
from jaxalign.select.pool import needs
from jaxalign.select.samplers.values import column, one_side, ranked

@needs("length", cost=of_scores)
def shortest(seed, pool, budget, *, side="chosen"):
  return ranked(-one_side(column(pool, "length"), side), pool, budget)

@needs("length")
def uncounted(seed, pool, budget):
  return shortest(seed, pool, budget)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
  """Writes a module that only sys.path knows."""

  def write(name, text):
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)

  return write


def test_sampler(outside):
  """One function over a column, named as module:function, and in chains."""
  outside("my_sampler", SAMPLER)
  pool, sizes = make_pools.make(2, 200), costs.Sizes(200, 8, 40)
  rejected = pool.length[:, 1]
  for name in (
    "my_sampler:shortest(side=rejected)",
    "gate(column=reward) | my_sampler:shortest(side=rejected)",
  ):
    sampler = chains.find_sampler(name)
    assert "length" in sampler.needs
    got = checked(sampler(0, pool, 40), 200, 40, name)
    assert rejected[got.rows].max() <= np.delete(rejected, got.rows).min()
    assert costs.estimate(sampler, sizes).flops > 0
  both = chains.find_sampler("my_sampler:shortest * ask_llm")
  assert both.needs == ("length", "p_yes")
  # The plan says of one without a cost that it is not known.
  assert (
    costs.estimate(chains.find_sampler("my_sampler:uncounted"), sizes) is None
  )


SCHEMA = """
from jaxalign.data.schemas import Refused, Schema, SCHEMAS

def asked(row):
  if row["ask"] == "skip":
    raise Refused("not wanted", "by the fork")
  return dict(prompt=row["ask"], chosen=row["good"], rejected=row["bad"])

SCHEMAS["asked"] = Schema("asked", asked, ("ask", "good", "bad"))
"""


def test_schema(outside, tmp_path):
  """One function and one line: found by its columns, checked as any other."""
  outside("my_schema", SCHEMA)
  path = tmp_path / "rows.jsonl"
  rows = [("hi", "yo", "no"), ("skip", "a", "b"), ("hi", "same", "same ")]
  named = [dict(zip(("ask", "good", "bad"), row)) for row in rows]
  path.write_text("".join(json.dumps(row) + "\n" for row in named))
  with pytest.raises(DataError, match="no schema fits"):
    load_records(str(path))
  for name in ("my_schema:asked", "auto"):  # importing it adds the line
    found = load_records(str(path), LoadOptions(name, max_bad_fraction=0.9))
    [row] = found.rows
    assert (row["prompt"], row["chosen"], row["rejected"]) == rows[0]
    assert found.counts == {"chosen equals rejected": 1, "not wanted": 1}
    assert found.schema in (name, "asked")
  del schemas.SCHEMAS["asked"]


FAMILY = """
from jaxalign.model.families import Family
from jaxalign.model.families.fields import (
  one_rope, read_sizes, write_one_rope, write_sizes)
from jaxalign.model.families.llama import llama_stored

def read(raw):
  bias = bool(raw["use_bias"])
  sizes = read_sizes(dict(raw, layer_norm_eps=raw["norm_epsilon"]))
  return sizes | one_rope(raw) | dict(
    norm="layer", gated=False, qkv_bias=bias, out_bias=bias, ff_bias=bias,
    windows=(int(raw["sliding_window"] or 0),))

def write(m):
  own = dict(norm_epsilon=m.norm_eps, use_bias=m.qkv_bias)
  window = dict(sliding_window=m.windows[0] or None)
  return write_sizes(m) | write_one_rope(m) | own | window

def stored(m):
  rows = llama_stored(m._replace(norm="rms"))
  for name, s in list(rows.items()):
    theirs = s.name.replace("up_proj", "c_fc").replace("down_proj", "c_proj")
    rows[name] = s._replace(name=theirs)
    if name.endswith("norm"):
      bias = theirs.replace(".weight", ".bias")
      rows[f"{name}_bias"] = s._replace(name=bias)
  return rows

starcoder2 = Family("Starcoder2ForCausalLM", {}, read, write, stored)
"""


def test_family(outside, monkeypatch):
  """One entry: config both ways, logits and gradients as transformers'."""
  test_families = pytest.importorskip("test_families")
  outside("my_family", FAMILY)
  entry = importlib.import_module("my_family").starcoder2
  monkeypatch.setitem(families.FAMILIES, "starcoder2", entry)
  sizes = test_families.sizes(group=2, kv_heads=2, head_size=4)
  keywords = dict(
    sizes,
    hidden_size=16,
    norm_epsilon=1e-3,
    use_bias=True,
    sliding_window=5,
    hidden_act="gelu_pytorch_tanh",
  )
  mesh = test_families.make_mesh()
  test_families.compare("starcoder2", keywords, mesh)


# Training: a loss and what it reads, a tracker.

LOSS = """
import jax
import jax.numpy as jnp
from jaxalign.train.losses import needs
from jaxalign.train.losses.common import margin, pair_metrics, ratios
from jaxalign.train.statistics import Statistic

def mean_margin(whole):
  return jnp.mean(margin(whole.policy - whole.ref))

ENTRY = Statistic(mean_margin, reads="batch_logps")

@needs("pairs", "mean_margin", "age")
def centred(policy, ref, stats, *, beta=0.1):
  r = ratios(policy, ref)
  gap = margin(r) - stats["mean_margin"]
  loss = -stats["age"] * jax.nn.log_sigmoid(beta * gap)
  return loss, pair_metrics(policy, beta * r)
"""


@pytest.mark.parametrize("accumulation", [1, 4])
def test_loss_statistic_and_column(outside, monkeypatch, accumulation):
  """One function, an entry of STATISTICS and one of COLUMNS; then a step."""
  outside("my_loss", LOSS)
  fn = losses.bind(losses.find("my_loss:centred"), "mine", dict(beta=0.5))
  with pytest.raises(ConfigError, match="asks for mean_margin, age, which"):
    row_columns.check_reads(fn, "mine")
  entry = importlib.import_module("my_loss").ENTRY
  monkeypatch.setitem(statistics.STATISTICS, "mean_margin", entry)
  monkeypatch.setitem(row_columns.COLUMNS, "age", None)
  row_columns.check_reads(fn, "mine")
  assert row_columns.columns_of(fn) == ("age",)
  assert statistics.needs_batch_logps(fn)
  batch = toy_batch(2) | dict(age=np.float32(np.arange(16) % 3))
  tx = optim.make_optimizer(clip=0.0, weight_decay=0.0, b2=0.98)
  mesh = make_mesh(4, 2)
  with jax.set_mesh(mesh):
    params = {n: sharding.put(mesh, w, None) for n, w in toy_params().items()}
    state = steps.init_state(params, tx, fn)
    step = steps.make_train_step(toy, fn, tx)
    _, totals = step(state, cut(mesh, batch, accumulation, 0.1))
  params = {n: np.float64(w) for n, w in toy_params().items()}
  r = toy_logps(params, batch["tokens"], batch["mask"]) - batch["ref_sum"]
  gap = r[:, 0] - r[:, 1]
  wanted = batch["age"] * np.logaddexp(0, -0.5 * (gap - gap.mean()))
  loss = divide(jax.device_get(totals))["loss"]
  assert loss == pytest.approx(wanted.mean(), rel=1e-5)


def test_loss_of_the_table(monkeypatch):
  """One line of LOSSES, and it can be summed."""

  @losses.needs("pairs")
  def mine(policy, ref, stats, *, beta=0.1):
    return beta * policy.sum[:, 0], {}

  monkeypatch.setitem(losses.LOSSES, "mine", mine)
  fn = losses.find("0.5*mine(beta=2)+sft")
  assert (fn.kind, fn.stats, fn.reference) == ("pairs", (), True)
  policy = Logps(np.float32([[-4.0, -6.0]]), np.float32([[2, 3]]))
  assert_allclose(fn(policy, None, {})[0], [0.5 * 2 * -4 + 2])


def test_tracker(monkeypatch, tmp_path):
  """One entry of TRACKERS: `(folder, label, start) -> Tracker`."""
  seen = []

  def lists(folder, label, start):
    log = lambda step, values: seen.append((label, start, step, values))
    return trackers.Tracker(log, lambda: seen.append("closed"))

  monkeypatch.setitem(trackers.TRACKERS, "lists", lists)
  run = trackers.open_all(("lists",), tmp_path, "align", 3)
  run.log(4, {"train/loss": 0.5})
  run.close()
  assert seen == [("align", 3, 4, {"train/loss": 0.5}), "closed"]


COLUMN = """
from jaxalign.select.pool import needs
from jaxalign.select.samplers.values import column, ranked

@needs("questions")
def asking(seed, pool, budget):
  return ranked(column(pool, "questions")[:, 0], pool, budget)
"""


def test_column(outside, monkeypatch, tmp_path):
  """One entry: a sampler of a fork reads it, in a job of the command line."""
  outside("my_column", COLUMN)
  count = lambda job: np.array(
    [len(prompt) for prompt in job.column("pool", "prompt")]
  )
  monkeypatch.setitem(columns.COLUMNS, "questions", columns.Column(count))
  flags = (
    "select.sampler=my_column:asking",
    "compare=()",
    "train.max_updates=1",
  )
  ended = jobs.run(tmp_path / "job", *flags)
  assert ended.code == 0, ended
  (arm,) = (tmp_path / "job/runs").iterdir()
  read = lambda name: tables.read_table(arm / name)
  kept = [len(row["prompt"]) for row in read("subset.parquet")]
  assert len(kept) == 16 and kept == sorted(kept, reverse=True)
  assert max(kept) == max(row["score"] for row in read("scores.parquet"))


class _Longer:
  """A judge that prefers the longer answer."""

  knobs, on_mesh, model, files = ("judge.model",), False, "", ()

  def __init__(self, job, folder):
    del job, folder

  def __call__(self, rows, ours, theirs):
    del rows
    lengths = [
      np.array([len(x) for x in side], float) for side in (ours, theirs)
    ]
    return judge_kinds.of_scores(*lengths)

  def cost(self):
    return Cost(), dict(requests=0, tokens=0)

  def keep(self):
    return []


def test_judge(monkeypatch, tmp_path):
  """One entry: config.judge.kind names it, and its wins are the job's."""
  monkeypatch.setitem(judge_kinds.JUDGES, "longer", _Longer)
  flags = ("judge.kind=longer", "judge.model=x", "compare=()")
  ended = jobs.run(tmp_path / "job", *flags, "train.max_updates=1")
  assert ended.code == 0, ended
  (arm,) = (tmp_path / "job/runs").iterdir()
  lines = (arm / "verdicts.jsonl").read_text().splitlines()
  for line in map(json.loads, lines):
    gap = len(line["ours"]) - len(line["theirs"])
    assert line["outcome"] == (gap > 0) + 0.5 * (gap == 0)
