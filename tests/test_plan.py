"""The dry run: bytes against real arrays; what it prints and leaves behind."""

import json
import os
import re
import subprocess
import sys
import types

from conftest import ROOT
import jax
import jobs
from models import make_mesh, sized
import numpy as np
import pytest

from configs import common
from jaxalign import pipeline
from jaxalign.core import devices
from jaxalign.core.errors import ConfigError
from jaxalign.embed import over_pool as passes
from jaxalign.model import decoder, memory
from jaxalign.select import choose
from jaxalign.study import plan
from jaxalign.study.arms import arms_of
from jaxalign.train import optim, step

M = sized(3, 32, 4, 2, 8, 40, 48, 16, tied=False)


def on_one_device(tree):
  return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def held_by(m, mesh, rows=16, length=16, chunk=8):
  return memory.train_step(m, mesh, memory.StepShape(rows, length, chunk))


def test_memory_of_the_state_is_what_a_device_holds():
  mesh = make_mesh(4, 2)
  held = held_by(M, mesh)
  tx = optim.make_optimizer(clip=1.0, weight_decay=0.0, b2=0.98)
  with jax.set_mesh(mesh):
    params = decoder.init(jax.random.key(0), M)
    state = step.init_state(params, tx).opt_state
  assert held["parameters"] == on_one_device(params)
  assert held["gradients"] == held["parameters"]
  moments = [x for x in jax.tree.leaves(state) if x.ndim]
  assert held["optimizer"] == on_one_device(moments)


def test_memory_of_a_step_by_hand():
  m = sized(2, 4, 2, 1, 2, 3, 10, 16, remat="full")
  held_of = lambda **change: held_by(m._replace(**change), make_mesh(), 6, 5, 2)
  held = held_of()
  # A layer: q, o 4x4, k, v 4x2, three of 4x3, two norms of 4: 92. The table is
  # 10x4 and tied, the last norm 4.
  assert held["parameters"] == 4 * (2 * 92 + 44)
  # One vector of 4 a token and layer.
  assert held["activations"] == 2 * 30 * 4 * 4
  # A layer again: 6x4 + 4x4 + 3x3 numbers a token, scores of 2 heads with
  # 5 positions twice, weights with their gradients.
  layer = 8 * 92 + 30 * (49 * 4 + 10 * 8)
  # The head: two arrays of logits for 2 positions of 6 rows, weights with
  # their gradients, hidden states with theirs.
  head = 2 * 4 * 6 * 2 * 10 + 8 * 40 + 8 * 30 * 4
  assert (layer, head) == (9016, 2240)
  assert held["logits"] == 2 * 4 * 6 * 2 * 10
  assert held["workspace"] + held["logits"] == 9016
  wide, head = held_of(vocab=200), 2 * 4 * 6 * 2 * 200 + 8 * 800 + 960
  assert wide["workspace"] + wide["logits"] == head == 26560
  # Rematerialisation keeps less and needs more at once.
  none, dots, full = (held_of(remat=r) for r in ("none", "dots", "full"))
  assert none["activations"] > dots["activations"] > full["activations"]
  assert none["workspace"] < full["workspace"]
  half = held_of(dtype="bfloat16")
  assert half["activations"] == held["activations"] // 2
  assert half["parameters"] == held["parameters"]


def test_the_mesh_divides_memory():
  one, four, eight = (
    held_by(M, make_mesh(*shape)) for shape in ((1, 1), (4, 1), (4, 2))
  )
  whole = 4 * decoder.parameter_count(M)
  norms = 4 * M.width * (2 * M.layers + 1)  # on every device
  assert one["parameters"] == whole
  assert four["parameters"] == (whole - norms) // 4 + norms
  assert eight["parameters"] == (whole - norms) // 8 + norms
  assert four["activations"] == one["activations"] // 4


