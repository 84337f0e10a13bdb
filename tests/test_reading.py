"""What a person's rows mean is shown, held out, merged, and never mangled."""

import functools
import json

from etils import epath
import jobs
import pytest
from rows import load, put, turn
from test_chat import BUILT_IN, write_folder

from configs import common
from jaxalign.cli import select as select_main
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import build_data, prepare, recipe, tables, tokens
from jaxalign.data.tokenizer import load_tokenizer


def pair(i, **other):
  row = dict(prompt=f"what is {i}?", chosen=f"good {i}", rejected=f"bad {i}")
  return row | other


def chat(i, *before, **other):
  return pair(i, prompt=[*before, turn("user", f"what is {i}?")], **other)


BRIEF, KIND = turn("system", "Be brief."), turn("system", "Be kind.")


def select(tmp_path, rows, *more, name="a"):
  """Runs a selection of eight rows: (Ended, the folder of its data)."""
  if isinstance(rows, list):
    rows = put(tmp_path / f"{name}.jsonl", rows)
  knobs = ("select.sampler=random", "select.budget=8", *more)
  output = f"--output={tmp_path}/{name}.parquet"
  ended = jobs.run(
    None,
    f"data.source={rows}",
    output,
    *knobs,
    config="select.py:tiny",
    command=select_main.main,
  )
  return ended, tmp_path / f"{name}.jaxalign" / "shared" / "data"


@pytest.fixture
def chatml(tmp_path):
  """A folder of a tokenizer with that template."""
  write_folder(tmp_path / "tok", BUILT_IN["chatml"])
  return str(tmp_path / "tok")


@pytest.fixture
def gemma(tmp_path):
  """One whose template refuses system turns."""
  write_folder(tmp_path / "tok", BUILT_IN["gemma"])
  return str(tmp_path / "tok")


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


def test_the_log_and_the_page_show_how_rows_were_read(tmp_path):
  scores = [dict(chosen_score=i % 3, rejected_score=1) for i in range(40)]
  more = dict(note="<b>x</b>")
  rows = [chat(i, BRIEF, **more, **x) for i, x in enumerate(scores)]
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
  # A second run computes nothing, and prints the same.
  again, _ = select(tmp_path, str(tmp_path / "a.jsonl"))
  assert "not read: note (text)" in again.out and jobs.did(again) == []


def test_a_dry_run_of_a_selection_ends_with_the_reading(tmp_path):
  ended, folder = select(tmp_path, [pair(i) for i in range(50)], "--dry_run")
  assert ended.code == 0 and not folder.exists()
  assert "read as pairs" in ended.out
  assert "row 1, id" in ended.out and "  rejected   bad" in ended.out
  assert "choosing by random" in ended.out and "align random" not in ended.out


def test_a_dry_run_counts_what_a_template_refuses(tmp_path, gemma):
  rows = [chat(i, *[BRIEF][: i % 2]) for i in range(20)]
  rows[4]["chosen"] = "word " * 90
  knobs = (f"model.tokenizer={gemma}", "model.context=100")
  ended, _ = select(tmp_path, rows, *knobs, "data.too_long=drop", "--dry_run")
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
  named = "prompt=q.text first=a second=b choice=c".split()
  named = [f"data.fields.{name}" for name in named]
  ended, _ = select(tmp_path, rows, *named)
  assert ended.code == 65 and "c holds '0' (20 rows)" in ended.err
  assert "--config.data.choice=" in ended.err
  for more in (
    ["data.choice={'first': [0], 'second': [1]}"],
    ["data.choice.first=[0]", "data.choice.second=[1]"],
  ):
    ended, folder = select(tmp_path, rows, *named, *more, "--redo")
    assert ended.code == 0, ended
    chosen = tables.read_column(folder / "pool.parquet", "chosen")
    assert all(text.startswith("good") for text in chosen)
  ended, _ = select(tmp_path, rows, *named, "data.choice.third=[0]")
  assert ended.code == 64 and "config.data.choice" in ended.err
  ended, _ = select(tmp_path, rows, "data.fields.prmpt=q.text")
  assert ended.code == 64 and "'prmpt'" in ended.err


def test_selection_needs_no_loss_no_batch_and_no_rate(tmp_path):
  rows = [
    dict(prompt=f"p {i}", completion=f"a {i}", label=bool(i % 2))
    for i in range(12)
  ]
  knobs = "select.budget=5 train.lr=-1 train.batch_size=7 train.epochs=0"
  ended, _ = select(tmp_path, rows, *knobs.split())
  assert ended.code == 0, ended
  kept = load(str(tmp_path / "a.parquet"))
  assert kept.kind == "unpaired" and len(kept.rows) == 5


