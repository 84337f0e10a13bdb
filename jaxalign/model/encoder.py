"""A BERT encoder as plain functions over one table of parameters.

Covers BERT, MiniLM, BGE and E5 (`bert`) and multilingual E5 (`xlm-roberta`):
post-norm layers, learned positions, attention both ways. An encoder only
embeds here and is small, so it lies whole on every device: each device runs
its own rows and nothing is gathered.
"""

from collections.abc import Mapping
import json
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp

from jaxalign.core.errors import ConfigError, DataError
from jaxalign.core.hub import resolve_settings
from jaxalign.model.decoder import ACTS, DTYPES
from jaxalign.model.families import fields
from jaxalign.model.parameters import layers_of, Layout, Param, Params, Stored


class EncoderConfig(NamedTuple):
  """Sizes and constants of one encoder, and how its rows become vectors."""

  layers: int  # T
  width: int  # D, also of an embedding
  heads: int  # H, a divisor of D
  ff: int  # F
  vocab: int  # V
  positions: int  # rows of the position table
  context: int  # longest row, in tokens; longer texts are cut
  types: int = 2  # rows of the token type table
  offset: int = 0  # the first token's position
  norm_eps: float = 1e-12
  act: str = "gelu"  # a key of decoder.ACTS
  pooling: str = "mean"  # a key of POOLINGS
  normalize: bool = False  # embeddings of length one
  lower: bool = False  # texts are put in lower case before the tokenizer
  prompt: str = ""  # stands before every text
  dtype: str = "float32"  # of the matrix products; norms are float32


FAMILIES = ("bert", "roberta", "xlm-roberta")


def _mean(x, mask):
  return jnp.einsum(
    "bl,bld->bd", mask.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST
  ) / jnp.sum(mask, axis=1, keepdims=True)


def _last(x, mask):
  # One row has one last token; rows are padded on the right.
  end = jnp.sum(mask, axis=1) - 1
  return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]


def _max(x, mask):
  return jnp.max(jnp.where(mask[:, :, None], x, -jnp.inf), axis=1)


# (hidden states [B, L, D] float32, mask [B, L] bool) -> [B, D]
POOLINGS = {
  "mean": _mean,
  "cls": lambda x, mask: x[:, 0],
  "last": _last,
  "max": _max,
}


def encoder_layout(m: EncoderConfig) -> Layout:
  """The parameters, and where they lie in a Hugging Face checkpoint."""
  d, h, c, f = m.width, m.heads, m.width // m.heads, m.ff
  at, rows, stored = "encoder.layer.{}.", {}, {}

  def add(name, s, scale=0.0, constant=0.0):
    shape = tuple(s.view[i] for i in s.order)
    if name.startswith("layers/"):
      shape = (m.layers, *shape)
    rows[name] = Param(shape, (None,) * len(shape), scale, constant)
    stored[name] = s

  def norm(name, theirs):
    add(name, Stored.plain(f"{theirs}.weight", d), constant=1.0)
    add(f"{name}_bias", Stored.plain(f"{theirs}.bias", d))

  def linear(name, theirs, into, out):
    weight = Stored.linear(f"{at}{theirs}.weight", (*into, *out), len(into))
    add(f"layers/w{name}", weight, 0.02)
    add(f"layers/b{name}", Stored.flat(f"{at}{theirs}.bias", *out))

  def table(name, theirs, size):
    theirs = f"embeddings.{theirs}_embeddings.weight"
    add(name, Stored.plain(theirs, size, d), 0.02)

  table("embed", "word", m.vocab)
  table("positions", "position", m.positions)
  table("types", "token_type", m.types)
  norm("norm", "embeddings.LayerNorm")
  for name, other in zip("qkv", ("query", "key", "value")):
    linear(name, f"attention.self.{other}", (d,), (h, c))
  linear("o", "attention.output.dense", (h, c), (d,))
  linear("_up", "intermediate.dense", (d,), (f,))
  linear("_down", "output.dense", (f,), (d,))
  norm("layers/attention_norm", f"{at}attention.output.LayerNorm")
  norm("layers/ff_norm", f"{at}output.LayerNorm")
  return Layout(rows, stored, _rename)


_UNUSED = "pooler.", "cls.", "lm_head.", "classifier."


def _rename(name: str) -> str | None:
  """The pooler and the heads have no part in an embedding."""
  name = without_prefix(name)
  return None if name is None or name.startswith(_UNUSED) else name


def without_prefix(name: str) -> str | None:
  """A tensor's name without its model's (`bert.embeddings...`); None: a buffer
  of position numbers."""
  name = name.removeprefix("bert.").removeprefix("roberta.")
  return None if name.startswith("embeddings.position_ids") else name


def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> jax.Array:
  """(x - mean) / deviation * scale + bias over the last axis, in float32."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  shape = (1,) * (x.ndim - 1) + scale.shape
  return y * scale.reshape(shape) + bias.reshape(shape)


def _multiply(equation, x, y):
  """In the operands' dtype, summed in float32."""
  # A TPU multiplies float32 in bfloat16 unless the precision is named.
  exact = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
  wide = dict(precision=exact, preferred_element_type=jnp.float32)
  return jnp.einsum(equation, x, y, **wide)


