"""Rows become tokens: by a chat template, or as the texts they are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import itertools
from typing import Any

import numpy as np

from jaxalign.core import progress
from jaxalign.core.errors import DataError
from jaxalign.data.chat import Chat
from jaxalign.data.chat_templates import template_source
from jaxalign.data.row_table import RowTable
from jaxalign.data.schemas.messages import uses_tools
from jaxalign.data.schemas.schema import ASSISTANT, Refused, turns_of
from jaxalign.data.tokens import Encoded, EncodedRows, fit_rows, Fitted

ANSWERS = ("chosen", "rejected", "completion", "response")
NO_TEMPLATE = "no template: rows are tokenized as the texts they are"
_CHUNK = 1024  # texts tokenized at once


def encode_texts(
  tok: Any,
  prompts: Sequence[str],
  sides: Mapping[str, Sequence[str]],
  context: int,
  too_long: str = "drop",
) -> Fitted:
  """R rows per prompt, one of each side.

  Args:
    tok: the tokenizer.
    prompts: n texts; a row's text is prompt + answer.
    sides: the R answers by name, n texts each.
    context: the most tokens a row may have, BOS and EOS included.
    too_long: see `fit_rows`.
  """
  texts = zip(prompts, *sides.values(), strict=True)
  encoded = []
  for chunk in _chunks(texts, len(prompts)):
    encoded += _text_ids(tok, chunk)
  return fit_rows(tok, encoded, list(sides), context, too_long)


def dialogues_to_ids(
  chat: Chat,
  turns: Sequence[list[dict[str, Any]]],
  answers: Sequence[Sequence[Any]],
) -> list[Encoded | Refused]:
  """Ids of every dialogue, or why the template will not have it.

  Args:
    chat: the tokenizer and its template.
    turns: of n prompts, messages.
    answers: R answers to each prompt, texts or messages.
  """
  dialogues = zip(turns, answers, strict=True)
  chunks = _chunks(dialogues, len(turns))
  return [_dialogue_ids(chat, *one) for chunk in chunks for one in chunk]


def _chunks(rows: Iterable, total: int) -> Iterator[list]:
  """Lists of some rows each, under a progress bar."""
  rows = iter(rows)
  with progress.bar("tokenize", total) as tick:
    while chunk := list(itertools.islice(rows, _CHUNK)):
      yield chunk
      tick(len(chunk))


def _dialogue_ids(
  chat: Chat, turns: list[dict], answers: Sequence[Any], tools: Any = None
) -> Encoded | Refused:
  try:
    return _with_eos(chat.tok, *chat.encode(turns, answers, tools or None))
  except Refused as error:
    return error


def _text_ids(
  tok: Any, rows: Sequence[Sequence[str]], special: bool = False
) -> list[Encoded]:
  """Ids of rows, each a prompt and R answers."""
  heads_of, tails_of = tok.encode_many, tok.encode_responses
  if special:
    heads_of = tails_of = lambda texts: [tok.encode_rendered(t) for t in texts]
  prompts, *sides = zip(*rows)
  heads = heads_of(prompts)
  if special:  # the row's BOS is written with the row
    heads = [head[head[:1] == [tok.bos] :] for head in heads]
  tails = zip(*map(tails_of, sides))
  return [_with_eos(tok, *row) for row in zip(heads, tails)]


def _with_eos(
  tok: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]]
) -> Encoded:
  ended = [[*x, tok.eos] if x[-1:] != [tok.eos] else x for x in answers]
  as_array = lambda ids: np.array(ids, np.int32)
  return Encoded(as_array(prompt), list(map(as_array, ended)))


class RowEncoder(contextlib.AbstractContextManager):
  """How the rows of a config become tokens.

  A class because what is in the rows decides, and a person reads how.

  Attributes:
    chat: the template, or None.
    special: whether special tokens in a text are read as such.
    splits: the rows as they are encoded, plain texts as turns where there is a
      template.
    description, warnings: sentences for a person.
  """

  def __init__(self, c: Any, tok: Any, splits: Mapping[str, RowTable]):
    self.c, self.tok, self.warnings, self.chat = c, tok, [], None
    self.special = c.data.special_tokens == "tokens"
    self.description, self.splits = NO_TEMPLATE, splits
    source = template_source(c.data.template, tok, True)
    plain = sum(1 for _ in self._texts())
    if self.special and source is not None and plain:
      if 2 * self._spelt(self._texts())[1] > plain:
        source = None  # the texts hold the template already
    # A tokenizer that is trained here makes nothing of "<s>" in a text.
    given = c.model.tokenizer or c.model.checkpoint
    if c.data.special_tokens == "auto" and given:
      self._warn_of_specials(wraps=bool(source and plain))
    if source is None:
      self._warn_of_spaces()
    else:
      self.chat = Chat(tok, source, reads_tokens=self.special)
      self.warnings += self.chat.warnings
      own = c.data.template == "auto"
      name = "the tokenizer's own" if own else c.data.template
      self.description = f"chat template: {name}"
      if plain:
        self.description += (
          f"; {plain:,} rows of plain text are wrapped as turns "
          "(data.template='none' leaves them alone)"
        )
        self.splits = {n: rows.map(_wrapped) for n, rows in splits.items()}
    for text in self.warnings:
      progress.say(f"  warning: {text}")

  def __exit__(self, *error: Any) -> None:
    if self.chat:
      self.chat.renderer.close()

  def fit(
    self, rows: RowTable, encoded: EncodedRows, context: int, too_long: str
  ) -> Fitted:
    """The token rows of what `encode` made of some rows."""
    names, history = answer_names(rows), self.chat is not None
    options = dict(history=history, special=self.special)
    return fit_rows(self.tok, encoded, names, context, too_long, **options)

  def encode(self, rows: RowTable) -> EncodedRows:
    """Ids of every row, or why there are none."""
    out, names = EncodedRows(), answer_names(rows)
    for chunk in _chunks(rows, len(rows)):
      out.extend(self._encode(chunk, names))
    return out

  def _encode(
    self, rows: list[dict], names: Sequence[str]
  ) -> Iterable[Encoded | Refused]:
    if self.chat:
      ids_of = lambda *row: _dialogue_ids(self.chat, *row)
      answers = [answers_of(row, names) for row in rows]
      tools = [row.get("tools") for row in rows]
      return map(ids_of, map(self._turns, rows), answers, tools)
    texts = [[row[name] for name in ("prompt", *names)] for row in rows]
    ids = _text_ids(self.tok, texts, self.special)
    no_tools = Refused(
      "tool calls are not supported",
      "without a chat template; set config.model.checkpoint or "
      "config.data.template",
    )
    return (no_tools if uses_tools(r) else row for r, row in zip(rows, ids))

  def _turns(self, row: dict) -> list[dict]:
    """The prompt's turns, a system turn joined to the user's if so wished."""
    system, *rest = row["turns"]
    if self.c.data.system != "join" or system["role"] != "system":
      return row["turns"]
    for i, turn in enumerate(rest):
      if turn["role"] == "user":
        text = f"{system['content']}\n\n{turn['content']}"
        return [*rest[:i], turn | dict(content=text), *rest[i + 1 :]]
    return row["turns"]

  def _rows(self) -> Iterator[dict]:
    return itertools.chain.from_iterable(self.splits.values())

  def _texts(self) -> Iterator[dict]:
    """The rows that are texts and no dialogues."""
    return (row for row in self._rows() if not row.get("turns"))

  def _spelt(self, rows: Iterable[dict]) -> tuple[dict, int, list[str]]:
    """The first row in whose texts special tokens are written out, how many
    there are, and which tokens."""
    first, count, names = {}, 0, set()
    for row in rows:
      texts = [row["prompt"], *(row[n] for n in ANSWERS if n in row)]
      if spelt := self.tok.specials_in("\n".join(texts)):
        first, count = first or row, count + 1
        names |= {*spelt}
    return first, count, sorted(names)

  def _warn_of_specials(self, wraps: bool) -> None:
    """Names special tokens that are spelt out; in most rows, an error."""
    first, count, names = self._spelt(self._rows())
    if not count:
      return
    rows = sum(map(len, self.splits.values()))
    twice = ", and the template would be written around them a second time"
    what = (
      f"{count:,} of {rows:,} rows have special tokens of the "
      f"tokenizer in their text ({', '.join(names[:6])}), id "
      f"{first['id']} for one; as text they are spelt in pieces"
      f"{twice if wraps else ''}. Give messages without them (a list of role "
      "and content), or read them as tokens as TRL does, "
      "config.data.special_tokens='tokens'"
    )
    if count * 2 > rows:
      raise DataError(f"{what}; 'text' takes them as they are")
    self.warnings.append(what)

  def _warn_of_spaces(self) -> None:
    """A space at a prompt's end is a token of its own, which no model saw."""
    texts = self._texts()
    ends = [r["id"] for r in texts if r["prompt"].endswith((" ", "\t"))]
    if ends:
      self.warnings.append(
        f"{len(ends):,} prompts end in a space (id {ends[0]} for one), "
        "which most tokenizers put before the next word: move it to the "
        "beginning of the answers"
      )


def _wrapped(row: dict) -> dict:
  """A row of plain text as turns of a dialogue."""
  if row.get("turns"):
    return row
  user = dict(role="user", content=row["prompt"])
  return row | dict(turns=turns_of(row["prompt"]) or [user])


def answer_names(rows: Sequence[dict]) -> tuple[str, ...]:
  """What the answers of these rows are called."""
  return tuple(n for n in ANSWERS if n in rows[0]) if rows else ("response",)


def answers_of(row: dict, names: Sequence[str]) -> list[Any]:
  """The answers of a row for a template: texts, or messages with calls.

  The space in front of a dialogue's answer belongs to its text marker.
  """
  if row.get("answers"):
    return list(row["answers"])
  space = " " if row["prompt"].endswith(ASSISTANT) else ""
  return [row[name].removeprefix(space) for name in names]
