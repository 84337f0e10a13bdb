"""Tokenizers of a tokenizer.json, by the `tokenizers` package."""

from collections.abc import Iterable, Sequence
import hashlib
import json
import re
from typing import Any

from etils import epath
import tokenizers

from jaxalign.core import disk
from jaxalign.core.errors import ConfigError
from jaxalign.data import special

_KNOB = "set config.model.tokenizer"


class FastTokenizer(special.Encoding):
  """A tokenizer.json; its attributes are those of `special.Encoding`."""

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
    known = dict(sorted(self._main.get_added_tokens_decoder().items()))
    self.added = {token.content: i for i, token in known.items()}
    self.specials = {
      token.content: i
      for i, token in known.items()
      if token.special and token.content
    }
    self.strips = {t.content: (t.lstrip, t.rstrip) for t in known.values()}
    first = _steps(spec.get("normalizer")) + _steps(spec.get("pre_tokenizer"))
    self.prefixes_each = any(
      step.get("type") == "Prepend" or step.get("prepend_scheme") == "always"
      for step in first
    )
    self.vocab_size = 1 + max(self._main.get_vocab(True).values(), default=-1)
    decided, eos = settings.row_format, self._id("eos")
    stops = [*([] if eos is None else [eos]), *settings.stops]
    self.eos = decided.get("eos", stops[0] if stops else None)
    if self.eos is None or not 0 <= self.eos < self.vocab_size:
      raise ConfigError(
        f"{name} names no EOS token that it has, and every whole response ends "
        f"in one; {_KNOB}"
      )
    self.stops = tuple(dict.fromkeys([self.eos, *stops]))
    self.unk, bos, pad = (self._id(kind) for kind in ("unk", "bos", "pad"))
    self.own_bos = -1 if bos is None else bos
    self.pad = self.eos if pad is None else pad
    self.bos = decided.get("bos", self._bos())
    named = settings.named.items()
    self.names = {f"{kind}_token": text for kind, text in named if text}
    self.template = settings.template
    self.tool_template = settings.tool_template
    files = sorted(settings.files.items())
    sized = [f"{n} {len(data)}\n".encode() + data for n, data in files]
    self.digest = hashlib.sha256(b"".join(sized)).hexdigest()

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
    longer = [s for s in self.specials if len(s) > 1]
    cuts = [f"{re.escape(s[0])}(?={re.escape(s[1:])})" for s in longer]
    found = re.finditer("|".join(cuts), text) if cuts else ()
    at, out = [0, *(m.end() for m in found), len(text)], []
    for first, end in zip(at, at[1:]):
      ids = (
        (self._bare if first else model)
        .encode(text[first:end], add_special_tokens=False)
        .ids
      )
      unk = self.unk
      out += [unk if i in forged and unk is not None else i for i in ids]
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
      disk.write_bytes(epath.Path(folder) / name, data)

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
  order = lambda item: (item[1][0] is None, item[1][0])
  for text, (i, is_special) in sorted(settings.added.items(), key=order):
    if fast.token_to_id(text) is not None:
      continue
    is_special = is_special or text in settings.special
    options = dict(special=is_special, normalized=False)
    fast.add_tokens([tokenizers.AddedToken(text, **options)])
    if fast.token_to_id(text) != i:
      raise ConfigError(
        f"{name}: tokenizer_config.json gives {text!r} the id {i}, there it "
        f"would be {fast.token_to_id(text)}; {_KNOB}"
      )
  fast.encode_special_tokens = True
  return fast


def _without_prefix(spec: dict) -> tuple[dict, bool]:
  """The spec that puts no space before a text, and whether this one did.

  Where it also squeezes spaces (T5) nothing is changed: the space that a
  response begins with would be lost.
  """
  squeezing = {"WhitespaceSplit", "Whitespace", "Strip"}
  first = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
  if squeezing & {*re.findall(r'"type": "(\w+)"', first)}:
    return spec, False
  twin, found = json.loads(json.dumps(spec)), False
  for part, key in (
    ("normalizer", "normalizers"),
    ("pre_tokenizer", "pretokenizers"),
    ("decoder", "decoders"),
  ):
    steps, changed = _steps(twin.get(part)), False
    for step in steps:
      for knob, off in _PREFIX_KNOBS.items():
        changed |= step.get(knob, off) != off
        step.update({knob: off} if knob in step else {})
    kept = [step for step in steps if not _is_prefix(step)]
    if len(kept) < len(steps):
      changed = True
      twin[part] = {"type": "Sequence", key: kept} if kept else None
    found |= changed and part != "decoder"  # which has it by default
  return twin, found


_PREFIX_KNOBS = dict(prepend_scheme="never", add_prefix_space=False)


def _steps(part: Any) -> list[dict]:
  """The steps of a normalizer, pre-tokenizer or decoder, Sequences opened."""
  if not isinstance(part, dict):
    return []
  for key in ("normalizers", "pretokenizers", "decoders"):
    if isinstance(part.get(key), list):
      return [step for inner in part[key] for step in _steps(inner)]
  return [part]


def _is_prefix(step: dict) -> bool:
  """Whether a step adds the space in front, or takes it away again."""
  strip = dict(type="Strip", content=" ", start=1, stop=0)
  return step.get("type") == "Prepend" or strip.items() <= step.items()
