"""The train step compiled for TPUs that are not there: memory, collectives."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys

from conftest import ROOT
import emitters
import flat
import jax
from models import draw, make_mesh, put, sized
import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.model import adapters, memory
from jaxalign.train import feed, optim
from jaxalign.train import step as steps
from jaxalign.train.losses import LOSSES
from jaxalign.train.packing import Packed

sys.path.insert(0, str(ROOT))
from tools import aot  # noqa: E402

SIZES = 6, 2048, 16, 8, 128, 5632, 32000, 1024
M = sized(*SIZES, tied=False, dtype="bfloat16", remat="full")
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs libtpu (pip install jaxalign[aot]), which is not installed",
)


# What a compiler sets aside besides the arguments.
TEMPORARY = ("gradients", "activations", "logits", "workspace")


def line(result, operation, name="x", more=""):
  """A program of one line, as the compiler writes them."""
  return aot.instructions(
    "HloModule jit_train_step\n\nENTRY %main (a: f32[]) -> f32[] {\n"
    f"  ROOT %{name} = {result} {operation}(%a), channel_id=1{more}, "
    'metadata={op_name="jit(f)/while/body/x"}\n}\n'
  )


@pytest.mark.parametrize(
  "result, flagged",
  [
    # A whole stack, however it is laid out, split or cast.
    ("bf16[6,2048,5632]{2,1,0:T(8,128)(2,1)}", True),
    ("f32[6,2048,8,128]{3,1,2,0:T(8,128)}", True),
    ("bf16[2048,6,8,128]{3,2,1,0}", True),
    ("(bf16[6,128,5632]{2,1,0}, bf16[6,2048,5632]{2,1,0:T(8,128)S(1)})", True),
    # One layer; the head; a slice of the stack's rows.
    ("bf16[1,2048,5632]{2,1,0:T(8,128)(2,1)S(1)}", False),
    ("bf16[2048,5632]{1,0}", False),
    ("bf16[32000,2048]{1,0}", False),
    ("f32[6,2048]{1,0}", False),
  ],
)
@pytest.mark.parametrize("operation", ["all-gather", "all-gather-start"])
def test_a_stack_that_is_gathered_whole_is_flagged(operation, result, flagged):
  found = aot.whole_gathers(line(result, operation, "all-gather.7"), M, 1)
  assert bool(found) == flagged
  assert all("all-gather.7" in words for words in found)
  assert not aot.whole_gathers(line(result, "all-reduce"), M, 1)


@pytest.mark.parametrize(
  "result, flagged",
  [
    ("f32[4,1024,32000]{2,1,0:T(8,128)}", True),
    ("bf16[2,2,1023,32000]{3,2,1,0}", True),
    ("f32[4096,32000]{1,0}", True),
    ("f32[131072000]{0}", True),
    ("f32[4,32768000]{1,0}", True),
    ("(s32[], f32[16,4,64,32000]{3,2,1,0})", True),
    ("f32[4,64,32000]{2,1,0}", False),
    ("f32[32000,2048]{1,0}", False),
    # As large, but no multiple of the vocabulary.
    ("f32[4,32,1024,1024]{3,2,1,0}", False),
  ],
)
def test_logits_of_all_positions_are_flagged(result, flagged):
  found = aot.logit_buffers(
    line(result, "fusion"), M, tensor=1, positions=range(4 * 1023, 4 * 1024 + 1)
  )
  assert bool(found) == flagged


def test_a_check_that_could_not_tell_is_refused():
  with pytest.raises(ConfigError, match="choose other --rows"):
    aot.logit_buffers([], M, positions=range(2 * 1023, 2 * 1024 + 1), tensor=1)
  with pytest.raises(ConfigError, match="layers=2 or more"):
    aot.whole_gathers([], M._replace(layers=1), 1)


def test_collectives_are_counted_by_channel_and_place():
  program = aot.instructions("""HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%all-reduce-scatter.1 (i: f32[8]) -> f32[2] {
  %all-reduce.1 = f32[8]{0} all-reduce(%i), channel_id=1, to_apply=%add
  ROOT %d = f32[2]{0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={2}
}
%start.1 (i: f32[2]) -> (f32[2], f32[8]) {
  %all-gather.1 = f32[8]{0} all-gather(%i), channel_id=2, dimensions={0}
}
%body.1 (t: (f32[8])) -> (f32[8]) {
  %fusion.1 = (f32[2]{0}, f32[8]{0}) fusion(%t), calls=%start.1
  %all-gather.2 = f32[8]{0} all-gather(%t), channel_id=2, dimensions={0}
  %fusion.2 = f32[2]{0} fusion(%t), kind=kCustom, calls=%all-reduce-scatter.1
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (f32[8]{0}) while(%p), condition=%add, body=%body.1
  %all-gather-start.3 = (f32[2], f32[8]) all-gather-start(%p), channel_id=3
  %all-gather-done.3 = f32[8] all-gather-done(%all-gather-start.3)
  ROOT %all-reduce.4 = f32[8] all-reduce(%p), channel_id=4, to_apply=%add
}
""")
  assert aot.collectives(program) == {
    "all-gather in loops": 1,
    "all-gather outside": 1,
    "all-reduce outside": 1,
    "reduce-scatter in loops": 1,
  }


def same_arrays(real, assumed):
  """Abstract arrays agree with real ones in all but the values."""
  assert jax.tree.structure(real) == jax.tree.structure(assumed)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(real), jax.tree.leaves(assumed)
  ):
    name = jax.tree_util.keystr(path)
    assert (x.shape, x.dtype) == (y.shape, y.dtype), name
    if x.shape:
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim), name
  # By the shardings alone, as many bytes as the arrays have on one device.
  of_one = lambda x: (
    x.addressable_shards[0].data if isinstance(x, jax.Array) else x
  )
  held = sum(of_one(x).nbytes for x in jax.tree.leaves(real))
  assert aot.held_bytes(assumed) == held


@pytest.mark.parametrize("layout", ["packed", "packed_apart", "padded"])
@pytest.mark.parametrize(
  "loss, responses, accumulation",
  [("dpo", 2, 1), ("dpo", 2, 2), ("kto", 1, 1), ("kto", 1, 2)],
)
def test_the_compiled_batch_is_what_a_run_feeds(
  loss, responses, accumulation, layout
):
  mesh = sharding.make_mesh(dict(fsdp=4, tensor=2))
  loss, context, prompt = LOSSES[loss], 128, 32
  row = np.zeros(prompt), *[np.zeros(context - prompt)] * responses
  tokens, more = flat.rows_of([row] * 8), {}
  if loss.kind == "unpaired":
    mismatched = feed.MismatchedRows(tokens, np.zeros(8, np.float32))
    more = dict(label=np.zeros(8, bool), mismatched=mismatched)
  rows = flat.train_rows(tokens, responses, **more)
  batching = feed.Batching(8, 0, accumulation, context, layout)
  batch_at = feed.Feed(mesh, rows, batching, lambda step: 1e-3).batch_at
  assumed = aot.abstract_batch(
    mesh, loss, 8, context, accumulation, layout=layout
  )
  same_arrays(batch_at(0), assumed)
  assert isinstance(assumed.tokens, Packed) == (layout != "padded")
  each = 8 * responses // accumulation // 4  # responses of a device
  places = 127 if layout == "padded" else 96
  assert aot.positions_of(assumed, mesh)[0] == each * places


def test_the_packed_row_of_a_pair_by_hand():
  # Two pairs of 32 + 96 + 96 tokens; four sequences of 128 for attention.
  one = aot.dense_row(2, 2, 128, 32, share=True)
  assert one.tokens.shape == (448,) and one.target.shape == (384,)
  assert one.copies.token.shape == (4, 128)
  apart = aot.dense_row(2, 2, 128, 32, share=False)
  assert apart.tokens.shape == (512,) and apart.target.shape == (384,)
  with pytest.raises(ConfigError, match="choose other --prompt"):
    aot.dense_row(1, 2, 128, 128, share=True)


@pytest.mark.parametrize(
  "name", ["mistral_7b_kto_isa", "qwen3_8b_dpo", "gemma3_4b_lora"]
)
def test_the_step_of_a_config_is_the_one_that_a_job_runs(name):
  m, step = aot.of_config(str(ROOT / f"configs/{name}.py"))
  c = importlib.import_module(f"configs.{name}").get_config()
  assert (step["layout"], step["producer"]) == (c.train.layout, c.train.logps)
  assert step["layout"] == "packed"
  assert step["loss"].func is LOSSES[c.loss.name]
  assert step["loss"].keywords == c.loss.kwargs.to_dict()
  # The very function, by the keys of its cache.
  assert step["tx"] is optim.make_optimizer(
    clip=c.train.clip,
    b2=c.train.b2,
    weight_decay=c.train.weight_decay,
    name=c.train.optimizer,
  )
  assert (m.lora is not None) == bool(c.lora.rank)
  assert (step["rows"], step["length"]) == (c.train.batch_size, 2048)


def test_the_compiled_state_is_what_a_run_starts_from():
  mesh = sharding.make_mesh(dict(fsdp=4, tensor=2))
  m = M._replace(
    layers=2, width=16, heads=4, kv_heads=2, head_size=4, ff=24, vocab=34
  )
  tx = optim.make_optimizer(clip=1.0, weight_decay=0.0, b2=0.98)
  with jax.set_mesh(mesh):
    params = put(mesh, m, draw(m))
    for loss in (LOSSES["dpo"], LOSSES["bco"]):  # which keeps a mean
      state = steps.init_state(params, tx, loss)
      same_arrays(state, aot.abstract_state(m, mesh, tx, loss))


def test_the_head_of_a_plan_by_hand():
  # So wide a vocabulary that the head decides: 1,000 rows of 4 numbers, 12
  # tokens in one chunk of logits.
  m = sized(1, 4, 2, 1, 2, 3, 1000, 16, tied=False)
  hidden = 2 * 4 * 12 * 4
  lora = adapters.Lora(1, 1.0)
  for config, frozen, each in (
    (m, 4, 4 + 4),  # float32 weights and gradient
    (m._replace(dtype="bfloat16"), 4, 4 + 4 + 2 + 2),  # in both precisions
    (m._replace(dtype="bfloat16", lora=lora), 2, 2 + 2),  # no gradient
    (m._replace(dtype="bfloat16", lora=lora), 4, 4 + 2),
  ):
    shape = memory.StepShape(rows=2, length=6, chunk=6, frozen_size=frozen)
    held = memory.train_step(config, make_mesh(), shape)
    assert held["workspace"] == each * 4000 + hidden
    assert held["logits"] == 2 * 4 * 12 * 1000


SEVEN = M._replace(
  layers=32, width=4096, heads=32, kv_heads=32, ff=11008, context=2048
)


# What libtpu 0.0.51 set aside besides the arguments, MiB a chip, padded rows;
# the table of BENCHMARKS.md.
@pytest.mark.parametrize(
  "model, fsdp, tensor, rows, measured",
  [
    (M, 16, 1, 64, 1145),
    (M, 8, 1, 32, 1222),
    (M, 8, 2, 64, 942),
    (M, 4, 2, 32, 1172),
    (SEVEN, 256, 1, 1024, 7352),
    ("mistral_7b_kto_isa", 32, 8, 32, 796.5),
    ("qwen3_8b_dpo", 64, 4, 256, 5035.8),
    ("gemma3_4b_lora", 64, 4, 128, 1344.6),
  ],
)
def test_the_plan_is_near_what_a_compiler_set_aside(
  model, fsdp, tensor, rows, measured
):
  sizes = dict(chunk=64)
  if isinstance(model, str):
    model, step = aot.of_config(str(ROOT / f"configs/{model}.py"))
    model = model._replace(attention="splash")
    sizes = dict(
      chunk=step["chunk"],
      frozen_size=dict(float32=4, bfloat16=2)[step["frozen"]],
    )
  mesh = jax.sharding.AbstractMesh((fsdp, tensor), sharding.AXES)
  shape = memory.StepShape(rows=rows, length=model.context, **sizes)
  held = memory.train_step(model, mesh, shape)
  assert 0.99 < sum(held[k] for k in TEMPORARY) / 2**20 / measured < 1.28


# Compiled, each in a process of its own: libtpu is locked and its flags are
# read once.


PADDED = ("--layout=padded", f"--layers={M.layers}")
SMALL = (
  "--layout=packed --layers=3 --width=256 --heads=4 --kv_heads=2 "
  "--ff=512 --vocab=4032 --length=256 --chunk=32"
).split()


def output_of(*command):
  """What a Python process of a user's prints."""
  done = subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
    env=emitters.as_users(),
  )
  assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
  return done.stdout


