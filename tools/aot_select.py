r"""Compiles the mixture for TPUs that are not there, and predicts its time.

  python tools/aot_select.py --topology=v5e:16x16
  python tools/aot_select.py --topology=v5p:4x4x4

One EM iteration of two full Gaussians over a reservoir of 10^7 rows, 4,096
wide.
Needs libtpu (the aot extra) and no TPU. The time is the larger of flops
over the peak and of bytes over the memory's rate: predicted, not measured.
"""

import argparse
import os
import pathlib
import sys
import time

# Before jax is imported: no TPU to ask, none to lock.
for _name, _value in dict(
  TPU_SKIP_MDS_QUERY="1",
  JAX_PLATFORMS="cpu",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_ACCELERATOR_TYPE="v5litepod-16",
).items():
  os.environ.setdefault(_name, _value)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

# pylint: disable=wrong-import-position
import jax
import jax.numpy as jnp

from jaxalign.core import sharding
from jaxalign.select import em, exact

# Of a chip, by the vendor: bfloat16 FLOP/s, bytes/s of its memory, its bytes.
CHIPS = {"v5e": (197e12, 819e9, 16e9), "v5p": (459e12, 2765e9, 95e9)}
PASSES = 6  # bfloat16 products that make one of float32, HIGHEST


def shaped(mesh, shape, dtype, *axes):
  return jax.ShapeDtypeStruct(
    shape, dtype, sharding=sharding.named(mesh, *axes)
  )


def compiled_iteration(mesh, n, width):
  """The sums of one iteration over all rows, as `em` runs them."""
  chunks, rows = exact.layout(n, mesh.size)
  one = lambda *shape: shaped(mesh, shape, jnp.float32, *[None] * len(shape))
  params = one(2), one(2, width), one(2, width, width)
  scales = dict(count=one(), first=one(), second=one())
  lowered = exact.program(mesh, em._chunk_moments).lower(
    params,
    scales,
    shaped(mesh, (chunks, rows, width), jnp.float32, "pool", None, None),
    shaped(mesh, (chunks, rows), jnp.float32, "pool", None),
  )
  return lowered.compile(), chunks * rows


def line(name, compiled, chips, kind, flops, moved, steps, said):
  """A row of the table: memory, flops and the roofline of a chip."""
  speed, rate, memory = CHIPS[kind]
  held = compiled.memory_analysis()
  arguments = held.argument_size_in_bytes
  temporaries = held.temp_size_in_bytes
  counted = (compiled.cost_analysis() or {}).get("flops", float("nan"))
  compute = PASSES * flops / chips / speed * steps
  memory_time = moved / chips / rate * steps
  print(
    f"| {name} | {arguments / 2**20:,.0f} | {temporaries / 2**20:,.0f} | "
    f"{100 * (arguments + temporaries) / memory:.0f} % | "
    f"{flops * steps:.2e} | {counted:.2e} ({said}) | "
    f"{max(compute, memory_time):,.2f} s "
    f"({'products' if compute > memory_time else 'memory'}) |",
    flush=True,
  )


def main(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--topology", default="v5e:16x16")
  parser.add_argument("--reservoir", type=int, default=10**7)
  parser.add_argument("--width", type=int, default=4096)
  args = parser.parse_args(argv[1:])
  kind = args.topology.split(":")[0]
  if kind not in CHIPS:
    print(
      f"error: no rates of {kind!r}, known: {', '.join(CHIPS)}", file=sys.stderr
    )
    return 64
  from jax.experimental import topologies

  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=args.topology
  ).devices
  mesh = sharding.make_mesh(dict(fsdp=-1, tensor=1), devices)
  width, chips = args.width, mesh.size
  print(
    f"{args.topology}, {chips} chips, libtpu; {width} wide, K = 2, full; "
    f"float32 products of {PASSES} bfloat16 passes\n\n"
    "| what | arguments, MiB a chip | temporaries | of its memory | "
    "flops, all chips, by hand | the compiler's count, one chip | "
    "predicted time |\n|---|---|---|---|---|---|---|"
  )
  with jax.set_mesh(mesh):
    start = time.monotonic()
    compiled, padded = compiled_iteration(mesh, args.reservoir, width)
    line(
      f"EM iteration, {args.reservoir:.0e} rows",
      compiled,
      chips,
      kind,
      em.flops(args.reservoir, width, 2, "full"),
      # Rows are read for two products and two Grams; sums once a chunk.
      4 * padded * width * 8
      + exact.layout(args.reservoir, chips)[0] * width**2 * 4 * 10,
      1,
      "a loop's body once",
    )
  print(f"\ncompiled in {time.monotonic() - start:.0f} s")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