def a_device(kind):
  return types.SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
  "kind, size",
  [("TPU v5 lite", 16), ("TPU v5", 95), ("TPU v6 lite", 32), ("cpu", None)],
)
def test_the_memory_of_a_device(kind, size):
  device = a_device(kind)
  assert devices.memory_of(device) == (size and size * 2**30)
  device.memory_stats = lambda: dict(bytes_limit=7)
  assert devices.memory_of(device) == 7


def test_what_cannot_fit_is_refused_with_its_parts():
  names = "parameters gradients optimizer activations logits workspace".split()
  held = {n: k * 2**30 for n, k in zip(names, (4, 4, 8, 2, 1, 1))}
  small = a_device("TPU v5 lite")  # 16 GiB
  words = (
    r"about 20.0 GiB a device \(parameters 4.0 GiB, .* a TPU v5 lite has "
    "16.0 GiB; raise config.mesh.fsdp"
  )
  with pytest.raises(ConfigError, match=words):
    memory.check_fits(held, small)
  memory.check_fits(held, small, force=True)
  half = held | dict(optimizer=6 * 2**30)  # of the estimate
  memory.check_fits(half, small)
  with pytest.raises(ConfigError):
    memory.check_fits(half | dict(optimizer=6 * 2**30 + 1), small)
  memory.check_fits(held, a_device("cpu"))


@pytest.mark.parametrize(
  "kind, rate",
  [
    ("TPU v5 lite", 79e12),
    ("TPU v5", 184e12),
    ("TPU v6 lite", 367e12),
    ("TPU v4", 110e12),
    ("NVIDIA H200", 396e12),
    ("NVIDIA A100-SXM4-80GB", 125e12),
    ("cpu", devices.CPU),
    ("a kind that is not known", devices.CPU),
  ],
)
def test_the_rate_of_a_device(kind, rate):
  found = devices.sustained_flops(a_device(kind))
  assert found == pytest.approx(rate, rel=0.003)


def dry_run(folder, *flags):
  """Starts a dry run of the small world in a folder of its own."""
  (folder / "work").mkdir(parents=True)
  command = "-m jaxalign.main --config=configs/dpo_sub.py:smoke --dry_run"
  return subprocess.Popen(
    [
      *(sys.executable, *command.split(), f"--workdir={folder}/work"),
      *("--config.compile_cache=", *flags),
    ],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=os.environ | dict(HOME=str(folder)),
  )


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
  """The output of two dry runs: the built-in world, and a file of pairs."""
  folder = tmp_path_factory.mktemp("plan")
  source = jobs.write_pairs(folder / "pairs.jsonl", 400)
  flags = (
    f"--config.data.source={source}",
    "--config.select.budget=0.5",
    "--config.compare=('random',)",
  )
  runs = dict(
    world=dry_run(folder / "world"), file=dry_run(folder / "file", *flags)
  )
  out = {}
  for name, process in runs.items():
    out[name] = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out[name]
    # Nothing computed, so nothing written: neither there nor at home.
    assert [p for p in (folder / name).rglob("*") if p.is_file()] == []
    assert list((folder / name / "work").iterdir()) == []
  return out


def stages_of(text):
  """Stage -> (count, unit, flops), as printed."""
  return {
    name.strip(): (int(count.replace(",", "")), unit, float(flops))
    for name, count, unit, flops in re.findall(
      r"^  (\S.{27}) *([\d,]+) (\w+) +(\S+) flops  about", text, re.MULTILINE
    )
  }


