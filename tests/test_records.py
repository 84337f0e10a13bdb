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


def pair(i, **other):
  return dict(prompt=f"p{i}", chosen=f"c{i}", rejected=f"r{i}", **other)


def put(path, rows):
  path.write_text(
    "".join(
      (row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows
    ),
    encoding="utf-8",
  )
  return str(path)


def load(source, **options):
  return records.load_records(source, records.LoadOptions(**options))


def own_schema(row):
  """A fork's convert, named in a config as "module:function"."""
  if row["q"] == "skip":
    raise Refused("not wanted", "by the fork")
  return dict(prompt=row["q"], chosen=row["a"], rejected=row["b"])


def wrong_schema(row):
  return dict(prompt=row["q"])


def test_the_order_of_the_input_does_not_matter(tmp_path):
  rows = (
    [pair(i) for i in range(20)]
    + [pair(3), pair(3)]
    + [pair(i, id=f"own{i}") for i in range(20, 25)]
    + [pair(9, id=77)]
  )
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
  one = load(put(tmp_path / "a.jsonl", [pair(1, note="x")])).rows
  two = load(put(tmp_path / "b.jsonl", [pair(1)])).rows
  three = load(put(tmp_path / "c.jsonl", [dict(pair(1), chosen="C")]))
  assert one == two and set(one[0]) == {
    "id",
    "prompt",
    "chosen",
    "rejected",
    "group",
  }
  assert three.rows[0]["id"] != one[0]["id"]
  assert len(one[0]["id"]) == 18 and one[0]["id"].endswith("-0")


def test_nothing_is_dropped_uncounted(tmp_path):
  rows = [
    pair(0, id="a"),
    "{broken",
    pair(1, id="a"),
    pair(2, id=["x"]),
    dict(pair(3), chosen=None),
    dict(pair(4), chosen="r4"),
    "[1]",
    pair(5),
    pair(6, id=True),
    pair(7),
    pair(8),
    pair(9),
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
  # An id that two rows share is none: their contents tell them apart.
  assert loaded.shared_ids == 2
  named = sorted(row["id"] for row in loaded.rows if row["id"][:2] == "a-")
  assert len(named) == 2 and {
    row["prompt"] for row in loaded.rows if row["id"] in named
  } == {"p0", "p1"}
  tables.write_refused(tmp_path / "refused.jsonl", loaded.refused)
  lines = (tmp_path / "refused.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == loaded.refused


def test_error_mode_names_the_row(tmp_path):
  source = put(
    tmp_path / "a.jsonl", [pair(0), dict(pair(1, id="x"), chosen="")]
  )
  with pytest.raises(DataError) as error:
    load(source, max_bad_fraction=0)
  for word in (f"{source}:2", "id x", "empty response"):
    assert word in str(error.value)


def test_ids_of_a_prompt_are_told_apart_whatever_the_order(tmp_path):
  rows = [pair(i, id=f"prompt-{i // 3}") for i in range(9)] + [
    pair(0, id="prompt-0"),
    pair(50, id="own"),
  ]
  first = load(put(tmp_path / "a.jsonl", rows))
  assert first.shared_ids == 10 and first.duplicates == 1
  assert len({row["id"] for row in first.rows}) == 11
  assert "own" in {row["id"] for row in first.rows}
  random.Random(1).shuffle(rows)
  assert load(put(tmp_path / "b.jsonl", rows)).rows == first.rows


def test_pairs_and_their_reverse_are_counted(tmp_path):
  rows = [pair(0), dict(pair(0), chosen="r0", rejected="c0"), pair(1)]
  assert load(put(tmp_path / "a.jsonl", rows)).contradicted == 2


def test_scores_against_the_label_are_counted_or_skipped(tmp_path):
  rows = [
    pair(i, chosen_score=9, rejected_score=9 + s)
    for i, s in enumerate((-2, 0, 3, 1, -1))
  ]
  path = put(tmp_path / "a.jsonl", rows)
  loaded = load(path)
  assert (loaded.against, loaded.tied, len(loaded.rows)) == (2, 1, 5)
  assert loaded.against_at == f"{path}:3"
  summary = data_summary(loaded, {})
  assert (summary["against_scores"], summary["tied_scores"]) == (2, 1)
  loaded = load(path, skip=("contradicting",))
  assert loaded.against == 2 and len(loaded.rows) == 3
  assert loaded.counts == {"scores against the label": 2}
  # Or the scores say which answer won.
  loaded = load(path, choice="higher score wins")
  assert loaded.counts == {"tied scores": 1}
  assert {
    row["prompt"]: (row["chosen"], row["margin"]) for row in loaded.rows
  } == {
    "p0": ("c0", 2.0),
    "p2": ("r2", 3.0),
    "p3": ("r3", 1.0),
    "p4": ("c4", 1.0),
  }


def test_codes_are_settled_over_the_whole_column(tmp_path):
  rows = [
    dict(q=f"p{i}", one=f"a{i}", two=f"b{i}", won=1 + i % 2) for i in range(6)
  ]
  named = dict(prompt="q", first="one", second="two", choice="won")
  path = put(tmp_path / "a.jsonl", rows)
  loaded = load(path, fields=named)
  assert {(r["chosen"][0], int(r["prompt"][1:]) % 2) for r in loaded.rows} == {
    ("a", 0),
    ("b", 1),
  }
  rows.append(dict(rows[0], won=0))  # one row more, and nothing is certain
  path = put(tmp_path / "b.jsonl", rows)
  with pytest.raises(DataError, match="won holds '1' .3 rows.*data.choice="):
    load(path, fields=named)
  loaded = load(
    path, fields=named, choice={"first": [2], "second": [1], "tie": [0]}
  )
  assert {(r["chosen"][0], int(r["prompt"][1:]) % 2) for r in loaded.rows} == {
    ("b", 0),
    ("a", 1),
  }
  assert loaded.counts == {"tie": 1}


def test_a_few_odd_codes_are_rows_refused(tmp_path):
  unpaired = [
    dict(prompt=f"p{i}", completion="a", label=i % 2 == 0) for i in range(30)
  ]
  for odd in (1.5, "9" * 5000, "maybe"):
    loaded = load(
      put(tmp_path / "a.jsonl", [*unpaired, dict(unpaired[0], label=odd)])
    )
    assert loaded.counts == {"bad label": 1} and len(loaded.rows) == 30
  with pytest.raises(DataError, match="data.choice"):
    load(
      put(tmp_path / "b.jsonl", [*unpaired, *[dict(unpaired[0], label=5)] * 10])
    )


def test_several_sources_with_caps_and_weights(tmp_path):
  one = put(tmp_path / "a.jsonl", [pair(i) for i in range(40)])
  two = put(
    tmp_path / "b.jsonl",
    [
      dict(system="", question=f"q{i}", chosen="yes", rejected="no")
      for i in range(20)
    ],
  )
  loaded = load([one, two])
  assert [(r.source, r.schema, r.kept, r.seen) for r in loaded.readings] == [
    (one, "pairs", 40, 40),
    (two, "orca_dpo", 20, 20),
  ]
  assert {row["source"] for row in loaded.rows} == {one, two}
  assert loaded.schema == "pairs, orca_dpo"
  count = lambda **kw: [r.kept for r in load([one, two], **kw).readings]
  assert count(caps=(10, 0)) == [10, 20]
  assert count(weights=(1, 1)) == [20, 20]
  assert count(weights=(3.0, 1.0)) == [40, 13]
  assert count(caps=(0, 5), weights=(2, 1)) == [10, 5]
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
  thumb = put(
    tmp_path / "c.jsonl", [dict(prompt="a", completion="b", label=True)]
  )
  assert load([one, thumb]).counts == {"mixed kinds": 1}


def test_what_became_of_every_column_is_known(tmp_path):
  rows = [
    dict(
      pair(i),
      chosen_score=2.0,
      rejected_score=1,
      note="text",
      n=3,
      messages=None,
      context="more",
      turns=2,
      metadata=dict(x="y"),
    )
    for i in range(3)
  ]
  [reading] = load(put(tmp_path / "a.jsonl", rows)).readings
  assert {c["column"]: (c["type"], c["became"]) for c in reading.columns} == {
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
  }
  assert "row 1 has prompt, chosen, rejected" in reading.why
  rows = [
    dict(
      messages=[dict(role="user", content="q", lang="en", turn=1)],
      chosen="a",
      rejected="b",
    )
  ]
  [reading] = load(put(tmp_path / "b.jsonl", rows)).readings
  assert [
    c["column"] for c in reading.columns if c["became"] == "not read"
  ] == ["messages: lang"]
  [reading] = load(
    put(tmp_path / "c.jsonl", [dict(q=dict(text="q"), a="a", b="b", c="c")]),
    fields=dict(prompt="q.text", chosen="a", rejected="b"),
  ).readings
  assert [(c["column"], c["became"]) for c in reading.columns] == [
    ("q", "the prompt (q.text)"),
    ("a", "the chosen answer"),
    ("b", "the rejected answer"),
    ("c", "not read"),
  ]


def own_list(row):
  return [
    dict(prompt=row["q"], chosen=row["best"], rejected=other)
    for other in row["others"]
  ]


def test_a_function_of_a_fork_may_return_several_pairs(tmp_path):
  path = put(
    tmp_path / "a.jsonl",
    [dict(id="x", q="hi", best="a", others=["b", "c", "a"])],
  )
  loaded = load(path, schema=f"{__name__}:own_list", max_bad_fraction=0.9)
  assert {(r["chosen"], r["rejected"]) for r in loaded.rows} == {
    ("a", "b"),
    ("a", "c"),
  }
  assert loaded.shared_ids == 2 and loaded.counts == {
    "chosen equals rejected": 1
  }


def test_rows_of_chats_come_back_as_they_were_written(tmp_path):
  call = dict(
    role="assistant",
    content=None,
    tool_calls=[
      dict(type="function", function=dict(name="f", arguments=dict(x=1)))
    ],
  )
  said = dict(role="assistant", content="no")
  ask = dict(role="user", content="a\n\nHuman: b\n\nAssistant: c\n\nd")
  system = dict(role="system", content="s")
  for i, row in enumerate(
    (
      dict(prompt=[system, ask], chosen="yes", rejected="no"),
      dict(
        prompt=[ask], chosen=[call], rejected=[said], tools=[dict(name="f")]
      ),
      dict(prompt=[ask], completion=[said], label=False),
      pair(3, source="here"),
    )
  ):
    first = load(put(tmp_path / f"{i}.jsonl", [row]))
    path = tmp_path / f"{i}.parquet"
    tables.write_rows(path, tables.as_read(first.rows))
    again = load(str(path))
    assert again.rows == first.rows
    [was] = tables.as_read(first.rows)
    if i < 3 and i != 1:
      assert was["prompt"] == row["prompt"]
      assert isinstance(was.get("chosen", was.get("completion")), list)
    table = tmp_path / f"{i}-table.parquet"
    tables.write_rows(table, first.rows)
    assert tables.read_table(table) == first.rows


def test_too_many_bad_rows_stop_the_run(tmp_path):
  rows = [pair(i) for i in range(6)] + [
    dict(pair(i), chosen="") for i in range(6)
  ]
  source = put(tmp_path / "a.jsonl", rows)
  assert len(load(source, max_bad_fraction=0.5).rows) == 6
  with pytest.raises(DataError, match="empty response 6"):
    load(source, max_bad_fraction=0.49)
  source = put(tmp_path / "b.jsonl", rows[6:])
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
  with pytest.raises(ConfigError, match="pairs"):
    load(late, schema="explicit_pear")
  own = put(
    tmp_path / "c.jsonl",
    [
      dict(q="a", a="b", b="c"),
      dict(q="skip", a="b", b="c"),
      dict(q="a", a="b", b="b"),
      dict(q="b", a="b", b="c", id="z"),
    ],
  )
  loaded = load(own, schema=f"{__name__}:own_schema")
  assert loaded.kind == "pairs" and loaded.rows[1] == dict(
    id="z", prompt="b", chosen="b", rejected="c", group="b"
  )
  assert loaded.counts == {"not wanted": 1, "chosen equals rejected": 1}
  for row in (dict(q="a"), dict(other=1)):  # it fails on the result; itself
    with pytest.raises(DataError, match="config.data.schema") as error:
      load(put(tmp_path / "d.jsonl", [row]), schema=f"{__name__}:wrong_schema")
    assert "d.jsonl:1" in str(error.value)


def test_limit(tmp_path, monkeypatch, capsys):
  source = put(tmp_path / "a.jsonl", [pair(i) for i in range(9)])
  assert load(source, limit=4).seen == 4
  monkeypatch.setattr(progress, "_BAR_AFTER_S", 0)
  monkeypatch.setattr(progress, "_LINE_EVERY_S", 0)
  capsys.readouterr()
  assert load(source, limit=3).seen == 3  # and it says how far it is
  said = capsys.readouterr().out.splitlines()
  assert [line.split(" rows, ")[0] for line in said] == [
    f"  read {source} {n}" for n in (1, 2, 3)
  ]
  assert all(line.endswith("/s") for line in said)
  with pytest.raises(ConfigError, match="limit"):
    load(source, limit=-1)


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.text(max_size=4), max_size=40),
  st.integers(0, 2**63),
  st.randoms(),
)
def test_a_group_is_never_in_two_splits(groups, seed, rng):
  rows = [dict(id=str(i), group=group) for i, group in enumerate(groups)]
  shares = dict(pool=0.7, sft=0.1, none=0.0, eval=0.2)
  parts = records.split_rows(rows, shares, seed)
  assert list(parts) == list(shares) and not parts["none"]
  home = {row["id"]: name for name, part in parts.items() for row in part}
  assert len(home) == len(rows)  # every row, once
  by_group = collections.defaultdict(set)
  for row in rows:
    by_group[row["group"]].add(home[row["id"]])
  assert all(len(names) == 1 for names in by_group.values())
  rng.shuffle(rows)
  moved = records.split_rows(rows, dict(reversed(shares.items())), seed)
  assert {
    row["id"]: name for name, part in moved.items() for row in part
  } == home
  few = records.split_rows(rows[:3], shares, seed)  # fewer rows move none
  assert all(
    home[row["id"]] == name for name, part in few.items() for row in part
  )


def test_splits_have_their_shares_and_seeds_differ():
  rows = [dict(id=str(i), group=f"g{i}") for i in range(20_000)]
  parts = records.split_rows(rows, dict(a=0.8, b=0.15, c=0.05), 1)
  for name, want in dict(a=16_000, b=3_000, c=1_000).items():
    assert abs(len(parts[name]) - want) < 5 * want**0.5
  other = records.split_rows(rows, dict(a=0.8, b=0.15, c=0.05), 2)
  assert other["c"] != parts["c"]
  for shares in (dict(a=0.5), dict(a=1.5, b=-0.5), dict(a=float("nan")), {}):
    with pytest.raises(ConfigError, match="config.data.split"):
      records.split_rows(rows, shares, 0)


def test_unpaired_of_pairs(tmp_path):
  loaded = load(put(tmp_path / "a.jsonl", [pair(1, id="b"), pair(2, id="a")]))
  assert records.pairs_to_unpaired(loaded.rows) == [
    dict(id="a/chosen", prompt="p2", completion="c2", label=True, group="p2"),
    dict(
      id="a/rejected", prompt="p2", completion="r2", label=False, group="p2"
    ),
    dict(id="b/chosen", prompt="p1", completion="c1", label=True, group="p1"),
    dict(
      id="b/rejected", prompt="p1", completion="r1", label=False, group="p1"
    ),
  ]


def test_tables_read_back_equal_and_are_whole_or_absent(tmp_path, monkeypatch):
  rows = [pair(i, id=f"\u05d0{i}\0\U0001f600", group="g") for i in range(5000)]
  path = tmp_path / "deep" / "rows.parquet"
  tables.write_rows(path, rows)
  assert tables.read_table(path) == rows
  before = path.read_bytes()
  tables.write_rows(path, rows)
  assert path.read_bytes() == before
  assert [p.name for p in path.parent.iterdir()] == ["rows.parquet"]
  unpaired = records.pairs_to_unpaired(rows[:3])
  tables.write_rows(str(path), unpaired)
  assert tables.read_table(str(path)) == unpaired
  tables.write_rows(path, [])
  assert tables.read_table(path) == []
  path.write_bytes(before[:-30])
  with pytest.raises(CorruptError, match="rows.parquet"):
    tables.read_table(path)
  flipped = bytearray(before)
  flipped[len(before) // 2] ^= 1  # in a page: parquet's own checksum
  path.write_bytes(flipped)
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


def test_the_card_counts(tmp_path):
  rows = [
    dict(prompt="p" * n, chosen="c" * n, rejected="r", id=str(n))
    for n in range(1, 102)
  ] + [dict(pair(0), chosen="")]
  loaded = load(put(tmp_path / "a.jsonl", rows))
  parts = records.split_rows(loaded.rows, dict(pool=0.9, eval=0.1), 0)
  summary = data_summary(loaded, parts)
  assert json.loads(json.dumps(summary)) == summary
  assert summary["characters"]["prompt"] == dict(p5=6.0, p50=51.0, p95=96.0)
  assert summary["rows_by_split"] == {k: len(v) for k, v in parts.items()}
  assert sum(summary["rows_by_split"].values()) == 101 == summary["kept"]
  assert summary["refused_by_reason"] == {"empty response": 1}
  assert (summary["schema"], summary["duplicates"]) == ("pairs", 0)


@pytest.mark.parametrize(
  "name, schema, kept, counts",
  [
    # Counted apart, in loops over the raw files.
    (
      "hh-harmless/pairs.jsonl.gz",
      "pairs",
      1794,
      {"empty response": 4, "prompts differ": 2},
    ),
    (
      "ultrafeedback/pairs.jsonl.gz",
      "pairs",
      994,
      {"chosen equals rejected": 4, "empty response": 2},
    ),
    ("llamafactory/dpo_en_demo.json", "pairs", 300, {}),
    ("llamafactory/kto_en_demo.json", "unpaired", 300, {}),
    ("oasst/en_100_tree.jsonl", "trees", 754, {}),
  ],
)
def test_real_data(shared, name, schema, kept, counts):
  loaded = load(str(shared / "data" / name))
  assert (loaded.schema, len(loaded.rows), loaded.counts) == (
    schema,
    kept,
    counts,
  )
  assert loaded.seen == kept + sum(counts.values())


def test_real_refusals_are_the_known_rows(shared):
  loaded = load(str(shared / "data/hh-harmless/pairs.jsonl.gz"))
  assert [
    row["line"] - 1
    for row in loaded.refused
    if row["reason"] == "prompts differ"
  ] == [1254, 1688]
  path = shared / "data/ultrafeedback/pairs.jsonl.gz"
  with gzip.open(path, "rt", encoding="utf-8") as file:
    raw = [json.loads(line) for line in file]
  bad = {
    i + 1
    for i, row in enumerate(raw)
    if row["chosen"] == row["rejected"]
    or "" in (row["chosen"], row["rejected"])
  }
  assert {row["line"] for row in load(str(path)).refused} == bad


def test_real_messages_keep_their_text(shared):
  path = shared / "data/llamafactory/dpo_en_demo.json"
  with open(path, encoding="utf-8") as file:
    raw = json.load(file)
  loaded = load(str(path))
  got = collections.Counter(
    (row["chosen"], row["rejected"]) for row in loaded.rows
  )
  assert got == collections.Counter(
    (" " + row["chosen"]["value"], " " + row["rejected"]["value"])
    for row in raw
  )
  assert sum(
    not row["prompt"].startswith("\n\nHuman:") for row in loaded.rows
  ) == sum(
    row["conversations"][0]["from"] == "system"
    and row["conversations"][0]["value"] != ""
    for row in raw
  )


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
  path = str(shared / "data/ultrafeedback/pairs.jsonl.gz")
  with gzip.open(path, "rt", encoding="utf-8") as file:
    raw = [json.loads(line) for line in file]
  good = [
    row
    for row in raw
    if row["chosen"].strip()
    and row["rejected"].strip()
    and row["chosen"].strip() != row["rejected"].strip()
  ]
  want = [
    row["metadata"]["score_chosen"] - row["metadata"]["score_rejected"]
    for row in good
  ]
  loaded = load(path)
  assert sorted(row["margin"] for row in loaded.rows) == sorted(want)
  assert loaded.tied == want.count(0) == 110
  skipped = load(path, skip=("tied",))
  assert len(skipped.rows) == 994 - 110
  assert skipped.counts["tied scores"] == 110
  assert data_summary(loaded, {})["tied_scores"] == 110


@pytest.mark.parametrize(
  "name, fields, schema, kept, counts",
  [
    (
      "llmbar-natural/dataset.json",
      dict(prompt="input", first="output_1", second="output_2", choice="label"),
      "choices",
      100,
      {},
    ),
    (
      "pandalm/testset-v1.json",
      dict(
        prompt="instruction",
        first="response1",
        second="response2",
        choice="annotator1",
      ),
      "choices",
      843,
      {"empty prompt": 1, "empty response": 54, "not a string": 6, "tie": 95},
    ),
    (
      "ultrafeedback/pairs.jsonl.gz",
      dict(
        prompt="prompt",
        chosen="chosen",
        rejected="rejected",
        chosen_score="metadata.score_chosen",
        rejected_score="metadata.score_rejected",
      ),
      "pairs",
      994,
      {"chosen equals rejected": 4, "empty response": 2},
    ),
  ],
)
def test_real_data_of_other_names(shared, name, fields, schema, kept, counts):
  path = str(shared / "data" / name)
  loaded = load(path, fields=fields)
  assert (loaded.schema, len(loaded.rows), loaded.counts) == (
    schema,
    kept,
    counts,
  )
  with pytest.raises(DataError, match="config.data.fields"):
    load(path, fields=dict(prompt="nowhere"))


_words = st.sampled_from(
  [
    "",
    " ",
    "hi",
    "no",
    "A",
    "1",
    "0",
    "tie",
    "model_a",
    "\n\nHuman: a\n\nAssistant: b",
    '[{"role"',
    "{}",
  ]
)
_plain = st.one_of(
  st.none(), st.booleans(), st.integers(-3, 3), st.floats(), _words
)
_message = st.dictionaries(
  st.sampled_from(
    (
      "role from content value tool_calls name function_call text replies rank"
    ).split()
  ),
  st.one_of(
    _plain,
    st.sampled_from(
      ["user", "assistant", "system", "tool", "function_call", "gpt"]
    ),
    st.lists(st.one_of(_plain, st.dictionaries(_words, _plain)), max_size=2),
  ),
  max_size=5,
)
_cell = st.one_of(
  _plain,
  _message,
  st.lists(st.one_of(_message, _plain), max_size=3),
  st.lists(_message, max_size=3).map(json.dumps),
)
_columns = sorted(
  {c for schema in SCHEMAS.values() for c in (*schema.wants, *schema.roles)}
)


@settings(max_examples=300, deadline=None)
@given(
  st.lists(
    st.dictionaries(st.sampled_from(_columns), _cell, min_size=1, max_size=9),
    min_size=1,
    max_size=3,
  ),
  st.sampled_from(["auto", *SCHEMAS]),
)
def test_no_row_whatever_it_holds_is_more_than_refused(rows, schema):
  with tempfile.TemporaryDirectory() as folder:
    path = put(pathlib.Path(folder) / "a.jsonl", rows)
    try:
      loaded = load(path, schema=schema, max_bad_fraction=1.0)
    except DataError:
      return
    assert loaded.seen == len(loaded.rows) + len(loaded.refused)
    for row in loaded.rows:
      assert all(
        isinstance(row[n], str) and row[n].strip()
        for n in ("prompt", "chosen", "rejected", "completion")
        if n in row
      )
    tables.write_rows(
      pathlib.Path(folder) / "a.parquet", tables.as_read(loaded.rows)
    )
    load(str(pathlib.Path(folder) / "a.parquet"))
