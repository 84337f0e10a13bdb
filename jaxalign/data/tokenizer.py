"""SentencePiece tokenizers: trained or loaded, lossless, exported for peers.

What is in the text never becomes a control token: "<s>" in a record is three
characters. BOS and EOS are ids, and `tokens.py` places them.
"""

import collections
import hashlib
import io
import itertools
import json
from typing import Any, Iterable, Sequence

import sentencepiece as spm
from etils import epath
from sentencepiece import sentencepiece_model_pb2 as spm_pb2

from jaxalign import artifacts
from jaxalign.errors import ConfigError

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_NORMAL, _USER, _BYTE = 1, 4, 6  # piece types
_BPE = 2
_FIXED = 3 + 256  # controls and bytes, in a tokenizer trained here
_KNOB = "set config.model.tokenizer"


class Tokenizer:
  """A SentencePiece model: `encode`, `decode`, and the ids of its controls.

  Attributes:
    eos: id. bos: id, or -1 if the model has none (then rows carry none).
    pad: the model's own, else `unk`; no mask depends on it.
    vocab_size: V. digest: sha256 of the model's bytes.
  """

  def __init__(self, proto: bytes, name: str = "tokenizer"):
    self.proto = bytes(proto)
    self._model = spm_pb2.ModelProto()
    try:
      self._model.ParseFromString(self.proto)
      if not self._model.pieces:
        raise ValueError("it has no pieces")
      self._main = spm.SentencePieceProcessor(model_proto=self.proto)
    except Exception as error:  # protobuf's and the C++ library's own kinds
      raise ConfigError(f"{name} is not a SentencePiece model "
                        f"({error!s:.100}); {_KNOB}") from error
    normal = self._model.normalizer_spec
    self.adds_prefix = bool(normal.add_dummy_prefix)
    # The same pieces without the space that some models put before a text: a
    # response continues a prompt, and its own leading space is all it needs.
    self._bare = self._main
    if self.adds_prefix and not normal.remove_extra_whitespaces:
      twin = spm_pb2.ModelProto()
      twin.CopyFrom(self._model)
      twin.normalizer_spec.add_dummy_prefix = False
      self._bare = spm.SentencePieceProcessor(
          model_proto=twin.SerializeToString())
    byte_ids = {piece.piece: i for i, piece in enumerate(self._model.pieces)
                if piece.type == _BYTE}
    self._space_ids = [byte_ids[f"<0x{byte:02X}>"] for byte in _SPACE.encode()
                       ] if byte_ids else []
    self.vocab_size = self._main.vocab_size()
    self.bos, self.eos = self._main.bos_id(), self._main.eos_id()
    self.unk = self._main.unk_id()
    if self.eos < 0:
      raise ConfigError(f"{name} has no EOS token, and every whole response "
                        f"ends in one; {_KNOB}")
    own_pad = self._main.pad_id()
    self.pad = own_pad if own_pad >= 0 else self.unk
    self.digest = hashlib.sha256(self.proto).hexdigest()

  @classmethod
  def load(cls, path: epath.PathLike) -> "Tokenizer":
    """Reads a tokenizer.model file, or the one in a folder.

    Raises:
      ConfigError: missing, or not a SentencePiece model.
    """
    path = epath.Path(path)
    try:
      if path.is_dir():
        path = path / "tokenizer.model"
      proto = path.read_bytes()
    except OSError as error:
      raise ConfigError(f"tokenizer {path} cannot be read ({error}); {_KNOB}"
                        ) from error
    return cls(proto, f"tokenizer {path}")

  @classmethod
  def from_bytes(cls, proto: bytes) -> "Tokenizer":
    """From the bytes of a tokenizer.model file."""
    return cls(proto)

  def encode(self, text: str, begins: bool = False) -> list[int]:
    """Ids of `text`, with BOS in front if it `begins` a row; never an EOS."""
    head = [self.bos] if begins and self.bos >= 0 else []
    return head + self.encode_many([text])[0]

  def encode_response(self, text: str) -> list[int]:
    """Ids of a text that continues another: no space is put before it."""
    return self.encode_responses([text])[0]

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, on all cores."""
    return self._ids(texts, self._main)

  def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode_response` of each text, on all cores."""
    return self._ids(texts, self._bare)

  def _ids(self, texts: Sequence[str], model: Any) -> list[list[int]]:
    texts = list(texts)
    ids = model.encode(texts) if texts else []
    if self._space_ids:
      for i, text in enumerate(texts):
        if _SPACE in text:  # else it would come back as a space
          first, *rest = text.split(_SPACE)
          ids[i] = model.encode(first)
          for part in rest:
            ids[i] += self._space_ids + self._bare.encode(part)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Text of a row, or of its beginning; control tokens have no text."""
    return self._main.decode([int(i) for i in ids])

  def decode_response(self, ids: Iterable[int]) -> str:
    """Text of a response alone, its leading space kept."""
    return self._bare.decode([int(i) for i in ids])

  def pieces(self) -> list[str]:
    """The V pieces by id, as SentencePiece writes them."""
    return [piece.piece for piece in self._model.pieces]

  def check_export(self) -> None:
    """Raises ConfigError where `export` has no way to write this model."""
    spec = self._model.trainer_spec
    if (spec.model_type != _BPE or not self._space_ids or self.bos < 0 or
        self._model.normalizer_spec.name != "identity"):
      raise ConfigError("only BPE tokenizers with byte fallback, a BOS and no "
                        f"normalisation can be exported; {_KNOB}")

  def export(self, folder: epath.PathLike) -> None:
    """Writes tokenizer.model and what `transformers` reads beside it.

    Hugging Face tokenizers look for "<s>" in the text itself and know no way
    to write U+2581; there, and only there, their ids differ from ours.

    Raises:
      ConfigError: no byte-fallback BPE model; nothing was written.
      WriteError: the folder cannot be written.
    """
    self.check_export()
    pieces = self.pieces()
    names = dict(bos_token=pieces[self.bos], eos_token=pieces[self.eos],
                 unk_token=pieces[self.unk], pad_token=pieces[self.pad])
    settings = dict(
        names, tokenizer_class="PreTrainedTokenizerFast", add_bos_token=True,
        add_eos_token=False, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"])
    folder = epath.Path(folder)
    artifacts.write_bytes(folder / "tokenizer.model", self.proto)
    for name, value in (("tokenizer", self._hugging_face()),
                        ("tokenizer_config", settings),
                        ("special_tokens_map", names)):
      text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
      artifacts.write_bytes(folder / f"{name}.json", text.encode())

  def _hugging_face(self) -> dict[str, Any]:
    """The model as the `tokenizers` library writes it.

    SentencePiece joins the neighbours whose union scores best; a Hugging Face
    model ranks pairs instead, so every way to cut a piece in two known pieces
    becomes a merge, ranked by the piece's score.
    """
    pieces = self._model.pieces
    text = {p.piece: i for i, p in enumerate(pieces)
            if p.type in (_NORMAL, _USER)}
    merges = []
    for piece, i in sorted(text.items(),
                           key=lambda item: (-pieces[item[1]].score, item[1])):
      ways = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
      merges += sorted(([a, b] for a, b in ways if a in text and b in text),
                       key=lambda way: (text[way[0]], text[way[1]]))
    bos = pieces[self.bos].piece
    prefix = [dict(type="Prepend", prepend=_SPACE)] * self.adds_prefix
    strip = [dict(type="Strip", content=" ", start=1, stop=0)]
    space = dict(type="Replace", pattern=dict(String=" "), content=_SPACE)
    back = dict(type="Replace", pattern=dict(String=_SPACE), content=" ")
    controls = sorted({self.unk, self.bos, self.eos, self.pad})
    return dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[dict(id=i, content=pieces[i].piece, single_word=False,
                           lstrip=False, rstrip=False, normalized=False,
                           special=True) for i in controls],
        normalizer=dict(type="Sequence", normalizers=[*prefix, space]),
        pre_tokenizer=None,
        post_processor=dict(
            type="TemplateProcessing",
            single=[dict(SpecialToken=dict(id=bos, type_id=0)),
                    dict(Sequence=dict(id="A", type_id=0))],
            pair=[dict(SpecialToken=dict(id=bos, type_id=0)),
                  dict(Sequence=dict(id="A", type_id=0)),
                  dict(SpecialToken=dict(id=bos, type_id=1)),
                  dict(Sequence=dict(id="B", type_id=1))],
            special_tokens={bos: dict(id=bos, ids=[self.bos], tokens=[bos])}),
        decoder=dict(type="Sequence", decoders=[
            back, dict(type="ByteFallback"), dict(type="Fuse"),
            *(strip * self.adds_prefix)]),
        model=dict(type="BPE", dropout=None, unk_token=pieces[self.unk].piece,
                   continuing_subword_prefix=None, end_of_word_suffix=None,
                   fuse_unk=True, byte_fallback=True, ignore_merges=False,
                   vocab={p.piece: i for i, p in enumerate(pieces)},
                   merges=merges))


def train(texts: Iterable[str], vocab_size: int, seed: int = 0) -> bytes:
  """A byte-fallback BPE model of `texts`, as the bytes of tokenizer.model.

  Nothing is normalised, so decode(encode(x)) == x for every x, newlines
  included. A word of a small closed vocabulary becomes one piece once
  `vocab_size` allows; a corpus too small for `vocab_size` yields fewer pieces.

  Args:
    texts: the corpus; read once.
    vocab_size: pieces wanted, the 3 controls and 256 bytes included. At most
      half of the rest goes to single characters; rarer ones are spelt in bytes.
    seed: unused: nothing is drawn; one thread, the same bytes every time.

  Raises:
    ConfigError: the vocabulary cannot hold the controls and bytes, or there
      is no text.
  """
  del seed
  # NUL ends a C string; it stays encodable through its byte piece.
  texts = [text.replace("\0", "") for text in texts]
  counts = collections.Counter(itertools.chain.from_iterable(texts))
  room = (vocab_size - _FIXED) // 2
  if room < 1 or not counts:
    raise ConfigError(f"no tokenizer of {vocab_size} pieces from {len(texts)} "
                      f"texts of {len(counts)} characters, wanted some text "
                      f"and {_FIXED + 2} pieces or more; set "
                      "config.model.vocab_size")
  coverage = 1.0
  if len(counts) > room:
    most = sum(n for _, n in counts.most_common(room))
    coverage = (most - 0.5) / counts.total()
  out = io.BytesIO()
  try:
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=out, model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False,
        split_digits=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        hard_vocab_limit=False, character_coverage=coverage,
        max_sentence_length=1 << 30, num_threads=1, minloglevel=2)
  except Exception as error:  # the C++ library raises RuntimeError, OSError
    raise ConfigError(f"no tokenizer of {vocab_size} pieces could be trained "
                      f"({error!s:.200}); set config.model.vocab_size"
                      ) from error
  return out.getvalue()
