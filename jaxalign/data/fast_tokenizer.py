"""Tokenizers of a tokenizer.json, by the `tokenizers` package."""

from collections.abc import Iterable, Sequence
import hashlib
import json
import re
from typing import Any

from etils import epath
import tokenizers

from jaxalign.core import artifacts
from jaxalign.core.errors import ConfigError
from jaxalign.data import special

_KNOB = "set config.model.tokenizer"


class FastTokenizer(special.Encoding):
  """A tokenizer.json with the methods of `tokenizer.SentencePieceTokenizer`.

  Attributes:
    bos: id that begins a row, or -1 where none does (as with Qwen).
    eos: id that ends a row: the tokenizer's EOS, or a chat template's own end
      of a turn once one was chosen. stops: all ids that end a generation.
    pad: the tokenizer's own, else `eos`; no mask depends on it.
    specials: text -> id of every token that only a template may write.
    template, tool_template: the chat template, and that for tools where it is
      another; or None. vocab_size: V. digest: sha256.
    files: name -> bytes of what it was read from.
  """

  def __init__(self, settings: special.Settings, name: str = "tokenizer"):
    self._settings, self.files = settings, settings.files
    data = settings.files["tokenizer.json"]
    try:
      spec = json.loads(data)
      for token in spec.get("added_tokens") or []:
        if token["content"] in settings.special:
          token["special"] = True
      self._main = _built(spec, settings, name)
      twin, self.adds_prefix = _without_prefix(spec)
      self._bare = (
        _built(twin, settings, name) if self.adds_prefix else self._main
      )
    except (
      ValueError,
      TypeError,
      KeyError,
      AttributeError,
      RecursionError,
    ) as error:
      raise ConfigError(
        f"{name} is not a tokenizer.json ({error!s:.100}); {_KNOB}"
      ) from error
    known = self._main.get_added_tokens_decoder()
    self.specials = {
      token.content: i
      for i, token in sorted(known.items())
      if token.special and token.content
    }
    self.strips = {
      token.content: (token.lstrip, token.rstrip) for token in known.values()
    }
    first = _steps(spec.get("normalizer")) + _steps(spec.get("pre_tokenizer"))
    self.prefixes_each = any(
      step.get("type") == "Prepend" or step.get("prepend_scheme") == "always"
      for step in first
    )
    self.added = {token.content: i for i, token in sorted(known.items())}
    self.vocab_size = 1 + max(self._main.get_vocab(True).values(), default=-1)
    decided = settings.row_format
    eos = self._id("eos")
    self.eos = decided.get(
      "eos", settings.stops[0] if eos is None and settings.stops else eos
    )
    if self.eos is None or not 0 <= self.eos < self.vocab_size:
      raise ConfigError(
        f"{name} names no EOS token that it has, and every "
        f"whole response ends in one; {_KNOB}"
      )
    self.stops = tuple(
      dict.fromkeys(
        [self.eos, *([] if eos is None else [eos]), *settings.stops]
      )
    )
    self.unk = self._id("unk")
    self.own_bos = self._id("bos")
    self.own_bos = -1 if self.own_bos is None else self.own_bos
    self.bos = decided.get("bos", self._bos())
    self.names = {
      f"{kind}_token": text for kind, text in settings.named.items() if text
    }
    pad = self._id("pad")
    self.pad = self.eos if pad is None else pad
    self.template = settings.template
    self.tool_template = settings.tool_template
    self.digest = hashlib.sha256(
      b"".join(
        f"{n} {len(b)}\n".encode() + b
        for n, b in sorted(settings.files.items())
      )
    ).hexdigest()

  def _id(self, name: str) -> int | None:
    text = self._settings.named[name]
    return self._main.token_to_id(text) if text else None

  def _bos(self) -> int:
    """The BOS that transformers puts first: its post-processor's.

    transformers 5 does not ask for add_bos_token where a tokenizer.json is.
    """
    bos = self._id("bos")
    with_it = self._main.encode("a", add_special_tokens=True).ids
    without = self._main.encode("a", add_special_tokens=False).ids
    first = with_it[0] if with_it[:1] != without[:1] else -1
    return first if first in (bos, *self.specials.values()) else -1

  def reserve(self, texts: Sequence[str]) -> None:
    """Makes these added tokens special: no text can write them any more."""
    new = set(texts) - self.specials.keys()
    if new:
      eos, bos = self.eos, self.bos
      self.__init__(
        self._settings._replace(special=self._settings.special | new)
      )
      self.ends_with(eos)
      self.bos = bos

  def encode_rendered(self, text: str) -> list[int]:
    """Ids of a template's own text: here specials are what they look like."""
    self._main.encode_special_tokens = False
    try:
      return self._main.encode(text, add_special_tokens=False).ids
    finally:
      self._main.encode_special_tokens = True

  def _ids(self, texts: Sequence[str], model: Any) -> list[list[int]]:
    texts = list(texts)
    ids = [e.ids for e in model.encode_batch(texts, add_special_tokens=False)]
    if self.specials:
      forged = set(self.specials.values()) - {self.unk}
      for i, row in enumerate(ids):
        if not forged.isdisjoint(row):  # the model knows it as a word, too
          ids[i] = self._in_parts(texts[i], model, forged)
    return ids

  def _in_parts(self, text: str, model: Any, forged: set[int]) -> list[int]:
    """Ids of a text cut inside everything that looks special."""
    pattern = "|".join(
      f"{re.escape(s[0])}(?={re.escape(s[1:])})"
      for s in self.specials
      if len(s) > 1
    )
    at = [m.end() for m in re.finditer(pattern, text)] if pattern else []
    out, cuts = [], [0, *at, len(text)]
    for k, (a, b) in enumerate(zip(cuts, cuts[1:])):
      part = (
        (self._bare if k else model)
        .encode(text[a:b], add_special_tokens=False)
        .ids
      )
      out += [
        self.unk if i in forged and self.unk is not None else i for i in part
      ]
    return out

  def decode(self, ids: Iterable[int]) -> str:
    """Text of a row, or of its beginning; special tokens have no text."""
    return self._main.decode([int(i) for i in ids])

  def decode_response(self, ids: Iterable[int]) -> str:
    """Text of a response alone, its leading space kept."""
    return self._bare.decode([int(i) for i in ids])

  def pieces(self) -> list[str]:
    """The V pieces by id, as tokenizer.json writes them."""
    return [self._main.id_to_token(i) or "" for i in range(self.vocab_size)]

  def check_export(self) -> None:
    """Nothing: its own files are copied."""

  def export(self, folder: epath.PathLike) -> None:
    """Writes the files it was read from, byte for byte.

    Raises:
      WriteError: the folder cannot be written.
    """
    for name, data in self._settings.files.items():
      artifacts.write_bytes(epath.Path(folder) / name, data)

  save = export


