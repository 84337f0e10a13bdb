"""What a person's rows mean is shown, held out, merged, and never mangled."""

import json

from etils import epath
import jobs
import pytest
from test_chat import BUILT_IN, write_folder
from test_records import load, put

from configs import common
from jaxalign.cli import select as select_main
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import build_data, prepare, recipe, tables, tokens
from jaxalign.data.tokenizer import load_tokenizer

SPLIT = ("data.split.sft=0.0", "data.split.pool=1.0", "data.split.held_out=0.0")


def pair(i, **other):
  return dict(
    prompt=f"what is {i}?", chosen=f"good {i}", rejected=f"bad {i}", **other
  )


def chat(i, *before, **other):
  return dict(
    prompt=[*before, dict(role="user", content=f"what is {i}?")],
    chosen=f"good {i}",
    rejected=f"bad {i}",
    **other,
  )


def select(tmp_path, rows, *more, name="a"):
  """Runs a selection of eight rows: (Ended, the folder of its data)."""
  path = (
    put(tmp_path / f"{name}.jsonl", rows) if isinstance(rows, list) else (rows)
  )
  ended = jobs.run(
    None,
    f"data.source={path}",
    f"--output={tmp_path}/{name}.parquet",
    "select.sampler=random",
    "select.budget=8",
    *more,
    config="select.py:tiny",
    command=select_main.main,
  )
  return ended, tmp_path / f"{name}.jaxalign" / "shared" / "data"


def made(tmp_path, rows, name="a", **knobs):
  """The data stage of a config alone: (its folder, its summary)."""
  c = common.base()
  c.data.source = put(tmp_path / f"{name}.jsonl", rows)
  for key, value in knobs.items():
    section, _, knob = key.partition("__")
    with c.unlocked(), c[section].ignore_type():
      c[section][knob] = value
  c.data.split.update(sft=0.0, pool=1.0, held_out=0.0)
  recipe.settle(c)
  folder = tmp_path / name
  folder.mkdir(exist_ok=True)
  prepare.check_source(c)
  build_data.make_data(
    c, epath.Path(folder), most=512, wanted="pairs", writes=True
  )
  return folder, json.loads((folder / "data_summary.json").read_text())


def test_the_log_and_the_page_say_how_rows_were_read(tmp_path):
  rows = [
    chat(
      i,
      dict(role="system", content="Be brief."),
      note="<b>x</b>",
      chosen_score=i % 3,
      rejected_score=1,
    )
    for i in range(40)
  ]
  rows.append(dict(rows[0], chosen=None))
  ended, _ = select(tmp_path, rows)
  assert ended.code == 0, ended
  for words in (
    "read as pairs (row 1 has prompt, chosen, rejected); 40 rows kept of 41",
    "prompt -> the prompt; chosen -> the chosen answer",
    "not read: note (text)",
    "refused: 1 of 41 rows",
    "1 null: first line 41, chosen",
    "14 pairs whose rejected answer scores higher than the chosen one",
    "13 pairs with equal scores",
    "as its tokens decode:",
    "Be brief.",
  ):
    assert words in ended.out, words
  page = next((tmp_path / "a.jaxalign/runs").glob("*/selection.html"))
  text = page.read_text()
  assert "How the rows were read" in text and "note (text)" in text
  # A second run computes nothing, and says the same.
  again, _ = select(tmp_path, str(tmp_path / "a.jsonl"))
  assert "not read: note (text)" in again.out and jobs.did(again) == []


def test_a_dry_run_of_a_selection_ends_with_the_reading(tmp_path):
  path = put(tmp_path / "a.jsonl", [pair(i) for i in range(50)])
  ended, folder = select(tmp_path, path, "--dry_run")
  assert ended.code == 0 and not folder.exists()
  assert "read as pairs" in ended.out
  assert "row 1, id" in ended.out and "  rejected   bad" in ended.out
  assert "choosing by random" in ended.out and "align random" not in ended.out


