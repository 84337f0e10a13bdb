"""Losses: one documented function each, one value a row, nothing reduced.

A loss takes the policy's and the reference's `Logps` and the batch statistics
it declared with `@needs`; a fork adds one function and one line to `LOSSES`.
Throughout, with sums over response tokens (their EOS included),

  r = policy - ref, D = r_w - r_l (w chosen, l rejected), n the token count,
  mean(x) = x / n, log sigmoid in its stable form.

`find` reads a name of a config, weighted sums such as "dpo+0.2*sft" included;
`bind` checks and binds the keywords.
"""

from collections.abc import Callable
from typing import Any

from jaxalign.core import lookup
from jaxalign.core.errors import ConfigError
from jaxalign.train.losses import pair, reference_free, unpaired
from jaxalign.train.losses.combine import (
  bind,
  check_ranges,
  weight_of,
  weighted_sum,
)
from jaxalign.train.losses.common import needs

__all__ = ["bind", "find", "LOSSES", "needs"]

LOSSES = {
  # Pairs, against a frozen reference.
  "dpo": pair.dpo,
  "robust": pair.robust,
  "ipo": pair.ipo,
  "ipo_sum": pair.ipo_sum,
  "hinge": pair.hinge,
  "dpo_norm": pair.dpo_norm,
  "exo": pair.exo,
  "nca": pair.nca,
  "bco_pair": pair.bco_pair,
  "sppo": pair.sppo,
  "apo_zero": pair.apo_zero,
  "apo_down": pair.apo_down,
  "discopop": pair.discopop,
  "dpop": pair.dpop,
  "ld_dpo": pair.ld_dpo,
  "aot": pair.aot,
  "aot_unpaired": pair.aot_unpaired,
  "dpo_forward_kl": pair.dpo_forward_kl,
  "dpo_js": pair.dpo_js,
  "dpo_alpha": pair.dpo_alpha,
  # Pairs, without a reference.
  "slic": reference_free.slic,
  "simpo": reference_free.simpo,
  "alphapo": reference_free.alphapo,
  "cpo": reference_free.cpo,
  "orpo": reference_free.orpo,
  # Unpaired feedback.
  "kto": unpaired.kto,
  "bco": unpaired.bco,
  "bco_udm": unpaired.bco_udm,
  "apo_zero_unpaired": unpaired.apo_zero_unpaired,
  # Imitation: it prefers nothing, and is there to be added.
  "sft": reference_free.sft,
  "sft_tokens": reference_free.sft_tokens,
}


def find(name: str) -> Callable:
  """The loss a config names: a key of LOSSES, "module:function", or a sum.

  "0.8*dpo+0.2*bco_pair+sft" is that weighted sum (MPO), "dpo+0.2*sft" is RPO;
  a weight of 1 need not be written. "dpo(beta=0.5)+sft" binds a keyword of one
  term. See `weighted_sum` for keywords of all.

  Raises:
    ConfigError: an unknown loss or keyword, a function without the marks of
      `needs`, a keyword out of its range, a weight that is none, or losses on
      rows of different kinds.
  """
  terms = []
  for *factors, term in lookup.parse(name, "+", "loss", "loss.name"):
    fn = lookup.find(LOSSES, term, "loss", "loss.name")
    if not hasattr(fn, "kind"):
      raise ConfigError(
        f"loss {str(term)!r} does not say what it reads; mark the function "
        "with jaxalign.train.losses.needs, or set config.loss.name"
      )
    check_ranges(lookup.bound_keywords(fn), name, "loss.name")
    terms.append((weight_of(factors, name), term.name, fn))
  if len(terms) == 1 and terms[0][0] == 1.0:
    return terms[0][2]
  return weighted_sum(terms)


def loss_of(c: Any) -> Callable:
  """The loss of a config with its keywords bound; they are checked."""
  return bind(find(c.loss.name), c.loss.name, c.loss.kwargs.to_dict())
