"""Tokenizers behind one interface: SentencePiece models and tokenizer.json.

What is in the text never becomes a special token: "<s>" in a record is three
characters. BOS and EOS are ids, and `tokens.py` places them. The ids are those
of `sentencepiece`, or of `transformers` under the same config, except for:

1. Special strings in a text ("<s>", "<|im_end|>"): split as ordinary text,
   where transformers makes the special token of them.
2. A response is tokenised as a continuation: no space is put before it, and
   no token spans the seam between prompt and response. (Not so under a chat
   template, `chat.py`: there a row is one text, as in transformers.)
3. U+2581 in a text: a tokenizer trained here spells it in bytes, so that it
   comes back; sentencepiece and transformers turn it into a space.
4. A model read from tokenizer.model alone: a leading space, runs of spaces
   and NUL, and in unigram models (T5) what is outside the vocabulary, are as
   sentencepiece has them; transformers converts the model and differs there.
5. A tokenizer.json of before transformers 5 that puts a space before a text,
   under the class LlamaTokenizer: it counts as it is; transformers 5 sets that
   space anew, by `legacy` of the config.
"""

import collections
from collections.abc import Iterable, Sequence
import io
import itertools
import json
import re
from typing import Any

from etils import epath
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as spm_pb2
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from jaxalign.core import disk, interrupt
from jaxalign.core.errors import ConfigError
from jaxalign.data import special
from jaxalign.data.fast_tokenizer import FastTokenizer

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6  # piece types
_OURS = "jaxalign"  # in trainer_spec.model_prefix of a model trained here
_BPE = 2
_FIXED = 3 + 256  # controls and bytes, in a tokenizer trained here
_LEAST_COVERAGE = 0.98  # fraction of characters that SentencePiece insists on
_KNOB = "set config.model.tokenizer"