def test_a_dry_run_prints_the_whole_job(plans):
  text = plans["world"]
  stages = stages_of(text)
  assert list(stages)[:4] == ["sft", "embed", "mixture", "baseline"]
  for arm in ("isa-0.1-seed0", "random-0.1-seed0", "all-1-seed0"):
    assert {f"align {arm}", f"evaluate {arm}"} <= set(stages)
  assert stages["sft"][:2] == (500, "updates")
  assert stages["embed"][:2] == (8000, "rows")  # 4000 pairs
  # A tenth is 400 pairs: 12.5 batches of 32 an epoch, three epochs.
  assert stages["align isa-0.1-seed0"][:2] == (38, "updates")
  assert stages["align all-1-seed0"][:2] == (125, "updates")
  total = float(re.search(r"in all +(\S+) flops", text)[1])
  np.testing.assert_allclose(
    total, sum(s[2] for s in stages.values()), rtol=0.02
  )
  # Training on all: three forward passes over 125 batches of 64 answers, each
  # of which cost the embedding pass one.
  np.testing.assert_allclose(
    stages["align all-1-seed0"][2] / stages["embed"][2],
    3 * 125 * 64 / 8000,
    rtol=0.02,
  )
  # Before anything runs, what choosing takes, of every sampler.
  chosen = dict(re.findall(r"choosing by (\S+): (\S+) flops", text))
  assert list(chosen) == ["isa-0.1", "random-0.1", "all-1"]
  np.testing.assert_allclose(
    float(chosen["isa-0.1"]),
    stages["embed"][2]
    + stages["mixture"][2]
    + stages["select isa-0.1-seed0"][2],
    rtol=0.02,
  )
  assert re.search(
    r"choosing by isa-0.1: .*\(embed, mixture, select\), about "
    r"\S+; reads 62.5 KiB, holds \S+ KiB, 0.0 KiB on the",
    text,
  )
  assert "choosing by random-0.1: " in text and "(select), about" in text
  words = "nothing computed|memory a device|parameters|optimizer|activations"
  for word in f"{words}|GFLOP/s|'fsdp': 8".split("|"):
    assert word in text


