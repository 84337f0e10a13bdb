"""Producers of log-probabilities; all keep one contract, `Logps`."""

from typing import NamedTuple

import jax


class Logps(NamedTuple):
  """Log-probabilities of R responses a row, as float32 sums and counts."""

  sum: jax.Array  # [B, R] nats, over response tokens with their EOS
  count: jax.Array  # [B, R] response tokens, at least 1


from jaxalign.train.logps.chunked import chunked  # noqa: E402

PRODUCERS = {"chunked": chunked}
