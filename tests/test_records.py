"""Every row is kept under a stable id or counted with its reason."""

import collections
import gzip
import json
import pathlib
import random
import tempfile

from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
from rows import load, pair, put, turn

from jaxalign.core import progress
from jaxalign.core.errors import (
  ConfigError,
  CorruptError,
  DataError,
  WriteError,
)
from jaxalign.data import records, tables
from jaxalign.data.schemas import SCHEMAS
from jaxalign.data.schemas.schema import Refused
from jaxalign.data.summary import data_summary


def raw_rows(path):
  """The rows of a gzipped file of lines, read by other means."""
  with gzip.open(path, "rt", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def own_schema(row):
  """A fork's convert, named in a config as "module:function"."""
  if row["q"] == "skip":
    raise Refused("not wanted", "by the fork")
  return dict(prompt=row["q"], chosen=row["a"], rejected=row["b"])


def wrong_schema(row):
  return dict(prompt=row["q"])


def own_list(row):
  sides = dict(prompt=row["q"], chosen=row["best"])
  return [sides | dict(rejected=other) for other in row["others"]]


def test_the_order_of_the_input_does_not_matter(tmp_path):
  rows = [pair(i) for i in range(20)] + [pair(3), pair(3), pair(9, id=77)]
  rows += [pair(i, id=f"own{i}") for i in range(20, 25)]
  first = load(put(tmp_path / "a.jsonl", rows))
  random.Random(0).shuffle(rows)
  again = load(put(tmp_path / "b.jsonl", rows))
  assert again.rows == first.rows
  ids = [row["id"] for row in first.rows]
  assert ids == sorted(set(ids)) and len(ids) == 28
  assert "own22" in ids and "77" in ids
  assert first.duplicates == 3  # pair 3 twice more, pair 9 once more
  assert sum(name.endswith("-2") for name in ids) == 1
  splits = records.split_rows(first.rows, dict(a=0.5, b=0.5), 0)
  assert records.split_rows(again.rows, dict(a=0.5, b=0.5), 0) == splits


def test_ids_follow_the_content_not_other_fields(tmp_path):
  one, two, three = (
    load(put(tmp_path / f"{i}.jsonl", [row])).rows
    for i, row in enumerate((pair(1, note="x"), pair(1), pair(1) | pair(2)))
  )
  assert one == two
  assert set(one[0]) == {"id", "prompt", "chosen", "rejected", "group"}
  assert three[0]["id"] != one[0]["id"]
  assert len(one[0]["id"]) == 18 and one[0]["id"].endswith("-0")


def test_nothing_is_dropped_uncounted(tmp_path):
  rows = [
    pair(0, id="a"),
    "{broken",
    pair(1, id="a"),
    pair(2, id=["x"]),
    pair(3) | dict(chosen=None),
    pair(4) | dict(chosen="r4"),
    "[1]",
    pair(6, id=True),
    *(pair(i) for i in (5, 7, 8, 9)),
  ]
  source = put(tmp_path / "a.jsonl", rows)
  loaded = load(source, max_bad_fraction=0.6)
  assert loaded.seen == 12 == len(loaded.rows) + len(loaded.refused)
  assert loaded.counts == {
    "bad id": 2,
    "chosen equals rejected": 1,
    "malformed JSON": 1,
    "not an object": 1,
    "null": 1,
  }
  assert sum(loaded.counts.values()) == len(loaded.refused)
  null = next(r for r in loaded.refused if r["reason"] == "null")
  assert (null["line"], null["id"], null["file"]) == (5, None, source)
  # An id that two rows share is none: they are named by their contents too.
  assert loaded.shared_ids == 2
  named = [row for row in loaded.rows if row["id"][:2] == "a-"]
  assert sorted(row["prompt"] for row in named) == ["p0", "p1"]
  tables.write_refused(tmp_path / "refused.jsonl", loaded.refused)
  lines = (tmp_path / "refused.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == loaded.refused


def test_error_mode_names_the_row(tmp_path):
  rows = [pair(0), pair(1, id="x") | dict(chosen="")]
  source = put(tmp_path / "a.jsonl", rows)
  with pytest.raises(DataError, match=f"{source}:2: id x: empty response"):
    load(source, max_bad_fraction=0)


def test_rows_of_one_id_are_kept_whatever_the_order(tmp_path):
  rows = [pair(i, id=f"prompt-{i // 3}") for i in range(9)]
  rows += [pair(0, id="prompt-0"), pair(50, id="own")]
  first = load(put(tmp_path / "a.jsonl", rows))
  assert first.shared_ids == 10 and first.duplicates == 1
  ids = {row["id"] for row in first.rows}
  assert len(ids) == 11 and "own" in ids
  random.Random(1).shuffle(rows)
  assert load(put(tmp_path / "b.jsonl", rows)).rows == first.rows


def test_pairs_and_their_reverse_are_counted(tmp_path):
  rows = [pair(0), pair(0) | dict(chosen="r0", rejected="c0"), pair(1)]
  assert load(put(tmp_path / "a.jsonl", rows)).contradicted == 2


def test_scores_against_the_label_are_counted_or_skipped(tmp_path):
  scores = enumerate((-2, 0, 3, 1, -1))
  rows = [pair(i, chosen_score=9, rejected_score=9 + s) for i, s in scores]
  path = put(tmp_path / "a.jsonl", rows)
  loaded = load(path)
  assert (loaded.against, loaded.tied, len(loaded.rows)) == (2, 1, 5)
  assert loaded.against_at == f"{path}:3"
  summary = data_summary(loaded, {})
  assert (summary["against_scores"], summary["tied_scores"]) == (2, 1)
  loaded = load(path, skip=("contradicting",))
  assert loaded.against == 2 and len(loaded.rows) == 3
  assert loaded.counts == {"scores against the label": 2}
  # Or the scores decide which answer is better.
  loaded = load(path, choice="higher score wins")
  assert loaded.counts == {"tied scores": 1}
  better = {
    row["prompt"]: (row["chosen"], row["margin"]) for row in loaded.rows
  }
  want = dict(p0=("c0", 2.0), p2=("r2", 3.0), p3=("r3", 1.0), p4=("c4", 1.0))
  assert better == want


def test_codes_are_settled_over_the_whole_column(tmp_path):
  rows = [dict(q=i, one=f"a{i}", two=f"b{i}", best=1 + i % 2) for i in range(6)]
  rows = [row | dict(q=f"p{row['q']}") for row in rows]
  named = dict(prompt="q", first="one", second="two", choice="best")

  def sides(loaded):
    rows = loaded.rows
    return {(r["chosen"][0], int(r["prompt"][1:]) % 2) for r in rows}

  loaded = load(put(tmp_path / "a.jsonl", rows), fields=named)
  assert sides(loaded) == {("a", 0), ("b", 1)}
  rows.append(rows[0] | dict(best=0))  # one row more, and nothing is certain
  path = put(tmp_path / "b.jsonl", rows)
  with pytest.raises(DataError, match="best holds '1' .3 rows.*data.choice="):
    load(path, fields=named)
  rule = {"first": [2], "second": [1], "tie": [0]}
  loaded = load(path, fields=named, choice=rule)
  assert sides(loaded) == {("b", 0), ("a", 1)} and loaded.counts == {"tie": 1}


def test_a_few_odd_codes_are_rows_refused(tmp_path):
  row = dict(prompt="p", completion="a", label=True)
  rows = [row | dict(prompt=f"p{i}", label=i % 2 == 0) for i in range(30)]
  for odd in (1.5, "9" * 5000, "maybe"):
    loaded = load(put(tmp_path / "a.jsonl", [*rows, row | dict(label=odd)]))
    assert loaded.counts == {"bad label": 1} and len(loaded.rows) == 30
  with pytest.raises(DataError, match="data.choice"):
    load(put(tmp_path / "b.jsonl", rows + [row | dict(label=5)] * 10))


def test_several_sources_with_caps_and_weights(tmp_path):
  one = put(tmp_path / "a.jsonl", [pair(i) for i in range(40)])
  row = dict(system="", chosen="yes", rejected="no")
  rows = [row | dict(question=f"q{i}") for i in range(20)]
  two = put(tmp_path / "b.jsonl", rows)
  loaded = load([one, two])
  assert [(r.source, r.schema, r.kept, r.seen) for r in loaded.readings] == [
    (one, "pairs", 40, 40),
    (two, "orca_dpo", 20, 20),
  ]
  assert {row["source"] for row in loaded.rows} == {one, two}
  assert loaded.schema == "pairs, orca_dpo"
  for options, want in (
    (dict(caps=(10, 0)), [10, 20]),
    (dict(weights=(1, 1)), [20, 20]),
    (dict(weights=(3.0, 1.0)), [40, 13]),
    (dict(caps=(0, 5), weights=(2, 1)), [10, 5]),
  ):
    assert [r.kept for r in load([one, two], **options).readings] == want
  capped = load([one, two], caps=(10, 0))
  assert capped.left_out == 30 and capped.seen == 60
  swapped = load([two, one], caps=(0, 10))
  assert swapped.rows == capped.rows  # whatever order they are named in
  for bad in (
    dict(caps=(1,)),
    dict(weights=(0, 1)),
    dict(caps=(-1, 0)),
    dict(weights=(float("nan"), 1)),
  ):
    with pytest.raises(ConfigError, match="config.data."):
      load([one, two], **bad)
  row = dict(prompt="a", completion="b", label=True)
  unpaired = put(tmp_path / "c.jsonl", [row])
  assert load([one, unpaired]).counts == {"mixed kinds": 1}


ASK = turn("user", "q", lang="en", turn=1)
READINGS = [  # a row, the fields named, column -> (type, what it became)
  (
    pair(0, chosen_score=2.0, rejected_score=1, note="text", n=3)
    | dict(messages=None, context="more", turns=2, metadata=dict(x="y")),
    {},
    {
      "prompt": ("text", "the prompt"),
      "chosen": ("text", "the chosen answer"),
      "rejected": ("text", "the rejected answer"),
      "chosen_score": ("number", "the margin"),
      "rejected_score": ("number", "the margin"),
      "note": ("text", "not read"),
      "n": ("number", "not read"),
      "messages": ("null", "not read"),
      "context": ("text", "not read"),
      "turns": ("number", "not read"),
      "metadata": ("object", "not read"),
    },
  ),
  (
    dict(messages=[ASK], chosen="a", rejected="b"),
    {},
    {
      "messages": ("messages", "the prompt"),
      "chosen": ("text", "the chosen answer"),
      "rejected": ("text", "the rejected answer"),
      "messages: lang": ("text", "not read"),
    },
  ),
  (
    dict(q=dict(text="q"), a="a", b="b", c="c"),
    dict(prompt="q.text", chosen="a", rejected="b"),
    {
      "q": ("object", "the prompt (q.text)"),
      "a": ("text", "the chosen answer"),
      "b": ("text", "the rejected answer"),
      "c": ("text", "not read"),
    },
  ),
]


@pytest.mark.parametrize("row, fields, want", READINGS)
def test_what_became_of_every_column_is_known(tmp_path, row, fields, want):
  [reading] = load(put(tmp_path / "a.jsonl", [row] * 3), fields=fields).readings
  found = {c["column"]: (c["type"], c["became"]) for c in reading.columns}
  assert found == want
  assert reading.why.startswith("row 1 has ") and "chosen" in reading.why


def test_a_function_of_a_fork_may_return_several_pairs(tmp_path):
  row = dict(id="x", q="hi", best="a", others=["b", "c", "a"])
  path, schema = put(tmp_path / "a.jsonl", [row]), f"{__name__}:own_list"
  loaded = load(path, schema=schema, max_bad_fraction=0.9)
  sides = {(r["chosen"], r["rejected"]) for r in loaded.rows}
  assert sides == {("a", "b"), ("a", "c")} and loaded.shared_ids == 2
  assert loaded.counts == {"chosen equals rejected": 1}


CALL = dict(type="function", function=dict(name="f", arguments=dict(x=1)))
CALLS = turn("assistant", None, tool_calls=[CALL])
ANSWER = turn("assistant", "no")
QUOTED = turn("user", "a\n\nHuman: b\n\nAssistant: c\n\nd")


@pytest.mark.parametrize(
  "row, as_messages",
  [
    (dict(prompt=[turn("system", "s"), QUOTED]), True),
    (dict(prompt=[QUOTED], chosen=[CALLS], tools=[dict(name="f")]), False),
    (dict(prompt=[QUOTED], completion=[ANSWER], label=False), True),
    (pair(3, source="here"), False),
  ],
)
def test_rows_of_chats_come_back_as_they_were_written(
  tmp_path, row, as_messages
):
  if "completion" not in row:
    row = dict(chosen="yes", rejected=[ANSWER]) | row
  first = load(put(tmp_path / "a.jsonl", [row]))
  path = tmp_path / "a.parquet"
  tables.write_rows(path, tables.as_read(first.rows))
  assert load(str(path)).rows == first.rows
  [was] = tables.as_read(first.rows)
  if as_messages:
    assert was["prompt"] == row["prompt"]
    assert isinstance(was.get("chosen", was.get("completion")), list)
  tables.write_rows(path, first.rows)
  assert tables.read_table(path) == first.rows


def test_too_many_bad_rows_stop_the_run(tmp_path):
  rows = [pair(i) for i in range(6)]
  bad = [row | dict(chosen="") for row in rows]
  source = put(tmp_path / "a.jsonl", rows + bad)
  assert len(load(source, max_bad_fraction=0.5).rows) == 6
  with pytest.raises(DataError, match="empty response 6; first at .*a.jsonl:7"):
    load(source, max_bad_fraction=0.49)
  source = put(tmp_path / "b.jsonl", bad)
  with pytest.raises(DataError):  # none left, whatever is allowed
    load(source, schema="pairs", max_bad_fraction=1.0)
  with pytest.raises(DataError, match="none of the first 3"):
    load(put(tmp_path / "c.jsonl", ["{", "{", "{"]))


def test_schema_by_name_by_shape_and_of_a_fork(tmp_path):
  late = put(tmp_path / "a.jsonl", ["{", dict(prompt=None), pair(1), pair(2)])
  loaded = load(late)
  assert (loaded.schema, loaded.kind, loaded.seen) == ("pairs", "pairs", 4)
  with pytest.raises(DataError, match="question"):
    load(put(tmp_path / "b.jsonl", [dict(question="?")]))
  with pytest.raises(ConfigError, match="known: .*pairs"):
    load(late, schema="pears")
  row = dict(q="a", a="b", b="c")
  rows = [
    row,
    row | dict(q="skip"),
    row | dict(b="b"),
    row | dict(q="b", id="z"),
  ]
  own = put(tmp_path / "c.jsonl", rows)
  loaded = load(own, schema=f"{__name__}:own_schema")
  want = dict(id="z", prompt="b", chosen="b", rejected="c", group="b")
  assert loaded.kind == "pairs" and loaded.rows[1] == want
  assert loaded.counts == {"not wanted": 1, "chosen equals rejected": 1}
  for row in (dict(q="a"), dict(other=1)):  # it fails on the result; itself
    own = put(tmp_path / "d.jsonl", [row])
    with pytest.raises(DataError, match="d.jsonl:1.*config.data.schema"):
      load(own, schema=f"{__name__}:wrong_schema")


def test_limit(tmp_path, monkeypatch, capsys):
  source = put(tmp_path / "a.jsonl", [pair(i) for i in range(9)])
  assert load(source, limit=4).seen == 4
  monkeypatch.setattr(progress, "_BAR_AFTER_S", 0)
  monkeypatch.setattr(progress, "_LINE_EVERY_S", 0)
  capsys.readouterr()
  assert load(source, limit=3).seen == 3  # and it reports how far it is
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(" rows, ")[0] for line in lines] == [
    f"  read {source} {n}" for n in (1, 2, 3)
  ]
  assert all(line.endswith("/s") for line in lines)
  with pytest.raises(ConfigError, match="limit"):
    load(source, limit=-1)


def homes(parts):
  """id -> the split that a row is in."""
  return {row["id"]: name for name, rows in parts.items() for row in rows}


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.text(max_size=4), max_size=40),
  st.integers(0, 2**63),
  st.randoms(),
)
def test_a_group_is_never_in_two_splits(groups, seed, rng):
  rows = [dict(id=str(i), group=group) for i, group in enumerate(groups)]
  sizes = dict(pool=0.7, sft=0.1, none=0.0, eval=0.2)
  parts = records.split_rows(rows, sizes, seed)
  assert list(parts) == list(sizes) and not parts["none"]
  home = homes(parts)
  assert len(home) == len(rows)  # every row, once
  by_group = collections.defaultdict(set)
  for row in rows:
    by_group[row["group"]].add(home[row["id"]])
  assert all(len(names) == 1 for names in by_group.values())
  few = homes(records.split_rows(rows[:3], sizes, seed))
  assert few.items() <= home.items()  # fewer rows move none
  rng.shuffle(rows)
  again = records.split_rows(rows, dict(reversed(sizes.items())), seed)
  assert homes(again) == home


