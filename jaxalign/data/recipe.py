"""What a config leaves open, settled by what is trained and on what rows.

A pretrained model wants another recipe than a small one that is trained on the
spot, and single answers another loss than pairs. What a person sets stays.
"""

from typing import Any

from jaxalign.core.errors import JaxalignError
from jaxalign.data import prepare

LORA_LR = 2e-4  # of adapters, whatever they are put on


def settle(c: Any) -> None:
  """Fills config.loss.name and config.train.lr where they are not set.

  Args:
    c: the config, changed in place; settling twice changes nothing.
  """
  given = bool(c.model.checkpoint)
  if not c.loss.name:
    c.loss.name = (
      "kto"
      if _kind(c) == "unpaired"
      else "dpo(beta=0.1)"
      if given
      else "dpo(beta=0.5)+0.2*sft"
    )
  if c.train.lr == 0:
    c.train.lr = LORA_LR if c.lora.rank else 5e-7 if given else 4e-4


def _kind(c: Any) -> str:
  """What the rows are; "pairs" if unreadable, which is reported later."""
  if c.data.assume or not c.data.source:
    return "pairs"
  try:
    return prepare.first_kind(c)
  except JaxalignError:
    return "pairs"
