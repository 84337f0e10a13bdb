"""EM of two Gaussians and scikit-learn's, and as a fraction of the peak."""

import argparse
import gc
import os
import statistics
import warnings

from bench import clocked
import jax
import jax.numpy as jnp
import numpy as np
import sklearn
from sklearn.mixture import GaussianMixture
import threadpoolctl

from jaxalign.core import sharding
from jaxalign.select import em, mixture, whiten

SWEEPS = 20


def _rows(n, width):
  """Two overlapping Gaussians with a falling spectrum, off the origin."""
  rng = np.random.default_rng(0)
  turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
  spectrum = np.geomspace(1, 0.05, width)
  x = rng.normal(size=(n, width)) * spectrum
  second = rng.random(n) < 0.4
  x[second] = x[second] * rng.uniform(0.6, 1.5, width) + 0.3 * spectrum
  return np.float32(x @ turn + 0.5), second.astype(np.int64)


def _peak(mesh, size=4096):
  """FLOP/s of float32 products, `size` rows on each device: (wall, CPU)."""
  rng = np.random.default_rng(1)
  draw = lambda n: rng.normal(size=(n, size)).astype("f")
  a = sharding.put(mesh, draw(size * mesh.size), "pool", None)
  b = sharding.put(mesh, draw(size), None, None)
  spec = sharding.spec("pool")
  product = lambda p, q: jnp.matmul(p, q, precision="highest")
  run = jax.jit(
    jax.shard_map(product, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec)
  )
  run(a, b).block_until_ready()

  def once():
    wall, cpu, _ = clocked(lambda: run(a, b).block_until_ready())
    work = 2 * mesh.size * size**3
    return work / wall, work / cpu

  return once


def _peer(x, start, iterations):
  """scikit-learn from the same parameters, in the dtype of x."""
  weights, means, covariances = (p.astype(x.dtype) for p in start)
  return GaussianMixture(
    2,
    tol=0.0,
    reg_covar=0.0,
    max_iter=iterations,
    weights_init=weights,
    means_init=means,
    precisions_init=np.linalg.inv(covariances),
    init_params="random_from_data",
    random_state=0,
  )


def _times(seen, work) -> None:
  """The table of what an iteration takes."""
  mid = lambda f: statistics.median(f(s) for s in seen)
  print(
    "| an iteration | wall | CPU | times as fast: wall (CPU) | goal |\n"
    "|---|---|---|---|---|"
  )
  for name, at, goal in (
    ("jaxalign, float32 products", 0, ""),
    ("scikit-learn, float64", 2, 6),
    ("scikit-learn, float32", 4, 3),
  ):
    wall, cpu = mid(lambda s: s[at]), mid(lambda s: s[at + 1])
    fast = [mid(lambda s, i=i: s[at + i] / s[i]) for i in (0, 1)]
    times = f"{fast[0]:.1f} ({fast[1]:.1f})" if at else ""
    print(f"| {name} | {wall:.3f} s | {cpu:.2f} s | {times} | {goal} |")
  wall, cpu = (100 * mid(lambda s: work / s[i] / s[6 + i]) for i in (0, 1))
  print(
    f"| of the float32 peak ({mid(lambda s: s[6]) / 1e9:.0f} GFLOP/s) | "
    f"{wall:.0f} % | {cpu:.0f} % | {work:.2e} FLOPs | 60 % |"
  )


def _agreement(pairs) -> None:
  """The table of how far log-likelihoods of all rows are apart."""
  print(
    "| and scikit-learn's float64 | largest gap of a row, nats | mean "
    "gap | lowest and highest tenth, overlap |\n|---|---|---|---|"
  )
  for name, ours, theirs in pairs:
    tenth = len(ours) // 10
    ends = lambda v: set(np.argsort(v)[:tenth])
    overlap = " and ".join(
      f"{len(ends(s * ours) & ends(s * theirs)) / tenth:.5f}" for s in (1, -1)
    )
    print(
      f"| {name} | {np.abs(ours - theirs).max():.1e} | "
      f"{abs(ours.mean() - theirs.mean()):.1e} | {overlap} |",
      flush=True,
    )


