"""The command on tables of raters: real files, every layout, bad input."""

import copy
import gzip
import json

import hypothesis
from hypothesis import strategies as st
import pyarrow
from pyarrow import parquet
import pytest
from sklearn import metrics
from test_report import paths, PAYLOADS, poisoned
from test_report import read as parsed

from jaxalign.cli import agreement
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.eval import interrater, rating_codes, rating_tables
from jaxalign.eval.interrater import Verdict
from jaxalign.report import raters_page, terminal


def run(*flags):
  return agreement.main(["agreement", *map(str, flags)])


def written(folder, rows, name="votes.jsonl"):
  path = folder / name
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def read(*files, choice=None, **kwargs):
  choice = rating_codes.parse_choice(choice)
  return rating_tables.read_ratings(list(map(str, files)), choice, **kwargs)


def table(folder, rows, choice=None, **kwargs):
  return read(written(folder, rows), choice=choice, **kwargs)


def numbers(folder, *flags):
  out = folder / "out.json"
  assert run(*flags, f"--output={out}") == 0
  return json.loads(out.read_text())


def visible(page):
  """What a reader of a page sees, in one line."""
  return " ".join(" ".join(parsed(page.read_text()).text).split())


def wide(codes, columns=("rater1", "rater2")):
  return [dict(id=i, **dict.fromkeys(columns, v)) for i, v in enumerate(codes)]


# Real files.


def test_pandalm_s_three_raters(shared, tmp_path, capsys):
  page, data = tmp_path / "page.html", shared / "data/pandalm/testset-v1.json"
  assert run(f"--data={data}", f"--output={page}") == 0
  text = capsys.readouterr().out
  for words in (
    "alpha over all raters: 0.8642 [0.842, 0.887], on 999 pairs",
    *("0.8520 [", "0.8789 [", "0.8617 [", "item: idx"),
    "texts in response1 and response2",
    "'0' = tie, '1' = response1 wins, '2' = response2 wins",
    *("6 of type bool", "not used: 'motivation_app'"),
  ):
    assert words in text, words
  shown = visible(page)
  assert "0.8642" in shown and "annotator1 / annotator3" in shown


@pytest.mark.parametrize("flag", ["--data", "--judges"])
def test_pandalm_s_judge_beside_the_humans(shared, tmp_path, flag, capsys):
  """The figures themselves are tested in test_agreement.py."""
  folder = shared / "data/pandalm"
  judge = f"{flag}={folder}/gpt-3.5-turbo-testset-v1.json"
  got = numbers(tmp_path, f"--data={folder}/testset-v1.json", judge)
  names = ("testset-v1.json", "gpt-3.5-turbo-testset-v1.json")
  table = read(*(folder / name for name in names))
  humans = ["annotator1", "annotator2", "annotator3"]
  wanted = interrater.judged(table.rows, ["gpt-3.5-turbo"], humans, table.sizes)
  assert got["judged"] == json.loads(json.dumps(wanted))
  assert "25 verdicts could not be read: 'garbage'" in capsys.readouterr().out
  # Lengths, from the file: 993 pairs whose answers are both texts.
  longer = decided = 0
  for row in json.loads((folder / "testset-v1.json").read_text()):
    texts = row["response1"], row["response2"]
    if all(isinstance(text, str) for text in texts):
      one, two = (len(text.strip()) for text in texts)
      if row["annotator1"] and one != two:
        decided += 1
        longer += (row["annotator1"] == 1) == (one > two)
  rater = {r["name"]: r for r in got["raters"]}["annotator1"]
  assert rater["lengths"]["longer"]["n"] == decided
  assert rater["lengths"]["longer"]["value"] == pytest.approx(longer / decided)
  assert rater["lengths"]["n"] == 993 and rater["role"] == "human"


