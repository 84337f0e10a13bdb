"""Weighted sums of losses, by name: "dpo+0.2*sft" is RPO."""

from collections.abc import Callable
import inspect
import math

from jaxalign.core import lookup
from jaxalign.core.errors import ConfigError
from jaxalign.train.losses import check_keywords, LOSSES


def find(name: str) -> Callable:
  """The loss a config names: a key of LOSSES, "module:function", or a sum.

  "0.8*dpo+0.2*bco_pair+sft" is that weighted sum (MPO); a weight of 1 need not
  be written. "dpo(beta=0.5)+sft" binds a keyword of one term. See
  `weighted_sum` for keywords of all.

  Raises:
    ConfigError: an unknown loss or keyword, a function without the marks of
      `needs`, a keyword out of its range, a weight that is none, or losses on
      rows of different kinds.
  """
  terms = []
  for *weights, term in lookup.parse(name, "+", "loss", "loss.name"):
    fn = lookup.find(LOSSES, term, "loss", "loss.name")
    if not hasattr(fn, "kind"):
      raise ConfigError(
        f"loss {str(term)!r} does not say what it reads; mark the function "
        "with jaxalign.train.losses.needs, or set config.loss.name"
      )
    check_keywords(lookup.bound_keywords(fn), name, "loss.name")
    terms.append((_weight(weights, name), term.name, fn))
  if len(terms) == 1 and terms[0][0] == 1.0:
    return terms[0][2]
  return weighted_sum(terms)


def _weight(factors: list[lookup.Term | float], name: str) -> float:
  """The one number before a loss, or 1."""
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
  kinds = {fn.kind for _, _, fn in terms}
  names = [key for _, key, _ in terms]
  if len(kinds) > 1 and kinds != {"pairs", "rows"}:
    each = ", ".join(f"{key} {fn.kind}" for key, (*_, fn) in zip(names, terms))
    raise ConfigError(
      f"losses of different rows cannot be summed ({each}); "
      "set config.loss.name"
    )
  if len(set(names)) < len(names):
    raise ConfigError(
      f"a loss is summed twice ({', '.join(names)}); set config.loss.name"
    )
  takes = [
    [
      p
      for p in inspect.signature(fn).parameters.values()
      if p.kind == p.KEYWORD_ONLY
    ]
    for _, _, fn in terms
  ]

  def loss_fn(policy, ref, stats, **kwargs):
    total, prefers, metrics, own = 0.0, 0.0, {}, {}
    for name, (weight, _, fn), known in zip(names, terms, takes):
      loss, extra = fn(
        policy,
        ref,
        stats,
        **{p.name: kwargs[p.name] for p in known if p.name in kwargs},
      )
      total = total + weight * loss
      if fn.kind != "rows":
        prefers = prefers + weight * loss
      metrics = extra | metrics
      own[f"loss/{name}"] = loss
    if len(kinds) > 1:
      own["preference_loss"] = prefers
    return total, metrics | own

  keywords = {p.name: p for known in reversed(takes) for p in known}
  positional = [
    inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for n in ("policy", "ref", "stats")
  ]
  loss_fn.__signature__ = inspect.Signature(
    positional + list(keywords.values())
  )
  loss_fn.terms = tuple(fn for _, _, fn in terms)
  (loss_fn.kind,) = kinds if len(kinds) == 1 else ("pairs",)
  for field in ("stats", "extras"):
    setattr(
      loss_fn,
      field,
      tuple(
        dict.fromkeys(
          item for _, _, fn in terms for item in getattr(fn, field, ())
        )
      ),
    )
  loss_fn.reference = any(getattr(fn, "reference", True) for _, _, fn in terms)
  return loss_fn
