"""What process 0 knows, on every process."""

from collections.abc import Callable

import jax
from jax.experimental import multihost_utils
import numpy as np


def from_first(make: Callable[[], str]) -> str:
  """The text that `make` gives process 0, which alone calls it, on all."""
  if jax.process_count() == 1:
    return make()
  text = np.zeros(1024, np.uint8)
  if jax.process_index() == 0:
    data = make().encode()
    text[: len(data)] = np.frombuffer(data, np.uint8)
  text = np.asarray(multihost_utils.broadcast_one_to_all(text))
  return text.tobytes().rstrip(b"\0").decode()
