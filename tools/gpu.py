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
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
if os.environ.get("JAXALIGN_WHEELS"):  # behind what is installed
  sys.path.append(os.environ["JAXALIGN_WHEELS"])
TOY = "--toy" in sys.argv
if TOY:  # before jax is imported
  os.environ["JAX_PLATFORMS"] = "cpu"
# Both libraries share the card, so none may take it whole.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_measure as measure
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding
from jaxalign.data.tokens import TokenRows
from jaxalign.model import attention
from jaxalign.model import decoder
from jaxalign.model import logprob
from jaxalign.select import chunks
from jaxalign.select import embed
from jaxalign.select import mixture
from jaxalign.select import space as spaces
from jaxalign.train import optim
from jaxalign.train import step as steps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import LOSSES
from jaxalign.train.losses import bind
from jaxalign.train.metrics import divide

OURS, THEIRS = "jaxalign", "transformers, SDPA"
LENGTH = 64 if TOY else 2048
CALLS, REPEATS = (1, 2) if TOY else (4, 5)
MODEL = decoder.ModelConfig(
    layers=16, width=2048, heads=16, kv_heads=8, head_size=128, ff=8192,
    vocab=32000, context=LENGTH, tied=False, dtype="bfloat16",
    attention="cudnn")
if TOY:
  MODEL = MODEL._replace(layers=2, width=64, heads=4, kv_heads=2, head_size=16,
                         ff=128, vocab=256)
CHUNK = 32 if TOY else 512  # positions of the head at once
TOLERANCE = 2e-2  # of the largest value; as jaxalign/model/attention.py says


def peaks_of(section, dtype: str) -> None:
  """Puts the published and the measured peak of a dtype into a section."""
  which = ("bfloat16", "float32").index(dtype)
  size = 256 if TOY else 8192
  section.peaks = dict(
      published=measure.published(jax.devices()[0].device_kind)[which],
      measured=measure.product_peak(dtype, size, 1 if TOY else 5, 3))
  stated = section.peaks["published"]
  section.note(f"{dtype} peak: published "
               f"{f'{stated / 1e12:.1f}' if stated else 'not listed'}, "
               f"{size} x {size} x {size} products here "
               f"{section.peaks['measured'] / 1e12:.2f} TFLOP/s")


def draw(mesh, seed: int, shape, axes, dtype=jnp.bfloat16) -> jax.Array:
  """Normal numbers on the mesh."""
  return jax.device_put(jax.random.normal(jax.random.key(seed), shape, dtype),
                        sharding.named(mesh, *axes))


def rows_that_fit() -> int:
  """Rows of a train step that leaves torch its half of the card."""
  if TOY:
    return 2
  return 8 if card()["memory_mib"] >= 120_000 else 4


@functools.lru_cache
def card() -> dict:
  """Name, driver and memory, as nvidia-smi says; of a CPU, that it is one."""
  if TOY:
    return dict(device="cpu", driver="none", memory_mib=0)
  line = subprocess.run(
      ["nvidia-smi", "--query-gpu=name,driver_version,memory.total",
       "--format=csv,noheader,nounits"], capture_output=True, text=True,
      check=True, timeout=60).stdout.splitlines()[0]
  name, driver, memory = (x.strip() for x in line.split(","))
  return dict(device=name, driver=driver, memory_mib=int(float(memory)))


PEERS = []  # the one child of this process, while it lives


def peer_of(section):
  """A Peer that says what it is; None, with a line, where there is none."""
  def start():
    if not PEERS or PEERS[0].child.poll() is not None:
      PEERS[:] = [measure.Peer(section.path.with_name("peer.log"), TOY)]
    section.settings["peer"] = PEERS[0].ask(
        120 if TOY else min(120, section.left()), do="hello")
    return PEERS[0]
  return section.attempt("the peer", start)


def release(peer) -> None:
  """The peer's memory is free again; it goes if it does not answer."""
  try:
    peer.ask(30, do="release")
  except RuntimeError:
    peer.close()


def model_sizes(rows: int) -> dict:
  """What the peer must know to build MODEL."""
  return dict({n: getattr(MODEL, n) for n in (
      "layers", "width", "heads", "kv_heads", "head_size", "ff", "vocab")},
              rows=rows, length=LENGTH)


# attention


