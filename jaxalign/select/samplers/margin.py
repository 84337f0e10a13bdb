"""Pairs by how far apart their two sides are: rewards, log-ratios, both."""

from typing import Any

import numpy as np

from jaxalign.errors import ConfigError, NumericError
from jaxalign.select.pool import needs, Pool, Selection
from jaxalign.select.samplers.values import column, directed, ranked


def reward_margin(pool: Pool) -> np.ndarray:
  """[N] m = r(chosen) - r(rejected)."""
  reward = column(pool, "reward", pairs=True)
  return reward[:, 0] - reward[:, 1]


def log_ratio_margin(pool: Pool, beta: float) -> np.ndarray:
  """[N] m = beta (log pi/ref (chosen) - log pi/ref (rejected)), nats."""
  if not beta > 0:
    raise ConfigError(
      f"beta is {beta}, wanted above 0; set config.select.kwargs.beta"
    )
  ratio = column(pool, "proxy_logp", pairs=True) - column(
    pool, "proxy_ref_logp", pairs=True
  )
  return beta * (ratio[:, 0] - ratio[:, 1])


@needs("reward", pairs=True)
def external_margin(
  seed: int, pool: Pool, budget: int, *, direction: str = "top"
) -> Selection:
  """Pairs by a reward model's margin r(chosen) - r(rejected); O(N).

  The literature disagrees on the direction (largest: Deng et al. 2025, arXiv
  2502.14560; a middle band: TIF), and large margins collect junk: pilot it.

  Args:
    seed: unused.
    pool: `pool.reward` [N, 2].
    budget: M, at most N.
    direction: "top" (largest), "middle" or "low" (smallest, mislabelled
      pairs among them).
  """
  del seed
  return ranked(directed(reward_margin(pool), direction), pool, budget)


@needs("proxy_logp", "proxy_ref_logp", pairs=True)
def implicit_margin(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  beta: float = 0.1,
  direction: str = "top",
) -> Selection:
  """Pairs by the implicit reward margin of a small tuned model; O(N).

  m = beta [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)], with
  pi a proxy tuned by DPO on some 2,000 pairs. Largest: Deng et al. 2025;
  smallest: arXiv 2508.04149.

  Args:
    seed: unused.
    pool: `pool.proxy_logp` and `pool.proxy_ref_logp` [N, 2] nats, summed.
    budget: M, at most N.
    beta: that the proxy was tuned with; it scales and never reorders.
    direction: "top", "middle" or "low".
  """
  del seed
  return ranked(directed(log_ratio_margin(pool, beta), direction), pool, budget)


def clip_bounds(
  margin: np.ndarray, low: float, high: Any
) -> tuple[float, float]:
  """The two ends (L, U) between which a margin becomes a probability."""
  if high == "tail":
    high = float(np.quantile(margin, 0.99))
    if not high > low:
      raise NumericError(
        f"the 99th percentile of a margin is {high:.3g}, not "
        f"above {low}: hardly a pair would count as right; "
        "set config.select.kwargs.low"
      )
  if isinstance(high, (str, bool)) or not high > low:
    raise ConfigError(
      f"margins are clipped to [{low}, {high}], wanted the "
      "first below the second ('tail': the 99th percentile); "
      "set config.select.kwargs.low and high"
    )
  return float(low), float(high)


def agreement(margins: list[np.ndarray], low: float, high: Any) -> np.ndarray:
  """[N] log-odds that all sources agree that a pair is right.

  P_j = (clip(m_j, L, U) - L) / (U - L) and P = prod P_j / (prod P_j + prod (1
  - P_j)), Deng et al. 2025. The log-odds sum_j log P_j - log(1 - P_j) rank as
  P does and keep apart what P rounds to 0 or 1; a P_j of 0 or 1 counts as one
  part in 10^6 away from it, so that no one source decides alone.
  """
  total = np.zeros(len(margins[0]))
  for margin in margins:
    bottom, ceiling = clip_bounds(margin, low, high)
    p = (np.clip(margin, bottom, ceiling) - bottom) / (ceiling - bottom)
    p = np.clip(p, 1e-6, 1 - 1e-6)
    total += np.log(p) - np.log1p(-p)
  return total


@needs("reward", "proxy_logp", "proxy_ref_logp", pairs=True)
def bees(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  beta: float = 0.1,
  low: float = -2.0,
  high: float | str = "tail",
  direction: str = "top",
) -> Selection:
  """Pairs on which two margins agree, Deng et al. 2025 (arXiv 2502.14560).

  The external and the implicit margin each become a probability, and the
  product of those, normalised, ranks the pairs; see `agreement`. O(N).

  Args:
    seed: unused.
    pool: what `external_margin` and `implicit_margin` read.
    budget: M, at most N.
    beta: of the implicit margin; here it matters, as the clip is in nats.
    low: L, the margin that counts as surely wrong (the released code: -2).
    high: U, as surely right: a number, or "tail", each margin's own 99th
      percentile, so that a few huge margins do not flatten the rest.
    direction: "top", "middle" or "low".
  """
  del seed
  score = agreement(
    [reward_margin(pool), log_ratio_margin(pool, beta)], low, high
  )
  return ranked(directed(score, direction), pool, budget)
