r"""Aligns a real small model towards a preference over its own stories.

  python tools/stories.py --checkpoint=../shared/models/stories260K \
    --workdir=runs/stories

The model tells stories about a dog, several to a beginning. A story whose last
two sentences hold a happy word is preferred to one without; DPO by the main
job follows; both policies then tell stories for beginnings that were not
trained on. Printed, with intervals over beginnings: the share of happy ends,
the win rate, the sampled KL, and the share of distinct trigrams kept.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from jaxalign.core import disk, intervals, sharding
from jaxalign.data import tokenizer
from jaxalign.model import decode, hf

NAMES = "Max Spot Rex Tim Ben Sam Tom Bob Lily Sue Mia Jack Buddy Lucy Fluffy"
NAMES = (*NAMES.split(), "Daisy")
KINDS = "little big small brown white funny old good kind brave shy loud fast"
KINDS = (*KINDS.split(), "lazy", "pretty", "black")
HAPPY = re.compile(
  r"\b(happy|happily|smil\w*|laugh\w*|hug\w*|proud|joy|fun|"
  r"glad|love\w*)\b"
)


OPENINGS = ("Once upon a time, there was", "One day,", "There once was")


def beginnings() -> list[str]:
  """768 first sentences about a dog."""
  rest = {"One day,": "went to the park."}
  return [
    f"{opening} a {kind} dog named {name}"
    + (f" {rest[opening]}" if opening in rest else ".")
    for opening in OPENINGS
    for kind in KINDS
    for name in NAMES
  ]


def ends_happy(text: str) -> bool:
  """Whether the last two sentences hold a happy word."""
  sentences = [s for s in re.split(r"(?<=[.!?\"])\s+", text.strip()) if s]
  return bool(HAPPY.search(" ".join(sentences[-2:])))


def distinct_trigrams(stories: list[list[int]]) -> float:
  """Different trigrams of tokens over all trigrams."""
  grams = [tuple(s[i : i + 3]) for s in stories for i in range(len(s) - 2)]
  return len(set(grams)) / len(grams)


def tell(checkpoint: str, new: int, each: int) -> list[dict]:
  """`each` stories a beginning, as texts, by the given model."""
  m = hf.read_config(checkpoint, "float32", "none")
  tok = tokenizer.load_tokenizer(checkpoint)
  mesh = sharding.make_mesh(dict(fsdp=-1, tensor=1))
  texts = [p for p in beginnings() for _ in range(each)]
  with jax.set_mesh(mesh):
    params = hf.load_folder(checkpoint, m, mesh)
    prompts = [np.array(tok.encode(p, begins=True)) for p in texts]
    options = decode.GenerateOptions(
      new, tok.eos, tok.vocab_size, seed=1, tile=64
    )
    ids = decode.generate(mesh, params, m, prompts, options)
  return [
    dict(prompt=p, text=tok.decode_response(x).rstrip())
    for p, x in zip(texts, ids)
  ]


def pairs(stories: list[dict]) -> list[dict]:
  """Every happy end with another end of the same beginning, in turn."""
  out, by_prompt = [], {}
  for row in stories:
    by_prompt.setdefault(row["prompt"], []).append(row["text"])
  for prompt, texts in by_prompt.items():
    up = [t for t in texts if ends_happy(t)]
    down = [t for t in texts if not ends_happy(t)]
    out += [dict(prompt=prompt, chosen=a, rejected=b) for a, b in zip(up, down)]
  return out


def main() -> None:
  """Runs the whole and prints one line of figures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--stories", type=int, default=12, help="a beginning")
  parser.add_argument("--new", type=int, default=120, help="tokens, at most")
  parser.add_argument("--updates", type=int, default=120)
  parser.add_argument("--lr", default="1e-4")
  parser.add_argument("--beta", default="0.1")
  parser.add_argument("--sft_weight", default="0.1")
  args = parser.parse_args()
  workdir = pathlib.Path(args.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  source = workdir / "pairs.jsonl"
  if not source.exists():
    rows = pairs(tell(args.checkpoint, args.new, args.stories))
    disk.write_bytes(
      source, "".join(json.dumps(r) + "\n" for r in rows).encode()
    )
  knobs = {
    "data.source": source,
    "model.checkpoint": args.checkpoint,
    "model.context": 256,
    "model.head_chunk": 256,
    "data.split.sft": 0.01,
    "data.split.pool": 0.69,
    "data.split.held_out": 0.3,
    "compare": "()",
    "select.sampler": "random",
    "select.budget": 1.0,
    "train.lr": args.lr,
    "loss.name": f"dpo(beta={args.beta})+{args.sft_weight}*sft",
    "train.max_updates": args.updates,
    "train.epochs": 100,
    "embed.tile": 16,
    "eval.new_tokens": args.new,
  }
  command = [sys.executable, "-m", "jaxalign.main"]
  command += ["--config=configs/dpo_sub.py", f"--workdir={workdir / 'job'}"]
  command += [f"--config.{knob}={value}" for knob, value in knobs.items()]
  subprocess.run(command, cwd=ROOT, check=True)
  (arm,) = (workdir / "job" / "runs").iterdir()
  read = lambda folder: [
    json.loads(line)
    for line in (folder / "samples.jsonl").read_text().splitlines()
  ]
  before, after = read(workdir / "job" / "shared" / "baseline"), read(arm)
  a, b = (
    np.array([ends_happy(s["answer"]) for s in rows], float)
    for rows in (before, after)
  )
  gain = intervals.normal_mean(b - a)
  wins = intervals.normal_mean((b > a) + 0.5 * (b == a))
  kept = distinct_trigrams([s["ids"] for s in after]) / distinct_trigrams(
    [s["ids"] for s in before]
  )
  kl = json.loads((arm / "eval.json").read_text())["kl"]
  percent = lambda x: (
    f"{100 * x['value']:.1f} [{100 * x['low']:.1f}, {100 * x['high']:.1f}]"
  )
  print(
    f"| {len(a)} beginnings | happy ends {100 * a.mean():.1f} -> "
    f"{100 * b.mean():.1f} %, gain {percent(gain)} points | win rate "
    f"{percent(wins)} % | sampled KL {kl['value']:.2f} nats | distinct "
    f"trigrams kept {100 * kept:.1f} % |"
  )


if __name__ == "__main__":
  main()
