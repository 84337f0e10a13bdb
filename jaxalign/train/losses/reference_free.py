"""Losses that need no reference.

With l = policy over sums and mean(l) = l / n, its value a token. There is no
r, so "rewards/..." are beta times what the loss compares, and no initial value
is special.
"""

import jax
import jax.numpy as jnp

from jaxalign.train.losses.common import (
  bounded_expm1,
  margin,
  mean,
  needs,
  pair_metrics,
)

# The most certain a mean log-probability may be: log(1 - e^x) ends at x = 0.
SURE = -1e-7


def _nll(policy):
  """[B] nats a token of the first response."""
  return -mean(policy.sum, policy)[:, 0]


@needs("rows", reference=False)
def sft(policy, ref, stats):
  """Negative log-likelihood of the first response, a MEAN over its tokens.

  -l_w / n_w: every answer weighs the same. TRL and LLaMA-Factory take the
  mean over all tokens of a batch, where long answers weigh more:
  `sft_tokens`.

  Args:
    policy: Logps [B, R]; the first response is the one to imitate (chosen).
    ref: unused.
    stats: unused.

  Returns:
    [B] nats per token, and [B] metrics.
  """
  loss = _nll(policy)
  return loss, {"nll": loss}


@needs("rows", "mean_count", reference=False)
def sft_tokens(policy, ref, stats):
  """Negative log-likelihood, a mean over all TOKENS of the global batch.

  -l_w / N, N = stats["mean_count"] the mean of n_w over the global batch: the
  mean of the rows is the cross-entropy a token. "dpo+0.2*sft_tokens" is RPO,
  Pang et al. 2024, as TRL computes it ("sigmoid" with "sft"; TRL's batch is
  one device's micro-batch). The metric "nll" is per row, as of `sft`.
  """
  count = jax.lax.stop_gradient(stats["mean_count"])
  return -policy.sum[:, 0] / count, {"nll": _nll(policy)}


@needs("pairs", reference=False)
def slic(policy, ref, stats, *, room=1.0, nll_weight=0.1):
  """Sequence likelihood calibration, Zhao et al. 2023, as HALOs has it.

  max(0, delta - l_w + l_l) - lambda l_w over SUMS: delta = `room` = 1 nat,
  lambda = `nll_weight` = 0.1 on the summed negative log-likelihood. TRL's
  "hinge" has a reference and no such term: `hinge`.
  """
  l = policy.sum
  loss = jax.nn.relu(room - margin(l)) - nll_weight * l[:, 0]
  return loss, pair_metrics(policy, l)


@needs("pairs", reference=False)
def simpo(policy, ref, stats, *, beta=2.0, gamma=0.5):
  """Simple preference optimisation, Meng et al. 2024, eq. 6.

  -log sigmoid(beta (mean(l_w) - mean(l_l)) - gamma), MEANS over tokens. The
  paper's beta is 2 to 10; defaults as Levanter's. HALOs: beta 10, gamma 3. TRL
  ("simpo" of its CPO trainer): gamma 0.5 with beta 0.1, and CPO's likelihood
  term left on unless cpo_alpha = 0.
  """
  reward = beta * mean(policy.sum, policy)
  loss = -jax.nn.log_sigmoid(margin(reward) - gamma)
  return loss, pair_metrics(policy, reward)


@needs("pairs", reference=False)
def alphapo(policy, ref, stats, *, beta=2.0, gamma=0.5, alpha=0.25):
  """AlphaPO, Gupta et al. 2025: SimPO with a reward of another shape.

  -log sigmoid(beta (r_w - r_l) - gamma), r = (1 - p^-alpha) / alpha with
  p = exp(mean(l)), a MEAN over tokens; alpha = 0 is SimPO, and TRL's default.
  The exponent -alpha mean(l) is held at 80; TRL's p^-alpha of p = 0 is inf.
  """
  l = mean(policy.sum, policy)
  reward = beta * (-bounded_expm1(-alpha * l) / alpha if alpha else l)
  loss = -jax.nn.log_sigmoid(margin(reward) - gamma)
  return loss, pair_metrics(policy, reward)


@needs("pairs", reference=False)
def cpo(policy, ref, stats, *, beta=0.1, nll_weight=1.0):
  """Contrastive preference optimisation, Xu et al. 2024.

  -log sigmoid(beta (l_w - l_l)) over SUMS, plus alpha = `nll_weight` times the
  chosen answer's negative log-likelihood, a MEAN over its tokens as `sft`.
  TRL's likelihood term is a mean over all chosen tokens of a micro-batch:
  nll_weight 0 with "+sft_tokens".
  """
  reward = beta * policy.sum
  loss = -jax.nn.log_sigmoid(margin(reward)) + nll_weight * _nll(policy)
  return loss, pair_metrics(policy, reward)


@needs("pairs", reference=False)
def orpo(policy, ref, stats, *, beta=0.1):
  """Odds ratio preference optimisation, Hong et al. 2024, eq. 4-7.

  NLL_w - beta log sigmoid(o), with x = mean(l) a MEAN over tokens,
  o = (x_w - x_l) - (log1mexp(x_w) - log1mexp(x_l)), log1mexp(x) =
  log(1 - e^x); beta is the paper's lambda, 0.1. NLL_w is a mean over the
  chosen answer's tokens; TRL's and tunix' is over prompt and answer (TRL: of
  all rows together). x is held at -1e-7, as tunix does: a certain answer has
  infinite odds. EasyDeL and LLaMA-Factory compute log1p(-e^x) as it stands.
  """
  x = mean(policy.sum, policy)
  sure = jnp.minimum(x, SURE)
  log_odds = margin(sure - _log1mexp(sure))
  loss = _nll(policy) - beta * jax.nn.log_sigmoid(log_odds)
  return loss, pair_metrics(policy, beta * x) | {"log_odds": log_odds}


def _log1mexp(x):
  """log(1 - e^x) for x < 0, to 1e-7 absolute in float32 and exact near 0,
  where log1p(-e^x) is not; the sum it enters is of the size of x."""
  return jnp.log(-jnp.expm1(x))
