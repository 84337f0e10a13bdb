r"""Selection from disk: time and memory at millions of rows, and growth laws.

  python tools/bench.py stream                    # 10^6 and 10^7 rows x 384
  python tools/bench_stream.py laws --out=laws.html  # every sampler, four sizes
  python tools/bench_stream.py kills --kills=20   # killed and gone on from

`run` makes a bfloat16 store in --folder outside of the clock, fits a mixture
on a reservoir, scores every row, keeps a tenth by ISA, and removes the store.
Each size is a process of its own, whose anonymous and file-backed memory is
sampled from /proc/self/status every 20 ms. `laws` times every sampler on rows
that are held, with a tenth of them to keep, and plots the times: the best of
--count, so that from two on nothing that is compiled counts.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WIDTH, SHARD = 384, 8192


class Ids:
  """[N] ids, made where they are sliced."""

  def __init__(self, n: int):
    import numpy as np

    self.n, self.dtype = n, np.dtype("S13")

  def __len__(self) -> int:
    return self.n

  def __getitem__(self, where: slice):
    import numpy as np

    start, stop, _ = where.indices(self.n)
    return np.char.mod(b"row-%09d", np.arange(start, stop)).astype("S13")


def make_store(folder, n: int):
  """Rows of 16 clusters with a falling spectrum, in a bfloat16 store."""
  import numpy as np

  from jaxalign.select import store as stores

  ids = Ids(n)
  store = stores.create(
    folder,
    ids,
    dict(embedding=stores.Column((1, WIDTH), "bfloat16")),
    fields=dict(model="made"),
    shard=SHARD,
  )
  rng = np.random.default_rng(0)
  scale = np.float32(1 / np.sqrt(1 + np.arange(WIDTH)))
  centre = np.float32(rng.normal(size=(16, WIDTH))) * scale
  for shard in stores.pending(store, ids):
    start, stop = store.bounds(shard)
    rng = np.random.default_rng([1, shard])
    x = rng.standard_normal((stop - start, WIDTH), np.float32)
    x *= scale
    x += centre[rng.integers(16, size=len(x))]
    stores.write_shard(store, shard, ids, dict(embedding=x[:, None]))
  return store


class Memory:
  """The peaks of this process's memory since `mark`, MiB."""

  def __init__(self):
    self.peak: dict[str, float] = {}
    threading.Thread(target=self._watch, daemon=True).start()

  @staticmethod
  def now() -> dict[str, float]:
    """Anonymous, file-backed and shared memory of this process, MiB."""
    with open("/proc/self/status", encoding="ascii") as lines:
      return {
        name: int(value.split()[0]) / 1024
        for name, value in (line.split(":") for line in lines)
        if name in ("RssAnon", "RssFile")
      }

  def _watch(self) -> None:
    while True:
      for name, value in self.now().items():
        self.peak[name] = max(value, self.peak.get(name, 0))
      time.sleep(0.02)

  def mark(self) -> None:
    """Forgets the peaks so far."""
    self.peak = self.now()


def child(args) -> None:
  """One size: fit on a reservoir, score, select; a line of JSON."""
  import jax
  import numpy as np

  from jaxalign import sharding
  from jaxalign.select import mixture, reservoir, sources, stream
  from jaxalign.select import store as stores

  folder = pathlib.Path(args.folder)
  store = stores.open_store(folder / "store")
  mesh = sharding.make_mesh(dict(fsdp=-1, tensor=1))
  memory, phases = Memory(), []

  def phase(name, make):
    memory.mark()
    start, cpu = time.monotonic(), time.process_time()
    out = make()
    time.sleep(0.05)
    phases.append(
      dict(
        name=name,
        seconds=time.monotonic() - start,
        cpu=time.process_time() - cpu,
        **memory.peak,
      )
    )
    print(f"  {name}: {phases[-1]}", file=sys.stderr, flush=True)
    return out

  phase("start", lambda: None)
  with jax.set_mesh(mesh):
    rows = phase(
      "reservoir", lambda: reservoir.choose(store, args.reservoir, folder)
    )
    x = phase("gather", lambda: reservoir.gather(store, rows, folder / "x.npy"))
    space = phase("whiten", lambda: mixture.prepare(mesh, x))
    fit = phase(
      "fit",
      lambda: mixture.fit(
        mesh, x, space=space, starts=args.starts, max_iterations=args.iterations
      ),
    )
    x = space = None  # what scoring holds is measured without them
    (folder / "x.npy").unlink()
    scores = phase(
      "score",
      lambda: reservoir.score(
        mesh, [fit], store, folder / "scores", fields=dict(fit="bench")
      ),
    )
    source = sources.of_stores(store, scores)
    found = phase(
      args.sampler,
      lambda: stream.select(
        args.sampler, source, store.rows // 10, scratch=folder
      ),
    )
  print(
    json.dumps(
      dict(
        rows=store.rows,
        phases=phases,
        iterations=len(fit.trace),
        warnings=fit.warnings,
        load=os.getloadavg()[0],
        digest=hashlib.sha256(b"\n".join(found.ids.tolist())).hexdigest()[:16],
        kept=len(np.unique(found.rows)),
      )
    )
  )


