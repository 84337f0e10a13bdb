"""Every shape of row is known, converted exactly, or refused for a reason."""

import gzip
import json

import pytest
from test_records import load

from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import schemas
from jaxalign.data.schemas import choices, mapping, Refused, SCHEMAS
from jaxalign.data.schemas.choices import Undecided
from jaxalign.data.schemas.ranked import convert_tree
from jaxalign.data.schemas.schema import margin_of, turns_of


def turn(role, content, **other):
  return dict(role=role, content=content, **other)


HH = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Why?\n\nAssistant:"
ASK = [turn("user", "Hi"), turn("assistant", "Yo"), turn("user", "Why?")]
Q, A, B = (
  turn("user", "Hi"),
  turn("assistant", "good"),
  turn("assistant", "bad"),
)
TEXT = dict(prompt="Hi", chosen="good", rejected="bad", group="Hi")
CHAT = dict(
  prompt="\n\nHuman: Hi\n\nAssistant:",
  chosen=" good",
  rejected=" bad",
  group="Hi",
  turns=[Q],
)


def node(name, text, role="prompter", replies=(), **other):
  return dict(
    message_id=name, text=text, role=role, replies=list(replies), **other
  )


def share(m):
  return {
    "from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]),
    "value": m["content"],
  }


def cells(text, **more):
  """A row of a text, "a=Hi b=1": texts and numbers; and of other values."""
  row = dict(item.split("=") for item in text.split())
  for name, value in row.items():
    row[name] = json.loads(value) if value[-1].isdigit() else value
  return row | more


PREDICTIONS = ("bad", "good", "other", "else")
# Public layouts, and the pair that each must give; the answer that its people
# preferred is "good". More rows where one would not say what its codes mean.
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
    dict(context=[Q], response1="bad", response2="good", overall_preference=3),
    CHAT | dict(margin=3.0),
  ),
  "chatbot_arena": (
    dict(model_a="m1", model_b="m2", winner="model_b")
    | dict(conversation_a=[Q, B], conversation_b=[Q, A]),
    CHAT,
  ),
  "summarize_from_feedback": (
    dict(
      info=dict(post="Hi"),
      summaries=[dict(text="good"), dict(text="bad")],
      choice=0,
    ),
    TEXT,
  ),
  "webgpt": (
    cells(
      "answer_0=bad answer_1=good score_0=-0.5 score_1=0.5",
      question=dict(full_text="Hi"),
    ),
    TEXT | dict(margin=1.0),
  ),
  "halos_pairs": (
    dict(
      prompt=[Q], output_A=[B], output_B=[A], label=0, reward_difference=0.4
    ),
    CHAT | dict(margin=0.4),
  ),
  "halos_binary": (
    dict(prompt=[Q], output=[A], label=1),
    {k: CHAT[k] for k in ("prompt", "group", "turns")}
    | dict(completion=" good", label=True),
  ),
  "openai_preference": (
    dict(
      input=dict(messages=[Q], tools=[], parallel_tool_calls=True),
      preferred_output=[A],
      non_preferred_output=[B],
    ),
    CHAT,
  ),
  "orca_dpo": (
    dict(system="Be kind.", question="Hi", chosen="good", rejected="bad"),
    CHAT
    | dict(
      prompt="Be kind." + CHAT["prompt"], turns=[turn("system", "Be kind."), Q]
    ),
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
    dict(
      instruction="Hi",
      completions=[
        dict(response="bad", overall_score=3.0),
        dict(response="good", overall_score=9),
      ],
    ),
    TEXT | dict(margin=6.0),
  ),
  "fine_grained_rlhf": (
    {f"prediction {i}": x for i, x in enumerate(PREDICTIONS, 1)}
    | dict(question="Hi", preference=[2, 0, 0, 0, 0, 0]),
    TEXT,
  ),
}
GOOD = {
  "trees": dict(
    prompt=node(
      "q",
      "Hi",
      replies=[
        node("b", "Yo", "assistant", rank=1),
        node("a", "Hey", "assistant", rank=0),
      ],
    )
  ),
  "choices": dict(prompt="2+2=", first="5", second="4", choice="B"),
  "explicit_pairs": dict(prompt="2+2=", chosen="4", rejected="5"),
  "implicit_pairs": dict(chosen=HH + " I think", rejected=HH + " I thought"),
  "unpaired": dict(prompt="2+2=", completion="4", label=True),
  "chat_pairs": dict(
    prompt=ASK,
    chosen=[turn("assistant", "So")],
    rejected=[turn("assistant", "No")],
  ),
  "chat_unpaired": dict(messages=ASK + [turn("assistant", "So")], label=False),
  "scored_answers": dict(prompt="Hi", answers=["good", "bad"], scores=[2, 1.5]),
} | {name: row for name, (row, _) in LAYOUTS.items()}


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
  return getattr(error.value, "reason", "asked")


