"""Tokenizers lose nothing, obey no text, and mean the same to transformers."""

import gzip
import io
import json
import random
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st
import pytest
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as spm_pb2

from jaxalign.core.errors import ConfigError
from jaxalign.data.tokenizer import load_tokenizer, Tokenizer, train_tokenizer

RNG = random.Random(0)
SYLLABLES = [a + b for a in "bdgkmnprtz" for b in "aeiou"]
WORDS = sorted(
  {"".join(RNG.choices(SYLLABLES, k=2 + i % 2)) for i in range(60)}
)
TEXTS = [
  f"\n\nHuman: {' '.join(RNG.choices(WORDS, k=9))}?\n\nAssistant: "
  + " ".join(RNG.choices(WORDS, k=6))
  for _ in range(300)
]
# Blanks, controls, U+2581 (SentencePiece's space), marks and joined emoji.
HARD = ["", " ", "  a  ", "\n\n", "a\r\nb\t", "\0", "a\0b", "12345", "<0x0A>"]
HARD += ["\u2581", " \u2581 ", "\u2581\u2581a", "<s>", "</s><unk>", "\ufeff"]
HARD += ["\ufffd", "\u2585", "\u2047", "\u202e\u05d0\u05d1 \u0627\u0644"]
HARD += ["e\u0301 \u00e9 \ufb01", "\U0001f469\u200d\U0001f4bb\U0001f3fd"]
HARD += ["\x7f\x1b[0m", "\U0010ffff", "\u1100\u1161", " \u2581 a"]
STORIES, MISTRAL = "models/stories260K", "tokenizers/mistral-v1"
T5 = "tokenizers/t5/sentencepiece.model"

text = st.text(st.characters(codec="utf-8"), max_size=30) | st.lists(
  st.sampled_from(WORDS + HARD + [" ", "\n\nAssistant:"])
).map("".join)


@pytest.fixture(scope="module")
def small():
  return Tokenizer(train_tokenizer(TEXTS, 1000))


def test_a_trained_tokenizer(small):
  """Each word of a closed vocabulary is one piece; it is the same each time."""
  for word in WORDS:
    assert len(small.encode(f" {word}")) == 1, word
  assert small.decode(small.encode("\n\nHuman: hi\n\n")) == "\n\nHuman: hi\n\n"
  assert small.vocab_size < 1000  # a closed vocabulary has no more pieces
  assert train_tokenizer(TEXTS, 1000) == small.proto
  assert train_tokenizer(TEXTS[:200], 1000) != small.proto
  assert (small.unk, small.bos, small.eos, small.pad) == (0, 1, 2, 0)
  assert small.encode("ba", begins=True) == [1] + small.encode("ba")
  assert small.decode([1] + small.encode("ba ti") + [2]) == "ba ti"


@settings(max_examples=400, deadline=None)
@given(text)
@example("".join(HARD))
def test_nothing_is_lost_and_no_text_is_a_control(small, value):
  for ids in (small.encode(value), small.encode_response(value)):
    assert small.decode(ids) == value
    assert not {small.bos, small.eos, small.unk} & set(ids)
    assert all(0 <= i < small.vocab_size for i in ids)


@pytest.mark.parametrize("name", [STORIES, MISTRAL])
def test_models_that_put_a_space_first(shared, name):
  tok = load_tokenizer(shared / name)
  assert tok.adds_prefix

  @settings(max_examples=150, deadline=None)
  @given(text, text)
  @example("\n\nHuman: Hi\n\nAssistant:", " Hello")
  def check(prompt, response):
    head, tail = tok.encode(prompt), tok.encode_response(response)
    assert not {tok.bos, tok.eos, tok.unk} & set(head + tail)
    prompt, response = (t.replace("\u2581", " ") for t in (prompt, response))
    assert tok.decode(head) == prompt
    assert tok.decode_response(tail) == response
    if prompt:
      assert tok.decode(head + tail) == prompt + response

  check()
  # One space, not two: "▁Hello", as the whole text would be tokenised.
  whole = tok.encode("Hi: Hello")
  assert tok.encode("Hi:") + tok.encode_response(" Hello") == whole
  assert tok.encode("Hello") == tok.encode_response(" Hello")


def test_a_unigram_model_loads_but_is_not_exported(tmp_path, shared):
  tok = load_tokenizer(shared / T5)
  assert tok.decode(tok.encode_response(" Hello there")) == "Hello there"
  assert tok.eos == 1 and tok.pad == 0
  with pytest.raises(ConfigError, match="BPE"):
    tok.export(tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_batches_are_the_texts_one_by_one(small, shared):
  tok = load_tokenizer(shared / STORIES)
  assert small.encode_many(HARD) == [small.encode(text) for text in HARD]
  assert small.encode_many([]) == []
  assert tok.encode_responses(HARD) == list(map(tok.encode_response, HARD))


def test_what_cannot_be_a_tokenizer(tmp_path, small):
  for data in (b"", b"junk" * 50, small.proto[:500], b"\x80\x04K*."):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ConfigError, match="config.model.tokenizer"):
      load_tokenizer(tmp_path)
  with pytest.raises(ConfigError, match="nowhere"):
    load_tokenizer(tmp_path / "nowhere")


