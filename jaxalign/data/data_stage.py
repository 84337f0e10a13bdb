"""The data stage: reads, checks, splits and tokenizes the source."""

import jax

from jaxalign.core import artifacts, progress
from jaxalign.core.artifacts import pick
from jaxalign.core.job import Job
from jaxalign.data import build_data, prepare
from jaxalign.data.summary import summary_lines
from jaxalign.model import decoder


def run_data(job: Job) -> None:
  """Reads, checks, splits and tokenizes the source."""
  c = job.c
  fields = pick(
    c,
    "data",
    "model.checkpoint",
    "model.tokenizer",
    "model.vocab_size",
    "model.context",
  )
  fields["data.source"] = prepare.sources_of(c)
  fields["data.choice"] = prepare.choice_of(c)
  fields |= dict(
    kind=job.kind, source_digest=artifacts.told(lambda: prepare.fingerprint(c))
  )
  job.run(
    job.shared / "data",
    "data",
    fields=fields,
    inputs={},
    make=lambda folder: build_data.make_data(
      c, folder, most=job.most, wanted=job.kind, writes=jax.process_index() == 0
    ),
  )
  if jax.process_index() == 0:
    for line in summary_lines(
      artifacts.read_json(job.shared / "data" / "data_summary.json")
    ):
      progress.say(f"  {line}")
  progress.say(
    f"  mesh {dict(job.mesh.shape)} on {job.mesh.size} x "
    f"{job.mesh.devices.flat[0].device_kind}; model of "
    f"{decoder.parameter_count(job.model):,} parameters"
  )