def test_splits_have_their_sizes_and_seeds_differ():
  rows = [dict(id=str(i), group=f"g{i}") for i in range(20_000)]
  parts = records.split_rows(rows, dict(a=0.8, b=0.15, c=0.05), 1)
  for name, want in dict(a=16_000, b=3_000, c=1_000).items():
    assert abs(len(parts[name]) - want) < 5 * want**0.5
  other = records.split_rows(rows, dict(a=0.8, b=0.15, c=0.05), 2)
  assert other["c"] != parts["c"]
  for sizes in (dict(a=0.5), dict(a=1.5, b=-0.5), dict(a=float("nan")), {}):
    with pytest.raises(ConfigError, match="config.data.split"):
      records.split_rows(rows, sizes, 0)


def test_unpaired_of_pairs(tmp_path):
  loaded = load(put(tmp_path / "a.jsonl", [pair(1, id="b"), pair(2, id="a")]))
  unpaired = records.pairs_to_unpaired(loaded.rows)
  names = "id prompt completion label group".split()
  assert [tuple(row[name] for name in names) for row in unpaired] == [
    ("a/chosen", "p2", "c2", True, "p2"),
    ("a/rejected", "p2", "r2", False, "p2"),
    ("b/chosen", "p1", "c1", True, "p1"),
    ("b/rejected", "p1", "r1", False, "p1"),
  ]


