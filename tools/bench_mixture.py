"""The mixture beside scikit-learn's, and as a share of the machine's peak."""

import gc
import os
import statistics
import time
import warnings


def _clocked(run):
  """Wall seconds, seconds of CPU of all threads, and what run returned."""
  cpu, start = time.process_time(), time.perf_counter()
  found = run()
  return time.perf_counter() - start, time.process_time() - cpu, found


def _rows(n, width):
  """Two overlapping Gaussians with a falling spectrum, off the origin."""
  import numpy as np

  rng = np.random.default_rng(0)
  turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
  spectrum = np.geomspace(1, 0.05, width)
  x = rng.normal(size=(n, width)) * spectrum
  second = rng.random(n) < 0.4
  x[second] = x[second] * rng.uniform(0.6, 1.5, width) + 0.3 * spectrum
  return np.float32(x @ turn + 0.5), second.astype(np.int64)


def _peak(mesh, size=4096):
  """Operations a second of float32 products, `size` rows on each device."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jaxalign.core import sharding

  rng = np.random.default_rng(1)
  a = sharding.put(
    mesh, rng.normal(size=(size * mesh.size, size)).astype("f"), "pool", None
  )
  b = sharding.put(mesh, rng.normal(size=(size, size)).astype("f"), None, None)
  spec = sharding.spec("pool")
  run = jax.jit(
    jax.shard_map(
      lambda p, q: jnp.matmul(p, q, precision="highest"),
      mesh=mesh,
      in_specs=(spec, jax.P()),
      out_specs=spec,
    )
  )
  run(a, b).block_until_ready()

  def once():
    wall, cpu, _ = _clocked(lambda: run(a, b).block_until_ready())
    work = 2 * mesh.size * size**3
    return work / wall, work / cpu

  return once


def _peer(kind, x, start, iterations, dtype):
  """scikit-learn from the same parameters, in the coordinates of x."""
  import numpy as np
  from sklearn.mixture import GaussianMixture

  weights, means, covariances = start
  return GaussianMixture(
    2,
    covariance_type=kind,
    tol=0.0,
    reg_covar=0.0,
    max_iter=iterations,
    weights_init=weights.astype(dtype),
    means_init=means.astype(dtype),
    precisions_init=np.linalg.inv(covariances).astype(dtype),
    init_params="random_from_data",
    random_state=0,
  )


def mixture(args) -> None:
  """EM iterations of both in turn: times, CPU, share of peak, agreement."""
  import jax
  import numpy as np
  import sklearn
  import threadpoolctl

  from jaxalign.core import sharding
  from jaxalign.select import em, whiten
  from jaxalign.select import mixture as mixtures

  n, width, sweeps = args.rows, args.width, 20
  mesh = sharding.make_mesh(dict(fsdp=-1, tensor=1))
  x, truth = _rows(n, width)
  wrong = np.random.default_rng(2).random(n) < 0.3  # the start is not the end
  labels = np.where(wrong, 1 - truth, truth)
  wall, cpu, space = _clocked(
    lambda: whiten.whiten(mesh, x, mixtures.MixtureOptions(pca=0))
  )
  print(
    f"{n:,} x {width}, full, K = 2, {sweeps} iterations, tol 0, ridge 0, "
    f"the same start; {mesh.size} {jax.default_backend()} device(s), "
    f"{os.cpu_count()} cores, jax {jax.__version__}; scikit-learn "
    f"{sklearn.__version__}, threads "
    f"{sorted({p['num_threads'] for p in threadpoolctl.threadpool_info()})}"
    f"; load {os.getloadavg()[0]:.1f}"
  )
  print(f"whitening: {wall:.2f} s ({cpu:.2f} of CPU)")
  some = space.z[: mixtures.START_ROWS] * np.sqrt(space.variances)
  wall, cpu, _ = _clocked(
    lambda: mixtures._k_means(some, 2, np.random.default_rng(0))
  )
  print(
    f"k-means++ and {mixtures.LLOYD_STEPS} Lloyd steps on "
    f"{len(some):,} rows: {wall:.2f} s ({cpu:.2f} of CPU)"
  )
  wall, cpu, start = _clocked(
    lambda: em.partition(space.z, labels, 2, 0.0, "full")
  )
  print(
    f"parameters of a partition: {wall:.2f} s ({cpu:.2f} of CPU)", flush=True
  )
  back = np.linalg.inv(space.projection)
  original = lambda state: (
    np.exp(state.log_weights),
    space.mean + state.means @ back,
    back.T @ state.covariances @ back,
  )
  wall, cpu, sweep = _clocked(lambda: em.sweep_of(mesh, space.z, 0.0))
  print(f"rows placed: {wall:.2f} s ({cpu:.2f} of CPU)")
  wall, cpu, _ = _clocked(lambda: sweep(em.rounded(start)))
  print(f"compilation: {wall:.2f} s")

  def ours():
    state = start
    for _ in range(sweeps):
      state = em.rounded(state)
      moments, bound = sweep(state)
      state = em.m_step(moments, state.means, 0.0, False)
    return state, bound

  def theirs(dtype, steps):
    rows = x.astype(dtype)
    peer = _peer("full", rows, original(start), steps, dtype)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # it says that tol 0 was not reached
      wall, cpu, _ = _clocked(lambda: peer.fit(rows))
    return wall, cpu, peer

  peak = _peak(mesh)
  work = em.flops(n, width, 2, "full")
  seen, steps = [], args.sweeps or sweeps
  for turn in range(args.count):
    high = peak()
    a = _clocked(ours)
    high = max(high, peak())
    b = theirs(np.float64, steps)
    c = theirs(np.float32, steps)
    each = [
      r / s for s, row in ((sweeps, a), (steps, b), (steps, c)) for r in row[:2]
    ]
    seen.append(
      (
        *each,
        work / each[0] / high[0],
        work / each[1] / high[1],
        high[0] / 1e9,
        work / each[0] / 1e9,
      )
    )
    print(
      f"  turn {turn}: an iteration {each[0]:.3f} s ({each[1]:.2f} of "
      f"CPU); float64 {each[2]:.2f} ({each[3]:.2f}), float32 "
      f"{each[4]:.2f} ({each[5]:.2f}); {seen[-1][9]:.0f} of "
      f"{high[0] / 1e9:.0f} GFLOP/s; load {os.getloadavg()[0]:.1f}",
      flush=True,
    )
    gc.collect()
  mid = lambda f: statistics.median(f(s) for s in seen)
  print(
    "| an iteration | wall | CPU | times as fast: wall (CPU) | goal |\n"
    "|---|---|---|---|---|"
  )
  print(
    f"| jaxalign, float32 products | {mid(lambda s: s[0]):.3f} s | "
    f"{mid(lambda s: s[1]):.2f} s | | |"
  )
  for name, at, goal in (("float64", 2, 6), ("float32", 4, 3)):
    print(
      f"| scikit-learn, {name} | {mid(lambda s: s[at]):.2f} s | "
      f"{mid(lambda s: s[at + 1]):.2f} s | "
      f"{mid(lambda s: s[at] / s[0]):.1f} "
      f"({mid(lambda s: s[at + 1] / s[1]):.1f}) | {goal} |"
    )
  print(
    f"| share of the float32 peak ({mid(lambda s: s[8]):.0f} GFLOP/s) | "
    f"{100 * mid(lambda s: s[6]):.0f} % | {100 * mid(lambda s: s[7]):.0f} "
    f"% | {work:.2e} flops | 60 % |"
  )

  # What they found, after the same iterations and at the same parameters.
  state, _ = a[2]
  fitted = mixtures.Mixture(
    space.mean,
    space.projection,
    space.variances,
    *state,
    np.zeros(1),
    np.zeros(1),
    1.0,
    [],
  )
  wall, cpu, value = _clocked(lambda: mixtures.log_likelihood(fitted, x))
  print(
    f"float64 log-likelihood of all rows, jaxalign: {wall:.2f} s "
    f"({cpu:.2f} of CPU)"
  )
  peer = _peer("full", x, original(state), 1, np.float64)
  peer.weights_, peer.means_, peer.covariances_ = original(state)
  peer.precisions_cholesky_ = np.linalg.cholesky(
    np.linalg.inv(peer.covariances_)
  )
  wall, cpu, same = _clocked(lambda: peer.score_samples(x.astype(np.float64)))
  print(
    f"float64 log-likelihood of all rows, scikit-learn: {wall:.2f} s "
    f"({cpu:.2f} of CPU)"
  )
  tenth = n // 10

  def overlap(p, q):
    ends = lambda v: set(np.argsort(v)[:tenth])
    return " and ".join(
      f"{len(ends(s * p) & ends(s * q)) / tenth:.5f}" for s in (1, -1)
    )

  print(
    "| beside scikit-learn's float64 | largest gap of a row, nats | mean "
    "gap | lowest and highest tenth, overlap |\n|---|---|---|---|"
  )

  def line(name, mine, other):
    print(
      f"| {name} | {np.abs(mine - other).max():.1e} | "
      f"{abs(mine.mean() - other.mean()):.1e} | {overlap(mine, other)} |",
      flush=True,
    )

  line("same parameters, `log_likelihood` (float64)", value, same)
  if steps == sweeps:
    line(
      f"after {sweeps} iterations each, float32 sums",
      value,
      b[2].score_samples(x.astype(np.float64)),
    )
    line(
      f"scikit-learn float32 after {sweeps} iterations",
      np.float64(c[2].score_samples(x)),
      b[2].score_samples(x.astype(np.float64)),
    )
