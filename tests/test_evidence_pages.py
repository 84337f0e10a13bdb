"""The sections on the plateau and on the judges, whole or askew."""

import copy
import json

import pytest
from test_report import paths, PAYLOADS, poisoned, read

from jaxalign.eval import interrater
from jaxalign.eval import plateau as fits
from jaxalign.eval.interrater import Verdict
from jaxalign.report import page, study_page, values
from jaxalign.report.values import Node

HH = [18.27, 78.73, 81.32, 81.60, 83.17, 82.71]
OASST = [8.45, 15.23, 10.42, 17.51, 21.69, 24.66]
X = [0, 10, 25, 50, 75, 100]


def drawn(template, **data):
  """What a macro of a template makes of this JSON."""
  data = {name: Node(value) for name, value in data.items()}
  return page.ENVIRONMENT.from_string(template).render(data)


def plateau(found):
  template = "{% import 'plateau.html' as t %}{{ t.plateau(found) }}"
  return drawn(template, found=found)


def judges(found, controls=None):
  template = """{% import 'judges.html' as t -%}
  {{ t.against_humans(found, entries(controls)) }}"""
  return drawn(template, found=found, controls=controls)


def ranking(found):
  return study_page.study_html({"ranking": found})


def efficiency(found):
  return study_page.study_html({"efficiency": found})


def fit(y=HH, **kwargs):
  return json.loads(json.dumps(fits.fit(X, y, **kwargs)))


def judged():
  words = ["first", "second", "tie", None]
  rows = [
    Verdict(i, *names, rater, words[(i * k + (names[0] == "m")) % 4])
    for i in range(30)
    for k, rater in enumerate(("ann", "ben", "gpt"))
    for names in (("m", "k"), ("k", "m"))
  ]
  return json.loads(
    json.dumps(interrater.judged(rows, ["gpt"], ["ann", "ben"]))
  )


def control(passed=True):
  share = dict(value=0.0, low=0.0, high=0.1, n=20, passed=passed)
  return {
    "gpt": dict(
      null=share, injected=share | dict(passed=True), words=["gpt: it holds."]
    )
  }


def ranked():
  return [
    dict(
      budget=0.1,
      rows=[
        dict(
          name="isa-0.1",
          value=0.6,
          low=0.5,
          high=0.7,
          n=5,
          rank=1,
          **{"from": 1, "to": 2},
        ),
        dict(
          name="random-0.1",
          value=0.5,
          low=0.4,
          high=0.6,
          n=5,
          rank=2,
          **{"from": 2, "to": 2},
        ),
      ],
    )
  ]


def gained():
  return [
    dict(
      name="isa-0.1",
      gain=dict(value=0.1, low=0.05, high=0.15, n=5),
      flops=2e12,
      per_tera=5.0,
    )
  ]


def text(found):
  return " ".join(" ".join(read(found).text).split())


def test_the_plateau_is_told_with_its_numbers_and_its_doubt():
  said = text(plateau(fit()))
  assert "A plateau is identified" in said and "82.2" in said
  assert "0.290" in said and "power law" in said
  assert fits.RECIPE in said  # b is the recipe's as much as the data's
  assert "no bound" not in said


def test_no_plateau_is_said_so():
  said = text(plateau(fit(OASST)))
  assert "Plateau not identified" in said and "no bound" in said
  assert "A plateau is identified" not in said


def test_shares_are_shown_in_percent():
  found = fit([v / 100 for v in HH], bounds=(0, 1), se=[0.02] * 6)
  said = text(plateau(found))
  assert "82.2" in said and "Band: 95 % of each point" in said


def test_seeds_share_a_line():
  found = fits.fit(X * 2, HH + [v - 1 for v in HH])
  shown = plateau(found)
  assert "band: all seeds" in text(shown)
  assert (
    str(read(shown).seen).count("'polyline'") == 4
  )  # and the fitted, and two
  assert f"{fit()['b']['value']:.3f}" == f"{study_page.PAPER['HH']:.3f}"


def test_judges_are_told_under_every_rule():
  found = judged()
  said = text(judges(found, control()))
  for rule in interrater.UNPARSABLE.values():
    assert rule in said
  value = found["judges"]["gpt"]["against"]["drop"]["kappa"]["value"]
  assert values.number(value) in said
  assert "ann / ben" in said and "it holds" in said


@pytest.mark.parametrize("passed", [True, False, None])
def test_a_failed_control_is_a_warning(passed):
  found = judges(judged(), control(passed))
  kinds = [a.get("class") for _, a in read(found).seen]
  assert ("callout warning" in kinds) == (passed is not True)


def test_ranks_and_quality_for_cost_are_told_as_numbers():
  said = text(ranking(ranked()))
  assert "1 to 2" in said and "60.0 [50.0, 70.0]" in said and "Holm" in said
  assert "2 to 2" not in said  # one rank is one number
  said = text(efficiency(gained()))
  assert (
    "+10.0 [+5.0, +15.0]" in said
    and "2.00 TFLOP" in said.replace(values.NO_BREAK, " ")
    and "+5.00" in said
  )
  for odd in (None, [], {}, "x", [3]):
    assert "Ranking" not in text(ranking(odd))
    assert "Quality for its cost" not in text(efficiency(odd))


@pytest.mark.parametrize("section", [plateau, judges])
@pytest.mark.parametrize(
  "odd",
  [
    None,
    {},
    [],
    "x",
    5,
    {"judges": {"a": 1}},
    {"r": 1, "x": [1, "a"], "y": None},
    {"bounds": [None], "words": 3},
  ],
)
def test_what_is_not_there_is_said_not_to_be(section, odd):
  assert text(section(odd))


def set_at(value, path, leaf):
  for key in path[:-1]:
    value = value[key]
  value[path[-1]] = leaf


@pytest.mark.parametrize(
  "make,section",
  [(fit, plateau), (judged, judges), (ranked, ranking), (gained, efficiency)],
)
def test_any_leaf_may_be_missing_or_odd(make, section):
  whole = make()
  for path in paths(whole):
    for leaf in (None, "x", float("nan"), 1e308, [], {}):
      found = copy.deepcopy(whole)
      set_at(found, path, leaf)
      section(found)


@pytest.mark.parametrize("payload", PAYLOADS[::4])
def test_nothing_from_data_becomes_markup(payload):
  read(plateau(poisoned(fit(), payload)))
  read(ranking(poisoned(ranked(), payload)))
  read(efficiency(poisoned(gained(), payload)))
  found = judged()
  found["judges"][payload] = found["judges"].pop("gpt")
  read(
    judges(
      poisoned(found, payload), {payload: poisoned(control()["gpt"], payload)}
    )
  )
