r"""The figures of a GPU, as lines of Markdown and as JSON.

  python tools/gpu.py --out=runs/gpu              # all sections, on a GPU
  python tools/gpu.py --sections=train            # one of them
  python tools/gpu.py --toy                       # a rehearsal on CPU, tiny

Sections: attention (cuDNN's numbers and plain's, and its time), train (how
much of the card a Llama uses, and transformers on the same card), dpo (a
step on pairs), mixture (the selection). jax and torch take turns in two
processes. Several sections run in a process each, so that what one leaves on
the card is gone before the next. What fails says so, and the rest runs. What
counts as useful stands in tools/gpu_measure.py. Nothing is downloaded.

A toy run's figures say nothing of a GPU: its attention is XLA's.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
TOY = "--toy" in sys.argv
if TOY:  # before jax is imported
  os.environ["JAX_PLATFORMS"] = "cpu"
# Both libraries share the card, so none may take it whole.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_measure as measure
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import sharding
from jaxalign.model import attention, decoder
from jaxalign.select import em, mixture, whiten
from jaxalign.train import optim
from jaxalign.train import step as steps
from jaxalign.train.batch import Batch
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import bind, LOSSES
from jaxalign.train.metrics import divide

OURS, THEIRS = "jaxalign", "transformers, SDPA"
LENGTH = 64 if TOY else 2048
CALLS, REPEATS = (1, 2) if TOY else (4, 5)
SHAPE = ("layers", "width", "heads", "kv_heads", "head_size", "ff", "vocab")
SIZES = (
  (2, 64, 4, 2, 16, 128, 256) if TOY else (16, 2048, 16, 8, 128, 8192, 32000)
)
MODEL = decoder.ModelConfig(
  **dict(zip(SHAPE, SIZES)), context=LENGTH, dtype="bfloat16", attention="cudnn"
)
CHUNK = 32 if TOY else 512  # positions of the head at once
ROWS = 2 if TOY else 8  # of a train step
TOLERANCE = 2e-2  # of the largest value; as jaxalign/model/attention.py says
CASES = {  # name: (groups, queries of a group, head size, window, segments)
  "causal, C 64": (4, 1, 64, 0, False),
  "causal, C 128": (4, 1, 128, 0, False),
  "GQA 2 x 4, C 128": (2, 4, 128, 0, False),
  "GQA 2 x 4, C 64": (2, 4, 64, 0, False),
  "window 100, C 128": (2, 2, 128, 100, False),
  "segments, C 128": (2, 2, 128, 0, True),
  "segments and window 50, C 64": (2, 2, 64, 50, True),
}
PEERS = []  # the one child of this process, while it lives


def card() -> dict:
  """Name, driver and memory, as nvidia-smi says; of a CPU, that it is one."""
  if TOY:
    return dict(device="cpu", driver="none", memory_mib=0)
  query = "--query-gpu=name,driver_version,memory.total"
  command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
  text = subprocess.check_output(command, text=True, timeout=60)
  name, driver, memory = (x.strip() for x in text.splitlines()[0].split(","))
  return dict(device=name, driver=driver, memory_mib=int(float(memory)))


def peaks_of(section, dtype: str) -> None:
  """Puts the published and the measured peak of a dtype into a section."""
  which = ("bfloat16", "float32").index(dtype)
  size = 256 if TOY else 8192
  section.peaks = dict(
    published=measure.published(jax.devices()[0].device_kind)[which],
    measured=measure.product_peak(dtype, size, 1 if TOY else 5, 3),
  )
  section.note(
    f"{dtype} peak: published {section.peaks['published'] or 'not listed'}, "
    f"{size}^3 products here {section.peaks['measured']:.3g} FLOP/s"
  )


def settle(section, rows: int) -> None:
  """What the rows of a model's section are of."""
  sizes = {n: getattr(MODEL, n) for n in SHAPE}
  section.settings |= dict(model=sizes, rows=rows, length=LENGTH)
  section.note(
    f"{decoder.parameter_count(MODEL):,} parameters ({sizes}), {rows} rows of "
    f"{LENGTH}"
  )


def peer_of(section):
  """A Peer that says what it is; None, with a line, where there is none."""

  def start():
    if not PEERS or PEERS[0].child.poll() is not None:
      PEERS[:] = [measure.Peer(section.path.with_name("peer.log"), TOY)]
    section.settings["peer"] = PEERS[0].ask(120, do="hello")
    return PEERS[0]

  return section.attempt("torch's process", start)


def alternating(section, what: str, sides: dict, counts: dict) -> None:
  """Adds a row for each of the sides, which take turns."""
  times = section.attempt(what, lambda: measure.alternate(sides, REPEATS))
  for who, seconds in (times or {}).items():
    section.add(what, who, seconds, **counts)


