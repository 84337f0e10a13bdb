"""Losses on pairs, against a frozen reference.

Every one takes Logps [B, 2], chosen then rejected, of policy and reference,
and returns [B] values and [B] metrics. `beta` > 0 is the strength of the pull
to the reference; "rewards/..." are always beta r over sums, whatever the loss
makes of r. "Initially" is where policy equals reference: r = 0 exactly.
"""

import jax
import jax.numpy as jnp

from jaxalign.train.losses.common import (
  bounded_exp,
  bounded_expm1,
  margin,
  mean,
  needs,
  pair_metrics,
  ratios,
  smoothed,
)


@needs("pairs")
def dpo(policy, ref, stats, *, beta=0.1, label_smoothing=0.0):
  """Direct preference optimisation, Rafailov et al. 2023, eq. 7.

  -(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D), with
  D = (policy_w - ref_w) - (policy_l - ref_l) over SUMS of log-probabilities.
  With eps > 0 this is cDPO; TRL's "sigmoid" ignores its label_smoothing.

  Args:
    policy: Logps [B, 2], chosen then rejected.
    ref: Logps [B, 2] of the frozen reference.
    stats: unused.
    beta: strength of the pull to the reference, > 0.
    label_smoothing: eps in [0, 0.5), the fraction of labels thought wrong.

  Returns:
    [B] loss in nats (ln 2 where policy equals reference), and [B] metrics.
  """
  reward = beta * ratios(policy, ref)
  loss = smoothed(margin(reward), label_smoothing)
  return loss, pair_metrics(policy, reward)


@needs("pairs")
def robust(policy, ref, stats, *, beta=0.1, label_smoothing=0.1):
  """Provably robust DPO, Chowdhury et al. 2024: unbiased under flips.

  [-(1 - eps) log sigmoid(beta D) + eps log sigmoid(-beta D)] / (1 - 2 eps),
  sums. eps in [0, 0.5) is the rate of flipped labels; 0.1 as the paper, TRL's
  default 0 is plain DPO. Unlike cDPO the second sign is a plus, so the value
  falls below 0 without bound as D grows. Initially ln 2.
  """
  reward = beta * ratios(policy, ref)
  z, eps = margin(reward), label_smoothing
  loss = -(1 - eps) * jax.nn.log_sigmoid(z) + eps * jax.nn.log_sigmoid(-z)
  return loss / (1 - 2 * eps), pair_metrics(policy, reward)


@needs("pairs")
def hinge(policy, ref, stats, *, beta=0.1):
  """max(0, 1 - beta D) over sums, Zhao et al. 2023 with Rafailov's reward.

  TRL's "hinge". `slic` is the one without a reference. Initially 1; the
  gradient is 0 from the kink on.
  """
  reward = beta * ratios(policy, ref)
  return jax.nn.relu(1 - margin(reward)), pair_metrics(policy, reward)


@needs("pairs")
def ipo(policy, ref, stats, *, beta=0.1):
  """Identity preference optimisation, Azar et al. 2023, eq. 17, per token.

  (mean(r_w) - mean(r_l) - 1 / (2 beta))^2 with each r over its own token
  count; beta is the paper's tau. The MEAN is what the paper's authors say
  they ran, and TRL, HALOs, EasyDeL and LLaMA-Factory do; the original DPO code
  and OpenRLHF take sums: `ipo_sum`. Initially 1 / (4 beta^2).
  """
  r = ratios(policy, ref)
  gap = margin(mean(r, policy))
  return (gap - 1 / (2 * beta)) ** 2, pair_metrics(policy, beta * r)


@needs("pairs")
def ipo_sum(policy, ref, stats, *, beta=0.1):
  """IPO over sums: (D - 1 / (2 beta))^2, Azar et al. 2023, eq. 17 as printed.

  The original DPO code and OpenRLHF; the value grows with the squared length.
  Initially 1 / (4 beta^2).
  """
  r = ratios(policy, ref)
  return (margin(r) - 1 / (2 * beta)) ** 2, pair_metrics(policy, beta * r)


