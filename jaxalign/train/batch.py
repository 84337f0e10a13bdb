"""The types that a training step takes: a batch, and log-probabilities."""

from flax import struct
import jax

from jaxalign.train.packing import Packed


@struct.dataclass
class Logps:
  """Log-probabilities of R responses a row, as float32 sums and counts."""

  sum: jax.Array  # [B, R] nats, over response tokens with their EOS
  count: jax.Array | None = None  # [B, R] response tokens, at least 1
  # [B, R] nats of the first min(counts) tokens of a row's responses (LD-DPO).
  common_prefix: jax.Array | None = None


@struct.dataclass
class MismatchedBatch:
  """KTO's rows of one prompt and another's answer, as many as in the batch."""

  tokens: jax.Array | Packed  # [A, b, 1, L]
  mask: jax.Array  # [A, b, 1, L]
  ref_sum: jax.Array  # [A, b, 1] nats of the reference


@struct.dataclass
class Batch:
  """A micro-batches of b rows of R responses each: one update.

  Padded rows have token ids [A, b, R, L] and a mask that is 1 on response
  tokens; packed ones a `Packed` and the counts of response tokens
  [A, b, R, 1].
  """

  tokens: jax.Array | Packed
  mask: jax.Array
  ref: Logps  # [A, b, R] of the frozen reference
  label: jax.Array | None = None  # [A, b] bool: unpaired feedback
  # [A, b] each: what a loss reads of its rows, by name ("weights").
  columns: dict[str, jax.Array] = struct.field(default_factory=dict)
  mismatched: MismatchedBatch | None = None
  lr: jax.Array | float = 0.0  # the learning rate of this update

  def micro(self) -> "Batch":
    """What every micro-batch has its own part of."""
    return self.replace(mismatched=None, lr=None)
