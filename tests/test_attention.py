"""Attention: every kernel against the equation, values and gradients."""

import functools
import importlib.util
import json
import re
import subprocess
import sys

from conftest import ROOT
import emitters
import jax
import jax.numpy as jnp
from models import make_mesh
import numpy as np
import pytest

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.model import attention

B, G, Q = 4, 2, 2
KERNELS = ["plain", "splash", "cudnn"]


@pytest.fixture(autouse=True)
def cudnn_arguments(monkeypatch):
  """No GPU here: cuDNN's arguments, handed to the same function's XLA path."""
  run = functools.partial(attention._cudnn, implementation="xla")
  kernel = functools.partial(attention._on_shards, run)
  monkeypatch.setitem(attention.KERNELS, "cudnn", kernel)


def draw(seed, length, size, dtype=np.float32, keys=None):
  """q, k, v and a cotangent dy; in `dtype`, so that an oracle sees the same."""
  rng = np.random.default_rng(seed)
  queries, key = (B, length, G, Q, size), (B, keys or length, G, size)
  # Scores of standard deviation 2, so that the soft cap and the mask matter.
  normal = lambda shape, scale=1.0: np.asarray(
    jnp.asarray(scale * rng.standard_normal(shape), dtype)
  )
  return [normal(queries, 2.0), normal(key), normal(key), normal(queries)]


