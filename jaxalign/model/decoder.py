"""A Llama decoder as plain functions over one table of parameters.

Init, shardings, restore and export all map over `table`. Layers are stacked
on a leading axis and scanned; the weights of one layer are gathered inside
the scan, so at most one whole layer is on a device at a time.
"""

from typing import Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding
from jaxalign.errors import ConfigError

Params = dict[str, jax.Array]


class ModelConfig(NamedTuple):
  """Sizes and constants of one decoder."""

  layers: int  # T
  width: int  # D
  heads: int  # H
  kv_heads: int  # G, a divisor of H
  head_size: int  # C
  ff: int  # F
  vocab: int  # V
  context: int  # longest row, in tokens
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  tied: bool = True  # the head is the embedding, transposed
  dtype: str = "float32"  # of the matrix products; sums are float32
  remat: str = "none"  # a key of REMAT


class Param(NamedTuple):
  """One row of the parameter table."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]  # logical axes, see sharding.RULES
  scale: float  # standard deviation of the initial normal draw; 0: ones


DTYPES = ("float32", "bfloat16")
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def table(m: ModelConfig) -> dict[str, Param]:
  """Name -> shape, logical axes and initial scale of every parameter."""
  t, d, g, q = m.layers, m.width, m.kv_heads, m.heads // m.kv_heads
  c, f, v = m.head_size, m.ff, m.vocab
  inner = 0.02 / np.sqrt(2 * t)  # residual outputs, as in GPT-2
  rows = {
      "embed": Param((v, d), ("vocab", "width"), 0.02),
      "layers/attention_norm": Param((t, d), (None, None), 0),
      "layers/wq": Param((t, d, g, q, c), (None, "width", "heads", None, None),
                         0.02),
      "layers/wk": Param((t, d, g, c), (None, "width", "heads", None), 0.02),
      "layers/wv": Param((t, d, g, c), (None, "width", "heads", None), 0.02),
      "layers/wo": Param((t, g, q, c, d), (None, "heads", None, None, "width"),
                         inner),
      "layers/ff_norm": Param((t, d), (None, None), 0),
      "layers/w_gate": Param((t, d, f), (None, "width", "ff"), 0.02),
      "layers/w_up": Param((t, d, f), (None, "width", "ff"), 0.02),
      "layers/w_down": Param((t, f, d), (None, "ff", "width"), inner),
      "norm": Param((d,), (None,), 0),
  }
  if not m.tied:
    rows["head"] = Param((v, d), ("vocab", "width"), 0.02)
  return rows


def parameter_count(m: ModelConfig) -> int:
  """Number of parameters."""
  return sum(int(np.prod(p.shape)) for p in table(m).values())


def check(m: ModelConfig, mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError where a size does not fit the model or the mesh."""
  for name in ("layers", "width", "heads", "kv_heads", "head_size", "ff",
               "vocab", "context"):
    if getattr(m, name) < 1:
      raise ConfigError(f"model.{name}={getattr(m, name)}, wanted 1 or more")
  if m.dtype not in DTYPES:
    raise ConfigError(f"model.dtype={m.dtype!r} is unknown; known: "
                      f"{', '.join(DTYPES)}")
  if m.heads % m.kv_heads:
    raise ConfigError(f"model.heads={m.heads} is no multiple of "
                      f"model.kv_heads={m.kv_heads}")
  if m.width % m.heads:  # transformers refuses such an export
    raise ConfigError(f"model.width={m.width} is no multiple of "
                      f"model.heads={m.heads}")
  if m.head_size % 2:
    raise ConfigError(f"model.head_size={m.head_size} is odd, wanted even "
                      "(rotary pairs)")
  if m.remat not in REMAT:
    raise ConfigError(f"model.remat={m.remat!r} is unknown; known: "
                      f"{', '.join(REMAT)}")
  for name, p in table(m).items():
    for size, axis in zip(p.shape, p.axes):
      parts = sharding.parts(mesh, axis)
      if size % parts:
        raise ConfigError(
            f"{name}: its axis {axis!r} of {size} does not divide into "
            f"{parts} parts; change the model's size or config.mesh")


