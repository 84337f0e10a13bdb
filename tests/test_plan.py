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
import numpy as np
import pytest

from configs import common
from jaxalign import pipeline
from jaxalign.core import devices, sharding
from jaxalign.core.errors import ConfigError
from jaxalign.embed import over_pool as passes
from jaxalign.model import decoder, memory
from jaxalign.select import choose
from jaxalign.study import plan
from jaxalign.study import run as study  # noqa: F401
from jaxalign.train import optim, step

M = decoder.ModelConfig(
  layers=3,
  width=32,
  heads=4,
  kv_heads=2,
  head_size=8,
  ff=40,
  vocab=48,
  context=16,
  tied=False,
)


def on_one_device(tree):
  return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def test_memory_of_the_state_is_what_a_device_holds():
  mesh = sharding.make_mesh(dict(fsdp=4, tensor=2))
  held = memory.train_step(
    M, mesh, memory.StepShape(rows=16, length=16, chunk=8)
  )
  tx = optim.make_optimizer(clip=1.0, weight_decay=0.0, b2=0.98)
  with jax.set_mesh(mesh):
    params = decoder.init(jax.random.key(0), M)
    state = step.init_state(params, tx).opt_state
  assert held["parameters"] == on_one_device(params)
  assert held["gradients"] == held["parameters"]
  moments = [x for x in jax.tree.leaves(state) if x.ndim]
  assert held["optimizer"] == on_one_device(moments)


def test_memory_of_a_step_by_hand():
  m = decoder.ModelConfig(
    layers=2,
    width=4,
    heads=2,
    kv_heads=1,
    head_size=2,
    ff=3,
    vocab=10,
    context=16,
    remat="full",
  )
  one = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  held = memory.train_step(m, one, memory.StepShape(rows=6, length=5, chunk=2))
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
  wide = memory.train_step(
    m._replace(vocab=200), one, memory.StepShape(rows=6, length=5, chunk=2)
  )
  assert (
    wide["workspace"] + wide["logits"]
    == (2 * 4 * 6 * 2 * 200 + 8 * 800 + 960)
    == 26560
  )
  # Rematerialisation keeps less and needs more at once.
  kept = {
    r: memory.train_step(
      m._replace(remat=r), one, memory.StepShape(rows=6, length=5, chunk=2)
    )
    for r in decoder.REMAT
  }
  assert (
    kept["none"]["activations"]
    > kept["dots"]["activations"]
    > kept["full"]["activations"]
  )
  assert kept["none"]["workspace"] < kept["full"]["workspace"]
  half = memory.train_step(
    m._replace(dtype="bfloat16"),
    one,
    memory.StepShape(rows=6, length=5, chunk=2),
  )
  assert half["activations"] == held["activations"] // 2
  assert half["parameters"] == held["parameters"]


def test_the_mesh_divides_memory():
  sizes = dict(rows=16, length=16, chunk=8)
  held = {
    shape: memory.train_step(
      M,
      sharding.make_mesh(
        dict(fsdp=shape[0], tensor=shape[1]),
        jax.devices()[: shape[0] * shape[1]],
      ),
      memory.StepShape(**sizes),
    )
    for shape in ((1, 1), (4, 1), (4, 2))
  }
  whole = 4 * decoder.parameter_count(M)
  norms = 4 * M.width * (2 * M.layers + 1)  # on every device
  assert held[1, 1]["parameters"] == whole
  assert held[4, 1]["parameters"] == (whole - norms) // 4 + norms
  assert held[4, 2]["parameters"] == (whole - norms) // 8 + norms
  assert held[4, 1]["activations"] == held[1, 1]["activations"] // 4


@pytest.mark.parametrize(
  "kind, size",
  [("TPU v5 lite", 16), ("TPU v5", 95), ("TPU v6 lite", 32), ("cpu", None)],
)
def test_the_memory_of_a_device(kind, size):
  device = types.SimpleNamespace(device_kind=kind)
  assert devices.memory_of(device) == (size and size * 2**30)
  device.memory_stats = lambda: dict(bytes_limit=7)
  assert devices.memory_of(device) == 7


def test_what_cannot_fit_is_refused_with_its_parts():
  gib = 2**30
  held = dict(
    parameters=4 * gib,
    gradients=4 * gib,
    optimizer=8 * gib,
    activations=2 * gib,
    logits=gib,
    workspace=gib,
  )
  small = types.SimpleNamespace(device_kind="TPU v5 lite")  # 16 GiB
  with pytest.raises(
    ConfigError,
    match=(
      r"about 20.0 GiB a device \(parameters 4.0 GiB, .* a TPU v5 lite has "
      "16.0 GiB; raise config.mesh.fsdp"
    ),
  ):
    memory.check_fits(held, small)
  memory.check_fits(held, small, force=True)
  memory.check_fits(held | dict(optimizer=6 * gib), small)  # half the estimate
  with pytest.raises(ConfigError):
    memory.check_fits(held | dict(optimizer=6 * gib + 1), small)
  memory.check_fits(held, types.SimpleNamespace(device_kind="cpu"))


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
  device = types.SimpleNamespace(device_kind=kind)
  assert devices.sustained_flops(device) == pytest.approx(rate, rel=0.003)


def dry_run(folder, *flags):
  """What a dry run says, what it leaves in its folder."""
  folder.mkdir()
  workdir = folder / "work"
  workdir.mkdir()
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "jaxalign.main",
      "--config=configs/dpo_sub.py:smoke",
      f"--workdir={workdir}",
      "--config.compile_cache=",
      "--dry_run",
      *flags,
    ],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=os.environ | dict(HOME=str(folder)),
  )


