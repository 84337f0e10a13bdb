"""Losses: one documented function each, one value a row, nothing reduced.

A loss takes the policy's and the reference's `Logps` and the batch statistics
it declared with `@needs`; a fork adds one function and one line to `LOSSES`.
"""

from typing import Callable


def needs(kind: str, *stats: str) -> Callable:
  """Declares the rows a loss eats ("pairs" or "thumbs") and its statistics.

  Known statistics: "label" [B] bool, "z0" (scalar nats, gradient-free, over
  the global batch).
  """
  def mark(fn):
    fn.kind, fn.stats = kind, stats
    return fn
  return mark


from jaxalign.train.losses.pair import dpo  # noqa: E402
from jaxalign.train.losses.reference_free import sft  # noqa: E402
from jaxalign.train.losses.unpaired import kto  # noqa: E402

LOSSES = {"dpo": dpo, "kto": kto, "sft": sft}