def init(key: jax.Array, m: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
  """Draws the parameters in float32, each straight onto its shards."""
  rows = table(m)
  out = {name: sharding.named(mesh, *p.axes) for name, p in rows.items()}

  def draw(key):
    keys = jax.random.split(key, len(rows))
    return {
        name: (jnp.ones(p.shape) if p.scale == 0 else
               p.scale * jax.random.normal(k, p.shape))
        for k, (name, p) in zip(keys, sorted(rows.items()))}

  # auto_axes: the draw has no operand whose sharding could be propagated.
  return jax.jit(jax.sharding.auto_axes(
      draw, out_sharding={n: s.spec for n, s in out.items()}))(key)


def abstract(m: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
  """Shapes and shardings of the parameters, for restore and compile."""
  return {name: jax.ShapeDtypeStruct(p.shape, jnp.float32,
                                     sharding=sharding.named(mesh, *p.axes))
          for name, p in table(m).items()}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * scale over the last axis, computed in float32."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  shape = (1,) * (x.ndim - 1) + scale.shape
  return (y * scale.reshape(shape).astype(jnp.float32)).astype(x.dtype)


def rope(positions: jax.Array, m: ModelConfig) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine [B, L, C/2] of the rotary angles, float32."""
  exponent = np.arange(0, m.head_size, 2, dtype=np.float32) / m.head_size
  frequency = jnp.asarray(1.0 / m.rope_theta ** exponent, jnp.float32)
  angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the two halves of the last axis (Hugging Face's convention).

  Args:
    x: [B, L, ..., C].
    cos: [B, L, C/2], as from `rope`.
    sin: the same shape.
  """
  extra = (None,) * (x.ndim - 3)
  cos = cos[(slice(None), slice(None)) + extra].astype(x.dtype)
  sin = sin[(slice(None), slice(None)) + extra].astype(x.dtype)
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q, k, v, mask) -> jax.Array:
  """Grouped-query attention with a float32 softmax.

  Args:
    q: [B, L, G, Q, C].
    k: [B, S, G, C].
    v: [B, S, G, C].
    mask: [B, L, S] bool, true where a query may look.

  Returns:
    [B, L, G, Q, C].
  """
  scores = jnp.einsum("blgqc,bsgc->bgqls", q, k,
                      preferred_element_type=jnp.float32)
  scores = scores * (q.shape[-1] ** -0.5)
  # A finite floor: a padding query that may look nowhere stays finite.
  scores = jnp.where(mask[:, None, None], scores, -1e30)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bgqls,bsgc->blgqc", weights, v)


def block(x, layer: Mapping[str, jax.Array], cos, sin, mask, m: ModelConfig,
          place, cache=None, at=None):
  """One layer: attention and feed-forward, each pre-normed and residual.

  Args:
    x: [B, L, D] activations.
    layer: the layer's weights, still sharded by the axis rules.
    cos: rotary table, with `sin`.
    sin: rotary table.
    mask: [B, L, S] bool.
    m: the model's sizes.
    place: a `sharding.Place`: how weights are gathered, where sums land.
    cache: None, or (keys, values) each [B, S, G, C], to write at `at`.
    at: the first cache slot that this call fills.

  Returns:
    x [B, L, D], and the (keys, values) that were attended to.
  """
  axes = table(m)
  dtype = jnp.dtype(m.dtype)

  def weight(name):
    full = f"layers/{name}"
    return place.weight(layer[full], axes[full].axes[1:]).astype(dtype)

  y = rms_norm(x, layer["layers/attention_norm"], m.norm_eps)
  q = rotate(jnp.einsum("bld,dgqc->blgqc", y, weight("wq")), cos, sin)
  k = rotate(jnp.einsum("bld,dgc->blgc", y, weight("wk")), cos, sin)
  v = jnp.einsum("bld,dgc->blgc", y, weight("wv"))
  if cache is not None:
    k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, at, axis=1)
    v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, at, axis=1)
  y = attention(q, k, v, mask)
  x = x + jnp.einsum("blgqc,gqcd->bld", y, weight("wo"),
                     out_sharding=place.spec("batch", None, None))
  y = rms_norm(x, layer["layers/ff_norm"], m.norm_eps)
  gate = jax.nn.silu(jnp.einsum("bld,df->blf", y, weight("w_gate")))
  y = gate * jnp.einsum("bld,df->blf", y, weight("w_up"))
  x = x + jnp.einsum("blf,fd->bld", y, weight("w_down"),
                     out_sharding=place.spec("batch", None, None))
  return x, (k, v)


def embed_tokens(params: Params, tokens: jax.Array, m: ModelConfig,
                 place) -> jax.Array:
  """Token ids [B, L] -> activations [B, L, D]."""
  weight = place.weight(params["embed"], ("vocab", "width"))
  return place.lookup(weight, tokens).astype(m.dtype)


def layers_of(params: Params) -> Params:
  """The stacked parameters alone, as the scan takes them."""
  return {n: w for n, w in params.items() if n.startswith("layers/")}


def forward(params: Params, tokens: jax.Array, m: ModelConfig,
            place=sharding.SPREAD) -> jax.Array:
  """Hidden states after the final norm.

  Args:
    params: as in `table`.
    tokens: [B, L] ids, padded on the right (causality hides the padding).
    m: the model's sizes.
    place: `sharding.SPREAD` under jit on the mesh, `sharding.PER_ROW` inside
      `sharding.per_row`.

  Returns:
    [B, L, D] in `m.dtype`.
  """
  length = tokens.shape[1]
  position = jnp.arange(length)
  cos, sin = rope(position[None, :], m)
  mask = (position[:, None] >= position[None, :])[None]

  def body(x, layer):
    return block(x, layer, cos, sin, mask, m, place)[0], None

  if m.remat != "none":
    body = jax.checkpoint(body, policy=REMAT[m.remat], prevent_cse=False)
  x = embed_tokens(params, tokens, m, place)
  x, _ = jax.lax.scan(body, x, layers_of(params))
  return rms_norm(x, params["norm"], m.norm_eps)


def head(params: Params, m: ModelConfig, place=sharding.SPREAD) -> jax.Array:
  """The output matrix [V, D], gathered over the width, still float32."""
  name = "embed" if m.tied else "head"
  return place.weight(params[name], ("vocab", "width"))


def logits(x: jax.Array, weight: jax.Array) -> jax.Array:
  """[B, L, D] x [V, D] -> float32 [B, L, V], accumulated in float32.

  The cast of `weight` stands here, inside a loop over chunks, so that the
  loop sums the chunks' gradients in float32.
  """
  return jnp.einsum("bld,vd->blv", x, weight.astype(x.dtype),
                    preferred_element_type=jnp.float32)


def operations(m: ModelConfig, length: int, logit_rows: int | None = None
               ) -> int:
  """Multiply-adds x 2 of one forward pass over one row of `length` tokens.

  The embedding lookup costs nothing; attention is counted as computed (the
  full square); the head only on `logit_rows` positions (all by default).
  """
  d, h, g, c, f = m.width, m.heads, m.kv_heads, m.head_size, m.ff
  per_token = 2 * (d * h * c * 2 + d * g * c * 2 + 3 * d * f)
  square = 2 * 2 * h * c * length * length
  rows = length if logit_rows is None else logit_rows
  return m.layers * (per_token * length + square) + 2 * d * m.vocab * rows
