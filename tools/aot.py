r"""Compiles the train step for TPUs that are not there, and says what it holds.

  python tools/aot.py --topology=v5e:4x4 --fsdp=16 --tensor=1
  python tools/aot.py --topology=v5p:2x2x2 --fsdp=4 --tensor=2
  python tools/aot.py --topology=v5e:16x16 --fsdp=256 --layers=32 --width=4096 \
    --heads=32 --kv_heads=32 --ff=11008 --length=2048 --rows=256
  python tools/aot.py --config=configs/qwen3_8b_dpo.py --topology=v5e:16x16 \
    --fsdp=64 --tensor=4

Needs libtpu (the aot extra) and no TPU. Exit codes: 0 sound, 1 the program
gathers stacked weights whole or holds logits of all positions, 64 usage.
"""

import argparse
import collections
import importlib.util
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any, NamedTuple

# Before jax is imported: no TPU to ask, none to lock.
for _name, _value in dict(
    TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-16",
).items():
  os.environ.setdefault(_name, _value)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

# pylint: disable=wrong-import-position
import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from jaxalign import memory
from jaxalign import sharding
from jaxalign.errors import ConfigError
from jaxalign.job import lora_of
from jaxalign.lookup import lookup
from jaxalign.model import adapters
from jaxalign.model import attention
from jaxalign.model import decoder
from jaxalign.model import weights
from jaxalign.train import feed
from jaxalign.train import optim
from jaxalign.train import step as steps
from jaxalign.train.logps import PRODUCERS
from jaxalign.train.losses import LOSSES

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all",
               "collective-permute")


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


class Instruction(NamedTuple):
  """One line of a compiled program."""

  computation: str
  name: str
  op: str
  shapes: list[tuple[str, tuple[int, ...]]]  # of the result's arrays
  text: str


