"""Low-rank adapters: LoRA on frozen weights, and three names for it.

A weight W [in, out] that a target names is used as W + scale * A B, with A
[in, r] and B [r, out]; `decoder.table` lists them as "layers/wq:a" and
"layers/wq:b" wherever `ModelConfig.lora` is set, so that whatever maps over
the table knows them. The product A B is only ever formed by `Merged`.
"""

from collections.abc import Iterable, Iterator, Mapping
import fnmatch
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.core.errors import ConfigError, NumericError
from jaxalign.model.parameters import init_params, Param, Params

# "lora": Hu et al. 2021, without its dropout (with it the first policy would
#   not be the reference).
# "allora": Huang and Balestriero 2024; no scale, see `train.optim.allora`.
# "lora_sb": Ponkshe et al. 2024; W + scale * A R B where only R [r, r]
#   ("layers/wq:r") is trained, see `train.subspace`.
VARIANTS = ("lora", "allora", "lora_sb")
EVERY = "all-linear"
# A weight of a layer -> how many axes are its input's, and what Hugging Face
# calls it.
LINEAR = {
  "wq": (1, ("q_proj", "query_key_value")),
  "wk": (1, ("k_proj", "query_key_value")),
  "wv": (1, ("v_proj", "query_key_value")),
  "wo": (3, ("o_proj", "dense")),
  "w_gate": (1, ("gate_proj",)),
  "w_up": (1, ("up_proj", "dense_h_to_4h")),
  "w_down": (1, ("down_proj", "dense_4h_to_h")),
}


class Lora(NamedTuple):
  """Which weights have adapters, and of what kind."""

  rank: int  # r
  alpha: float = 16.0
  targets: tuple[str, ...] = (EVERY,)  # patterns over LINEAR's names
  rs: bool = False  # rsLoRA (Kalajdzievski 2023): alpha / sqrt(r)
  variant: str = "lora"  # one of VARIANTS


def scale(lora: Lora) -> float:
  """The factor of A B: alpha / r, alpha / sqrt(r), or ALLoRA's 1."""
  if lora.variant == "allora":
    return 1.0
  return lora.alpha / (math.sqrt(lora.rank) if lora.rs else lora.rank)


def targets(lora: Lora, names: Iterable[str]) -> list[str]:
  """The parameters, of all names in a table, that get adapters.

  A pattern ("w[qv]", "*_proj") is held against our name of a weight and
  against Hugging Face's; "all-linear" is every one.

  Raises:
    ConfigError: a pattern that matches nothing; lists what there is.
  """
  if not lora.targets:
    raise ConfigError(
      f"no LoRA targets; set config.lora.targets to ({EVERY!r},)"
    )
  short = {n.removeprefix("layers/"): n for n in names}
  called = {n: (n, *LINEAR[n][1]) for n in short if n in LINEAR}
  hits = set()
  for pattern in lora.targets:
    match = lambda n, p=pattern: p == EVERY or fnmatch.filter(called[n], p)
    matches = set(filter(match, called))
    if not matches:
      known = [f"{n} ({' or '.join(of[1:])})" for n, of in called.items()]
      raise ConfigError(
        f"LoRA target {pattern!r} matches no weight; there are "
        f"{', '.join(known)}, or {EVERY!r}; set config.lora.targets"
      )
    hits |= matches
  return [short[n] for n in called if n in hits]


def sides(name: str, shape: tuple[int, ...]) -> tuple[tuple, tuple]:
  """The input's and the output's axes of a stacked weight's shape."""
  cut = 1 + LINEAR[name.removeprefix("layers/")][0]
  return shape[1:cut], shape[cut:]


def check_lora(lora: Lora, rows: Mapping[str, Param]) -> None:
  """Raises ConfigError for values that cannot work on a table."""
  if lora.variant not in VARIANTS:
    raise ConfigError(
      f"lora.variant={lora.variant!r} is unknown; known: "
      f"{', '.join(VARIANTS)}, rslora; set config.lora.variant"
    )
  if lora.rank < 1:
    raise ConfigError(
      f"lora.rank={lora.rank}, wanted 1 or more (0: full "
      "training); set config.lora.rank"
    )
  if not 0 < lora.alpha < math.inf:
    raise ConfigError(
      f"lora.alpha={lora.alpha}, wanted more than 0; set config.lora.alpha"
    )
  for name in targets(lora, rows):
    widest = min(map(math.prod, sides(name, rows[name].shape)))
    if lora.rank > widest:
      raise ConfigError(
        f"lora.rank={lora.rank} is more than {name} can have, "
        f"wanted {widest} or less; set config.lora.rank"
      )


