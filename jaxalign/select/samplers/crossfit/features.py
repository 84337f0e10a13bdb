"""What crossfit reads of a pool that is held a chunk at a time."""

import numpy as np

from jaxalign.select.grams import surprise
from jaxalign.select.pool import Pool
from jaxalign.select.samplers.crossfit import heads
from jaxalign.select.samplers.values import check_finite, column, finite


def read_features(
  pool: Pool,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """The tokens of each response, its few numbers, and what the gate reads."""
  grams, length = np.asarray(pool.grams), column(pool, "length")
  check_finite(grams, pool.ids, "grams")
  overlap = finite(pool.overlap, pool.ids, "overlap")
  few = np.concatenate([overlap, length[..., None]], axis=2)
  tokens = grams[..., : grams.shape[2] // 2]
  n, r = tokens.shape[:2]
  common = surprise(grams.reshape(n * r, -1)).reshape(n, r, 2)
  size = np.empty((n, r), np.float32)
  for at in range(0, n, heads.ROWS):
    x = np.float32(tokens[at : at + heads.ROWS])
    size[at : at + heads.ROWS] = np.sqrt((x**2).sum(axis=2))
  signs = dict(
    length=length,
    tokens=common[..., 0],
    pairs=common[..., 1],
    grams=typical(tokens, groups_of_prompts(pool)),
    size=size,
  )
  return tokens, few, signs


def groups_of_prompts(pool: Pool) -> np.ndarray:
  """[N] names of prompts; without them each row's own."""
  return np.asarray(pool.columns.get("group", pool.ids))


def typical(x: np.ndarray, group: np.ndarray) -> np.ndarray:
  """[N, R, W] -> [N, R], how typical a response is of the pool's."""
  out = np.empty(x.shape[:2])
  chunks = heads.in_chunks(group)
  flat = lambda rows: x[rows].reshape(-1, x.shape[2])
  density, score = heads.fit_density(flat(chunks[0]))
  out[chunks[0]] = score.reshape(-1, x.shape[1])
  for rows in chunks[1:]:
    out[rows] = density.of(flat(rows)).reshape(-1, x.shape[1])
  return out
