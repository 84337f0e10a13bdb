"""Sections that not every job has, whole or askew: the plateau, judges,
ranks, quality for its cost, and answers with verdicts."""

import copy
import json

import pytest
from test_report import interval, paths, PAYLOADS, poisoned, put, read

from jaxalign.eval import interrater
from jaxalign.eval.interrater import Verdict
from jaxalign.report import nodes, page, study_page
from jaxalign.report.nodes import Node
from jaxalign.study import plateau

HH = [18.27, 78.73, 81.32, 81.60, 83.17, 82.71]
OASST = [8.45, 15.23, 10.42, 17.51, 21.69, 24.66]
X = [0, 10, 25, 50, 75, 100]


def fit(y=HH):
  return json.loads(json.dumps(plateau.fit_plateau(X, y)))


def judged():
  words = ["first", "second", "tie", None]
  sides = ("m", "k"), ("k", "m")
  rows = [
    Verdict(i, *names, rater, words[(i * k + (names[0] == "m")) % 4])
    for i in range(30)
    for k, rater in enumerate(("ann", "ben", "gpt"))
    for names in sides
  ]
  found = interrater.judged(rows, ["gpt"], ["ann", "ben"])
  return json.loads(json.dumps(found))


def control(passed=True):
  null = interval(0.0) | dict(passed=passed)
  held = interval(0.0) | dict(passed=True)
  return {"gpt": dict(null=null, injected=held, words=["gpt: it holds."])}


def job_judge():
  cells = ("rate", "equal_length", "unparsable", "bias", "consistent")
  outcomes = {k: interval(0.3) for k in ("wins", "ties", "losses")}
  arm = dict(name="isa", outcomes=outcomes, read=98, prompts=100)
  return dict(
    kind="endpoint",
    name="a judge",
    against="the target",
    arms=[arm | {k: interval(0.6) for k in cells}],
    controls=control(),
    agreement=judged(),
    cost=dict(requests=12, tokens=3400),
    doubts=["isa: a doubt"],
  )


def ranked():
  row = lambda name, value, first: (
    dict(name=name, rank=first, to=2, **interval(value, 0.1)) | {"from": first}
  )
  return [
    dict(budget=0.1, rows=[row("isa-0.1", 0.6, 1), row("random-0.1", 0.5, 2)])
  ]


def gained():
  return [
    dict(name="isa-0.1", gain=interval(0.1, 0.05), flops=2e12, per_tera=5.0)
  ]


def answers():
  verdict = lambda outcome, *verdicts: dict(
    outcome=outcome,
    verdicts=list(verdicts),
    replies=["A because", "B because"],
    theirs="their words",
  )
  return [
    dict(
      prompt="q " * 1000,
      target="t",
      sft="s",
      arms={"isa": "an answer", "all": None},
      against="chosen",
      rewards={"target": 1.2, "isa": 0.7},
      verdicts={
        "isa": verdict(0.75, "first", "second"),
        "sft": verdict(0, "second", None),
        "all": verdict(None, None, None),
      },
    )
  ] * 8


def drawn(template, name, found):
  """What a macro of a template makes of this JSON."""
  template = f"{{% import '{name}.html' as t %}}{{{{ t.{template} }}}}"
  return page.ENVIRONMENT.from_string(template).render(found=Node(found))


# The JSON of each section, and how it is drawn.
SECTIONS = {
  "plateau": (fit, lambda x: drawn("plateau(found)", "plateau", x)),
  "judges": (judged, lambda x: drawn("against_humans(found, [])", "judges", x)),
  "judge": (job_judge, lambda x: drawn("of_job(found)", "judges", x)),
  "answers": (
    answers,
    lambda x: drawn("samples(records(found), 'SFT')", "samples", x),
  ),
  "ranking": (ranked, lambda x: study_page.study_html({"ranking": x})),
  "efficiency": (gained, lambda x: study_page.study_html({"efficiency": x})),
}


def text(section, found):
  document = read(SECTIONS[section][1](found))
  return " ".join(" ".join(document.text).replace("\u00a0", " ").split())