def report(topology, fsdp, tensor, rows, more=PADDED):
  sizes = dict(topology=topology, fsdp=fsdp, tensor=tensor, rows=rows)
  flags = [f"--{name}={value}" for name, value in sizes.items()]
  out = output_of("tools/aot.py", *flags, "--json", *more)
  return aot.Report(**json.loads(out.splitlines()[-1]))


def sound(r):
  """What every compiled step must hold to."""
  assert r.whole_gathers == [] and r.logit_buffers == []
  assert abs(r.argument_bytes / r.expected_bytes - 1) < 0.05
  # Four float32 numbers a parameter are held; the fourth is the gradient.
  assert r.planned["parameters"] + r.planned["optimizer"] <= r.expected_bytes
  # No array of any shape is as large as the logits would be.
  sizes = [
    int(np.prod([int(n) for n in shape[:-1].split("[")[1].split(",")]))
    for _, shape, _ in r.largest
  ]
  assert max(sizes) < r.logit_elements
  # Seven weights a layer: gathered forward and again backward; outside of the
  # loops only the embedding and the head.
  assert r.collectives["all-gather in loops"] == 14
  assert r.collectives["all-gather outside"] == 2
  print(aot.table(r))


def near_the_plan(r):
  """The estimate of the plan, against the compiler."""
  planned = sum(r.planned[k] for k in TEMPORARY)
  assert 0.8 < planned / r.temp_bytes < 1.5


