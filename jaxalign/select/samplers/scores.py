"""Rows by one number: of a model, a judge or a reward model.

Each is O(N). `direction` is of `values.directed`, which end is kept, and
`side` of `values.one_side`, what stands for a pair.
"""

import numpy as np

from jaxalign.core.errors import ConfigError, DataError, NumericError
from jaxalign.select.costs import of_ranks, of_scores, Work
from jaxalign.select.pool import needs, Pool
from jaxalign.select.samplers.values import (
  column,
  directed,
  finite,
  one_side,
  ranked,
  require,
)
from jaxalign.select.samplers.vectors import vectors


def _kept(value, pool, budget, direction, side="chosen"):
  if value.ndim == 2:
    value = one_side(value, side)
  return ranked(directed(value, direction), pool, budget)


@needs("length", cost=of_ranks)
def length(seed, pool, budget, *, direction="top", side="chosen"):
  """Rows by the number of response tokens.

  Shen 2024 (arXiv 2402.06094): the longest responses are a hard baseline to
  beat. Length also confounds every other score: compare with it.
  """
  return _kept(column(pool, "length"), pool, budget, direction, side)


def mean_negative_log(logp: np.ndarray, count: np.ndarray) -> np.ndarray:
  """Nats per token, the logarithm of the perplexity."""
  if (count <= 0).any():
    raise DataError(
      f"{int((count <= 0).any(axis=1).sum())} rows have a response of no "
      "tokens, wanted one or more; set config.model.context"
    )
  return -logp / count


@needs("logp", "logp_count", cost=of_scores)
def perplexity(seed, pool, budget, *, direction="middle", side="chosen"):
  """Rows by log PPL(y|x) = -log p(y|x) / tokens of the response.

  The logarithm ranks as the perplexity does and does not overflow. The
  extremes are junk (high) and repetition (low): the default is the middle.
  """
  value = mean_negative_log(column(pool, "logp"), column(pool, "logp_count"))
  return _kept(value, pool, budget, direction, side)


@needs("logp", "logp_alone", "logp_count", cost=of_scores)
def ifd(seed, pool, budget, *, direction="middle", side="chosen"):
  """Instruction-following difficulty, Li et al. 2024 (arXiv 2308.12032).

  IFD = PPL(y|x) / PPL(y) = exp((log p(y) - log p(y|x)) / tokens): how little
  the prompt helps to predict the response; above 1 it misleads. On preference
  data its extremes did badly and its middle well (Deng et al. 2025), hence
  the default; `side="difference"` is the margin of the two.
  """
  count = column(pool, "logp_count")
  with_prompt = mean_negative_log(column(pool, "logp"), count)
  alone = mean_negative_log(column(pool, "logp_alone"), count)
  with np.errstate(over="ignore"):  # `finite` names the row
    value = finite(np.exp(with_prompt - alone), pool.ids, "ifd")
  return _kept(value, pool, budget, direction, side)


@needs("p_yes", cost=of_ranks)
def ask_llm(seed, pool, budget, *, direction="top", side="chosen"):
  """Rows by a judge's P(yes), Sachdeva et al. 2024 (arXiv 2402.09668).

  P(yes) = exp(l_yes) / (exp(l_yes) + exp(l_no)) to "is this a good example?",
  the highest kept; not the first so many "yes" of a file, which would depend
  on the file's order. A good chosen answer matters most (Pan et al. 2025).

  Raises:
    DataError: a number outside of 0 to 1.
  """
  value = column(pool, "p_yes")
  outside = value[(value < 0) | (value > 1)]
  if outside.size:
    raise DataError(
      f"p_yes holds {float(outside[0])}, wanted probabilities from 0 to 1; "
      "look at the judge"
    )
  return _kept(value, pool, budget, direction, side)


@needs("held_out_loss", cost=of_scores)
def selective_dpo(seed, pool, budget, *, direction="low"):
  """The easiest rows, easy first, Gao et al. 2025 (arXiv 2502.09650).

  A row's difficulty is its DPO loss, averaged over the models that were not
  trained on it; the paper keeps half. The order of the rows is the method's
  curriculum: train them in the order given.

  Args:
    pool: `held_out_loss` [N, S] nats of S models, each trained on half of the
      pool; NaN where a model has seen the pair.
  """
  loss = np.asarray(pool.held_out_loss, np.float64)
  loss = loss.reshape(len(loss), -1)
  seen = np.isnan(loss)
  unseen = (~seen).sum(axis=1)
  # A pair that all models were trained on has no held-out loss: NaN, refused.
  count = np.where(unseen, unseen, np.nan)
  mean = np.where(seen, 0.0, loss).sum(axis=1) / count
  mean = finite(mean, pool.ids, "held_out_loss")
  return _kept(mean, pool, budget, direction)


def reward_margin(pool: Pool) -> np.ndarray:
  """[N] m = r(chosen) - r(rejected)."""
  reward = column(pool, "reward", pairs=True)
  return reward[:, 0] - reward[:, 1]


