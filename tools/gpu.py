r"""The figures of a GPU, as lines of Markdown and as JSON.

  tools/gpu.sh                                   # all of it, on a GPU
  python tools/gpu.py --sections=train --out=f   # one section, on a GPU
  python tools/gpu.py --toy                      # a rehearsal on CPU, tiny

Sections: attention (cuDNN's against plain's numbers, and its time), forward
and train (how much of the card a Llama uses, beside transformers on the same
card), dpo (a step on pairs, beside TRL where that is installed), mixture and
embed (the selection). jax and torch take turns in two processes. A section
that fails says so and the next one runs; so does a part of one. What counts as
useful is said in tools/gpu_measure.py. Needs neither datasets, ml-collections,
a tokenizer nor the network.

A toy run's figures say nothing of a GPU: its attention is XLA's, and the peaks
are those of a CPU.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import time

from gpu_attention import attention_section
from gpu_llama import dpo_section, forward_section, train_section
import gpu_measure as measure
from gpu_selection import embed_section, mixture_section
import gpu_setup  # first: it sets what jax reads when it is imported
import jax

from jaxalign.core import sharding
from jaxalign.model import attention

SECTIONS = {  # name: (function, seconds it should take at most on a GPU)
  "attention": (attention_section, 200),
  "forward": (forward_section, 210),
  "train": (train_section, 480),
  "dpo": (dpo_section, 180),
  "mixture": (mixture_section, 200),
  "embed": (embed_section, 150),
}


def summary(out: pathlib.Path) -> None:
  """All that lies in a folder of results, as one page."""
  for name in SECTIONS:
    path = out / f"{name}.json"
    if not path.exists():
      print(f"\n## {name}\n\n- no result")
      continue
    found = json.loads(path.read_text())
    print(f"\n## {name}\n\n{json.dumps(found['settings'])}\n")
    if found["rows"]:
      print(measure.HEADER)
    for row in found["rows"]:
      print(measure.as_line(row))
    for line in found["notes"] + [f"FAILED {x}" for x in found["failures"]]:
      print(f"- {line}")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--toy", action="store_true", help="tiny, on CPU")
  parser.add_argument("--sections", default=",".join(SECTIONS))
  parser.add_argument("--out", default="runs/gpu", help="folder of the JSON")
  parser.add_argument(
    "--limit", type=float, default=0, help="seconds of each section; 0: its own"
  )
  parser.add_argument(
    "--summary",
    action="store_true",
    help="print what lies in --out, measure nothing",
  )
  args = parser.parse_args()
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  if args.summary:
    summary(out)
    return 0
  names = args.sections.split(",")
  unknown = [n for n in names if n not in SECTIONS]
  if unknown:
    parser.error(f"unknown sections {unknown}; known: {', '.join(SECTIONS)}")
  if gpu_setup.TOY:
    jax.config.update("jax_disable_most_optimizations", True)  # compiles soon
    # The same path without the card: XLA's own attention.
    attention.KERNELS["cudnn"] = functools.partial(
      attention._on_shards,
      functools.partial(attention._cudnn, implementation="xla"),
    )
  elif jax.default_backend() != "gpu":
    parser.error(
      f"found no GPU, jax runs on {jax.default_backend()}; "
      "--toy rehearses on CPU"
    )
  settings = gpu_setup.card() | dict(
    toy=gpu_setup.TOY,
    jax=jax.__version__,
    xla_flags=os.environ.get("XLA_FLAGS", ""),
  )
  mesh = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  failed = 0
  with jax.set_mesh(mesh):
    for name in names:
      run, limit = SECTIONS[name]
      print(
        f"\n## {name} ({settings['device']}, driver {settings['driver']}, "
        f"jax {settings['jax']}{', TOY' if gpu_setup.TOY else ''})\n",
        flush=True,
      )
      section = measure.Section(name, out, args.limit or limit, dict(settings))
      start = time.monotonic()
      section.attempt(name, lambda: run(section, mesh))
      section.settings["took"] = round(time.monotonic() - start, 1)
      section.save()
      failed += len(section.failures)
      print(
        f"- {name} took {section.settings['took']} s, "
        f"{len(section.failures)} failures",
        flush=True,
      )
  for peer in gpu_setup.PEERS:
    peer.close()
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
