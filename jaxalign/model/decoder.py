"""A decoder as plain functions over one table of parameters.

One forward pass serves every family: `ModelConfig` says which norms, biases,
windows and caps a family has, `families` reads them from config.json.
Layers are stacked on a leading axis and scanned; the weights of one layer are
gathered inside the scan, so at most one whole layer is on a device at a time.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core import sharding
from jaxalign.core.errors import ConfigError
from jaxalign.model import adapters, attention, parameters
from jaxalign.model.attention import Attention, Rope, Seen
from jaxalign.model.packed import attend_packed, Copies, PackedSeen, see_packed
from jaxalign.model.parameters import layers_of, Param, Params, wide


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
  rotary: float = 1.0  # fraction of a head's dimensions that are rotated
  kinds: tuple[int, ...] = ()  # of each layer: which window and rope; (): 0
  windows: tuple[int, ...] = (0,)  # keys a query sees, by kind; 0: all before
  ropes: tuple[Rope, ...] = ()  # by kind; (): one default with rope_theta
  query_scale: float = 0.0  # of q.k; 0: head_size ** -0.5
  softcap: float = 0.0  # cap * tanh(q.k / cap); 0: none
  final_softcap: float = 0.0  # the same, of the logits
  embed_scale: float = 1.0  # of the embedding, rounded to `dtype`
  lora: adapters.Lora | None = None  # low-rank adapters


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


# Letters of equations -> logical axes; others are never cut.
_AXES = dict(d="width", g="heads", f="ff")


def table(m: ModelConfig) -> dict[str, Param]:
  """Name -> shape, logical axes and initial scale of every parameter."""
  t, d, g, q = m.layers, m.width, m.kv_heads, m.heads // m.kv_heads
  size = dict(d=d, g=g, q=q, c=m.head_size, f=m.ff)
  inner = 0.02 / np.sqrt(2 * t)  # residual outputs, as in GPT-2
  rows = {}

  def norm(name, *shape):
    axes = (None,) * len(shape)
    rows[name] = Param(shape, axes, 0, float(m.norm != "rms_offset"))
    if m.norm == "layer":
      rows[f"{name}_bias"] = Param(shape, axes, 0, 0.0)

  def linear(name, into, out, biased, scale=0.02):
    shape = lambda letters: (t, *(size[i] for i in letters))
    axes = (None, *map(_AXES.get, into + out))
    rows[f"layers/w{name}"] = Param(shape(into + out), axes, scale)
    if biased:  # added to activations, which are never cut over the width
      axes = (None, *(_AXES.get(i) if i != "d" else None for i in out))
      rows[f"layers/b{name}"] = Param(shape(out), axes, 0, 0.0)

  rows["embed"] = Param((m.vocab, d), ("vocab", "width"), 0.02)
  norm("layers/attention_norm", t, d)
  linear("q", "d", "gqc", m.qkv_bias)
  linear("k", "d", "gc", m.qkv_bias)
  linear("v", "d", "gc", m.qkv_bias)
  linear("o", "gqc", "d", m.out_bias, inner)
  norm("layers/ff_norm", t, d)
  if m.gated:
    linear("_gate", "d", "f", m.ff_bias)
  linear("_up", "d", "f", m.ff_bias)
  linear("_down", "f", "d", m.ff_bias, inner)
  if m.qk_norm:
    norm("layers/q_norm", t, m.head_size)
    norm("layers/k_norm", t, m.head_size)
  if m.post_norms:
    norm("layers/attention_post_norm", t, d)
    norm("layers/ff_post_norm", t, d)
  norm("norm", d)
  if not m.tied:
    rows["head"] = rows["embed"]
  if m.lora:
    rows |= adapters.rows(m.lora, rows)
  return rows


def parameter_count(m: ModelConfig) -> int:
  """Number of parameters."""
  return parameters.count(table(m))


_SIZES = "layers width heads kv_heads head_size ff vocab context".split()
_CHOICES = dict(
  dtype=DTYPES, remat=REMAT, act=ACTS, norm=NORMS, attention=attention.KERNELS
)
# Families of which transformers refuses to load an export where it is not so.
_HEADS_DIVIDE_WIDTH = ("llama", "gemma2", "gemma3_text", "gpt_neox")


def _problems(m: ModelConfig) -> Iterator[str]:
  """Sizes and names that cannot work."""
  for name in _SIZES:
    if getattr(m, name) < 1:
      yield f"model.{name}={getattr(m, name)}, wanted 1 or more"
  for name, known in _CHOICES.items():
    if (value := getattr(m, name)) not in known:
      yield f"model.{name}={value!r} is unknown; known: {', '.join(known)}"
  if m.heads % m.kv_heads:
    yield f"model.heads={m.heads} is no multiple of model.kv_heads={m.kv_heads}"
  if m.width % m.heads and m.family in _HEADS_DIVIDE_WIDTH:
    yield f"model.width={m.width} is no multiple of model.heads={m.heads}"
  if rotated(m) % 2 or not rotated(m):
    yield (
      f"model.head_size={m.head_size} has {rotated(m)} rotated "
      "dimensions, wanted an even number (rotary pairs)"
    )
  known = set(range(len(m.windows)))
  if m.kinds and (len(m.kinds) != m.layers or not set(m.kinds) <= known):
    yield (
      f"model.kinds={m.kinds} wants one of {len(m.windows)} "
      f"kinds for each of {m.layers} layers"
    )


def check_model(m: ModelConfig, mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError where a size does not fit the model or the mesh."""
  for problem in _problems(m):
    raise ConfigError(problem)
  for rope in ropes(m):
    attention.check_rope(rope)
  if m.lora:
    adapters.check_lora(m.lora, table(m._replace(lora=None)))
  parameters.check_mesh(table(m), mesh)