@pytest.mark.slow
@needs_libtpu
@pytest.mark.skipif(
  not os.environ.get("JAXALIGN_LONG"),
  reason="two compilations of minutes; JAXALIGN_LONG=1 runs",
)
def test_twice_the_chips_hold_half_each():
  # As many rows a chip on both, so that only the state is divided further.
  many, few = report("v5e:4x4", 16, 1, 32), report("v5e:2x4", 8, 1, 16)
  assert many.chips == 16 and few.chips == 8
  for r in (many, few):
    sound(r)
    near_the_plan(r)
    assert 400e6 < r.parameters < 420e6
  assert abs(few.argument_bytes / many.argument_bytes / 2 - 1) < 0.05
  # A table's worth of weights and moments in float32, a sixteenth of it.
  assert abs(many.argument_bytes / (12 * many.parameters / 16) - 1) < 0.05
  assert many.temp_bytes < 1.1 * few.temp_bytes


@pytest.mark.slow
@needs_libtpu
def test_tensor_parallel_on_another_generation():
  r = report("v5p:2x2x2", 4, 2, 16)
  sound(r)
  near_the_plan(r)
  # The sums over heads and features that tensor parallelism adds.
  assert r.collectives["all-reduce in loops"] >= 4
  assert abs(r.argument_bytes / (12 * r.parameters / 8) - 1) < 0.05