def _attend(q, k, v, mask) -> jax.Array:
  """Attention both ways of [B, H, L, C] each, softmax in float32.

  `mask` is [B, L] bool, true where there is a token.
  """
  scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  scores = _multiply("bhlc,bhsc->bhls", q * scale, k)
  scores = scores + jnp.where(mask, 0.0, -1e30)[:, None, None]
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  # Divided after the product: C numbers a query instead of L.
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = _multiply("bhls,bhsc->bhlc", weights.astype(v.dtype), v)
  return (out / total).astype(v.dtype)


def block(
  x: jax.Array,
  layer: Mapping[str, jax.Array],
  mask: jax.Array,
  m: EncoderConfig,
) -> jax.Array:
  """One layer: attention and feed-forward, each residual, then normed.

  Args:
    x: [B, L, D] float32.
    layer: the layer's parameters.
    mask: [B, L] bool, true where there is a token.
    m: the model's sizes.
  """
  dtype, (batch, length, d) = jnp.dtype(m.dtype), x.shape
  heads, c = m.heads, m.width // m.heads

  def linear(x, name, inner, outer):
    # Flat matrices: one large product instead of many small ones.
    w = layer[f"layers/w{name}"].reshape(inner, outer).astype(dtype)
    y = _multiply("nd,df->nf", x.astype(dtype), w)
    return y + layer[f"layers/b{name}"].reshape(1, outer)

  def norm(x, name):
    scale, bias = layer[f"layers/{name}"], layer[f"layers/{name}_bias"]
    return layer_norm(x, scale, bias, m.norm_eps)

  def split(y):
    y = y.astype(dtype).reshape(batch, length, heads, c)
    return y.transpose(0, 2, 1, 3)

  x = x.reshape(batch * length, d)
  q, k, v = (split(linear(x, name, d, d)) for name in "qkv")
  y = _attend(q, k, v, mask).transpose(0, 2, 1, 3)
  x = x + linear(y.reshape(batch * length, d), "o", d, d)
  x = norm(x, "attention_norm")
  y = ACTS[m.act](linear(x, "_up", d, m.ff))
  x = x + linear(y, "_down", m.ff, d)
  x = norm(x, "ff_norm")
  return x.reshape(batch, length, d)


def forward(
  params: Params,
  tokens: jax.Array,
  mask: jax.Array,
  m: EncoderConfig,
  types: jax.Array | None = None,
) -> jax.Array:
  """Hidden states of the last layer; for whole rows on one device.

  Args:
    params: as in `encoder_layout`.
    tokens: [B, L] ids, padded on the right, L + offset at most `m.positions`.
    mask: [B, L] bool, true where there is a token.
    m: the model's sizes.
    types: [B, L] token types; None: all 0.

  Returns:
    [B, L, D] float32; what stands at padding means nothing.
  """
  length = tokens.shape[1]
  x = params["embed"][tokens].astype(jnp.float32)
  x = x + params["positions"][m.offset : m.offset + length][None]
  if types is None:
    x = x + params["types"][0][None, None]
  else:
    x = x + params["types"][types]
  x = layer_norm(x, params["norm"], params["norm_bias"], m.norm_eps)
  body = lambda x, layer: (block(x, layer, mask, m), None)
  return jax.lax.scan(body, x, layers_of(params))[0]


def pool(x: jax.Array, mask: jax.Array, m: EncoderConfig) -> jax.Array:
  """Hidden states [B, L, D] -> embeddings [B, D], as `m` says."""
  y = POOLINGS[m.pooling](x, mask)
  if m.normalize:
    length = jnp.sqrt(jnp.sum(y * y, axis=-1, keepdims=True))
    y = y / jnp.maximum(length, 1e-12)
  return y


def read_encoder_config(
  folder: Any, *, pooling: str = "", dtype: str = "float32"
) -> EncoderConfig:
  """Reads a Hugging Face or sentence-transformers folder's sizes.

  How rows become vectors is read from sentence-transformers' files. Where
  they are absent it is the mean, not normalised, over all the positions.

  Args:
    folder: holds `config.json`; perhaps `modules.json` and what it names.
    pooling: a key of POOLINGS, to override the folder's.
    dtype: of the matrix products.

  Raises:
    ConfigError: a model, module or knob that is not known here.
    DataError: a file that cannot be read.
  """
  folder = resolve_settings(folder)
  if not (folder / "config.json").exists():
    raise ConfigError(
      f"{folder} has no config.json; wanted the folder of an "
      "encoder as transformers saves it"
    )
  try:
    m = _with_modules(folder, _read_sizes(folder, dtype), pooling)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    why = f"{type(error).__name__}: {error}"
    raise DataError(
      f"{folder}: its configuration cannot be used ({why})"
    ) from error
  if problem := _problem(m):
    raise ConfigError(f"encoder: {problem}")
  return m


