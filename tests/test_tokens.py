"""One BOS, one EOS that counts, no EOS on a cut answer, the right boundary."""

import gzip
import json

from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2 as spm_pb2

from jaxalign.core.errors import ConfigError, CorruptError
from jaxalign.data import tokens
from jaxalign.data.encode import encode_texts
from jaxalign.data.tokenizer import load_tokenizer, Tokenizer, train_tokenizer

TURNS = "\n\nHuman: bako ti\n\nAssistant: ruda mo"
SMALL = Tokenizer(train_tokenizer([TURNS] * 9, 400))


def encode_pairs(prompts, chosen, rejected, *how):
  sides = dict(chosen=chosen, rejected=rejected)
  return encode_texts(SMALL, prompts, sides, *how)


def encode_rows(prompts, responses, context=64, tok=SMALL):
  sides = dict(response=responses)
  rows, report, refused = encode_texts(
    tok, prompts, sides, context, "cut_answer"
  )
  assert not refused
  return rows, report


texts = st.text(st.sampled_from("bakotirudm \n\u2581\U0001f600"), max_size=40)


def row(rows, i):
  return list(rows.ids[rows.offsets[i] : rows.offsets[i + 1]])


def reasons(refused):
  return {i: why.reason for i, why in refused.items()}


def by_hand(prompt, sides, context, too_long):
  """The rule in plain lists: [(row, start, tokens cut), ...] or the reason."""
  head = [SMALL.bos] + SMALL.encode(prompt)
  tails = [SMALL.encode_response(side) + [SMALL.eos] for side in sides]
  if len(head) + max(map(len, tails)) > context:
    if too_long == "drop":
      return "too long"
    if len(head) >= context:
      return "question too long"
  room = context - len(head)  # a question is never cut
  out = [(head + x[:room], len(head), max(len(x) - room, 0)) for x in tails]
  if out[0][0] != out[1][0]:
    return out
  return "identical " + (
    "after truncation" if any(x[2] for x in out) else "tokens"
  )


