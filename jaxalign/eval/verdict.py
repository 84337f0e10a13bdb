"""What two arms' outcomes allow one to say, in words that claim no more.

An arm is several seeds on the same prompts. Two arms are compared cell by
cell: the same seed, the same prompt. Of a difference there are two questions,
each with its own test: is it there at all (two-sided t), and is it too small
to matter (two one-sided t tests, Schuirmann 1987). Neither answer is the
other's failure, so there is a third word, "cannot tell", which says how much
more would.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

from jaxalign.errors import ConfigError, DataError
from jaxalign.eval import intervals

MIN_SEEDS = 5  # fewer do not show their own spread
MIN_PROMPTS = 30
LEVEL = 0.05  # of either test, over all comparisons of one study
POWER = 0.8  # of the number of seeds asked for
_MOST = 10_000  # times as many seeds or prompts as there are: out of reach


class Arm(NamedTuple):
  """The outcomes of one arm, by seed and prompt."""

  name: str
  seeds: Sequence[Hashable]  # S
  prompts: Sequence[Hashable]  # P ids, in the order of the columns
  outcome: np.ndarray  # [S, P] in [0, 1]: won 1, tied 0.5, lost 0


def _check(arm: Arm) -> np.ndarray:
  out = np.asarray(arm.outcome, np.float64)
  if out.shape != (len(arm.seeds), len(arm.prompts)):
    raise DataError(
      f"arm {arm.name}: outcomes {out.shape}, wanted one of each "
      f"of {len(arm.seeds)} seeds and {len(arm.prompts)} "
      "prompts"
    )
  for what, ids in (("seed", arm.seeds), ("prompt", arm.prompts)):
    if len(set(ids)) < len(ids):
      raise DataError(
        f"arm {arm.name}: a {what} comes twice; every {what} counts once"
      )
  # Written so that NaN is refused as well.
  if not ((out >= 0) & (out <= 1)).all():
    raise DataError(
      f"arm {arm.name}: outcomes leave [0, 1]; wanted won 1, tied 0.5, lost 0"
    )
  return out


def paired(a: Arm, b: Arm) -> np.ndarray:
  """[S, P] of a - b, seeds and prompts of `b` put in the order of `a`.

  Raises:
    DataError: arms that did not meet the same seeds and the same prompts, or
      outcomes that are none.
  """
  ours, theirs = _check(a), _check(b)
  for what, mine, others in (
    ("prompts", a.prompts, b.prompts),
    ("seeds", a.seeds, b.seeds),
  ):
    if set(mine) != set(others):
      only = sorted(map(str, set(mine) ^ set(others)))
      raise DataError(
        f"{a.name} and {b.name} have different {what} ({len(mine)} and "
        f"{len(others)}, {len(only)} in one alone, as {only[0]}); wanted "
        f"the same {what} in both: evaluate both arms on one held-out set "
        "with the same seeds"
      )
  row = {s: i for i, s in enumerate(b.seeds)}
  column = {p: i for i, p in enumerate(b.prompts)}
  return (
    ours
    - theirs[np.ix_([row[s] for s in a.seeds], [column[p] for p in a.prompts])]
  )


def holm(p: Sequence[float]) -> np.ndarray:
  """P values corrected for their number, Holm 1979; in the order given."""
  p = np.asarray(p, np.float64)
  order = np.argsort(p, kind="stable")
  steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
  out = np.empty_like(p)
  out[order] = np.minimum(steps, 1.0)
  return out


def needed(
  found: intervals.Spread, seeds: int, prompts: int, margin: float, level: float
) -> dict[str, int] | None:
  """Seeds and prompts with which a difference of `margin` would be told.

  Told either way with probability POWER: a true `margin` from none, and a
  true zero as equal. Seeds are added first; where prompts alone stand in the
  way, prompts; then both.

  Args:
    found: the spread measured.
    seeds: S now.
    prompts: P now.
    margin: in the unit of the outcomes.
    level: of the tests, corrected.

  Returns:
    {"seeds", "prompts"}, or None: more than 10,000 times what there is.
  """

  def enough(s: int, p: int) -> bool:
    var_seeds, var_prompts, var_rest = (
      found.seeds / s,
      found.prompts / p,
      found.noise / (s * p),
    )
    total = var_seeds + var_prompts + var_rest
    # Satterthwaite's freedom of the three mean squares, at this size.
    parts = (
      ((var_seeds + var_rest), s - 1),
      ((var_prompts + var_rest), p - 1),
      (var_rest, (s - 1) * (p - 1)),
    )
    squares = sum(v * v / f for v, f in parts)
    freedom = max(total * total / squares, s - 1.0) if squares > 0 else s - 1.0

    def t(q: float) -> float:  # stats.t.ppf, without its overhead
      return float(special.stdtrit(freedom, q))

    apart = t(1 - level / 2) + t(POWER)
    # Both one-sided tests must hold: each may miss half as often.
    alike = t(1 - level) + t((1 + POWER) / 2)
    return bool(np.sqrt(total) * max(apart, alike) <= margin)

  first_s, first_p = max(seeds, MIN_SEEDS), max(prompts, MIN_PROMPTS)
  ways = (
    lambda k: (first_s + k, first_p),
    lambda k: (first_s, first_p + k),
    lambda k: (first_s + k, first_p + k * first_p // first_s),
  )
  limits = (100 * first_s, 100 * first_p, _MOST * first_s)
  for way, most in zip(ways, limits):
    if not enough(*way(most)):
      continue
    low, high = -1, most  # enough at high, not at low
    while high - low > 1:
      middle = (low + high) // 2
      low, high = (low, middle) if enough(*way(middle)) else (middle, high)
    s, p = way(high)
    return dict(seeds=s, prompts=p)
  return None


def _tests(d: np.ndarray, margin: float) -> dict[str, Any]:
  """The estimate, its interval and both p values, not yet corrected."""
  out: dict[str, Any] = dict(
    difference=intervals.crossed(d), p_differ=None, p_equal=None, spread=None
  )
  if min(d.shape) < 2:
    return out
  return out | _of_spread(
    out["difference"], intervals.spread(d), d.size, margin
  )


def _of_spread(
  difference: dict[str, Any], found: intervals.Spread, cells: int, margin: float
) -> dict[str, Any]:
  """`difference` with its interval, both p values, and the spread."""
  # Arms that never differ have no spread; they still may differ elsewhere.
  # One cell of +1 and one of -1 beside the others, as in `difference`.
  least = np.sqrt(2.0) / (cells + 2)
  found = found._replace(error=max(found.error, least))
  t = stats.t(found.freedom)
  half = t.ppf(0.975) * found.error
  return dict(
    difference=difference
    | dict(low=found.value - half, high=found.value + half),
    p_differ=float(2 * t.sf(abs(found.value) / found.error)),
    p_equal=float(t.sf((margin - abs(found.value)) / found.error)),
    spread=found,
  )


def _tests_nested(d: np.ndarray, margin: float) -> dict[str, Any]:
  """As `_tests`, of seeds that each had prompts of their own."""
  seeds, prompts = d.shape
  difference = dict(
    value=float(d.mean()), low=None, high=None, n=seeds, prompts=prompts
  )
  if seeds < 2:
    return dict(difference=difference, p_differ=None, p_equal=None, spread=None)
  return _of_spread(difference, intervals.nested(d.mean(1)), d.size, margin)


def compare(
  pairs: Sequence[tuple[Arm, Arm]],
  *,
  margin: float = 0.02,
  level: float = LEVEL,
  unit: str = "win rate",
) -> list[dict[str, Any]]:
  """A verdict on each pair of arms, corrected for their number.

  Args:
    pairs: (arm, the arm it is compared with), all comparisons of the study:
      the correction counts them.
    margin: differences below it are called equal, as a share (2 points).
    level: error rate of "better" and "worse" together, and of "equal", over
      all pairs (Holm).
    unit: what is measured, for the sentence.

  Returns:
    For each pair: "verdict" ("better", "worse", "equal", "cannot tell" or
    "withheld"), "difference" {"value", "low", "high", "n", "prompts"} (its
    95 % interval is that of this pair alone), "p_differ" and "p_equal"
    (corrected), "needed" {"seeds", "prompts"} or None, "names", "words".

  Raises:
    DataError: arms on different prompts or seeds, outcomes outside [0, 1].
    ConfigError: a margin or level that cannot work.
  """
  return _judged(pairs, _tests, margin, level, unit)


def compare_nested(
  pairs: Sequence[tuple[Arm, Arm]],
  *,
  margin: float = 0.02,
  level: float = LEVEL,
  unit: str = "win rate",
) -> list[dict[str, Any]]:
  """`compare` for seeds that each had a model and prompts of their own.

  The two arms of a pair met the same ones within a seed; `prompts` only counts
  them. What one seed can tell is its mean, so the tests are Student's over
  the seeds.
  """
  return _judged(pairs, _tests_nested, margin, level, unit)


def _judged(
  pairs: Sequence[tuple[Arm, Arm]],
  test: Callable,
  margin: float,
  level: float,
  unit: str,
) -> list[dict[str, Any]]:
  """Verdicts by a test of [S, P] differences, corrected for their number."""
  if not 0 < margin < 1:
    raise ConfigError(
      f"margin {margin}, wanted a share between 0 and 1 (0.02 is 2 points)"
    )
  if not 0 < level < 0.5:
    raise ConfigError(f"level {level}, wanted between 0 and 0.5")
  sets = [paired(a, b) for a, b in pairs]
  tests = [test(d, margin) for d in sets]
  # Withheld pairs make no claim and so are not counted.
  counted = [
    i
    for i, d in enumerate(sets)
    if d.shape[0] >= MIN_SEEDS and d.shape[1] >= MIN_PROMPTS
  ]
  for key in ("p_differ", "p_equal"):
    for i, p in zip(counted, holm([tests[i][key] for i in counted])):
      tests[i][key] = float(p)
  out = []
  for i, ((a, b), d, test) in enumerate(zip(pairs, sets, tests)):
    value = test["difference"]["value"]
    if i not in counted:
      verdict = "withheld"
    elif test["p_equal"] < level:
      verdict = "equal"
    elif test["p_differ"] < level:
      verdict = "better" if value > 0 else "worse"
    else:
      verdict = "cannot tell"
    found = test.pop("spread")
    need = None
    if found is not None and verdict in ("cannot tell", "withheld"):
      need = needed(found, *d.shape, margin, level / max(len(counted), 1))
    one = dict(
      test,
      verdict=verdict,
      names=(a.name, b.name),
      needed=need,
      margin=margin,
      level=level,
      comparisons=len(counted),
    )
    out.append(one | dict(words=in_words(one, unit)))
  return out


def _points(share: float) -> str:
  """A share as points, without zeros nobody measured: "2", "0.5"."""
  return f"{100 * share:.3g}"


def in_words(one: dict[str, Any], unit: str) -> str:
  """One comparison of `compare` as a sentence."""
  a, b = one["names"]
  diff, m = one["difference"], one["comparisons"]
  if diff["value"] is None:
    return f"{a} against {b}: not measured."
  value = 100 * diff["value"]
  size = f"{diff['n']} seeds x {diff['prompts']} prompts"
  interval = (
    f"{size}, no interval"
    if diff["low"] is None
    else (
      f"95 % interval {100 * diff['low']:+.1f} to {100 * diff['high']:+.1f}, "
      f"{size}"
    )
  )
  margin = _points(one["margin"])

  def told(p: str) -> str:
    many = f" after Holm's correction for {m} comparisons" if m > 1 else ""
    return f"{interval}; p = {one[p]:.2g}{many}"

  need = (
    "more than can be asked for"
    if one["needed"] is None
    else (
      f"{one['needed']['seeds']} seeds x {one['needed']['prompts']} prompts"
    )
  )
  verdict = one["verdict"]
  if verdict in ("better", "worse"):
    return (
      f"{a} is {verdict} than {b} by {abs(value):.1f} points of {unit} "
      f"({told('p_differ')})."
    )
  if verdict == "equal":
    aside = (
      ""
      if one["p_differ"] >= one["level"]
      else (f" A difference is there, {value:+.1f} points, too small to count.")
    )
    return (
      f"{a} and {b} are equal within {margin} points of {unit} "
      f"({value:+.1f}; {told('p_equal')}).{aside}"
    )
  if verdict == "withheld":
    return (
      f"{a} against {b}: {value:+.1f} points of {unit} ({interval}). No "
      f"verdict: it needs at least {MIN_SEEDS} seeds and {MIN_PROMPTS} "
      "prompts."
    )
  alone = ""
  if diff["low"] > 0 or diff["high"] < 0:
    alone = (
      f" Alone, the interval leaves out zero; among {m} comparisons "
      "that is not enough."
    )
  return (
    f"Cannot tell {a} from {b}: {value:+.1f} points of {unit} "
    f"({told('p_differ')}).{alone} To tell {margin} points: {need}."
  )