CASES = {  # name: (groups, queries of a group, head size, window, segments)
    "causal, C 64": (4, 1, 64, 0, False),
    "causal, C 128": (4, 1, 128, 0, False),
    "GQA 2 x 4, C 128": (2, 4, 128, 0, False),
    "GQA 2 x 4, C 64": (2, 4, 64, 0, False),
    "window 100, C 128": (2, 2, 128, 100, False),
    "segments, C 128": (2, 2, 128, 0, True),
    "segments and window 50, C 64": (2, 2, 64, 50, True)}


def seen_of(mesh, rows: int, length: int, segments: bool) -> attention.Seen:
  """Positions from 0, anew in each of three segments where there are any."""
  slot = np.arange(length)
  if not segments:
    position = jnp.asarray(slot, jnp.int32)[None]
    return attention.Seen(position, position)
  starts = np.array([0, length // 5, length // 2])
  which = np.searchsorted(starts, slot, side="right") - 1
  position = jnp.asarray(slot - starts[which], jnp.int32)[None]
  segment = sharding.put(mesh, np.tile(which.astype(np.int32), (rows, 1)),
                         "batch", None)
  return attention.Seen(position, position, segment, segment)


def attend(kernel: str, seen, window: int, size: int):
  """(q, k, v) -> values, through the model's own door."""
  return lambda q, k, v: attention.attend(
      q, k, v, seen, kernel=kernel, scale=size**-0.5, windows=(window,),
      place=sharding.SPREAD)


def values_and_gradients(kernel, seen, window, size, q, k, v, g):
  """Values, then the gradients of sum(values * g), all float32."""
  @jax.jit
  def run(q, k, v, g):
    y, back = jax.vjp(attend(kernel, seen, window, size), q, k, v)
    return [x.astype(jnp.float32) for x in (y, *back(g.astype(y.dtype)))]
  return run(q, k, v, g)


def both(f):
  """Jitted: f forward and backward with respect to all it is given."""
  def run(*args):
    y, back = jax.vjp(f, *args)
    return back(y)  # any cotangent takes as long
  return jax.jit(run)


def attention_equality(section, mesh) -> None:
  """Errors of cuDNN and of plain, both bfloat16, to plain in float32."""
  rows, length = 2, 96 if TOY else 512
  print("| case | values, q, k, v: largest error over largest value, cuDNN | "
        f"plain bfloat16 | within {TOLERANCE} |\n|---|---|---|---|")
  found = section.settings.setdefault("equality", [])

  def one(name, groups, per_group, size, window, segments):
    if TOY:
      size, window = size // 8, window // 5
    seen = seen_of(mesh, rows, length, segments)
    wide = ("batch", None, "heads", None, None)
    narrow = ("batch", None, "heads", None)
    args = [draw(mesh, 1, (rows, length, groups, per_group, size), wide),
            draw(mesh, 2, (rows, length, groups, size), narrow),
            draw(mesh, 3, (rows, length, groups, size), narrow),
            draw(mesh, 4, (rows, length, groups, per_group, size), wide)]
    with jax.default_matmul_precision("highest"):  # else float32 is TF32
      exact = values_and_gradients("plain", seen, window, size,
                                   *(x.astype(jnp.float32) for x in args))
    errors = {}
    for kernel in ("cudnn", "plain"):
      ours = values_and_gradients(kernel, seen, window, size, *args)
      errors[kernel] = [float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
                        for a, b in zip(ours, exact)]
    holds = all(e <= TOLERANCE for e in errors["cudnn"])  # NaN does not
    found.append(dict(case=name, holds=holds, **errors))
    words = {k: ", ".join(f"{e:.1e}" for e in v) for k, v in errors.items()}
    print(f"| {name} | {words['cudnn']} | {words['plain']} | "
          f"{'yes' if holds else 'NO'} |", flush=True)
    if not holds:
      section.failures.append(f"{name}: beyond {TOLERANCE}: {errors}")

  for name, case in CASES.items():
    section.attempt(f"equality, {name}", lambda: one(name, *case))
  section.save()


def attention_section(section, mesh) -> None:
  attention_equality(section, mesh)
  peaks_of(section, "bfloat16")
  rows, m = (2, MODEL) if TOY else (8, MODEL)
  groups, per_group, size = m.kv_heads, m.heads // m.kv_heads, m.head_size
  q = draw(mesh, 5, (rows, LENGTH, groups, per_group, size),
           ("batch", None, "heads", None, None))
  k, v = (draw(mesh, s, (rows, LENGTH, groups, size),
               ("batch", None, "heads", None)) for s in (6, 7))
  causal = 2 * m.heads * size * LENGTH * (LENGTH + 1) * rows
  peer = peer_of(section)
  section.settings |= dict(rows=rows, length=LENGTH, heads=m.heads,
                           kv_heads=groups, head_size=size, dtype="bfloat16")

  def side(kernel, segments, backward):
    f = attend(kernel, seen_of(mesh, rows, LENGTH, segments), 0, size)
    run = both(f) if backward else jax.jit(f)
    return measure.clock(lambda: run(q, k, v), 5 * CALLS)

  for backward in (False, True):
    sides = {}
    for who, kernel, segments in (
        ("cudnn", "cudnn", False), ("plain", "plain", False),
        ("cudnn, three segments", "cudnn", True)):
      made = section.attempt(who, lambda: side(kernel, segments, backward))
      if made:
        sides[f"{OURS}, {who}"] = made
    if peer:
      ask = lambda: peer.ask(min(90, section.left()), do="attention", rows=rows,
                             length=LENGTH, heads=m.heads, kv_heads=groups,
                             head_size=size, backward=backward,
                             calls=5 * CALLS)["seconds"]
      if section.attempt("torch's SDPA", ask):
        sides["torch, SDPA"] = ask
    times = section.attempt("attention's time",
                            lambda: measure.alternate(sides, REPEATS)) or {}
    for who, seconds in times.items():
      section.add("forward and backward" if backward else "forward", who,
                  seconds, operations=causal * (3 if backward else 1))
  if peer:
    release(peer)
  section.note("operations: the causal half, with three segments too (which "
               "need less); backward twice forward: the scores, which "
               "flash attention computes again, are not counted again")


# forward


def forward_section(section, mesh) -> None:
  peaks_of(section, "bfloat16")
  rows = 2 if TOY else 8
  settle(section, rows)
  operations = rows * measure.useful(MODEL, LENGTH)
  bare = rows * measure.useful(MODEL, LENGTH, 0)
  weights = decoder.init(jax.random.key(0), MODEL, mesh)
  tokens = tokens_of(mesh, (rows, 1))
  mask = jnp.ones_like(tokens)
  half = jax.jit(lambda p: jax.tree.map(
      lambda w: w.astype(jnp.bfloat16), p))(weights)

  def logps(m, params, chunk):
    fn = PRODUCERS["chunked"](m, chunk)
    run = jax.jit(lambda p, t, k: fn(p, t, k).sum)
    return lambda: run(params, tokens, mask)

  def close_to_plain():
    """A token's log-probability, cuDNN's beside plain's, on two rows."""
    two = tokens[:2, 0]

    @functools.partial(jax.jit, static_argnames="kernel")
    def each(params, two, kernel):
      m = MODEL._replace(attention=kernel)
      x = decoder.forward(params, two, m)
      return logprob.token_logps(x, decoder.head(params, m), two, CHUNK)
    gap = jnp.abs(each(half, two, "cudnn") - each(half, two, "plain"))
    section.note(f"log-probability of a token, cuDNN beside plain: mean "
                 f"difference {float(gap.mean()):.1e} nats, largest "
                 f"{float(gap.max()):.1e}")
  section.attempt("cuDNN beside plain", close_to_plain)

  def hidden():
    run = jax.jit(lambda p, t: decoder.forward(p, t, MODEL))
    return lambda: run(half, tokens[:, 0])

  ours = {
      f"{OURS}, bfloat16 weights": (lambda: logps(MODEL, half, CHUNK),
                                    operations),
      f"{OURS}, float32 weights": (lambda: logps(MODEL, weights, CHUNK),
                                   operations),
      f"{OURS}, head in chunks of {CHUNK // 8}": (
          lambda: logps(MODEL, half, CHUNK // 8), operations),
      f"{OURS}, without the head": (hidden, bare)}
  sides, counts = {}, {}
  for who, (build, count) in ours.items():
    side = section.attempt(who, lambda: measure.clock(build(), CALLS))
    if side:
      sides[who], counts[who] = side, count
  peer = peer_of(section)
  for compiled in (False, True) if peer and not TOY else (False,) * bool(peer):
    who = f"{THEIRS}{', torch.compile' if compiled else ''}"
    ask = lambda: peer.ask(min(120, section.left()), do="forward",
                           compile=compiled, calls=CALLS,
                           **model_sizes(rows))["seconds"]
    if section.left() < 30 or not section.attempt(who, ask):
      continue
    # One of theirs is held at a time; ours take turns with each.
    pair = {**sides, who: ask}
    times = section.attempt(f"{who}, beside ours",
                            lambda: measure.alternate(pair, REPEATS)) or {}
    for name, seconds in times.items():
      section.add("forward, log-probabilities" if name != who else
                  "forward, logits", name, seconds, tokens=rows * LENGTH,
                  operations=counts.get(name, operations))
  if not section.rows:  # nobody to take turns with
    for name, seconds in measure.alternate(sides, REPEATS).items():
      section.add("forward, log-probabilities", name, seconds,
                  tokens=rows * LENGTH, operations=counts[name])
  if peer:
    release(peer)
  section.attempt("the profile", lambda: profile(
      section, logps(MODEL, half, CHUNK), "forward"))


# train and dpo


def settle(section, rows: int) -> None:
  """What the rows of a model's section are of."""
  m = MODEL
  section.settings |= dict(
      model={n: getattr(m, n) for n in ("layers", "width", "heads", "kv_heads",
                                        "head_size", "ff", "vocab", "dtype",
                                        "attention")},
      parameters=decoder.parameter_count(m), rows=rows, length=LENGTH)
  section.note(
      f"{decoder.parameter_count(m):,} parameters ({m.layers} layers, width "
      f"{m.width}, {m.heads} heads over {m.kv_heads} of {m.head_size}, "
      f"feed-forward {m.ff}, {m.vocab} pieces), {rows} rows of {LENGTH}")


def tokens_of(mesh, shape, seed: int = 0) -> jax.Array:
  """Random full rows [*shape, LENGTH] on the mesh, cut along the row axis."""
  ids = np.random.default_rng(seed).integers(
      0, MODEL.vocab, (*shape, LENGTH), np.int32)
  axes = ("batch",) if len(shape) == 2 else (None, "batch")
  return sharding.put(mesh, ids, *axes, *[None] * (ids.ndim - len(axes)))


class Step:
  """Our train step over one batch, its state donated from call to call."""

  def __init__(self, mesh, loss: str, rows: int, remat: str, chunk: int):
    self.m = MODEL._replace(remat=remat)
    responses = 2 if loss == "dpo" else 1
    logps_fn = PRODUCERS["chunked"](self.m, chunk)
    tokens = tokens_of(mesh, (1, rows, responses))
    mask = jnp.ones_like(tokens)
    params = decoder.init(jax.random.key(0), self.m, mesh)
    # Computed once, as for a run: the reference is the first policy.
    ref = jax.jit(lambda p, t, k: logps_fn(p, t, k))(params, tokens[0], mask[0])
    self.batch = dict(tokens=tokens, mask=mask, ref_sum=ref.sum[None],
                      ref_count=ref.count[None], lr=np.float32(1e-5))
    tx = optim.make_optimizer(clip=1.0, weight_decay=0.0, b2=0.98)
    self.step = steps.make_train_step(
        logps_fn, bind(LOSSES[loss], loss, {}), tx)
    self.state = steps.init_state(params, tx)
    self.operations = 3 * rows * responses * measure.useful(self.m, LENGTH)
    self.tokens = rows * responses * LENGTH
    self.first = divide(jax.device_get(self()))

  def __call__(self):
    self.state, totals = self.step(self.state, self.batch)
    return totals


def try_step(section, mesh, what: str, *args, repeats: int = 2):
  """(seconds a call, Step) of one variant, or None where it fails."""
  def run():
    step = Step(mesh, *args)
    side = measure.clock(step, CALLS)
    seconds = [side() for _ in range(repeats)]
    section.add(what, OURS, seconds, operations=step.operations,
                tokens=step.tokens)
    return min(seconds), step
  return section.attempt(what, run)


def variants(section, mesh, loss: str, rows: int):
  """Tries what a person may set; returns the fastest's settings, or None."""
  best, best_seconds = None, math.inf
  for remat, chunk in ((("none", CHUNK), ("dots", CHUNK)) if TOY else
                       (("none", CHUNK), ("dots", CHUNK), ("full", CHUNK),
                        ("none", 64), ("none", LENGTH))):
    if best and section.left() < 60 and not TOY:
      section.note(f"no time for remat {remat}, chunk {chunk}")
      continue
    found = try_step(
        section, mesh, f"{loss} step, {rows} rows, remat {remat}, head chunk "
        f"{chunk}", loss, rows, remat, chunk)
    if found and found[0] < best_seconds:
      best, best_seconds = (remat, chunk), found[0]
    del found
  return best


def train_section(section, mesh) -> None:
  peaks_of(section, "bfloat16")
  rows = rows_that_fit()
  settle(section, rows)
  section.note("train step: make_train_step with the sft loss, float32 state "
               "donated, clip and AdamW inside; useful operations 3 x forward")
  best = variants(section, mesh, "sft", rows)
  if best is None:
    return
  step = Step(mesh, "sft", rows, *best)
  side = measure.clock(step, CALLS)
  section.attempt("the profile", lambda: profile(section, step, "train"))
  peer = peer_of(section)
  wanted = [("autocast", False), ("bfloat16", True), ("autocast", True),
            ("bfloat16", False)]
  for precision, compiled in wanted if peer else []:
    who = (f"{THEIRS}, {precision}{', torch.compile' if compiled else ''}")
    if compiled and TOY:
      continue
    if section.left() < (150 if compiled else 90) and not TOY:
      section.note(f"no time for {who}")
      continue
    theirs = rows

    def ask():
      return peer.ask(min(180 if compiled else 90, section.left() - 30),
                      do="train", compile=compiled, precision=precision,
                      calls=CALLS, **model_sizes(theirs))["seconds"]
    if not section.attempt(who, ask):
      theirs = rows // 2  # their half of the card may be too small
      if peer.child.poll() is not None:  # it took too long and was ended
        peer = peer_of(section)
        if not peer:
          break
        continue
      if not section.attempt(f"{who}, {theirs} rows", ask):
        continue
    times = section.attempt(f"{who}, beside ours", lambda: measure.alternate(
        {f"{OURS}, remat {best[0]}, head chunk {best[1]}": side, who: ask},
        REPEATS)) or {}
    for name, seconds in times.items():
      share = theirs / rows if name == who else 1
      section.add(f"train step, {int(share * rows)} rows", name, seconds,
                  operations=int(share * step.operations),
                  tokens=int(share * step.tokens))
  if peer:
    release(peer)
  step = side = None  # the card is free again
  section.attempt("the pieces", lambda: pieces(section, mesh, rows, best[1]))
  larger = ((2 * rows, best[0]), (4 * rows, "dots"))
  for more, remat in larger[:1] if TOY else larger:
    if section.left() > 60 or TOY:  # the card is all ours now
      try_step(section, mesh, f"sft step, {more} rows, remat {remat}, head "
               f"chunk {best[1]}", "sft", more, remat, best[1])


def profile(section, run, name: str) -> None:
  """A call by groups of kernels, and its largest kernels."""
  with tempfile.TemporaryDirectory() as folder:
    found = measure.kernels(run, pathlib.Path(folder), 2)
  if not found:
    section.note(f"{name}: the profiler saw no kernels")
    return
  busy = sum(found.values())
  groups = {g: 0.0 for g, _ in measure.GROUPS}
  for kernel, seconds in found.items():
    groups[measure.group_of(kernel)] += seconds
  whole = measure.seconds_a_call(run, CALLS)
  section.note(f"{name}, one call of {1e3 * whole:.2f} ms, kernels busy "
               f"{1e3 * busy:.2f} ms: " + ", ".join(
                   f"{g} {1e3 * s:.2f}" for g, s in groups.items()))
  for kernel, seconds in sorted(found.items(), key=lambda x: -x[1])[:12]:
    section.note(f"  {1e3 * seconds:.3f} ms {kernel[:90]}")


def pieces(section, mesh, rows: int, chunk: int) -> None:
  """The parts of a train step apart, each forward and backward.

  Their sum is not the step: apart, nothing overlaps or is fused, and what the
  norms, the rotations and the residuals cost is in none of them.
  """
  m, per = MODEL, rows * LENGTH
  groups, queries, size = m.kv_heads, m.heads // m.kv_heads, m.head_size
  wide = ("batch", None, "heads", None, None)
  x = draw(mesh, 8, (rows, LENGTH, m.width), ("batch", None, None))
  weight = lambda seed, *shape: draw(mesh, seed, shape, [None] * len(shape)
                                     ) * m.width**-0.5

  def projections(x, wq, wk, wv, wo):
    q, k, v = x @ wq, x @ wk, x @ wv
    return q @ wo, k, v

  def ff(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down

  inner = m.heads * size
  narrow = groups * size
  parts = {
      "attention": (both(attend("cudnn", seen_of(mesh, rows, LENGTH, False),
                                0, size)), m.layers,
                    3 * 2 * m.heads * size * LENGTH * (LENGTH + 1) * rows,
                    (draw(mesh, 9, (rows, LENGTH, groups, queries, size), wide),
                     *(draw(mesh, s, (rows, LENGTH, groups, size), wide[:4])
                       for s in (10, 11)))),
      "projections": (both(projections), m.layers,
                      3 * 2 * per * m.width * 2 * (inner + narrow),
                      (x, weight(12, m.width, inner),
                       weight(13, m.width, narrow), weight(14, m.width, narrow),
                       weight(15, inner, m.width))),
      "feed-forward": (both(ff), m.layers, 3 * 2 * per * m.width * m.ff * 3,
                       (x, weight(16, m.width, m.ff), weight(17, m.width, m.ff),
                        weight(18, m.ff, m.width))),
      "head": (both(lambda x, w, t: logprob.token_logps(x, w, t, chunk)), 1,
               3 * 2 * per * m.width * m.vocab,
               (x, weight(19, m.vocab, m.width).astype(jnp.float32),
                tokens_of(mesh, (rows, 1))[:, 0]))}
  for name, (run, times, operations, args) in parts.items():
    side = section.attempt(name, lambda: measure.clock(
        lambda: run(*args), CALLS))
    if side:
      seconds = [times * side() for _ in range(REPEATS)]
      section.add(f"{name}, {times} x forward and backward", OURS, seconds,
                  operations=times * operations)
  del parts, x

  tx = optim.make_optimizer(clip=1.0, weight_decay=0.0, b2=0.98)
  params = decoder.init(jax.random.key(1), m, mesh)
  gradients = jax.tree.map(lambda p: 0.01 * p, params)
  held = [steps.init_state(params, tx)]
  del params

  @jax.jit(donate_argnames=("state",))
  def update(state, gradients):
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    return state._replace(opt_state=opt_state, params=jax.tree.map(
        lambda p, u: p + 1e-5 * u, state.params, updates))

  def run():
    held[0] = update(held[0], gradients)
    return held[0].step
  side = measure.clock(run, CALLS)
  section.add("clip and AdamW", OURS, [side() for _ in range(REPEATS)])


def dpo_section(section, mesh) -> None:
  peaks_of(section, "bfloat16")
  pairs = 2 if TOY else rows_that_fit() // 2
  settle(section, 2 * pairs)
  found = section.attempt("dpo", lambda: variants_dpo(section, mesh, pairs))
  seconds, step = found or (None, None)
  if step:
    gap = abs(step.first["preference_loss"] - math.log(2))
    section.note(f"loss of the first step: ln 2 within {gap:.1e}")
    if gap > 1e-3:
      section.failures.append(f"the first loss is {gap} from ln 2")
  count = (3 * 2 * pairs * measure.useful(MODEL, LENGTH), 2 * pairs * LENGTH)
  del step, found
  peer = peer_of(section)
  if peer:
    skip, some = (1, 3) if TOY else (3, 13)
    with tempfile.TemporaryDirectory() as folder:
      try:
        theirs = peer.ask(section.left(), do="trl_dpo", pairs=pairs,
                          steps=some, skip=skip, folder=folder,
                          **model_sizes(2 * pairs))
        section.add(f"dpo step, {pairs} pairs", f"TRL {theirs['trl']}",
                    theirs["seconds"], operations=count[0], tokens=count[1])
      except RuntimeError as error:
        missing = "ModuleNotFoundError" in str(error) or "ImportError" in str(
            error)
        if missing:
          section.note(f"TRL skipped, it is not installed: {error}")
        else:
          section.failures.append(f"TRL: {error}")
          print(f"- FAILED TRL: {error}", flush=True)
    release(peer)
  if not TOY and section.left() > 60:
    try_step(section, mesh, f"dpo step, {4 * pairs} pairs, remat dots", "dpo",
             4 * pairs, "dots", CHUNK, repeats=REPEATS)


def variants_dpo(section, mesh, pairs):
  """The fastest of the variants of a DPO step: (seconds, Step)."""
  kept = None
  for remat in ("none", "dots"):
    kept = kept or try_step(section, mesh, f"dpo step, {pairs} pairs, remat "
                            f"{remat}, head chunk {CHUNK}", "dpo", pairs, remat,
                            CHUNK, repeats=REPEATS)
  return kept


# mixture and embed


def mixture_section(section, mesh) -> None:
  peaks_of(section, "float32")
  n, width, k = (2048, 32, 2) if TOY else (122_270, 4096, 2)
  section.settings |= dict(rows=n, width=width, components=k,
                           covariance="full", dtype="float32, HIGHEST")
  section.attempt("the sums, beside float64", lambda: sums_exact(section, mesh))
  rng = np.random.default_rng(0)
  x = rng.standard_normal((n, width), np.float32)
  x[:n // 2, :8] += 3.0
  one = np.ones(width)
  space = spaces.Space(np.zeros(width), np.eye(width), one, 1.0,
                       x.astype(np.float64))
  layout = chunks.padded_chunks(mesh), chunks.chunk_rows(n)
  operations = 4 * k * n * width**2

  ridge = 1e-4 * one

  def sweep():
    laid = (sharding.put(mesh, chunks.tiles(x, *layout), "pool", None, None),
            sharding.put(mesh, chunks.tiles(np.ones(n), *layout), "pool", None))
    state = mixture._State(np.log(np.full(k, 1 / k)), x[:k].astype(np.float64),
                           np.stack([np.diag(one)] * k))
    factors, log_det = mixture._factors(state.covariances)
    constants = mixture._constants(state, factors, log_det, ridge)
    params = tuple(sharding.put(mesh, np.float32(a), *[None] * a.ndim)
                   for a in (constants, state.means, factors))
    program = mixture._program(mesh, "full")
    side = measure.clock(lambda: program(params, laid), 1 if TOY else 2)
    section.add("E-step's sums on the device", OURS,
                [side() for _ in range(REPEATS)], operations=operations)
    side = params = None

    seconds = []
    for _ in range(REPEATS):
      if seconds and section.left() < 90 and not TOY:
        break
      start = time.perf_counter()
      sums, _ = mixture._e_step(program, mesh, laid, n, state, ridge)
      state = mixture._m_step(sums, state.means, ridge, "full")
      seconds.append(time.perf_counter() - start)
    section.add("EM iteration, whole (sums fetched and added in float64, "
                "M-step and factors on the host)", OURS, seconds,
                operations=operations)
  section.attempt("E-step and iteration", sweep)

  def fit():
    if section.left() < 60 and not TOY:
      section.note("no time for a whole fit")
      return
    start = time.perf_counter()
    found = mixture.fit(mesh, x, components=k, starts=1, tol=-1.0,
                        max_iterations=2, space=space)
    section.add("fit, one start, two sweeps, whole (k-means too)", OURS,
                [time.perf_counter() - start], operations=2 * operations)
    section.note(f"bound per row {found.trace[0]:.3f}, then "
                 f"{found.trace[1]:.3f}")
  section.attempt("fit", fit)

  def reduce():
    if section.left() < 45 and not TOY:
      section.note("no time for the reduction to 64 directions")
      return
    start = time.perf_counter()
    spaces.prepare(mesh, x, pca="auto")
    section.add("reduction to at most 64 directions, whole (Gram matrix on the "
                "device; eigenvectors and float64 projection on the host)",
                OURS, [time.perf_counter() - start],
                operations=2 * n * width**2)
  section.attempt("reduction", reduce)
  section.note(f"operations of a sweep: 4 K n P^2, K {k}, n {n}, P {width}: "
               "the whitened rows and the second moments, dense")


def sums_exact(section, mesh) -> None:
  """The device's second moments beside NumPy's; TF32 would be 3e-4 off."""
  n, width = (256, 16) if TOY else (4096, 256)
  rng = np.random.default_rng(3)
  x = rng.standard_normal((n, width), np.float32)
  layout = chunks.padded_chunks(mesh), chunks.chunk_rows(n)
  laid = (sharding.put(mesh, chunks.tiles(x, *layout), "pool", None, None),
          sharding.put(mesh, chunks.tiles(np.ones(n), *layout), "pool", None))
  state = mixture._State(np.zeros(1), np.zeros((1, width)),
                         np.eye(width)[None])
  sums, _ = mixture._e_step(mixture._program(mesh, "full"), mesh, laid, n,
                            state, np.zeros(width))
  exact = np.float64(x).T @ np.float64(x)
  error = np.linalg.norm(sums.second[0] - exact) / np.linalg.norm(exact)
  section.note(f"second moments beside float64: relative error {error:.1e}")
  if not error < 1e-5:
    section.failures.append(f"second moments are {error:.1e} off float64's, "
                            "wanted below 1e-5: a product ran in TF32")


def embed_section(section, mesh) -> None:
  peaks_of(section, "bfloat16")
  tile = 2 if TOY else 16
  settle(section, tile)
  params = jax.jit(lambda p: jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
                   )(decoder.init(jax.random.key(0), MODEL, mesh))
  rng = np.random.default_rng(0)
  calls = 3 if TOY else 8
  full = np.full(tile * calls, LENGTH)
  mixed = np.clip(rng.lognormal(math.log(LENGTH / 5), 0.7, 4 * tile * calls),
                  8, LENGTH).astype(int)
  runs = {
      "embedding (pool_rows)": (0, lambda rows: embed.pool_rows(
          mesh, params, MODEL, rows, pooling="mean", tile=tile)),
      "embedding and log-probability (score_rows)": (
          None, lambda rows: embed.score_rows(
              mesh, params, MODEL, rows, tile=tile, chunk=CHUNK))}
  kinds = [("full rows", full), ("rows of mixed length", mixed)]
  for what, (logit_rows, run) in runs.items():
    # Mixed rows compile a program a bucket, so they are run once.
    for name, lengths in kinds if logit_rows == 0 else kinds[:1]:
      def one():
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        rows = TokenRows(
            rng.integers(0, MODEL.vocab, offsets[-1]).astype(np.int32),
            offsets, np.ones(len(lengths), np.int32),
            np.zeros(len(lengths), np.int32))
        operations = sum(measure.useful(
            MODEL, int(n), None if logit_rows is None else 0) for n in lengths)
        run(rows)  # compiles every bucket
        seconds = []
        for _ in range(2 if TOY else 3):
          start = time.perf_counter()
          run(rows)
          seconds.append(time.perf_counter() - start)
        section.add(f"{what}, {len(lengths)} {name}", OURS, seconds,
                    operations=operations, tokens=int(offsets[-1]))
      if section.left() > 20 or TOY:
        section.attempt(f"{what}, {name}", one)
      else:
        section.note(f"no time for {what}, {name}")
  section.note(f"host and transfers inside the clock; {tile} rows a call, "
               "weights bfloat16; padding to a bucket is not useful")


SECTIONS = {  # name: (function, seconds it should take at most on a GPU)
    "attention": (attention_section, 200), "forward": (forward_section, 210),
    "train": (train_section, 480), "dpo": (dpo_section, 180),
    "mixture": (mixture_section, 200), "embed": (embed_section, 150)}


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
  parser.add_argument("--limit", type=float, default=0,
                      help="seconds of each section; 0: its own")
  parser.add_argument("--summary", action="store_true",
                      help="print what lies in --out, measure nothing")
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
  if TOY:
    jax.config.update("jax_disable_most_optimizations", True)  # compiles soon
    # The same path without the card: XLA's own attention.
    attention.KERNELS["cudnn"] = functools.partial(
        attention._on_shards,
        functools.partial(attention._cudnn, implementation="xla"))
  elif jax.default_backend() != "gpu":
    parser.error(f"found no GPU, jax runs on {jax.default_backend()}; "
                 "--toy rehearses on CPU")
  settings = card() | dict(toy=TOY, jax=jax.__version__,
                           xla_flags=os.environ.get("XLA_FLAGS", ""))
  mesh = sharding.make_mesh(dict(fsdp=1, tensor=1), jax.devices()[:1])
  failed = 0
  with jax.set_mesh(mesh):
    for name in names:
      run, limit = SECTIONS[name]
      print(f"\n## {name} ({settings['device']}, driver {settings['driver']}, "
            f"jax {settings['jax']}{', TOY' if TOY else ''})\n", flush=True)
      section = measure.Section(name, out, args.limit or limit,
                                dict(settings))
      start = time.monotonic()
      section.attempt(name, lambda: run(section, mesh))
      section.settings["took"] = round(time.monotonic() - start, 1)
      section.save()
      failed += len(section.failures)
      print(f"- {name} took {section.settings['took']} s, "
            f"{len(section.failures)} failures", flush=True)
  for peer in PEERS:
    peer.close()
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