def test_rare_characters_are_bytes_when_the_vocabulary_is_small():
  texts = ["common words here " * 50 + chr(0x4E00 + i) for i in range(500)]
  tok = Tokenizer(train_tokenizer(texts, 400))
  assert tok.vocab_size <= 400
  assert tok.decode(tok.encode(texts[7])) == texts[7]
  assert len(tok.encode(" common")) == 1


@pytest.mark.parametrize("name", ["trained", STORIES])
def test_transformers_reads_the_export(tmp_path, shared, name):
  transformers = pytest.importorskip("transformers")
  path = shared / "data/hh-harmless/pairs.jsonl.gz"
  with gzip.open(path, "rt", encoding="utf-8") as file:
    real = [json.loads(line)["chosen"] for line in file]
  if name == "trained":
    tok = Tokenizer(train_tokenizer(real[:400], 2000))
  else:
    tok = load_tokenizer(shared / name)
  tok.export(tmp_path)
  names = "special_tokens_map.json tokenizer.json tokenizer.model"
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    *names.split(),
    "tokenizer_config.json",
  ]
  data = (tmp_path / "tokenizer.model").read_bytes()
  assert data == tok.files["tokenizer.model"]
  (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llama")))
  peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for kind in ("bos", "eos", "unk", "pad"):
    assert getattr(peer, f"{kind}_token_id") == getattr(tok, kind)
  assert len(peer) == tok.vocab_size
  plain = [t for t in HARD if t and "\u2581" not in t and t[0] != "<"]
  texts = real[400:800] + plain
  for text, ids in zip(texts, peer(texts).input_ids):
    assert ids == tok.encode(text, begins=True), text
    assert peer.decode(ids, skip_special_tokens=True) == text


def written(blocks, rows):
  """Rows of characters of a script, the first ones far more often."""
  rng = random.Random(0)
  offset = lambda: min(int(rng.expovariate(1 / 400)), 2000)
  letter = lambda: chr(rng.choice(blocks) + offset())
  return ["".join(letter() for _ in range(80)) for _ in range(rows)]


CHINESE, KOREAN = written([0x4E00, 0x5E00], 200), written([0xAC00], 200)
SYLLABIC = written([0xAC00, 0xB400, 0xC400], 200)
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d"
SCRIPTS = {
  "chinese": [
    "请问这个问题应该怎么回答？",
    *written([0x4E00, 0x5E00, 0x6E00], 200),
  ],
  "japanese": [
    "日本語の文章、カタカナとひらがな。\n" * 3,
    *written([0x3041, 0x4E00, 0x6000], 200),
  ],
  "korean": [
    "한국어로 답해 주세요. 감사합니다!",
    *(" ".join(re.findall("....", text)) for text in SYLLABIC),
  ],
  "emoji": [
    f"{FAMILY}\U0001f308 \U0001f44d\U0001f3fd",
    *written([0x1F300], 100),
  ],
  "no two alike": ["".join(map(chr, range(0x4E00, 0x4E00 + 5000)))],
  "mixed": [
    f"Question {i}: {zh} -> {ko}"
    for i, (zh, ko) in enumerate(zip(CHINESE, KOREAN))
  ],
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("size", [261, 300, 1024])
def test_more_characters_than_pieces_are_spelt_in_bytes(script, size):
  texts = SCRIPTS[script]
  tok = Tokenizer(train_tokenizer(texts, size))
  assert 259 < tok.vocab_size <= size + 1  # the space always has a piece
  everything = [text for rows in SCRIPTS.values() for text in rows[:20]]
  for text in [*everything, " two  spaces ", "\ttab\nline\r\n", "a\u2581b"]:
    assert tok.decode(tok.encode(text)) == text
  if size == 1024:  # the frequent characters are pieces of their own
    assert len(tok.encode(texts[-1])) < 2.9 * len(texts[-1])


@pytest.mark.parametrize(
  "size, texts",
  [(100, TEXTS), (1000, []), (1000, ["", "\0"]), (1024, ["\n\n"])]
  + [(1024, ["\r\n", ""]), (1024, ["\ud800"])],
)
def test_what_cannot_be_trained_on_is_put_in_our_words(size, texts):
  with pytest.raises(ConfigError, match="config.model.vocab_size") as error:
    train_tokenizer(texts, size)
  assert not re.search(r"\.cc|INTERNAL|pybind|C\+\+", str(error.value))


def test_a_common_space_leaves_the_model_as_it_was():
  """A world's tokenizer has the bytes that plain options give."""
  text = ["the cat sat on the mat, and so did a dog"] * 9
  out = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(text),
    model_writer=out,
    model_type="bpe",
    vocab_size=300,
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    split_digits=True,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=-1,
    hard_vocab_limit=False,
    max_sentence_length=1 << 30,
    num_threads=1,
    minloglevel=2,
    character_coverage=1.0,
  )
  want = spm_pb2.ModelProto.FromString(out.getvalue())
  want.trainer_spec.model_prefix = "jaxalign"
  assert spm_pb2.ModelProto.FromString(train_tokenizer(text, 300)) == want