def segments_of(length):
  """[B, L]: one; two; many and short; half of the row a padding of its own."""
  slot = np.arange(length)
  half = np.where(slot < length // 2, 3, -1)
  return np.int32([0 * slot, slot >= length // 3, slot // 7, half])


def oracle(q, k, v, dy, ok, scale, softcap=0.0):
  """The equation and its gradients in float64: y, dq, dk, dv.

  ok: [B, L, S] bool, at least one true a query.
  """
  q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
  y, dq = np.zeros_like(q), np.zeros_like(q)
  dk, dv = np.zeros_like(k), np.zeros_like(v)
  for b in range(q.shape[0]):
    for g in range(q.shape[2]):
      for h in range(q.shape[3]):
        s = scale * q[b, :, g, h] @ k[b, :, g].T
        slope = 1.0
        if softcap:
          t = np.tanh(s / softcap)
          s, slope = softcap * t, 1 - t * t
        s = np.where(ok[b], s, -np.inf)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        y[b, :, g, h] = p @ v[b, :, g]
        d = dy[b, :, g, h]
        dv[b, :, g] += p.T @ d
        dp = d @ v[b, :, g].T
        ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) * slope
        dq[b, :, g, h] = scale * ds @ k[b, :, g]
        dk[b, :, g] += scale * ds.T @ q[b, :, g, h]
  return y, dq, dk, dv


def looks(length, window=0, segments=None):
  """[B, L, L] bool: query i may look at key j."""
  i, j = np.indices((1, length, length))[1:]
  ok = (j <= i) & ((j > i - window) | (window == 0))
  if segments is None:
    return np.repeat(ok, B, axis=0)
  return ok & (segments[:, :, None] == segments[:, None, :])


def seen_of(length, segments=None):
  """Slots are positions; within a segment their differences are the same."""
  slots = jnp.arange(length)[None]
  return attention.Seen(slots, slots, segments, segments)


def values_and_gradients(mesh, fn, q, k, v, dy):
  """y, dq, dk, dv of `fn(q, k, v)`; rows over fsdp, heads over tensor."""

  @jax.jit
  def run(q, k, v, dy):
    y, back = jax.vjp(fn, q, k, v)
    return y, *back(dy)

  rows = ("batch", None, "heads", None, None)
  put = functools.partial(sharding.put, mesh)
  return run(
    put(q, *rows), put(k, *rows[:4]), put(v, *rows[:4]), put(dy, *rows)
  )


def on_mesh(mesh, arrays, segments, *how):
  """y, dq, dk, dv of `attend`."""
  if segments is not None:
    segments = sharding.put(mesh, segments, "batch", None)
  seen = seen_of(arrays[0].shape[1], segments)
  more = seen, attention.Attention(*how), None, sharding.SPREAD
  attend = lambda q, k, v: attention.attend(q, k, v, *more)
  return values_and_gradients(mesh, attend, *arrays)


def close(found, wanted, tolerance):
  """Within `tolerance` of the largest value, for y and each gradient."""
  for name, x, w in zip(("y", "dq", "dk", "dv"), found, wanted, strict=True):
    x = np.asarray(x).astype(np.float64)
    assert x.shape == w.shape and np.isfinite(x).all(), name
    worst = np.abs(x - w).max() / np.abs(w).max()
    assert worst < tolerance, f"{name}: {worst:.1e}"


CASES = {  # length, head size, window, segments, soft cap
  "causal": (128, 64, 0, False, 0.0),
  "window of a block, segments": (256, 128, 128, True, 0.0),
  "window, soft cap": (128, 64, 40, False, 3.0),
  "short": (20, 256, 6, True, 0.0),
}


def check(mesh, kernel, length, size, window, segmented, softcap):
  segments = segments_of(length) if segmented else None
  arrays, scale = draw(1, length, size), 0.7 * size**-0.5
  found = on_mesh(mesh, arrays, segments, kernel, scale, softcap, (window,))
  ok = looks(length, window, segments)
  close(found, oracle(*arrays, ok, scale, softcap), 2e-5)


@pytest.mark.parametrize(
  "case, kernel",
  [(c, k) for c in CASES for k in KERNELS if k != "cudnn" or not CASES[c][-1]],
)
def test_values_and_gradients_are_the_equations(alone, case, kernel):
  check(alone, kernel, *CASES[case])


@pytest.mark.parametrize("kernel", KERNELS)
def test_on_any_mesh_all_at_once(kernel, mesh, monkeypatch):
  # 300 is no multiple of a block; three blocks, some in no query's reach.
  monkeypatch.setattr(attention, "blocks", lambda length: (384, 128))
  # cuDNN has no soft cap.
  check(mesh, kernel, 300, 64, 50, True, 5.0 if kernel != "cudnn" else 0.0)


@pytest.mark.parametrize("kernel", ["plain", "splash"])
def test_in_bfloat16_within_a_hundredth(alone, kernel):
  arrays, segments = draw(2, 128, 128, jnp.bfloat16), segments_of(128)
  found = on_mesh(alone, arrays, segments, kernel, 128**-0.5, 0.0, (50,))
  assert all(x.dtype == jnp.bfloat16 for x in found)
  close(found, oracle(*arrays, looks(128, 50, segments), 128**-0.5), 2e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_whole_rows_on_each_device(kernel):
  mesh, spec = make_mesh(4, 2), attention.Attention(kernel, 0.1, windows=(30,))
  q, k, v, dy = (np.concatenate([x, x]) for x in draw(3, 128, 64))
  segments = np.concatenate([segments_of(128)] * 2)

  def rows_of(params, rows, shared):
    q, k, v, segments = rows
    seen = seen_of(128, segments)
    return attention.attend(q, k, v, seen, spec, None, sharding.PER_ROW)

  rows = [sharding.put(mesh, x, "pool") for x in (q, k, v, segments)]
  y = jax.jit(sharding.per_row(mesh, rows_of, {}))({}, tuple(rows), ())
  ok = np.concatenate([looks(128, 30, segments_of(128))] * 2)
  assert np.abs(np.asarray(y) - oracle(q, k, v, dy, ok, 0.1)[0]).max() < 2e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_layers_of_several_kinds_in_one_scan(kernel):
  # A window of the row's length and more is none: kinds 0 and 2 agree.
  windows, order = (0, 24, 128), np.array([1, 2], np.int32)
  mesh = make_mesh(4, 2)

  spec = attention.Attention(kernel, 0.125, windows=windows)

  def stack(q, k, v):
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(x, which):
      more = seen_of(128), spec, which, sharding.SPREAD
      return x + attention.attend(x, k, v, *more), None

    return jax.lax.scan(body, q, order)[0]

  q, k, v, dy = draw(4, 128, 64)
  with jax.set_mesh(mesh):
    found = values_and_gradients(mesh, stack, q, k, v, dy)
  looked = [looks(128, windows[kind]) for kind in order]
  xs = [q.astype(np.float64)]
  for ok in looked:
    xs.append(xs[-1] + oracle(xs[-1], k, v, dy, ok, 0.125)[0])
  d, dk, dv = dy.astype(np.float64), 0, 0
  for x, ok in zip(xs[-2::-1], looked[::-1]):
    _, more_q, more_k, more_v = oracle(x, k, v, d, ok, 0.125)
    d, dk, dv = d + more_q, dk + more_k, dv + more_v
  close(found, (xs[-1], d, dk, dv), 2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_cache_is_read_at_its_positions(kernel):
  # Row 0 has written 6 of 9 slots, row 1 has 2 empty slots in between.
  far, spec = attention.FAR, attention.Attention(kernel, 0.4, 2.0, (3,))
  rows = [0, 1, 2, 3, 4, 5, far, far, far], [0, 1, far, far, 2, 3, 4, far, far]
  k_position = np.array(rows * 2, np.int32)
  q_position = np.array([[4, 5], [3, 4]] * 2, np.int32)
  q, k, v, dy = draw(5, 2, 6, keys=9)
  distance = q_position[:, :, None] - k_position[:, None, :]
  ok = (distance >= 0) & (distance < 3)

  @jax.jit
  def read(q, k, v, *positions):
    seen = attention.Seen(*positions)
    return attention.attend(q, k, v, seen, spec, None, sharding.PER_ROW)

  y = read(q, k, v, q_position, k_position)
  assert np.abs(y - oracle(q, k, v, dy, ok, 0.4, 2.0)[0]).max() < 1e-5


def test_a_query_that_may_look_nowhere_stays_finite(alone):
  here, far = np.zeros((1, 8), np.int32), np.full((1, 8), attention.FAR)
  spec = attention.Attention("plain", 1.0)
  more = attention.Seen(here, np.int32(far)), spec, None, sharding.SPREAD
  attend = lambda *arrays: attention.attend(*arrays, *more)
  found = values_and_gradients(alone, attend, *draw(6, 8, 4))
  assert all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize(
  "length, padded, block",
  [
    (1, 128, 128),
    (128, 128, 128),
    (129, 256, 256),
    (257, 384, 384),
    (512, 512, 512),
    (640, 768, 384),
    (1000, 1024, 512),
    (1025, 1152, 384),
    (1408, 1536, 512),
    (2048, 2048, 512),
    (8192, 8192, 512),
  ],
)
def test_blocks_are_large_and_pad_little(length, padded, block):
  assert attention.blocks(length) == (padded, block)


HOW = dict(head_size=128, dtype="bfloat16", softcap=0.0, length=2048)


@pytest.mark.parametrize(
  "platform, more, wanted",
  [
    ("tpu", {}, "splash"),
    ("tpu", dict(softcap=50.0, head_size=256), "splash"),
    ("tpu", dict(dtype="float32", length=None), "splash"),
    ("tpu", dict(length=128), "plain"),
    ("cpu", {}, "tiles"),
    ("gpu", {}, "cudnn"),
    ("cuda", dict(head_size=64), "cudnn"),
    ("gpu", dict(softcap=50.0), "plain"),
    ("rocm", {}, "plain"),
    ("gpu", dict(dtype="float32"), "plain"),
    ("gpu", dict(head_size=256), "plain"),
    ("gpu", dict(head_size=100), "plain"),
  ],
)
def test_auto_is_the_fastest_that_runs(platform, more, wanted):
  how = {**HOW, **more}
  assert attention.resolve("auto", platform, **how) == wanted
  assert attention.resolve(wanted, platform, **how) == wanted
  assert attention.resolve("plain", platform, **how) == "plain"


@pytest.mark.parametrize(
  "kernel, platform, more, words",
  [
    ("flash", "tpu", {}, "is unknown; known: auto, plain, tiles, splash, c"),
    ("splash", "cpu", {}, "runs on a TPU, found cpu"),
    ("cudnn", "tpu", {}, "runs on an NVIDIA GPU, found tpu"),
    ("cudnn", "gpu", dict(softcap=50.0), "has no soft cap, the model's is 50"),
    ("cudnn", "gpu", dict(dtype="float32"), "wants bfloat16, model.dtype is"),
    ("cudnn", "gpu", dict(head_size=260), "the model's are 260"),
    ("cudnn", "gpu", dict(head_size=12), "the model's are 12"),
  ],
)
def test_impossible_kernels_are_named(kernel, platform, more, words):
  with pytest.raises(ConfigError, match=words) as error:
    attention.resolve(kernel, platform, **{**HOW, **more})
  assert str(error.value).startswith(f"model.attention='{kernel}' ")


def test_a_soft_cap_is_not_dropped_by_cudnn(mesh):
  with pytest.raises(ConfigError, match="no soft cap, found 3.0"):
    on_mesh(mesh, draw(7, 16, 8), None, "cudnn", 1.0, 3.0)


@pytest.mark.parametrize(
  "window, segmented", [(0, False), (100, False), (0, True), (100, True)]
)
def test_lowered_for_a_gpu_it_is_cudnns(window, segmented, monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as fused

  # Only the version is read from the library, which is not here.
  monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
  kernel = functools.partial(attention._on_shards, attention._cudnn)
  monkeypatch.setitem(attention.KERNELS, "cudnn", kernel)
  mesh, spec = (
    make_mesh(4, 2),
    attention.Attention("cudnn", 0.25, 0.0, (window,)),
  )

  def array(shape, *axes, dtype=jnp.bfloat16):
    where = sharding.named_sharding(mesh, *axes)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  def loss(q, k, v, segments):
    seen = seen_of(256, segments if segmented else None)
    y = attention.attend(q, k, v, seen, spec, None, sharding.SPREAD)
    return jnp.sum(y.astype(jnp.float32))

  with jax.set_mesh(mesh):
    keys = array((8, 256, G, 64), "batch", None, "heads", None)
    queries = array((8, 256, G, Q, 64), "batch", None, "heads", None, None)
    segments = array((8, 256), "batch", None, dtype=jnp.int32)
    fn = jax.jit(jax.grad(loss, (0, 1, 2)))
    traced = fn.trace(queries, keys, keys, segments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  kind = "ScaleBiasSoftmax" if segmented else "Softmax"
  calls = re.findall(r"custom_call @__cudnn\$fmha(\w+)\((.*)", text)
  assert [name for name, _ in calls] == [kind, kind + "Backward"]
  for _, line in calls:
    line = line.replace("\\22", '"')
    assert '"fmha_scale": 0.25' in line and '"mask_type": "CAUSAL"' in line
    # Rows over fsdp, heads over tensor: 2 rows, 1 group of 2 heads a device.
    assert "tensor<2x256x2x64xbf16>" in line
    # With segments the window is in the bias.
    reach = 0 if segmented else window
    assert f'"sliding_window_length": {reach}' in line


# Compiled for TPUs that are not there, in a process of its own: libtpu is
# locked and its flags are read once.

COMPILE = """
import json
from tools import aot
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jaxalign.core import sharding
from jaxalign.model import attention

def compiled(topology, fsdp, tensor, kernel, *, rows, length, groups, heads,
             size, windows=(0,), segmented=False, softcap=0.0, layers=0,
             dtype="bfloat16"):
  mesh = sharding.make_mesh(dict(fsdp=fsdp, tensor=tensor),
                            topologies.get_topology_desc(
                                platform="tpu", topology_name=topology).devices)
  def array(shape, *axes, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype),
                                sharding=sharding.named_sharding(mesh, *axes))
  def loss(q, k, v, segments, dy):
    slots = jnp.arange(length)[None]
    seen = attention.Seen(slots, slots,
                          *([segments] * 2 if segmented else ()))
    spec = attention.Attention(kernel, size ** -0.5, softcap, windows)
    look = lambda q, k, v, kind=None: attention.attend(
        q, k, v, seen, spec, kind, sharding.SPREAD)
    if not layers:
      y = look(q, k, v)
    else:
      body = jax.checkpoint(lambda x, kind: (x + look(x, k, v, kind),
                                             None), prevent_cse=False)
      y = jax.lax.scan(body, q, jnp.arange(layers) % len(windows))[0]
    return jnp.sum(y * dy)
  axes = ("batch", None, "heads", None, None)
  x = array((rows, length, groups, heads, size), *axes)
  k = array((rows, length, groups, size), *axes[:4])
  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(
        x, k, k, array((rows, length), "batch", None, dtype="int32"), x)
    done = aot.compile_lowered(lowered)
  program = aot.instructions(done.text)
  squares = sorted({str(s) for i in program for s in i.shapes
                    if sum(n >= length for n in s[1]) > 1})
  print("SAW", json.dumps(dict(
      kernels=sum("tpu_custom_call" in i.text for i in program),
      squares=squares, temp=done.memory.temp_size_in_bytes,
      collectives=aot.collectives(program))), flush=True)

# A row of 4096 on v5e: the kernel, and plain as the control.
llama = dict(rows=16, length=4096, groups=8, heads=4, size=128)
compiled("v5e:4x4", 8, 2, "splash", **llama)
compiled("v5e:4x4", 8, 2, "plain", **llama)
# Gemma 2: heads of 256, soft cap, two kinds of layers in one scan.
compiled("v5e:4x4", 4, 4, "splash", rows=4, length=8192, groups=4, heads=2,
         size=256, windows=(4096, 0), softcap=50.0, layers=4)
# Packed rows, an odd length, heads of 64, on other generations.
packed = dict(rows=8, length=2000, groups=4, heads=2, size=64, segmented=True)
compiled("v5p:2x2x2", 4, 2, "splash", windows=(1024,), **packed)
compiled("v6e:4x4", 4, 4, "splash", dtype="float32", **packed)
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs libtpu (pip install jaxalign[aot]), which is not installed",
)
def test_compiled_for_tpus_no_scores_are_held():
  done = subprocess.run(
    [sys.executable, "-c", COMPILE],
    cwd=ROOT,
    text=True,
    capture_output=True,
    timeout=600,
    env=emitters.as_users(),
  )
  assert done.returncode == 0, done.stderr[-3000:]
  lines = [x for x in done.stdout.splitlines() if x.startswith("SAW ")]
  found = llama, plain, gemma, v5p, v6e = [json.loads(x[4:]) for x in lines]
  # Forward, dq, and dk with dv; the scan's backward pass runs forward again,
  # and each kind of layer has its own.
  assert [r["kernels"] for r in found] == [3, 0, 8, 3, 3]
  for r in (llama, gemma, v5p, v6e):
    assert r["squares"] == []
    # Rows and heads meet no others: the sum of the loss, and no more.
    assert set(r["collectives"]) <= {"all-reduce outside"}
  # 2 rows x 16 heads x 4096 x 4096 float32 scores a chip.
  scores = 2 * 16 * 4096 * 4096 * 4
  assert plain["squares"] and plain["temp"] > scores
  assert llama["temp"] < scores / 8  # transposed q, k, v, ...; linear in L
  # 1 row x 2 heads a chip.
  assert gemma["temp"] < 2 * 8192 * 8192 * 4
