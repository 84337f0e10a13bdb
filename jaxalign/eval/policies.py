"""Measures the reference and the policies on the held-out split."""

import json
from typing import Any

from etils import epath
import jax
import numpy as np

from jaxalign.core import disk
from jaxalign.core.artifacts import Cost
from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.eval import held_out
from jaxalign.eval.held_out import eval_options
from jaxalign.model import adapters, decoder, hf
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Arm, arm_folder, Job
from jaxalign.train.align import aligned, bases


def _save_outcome(
  folder: epath.Path, what: held_out.EvalSet, outcome: held_out.PolicyOutputs
) -> list[str]:
  """The raw numbers of a policy, so that arms can be compared later."""
  if jax.process_index() == 0:
    disk.write_array(folder / "held_out_logp.npy", outcome.logp)
    lines = []
    for k, i in enumerate(what.prompt_rows):
      row = what.rows[i]
      lines.append(
        json.dumps(
          dict(
            id=row["id"],
            prompt=row["prompt"],
            target=row["target"],
            said=outcome.texts[k],
            ids=outcome.answers[k].tolist(),
            logp=float(outcome.answer_logp[k]),
            reward=(
              None if outcome.reward is None else float(outcome.reward[k])
            ),
          )
        )
        + "\n"
      )
    disk.write_bytes(folder / "samples.jsonl", "".join(lines).encode())
  return ["held_out_logp.npy", "samples.jsonl"]


def read_samples(folder: Any) -> list[dict[str, Any]]:
  """What `evaluate` generated in a folder, one dict a prompt."""
  text = (epath.Path(folder) / "samples.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _load_outcome(folder: Any) -> held_out.PolicyOutputs:
  samples = read_samples(folder)
  reward = np.array([s["reward"] for s in samples], object)
  return held_out.PolicyOutputs(
    disk.read_array(epath.Path(folder) / "held_out_logp.npy"),
    [np.array(s["ids"], np.int32) for s in samples],
    [s["said"] for s in samples],
    np.array([s["logp"] for s in samples]),
    None if None in reward else reward.astype(float),
    0,
    0,
  )


def _examine(
  job: Job, params: Any, m: decoder.ModelConfig, seed: int = 0
) -> held_out.PolicyOutputs:
  return held_out.run_policy(
    job.mesh, params, m, held_out.eval_set(job), eval_options(job.c, seed)
  )


def eval_fields(job: Job, arm: Arm | None) -> dict[str, Any]:
  return pick(job.c, "eval")


def _measured(job: Job, folder: Any, outcome: Any, *others: Any) -> Made:
  """Writes an outcome and its metrics; `others` as of `policy_metrics`."""
  metrics = held_out.policy_metrics(held_out.eval_set(job), outcome, *others)
  files = _save_outcome(folder, held_out.eval_set(job), outcome)
  if jax.process_index() == 0:
    disk.write_json(folder / "eval.json", metrics)
  win, result = metrics.get("win_vs_target"), {}
  if win and outcome is not others[0]:
    say = f"wins {100 * win['value']:.1f} % against the target"
    result = dict(say=say)
  return [*files, "eval.json"], Cost(outcome.flops, outcome.tokens), result


def make_baseline(job: Job, arm: None, folder: Any) -> Made:
  """Measures the reference itself, once for all arms."""
  outcome = _examine(job, job.reference, job.model)
  return _measured(job, folder, outcome, outcome, outcome.answer_logp)


def policy_of(job: Job, arm: Arm) -> decoder.Params:
  """An aligned policy, on the mesh; one arm's at a time."""
  if job.kept.get("policy", (None,))[0] != arm:
    job.kept.pop("policy", None)
    folder, m = arm_folder(job, arm), job.policy
    shapes = adapters.split(decoder.abstract(m, job.mesh), m.lora)[0]
    found = aligned(job, folder, shapes)
    if m.lora is not None:
      fixed = bases(job, folder) if m.lora.variant == "lora_sb" else {}
      found = job.reference | found | fixed
    job.kept["policy"] = arm, found
  return job.kept["policy"][1]


def make_evaluation(job: Job, arm: Arm, folder: Any) -> Made:
  """Measures the policy on the held-out split."""
  # Arms of one seed meet the same noise; another seed meets another.
  outcome = _examine(job, policy_of(job, arm), job.policy, arm.seed)
  under = held_out.score_answers(
    job.mesh,
    job.reference,
    job.model,
    held_out.eval_set(job),
    outcome.answers,
    eval_options(job.c),
  )
  baseline = _load_outcome(job.shared / "baseline")
  return _measured(job, folder, outcome, baseline, under)


def _given(c: Any) -> hf.Given:
  """What the exported folder takes over of the checkpoint."""
  return hf.given(c.model.checkpoint) if c.model.checkpoint else hf.Given()


def export_fields(job: Job, arm: Arm) -> dict[str, Any]:
  return dict(dtype=_given(job.c).dtype)


def make_export(job: Job, arm: Arm, folder: Any) -> Made:
  """Writes the policy as a Hugging Face folder, and adapters for peft."""
  if not job.policy.lora:
    job.release_reference()
  params, m, of = policy_of(job, arm), job.policy, _given(job.c)
  merged = adapters.Merged(params, m.lora) if m.lora else params
  files = hf.export_folder(
    folder / "export", merged, job.model, job.tokenizer, dtype=of.dtype, of=of
  )
  if m.lora:
    base = job.c.model.checkpoint
    hf.save_adapters(folder / "adapter", params, m, base=base)
    files = [*files, "adapter"]
  return files, Cost(), dict(say=f"weights in {of.dtype}")


def eval_price(z: JobSizes, arm: Arm | None) -> Price:
  """Two answers of every held-out pair scored; of each prompt an answer is
  generated, and scored by both models."""
  held_out = z.rows["held_out"]
  prompts = min(z.job.c.eval.prompts, held_out)
  each = decoder_flops(z.model, int(z.tokens["held_out"]))
  return Price(prompts, "prompts", (2 * held_out + 3 * prompts) * each)