def test_llmbar_s_judges_in_both_orders(shared, tmp_path):
  folder = shared / "data/llmbar-natural"
  files = [f"{folder}/judge-*.json", f"{folder}/dataset.json"]
  got = numbers(tmp_path, *(f"--data={name}" for name in files))
  raters = {r["name"]: r for r in got["raters"]}
  assert set(raters) == {"GPT-4", "ChatGPT", "LLaMA2", "PaLM2", "label"}
  orders = raters["GPT-4"]["orders"]
  assert f"{orders['kappa']['value']:.3f}" == "0.939"
  assert orders["consistent"]["value"] == 0.97
  assert raters["PaLM2"]["unparsable"] == 6
  assert raters["PaLM2"]["orders"]["unparsable"]["value"] == 0.03
  assert raters["label"]["verdicts"] == 100  # in all five files
  assert raters["label"]["role"] == "human"
  assert set(got["judged"]["judges"]) == set(raters) - {"label"}
  # A pair whose two orders disagree is a tie, which the label never is.
  table = read(*files)
  winners = interrater.settle_orders(table.rows, "GPT-4")
  assert list(winners.values()).count("") == 3
  # The same as a table made by hand.
  wanted = []
  for name in ("GPT-4", "ChatGPT", "LLaMA2", "PaLM2"):
    for row in json.loads((folder / f"judge-{name}.json").read_text()):
      item = row["input"].strip()
      label = "first" if row["label"] == 1 else "second"
      wanted.append((item, "1", "2", "label", label))
      for both in row["results"]:
        for swap, shown in ((False, ("1", "2")), (True, ("2", "1"))):
          winner = both[f"swap = {swap}"]["winner"]  # "1" in either order
          place = winner and ("first" if winner == shown[0] else "second")
          wanted.append((item, *shown, name, place))
  plain = [(r.item, r.first[-1], r.second[-1], *r[3:]) for r in table.rows]
  assert set(plain) == set(wanted)


# Every layout: rows -> verdicts, the item and names as the layout has them.


def cell(text):
  """A cell as JSON, or as the word that it is."""
  try:
    return json.loads(text)
  except ValueError:
    return text


def cells(head, *lines, **same):
  """Rows of cells between bars under a head of columns; `same` in all."""
  names = head.split()
  rows = [[cell(c.strip()) for c in line.split("|")] for line in lines]
  return [same | dict(zip(names, row, strict=True)) for row in rows]


ONE, TWO = "pair 0001 answer 1", "pair 0001 answer 2"


def verdicts(*lines):
  """(item, first, second, rater, verdict) of words; 1 and 2 are answers."""
  names = {"1": ONE, "2": TWO, "_": " ", "none": None}
  out = set()
  for line in lines:
    item, first, second, *more = line.split()
    rater, verdict = (names.get(w, w.replace("_", " ")) for w in more)
    shown = (names.get(w, w.replace("_", " ")) for w in (first, second))
    out.add((item.replace("_", " "), *shown, rater, verdict))
  return out


