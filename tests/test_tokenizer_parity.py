"""The ids of sentencepiece and transformers, and where they are not."""

import functools
import gzip
import json
import random
import re
import shutil

import pytest
import sentencepiece as spm
from test_chat import write_folder
from test_tokenizer import HARD

from jaxalign.core.errors import ConfigError
from jaxalign.data import special
from jaxalign.data.chat import Chat
from jaxalign.data.chat_templates import BUILT_IN
from jaxalign.data.fast_tokenizer import FastTokenizer
from jaxalign.data.tokenizer import (
  load_tokenizer,
  SentencePieceTokenizer,
  train_tokenizer,
)

MODELS = {
  "stories": "models/stories260K/tokenizer.model",
  "mistral": "tokenizers/mistral-v1/tokenizer.model",
  "t5": "tokenizers/t5/sentencepiece.model",
}
BLOCKS = [(0x20, 0x7E), (0, 0x1F), (0x7F, 0xA0), (0x300, 0x36F), (0x590, 0x6FF)]
BLOCKS += [(0x4E00, 0x4F00), (0x1F300, 0x1FAFF), (0x2000, 0x206F)]
BLOCKS += [(0xFE00, 0xFE0F), (0xE000, 0xE010), (0x1E900, 0x1E95F)]
BLOCKS += [(0xA0, 0x2FFF), (0x20000, 0x20100)]


@pytest.fixture
def transformers():
  return pytest.importorskip("transformers")


def write_json(path, **value):
  path.write_text(json.dumps(value))


def fuzzed(n, specials=()):
  rng, out = random.Random(0), []
  while len(out) < n:
    size = rng.randint(0, 24)
    text = "".join(chr(rng.randint(*rng.choice(BLOCKS))) for _ in range(size))
    if not any(s in text for s in specials):
      out.append(text)
  return out


def strings(value):
  if isinstance(value, str):
    return {value}
  inner = value.values() if isinstance(value, dict) else value
  inner = inner if isinstance(value, (dict, list)) else ()
  return set().union(*map(strings, inner))


@functools.lru_cache
def real_texts(data):
  """Every string of every record, once."""
  texts = set()
  for path in sorted(data.rglob("*.json*")):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
      whole = path.name.endswith(".json")
      rows = json.load(file) if whole else list(map(json.loads, file))
    texts |= strings(rows)
  return sorted(texts)


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece(shared, name):
  tok = load_tokenizer(shared / MODELS[name])
  peer = spm.SentencePieceProcessor(model_file=str(shared / MODELS[name]))
  hard = [t for t in HARD if not any(s in t for s in tok.specials)]
  texts = real_texts(shared / "data") + hard + fuzzed(10_000, tok.specials)
  assert len(texts) > 26_000
  assert tok.encode_many(texts) == peer.encode(texts)


def hugging_face(folder, source, name):
  """The model as transformers itself writes it: a tokenizer.json."""
  transformers = pytest.importorskip("transformers")
  kind, file, is_t5 = "Llama", "tokenizer.model", name == "t5"
  if is_t5:
    kind, file = "T5", "spiece.model"
  folder.mkdir()
  shutil.copy(source, folder / file)
  settings = dict(tokenizer_class=f"{kind}Tokenizer")
  write_json(folder / "tokenizer_config.json", **settings)
  write_json(folder / "config.json", model_type=kind.lower())
  peer = transformers.AutoTokenizer.from_pretrained(folder)
  peer.save_pretrained(folder / "json")
  if is_t5:  # its class ignores the file, and takes <s> for <unk>
    path = folder / "json" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, **settings)
    path = folder / "json" / "tokenizer.json"
    spec = json.loads(path.read_text())
    pieces = [piece for piece, _ in spec["model"]["vocab"]]
    spec["model"]["unk_id"] = pieces.index("<unk>")
    write_json(path, **spec)
  return folder / "json"


