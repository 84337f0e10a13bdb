"""Floating-point operations of a forward pass: multiply-adds x 2."""

import numpy as np

from jaxalign.model.decoder import ModelConfig
from jaxalign.model.encoder import EncoderConfig
from jaxalign.model.reward import RewardConfig


def layer_flops(m: ModelConfig) -> int:
  """Of one token in one layer, attention's square apart."""
  d, h, g, c, f = m.width, m.heads, m.kv_heads, m.head_size, m.ff
  return 2 * (d * h * c * 2 + d * g * c * 2 + (2 + m.gated) * d * f)


def decoder_flops(
  m: ModelConfig,
  length: int,
  logit_rows: int | None = None,
  passes: tuple[int, int] = (1, 1),
) -> int:
  """Of passes over one row of `length` tokens, as computed.

  The embedding lookup costs nothing; attention is counted as the full square.

  Args:
    m: the model's sizes.
    length: L.
    logit_rows: positions that the head is on; None: all.
    passes: how many, of products with weights and of attention's.
  """
  square = 2 * 2 * m.heads * m.head_size * length * length
  rows = length if logit_rows is None else logit_rows
  weights, squares = passes
  layer = weights * layer_flops(m) * length + squares * square
  return m.layers * layer + weights * 2 * m.width * m.vocab * rows


def useful_flops(
  m: ModelConfig,
  prompt: np.ndarray,
  answers: np.ndarray,
  passes: tuple[int, int] = (1, 1),
) -> int:
  """Of passes over rows, without padding, recomputation and embedding lookup.

  Every prompt token once, a query and key only where one sees the other (a
  window's queries see no further back), the head on what predicts a response
  token.

  Args:
    m: the model's sizes.
    prompt: [n] int, tokens of each prompt.
    answers: [n, R] int, tokens of each response to it.
    passes: as of `decoder_flops`.
  """
  p, a = np.int64(prompt), np.int64(answers)
  answered = int(a.sum())
  tokens = int(p.sum()) + answered

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
    m.layers * weights * layer_flops(m) * tokens
    + squares * 2 * 2 * m.heads * m.head_size * pairs
    + weights * 2 * m.width * m.vocab * answered
  )


def encoder_flops(m: EncoderConfig, length: int) -> int:
  """Of one row of `length` tokens, lookups not counted."""
  per_token = 2 * (4 * m.width * m.width + 2 * m.width * m.ff)
  return m.layers * (per_token * length + 4 * m.width * length * length)


def reward_flops(r: RewardConfig, length: int) -> int:
  """Of one row of `length` tokens, lookups not counted."""
  d = r.model.width
  if r.encodes:
    return encoder_flops(r.model, length) + 2 * d * d + 2 * d
  return decoder_flops(r.model, length, 0) + 2 * d
