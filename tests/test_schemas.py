"""Every shape of row is known, converted exactly, or refused for a reason."""

import gzip
import json

import pytest

from jaxalign.data import schemas
from jaxalign.data.schemas import SCHEMAS, Refused
from jaxalign.errors import DataError


def turn(role, content):
  return dict(role=role, content=content)


HH = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Why?\n\nAssistant:"
ASK = [turn("user", "Hi"), turn("assistant", "Yo"), turn("user", "Why?")]
GOOD = {
    "explicit_pairs": dict(prompt="2+2=", chosen="4", rejected="5"),
    "implicit_pairs": dict(chosen=HH + " I think", rejected=HH + " I thought"),
    "thumbs": dict(prompt="2+2=", completion="4", label=True),
    "chat_pairs": dict(prompt=ASK, chosen=[turn("assistant", "So")],
                       rejected=[turn("assistant", "No")]),
    "chat_thumbs": dict(messages=ASK + [turn("assistant", "So")], label=False),
}


def refused(name, row):
  with pytest.raises(Refused) as error:
    SCHEMAS[name].convert(row)
  return error.value.reason


@pytest.mark.parametrize("name", SCHEMAS)
def test_contract_of_every_schema(name):
  """Each good row fits its own schema only, and converts to the right keys."""
  row = GOOD[name]
  assert [s.name for s in SCHEMAS.values() if s.matches(row)] == [name]
  assert schemas.detect(dict(row, other=3)).name == name
  before = json.dumps(row)
  fresh = SCHEMAS[name].convert(row)
  assert json.dumps(row) == before
  assert set(fresh) == {"prompt", "group"} | (
      {"chosen", "rejected"} if SCHEMAS[name].kind == "pairs"
      else {"completion", "label"})


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("value", [None, 3, 2.5, "", " \n ", [], {}, [3],
                                   [None], b"x", True, "missing"])
def test_a_spoilt_field_is_refused_and_never_crashes(name, value):
  for field in GOOD[name]:
    row = dict(GOOD[name])
    if value == "missing":
      del row[field]
    else:
      row[field] = value
    if field == "label" and value is True:
      continue
    if (name, field) == ("chat_pairs", "prompt") and value in (
        "missing", None, [], {}, 3, 2.5, b"x", True):
      continue  # chosen and rejected may hold the whole dialogue
    assert refused(name, row)


def test_text_is_prompt_plus_response_exactly():
  fresh = SCHEMAS["implicit_pairs"].convert(GOOD["implicit_pairs"])
  assert fresh == dict(prompt=HH, chosen=" I think", rejected=" I thought",
                       group="Hi")
  fresh = SCHEMAS["explicit_pairs"].convert(GOOD["explicit_pairs"])
  assert fresh == dict(prompt="2+2=", chosen="4", rejected="5", group="2+2=")
  fresh = SCHEMAS["explicit_pairs"].convert(
      dict(prompt=HH, chosen=" a", rejected=" b"))
  assert fresh["prompt"] == HH and fresh["group"] == "Hi"


def test_chat_renders_the_same_text_as_the_dialogue():
  fresh = SCHEMAS["chat_pairs"].convert(GOOD["chat_pairs"])
  assert fresh == dict(prompt=HH, chosen=" So", rejected=" No", group="Hi")
  system = turn("system", "Be brief.")
  fresh = SCHEMAS["chat_thumbs"].convert(dict(
      messages=[system] + ASK + [turn("assistant", "So")], label=1))
  assert fresh == dict(prompt="Be brief." + HH, completion=" So", label=True,
                       group="Hi")


def test_all_the_ways_to_write_a_chat_pair_agree():
  want = SCHEMAS["chat_pairs"].convert(GOOD["chat_pairs"])
  yes, no = turn("assistant", "So"), turn("assistant", "No")
  share = lambda m: {"from": {"user": "human", "assistant": "gpt"}[m["role"]],
                     "value": m["content"]}
  for row in (
      dict(chosen=ASK + [yes], rejected=ASK + [no]),  # TRL, implicit
      dict(prompt=ASK[:1], chosen=ASK[1:] + [yes], rejected=ASK[1:] + [no]),
      dict(prompt="Why?", messages=ASK + [yes], chosen=ASK + [yes],
           rejected=ASK + [no], score_chosen=8.0),  # UltraFeedback
      dict(conversations=list(map(share, ASK)), chosen=share(yes),
           rejected=share(no)),  # ShareGPT
      dict(messages=ASK, chosen=yes, rejected=no)):
    assert schemas.detect(row).name == "chat_pairs"
    assert SCHEMAS["chat_pairs"].convert(row) == want
  short = dict(prompt="Hi", chosen=[yes], rejected=[no])
  assert SCHEMAS["chat_pairs"].convert(short) == dict(
      prompt="\n\nHuman: Hi\n\nAssistant:", chosen=" So", rejected=" No",
      group="Hi")
  assert SCHEMAS["chat_thumbs"].convert(dict(
      prompt=ASK, completion=[yes], label=0)) == dict(
          prompt=HH, completion=" So", label=False, group="Hi")