def init(key: jax.Array, m: ModelConfig) -> Params:
  """Draws the parameters in float32, each straight onto its shards."""
  return parameters.init_params(key, table(m))


def abstract(m: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
  """Shapes and shardings of the parameters, for restore and compile."""
  return parameters.abstract_params(table(m), mesh)


def rotated(m: ModelConfig) -> int:
  """How many dimensions of a head are rotated."""
  return int(m.head_size * m.rotary)


def ropes(m: ModelConfig) -> tuple[Rope, ...]:
  """The rotary embedding of every kind of layer, or one for all."""
  return m.ropes or (Rope(m.rope_theta),)


def kinds_of(m: ModelConfig) -> jax.Array | None:
  """[T] int32, the kind of every layer, where there are several."""
  if len(m.windows) == 1:
    return None
  return jnp.asarray(m.kinds or (0,) * m.layers, jnp.int32)


def precision(m: ModelConfig) -> jax.lax.Precision | None:
  """float32 is meant: a TPU multiplies it in bfloat16 by default."""
  return jax.lax.Precision.HIGHEST if m.dtype == "float32" else None


def compiler_options(m: ModelConfig) -> tuple[tuple[str, bool], ...]:
  """How programs of a model are compiled, the items of a dict.

  Where products are narrower than float32 XLA may leave out roundings, and
  leaves out others in a forward pass alone than in one with its gradient;
  forbidden, both have the same bits.
  """
  if m.dtype == "float32":
    return ()
  return (("xla_allow_excess_precision", False),)


class Positions(NamedTuple):
  """Where the tokens of the rows stand, and who sees whom, for every layer."""

  cos: jax.Array  # [kinds or 1, B or 1, L, rotated / 2] float32
  sin: jax.Array
  seen: Seen
  packed: PackedSeen | None = None  # of packed tokens, instead of seen


def counted(tokens: jax.Array) -> Seen:
  """Rows [B, L] of one sequence each, from its first token on."""
  position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
  return Seen(position, position)


def positions_of(m: ModelConfig, seen: Seen) -> Positions:
  """The rotary tables at the queries' positions, and who sees whom."""
  tables = [attention.angles(r, rotated(m), seen.q_position) for r in ropes(m)]
  cos, sin = (jnp.stack(each) for each in zip(*tables))
  return Positions(cos, sin, seen)


def forward(
  params: Params,
  tokens: jax.Array,
  m: ModelConfig,
  place: sharding.Place = sharding.SPREAD,
  seen: Seen | None = None,
  copies: Copies | None = None,
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
  rows = positions_of(m, seen or counted(tokens))
  if copies is not None:
    seen = see_packed(copies, rows.seen.q_position, place)
    rows = rows._replace(packed=seen)

  def body(x, layer):
    weights, kind = layer
    return block(x, weights, kind, rows, m, place)[0], None

  if m.remat != "none":
    body = jax.checkpoint(body, policy=REMAT[m.remat], prevent_cse=False)
  x = embed_tokens(params, tokens, m, place)
  x, _ = jax.lax.scan(body, x, (layers_of(params), kinds_of(m)))
  return normed(x, params, "norm", m)


def embed_tokens(
  params: Params, tokens: jax.Array, m: ModelConfig, place
) -> jax.Array:
  """Token ids [B, L] -> activations [B, L, D]."""
  weight = place.weight(params["embed"], ("vocab", "width"))
  x = place.lookup(weight, tokens).astype(m.dtype)
  if m.embed_scale != 1.0:  # Gemma rounds the factor, too
    x = x * jnp.asarray(m.embed_scale, x.dtype)
  return x


def block(
  x: jax.Array,
  layer: Mapping[str, jax.Array],
  kind: jax.Array | None,
  rows: Positions,
  m: ModelConfig,
  place: sharding.Place,
  cache: tuple[jax.Array, jax.Array] | None = None,
  at: jax.Array | int = 0,
):
  """One layer: attention and feed-forward, each normed and residual.

  Args:
    x: [B, L, D] activations.
    layer: the layer's weights, still sharded by the axis rules.
    kind: None, or int32 scalar: which window and rope the layer has.
    rows: positions and masks, as from `positions_of`.
    m: the model's sizes.
    place: how weights are gathered, where sums land.
    cache: None, or (keys, values) each [B, S, G, C], to write at `at`.
    at: the first cache slot that this call fills.

  Returns:
    x [B, L, D], and the (keys, values) that were attended to.
  """
  summed = place.spec("batch", None, None)
  project = _projector(layer, m, place)

  y = normed(x, layer, "layers/attention_norm", m)
  q = project(y, "q", "bld,dgqc->blgqc")
  k = project(y, "k", "bld,dgc->blgc")
  v = project(y, "v", "bld,dgc->blgc")
  if m.qk_norm:
    q = normed(q, layer, "layers/q_norm", m)
    k = normed(k, layer, "layers/k_norm", m)
  turn = 0 if kind is None or len(rows.cos) == 1 else kind
  cos, sin = rows.cos[turn], rows.sin[turn]
  q = attention.rotate(q, cos, sin)
  k = attention.rotate(k, cos, sin)
  if cache is not None:
    k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, at, axis=1)
    v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, at, axis=1)
  scale = m.query_scale or m.head_size**-0.5
  kernel = "plain" if cache is not None else m.attention
  spec = Attention(kernel, scale, m.softcap, m.windows)
  if rows.packed is None:
    y = attention.attend(q, k, v, rows.seen, spec, kind, place)
  else:
    y = attend_packed(q, k, v, rows.packed, spec, kind, place)
  y = project(y, "o", "blgqc,gqcd->bld", summed)
  if m.post_norms:
    y = normed(y, layer, "layers/attention_post_norm", m)

  before, x = x, x + y
  y = normed(before if m.parallel else x, layer, "layers/ff_norm", m)
  up = project(y, "_up", "bld,df->blf")
  if m.gated:
    up = ACTS[m.act](project(y, "_gate", "bld,df->blf")) * up
  else:
    up = ACTS[m.act](up)
  y = project(up, "_down", "blf,fd->bld", summed)
  if m.post_norms:
    y = normed(y, layer, "layers/ff_post_norm", m)
  return x + y, (k, v)