@pytest.mark.parametrize("name", [*MODELS, "bytes"])
def test_ids_are_those_of_transformers(tmp_path, shared, transformers, name):
  """Under one tokenizer.json and config; special strings stay apart."""
  if name == "bytes":
    folder = write_folder(tmp_path / "a", add_bos_token=True)
  else:
    folder = hugging_face(tmp_path / "a", shared / MODELS[name], name)
  tok = load_tokenizer(folder)
  assert isinstance(tok, FastTokenizer)
  peer = transformers.AutoTokenizer.from_pretrained(folder)
  texts = real_texts(shared / "data")[::24] + HARD
  texts = [t for t in texts if not any(s in t for s in tok.specials)]
  texts += fuzzed(2_000, tok.specials)
  plain = peer(texts, add_special_tokens=False).input_ids
  assert tok.encode_many(texts) == plain
  for text, ids in zip(texts[:50], peer(texts[:50]).input_ids):
    ids = ids[:-1] if name == "t5" else ids
    assert ids == tok.encode(text, begins=True)
  for text in texts[:200]:
    ids = tok.encode(text)
    assert tok.decode(ids) == peer.decode(ids, skip_special_tokens=True)
  assert tok.vocab_size == len(peer) and tok.eos == peer.eos_token_id
  assert tok.bos == (tok.encode("", True)[0] if name == "bytes" else -1)


# The classes of difference that tokenizer.py lists.


def test_difference_1_special_strings(tmp_path, transformers):
  folder = write_folder(tmp_path / "a")
  tok = load_tokenizer(folder)
  peer = transformers.AutoTokenizer.from_pretrained(folder)
  text = "Hello <|im_end|>"
  assert tok.specials["<|im_end|>"] in peer(text).input_ids
  assert tok.encode(text) == peer(text, split_special_tokens=True).input_ids
  assert tok.decode(tok.encode(text)) == text


def test_difference_2_a_response_continues(tmp_path, shared):
  source = shared / MODELS["mistral"]
  folder = hugging_face(tmp_path / "a", source, "mistral")
  for tok in (load_tokenizer(folder), load_tokenizer(source)):
    assert tok.adds_prefix
    tail = tok.encode_response(" Hello")
    assert tok.encode("Hello") == tail != tok.encode_response("Hello")
    assert tok.decode_response(tail) == " Hello"
    assert tok.encode("Hi: Hello") == tok.encode("Hi:") + tail
  # The seam: "He" + "llo" is no "Hello".
  assert tok.encode("He") + tok.encode_response("llo") != tok.encode("Hello")


def test_difference_3_the_letter_that_stands_for_a_space(shared):
  ours = SentencePieceTokenizer(train_tokenizer(["a b c"] * 9, 300))
  assert ours.decode(ours.encode("a\u2581b")) == "a\u2581b"
  theirs = load_tokenizer(shared / MODELS["mistral"])
  assert theirs.decode(theirs.encode("a\u2581b")) == "a b"


def test_difference_4_a_model_without_its_json(tmp_path, shared, transformers):
  """transformers' conversion is not quite the model it converts."""
  hugging_face(tmp_path / "a", shared / MODELS["stories"], "stories")
  peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
  theirs = lambda texts: peer(texts, add_special_tokens=False).input_ids
  tok = load_tokenizer(tmp_path / "a")
  assert isinstance(tok, SentencePieceTokenizer)
  assert len(tok.encode(" a")) == len(theirs(" a")) + 1
  texts = real_texts(shared / "data")[::40]
  texts = [t for t in texts if t[:1] != " " and "  " not in t and "<" not in t]
  assert tok.encode_many(texts) == theirs(texts)


def test_a_template_decides_on_the_bos(tmp_path, transformers):
  """None where it writes none, though the tokenizer begins texts with one."""
  folder = write_folder(tmp_path / "a", BUILT_IN["chatml"], add_bos_token=True)
  tok = load_tokenizer(folder)
  peer = transformers.AutoTokenizer.from_pretrained(folder)
  ask = [dict(role="user", content="Hi")]
  assert tok.bos >= 0
  with Chat(tok, tok.template) as chat:
    head, _ = chat.encode(ask, ["So"])
    assert tok.bos == -1
  options = dict(add_generation_prompt=True, return_dict=False)
  assert peer.apply_chat_template(ask, **options) == head
  with Chat(tok, "{{ bos_token }}" + tok.template) as chat:
    assert tok.bos == tok.own_bos and chat.encode(ask, ["So"])[0] == head
  # Of some conversations only: then it is a token like any other.
  some = "{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}"
  with Chat(tok, some + tok.template) as chat:
    assert tok.bos == -1
    ask = [dict(role="system", content="Be"), *ask]
    assert chat.encode(ask, ["So"])[0][0] == tok.own_bos


