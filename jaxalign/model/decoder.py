"""A decoder as plain functions over one table of parameters.

One forward pass serves every family: `ModelConfig` says which norms, biases,
windows and caps a family has, `families.py` reads them from config.json.
Layers are stacked on a leading axis and scanned; the weights of one layer are
gathered inside the scan, so at most one whole layer is on a device at a time.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding
from jaxalign.errors import ConfigError
from jaxalign.model import adapters, attention, unshared
from jaxalign.model import rope as ropes_lib
from jaxalign.model import table as table_lib
from jaxalign.model.rope import Rope
from jaxalign.model.table import Param, Params
from jaxalign.model.wide import wide


class ModelConfig(NamedTuple):
  """Sizes and constants of one decoder; the defaults are a Llama's."""

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
  attention: str = "plain"  # a key of attention.KERNELS
  positions: int = 0  # that the model was made for; 0: context
  family: str = "llama"  # a key of families.FAMILIES
  norm: str = "rms"  # a key of NORMS
  act: str = "silu"  # a key of ACTS
  gated: bool = True  # act(gate) * up, else act(up)
  qkv_bias: bool = False
  out_bias: bool = False  # of attention's output
  ff_bias: bool = False
  qk_norm: bool = False  # queries and keys are normed, head by head
  post_norms: bool = False  # attention and feed-forward are normed after, too
  parallel: bool = False  # both read the layer's input
  rotary: float = 1.0  # share of a head's dimensions that are rotated
  kinds: tuple[int, ...] = ()  # of each layer: which window and rope; (): 0
  windows: tuple[int, ...] = (0,)  # keys a query sees, by kind; 0: all before
  ropes: tuple[Rope, ...] = ()  # by kind; (): one default with rope_theta
  query_scale: float = 0.0  # of q.k; 0: head_size ** -0.5
  softcap: float = 0.0  # cap * tanh(q.k / cap); 0: none
  final_softcap: float = 0.0  # the same, of the logits
  embed_scale: float = 1.0  # of the embedding, rounded to `dtype`
  lora: adapters.Lora | None = None  # low-rank adapters beside the weights


DTYPES = ("float32", "bfloat16")
REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ACTS = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
}
NORMS = ("rms", "rms_offset", "layer")  # scale w; scale 1 + w; LayerNorm


def table(m: ModelConfig) -> dict[str, Param]:
  """Name -> shape, logical axes and initial scale of every parameter."""
  t, d, g, q = m.layers, m.width, m.kv_heads, m.heads // m.kv_heads
  c, f, v = m.head_size, m.ff, m.vocab
  inner = 0.02 / np.sqrt(2 * t)  # residual outputs, as in GPT-2
  rows = {}

  def norm(name, *shape):
    axes = (None,) * len(shape)
    rows[name] = Param(shape, axes, 0, float(m.norm != "rms_offset"))
    if m.norm == "layer":
      rows[f"{name}_bias"] = Param(shape, axes, 0, 0.0)

  def bias(name, *sizes_and_axes):
    shape, axes = zip(*sizes_and_axes)
    rows[f"layers/{name}"] = Param((t, *shape), (None, *axes), 0, 0.0)

  rows["embed"] = Param((v, d), ("vocab", "width"), 0.02)
  norm("layers/attention_norm", t, d)
  rows |= {
    "layers/wq": Param(
      (t, d, g, q, c), (None, "width", "heads", None, None), 0.02
    ),
    "layers/wk": Param((t, d, g, c), (None, "width", "heads", None), 0.02),
    "layers/wv": Param((t, d, g, c), (None, "width", "heads", None), 0.02),
    "layers/wo": Param(
      (t, g, q, c, d), (None, "heads", None, None, "width"), inner
    ),
  }
  norm("layers/ff_norm", t, d)
  if m.gated:
    rows["layers/w_gate"] = Param((t, d, f), (None, "width", "ff"), 0.02)
  rows["layers/w_up"] = Param((t, d, f), (None, "width", "ff"), 0.02)
  rows["layers/w_down"] = Param((t, f, d), (None, "ff", "width"), inner)
  if m.qkv_bias:
    bias("bq", (g, "heads"), (q, None), (c, None))
    bias("bk", (g, "heads"), (c, None))
    bias("bv", (g, "heads"), (c, None))
  if m.out_bias:
    bias("bo", (d, None))
  if m.ff_bias:
    if m.gated:
      bias("b_gate", (f, "ff"))
    bias("b_up", (f, "ff"))
    bias("b_down", (d, None))
  if m.qk_norm:
    norm("layers/q_norm", t, c)
    norm("layers/k_norm", t, c)
  if m.post_norms:
    norm("layers/attention_post_norm", t, d)
    norm("layers/ff_post_norm", t, d)
  norm("norm", d)
  if not m.tied:
    rows["head"] = Param((v, d), ("vocab", "width"), 0.02)
  if m.lora:
    rows |= adapters.rows(m.lora, rows)
  return rows


