"""Every shape of row is known, converted exactly, or refused for a reason."""

import gzip
import json

import pytest
from rows import load, put, turn

from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import schemas
from jaxalign.data.schemas import choices, mapping, Refused, SCHEMAS
from jaxalign.data.schemas.choices import Undecided
from jaxalign.data.schemas.ranked import convert_tree
from jaxalign.data.schemas.schema import margin_of, turns_of

HH = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Why?\n\nAssistant:"
ASK = [turn("user", "Hi"), turn("assistant", "Yo"), turn("user", "Why?")]
Q, A, B = (
  turn("user", "Hi"),
  turn("assistant", "good"),
  turn("assistant", "bad"),
)
SO, NO = turn("assistant", "So"), turn("assistant", "No")
KIND = turn("system", "Be kind.")
TEXT = dict(prompt="Hi", chosen="good", rejected="bad", group="Hi")
HI = dict(prompt="\n\nHuman: Hi\n\nAssistant:", group="Hi", turns=[Q])
CHAT = HI | dict(chosen=" good", rejected=" bad")


def node(name, text, role="prompter", replies=(), **other):
  replies = list(replies)
  return dict(message_id=name, text=text, role=role, replies=replies, **other)


def share(m):
  """A message as ShareGPT has it."""
  role = {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"])
  return {"from": role, "value": m["content"]}


def cells(text, **more):
  """A row of a text, "a=Hi b=1": texts and numbers; and of other values."""
  row = dict(item.split("=") for item in text.split())
  for name, value in row.items():
    row[name] = json.loads(value) if value[-1].isdigit() else value
  return row | more


PREDICTIONS = ("bad", "good", "other", "else")
# Public layouts, and the pair that each must give; the answer that its people
# preferred is "good".
LAYOUTS = {
  "pku_saferlhf": (
    cells(
      "prompt=Hi response_0=bad response_1=good better_response_id=1 "
      "safer_response_id=0"
    ),
    TEXT,
  ),
  "shp": (
    cells(
      "history=Hi human_ref_A=good human_ref_B=bad labels=1 score_A=9 score_B=3"
    ),
    TEXT | dict(margin=6.0),
  ),
  "helpsteer2": (
    cells("prompt=Hi response_1=good response_2=bad preference_strength=-2"),
    TEXT | dict(margin=2.0),
  ),
  "helpsteer3": (
    cells("response1=bad response2=good overall_preference=3", context=[Q]),
    CHAT | dict(margin=3.0),
  ),
  "chatbot_arena": (
    cells("model_a=m1x model_b=m2x winner=model_b")
    | dict(conversation_a=[Q, B], conversation_b=[Q, A]),
    CHAT,
  ),
  "summarize_from_feedback": (
    dict(info=dict(post="Hi"), choice=0)
    | dict(summaries=[dict(text="good"), dict(text="bad")]),
    TEXT,
  ),
  "webgpt": (
    cells("answer_0=bad answer_1=good score_0=-0.5 score_1=0.5")
    | dict(question=dict(full_text="Hi")),
    TEXT | dict(margin=1.0),
  ),
  "halos_pairs": (
    dict(prompt=[Q], output_A=[B], output_B=[A])
    | dict(label=0, reward_difference=0.4),
    CHAT | dict(margin=0.4),
  ),
  "halos_binary": (
    dict(prompt=[Q], output=[A], label=1),
    HI | dict(completion=" good", label=True),
  ),
  "openai_preference": (
    dict(input=dict(messages=[Q], tools=[], parallel_tool_calls=True))
    | dict(preferred_output=[A], non_preferred_output=[B]),
    CHAT,
  ),
  "orca_dpo": (
    dict(system="Be kind.", question="Hi", chosen="good", rejected="bad"),
    CHAT | dict(prompt="Be kind." + CHAT["prompt"], turns=[KIND, Q]),
  ),
  "argilla_orca": (
    dict(system="", input="Hi", chosen="good", rejected="bad", status="tie"),
    CHAT,
  ),
  "spin": (dict(real=[Q, A], generated=[Q, B]), CHAT),
  "ms_swift": (dict(messages=[Q, A], rejected_response="bad"), CHAT),
  "lmsys_arena": (
    cells("id=3 winner_model_a=0 winner_model_b=1 winner_tie=0")
    | dict(prompt='["Hi"]', response_a='["bad"]', response_b='["good"]'),
    TEXT,
  ),
  "ultrafeedback": (
    dict(instruction="Hi")
    | dict(
      completions=[
        dict(response="bad", overall_score=3.0),
        dict(response="good", overall_score=9),
      ]
    ),
    TEXT | dict(margin=6.0),
  ),
  "fine_grained_rlhf": (
    {f"prediction {i}": x for i, x in enumerate(PREDICTIONS, 1)}
    | dict(question="Hi", preference=[2, 0, 0, 0, 0, 0]),
    TEXT,
  ),
}
EXPLICIT = dict(prompt="2+2=", chosen="4", rejected="5")
IMPLICIT = dict(chosen=HH + " I think", rejected=HH + " I thought")
CHAT_PAIR = dict(prompt=ASK, chosen=[SO], rejected=[NO])
LABELLED = dict(prompt="2+2=", completion="4", label=True)
RANKED = [
  node("b", "Yo", "assistant", rank=1),
  node("a", "Hey", "assistant", rank=0),
]
GOOD = [
  ("trees", dict(prompt=node("q", "Hi", replies=RANKED))),
  ("choices", dict(prompt="2+2=", first="5", second="4", choice="B")),
  ("pairs", EXPLICIT),
  ("pairs", IMPLICIT),
  ("pairs", CHAT_PAIR),
  ("unpaired", LABELLED),
  ("unpaired", dict(messages=ASK + [SO], label=False)),
  ("scored_answers", dict(prompt="Hi", answers=["good", "bad"], scores=[2, 1])),
  *((name, row) for name, (row, _) in LAYOUTS.items()),
]


def converted(name, row, pairs="all"):
  """What a row of a schema becomes, its codes settled as of a whole column."""
  schema = SCHEMAS[name]
  fresh = schema.convert(row, pairs) if schema.many else schema.convert(row)
  if isinstance(fresh, Undecided):
    table = choices.meanings([fresh], schema.rule, "choice")
    side = choices.side_of(fresh, table, schema.rule)
    if side is None:
      raise Refused("bad code", repr(fresh.code))
    fresh = fresh.make(side)
  return fresh


def refused(name, row):
  with pytest.raises((Refused, DataError)) as error:
    found = converted(name, row)
    if isinstance(found, list) and all(isinstance(x, Refused) for x in found):
      raise found[0]
  return getattr(error.value, "reason", "uncertain")


@pytest.mark.parametrize("name, row", GOOD)
def test_contract_of_every_schema(name, row):
  """Each good row fits its own schema only, and converts to the right keys."""
  assert {name for name, _ in GOOD} == SCHEMAS.keys()
  assert [s.name for s in SCHEMAS.values() if s.fits(row)] == [name]
  assert schemas.detect_schema(dict(row, other=3)).name == name
  before = json.dumps(row)
  fresh = converted(name, row)
  assert json.dumps(row) == before
  if SCHEMAS[name].many:
    [fresh] = [one for one in fresh if not isinstance(one, Refused)]
  if name == "trees":
    assert fresh.pop("id") == "a>b"
  assert fresh.keys() - {"turns", "margin"} == {"prompt", "group"} | (
    {"chosen", "rejected"} if "chosen" in fresh else {"completion", "label"}
  )


@pytest.mark.parametrize("name", LAYOUTS)
def test_public_layouts_give_the_pair_that_their_people_meant(name, tmp_path):
  row, want = LAYOUTS[name]
  loaded = load(put(tmp_path / "rows.jsonl", [row]), max_bad_fraction=0.9)
  assert loaded.schema == name
  assert loaded.kind == ("pairs" if "chosen" in want else "unpaired")
  [fresh] = loaded.rows
  assert {k: v for k, v in fresh.items() if k != "id"} == want
  became = {c["column"]: c["became"] for c in loaded.readings[0].columns}
  assert became.keys() == row.keys()
  unread = {k for k, role in became.items() if role == "not read"}
  assert unread == {
    "pku_saferlhf": {"safer_response_id"},
    "argilla_orca": {"status"},
  }.get(name, set())


# Fields whose value, whatever it is, need not refuse the row: a whole dialogue
# needs no prompt; names, scores and extras need not be.
FREE = {
  "pairs": "prompt",
  "unpaired": "label",
  "choices": "choice",
  "halos_binary": "label",
  "shp": "score_A score_B labels",
  "pku_saferlhf": "safer_response_id better_response_id",
  "helpsteer2": "preference_strength",
  "helpsteer3": "overall_preference",
  "chatbot_arena": "model_a model_b",
  "halos_pairs": "reward_difference label prompt",
  "openai_preference": "input",
  "orca_dpo": "system",
  "argilla_orca": "system status",
  "webgpt": "score_0 score_1",
  "lmsys_arena": "id winner_model_a winner_model_b winner_tie",
  "summarize_from_feedback": "choice",
}


@pytest.mark.parametrize("name, row", GOOD)
@pytest.mark.parametrize(
  "value",
  [None, 3, 2.5, "", " \n ", [], {}, [3], [None], b"x", True, "missing"],
)
def test_a_spoilt_field_is_refused_and_never_crashes(name, row, value):
  for field in row:
    spoilt = row | {field: value}
    if value == "missing":
      del spoilt[field]
    try:
      found = converted(name, spoilt)
    except (Refused, DataError):
      continue
    if isinstance(found, list) and all(isinstance(x, Refused) for x in found):
      continue
    free = FREE.get(name, "").split()
    unread = name == "fine_grained_rlhf" and field[-1] in "34"
    assert field in free or unread, (field, value)


@pytest.mark.parametrize(
  "row, prompt, chosen, rejected, group",
  [
    (IMPLICIT, HH, " I think", " I thought", "Hi"),
    (EXPLICIT, "2+2=", "4", "5", "2+2="),
    (dict(prompt=HH, chosen=" a", rejected=" b"), HH, " a", " b", "Hi"),
  ],
)
def test_text_is_prompt_plus_response_exactly(
  row, prompt, chosen, rejected, group
):
  want = dict(prompt=prompt, chosen=chosen, rejected=rejected, group=group)
  assert converted("pairs", row) == want


def halves(m):
  """A message whose content is a list of two parts."""
  texts = m["content"][:1], m["content"][1:]
  return dict(m, content=[dict(type="text", text=text) for text in texts])


def cell(*messages):
  return json.dumps(messages)


SHARED_ASK = list(map(share, ASK))
UNZIPPED = {k: [m[k] for m in ASK] for k in ("role", "content")}
SIDES = dict(chosen=ASK + [SO], rejected=ASK + [NO])
STRINGS = dict(chosen="So", rejected="No")
QUESTIONS = dict(prompt=["Hi", "Why?"])


@pytest.mark.parametrize(
  "row",
  [
    CHAT_PAIR,
    SIDES,  # TRL, implicit
    dict(prompt=ASK[:1], chosen=ASK[1:] + [SO], rejected=ASK[1:] + [NO]),
    dict(prompt=ASK) | SIDES,
    # UltraFeedback
    dict(prompt="Why?", messages=ASK + [SO], score_chosen=8.0) | SIDES,
    dict(conversations=SHARED_ASK, chosen=share(SO), rejected=share(NO)),
    dict(messages=ASK, chosen=SO, rejected=NO),
    dict(messages=ASK) | STRINGS,
    dict(conversations=SHARED_ASK) | STRINGS,
    dict(trajectory=SHARED_ASK) | STRINGS,
    dict(messages=ASK + [SO]) | STRINGS,  # it repeats one
    dict(prompt="Why?", messages=ASK) | STRINGS,
    QUESTIONS | SIDES,
    QUESTIONS | dict(messages=ASK) | STRINGS,
    dict(
      prompt=[*map(halves, ASK)], chosen=[halves(SO)], rejected=[halves(NO)]
    ),
    dict(prompt=cell(*ASK), chosen=cell(SO), rejected=cell(NO)),  # JSON
    dict(prompt=str(ASK), chosen=str([SO]), rejected=str([NO])),  # pandas
    dict(prompt=UNZIPPED, chosen=[SO], rejected=[NO]),
  ],
)
def test_all_the_ways_to_write_a_chat_pair_agree(row):
  """And the text is that of the dialogue."""
  want = dict(prompt=HH, chosen=" So", rejected=" No", group="Hi", turns=ASK)
  assert schemas.detect_schema(row).name == "pairs"
  assert converted("pairs", row) == want


def test_a_text_and_messages_that_answer_it():
  row = dict(prompt="Hi", chosen=[SO], rejected=[NO])
  assert converted("pairs", row) == HI | dict(chosen=" So", rejected=" No")


@pytest.mark.parametrize("system", [[], [KIND]])
def test_all_the_ways_to_write_a_labelled_chat_agree(system):
  ask = system + ASK
  text = "Be kind." * bool(system) + HH
  for row in (
    dict(prompt=ask, completion=[SO], label=0),
    dict(completion=ask + [SO], label=0),
    dict(messages=ask + [SO], label=0),
  ):
    want = dict(prompt=text, completion=" So", label=False)
    assert converted("unpaired", row) == want | dict(group="Hi", turns=ask)


def test_prompts_that_differ_are_shown_where_they_do():
  row = dict(chosen=HH + " a", rejected=HH.replace("Yo", "No") + " b")
  with pytest.raises(Refused, match="from character 24: 'Yo.* and 'No"):
    converted("pairs", row)


def test_a_system_text_is_the_system_turn_wherever_it_stands():
  want = [KIND, turn("user", "2+2=")]
  for row in (
    dict(EXPLICIT, system="Be kind."),
    dict(EXPLICIT, system_prompt="Be kind."),
    dict(prompt=want, chosen="4", rejected="5"),
    dict(prompt=want, system="Be kind.", chosen="4", rejected="5"),
  ):
    fresh = converted(schemas.detect_schema(row).name, row)
    assert fresh["turns"] == want, row
    assert fresh["prompt"] == "Be kind.\n\nHuman: 2+2=\n\nAssistant:"
  row = dict(prompt=HH, chosen=" a", rejected=" b", system="Be kind.")
  fresh = converted("pairs", row)
  assert fresh["turns"] == [KIND, *ASK] and fresh["chosen"] == " a"


def test_tools_stay_in_the_messages():
  function = dict(name="weather", arguments='{"city":"X"}')
  call = dict(id="c1", type="function", function=function)
  calls = turn("assistant", None, tool_calls=[call])
  result = turn("tool", '{"t": 12}', tool_call_id="c1")
  tools = [dict(name="weather")]
  row = dict(tools=json.dumps(tools), messages=[Q, calls, result])
  fresh = converted("pairs", row | dict(chosen=A, rejected=B))
  assert fresh["turns"] == [Q, calls, result] and fresh["tools"] == tools
  assert '"weather"' in fresh["prompt"] and fresh["chosen"] == " good"
  assert "answers" not in fresh
  fresh = converted("pairs", dict(prompt=[Q], chosen=[calls], rejected=[B]))
  assert fresh["answers"] == [calls, B] and "weather" in fresh["chosen"]
  named = {"from": "function_call", "value": '{"name": "weather"}'}
  messages = [share(Q), named, {"from": "observation", "value": "12"}]
  fresh = converted("pairs", dict(conversations=messages) | STRINGS)
  call = dict(type="function", function=dict(name="weather", arguments={}))
  calls = turn("assistant", None, tool_calls=[call])
  assert fresh["turns"] == [Q, calls, turn("tool", "12")]


def explicit(**other):
  return "pairs", dict(EXPLICIT, **other)


def implicit(chosen, rejected):
  return "pairs", dict(chosen=chosen, rejected=rejected)


def chat(**other):
  return "pairs", dict(CHAT_PAIR, **other)


def bare(**row):
  return "pairs", STRINGS | row


def tree(*replies):
  return "trees", dict(prompt=node("q", "Hi", replies=replies))


def reply(name, rank, **other):
  return node(name, f"text {name}", "assistant", rank=rank) | other


OTHER = [turn("user", "Ho"), turn("assistant", "So")]
IMAGE = [dict(type="image_url", image_url="http://x")]
CUT = '[{"role": "assistant", "content": "so'
NO_CALL = turn("assistant", None, tool_calls="x")
NO_TEXT = turn("assistant", None, tool_calls=None)
NO_JSON = {"from": "function_call", "value": "x"}
CHAIN = node("n", "t", "assistant")
for _ in range(5000):  # deeper than Python's stack
  CHAIN = node("n", "t", replies=[CHAIN])
REASONS = [
  (explicit(chosen=" "), "empty response"),
  (explicit(prompt="\n"), "empty prompt"),
  (explicit(rejected=None), "null"),
  (explicit(rejected=True), "not a string"),
  (("pairs", dict(prompt="a", chosen="b")), "missing field"),
  (explicit(rejected="4"), "chosen equals rejected"),
  (explicit(chosen=CUT), "messages in a text that cannot be read"),
  (implicit(HH + " a", HH[4:] + " b"), "prompts differ"),
  (implicit("Hi", HH + " b"), "no Assistant turn"),
  (implicit(HH + " a", HH + " "), "empty response"),
  (implicit(HH + " a\n\nHuman: b", HH + " b"), "ends in a Human turn"),
  (implicit("\n\nAssistant: a", "\n\nAssistant: b"), "empty prompt"),
  (chat(chosen=[turn("user", "x")]), "no Assistant turn"),
  (chat(prompt=ASK + [turn("system", "x")]), "system turn not first"),
  (chat(prompt=[turn("wizard", "x")]), "unknown role"),
  (chat(chosen=[turn("assistant", " ")]), "empty response"),
  (chat(prompt=[turn("user", " ")]), "empty prompt"),
  (chat(prompt=[turn("system", "x")]), "empty prompt"),
  (chat(prompt=[turn("user", IMAGE)]), "content is not text"),
  (chat(prompt=[KIND, *ASK], system="Be rude."), "two system turns"),
  (bare(chosen=ASK + OTHER[1:], rejected=OTHER), "prompts differ"),
  (bare(prompt="What?", chosen=OTHER, rejected=OTHER), "prompts differ"),
  (bare(chosen=ASK, rejected=ASK), "no Assistant turn"),
  (bare(messages=ASK[:2]), "prompt ends in an assistant turn"),
  (
    bare(prompt=["Hi", "So?"], chosen=[Q, A], rejected=[Q, B]),
    "several prompts",
  ),
  (bare(prompt="Ho", messages=[Q]), "prompts differ"),
  (bare(messages=[Q, NO_CALL]), "bad tool call"),
  (bare(messages=[Q, NO_JSON]), "bad tool call"),
  (bare(messages=[Q, NO_TEXT]), "null"),
  (bare(messages=[Q], tools="weather"), "bad tools"),
  *(
    (explicit(chosen_score=bad, rejected_score=1), "bad score")
    for bad in ("nine", float("nan"), float("inf"), True, [9])
  ),
  (tree(), "no ranked replies"),
  (tree(reply("a", 0), reply("b", 0)), "tied ranks"),
  (tree(reply("a", 0), reply("b", 1, deleted=True)), "deleted message"),
  (tree(reply("a", 0), reply("b", 1, text=" ")), "empty response"),
  (tree(reply("a", 0), reply("b", 1, text="text a")), "chosen equals rejected"),
  (tree(reply("a", "0"), reply("b", 1)), "bad rank"),
  (tree(reply("a", 0, role="x")), "unknown role"),
  (tree(3), "not a tree"),
  (("trees", dict(prompt=CHAIN)), "no ranked replies"),
]


@pytest.mark.parametrize("row, reason", REASONS, ids=range(len(REASONS)))
def test_reasons(row, reason):
  assert refused(*row) == reason


FIRST = "A|a|first|model_a|Model A|response_a|[[A]]|A>B|A>>B|left|m1"
CODES = (
  dict.fromkeys((FIRST + "|the first text").split("|"), "first")
  | dict.fromkeys("B second model_b [[B]] B>A m2".split(), "second")
  | {"the second text": "second"}
  | dict.fromkeys(("tie", "tie (bothbad)", "both", "neither", "A=B"), "tie")
)


@pytest.mark.parametrize(
  "code, want",
  [
    *CODES.items(),
    *((c, None) for c in (0, 1, 2, -1, True, "1", "response_1", "c", "x")),
  ],
)
def test_what_a_code_means_by_itself(code, want):
  row = Undecided(code, None, names=("m1", "m2"))
  if "text" in str(code):
    row = row._replace(names=("the first text", "the second text"))
  if want is None:
    with pytest.raises(DataError, match="config.data.choice"):
      choices.meanings([row], "", "choice")
  else:
    table = choices.meanings([row], "", "choice")
    assert choices.side_of(row, table, "") == want


CERTAIN = [
  (1, 2),
  ("1", "2"),
  (1.0, 2.0),
  ("response_0", "response_1"),
  ("answer_1", "answer_2"),
]
UNCERTAIN = [
  (0, 1),
  (0, 1, 2),
  (-3, -1, 0, 2),
  (True, False),
  ("1", "0"),
  (2,),
  ("output_1",),
  ("x", "y"),
]


@pytest.mark.parametrize("codes", CERTAIN)
def test_a_column_of_codes_whose_meaning_is_certain(codes):
  rows = [Undecided(code, None) for code in codes for _ in range(3)]
  table = choices.meanings(rows, "", "choice")
  sides = [choices.side_of(row, table, "") for row in rows[::3]]
  assert sides == ["first", "second"]


@pytest.mark.parametrize("codes", UNCERTAIN)
def test_a_column_of_codes_whose_meaning_is_not_certain(codes):
  rows = [Undecided(code, None) for code in codes for _ in range(3)]
  want = "the column c holds.*--config.data.choice="
  with pytest.raises(DataError, match=want):
    choices.meanings(rows, "", "the column c")


def test_a_rule_gives_codes_their_meaning():
  rule = {"first": [1, "yes"], "second": ["0"], "tie": [9]}
  choices.check_choice(rule)
  rows = [Undecided(c, None) for c in ("1", 0.0, 9, "Yes", 3)]
  table = choices.meanings(rows, rule, "choice")
  sides = [choices.side_of(r, table, rule) for r in rows]
  assert sides == ["first", "second", "tie", "first", None]
  twice = {"first": [1], "second": ["1"]}
  for bad in ("x", {"first": 1}, {"third": [1]}, twice):
    with pytest.raises(ConfigError, match="config.data.choice"):
      choices.check_choice(bad)
  row = dict(prompt="q", first="a", second="b", first_score=1, second_score="2")
  fresh = SCHEMAS["choices"].convert(row)
  assert choices.side_of(fresh, {}, choices.BY_SCORE) == "second"
  assert fresh.make("second")["margin"] == 1.0
  with pytest.raises(Refused, match="tie"):
    fresh.make("tie")


LABELS = (
  dict.fromkeys((True, "true", "1", "thumbs_up", "desirable"), True)
  | dict.fromkeys((False, "False", " 0", "thumbs down", -1, "Rejected"), False)
  | dict.fromkeys((2, "yes", float("nan"), 5))
)


@pytest.mark.parametrize(
  "label, want",
  [*LABELS.items(), (1, True), (1.0, True), (0, False), ([], None)],
)
def test_labels(label, want):
  row = dict(LABELLED, label=label)
  if want is None:
    assert refused("unpaired", row) in ("bad label", "uncertain")
  else:
    assert converted("unpaired", row)["label"] is want


def test_an_unknown_shape_lists_what_was_found_and_what_each_schema_wants():
  with pytest.raises(DataError) as error:
    schemas.detect_schema(dict(question="q", chosen="a", rejected="b", score=3))
  for word in (
    "question (str)",
    "score (int)",
    "config.data.schema",
    "config.data.fields.prompt=",
    *SCHEMAS,
    "pairs wants prompt, chosen, rejected (missing: prompt)",
  ):
    assert word in str(error.value)
  with pytest.raises(DataError):
    schemas.detect_schema({})


def test_real_dialogues_split_at_the_marker_never_inside_a_word(shared):
  path = shared / "data" / "hh-harmless" / "pairs.jsonl.gz"
  with gzip.open(path, "rt", encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
  refusals, alike = {}, 0
  for i, row in enumerate(rows):
    assert schemas.detect_schema(row).name == "pairs"
    try:
      fresh = converted("pairs", row)
    except Refused as error:
      refusals[i] = error.reason
      continue
    assert fresh["prompt"].endswith("\n\nAssistant:")
    for side in ("chosen", "rejected"):
      assert fresh["prompt"] + fresh[side] == row[side]
      assert fresh[side].startswith(" ")
      assert "\n\nAssistant:" not in fresh[side]
    alike += fresh["chosen"][:2] == fresh["rejected"][:2]
  assert refusals == {
    86: "empty response",
    516: "empty response",
    925: "empty response",
    1103: "empty response",
    1254: "prompts differ",
    1688: "prompts differ",
  }
  assert alike > 100  # the pairs that a common-prefix split would cut wrong


def test_turns_of_a_dialogue():
  assert turns_of(
    "Be kind.\n\nHuman:Hi\n\nAssistant:  Yo\n\nHuman: \n\nAssistant:"
  ) == [
    turn("system", "Be kind."),
    turn("user", "Hi"),
    turn("assistant", " Yo"),
    turn("user", ""),
  ]
  assert turns_of("2+2=") is turns_of("\n\nHuman: Hi") is None


def test_scores_become_a_margin():
  inner = dict(score_chosen=9, score_rejected=7.5)
  outer = dict(chosen_score=9, rejected_score=7.5)
  for row in (inner, outer, dict(metadata=inner)):
    for pair in (EXPLICIT, CHAT_PAIR):
      assert converted("pairs", pair | row)["margin"] == 1.5
  assert margin_of(dict(metadata="none", chosen_score=3)) is None


def test_a_tree_gives_every_ranked_pair_or_every_neighbour():
  follow = node("f", "And?", replies=[reply("x", 1), reply("y", 0)])
  best = reply("a", 0, replies=[follow])
  _, row = tree(reply("c", 2), best, reply("b", 1), reply("late", None))
  for pairs, want in (
    ("all", "a>b a>c b>c y>x"),
    ("adjacent", "a>b b>c y>x"),
    ("best_worst", "a>c y>x"),
  ):
    assert [x["id"] for x in convert_tree(row, pairs)] == want.split()
  assert convert_tree(row, "all")[-1] == dict(
    id="y>x",
    prompt="\n\nHuman: Hi\n\nAssistant: text a\n\nHuman: And?\n\nAssistant:",
    chosen=" text y",
    rejected=" text x",
    group="Hi",
    turns=[Q, turn("assistant", "text a"), turn("user", "And?")],
  )


def test_a_mapping_renames_and_digs():
  row = dict(a=dict(b=["x", dict(c="deep")]), q="?", extra=1)
  fields = dict(prompt="q", chosen="a.b.1.c", rejected="a.b.0")
  want = dict(prompt="?", chosen="deep", rejected="x")
  assert mapping.remap(row, fields) == want
  nowhere = dict(prompt="q.x", chosen="a.b.7", rejected="a.z")
  assert mapping.remap(row, nowhere) == {}
  rows = dict(x=[dict(t="a"), dict(t="b"), dict(u=1)])
  fields = dict(answers="x.*.t")
  assert mapping.remap(rows, fields) == dict(answers=["a", "b", None])
  mapping.check_fields(dict(prompt="a.b"))
  for bad in (dict(promt="q"), *(dict(prompt=p) for p in ("", "a..b", 3))):
    with pytest.raises(ConfigError, match="config.data.fields"):
      mapping.check_fields(bad)