RATERS = ("ann", "ben")
PAIR = dict(prompt="p", response_a="a", response_b="b")
SIDES = dict(first="m", second="k")
TALK = lambda text: [
  dict(role="user", content="hello"),
  dict(role="assistant", content=text),
]
LAYOUTS = {
  "long": (
    cells(
      "item first second rater verdict",
      "7|m|k|ann|first",
      "7|k|m|ann|A",
      "7|m|k|ben|tie",
      "8|m|k|ben|null",
    ),
    verdicts("7 m k ann first", "7 k m ann first", "7 m k ben tie"),
  ),
  "long, the winner's name": (
    cells(
      "model_a model_b judge winner",
      "gpt 4|llama|x|GPT-4",
      "llama|gpt 4|y|gpt 4",
      question_id="q",
    ),
    verdicts("q gpt_4 llama x first", "q llama gpt_4 y second"),
  ),
  "Chatbot Arena": (
    cells(
      "judge winner",
      "u0|model_b",
      "u1|tie (bothbad)",
      "u2|model_a",
      **dict(question_id="q", model_a="m", model_b="k", turn=2),
      **dict(conversation_a=TALK("aaa"), conversation_b=TALK("b")),
    ),
    verdicts("q_/_2 m k u0 second", "q_/_2 m k u1 tie", "q_/_2 m k u2 first"),
  ),
  "AlpacaEval": (
    cells(
      "annotator preference",
      *("x|1.0", "y|2.0", "z|1.5"),
      **dict(instruction="q", output_1="a", output_2="b"),
      **dict(generator_1="m", generator_2="k"),
    ),
    verdicts("q m k x first", "q m k y second", "q m k z tie"),
  ),
  "OpenAI's comparisons of summaries": (
    cells(
      "worker choice",
      *("x|0", "y|1"),
      info=dict(id="t", post="p"),
      summaries=[dict(text="one", policy="s"), dict(text="two", policy="s")],
    ),
    verdicts("t 1 2 x first", "t 1 2 y second"),
  ),
  "long, whose id numbers the rows": (
    cells("id rater verdict", "100|x|A", "101|y|B", **PAIR),
    verdicts("p 1 2 x first", "p 1 2 y second"),
  ),
  "long, of one rater": (  # an id that may stand in other files
    cells("id verdict", "0|A", "1|B", rater="x", **PAIR),
    verdicts("0 1 2 x first", "1 1 2 x second"),
  ),
  "wide, PandaLM's": (
    cells(
      "idx response1 response2 annotator1 annotator2 annotator3", "3|a|b|0|2|1"
    ),
    verdicts(
      *("3 1 2 annotator1 tie", "3 1 2 annotator2 second"),
      "3 1 2 annotator3 first",
    ),
  ),
  "wide, by words": (
    cells(
      "prompt ann ben note",
      *("p|A|model_b|x", "q|[[C]]||A", "r|[[B]]|Model A|null"),
    ),
    verdicts(
      *("p 1 2 ann first", "p 1 2 ben second", "q 1 2 ann tie"),
      *("r 1 2 ann second", "r 1 2 ben first"),
    ),
  ),
  "wide, 1 and 2": (
    cells("id rater_1 rater_2", '1|1|"2"', '2|2.0|"1"'),
    {
      (i, ONE, TWO, rater, verdict)
      for i, words in (("1", ("first", "second")), ("2", ("second", "first")))
      for rater, verdict in zip(("rater_1", "rater_2"), words)
    },
  ),
  "wide, signed strength": (
    cells(
      "prompt preference_strength",
      *("p|-3", "q|0", "r|1"),
      **dict(response_1="a", response_2="b"),
    ),
    verdicts("p 1 2 votes first", "q 1 2 votes tie", "r 1 2 votes second"),
  ),
  "MT-bench, both orders": (
    cells(
      "question_id g1_winner g2_winner",
      *("81|model_1|model_2", "82|tie|error"),
      **dict(turn=1, model_1="m", model_2="k", judge=["gpt-4", "pair-v2"]),
    ),
    # In the second game model_2 stands first, and is meant by its name.
    verdicts(
      *("81_/_1 m k gpt-4_pair-v2 first", "81_/_1 k m gpt-4_pair-v2 first"),
      *("82_/_1 m k gpt-4_pair-v2 tie", "82_/_1 k m gpt-4_pair-v2 none"),
    ),
  ),
  "LLMBar, both orders": (
    cells(
      "input label results",
      'p|2|[{"swap = False": {"winner": "2"}, "swap = True": {"winner": "1"}}]',
      'q|1|[{"swap = False": {"winner": null}}]',
      **dict(output_1="a", output_2="b"),
    ),
    verdicts(
      *("p 1 2 label second", "p 1 2 votes second", "p 2 1 votes second"),
      *("q 1 2 label first", "q 1 2 votes none"),
    ),
  ),
  "verdicts.jsonl, both orders": (
    cells(
      "id outcome verdicts",
      *('i|0.5|["first", "first"]', 'j|null|["second", null]'),
      **dict(prompt="p", ours="a", theirs="b", replies=[]),
    ),
    verdicts(
      *("i 1 2 votes first", "i 2 1 votes first"),
      *("j 1 2 votes second", "j 2 1 votes none"),
    ),
  ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_verdicts_its_owner_meant(name, tmp_path):
  rows, wanted = LAYOUTS[name]
  got = table(tmp_path, rows)
  assert {tuple(row) for row in got.rows} == wanted
  assert len(got.rows) == len(wanted)
  assert agreement.measure(got, [], [])["among"]
  assert run(f"--data={tmp_path / 'votes.jsonl'}") == 0


def test_a_table_is_the_same_in_every_kind_of_file(tmp_path):
  words = ("AB", "BA", "AA", "BB")
  lines = [
    f"{i}|{r}|{v}" for i, two in enumerate(words) for r, v in zip(RATERS, two)
  ]
  rows = cells("item rater verdict", *lines, **SIDES)
  wanted = table(tmp_path, rows).rows
  files = [tmp_path / n for n in ("a.csv", "a.json", "a.parquet", "a.jsonl.gz")]
  lines = [",".join(map(str, row.values())) for row in rows]
  files[0].write_text("\n".join([",".join(rows[0]), *lines]))
  files[1].write_text(json.dumps(rows))
  parquet.write_table(pyarrow.Table.from_pylist(rows), files[2])
  files[3].write_bytes(gzip.compress((tmp_path / "votes.jsonl").read_bytes()))
  for path in files:
    assert read(path).rows == wanted, path


def test_answers_without_names_are_identified_by_their_texts(tmp_path):
  """The same two texts in the other order are the other order of one pair; an
  id that repeats with other texts is another pair of that item."""
  lines = ("long text|x|j|A", "x|long text|j|B", "x|long text|h|A")
  lines += ("other|x|j|A", "s|s|j|A")
  rows = cells("response_a response_b rater verdict", *lines, id=1)
  ratings = table(tmp_path, rows)
  pair = lambda k: [f"pair {k:04d} answer {n}" for n in (1, 2)]
  assert ratings.rows == [
    Verdict("1", ONE, TWO, "j", "first"),
    Verdict("1", TWO, ONE, "j", "second"),
    Verdict("1", TWO, ONE, "h", "first"),
    Verdict("1", *pair(2), "j", "first"),
    Verdict("1", *pair(3), "j", "first"),
  ]
  assert ratings.sizes[("1", ONE, TWO)] == (9.0, 1.0)
  orders = interrater.order_effects(ratings.rows, "j")
  assert orders["consistent"]["value"] == 1


def test_lengths_follow_the_models_not_the_columns(tmp_path):
  head = "model_a model_b response_a response_b"
  lines = ("m|k|mmmm|k", "k|m|k|mmmm")
  rows = cells(head, *lines, item=1, rater="j", verdict="A")
  assert table(tmp_path, rows).sizes == {("1", "k", "m"): (1.0, 4.0)}


def test_files_are_joined_by_item_and_named_apart(tmp_path):
  files = [
    written(
      tmp_path, [dict(id=i, verdict=w) for i, w in enumerate(words)], name
    )
    for name, words in (("one/votes.jsonl", "AB"), ("two/votes.jsonl", "AA"))
  ]
  got = numbers(tmp_path, *(f"--data={path}" for path in files))
  assert [r["name"] for r in got["raters"]] == ["one/votes", "two/votes"]
  only = got["among"]["between"]["one/votes / two/votes"]
  assert only["agreement"]["value"] == 0.5


def test_a_judge_that_no_human_met_stands_alone(tmp_path, capsys):
  rows = wide("AB", ("annotator1", "annotator2"))
  humans = written(tmp_path, rows, "h.jsonl")
  judge = written(tmp_path, [dict(idx=7, gpt_result="1")], "gpt.jsonl")
  flags = (f"--data={humans}", f"--data={judge}")
  got = numbers(tmp_path, *flags)
  assert got["judged"] is None and len(got["raters"]) == 3
  capsys.readouterr()
  assert run(*flags, "--judges=gpt") == 65
  words = "judged no pair that annotator1, annotator2"
  assert words in capsys.readouterr().err


def test_an_item_without_texts_that_stands_for_two_pairs_is_refused(tmp_path):
  rows = [
    dict(id=1, response1="a", response2=b, ann="A", ben="B") for b in "bc"
  ]
  votes = written(tmp_path, [*rows, dict(id=2, ann="B", ben="A")])
  rows = [dict(id=1, verdict="A"), dict(id=2, verdict="B")]
  ratings = read(votes, written(tmp_path, rows, "j.jsonl"))
  assert [r.item for r in ratings.rows if r.rater == "j"] == ["2"]
  assert sum(ratings.files[1]["refused"].values()) == 1
  assert "(line 1)" in " ".join(ratings.files[1]["lines"])


# Codes.


@pytest.mark.parametrize(
  "codes",
  [
    [0, 1, 1],
    ["0", "1", "0"],
    [True, False, True],
    [0, 1, 2],
    [1, 1],
    [-3, -1, 0, 2],
    [1, 2, 3],
    ["yes", "no", "yes"],
    ["A", "B", "who knows"],
    [0.25, 0.75],
    ["A", "B"] * 9 + [0],
    [1, 2] * 9 + [3],
  ],
)
def test_a_code_that_is_not_certain_is_refused(codes, tmp_path, capsys):
  path = written(tmp_path, wide(codes))
  assert run(f"--data={path}") == 64
  text = capsys.readouterr().err
  assert "is not certain; give it with --choice=" in text
  assert "votes.jsonl, rater1, rater2" in text and text.count("\n") == 1


@pytest.mark.parametrize(
  "flag",
  [
    "--choice={'first': [1], 'second': [0]}",
    "--choice={'first': 1, 'second': ['0'], 'tie': [7]}",
  ],
)
def test_what_a_code_means_is_given(flag, tmp_path):
  rows = wide([0, 1, 1, 0]) + [dict(id=9, rater1=1, rater2=None)]
  got = numbers(tmp_path, f"--data={written(tmp_path, rows)}", flag)
  first = {r["name"]: r["orders"]["first"] for r in got["raters"]}
  assert first["rater1"]["value"] == 3 / 5 and first["rater2"]["n"] == 4


def test_labels_are_compared_as_they_stand(tmp_path):
  """Agreement needs no meaning: any raters of anything."""
  words = "spam ham ham eggs spam ham".split()
  other = "spam ham eggs eggs ham ham".split()
  two = enumerate(zip(words, other))
  rows = [dict(id=i, ann=a, ben=b) for i, (a, b) in two]
  flags = (f"--data={written(tmp_path, rows)}", "--raters=ann,ben")
  flags += ("--choice=labels",)
  got, page = numbers(tmp_path, *flags), tmp_path / "page.html"
  kappa = got["among"]["between"]["ann / ben"]["kappa"]["value"]
  wanted = metrics.cohen_kappa_score(words, other)
  assert kappa == pytest.approx(wanted, abs=1e-12)
  assert got["judged"] is None and got["labels"]
  assert run(*flags, f"--output={page}") == 0
  assert "ann / ben" in visible(page)


def test_a_word_that_may_be_a_name_or_a_place_is_refused(tmp_path, capsys):
  lines = [f"{i}|{r}" for i in range(2) for r in "xy"]
  rows = cells("item rater", *lines, first="B", second="A", verdict="A")
  assert run(f"--data={written(tmp_path, rows)}") == 64
  assert "--choice=names" in capsys.readouterr().err
  codes = "{'first': ['A'], 'second': ['B']}"
  for choice, word in (("names", "second"), (codes, "first")):
    assert {r.verdict for r in table(tmp_path, rows, choice).rows} == {word}


def test_a_few_words_that_are_no_verdict_are_counted_not_guessed(
  tmp_path, capsys
):
  rows = wide(["A", "B", "A", "B", "A", "B", "I cannot say"])
  assert run(f"--data={written(tmp_path, rows)}") == 0
  text = capsys.readouterr().out
  assert "2 verdicts could not be read: 'i_cannot_say' (2 times)" in text


# Rows that cannot be read.


def test_refused_rows_are_counted_by_reason_file_and_line(tmp_path, capsys):
  good = dict(item=1, first="m", second="k", rater="ann", verdict="A")
  lines = [
    good,
    good | dict(rater="ben"),
    good | dict(item=None),
    good | dict(second="m"),
    good | dict(verdict="B"),
    good | dict(rater=" "),
    good,
    good | dict(item=2, verdict=""),
  ]
  path = written(tmp_path, lines)
  path.write_text(path.read_text() + "{broken\n[]\n")
  page = tmp_path / "page.html"
  assert run(f"--data={path}", f"--output={page}") == 0
  text = capsys.readouterr().out
  shown = visible(page)
  for reason in (
    "1 with no item (line 3)",
    "1 with a model against itself (line 4)",
    "1 with judged twice and differently, of which the first is kept (line 5)",
    "1 with no rater (line 6)",
    "1 with malformed JSON (line 9)",
    "1 with not an object (line 10)",
    "1 verdicts stand there twice",
    "1 cells are empty",
  ):
    assert reason in text and reason in shown
  assert "Not all rows could be read" in shown


@pytest.mark.parametrize(
  "flags,code,words",
  [
    ([], 64, "no table; set --data"),
    (["--data=nowhere.csv"], 65, "nowhere.csv is missing; set --data"),
    (["--data=votes.txt"], 64, "ends in none of"),
    (["--dta=x"], 64, "Unknown command line flag 'dta'"),
    (["VOTES", "b"], 64, "unexpected argument 'b'"),
    (["VOTES", "--output=x.pdf"], 64, "wanted a .html or a .json"),
    (["VOTES", "--choice=guess"], 64, "--choice='guess', wanted"),
    (["VOTES", "--choice={'first': [1]}"], 64, "wanted --choice="),
    (
      ["VOTES", "--choice={'first': [1], 'second': [1]}"],
      64,
      "to first and to second",
    ),
    (["VOTES", "--choice=[" + "(" * 5000], 64, "wanted --choice="),
    (["VOTES", "--fields={'who': 'x'}"], 64, "wanted a dict such as"),
    (["VOTES", "--fields={'first': 'x'}"], 64, "wanted both"),
    (["VOTES", "--fields={'verdict': 'x'}"], 64, "no file has a column 'x'"),
    (["VOTES", "--raters=ann,zed"], 64, "no file has a column 'zed'"),
    (["VOTES", "--judges=zed"], 64, "no such rater; the tables have ann, ben"),
    (["VOTES", "--judges=ann", "--humans=ann"], 64, "a judge and a human"),
    (["VOTES", "--judges=ann", "--choice=labels"], 64, "--choice=labels"),
    (["VOTES", "--output=/proc/none/x.html"], 73, "or another --output"),
    (["--config=nowhere.py"], 64, "does not exist; set --config"),
  ],
)
def test_a_wrong_flag_is_one_line(flags, code, words, tmp_path, capsys):
  rows = cells("id ann ben", "0|A|B", "1|B|A", "2|A|A")
  path = written(tmp_path, rows)
  assert run(*[f"--data={path}" if f == "VOTES" else f for f in flags]) == code
  text = capsys.readouterr().err
  assert words in text and text.count("\n") == 1


@pytest.mark.parametrize(
  "rows,words",
  [
    (
      [dict(prompt="p", chosen="a", rejected="b")],
      "no verdicts in the columns",
    ),
    ([dict(id=i, ann=i, bob=i % 3) for i in range(9)], "--raters=bob"),
    ([dict(id=1, rater1=None, rater2="")], "no verdict in"),
  ],
)
def test_a_table_without_verdicts_is_refused(rows, words, tmp_path):
  with pytest.raises(DataError, match=words):
    table(tmp_path, rows)


def test_a_column_of_free_text_holds_no_labels(tmp_path):
  rows = [dict(id=i, ann=f"text {i}", ben=f"text {i}") for i in range(200)]
  with pytest.raises(ConfigError, match="200 different labels"):
    table(tmp_path, rows, "labels", raters=["ann", "ben"])


NAMED = [  # rows whose columns have names of their own
  dict(qid=i, one="a" * i, two="b", who=r, vote=v)
  for i in range(1, 4)
  for r, v in zip("xy", "AB")
]


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_a_config_s_rows_are_read_as_for_selecting(tmp_path):
  path = written(tmp_path, NAMED)
  fields = dict(id="qid", first="one", second="two", choice="vote")
  got = numbers(
    tmp_path,
    "--config=configs/select.py",
    f"--config.data.source={path}",
    f"--config.data.fields={fields}",
    "--raters=",
  )
  assert [r["name"] for r in got["raters"]] == ["votes"]
  assert got["raters"][0]["lengths"]["n"] == 3


def test_any_columns_may_be_named(tmp_path):
  names = dict(item="qid", first_text="one", second_text="two")
  names |= dict(rater="who", verdict="vote")
  got = table(tmp_path, NAMED, fields=names)
  assert len(got.rows) == 6
  assert got.rows[0] == Verdict("1", ONE, TWO, "x", "first")
  assert got.sizes["3", ONE, TWO] == (3.0, 1.0)


# Many raters, strange rows, pages.


def test_of_hundreds_of_raters_some_are_shown(tmp_path, capsys):
  rows = [
    SIDES | dict(item=i % 7, rater=f"r{i % 300}", verdict="AB"[i % 2])
    for i in range(600)
  ]
  assert run(f"--data={written(tmp_path, rows)}") == 0
  text = capsys.readouterr().out
  assert "200 more raters with fewer verdicts are not shown" in text
  assert "more pairs of raters with less in common" in text


ODD = ["A", "B", "tie", "1", "model_a", "first", "\u2028", "<script>"]
ODD += ["\x1b[2J", 1e300, 10**40, "", " "]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
  PLAIN | st.sampled_from(ODD),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3)
  ),
  max_leaves=6,
)
CHOICES = [None, "labels", "names", "{'first': ['A', 1], 'second': ['B']}"]