def _read_sizes(folder: epath.Path, dtype: str) -> EncoderConfig:
  raw, problem = _json(folder, "config.json"), ""
  kind, known = raw.get("model_type"), ", ".join(FAMILIES)
  table = raw.get("position_embedding_type") or "absolute"
  if kind not in FAMILIES:
    problem = f"model_type {kind!r} is no encoder known here; known: {known}"
  elif table != "absolute":
    problem = f"position_embedding_type {table!r}, wanted 'absolute'"
  elif raw.get("is_decoder"):
    problem = "is_decoder, wanted an encoder"
  if problem:
    raise ConfigError(f"{folder}/config.json: {problem}")
  # RoBERTa's first token stands after the positions of its padding.
  offset = 0 if kind == "bert" else int(raw.get("pad_token_id", 1)) + 1
  positions, act = int(raw["max_position_embeddings"]), raw.get("hidden_act")
  return EncoderConfig(
    layers=int(raw["num_hidden_layers"]),
    width=int(raw["hidden_size"]),
    heads=int(raw["num_attention_heads"]),
    ff=int(raw["intermediate_size"]),
    vocab=int(raw["vocab_size"]),
    positions=positions,
    context=positions - offset,
    types=int(raw.get("type_vocab_size", 2)),
    offset=offset,
    norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
    act=fields.ACTS.get(act or "gelu", str(act)),
    dtype=dtype,
  )


def _problem(m: EncoderConfig) -> str:
  """A size or a name that does not fit, if there is one."""
  for name in "layers width heads ff vocab positions context types".split():
    if getattr(m, name) < 1:
      return f"{name}={getattr(m, name)}, wanted 1 or more"
  if m.width % m.heads:
    return f"width={m.width} is no multiple of heads={m.heads}"
  for name, known in (("act", ACTS), ("pooling", POOLINGS), ("dtype", DTYPES)):
    if (value := getattr(m, name)) not in known:
      return f"{name} {value!r} is unknown; known: {', '.join(known)}"
  return ""


# sentence-transformers' files.


def _json(folder: epath.Path, name: str) -> dict[str, Any]:
  """The content of a JSON file, {} where it is absent."""
  path = folder / name
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise DataError(f"{path} cannot be read: {error}") from error


def _with_modules(
  folder: epath.Path, m: EncoderConfig, pooling: str
) -> EncoderConfig:
  text = _json(folder, "sentence_bert_config.json")
  limit = (
    text.get("max_seq_length")  # or 1e30, where its author set none
    or _json(folder, "tokenizer_config.json").get("model_max_length")
  )
  named = _json(folder, "config_sentence_transformers.json")
  prompt = (named.get("prompts") or {}).get(named.get("default_prompt_name"))
  m = m._replace(
    context=int(min(limit or m.context, m.context)),
    lower=bool(text.get("do_lower_case")),
    pooling=pooling or m.pooling,
    prompt=str(prompt or ""),
  )
  for module in _json(folder, "modules.json"):
    kind = str(module.get("type")).rpartition(".")[2]
    if kind == "Normalize":
      m = m._replace(normalize=True)
    elif kind == "Pooling":
      if not pooling:
        m = m._replace(pooling=_pooling(folder, str(module.get("path", ""))))
    elif kind != "Transformer":
      # A projection left out would give other vectors and no error.
      raise ConfigError(
        f"{folder}/modules.json: module {kind!r} is not known "
        "here; known: Transformer, Pooling, Normalize"
      )
  return m


# Their names of poolings -> ours; their flags in older files -> their names.
_POOLING_NAMES = dict(mean="mean", cls="cls", lasttoken="last", max="max")
_OLD_POOLING_NAMES = {
  "pooling_mode_mean_tokens": "mean",
  "pooling_mode_cls_token": "cls",
  "pooling_mode_lasttoken": "lasttoken",
  "pooling_mode_max_tokens": "max",
  "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
  "pooling_mode_weightedmean_tokens": "weightedmean",
}


def _pooling(folder: epath.Path, path: str) -> str:
  """The one pooling of a `1_Pooling/config.json`, by our name."""
  if path.startswith("/") or ".." in path.split("/"):
    raise ConfigError(
      f"{folder}/modules.json: the path {path!r} leads out of the folder"
    )
  if not (folder / path / "config.json").exists():
    raise ConfigError(
      f"{folder} has no {path}/config.json, which its "
      "modules.json names; fetch it, or set embed.pooling"
    )
  raw, problem = _json(folder, f"{path}/config.json"), ""
  modes = raw.get("pooling_mode") or [
    mode for key, mode in _OLD_POOLING_NAMES.items() if raw.get(key)
  ]
  modes = [modes] if isinstance(modes, str) else list(map(str, modes))
  if len(modes) != 1 or modes[0] not in _POOLING_NAMES:
    known = ", ".join(_POOLING_NAMES)
    problem = f"pooling {' + '.join(modes) or 'none'}, wanted one of {known}"
  elif not raw.get("include_prompt", True):
    problem = "include_prompt=false is not known here"
  if problem:
    raise ConfigError(
      f"{folder}/{path}/config.json: {problem}; set embed.pooling"
    )
  return _POOLING_NAMES[modes[0]]