def parameter_count(m: ModelConfig) -> int:
  """Number of parameters."""
  return table_lib.count(table(m))


def check(m: ModelConfig, mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError where a size does not fit the model or the mesh."""
  for name in (
    "layers",
    "width",
    "heads",
    "kv_heads",
    "head_size",
    "ff",
    "vocab",
    "context",
  ):
    if getattr(m, name) < 1:
      raise ConfigError(f"model.{name}={getattr(m, name)}, wanted 1 or more")
  for name, known in (
    ("dtype", DTYPES),
    ("remat", REMAT),
    ("act", ACTS),
    ("norm", NORMS),
    ("attention", attention.KERNELS),
  ):
    if getattr(m, name) not in known:
      raise ConfigError(
        f"model.{name}={getattr(m, name)!r} is unknown; known: "
        f"{', '.join(known)}"
      )
  if m.heads % m.kv_heads:
    raise ConfigError(
      f"model.heads={m.heads} is no multiple of model.kv_heads={m.kv_heads}"
    )
  if m.width % m.heads and m.family in (
    "llama",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
  ):
    raise ConfigError(
      f"model.width={m.width} is no multiple of "  # so says
      f"model.heads={m.heads}"
    )  # transformers of an export
  if rotated(m) % 2 or not rotated(m):
    raise ConfigError(
      f"model.head_size={m.head_size} has {rotated(m)} rotated "
      "dimensions, wanted an even number (rotary pairs)"
    )
  for rope in ropes(m):
    ropes_lib.check(rope)
  if m.lora:
    adapters.check(m.lora, table(m._replace(lora=None)))
  if m.kinds and (
    len(m.kinds) != m.layers or not set(m.kinds) <= set(range(len(m.windows)))
  ):
    raise ConfigError(
      f"model.kinds={m.kinds} wants one of {len(m.windows)} "
      f"kinds for each of {m.layers} layers"
    )
  table_lib.check(table(m), mesh)


def init(key: jax.Array, m: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
  """Draws the parameters in float32, each straight onto its shards."""
  return table_lib.init(key, table(m), mesh)


def abstract(m: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
  """Shapes and shardings of the parameters, for restore and compile."""
  return table_lib.abstract(table(m), mesh)


def by_row(mesh: jax.sharding.Mesh, m: ModelConfig, fn):
  """Jits `fn(params, rows, shared) -> rows`, whole rows to each device."""
  axes = {n: p.axes for n, p in table(m).items()}
  return jax.jit(sharding.per_row(mesh, fn, axes))


def rotated(m: ModelConfig) -> int:
  """How many dimensions of a head are rotated."""
  return int(m.head_size * m.rotary)


def ropes(m: ModelConfig) -> tuple[Rope, ...]:
  """The rotary embedding of every kind of layer, or one for all."""
  return m.ropes or (Rope(m.rope_theta),)


def normed(
  x: jax.Array, params: Mapping[str, jax.Array], name: str, m: ModelConfig
) -> jax.Array:
  """x over its root mean square (or standardised), scaled, in float32."""
  y = x.astype(wide(x))
  shape = (1,) * (x.ndim - 1) + params[name].shape
  scale = params[name].reshape(shape).astype(y.dtype)
  if m.norm == "layer":
    y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + m.norm_eps)
  y = y * (1.0 + scale if m.norm == "rms_offset" else scale)
  if m.norm == "layer":
    y = y + params[f"{name}_bias"].reshape(shape).astype(y.dtype)
  return y.astype(x.dtype)


class Rows(NamedTuple):
  """What every layer needs to know of the rows."""

  cos: jax.Array  # [kinds or 1, B or 1, L, rotated / 2] float32
  sin: jax.Array
  seen: attention.Seen
  copies: unshared.Copies | None = None  # of packed tokens


def rows_of(m: ModelConfig, seen: attention.Seen) -> Rows:
  """The rotary tables at the queries' positions, beside who sees whom."""
  tables = [ropes_lib.angles(r, rotated(m), seen.q_position) for r in ropes(m)]
  cos, sin = (jnp.stack(each) for each in zip(*tables))
  return Rows(cos, sin, seen)


def precision(m: ModelConfig) -> jax.lax.Precision | None:
  """float32 is meant: a TPU would multiply it in bfloat16 unless told."""
  return jax.lax.Precision.HIGHEST if m.dtype == "float32" else None


def compiler_options(m: ModelConfig) -> tuple[tuple[str, bool], ...]:
  """How programs of a model are compiled, the items of a dict.

  Where products are narrower than float32 XLA may leave out roundings, and
  leaves out others in a forward pass alone than in one with its gradient; told
  not to, both have the same bits.
  """
  if m.dtype == "float32":
    return ()
  return (("xla_allow_excess_precision", False),)


def block(
  x,
  layer: Mapping[str, jax.Array],
  kind,
  rows: Rows,
  m: ModelConfig,
  place,
  cache=None,
  at=None,
):
  """One layer: attention and feed-forward, each normed and residual.

  Args:
    x: [B, L, D] activations.
    layer: the layer's weights, still sharded by the axis rules.
    kind: None, or int32 scalar: which window and rope the layer has.
    rows: positions and masks, as from `rows_of`.
    m: the model's sizes.
    place: a `sharding.Place`: how weights are gathered, where sums land.
    cache: None, or (keys, values) each [B, S, G, C], to write at `at`.
    at: the first cache slot that this call fills.

  Returns:
    x [B, L, D], and the (keys, values) that were attended to.
  """
  axes = table(m)
  dtype = jnp.dtype(m.dtype)
  summed = place.spec("batch", None, None)

  def weight(name):
    full = f"layers/{name}"
    return place.weight(layer[full], axes[full].axes[1:]).astype(dtype)

  def project(y, name, equation, bias=None, out=None):
    """y x the weight, its adapter and its bias where it has them."""
    x = y
    y = jnp.einsum(
      equation, x, weight(name), out_sharding=out, precision=precision(m)
    )
    if f"layers/{name}:a" in layer:
      a, b = weight(f"{name}:a"), weight(f"{name}:b")
      r = weight(f"{name}:r") if f"layers/{name}:r" in layer else None
      y = y + adapters.apply(
        x,
        equation,
        adapters.scale(m.lora),
        a,
        r,
        b,
        out_sharding=out,
        precision=precision(m),
      )
    if bias is not None and f"layers/{bias}" in layer:
      full = f"layers/{bias}"
      b = place.bias(layer[full], axes[full].axes[1:])
      y = y + b.astype(dtype)[None, None]
    return y

  turn = 0 if kind is None or len(rows.cos) == 1 else kind
  cos, sin = rows.cos[turn], rows.sin[turn]
  y = normed(x, layer, "layers/attention_norm", m)
  q = project(y, "wq", "bld,dgqc->blgqc", "bq")
  k = project(y, "wk", "bld,dgc->blgc", "bk")
  v = project(y, "wv", "bld,dgc->blgc", "bv")
  if m.qk_norm:
    q = normed(q, layer, "layers/q_norm", m)
    k = normed(k, layer, "layers/k_norm", m)
  q = ropes_lib.rotate(q, cos, sin)
  k = ropes_lib.rotate(k, cos, sin)
  if cache is not None:
    k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, at, axis=1)
    v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, at, axis=1)
  how = dict(
    scale=m.query_scale or m.head_size**-0.5,
    softcap=m.softcap,
    windows=m.windows,
    which=kind,
    place=place,
    kernel="plain" if cache is not None else m.attention,
  )
  if rows.copies is None:
    y = attention.attend(q, k, v, rows.seen, **how)
  else:
    y = unshared.attend(q, k, v, rows.copies, **how)
  y = project(y, "wo", "blgqc,gqcd->bld", "bo", out=summed)
  if m.post_norms:
    y = normed(y, layer, "layers/attention_post_norm", m)
  before, x = x, x + y
  y = normed(before if m.parallel else x, layer, "layers/ff_norm", m)
  up = project(y, "w_up", "bld,df->blf", "b_up")
  if m.gated:
    up = ACTS[m.act](project(y, "w_gate", "bld,df->blf", "b_gate")) * up
  else:
    up = ACTS[m.act](up)
  y = project(up, "w_down", "blf,fd->bld", "b_down", out=summed)
  if m.post_norms:
    y = normed(y, layer, "layers/ff_post_norm", m)
  return x + y, (k, v)


