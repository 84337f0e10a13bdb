"""cuDNN's attention beside plain's numbers, and its time."""

import gpu_measure as measure
from gpu_setup import (
  both,
  CALLS,
  draw,
  LENGTH,
  MODEL,
  OURS,
  peaks_of,
  peer_of,
  release,
  REPEATS,
  TOLERANCE,
  TOY,
)
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import sharding
from jaxalign.model import attention

CASES = {  # name: (groups, queries of a group, head size, window, segments)
  "causal, C 64": (4, 1, 64, 0, False),
  "causal, C 128": (4, 1, 128, 0, False),
  "GQA 2 x 4, C 128": (2, 4, 128, 0, False),
  "GQA 2 x 4, C 64": (2, 4, 64, 0, False),
  "window 100, C 128": (2, 2, 128, 100, False),
  "segments, C 128": (2, 2, 128, 0, True),
  "segments and window 50, C 64": (2, 2, 64, 50, True),
}


def seen_of(mesh, rows: int, length: int, segments: bool) -> attention.Seen:
  """Positions from 0, anew in each of three segments where there are any."""
  slot = np.arange(length)
  if not segments:
    position = jnp.asarray(slot, jnp.int32)[None]
    return attention.Seen(position, position)
  starts = np.array([0, length // 5, length // 2])
  which = np.searchsorted(starts, slot, side="right") - 1
  position = jnp.asarray(slot - starts[which], jnp.int32)[None]
  segment = sharding.put(
    mesh, np.tile(which.astype(np.int32), (rows, 1)), "batch", None
  )
  return attention.Seen(position, position, segment, segment)


def attend(kernel: str, seen, window: int, size: int):
  """(q, k, v) -> values, through the model's own door."""
  spec = attention.Attention(kernel, size**-0.5, windows=(window,))
  return lambda q, k, v: attention.attend(
    q, k, v, seen, spec, None, sharding.SPREAD
  )


def values_and_gradients(kernel, seen, window, size, q, k, v, g):
  """Values, then the gradients of sum(values * g), all float32."""

  @jax.jit
  def run(q, k, v, g):
    y, back = jax.vjp(attend(kernel, seen, window, size), q, k, v)
    return [x.astype(jnp.float32) for x in (y, *back(g.astype(y.dtype)))]

  return run(q, k, v, g)


def attention_equality(section, mesh) -> None:
  """Errors of cuDNN and of plain, both bfloat16, to plain in float32."""
  rows, length = 2, 96 if TOY else 512
  print(
    "| case | values, q, k, v: largest error over largest value, cuDNN | "
    f"plain bfloat16 | within {TOLERANCE} |\n|---|---|---|---|"
  )
  found = section.settings.setdefault("equality", [])

  def one(name, groups, per_group, size, window, segments):
    if TOY:
      size, window = size // 8, window // 5
    seen = seen_of(mesh, rows, length, segments)
    wide = ("batch", None, "heads", None, None)
    narrow = ("batch", None, "heads", None)
    args = [
      draw(mesh, 1, (rows, length, groups, per_group, size), wide),
      draw(mesh, 2, (rows, length, groups, size), narrow),
      draw(mesh, 3, (rows, length, groups, size), narrow),
      draw(mesh, 4, (rows, length, groups, per_group, size), wide),
    ]
    with jax.default_matmul_precision("highest"):  # else float32 is TF32
      exact = values_and_gradients(
        "plain", seen, window, size, *(x.astype(jnp.float32) for x in args)
      )
    errors = {}
    for kernel in ("cudnn", "plain"):
      ours = values_and_gradients(kernel, seen, window, size, *args)
      errors[kernel] = [
        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(ours, exact)
      ]
    holds = all(e <= TOLERANCE for e in errors["cudnn"])  # NaN does not
    found.append(dict(case=name, holds=holds, **errors))
    words = {k: ", ".join(f"{e:.1e}" for e in v) for k, v in errors.items()}
    print(
      f"| {name} | {words['cudnn']} | {words['plain']} | "
      f"{'yes' if holds else 'NO'} |",
      flush=True,
    )
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
  q = draw(
    mesh,
    5,
    (rows, LENGTH, groups, per_group, size),
    ("batch", None, "heads", None, None),
  )
  k, v = (
    draw(mesh, s, (rows, LENGTH, groups, size), ("batch", None, "heads", None))
    for s in (6, 7)
  )
  causal = 2 * m.heads * size * LENGTH * (LENGTH + 1) * rows
  peer = peer_of(section)
  section.settings |= dict(
    rows=rows,
    length=LENGTH,
    heads=m.heads,
    kv_heads=groups,
    head_size=size,
    dtype="bfloat16",
  )

  def side(kernel, segments, backward):
    f = attend(kernel, seen_of(mesh, rows, LENGTH, segments), 0, size)
    run = both(f) if backward else jax.jit(f)
    return measure.clock(lambda: run(q, k, v), 5 * CALLS)

  for backward in (False, True):
    sides = {}
    for who, kernel, segments in (
      ("cudnn", "cudnn", False),
      ("plain", "plain", False),
      ("cudnn, three segments", "cudnn", True),
    ):
      made = section.attempt(who, lambda: side(kernel, segments, backward))
      if made:
        sides[f"{OURS}, {who}"] = made
    if peer:
      ask = lambda: peer.ask(
        min(90, section.left()),
        do="attention",
        rows=rows,
        length=LENGTH,
        heads=m.heads,
        kv_heads=groups,
        head_size=size,
        backward=backward,
        calls=5 * CALLS,
      )["seconds"]
      if section.attempt("torch's SDPA", ask):
        sides["torch, SDPA"] = ask
    times = (
      section.attempt(
        "attention's time", lambda: measure.alternate(sides, REPEATS)
      )
      or {}
    )
    for who, seconds in times.items():
      section.add(
        "forward and backward" if backward else "forward",
        who,
        seconds,
        flops=causal * (3 if backward else 1),
      )
  if peer:
    release(peer)
  section.note(
    "flops: the causal half, with three segments too (which "
    "need less); backward twice forward: the scores, which "
    "flash attention computes again, are not counted again"
  )