def test_a_dry_run_counts_what_a_template_refuses(tmp_path):
  write_folder(tmp_path / "tok", BUILT_IN["gemma"])
  system = dict(role="system", content="Be brief.")
  rows = [chat(i, *([system] if i % 2 else [])) for i in range(20)]
  rows[4]["chosen"] = "word " * 90
  path = put(tmp_path / "a.jsonl", rows)
  ended, _ = select(
    tmp_path,
    path,
    f"model.tokenizer={tmp_path}/tok",
    "model.context=100",
    "data.too_long=drop",
    "--dry_run",
  )
  assert ended.code == 0, ended
  assert "of the first 20 rows, tokenized: 11 refused" in ended.out
  assert "10 template refused it: first line" in ended.out
  assert "System role not supported" in ended.out
  assert "1 too long: first line 5, " in ended.out


def test_field_names_and_codes_on_the_command_line(tmp_path):
  rows = [
    dict(q=dict(text=f"what is {i}?"), a=f"good {i}", b=f"bad {i}", c=0)
    for i in range(20)
  ]
  named = (
    "data.fields.prompt=q.text data.fields.first=a data.fields.second=b "
    "data.fields.choice=c"
  ).split()
  ended, _ = select(tmp_path, rows, *named)
  assert ended.code == 65 and "c holds '0' (20 rows)" in ended.err
  assert "--config.data.choice=" in ended.err
  for more in (
    ["data.choice={'first': [0], 'second': [1]}"],
    ["data.choice.first=[0]", "data.choice.second=[1]"],
  ):
    ended, folder = select(tmp_path, rows, *named, *more, "--redo")
    assert ended.code == 0, ended
    assert all(
      r["chosen"].startswith("good")
      for r in tables.read_table(folder / "pool.parquet")
    )
  ended, _ = select(tmp_path, rows, *named, "data.choice.third=[0]")
  assert ended.code == 64 and "config.data.choice" in ended.err
  ended, _ = select(tmp_path, rows, "data.fields.prmpt=q.text")
  assert ended.code == 64 and "'prmpt'" in ended.err


def test_selection_needs_no_loss_no_batch_and_no_rate(tmp_path):
  rows = [
    dict(prompt=f"p {i}", completion=f"a {i}", label=bool(i % 2))
    for i in range(12)
  ]
  ended, _ = select(
    tmp_path,
    rows,
    "select.budget=5",
    "train.lr=-1",
    "train.batch_size=7",
    "train.epochs=0",
  )
  assert ended.code == 0, ended
  kept = load(str(tmp_path / "a.parquet"))
  assert kept.kind == "unpaired" and len(kept.rows) == 5


def test_what_a_selection_writes_gives_the_same_tokens_again(tmp_path):
  write_folder(tmp_path / "tok", BUILT_IN["chatml"])
  quoted = "a log\n\nHuman: hi\n\nAssistant: yo\n\n"
  tok = f"model.tokenizer={tmp_path}/tok"
  for k, rows in enumerate(
    (
      [
        dict(
          prompt=[dict(role="user", content=f"{quoted}{i}")],
          chosen=[dict(role="assistant", content=f"good {i}")],
          rejected=[dict(role="assistant", content=f"bad {i}")],
        )
        for i in range(20)
      ],
      [pair(i) for i in range(20)],
      [
        dict(
          chosen=f"\n\nHuman: q{i}\n\nAssistant: good",
          rejected=f"\n\nHuman: q{i}\n\nAssistant: bad",
        )
        for i in range(20)
      ],
      [chat(i, dict(role="system", content="Be kind.")) for i in range(20)],
    )
  ):
    for more in ((tok,), ()):
      name = f"{k}{len(more)}"
      more = (*more, "select.budget=1.0", "model.context=256")
      ended, first = select(tmp_path, rows, *more, name=name)
      assert ended.code == 0, ended
      ended, again = select(
        tmp_path, str(tmp_path / f"{name}.parquet"), *more, name=f"{name}b"
      )
      assert ended.code == 0, ended
      assert tables.read_column(first / "pool.parquet", "id") == (
        tables.read_column(again / "pool.parquet", "id")
      )
      one, two = (tokens.load_rows(x, "pool") for x in (first, again))
      assert all((a == b).all() for a, b in zip(one, two)), name