def embed_tokens(
  params: Params, tokens: jax.Array, m: ModelConfig, place
) -> jax.Array:
  """Token ids [B, L] -> activations [B, L, D]."""
  weight = place.weight(params["embed"], ("vocab", "width"))
  x = place.lookup(weight, tokens).astype(m.dtype)
  if m.embed_scale != 1.0:  # Gemma rounds the factor, too
    x = x * jnp.asarray(m.embed_scale, x.dtype)
  return x


def layers_of(params: Params) -> Params:
  """The stacked parameters alone, as the scan takes them."""
  return {n: w for n, w in params.items() if n.startswith("layers/")}


def kinds_of(m: ModelConfig) -> jax.Array | None:
  """[T] int32, the kind of every layer, where there are several."""
  if len(m.windows) == 1:
    return None
  return jnp.asarray(m.kinds or (0,) * m.layers, jnp.int32)


def forward(
  params: Params,
  tokens: jax.Array,
  m: ModelConfig,
  place=sharding.SPREAD,
  seen: attention.Seen | None = None,
  copies: unshared.Unshared | None = None,
) -> jax.Array:
  """Hidden states after the final norm.

  Args:
    params: as in `table`.
    tokens: [B, L] ids, padded on the right (causality hides the padding)
      unless `seen` says otherwise.
    m: the model's sizes.
    place: `sharding.SPREAD` under jit on the mesh, `sharding.PER_ROW` inside
      `sharding.per_row`.
    seen: positions and segments; None: one row's tokens count up from 0.
    copies: None, or where attention finds the rows of packed tokens; then of
      `seen` the positions alone are read.

  Returns:
    [B, L, D] in `m.dtype`.
  """
  if seen is None:
    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    seen = attention.Seen(position, position)
  rows = rows_of(m, seen)
  if copies is not None:
    rows = rows._replace(copies=unshared.lay(copies, seen.q_position, place))

  def body(x, layer):
    return block(x, layer[0], layer[1], rows, m, place)[0], None

  if m.remat != "none":
    body = jax.checkpoint(body, policy=REMAT[m.remat], prevent_cse=False)
  x = embed_tokens(params, tokens, m, place)
  x, _ = jax.lax.scan(body, x, (layers_of(params), kinds_of(m)))
  return normed(x, params, "norm", m)


