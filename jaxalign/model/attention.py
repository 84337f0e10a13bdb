"""Rotary positions, and attention by platform: fused kernels or plain.

All kernels compute softmax(cap(scale q.k)) v over the keys that `Seen` lets a
query look at. `plain` holds the [L, S] scores and follows
`Seen` to the letter. The fused kernels hold no scores, and know a mask by slot
numbers alone: they require that within a segment the slots are consecutive
and positions rise by one per slot, and that a slot that holds nothing has a
segment of its own (padding on the right needs none: causality hides it).

Within 2e-5 of each other in float32, within 2e-2 in bfloat16 (of values of
size one): the sums run in another order, and round to bfloat16 at other places,
splash among them `scale q`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.model.parameters import wide


class Rope(NamedTuple):
  """One rotary embedding, with the names of `rope_parameters` in config.json.

  `kind` is a key of ROPES; "dynamic" equals "default" up to the length that
  the model was made for, and longer rows are refused.
  """

  theta: float = 10000.0
  kind: str = "default"
  factor: float = 1.0
  low: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow
  high: float = 4.0  # llama3: high_freq_factor; yarn: beta_fast
  original: int = 0  # original_max_position_embeddings
  magnitude: float = 0.0  # yarn: attention_factor; 0: its own formula
  truncate: bool = True  # yarn: whole dimensions as the ramp's ends


def _llama3(frequency, r, dims):
  """Long waves slowed by `factor`, short ones kept, a ramp between."""
  del dims
  turns = r.original * frequency / (2 * np.pi)  # in the original context
  ramp = np.clip((turns - r.low) / (r.high - r.low), 0, 1)
  return frequency * (ramp + (1 - ramp) / r.factor)


def _yarn(frequency, r, dims):
  """Peng et al. 2023, "NTK-by-parts": the ramp is over dimensions."""

  def dimension(turns):
    wave = math.log(r.original / (turns * 2 * math.pi))
    return dims * wave / (2 * math.log(r.theta))

  first, last = dimension(r.high), dimension(r.low)
  if r.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, dims - 1)
  ramp = np.clip((np.arange(dims // 2) - first) / max(last - first, 1e-3), 0, 1)
  return frequency * (1 - ramp + ramp / r.factor)


# (frequencies [dims / 2] float64, Rope, dims) -> slowed frequencies
ROPES = {
  "default": lambda frequency, r, dims: frequency,
  "linear": lambda frequency, r, dims: frequency / r.factor,
  "dynamic": lambda frequency, r, dims: frequency,
  "llama3": _llama3,
  "yarn": _yarn,
}


def check_rope(r: Rope) -> None:
  """Raises ConfigError for a kind that is not known, or sizes with no sense."""
  problem = ""
  if r.kind not in ROPES:
    problem = f"rope_type={r.kind!r} is unknown; known: {', '.join(ROPES)}"
  elif r.kind in ("llama3", "yarn") and r.original < 1:
    problem = f"rope_type={r.kind!r} needs original_max_position_embeddings"
  elif r.theta <= 1 or r.factor <= 0:
    problem = f"{r}: wanted theta above 1 and factor above 0"
  elif r.kind == "llama3" and r.high <= r.low:
    problem = f"{r}: wanted high_freq_factor above low_freq_factor"
  if problem:
    raise ConfigError(problem)


def frequencies(r: Rope, dims: int) -> np.ndarray:
  """Angle per position [dims / 2], float64, of `dims` rotated dimensions."""
  base = r.theta ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
  return ROPES[r.kind](base, r, dims)


def angles(
  r: Rope, dims: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine [B, L, dims / 2] float32 at `positions` [B, L]."""
  frequency = jnp.asarray(frequencies(r, dims), jnp.float32)
  angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
  scale = 1.0
  if r.kind == "yarn":
    scale = r.magnitude or 0.1 * math.log(max(r.factor, 1.0)) + 1
  return scale * jnp.cos(angle), scale * jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the first dimensions of x [B, L, ..., C], half against half.

  `cos` and `sin` [B or 1, L, dims / 2] are as from `angles`; dimensions from
  `dims` on pass as they are.
  """
  over = (slice(None), slice(None), *(None,) * (x.ndim - 3))
  cos, sin = cos[over].astype(x.dtype), sin[over].astype(x.dtype)
  half = cos.shape[-1]
  a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


FAR = 2**30  # the position of a slot that holds nothing; no window is as long
GPU = ("gpu", "cuda")  # JAX says gpu; lowering for one says cuda


class Seen(NamedTuple):
  """What each query may look at: keys at or before it, in its segment."""

  q_position: jax.Array  # [B or 1, L] int32
  k_position: jax.Array  # [B or 1, S] int32; a slot that holds nothing: FAR
  q_segment: jax.Array | None = None  # [B, L] int32; None: one segment
  k_segment: jax.Array | None = None  # [B, S] int32


class Attention(NamedTuple):
  """How a model attends: what is the same for all of its layers."""

  kernel: str  # a key of KERNELS, as from `resolve`
  scale: float  # multiplies q.k
  softcap: float = 0.0  # scores: softcap * tanh(scores / softcap); 0: none
  windows: tuple[int, ...] = (0,)  # keys a query reaches, by kind; 0: all


def window_of(spec: Attention, kind: jax.Array | None) -> int | jax.Array:
  """Keys in reach in a layer of that kind; where windows differ, 0 is FAR."""
  if kind is None:
    return spec.windows[0]
  reach = jnp.asarray([w or FAR for w in spec.windows])
  return jax.lax.dynamic_index_in_dim(reach, kind, keepdims=False)


def mask(seen: Seen, window: int | jax.Array = 0) -> jax.Array:
  """[B or 1, L, S] bool, true where a query may look.

  `window` counts the keys in reach, the query's own among them; the int 0: all.
  """
  distance = seen.q_position[:, :, None] - seen.k_position[:, None, :]
  ok = distance >= 0
  if not isinstance(window, int) or window:
    ok &= distance < window
  if seen.q_segment is not None:
    ok &= seen.q_segment[:, :, None] == seen.k_segment[:, None, :]
  return ok


def _plain(q, k, v, seen, spec, kind, place):
  del place  # any: einsum finds its shardings
  scores = spec.scale * jnp.einsum(
    "blgqc,bsgc->bgqls", q, k, preferred_element_type=wide(q)
  )
  if spec.softcap:
    scores = spec.softcap * jnp.tanh(scores / spec.softcap)
  # A finite floor: a padding query that may look nowhere stays finite.
  ok = mask(seen, window_of(spec, kind))[:, None, None]
  weights = jax.nn.softmax(jnp.where(ok, scores, -1e30), axis=-1)
  return jnp.einsum("bgqls,bsgc->blgqc", weights.astype(v.dtype), v)


def blocks(length: int) -> tuple[int, int]:
  """(padded length, block) for splash, both multiples of 128.

  Large blocks are several times faster than small ones; the largest of at
  most 512 is taken that pads by no more than a quarter.
  """
  for block in (512, 384, 256, 128):
    padded = -(-length // block) * block
    if padded <= 1.25 * (-(-length // 128) * 128):
      break
  return padded, block


def _splash(q, k, v, segments, spec, window):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  rows, length, groups, per_group, size = q.shape
  padded, block = blocks(length)
  shape = (padded, padded)
  # What is padded comes after all else, so no query sees it; a padded query
  # sees itself, so it is finite.
  extra = padded - length
  causal = splash.CausalMask(shape)
  if window:
    causal = splash.LocalMask(shape, (window - 1, 0), 0)
  names = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([causal] * (groups * per_group)),
    block_sizes=splash.BlockSizes(**{f"block_{n}": block for n in names}),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=spec.softcap or None,
    interpret=sharding.platform() != "tpu",
  )

  def by_head(x):
    x = jnp.swapaxes(x.reshape(rows, length, -1, size), 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))

  if segments is not None:
    longer = [jnp.pad(s, ((0, 0), (0, extra))) for s in segments]
    segments = splash.SegmentIds(*longer)
  q = (spec.scale * q.astype(jnp.float32)).astype(q.dtype)
  y = jax.vmap(kernel)(by_head(q), by_head(k), by_head(v), segments)
  y = jnp.swapaxes(y[:, :, :length], 1, 2)
  return y.reshape(rows, length, groups, per_group, size)


def _cudnn(q, k, v, segments, spec, window, implementation="cudnn"):
  if spec.softcap:
    raise ConfigError(
      f"cuDNN's attention has no soft cap, found {spec.softcap}; "
      "set model.attention to auto or plain"
    )
  rows, length, groups, per_group, size = q.shape
  seen, reach = None, (window - 1, 0) if window else None
  if segments is not None:
    # cuDNN takes a window or a mask, not both: the window goes into the mask.
    # The mask is [B, 1, L, L] in the dtype of q, the one array of that size.
    slots = jnp.arange(length)[None]
    seen = mask(Seen(slots, slots, *segments), window)[:, None]
    reach = None
  y = jax.nn.dot_product_attention(
    q.reshape(rows, length, groups * per_group, size),
    k,
    v,
    mask=seen,
    scale=spec.scale,
    is_causal=True,
    local_window_size=reach,
    implementation=implementation,
  )
  return y.reshape(rows, length, groups, per_group, size)


def _on_shards(kernel, q, k, v, seen, spec, kind, place):
  """A fused kernel on each device's own rows and heads."""
  length = q.shape[1]
  # A window as long as the row is none; kinds that agree need no switch.
  reach = [w if w < length else 0 for w in spec.windows]
  kinds = sorted(set(reach))
  branches = [functools.partial(kernel, spec=spec, window=w) for w in kinds]
  queries = ("batch", None, "heads", None, None)
  args, axes = [q, k, v], [queries, queries[:4], queries[:4]]
  if seen.q_segment is not None:
    args += [seen.q_segment, seen.k_segment]
    axes += [("batch", None)] * 2
  if len(kinds) > 1:
    branch = jnp.asarray([kinds.index(w) for w in reach])
    args.append(jax.lax.dynamic_index_in_dim(branch, kind, keepdims=False))
    axes.append(())

  def local(q, k, v, *rest):
    segments = rest[:2] if seen.q_segment is not None else None
    if len(kinds) == 1:
      return branches[0](q, k, v, segments)
    return jax.lax.switch(rest[-1], branches, q, k, v, segments)

  return place.local(local, axes, queries)(*args)