def draw(mesh, seed: int, shape, axes) -> jax.Array:
  """Normal bfloat16 numbers on the mesh."""
  x = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
  return jax.device_put(x, sharding.named_sharding(mesh, *axes))


def seen_of(mesh, rows: int, length: int, segments: bool) -> attention.Seen:
  """Positions from 0, anew in each of three segments where there are any."""
  slot = np.arange(length)
  starts = np.array([0, length // 5, length // 2] if segments else [0])
  which = np.searchsorted(starts, slot, side="right") - 1
  position = jnp.asarray(slot - starts[which], jnp.int32)[None]
  if not segments:
    return attention.Seen(position, position)
  segment = np.tile(which.astype(np.int32), (rows, 1))
  segment = sharding.put(mesh, segment, "batch", None)
  return attention.Seen(position, position, segment, segment)


def attend(kernel: str, seen, window: int, size: int):
  """(q, k, v) -> values, through the model's own door."""
  spec = attention.Attention(kernel, size**-0.5, windows=(window,))
  return lambda q, k, v: attention.attend(
    q, k, v, seen, spec, None, sharding.SPREAD
  )


def queries(mesh, rows, length, groups, per_group, size) -> list[jax.Array]:
  """q, k, v and a cotangent."""
  wide = ("batch", None, "heads", None, None)
  q = (rows, length, groups, per_group, size)
  shapes = (q, q[:3] + q[4:], q[:3] + q[4:], q)
  return [draw(mesh, i, s, wide[: len(s)]) for i, s in enumerate(shapes)]


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(fn, q, k, v, g):
  """Values, then the gradients of sum(values * g), all float32."""
  y, back = jax.vjp(fn, q, k, v)
  return [x.astype(jnp.float32) for x in (y, *back(g.astype(y.dtype)))]


def equality(section, mesh, name, case) -> None:
  """Errors of cuDNN and of plain, both bfloat16, to plain in float32."""
  groups, per_group, size, window, segments = case
  rows, length = 2, 512
  if TOY:
    size, window, length = size // 8, window // 5, 96
  seen = seen_of(mesh, rows, length, segments)
  args = queries(mesh, rows, length, groups, per_group, size)
  with jax.default_matmul_precision("highest"):  # else float32 is TF32
    exact = values_and_gradients(
      attend("plain", seen, window, size), *(x.astype("float32") for x in args)
    )
  gap = lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
  errors = {}
  for kernel in ("cudnn", "plain"):
    ours = values_and_gradients(attend(kernel, seen, window, size), *args)
    errors[kernel] = list(map(gap, ours, exact))
  holds = all(e <= TOLERANCE for e in errors["cudnn"])  # NaN does not
  found = section.settings.setdefault("equality", [])
  found.append(dict(case=name, holds=holds))
  words = {k: ", ".join(f"{e:.1e}" for e in v) for k, v in errors.items()}
  section.note(
    f"{name}: error over largest value (values, q, k, v): cuDNN "
    f"{words['cudnn']}; plain bfloat16 {words['plain']}"
  )
  if not holds:
    section.failures.append(f"{name}: beyond {TOLERANCE}: {errors}")


def attention_section(section, mesh) -> None:
  for name, case in CASES.items():
    section.attempt(name, lambda: equality(section, mesh, name, case))
  peaks_of(section, "bfloat16")
  m, size = MODEL, MODEL.head_size
  args = queries(mesh, ROWS, LENGTH, m.kv_heads, m.heads // m.kv_heads, size)
  causal = 2 * m.heads * size * LENGTH * (LENGTH + 1) * ROWS
  peer = peer_of(section)
  for backward in (False, True):
    sides = {}
    kernels = ("cudnn", False), ("plain", False), ("cudnn", True)
    for kernel, segments in kernels:
      fn = attend(kernel, seen_of(mesh, ROWS, LENGTH, segments), 0, size)
      run = functools.partial(values_and_gradients, fn, *args)
      if not backward:
        run = functools.partial(jax.jit(fn), *args[:3])
      who = f"{OURS}, {kernel}{', three segments' if segments else ''}"
      side = section.attempt(who, lambda: measure.clock(run, 5 * CALLS))
      sides |= {who: side} if side else {}
    if peer:
      sizes = {n: getattr(m, n) for n in ("heads", "kv_heads", "head_size")}
      request = dict(do="attention", backward=backward, calls=5 * CALLS)
      request |= dict(rows=ROWS, length=LENGTH, **sizes)
      ask = lambda: peer.ask(90, **request)["seconds"]
      sides |= {"torch, SDPA": ask} if section.attempt("SDPA", ask) else {}
    what = "forward and backward" if backward else "forward"
    alternating(
      section, what, sides, dict(flops=causal * (3 if backward else 1))
    )
  section.note("FLOPs are of the causal half, with three segments too")


class Step:
  """Our train step over one batch, its state donated from call to call."""

  def __init__(self, mesh, loss: str, rows: int, remat: str):
    m, responses = MODEL._replace(remat=remat), 2 if loss == "dpo" else 1
    logps_fn = PRODUCERS["chunked"](m, CHUNK)
    shape = (1, rows, responses, LENGTH)
    ids = np.random.default_rng(0).integers(0, m.vocab, shape, np.int32)
    tokens = sharding.put(mesh, ids, None, "batch", None, None)
    mask = jnp.ones_like(tokens)
    params = decoder.init(jax.random.key(0), m)
    # Computed once, as for a run: the reference is the first policy.
    ref = jax.jit(lambda p, t, k: logps_fn(p, t, k))(params, tokens[0], mask[0])
    ref = jax.tree.map(lambda x: x[None], ref)
    self.batch = Batch(tokens, mask, ref, lr=np.float32(1e-5))
    tx = optim.make_optimizer(clip=1.0, weight_decay=0.0, b2=0.98)
    bound = bind(LOSSES[loss], loss, {})
    self.step = steps.make_train_step(logps_fn, bound, tx)
    self.state = steps.init_state(params, tx)
    self.counts = dict(
      flops=3 * rows * responses * measure.useful(m, LENGTH),
      tokens=rows * responses * LENGTH,
    )
    self.first = divide(jax.device_get(self()))

  def __call__(self):
    self.state, totals = self.step(self.state, self.batch)
    return totals


def fastest(section, mesh, loss: str, rows: int):
  """Times a step under every remat; the fastest's name and Step, or None."""
  found = {}
  for remat in ("none", "dots") if TOY else ("none", "dots", "full"):

    def run():
      step = Step(mesh, loss, rows, remat)
      side = measure.clock(step, CALLS)
      seconds = [side() for _ in range(2)]
      what = f"{loss} step, {rows} rows, remat {remat}, head chunk {CHUNK}"
      section.add(what, OURS, seconds, **step.counts)
      return min(seconds)

    if seconds := section.attempt(remat, run):
      found[seconds] = remat
  if not found:
    return None
  best = found[min(found)]
  return best, Step(mesh, loss, rows, best)


def train_section(section, mesh) -> None:
  peaks_of(section, "bfloat16")
  settle(section, ROWS)
  remat, step = fastest(section, mesh, "sft", ROWS) or ("", None)
  peer = peer_of(section) if step else None
  kinds = [("autocast", False), ("bfloat16", False)]
  kinds += [] if TOY else [("autocast", True), ("bfloat16", True)]
  for precision, compiled in kinds if peer else []:
    who = f"{THEIRS}, {precision}{', torch.compile' if compiled else ''}"
    if section.left() < 90 and not TOY:
      section.note(f"no time for {who}")
      continue
    request = dict(do="train", compile=compiled, precision=precision, rows=ROWS)
    request |= dict(zip(SHAPE, SIZES), length=LENGTH, calls=CALLS)
    ask = lambda: peer.ask(180 if compiled else 90, **request)["seconds"]
    if section.attempt(who, ask):
      ours = {f"{OURS}, remat {remat}": measure.clock(step, CALLS)}
      what = f"train step, {ROWS} rows"
      alternating(section, what, ours | {who: ask}, step.counts)


def dpo_section(section, mesh) -> None:
  peaks_of(section, "bfloat16")
  pairs = max(ROWS // 2, 2)
  settle(section, 2 * pairs)
  _, step = fastest(section, mesh, "dpo", pairs) or ("", None)
  if step:
    gap = abs(step.first["preference_loss"] - math.log(2))
    section.note(f"loss of the first step: ln 2 within {gap:.1e}")
    if gap > 1e-3:
      section.failures.append(f"the first loss is {gap} from ln 2")


def mixture_section(section, mesh) -> None:
  peaks_of(section, "float32")
  n, width, k = (2048, 32, 2) if TOY else (122_270, 4096, 2)
  section.settings |= dict(rows=n, width=width, components=k)
  section.attempt("sums and float64's", lambda: sums_exact(section, mesh))
  x = np.random.default_rng(0).standard_normal((n, width), np.float32)
  x[: n // 2, :8] += 3.0
  space = whiten.Space(np.zeros(width), np.eye(width), np.ones(width), 1.0, x)
  flops = em.em_flops(n, width, k, "full")

  def iterations():
    one = np.stack([np.eye(width)] * k)
    state = em.Gaussians(np.log(np.full(k, 1 / k)), np.float64(x[:k]), one)
    sweep, seconds = em.sweep_of(mesh, x, 1e-4, "full"), []
    sweep(state)  # compiles
    while len(seconds) < REPEATS and (section.left() > 90 or TOY):
      start = time.perf_counter()
      state = em.rounded(state)
      moments, _ = sweep(state)
      state = em.m_step(moments, state.means, 1e-4, "full")
      seconds.append(time.perf_counter() - start)
    section.add("EM iteration, whole", OURS, seconds, flops=flops)

  def once(what, run, count):
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    section.add(f"{what}, whole", OURS, [seconds], flops=count)

  def fit():
    few = mixture.MixtureOptions(k, starts=1, tol=-1.0, max_iterations=2)
    mixture.fit_mixture(mesh, x, few, space=space)

  reduce = lambda: whiten.whiten(mesh, x, mixture.MixtureOptions())
  section.attempt("iteration", iterations)
  section.attempt("fit", lambda: once("fit of two sweeps", fit, 2 * flops))
  reduction = "reduction to at most 64 directions"
  section.attempt(reduction, lambda: once(reduction, reduce, 2 * n * width**2))


def sums_exact(section, mesh) -> None:
  """The device's second moments and NumPy's; TF32 would be 3e-4 off."""
  n, width = (256, 16) if TOY else (4096, 256)
  x = np.random.default_rng(3).standard_normal((n, width), np.float32)
  state = em.Gaussians(np.zeros(1), np.zeros((1, width)), np.eye(width)[None])
  sums, _ = em.sweep_of(mesh, x, 0.0, "full")(state)
  exact = np.float64(x).T @ np.float64(x)
  error = np.linalg.norm(sums.second[0] - exact) / np.linalg.norm(exact)
  section.note(f"second moments and float64's: relative error {error:.1e}")
  if not error < 1e-5:
    section.failures.append(f"second moments are {error:.1e} off: TF32?")


SECTIONS = {  # name: (function, seconds it should take at most on a GPU)
  "attention": (attention_section, 200),
  "train": (train_section, 480),
  "dpo": (dpo_section, 180),
  "mixture": (mixture_section, 200),
}


def summary(out: pathlib.Path) -> None:
  """All that lies in a folder of results, as one page."""
  for name in SECTIONS:
    path = out / f"{name}.json"
    print(f"\n## {name}\n")
    if not path.exists():
      print("- no result")
      continue
    found = json.loads(path.read_text())
    print(f"{json.dumps(found['settings'])}\n\n{measure.HEADER}")
    for row in found["rows"]:
      print(measure.as_line(row))
    for line in found["notes"] + [f"FAILED {x}" for x in found["failures"]]:
      print(f"- {line}")


def run_section(name: str, out: pathlib.Path) -> int:
  """Runs one section in this process; how much of it failed."""
  run, limit = SECTIONS[name]
  settings = card() | dict(toy=TOY, jax=jax.__version__)
  settings["xla_flags"] = os.environ.get("XLA_FLAGS", "")
  print(f"\n## {name} ({settings})\n", flush=True)
  mesh = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  section = measure.Section(name, out, limit, settings)
  with jax.set_mesh(mesh):
    section.attempt(name, lambda: run(section, mesh))
  section.save()
  for peer in PEERS:
    peer.close()
  return len(section.failures)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--toy", action="store_true", help="tiny, on CPU")
  parser.add_argument("--sections", default=",".join(SECTIONS))
  parser.add_argument("--out", default="runs/gpu", help="folder of the JSON")
  parser.add_argument("--summary", action="store_true", help="measure nothing")
  args = parser.parse_args()
  out, names = pathlib.Path(args.out), args.sections.split(",")
  out.mkdir(parents=True, exist_ok=True)
  if unknown := [n for n in names if n not in SECTIONS]:
    parser.error(f"unknown sections {unknown}; known: {', '.join(SECTIONS)}")
  if args.summary:
    summary(out)
    return 0
  if len(names) > 1:
    toy = ["--toy"] if TOY else []
    each = [sys.executable, __file__, f"--out={out}", *toy]
    codes = [subprocess.call([*each, f"--sections={n}"]) for n in names]
    return max(codes)
  if TOY:
    jax.config.update("jax_disable_most_optimizations", True)  # compiles soon
    # The same path without the card: XLA's own attention.
    xla = functools.partial(attention._cudnn, implementation="xla")
    attention.KERNELS["cudnn"] = functools.partial(attention._on_shards, xla)
  elif jax.default_backend() != "gpu":
    parser.error(
      f"found no GPU, jax runs on {jax.default_backend()}; "
      "--toy rehearses on CPU"
    )
  return int(run_section(names[0], out) > 0)


if __name__ == "__main__":
  sys.exit(main())