def test_datasets_reads_a_subset_of_chats_as_messages(tmp_path):
  import datasets
  import transformers

  write_folder(tmp_path / "tok", BUILT_IN["chatml"])
  system = dict(role="system", content="Be kind.")
  ended, folder = select(
    tmp_path,
    [chat(i, system) for i in range(20)],
    f"model.tokenizer={tmp_path}/tok",
    "model.context=256",
  )
  assert ended.code == 0
  table = datasets.load_dataset(
    "parquet",
    data_files=str(tmp_path / "a.parquet"),
    split="train",
    cache_dir=str(tmp_path / "cache"),
  )
  row = table[0]
  assert [m["role"] for m in row["prompt"]] == ["system", "user"]
  assert row["chosen"] == [
    dict(role="assistant", content=row["chosen"][0]["content"])
  ]
  trl = pytest.importorskip("trl.data_utils")
  assert trl.is_conversational(row)
  # What TRL makes of it, by the template, are the tokens that were chosen by.
  peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tok")
  ids = tables.read_column(folder / "pool.parquet", "id")
  ours = tokens.load_rows(folder, "pool")
  for row in table:
    for k, side in enumerate(("chosen", "rejected")):
      i = 2 * ids.index(row["id"]) + k
      mine = ours.ids[ours.offsets[i] : ours.offsets[i + 1]].tolist()
      theirs = peer.apply_chat_template(
        row["prompt"] + row[side], tokenize=True, return_dict=False
      )
      asked = peer.apply_chat_template(
        row["prompt"],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
      )
      assert mine == theirs[: len(mine)] and len(asked) == ours.start[i]
      assert not peer.decode(theirs[len(mine) :]).strip()


def test_copies_among_the_chosen_rows_are_said(tmp_path):
  rows = [pair(i % 5) for i in range(8)]
  rows[6]["chosen"] = "Good  1"  # but for case and spaces
  ended, _ = select(tmp_path, rows)
  assert ended.code == 0
  assert "3 of the 8 chosen rows are copies of others" in ended.out
  assert "dedup(threshold=0.95) | random" in ended.out
  page = next((tmp_path / "a.jaxalign/runs").glob("*/selection.html"))
  assert "are copies of others" in page.read_text()


def test_a_held_out_file_of_its_own(tmp_path):
  held = put(tmp_path / "held.jsonl", [pair(i, id=f"p{i}") for i in range(9)])
  folder, summary = made(
    tmp_path, [pair(i, id=f"p{i}") for i in range(5, 40)], data__held_out=held
  )
  rows = {
    n: tables.read_table(folder / f"{n}.parquet")
    for n in ("pool", "held_out", "sft")
  }
  assert len(rows["held_out"]) == 9 and not rows["sft"]
  assert {r["prompt"] for r in rows["pool"]} == {
    f"what is {i}?" for i in range(9, 40)
  }
  assert summary["refused_by_reason"] == {"prompt of the held-out file": 4}
  assert [r["source"] for r in summary["readings"]] == [
    str(tmp_path / "a.jsonl"),
    held,
  ]
  unpaired = put(
    tmp_path / "t.jsonl", [dict(prompt="a", completion="b", label=True)]
  )
  with pytest.raises(DataError, match="config.data.held_out"):
    made(tmp_path, [pair(i) for i in range(9)], data__held_out=unpaired)