def test_tables_read_back_equal_and_are_whole_or_absent(tmp_path, monkeypatch):
  rows = [pair(i, id=f"\u05d0{i}\0\U0001f600", group="g") for i in range(5000)]
  path = tmp_path / "deep" / "rows.parquet"
  tables.write_rows(path, rows)
  assert tables.read_table(path) == rows
  some = [4999, 0, 4096, 4095, 0]
  assert tables.read_some(path, some) == [rows[i] for i in some]
  before = path.read_bytes()
  tables.write_rows(path, rows)
  assert path.read_bytes() == before
  assert [p.name for p in path.parent.iterdir()] == ["rows.parquet"]
  unpaired = records.pairs_to_unpaired(rows[:3])
  tables.write_rows(str(path), unpaired)
  assert tables.read_table(str(path)) == unpaired
  tables.write_rows(path, [])
  assert tables.read_table(path) == []
  flipped = bytearray(before)
  flipped[len(before) // 2] ^= 1  # in a page: parquet's own checksum
  for data in (before[:-30], flipped):
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="rows.parquet"):
      tables.read_table(path)
  with pytest.raises(CorruptError, match="absent"):
    tables.read_table(tmp_path / "absent.parquet")
  path.write_bytes(before)

  def full(self, target):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(type(epath.Path(path)), "replace", full)
  with pytest.raises(WriteError, match="No space left"):
    tables.write_rows(path, rows[:1])
  assert path.read_bytes() == before
  assert [p.name for p in path.parent.iterdir()] == ["rows.parquet"]