SEEDS = plateau.fit_plateau(X * 2, HH + [v - 1 for v in HH])
RULES = "|".join(interrater.UNPARSABLE.values())
# What is said of which JSON, and what is not.
SAID = [
  ("plateau", fit(), "A plateau is identified|82.2|power law", "no bound"),
  ("plateau", fit(), f"0.290|{plateau.RECIPE}", "seeds"),
  ("plateau", fit(OASST), "Plateau not identified|no bound", "A plateau is"),
  ("plateau", SEEDS, "band: all seeds", "no bound"),
  ("judges", judged(), f"{RULES}|ann / ben", "it holds"),
  ("judge", job_judge(), "it holds|a judge, compared answers with", "· tie "),
  ("judge", job_judge(), "a doubt|12 requests", "not measured"),
  ("ranking", ranked(), "1 to 2|60.0 [50.0, 70.0]|Holm", "2 to 2"),
  ("efficiency", gained(), "+10.0 [+5.0, +15.0]|2.00 TFLOP|+5.00", "−"),
  ("answers", answers(), "isa · reward 0.700 · win in one order", "· tie "),
  ("answers", answers(), "SFT · loss against the chosen answer", "· tie "),
  ("answers", answers(), "all · no verdict against|their words", "· tie "),
  (
    "answers",
    answers(),
    "first: named it A because Shown second: named it",
    "· tie ",
  ),
  (
    "answers",
    answers(),
    "named the other A because Shown second: could",
    "· tie ",
  ),
  ("answers", answers(), "1,200 more characters|2 more prompts are", "· tie "),
]


@pytest.mark.parametrize("section, found, words, never", SAID)
def test_a_section_says_what_was_found(section, found, words, never):
  shown = text(section, found)
  assert [w for w in words.split("|") if w not in shown] == []
  assert never not in shown


def test_a_plateau_is_drawn_beside_the_paper_s():
  found = read(SECTIONS["plateau"][1](SEEDS))
  # What was measured, the fitted curve, and two of the paper.
  assert [tag for tag, _ in found.seen].count("polyline") == 4
  assert f"{fit()['b']['value']:.3f}" == f"{study_page.PAPER['HH']:.3f}"


def test_the_kappa_of_a_judge_is_the_measured_one():
  found = judged()
  value = found["judges"]["gpt"]["against"]["drop"]["kappa"]["value"]
  assert nodes.number(value) in text("judges", found)


@pytest.mark.parametrize("passed", [True, False, None])
def test_a_failed_control_is_a_warning(passed):
  found = job_judge() | dict(controls=control(passed), doubts=[])
  seen = read(SECTIONS["judge"][1](found)).seen
  kinds = [a.get("class") for _, a in seen]
  assert ("callout warning" in kinds) == (passed is not True)


ODD = [None, {}, [], "x", 5, [3], {"judges": {"a": 1}}]
ODD += [{"r": 1, "x": [1, "a"], "y": None}, {"bounds": [None], "words": 3}]


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("odd", ODD)
def test_what_is_not_there_is_said_not_to_be(section, odd):
  shown = text(section, odd)
  assert shown and "Ranking" not in shown and "Quality for" not in shown


@pytest.mark.parametrize("section", SECTIONS)
def test_any_leaf_may_be_missing_or_odd(section):
  make, draw = SECTIONS[section]
  whole = make()[:1] if section == "answers" else make()
  for path in paths(whole):
    for leaf in (None, "x", float("nan"), 1e308, [], {}):
      draw(put(whole, path, leaf))


@pytest.mark.parametrize("payload", PAYLOADS[::4])
def test_nothing_from_data_becomes_markup(payload):
  for make, draw in SECTIONS.values():
    read(draw(poisoned(make(), payload)))
  named = copy.deepcopy(job_judge())
  judges = named["agreement"]["judges"]
  judges[payload] = judges.pop("gpt")
  named["controls"] = {payload: named["controls"]["gpt"]}
  read(SECTIONS["judge"][1](poisoned(named, payload)))
