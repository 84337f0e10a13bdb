"""What a Hugging Face folder says about its tokenizer's special tokens.

The names of BOS, EOS and PAD, the ids that end a generation and the chat
template stand in up to six files of the folder; this reads them all.
"""

from collections.abc import Iterable, Sequence
import itertools
import json
import re
from typing import Any, NamedTuple

from etils import epath

from jaxalign.core import disk
from jaxalign.core.errors import ConfigError

_KNOB = "set config.model.tokenizer"
ROW_FORMAT = "row_format.json"  # written by the data stage: what it decided
_TOOL_FILE = "additional_chat_templates/tool_use.jinja"
# Copied byte for byte with the tokenizer, where they are there.
FILES = (
  "tokenizer.json",
  "tokenizer.model",
  "sentencepiece.model",
  "spiece.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "vocab.json",
  "merges.txt",
  _TOOL_FILE,
)
_NAMES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
_MOST = 1 << 28  # bytes of one file


class Settings(NamedTuple):
  """What the files say; None or empty where they say nothing."""

  files: dict[str, bytes]  # those of FILES that are there
  named: dict[str, str | None]  # bos, eos, pad, unk ... -> the token's text
  special: set[str]  # all texts that are named as special
  added: dict[str, tuple[int | None, bool]]  # text -> id, whether special
  adds_bos: bool | None  # add_bos_token of the config
  stops: tuple[int, ...]  # eos_token_id of generation and model config
  template: str | None  # of chats
  row_format: dict[str, Any]  # the data stage's decisions
  tool_template: str | None = None  # of chats with tools, where it is another


class Encoding:
  """What the two kinds of tokenizer have in common.

  Each has two models, `_main` of texts that begin a row and `_bare` of texts
  that continue another; `_encoded(texts, model)` are the ids of texts, and
  `_decoded(ids, model)` is the text of ids.

  Attributes:
    bos: id that begins a row, or -1 where none does (as with Qwen).
    own_bos: the tokenizer's, whether rows begin with it or not.
    eos: id that ends a row: the tokenizer's EOS, or a chat template's own end
      of a turn once one was chosen.
    stops: all ids that end a generation.
    pad: the tokenizer's own, else another; no mask depends on it.
    specials: text -> id of every token that only a template may write.
    added: text -> id of those and of all others outside the vocabulary.
    strips: text -> whether such a token takes the blanks before, and after it.
    prefixes_each: a space is put before the text after every special token.
    names: bos_token and so on -> the token's text, for a template.
    template, tool_template: the chat template, and that for tools where it is
      another; or None.
    vocab_size: V.
    files: name -> bytes of what it was read from.
  """

  def _set_ends(self, name: str, bos: int, stops: Sequence[int | None]) -> None:
    """Sets what begins and ends a row, the data stage's decisions first."""
    decided, self._spelt = self._settings.row_format, None
    self.template = self._settings.template
    self.tool_template = self._settings.tool_template
    self.bos = decided.get("bos", bos)
    stops = dict.fromkeys([decided.get("eos"), *stops, *self._settings.stops])
    known = [i for i in stops if i is not None and 0 <= i < self.vocab_size]
    if not known:
      raise ConfigError(
        f"{name} has no EOS token, and every whole response ends in one; "
        f"{_KNOB}"
      )
    self.eos, self.stops = known[0], tuple(known)

  def ends_with(self, eos: int) -> None:
    """From now on rows end with `eos`; what ended them still stops."""
    self.eos = eos
    self.stops = tuple(dict.fromkeys([eos, *self.stops]))

  def encode(self, text: str, begins: bool = False) -> list[int]:
    """Ids of `text`, with BOS in front if it `begins` a row; never an EOS."""
    head = [self.bos] if begins and self.bos >= 0 else []
    return head + self.encode_many([text])[0]

  def encode_response(self, text: str) -> list[int]:
    """Ids of a text that continues another: no space is put before it."""
    return self.encode_responses([text])[0]

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text."""
    return self._ids(list(texts), self._main)

  def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode_response` of each text."""
    return self._ids(list(texts), self._bare)

  def _ids(self, texts: list[str], model: Any) -> list[list[int]]:
    """Ids of texts; one that a model takes for special is cut inside it."""
    out = self._encoded(texts, model)
    forged = {*self.specials.values()} - {self.unk}
    for i, ids in enumerate(out):
      if not forged.isdisjoint(ids):  # the model knows it as a word, too
        longer = [x for x in self.specials if len(x) > 1]
        cuts = [f"(?<={re.escape(x[0])})(?={re.escape(x[1:])})" for x in longer]
        first, *rest = re.split("|".join(cuts) or "(?!)", texts[i])
        parts = self._encoded([first], model) + self._encoded(rest, self._bare)
        unk = {} if self.unk is None else dict.fromkeys(forged, self.unk)
        out[i] = [unk.get(j, j) for j in itertools.chain(*parts)]
    return out

  def decode(self, ids: Iterable[int]) -> str:
    """Text of a row, or of its beginning; special tokens have no text."""
    return self._decoded(list(map(int, ids)), self._main)

  def decode_response(self, ids: Iterable[int]) -> str:
    """Text of a response alone, its leading space kept."""
    return self._decoded(list(map(int, ids)), self._bare)

  def decode_visible(self, ids: Iterable[int]) -> str:
    """Text of a row, or of its beginning, as it was understood.

    Special tokens show as their text, where `decode` leaves them out.
    """
    names, out = {i: text for text, i in self.specials.items()}, []
    begins = [[], [names.get(self.own_bos)]]  # a text's own beginning
    for special, run in itertools.groupby(map(int, ids), names.__contains__):
      if special:
        out += [names[i] for i in run]
      else:
        first = out in begins or self.prefixes_each
        out.append((self.decode if first else self.decode_response)(run))
    return "".join(out)

  def specials_in(self, text: str) -> list[str]:
    """The special tokens that are spelt out in a text, each once.

    They are characters there, and no tokens: see `tokenizer.py`.
    """
    if self._spelt is None:
      self._spelt = re.compile(any_of(t for t in self.specials if len(t) > 1))
    return list(dict.fromkeys(self._spelt.findall(text)))

  def check_export(self) -> None:
    """Raises ConfigError where `export` has no way to write this model."""

  def save(self, folder: epath.PathLike) -> None:
    """Writes the files it was read from, byte for byte."""
    for name, data in self.files.items():
      disk.write_bytes(epath.Path(folder) / name, data)

  def export(self, folder: epath.PathLike) -> None:
    """Writes what `transformers` reads.

    Raises:
      ConfigError: see `check_export`; nothing was written.
      WriteError: the folder cannot be written.
    """
    self.save(folder)