@needs("pairs")
def dpo_norm(policy, ref, stats, *, beta=5.0):
  """Length-normalised DPO: -log sigmoid(beta (mean(r_w) - mean(r_l))).

  The MEAN over each answer's own tokens. Gaps a token are small: open-instruct
  uses beta near 5, the default here; TRL's "sigmoid_norm" keeps 0.1, which is
  wrong for it. Initially ln 2.
  """
  r = ratios(policy, ref)
  z = beta * margin(mean(r, policy))
  return -jax.nn.log_sigmoid(z), pair_metrics(policy, beta * r)


@needs("pairs")
def exo(policy, ref, stats, *, beta=0.1, epsilon=1e-3):
  """Efficient exact optimisation on pairs, Ji et al. 2024, eq. 16: reverse KL.

  With q = sigmoid(beta D) over sums:
  q [ln q - ln(1 - eps)] + (1 - q) [ln(1 - q) - ln eps], the KL from q to the
  labels softened by eps in (0, 0.5). The paper's 1e-3; at 0 it is infinite
  (TRL, where eps is its label_smoothing, refuses 0 and rounds eps to float32).
  Initially -ln 2 - (ln eps + ln(1 - eps)) / 2.
  """
  reward = beta * ratios(policy, ref)
  z = margin(reward)
  up = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log1p(-epsilon))
  down = jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - jnp.log(epsilon))
  return up + down, pair_metrics(policy, reward)


@needs("pairs")
def nca(policy, ref, stats, *, beta=0.1):
  """Noise contrastive alignment on pairs, Chen et al. 2024.

  -log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w)
  - 1/2 log sigmoid(-beta r_l), sums: the chosen answer's likelihood is held up
  by itself, not by the gap. TRL's "nca_pair". Initially 2 ln 2.
  """
  reward = beta * ratios(policy, ref)
  w, l = reward[:, 0], reward[:, 1]
  loss = (
    -jax.nn.log_sigmoid(w)
    - 0.5 * jax.nn.log_sigmoid(-w)
    - 0.5 * jax.nn.log_sigmoid(-l)
  )
  return loss, pair_metrics(policy, reward)


@needs("pairs", "delta")
def bco_pair(policy, ref, stats, *, beta=0.1):
  """Binary classifier optimisation on pairs, Jung et al. 2024.

  -log sigmoid(beta r_w - delta) - log sigmoid(-(beta r_l - delta)), sums.
  stats["delta"] is the running mean of all rewards (`statistics.delta`),
  without gradient. TRL's "bco_pair" has delta = 0 always; EasyDeL takes the
  batch's mean and lets the gradient through; LLaMA-Factory a running mean.
  Initially (delta 0) 2 ln 2.
  """
  delta = jax.lax.stop_gradient(stats["delta"])
  reward = beta * ratios(policy, ref)
  liked = -jax.nn.log_sigmoid(reward[:, 0] - delta)
  loss = liked - jax.nn.log_sigmoid(-(reward[:, 1] - delta))
  metrics = pair_metrics(policy, reward)
  return loss, metrics | {"delta": jnp.ones_like(loss) * delta}


@needs("pairs")
def sppo(policy, ref, stats, *, beta=0.1):
  """Self-play preference optimisation with hard labels, Wu et al. 2024.

  (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, sums: the paper's win
  probabilities (eq. 4.7) set to 1 and 0, eta = 1 / beta. TRL's "sppo_hard".
  Initially 1 / (2 beta^2).
  """
  r = ratios(policy, ref)
  loss = (r[:, 0] - 1 / (2 * beta)) ** 2 + (r[:, 1] + 1 / (2 * beta)) ** 2
  return loss, pair_metrics(policy, beta * r)