def forward_at(
  params: Params,
  tokens: jax.Array,
  m: ModelConfig,
  layers: int,
  place=sharding.SPREAD,
) -> tuple[jax.Array, jax.Array]:
  """`forward`, and beside it that of the model cut after `layers` layers.

  Args:
    params, tokens, m, place: as of `forward`.
    layers: at most `m.layers`; 0 or all: both are the same.

  Returns:
    Two [B, L, D] in `m.dtype`, each after the final norm.
  """
  if layers in (0, m.layers):
    x = forward(params, tokens, m, place)
    return x, x
  position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
  rows = rows_of(m, attention.Seen(position, position))

  def body(carry, layer):
    x, early = carry
    x = block(x, layer[0], layer[1], rows, m, place)[0]
    # Carried along: two scans would copy the stacked weights they share.
    return (x, jnp.where(layer[2] == layers, x, early)), None

  x = embed_tokens(params, tokens, m, place)
  (x, early), _ = jax.lax.scan(
    body, (x, x), (layers_of(params), kinds_of(m), jnp.arange(1, m.layers + 1))
  )
  return normed(x, params, "norm", m), normed(early, params, "norm", m)


def head(params: Params, m: ModelConfig, place=sharding.SPREAD) -> jax.Array:
  """The output matrix [V, D], gathered over the width, still float32."""
  name = "embed" if m.tied else "head"
  return place.weight(params[name], ("vocab", "width"))