@pytest.fixture(scope="module")
def said(tmp_path_factory):
  """The output of two dry runs: the built-in world, and a file of pairs."""
  folder = tmp_path_factory.mktemp("plan")
  source = folder / "pairs.jsonl"
  source.write_text(
    "".join(
      json.dumps(
        dict(
          prompt=f"question {i} " + "word " * (i % 7),
          chosen=f" yes, answer {i}",
          rejected=f" no, never {i}",
        )
      )
      + "\n"
      for i in range(400)
    )
  )
  runs = dict(
    world=dry_run(folder / "world"),
    file=dry_run(
      folder / "file",
      f"--config.data.source={source}",
      "--config.select.budget=0.5",
      "--config.compare=('random',)",
    ),
  )
  out = {}
  for name, process in runs.items():
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    out[name] = text
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


def test_a_dry_run_prints_the_whole_job(said):
  text = said["world"]
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
  for words in (
    "nothing computed",
    "memory a device",
    "parameters",
    "optimizer",
    "activations",
    "GFLOP/s",
    "'fsdp': 8",
  ):
    assert words in text


def test_a_dry_run_of_a_file_counts_its_rows(said):
  stages = stages_of(said["file"])
  assert not any(name.startswith("align all") for name in stages)
  # 400 pairs: a quarter for the reference, three fifths to choose from.
  split = dict(re.findall(r"([\d,]+) (sft|pool|held_out)", said["file"]))
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
  mesh = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  job = pipeline.make_job(c, mesh, "nowhere")
  return job, study.arms_of(c)


ROWS, TOKENS = (
  dict(sft=200, pool=160, held_out=40),
  dict.fromkeys(("sft", "pool", "held_out"), 14.0),
)


def test_stages_that_samplers_read_are_planned_by_hand():
  job, arms = a_job(
    "ifd",
    ("ask_llm", "implicit_margin", "selective_dpo"),
    proxy__models=6,
    ask__context=384,
  )
  found = {(x.stage, x.arm): x for x in plan.lines(job, arms, ROWS, TOKENS)}
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
    for x in plan.lines(job, arms, rows, TOKENS)
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
  assert got.flops < work / 10 and got.device == 4 * 200_000 * 32


def test_a_closed_form_is_fitted_once():
  """Of ten starts and the card's refits each is the same."""
  count = lambda job, arms: {
    x.stage: x for x in plan.lines(job, arms, ROWS, TOKENS)
  }
  mixture = dict(starts=10, components="2")
  many = count(
    *a_job("isa", select__mixture=mixture, select__stability_seeds=3)
  )
  once = count(
    *a_job(
      "isa",
      select__mixture=mixture | dict(components="labels"),
      select__stability_seeds=3,
    )
  )
  # All rows, and the half that is scored on the other.
  assert (many["mixture"].count, once["mixture"].count) == (10 * 5, 2)
  assert many["select"].flops == 4 * once["select"].flops > 0


def test_a_word_for_a_number_is_named_before_anything_runs():
  job, arms = a_job("dpp", select__kwargs=dict(blocks="many"))
  with pytest.raises(
    ConfigError,
    match="'dpp' cannot work with its keywords .*; set config.select.kwargs",
  ):
    plan.lines(job, arms, ROWS, TOKENS)


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
  said = run("--dry_run")
  assert said.code == 0 and "a job refuses so long a choice" in said.out
  monkeypatch.setattr(choose.vectors, "HOURS", hours * 1.001)
  said = run("--dry_run")
  assert said.code == 0 and "refuses" not in said.out


@pytest.mark.parametrize("layers", [0, 1])
def test_one_pass_is_planned_by_what_each_stage_adds(layers):
  job, arms = a_job(
    "crossfit",
    ("real", "implicit_margin"),
    model__layers=2,
    embed__layers=layers,
  )
  found = {(x.stage, x.arm): x for x in plan.lines(job, arms, ROWS, TOKENS)}
  layer = 2 * 14 * (4 * 32 * 32 + 3 * 32 * 64) + 4 * 32 * 14 * 14
  head = 2 * 32 * 512 * 14
  wanted = dict(embed=2 * layer + head, answer=0, residual=2 * head)
  if layers:
    wanted = dict(embed=layer, logps=layer + head, answer=0, residual=2 * head)
  got = {s: found[s, ""].flops for s in passes.KEEPS if (s, "") in found}
  assert got == {s: 320 * x for s, x in wanted.items()}
  # What an arm alone would take, and not what others have left of it.
  alone = lambda arm: {
    x.stage: x.flops
    for x in plan._choosing(job, arm, ROWS, TOKENS)
    if not x.arm
  }
  whole = 320 * (2 * layer + 3 * head)
  assert sum(alone(arms[0]).values()) == whole
  assert alone(arms[1]) == dict(answer=320 * layer * (1 if layers else 2))
  # Proxies start from what the pass has said; so do the kept rows of arms
  # that read it.
  assert found["proxy", ""].flops == (3 * 4 * 16 + 320) * (2 * layer + head)
  rows = {arm.sampler: ("ref_logps", arm.name) in found for arm in arms}
  assert rows == dict(crossfit=False, real=bool(layers), implicit_margin=False)


def test_a_reward_model_and_small_proxies_are_planned(tmp_path):
  (tmp_path / "config.json").write_text(
    json.dumps(
      dict(
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
    )
  )
  job, arms = a_job("external_margin", rewards__checkpoint=str(tmp_path))
  found = {(x.stage, x.arm): x for x in plan.lines(job, arms, ROWS, TOKENS)}
  layer = 2 * (4 * 8 * 8 + 2 * 8 * 12) * 14 + 4 * 8 * 14 * 14
  assert found["rewards", ""].flops == 320 * (2 * layer + 2 * 8 * 8 + 2 * 8)