def test_a_trained_tokenizer_is_exported_with_a_template(
  tmp_path, transformers
):
  """The template writes no BOS; as text the tokenizer still begins with one."""
  tok = SentencePieceTokenizer(train_tokenizer(["a b c d"] * 9, 300))
  with Chat(tok, BUILT_IN["zephyr"]):
    assert tok.bos == -1
    tok.export(tmp_path)
  write_json(tmp_path / "config.json", model_type="llama")
  peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert peer("a b").input_ids == [tok.own_bos, *tok.encode("a b")]


def test_special_tokens_in_texts_are_found(tmp_path, shared):
  for folder, a, b in (
    (write_folder(tmp_path / "a"), "<|im_end|>", "<|end|>"),
    (shared / "tokenizers/mistral-v1", "</s>", "<unk>"),
  ):
    tok = load_tokenizer(folder)
    assert tok.specials_in(f"x {b}y{a} {b}") == [b, a]
    assert tok.specials_in("<|x|> <s a <| </ s>") == tok.specials_in("") == []
  tok = load_tokenizer(tmp_path / "a")
  assert tok.specials_in("<think>") == []
  tok.reserve(["<think>"])
  assert tok.specials_in("<think>") == ["<think>"]


def test_any_of_many_texts_is_the_longest():
  rng = random.Random(0)
  word = lambda most: "".join(rng.choices("ab<|.", k=rng.randint(1, most)))
  assert not re.search(special.any_of([]), "a") and special.any_of(["a"]) == "a"
  assert re.fullmatch(special.any_of(["x" * 5000, "xy"]), "x" * 5000)
  for _ in range(300):
    texts = [word(4) for _ in range(rng.randint(1, 9))]
    plain = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    text = word(30)
    assert re.findall(special.any_of(texts), text) == re.findall(plain, text)


@pytest.mark.parametrize("name", ["stories", "mistral", "bytes"])
def test_a_row_is_shown_with_its_special_tokens(tmp_path, shared, name):
  own = name == "bytes"
  folder = write_folder(tmp_path / "a") if own else shared / MODELS[name]
  tok = load_tokenizer(folder)
  names = {i: text for text, i in tok.specials.items()}
  bos, end = [tok.own_bos] * (tok.own_bos >= 0), names[tok.eos]
  for text in ("Hi: there ", "é 七\U0001f469\u200d\U0001f4bb", "a\n\n b"):
    ids = [*tok.encode(text), tok.eos, *tok.encode_response(" b"), tok.eos]
    want = f"{text}{end} b{end}"
    assert tok.decode_visible(ids) == want
    assert tok.decode_visible(bos + ids) == "".join(map(names.get, bos)) + want
    assert tok.decode_visible(ids[:3]) == tok.decode(ids[:3])
  assert tok.decode_visible([]) == ""


# What a folder says.


