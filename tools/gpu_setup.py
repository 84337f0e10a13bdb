"""What the sections of tools/gpu.py share: sizes, the card, the two sides."""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile

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

from jaxalign.core import sharding
from jaxalign.model import decoder

OURS, THEIRS = "jaxalign", "transformers, SDPA"
LENGTH = 64 if TOY else 2048
CALLS, REPEATS = (1, 2) if TOY else (4, 5)
MODEL = decoder.ModelConfig(
  layers=16,
  width=2048,
  heads=16,
  kv_heads=8,
  head_size=128,
  ff=8192,
  vocab=32000,
  context=LENGTH,
  tied=False,
  dtype="bfloat16",
  attention="cudnn",
)
if TOY:
  MODEL = MODEL._replace(
    layers=2, width=64, heads=4, kv_heads=2, head_size=16, ff=128, vocab=256
  )
CHUNK = 32 if TOY else 512  # positions of the head at once
TOLERANCE = 2e-2  # of the largest value; as jaxalign/model/attention.py says


def peaks_of(section, dtype: str) -> None:
  """Puts the published and the measured peak of a dtype into a section."""
  which = ("bfloat16", "float32").index(dtype)
  size = 256 if TOY else 8192
  section.peaks = dict(
    published=measure.published(jax.devices()[0].device_kind)[which],
    measured=measure.product_peak(dtype, size, 1 if TOY else 5, 3),
  )
  stated = section.peaks["published"]
  section.note(
    f"{dtype} peak: published "
    f"{f'{stated / 1e12:.1f}' if stated else 'not listed'}, "
    f"{size} x {size} x {size} products here "
    f"{section.peaks['measured'] / 1e12:.2f} TFLOP/s"
  )


def draw(mesh, seed: int, shape, axes, dtype=jnp.bfloat16) -> jax.Array:
  """Normal numbers on the mesh."""
  return jax.device_put(
    jax.random.normal(jax.random.key(seed), shape, dtype),
    sharding.named(mesh, *axes),
  )


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
    [
      "nvidia-smi",
      "--query-gpu=name,driver_version,memory.total",
      "--format=csv,noheader,nounits",
    ],
    capture_output=True,
    text=True,
    check=True,
    timeout=60,
  ).stdout.splitlines()[0]
  name, driver, memory = (x.strip() for x in line.split(","))
  return dict(device=name, driver=driver, memory_mib=int(float(memory)))


PEERS = []  # the one child of this process, while it lives


def peer_of(section):
  """A Peer that says what it is; None, with a line, where there is none."""

  def start():
    if not PEERS or PEERS[0].child.poll() is not None:
      PEERS[:] = [measure.Peer(section.path.with_name("peer.log"), TOY)]
    section.settings["peer"] = PEERS[0].ask(
      120 if TOY else min(120, section.left()), do="hello"
    )
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
  return dict(
    {
      n: getattr(MODEL, n)
      for n in (
        "layers",
        "width",
        "heads",
        "kv_heads",
        "head_size",
        "ff",
        "vocab",
      )
    },
    rows=rows,
    length=LENGTH,
  )


def both(f):
  """Jitted: f forward and backward with respect to all it is given."""

  def run(*args):
    y, back = jax.vjp(f, *args)
    return back(y)  # any cotangent takes as long

  return jax.jit(run)


def settle(section, rows: int) -> None:
  """What the rows of a model's section are of."""
  m = MODEL
  section.settings |= dict(
    model={
      n: getattr(m, n)
      for n in (
        "layers",
        "width",
        "heads",
        "kv_heads",
        "head_size",
        "ff",
        "vocab",
        "dtype",
        "attention",
      )
    },
    parameters=decoder.parameter_count(m),
    rows=rows,
    length=LENGTH,
  )
  section.note(
    f"{decoder.parameter_count(m):,} parameters ({m.layers} layers, width "
    f"{m.width}, {m.heads} heads over {m.kv_heads} of {m.head_size}, "
    f"feed-forward {m.ff}, {m.vocab} pieces), {rows} rows of {LENGTH}"
  )


def tokens_of(mesh, shape, seed: int = 0) -> jax.Array:
  """Random full rows [*shape, LENGTH] on the mesh, cut along the row axis."""
  ids = np.random.default_rng(seed).integers(
    0, MODEL.vocab, (*shape, LENGTH), np.int32
  )
  axes = ("batch",) if len(shape) == 2 else (None, "batch")
  return sharding.put(mesh, ids, *axes, *[None] * (ids.ndim - len(axes)))


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
  section.note(
    f"{name}, one call of {1e3 * whole:.2f} ms, kernels busy "
    f"{1e3 * busy:.2f} ms: "
    + ", ".join(f"{g} {1e3 * s:.2f}" for g, s in groups.items())
  )
  for kernel, seconds in sorted(found.items(), key=lambda x: -x[1])[:12]:
    section.note(f"  {1e3 * seconds:.3f} ms {kernel[:90]}")