def test_the_summary_counts(tmp_path):
  rows = [
    dict(prompt="p" * n, chosen="c" * n, rejected="r", id=str(n))
    for n in range(1, 102)
  ]
  loaded = load(put(tmp_path / "a.jsonl", rows + [pair(0) | dict(chosen="")]))
  parts = records.split_rows(loaded.rows, dict(pool=0.9, eval=0.1), 0)
  summary = data_summary(loaded, parts)
  assert json.loads(json.dumps(summary)) == summary
  assert summary["characters"]["prompt"] == dict(p5=6.0, p50=51.0, p95=96.0)
  assert summary["rows_by_split"] == {k: len(v) for k, v in parts.items()}
  assert sum(summary["rows_by_split"].values()) == 101 == summary["kept"]
  assert summary["refused_by_reason"] == {"empty response": 1}
  assert (summary["schema"], summary["duplicates"]) == ("pairs", 0)


LLMBAR = dict(
  prompt="input", first="output_1", second="output_2", choice="label"
)
PANDALM = dict(prompt="instruction", first="response1", second="response2")
ULTRA = {name: name for name in ("prompt", "chosen", "rejected")} | dict(
  chosen_score="metadata.score_chosen", rejected_score="metadata.score_rejected"
)
REFUSED = {"chosen equals rejected": 4, "empty response": 2}
TRL_PAIRS = "ultrafeedback/pairs.jsonl.gz"


