"""How much of the card a Llama uses: forward, train step, step on pairs."""

import functools
import math
import tempfile

import gpu_measure as measure
from gpu_pieces import pieces
from gpu_setup import (
  CALLS,
  CHUNK,
  LENGTH,
  MODEL,
  model_sizes,
  OURS,
  peaks_of,
  peer_of,
  profile,
  release,
  REPEATS,
  rows_that_fit,
  settle,
  THEIRS,
  tokens_of,
  TOY,
)
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.model import decoder, logprob
from jaxalign.train import optim
from jaxalign.train import step as steps
from jaxalign.train.batch import Batch
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import bind, LOSSES
from jaxalign.train.metrics import divide


def forward_section(section, mesh) -> None:
  peaks_of(section, "bfloat16")
  rows = 2 if TOY else 8
  settle(section, rows)
  flops = rows * measure.useful(MODEL, LENGTH)
  bare = rows * measure.useful(MODEL, LENGTH, 0)
  weights = decoder.init(jax.random.key(0), MODEL, mesh)
  tokens = tokens_of(mesh, (rows, 1))
  mask = jnp.ones_like(tokens)
  half = jax.jit(lambda p: jax.tree.map(lambda w: w.astype(jnp.bfloat16), p))(
    weights
  )

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
    section.note(
      f"log-probability of a token, cuDNN beside plain: mean "
      f"difference {float(gap.mean()):.1e} nats, largest "
      f"{float(gap.max()):.1e}"
    )

  section.attempt("cuDNN beside plain", close_to_plain)

  def hidden():
    run = jax.jit(lambda p, t: decoder.forward(p, t, MODEL))
    return lambda: run(half, tokens[:, 0])

  ours = {
    f"{OURS}, bfloat16 weights": (lambda: logps(MODEL, half, CHUNK), flops),
    f"{OURS}, float32 weights": (lambda: logps(MODEL, weights, CHUNK), flops),
    f"{OURS}, head in chunks of {CHUNK // 8}": (
      lambda: logps(MODEL, half, CHUNK // 8),
      flops,
    ),
    f"{OURS}, without the head": (hidden, bare),
  }
  sides, counts = {}, {}
  for who, (build, count) in ours.items():
    side = section.attempt(who, lambda: measure.clock(build(), CALLS))
    if side:
      sides[who], counts[who] = side, count
  peer = peer_of(section)
  for compiled in (False, True) if peer and not TOY else (False,) * bool(peer):
    who = f"{THEIRS}{', torch.compile' if compiled else ''}"
    ask = lambda: peer.ask(
      min(120, section.left()),
      do="forward",
      compile=compiled,
      calls=CALLS,
      **model_sizes(rows),
    )["seconds"]
    if section.left() < 30 or not section.attempt(who, ask):
      continue
    # One of theirs is held at a time; ours take turns with each.
    pair = {**sides, who: ask}
    times = (
      section.attempt(
        f"{who}, beside ours", lambda: measure.alternate(pair, REPEATS)
      )
      or {}
    )
    for name, seconds in times.items():
      section.add(
        "forward, log-probabilities" if name != who else "forward, logits",
        name,
        seconds,
        tokens=rows * LENGTH,
        flops=counts.get(name, flops),
      )
  if not section.rows:  # nobody to take turns with
    for name, seconds in measure.alternate(sides, REPEATS).items():
      section.add(
        "forward, log-probabilities",
        name,
        seconds,
        tokens=rows * LENGTH,
        flops=counts[name],
      )
  if peer:
    release(peer)
  section.attempt(
    "the profile",
    lambda: profile(section, logps(MODEL, half, CHUNK), "forward"),
  )


# train and dpo


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
    ref = jax.tree.map(lambda x: x[None], ref)
    self.batch = Batch(tokens, mask, ref, lr=np.float32(1e-5))
    tx = optim.make_optimizer(clip=1.0, weight_decay=0.0, b2=0.98)
    self.step = steps.make_train_step(
      logps_fn, bind(LOSSES[loss], loss, {}), tx
    )
    self.state = steps.init_state(params, tx)
    self.flops = 3 * rows * responses * measure.useful(self.m, LENGTH)
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
    section.add(what, OURS, seconds, flops=step.flops, tokens=step.tokens)
    return min(seconds), step

  return section.attempt(what, run)


def variants(section, mesh, loss: str, rows: int):
  """Tries what a person may set; returns the fastest's settings, or None."""
  best, best_seconds = None, math.inf
  for remat, chunk in (
    (("none", CHUNK), ("dots", CHUNK))
    if TOY
    else (
      ("none", CHUNK),
      ("dots", CHUNK),
      ("full", CHUNK),
      ("none", 64),
      ("none", LENGTH),
    )
  ):
    if best and section.left() < 60 and not TOY:
      section.note(f"no time for remat {remat}, chunk {chunk}")
      continue
    found = try_step(
      section,
      mesh,
      f"{loss} step, {rows} rows, remat {remat}, head chunk {chunk}",
      loss,
      rows,
      remat,
      chunk,
    )
    if found and found[0] < best_seconds:
      best, best_seconds = (remat, chunk), found[0]
    del found
  return best


def train_section(section, mesh) -> None:
  peaks_of(section, "bfloat16")
  rows = rows_that_fit()
  settle(section, rows)
  section.note(
    "train step: make_train_step with the sft loss, float32 state "
    "donated, clip and AdamW inside; useful flops 3 x forward"
  )
  best = variants(section, mesh, "sft", rows)
  if best is None:
    return
  step = Step(mesh, "sft", rows, *best)
  side = measure.clock(step, CALLS)
  section.attempt("the profile", lambda: profile(section, step, "train"))
  peer = peer_of(section)
  wanted = [
    ("autocast", False),
    ("bfloat16", True),
    ("autocast", True),
    ("bfloat16", False),
  ]
  for precision, compiled in wanted if peer else []:
    who = f"{THEIRS}, {precision}{', torch.compile' if compiled else ''}"
    if compiled and TOY:
      continue
    if section.left() < (150 if compiled else 90) and not TOY:
      section.note(f"no time for {who}")
      continue
    theirs = rows

    def ask():
      return peer.ask(
        min(180 if compiled else 90, section.left() - 30),
        do="train",
        compile=compiled,
        precision=precision,
        calls=CALLS,
        **model_sizes(theirs),
      )["seconds"]

    if not section.attempt(who, ask):
      theirs = rows // 2  # their half of the card may be too small
      if peer.child.poll() is not None:  # it took too long and was ended
        peer = peer_of(section)
        if not peer:
          break
        continue
      if not section.attempt(f"{who}, {theirs} rows", ask):
        continue
    times = (
      section.attempt(
        f"{who}, beside ours",
        lambda: measure.alternate(
          {f"{OURS}, remat {best[0]}, head chunk {best[1]}": side, who: ask},
          REPEATS,
        ),
      )
      or {}
    )
    for name, seconds in times.items():
      share = theirs / rows if name == who else 1
      section.add(
        f"train step, {int(share * rows)} rows",
        name,
        seconds,
        flops=int(share * step.flops),
        tokens=int(share * step.tokens),
      )
  if peer:
    release(peer)
  step = side = None  # the card is free again
  section.attempt("the pieces", lambda: pieces(section, mesh, rows, best[1]))
  larger = ((2 * rows, best[0]), (4 * rows, "dots"))
  for more, remat in larger[:1] if TOY else larger:
    if section.left() > 60 or TOY:  # the card is all ours now
      try_step(
        section,
        mesh,
        f"sft step, {more} rows, remat {remat}, head chunk {best[1]}",
        "sft",
        more,
        remat,
        best[1],
      )


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
        theirs = peer.ask(
          section.left(),
          do="trl_dpo",
          pairs=pairs,
          steps=some,
          skip=skip,
          folder=folder,
          **model_sizes(2 * pairs),
        )
        section.add(
          f"dpo step, {pairs} pairs",
          f"TRL {theirs['trl']}",
          theirs["seconds"],
          flops=count[0],
          tokens=count[1],
        )
      except RuntimeError as error:
        missing = "ModuleNotFoundError" in str(error) or "ImportError" in str(
          error
        )
        if missing:
          section.note(f"TRL skipped, it is not installed: {error}")
        else:
          section.failures.append(f"TRL: {error}")
          print(f"- FAILED TRL: {error}", flush=True)
    release(peer)
  if not TOY and section.left() > 60:
    try_step(
      section,
      mesh,
      f"dpo step, {4 * pairs} pairs, remat dots",
      "dpo",
      4 * pairs,
      "dots",
      CHUNK,
      repeats=REPEATS,
    )


def variants_dpo(section, mesh, pairs):
  """The fastest of the variants of a DPO step: (seconds, Step)."""
  kept = None
  for remat in ("none", "dots"):
    kept = kept or try_step(
      section,
      mesh,
      f"dpo step, {pairs} pairs, remat {remat}, head chunk {CHUNK}",
      "dpo",
      pairs,
      remat,
      CHUNK,
      repeats=REPEATS,
    )
  return kept