KERNELS = {
  "plain": _plain,
  "tiles": _plain,  # of packed tokens `packed.attend`
  "splash": functools.partial(_on_shards, _splash),
  "cudnn": functools.partial(_on_shards, _cudnn),
}


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  seen: Seen,
  spec: Attention,
  kind: jax.Array | None,
  place: sharding.Place,
) -> jax.Array:
  """Grouped-query attention with a float32 softmax.

  Args:
    q: [B, L, G, Q, C].
    k: [B, S, G, C].
    v: [B, S, G, C].
    seen: what each query may look at; the module's docstring says what the
      fused kernels require of it.
    spec: kernel, scale, soft cap and windows. Where S is not L, a cache is
      read, and plain is used. Off a TPU splash is interpreted: for tests.
    kind: of this layer, a scalar int32 into `spec.windows`; None where all
      layers are alike.
    place: `sharding.SPREAD` under jit on the mesh, `sharding.PER_ROW` inside
      `sharding.per_row`.

  Returns:
    [B, L, G, Q, C] in v's dtype. A query that may look nowhere gets a finite
    value of no meaning, and gives finite gradients.
  """
  kernel = spec.kernel if q.shape[1] == k.shape[1] else "plain"
  return KERNELS[kernel](q, k, v, seen, spec, kind, place)