QUOTED = "a log\n\nHuman: hi\n\nAssistant: yo\n\n"
WRITTEN = {
  "messages": lambda i: dict(
    prompt=[turn("user", f"{QUOTED}{i}")],
    chosen=[turn("assistant", f"good {i}")],
    rejected=[turn("assistant", f"bad {i}")],
  ),
  "texts": pair,
  "dialogues": lambda i: dict(
    chosen=f"\n\nHuman: q{i}\n\nAssistant: good",
    rejected=f"\n\nHuman: q{i}\n\nAssistant: bad",
  ),
  "chats": lambda i: chat(i, KIND),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_a_selection_writes_gives_the_same_tokens_again(
  tmp_path, chatml, kind
):
  rows = [WRITTEN[kind](i) for i in range(20)]
  knobs = ("select.budget=1.0", "model.context=256")
  for name, tok in (("a", [f"model.tokenizer={chatml}"]), ("b", [])):
    ended, first = select(tmp_path, rows, *tok, *knobs, name=name)
    assert ended.code == 0, ended
    subset = str(tmp_path / f"{name}.parquet")
    ended, again = select(tmp_path, subset, *tok, *knobs, name=f"{name}2")
    assert ended.code == 0, ended
    ids = [tables.read_column(x / "pool.parquet", "id") for x in (first, again)]
    assert ids[0] == ids[1]
    one, two = (tokens.load_rows(x, "pool") for x in (first, again))
    assert all((a == b).all() for a, b in zip(one, two)), name


def test_datasets_reads_a_subset_of_chats_as_messages(tmp_path, chatml):
  import datasets
  import transformers

  rows = [chat(i, KIND) for i in range(20)]
  knobs = (f"model.tokenizer={chatml}", "model.context=256")
  ended, folder = select(tmp_path, rows, *knobs)
  assert ended.code == 0
  table = datasets.load_dataset(
    "parquet",
    data_files=str(tmp_path / "a.parquet"),
    split="train",
    cache_dir=str(tmp_path / "cache"),
  )
  row = table[0]
  assert [m["role"] for m in row["prompt"]] == ["system", "user"]
  assert row["chosen"] == [turn("assistant", row["chosen"][0]["content"])]
  trl = pytest.importorskip("trl.data_utils")
  assert trl.is_conversational(row)
  # What TRL makes of it, by the template, are the tokens that were chosen by.
  peer = transformers.AutoTokenizer.from_pretrained(chatml)
  render = functools.partial(peer.apply_chat_template, return_dict=False)
  ids = tables.read_column(folder / "pool.parquet", "id")
  ours = tokens.load_rows(folder, "pool")
  for row in table:
    for k, side in enumerate(("chosen", "rejected")):
      i = 2 * ids.index(row["id"]) + k
      mine = ours.ids[ours.offsets[i] : ours.offsets[i + 1]].tolist()
      theirs = render(row["prompt"] + row[side])
      prompt = render(row["prompt"], add_generation_prompt=True)
      assert mine == theirs[: len(mine)] and len(prompt) == ours.start[i]
      assert not peer.decode(theirs[len(mine) :]).strip()


def test_copies_among_the_chosen_rows_are_reported(tmp_path):
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
  rows = [pair(i, id=f"p{i}") for i in range(5, 40)]
  folder, summary = made(tmp_path, rows, data__held_out=held)
  pool, held_out, sft = (
    tables.read_column(folder / f"{name}.parquet", "prompt")
    for name in ("pool", "held_out", "sft")
  )
  assert len(held_out) == 9 and not sft
  assert {*pool} == {f"what is {i}?" for i in range(9, 40)}
  assert summary["refused_by_reason"] == {"prompt of the held-out file": 4}
  sources = [r["source"] for r in summary["readings"]]
  assert sources == [str(tmp_path / "a.jsonl"), held]
  row = dict(prompt="a", completion="b", label=True)
  unpaired = put(tmp_path / "t.jsonl", [row])
  with pytest.raises(DataError, match="config.data.held_out"):
    made(tmp_path, [pair(i) for i in range(9)], data__held_out=unpaired)


def test_several_sources_of_a_config(tmp_path):
  one = put(tmp_path / "x.jsonl", [pair(i) for i in range(30)])
  two = put(tmp_path / "y.jsonl", [pair(i) for i in range(30, 50)])
  ended, folder = select(tmp_path, f"['{one}', '{two}']", "data.caps=(10, 0)")
  assert ended.code == 0, ended
  for words in (
    "x.jsonl: read as pairs",
    "10 rows kept of 30",
    "20 rows kept of 20",
    "20 rows left out by config.data.caps",
  ):
    assert words in ended.out
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
  row = dict(prompt="a", completion="b", label="thumbs_up")
  c.data.source = put(tmp_path / "a.jsonl", [row])
  recipe.settle(c)
  assert c.loss.name == "kto"


def test_tokens_spelt_out_in_a_text_are_named(tmp_path, chatml):
  wrap = lambda text: (
    f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
  )
  rows = [pair(i, prompt=wrap(f"what is {i}?")) for i in range(20)]
  given = dict(model__tokenizer=chatml)
  with pytest.raises(DataError) as error:
    made(tmp_path, rows, **given)
  for words in (
    "20 of 20 rows",
    "<|im_start|>",
    "<|im_end|>",
    "config.data.special_tokens='tokens'",
  ):
    assert words in str(error.value)
  given["data__special_tokens"] = "tokens"
  folder, summary = made(tmp_path, rows, name="b", **given)
  tok, encoded = load_tokenizer(folder), tokens.load_rows(folder, "pool")
  first = encoded.ids[: encoded.offsets[1]].tolist()
  prompt = tables.read_column(folder / "pool.parquet", "prompt")[0]
  want = load_tokenizer(chatml).encode_rendered(prompt)
  assert first[: encoded.start[0]][-len(want) :] == want
  assert first.count(tok.specials["<|im_start|>"]) == 2
  assert summary["template"].startswith("no template")
  assert tok.specials_in("no <|im_end|> here") == ["<|im_end|>"]


@pytest.mark.parametrize("template", ["auto", "none"])
@pytest.mark.parametrize("row", [pair, chat])
def test_an_end_written_by_hand_is_named(tmp_path, chatml, row, template):
  """In the answers alone, or in messages."""
  rows = [row(i) | dict(chosen=f"good {i}<|im_end|>") for i in range(20)]
  given = dict(model__tokenizer=chatml, data__template=template)
  with pytest.raises(DataError, match="20 of 20 rows.*im_end"):
    made(tmp_path, rows, **given)


def test_a_few_tokens_spelt_out_are_the_text_they_are(tmp_path, chatml):
  rows = [pair(i) for i in range(20)]
  rows += [pair(i, prompt=f"<|im_start|>user\n{i}<|im_end|>") for i in (1, 2)]
  _, summary = made(tmp_path, rows, model__tokenizer=chatml)
  [warning] = summary["warnings"]
  assert "2 of 22 rows" in warning


def test_a_space_at_the_end_of_a_prompt_is_named(tmp_path):
  rows = [pair(i, prompt=f"Q: {i}\nA: ") for i in range(9)]
  _, summary = made(tmp_path, rows)
  assert "9 prompts end in a space" in summary["warnings"][0]


def test_a_template_that_refuses_rows_counts_them(tmp_path, gemma):
  rows = [chat(i, *[BRIEF][: i % 2]) for i in range(20)]
  given = dict(model__tokenizer=gemma)
  folder, summary = made(tmp_path, rows, **given)
  assert summary["refused_by_reason"] == {"template refused it": 10}
  first = summary["first_refused"]["template refused it"]
  assert "System role not supported" in first
  lost = jobs.lines(folder / "rejected.jsonl")
  assert {r["line"] for r in lost} == {*range(2, 21, 2)}
  assert all("System role" in r["detail"] for r in lost)
  for fraction in (0.0, 0.4):
    with pytest.raises(DataError, match="System role.*data.max_bad_fraction"):
      made(tmp_path, rows, data__max_bad_fraction=fraction, **given)
  folder, summary = made(tmp_path, rows, name="j", data__system="join", **given)
  assert summary["refused"] == 0
  text = load_tokenizer(folder).decode(tokens.load_rows(folder, "pool").ids)
  assert text.count("Be brief.\n\nwhat is") == 20  # twice a pair


def test_calls_of_tools_without_a_template_are_refused_by_name(tmp_path):
  function = dict(name="f", arguments="{}")
  call = dict(type="function", function=function)
  calls = [turn("assistant", None, tool_calls=[call])]
  rows = [chat(i) for i in range(12)]
  rows += [chat(i) | dict(chosen=calls) for i in range(12, 15)]
  folder, summary = made(tmp_path, rows)
  assert summary["refused_by_reason"] == {"tool calls are not supported": 3}
  refused = jobs.lines(folder / "rejected.jsonl")
  assert {r["line"] for r in refused} == {13, 14, 15}


def test_the_context_of_a_checkpoint_keeps_99_percent(tmp_path, chatml):
  rows = [pair(i) for i in range(200)]
  rows[3]["chosen"] = "word " * 300
  given = dict(model__tokenizer=chatml, model__checkpoint=chatml)
  _, summary = made(tmp_path, rows, **given)
  assert 16 <= summary["context"] <= 128
  assert summary["refused_by_reason"] == {"too long": 1}
  given |= dict(model__context=512, data__too_long="cut_answer")
  _, summary = made(tmp_path, rows, name="b", **given)
  assert summary["context"] == 512
  assert summary["truncation"]["pool"]["rows_cut"] == 1


@pytest.mark.parametrize(
  "knob, value",
  [
    ("too_long", "short"),
    ("special_tokens", "no"),
    ("system", "merge"),
    ("choice", "best"),
    ("caps", (1, 2)),
    ("weights", (0.0,)),
  ],
)
def test_knobs_of_the_rows_are_checked(tmp_path, knob, value):
  with pytest.raises(ConfigError, match=f"config.data.{knob}"):
    made(tmp_path, [pair(0)], **{f"data__{knob}": value})
