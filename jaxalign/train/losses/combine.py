"""Keywords of losses, bound and checked, and weighted sums of losses."""

from collections.abc import Callable
import functools
import inspect
import math
from numbers import Real
from typing import Any

from jaxalign.core import lookup
from jaxalign.core.errors import ConfigError
from jaxalign.train.losses.common import marks

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


def check_ranges(kwargs: dict[str, Any], name: str, knob: str) -> None:
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
    fn: from `losses.find`.
    name: config.loss.name, for messages.
    kwargs: config.loss.kwargs.

  Raises:
    ConfigError: a keyword the loss does not take, or outside its range.
  """
  known = lookup.keywords(fn)
  lookup.check_keywords(kwargs, known, f"loss {name!r}", "loss.kwargs")
  check_ranges(kwargs, name, "loss.kwargs")
  bound = functools.partial(fn, **kwargs)
  bound.__dict__.update(marks(fn))
  return bound


def weight_of(factors: list[lookup.Term | float], name: str) -> float:
  """The one number before a term of the loss `name`, or 1."""
  if not factors:
    return 1.0
  weight = factors[0] if len(factors) == 1 else None
  if isinstance(weight, float) and 0 < weight < math.inf:
    return weight
  text = "*".join(f"{x:g}" if isinstance(x, float) else str(x) for x in factors)
  raise ConfigError(
    f"loss {name!r} has the weight {text!r}, wanted a number above 0, as in "
    "'dpo+0.2*sft'; set config.loss.name"
  )


def weighted_sum(terms: list[tuple[float, str, Callable]]) -> Callable:
  """One loss of several: sum of weight * loss, row by row.

  Each term is given the keywords that it takes: `beta` reaches every term
  that has one (as in TRL, whose losses share theirs), and a keyword that is
  not given keeps each term's own default. Metrics of one name are those of
  the first term that has it; "loss/<name>" is each term's own value, and
  "preference_loss" the sum without what only imitates.

  Args:
    terms: (weight, name, loss) in order.

  Returns:
    A loss whose kind, stats, extras and keywords are those of its terms.

  Raises:
    ConfigError: pairs, unpaired and imitation do not mix; "rows" mix with pairs
      only: of unpaired rows an undesirable answer would be imitated too.
  """
  names = [key for _, key, _ in terms]
  each = [marks(fn) for *_, fn in terms]
  kinds = {x["kind"] for x in each}
  if len(kinds) > 1 and kinds != {"pairs", "rows"}:
    listed = ", ".join(f"{n} {x['kind']}" for n, x in zip(names, each))
    raise ConfigError(
      f"losses of different rows cannot be summed ({listed}); "
      "set config.loss.name"
    )
  if len(set(names)) < len(names):
    raise ConfigError(
      f"a loss is summed twice ({', '.join(names)}); set config.loss.name"
    )
  takes = [lookup.keywords(fn) for *_, fn in terms]

  def loss_fn(policy, ref, stats, **kwargs):
    total, prefers, metrics, own = 0.0, 0.0, {}, {}
    for name, (weight, _, fn), known in zip(names, terms, takes):
      given = {n: kwargs[n] for n in known if n in kwargs}
      loss, extra = fn(policy, ref, stats, **given)
      total = total + weight * loss
      if fn.kind != "rows":
        prefers = prefers + weight * loss
      metrics = extra | metrics
      own[f"loss/{name}"] = loss
    if len(kinds) > 1:
      own["preference_loss"] = prefers
    return total, metrics | own

  positional = list(inspect.signature(loss_fn).parameters.values())[:3]
  named = {n: p for known in reversed(takes) for n, p in known.items()}
  loss_fn.__signature__ = inspect.Signature([*positional, *named.values()])
  loss_fn.terms = tuple(fn for *_, fn in terms)
  loss_fn.kind = "pairs" if len(kinds) > 1 else min(kinds)
  for field in ("stats", "extras"):
    found = dict.fromkeys(name for x in each for name in x[field])
    setattr(loss_fn, field, tuple(found))
  loss_fn.reference = any(x["reference"] for x in each)
  return loss_fn
