"""The parts of a train step apart: what bounds it."""

from gpu_attention import attend, seen_of
import gpu_measure as measure
from gpu_setup import both, CALLS, draw, LENGTH, MODEL, OURS, REPEATS, tokens_of
import jax
import jax.numpy as jnp

from jaxalign.model import decoder, logprob
from jaxalign.train import optim
from jaxalign.train import step as steps


def pieces(section, mesh, rows: int, chunk: int) -> None:
  """The parts of a train step apart, each forward and backward.

  Their sum is not the step: apart, nothing overlaps or is fused, and what the
  norms, the rotations and the residuals cost is in none of them.
  """
  m, per = MODEL, rows * LENGTH
  groups, queries, size = m.kv_heads, m.heads // m.kv_heads, m.head_size
  wide = ("batch", None, "heads", None, None)
  x = draw(mesh, 8, (rows, LENGTH, m.width), ("batch", None, None))
  weight = lambda seed, *shape: (
    draw(mesh, seed, shape, [None] * len(shape)) * m.width**-0.5
  )

  def projections(x, wq, wk, wv, wo):
    q, k, v = x @ wq, x @ wk, x @ wv
    return q @ wo, k, v

  def ff(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down

  inner = m.heads * size
  narrow = groups * size
  parts = {
    "attention": (
      both(attend("cudnn", seen_of(mesh, rows, LENGTH, False), 0, size)),
      m.layers,
      3 * 2 * m.heads * size * LENGTH * (LENGTH + 1) * rows,
      (
        draw(mesh, 9, (rows, LENGTH, groups, queries, size), wide),
        *(
          draw(mesh, s, (rows, LENGTH, groups, size), wide[:4])
          for s in (10, 11)
        ),
      ),
    ),
    "projections": (
      both(projections),
      m.layers,
      3 * 2 * per * m.width * 2 * (inner + narrow),
      (
        x,
        weight(12, m.width, inner),
        weight(13, m.width, narrow),
        weight(14, m.width, narrow),
        weight(15, inner, m.width),
      ),
    ),
    "feed-forward": (
      both(ff),
      m.layers,
      3 * 2 * per * m.width * m.ff * 3,
      (
        x,
        weight(16, m.width, m.ff),
        weight(17, m.width, m.ff),
        weight(18, m.ff, m.width),
      ),
    ),
    "head": (
      both(lambda x, w, t: logprob.token_logps(x, w, t, chunk)),
      1,
      3 * 2 * per * m.width * m.vocab,
      (
        x,
        weight(19, m.vocab, m.width).astype(jnp.float32),
        tokens_of(mesh, (rows, 1))[:, 0],
      ),
    ),
  }
  for name, (run, times, flops, args) in parts.items():
    side = section.attempt(
      name, lambda: measure.clock(lambda: run(*args), CALLS)
    )
    if side:
      seconds = [times * side() for _ in range(REPEATS)]
      section.add(
        f"{name}, {times} x forward and backward",
        OURS,
        seconds,
        flops=times * flops,
      )
  del parts, x

  tx = optim.make_optimizer(clip=1.0, weight_decay=0.0, b2=0.98)
  params = decoder.init(jax.random.key(1), m, mesh)
  gradients = jax.tree.map(lambda p: 0.01 * p, params)
  held = [steps.init_state(params, tx)]
  del params

  @jax.jit(donate_argnames=("state",))
  def update(state, gradients):
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    return state.replace(
      opt_state=opt_state,
      params=jax.tree.map(lambda p, u: p + 1e-5 * u, state.params, updates),
    )

  def run():
    held[0] = update(held[0], gradients)
    return held[0].step

  side = measure.clock(run, CALLS)
  section.add("clip and AdamW", OURS, [side() for _ in range(REPEATS)])