@needs("pairs")
def apo_zero(policy, ref, stats, *, beta=0.1):
  """Anchored preference optimisation, zero: D'Oosterlinck et al. 2024, eq. 7.

  [1 - sigmoid(beta r_w)] + sigmoid(beta r_l), sums: chosen up, rejected down;
  for answers better than the model's own. Initially 1.
  """
  reward = beta * ratios(policy, ref)
  loss = jax.nn.sigmoid(-reward[:, 0]) + jax.nn.sigmoid(reward[:, 1])
  return loss, pair_metrics(policy, reward)


@needs("pairs")
def apo_down(policy, ref, stats, *, beta=0.1):
  """Anchored preference optimisation, down: D'Oosterlinck et al. 2024, eq. 8.

  sigmoid(beta r_w) + [1 - sigmoid(beta D)], sums: both down, the rejected one
  further; for answers worse than the model's own. Initially 1.
  """
  reward = beta * ratios(policy, ref)
  loss = jax.nn.sigmoid(reward[:, 0]) + jax.nn.sigmoid(-margin(reward))
  return loss, pair_metrics(policy, reward)


@needs("pairs")
def discopop(policy, ref, stats, *, beta=0.1, tau=0.05):
  """Discovered preference optimisation, Lu et al. 2024, eq. 5 (LRML).

  (1 - m) (-log sigmoid(z)) + m e^-z with z = beta D over sums and
  m = sigmoid(z / tau). TRL multiplies m by e^-z, which is 0 * inf = NaN from
  z = -710 on (-88 in float32); one exponent, bounded at 80, is not.
  Initially (1 + ln 2) / 2.
  """
  reward = beta * ratios(policy, ref)
  z = margin(reward)
  logistic = -jax.nn.sigmoid(-z / tau) * jax.nn.log_sigmoid(z)
  exponential = bounded_exp(jax.nn.log_sigmoid(z / tau) - z)
  return logistic + exponential, pair_metrics(policy, reward)


@needs("pairs")
def dpop(policy, ref, stats, *, beta=0.1, penalty=50.0):
  """DPO-Positive, Pal et al. 2024 (Smaug).

  -log sigmoid(beta [D - lambda max(0, ref_w - policy_w)]), sums: a chosen
  answer less likely than under the reference is punished lambda = `penalty`
  times; 50 as the paper (5 to 500 are used). The slope at the kink is 0, so
  the first update is DPO's. Initially ln 2.
  """
  r = ratios(policy, ref)
  z = beta * (margin(r) - penalty * jax.nn.relu(-r[:, 0]))
  return -jax.nn.log_sigmoid(z), pair_metrics(policy, beta * r)


@needs("pairs", extras=("common_prefix",))
def ld_dpo(policy, ref, stats, *, beta=0.1, tail_weight=0.5):
  """Length-desensitised DPO, Liu et al. 2024.

  DPO on sums whose tokens past L = min(n_w, n_l) weigh alpha = `tail_weight`
  in [0, 1]: prefix + alpha (sum - prefix), of policy AND reference: initially
  ln 2. LLaMA-Factory weighs the policy only. 1 is DPO, 0 drops the tail.
  `Logps.common_prefix` [B, 2] holds the sums over the first L tokens.
  """

  def weighed(x):
    return x.common_prefix + tail_weight * (x.sum - x.common_prefix)

  reward = beta * (weighed(policy) - weighed(ref))
  return -jax.nn.log_sigmoid(margin(reward)), pair_metrics(policy, reward)


# DPO under other divergences than the reverse KL: Wang et al. 2024 (f-DPO).
#
# -log sigmoid(beta (s(r_w) - s(r_l))) with s = f' of the divergence at exp(r),
# over sums, up to a constant that no difference sees; s(r) = r is plain DPO.
# Those with an exponential are shifted to s(0) = 0, which keeps float32 exact
# near r = 0. Initially ln 2. TRL lets an f-divergence into hinge, IPO,
# EXO, robust and DiscoPOP too; the paper derives the logistic form only, and
# so do these.