def logits(x: jax.Array, weight: jax.Array, softcap: float = 0.0) -> jax.Array:
  """[B, L, D] x [V, D] -> float32 [B, L, V], accumulated in float32.

  The cast of `weight` stands here, inside a loop over chunks, so that the
  loop sums the chunks' gradients in float32.

  Args:
    x: hidden states after the final norm.
    weight: as from `head`; or [parts, V / parts, D], then [B, L, parts,
      V / parts] comes back.
    softcap: `ModelConfig.final_softcap`.
  """
  exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  y = jnp.einsum(
    "bld,...d->bl...",
    x,
    weight.astype(x.dtype),
    preferred_element_type=wide(x),
    precision=exact,
  )
  return softcap * jnp.tanh(y / softcap) if softcap else y


def per_token(m: ModelConfig) -> int:
  """Multiply-adds x 2 of one token in one layer, attention apart."""
  d, h, g, c, f = m.width, m.heads, m.kv_heads, m.head_size, m.ff
  return 2 * (d * h * c * 2 + d * g * c * 2 + (2 + m.gated) * d * f)


def flops(
  m: ModelConfig,
  length: int,
  logit_rows: int | None = None,
  passes: tuple[int, int] = (1, 1),
) -> int:
  """Multiply-adds x 2 over one row of `length` tokens, of a forward pass.

  Of several passes by `passes`: of products with weights, and of attention's.

  The embedding lookup costs nothing; attention is counted as computed (the
  full square); the head only on `logit_rows` positions (all by default).
  """
  square = 2 * 2 * m.heads * m.head_size * length * length
  rows = length if logit_rows is None else logit_rows
  weights, squares = passes
  return (
    m.layers * (weights * per_token(m) * length + squares * square)
    + weights * 2 * m.width * m.vocab * rows
  )


def useful(
  m: ModelConfig,
  prompt: np.ndarray,
  answers: np.ndarray,
  passes: tuple[int, int] = (1, 1),
) -> int:
  """Multiply-adds x 2 that passes over rows cannot do without.

  Every prompt token once, a query and key only where one sees the other (a
  window's queries see no further back), the head on what predicts a response
  token; no padding, no embedding lookup.

  Args:
    m: the model's sizes.
    prompt: [n] int, tokens of each prompt.
    answers: [n, R] int, tokens of each response to it.
    passes: how many, of products with weights and of attention's.
  """
  p, a = np.int64(prompt), np.int64(answers)
  tokens, said = int(p.sum() + a.sum()), int(a.sum())

  def seen(n, window):
    """Pairs among the first n tokens: the sum of min(i + 1, window)."""
    k = np.minimum(n, window or n)
    return k * (k + 1) // 2 + (n - k) * k

  pairs = 0
  for kind in m.kinds or (0,) * m.layers:
    before = seen(p, m.windows[kind])
    after = seen(p[:, None] + a, m.windows[kind])
    pairs += int(before.sum() + (after - before[:, None]).sum())
  weights, squares = passes
  return (
    m.layers * weights * per_token(m) * tokens
    + squares * 2 * 2 * m.heads * m.head_size * pairs
    + weights * 2 * m.width * m.vocab * said
  )