class SentencePieceTokenizer(special.Encoding):
  """A SentencePiece model; its attributes are those of `special.Encoding`."""

  strips, prefixes_each = {}, False

  def __init__(
    self,
    proto: bytes,
    name: str = "tokenizer",
    settings: special.Settings = special.EMPTY,
  ):
    self.proto, self._settings = bytes(proto), settings
    self.files = dict(settings.files)
    if self.proto not in self.files.values():
      self.files["tokenizer.model"] = self.proto
    self._model = spm_pb2.ModelProto()
    try:
      self._model.ParseFromString(self.proto)
      if not self._model.pieces:
        raise ValueError("it has no pieces")
      self._main = spm.SentencePieceProcessor(model_proto=self.proto)
    except Exception as error:  # protobuf's and the C++ library's own kinds
      raise ConfigError(
        f"{name} is not a SentencePiece model ({error!s:.100}); a "
        f"tokenizer.json in its folder would do; {_KNOB}"
      ) from error
    normal = self._model.normalizer_spec
    self.adds_prefix = bool(normal.add_dummy_prefix)
    # The same pieces without the space that some models put before a text: a
    # response continues a prompt, and its own leading space is all it needs.
    self._bare = self._main
    if self.adds_prefix and not normal.remove_extra_whitespaces:
      twin = spm_pb2.ModelProto()
      twin.CopyFrom(self._model)
      twin.normalizer_spec.add_dummy_prefix = False
      twin = twin.SerializeToString()
      self._bare = spm.SentencePieceProcessor(model_proto=twin)
    pieces = enumerate(self._model.pieces)
    byte_ids = {p.piece: i for i, p in pieces if p.type == _BYTE}
    self._has_bytes, self._space_ids = bool(byte_ids), []
    # Only in a model of ours: others must mean what their makers meant.
    if byte_ids and self._model.trainer_spec.model_prefix == _OURS:
      self._space_ids = [byte_ids[f"<0x{b:02X}>"] for b in _SPACE.encode()]
    self._set_controls(name)

  def _set_controls(self, name: str) -> None:
    """Sets the ids of the special tokens, from the model and its config."""
    settings, main = self._settings, self._main
    size, self.specials = main.vocab_size(), {}
    for i, p in enumerate(self._model.pieces):
      named = p.type == _USER and p.piece in settings.special
      if p.type in (_UNKNOWN, _CONTROL) or named:
        self.specials[p.piece] = i
    for text, (i, is_special) in settings.added.items():
      if i is not None and 0 <= i < size + 4096 and (i >= size or is_special):
        self.specials[text] = i
    self.added = self.specials
    self.vocab_size = max([size, *(i + 1 for i in self.specials.values())])
    own = dict(bos=main.bos_id(), eos=main.eos_id(), pad=main.pad_id())
    named = {kind: self.specials.get(settings.named[kind]) for kind in own}
    ids = {k: i if named[k] is None else named[k] for k, i in own.items()}
    self.unk, self.own_bos = main.unk_id(), ids["bos"]
    self.pad = self.unk if ids["pad"] < 0 else ids["pad"]
    bos = -1 if settings.adds_bos is False else self.own_bos
    self._set_ends(name, bos, [named["eos"], own["eos"]])
    text_of, ids["unk"] = {i: x for x, i in self.specials.items()}, self.unk
    known = {kind: i for kind, i in ids.items() if i in text_of}
    self.names = {f"{kind}_token": text_of[i] for kind, i in known.items()}

  def reserve(self, texts: Sequence[str]) -> None:
    """Nothing: all tokens that are not of the model itself are special."""

  def encode_rendered(self, text: str) -> list[int]:
    """Ids of a template's own text: here specials are what they look like."""
    names = sorted(self.specials, key=len, reverse=True)
    ids, model = [], self._main
    for part in re.split(f"({'|'.join(map(re.escape, names))})", text):
      if part in self.specials:
        ids.append(self.specials[part])
      elif part:
        ids += self._ids([part], model)[0]
      model = self._bare if ids else model
    return ids

  def _encoded(self, texts: list[str], model: Any) -> list[list[int]]:
    return model.encode(texts) if texts else []

  def _ids(self, texts: list[str], model: Any) -> list[list[int]]:
    out = super()._ids(texts, model)
    for i, text in enumerate(texts if self._space_ids else ()):
      if _SPACE in text:  # else it came back as a space
        first, *rest = text.split(_SPACE)
        [out[i]] = self._encoded([first], model)
        for ids in self._encoded(rest, self._bare):
          out[i] += self._space_ids + ids
    return out

  def _decoded(self, ids: list[int], model: Any) -> str:
    skipped = set(self.specials.values()) - {self.unk}
    return model.decode([i for i in ids if i not in skipped])

  def pieces(self) -> list[str]:
    """The V pieces by id, as SentencePiece writes them."""
    pieces = [piece.piece for piece in self._model.pieces]
    pieces += [""] * (self.vocab_size - len(pieces))
    for text, i in self.specials.items():
      pieces[i] = text
    return pieces

  def check_export(self) -> None:
    """Raises ConfigError where `export` has no way to write this model."""
    if "tokenizer_config.json" in self._settings.files:
      return  # transformers reads its own files
    is_bpe = self._model.trainer_spec.model_type == _BPE
    same_text = self._model.normalizer_spec.name == "identity"
    if not (is_bpe and self._has_bytes and self.own_bos >= 0 and same_text):
      raise ConfigError(
        "only BPE tokenizers with byte fallback, a BOS and no normalisation "
        f"can be exported; {_KNOB}"
      )

  def export(self, folder: epath.PathLike) -> None:
    """Writes tokenizer.model and the files that `transformers` reads.

    A folder that came with a tokenizer_config.json is copied byte for byte.
    Hugging Face tokenizers look for "<s>" in the text itself and know no way
    to write U+2581; there, and only there, their ids differ from ours.

    Raises:
      ConfigError: no byte-fallback BPE model; nothing was written.
      WriteError: the folder cannot be written.
    """
    self.check_export()
    if "tokenizer_config.json" in self._settings.files:
      return self.save(folder)
    pieces = self.pieces()
    ids = dict(bos=self.own_bos, eos=self.eos, unk=self.unk, pad=self.pad)
    names = {f"{kind}_token": pieces[i] for kind, i in ids.items()}
    config = dict(
      names,
      tokenizer_class="PreTrainedTokenizerFast",
      add_bos_token=True,
      add_eos_token=False,
      clean_up_tokenization_spaces=False,
      model_input_names=["input_ids", "attention_mask"],
    )
    files = {
      "tokenizer.json": self._hugging_face().to_str(pretty=True),
      "tokenizer_config.json": json.dumps(config, indent=1),
      "special_tokens_map.json": json.dumps(names, indent=1),
    }
    if self.template:
      files["chat_template.jinja"] = self.template
    folder = epath.Path(folder)
    disk.write_bytes(folder / "tokenizer.model", self.proto)
    for name, text in files.items():
      disk.write_bytes(folder / name, text.encode())

  def _hugging_face(self) -> tokenizers.Tokenizer:
    """The model as the `tokenizers` library has it."""
    # SentencePiece joins the neighbours whose union scores best; a Hugging Face
    # model ranks pairs instead, so every way to cut a piece in two known pieces
    # becomes a merge, ranked by the piece's score.
    pieces, merges = self._model.pieces, []
    vocab = {p.piece: i for i, p in enumerate(pieces)}
    usual = [p.piece for p in pieces if p.type in (_NORMAL, _USER)]
    known = {piece: vocab[piece] for piece in usual}
    rank = lambda piece: (-pieces[known[piece]].score, known[piece])
    for piece in sorted(known, key=rank):
      ways = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
      ways = [(a, b) for a, b in ways if a in known and b in known]
      merges += sorted(ways, key=lambda way: (known[way[0]], known[way[1]]))
    bos, unk = pieces[self.own_bos].piece, pieces[self.unk].piece
    options = dict(unk_token=unk, fuse_unk=True, byte_fallback=True)
    fast = tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
    prefix = [normalizers.Prepend(_SPACE)] * self.adds_prefix
    space = normalizers.Replace(" ", _SPACE)
    fast.normalizer = normalizers.Sequence([*prefix, space])
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback()]
    strip = [decoders.Strip(" ", 1, 0)] * self.adds_prefix
    fast.decoder = decoders.Sequence([*back, decoders.Fuse(), *strip])
    fast.post_processor = processors.TemplateProcessing(
      single=[bos, "$A"],
      pair=[bos, "$A", f"{bos}:1", "$B:1"],
      special_tokens=[(bos, self.own_bos)],
    )
    controls = sorted({self.unk, self.own_bos, self.eos, self.pad})
    texts = [pieces[i].piece for i in controls]
    fast.add_special_tokens(
      [tokenizers.AddedToken(x, special=True, normalized=False) for x in texts]
    )
    return fast