@pytest.mark.slow
@needs_libtpu
def test_the_packed_step_compiles_for_a_tpu():
  r = report("v5e:2x2", 2, 2, 4, SMALL)
  sound(r)
  # Two pairs a chip of 2 x 192 answer tokens, half the vocabulary.
  assert r.logit_elements == 768 * 2016
  assert r.collectives["all-reduce in loops"] >= 4


CONTROL = """
import jax, jax.numpy as jnp
from tools import aot
from jax.experimental import topologies
from jaxalign.core import sharding
from jaxalign.model import decoder
m = decoder.ModelConfig(layers=6, width=512, heads=8, kv_heads=4, head_size=64,
                        ff=1024, vocab=4000, context=256)
mesh = sharding.make_mesh(dict(fsdp=8, tensor=1), topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x4").devices)

def abstract(shape, *axes):
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16,
                              sharding=sharding.named_sharding(mesh, *axes))

def stacked(w, x):  # gathers before the scan
  whole = jax.reshard(w, jax.P())
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, whole)[0]

def scanned(w, x):  # gathers inside, as the decoder does
  def body(x, w):
    return jnp.tanh(x @ sharding.SPREAD.weight(w, ("width", None))), None
  return jax.lax.scan(body, x, w)[0]

def head(w, x):  # logits of all positions
  y = jnp.einsum("bld,vd->blv", x, jax.reshard(w, jax.P()))
  return jnp.sum(jax.nn.log_softmax(jax.lax.optimization_barrier(y)))

with jax.set_mesh(mesh):
  w = abstract((6, 512, 512), None, "width", None)
  x = abstract((32, 256, 512), "batch", None, None)
  table = abstract((4000, 512), "vocab", "width")
  for name, fn, args in (("stacked", stacked, (w, x)),
                         ("scanned", scanned, (w, x)),
                         ("head", head, (table, x))):
    compiled = aot.compile_lowered(jax.jit(fn).lower(*args))
    program = aot.instructions(compiled.text)
    print("SAW", name, len(aot.whole_gathers(program, m, 1)),
          len(aot.logit_buffers(program, m, positions=range(1020, 1025),
                                tensor=1)),
          any("4000" in shape for _, shape, _ in aot.held(compiled.assignment)))
"""


@pytest.mark.slow
@needs_libtpu
def test_programs_that_do_it_wrong_are_flagged():
  lines = map(str.split, output_of("-c", CONTROL).splitlines())
  saw = {words[1]: words[2:] for words in lines if words[:1] == ["SAW"]}
  assert set(saw) == {"stacked", "scanned", "head"}
  assert int(saw["stacked"][0]) > 0 and saw["stacked"][1] == "0"
  assert saw["scanned"] == ["0", "0", "False"]
  assert saw["head"][0] == "0" and int(saw["head"][1]) > 0
  assert saw["head"][2] == "True"