def main(argv) -> None:
  """EM iterations of both in turn: times, CPU, share of peak, agreement."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rows", type=int, default=122270)
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--count", type=int, default=3, help="turns")
  parser.add_argument("--sweeps", type=int, default=SWEEPS, help="of theirs")
  args = parser.parse_args(argv)
  n, width = args.rows, args.width
  mesh = sharding.make_mesh(dict(fsdp=-1, tensor=1))
  x, truth = _rows(n, width)
  wrong = np.random.default_rng(2).random(n) < 0.3  # not yet converged
  labels = np.where(wrong, 1 - truth, truth)

  def timed(what, run):
    wall, cpu, found = clocked(run)
    print(f"{what}: {wall:.2f} s ({cpu:.2f} of CPU)", flush=True)
    return found

  threads = {p["num_threads"] for p in threadpoolctl.threadpool_info()}
  print(
    f"{n:,} x {width}, full, K = 2, {SWEEPS} iterations, tol 0, ridge 0, "
    f"the same start; {mesh.size} {jax.default_backend()} device(s), "
    f"{os.cpu_count()} cores, jax {jax.__version__}; scikit-learn "
    f"{sklearn.__version__}, threads {sorted(threads)}; load "
    f"{os.getloadavg()[0]:.1f}"
  )
  whole = mixture.MixtureOptions(pca=0)
  space = timed("whitening", lambda: whiten.whiten(mesh, x, whole))
  partition = lambda: em.partition(space.z, labels, 2, 0.0, "full")
  start = timed("parameters of a partition", partition)
  back = np.linalg.inv(space.projection)
  original = lambda state: (
    np.exp(state.log_weights),
    space.mean + state.means @ back,
    back.T @ state.covariances @ back,
  )
  sweep = timed("rows placed", lambda: em.sweep_of(mesh, space.z, 0.0, "full"))
  timed("compilation", lambda: sweep(em.rounded(start)))

  def ours():
    state = start
    for _ in range(SWEEPS):
      state = em.rounded(state)
      moments, _ = sweep(state)
      state = em.m_step(moments, state.means, 0.0, "full")
    return state

  def theirs(dtype):
    rows = x.astype(dtype)
    peer = _peer(rows, original(start), args.sweeps)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # it says that tol 0 was not reached
      wall, cpu, _ = clocked(lambda: peer.fit(rows))
    return wall / args.sweeps, cpu / args.sweeps, peer

  peak, work, seen = _peak(mesh), em.em_flops(n, width, 2, "full"), []
  for turn in range(args.count):
    high = peak()
    wall, cpu, state = clocked(ours)
    high = max(high, peak())
    wide, single = theirs(np.float64), theirs(np.float32)
    seen.append((wall / SWEEPS, cpu / SWEEPS, *wide[:2], *single[:2], *high))
    numbers = ", ".join(f"{s:.3f}" for s in seen[-1][:6])
    print(
      f"  turn {turn}: seconds (wall, CPU; ours, float64, float32) {numbers}; "
      f"{work / seen[-1][0] / 1e9:.0f} of {high[0] / 1e9:.0f} GFLOP/s; load "
      f"{os.getloadavg()[0]:.1f}",
      flush=True,
    )
    gc.collect()
  _times(seen, work)

  # What they found, after the same iterations and at the same parameters.
  reduced = space.mean, space.projection, space.variances
  none = np.zeros(1), np.zeros(1), 1.0, []
  fitted = mixture.Mixture(*reduced, *state, *none)
  what = "float64 log-likelihood of all rows"
  value = timed(what, lambda: mixture.log_likelihood(fitted, x))
  peer, x64 = _peer(x, original(state), 1), x.astype(np.float64)
  peer.weights_, peer.means_, peer.covariances_ = original(state)
  inverse = np.linalg.inv(peer.covariances_)
  peer.precisions_cholesky_ = np.linalg.cholesky(inverse)
  same = timed("the same by scikit-learn", lambda: peer.score_samples(x64))
  pairs = [("same parameters, `log_likelihood` (float64)", value, same)]
  if args.sweeps == SWEEPS:
    last = wide[2].score_samples(x64)
    their_single = np.float64(single[2].score_samples(x))
    pairs += [
      (f"after {SWEEPS} iterations each, float32 sums", value, last),
      (f"scikit-learn float32 after {SWEEPS} iterations", their_single, last),
    ]
  _agreement(pairs)
