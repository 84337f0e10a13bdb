"""The mixture at full width, and the embedding of a pool."""

import math
import time

import gpu_measure as measure
from gpu_setup import CHUNK, LENGTH, MODEL, OURS, peaks_of, REPEATS, settle, TOY
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.tokens import TokenRows
from jaxalign.embed import passes as embed
from jaxalign.model import decoder
from jaxalign.select import em, mixture, whiten


def mixture_section(section, mesh) -> None:
  peaks_of(section, "float32")
  n, width, k = (2048, 32, 2) if TOY else (122_270, 4096, 2)
  section.settings |= dict(
    rows=n,
    width=width,
    components=k,
    covariance="full",
    dtype="float32, HIGHEST",
  )
  section.attempt("the sums, beside float64", lambda: sums_exact(section, mesh))
  rng = np.random.default_rng(0)
  x = rng.standard_normal((n, width), np.float32)
  x[: n // 2, :8] += 3.0
  space = whiten.Space(np.zeros(width), np.eye(width), np.ones(width), 1.0, x)
  ridge = 1e-4
  flops = em.flops(n, width, k, "full")

  def iterations():
    state = em.Gaussians(
      np.log(np.full(k, 1 / k)),
      np.float64(x[:k]),
      np.stack([np.eye(width)] * k),
    )
    sweep = em.sweep_of(mesh, x, ridge)
    sweep(state)  # compiles

    seconds = []
    for _ in range(REPEATS):
      if seconds and section.left() < 90 and not TOY:
        break
      start = time.perf_counter()
      state = em.rounded(state)
      moments, _ = sweep(state)
      state = em.m_step(moments, state.means, ridge, False)
      seconds.append(time.perf_counter() - start)
    section.add(
      "EM iteration, whole (sums on the device, M-step and factors "
      "in float64 on the host)",
      OURS,
      seconds,
      flops=flops,
    )

  section.attempt("iteration", iterations)

  def fit():
    if section.left() < 60 and not TOY:
      section.note("no time for a whole fit")
      return
    start = time.perf_counter()
    options = mixture.MixtureOptions(k, starts=1, tol=-1.0, max_iterations=2)
    found = mixture.fit(mesh, x, options, space=space)
    section.add(
      "fit, one start, two sweeps, whole (k-means too)",
      OURS,
      [time.perf_counter() - start],
      flops=2 * flops,
    )
    section.note(
      f"bound per row {found.trace[0]:.3f}, then {found.trace[1]:.3f}"
    )

  section.attempt("fit", fit)

  def reduce():
    if section.left() < 45 and not TOY:
      section.note("no time for the reduction to 64 directions")
      return
    start = time.perf_counter()
    whiten.whiten(mesh, x, mixture.MixtureOptions())
    section.add(
      "reduction to at most 64 directions, whole (Gram matrix on the "
      "device; eigenvectors and float64 projection on the host)",
      OURS,
      [time.perf_counter() - start],
      flops=2 * n * width**2,
    )

  section.attempt("reduction", reduce)
  section.note(
    f"flops of a sweep: {flops:.3e}, K {k}, n {n}, P "
    f"{width}: the products with the rows for both distances, "
    "and the upper triangles of both weighted Grams"
  )


def sums_exact(section, mesh) -> None:
  """The device's second moments beside NumPy's; TF32 would be 3e-4 off."""
  n, width = (256, 16) if TOY else (4096, 256)
  rng = np.random.default_rng(3)
  x = rng.standard_normal((n, width), np.float32)
  state = em.Gaussians(np.zeros(1), np.zeros((1, width)), np.eye(width)[None])
  sums, _ = em.sweep_of(mesh, x, 0.0)(state)
  exact = np.float64(x).T @ np.float64(x)
  error = np.linalg.norm(sums.second[0] - exact) / np.linalg.norm(exact)
  section.note(f"second moments beside float64: relative error {error:.1e}")
  if not error < 1e-5:
    section.failures.append(
      f"second moments are {error:.1e} off float64's, "
      "wanted below 1e-5: a product ran in TF32"
    )


def embed_section(section, mesh) -> None:
  peaks_of(section, "bfloat16")
  tile = 2 if TOY else 16
  settle(section, tile)
  params = jax.jit(lambda p: jax.tree.map(lambda w: w.astype(jnp.bfloat16), p))(
    decoder.init(jax.random.key(0), MODEL, mesh)
  )
  rng = np.random.default_rng(0)
  calls = 3 if TOY else 8
  full = np.full(tile * calls, LENGTH)
  mixed = np.clip(
    rng.lognormal(math.log(LENGTH / 5), 0.7, 4 * tile * calls), 8, LENGTH
  ).astype(int)
  runs = {
    "embedding (pool_rows)": (
      0,
      lambda rows: embed.pool_rows(
        mesh, params, MODEL, rows, pooling="mean", tile=tile
      ),
    ),
    "embedding and log-probability (score_rows)": (
      None,
      lambda rows: embed.score_rows(
        mesh, params, MODEL, rows, tile=tile, chunk=CHUNK
      ),
    ),
  }
  kinds = [("full rows", full), ("rows of mixed length", mixed)]
  for what, (logit_rows, run) in runs.items():
    # Mixed rows compile a program a bucket, so they are run once.
    for name, lengths in kinds if logit_rows == 0 else kinds[:1]:

      def one():
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        rows = TokenRows(
          rng.integers(0, MODEL.vocab, offsets[-1]).astype(np.int32),
          offsets,
          np.ones(len(lengths), np.int32),
          np.zeros(len(lengths), np.int32),
        )
        flops = sum(
          measure.useful(MODEL, int(n), None if logit_rows is None else 0)
          for n in lengths
        )
        run(rows)  # compiles every bucket
        seconds = []
        for _ in range(2 if TOY else 3):
          start = time.perf_counter()
          run(rows)
          seconds.append(time.perf_counter() - start)
        section.add(
          f"{what}, {len(lengths)} {name}",
          OURS,
          seconds,
          flops=flops,
          tokens=int(offsets[-1]),
        )

      if section.left() > 20 or TOY:
        section.attempt(f"{what}, {name}", one)
      else:
        section.note(f"no time for {what}, {name}")
  section.note(
    f"host and transfers inside the clock; {tile} rows a call, "
    "weights bfloat16; padding to a bucket is not useful"
  )
