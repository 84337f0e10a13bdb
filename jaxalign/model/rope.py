"""Rotary positions: the frequencies of the published variants, and the turn."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import ConfigError


class Rope(NamedTuple):
  """One rotary embedding, with the names of `rope_parameters` in config.json.

  `kind` is "default", "linear", "llama3" or "yarn"; "dynamic" equals "default"
  up to the length that the model was made for, and longer rows are refused.
  """

  theta: float = 10000.0
  kind: str = "default"
  factor: float = 1.0
  low: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow
  high: float = 4.0  # llama3: high_freq_factor; yarn: beta_fast
  original: int = 0  # original_max_position_embeddings
  magnitude: float = 0.0  # yarn: attention_factor; 0: its own formula
  truncate: bool = True  # yarn: whole dimensions as the ramp's ends


def _llama3(frequency: np.ndarray, r: Rope, dims: int) -> np.ndarray:
  """Long waves slowed by `factor`, short ones kept, a ramp between."""
  del dims
  turns = r.original * frequency / (2 * np.pi)  # in the original context
  ramp = np.clip((turns - r.low) / (r.high - r.low), 0, 1)
  return frequency * (ramp + (1 - ramp) / r.factor)


def _yarn(frequency: np.ndarray, r: Rope, dims: int) -> np.ndarray:
  """Peng et al. 2023, "NTK-by-parts": the ramp is over dimensions."""

  def dimension(turns):
    return (
      dims
      * math.log(r.original / (turns * 2 * math.pi))
      / (2 * math.log(r.theta))
    )

  first, last = dimension(r.high), dimension(r.low)
  if r.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, dims - 1)
  ramp = np.clip((np.arange(dims // 2) - first) / max(last - first, 1e-3), 0, 1)
  return frequency * (1 - ramp + ramp / r.factor)


KINDS = {
  "default": lambda frequency, r, dims: frequency,
  "linear": lambda frequency, r, dims: frequency / r.factor,
  "dynamic": lambda frequency, r, dims: frequency,
  "llama3": _llama3,
  "yarn": _yarn,
}


def check(r: Rope) -> None:
  """Raises ConfigError for a kind that is not known, or sizes with no sense."""
  if r.kind not in KINDS:
    raise ConfigError(
      f"rope_type={r.kind!r} is unknown; known: {', '.join(KINDS)}"
    )
  if r.kind in ("llama3", "yarn") and r.original < 1:
    raise ConfigError(
      f"rope_type={r.kind!r} needs original_max_position_embeddings"
    )
  if r.theta <= 1 or r.factor <= 0 or (r.kind == "llama3" and r.high <= r.low):
    raise ConfigError(
      f"{r}: wanted theta above 1, factor above 0 and "
      "high_freq_factor above low_freq_factor"
    )


def frequencies(r: Rope, dims: int) -> np.ndarray:
  """Angle per position [dims / 2], float64, of `dims` rotated dimensions."""
  base = r.theta ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
  return KINDS[r.kind](base, r, dims)


def magnitude(r: Rope) -> float:
  """What yarn multiplies sine and cosine by; 1 for the others."""
  if r.kind != "yarn":
    return 1.0
  return r.magnitude or (0.1 * math.log(r.factor) + 1 if r.factor > 1 else 1.0)


def angles(
  r: Rope, dims: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine [B, L, dims / 2] float32 at `positions` [B, L]."""
  frequency = jnp.asarray(frequencies(r, dims), jnp.float32)
  angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
  scale = magnitude(r)
  return scale * jnp.cos(angle), scale * jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the first dimensions of the last axis, half against half.

  Args:
    x: [B, L, ..., C].
    cos: [B or 1, L, dims / 2], as from `angles`; dimensions from `dims` on
      pass unturned.
    sin: the same shape.
  """
  extra = (None,) * (x.ndim - 3)
  cos = cos[(slice(None), slice(None)) + extra].astype(x.dtype)
  sin = sin[(slice(None), slice(None)) + extra].astype(x.dtype)
  half = cos.shape[-1]
  a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
