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

SMALL = Tokenizer(
  train_tokenizer(["\n\nHuman: bako ti\n\nAssistant: ruda mo"] * 9, 400)
)


def encode_pairs(tok, prompts, chosen, rejected, *how):
  sides = dict(chosen=chosen, rejected=rejected)
  return encode_texts(tok, prompts, sides, *how)


def encode_rows(tok, prompts, responses, context):
  sides = dict(response=responses)
  rows, report, refused = encode_texts(
    tok, prompts, sides, context, "cut_answer"
  )
  assert not refused
  return rows, report


texts = st.text(st.sampled_from("bakotirudm \n\u2581\U0001f600"), max_size=40)


def row(rows, i):
  return list(rows.ids[rows.offsets[i] : rows.offsets[i + 1]])


def by_hand(tok, prompt, sides, context, too_long):
  """The rule in plain lists: [(row, start, tokens cut), ...] or the reason."""
  head = [tok.bos] + tok.encode(prompt)
  tails = [tok.encode_response(side) + [tok.eos] for side in sides]
  if any(len(head) + len(tail) > context for tail in tails):
    if too_long == "drop":
      return "too long"
    if len(head) >= context:
      return "question too long"
  out = []
  for tail in tails:
    kept = tail[: context - len(head)]  # a question is never cut
    out.append((head + kept, len(head), len(tail) - len(kept)))
  return (
    out
    if out[0][0] != out[1][0]
    else (
      "identical after truncation"
      if max(o[2] for o in out)
      else "identical tokens"
    )
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
    SMALL, prompts, chosen, rejected, context, too_long
  )
  want, left_out, sizes = [], {}, []
  for i, (p, c, r) in enumerate(triples):
    pair = by_hand(SMALL, p, [c, r], context, too_long)
    if isinstance(pair, str):
      left_out[i] = pair
    else:
      want += pair
    sizes.append(
      1
      + len(SMALL.encode(p))
      + 1
      + max(len(SMALL.encode_response(x)) for x in (c, r))
    )
  assert {i: why.reason for i, why in refused.items()} == left_out
  assert [row(rows, i) for i in range(len(want))] == [w[0] for w in want]
  assert rows.start.tolist() == [w[1] for w in want]
  assert rows.cut.tolist() == [w[2] for w in want]
  assert len(rows.offsets) == len(want) + 1
  assert [a.dtype for a in rows] == [np.int32, np.int64, np.int32, np.int32]
  assert report["prompts_refused"] == len(left_out)
  assert report["rows"] == len(want)
  assert report["rows_cut"] == sum(w[2] > 0 for w in want)
  assert report["too_long"] == sum("too long" in x for x in left_out.values())
  if sizes:  # all of so few rows must fit
    assert report["fits"] == max(16, -(-max(sizes) // 8) * 8)
  assert report["tokens"] == sum(len(w[0]) for w in want)
  assert report["tokens_cut_by_side"] == dict(
    prompt=0,
    chosen=sum(w[2] for w in want[::2]),
    rejected=sum(w[2] for w in want[1::2]),
  )
  json.dumps(report)


@settings(max_examples=200, deadline=None)
@given(
  st.lists(st.tuples(texts, texts), min_size=1, max_size=6), st.integers(10, 60)
)
def test_promises_of_every_row(pairs, context):
  pairs = [(p, r) for p, r in pairs if len(SMALL.encode(p)) < context - 1]
  if not pairs:
    return
  prompts, responses = zip(*pairs)
  rows, report = encode_rows(SMALL, prompts, responses, context)
  sizes = tokens.row_lengths(rows)
  assert sizes.max() <= context
  length = tokens.padded_length(int(sizes.max()), context)
  # pad == eos: a mask made of `ids != pad` would lose the EOS.
  ids, mask = tokens.pad_rows(
    rows, np.arange(len(pairs)), length, pad_id=SMALL.eos
  )
  assert ids.dtype == np.int32 and mask.dtype == bool
  assert ids.shape == mask.shape == (len(pairs), length)
  for i, (prompt, response) in enumerate(pairs):
    whole = row(rows, i)
    assert whole[0] == SMALL.bos and whole.count(SMALL.bos) == 1
    n = int(mask[i].sum())
    assert n >= 1  # no side is ever empty
    assert mask[i].nonzero()[0].tolist() == list(range(rows.start[i], sizes[i]))
    assert ids[i, : sizes[i]].tolist() == whole
    assert (ids[i, sizes[i] :] == SMALL.eos).all()
    kept = ids[i][mask[i]].tolist()
    whole_response = SMALL.encode_response(response)
    if kept[-1] == SMALL.eos:
      assert kept[:-1] == whole_response  # EOS only where nothing was cut
      assert SMALL.decode_response(kept[:-1]) == response
    else:
      assert rows.cut[i] and kept == whole_response[:n]
    assert SMALL.eos not in whole[:-1]
    if not rows.cut[i]:
      assert SMALL.decode(whole) == prompt + response
    assert whole[1 : rows.start[i]] == SMALL.encode(prompt)  # never cut
  assert report["rows_cut"] == np.sum(rows.cut > 0)


def test_pairs_alike_after_the_cut_are_refused_and_counted():
  long = " bako" * 30
  rows, report, refused = encode_pairs(
    SMALL,
    ["ti", "ti", "ti"],
    [" a", long + " mo", " b"],
    [" b", long + " ti", " ruda"],
    24,
    "cut_answer",
  )
  assert {i: w.reason for i, w in refused.items()} == {
    1: "identical after truncation"
  }
  assert report["prompts_refused"] == 1 and report["rows"] == 4
  eos = SMALL.eos
  head = [SMALL.bos] + SMALL.encode("ti")
  assert [row(rows, i) for i in range(4)] == [
    head + SMALL.encode_response(side) + [eos]
    for side in (" a", " b", " b", " ruda")
  ]


def test_many_rows_keep_their_numbers():
  n = 2500  # more than two chunks
  prompts = [f"ti {i}" for i in range(n)]
  same = {7, 1500, 2499}
  chosen = [" a" for _ in range(n)]
  rejected = [" a" if i in same else f" {i}" for i in range(n)]
  rows, _, refused = encode_pairs(SMALL, prompts, chosen, rejected, 64)
  assert {i: w.reason for i, w in refused.items()} == {
    i: "identical tokens" for i in sorted(same)
  }
  kept = [i for i in range(n) if i not in same]
  assert [SMALL.decode(row(rows, 2 * k + 1)) for k in range(len(kept))] == [
    f"ti {i} {i}" for i in kept
  ]


def test_a_huge_answer_hurts_its_own_row_alone():
  prompts = ["ti bako"] * 9
  chosen = [" mo" * (500 if i == 4 else 3) for i in range(9)]
  for too_long, left in (("drop", 8), ("cut_answer", 9)):
    rows, report, refused = encode_pairs(
      SMALL, prompts, chosen, [" ruda"] * 9, 24, too_long
    )
    assert len(rows.start) == 2 * left and len({*rows.start.tolist()}) == 1
    assert [*refused] == ([4] if left == 8 else [])
    assert report["fits"] > 400  # 99 % of nine rows are nine
  whole = row(rows, 8), row(rows, 9)
  assert len(whole[0]) == 24 and whole[0][-1] != SMALL.eos
  assert whole[1][-1] == SMALL.eos  # the other side is as it was


def test_a_small_model_of_ones_own_is_given_what_fits():
  prompt = " bako" * 20
  n = len(SMALL.encode(prompt))
  rows, report, _ = encode_pairs(
    SMALL, [prompt], [" ti" * 3], [" mo"], n, "cut"
  )
  assert rows.start[0] == rows.start[1] < n
  assert row(rows, 0)[: rows.start[0]] == row(rows, 1)[: rows.start[1]]
  assert (
    row(rows, 0)[1 : rows.start[0]]
    == SMALL.encode(prompt)[n + 1 - rows.start[0] :]
  )
  assert row(rows, 0)[-1] == row(rows, 1)[-1] == SMALL.eos
  assert report["rows_cut_by_side"] == dict(prompt=1, chosen=0, rejected=0)
  rows, report, _ = encode_pairs(
    SMALL, [prompt], [" ti" * 40], [" mo"], 24, "cut"
  )
  assert rows.start.tolist() == [9, 9] and row(rows, 0)[-1] != SMALL.eos
  assert report["rows_cut_by_side"] == dict(prompt=1, chosen=1, rejected=0)


def test_the_context_that_keeps_99_percent():
  sizes = np.array([20] * 98 + [30, 5000])
  assert tokens.context_for(sizes, 8192) == 32
  assert tokens.context_for(sizes, 24) == 24
  assert tokens.context_for(np.array([3]), 8192) == 16


@pytest.mark.parametrize(
  "name",
  [
    "models/stories260K",
    "tokenizers/mistral-v1",
    "tokenizers/t5/sentencepiece.model",
  ],
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
  rows, report = encode_rows(tok, prompts, responses, 4096)
  assert report["rows_cut"] == 0
  for i, (prompt, response) in enumerate(zip(prompts, responses)):
    ids, start = row(rows, i), rows.start[i]
    assert ids.count(tok.bos) == ids.count(tok.eos) == 1
    assert ids[0] == tok.bos and ids[-1] == tok.eos
    if "t5" in name:  # it normalises; the boundary must still be between words
      squeeze = lambda text: "".join(text.split())
      unknown = tok.unk in ids
      assert unknown or squeeze(tok.decode_response(ids[start:-1])) in (
        squeeze(response),
        squeeze(tok.decode(tok.encode(response))),
      )
    else:
      assert tok.decode(ids) == raw[i]
      assert tok.decode(ids[:start]) == prompt
      assert tok.decode_response(ids[start:]) == response


def test_golden_ids():
  """The whole row, piece by piece."""
  pieces = SMALL.pieces()
  rows, _ = encode_rows(
    SMALL, ["\n\nHuman: bako ti\n\nAssistant:"], [" ruda mo"], 64
  )
  assert [pieces[i] for i in row(rows, 0)] == [
    "<s>",
    "\n\n",
    "Human",
    ":",
    "\u2581bako",
    "\u2581ti",
    "\n\n",
    "Assistant",
    ":",
    "\u2581ruda",
    "\u2581mo",
    "</s>",
  ]
  assert rows.start.tolist() == [9] and rows.cut.tolist() == [0]


def test_a_model_without_bos_gets_none():
  proto = spm_pb2.ModelProto.FromString(SMALL.proto)
  proto.trainer_spec.bos_piece = "<absent>"
  tok = Tokenizer(proto.SerializeToString())
  assert tok.bos == -1
  rows, _ = encode_rows(tok, ["ti"], [" mo" * 40], 16)
  head = tok.encode("ti", begins=True)
  assert row(rows, 0)[: len(head)] == head == tok.encode("ti")
  assert len(row(rows, 0)) == 16 and rows.start[0] == len(head)


def test_text_cannot_place_a_control():
  rows, _ = encode_rows(SMALL, ["<s>a</s>"], [" </s><s>"], 64)
  ids = row(rows, 0)
  assert ids.count(SMALL.bos) == 1 and ids.count(SMALL.eos) == 1
  assert SMALL.decode(ids) == "<s>a</s> </s><s>"


def test_pad_takes_any_rows_in_any_order():
  rows, _ = encode_rows(SMALL, ["ti", "mo mo", ""], [" a", "", " b"], 64)
  index = np.array([2, 0, 0, 1])
  ids, mask = tokens.pad_rows(rows, index, 32)
  for k, i in enumerate(index):
    want = row(rows, i)
    assert ids[k].tolist() == want + [0] * (32 - len(want))
    assert mask[k].sum() == len(want) - rows.start[i]
  assert tokens.pad_rows(rows, np.array([], int), 16)[0].shape == (0, 16)
  with pytest.raises(ValueError, match="does not fit"):
    tokens.pad_rows(rows, index, 3)


def test_shortened_rows_are_the_heads_of_rows():
  rows = tokens.TokenRows(
    np.arange(9, dtype=np.int32),
    np.array([0, 4, 6, 9]),
    np.array([1, 1, 2], np.int32),
    np.array([0, 5, 0], np.int32),
  )
  short = tokens.cut_rows(rows, np.array([2, 9, 3]))
  assert [row(short, i) for i in range(3)] == [[0, 1], [4, 5], [6, 7, 8]]
  assert short.cut.tolist() == [2, 5, 0]
  assert short.start.tolist() == [1, 1, 2]


def test_no_rows_at_all():
  rows, report, refused = encode_pairs(SMALL, [], [], [], 64)
  assert (len(rows.ids), rows.offsets.tolist(), refused) == (0, [0], {})
  assert report["rows"] == report["too_long"] == 0
  with pytest.raises(ValueError, match="shorter"):
    encode_rows(SMALL, ["a"], [], 64)


def test_a_context_too_short_names_the_knob():
  for context in (0, 1, 9):
    with pytest.raises(ConfigError, match="model.context"):
      encode_rows(SMALL, ["a"], ["b"], context)


def test_buckets():
  sizes = [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
  for length in range(1, 1025):
    want = next(size for size in sizes if size >= length)
    assert tokens.padded_length(length, 1024) == want
    assert tokens.padded_length(length, 4096) == want
  assert (
    tokens.padded_length(65, 80) == 80 and tokens.padded_length(3, 10) == 10
  )
  with pytest.raises(ValueError):
    tokens.padded_length(65, 64)


def test_saved_rows_come_back_mapped(tmp_path):
  rows, _ = encode_rows(SMALL, ["ti", "mo"], [" a", " ruda"], 64)
  tokens.save_rows(tmp_path / "new", "pool", rows)
  back = tokens.load_rows(str(tmp_path / "new"), "pool")
  assert all(
    np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(rows, back)
  )
  assert isinstance(back.ids, np.memmap)
  got, want = (tokens.pad_rows(r, np.array([1, 0]), 16) for r in (back, rows))
  assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])
  empty = encode_rows(SMALL, [], [], 64)[0]
  tokens.save_rows(tmp_path / "new", "none", empty)
  assert tokens.load_rows(tmp_path / "new", "none").offsets.tolist() == [0]


def test_damaged_files_are_named(tmp_path):
  rows, _ = encode_rows(SMALL, ["ti", "mo"], [" a", " ruda"], 64)
  tokens.save_rows(tmp_path, "a", rows)
  ids = tmp_path / "a.ids.npy"
  whole = ids.read_bytes()
  for data in (b"", whole[:40], whole[:-4], b"junk" * 40):
    ids.write_bytes(data)
    with pytest.raises(CorruptError, match="a.ids.npy"):
      tokens.load_rows(tmp_path, "a")
  np.save(ids, rows.ids[:-1])
  with pytest.raises(CorruptError, match="do not fit"):
    tokens.load_rows(tmp_path, "a")
  np.save(ids, rows.ids.astype(np.float32))
  with pytest.raises(CorruptError, match="float32"):
    tokens.load_rows(tmp_path, "a")
  np.save(ids, np.array([{"a": 1}], object), allow_pickle=True)
  with pytest.raises(CorruptError, match="a.ids.npy"):
    tokens.load_rows(tmp_path, "a")
  ids.unlink()
  with pytest.raises(CorruptError, match="a.ids.npy"):
    tokens.load_rows(tmp_path, "a")
