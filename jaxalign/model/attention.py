"""Attention by platform: fused kernels on TPU and GPU, plain elsewhere.

All kernels answer the same question: softmax(cap(scale q.k)) v over the keys
that `Seen` lets a query look at. `plain` holds the [L, S] scores and follows
`Seen` to the letter. The fused kernels hold no scores, and know a mask by slot
numbers alone: they require that within a segment the slots lie side by side
and positions rise by one per slot, and that a slot that holds nothing has a
segment of its own (padding on the right needs none: causality hides it).

Within 2e-5 of each other in float32, within 2e-2 in bfloat16 (of values of
size one): the sums run in another order, and round to bfloat16 at other places,
splash among them `scale q`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import sharding
from jaxalign.errors import ConfigError
from jaxalign.model.wide import wide

FAR = 2**30  # the position of a slot that holds nothing; no window is as long
GPU = ("gpu", "cuda")  # JAX says gpu; lowering for one says cuda


class Seen(NamedTuple):
  """What each query may look at: keys at or before it, in its segment."""

  q_position: jax.Array  # [B or 1, L] int32
  k_position: jax.Array  # [B or 1, S] int32; a slot that holds nothing: FAR
  q_segment: jax.Array | None = None  # [B, L] int32; None: one segment
  k_segment: jax.Array | None = None  # [B, S] int32


def mask(seen: Seen, window: int | jax.Array = 0) -> jax.Array:
  """[B or 1, L, S] bool, true where a query may look.

  Args:
    seen: positions and segments.
    window: keys in reach, the query's own among them; the int 0: all.
  """
  distance = seen.q_position[:, :, None] - seen.k_position[:, None, :]
  ok = distance >= 0
  if not isinstance(window, int) or window:
    ok &= distance < window
  if seen.q_segment is not None:
    ok &= seen.q_segment[:, :, None] == seen.k_segment[:, None, :]
  return ok


def _plain(q, k, v, seen, *, scale, softcap, windows, which, place):
  del place  # any: einsum finds its shardings
  if which is None:
    (window,) = windows
  else:
    window = jax.lax.dynamic_index_in_dim(
      jnp.asarray([w or FAR for w in windows]), which, keepdims=False
    )
  scores = scale * jnp.einsum(
    "blgqc,bsgc->bgqls", q, k, preferred_element_type=wide(q)
  )
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  # A finite floor: a padding query that may look nowhere stays finite.
  scores = jnp.where(mask(seen, window)[:, None, None], scores, -1e30)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bgqls,bsgc->blgqc", weights, v)


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


def _splash(q, k, v, segments, *, scale, softcap, window):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  rows, length, groups, per_group, size = q.shape
  padded, block = blocks(length)
  shape = (padded, padded)
  # What is padded comes after all else, so no query sees it; a padded query
  # sees itself, so it is finite.
  extra = padded - length
  causal = (
    splash.LocalMask(shape, (window - 1, 0), 0)
    if window
    else splash.CausalMask(shape)
  )
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([causal] * (groups * per_group)),
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap or None,
    interpret=sharding.platform() != "tpu",
  )

  def by_head(x):
    x = jnp.swapaxes(x.reshape(rows, length, -1, size), 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0)))

  if segments is not None:
    segments = splash.SegmentIds(
      *(jnp.pad(s, ((0, 0), (0, extra))) for s in segments)
    )
  q = (scale * q.astype(jnp.float32)).astype(q.dtype)
  y = jax.vmap(kernel)(by_head(q), by_head(k), by_head(v), segments)
  y = jnp.swapaxes(y[:, :, :length], 1, 2)
  return y.reshape(rows, length, groups, per_group, size)


def _cudnn(
  q, k, v, segments, *, scale, softcap, window, implementation="cudnn"
):
  if softcap:
    raise ConfigError(
      f"cuDNN's attention has no soft cap, found {softcap}; "
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
    scale=scale,
    is_causal=True,
    local_window_size=reach,
    implementation=implementation,
  )
  return y.reshape(rows, length, groups, per_group, size)


def _on_shards(kernel, q, k, v, seen, *, scale, softcap, windows, which, place):
  """A fused kernel on each device's own rows and heads."""
  length = q.shape[1]
  # A window as long as the row is none; kinds that agree need no switch.
  reach = [w if w < length else 0 for w in windows]
  kinds = sorted(set(reach))
  args, axes = (
    [q, k, v],
    [
      ("batch", None, "heads", None, None),
      ("batch", None, "heads", None),
      ("batch", None, "heads", None),
    ],
  )
  if seen.q_segment is not None:
    args += [seen.q_segment, seen.k_segment]
    axes += [("batch", None)] * 2
  if len(kinds) > 1:
    args.append(
      jax.lax.dynamic_index_in_dim(
        jnp.asarray([kinds.index(w) for w in reach]), which, keepdims=False
      )
    )
    axes.append(())
  branches = [
    functools.partial(kernel, scale=scale, softcap=softcap, window=w)
    for w in kinds
  ]

  def local(q, k, v, *rest):
    segments = rest[:2] if seen.q_segment is not None else None
    if len(kinds) == 1:
      return branches[0](q, k, v, segments)
    return jax.lax.switch(rest[-1], branches, q, k, v, segments)

  return place.local(local, axes, axes[0])(*args)