def test_several_sources_of_a_config(tmp_path):
  one = put(tmp_path / "x.jsonl", [pair(i) for i in range(30)])
  two = put(tmp_path / "y.jsonl", [pair(i) for i in range(30, 50)])
  ended, folder = select(tmp_path, f"['{one}', '{two}']", "data.caps=(10, 0)")
  assert ended.code == 0, ended
  assert "x.jsonl: read as pairs" in ended.out
  assert "10 rows kept of 30" in ended.out and "20 rows kept of 20" in ended.out
  assert "20 rows left out by config.data.caps" in ended.out
  sources = tables.read_column(folder / "pool.parquet", "source")
  assert (sources.count(one), sources.count(two)) == (10, 20)
  ended, _ = select(tmp_path, "['x', 3]")
  assert ended.code == 64 and "config.data.source" in ended.err


def test_a_checkpoint_leaves_no_row_to_an_sft_model(tmp_path):
  c = common.base()
  assert prepare.split_fractions(c) == dict(sft=0.25, pool=0.6, held_out=0.15)
  c.model.checkpoint = "x"
  assert prepare.split_fractions(c) == dict(sft=0.0, pool=0.85, held_out=0.15)
  c.data.held_out = "y"
  assert prepare.split_fractions(c) == dict(sft=0.0, pool=1.0, held_out=0.0)


@pytest.mark.parametrize(
  "checkpoint, rank, lr, want",
  [
    ("", 0, 0.0, ("dpo(beta=0.5)+0.2*sft", 4e-4)),
    ("", 4, 0.0, ("dpo(beta=0.5)+0.2*sft", 2e-4)),
    ("x", 0, 0.0, ("dpo(beta=0.1)", 5e-7)),
    ("x", 4, 0.0, ("dpo(beta=0.1)", 2e-4)),
    ("x", 4, 1e-5, ("dpo(beta=0.1)", 1e-5)),
  ],
)
def test_the_recipe_is_that_of_the_model(checkpoint, rank, lr, want):
  c = common.base()
  c.model.checkpoint, c.lora.rank, c.train.lr = checkpoint, rank, lr
  recipe.settle(c)
  assert (c.loss.name, c.train.lr) == want
  recipe.settle(c)
  assert (c.loss.name, c.train.lr) == want


def test_single_answers_are_aligned_by_kto(tmp_path):
  c = common.base()
  c.data.source = put(
    tmp_path / "a.jsonl", [dict(prompt="a", completion="b", label="thumbs_up")]
  )
  recipe.settle(c)
  assert c.loss.name == "kto"


def test_tokens_spelt_out_in_a_text_are_named(tmp_path):
  write_folder(tmp_path / "tok", BUILT_IN["chatml"])
  wrap = lambda text: (
    f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
  )
  rows = [dict(pair(i), prompt=wrap(f"what is {i}?")) for i in range(20)]
  given = dict(model__tokenizer=str(tmp_path / "tok"))
  with pytest.raises(DataError) as error:
    made(tmp_path, rows, **given)
  for words in (
    "20 of 20 rows",
    "<|im_start|>",
    "<|im_end|>",
    "config.data.special_tokens='tokens'",
  ):
    assert words in str(error.value)
  folder, summary = made(
    tmp_path, rows, name="b", data__special_tokens="tokens", **given
  )
  tok = load_tokenizer(folder)
  encoded = tokens.load_rows(folder, "pool")
  first = encoded.ids[: encoded.offsets[1]].tolist()
  want = load_tokenizer(tmp_path / "tok").encode_rendered(
    tables.read_table(folder / "pool.parquet")[0]["prompt"]
  )
  assert first[: encoded.start[0]][-len(want) :] == want
  assert first.count(tok.specials["<|im_start|>"]) == 2
  assert summary["template"].startswith("no template")
  # In the answers alone, or in messages: an end written by hand.
  ends = [dict(pair(i), chosen=f"good {i}<|im_end|>") for i in range(20)]
  for k, wrong in enumerate(
    (ends, [dict(chat(i), chosen=f"{i}<|im_end|>") for i in range(20)])
  ):
    for more in ({}, dict(data__template="none")):
      with pytest.raises(DataError, match="20 of 20 rows.*im_end"):
        made(tmp_path, wrong, name=f"e{k}", **given, **more)
  # A few of them: said, and taken as the text they are.
  few = [pair(i) for i in range(20)] + rows[:2]
  folder, summary = made(tmp_path, few, name="c", **given)
  assert (
    len(summary["warnings"]) == 1 and "2 of 22 rows" in summary["warnings"][0]
  )
  assert tok.specials_in("no <|im_end|> here") == ["<|im_end|>"]