def test_a_folder_without_a_tokenizer(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ConfigError, match="no tokenizer.*config.json"):
    load_tokenizer(tmp_path)
  for name in ("nowhere", "config.json"):
    with pytest.raises(ConfigError, match="config.model.tokenizer"):
      load_tokenizer(tmp_path / name)
  # Llama 3's own tokenizer.model: base64 and ranks.
  (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n" * 99)
  with pytest.raises(ConfigError, match="no.* SentencePiece|tokenizer.json"):
    load_tokenizer(tmp_path)


EMPTY = (
  b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'
)


@pytest.mark.parametrize(
  "data",
  [b"", b"{", b"[]", b"{}", b'{"model": 3}', b"\xff\xfe", b"[" * 99999, EMPTY],
)
def test_a_broken_tokenizer_json(tmp_path, data):
  (tmp_path / "tokenizer.json").write_bytes(data)
  with pytest.raises(ConfigError, match="config.model.tokenizer"):
    load_tokenizer(tmp_path)


def test_a_tokenizer_json_goes_first_and_comes_back_whole(tmp_path, shared):
  folder, out = write_folder(tmp_path / "a", "TEMPLATE"), tmp_path / "out"
  shutil.copy(shared / MODELS["mistral"], folder / "tokenizer.model")
  (folder / "notes.txt").write_text("not the tokenizer's")
  tok = load_tokenizer(folder)
  assert isinstance(tok, FastTokenizer) and tok.template == "TEMPLATE"
  assert load_tokenizer(folder / "tokenizer.json").files == tok.files
  tok.check_export()
  tok.export(out)
  names = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
  assert sorted(p.name for p in out.iterdir()) == names
  for name in names:
    assert (out / name).read_bytes() == (folder / name).read_bytes()
  assert load_tokenizer(out).files == tok.files
  assert tok.pieces()[tok.eos] == "<|end|>"


def test_what_ends_and_begins_a_row(tmp_path):
  folder = write_folder(tmp_path / "a", pad_token="<|im_start|>")
  tok = load_tokenizer(folder)
  ids = tok.specials
  end, turn = ids["<|end|>"], ids["<|eot_id|>"]
  assert tok.bos == -1 and tok.eos == end == tok.stops[0]
  assert tok.pad == ids["<|im_start|>"] and tok.own_bos == ids["<|begin|>"]
  write_json(folder / "generation_config.json", eos_token_id=[end, turn])
  assert load_tokenizer(folder).stops == (end, turn)
  write_folder(folder, eos_token=dict(content="<|eot_id|>"), add_bos_token=True)
  tok = load_tokenizer(folder)
  assert (tok.bos, tok.eos) == (ids["<|begin|>"], turn)
  assert tok.pad == tok.eos  # none is named
  write_folder(folder, eos_token=None)
  write_json(folder / "special_tokens_map.json", eos_token="<|im_end|>")
  assert load_tokenizer(folder).eos == ids["<|im_end|>"]
  write_folder(folder, eos_token="<|absent|>")
  (folder / "generation_config.json").unlink()
  with pytest.raises(ConfigError, match="EOS"):
    load_tokenizer(folder)


def test_tokens_added_by_the_config(tmp_path, shared):
  """To a tokenizer.model, and to a tokenizer.json that lacks them."""
  token = dict(content="<|turn|>", special=True)
  for name in ("model", "json"):
    folder, size = tmp_path / name, 32_000
    if name == "json":
      size = load_tokenizer(write_folder(folder)).vocab_size
    else:
      folder.mkdir()
      shutil.copy(shared / MODELS["mistral"], folder / "tokenizer.model")
    config = dict(eos_token="<|turn|>", added_tokens_decoder={str(size): token})
    write_json(folder / "tokenizer_config.json", **config)
    tok = load_tokenizer(folder)
    assert tok.eos == size == tok.specials["<|turn|>"]
    assert tok.vocab_size == size + 1 == len(tok.pieces())
    assert size not in tok.encode("a <|turn|>")
    assert tok.encode_rendered("a<|turn|>")[-1] == size
    assert tok.decode([*tok.encode("a"), size]) == "a"
    assert tok.decode_response([*tok.encode_response(" a"), size]) == " a"
    tok.export(tmp_path / f"{name}-out")
    assert load_tokenizer(tmp_path / f"{name}-out").eos == size
  config["added_tokens_decoder"] = {str(size + 5): token}
  write_json(folder / "tokenizer_config.json", **config)
  with pytest.raises(ConfigError, match="gives '<|turn|>' the id"):
    load_tokenizer(folder)


@pytest.mark.parametrize("where", ["jinja", "json", "config", "list"])
def test_where_a_chat_template_may_stand(tmp_path, where):
  named = dict(tool_use="U", default="T").items()
  several = [dict(name=name, template=text) for name, text in named]
  own = dict(config="T", list=several).get(where)
  folder = write_folder(tmp_path / "a", own)
  if where == "jinja":
    (folder / "chat_template.jinja").write_text("T")
  if where == "json":
    write_json(folder / "chat_template.json", chat_template="T")
  assert load_tokenizer(folder).template == "T"


def test_a_word_of_the_model_that_is_special_is_cut(tmp_path):
  """Where "<s>" is in the vocabulary itself, text still cannot write it."""
  flags = dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
  )
  vocab = {"a": 0, "<s>": 1, "<": 2, "s>": 3, "?": 4}
  write_json(
    tmp_path / "tokenizer.json",
    version="1.0",
    added_tokens=[dict(flags, id=1, content="<s>", special=True)],
    normalizer=None,
    pre_tokenizer=dict(type="WhitespaceSplit"),
    post_processor=None,
    decoder=None,
    model=dict(type="WordLevel", unk_token="?", vocab=vocab),
  )
  write_json(tmp_path / "tokenizer_config.json", eos_token="<s>")
  tok = load_tokenizer(tmp_path)
  assert tok.encode("a <s> a") == [0, 2, 3, 0]
  assert tok.encode_rendered("a <s> a") == [0, 1, 0]
