"""What a Hugging Face folder says about its tokenizer's special tokens.

The names of BOS, EOS and PAD, the ids that end a generation and the chat
template stand in up to six files beside the tokenizer; this reads them all.
"""

from collections.abc import Iterable, Sequence
import itertools
import json
import re
from typing import Any, NamedTuple

from etils import epath

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
  """What the two kinds of tokenizer share.

  Each has two models for `_ids(texts, model)`: `_main` of texts that begin a
  row, `_bare` of texts that continue another.

  Attributes:
    bos: id that begins a row, or -1 where none does (as with Qwen).
    own_bos: the tokenizer's, whether rows begin with it or not.
    eos: id that ends a row: the tokenizer's EOS, or a chat template's own end
      of a turn once one was chosen.
    stops: all ids that end a generation.
    pad: the tokenizer's own, else another; no mask depends on it.
    specials: text -> id of every token that only a template may write.
    added: text -> id of those and of all others beside the vocabulary.
    names: bos_token and so on -> the token's text, for a template.
    template, tool_template: the chat template, and that for tools where it is
      another; or None.
    vocab_size: V.
    digest: sha256 of what it was read from.
    files: name -> bytes of that.
  """

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
    return self._ids(texts, self._main)

  def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode_response` of each text."""
    return self._ids(texts, self._bare)

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


def specials_in(tok: Encoding, text: str) -> list[str]:
  """The special tokens of a tokenizer that are spelt out in a text, each once.

  They are characters there, and no tokens: see `tokenizer.py`.
  """
  pattern = tok.__dict__.get("_found")
  if pattern is None or pattern[0] is not tok.specials:
    texts = [t for t in tok.specials if len(t) > 1]
    pattern = tok._found = (tok.specials, re.compile(any_of(texts)))
  return list(dict.fromkeys(pattern[1].findall(text)))


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
  found = {name: _bytes(folder / name) for name in FILES}
  files = {name: data for name, data in found.items() if data is not None}
  object_of = lambda name: _object(folder / name, _bytes(folder / name))
  config = object_of("tokenizer_config.json")
  token_map = object_of("special_tokens_map.json")
  named, special = {}, set()
  for name in _NAMES:
    key = f"{name}_token"
    named[name] = _text(config.get(key)) or _text(token_map.get(key))
  for source in (token_map, config):
    for key in ("additional_special_tokens", "extra_special_tokens"):
      several = source.get(key) or ()
      several = several.values() if isinstance(several, dict) else several
      special |= {_text(value) for value in several}
  added = _added(config, object_of("added_tokens.json"))
  row_format = object_of(ROW_FORMAT)
  special |= {*named.values(), *row_format.get("reserved", ())}
  special |= {text for text, (_, is_special) in added.items() if is_special}
  stops = list(row_format.get("stops", ()))
  for name in ("generation_config.json", "config.json"):
    ids = object_of(name).get("eos_token_id")
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


def _object(path: epath.Path, data: bytes | None) -> dict[str, Any]:
  if data is None:
    return {}
  try:
    value = json.loads(data)
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
  data = files.get("chat_template.json")
  value = _object(folder / "chat_template.json", data).get("chat_template")
  value = value or config.get("chat_template")
  if isinstance(value, list):
    items = [item for item in value if isinstance(item, dict)]
    value = {item.get("name"): item.get("template") for item in items}.get(name)
  elif name != "default":
    return None
  return value if isinstance(value, str) and value else None
