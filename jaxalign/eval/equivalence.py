"""Verdicts on two arms' outcomes, in words that claim no more than they show.

An arm is several seeds on the same prompts. Two arms are compared cell by
cell: the same seed, the same prompt. Of a difference there are two questions,
each with its own test: is it there at all (two-sided t), and is it too small
to matter (two one-sided t tests, Schuirmann 1987). Neither answer is the
other's failure, so there is a third verdict, "cannot tell", with how many more
seeds or prompts would.
"""

import bisect
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

from jaxalign.core import intervals
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.core.intervals import Spread

MIN_SEEDS = 5  # fewer do not show their own spread
MIN_PROMPTS = 30
LEVEL = 0.05  # of either test, over all comparisons of one study
POWER = 0.8  # of the number of seeds recommended
_MOST = 10_000  # times as many seeds or prompts as there are: out of reach


class ArmOutcomes(NamedTuple):
  """The outcomes of one arm, by seed and prompt."""

  name: str
  seeds: Sequence[Hashable]  # S
  prompts: Sequence[Hashable]  # P ids, in the order of the columns
  outcome: np.ndarray  # [S, P] in [0, 1]: win 1, tie 0.5, loss 0


def _checked(arm: ArmOutcomes) -> np.ndarray:
  out = np.asarray(arm.outcome, np.float64)
  if out.shape != (len(arm.seeds), len(arm.prompts)):
    raise DataError(
      f"arm {arm.name}: outcomes {out.shape}, wanted one of each of "
      f"{len(arm.seeds)} seeds and {len(arm.prompts)} prompts"
    )
  for what, ids in (("seed", arm.seeds), ("prompt", arm.prompts)):
    if len(set(ids)) < len(ids):
      raise DataError(
        f"arm {arm.name}: a {what} comes twice; every {what} counts once"
      )
  # Written so that NaN is refused as well.
  if not ((out >= 0) & (out <= 1)).all():
    raise DataError(
      f"arm {arm.name}: outcomes leave [0, 1]; wanted win 1, tie 0.5, loss 0"
    )
  return out


def paired_outcomes(a: ArmOutcomes, b: ArmOutcomes) -> np.ndarray:
  """[S, P] of a - b, seeds and prompts of `b` put in the order of `a`."""
  ours, theirs = _checked(a), _checked(b)
  place = []
  for what, mine, others in (
    ("seeds", a.seeds, b.seeds),
    ("prompts", a.prompts, b.prompts),
  ):
    if set(mine) != set(others):
      only = sorted(map(str, set(mine) ^ set(others)))
      raise DataError(
        f"{a.name} and {b.name} have different {what} ({len(mine)} and "
        f"{len(others)}, {len(only)} in one alone, as {only[0]}); wanted "
        f"the same {what} in both: evaluate both arms on one held-out set "
        "with the same seeds"
      )
    index = {x: i for i, x in enumerate(others)}
    place.append([index[x] for x in mine])
  return ours - theirs[np.ix_(*place)]


def _tells(
  spread: Spread, seeds: int, prompts: int, margin: float, level: float
) -> bool:
  """Whether a study of this size has POWER for both tests."""
  noise = spread.noise / (seeds * prompts)
  # Satterthwaite's freedom of the three mean squares, at this size.
  squares_and_freedom = (
    (spread.seeds / seeds + noise, seeds - 1),
    (spread.prompts / prompts + noise, prompts - 1),
    (noise, (seeds - 1) * (prompts - 1)),
  )
  total = spread.seeds / seeds + spread.prompts / prompts + noise
  squares = sum(v * v / f for v, f in squares_and_freedom)
  freedom = seeds - 1.0
  if squares > 0:
    freedom = max(total * total / squares, freedom)
  # Both one-sided tests must hold: each may miss half as often.
  t = lambda q: float(special.stdtrit(freedom, q))
  differ = t(1 - level / 2) + t(POWER)
  equal = t(1 - level) + t((1 + POWER) / 2)
  return bool(np.sqrt(total) * max(differ, equal) <= margin)