@pytest.mark.parametrize(
  "name, fields, schema, kept, counts",
  [
    # Counted apart, in loops over the raw files.
    (
      "hh-harmless/pairs.jsonl.gz",
      {},
      "pairs",
      1794,
      {"empty response": 4, "prompts differ": 2},
    ),
    (TRL_PAIRS, {}, "pairs", 994, REFUSED),
    (TRL_PAIRS, ULTRA, "pairs", 994, REFUSED),
    ("llamafactory/dpo_en_demo.json", {}, "pairs", 300, {}),
    ("llamafactory/kto_en_demo.json", {}, "unpaired", 300, {}),
    ("oasst/en_100_tree.jsonl", {}, "trees", 754, {}),
    ("llmbar-natural/dataset.json", LLMBAR, "choices", 100, {}),
    (
      "pandalm/testset-v1.json",
      PANDALM | dict(choice="annotator1"),
      "choices",
      843,
      {"empty prompt": 1, "empty response": 54, "not a string": 6, "tie": 95},
    ),
  ],
)
def test_real_data(shared, name, fields, schema, kept, counts):
  path = str(shared / "data" / name)
  loaded = load(path, fields=fields)
  found = loaded.schema, len(loaded.rows), loaded.counts
  assert found == (schema, kept, counts)
  assert loaded.seen == kept + sum(counts.values()) or schema == "trees"
  with pytest.raises(DataError, match="config.data.fields"):
    load(path, fields=dict(prompt="nowhere"))