def test_reasons():
  pair = lambda **kw: dict(GOOD["explicit_pairs"], **kw)
  assert refused("explicit_pairs", pair(chosen=" ")) == "empty response"
  assert refused("explicit_pairs", pair(prompt="\n")) == "empty prompt"
  assert refused("explicit_pairs", pair(rejected=None)) == "null"
  assert refused("explicit_pairs", pair(rejected=True)) == "not a string"
  assert refused("explicit_pairs", dict(prompt="a", chosen="b")) == (
      "missing field")
  assert refused("explicit_pairs", pair(rejected="4")) == (
      "chosen equals rejected")
  sides = lambda a, b: dict(chosen=a, rejected=b)
  name = "implicit_pairs"
  assert refused(name, sides(HH + " a", HH[4:] + " b")) == "prompts differ"
  assert refused(name, sides("Hi", HH + " b")) == "no Assistant turn"
  assert refused(name, sides(HH + " a", HH + " ")) == "empty response"
  assert refused(name, sides(HH + " a\n\nHuman: b", HH + " b")) == (
      "ends in a Human turn")
  assert refused(name, sides("\n\nAssistant: a", "\n\nAssistant: b")) == (
      "empty prompt")
  chat = lambda **kw: dict(GOOD["chat_pairs"], **kw)
  name = "chat_pairs"
  assert refused(name, chat(chosen=[turn("user", "x")])) == (
      "no Assistant turn")
  assert refused(name, chat(prompt=ASK + [turn("system", "x")])) == (
      "system turn not first")
  assert refused(name, chat(prompt=[turn("tool", "x")])) == "unknown role"
  assert refused(name, chat(chosen=[turn("assistant", " ")])) == (
      "empty response")
  assert refused(name, chat(prompt=[turn("user", " ")])) == "empty prompt"
  assert refused(name, chat(prompt=[turn("system", "x")])) == "empty prompt"
  other = [turn("user", "Ho"), turn("assistant", "So")]
  assert refused(name, dict(chosen=ASK + [turn("assistant", "So")],
                            rejected=other)) == "prompts differ"
  assert refused(name, dict(prompt="What?", chosen=other,
                            rejected=other)) == "prompts differ"
  assert refused(name, dict(chosen=ASK, rejected=ASK)) == "no Assistant turn"


@pytest.mark.parametrize("label, want", [
    (True, True), (False, False), (1, True), (0, False), (1.0, True),
    ("true", True), ("False", False), ("1", True), (" 0", False),
    (2, None), ("yes", None), (float("nan"), None), ([], None), (-1, None)])
def test_labels(label, want):
  row = dict(GOOD["thumbs"], label=label)
  if want is None:
    assert refused("thumbs", row) == "bad label"
  else:
    assert SCHEMAS["thumbs"].convert(row)["label"] is want


def test_an_unknown_shape_lists_what_was_found_and_known():
  with pytest.raises(DataError) as error:
    schemas.detect(dict(question="q", answer=3))
  for word in ("question (str)", "answer (int)", "config.data.schema",
               *SCHEMAS):
    assert word in str(error.value)
  with pytest.raises(DataError):
    schemas.detect({})


def test_real_dialogues_split_at_the_marker_never_inside_a_word(shared):
  path = shared / "data" / "hh-harmless" / "pairs.jsonl.gz"
  with gzip.open(path, "rt", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  refusals, alike = {}, 0
  for i, row in enumerate(rows):
    assert schemas.detect(row).name == "implicit_pairs"
    try:
      fresh = SCHEMAS["implicit_pairs"].convert(row)
    except Refused as error:
      refusals[i] = error.reason
      continue
    assert fresh["prompt"].endswith("\n\nAssistant:")
    for side in ("chosen", "rejected"):
      assert fresh["prompt"] + fresh[side] == row[side]
      assert fresh[side].startswith(" ")
      assert "\n\nAssistant:" not in fresh[side]
    alike += fresh["chosen"][:2] == fresh["rejected"][:2]
  assert refusals == {86: "empty response", 516: "empty response",
                      925: "empty response", 1103: "empty response",
                      1254: "prompts differ", 1688: "prompts differ"}
  assert alike > 100  # the pairs that a common-prefix split would cut wrong