def _child(folder, args, devices: int = 0) -> dict:
  env = os.environ | dict(JAX_PLATFORMS="cpu")
  if devices:
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
  out = subprocess.run(
    [
      sys.executable,
      __file__,
      "child",
      f"--folder={folder}",
      f"--reservoir={args.reservoir}",
      f"--starts={args.starts}",
      f"--iterations={args.iterations}",
      f"--sampler={args.sampler}",
    ],
    env=env,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  ).stdout
  return json.loads(out.splitlines()[-1])


def run(args) -> None:
  """The table of both sizes."""
  print(
    f"reservoir {args.reservoir:,}, {args.starts} starts, at most "
    f"{args.iterations} iterations, width {WIDTH}, bfloat16 on disk, "
    f"{os.cpu_count()} cores\n\n| rows | phase | seconds | of CPU | "
    "anonymous MiB, peak | file-backed MiB, peak |\n"
    "|---|---|---|---|---|---|"
  )
  for n in args.rows:
    folder = pathlib.Path(
      tempfile.mkdtemp(dir=args.folder or None, prefix="bench_stream_")
    )
    try:
      start = time.monotonic()
      make_store(folder / "store", n)
      made = time.monotonic() - start
      found = _child(folder, args)
    finally:
      shutil.rmtree(folder, ignore_errors=True)
    for one in found["phases"]:
      print(
        f"| {n:,} | {one['name']} | {one['seconds']:.1f} | "
        f"{one['cpu']:.1f} | {one['RssAnon']:.0f} | {one['RssFile']:.0f} |",
        flush=True,
      )
    total = lambda key: sum(one[key] for one in found["phases"])
    peak = lambda key: max(one[key] for one in found["phases"])
    print(
      f"| {n:,} | all | {total('seconds'):.0f} | {total('cpu'):.0f} | "
      f"{peak('RssAnon'):.0f} | {peak('RssFile'):.0f} |\n"
      f"\n{found['kept']:,} rows kept, digest of the ids "
      f"`{found['digest']}`; {found['iterations']} iterations of the best "
      f"start; load {found['load']:.1f}; made in {made:.0f} s outside of "
      "the clock\n",
      flush=True,
    )


