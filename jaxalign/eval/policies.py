"""Measures the reference and the policies on the held-out split."""

from typing import Any

from etils import epath
import jax
import numpy as np

from jaxalign.core import disk
from jaxalign.core.artifacts import Cost
from jaxalign.core.settings import pick
from jaxalign.core.stage import JobSizes, Made, Price
from jaxalign.eval import held_out
from jaxalign.model import adapters, decoder, hf
from jaxalign.model.flops import decoder_flops
from jaxalign.model.job import Arm, arm_folder, Job
from jaxalign.train.align import aligned, bases


def _save(
  folder: epath.Path, what: held_out.EvalSet, outputs: held_out.PolicyOutputs
) -> None:
  """The raw numbers of a policy, so that arms can be compared later."""
  disk.write_array(folder / "held_out_logp.npy", outputs.logp)
  rows = [
    {n: what.rows[i][n] for n in ("id", "prompt", "target")}
    | dict(
      answer=outputs.texts[k],
      ids=outputs.answers[k].tolist(),
      logp=float(outputs.answer_logp[k]),
      reward=None if outputs.reward is None else float(outputs.reward[k]),
    )
    for k, i in enumerate(what.prompt_rows)
  ]
  disk.write_lines(folder / "samples.jsonl", rows)


def read_samples(folder: Any) -> list[dict[str, Any]]:
  """What a policy generated, one dict a prompt: its id, prompt, target, answer,
  ids, logp and reward."""
  return disk.read_lines(epath.Path(folder) / "samples.jsonl")


def _load(folder: Any) -> held_out.PolicyOutputs:
  samples = read_samples(folder)
  reward = np.array([s["reward"] for s in samples], object)
  return held_out.PolicyOutputs(
    disk.read_array(epath.Path(folder) / "held_out_logp.npy"),
    [np.array(s["ids"], np.int32) for s in samples],
    [s["answer"] for s in samples],
    np.array([s["logp"] for s in samples]),
    None if None in reward else reward.astype(float),
    0,
    0,
  )


def eval_fields(job: Job, arm: Arm | None) -> dict[str, Any]:
  return pick(job.c, "eval")


def _measured(job: Job, folder: Any, outputs: Any, *others: Any) -> Made:
  """Writes a policy's outputs and metrics; `others` as of `policy_metrics`."""
  what = held_out.eval_set(job)
  metrics = held_out.policy_metrics(what, outputs, *others)
  if jax.process_index() == 0:
    _save(folder, what, outputs)
    disk.write_json(folder / "eval.json", metrics)
  win, result = metrics.get("win_vs_target"), {}
  if win and outputs is not others[0]:
    result = dict(say=f"wins {100 * win['value']:.1f} % against the target")
  files = ["held_out_logp.npy", "samples.jsonl", "eval.json"]
  return files, Cost(outputs.flops, outputs.tokens), result


def make_baseline(job: Job, arm: None, folder: Any) -> Made:
  """Measures the reference itself, once for all arms."""
  what = held_out.eval_set(job)
  outputs = held_out.run_policy(what, job.reference, job.model)
  return _measured(job, folder, outputs, outputs, outputs.answer_logp)


def policy_of(job: Job, arm: Arm) -> decoder.Params:
  """An aligned policy, on the mesh; one arm's at a time."""
  if job.kept.get("policy", (None,))[0] != arm:
    job.kept.pop("policy", None)
    folder, m = arm_folder(job, arm), job.policy
    shapes = adapters.split(decoder.abstract(m, job.mesh), m.lora)[0]
    params = aligned(job, folder, shapes)
    if m.lora is not None:
      fixed = bases(job, folder) if m.lora.variant == "lora_sb" else {}
      params = job.reference | params | fixed
    job.kept["policy"] = arm, params
  return job.kept["policy"][1]


def make_evaluation(job: Job, arm: Arm, folder: Any) -> Made:
  """Measures the policy on the held-out split."""
  what, params = held_out.eval_set(job), policy_of(job, arm)
  outputs = held_out.run_policy(what, params, job.policy, arm.seed)
  answers = outputs.answers
  under = held_out.score_answers(what, job.reference, job.model, answers)
  return _measured(job, folder, outputs, _load(job.shared / "baseline"), under)


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
