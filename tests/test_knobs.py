"""Every knob that a message or a page names exists, and configs load."""

import inspect
import json
import pathlib
import re

import jobs
import ml_collections
import pytest

from configs import common, dpo_sub, kto_sub
from jaxalign.core.settings import flatten
from jaxalign.data.schemas.mapping import TARGETS
from jaxalign.eval import judge_kinds
from jaxalign.select.samplers import SAMPLERS
from jaxalign.train.losses import LOSSES

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _named():
  """config.some.knob in any source file, with the file that names it."""
  for path in sorted((ROOT / "jaxalign").rglob("*.py")):
    text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # joined strings
    for knob in re.findall(r"(?<!jax\.)config\.([a-z_]+(?:\.[a-z_]+)*)", text):
      yield knob, path.name


@pytest.mark.parametrize("knob,where", sorted(set(_named())))
def test_a_named_knob_exists(knob, where):
  c = common.base()
  # The file config.json; methods of a text and of a ConfigDict.
  if knob in ("json", "partition", "data.to_dict") or hasattr(type(c), knob):
    return
  section, _, name = knob.partition(".kwargs.")
  if name:
    table = dict(select=SAMPLERS, loss=LOSSES)[section]
    assert any(
      name in inspect.signature(f).parameters for f in table.values()
    ), f"{where}: nothing takes {name}"
    return
  section, _, name = knob.partition("data.fields.")
  if name:
    assert name in TARGETS, f"{where}: no schema reads {name}"
    return
  for part in knob.split("."):
    assert part in c, f"{where} names config.{knob}, which does not exist"
    c = c[part]


@pytest.mark.parametrize("config", [dpo_sub, kto_sub])
@pytest.mark.parametrize("variant", ["", "smoke", "hh", "smoke,hh"])
def test_configs_load(config, variant):
  assert config.get_config(variant).select.budget == 0.1


def test_an_unknown_variant_lists_the_known():
  with pytest.raises(ValueError, match="smoke"):
    common.base("smok")


# Every knob changes the plan or the fields of a stage, or is refused.

BESIDE = {  # what they change is no number of a job
  "compile_cache": "where compiled programs lie",
  "profile.steps": "writes a trace",
  "mesh": "the same numbers on any mesh",
  "train.keep": "checkpoints that stay",
  "train.trackers": "copies of metrics.jsonl",
  "train.explode": "ends a run, changes none",
  "judge.per_minute": "how fast it is asked",
  "judge.key_env": "where the key is",
}
VALUES = {  # where twice the number, or another word, is no legal value
  "compare": "('length',)",
  "budgets": "(0.2,0.4)",
  "data.source": "none.jsonl",
  "data.held_out": "none.jsonl",
  "data.caps": "(5,)",
  "data.weights": "(1.0,)",
  "data.assume": "(500,20)",
  "data.skip": "('x',)",
  "ask.question": "{prompt} {response} good?",
  "loss.name": "dpo(beta=0.2)",
  "pilot.budgets": "(0.05,0.1,0.15,0.2)",
  "pilot.most": "0.01",
  "judge.max_requests": "3",
  "train.eval_sets": "('rest',)",
  "lora.targets": "('wq',)",
  "train.ema": "0.5",
  "train.b2": "0.5",
  "train.max_updates": "3",
  "data.world.flips": "0.1",
}
JOBS = {  # where the first job does not read a knob
  "ask": ("select.sampler=ask_llm",),
  "proxy": ("select.sampler=selective_dpo", "compare=('implicit_margin',)"),
  "pilot": (
    "select.budget=auto",
    "pilot.budgets=(0.05,0.1,0.2,0.4)",
    "pilot.most=9.0",
  ),
  "judge": ("judge.kind=endpoint", "judge.model=m", "judge.key_env="),
  "judge.checkpoint": ("judge.kind=reward_model",),
  "rewards": ("select.sampler=external_margin",),
  "lora": ("lora.rank=2",),
  "train.best": ("train.eval_every=2",),
  "train.eval_sets": ("train.eval_every=2",),
  "train.eval_rows": ("train.eval_every=2",),
  "train.eval_prompts": ("train.eval_every=2",),
}


def _other(value):
  if isinstance(value, bool):
    return not value
  if isinstance(value, (int, float)):
    return 2 * value or type(value)(1)
  return "x"


def _knobs():
  for knob, value in flatten(common.base("tiny"), "").items():
    if not isinstance(value, ml_collections.ConfigDict):
      yield knob, VALUES.get(knob, _other(value))


def _answer(monkeypatch, job, *flags):
  """What a job plans or refuses, and the keys of the stages it would run."""
  plan = jobs.run("", "--dry_run", *flags)
  keys, ended = {}, None

  def look(folder, stage, how, make):
    fields = json.loads(json.dumps(how.fields))
    key = jobs.artifacts.key_of(stage, fields, how.inputs)
    keys[stage, str(folder)] = key
    return jobs.artifacts.given(stage, key)

  with monkeypatch.context() as patched:
    patched.setattr(jobs.artifacts, "run_stage", look)
    patched.setattr(judge_kinds, "check_ready", lambda job, arms: None)
    try:
      ended = jobs.run(job, *flags)
    except Exception:  # what another sampler reads is not there
      pass
  said = [plan.out, plan.err, ended and ended.err]
  return (ended or plan).code or plan.code, said, keys


@pytest.mark.slow
def test_every_knob_acts_or_is_refused(monkeypatch):
  job, known, idle = jobs.finished(), {}, []
  for knob, value in _knobs():
    section = knob.partition(".")[0]
    if knob in BESIDE or section in BESIDE:
      continue
    flags = JOBS.get(knob, JOBS.get(section, ()))
    if flags not in known:
      known[flags] = _answer(monkeypatch, job, *flags)
    found = _answer(monkeypatch, job, *flags, f"{knob}={value}")
    if found == known[flags]:
      idle.append(knob)
  assert not idle, idle
