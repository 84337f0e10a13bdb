"""DPO under other divergences than the reverse KL: Wang et al. 2024 (f-DPO).

-log sigmoid(beta (s(r_w) - s(r_l))) with s = f' of the divergence at
exp(r), over sums, up to a constant that no difference sees; s(r) = r is plain
DPO. Those with an exponential are shifted to s(0) = 0, which keeps float32
exact near the start. At the start ln 2. TRL lets an f-divergence into hinge,
IPO, EXO, robust and DiscoPOP too; the paper derives the logistic form only,
and so do these.
"""

import jax
import jax.numpy as jnp

from jaxalign.train.losses import needs
from jaxalign.train.losses.common import (
  margin,
  MAX_EXPONENT,
  pair_metrics,
  ratios,
)


def _expm1(x):
  """e^x - 1 with the exponent held at 80, where float32 still is finite."""
  return jnp.expm1(jnp.minimum(x, MAX_EXPONENT))


def _logistic(policy, r, scores, beta):
  """The loss on scores [B, 2]; the rewards logged are beta r, as TRL's."""
  return (
    -jax.nn.log_sigmoid(beta * margin(scores)),
    pair_metrics(policy, beta * r),
  )


@needs("pairs")
def dpo_forward_kl(policy, ref, stats, *, beta=0.1):
  """f-DPO with the forward KL: s(r) = 1 - e^-r.

  An answer far less likely than under the reference dominates. The exponent
  is held at 80 nats, past which the slope is 0; TRL's is not held and ends in
  infinity.
  """
  del stats
  r = ratios(policy, ref)
  return _logistic(policy, r, -_expm1(-r), beta)


@needs("pairs")
def dpo_js(policy, ref, stats, *, beta=0.1):
  """f-DPO with the Jensen-Shannon divergence: s(r) = log sigmoid(r).

  Bounded above: nothing is gained by ever more likely answers.
  """
  del stats
  r = ratios(policy, ref)
  return _logistic(policy, r, jax.nn.log_sigmoid(r), beta)


@needs("pairs")
def dpo_alpha(policy, ref, stats, *, beta=0.1, alpha=0.5):
  """f-DPO with the alpha divergence: s(r) = (e^((a - 1) r) - 1) / (a - 1).

  a = `alpha`, 0.5 as TRL: 1 is the reverse KL, the limit, where this is
  plain DPO; 0 is the forward KL. The exponent is held at 80.
  """
  del stats
  r, power = ratios(policy, ref), alpha - 1
  scores = r if power == 0 else _expm1(power * r) / power
  return _logistic(policy, r, scores, beta)