def _logistic(policy, r, scores, beta):
  """The loss on scores [B, 2]; the rewards logged are beta r, as TRL's."""
  loss = -jax.nn.log_sigmoid(beta * margin(scores))
  return loss, pair_metrics(policy, beta * r)


@needs("pairs")
def dpo_forward_kl(policy, ref, stats, *, beta=0.1):
  """f-DPO with the forward KL: s(r) = 1 - e^-r.

  An answer far less likely than under the reference dominates. The exponent
  is held at 80 nats, past which the slope is 0; TRL's is not held and ends in
  infinity.
  """
  r = ratios(policy, ref)
  return _logistic(policy, r, -bounded_expm1(-r), beta)


@needs("pairs")
def dpo_js(policy, ref, stats, *, beta=0.1):
  """f-DPO with the Jensen-Shannon divergence: s(r) = log sigmoid(r).

  Bounded above: nothing is gained by ever more likely answers.
  """
  r = ratios(policy, ref)
  return _logistic(policy, r, jax.nn.log_sigmoid(r), beta)


@needs("pairs")
def dpo_alpha(policy, ref, stats, *, beta=0.1, alpha=0.5):
  """f-DPO with the alpha divergence: s(r) = (e^((a - 1) r) - 1) / (a - 1).

  a = `alpha`, 0.5 as TRL: 1 is the reverse KL, the limit, where this is
  plain DPO; 0 is the forward KL. The exponent is held at 80.
  """
  r, power = ratios(policy, ref), alpha - 1
  scores = r if power == 0 else bounded_expm1(power * r) / power
  return _logistic(policy, r, scores, beta)


# Alignment by optimal transport: pairs sorted over the global batch.
#
# Sorting couples rows, so a micro-batch alone cannot know its value: sorted on
# one device's rows, as TRL does, the loss depends on how the batch is cut. Here
# a step takes the log-probabilities of its whole global batch first, without
# gradient, and `statistics.matched_*` tells every row which value of the other
# side has its rank. Ranks are constant almost everywhere, so the gradient of
# the sorted loss is each row's own, and sums over rows add up over any cut.


@needs("pairs", "matched_margins")
def aot(policy, ref, stats, *, beta=0.1, label_smoothing=0.0):
  """Alignment by optimal transport, paired: Melnyk et al. 2024.

  With P = sort(policy_w - policy_l) and R = sort(ref_w - ref_l) over the
  GLOBAL batch, the mean over ranks k of cDPO's form at beta (P_k - R_k), sums.
  A row's value is the one at its policy margin's rank; stats
  ["matched_margins"] [B] is R there. TRL sorts a device's micro-batch.
  Initially ln 2.
  """
  matched = jax.lax.stop_gradient(stats["matched_margins"])
  z = beta * (margin(policy.sum) - matched)
  loss = smoothed(z, label_smoothing)
  return loss, pair_metrics(policy, beta * ratios(policy, ref))


@needs("pairs", "matched_ratios")
def aot_unpaired(policy, ref, stats, *, beta=0.1, label_smoothing=0.0):
  """Alignment by optimal transport, unpaired: Melnyk et al. 2024.

  With W = sort(r_w) and L = sort(r_l) over the GLOBAL batch, the mean over
  ranks k of cDPO's form at beta (W_k - L_k), sums. A row is in two terms, of
  its chosen and of its rejected answer's rank: its value is half of each, its
  gradient all of each, so that means over the batch and their gradients are
  the sorted loss's. stats["matched_ratios"] [B, 2] is
  `statistics.matched_ratios`. TRL sorts a device's micro-batch. Initially
  ln 2.
  """
  matched = jax.lax.stop_gradient(stats["matched_ratios"])
  r = ratios(policy, ref)
  value = lambda gap: smoothed(beta * gap, label_smoothing)
  both = value(r[:, 0] - matched[:, 0]) + value(matched[:, 1] - r[:, 1])
  loss = both - jax.lax.stop_gradient(0.5 * both)
  return loss, pair_metrics(policy, beta * r)