KERNELS = {
  "plain": _plain,
  "tiles": _plain,  # of packed tokens `tiles.attend`
  "splash": functools.partial(_on_shards, _splash),
  "cudnn": functools.partial(_on_shards, _cudnn),
}


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  seen: Seen,
  *,
  kernel: str,
  scale: float,
  softcap: float = 0.0,
  windows: tuple[int, ...] = (0,),
  which: jax.Array | None = None,
  place: Any,
) -> jax.Array:
  """Grouped-query attention with a float32 softmax.

  Args:
    q: [B, L, G, Q, C].
    k: [B, S, G, C].
    v: [B, S, G, C].
    seen: what each query may look at.
    kernel: a key of KERNELS, as from `resolve`; the module's docstring says
      what the fused ones require of `seen`. Where S is not L, a cache is
      read, and plain is used. Off a TPU splash is interpreted: for tests.
    scale: multiplies q.k.
    softcap: 0, or scores become softcap * tanh(scores / softcap).
    windows: of each kind of layer, how many keys a query reaches, its own
      among them; 0 is all.
    which: the kind of this layer, a scalar int32; None where there is one.
    place: `sharding.SPREAD` under jit on the mesh, `sharding.PER_ROW` inside
      `sharding.per_row`.

  Returns:
    [B, L, G, Q, C] in v's dtype. A query that may look nowhere gets a finite
    value of no meaning, and gives finite gradients.
  """
  if q.shape[1] != k.shape[1]:
    kernel = "plain"
  return KERNELS[kernel](
    q,
    k,
    v,
    seen,
    scale=scale,
    softcap=softcap,
    windows=windows,
    which=which,
    place=place,
  )


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
  tiles, which is plain but for packed tokens. All else is plain. A named kernel
  is taken at its word if the platform has it.

  Args:
    kernel: "auto" or a key of KERNELS.
    platform: as from `sharding.platform`.
    head_size: C.
    dtype: of q, k and v.
    softcap: as of `attend`.
    length: of the longest row; None: long.

  Raises:
    ConfigError: an unknown kernel, or one that cannot run here.
  """
  bits = jnp.dtype(dtype).itemsize * 8
  if kernel == "auto":
    if platform == "tpu" and (length is None or length >= 256):
      return "splash"
    if (
      platform in GPU
      and bits == 16
      and not softcap
      and head_size <= 128
      and head_size % 8 == 0
    ):
      return "cudnn"
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
  elif kernel == "cudnn" and bits != 16:
    problem = f"wants bfloat16, model.dtype is {jnp.dtype(dtype)}"
  elif kernel == "cudnn" and (head_size > 256 or head_size % 8):
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