@pytest.mark.parametrize("name", SCHEMAS)
def test_contract_of_every_schema(name):
  """Each good row fits its own schema only, and converts to the right keys."""
  row = GOOD[name]
  assert [s.name for s in SCHEMAS.values() if s.fits(row)] == [name]
  assert schemas.detect_schema(dict(row, other=3)).name == name
  assert {*SCHEMAS[name].wants} <= row.keys() | {"choice"}
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
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(row) + "\n")
  loaded = load(str(path), max_bad_fraction=0.9)
  assert loaded.schema == name
  assert loaded.kind == ("pairs" if "chosen" in want else "unpaired")
  [fresh] = loaded.rows
  assert {k: v for k, v in fresh.items() if k != "id"} == want
  told = {c["column"]: c["became"] for c in loaded.readings[0].columns}
  assert told.keys() == row.keys()
  unread = {k for k, became in told.items() if became == "not read"}
  assert unread == {
    "pku_saferlhf": {"safer_response_id"},
    "argilla_orca": {"status"},
  }.get(name, set())


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize(
  "value",
  [None, 3, 2.5, "", " \n ", [], {}, [3], [None], b"x", True, "missing"],
)
def test_a_spoilt_field_is_refused_and_never_crashes(name, value):
  for field in GOOD[name]:
    row = dict(GOOD[name])
    if value == "missing":
      del row[field]
    else:
      row[field] = value
    try:
      found = converted(name, row)
    except (Refused, DataError):
      continue
    if isinstance(found, list) and all(isinstance(x, Refused) for x in found):
      continue
    # A whole dialogue needs no prompt; names, scores and extras need not be.
    assert field in {
      "chat_pairs": ("prompt",),
      "unpaired": ("label",),
      "halos_binary": ("label",),
      "chat_unpaired": ("label",),
      "shp": ("score_A", "score_B", "labels"),
      "pku_saferlhf": ("safer_response_id", "better_response_id"),
      "helpsteer2": ("preference_strength",),
      "helpsteer3": ("overall_preference",),
      "chatbot_arena": ("model_a", "model_b"),
      "halos_pairs": ("reward_difference", "label", "prompt"),
      "openai_preference": ("input",),
      "orca_dpo": ("system",),
      "argilla_orca": ("system", "status"),
      "webgpt": ("score_0", "score_1"),
      "lmsys_arena": ("id", *SCHEMAS["lmsys_arena"].wants[3:]),
      "summarize_from_feedback": ("choice",),
      "fine_grained_rlhf": tuple(f"prediction {i}" for i in (3, 4)),
      "scored_answers": (),
      "choices": ("choice",),
    }.get(name, ()), (field, value)


def test_text_is_prompt_plus_response_exactly():
  fresh = converted("implicit_pairs", GOOD["implicit_pairs"])
  assert fresh == dict(
    prompt=HH, chosen=" I think", rejected=" I thought", group="Hi"
  )
  fresh = converted("explicit_pairs", GOOD["explicit_pairs"])
  assert fresh == dict(prompt="2+2=", chosen="4", rejected="5", group="2+2=")
  fresh = converted(
    "explicit_pairs", dict(prompt=HH, chosen=" a", rejected=" b")
  )
  assert fresh["prompt"] == HH and fresh["group"] == "Hi"


def test_chat_renders_the_same_text_as_the_dialogue():
  fresh = converted("chat_pairs", GOOD["chat_pairs"])
  assert fresh == dict(
    prompt=HH, chosen=" So", rejected=" No", group="Hi", turns=ASK
  )
  system = turn("system", "Be brief.")
  fresh = converted(
    "chat_unpaired",
    dict(messages=[system] + ASK + [turn("assistant", "So")], label=1),
  )
  assert fresh == dict(
    prompt="Be brief." + HH,
    completion=" So",
    label=True,
    group="Hi",
    turns=[system] + ASK,
  )