def test_a_dry_run_of_a_file_counts_its_rows(plans):
  stages = stages_of(plans["file"])
  assert not any(name.startswith("align all") for name in stages)
  # 400 pairs: a quarter for the reference, three fifths to choose from.
  split = dict(re.findall(r"([\d,]+) (sft|pool|held_out)", plans["file"]))
  split = {name: int(n.replace(",", "")) for n, name in split.items()}
  assert sum(split.values()) == 400
  assert abs(split["pool"] - 240) < 30
  assert stages["embed"][:2] == (2 * split["pool"], "rows")
  kept = int(0.5 * split["pool"])
  assert stages["align isa-0.5-seed0"][:2] == (-(-3 * kept // 32), "updates")


def a_job(sampler, compare=(), **knobs):
  """A job of the tiny world that is only planned."""
  c = common.base("tiny")
  c.select.sampler, c.compare = sampler, compare
  for name, value in knobs.items():
    section, _, knob = name.partition("__")
    c[section].update({knob: value})
  return pipeline.make_job(c, make_mesh(), "nowhere"), arms_of(c)


ROWS = dict(sft=200, pool=160, held_out=40)
TOKENS = dict.fromkeys(ROWS, 14.0)
SIZES = plan.DataSizes(ROWS, TOKENS)


def planned(job, arms):
  return {(x.stage, x.arm): x for x in plan.plan_lines(job, arms, SIZES)}


def test_stages_that_samplers_read_are_planned_by_hand():
  job, arms = a_job(
    "ifd",
    ("ask_llm", "implicit_margin", "selective_dpo"),
    proxy__models=6,
    ask__context=384,
  )
  found = planned(job, arms)
  # Width 32, one layer, 2 heads of 16, 64 between; 512 pieces.
  layer = 2 * (4 * 32 * 32 + 3 * 32 * 64)
  row = lambda t, logits: layer * t + 4 * 32 * t * t + 2 * 32 * 512 * logits
  assert found["embed", ""].flops == 320 * row(14, 14)
  assert found["alone", ""].flops == 320 * row(8, 8)
  question = int(14 + (len(job.c.ask.question) + 64) / 3)
  assert found["ask", ""].flops == 320 * row(question, 1)
  # Four updates of eight pairs, forward and backward; the pool once.
  assert found["proxy", ""].flops == (3 * 4 * 16 + 320) * row(14, 14)
  # Six models, each once over its half, 80 pairs, and once over the pool.
  assert found["held_out", ""].flops == 6 * (3 * 10 * 16 + 320) * row(14, 14)
  assert ("mixture", "") not in found and ("rewards", "") not in found
  for arm in arms:
    assert found["select", arm.name].seconds > 0
    assert found["select", arm.name].held > 0
  rate = devices.sustained_flops(job.mesh.devices.flat[0])
  np.testing.assert_allclose(
    found["proxy", ""].seconds * rate, found["proxy", ""].flops
  )


@pytest.mark.parametrize(
  "loss,online,rank,passes",
  [
    ("dpo", False, 0, 3 * 3 + 1),
    ("dpo", True, 0, 3 * 4),
    ("simpo", False, 0, 3 * 3),
    # Adapters: no gradients of the frozen weights; attention moves both ways.
    ("dpo", False, 2, (3 * 2 + 1, 3 * 3 + 1)),
    # A mismatched row beside each, by both models; the pass that finds delta.
    ("kto", False, 0, 3 * (3 + 2) + 1),
    ("kto", True, 0, 3 * (4 + 2)),
    ("bco", False, 0, 3 * 4 + 1),
  ],
)
def test_what_aligning_on_the_whole_pool_takes(loss, online, rank, passes):
  job, _ = a_job(
    "isa",
    loss__name=loss,
    lora__rank=rank,
    train__epochs=3,
    train__reference="online" if online else "stored",
  )
  weights, squares = passes if rank else (passes, passes)
  # Width 32, one layer, 2 heads of 16, 64 between; 512 pieces.
  row = (
    weights * (2 * (4 * 32 * 32 + 3 * 32 * 64) * 14 + 2 * 32 * 512 * 14)
    + squares * 4 * 32 * 14 * 14
  )
  answers = 160 if loss in ("kto", "bco") else 320
  assert plan.aligning_all(job, plan._model(job.c), 160, 14) == answers * row


def test_a_choice_runs_where_its_sampler_does(monkeypatch):
  """Its keywords count, and each part at the rate of what it runs on."""
  rows = ROWS | dict(pool=200_000)
  seconds = lambda job, arms: {
    x.arm: x.seconds
    for x in plan.plan_lines(job, arms, plan.DataSizes(rows, TOKENS))
    if x.stage == "select"
  }
  rest = 200_000 * (choose.SECONDS_A_ROW + 2 * 4 * 32 / choose.READING)
  names = ("facility_location", "facility_location(exact=True)")
  drawn, exact = seconds(*a_job(names[0], names[1:])).values()
  work, rate = 2 * 200_000**2 * 32, devices.CPU
  np.testing.assert_allclose(drawn - rest, work * np.log(20) / rate)
  np.testing.assert_allclose(exact - rest, work / rate)
  # On an accelerator the drawn form is faster, the exact one is not.
  fast = lambda device: 100 * rate
  monkeypatch.setattr(devices, "sustained_flops", fast)
  fast, same = seconds(*a_job(names[0], names[1:])).values()
  np.testing.assert_allclose(fast - rest, work * np.log(20) / rate / 100)
  assert same == exact
  job, arms = a_job(names[0])
  job.c.select.kwargs = dict(blocks=50, epsilon=0.2)
  got = choose.estimate(job, arms[0], 200_000, 32, 32)
  np.testing.assert_allclose(  # exact inside blocks of 4,000 rows
    got.on_host, work / 50
  )
  assert got.flops < work / 10 and got.device == 4 * (1 << 17) * 32


def test_a_closed_form_is_fitted_once():
  """Of ten starts and the card's refits each is the same."""

  def count(components):
    mixture = dict(starts=10, components=components)
    knobs = dict(select__mixture=mixture, select__stability_seeds=3)
    return {x.stage: x for x in plan.plan_lines(*a_job("isa", **knobs), SIZES)}

  many, once = count("2"), count("labels")
  # All rows, and the half that is scored on the other.
  assert (many["mixture"].count, once["mixture"].count) == (10 * 5, 2)
  assert many["select"].flops == 4 * once["select"].flops > 0


def test_a_word_for_a_number_is_named_before_anything_runs():
  job, arms = a_job("dpp", select__kwargs=dict(blocks="many"))
  with pytest.raises(
    ConfigError,
    match="'dpp' cannot work with its keywords .*; set config.select.kwargs",
  ):
    plan.plan_lines(job, arms, SIZES)


def test_a_choice_of_days_is_refused_before_anything_is_embedded(
  tmp_path, monkeypatch
):
  """160 pairs, 16 of them kept, 32 numbers: 2 * 160 * 16 * 32 flops."""
  run = lambda *more: jobs.run(
    tmp_path / "work", "select.sampler=k_center", "compare=()", *more
  )
  monkeypatch.setattr(devices, "CPU", 1.0)
  hours = 2 * 160 * 16 * 32 / 8 / 3600  # on eight devices
  monkeypatch.setattr(choose.vectors, "HOURS", hours / 1.001)
  ended = run()
  assert ended.code == 64 and re.search(
    r"'k_center' would take about 6 hours to choose from 160 rows, 1.64e\+05 "
    r"flops, above the 5.68\d* .*blocks.*budget.*density",
    ended.err,
  )
  made = sorted(p.name for p in (tmp_path / "work/shared").iterdir())
  assert made == ["data"]  # no model was trained, no row embedded
  for factor, refuses in ((1 / 1.001, True), (1.001, False)):
    monkeypatch.setattr(choose.vectors, "HOURS", hours * factor)
    ended = run("--dry_run")
    words = "a job refuses so long a selection"
    assert ended.code == 0 and (words in ended.out) == refuses


@pytest.mark.parametrize("layers", [0, 1])
def test_one_pass_is_planned_by_what_each_stage_adds(layers):
  job, arms = a_job(
    "crossfit",
    ("real", "implicit_margin"),
    model__layers=2,
    embed__layers=layers,
  )
  found = planned(job, arms)
  layer = 2 * 14 * (4 * 32 * 32 + 3 * 32 * 64) + 4 * 32 * 14 * 14
  head = 2 * 32 * 512 * 14
  wanted = dict(embed=2 * layer + head, answer=0, residual=2 * head)
  if layers:
    wanted = dict(embed=layer, logps=layer + head, answer=0, residual=2 * head)
  got = {s: found[s, ""].flops for s in passes.KEEPS if (s, "") in found}
  assert got == {s: 320 * x for s, x in wanted.items()}
  # What an arm alone would take, and not what others have left of it.
  alone = lambda arm: {
    x.stage: x.flops for x in plan._selecting(job, arm, SIZES) if not x.arm
  }
  whole = 320 * (2 * layer + 3 * head)
  assert sum(alone(arms[0]).values()) == whole
  assert alone(arms[1]) == dict(answer=320 * layer * (1 if layers else 2))
  # Proxies start from what the pass has said; so do the kept rows of arms
  # that read it.
  assert found["proxy", ""].flops == (3 * 4 * 16 + 320) * (2 * layer + head)
  rows = {arm.sampler: ("ref_logps", arm.name) in found for arm in arms}
  assert rows == dict(crossfit=False, real=bool(layers), implicit_margin=False)


def test_a_reward_model_is_planned(tmp_path):
  config = dict(
    architectures=["BertForSequenceClassification"],
    model_type="bert",
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    vocab_size=9,
    max_position_embeddings=40,
    id2label={"0": "reward"},
  )
  (tmp_path / "config.json").write_text(json.dumps(config))
  job, arms = a_job("external_margin", rewards__checkpoint=str(tmp_path))
  layer = 2 * (4 * 8 * 8 + 2 * 8 * 12) * 14 + 4 * 8 * 14 * 14
  wanted = 320 * (2 * layer + 2 * 8 * 8 + 2 * 8)
  assert planned(job, arms)["rewards", ""].flops == wanted