Tokenizer = SentencePieceTokenizer  # what is trained here


def load_tokenizer(
  path: epath.PathLike,
) -> SentencePieceTokenizer | FastTokenizer:
  """The tokenizer of a file or folder.

  A tokenizer.json goes first: it is what transformers reads wherever there is
  one, and only it has the tokens added since (the turn markers of a chat
  model). A tokenizer.model alone is SentencePiece; the one of Llama 3 is not,
  and says so.

  Args:
    path: a folder, or one of its files; the configs of the folder are read too.

  Raises:
    ConfigError: there is none, or it cannot be read.
  """
  path = epath.Path(path)
  try:
    folder, names = path.parent, [path.name]
    if path.is_dir():
      folder = path
      names = [name for name in special.FILES[:4] if (path / name).exists()]
    elif not path.exists():
      raise OSError("it is missing")
    if not names:
      there = ", ".join(sorted(p.name for p in folder.iterdir())[:12])
      raise ConfigError(
        f"{folder} has no tokenizer, wanted tokenizer.json or tokenizer.model; "
        f"it has {there or 'no files'}; {_KNOB}"
      )
    file, settings = folder / names[0], special.read_settings(folder)
    if file.name == "tokenizer.json":
      return FastTokenizer(settings, f"tokenizer {file}")
    if file.suffix == ".json":
      raise ConfigError(
        f"{path} is no tokenizer, wanted tokenizer.json or a SentencePiece "
        f"model; {_KNOB}"
      )
    proto = file.read_bytes()
  except OSError as error:
    raise ConfigError(
      f"tokenizer {path} cannot be read ({error}); {_KNOB}"
    ) from error
  return SentencePieceTokenizer(proto, f"tokenizer {file}", settings)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
  """A byte-fallback BPE model of `texts`, as the bytes of tokenizer.model.

  Nothing is normalised, so decode(encode(x)) == x for every x, newlines
  included; nothing is drawn: the same bytes every time. A word of a small
  closed vocabulary becomes one piece once `vocab_size` allows; a corpus too
  small for `vocab_size` yields fewer pieces.

  Args:
    texts: the corpus; read once.
    vocab_size: pieces wanted, the 3 controls and 256 bytes included. At most
      half of the rest goes to single characters; rarer ones are spelt in bytes.

  Raises:
    ConfigError: the vocabulary cannot hold the controls and bytes, or there
      is no text.
  """
  # NUL ends a C string; it stays encodable through its byte piece.
  texts = [text.replace("\0", "") for text in texts]
  has_text = any(text.strip("\r\n") for text in texts)
  counts = collections.Counter(itertools.chain(*texts) if has_text else ())
  room = (vocab_size - _FIXED) // 2
  if room < 1 or not counts:
    raise ConfigError(
      f"no tokenizer of {vocab_size} pieces from {len(texts)} texts of "
      f"{len(counts)} characters, wanted some text and {_FIXED + 2} pieces or "
      "more; set config.model.vocab_size"
    )
  coverage, least = 1.0, 1
  if len(counts) > room:
    common = counts.most_common(room)
    least = common[-1][1] + 1  # of those as rare as the last some are left out
    coverage = (sum(n for _, n in common) - 0.5) / counts.total()
    if coverage < _LEAST_COVERAGE:  # thousands of Chinese characters, emoji
      rare = counts.keys() - dict(common)
      texts, coverage = _cut_at(rare, texts), 1.0
  # A rare space, spelt in bytes, would come back as U+2581.
  options = dict(required_chars=_SPACE) if counts[" "] < least else {}
  out = io.BytesIO()
  try:
    spm.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=out,
      model_type="bpe",
      vocab_size=vocab_size,
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
      character_coverage=coverage,
      max_sentence_length=1 << 30,
      num_threads=1,
      minloglevel=2,
      **options,
    )
  except Exception as error:  # the C++ library's, in words of its own
    interrupt.check()  # or a signal's, swallowed by a callback
    raise ConfigError(
      f"no tokenizer of {vocab_size} pieces could be trained on "
      f"{counts.total():,} characters ({len(counts):,} different ones); set "
      "config.model.vocab_size, or give a tokenizer as config.model.tokenizer"
    ) from error
  proto = spm_pb2.ModelProto.FromString(out.getvalue())
  proto.trainer_spec.model_prefix = _OURS
  return proto.SerializeToString(deterministic=True)


def _cut_at(rare: Iterable[str], texts: list[str]) -> list[str]:
  """The texts cut at every rare character; SentencePiece drops at most 2 %."""
  cut = str.maketrans(dict.fromkeys(rare, "\0"))
  parts = [part for text in texts for part in text.translate(cut).split("\0")]
  return [part for part in parts if part]