def size_needed(
  spread: Spread, seeds: int, prompts: int, margin: float, level: float
) -> dict[str, int] | None:
  """Seeds and prompts that tell a true `margin` from none, and none as equal.

  Each with probability POWER. Seeds are added first; where prompts alone stand
  in the way, prompts; then both.

  Args:
    spread: of the S seeds and P prompts there are.
    seeds: S.
    prompts: P.
    margin: in the unit of the outcomes.
    level: of the tests, corrected.

  Returns:
    {"seeds", "prompts"}, or None: more than 10,000 times what there is.
  """
  s, p = max(seeds, MIN_SEEDS), max(prompts, MIN_PROMPTS)
  ways = (
    (lambda k: (s + k, p), 100 * s),
    (lambda k: (s, p + k), 100 * p),
    (lambda k: (s + k, p + k * p // s), _MOST * s),
  )
  for way, most in ways:
    enough = lambda k, way=way: _tells(spread, *way(k), margin, level)
    if enough(most):
      size = way(bisect.bisect_left(range(most), True, key=enough))
      return dict(zip(("seeds", "prompts"), size))
  return None


def _tests(d: np.ndarray, margin: float, nested: bool) -> dict[str, Any]:
  """The estimate of [S, P] differences and both p values, uncorrected.

  Nested prompts lie inside seeds, so their chance is part of what sets the
  seeds' means apart: Student's t over those means needs no other estimate.
  """
  seeds, prompts = d.shape
  if seeds < 2 or not nested and prompts < 2:
    value = float(d.mean()) if d.size else None
    difference = intervals.symmetric(value, n=seeds) | dict(prompts=prompts)
    none = dict(p_differ=None, p_equal=None, spread=None)
    return none | dict(difference=difference)
  if nested:
    means = d.mean(1)
    variance, m = float(means.var(ddof=1)), float(means.mean())
    error = float(np.sqrt(variance / seeds))
    spread = Spread(m, error, seeds - 1.0, variance, 0.0, 0.0)
  else:
    spread = intervals.two_way_spread(d)
  # Arms that never differ have no spread; they still may differ elsewhere.
  # One cell of +1 and one of -1 are added, as in `paired_difference`.
  error = max(spread.error, np.sqrt(2.0) / (d.size + 2))
  t = stats.t(spread.freedom)
  half, size = t.ppf(0.975) * error, abs(spread.value)
  difference = intervals.symmetric(spread.value, half, seeds)
  return dict(
    difference=difference | dict(value=float(d.mean()), prompts=prompts),
    p_differ=float(2 * t.sf(size / error)),
    p_equal=float(t.sf((margin - size) / error)),
    spread=spread,
  )


def compare_arms(
  pairs: Sequence[tuple[ArmOutcomes, ArmOutcomes]],
  *,
  margin: float = 0.02,
  level: float = LEVEL,
  unit: str = "win rate",
  nested: bool = False,
) -> list[dict[str, Any]]:
  """A verdict on each pair of arms, corrected for their number.

  Args:
    pairs: (arm, the arm it is compared with), all comparisons of the study:
      the correction counts them.
    margin: differences below it are called equal, as a fraction (2 points).
    level: error rate of "better" and "worse" together, and of "equal", over
      all pairs (Holm).
    unit: what is measured, for the sentence.
    nested: each seed had a model and prompts of its own, which both arms of a
      pair met. One seed is then one number, its mean.

  Returns:
    For each pair: "verdict" ("better", "worse", "equal", "cannot tell" or
    "withheld"), "difference" {"value", "low", "high", "n", "prompts"} (its
    95 % interval is that of this pair alone), "p_differ" and "p_equal"
    (corrected), "needed" {"seeds", "prompts"} or None, "names", "words".

  Raises:
    DataError: arms on different prompts or seeds, outcomes outside [0, 1].
    ConfigError: a margin or level that cannot work.
  """
  if not 0 < margin < 1:
    raise ConfigError(
      f"margin {margin}, wanted a fraction between 0 and 1 (0.02 is 2 points)"
    )
  if not 0 < level < 0.5:
    raise ConfigError(f"level {level}, wanted between 0 and 0.5")
  sets = [paired_outcomes(a, b) for a, b in pairs]
  tests = [_tests(d, margin, nested) for d in sets]
  # Withheld pairs make no claim and so are not counted.
  least = np.array([MIN_SEEDS, MIN_PROMPTS])
  enough = [bool((np.array(d.shape) >= least).all()) for d in sets]
  counted = [test for test, e in zip(tests, enough) if e]
  for key in ("p_differ", "p_equal"):
    for test, p in zip(counted, intervals.holm([t[key] for t in counted])):
      test[key] = float(p)
  out = []
  for (a, b), d, e, test in zip(pairs, sets, enough, tests):
    spread, need = test.pop("spread"), None
    verdict = _verdict(test, level) if e else "withheld"
    if spread is not None and verdict in ("cannot tell", "withheld"):
      need = size_needed(spread, *d.shape, margin, level / max(len(counted), 1))
    settings = dict(margin=margin, level=level, comparisons=len(counted))
    names = (a.name, b.name)
    one = test | settings | dict(verdict=verdict, names=names, needed=need)
    out.append(one | dict(words=verdict_sentence(one, unit)))
  return out


def _verdict(test: dict[str, Any], level: float) -> str:
  if test["p_equal"] < level:
    return "equal"
  if test["p_differ"] < level:
    return "better" if test["difference"]["value"] > 0 else "worse"
  return "cannot tell"


def _interval(diff: dict[str, Any]) -> str:
  return f"95 % interval {100 * diff['low']:+.1f} to {100 * diff['high']:+.1f}"


def verdict_sentence(one: dict[str, Any], unit: str) -> str:
  """One comparison of `compare_arms` as a sentence."""
  a, b = one["names"]
  diff, m, verdict = one["difference"], one["comparisons"], one["verdict"]
  if diff["value"] is None:
    return f"{a} against {b}: not measured."
  value, margin = 100 * diff["value"], f"{100 * one['margin']:.3g}"
  size = f"{diff['n']} seeds x {diff['prompts']} prompts"
  interval = f"{size}, no interval"
  if diff["low"] is not None:
    interval = f"{_interval(diff)}, {size}"
  if verdict == "withheld":
    return (
      f"{a} against {b}: {value:+.1f} points of {unit} ({interval}). No "
      f"verdict: it needs at least {MIN_SEEDS} seeds and {MIN_PROMPTS} prompts."
    )
  holm = f" after Holm's correction for {m} comparisons" if m > 1 else ""
  p = one["p_equal" if verdict == "equal" else "p_differ"]
  evidence = f"{interval}; p = {p:.2g}{holm}"
  if verdict in ("better", "worse"):
    return (
      f"{a} is {verdict} than {b} by {abs(value):.1f} points of {unit} "
      f"({evidence})."
    )
  if verdict == "equal":
    more = f" A difference is there, {value:+.1f} points, too small to count."
    return (
      f"{a} and {b} are equal within {margin} points of {unit} "
      f"({value:+.1f}; {evidence})."
    ) + (more if one["p_differ"] < one["level"] else "")
  alone, need = "", "more than 10,000 times as many"
  if diff["low"] > 0 or diff["high"] < 0:
    alone = (
      f" Alone, the interval leaves out zero; among {m} comparisons that is "
      "not enough."
    )
  if one["needed"] is not None:
    need = "{seeds} seeds x {prompts} prompts".format(**one["needed"])
  return (
    f"Cannot tell {a} from {b}: {value:+.1f} points of {unit} ({evidence})."
    f"{alone} To tell {margin} points: {need}."
  )


def one_seed_sentence(a: str, b: str, diff: dict[str, Any], unit: str) -> str:
  """A difference of one seed's rates as a sentence that cannot mislead.

  `diff` is as from `intervals.paired_difference`, positive where a is better.
  """
  if diff["value"] is None:
    return f"{a} against {b}: not measured."
  value, n = 100 * diff["value"], diff["n"]
  interval = f"{_interval(diff)} points, n = {n}; one training seed"
  if diff["low"] <= 0 <= diff["high"]:
    return (
      f"No difference shown between {a} and {b} at n = {n} in {unit} "
      f"({value:+.1f} points; {interval})."
    )
  verdict = "better" if diff["low"] > 0 else "worse"
  return (
    f"{a} is {verdict} than {b} by {abs(value):.1f} points of {unit} "
    f"({interval})."
  )
