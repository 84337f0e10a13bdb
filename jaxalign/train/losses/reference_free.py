"""Losses that need no reference."""

from jaxalign.train.losses import needs


@needs("rows")
def sft(policy, ref, stats):
  """Negative log-likelihood of the first response, a mean over its tokens.

  Args:
    policy: Logps [B, R]; the first response is the one to imitate (chosen).
    ref: unused.
    stats: unused.

  Returns:
    [B] nats per token, and [B] metrics.
  """
  del ref, stats
  loss = -policy.sum[:, 0] / policy.count[:, 0]
  return loss, {"nll": loss}
