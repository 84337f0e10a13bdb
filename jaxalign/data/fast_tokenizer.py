"""Tokenizers of a tokenizer.json, by the `tokenizers` package."""

from collections.abc import Sequence
import json
import re
from typing import Any

import tokenizers

from jaxalign.core.errors import ConfigError
from jaxalign.data import special

_KNOB = "set config.model.tokenizer"
_PREFIX_KNOBS = dict(prepend_scheme="never", add_prefix_space=False)
_STEPS = ("normalizers", "pretokenizers", "decoders")  # keys of a Sequence
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class FastTokenizer(special.Encoding):
  """A tokenizer.json; its attributes are those of `special.Encoding`."""

  def __init__(self, settings: special.Settings, name: str = "tokenizer"):
    self._settings, self.files = settings, settings.files
    try:
      spec = json.loads(settings.files["tokenizer.json"])
      for token in spec.get("added_tokens") or []:
        if token["content"] in settings.special:
          token["special"] = True
      self._main = self._bare = _built(spec, settings, name)
      twin, self.adds_prefix = _without_prefix(spec)
      if self.adds_prefix:
        self._bare = _built(twin, settings, name)
    except _BROKEN as error:
      raise ConfigError(
        f"{name} is not a tokenizer.json ({error!s:.100}); {_KNOB}"
      ) from error
    known = sorted(self._main.get_added_tokens_decoder().items())
    self.added = {token.content: i for i, token in known}
    self.specials = {t.content: i for i, t in known if t.special and t.content}
    self.strips = {t.content: (t.lstrip, t.rstrip) for _, t in known}
    first = _steps(spec.get("normalizer")) + _steps(spec.get("pre_tokenizer"))
    self.prefixes_each = any(
      step.get("type") == "Prepend" or step.get("prepend_scheme") == "always"
      for step in first
    )
    self.vocab_size = 1 + max(self._main.get_vocab(True).values(), default=-1)
    named = {kind: text for kind, text in settings.named.items() if text}
    self.names = {f"{kind}_token": text for kind, text in named.items()}
    ids = {kind: self._main.token_to_id(text) for kind, text in named.items()}
    bos, pad, self.unk = (ids.get(kind) for kind in ("bos", "pad", "unk"))
    self.own_bos = -1 if bos is None else bos
    self._set_ends(name, self._first_id(bos), [ids.get("eos")])
    self.pad = self.eos if pad is None else pad

  def _first_id(self, bos: int | None) -> int:
    """The BOS that the post-processor puts first; -1 for none."""
    # As in transformers 5, whatever the config's add_bos_token.
    with_it = self._main.encode("a", add_special_tokens=True).ids
    without = self._main.encode("a", add_special_tokens=False).ids
    first = with_it[0] if with_it[:1] != without[:1] else -1
    return first if first in (bos, *self.specials.values()) else -1

  def reserve(self, texts: Sequence[str]) -> None:
    """Makes these added tokens special: no text can write them any more."""
    new = set(texts) - self.specials.keys()
    if new:
      eos, bos, known = self.eos, self.bos, self._settings.special
      self.__init__(self._settings._replace(special=known | new))
      self.ends_with(eos)
      self.bos = bos

  def encode_rendered(self, text: str) -> list[int]:
    """Ids of a template's own text: here specials are what they look like."""
    self._main.encode_special_tokens = False
    try:
      return self._main.encode(text, add_special_tokens=False).ids
    finally:
      self._main.encode_special_tokens = True

  def _encoded(self, texts: list[str], model: Any) -> list[list[int]]:
    rows = model.encode_batch(texts, add_special_tokens=False)
    return [row.ids for row in rows]

  def _decoded(self, ids: list[int], model: Any) -> str:
    return model.decode(ids)

  def pieces(self) -> list[str]:
    """The V pieces by id, as tokenizer.json writes them."""
    return [self._main.id_to_token(i) or "" for i in range(self.vocab_size)]


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
  """The spec that puts no space before a text, and whether this one did."""
  squeezing = {"WhitespaceSplit", "Whitespace", "Strip"}
  first = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
  if squeezing & {*re.findall(r'"type": "(\w+)"', first)}:
    return spec, False  # T5: a response would lose the space it begins with
  twin, prefixed = json.loads(json.dumps(spec)), False
  for part, key in zip(("normalizer", "pre_tokenizer", "decoder"), _STEPS):
    steps, changed = _steps(twin.get(part)), False
    for step in steps:
      for knob, off in _PREFIX_KNOBS.items():
        changed |= step.get(knob, off) != off
        step.update({knob: off} if knob in step else {})
    kept = [step for step in steps if not _is_prefix(step)]
    if len(kept) < len(steps):
      changed = True
      twin[part] = {"type": "Sequence", key: kept} if kept else None
    prefixed |= changed and part != "decoder"  # which has it by default
  return twin, prefixed


def _steps(part: Any) -> list[dict]:
  """The steps of a normalizer, pre-tokenizer or decoder, Sequences opened."""
  if not isinstance(part, dict):
    return []
  for key in _STEPS:
    if isinstance(part.get(key), list):
      return [step for inner in part[key] for step in _steps(inner)]
  return [part]


def _is_prefix(step: dict) -> bool:
  """Whether a step adds the space in front, or takes it away again."""
  strip = dict(type="Strip", content=" ", start=1, stop=0)
  return step.get("type") == "Prepend" or strip.items() <= step.items()