def test_real_refusals_are_the_known_rows(shared):
  path = shared / "data" / TRL_PAIRS
  bad = set()
  for line, row in enumerate(raw_rows(path), 1):
    sides = row["chosen"], row["rejected"]
    if sides[0] == sides[1] or "" in sides:
      bad.add(line)
  assert {row["line"] for row in load(str(path)).refused} == bad


def test_real_messages_keep_their_text(shared):
  path = shared / "data/llamafactory/dpo_en_demo.json"
  raw = json.loads(path.read_text(encoding="utf-8"))
  loaded = load(str(path))
  count = collections.Counter
  assert count((r["chosen"], r["rejected"]) for r in loaded.rows) == count(
    (f" {r['chosen']['value']}", f" {r['rejected']['value']}") for r in raw
  )
  prompts = [row["prompt"] for row in loaded.rows]
  firsts = [row["conversations"][0] for row in raw]
  systems = [m for m in firsts if m["from"] == "system" and m["value"] != ""]
  with_system = [p for p in prompts if not p.startswith("\n\nHuman:")]
  assert len(with_system) == len(systems)


def test_real_trees_by_neighbours(shared):
  path = str(shared / "data/oasst/en_100_tree.jsonl")
  every = load(path)
  near = load(path, answer_pairs="adjacent")
  assert (len(every.rows), len(near.rows)) == (754, 429)
  ids = {row["id"] for row in every.rows}
  assert len(ids) == 754 and {row["id"] for row in near.rows} <= ids
  assert every.counts == near.counts
  for row in every.rows:
    assert row["turns"][-1]["role"] == "user"
    better, worse = row["id"].split(">")
    assert better != worse
  with pytest.raises(ConfigError, match="config.data.answer_pairs"):
    load(path, answer_pairs="some")