def _projector(layer, m, place):
  """(x, weight, equation) -> x times it, its adapter and bias added."""
  axes, dtype = table(m), jnp.dtype(m.dtype)

  def ready(name, gather=place.weight):
    if name not in layer:
      return None
    return gather(layer[name], axes[name].axes[1:]).astype(dtype)

  def project(x, name, equation, out=None):
    weight = f"layers/w{name}"
    how = dict(out_sharding=out, precision=precision(m))
    y = jnp.einsum(equation, x, ready(weight), **how)
    if f"{weight}:a" in layer:
      a, b, r = (ready(f"{weight}:{side}") for side in "abr")
      factor = adapters.scale(m.lora)
      y = y + adapters.apply(x, equation, factor, a, r, b, **how)
    bias = ready(f"layers/b{name}", place.bias)
    return y if bias is None else y + bias[None, None]

  return project


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
  how = dict(preferred_element_type=wide(x), precision=exact)
  y = jnp.einsum("bld,...d->bl...", x, weight.astype(x.dtype), **how)
  return softcap * jnp.tanh(y / softcap) if softcap else y


def forward_at(
  params: Params,
  tokens: jax.Array,
  m: ModelConfig,
  layers: int,
  place: sharding.Place = sharding.SPREAD,
) -> tuple[jax.Array, jax.Array]:
  """`forward`, and that of the model cut after `layers` layers (0: all)."""
  if layers in (0, m.layers):
    x = forward(params, tokens, m, place)
    return x, x
  rows = positions_of(m, counted(tokens))

  def body(carry, layer):
    (x, early), (weights, kind, number) = carry, layer
    x = block(x, weights, kind, rows, m, place)[0]
    # Carried along: two scans would copy the stacked weights they share.
    return (x, jnp.where(number == layers, x, early)), None

  x = embed_tokens(params, tokens, m, place)
  numbers = jnp.arange(1, m.layers + 1)
  stack = layers_of(params), kinds_of(m), numbers
  (x, early), _ = jax.lax.scan(body, (x, x), stack)
  return normed(x, params, "norm", m), normed(early, params, "norm", m)