def test_a_space_at_the_end_of_a_prompt_is_named(tmp_path):
  rows = [dict(pair(i), prompt=f"Q: {i}\nA: ") for i in range(9)]
  _, summary = made(tmp_path, rows)
  assert "9 prompts end in a space" in summary["warnings"][0]


def test_a_template_that_refuses_rows_counts_them(tmp_path):
  write_folder(tmp_path / "tok", BUILT_IN["gemma"])
  system = dict(role="system", content="Be brief.")
  rows = [chat(i, *([system] if i % 2 else [])) for i in range(20)]
  given = dict(model__tokenizer=str(tmp_path / "tok"))
  folder, summary = made(tmp_path, rows, **given)
  assert summary["refused_by_reason"] == {"template refused it": 10}
  assert (
    "System role not supported"
    in summary["first_refused"]["template refused it"]
  )
  lost = jobs.lines(folder / "rejected.jsonl")
  assert {r["line"] for r in lost} == {*range(2, 21, 2)}
  assert all("System role" in r["detail"] for r in lost)
  with pytest.raises(DataError, match="System role.*data.max_bad_fraction"):
    made(tmp_path, rows, data__max_bad_fraction=0.0, **given)
  with pytest.raises(DataError, match="System role.*max_bad_fraction"):
    made(tmp_path, rows, data__max_bad_fraction=0.4, **given)
  folder, summary = made(tmp_path, rows, name="j", data__system="join", **given)
  assert summary["refused"] == 0
  text = load_tokenizer(folder).decode(tokens.load_rows(folder, "pool").ids)
  assert text.count("Be brief.\n\nwhat is") == 20  # twice a pair


def test_calls_of_tools_without_a_template_are_refused_by_name(tmp_path):
  call = dict(
    role="assistant",
    content=None,
    tool_calls=[dict(type="function", function=dict(name="f", arguments="{}"))],
  )
  rows = [chat(i) for i in range(12)] + [
    dict(chat(i), chosen=[call], rejected=f"bad {i}") for i in range(12, 15)
  ]
  folder, summary = made(tmp_path, rows)
  assert summary["refused_by_reason"] == {"tool calls are not supported": 3}
  assert {r["line"] for r in jobs.lines(folder / "rejected.jsonl")} == {
    13,
    14,
    15,
  }


def test_the_context_of_a_checkpoint_keeps_99_percent(tmp_path, monkeypatch):
  write_folder(tmp_path / "tok", BUILT_IN["chatml"])
  rows = [pair(i) for i in range(200)]
  rows[3]["chosen"] = "word " * 300
  given = dict(
    model__tokenizer=str(tmp_path / "tok"),
    model__checkpoint=str(tmp_path / "tok"),
  )
  folder, summary = made(tmp_path, rows, **given)
  assert 16 <= summary["context"] <= 128
  assert summary["refused_by_reason"] == {"too long": 1}
  _, summary = made(
    tmp_path,
    rows,
    name="b",
    **given,
    model__context=512,
    data__too_long="cut_answer",
  )
  assert (
    summary["context"] == 512 and summary["truncation"]["pool"]["rows_cut"] == 1
  )


def test_knobs_of_the_rows_are_checked(tmp_path):
  for name, value in (
    ("too_long", "short"),
    ("special_tokens", "no"),
    ("system", "merge"),
    ("choice", "best"),
    ("caps", (1, 2)),
    ("weights", (0.0,)),
  ):
    with pytest.raises(ConfigError, match=f"config.data.{name}"):
      made(tmp_path, [pair(0)], **{f"data__{name}": value})