@settings(max_examples=300, deadline=None)
@given(
  st.lists(st.tuples(texts, texts, texts), max_size=5),
  st.integers(10, 60),
  st.sampled_from(["drop", "cut_answer"]),
)
@example([("", "a", "b")], 10, "drop")
@example([("bako", "ti" * 30, "ti" * 31)], 12, "cut_answer")
@example([("bako" * 30, "ti" * 30, "a")], 12, "cut_answer")
def test_pairs_follow_the_rule(triples, context, too_long):
  prompts, chosen, rejected = ([t[k] for t in triples] for k in range(3))
  rows, report, refused = encode_pairs(
    prompts, chosen, rejected, context, too_long
  )
  want, left_out = [], {}
  for i, (prompt, *sides) in enumerate(triples):
    pair = by_hand(prompt, sides, context, too_long)
    if isinstance(pair, str):
      left_out[i] = pair
    else:
      want += pair
  assert reasons(refused) == left_out
  assert [row(rows, i) for i in range(len(want))] == [w[0] for w in want]
  assert rows.start.tolist() == [w[1] for w in want]
  assert rows.cut.tolist() == [w[2] for w in want]
  assert len(rows.offsets) == len(want) + 1
  assert [a.dtype for a in rows] == [np.int32, np.int64, np.int32, np.int32]
  assert report["prompts_refused"] == len(left_out)
  assert report["rows"] == len(want)
  assert report["rows_cut"] == sum(w[2] > 0 for w in want)
  assert report["too_long"] == sum("too long" in x for x in left_out.values())
  size = lambda p, *sides: (
    len(SMALL.encode(p)) + max(len(SMALL.encode_response(x)) for x in sides)
  )
  longest = 2 + max((size(*triple) for triple in triples), default=0)
  if triples:  # all of so few rows must fit
    assert report["fits"] == max(16, -(-longest // 8) * 8)
  assert report["tokens"] == sum(len(w[0]) for w in want)
  cut = [sum(w[2] for w in want[k::2]) for k in range(2)]
  assert [*report["tokens_cut_by_side"].values()] == [0, *cut]
  json.dumps(report)


@settings(max_examples=200, deadline=None)
@given(
  st.lists(st.tuples(texts, texts), min_size=1, max_size=6), st.integers(10, 60)
)
def test_promises_of_every_row(pairs, context):
  pairs = [(p, r) for p, r in pairs if len(SMALL.encode(p)) < context - 1]
  if not pairs:
    return
  rows, report = encode_rows(*zip(*pairs), context)
  sizes = tokens.row_lengths(rows)
  assert sizes.max() <= context
  length = tokens.padded_length(int(sizes.max()), context)
  # pad == eos: a mask made of `ids != pad` would lose the EOS.
  ids, mask = tokens.pad_rows(rows, np.arange(len(pairs)), length, SMALL.eos)
  assert ids.dtype == np.int32 and mask.dtype == bool
  assert ids.shape == mask.shape == (len(pairs), length)
  for i, (prompt, response) in enumerate(pairs):
    whole = row(rows, i)
    assert whole[0] == SMALL.bos and whole.count(SMALL.bos) == 1
    assert rows.start[i] < sizes[i]  # no side is ever empty
    assert mask[i].nonzero()[0].tolist() == list(range(rows.start[i], sizes[i]))
    assert ids[i, : sizes[i]].tolist() == whole
    assert (ids[i, sizes[i] :] == SMALL.eos).all()
    kept, answer = ids[i][mask[i]].tolist(), SMALL.encode_response(response)
    if kept[-1] == SMALL.eos:
      assert kept[:-1] == answer  # EOS only where nothing was cut
      assert SMALL.decode_response(kept[:-1]) == response
    else:
      assert rows.cut[i] and kept == answer[: len(kept)]
    assert SMALL.eos not in whole[:-1]
    if not rows.cut[i]:
      assert SMALL.decode(whole) == prompt + response
    assert whole[1 : rows.start[i]] == SMALL.encode(prompt)  # never cut
  assert report["rows_cut"] == np.sum(rows.cut > 0)


def test_many_rows_keep_their_numbers():
  n, same = 2500, {7: 0, 1500: 0, 2499: 0}  # more than two chunks
  rejected = [" a" if i in same else f" {i}" for i in range(n)]
  rows, _, refused = encode_pairs(
    [f"ti {i}" for i in range(n)], [" a"] * n, rejected, 64
  )
  assert reasons(refused) == dict.fromkeys(same, "identical tokens")
  want = [f"ti {i} {i}" for i in range(n) if i not in same]
  assert [SMALL.decode(row(rows, 2 * k + 1)) for k in range(n - 3)] == want


def test_a_huge_answer_hurts_its_own_row_alone():
  chosen = [" mo" * (500 if i == 4 else 3) for i in range(9)]
  for too_long, left in (("drop", 8), ("cut_answer", 9)):
    rows, report, refused = encode_pairs(
      ["ti bako"] * 9, chosen, [" ruda"] * 9, 24, too_long
    )
    assert len(rows.start) == 2 * left and len({*rows.start.tolist()}) == 1
    assert [*refused] == ([4] if left == 8 else [])
    assert report["fits"] > 400  # 99 % of nine rows are nine
  assert len(row(rows, 8)) == 24 and row(rows, 8)[-1] != SMALL.eos
  assert row(rows, 9)[-1] == SMALL.eos  # the other side is as it was


def test_a_small_model_of_ones_own_is_given_what_fits():
  prompt = " bako" * 20
  whole = SMALL.encode(prompt)
  n = len(whole)
  rows, report, _ = encode_pairs([prompt], [" ti" * 3], [" mo"], n, "cut")
  start = rows.start[0]
  assert start == rows.start[1] < n
  assert row(rows, 0)[:start] == row(rows, 1)[:start]
  assert row(rows, 0)[1:start] == whole[n + 1 - start :]
  assert row(rows, 0)[-1] == row(rows, 1)[-1] == SMALL.eos
  assert report["rows_cut_by_side"] == dict(prompt=1, chosen=0, rejected=0)
  rows, report, _ = encode_pairs([prompt], [" ti" * 40], [" mo"], 24, "cut")
  assert rows.start.tolist() == [9, 9] and row(rows, 0)[-1] != SMALL.eos
  assert report["rows_cut_by_side"] == dict(prompt=1, chosen=1, rejected=0)


def test_the_context_that_keeps_99_percent():
  sizes = np.array([20] * 98 + [30, 5000])
  assert tokens.context_for(sizes, 8192) == 32
  assert tokens.context_for(sizes, 24) == 24
  assert tokens.context_for(np.array([3]), 8192) == 16


@pytest.mark.parametrize(
  "name", ["models/stories260K", "tokenizers/mistral-v1", "tokenizers/t5"]
)
def test_the_mask_begins_where_the_response_does(shared, name):
  """Over real tokenizers: the boundary in tokens is the boundary in text."""
  tok = load_tokenizer(shared / name)
  path = shared / "data" / "hh-harmless" / "pairs.jsonl.gz"
  with gzip.open(path, "rt", encoding="utf-8") as file:
    raw = [json.loads(next(file))["chosen"] for _ in range(200)]
  cuts = [text.rindex("\n\nAssistant:") + 12 for text in raw]
  prompts = [text[:cut] for text, cut in zip(raw, cuts)]
  responses = [text[cut:] for text, cut in zip(raw, cuts)]
  rows, report = encode_rows(prompts, responses, 4096, tok)
  assert report["rows_cut"] == 0
  squeeze = lambda text: "".join(text.split())
  for i, (prompt, response) in enumerate(zip(prompts, responses)):
    ids, start = row(rows, i), rows.start[i]
    assert ids.count(tok.bos) == ids.count(tok.eos) == 1
    assert ids[0] == tok.bos and ids[-1] == tok.eos
    if "t5" not in name:
      assert tok.decode(ids) == raw[i]
      assert tok.decode(ids[:start]) == prompt
      assert tok.decode_response(ids[start:]) == response
    elif (
      tok.unk not in ids
    ):  # it normalises, but cuts between words all the same
      back = tok.decode(tok.encode(response))
      shown = squeeze(tok.decode_response(ids[start:-1]))
      assert shown in (squeeze(response), squeeze(back))


def test_golden_ids():
  """The whole row, piece by piece; no text places a control."""
  pieces = SMALL.pieces()
  rows, _ = encode_rows(["\n\nHuman: bako ti\n\nAssistant:"], [" ruda mo"])
  want = "<s>|\n\n|Human|:|\u2581bako|\u2581ti|\n\n|Assistant|:|\u2581ruda"
  want = [*want.split("|"), "\u2581mo", "</s>"]
  assert [pieces[i] for i in row(rows, 0)] == want
  assert rows.start.tolist() == [9] and rows.cut.tolist() == [0]
  ids = row(encode_rows(["<s>a</s>"], [" </s><s>"])[0], 0)
  assert ids.count(SMALL.bos) == 1 and ids.count(SMALL.eos) == 1
  assert SMALL.decode(ids) == "<s>a</s> </s><s>"


def test_a_model_without_bos_gets_none():
  proto = spm_pb2.ModelProto.FromString(SMALL.proto)
  proto.trainer_spec.bos_piece = "<absent>"
  tok = Tokenizer(proto.SerializeToString())
  assert tok.bos == -1
  rows, _ = encode_rows(["ti"], [" mo" * 40], 16, tok)
  head = tok.encode("ti", begins=True)
  assert row(rows, 0)[: len(head)] == head == tok.encode("ti")
  assert len(row(rows, 0)) == 16 and rows.start[0] == len(head)


def test_pad_takes_any_rows_in_any_order():
  rows, _ = encode_rows(["ti", "mo mo", ""], [" a", "", " b"])
  index = np.array([2, 0, 0, 1])
  ids, mask = tokens.pad_rows(rows, index, 32)
  for k, i in enumerate(index):
    want = row(rows, i)
    assert ids[k].tolist() == want + [0] * (32 - len(want))
    assert mask[k].sum() == len(want) - rows.start[i]
  assert tokens.pad_rows(rows, np.array([], int), 16)[0].shape == (0, 16)
  with pytest.raises(ValueError, match="does not fit"):
    tokens.pad_rows(rows, index, 3)


def test_cut_rows_are_the_heads_of_rows():
  start, cut = np.int32([1, 1, 2]), np.int32([0, 5, 0])
  ids, offsets = np.arange(9, dtype=np.int32), np.array([0, 4, 6, 9])
  rows = tokens.TokenRows(ids, offsets, start, cut)
  short = tokens.cut_rows(rows, np.array([2, 9, 3]))
  assert [row(short, i) for i in range(3)] == [[0, 1], [4, 5], [6, 7, 8]]
  assert short.cut.tolist() == [2, 5, 0]
  assert short.start.tolist() == [1, 1, 2]


def test_no_rows_at_all():
  rows, report, refused = encode_pairs([], [], [], 64)
  assert (len(rows.ids), rows.offsets.tolist(), refused) == (0, [0], {})
  assert report["rows"] == report["too_long"] == 0
  with pytest.raises(ValueError, match="shorter"):
    encode_rows(["a"], [])


def test_a_context_too_short_names_the_knob():
  for context in (0, 1, 9):
    with pytest.raises(ConfigError, match="model.context"):
      encode_rows(["a"], ["b"], context)


def test_padded_lengths():
  sizes = [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
  for length in range(1, 1025):
    want = next(size for size in sizes if size >= length)
    assert tokens.padded_length(length, 1024) == want
    assert tokens.padded_length(length, 4096) == want
  assert tokens.padded_length(65, 80) == 80
  assert tokens.padded_length(3, 10) == 10
  with pytest.raises(ValueError):
    tokens.padded_length(65, 64)


def test_saved_rows_come_back_mapped(tmp_path):
  rows, _ = encode_rows(["ti", "mo"], [" a", " ruda"])
  tokens.save_rows(tmp_path / "new", "pool", rows)
  back = tokens.load_rows(str(tmp_path / "new"), "pool")
  for a, b in zip(rows, back):
    assert np.array_equal(a, b) and a.dtype == b.dtype
  assert isinstance(back.ids, np.memmap)
  got, want = (tokens.pad_rows(r, np.array([1, 0]), 16) for r in (back, rows))
  assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])
  tokens.save_rows(tmp_path / "new", "none", encode_rows([], [])[0])
  assert tokens.load_rows(tmp_path / "new", "none").offsets.tolist() == [0]


def test_damaged_files_are_named(tmp_path):
  rows, _ = encode_rows(["ti", "mo"], [" a", " ruda"])
  tokens.save_rows(tmp_path, "a", rows)
  ids = tmp_path / "a.ids.npy"
  whole = ids.read_bytes()
  for data in (b"", whole[:40], whole[:-4], b"junk" * 40):
    ids.write_bytes(data)
    with pytest.raises(CorruptError, match="a.ids.npy"):
      tokens.load_rows(tmp_path, "a")
  for array, words in (
    (rows.ids[:-1], "do not fit"),
    (rows.ids.astype(np.float32), "float32"),
    (np.array([{"a": 1}], object), "a.ids.npy"),
  ):
    np.save(ids, array, allow_pickle=True)
    with pytest.raises(CorruptError, match=words):
      tokens.load_rows(tmp_path, "a")
  ids.unlink()
  with pytest.raises(CorruptError, match="a.ids.npy"):
    tokens.load_rows(tmp_path, "a")