def laws(args) -> None:
  """Seconds of every sampler at four sizes, and the exponent."""
  import importlib

  import numpy as np

  from jaxalign.select.samplers import SAMPLERS

  sys.path.insert(0, str(ROOT / "tests"))
  pools = importlib.import_module("pools")
  print(
    f"width {WIDTH}, two responses a row, a tenth kept, seconds of CPU, "
    f"the best of {args.count}; load {os.getloadavg()[0]:.1f}\n\n"
    "| sampler | rows N | at N | 2N | 4N | 8N | the last doubling: N to "
    "the |\n"
    "|---|---|---|---|---|---|---|"
  )
  drawn = []
  for name, sampler in SAMPLERS.items():
    if args.only and name not in args.only:
      continue
    seconds, spent = [], 0.0
    # What reads a few numbers a row is over in no time: more rows.
    wide = {"embedding", "answer_embedding", "residual", "grams"} & {
      *sampler.needs
    }
    least, width = (args.least, WIDTH) if wide else (50 * args.least, 1)
    sizes = [least * 2**k for k in range(4)]
    for n in sizes:
      pool = pools.make(2, n, width=width)
      times = []
      for _ in range(args.count):
        start = time.process_time()  # others' load is left out
        try:
          sampler(0, pool, n // 10)
        except Exception as error:  # a refusal is a figure too
          seconds.append(str(error).split(";")[0][:60])
          break
        times.append(time.process_time() - start)
        spent += times[-1]
      else:
        seconds.append(min(times))
      if spent > args.limit:
        break
    known = [(n, s) for n, s in zip(sizes, seconds) if not isinstance(s, str)]
    slope = "-"
    if len(known) > 1:
      slope = f"{np.log2(known[-1][1] / known[-2][1]):.2f}"
      drawn.append((name, known, slope))
    cells = [s if isinstance(s, str) else f"{s:.3g} s" for s in seconds]
    cells += ["not run"] * (len(sizes) - len(cells))
    print(
      f"| {name} | {least:,} | " + " | ".join(cells) + f" | {slope} |",
      flush=True,
    )
  if args.out:
    pathlib.Path(args.out).write_text(plots(drawn), encoding="utf-8")
    print(f"\nplotted in {args.out}")


PLOTS = """{% extends "base.html" %}
{% set sections = [("laws", "Seconds of CPU by rows")] %}
{% block laws %}<div class="grid">
{% for chart, words in figures %}{{ m.figure(chart, words) }}{% endfor %}
</div>{% endblock %}"""


def plots(drawn: list[tuple[str, list[tuple[int, float]], str]]) -> str:
  """A page of a chart a sampler, both axes logarithms: a law is a line."""
  import math

  from jaxalign.report import charts, page

  figures = []
  for name, known, slope in drawn:
    points = [(math.log10(n), math.log10(max(s, 1e-6))) for n, s in known]
    (x, y), last = points[0], points[-1][0]
    chart = charts.lines(
      [
        charts.Series(name, points, 0),
        charts.Series("as N", [(x, y), (last, y + last - x)], -1),
      ],
      f"{name}: as N to the {slope}",
      "rows, log10",
      "seconds of CPU, log10",
    )
    (first, took), (most, longest) = known[0], known[-1]
    caption = (
      f"{name}: {took:.3g} s at {first:,} rows, {longest:.3g} s at {most:,}; "
      f"as N to the {slope}"
    )
    figures.append((chart, caption))
  return page.render(
    page.ENVIRONMENT.from_string(PLOTS),
    title="How every sampler grows",
    lede="Both axes are logarithms; the grey line grows as the rows do.",
    byline=[f"{os.cpu_count()} cores", time.strftime("%Y-%m-%d")],
    figures=figures,
  )


def kills(args) -> None:
  """Kills a streamed selection at random moments; the same ids each time."""
  folder = pathlib.Path(
    tempfile.mkdtemp(dir=args.folder or None, prefix="bench_stream_")
  )
  try:
    make_store(folder / "store", args.rows[0])
    start = time.monotonic()
    wanted = _child(folder, args, 2)
    whole = time.monotonic() - start
    rng, ends = random.Random(args.seed), []
    for number in range(args.kills):
      shutil.rmtree(folder / "scores", ignore_errors=True)
      process = subprocess.Popen(
        [
          sys.executable,
          __file__,
          "child",
          f"--folder={folder}",
          f"--reservoir={args.reservoir}",
          f"--starts={args.starts}",
          f"--iterations={args.iterations}",
          f"--sampler={args.sampler}",
        ],
        env=os.environ | dict(JAX_PLATFORMS="cpu"),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
      )
      # Late moments too: that is where shards are written.
      moment = rng.uniform(0.2, 1.0) * whole
      try:
        process.wait(moment)
      except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
      shards = len(list((folder / "scores/shards").glob("*.json")))
      found = _child(folder, args, rng.choice([1, 2, 8]))
      ends.append(found["digest"] == wanted["digest"])
      print(
        f"kill {number}: after {moment:.1f} of {whole:.1f} s, {shards} "
        f"shards whole: {'the same ids' if ends[-1] else 'OTHER IDS'}",
        flush=True,
      )
    print(
      f"{sum(ends)} of {len(ends)} ended with the ids of the undisturbed run"
    )
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  raise SystemExit(0 if all(ends) else 1)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", choices=["run", "child", "laws", "kills"])
  parser.add_argument("--rows", type=int, nargs="+", default=[10**6, 10**7])
  parser.add_argument("--reservoir", type=int, default=10**6)
  parser.add_argument("--starts", type=int, default=10)
  parser.add_argument("--iterations", type=int, default=100)
  parser.add_argument("--sampler", default="isa")
  parser.add_argument("--least", type=int, default=1000)
  parser.add_argument("--count", type=int, default=1)
  parser.add_argument("--limit", type=float, default=60.0)
  parser.add_argument("--only", nargs="*", default=[])
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", default="")
  parser.add_argument("--out", default="", help="a page of plots, of `laws`")
  args = parser.parse_args(argv)
  dict(run=run, child=child, laws=laws, kills=kills)[args.what](args)


if __name__ == "__main__":
  main()
