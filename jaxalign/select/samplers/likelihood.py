"""Rows by what a model says of each response: length, perplexity, a judge."""

import numpy as np

from jaxalign.errors import DataError
from jaxalign.select.pool import needs, Pool, Selection
from jaxalign.select.samplers.values import (
  column,
  directed,
  finite,
  one_side,
  ranked,
)


@needs("length")
def length(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  direction: str = "top",
  side: str = "chosen",
) -> Selection:
  """Rows by the number of response tokens; O(N).

  Shen 2024 (arXiv 2402.06094): the longest responses are a hard baseline to
  beat. It is also the confounder of every other score: compare with it.

  Args:
    seed: unused.
    pool: `pool.length` [N, R] tokens.
    budget: M, at most N.
    direction: "top" (longest), "middle" or "low".
    side: of a pair; see `values.one_side`.
  """
  del seed
  value = one_side(column(pool, "length"), side)
  return ranked(directed(value, direction), pool, budget)


def mean_negative_log(logp: np.ndarray, count: np.ndarray) -> np.ndarray:
  """Nats per token, the logarithm of the perplexity."""
  if (count <= 0).any():
    raise DataError(
      f"{int((count <= 0).any(axis=1).sum())} rows have a "
      "response of no tokens, wanted one or more; set "
      "config.model.context"
    )
  return -logp / count


@needs("logp", "logp_count")
def perplexity(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  direction: str = "middle",
  side: str = "chosen",
) -> Selection:
  """Rows by log PPL(y|x) = -log p(y|x) / tokens of the response; O(N).

  The logarithm ranks as the perplexity does and does not overflow. The
  extremes are junk (high) and repetition (low): the default is the middle.

  Args:
    seed: unused.
    pool: `pool.logp` [N, R] nats, `pool.logp_count` [N, R] tokens, 1 or more.
    budget: M, at most N.
    direction: "top" (surprising), "middle" or "low" (fluent).
    side: of a pair; see `values.one_side`.
  """
  del seed
  value = mean_negative_log(column(pool, "logp"), column(pool, "logp_count"))
  return ranked(directed(one_side(value, side), direction), pool, budget)


@needs("logp", "logp_alone", "logp_count")
def ifd(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  direction: str = "middle",
  side: str = "chosen",
) -> Selection:
  """Instruction-following difficulty, Li et al. 2024 (arXiv 2308.12032); O(N).

  IFD = PPL(y|x) / PPL(y) = exp((log p(y) - log p(y|x)) / tokens): how little
  the prompt helps to say the response; above 1 it misleads. On preference
  data its extremes did badly and its middle well (Deng et al. 2025), hence
  the default; `side="difference"` is the margin of the two.

  Args:
    seed: unused.
    pool: `pool.logp` and `pool.logp_alone` [N, R] nats, with and without the
      prompt, over the same tokens; `pool.logp_count` [N, R], their number.
    budget: M, at most N.
    direction: "top" (hard), "middle" or "low".
    side: of a pair; see `values.one_side`.
  """
  del seed
  count = column(pool, "logp_count")
  with_prompt = mean_negative_log(column(pool, "logp"), count)
  alone = mean_negative_log(column(pool, "logp_alone"), count)
  with np.errstate(over="ignore"):  # `finite` names the row
    value = finite(np.exp(with_prompt - alone), pool.ids, "ifd")
  return ranked(directed(one_side(value, side), direction), pool, budget)


@needs("p_yes")
def ask_llm(
  seed: int,
  pool: Pool,
  budget: int,
  *,
  direction: str = "top",
  side: str = "chosen",
) -> Selection:
  """Rows by a judge's P(yes), Sachdeva et al. 2024 (arXiv 2402.09668); O(N).

  P(yes) = exp(l_yes) / (exp(l_yes) + exp(l_no)) to "is this a good example?",
  the highest kept; not the first so many "yes" of a file, which would depend
  on the file's order.

  Args:
    seed: unused.
    pool: `pool.p_yes` [N, R], 0 to 1.
    budget: M, at most N.
    direction: "top", "middle" or "low".
    side: of a pair; see `values.one_side`. A good chosen answer matters most
      (Pan et al. 2025), hence the default.

  Raises:
    DataError: a number outside of 0 to 1.
  """
  del seed
  value = column(pool, "p_yes")
  outside = (value < 0) | (value > 1)
  if outside.any():
    raise DataError(
      f"p_yes holds {float(value[outside][0])}, wanted "
      "probabilities from 0 to 1; look at the judge"
    )
  return ranked(directed(one_side(value, side), direction), pool, budget)


@needs("held_out_loss")
def selective_dpo(
  seed: int, pool: Pool, budget: int, *, direction: str = "low"
) -> Selection:
  """The easiest rows, easy first, Gao et al. 2025 (arXiv 2502.09650); O(N S).

  A row's difficulty is its DPO loss, averaged over the models that were not
  trained on it. The order of the rows is the method's curriculum: train them
  in the order given.

  Args:
    seed: unused.
    pool: `pool.held_out_loss` [N, S] nats of S models, each trained on half
      of the pool; NaN where a model has seen the pair.
    budget: M, at most N; the paper keeps half.
    direction: "low" (easy pairs first), "middle" or "top" (hard first).
  """
  del seed
  loss = np.asarray(pool.held_out_loss, np.float64)
  loss = loss.reshape(len(loss), -1)
  seen = np.isnan(loss)
  unseen = (~seen).sum(axis=1)
  # A pair that all models were trained on has no held-out loss: NaN, refused.
  mean = np.where(seen, 0.0, loss).sum(axis=1) / np.where(
    unseen, unseen, np.nan
  )
  mean = finite(mean, pool.ids, "held_out_loss")
  return ranked(directed(mean, direction), pool, budget)
