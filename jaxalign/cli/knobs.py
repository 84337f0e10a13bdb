"""What every knob may be: tables of knobs by kind, and the rules of a few."""

from collections.abc import Iterator
import math
import re
from typing import Any

from jaxalign.core.errors import ConfigError
from jaxalign.core.settings import flatten, pick
from jaxalign.data import prepare, tokens
from jaxalign.embed import store
from jaxalign.model import decoder
from jaxalign.select import mixture
from jaxalign.select.em import COVARIANCES
from jaxalign.select.samplers import isa, values
from jaxalign.select.topk import budget_rows
from jaxalign.study.pilot import AUTO, check_pilot
from jaxalign.train import feed, optim
from jaxalign.train.logps import PRODUCERS

# There must be at least one of these, and of the next none or more.
COUNTS = (
  "sft.updates sft.save_every train.save_every embed.tile embed.shard "
  "model.layers model.width model.heads model.ff model.head_chunk "
  "eval.prompts eval.new_tokens select.mixture.starts "
  "select.mixture.reservoir train.eval_rows train.eval_prompts seeds "
  "train.min_updates proxy.updates proxy.models train.keep"
).split()
NOT_NEGATIVE = (
  "train.max_updates select.stability_seeds data.limit eval.temperature "
  "train.clip lora.rank train.ref_sync train.eval_every train.stop_after "
  "train.explode ask.context judge.prompts judge.labels train.weight_decay"
).split()
DECAYS = ["train.b2"]
FRACTIONS = (
  "data.world.redundancy data.world.flips data.world.junk "
  "data.max_bad_fraction data.split train.warmup_ratio train.ref_mix"
).split()
RANGES = (  # knobs, whether a value is legal, what is wanted
  (COUNTS, lambda x: x >= 1, "1 or more"),
  (NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
  (DECAYS, lambda x: 0 <= x < 1, "a decay in [0, 1)"),
  (FRACTIONS, lambda x: 0 <= x <= 1, "a fraction from 0 to 1"),
)
CHOICES = {
  "select.order": (*isa.ORDERS, isa.SOFT),
  "select.pair_score": values.SIDES,
  "select.mixture.covariance": COVARIANCES,
  "model.param_dtype": decoder.DTYPES,
  "embed.store_dtype": store.DTYPES,
  "train.optimizer": tuple(optim.OPTIMIZERS),
  "train.reference": ("stored", "online"),
  "train.layout": tuple(feed.LAYOUTS),
  "train.logps": tuple(PRODUCERS),
}
# Knobs that are lists, of what; a config file or a flag may hold anything.
_LISTS = {
  str: "compare train.trackers train.eval_sets lora.targets data.skip",
  float: "budgets pilot.budgets data.weights",
  int: "profile.steps data.caps data.assume",
}
LISTS = {name: kind for kind, names in _LISTS.items() for name in names.split()}
_ITEMS = {str: "names", float: "numbers", int: "whole numbers"}
# Numbers whose own checks say more than "not a finite number".
OWN_CHECKS = (
  "select.budget budgets pilot.budgets train.lr sft.lr train.b2".split()
)
LARGEST = 1 << 53  # of a whole number: beyond, a float loses count
# How many there may be of what a plan lists one by one, or draws.
MOST = {"seeds": 10_000, "pilot.seeds": 10_000}


def check_knobs(c: Any) -> None:
  """Raises ConfigError for a knob whose value can never work."""
  for found in (_kinds(c), _ranges(c), _values(c)):
    for message in found:
      raise ConfigError(message)
  mixture.components_of(c.select.mixture.components)
  check_pilot(c)
  auto = c.select.budget == AUTO
  for budget in (*c.pilot.budgets, *c.budgets, *[c.select.budget] * (not auto)):
    if not budget > 1 or budget % 1:
      budget_rows(float(budget), 1 << 40)  # rows: once the pool is read


def _kinds(c: Any) -> Iterator[str]:
  """What is not of its knob's kind, over the whole config."""
  for name, value in flatten(c, "").items():
    listed = isinstance(value, (list, tuple))
    kind, knob = LISTS.get(name), f"set config.{name}"
    if kind and not (listed and all(_is_a(kind, x) for x in value)):
      shown = _shortened(value)
      yield f"{name}={shown}, wanted a list of {_ITEMS[kind]}; {knob}"
    for x in value if listed else (value,):
      if isinstance(x, (int, float)) and not isinstance(x, bool):
        if wanted := _wanted(name, x):
          yield f"{name}={_shortened(x)}, wanted {wanted}; {knob}"


def _is_a(kind: type, x: Any) -> bool:
  kinds = (int, float) if kind is float else kind
  return isinstance(x, kinds) and not isinstance(x, bool)


def _wanted(name: str, x: float) -> str:
  """What number is wanted in place of x; "" where x may be."""
  if isinstance(x, float) and not math.isfinite(x):
    infinite_rate = name.endswith("lr") and not math.isnan(x)
    own = name in OWN_CHECKS and not infinite_rate
    return "" if own else "a finite number"
  if isinstance(x, int) and abs(x) > LARGEST:
    return f"a whole number of at most {LARGEST:,}"
  if name.rpartition(".")[2] == "seed" and not 0 <= x < 1 << 32:
    return f"a seed from 0 to {(1 << 32) - 1:,}"
  if name in MOST and x > MOST[name]:
    return f"{MOST[name]:,} or fewer"
  return ""


def _shortened(value: Any) -> str:
  """A value as it may stand in a line of error."""
  text = repr(value)
  return text if len(text) <= 100 else f"{text[:100]}..."


def _ranges(c: Any) -> Iterator[str]:
  for names, legal, wanted in RANGES:
    for name, value in pick(c, *names).items():
      if not legal(value):
        yield f"{name}={value}, wanted {wanted}; set config.{name}"
  for name, known in CHOICES.items():
    if (value := pick(c, name)[name]) not in known:
      wanted = f"one of {', '.join(known)}"
      yield f"{name}={value!r} is unknown, wanted {wanted}; set config.{name}"


def _values(c: Any) -> Iterator[str]:
  """What is wrong with knobs that have a rule of their own."""
  m, t, data = c.model, c.train, c.data
  pca = str(c.select.mixture.pca)
  if pca != "auto" and not re.fullmatch("[0-9]{1,9}", pca):
    yield (
      f"select.mixture.pca={_shortened(pca)}, wanted auto or a number of "
      "directions (0: all); set config.select.mixture.pca"
    )
  if m.width % m.heads:
    yield (
      f"model.width={m.width} is no multiple of model.heads={m.heads}; set "
      "one of them"
    )
  if data.assume and (len(data.assume) != 2 or min(data.assume) < 0):
    yield (
      f"data.assume={tuple(data.assume)}, wanted (rows, tokens of a row), "
      "0 tokens for the context; set config.data.assume"
    )
  if unknown := set(data.skip) - {"tied", "contradicting"}:
    yield (
      f"data.skip has {', '.join(sorted(unknown))}, wanted tied or "
      "contradicting; set config.data.skip"
    )
  steps = tuple(c.profile.steps)
  if len(steps) != 2 or steps != (0, 0) and not 0 <= steps[0] < steps[1]:
    yield (
      f"profile.steps={steps}, wanted the first step to trace and, above it, "
      "the one after the last, or (0, 0); set config.profile.steps"
    )
  if 0 < t.max_updates < t.min_updates:
    yield (
      f"train.min_updates={t.min_updates} is above "
      f"train.max_updates={t.max_updates}; set one of them"
    )
  if not (context := prepare.requested_context(c)):
    return  # the data stage chooses it
  room = context - tokens.LEAST_CONTEXT + 1
  if room < 1:
    yield (
      f"model.context={context} holds no prompt and response, wanted "
      f"{tokens.LEAST_CONTEXT} or more; set config.model.context"
    )
  if c.eval.new_tokens > room:
    yield (
      f"eval.new_tokens={c.eval.new_tokens} leaves no room for a prompt in "
      f"model.context={context}, wanted {room} or less; set one of them"
    )