def rows(lora: Lora, base: Mapping[str, Param]) -> dict[str, Param]:
  """The adapters' rows of a table: a [T, in, r], b [T, r, out], and of
  LoRA-SB r [T, r, r]; their axes are the weight's, the rank is whole."""
  out, r = {}, lora.rank
  for name in targets(lora, base):
    p = base[name]
    into, outof = sides(name, p.shape)
    t, cut = p.shape[0], 1 + len(into)
    scale = 1 / math.sqrt(3 * math.prod(into))
    out[f"{name}:a"] = Param((t, *into, r), (*p.axes[:cut], None), scale)
    axes = (None, None, *p.axes[cut:])
    out[f"{name}:b"] = Param((t, r, *outof), axes, 0, 0.0)
    if lora.variant == "lora_sb":
      out[f"{name}:r"] = Param((t, r, r), (None,) * 3, 0, 0.0)
  return out


def is_adapter(name: str) -> bool:
  """Whether a parameter belongs to an adapter."""
  return ":" in name


def split(params: Mapping, lora: Lora | None) -> tuple[dict, dict]:
  """(trained, frozen) parameters, or rows, or anything else by name."""
  ends = ("",)  # without adapters all are trained
  if lora is not None:
    ends = (":r",) if lora.variant == "lora_sb" else (":a", ":b")
  trained = {n: x for n, x in params.items() if n.endswith(ends)}
  return trained, {n: x for n, x in params.items() if n not in trained}


def init(key: jax.Array, rows: Mapping[str, Param]) -> Params:
  """Fresh adapters in float32 on the current mesh, of a model's whole table: A
  uniform on +-1/sqrt(in), as PEFT draws it, B (and R) zero."""

  def draw(key, p):
    if not p.scale:
      return jnp.zeros(p.shape, jnp.float32)
    bound = math.sqrt(3) * p.scale
    return jax.random.uniform(key, p.shape, jnp.float32, -bound, bound)

  own = {n: p for n, p in rows.items() if is_adapter(n)}
  return init_params(key, own, draw)


def assert_zero(params: Mapping[str, jax.Array]) -> None:
  """Raises NumericError where fresh adapters are not "no change at all"."""
  last = ":r" if any(n.endswith(":r") for n in params) else ":b"
  zero = lambda x: float(jnp.max(jnp.abs(x))) == 0.0
  moved = [n for n, x in params.items() if n.endswith(last) and not zero(x)]
  if moved:
    raise NumericError(
      f"adapters {', '.join(moved)} are not 0 before training: "
      "the first policy would not be the reference"
    )


def apply(
  x: jax.Array,
  equation: str,
  factor: float,
  a: jax.Array,
  r: jax.Array | None,
  b: jax.Array,
  **how: Any,
) -> jax.Array:
  """scale * ((x A) R) B, to add to the product that `equation` names.

  Args:
    x: [B, L, in] activations.
    equation: of the weight, "bld,dgqc->blgqc".
    factor: from `scale`; on the narrowest product.
    a: [in, r], ready to multiply.
    r: [r, r], or None.
    b: [r, out].
    **how: of `einsum`: its precision, and the sharding of what is summed.
  """
  into, rest = equation.split(",")
  weight, out = rest.split("->")
  inner = "".join(i for i in weight if i in into)
  outer = "".join(i for i in weight if i in out)
  h = jnp.einsum(f"{into},{inner}r->blr", x, a, **how)
  if r is not None:
    h = jnp.einsum("blr,rs->bls", h, r, precision=how.get("precision"))
  return jnp.einsum(f"blr,r{outer}->{out}", factor * h, b, **how)


@functools.partial(jax.jit, static_argnames=("factor",))
def _merged(w, a, r, b, factor):
  inner, outer = "defg"[: a.ndim - 2], "opq"[: b.ndim - 2]
  exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  if r is not None:
    b = exact(f"trs,ts{outer}->tr{outer}", r, b)
  delta = exact(f"t{inner}r,tr{outer}->t{inner}{outer}", a, b)
  return (w.astype(jnp.float32) + factor * delta).astype(w.dtype)


class Merged(Mapping):
  """The base's parameters with scale * A R B added in float32, rounded to the
  weight's type, each made when it is read.

  A mapping, so that an export holds one merged weight more than there is, and
  not all of them.
  """

  def __init__(self, params: Mapping[str, jax.Array], lora: Lora):
    self.params, self.lora = params, lora

  def __getitem__(self, name: str) -> jax.Array:
    p = self.params
    if is_adapter(name):
      raise KeyError(name)
    if f"{name}:a" not in p:
      return p[name]
    a, r, b = (p.get(f"{name}:{side}") for side in "arb")
    return _merged(p[name], a, r, b, scale(self.lora))

  def __iter__(self) -> Iterator[str]:
    return (n for n in self.params if not is_adapter(n))

  def __len__(self) -> int:
    return sum(1 for _ in self)


def folded(params: Mapping[str, np.ndarray], name: str) -> tuple:
  """(A [T, in, r], B [T, r, out]) of a weight on the host, each side flat, R
  in B."""
  a, b = (np.asarray(params[f"{name}:{side}"], np.float32) for side in "ab")
  into, r = math.prod(a.shape[1:-1]), a.shape[-1]
  a, b = a.reshape(len(a), into, r), b.reshape(len(b), r, -1)
  if f"{name}:r" in params:
    b = np.matmul(np.asarray(params[f"{name}:r"], np.float32), b)
  return a, b
