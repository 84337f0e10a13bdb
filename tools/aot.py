r"""Compiles the train step for TPUs that are not there, and says what it holds.

  python tools/aot.py --topology=v5e:4x4 --fsdp=16 --tensor=1
  python tools/aot.py --topology=v5p:2x2x2 --fsdp=4 --tensor=2
  python tools/aot.py --topology=v5e:16x16 --fsdp=256 --layers=32 --width=4096 \
    --heads=32 --kv_heads=32 --ff=11008 --length=2048 --rows=256
  python tools/aot.py --config=configs/qwen3_8b_dpo.py --topology=v5e:16x16 \
    --fsdp=64 --tensor=4

The step is the one that a job runs: the layout, head, loss and optimizer of
the config, or the flags'. Packed shapes come from a job's data; here every
response fills --length tokens, of which --prompt are its prompt's (0: a
quarter), so that hardly a real batch of as many rows is larger.

Needs libtpu (the aot extra) and no TPU. Exit codes: 0 sound, 1 the program
gathers stacked weights whole or holds logits of all positions, 64 usage.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

# Before jax is imported: no TPU to ask, none to lock.
_NO_TPU = dict(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
_NO_TPU |= dict(TPU_WORKER_HOSTNAMES="localhost", JAX_PLATFORMS="cpu")
_NO_TPU |= dict(TPU_ACCELERATOR_TYPE="v5litepod-16")
os.environ |= _NO_TPU | os.environ
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.data import tokens as tokens_lib
from jaxalign.model import adapters, attention, decoder, hf, memory
from jaxalign.model.job import lora_of
from jaxalign.train import feed, optim, packing
from jaxalign.train import step as steps
from jaxalign.train.batch import Batch, Logps, MismatchedBatch
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import bind, find, loss_of
from jaxalign.train.packed_shapes import needed_shape, round_up
from jaxalign.train.statistics import init_statistics
from jaxalign.train.trainer import ALLORA_ETA
from tools.aot_text import (
  collectives,
  compile_lowered,
  held,
  instructions,
  logit_buffers,
  logit_elements,
  whole_gathers,
)

DEFAULTS = dict(  # of a step
  accumulation=1,
  layout="packed",
  prompt=0,
  producer="chunked",
  frozen="float32",
  moments=2,
)


class Report(NamedTuple):
  """What one compiled step holds; bytes are of one chip."""

  topology: str
  chips: int
  mesh: dict[str, int]
  parameters: int  # of the model
  argument_bytes: int  # as the compiler laid them out
  expected_bytes: int  # parameters, two moments, scalars, batch, by the table
  planned: dict[str, int]  # memory.train_step
  temp_bytes: int
  collectives: dict[str, int]  # "all-gather in loops" -> how many
  whole_gathers: list[str]  # stacked weights gathered at once; wanted: none
  logit_buffers: list[str]  # logits of all positions; wanted: none
  logit_elements: int  # b_local * R * (L - 1) * V_local
  largest: list[tuple[int, str, str]]  # bytes, shape, name
  lower_seconds: float
  compile_seconds: float


def assumed_rows(
  rows: int, responses: int, length: int, prompt: int
) -> tokens_lib.TokenRows:
  """Rows of responses as long as can be; a row's responses end to end.

  Args:
    rows: how many.
    responses: of each.
    length: tokens of a response, its prompt's counted.
    prompt: tokens of the prompt, fewer than `length`.
  """
  if not 0 < prompt < length:
    raise ConfigError(
      f"a prompt of {prompt} tokens in responses of {length}, "
      "wanted 1 or more and fewer; choose other --prompt"
    )
  n = rows * responses
  return tokens_lib.TokenRows(
    np.zeros(n * length, np.int32),
    length * np.arange(n + 1),
    np.full(n, prompt, np.int32),
    np.zeros(n, np.int32),
  )


def dense_row(
  rows: int, responses: int, length: int, prompt: int, share: bool
) -> packing.Packed:
  """One device's `assumed_rows`, packed by the code that packs a job's."""
  tokens = assumed_rows(rows, responses, length, prompt)
  index = np.arange(rows * responses).reshape(-1, responses if share else 1)
  answers = np.full(index.shape, length - prompt)
  longest = round_up(
    tokens_lib.longest_row(tokens_lib.row_lengths(tokens), length)
  )
  shape = needed_shape(answers[:, 0] * 0 + prompt, answers, longest)
  return packing.pack(shape, tokens, index, answers)


def abstract_batch(
  mesh: jax.sharding.Mesh,
  loss: Any,
  rows: int,
  length: int,
  accumulation: int = 1,
  *,
  layout: str = "packed",
  prompt: int = 0,
) -> Batch:
  """The arrays that `feed.Feed` hands to a step, without their values.

  Args:
    mesh: the mesh.
    loss: from LOSSES, its keywords bound or not.
    rows: rows (pairs) of a step.
    length: of every response, in tokens.
    accumulation: micro-batches.
    layout: a key of feed.LAYOUTS.
    prompt: tokens of a prompt; 0: a quarter of `length`.
  """
  responses = 2 if loss.kind == "pairs" else 1
  micro = rows // accumulation
  shape = (accumulation, micro, responses)

  placed = sharding.named_sharding(mesh, None, "batch")
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(
    shape, dtype, sharding=placed
  )

  def tokens_and_mask():
    if layout == "padded":
      whole = *shape, length
      return array(jnp.int32, *whole), array(jnp.bool_, *whole)
    devices, share = sharding.parts(mesh, "batch"), layout == "packed"
    own = micro // devices, responses, length, prompt or length // 4, share
    packed = jax.tree.map(
      lambda x: array(x.dtype, accumulation, devices, *x.shape), dense_row(*own)
    )
    return packed, array(jnp.int32, *shape, 1)

  sums = array(jnp.float32, *shape)
  prefix = sums if "common_prefix" in getattr(loss, "extras", ()) else None
  ref, columns, label, other = Logps(sums, sums, prefix), {}, None, None
  if loss.kind == "unpaired":
    label = array(jnp.bool_, *shape[:2])
  if "weights" in loss.stats:
    columns["weights"] = array(jnp.float32, *shape[:2])
  if "z0" in loss.stats:
    other = MismatchedBatch(*tokens_and_mask(), sums)
  lr = jax.ShapeDtypeStruct((), jnp.float32)
  return Batch(*tokens_and_mask(), ref, label, columns, other, lr)


def positions_of(batch: Batch, mesh: jax.sharding.Mesh) -> range:
  """Positions of a chip that predict a token, to those the head fills up to."""
  if isinstance(batch.tokens, packing.Packed):
    a, s, targets = batch.tokens.target.shape
    least = s // sharding.parts(mesh, "batch") * targets
    return range(least, least + targets // 16 + 1)
  rows = int(np.prod(batch.tokens.shape[1:3])) // sharding.parts(mesh, "batch")
  length = batch.tokens.shape[-1]
  return range(rows * (length - 1), rows * length + 1)


def abstract_state(
  m: decoder.ModelConfig, mesh: jax.sharding.Mesh, tx: Any, loss: Any = None
) -> steps.TrainState:
  """A `TrainState` without its values; moments lie as the parameters do."""
  params = adapters.split(decoder.abstract(m, mesh), m.lora)[0]
  whole = sharding.named_sharding(mesh)

  def placed(x):
    # A scalar comes back bare; a moment has its parameter's sharding.
    where = whole
    if x.shape:
      where = jax.sharding.NamedSharding(mesh, x.sharding.spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return steps.TrainState(
    params,
    jax.tree.map(placed, jax.eval_shape(tx.init, params)),
    jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    jax.tree.map(placed, jax.eval_shape(lambda: init_statistics(loss))),
  )


def abstract_frozen(
  m: decoder.ModelConfig, mesh: jax.sharding.Mesh, dtype: str
) -> dict[str, Any]:
  """What adapters leave as it is, in the dtype of the reference."""
  fixed = adapters.split(decoder.abstract(m, mesh), m.lora)[1]
  given = lambda n, x: x.dtype if adapters.is_adapter(n) else jnp.dtype(dtype)
  return {
    n: jax.ShapeDtypeStruct(x.shape, given(n, x), sharding=x.sharding)
    for n, x in fixed.items()
  }


def _optimizer(t: Any, **more) -> Any:
  """The optimizer of a config's train section."""
  knobs = dict(clip=t.clip, b2=t.b2, weight_decay=t.weight_decay)
  return optim.make_optimizer(**knobs, **more)


