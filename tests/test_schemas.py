"""Every shape of row is known, converted exactly, or refused for a reason."""

import gzip
import json

import pytest

from jaxalign.data import schemas
from jaxalign.data.schemas import SCHEMAS, Refused
from jaxalign.data.schemas import fields, trees
from jaxalign.data.schemas.pairs import margin_of, turns_of
from jaxalign.errors import ConfigError, DataError


def turn(role, content):
  return dict(role=role, content=content)


HH = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Why?\n\nAssistant:"
ASK = [turn("user", "Hi"), turn("assistant", "Yo"), turn("user", "Why?")]
def node(name, text, role="prompter", replies=(), **other):
  return dict(message_id=name, text=text, role=role, replies=list(replies),
              **other)


GOOD = {
    "trees": dict(prompt=node("q", "Hi", replies=[
        node("b", "Yo", "assistant", rank=1),
        node("a", "Hey", "assistant", rank=0)])),
    "choices": dict(prompt="2+2=", first="5", second="4", choice=2),
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
  if SCHEMAS[name].many:
    [fresh] = fresh
    assert fresh.pop("id") == "a>b"
  assert fresh.keys() - {"turns"} == {"prompt", "group"} | (
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
                       group="Hi", turns=ASK)
  fresh = SCHEMAS["explicit_pairs"].convert(GOOD["explicit_pairs"])
  assert fresh == dict(prompt="2+2=", chosen="4", rejected="5", group="2+2=")
  fresh = SCHEMAS["explicit_pairs"].convert(
      dict(prompt=HH, chosen=" a", rejected=" b"))
  assert fresh["prompt"] == HH and fresh["group"] == "Hi"
  assert fresh["turns"] == ASK


def test_chat_renders_the_same_text_as_the_dialogue():
  fresh = SCHEMAS["chat_pairs"].convert(GOOD["chat_pairs"])
  assert fresh == dict(prompt=HH, chosen=" So", rejected=" No", group="Hi",
                       turns=ASK)
  system = turn("system", "Be brief.")
  fresh = SCHEMAS["chat_thumbs"].convert(dict(
      messages=[system] + ASK + [turn("assistant", "So")], label=1))
  assert fresh == dict(prompt="Be brief." + HH, completion=" So", label=True,
                       group="Hi", turns=[system] + ASK)


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
      group="Hi", turns=ASK[:1])
  assert SCHEMAS["chat_thumbs"].convert(dict(
      prompt=ASK, completion=[yes], label=0)) == dict(
          prompt=HH, completion=" So", label=False, group="Hi", turns=ASK)


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


def test_turns_of_a_dialogue():
  assert turns_of("Be kind.\n\nHuman:Hi\n\nAssistant:  Yo\n\nHuman: \n\nAssistant:"
                  ) == [turn("system", "Be kind."), turn("user", "Hi"),
                        turn("assistant", " Yo"), turn("user", "")]
  assert turns_of("2+2=") is turns_of("\n\nHuman: Hi") is None


def test_scores_become_a_margin():
  pair = GOOD["explicit_pairs"]
  for row in (dict(chosen_score=9, rejected_score=7.5),
              dict(score_chosen=9, score_rejected=7.5),
              dict(metadata=dict(score_chosen=9, score_rejected=7.5))):
    assert SCHEMAS["explicit_pairs"].convert(pair | row)["margin"] == 1.5
    assert SCHEMAS["chat_pairs"].convert(
        GOOD["chat_pairs"] | row)["margin"] == 1.5
  assert margin_of(dict(metadata="none", chosen_score=3)) is None
  for bad in ("9", float("nan"), True, [9]):
    assert refused("explicit_pairs", dict(
        pair, chosen_score=bad, rejected_score=1)) == "bad score"


def test_a_choice_names_the_better_side():
  row = dict(prompt="q", first="a", second="b")
  sides = lambda choice: {k: v for k, v in SCHEMAS["choices"].convert(
      dict(row, choice=choice)).items() if k in ("chosen", "rejected")}
  assert sides(1) == dict(chosen="a", rejected="b") == sides("1")
  assert sides(2) == dict(chosen="b", rejected="a")
  assert refused("choices", dict(row, choice=0)) == "tie"
  for bad in (3, True, None, "first", [1]):
    assert refused("choices", dict(row, choice=bad)) == "bad choice"


def test_a_tree_gives_every_ranked_pair_or_every_neighbour():
  say = lambda name, rank, **kw: node(name, f"text {name}", "assistant",
                                      rank=rank, **kw)
  follow = node("f", "And?", replies=[say("x", 1), say("y", 0)])
  tree = dict(prompt=node("q", "Hi", replies=[
      say("c", 2), say("a", 0, replies=[follow]), say("b", 1),
      dict(say("late", None))]))
  names = lambda convert: [row["id"] for row in convert(tree)]
  assert names(trees.convert_all) == ["a>b", "a>c", "b>c", "y>x"]
  assert names(trees.convert_adjacent) == ["a>b", "b>c", "y>x"]
  deep = trees.convert_all(tree)[-1]
  assert deep == dict(
      id="y>x", prompt="\n\nHuman: Hi\n\nAssistant: text a\n\nHuman: And?"
      "\n\nAssistant:", chosen=" text y", rejected=" text x", group="Hi",
      turns=[turn("user", "Hi"), turn("assistant", "text a"),
             turn("user", "And?")])
  reasons = lambda *replies: [
      one.reason if isinstance(one, Refused) else one["id"]
      for one in trees.convert_all(dict(prompt=node("q", "Hi",
                                                    replies=replies)))]
  assert reasons(say("a", 0), say("b", 0)) == ["tied ranks"]
  assert reasons(say("a", 0), say("b", 1, deleted=True)) == ["deleted message"]
  assert reasons(say("a", 0), dict(say("b", 1), text=" ")) == ["empty response"]
  assert reasons(say("a", 0), dict(say("b", 1), text="text a")) == [
      "chosen equals rejected"]
  alone = lambda *replies: dict(prompt=node("q", "Hi", replies=replies))
  assert refused("trees", alone()) == "no ranked replies"
  assert refused("trees", alone(say("a", "0"), say("b", 1))) == "bad rank"
  assert refused("trees", alone(dict(say("a", 0), role="x"))) == "unknown role"
  assert refused("trees", dict(prompt=dict(tree["prompt"], replies=[3]))) == (
      "not a tree")
  chain = node("n", "t", "assistant")
  for _ in range(5000):  # deeper than Python's stack
    chain = node("n", "t", replies=[chain])
  assert refused("trees", dict(prompt=chain)) == "no ranked replies"


def test_a_mapping_renames_and_digs():
  row = dict(a=dict(b=["x", dict(c="deep")]), q="?", extra=1)
  assert fields.remap(row, dict(prompt="q", chosen="a.b.1.c",
                                rejected="a.b.0")) == dict(
                                    prompt="?", chosen="deep", rejected="x")
  assert fields.remap(row, dict(prompt="q.x", chosen="a.b.7",
                                rejected="a.z")) == {}
  fields.check_fields(dict(prompt="a.b"))
  for bad in (dict(promt="q"), dict(prompt=""), dict(prompt="a..b"),
              dict(prompt=3)):
    with pytest.raises(ConfigError, match="config.data.fields"):
      fields.check_fields(bad)