def instructions(text: str) -> list[Instruction]:
  """The lines of a compiled program, from its text."""
  out, computation = [], ""
  for line in text.splitlines():
    if line and not line[0].isspace():
      head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line)
      computation = head.group(1) if head else ""
      continue
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line)
    if not found:
      continue
    # Layouts and comments out of the way: what is left is "type op(...".
    bare = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", found.group(2))
    parts = re.match(r"(\(.*?\)|\S+) ([\w\-]+)\(", bare)
    if parts:
      shapes = [(kind, tuple(int(n) for n in dims.split(",") if n))
                for kind, dims in re.findall(
                    r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]", parts.group(1))]
      out.append(Instruction(computation, found.group(1), parts.group(2),
                             shapes, line))
  return out


def _called(program: list[Instruction], start: str) -> set[str]:
  """Computations that run inside those named by `start` (a pattern)."""
  calls = collections.defaultdict(set)
  seen, todo = set(), []
  for i in program:
    calls[i.computation].update(re.findall(
        r"(?:calls|body|condition|to_apply|called_computation)=%?([\w.\-]+)",
        i.text))
    todo += re.findall(start, i.text)
  while todo:
    name = todo.pop()
    if name not in seen:
      seen.add(name)
      todo += calls[name]
  return seen


def _words(shape: tuple[str, tuple[int, ...]]) -> str:
  return f"{shape[0]}[{','.join(map(str, shape[1]))}]"


def collectives(program: list[Instruction]) -> dict[str, int]:
  """How many collectives of each kind stand in loops and outside of them.

  The TPU compiler writes a reduce-scatter as an all-reduce that is sliced in
  one fusion, and an asynchronous collective as several lines of one channel.
  """
  loops = _called(program, r"body=%?([\w.\-]+)")
  seen = set()
  for i in program:
    op = i.op.removesuffix("-start")
    if op not in COLLECTIVES:
      continue
    if op == "all-reduce" and "all-reduce-scatter" in i.computation:
      op = "reduce-scatter"
    channel = re.search(r"channel_id=(\d+)", i.text)
    where = "in loops" if i.computation in loops else "outside"
    seen.add((f"{op} {where}", channel[1] if channel else i.name))
  return dict(sorted(collections.Counter(kind for kind, _ in seen).items()))


def whole_gathers(program: list[Instruction], m: decoder.ModelConfig,
                  tensor: int) -> list[str]:
  """All-gathers of weights of more than one layer at once.

  Weights are gathered layer by layer inside the scan; a compiler that lifts
  the gather out of it makes every chip hold the whole model. A result counts
  where it has an axis of T and T times the smallest matrix of a layer.
  """
  if m.layers < 2:
    raise ConfigError("one layer is the whole stack; say --layers=2 or more")
  smallest = min(
      int(np.prod(p.shape[1:])) // tensor for n, p in decoder.table(m).items()
      if n.startswith("layers/") and len(p.shape) > 2)
  return [f"{_words(s)} {i.name}" for i in program
          if i.op in ("all-gather", "all-gather-start") for s in i.shapes
          if m.layers in s[1] and np.prod(s[1]) >= m.layers * smallest]


def logit_elements(m: decoder.ModelConfig, *, responses: int, length: int,
                   tensor: int) -> int:
  """Logits of a chip's responses; the last position predicts nothing."""
  return responses * (length - 1) * m.vocab // tensor


def logit_buffers(program: list[Instruction], m: decoder.ModelConfig, *,
                  responses: int, length: int, tensor: int) -> list[str]:
  """Arrays that hold logits of all positions of a chip's responses.

  They have as many elements as `logit_elements`, or more, and a multiple of
  V / tensor of them, whatever their axes are merged to. The embedding and the
  head may be as large: [V, D] is told apart by its shape.

  Args:
    program: from `instructions`.
    m: the model's sizes.
    responses: rows of one chip, b_local * R.
    length: their padded length.
    tensor: chips that share the vocabulary.

  Raises:
    ConfigError: logits of all positions would have the shape of the head.
  """
  if m.width in (responses * length, responses * (length - 1)):
    raise ConfigError(f"{responses} responses of {length} tokens have as many "
                      f"logits as the head has weights; choose other --rows")
  part = m.vocab // tensor
  least = logit_elements(m, responses=responses, length=length, tensor=tensor)
  weights = [sorted((v, m.width)) for v in (part, m.vocab)]
  found = []
  for i in program:
    for s in i.shapes:
      count = int(np.prod(s[1], dtype=np.int64))
      if (count >= least and count % part == 0 and
          sorted(n for n in s[1] if n > 1) not in weights):
        found.append(f"{_words(s)} {i.op} {i.name}")
  return found


def held(assignment: str) -> list[tuple[int, str, str]]:
  """The arrays for which the compiler set memory aside: (bytes, shape, name).

  Largest first, arguments left out; arrays that take turns in one place are
  all listed.

  Args:
    assignment: the text of the compiler's buffer assignment.
  """
  out = {}
  for part in re.split(r"^allocation ", assignment, flags=re.MULTILINE)[1:]:
    if re.match(r".*\bparameter \d+", part) or "thread-local" in part[:200]:
      continue
    for name, size, kind, dims in re.findall(
        r"value: <\d+ (\S+) @\d+> \(size=(\d+),offset=\d+\): "
        r"(\w+)\[([\d,]*)\]", part):
      out.setdefault((int(size), f"{kind}[{dims}]"), name.split("{")[0])
  return [(*key, out[key]) for key in sorted(out, reverse=True)]


class Compiled(NamedTuple):
  """A program for TPUs, with what the compiler says of it."""

  text: str
  assignment: str  # of buffers
  memory: Any  # argument_size_in_bytes, temp_size_in_bytes, ...
  seconds: float


def compile_lowered(lowered: Any) -> Compiled:
  """Compiles; the text is read from a dump, `as_text` fails on some v5p."""
  with tempfile.TemporaryDirectory() as folder:
    start = time.monotonic()
    compiled = lowered.compile(compiler_options=dict(
        xla_dump_to=folder, xla_dump_hlo_as_text=True))
    seconds = time.monotonic() - start

    def dumped(kind):
      found = pathlib.Path(folder).glob(f"*.after_optimizations{kind}.txt")
      return max((path.read_text() for path in found), key=len)

    return Compiled(dumped("_after_buffer_assignment"),
                    dumped("-buffer-assignment"),
                    compiled.memory_analysis(), seconds)


def abstract_batch(mesh: jax.sharding.Mesh, loss: str, rows: int, length: int,
                   accumulation: int = 1) -> dict[str, Any]:
  """The arrays that `feed.make_feed` hands to a step, without their values."""
  fn = LOSSES[loss]
  shape = (accumulation, rows // accumulation, 2 if fn.kind == "pairs" else 1)

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype,
                                sharding=sharding.named(mesh, None, "batch"))

  batch = dict(tokens=array(jnp.int32, *shape, length),
               mask=array(jnp.bool_, *shape, length),
               ref_sum=array(jnp.float32, *shape),
               ref_count=array(jnp.float32, *shape),
               lr=jax.ShapeDtypeStruct((), jnp.float32))
  if "label" in fn.stats:
    batch["label"] = array(jnp.bool_, *shape[:2])
  if "z0" in fn.stats:
    batch["kl_tokens"], batch["kl_mask"] = batch["tokens"], batch["mask"]
    batch["kl_ref_sum"] = batch["ref_sum"]
  return batch


def abstract_state(m: decoder.ModelConfig, mesh: jax.sharding.Mesh,
                   tx: Any) -> steps.TrainState:
  """A `TrainState` without its values; moments lie as the parameters do."""
  params = adapters.split(decoder.abstract(m, mesh), m.lora)[0]
  whole = sharding.named(mesh)

  def placed(x):
    # A scalar comes back bare; a moment has its parameter's sharding.
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=(
        jax.sharding.NamedSharding(mesh, x.sharding.spec) if x.shape
        else whole))

  return steps.TrainState(
      params, jax.tree.map(placed, jax.eval_shape(tx.init, params)),
      jax.ShapeDtypeStruct((), jnp.int32, sharding=whole))


