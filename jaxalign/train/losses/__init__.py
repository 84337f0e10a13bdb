"""Losses: one documented function each, one value a row, nothing reduced.

A loss takes the policy's and the reference's `Logps` and the batch statistics
it declared with `@needs`; a fork adds one function and one line to `LOSSES`.
Throughout, with sums over response tokens (their EOS included),

  r = policy - ref, D = r_w - r_l (w chosen, l rejected), n the token count,
  mean(x) = x / n, log sigmoid in its stable form.

`combine.find` reads a name of a config, weighted sums such as "dpo+0.2*sft"
included; `bind` checks and binds the keywords.
"""

from collections.abc import Callable
import functools
import inspect
import math
from numbers import Real
from typing import Any

from jaxalign.core.errors import ConfigError


def needs(
  kind: str, *stats: str, extras: tuple[str, ...] = (), reference: bool = True
) -> Callable:
  """Declares the rows a loss eats and what it reads beside sums and counts.

  Args:
    kind: "pairs" ([B, 2]), "unpaired" ([B, 1] and a label) or "rows" ([B, R]).
    *stats: keys of `stats`: "label" [B] bool; "z0", a scalar in nats; "delta",
      a scalar reward (`unpaired.update_delta`); "weights" [B]
      (`matching.density_ratios`); "mean_count", the mean number of tokens of
      a first response; and the keys of GLOBAL. All are over the global batch
      of an update, every micro-batch and device, and carry no gradient.
    extras: fields of Logps beside sum and count, of policy and reference.
    reference: whether `ref` is read at all.
  """

  def mark(fn):
    fn.kind, fn.stats = kind, stats
    fn.extras, fn.reference = extras, reference
    return fn

  return mark


from jaxalign.train.losses import (
  aot,  # noqa: E402
  divergences,  # noqa: E402
  pair,  # noqa: E402
  reference_free,  # noqa: E402
  unpaired,  # noqa: E402
)

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
  "aot": aot.aot,
  "aot_unpaired": aot.aot_unpaired,
  "dpo_forward_kl": divergences.dpo_forward_kl,
  "dpo_js": divergences.dpo_js,
  "dpo_alpha": divergences.dpo_alpha,
  # Pairs, without a reference.
  "slic": reference_free.slic,
  "simpo": reference_free.simpo,
  "alphapo": reference_free.alphapo,
  "cpo": reference_free.cpo,
  "orpo": reference_free.orpo,
  # Thumbs.
  "kto": unpaired.kto,
  "bco": unpaired.bco,
  "bco_udm": unpaired.bco_udm,
  "apo_zero_unpaired": unpaired.apo_zero_unpaired,
  # Imitation: it prefers nothing, and is there to be added.
  "sft": reference_free.sft,
  "sft_tokens": reference_free.sft_tokens,
}

# Statistics that a step takes from the sums [N, 2] of policy and reference
# over its whole global batch, before the micro-batches: name -> function.
GLOBAL = {
  "matched_margins": aot.matched_margins,
  "matched_ratios": aot.matched_ratios,
}

# Keywords mean the same in every loss; so do their ranges.
LIMITS = {
  "beta": (lambda x: 0 < x < math.inf, "more than 0"),
  "label_smoothing": (lambda x: 0 <= x < 0.5, "0 or more, less than 0.5"),
  "epsilon": (lambda x: 0 < x < 0.5, "more than 0, less than 0.5"),
  "tau": (lambda x: 0 < x < math.inf, "more than 0"),
  "tail_weight": (lambda x: 0 <= x <= 1, "from 0 to 1"),
  "alpha": (math.isfinite, "a finite number"),
  "gamma": (math.isfinite, "a finite number"),
  **dict.fromkeys(
    ("penalty", "nll_weight", "room", "desirable", "undesirable"),
    (lambda x: 0 <= x < math.inf, "0 or more"),
  ),
}


def check_keywords(kwargs: dict[str, Any], name: str, knob: str) -> None:
  """Raises ConfigError for a keyword outside its range; see LIMITS."""
  for key, value in kwargs.items():
    holds, wanted = LIMITS.get(key, (lambda x: True, ""))
    if key in LIMITS and (not isinstance(value, Real) or not holds(value)):
      raise ConfigError(
        f"loss {name!r} got {key}={value!r}, wanted {wanted}; set config.{knob}"
      )


def bind(fn: Callable, name: str, kwargs: dict[str, Any]) -> Callable:
  """A loss with its keywords bound and its declarations kept.

  Those given here go over what stands in the brackets of the name.

  Args:
    fn: from `combine.find`.
    name: config.loss.name, for messages.
    kwargs: config.loss.kwargs.

  Raises:
    ConfigError: a keyword the loss does not take, or outside its range.
  """
  known = [
    p.name
    for p in inspect.signature(fn).parameters.values()
    if p.kind == p.KEYWORD_ONLY
  ]
  for key in kwargs:
    if key not in known:
      raise ConfigError(
        f"loss {name!r} takes no {key!r}; it takes "
        f"{', '.join(known) or 'no keywords'}; set "
        "config.loss.kwargs"
      )
  check_keywords(kwargs, name, "loss.kwargs")
  bound = functools.partial(fn, **kwargs)
  bound.__dict__.update(
    kind=fn.kind,
    stats=fn.stats,
    extras=getattr(fn, "extras", ()),
    reference=getattr(fn, "reference", True),
  )
  return bound
