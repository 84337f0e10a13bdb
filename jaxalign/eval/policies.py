"""Measures the reference and the policies on the held-out split."""

from collections.abc import Callable
import functools
import json
from typing import Any

from etils import epath
import jax
import numpy as np

from jaxalign.core import artifacts
from jaxalign.core.artifacts import Cost, pick
from jaxalign.eval import held_out
from jaxalign.eval.held_out import eval_options
from jaxalign.model import adapters, decoder, hf
from jaxalign.model.job import Arm, arm_folder, Job
from jaxalign.train.align import aligned, bases


def _save_outcome(
  folder: epath.Path, what: held_out.EvalSet, outcome: held_out.PolicyOutputs
) -> list[str]:
  """The raw numbers of a policy, so that arms can be compared later."""
  if jax.process_index() == 0:
    artifacts.write_array(folder / "held_out_logp.npy", outcome.logp)
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
    artifacts.write_bytes(folder / "samples.jsonl", "".join(lines).encode())
  return ["held_out_logp.npy", "samples.jsonl"]


def read_samples(folder: Any) -> list[dict[str, Any]]:
  """What `evaluate` generated in a folder, one dict a prompt."""
  text = (epath.Path(folder) / "samples.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _load_outcome(folder: Any) -> held_out.PolicyOutputs:
  samples = read_samples(folder)
  reward = np.array([s["reward"] for s in samples], object)
  return held_out.PolicyOutputs(
    artifacts.read_array(epath.Path(folder) / "held_out_logp.npy"),
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


def run_baseline(job: Job) -> None:
  """Measures the reference itself, once for all arms."""

  def make(folder):
    outcome = _examine(job, job.reference, job.model)
    files = _save_outcome(folder, held_out.eval_set(job), outcome)
    metrics = held_out.policy_metrics(
      held_out.eval_set(job), outcome, outcome, outcome.answer_logp
    )
    if jax.process_index() == 0:
      artifacts.write_json(folder / "eval.json", metrics)
    return [*files, "eval.json"], Cost(outcome.flops, outcome.tokens), {}

  job.run(
    job.shared / "baseline",
    "baseline",
    make=make,
    fields=pick(job.c, "eval"),
    inputs=dict(data=job.key("data"), sft=job.key("sft")),
  )


def policy_of(job: Job, arm: Arm) -> Callable[[], decoder.Params]:
  """A function that reads an aligned policy onto the mesh, once."""

  @functools.lru_cache(maxsize=1)
  def policy():
    folder, m = arm_folder(job, arm), job.policy
    found = aligned(
      job, folder, adapters.split(decoder.abstract(m, job.mesh), m.lora)[0]
    )
    if m.lora is None:
      return found
    if m.lora.variant == "lora_sb":
      found |= bases(job, folder)
    return job.reference | found

  return policy


def run_evaluate(
  job: Job, arm: Arm, policy: Callable[[], decoder.Params]
) -> None:
  """Measures the policy on the held-out split."""

  def make(folder):
    # Arms of one seed meet the same noise; another seed meets another.
    outcome = _examine(job, policy(), job.policy, arm.seed)
    under = held_out.score_answers(
      job.mesh,
      job.reference,
      job.model,
      held_out.eval_set(job),
      outcome.answers,
      eval_options(job.c),
    )
    metrics = held_out.policy_metrics(
      held_out.eval_set(job),
      outcome,
      _load_outcome(job.shared / "baseline"),
      under,
    )
    files = _save_outcome(folder, held_out.eval_set(job), outcome)
    if jax.process_index() == 0:
      artifacts.write_json(folder / "eval.json", metrics)
    win = metrics.get("win_vs_target")
    say = f"wins {100 * win['value']:.1f} % against the target" if win else ""
    return (
      [*files, "eval.json"],
      Cost(outcome.flops, outcome.tokens),
      dict(say=say),
    )

  job.run(
    arm_folder(job, arm),
    "evaluate",
    arm.name,
    make=make,
    fields=pick(job.c, "eval"),
    inputs=dict(align=job.key("align", arm.name), baseline=job.key("baseline")),
  )


def run_export(
  job: Job, arm: Arm, policy: Callable[[], decoder.Params]
) -> None:
  """Writes the policy as a Hugging Face folder, and adapters for peft."""

  def make(folder):
    if not job.policy.lora:
      job.release_reference()
    params, m = policy(), job.policy
    merged = adapters.Merged(params, m.lora) if m.lora else params
    files = hf.export_folder(
      folder / "export", merged, job.model, job.tokenizer, dtype=dtype, of=of
    )
    if m.lora:
      hf.save_adapters(folder / "adapter", params, m, base=given)
      files = [*files, "adapter"]
    return files, Cost(), dict(say=f"weights in {dtype}")

  given = job.c.model.checkpoint
  of = hf.given(given) if given else hf.Given()
  dtype = of.dtype  # as loaded
  job.run(
    arm_folder(job, arm),
    "export",
    arm.name,
    make=make,
    # As it was written before there was a choice.
    fields=dict(dtype=dtype) if dtype != "float32" else {},
    inputs=dict(align=job.key("align", arm.name)),
  )