def test_real_scores(shared):
  path = shared / "data" / TRL_PAIRS
  want = []
  for row in raw_rows(path):
    chosen, rejected = row["chosen"].strip(), row["rejected"].strip()
    if chosen and rejected and chosen != rejected:
      scores = row["metadata"]
      want.append(scores["score_chosen"] - scores["score_rejected"])
  loaded = load(str(path))
  assert sorted(row["margin"] for row in loaded.rows) == sorted(want)
  assert loaded.tied == want.count(0) == 110
  skipped = load(str(path), skip=("tied",))
  assert len(skipped.rows) == 994 - 110
  assert skipped.counts["tied scores"] == 110
  assert data_summary(loaded, {})["tied_scores"] == 110


_TEXTS = ["", " ", *"hi no A 1 0 tie model_a {}".split(), '[{"role"']
_words = st.sampled_from(_TEXTS + ["\n\nHuman: a\n\nAssistant: b"])
_plain = st.one_of(
  st.none(), st.booleans(), st.integers(-3, 3), st.floats(), _words
)
_KEYS = (
  "role from content value tool_calls name function_call text replies rank"
)
_ROLES = "user assistant system tool function_call gpt".split()
_values = st.one_of(
  _plain,
  st.sampled_from(_ROLES),
  st.lists(st.one_of(_plain, st.dictionaries(_words, _plain)), max_size=2),
)
_message = st.dictionaries(st.sampled_from(_KEYS), _values, max_size=5)
_cell = st.one_of(
  _plain,
  _message,
  st.lists(st.one_of(_message, _plain), max_size=3),
  st.lists(_message, max_size=3).map(json.dumps),
)
_columns = sorted(
  {c for schema in SCHEMAS.values() for c in (*schema.wants, *schema.roles)}
)
_rows = st.dictionaries(
  st.sampled_from(_columns), _cell, min_size=1, max_size=9
)


@settings(max_examples=300, deadline=None)
@given(
  st.lists(_rows, min_size=1, max_size=3), st.sampled_from(["auto", *SCHEMAS])
)
def test_no_row_whatever_it_holds_is_more_than_refused(rows, schema):
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    path = put(folder / "a.jsonl", rows)
    try:
      loaded = load(path, schema=schema, max_bad_fraction=1.0)
    except DataError:
      return
    assert loaded.seen == len(loaded.rows) + len(loaded.refused)
    for row in loaded.rows:
      for name in {"prompt", "chosen", "rejected", "completion"} & row.keys():
        assert isinstance(row[name], str) and row[name].strip()
    tables.write_rows(folder / "a.parquet", tables.as_read(loaded.rows))
    load(str(folder / "a.parquet"))