def of_config(path: str) -> tuple[decoder.ModelConfig, dict[str, Any]]:
  """The model and the step (keywords of `compile_step`) of a config file."""
  path, _, variant = path.partition(":")
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(variant)
  m = hf.read_config(c.model.checkpoint, c.model.dtype, c.model.remat)
  own = dict(context=c.model.context, attention=c.model.attention)
  m = m._replace(lora=lora_of(c), **own)
  tx = _optimizer(c.train, name=c.train.optimizer)
  if m.lora and m.lora.variant == "allora":
    tx = optim.allora(tx, ALLORA_ETA)
  return m, dict(
    loss=loss_of(c),
    tx=tx,
    rows=c.train.batch_size,
    length=c.model.context,
    chunk=c.model.head_chunk,
    accumulation=c.train.accumulation,
    layout=c.train.layout,
    producer=c.train.logps,
    moments=optim.OPTIMIZERS[c.train.optimizer].moments,
    frozen=c.model.param_dtype,
  )


def of_flags(loss: str) -> dict[str, Any]:
  """A loss by its name and the default config's optimizer, as `of_config`."""
  tx = _optimizer(common.base().train)
  return dict(loss=bind(find(loss), loss, {}), tx=tx)


def held_bytes(tree: Any) -> int:
  """Bytes of one chip's shards, by the shardings alone."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape))
    * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def compile_step(
  topology: str, sizes: dict[str, int], m: decoder.ModelConfig, step: dict
) -> Report:
  """Compiles one train step for a TPU topology.

  Args:
    topology: as libtpu calls it, "v5e:4x4".
    sizes: of the mesh, fsdp and tensor.
    m: the model's sizes.
    step: what `of_config` returns, and the tokens of a `prompt`.

  Raises:
    ConfigError: no libtpu, an unknown topology, sizes that do not fit.
  """
  from jax.experimental import topologies

  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except Exception as error:  # libtpu raises many kinds
    raise ConfigError(
      f"no topology {topology!r} ({error}); is libtpu "
      "installed (pip install jaxalign[aot])?"
    ) from error
  s = DEFAULTS | step
  loss, tx, length, frozen = s["loss"], s["tx"], s["length"], s["frozen"]
  mesh = sharding.make_mesh(sizes, devices)
  kernel = attention.resolve(
    m.attention,
    "tpu",
    head_size=m.head_size,
    dtype=m.dtype,
    softcap=m.softcap,
    length=length,
  )
  m = m._replace(attention=kernel)
  decoder.check_model(m, mesh)
  feed.check_batch(s["rows"], s["accumulation"], mesh, "step")
  how = {k: s[k] for k in ("accumulation", "layout", "prompt")}
  batch = abstract_batch(mesh, loss, s["rows"], length, **how)
  with jax.set_mesh(mesh):
    state = abstract_state(m, mesh, tx, loss)
    fixed = abstract_frozen(m, mesh, frozen)
    logps = PRODUCERS[s["producer"]](m, s["chunk"])
    options = decoder.compiler_options(m)
    start = time.monotonic()
    train_step = steps.make_train_step(logps, loss, tx, options)
    lowered = train_step.lower(state, batch, fixed)
    lower_seconds = time.monotonic() - start
    compiled = compile_lowered(lowered)
  program = instructions(compiled.text)
  tensor = sharding.parts(mesh, "vocab")
  where = dict(positions=positions_of(batch, mesh), tensor=tensor)
  shape = memory.StepShape(
    rows=int(np.prod(batch.ref.sum.shape[1:])),
    length=length,
    chunk=s["chunk"],
    moments=s["moments"],
    frozen_size=jnp.dtype(frozen).itemsize,
  )
  return Report(
    topology=topology,
    chips=mesh.size,
    mesh=dict(mesh.shape),
    parameters=decoder.parameter_count(m),
    argument_bytes=compiled.memory.argument_size_in_bytes,
    expected_bytes=held_bytes((state, batch, fixed)),
    planned=memory.train_step(m, mesh, shape),
    temp_bytes=compiled.memory.temp_size_in_bytes,
    collectives=collectives(program),
    whole_gathers=whole_gathers(program, m, tensor),
    logit_buffers=logit_buffers(program, m, **where),
    logit_elements=logit_elements(m, **where),
    largest=held(compiled.assignment)[:8],
    lower_seconds=lower_seconds,
    compile_seconds=compiled.seconds,
  )


def table(report: Report) -> str:
  """The report as lines for a terminal."""
  r, mib = report, lambda n: f"{n / 2**20:,.1f} MiB"
  mesh = " x ".join(f"{a}={n}" for a, n in r.mesh.items())
  rest = {**r.planned}
  del rest["parameters"], rest["optimizer"]
  lines = {
    "topology": f"{r.topology}, {r.chips} chips, mesh {mesh}",
    "parameters": f"{r.parameters:,}",
    "arguments a chip": f"{mib(r.argument_bytes)}, expected "
    f"{mib(r.expected_bytes)} ({r.argument_bytes / r.expected_bytes - 1:+.2%})",
    "temporaries a chip": f"{mib(r.temp_bytes)}; memory.py says "
    + ", ".join(f"{k} {mib(v)}" for k, v in rest.items()),
    **r.collectives,
    "stacked weights gathered whole": ", ".join(r.whole_gathers) or "none",
    f"logits of {r.logit_elements:,}": ", ".join(r.logit_buffers) or "none",
    "lowered, compiled in": f"{r.lower_seconds:.1f} s, "
    f"{r.compile_seconds:.1f} s",
  }
  out = [f"{k:<32}{v}" for k, v in lines.items()]
  out += [f"held: {mib(n)} {shape} {name}" for n, shape, name in r.largest]
  return "\n".join(out)


def main(argv: list[str]) -> int:
  """Returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  flag = parser.add_argument
  flag("--topology", default="v5e:4x4")
  flag("--fsdp", type=int, default=-1)
  flag("--tensor", type=int, default=1)
  flag("--config", default="", help="a file, for what the others leave open")
  flag("--loss", default="dpo")
  flag("--json", action="store_true", help="one line in place of the table")
  model = dict(layers=8, width=2048, heads=16, kv_heads=8, head_size=128)
  model |= dict(ff=5632, vocab=32000, dtype="bfloat16", remat="full")
  model |= dict(attention="plain")
  step = dict(rows=32, length=1024, prompt=0, chunk=64, layout="packed")
  for name, default in (model | step).items():
    flag(f"--{name}", default=default, type=type(default), help=f"{default}")
  args = vars(parser.parse_args(argv[1:]))
  try:
    if args["config"]:
      m, found = of_config(args["config"])
      found |= dict(prompt=args["prompt"])
    else:
      sizes = {n: args[n] for n in model}
      m = decoder.ModelConfig(**sizes, tied=False, context=args["length"])
      found = {n: args[n] for n in step} | of_flags(args["loss"])
    mesh = dict(fsdp=args["fsdp"], tensor=args["tensor"])
    report = compile_step(args["topology"], mesh, m, found)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
  print(json.dumps(report._asdict()) if args["json"] else table(report))
  return 1 if report.whole_gathers or report.logit_buffers else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