def _built(
  spec: dict, settings: special.Settings, name: str
) -> tokenizers.Tokenizer:
  """The tokenizer of a spec, with what tokenizer_config.json adds to it."""
  try:
    fast = tokenizers.Tokenizer.from_str(json.dumps(spec))
  except BaseException as error:  # Rust panics are no Exception
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
      raise
    raise ValueError(str(error)) from error
  fast.no_truncation()
  fast.no_padding()
  for text, (i, is_special) in sorted(
    settings.added.items(), key=lambda item: (item[1][0] is None, item[1][0])
  ):
    if fast.token_to_id(text) is None:
      fast.add_tokens(
        [
          tokenizers.AddedToken(
            text,
            special=is_special or text in settings.special,
            normalized=False,
          )
        ]
      )
      if fast.token_to_id(text) != i:
        raise ConfigError(
          f"{name}: tokenizer_config.json gives {text!r} the "
          f"id {i}, there it would be "
          f"{fast.token_to_id(text)}; {_KNOB}"
        )
  fast.encode_special_tokens = True
  return fast


def _without_prefix(spec: dict) -> tuple[dict, bool]:
  """The spec that puts no space before a text, and whether this one did.

  Where it also squeezes spaces (T5) nothing is changed: the space that a
  response begins with would be lost.
  """
  twin, found = json.loads(json.dumps(spec)), False
  for part in ("normalizer", "pre_tokenizer", "decoder"):
    steps = _steps(twin.get(part))
    for step in steps:
      for key, none in (
        ("prepend_scheme", "never"),
        ("add_prefix_space", False),
      ):
        if step.get(key, none) != none:
          step[key] = none
          found = found or part != "decoder"  # which has it by default
    kept = [step for step in steps if not _prefix(step)]
    if len(kept) < len(steps):
      found = found or part != "decoder"
      twin[part] = (
        {
          "normalizer": dict(type="Sequence", normalizers=kept),
          "decoder": dict(type="Sequence", decoders=kept),
          "pre_tokenizer": None,
        }[part]
        if kept
        else None
      )
  squeezes = re.search(
    r'"type": "(WhitespaceSplit|Whitespace|Strip)"',
    json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")]),
  )
  return (spec, False) if squeezes else (twin, found)


def _steps(part: Any) -> list[dict]:
  """The steps of a normalizer, pre-tokenizer or decoder, Sequences opened."""
  if not isinstance(part, dict):
    return []
  for key in ("normalizers", "pretokenizers", "decoders"):
    if isinstance(part.get(key), list):
      return [step for inner in part[key] for step in _steps(inner)]
  return [part]


def _prefix(step: dict) -> bool:
  """Whether a step adds the space in front, or takes it away again."""
  return (
    step.get("type") == "Prepend"
    or step.get("type") == "Strip"
    and step.get("start") == 1
    and step.get("stop") == 0
    and step.get("content") == " "
  )