def test_all_the_ways_to_write_a_chat_pair_agree():
  want = converted("chat_pairs", GOOD["chat_pairs"])
  yes, no = turn("assistant", "So"), turn("assistant", "No")
  parts = lambda m: dict(
    m,
    content=[
      dict(type="text", text=m["content"][:1]),
      dict(type="text", text=m["content"][1:]),
    ],
  )
  cell = lambda *messages: json.dumps(messages)
  for row in (
    dict(chosen=ASK + [yes], rejected=ASK + [no]),  # TRL, implicit
    dict(prompt=ASK[:1], chosen=ASK[1:] + [yes], rejected=ASK[1:] + [no]),
    dict(prompt=ASK, chosen=ASK + [yes], rejected=ASK + [no]),
    dict(
      prompt="Why?",
      messages=ASK + [yes],
      chosen=ASK + [yes],
      rejected=ASK + [no],
      score_chosen=8.0,
    ),  # UltraFeedback
    dict(
      conversations=list(map(share, ASK)), chosen=share(yes), rejected=share(no)
    ),  # ShareGPT
    dict(messages=ASK, chosen=yes, rejected=no),
    dict(messages=ASK, chosen="So", rejected="No"),
    dict(conversations=list(map(share, ASK)), chosen="So", rejected="No"),
    dict(trajectory=list(map(share, ASK)), chosen="So", rejected="No"),
    dict(messages=ASK + [yes], chosen="So", rejected="No"),  # it repeats one
    dict(prompt="Why?", messages=ASK, chosen="So", rejected="No"),
    dict(prompt=["Hi", "Why?"], chosen=ASK + [yes], rejected=ASK + [no]),
    dict(prompt=["Hi", "Why?"], messages=ASK, chosen="So", rejected="No"),
    dict(
      prompt=list(map(parts, ASK)), chosen=[parts(yes)], rejected=[parts(no)]
    ),
    dict(prompt=cell(*ASK), chosen=cell(yes), rejected=cell(no)),  # JSON
    dict(prompt=str(ASK), chosen=str([yes]), rejected=str([no])),  # pandas
    dict(
      prompt={k: [m[k] for m in ASK] for k in ("role", "content")},
      chosen=[yes],
      rejected=[no],
    ),
  ):
    assert schemas.detect_schema(row).name == "chat_pairs", row
    assert converted("chat_pairs", row) == want, row
  short = dict(prompt="Hi", chosen=[yes], rejected=[no])
  assert converted("chat_pairs", short) == dict(
    prompt="\n\nHuman: Hi\n\nAssistant:",
    chosen=" So",
    rejected=" No",
    group="Hi",
    turns=ASK[:1],
  )
  for row in (
    dict(prompt=ASK, completion=[yes], label=0),
    dict(completion=ASK + [yes], label=0),
    dict(messages=ASK + [yes], label=0),
  ):
    assert converted("chat_unpaired", row) == dict(
      prompt=HH, completion=" So", label=False, group="Hi", turns=ASK
    )


def test_a_system_text_is_the_system_turn_wherever_it_stands():
  system = turn("system", "Be kind.")
  want = [system, turn("user", "2+2=")]
  for row in (
    dict(GOOD["explicit_pairs"], system="Be kind."),
    dict(GOOD["explicit_pairs"], system_prompt="Be kind."),
    dict(prompt=want, chosen="4", rejected="5"),
    dict(prompt=want, system="Be kind.", chosen="4", rejected="5"),
  ):
    fresh = converted(schemas.detect_schema(row).name, row)
    assert fresh["turns"] == want, row
    assert fresh["prompt"] == "Be kind.\n\nHuman: 2+2=\n\nAssistant:"
  fresh = converted(
    "explicit_pairs",
    dict(prompt=HH, chosen=" a", rejected=" b", system="Be kind."),
  )
  assert fresh["turns"] == [system, *ASK] and fresh["chosen"] == " a"
  assert refused(
    "chat_pairs", dict(prompt=want, system="Be rude.", chosen="4", rejected="5")
  ) == ("two system turns")


def test_tools_stay_in_the_messages():
  call = dict(
    id="c1",
    type="function",
    function=dict(name="weather", arguments='{"city":"X"}'),
  )
  asks = turn("assistant", None, tool_calls=[call])
  said = turn("tool", '{"t": 12}', tool_call_id="c1")
  tools = [dict(name="weather")]
  fresh = converted(
    "chat_pairs",
    dict(
      tools=json.dumps(tools), messages=[Q, asks, said], chosen=A, rejected=B
    ),
  )
  assert fresh["turns"] == [Q, asks, said] and fresh["tools"] == tools
  assert '"weather"' in fresh["prompt"] and fresh["chosen"] == " good"
  assert "answers" not in fresh
  fresh = converted("chat_pairs", dict(prompt=[Q], chosen=[asks], rejected=[B]))
  assert fresh["answers"] == [asks, B] and "weather" in fresh["chosen"]
  fresh = converted(
    "chat_pairs",
    dict(
      conversations=[
        share(Q),
        {"from": "function_call", "value": '{"name": "weather"}'},
        {"from": "observation", "value": "12"},
      ],
      chosen="a",
      rejected="b",
    ),
  )
  assert fresh["turns"] == [
    Q,
    turn(
      "assistant",
      None,
      tool_calls=[
        dict(type="function", function=dict(name="weather", arguments={}))
      ],
    ),
    turn("tool", "12"),
  ]
  for bad, why in (
    (dict(asks, tool_calls="x"), "bad tool call"),
    ({"from": "function_call", "value": "x"}, "bad tool call"),
    (dict(asks, tool_calls=None), "null"),
  ):
    assert (
      refused("chat_pairs", dict(messages=[Q, bad], chosen="a", rejected="b"))
      == why
    )
  assert (
    refused(
      "chat_pairs",
      dict(messages=[Q], tools="weather", chosen="a", rejected="b"),
    )
    == "bad tools"
  )