def abstract_frozen(m: decoder.ModelConfig, mesh: jax.sharding.Mesh,
                    dtype: str) -> dict[str, Any]:
  """What adapters leave as it is, in the dtype of the reference."""
  fixed = adapters.split(decoder.abstract(m, mesh), m.lora)[1]
  return {n: jax.ShapeDtypeStruct(
      x.shape, x.dtype if adapters.is_adapter(n) else jnp.dtype(dtype),
      sharding=x.sharding) for n, x in fixed.items()}


def of_config(path: str) -> tuple[decoder.ModelConfig, dict[str, Any]]:
  """The model and the step (keywords of `compile_step`) of a config file."""
  path, _, variant = path.partition(":")
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(variant)
  m = weights.read_config(c.model.checkpoint, c.model.dtype, c.model.remat)
  m = m._replace(context=c.model.context, lora=lora_of(c),
                 attention=c.model.attention)
  return m, dict(loss=c.loss.name, rows=c.train.batch_size,
                 length=c.model.context, chunk=c.model.head_chunk,
                 accumulation=c.train.accumulation,
                 sft_weight=c.loss.sft_weight, frozen=c.model.param_dtype)


def held_bytes(tree: Any) -> int:
  """Bytes of one chip's shards, by the shardings alone."""
  return sum(
      int(np.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape))
      * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_step(topology: str, sizes: dict[str, int], m: decoder.ModelConfig,
                 *, loss: str = "dpo", rows: int, length: int, chunk: int,
                 accumulation: int = 1, sft_weight: float | None = None,
                 frozen: str = "float32", dump: str = "") -> Report:
  """Compiles one train step for a TPU topology.

  Args:
    topology: as libtpu calls it, "v5e:4x4".
    sizes: of the mesh, fsdp and tensor.
    m: the model's sizes.
    loss: a key of LOSSES; its keywords have their defaults.
    rows: rows (pairs) of a step, on all chips together.
    length: padded length of a response.
    chunk: positions of the head at once.
    accumulation: micro-batches.
    sft_weight: of the chosen answer's likelihood; None: the default config's.
    frozen: dtype of what adapters leave as it is.
    dump: a file for the compiled program's text.

  Raises:
    ConfigError: no libtpu, an unknown topology, sizes that do not fit.
  """
  from jax.experimental import topologies
  try:
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology).devices
  except Exception as error:  # libtpu raises many kinds
    raise ConfigError(f"no topology {topology!r} ({error}); is libtpu "
                      "installed (pip install jaxalign[aot])?") from error
  mesh = sharding.make_mesh(sizes, devices)
  m = m._replace(attention=attention.resolve(
      m.attention, "tpu", head_size=m.head_size, dtype=m.dtype,
      softcap=m.softcap, length=length))
  decoder.check(m, mesh)
  feed.check_batch(rows, accumulation, mesh, "step")
  lookup(LOSSES, loss, "loss", "loss.name")
  knobs = common.base().train
  tx = optim.make_optimizer(clip=knobs.clip, b2=knobs.b2,
                            weight_decay=knobs.weight_decay)
  batch = abstract_batch(mesh, loss, rows, length, accumulation)
  tensor = sharding.parts(mesh, "vocab")
  responses = (int(np.prod(batch["ref_sum"].shape[1:]))
               // sharding.parts(mesh, "batch"))
  with jax.set_mesh(mesh):
    state = abstract_state(m, mesh, tx)
    fixed = abstract_frozen(m, mesh, frozen)
    if sft_weight is None:
      sft_weight = common.base().loss.sft_weight if loss == "dpo" else 0.0
    train_step = steps.make_train_step(
        PRODUCERS["chunked"](m, chunk), LOSSES[loss], tx,
        sft_weight=sft_weight)
    start = time.monotonic()
    lowered = train_step.lower(state, batch, fixed)
    lower_seconds = time.monotonic() - start
    compiled = compile_lowered(lowered)
  if dump:
    pathlib.Path(dump).write_text(compiled.text)
  program = instructions(compiled.text)
  return Report(
      topology=topology, chips=mesh.size, mesh=dict(mesh.shape),
      parameters=decoder.parameter_count(m),
      argument_bytes=compiled.memory.argument_size_in_bytes,
      expected_bytes=held_bytes((state, batch, fixed)),
      planned=memory.train_step(
          m, mesh, rows=int(np.prod(batch["ref_sum"].shape[1:])),
          length=length, chunk=chunk,
          frozen_size=jnp.dtype(frozen).itemsize),
      temp_bytes=compiled.memory.temp_size_in_bytes,
      collectives=collectives(program),
      whole_gathers=whole_gathers(program, m, tensor),
      logit_buffers=logit_buffers(program, m, responses=responses,
                                  length=length, tensor=tensor),
      logit_elements=logit_elements(m, responses=responses, length=length,
                                    tensor=tensor),
      largest=held(compiled.assignment)[:8], lower_seconds=lower_seconds,
      compile_seconds=compiled.seconds)


def table(report: Report) -> str:
  """The report as lines for a terminal."""
  mib = lambda n: f"{n / 2**20:,.1f} MiB"
  lines = [
      ("topology", f"{report.topology}, {report.chips} chips, mesh "
       + " x ".join(f"{a}={n}" for a, n in report.mesh.items())),
      ("parameters", f"{report.parameters:,}"),
      ("arguments a chip", f"{mib(report.argument_bytes)}, expected "
       f"{mib(report.expected_bytes)} "
       f"({report.argument_bytes / report.expected_bytes - 1:+.2%})"),
      ("temporaries a chip", f"{mib(report.temp_bytes)}; memory.py says "
       + ", ".join(f"{k} {mib(v)}" for k, v in report.planned.items()
                   if k not in ("parameters", "optimizer"))),
      *report.collectives.items(),
      ("stacked weights gathered whole", ", ".join(report.whole_gathers)
       or "none"),
      (f"logits of {report.logit_elements:,}", ", ".join(report.logit_buffers)
       or "none"),
      *((f"held: {mib(size)}", f"{shape} {name}")
        for size, shape, name in report.largest),
      ("lowered, compiled in", f"{report.lower_seconds:.1f} s, "
       f"{report.compile_seconds:.1f} s")]
  return "\n".join(f"{name:<32}{value}" for name, value in lines)


def main(argv: list[str]) -> int:
  """Returns the exit code."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  text = dict(topology="v5e:4x4", loss="dpo", dtype="bfloat16", remat="full",
              dump="", config="", attention="plain")
  number = dict(fsdp=-1, tensor=1, layers=8, width=2048, heads=16, kv_heads=8,
                head_size=128, ff=5632, vocab=32000, length=1024, rows=32,
                accumulation=1, chunk=64)
  for name, default in text.items():
    parser.add_argument(f"--{name}", default=default, help=f"{default!r}")
  for name, default in number.items():
    parser.add_argument(f"--{name}", default=default, type=int,
                        help=f"{default}")
  parser.add_argument("--tied", action="store_true",
                      help="the head is the embedding")
  parser.add_argument("--json", action="store_true",
                      help="one line of JSON instead of the table")
  args = parser.parse_args(argv[1:])
  m = decoder.ModelConfig(
      **{n: getattr(args, n) for n in (
          "layers", "width", "heads", "kv_heads", "head_size", "ff", "vocab",
          "tied", "dtype", "remat", "attention")}, context=args.length)
  step = {n: getattr(args, n) for n in (
      "loss", "rows", "length", "chunk", "accumulation")}
  try:
    if args.config:
      m, step = of_config(args.config)
    report = compile_step(
        args.topology, dict(fsdp=args.fsdp, tensor=args.tensor), m,
        dump=args.dump, **step)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
  print(json.dumps(report._asdict()) if args.json else table(report))
  return 1 if report.whole_gathers or report.logit_buffers else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
