"""What a config leaves open, settled by what is trained and on what rows.

A pretrained model wants another recipe than a small one that is trained on the
spot, and single answers another loss than pairs. What a person sets stays.
"""

from typing import Any

from jaxalign.core.errors import JaxalignError
from jaxalign.data import prepare

LORA_LR = 2e-4  # of adapters, whatever they are put on
_PRETRAINED = ("dpo(beta=0.1)", 5e-7)
_TRAINED_HERE = ("dpo(beta=0.5)+0.2*sft", 4e-4)


def settle(c: Any) -> None:
  """Fills config.loss.name and config.train.lr where they are not set.

  Args:
    c: the config, changed in place; settling twice changes nothing.
  """
  loss, lr = _PRETRAINED if c.model.checkpoint else _TRAINED_HERE
  if not c.loss.name:
    c.loss.name = "kto" if _is_unpaired(c) else loss
  if c.train.lr == 0:
    c.train.lr = LORA_LR if c.lora.rank else lr


def _is_unpaired(c: Any) -> bool:
  """Whether rows are single answers; unreadable ones are reported later."""
  if c.data.assume or not c.data.source or prepare.is_world(c):
    return False
  try:
    return prepare.load_sources(c, limit=20).kind == "unpaired"
  except JaxalignError:
    return False