def explicit(**other):
  return "explicit_pairs", dict(GOOD["explicit_pairs"], **other)


def implicit(chosen, rejected):
  return "implicit_pairs", dict(chosen=chosen, rejected=rejected)


def chat(**other):
  return "chat_pairs", dict(GOOD["chat_pairs"], **other)


def bare(**row):
  return "chat_pairs", row


OTHER = [turn("user", "Ho"), turn("assistant", "So")]
IMAGE = [dict(type="image_url", image_url="http://x")]
CUT = '[{"role": "assistant", "content": "so'
REASONS = [
  (explicit(chosen=" "), "empty response"),
  (explicit(prompt="\n"), "empty prompt"),
  (explicit(rejected=None), "null"),
  (explicit(rejected=True), "not a string"),
  (("explicit_pairs", dict(prompt="a", chosen="b")), "missing field"),
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
  (bare(chosen=ASK + OTHER[1:], rejected=OTHER), "prompts differ"),
  (bare(prompt="What?", chosen=OTHER, rejected=OTHER), "prompts differ"),
  (bare(chosen=ASK, rejected=ASK), "no Assistant turn"),
  (
    bare(messages=ASK[:2], chosen="a", rejected="b"),
    "prompt ends in an assistant turn",
  ),
  (
    bare(prompt=["Hi", "So?"], chosen=[Q, A], rejected=[Q, B]),
    "several prompts",
  ),
  (bare(prompt="Ho", messages=[Q], chosen="a", rejected="b"), "prompts differ"),
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
def test_what_a_code_says_by_itself(code, want):
  row = Undecided(code, None, names=("m1", "m2"))
  if "text" in str(code):
    row = row._replace(names=("the first text", "the second text"))
  if want is None:
    with pytest.raises(DataError, match="config.data.choice"):
      choices.meanings([row], "", "choice")
  else:
    table = choices.meanings([row], "", "choice")
    assert choices.side_of(row, table, "") == want


@pytest.mark.parametrize(
  "codes, want",
  [
    ((1, 2), "first second"),
    (("1", "2"), "first second"),
    ((1.0, 2.0), "first second"),
    (("response_0", "response_1"), "first second"),
    (("answer_1", "answer_2"), "first second"),
    ((0, 1), None),
    ((0, 1, 2), None),
    ((-3, -1, 0, 2), None),
    ((True, False), None),
    (("1", "0"), None),
    ((2,), None),
    (("output_1",), None),
    (("x", "y"), None),
  ],
)
def test_a_column_of_codes_is_certain_or_asked(codes, want):
  rows = [Undecided(code, None) for code in codes for _ in range(3)]
  if want is None:
    with pytest.raises(DataError) as error:
      choices.meanings(rows, "", "the column c")
    assert "the column c holds" in str(error.value)
    assert "--config.data.choice=" in str(error.value)
    return
  table = choices.meanings(rows, "", "choice")
  assert " ".join(choices.side_of(r, table, "") for r in rows[::3]) == want


def test_a_rule_says_what_codes_mean():
  rule = {"first": [1, "yes"], "second": ["0"], "tie": [9]}
  choices.check_choice(rule)
  rows = [Undecided(c, None) for c in ("1", 0.0, 9, "Yes", 3)]
  table = choices.meanings(rows, rule, "choice")
  assert [choices.side_of(r, table, rule) for r in rows] == [
    "first",
    "second",
    "tie",
    "first",
    None,
  ]
  for bad in (
    "x",
    {},
    {"first": 1},
    {"third": [1]},
    {"first": [1], "second": ["1"]},
  ):
    with pytest.raises(ConfigError, match="config.data.choice"):
      choices.check_choice(bad) if bad else choices.check_choice({"first": 1})
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
  row = dict(GOOD["unpaired"], label=label)
  if want is None:
    assert refused("unpaired", row) in ("bad label", "asked")
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
    "explicit_pairs wants prompt, chosen, rejected (missing: prompt)",
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
    assert schemas.detect_schema(row).name == "implicit_pairs"
    try:
      fresh = converted("implicit_pairs", row)
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
  pair = GOOD["explicit_pairs"]
  for row in (
    dict(chosen_score=9, rejected_score=7.5),
    dict(score_chosen=9, score_rejected=7.5),
    dict(metadata=dict(score_chosen=9, score_rejected=7.5)),
  ):
    assert converted("explicit_pairs", pair | row)["margin"] == 1.5
    assert converted("chat_pairs", GOOD["chat_pairs"] | row)["margin"] == 1.5
  assert margin_of(dict(metadata="none", chosen_score=3)) is None
  for bad in ("nine", float("nan"), float("inf"), True, [9]):
    assert (
      refused("explicit_pairs", dict(pair, chosen_score=bad, rejected_score=1))
      == "bad score"
    )


def test_a_tree_gives_every_ranked_pair_or_every_neighbour():
  say = lambda name, rank, **kw: node(
    name, f"text {name}", "assistant", rank=rank, **kw
  )
  follow = node("f", "And?", replies=[say("x", 1), say("y", 0)])
  tree = dict(
    prompt=node(
      "q",
      "Hi",
      replies=[
        say("c", 2),
        say("a", 0, replies=[follow]),
        say("b", 1),
        dict(say("late", None)),
      ],
    )
  )
  names = lambda pairs: [row["id"] for row in convert_tree(tree, pairs)]
  assert names("all") == ["a>b", "a>c", "b>c", "y>x"]
  assert names("adjacent") == ["a>b", "b>c", "y>x"]
  assert names("best_worst") == ["a>c", "y>x"]
  deep = convert_tree(tree, "all")[-1]
  assert deep == dict(
    id="y>x",
    prompt="\n\nHuman: Hi\n\nAssistant: text a\n\nHuman: And?\n\nAssistant:",
    chosen=" text y",
    rejected=" text x",
    group="Hi",
    turns=[
      turn("user", "Hi"),
      turn("assistant", "text a"),
      turn("user", "And?"),
    ],
  )
  reasons = lambda *replies: [
    one.reason if isinstance(one, Refused) else one["id"]
    for one in convert_tree(
      dict(prompt=node("q", "Hi", replies=replies)), "all"
    )
  ]
  assert reasons(say("a", 0), say("b", 0)) == ["tied ranks"]
  assert reasons(say("a", 0), say("b", 1, deleted=True)) == ["deleted message"]
  assert reasons(say("a", 0), dict(say("b", 1), text=" ")) == ["empty response"]
  assert reasons(say("a", 0), dict(say("b", 1), text="text a")) == [
    "chosen equals rejected"
  ]
  alone = lambda *replies: dict(prompt=node("q", "Hi", replies=replies))
  assert refused("trees", alone()) == "no ranked replies"
  assert refused("trees", alone(say("a", "0"), say("b", 1))) == "bad rank"
  assert refused("trees", alone(dict(say("a", 0), role="x"))) == "unknown role"
  assert refused("trees", dict(prompt=dict(tree["prompt"], replies=[3]))) == (
    "not a tree"
  )
  chain = node("n", "t", "assistant")
  for _ in range(5000):  # deeper than Python's stack
    chain = node("n", "t", replies=[chain])
  assert refused("trees", dict(prompt=chain)) == "no ranked replies"


def test_a_mapping_renames_and_digs():
  row = dict(a=dict(b=["x", dict(c="deep")]), q="?", extra=1)
  assert mapping.remap(
    row, dict(prompt="q", chosen="a.b.1.c", rejected="a.b.0")
  ) == dict(prompt="?", chosen="deep", rejected="x")
  assert (
    mapping.remap(row, dict(prompt="q.x", chosen="a.b.7", rejected="a.z")) == {}
  )
  rows = dict(x=[dict(t="a"), dict(t="b"), dict(u=1)])
  assert mapping.remap(rows, dict(answers="x.*.t")) == dict(
    answers=["a", "b", None]
  )
  mapping.check_fields(dict(prompt="a.b"))
  for bad in (
    dict(promt="q"),
    dict(prompt=""),
    dict(prompt="a..b"),
    dict(prompt=3),
  ):
    with pytest.raises(ConfigError, match="config.data.fields"):
      mapping.check_fields(bad)