def resolve(
  kernel: str,
  platform: str,
  *,
  head_size: int,
  dtype: Any,
  softcap: float = 0.0,
  length: int | None = None,
) -> str:
  """The key of KERNELS that `kernel` means on a platform.

  "auto" is splash on a TPU for rows of 256 slots and more (shorter ones fit
  less than a block); on a GPU it is cuDNN's flash attention where that can
  run on any card: 16-bit, no soft cap, heads of at most 128. On a CPU it is
  tiles, which is plain but for packed tokens. All else is plain.

  Args:
    kernel: "auto" or a key of KERNELS.
    platform: as from `sharding.platform`.
    head_size, dtype: of q, k and v.
    softcap: as of `Attention`.
    length: of the longest row; None: long.

  Raises:
    ConfigError: an unknown kernel, or one that cannot run here.
  """
  short, eights = jnp.dtype(dtype).itemsize == 2, head_size % 8 == 0
  if kernel == "auto":
    if platform == "tpu" and (length is None or length >= 256):
      return "splash"
    if platform in GPU and short and not softcap and eights:
      return "cudnn" if head_size <= 128 else "plain"
    return "tiles" if platform == "cpu" else "plain"
  problem = ""
  if kernel not in KERNELS:
    problem = f"is unknown; known: auto, {', '.join(KERNELS)}"
  elif kernel == "splash" and platform != "tpu":
    problem = f"runs on a TPU, found {platform}"
  elif kernel == "cudnn" and platform not in GPU:
    problem = f"runs on an NVIDIA GPU, found {platform}"
  elif kernel == "cudnn" and softcap:
    problem = f"has no soft cap, the model's is {softcap}"
  elif kernel == "cudnn" and not short:
    problem = f"wants bfloat16, model.dtype is {jnp.dtype(dtype)}"
  elif kernel == "cudnn" and (head_size > 256 or not eights):
    problem = (
      "wants heads of a multiple of 8, at most 256 (128 before "
      f"Hopper), the model's are {head_size}"
    )
  if problem:
    raise ConfigError(
      f"model.attention={kernel!r} {problem}; set "
      "model.attention to auto or plain"
    )
  return kernel