def log_ratio_margin(pool: Pool, beta: float) -> np.ndarray:
  """[N] m = beta (log pi/ref (chosen) - log pi/ref (rejected)), nats."""
  require(beta > 0, "beta", beta, "above 0")
  policy = column(pool, "proxy_logp", pairs=True)
  ratio = policy - column(pool, "proxy_ref_logp", pairs=True)
  return beta * (ratio[:, 0] - ratio[:, 1])


@needs("reward", pairs=True, cost=of_ranks)
def external_margin(seed, pool, budget, *, direction="top"):
  """Pairs by a reward model's margin r(chosen) - r(rejected).

  The literature disagrees on the direction (largest: Deng et al. 2025, arXiv
  2502.14560; a middle band: TIF), and large margins collect junk, small ones
  mislabelled pairs: pilot it.
  """
  return _kept(reward_margin(pool), pool, budget, direction)


@needs("proxy_logp", "proxy_ref_logp", pairs=True, cost=of_ranks)
def implicit_margin(seed, pool, budget, *, beta=0.1, direction="top"):
  """Pairs by the implicit reward margin of a small tuned model.

  m = beta [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)], with
  pi a proxy tuned by DPO on some 2,000 pairs. Largest: Deng et al. 2025;
  smallest: arXiv 2508.04149.

  Args:
    beta: that the proxy was tuned with; it scales and never reorders.
  """
  return _kept(log_ratio_margin(pool, beta), pool, budget, direction)


def clip_bounds(
  margin: np.ndarray, low: float, high: float | str
) -> tuple[float, float]:
  """The two ends (L, U) between which a margin becomes a probability."""
  if high == "tail":
    high = float(np.quantile(margin, 0.99))
    if not high > low:
      raise NumericError(
        f"the 99th percentile of a margin is {high:.3g}, not above {low}: "
        "hardly a pair would count as right; set config.select.kwargs.low"
      )
  if isinstance(high, (str, bool)) or not high > low:
    raise ConfigError(
      f"margins are clipped to [{low}, {high}], wanted the first below the "
      "second ('tail': the 99th percentile); set config.select.kwargs.low "
      "and high"
    )
  return float(low), float(high)


def agreement(
  margins: list[np.ndarray], low: float, high: float | str
) -> np.ndarray:
  """[N] log-odds that all sources agree that a pair is right.

  P_j = (clip(m_j, L, U) - L) / (U - L) and P = prod P_j / (prod P_j + prod (1
  - P_j)), Deng et al. 2025. The log-odds sum_j log P_j - log(1 - P_j) rank as
  P does and keep apart what P rounds to 0 or 1; a P_j of 0 or 1 counts as
  1e-6 away from it, so that no one source decides alone.
  """
  total = np.zeros(len(margins[0]))
  for margin in margins:
    bottom, ceiling = clip_bounds(margin, low, high)
    p = (np.clip(margin, bottom, ceiling) - bottom) / (ceiling - bottom)
    p = np.clip(p, 1e-6, 1 - 1e-6)
    total += np.log(p) - np.log1p(-p)
  return total


@needs("reward", "proxy_logp", "proxy_ref_logp", pairs=True, cost=of_scores)
def bees(
  seed, pool, budget, *, beta=0.1, low=-2.0, high="tail", direction="top"
):
  """Pairs on which two margins agree, Deng et al. 2025 (arXiv 2502.14560).

  The external and the implicit margin each become a probability, and the
  product of those, normalised, ranks the pairs; see `agreement`.

  Args:
    beta: of the implicit margin; here it matters, as the clip is in nats.
    low: L, the margin that counts as surely wrong (the released code: -2).
    high: U, as surely right: a number, or "tail", each margin's own 99th
      percentile, so that a few huge margins do not flatten the rest.
  """
  margins = [reward_margin(pool), log_ratio_margin(pool, beta)]
  return _kept(agreement(margins, low, high), pool, budget, direction)


def _real_work(p, **_):
  return Work(2 * p.n * p.e, held=6 * 4 * p.n * p.e)


@needs("answer_embedding", pairs=True, cost=_real_work)
def real(seed, pool, budget, *, direction="top", metric="cosine"):
  """Pairs whose two responses are least alike, Zhang et al. 2024 (REAL); O(NE).

  Score 1 - cos(chosen, rejected); easy pairs to tell apart, so a correct
  label is likelier. The prompt, which would pull the two together, is not in
  `answer_embedding` [N, 2, E], means over the response's tokens.

  Args:
    metric: "cosine"; "centred" takes off the mean of all responses first;
      "euclidean" scores the distance itself.
  """
  sides = np.asarray(pool.answer_embedding)
  n = len(sides)
  if sides.ndim != 3 or sides.shape[1] != 2:
    raise ConfigError(
      "this sampler compares the two responses of a pair; the embedding has "
      f"the shape {sides.shape}, wanted [N, 2, E]; set config.select.sampler"
    )
  columns = {"embedding": sides.reshape(2 * n, 1, -1)}
  x = vectors(Pool(np.repeat(pool.ids, 2), columns), "mean", metric)
  x = np.float64(x).reshape(n, 2, -1)
  if metric == "euclidean":
    value = np.sqrt(((x[:, 0] - x[:, 1]) ** 2).sum(axis=1))
  else:
    value = 1 - (x[:, 0] * x[:, 1]).sum(axis=1)
  return _kept(value, pool, budget, direction)