@hypothesis.settings(
  max_examples=200,
  deadline=None,
  suppress_health_check=[
    hypothesis.HealthCheck.function_scoped_fixture,
    hypothesis.HealthCheck.too_slow,
  ],
)
@hypothesis.given(
  st.data(), st.sampled_from(list(LAYOUTS)), st.sampled_from(CHOICES)
)
def test_no_table_ends_in_a_traceback(tmp_path, data, layout, choice):
  """Rows of every layout, in which any cell may hold anything."""
  rows = []
  for _ in range(data.draw(st.integers(1, 5))):
    row = dict(data.draw(st.sampled_from(LAYOUTS[layout][0])))
    for column in data.draw(st.lists(st.sampled_from(list(row)), max_size=3)):
      row[column] = data.draw(VALUES)
    rows.append(row)
  flags = [f"--data={written(tmp_path, rows)}"]
  flags += [] if choice is None else [f"--choice={choice}"]
  assert run(*flags, f"--output={tmp_path / 'page.html'}") in (0, 64, 65)


def measured(folder, payload="x"):
  """All numbers of a table whose every text is the payload's."""
  rows = [
    dict(
      item=f"{payload} {i}",
      first=f"{payload} m",
      second="k",
      rater=f"{r} {payload}",
      verdict="AB"[(i + k) % 2],
      first_text=payload * 3,
      second_text=payload,
    )
    for i in range(6)
    for k, r in enumerate(("ann", "ben", "gpt"))
  ]
  rows.append(dict(rows[0], verdict=f"{payload}?"))
  got = table(folder, rows)
  names = list(dict.fromkeys(r.rater for r in got.rows))
  return json.loads(json.dumps(agreement.measure(got, names[2:], names[:2])))


@pytest.mark.parametrize(
  "payload", ["<script>alert(1)</script>", *PAYLOADS[::5]]
)
def test_nothing_from_a_table_becomes_markup(payload, tmp_path):
  got = measured(tmp_path, payload)
  parsed(raters_page.agreement_html(got))
  parsed(raters_page.agreement_html(poisoned(got, payload)))
  text = terminal.reading_text(got["files"]) + terminal.agreement_text(got)
  assert "\x1b" not in text and "\u202e" not in text


def test_any_leaf_of_a_page_may_be_missing_or_odd(tmp_path):
  whole = measured(tmp_path)
  for path in list(paths(whole))[::7]:
    for leaf in (None, "x", float("nan"), 1e308, [], {}):
      got = copy.deepcopy(whole)
      holder = got
      for key in path[:-1]:
        holder = holder[key]
      holder[path[-1]] = leaf
      raters_page.agreement_html(got)
  for odd in (None, {}, [], "x", 5):
    assert "Agreement of raters" in raters_page.agreement_html(odd)
