"""The data stage with a chat model's tokenizer: files, rows, decisions."""

import json

from etils import epath
import numpy as np
import pytest
from test_chat import BUILT_IN, write_folder

from configs import common
from jaxalign.core.errors import ConfigError, DataError
from jaxalign.data import build_data, prepare, special, tables, tokens
from jaxalign.data.tokenizer import load_tokenizer


def made(tmp_path, source, context=8192, wanted="pairs", **data):
  """What the data stage leaves of a source: (folder, summary)."""
  c = common.base()
  c.data.source = str(source)
  c.data.limit = 120
  c.model.tokenizer = str(tmp_path / "tok")
  c.model.context = context
  for name, value in data.items():
    c.data[name] = value
  folder = epath.Path(tmp_path / "data")
  folder.mkdir(exist_ok=True)
  names, _, result = build_data.make_data(
    c, folder, most=context, wanted=wanted, writes=True
  )
  assert {*names} >= {"tokenizer.json", special.ROW_FORMAT, "pool.parquet"}
  return folder, json.loads((folder / "data_summary.json").read_text())


@pytest.mark.parametrize(
  "name, wanted",
  [
    ("llamafactory/dpo_en_demo.json", "pairs"),
    ("llamafactory/dpo_en_demo.json", "unpaired"),
    ("llamafactory/kto_en_demo.json", "unpaired"),
    ("oasst/en_100_tree.jsonl", "pairs"),
    ("hh-harmless/pairs.jsonl.gz", "pairs"),
  ],
)
def test_conversations_are_written_in_the_models_own_template(
  tmp_path, shared, capsys, name, wanted
):
  write_folder(tmp_path / "tok", BUILT_IN["chatml"])
  folder, summary = made(tmp_path, shared / "data" / name, wanted=wanted)
  tok = load_tokenizer(folder)  # as every later stage reads it
  start, end = tok.specials["<|im_start|>"], tok.specials["<|im_end|>"]
  assert tok.eos == end and tok.specials["<|end|>"] in tok.stops
  for split in build_data.SPLITS:
    rows = tables.read_table(folder / f"{split}.parquet")
    encoded = tokens.load_rows(folder, split)
    per = len(encoded.start) // len(rows)
    for k in range(0, len(encoded.start), 7):
      row, side = rows[k // per], ("chosen", "rejected")[k % per]
      text = row.get("completion") or row.get("response") or row[side]
      ids = encoded.ids[encoded.offsets[k] : encoded.offsets[k + 1]]
      answer = ids[encoded.start[k] :]
      if not encoded.cut[k]:
        assert tok.decode_response(answer) == text.removeprefix(" ")
        assert list(ids).count(start) == len(row["turns"]) + 1
        for turn in row["turns"]:
          assert turn["content"] in tok.decode(ids)
        assert answer[-1] == end
  assert "pool: " in capsys.readouterr().out
  assert summary["truncation"]["pool"]["rows_cut"] >= 0
  for file in ("tokenizer.json", "tokenizer_config.json"):
    given = (tmp_path / "tok" / file).read_bytes()
    assert (folder / file).read_bytes() == given


def test_a_template_of_another_is_exported_with_the_tokenizer(tmp_path, shared):
  write_folder(tmp_path / "tok", BUILT_IN["chatml"])
  source = shared / "data/llamafactory/dpo_en_demo.json"
  folder, _ = made(tmp_path, source, template="llama3")
  tok = load_tokenizer(folder)
  assert tok.template == BUILT_IN["llama3"]
  assert tok.eos == tok.specials["<|eot_id|>"]
  assert tok.bos == tok.specials["<|begin|>"]  # the template writes it
  tok.export(tmp_path / "out")
  transformers = pytest.importorskip("transformers")
  peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert peer.chat_template == BUILT_IN["llama3"]


def test_plain_text_is_wrapped_as_turns_unless_it_is_to_be_left_alone(
  tmp_path, shared
):
  write_folder(tmp_path / "tok", BUILT_IN["chatml"])
  source = shared / "data/ultrafeedback/pairs.jsonl.gz"
  folder, summary = made(tmp_path, source, template="none")
  assert summary["template"].startswith("no template")
  tok = load_tokenizer(folder)
  assert tok.eos == tok.specials["<|end|>"]
  pool = tables.read_table(folder / "pool.parquet")
  encoded = tokens.load_rows(folder, "pool")
  marks = [tok.specials["<|im_start|>"], tok.specials["<|im_end|>"]]
  assert not np.isin(encoded.ids, marks).any()
  assert all(row["margin"] is not None for row in pool)
  # By itself or by name: a plain prompt is the user's turn.
  for name, title in (("auto", "the tokenizer's own"), ("chatml", "chatml")):
    folder, summary = made(tmp_path, source, template=name)
    assert summary["template"].startswith(f"chat template: {title}; ")
    assert "wrapped" in summary["template"]
    encoded = tokens.load_rows(folder, "pool")
    for i in range(0, 40, 2):
      at = encoded.offsets[i]
      prompt = encoded.ids[at : at + encoded.start[i]].tolist()
      assert prompt.count(marks[0]) == 2
    row = tables.read_table(folder / "pool.parquet")[0]
    assert row["turns"] == [dict(role="user", content=row["prompt"])]
    [subset] = tables.as_read([row])
    answer = dict(role="assistant", content=row["chosen"])
    assert subset["prompt"] == row["turns"] and subset["chosen"] == [answer]


def test_a_template_that_takes_no_row_says_so(tmp_path, shared):
  source = (
    "{% if messages[0]['content'] != 'a' %}{{ raise_exception('no') }}"
    "{% endif %}" + BUILT_IN["chatml"]
  )
  write_folder(tmp_path / "tok", source)
  with pytest.raises(DataError, match="template refused it"):
    made(tmp_path, shared / "data/llamafactory/dpo_en_demo.json")


def test_the_fingerprint_sees_a_template_and_a_tokenizer(tmp_path):
  write_folder(tmp_path / "tok", "A")
  c = common.base()
  c.model.tokenizer = str(tmp_path / "tok")
  seen = {prepare.fingerprint(c)}
  write_folder(tmp_path / "tok", "B")
  seen.add(prepare.fingerprint(c))
  c.data.template = str(tmp_path / "x.jinja")
  for text in ("1", "2"):
    (tmp_path / "x.jinja").write_text(text)
    prepare.check_source(c)
    seen.add(prepare.fingerprint(c))
  assert len(seen) == 4
  c.data.template = "nonesuch"
  with pytest.raises(ConfigError, match="config.data.template"):
    prepare.check_source(c)