def any_of(texts: Iterable[str]) -> str:
  """A regular expression of any of the texts, of two the longer.

  It branches character by character: some tokenizers have 6,000 of them.
  """
  tree: dict[str, Any] = {}
  for text in texts:
    node = tree
    for c in text:
      node = node.setdefault(c, {})
    node[""] = {}

  def written(node: dict[str, Any]) -> str:
    out = ""
    while len(node) == 1 and "" not in node:
      [(c, node)] = node.items()
      out += re.escape(c)
    ways = [re.escape(c) + written(rest) for c, rest in node.items() if c]
    return out + (f"(?:{'|'.join(ways)}){'?' * ('' in node)}" if ways else "")

  return written(tree) if tree else "(?!)"  # which is nowhere


EMPTY = Settings({}, dict.fromkeys(_NAMES), set(), {}, None, (), None, {})


def read_settings(folder: epath.PathLike) -> Settings:
  """The settings of a folder.

  Raises:
    ConfigError: a file cannot be read or is no JSON object.
  """
  folder = epath.Path(folder)
  files = {name: _bytes(folder / name) for name in FILES}
  files = {name: data for name, data in files.items() if data is not None}
  config = _object(folder / "tokenizer_config.json")
  token_map = _object(folder / "special_tokens_map.json")
  row_format = _object(folder / ROW_FORMAT)
  added = _added(config, _object(folder / "added_tokens.json"))
  text_of = lambda key: _text(config.get(key)) or _text(token_map.get(key))
  named = {name: text_of(f"{name}_token") for name in _NAMES}
  special = {*named.values(), *row_format.get("reserved", ())}
  special |= {text for text, (_, is_special) in added.items() if is_special}
  for source in (token_map, config):
    for key in ("additional_special_tokens", "extra_special_tokens"):
      several = source.get(key) or ()
      several = several.values() if isinstance(several, dict) else several
      special |= {_text(value) for value in several}
  stops = list(row_format.get("stops", ()))
  for name in ("generation_config.json", "config.json"):
    ids = _object(folder / name).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    stops += [i for i in ids if isinstance(i, int) and not isinstance(i, bool)]
  adds = config.get("add_bos_token")
  return Settings(
    files,
    named,
    special - {None},
    added,
    adds if isinstance(adds, bool) else None,
    tuple(dict.fromkeys(stops)),
    _template(folder, files, config, "default"),
    row_format,
    _template(folder, files, config, "tool_use"),
  )


def _bytes(path: epath.Path) -> bytes | None:
  try:
    if not path.exists() or path.is_dir():
      return None
    if path.stat().length > _MOST:
      raise ConfigError(f"{path} is over {_MOST >> 20} MiB; {_KNOB}")
    return path.read_bytes()
  except OSError as error:
    raise ConfigError(f"{path} cannot be read ({error}); {_KNOB}") from error


def _object(path: epath.Path) -> dict[str, Any]:
  """A file's JSON object, empty where there is no file."""
  data = _bytes(path)
  try:
    value = {} if data is None else json.loads(data)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{path} is no JSON ({error!s:.100}); {_KNOB}") from error
  if not isinstance(value, dict):
    kind = type(value).__name__
    raise ConfigError(f"{path} holds a {kind}, wanted a JSON object; {_KNOB}")
  return value


def _text(value: Any) -> str | None:
  """A token as its text, or as {"content": text}."""
  if isinstance(value, dict):
    value = value.get("content")
  return value if isinstance(value, str) and value else None


def _added(config: dict, more: dict) -> dict[str, tuple[int | None, bool]]:
  added = {text: (i, False) for text, i in more.items() if isinstance(i, int)}
  decoder = config.get("added_tokens_decoder")
  for i, token in decoder.items() if isinstance(decoder, dict) else ():
    if (text := _text(token)) and str(i).isdecimal():
      special = isinstance(token, dict) and token.get("special") is True
      added[text] = (int(i), special)
  return added


def _template(
  folder: epath.Path, files: dict[str, bytes], config: dict, name: str
) -> str | None:
  """The chat template of a name: "default", or "tool_use" if there is one."""
  file = _TOOL_FILE if name == "tool_use" else "chat_template.jinja"
  if file in files:
    try:
      return files[file].decode("utf-8")
    except UnicodeDecodeError as error:
      raise ConfigError(f"{folder}/{file} is no UTF-8; {_KNOB}") from error
  if "chat_template.jinja" in files:
    return None
  value = _object(folder / "chat_template.json").get("chat_template")
  value = value or config.get("chat_template")
  if isinstance(value, list):
    items = [item for item in value if isinstance(item, dict)]
    value = {item.get("name"): item.get("template") for item in items}.get(name)
  elif name != "default":
    return None
  return value if isinstance(value, str) and value else None
